"""The built site, opened from disk: a static crawl of every page, then a headless Chromium."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import chromium

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "screenshots"
FRONT, REFERENCE, HOWTO = "index.html", "explain/attribution.html", "how-to/explain_your_own_csv.html"
BUILD_SECONDS = 90  # predicted: 40 pages at a fifth of a second


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The site, built anew and then moved to a place with an awkward name: nothing may remember where it was made"
    pytest.importorskip("mkdocs", reason="needs the extra `docs`: make docs")
    pytest.importorskip("material", reason="needs the extra `docs`: make docs")
    home = tmp_path_factory.mktemp("site")
    line = [
        sys.executable,
        "tools/docs.py",
        "--no-quarto",
        "--output",
        str(home / "made"),
        "--work",
        str(home / "work"),
    ]
    start = time.monotonic()
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"built in {time.monotonic() - start:.0f} s")
    assert time.monotonic() - start < BUILD_SECONDS
    shutil.rmtree(home / "work")
    return Path(shutil.move(home / "made", home / "moved 100% ü"))


class Reader(HTMLParser):
    "Ids, links and assets of one page"

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.assets = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif tag == "link" and attrs.get("rel") not in ("prev", "next", "canonical"):
            self.assets.append(attrs["href"])
        elif attrs.get("src"):
            self.assets.append(attrs["src"])


def local(url: str) -> bool:
    return not urlsplit(url).scheme and not url.startswith("//")


def broken(site: Path) -> list[str]:
    "Links and anchors that lead nowhere, files that are missing, and assets of another origin"
    pages = {p: Reader(p.read_text()) for p in sorted(site.rglob("*.html"))}
    found = []
    for page, read in pages.items():
        name = page.relative_to(site)
        found += [f"{name} loads {a} from elsewhere" for a in read.assets if not local(a) and a[:5] != "data:"]
        for url in filter(local, read.links + read.assets):
            parts = urlsplit(url)
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.is_file():
                found.append(f"{name}: {url} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{name}: {url} has no such anchor")
    for style in site.rglob("*.css"):
        urls = re.findall(r"url\(\s*['\"]?([^'\")]+)", style.read_text())
        found += [f"{style.name} loads {u} from elsewhere" for u in urls if not local(u) and u[:5] != "data:"]
    return found


def test_links_and_assets(site):
    assert broken(site) == []


def test_what_is_broken_is_found(site, tmp_path):
    copy = Path(shutil.copytree(site, tmp_path / "copy"))
    next(copy.glob("explain/*.png")).unlink()
    (copy / "core.html").rename(copy / "kore.html")
    front = copy / FRONT
    front.write_text(front.read_text().replace("</body>", '<script src="https://cdn.example/x.js"></script></body>'))
    page = copy / REFERENCE
    page.write_text(page.read_text().replace('id="explain_text"', 'id="explained_text"'))
    said = "\n".join(broken(copy))
    for part in (".png is not there", "core.html is not there", "from elsewhere", "#explain_text has no such anchor"):
        assert part in said


def test_nothing_remembers_where_it_was_made(site):
    for path in site.rglob("*"):
        if path.suffix in (".html", ".js", ".css", ".json"):
            text = path.read_text()
            assert str(site.parent) not in text and str(ROOT) not in text, path.name
            assert not re.search(r"(?<![\w>])/tmp/", text), path.name


def test_every_symbol_has_its_place(site):
    "Entries with source links, and an index of siblings on top"
    for page in (REFERENCE, "explain/shapley.html", "lm/packing.html", "core.html"):
        text = (site / page).read_text()
        entries = re.findall(r'<h3 class="symbol" id="(\w+)"', text)
        names = re.search(r'<p class="names">(.*?)</p>', text, re.S).group(1)
        assert entries and re.findall(r'href="#(\w+)"', names) == entries
        sources = re.findall(r'<a class="source" href="(https://github.com/[^"]+/llm_analysis/[\w/]+\.py#L\d+)"', text)
        assert len(sources) >= len(entries)


def test_no_raw_markup_is_left(site):
    "No front matter, directive, unconverted formula or Markdown that a reader would stumble over"
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", page.read_text(), flags=re.S)
        text = re.sub(r"<[^>]*>", "", text)
        for raw in ("#|", "\\(", "\\[", "{ .", "](", "```", "??? "):
            assert raw not in text, f"{page.name}: {raw} … {text[text.find(raw) - 40 : text.find(raw) + 40]!r}"


# In the browser

OVERFLOW = """
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const bad = [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.getAttribute("src"));
return [wide, bad, document.images.length, document.querySelectorAll("math").length];
"""
CONTRAST = """
const parse = c => { const p = (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
                     return c.startsWith("color(srgb") ? [p[0]*255, p[1]*255, p[2]*255, p[3] ?? 1] : [p[0], p[1], p[2], p[3] ?? 1]; };
const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
const back = e => { const stack = []; for (; e; e = e.parentElement) stack.push(parse(getComputedStyle(e).backgroundColor));
                    return stack.reverse().reduce((b, a) => over(a, b), [255, 255, 255, 1]); };
const light = c => { const [r, g, b] = c.map(x => x / 255).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
                     return .2126 * r + .7152 * g + .0722 * b; };
const walk = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT), bad = [];
let seen = 0;
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement, s = getComputedStyle(e);
  if (!walk.currentNode.data.trim() || !e.getClientRects().length || e.closest(".headerlink, details:not([open]), svg, button")) continue;
  const bg = back(e), fg = over(parse(s.color), bg), [a, b] = [light(fg), light(bg)].sort((x, y) => y - x);
  const ratio = (a + .05) / (b + .05); seen++;
  if (ratio < arguments[0]) bad.push(walk.currentNode.data.trim().slice(0, 30) + " " + ratio.toFixed(2));
}
return [seen, bad];
"""


def visited(browser) -> list[str]:
    "Every address that the browser asked for since the last call"
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def quiet(browser) -> None:
    "Nothing left the machine, and nothing complained"
    away = [u for u in visited(browser) if urlsplit(u).scheme not in ("file", "data", "blob", "about", "chrome")]
    assert not away
    assert [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []


def soon(browser, script: str, *args, seconds: float = 30):
    "The value of a script as soon as it is true"
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(script, *args)):
        assert time.monotonic() < end, script
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def browser(site, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def opened(browser, site: Path, page: str, anchor: str = "") -> None:
    "A page, loaded"
    browser.get((site / page).as_uri() + anchor)
    soon(browser, "return document.readyState == 'complete'")


def test_every_page_on_a_phone(site, browser):
    "Figures load, nothing is wider than the screen, nothing is asked of the network, no script complains"
    figures = formulas = 0
    size = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for page in sorted(site.rglob("*.html")):
        opened(browser, site, page.relative_to(site))
        soon(browser, "document.querySelectorAll('img').forEach(i => i.loading = 'eager'); return true")
        soon(browser, "return [...document.images].every(i => i.complete)")
        wide, bad, images, math = browser.execute_script(OVERFLOW)
        assert wide <= 0, f"{page.name} is {wide} px too wide"
        assert not bad, f"{page.name}: {bad}"
        figures, formulas = figures + images, formulas + math
        quiet(browser)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert figures > 20 and formulas > 20


def test_search_opens_a_symbol(site, browser):
    opened(browser, site, HOWTO)
    field = browser.find_element("css selector", "input.md-search__input")
    field.click()
    field.send_keys("explain_text")
    link = soon(browser, "return document.querySelector('.md-search-result__link[href*=\"#explain_text\"]')")
    assert "explain_text" in link.text
    browser.execute_script("arguments[0].click()", link)
    soon(browser, "return location.hash == '#explain_text' && location.pathname.endsWith('attribution.html')")
    assert soon(browser, "return document.getElementById('explain_text').textContent").startswith("explain_text")
    quiet(browser)


READABLE = (
    FRONT,
    REFERENCE,
    HOWTO,
    "viz.html",
    "explain/players.html",
    "explain/shapley.html",
    "coming-from/tokenshap.html",
)


def unreadable(browser, site: Path, scheme: str) -> list[str]:
    "Visible text of too little contrast with what is behind it"
    found = []
    for page in READABLE:
        opened(browser, site, page)
        soon(browser, "return document.body.getAttribute('data-md-color-scheme') == arguments[0]", scheme)
        seen, bad = browser.execute_script(CONTRAST, 3.0)
        assert seen > 30
        found += [f"{page}: {b}" for b in bad]
    return found


def test_readable_in_the_light(site, browser):
    assert unreadable(browser, site, "default") == []


def test_readable_in_the_dark(site, tmp_path):
    "As a system that prefers dark would show it"
    with chromium(tmp_path, dark=True) as driver:
        assert unreadable(driver, site, "slate") == []


def test_two_clicks_to_your_own_csv(site, browser):
    opened(browser, site, FRONT)
    browser.find_element("css selector", "article a[href='how-to/explain_your_own_csv.html']").click()
    soon(browser, "return location.pathname.endsWith('explain_your_own_csv.html')")
    assert "llm-analysis explain run my_reviews.csv" in browser.find_element("css selector", "article").text


DRAWN = """
const box = e => e.getBoundingClientRect();
const fractions = [...document.querySelectorAll("mfrac")].map(f => box(f).height / box(f.querySelector("mi, mn")).height);
const sums = [...document.querySelectorAll("math[display=block] munder")].map(u => [...u.children].map(box));
return [fractions, sums.map(([sum, under]) => under.top - (sum.top + sum.bottom) / 2)];
"""


def test_formulas_are_drawn(site, browser):
    "A fraction is taller than what stands in it, and what a sum runs over stands below the sum"
    fractions, sums = [], []
    for page in ("explain/shapley.html", "tiny/reviews.html", "core.html"):
        opened(browser, site, page)
        here = browser.execute_script(DRAWN)
        fractions, sums = fractions + here[0], sums + here[1]
    assert len(fractions) >= 3 and min(fractions) > 1.4
    assert len(sums) >= 4 and min(sums) > 0


def test_screenshots(site, browser):
    "Kept for a person to look at"
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, page, anchor in (("front", FRONT, ""), ("reference", REFERENCE, "#explain_text")):
        opened(browser, site, page, anchor)
        assert browser.save_screenshot(str(KEPT / f"{name}.png"))
        assert (KEPT / f"{name}.png").stat().st_size > 20_000
        print(KEPT / f"{name}.png")


def test_the_toggle_turns_dark_on(site, browser):
    "From the system's preference to light to dark; the choice is kept on the next page"
    opened(browser, site, FRONT)
    shown = "[...document.querySelectorAll('label.md-header__button[for^=__palette]')].find(l => !l.hidden)"
    for wanted in ("default", "slate"):
        browser.execute_script(f"{shown}.click()")
        soon(browser, "return document.body.getAttribute('data-md-color-scheme') == arguments[0]", wanted)
    opened(browser, site, HOWTO)
    assert browser.execute_script("return document.body.getAttribute('data-md-color-scheme')") == "slate"
