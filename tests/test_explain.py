"""Attribution: exact values, sampling and its errors, players, values, and the way through a small random Llama."""

from itertools import permutations
from math import factorial

import numpy as np
import pytest
import torch
from chat_templates import SHAPES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_analysis.core import InputError
from llm_analysis.explain.attribution import Game, attribute, check_length, explain_text
from llm_analysis.explain.auto import fewest, sampler_for
from llm_analysis.explain.evaluator import Packed
from llm_analysis.explain.players import find_players, owners
from llm_analysis.explain.removal import Attend, Delete, Replace, removal_named
from llm_analysis.explain.shapley import (
    Antithetic,
    Exact,
    all_coalitions,
    exact_values,
    leave_one_out,
    marginals,
    prefixes,
    shapley,
)
from llm_analysis.explain.units import turn_parts
from llm_analysis.explain.values import AnswerLogprob, LabelMargin
from llm_analysis.lm.model import load
from llm_analysis.lm.template import template

torch.set_num_threads(1)  # these models are too small to share
TEXTS = [
    "The soup was not very good .",
    "very very very good 😀 !",
    "We loved the quiet room , but the food was cold .",
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(style="bytes"):
    "A tokenizer of about 350 entries: byte-level as in GPT-2, or with ▁ for spaces as in SentencePiece"
    alphabet = pre_tokenizers.ByteLevel.alphabet() if style == "bytes" else []
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    if style == "bytes":
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>"]
    words = trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    t.train_from_iterator([*TEXTS, "Review: \nSentiment: good bad"] * 3, words)
    return PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>", chat_template=CHAT
    )


TOKENIZER = tokenizer()
REFUSING = {"turns": ("closed", "reasoning", "lanes"), "messages": ()}  # templates that go back on what they wrote


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "A random two-layer Llama on the disk"
    torch.manual_seed(0)
    t, path = tokenizer(), tmp_path_factory.mktemp("model") / "llama"
    config = LlamaConfig(
        vocab_size=len(t), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    t.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def lm(folder):
    return load(folder, device="cpu")


PROMPT, LABELS = "Review: {text}\nSentiment:", (" good", " bad")


def from_orders(worth, n):
    "Shapley values from the definition: all orders, one coalition at a time"
    pay = [0.0] * n
    for order in permutations(range(n)):
        present = [False] * n
        before = worth(present)
        for player in order:
            present[player] = True
            after = worth(present)
            pay[player] += (after - before) / factorial(n)
            before = after
    return np.array(pay)


def unanimity(n, seed, groups=30):
    "A game of prizes that are paid to complete groups, and its values in closed form"
    rng = np.random.default_rng(seed)
    held = [rng.choice(n, size=rng.integers(1, min(n, 5) + 1), replace=False) for _ in range(groups)]
    prize = rng.normal(size=groups)
    truth = sum(p * np.isin(np.arange(n), g) / len(g) for p, g in zip(prize, held))
    return lambda coal: sum(p * coal[:, g].all(1) for p, g in zip(prize, held)), truth


@pytest.mark.parametrize("n", range(7))
def test_exact_values_are_the_definition(n):
    table = np.random.default_rng(n).normal(size=2**n)
    worth = lambda present: table[int("".join("01"[p] for p in present) or "0", 2)]
    np.testing.assert_allclose(exact_values(table), from_orders(worth, n), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_axioms(n, seed):
    rng = np.random.default_rng(seed)
    game, other = rng.normal(size=(2, 2**n)) * 10
    values = exact_values(game)
    assert abs(values.sum() - (game[-1] - game[0])) < 1e-9
    np.testing.assert_allclose(exact_values(2 * game - other), 2 * values - exact_values(other), atol=1e-9)
    np.testing.assert_allclose(exact_values(np.repeat(game, 2)), [*values, 0], atol=1e-9)
    by_size = rng.normal(size=n + 1)[all_coalitions(n).sum(1)]
    np.testing.assert_allclose(exact_values(by_size), np.full(n, (by_size[-1] - by_size[0]) / n), atol=1e-9)
    swapped = game.reshape((2,) * n).transpose(*reversed(range(n))).ravel()
    np.testing.assert_allclose(exact_values(swapped), values[::-1], atol=1e-9)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 30])
