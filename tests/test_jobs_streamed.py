"""Streamed data sets: read once, kept whole, the same again, and like any other data set in a job."""

import io
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import datasets
import dill
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Features, IterableDataset, List, Value

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs import streamed
from llm_analysis.jobs.disk import tmp_name
from llm_analysis.jobs.identity import contents, read_spec
from llm_analysis.jobs.job import Job, JobOptions
from llm_analysis.jobs.merge import merge
from llm_analysis.jobs.step import Source
from llm_analysis.jobs.streamed import HEAD, ROWS, open_rows, spool
from llm_analysis.jobs.testing import Digests, faults, texts

SMALL = dict(batch_tokens=160, max_batch_size=16, part_rows=40)
QUIET = dict(progress=False, devices="cpu", patience=3.0)


def stream_of(rows, features=None, read=None):
    "A stream of these rows; each that is read is counted in `read`"

    def generate():
        for row in rows() if callable(rows) else rows:
            if read is not None:
                read.append(1)
            yield row

    return IterableDataset.from_generator(generate, features=features)


def kept(stream, path, **own):
    return spool(stream, path / "rows.arrow", say=lambda text: None, **own)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ---- what is kept


def many(n):
    return [
        {
            "text": f"row {i}" if i % 7 else None,
            "label": i % 2,
            "when": np.datetime64("2024-01-01T00:00:00.123456") + i,
            "chat": [{"role": "user", "content": "x" * (i % 5)}] * (i % 3),
            "real": float("nan") if i % 11 == 0 else i / 3,
        }
        for i in range(n)
    ]


TYPES = Features(
    text=Value("string"),
    label=ClassLabel(names=["no", "yes"]),
    when=Value("timestamp[us]"),
    chat=List({"role": Value("string"), "content": Value("string")}),
    real=Value("float32"),
)


