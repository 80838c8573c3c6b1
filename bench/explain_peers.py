"""What the estimators of shapiq reach on the games of `explain_games.py`, at the budgets and seeds of `explain_accuracy.py`.

It wants Python 3.12, which the newest shapiq asks for, and an environment of its own; of this project only
`explain_games.py` is used:

    python3.12 -m venv peers && peers/bin/pip install "shapiq>=1.6" numpy pandas scipy scikit-learn xgboost lightgbm
    python bench/explain_games.py tables.npz                                  # in the project's own environment
    peers/bin/python bench/explain_peers.py --tables tables.npz --save peers.csv
    python bench/explain_accuracy.py --tables tables.npz --peers peers.csv    # in the project's own environment

usage: python bench/explain_peers.py [PART ...] --save FILE.csv [--tables FILE.npz] [--seeds N] [--only NAME ...]

PARTS (all of them without one): tiny large other
--tables  worths of the tiny model's texts as `bench/explain_games.py` writes them (needed by `tiny`)
--seeds   draws of each tiny game (10)
--only    these estimators

An evaluation is one different coalition, nobody and everybody included; asking again costs nothing here, and an estimator
that looks at more coalitions than its budget is an error. Every estimator gets the same budget and keeps its own defaults,
but for what its name says. Above 100 players, those that take long get fewer seeds (`SEEDS`)."""

import argparse
import sys
import time
import warnings

import numpy as np
import pandas as pd
import shapiq
from explain_games import FAMILIES, LARGE, OTHER, TINY, Known, of_table, relative, unanimity
from lightgbm import LGBMRegressor
from shapiq import approximator as peers

PEERS = {  # name -> (players, seed) -> an approximator
    "shapiq Permutation": lambda n, seed: peers.PermutationSamplingSV(n, random_state=seed),
    "shapiq KernelSHAP": lambda n, seed: peers.KernelSHAP(n, random_state=seed),
    "shapiq KernelSHAP, paired": lambda n, seed: peers.KernelSHAP(n, pairing_trick=True, random_state=seed),
    "shapiq LeverageSHAP": lambda n, seed: peers.LeverageSHAP(n, random_state=seed),
    "shapiq PolySHAP, order 2": lambda n, seed: peers.PolySHAP(n, max_order=2, pairing_trick=True, random_state=seed),
    "shapiq OddSHAP": lambda n, seed: peers.OddSHAP(n, random_state=seed),
    "shapiq RegressionMSR": lambda n, seed: peers.RegressionMSR(n, "SV", random_state=seed),
    "shapiq RegressionMSR, five folds": lambda n, seed: peers.RegressionMSR(n, "SV", k_folds=5, random_state=seed),
    "shapiq RegressionMSR, LightGBM": lambda n, seed: peers.RegressionMSR(
        n, "SV", proxy_model=LGBMRegressor(random_state=seed, n_jobs=1, verbosity=-1), random_state=seed
    ),
    "shapiq ProxySHAP, adjusted": lambda n, seed: peers.ProxySHAP(
        n, max_order=1, index="SV", adjustment=True, random_state=seed
    ),
}
SLOW = ("shapiq OddSHAP", "shapiq RegressionMSR", "shapiq ProxySHAP", "shapiq PolySHAP")
SEEDS = 3  # of those, above 100 players


class Counted:
    "A game that knows how many different coalitions were looked at"

    def __init__(self, game: Known):
        self.game, self.seen = game, set()

    def __call__(self, coal: np.ndarray) -> np.ndarray:
        coal = np.atleast_2d(np.asarray(coal)).astype(bool)
        self.seen.update(row.tobytes() for row in np.packbits(coal, axis=1))
        return self.game.worth(coal)


def approximated(name: str, peer, game: Known, evaluations: int) -> tuple:  # what it found; what that took
    "One estimate; an error that says so where it looked at too much"
    counted, began = Counted(game), time.process_time()
    found = peer.approximate(evaluations, counted)
    used = len(counted.seen)
    if used > evaluations:
        raise SystemExit(f"{name} looked at {used} coalitions of {game.name}; its budget was {evaluations}.")
    return found, dict(used=used, seconds=time.process_time() - began)


def trial(game: Known, name: str, evaluations: int, seed: int) -> dict:
    "One estimate: its error, and what it took"
    found, spent = approximated(name, PEERS[name](game.n, seed), game, evaluations)
    values = np.array([found[(i,)] for i in range(game.n)])
    row = dict(estimator=name, game=game.name, n=game.n, evaluations=evaluations, seed=seed)
    return row | dict(error=relative(values, game)) | spent


def able(name: str, n: int, evaluations: int) -> bool:
    "Whether the estimator can do anything with so few evaluations of so many players"
    if "Permutation" in name:
        return evaluations >= n + 1
    if "PolySHAP" in name:
        return evaluations >= n * (n + 1) / 2 + 2
    return evaluations >= n + 2


def tiny(tables: str, seeds: int, names: list[str]) -> list[dict]:
    "Every estimator on the texts of the tiny model"
    rows = []
    for key, table in np.load(tables).items():
        game = of_table(key, table)
        for evaluations in TINY:
            if evaluations < 2**game.n and 2 ** (game.n - 1) - 1 > evaluations // 2:
                for name in (x for x in names if able(x, game.n, evaluations)):
                    rows += [trial(game, name, evaluations, seed) for seed in range(seeds)]
        print(f"{time.process_time():7.0f} s  {game.name}", file=sys.stderr, flush=True)
    return rows


def spread_of(make, sizes: dict, names: list[str]) -> list[dict]:
    "Every estimator on games made for many seeds: n -> {evaluations a player: seeds}"
    rows = []
    for n, budgets in sizes.items():
        for each, seeds in budgets.items():
            for seed in range(seeds):
                game = make(n, seed)
                for name in (x for x in names if able(x, n, each * n)):
                    if n < 100 or seed < SEEDS or not name.startswith(SLOW):
                        rows.append(trial(game, name, each * n, seed))
            print(f"{time.process_time():7.0f} s  {game.name}, {each} a player", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("part", nargs="*", help="tiny large other; all without one")
    ask.add_argument("--tables", help="worths of the tiny model's texts")
    ask.add_argument("--seeds", type=int, default=10)
    ask.add_argument("--only", nargs="*", default=[])
    ask.add_argument("--save", required=True)
    a = ask.parse_args()
    parts, names, rows = a.part or ["tiny", "large", "other"], a.only or list(PEERS), []
    if "tiny" in parts and not a.tables:
        ask.error("`tiny` needs --tables FILE.npz: write it with bench/explain_games.py in the project's environment")
    warnings.filterwarnings("ignore", category=UserWarning)  # of budgets that enumerate the outermost sizes
    if "tiny" in parts:
        rows += tiny(a.tables, a.seeds, names)
    if "large" in parts:
        rows += spread_of(unanimity, LARGE, names)
    if "other" in parts:
        for make in FAMILIES:
            rows += spread_of(make, OTHER, names)
    pd.DataFrame(rows).to_csv(a.save, index=False)
    print(f"shapiq {shapiq.__version__}: {len(rows):,} estimates in {time.process_time():.0f} s, written to {a.save}")


if __name__ == "__main__":
    sys.exit(main())