def test_every_sample_is_efficient_and_spares_the_dummy(n):
    worth, _ = unanimity(n, 3) if n else (lambda coal: np.ones(len(coal)), None)
    idle = lambda coal: worth(coal[:, :n])
    for sampler in (Antithetic(2), Antithetic(7), *([Exact()] if n < 10 else [])):
        found = shapley(idle, n + 1, sampler, seed=5)
        assert found.gap < 1e-10
        assert found.values[-1] == found.errors[-1] == 0
        alone = shapley(worth, n, sampler, seed=5)
        assert alone.values.shape == alone.errors.shape == (n,)
    if n == 1:
        np.testing.assert_allclose(alone.values, [alone.full - alone.base])


def test_pairs_are_exact_for_pairwise_games():
    rng = np.random.default_rng(2)
    pull, push = rng.normal(size=(9, 9)), rng.normal(size=9)
    found = shapley(lambda c: ((c @ pull) * c).sum(1) + c @ push, 9, Antithetic(2))
    both = pull + pull.T
    np.testing.assert_allclose(found.values, push + np.diag(pull) + (both.sum(1) - np.diag(both)) / 2, atol=1e-9)
    np.testing.assert_allclose(found.errors, 0, atol=1e-9)


def test_errors_are_honest():
    worth, truth = unanimity(10, 1, groups=60)
    runs = [shapley(worth, 10, Antithetic(16), seed=s) for s in range(600)]
    miss = np.array([r.values for r in runs]) - truth
    errors = np.array([r.errors for r in runs])
    assert 0.935 < (np.abs(miss) <= 2.1314 * errors).mean() < 0.965
    assert 0.95 < (errors**2).mean() / (miss**2).mean() < 1.05
    assert (np.abs(miss.mean(0)) < 4 * errors.mean(0) / np.sqrt(600)).all()


def test_errors_halve_with_four_times_the_pairs():
    worth, truth = unanimity(10, 4)
    rmse = [
        np.sqrt(np.mean([(shapley(worth, 10, Antithetic(p), seed=s).values - truth) ** 2 for s in range(100)]))
        for p in (8, 32, 128)
    ]
    assert 1.7 < rmse[0] / rmse[1] < 2.3 and 1.7 < rmse[1] / rmse[2] < 2.3


def test_more_pairs_keep_the_earlier_draws():
    draw = lambda k: np.random.default_rng(k)
    few, many = (Antithetic(p).coalitions(11, draw) for p in (3, 8))
    assert (many[: len(few)] == few).all()
    backwards = few.reshape(6, 12, 11)
    assert (backwards[1] == ~backwards[0][::-1]).all()


def test_prefixes_and_marginals_agree():
    order = np.array([[2, 0, 1], [0, 1, 2]])
    assert prefixes(order).reshape(2, 4, 3).sum(2).tolist() == [[0, 1, 2, 3]] * 2
    weights = np.array([1.0, 10.0, 100.0])
    worth = (prefixes(order) @ weights).reshape(2, 4)
    assert marginals(worth, order).tolist() == [[1, 10, 100]] * 2


