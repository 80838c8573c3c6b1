"""Packing, quantisation and the compatible store of `logits`, against plain loops and on files."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import TypeCheckError

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs.footer import options
from llm_analysis.logits.ids import from_planes, high_bits, pack, planes, unpack
from llm_analysis.logits.picked import Picked, concatenate, take
from llm_analysis.logits.quantise import (
    LEVELS,
    dequantise,
    from_bf16,
    from_steps,
    kl_bound,
    log_total,
    quantise,
    to_bf16,
    to_steps,
)
from llm_analysis.logits.v1 import SCHEMA, decode, describe, described, encode, schema, table

# ids


def plainly(ids, bits):
    "Low halves, and high bits put into their bytes one by one"
    each = 8 // bits
    high = bytearray(-(-len(ids) // each))
    for i, x in enumerate(ids):
        high[i // each] |= (x >> 16) << bits * (i % each)
    return [x & 0xFFFF for x in ids], bytes(high)


@settings(deadline=None)
@given(st.sampled_from([2, 4]).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, (1 << 16 + b) - 1)))))
@example((2, [262_143]))
@example((4, [262_144, 290_942, 1_048_575]))
@example((2, []))
def test_pack_is_the_loop_and_comes_back(case):
    bits, ids = case
    low, high = pack(np.array(ids, dtype=np.int64), bits)
    assert low.dtype == np.uint16 and (low.tolist(), high) == plainly(ids, bits)
    back = unpack(low, high, bits)
    assert back.dtype == np.int32 and back.tolist() == ids


@settings(deadline=None)
@given(st.sampled_from([2, 4]), st.lists(st.integers(0, 1000), max_size=9), st.integers(0, 9), st.booleans())
def test_what_does_not_fit_is_refused(bits, ids, place, negative):
    ids.insert(place, -1 if negative else 1 << 16 + bits)
    with pytest.raises(InputError, match=rf"numbers from 0 to .*; got {ids[min(place, len(ids) - 1)]:,} at place"):
        pack(np.array(ids), bits)


@pytest.mark.parametrize(
    "vocab, bits", [(1, 2), (151_936, 2), (262_144, 2), (262_145, 4), (262_208, 4), (290_943, 4), (1 << 20, 4)]
)
def test_high_bits(vocab, bits):
    assert high_bits(vocab) == bits
    last = np.array([vocab - 1], dtype=np.int32)
    assert unpack(*pack(last, bits), bits) == last


@pytest.mark.parametrize("vocab", [0, -5, (1 << 20) + 1])
def test_vocabularies_without_room(vocab):
    with pytest.raises(InputError, match="a vocabulary of 1 to 1,048,576"):
        high_bits(vocab)


def test_packing_refuses_other_things():
    for wrong in (np.array([1.5]), np.array([[1]]), np.array([True])):
        with pytest.raises((InputError, TypeCheckError)):
            pack(wrong, 2)
    for bits in (0, 3, 8):
        with pytest.raises(InputError, match="2 or 4 high bits"):
            pack(np.array([1]), bits)
        with pytest.raises(InputError, match="2 or 4 high bits"):
            unpack(np.array([1], np.uint16), b"\0", bits)
    for high in (b"", b"\0\0"):
        with pytest.raises(WorldError, match="1 bytes for 3 numbers"):
            unpack(np.zeros(3, np.uint16), high, 2)


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 24) - 1)))
def test_planes(ids):
    rows = planes(np.array(ids, dtype=np.int64))
    assert rows.dtype == np.uint8 and rows.shape == (3, len(ids))
    assert rows.tolist() == [[x >> shift & 255 for x in ids] for shift in (0, 8, 16)]
    assert from_planes(rows).tolist() == from_planes(rows.tobytes()).tolist() == ids
    with pytest.raises(InputError):
        planes(np.array([*ids, 1 << 24]))
    with pytest.raises(WorldError):
        from_planes(rows.tobytes() + b"\0")


# values

LAID = st.lists(st.lists(st.floats(-80, 80, width=32), max_size=12), max_size=12)


def flat(rows, dtype=np.float32):
    "Rows end to end, and their lengths"
    return np.array([x for r in rows for x in r], dtype=dtype), np.array([len(r) for r in rows], dtype=int)


def kl(a, b):
    "Divergence between two rows of logits"
    a, b = (np.float64(x) - np.logaddexp.reduce(np.float64(x)) for x in (a, b))
    return (np.exp(a) * (a - b)).sum()


@settings(deadline=None)
@given(LAID)
@example([[], [3.5], [2.0, 2.0, 2.0], [], [-1.0, 4.0]])
@example([[]])
def test_quantise_is_the_loop_and_bounded(rows):
    x, counts = flat(rows)
    with np.errstate(all="raise"):  # nothing is divided by zero
        q, low, high = quantise(x, counts)
        back = dequantise(q, low, high, counts)
    assert (q.dtype, low.dtype, high.dtype) == (np.uint16, np.float32, np.float32) and len(back) == len(x)
    start = 0
    for n, a, b in zip(counts, low, high):
        here, back_here = x[start : start + n], back[start : start + n]
        start += n
        if not n:
            assert np.isnan(a) and np.isnan(b)
            continue
        step = (float(b) - float(a)) / LEVELS
        assert (a, b) == (here.min(), here.max())
        assert np.abs(back_here - here).max() <= step / 2 * (1 + 1e-6)
        assert np.abs(back_here[[here.argmin(), here.argmax()]] - [a, b]).max() <= 1e-13  # the ends are exact
        if a == b:
            assert (back_here == here).all()
        assert kl(here, back_here) <= kl_bound(step) + 1e-14


@settings(deadline=None)
@given(LAID, st.sampled_from([1 / 8, 1 / 32, 1 / 100]))
def test_steps_come_back_within_half(rows, step):
    x, counts = flat([sorted(-np.abs(r), reverse=True) for r in rows], np.float64)
    down = to_steps(x, counts, step)
    back = from_steps(down, counts, step)
    assert down.dtype == np.uint16 and np.abs(back - x).max(initial=0) <= step / 2 * (1 + 1e-9)
    for a, n in zip(np.cumsum(counts) - counts, counts):
        if n:
            assert kl(x[a : a + n], back[a : a + n]) <= kl_bound(step) + 1e-14
            assert (np.diff(back[a : a + n]) <= 0).all()


def test_the_error_of_many_steps_does_not_add_up():
    whole = np.array([20_000])
    x = -np.cumsum(np.full(20_000, 0.49 / 32))  # every difference alone rounds to nothing
    assert np.abs(from_steps(to_steps(x, whole), whole) - x).max() <= 1 / 64 * (1 + 1e-9)


def test_steps_are_refused_where_they_do_not_fit():
    for wrong in ([-1.0, -0.5], [0.5], [-3000.0], [np.nan], [-np.inf]):
        with pytest.raises(InputError, match="falling log-probabilities"):
            to_steps(np.array(wrong), np.array([len(wrong)]))
    assert to_steps(np.array([-5.0, -1.0]), np.array([1, 1])).tolist() == [160, 32]  # another token begins anew
    for step in (0, -1, np.inf, np.nan):
        with pytest.raises(InputError, match="a positive step"):
            to_steps(np.array([-1.0]), np.array([1]), step)


def test_every_finite_bfloat16_comes_back():
    bits = np.arange(1 << 16, dtype=np.uint32)
    bits = bits[(bits & 0x7F80) != 0x7F80].astype(np.uint16)
    assert (to_bf16(from_bf16(bits)) == bits).all()
    for wrong in (1 + 2.0**-8, np.nan, np.inf):
        with pytest.raises(InputError, match="off the grid"):
            to_bf16(np.array([1.0, wrong]))


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(-100, 100, width=32)))
@example(np.array([0x3F808000, 0x3F818000, 0xBF818000], np.uint32).view(np.float32))  # halfway: to the even one
def test_bfloat16_rounds_to_the_nearest(x):
    assert (from_bf16(to_bf16(x, off=1)) == torch.tensor(x).bfloat16().float().numpy()).all()


def test_log_total_of_nothing():
    assert (
        log_total(np.zeros(0), np.zeros(0, int)).shape == (0,)
        and (log_total(np.zeros(0), np.array([0, 0])) == -np.inf).all()
    )
    for f in (quantise, to_steps, log_total):
        with pytest.raises(InputError, match="as the counts say"):
            f(np.zeros(2), np.array([1]))


# v1


def drawn(seed, vocab, exact, tail):
    "Picks with so many exact entries of each token and `tail` by lot, from rows over `vocab`; and the log-probabilities"
    rng, ones, rows = np.random.default_rng(seed), [], []
    for n in exact:
        logits = rng.normal(0, 3, vocab).astype(np.float32)
        lse = np.logaddexp.reduce(logits.astype(np.float64))
        logp = logits - lse
        best = np.argsort(-logp, kind="stable")
        noisy = np.sort(logp[best[n:]] + rng.gumbel(size=vocab - n))[::-1]
        lots = np.sort(rng.choice(best[n:], tail, replace=False))
        ids, kappa = np.append(best[:n], lots), noisy[tail] if tail < len(noisy) else -np.inf
        rest = np.logaddexp.reduce(logp[best[n:]], initial=-np.inf)
        each = (len(best[:n]), tail, 0.0, lse, rest, np.nan, np.nan, np.nan)
        ones.append(Picked(ids, logp[ids].astype(np.float32), *(np.array([v]) for v in each), kappa=np.array([kappa])))
        rows.append(logp)
    return concatenate(ones), rows


def like(back, picked, row):
    "The second came back from the first, to within what 16 bits can do"
    for name in ("ids", "exact", "sampled", "tau", "logsumexp"):
        assert np.array_equal(getattr(back, name), getattr(picked, name), equal_nan=True), name
    lot, wide = picked.by_lot, np.empty(len(picked.ids))
    for kind, there, counts in (("top", ~lot, picked.exact), ("sampled", lot, picked.sampled)):
        step = (np.float64(row[f"{kind}_max"]) - np.float64(row[f"{kind}_min"])) / LEVELS
        wide[there] = np.repeat(step, counts)
    assert (np.abs(back.logp - picked.logp) <= wide / 2 + 4e-6).all()  # and float32
    assert np.abs(np.exp(back.tail) - np.exp(picked.tail)).max(initial=0) <= wide.max(initial=0) / 2 + 4e-6
    assert np.isnan([back.entropy, back.target, back.error]).all() and back.tempered is None
    if back.kappa is not None:
        assert (back.kappa == np.float32(picked.kappa)).all()
        assert np.allclose(back.weights(), picked.weights(), rtol=1e-3)


CASES = {
    "mixed nuclei": (500, [1, 17, 100, 2], 24),
    "one-element nuclei": (500, [1, 1, 1], 24),
    "empty nuclei": (500, [0, 3, 0], 24),
    "empty tails": (500, [5, 1, 80], 0),
    "one-element tails": (500, [5, 1, 0], 1),
    "nothing at all": (500, [0, 0], 0),
    "no tokens": (500, [], 0),
    "300 entries": (500, [300, 255, 256, 1], 24),
    "the whole vocabulary": (30, [30, 30], 0),
    "the whole vocabulary, some by lot": (30, [6, 6], 24),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "shift, vocab", [(0, None), (262_144 - 500, 262_144), (262_208 - 500, 262_208), (290_443, 290_943)]
)
def test_round_trip_through_a_file(tmp_path, name, shift, vocab):
    size, exact, tail = CASES[name]
    if exact:
        picked, _ = drawn(3, size, exact, tail)
    else:
        picked = take(drawn(3, size, [1], tail)[0], np.zeros(0, int))
    picked = Picked(**{**vars(picked), "ids": picked.ids + shift})
    about = describe(vocab or size, most=max([1, *exact]), more={"model": "made"})
    assert about["index_high_bits"] == (4 if vocab and vocab > 262_144 else 2)
    assert about["top_counts"] == ("uint16" if max([0, *exact]) > 255 else "uint8")
    row = encode(5, picked, about)
    data = table([row, row], about)
    pq.write_table(data, tmp_path / "a.parquet", **options(data.schema))
    read = pq.read_table(tmp_path / "a.parquet")
    assert str(read.to_pylist()) == str(data.to_pylist()) and described(read.schema) == about
    if "whole" in name and not shift:
        assert np.isneginf(decode(row, about).tail[picked.exact == size]).all()
    for found in read.to_pylist():
        if name != "nothing at all":
            like(decode(found, about), picked, found)
        else:
            assert (decode(found, about).tail == 0).all()


def test_columns_are_those_of_the_earlier_tool():
    said = "index:int32 num_tokens:int32 top_indices_low:list<uint16> top_indices_high:binary "
    said += "top_logits_quantized:list<uint16> top_counts:list<uint8> top_min:list<float32> top_max:list<float32> "
    said += "sampled_indices_low:list<uint16> sampled_indices_high:binary sampled_logits_quantized:list<uint16> "
    said += "sampled_min:list<float32> sampled_max:list<float32> logsumexp:list<float64>"
    kinds = {pa.list_(t): f"list<{n}>" for n, t in dict(uint16=pa.uint16(), uint8=pa.uint8()).items()}
    kinds |= {pa.list_(pa.float32()): "list<float32>", pa.list_(pa.float64()): "list<float64>"}
    show = lambda columns: " ".join(f"{f.name}:{kinds.get(f.type, f.type)}" for f in columns)
    assert show(SCHEMA) == show(schema(describe(1000, threshold=False))) == said
    assert show(schema(describe(1000, id="string"))) == said + " sampled_threshold:list<float32> id:string"
    assert show(schema(describe(1000, most=256, threshold=False))) == said.replace("uint8", "uint16")


def test_probabilities_are_the_models():
    picked, rows = drawn(0, 400, [1, 30, 100], 24)
    about = describe(400)
    row = encode(0, picked, about)
    back = decode(row, about)
    for t, logp in enumerate(rows):
        a, b = back.starts[t : t + 2]
        step = max(row[f"{k}_max"][t] - row[f"{k}_min"][t] for k in ("top", "sampled")) / LEVELS
        assert np.abs(np.exp(back.logp[a:b]) / np.exp(logp[back.ids[a:b]]) - 1).max() <= np.expm1(step / 2 + 4e-6)


@pytest.mark.parametrize("left", [1e-3, 1e-8, 1e-12])
def test_the_tail_of_one_entry_is_known_at_any_size(left):
    near, nothing, unknown = np.float32([17.3]), np.zeros(1), np.full(1, np.nan)
    lse = near.astype(np.float64) - np.log1p(-left)
    logp = (near - lse).astype(np.float32)
    one = Picked(np.array([3]), logp, np.array([1]), np.array([0]), nothing, lse, *[unknown] * 4)
    about = describe(400, threshold=False)
    assert decode(encode(0, one, about), about).tail == pytest.approx(np.log(left), abs=0.01)


def test_what_the_format_has_no_place_for():
    picked, _ = drawn(0, 400, [2, 3], 4)
    with pytest.raises(InputError, match="numbers below 300"):
        encode(0, Picked(**{**vars(picked), "ids": picked.ids + 300}), describe(300))
    with pytest.raises(InputError, match="numbers below 400; got 400"):  # the first that is too many, to be exact
        encode(0, Picked(**{**vars(picked), "ids": picked.ids + 400 - picked.ids.max()}), describe(400))
    with pytest.raises(InputError, match="at most 255 entries"):
        encode(0, drawn(0, 400, [256], 0)[0], describe(400))
    uneven = Picked(**{**vars(picked), "exact": np.array([2, 4]), "sampled": np.array([4, 3])})
    with pytest.raises(InputError, match="as many entries by lot"):
        encode(0, uneven, describe(400))
    with pytest.raises(InputError, match="Gumbel"):
        encode(0, Picked(**{**vars(picked), "tau": np.array([0.0, 0.1])}), describe(400))
    with pytest.raises(InputError, match="with its threshold"):
        encode(0, Picked(**{**vars(picked), "kappa": None}), describe(400))
    with pytest.raises(InputError, match="finite logits"):
        encode(0, Picked(**{**vars(picked), "logp": picked.logp * np.nan}), describe(400))
    for index in (-1, 1 << 31):
        with pytest.raises(InputError, match="an index below"):
            encode(index, picked, describe(400))
    for about, id in ((describe(400), "a"), (describe(400, id="string"), None)):
        with pytest.raises(InputError, match="ids as described"):
            encode(0, picked, about, id=id)
    for most in (0, 65_536):
        with pytest.raises(InputError, match="1 to 65,535"):
            describe(400, most=most)
    with pytest.raises(InputError, match="1,048,576"):
        describe(1 << 21)


@pytest.mark.parametrize("change", ["top_counts", "top_min", "sampled_max", "logsumexp", "top_logits_quantized"])
def test_rows_that_contradict_themselves(change):
    about = describe(400)
    row = encode(8, drawn(0, 400, [2, 3], 4)[0], about)
    with pytest.raises(WorldError, match="the row 8"):
        decode(row | {change: row[change][1:]}, about)
    with pytest.raises(WorldError, match="the row 8"):
        decode(row | {"top_counts": row["top_counts"] + 1}, about)


def test_files_of_the_earlier_tool():
    "No metadata, no threshold; in its empty and constant nuclei the quotient 0/0 had become 0"
    picked, _ = drawn(0, 400, [1, 3], 4)
    row = encode(0, picked, describe(400, threshold=False))
    old = pa.Table.from_pylist([{n: row[n] for n in SCHEMA.names}], SCHEMA)
    about = described(old.schema)
    assert about["index_high_bits"] == 2 and about["vocab"] is None
    back = decode(old.to_pylist()[0], about)
    like(back, Picked(**{**vars(picked), "tau": back.tau}), row)
    assert back.kappa is None and np.isnan(back.tau).all()
    assert np.isnan(back.weights()[back.by_lot]).all() and np.isfinite(back.weights()[~back.by_lot]).all()
    again = encode(0, back, describe(400, threshold=False))
    like(decode(again, about), back, again)


@pytest.fixture
def folder(tmp_path):
    "Two files of three rows, and the picks in them"
    about = describe(262_208, most=300, id="string")
    picks = [drawn(i, 500, [1, 300, 7], 24)[0] for i in range(6)]
    picks = [Picked(**{**vars(p), "ids": p.ids + 261_708}) for p in picks]
    for k in range(2):
        rows = [encode(i, picks[i], about, id=f"r{i}") for i in range(3 * k, 3 * k + 3)]
        data = table(rows, about)
        pq.write_table(data, tmp_path / f"part-{k}.parquet", **options(data.schema))
    return tmp_path, picks, about


def test_pandas_reads_it(folder):
    path, picks, about = folder
    for row, picked in zip(pd.read_parquet(path).to_dict("records"), picks):
        like(decode(row, about), picked, row)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [None, "arrow"])
def test_datasets_reads_it(folder, tmp_path_factory, streaming, kind):
    from datasets import load_dataset

    path, picks, about = folder
    data = load_dataset(str(path), split="train", streaming=streaming, cache_dir=str(tmp_path_factory.mktemp("cache")))
    rows = [r.to_pylist()[0] if kind else r for r in data.with_format(kind)]
    assert [r["id"] for r in rows] == [f"r{i}" for i in range(6)]
    for row, picked in zip(rows, picks):
        like(decode(row, about), picked, row)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_rounded_sum_is_refused(folder, tmp_path_factory, kind):
    from datasets import load_dataset

    path, picks, about = folder
    data = load_dataset(str(path), split="train", cache_dir=str(tmp_path_factory.mktemp("cache")))
    with pytest.raises(InputError, match="log-sum-exps in float64; got float32"):
        decode(data.with_format(kind)[0], about)


def test_polars_reads_it(folder):
    pl = pytest.importorskip("polars")
    path, picks, about = folder
    for row, picked in zip(pl.read_parquet(path / "*.parquet").to_dicts(), picks):
        like(decode(row, about), picked, row)


def test_how_it_is_written(folder):
    group = pq.ParquetFile(folder[0] / "part-0.parquet").metadata.row_group(0)
    for column in map(group.column, range(group.num_columns)):
        name = column.path_in_schema.split(".")[0]
        assert column.compression == "ZSTD" and column.statistics is None
        assert column.has_dictionary_page == (name == "id"), name  # users' ids are text, which may repeat
        assert ("BYTE_STREAM_SPLIT" in column.encodings) == (not name.endswith("_high") and name != "id"), name


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 9))
def test_any_row_comes_back(seed, exact, tail):
    if exact and (sum(exact) or tail):
        picked, _ = drawn(seed, 50, exact, tail)
        about = describe(50)
        row = encode(seed, picked, about)
        like(decode(row, about), picked, row)
