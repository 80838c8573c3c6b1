"""The part log: two writers at every pair of failpoints, processes killed at each, disks that fail, bytes that flip."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs import parts
from llm_analysis.jobs.parts import Chunk, Log

POINTS = [f"write:{w}" for w in ("before", "half", "after")]
POINTS += [f"{step}:{w}" for step in ("fsync", "link", "dirsync") for w in ("before", "after")]
SCHEMA = pa.schema([("index", pa.int64()), ("who", pa.string())])


def batch(writer: str, b: int) -> Chunk:
    "Three rows of batch `b`; in every third batch one of them was left out"
    ids = [3 * b, 3 * b + 1, 3 * b + 2]
    kept = ids[:2] if b % 3 == 1 else ids
    skipped = [(ids[2], "skipped", "empty")] if b % 3 == 1 else []
    return Chunk(pa.table({"index": kept, "who": [writer] * len(kept)}, schema=SCHEMA), skipped)


def look(data: Path) -> list[tuple]:
    "Every visible part, read whole with plain pyarrow: (name, shard, start, stop, ids, writers)"
    found = []
    for path in sorted(data.glob("*.parquet")):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        said = {k.decode().split(".")[-1]: v.decode() for k, v in file.metadata.metadata.items()}
        table = file.read()
        numbers = [int(said[k]) for k in ("shard", "start", "stop")]
        found.append((path.name, *numbers, tuple(table["index"].to_pylist()), tuple(table["who"].to_pylist())))
    return found


def faults(views: list[list[tuple] | Exception], batches: int) -> list[str]:
    "What is wrong with a folder that was looked at several times, the last time when everybody had finished"
    wrong = [f"unreadable: {v}" for v in views if isinstance(v, Exception)]
    views = [v for v in views if not isinstance(v, Exception)]
    for early, late in zip(views, views[1:]):
        wrong += [f"a committed part changed: {p[0]}" for p in early if p not in late]
    for view in views:
        covered = Counter((p[1], b) for p in view for b in range(p[2], p[3]))
        wrong += [f"batch {b} of shard {s} stands in {n} parts" for (s, b), n in covered.items() if n > 1]
        writers = {}
        for part in view:
            for i, who in zip(part[4], part[5]):
                writers.setdefault(i // 3, set()).add(who)
        wrong += [f"batch {b} is of {len(w)} writers" for b, w in writers.items() if len(w) > 1]
    ids = [i for p in views[-1] for i in p[4]]
    expected = [i for b in range(batches) for i in batch("", b).table["index"].to_pylist()]
    if sorted(ids) != expected:
        wrong.append(f"ids at the end: {sorted(ids)}")
    return wrong


# --- two writers on one shard ----------------------------------------------------------------------------------------


class Race:
    "Two threads that publish the same shard; each stops once, at a chosen failpoint, and goes on when told"

    def __init__(self, folder: Path, batches: int, cuts: dict[str, tuple], stops: dict[str, tuple]):
        self.folder, self.batches, self.cuts, self.stops = folder, batches, cuts, stops
        self.hits, self.views = Counter(), []
        self.paused = {w: threading.Event() for w in cuts}  # also set at the end
        self.go = {w: threading.Event() for w in cuts}
        self.threads = {w: threading.Thread(target=self.write, args=(w,), name=w) for w in cuts}

    def at(self, point: str) -> None:
        me = threading.current_thread().name
        self.hits[me, point] += 1
        if self.stops[me] == (point, self.hits[me, point]):
            self.paused[me].set()
            assert self.go[me].wait(30)

    def write(self, me: str) -> None:
        try:
            log, edges = Log(self.folder, "run", SCHEMA, links=True, patience=0), (0, *self.cuts[me])
            for a, b in zip(edges, edges[1:]):
                log.publish(0, a, [batch(me, i) for i in range(a, b)])
        except Exception as e:
            self.views.append(e)
        finally:
            self.paused[me].set()

    def look(self) -> None:
        try:
            self.views.append(look(self.folder / "data"))
        except Exception as e:
            self.views.append(e)

    def run(self) -> list[str]:
        first, second = self.cuts
        for w in (first, second):
            self.threads[w].start()
            assert self.paused[w].wait(30)
            self.look()
        for w in (first, second):
            self.go[w].set()
            self.threads[w].join(30)
            self.look()
        return faults(self.views, self.batches)


@pytest.fixture
def fast_tmp():
    "A folder in memory where there is one: ten thousand fsyncs"
    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=room) as folder:
        yield Path(folder)


CUTS = [((3, 5), (2, 5)), ((2, 4, 5), (5,)), ((1, 5), (1, 3, 5))]


def races(folder: Path, monkeypatch, cuts, hits=(1, 2)):
    "The faults of every pair of stopping points, one race after the other"
    for number, pair in enumerate(itertools.product(itertools.product(POINTS, hits), repeat=2)):
        race = Race(folder / str(number), cuts[0][-1], dict(zip("AB", cuts)), dict(zip("AB", pair)))
        (folder / str(number) / "data").mkdir(parents=True)
        monkeypatch.setattr(parts, "at", race.at)
        yield pair, race.run()
        shutil.rmtree(folder / str(number))


@pytest.mark.parametrize("cuts", CUTS[:2], ids=str)
def test_two_writers_at_every_pair_of_failpoints(fast_tmp, monkeypatch, cuts):
    found = dict(races(fast_tmp, monkeypatch, cuts, hits=(1,)))
    assert len(found) == len(POINTS) ** 2 and not any(found.values()), {k: v for k, v in found.items() if v}


@pytest.mark.slow
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_two_writers_at_every_pair_of_failpoints_of_two_parts(fast_tmp, monkeypatch, cuts):
    found = dict(races(fast_tmp, monkeypatch, cuts))
    assert len(found) == (2 * len(POINTS)) ** 2 and not any(found.values()), {k: v for k, v in found.items() if v}


def attempts(tmp: Path, name: str, fd: int, links: bool) -> bool:
    "The fault of naming parts by attempt: everybody's link succeeds"
    attempts.count += 1
    os.link(tmp, name.replace(".parquet", f".{attempts.count}.parquet"), dst_dir_fd=fd)
    return True


attempts.count = 0


def in_place(tmp: Path, name: str, fd: int, links: bool) -> bool:
    "The fault of writing under the final name"
    try:
        out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=fd)
    except FileExistsError:
        return False
    blob = tmp.read_bytes()
    os.write(out, blob[: len(blob) // 2])
    parts.at("write:half")
    os.write(out, blob[len(blob) // 2 :])
    os.close(out)
    return True


def replacing(tmp: Path, name: str, fd: int, links: bool) -> bool:
    "The fault of a rename: it overwrites what another writer committed"
    os.rename(tmp, name, dst_dir_fd=fd)
    return True


@pytest.mark.parametrize(
    "mutant, word", [(attempts, "stands in 2 parts"), (in_place, "unreadable"), (replacing, "committed part changed")]
)
def test_each_faulty_commit_is_found(fast_tmp, monkeypatch, mutant, word):
    monkeypatch.setattr(parts, "link_once", mutant)
    if mutant is attempts:
        monkeypatch.setattr(parts, "NAME", parts.re.compile(r"part-(\d{5,})-(\d{8,})(?:-(\d{8,}))?(?:\.\d+)?\.parquet"))
    assert any(word in w for _, wrong in races(fast_tmp, monkeypatch, CUTS[0]) for w in wrong)  # stops at the first
