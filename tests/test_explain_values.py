"""What is measured of a model: every value against one prompt at a time with the library's own forward pass."""

import re
from collections import Counter
from decimal import Decimal, getcontext
from itertools import permutations
from math import log, sqrt

import numpy as np
import pytest
import torch
from families import open_family
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_analysis.core import InputError, WorldError
from llm_analysis.explain import evaluator as asking
from llm_analysis.explain.attribution import explain_text
from llm_analysis.explain.auto import estimate
from llm_analysis.explain.custom import Custom
from llm_analysis.explain.evaluator import Packed, continuations, extended, in_slices
from llm_analysis.explain.named import VALUES, value_named
from llm_analysis.explain.outputs import ClassLogits, TokenLogprobs
from llm_analysis.explain.players import find_players
from llm_analysis.explain.removal import Attend, Delete, Prompts
from llm_analysis.explain.shapley import all_coalitions
from llm_analysis.explain.similarity import Divergence, Similarity, tfidf_cosine
from llm_analysis.explain.values import (
    AnswerLogprob,
    LabelMargin,
    LabelProbability,
    Question,
    TargetLogprob,
    whole_odds,
)
from llm_analysis.lm.model import LM, load
from llm_analysis.lm.packing import logits

torch.set_num_threads(1)  # these models are too small to share
PROMPT, WORDS, LONG = "Review: {text}\nSentiment:", (" bad", " good", " fine"), (" bad and cheap", " good")
TEXT = "The soup was not good."


@pytest.fixture(scope="module")
def lm():
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def players(lm):
    return find_players(lm.tokenizer, TEXT, prompt=PROMPT)


def tokens(lm, word):
    return lm.tokenizer(word, add_special_tokens=False)["input_ids"]


def plain(lm, ids):
    "Logits after every token, one prompt, float64"
    with torch.inference_mode():
        return lm.model(torch.tensor([list(ids)])).logits[0].double()


def each(lm, ids, answer):
    "Log-probability of each token of an answer"
    rows = plain(lm, [*ids, *answer])[len(ids) - 1 : -1].log_softmax(-1)
    return rows[torch.arange(len(answer)), torch.tensor(answer)].numpy()


def each_odds(lm, ids, answer):
    "Log-odds of each token of an answer"
    rows, out = plain(lm, [*ids, *answer])[len(ids) - 1 : -1], []
    for row, t in zip(rows, answer):
        rest = torch.cat([row[:t], row[t + 1 :]])
        out.append((row[t] - rest.logsumexp(0)).item())
    return np.array(out)


