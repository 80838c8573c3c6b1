"""Many sequences through one model: the chosen route against each single route, a one-by-one loop and padded batches.

    python bench/packing.py                  one thread, the shipped tiny model and a random Llama of 16 M parameters
    python bench/packing.py --device cuda    the same on a GPU, with a random Llama of 1.1 B parameters in bfloat16

Two kinds of sequences: *coalitions* (random deletions from one prompt, one question at the end, as an explainer asks)
and *mixed* (log-normal lengths of 8 to 400 tokens, every token scored, as a perplexity or a distillation job asks).
Everything is timed on the same sequences, in turns, so that a busy machine disturbs all of them alike; a line is the
median over the rounds of its time relative to the chosen route in the same round. On a CPU, time is that of the one
thread, so that other processes do not count. Prints a Markdown table.
"""

import argparse
import os
import platform
import statistics
import time
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_analysis.core import digest
from llm_analysis.lm.choose import ranking
from llm_analysis.lm.model import LM, load
from llm_analysis.lm.packing import logits, token_logprobs
from llm_analysis.lm.plan import ROUTES

LOOP, BATCHES = "one-by-one loop", "batches of 32, as they come"


def random_llama(device: str) -> LM:
    "A Llama with random weights: 16 M parameters on a CPU, 1.1 B on a GPU"
    big = device != "cpu"
    size = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32)
    if not big:
        size = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6)
    heads = size["num_attention_heads"] // 2
    config = LlamaConfig(
        **size, num_key_value_heads=heads, vocab_size=32_000 if big else 8_192, max_position_embeddings=1024
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if big else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() > 1:  # wide enough that every token changes every later answer
            p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    name = f"Llama {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M"
    return LM(name, model, None, None, digest(repr(config)), torch.device(device), dtype)


def coalitions(rng, vocab: int, count: int) -> list[np.ndarray]:
    "Deletions from a prompt of 12 fixed tokens and 40 players, as many of every size"
    players = rng.integers(0, vocab, 40)
    sizes = rng.integers(0, 41, count)
    kept = [np.sort(rng.permutation(40)[:k]) for k in sizes]
    head, tail = rng.integers(0, vocab, 6), rng.integers(0, vocab, 6)
    return [np.concatenate([head, players[k], tail]) for k in kept]


def mixed(rng, vocab: int, count: int) -> list[np.ndarray]:
    "Log-normal lengths, median 66 tokens, clipped to 8 to 400"
    return [rng.integers(0, vocab, n) for n in np.clip(rng.lognormal(4.2, 0.8, count), 8, 400).astype(int)]


@torch.inference_mode()
def plain(lm: LM, seqs, last: bool, rows: int) -> tuple[list[np.ndarray], int]:
    "What a script would do: batches in arrival order, padded on the right with a mask; and the tokens computed"
    out, computed = [], 0
    for at in range(0, len(seqs), rows):
        part = seqs[at : at + rows]
        width = max(map(len, part))
        ids, mask = np.zeros((len(part), width), np.int64), np.zeros((len(part), width), np.int64)
        for k, s in enumerate(part):
            ids[k, : len(s)], mask[k, : len(s)] = s, 1
        given = dict(input_ids=torch.from_numpy(ids).to(lm.device))
        if rows > 1:
            given["attention_mask"] = torch.from_numpy(mask).to(lm.device)
        z = lm.model(**given, use_cache=False).logits
        computed += ids.size
        for k, s in enumerate(part):
            if last:
                out.append(z[k, len(s) - 1, :2].float().cpu().numpy())
            else:
                target = torch.from_numpy(s[1:]).to(lm.device)[:, None]
                out.append(z[k, : len(s) - 1].float().log_softmax(-1).gather(1, target)[:, 0].cpu().numpy())
    return out, computed


def ask(lm: LM, seqs, last: bool, route: str, batch_tokens):
    "The same through lm.packing, without merging equal sequences"
    more = dict(route=route, batch_tokens=batch_tokens, dedupe=False)
    if last:
        return logits(lm, seqs, [[-1]] * len(seqs), columns=[0, 1], **more)
    return token_logprobs(lm, seqs, **more)


def timed(lm: LM, call) -> tuple[float, object]:
    "Seconds, and what the call returned"
    clock = time.thread_time if lm.device.type == "cpu" else time.perf_counter
    start = clock()
    out = call()
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, out


def compare(lm: LM, kind: str, seqs, last: bool, rounds: int, batch_tokens) -> list[str]:
    "Table lines of one model on one kind of sequences"
    budget = batch_tokens or (512 if lm.device.type == "cpu" else 16_384)
    inputs = seqs if last else [s[:-1] for s in seqs]
    rows = [np.array([len(s) - 1]) if last else np.arange(len(s)) for s in inputs]
    limit = max(64, (1 << 26 if lm.device.type == "cpu" else 1 << 29) // lm.vocab)
    measuring, why = 0.0, ""
    while why != "measured":
        spent, (order, why) = timed(lm, lambda: ranking(lm, inputs, rows, budget=budget, max_answers=limit))
        measuring += spent
    calls = {"chosen": lambda: ask(lm, seqs, last, "auto", batch_tokens)}
    calls |= {route: (lambda r=route: ask(lm, seqs, last, r, batch_tokens)) for route in ROUTES}
    calls |= {LOOP: lambda: plain(lm, seqs, last, 1), BATCHES: lambda: plain(lm, seqs, last, 32)}
    seconds, got = {name: [] for name in calls}, {}
    calls["chosen"]()  # proof and warm-up
    for turn in range(rounds):
        names = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for name in names:
            spent, got[name] = timed(lm, calls[name])
            seconds[name].append(spent)
    truth = got[LOOP][0]
    worst = max(float(np.abs(np.ravel(a) - np.ravel(b)).max()) for a, b in zip(got["chosen"], truth))
    useful = sum(map(len, inputs))
    lines = []
    for name in calls:
        report = getattr(got[name], "report", None)
        computed = report.computed if report else got[name][1]
        ratio = statistics.median(s / c for s, c in zip(seconds[name], seconds["chosen"]))
        label = f"**chosen: {report.route}**" if name == "chosen" else name
        micro = statistics.median(seconds[name]) / useful * 1e6
        lines.append(f"| {lm.name} | {kind} | {label} | {micro:.1f} | {ratio:.2f} | {computed / useful:.3f} |")
    print(f"{lm.name}, {kind}: {useful} useful tokens; trial {measuring:.2f} s, ranking {', '.join(order)};", end=" ")
    print(f"largest difference from the loop {worst:.1e}; chosen / best single route", end=" ")
    best = min(statistics.median(s / c for s, c in zip(seconds[r], seconds["chosen"])) for r in ROUTES)
    print(f"{1 / best:.2f}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is timed, in turns")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of sequences")
    parser.add_argument("--batch-tokens", type=int, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    models = [load("tiny", device=args.device), random_llama(args.device)]
    counts = ((500, 200), (120, 50)) if args.device == "cpu" else ((20_000, 8_000), (4_000, 1_500))
    lines, began = [], time.perf_counter()
    for lm, (many, few) in zip(models, counts):
        rng = np.random.default_rng(0)
        for kind, make, last, count in (("coalitions", coalitions, True, many), ("mixed", mixed, False, few)):
            seqs = make(rng, min(lm.vocab, 2000), max(8, int(count * args.scale)))
            lines += compare(lm, kind, seqs, last, args.rounds, args.batch_tokens)
            print("\n".join(lines[-len(ROUTES) - 3 :]), flush=True)
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()} CPU, 1 thread"
    print(f"\n{where}, torch {torch.__version__}, {args.rounds} rounds, {time.perf_counter() - began:.0f} s in all\n")
    print("| model | sequences | way | µs per useful token | time / chosen | computed / useful tokens |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
