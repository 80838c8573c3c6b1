"""The work loop, executors, signals, progress: what needs processes, clocks and terminals."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs.batch import StepError
from llm_analysis.jobs.dispatch import CONVICTED, FATAL_ROW
from llm_analysis.jobs.job import Job, JobOptions
from llm_analysis.jobs.merge import merge
from llm_analysis.jobs.parts import Log
from llm_analysis.jobs.plan import make_plan
from llm_analysis.jobs.progress import status
from llm_analysis.jobs.step import Source, Step
from llm_analysis.jobs.testing import Digests, faults, start, texts
from llm_analysis.jobs.work import work

SMALL = dict(batch_tokens=160, max_batch_size=16, part_rows=40)
QUIET = dict(progress=False, devices="cpu", patience=3.0)


@pytest.fixture
def tmp_path():
    "In memory where that is possible: what is tested here is order, not the disk"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as home:
        yield Path(home)


class Numbers(Step):
    "Squares, with every kind of trouble on demand"

    schema = pa.schema([("index", pa.int64()), ("square", pa.int64()), ("where", pa.string())])

    def __init__(self, kill=(), fail=(), room=None, device=0.0, cpu=0.0, log=None, once=None, lose=(), break_at=None):
        self.kill, self.fail, self.room, self.device, self.cpu = set(kill), set(fail), room, device, cpu
        self.log, self.once, self.lose, self.break_at = log, once, set(lose), break_at

    def process(self, rows):
        if self.log:
            with open(self.log, "a") as f:
                f.write(f"{os.getpid()} {len(rows)}\n")
        xs = {row["x"] for row in rows}
        if self.room and len(rows) > self.room:
            raise MemoryError(f"{len(rows)} rows")
        if xs & self.kill and not (self.once and os.path.exists(self.once)):
            Path(self.once or os.devnull).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.break_at in xs and not os.path.exists(self.once):
            Path(self.once).touch()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if xs & self.fail:
            raise ValueError(f"cannot do {sorted(xs & self.fail)}")
        time.sleep(self.device)
        return [x * x for x in (row["x"] for row in rows)]

    def postprocess(self, raw, rows):
        time.sleep(self.cpu)
        good = [(row["index"], v) for row, v in zip(rows, raw) if row["x"] not in self.lose]
        ids, values = zip(*good) if good else ((), ())
        return pa.table({"index": ids, "square": values, "where": ["x"] * len(ids)}, schema=self.schema)


def numbers(n):
    return [{"x": i} for i in range(n)]


def squares(job):
    table = job.load()
    return dict(zip(table["index"][:], table["square"][:]))


def computed(ledger):
    "Rows that were computed, by whoever"
    return sum(int(x.split()[1]) for x in (ledger / "computed").read_text().splitlines())


def run_script(code, *args, **kwargs):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *args], env=env, **kwargs)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def children(pid):
    "Processes whose parent is `pid`, dead ones that nobody waited for included"
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


# ---- the same answer everywhere


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "An undisturbed run of one worker: id → digest"
    job = Job(
        texts(400),
        Digests(),
        output_dir=tmp_path_factory.mktemp("plain") / "out",
        options=JobOptions(**SMALL),
        **QUIET,
    )
    assert job.run().complete
    return answers(job)


def answers(job):
    table = job.load()
    return dict(zip(table["index"][:], table["digest"][:]))


def test_four_workers_give_the_same(tmp_path, plain):
    before = set(children(os.getpid()))
    job = Job(texts(400), Digests(), output_dir=tmp_path / "out", options=JobOptions(num_workers=4, **SMALL), **QUIET)
    assert job.run().complete and answers(job) == plain
    assert len(set(pq.read_table(job.folder / "data")["pid"].to_pylist())) > 1  # several of them did something
    assert set(children(os.getpid())) <= before  # nobody is left, not even a zombie
    assert job.verify().ok


@pytest.mark.slow
def test_fifty_interruptions_by_the_clock(tmp_path, plain):
    (tmp_path / "pause").write_text("0.03")
    stops, seconds = 0, 0.1
    for _ in range(300):
        options = JobOptions(batch_tokens=160, max_batch_size=2, max_runtime_minutes=seconds / 60)
        job = Job(texts(400), Digests(str(tmp_path)), output_dir=tmp_path / "out", options=options, **QUIET)
        summary = job.run()
        stops += summary.ended == "time is up"
        seconds *= 1.2 if not summary.computed else 0.95  # a busy machine needs longer to begin at all
        if not summary.left:
            break
    assert stops >= 50 and answers(job) == plain
    assert computed(tmp_path) == 400  # nothing twice


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_static_shards_merged(tmp_path, plain, workers):
    for i in range(3):
        options = JobOptions(num_shards=3, shard_index=i, num_workers=workers, **SMALL)
        summary = Job(texts(400), Digests(), output_dir=tmp_path / f"out{i}", options=options, **QUIET).run()
        assert summary.complete and 0 < summary.rows < 400
    merge([tmp_path / f"out{i}" for i in range(3)], tmp_path / "whole")
    assert faults(tmp_path / "whole", texts(400)) == dict(missing=0, doubled=0, wrong=0)
    options = JobOptions(num_shards=3, shard_index=0, **SMALL)
    assert answers(Job(texts(400), Digests(), output_dir=tmp_path / "whole", options=options, **QUIET)) == plain


def test_static_shards_in_one_folder_at_once(tmp_path, plain):
    ended = {}

    def run(i):
        options = JobOptions(num_shards=2, shard_index=i, **SMALL)
        job = Job(texts(400), Digests(), output_dir=tmp_path / "out", options=options, **QUIET)
        try:
            ended[i] = job.run().complete
        except Exception as e:
            ended[i] = f"{type(e).__name__}: {e}"

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert ended == {0: True, 1: True}
    assert faults(tmp_path / "out", texts(400)) == dict(missing=0, doubled=0, wrong=0)


# ---- workers that die, hang or wake up


def test_a_killed_worker_is_replaced(tmp_path):
    step = Numbers(kill=[13], once=str(tmp_path / "once"), log=str(tmp_path / "log"))
    options = JobOptions(num_workers=2, batch_tokens=4, part_rows=8)
    job = Job(numbers(100), step, output_dir=tmp_path / "out", options=options, **QUIET)
    began = time.monotonic()
    summary = job.run()
    assert summary.complete and summary.deaths == 1 and time.monotonic() - began < 30
    assert squares(job) == {i: i * i for i in range(100)}
    tried = sum(int(x.split()[1]) for x in Path(step.log).read_text().splitlines())
    assert tried - 100 <= 8 + 2 * 4  # a part's buffer, and the batches on their way into it


@pytest.mark.slow
def test_a_row_that_always_kills_is_recorded(tmp_path):
    options = JobOptions(num_workers=2, batch_tokens=4)
    job = Job(numbers(24), Numbers(kill=[5]), output_dir=tmp_path / "out", options=options, **QUIET)
    summary = job.run()
    assert summary.complete and (summary.failed, summary.deaths) == (1, CONVICTED + FATAL_ROW)
    assert squares(job) == {i: i * i for i in range(24) if i != 5}
    assert job.skipped().to_pylist() == [{"id": 5, "status": "failed", "reason": "killed its worker: signal 9"}]


def test_a_device_that_breaks_costs_a_worker_not_the_rows(tmp_path):
    step = Numbers(break_at=7, once=str(tmp_path / "once"))
    options = JobOptions(num_workers=2, batch_tokens=4)
    summary = (job := Job(numbers(24), step, output_dir=tmp_path / "out", options=options, **QUIET)).run()
    assert (summary.complete, summary.failed, summary.deaths) == (True, 0, 1)
    assert squares(job) == {i: i * i for i in range(24)}


def test_a_stopped_worker_loses_its_shard_and_harms_nobody(tmp_path):
    ledger = tmp_path / "l"
    ledger.mkdir()
    (ledger / "pause").write_text("0.05")
    parent = start(ledger, rows=1500, workers=2, part_rows=64, jumps=False)
    worker = wait_for(lambda: [p for p in ledger.glob("worker-*")])[0]
    pid = int(worker.name.split("-")[2])
    time.sleep(0.3)
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: "has been silent for" in (ledger / "said").read_text())
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.5)
    (ledger / "pause").write_text("0")
    assert parent.wait(60) == 0
    assert faults(ledger / "out", texts(1500)) == dict(missing=0, doubled=0, wrong=0)
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
def test_a_worker_that_stays_silent_is_killed_and_the_run_ends(tmp_path):
    ledger = tmp_path / "l"
    ledger.mkdir()
    (ledger / "pause").write_text("0.02")
    parent = start(ledger, rows=800, workers=2, part_rows=64, patience=0.5, jumps=False)
    workers = wait_for(lambda: (w := list(ledger.glob("worker-*"))) and len(w) == 2 and w)
    for worker in workers:  # all of them: only a killed worker's place can be filled
        os.kill(int(worker.name.split("-")[2]), signal.SIGSTOP)
    assert parent.wait(90) == 0
    assert faults(ledger / "out", texts(800)) == dict(missing=0, doubled=0, wrong=0)


def test_a_parent_that_is_killed_leaves_nobody_and_loses_nothing(tmp_path):
    ledger = tmp_path / "l"
    ledger.mkdir()
    (ledger / "pause").write_text("0.02")
    parent = start(ledger, rows=1200, workers=2, part_rows=64)
    wait_for(lambda: list((ledger / "out" / "data").glob("*.parquet")) if (ledger / "out" / "data").exists() else None)
    parent.kill()
    parent.wait(10)
    pids = [int(p.name.split("-")[2]) for p in ledger.glob("worker-*")]
    wait_for(lambda: not any(os.path.exists(f"/proc/{p}") for p in pids), 20)
    assert computed(ledger) == len(
        pq.read_table(ledger / "out" / "data")
    )  # orphans wrote what they had before they left
    (ledger / "pause").write_text("0")
    assert start(ledger, rows=1200, workers=2, part_rows=64).wait(60) == 0
    assert faults(ledger / "out", texts(1200)) == dict(missing=0, doubled=0, wrong=0)


def test_a_worker_that_cannot_start_is_not_tried_for_ever(tmp_path):
    class Broken(Numbers):
        def setup(self, device):
            os._exit(7)

    job = Job(numbers(8), Broken(), output_dir=tmp_path / "out", options=JobOptions(num_workers=2), **QUIET)
    with pytest.raises(WorldError, match="workers that start; got exit code 7"):
        job.run()


def test_main_module_steps(tmp_path):
    "A script without a guard, and a class that refers to globals of the script"
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import pyarrow as pa
        from llm_analysis.jobs.job import Job, JobOptions
        from llm_analysis.jobs.step import Step
        FACTOR = 3
        def times(x): return FACTOR * x
        class Mine(Step):
            schema = pa.schema([("index", pa.int64()), ("y", pa.int64())])
            def process(self, rows): return [times(r["x"]) for r in rows]
            def postprocess(self, raw, rows):
                return pa.table({"index": [r["index"] for r in rows], "y": raw}, schema=self.schema)
        job = Job([{"x": i} for i in range(40)], Mine(), output_dir=sys.argv[1],
                  options=JobOptions(num_workers=2, batch_tokens=4), devices="cpu")
        print(job.run().complete, sum(job.load()["y"]))
        """)
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    ran = subprocess.run(
        [sys.executable, script, tmp_path / "out"], env=env, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.split() == ["True", str(3 * sum(range(40)))], ran.stderr


# ---- signals and the clock


LEAD = """
import json, sys
from llm_analysis.jobs.testing import lead
s = lead(sys.argv[1], rows=2000, workers=int(sys.argv[2]), jumps=False, part_rows=1000)
print(s)
sys.exit(0 if s.complete else 5)
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_commits_and_says_what_is_left(tmp_path, workers, number):
    (tmp_path / "pause").write_text("0.05")
    process = run_script(
        LEAD,
        str(tmp_path),
        str(workers),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: (tmp_path / "computed").exists())
    time.sleep(0.5)
    asked = time.monotonic()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # Ctrl+C is everybody's
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 5 and time.monotonic() - asked < 5
    assert "rows are left (interrupted); run the same again" in said and "Ctrl+C again stops at once" in errors
    assert (
        len(pq.read_table(tmp_path / "out" / "data")) == computed(tmp_path) > 0
    )  # everything that was computed is on disk
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_twice_stops_at_once_and_tears_nothing(tmp_path, workers):
    (tmp_path / "pause").write_text("0.05")
    process = run_script(LEAD, str(tmp_path), str(workers), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "computed").exists())
    time.sleep(0.3)
    (tmp_path / "pause").write_text("20")  # the batch at work takes long
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert time.monotonic() - asked < 5 and "KeyboardInterrupt" in errors
    for path in (tmp_path / "out" / "data").glob("*"):
        pq.read_table(path)
    pids = [int(p.name.split("-")[2]) for p in tmp_path.glob("worker-*")]
    wait_for(lambda: not any(os.path.exists(f"/proc/{p}") for p in pids if p != process.pid), 10)


def test_deadline_with_workers(tmp_path):
    def job(minutes, device=0.0):
        options = JobOptions(num_workers=2, batch_tokens=4, max_runtime_minutes=minutes)
        return Job(numbers(400), Numbers(device=device), output_dir=tmp_path / "out", options=options, **QUIET)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for seconds in (5, 10, 20, 40):  # a busy machine needs longer to begin at all; everything takes at least 50
        summary = job(seconds / 60, device=1.0).run()
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        assert summary.ended == "time is up" and summary.seconds < seconds + 20
        if summary.left < 400:
            break
    assert 0 < summary.left < 400
    assert job(0.0).run().left == summary.left and job(None).run().complete


def test_in_another_thread(tmp_path):
    done = []
    job = Job(numbers(40), Numbers(), output_dir=tmp_path / "out", options=JobOptions(batch_tokens=4), **QUIET)
    thread = threading.Thread(target=lambda: done.append(job.run().complete))
    thread.start()
    thread.join(30)
    assert done == [True]


# ---- the loop


class Timed(Numbers):
    "Notes when the device and the CPU are at work"

    def process(self, rows):
        self.spans = [*getattr(self, "spans", []), ["device", time.monotonic(), 0.0]]
        raw = super().process(rows)
        self.spans[-1][2] = time.monotonic()
        return raw

    def postprocess(self, raw, rows):
        began = time.monotonic()
        table = super().postprocess(raw, rows)
        self.ends = [*getattr(self, "ends", []), ("cpu", began, time.monotonic())]
        return table


def test_overlap(tmp_path):
    "Device and CPU sleep equally long for each of twenty batches: together they take half of the sum, and one more"
    plan, step = make_plan([1] * 80, batch_tokens=4, shards=1), Timed(device=0.05, cpu=0.05)
    assert work(step, Source(numbers(80)), plan, Log(tmp_path / "out", "x", step.schema), 0, 0, 20).ended
    spans = [*step.spans, *step.ends]
    total, elapsed = sum(b - a for _, a, b in spans), spans[-1][2] - spans[0][1]
    assert len(spans) == 40 and elapsed < 0.75 * total, (elapsed, total)


def test_part_seconds_bounds_the_age_of_work(tmp_path):
    options = JobOptions(batch_tokens=4, num_shards=1, shard_index=0)
    job = Job(
        numbers(80), Numbers(device=0.05), output_dir=tmp_path / "out", options=options, part_seconds=0.25, **QUIET
    )
    job.run()
    sizes = [p.stop - p.start for p in job.settle()[1].parts()]
    assert max(sizes) <= 5 and sum(sizes) == 20


def test_memory_is_halved_aloud_and_recorded(tmp_path, capfd):
    job = Job(numbers(40), Numbers(room=3), output_dir=tmp_path / "out", options=JobOptions(batch_tokens=10), **QUIET)
    summary = job.run()
    assert summary.complete and summary.halved == 4 and squares(job) == {i: i * i for i in range(40)}
    assert "out of memory with a batch of 10 rows" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_failing_rows(tmp_path, workers):
    options = JobOptions(batch_tokens=8, num_workers=workers)
    step = Numbers(fail=[3, 17], log=str(tmp_path / "log"))
    job = Job(numbers(40), step, output_dir=tmp_path / "out", options=options, **QUIET)
    summary = job.run()
    assert (summary.complete, summary.failed, summary.left) == (True, 2, 0) and "no result" in str(summary)
    assert {r["id"]: r["reason"] for r in job.skipped().to_pylist()} == {
        3: "ValueError: cannot do [3]",
        17: "ValueError: cannot do [17]",
    }
    assert squares(job) == {i: i * i for i in range(40) if i not in (3, 17)}
    tried = len(Path(step.log).read_text().splitlines())
    assert job.run().computed == 0 and len(Path(step.log).read_text().splitlines()) == tried  # not tried for ever


@pytest.mark.parametrize("workers", [1, 2])
def test_on_error_raise_keeps_what_is_finished(tmp_path, workers):
    options = JobOptions(batch_tokens=4, num_workers=workers)
    job = Job(numbers(40), Numbers(fail=[30]), output_dir=tmp_path / "out", options=options, on_error="raise", **QUIET)
    with pytest.raises(StepError, match="row 30 failed: ValueError: cannot do"):
        job.run()
    assert len(pq.read_table(tmp_path / "out" / "data")) >= 4
    again = Job(numbers(40), Numbers(), output_dir=tmp_path / "out", options=options, on_error="raise", **QUIET)
    assert again.run().complete and squares(again) == {i: i * i for i in range(40)}


def test_a_step_that_loses_a_row_is_told(tmp_path):
    job = Job(numbers(40), Numbers(lose=[9]), output_dir=tmp_path / "out", options=JobOptions(batch_tokens=4), **QUIET)
    assert job.run().failed == 1
    assert "the step lost 1 of 1" in job.skipped()["reason"][0].as_py()


# ---- kinds of data sets, and refusals


def test_string_ids_and_a_row_over_the_budget(tmp_path):
    class Words(Step):
        schema = pa.schema([("key", pa.string()), ("words", pa.int64()), ("together", pa.int64())])

        def length(self, row):
            return len(row["text"].split())

        def leave_out(self, row):
            return "no text" if row["text"] is None else None

        def process(self, rows):
            return [(len(row["text"].split()), len(rows)) for row in rows]

        def postprocess(self, raw, rows):
            n, m = zip(*raw)
            return pa.table({"key": [row["key"] for row in rows], "words": n, "together": m}, schema=self.schema)

    sentences = ["a b", "w " * 90, "a", "c d e", None, "w " * 60]
    data = datasets.Dataset.from_dict({"text": sentences, "key": list("uvwxyz")})
    job = Job(
        data,
        Words(),
        output_dir=tmp_path / "out",
        id_column="key",
        max_seq_len=70,
        options=JobOptions(batch_tokens=50),
        **QUIET,
    )
    assert job.run().complete and job.load().to_list() == [
        {"key": "u", "words": 2, "together": 3},
        {"key": "w", "words": 1, "together": 3},
        {"key": "x", "words": 3, "together": 3},
        {"key": "z", "words": 60, "together": 1},
    ]
    assert {r["id"]: r["reason"] for r in job.skipped().to_pylist()} == {
        "v": "longer than max_seq_len: 90 tokens",
        "y": "no text",
    }


def test_lengths_from_a_column(tmp_path):
    "The column is used instead of the step's own count, and a row without a length says so"
    rows = [{"x": i, "tokens": [1, 2, 5, None][i % 4]} for i in range(40)]
    options = JobOptions(batch_tokens=10, length_column="tokens")
    job = Job(rows, Numbers(), output_dir=tmp_path / "out", options=options, max_seq_len=4, **QUIET)
    assert job.run().complete and squares(job) == {i: i * i for i in range(40) if i % 4 < 2}
    reasons = {r["id"] % 4: r["reason"] for r in job.skipped().to_pylist()}
    assert reasons == {2: "longer than max_seq_len: 5 tokens", 3: "no length in column 'tokens'"}
    assert sorted(set(job.plan().length.tolist())) == [0, 1, 2]
    with pytest.raises(InputError, match="near: tokens"):
        wrong = JobOptions(length_column="token")
        Job(rows, Numbers(), output_dir=tmp_path / "other", options=wrong, **QUIET).run()


@pytest.mark.parametrize("workers", [1, 2])
def test_empty_and_one(tmp_path, workers):
    options = JobOptions(num_workers=workers)
    for n in (0, 1):
        job = Job(numbers(n), Numbers(), output_dir=tmp_path / f"out{n}", options=options, **QUIET)
        assert job.run().complete and job.run().complete and len(job.load()) == n and job.verify().ok
        files = list((tmp_path / f"out{n}" / "data").iterdir())
        assert len(files) == 1 and pq.read_table(files[0]).schema.names == ["index", "square", "where"]
        assert len(pd.read_parquet(files[0])) == n


def test_refusals_name_what_differs(tmp_path):
    def job(data=None, step=None, **options):
        own = {k: options.pop(k) for k in ("id_column", "max_seq_len", "window") if k in options}
        options = JobOptions(**({"batch_tokens": 8} | options))
        return Job(
            numbers(40) if data is None else data,
            step or Numbers(),
            output_dir=tmp_path / "out",
            options=options,
            **own,
            **QUIET,
        )

    class Other(Numbers):
        pass

    class Newer(Numbers):
        version = 2

    class Wider(Numbers):
        schema = pa.schema([*Numbers.schema, ("more", pa.int64())])

    class Told(Numbers):
        def settings(self):
            return {"power": 3}

    assert job().run().complete
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "data").iterdir()}
    shuffled = [{"x": 39 - i} for i in range(40)]
    cases = [
        (dict(data=numbers(41)), "data.rows: old 40 → new 41"),
        (dict(data=shuffled), "data.columns.x.values"),
        (dict(data=[{"x": i, "y": 0} for i in range(40)]), "data.columns.y"),
        (dict(data=[{"x": i, "index": i + 1} for i in range(40)]), "ids.values"),
        (dict(step=Other()), 'step.name: old "Numbers" → new "Other"'),
        (dict(step=Newer()), "step.version: old 1 → new 2"),
        (dict(step=Wider()), "schema"),
        (dict(step=Told()), "step.settings.power"),
        (dict(batch_tokens=16), "plan.batch_tokens: old 8 → new 16"),
        (dict(max_batch_size=4), "plan.max_batch_size"),
        (dict(max_seq_len=5), "plan.max_seq_len"),
        (dict(window=10), "plan.window"),
        (dict(num_shards=2, shard_index=0), "plan.static"),
        (dict(length_column="x"), "length_column"),
    ]
    for change, difference in cases:
        with pytest.raises(InputError) as e:
            job(**change).run()
        assert difference in str(e.value), (change, str(e.value))
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "data").iterdir()} == files
    assert job(num_workers=3).run().computed == 0  # how many workers there are is nobody's business


# ---- progress


def test_nothing_heavy_is_imported():
    code = "import sys, llm_analysis.jobs.job; print(sorted({'torch', 'transformers', 'pandas', 'datasets'} & set(sys.modules)))"
    process = run_script(code, stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=60)[0].strip() == "[]"


def test_a_log_file_gets_lines(tmp_path, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    ledger = tmp_path / "l"
    ledger.mkdir()
    assert start(ledger, rows=300, workers=2).wait(60) == 0
    said = (ledger / "said").read_bytes()
    assert b"\r" not in said and b"out: 300 of 300 rows (100%)" in said


@pytest.mark.parametrize("workers", [1, 2])
def test_a_terminal_gets_bars(tmp_path, workers):
    (tmp_path / "pause").write_text("0.05")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), COLUMNS="120", TERM="xterm")
    env.pop("TQDM_DISABLE", None)
    process = subprocess.Popen(
        [sys.executable, "-c", LEAD.replace("2000", "300"), str(tmp_path), str(workers)],
        env=env,
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    drawn = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:
            break
        if not data:
            break
        drawn += data
    assert process.wait(60) == 0
    text = drawn.decode()
    assert "\r" in text and "300 of 300 rows" in text and "100%|" in text and "tokens/s" in text
    assert "worker 0: shard" in text and ("worker 1: s" in text) == (workers == 2)
    assert (
        text.replace("\r", "\n").strip().splitlines()[-1].startswith("300 of 300 rows are done")
    )  # and the bar is gone by then


def test_status_from_another_process(tmp_path):
    ledger = tmp_path / "l"
    ledger.mkdir()
    (ledger / "pause").write_text("0.05")
    parent = start(ledger, rows=1500, workers=2, part_rows=64, jumps=True)
    wait_for(lambda: (ledger / "out" / "data").exists() and len(list((ledger / "out" / "data").iterdir())) > 2)
    wait_for(lambda: (runs := status(ledger / "out").runs) and len(runs[0]["workers"]) == 2)  # the second may be late
    (ledger / "pause").write_text("3")  # whoever asks may need long to start: the run is not to end before
    code = "import sys; from llm_analysis.jobs.progress import status; print(status(sys.argv[1]))"
    seen = run_script(code, str(ledger / "out"), stdout=subprocess.PIPE, text=True).communicate(timeout=60)[0]
    assert "of 1,500 rows" in seen and f"at work: process {parent.pid}" in seen and "2 workers" in seen, seen
    assert status(ledger / "out").runs[0]["workers"].keys() == {"worker 0", "worker 1"}
    with pytest.raises(WorldError, match="at work"):
        Job(texts(1500), Digests(), output_dir=ledger / "out", options=JobOptions(force_restart=True), **QUIET).run()
    parent.terminate()
    assert parent.wait(30) == 5
    assert status(ledger / "out").runs == () and 0 < status(ledger / "out").left < 1500
