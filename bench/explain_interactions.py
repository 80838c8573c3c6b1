"""How far estimated interactions of pairs of players are from the known ones, on equal numbers of evaluations; and whether the errors are honest.

usage: python bench/explain_interactions.py [PART ...] [--tables FILE.npz] [--seeds N] [--peers FILE.csv ...] [--save FILE.csv]
       python bench/explain_interactions.py shapiq --tables FILE.npz --save FILE.csv [--seeds N] [--only NAME ...]

PARTS (both without one): tiny large; or tell, to show the tables of --peers again
shapiq    the estimators of shapiq on the same games, in the environment that `explain_peers.py` describes
--tables  worths of the tiny model's texts as `bench/explain_games.py` writes them; computed first (minutes) without it
--seeds   draws of each game (5)
--peers   what others reached: columns estimator, game, n, evaluations, seed, error (relative squared error of all pairs)

The error is the sum of squares over all pairs of players, over that of the truth; 1 is what an estimate of 0 for every pair
would get. Claims: `together` at 512 evaluations of the tiny games has no larger median error than the best estimator of
shapiq; intervals of 1.96 standard errors hold in 90 to 98 cases of a hundred. The exit status is 1 where one did not hold."""

import argparse
import sys
import time
import warnings

import numpy as np
import pandas as pd
from claims import MISSED, claim, show
from explain_games import Known, of_table, scattered, tiny_tables, unanimity

TINY = (128, 256, 512, 1024)  # evaluations of each text of the tiny model
LARGE = (512, 1024, 2048)  # of games of 50 players
SLOW = ("shapiq ProxySPEX",)  # one seed, tiny games only


def missed(values: np.ndarray, game: Known) -> float:
    "Squared error of all pairs over the square of the truth"
    return float(((values - game.together) ** 2).sum() / (game.together**2).sum())


def row_of(name: str, game: Known, evaluations: int, seed: int, values: np.ndarray, **more) -> dict:
    row = dict(estimator=name, game=game.name, n=game.n, evaluations=evaluations, seed=seed)
    return row | dict(error=missed(values, game)) | more


def fitted(pairs) -> np.ndarray:
    "Weighted regression of even parts on products of two signs, nobody and everybody as one more equation"
    from llm_analysis.explain.regression import pair_weights

    n = pairs.coal.shape[1]
    s, at, weight = 2.0 * pairs.coal - 1, np.triu_indices(n, 1), pair_weights(pairs)[0]
    x = np.column_stack([np.ones(len(s)), s[:, at[0]] * s[:, at[1]]])
    x, root = np.vstack([x, np.ones(x.shape[1])]), np.sqrt(np.append(weight, 100 * weight.max()))
    y = np.append(pairs.even[:, 0], (pairs.full + pairs.base) / 2)
    found = np.zeros((n, n))
    found[at] = 4 * np.linalg.lstsq(x * root[:, None], y * root, rcond=None)[0][1:]
    return found + found.T


