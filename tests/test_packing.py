"""Every family's answers on every route agree with a plain loop that shares no code with the package."""

import warnings

import numpy as np
import pytest
import torch
from families import CONFIGS, PACKABLE, UNPACKABLE, VOCAB, WINDOW, open_family, random_model, sequences
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_analysis.core import InputError
from llm_analysis.lm import routes
from llm_analysis.lm.packing import hidden, logits, token_logprobs
from llm_analysis.lm.plan import ROUTES, plan
from llm_analysis.lm.tree import TREE, lay_out_tree, plan_tree

torch.set_num_threads(1)
TOGETHER = [r for r in ROUTES if r != "single"]


def reference(lm, seqs):
    "One forward a sequence with the library's defaults, log-softmax in float64"
    with torch.no_grad():
        return [lm.model(torch.from_numpy(s)[None]).logits[0].double().log_softmax(-1).numpy() for s in seqs]


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_matter(family):
    "A token in the window changes the last answer: where it did not, an agreement would mean nothing"
    lm = open_family(family)
    s = sequences()[1]
    others = [np.where(np.arange(len(s)) == len(s) - back, (s + 1) % VOCAB, s) for back in (2, 3, 4, 5)]
    same, *changed = (z[-1] for z in reference(lm, [s, *others]))
    assert max(np.abs(same - z).max() for z in changed) > 0.1


