"""The compatible store by the earlier tool's names, and rows from and to the formats of others."""

import json
import struct
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loopback_hub import point, serve
from transformers import AutoTokenizer

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs.footer import options
from llm_analysis.lm.model import TINY
from llm_analysis.logits.convert import (
    Logprob,
    from_axolotl,
    from_distillkit,
    from_v1,
    from_vllm,
    to_axolotl,
    to_distillkit,
    to_v1,
    to_vllm,
)
from llm_analysis.logits.distillkit import Layout, pack_bits, to_bytes, unpack_bits, values
from llm_analysis.logits.nucleus import Nucleus
from llm_analysis.logits.picked import Picked, concatenate, estimate, take
from llm_analysis.logits.reader import (
    analyze_nucleus_sizes,
    analyze_token_probabilities,
    dequantize_logits,
    dequantize_sampled_logits,
    dequantize_top_logits,
    get_sample,
    load_logit_dataset,
    logits_to_probs,
    print_sample_info,
    read_about,
    sample_of,
    unpack_indices,
    visualize_conversation_probabilities,
)
from llm_analysis.logits.run import extract
from llm_analysis.logits.select import VarOpt, uniforms
from llm_analysis.logits.v1 import SCHEMA, decode, describe, encode, table

same = np.testing.assert_equal
pick_out = lambda picked, which: take(picked, np.asarray(which, dtype=int))
SIZE = 300


def teacher(seed, tokens, size=SIZE):
    "Logits of some tokens, from nearly certain to nearly flat, and their log-probabilities"
    rng = np.random.default_rng(seed)
    slope = rng.choice([0.5, 1.5, 4.0, 40.0], (tokens, 1))
    fall = -slope * np.log(np.arange(1, size + 1)) + rng.normal(0, 0.3, (tokens, size))
    logits = torch.from_numpy(rng.permuted(fall, axis=1).astype(np.float32))
    return logits, logits.double().log_softmax(1).numpy()


def picks(seed, tokens, rule=None, shift=0):
    "What is kept of them, ids moved up by `shift`"
    logits, truth = teacher(seed, max(tokens, 1))
    found = (rule or Nucleus(tail=8)).pick(logits, uniforms(0, seed, range(max(tokens, 1))))
    found = pick_out(found, np.arange(tokens))
    return replace(found, ids=(found.ids + shift).astype(np.int32)), truth[:tokens]


def store(folder, rows, about):
    "A run's output folder: parts under data/, its own notes beside"
    (folder / "data").mkdir(parents=True)
    (folder / "_job").mkdir()
    pq.write_table(pa.table({"row": [0], "length": [3]}), folder / "_job" / "plan.parquet")
    for k, row in enumerate(rows):
        data = table([row], about)
        pq.write_table(data, folder / "data" / f"part-{k:05d}-00000000.parquet", **options(data.schema))
    return folder


@pytest.fixture
def opened(tmp_path):
    "Opens a store into a cache of the test's own"
    return lambda path, *a: load_logit_dataset(path, *a, cache_dir=str(tmp_path / "cache"))


# samples


def agree(sample, picked, truth, shift=0):
    "Ids are those that were kept, and probabilities the teacher's to within half a step"
    tops, lots = dequantize_top_logits(sample), dequantize_sampled_logits(sample)
    assert len(tops) == len(lots) == sample["num_tokens"] == len(picked)
    for t in range(len(picked)):
        one = pick_out(picked, [t])
        for kind, logits, there in (("top", tops[t], ~one.by_lot), ("sampled", lots[t], one.by_lot)):
            ids = sample[f"{kind}_indices"][t]
            same(ids, one.ids[there])
            if not len(ids):
                continue
            step = (sample[f"{kind}_max"][t] - sample[f"{kind}_min"][t]) / 65_535
            off = np.log(logits_to_probs(logits, sample["logsumexp"][t])) - truth[t][ids - shift]
            assert np.abs(off).max() <= step / 2 + 4e-6  # and float32
            same(dequantize_logits(sample[f"{kind}_logits_quantized"][t], *(sample[f"{kind}_{x}"][t] for x in ("min", "max"))), logits)  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.integers(0, 6),
    st.integers(0, 9),
    st.sampled_from([0, 262_144 - SIZE, 262_208 - SIZE, 290_943 - SIZE]),
)
@example(0, 0, 8, 0)
def test_probabilities_of_a_sample_are_the_teachers(seed, tokens, tail, shift):
    picked, truth = picks(seed, tokens, Nucleus(tail=tail), shift)
    about = describe(SIZE + shift, threshold=tail > 0)
    assert about["index_high_bits"] == (2 if SIZE + shift <= 1 << 18 else 4)
    data = table([encode(5, picked, about)], about)
    sample = sample_of(data.to_pylist()[0], about)
    assert (sample["index"], sample["num_tokens"]) == (5, tokens)
    agree(sample, picked, truth, shift)
    assert all(len(x) == tail for x in sample["sampled_indices"])
    assert ("sampled_threshold" in sample) == (tail > 0)
    row = data.to_pylist()[0]
    flat = np.concatenate([np.zeros(0, np.int32), *sample["top_indices"]])
    same(unpack_indices(row["top_indices_low"], row["top_indices_high"], about["index_high_bits"]), flat)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([0.5, 0.9, 0.98]), st.sampled_from([1, 20, 280]))
