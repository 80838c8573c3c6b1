"""What the site is made of: its two YAML files, its slots, and a reference entry for every symbol. No browser."""

import ast
import configparser
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def tool(name: str):
    "A script of tools/ as a module"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


pages, docs = tool("pages"), tool("docs")
SIDEBAR = yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
NOTEBOOKS = docs.listed(SIDEBAR)
PAGES = {n: pages.read_page(n) for n in NOTEBOOKS}
MODULES = {n: p for n, p in PAGES.items() if p.module}
LINKS = pages.Links(list(PAGES.values()))


def entries(contents: list):
    "Every entry of a sidebar, sections included"
    for item in contents:
        yield item
        if isinstance(item, dict):
            yield from entries(item.get("contents", []))


def faults(contents: list) -> list[str]:
    "What is wrong with a sidebar"
    found = []
    for item in entries(contents):
        if isinstance(item, str):
            kind = {"page": item}
        elif set(item) == {"text", "href"}:
            kind = {"page": item["href"]}
        elif set(item) == {"section", "contents"} and item["contents"]:
            kind = {}
        else:
            found.append(f"an entry that is neither a page nor a section with pages: {item}")
            continue
        if "page" in kind and not (NBS / kind["page"]).is_file():
            found.append(f"a dead entry: {kind['page']}")
    named = [i if isinstance(i, str) else i["href"] for i in entries(contents) if isinstance(i, str) or "href" in i]
    return found + [f"named twice: {n}" for n in set(named) if named.count(n) > 1]


def test_sidebar():
    assert faults(SIDEBAR) == []
    there = {str(p.relative_to(NBS)) for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert set(NOTEBOOKS) == there
    slots = [i.get("section") or i["text"] for i in SIDEBAR]
    wanted = "Start here, Tutorials, How-to, Reference, Explanations, Troubleshooting, Coming from …, Contributing"
    assert slots == wanted.split(", ")
    targets = [p.target for p in PAGES.values()]
    assert len(set(targets)) == len(targets), "two notebooks would become one page"


def test_sidebar_faults_are_found():
    bad = ["gone.ipynb", "index.ipynb", {"text": "a", "href": "index.ipynb"}, {"section": "b", "contents": []}]
    assert len(faults([*bad, {"section": "c"}])) == 4


def test_quarto():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    own, quarto = config["DEFAULT"], yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert set(quarto) == {"project", "format", "website", "metadata-files"}
    assert quarto["project"]["type"] == "website" and quarto["project"]["output-dir"] == own["doc_path"]
    assert set(quarto["format"]) == {"html", "commonmark"}, "commonmark is what nbdev makes README from"
    site = quarto["website"]
    assert site["title"] == own["title"] and site["repo-url"] == own["git_url"]
    assert site["repo-branch"] == own["branch"] and site["site-url"] == own["doc_host"] + own["doc_baseurl"]
    themes = quarto["format"]["html"]["theme"]
    assert set(themes) == {"light", "dark"}, "a theme for light and one for dark"
    assert quarto["metadata-files"] == ["sidebar.yml"] and own["custom_sidebar"] == "True"


def test_workflow():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text())
    assert flow["permissions"] == {"contents": "read"}
    jobs = flow["jobs"]
    assert jobs["deploy"]["permissions"] == {"pages": "write", "id-token": "write"}
    assert [j for j, job in jobs.items() if "permissions" in job] == ["deploy"]
    used = [s["uses"] for job in jobs.values() for s in job["steps"] if "uses" in s]
    assert used and all(re.search(r"@v\d+$", u) for u in used)
    assert any(s.get("run", "").startswith("make docs") for s in jobs["build"]["steps"])


@pytest.mark.parametrize("slot", ["tutorials", "how-to", "explanations", "coming-from"])
def test_stories_export_nothing(slot):
    mine = [p for n, p in PAGES.items() if n.startswith(slot + "/")]
    assert mine and not [p.notebook for p in mine if p.module]
    for page in mine:
        code = "\n".join(pages.text(c) for c in page.cells if c["cell_type"] == "code")
        assert "assert " in code or "test_" in code, f"{page.notebook} checks nothing"


