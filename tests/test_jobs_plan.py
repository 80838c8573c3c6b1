"""The plan and the identity of a job: identities, a plain slow version beside the fast one, refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs.identity import (
    check,
    contents,
    differences,
    make_spec,
    read_spec,
    save_spec,
    schema_from_json,
    schema_to_json,
    spec_fingerprint,
)
from llm_analysis.jobs.plan import Plan, load_plan, make_plan, save_plan
from llm_analysis.jobs.rows import measure, row_ids, slices

lengths_ = st.lists(st.integers(0, 60), max_size=80)
maybe = lambda s: st.one_of(st.none(), s)
knobs = st.fixed_dictionaries(
    dict(
        batch_tokens=st.integers(1, 200),
        max_batch_size=maybe(st.integers(1, 9)),
        max_seq_len=maybe(st.integers(1, 70)),
        shards=st.integers(1, 30),
        static=maybe(st.integers(1, 12)),
        window=maybe(st.integers(1, 30)),
    )
)


def plain(lengths, reasons, batch_tokens, max_batch_size, max_seq_len, window, **_) -> tuple[list, list]:
    "Batches of rows that are computed, and rows that are left out: row by row, as one would say it"
    out = [i for i, n in enumerate(lengths) if i in reasons or not n or (max_seq_len and n > max_seq_len)]
    batches, size = [], window or len(lengths) or 1
    for start in range(0, len(lengths), size):
        rows = sorted(
            (i for i in range(len(lengths))[start : start + size] if i not in out), key=lambda i: -lengths[i]
        )
        batch = []
        for row in rows:
            full = batch and ((len(batch) + 1) * lengths[batch[0]] > batch_tokens or len(batch) == max_batch_size)
            if full:
                batches.append(batch)
                batch = []
            batch.append(row)
        batches += [batch] if batch else []
    return batches, out


@settings(max_examples=300, deadline=None)
@given(lengths_, knobs, st.data())
def test_the_plan_is_the_plain_one(lengths, kw, data):
    reasons = data.draw(st.dictionaries(st.integers(0, len(lengths) - 1), st.just("odd"))) if lengths else {}
    plan, (batches, out) = make_plan(lengths, reasons=reasons, **kw), plain(lengths, reasons, **kw)
    kept = len(lengths) - len(out)
    assert [plan.order[plan.batch(b)].tolist() for b in range(plan.batches)] == batches + ([out] if out else [])
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    assert sorted(plan.reason) == list(range(kept, len(lengths)))
    assert plan.length.tolist() == [lengths[i] for b in batches for i in b] + [0] * len(out)
    assert (plan.cost == plan.length).all()
    for b in range(len(batches)):
        n = plan.length[plan.batch(b)]
        assert len(n) * n.max() <= kw["batch_tokens"] or len(n) == 1
        assert (np.diff(n) <= 0).all() and len(n) <= (kw["max_batch_size"] or len(n))
    for p, why in plan.reason.items():
        n = lengths[plan.order[p]]
        expected = "empty: 0 tokens" if not n else f"longer than max_seq_len: {n} tokens"
        assert why == ("odd" if plan.order[p] in reasons else expected)
    useful, computed = plan.length.sum(), sum(lengths[b[0]] * len(b) for b in batches)
    assert plan.waste == (1 - useful / computed if computed else 0)
    assert sorted(b for s in range(plan.shards) for b in plan.of(s)) == list(range(plan.batches))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(1, 60))
def test_shards_cost_the_same(costs, shards):
    plan = make_plan([1] * len(costs), costs, batch_tokens=1, shards=shards)  # a batch for each row
    got, fair = plan.shard_cost, sum(costs) / min(shards, len(costs))
    slack = 1e-9 * sum(costs)
    assert np.isclose(got.sum(), sum(costs)) and (got <= fair + max(costs) + slack).all()
    if plan.shards == min(shards, len(costs)):  # a batch larger than a share leaves fewer shards
        assert (abs(got - got.mean()) <= max(costs) + slack).all()
        ends = np.flatnonzero(np.diff(plan.shard))
        off = np.cumsum(plan.cost)[ends] - fair * np.arange(1, plan.shards)
        assert (abs(off) <= max(costs) / 2 + slack).all()  # the nearest border, not the next
    else:
        assert max(costs) >= fair * (1 - 1e-9)
    assert (np.diff(got) <= slack).all()  # costliest first
    assert plan.shards <= min(shards, plan.batches) and all(len(plan.of(s)) for s in range(plan.shards))
    assert all((np.diff(plan.of(s)) == 1).all() for s in range(plan.shards))  # neighbours


def test_shards_of_equal_rows_are_equal():
    plan = make_plan([1] * 3200, batch_tokens=1, shards=160)
    assert set(plan.shard_cost) == {20.0} and plan.shards == 160


def test_ties_are_broken_by_row_and_the_longest_comes_first():
    plan = make_plan([3, 5, 3, 5, 3], batch_tokens=6, shards=2)
    assert plan.order.tolist() == [1, 3, 0, 2, 4] and plan.first.tolist() == [0, 1, 2, 4, 5]
    many = np.random.default_rng(0).integers(1, 5, 5000)
    for wide in (0, 10**6):
        order = make_plan(many + wide, batch_tokens=64).order
        assert order.tolist() == sorted(range(5000), key=lambda i: -many[i])


@given(lengths_, st.integers(1, 12))
def test_static_shards_partition_the_batches(lengths, static):
    plan = make_plan(lengths, batch_tokens=64, max_batch_size=3, static=static)
    assert plan.shards == static
    assert (plan.shard == np.arange(plan.batches) % static).all()
    assert [plan.of(s).tolist() for s in range(static)] == [
        list(range(s, plan.batches, static)) for s in range(static)
    ]


def test_no_batch_crosses_a_window():
    assert make_plan([5, 0, 3, 9], batch_tokens=99, window=2).order.tolist() == [0, 3, 2, 1]  # rows 0 1, then 2 3
    lengths = np.random.default_rng(0).integers(1, 50, 1000)
    plan = make_plan(lengths, batch_tokens=400, window=64)
    for b in range(plan.batches):
        assert len(set(plan.order[plan.batch(b)] // 64)) == 1
    whole = make_plan(lengths, batch_tokens=400)
    assert make_plan(lengths, batch_tokens=400, window=1000).order.tolist() == whole.order.tolist()
    assert whole.waste < plan.waste < make_plan(lengths, batch_tokens=400, window=8).waste


def test_many_left_out_stand_in_batches_of_4096():
    lengths = np.full(10_000, 5)
    lengths[:3] = 4
    plan = make_plan(lengths, batch_tokens=8, max_seq_len=4)
    assert plan.first.tolist() == [0, 2, 3, 4099, 8195, 10_000] and plan.length[3:].sum() == plan.cost[3:].sum() == 0
    assert len(plan.reason) == 9997 and plan.reason[3] == "longer than max_seq_len: 5 tokens"
    gone = make_plan(lengths, batch_tokens=8, reasons=["no"] * 10_000, shards=2)
    assert gone.batches == 3 and gone.shards == 2 and gone.waste == 0


def test_small_plans():
    none, one = make_plan([], batch_tokens=8), make_plan([3], batch_tokens=8)
    assert (none.rows, none.batches, none.shards, none.waste) == (0, 0, 0, 0) and none.first.tolist() == [0]
    assert (one.rows, one.batches, one.shards) == (1, 1, 1) and one.of(0).tolist() == [0]
    assert make_plan([], batch_tokens=8, static=3).shards == 3
    assert make_plan([100], batch_tokens=8).length.tolist() == [100]  # longer than the budget: a batch of its own


def test_wide_lengths_sort_like_narrow_ones():
    lengths = np.array([70_000, 1, 70_001, 1, 69_999])
    assert make_plan(lengths, batch_tokens=8).order.tolist() == [2, 0, 4, 1, 3]
    assert make_plan([100, 60_000, 66_000], batch_tokens=8).order.tolist() == [2, 1, 0]
    assert make_plan(np.array([3, 200], np.uint8), batch_tokens=8).order.tolist() == [1, 0]


BASE = dict(batch_tokens=32, max_batch_size=4, max_seq_len=40, shards=7)
CHANGED = [
    dict(batch_tokens=33),
    dict(max_batch_size=5),
    dict(max_seq_len=41),
    dict(shards=8),
    dict(static=7),
    dict(window=100),
    dict(reasons={4: "odd"}),
    dict(reasons={4: "odder"}),
]


def test_the_fingerprint_changes_with_every_input_and_nothing_else():
    lengths, costs = [5, 9, 30, 2, 7], [1.0, 2, 3, 4, 5]
    base = make_plan(lengths, costs, **BASE)
    same = [make_plan(np.array(lengths, np.int32), np.array(costs), **BASE), make_plan(tuple(lengths), costs, **BASE)]
    assert all(p == base and hash(p) == hash(base) for p in same)
    others = [make_plan(lengths, costs, **{**BASE, **change}) for change in CHANGED]
    for i in range(5):
        others.append(make_plan([n + (i == j) for j, n in enumerate(lengths)], costs, **BASE))
        others.append(make_plan(lengths, [c + (i == j) for j, c in enumerate(costs)], **BASE))
    assert len({base.fingerprint, *(p.fingerprint for p in others)}) == 1 + len(others)
    for field in ("order", "length", "cost", "first", "shard"):
        value = getattr(base, field).copy()
        value[0] += 1
        assert replace(base, **{field: value}) != base
    assert replace(base, shards=9) != base and replace(base, reason={0: "x"}) != base and base != "a plan"


def test_other_processes_make_the_same_plan():
    code = """