def ours(game: Known, evaluations: int, seed: int) -> list[dict]:
    "The process, and the regression where the pairs determine it"
    from llm_analysis.explain.auto import Paired
    from llm_analysis.explain.coalitions import pairs_of
    from llm_analysis.explain.shapley import draws
    from llm_analysis.explain.together import together

    coal = Paired((evaluations - 2) // 2).coalitions(game.n, draws(seed, game.name))
    pairs = pairs_of(coal, game.worth(coal))
    began, at = time.process_time(), np.triu_indices(game.n, 1)
    found = together(pairs)
    spent, values, errors = time.process_time() - began, found.values[..., 0], found.errors[..., 0]
    held = float((np.abs(values - game.together)[at] <= 1.96 * errors[at]).mean())
    rows = [row_of("together", game, evaluations, seed, values, held=held, seconds=spent)]
    if len(pairs.coal) >= len(at[0]) + 1:
        rows.append(row_of("pair regression", game, evaluations, seed, fitted(pairs)))
    return rows


def peers() -> dict:
    "Name -> (players, seed) -> an approximator of shapiq"
    from shapiq import approximator as a

    kind = dict(max_order=2, index="SII")
    return {
        "shapiq KernelSHAPIQ": lambda n, seed: a.KernelSHAPIQ(n, **kind, random_state=seed),
        "shapiq KernelSHAPIQ, paired": lambda n, seed: a.KernelSHAPIQ(
            n, **kind, pairing_trick=True, random_state=seed
        ),
        "shapiq inconsistent KernelSHAPIQ, paired": lambda n, seed: a.InconsistentKernelSHAPIQ(
            n, **kind, pairing_trick=True, random_state=seed
        ),
        "shapiq SHAPIQ, paired": lambda n, seed: a.SHAPIQ(n, **kind, pairing_trick=True, random_state=seed),
        "shapiq SVARMIQ, paired": lambda n, seed: a.SVARMIQ(n, **kind, pairing_trick=True, random_state=seed),
        "shapiq permutations": lambda n, seed: a.PermutationSamplingSII(n, **kind, random_state=seed),
        "shapiq ProxySHAP": lambda n, seed: a.ProxySHAP(n, **kind, random_state=seed),
        "shapiq ProxySHAP, adjusted": lambda n, seed: a.ProxySHAP(n, **kind, adjustment=True, random_state=seed),
        "shapiq ProxySPEX": lambda n, seed: a.ProxySPEX(n=n, **kind, hpo=False, random_state=seed),
    }


def theirs(game: Known, name: str, make, evaluations: int, seed: int) -> list[dict]:
    "One estimate by shapiq; nothing where it says that it cannot"
    from explain_peers import approximated

    try:
        found, spent = approximated(name, make(game.n, seed), game, evaluations)
    except (ValueError, np.linalg.LinAlgError) as e:
        print(f"{name}, {game.name}, {evaluations}: {e}", file=sys.stderr)
        return []
    values = np.zeros((game.n, game.n))
    for i, j in zip(*np.triu_indices(game.n, 1)):
        values[i, j] = values[j, i] = found[(int(i), int(j))]
    return [row_of(name, game, evaluations, seed, values, **spent)]


def games(tables: str | None, parts: list[str], seeds: int):
    "Every game with every number of evaluations and every seed"
    if "tiny" in parts:
        for key, table in (dict(np.load(tables)) if tables else tiny_tables()).items():
            game = of_table(key, table)
            yield from ((game, e, s) for e in TINY if e < 2 ** (game.n - 1) for s in range(seeds))
    if "large" in parts:
        for make in (unanimity, scattered):
            yield from ((make(50, s), e, s) for e in LARGE for s in range(seeds))


def tell(t: pd.DataFrame) -> None:
    small = t[t.n < 50]
    if len(small):
        print("Median relative squared error of all pairs, eleven texts of the tiny model:\n")
        show(small.groupby(["estimator", "evaluations"]).error.median().unstack(), 3)
        at = small[small.evaluations == 512].groupby("estimator").error.median()
        rivals = at[[name for name in at.index if name.startswith("shapiq")]]
        if len(rivals):
            ratio = at["together"] / rivals.min()
            said = f"At 512 `together` errs {ratio:.2f} times as much as the best of them, {rivals.idxmin()} (claim: 1).\n"
            claim(said, ratio <= 1)
    for name, part in t[t.n == 50].groupby("game"):
        part = part[part.seed <= part.groupby("estimator").seed.max().min()]  # games that all of them were given
        print(f"{name}: median relative squared error of all pairs, {part.seed.nunique()} games\n")
        show(part.groupby(["estimator", "evaluations"]).error.median().unstack(), 3)
    own = t[t.estimator == "together"]
    print("Intervals of 1.96 standard errors that hold, and seconds for one estimate (median):\n")
    groups = own.assign(games=np.where(own.n < 50, "tiny", own.game)).groupby(["games", "evaluations"])
    table = pd.DataFrame(dict(held=groups.held.mean(), runs=groups.size(), seconds=groups.seconds.median()))
    table.index = [f"{game}, {e}" for game, e in table.index]
    show(table.rename_axis("games, evaluations"), 3)
    held = own.held.mean()
    claim(f"All {len(own)} runs: {held:.3f} (claim: 0.90 to 0.98).\n", 0.90 <= held <= 0.98)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("part", nargs="*", help="tiny large; shapiq; tell")
    ask.add_argument("--tables", help="worths of the tiny model's texts")
    ask.add_argument("--seeds", type=int, default=5)
    ask.add_argument("--only", nargs="*", default=[])
    ask.add_argument("--peers", nargs="*", default=[])
    ask.add_argument("--save")
    a = ask.parse_args()
    parts, rows = [p for p in a.part if p != "shapiq"] or ["tiny", "large"], []
    if "shapiq" in a.part:
        warnings.filterwarnings("ignore", category=UserWarning)
        every = {name: make for name, make in peers().items() if not a.only or name in a.only}
        for game, evaluations, seed in games(a.tables, parts, a.seeds):
            for name, make in every.items():
                if not (name in SLOW and (seed or game.n == 50)):
                    rows += theirs(game, name, make, evaluations, seed)
            print(f"{time.process_time():7.0f} s  {game.name}, {evaluations}", file=sys.stderr, flush=True)
            pd.DataFrame(rows).to_csv(a.save, index=False)
    else:
        for game, evaluations, seed in games(a.tables, parts, a.seeds):
            rows += ours(game, evaluations, seed)
        tell(pd.concat([pd.DataFrame(rows), *(pd.read_csv(p) for p in a.peers)]))
    if a.save and rows:
        pd.DataFrame(rows).to_csv(a.save, index=False)
    return 1 if MISSED else 0


if __name__ == "__main__":
    sys.exit(main())