def test_the_way_to_your_own_csv():
    "From the front page it is one click, and the command stands there"
    front = "\n".join(pages.text(c) for c in PAGES["index.ipynb"].cells)
    assert "(how-to/explain_your_own_csv.ipynb)" in front
    there = "\n".join(pages.text(c) for c in PAGES["how-to/explain_your_own_csv.ipynb"].cells)
    assert "llm-analysis explain run my_reviews.csv" in there and "Hub id" in there


@pytest.mark.parametrize("notebook", MODULES)
def test_imports_stand_alone(notebook):
    "nbdev runs every cell with an import before it documents a module for Quarto; other code would fail there"
    for cell in PAGES[notebook].cells:
        source = pages.code(cell)
        if cell["cell_type"] == "code" and not pages.exports(cell) and "import " in source:
            body = ast.parse(source).body
            kinds = {isinstance(n, ast.Import | ast.ImportFrom) for n in body}
            assert len(kinds) < 2, f"imports and other code in one cell: {source[:80]}"


@pytest.mark.slow
def test_quarto_is_used_where_it_is(tmp_path):
    "A stand-in on the PATH: it is given every notebook as nbdev prepares it, and what it makes is the site"
    fake = tmp_path / "quarto"
    fake.write_text(
        '#!/bin/sh\nmkdir -p _docs && find . -name "*.ipynb" > _docs/index.html && echo "$@" > _docs/said\n'
    )
    fake.chmod(0o755)
    before = {p: (ROOT / p).read_bytes() for p in ("README.md", "CONTRIBUTING.md", "nbs/sidebar.yml")}
    line = [sys.executable, "tools/docs.py", "--output", str(tmp_path / "out")]
    subprocess.run(line, cwd=ROOT, check=True, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    given = {x.removeprefix("./") for x in (tmp_path / "out" / "index.html").read_text().split()}
    assert given >= set(NOTEBOOKS) and (tmp_path / "out" / "said").read_text() == "render --no-cache\n"
    assert before == {p: (ROOT / p).read_bytes() for p in before}


# Reference entries


@pytest.mark.parametrize("notebook", MODULES)
def test_entries(notebook):
    "Every public symbol: heading, source line, a row for each parameter that Python sees"
    page = PAGES[notebook]
    module = importlib.import_module(f"llm_analysis.{page.module}")
    lines = (ROOT / page.file).read_text().splitlines()
    shown = pages.body(page, {})
    assert page.symbols, "nothing public"
    for name, line in page.symbols.items():
        assert re.match(rf"(async )?(def|class) {name.split('.')[-1]}\b", lines[line - 1])
        assert shown.count(f"### `{name}` {{ #{name} .symbol }}") == 1, f"{name} has no entry"
        part = shown.split(f"### `{name}` {{", 1)[1].split("\n### ", 1)[0].split("\n#### ", 1)[0]
        assert f"{page.file}#L{line}" in part
        thing = attrgetter(name)(module)
        if inspect.isfunction(inspect.unwrap(thing)):
            table = part.split('<section class="parameters"', 1)[-1].split("</section>")[0]
            for p in inspect.signature(thing).parameters.keys() - {"self"}:
                assert re.search(rf"\| <code>\**{p}</code> \|", table), f"{name}: no row for {p}"
        assert thing.__doc__ and thing.__doc__.split("\n")[0][:20] in part.replace("<code>", "`").replace(
            "</code>", "`"
        )


def made(source: str, module: str = "made") -> pages.Page:
    "A page with one exported cell"
    cells = [
        {"cell_type": "markdown", "source": ["# Made\n\n> Up"]},
        {"cell_type": "code", "source": ["#| export\n", source], "outputs": [], "id": "a"},
    ]
    names = {n.name: n.lineno for n in pages.public(ast.parse(source))}
    return pages.Page("9_made.ipynb", cells, module, names)


def test_an_entry_by_hand():
    page = made(
        "def f(\n    a,  # first | or not\n    b: 'int | None' = 2,  # see `a` and `need`\n    *,\n"
        "    c: str = '|',\n) -> int:  # what comes\n    'Do `b`'\n"
    )
    shown = pages.body(page, {})
    assert "f(a, b=2, *, c='|') -> int" in shown
    assert "| <code>a</code> |  |  | first \\| or not |" in shown
    assert "| <code>b</code> | `int | None` | <code>2</code> | see <code>a</code> and `need` |" in shown
    assert "| <code>c</code> | `str` | <code>&#x27;&#124;&#x27;</code> |  |" in shown
    assert "| *returns* | `int` |  | what comes |" in shown and "Do <code>b</code>" in shown


def test_one_line_signature_gives_its_comment_to_the_result():
    said = pages.comments("def f(a: int) -> str:  # the text\n    return ''\n")
    rows = pages.parameters(ast.parse("def f(a: int) -> str:\n    return ''\n").body[0], said)
    assert [(r.name, r.meaning) for r in rows] == [("a", ""), ("", "the text")]


@pytest.mark.parametrize(
    "before, after",
    [
        ("`explain_text` and", "[`explain_text`](explain/attribution.md#explain_text) and"),
        ("`lm.packing`", "[`lm.packing`](lm/packing.md)"),
        ("`core.need`", "[`core.need`](core.md#need)"),
        ("`run` and `worth`", "`run` and `worth`"),  # plain words that mean other things too
        ("`f(x)` [`need`](x.md)", "`f(x)` [`need`](x.md)"),
        ("```\n`explain_text`\n```", "```\n`explain_text`\n```"),
        ("# `explain_text`", "# `explain_text`"),
        ("[P](explain/40_players.ipynb#limits)", "[P](explain/players.md#limits)"),
        ("[P](https://x.org/a.ipynb)", "[P](https://x.org/a.ipynb)"),
    ],
)
def test_links(before, after):
    assert LINKS.apply(before, PAGES["index.ipynb"]) in (after, after.replace("`run`", "[`run`](explain/run.md#run)"))


def test_a_page_means_what_it_imports():
    page = made("from llm_analysis.tiny.reviews import worth\n\n\ndef g():\n    pass\n")
    page.imports = pages.imported(pages.code(page.cells[1]))
    assert LINKS.of("worth", page) == "tiny/reviews.md#worth" and LINKS.of("g", page) == "#g"
    assert LINKS.of("worth", PAGES["index.ipynb"]) is None


def test_hostile_outputs_stay_text():
    stream = {"output_type": "stream", "text": ["```\n<script>alert(1)</script>\n"]}
    shown = pages.output(stream, "x", "x", {})
    assert shown.startswith("````") and shown.rstrip().endswith("````")


def test_colours_of_a_terminal():
    shown = pages.printed("\x1b[1m<b>\x1b[0m \x1b[48;2;0;114;178mword\x1b[0m")
    assert "&lt;b&gt;" in shown and "rgb(0,114,178)" in shown and "\x1b" not in shown


def formulas():
    for notebook, page in PAGES.items():
        for cell in page.cells:
            if cell["cell_type"] == "markdown":
                prose = re.sub(r"```.*?```|`[^`\n]*`", "", pages.text(cell), flags=re.S)
                for tex in re.findall(r"\$\$(.+?)\$\$", prose, re.S) + re.findall(
                    r"(?<![\$\w\\])\$([^\s$][^$\n]*?)\$(?!\w)", prose
                ):
                    yield notebook, tex


def test_formulas():
    "Every formula becomes well-formed MathML in which no command is left over"
    pytest.importorskip("latex2mathml", reason="needs the extra `docs`: make docs")
    from html import escape

    found = list(formulas())
    assert len(found) > 10
    for notebook, tex in found:
        shown = pages.mathml(f'<span class="arithmatex">\\({escape(tex)}\\)</span>')
        assert shown.startswith("<math"), (notebook, tex)
        words = "".join(ET.fromstring(shown).itertext())
        assert "\\" not in words, (notebook, tex, words)


def test_stored_outputs_have_no_foreign_assets():
    for notebook in NOTEBOOKS:
        outputs = [o for c in json.loads((NBS / notebook).read_text())["cells"] for o in c.get("outputs", [])]
        markup = " ".join("".join(o.get("data", {}).get("text/html", "")) for o in outputs)
        assert "<script" not in markup and not re.search(r"<(?:img|link|iframe)\b[^>]*https?:", markup), notebook
