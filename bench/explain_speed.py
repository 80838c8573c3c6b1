"""What one evaluation costs: a coalition of 50 words and an answer of 20 tokens, here and in the packages that explain alike.

    python bench/explain_speed.py                      15 M and 110 M parameters, one thread; ten minutes
    python bench/explain_speed.py --sizes 15           the small one alone
    python bench/explain_speed.py --device cuda        on a GPU (1.1 B parameters, bfloat16)

The peers come with `pip install -e '.[bench]'`; one that is not installed is left out, aloud. Each is called
as its own documentation says, on the same random Llama and the same words:

- *TokenSHAP*: its `LocalModel`, which writes 100 new tokens for each coalition.
- *captum*: `LLMAttribution(ShapleyValueSampling)` with its defaults, a decoding step for each token of the answer.
- *one by one*: a teacher-forced forward for each coalition, the plain loop that anybody would write; and the same with
  the output head at the answer alone.
- *this package*: `explain.evaluator.Packed.logprob` over the coalitions of a leverage design, as an estimator asks.

A peer is timed on at least 32 coalitions of all sizes; everything in turns, in this one process, in seconds of its one
thread; a ratio is the median over the rounds, each side of a pair seconds apart. *Exact* asks about all subsets of 14 words on a causal model, with the answer read off the last word: how many
tokens pass the model for each token of the subsets. The exit status is 1 where a claim did not hold."""

import argparse
import os
import platform
import statistics
import sys
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from packing import timed
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_analysis.explain.coalitions import leverage_pairs, rows_of
from llm_analysis.explain.evaluator import Packed
from llm_analysis.explain.players import Players, find_players
from llm_analysis.explain.removal import Delete
from llm_analysis.explain.shapley import all_coalitions
from llm_analysis.lm.model import LM, load
from llm_analysis.lm.packing import logits

SIZES = {  # parameters in millions, about: width, feed-forward, layers, heads
    "15": (288, 768, 6, 6),
    "110": (768, 2048, 12, 12),
    "1100": (2048, 5632, 22, 32),
}
CLAIMS = {  # times the cost of this package
    "15": {"TokenSHAP, 100 new tokens": 60, "captum, as it comes": 10, "one by one": 2.3},
    "110": {"TokenSHAP, 100 new tokens": 25, "captum, as it comes": 7, "one by one": 1.8},
}
PLAYERS, ANSWER = 50, 20


def llama(size: str, device: str) -> LM:
    "A Llama with random weights, saved and loaded, with the tiny model's tokenizer"
    width, forward, layers, heads = SIZES[size]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=forward, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=32_000, tie_word_embeddings=True, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:  # wide enough that every token matters
            p.data.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        load("tiny", device="cpu").tokenizer.save_pretrained(folder)
        return load(folder, device=device, dtype="float32" if device == "cpu" else "bfloat16")


def millions(lm: LM) -> float:
    "Parameters"
    return sum(p.numel() for p in lm.model.parameters()) / 1e6


def words(lm: LM, count: int) -> str:
    "Different words of one token each"
    found = [t[1:] for t in lm.tokenizer.get_vocab() if t.startswith("Ġ") and t[1:].isalpha() and len(t) > 3]
    return " ".join(np.random.default_rng(0).permutation(sorted(found))[:count])


def alone(lm: LM, prompts: list[np.ndarray], answer: np.ndarray, spare: bool = False) -> np.ndarray:
    "The plain loop: one teacher-forced forward for each coalition"
    found, target = [], torch.from_numpy(answer).to(lm.device)
    for prompt in prompts:
        ids = torch.from_numpy(np.append(prompt, answer))[None].to(lm.device)
        with torch.inference_mode():
            keep = len(answer) + 1 if spare else 0
            z = lm.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, -len(answer) - 1 : -1]
        found.append(float(z.float().log_softmax(-1)[torch.arange(len(answer)), target].sum()))
    return np.array(found)


def captum_cost(lm: LM, players: Players, answer: np.ndarray) -> tuple[float, int]:
    "Seconds, and evaluations that they were for"
    from captum.attr import LLMAttribution, ShapleyValueSampling, TextTemplateInput

    asked = []
    given = TextTemplateInput(template=" ".join(["{}"] * len(players)), values=list(players.names))
    method = LLMAttribution(ShapleyValueSampling(lm.model), lm.tokenizer)
    more = dict(n_samples=1, _inspect_forward=lambda *said: asked.append(said))
    target = torch.from_numpy(answer).to(lm.device)
    spent, _ = timed(lm, lambda: method.attribute(given, target=target, **more))
    return spent, len(asked)


def tokenshap_cost(lm: LM, texts: list[str]) -> tuple[float, int]:
    "Seconds, and evaluations that they were for"
    from token_shap.token_shap import LocalModel

    peer = LocalModel.__new__(LocalModel)  # its own way in loads from a name; the model is the same
    peer.model, peer.tokenizer, peer.max_new_tokens, peer.temperature = lm.model, lm.tokenizer, 100, 0.5
    spent, _ = timed(lm, lambda: [peer.generate(text) for text in texts])
    return spent, len(texts)


