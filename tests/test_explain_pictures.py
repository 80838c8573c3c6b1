"""Attributions in the hands of other packages, wherever these are installed; edges of pictures and of word tables"""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from llm_analysis.core import InputError, WorldError
from llm_analysis.explain.corpus import compare_words, corpus_words, occurrences, plot_words
from llm_analysis.explain.pictures import compare, forest, target_map, waterfall
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


def empty(targets: tuple[str, ...] = ()) -> Attribution:
    a = made(targets)
    none = dict(text="", players=(), spans=(), values=a.values[:0], stderr=a.stderr[:0])
    return replace(a, **none, full_value=a.base_value)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("most", [1, 2, 3, 50])
def test_pictures_lose_nothing(most):
    one, two = made(), made(("bad", "good"))
    ax = waterfall(one, most=most)
    assert sum(p.get_width() for p in ax.patches) == pytest.approx(one.values.sum())
    cells = np.asarray(target_map(two, most=most).collections[0].get_array()).reshape(-1, 2)
    assert cells.sum(0) == pytest.approx(two.values.sum(0))
    forest(compare(one, one), most=most)


def test_pictures_of_nothing():
    assert not waterfall(empty()).patches
    assert not compare(empty(), empty()).marked.any() and len(compare(empty(), empty()).to_frame()) == 0
    forest(compare(empty(), empty()))


def test_strange_words_are_drawn_as_text():
    odd = replace(made(), players=("$x", "\x1b[31m", "$y"), answer="$\\frac$", unit="nats: $\\frac$")
    ax = waterfall(odd)
    ax.figure.canvas.draw()
    forest(compare(odd, odd, names=("$\\a$", "$\\b$")))[0].figure.canvas.draw()
    assert "\x1b" not in "".join(t.get_text() for t in ax.get_yticklabels())


def test_a_marked_difference_is_beyond_its_own_error():
    a = made()
    b = replace(a, values=a.values + np.array([0.0, 0.2, 0.4]))  # the error of a difference is 0.14
    assert compare(a, b).marked.tolist() == [False, False, True]
    exact = [replace(x, estimator="exact", stderr=np.zeros(3)) for x in (a, b)]
    assert compare(*exact).marked.tolist() == [False, True, True]
    assert not compare(a, b, together=True).to_frame().marked[:2].any()


def test_word_tables_of_little(tmp_path):
    rows = [replace(made(), row_id=i) for i in range(3)]
    table = corpus_words(rows, least=3).set_index("word")
    assert table.stderr.tolist() == [0.0] * 3 and table["mean"]["not"] == 3.0
    assert table.sampling["good"] == pytest.approx(0.1 / np.sqrt(3))
    assert len(corpus_words(rows, least=4)) == 0
    assert len(corpus_words([empty()], least=1)) == 0
    assert len(compare_words(rows, rows, least=4).table) == 0
    plot_words(table.reset_index())
    with pytest.raises(InputError, match="one kind of value"):
        occurrences([])
    with pytest.raises(InputError, match="both runs have"):
        compare_words(rows[:1], rows[1:])
    with pytest.raises(WorldError, match="samples.parquet"):
        occurrences(tmp_path)
