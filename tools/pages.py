"""Notebooks as Markdown pages for mkdocs: what a reader sees of each cell, and a reference entry for each symbol.

Nothing is imported or run: entries are read from the source (names, annotations, defaults, and the comment beside
each parameter), outputs are those that are stored. `hide` drops a cell, `echo: false` its code; `code-fold: true` folds it."""

import ast
import html
import io
import json
import re
import textwrap
import tokenize
from base64 import b64decode
from collections.abc import Callable
from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
BLOB = f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}"
PACKAGE = SETTINGS["lib_path"]
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)\n?", re.M)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
Entry = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Page:
    "A notebook on its way to the site"

    notebook: str  # path below nbs/
    cells: list[dict]
    module: str | None = None  # what it exports to, without the package's name
    symbols: dict[str, int] = field(default_factory=dict)  # public names and their lines in the module
    imports: dict[str, str] = field(default_factory=dict)  # names of this package that its code imports, with module

    @property
    def target(self) -> str:
        "Path of the Markdown page: the notebook's without its number, which is how nbdev names pages too"
        path = Path(self.notebook)
        return str(path.with_name(re.sub(r"^\d+[a-z]?_", "", path.stem) + ".md"))

    @property
    def title(self) -> str:
        return re.match(r"# (.+)", text(self.cells[0])).group(1)

    @property
    def file(self) -> str:
        "The module's file"
        return f"{PACKAGE}/{self.module.replace('.', '/')}.py"


def text(cell: dict) -> str:
    return "".join(cell["source"])


def marks(cell: dict) -> dict[str, str]:
    "Directives of a code cell"
    return dict(DIRECTIVE.findall(text(cell))) if cell["cell_type"] == "code" else {}


def code(cell: dict) -> str:
    "Source without directives"
    return DIRECTIVE.sub("", text(cell)).strip("\n")


def exports(cell: dict) -> bool:
    return bool({"export", "exports", "exporti"} & set(marks(cell)))


def owner_of(node: Entry) -> str:
    "The class to which fastcore's `patch` adds a function; empty: it is a function by itself"
    patched = isinstance(node, FUNCTION) and any(ast.unparse(d) == "patch" for d in node.decorator_list)
    return ast.unparse(node.args.args[0].annotation) if patched else ""


def known_as(node: Entry) -> str:
    "The name by which a function or class is known: `Job.run` where it was added to a class"
    return f"{owner_of(node)}.{node.name}".lstrip(".")


def public(tree: ast.Module) -> list[Entry]:
    "Functions and classes of a module that are meant for others"
    found = [n for n in tree.body if isinstance(n, Entry)]
    return [n for n in found if not n.name.startswith("_") and not known_as(n).startswith("_")]


def imported(source: str) -> dict[str, str]:
    "What a cell imports from this package: name → module.name"
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module]
    own = [n for n in nodes if n.module.startswith(PACKAGE)]
    return {a.asname or a.name: f"{n.module}.{a.name}" for n in own for a in n.names}


def read_page(notebook: str) -> Page:
    "A notebook, and where its module has each public symbol"
    page = Page(notebook, json.loads((NBS / notebook).read_text(encoding="utf-8"))["cells"])
    for cell in page.cells:
        page.imports |= imported(code(cell)) if cell["cell_type"] == "code" else {}
    named = [m["default_exp"] for c in page.cells if (m := marks(c)) and "default_exp" in m]
    if named and any(map(exports, page.cells)):
        page.module = named[0]
        tree = ast.parse((ROOT / page.file).read_text(encoding="utf-8"))
        page.symbols = {known_as(n): n.lineno for n in public(tree)}
    return page


# Reference entries


def comments(source: str) -> dict[int, str]:
    "The comment on each line"
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in found if t.type == tokenize.COMMENT}


def annotation(node: ast.expr | None) -> str:
    "A type as it is written, without the quotes around a name that comes later"
    return "" if node is None else node.value if isinstance(node, ast.Constant) and node.value else ast.unparse(node)


@dataclass
class Row:
    name: str
    kind: str = ""  # annotation
    default: str = ""
    meaning: str = ""


