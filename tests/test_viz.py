import re

import matplotlib

matplotlib.use("agg")

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_analysis.viz import bars, bars_svg, heatmap, page, tokens_html

texts = st.lists(st.text(max_size=12), max_size=8)
TAG = re.compile(r"<(/?)([a-zA-Z]+)")


@given(texts, st.randoms())
def test_any_text_stays_text(tokens, random):
    "Whatever a token holds, the markup has our own elements and no others"
    values = np.array([random.uniform(-1, 1) for _ in tokens])
    assert {name for _, name in TAG.findall(tokens_html(tokens, values, np.abs(values)))} <= {"span"}
    assert {name for _, name in TAG.findall(bars_svg(tokens, values))} <= {"svg", "rect", "line", "text"}


@pytest.mark.parametrize("hostile", ['"><script>alert(1)</script>', "</style><img src=x onerror=alert(1)>", "'&<>"])
def test_hostile_titles(hostile):
    assert not re.search(r"<(script|img)", page(hostile, ""))


def test_pictures_of_nothing_and_of_one():
    assert len(bars(np.array([]), np.array([]), []).patches) == 0
    assert len(bars(np.array([2.0]), np.array([0.0]), ["$not math$"]).patches) == 1
    assert heatmap(np.ones((1, 1))).collections
    matplotlib.pyplot.close("all")


def test_axes_are_the_callers():
    _, ax = matplotlib.pyplot.subplots()
    assert bars(np.array([1.0, -1.0]), ax=ax) is ax
    matplotlib.pyplot.close("all")
