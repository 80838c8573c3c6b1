"""`logits.run.extract`, killed, stopped, spread and misled by the Hub: every row once, as if nothing had happened."""

import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from logits_victim import SPEED, Victims
from loopback_hub import Faults, environment, point, serve
from test_jobs_upload import REPO, TOKEN, judge, trees

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs import merge as merging
from llm_analysis.jobs.command import verify
from llm_analysis.jobs.folder import open_run
from llm_analysis.jobs.job import JobOptions
from llm_analysis.jobs.upload import upload
from llm_analysis.jobs.verify import skipped_table
from llm_analysis.logits.extract import Selection
from llm_analysis.logits.run import extract
from llm_analysis.logits.store import LogitStore
from llm_analysis.logits.texts import Reading
from llm_analysis.tiny.chats import chats

torch.set_num_threads(1)
PART = 8  # rows of a part
CUT = dict(batch_tokens=256, max_batch_size=2, part_rows=PART)
PLAIN = dict(model="tiny", device="cpu", route="padded", seed=3)


@pytest.fixture(autouse=True)
def tmp_path():
    "In memory where that is possible: signals and the network are tested here, not the disk"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as home:
        yield Path(home)


def conversations(path: Path, n: int) -> list[int]:
    "A file of chats, every ninth of them without an answer; the rows that have one"
    told = chats("validation")["messages"]
    rows = [[dict(role="user", content=f"Hello {i}")] if i % 9 == 4 else told[i % len(told)] for i in range(n)]
    path.write_text("".join(json.dumps({"messages": m, "name": f"row {i}"}) + "\n" for i, m in enumerate(rows)))
    return [i for i in range(n) if i % 9 != 4]


def table_of(folder: Path) -> pa.Table:
    "What a plain reader of the parts sees, in the order of the rows; every part has the same schema and metadata"
    tables = [pq.read_table(p) for p in sorted((folder / "data").glob("*.parquet"))]
    assert len({t.schema.metadata[b"llm_analysis"] for t in tables}) == 1
    return pa.concat_tables([t.replace_schema_metadata() for t in tables]).sort_by("index")


def described(folder: Path) -> dict:
    return json.loads(pq.read_schema(next((folder / "data").glob("*.parquet"))).metadata[b"llm_analysis"])


@dataclass(frozen=True)
class Calm:
    "An undisturbed run"

    data: Path
    kept: list[int]  # rows that have targets
    out: Path


def undisturbed(home: Path, n: int) -> Calm:
    data, out = home / "chats.jsonl", home / "calm"
    kept = conversations(data, n)
    done = extract(str(data), output_dir=out, jobs=JobOptions(**CUT), **PLAIN)
    assert (done.complete, done.skipped, done.failed) == (True, n - len(kept), 0) and done.parts > n / 12
    return Calm(data, kept, out)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("calm"), 96)


# ---- killed ---------------------------------------------------------------------------------------------------------


def storm(victims: Victims, runs: list[dict], kills: int, seed: int = 0) -> int:
    "Run side by side; kill one at random after each few batches, now and then before its first, and begin it again"
    draw, ledger, hits = random.Random(seed), Path(runs[0]["ledger"]), 0
    batches = lambda: ledger.read_bytes().count(b"\n") if ledger.exists() else 0
    begin = lambda i: victims.start(runs[i])
    pids = {i: begin(i) for i in range(len(runs))}
    wait = lambda: (
        batches() + draw.randint(1, 6),
        time.monotonic() + (draw.uniform(0, 1) if draw.random() < 0.2 else 60),
    )
    until, at = wait()
    while pids:
        time.sleep(0.005)
        for i, pid in list(pids.items()):
            if (code := victims.poll(pid)) is not None:
                assert code == 0, f"ended with {code}"
                del pids[i]
        if pids and hits < kills and (batches() >= until or time.monotonic() > at):
            time.sleep(draw.uniform(0, 0.05))
            i = draw.choice(list(pids))
            if victims.poll(pids[i]) is not None:
                del pids[i]
                continue
            os.kill(pids[i], signal.SIGKILL)
            assert victims.wait(pids[i]) in (-signal.SIGKILL, 0)
            pids[i], hits, (until, at) = begin(i), hits + 1, wait()
    return hits


def rework(ledger: Path, kept: list[int]) -> int:
    "Rows that were computed more often than once"
    seen = Counter(int(i) for line in ledger.read_text().splitlines() for i in line.split()[1:])
    assert sorted(seen) == kept
    return sum(seen.values()) - len(seen)


def asked(data: Path, out: Path, ledger: Path, pause: float = 0.02, **jobs) -> dict:
    return PLAIN | dict(dataset=str(data), output_dir=str(out), ledger=str(ledger), pause=pause, jobs=CUT | jobs)


