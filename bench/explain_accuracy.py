"""How far estimated Shapley values are from the known ones, on equal numbers of evaluations; and whether the errors are honest.

usage: python bench/explain_accuracy.py [PART ...] [--tables FILE.npz] [--seeds N] [--peers FILE.csv ...] [--save FILE.csv]

PARTS (all of them without one): tiny large other design coverage stop limits
--tables  worths of the tiny model's texts as `bench/explain_games.py` writes them; computed first (minutes) without it
--seeds   draws of each tiny game (10)
--peers   what other packages reached: columns estimator, game, evaluations, seed, error (relative squared error)
--save    where to write the same columns of this run

The exit status is 1 where a claim did not hold.

Claims: `auto` at 512 evaluations of the tiny games has a median relative squared error of at most 0.002, 40 times less
than TokenSHAP's estimate and 10 times less than random orders; on sums of prizes with 50 to 512 players it is not worse than
the best of the single estimators at 10 evaluations a player, nor than antithetic orders at 2; intervals of 1.96 standard
errors hold in 93 to 97 cases of a hundred; `tol=0.1` stops within 300 evaluations in half of the cases; 10,000 evaluations of
512 players take at most 10 s and 200 MB."""

import argparse
import resource
import sys
import time

import numpy as np
import pandas as pd
from claims import MISSED, claim, show
from explain_games import (
    FAMILIES,
    LARGE,
    OTHER,
    TINY,
    Known,
    of_table,
    relative,
    tiny_tables,
    unanimity,
)

from llm_analysis.core import stream
from llm_analysis.explain.auto import estimate
from llm_analysis.explain.coalitions import CANDIDATES, leverage_pairs, pairs_in_all, pairs_of, rows_of
from llm_analysis.explain.process import process
from llm_analysis.explain.regression import regress

OURS = ("auto", "process", "leverage", "trees", "reuse", "sparse", "permutation")