def parameters(node: ast.FunctionDef, said: dict[int, str]) -> list[Row]:
    "Rows of a function's table; the comment on a line belongs to the parameter that ends there"
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults + a.kw_defaults
    rows = []
    for p, default in zip(plain + a.kwonlyargs, defaults, strict=True):
        last = default or p
        alone = last.end_lineno != node.lineno
        kind = annotation(p.annotation)
        shown = ast.unparse(default) if default is not None else ""
        rows.append(Row(p.arg, kind, shown, said.get(last.end_lineno, "") if alone else ""))
    for star, p in (("*", a.vararg), ("**", a.kwarg)):
        if p:
            rows.append(Row(star + p.arg, annotation(p.annotation), "", said.get(p.lineno, "")))
    rows = [r for r in rows if r.name not in ("self", "cls")]
    if node.returns is not None and ast.unparse(node.returns) != "None":
        rows.append(Row("", annotation(node.returns), "", said.get(node.returns.end_lineno, "")))
    return rows


def fields(node: ast.ClassDef, said: dict[int, str]) -> list[Row]:
    "Rows of a class's table: its annotated fields, else what its `__init__` takes"
    own = [n for n in node.body if isinstance(n, ast.AnnAssign) and not ast.unparse(n.target).startswith("_")]
    if own:
        value = lambda n: ast.unparse(n.value) if n.value else ""
        return [
            Row(ast.unparse(n.target), annotation(n.annotation), value(n), said.get(n.end_lineno, "")) for n in own
        ]
    start = [n for n in node.body if isinstance(n, FUNCTION) and n.name == "__init__"]
    return [r for r in parameters(start[0], said) if r.name] if start else []


def verbatim(source: str) -> str:
    "Code that is never made a link"
    return f"<code>{html.escape(source).replace('|', '&#124;')}</code>" if source else ""


def unlinked(words: str, names: set[str]) -> str:
    "Prose in which `names`, the parameters that it speaks of, lead nowhere"
    return re.sub(r"`(\w+)`", lambda m: verbatim(m.group(1)) if m.group(1) in names else m.group(0), words)


def cell_text(words: str) -> str:
    "Prose inside a table: a bar outside of code would end the cell"
    return re.sub(r"(`[^`]*`)|\|", lambda m: m.group(1) or r"\|", words)


def table(rows: list[Row]) -> str:
    "Parameters, or fields, as a table; columns that nothing stands in are left out"
    if not rows:
        return ""
    tick = lambda s: f"`{s}`" if s else ""
    own = {r.name for r in rows}
    heads = {"name": "", "kind": "type", "default": "default", "meaning": "meaning"}
    heads = {k: v for k, v in heads.items() if any(getattr(r, k) for r in rows) or k == "name"}
    out = ["| " + " | ".join(heads.values()) + " |", "|" + " --- |" * len(heads)]
    for r in rows:
        name = verbatim(r.name) if r.name else "*returns*"
        meaning = cell_text(unlinked(r.meaning, own))
        values = {"name": name, "kind": tick(r.kind), "default": verbatim(r.default), "meaning": meaning}
        out.append("| " + " | ".join(values[k] for k in heads) + " |")
    inside = "\n".join(out)
    return f'<section class="parameters" markdown>\n\n{inside}\n\n</section>\n'


def signature(node: Entry) -> str:
    "The call without annotations, in lines of at most 88 characters"
    if isinstance(node, ast.ClassDef):
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        return f"class {node.name}{bases}"
    bare = node.args
    for p in [*bare.posonlyargs, *bare.args, *bare.kwonlyargs, *filter(None, [bare.vararg, bare.kwarg])]:
        p.annotation = None
    words = [w for w in re.split(r", (?=[\w*/]+(?:=|,|$))", ast.unparse(bare)) if w not in ("self", "cls")]
    returns = f" -> {annotation(node.returns)}" if node.returns else ""
    line = f"{node.name}({', '.join(words)}){returns}"
    if len(line) <= 88:
        return line
    inner = textwrap.fill(
        ", ".join(words), 84, initial_indent="    ", subsequent_indent="    ", break_long_words=False
    )
    return f"{node.name}(\n{inner}\n){returns}"


def docstring(node: Entry) -> str:
    said = ast.get_docstring(node)
    return (said.strip() + "\n") if said else ""


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [n for n in node.body if isinstance(n, FUNCTION) and not n.name.startswith("_")]