@pytest.mark.parametrize("family", CONFIGS)
def test_every_proven_route_agrees_with_the_loop(family):
    lm, seqs = open_family(family), sequences()
    alone = reference(lm, seqs)
    for route in ROUTES:
        if route != "single" and not routes.proven(lm, route, 32).holds:
            assert family in UNPACKABLE and route in ("packed", "varlen")
            continue
        got = token_logprobs(lm, seqs, route=route)
        assert got.report.route == route and got.report.computed <= 1.05 * got.report.useful
        for s, p, z in zip(seqs, got, alone):
            assert p.shape == (len(s) - 1,) and p.dtype == np.float32
            np.testing.assert_allclose(p, z[np.arange(len(s) - 1), s[1:]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", PACKABLE)
def test_packing_is_proven_and_dense_models_to_the_bit(family):
    for route in TOGETHER:
        proof = routes.proven(open_family(family), route, 32)
        assert proof.holds, (family, proof)
        assert proof.neighbours == 0 or family in ("mixtral", "qwen2_moe")


@pytest.mark.parametrize("family", UNPACKABLE)
def test_families_that_leak_are_refused_aloud_and_served_right(family):
    lm, seqs = open_family(family), sequences()
    proof = routes.proven(lm, "packed", 32)
    assert not proof.holds and proof.reason
    with pytest.warns(RuntimeWarning, match="'packed' is not taken"):
        got = token_logprobs(lm, seqs, route="packed")
    assert got.report.route in ("padded", "bucket", "varlen") and "instead of packed" in got.report.why
    for s, p, z in zip(seqs, got, reference(lm, seqs)):
        np.testing.assert_allclose(p, z[np.arange(len(s) - 1), s[1:]], rtol=0, atol=1e-5)
    assert routes.proven(lm, "bucket", 32).holds


def test_a_leak_is_caught(monkeypatch):
    "With the cache left on, a packed row leaks; the proof sees it and the answers stay right"
    lm = open_family("llama", seed=1)
    plain = type(lm.model).forward
    leaky = lambda self, **kwargs: plain(self, **(kwargs | {"use_cache": True}))
    monkeypatch.setattr(type(lm.model), "forward", leaky)
    monkeypatch.setattr(routes, "_PROOFS", {})
    assert not routes.proven(lm, "packed", 32).holds
    with pytest.warns(RuntimeWarning, match="neighbours change an answer"):
        got = token_logprobs(lm, sequences(), route="packed")
    monkeypatch.setattr(type(lm.model), "forward", plain)
    for s, p, z in zip(sequences(), got, reference(lm, sequences())):
        np.testing.assert_allclose(p, z[np.arange(len(s) - 1), s[1:]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3"])
def test_a_lost_window_is_caught(family, monkeypatch):
    "Attention without the window leaks nothing; only the comparison with one by one can see it"
    block = routes._block
    monkeypatch.setattr(routes, "_block", lambda q, k, v, scale, window, *rest: block(q, k, v, scale, None, *rest))
    proof = routes.prove(open_family(family), "varlen", 32)
    assert not proof.holds and proof.neighbours == 0 and proof.difference > 100 * proof.tolerance
    assert routes.prove(open_family(family), "varlen", WINDOW - 1).holds


def test_positions_that_do_not_restart_are_caught(monkeypatch):
    "Positions that run on through a row make the library see one long document"
    lay_out = routes.lay_out

    def run_on(*given):
        x = lay_out(*given)
        steps = np.broadcast_to(np.arange(x.ids.shape[1]), x.ids.shape).copy()
        return routes.Inputs(x.ids, steps, x.runs, x.gather)

    monkeypatch.setattr(routes, "lay_out", run_on)
    proof = routes.prove(open_family("llama"), "packed", 32)
    assert not proof.holds and proof.neighbours > 0.05


def test_a_wrong_gather_is_caught(monkeypatch):
    lay_out = routes.lay_out

    def shifted(forward, *given):
        x = lay_out(forward, *given)
        return x if len(forward.rows) < 4 else routes.Inputs(x.ids, x.positions, x.runs, np.roll(x.gather, 1))

    monkeypatch.setattr(routes, "lay_out", shifted)
    assert not routes.prove(open_family("llama"), "padded", 32).holds


def test_half_precision_is_proven_within_its_own_rounding():
    lm = open_family("llama")
    half = type(lm)(**(vars(lm) | dict(model=random_model("llama").bfloat16().eval(), dtype=torch.bfloat16)))
    for route in TOGETHER:
        proof = routes.prove(half, route, 32)
        assert proof.holds and proof.neighbours == 0 and 1e-4 < proof.tolerance < 1, proof
    block = routes._block
    try:
        routes._block = lambda q, k, v, scale, window, *rest: block(q, k, v, scale, 2, *rest)
        assert not routes.prove(half, "varlen", 32).holds
    finally:
        routes._block = block


def test_soft_capping_and_head_rows_are_kept():
    "Only the asked-for rows meet the head, and what follows the head still happens"
    lm, seqs = open_family("gemma2"), sequences()
    rows = []
    hook = lm.model.lm_head.register_forward_hook(lambda m, given, out: rows.append(out.shape[:-1]))
    got = logits(lm, seqs, [[-1]] * len(seqs), route="packed", dedupe=False)
    hook.remove()
    assert sum(np.prod(r) for r in rows) == len(seqs)
    assert max(np.abs(z).max() for z in got) <= 5.0
    for z, want in zip(got, reference(lm, seqs)):
        np.testing.assert_allclose(torch.from_numpy(z[0]).log_softmax(-1), want[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_hidden_states_are_the_models_own(family):
    lm, seqs = open_family(family), sequences(count=10)
    with torch.no_grad():
        want = [lm.model(torch.from_numpy(s)[None], output_hidden_states=True).hidden_states for s in seqs]
    for layer in (0, 1, -1):
        for h, w in zip(hidden(lm, seqs, layer=layer), want):
            np.testing.assert_allclose(h, w[layer][0], rtol=0, atol=2e-5)
    with pytest.raises(InputError, match="expected a layer from -3 to 2; got 3"):
        hidden(lm, seqs, layer=3)


lists = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), max_size=12)


@settings(max_examples=20, deadline=None)
@given(lists, st.booleans(), st.sampled_from((*ROUTES, TREE)), st.data())
def test_any_request_is_answered_as_by_a_loop(seqs, dedupe, route, data):
    "Few token ids and short lengths: copies, prefixes and repeated positions in every example"
    lm = open_family("llama")
    where = [data.draw(st.lists(st.integers(-len(s), len(s) - 1), max_size=3)) for s in seqs]
    got = logits(lm, seqs, where, columns=[3, 3, 130], route=route, dedupe=dedupe)
    assert len(got) == len(seqs) and got.report.unique <= len(seqs)
    for s, p, z in zip(seqs, where, got):
        assert z.shape == (len(p), 3)
        if p:
            with torch.no_grad():
                want = lm.model(torch.tensor([s])).logits[0][p][:, [3, 3, 130]]
            np.testing.assert_allclose(z, want, rtol=0, atol=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 300), max_size=60), st.integers(1, 400), st.integers(1, 300), st.integers(1, 40),
    st.sampled_from(ROUTES),
)  # fmt: skip
def test_any_plan_holds_every_sequence_once(lengths, budget, row, max_answers, route):
    p = plan(route, lengths, asked=[1] * len(lengths), budget=budget, row=row, max_answers=max_answers)
    assert sorted(i for f in p.forwards for i in f.members) == list(range(len(lengths)))
    assert p.useful == sum(lengths) and p.computed == sum(f.width * len(f.rows) for f in p.forwards)
    assert p.computed_pairs >= p.useful_pairs and p.computed <= 1.05 * p.useful + 1e-9
    for f in p.forwards:
        assert all(sum(lengths[i] for i in r) <= f.width for r in f.rows)
        assert len(f.rows) == 1 or len(f.rows) * f.width <= budget
        if route in ("bucket", "single"):
            assert {lengths[i] for i in f.members} == {f.width}
        if route == "packed":
            assert all(sum(lengths[i] for i in r) <= row or len(r) == 1 for r in f.rows)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=60),
    st.integers(1, 60), st.integers(1, 20),
)  # fmt: skip
def test_any_tree_holds_every_sequence_once(sequences, budget, max_answers):
    seqs = [np.array(s) for s in sequences]
    p, asked = (
        plan_tree(seqs, asked=[1] * len(seqs), budget=budget, max_answers=max_answers),
        [np.array([len(s) - 1]) for s in seqs],
    )
    assert sorted(i for f in p.forwards for i in f.members) == list(range(len(seqs)))
    assert p.useful == sum(map(len, seqs)) and p.computed == sum(len(f.rows) * f.width for f in p.forwards)
    for f in p.forwards:
        prefixes = [{tuple(seqs[i][:k]) for i in row for k in range(1, len(seqs[i]) + 1)} for row in f.rows]
        assert f.width == max(map(len, prefixes)) and len(f.members) <= max_answers
        assert len(f.rows) * f.width <= budget or len(f.members) == 1
        for row in f.rows:
            ids, depth, sees, gather = lay_out_tree(row, seqs, asked)
            assert [ids[sees[g]].tolist() for g in gather] == [seqs[i].tolist() for i in row]
            assert (depth == sees.sum(1) - 1).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_trees_are_right_or_refused(family):
    "Windows, and models that take no positions, have no tree; the others give the loop's answers"
    lm, rng = open_family(family), np.random.default_rng(5)
    words = rng.integers(0, VOCAB, 7)
    seqs = [np.append(1, words[(r >> np.arange(7)) & 1 == 1]) for r in range(128)]
    proof = routes.proven(lm, TREE, 16)
    if not proof.holds:
        print(family, proof.reason)
        assert family not in ("llama", "qwen2", "gpt2")
        return
    got = logits(lm, seqs, [[-1]] * 128, route=TREE)
    assert got.report.route == TREE and got.report.computed < 0.4 * got.report.useful
    for z, want in zip(got, reference(lm, seqs)):
        np.testing.assert_allclose(z[0] - z[0].max(), want[-1] - want[-1].max(), rtol=0, atol=2e-4)


