"""`logits.rewrite.convert`: every format there and back, what was left behind adds up, and a kill changes nothing."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from llm_analysis.cli import main
from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs.job import Job, JobOptions
from llm_analysis.logits import rewrite, v1, v2
from llm_analysis.logits.convert import Taken
from llm_analysis.logits.distillkit import Layout
from llm_analysis.logits.extract import Selection
from llm_analysis.logits.formats import Format, exact_ones, to_v2
from llm_analysis.logits.origin import Origin
from llm_analysis.logits.picked import estimate
from llm_analysis.logits.rewrite import convert
from llm_analysis.logits.run import extract
from llm_analysis.logits.sparse import SparseTargets
from llm_analysis.logits.store import LogitStore
from llm_analysis.logits.texts import Reading
from llm_analysis.tiny.chats import chats

torch.set_num_threads(1)
PLAIN = dict(model="tiny", device="cpu", route="padded", seed=3)
K, VOCAB = 16, 2048
WORDS = [
    "A dull and tedious film by the sea.",
    "Hello! How can I help?",
    "The answer is no, not today.",
    "x y z, and so on",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Small stores of every kind: chats in v2 and v1, and texts of which every token is a target"
    room = tmp_path_factory.mktemp("stores")
    told = chats("validation")["messages"][:16]
    (room / "chats.jsonl").write_text("\n".join(json.dumps(dict(messages=m)) for m in told))
    extract(str(room / "chats.jsonl"), output_dir=room / "chat", **PLAIN)
    extract(str(room / "chats.jsonl"), output_dir=room / "old", format="v1", **PLAIN)
    rows = [json.dumps(dict(text=f"{w} {i}")) for i, w in enumerate(WORDS * 3)]
    (room / "words.jsonl").write_text("\n".join(rows) + "\n")
    own = dict(selection=Selection(select="topk", size=K), reading=Reading(text_column="text"))
    extract(str(room / "words.jsonl"), output_dir=room / "words", **own, **PLAIN)
    return room


def table_of(folder: Path) -> pa.Table:
    "All rows in the order of their index, as a plain reader sees them"
    tables = [pq.read_table(p) for p in sorted((folder / "data").glob("*.parquet"))]
    assert len({t.schema.metadata[v1.KEY] for t in tables}) == 1
    return pa.concat_tables([t.replace_schema_metadata() for t in tables]).sort_by("index")


def said(folder: Path) -> str:
    "All rows in words: bit by bit, and nan is nan"
    return repr(table_of(folder).to_pylist())


def rows_of(name) -> dict[int, tuple]:
    "What `Origin` reads of each row"
    origin = Origin(name)
    layout = Layout(**origin.about["layout"]) if origin.format == "distillkit" else None
    at = origin.pointers.to_pylist()
    return {p["index"]: origin.taken(origin.row(p), None, None, layout) for p in sorted(at, key=lambda p: p["index"])}


def adds_up(done, folder: Path) -> None:
    "The report is the sum over the rows, on screen, in the file and in the parts"
    table = table_of(folder)
    each = [Counter(json.loads(x)) for x in table["lost"].to_pylist()]
    assert dict(sum(each, Counter())) == done.lost == json.loads((folder / "conversion.json").read_text())["lost"]
    assert (done.rows, done.targets) == (
        len(table),
        sum(table["num_tokens" if "num_tokens" in table.column_names else "targets"].to_pylist()),
    )
    assert all(f"left behind: {n:,} {what}" in str(done) for what, n in done.lost.items())
    assert done.after == sum(p.stat().st_size for p in (folder / "data").glob("*.parquet"))
    assert done.rows + sum(done.left_out.values()) == done.run.rows


# ---- there and back -------------------------------------------------------------------------------------------------


def test_v2_to_v2_changes_nothing(home, tmp_path):
    done = convert(home / "chat", output_dir=tmp_path / "again")
    mine, theirs = table_of(tmp_path / "again"), table_of(home / "chat")
    assert mine.drop_columns(["targets", "lost"]) == theirs and done.lost == {}
    adds_up(done, tmp_path / "again")
    assert LogitStore(tmp_path / "again").about["fingerprint"] == LogitStore(home / "chat").about["fingerprint"]


@pytest.mark.parametrize("name", ["distillkit", "axolotl", "vllm"])
def test_tools_hold_the_largest_entries_to_the_last_bit(home, tmp_path, name):
    done, store = convert(home / "words", to=name, k=K, output_dir=tmp_path / "to"), LogitStore(home / "words")
    there = rows_of(tmp_path / "to")
    assert list(there) == store.indices() and not done.left_out
    adds_up(done, tmp_path / "to")
    for i, found in there.items():
        went = store[i]
        assert found.input_ids.tolist() == went.input_ids.tolist()
        assert found.positions.tolist() == went.positions.tolist()
        p, q = estimate(went.picked, VOCAB), estimate(found.picked, VOCAB)
        assert np.array_equal(p, np.where(p > 0, q, 0))
        assert ((q > 0) & (p == 0)).sum() == (found.picked.exact - K).sum()  # vLLM's token that came
    again = convert(tmp_path / "to", vocab=None if name == "distillkit" else VOCAB, output_dir=tmp_path / "back")
    adds_up(again, tmp_path / "back")
    unknown = again.lost.get("nulls in target", 0)
    assert again.targets == done.targets and (unknown == 0) == (name == "vllm")
    for sample in LogitStore(tmp_path / "back"):
        went = store[sample.index]
        assert went.positions.tolist() == sample.positions.tolist()
        p, q = estimate(went.picked, VOCAB), estimate(sample.picked, VOCAB)
        unknown -= np.isnan(sample.picked.target).sum()
        assert np.abs(np.log(np.where(p > 0, q, 1) / np.where(p > 0, p, 1))).max() < 1 / 32
        assert np.isnan(sample.picked.entropy).all() and np.isnan(sample.picked.tempered).all()
        known = ~np.isnan(sample.picked.target)
        assert np.allclose(sample.picked.target[known], went.picked.target[known], atol=1 / 32)
        assert SparseTargets.of(sample.picked, VOCAB).entropy.isnan().all()
    assert unknown == 0
    assert again.lost["nulls in entropy"] == again.targets == again.lost["nulls in tempered"] / 3


def test_lots_leave_as_the_unbiased_estimate(home, tmp_path):
    store = LogitStore(home / "chat")
    assert sum(s.picked.sampled.sum() for s in store) > 0
    for lots in (True, False):
        done = convert(home / "chat", to="vllm", lots=lots, output_dir=tmp_path / f"{lots}")
        assert ("entries drawn from the tail" in done.lost) == (not lots)
        for i, found in rows_of(tmp_path / f"{lots}").items():
            p, q = estimate(store[i].picked, VOCAB), estimate(found.picked, VOCAB)
            assert np.allclose(p, q, atol=1e-6) == (lots or not store[i].picked.sampled.any())


def test_v1_and_v2(home, tmp_path):
    done = convert(home / "old", dataset=str(home / "chats.jsonl"), output_dir=tmp_path / "new")
    adds_up(done, tmp_path / "new")
    old, new, text = LogitStore(home / "old"), LogitStore(tmp_path / "new"), LogitStore(home / "chat")
    assert old.indices() == new.indices() == text.indices()
    unknown = 0
    for sample in new:
        assert sample.input_ids.tolist() == text[sample.index].input_ids.tolist()
        assert text[sample.index].positions.tolist() == sample.positions.tolist()
        unknown += int(np.isnan(sample.picked.target).sum())
        went, came = exact_ones(old[sample.index].picked)[0], sample.picked
        assert (went.exact == came.exact).all() and not came.sampled.any()
        p, q = (x.logp[np.lexsort((x.ids, np.repeat(np.arange(len(x)), x.exact)))] for x in (went, came))
        assert np.abs(p - q).max() < 1 / 32
        assert np.allclose(came.tail, went.tail, atol=1e-2)
    assert done.lost.get("nulls in target", 0) == unknown
    assert done.lost["weights of entries drawn from the tail, so that it is to be read with tail='bucket'"] == sum(
        s.picked.sampled.sum() for s in old
    )
    back = convert(home / "chat", to="v1", output_dir=tmp_path / "back")
    adds_up(back, tmp_path / "back")
    assert back.lost["entries drawn from the tail"] == sum(s.picked.sampled.sum() for s in text)
    assert back.lost["texts with the positions of targets"] == back.rows == len(text)
    for sample in LogitStore(tmp_path / "back"):
        kept = text[sample.index].picked
        assert (sample.picked.ids == kept.ids[~kept.by_lot]).all()
        assert np.abs(sample.picked.logp - kept.logp[~kept.by_lot]).max() < 1e-3


def test_v1_to_v1_of_the_earlier_tool(home, tmp_path):
    "Files that say nothing of themselves get a vocabulary, and keep every entry"
    (tmp_path / "bare").mkdir()
    table = table_of(home / "old").drop_columns(["sampled_threshold"])
    pq.write_table(table, tmp_path / "bare" / "train.parquet")
    with pytest.raises(InputError, match="the vocabulary, which 'bare' does not name; got none"):
        convert(tmp_path / "bare", to="v1", output_dir=tmp_path / "no")
    with pytest.raises(InputError, match="the model whose tokens these are"):
        convert(tmp_path / "bare", vocab=VOCAB, dataset=str(home / "chats.jsonl"), output_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    done = convert(tmp_path / "bare", to="v1", vocab=VOCAB, output_dir=tmp_path / "new")
    bare, new = LogitStore(tmp_path / "bare"), LogitStore(tmp_path / "new")
    assert (bare.vocab, new.vocab, done.lost) == (None, VOCAB, {})
    for i in bare.indices():
        a, b = bare[i].picked, new[i].picked
        assert (a.ids == b.ids).all() and (a.sampled == b.sampled).all() and np.abs(a.logp - b.logp).max() < 1e-3
    convert(tmp_path / "bare", model="tiny", dataset=str(home / "chats.jsonl"), output_dir=tmp_path / "v2")
    text = LogitStore(home / "chat")
    assert all(s.input_ids.tolist() == text[s.index].input_ids.tolist() for s in LogitStore(tmp_path / "v2"))


def test_axolotl_without_tokens_reads_its_messages(home, tmp_path):
    done = convert(home / "chat", to="axolotl", dataset=str(home / "chats.jsonl"), k=128, output_dir=tmp_path / "to")
    table = table_of(tmp_path / "to")
    assert {"messages", "logprobs", "target_token_ids"} <= set(table.column_names)
    lines = [
        dict(messages=r["messages"], logprobs=r["logprobs"], target_token_ids=r["target_token_ids"])
        for r in table.to_pylist()
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match="name it by --model"):
        convert(tmp_path / "rows.jsonl", to="vllm", output_dir=tmp_path / "no")
    again = convert(tmp_path / "rows.jsonl", to="vllm", model="tiny", output_dir=tmp_path / "vllm")
    store = LogitStore(home / "chat")
    for i, (index, found) in enumerate(rows_of(tmp_path / "vllm").items()):
        went = store[store.indices()[i]]
        assert index == i and found.positions.tolist() == went.positions[went.picked.exact > 0].tolist()
    assert again.targets == done.targets


# ---- what others can open -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v2", "v1", "distillkit", "axolotl", "vllm"])
def test_load_dataset(home, tmp_path, name):
    done = convert(home / "words", to=name, k=K, output_dir=tmp_path / "to")
    data = datasets.load_dataset(str(tmp_path / "to"), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(data) == done.rows == len(LogitStore(home / "words"))
    assert Counter(data["index"]) == Counter(LogitStore(home / "words").indices())
    about = json.loads(pq.read_schema(next((tmp_path / "to" / "data").glob("*.parquet"))).metadata[v1.KEY])
    assert about["converted_from"]["format"] == "v2" and about["converted_from"]["name"] == "words"
    assert str(tmp_path) not in json.dumps(about) and str(home) not in json.dumps(about)
    assert about["fingerprint"] == LogitStore(home / "words").about["fingerprint"]
    if name in ("v1", "v2"):
        store = LogitStore(tmp_path / "to")
        assert store.format == name and len(list(store)) == done.rows


# ---- killed ---------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
from llm_analysis.jobs.job import Job, JobOptions
from llm_analysis.logits import rewrite
real = rewrite.Rewrite.process
def slow(self, rows):
    time.sleep(float(sys.argv[3]))
    return real(self, rows)
rewrite.Rewrite.process = slow
print(rewrite.convert(sys.argv[1], to="v1", output_dir=sys.argv[2], jobs=JobOptions(max_batch_size=2, part_rows=2)))
"""