def test_the_nucleus_is_the_smallest_set(seed, top_p, most):
    picked, truth = picks(seed, 5, Nucleus(top_p, most, tail=8))
    about = describe(SIZE, most=most)
    sample = sample_of(table([encode(0, picked, about)], about).to_pylist()[0], about)
    for ids, logp in zip(sample["top_indices"], truth):
        p = np.exp(logp[ids])
        assert p.sum() >= top_p - 1e-9 or len(ids) == most
        assert p[:-1].sum() < top_p + 1e-9
        assert p.min() >= np.delete(np.exp(logp), ids).max()  # no likelier one was left out
    sizes = [len(x) for x in sample["top_indices"]]
    assert about["top_counts"] == ("uint8" if most < 256 else "uint16") and max(sizes) <= most


def test_more_than_255_entries_through_a_file(tmp_path, opened):
    picked, truth = picks(3, 8, Nucleus(0.999, 280, tail=4))
    assert picked.exact.max() > 255
    about = describe(SIZE, most=280)
    data = opened(store(tmp_path / "run", [encode(0, picked, about)], about))
    agree(get_sample(data, 0), picked, truth)
    same(analyze_nucleus_sizes(data).sizes, picked.exact)


@pytest.mark.parametrize("vocab", [262_144, 262_208, 290_943])
def test_the_last_ids_of_large_vocabularies(tmp_path, opened, vocab):
    picked, truth = picks(1, 4, shift=vocab - SIZE)
    about = describe(vocab)
    data = opened(store(tmp_path / "run", [encode(0, picked, about)], about))
    agree(get_sample(data, 0), picked, truth, vocab - SIZE)
    with pytest.raises(InputError, match="numbers below 262,?144"):
        encode(0, replace(picked, ids=picked.ids - vocab + SIZE + 262_144), describe(262_144))
    if vocab > 262_144:  # without the metadata two bits would be assumed: refused, not read as other ids
        with pytest.raises(WorldError, match="index_high_bits"):
            sample_of(data.with_format(None)[0], about | {"index_high_bits": 2})
        with pytest.raises(InputError, match="says how it is packed"):
            get_sample(datasets.Dataset(data.data.table), 0)


# the earlier tool's own files


@pytest.mark.parametrize("nothing", [(np.nan, np.nan), (0, 0), (np.inf, -np.inf)])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_files_of_the_earlier_tool(tmp_path, opened, nothing):
    "No metadata, no threshold, empty nuclei (the crossing entry was dropped), one entry as 0/0, a row without tokens"
    picked, truth = picks(2, 3, Nucleus(0.9, tail=4))
    picked = replace(picked, kappa=None)
    ids = np.concatenate([pick_out(picked, [0]).ids[: 1 - 5], [7]])[:1]
    one = Picked(ids, truth[0][ids].astype(np.float32), np.array([1]), np.array([0]), *np.zeros((6, 1)))
    old = describe(SIZE, threshold=False)
    rows = [encode(0, picked, old), encode(1, pick_out(picked, []), old), encode(2, one, old)]
    rows[2] |= {"top_logits_quantized": np.array([777], np.uint16)}  # 0/0, cast
    lots = pick_out(picked, [1])
    drawn = replace(lots, ids=lots.ids[-4:], logp=lots.logp[-4:], exact=np.array([0], np.int32))
    rows.append(encode(3, drawn, old) | {"top_min": np.float32(nothing[:1]), "top_max": np.float32(nothing[1:])})
    plain = pa.Table.from_pylist([{n: r[n] for n in SCHEMA.names} for r in rows], SCHEMA)
    assert plain.schema.metadata is None
    pq.write_table(plain, tmp_path / "train.parquet")
    data = opened(tmp_path / "train.parquet")
    agree(get_sample(data, 0), picked, truth)
    empty, single, bare = (get_sample(data, i) for i in (1, 2, 3))
    assert empty["num_tokens"] == 0 and empty["top_indices"] == [] == dequantize_top_logits(empty)
    assert dequantize_top_logits(single, 0).tolist() == [np.float64(np.float32(truth[0][ids[0]]))]
    assert single["sampled_indices"][0].size == 0
    assert bare["top_indices"][0].size == 0 == dequantize_top_logits(bare)[0].size
    same(bare["sampled_indices"][0], lots.ids[-4:])
    found = analyze_nucleus_sizes(data, batch_size=3)
    same(found.sizes, [*picked.exact, 1, 0])
    assert found.mass[-1] == 0 and found.rows == 4
    assert found.shares().sum() == pytest.approx(1) and found.shares()["0"] == pytest.approx(1 / 5)
    weights = decode(data.with_format(None)[0], read_about([tmp_path / "train.parquet"])).weights()
    assert np.isnan(weights[picked.by_lot]).all() and np.isfinite(weights[~picked.by_lot]).all()
    seen = analyze_token_probabilities(bare, [3, 5], [1])
    assert seen.kept[0] == "no" and seen.most[0] == 1 and seen["size"][0] == 0


