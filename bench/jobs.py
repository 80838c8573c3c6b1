"""What the job machinery costs and saves: commits, the look at what is there before resuming, the plan.

    python bench/jobs.py                             two minutes; in the temporary folder, a fifth of a GB of it
    python bench/jobs.py --dir /data                 on another file system
    python bench/jobs.py --pairs 5 --rows 1000000    shorter

*Commit.* A piece of arithmetic, then the results of eight batches are made, and in every other round they are handed to
the log. The figure is the median of the paired differences, as a share of the two seconds that such a part takes to
compute; the arithmetic is shortened to a tenth, since it does not change what a commit costs. Seconds of the processor
stand beside those of the clock: they tell a slow disk or a busy machine from a slow program.
*Resume.* A new log looks at a folder of parts that the system was asked to forget (where it can be asked), then three
other new logs do the same, and the last one looks again.
*Plan.* Padding counts tokens and the makespan is simulated (a worker takes the next shard when it is free; at half
speed it needs twice as long), so both are the same on every machine.

Prints a section for bench/RESULTS.md; the exit status is 1 where a claim did not hold.
"""

import argparse
import heapq
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from llm_analysis.core import stream
from llm_analysis.jobs.footer import encode, notes, part_name
from llm_analysis.jobs.parts import Chunk, Log
from llm_analysis.jobs.plan import make_plan

EVERY = 2.0  # seconds that a part takes to compute
BUDGET = 16_384  # padded tokens in a batch
WORKERS = 8

Row = tuple[str, str, str, bool | None]  # what, its claim, what was measured, whether that held


def timed(work: Callable, *args, **kwargs) -> tuple[float, float]:
    "Seconds that a call takes by the clock, and of the processor"
    wall, cpu = time.perf_counter(), time.process_time()
    work(*args, **kwargs)
    return time.perf_counter() - wall, time.process_time() - cpu


def chunk(rng: np.random.Generator, rows: int) -> Chunk:
    "A batch of results: an id, a score, and a list of eight numbers a row"
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(8 * rows, dtype=np.float32)), 8)
    columns = {
        "index": np.arange(rows),
        "nats": rng.standard_normal(rows),
        "values": lists.cast(pa.list_(pa.float32())),
    }
    return Chunk(pa.table(columns))