def orders(game: Known, evaluations: int, seed: int) -> np.ndarray:
    "Random orders walked once (captum's ShapleyValueSampling, Castro et al. 2009)"
    rng, n = np.random.default_rng([7, seed]), game.n
    walks = max((evaluations - 2) // (n - 1), 1)
    order = np.array([rng.permutation(n) for _ in range(walks)])
    coal = (order.argsort(1)[:, None, :] < np.arange(n + 1)[:, None]).reshape(-1, n)
    gain = np.zeros((walks, n))
    np.put_along_axis(gain, order, np.diff(game.worth(coal).reshape(walks, n + 1), axis=1), axis=1)
    return gain.mean(0)


def tokenshap(game: Known, evaluations: int, seed: int) -> np.ndarray:
    "Mean worth with a player less mean worth without, over all but one and random coalitions (TokenSHAP, unscaled)"
    rng, n = np.random.default_rng([8, seed]), game.n
    coal = ~np.eye(n, dtype=bool)
    while len(coal) < evaluations:
        more = rng.random((evaluations, n)) < 0.5
        coal = np.concatenate([coal, more[more.any(1) & ~more.all(1)]])
        coal = coal[np.sort(np.unique(coal, axis=0, return_index=True)[1])]
    coal = coal[:evaluations]
    worth = game.worth(coal)
    return (worth @ coal) / coal.sum(0) - (worth @ ~coal) / np.maximum((~coal).sum(0), 1)


OTHERS = {"orders, one way": orders, "TokenSHAP's estimate": tokenshap}


def trial(game: Known, name: str, evaluations: int, seed: int) -> dict:
    "One estimate: its error, how many of its intervals held, what it took"
    began = time.process_time()
    row = dict(estimator=name, game=game.name, n=game.n, evaluations=evaluations, seed=seed)
    if name in OTHERS:
        return row | dict(error=relative(OTHERS[name](game, evaluations, seed), game))
    found = estimate(game.worth, game.n, estimator=name, budget=evaluations, seed=seed, row_id=game.name)
    spent, inside = time.process_time() - began, np.abs(found.values - game.truth) <= 1.96 * found.errors
    gap = abs(found.values.sum() - (found.full - found.base)) / max(np.abs(game.truth).max(), 1e-300)
    held = float(inside.mean()) if found.errors.any() else np.nan
    return row | dict(error=relative(found.values, game), held=held, gap=gap, seconds=spent, method=found.method)


def geometric(errors: pd.Series) -> float:
    "Mean of the logarithms, taken back"
    return float(np.exp(np.log(errors.clip(lower=1e-14)).mean()))


def tiny(games: list[Known], seeds: int) -> pd.DataFrame:
    "Every estimator on the texts of the tiny model"
    rows = []
    for game in games:
        for evaluations in TINY:
            for name in (*OURS, *OTHERS):
                few = {"leverage": 2, "trees": 2, "permutation": 4}.get(name, 0) * (game.n + 2) <= evaluations
                slow = name in ("trees", "reuse", "sparse") or evaluations > 512
                if few and evaluations < 2**game.n and pairs_in_all(game.n) > evaluations // 2:
                    rows += [trial(game, name, evaluations, s) for s in range(max(seeds // 3, 1) if slow else seeds)]
    return pd.DataFrame(rows)


def tell_tiny(t: pd.DataFrame) -> None:
    for kind in ("reviews", "facts", ""):
        part = t[t.game.str.startswith(kind)]
        print(f"Median relative squared error, {kind or 'all eleven texts'}:\n")
        show(part.groupby(["estimator", "evaluations"]).error.median().unstack())
    at = t[t.evaluations == 512].groupby("estimator").error.median()
    claim(f"`auto` at 512 evaluations: {at['auto']:.5f} (claim: at most 0.002).", at["auto"] <= 0.002)
    for name, least in (("TokenSHAP's estimate", 40), ("orders, one way", 10)):
        times = at[name] / at["auto"]
        claim(f"{name}: errs {times:.0f} times as much (claim: {least}).", times >= least)
    rivals = at[[name for name in at.index if name not in OURS and name not in OTHERS]]
    if len(rivals):
        times, best = at["auto"] / rivals.min(), f"{rivals.idxmin()}: {rivals.min():.5f}"
        said = f"The best of the other packages, {best}; `auto` errs {times:.2f} times as much (claim: at most 1.1)."
        claim(said, times <= 1.1)
    ours = t[t.estimator.isin(OURS)]
    claim(
        f"Largest efficiency gap over the largest value: {ours.gap.max():.1e} (claim: 1e-8).\n", ours.gap.max() <= 1e-8
    )


def spread_of(make, sizes: dict, names: tuple) -> pd.DataFrame:
    "Every estimator on games made for many seeds: n -> {evaluations a player: seeds}"
    rows = []
    for n, budgets in sizes.items():
        for each, seeds in budgets.items():
            for seed in range(seeds):
                game, evaluations = make(n, seed), each * n
                for name in names:
                    enough = {"leverage": 2 * n + 6, "trees": 2 * n + 6, "permutation": 4 * n - 2}.get(name, 22)
                    slow = name in ("trees", "reuse", "sparse") and (n > 50 and seed >= 3 or n > 200 and each > 2)
                    if evaluations >= enough and not (slow and seed >= 1):
                        rows.append(trial(game, name, evaluations, seed) | dict(each=each))
                if evaluations < 4 * n - 2 and "permutation" in names:  # one pair of orders, without an error
                    rows.append(one_pair(game, evaluations, seed) | dict(each=each))
    return pd.DataFrame(rows)


def one_pair(game: Known, evaluations: int, seed: int) -> dict:
    "One order, walked both ways: what antithetic orders can do with two evaluations a player"
    n, order = game.n, np.random.default_rng([9, seed]).permutation(game.n)
    total = np.zeros(n)
    for walk in (order, order[::-1]):
        coal = walk.argsort()[None, :] < np.arange(n + 1)[:, None]
        total[walk] += np.diff(game.worth(coal)) / 2
    row = dict(estimator="permutation", game=game.name, n=n, evaluations=evaluations, seed=seed)
    return row | dict(error=relative(total, game))


def tell_spread(t: pd.DataFrame, title: str) -> None:
    "Geometric means over the seeds that every estimator has in common with auto"
    print(f"{title}: geometric mean of the relative squared error (games), evaluations a player\n")
    g = t.groupby(["estimator", "game", "each"]).error.agg(geometric)
    show(g.unstack([1, 2]).rename(columns=str, level=1).pipe(flat))
    worst = {}
    for (game, each), part in t.groupby(["game", "each"]):
        for name, one in part.groupby("estimator"):
            own = part[(part.estimator == "auto") & part.seed.isin(one.seed)]
            if name not in ("auto", "process"):
                worst[game, each, name] = geometric(own.error) / geometric(one.error)
    ratio = pd.Series(worst).unstack()
    ratio.index = [f"{game}, {each} a player" for game, each in ratio.index]
    ratio.index.name = "`auto` over …, on the same games"
    show(ratio, 3)
    if t.game.str.startswith("unanimity").all():
        for cell, row in ratio.iterrows():
            rivals, most = (
                (row.drop("trees", errors="ignore"), 1.0) if "10 a player" in cell else (row[["permutation"]], 1.1)
            )
            if "4 a player" not in cell:
                said = f"{cell}: at most {rivals.max():.2f} times the error of any of these (claim: {most})."
                claim(said, rivals.max() <= most)
        print()


def tell_all(t: pd.DataFrame) -> None:
    "`auto` against each estimator over all cells in which both ran, on the same draws"
    keys, rows = ["game", "evaluations", "seed"], {}
    own = t[t.estimator == "auto"].set_index(keys).error.clip(lower=1e-14)
    for name, one in t[t.estimator != "auto"].groupby("estimator"):
        theirs = one.set_index(keys).error.clip(lower=1e-14)
        both = own.index.intersection(theirs.index)
        cells = pd.DataFrame({"auto": np.log(own[both]), "it": np.log(theirs[both])}).groupby(level=[0, 1]).mean()
        apart = cells["auto"] - cells["it"]
        means = np.exp(cells.mean())
        rows[name] = [len(cells), means["auto"], means["it"], np.exp(apart.mean()), (apart <= 0).mean()]
    print(
        "All cells (a game and a number of evaluations) in which both ran: geometric mean of the relative squared error\n"
    )
    columns = ["cells", "`auto`", "it", "`auto` / it", "share of cells in which `auto` is not worse"]
    show(pd.DataFrame(rows, index=columns).T.rename_axis("estimator"), 3)


def flat(table: pd.DataFrame) -> pd.DataFrame:
    table.columns = [", ".join(map(str, c)) for c in table.columns]
    return table


def design(games: list[Known]) -> None:
    "The same estimators on pairs chosen among candidates, and on pairs as they come"
    some = [(f"tiny, {m}", [(g, m, s) for g in games for s in range(5)]) for m in (64, 128, 256, 512)]
    for make in (unanimity, *FAMILIES):
        some += [
            (f"{make.__name__}-50, {each} a player", [(make(50, s), 50 * each, s) for s in range(5)])
            for each in (2, 4, 10)
        ]
    rows = {}
    for title, draws in some:
        errors = {}
        for game, evaluations, seed in draws:
            for name, many in (("chosen", CANDIDATES), ("as they come", 1)):
                draw = lambda k, g=game, s=seed: stream(3000 + s, g.name, f"explain: walk {k}")
                coal = rows_of(leverage_pairs(game.n, (evaluations - 2) // 2, draw, candidates=many))
                pairs = pairs_of(coal, game.worth(coal))
                errors.setdefault(f"process, {name}", []).append(relative(process(pairs).values[:, 0], game))
                if len(pairs.coal) >= 1.5 * game.n + 2:
                    errors.setdefault(f"regression, {name}", []).append(relative(regress(pairs).values[:, 0], game))
        rows[title] = {name: geometric(pd.Series(e)) for name, e in errors.items()}
    print(
        f"Pairs chosen among {CANDIDATES} candidates, and as they come: geometric mean of the relative squared error\n"
    )
    show(pd.DataFrame(rows).T.rename_axis("games, evaluations"), 3)


def coverage(games: list[Known]) -> None:
    rows = []
    for evaluations, seeds in ((128, 40), (256, 30), (512, 16), (1024, 8)):
        for game in games:
            if evaluations < 2**game.n // 2:
                rows += [trial(game, "auto", evaluations, 1000 + s) for s in range(seeds)]
    t = pd.DataFrame(rows)
    by = (
        t.groupby("evaluations")
        .held.agg(["mean", "count"])
        .rename(columns=dict(mean="intervals that hold", count="runs"))
    )
    show(by, 3)
    held = t.held.mean()
    claim(f"All {len(t):,} runs: {held:.3f} (claim: 0.93 to 0.97).\n", 0.93 <= held <= 0.97)


def stop(games: list[Known], seeds: int) -> None:
    rows = []
    for tol in (0.2, 0.1, 0.05):
        for game in (g for g in games if g.n in (13, 14)):
            for seed in range(seeds):
                a = estimate(game.worth, game.n, tol=tol, seed=2000 + seed, row_id=game.name)
                worst = np.abs(a.values - game.truth).max() / np.abs(game.truth).max()
                held = (np.abs(a.values - game.truth) <= 1.96 * a.errors).mean()
                rows.append((tol, game.n, a.evaluations, worst, held))
    t = pd.DataFrame(rows, columns=["tol", "n", "evaluations", "worst", "held"])
    table = pd.DataFrame(
        {
            "runs": t.groupby("tol").size(),
            "evaluations, median": t.groupby("tol").evaluations.median(),
            "at 14 players": t[t.n == 14].groupby("tol").evaluations.median(),
            "90th percentile": t.groupby("tol").evaluations.quantile(0.9),
            "largest error over largest value, 95th percentile": t.groupby("tol").worst.quantile(0.95),
            "intervals that hold": t.groupby("tol").held.mean(),
        }
    )
    show(table, 3)
    _, _, many, _, worst, _ = table.loc[0.1]
    said = (
        f"tol 0.1: {many:.0f} evaluations at 14 players (claim: 300), a largest error of {worst:.3f} (claim: 0.12).\n"
    )
    claim(said, many <= 300 and worst <= 0.12)


def limits() -> None:
    game = unanimity(512, 0)
    estimate(game.worth, 512, budget=600)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    spent, asked = time.process_time(), [0.0]

    def timed(coal):
        start = time.process_time()
        worth = game.worth(coal)
        asked[0] += time.process_time() - start
        return worth

    found = estimate(timed, 512, budget=10_000)
    spent = time.process_time() - spent - asked[0]
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    wall = time.perf_counter() - began
    said = f"512 players, 10,000 evaluations: {spent:.1f} s of processor time without the worths (claim: 10),"
    said += f"\n{wall:.1f} s by the clock with them, {more:.0f} MB above a run of 600 evaluations (claim: 200);"
    claim(said, spent <= 10 and more <= 200)
    print(f"relative squared error {relative(found.values, game):.3f}, {found.method}.\n")


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("part", nargs="*", help="tiny large other design coverage stop limits; all without one")
    ask.add_argument("--tables", help="worths of the tiny model's texts")
    ask.add_argument("--seeds", type=int, default=10)
    ask.add_argument("--peers", nargs="*", default=[])
    ask.add_argument("--save")
    a = ask.parse_args()
    parts, done, games = a.part or ["tiny", "large", "other", "design", "coverage", "stop", "limits"], [], []
    peers = pd.concat([pd.read_csv(p) for p in a.peers]) if a.peers else None
    if {"tiny", "design", "coverage", "stop"} & set(parts):
        games = [of_table(k, t) for k, t in (dict(np.load(a.tables)) if a.tables else tiny_tables()).items()]
    if "limits" in parts:
        limits()
    if "tiny" in parts:
        done.append(tiny(games, a.seeds))
        tell_tiny(done[-1] if peers is None else pd.concat([done[-1], peers[peers.game.isin(done[-1].game)]]))
    names = ("auto", "process", "leverage", "trees", "sparse", "permutation")
    if "large" in parts:
        done.append(spread_of(unanimity, LARGE, names))
        tell_spread(done[-1] if peers is None else with_peers(done[-1], peers), "Sums of prizes among neighbours")
    if "other" in parts:
        for make in FAMILIES:
            done.append(spread_of(make, OTHER, names))
            tell_spread(done[-1] if peers is None else with_peers(done[-1], peers), make.__doc__)
    if done:
        t = pd.concat(done)
        tell_all(t if peers is None else pd.concat([t, peers[peers.game.isin(t.game)]]))
        if a.save:
            t.to_csv(a.save, index=False)
    if "design" in parts:
        design(games)
    if "coverage" in parts:
        coverage(games)
    if "stop" in parts:
        stop(games, a.seeds)
    return 1 if MISSED else 0


def with_peers(own: pd.DataFrame, peers: pd.DataFrame) -> pd.DataFrame:
    "The peers' rows of the same games and budgets"
    each = own.drop_duplicates(["game", "evaluations"]).set_index(["game", "evaluations"]).each
    rows = peers[[key in each.index for key in zip(peers.game, peers.evaluations)]].copy()
    rows["each"] = [each[key] for key in zip(rows.game, rows.evaluations)]
    return pd.concat([own, rows])


if __name__ == "__main__":
    sys.exit(main())