# opening


@pytest.fixture
def run(tmp_path):
    "A run's folder of four rows, its picks and truths"
    about = describe(290_943, more={"model": "made"}, id="string")
    made = [picks(i, 3 + i, shift=290_943 - SIZE) for i in range(4)]
    rows = [encode(i, p, about, id=f"r{i}") for i, (p, _) in enumerate(made)]
    return store(tmp_path / "run", rows, about), made, about


def test_a_folder_a_part_and_every_way_to_hand_it_on(run, opened, tmp_path):
    folder, made, about = run
    data = opened(folder)
    assert len(data) == 4 and json.loads(data.info.description) == about
    for i, (picked, truth) in enumerate(made):
        agree(get_sample(data, i), picked, truth, 290_943 - SIZE)
        assert get_sample(data, i)["id"] == f"r{i}"
    want = get_sample(data, 2)
    pq.write_table(
        pa.table({"note": [1]}), folder / "notes.parquet"
    )  # where there is data/, nothing else is looked at
    same(get_sample(opened(folder), 2), want)
    data.select([2]).save_to_disk(tmp_path / "saved")
    ways = [data.with_format(k).select([0, 2]) for k in ("numpy", "torch", "pandas", "arrow", None)]
    ways += [data.filter(lambda r: r["index"] == 2), datasets.load_from_disk(tmp_path / "saved")]
    ways += [data.map(lambda r: {"more": r["index"]}).select([2]).remove_columns("more")]
    ways += [datasets.concatenate_datasets([data.select([0]), data.select([2])])]
    for other in ways:
        same(get_sample(other, -1), want)
    same(get_sample(opened(folder / "data" / "part-00002-00000000.parquet"), 0), want)
    same(get_sample(opened(folder / "data"), 2), want)
    for wrong in (4, -5):
        with pytest.raises(InputError, match="a row below 4"):
            get_sample(data, wrong)


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_reads_the_folder(run, tmp_path, streaming):
    folder, made, about = run
    files = sorted(folder.glob("data/*.parquet"))
    for named in (dict(path=str(folder / "data")), dict(path=str(folder), data_files="data/*.parquet")):
        data = datasets.load_dataset(**named, split="train", streaming=streaming, cache_dir=str(tmp_path / "own"))
        rows = list(data)
        assert [r["index"] for r in rows] == [0, 1, 2, 3]
        for row, (picked, truth) in zip(rows, made):
            agree(sample_of(row, read_about(files)), picked, truth, 290_943 - SIZE)


def test_pandas_reads_it(run):
    folder, made, about = run
    for row, (picked, truth) in zip(pd.read_parquet(folder / "data").to_dict("records"), made):
        agree(sample_of(row, about), picked, truth, 290_943 - SIZE)


def test_polars_reads_it(run):
    pl = pytest.importorskip("polars")
    folder, made, about = run
    for row, (picked, truth) in zip(pl.read_parquet(folder / "data" / "*.parquet").to_dicts(), made):
        agree(sample_of(row, about), picked, truth, 290_943 - SIZE)


def test_splits_by_name(run, opened, tmp_path):
    folder, made, about = run
    (tmp_path / "two").mkdir()
    for k, name in enumerate(("train", "test")):
        source = folder / "data" / f"part-{k:05d}-00000000.parquet"
        (tmp_path / "two" / f"{name}-00000-of-00001.parquet").write_bytes(source.read_bytes())
    assert [opened(tmp_path / "two", s)["index"][:] for s in ("train", "test")] == [[0], [1]]
    assert len(opened(tmp_path / "two")) == 1
    with pytest.raises(InputError, match="got 'validation'"):
        opened(tmp_path / "two", "validation")