def compare(lm: LM, size: str, rounds: int) -> list[tuple]:
    "Rows of the table: package, milliseconds, times ours, claim, whether that held"
    players = find_players(lm.tokenizer, words(lm, PLAYERS), prompt="{text}")
    answer = np.random.default_rng(1).integers(300, 400, ANSWER)
    design = rows_of(leverage_pairs(PLAYERS, 199, lambda k: np.random.default_rng([2, k])))
    some = design[np.argsort(design.sum(1), kind="stable")[:: len(design) // 40]]
    all_, few = Delete().prompts(players, design), Delete().prompts(players, some)
    texts = [" ".join(np.array(players.names)[row]) or " " for row in some]
    ours = Packed(lm)
    ours.logprob(all_, answer)  # proof, trial and warm-up
    before = ours.computed
    cost: dict[str, list[float]] = {}
    for _ in range(rounds):
        spent, found = timed(lm, lambda: ours.logprob(all_, answer))
        cost.setdefault("this package", []).append(spent / len(all_))
        spent, plain = timed(lm, lambda: alone(lm, few.ids, answer))
        cost.setdefault("one by one", []).append(spent / len(few))
        spent, _ = timed(lm, lambda: alone(lm, few.ids, answer, spare=True))
        cost.setdefault("one by one, head at the answer", []).append(spent / len(few))
    at = np.argsort(design.sum(1), kind="stable")[:: len(design) // 40]
    gap, useful = float(np.abs(found[at] - plain).max()), sum(len(p) + ANSWER - 1 for p in all_.ids)
    for name, peer in (
        ("captum, as it comes", lambda: captum_cost(lm, players, answer)),
        ("TokenSHAP, 100 new tokens", lambda: tokenshap_cost(lm, texts)),
    ):
        try:
            spent, evaluations = peer()
        except ImportError as e:
            print(f"{name}: left out ({e})", file=sys.stderr)
            continue
        print(f"{name}: {evaluations} evaluations timed", file=sys.stderr)
        cost[name] = [spent / evaluations]
    base, rows = statistics.median(cost["this package"]), []
    for name, each in cost.items():
        pairs = zip(each, cost["this package"]) if len(each) == rounds else ((x, base) for x in each)
        ratio, claim = statistics.median(a / b for a, b in pairs), CLAIMS.get(size, {}).get(name)
        rows.append((millions(lm), name, 1e3 * statistics.median(each), ratio, claim, claim is None or ratio >= claim))
    share = (ours.computed - before) / rounds / useful
    print(f"{millions(lm):.0f} M: {share:.3f} tokens computed for each useful one (claim: at most 1.02);", end=" ")
    print(f"largest difference from one by one {gap:.1e} nats\n")
    return rows + [(millions(lm), "computed / useful tokens", share, None, 1.02, share <= 1.02)]


def exact(lm: LM, players: int) -> tuple[float, float]:
    "Tokens computed for each token of all subsets; seconds of the plain way over ours"
    found = find_players(lm.tokenizer, words(lm, players), prompt="{text}")
    prompts = Delete().prompts(found, all_coalitions(players)).ids
    prompts = [p if len(p) else np.array([0]) for p in prompts]
    ask = lambda some: logits(lm, some, [[-1]] * len(some), columns=[5, 7])
    spent, answers = timed(lm, lambda: ask(prompts))
    some = prompts[:: len(prompts) // 64]
    plain, _ = timed(lm, lambda: [lm.model(torch.from_numpy(p)[None].to(lm.device), use_cache=False) for p in some])
    return answers.report.computed / sum(map(len, prompts)), plain / len(some) * len(prompts) / spent


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--sizes", nargs="*", choices=list(SIZES), default=None)
    ask.add_argument("--device", default="cpu")
    ask.add_argument("--rounds", type=int, default=3)
    a = ask.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    held = True
    for size in a.sizes or (["15", "110"] if a.device == "cpu" else ["1100"]):
        lm = llama(size, a.device)
        rows = compare(lm, size, a.rounds)
        print("| M parameters | | ms a coalition | times ours | claim | |\n| ---: | --- | ---: | ---: | ---: | --- |")
        for m, name, value, ratio, claim, good in rows:
            shown = "–" if ratio is None else f"{ratio:.2f}"
            print(
                f"| {m:.0f} | {name} | {value:.3g} | {shown} | {'–' if claim is None else claim} | {'' if good else 'NOT HELD'} |"
            )
            held &= good
        if size == "15":
            share, faster = exact(lm, 14)
            print(
                f"\nExact, 14 words: {share:.3f} of the tokens of all subsets (claim: 0.2), {faster:.1f} times as fast as one by one"
            )
            held &= share <= 0.2
        print(flush=True)
    print(f"{platform.machine()}, torch {torch.__version__}, {a.device}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
