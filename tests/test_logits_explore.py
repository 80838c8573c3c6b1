"""`logits explore`: what is planted is found, what is shared out adds up, and a page that nothing can break out of."""

import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import datasets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from llm_analysis.cli import main
from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs.footer import options
from llm_analysis.lm.model import load_tokenizer
from llm_analysis.logits import v1, v2
from llm_analysis.logits.calibration import calibration, expected_error
from llm_analysis.logits.chunks import CHUNK, Spread, chunk_of, chunks, gather
from llm_analysis.logits.explore import coloured, explore, look, target_values
from llm_analysis.logits.explored import Counts, Profile, summary
from llm_analysis.logits.picked import Picked
from llm_analysis.logits.run import extract
from llm_analysis.logits.sizes import Bytes, Nuclei, column_bytes, nucleus_sizes
from llm_analysis.logits.store import LogitStore
from llm_analysis.logits.texts import Reading

matplotlib.use("Agg")
torch.set_num_threads(1)
V = 12
ASKED = dict(model="tiny", max_samples=16, route="padded")
ABOUT = v2.describe(V, more=dict(model="made", template=None))


def whole(p: np.ndarray, came: np.ndarray) -> Picked:
    "Distributions, every entry of them exact"
    n, order = len(p), np.argsort(-p, axis=1, kind="stable")
    logp, none = np.log(np.take_along_axis(p, order, 1)), np.zeros(n)
    entropy, target = -(p * np.log(p)).sum(1), np.log(p[np.arange(n), came])
    each = [np.full(n, V, np.int32), np.zeros(n, np.int32), none, none, np.full(n, -np.inf)]
    small = [x.astype(np.float32) for x in (entropy, target, none)]
    return Picked(
        order.ravel().astype(np.int32), logp.ravel().astype(np.float32), *each, *small, np.zeros((n, 3), "f")
    )


def planted(rng: np.random.Generator, rows: int, targets: int, sharp: float = 1.0) -> list[v2.Sample]:
    "Tokens drawn from known distributions; the teacher says these to the power `sharp`"
    found = []
    for i in range(rows):
        true = rng.dirichlet(np.full(V, 0.4), targets) * 0.98 + 0.02 / V
        came = np.array([rng.choice(V, p=p) for p in true])
        said = true**sharp / (true**sharp).sum(1, keepdims=True)
        ids = np.append(0, came).astype(np.int32)
        found.append(v2.Sample(i, ids, np.arange(1, targets + 1), whole(said, came)))
    return found