def test_memory_of_the_vocabulary_is_bounded(monkeypatch):
    "No forward reads more rows of the vocabulary than it may, except for one sequence alone"
    lm, seqs, seen = open_family("llama"), sequences(longest=100, count=40), []
    monkeypatch.setattr(type(lm), "vocab", property(lambda self: (1 << 26) // 64))
    hook = lm.model.lm_head.register_forward_hook(lambda m, given, out: seen.append(out.shape[1]))
    token_logprobs(lm, seqs, route="varlen")
    hook.remove()
    assert max(seen[-20:]) <= 99 and np.median(seen) <= 64


def test_choice_is_remembered_and_quiet_for_good_routes():
    lm = open_family("qwen2")
    seqs = [s for k in range(14) for s in sequences(k)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports = [token_logprobs(lm, seqs, batch_tokens=64).report for _ in range(4)]
    assert [r.why for r in reports][-2:] == ["measured"] * 2 and reports[-1].route == reports[-2].route


def test_bad_requests_are_refused_before_any_forward(monkeypatch):
    lm = open_family("llama")
    monkeypatch.setattr(type(lm.model), "forward", lambda self, **kwargs: pytest.fail("a forward was computed"))
    good = [[1, 2, 3]]
    for call, words in [
        (lambda: token_logprobs(lm, [[1], []]), "sequence 1 of shape"),
        (lambda: token_logprobs(lm, [[1] * 129]), "at most 128 tokens"),
        (lambda: token_logprobs(lm, [[VOCAB]]), f"token ids 0 to {VOCAB - 1}"),
        (lambda: token_logprobs(lm, good, [[0]]), "token 0 has nothing before it"),
        (lambda: token_logprobs(lm, good, [[3]]), "expected positions 1 to 2"),
        (lambda: token_logprobs(lm, good, []), "one list of positions for each sequence"),
        (lambda: logits(lm, good, columns=[VOCAB]), "expected columns"),
        (lambda: logits(lm, good, route="quick"), "expected a route"),
        (lambda: logits(lm, good, batch_tokens=-1), "batch_tokens"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
    assert len(token_logprobs(lm, [])) == 0
    assert [a.shape for a in logits(lm, good, [[]])] == [(0, VOCAB)]
