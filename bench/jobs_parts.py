"""What the part log costs: committing at one part every two seconds, and looking at ten thousand parts before resuming.

    python bench/jobs_parts.py               about two minutes; on the file system of the temporary folder
    python bench/jobs_parts.py --dir /data   on another one

*Commit.* A piece of arithmetic, then the results of eight batches are made, and in every other round they are handed
to the log. The figure is the median of the paired differences, as a share of two seconds; the arithmetic is shortened
to a tenth, since it does not change what a commit costs. Small parts (256 rows), large ones (40,000 rows, 1.5 MB), and
small ones in a folder that holds ten thousand others. Seconds on the clock are what is claimed; the seconds of
processor time beside them tell a slow disk or a busy machine from a slow program.
*Resume.* Ten thousand parts, and a new log that reads their footers: the first time after the system was asked to
forget the files (where it can be asked), then three times more.
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


def commit(folder: Path, rows: int, pairs: int, beside: int) -> tuple[float, float, int]:
    "Median extra seconds of a part by the clock and by the processor, beside so many others; and its bytes"
    rng, log, wall, cpu = np.random.default_rng(0), Log(folder, "bench"), [], []
    log.publish(0, 0, [chunk(rng, 0, 2)])
    for k in range(beside):
        blob = encode(pa.table({"index": [k]}), notes("bench", 1000 + k, 0, 1, 1))
        (log.data / part_name(1000 + k, 0)).write_bytes(blob)
    os.sync()
    for pair in range(pairs):
        took = {}
        for kind in ("with", "without") if pair % 2 else ("without", "with"):
            compute(rng, EVERY / 10)
            start = time.perf_counter(), time.process_time()
            batches = [chunk(rng, (8 * pair + k) * rows // 8, rows // 8) for k in range(8)]
            if kind == "with":
                log.publish(1, 8 * pair, batches)
            took[kind] = time.perf_counter() - start[0], time.process_time() - start[1]
        wall.append(took["with"][0] - took["without"][0])
        cpu.append(took["with"][1] - took["without"][1])
    return statistics.median(wall), statistics.median(cpu), log.parts(1)[-1].nbytes


def resume(folder: Path, count: int) -> tuple[list[float], float, float]:
    "Seconds in which a new log sees so many parts, the first time and more; of the processor; and when asked again"
    (folder / "data").mkdir(parents=True)
    table = chunk(np.random.default_rng(0), 0, 64).table
    for k in range(count):
        shard, start = k % 160, 4 * (k // 160)
        blob = encode(table, notes("bench", shard, start, start + 4, 64, [(k, "skipped", "empty")]))
        (folder / "data" / part_name(shard, start)).write_bytes(blob)
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in (folder / "data").iterdir():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    seconds, before = [], time.process_time()
    for _ in range(4):
        log, start = Log(folder, "bench"), time.perf_counter()
        assert len(log.parts()) == count
        seconds.append(time.perf_counter() - start)
    cpu, start = (time.process_time() - before) / 4, time.perf_counter()
    assert len(log.parts()) == count
    return seconds, cpu, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to write; the temporary folder if it is left out")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of two seconds, shortened to a tenth")
    parser.add_argument("--parts", type=int, default=10_000)
    args, held = parser.parse_args(), []
    print("| claim | measured | held |\n|---|---|---|")
    cases = [("small parts", 256, 0), ("large parts", 40_000, 0), ("a full folder", 256, args.parts)]
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for name, rows, beside in cases:
            wall, cpu, nbytes = commit(Path(folder) / name, rows, args.pairs, beside)
            held.append(wall / EVERY <= 0.01)
            what = (
                f"{1e3 * wall:.1f} ms for {nbytes / 1e3:,.0f} kB = {wall / EVERY:.2%} (processor {1e3 * cpu:.1f} ms)"
            )
            claim = f"{name}: commit at most 1 % at a part per {EVERY:.0f} s"
            print(f"| {claim} | {what} | {'yes' if held[-1] else 'NO'} |", flush=True)
        seconds, cpu, again = resume(Path(folder) / "resume", args.parts)
        held.append(statistics.median(seconds) <= 2)
        what = f"{seconds[0]:.2f} s at first, then {statistics.median(seconds[1:]):.2f} s (processor {cpu:.2f} s); "
        what += f"{again:.2f} s when the same log is asked again"
        print(f"| seeing {args.parts:,} parts takes at most 2 s | {what} | {'yes' if held[-1] else 'NO'} |")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
