"""Tokens that keep their places answer as the full text does with the others masked out, on every family and route."""

import numpy as np
import pytest
import torch
from families import CONFIGS, VOCAB, WINDOW, byte_tokenizer, open_family, sequences
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from llm_analysis.core import InputError
from llm_analysis.lm import kept, routes
from llm_analysis.lm.model import LM
from llm_analysis.lm.packing import hidden, logits, token_logprobs
from llm_analysis.lm.plan import ROUTES

torch.set_num_threads(1)
DEAF = ("bloom", "mamba")
WINDOWED = ("mistral", "gemma2", "phi3")
HEARING = [f for f in CONFIGS if f not in DEAF]


def square(stays, window=None):
    "Which of the full text's keys each query sees, written out: the past that stays, and itself"
    n = len(stays)
    back = np.arange(n)[:, None] - np.arange(n)[None, :]
    seen = (back >= 0) & (stays[None, :] | (back == 0))
    return seen if window is None else seen & (back < window)


def additive(seen):
    mask = np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)
    return torch.from_numpy(mask)[None, None]


def reference(lm, family, full, stays):
    "The model's own forward over the full text, its 4-D mask made by hand; hidden states and float64 log-softmax"
    near, wide = additive(square(stays, WINDOW)), additive(square(stays))
    mask = wide if family not in WINDOWED else near
    if family == "gemma2":  # windows in every other layer: it takes a mask for each kind
        mask = {"full_attention": wide, "sliding_attention": near}
    given = dict(input_ids=torch.from_numpy(full)[None], position_ids=torch.arange(len(full))[None])
    with torch.no_grad():
        out = lm.model(**given, attention_mask=mask, use_cache=False, output_hidden_states=True)
    return out.logits[0].double().log_softmax(-1).numpy(), [h[0].numpy() for h in out.hidden_states]


def shortened(seed, count=12, longest=32):
    "Texts, who stays in each (the first and the last token always), and what is left"
    rng = np.random.default_rng(seed)
    fulls = [s for s in sequences(seed, longest, count) if len(s) > 1]
    stays = [rng.random(len(s)) < rng.uniform(0.2, 0.9) for s in fulls]
    for keep in stays:
        keep[[0, -1]] = True
    return fulls, stays, [s[k] for s, k in zip(fulls, stays)], [np.flatnonzero(k) for k in stays]


