"""Games whose Shapley values are known, for every estimator that wants to be measured; numpy is enough to play them.

usage: python bench/explain_games.py FILE.npz        the tables of eleven texts of the tiny model (some minutes)"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np

TINY = (64, 128, 256, 512, 1024)  # evaluations of each text of the tiny model
# players: {evaluations a player: games}
LARGE = {50: {2: 10, 4: 10, 10: 10}, 128: {2: 10, 4: 5, 10: 10}, 512: {2: 10, 10: 5}}
OTHER = {50: {2: 10, 10: 5}, 128: {2: 10}}


@dataclass(frozen=True)
class Known:
    "A game, its players and its Shapley values"

    name: str
    n: int
    worth: Callable[[np.ndarray], np.ndarray]  # [coalition, player] booleans -> worths
    truth: np.ndarray
    together: np.ndarray | None = None  # Shapley interaction index of each pair of players, where it is known


def relative(values: np.ndarray, game: Known) -> float:
    "Squared error over the square of the truth"
    return float(((values - game.truth) ** 2).sum() / (game.truth**2).sum())


def shapley_of_table(table: np.ndarray) -> np.ndarray:
    "By the definition, from 2^n worths in binary order, player 0 first"
    n = len(table).bit_length() - 1
    cube, rows = table.reshape((2,) * n), np.arange(2**n)
    size = sum((rows >> i) & 1 for i in range(n)).reshape((2,) * n)
    weight = np.array([1 / (n * comb(n - 1, k)) for k in range(n)])
    return np.array([(np.diff(cube, axis=i) * weight[size.take([0], axis=i)]).sum() for i in range(n)])


def interactions_of_table(table: np.ndarray) -> np.ndarray:
    "By the definition, too, as four slices of the table for each pair of players"
    n = len(table).bit_length() - 1
    size = np.array([bin(r).count("1") for r in range(2 ** (n - 2))])
    weight = np.array([1 / ((n - 1) * comb(n - 2, k)) for k in range(n - 1)])[size]
    found, cube = np.zeros((n, n)), table.reshape((2,) * n)
    for i in range(n):
        for j in range(i + 1, n):
            (a, b), (c, d) = np.moveaxis(cube, (i, j), (0, 1)).reshape(2, 2, -1)
            found[i, j] = found[j, i] = weight @ (a - b - c + d)
    return found


def of_table(name: str, table: np.ndarray) -> Known:
    "A game that is looked up"
    n = len(table).bit_length() - 1
    place = 1 << np.arange(n - 1, -1, -1)
    return Known(name, n, lambda coal: table[coal @ place], shapley_of_table(table), interactions_of_table(table))


def tiny_tables() -> dict[str, np.ndarray]:
    "Six reviews of 13 or 14 words and five questions of 11 to 14, all coalitions evaluated by the tiny model"
    import torch

    from llm_analysis.data import open_rows
    from llm_analysis.explain.attribution import Game
    from llm_analysis.explain.evaluator import Packed
    from llm_analysis.explain.players import find_players
    from llm_analysis.explain.shapley import all_coalitions
    from llm_analysis.explain.values import AnswerLogprob, LabelMargin
    from llm_analysis.lm.model import load

    torch.set_num_threads(1)
    lm, found = load("tiny", device="cpu"), {}
    for kind, many in (("reviews", 6), ("facts", 5)):
        rows = open_rows(f"tiny/{kind}")
        value = LabelMargin(tuple(rows.labels)) if rows.labels else AnswerLogprob(4)
        for row in rows.dataset:
            for unit in ("words",) if kind == "reviews" else ("words", "tokens"):
                players = find_players(lm.tokenizer, row[rows.text_column], prompt=rows.prompt, unit=unit)
                if len(players) in {("reviews", "words"): (13, 14), ("facts", "words"): (12, 13, 14)}.get(
                    (kind, unit), (11, 12, 13, 14)
                ):
                    game = Game(lm, players, value, Packed(lm))
                    found[f"{kind}-{sum(k.startswith(kind) for k in found)}"] = game(all_coalitions(len(players)))
                    break
            if sum(k.startswith(kind) for k in found) == many:
                break
    return found


def _groups(name: str, n: int, groups: list, prizes: np.ndarray) -> Known:
    "A sum of prizes, each paid if a whole group is there and shared equally by it"
    truth, together = np.zeros(n), np.zeros((n, n))
    for group, prize in zip(groups, prizes):
        truth[group] += prize / len(group)
        if len(group) > 1:
            together[np.ix_(group, group)] += prize / (len(group) - 1)
    np.fill_diagonal(together, 0.0)

    def worth(coal):
        total = np.zeros(len(coal))
        for group, prize in zip(groups, prizes):
            total += prize * coal[:, group].all(1)
        return total

    return Known(name, n, worth, truth, together)


def unanimity(n: int, seed: int) -> Known:
    "3n prizes for 2 to 5 players among 8 neighbours, with heavy tails (Student's t, 2 degrees of freedom)"
    rng = np.random.default_rng([n, seed])
    prizes, groups = rng.standard_t(2, size=3 * n), []
    for _ in range(3 * n):
        order, start = rng.integers(2, 6), rng.integers(0, n - 7)
        groups.append(np.sort(start + rng.choice(8, order, replace=False)))
    return _groups(f"unanimity-{n}", n, groups, prizes)


def scattered(n: int, seed: int) -> Known:
    "3n prizes for 1 to 5 players from anywhere, without heavy tails"
    rng = np.random.default_rng([4, n, seed])
    groups = [rng.choice(n, rng.integers(1, 6), replace=False) for _ in range(3 * n)]
    return _groups(f"scattered-{n}", n, groups, rng.normal(size=3 * n))


def average(n: int, seed: int) -> Known:
    "The mean weight of those who are there (what mean pooling does)"
    w = np.random.default_rng([1, n, seed]).standard_t(3, size=n)
    harmonic = (1 / np.arange(1, n + 1)).sum()
    truth = w * harmonic / n - (harmonic - 1) / n * (w.sum() - w) / (n - 1)
    return Known(f"average-{n}", n, lambda coal: (coal @ w) / np.maximum(coal.sum(1), 1), truth)


def largest(n: int, seed: int) -> Known:
    "The largest weight of those who are there (an airport game)"
    w = np.random.default_rng([2, n, seed]).gamma(1.0, size=n)
    truth, paid, before = np.zeros(n), 0.0, 0.0
    for rank, i in enumerate(np.argsort(w)):
        paid, before = paid + (w[i] - before) / (n - rank), w[i]
        truth[i] = paid
    return Known(f"largest-{n}", n, lambda coal: np.where(coal, w, 0).max(1), truth)


def gloves(n: int, seed: int) -> Known:
    "Left and right gloves, a third of them left; a pair is worth 1"
    left = np.random.default_rng([3, n, seed]).permutation(n) < n // 3
    a, b, value = n // 3, n - n // 3, np.zeros(2)
    for i in range(a + 1):
        for j in range(b + 1):
            if i < a and j > i:
                value[0] += comb(a - 1, i) * comb(b, j) / comb(n - 1, i + j) / n
            if j < b and i > j:
                value[1] += comb(a, i) * comb(b - 1, j) / comb(n - 1, i + j) / n
    worth = lambda coal: np.minimum(coal[:, left].sum(1), coal[:, ~left].sum(1)).astype(float)
    return Known(f"gloves-{n}", n, worth, np.where(left, *value))


FAMILIES = (scattered, average, largest, gloves)  # beside sums of prizes among neighbours


if __name__ == "__main__" and len(sys.argv) > 1:
    np.savez(sys.argv[1], **tiny_tables())
