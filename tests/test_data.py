"""Opening rows: every format gives back what was written, every kind of bad input has its one line"""

import csv
import json
from pathlib import Path
from unittest.mock import MagicMock

import datasets
import pytest
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_analysis
from llm_analysis.core import InputError, WorldError
from llm_analysis.data import open_rows, presets

TEXTS = ["good, really", 'she said "no"\nand left', "  über {text} 🙂 ", "NA", "null", "007"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    "An empty cache of `datasets` in place of the user's"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def no_hub(monkeypatch):
    "A Hub that must not be asked"

    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(HfApi, "dataset_info", asked)
    monkeypatch.setattr(datasets, "load_dataset", asked)


def store(folder: Path, kind: str, texts: list[str]) -> Path:
    "`texts` and their labels in a file or folder of this kind"
    path, table = folder / f"mine.{kind}", Dataset.from_dict({"text": texts, "label": list(range(len(texts)))})
    if kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as f:
            writer = csv.writer(f, delimiter="," if kind == "csv" else "\t")
            writer.writerows([["text", "label"], *([t, i] for i, t in enumerate(texts))])
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(table.to_list(), indent=1), encoding="utf-8")
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "saved":
        table.save_to_disk(path)
    else:
        (path / "data").mkdir(parents=True)
        table.to_parquet(path / "data/train-00000-of-00001.parquet")
    return path


