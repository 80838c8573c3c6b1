"""The part log: two writers at every pair of failpoints, processes killed at each, disks that fail, bytes that flip."""

import errno
import itertools
import json
import os
import random
import re
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
from parts_victim import SCHEMA, batch

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs import disk, footer, merge, parts, verify
from llm_analysis.jobs.footer import ForeignPart
from llm_analysis.jobs.parts import Chunk, Log
from llm_analysis.jobs.pulse import beat

POINTS = [f"write:{w}" for w in ("before", "half", "after")]
POINTS += [f"{step}:{w}" for step in ("fsync", "link", "dirsync") for w in ("before", "after")]


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
        if self.stops.get(me) == (point, self.hits[me, point]):
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
        name = re.compile(r"part-(\d{5,})-(\d{8,})(?:-(\d{8,}))?(?:\.\d+)?\.parquet")
        monkeypatch.setattr(parts, "NAME", name)
        monkeypatch.setattr(footer, "NAME", name)
    assert any(word in w for _, wrong in races(fast_tmp, monkeypatch, CUTS[0]) for w in wrong)  # stops at the first


# --- processes that are killed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spawn():
    "Call a function of parts_victim in a process of its own, forked from a clean one; its exit code"
    command = [sys.executable, str(Path(__file__).with_name("parts_victim.py")), "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(*call) -> int:
            print(json.dumps(call), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


@pytest.mark.parametrize("hit", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_failpoint(tmp_path, spawn, point, hit):
    assert spawn("writes", str(tmp_path), point, hit) == -9
    views = [look(tmp_path / "data")]
    log = Log(tmp_path, "run", SCHEMA)
    left = list((tmp_path / "_job" / "tmp").iterdir())
    assert len(left) == (0 if point == "write:before" else 1)
    for start, stop in log.missing(0, 5):
        log.publish(0, start, [batch("B", i) for i in range(start, stop)])
    log.publish(0, 0, [batch("B", i) for i in range(5)])  # also sweeps where nothing was missing
    views.append(look(tmp_path / "data"))
    assert not faults(views, 5)
    assert log.missing(0, 5) == [] and not list((tmp_path / "_job" / "tmp").iterdir())
    assert sorted(log.skipped()) == [(5, "skipped", "empty"), (14, "skipped", "empty")]
    assert verify.verify(log, [5]).ok


# --- disks that refuse -----------------------------------------------------------------------------------------------


def namespace() -> str | None:
    "Why no file system can be mounted here, or None"
    try:
        ran = subprocess.run(["unshare", "-rm", "true"], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no `unshare`"
    return None if ran.returncode == 0 else f"no user namespace can be made: {ran.stderr.strip()}"


def on_small_disk(tmp_path: Path, kind: str, recovers: bool) -> dict:
    "Run parts_victim on a file system of 3 MB"
    if why := namespace():
        pytest.skip(why)
    here = [sys.executable, str(Path(__file__).with_name("parts_victim.py"))]
    mount = f'mount -t tmpfs -o size=3m tmpfs "{tmp_path}" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", *here, str(tmp_path), kind]
    ran = subprocess.run([*command, "recovers" if recovers else "stays"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("kind, word", [("full", "No space left"), ("read-only", "Read-only"), ("limit", "too large")])
@pytest.mark.parametrize("recovers", [True, False])
def test_bad_disk(tmp_path, kind, word, recovers):
    seen = on_small_disk(tmp_path, kind, recovers)
    assert word in seen["first"][0] and seen["said"] >= 2
    if recovers:
        assert seen["error"] is None and seen["ids"] == [0, 1, 2, 3, 4] and seen["seconds"] < 10
    else:
        assert word in seen["error"] and seen["ids"] == [0]
    assert not seen["left"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("point", POINTS)
def test_errors_at_each_failpoint(tmp_path, monkeypatch, point, code):
    log = Log(tmp_path, "run", SCHEMA, say=lambda m: None, wait=lambda s: None)
    broken = itertools.chain([True, True], itertools.repeat(False))

    def at(name):
        if name == point and next(broken):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(parts, "at", at)
    (one,) = log.publish(0, 0, [batch("A", i) for i in range(3)])  # well again after two errors
    assert (one.start, one.stop) == (0, 3)
    broken, log.patience = itertools.repeat(True), 0.0  # and now for ever
    with pytest.raises(WorldError, match=os.strerror(code)):
        log.publish(0, 3, [batch("A", i) for i in range(3, 5)])
    views = [look(tmp_path / "data")]
    assert not list((tmp_path / "_job" / "tmp").iterdir())
    monkeypatch.setattr(parts, "at", lambda name: None)
    again = Log(tmp_path, "run", SCHEMA)
    again.publish(0, 0, [batch("A", i) for i in range(5)])
    assert not faults([*views, look(tmp_path / "data")], 5) and verify.verify(again, [5]).ok


def test_an_error_that_does_not_pass_is_raised_at_once(tmp_path, monkeypatch):
    def at(name):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(parts, "at", at)
    with pytest.raises(PermissionError):
        Log(tmp_path, "run", SCHEMA).publish(0, 0, [batch("A", 0)])
    assert not list((tmp_path / "data").iterdir()) and not list((tmp_path / "_job" / "tmp").iterdir())


# --- bytes that flip, files that shrink or go ------------------------------------------------------------------------


def fill(folder: Path, shards: int, batches: int, cut: int) -> Log:
    "Publish whatever is missing, in parts of `cut` batches"
    log = Log(folder, "run", SCHEMA)
    for shard in range(shards):
        for start, stop in log.missing(shard, batches):
            for b in range(start, stop, cut):
                numbers = range(b, min(b + cut, stop))
                log.publish(shard, b, [batch("A", shard * batches + i) for i in numbers])
    return log


def ids_of(batches: int):
    return lambda p: range(3 * (p.shard * batches + p.start), 3 * (p.shard * batches + p.stop))


@pytest.mark.parametrize("how", ["log", "manifest"])
def test_every_damage_is_found_and_mended(fast_tmp, how):
    shards, batches, cut = 15, 20, 2
    log = fill(fast_tmp, shards, batches, cut)
    before, rng = log.open_table(), random.Random(0)
    if how == "manifest":
        verify.write_manifest(log)
        shutil.rmtree(fast_tmp / "_job")
    files = sorted(log.data.iterdir())
    chosen = rng.sample(files, 140)
    damage = dict(zip(chosen, ["flip"] * 100 + ["cut"] * 20 + ["gone"] * 20))
    for path, what in damage.items():
        blob = bytearray(path.read_bytes())
        if what == "flip":
            blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
            path.write_bytes(blob)
        elif what == "cut":
            path.write_bytes(blob[: rng.randrange(len(blob))])
        else:
            path.unlink()
    report = verify.verify(Log(fast_tmp, "run", SCHEMA), [batches] * shards, expected=ids_of(batches), repair=True)
    assert set(report.damaged) == {p.name for p, what in damage.items() if what != "gone"}
    ranges = {(s, b) for s, found in report.missing.items() for a, e in found for b in range(a, e)}
    lost = {(int(p.name[5:10]), int(p.name[11:19]) + k) for p in damage for k in range(cut)}
    assert ranges == lost and len(report.quarantined) == 120 and report.twice == []
    again = fill(fast_tmp, shards, batches, cut)
    assert again.open_table().equals(before)
    assert {p.name for p in files} == {p.name for p in log.data.iterdir()}
    after = verify.verify(again, [batches] * shards, expected=ids_of(batches))
    assert after.ok and after.rows == len(before) and not after.unsigned
    assert len(list((fast_tmp / "_job" / "quarantine").iterdir())) == 120


def test_flips_without_any_signature(fast_tmp):
    "What checksums and digests see alone: everything in the pages and in our notes"
    log = fill(fast_tmp, 1, 4, 4)
    shutil.rmtree(fast_tmp / "_job" / "log")
    (path,) = log.data.iterdir()
    blob, unseen = path.read_bytes(), []
    for i in range(len(blob)):
        path.write_bytes(blob[:i] + bytes([blob[i] ^ 4]) + blob[i + 1 :])
        try:
            whole = verify.verify(Log(fast_tmp, "run", SCHEMA), [4]).ok
        except ForeignPart:
            whole = False
        unseen += [i] if whole else []
    notes = blob.index(b"llm_analysis.")
    print(f"{len(unseen)} of {len(blob)} bytes are protected by a SHA-256 alone")
    notes = blob.index(b"llm_analysis.")
    assert not [i for i in unseen if notes <= i < blob.index(b"llm_analysis.digest")]
    assert len(unseen) < 0.4 * len(blob)  # of a file of four batches; page headers and the footer do not grow


def test_repair_and_compact_refuse_while_somebody_works(tmp_path):
    log = fill(tmp_path, 1, 4, 1)
    beat(tmp_path, {})
    for call in (lambda: verify.verify(log, [4], repair=True), lambda: merge.compact(log)):
        with pytest.raises(WorldError, match=f"process {os.getpid()}"):
            call()
    assert verify.verify(log, [4]).ok and len(log.parts()) == 4  # looking is allowed


# --- odd parts -------------------------------------------------------------------------------------------------------


def test_parts_without_rows_are_read_by_everybody(tmp_path):
    import datasets
    import pandas as pd

    log = Log(tmp_path, "run", SCHEMA)
    nothing = Chunk(SCHEMA.empty_table(), [(i, "failed", "ValueError: no") for i in range(3)])
    log.publish(0, 0, [nothing])
    log.publish(0, 1, [batch("A", 1), nothing])
    log.publish(1, 0, [nothing])
    paths = sorted(str(p) for p in log.data.iterdir())
    assert [len(pd.read_parquet(p)) for p in paths] == [0, 2, 0] and len(pd.read_parquet(log.data)) == 2
    assert pq.read_table(log.data).column_names == pq.read_table(paths[0]).column_names == ["index", "who"]
    rows = datasets.load_dataset("parquet", data_files=paths, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["index"][:] == [3, 4]
    assert verify.verify(log, [3, 1]).without == {"failed": 9, "skipped": 1}
    assert Log(tmp_path, "run", SCHEMA).open_table(["who"]).num_rows == 2


def test_foreign_damaged_and_strange_files_are_refused(tmp_path):
    fill(tmp_path, 1, 2, 1)
    with pytest.raises(ForeignPart, match="expected parts of run other; got part-00000-00000000.parquet of run run"):
        Log(tmp_path, "other").parts()
    with pytest.raises(ForeignPart):
        verify.verify(Log(tmp_path, "other"), repair=True)  # a wrong fingerprint must not empty the folder
    strange = tmp_path / "data" / "mine.parquet"
    pq.write_table(pa.table({"a": [1]}), strange)
    with pytest.raises(WorldError, match="mine.parquet"):
        Log(tmp_path, "run").parts()
    strange.rename(tmp_path / "data" / "part-00000-00000007.parquet")
    with pytest.raises(WorldError, match="without our notes"):
        Log(tmp_path, "run").parts()
    (tmp_path / "data" / "part-00000-00000007.parquet").unlink()
    shutil.copy(tmp_path / "data" / "part-00000-00000001.parquet", tmp_path / "data" / "part-00003-00000001.parquet")
    with pytest.raises(WorldError, match="the name of shard 0, batch 1"):
        Log(tmp_path, "run").parts()


def test_overlaps_are_found_and_mended(tmp_path):
    log = fill(tmp_path / "a", 1, 6, 2)
    other = Log(tmp_path / "b", "run", SCHEMA)
    other.publish(0, 0, [batch("A", i) for i in range(3)])
    other.publish(0, 3, [batch("A", i) for i in range(3, 6)])
    shutil.copy(tmp_path / "b" / "data" / "part-00000-00000003.parquet", log.data)
    with pytest.raises(WorldError, match="disjoint"):
        log.parts()
    report = verify.verify(log, [6], repair=True)
    assert "part-00000-00000003.parquet" in report.damaged
    assert verify.verify(Log(tmp_path / "a", "run", SCHEMA), [6]).ok


@pytest.mark.parametrize("gap", [(0, 2), (2, 5), (5, 9)])
def test_a_gap_is_filled_and_not_overrun(tmp_path, gap):
    log = Log(tmp_path, "run", SCHEMA)
    for a, b in ((0, 2), (2, 5), (5, 9)):
        log.publish(0, a, [batch("A", i) for i in range(a, b)])
    (tmp_path / "data" / footer.part_name(0, gap[0])).unlink()
    assert log.missing(0, 9) == [gap]
    wrote = Log(tmp_path, "run", SCHEMA).publish(0, 0, [batch("A", i) for i in range(9)])
    assert [(p.start, p.stop) for p in wrote] == [gap] and not faults([look(log.data)], 9)


def test_one_batch_and_bad_arguments(tmp_path):
    log = Log(tmp_path, "run")
    assert log.parts() == [] and log.missing(0, 1) == [(0, 1)] and log.missing(0, 0) == [] and log.skipped() == []
    assert log.open_table().num_rows == 0 and not (tmp_path / "data").exists()  # looking makes nothing
    assert len(log.publish(0, 0, [batch("A", 0)])) == 1 and log.publish(0, 0, []) == []
    assert log.missing(0, 1) == []
    with pytest.raises(InputError, match="schema"):
        log.publish(0, 1, [Chunk(pa.table({"index": ["x"], "who": ["A"]}))])
    with pytest.raises(WorldError, match="ends at batch 5"):
        log.publish(0, 5, [batch("A", 5)])
    with pytest.raises(WorldError, match="at most 0 batches"):
        log.missing(0, 0)
    with pytest.raises(InputError, match="fingerprint"):
        Log(tmp_path, None).publish(0, 1, [batch("A", 1)])


def test_without_hard_links(tmp_path, monkeypatch):
    def no_links(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    said = []
    log = Log(tmp_path, "run", SCHEMA, say=said.append)
    log.publish(0, 0, [batch("A", i) for i in range(3)])
    log.publish(0, 2, [batch("A", i) for i in range(2, 5)])
    assert log.links is False and "only one process" in said[0] and not list((tmp_path / "_job" / "tmp").iterdir())
    assert merge.compact(log) == (2, 1) and not faults([look(log.data)], 5)


def test_a_lost_answer_to_a_link(tmp_path, monkeypatch):
    "A network file system may say that the name exists when it was this very call that made it"
    link = os.link

    def twice(*args, **kwargs):
        link(*args, **kwargs)
        raise FileExistsError(errno.EEXIST, "exists")

    log = Log(tmp_path, "run", SCHEMA, links=True)
    monkeypatch.setattr(os, "link", twice)
    assert [(p.start, p.stop) for p in log.publish(0, 0, [batch("A", 0)])] == [(0, 1)]


def test_only_dead_writers_are_swept(tmp_path):
    own = tmp_path / disk.tmp_name()
    host, boot, pid, rest = own.name.split("~")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {own.name: True, f"{host}~{boot}~{dead.pid}~{rest}": False, f"{host}~0000~{pid}~{rest}": False}
    names |= {f"elsewhere~{boot}~{dead.pid}~{rest}": True, f"elsewhere~{boot}~1~old{rest}": False}
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / f"elsewhere~{boot}~1~old{rest}", (0, 0))
    assert disk.sweep(tmp_path) == 3
    assert {p.name for p in tmp_path.iterdir()} == {n for n, stays in names.items() if stays}


# --- compaction, replaced folders, merging ---------------------------------------------------------------------------

SWAP = [(p, h) for p in ("write:before", "write:half", "write:after", "fsync:after") for h in (1, 2)]
SWAP += [("swap:before", 1), ("swap:after", 1), ("swap:removed", 1)]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("point, hit", [*SWAP, ("swap:half", 1)])
def test_compaction_killed_at_each_failpoint(tmp_path, spawn, point, hit, exchange):
    if exchange and point == "swap:half":
        return
    log = fill(tmp_path, 2, 6, 2)
    before = log.open_table()
    assert spawn("compacts", str(tmp_path), point, hit, exchange) == -9
    if point != "swap:half":  # a reader that knows nothing of us
        assert not faults([look(tmp_path / "data")], 12)
    again = Log(tmp_path, "run", SCHEMA)
    assert again.open_table().equals(before) and again.missing(0, 6) == again.missing(1, 6) == []
    assert not faults([look(tmp_path / "data")], 12)
    assert merge.compact(again)[1] == 2 and again.open_table().equals(before)
    assert verify.verify(again, [6, 6], expected=ids_of(6)).ok
    assert not (tmp_path / "_job" / "next").exists() and not (tmp_path / "_job" / "old").exists()


def test_plain_readers_never_see_a_row_twice_during_compaction(tmp_path):
    "A list of files taken at any moment, opened at any later one, in any order: the right rows or 'no such file'"
    log = fill(tmp_path, 2, 6, 2)
    whole = sorted(log.open_table()["index"].to_pylist())
    read = lambda paths: [i for p in paths for i in pq.ParquetFile(p).read()["index"].to_pylist()]
    files = sorted(log.data.iterdir())
    orders = [files, files[::-1], random.Random(0).sample(files, len(files))]
    early = [(order, cut, read(order[:cut])) for order in orders for cut in range(len(order) + 1)]
    assert merge.compact(log) == (6, 2)
    right = 0
    for order, cut, begun in early:
        try:
            assert sorted(begun + read(order[cut:])) == whole
            right += 1
        except FileNotFoundError:
            continue
    assert right == len(orders)  # those who had read everything before


def test_a_writer_that_slept_through_a_compaction(fast_tmp, monkeypatch):
    "Stopped just before its link, it wakes up when its batches stand in a merged part"
    for point in POINTS:
        folder = fast_tmp / point.replace(":", "-")
        Log(folder, "run", SCHEMA).publish(0, 0, [batch("A", 0), batch("A", 1)])
        race = Race(folder, 6, {"A": (), "B": ()}, {"A": (point, 1), "B": ("", 0)})
        monkeypatch.setattr(parts, "at", lambda p, race=race: race.at(p) if p in POINTS else None)

        def sleeper(race=race, folder=folder):
            try:
                log = Log(folder, "run", SCHEMA, links=True)
                race.wrote = log.publish(0, 2, [batch("A", i) for i in range(2, 6)])
            finally:
                race.paused["A"].set()

        def others(folder=folder):
            fill_from = Log(folder, "run", SCHEMA, links=True)
            fill_from.publish(0, 2, [batch("B", 2), batch("B", 3)])
            fill_from.publish(0, 4, [batch("B", 4), batch("B", 5)])
            merge.compact(Log(folder, "run", SCHEMA))

        a = threading.Thread(target=sleeper, name="A")
        a.start()
        assert race.paused["A"].wait(30)
        b = threading.Thread(target=others, name="B")
        b.start()
        b.join(30)
        race.look()
        race.go["A"].set()
        a.join(30)
        race.look()
        assert not faults(race.views, 6), point
        assert verify.verify(Log(folder, "run", SCHEMA), [6]).ok


def test_a_part_committed_while_the_folder_is_replaced_is_kept(tmp_path, monkeypatch):
    log = fill(tmp_path, 1, 4, 2)
    done = []

    def at(point):
        if point == "swap:before" and not done:
            done.append(Log(tmp_path, "run", SCHEMA).publish(0, 4, [batch("A", 4), batch("A", 5)]))

    monkeypatch.setattr(parts, "at", at)
    merge.compact(log)
    assert not faults([look(tmp_path / "data")], 6) and log.missing(0, 6) == []


def test_merge_takes_nothing_damaged_and_is_run_again(tmp_path, monkeypatch):
    for k in (0, 1):
        log = Log(tmp_path / str(k), "run", SCHEMA)
        for shard in range(k, 4, 2):
            log.publish(shard, 0, [batch("A", 3 * shard + i) for i in range(3)])
    (tmp_path / "0" / "_job" / "spec.json").write_text('{"a": 1}')
    sources, into = [tmp_path / "0", tmp_path / "1"], tmp_path / "all"
    hits = Counter()

    def at(point):
        hits[point] += 1
        if point == "write:half" and hits[point] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts, "at", at)
    with pytest.raises(KeyboardInterrupt):
        merge.merge(sources, into)
    assert len(look(into / "data")) == 2 and not list((into / "_job" / "tmp").iterdir())
    path = tmp_path / "1" / "data" / "part-00003-00000000.parquet"
    blob = path.read_bytes()
    path.write_bytes(blob[:60] + bytes([blob[60] ^ 1]) + blob[61:])
    with pytest.raises(WorldError, match="part-00003-00000000.parquet as it was written"):
        merge.merge(sources, into)
    path.write_bytes(blob)
    merged = merge.merge(sources, into)
    assert not faults([look(into / "data")], 12) and verify.verify(merged, [3] * 4).ok
    assert (into / "_job" / "spec.json").read_text() == '{"a": 1}'