def same(out: Path, calm: Calm) -> None:
    "Every row once, each as if nothing had happened, and no part is torn or twice there"
    mine = table_of(out)
    assert mine["index"].to_pylist() == calm.kept
    assert mine == table_of(calm.out) and described(out) == described(calm.out)
    report = verify(str(out))
    assert not report.damaged and not report.twice and not report.missing
    left_out = skipped_table(open_run(out)[1])
    assert sorted(left_out["id"].to_pylist() + calm.kept) == list(range(len(left_out) + len(calm.kept)))


RATES = {
    "commit": {"lost": 0.15, "late-500": 0.1, "late-504": 0.05, "409": 0.1, "412": 0.1, "429": 0.1, "503": 0.05},
    "*": {"429": 0.04, "ratelimit": 0.02, "503": 0.04, "500": 0.02, "lost": 0.05},
}


@contextmanager
def moody(home: Path, seed: int = 0):
    "A Hub of which half of the commits fail, or land and say that they failed; and who runs against it"
    zero = time.monotonic()
    clock = lambda: (time.monotonic() - zero) * SPEED
    with serve(token=TOKEN, faults=Faults(RATES, seed=seed), clock=clock) as hub:
        victims = Victims(home / "said", environment(hub.address, home / "cache", HF_TOKEN=TOKEN), zero)
        try:
            yield hub, victims
        finally:
            victims.close()
        assert not hub.leaks


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    "One such Hub, and one who forks, for the tests of every day"
    with moody(tmp_path_factory.mktemp("side")) as pair:
        yield pair


HOW = ("two shares", "two machines", "the same twice")


def killed(home: Path, calm: Calm, side, kills: int, seed: int = 0, how: str = HOW[0]) -> dict:
    """Two processes, killed, and begun again; the Hub is moody. They share the rows in one folder, or in two as on two
    machines, or both do all in one folder

    What happened; `AssertionError` where a row is lost, doubled or other than it should be, here or there."""
    out, ledger, began = home / "out", home / "ledger", time.monotonic()
    share = lambda i: dict() if how == HOW[2] else dict(num_shards=2, shard_index=i)
    outs = [home / f"machine-{i}" for i in range(2)] if how == HOW[1] else [out] * 2
    (hub, victims), push = side, dict(push_to_hub=REPO, upload_every=16)
    runs = [asked(calm.data, folder, ledger, **push, **share(i)) for i, folder in enumerate(outs)]
    hits = storm(victims, runs, kills, seed)
    for run in runs:  # what one could not send while the other did
        assert victims.wait(victims.start(run), 300) == 0, victims.said.read_text()[-2000:]
    if how == HOW[1]:
        merging.merge(outs, out)
    given = Counter(f"{kind} {fault}" for (kind, fault), k in hub.given.items() for _ in range(k))
    history = trees(hub.repo(REPO))
    conflicts = sum(a.kind == "commit" and a.status == 412 and a.fault is None for a in hub.log)
    assert hits == kills
    same(out, calm)
    assert judge(history, calm.kept) == []
    here = {f"data/{p.name}": p.read_bytes() for folder in {*outs} for p in (folder / "data").iterdir()}
    assert {p: b for p, b in history[-1].items() if p.startswith("data/")} == here
    again = rework(ledger, calm.kept)
    assert how == HOW[2] or again <= kills * PART, f"{again} rows computed again for {kills} kills"
    commits = {k.removeprefix("commit "): n for k, n in given.items() if k.startswith("commit ")}
    found = dict(how=how, kills=kills, rows=len(calm.kept), again=again, parts=len(here), commits=len(history) - 1)
    found |= dict(commit_faults=commits, faults=sum(given.values()), real_conflicts=conflicts)
    return found | dict(seconds=round(time.monotonic() - began))


