"""The output head a few positions at a time: every family's answers are those of all at once, or it is computed so aloud."""

import functools
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from families import CONFIGS, VOCAB, open_family, sequences
from transformers import AutoConfig, AutoModelForCausalLM

from llm_analysis.data import open_rows
from llm_analysis.lm import head, routes
from llm_analysis.lm.model import LM, load
from llm_analysis.lm.packing import stream_logits
from llm_analysis.lm.template import template
from llm_analysis.logits import extract, plan, verify
from llm_analysis.logits.extract import Request, picks, picks_each
from llm_analysis.logits.nucleus import Nucleus
from llm_analysis.logits.run import extract as run
from llm_analysis.logits.select import TopK, VarOpt
from llm_analysis.logits.store import LogitStore
from llm_analysis.logits.texts import Text

torch.set_num_threads(1)
SCALED = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MORE = {
    "cohere": ("cohere", SCALED | dict(intermediate_size=48, logit_scale=0.0625)),
    "granite": ("granite", SCALED | dict(intermediate_size=48, logits_scaling=8.0)),
    "falcon_mamba": ("falcon_mamba", dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "tied": ("llama", SCALED | dict(intermediate_size=48, tie_word_embeddings=True)),
}


@functools.cache
def opened(family: str, seed: int = 0) -> LM:
    if family in CONFIGS:
        return open_family(family, seed)
    kind, values = MORE[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 and "A_log" not in name and "conv" not in name:
            torch.nn.init.normal_(p, 0, 1.5 / p.shape[-1] ** 0.5)
    own = open_family("llama")
    return replace(own, name=family, model=model.requires_grad_(False), fingerprint=f"{family}-{seed}-made")


def asked(seqs):
    "All positions of some, the later half of others, none of one"
    return [np.arange(len(s) // 2 if i % 2 else 0, len(s) if i != 3 else 0) for i, s in enumerate(seqs)]


def gathered(lm: LM, seqs, **how) -> tuple[dict[int, np.ndarray], list[int]]:
    "Logits by sequence, and how many came at a time"
    found, blocks = {}, []
    for z, owners in stream_logits(lm, seqs, asked(seqs), **how):
        assert sum(n for _, n in owners) == len(z)
        blocks.append(len(z))
        for (i, _), rows in zip(owners, z.clone().split([n for _, n in owners])):
            found.setdefault(i, []).append(rows.numpy())
    return {i: np.concatenate(parts) for i, parts in found.items()}, blocks


@pytest.fixture(autouse=True)
def nothing_is_left_aloud():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize("route", ["padded", "single"])
@pytest.mark.parametrize("family", [*CONFIGS, *MORE])
def test_a_few_at_a_time_are_all_at_once(family, route):
    lm, seqs = opened(family), sequences(longest=32)
    assert routes.splits(lm)
    whole, at_once = gathered(lm, seqs, route=route, most=10_000)
    few, blocks = gathered(lm, seqs, route=route, most=5)
    assert max(blocks) <= 5 < max(at_once) and sum(blocks) == sum(at_once)
    assert sorted(few) == sorted(whole) == [i for i in range(len(seqs)) if i != 3]
    for i, z in few.items():
        with torch.no_grad():
            alone = lm.model(torch.from_numpy(seqs[i])[None]).logits[0].numpy()[asked(seqs)[i]]
        top = np.abs(z).max()
        np.testing.assert_allclose(z, whole[i], rtol=0, atol=2e-6 * max(top, 1))
        np.testing.assert_allclose(z, alone, rtol=0, atol=1e-5 * max(top, 1))
        if family == "gemma2":
            assert top <= 5


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "mamba", "opt", "gpt2"])
def test_the_head_sees_no_more_and_the_body_works_once(family):
    lm, seqs, saw, bodies = opened(family), [np.arange(100) % VOCAB, np.arange(3)], [], []
    assert routes.splits(lm)
    layers = next(m for m in lm.model.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [head.head_of(lm.model).register_forward_hook(lambda m, given, out: saw.append(out.shape[1]))]
    hooks += [layers[0].register_forward_hook(lambda *_: bodies.append(1))]
    blocks = [len(z) for z, _ in stream_logits(lm, seqs, route="single", most=16)]
    for hook in hooks:
        hook.remove()
    assert saw == blocks and sorted(saw) == [3, 4, 16, 16, 16, 16, 16, 16] and len(bodies) == 2


def test_rows_that_fit_are_computed_as_ever(monkeypatch):
    "No experiment, no further call, and the same bits"
    lm, seqs, calls = opened("llama"), sequences(longest=32), []
    whole, _ = gathered(lm, seqs, route="padded", most=10_000)
    monkeypatch.setattr(routes, "_BEARS", {k: v for k, v in routes._BEARS.items() if k[-1] != "split"})
    for name in ("rest", "_bears"):
        own = getattr(routes, name)
        watch = lambda *a, own=own, name=name, **k: calls.append((name, a[1])) or own(*a, **k)
        monkeypatch.setattr(routes, name, watch)
    again, _ = gathered(lm, seqs, route="padded", most=32)
    assert {what for name, what in calls if name == "_bears"} <= {"spare"}
    assert not [c for c in calls if c[0] == "rest"]
    few, _ = gathered(lm, seqs, route="padded", most=31)
    assert [c for c in calls if c[0] == "rest"] and ("_bears", "split") in calls
    for i, z in whole.items():
        np.testing.assert_allclose(again[i], z, rtol=0, atol=1e-5)


# ---- what cannot be is done otherwise, aloud -----------------------------------------------------------------------


def spoilt(spoil) -> LM:
    "A Gemma with something about its head that only all rows together show"
    lm = opened("gemma2")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(lm.model.config).eval().requires_grad_(False)
    model.load_state_dict(lm.model.state_dict())
    spoil(model)
    return replace(lm, model=model, fingerprint=f"spoilt-{id(model)}")


def joint(model):
    model.lm_head.register_forward_hook(lambda _, given, out: out + out.mean(1, keepdim=True))


def counting(model):
    model.lm_head.register_forward_hook(lambda _, given, out: out + 0.01 * torch.arange(out.shape[1])[None, :, None])


def refusing(model):
    def refuse(_, given):
        if given["input_ids"].shape[1] == 1:
            raise ValueError("one token is not enough")

    plain = type(model).forward
    model.forward = lambda **given: refuse(None, given) or plain(model, **given)


@pytest.mark.parametrize("spoil", [joint, counting, refusing])
def test_what_does_not_bear_it_is_computed_at_once_aloud(spoil):
    lm, seqs = spoilt(spoil), [s for s in sequences(longest=32) if len(s) > 1]
    assert not routes.splits(lm)
    whole, _ = gathered(lm, seqs, route="single", most=10_000)
    with pytest.warns(RuntimeWarning, match="all logits of a text are made at once"):
        few, blocks = gathered(lm, seqs, route="single", most=5)
    assert max(blocks) > 5 and all((few[i] == z).all() for i, z in whole.items())


def without_what_follows(model, seen, first, most):
    "The head's matrix alone, which forgets what the model does behind it"
    for start in range(first, len(seen.rows), most):
        yield head.head_of(model)(seen.rows[start : start + most])


def one_further(model, seen, first, most):
    seen.rows = seen.rows.roll(1, 0)
    yield from head.rest(model, seen, first, most)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "llama"])
@pytest.mark.parametrize("wrong", [without_what_follows, one_further])
def test_the_experiment_can_fail(monkeypatch, family, wrong):
    lm = opened(family)
    monkeypatch.setattr(routes, "_BEARS", {})
    monkeypatch.setattr(routes, "rest", wrong)
    plain = wrong is without_what_follows and family == "llama"  # a Llama does nothing behind its head
    assert routes.splits(lm) == plain


# ---- those who read them -------------------------------------------------------------------------------------------


def told() -> list[Text]:
    return [Text(s, np.arange(max(1, len(s) // 2), len(s))) for s in sequences(longest=64) if len(s) > 1]


def few_at_a_time(monkeypatch, module, most: int) -> list[int]:
    "Let a module get its logits so; how many it got each time"
    blocks, plain = [], stream_logits

    def some(*given, **how):
        for z, owners in plain(*given, **how, most=most):
            blocks.append(len(owners))
            yield z, owners

    monkeypatch.setattr(module, "stream_logits", some)
    return blocks


@pytest.mark.parametrize("selector", [VarOpt(worth=1e-3), VarOpt(size=12), TopK(8), Nucleus(0.8, 20, 6)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_what_is_kept_does_not_depend_on_it(monkeypatch, family, selector):
    lm = opened(family)
    texts, how = told(), dict(seed=3, route="single")
    rows = [7 * i for i in range(len(texts))]
    whole = picks(lm, texts, rows, selector, **how)
    blocks = few_at_a_time(monkeypatch, extract, 5)
    few = picks(lm, texts, rows, selector, **how)
    assert len(blocks) > len(texts)
    for a, b, text in zip(whole, few, texts):
        assert len(b) == len(text.positions)
        for f in fields(a):
            x, y = getattr(a, f.name), getattr(b, f.name)
            assert (x is None) == (y is None), f.name
            if x is not None and x.dtype.kind in "iub":
                np.testing.assert_array_equal(x, y, err_msg=f.name)
            elif x is not None:
                np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5, err_msg=f.name)


def test_several_selectors_are_each_alone():
    lm, ways = opened("llama"), [VarOpt(worth=1e-3), TopK(8), VarOpt(eps=1e-3)]
    texts, calls = [*told(), Text(np.arange(4), np.arange(0))], []
    hook = lm.model.model.register_forward_hook(lambda *_: calls.append(1))
    together = picks_each(lm, texts, range(len(texts)), ways, route="single")
    hook.remove()
    assert len(calls) == len(texts) - 1 and [len(x) for x in together] == [len(texts)] * 3
    for selector, found in zip(ways, together):
        for a, b in zip(picks(lm, texts, range(len(texts)), selector, route="single"), found):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.ids.tolist() == b.ids.tolist() and a.logp.tolist() == b.logp.tolist()


def test_a_store_is_verified_in_pieces(monkeypatch, tmp_path):

    run("tiny/chat", model="tiny", output_dir=tmp_path / "out", max_samples=12)
    lm, store = load("tiny", device="cpu"), LogitStore(tmp_path / "out")
    texts = verify._held(store, store.indices())
    whole = verify.compare(lm, store, texts)
    assert len(few_at_a_time(monkeypatch, verify, 3)) == 0
    few = verify.compare(lm, store, texts)
    assert (few.holds, few.entries, few.targets) == (True, whole.entries, whole.targets)
    assert abs(few.exact - whole.exact) < 1e-4 and abs(few.target - whole.target) < 1e-4
    other = {i: replace(t, positions=t.positions - 1) for i, t in texts.items()}
    assert not verify.compare(lm, store, {i: t for i, t in other.items() if t.positions.min() > 0}).holds


def test_a_request_still_stores_the_same(monkeypatch):
    "Down to the rows of the store"

    lm = load("tiny", device="cpu")
    rows = [dict(r) for r in open_rows("tiny/chat", turns=True, max_samples=6).dataset]
    step = extract.Extract(lm, Request(route="single"), template(lm.tokenizer))
    whole = step.postprocess(step.process(rows), rows)
    blocks = few_at_a_time(monkeypatch, extract, 4)
    few = step.postprocess(step.process(rows), rows)
    assert len(blocks) > len(rows)
    assert whole.column("exact_ids").to_pylist() == few.column("exact_ids").to_pylist()


def test_a_forecast_asks_once_and_counts_the_chosen_way_alone(monkeypatch):
    "On a clock that only the model and the selectors move"
    lm, now = load("tiny", device="cpu"), [0.0]
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    def slow(selector, seconds: float):
        own = type("Slow", (type(selector),), {})(**vars(selector))
        object.__setattr__(own, "pick", lambda *given, **how: passes(seconds) or selector.pick(*given, **how))
        return own

    steps = {k: extract.Extract(lm, Request(route="single"), template(lm.tokenizer)) for k in "abc"}
    for step, seconds in zip(steps.values(), (10.0, 1e3, 1e5)):
        step.selector = slow(step.selector, seconds)
    rows = [dict(r) for r in open_rows("tiny/chat", turns=True, max_samples=6).dataset]
    texts = [steps["a"].text(row) for row in rows]
    hook = lm.model.lm_head.register_forward_hook(lambda *_: passes(1.0))
    ways, seconds = plan._ways(steps, texts, list(range(6)))
    hook.remove()
    assert seconds == 6 * (1 + 10) and now[0] == 6 * (1 + 10 + 1e3 + 1e5)
    assert [w.name for w in ways] == [*"abc"] and len({w.nbytes for w in ways}) == 1