def said(lm, ids, most):
    "Greedy answer, one forward pass a token"
    out, ends = [], [lm.tokenizer.eos_token_id, lm.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    while len(out) < most and not (out and out[-1] in ends):
        out.append(int(plain(lm, [*ids, *out])[-1].argmax()))
    return out[:-1] if len(out) > 1 and out[-1] in ends else out


def dense_cosine(a, b):
    "TF-IDF cosine from document vectors written out: raw counts, idf = ln((1+n)/(1+df)) + 1 over n = 2, l2 norm"
    docs = [re.findall(r"\w+|[^\w\s]", x.lower()) for x in (a, b)]
    words = sorted({w for d in docs for w in d})
    df = [sum(w in d for d in docs) for w in words]
    rows = [[d.count(w) * (log(3 / (1 + f)) + 1) for w, f in zip(words, df)] for d in docs]
    norms = [sqrt(sum(x * x for x in row)) for row in rows]
    if docs[0] == docs[1]:
        return 1.0
    return sum(x * y for x, y in zip(*rows)) / (norms[0] * norms[1]) if all(norms) else 0.0


def label_rows(lm, ids, labels):
    return np.array([each(lm, ids, tokens(lm, w)).sum() for w in labels])


def margin(lm, full, ids, labels=WORDS):
    best = label_rows(lm, full, labels).argmax()
    row = label_rows(lm, ids, labels)
    return row[best] - max(np.delete(row, best))


def share(lm, full, ids):
    best, p = label_rows(lm, full, WORDS).argmax(), np.exp(label_rows(lm, ids, WORDS))
    return p[best] / p.sum()


def classes(lm, full, ids, labels=WORDS):
    row = label_rows(lm, ids, labels)
    return row - np.log(np.exp(row).sum())


def kl(lm, full, ids):
    p, q = (plain(lm, x)[-1].log_softmax(-1).numpy() for x in (full, ids))
    return -(np.exp(p) * (p - q)).sum()


def likeness(lm, full, ids):
    return dense_cosine(*(lm.tokenizer.decode(said(lm, x, 6)) for x in (ids, full)))


def odds(lm, ids, answer):
    p = np.exp(each(lm, ids, answer).sum())
    return np.log(p) - np.log1p(-p)


def with_sum(row):
    return np.append(row, row.sum())


letters = lambda texts: [[text.count(c) for c in "aeo"] for text in texts]
PLAIN = {
    "margin": (LabelMargin(WORDS), margin),
    "margin of long labels": (LabelMargin(LONG), lambda lm, f, x: margin(lm, f, x, LONG)),
    "probability": (LabelProbability(WORDS), share),
    "classes": (ClassLogits(WORDS), classes),
    "classes of long labels": (ClassLogits(LONG), lambda lm, f, x: classes(lm, f, x, LONG)),
    "raw classes": (
        ClassLogits(WORDS, raw=True),
        lambda lm, f, x: plain(lm, x)[-1, [tokens(lm, w)[0] for w in WORDS]].numpy(),
    ),
    "own answer": (AnswerLogprob(3), lambda lm, f, x: each(lm, x, said(lm, f, 3)).sum()),
    "target": (TargetLogprob(" good and cheap"), lambda lm, f, x: each(lm, x, tokens(lm, " good and cheap")).sum()),
    "odds": (TargetLogprob(" good and", odds=True), lambda lm, f, x: odds(lm, x, tokens(lm, " good and"))),
    "odds of its own": (AnswerLogprob(1, odds=True), lambda lm, f, x: each_odds(lm, x, said(lm, f, 1))[0]),
    "tokens": (
        TokenLogprobs(" good and cheap"),
        lambda lm, f, x: with_sum(each(lm, x, tokens(lm, " good and cheap"))),
    ),
    "own tokens": (TokenLogprobs(max_tokens=3), lambda lm, f, x: with_sum(each(lm, x, said(lm, f, 3)))),
    "odds of tokens": (
        TokenLogprobs(" good and", odds=True),
        lambda lm, f, x: np.append(each_odds(lm, x, tokens(lm, " good and")), odds(lm, x, tokens(lm, " good and"))),
    ),
    "divergence": (Divergence(), kl),
    "similarity": (Similarity(6), likeness),
    "custom": (Custom(letters, ("a", "e", "o")), lambda lm, f, x: np.array(letters([lm.tokenizer.decode(x)])[0])),
}


def shares(table, n):
    "Shapley values by the definition from worths of all coalitions, in the order of the binary numbers"
    place = lambda who: sum(1 << (n - 1 - i) for i in who)
    pay = np.zeros((n, *table.shape[1:]))
    orders = list(permutations(range(n)))
    for order in orders:
        for k, i in enumerate(order):
            pay[i] += (table[place(order[: k + 1])] - table[place(order[:k])]) / len(orders)
    return pay


@pytest.mark.parametrize("name", PLAIN)
def test_against_one_prompt_at_a_time(lm, players, name):
    value, score = PLAIN[name]
    evaluator, removal, n = Packed(lm), Delete(), len(players)
    question = value.settle(lm, evaluator, players)
    left, full = removal.prompts(players, all_coalitions(n)), players.ids.tolist()
    truth = np.array([score(lm, full, ids.tolist()) for ids in left])
    got = question.worth(evaluator, left)
    assert got.dtype == np.float64 and got.shape == (32, len(question.outputs))[: got.ndim]
    assert bool(question.outputs) == (got.ndim == 2)
    np.testing.assert_allclose(got, truth, rtol=0, atol=1e-4)
    found = estimate(lambda coal: question.worth(evaluator, removal.prompts(players, coal)), n)
    np.testing.assert_allclose(found.values, shares(truth, n), atol=1e-4)
    np.testing.assert_allclose(found.values.sum(0), got[-1] - got[0], atol=1e-9)
    assert np.ptp(truth, axis=0).max() > 0.01, "a worth that no coalition changes would prove nothing"


@pytest.mark.parametrize("value", [ClassLogits(WORDS), TokenLogprobs(" good and cheap"), Custom(letters)])
@pytest.mark.parametrize("estimator", ["permutation", "leverage", "auto"])
def test_several_outputs_are_each_alone(lm, value, estimator):
    long = find_players(lm.tokenizer, "We liked the soup but the food was not very good at all .", prompt=PROMPT)
    evaluator, n = Packed(lm), len(long)
    question = value.settle(lm, evaluator, long)
    known = {}

    def worth(coal):
        rows = question.worth(evaluator, Delete().prompts(long, coal))
        known.update(zip((c.tobytes() for c in coal), rows))
        return rows

    kind = dict(estimator=estimator, budget=160, seed=3, row_id="a")
    together = estimate(worth, n, **kind)
    ends = [known[np.full(n, b).tobytes()] for b in (True, False)]
    np.testing.assert_allclose(together.values.sum(0), ends[0] - ends[1], atol=1e-8)
    for o in range(len(question.outputs)):
        alone = estimate(lambda coal, o=o: np.array([known[c.tobytes()][o] for c in coal]), n, **kind)
        assert alone.evaluations == together.evaluations
        np.testing.assert_allclose(alone.values.sum(), together.values[:, o].sum(), atol=1e-8)
        if estimator != "auto":  # which may choose another estimator where outputs are looked at together
            np.testing.assert_allclose(alone.values, together.values[:, o], atol=1e-8)
            np.testing.assert_allclose(alone.errors, together.errors[:, o], atol=1e-8)


def test_all_tokens_cost_what_their_sum_costs(lm, players):
    left, spent = Delete().prompts(players, all_coalitions(5)), []
    for value in (TokenLogprobs(" good and cheap"), TargetLogprob(" good and cheap")):
        evaluator = Packed(lm, route="padded")
        value.settle(lm, evaluator, players).worth(evaluator, left)
        spent.append((evaluator.prompts, evaluator.computed))
    assert spent[0] == spent[1]
    evaluator = Packed(lm, route="padded")
    ClassLogits(WORDS).settle(lm, evaluator, players).worth(evaluator, left)
    assert evaluator.prompts == 1 + 32


def test_focus_and_choice_name_the_answer(lm):
    for text in ("It was great.", "It was awful."):
        p = find_players(lm.tokenizer, text, prompt=PROMPT)
        best = int(label_rows(lm, p.ids.tolist(), WORDS).argmax())
        q = ClassLogits(WORDS).settle(lm, Packed(lm), p)
        assert (q.choice, q.focus, q.answer, q.outputs[q.focus]) == (best, best, *[WORDS[best].strip()] * 2)
        a = explain_text(lm, text, prompt=PROMPT, value=ClassLogits(WORDS))
        assert a.targets == ("bad", "good", "fine") and a.main.full_value == max(a.full_value)
        t = TokenLogprobs(" good and cheap").settle(lm, Packed(lm), p)
        assert (t.outputs[t.focus], t.choice) == ("whole answer", None)
        assert len(set(t.outputs)) == len(t.outputs) == len(tokens(lm, " good and cheap")) + 1


def test_labels_that_differ_in_space_only_keep_it(lm, players):
    assert ClassLogits((" good", "good")).settle(lm, Packed(lm), players).outputs == (" good", "good")


# odds


@given(st.lists(st.floats(-60, 200), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_odds_of_the_whole_in_fifty_digits(each):
    getcontext().prec = 120
    p = Decimal(1)
    for o in each:
        p /= 1 + (-Decimal(o)).exp()
    truth = float(p.ln() - (1 - p).ln())
    got = whole_odds(np.array([each]))[0]
    assert abs(got - truth) <= 1e-9 * max(1, abs(truth))


def test_odds_where_the_model_is_sure():
    lm = open_family("llama", seed=5)
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(40)
    try:
        ids = np.arange(3, 15)
        answer = tuple(said(lm, ids, 1))
        got, truth = Packed(lm).odds(Prompts([ids]), answer)[0], each_odds(lm, ids, answer)
        logp = Packed(lm).logprob(Prompts([ids]), answer)[0]
        assert truth[0] > 17, "sure enough that float32 cannot tell"
        np.testing.assert_allclose(got, truth, rtol=1e-5)
        assert abs(-np.logaddexp(0, -got[0]) - logp) < 1e-5
    finally:
        with torch.no_grad():
            lm.model.lm_head.weight.div_(40)


# what is not finite


class Broken:
    "An evaluator with one bad number"

    def __init__(self, lm, bad, at):
        self.inner, self.bad, self.at, self.prompts, self.computed = Packed(lm), bad, at, 0, 0

    def _spoil(self, rows):
        rows = rows.copy()
        if len(rows) > self.at:
            rows[self.at] = self.bad
        return rows

    def next_logits(self, prompts, columns):
        return self._spoil(self.inner.next_logits(prompts, columns))

    def logprob(self, prompts, answer):
        return self._spoil(self.inner.logprob(prompts, answer))

    def logprobs(self, prompts, answer):
        return self._spoil(self.inner.logprobs(prompts, answer))

    def odds(self, prompts, answer):
        return self._spoil(self.inner.odds(prompts, answer))


NEVER_NAN = ("similarity", "custom")


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("name", [name for name in PLAIN if name not in NEVER_NAN])
def test_what_is_not_finite_is_refused(lm, players, name, bad):
    if bad == -np.inf and "probability" in name:
        bad = np.nan  # a label that cannot come next has probability 0, which is a number
    question = PLAIN[name][0].settle(lm, Packed(lm), players)
    with pytest.raises(WorldError, match=r"nan or infinity for 1 of 32 coalitions"):
        with np.errstate(invalid="ignore", divide="ignore"):
            question.worth(Broken(lm, bad, 7), Delete().prompts(players, all_coalitions(5)))


def test_a_model_that_overflows_is_refused_before_it_answers(lm, players):
    for value in (LabelMargin(WORDS), ClassLogits(WORDS), Divergence()):
        evaluator = Broken(lm, np.nan, 0)
        with pytest.raises(WorldError, match="nan or infinity"):
            with np.errstate(invalid="ignore"):
                question = value.settle(lm, evaluator, players)
                question.worth(Packed(lm), Delete().prompts(players, all_coalitions(5)))


def test_a_score_of_the_wrong_shape_is_refused(lm, players):
    left, lone = Delete().prompts(players, all_coalitions(5)), Packed(lm)
    with pytest.raises(WorldError, match=r"shape \(32,\)"):
        Question("a", "b", lambda e, p: np.zeros((32, 1))).worth(lone, left)
    with pytest.raises(WorldError, match=r"shape \(32, 2\)"):
        Question("a", "b", lambda e, p: np.zeros((31, 2)), outputs=("x", "y")).worth(lone, left)


# half precision


def test_sums_of_a_bfloat16_model_are_not_in_bfloat16(players):
    "From the logits that the model gave, in half precision, everything else is as exact as if they were the truth"
    half = load("tiny", device="cpu", dtype="bfloat16")
    evaluator = Packed(half, route="single")  # the forward passes of `given`, so the same logits
    left = Delete().prompts(players, all_coalitions(5))
    given = lambda seqs, rows: np.array(list(logits(half, seqs, [rows] * len(seqs), route="single")), dtype=np.float64)
    answer = tokens(half, " good and")
    rows = given([np.append(x, answer) for x in left], range(-3, -1))
    logp = torch.from_numpy(rows).log_softmax(-1)[:, [0, 1], answer].numpy()
    rest = torch.from_numpy(rows)
    own = rest[:, [0, 1], answer].clone()
    rest[:, [0, 1], answer] = -torch.inf
    odd = (own - rest.logsumexp(-1)).numpy()
    last = torch.from_numpy(given(left.ids, [-1])[:, 0]).log_softmax(-1)
    for value, truth in (
        (TargetLogprob(" good and"), logp.sum(1)),
        (TokenLogprobs(" good and"), np.column_stack([logp, logp.sum(1)])),
        (TokenLogprobs(" good and", odds=True), np.column_stack([odd, whole_odds(odd)])),
        (Divergence(), -(last[-1].exp() * (last[-1] - last)).sum(1).numpy()),
        (ClassLogits(WORDS), last[:, [tokens(half, w)[0] for w in WORDS]].log_softmax(-1).numpy()),
    ):
        got = value.settle(half, evaluator, players).worth(evaluator, left)
        np.testing.assert_allclose(got, truth, rtol=0, atol=2e-5)


# whole rows, in slices


class Scripted:
    "Says, after a prompt of n tokens, the token of its script"

    def __init__(self, script, vocab):
        self.script, self.vocab, self.prompts, self.computed, self.asked = script, vocab, 0, 0, []

    def next_logits(self, prompts, columns):
        self.asked.append([tuple(p.tolist()) for p in prompts])
        rows = np.zeros((len(prompts), self.vocab))
        for row, p in zip(rows, prompts):
            row[self.script(p.tolist())] = 1
        return rows

    def logprob(self, prompts, answer):
        raise NotImplementedError


def test_the_vocabulary_of_all_prompts_is_never_held(lm, monkeypatch):
    monkeypatch.setattr(LM, "vocab", 128_256)
    evaluator = Scripted(lambda ids: sum(ids) % 128_256, 128_256)
    prompts = Prompts([np.array([i % 150, 7 * i % 150, 3]) for i in range(300)])
    got = in_slices(lm, evaluator, prompts, lambda rows: rows.argmax(1))
    assert got.tolist() == [int(p.sum()) for p in prompts]
    assert max(map(len, evaluator.asked)) * 128_256 <= 1 << 22
    assert sorted(p for part in evaluator.asked for p in part) == sorted({tuple(p.tolist()) for p in prompts})


@pytest.mark.parametrize("most", [1, 3, 5])
@pytest.mark.parametrize("name", ["divergence", "odds", "similarity"])
def test_slices_change_nothing(lm, players, monkeypatch, name, most):
    left = Delete().prompts(players, all_coalitions(5))
    question = PLAIN[name][0].settle(lm, Packed(lm), players)
    whole = question.worth(Packed(lm), left)
    sizes = []
    ask = Packed.next_logits
    monkeypatch.setattr(Packed, "next_logits", lambda s, p, c=None: sizes.append(len(p)) or ask(s, p, c))
    monkeypatch.setattr(asking, "_most", lambda lm, rows=1: most)
    np.testing.assert_allclose(question.worth(Packed(lm), left), whole, atol=1e-5)
    assert name == "odds" or max(sizes) == most


def test_greedy_answers_of_many_prompts(lm):
    left = Delete().prompts(find_players(lm.tokenizer, "Where does Robert Cruz live?", chat=True), all_coalitions(5))
    evaluator = Packed(lm)
    got = evaluator.generate(Prompts([*left.ids, *left.ids[:9]]), 8)
    assert got == [tuple(said(lm, ids.tolist(), 8)) for ids in [*left.ids, *left.ids[:9]]]
    steps = sum(min(len(x) + 1, 8) for x in got[:32])
    assert evaluator.prompts <= steps, "each different prompt once, and none after it has ended"
    assert len({len(x) for x in got}) > 1 and evaluator.generate(Prompts([]), 3) == []


def test_an_answer_ends_at_the_end_mark(lm):
    end, vocab = lm.tokenizer.eos_token_id, lm.vocab
    at = {1: end, 2: 40, 3: 41, 4: end, 5: 43, 6: 44, 7: 45}
    evaluator = Scripted(lambda ids: at[len(ids)], vocab)
    prompts = Prompts([np.array([9] * n) for n in (1, 2, 5, 2)])
    assert continuations(lm, evaluator, prompts, 3) == [(end,), (40, 41), (43, 44, 45), (40, 41)]
    assert [len(step) for step in evaluator.asked] == [3, 2, 2]
    assert continuations(lm, evaluator, prompts, 1) == [(end,), (40,), (43,), (40,)]


def test_places_go_on_where_the_prompt_ends():
    ids, places = [np.array([5, 6]), np.array([5])], [np.array([0, 3]), np.array([0])]
    answers = np.array([[8, 9], [7, 7]])
    for after, ends in ((6, [[6, 7], [6, 7]]), (None, [[4, 5], [1, 2]])):
        got = extended(Prompts(ids, places, after), answers)
        assert [p.tolist() for p in got.ids] == [[5, 6, 8, 9], [5, 7, 7]]
        assert [p[-2:].tolist() for p in got.places] == ends
        twice = extended(extended(Prompts(ids, places, after), answers[:, :1]), answers[:, 1:])
        assert [p.tolist() for p in twice.places] == [p.tolist() for p in got.places]
    assert extended(Prompts(ids), answers).places is None


def test_prompts_at_other_places_are_other_prompts(lm):
    seen = []

    class Placed(Scripted):
        def next_logits(self, prompts, columns):
            seen.append([p.tolist() for p in prompts.places])
            return super().next_logits(prompts, columns)

    ids = [np.array([4, 5])] * 3
    prompts = Prompts(ids, [np.array(p) for p in ([0, 1], [0, 2], [0, 1])], 3)
    continuations(lm, Placed(lambda x: 40, lm.vocab), prompts, 2)
    assert seen == [[[0, 1], [0, 2]], [[0, 1, 3], [0, 2, 3]]]


def test_hidden_words_keep_their_places_for_every_value(lm, players, monkeypatch):
    "The loop of this file with the positions of the full prompt given to the library by hand"
    left, n = Attend().prompts(players, all_coalitions(5)), len(players.ids)
    where = {tuple(ids.tolist()): places.tolist() for ids, places in zip(left.ids, left.places)}
    assert len(where) == 32

    def placed(lm, ids):
        ids = list(ids)
        places = next(where[tuple(ids[:k])] + list(range(n, n + len(ids) - k)) for k in range(len(ids), 0, -1)
                      if tuple(ids[:k]) in where)  # fmt: skip
        with torch.inference_mode():
            out = lm.model(torch.tensor([ids]), position_ids=torch.tensor([places]))
        return out.logits[0].double()

    some, full = ("raw classes", "odds", "own tokens", "divergence", "similarity"), players.ids.tolist()
    deleted = {name: np.array([PLAIN[name][1](lm, full, x.tolist()) for x in left]) for name in some}
    monkeypatch.setitem(globals(), "plain", placed)
    moved = 0
    for name in some:
        evaluator, (value, score) = Packed(lm), PLAIN[name]
        got = value.settle(lm, evaluator, players).worth(evaluator, left)
        truth = np.array([score(lm, full, x.tolist()) for x in left])
        np.testing.assert_allclose(got, truth, rtol=0, atol=1e-4, err_msg=name)
        moved += np.abs(truth - deleted[name]).max() > 0.01
    assert moved >= 4, "places that change nothing would prove nothing"


# similarity


@given(st.text("ab .,é", max_size=12), st.text("ab .,é", max_size=12))
def test_tfidf_against_the_definition(a, b):
    got = tfidf_cosine([a, b], b)
    assert abs(got[0] - dense_cosine(a, b)) < 1e-12 and got[1] == 1
    assert -1e-12 <= got[0] <= 1 + 1e-12 and abs(got[0] - tfidf_cosine([b], a)[0]) < 1e-12


def test_similarity_asks_the_embedding_about_different_answers_once(lm, players):
    seen = []

    def embed(texts):
        seen.append(list(texts))
        return np.array([[text.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts])

    left, full = Delete().prompts(players, all_coalitions(5)), players.ids.tolist()
    question = Similarity(6, embed).settle(lm, Packed(lm), players)
    got = question.worth(Packed(lm), left)
    own = embed([question.answer])[0]
    for ids, value in zip(left, got):
        row = embed([lm.tokenizer.decode(said(lm, ids.tolist(), 6))])[0]
        assert abs(value - row @ own / np.linalg.norm(row) / np.linalg.norm(own)) < 1e-9
    assert seen[0] == [question.answer] and len(set(seen[1])) == len(seen[1]) < 32
    assert question.answer == lm.tokenizer.decode(said(lm, full, 6)).strip()
    with pytest.raises(InputError, match="other than zeros"):
        Similarity(6, lambda texts: np.zeros((len(texts), 2))).settle(lm, Packed(lm), players)


def test_divergence_where_a_token_is_impossible(lm, players):
    "The full prompt's impossible tokens add nothing; what a coalition makes impossible is infinite, and refused"

    class Masked(Packed):
        mask = None

        def next_logits(self, prompts, columns=None):
            rows = super().next_logits(prompts, columns)
            whole = np.array([len(p) == len(players.ids) for p in prompts])
            rows[np.ix_(whole if self.mask is None else ~whole, np.arange(50, 60))] = -np.inf
            return rows

    evaluator = Masked(lm)
    left = Delete().prompts(players, all_coalitions(5))
    assert (Divergence().settle(lm, evaluator, players).worth(evaluator, left) <= 1e-9).all()
    evaluator.mask = "others"
    with pytest.raises(WorldError, match="infinity for 31 of 32"):
        Divergence().settle(lm, evaluator, players).worth(evaluator, left)


# functions of the user's


def test_a_function_sees_each_different_text_once(lm):
    p = find_players(lm.tokenizer, "very very very good", prompt=PROMPT)
    seen, rows = [], []

    def count(texts):
        seen.append(list(texts))
        return np.array([len(t) for t in texts])

    def length(ids):
        rows.append(len(ids))
        return torch.tensor([float(len(x)) for x in ids])

    left, evaluator = Delete().prompts(p, all_coalitions(4)), Packed(lm)
    got = Custom(count).settle(lm, evaluator, p).worth(evaluator, left)
    assert seen[0] == [PROMPT.format(text="very very very good")]
    assert len(seen) == 2 and len(seen[1]) == len(set(seen[1])) == 8 and evaluator.prompts == 9
    assert got.tolist() == [len(lm.tokenizer.decode(x)) for x in left]
    got = Custom(length, tokens=True).settle(lm, evaluator, p).worth(evaluator, left)
    assert got.tolist() == [len(x) for x in left] and rows == [1, 8]


def test_a_function_sees_no_special_tokens_of_a_chat(lm):
    p, seen = find_players(lm.tokenizer, "so good", chat=True), []
    Custom(lambda texts: [seen.append(t) or 0.0 for t in texts]).settle(lm, Packed(lm), p)
    assert "so good" in seen[0] and not [t for t in lm.tokenizer.all_special_tokens if t in seen[0]]


@pytest.mark.parametrize(
    "later, wrong",
    [
        (lambda n: np.ones(n - 1), "shape"),
        (lambda n: np.ones((n, 2)), "shape"),
        (lambda n: np.r_[np.nan, np.ones(n - 1)], "nan or infinity for 1 of 32"),
        (lambda n: ["a"] * n, "numbers for 32 prompts"),
        (lambda n: [[1.0], [1.0, 2.0]] * (n // 2), "numbers for 32 prompts"),
    ],
)
def test_a_function_is_held_to_its_word(lm, players, later, wrong):
    left = Delete().prompts(players, all_coalitions(5))
    question = Custom(lambda texts: later(len(texts)) if len(texts) > 1 else [1.0]).settle(lm, Packed(lm), players)
    with pytest.raises(InputError, match=wrong):
        question.worth(Packed(lm), left)


def test_names_of_a_functions_outputs(lm, players):
    rows = lambda texts: np.tile([1.0, 3.0, 2.0], (len(texts), 1))
    q = Custom(rows, ("x", "y", "z"), unit="score").settle(lm, Packed(lm), players)
    assert (q.answer, q.choice, q.focus, q.unit) == ("y", 1, 1, "score")
    assert Custom(rows).settle(lm, Packed(lm), players).outputs == ("output 0", "output 1", "output 2")
    for fn, names in ((rows, ("x", "y")), (lambda texts: np.ones(len(texts)), ("x",))):
        with pytest.raises(InputError, match="names of outputs"):
            Custom(fn, names).settle(lm, Packed(lm), players)


# names


def test_every_name_is_a_value_that_works(lm):
    labelled = {"margin", "probability", "classes"}
    units = Counter()
    for name in VALUES:
        value = value_named(name, labels=WORDS if name in labelled else None)
        a = explain_text(lm, "so good", prompt=PROMPT, value=value)
        assert a.efficiency_gap < 1e-9 and a.evaluations == 4
        units[a.unit] += 1
    assert max(units.values()) == 1


@pytest.mark.parametrize(
    "name, given, wrong",
    [
        ("margins", {}, "did you mean margin"),
        ("", {"target": "x", "answer_tokens": 2}, "got both"),
        *((name, {}, "label words for the value") for name in ("margin", "probability", "classes")),
        *((name, {"labels": WORDS}, "no label words") for name in ("logprob", "odds", "tokens", "divergence")),
        ("similarity", {"labels": WORDS}, "no label words"),
        *((name, {"target": "x"}, "no target") for name in ("divergence", "similarity")),
        ("margin", {"labels": WORDS, "target": "x"}, "no target"),
        (None, {"labels": WORDS, "target": "x"}, "no target for the value margin"),
        ("divergence", {"answer_tokens": 3}, "no number of answer tokens"),
        ("classes", {"labels": (" a",)}, "two or more different label words"),
        ("logprob", {"answer_tokens": 0}, "at least one token"),
    ],
)
def test_names_that_do_not_go_with_what_is_given(name, given, wrong):
    with pytest.raises(InputError, match=wrong):
        value_named(name, **given)


def test_chat_goes_where_labels_are_tokenised():
    assert value_named("classes", labels=WORDS, chat=True).chat and value_named("tokens", target="x", chat=True).chat
    assert value_named("odds", target="x", chat=True).chat


@pytest.mark.parametrize("chat", [False, True])
def test_room_is_what_the_target_takes(lm, chat):
    p = find_players(lm.tokenizer, TEXT, prompt=PROMPT, chat=chat)
    n = len(tokens(lm, " good and cheap"))
    for kind in (TargetLogprob, TokenLogprobs):
        assert kind(" good and cheap", chat=chat).room(lm, p) == n and kind(max_tokens=5).room(lm, p) == 5
        ids = kind(" good and cheap", chat=chat).settle(lm, Packed(lm), p).tokens
        assert list(ids) == tokens(lm, " good and cheap")
    assert Similarity(7).room(lm, p) == 7 and Divergence().room(lm, p) == 0