def test_a_kill_changes_nothing(home, tmp_path):
    run = [sys.executable, "-c", CHILD, str(home / "chat"), str(tmp_path / "killed")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen([*run, "0.4"], env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    parts = lambda: sorted((tmp_path / "killed" / "data").glob("*.parquet"))
    end = time.monotonic() + 60
    while len(parts()) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = parts()
    kept = {p.name: p.read_bytes() for p in done}
    assert 3 <= len(done) < 8 and not (tmp_path / "killed" / "conversion.json").exists()
    cut = JobOptions(max_batch_size=2, part_rows=2)
    again = convert(home / "chat", to="v1", output_dir=tmp_path / "killed", jobs=cut)
    calm = convert(home / "chat", to="v1", output_dir=tmp_path / "calm", jobs=cut)
    assert said(tmp_path / "killed") == said(tmp_path / "calm")
    assert all((tmp_path / "killed" / "data" / n).read_bytes() == x for n, x in kept.items())
    assert again.run.computed < calm.run.computed == calm.run.rows and again.lost == calm.lost
    adds_up(again, tmp_path / "killed")
    with pytest.raises(InputError, match="lots"):
        convert(home / "chat", to="v1", lots=True, output_dir=tmp_path / "killed", jobs=cut)


def test_a_worker_gets_all_it_needs(home, tmp_path, monkeypatch):
    "The step that a worker unpacks writes what the one writes that was packed"
    alone = convert(home / "old", dataset=str(home / "chats.jsonl"), output_dir=tmp_path / "one")

    def sent(data, step, **own):
        assert len(packed := pickle.dumps(step)) < 1e6
        return Job(data, pickle.loads(packed), **own)  # noqa: S301, what was packed a line above

    monkeypatch.setattr(rewrite, "Job", sent)
    done = convert(home / "old", dataset=str(home / "chats.jsonl"), output_dir=tmp_path / "two")
    assert said(tmp_path / "two") == said(tmp_path / "one") and done.lost == alone.lost


# ---- refused --------------------------------------------------------------------------------------------------------


def test_refusals_come_before_work(home, tmp_path):
    out = tmp_path / "no"
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    cases = [
        (dict(source=home / "old", dataset=str(home / "chats.jsonl"), chat_template=other), "of the store; got"),
        (dict(source=home / "old"), "the data set of a store in the format v1"),
        (dict(source=home / "chat", chat_template=other), "a data set beside chat_template"),
        (dict(source=home / "chat", to="v3"), "a format of v2, v1, distillkit, axolotl, vllm; got 'v3'"),
        (dict(source=home / "chat", source_format="vllm"), "the columns of vllm; got none named prompt_logprobs"),
        (dict(source=home / "chat", vocab=7), "the vocabulary of 2048"),
        (dict(source=home / "chat", to="distillkit"), "that distillkit can hold; got none: expected all"),
        (dict(source=home / "nowhere"), "a store's folder"),
        (dict(source=home / "words.jsonl"), "columns of v2, v1"),
        (
            dict(source=home / "old", dataset=str(home / "chats.jsonl"), reading=Reading(turns="last")),
            "rows read as the source says",
        ),
    ]
    for given, said in cases:
        with pytest.raises(InputError, match=said.replace("(", r"\(")):
            convert(**dict(dict(output_dir=out), **given))
    for name in ("chat", "chat/data", "chat/more"):
        with pytest.raises((InputError, WorldError), match="another folder than the source's"):
            convert(home / "chat", output_dir=home / name)
    assert not out.exists() and not (home / "chat" / "more").exists()


def test_other_texts_are_refused(home, tmp_path):
    "A data set whose rows have other numbers of targets, or other tokens"
    rows = list(
        datasets.load_dataset(
            "json", data_files=str(home / "words.jsonl"), split="train", cache_dir=str(tmp_path / "c")
        )
    )
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps(dict(text=r["text"].replace("e", "o"))) for r in rows))
    with pytest.raises(WorldError, match="the tokens of row 0 as they were; got others"):
        convert(home / "words", to="vllm", dataset=str(tmp_path / "other.jsonl"), output_dir=tmp_path / "no")
    convert(home / "words", to="v1", output_dir=tmp_path / "v1")
    longer = [json.dumps(dict(text=r["text"] + " and more")) for r in rows]
    (tmp_path / "longer.jsonl").write_text("\n".join(longer))
    with pytest.raises(WorldError, match="targets in row 0; got"):
        convert(tmp_path / "v1", dataset=str(tmp_path / "longer.jsonl"), output_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_rows_that_do_not_fit_are_counted(home, tmp_path):
    "An id beyond the vocabulary, a text without targets, and what no format can read"
    ok = dict(prompt_token_ids=[3, 7], prompt_logprobs=[None, {"7": dict(logprob=-0.5)}])
    wide = dict(prompt_token_ids=[3, 7], prompt_logprobs=[None, {"7": dict(logprob=-0.5), "5000": dict(logprob=-2)}])
    empty = dict(prompt_token_ids=[3], prompt_logprobs=[None])
    bad = dict(prompt_token_ids=[3, 7], prompt_logprobs=[None, {"7": dict(logprob=0.5)}])
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, [ok, wide, empty, ok, wide, ok])))
    done = convert(tmp_path / "said.jsonl", vocab=VOCAB, output_dir=tmp_path / "to")
    assert (done.rows, sum(done.left_out.values())) == (3, 3)
    assert sorted(done.left_out.values()) == [1, 2]
    assert any("numbers below 2048; got 5000" in why for why in done.left_out)
    assert any("a row with targets; got none" in why for why in done.left_out)
    adds_up(done, tmp_path / "to")
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, [ok] * 40 + [bad])))
    broken = convert(tmp_path / "bad.jsonl", vocab=VOCAB, output_dir=tmp_path / "bad")
    assert (broken.rows, broken.run.failed) == (40, 1) and "log-probabilities" in next(iter(broken.left_out))