def test_killed_ten_times(calm, side, tmp_path):
    found = killed(tmp_path, calm, side, 10)
    print(found)
    assert found["faults"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", HOW)
def test_killed_two_hundred_times(tmp_path, how):
    "Seventy times each"
    with moody(tmp_path, HOW.index(how)) as side:
        found = killed(tmp_path, undisturbed(tmp_path, 800), side, 70, seed=1, how=how)
    print(found)
    assert len(found["commit_faults"]) >= 4


def test_the_judges_can_convict(calm, tmp_path):
    "A row that is missing, doubled or other than it was"
    same(calm.out, calm)
    for fault in ("missing", "doubled", "other"):
        out = tmp_path / fault
        shutil.copytree(calm.out, out)
        part = sorted((out / "data").iterdir())[1]
        table = pq.read_table(part)
        if fault == "missing":
            part.unlink()
        elif fault == "doubled":
            pq.write_table(table, part.with_name("part-90000-00000000.parquet"))
        else:
            tokens = pa.array([np.array(x) + 1 for x in table["input_ids"].to_pylist()], table["input_ids"].type)
            place = table.schema.get_field_index("input_ids")
            pq.write_table(table.set_column(place, table.schema.field(place), tokens), part)
        with pytest.raises(AssertionError):
            same(out, calm)
    (tmp_path / "ledger").write_text("".join(f"7 {i}\n" for i in [*calm.kept, *calm.kept[:9]]))
    assert rework(tmp_path / "ledger", calm.kept) == 9


# ---- stopped, spread, changed ---------------------------------------------------------------------------------------


def test_ctrl_c(calm, side, tmp_path):
    "The first Ctrl+C finishes the batch, says what is left and how to go on; nothing that was computed is lost"
    out, ledger, (_, victims) = tmp_path / "out", tmp_path / "ledger", side
    before = len(victims.said.read_text()) if victims.said.exists() else 0
    run = asked(calm.data, out, ledger, pause=0.1)
    pid = victims.start(run)
    while not list((out / "data").glob("*.parquet")):
        assert victims.poll(pid) is None, victims.said.read_text()[before:]
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)
    assert victims.wait(pid) == 5
    said = victims.said.read_text()[before:]
    assert "rows are left (interrupted); run the same again to go on" in said and "Traceback" not in said
    found = table_of(out)["index"].to_pylist()
    assert 0 < len(found) < len(calm.kept) and rework(ledger, found) == 0
    assert victims.wait(victims.start(run | dict(pause=0))) == 0
    assert rework(ledger, calm.kept) == 0
    same(out, calm)


def test_two_workers_write_what_one_does(calm, tmp_path):
    "The step goes to other processes, template and all"
    jobs = JobOptions(**CUT, num_workers=2)
    assert extract(str(calm.data), output_dir=tmp_path / "out", jobs=jobs, **PLAIN).complete
    same(tmp_path / "out", calm)


def test_a_deadline_and_other_settings(calm, tmp_path):
    "What is begun under a deadline goes on; with another seed, template or format it does not"
    out, data = tmp_path / "out", str(calm.data)
    begun = extract(data, output_dir=out, jobs=JobOptions(**CUT, max_runtime_minutes=0), **PLAIN)
    assert (begun.computed, begun.ended) == (0, "time is up") and begun.left > 0
    words = tmp_path / "other.jinja"
    words.write_text("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}")
    others = [
        (dict(seed=4), "seed: old 3 → new 4"),
        (dict(chat_template=words), "template: old"),
        (dict(format="v1"), 'format: old "v2" → new "v1"'),
        (dict(selection=Selection(eps=1e-3)), "selector"),
        (dict(reading=Reading(turns="last")), "turns: old"),
        (dict(max_samples=80), "expected the run that is in 'out'"),
    ]
    for changed, named in others:
        with pytest.raises(InputError, match=re.escape(named)) as refused:
            extract(data, output_dir=out, jobs=JobOptions(**CUT), **PLAIN | changed)
        assert "\n" not in str(refused.value)
    assert extract(data, output_dir=out, jobs=JobOptions(**CUT), **PLAIN).complete
    same(out, calm)


