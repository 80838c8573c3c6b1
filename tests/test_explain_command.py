"""The command `explain`: its files for other tools, static shards, data sets that are known by name, its verbs."""

import csv
import io
import json
import os
import pickletools
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loopback_hub import point, serve
from test_explain import folder, tokenizer  # noqa: F401
from test_explain_run import LONG, OWN, rows_file

from llm_analysis.cli import main
from llm_analysis.core import InputError
from llm_analysis.explain import run as module
from llm_analysis.explain import step
from llm_analysis.explain.advisor import advise, hyperparams
from llm_analysis.explain.export import Exports
from llm_analysis.explain.prepare import Effort, Measure
from llm_analysis.explain.run import run
from llm_analysis.explain.step import targets_of
from llm_analysis.jobs.job import JobOptions

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "run_llm_sharded.sh"
TEXTS = [
    "not very good",
    '=1+1, "quoted"\nand broken',
    "It was fine .",
    " ",
    "The food was cold and we left early .",
    "bad",
]
LABELLED = ("margin", "probability", "classes")
NAMES = ["token_shap.csv", "token_shap.json", "token_shap_records.json"]


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):  # noqa: F811
    "A run over six rows, one of them blank"
    room = tmp_path_factory.mktemp("command")
    data = rows_file(room / "mine.jsonl", TEXTS)
    return run(data, output_dir=room / "out", model=str(folder), exports=Exports(pickle=True), **OWN)


def strict(path):
    "JSON as the standard has it: no NaN, no infinity"
    return json.loads(path.read_text(), parse_constant=lambda x: pytest.fail(f"{x} in {path.name}"))


def test_files_for_other_tools_say_what_the_parts_say(done):
    parts = [pq.read_table(p) for p in (done.output_dir / "data").iterdir()]
    truth = {r["index"]: r for r in pa.concat_tables(parts).to_pylist()}
    told, records = strict(done.output_dir / NAMES[1]), strict(done.output_dir / NAMES[2])
    assert [r["row"] for r in records] == [r["row"] for r in told["rows"]] == sorted(truth) == [0, 1, 2, 4, 5]
    for r in records:
        assert all(r[k] == truth[r["row"]][k] for k in ("text", "answer", "players", "values", "stderr", "full_value"))
        assert sum(r["values"]) == pytest.approx(r["full_value"] - r["base_value"], abs=1e-8)
    for r in told["rows"]:
        values = truth[r["row"]]["values"]
        assert len(r["top"]) == min(5, len(values)) and r["efficiency_gap"] <= 1e-8
        assert abs(r["top"][0]["value"]) == np.abs(values).max()
    lines = list(csv.DictReader(io.StringIO((done.output_dir / NAMES[0]).read_text())))
    assert [float(x["value"]) for x in lines] == [v for i in sorted(truth) for v in truth[i]["values"]]
    assert all(truth[int(x["row"])]["players"][int(x["position"])] == x["player"] for x in lines)


def test_rows_without_a_result_are_counted(done):
    told = strict(done.output_dir / NAMES[1])
    assert told["without"] == [{"row": 3, "status": "skipped", "reason": "empty: there is no text"}]
    head = told["summary"]
    assert (head["rows"], head["explained"], head["skipped"], head["failed"]) == (6, 5, 1, 0)
    assert head["reasons"] == {"empty": 1} and head["settings"]["max_seq_len"] and head["shard"] is None
    assert head["evaluations"] == sum(r["evaluations"] for r in told["rows"])
    assert "1 left out (1 empty)" in str(done)


def test_a_pickle_holds_plain_data_only(done):
    ops = {op.name for op, _, _ in pickletools.genops((done.output_dir / "token_shap.pkl").read_bytes())}
    assert not ops & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ", "BUILD"}


def test_no_raw_no_pickle_and_top_k(folder, tmp_path):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", TEXTS)
    run(data, output_dir=tmp_path / "out", model=str(folder), exports=Exports(top_k=1, raw=False), **OWN)
    assert sorted(p.name for p in (tmp_path / "out").glob("token_shap*")) == NAMES[:2]
    assert all(len(r["top"]) == 1 for r in strict(tmp_path / "out" / NAMES[1])["rows"])


