import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
import pytest
from browser import chromium
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_analysis import text, views, viz
from llm_analysis.core import InputError
from llm_analysis.views import tokens_html
from llm_analysis.viz import bars, bars_svg, curve, heatmap, page

NBS = Path(__file__).resolve().parent.parent / "nbs"
texts = st.lists(st.text(max_size=12), max_size=8)
TAG = re.compile(r"<(/?)([a-zA-Z]+)")


@given(texts, st.randoms())
@settings(deadline=None)
def test_any_text_stays_text(tokens, random):
    "Whatever a token holds, the markup has our own elements and no others"
    values = np.array([random.uniform(-1, 1) for _ in tokens])
    marked = tokens_html(tokens, values, np.abs(values), footnotes=True)
    assert {name for _, name in TAG.findall(marked)} <= {"span", "bdi", "sup"}
    assert {name for _, name in TAG.findall(bars_svg(tokens, values))} <= {"div", "bdi", "span", "svg", "rect", "line"}


@pytest.mark.parametrize("hostile", ['"><script>alert(1)</script>', "</style><img src=x onerror=alert(1)>", "'&<>"])
def test_hostile_titles(hostile):
    assert not re.search(r"<(script|img)", page(hostile, ""))


def test_pictures_of_nothing_and_of_one():
    assert len(bars(np.array([]), np.array([]), []).patches) == 0
    assert len(bars(np.array([2.0]), np.array([0.0]), ["$not math$"]).patches) == 1
    assert heatmap(np.ones((1, 1))).collections
    assert bars_svg([], []) == ""
    matplotlib.pyplot.close("all")


def test_axes_are_the_callers():
    _, ax = matplotlib.pyplot.subplots()
    assert bars(np.array([1.0, -1.0]), ax=ax) is ax
    assert curve([0, 1], [0, 1], ax=ax) is ax
    assert heatmap(np.eye(2), ax=ax) is ax
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("n", [1, 41, 60, 150])
def test_every_label_of_a_heat_map_is_drawn_and_none_touches_another(n):
    names = [f"row {i}" for i in range(n)]
    ax = heatmap(np.zeros((n, 3)), names, ["a", "b", "a long name of a column"])
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert all(a.y0 >= b.y1 - 1 for a, b in zip(boxes, boxes[1:]))  # pixels
    columns = [t.get_window_extent() for t in ax.get_xticklabels()]
    assert len(columns) == 3 and all(a.x1 <= b.x0 + 1 for a, b in zip(columns, columns[1:]))
    matplotlib.pyplot.close("all")


def test_a_heat_map_without_room_is_refused():
    _, ax = matplotlib.pyplot.subplots(figsize=(4, 2))
    with pytest.raises(InputError, match="room for every label along y; got 50"):
        heatmap(np.zeros((50, 2)), [str(i) for i in range(50)], ax=ax)
    assert heatmap(np.zeros((300, 2))).collections  # no labels, no refusal
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: bars(bad),
        lambda bad: bars_svg(["a"], bad),
        lambda bad: tokens_html(["a"], bad),
        lambda bad: views.tokens_ansi(["a"], bad),
    ],
)
def test_infinite_values_are_refused_and_unknown_ones_left_out(call):
    with pytest.raises(InputError, match="finite"):
        call([np.inf])
    call([np.nan])
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_pictures_on_a_page(tmp_path, width, dark):
    "Letters keep their size on a telephone, nothing is wider than the screen, and ink follows the page"
    labels = ["short", "a-very-long-label-without-a-break-" * 3, "مرحبا"]
    picture = bars_svg(labels, [1.0, -2.0, 0.5], [0.1, 0.5, 0.2])
    tokens = tokens_html(["word " * 30, "x" * 200], [1.0, -1.0], [0.1, 0.1], footnotes=True)
    path = tmp_path / "page.html"
    path.write_text(page("Pictures", f"<article><p>{tokens}</p>{picture}</article>"))
    with chromium(tmp_path / "profile", width=width, dark=dark) as browser:
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
        style = "return getComputedStyle(document.querySelector('{}')).{}"
        ink, ground = (browser.execute_script(style.format("body", k)) for k in ("color", "backgroundColor"))
        assert browser.execute_script(style.format("svg line", "stroke")) == ink
        light = sum(map(int, re.findall(r"\d+", ink)[:3])) > 384
        assert light == dark, (ink, ground)
        letters = float(browser.execute_script(style.format("article div bdi", "fontSize")).removesuffix("px"))
        assert letters >= 14
        name, bar = (
            browser.execute_script(
                f"return document.querySelector('article div {e}').getBoundingClientRect().toJSON()"
            )
            for e in ("bdi", "svg")
        )
        assert (bar["top"] >= name["bottom"] - 1) == (width == 390)  # below its name, or beside it
        assert bar["width"] >= 230


NO_PICTURES = {  # public, and nothing to be seen
    "viz": {"measured", "full_scale", "exact", "excludes_zero"},
    "views": {"TextDiff"},
    "text": {"Vocabulary", "token_code", "CODES", "token_texts", "original", "joined", "visible", "visible_line"},
}


def test_the_gallery_shows_everything_public():
    cells = json.loads((NBS / "gallery.ipynb").read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code" and c["outputs"])
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    for module in (viz, views, text):
        drawing = set(module.__all__) - NO_PICTURES[module.__name__.rsplit(".")[-1]]
        for name in drawing:
            assert re.search(rf"\b{name}\b", code), f"{name} is drawn nowhere in the gallery"
            assert f"`{name}`" in prose, f"{name} is explained nowhere in the gallery"
    assert {"bars", "heatmap", "tokens_html", "PALETTE"} <= set(viz.__all__) | set(views.__all__)


def test_each_picture_of_the_gallery_has_its_two_sentences():
    cells = json.loads((NBS / "gallery.ipynb").read_text())["cells"]
    sections = [i for i, c in enumerate(cells) if "".join(c["source"]).startswith("## ")]
    assert len(sections) >= 8
    for i in sections:
        body = "".join(cells[i]["source"]).split("\n", 1)[1]
        assert len(re.findall(r"[.!?](?:\s|$)", body)) >= 2, body