def fill(folder: Path, parts: int) -> None:
    "Write so many parts of shards 1000 to 1159"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = chunk(np.random.default_rng(0), 64).table
    for k in range(parts):
        shard, start = 1000 + k % 160, 4 * (k // 160)
        blob = encode(table, notes("bench", shard, start, start + 4, 64, [(k, "skipped", "empty")]))
        (folder / "data" / part_name(shard, start)).write_bytes(blob)
    os.sync()


def forget(folder: Path) -> None:
    "Ask the system to forget what it has read of a folder of parts"
    for path in (folder / "data").iterdir() if hasattr(os, "posix_fadvise") else ():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def commit(folder: Path, what: str, rows: int, pairs: int, beside: int = 0) -> Row:
    "What it adds to the computation of a part that it is committed, in a folder of so many others"
    rng, log, added = np.random.default_rng(0), Log(folder, "bench"), []
    fill(folder, beside)
    log.publish(0, 0, [chunk(rng, 2)])  # the first one also makes the folders

    def compute() -> None:
        end = time.perf_counter() + EVERY / 10
        while time.perf_counter() < end:
            x = rng.standard_normal((128, 128))
            x @ x

    def finish(start: int, publish: bool) -> None:
        batches = [chunk(rng, rows // 8) for _ in range(8)]
        if publish:
            log.publish(1, start, batches)

    for pair in range(pairs):
        took = {}
        for publish in (True, False) if pair % 2 else (False, True):
            compute()
            took[publish] = np.array(timed(finish, 8 * pair, publish))
        added.append(took[True] - took[False])
    wall, cpu = np.median(added, axis=0)
    kb = log.parts(1)[-1].nbytes / 1e3
    said = f"{wall / EVERY:.2%}: {1e3 * wall:.1f} ms for {kb:,.0f} kB ({1e3 * cpu:.1f} ms CPU)"
    return f"commit: {what}", f"≤ 1 % at a part in {EVERY:.0f} s", said, wall / EVERY <= 0.01


def resume(folder: Path, parts: int) -> Row:
    "How long a new log looks at a folder of parts"
    fill(folder, parts)
    forget(folder)
    took = []
    for _ in range(4):
        log = Log(folder, "bench")
        took.append(timed(log.parts))
        assert len(log.parts()) == parts
    (first, cpu), again = took[0], statistics.median(wall for wall, _ in took[1:])
    said = f"{first:.2f} s ({cpu:.2f} s CPU), then {again:.2f} s; {timed(log.parts)[0]:.2f} s where the log knows them"
    return f"resume: a first look at {parts:,} parts", "≤ 2 s", said, first <= 2


def chats(rows: int) -> np.ndarray:
    "Lengths as chats have them: log-normal, 4 to 4096 tokens"
    return np.clip(stream(0, "chats", "bench").lognormal(5.0, 1.2, rows), 4, 4096).astype(np.int64)


def words(rows: int) -> np.ndarray:
    "Words of short texts: normal, 3 to 60"
    return np.clip(stream(0, "words", "bench").normal(12, 6, rows), 3, 60).astype(np.int64)


def padding(rows: int, size: int = 32) -> Row:
    "The share of padding in planned batches, and in batches of `size` rows as they come"
    lengths = chats(rows)
    planned, window = (make_plan(lengths, batch_tokens=BUDGET, window=w).waste for w in (None, 2048))
    width = np.repeat(np.maximum.reduceat(lengths, np.arange(0, rows, size)), size)[:rows]
    arrival = 1 - lengths.sum() / width.sum()
    said = f"{planned:.2%}; {window:.1%} in windows of 2048 rows; {arrival:.1%} as they come, {size} a batch"
    return f"padding: {rows:,} chats", "≤ 2 %, ≥ 40 % as they come", said, planned <= 0.02 and arrival >= 0.4


def handed_out(costs: np.ndarray, speeds: np.ndarray) -> float:
    "When the last worker is done if each takes the next shard as soon as it is free; 1 is the ideal"
    free = [(0.0, w) for w in range(len(speeds))]
    for cost in costs:
        at, w = heapq.heappop(free)
        heapq.heappush(free, (at + cost / speeds[w], w))
    return max(free)[0] / (costs.sum() / speeds.sum())


def static(costs: np.ndarray, speeds: np.ndarray) -> float:
    "When the last worker is done if each has one shard of its own; 1 is the ideal"
    return (costs / speeds).max() / (costs.sum() / speeds.sum())


def makespan(what: str, lengths: np.ndarray, costs: np.ndarray, most: int | None = None) -> Row:
    "When the last of the workers is done, with one of them at half speed and with none"
    told = dict(batch_tokens=BUDGET, max_batch_size=most)
    ours, theirs = (make_plan(lengths, costs, **told, static=s).shard_cost for s in (None, WORKERS))
    half, full = np.array([0.5] + [1.0] * (WORKERS - 1)), np.ones(WORKERS)
    slow = handed_out(ours, half)
    said = f"{slow:.3f}, static {static(theirs, half):.3f}; all at full speed {handed_out(ours, full):.3f}, static "
    said += f"{static(theirs, full):.3f}"
    return f"makespan: one of {WORKERS} workers at half speed, cost {what}", "≤ 1.05 of the ideal", said, slow <= 1.05


def planning(rows: int) -> Row:
    "How long a plan takes"
    lengths, said = chats(rows), []
    for name, window in {"all rows": None, "windows of 4096": 4096}.items():
        wall, cpu = timed(make_plan, lengths, batch_tokens=BUDGET, window=window)
        said.append(f"{wall:.2f} s over {name} ({cpu:.2f} s CPU)")
    return f"planning {rows:,} rows", "", "; ".join(said), None


def measured(folder: Path, pairs: int, parts: int, rows: list[int]) -> Iterator[Row]:
    "Every claim, as it is measured"
    yield commit(folder / "small", "small parts", 256, pairs)
    yield commit(folder / "large", "large parts", 40_000, pairs)
    yield commit(folder / "full", f"small parts among {parts:,}", 256, pairs, parts)
    yield resume(folder / "resume", parts)
    yield from map(padding, (20_000, 200_000))
    chat, word = chats(200_000), words(20_000)
    yield makespan("n, tokens of a chat", chat, chat.astype(float))
    yield makespan("n²", chat, chat.astype(float) ** 2)
    yield makespan("2^min(n, 11), n words", word, 2.0 ** np.minimum(word, 11), most=16)  # an explanation
    yield from map(planning, rows)


def report(told: argparse.Namespace, folder: Path) -> bool:
    "Print the section; whether every claim held"
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    late = 2 * (WORKERS - 0.5)  # a shard of the slow worker, if all work is divided by all speed
    print("## Jobs: `python bench/jobs.py`")
    print(f"Batches of {BUDGET:,} padded tokens; a makespan of 1 is all work divided by all speed.", end=" ")
    print(f"By arithmetic, static shards wait for a worker at half speed until {late / WORKERS:.3f},", end=" ")
    print(f"and one of 160 shards that it takes last adds at most {late / 160:.3f}.\n")
    print("| what | claim | measured | held |\n|---|---|---|---|")
    held = []
    for what, claim, said, ok in measured(folder, told.pairs, told.parts, told.rows):
        held.append(ok)
        mark = {True: "yes", False: "**NO**", None: ""}[ok]
        print(f"| {what} | {claim} | {said.replace('%', ' %')} | {mark} |", flush=True)
    load += f" and {os.getloadavg()[0]:.1f} at the end"
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}"
    print(f"\n{told.pairs} pairs; {os.cpu_count()} {platform.machine()} cores, {load}; {versions}.")
    return False not in held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to write; the temporary folder if it is left out")
    parser.add_argument("--pairs", type=int, default=40, help="rounds with and without a commit")
    parser.add_argument("--parts", type=int, default=10_000, help="parts in a full folder")
    parser.add_argument("--rows", type=int, nargs="*", default=[10**6, 10**7], help="sizes of the timed plans")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=told.dir) as folder:
        return 0 if report(told, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
