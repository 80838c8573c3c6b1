"""Interactions of pairs: the definition, what the index promises, closed forms against brute force, and nothing paid twice."""

from dataclasses import replace
from itertools import combinations
from math import comb, factorial

import numpy as np
import pytest

from llm_analysis.core import InputError, stream
from llm_analysis.explain.auto import Played
from llm_analysis.explain.coalitions import leverage_pairs, pairs_in_all, pairs_of, rows_of
from llm_analysis.explain.kernel import Kernel, gram, learn, signs
from llm_analysis.explain.pairwise import exact_interactions, interaction_prior, interaction_shares
from llm_analysis.explain.shapley import all_coalitions, exact_values
from llm_analysis.explain.together import PAIRS_AT_MOST, PLAYERS, check_room, together

TEXT = "The food was not bad but the service was so slow that I left."
ASKED = dict(prompt="Review: {text}\nSentiment:", labels=(" bad", " good"))


def defined(worth, n):
    "The index by its definition, coalition by coalition"
    v = dict(zip(map(tuple, all_coalitions(n).astype(int).tolist()), worth))
    found = np.zeros((n, n))
    for i, j in combinations(range(n), 2):
        for t in (t for t in v if not t[i] and not t[j]):
            with_i, with_j = ((*t[:k], 1, *t[k + 1 :]) for k in (i, j))
            both = (*with_i[:j], 1, *with_i[j + 1 :])
            weight = factorial(sum(t)) * factorial(n - sum(t) - 2) / factorial(n - 1)
            found[i, j] += weight * (v[both] - v[with_i] - v[with_j] + v[t])
    return found + found.T


def prizes(n, seed, groups=25, most=4):
    rng = np.random.default_rng(seed)
    held = [rng.choice(n, rng.integers(1, most + 1), replace=False) for _ in range(groups)]
    prize, truth = rng.normal(size=groups), np.zeros((n, n))
    for p, g in zip(prize, held):
        truth[np.ix_(g, g)] += p / max(len(g) - 1, 1)
    return lambda coal: sum(p * coal[:, g].all(1) for p, g in zip(prize, held)), truth * (1 - np.eye(n))


def play(worth, n, count, seed=0):
    rows = rows_of(leverage_pairs(n, count, lambda k: stream(seed, 0, f"walk {k}")))
    return pairs_of(rows, worth(rows))


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_exact_is_the_definition(n):
    worth = np.random.default_rng(n).normal(size=2**n)
    assert exact_interactions(worth) == pytest.approx(defined(worth, n), abs=1e-10)


def test_few_players():
    assert exact_interactions(np.array([3.0])).shape == (0, 0)
    assert exact_interactions(np.array([3.0, 5.0])).tolist() == [[0.0]]
    assert exact_interactions(np.array([[1.0, 0], [2, 0], [4, 0], [9, 1]]))[0, 1].tolist() == [4.0, 1.0]
    with pytest.raises(InputError, match="worths of all 2"):
        exact_interactions(np.zeros(6))


def test_what_the_index_promises():
    rng, coal = np.random.default_rng(0), all_coalitions(6)
    v, w = rng.normal(size=(2, 64))
    found = exact_interactions(v)
    assert exact_interactions(2 * v - 3 * w) == pytest.approx(2 * found - 3 * exact_interactions(w), abs=1e-10)
    assert (found == found.T).all() and not np.diag(found).any()
    order = rng.permutation(6)
    renamed = v[coal[:, order.argsort()] @ (1 << np.arange(5, -1, -1))]
    assert exact_interactions(renamed)[np.ix_(order.argsort(), order.argsort())] == pytest.approx(found, abs=1e-10)
    dummy = exact_interactions(v[(coal[:, 1:] @ (1 << np.arange(4, -1, -1))) * 2] + 5 * coal[:, 0])
    assert dummy[0] == pytest.approx(np.zeros(6), abs=1e-12)
    alike = exact_interactions(coal[:, :2].any(1) * v[coal[:, 2:] @ (1 << np.arange(3, -1, -1))])
    assert alike[0, 2:] == pytest.approx(alike[1, 2:], abs=1e-12)


@pytest.mark.parametrize("n", [3, 4, 6, 8])
def test_main_effects_and_pairs_add_up(n):
    v = np.random.default_rng(n).normal(size=2**n)
    values, pairs = exact_values(v), exact_interactions(v)
    main = values - pairs.sum(1) / 2
    assert main.sum() + pairs[np.triu_indices(n, 1)].sum() == pytest.approx(v[-1] - v[0], abs=1e-8)
    one = 2 ** np.arange(n)[::-1]
    assert pairs.sum(1) == pytest.approx(v[-1] + v[0] - v[2**n - 1 - one] - v[one], abs=1e-8)


