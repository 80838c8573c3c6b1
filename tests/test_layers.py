"""The house: imports go to a lower floor, or to a lower number in the same folder or on the same floor."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
STUDIES = {"explain", "logits", "ensemble", "features", "parscale", "leaderboard"}
FLOOR = {
    "core": 0,
    "viz": 0,
    "text": 0,
    "views": 0,
    "jobs": 1,
    "lm": 1,
    "tiny": 2,
    "files": 2,
    "data": 2,
    "loaded": 2,
    "lengths": 3,
    **dict.fromkeys(STUDIES, 3),
}
FLOOR |= {"grammar": 4, "cli": 4}
BESIDE = {  # neighbours on one floor that may be imported
    "viz": {"core"},
    "text": {"core"},
    "views": {"core", "viz", "text"},
    "data": {"files", "tiny"},
    "cli": {"grammar"},
}
EXPORTED = re.compile(r"^\s*#\s*\|\s*exports?\b", re.M)


def exporting():
    "Every exporting notebook: (path, module, exported source)"
    for path in sorted(NBS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        sources = ["".join(c["source"]) for c in cells]
        name = next((m.group(1) for s in sources if (m := re.search(r"#\|\s*default_exp\s+([\w.]+)", s))), None)
        if name:
            code = "\n".join(s for s in sources if EXPORTED.search(s) or "#| exporti" in s)
            yield path, name.removesuffix(".__init__"), code


def imported(code: str, module: str) -> set[str]:
    "Modules of this package that `code` imports, relative imports resolved against `module`"
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: -node.level]
                base = ".".join(["llm_analysis", *parts, *([base] if base else [])])
            names = [base, *(f"{base}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        found |= {n.removeprefix("llm_analysis.") for n in names if n.startswith("llm_analysis.")}
    return found


NOTEBOOKS = {module: (path, code) for path, module, code in exporting()}
NUMBER = {module: int(path.name.split("_")[0]) for module, (path, _) in NOTEBOOKS.items()}


def fault(module: str, target: str) -> str | None:
    "Why `module` may not import `target`, or None"
    room, other = module.split(".")[0], target.split(".")[0]
    if room not in FLOOR or other not in FLOOR:
        return f"{room if room not in FLOOR else other} stands on no floor"
    if room == other:
        return None if NUMBER[target] < NUMBER[module] else f"{target} has no lower number than {module}"
    if other in BESIDE.get(room, ()) or FLOOR[other] < FLOOR[room]:
        return None
    return f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"


@pytest.mark.parametrize("module", NOTEBOOKS)
def test_imports_go_down(module):
    path, code = NOTEBOOKS[module]
    targets = {t for t in imported(code, module) if t in NOTEBOOKS}
    assert not [f for t in sorted(targets) if (f := fault(module, t))], path.name


def test_the_rule_can_fail():
    NUMBER.update({"explain.a": 40, "explain.b": 41, "logits.a": 50, "lm.z": 29})
    try:
        assert fault("lm.z", "explain.a") and fault("explain.a", "logits.a") and fault("explain.a", "explain.b")
        assert fault("explain.b", "explain.a") is None and fault("explain.a", "lm.z") is None
    finally:
        for extra in ("explain.a", "explain.b", "logits.a", "lm.z"):
            NUMBER.pop(extra)
    assert imported("from ..core import need\nfrom . import model", "lm.packing") >= {"core.need", "core", "lm.model"}


def test_no_package_module_without_a_notebook():
    package = ROOT / "llm_analysis"
    modules = {".".join(p.relative_to(package).with_suffix("").parts) for p in package.rglob("*.py")}
    assert {m for m in modules if m.rsplit(".")[-1] not in ("__init__", "_modidx")} == set(NOTEBOOKS) - {""}


@pytest.mark.parametrize("name", ["llm_analysis", "llm_analysis.core", "llm_analysis.cli"])
def test_light_imports(name):
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'matplotlib', 'pyarrow'}"
    code = f"import sys, {name}; print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