def test_files_that_do_not_belong_together(run, opened, tmp_path):
    folder, made, about = run
    other = describe(1000, id="string")
    data = table([encode(9, picks(0, 1)[0], other, id="x")], other)
    pq.write_table(data, folder / "data" / "part-00009-00000000.parquet")
    with pytest.raises(WorldError, match="files of one `vocab`; got 1000 and 290943"):
        opened(folder)
    (folder / "data" / "part-00009-00000000.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(WorldError, match="part-00009-00000000.parquet cannot be read"):
        opened(folder)
    pq.write_table(pa.table({"a": [1]}), folder / "data" / "part-00009-00000000.parquet")
    with pytest.raises(WorldError, match="the columns of v1"):
        opened(folder)
    (tmp_path / "bare").mkdir()
    with pytest.raises(WorldError, match="Parquet files; got none in bare"):
        opened(tmp_path / "bare")


def test_two_runs_of_one_model_keep_what_they_have_in_common(tmp_path, opened):
    for seed in (0, 1):
        about = describe(SIZE, more={"model": "made", "seed": seed})
        data = table([encode(seed, picks(seed, 2)[0], about)], about)
        pq.write_table(data, tmp_path / f"{seed}.parquet")
    said = read_about(sorted(tmp_path.glob("*.parquet")))
    assert said["model"] == "made" and "seed" not in said


def test_from_the_hub(run, tmp_path, monkeypatch):
    folder, made, about = run
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as hub:
        hub.add("user/logits", {f"data/{p.name}": p.read_bytes() for p in folder.glob("data/*.parquet")})
        point(monkeypatch, hub.address, tmp_path / "home")
        data = load_logit_dataset("user/logits")
        for i, (picked, truth) in enumerate(made):
            agree(get_sample(data, i), picked, truth, 290_943 - SIZE)
        with pytest.raises(InputError, match="a data set of the Hub; got 'user/nothing'"):
            load_logit_dataset("user/nothing")
        point(monkeypatch, hub.address, tmp_path / "home", offline=True)
        asked = len(hub.log)
        same(get_sample(load_logit_dataset("user/logits"), 3), get_sample(data, 3))  # from the cache
        with pytest.raises(WorldError, match="'user/other', neither a path here nor in the Hub's cache"):
            load_logit_dataset("user/other")
        assert len(hub.log) == asked


@pytest.mark.parametrize("name", ["nowhere.parquet", "./user/logits", "a/b/c", "logits", "/no/such/folder"])
def test_names_that_are_no_path_and_no_hub_id(name, opened):
    with pytest.raises(InputError, match="a folder, a Parquet file or OWNER/NAME"):
        opened(name)


def test_a_run_of_ours(tmp_path, opened):
    "From the command to the earlier tool's reader, with its own notes beside the parts"
    folder = tmp_path / "out"
    extract("tiny/chat", output_dir=folder, max_samples=6, format="v1", device="cpu", route="padded")
    data = opened(folder)
    files = sorted((folder / "data").glob("*.parquet"))
    named = dict(path=str(folder / "data"), split="train", cache_dir=str(tmp_path / "own"))
    again = [*datasets.load_dataset(**named), *datasets.load_dataset(**named, streaming=True)]
    assert sorted(data["index"][:]) == list(range(6)) and len(again) == 12
    for i in range(6):
        sample = get_sample(data, i)
        assert sample["num_tokens"] > 0 and all(len(x) == 24 for x in sample["sampled_indices"])
        for row in (r for r in again if r["index"] == sample["index"]):
            same(sample_of(row, read_about(files)), sample)
    sizes = analyze_nucleus_sizes(data)
    assert ((sizes.mass >= 0.98 - 1e-4) | (sizes.sizes == 100)).all() and sizes.sizes.min() >= 1


# looking


@pytest.mark.parametrize("size", [1, 3, 100])
def test_sizes_do_not_depend_on_the_batches(run, opened, size):
    folder, made, about = run
    data = opened(folder)
    found = analyze_nucleus_sizes(data.with_format("torch"), batch_size=size)
    whole = concatenate([p for p, _ in made])
    same(found.sizes, whole.exact)
    mass = [np.exp(truth[t][pick_out(p, [t]).ids[: p.exact[t]] - 290_943 + SIZE]).sum() for p, truth in made for t in range(len(p))]  # fmt: skip
    np.testing.assert_allclose(found.mass, mass, atol=2e-4)
    assert analyze_nucleus_sizes(data, max_samples=2).rows == 2 and len(found.plot().patches) == len(found.shares())
    assert "| entries |" in found._repr_markdown_()


def tiny_sample(positions, heights, rule=None, seed=0):
    "A sample over the tiny tokenizer's vocabulary whose targets have these logits among others around 0"
    tok, rng = AutoTokenizer.from_pretrained(TINY), np.random.default_rng(seed)
    ids = np.array(tok("Hello! <b>How</b> can I help? & so on")["input_ids"])
    logits = torch.from_numpy(rng.normal(0, 1, (len(positions), len(tok))).astype(np.float32))
    for t, (i, height) in enumerate(zip(positions, heights)):
        logits[t, ids[i]] = height
    about = describe(len(tok))
    picked = (rule or Nucleus(tail=3)).pick(logits, uniforms(0, "x", positions))
    return tok, ids, sample_of(table([encode(0, picked, about)], about).to_pylist()[0], about), logits


def test_token_probabilities_are_of_the_token_that_came():
    at = [1, 4, 5, 9]
    tok, ids, sample, logits = tiny_sample(at, [12, -12, 12, -12])
    found = analyze_token_probabilities(sample, ids, at, tok)
    truth = logits.double().softmax(1).numpy()[np.arange(4), ids[at]]
    assert found.kept.tolist() == ["nucleus", "no", "nucleus", "no"] and found["rank"].tolist()[::2] == [1, 1]
    np.testing.assert_allclose(found.p[::2], truth[::2], rtol=1e-4)
    assert found.p[1::2].isna().all() and (found.most >= truth - 1e-9).all()
    mask = np.isin(np.arange(len(ids)), at)
    pd.testing.assert_frame_equal(analyze_token_probabilities(sample, ids, mask, tok), found)
    np.testing.assert_array_equal(analyze_token_probabilities(sample, ids, at)["best"].iloc[::2], ids[at][::2])
    shifted = analyze_token_probabilities(sample, ids, np.array(at) + 1)
    assert (shifted.kept == "nucleus").sum() <= 1
    for wrong in (at[:2], [0, 1, 2, 3], [1, 2, 3, len(ids)]):
        with pytest.raises(InputError, match="positions"):
            analyze_token_probabilities(sample, ids, wrong)


def test_a_drawn_token_has_a_probability_but_no_rank():
    at = list(range(1, 8))
    tok, ids, sample, logits = tiny_sample(at, [1.0] * 7, Nucleus(0.3, 5, tail=1000))
    found = analyze_token_probabilities(sample, ids, at)
    lot = found[found.kept == "lot"]
    assert len(lot) >= 3 and (found.kept != "nucleus").all()
    truth = logits.double().softmax(1).numpy()[lot.index, ids[lot.position]]
    np.testing.assert_allclose(lot.p, truth, rtol=1e-3)
    assert lot["rank"].isna().all() and (lot.most == lot.p).all()


def test_the_picture_escapes_what_tokens_say():
    at = [1, 4, 5, 9]
    tok, ids, sample, _ = tiny_sample(at, [12, -12, 12, -12])
    page = visualize_conversation_probabilities(sample, ids, at, tok)
    assert page._repr_html_() == page and "<b>" not in page and "<script" not in page
    text = "".join(page.split("</bdi>")[i].rsplit(">", 1)[-1] for i in range(len(ids)))
    assert "&lt;" in text and "&amp;" in text
    assert page.count('title="p = ') == 2 and page.count('title="p at most') == 2

    class Hostile:
        backend_tokenizer = tok.backend_tokenizer

        def convert_ids_to_tokens(self, ids):
            return ['"><img src=x onerror=alert(1)>' for _ in ids]

    page = visualize_conversation_probabilities(sample, ids, at, Hostile())
    assert "<img" not in page and '"><' not in page.replace('"><bdi', "").replace('"><span', "").replace('">&', "")


def test_words_about_a_sample(capsys):
    tok, ids, sample, _ = tiny_sample([1, 4], [12, 12])
    print_sample_info(sample, tokenizer=tok)
    said = capsys.readouterr().out
    assert said.startswith("row 0: 2 tokens\nnuclei: 1 to ") and "3 entries a token, with their threshold" in said
    print_sample_info({k: v for k, v in sample.items() if k != "sampled_threshold"})
    assert "of unknown weight" in capsys.readouterr().out
    print_sample_info(sample_of(encode(4, pick_out(picks(0, 1)[0], []), describe(SIZE)), describe(SIZE)))
    assert capsys.readouterr().out == "row 4: 0 tokens\n"


# formats of others


def spoken(n=9, k=12):
    "A text whose token i has the id 10·i, the picks of all its targets, in which 10·i + 1 is the likeliest"
    ids, at = 10 * np.arange(n), np.arange(1, n)
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (n - 1, SIZE)).astype(np.float32))
    logits[np.arange(n - 1), ids[1:] + 1] = 9.0
    picked = VarOpt(size=k).pick(logits, uniforms(0, "x", at), ids[at])
    return ids, at, picked, logits.double().log_softmax(1).numpy()


