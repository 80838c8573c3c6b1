"""Attributions in the hands of other packages, wherever these are installed"""

from dataclasses import replace

import numpy as np
import pytest

from llm_analysis.explain.result import Attribution

SPANS = ((0, 3), (4, 8), (9, 13))


def made(targets: tuple[str, ...] = ()) -> Attribution:
    values, base = np.array([3.0, 0.25, -2.0]), 0.5
    if targets:
        values, base = np.stack([values, -values], axis=1), np.array([0.5, -0.5])
    full = base + values.sum(0)
    ends = dict(values=values, stderr=np.full(values.shape, 0.1), base_value=base, full_value=full, targets=targets)
    what = dict(answer="bad", choice=0, unit="nats", estimator="8 pairs", evaluations=8, prompts=9, computed=120)
    text = dict(text="not very good!", players=("not", "very", "good"), spans=SPANS, focus=0 if targets else -1)
    return Attribution(**text, **ends, **what, seed=0, row_id=0, model="made (up)")


def test_methods_come_with_the_import_of_attribution():
    from llm_analysis.explain.attribution import explain_text

    assert explain_text.__annotations__["return"] is Attribution
    assert callable(Attribution.to_shap) and callable(Attribution.to_shapiq)


def test_shap():
    shap = pytest.importorskip("shap")
    one, two = made().to_shap(), made(("bad", "good")).to_shap()
    assert isinstance(one, shap.Explanation)
    assert one.values.tolist() == [3.0, 0.25, -2.0] and one.base_values == 0.5
    assert one.error_std.tolist() == [0.1] * 3 and list(one.data) == ["not ", "very ", "good"]
    picked = two[:, "good"]
    assert two.shape == (3, 2) and picked.base_values == -0.5 and picked.values.tolist() == [-3.0, -0.25, 2.0]
    assert "very" in shap.plots.text(one, display=False)


def test_shapiq():
    shapiq = pytest.importorskip("shapiq")
    a = made()
    found = a.to_shapiq()
    game = lambda coal: a.base_value + coal @ a.values  # noqa: E731
    truth = shapiq.ExactComputer(game=game, n_players=3)("SV", 1)
    assert isinstance(found, shapiq.InteractionValues)
    assert (found.index, found.n_players, found.min_order, found.max_order) == ("SV", 3, 0, 1)
    assert found.interaction_lookup == truth.interaction_lookup and found.baseline_value == truth.baseline_value
    assert np.allclose(found.values, truth.values) and np.allclose(found.get_n_order_values(1), a.values)
    assert found.estimated and not replace(a, estimator="exact").to_shapiq().estimated
    assert made(("bad", "good")).to_shapiq() == found