def stored(folder: Path, samples: list[v2.Sample], about: dict = ABOUT, parts: int = 2) -> LogitStore:
    "A store of these rows"
    folder.mkdir()
    cuts = np.linspace(0, len(samples), parts + 1).astype(int)
    for k, (a, b) in enumerate(pairwise(cuts)):
        table = v2.table([v2.encode(s, about) for s in samples[a:b]], about)
        pq.write_table(table, folder / f"part-{k}.parquet", **options(table.schema))
    return LogitStore(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "Stores of the tiny teacher in both formats"
    room = tmp_path_factory.mktemp("made")
    for form in ("v2", "v1"):
        extract("tiny/chat", output_dir=room / form, format=form, **ASKED)
    return room


class Reader(HTMLParser):
    "Tags, attributes and text of a page"

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.sources, self.said, self.open = [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "action", "data")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


def test_a_calibrated_teacher_and_a_sharpened_one(tmp_path):
    rng = np.random.default_rng(5)
    good = calibration(stored(tmp_path / "good", planted(rng, 40, 300)))
    bad = calibration(stored(tmp_path / "bad", planted(rng, 40, 300, sharp=2.0)))
    for bins in (good.top, good.kept):
        gap, stderr = bins.gaps
        assert np.nanmax(np.abs(gap) / stderr) < 4 and bins.count.sum() == (12_000 if bins is good.top else 12_000 * V)
    assert abs(good.excess.mean) < 4 * good.excess.sem and good.kept.came.sum() == 12_000
    assert expected_error(good.top).value < 3 * expected_error(good.top).noise
    assert np.nanmax(np.abs(bad.top.gaps[0]) / bad.top.gaps[1]) > 8 and bad.excess.mean > 10 * bad.excess.sem
    gap = expected_error(bad.top)
    assert gap.value - 4 * gap.stderr > expected_error(good.top).value + 4 * gap.noise


def test_chunks_make_no_difference(tmp_path, monkeypatch):
    store = stored(tmp_path / "s", planted(np.random.default_rng(1), 30, 20), parts=4)
    columns = column_bytes(store)
    kinds = [Counts.of, Profile.of, lambda c: Bytes.of(c, columns), lambda c: Nuclei.of(c, (0.5, 0.9))]
    once = gather(kinds, chunks(store))
    assert CHUNK > 600
    monkeypatch.setattr("llm_analysis.logits.chunks.CHUNK", 45)
    pieces = list(chunks(store))
    often = gather(kinds, pieces)
    assert len(pieces) > 9 and {s.index for c in pieces for s in c.samples} == set(range(30))
    assert often[0].spreads["entropy, nats"].counts.tolist() == once[0].spreads["entropy, nats"].counts.tolist()
    assert often[3].to_frame().equals(once[3].to_frame()) and often[0].reached == once[0].reached == 600
    assert often[2].totals == pytest.approx(once[2].totals) and len(often[2].rows) == 24


@pytest.mark.parametrize("form", ["v2", "v1"])
def test_shares_of_bytes_add_up_to_the_columns(made, form):
    store = LogitStore(made / form)
    columns, found = column_bytes(store), look(store, rows=0).nbytes
    kinds = columns.by_kind()
    assert columns.files == sum(p.stat().st_size for p in (made / form / "data").glob("*.parquet"))
    assert found.totals == pytest.approx({k: kinds[k] for k in found.totals}, rel=1e-9)
    assert found.spread.total == pytest.approx(kinds["exact"] + kinds["lots"] + kinds["fixed"])
    assert columns.targets == found.targets == sum(len(s.picked) for s in store) and kinds["footers"] > 0


def test_a_nucleus_is_told_only_where_it_is_known(tmp_path):
    samples = planted(np.random.default_rng(3), 10, 50)
    store = stored(tmp_path / "s", samples)
    p = np.concatenate([np.sort(np.exp(s.picked.logp.astype(float)).reshape(-1, V))[:, ::-1] for s in store])
    found = nucleus_sizes(store, (0.5, 0.9))
    for mass, spread, beyond in zip(found.top_p, found.sizes, found.beyond):
        plain = [int(np.searchsorted(np.cumsum(row), mass)) + 1 for row in p]
        assert beyond == 0 and spread.counts.tolist() == np.bincount(plain).tolist()
    three = [  # the three largest only
        Picked(
            s.picked.ids.reshape(-1, V)[:, :3].ravel(), s.picked.logp.reshape(-1, V)[:, :3].ravel(),
            np.full(50, 3, np.int32), *(getattr(s.picked, k) for k in ("sampled", "tau", "logsumexp")),
            np.log1p(-np.exp(s.picked.logp.reshape(-1, V)[:, :3].astype(float)).sum(1)),
            s.picked.entropy, s.picked.target, s.picked.error,
        )
        for s in samples
    ]  # fmt: skip
    cut = Nuclei.of(chunk_of([v2.Sample(0, None, None, three[0])]), (0.9,))
    held = np.exp(three[0].logp.astype(float)).reshape(-1, 3).sum(1)
    assert cut.beyond == (int((held < 0.9).sum()),) and cut.sizes[0].count == int((held >= 0.9).sum()) > 0


def test_spread_against_numpy():
    x = np.random.default_rng(0).gamma(2.0, 1.0, 3001)
    found = Spread.of(x[:1000], 1 / 64) + Spread.of(x[1000:], 1 / 64)
    assert found.mean == pytest.approx(x.mean()) and (found.least, found.most) == (x.min(), x.max())
    for q in (0.0, 0.01, 0.5, 0.99, 1.0):
        assert abs(found.quantile(q) - np.quantile(x, q, method="inverted_cdf")) <= 1 / 128 + 1e-12


@pytest.fixture
def undrawn(monkeypatch):
    "Pages without their figures, which take most of the time"
    monkeypatch.setattr("llm_analysis.logits.explore._picture", lambda ax, said: plt.close(ax.figure) or "")


def test_the_text_cannot_act(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("tiny").tokenizer
    said = '<script>alert(1)</script> </bdi>" onload="x &amp; \t'
    ids = np.array(tokenizer(said)["input_ids"], np.int32)
    p = np.full((len(ids) - 1, V), 1 / V)
    sample = v2.Sample(0, ids, np.arange(1, len(ids)), whole(p, np.zeros(len(p), int)), "<b>&")
    about = v2.describe(2048, id="string", more=dict(model="tiny", template=None))
    store = stored(tmp_path / "<i>", [sample], about, parts=1)
    for by in ("probability", "entropy", "bytes"):
        html = explore(store.name, output=tmp_path / "page.html", colour=by).path.read_text()
        page = Reader(html)
        assert not page.open and not {"script", "i", "b", "iframe", "link"} & set(page.tags)
        assert "<script>alert(1)</script>" in page.said.replace("␣", " ") and "<b>&" in page.said and "⇥" in page.said
        assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
        assert 'name="viewport"' in html and "default-src 'none'" in html
        picture = '<img alt="" src="data:image/png;base64,">'
        monkeypatch.setattr("llm_analysis.logits.explore._picture", lambda ax, _, p=picture: plt.close(ax.figure) or p)


def test_v1_says_less_and_with_its_data_set_more(made, tmp_path, undrawn):
    store = LogitStore(made / "v1")
    with pytest.raises(InputError, match="a store that says which tokens came; got the format v1"):
        calibration(store)
    with pytest.raises(InputError, match="rising positions in row"):
        calibration(store, texts=lambda index: (np.zeros(9, int), np.arange(1, 3)))
    assert main(["logits", "explore", str(made / "v1"), "--no-text", "--output", str(tmp_path / "bare.html")]) == 0
    bare = look(store, rows=0)
    assert bare.calibration is None and np.isnan(bare.summary.perplexity) and bare.summary.counts.seen == 0
    assert all(s.unknown == bare.summary.counts.targets for s in bare.profile.whole().values())
    assert "--dataset" in (tmp_path / "bare.html").read_text() and "not known" in str(bare)
    assert "none was asked for" in (tmp_path / "bare.html").read_text()
    more = explore(made / "v1", dataset="tiny/chat", rows=16, output=tmp_path / "more.html").found
    assert more.calibration.unseen == 0 and (tmp_path / "more.html").read_text().count("<article>") == 16
    ours = {s.index: s for s in LogitStore(made / "v2")}
    for sample, nbytes in more.shown.rows:
        mine = ours[sample.index]
        assert sample.input_ids.tolist() == mine.input_ids.tolist()
        p, q = (target_values(s, nbytes, "probability") for s in (sample, mine))
        assert np.allclose(q[mine.positions], np.exp(mine.picked.target)) and np.isfinite(q).sum() == len(
            mine.positions
        )
        known = np.isfinite(p)
        assert known.any() and np.allclose(p[known], q[known], atol=2e-3)


def test_no_rows_and_rows_without_targets(tmp_path, undrawn):
    none = explore(stored(tmp_path / "none", [], parts=1).name, text=False)
    assert none.found.summary.counts.rows == 0 and "no target to look at" in none.path.read_text()
    empty = whole(np.zeros((0, V)), np.zeros(0, int))
    blank = [v2.Sample(k, np.zeros(3, np.int32), np.zeros(0, np.int64), empty) for k in (50, 51)]
    samples = [blank[0], *planted(np.random.default_rng(0), 3, 9), blank[1]]
    found = explore(stored(tmp_path / "some", samples, parts=3).name, text=False).found
    assert (found.summary.counts.rows, found.summary.counts.empty, found.summary.counts.targets) == (5, 2, 27)
    assert found.calibration.top.count.sum() == 27 and "2 of these rows have none" in str(found)
    only = explore(stored(tmp_path / "only", blank, parts=1).name, text=False)
    assert only.found.summary.counts.empty == 2 and "no target to look at" in only.path.read_text()


def test_what_cannot_be_done_is_refused_first(made, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_analysis.logits.explore.look", lambda *a, **k: pytest.fail("work before the refusal"))
    other = tmp_path / "template.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    wrong = {
        "rows of at least 0": dict(rows=-1),
        "max_samples of at least 1": dict(max_samples=0),
        "probabilities between 0 and 1": dict(top_p=(0.5, 1.5)),
        "the template .* of the store; got": dict(chat_template=other),
        "a template file": dict(chat_template=tmp_path / "none.jinja"),
        "ends in .html": dict(output=tmp_path),
        "a folder that can be written": dict(output=tmp_path / "none" / "x.html"),
        "--no-text": dict(model=str(tmp_path / "nothing")),
    }
    for why, how in wrong.items():
        with pytest.raises((InputError, WorldError), match=why):
            explore(made / "v2", **{"output": tmp_path / "x.html", **how})
    with pytest.raises(InputError, match="check the path"):
        explore(tmp_path / "nowhere")
    assert not list(tmp_path.glob("*.html"))


def test_the_command_leaves_a_run_as_it_was(made, tmp_path, capsys, undrawn):
    out = shutil.copytree(made / "v2", tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    told = ["--top-p", "0.5,0.9", "--rows", "2", "--max-samples", "5", "--seed", "3"]
    assert main(["logits", "explore", str(out), *told]) == 0
    said = capsys.readouterr().out
    assert "5 of" in said and "seed 3" in said and "expected calibration error" in said
    assert said.strip().endswith("explore.html") and "\x1b" not in said
    page = (out / "explore.html").read_text()
    assert page.count("<article>") == 2 and "chosen at random with seed 3" in page and str(tmp_path) not in page
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "explore.html"} == before
    rows = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(rows) == len(LogitStore(out)) and extract("tiny/chat", output_dir=out, **ASKED).left == 0
    assert main(["logits", "explore", str(out), "--colour", "green"]) == 2
    assert re.search("colour|probability", capsys.readouterr().err)


def test_a_store_of_texts_has_no_template(tmp_path, undrawn):
    data = tmp_path / "t.jsonl"
    data.write_text('{"text": "The cat sat."}\n{"text": "A dog ran off."}\n')
    extract(str(data), model="tiny", output_dir=tmp_path / "run", reading=Reading(text_column="text"))
    found = explore(tmp_path / "run", rows=2)
    assert found.path.read_text().count("<article>") == 2
    other = tmp_path / "template.jinja"
    other.write_text("{{ messages }}")
    with pytest.raises(InputError, match="the template None of the store"):
        explore(tmp_path / "run", chat_template=other)
    one = LogitStore(tmp_path / "run")
    tokenizer = load_tokenizer("tiny").tokenizer
    html = coloured(one[0], tokenizer)
    assert html.count("title=") == len(one[0].positions) and "cat" in html
    assert v1.noted(pq.read_schema(one.paths[0]))["template"] is None
    assert summary(one).counts.seen == len(one[0].positions) + len(one[1].positions)
