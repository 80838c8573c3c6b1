import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from llm_analysis.core import InputError, Running, WorldError, digest, need, stream, token_batches, whole_dir


def test_shapes_are_checked_under_pytest():
    "The jaxtyping hook is on: a wrong shape is refused although the code would have run"
    with pytest.raises(TypeCheckError):
        Running.of(np.zeros((2, 2), dtype=complex))


def test_need_is_one_line():
    with pytest.raises(WorldError) as e:
        need(False, "a\nb", got="c\r\nd", do="e", error=WorldError)
    assert str(e.value) == "expected a b; got c d; e"


def test_streams_and_digests_are_the_same_in_every_process():
    code = "from llm_analysis.core import stream, digest; print(stream(3, 'r', 'p').random(), digest('a', 1, None))"
    seen = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({**os.environ, "PYTHONHASHSEED": s} for s in ("1", "2"))
    }
    assert seen == {f"{stream(3, 'r', 'p').random()} {digest('a', 1, None)}\n"}


def test_an_empty_part_is_a_part():
    assert len({digest(), digest(""), digest("", ""), digest(None), digest(b"")}) == 5


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(60, 200), st.none() | st.integers(1, 9))
def test_batches_hold_their_budget(lengths, budget, max_rows):
    plan = token_batches(lengths, budget, max_rows=max_rows)
    assert sorted(int(i) for rows in plan.index for i in rows) == list(range(len(lengths)))
    padded = [max(lengths[i] for i in rows) * len(rows) for rows in plan.index]
    assert all(p <= budget for p in padded) and sum(padded) == plan.computed
    assert plan.useful == sum(lengths) and 0 <= plan.waste < 1
    assert max_rows is None or all(len(rows) <= max_rows for rows in plan.index)


@given(st.data())
@settings(max_examples=50)
def test_running_merges_like_the_whole(data):
    x = np.array(data.draw(st.lists(st.floats(-1e6, 1e6), max_size=40)), dtype=float)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=4)))
    merged = Running.of(np.zeros(0))
    for part in np.split(x, cuts):
        merged = merged.merge(Running.of(part))
    assert merged.count == len(x)
    if len(x):
        np.testing.assert_allclose(merged.mean, x.mean(), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(merged.m2, ((x - x.mean()) ** 2).sum(), rtol=1e-9, atol=1e-6)
        assert (merged.min, merged.max) == (x.min(), x.max())


def test_a_whole_directory_replaces_an_empty_one_only(tmp_path):
    (tmp_path / "empty").mkdir()
    with whole_dir(tmp_path / "empty") as d:
        (d / "x").write_text("1")
    assert (tmp_path / "empty" / "x").read_text() == "1"
    (tmp_path / "file").write_text("mine")
    for taken in ("empty", "file"):
        with pytest.raises(WorldError), whole_dir(tmp_path / taken):
            pytest.fail("no work before the refusal")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_a_row_that_cannot_fit_is_refused():
    with pytest.raises(InputError, match="row 1 of 9"):
        token_batches([3, 9], 8)
