"""Whether our TokenSHAP mode gives the numbers of the package TokenSHAP 0.2.2 under the same seed.

usage: python bench/explain_tokenshap.py [--site FOLDER] [--record FILE.json]

--site    site-packages of an environment with TokenSHAP==0.2.2 and scikit-learn, looked at after our own
--record  where to write the package's values, as tests/tokenshap.json has them

Without the package the recorded values are compared. Claims: over 32 prompts at five ratios the largest difference of
a value is at most 1e-12, as is that of a TF-IDF cosine from scikit-learn's; answers of a local model are the same."""

import argparse
import json
import random
import re
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np

from llm_analysis.explain.tokenshap import (
    Greedy,
    TfIdf,
    TokenSplitter,
    WordSplitter,
    cleaned,
    coalitions_asked,
    tokenshap,
)
from llm_analysis.lm.model import TINY, load

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "tokenshap.json"
RATIOS = (0.0, 0.01, 0.1, 0.5, 1.0)
MOST = 2_100  # coalitions of a run: the package walks through them in Python for every player
SAID = "the soup was cold and late but music made every single evening worth while again Yes No well".split()
PROMPTS = [
    "Say hello",
    "Why is the sky blue?",
    "The soup was not very good.",
    "  two  spaces,\ttabs\nand lines ",
    "very very very very good",
    "a_b c_d e_1,2 f_2 snake_case",
    "Was gibt es heute zu essen, Grüße aus Zürich",
    "😀 one emoji and some words 😀",
    "List three rivers of France and their length",
    "I didn't love the lobby, yet the pool was never awful.",
    "Translate to French: the cat sat on the mat",
    "If all cats are grey, what colour is mine?",
    "Name two animals that can swim and fly",
    "Tell me, please, what a noun is",
    "to be or not to be",
    "Write one line about rain, wind and snow",
]


def fake(prompt: str) -> str:
    "An answer that depends on the words of the prompt alone, on their neighbours too; now and then without a word"
    words = re.findall(r"\w+", prompt.lower())
    marks = [zlib.crc32(" ".join(words[i : i + 2]).encode()) for i in range(len(words))]
    said = [SAID[m % len(SAID)] for m in marks if m % 3]
    return " ".join(said) + " Well." if said else "-"


class Model:
    "What the package wants: a method generate"

    def generate(self, prompt: str) -> str:
        return fake(prompt)


def cases(tokenizer) -> list[dict]:
    "Every prompt split at spaces and into tokens, at each ratio that it can be paid for at"
    asked = []
    for seed, text in enumerate(PROMPTS):
        for split, splitter in (("words", WordSplitter()), ("tokens", TokenSplitter(tokenizer))):
            n = len(splitter.split(cleaned(text)))
            ratios = [r for r in RATIOS if coalitions_asked(n, r) <= MOST]
            asked += [dict(text=text, split=split, ratio=r, seed=seed) for r in ratios]
    return asked


def ours(case: dict, tokenizer) -> dict:
    "Our values and the number of coalitions"
    splitter = WordSplitter() if case["split"] == "words" else TokenSplitter(tokenizer)
    found = tokenshap(fake, case["text"], ratio=case["ratio"], splitter=splitter, seed=case["seed"])
    return dict(whole=found.whole, coalitions=len(found.coal), values=found.shapley_values)


def theirs(case: dict, package, tokenizer) -> dict:
    "The package's values"
    splitter = package.StringSplitter() if case["split"] == "words" else package.TokenizerSplitter(tokenizer)
    explainer = package.TokenSHAP(Model(), splitter)
    random.seed(case["seed"])
    table = explainer.analyze(case["text"], sampling_ratio=case["ratio"])
    values = {k: float(v) for k, v in explainer.shapley_values.items()}
    return dict(whole=explainer.baseline_text, coalitions=len(table), values=values)


def difference(a: dict, b: dict) -> float:
    "The largest of two lists of values; infinite where anything else differs"
    alike = a["whole"] == b["whole"] and a["coalitions"] == b["coalitions"] and list(a["values"]) == list(b["values"])
    return max(abs(x - y) for x, y in zip(a["values"].values(), b["values"].values())) if alike else np.inf


