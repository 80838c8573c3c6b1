"""What keeping distributions costs beside computing them: a teacher of the shape of Qwen2.5-0.5B, on one thread of a CPU.

    python bench/logits_speed.py                     0.5 B parameters, 151,936 entries; about ten minutes
    python bench/logits_speed.py --device cuda       3 B parameters in bfloat16

The same rows, in turns, in this one process: the packed forward whose targets' logits are thrown away (`nothing kept`);
the extraction as `logits.run` does it, down to encoded rows; and the route of the earlier tool for the selection, in
float64 with a full sort, on the same logits. Time on a CPU is that of the one thread. Random weights, wide enough that
every token matters, and a head scaled so that targets have 0.5 to 4 nats of entropy. Memory is the peak of a process of
its own that extracts chats, or one row of 4,000 targets, at 262,144 entries, less what it held before with the model.
Prints a Markdown table; ends in 1 where a claim did not hold.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import torch
from claims import MISSED, claim, show
from transformers import AutoModelForCausalLM, Qwen2Config

from llm_analysis.core import digest
from llm_analysis.lm.model import LM, load
from llm_analysis.lm.packing import stream_logits
from llm_analysis.logits import v2
from llm_analysis.logits.extract import picks
from llm_analysis.logits.select import VarOpt
from llm_analysis.logits.texts import Text

SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads
    "cpu": (896, 4864, 24, 14, 2),
    "cuda": (2048, 11008, 36, 16, 2),
    "small": (64, 128, 2, 2, 2),
}


def teacher(shape: str, device: str, vocab: int) -> LM:
    "A model with random weights"
    hidden, forward, layers, heads, kv = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=forward, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    model.get_output_embeddings().weight.mul_(2.0)
    return LM(
        f"random {shape}",
        model,
        load("tiny", device="cpu").tokenizer,
        None,
        digest(repr(config)),
        torch.device(device),
        dtype,
    )


def text(rng: np.random.Generator, vocab: int, n: int, first: int) -> Text:
    "Random tokens, targets from `first` on"
    return Text(rng.integers(0, vocab, n), np.arange(max(first, 1), n))


def texts(rng: np.random.Generator, vocab: int, count: int) -> list[Text]:
    "Chats of 100 to 300 tokens, half of them targets"
    return [text(rng, vocab, n, n // 2) for n in rng.integers(100, 300, count)]


def clock(lm: LM) -> float:
    "Seconds of this thread, or on an accelerator of the wall"
    if lm.device.type == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def nothing(lm: LM, rows: list[Text]) -> int:
    "Logits of all targets, thrown away"
    return sum(len(z) for z, _ in stream_logits(lm, [t.ids for t in rows], [t.positions - 1 for t in rows]))


def kept(lm: LM, rows: list[Text]) -> int:
    "The extraction, down to encoded rows"
    about = v2.describe(lm.vocab)
    found = picks(lm, rows, range(len(rows)), VarOpt(worth=1.2e-5))
    return len([v2.encode(v2.Sample(i, t.ids, t.positions, p), about) for i, (t, p) in enumerate(zip(rows, found))])


def sorted_out(z: torch.Tensor) -> torch.Tensor:
    "The earlier route: softmax in float64, a full sort, a nucleus, and a Gumbel tail of 24"
    p = torch.softmax(z.double(), -1)
    down, ids = p.sort(-1, descending=True)
    outside = down.cumsum(-1) - down >= 0.98
    noise = -torch.log(-torch.log(torch.rand_like(p)))
    noisy = torch.where(outside, down.log() + noise, -torch.inf)
    return ids.gather(-1, noisy.topk(24).indices)


def selection(lm: LM, rows: list[Text]) -> tuple[float, float]:
    "Seconds a target: ours, and the earlier route's, on the same logits"
    z = next(stream_logits(lm, [t.ids for t in rows[:2]], [t.positions[:24] - 1 for t in rows[:2]]))[0].clone()
    u, came = np.full(len(z), 0.5), np.zeros(len(z), np.int64)
    ways, spent = (lambda: VarOpt(worth=1.2e-5).pick(z, u, came), lambda: sorted_out(z)), ([], [])
    for _ in range(4):
        for each, way in zip(spent, ways):
            began = clock(lm)
            way()
            each.append((clock(lm) - began) / len(z))
    return tuple(min(x[1:]) for x in spent)


def extra(vocab: int, long: int = 0) -> float:
    "Gigabytes that an extraction takes beside the model, at this vocabulary; of chats, or of one row with `long` targets"
    here = os.path.dirname(os.path.abspath(__file__))
    code = f"import sys; sys.path.insert(0, {here!r}); import logits_speed; logits_speed.peak({vocab}, {long})"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def memory(what: str) -> float:
    "VmRSS, what this process holds, or VmHWM, the most it held, gigabytes; getrusage would count who started it, too"
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1e6 for line in file if line.startswith(what))


def peak(vocab: int, long: int) -> None:
    "Print how far this process's peak memory rises over what it held with the model, gigabytes"
    torch.set_num_threads(1)
    lm, rng = teacher("small", "cpu", vocab), np.random.default_rng(1)
    rows = [text(rng, vocab, long + 50, 50)] if long else texts(rng, vocab, 40)
    before = memory("VmRSS")
    kept(lm, rows)
    print(memory("VmHWM") - before)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--rows", type=int, default=None)
    a = ask.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    lm = teacher(a.device, a.device, 151_936)
    rows = texts(np.random.default_rng(0), lm.vocab, a.rows or (6 if a.device == "cpu" else 400))
    tokens, targets = sum(len(t.ids) for t in rows), sum(len(t.positions) for t in rows)
    z = next(stream_logits(lm, [rows[0].ids], [rows[0].positions - 1]))[0].float().log_softmax(-1)
    nats = -(z.exp() * z).sum(-1)
    print(
        f"{tokens:,} tokens, {targets:,} targets; entropy {nats.min():.1f} to {nats.max():.1f} nats", file=sys.stderr
    )
    kept(lm, rows[:2])  # proof, trial and warm-up
    spent: dict[str, list[float]] = {}
    for _ in range(a.rounds):
        for name, way in (("nothing kept", nothing), ("extraction, v2", kept)):
            began = clock(lm)
            way(lm, rows)
            spent.setdefault(name, []).append(clock(lm) - began)
    share = statistics.median(b / e for b, e in zip(spent["nothing kept"], spent["extraction, v2"]))
    ours, theirs = selection(lm, rows)
    table = pd.DataFrame({"tokens/s": {k: tokens / statistics.median(v) for k, v in spent.items()}})
    table.index.name = "0.5 B on one thread" if a.device == "cpu" else "3 B in bfloat16"
    show(table, 4)
    claim_at = 0.75 if a.device == "cpu" else 0.9
    claim(f"Extraction runs at {share:.2f} of the plain forward's tokens/s (claim: {claim_at}).", share >= claim_at)
    claim(
        f"Selection takes {1e3 * ours:.2f} ms a target; in float64 with a full sort {theirs / ours:.0f} times as long (claim: 10).",
        theirs >= 10 * ours,
    )
    if a.device == "cpu":
        for what, long in (("chats", 0), ("a row of 4,000 targets", 4000)):
            more = extra(262_144, long)
            claim(f"At 262,144 entries, {what}: {more:.2f} GB beside the model (claim: 1.5).", more <= 1.5)
    return bool(MISSED)


if __name__ == "__main__":
    sys.exit(main())