def about_its_own_token(taken):
    "Each distribution belongs to the position whose likeliest id it has"
    first = taken.picked.ids[taken.picked.starts[:-1]]
    assert (first == 10 * taken.positions + 1).all() and (
        taken.input_ids[taken.positions] == 10 * taken.positions
    ).all()


def test_who_predicts_whom():
    ids, at, picked, _ = spoken()
    plain = Layout(SIZE, 12, 12, delta_encoding=False)
    said = to_vllm(picked, ids, at).row["prompt_logprobs"]
    assert said[0] is None and all(10 * i + 1 in said[i] and said[i][10 * i + 1].rank == 1 for i in range(1, 9))
    kit = to_distillkit(picked, ids, at, plain).row
    assert len(kit["compressed_logprobs"]) == 8
    assert unpack_bits(np.array(kit["bytepacked_indices"], np.uint8), 9, 12)[:, 0].tolist() == (10 * at + 1).tolist()
    some = np.array([2, 3, 6])  # positions 3, 4 and 7 of 9
    ax = to_axolotl(pick_out(picked, some), ids, at[some]).row
    assert [one[0] if one else None for one in ax["target_token_ids"]] == [31, 41, None, None, 71, None]
    for taken in (from_vllm(said, ids), from_distillkit(kit, plain), from_axolotl(ax, ids)):
        about_its_own_token(taken)
    with pytest.raises(AssertionError):  # the test can fail: one more row in front shifts nothing, one behind all
        about_its_own_token(from_axolotl({k: [*v, v[0]] for k, v in ax.items()}, ids))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 9), st.booleans(), st.sampled_from([VarOpt(size=12), VarOpt(1e-3, 40)]))