def test_shards_in_places_of_their_own(calm, tmp_path):
    "Two processes that know nothing of each other, merged, say what one says"
    for i in range(2):
        share = JobOptions(**CUT, num_shards=2, shard_index=i)
        part = extract(str(calm.data), output_dir=tmp_path / str(i), jobs=share, **PLAIN)
        assert part.complete and part.rows < 96
    merging.merge([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    same(tmp_path / "whole", calm)


# ---- other tools ----------------------------------------------------------------------------------------------------


def test_from_the_hub(calm, tmp_path, monkeypatch):
    "`load_dataset` at once and streamed, pandas, and our own reader, each from the Hub and from the folder"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve(token=TOKEN) as hub:
        point(monkeypatch, hub.address, tmp_path / "cache")
        shutil.copytree(calm.out, tmp_path / "out")
        sent = upload(str(tmp_path / "out"), repo=REPO)
        assert sent.left == 0
        own, want = dict(split="train", cache_dir=str(tmp_path / "loaded")), table_of(calm.out)
        rows = {r["index"]: r for r in want.to_pylist()}
        for name, more in ((REPO, {}), (str(tmp_path / "out"), {"data_dir": "data"})):
            whole = datasets.load_dataset(name, **own, **more)
            assert {r["index"]: r for r in whole.to_list()} == rows and len(whole) == len(rows)
            streamed = list(datasets.load_dataset(name, streaming=True, **own, **more))
            assert {r["index"]: r for r in streamed} == rows and len(streamed) == len(rows)
        frame = pd.read_parquet(f"hf://datasets/{REPO}/data").set_index("index").sort_index()
        assert frame.index.tolist() == calm.kept
        here, there = LogitStore(calm.out), LogitStore(REPO)
        assert there.indices() == here.indices() == calm.kept and there.about == here.about
        for i in calm.kept[::9]:
            assert there[i].input_ids.tolist() == here[i].input_ids.tolist() == frame.input_ids[i].tolist()
            np.testing.assert_array_equal(there[i].picked.logp, here[i].picked.logp)
        assert not hub.leaks and not hub.broken
    card = bytes(hub.repo(REPO).files()["README.md"]).decode()
    assert "tiny" in card and str(tmp_path) not in card and str(calm.data.parent) not in card


def test_polars_reads_it(calm):
    polars = pytest.importorskip(
        "polars", reason="polars is not installed: whether it reads a store is not tried here"
    )
    frame = polars.read_parquet(calm.out / "data" / "*.parquet").sort("index")
    assert frame["index"].to_list() == calm.kept
    assert frame["exact_ids"].to_list() == table_of(calm.out)["exact_ids"].to_pylist()


# ---- refused --------------------------------------------------------------------------------------------------------

ROW = dict(messages=[dict(role="user", content="Hi"), dict(role="assistant", content="Ho")], text="Ho", n=1.5)
WRONG = {
    "format": (dict(format="v3"), "the format v1 or v2; got 'v3'"),
    "precision": (dict(precision="fp8"), "values steps or bf16; got 'fp8'"),
    "bits in v1": (dict(format="v1", precision="bf16"), "values steps in the format v1"),
    "v1 by lots": (dict(format="v1", selection=Selection("varopt")), "what the format v1 can hold; got select varopt"),
    "v2 nucleus": (dict(selection=Selection("nucleus")), "what the format v2 can hold; got select nucleus"),
    "ids nowhere": (dict(id_column="nobody"), "an id column that exists; got 'nobody'; choose from"),
    "ids of a kind": (dict(id_column="n"), "ids in 'n' that are text or whole numbers; got double"),
    "no text": (dict(reading=Reading(text_column="story")), "story"),
    "no template": (dict(chat_template=Path("nowhere.jinja")), "nowhere.jinja"),
    "a template for texts": (
        dict(reading=Reading(text_column="text"), chat_template=Path("any.jinja")),
        "no template for plain texts",
    ),
    "too short": (
        dict(reading=Reading(max_seq_len=3)),
        "a target in one of the first 1 rows; got 1 without: too long",
    ),
    "route": (dict(route="magic"), "a route of .*; got 'magic'"),
    "batch": (dict(jobs=dict(batch_tokens=0)), "batch_tokens above 0"),
    "size": (dict(selection=dict(select="topk")), "size beside select topk"),
    "k": (dict(selection=Selection("topk", size=0)), "0"),
    "eps": (dict(selection=Selection(eps=-1.0)), "-1"),
    "top_p": (dict(format="v1", selection=Selection(top_p=1.5)), "1.5"),
    "turns": (dict(reading=dict(turns="some")), "turns all or last; got 'some'"),
    "truncate": (dict(reading=dict(truncate="left")), "max_seq_len beside truncate"),
    "date": (dict(reading=dict(today="tomorrow")), "a date such as 2026-01-31; got 'tomorrow'"),
    "device": (dict(device="abacus"), "abacus"),
    "dtype": (dict(dtype="int3"), "int3"),
    "samples": (dict(max_samples=0), "max_samples"),
    "columns": (dict(dataset="columns"), "points"),
    "nowhere": (dict(dataset="nowhere.jsonl"), "nowhere.jsonl"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name, tmp_path, monkeypatch):
    "Each is refused in one line that says what was expected, and nothing is written"
    how, match = WRONG[name]
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps(ROW) + "\n")
    (tmp_path / "columns").mkdir()
    (tmp_path / "columns" / "it.jsonl").write_text('{"points": 3}\n')
    kinds = dict(jobs=JobOptions, selection=Selection, reading=Reading)
    with pytest.raises(InputError, match=match) as refused:
        made = {k: kinds[k](**v) if k in kinds and isinstance(v, dict) else v for k, v in how.items()}
        extract(**dict(dataset=str(data), model="tiny", device="cpu", output_dir="out") | made)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    with pytest.raises(WorldError, match="new or empty"):
        extract("tiny/chat", output_dir=tmp_path / "out", max_samples=2, device="cpu")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["keep.txt"]


if __name__ == "__main__":  # make torture: as it is promised
    for number, way in enumerate(HOW):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as room:
            whole = undisturbed(Path(room), 1200)
            with moody(Path(room), number) as both:
                print(json.dumps(killed(Path(room), whole, both, 100, number, way)), flush=True)