@pytest.mark.parametrize("size", range(1, 8))
def test_a_product_of_signs(size):
    group = np.arange(size)
    found = exact_interactions(np.prod(signs(all_coalitions(8))[:, group], axis=1))
    inside = 4 / (size - 1) if size % 2 == 0 else 0.0
    truth = np.where((np.arange(8) < size)[:, None] & (np.arange(8) < size), inside, 0.0) * (1 - np.eye(8))
    assert found == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("only", ["joint", "single", "size", "noise", "all"])
def test_closed_forms(n, only):
    coal, rng = all_coalitions(n), np.random.default_rng(n)
    parts = dict(joint=0.7, single=0.4, size=0.3, noise=0.2)
    parts = {k: v if only in (k, "all") else 0.0 for k, v in parts.items()}
    kernel = Kernel(rng.uniform(0.02, 0.9, n), **parts, even=True)
    k = gram(signs(coal), signs(coal), kernel) + kernel.noise * (np.eye(2**n) + np.eye(2**n)[::-1])
    assert k == pytest.approx(k[::-1], abs=1e-12)
    once = exact_interactions(k)
    for i in range(n):
        assert interaction_shares(coal, kernel, i) == pytest.approx(once[i].T, abs=1e-9)
    twice = exact_interactions(np.moveaxis(once, 2, 0).reshape(2**n, n * n)).reshape(n, n, n, n)
    each, sums = interaction_prior(kernel)
    assert each == pytest.approx(np.einsum("ijij->ij", twice), abs=1e-9)
    assert sums == pytest.approx(np.einsum("ijik->i", twice), abs=1e-9)


def test_fifty_players_by_monte_carlo_of_groups():
    "Too many for brute force: a kernel of one product has a prior that is a sum over groups"
    kernel = Kernel(np.full(50, 0.05), 1.0, 0.0, 0.0, 0.0, even=True)
    theta, sizes = np.tanh(0.05), np.arange(2, 51, 2)
    weight = [comb(50, int(k)) * theta**k for k in sizes]
    pair = sum(comb(48, int(k) - 2) * theta**k * 16 / (k - 1) ** 2 for k in sizes) / sum(weight)
    assert interaction_prior(kernel)[0][3, 7] == pytest.approx(pair, rel=1e-8)


def test_learning_by_parity():
    design = leverage_pairs(8, 60, lambda k: stream(0, 0, f"walk {k}"))
    y = np.random.default_rng(0).normal(size=(60, 1))
    assert learn(design, y, even=True).even and not learn(design, y).even


def test_all_pairs_leave_nothing_to_luck():
    worth, truth = prizes(7, 0)
    found = together(play(worth, 7, pairs_in_all(7)))
    assert found.values[..., 0] == pytest.approx(truth, abs=2e-3) and found.errors.max() < 0.02


def test_intervals_hold():
    held = []
    for seed in range(12):
        worth, truth = prizes(12, seed)
        found = together(play(worth, 12, 100, seed))
        at = np.triu_indices(12, 1)
        held.append(((found.values[..., 0] - truth)[at] / found.errors[..., 0][at]) ** 2)
    assert 0.9 <= np.mean(np.array(held) <= 1.96**2) <= 0.995
    assert 0.25 <= np.mean(held) <= 1.2


def test_more_is_better_and_better_than_nothing():
    errors = []
    for count in (30, 120, 480):
        worth, truth = prizes(12, 3)
        errors.append(((together(play(worth, 12, count)).values[..., 0] - truth) ** 2).sum() / (truth**2).sum())
    assert errors[2] < errors[1] < errors[0] < 1


def test_learned_from_the_first_of_many_pairs():
    worth, truth = prizes(14, 5)
    found = together(play(worth, 14, 700))
    assert len(found.missed) == 700 - 512
    assert ((found.values[..., 0] - truth) ** 2).sum() < 0.05 * (truth**2).sum()


def test_refusals():
    worth, _ = prizes(8, 0)
    with pytest.raises(InputError, match="at least 4 pairs"):
        together(play(worth, 8, 3))
    with pytest.raises(InputError, match=f"at most {PLAYERS} players"):
        check_room(PLAYERS + 1, 100)
    with pytest.raises(InputError, match="at most 5,000 pairs"):
        check_room(20, PAIRS_AT_MOST + 1)
    with pytest.raises(InputError, match="finite worths"):
        play(lambda coal: np.where(coal.sum(1) == 3, np.nan, 1.0), 8, 20)


@pytest.fixture(scope="module")
def lm():
    from llm_analysis.lm.model import load

    return load("tiny", device="cpu")


