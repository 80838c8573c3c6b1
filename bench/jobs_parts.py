"""What the part log costs: committing at one part every two seconds, and looking at ten thousand parts before resuming.

    python bench/jobs_parts.py               about two minutes; on the file system of the temporary folder
    python bench/jobs_parts.py --dir /data   on another one

*Commit.* Two seconds of computing are ten pieces of work on arrays that are made new each time, as a step's results
are. The same pieces are timed in turns with and without handing them to the log at the end, with 256 rows in a part
and with 40,000 (about 4 MB); the figure is the median of the paired differences, as a share of two seconds. The
computing is shortened to a tenth and the share scaled, because the cost of a commit does not depend on what came
before it. *Resume.* Ten thousand parts are copied into a folder, and a new log reads their footers; once with what
the system remembers of them and, where it lets itself be asked to forget, once without.
Prints the figures and whether each claim held; the exit status is 1 where one did not.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from llm_analysis.jobs.footer import encode, notes, part_name
from llm_analysis.jobs.parts import Chunk, Log

EVERY = 2.0  # seconds between parts


def chunk(rng, first: int, rows: int) -> Chunk:
    "A batch of results: an id, a score, and a list of eight numbers a row"
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(8 * rows, dtype=np.float32)), 8)
    ids = np.arange(first, first + rows)
    return Chunk(
        pa.table({"index": ids, "nats": rng.standard_normal(rows), "values": lists.cast(pa.list_(pa.float32()))})
    )


def compute(rng, seconds: float) -> None:
    "Arithmetic for a fixed number of steps, about `seconds`"
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        x = rng.standard_normal((128, 128))
        x @ x


def commit(folder: Path, rows: int, pairs: int, beside: int) -> tuple[float, float]:
    "Median extra seconds of a part, over pairs with and without, beside so many parts; and bytes of a part"
    rng, log, extra = np.random.default_rng(0), Log(folder, "bench"), []
    log.publish(0, 0, [chunk(rng, 0, 2)])
    for k in range(beside):
        os.link(log.data / part_name(0, 0), log.data / f"part-{k + 1000:05d}-00000000.parquet")
    for pair in range(1, pairs + 1):
        times = {}
        for kind in ("with", "without") if pair % 2 else ("without", "with"):
            start = time.perf_counter()
            compute(rng, EVERY / 10)
            computed = time.perf_counter()
            batches = [chunk(rng, 8 * pair * rows + k * rows // 8, rows // 8) for k in range(8)]
            if kind == "with":
                log.publish(1, 8 * (pair - 1), batches)
            times[kind] = time.perf_counter() - computed + (computed - start) * 0
        extra.append(times["with"] - times["without"])
    return statistics.median(extra), log.parts(1)[-1].nbytes


def resume(folder: Path, count: int) -> tuple[float, float, float]:
    "Seconds in which a new log sees so many parts: remembered by the system, forgotten if it can be, and again"
    (folder / "data").mkdir(parents=True)
    rng = np.random.default_rng(0)
    table = chunk(rng, 0, 64).table
    for k in range(count):
        shard, start = k % 160, 4 * (k // 160)
        blob = encode(table, notes("bench", shard, start, start + 4, 64, [(k, "skipped", "empty")]))
        with open(folder / "data" / part_name(shard, start), "wb") as file:
            file.write(blob)
            if hasattr(os, "posix_fadvise"):
                file.flush()
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in (folder / "data").iterdir():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    seconds = []
    for log in (Log(folder, "bench"), Log(folder, "bench")):
        start = time.perf_counter()
        assert len(log.parts()) == count
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    assert [log.missing(s, 10**6)[0][0] > 0 for s in range(160)] and len(log.parts()) == count
    return (*seconds, time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to write; the temporary folder if it is left out")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of two seconds, shortened to a tenth")
    parser.add_argument("--parts", type=int, default=10_000)
    args, held = parser.parse_args(), []
    print("| claim | measured | held |\n|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for rows in (256, 40_000):
            extra, nbytes = commit(Path(folder) / f"commit-{rows}", rows, args.pairs, beside=0)
            held.append(extra / EVERY <= 0.01)
            what = f"{1e3 * extra:.1f} ms a part of {nbytes / 1e3:,.0f} kB = {extra / EVERY:.2%}"
            print(f"| commit ≤ 1 % at a part per {EVERY:.0f} s | {what} | {'yes' if held[-1] else 'NO'} |", flush=True)
        extra, nbytes = commit(Path(folder) / "beside", 256, args.pairs, beside=args.parts)
        held.append(extra / EVERY <= 0.01)
        what = f"{1e3 * extra:.1f} ms beside {args.parts:,} other parts = {extra / EVERY:.2%}"
        print(f"| the same in a full folder | {what} | {'yes' if held[-1] else 'NO'} |", flush=True)
        cold, warm, again = resume(Path(folder) / "resume", args.parts)
        held.append(max(cold, warm) <= 2)
        what = f"{cold:.2f} s with footers forgotten, {warm:.2f} s remembered, {again:.2f} s when asked again by shard"
        print(f"| resume scan of {args.parts:,} parts ≤ 2 s | {what} | {'yes' if held[-1] else 'NO'} |")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
