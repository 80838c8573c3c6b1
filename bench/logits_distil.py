"""A student of the tiny model, trained from what is stored of it: how near it comes, at equal bytes.

    python bench/logits_distil.py                          three paired seeds; about fifteen minutes on one thread
    python bench/logits_distil.py --worth 1e-3 --top 8     the same with more bytes
    python bench/logits_distil.py --first 2 --seeds 1      the third seed alone

The teacher's distributions over the tokens of the tiny reviews are kept in the format v2 in two ways that take the same
space: an unbiased estimate (`VarOpt`), and the largest entries, which the student reads scaled to one, as most trainers
do. The rows are the same, and of one seed so are the student's first weights and its batches. Beside them a student of
the teacher's whole distributions and one of the tokens alone, without a teacher: between the best that the one gets and
the end of the other lies the gap, in divergence on reviews that nobody saw. Prints the curves as Markdown tables; ends
in 1 where the estimate closes less than twice as much of the gap as the largest entries, or leaves more than half of
what they leave."""

import argparse
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from claims import MISSED, claim, show
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_analysis.jobs.footer import options
from llm_analysis.lm.model import LM, load
from llm_analysis.logits import v2
from llm_analysis.logits.distil import DistillationDataCollator
from llm_analysis.logits.extract import picks
from llm_analysis.logits.loss import sparse_kd_loss
from llm_analysis.logits.select import TopK, VarOpt
from llm_analysis.logits.texts import Reading, Text, read
from llm_analysis.tiny.world import dataset

ROWS, HELD, BATCH, EVERY, EPOCHS = 8000, 200, 32, 150, 3


def texts(lm: LM, split: str, most: int) -> list[Text]:
    "Reviews as tokens, every one a target"
    rows = dataset("reviews", split=split)
    rows = rows.select(range(min(most, len(rows))))
    found = [read(row, lm.tokenizer, None, Reading(text_column="text")) for row in rows]
    return [t for t in found if t.reason is None]


def stored(lm: LM, own: list[Text], selector) -> tuple[list[v2.Sample], float]:
    "What a store gives back, and its bytes a target"
    about = v2.describe(lm.vocab)
    found = picks(lm, own, range(len(own)), selector)
    rows = [v2.encode(v2.Sample(i, t.ids, t.positions, p), about) for i, (t, p) in enumerate(zip(own, found))]
    table, sink = v2.table(rows, about), pa.BufferOutputStream()
    pq.write_table(table, sink, **options(table.schema))
    return [v2.decode(row, about) for row in rows], sink.getvalue().size / sum(len(t.positions) for t in own)


def student(lm: LM, seed: int):
    "A fresh model of 400,000 parameters"
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=lm.vocab, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def dense(lm: LM, batch: dict) -> torch.Tensor:  # [target, vocab]
    "The teacher's whole distributions"
    with torch.no_grad():
        z = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return z[batch["shift_labels"] != -100].log_softmax(-1)


def divergence(lm: LM, model, batches: list[dict]) -> float:
    "KL from the teacher on texts that nobody saw, nats a token"
    total, count = 0.0, 0
    for batch in batches:
        p = dense(lm, batch)
        with torch.no_grad():
            q = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        q = q[batch["shift_labels"] != -100].log_softmax(-1)
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


def train(lm: LM, rows: list[v2.Sample], way: str, seed: int, held: list[dict]) -> list[float]:
    "Divergence on the held-out texts along some passes over the rows"
    model, collate = student(lm, seed), DistillationDataCollator(lm.vocab)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(rows)) for _ in range(EPOCHS)]
    batches = [order[i : i + BATCH] for order in orders for i in range(0, len(order), BATCH)]
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=len(batches))
    curve = []
    for step, which in enumerate(batches):
        batch = collate([rows[i] for i in which])
        z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        z, came = z[batch["shift_labels"] != -100], batch["shift_labels"][batch["shift_labels"] != -100]
        if way == "whole":
            p = dense(lm, batch)
            loss = (p.exp() * (p - z.log_softmax(-1))).sum(-1).mean()
        elif way == "tokens":
            loss = torch.nn.functional.cross_entropy(z, came)
        else:
            loss = sparse_kd_loss(z, batch["targets"], tail="sampled" if way == "varopt" else "none", reduction="mean")
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        plan.step()
        if (step + 1) % EVERY == 0 or step + 1 == len(batches):
            curve.append(divergence(lm, model, held))
    return curve


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--first", type=int, default=0)
    ask.add_argument("--worth", type=float, default=0.082)
    ask.add_argument("--top", type=int, default=2)
    ask.add_argument("--rows", type=int, default=ROWS)
    a = ask.parse_args()
    torch.set_num_threads(1)
    lm = load("tiny", device="cpu")
    own, other = texts(lm, "train", a.rows), texts(lm, "validation", HELD)
    kept = {"varopt": stored(lm, own, VarOpt(worth=a.worth)), "top": stored(lm, own, TopK(a.top))}
    print(f"{len(own):,} reviews, {sum(len(t.positions) for t in own):,} targets")
    for name, (_, size) in kept.items():
        print(f"{name}: {size:.1f} bytes a target")
    collate, samples = DistillationDataCollator(lm.vocab), stored(lm, other, TopK(1))[0]
    held = [collate(samples[i : i + BATCH]) for i in range(0, len(samples), BATCH)]
    ends, curves = [], {}
    seeds = range(a.first, a.first + a.seeds)
    for seed in seeds:
        for way in ("whole", "tokens", "varopt", "top"):
            rows = kept.get(way, kept["varopt"])[0]
            curves.setdefault(way, []).append(train(lm, rows, way, seed, held))
            print(seed, way, [round(x, 3) for x in curves[way][-1]], file=sys.stderr, flush=True)
        end = {way: c[-1][-1] for way, c in curves.items()}
        gap = min(curves["tokens"][-1]) - end["whole"]
        left = [end[k] - end["whole"] for k in ("varopt", "top")]
        ends.append([*end.values(), *left, *(1 - x / gap for x in left)])
    steps = [min((i + 1) * EVERY, EPOCHS * -(-len(own) // BATCH)) for i in range(len(curves["whole"][0]))]
    table = pd.DataFrame({k: np.mean(v, axis=0) for k, v in curves.items()}, steps)
    table.index.name = "KL after steps"
    show(table, 3)
    names = [*end, "left by varopt", "left by top", "closed by varopt", "closed by top"]
    table = pd.DataFrame(ends, seeds, names)
    table.index.name = "seed"
    show(table, 3)
    sizes = [size for _, size in kept.values()]
    claim(f"The bytes are equal: {sizes[0]:.1f} and {sizes[1]:.1f}.", sizes[0] <= 1.02 * sizes[1])
    ours, theirs = table["left by varopt"], table["left by top"]
    said = (
        f"The estimate leaves {ours.mean():.3f} nats, the largest entries {theirs.mean():.3f} (claim: at most half)."
    )
    claim(said, bool((ours <= theirs / 2).all()))
    ours, theirs = table["closed by varopt"], table["closed by top"]
    said = f"Of the gap the estimate closes {ours.mean():.1%}, the largest entries {theirs.mean():.1%} (claim: twice)."
    claim(said, bool((ours >= 2 * theirs).all()))
    return bool(MISSED)


if __name__ == "__main__":
    sys.exit(main())
