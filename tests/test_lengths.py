"""Lengths counted once: what they are, that the folder is the data set again, and what is refused."""

import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import SST2, hub
from test_explain import folder, lm, tokenizer  # noqa: F401
from tokenizers import processors

from llm_analysis import lengths as module
from llm_analysis.cli import main
from llm_analysis.core import InputError, WorldError
from llm_analysis.data import open_rows
from llm_analysis.explain.players import find_players, owners
from llm_analysis.jobs.command import compact, verify
from llm_analysis.jobs.identity import read_spec
from llm_analysis.jobs.job import Job, JobOptions
from llm_analysis.jobs.merge import merge
from llm_analysis.jobs.results import open_results
from llm_analysis.jobs.step import Step
from llm_analysis.lengths import LENGTH, add_lengths
from llm_analysis.lm.prompt import fill, prompt_lengths, tokenise

TEXTS = ["not very good", "We loved the quiet room , but the food was cold .", "  über 🙂 ", "NA", '{"text"}', "x\ny"]


def closed(style: str):
    "A tokenizer that puts marks on both sides of a text"
    made = tokenizer(style)
    marks = [("<s>", 0), ("<|end|>", 1)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A <|end|>", special_tokens=marks)
    return made


TOKENIZERS = {"bytes": tokenizer("bytes"), "spaces": tokenizer("spaces"), "closed": closed("bytes")}
PROMPTS = ["{text}", " {text}", "x{text}", "Review: {text}\nSentiment:", "{text}<|end|>"]
text = st.lists(st.sampled_from([*"ab \né😀", "very", "<s>", "\u2028", "\u200b"]), max_size=8).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(TOKENIZERS)), st.lists(text, max_size=4), st.sampled_from(PROMPTS), st.booleans())
def test_a_length_is_that_of_what_a_study_sends(name, texts, prompt, chat):
    "One by one and in a batch, whatever the players are; and the begin mark is there only where it must be"
    t = TOKENIZERS[name]
    found = prompt_lengths(t, texts, prompt=prompt, chat=chat).tolist()
    for unit in ("words", "tokens"):
        sent = [find_players(t, x, prompt=prompt, chat=chat, unit=unit) for x in texts]
        assert found == [len(p.ids) for p in sent]
        assert all((p.owner < 0).any() for p in sent)
    if not chat:
        before, after = prompt.split("{text}")
        for one, full in zip(fill(t, texts, prompt=prompt), [before + x.strip() + after for x in texts]):
            places = [(a - len(before), b - len(before)) for a, b in tokenise(t, full, True)[1]]
            spans = find_players(t, one.text, prompt="a {text}").spans
            assert (one.before != before) == (not (owners(places, spans) < 0).any())


def test_what_a_tokenizer_puts_behind_a_text_is_not_sent():
    "The answer comes there; the mark in front counts"
    t, sent = TOKENIZERS["closed"], "a very good"
    ids = t(sent)["input_ids"]
    assert (ids[0], ids[-1]) == (t.bos_token_id, t.eos_token_id)
    assert prompt_lengths(t, ["very good", ""], prompt="a {text}").tolist() == [
        len(ids) - 1,
        len(t("a ")["input_ids"]) - 1,
    ]
    assert tokenise(t, sent, True)[0].tolist() == ids[:-1] == fill(t, ["very good"], prompt="a {text}")[0].ids.tolist()


