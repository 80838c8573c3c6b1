"""What every estimator of Shapley values promises, on games small enough to know: adding up, keeping to the budget, repeating."""

from functools import cache

import numpy as np
import pytest

from llm_analysis.core import stream
from llm_analysis.explain.auto import ESTIMATORS, NAMES, Paired, estimate, fewest, sampler_for
from llm_analysis.explain.coalitions import pairs_in_all, pairs_of
from llm_analysis.explain.regression import regress
from llm_analysis.explain.shapley import all_coalitions, exact_values

N = 9
BUDGET = 90  # 44 pairs of complements: enough for all of them, far from all 254


def table(n=N, outputs=2, seed=0):
    "Worths of all coalitions: single players, a few who work together, and a little of everything"
    rng, coal = np.random.default_rng(seed), all_coalitions(n)
    worth = coal @ rng.normal(size=(n, outputs)) + 0.05 * rng.normal(size=(len(coal), outputs))
    for size in (2, 3, 3, 4):
        worth += coal[:, rng.choice(n, size, replace=False)].all(1)[:, None] * rng.normal(size=outputs)
    return worth


class Recorded:
    "A game that remembers what it was asked"

    def __init__(self, worth):
        self.worth, self.asked = worth, []

    def __call__(self, coal):
        place = 1 << np.arange(coal.shape[1] - 1, -1, -1)
        rows = coal @ place
        self.asked += rows.tolist()
        return self.worth[rows]


def played(worth, name, *, budget=BUDGET, seed=0):
    "An estimate, and what was asked for it"
    n, game = len(worth).bit_length() - 1, Recorded(worth)
    return estimate(game, n, estimator=name, budget=2**n if name == "exact" else budget, seed=seed), game.asked


@cache
def usual(name):
    "The estimate of the usual game, computed once"
    return played(table(), name)[0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_add_up(name):
    worth, found = table(), usual(name)
    assert np.abs(found.values.sum(0) - (worth[-1] - worth[0])).max() <= 1e-8
    assert found.gap <= 1e-8


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_budget_is_never_exceeded_and_nothing_is_asked_twice(name):
    worth, least = table(outputs=1)[:, 0], fewest(N, name)
    found, asked = played(worth, name, budget=least)
    assert len(asked) == len(set(asked)) == found.evaluations <= least
    game = Recorded(worth)
    found = estimate(game, N, estimator=name, tol=1e-9, budget=least if name == "exact" else 75)  # in two stages
    assert len(game.asked) == len(set(game.asked)) == found.evaluations <= max(least, 75)
    assert found.evaluations > least or name == "exact"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_seed_decides(name):
    one, two = usual(name), played(table(), name)[0]
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.errors, two.errors)
    if name not in ("exact", "trees", "reuse", "sparse"):
        assert np.abs(played(table(), name, seed=4)[0].values - one.values).max() > 1e-6


@pytest.mark.parametrize("name", [x for x in ESTIMATORS if x not in ("exact", "permutation")])
def test_a_larger_design_continues_a_smaller_one(name):
    draw = lambda k: stream(0, 0, f"explain: walk {k}")
    designs = [sampler_for(N, budget, name).coalitions(N, draw) for budget in (60, BUDGET, 200)]
    for small, large in zip(designs, designs[1:]):
        np.testing.assert_array_equal(small, large[: len(small)])


def test_more_orders_continue_fewer():
    draw = lambda k: stream(0, 0, f"explain: walk {k}")
    few, many = (sampler_for(N, budget, "permutation").coalitions(N, draw) for budget in (60, 200))
    np.testing.assert_array_equal(few, many[: len(few)])


@pytest.mark.parametrize("name", ["auto", "process", "leverage", "trees", "reuse"])
def test_all_pairs_leave_nothing_to_luck(name):
    n = 7
    worth = table(n, outputs=1)
    truth = exact_values(worth)
    sampler = Paired(pairs_in_all(n), name)
    coal = sampler.coalitions(n, lambda k: stream(0, 0, f"explain: walk {k}"))
    assert len(np.unique(coal, axis=0)) == 2**n
    found = sampler.estimate(coal, Recorded(worth)(coal))
    tight = 1e-5 if name in ("auto", "process") else 1e-10  # the process allows for rounding of the worths
    np.testing.assert_allclose(found.values, truth, atol=tight)
    assert found.errors.max() <= 1e-2 * np.abs(truth).max()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_errors_tell_how_far_off_it_is(name):
    truth = exact_values(table())
    found = usual(name)
    assert (found.errors >= 0).all() and np.isfinite(found.errors).all()
    assert (np.abs(found.values - truth) <= 5 * found.errors + 1e-12).all()


@pytest.mark.parametrize("name", ["exact", "permutation"])
def test_a_dummy_gets_nothing_but_its_own(name):
    worth = table(N - 1)
    worth = np.concatenate([worth, worth + 0.25])  # player 0 adds 0.25 to whatever there is
    found = played(worth, name)[0]
    assert np.abs(found.values[0] - 0.25).max() <= 1e-8
    if name == "permutation":
        assert found.errors[0].max() <= 1e-8


def swapped(worth, i, j):
    "The game in which two players have changed places"
    n = len(worth).bit_length() - 1
    coal = all_coalitions(n)
    coal[:, [i, j]] = coal[:, [j, i]]
    return worth[coal @ (1 << np.arange(n - 1, -1, -1))]


def test_exact_values_are_symmetric_and_linear():
    one, two = table(seed=1), table(seed=2)
    values = lambda worth: played(worth, "exact")[0].values
    alike = values(one + swapped(one, 2, 5))
    assert np.abs(alike[2] - alike[5]).max() <= 1e-8 < np.abs(values(one)[2] - values(one)[5]).max()
    assert np.abs(values(2 * one - 3 * two) - (2 * values(one) - 3 * values(two))).max() <= 1e-8


@pytest.mark.parametrize("name", [x for x in NAMES if x != "sparse"])
def test_single_players_are_found_exactly(name):
    weights = np.random.default_rng(5).normal(size=(N, 1))
    found = played(2.0 + all_coalitions(N) @ weights, name)[0]
    np.testing.assert_allclose(found.values, weights, atol=1e-5 if name == "process" else 1e-8)


def test_the_regression_is_the_textbook_one():
    coal = sampler_for(N, BUDGET, "leverage").coalitions(N, lambda k: stream(0, 0, f"explain: walk {k}"))
    worth = Recorded(table(outputs=1)[:, 0])(coal)
    found, inner, size = regress(pairs_of(coal, worth)), coal[2:], coal[2:].sum(1)
    weight = 1 / (size * (N - size) * np.bincount(size)[size])
    # all but the last player are free: the last takes what is left of the whole
    design = np.sqrt(weight)[:, None] * (inner[:, :-1].astype(float) - inner[:, -1:])
    target = np.sqrt(weight) * (worth[2:] - worth[0] - inner[:, -1] * (worth[1] - worth[0]))
    free = np.linalg.lstsq(design, target, rcond=None)[0]
    np.testing.assert_allclose(found.values[:-1, 0], free, atol=1e-9)