def entry(node: Entry, page: Page, said: dict[int, str], offset: int, owner: str = "") -> str:
    "Heading, call, meaning, table, and the same for a class's public methods"
    name = f"{owner}.{node.name}" if owner else node.name
    line = page.symbols[name] if not owner or owner_of(node) else node.lineno + offset
    rows = fields(node, said) if isinstance(node, ast.ClassDef) else parameters(node, said)
    heading = f"{'####' if owner else '###'} `{name}` {{ #{name} .symbol }}\n"
    source = f'<a class="source" href="{BLOB}/{page.file}#L{line}" title="{page.file}, line {line}">source</a>\n'
    decorated = {ast.unparse(d) for d in node.decorator_list}
    call = f"{name}: {annotation(node.returns)}" if "property" in decorated and node.returns else signature(node)
    said_of = unlinked(docstring(node), {r.name for r in rows})
    parts = [heading, source, f"``` {{ .python .signature }}\n{call}\n```\n", said_of]
    if "property" not in decorated:
        parts.append(table(rows))
    if isinstance(node, ast.ClassDef):
        parts += [entry(m, page, said, line - node.lineno, name) for m in methods(node)]
    return "\n".join(p for p in parts if p)


def fence(source: str, kind: str = "python") -> str:
    ticks = "`" * max(3, 1 + max((len(m) for m in re.findall(r"`+", source)), default=0))
    return f"{ticks} {kind}\n{source}\n{ticks}\n"


def folded(title: str, source: str) -> str:
    inside = textwrap.indent(fence(source), "    ")
    return f'??? quote "{title}"\n\n{inside}'


def exported(cell: dict, page: Page) -> str:
    "An exported cell: entries of what is public, then the source, folded"
    source = code(cell)
    tree = ast.parse(source)
    if all(isinstance(n, ast.Import | ast.ImportFrom) for n in tree.body):
        return ""
    said = comments(source)
    entries = [entry(n, page, said, 0, owner_of(n)) for n in public(ast.parse(source))]
    names = [getattr(n, "name", None) or ast.unparse(getattr(n, "targets", [n])[0]) for n in tree.body]
    named = ", ".join(f"`{n}`" for n in names if len(n) < 40)
    return "\n".join([*entries, folded(f"Source: {named}", source)])


# What the other cells show


def printed(words: str) -> str:
    "Text as a terminal shows it, colours included"
    if "\x1b[" not in words:
        return fence(words, "{ .text .output }")
    from nbconvert.filters.ansi import ansi2html

    return f'<div class="output">\n<pre class="ansi">{ansi2html(words)}</pre>\n</div>\n'


def output(out: dict, name: str, alt: str, pictures: dict[str, bytes]) -> str:
    "One stored output; a picture is put into `pictures` under `name`"
    data = {k: "".join(v) if isinstance(v, list) else v for k, v in out.get("data", {}).items()}
    if out["output_type"] == "stream":
        return printed("".join(out["text"]).rstrip("\n"))
    if "image/png" in data:
        pictures[name + ".png"] = b64decode(data["image/png"])
        return f"![{alt}]({Path(name).name}.png)" + "{ .figure loading=lazy }\n"
    if "text/html" in data:
        shown = re.sub(r"<style scoped>.*?</style>\s*", "", data["text/html"], flags=re.S)
        shown = shown.replace('<table border="1" class="dataframe">', "<table>")
        return f'<div class="output">\n{shown.strip()}\n</div>\n'
    if "text/markdown" in data:
        return data["text/markdown"] + "\n"
    return printed(data.get("text/plain", ""))


def index(page: Page) -> str:
    "The public names of a module, each a link to its entry"
    links = " · ".join(f"[`{n}`](#{n})" for n in page.symbols)
    return f'\n<p markdown class="names">`{PACKAGE}.{page.module}`: {links}</p>\n' if links else ""


