"""Write README.md, and its pictures, from nbs/index.ipynb: `make readme`."""

import re
from base64 import b64decode
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)(.*)$", re.M)
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`. Edit the notebook. -->\n"


def cells(nb):
    "The cells a reader sees, without directives; `hide` drops a cell, `echo: false` its code"
    for cell in nb.cells:
        if cell.cell_type == "raw":
            continue
        marks = dict(DIRECTIVE.findall(cell.source)) if cell.cell_type == "code" else {}
        if "hide" in marks or "default_exp" in marks:
            continue
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source).strip()
            if "false" in marks.get("echo", ""):
                cell.source = ""
            for k, out in enumerate(cell.outputs):
                if "image/png" in out.get("data", {}):
                    picture = f"nbs/images/readme-{cell.id}-{k}.png"
                    out.data = {"text/markdown": f"![what each word did to the answer]({picture})"}
                elif "text/html" in out.get("data", {}):
                    del out.data["text/html"]
        yield cell


def pictures() -> dict[str, bytes]:
    "File names and contents of the pictures in index.ipynb"
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    return {
        f"readme-{c.id}-{k}.png": b64decode(o.data["image/png"])
        for c in nb.cells
        if c.cell_type == "code"
        for k, o in enumerate(c.outputs)
        if "image/png" in o.get("data", {})
    }


def render() -> str:
    "README.md as text"
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    nb.cells = list(cells(nb))
    nb.metadata["language_info"] = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"```python\s*\n```\n", "", text)
    text = re.sub(r"\]\((?!https?:)([^)]+\.ipynb)", r"](nbs/\1", text)  # pages are notebooks of nbs/
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    folder = ROOT / "nbs" / "images"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("readme-*.png"):
        old.unlink()
    for name, raw in pictures().items():
        (folder / name).write_bytes(raw)
    (ROOT / "README.md").write_text(render())