KINDS = ["csv", "tsv", "jsonl", "json", "parquet", "saved", "shards"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_back_what_was_written_and_leaves_nothing_behind(tmp_path, cache, kind):
    path = store(tmp_path, kind, TEXTS)
    before = sorted(tmp_path.rglob("*"))
    rows = open_rows(str(path))
    assert rows.dataset["text"][:] == TEXTS and rows.dataset["index"][:] == list(range(len(TEXTS)))
    assert (rows.name, rows.model, rows.labels) == (path.stem if path.is_file() else path.name, "tiny", None)
    assert any("tiny" in note for note in rows.notes)
    for n in (1, 4, 99):
        assert open_rows(str(path), max_samples=n, model="m").dataset.to_dict() == rows.dataset[:n]
    assert sorted(tmp_path.rglob("*")) == before


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1))
def test_any_text_survives(tmp_path_factory, texts):
    texts = [t if t.strip() else "x" for t in texts]
    folder = tmp_path_factory.mktemp("any")
    for kind in ("csv", "tsv", "jsonl", "json"):
        assert open_rows(str(store(folder, kind, texts))).dataset["text"][:] == texts


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    for name, content in [("a.csv", "text\na\n"), ("a.jsonl", '{"text": "a"}\n')]:
        (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
        assert open_rows(str(tmp_path / name)).dataset["text"][:] == ["a"]


BROKEN = {
    "empty.csv": ("", WorldError, "empty"),
    "header.csv": ("text,label\n", WorldError, "at least one row"),
    "short.csv": ("text,label\na,1\nb\n", WorldError, "line 3"),
    "long.csv": ("text,label\na,1,2\n", WorldError, "line 2"),
    "quote.csv": ('text,label\na,1\n"b,2\n', WorldError, "line 3"),
    "one.csv": ('text\na\n"b\n', WorldError, "unexpected end"),
    "twice.csv": ("text,text\na,b\n", WorldError, "different names"),
    "blank.csv": ("text,label\na,1\n,2\n  ,3\nb,4\n", WorldError, "2 that are empty: row 1, row 2"),
    "semicolon.csv": ("text;label\na;1\n", WorldError, "commas"),
    "two.csv": ("question,answer\na,b\n", InputError, "'question', 'answer'"),
    "numbers.csv": ("a,b\n1,2\n", InputError, "'a', 'b'"),
    "latin.csv": ("text\ncafé\n".encode("latin-1"), WorldError, "UTF-8"),
    "zip.csv": (b"PK\x03\x04\x00\xff\xfe", WorldError, "zip.csv"),
    "line.jsonl": ('{"text": "a"}\n{"text": "b"\n', WorldError, "line 2"),
    "array.jsonl": ('{"text": "a"}\n["b"]\n', WorldError, "line 2"),
    "mixed.jsonl": ('{"text": "a"}\n{"text": 3}\n', WorldError, "row 1 of type int"),
    "missing.jsonl": ('{"text": "a"}\n{"txt": "b"}\n', WorldError, "1 that are null: row 1"),
    "number.jsonl": ('{"text": 1}\n', InputError, "int64"),
    "rows.json": ('[{"text": "a"}, 1]', WorldError, "item 1"),
    "open.json": ('[\n{"text": "a"},\n', WorldError, "line"),
    "none.json": ("[]", WorldError, "at least one row"),
    "empty.jsonl": ("\n\n", WorldError, "at least one row"),
    "torn.parquet": (b"PAR1 torn", WorldError, "torn.parquet"),
    "zero.parquet": (b"", WorldError, "empty"),
    "model.pkl": (b"\x80\x04.", InputError, "run code"),
    "model.pt": (b"\x80\x04.", InputError, "run code"),
    "rows.txt": ("a\n", InputError, ".jsonl"),
    "rows.xlsx": (b"PK", InputError, ".parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, no_hub, name):
    content, error, words = BROKEN[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(error) as e:
        open_rows(str(tmp_path / name))
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved", "shards"])
def test_empty_texts_are_refused_in_every_format_but_only_among_the_rows_taken(tmp_path, cache, kind):
    path = str(store(tmp_path, kind, ["a", "b", " ", ""]))
    with pytest.raises(WorldError, match="2 that are empty: row 2, row 3"):
        open_rows(path)
    assert len(open_rows(path, max_samples=2)) == 2


@pytest.mark.parametrize(
    "case, words",
    [
        (dict(dataset="tiny/revews"), "tiny/reviews"),
        (dict(dataset="tiny"), "tiny world"),
        (dict(dataset=""), "expected a file"),
        (dict(dataset="imdb", model="m"), "stanfordnlp/imdb"),
        (dict(dataset="revews.csv"), "reviews.csv"),
        (dict(dataset="no/such/reviews.csv"), "expected a file"),
        (dict(dataset="stanfordnlp/sst2"), "--model"),
        (dict(dataset="my/folder"), "no file here"),
        (dict(dataset="tiny/reviews", max_samples=0), "at least 1"),
        (dict(dataset="tiny/reviews", max_samples=-3), "at least 1"),
        (dict(dataset="tiny/reviews", split="test"), "train, validation"),
        (dict(dataset="tiny/reviews", text_column="txt", max_samples=2), "'text'"),
        (dict(dataset="tiny/reviews", text_column="label", max_samples=2), "int64"),
        (dict(dataset="reviews.csv", split="train"), "single file"),
        (dict(dataset="reviews.csv", text_column="txt"), "'text', 'label'"),
        (dict(dataset="reviews.csv", model=" "), "name of a model"),
    ],
)
def test_wrong_arguments_never_reach_the_hub(tmp_path, monkeypatch, no_hub, case, words):
    store(tmp_path, "csv", ["a"]).rename(tmp_path / "reviews.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as e:
        open_rows(**case)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_the_only_text_column_is_taken_aloud_and_an_index_is_kept(tmp_path):
    Dataset.from_dict({"index": [5, 6], "review": ["a", "b"], "n": [1, 2]}).to_parquet(tmp_path / "r.parquet")
    rows = open_rows(str(tmp_path / "r.parquet"), model="m")
    assert rows.text_column == "review" and any("'review'" in note for note in rows.notes)
    assert rows.dataset["source_index"][:] == [5, 6] and rows.dataset["index"][:] == [0, 1]


def test_folders_with_several_splits(tmp_path, cache):
    table = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    (
        table.to_parquet(tmp_path / "files/train-0.parquet"),
        table.select([1]).to_parquet(tmp_path / "files/test-0.parquet"),
    )
    for name in ("saved", "files"):
        with pytest.raises(InputError, match="--split: .*test"):
            open_rows(str(tmp_path / name))
        rows = open_rows(str(tmp_path / name), split="test")
        assert rows.dataset["text"][:] == ["b"] and rows.split == "test"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(WorldError, match="nothing"):
        open_rows(str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["tiny/reviews", "tiny/news", "tiny/facts", "TINY/Reviews"])
def test_tiny_worlds_have_what_their_presets_promise(no_hub, name):
    rows = open_rows(name, max_samples=20)
    preset = presets()[name.lower()]
    assert (rows.text_column, rows.model, len(rows)) == (preset.text, "tiny", 20)
    assert "{text}" in rows.prompt and rows.fill("a {b}").count("a {b}") == 1 and "{" not in rows.fill("x")
    for column in (rows.label_column, rows.planted_column):
        assert column is None or column in rows.dataset.column_names
    assert rows.labels is None or set(rows.dataset[rows.label_column][:]) <= set(range(len(rows.labels)))
    assert open_rows(name, max_samples=3).dataset.to_dict() == rows.dataset[:3]


def test_presets_file_names_nothing_twice():
    text = (Path(llm_analysis.__file__).parent / "assets/presets.yaml").read_text()
    names = [line.split(":")[0].lower() for line in text.splitlines() if line[:1] not in ("", "#", " ")]
    assert len(names) == len(set(names)) == len(yaml.safe_load(text))


def hub(monkeypatch, asked=None, loaded=None):
    "A made Hub: `asked` is raised when it is asked for a data set, `loaded` is raised or returned when it is loaded"
    calls = []

    def info(self, name, **kwargs):
        calls.append(name)
        if asked:
            raise asked

    def load(name, subset=None):
        calls.append((name, subset, datasets.config.HF_HUB_OFFLINE))
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    monkeypatch.setattr(HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


SST2 = Dataset.from_dict({"sentence": ["fine"], "label": [1]})


def test_the_hub_is_asked_once_and_presets_fill_the_rest(monkeypatch):
    calls = hub(monkeypatch, loaded=DatasetDict(train=SST2, validation=SST2))
    rows = open_rows("StanfordNLP/SST2", model="gpt2")
    assert calls == ["stanfordnlp/sst2", ("stanfordnlp/sst2", None, False)]
    assert (rows.split, rows.text_column, rows.labels) == ("validation", "sentence", (" negative", " positive"))
    assert (rows.name, rows.model, rows.notes) == ("stanfordnlp/sst2", "gpt2", ())
    assert open_rows("stanfordnlp/sst2", model="gpt2", split="train").split == "train"


def test_other_data_sets_of_the_hub(monkeypatch):
    calls = hub(monkeypatch, loaded=DatasetDict(train=SST2))
    rows = open_rows("nyu-mll/glue:sst2", model="m")
    assert calls[-1][:2] == ("nyu-mll/glue", "sst2") and rows.text_column == "sentence" and rows.prompt == "{text}"


ANSWER = MagicMock(headers={}, status_code=404)


@pytest.mark.parametrize(
    "asked, loaded, error, words",
    [
        (RepositoryNotFoundError("no", response=ANSWER), None, InputError, "did you mean stanfordnlp/sst2"),
        (GatedRepoError("no", response=ANSWER), None, WorldError, "access"),
        (ConnectionError("no route"), ConnectionError("down"), WorldError, "not in this machine's cache"),
        (TimeoutError("slow"), FileNotFoundError("none"), WorldError, "TimeoutError"),
        (None, ValueError("Config name is missing.\nPick one of ['a', 'b']"), InputError, ":SUBSET"),
        (None, RuntimeError("Dataset scripts are no longer supported"), WorldError, "scripts"),
        (None, DatasetDict(train=SST2, test=SST2), InputError, "train, test"),
    ],
)
def test_a_hub_that_does_not_help(monkeypatch, asked, loaded, error, words):
    before = datasets.config.HF_HUB_OFFLINE
    hub(monkeypatch, asked, loaded)
    with pytest.raises(error) as e:
        open_rows("stanfordnlp/sst", model="m")
    assert words in str(e.value) and "\n" not in str(e.value)
    assert datasets.config.HF_HUB_OFFLINE is before


def test_offline_rows_come_from_the_cache(tmp_path, cache, monkeypatch):
    "A cache entry as `datasets` lays it out, made by loading the same table from a file"
    SST2.to_parquet(tmp_path / "v.parquet")
    datasets.load_dataset(
        "parquet", data_files={"validation": str(tmp_path / "v.parquet")}, cache_dir=str(tmp_path / "c")
    )
    made = next((tmp_path / "c").rglob("dataset_info.json")).parent
    entry = cache / "stanfordnlp___sst2/default/0.0.0" / ("a" * 40)
    entry.parent.mkdir(parents=True)
    made.rename(entry)
    for arrow in entry.glob("parquet-*.arrow"):
        arrow.rename(entry / arrow.name.replace("parquet-", "sst2-"))
    monkeypatch.setattr(HfApi, "dataset_info", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    rows = open_rows("stanfordnlp/sst2", model="m")
    assert rows.dataset["sentence"][:] == ["fine"] and rows.split == "validation"
    with pytest.raises(InputError, match="train"):
        open_rows("stanfordnlp/sst2", model="m", split="train")
