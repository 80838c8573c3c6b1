"""Execute one notebook and save it with its outputs: `make nb NB=nbs/00_core.ipynb`.

Cells flagged `slow`, `gpu` or `net` keep the outputs they have, unless SLOW=1, GPU=1 or NET=1 says that they run.
Progress bars are off. A notebook whose output names a path of this machine is refused, not saved."""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\w+)", re.M)
FLAGS = ("slow", "gpu", "net")
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "IN_TEST": "1"}


def leaks(nb) -> list[str]:
    "Outputs that name a path of this machine"
    own = {str(ROOT), str(Path.home()) + "/", sys.prefix, tempfile.gettempdir() + "/"}
    return [f"cell {i}: {p}" for i, c in enumerate(nb.cells) for p in sorted(own) if p in str(c.get("outputs", ""))]


def execute(path: Path) -> None:
    "Run `path` top to bottom in its own folder and write it back; on an error raise it and leave the file as it was"
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell

    skip = {f for f in FLAGS if os.environ.get(f.upper()) != "1"}
    nb = read_nb(path)

    def skipped(cell) -> bool:
        "Whether the cell is left alone; one that is run loses its old outputs first"
        if cell.cell_type != "code" or skip & set(DIRECTIVE.findall(cell.source)):
            return True
        cell.outputs = []
        return False

    here = Path.cwd()
    os.chdir(path.parent)
    try:
        shell = CaptureShell(path, mpl_format="png")
        shell.run_all(nb, exc_stop=True, preproc=skipped)
    except BaseException:
        sys.exit(f"{path.name} was not saved\n{shell.prettytb(path.name)}")
    finally:
        os.chdir(here)
    if found := leaks(nb):
        sys.exit(f"{path.name} was not saved: an output names a path of this machine ({'; '.join(found)})")
    write_nb(nb, path)


if __name__ == "__main__":
    names = sys.argv[1:]
    if not names or not all(Path(n).is_file() for n in names):
        sys.exit(f"which notebook? no file at {names or 'NB='}; for example: make nb NB=nbs/00_core.ipynb")
    if len(names) > 1:
        sys.exit("one notebook at a time: each gets a process of its own")
    os.environ.update(QUIET)
    start = time.monotonic()
    execute(Path(names[0]).resolve())
    print(f"executed {names[0]} in {time.monotonic() - start:.0f} s")