@given(st.integers(1, 60), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_a_budget_is_kept(n, budget):
    for estimator in ("auto", "permutation"):
        if budget < fewest(n, estimator):
            with pytest.raises(InputError, match="budget of at least"):
                sampler_for(n, budget, estimator)
            continue
        sampler = sampler_for(n, budget, estimator)
        assert isinstance(sampler, Exact) == (2**n <= budget)
        if not isinstance(sampler, Exact):
            assert len(np.unique(sampler.coalitions(n, lambda k: np.random.default_rng(k)), axis=0)) <= budget


@pytest.mark.parametrize("style", ["bytes", "spaces"])
@pytest.mark.parametrize("unit", ["words", "tokens"])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("text", [*TEXTS, "one", "", "  padded \n text "])
def test_players_cover_the_text(style, unit, chat, text):
    p = find_players(tokenizer(style), text, prompt="Say: {text} -> ", chat=chat, unit=unit)
    assert "".join(p.pieces) == p.prompt
    assert {*p.owner.tolist()} == {-1, *range(len(p))}
    inside = p.owner[p.owner >= 0]
    assert (np.diff(inside) >= 0).all()
    where = np.flatnonzero(p.owner >= 0)
    assert len(where) == 0 or where[-1] - where[0] + 1 == len(where), "the text's tokens stand together"
    assert unit == "tokens" or list(p.names) == text.split()
    assert "".join("".join(p.names).split()) == "".join(text.split())


def test_a_token_of_two_words_goes_to_the_one_with_more_of_it():
    assert owners([(0, 6)], [(0, 3), (3, 6)]).tolist() == [0]  # a tie: the first
    assert owners([(0, 7)], [(0, 2), (3, 7)]).tolist() == [1]


def plain_owners(tokens, spans):
    "The rule of `owners`, said again one token at a time"
    found = []
    for a, b in tokens:
        shared = [max(0, min(b, d) - max(a, c)) for c, d in spans]
        if max(shared, default=0):
            found.append(shared.index(max(shared)))
        elif a < b and spans and spans[0][0] < b <= spans[-1][0]:
            found.append(next(k for k, (c, _) in enumerate(spans) if c >= b))
        else:
            found.append(-1)
    return found


edges = st.lists(st.integers(0, 40), max_size=16, unique=True).map(sorted)


@settings(max_examples=400, deadline=None)
@given(edges, st.booleans(), st.lists(st.tuples(st.integers(-5, 45), st.integers(0, 9)), max_size=30))
def test_owners_are_the_rule(cuts, touching, drawn):
    "Parts apart or end to end; tokens in any order, empty, overlapping, and as long as several parts"
    spans = list(zip(cuts, cuts[1:])) if touching else list(zip(cuts[::2], cuts[1::2]))
    tokens = [(a, a + n) for a, n in drawn]
    assert owners(tokens, spans).tolist() == plain_owners(tokens, spans)


def test_owners_of_a_long_text():
    rng = np.random.default_rng(0)
    words = np.cumsum(rng.integers(1, 9, 4000))
    spans = list(zip((words[:-1] + (rng.random(3999) < 0.8)).tolist(), words[1:].tolist()))
    spans = [(a, b) for a, b in spans if a < b]
    ends = np.cumsum(rng.integers(1, 7, 5000)).tolist()
    tokens = list(zip([0, *ends], ends))
    assert owners(tokens, spans).tolist() == plain_owners(tokens, spans)


LETTERS = st.lists(st.sampled_from([*"ab .!é😀\n", "very", " good", " cold", "food"]), max_size=12).map("".join)


@settings(max_examples=60, deadline=None)
@given(LETTERS, st.data())
def test_pinned_characters_are_in_no_player(text, data):
    "Whatever the unit: a token with a pinned character stays, and the others' players keep their order"
    unit = data.draw(st.sampled_from(["words", "tokens", "sentences"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=4, unique=True))) if text else []
    pinned = [(a, b) for a, b in zip(cuts[::2], cuts[1::2]) if text[a:b].strip()]
    p = find_players(TOKENIZER, text, prompt="Say: {text} -> ", unit=unit, pinned=pinned or None)
    free = find_players(TOKENIZER, text, prompt="Say: {text} -> ", unit=unit)
    held = {i for a, b in pinned for i in range(a, b) if not text[i].isspace()}
    lead = len(text) - len(text.lstrip()) - len("Say: ")
    for owner, (a, b) in zip(p.owner, TOKENIZER(p.prompt, return_offsets_mapping=True)["offset_mapping"]):
        assert owner < 0 or not held & set(range(a + lead, b + lead))
    assert "".join(p.pieces) == p.prompt and (p.ids == free.ids).all()
    assert ((p.owner < 0) >= (free.owner < 0)).all() and (np.diff(p.owner[p.owner >= 0]) >= 0).all()
    assert all(text[a:b].strip() for a, b in p.spans)
    if not pinned:
        assert p.spans == free.spans and (p.owner == free.owner).all()


@pytest.mark.parametrize("style", ["bytes", "spaces"])
def test_matches_and_spans_leave_the_rest(style):
    text = "  Room 12 was cold, room 7 was not.  "
    t = tokenizer(style)
    numbers = find_players(t, text, prompt=PROMPT, unit=r"regex:\d+")
    assert numbers.names == ("12", "7") and numbers.unit == r"regex:\d+"
    assert set(numbers.owner.tolist()) == {-1, 0, 1}
    places = [(text.index(x), text.index(x) + len(x)) for x in ("12", "7")]
    by_hand = find_players(t, text, prompt=PROMPT, spans=places)
    assert by_hand.spans == numbers.spans == tuple(places) and (by_hand.owner == numbers.owner).all()
    without = find_players(t, text, prompt=PROMPT, pinned=r"\d+")
    assert without.names == tuple(w for w in text.split() if w not in ("12", "7"))
    assert not ((without.owner >= 0) & (numbers.owner >= 0)).any()
    assert str(numbers) == f"2 players (regex:\\d+) of {(numbers.owner >= 0).sum()} tokens, " + (
        f"{(numbers.owner < 0).sum()} tokens pinned, {len(numbers.ids)} in all"
    )


def test_bad_players_are_refused_before_the_tokenizer_works(monkeypatch):
    t = tokenizer()
    monkeypatch.setattr(type(t), "__call__", lambda *a, **k: pytest.fail("it tokenised"))
    for bad in (
        dict(unit="letters"), dict(unit="regex:["), dict(unit="regex:x*"), dict(unit="turns"), dict(unit="spans"),
        dict(spans=[(2, 1)]), dict(spans=[(0, 3), (2, 5)]), dict(spans=[(0, 99)]), dict(spans=[]),
        dict(unit="tokens", spans=[(0, 3)]), dict(pinned="zebra"), dict(pinned="("), dict(pinned=[(0, 99)]),
        dict(unit="regex:zebra"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="expected .*; got .*; "):
            find_players(t, "not very good", prompt=PROMPT, **bad)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("unit", ["turns", "messages"])
def test_turns_of_every_template_are_theirs_or_refused(shape, unit):
    "Each player's characters hold its own message and nobody else's; what cannot be told is refused"
    talk = [
        {"role": "user", "content": "alpha first"}, {"role": "assistant", "content": "beta second"},
        {"role": "user", "content": "gamma third"}, {"role": "assistant", "content": "delta fourth"},
        {"role": "user", "content": "epsilon fifth"},
    ]  # fmt: skip
    t = tokenizer()
    t.chat_template = shape.source
    try:
        p = find_players(t, talk, unit=unit, pinned=[2])
    except InputError as e:
        assert "messages whose place" in str(e) or "message by message" in str(e) or "a token that stays" in str(e)
        assert shape.name in REFUSING[unit], (shape.name, str(e))
        return
    assert shape.name not in REFUSING[unit]
    once = shape.name != "repeating"
    names = [m["content"] if once else f"{m['content']} | {m['content']}" for m in talk]
    assert list(p.names) == [names[i] for i in (0, 1, 3, 4)] or not once
    text, parts = turn_parts(t, talk, unit, [2])
    for k, i in enumerate((0, 1, 3, 4)):
        held = "".join(text[a:b] for (a, b), w in zip(parts.pieces, parts.whose) if w == k)
        assert [m["content"] in held for m in talk] == [j == i for j in range(5)]
        assert unit == "turns" or held == talk[i]["content"] * (1 if once else 2)
    kept = t.decode(Delete().prompts(p, np.zeros((1, 4), dtype=bool))[0])
    assert "gamma third" in kept and not any(m["content"] in kept for i, m in enumerate(talk) if i != 2)


def test_turns_that_go_leave_the_conversation_without_them():
    "Deleted with its marks, a turn is as if it had never been: token by token"
    talk = [{"role": r, "content": c} for r, c in (("user", "so good"), ("assistant", "very"), ("user", "bad"))]
    p = find_players(tokenizer(), talk)
    for row, left in zip(all_coalitions(3), Delete().prompts(p, all_coalitions(3))):
        rest = [m for m, stays in zip(talk, row) if stays]
        text = template(TOKENIZER).write(rest, add_generation_prompt=True) if rest else "<|assistant|>"
        assert left.tolist() == TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("unit", ["words", "tokens", "sentences", "regex:very|good", "turns", "messages"])
def test_three_removals_of_the_same_players(unit):
    talk = unit in ("turns", "messages")
    text = (
        [{"role": "user", "content": "very good. So cold!"}, {"role": "user", "content": "bad"}] if talk else TEXTS[1]
    )
    p = find_players(tokenizer(), text, unit=unit)
    coal = all_coalitions(min(len(p), 6)) if len(p) <= 6 else np.random.default_rng(0).random((40, len(p))) < 0.5
    deleted, masked, hidden = (r.prompts(p, coal) for r in (Delete(), Replace.by(tokenizer(), "_"), Attend()))
    for row, a, b, c, where in zip(coal, deleted, masked, hidden, hidden.places):
        gone = np.array([o >= 0 and not row[o] for o in p.owner])
        assert a.tolist() == c.tolist() == p.ids[~gone].tolist() and where.tolist() == np.flatnonzero(~gone).tolist()
        assert len(b) == len(p.ids) and (b[~gone] == p.ids[~gone]).all() and len(set(b[gone].tolist())) <= 1
    assert all(where[-1] == len(p.ids) for where in hidden.followed([1]).places)
    assert hidden.after == len(p.ids) and deleted.places is None and masked.places is None


def test_a_replacement_needs_a_neutral_token():
    t = tokenizer()
    for unusable in (None, "<|end|>"):  # no padding token, or an end mark in its place
        t.pad_token = unusable
        with pytest.raises(InputError, match="name a neutral token"):
            Replace.by(t)
    t.pad_token = "<s>"
    with pytest.raises(InputError, match="name a neutral token"):
        Replace.by(t)
    t.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    assert removal_named("mask", t).name == "mask:<mask>" and removal_named("mask:<pad>", t).spelled == "<pad>"
    with pytest.raises(InputError, match="which is 3"):
        Replace.by(t, "x y")
    with pytest.raises(InputError, match="a token that is known"):
        Replace.by(tokenizer("spaces"), "<unk>")


@pytest.mark.parametrize("value", [LabelMargin(LABELS), AnswerLogprob(4)], ids=["labels", "answer"])
def test_masked_attention_through_the_model(lm, value):
    "Exact values with the model's own masks, one forward a coalition, against the packed path"
    players, text = find_players(lm.tokenizer, TEXTS[0][:-2], prompt=PROMPT), TEXTS[0][:-2]
    a = explain_text(lm, text, prompt=PROMPT, value=value, removal=Attend())
    answer = []
    while isinstance(value, AnswerLogprob) and len(answer) < 4 and (not answer or answer[-1] != 1):
        answer.append(int(plain(lm, [*players.ids.tolist(), *answer])[-1].argmax()))
    answer = answer[:-1] if len(answer) > 1 and answer[-1] == 1 else answer
    n, ids = len(players.ids), [lm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in LABELS]
    assert a.removal == "attend"

    def worth(present, said=()):
        stays = np.array([o < 0 or present[o] for o in players.owner] + [True] * len(said))
        seen = np.tril(stays[None, :] | np.eye(len(stays), dtype=bool))
        full = torch.tensor([[*players.ids.tolist(), *said]])
        with torch.inference_mode():
            z = lm.model(full, attention_mask=torch.from_numpy(seen)[None, None]).logits[0].double().log_softmax(-1)
        if not said:
            return (z[-1, ids[0]] - z[-1, ids[1]]).item()
        return sum(z[n - 1 + i, token].item() for i, token in enumerate(said))

    sign = -1 if a.answer == "bad" and not answer else 1
    np.testing.assert_allclose(a.values, sign * from_orders(lambda c: worth(c, answer), len(players)), atol=1e-4)
    deleted = explain_text(lm, text, prompt=PROMPT, value=value)
    assert not np.allclose(a.values, deleted.values, atol=1e-3)
    np.testing.assert_allclose([a.full_value], [deleted.full_value], atol=1e-4)


def test_deletion_drops_ids_and_nothing_else():
    p = find_players(tokenizer(), TEXTS[0], prompt=PROMPT)
    for row, left in zip(all_coalitions(7), Delete().prompts(p, all_coalitions(7))):
        assert left.tolist() == [i for i, o in zip(p.ids.tolist(), p.owner.tolist()) if o < 0 or row[o]]


def test_a_chat_pins_its_markers():
    p = find_players(tokenizer(), " so good ", prompt="Good? {text}", chat=True)
    assert p.prompt == "<|user|>Good? so good<|end|><|assistant|>"
    assert p.spans == ((1, 3), (4, 8))


@pytest.mark.parametrize("prompt", ["no place", "{text} and {text}"])
def test_a_template_names_its_text_once(prompt):
    with pytest.raises(InputError, match="in it once"):
        find_players(tokenizer(), "a", prompt=prompt)


def plain(lm, ids):
    with torch.inference_mode():
        return lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def summed(lm, ids, answer):
    rows = plain(lm, [*ids, *answer])[len(ids) - 1 : -1]
    return sum(rows[i, token].item() for i, token in enumerate(answer))


def from_the_model(lm, players, score):
    "Exact values by the definition, one forward pass at a time, without the code under test"
    seen = {}

    def worth(present):
        key = tuple(present)
        if key not in seen:
            ids = [i for i, o in zip(players.ids.tolist(), players.owner.tolist()) if o < 0 or present[o]]
            seen[key] = score(ids)
        return seen[key]

    return from_orders(worth, len(players)), worth


@pytest.mark.parametrize("chat", [False, True])
def test_margin_through_the_model(lm, chat):
    players = find_players(lm.tokenizer, TEXTS[0][:-2], prompt=PROMPT, chat=chat)
    a = explain_text(lm, TEXTS[0][:-2], prompt=PROMPT, labels=LABELS, chat=chat)
    ids = [lm.tokenizer(w, add_special_tokens=False)["input_ids"] for w in LABELS]
    assert {len(i) for i in ids} == {1}
    sign = 1 if a.answer == "good" else -1
    truth, worth = from_the_model(
        lm, players, lambda x: sign * (plain(lm, x)[-1, ids[0][0]] - plain(lm, x)[-1, ids[1][0]]).item()
    )
    np.testing.assert_allclose(a.values, truth, atol=1e-5)
    np.testing.assert_allclose([a.base_value, a.full_value], [worth([False] * 6), worth([True] * 6)], atol=1e-5)
    assert a.full_value >= 0 and a.efficiency_gap < 1e-9


def test_long_labels_through_the_model(lm):
    labels = (" very good", " bad food", " quiet room !")
    players = find_players(lm.tokenizer, "not so cold", prompt=PROMPT)
    a = explain_text(lm, "not so cold", prompt=PROMPT, labels=labels)
    ids = [lm.tokenizer(w, add_special_tokens=False)["input_ids"] for w in labels]
    full = [summed(lm, players.ids.tolist(), i) for i in ids]
    assert a.choice == int(np.argmax(full))

    def score(x):
        own, *rest = sorted((summed(lm, x, i) for k, i in enumerate(ids) if k != a.choice), reverse=True)
        return summed(lm, x, ids[a.choice]) - own

    np.testing.assert_allclose(a.values, from_the_model(lm, players, score)[0], atol=1e-5)


def test_free_answers_through_the_model(lm):
    players = find_players(lm.tokenizer, "not so cold", prompt=PROMPT, unit="tokens")
    a = explain_text(lm, "not so cold", prompt=PROMPT, players="tokens", value=AnswerLogprob(4))
    ids, answer = players.ids.tolist(), []
    while len(answer) < 4 and (not answer or answer[-1] != 1):
        answer.append(int(plain(lm, [*ids, *answer])[-1].argmax()))
    answer = answer[:-1] if len(answer) > 1 and answer[-1] == 1 else answer
    assert a.answer == lm.tokenizer.decode(answer).strip()
    if len(players) <= 8:
        truth, _ = from_the_model(lm, players, lambda x: summed(lm, x, answer))
        np.testing.assert_allclose(a.values, truth, atol=1e-5)
    assert abs(a.full_value - summed(lm, ids, answer)) < 1e-5


class OneByOne:
    "The plainest evaluator: one forward pass a prompt"

    def __init__(self, lm):
        self.lm, self.prompts, self.computed = lm, 0, 0

    def next_logits(self, prompts, columns):
        self.prompts, self.computed = self.prompts + len(prompts), self.computed + sum(map(len, prompts))
        rows = np.array([plain(self.lm, list(p))[-1].numpy() for p in prompts])
        return rows if columns is None else rows[:, list(columns)]

    def logprob(self, prompts, answer):
        return np.array([summed(self.lm, list(p), list(answer)) for p in prompts])


def test_the_packed_path_against_one_by_one(lm):
    long = TEXTS[2] + " So we left early ."
    kind = dict(prompt=PROMPT, labels=LABELS, seed=3, row_id="r")
    fast, slow = explain_text(lm, long, **kind), explain_text(lm, long, evaluator=OneByOne(lm), **kind)
    assert not fast.exact and fast.evaluations == slow.evaluations
    np.testing.assert_allclose(fast.values, slow.values, atol=1e-5)
    np.testing.assert_allclose(fast.stderr, slow.stderr, atol=1e-5)


def test_equal_prompts_are_computed_once(lm):
    evaluator = Packed(lm)
    players = find_players(lm.tokenizer, "very very very good", prompt=PROMPT)
    game = Game(lm, players, LabelMargin(LABELS), evaluator)
    a = attribute(game)
    assert (a.evaluations, a.prompts) == (16, 1 + 8)  # the settled answer, then 4 x 2 different prompts
    np.testing.assert_allclose(a.values[:3], a.values[0], atol=1e-9)
    spent = game.spent
    leave_one_out(game, 4)
    assert game.spent == spent


def test_draws_depend_on_seed_and_row_alone(lm):
    kind = dict(prompt=PROMPT, labels=LABELS)
    long = TEXTS[2] + " So we left early ."
    one = explain_text(lm, long, seed=1, row_id=4, **kind)
    explain_text(lm, TEXTS[0], seed=1, row_id=5, **kind)
    np.testing.assert_array_equal(one.values, explain_text(lm, long, seed=1, row_id=4, **kind).values)
    for other in (dict(seed=2, row_id=4), dict(seed=1, row_id=5), dict(seed=1, row_id="4")):
        assert not np.allclose(one.values, explain_text(lm, long, **other, **kind).values)


def test_length_counts_prompt_and_answer(lm):
    fits = lambda n, value: check_length(lm, find_players(lm.tokenizer, "! " * n, prompt="a{text}"), value) is None
    free = AnswerLogprob(5)
    longest = max(n for n in range(1, lm.max_len) if fits(n, free))
    explain_text(lm, "! " * longest, prompt="a{text}", value=free, budget=4 * longest)
    with pytest.raises(InputError, match="fits into the model's context"):
        explain_text(lm, "! " * (longest + 1), prompt="a{text}", value=free)


def test_labels_that_melt_into_the_prompt_are_refused(lm):
    with pytest.raises(InputError, match="token of their own"):
        explain_text(lm, "good", prompt="Review: {text} Sentiment: go", labels=("od", "bad"))


def test_no_players_and_one(lm):
    none = explain_text(lm, " ", prompt=PROMPT, labels=LABELS)
    assert none.players == () and none.base_value == none.full_value and "<svg" not in none._repr_html_()
    one = explain_text(lm, "good", prompt=PROMPT, labels=LABELS)
    assert one.values[0] == one.full_value - one.base_value and repr(one).count("\n") == 2
    assert explain_text(lm, "good", labels=LABELS).players == ("good",)  # nothing pinned: the begin mark


def test_reprs_escape(lm):
    a = explain_text(lm, "<script>alert(1)</script> & good", prompt=PROMPT, labels=LABELS)
    assert "<script" not in a._repr_html_() and "&lt;script&gt;" in a._repr_html_()
    assert a.top(1) == [(a.players[a.ranking[0]], a.values[a.ranking[0]], 0.0)]