@pytest.mark.parametrize("features", [None, TYPES])
@pytest.mark.parametrize("n", [1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS])
def test_the_file_holds_the_rows(tmp_path, n, features):
    whole, stream = datasets.Dataset.from_list(many(n), features=features), stream_of(lambda: many(n), features)
    found = kept(stream, tmp_path)
    assert found.features == whole.features and contents(found) == contents(whole)
    assert repr(found[-1]) == repr(whole[-1]) and files(tmp_path) == ["rows.arrow"]
    assert [len(b) for b in found.data.to_batches()] == [ROWS] * (n // ROWS) + [n % ROWS] * (n % ROWS > 0)
    assert repr(kept(stream, tmp_path)[:3]) == repr(whole[:3])


def test_from_files_mapped_filtered_and_in_another_format(tmp_path):
    rows = [{"text": f"row {i}", "n": i} for i in range(3000)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    own = dict(data_files=str(tmp_path / "x.parquet"), split="train", streaming=True, cache_dir=tmp_path / "cache")
    stream = datasets.load_dataset("parquet", **own)
    assert kept(stream, tmp_path / "a").to_list() == rows
    some = stream.map(lambda row: {"m": -row["n"]}).filter(lambda row: row["n"] % 2).with_format("torch")
    assert some.features is None
    assert kept(some, tmp_path / "b").to_list() == [row | {"m": -row["n"]} for row in rows if row["n"] % 2]
    assert kept(stream.with_format("arrow"), tmp_path / "c").to_list() == rows


def test_pictures_stay_as_they_are(tmp_path):
    from PIL import Image

    def jpeg(i):
        out = io.BytesIO()
        Image.effect_noise((30, 20 + i), 99).save(out, "jpeg", quality=10)  # decoded and encoded again, it is another
        return out.getvalue()

    rows = [{"picture": {"bytes": jpeg(i), "path": None}} for i in range(5)]
    stream = stream_of(rows, Features(picture=datasets.Image()))
    for _ in range(2):
        found = kept(stream, tmp_path)
        assert found.with_format("arrow")[:]["picture"].to_pylist() == [row["picture"] for row in rows]
        assert found[4]["picture"].size == (30, 24)


@pytest.mark.parametrize("features", [None, TYPES])
def test_nothing_at_all(tmp_path, features):
    found = kept(stream_of([], features), tmp_path)
    assert len(found) == 0 and found.features == (features or {}) and len(kept(stream_of([], features), tmp_path)) == 0
    with pytest.raises(InputError, match="row 0 is new"):
        kept(stream_of(many(1), features), tmp_path)


def test_a_batch_is_bounded_in_bytes(tmp_path):
    rows = lambda: ({"text": "x" * 100_000, "tokens": list(range(1000))} for _ in range(300))
    found = kept(stream_of(rows), tmp_path)
    sizes = [b.nbytes for b in found.data.to_batches()]
    assert len(found) == 300 and max(sizes) < 1.1 * streamed.NBYTES and len(sizes) == 4


LATER = [
    ({"x": None}, {"x": "a"}, pa.string()),
    ({"x": 1}, {"x": 1.5}, pa.float64()),
    ({"x": []}, {"x": ["a"]}, pa.list_(pa.string())),
    ({"x": [None]}, {"x": [[1]]}, pa.list_(pa.list_(pa.int64()))),
    ({"x": {"a": 1}}, {"x": {"b": "z"}}, pa.struct({"a": pa.int64(), "b": pa.string()})),
    ({"x": [{"a": None}]}, {"x": [{"a": ["q"]}]}, pa.list_(pa.struct({"a": pa.list_(pa.string())}))),
    ({"x": True}, {"y": 1}, pa.bool_()),
]


@pytest.mark.parametrize("first, then, kind", LATER)
@pytest.mark.parametrize("n", [3, ROWS, 2 * ROWS + 5])
def test_the_schema_widens(tmp_path, first, then, kind, n):
    "Whether the row that says more comes in the first batch or in a later one"
    rows = [first] * n + [then] + [first] * 3
    found = kept(stream_of(rows), tmp_path)
    assert found.data.schema.field("x").type == kind and files(tmp_path) == ["rows.arrow"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    plain = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    assert found.with_format("arrow")[:].to_pylist() == plain.to_pylist()
    kept(stream_of(rows), tmp_path)  # the first rows say less than the file, and are the same


@pytest.mark.parametrize("n", [0, 1, 17, ROWS - 1, ROWS, ROWS + 1, 5000])
def test_a_row_that_does_not_fit_is_named(tmp_path, n):
    rows = [{"x": None, "y": i} for i in range(n)]
    odd = rows + [{"x": 1, "y": "text"}] + [{"x": 2, "y": 3}] * 10
    named = n or 1  # the second of two types is the odd one
    with pytest.raises(InputError, match=f"row {named} of the stream to have the types of the others.*stream.cast"):
        kept(stream_of(odd), tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("n", [0, 1, ROWS - 1, ROWS, ROWS + 1, 5000])
def test_a_row_that_cannot_be_read_is_named(tmp_path, n):
    def rows():
        yield from ({"x": i} for i in range(n))
        raise ConnectionResetError("by peer")

    mapped = stream_of([{"x": i} for i in range(n + 5)]).map(lambda row: {"y": 1 / (row["x"] - n)})
    for stream in (stream_of(rows), mapped):
        with pytest.raises(WorldError, match=f"row {n} of the stream; got (ConnectionReset|ZeroDivision)Error"):
            kept(stream, tmp_path)
        assert files(tmp_path) == []


@pytest.mark.parametrize("odd", [7, None, [1], {}])
def test_rows_that_are_none(tmp_path, odd):
    with pytest.raises(InputError, match="as row 2"):
        kept(stream_of([{"x": 1}, {"x": 2}, odd]), tmp_path)


# ---- the same stream again


ROWS_OF = lambda n: [{"text": f"row {i}", "n": float("nan") if i % 2 else i} for i in range(n)]


@pytest.mark.parametrize("features", [None, Features(text=Value("string"), n=Value("float64"))])
def test_another_stream_is_refused_by_its_first_row(tmp_path, features):
    rows, path = ROWS_OF(1500), tmp_path
    kept(stream_of(rows, features), path)
    before = (path / "rows.arrow").stat().st_mtime_ns
    for i in (0, 1, 500, 999):
        other = [*rows[:i], rows[i] | {"text": f"row {i}, changed"}, *rows[i + 1 :]]
        with pytest.raises(InputError, match=f"row {i} has another text: old 'row {i}' → new 'row {i}, changed'"):
            kept(stream_of(other, features), path)
    with pytest.raises(InputError, match="row 900 is not there any more"):
        kept(stream_of(rows[:900], features), path)
    with pytest.raises(InputError, match="row 30 has another text: old 'row 30' → new 'row 31'"):
        kept(stream_of(rows[:30] + rows[31:], features), path)
    with pytest.raises(InputError, match="needs a seed.*--force-restart"):
        kept(stream_of(rows, features).shuffle(seed=4), path)
    assert len(kept(stream_of(rows[:HEAD], features), path)) == 1500  # further back nothing is compared
    assert (path / "rows.arrow").stat().st_mtime_ns == before and files(path) == ["rows.arrow"]


def test_a_short_stream_that_grew(tmp_path):
    kept(stream_of(ROWS_OF(30)), tmp_path)
    with pytest.raises(InputError, match="row 30 is new"):
        kept(stream_of(ROWS_OF(31)), tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(n="1"), "another n: old 2.0 → new '1'"),
        (dict(extra=1), "another extra: old None → new 1"),
        (dict(text=None), "another text: old 'row 2' → new None"),
        (dict(text="row 2" + " and more" * 50), "another text: old 'row 2' → new 'row 2 and more"),
    ],
)
def test_what_a_row_may_have_changed(tmp_path, change, said):
    rows = ROWS_OF(40)
    kept(stream_of(rows), tmp_path)
    with pytest.raises(InputError, match=re.escape(f"row 2 has {said}")) as e:
        kept(stream_of([*rows[:2], rows[2] | change, *rows[3:]]), tmp_path)
    assert len(str(e.value)) < 500


def test_only_the_first_rows_are_read_again(tmp_path):
    read = []
    stream = stream_of(ROWS_OF(5000), read=read)
    kept(stream, tmp_path)
    assert len(read) == 5000
    kept(stream, tmp_path)
    assert 5000 + HEAD <= len(read) <= 5000 + HEAD + 1


def test_a_damaged_file_is_told(tmp_path):
    rows = ROWS_OF(9000)
    kept(stream_of(rows), tmp_path)
    path = tmp_path / "rows.arrow"
    whole, end = path.read_bytes(), streamed._END
    at = whole.rindex(b"\xff\xff\xff\xff", 0, len(whole) - 8)  # where the last batch begins
    for broken in (b"", b"x", whole[:-1], whole[: len(whole) // 2], whole[:at], whole[100:], b"x" * 9000 + end):
        path.write_bytes(broken)
        with pytest.raises(WorldError, match="a damaged file; remove this file and run again"):
            kept(stream_of(rows), tmp_path)
    path.unlink()
    assert len(kept(stream_of(rows), tmp_path)) == 9000


# ---- interruptions, disks, several at once


def test_ctrl_c_leaves_nothing(tmp_path):
    def rows():
        yield from ROWS_OF(5000)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        kept(stream_of(rows), tmp_path)
    assert files(tmp_path) == [] and signal.getsignal(signal.SIGTERM) == before


SLOW = """
    import signal, sys, time
    from pathlib import Path
    import datasets, pyarrow as pa
    from llm_analysis.jobs.job import Job
    from llm_analysis.jobs.testing import Digests

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def rows():
        for i in range(20_000):
            if i > 9000:
                Path(sys.argv[1], "here").touch()
                time.sleep(0.01)
            yield {"text": f"row {i}"}

    Job(datasets.IterableDataset.from_generator(rows), Digests(), output_dir=sys.argv[1] + "/out").run()
    """


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_leave_no_half_file(tmp_path, number):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "here").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    code = {signal.SIGINT: -2, signal.SIGTERM: 128 + 15, signal.SIGKILL: -9}[number]
    assert process.returncode == code and ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    left = files(tmp_path / "out")
    assert len(left) == (number == signal.SIGKILL) and all(name.startswith("_job/tmp/") for name in left)
    rows = [{"text": f"other {i}"} for i in range(40)]
    assert Job(stream_of(rows), Digests(), output_dir=tmp_path / "out", **QUIET).run().complete
    assert faults(tmp_path / "out", rows) == dict(missing=0, doubled=0, wrong=0)
    assert not list((tmp_path / "out" / "_job" / "tmp").iterdir())  # what the killed one left is gone


def test_what_a_killed_reader_left_makes_room_first(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    host, boot, _, rest = tmp_name().split("~")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / f"{host}~{boot}~{child.pid}~{rest}").write_text("x")
    kept(stream_of(lambda: [{"left": len(files(tmp_path))}]), tmp_path)
    assert open_rows(tmp_path / "rows.arrow")[0] == {"left": 1}  # the file that is being written
    assert files(tmp_path) == ["rows.arrow"]


LIMIT = """
    import resource, sys
    from pathlib import Path
    import datasets
    from llm_analysis.core import WorldError
    from llm_analysis.jobs.streamed import spool

    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": "x" * 1000} for _ in range(9000)))
    try:
        spool(stream, Path(sys.argv[1], "rows.arrow"), patience=0.2)
    except WorldError as e:
        print(e)
    """


def test_a_disk_that_takes_no_more(tmp_path):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-c", textwrap.dedent(LIMIT), str(tmp_path)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert "got File too large, for 0 s; make room or mend the disk and run again" in ran.stdout, ran.stderr
    assert "Trying again" in ran.stderr and files(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_two_read_into_one_folder_at_once(tmp_path, monkeypatch, links):
    if not links:

        def link(*_):
            raise OSError(1, "no links here")

        monkeypatch.setattr(os, "link", link)
    both, found = threading.Barrier(2), {}

    def rows():
        yield from ROWS_OF(5000)
        both.wait(30)  # both have written everything, nobody has the name

    threads = [threading.Thread(target=lambda i=i: found.update({i: kept(stream_of(rows), tmp_path)})) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert len(found[0]) == len(found[1]) == 5000 and files(tmp_path) == ["rows.arrow"]
    assert repr(found[0][4999]) == repr(found[1][4999])


def test_of_two_different_streams_the_first_wins(tmp_path, monkeypatch):
    real = streamed._claim

    def claim(path, name):
        monkeypatch.undo()
        kept(stream_of(ROWS_OF(25)), tmp_path)  # another process is faster
        return real(path, name)

    monkeypatch.setattr(streamed, "_claim", claim)
    with pytest.raises(InputError, match="row 20 is not there any more"):
        kept(stream_of(ROWS_OF(20)), tmp_path)
    assert files(tmp_path) == ["rows.arrow"] and len(open_rows(tmp_path / "rows.arrow")) == 25


def test_how_far_it_is(monkeypatch):
    class Screen(io.StringIO):
        isatty = lambda self: True

    clock, said = itertools.count(step=4.0), []
    monkeypatch.setattr(streamed.time, "monotonic", lambda: float(next(clock)))
    reading = streamed._Reading(said.append, True)
    for rows in (1000, 2000, 3000, 4000, 5000, 6000):
        reading(rows)
    reading.close()
    assert said == [
        "reading the stream: 3,000 rows so far, 250 rows/s",
        "reading the stream: 6,000 rows so far, 250 rows/s",
    ]
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    reading = streamed._Reading(said.append, True)
    reading(1000), reading(2_000_000), reading.close()
    *drawn, last, after = screen.getvalue().split("\r")[1:]
    assert [text.rstrip() for text in drawn] == [
        "reading the stream: 1,000 rows so far, 250 rows/s",
        "reading the stream: 2,000,000 rows so far, 250,000 rows/s",
    ]
    assert last.strip() == after == "" and len(said) == 2
    quiet = streamed._Reading(said.append, False)
    quiet(10), quiet.close()
    assert len(said) == 2 and screen.getvalue().endswith("\r")


MEMORY = """
    import re, sys
    from pathlib import Path
    import datasets
    from llm_analysis.jobs.job import Job, JobOptions
    from llm_analysis.jobs.testing import Digests

    def held():
        "Memory that is this process's own, without mapped files"
        return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

    rows, most = int(sys.argv[2]), [0.0]

    def generate():
        for i in range(rows):
            if i % 500 == 0:
                most[0] = max(most[0], held())
            yield {"text": f"row {i} " + "x" * 9990}

    class Watched(Digests):
        def process(self, batch):
            most[0] = max(most[0], held())
            return super().process(batch)

    def job(n, name):
        stream = datasets.IterableDataset.from_generator(generate).take(n)
        options = JobOptions(batch_tokens=1024, part_mb=1)
        return Job(stream, Watched(), output_dir=Path(sys.argv[1], name), options=options, devices="cpu")

    job(2000, "first").run()  # libraries are loaded, pools are filled
    before = held()
    summary = job(rows, "out").run()
    size = (Path(sys.argv[1]) / "out" / "_job" / "rows.arrow").stat().st_size / 1e6
    print(summary.complete, round(size), round(max(most[0], held()) - before))
    """


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its memory")
def test_memory_does_not_hold_the_stream(tmp_path):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), "20000"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    complete, size, grown = ran.stdout.split()
    assert complete == "True" and int(size) > 195 and int(grown) < 130, (ran.stdout, ran.stderr)


# ---- jobs


def answers(job):
    table = job.load()
    return dict(zip(table["index"][:], table["digest"][:]))


def job_of(stream, folder, window=None, id_column="index", **options):
    own = dict(options=JobOptions(**SMALL | options), window=window, id_column=id_column)
    return Job(stream, Digests(), output_dir=folder, **own, **QUIET)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    job = job_of(texts(400), tmp_path_factory.mktemp("plain") / "out")
    assert job.run().complete
    return answers(job)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_over_a_stream(tmp_path, plain, workers):
    read = []
    job = job_of(stream_of(texts(400), read=read), tmp_path / "out", num_workers=workers)
    assert read == [] and not (tmp_path / "out").exists()  # to look at a job costs nothing
    assert job.run().complete and answers(job) == plain and job.verify().ok and len(read) == 400
    assert job.run().computed == 0 and len(read) == 800  # it has fewer than a thousand rows
    again = job_of(stream_of(texts(400), read=read), tmp_path / "out")
    assert answers(again) == plain and again.verify().ok and len(read) == 800  # looking reads nothing
    assert read_spec(tmp_path / "out")["plan"]["window"] == 65_536
    assert len(dill.dumps(job.source, recurse=True)) < 20_000


def test_a_run_that_is_stopped_goes_on(tmp_path, plain):
    class Halting(Digests):
        "Ends the run in the middle"

        def process(self, rows):
            if any(row["text"].split()[0] == "row123" for row in rows):
                raise KeyboardInterrupt
            return super().process(rows)

    Halting.__name__ = "Digests"  # the same step to whoever compares
    read, own = [], dict(output_dir=tmp_path / "out", options=JobOptions(**SMALL), **QUIET)
    with pytest.raises(KeyboardInterrupt):
        Job(stream_of(texts(400)), Halting(), **own).run()
    job = Job(stream_of(texts(400), read=read), Digests(), **own)
    assert 0 < job.run().computed < 400 and answers(job) == plain


@pytest.mark.parametrize("workers", [1, 2])
def test_no_rows(tmp_path, workers):
    for features in (None, Features(text=Value("string"))):
        job = job_of(stream_of([], features), tmp_path / str(features is None), num_workers=workers)
        assert job.run().complete and job.run().complete and len(job.load()) == 0 and job.verify().ok


def test_windows_are_recorded(tmp_path):
    rows = texts(300)
    for window, expected in ((None, 65_536), (7, 7)):
        job = job_of(stream_of(rows), tmp_path / str(window), window)
        job.run()
        assert read_spec(job.folder)["plan"]["window"] == job.plan().settings["window"] == expected
        with pytest.raises(InputError, match=f"plan.window: old {expected} → new 9"):
            job_of(stream_of(rows), job.folder, 9).run()
    with pytest.raises(InputError, match="window of at least 1"):
        job_of(stream_of(rows), tmp_path / "zero", 0).run()
    assert job_of(rows, tmp_path / "7", 7).run().computed == 0  # the same rows, given otherwise: the same run


def test_ids(tmp_path, plain):
    rows = [{"index": 1000 - i, "text": row["text"]} for i, row in enumerate(texts(400))]
    job = job_of(stream_of(rows), tmp_path / "named")
    assert job.run().complete and answers(job) == {1000 - i: d for i, d in plain.items()}
    assert list(answers(job)) == [1000 - i for i in range(400)]  # in the order of the stream
    twice = [*rows[:300], rows[5], *rows[300:]]
    with pytest.raises(InputError, match="995 in row 5 and in row 300"):
        job_of(stream_of(twice), tmp_path / "twice").run()
    assert files(tmp_path / "twice") == []  # so that a mended stream is read anew
    assert job_of(stream_of(rows), tmp_path / "twice").run().complete
    with pytest.raises(InputError, match="near: text"):
        Job(stream_of(texts(3)), Named(), output_dir=tmp_path / "near", id_column="txt", **QUIET).run()
    with pytest.raises(InputError, match="ids of type string; got int64"):
        Job(stream_of([{"txt": 3}]), Named(), output_dir=tmp_path / "near", id_column="txt", **QUIET).run()
    assert files(tmp_path / "near") == []


class Named(Digests):
    schema = pa.schema([("txt", pa.string()), ("digest", pa.string()), ("pid", pa.int64())])


def test_a_folder_that_is_not_ours_is_refused_before_anything_is_read(tmp_path):
    read, rows = [], texts(50)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(WorldError, match="thesis.tex"):
        job_of(stream_of(rows, read=read), tmp_path / "mine").run()
    job_of(rows, tmp_path / "out").run()
    for change, said in (
        (dict(), "plan.window: old null → new 65536"),
        (dict(batch_tokens=99), "plan.batch_tokens: old 160 → new 99"),
        (dict(length_column="text"), "step.settings.length_column"),
    ):
        with pytest.raises(InputError, match=said):
            job_of(stream_of(rows, read=read), tmp_path / "out", **change).run()

    class Odd(Digests):
        def settings(self):
            return {"it": print}

    with pytest.raises(InputError, match="plain JSON in settings.it"):
        Job(stream_of(rows, read=read), Odd(), output_dir=tmp_path / "odd", **QUIET).run()
    assert read == [] and "_job/rows.arrow" not in files(tmp_path / "out") and not (tmp_path / "odd").exists()


def test_another_stream_in_the_same_folder(tmp_path):
    rows = texts(50)
    assert job_of(stream_of(rows), tmp_path / "out").run().complete
    other = [*rows[:9], {"text": "new"}, *rows[10:]]
    with pytest.raises(InputError, match="row 9 has another text: old .* → new 'new'"):
        job_of(stream_of(other), tmp_path / "out").run()
    again = job_of(stream_of(other), tmp_path / "out", force_restart=True)
    for n in (1, 2):
        assert again.run().computed == 50 and again.source.rows([9])[0]["text"] == "new"
        assert (tmp_path / f"out.old-{n}" / "_job" / "rows.arrow").exists()
    assert faults(tmp_path / "out", other) == dict(missing=0, doubled=0, wrong=0)


def test_a_lost_or_damaged_file_is_read_anew(tmp_path):
    rows, read = texts(1500), []
    job = job_of(stream_of(rows, read=read), tmp_path / "out", max_runtime_minutes=0)
    job.run()
    path = tmp_path / "out" / "_job" / "rows.arrow"
    other = [*rows[:1200], {"text": "new"}, *rows[1201:]]
    path.unlink()
    with pytest.raises(InputError, match="data.columns.text.values"):
        job_of(stream_of(other), tmp_path / "out").run()
    assert not path.exists()
    spool(stream_of(other), path, say=lambda text: None)  # a file that passes for it
    with pytest.raises(WorldError, match="rows of this run in _job/rows.arrow; got a damaged or another file; remove"):
        job.run()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WorldError, match="a damaged file; remove"):
        job.run()
    path.unlink()
    assert job_of(stream_of(rows), tmp_path / "out").run().complete
    assert faults(tmp_path / "out", rows) == dict(missing=0, doubled=0, wrong=0)


def test_a_shuffled_stream_needs_a_seed(tmp_path):
    rows = stream_of(texts(300))
    assert job_of(rows.shuffle(seed=3, buffer_size=50), tmp_path / "out").run().complete
    assert job_of(rows.shuffle(seed=3, buffer_size=50), tmp_path / "out").run().computed == 0
    with pytest.raises(InputError, match="needs a seed"):
        job_of(rows.shuffle(buffer_size=50), tmp_path / "out").run()


def test_static_shards_in_folders_of_their_own(tmp_path, plain):
    for i in range(2):
        assert job_of(stream_of(texts(400)), tmp_path / str(i), num_shards=2, shard_index=i).run().complete
        assert (tmp_path / str(i) / "_job" / "rows.arrow").exists()
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    read = []
    whole = job_of(stream_of(texts(400), read=read), tmp_path / "whole", num_shards=2, shard_index=0)
    assert answers(whole) == plain and len(read) == 400  # this folder has no copy of the stream yet
    assert whole.run().computed == 0


def test_static_shards_in_one_folder_at_once(tmp_path, plain):
    ended, both = {}, threading.Barrier(2)

    def rows():
        yield from texts(400)
        both.wait(30) if len(ended) < 2 and not (tmp_path / "out" / "_job" / "rows.arrow").exists() else None

    def run(i):
        try:
            job = job_of(stream_of(rows), tmp_path / "out", num_shards=2, shard_index=i)
            ended[i] = job.run().complete
        except Exception as e:
            ended[i] = f"{type(e).__name__}: {e}"

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert ended == {0: True, 1: True}
    assert answers(job_of(stream_of(texts(400)), tmp_path / "out", num_shards=2, shard_index=0)) == plain
    assert not list((tmp_path / "out" / "_job" / "tmp").iterdir())


def test_what_is_no_stream(tmp_path):
    stream = stream_of(texts(3))
    with pytest.raises(InputError, match="one split"):
        Job(datasets.IterableDatasetDict(train=stream), Digests(), output_dir=tmp_path / "out")
    for refuses in (Source, contents):
        with pytest.raises(InputError, match="IterableDataset.*a streamed one can be given to a Job"):
            refuses(stream)
