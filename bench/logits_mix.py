"""Logits like those of a large model, made up: 60 % peaked, 25 % medium and 15 % flat tokens over 151,936 entries.

Every entry has a frequency of its own, falling as a power of its number; every token prefers about 400 entries,
frequent ones rather than rare ones, which rise above the rest along a power of their rank. The benchmarks of `logits`
are measured on this mix.
"""

from collections.abc import Iterator

import numpy as np

V = 151_936
FAMILIES = {
    "peaked": (24.0, 6.0),
    "medium": (14.5, 1.7),
    "flat": (9.6, 0.75),
}  # height of the best, slope over log rank
SHARES = {"peaked": 0.60, "medium": 0.25, "flat": 0.15}


def base(rng: np.random.Generator) -> np.ndarray:
    "How frequent each entry is: a model's own, the same for all tokens"
    return -0.55 * np.log(np.arange(1, V + 1)) + rng.normal(0, 0.8, V)


def one(rng: np.random.Generator, family: str, base: np.ndarray) -> np.ndarray:  # float32
    "The logits of a token"
    height, slope = FAMILIES[family]
    logits = base + rng.normal(0, 1.6, V)
    liked = rng.permutation(np.unique(np.exp(rng.uniform(0, np.log(V), 400)).astype(int) - 1))
    rank = np.arange(1, len(liked) + 1)
    rises = height + rng.normal() - slope * np.log(rank) + rng.normal(0, 0.5, len(liked))
    logits[liked] = np.maximum(logits[liked], rises)
    return (logits + 2).astype(np.float32)


def mixed(seed: int, tokens: int) -> Iterator[tuple[str, np.ndarray]]:
    "So many tokens of the mix in random order: the family and the logits of each"
    rng = np.random.default_rng(seed)
    ends = np.round(np.cumsum([*SHARES.values()]) * tokens).astype(int)
    names = np.repeat(list(SHARES), np.diff(ends, prepend=0))
    own = base(rng)
    for family in rng.permutation(names):
        yield family, one(rng, family, own)


def as_bf16(logits: np.ndarray) -> np.ndarray:
    "Rounded as a head in bfloat16 rounds"
    bits = logits.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
