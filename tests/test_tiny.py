"""The made world across processes, and the shipped weights through the door that every user takes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from llm_analysis.core import InputError
from llm_analysis.lm.model import TINY, load
from llm_analysis.tiny import corpus, facts, reviews
from llm_analysis.tiny.model import evaluate, margins
from llm_analysis.tiny.world import LABELS, NAMES, PROMPTS, SPLITS, dataset

HASHES = """
import hashlib, json
from llm_analysis.tiny.world import NAMES, SPLITS, dataset
print(json.dumps({f"{n}/{s}": hashlib.sha256(repr(dataset(n, s).to_list()).encode()).hexdigest() for n in NAMES for s in SPLITS}))
"""


def hashes(hash_seed: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    out = subprocess.run([sys.executable, "-c", HASHES], env=env, capture_output=True, text=True, check=True).stdout
    return json.loads(out)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu", dtype="float32")


def test_the_world_is_the_same_in_every_process():
    first, second = hashes("1"), hashes("2")
    assert first == second
    assert len(set(first.values())) == len(NAMES) * len(SPLITS)  # and no two parts are the same


def test_another_seed_is_another_world():
    for name in ("facts", "news"):
        assert dataset(name)[:5] != dataset(name, seed=1)[:5]
    assert reviews.draw("validation", 0, count=5) != reviews.draw("validation", 1, count=5)


@pytest.mark.parametrize(
    "name, split", [("review", "train"), ("reviews", "test"), ("", "train"), ("chats", "validation")]
)
def test_unknown_names_are_refused(name, split):
    with pytest.raises(InputError, match="expected .* among"):
        dataset(name, split)


def test_score_by_brute_force():
    "The score of a subset against a second, plainer reading of the columns"
    rows, rng = dataset("reviews"), np.random.default_rng(0)
    for row in rows.select(range(200)):
        words = [
            reviews.Word(*w)
            for w in zip(row["text"].split(), row["roles"], row["clauses"], row["weights"], strict=True)
        ]
        kept = rng.random(len(words)) < 0.6
        total = 0.0
        for clause in set(row["clauses"]):
            mine = [w for w, k in zip(words, kept) if k and w.clause == clause]
            strength = sum(w.weight for w in mine if w.role == "opinion")
            for w in mine:
                if w.role in ("negator", "intensifier", "contrast"):
                    strength *= w.weight
            total += strength
        assert reviews.worth(words, kept) == pytest.approx(total)
        assert reviews.worth(words) == pytest.approx(row["score"])
        assert (row["score"] > 0) == row["label"]


def test_neutral_words_carry_no_label():
    "Deleting every neutral word leaves the score, and the words left alone have score 0"
    for row in dataset("reviews").select(range(100)):
        words = [reviews.Word(*w) for w in zip(row["text"].split(), row["roles"], row["clauses"], row["weights"])]
        said = np.array([w.role != "neutral" for w in words])
        assert reviews.worth(words, said) == pytest.approx(row["score"])
        assert reviews.worth(words, ~said) == 0
        opinions = {i for i, w in enumerate(words) if w.role == "opinion"}
        assert opinions <= set(row["planted"])


def test_lengths_in_tokens(tiny):
    "Reviews have 2 to 53 tokens and news items 16 to 126"
    for name, low, high in (("reviews", 2, 53), ("news", 16, 126)):
        for split in SPLITS:
            n = [len(x) for x in tiny.tokenizer(dataset(name, split)["text"][:])["input_ids"]]
            assert low <= min(n) and max(n) <= high


def test_validation_paraphrases_are_new_for_their_fact():
    asked = {(m.rank, m.relation, m.template) for m in facts.mentions() if m.form != "tell"}
    rows = dataset("facts")
    held = set(zip(rows["rank"], rows["relation"], rows["template"]))
    assert not asked & held
    assert {e == 0 for r, e in zip(rows["rank"], rows["exposures"]) if r >= facts.PEOPLE - facts.NEVER} == {True}


def test_the_never_mentioned_are_in_no_document():
    text = "\n".join(d.text for d in corpus.corpus()[1])
    people = facts.people()
    assert not [p.name for p in people[-facts.NEVER :] if p.name in text]
    assert all(p.name in text for p in people[: -facts.NEVER])


def test_prose_is_not_shipped():
    "No file of the asset folder holds the interpreter's prose"
    line = next(x for x in corpus.prose("train")["assert"].splitlines() if len(x) > 40)
    assert not [f.name for f in TINY.iterdir() if line.encode() in f.read_bytes()]
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 6e6


def test_answers_are_single_tokens_and_do_not_merge_with_the_prompt(tiny):
    for name, labels in LABELS.items():
        prompt = PROMPTS[name].format(text="The soup was good.")
        for label in labels:
            assert tiny.encode(prompt + label) == tiny.encode(prompt) + tiny.encode(label)
            assert len(tiny.encode(label)) == 1
    text = "The soup was good."
    before, after = PROMPTS["reviews"].split("{text}")
    assert tiny.encode(before.strip()) + tiny.encode(" " + text) + tiny.encode(after) == tiny.encode(
        PROMPTS["reviews"].format(text=text)
    )


def test_shipped_weights_are_whole_halves(tiny):
    half = load("tiny", device="cpu", dtype="float16")
    assert half.dtype == torch.float16 and half.fingerprint == tiny.fingerprint
    assert tiny.max_len == 512 and tiny.vocab == 2048
    n = sum(p.numel() for p in tiny.model.parameters())
    assert 1e6 <= n <= 2.5e6


def test_generation_mask_marks_what_the_assistant_says(tiny):
    messages = dataset("chat")["messages"][0]
    out = tiny.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    said = tiny.tokenizer.decode([t for t, m in zip(out["input_ids"], out["assistant_masks"]) if m])
    assert said == "".join(m["content"] + corpus.END_TURN for m in messages if m["role"] == "assistant")


def test_shipped_figures_on_a_sample(tiny):
    "The targets hold for the shipped file, loaded in single precision"
    table = evaluate(tiny, sample=300)
    wanted = table.dropna()
    slack = 0.03  # a sample of 300
    assert (wanted.value >= wanted.low - slack).all() and (wanted.value <= wanted.high + slack).all(), wanted
    stored = json.loads((TINY / "training.json").read_text())["figures"]
    assert table.value["prose perplexity"] == pytest.approx(
        stored["prose perplexity"], rel=0.05
    )  # other Pythons: other prose


def test_margins_follow_the_score_of_fragments(tiny):
    "On reviews with words deleted the model's margin follows the known score"
    rng, rows = np.random.default_rng(0), dataset("reviews").select(range(60))
    texts, scores = [], []
    for row in rows:
        words = [reviews.Word(*w) for w in zip(row["text"].split(), row["roles"], row["clauses"], row["weights"])]
        for _ in range(5):
            kept = rng.permutation(len(words)) < rng.integers(len(words))
            texts.append(" ".join(w.text for w, k in zip(words, kept) if k))
            scores.append(reviews.worth(words, kept))
    m = margins(tiny, [PROMPTS["reviews"].format(text=t) for t in texts], LABELS["reviews"])
    assert np.corrcoef(m[:, 1] - m[:, 0], scores)[0, 1] > 0.8
    empty = margins(tiny, [PROMPTS["reviews"].format(text="")], LABELS["reviews"])[0]
    assert abs(empty[1] - empty[0]) < 0.7  # a fair coin: the odds are at most two to one
