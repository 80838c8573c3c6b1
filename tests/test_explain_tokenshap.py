"""TokenSHAP mode: the package's own numbers, its draws, its similarity in plain matrices, its refusals; the migration report."""

import importlib.util
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_analysis.core import InputError
from llm_analysis.explain.evaluator import Packed
from llm_analysis.explain.migration import migrate, same_order, sentences
from llm_analysis.explain.shapley import all_coalitions, exact_values
from llm_analysis.explain.tokenshap import (
    MOST,
    Asked,
    Embedded,
    Greedy,
    TfIdf,
    WordSplitter,
    coalitions_asked,
    coalitions_drawn,
    shifted,
    tokenshap,
)
from llm_analysis.explain.values import greedy
from llm_analysis.lm.model import load

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
CASES = json.loads((ROOT / "tests" / "tokenshap.json").read_text())["cases"]


@pytest.fixture(scope="session")
def bench():
    "The script that recorded the package's values: its model is asked again here"
    spec = importlib.util.spec_from_file_location("explain_tokenshap", ROOT / "bench" / "explain_tokenshap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def lm():
    return load("tiny", device="cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['text'][:12]!r}-{c['split']}-{c['ratio']}")
def test_the_packages_values(case, bench, lm):
    "TokenSHAP 0.2.2 under the same seed"
    assert bench.difference(bench.ours(case, lm.tokenizer), case["found"]) <= 1e-12


def test_what_was_recorded_says_something():
    "Many prompts, several ratios, values that differ from each other; several prompts at a ratio above 0"
    assert len({(c["text"], c["split"]) for c in CASES}) >= 20 and len({c["ratio"] for c in CASES}) >= 4
    told = [c for c in CASES if len({round(v, 9) for v in c["found"]["values"].values()}) >= 3]
    assert len({(c["text"], c["split"]) for c in told}) >= 20
    assert sum(c["ratio"] > 0 and c["found"]["coalitions"] > len(c["found"]["values"]) for c in CASES) >= 20


def test_numbers_are_drawn_as_the_package_draws_them():
    "As many as the definition says, from Python's global generator where none is given"
    n, extra = 6, 40
    numbers, taken, tries = random.Random(5), set(), 0
    always = {63 ^ (1 << i) for i in range(n)}
    while len(taken) < extra and tries < 10 * extra:
        tries += 1
        taken |= {numbers.randint(1, 62)} - always
    own = random.Random(5)
    coal = coalitions_drawn(n, n + extra, own)
    assert own.random() == numbers.random()
    assert {int("".join(map(str, row.astype(int))), 2) for row in coal[n:]} == taken
    random.seed(5)
    assert np.array_equal(coalitions_drawn(n, n + extra), coal)
    assert len(coalitions_drawn(4, 15, random.Random(0))) == 14  # one more is wanted than there are: it gives up


@pytest.mark.parametrize("n", [2, 7, 8, 9, 63, 64, 65, 200])
def test_coalitions_are_new_and_inside(n):
    coal = coalitions_drawn(n, n + 50, random.Random(1))
    assert coal.shape[1] == n and len(np.unique(coal, axis=0)) == len(coal)
    assert coal.any(1).all() and not coal.all(1).any()
    assert (coal[:n] == ~np.eye(n, dtype=bool)).all()


def test_cosines_in_plain_matrices():
    "The same from a dense matrix of counts"
    rng = np.random.default_rng(3)
    vocabulary = "one two three four five six seven eight".split()
    answers = [" ".join(rng.choice(vocabulary, rng.integers(0, 9))) for _ in range(40)]
    answers += answers[:10]
    texts = ["One, two; TWO a three", *answers]
    counts = np.array([[len(re.findall(rf"\b{w}\b", t.lower())) for w in vocabulary] for t in texts], dtype=float)
    rows = counts * (np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1)
    norm = np.linalg.norm(rows, axis=1)
    expected = rows[1:] @ rows[0] / np.where(norm[1:], norm[1:], 1) / norm[0]
    assert np.abs(TfIdf.fit(texts[0], answers)(answers) - expected).max() < 1e-12
    assert TfIdf.fit(texts[0], answers)(["unheard of words"])[0] == 0


def test_embeddings_must_be_vectors():
    with pytest.raises(InputError, match="finite vectors"):
        Embedded("a", lambda texts: np.zeros(len(texts)))(["b"])
    with pytest.raises(InputError, match="finite vectors"):
        Embedded("a", lambda texts: np.full((len(texts), 2), np.nan))(["b"])


def test_too_many_are_refused_before_anything_is_asked():
    def answer(prompt):
        raise AssertionError("asked")

    fifty = " ".join("abcde"[i % 5] * 2 for i in range(50))
    with pytest.raises(InputError, match=r"1,238,489,897,526 for 50 players.*budget="):
        tokenshap(answer, fifty, ratio=0.0011)
    for wrong in (dict(budget=49), dict(budget=MOST + 1), dict(ratio=-0.1), dict(ratio=1.1), dict(ratio=np.nan)):
        with pytest.raises(InputError):
            tokenshap(answer, fifty, **wrong)
    for short in ("", "  ", "one"):
        with pytest.raises(InputError, match="two players"):
            tokenshap(answer, short)
    long = " ".join(f"w{i}" for i in range(1100))  # where the package's float overflows
    with pytest.raises(InputError, match="for 1100 players"):
        tokenshap(answer, long, ratio=1e-9)
    assert coalitions_asked(1100, 0.0) == 1100


def test_no_prompt_is_asked_about_twice():
    seen = []
    ask = Asked(lambda prompt: seen.append(prompt) or prompt)
    found = tokenshap(ask, "very very very good good", ratio=0.9, seed=0)
    assert len(seen) == len(set(seen)) == found.prompts < len(found.coal)
    again = tokenshap(ask, "very very very good good", ratio=0.9, seed=0)
    assert again.prompts == 0 and np.array_equal(again.values, found.values)
    with pytest.raises(InputError, match="one string"):
        tokenshap(lambda prompt: None, "two words")


def test_names_and_forms():
    found = tokenshap(lambda prompt: prompt, "to be or not to be")
    assert list(found.shapley_values) == ["to_1", "be_2", "or_3", "not_4", "to_5", "be_6"]
    assert found.frame().player.tolist() == "to be or not to be".split()
    hostile = tokenshap(lambda prompt: prompt, "<script>alert(1)</script> and more")
    assert "<script" not in hostile._repr_html_() and "alert" in repr(hostile)
    assert WordSplitter(r"\W+").split("a, b") == ["a", "b"]


def test_greedy_is_the_most_probable_token(lm):
    "Beside the plain loop of explain.values, which computes everything anew for each token"
    answer = Greedy(lm, chat=True, max_tokens=12)
    before, after = answer.around
    texts = ["What pet does Ada Meyer have?", "Hello!", "Which sport", "have Meyer"]
    for text, said in zip(texts, answer.many(texts)):
        ids = np.array(lm.encode(before + text + after, special=False))
        plain = lm.tokenizer.decode(greedy(lm, Packed(lm), ids, 12), skip_special_tokens=True).strip()
        assert said == plain
    assert Greedy(lm, chat=True, max_tokens=2)(texts[0]) != answer(texts[0])
    with pytest.raises(InputError, match="less than 512 tokens"):
        answer("very " * 600)


def test_migration_of_a_known_game(bench):
    "Exact values beside plain sums over all coalitions, whatever the order in which they were asked for"
    text = "the soup was late but good"
    moved = migrate(bench.fake, text, ratio=1.0, seed=3)
    assert moved.complete and not moved.both.shapley.errors.any()
    words = text.split()
    cube = all_coalitions(len(words))
    said = [bench.fake(" ".join(w for w, stays in zip(words, row) if stays)) for row in cube]
    worth = TfIdf.fit(moved.theirs.whole, moved.theirs.answers)(said)
    assert np.abs(moved.both.shapley.values - exact_values(worth)).max() < 1e-12
    gain = [(worth[cube[:, i]] - worth[~cube[:, i]]).mean() for i in range(len(words))]
    assert np.abs(moved.both.banzhaf - gain).max() < 1e-12
    assert (
        np.abs(moved.left_out - [1 - worth[(cube == (np.arange(6) != i)).all(1)][0] for i in range(6)]).max() < 1e-12
    )
    assert np.abs(shifted(moved.both.banzhaf) - moved.theirs.values).max() < 1e-12


def test_migration_counts_what_it_asks():
    seen = []
    text = " ".join(f"w{i}" for i in range(14))
    moved = migrate(lambda p: seen.append(p) or f"{p} end", text, ratio=0.01, budget=300, seed=1)
    assert len(seen) == len(set(seen)) == moved.theirs.prompts + moved.new
    assert len(moved.both.coal) <= 300 and moved.new == len(moved.both.coal) - moved.shared
    assert moved.shared >= 1 + 14  # everybody, and everybody but one
    bill = moved.cost().set_index("method")["prompts sent"]
    assert bill.sum() == len(seen)
    assert abs(moved.both.shapley.values.sum() - (moved.both.shapley.full - moved.both.shapley.base)) < 1e-9


def test_nothing_stands_in_for_an_empty_prompt():
    def answer(prompt):
        assert prompt, "the empty prompt was asked about"
        return prompt

    moved = migrate(answer, "one two three", nothing="")
    assert moved.both.shapley.base == 0
    other = migrate(answer, "one two three", nothing="one two three")
    change = moved.both.shapley.values - other.both.shapley.values
    assert np.abs(change - 1 / 3).max() < 1e-12  # the same for all: no ranking depends on it


def test_migration_shows_hostile_words_as_text():
    moved = migrate(lambda p: f"{p} end", "<script>alert(1)</script> \x1b[31mred and more", nothing="")
    assert "<script" not in moved._repr_html_() and "\x1b" not in repr(moved) + moved._repr_html_()
    assert len(sentences(moved)) == 5


def test_same_order():
    a = np.array([0.0, 1.0, 2.0])
    assert same_order(a, 3 * a - 1) == 1 and same_order(a, -a) == 0 and same_order(a, a * 0) == 0.5
    assert same_order(a * 0, a * 0) == 1
