"""Writers in processes of their own, for tests of the part log: one that kills itself, one on a small disk."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llm_analysis.core import WorldError
from llm_analysis.jobs import merge, parts, verify
from llm_analysis.jobs.parts import Chunk, Log

SCHEMA = pa.schema([("index", pa.int64()), ("who", pa.string())])


def batch(writer: str, b: int) -> Chunk:
    "Three rows of batch `b`; in every third batch one of them was left out"
    ids = [3 * b, 3 * b + 1, 3 * b + 2]
    kept = ids[:2] if b % 3 == 1 else ids
    skipped = [(ids[2], "skipped", "empty")] if b % 3 == 1 else []
    return Chunk(pa.table({"index": kept, "who": [writer] * len(kept)}, schema=SCHEMA), skipped)


def die_at(point: str, hit: int):
    "Failpoints that end this process by SIGKILL at the chosen one"
    hits = Counter()

    def at(name: str) -> None:
        hits[name] += 1
        if name == point and hits[name] == hit:
            os.kill(os.getpid(), signal.SIGKILL)

    parts.at = at


def writes(folder: str, point: str, hit: int) -> None:
    "Publish five batches in two parts, and die at a failpoint"
    die_at(point, hit)
    log = Log(folder, "run", SCHEMA)
    for a, b in ((0, 3), (3, 5)):
        log.publish(0, a, [batch("A", i) for i in range(a, b)])


def compacts(folder: str, point: str, hit: int, exchange: bool) -> None:
    "Merge the parts of a folder, and die at a failpoint"
    die_at(point, hit)
    if not exchange:
        verify.exchange = lambda a, b: False
    merge.compact(Log(folder, "run", SCHEMA))


def wide(b: int) -> Chunk:
    "A batch of about 200 kB that does not compress"
    return Chunk(pa.table({"index": [b], "bytes": [os.urandom(200_000)]}))


def survives(folder: Path, block, free, patience: float) -> dict:
    "Publish while `block` makes the disk refuse; `free` ends that after the third wait. What happened"
    said, waits = [], []
    state = {"freed": None}

    def wait(seconds: float) -> None:
        waits.append(seconds)
        for path in (folder / "data").glob("*.parquet"):
            pq.ParquetFile(path, page_checksum_verification=True).read()  # nothing torn, while it waits
        if free and len(waits) == 3:
            free()
            state["freed"] = time.monotonic()
        time.sleep(min(seconds, 0.2))

    log = Log(folder, "run", patience=patience, say=said.append, wait=wait)
    log.publish(0, 0, [wide(0)])
    block()
    try:
        log.publish(0, 1, [wide(b) for b in range(1, 5)])
        error = None
    except WorldError as e:
        error = str(e)
    back = None if state["freed"] is None else time.monotonic() - state["freed"]
    seen = [pq.ParquetFile(p, page_checksum_verification=True).read() for p in sorted((folder / "data").iterdir())]
    left = [p.name for p in (folder / "_job" / "tmp").iterdir()]
    ids = [i for t in seen for i in t["index"].to_pylist()]
    return dict(said=len(said), first=said[:1], error=error, ids=ids, left=left, seconds=back)


def bad_disk(folder: Path, kind: str, recovers: bool) -> dict:
    "One of the ways in which a disk refuses"
    filler, patience = folder / "filler", 30.0 if recovers else 0.3
    if kind == "full":
        block = lambda: filler.write_bytes(
            b"x" * (os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - 300_000)
        )
        free = filler.unlink
    elif kind == "read-only":
        remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
        block, free = lambda: remount("ro"), lambda: remount("rw")
    else:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        limit = lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
        block, free = lambda: limit(300_000), lambda: limit(hard)
    return survives(folder, block, free if recovers else None, patience)


def serve() -> None:
    "Fork for every call that a line of the input names, and answer with how the child ended"
    for line in sys.stdin:
        name, *args = json.loads(line)
        if (child := os.fork()) == 0:
            {"writes": writes, "compacts": compacts}[name](*args)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps(bad_disk(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "recovers")))
