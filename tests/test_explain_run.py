"""`explain.run`: what it writes, what it refuses, and that nothing half-written stays behind."""

import json
import os
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from test_explain import folder, lm, tokenizer  # noqa: F401

from llm_analysis.core import InputError, WorldError
from llm_analysis.explain import run as module
from llm_analysis.explain.attribution import explain_text
from llm_analysis.explain.report import SAMPLES, VALUES
from llm_analysis.explain.run import run

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


def test_three_files_and_no_more(done):
    assert sorted(p.name for p in done.output_dir.iterdir()) == ["report.html", "samples.parquet", "values.parquet"]
    assert [p.name for p in done.output_dir.parent.iterdir()] == ["deep"]


def test_tables(done, folder):  # noqa: F811
    values = pq.read_table(done.output_dir / "values.parquet")
    samples = pd.read_parquet(done.output_dir / "samples.parquet")
    assert values.schema.remove_metadata() == VALUES and len(samples) == 3
    assert pq.read_schema(done.output_dir / "samples.parquet").remove_metadata() == SAMPLES
    v = values.to_pandas()
    assert np.abs(v.groupby("row").value.sum() - (samples.full - samples.base)).max() <= 1e-6
    assert (samples.gap <= 1e-6).all() and (samples.full >= 0).all()
    texts = ["not very good", HOSTILE, LONG]
    assert [texts[r][b:e] for r, b, e in zip(v.row, v.start, v.end)] == v.text.tolist()
    assert (v[v.row == 0].error == 0).all() and (v[v.row == 2].error > 0).all()
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
    alone = explain_text(lm, LONG, prompt=OWN["prompt"], labels=OWN["label_words"], seed=5, row_id=2)
    np.testing.assert_allclose(done.samples[2].attribution.values, alone.values, atol=1e-6)
    np.testing.assert_allclose(done.samples[2].attribution.errors, alone.errors, atol=1e-6)


def test_same_run_same_bytes(done, folder, tmp_path):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", ["not very good", HOSTILE, LONG])
    run(data, output_dir=tmp_path / "again", model=str(folder), seed=5, **OWN)
    for name in ("values.parquet", "samples.parquet", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (done.output_dir / name).read_bytes()


def test_planted_words_are_scored(folder, tmp_path):  # noqa: F811
    found = run(
        "tiny/reviews", output_dir=tmp_path / "out", model=str(folder), max_samples=4, budget=300, device="cpu"
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
        (WorldError, "row 1: 205 tokens", ["fine", "! " * 200], {}),
        (InputError, "max_seq_len from 1", ["fine"], dict(max_seq_len=1000)),
        (InputError, "a row to explain", ["fine"], dict(max_seq_len=3)),
        (InputError, "budget of at least", ["fine", LONG], dict(budget=10)),
        (InputError, "words or tokens", ["fine"], dict(players="letters")),
        (InputError, "in it once", ["fine"], dict(prompt="no place")),
        (InputError, "two or more", ["fine"], dict(label_words=[" good"])),
        (InputError, "token of their own", ["fine"], dict(label_words=[" good", ""])),
        (InputError, "top_k", ["fine"], dict(top_k=0)),
        (WorldError, "empty", ["fine", " "], {}),
    ],
)
def test_refusals(tmp_path, folder, monkeypatch, error, match, texts, options):  # noqa: F811
    def asked(*_, **__):
        raise AssertionError("the model was asked before the refusal")

    monkeypatch.setattr(module, "explain_rows", asked)
    refused(tmp_path, error, match, rows_file(tmp_path / "mine.jsonl", texts), folder, **options)


def test_rows_over_a_limit_are_counted(tmp_path, folder):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", ["! " * 200, "fine"])
    found = run(data, output_dir=tmp_path / "out", model=str(folder), max_seq_len=60, **OWN)
    assert (found.left_out, [s.row for s in found.samples]) == (1, [1])
    assert "1 left out as too long" in str(found)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, folder):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    data = rows_file(tmp_path / "mine.jsonl", ["fine"])
    with pytest.raises(WorldError, match="new or empty"):
        run(data, output_dir=tmp_path / "out", model=str(folder), **OWN)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["keep.txt"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_nothing_half_written(tmp_path, folder, monkeypatch, interruption):  # noqa: F811
    real = module.attribute

    def stop_at_the_second(*args, row_id, **options):
        if row_id == 1:
            raise interruption
        return real(*args, row_id=row_id, **options)

    monkeypatch.setattr(module, "attribute", stop_at_the_second)
    data = rows_file(tmp_path / "mine.jsonl", ["fine", "good", "bad"])
    with pytest.raises(interruption):
        run(data, output_dir=tmp_path / "out", model=str(folder), **OWN)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.jsonl"]


@pytest.mark.slow
def test_ctrl_c(tmp_path, folder):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", [LONG] * 5000)
    code = f"from llm_analysis.explain.run import run; run({data!r}, output_dir={str(tmp_path / 'out')!r}, model={str(folder)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=os.getcwd())
    seen = ""
    while "row/s" not in seen and "s/row" not in seen:
        seen += process.stderr.read(1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert [p.name for p in tmp_path.iterdir()] == ["mine.jsonl"]
