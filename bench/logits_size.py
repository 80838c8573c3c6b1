"""Bytes that a token of a teacher's distributions takes on disk, on the mix of `logits_mix.py`.

    python bench/logits_size.py                  4,096 tokens in texts of 128, float32 logits; about three minutes
    python bench/logits_size.py --tokens 12288

v1: the smallest nucleus of 98 %, at most 100 entries, and 24 entries by Gumbel lots. The first line is the file that
`logits.v1` writes; the next are the same rows without the threshold, with Parquet's own choice of encodings, and from a
head in bfloat16. A prediction by arithmetic stands beside each. Prints a Markdown table; ends in 1
where v1 takes more than 250 bytes.
"""

import argparse
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from logits_mix import V, as_bf16, mixed

from llm_analysis.jobs.footer import options
from llm_analysis.logits.nucleus import Nucleus
from llm_analysis.logits.picked import Picked
from llm_analysis.logits.quantise import LEVELS, kl_bound
from llm_analysis.logits.select import uniforms
from llm_analysis.logits.v1 import decode, describe, encode, table

TEXT, MOST, MASS, TAIL, CLAIM = 128, 100, 0.98, 24, 250


def texts(seed: int, tokens: int, head) -> list[Picked]:
    "Picks of so many tokens, some texts of `TEXT` each"
    selector, found, waiting = Nucleus(MASS, MOST, TAIL), [], []
    for _, logits in mixed(seed, tokens):
        waiting.append(head(logits))
        if len(waiting) == TEXT:
            lots = uniforms(seed, len(found), range(TEXT))
            found.append(selector.pick(torch.from_numpy(np.stack(waiting)), lots))
            waiting = []
    return found


def nbytes(rows: list[dict], about: dict, own: bool) -> tuple[int, dict]:
    "Size of a file, and the bytes of its columns"
    data, sink = table(rows, about), pa.BufferOutputStream()
    pq.write_table(data, sink, **({} if own else options(data.schema)))
    group = pq.ParquetFile(pa.BufferReader(sink.getvalue())).metadata.row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    return sink.getvalue().size, {c.path_in_schema.split(".")[0]: c.total_compressed_size for c in chunks}


def divergence(row: dict, picks: Picked, about: dict) -> tuple[np.ndarray, np.ndarray]:
    "KL of the nucleus as it is read from the nucleus as it was, and its bound, token by token"
    back, found = decode(row, about), []
    for a, n in zip(picks.starts, picks.exact):
        x, y = (p.logp[a : a + n].astype(np.float64) for p in (picks, back))
        x, y = x - np.log(np.exp(x).sum()), y - np.log(np.exp(y).sum())
        found.append((np.exp(x) * (x - y)).sum())
    return np.array(found), kl_bound((np.float64(row["top_max"]) - row["top_min"]) / LEVELS)


def line(name: str, picks: list[Picked], threshold: bool = True, own: bool = False) -> tuple[dict, float]:
    "One row of the table, printed; bytes a token of each column, and of all"
    about = describe(V, MOST, threshold=threshold)
    began = time.process_time()
    rows = [encode(i, p, about) for i, p in enumerate(picks)]
    took, tokens = time.process_time() - began, sum(map(len, picks))
    began = time.process_time()
    for row in rows:
        decode(row, about)
    back = time.process_time() - began
    size, columns = nbytes(rows, about, own)
    kl, bound = (np.concatenate(x) for x in zip(*(divergence(r, p, about) for r, p in zip(rows, picks))))
    entries = sum(len(p.ids) for p in picks) / tokens
    arithmetic = entries * (16 + 2 + 16) / 8 + 25 + 4 * threshold
    cells = [
        size / tokens,
        arithmetic,
        size / tokens / arithmetic,
        kl.mean(),
        bound.mean(),
        tokens / took,
        tokens / back,
    ]
    print(f"| {name} | " + " | ".join(f"{c:,.0f}" if c > 9 else f"{c:.2g}" for c in cells) + " |", flush=True)
    return {k: v / tokens for k, v in columns.items()}, size / tokens


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--tokens", type=int, default=4096)
    ask.add_argument("--seed", type=int, default=0)
    args = ask.parse_args()
    picks = texts(args.seed, args.tokens, lambda x: x)
    n = np.concatenate([p.exact for p in picks])
    print(
        f"{len(n):,} tokens; nucleus of {n.mean():.1f} entries on average, {(n == 1).mean():.0%} of one, {(n == MOST).mean():.0%} cut at {MOST}\n"
    )
    print(
        "| format | bytes/token | by arithmetic | ratio | KL of the values | its bound | tokens/s to | tokens/s from |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    columns, size = line("v1", picks)
    line("v1 without threshold", picks, threshold=False)
    line("v1, Parquet's own choice", picks, own=True)
    line("v1, head in bfloat16", texts(args.seed, args.tokens, as_bf16))
    print("\n| column of v1 | bytes/token |\n| --- | --- |")
    for k, v in columns.items():
        print(f"| {k} | {v:.1f} |")

    if size > CLAIM:
        raise SystemExit(f"missed: v1 takes {size:.0f} bytes a token, more than {CLAIM}")


if __name__ == "__main__":
    main()
