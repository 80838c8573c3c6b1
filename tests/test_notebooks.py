"""What every notebook owes its reader, checked on the committed files."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PATHS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\w+)", re.M)
FIGURE_BYTES = 60_000


def code_cells(path):
    "(directives, source without them, outputs) of every code cell"
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            lines = [x for x in source.splitlines() if not DIRECTIVE.match(x)]
            yield set(DIRECTIVE.findall(source)), "\n".join(lines), cell["outputs"]


def ends_in_value(source: str) -> bool:
    "Whether running the cell shows the value of its last line"
    body = ast.parse(source).body
    if not body or source.rstrip().endswith(";") or not isinstance(body[-1], ast.Expr):
        return False
    value = body[-1].value
    quiet = ("test_", "need", "print", "plt.close", "shutil.rmtree")  # these return nothing
    return not (isinstance(value, ast.Call) and ast.unparse(value.func).startswith(quiet))


def is_import(node) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


each = pytest.mark.parametrize("path", PATHS, ids=lambda p: str(p.relative_to(NBS)))


@each
def test_exported_cells(path):
    for marks, source, _ in code_cells(path):
        if marks & {"export", "exporti", "exports"}:
            lines = [x for x in source.splitlines() if x.strip()]
            assert len(lines) <= 40, f"an exported cell of {len(lines)} lines: {lines[0]}"
            body = ast.parse(source).body
            if any(map(is_import, body)):
                assert all(map(is_import, body)), f"imports and other code in one cell: {lines[0]}"
            assert "from __future__" not in source


@each
def test_outputs(path):
    for marks, source, outputs in code_cells(path):
        assert not [o for o in outputs if o["output_type"] == "error"], f"an error is stored: {source[:80]}"
        if not marks & {"export", "exporti", "hide", "default_exp"} and ends_in_value(source):
            assert outputs, f"no output is stored: {source[-80:]}"
        for out in outputs:
            image = "".join(out.get("data", {}).get("image/png", ""))
            assert len(image) * 3 // 4 <= FIGURE_BYTES, f"a figure of {len(image) * 3 // 4} bytes: {source[:80]}"
        text = json.dumps(outputs)
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text and "/tmp/" not in text, source[:80]


@each
def test_opening(path):
    cells = json.loads(path.read_text())["cells"]
    first = "".join(cells[0]["source"])
    assert cells[0]["cell_type"] == "markdown" and re.match(r"# .+\n\n> .+", first), "title and subtitle come first"
    assert all(c.get("execution_count") is None for c in cells), "run nbdev_clean"


def listed(node) -> set[str]:
    "Every notebook that a sidebar entry names"
    if isinstance(node, str):
        return {node}
    if isinstance(node, list):
        return set().union(*map(listed, node)) if node else set()
    return listed(node.get("contents", [])) | ({node["href"]} if "href" in node else set())


def test_sidebar():
    sidebar = yaml.safe_load((NBS / "sidebar.yml").read_text())
    named = listed(sidebar["website"]["sidebar"]["contents"])
    assert named == {str(p.relative_to(NBS)) for p in PATHS}


def test_one_quarto_file():
    assert (NBS / "_quarto.yml").is_symlink() and (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    assert yaml.safe_load((ROOT / "_quarto.yml").read_text())["metadata-files"] == ["sidebar.yml"]


def test_readme_is_the_index():
    import importlib.util

    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    assert (ROOT / "README.md").read_text() == readme.render(), "run `make readme`"


def test_the_checks_can_fail():
    assert ends_in_value("x = 1\nx") and not ends_in_value("x;") and not ends_in_value("test_eq(1, 1)")
    assert listed([{"section": "a", "contents": ["b.ipynb", {"text": "c", "href": "c.ipynb"}]}]) == {
        "b.ipynb",
        "c.ipynb",
    }
