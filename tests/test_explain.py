"""Attribution: exact values, sampling and its errors, players, values, and the way through a small random Llama."""

from itertools import permutations
from math import factorial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_analysis.core import InputError
from llm_analysis.explain.attribution import Game, attribute, check_length, explain_text
from llm_analysis.explain.auto import fewest, sampler_for
from llm_analysis.explain.evaluator import Packed
from llm_analysis.explain.players import find_players, owners
from llm_analysis.explain.removal import Delete
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
from llm_analysis.explain.values import AnswerLogprob, LabelMargin
from llm_analysis.lm.model import load

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