def peer():
    "The package, able to run outside of a notebook; None where it is not there"
    try:
        import token_shap.token_shap as package
    except ImportError:
        return None
    package.tqdm = lambda rows, **_: rows
    return package


def cosines() -> float:
    "The largest difference of our TF-IDF cosines from scikit-learn's, over 200 collections of answers"
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    rng, most = np.random.default_rng(0), 0.0
    odd = [*SAID, "a", "I", "été", "snake_case", "don't", "42", "3.14", "ΣΑΣ", "İstanbul", "x-ray", "\u200bzero", ""]
    for _ in range(200):
        texts = [" ".join(rng.choice(odd, rng.integers(0, 15))) for _ in range(rng.integers(2, 40))]
        texts += texts[1:3] * 3 + ["one word"]
        rows = TfidfVectorizer().fit_transform(texts)
        most = max(
            most, np.abs(cosine_similarity(rows[:1], rows[1:])[0] - TfIdf.fit(texts[0], texts[1:])(texts[1:])).max()
        )
    return most


def local(package, lm) -> tuple[float, int]:
    "Our values of the tiny model's answers beside the package's own LocalModel, prompts of all lengths"
    model, answer, most = package.LocalModel(str(TINY), max_new_tokens=12), Greedy(lm, max_tokens=12), 0.0
    texts = ["Review: The soup was not very good. Sentiment:", "Thomas Reed is good at", "The film was dull and slow"]
    for text in texts:
        explainer = package.TokenSHAP(model, package.StringSplitter())
        random.seed(7)
        explainer.analyze(text, sampling_ratio=0.3)
        values = tokenshap(answer, text, ratio=0.3, seed=7).values
        most = max(most, np.abs(values - list(explainer.shapley_values.values())).max())
    return most, len(texts)


def cost(run) -> str:
    "Seconds and peak memory of a call"
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return f"{seconds:.2f} s, {peak / 1e6:.0f} MB"


def report(rows: dict[str, float]) -> bool:
    "Print differences as a table; whether all of them are at most 1e-12"
    print("\n| largest difference | measured | at most 1e-12 |\n| --- | --- | --- |")
    print("\n".join(f"| {what} | {value:.1e} | {'yes' if value <= 1e-12 else 'NO'} |" for what, value in rows.items()))
    return all(value <= 1e-12 for value in rows.values())


def main(record: Path | None) -> bool:
    "Compare, and print what came out"
    lm, package = load("tiny", device="cpu"), peer()
    if package is None:
        kept = json.loads(RECORDED.read_text())["cases"]
        print("TokenSHAP is not installed here (--site): compared with its recorded values")
        return report({f"{len(kept)} recorded": max(difference(ours(c, lm.tokenizer), c["found"]) for c in kept)})
    done = [dict(case, found=theirs(case, package, lm.tokenizer)) for case in cases(lm.tokenizer)]
    rows = {}
    for ratio in RATIOS:
        some = [c for c in done if c["ratio"] == ratio]
        prompts = len({(c["text"], c["split"]) for c in some})
        rows[f"ratio {ratio}: {len(some)} runs, {prompts} prompts"] = max(
            difference(ours(c, lm.tokenizer), c["found"]) for c in some
        )
    rows["TF-IDF cosines, 200 collections of answers"] = cosines()
    most, count = local(package, lm)
    rows[f"answers of LocalModel, {count} prompts at 0.3"] = most
    if record:
        some = [json.dumps(case, ensure_ascii=False) for case in done[::2]]
        head = '{"package": "TokenSHAP 0.2.2", "cases": [\n'
        record.write_text(head + ",\n".join(some) + "\n]}\n")
    good = report(rows)
    long = dict(text=" ".join(SAID[:14]), split="words", ratio=0.5, seed=0)
    print("\n8,191 coalitions of 14 words, a model that answers at once")
    print("package:", cost(lambda: theirs(long, package, lm.tokenizer)))
    print("here:   ", cost(lambda: ours(long, lm.tokenizer)))
    return good


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--site", type=Path)
    options.add_argument("--record", type=Path)
    chosen = options.parse_args()
    if chosen.site:
        sys.path.append(str(chosen.site))
    sys.exit(not main(chosen.record))