def test_a_review(lm):
    from llm_analysis.explain.attribution import attribute, text_game
    from llm_analysis.explain.interactions import interactions

    game = text_game(lm, TEXT, **ASKED)
    asked, ask = [], game.worth
    game.worth = lambda coal: asked.extend(row.tobytes() for row in coal) or ask(coal)
    before = attribute(game, budget=300, seed=3, row_id="a")
    spent = game.spent
    a = interactions(game, budget=300, seed=3, row_id="a")
    assert game.spent == spent and len(asked) == len(set(asked)) == a.evaluations <= 300
    assert (a.shapley == before.values).all() and (a.base_value, a.full_value) == (
        before.base_value,
        before.full_value,
    )
    assert a.efficiency_gap < 1e-8 and not a.exact and (a.values == a.values.T).all() and not np.diag(a.values).any()
    again = interactions(text_game(lm, TEXT, **ASKED), budget=300, seed=3, row_id="a")
    assert (again.values == a.values).all() and (again.stderr == a.stderr).all()
    other = interactions(text_game(lm, TEXT, **ASKED), budget=300, seed=4, row_id="a")
    assert (other.values != a.values).any()
    more = interactions(game, budget=600, seed=3, row_id="a")
    assert len(asked) == len(set(asked)) == more.evaluations and more.stderr.mean() < a.stderr.mean()
    assert {("not", "bad")} == {a.top(1)[0][:2]}


def test_exact_and_the_object(lm):
    import matplotlib.pyplot as plt

    from llm_analysis.explain.interactions import explain_pairs

    a = explain_pairs(lm, "The soup was not good.", **ASKED)
    assert a.exact and not a.stderr.any() and not a.main_stderr.any() and a.efficiency_gap < 1e-8
    frame = a.to_frame()
    assert len(frame) == 10 and frame.columns[:4].tolist() == ["player", "other", "value", "stderr"]
    assert a.main.sum() + frame.value.sum() == pytest.approx(a.full_value - a.base_value, abs=1e-8)
    assert "not × good." in repr(a) and "10 evaluations" not in repr(a) and "<svg" in a._repr_html_()
    wild = replace(a, text="<b>x</b>", players=("<b>", *a.players[1:]))
    assert "<b>x" not in wild._repr_html_() and "<b> ×" not in wild._repr_html_()
    a.plot(), a.arcs(), replace(a, values=np.zeros((5, 5))).arcs()
    plt.close("all")
    with pytest.raises(InputError, match="at most 140 characters"):
        replace(a, players=("x" * 141, *a.players[1:])).arcs()


@pytest.mark.parametrize("text", ["", "Good.", "Not good."])
def test_hardly_any_players(lm, text):
    from llm_analysis.explain.interactions import explain_pairs

    a = explain_pairs(lm, text, **ASKED)
    n = len(a.players)
    assert a.values.shape == (n, n) and a.efficiency_gap < 1e-8 and len(a.to_frame()) == n * (n - 1) // 2
    repr(a), a._repr_html_()


def test_several_targets(lm):
    from llm_analysis.explain.interactions import explain_pairs
    from llm_analysis.explain.outputs import ClassLogits

    value = ClassLogits(ASKED["labels"])
    a = explain_pairs(lm, "The soup was not good.", prompt=ASKED["prompt"], value=value)
    assert a.values.shape == (5, 5) and a.answer.strip() in a.unit and a.efficiency_gap < 1e-8


def test_refused_before_anything_is_asked(lm):
    from llm_analysis.explain.attribution import text_game
    from llm_analysis.explain.interactions import interactions

    game = text_game(lm, TEXT, **ASKED)
    before = game.spent
    for budget, match in ((8, "at least 10 evaluations"), (12_000, "at most 5,000 pairs")):
        with pytest.raises(InputError, match=match):
            interactions(game, budget=budget)
    assert game.spent == before
    wrong = text_game(lm, TEXT, **ASKED)
    wrong.worth = lambda coal: np.full(len(coal), np.inf)
    with pytest.raises(InputError, match="finite worths"):
        interactions(wrong, budget=100)


def test_shapiq(lm):
    shapiq = pytest.importorskip("shapiq")
    from llm_analysis.explain.attribution import text_game
    from llm_analysis.explain.interactions import interactions

    game = text_game(lm, "The soup was not good.", **ASKED)
    a = interactions(game)
    played = Played(lambda coal: game(np.asarray(coal, dtype=bool)))
    truth = shapiq.ExactComputer(game=lambda coal: played(np.atleast_2d(coal).astype(bool)), n_players=5)("k-SII", 2)
    found = a.to_shapiq()
    assert (found.index, found.max_order, found.estimated) == ("k-SII", 2, False)
    assert all(found[group] == pytest.approx(truth[group], abs=1e-8) for group in truth.interaction_lookup)