def body(page: Page, pictures: dict[str, bytes], linked: Callable[[str], str] = str) -> str:
    "The page as Markdown; `linked` puts links into prose"
    parts, heading = [], page.title
    for k, cell in enumerate(page.cells):
        own = marks(cell)
        if cell["cell_type"] == "markdown":
            heading = ([heading] + re.findall(r"^#+ (.+)$", text(cell), re.M))[-1]
            parts.append(linked(text(cell)) + "\n" + (index(page) if k == 0 else ""))
        elif cell["cell_type"] == "code" and not {"hide", "default_exp"} & set(own):
            if exports(cell):
                parts.append(linked(exported(cell, page)))
            elif own.get("code-fold") == "true":
                parts.append(folded("Code", code(cell)))
            elif own.get("echo") != "false" and code(cell):
                parts.append(fence(code(cell)))
            for n, out in enumerate(cell["outputs"]):
                name = str(Path(page.target).with_name(f"{Path(page.target).stem}-{cell['id']}-{n}"))
                parts.append(output(out, name, heading.replace("`", ""), pictures))
    return "\n".join(p for p in parts if p)


# Links


def relative(target: str, page: Page) -> str:
    "A link from one page to another"
    up = "../" * page.target.count("/")
    here = str(Path(page.target).parent)
    return target.removeprefix(here + "/") if here != "." and target.startswith(here + "/") else up + target


class Links:
    "Where a name in backticks leads: to a symbol of the page itself, of one other page, or to a module"

    def __init__(self, pages: list[Page]):
        self.pages = {p.notebook: p for p in pages}
        self.places = {}
        for p in pages:
            if p.module:
                for name in (p.module, f"{PACKAGE}.{p.module}"):
                    self.places.setdefault(name, set()).add((p.target, ""))
                for symbol in p.symbols:
                    for name in (symbol, f"{p.module}.{symbol}", f"{PACKAGE}.{p.module}.{symbol}"):
                        self.places.setdefault(name, set()).add((p.target, f"#{symbol}"))

    def of(self, name: str, page: Page) -> str | None:
        "The link behind a name, or None where it means nothing or more than one thing"
        if name in page.symbols:
            return f"#{name}"
        places = self.places.get(page.imports.get(name, name), set())
        word = name.islower() and name.isalpha() and name not in page.imports  # may well mean something else here
        if len(places) != 1 or word:
            return None
        ((target, anchor),) = places
        return None if target == page.target else relative(target, page) + anchor

    def notebook(self, match: re.Match, page: Page) -> str:
        "A link to a notebook becomes one to its page"
        path = (NBS / page.notebook).parent / match.group(1)
        other = self.pages.get(str(path.resolve().relative_to(NBS))) if path.resolve().is_relative_to(NBS) else None
        return f"]({relative(other.target, page)}{match.group(2) or ''})" if other else match.group(0)

    def apply(self, markdown: str, page: Page) -> str:
        "Put links into prose; code, headings and what is a link already are left alone"
        keep = r"(^ *(?P<f>`{3,}).*?^ *(?P=f)$|^#{1,6} .*?$|^\?\?\? .*?$|\[[^\]]*\]\([^)]*\)|\$\$.*?\$\$)"
        name = r"(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)"

        def put(m):
            if m.group(1):
                return re.sub(r"\]\(([^)#\s]+\.ipynb)(#[^)]*)?\)", lambda n: self.notebook(n, page), m.group(1))
            link = self.of(m.group(3), page)
            return f"[{m.group(0)}]({link})" if link else m.group(0)

        return re.sub(f"{keep}|{name}", put, markdown, flags=re.M | re.S)


def write_pages(notebooks: list[str], folder: Path) -> list[Page]:
    "All pages and their pictures, below `folder`"
    pages = [read_page(n) for n in notebooks]
    links = Links(pages)
    for page in pages:
        pictures = {}
        markdown = body(page, pictures, lambda prose: links.apply(prose, page))  # noqa: B023
        path = folder / page.target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown, encoding="utf-8")
        for name, raw in pictures.items():
            (folder / name).write_bytes(raw)
    return pages


# Hooks of mkdocs


def mathml(page_html: str) -> str:
    "Formulas as MathML, which browsers draw without a script"
    from latex2mathml.converter import convert

    def one(m):
        block = m.group(1) == "div"
        return convert(html.unescape(m.group(2)), display="block" if block else "inline")

    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', one, page_html, flags=re.S)


def on_page_content(page_html: str, page, config, files) -> str:
    page.edit_url = config["extra"]["notebooks"].get(page.file.src_uri)
    return mathml(page_html)
