"""Training from a store: targets, loss, batches and Trainer, each against a plain dense reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from llm_analysis.core import InputError, WorldError
from llm_analysis.logits import v2
from llm_analysis.logits.distil import DistillationDataCollator, distillation_loss, plain_head
from llm_analysis.logits.loss import sparse_kd_loss
from llm_analysis.logits.nucleus import Nucleus
from llm_analysis.logits.picked import TEMPERATURES, concatenate, estimate
from llm_analysis.logits.select import TopK, VarOpt, uniforms
from llm_analysis.logits.sparse import SparseTargets, certain, join

torch.set_num_threads(1)
VOCAB = 50
selectors = st.sampled_from(
    [VarOpt(), VarOpt(size=1), VarOpt(size=7), VarOpt(1e-2, 9), TopK(1), TopK(6), Nucleus(0.7, 5, 3)]
)
few = settings(max_examples=25, deadline=None)


def rows(count, seed=0, vocab=VOCAB):
    "Peaked, medium and flat logits in turn, float64"
    rng = np.random.default_rng(seed)
    slope = np.resize([4.0, 1.7, 0.5], count)[:, None]
    z = -slope * np.log(np.arange(1, vocab + 1)) + rng.normal(0, 0.3, (count, vocab))
    return torch.from_numpy(rng.permuted(z, axis=1))


def picked(logits, selector, seed=0):
    return selector.pick(logits, uniforms(seed, "test", range(len(logits))))


def same(a: SparseTargets, b: SparseTargets):
    "Whether everything is equal"
    pairs = [(vars(a)[k], vars(b)[k]) for k in vars(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@few
@given(selectors, st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, VOCAB))
def test_targets_are_what_was_picked(selector, sizes, vocab):
    texts = [picked(rows(n, seed=i), selector, i) for i, n in enumerate(sizes)]
    whole = concatenate(texts)
    got = SparseTargets.of(whole, VOCAB)
    dense = torch.zeros(len(whole), VOCAB).scatter_add_(1, got.ids, got.weight)
    assert np.allclose(dense, estimate(whole, VOCAB), atol=1e-6)
    assert same(join([SparseTargets.of(t, VOCAB) for t in texts]), got)
    assert torch.allclose(got.logp.exp().sum(1) + got.tail.exp(), torch.ones(len(whole)), atol=1e-5)
    less, count = got.cut(vocab)
    assert torch.allclose(less.logp.exp().sum(1) + less.tail.exp(), torch.ones(len(whole)), atol=1e-5)
    held = torch.zeros(len(whole), VOCAB).scatter_add_(1, less.ids, less.weight)
    assert torch.equal(held[:, :vocab], dense[:, :vocab]) and not held[:, vocab:].any()
    assert count == (whole.ids >= vocab).sum() and less.vocab == vocab


def reference(z, t: SparseTargets, logits, beta, temperature, tail):
    "Value of each token, entry by entry, from the teacher's own logits, by plain autograd"
    p_all, q_all = ((x / temperature).log_softmax(1) for x in (logits, z))
    found = []
    for k in range(len(t)):
        ids = t.ids[k][t.exact[k]]
        p, q = p_all[k].exp(), q_all[k]
        if tail == "sampled":
            found.append((p * p_all[k]).sum() - (t.weight[k].double() * q[t.ids[k]]).sum())
            continue
        if tail == "none":
            p = p[ids] / p[ids].sum()
            found.append((p * (p.log() - q[ids])).sum())
            continue
        out = torch.ones(VOCAB, dtype=torch.bool)
        out[ids] = False
        p, q = p[ids].log(), q[ids]
        if out.any():  # else there is no bucket
            p = torch.cat([p, p_all[k][out].logsumexp(0)[None]])
            q = torch.cat([q, q_all[k][out].logsumexp(0)[None]])
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        kl = lambda x, y: (x.exp() * (x - y)).sum()
        found.append([kl(p, q), beta * kl(p, m) + (1 - beta) * kl(q, m), kl(q, p)][int(np.ceil(beta) + (beta == 1))])
    return torch.stack(found)


WAYS = [(0.0, 1.0, "sampled"), (0.0, 1.0, "none"), (0.0, 4.0, "none"), (0.0, 1.0, "bucket"), (0.0, 2.0, "bucket")]
WAYS += [(0.2, 1.0, "bucket"), (0.7, 1.5, "bucket"), (1.0, 1.0, "bucket"), (1.0, 4.0, "bucket")]


@few
@given(st.sampled_from(WAYS), selectors, st.integers(1, 7), st.sampled_from(["mean", "sum"]), st.integers(0, 99))
def test_loss_is_the_reference(way, selector, chunk, reduction, seed):
    beta, temperature, tail = way
    logits = rows(6, seed)
    t = SparseTargets.of(picked(logits, selector, seed), VOCAB)
    if tail == "none" and not t.exact.any(1).all():
        return
    if tail == "sampled" and not t.whole.all():
        with pytest.raises(InputError, match="targets with a tail that nothing stands for; take tail='bucket'"):
            sparse_kd_loss(
                torch.zeros(6, VOCAB), t, reduction=reduction, beta=beta, temperature=temperature, tail=tail
            )
        return
    torch.manual_seed(seed)
    h, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 8), (VOCAB, 8), (VOCAB,)))
    head = torch.nn.Linear(8, VOCAB, dtype=torch.float64)
    head.weight.data, head.bias.data = w.detach(), b.detach()
    how = dict(beta=beta, temperature=temperature, tail=tail, chunk=chunk)
    want = getattr(reference(h @ w.T + b, t, logits, beta, temperature, tail), reduction)()
    slopes = torch.autograd.grad(want, (h, w, b))
    got = sparse_kd_loss((h, head), t, reduction=reduction, **how)
    assert got.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-5)
    for x, y in zip(torch.autograd.grad(got, (h, head.weight, head.bias)), slopes):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)
    z = (h @ w.T + b).detach().requires_grad_()
    each = sparse_kd_loss(z, t, reduction="none", **how)
    assert getattr(each, reduction)().item() == pytest.approx(got.item(), rel=1e-9)
    (by_z,) = torch.autograd.grad(getattr(each, reduction)(), z)
    assert torch.allclose(by_z @ w, slopes[0], rtol=1e-4, atol=1e-5)


@few
@given(st.sampled_from([w for w in WAYS if w[2] == "bucket"]), st.integers(1, VOCAB), st.integers(0, 99))
def test_bucket_is_a_lower_bound(way, k, seed):
    beta, temperature, _ = way
    logits, z = rows(30, seed), rows(30, seed + 100)
    every = SparseTargets.of(picked(logits, TopK(VOCAB)), VOCAB)
    truth = reference(z, every, logits, beta, temperature, "bucket" if beta else "none")
    t = SparseTargets.of(picked(logits, TopK(k)), VOCAB)
    got = sparse_kd_loss(z, t, beta=beta, temperature=temperature, tail="bucket", reduction="none")
    assert (got <= truth + 1e-4).all() and (got >= -1e-4).all()
    if k == VOCAB:
        assert torch.allclose(got, truth, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
def test_nothing_left_stays_nothing_when_heated(temperature):
    logits, z = rows(300, 7), rows(300, 8)
    t = SparseTargets.of(picked(logits, VarOpt(size=VOCAB)), VOCAB)
    for beta in (0.0, 0.5, 1.0):
        got = sparse_kd_loss(z, t, beta=beta, temperature=temperature, tail="bucket", reduction="none")
        assert torch.allclose(got, reference(z, t, logits, beta, temperature, "bucket"), atol=1e-5)


def test_sampled_is_unbiased_and_scaled_up_is_not():
    draws, logits, z = 4000, rows(3, seed=5), rows(3, seed=6)
    p, q = logits.log_softmax(1), z.log_softmax(1)
    truth = (p.exp() * (p - q)).sum(1)
    for k in range(3):
        off = {}
        for selector in (VarOpt(size=5), Nucleus(0.5, 4, 4), TopK(8)):
            tail = "none" if isinstance(selector, TopK) else "sampled"
            lots = picked(logits[k].expand(draws, -1), selector, seed=k)
            x = z[k].repeat(draws, 1).requires_grad_()
            each = sparse_kd_loss(x, SparseTargets.of(lots, VOCAB), tail=tail, reduction="none")
            (slope,) = torch.autograd.grad(each.sum(), x)
            value = (each.detach() - truth[k].detach(), each.detach().std())
            along = (slope - (q[k].exp() - p[k].exp())) @ torch.randn(VOCAB, 5, dtype=torch.float64)
            along = along.detach()
            score = [v.mean().abs() / (s / draws**0.5 + 1e-7) for v, s in (value, *((a, a.std()) for a in along.T))]
            off[selector] = max(map(float, score))
        assert off.pop(TopK(8)) > 100
        assert max(off.values()) < 4.5


def test_half_precision_and_frozen_heads():
    torch.manual_seed(0)
    t = SparseTargets.of(picked(rows(40), VarOpt(size=8)), VOCAB)
    h, head = torch.randn(40, 16, requires_grad=True), torch.nn.Linear(16, VOCAB)
    sparse_kd_loss((h, head), t).backward()
    low, small = h.detach().bfloat16().requires_grad_(), torch.nn.Linear(16, VOCAB).bfloat16()
    small.load_state_dict(head.state_dict())
    sparse_kd_loss((low, small), t).backward()
    assert low.grad.dtype == small.weight.grad.dtype == torch.bfloat16
    assert F.cosine_similarity(low.grad.float().flatten(), h.grad.flatten(), dim=0) > 0.999
    frozen, again = head.requires_grad_(False), h.detach().requires_grad_()
    sparse_kd_loss((again, frozen), t, chunk=7).backward()
    assert torch.allclose(again.grad, h.grad, atol=1e-7)
    with torch.no_grad():
        assert sparse_kd_loss((h, head), t).item() == pytest.approx(sparse_kd_loss(head(h), t).item(), rel=1e-5)


def test_nothing_is_made_up():
    t = SparseTargets.of(picked(rows(4), VarOpt(size=6)), VOCAB)
    z = rows(4, seed=1)
    blind, plain = replace(t, entropy=t.entropy * torch.nan), sparse_kd_loss(z, t, reduction="none")
    assert torch.allclose(sparse_kd_loss(z, blind, reduction="none"), plain + t.entropy)
    for bad in (
        dict(beta=0.5),
        dict(beta=1.0, tail="none"),
        dict(beta=-0.1),
        dict(temperature=2.0),
        dict(temperature=3.0),
    ):
        with pytest.raises(InputError):
            sparse_kd_loss(z, t, **bad)
    for T in TEMPERATURES:
        with pytest.raises(InputError, match="log-sum-exp"):
            sparse_kd_loss(z, replace(t, tempered=None), temperature=T, tail="bucket")
    with pytest.raises(InputError, match=r"targets.cut\(40\)"):
        sparse_kd_loss(z[:, :40], t)


# batches


def network(seed, vocab=VOCAB, width=24, tie=False):
    torch.manual_seed(seed)
    size = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=vocab, num_key_value_heads=1, tie_word_embeddings=tie, **size)
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 15
    return model


@torch.no_grad()
def store(model, count, selector, seed=0, shift=0, check=True, dtype=torch.float32):
    "Rows of random texts with random targets; with a shift, distributions of the wrong places"
    rng, found = np.random.default_rng(seed), []
    for k in range(count):
        text = rng.integers(0, VOCAB, rng.integers(4, 15))
        at = np.sort(rng.choice(np.arange(2, len(text) - 1), rng.integers(1, len(text) - 2), replace=False))
        logits = model(torch.from_numpy(text)[None]).logits[0, at - 1 + shift]
        p = selector.pick(logits.to(dtype), uniforms(seed, k, at), text[at + shift])
        p = p if check else replace(p, target=p.target * np.nan)
        found.append(dict(input_ids=text, positions=at, picked=p, other="column"))
    return found


def graded(model, batch, **way):
    "Loss and gradients"
    model.zero_grad()
    loss, cut = distillation_loss(model, batch, **way)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).clone(), cut


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_model_agrees_with_itself(pack, fused):
    "The divergence of a model from its own store is 0, and from one that is shifted by one it is not"
    model, collate = network(0), DistillationDataCollator(VOCAB, pack=pack)
    right = distillation_loss(model, collate(store(model, 9, VarOpt(size=VOCAB))), fused=fused)[0]
    assert abs(right.item()) < 1e-5
    for shift in (-1, 1):
        wrong = store(model, 9, VarOpt(size=VOCAB), shift=shift, check=False)
        assert distillation_loss(model, collate(wrong), fused=fused)[0] > 0.3
        with pytest.raises(WorldError, match="shift by one"):
            collate(store(model, 9, VarOpt(size=VOCAB), shift=shift))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), selectors, st.sampled_from([0.0, 0.4, 1.0]), st.booleans(), st.integers(0, 9))
def test_packed_is_padded(count, selector, alpha, tie, seed):
    teacher, student = network(0), network(1, tie=tie)
    data = store(teacher, count, selector, seed)
    tail = "none" if isinstance(selector, TopK) else "sampled"
    base = graded(student, DistillationDataCollator(VOCAB)(data), alpha=alpha, tail=tail, fused=False)
    for pack in (False, True):
        got = graded(student, DistillationDataCollator(VOCAB, 7, pack)(data), alpha=alpha, tail=tail, fused=True)
        assert got[0] == pytest.approx(base[0], rel=1e-5)
        assert (got[1] - base[1]).abs().max() < 1e-5 * max(1.0, float(base[1].abs().max()))


@pytest.mark.parametrize("values", ["steps", "bf16"])
def test_from_the_format(values):
    "Rows that went through v2 train as those that did not, to its rounding"
    low = torch.bfloat16 if values == "bf16" else torch.float32
    data, about = store(network(0), 12, VarOpt(size=12), dtype=low), v2.describe(VOCAB, values=values)
    samples = [
        v2.Sample(k, np.int32(r["input_ids"]), np.int32(r["positions"]), r["picked"]) for k, r in enumerate(data)
    ]
    table = v2.table([v2.encode(s, about) for s in samples], about)
    back = [v2.decode(row, v2.described(table.schema)) for row in table.to_pylist()]
    collate, student = DistillationDataCollator(VOCAB), network(1)
    before, after = (graded(student, collate(rows)) for rows in (data, back))
    assert after[0] == pytest.approx(before[0], abs=0.02)
    assert F.cosine_similarity(before[1], after[1], dim=0) > 0.999
    with pytest.raises(InputError, match="v1 does not hold them"):
        collate([replace(back[0], input_ids=None)])


def test_labels_alone_are_the_models_own_loss():
    student, data = network(1), store(network(0), 5, VarOpt())
    batch = DistillationDataCollator(VOCAB)(data)
    own = student(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    assert distillation_loss(student, batch, alpha=1.0)[0].item() == pytest.approx(own.item(), rel=1e-5)


def test_rows_without_targets_and_wrong_rows():
    data = store(network(0), 3, VarOpt())
    none = dict(input_ids=np.arange(5), positions=[], picked=VarOpt().pick(torch.zeros(0, VOCAB), np.zeros(0)))
    collate, student = DistillationDataCollator(VOCAB), network(1)
    value, slope, _ = graded(student, collate([none]), alpha=0.5)
    assert value == 0 and not slope.any()
    assert graded(student, collate([none, *data]))[0] == pytest.approx(graded(student, collate(data))[0], rel=1e-5)
    for bad in (dict(positions=data[0]["positions"] - 2), dict(positions=data[0]["positions"][::-1] + 1)):
        with pytest.raises((InputError, WorldError)):
            collate([data[0] | bad])
    with pytest.raises(InputError, match="at least one row"):
        collate([])


def test_capped_heads_make_their_own_logits():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
    for cap in (None, 30.0):
        config = Gemma2Config(vocab_size=VOCAB, num_key_value_heads=1, final_logit_softcapping=cap, **size)
        model = Gemma2ForCausalLM(config)
        model.train()
        assert plain_head(model) == (cap is None) and model.training
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data * 200)
    model.eval()
    own = distillation_loss(model, DistillationDataCollator(VOCAB)(store(model, 5, VarOpt(size=VOCAB))))[0]
    assert abs(own.item()) < 1e-4


# Trainer


def trainer(student, data, tmp_path, cls=None, collate=None, **more):
    pytest.importorskip("accelerate", reason="needs the extra `train`: pip install -e '.[train]'")
    from transformers import PrinterCallback, TrainingArguments

    from llm_analysis.logits.distil import DistillationTrainer

    options = dict(max_steps=3, optim="sgd", learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.0)
    options |= dict(report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1)
    own = {k: more.pop(k) for k in ("alpha", "beta", "tail", "temperature", "chunk") if k in more}
    arguments = TrainingArguments(str(tmp_path), **(options | more))
    collate = collate or DistillationDataCollator(VOCAB)
    kind = cls or DistillationTrainer
    made = kind(student, arguments, data_collator=collate, train_dataset=data, eval_dataset=data[:5], **own)
    made.remove_callback(PrinterCallback)
    return made


def after(made):
    made.train()
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("pack", [False, True])
def test_spread_over_small_batches(tmp_path, alpha, pack):
    data, collate = store(network(0), 16, VarOpt()), DistillationDataCollator(VOCAB, pack=pack)
    size = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, alpha=alpha, collate=collate)
    one = after(trainer(network(1), data, tmp_path, **size))
    size |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    two = after(trainer(network(1), data, tmp_path, **size))
    start = torch.cat([p.detach().flatten() for p in network(1).parameters()])
    assert (one - start).abs().max() > 1e-3
    assert (one - two).abs().max() < 1e-3 * (one - start).abs().max()


def test_labels_alone_are_the_plain_trainer(tmp_path):
    "With alpha=1 every weight moves as under transformers' own Trainer and loss"
    pytest.importorskip("accelerate")
    from transformers import Trainer

    data = store(network(0), 16, VarOpt())
    size = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    mine = after(trainer(network(1), data, tmp_path, alpha=1.0, **size))
    bare = lambda rows: {
        k: v for k, v in DistillationDataCollator(VOCAB)(rows).items() if k not in ("targets", "shift_labels")
    }
    own = dict(cls=Trainer, collate=bare, remove_unused_columns=False)
    theirs = after(trainer(network(1), data, tmp_path, **own, **size))
    assert (mine - theirs).abs().max() < 1e-5


def test_it_learns_evaluates_and_counts(tmp_path):
    data = store(network(0), 24, VarOpt(size=VOCAB))
    made = trainer(network(1), data, tmp_path, max_steps=40, optim="adamw_torch", learning_rate=3e-3)
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < 0.6 * before and made.lost == 0
    fits = [r for r in data if r["input_ids"].max() < 45]
    narrow = trainer(network(1, vocab=45), fits, tmp_path, max_steps=2, per_device_train_batch_size=len(fits))
    narrow.train()
    assert narrow.lost == 2 * sum((r["picked"].ids >= 45).sum() for r in fits) > 0


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="label smoothing"):
        trainer(network(1), store(network(0), 5, VarOpt()), tmp_path, label_smoothing_factor=0.1)


def test_certain_targets_are_labels():
    z, ids = rows(6), torch.arange(6)
    for tail in ("sampled", "bucket", "none"):
        assert sparse_kd_loss(z, certain(ids, VOCAB), tail=tail).item() == pytest.approx(
            F.cross_entropy(z, ids).item()
        )


def test_mixed_precision_and_recomputed_activations(tmp_path):
    data = store(network(0), 24, VarOpt(size=VOCAB))
    size = dict(max_steps=40, optim="adamw_torch", learning_rate=3e-3, bf16=True)
    made = trainer(network(1), data, tmp_path, **size)
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < 0.6 * before
    batch = made.data_collator(data[:4])
    base, again = graded(network(2), batch), network(2).train()
    again.activation_checkpointing_enable()
    assert torch.allclose(graded(again, batch)[1], base[1], atol=1e-6)


def test_trl(tmp_path):
    pytest.importorskip("accelerate", reason="needs the extra `train`: pip install -e '.[train]'")
    trl = pytest.importorskip("trl", reason="works with TRL's SFTTrainer where it is installed")
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    from llm_analysis.lm.model import TINY
    from llm_analysis.logits.distil import DistillationMixin

    class Mine(DistillationMixin, trl.SFTTrainer):
        "TRL's trainer on a store"

    data = store(network(0), 24, VarOpt(size=VOCAB))
    rows = Dataset.from_dict({"index": list(range(len(data)))})
    rows = rows.with_transform(lambda b: {k: [data[i][k] for i in b["index"]] for k in data[0]})
    options = dict(max_steps=40, learning_rate=3e-3, report_to=[], use_cpu=True, bf16=False, save_strategy="no")
    options |= dict(dataset_kwargs={"skip_prepare_dataset": True}, logging_steps=1, disable_tqdm=True)
    given = dict(data_collator=DistillationDataCollator(VOCAB), train_dataset=rows)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    made = Mine(network(1), trl.SFTConfig(str(tmp_path), **options), processing_class=tokenizer, **given)
    made.remove_callback(PrinterCallback)
    made.train()
    fell = [x["loss"] for x in made.state.log_history if "loss" in x]
    assert fell[-1] < 0.6 * fell[0]