@example(2, 4, False, VarOpt(size=12))  # a token without exact entries
def test_what_is_written_comes_back(seed, n, lots, rule):
    picked, truth = picks(seed, n - 1, rule)
    ids, at = np.arange(n) + 3, np.arange(1, n)
    top = replace(picked, ids=picked.ids[~picked.by_lot], logp=picked.logp[~picked.by_lot], sampled=0 * picked.sampled)
    want = estimate(picked if lots else top, SIZE)
    k = int((picked.exact + picked.sampled).max())
    plain = Layout(SIZE, k, k, delta_encoding=False)
    full = np.flatnonzero(picked.exact + picked.sampled * lots)  # tokens of which something is written
    wrote = [to_vllm(picked, ids, at, lots=lots), to_axolotl(picked, ids, at, lots=lots)]
    back = [from_vllm(wrote[0].row["prompt_logprobs"], ids), from_axolotl(wrote[1].row, ids)]
    if len(full) == n - 1:
        wrote.append(to_distillkit(picked, ids, at, plain, lots=lots))
        back.append(from_distillkit(wrote[2].row, plain))
    else:
        with pytest.raises(InputError, match="an exact entry of every token; got .* lots=True"):
            to_distillkit(picked, ids, at, plain, lots=lots)
    for there, taken in zip(wrote, back):
        same(taken.positions, at[full])
        np.testing.assert_allclose(estimate(taken.picked, SIZE), want[full], atol=1e-6)
        np.testing.assert_allclose(np.exp(taken.picked.tail), np.maximum(1 - want[full].sum(1), 0), atol=1e-6)
        assert there.lost.get("entries drawn from the tail", 0) == (0 if lots else picked.sampled.sum())
        assert there.lost.get("tokens without an entry", 0) == n - 1 - len(full)
        assert there.lost["entropies"] == there.lost["log-sum-exps at other temperatures"] == n - 1