def test_merge_by_hand_makes_the_same_files(done):
    before = {name: (done.output_dir / name).read_bytes() for name in NAMES}
    for name in NAMES:
        (done.output_dir / name).unlink()
    assert main(["explain", "merge", str(done.output_dir)]) == 0
    assert {name: (done.output_dir / name).read_bytes() for name in NAMES} == before


def test_a_file_is_replaced_whole_or_not_at_all(done, monkeypatch):
    before = {name: (done.output_dir / name).read_bytes() for name in NAMES}
    monkeypatch.setattr("llm_analysis.explain.export.entry", lambda r: {"value": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        module.merge(done.output_dir)
    assert {name: (done.output_dir / name).read_bytes() for name in NAMES} == before
    assert not list((done.output_dir / "_job").glob("tmp?*"))


def test_four_static_shards_are_one_run(done, folder, tmp_path):  # noqa: F811
    "In one folder, one after another; each leaves its own files, and merged they are those of one process"
    data, out, seen = rows_file(tmp_path / "mine.jsonl", TEXTS), tmp_path / "out", []
    for i in (2, 0, 3, 1):
        jobs = JobOptions(num_shards=4, shard_index=i, max_batch_size=1)
        part = run(data, output_dir=out, model=str(folder), jobs=jobs, **OWN)
        assert part.complete
        told = strict(out / f"token_shap_shard0{i}of04.json")
        assert told["summary"]["shard"] == {"index": i, "of": 4} and told["summary"]["rows"] == part.rows
        assert (out / f"token_shap_shard0{i}of04.csv").exists()
        records = strict(out / f"token_shap_shard0{i}of04_records.json")
        seen += [r["row"] for r in records] + [r["row"] for r in told["without"]]
        assert not (out / NAMES[0]).exists()
    assert sorted(seen) == list(range(6))
    module.merge(out)
    for name in (NAMES[0], NAMES[2]):
        assert (out / name).read_bytes() == (done.output_dir / name).read_bytes()
    one, four = strict(done.output_dir / NAMES[1]), strict(out / NAMES[1])
    assert (one["rows"], one["without"]) == (four["rows"], four["without"])
    for name in ("values.parquet", "samples.parquet"):
        mine, theirs = (pq.read_table(d / name).replace_schema_metadata() for d in (out, done.output_dir))
        assert mine == theirs


def environment(**more):
    "For a process of its own, with this package first"
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | own | {"PATH": binaries} | more


def launcher(room: Path) -> dict:
    "An environment whose llm-analysis is this package's, wherever it is installed"
    command = room / "command"
    command.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c 'from llm_analysis.cli import main; exit(main())' \"$@\"\n"
    )
    command.chmod(0o755)
    return environment(LLM_ANALYSIS=str(command), TQDM_DISABLE="0")


def test_the_script_runs_shards_side_by_side(done, folder, tmp_path):  # noqa: F811
    "With a space in every name; the logs are where it says"
    room = tmp_path / "a room"
    room.mkdir()
    data = rows_file(room / "mine too.jsonl", TEXTS)
    words = [str(SCRIPT), data, "2", "--model", str(folder), "--prompt", OWN["prompt"], "--label-words", " good, bad"]
    words += ["--device", "cpu", "--route=padded", "--max-batch-size", "1", "--pickle"]
    said = subprocess.run(words, cwd=room, env=launcher(room), capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    out = room / "outputs" / "insights" / "LLM" / "mine--too"
    assert (out / NAMES[0]).read_bytes() == (done.output_dir / NAMES[0]).read_bytes()
    assert (out / "token_shap.pkl").exists() and "report.html" in said.stdout
    logs = sorted(room.glob("logs/*/shard*.log"))
    assert len(logs) == 2 and str(logs[0].parent.relative_to(room)) in said.stderr
    assert "TokenSHAP[mine too][2/2]" in logs[1].read_text()


@pytest.mark.parametrize(
    "words, code, match",
    [
        ([], 2, "usage"),
        (["tiny/reviews", "many"], 2, "usage"),
        (["tiny/reviews", "2", "--num-shards", "3"], 2, "leave --num-shards out"),
        (["tiny/weather", "2"], 1, "shard 1 failed with exit code 2: llm-analysis: expected a tiny world"),
    ],
)
def test_the_script_says_what_is_wrong(tmp_path, words, code, match):
    own = dict(cwd=tmp_path, env=launcher(tmp_path), capture_output=True, text=True, timeout=300)
    said = subprocess.run([str(SCRIPT), *words], **own)
    assert said.returncode == code and match in said.stderr, said.stderr


def test_the_script_stops_its_shards_at_ctrl_c(tmp_path):
    "Nobody is left behind; here the command is one that would sleep for minutes"
    command = tmp_path / "command"
    command.write_text('#!/bin/sh\necho $$ > "pid$8"\nexec sleep 300\n')
    command.chmod(0o755)
    own = dict(cwd=tmp_path, env=environment(LLM_ANALYSIS=str(command)), stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([str(SCRIPT), "tiny/reviews", "2", "--x"], start_new_session=True, **own)
    while len(pids := [int(p.read_text() or 0) for p in tmp_path.glob("pid*")]) < 2 or 0 in pids:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "what is finished is kept" in process.stderr.read()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def parquet(columns: dict) -> bytes:
    pq.write_table(pa.table(columns), out := pa.BufferOutputStream())
    return out.getvalue().to_pybytes()


NEWS = dict(text=["Shares fell on Wall Street.", "The striker scored twice.", ""], label=[2, 1, 0])
KNOWN = {
    "stanfordnlp/sst2": ("validation", "Sentiment", dict(idx=[0, 1, 2], sentence=["a dull film", "fine", "no"], label=[0, 1, 0])),
    "SetFit/ag_news": ("test", "Topic", NEWS | dict(label_text=["Business", "Sports", "World"])),
    "fancyzhx/ag_news": ("test", "Topic", NEWS),
}  # fmt: skip


@pytest.mark.parametrize("name, asked", [*((n, n) for n in KNOWN), ("SetFit/ag_news", "setfit/ag_news")])
def test_data_sets_that_are_known_by_name_need_no_options(name, asked, folder, tmp_path, monkeypatch):  # noqa: F811
    "Files of the same schema, on a Hub of this machine"
    split, word, columns = KNOWN[name]
    blobs = {f"data/{s}-00000-of-00001.parquet": parquet(columns) for s in ("train", split)}
    monkeypatch.chdir(tmp_path)
    with serve() as hub:
        hub.add(name, blobs)
        point(monkeypatch, hub.address, tmp_path / "home")
        assert main(["explain", "run", asked, "--model", str(folder), "--device", "cpu"]) == 0
    told = strict(tmp_path / "outputs" / "insights" / "LLM" / name.replace("/", "--") / NAMES[1])
    own = told["summary"]["settings"]
    assert (own["dataset"], own["split"], own["value"]["kind"]) == (name, split, "LabelMargin")
    assert word in own["prompt"] and len(own["value"]["labels"]) == (2 if "sst2" in name else 4)
    assert told["summary"]["judged"] == told["summary"]["explained"] == 3 - ("" in columns.get("text", []))


def test_verbs_know_a_run_by_its_data_set(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "mine.jsonl", TEXTS[:2])
    words = ["--model", str(folder), "--device", "cpu", "--prompt", OWN["prompt"], "--label-words", " good, bad"]
    assert main(["explain", "run", "mine.jsonl", *words]) == 0
    assert (tmp_path / "outputs" / "insights" / "LLM" / "mine" / NAMES[0]).exists()
    for verb in ("status", "merge", "report"):
        capsys.readouterr()
        assert main(["explain", verb, "mine.jsonl"]) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        assert ("2 of 2 rows" if verb == "status" else "report.html") in said
    assert main(["explain", "merge", "other"]) == 1


def test_most_rows_left_out_is_said_with_what_would_change_it(folder, tmp_path, capsys):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", ["fine", "! " * 40, "! " * 50, ""])
    found = run(data, output_dir=tmp_path / "out", model=str(folder), max_seq_len=32, **OWN)
    assert found.left_out == 3 and "(2 too long, 1 empty)" in str(found)
    assert "3 of 4 rows left out (2 too long, 1 empty); --max-seq-len 64 would take 3" in capsys.readouterr().err


def test_every_flag_is_there(capsys):
    assert main(["explain", "run", "--help"]) == 0
    page = capsys.readouterr().out
    flags = "label-words target prompt players removal value estimator tol budget time-budget max-seq-len top-k no-raw"
    for flag in f"{flags} no-advisor sampling-ratio pickle num-shards shard-index output-dir".split():
        assert f"--{flag}" in page, flag
    assert "(default: 512)" in page and "(default: 5)" in page


def test_a_sampling_ratio_is_a_budget(folder, tmp_path, capsys):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", ["a b c d e f g h i j k l m n", "fine good"])
    effort = Effort(sampling_ratio=0.01)
    found = run(data, output_dir=tmp_path / "out", model=str(folder), effort=effort, **OWN)
    spent = {s.row: s.attribution.evaluations for s in found.samples}
    assert spent[1] == 4 and 0.01 * (2**14 - 1) - 2 <= spent[0] <= 0.01 * (2**14 - 1) + 2


@pytest.mark.slow
def test_a_pilot_changes_no_number_and_is_not_lost(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    "The run goes on with the rows of the pilot; without one the same settings give the same bytes"
    monkeypatch.setenv("TQDM_DISABLE", "0")  # where bars are off, nothing is asked
    data = rows_file(tmp_path / "mine.jsonl", [*TEXTS, LONG, LONG.replace("we", "they")])
    real, begun = step.explain_row, []
    keep = lambda lm, row, ask, game=None: begun.append(game is not None) or real(lm, row, ask, game)
    monkeypatch.setattr(step, "explain_row", keep)
    monkeypatch.setattr(module, "advise", lambda ready: advise(ready, seconds=600))
    run(data, output_dir=tmp_path / "with", model=str(folder), **OWN)
    said = capsys.readouterr().err
    assert "advisor: tol 0.1" in said and "advisor: 7 rows, about" in said
    assert sum(begun) == 6 and len(begun) == 7
    run(data, output_dir=tmp_path / "without", model=str(folder), effort=Effort(tol=0.1, advisor=False), **OWN)
    assert sum(begun) == 6 and "advisor" not in capsys.readouterr().err
    for name in (*NAMES, "values.parquet", "samples.parquet"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_run_that_goes_on_does_not_ask_again(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TQDM_DISABLE", "0")  # where bars are off, nothing is asked
    data, own = rows_file(tmp_path / "mine.jsonl", TEXTS), dict(output_dir=tmp_path / "out", model=str(folder), **OWN)
    asked = []
    real = module.advise
    monkeypatch.setattr(module, "advise", lambda ready: asked.append(1) or real(ready))
    run(data, jobs=JobOptions(max_runtime_minutes=0), **own)
    assert asked == []
    run(data, **own)
    assert asked == []
    run(data, jobs=JobOptions(force_restart=True), **own)
    assert asked == [1]
    assert strict(tmp_path / "out" / NAMES[1])["summary"]["settings"]["tol"] == 0.1
    with pytest.raises(InputError, match="tol: old 0.1 → new 0.2"):
        run(data, effort=Effort(tol=0.2), **own)


@pytest.mark.parametrize(
    "effort", [Effort(), Effort(tol=0.3), Effort(budget=300), Effort(sampling_ratio=0.01), Effort(estimator="exact")]
)
def test_hyperparams_says_what_a_run_will_cost(folder, tmp_path, effort):  # noqa: F811
    "Before the run, into its folder; budgets that are certain are met exactly"
    data = rows_file(tmp_path / "mine.jsonl", [*TEXTS, LONG[:40]])
    own = dict(output_dir=tmp_path / "out", model=str(folder), effort=effort, **OWN)
    advice = hyperparams(data, pilot_seconds=5, **own)
    told = strict(tmp_path / "out" / "hyperparams" / "token_shap_hyperparams.json")
    assert advice.path.name == "token_shap_hyperparams.json" and str(advice.path) in str(advice)
    assert told["left_out"] == {"rows": 1, "reasons": {"empty": 1}} and len(told["rows"]) == 6
    assert told["token_counts"]["within_limits"]["4096"]["share"] == 1
    for r in told["rows"]:
        assert (
            r["sampling_ratio"] == (r["budget"] - 1) / (2 ** r["players"] - 1) and r["seconds"] > 0 < r["peak_bytes"]
        )
        assert r["meets"] or str(r["budget"]) in r["reason"]
    found = run(data, **own)
    spent = {s.row: s.attribution.evaluations for s in found.samples}
    if effort.tol is None and effort.given:
        for r in told["rows"]:
            assert 0 <= r["budget"] - spent[r["row"]] <= 1, r
    assert found.output_dir == tmp_path / "out"


def test_rows_that_will_miss_the_target_are_named(folder, tmp_path, capsys):  # noqa: F811
    data = rows_file(tmp_path / "mine.jsonl", [LONG, "fine"])
    own = dict(output_dir=tmp_path / "out", model=str(folder), **OWN)
    advice = hyperparams(data, pilot_seconds=5, effort=Effort(tol=1e-4, budget=200), **own)
    told = strict(tmp_path / "out" / "hyperparams" / "token_shap_hyperparams.json")
    assert [r["meets"] for r in told["rows"]] == [False, True] and "200 evaluations" in told["rows"][0]["reason"]
    assert told["total"]["missed"] == 1 and "1 rows will stay short of tol 0.0001" in str(advice)


@pytest.mark.parametrize(
    "measure, options",
    [
        *((Measure(value=v), {}) for v in ("margin", "probability", "classes", "logprob", "odds", "tokens", "divergence")),
        (Measure(value="similarity", answer_tokens=2), {}),
        (Measure(value="tokens", target=" very bad"), {}),
        (Measure(removal="attend"), {}),
        (Measure(removal="mask:."), {}),
        (Measure(pinned="not"), {}),
        (Measure(), dict(players="sentences")),
        (Measure(), dict(players="regex:[aeiou]\\w*")),
    ],
    ids=str,
)  # fmt: skip
def test_everything_that_can_be_measured_goes_through(folder, tmp_path, measure, options):  # noqa: F811
    "From the flag to the files; numbers are finite and add up, and of several targets all are kept"
    data = rows_file(tmp_path / "mine.jsonl", ["not so very good. It was cold", "fine and easy"])
    own = dict(OWN) | dict(label_words=OWN["label_words"] if measure.value in (None, *LABELLED) else None)
    effort = Effort(tol=0.3, advisor=False)
    found = run(data, output_dir=tmp_path / "out", model=str(folder), measure=measure, effort=effort, **own, **options)
    records, told = strict(tmp_path / "out" / NAMES[2]), strict(tmp_path / "out" / NAMES[1])
    assert len(records) == len(found.samples) == 2 and found.gap <= 1e-8
    settings = told["summary"]["settings"]
    assert settings["removal"] == measure.removal and records[0]["removal"].startswith(
        measure.removal.partition(":")[0]
    )
    for r in records:
        assert (r["targets"] is None) == (measure.value not in ("classes", "tokens"))
        if r["targets"]:
            assert np.shape(r["all_values"]) == (len(r["players"]), len(r["targets"]))
            assert np.allclose(np.array(r["all_values"])[:, r["focus"]], r["values"])
    part = pq.read_table(next((tmp_path / "out" / "data").iterdir())).to_pylist()[0]
    assert targets_of(part).targets == tuple(part["targets"] or ()) and targets_of(part).efficiency_gap <= 1e-8
