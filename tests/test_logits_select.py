"""What is kept of a distribution, against plain float64 references with full sorts, and over many draws."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from llm_analysis.core import InputError
from llm_analysis.logits.nucleus import Nucleus
from llm_analysis.logits.picked import TEMPERATURES, Picked, estimate, take
from llm_analysis.logits.scan import largest
from llm_analysis.logits.select import TopK, VarOpt, uniforms

torch.set_num_threads(1)
VOCAB = 700
EVERY = [VarOpt(), VarOpt(eps=1e-2, most=40), VarOpt(size=17), TopK(9), Nucleus(), Nucleus(top_p=0.7, most=8, tail=3)]


def rows(count: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    "Peaked, medium and flat tokens in turn"
    rng = np.random.default_rng(seed)
    slope = np.resize([4.0, 1.7, 1.1, 0.5], count)[:, None]
    z = -slope * np.log(np.arange(1, vocab + 1)) + rng.normal(0, 0.3, (count, vocab))
    return torch.from_numpy(rng.permuted(z, axis=1)).float()


def probabilities(logits: torch.Tensor) -> np.ndarray:
    "Softmax in float64"
    return logits.double().softmax(1).numpy()


def fallen(p):
    "Ids by falling probability, the smaller first of equals"
    return np.lexsort([np.arange(len(p)), -p])


def reference_varopt(p, u, size):
    "Exact ids, drawn ids, tau and expected squared error, one step at a time"
    order, n = fallen(p), 0
    if size >= (p > 0).sum():
        return order[: (p > 0).sum()], [], 0.0, 0.0
    while p[order[n]] >= p[order[n:]].sum() / (size - n):
        n += 1
    tail = np.sort(order[n:])
    tau = p[tail].sum() / (size - n)
    line = np.cumsum(p[tail])
    lots = [tail[np.searchsorted(line, (u + j) * tau, side="right")] for j in range(size - n)]
    return order[:n], lots, tau, tau * p[tail].sum() - (p[tail] ** 2).sum()


def reference_adaptive(p, u, eps, most):
    "The smallest size that reaches `eps`"
    for size in range(1, most + 1):
        found = reference_varopt(p, u, size)
        if found[3] <= eps:
            break
    return found


@pytest.mark.parametrize("selector", [VarOpt(size=1), VarOpt(size=17), VarOpt(size=VOCAB - 1), VarOpt(1e-3, 60)])
def test_varopt_is_the_reference(selector):
    z, u = rows(40), np.random.default_rng(1).random(40)
    got = selector.pick(z, u)
    for t, p in enumerate(probabilities(z)):
        size = selector.size
        exact, lots, tau, error = reference_varopt(p, u[t], size) if size else reference_adaptive(p, u[t], 1e-3, 60)
        one = take(got, np.array([t]))
        assert one.ids[~one.by_lot].tolist() == list(exact)
        assert one.ids[one.by_lot].tolist() == list(lots)
        assert one.tau[0] == pytest.approx(tau, rel=1e-5)
        assert one.error[0] == pytest.approx(error, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("selector", EVERY)
def test_what_is_said_of_the_whole_row(selector):
    z = rows(24)
    came = np.random.default_rng(2).integers(0, VOCAB, 24)
    got, p = selector.pick(z, uniforms(0, "row", range(24)), came), probabilities(z)
    token = np.repeat(np.arange(24), got.exact + got.sampled)
    np.testing.assert_allclose(got.logp, np.log(p)[token, got.ids], atol=1e-5)
    np.testing.assert_allclose(got.logsumexp, torch.logsumexp(z.double(), 1).numpy(), atol=1e-6)
    hot = [torch.logsumexp(z.double() / t, 1).numpy() for t in TEMPERATURES]
    np.testing.assert_allclose(got.tempered, np.stack(hot, axis=1), atol=1e-5)
    np.testing.assert_allclose(got.entropy, -(p * np.log(p)).sum(1), atol=1e-5)
    np.testing.assert_allclose(got.target, np.log(p[np.arange(24), came]), atol=1e-5)
    for t in range(24):
        one = take(got, np.array([t]))
        beyond = np.delete(p[t], one.ids[~one.by_lot])
        assert one.tail[0] == pytest.approx(np.log(beyond.sum()), abs=1e-5) if len(beyond) else one.tail[0] == -np.inf
        lots = one.ids[one.by_lot]
        assert (np.diff(lots) > 0).all() and len(set(one.ids)) == len(one.ids)
        assert (np.diff(one.logp[~one.by_lot]) <= 0).all()
    kinds = {"ids": "int32", "logp": "float32", "exact": "int32", "sampled": "int32", "tau": "float64"}
    kinds |= {"logsumexp": "float64", "tail": "float64", "error": "float32", "tempered": "float32"}
    assert {k: str(getattr(got, k).dtype) for k in kinds} == kinds


@pytest.mark.parametrize("selector", [VarOpt(1e-3, 60), VarOpt(size=9), Nucleus(0.7, 8, 6), Nucleus(0.99, 3, 24)])
def test_unbiased_over_many_draws(selector):
    draws, z = 2500, rows(4, vocab=120)
    student = rows(4, vocab=120, seed=9).double().log_softmax(1).numpy()
    for t, p in enumerate(probabilities(z)):
        many = selector.pick(z[t : t + 1].expand(draws, -1), uniforms(3, t, range(draws)))
        guess = estimate(many, 120)
        lot = np.exp(many.tail[0]) / max(many.sampled[0], 1)
        often = p * draws >= 30 * lot  # drawn thirty times or more; the others are looked at together
        grouped = [np.append(x[..., often], x[..., ~often].sum(-1, keepdims=True), -1) for x in (guess, p)]
        off, error = grouped[0].mean(0) - grouped[1], grouped[0].std(0) / draws**0.5
        assert (np.abs(off)[:-1] <= 4.5 * error[:-1] + 1e-6).all() and abs(off[-1]) <= 4.5 * error[
            -1
        ] + 10 * lot / draws
        cross = -(guess * student[t]).sum(1)
        assert abs(cross.mean() + (p * student[t]).sum()) <= 4 * cross.std() / draws**0.5 + 1e-6
        squared = ((guess - p) ** 2).sum(1)
        assert squared.mean() <= 1.05 * many.error[0] + 4 * squared.std() / draws**0.5 + 1e-9
        if isinstance(selector, VarOpt):
            np.testing.assert_allclose(guess.sum(1), 1, atol=1e-6)
            np.testing.assert_allclose(squared.mean(), many.error[0], atol=4 * squared.std() / draws**0.5 + 1e-9)


def test_the_usual_reading_is_biased():
    z = rows(4)[3:]
    found = estimate(TopK(64).pick(z, np.zeros(1)), VOCAB)[0]
    p, student = probabilities(z)[0], np.log(np.full(VOCAB, 1 / VOCAB))
    student = torch.from_numpy(0.9 * np.log(p)).log_softmax(0).numpy()
    assert -(found / found.sum() * student).sum() + (p * student).sum() < -0.4  # less than it is: the tail is missing


@pytest.mark.parametrize("selector", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_kept_by_itself(selector, dtype):
    "Neither the size of a chunk, nor the neighbours, nor their order change a bit of it"
    z, u = rows(30).to(dtype), uniforms(0, "row", range(30))
    whole = selector.pick(z, u)
    turned = np.random.default_rng(0).permutation(30)
    others = [selector.pick(z, u, chunk=c) for c in (1, 7, 29)]
    others.append(take(selector.pick(z[turned], u[turned]), np.argsort(turned)))
    more = selector.pick(torch.cat([z, rows(3, seed=5).to(dtype)]), np.append(u, u[:3]))
    others.append(take(more, np.arange(30)))
    for other in others:
        for f in fields(Picked):
            np.testing.assert_array_equal(getattr(whole, f.name), getattr(other, f.name), err_msg=f.name)


def test_uniforms():
    u = uniforms(0, 7, range(100))
    assert (uniforms(0, 7, [99, 3]) == u[[99, 3]]).all() and len(set(u)) == 100
    assert not np.isin(u, np.concatenate([uniforms(1, 7, range(100)), uniforms(0, "7", range(100))])).any()
    assert len(uniforms(0, 7, [])) == 0
    with pytest.raises(InputError, match="got -1"):
        uniforms(0, 7, [3, -1])


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("most", [1, 20, VOCAB + 5])
def test_the_nucleus_is_the_smallest(top_p, most):
    z = rows(40)
    got, p = Nucleus(top_p, most, 0).pick(z, np.zeros(40)), probabilities(z)
    for t in range(40):
        one, order = take(got, np.array([t])), fallen(p[t])
        n = len(one.ids)
        assert one.ids.tolist() == order[:n].tolist() and 1 <= n <= most
        assert p[t][order[: n - 1]].sum() < top_p + 1e-6
        assert p[t][order[:n]].sum() >= top_p - 1e-6 or n == min(most, VOCAB)
    if top_p == 1:
        assert (got.exact == min(most, VOCAB)).all()


@pytest.mark.parametrize("count", [2, 24])
def test_gumbel_tails_are_draws_without_replacement(count):
    "Chances of being drawn, and the mean threshold, as with a Gumbel number for every entry"
    z, draws = rows(2, vocab=60)[1:], 4000
    got = Nucleus(0.5, 2, count).pick(z.expand(draws, -1), uniforms(0, 0, range(draws)))
    p, n = probabilities(z)[0], got.exact[0]
    tail = fallen(p)[n:]
    noisy = np.log(p[tail]) + np.random.default_rng(0).gumbel(size=(draws, len(tail)))
    order = np.argsort(-noisy, axis=1)
    plain = np.bincount(tail[order[:, :count]].ravel(), minlength=60) / draws
    ours = np.bincount(got.ids[got.by_lot], minlength=60) / draws
    assert (got.sampled == count).all() and ours[fallen(p)[:n]].sum() == 0
    assert (np.abs(ours - plain) <= 4.5 * np.sqrt(2 * plain * (1 - plain) / draws) + 1e-3).all()
    threshold = np.take_along_axis(noisy, order, axis=1)[:, count]
    error = (threshold.var() + got.kappa.var()) ** 0.5 / draws**0.5
    assert abs(threshold.mean() - got.kappa.mean()) <= 4 * error
    assert threshold.std() == pytest.approx(got.kappa.std(), rel=0.08)


def test_a_small_tail_is_right():
    "1e-8 beside a certain token, at the size of a vocabulary, within a thousandth"
    z = torch.randn(6, 150_000, generator=torch.Generator().manual_seed(0))
    masses = [1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14]
    for row, mass in zip(z, masses):
        row[77] = torch.logsumexp(row.double(), 0) - np.log(mass)
    for selector in (TopK(1), VarOpt(size=2), Nucleus(0.5, 1, 24)):
        got = selector.pick(z, np.full(6, 0.5))
        alone = torch.cat([z[:, :77], z[:, 78:]], dim=1).double()
        truth = (torch.logsumexp(alone, 1) - torch.logsumexp(z.double(), 1)).numpy()
        assert (got.exact == 1).all() and (got.ids[got.starts[:-1]] == 77).all()
        np.testing.assert_allclose(np.exp(got.tail - truth), 1, atol=1e-3)


def test_ties():
    "Among equals the smaller ids, whatever else there is; all equal above the threshold or none"
    z = torch.zeros(3, 1000)
    z[1, 500:] = 1.0
    z[2, 3:999:2] = -1.0
    assert TopK(5).pick(z, np.zeros(3)).ids.reshape(3, 5).tolist() == [
        [0, 1, 2, 3, 4],
        [500, 501, 502, 503, 504],
        [0, 1, 2, 4, 6],
    ]
    for size in (1, 10, 499, 500, 501, 600, 999, 1000):
        got = VarOpt(size=size).pick(z, uniforms(0, 0, range(3)))
        assert ((got.exact + got.sampled) == size).all()
        for t in range(3):
            assert len(set(take(got, np.array([t])).ids)) == size
        np.testing.assert_allclose(estimate(got, 1000).sum(1), 1, atol=1e-6)
    coarse = rows(12, vocab=5000).bfloat16()
    for k in (1, 40, 128, 5000):
        want = [fallen(r)[:k].tolist() for r in coarse.double().numpy()]
        assert largest(torch.nn.functional.pad(coarse, (0, 120), value=-torch.inf), k).tolist() == want


@pytest.mark.parametrize("vocab", [1, 2, 17, 255, 256, 257])
@pytest.mark.parametrize("selector", EVERY)
def test_small_vocabularies(selector, vocab):
    z = rows(8, vocab=vocab)
    got = selector.pick(z, uniforms(0, 0, range(8)))
    assert (got.exact + got.sampled <= vocab).all() and (got.exact + got.sampled >= 1).all()
    if isinstance(selector, VarOpt):
        np.testing.assert_allclose(estimate(got, vocab).sum(1), 1, atol=1e-6)
        if selector.size is not None and vocab <= selector.size:
            assert (got.exact == vocab).all() and (got.tail == -np.inf).all() and (got.error == 0).all()


@pytest.mark.parametrize("selector", EVERY)
def test_masked_and_certain(selector):
    z = rows(8)
    z[0, 1:] = -torch.inf
    z[1:4, ::2] = -torch.inf
    z[4, 5] = 1000.0
    got = selector.pick(z, uniforms(0, 0, range(8)), np.zeros(8, dtype=int))
    assert np.isfinite(got.logp).all() and np.isfinite(got.entropy).all() and np.isfinite(got.error).all()
    assert not np.isin(take(got, np.array([1, 2, 3])).ids, np.arange(0, VOCAB, 2)).any()
    assert got.target[0] == 0 and (got.target[1:4] == -np.inf).all()
    least = selector.pick(z[1:4], np.zeros(3))  # the first point of the line is where masked entries begin it
    assert np.isfinite(least.logp).all() and not np.isin(least.ids, np.arange(0, VOCAB, 2)).any()
    first = take(got, np.array([0]))
    assert (first.ids.tolist(), first.tail[0], first.entropy[0], first.error[0]) == ([0], -np.inf, 0, 0)
    assert take(got, np.array([4])).ids[0] == 5 and got.entropy[4] == 0
    if isinstance(selector, VarOpt):
        np.testing.assert_allclose(estimate(got, VOCAB).sum(1), 1, atol=1e-6)


def test_refusals():
    for bad, seen in ((np.nan, "nan"), (np.inf, "inf")):
        z = rows(5)
        z[3, 9] = bad
        for selector in EVERY:
            with pytest.raises(InputError, match=f"got {seen} as the largest of row 3"):
                selector.pick(z, np.zeros(5))
    for wrong in (rows(5)[0], rows(5).long(), torch.zeros(3, 0)):
        with pytest.raises(InputError, match=r"expected float logits \[tok, vocab\]"):
            VarOpt().pick(wrong, np.zeros(len(wrong)))
    for make in (lambda: VarOpt(eps=-1), lambda: VarOpt(size=0), lambda: VarOpt(most=70_000), lambda: TopK(0)):
        with pytest.raises(InputError):
            make()
    for make in (lambda: Nucleus(top_p=0), lambda: Nucleus(tail=-1), lambda: Nucleus(most=0)):
        with pytest.raises(InputError):
            make()


def test_no_float64_copy(monkeypatch):
    "No tensor of doubles as large as the logits is made"
    big, z = [], rows(8, vocab=2**16)
    double, to = torch.Tensor.double, torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "double", lambda x: big.append(x.numel()) or double(x))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: big.append(x.numel()) or to(x, *a, **k))
    VarOpt(size=16).pick(z, np.zeros(8), chunk=8)
    assert big and max(big) <= z.numel() / 8


@pytest.mark.gpu
@pytest.mark.parametrize("selector", EVERY)
def test_the_same_on_an_accelerator(selector):
    z, u = rows(30), uniforms(0, "row", range(30))
    here, there = selector.pick(z, u, np.arange(30)), selector.pick(z.cuda(), u, np.arange(30), chunk=11)
    for f in fields(Picked):
        a, b = getattr(here, f.name), getattr(there, f.name)
        assert a is b is None or a.shape == b.shape
        if a is not None and a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert (here.ids == there.ids).mean() > 0.999