def test_a_source_that_changed_is_another_run(home, tmp_path):
    ok = json.dumps(dict(prompt_token_ids=[3, 7], prompt_logprobs=[None, {"7": dict(logprob=-0.5)}]))
    (tmp_path / "said.jsonl").write_text(ok)
    convert(tmp_path / "said.jsonl", vocab=VOCAB, output_dir=tmp_path / "to")
    convert(tmp_path / "said.jsonl", vocab=VOCAB, output_dir=tmp_path / "to")
    (tmp_path / "said.jsonl").write_text(ok.replace("0.5", "0.6"))
    with pytest.raises(InputError, match="contents"):
        convert(tmp_path / "said.jsonl", vocab=VOCAB, output_dir=tmp_path / "to")


def test_distillkit_by_its_configuration(home, tmp_path):
    convert(home / "words", to="distillkit", k=K, output_dir=tmp_path / "to")
    table = table_of(tmp_path / "to").drop_columns(["lost", "targets"])
    pq.write_table(table, tmp_path / "bare.parquet")
    with pytest.raises(InputError, match="name the file of DistillKit's configuration by --layout"):
        convert(tmp_path / "bare.parquet", output_dir=tmp_path / "no")
    said = dict(compression=asdict(Layout(VOCAB, K, K, delta_encoding=False)))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(said))))
    one = convert(tmp_path / "bare.parquet", layout=tmp_path / "config.yaml", output_dir=tmp_path / "one")
    two = convert(tmp_path / "to", output_dir=tmp_path / "two")
    assert table_of(tmp_path / "one") == table_of(tmp_path / "two") and one.lost == two.lost
    (tmp_path / "config.yaml").write_text("d: 2048\nk: 16\n")
    with pytest.raises(InputError, match="exact_k wrong or missing"):
        convert(tmp_path / "bare.parquet", layout=tmp_path / "config.yaml", output_dir=tmp_path / "no")


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command(home, tmp_path, capsys):
    words = [
        "logits",
        "convert",
        str(home / "words"),
        "--to",
        "axolotl",
        "--k",
        "8",
        "--output-dir",
        str(tmp_path / "to"),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    rows = table_of(tmp_path / "to")
    assert f"{len(rows)} rows with" in said and "entries beyond the 8 largest" in said and "bytes" in said
    assert {len(one) for row in rows["logprobs"].to_pylist() for one in row} == {8}
    assert main([*words[:3], "--to", "nothing"]) == 2
    assert "a format of v2" in capsys.readouterr().err
    assert main(["logits", "--help"]) == 0 and "logits convert" in capsys.readouterr().out


def test_to_v2_never_makes_up_a_value(home):
    "Whatever is unknown in any combination comes back as nan, the rest as it was"
    store = LogitStore(home / "chat")
    sample, about = store[store.indices()[0]], v2.describe(VOCAB)
    nan, n = lambda x: np.full_like(x, np.nan), len(sample.picked)
    half = np.where(np.arange(n) % 2, np.nan, sample.picked.entropy).astype(np.float32)
    picked = replace(sample.picked, entropy=half, error=nan(sample.picked.error))
    wrote = to_v2(Taken(picked, sample.input_ids, sample.positions, {}), 0, about)
    table = v1.rows_table([wrote.row | dict(targets=n, lost="{}")], Format(about, 1, False).schema())
    back = v2.decode(table.to_pylist()[0], about).picked
    assert (np.isnan(back.entropy) == np.isnan(half)).all() and np.isnan(back.error).all()
    assert (back.tempered == sample.picked.tempered).all() and (back.ids == sample.picked.ids).all()
    assert wrote.lost["nulls in entropy"] == n // 2 and wrote.lost["nulls in error"] == n
