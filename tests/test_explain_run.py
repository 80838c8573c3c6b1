"""`explain.run`: what it writes, what it refuses, and that nothing half-written stays behind."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from test_explain import folder, lm, tokenizer  # noqa: F401

from llm_analysis.core import InputError, WorldError
from llm_analysis.data import Rows
from llm_analysis.explain import prepare as before
from llm_analysis.explain import run as module
from llm_analysis.explain import step
from llm_analysis.explain.attribution import explain_text
from llm_analysis.explain.players import find_players
from llm_analysis.explain.prepare import Effort, Measure
from llm_analysis.explain.report import SAMPLES, VALUES
from llm_analysis.explain.run import run
from llm_analysis.explain.values import LabelMargin
from llm_analysis.jobs import folder as places
from llm_analysis.jobs import parts, progress
from llm_analysis.jobs.job import JobOptions
from llm_analysis.jobs.merge import merge
from llm_analysis.jobs.plan import load_plan
from llm_analysis.jobs.rows import measure
from llm_analysis.lengths import add_lengths
from llm_analysis.lm.model import load

torch.set_num_threads(1)
HOSTILE = '<script>alert("x")</script> & <img src=x onerror=alert(1)> \x1b[31m "quoted"'
LONG = "We loved the quiet room , but the food was cold and so we left early ."
OWN = dict(prompt="Review: {text}\nSentiment:", label_words=[" good", " bad"], device="cpu", route="padded")


def rows_file(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):  # noqa: F811
    "A run over three rows: one exact, one with hostile text, one sampled"
    room = tmp_path_factory.mktemp("run")
    data = rows_file(room / "mine.jsonl", ["not very good", HOSTILE, LONG])
    return run(data, output_dir=room / "out" / "deep", model=str(folder), seed=5, **OWN)


def test_files(done):
    made = ["report.html", "samples.parquet", "token_shap.csv", "token_shap.json", "token_shap_records.json"]
    made += ["values.parquet"]
    assert sorted(p.name for p in done.output_dir.iterdir()) == ["README.md", "_job", "data", "manifest.json", *made]
    assert [p.name for p in done.output_dir.parent.iterdir()] == ["deep"]


def test_tables(done, folder):  # noqa: F811
    values = pq.read_table(done.output_dir / "values.parquet")
    samples = pd.read_parquet(done.output_dir / "samples.parquet")
    assert values.schema.remove_metadata() == VALUES and len(samples) == 3
    assert pq.read_schema(done.output_dir / "samples.parquet").remove_metadata() == SAMPLES
    v = values.to_pandas()
    assert np.abs(v.groupby("row").value.sum() - (samples.full_value - samples.base_value)).max() <= 1e-6
    assert (samples.efficiency_gap <= 1e-6).all() and (samples.full_value >= 0).all()
    texts = ["not very good", HOSTILE, LONG]
    assert [texts[r][b:e] for r, b, e in zip(v.row, v.start, v.end)] == v.text.tolist()
    assert (v[v.row == 0].stderr == 0).all() and (v[v.row == 2].stderr > 0).all()
    assert (
        v.sort_values("value", key=abs, ascending=False, kind="stable")
        .groupby("row")["rank"]
        .is_monotonic_increasing.all()
    )
    made = json.loads(values.schema.metadata[b"llm_analysis"])
    assert made["seed"] == 5 and made["labels"] == [" good", " bad"] and made["fingerprint"] in done.model
    again = datasets.load_dataset("parquet", data_files=str(done.output_dir / "values.parquet"), split="train")
    assert len(again) == len(v)


def test_the_page_is_inert(done):
    html = done.report.read_text()
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;" in html
    assert not any(x in html for x in ("http://", "https://", "@import", "url("))
    assert str(done.output_dir) not in html


def test_the_table_at_the_end(done):
    lines = str(done).splitlines()
    assert len([x for x in lines if x.startswith(("not very good", "<script>", "We loved"))]) == 3
    assert "\x1b" not in str(done) and lines[-1].endswith("report.html")


def test_a_row_is_the_same_alone(done, lm):  # noqa: F811
    "Neither order nor company changes a row: its draws depend on the seed and its position"
    alone = explain_text(lm, LONG, prompt=OWN["prompt"], labels=OWN["label_words"], tol=0.1, seed=5, row_id=2)
    np.testing.assert_allclose(done.samples[2].attribution.values, alone.values, atol=1e-6)
    np.testing.assert_allclose(done.samples[2].attribution.stderr, alone.stderr, atol=1e-6)


def test_same_run_same_bytes(done, folder, tmp_path):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", ["not very good", HOSTILE, LONG])
    run(data, output_dir=tmp_path / "again", model=str(folder), seed=5, **OWN)
    for name in ("values.parquet", "samples.parquet", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (done.output_dir / name).read_bytes()
    (tmp_path / "again" / "pages").mkdir()
    (tmp_path / "again" / "pages" / "0002.html").write_text("of an earlier, larger run")
    module.finish(tmp_path / "again")
    assert not (tmp_path / "again" / "pages").exists()


def test_each_text_is_looked_at_once_before_work_begins(folder, tmp_path, monkeypatch):  # noqa: F811
    "Also those that are left out; the plan is made of what was seen then"
    seen, first = [], []
    look, explain = step.Ask.players, step.explain_row
    monkeypatch.setattr(step.Ask, "players", lambda ask, lm, text: seen.append(text) or look(ask, lm, text))
    monkeypatch.setattr(step, "explain_row", lambda *a: first.append(len(seen)) or explain(*a))
    texts = ["not very good", HOSTILE, "! " * 200, LONG]
    data = rows_file(tmp_path / "mine.jsonl", texts)
    plain = Effort(advisor=False)
    run(data, output_dir=tmp_path / "out", model=str(folder), max_seq_len=96, effort=plain, **OWN)
    assert seen[: first[0]] == texts and len(first) == 3
    plan = load_plan(tmp_path / "out" / "_job" / "plan.parquet")
    lm = load(folder, device="cpu")  # noqa: F811
    found = {i: find_players(lm.tokenizer, t, prompt=OWN["prompt"]) for i, t in enumerate(texts)}
    assert dict(zip(plan.order.tolist(), plan.length.tolist())) == {i: len(found[i].ids) for i in (0, 1, 3)} | {2: 0}
    games = {i: 2 ** len(p) if len(p) <= 12 else 32 * len(p) - 30 for i, p in found.items() if i != 2}
    assert dict(zip(plan.order.tolist(), plan.cost.tolist())) == {
        i: n * len(found[i].ids) for i, n in games.items()
    } | {2: 0}


@pytest.mark.parametrize("known", [True, False])
def test_other_processes_measure_rows_alike(lm, folder, known):  # noqa: F811
    "Whether they are told what is known or look at each row with a tokenizer of their own"
    texts = [f"{'very ' * (i % 7)}good" for i in range(20)]
    ask = step.Ask("text", OWN["prompt"], LabelMargin((" good", " bad")), max_seq_len=10)
    rows = [{"index": i, "text": t} for i, t in enumerate(texts)]
    table = Rows("made", datasets.Dataset.from_list(rows), None, "text", "{text}", None, None, None, "made")
    work = step.Explain(lm, ask, str(folder), before.check_rows(lm, table, ask) if known else None)
    sent = copy.copy(work)  # as it is sent
    assert sent.lm is None
    here, there = measure(rows, work), measure(rows, sent)
    assert here.reason == there.reason and bool(here.reason) == known
    np.testing.assert_array_equal([here.length, here.cost], [there.length, there.cost])


def test_a_page_is_made_with_one_look_at_the_files(done, monkeypatch):
    "Plan, spec and footers are what a run of a million rows has much of"
    seen = []
    for owner in (places, progress):
        load = owner.load_plan
        monkeypatch.setattr(owner, "load_plan", lambda *a, load=load: seen.append("plan") or load(*a))
    read = parts.read_parts
    monkeypatch.setattr(parts, "read_parts", lambda paths, *a: seen.extend(p.name for p in paths) or read(paths, *a))
    module.finish(done.output_dir)
    assert sorted(seen) == sorted(["plan", *(p.name for p in (done.output_dir / "data").iterdir())])


def test_planted_words_are_scored(folder, tmp_path):  # noqa: F811
    found = run(
        "tiny/reviews",
        output_dir=tmp_path / "out",
        model=str(folder),
        max_samples=4,
        effort=Effort(budget=300),
        device="cpu",
    )
    v = pd.read_parquet(tmp_path / "out" / "values.parquet")
    assert v.planted.notna().all() and v.leave_one_out.notna().all()
    planted = [sum(s.planted) for s in found.samples]
    assert v.groupby("row").planted.sum().tolist() == planted and min(planted) >= 1
    right = [s for s in found.samples if s.right]
    if right:
        top = [s.planted[int(np.abs(s.attribution.values).argmax())] for s in right]
        assert found.hits.shapley == np.mean(top)
        assert found.hits.random == pytest.approx(np.mean([np.mean(s.planted) for s in right]))


def refused(room, error, match, data, model, **options):
    with pytest.raises(error, match=match) as caught:
        run(data, output_dir=room / "out", model=str(model), **(OWN | options))
    assert "\n" not in str(caught.value)
    assert [p.name for p in room.iterdir() if p.name != "mine.jsonl"] == []


@pytest.mark.parametrize(
    "error, match, texts, options",
    [
        (WorldError, "row 1: too long: 205 tokens", ["fine", "! " * 200], dict(max_seq_len=None)),
        (InputError, "max_seq_len of at least 1", ["fine"], dict(max_seq_len=0)),
        (InputError, "a row to explain", ["fine"], dict(max_seq_len=3)),
        (InputError, "a row to explain.*1 empty.*--text-column", [" "], {}),
        (InputError, "budget of at least", ["fine", LONG], dict(effort=Effort(budget=9))),
        (InputError, "a value: margin", ["fine"], dict(measure=Measure(value="joy"))),
        (InputError, "no target for the value margin", ["fine"], dict(measure=Measure(target=" yes"))),
        (InputError, "a removal delete", ["fine"], dict(measure=Measure(removal="forget"))),
        (InputError, "no number of answer tokens", ["fine"], dict(measure=Measure(answer_tokens=3))),
        (InputError, "players words, tokens", ["fine"], dict(players="letters")),
        (InputError, "players of a data set's texts", ["fine"], dict(players="turns")),
        (InputError, "a row to explain.*1 no players", ["fine"], dict(players="regex:x")),
        (InputError, "in it once", ["fine"], dict(prompt="no place")),
        (InputError, "two or more", ["fine"], dict(label_words=[" good"])),
        (InputError, "token of their own", ["fine"], dict(label_words=[" good", ""])),
    ],
)
def test_refusals(tmp_path, folder, monkeypatch, error, match, texts, options):  # noqa: F811
    def asked(*_, **__):
        raise AssertionError("the model was asked before the refusal")

    monkeypatch.setattr(step, "explain_row", asked)
    refused(tmp_path, error, match, rows_file(tmp_path / "mine.jsonl", texts), folder, **options)


def test_rows_over_a_limit_are_counted(tmp_path, folder):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", ["! " * 200, "fine"])
    found = run(data, output_dir=tmp_path / "out", model=str(folder), max_seq_len=60, **OWN)
    assert (found.left_out, [s.row for s in found.samples]) == (1, [1])
    assert "1 left out (1 too long)" in str(found)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, folder):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    data = rows_file(tmp_path / "mine.jsonl", ["fine"])
    with pytest.raises(WorldError, match="new or empty"):
        run(data, output_dir=tmp_path / "out", model=str(folder), **OWN)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["keep.txt"]


@pytest.mark.parametrize("fault", [MemoryError("no room"), ValueError("odd"), KeyboardInterrupt()])
def test_a_row_that_fails(tmp_path, folder, monkeypatch, fault):  # noqa: F811
    "A row that fails is recorded, the others are explained; who stops at once keeps what is on disk"
    real = step.explain_row

    def fail_at_the_second(lm, row, ask, game=None):  # noqa: F811
        if row["index"] == 1:
            raise fault
        return real(lm, row, ask, game)

    data, out = rows_file(tmp_path / "mine.jsonl", ["fine", "good", "bad"]), tmp_path / "out"
    monkeypatch.setattr(step, "explain_row", fail_at_the_second)
    if isinstance(fault, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            run(data, output_dir=out, model=str(folder), **OWN)
        assert not (out / "report.html").exists()
        monkeypatch.setattr(step, "explain_row", real)
        found = run(data, output_dir=out, model=str(folder), **OWN)
        assert [s.row for s in found.samples] == [0, 1, 2]
        return
    found = run(data, output_dir=out, model=str(folder), **OWN)
    assert ([s.row for s in found.samples], found.failed) == ([0, 2], 1) and "1 failed" in str(found)


def test_goes_on_and_refuses_another_run(done, folder, tmp_path):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", ["not very good", HOSTILE, LONG])
    own = OWN | dict(model=str(folder), seed=5)
    begun = run(data, output_dir=tmp_path / "out", jobs=JobOptions(max_runtime_minutes=0), **own)
    assert (begun.left, begun.ended) == (3, "time is up") and not (tmp_path / "out" / "report.html").exists()
    with pytest.raises(WorldError, match="3 rows left"):
        module.finish(tmp_path / "out")
    run(data, output_dir=tmp_path / "out", **own)
    for name in ("values.parquet", "samples.parquet", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (done.output_dir / name).read_bytes()
    for changed, named in ((dict(seed=6), "seed: old 5 → new 6"), (dict(effort=Effort(budget=400)), "budget")):
        with pytest.raises(InputError, match=named):
            run(data, output_dir=tmp_path / "out", **(own | changed))
    other = rows_file(tmp_path / "other.jsonl", ["not very good", "another text", LONG])
    with pytest.raises(InputError, match="data.columns.text"):
        run(other, output_dir=tmp_path / "out", **own)


def test_shards_in_places_of_their_own(done, folder, tmp_path):  # noqa: F811
    "Two processes that know nothing of each other, merged, give the values of one"
    data = rows_file(tmp_path / "mine.jsonl", ["not very good", HOSTILE, LONG])
    for i in range(2):
        spread = JobOptions(num_shards=2, shard_index=i, max_batch_size=1)
        part = run(data, output_dir=tmp_path / str(i), model=str(folder), seed=5, jobs=spread, **OWN)
        assert part.complete and part.rows < 3
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    module.finish(tmp_path / "whole")
    for name in ("values.parquet", "samples.parquet"):
        mine, theirs = (pq.read_table(d / name) for d in (tmp_path / "whole", done.output_dir))
        assert mine.replace_schema_metadata() == theirs.replace_schema_metadata()


def test_two_workers_give_the_table_of_one(done, folder, tmp_path, monkeypatch):  # noqa: F811
    "Workers load the model by the folder that was named, and say the same"
    data = rows_file(tmp_path / "mine.jsonl", ["not very good", HOSTILE, LONG])
    spread = JobOptions(num_workers=2, max_batch_size=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: sums of other threads differ in the last digit
    monkeypatch.chdir(folder.parent)
    run(data, output_dir=tmp_path / "out", model=folder.name, seed=5, jobs=spread, **OWN)
    for name in ("values.parquet", "samples.parquet"):
        mine, theirs = (pq.read_table(d / name) for d in (tmp_path / "out", done.output_dir))
        assert mine.replace_schema_metadata() == theirs.replace_schema_metadata()


def test_lengths_that_were_counted_before_make_the_plan(done, folder, tmp_path):  # noqa: F811
    "The folder of `job lengths` as the data set: its column is what the plan is made of, and no value changes"
    data = rows_file(tmp_path / "mine.jsonl", ["not very good", HOSTILE, LONG])
    add_lengths(data, output_dir=tmp_path / "counted", model=str(folder), prompt=OWN["prompt"])
    own = OWN | dict(model=str(folder), seed=5)
    run(data, output_dir=tmp_path / "plain", **own)
    counted = str(tmp_path / "counted")
    for column in ("length", "tenfold"):
        if column == "tenfold":
            table = pq.read_table(next((tmp_path / "counted" / "data").iterdir())).sort_by("index")
            ten = table.append_column(column, pc.multiply(table["length"], 10)).drop_columns(["index"])
            pq.write_table(ten, counted := str(tmp_path / "mine.parquet"))
        run(counted, output_dir=tmp_path / column, jobs=JobOptions(length_column=column), **own)
    plain, length, tenfold = (
        load_plan(tmp_path / x / "_job" / "plan.parquet") for x in ("plain", "length", "tenfold")
    )
    assert length == plain
    assert (tenfold.length == 10 * plain.length).all() and (tenfold.cost == 10 * plain.cost).all()
    for name in ("values.parquet", "samples.parquet"):
        tables = (pq.read_table(d / name).replace_schema_metadata() for d in (tmp_path / "length", done.output_dir))
        assert next(tables) == next(tables)


@pytest.mark.parametrize(
    "error, match, column",
    [
        (InputError, "a column 'lenght' with lengths; got none of that name; near: length", "lenght"),
        (InputError, "whole numbers in column 'text'", "text"),
        (WorldError, "lengths of at least 1 token in column 'length'; got null in row 1", "length"),
    ],
)
def test_a_column_of_lengths_is_checked_before_the_model_is_loaded(tmp_path, monkeypatch, error, match, column):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"text": "fine", "length": 4}\n{"text": "good", "length": null}\n')
    monkeypatch.setattr(before, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    refused(tmp_path, error, match, str(data), "tiny", jobs=JobOptions(length_column=column))


KILLED = """
import sys
from llm_analysis.explain.prepare import Effort
from llm_analysis.explain.run import run
from llm_analysis.jobs.job import JobOptions
if __name__ == "__main__":
    data, out, model, *share = sys.argv[1:]
    own = dict(num_shards=4, shard_index=int(share[0])) if share else dict(num_workers=4)
    run(data, output_dir=out, model=model, prompt="Review: {text}\\nSentiment:", label_words=[" good", " bad"], seed=5,
        device="cpu", route="padded", effort=Effort(budget=128), jobs=JobOptions(max_batch_size=1, part_rows=1, **own))