def jsonl(path, texts, **columns):
    "A file of texts, with more columns"
    rows = [{"text": t} | {k: v[i] for k, v in columns.items()} for i, t in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mine(tmp_path):
    return jsonl(tmp_path / "mine.jsonl", TEXTS, stars=[1.5, None, 3, 4, 5, 6], chars=[len(t) for t in TEXTS])


def count(mine, out, model, **options):
    return add_lengths(mine, output_dir=out, model=str(model), **options)


@pytest.mark.parametrize("chat", [False, True])
def test_the_folder_is_the_data_set_with_one_column_more(mine, tmp_path, folder, lm, chat):  # noqa: F811
    done = count(mine, tmp_path / "out", folder, prompt="Say: {text}", chat=chat)
    assert (done.complete, done.rows, done.skipped, done.failed) == (True, 6, 0, 0) and verify(
        str(tmp_path / "out")
    ).ok
    before, after = open_rows(mine, model="tiny"), open_rows(str(tmp_path / "out"), model="tiny")
    assert after.dataset.features == Features(before.dataset.features | {LENGTH: Value("int32")})
    assert after.dataset.remove_columns(LENGTH).to_dict().items() >= before.dataset.to_dict().items()
    sent = [find_players(lm.tokenizer, t, prompt="Say: {text}", chat=chat) for t in TEXTS]
    assert after.dataset[LENGTH][:] == [len(p.ids) for p in sent]
    assert (after.name, after.split, after.prompt, after.labels) == ("mine", None, "{text}", None)
    assert open_rows(str(tmp_path / "out"), model="m", max_samples=2).dataset["text"][:] == TEXTS[:2]
    assert count(mine, tmp_path / "out", folder, prompt="Say: {text}", chat=chat).computed == 0


def test_what_is_known_of_a_data_set_survives(tmp_path):
    add_lengths("tiny/reviews", output_dir=tmp_path / "out", model="tiny", max_samples=30)
    before, after = open_rows("tiny/reviews", max_samples=30), open_rows(str(tmp_path / "out"), split="validation")
    for name in ("name", "split", "text_column", "prompt", "labels", "label_column", "planted_column", "model"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.dataset.remove_columns(LENGTH).to_dict() == before.dataset.to_dict()
    with pytest.raises(InputError, match="the split of the run, validation; got 'train'"):
        open_rows(str(tmp_path / "out"), split="train")


def test_names_of_labels_and_an_index_of_its_own_survive(tmp_path):
    kinds = Features({"index": Value("int64"), "text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"index": [7, 5], "text": ["a", "b b"], "label": [1, 0]}, kinds).to_parquet(
        tmp_path / "d.parquet"
    )
    add_lengths(str(tmp_path / "d.parquet"), output_dir=tmp_path / "out", model="tiny")
    found = open_rows(str(tmp_path / "out")).dataset
    assert found.features["label"] == kinds["label"]
    assert (found["index"][:], found["source_index"][:], found["label"][:]) == ([0, 1], [7, 5], [1, 0])


def test_a_model_of_this_machine_has_to_be_named_again(mine, tmp_path, folder):  # noqa: F811
    "The tiny model does not step in for it, and where the folder lies is no part of the run"
    count(mine, tmp_path / "out", folder)
    with pytest.raises(InputError, match="a model for the rows of mine; got none"):
        open_rows(str(tmp_path / "out"))
    assert str(folder.parent) not in json.dumps(read_spec(tmp_path / "out"))
    assert open_rows(str(tmp_path / "out"), model="m").model == "m"


def test_a_data_set_of_the_hub_is_still_that_one(tmp_path, folder, monkeypatch):  # noqa: F811
    hub(monkeypatch, loaded=DatasetDict(train=SST2, validation=SST2))
    count("StanfordNLP/SST2", tmp_path / "out", folder)
    hub(monkeypatch, asked=AssertionError("the Hub was asked"))
    rows = open_rows(str(tmp_path / "out"), model="m")
    assert (rows.name, rows.split, rows.text_column) == ("stanfordnlp/sst2", "validation", "sentence")
    assert (
        rows.labels == (" negative", " positive") and rows.label_column == "label" and LENGTH in rows.dataset.features
    )
    with pytest.raises(InputError, match="a model for the rows of stanfordnlp/sst2; got none"):
        open_rows(str(tmp_path / "out"))


def test_many_rows_in_many_batches_come_back_in_order(tmp_path):
    "Batches in two shards that need not know each other, stopped at once, continued, merged and made into one part"
    texts = [f"{'very ' * (i * 7 % 40)}good {i}" for i in range(3000)]
    data = jsonl(tmp_path / "many.jsonl", texts, n=list(range(3000)))
    for i in range(2):
        own = dict(num_shards=2, shard_index=i, max_batch_size=100, batch_tokens=1500)
        for minutes in (0, None):
            options = JobOptions(max_runtime_minutes=minutes, **own)
            done = add_lengths(data, output_dir=tmp_path / str(i), model="tiny", jobs=options)
        assert done.complete and 0 < done.rows < 3000
        with pytest.raises(WorldError, match=f"a complete run in '{i}'; got [0-9,]+ rows left of 3,000; run the same"):
            open_rows(str(tmp_path / str(i)))
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    alone = add_lengths(data, output_dir=tmp_path / "alone", model="tiny", jobs=JobOptions(num_workers=2))
    assert alone.complete and alone.deaths == 0
    whole = open_rows(str(tmp_path / "whole")).dataset
    assert whole["text"][:] == texts and whole["n"][:] == whole["index"][:] == list(range(3000))
    assert whole.to_dict() == open_rows(str(tmp_path / "alone")).dataset.to_dict()
    table = open_results(tmp_path / "whole").table
    compact(str(tmp_path / "whole"))
    assert open_results(tmp_path / "whole").table == table


def test_rows_of_a_batch_are_neighbours(tmp_path):
    "So that a batch is cut out of the table in one piece, and a part is in the order of the data set"
    texts = [f"{'very ' * (i * 7 % 40)}good" for i in range(2500)]
    data = jsonl(tmp_path / "many.jsonl", texts)
    add_lengths(data, output_dir=tmp_path / "out", model="tiny", jobs=JobOptions(part_rows=1))
    spans = []
    for part in sorted((tmp_path / "out" / "data").iterdir()):
        ids = pq.read_table(part)["index"].to_pylist()
        assert ids == sorted(ids) and ids[-1] - ids[0] < module.ROWS
        spans.append(len(ids))
    assert sum(spans) == 2500 and max(spans) == module.ROWS


def test_a_row_that_fails_is_recorded_and_said(mine, tmp_path, folder, monkeypatch):  # noqa: F811
    "Its number stays free: the others keep theirs"
    real = module.prompt_lengths

    def fails(t, texts, **asked):
        if "NA" in list(texts):
            raise ValueError("not this one")
        return real(t, texts, **asked)

    monkeypatch.setattr(module, "prompt_lengths", fails)
    assert count(mine, tmp_path / "out", folder).failed == 1
    found = open_rows(str(tmp_path / "out"), model="m")
    assert found.dataset["index"][:] == [0, 1, 2, 4, 5] and found.dataset["text"][:] == TEXTS[:3] + TEXTS[4:]
    assert found.notes[:2] == (
        "1 rows of the run in 'out' have no result and are not here",
        "row 3: failed, ValueError: not this one",
    )


def test_numbers_with_gaps_are_kept_by_the_next_run(mine, tmp_path, folder):  # noqa: F811
    rows = open_rows(mine, model=str(folder))
    gaps = module.replace(rows, dataset=rows.dataset.select([1, 2, 5]))
    step = module.Lengths(module.load_tokenizer(folder), gaps, prompt="{text}")
    some = [{"index": i, "text": TEXTS[i]} for i in (5, 1)]
    made = step.postprocess(step.process(some), some)
    assert made["index"].to_pylist() == [1, 5] and made["text"].to_pylist() == [TEXTS[1], TEXTS[5]]
    assert made[LENGTH].to_pylist() == prompt_lengths(step.words.tokenizer, [TEXTS[1], TEXTS[5]]).tolist()


def test_a_column_of_rough_lengths_plans_the_counting(mine, tmp_path, folder):  # noqa: F811
    count(mine, tmp_path / "out", folder, jobs=JobOptions(length_column="chars"))
    plan = pq.read_table(tmp_path / "out" / "_job" / "plan.parquet")
    assert sorted(plan["length"].to_pylist()) == sorted(len(t) for t in TEXTS)


def test_another_run_is_refused_by_what_differs(mine, tmp_path, folder):  # noqa: F811
    "Also where a column changed that is only handed on"
    count(mine, tmp_path / "out", folder)
    for options, named in ((dict(prompt="a {text}"), "prompt: old"), (dict(chat=True), "chat: old false")):
        with pytest.raises(InputError, match=named):
            count(mine, tmp_path / "out", folder, **options)
    with pytest.raises(InputError, match="tokenizer.fingerprint"):
        count(mine, tmp_path / "out", "tiny")
    jsonl(tmp_path / "mine.jsonl", TEXTS, stars=[1, 2, 3, 4, 5, 7.5], chars=[len(t) for t in TEXTS])
    with pytest.raises(InputError, match="columns.stars"):
        count(mine, tmp_path / "out", folder)


def never(monkeypatch):
    "Nobody may begin to count"
    monkeypatch.setattr(module, "Job", lambda *_, **__: pytest.fail("the job was begun"))


@pytest.mark.parametrize(
    "error, match, options",
    [
        (InputError, "a text column that exists; got 'txt'", dict(text_column="txt")),
        (InputError, "a column of text; got 'stars', whose cells are double", dict(text_column="stars")),
        (InputError, r"\{text\} in it once", dict(prompt="Say:")),
        (InputError, "no split for a single file", dict(split="train")),
        (InputError, "max_samples of at least 1", dict(max_samples=0)),
        (InputError, "no revision for a folder", dict(revision="main")),
        (InputError, "a column 'charz' with lengths; got none.*near: chars", dict(length_column="charz")),
        (InputError, "whole numbers in column 'stars'; got cells that are double", dict(length_column="stars")),
        (WorldError, "not in the Hub's cache, and the Hub cannot be reached", dict(model="some-lab/some-model")),
        (InputError, "a folder that exists, a Hub id or tiny", dict(model="./nowhere")),
    ],
)
def test_wrong_arguments(mine, tmp_path, folder, monkeypatch, error, match, options):  # noqa: F811
    never(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    jobs = JobOptions(length_column=options.pop("length_column", None))
    with pytest.raises(error, match=match) as caught:
        add_lengths(mine, output_dir=tmp_path / "out", jobs=jobs, **(dict(model=str(folder)) | options))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error, match, content",
    [
        (InputError, "rows without a column 'length'", '{"text": "a", "length": 3}\n'),
        (WorldError, "1 that are null: row 1", '{"text": "a"}\n{"text": null}\n'),
        (WorldError, "1 that are empty: row 0", '{"text": " "}\n{"text": "a"}\n'),
        (WorldError, "at least one row", "\n"),
        (WorldError, "of type int", '{"text": "a"}\n{"text": 3}\n'),
        (InputError, "int64", '{"text": 1}\n'),
    ],
)
def test_wrong_contents(tmp_path, folder, monkeypatch, error, match, content):  # noqa: F811
    never(monkeypatch)
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(error, match=match):
        count(str(tmp_path / "mine.jsonl"), tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template(mine, tmp_path, folder, monkeypatch):  # noqa: F811
    never(monkeypatch)
    plain = tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="a chat template; got none"):
        count(mine, tmp_path / "out", tmp_path / "plain", chat=True)
    assert not (tmp_path / "out").exists()


def test_no_weights_are_read(mine, tmp_path, monkeypatch):
    "A folder with a tokenizer and nothing else will do"
    tokenizer().save_pretrained(tmp_path / "words")
    assert count(mine, tmp_path / "out", tmp_path / "words").complete


def test_a_folder_with_something_in_it_is_left_alone(mine, tmp_path, folder):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    with pytest.raises(WorldError, match="new or empty"):
        count(mine, tmp_path / "out", folder)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["keep.txt"]


def test_a_type_that_has_no_name_is_refused(tmp_path, folder):  # noqa: F811
    pq.write_table(pa.table({"text": ["a"], "price": pa.array([Decimal(1)])}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match="a type that has a name"):
        count(str(tmp_path / "d.parquet"), tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(mine, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["job", "lengths", mine, "--output-dir", out, "--model", "tiny", "--max-batch-size", "2"]) == 0
    assert "6 of 6 rows are done" in capsys.readouterr().out
    assert main(["job", "status", out]) == 0
    explained = ["--output-dir", str(tmp_path / "explained"), "--length-column", "length", "--limit", "1"]
    assert main(["explain", "run", out, *explained, "--device", "cpu", "--answer-tokens", "1"]) == 0
    assert "not very good" in capsys.readouterr().out
    assert main(["job", "lengths", out, "--output-dir", str(tmp_path / "again")]) == 2
    assert "without a column 'length'" in capsys.readouterr().err


def test_results_of_other_runs_are_rows_too(tmp_path):
    "What is not said is not known; a run of texts under names of their own is numbered"

    class Loud(Step):
        schema = pa.schema([("name", pa.string()), ("text", pa.string()), ("index", pa.int64())])

        def process(self, rows):
            return [row["text"].upper() for row in rows]

        def postprocess(self, raw, rows):
            return pa.table([[r["name"] for r in rows], raw, [9] * len(rows)], schema=self.schema)

    data = [{"name": n, "text": t} for n, t in (("b", "fine"), ("a", "good"))]
    Job(data, Loud(), output_dir=tmp_path / "loud", id_column="name", progress=False).run()
    rows = open_rows(str(tmp_path / "loud"))
    assert (rows.name, rows.prompt, rows.model, rows.split) == ("loud", "{text}", "tiny", None)
    assert rows.dataset.to_dict() == {
        "name": ["a", "b"],
        "text": ["GOOD", "FINE"],
        "source_index": [9, 9],
        "index": [0, 1],
    }
    assert np.array(rows.dataset["index"]).dtype == np.int64