def test_what_other_formats_cannot_hold_is_counted_or_refused():
    ids, at, picked, truth = spoken()
    lost = to_axolotl(picked, ids, at, k=5).lost
    assert lost["entries drawn from the tail"] == picked.sampled.sum() > 0
    many = picks(1, 8, Nucleus(tail=0))[0]
    assert to_axolotl(many, ids, at, k=5).lost["entries beyond the 5 largest"] == (many.exact - 5).clip(0).sum() > 0
    assert lost["log-probabilities of the tokens that came"] == 8
    said = to_vllm(picked, ids, at)  # has room for the token that came, as vLLM does
    assert "log-probabilities of the tokens that came" not in said.lost
    came = from_vllm(said.row["prompt_logprobs"], ids).picked.target
    np.testing.assert_allclose(came, truth[np.arange(8), ids[at]], atol=1e-5)
    plain = Layout(SIZE, 12, 12, delta_encoding=False)
    with pytest.raises(InputError, match="all 8 tokens behind the first; got 3 targets"):
        to_distillkit(pick_out(picked, [0, 1, 2]), ids, at[:3], plain)
    with pytest.raises(InputError, match="ids below 100"):
        to_distillkit(picked, ids, at, Layout(100, 12, 12, delta_encoding=False))
    for wrong in (at[:3], at - 1, at + 1, at[::-1]):
        for write in (to_vllm, to_axolotl):
            with pytest.raises(InputError, match="positions"):
                write(picked, ids, wrong)
    gumbel = replace(picks(0, 8)[0], kappa=None, tau=np.full(8, np.nan))
    with pytest.raises(InputError, match="a known weight of every entry"):
        to_vllm(gumbel, ids, at, lots=True)
    nothing = pick_out(picked, [])
    assert to_axolotl(nothing, ids, []).row == {"logprobs": [], "target_token_ids": []}
    assert to_vllm(nothing, ids, []).row["prompt_logprobs"] == [None] * 9


def test_vllm_in_every_form():
    one = {12: Logprob(-0.5, 1), 7: Logprob(-2.0, 2), 9: Logprob(-np.inf, 3)}
    text = {str(i): {"logprob": x.logprob, "rank": x.rank, "decoded_token": "a"} for i, x in one.items()}
    flat = SimpleNamespace(
        start_indices=[0, 0], end_indices=[0, 4], token_ids=[12, 12, 7, 9], logprobs=[-0.5, -0.5, -2.0, -np.inf]
    )
    for form in ([None, one], [{}, text], flat):
        taken = from_vllm(form, [3, 7])
        assert taken.picked.ids.tolist() == [12, 7] and taken.picked.target.tolist() == [-2.0]
        assert taken.lost == {"entries of probability zero": 1} and taken.positions.tolist() == [1]
        assert np.exp(taken.picked.tail)[0] == pytest.approx(1 - np.exp(-0.5) - np.exp(-2))
        assert np.isnan([taken.picked.logsumexp, taken.picked.entropy, taken.picked.error]).all()
    assert len(from_vllm([], []).picked) == len(from_vllm([None], [3]).picked) == 0
    with pytest.raises(InputError, match="with the None of the first token"):
        from_vllm([one], [3, 7])
    with pytest.raises(InputError, match="nothing about the first token"):
        from_vllm([one, one], [3, 7])
    for wrong in (3.0, np.nan):
        with pytest.raises(WorldError, match="log-probabilities"):
            from_vllm([None, {5: wrong}], [3, 7])


def test_axolotl_rows_about_the_first_token_and_none():
    row = dict(logprobs=[[-1.0], None, [-0.5, -1.5]], target_token_ids=[[4], None, [8, 9]])
    taken = from_axolotl(row, [5, 6, 7])
    assert taken.positions.tolist() == [2] and taken.picked.ids.tolist() == [8, 9]
    assert taken.lost == {"rows about the first token": 1}
    assert from_axolotl(row, [4, 5, 6, 7]).positions.tolist() == [1, 3]
    with pytest.raises(InputError, match="no more than tokens"):
        from_axolotl(row, [6, 7])


def test_v1_keeps_a_gumbel_tail_and_drops_other_lots():
    about, bare = describe(SIZE), describe(SIZE, threshold=False)
    gumbel, _ = picks(4, 5)
    kept = to_v1(gumbel, 7, about)
    np.testing.assert_allclose(from_v1(kept.row, about).picked.weights(), gumbel.weights(), rtol=2e-3)
    assert not {"entries drawn from the tail", "thresholds of the tail", "log-sum-exps"} & kept.lost.keys()
    assert to_v1(gumbel, 7, bare).lost["thresholds of the tail"] == 5
    varopt, _ = picks(4, 5, VarOpt(size=20))
    wrote = to_v1(varopt, 7, bare)
    assert wrote.lost["entries drawn from the tail"] == varopt.sampled.sum() > 0
    back = from_v1(wrote.row, bare).picked
    same(back.exact, varopt.exact)
    np.testing.assert_allclose(np.exp(back.tail), np.exp(varopt.tail), atol=1e-3)
    ids, at = np.arange(6), np.arange(1, 6)
    other = from_vllm(to_vllm(varopt, ids, at).row["prompt_logprobs"], ids).picked
    moved = to_v1(other, 7, bare)
    assert moved.lost["log-sum-exps taken for 0"] == 5 and set(moved.row["logsumexp"]) == {0}
    np.testing.assert_allclose(from_v1(moved.row, bare).picked.logp, other.logp, atol=2e-3)  # half a step of 140 nats