"""


def killed(commands: list[list[str]], parts: Path, times: int) -> int:
    "Run the commands side by side, kill one of them at random after each few new parts, and start it again"
    rng, kills, quiet = np.random.default_rng(0), 0, dict(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    start = lambda command: subprocess.Popen(command, **quiet)
    live = {i: start(command) for i, command in enumerate(commands)}
    count, until = lambda: len(list(parts.glob("*.parquet"))), int(rng.integers(1, 4))
    while live:
        time.sleep(0.02)
        live = {i: p for i, p in live.items() if p.poll() is None}
        if live and kills < times and count() >= until:
            i = int(rng.choice(list(live)))
            live[i].kill()
            live[i].wait()
            live[i], kills, until = start(commands[i]), kills + 1, count() + int(rng.integers(1, 4))
    return kills


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["four workers", "four shards"])
def test_killed_twenty_times(folder, tmp_path, how):  # noqa: F811
    "The table of a run that was killed again and again is that of an undisturbed one"
    data = rows_file(tmp_path / "mine.jsonl", [f"{LONG} It was visit {i}" for i in range(120)])
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED)
    command = [sys.executable, str(script), data, str(out), str(folder)]
    commands = [[*command, str(i)] for i in range(4)] if how == "four shards" else [command]
    assert killed(commands, out / "data", 20) == 20
    module.merge(out)
    whole = run(data, output_dir=tmp_path / "calm", model=str(folder), seed=5, effort=Effort(budget=128), **OWN)
    assert len(whole.samples) == 120
    for name in ("values.parquet", "samples.parquet"):
        mine, calm = (pq.read_table(d / name).replace_schema_metadata() for d in (out, tmp_path / "calm"))
        assert mine == calm


@pytest.mark.slow
def test_ctrl_c(tmp_path, folder):  # noqa: F811
    "The first Ctrl+C finishes the batch, says what is left, and ends without an error"
    data = rows_file(tmp_path / "mine.jsonl", [LONG] * 500)
    code = f"from llm_analysis.explain.run import run; print(run({data!r}, output_dir={str(tmp_path / 'out')!r}, model={str(folder)!r}))"
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    while not list((tmp_path / "out" / "_job" / "status").glob("*.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "rows are left (interrupted)" in said