import sys, numpy as np
from llm_analysis.jobs.plan import make_plan
n = np.random.default_rng(5).integers(0, 600, 5000)
why = {str(i): "odd " * (i % 3 + 1) for i in {"a": 3, "b": 70, "c": 4000}.values()}
p = make_plan(n, np.sqrt(n), batch_tokens=2048, max_seq_len=500, reasons={int(k): v for k, v in set(why.items())})
print(p.fingerprint, make_plan(n, batch_tokens=999, static=5).fingerprint)
"""
    seen = set()
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent), "PATH": ""}
        seen.add(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        )
    assert len(seen) == 1


@pytest.mark.parametrize(
    "lengths, kw, said",
    [
        ([1], dict(batch_tokens=0), "batch_tokens of at least 1"),
        ([1], dict(batch_tokens=8, static=0), "static of at least 1"),
        ([1], dict(batch_tokens=8, shards=0), "shards of at least 1"),
        ([1], dict(batch_tokens=8, window=0), "window of at least 1"),
        ([1], dict(batch_tokens=8, max_batch_size=0), "max_batch_size of at least 1"),
        ([1, 2, -3], dict(batch_tokens=8), "row 2 of -3"),
        ([1, 2], dict(batch_tokens=8, costs=[1.0]), "2 costs"),
        ([1, 2], dict(batch_tokens=8, costs=[1.0, float("nan")]), "row 1 of nan"),
        ([1, 2], dict(batch_tokens=8, costs=[-1.0, 1.0]), "row 0 of -1"),
        ([1, 2], dict(batch_tokens=8, reasons={2: "x"}), "rows below 2"),
        ([1, 2], dict(batch_tokens=8, reasons=["x", None, None, "y"]), "rows below 2"),
    ],
)
def test_plans_that_are_refused(lengths, kw, said):
    with pytest.raises(InputError, match=said):
        make_plan(lengths, **kw)


@settings(max_examples=30, deadline=None)
@given(lengths_, knobs)
def test_a_plan_survives_the_disk(tmp_path_factory, lengths, kw):
    path = tmp_path_factory.mktemp("plan") / "plan.parquet"
    plan = make_plan(lengths, np.sqrt(lengths), **kw)
    save_plan(plan, path)
    back = load_plan(path)
    assert back == plan and back.reason == plan.reason and back.settings == plan.settings
    for field in ("order", "length", "cost", "first", "shard", "shard_cost"):
        a, b = getattr(plan, field), getattr(back, field)
        assert a.dtype == b.dtype and (a == b).all()
    assert [p.name for p in path.parent.iterdir()] == ["plan.parquet"]


def test_a_damaged_plan_is_refused(tmp_path):
    path = tmp_path / "plan.parquet"
    rng = np.random.default_rng(0)
    plan = make_plan(rng.integers(0, 90, 400), batch_tokens=256, max_seq_len=80)
    save_plan(plan, path)
    whole = path.read_bytes()
    refused = 0
    for at in rng.choice(len(whole), 150, replace=False):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
        try:
            assert load_plan(path) == plan  # a byte that carries nothing, such as a statistic
        except WorldError as e:
            refused += 1
            assert str(path.parent) not in str(e)
    assert refused > 100
    for n in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(WorldError, match="run again"):
            load_plan(path)
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "none.parquet")


# ---- rows


def forms(table: pa.Table) -> list:
    "The same rows as a list, a table, a table in pieces, a data set and a data set with an index of its own"
    at = len(table) // 3
    pieces = pa.concat_tables([table.slice(0, at), table.slice(at)])
    ds = datasets.Dataset(table)
    back = datasets.Dataset(table.take(list(range(len(table)))[::-1])).select(range(len(table))[::-1])
    return [table.to_pylist(), table, pieces, ds, back]


def mixed(n: int = 9000) -> pa.Table:
    "A table with nulls, text, lists, structs"
    rng = np.random.default_rng(0)
    pick = lambda f: [None if rng.random() < 0.1 else f(i) for i in range(n)]
    return pa.table(
        {
            "index": [f"r{i}" for i in range(n)],
            "text": pick(lambda i: "wörd " * int(rng.integers(0, 4))),
            "number": pick(lambda i: int(rng.integers(-9, 9))),
            "real": pick(lambda i: float(rng.normal())),
            "flag": pick(lambda i: bool(i % 3)),
            "chat": pick(lambda i: [{"role": "user", "content": "x" * (i % 5)}] * (i % 3)),
            "tokens": pick(lambda i: list(range(i % 4))),
        }
    )


def test_content_does_not_depend_on_the_form():
    table = mixed()
    named = [contents(rows) for rows in forms(table)]
    assert all(n == named[0] for n in named)
    assert contents(table.slice(0, 0)).keys() == named[0].keys() and contents([]) == {}
    assert all(contents(table.slice(0, 8999))[k] != v for k, v in named[0].items())


def test_content_does_not_depend_on_layout():
    values = ["a", None, "bcd", "", "e"]
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    assert len({contents(pa.table({"t": pa.array(values, k)}))["t"] for k in kinds}) == 1
    junk = pa.Array.from_buffers(pa.int64(), 3, [pa.py_buffer(b"\x05"), pa.py_buffer(np.array([1, 77, 3]).tobytes())])
    clean = pa.array([1, None, 3])
    assert junk.equals(clean) and contents(pa.table({"n": junk})) == contents(pa.table({"n": clean}))
    bitmap = pa.Array.from_buffers(pa.int64(), 2, [pa.py_buffer(b"\xff"), pa.py_buffer(np.array([1, 2]).tobytes())])
    assert contents(pa.table({"n": bitmap})) == contents(pa.table({"n": [1, 2]}))


NEARLY = [
    ["a", None],
    [None, "a"],
    ["", "a"],
    ["a", ""],
    ["a"],
    [None, None, "a"],
    [["a"], ["b"]],
    [["a", "b"], []],
    [[], ["a", "b"]],
    [["ab"], []],
    [["a", "b"], None],
    [[None], ["b"]],
    [{"x": 1}, None],
    [None, {"x": 1}],
    [{"x": None}, {"x": 1}],
    [True, False],
    [False, True],
]


@pytest.mark.parametrize("kind", [pa.int32(), pa.large_binary(), pa.large_string(), pa.bool_(), pa.float64()])
def test_a_slice_is_what_it_shows(kind):
    values = pa.array([str(i) for i in range(9)]) if "large" in str(kind) else pa.array([i % 2 for i in range(9)])
    a = values.cast(kind)
    fresh = pa.array(a.to_pylist()[1:4], kind)
    assert contents(pa.table({"t": a[1:4]})) == contents(pa.table({"t": fresh})) != contents(pa.table({"t": a[:3]}))


def test_near_misses_have_different_digests():
    assert len({contents(pa.table({"t": v}))["t"] for v in NEARLY}) == len(NEARLY)


texts = st.lists(st.one_of(st.none(), st.text("ab", max_size=3)), max_size=6)


@settings(max_examples=100, deadline=None)
@given(texts, texts, st.integers(0, 6))
def test_columns_are_equal_exactly_if_their_digests_are(a, b, cut):
    named = [contents(pa.table({"t": pa.array(v, pa.string())}))["t"] for v in (a, b)]
    assert (named[0] == named[1]) == (a == b)
    whole = pa.array([None, *a], pa.string())[1:]  # an offset
    assert contents(pa.table({"t": pa.chunked_array([whole[:cut], whole[cut:]])}))["t"] == named[0]


lists = st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 1)), max_size=2)), max_size=4)


@settings(max_examples=60, deadline=None)
@given(lists, lists)
def test_lists_and_structs_are_equal_exactly_if_their_digests_are(a, b):
    inner = pa.list_(pa.int8())
    for kind in (inner, pa.large_list(pa.int8()), pa.list_view(pa.int8())):
        named = [contents(pa.table({"t": pa.array(v, kind)}))["t"] for v in (a, b)]
        assert (named[0] == named[1]) == (a == b)
    struct = pa.struct({"x": inner, "y": pa.bool_()})
    held = [[None if v is None else {"x": v, "y": len(v) > 1} for v in rows] for rows in (a, b)]
    arrays = [pa.array(h, struct) for h in held]
    named = [contents(pa.table({"t": v}))["t"] for v in arrays]
    assert (named[0] == named[1]) == (a == b)
    offset = pa.concat_arrays([pa.array([{"x": [1, None, 1], "y": None}], struct), arrays[0]])[1:]
    assert contents(pa.table({"t": offset}))["t"] == named[0]
    maps = [
        pa.array(
            [None if v is None else [(str(i), x) for i, x in enumerate(v)] for v in rows],
            pa.map_(pa.string(), pa.int8()),
        )
        for rows in (a, b)
    ]
    named = [contents(pa.table({"t": v}))["t"] for v in maps]
    assert (named[0] == named[1]) == (a == b)


@pytest.mark.parametrize(
    "values, kind",
    [
        ([1, None, 3], pa.timestamp("us", "UTC")),
        ([1.5, None, 2], pa.float16()),
        ([b"ab", None, b"cd"], pa.binary(2)),
        ([None, None, None], pa.null()),
        ([[1, 2], None, [3, 4]], pa.list_(pa.int16(), 2)),
        ([1, None, 3], pa.decimal128(9, 2)),
        ([[[1], []], None, [[2, 3]]], pa.list_(pa.list_(pa.int64()))),
    ],
)
def test_every_type_has_a_digest(values, kind):
    a = pa.array(values, kind)
    named = contents(pa.table({"t": a}))
    assert contents(pa.table({"t": pa.concat_arrays([a[::2], a])[2:]})) == named
    assert contents(pa.table({"t": pa.chunked_array([a[:1], a[1:2], a[2:]])})) == named
    if kind != pa.null():
        assert len({contents(pa.table({"t": v}))["t"] for v in (a, a[::-1], a[:2], a[1:], a[:0])}) == 5


def test_ids():
    table = mixed(5000)
    for rows in forms(table):
        assert row_ids(rows).to_pylist() == table["index"].to_pylist()
    assert row_ids([{"x": 1}] * 3).to_pylist() == [0, 1, 2] and row_ids([]).to_pylist() == []
    ids = row_ids(pa.table({"index": pa.array([3, 1], pa.uint8())}))
    assert ids.type == pa.int64() and ids.to_pylist() == [3, 1]
    twice = [f"r{i}" for i in range(9000)]
    twice[8000] = twice[70] = "r5000"
    with pytest.raises(InputError, match="'r5000' in row 70 and in row 5000"):
        row_ids(pa.table({"index": twice}))
    for wrong in ([1.0, 2.0], [True, False], [[1], [2]], [None, None]):
        with pytest.raises(InputError, match="whole numbers or text"):
            row_ids(pa.table({"index": wrong}))
    with pytest.raises(InputError, match="none in row 4999"):
        row_ids(pa.table({"index": [*range(4999), None]}))
    with pytest.raises(InputError, match="one type in column 'index'"):
        row_ids([{"index": 1}, {"index": "1"}])
    with pytest.raises(InputError, match="64 bits"):
        row_ids(pa.table({"index": pa.array([2**63], pa.uint64())}))


class Words:
    "A step as far as the plan knows it"

    def leave_out(self, row):
        return None if row["text"] else "no text"

    def length(self, row):
        return len(row["text"].split())

    def cost(self, row, length):
        return 2.0 ** min(length, 11)


@pytest.mark.slow
def test_measure_is_the_same_with_other_processes():
    table = mixed(9000)
    alone, many = measure(table, Words()), measure(table, Words(), workers=2, patience=0)
    assert (many.length == alone.length).all() and (many.cost == alone.cost).all() and many.reason == alone.reason


def test_measure_is_the_same_in_every_form():
    table = mixed(5000)
    alone = measure(table, Words())
    for rows in forms(table)[::2]:
        again = measure(rows, Words())
        assert (
            (again.length == alone.length).all() and (again.cost == alone.cost).all() and again.reason == alone.reason
        )
    assert set(alone.reason) == {i for i, t in enumerate(table["text"].to_pylist()) if not t}
    assert sum(len(t) for t in slices(table, 100)) == 5000


def test_measure_refuses_or_records():
    rows = [{"text": "a b", "n": 2}, {"text": 7, "n": None}, {"text": "c", "n": 1}]
    rows = [{**r, "text": str(r["text"])} for r in rows]
    given_ = measure(rows, Words(), length_column="n")
    assert given_.length.tolist() == [2, 0, 1] and given_.reason == {1: "no length in column 'n'"}

    class Broken(Words):
        def length(self, row):
            return {"a b": 1.5, "7": True}.get(row["text"], 1)

    with pytest.raises(InputError, match="for row 0.*1.5"):
        measure(rows, Broken())
    held = measure(rows, Broken(), on_error="record")
    assert sorted(held.reason) == [0, 1] and "whole" not in held.reason[0] and held.length.tolist() == [0, 0, 1]
    with pytest.raises(InputError, match="near: text"):
        measure(rows, Words(), length_column="txt")
    with pytest.raises(InputError, match="on_error"):
        measure(rows, Words(), on_error="ignore")
    empty = measure([], Words(), length_column="n")
    assert len(empty.length) == len(empty.cost) == 0


# ---- identity

FIELDS = [
    ("i", pa.int64()),
    ("s", pa.string()),
    ("f", pa.float16()),
    ("l", pa.list_(pa.list_(pa.float32()))),
    ("x", pa.list_(pa.int8(), 3)),
    ("t", pa.struct([pa.field("b", pa.bool_(), nullable=False), pa.field("a", pa.large_list(pa.string()))])),
    ("z", pa.timestamp("ns", "Europe/Paris")),
    ("d", pa.dictionary(pa.int16(), pa.string())),
    ("o", pa.date32()),
    ("e", pa.duration("ms")),
    ("y", pa.binary()),
    ("n", pa.null()),
]


@given(st.lists(st.sampled_from(FIELDS), unique_by=lambda f: f[0]))
def test_a_schema_survives_json(fields):
    schema = pa.schema(fields)
    back = schema_from_json(json.loads(json.dumps(schema_to_json(schema), sort_keys=True)))
    assert back.equals(schema)


def test_schemas_that_cannot_be_read_back_are_refused():
    with pytest.raises(InputError):
        schema_to_json(pa.schema({"d": pa.decimal256(60)}))
    with pytest.raises(InputError):
        schema_to_json(pa.schema([("a", pa.int8()), ("a", pa.int16())]))


ROWS = [{"index": f"r{i}", "text": "word " * (i % 4 + 1), "label": i % 2} for i in range(20)]
TOLD = dict(
    id_column="index",
    step="Words",
    version=1,
    settings={
        "model": "tiny@1f",
        "template": "x" * 300,
        "decode": {"top_k": 5, "stops": [1, 2]},
        "layers": [{"n": 1}, {"n": 2}],
    },
    schema=pa.schema({"index": pa.string(), "score": pa.float32()}),
)


def spec_of(rows=None, plan=None, **changes) -> dict:
    rows = ROWS if rows is None else rows
    m = measure(rows, Words())
    made = make_plan(m.length, m.cost, reasons=m.reason, **{"batch_tokens": 16, "max_seq_len": 100, **(plan or {})})
    return make_spec(rows, plan=made, **{**TOLD, **changes})


def cells(**of: dict[int, object]) -> list:
    "ROWS with some cells changed: column={row: value}"
    return [{**r, **{c: v[i] for c, v in of.items() if i in v}} for i, r in enumerate(ROWS)]


def settings_with(**change) -> dict:
    return {"settings": {**TOLD["settings"], **change}}


MUTATIONS = {
    "row inserted": (dict(rows=[{"index": "new", "text": "a", "label": 0}, *ROWS]), ["data.rows: old 20 → new 21"]),
    "row removed": (dict(rows=ROWS[:7] + ROWS[8:]), ["data.rows: old 20 → new 19"]),
    "rows swapped": (dict(rows=[ROWS[1], ROWS[0], *ROWS[2:]]), ["data.columns.text.values", "ids.values"]),
    "cell changed": (dict(rows=cells(label={19: 5})), ["data.columns.label.values"]),
    "cell emptied": (dict(rows=cells(label={3: None})), ["data.columns.label.values"]),
    "column renamed": (
        dict(rows=[{"index": r["index"], "text": r["text"], "klass": r["label"]} for r in ROWS]),
        ["data.columns.label: old", "data.columns.klass: old (nothing)"],
    ),
    "column type": (
        dict(rows=cells(label={i: float(i % 2) for i in range(20)})),
        ['data.columns.label.type: old "int64"'],
    ),
    "id changed": (dict(rows=cells(index={4: "other"})), ["data.columns.index.values", "ids.values"]),
    "id column": (
        dict(rows=[{**r, "key": i} for i, r in enumerate(ROWS)], id_column="key"),
        ['ids.column: old "index" → new "key"'],
    ),
    "model": (settings_with(model="tiny@20"), ['step.settings.model: old "tiny@1f" → new "tiny@20"']),
    "template": (settings_with(template="x" * 200 + "y" + "x" * 99), ["step.settings.template: old …", "xyx"]),
    "nested setting": (
        settings_with(decode={"top_k": 6, "stops": [1, 2]}),
        ["step.settings.decode.top_k: old 5 → new 6"],
    ),
    "setting in a list": (settings_with(layers=[{"n": 1}, {"n": 3}]), ["step.settings.layers[1].n: old 2 → new 3"]),
    "list grown": (
        settings_with(decode={"top_k": 5, "stops": [1, 2, 3]}),
        ["decode.stops: old [1, 2] → new [1, 2, 3]"],
    ),
    "setting added": (settings_with(seed=None), ["step.settings.seed: old (nothing) → new null"]),
    "step name": (dict(step="Letters"), ['step.name: old "Words" → new "Letters"']),
    "step version": (dict(version=2), ["step.version: old 1 → new 2"]),
    "schema column type": (
        dict(schema=pa.schema({"index": pa.string(), "score": pa.float64()})),
        ['schema.types.score: old "float" → new "double"'],
    ),
    "schema order": (dict(schema=pa.schema({"score": pa.float32(), "index": pa.string()})), ["schema.order"]),
    "batch_tokens": (dict(plan={"batch_tokens": 17}), ["plan.batch_tokens: old 16 → new 17", "plan.fingerprint"]),
    "max_seq_len": (dict(plan={"max_seq_len": 3}), ["plan.max_seq_len: old 100 → new 3", "plan.fingerprint"]),
    "window": (dict(plan={"window": 5}), ["plan.window: old null → new 5"]),
}


def tree(folder: Path) -> dict:
    return {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_refused_by_name(name, tmp_path):
    change, said = MUTATIONS[name]
    save_spec(tmp_path, spec_of())
    before = tree(tmp_path)
    other = spec_of(**change)
    found = differences(spec_of(), other)
    for text in said:
        assert any(text in d for d in found), found
    assert spec_fingerprint(other) != spec_fingerprint(spec_of())
    with pytest.raises(InputError) as e:
        check(tmp_path, other)
    assert all(d in str(e.value) for d in [" ".join(d.split()) for d in found]) and "--force-restart" in str(e.value)
    with pytest.raises(InputError):
        save_spec(tmp_path, other)
    assert tree(tmp_path) == before
    assert check(tmp_path, spec_of())


def test_only_what_changed_is_named():
    old = spec_of()
    assert differences(old, spec_of()) == [] and differences(old, json.loads(json.dumps(old))) == []
    assert [d.split(":")[0] for d in differences(old, spec_of(rows=cells(label={19: 5})))] == [
        "data.columns.label.values"
    ]
    assert len(differences(old, spec_of(version=2))) == 1
    turned = {k: old[k] for k in reversed(old)}
    assert differences(old, turned) == [] and spec_fingerprint(old) == spec_fingerprint(turned)
    assert spec_of(rows=pa.Table.from_pylist(ROWS)) == spec_of(rows=datasets.Dataset.from_list(ROWS)) == old


json_ = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(0, 2), st.sampled_from([0.0, 1.0]), st.text("ab", max_size=2)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("ab", max_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(json_, json_)
def test_no_difference_means_equal_text(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (differences(a, b) == []) == same
    assert differences(a, a) == [] and len(differences({"k": a}, {})) >= 1


def test_whose_folder(tmp_path):
    spec = spec_of()
    assert check(tmp_path / "new", spec) is False and not (tmp_path / "new").exists()
    (tmp_path / "begun" / "_job" / "tmp").mkdir(parents=True)
    (tmp_path / "begun" / "data").mkdir()
    assert check(tmp_path / "begun", spec) is False  # it was stopped before it had begun
    (tmp_path / "begun" / "data" / "part.parquet").write_bytes(b"")
    with pytest.raises(WorldError, match="got data"):
        check(tmp_path / "begun", spec)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(WorldError, match="thesis.tex.*another output directory"):
        save_spec(tmp_path / "mine", spec)
    with pytest.raises(WorldError, match="a folder"):
        check(tmp_path / "mine" / "thesis.tex", spec)
    (tmp_path / "mine" / "thesis.tex").rename(tmp_path / "mine" / "data")
    with pytest.raises(WorldError, match="got data"):
        check(tmp_path / "mine", spec)
    save_spec(tmp_path / "out", spec)
    assert read_spec(tmp_path / "out") == spec and check(tmp_path / "out", spec)
    path = tmp_path / "out" / "_job" / "spec.json"
    text = path.read_text()
    for broken in (text[:-9], "", "[]", "{}", text.replace("tiny@1f", "tiny@1e"), '{"spec": 1}'):
        path.write_text(broken)
        with pytest.raises(WorldError, match="damaged"):
            check(tmp_path / "out", spec)
    path.write_text(text)
    save_spec(tmp_path / "out", spec)
    assert path.read_text() == text and [p.name for p in path.parent.iterdir()] == ["spec.json"]


@pytest.mark.parametrize("odd", [np.float32(1), Path("x"), {1, 2}, b"x", print, np.zeros(2)])
def test_settings_that_are_no_json_are_refused_by_name(odd):
    with pytest.raises(InputError, match=r"settings.deep\[1\].it"):
        spec_of(settings={"deep": [0, {"it": odd}]})


def test_a_tuple_is_a_list():
    assert spec_of(settings={"a": (1, 2)}) == spec_of(settings={"a": [1, 2]})


def test_a_plan_says_its_type():
    assert isinstance(make_plan([1], batch_tokens=1), Plan)


def test_of_two_runs_that_begin_together_the_first_wins(tmp_path, monkeypatch):
    from llm_analysis.jobs import identity

    mine, other = spec_of(), spec_of(version=2)
    real = identity.check
    monkeypatch.setattr(
        identity,
        "check",
        lambda folder, spec: False if not calls.append(1) and len(calls) == 1 else real(folder, spec),
    )
    for spec, fails in ((mine, False), (other, True)):
        (tmp_path / str(fails)).mkdir()
        calls: list = [1]
        save_spec(tmp_path / str(fails), mine)
        calls.clear()  # the second looked while the folder was still free
        if fails:
            with pytest.raises(InputError, match="step.version: old 1 → new 2"):
                save_spec(tmp_path / str(fails), spec)
        else:
            save_spec(tmp_path / str(fails), spec)
        assert read_spec(tmp_path / str(fails)) == mine
        assert [p.name for p in (tmp_path / str(fails) / "_job").iterdir()] == ["spec.json"]


@pytest.mark.parametrize("moment", ["stat", "read_spec", "_foreign"])
def test_a_run_that_begins_while_another_looks_is_no_foreign_file(tmp_path, monkeypatch, moment):
    "Two runs that are the same begin together: whichever question the other comes before, it is not refused"
    from llm_analysis.jobs import identity

    folder, began = tmp_path / "out", []

    def other_begins(*_):
        if not began:
            began.append(True)
            save_spec(folder, spec_of())
            (folder / "data").mkdir()
            (folder / "data" / "part-00000-00000000.parquet").write_bytes(b"")
            (folder / "manifest.json").write_text("{}")

    if moment == "stat":
        real_stat = Path.stat

        def stat(path, **how):
            try:
                return real_stat(path, **how)
            finally:
                other_begins() if path == folder else None

        monkeypatch.setattr(Path, "stat", stat)
    else:
        folder.mkdir()
        real = getattr(identity, moment)

        def asked(*args):
            found = real(*args) if moment == "read_spec" else None
            other_begins()
            return real(*args) if moment == "_foreign" else found

        monkeypatch.setattr(identity, moment, asked)
    save_spec(folder, spec_of())
    assert began and read_spec(folder) == spec_of()


def test_without_hard_links_the_spec_is_renamed(tmp_path, monkeypatch):
    import errno
    import os

    def link(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    save_spec(tmp_path, spec_of())
    assert check(tmp_path, spec_of()) and [p.name for p in (tmp_path / "_job").iterdir()] == ["spec.json"]

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="full"):
        save_spec(tmp_path / "b", spec_of())
    assert list((tmp_path / "b" / "_job").iterdir()) == []