# DistillKit's bytes, against plain Python


@settings(deadline=None)
@given(st.integers(1, 24), st.lists(st.integers(0, (1 << 24) - 1), min_size=1, max_size=9))
def test_bits_are_those_of_one_large_number(bits, numbers):
    numbers = [x & (1 << bits) - 1 for x in numbers]
    line = "".join(f"{x:0{bits}b}" for x in numbers)
    want = bytes(int(line[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(line), 8))
    packed = pack_bits(np.array([numbers]), bits)
    assert packed[0].tobytes() == want and unpack_bits(packed, bits, len(numbers))[0].tolist() == numbers
    with pytest.raises(InputError):
        pack_bits(np.array([[*numbers, 1 << bits]]), bits)


def test_every_part_of_a_layout():
    bins = [
        dict(scale_dtype="float32", element_bits=5, num_elements=3),
        dict(scale_dtype="bfloat16", element_bits=1, num_elements=2),
    ]
    for delta in (False, True):
        for normal in (False, True):
            layout = Layout(5000, 9, 2, "float16", [0, 1, "sqrt"], "float64", bins, delta, normalize_t=normal)
            blob = struct.pack("<2e3d", -0.5, -1.25, -2.0, -0.5, 0.125)
            blob += struct.pack("<f", 0.5) + int("11111" + "10000" + "00000" + "0", 2).to_bytes(2, "big")
            blob += struct.pack("<f", 2.0)[2:] + bytes([0b10 << 6])
            want = [-0.5, -1.25]
            for j in range(7):
                t = j / 6 if normal else j
                want.append(-2.0 - 0.5 * t + 0.125 * t**0.5 + [15 * 0.5, 0, -16 * 0.5, 2.0, -2.0, 0, 0][j])
            want = np.cumsum(want) if delta else want
            found = values(np.frombuffer(blob, np.uint8)[None], layout)
            np.testing.assert_allclose(found[0], want, rtol=1e-12)
            with pytest.raises(WorldError, match="as the configuration says"):
                values(np.frombuffer(blob + b"\0", np.uint8)[None], layout)
    assert [Layout(d, 1, 1).bits for d in (2, 128_000, 131_072, 131_073, 262_208)] == [1, 17, 17, 18, 19]


def test_layouts_that_are_refused():
    for wrong in (dict(k=9), dict(exact_k=5), dict(exact_dtype="int8"), dict(polynomial_terms=["log"])):
        with pytest.raises(InputError):
            Layout(**(dict(d=8, k=4, exact_k=2) | wrong))
    with pytest.raises(InputError, match="all entries are exact"):
        to_bytes(np.zeros((1, 4)), Layout(8, 4, 4))
    half = Layout(8, 4, 2, polynomial_terms=[0], term_dtype="float16", delta_encoding=False)
    with pytest.raises(InputError, match="32 or 64 bits"):
        values(np.zeros((1, 10), np.uint8), half)


def test_distillkit_rows_that_are_cut_and_padded():
    ids, at, picked, _ = spoken()
    wide = Layout(SIZE, 40, 40, "bfloat16", delta_encoding=False)
    wrote = to_distillkit(picked, ids, at, wide)
    entries = unpack_bits(np.array(wrote.row["bytepacked_indices"], np.uint8), wide.bits, 40)
    assert all(len(set(row)) == 40 for row in entries.tolist())  # padding never hides an entry
    taken = from_distillkit(wrote.row, vars(wide))
    assert (taken.picked.exact == picked.exact).all()
    assert taken.lost == {"entries of probability zero": int((40 - picked.exact).sum())}
    longer = wrote.row | {k: [*v, v[0]] for k, v in wrote.row.items() if k != "input_ids"}
    assert from_distillkit(longer, wide).lost["rows behind the last token"] == 1
    same(from_distillkit(longer, wide).picked.ids, taken.picked.ids)
    data = pa.Table.from_pylist([wrote.row])
    same(from_distillkit(data.to_pandas().to_dict("records")[0], wide).picked.ids, taken.picked.ids)
    with pytest.raises(WorldError, match="as many rows of ids"):
        from_distillkit(wrote.row | {"bytepacked_indices": wrote.row["bytepacked_indices"][1:]}, wide)