@pytest.mark.parametrize("family", HEARING)
def test_kept_places_are_the_full_text_with_a_mask(family):
    lm, (fulls, stays, left, places) = open_family(family), shortened(1)
    want = [reference(lm, family, s, k) for s, k in zip(fulls, stays)]
    for route in ROUTES:
        if not routes.proven(lm, route, 32, kept.prove_kept).holds:
            assert family in WINDOWED and route != "varlen"
            continue
        found = logits(lm, left, places=places, route=route)
        assert found.report.route == route
        scored = token_logprobs(lm, left, places=places, route=route)
        for (z, _), s, p, rows, scores in zip(want, left, places, found, scored):
            rows = torch.from_numpy(rows).double().log_softmax(-1).numpy()
            np.testing.assert_allclose(rows, z[p], rtol=0, atol=1e-4)
            np.testing.assert_allclose(scores, z[p[:-1], s[1:]], rtol=0, atol=1e-4)
    for layer in (0, 1, -1):
        for h, (_, states), p in zip(hidden(lm, left, layer=layer, places=places), want, places):
            np.testing.assert_allclose(h, states[layer][p], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_counts_what_is_left_is_caught(family, monkeypatch):
    lm, near = open_family(family), routes._near
    counting = lambda steps, *rest: near(torch.arange(steps.shape[-1]), *rest)
    monkeypatch.setattr(routes, "_near", counting)
    proof = kept.prove_kept(lm, "varlen", 32)
    assert not proof.holds and proof.neighbours == 0 and proof.difference > 100 * proof.tolerance
    assert kept.prove_kept(lm, "varlen", WINDOW - 1).holds


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_trap_of_positions_without_a_mask_is_caught(family, monkeypatch):
    "Left without a mask, the library takes a gap for the beginning of another text"
    given = routes._given
    bare = lambda *asked: {k: v for k, v in given(*asked).items() if k != "attention_mask"}
    monkeypatch.setattr(routes, "_given", bare)
    held = kept.prove_kept(open_family(family), "padded", 32).holds
    assert held == (family == "opt")  # OPT does not hand its positions on to its mask
    assert not kept.prove_kept(open_family(family), "packed", 32).holds


@pytest.mark.parametrize("family", DEAF)
def test_models_without_positions_refuse(family):
    lm, (_, _, left, places) = open_family(family), shortened(2)
    with pytest.raises(InputError, match="it takes no positions; delete tokens, or replace them"):
        logits(lm, left, places=places)
    with pytest.raises(InputError, match="no positions"):
        logits(lm, left, places=places, route="padded")


def built(kind, **values):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "conv" not in name:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    here = (torch.device("cpu"), torch.float32)
    return LM(kind, model.requires_grad_(False), byte_tokenizer(), None, f"{kind} of test_kept", *here)


def test_alibi_and_linear_attention_refuse():
    "They take the argument; what they do with it is not what was asked"
    wide = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    falcon = built("falcon", **wide, alibi=True, new_decoder_architecture=False)
    linear = built(
        "qwen3_next", **wide, intermediate_size=48, num_key_value_heads=2, head_dim=8, num_experts=0,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    for lm in (falcon, linear):
        reasons = {r: kept.prove_kept(lm, r, 24).reason for r in ROUTES}
        assert all(reasons.values()), (lm.name, reasons)
        with pytest.raises(InputError, match="delete tokens, or replace them, instead"):
            logits(lm, [[1, 2, 3]], places=[[0, 2, 5]])


cuts = st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=6), max_size=8)


@settings(max_examples=20, deadline=None)
@example([[(1, 1), (2, 1)], [(1, 1), (2, 3)], [(1, 2), (2, 1)], [(1, 1), (2, 3)]], True, "padded")
@given(cuts, st.booleans(), st.sampled_from(ROUTES))
def test_any_request_with_places_is_answered_as_one_by_one(drawn, dedupe, route):
    "Few ids and short gaps: equal tokens at equal and at other places in every example"
    lm = open_family("llama")
    left = [[token for token, _ in s] for s in drawn]
    places = [(np.cumsum([step for _, step in s]) - 1).tolist() for s in drawn]
    found = logits(lm, left, [[-1]] * len(left), places=places, route=route, dedupe=dedupe)
    different = {(tuple(s), tuple(p)) for s, p in zip(left, places)}
    assert found.report.unique == (len(different) if dedupe else len(left))
    for s, p, z in zip(left, places, found):
        want = kept.masked_out(lm, np.array(s), np.array(p), np.array([len(s) - 1]))[0].numpy()
        np.testing.assert_allclose(z[0], want, rtol=0, atol=1e-4)


def test_places_from_zero_are_no_places():
    lm, seqs = open_family("gpt2"), sequences()
    counted = token_logprobs(lm, seqs, places=[np.arange(len(s)) for s in seqs])
    for a, b in zip(token_logprobs(lm, seqs), counted):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_the_common_path_gives_no_mask_and_no_positions(monkeypatch):
    "Without places the model is asked exactly as before: tokens alone"
    lm, seen = open_family("llama", seed=3), []
    plain = type(lm.model).forward
    spy = lambda self, **given: seen.append(set(given)) or plain(self, **given)
    for route in ROUTES:
        monkeypatch.setattr(type(lm.model), "forward", plain)
        routes.proven(lm, route, 32) if route != "single" else None
        monkeypatch.setattr(type(lm.model), "forward", spy)
        spy.__signature__ = routes.inspect.signature(plain)
        seen.clear()
        token_logprobs(lm, sequences(), route=route)
        more = {"position_ids"} if route in ("packed", "varlen") else set()
        assert all(given == {"input_ids", "use_cache", "output_hidden_states"} | more for given in seen) and seen
