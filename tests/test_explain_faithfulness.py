"""Faithfulness: the scores beside a plain loop, and identities that hold for every game."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_analysis.core import InputError
from llm_analysis.explain.faithfulness import (
    SCORES,
    SHARES,
    Comparison,
    compare,
    counts_of,
    faithfulness,
    plot,
    ranked,
    scores_of,
    walked,
)


def game(n, seed=0):
    "A table of random worths, and the game that reads it"
    table = np.random.default_rng(seed).normal(size=2**n)
    return table, lambda coal: table[coal @ (1 << np.arange(n))]


def plainly(table, order, shares):
    "The four scores from sets of players, one after another"
    n, worth = len(order), lambda players: table[sum(1 << int(p) for p in players)]
    everybody = set(range(n))
    removed = [worth(everybody - set(order[:k])) for k in range(n + 1)]
    kept = [worth(order[:k]) for k in range(n + 1)]
    tops = [-(-round(s * n * 1000) // 1000) for s in shares]
    return [
        np.mean([removed[0] - removed[k] for k in tops]),
        np.mean([kept[n] - kept[k] for k in tops]),
        sum((a + b) / 2 / n for a, b in zip(removed, removed[1:])),
        sum((a + b) / 2 / n for a, b in zip(kept, kept[1:])),
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_beside_a_plain_loop(n, seed):
    table, worth = game(n, seed)
    orders = np.array([np.random.default_rng([seed, i]).permutation(n) for i in range(3)])
    found = scores_of(walked(worth, orders))
    assert np.abs(found - [plainly(table, order.tolist(), SHARES) for order in orders]).max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_deletion_is_insertion_backwards(n, seed):
    _, worth = game(n, seed)
    order = np.random.default_rng(seed).permutation(n)[None]
    there, back = walked(worth, order), walked(worth, order[:, ::-1])
    assert (there.removed == back.kept[:, ::-1]).all() and (there.kept == back.removed[:, ::-1]).all()


def test_counts():
    for n in range(1, 200):
        k = counts_of(n)
        assert (k >= 1).all() and (k <= n).all() and (np.diff(k) >= 0).all()
        assert k.tolist() == [-(-5 * n // 100), -(-n // 10), -(-n // 5), -(-n // 2)]
    with pytest.raises(InputError):
        counts_of(5, (0.1, 1.1))
    with pytest.raises(InputError):
        counts_of(5, ())


def test_every_ranking_removes_the_same_number():
    _, worth = game(8)
    found = faithfulness(worth, {"a": np.arange(8.0), "b": -np.arange(8.0)})
    assert found.counts == (1, 1, 2, 4) and found.removed.shape == (4, 9)
    assert np.ptp(found.removed[:, 0]) < 1e-12 and np.ptp(found.kept[:, -1]) < 1e-12


def test_the_order_of_an_additive_game_wins():
    rng = np.random.default_rng(4)
    weights = rng.normal(size=12)
    found = faithfulness(lambda coal: coal @ weights + 3, {"weights": weights, "noise": rng.normal(size=12)}, seed=1)
    signs = np.array(list(SCORES.values()))
    assert (signs * (found.scores[0] - found.scores[1:]) >= -1e-12).all()
    assert np.abs(found.scores[0] - found.scores[found.rankings.index("leave-one-out")]).max() < 1e-12


def test_ties_and_signs():
    assert ranked(np.array([0.0, -2.0, 1.0, 0.0])).tolist() == [2, 0, 3, 1]


def test_random_orders_depend_on_seed_and_row_alone():
    _, worth = game(7)
    values = {"a": np.arange(7.0)}
    first, again = (faithfulness(worth, values, seed=1, row_id="x") for _ in range(2))
    other = faithfulness(worth, values, seed=1, row_id="y")
    assert (first.scores == again.scores).all() and not (first.scores[-1] == other.scores[-1]).all()
    assert (first.scores[:-1] == other.scores[:-1]).all()
    assert (first.errors[:-1] == 0).all() and (first.errors[-1] > 0).all()


def test_each_coalition_is_asked_about_once_a_call():
    asked = []
    _, worth = game(9)
    found = faithfulness(lambda coal: asked.append(coal) or worth(coal), {"a": np.arange(9.0)})
    assert len(asked) == 2 and len(asked[0]) == 10  # leave-one-out, then all walks
    assert len(np.unique(asked[1], axis=0)) == len(asked[1]) == found.evaluations <= 2**9


def test_the_error_over_texts():
    "Of rankings that are nothing but luck the advantage over random orders is 0 within its error"
    rows = []
    for seed in range(60):
        _, worth = game(8, seed)
        luck = np.random.default_rng([9, seed]).normal(size=8)
        rows.append(faithfulness(worth, {"luck": luck}, seed=seed))
    found = compare(rows)
    assert isinstance(found, Comparison) and found.texts == 60
    assert (np.abs(found.better[0]) < 3.5 * found.better_errors[0]).all()
    assert np.abs(found.scores[0] - np.mean([r.scores[0] for r in rows], axis=0)).max() < 1e-12
    assert (found.better[-1] == 0).all() and found.grid[[0, -1]].tolist() == [0, 1]
    assert len(plot(found)) == 2
    assert "<script" not in compare(rows[:2])._repr_html_()


def test_texts_of_different_lengths_share_a_grid():
    rows = [faithfulness(game(n, n)[1], {"a": np.arange(float(n))}) for n in (1, 2, 13)]
    found = compare(rows, steps=10)
    assert found.removed.shape == (3, 3, 11)
    assert np.allclose(found.removed[:, :, 0], [[r.removed[0, 0]] * 3 for r in rows])
    with pytest.raises(InputError, match="same rankings"):
        compare([rows[0], faithfulness(game(3)[1], {"b": np.arange(3.0)})])


@pytest.mark.parametrize(
    "worth", [lambda c: np.full(len(c), np.inf), lambda c: np.zeros((len(c), 2)), lambda c: [1.0]]
)
def test_bad_worths_are_refused(worth):
    with pytest.raises(InputError, match="one finite worth"):
        faithfulness(worth, {"a": np.arange(4.0)})
