"""Stored distributions against the truth: every template shape, truncation and layout, each target where it belongs.

Which tokens are targets is written by hand (`chat_templates`, `test_chat.stands_for`). What they are worth is known in
two ways that share nothing with the package: a plain forward of one row through a random model in which every token
matters, and a model made of a table, whose probabilities are the table's and need no forward at all."""

import json
import math
import warnings
from collections import defaultdict
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from chat_templates import MORE, SHAPES, SHOUT, STRICT
from test_chat import CHANGING, CHAT, byte_level, labels, made, stands_for
from transformers import AutoConfig, AutoModelForCausalLM

from llm_analysis.core import InputError
from llm_analysis.lm import routes
from llm_analysis.lm.model import LM
from llm_analysis.logits import extract as module
from llm_analysis.logits import run as running
from llm_analysis.logits import texts, v1, v2
from llm_analysis.logits.extract import Extract, Request, Selection
from llm_analysis.logits.texts import Reading

torch.set_num_threads(1)
EVERY = [*SHAPES, *MORE]
TOK = byte_level()
WIDTH = 300  # of the output: more entries than the tokenizer has
LAYOUTS = ("packed", "padded", "bucket", "varlen")
SHORT = [dict(role="user", content="Who?"), dict(role="assistant", content="Caröl"), dict(role="user", content="Why?")]
CHATS = [
    CHAT,
    CHAT[:3],
    [*SHORT, dict(role="assistant", content="Because."), *SHORT[2:], dict(role="assistant", content="So it is.")],
    [dict(role="user", content="a b c " * 40), dict(role="assistant", content="It was long.")],
    SHORT,  # ends with a question
]


# ---- two models that are known -------------------------------------------------------------------------------------


def opened(model, name: str) -> LM:
    return LM(name, model.eval().requires_grad_(False), TOK, None, f"{name}-made", torch.device("cpu"), torch.float32)


@cache
def wild() -> LM:
    "A random model so wide that each token changes every later answer"
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model("llama", vocab_size=WIDTH, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, 0, 1.5 / p.shape[-1] ** 0.5)
    return opened(model, "wild")


@cache
def table() -> np.ndarray:
    "log p(next | token), of all tokens"
    z = np.random.default_rng(1).normal(0, 3, (WIDTH, WIDTH))
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@cache
def known() -> LM:
    "A model that says the table: its blocks add nothing, each token is a direction of its own, the head is the table"
    sizes = dict(hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4)
    config = AutoConfig.for_model(
        "llama", vocab_size=WIDTH, num_key_value_heads=4, head_dim=2, rms_norm_eps=1e-12, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        block = model.model.layers[0]
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(WIDTH))
        model.lm_head.weight.copy_(torch.from_numpy(table().T / math.sqrt(WIDTH)))
    return opened(model, "known")


@cache
def forward(ids: tuple[int, ...]) -> np.ndarray:
    "log p(next | all before), of all tokens: one row, the library's defaults, float64"
    with torch.no_grad():
        return wild().model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


def truth(lm: LM, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    "The distributions that predict the tokens at some positions"
    return table()[ids[positions - 1]] if lm.name == "known" else forward(tuple(ids.tolist()))[positions - 1]


# ---- what a row must be, by hand -----------------------------------------------------------------------------------


@cache
def by_hand(name: str, chat: int, limit: int | None, side: str) -> tuple[list[int], list[int]]:
    "Its ids and the positions of its targets"
    shape = next(s for s in EVERY if s.name == name)
    own, text = labels(shape, CHATS[chat])
    ids = TOK(text, add_special_tokens=False, verbose=False)["input_ids"]
    hand = [any(own[k] is not None for k in ks) for ks in stands_for(TOK, text, ids)]
    keep = (
        slice(None) if limit is None or side == "none" else slice(0, limit) if side == "right" else slice(-limit, None)
    )
    return ids[keep], [p for p, is_target in enumerate(hand[keep]) if is_target and p > 0]


def said(shape, chat: int) -> list[str]:
    "What the assistant says, in turn, as the shape's own hand writes it"
    runs, last = [], None
    for text, own in shape.hand(CHATS[chat], False):
        if own is not None and own == last:
            runs[-1] += text
        elif own is not None:
            runs.append(text)
        last = own
    return runs


@cache
def program(shape):
    return made(shape.source)


def rows_of(shape) -> list[dict]:
    takes = lambda c: shape.system or c[0]["role"] != "system"
    return [dict(index=i, messages=c) for i, c in enumerate(CHATS) if takes(c)]


def judge(lm: LM, shape, samples, rows: list[dict], reading: Reading) -> int:
    "Hold what was stored of some rows against the truth; how many targets"
    wanted = {r["index"]: by_hand(shape.name, r["index"], reading.max_seq_len, reading.truncate) for r in rows}
    assert sorted(s.index for s in samples) == sorted(i for i, (_, positions) in wanted.items() if positions)
    for s in samples:
        ids, positions = wanted[s.index]
        assert s.input_ids.tolist() == ids and s.positions.tolist() == positions and len(s.picked) > 0
        whole = truth(lm, s.input_ids, s.positions)
        here = whole[np.arange(len(positions)), s.input_ids[s.positions]]
        assert np.abs(s.picked.target - here).max() <= 1e-3
        exact, of = ~s.picked.by_lot, np.repeat(np.arange(len(positions)), s.picked.exact + s.picked.sampled)
        assert np.abs(s.picked.logp - whole[of, s.picked.ids])[exact].max() <= 1 / 32
        assert np.abs(s.picked.entropy + (np.exp(whole) * whole).sum(1)).max() <= 2e-3
        weight = np.bincount(of, s.picked.weights(), len(positions))
        assert np.abs(weight - 1).max() <= 1e-6
    return sum(len(s.positions) for s in samples)


def stored(step: Extract, rows: list[dict]) -> list:
    "Through both halves of the step, as a job does it, and back"
    kept = [r for r in rows if step.leave_out(r) is None]
    if not kept:
        return []
    found = step.postprocess(step.process(kept), kept)
    own = v2 if step.request.format == "v2" else v1
    about = own.described(found.schema)
    return [own.decode(row, about) for row in found.to_pylist()]


def readings(shape) -> list[Reading]:
    "Whole, and cut to a third of the longest on either side"
    n = max(len(by_hand(shape.name, r["index"], None, "none")[0]) for r in rows_of(shape)) // 3
    today = "2024-02-29"
    return [Reading(today=today), *(Reading(max_seq_len=n, truncate=s, today=today) for s in ("left", "right"))]


# ---- every shape ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def written_once():
    "A template writes a conversation once: what is tried here begins with its text"
    write, seen = texts.conversation, {}

    def remembered(row, template, **how):
        key = json.dumps(row), template and template.sha256, str(how)
        return seen[key] if key in seen else seen.setdefault(key, write(row, template, **how))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "conversation", remembered)
        yield


@pytest.fixture(autouse=True)
def no_other_route():
    "A route that is not taken says so by a warning: here it is an error"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def test_there_are_enough():
    assert len(EVERY) >= 25 and len({s.source for s in EVERY}) == len(EVERY)
    assert all(routes.proven(wild(), route, 1024).holds for route in LAYOUTS)


@pytest.mark.parametrize("shape", EVERY, ids=lambda s: s.name)
def test_every_target_is_where_it_belongs(shape):
    rows, counts = rows_of(shape), defaultdict(set)
    for reading in readings(shape):
        every = reading.truncate == "none" and EVERY.index(shape) % 3 == 0
        for route in LAYOUTS if every else LAYOUTS[:2]:
            step = Extract(wild(), Request(reading=reading, route=route, batch_tokens=1024), program(shape))
            counts[reading].add(judge(wild(), shape, stored(step, rows), rows, reading))
    assert all(len(found) == 1 and found.pop() > 0 for found in counts.values())


@pytest.mark.parametrize("shape", EVERY, ids=lambda s: s.name)
def test_against_a_table(shape):
    "No forward is asked for the truth; and the targets say what the assistant said, no more than a blank beside it"
    rows, reading = rows_of(shape), readings(shape)[0]
    step = Extract(known(), Request(reading=reading, route="packed", batch_tokens=1024), program(shape))
    samples = stored(step, rows)
    assert judge(known(), shape, samples, rows, reading) > 0
    for s in samples:
        p = s.positions
        runs = np.split(s.input_ids[p], np.flatnonzero(np.diff(p) > 1) + 1)
        heard, told = "".join(map(TOK.decode, runs)), said(shape, s.index)
        if s.positions[0] > 1:  # else its first token has nothing before it
            assert len(heard) - len("".join(told)) in range(len(told) + 1)
            at = 0
            for words in told:
                assert (at := heard.find(words, at)) >= 0
                at += len(words)


@pytest.mark.parametrize("shape", EVERY[::3], ids=lambda s: s.name)
def test_the_compatible_format(shape):
    "It has no positions; each of its rows is the distribution that the next target of the text was drawn from"
    rows, reading = rows_of(shape), readings(shape)[1]
    request = Request("v1", reading=reading, selection=Selection(top_p=0.9), route="packed", batch_tokens=1024)
    step = Extract(wild(), request, program(shape))
    kept = [r["index"] for r in rows if step.leave_out(r) is None]
    found = stored(step, rows)
    assert len(found) == len(kept) > 0
    for i, picked in zip(kept, found):
        ids, positions = map(np.array, by_hand(shape.name, i, reading.max_seq_len, reading.truncate))
        assert len(picked) == len(positions)
        whole = truth(wild(), ids, positions)
        of = np.repeat(np.arange(len(positions)), picked.exact + picked.sampled)
        assert np.abs(picked.logp - whole[of, picked.ids]).max() <= 1e-3
        mass = np.bincount(of[~picked.by_lot], np.exp(whole[of, picked.ids])[~picked.by_lot], len(positions))
        assert ((mass >= 0.9 - 1e-6) | (picked.exact == 100)).all()


# ---- what cannot be told is refused --------------------------------------------------------------------------------


def test_what_cannot_be_told_is_left_out_with_its_reason(tmp_path):
    told = [dict(role="user", content="Hi"), dict(role="assistant", content='Some "short"\nlines here')]
    sources = CHANGING | {"shout": SHOUT, "says nothing": "{% for m in messages %}{{ m.role }}{% endfor %}"}
    for name, source in sources.items():
        step = Extract(wild(), Request(), made(source))
        reason = step.leave_out(dict(index=0, messages=told))
        assert reason and len(step.text(dict(index=0, messages=told)).positions) == 0, name
    strict = Extract(wild(), Request(), made(STRICT))
    assert "alternate" in strict.leave_out(dict(index=0, messages=CHAT))
    data, words = tmp_path / "mine.jsonl", tmp_path / "shout.jinja"
    data.write_text(json.dumps(dict(messages=told)) + "\n")
    words.write_text(SHOUT)
    with pytest.raises(InputError, match="a target in one of the first 1 rows; got 1 without: .*changes"):
        running.extract(str(data), output_dir=tmp_path / "out", chat_template=words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_row_is_ever_written_without_a_target(side):
    "Cut to any length, a row has targets or a reason"
    shape, rows = EVERY[5], [dict(index=i, messages=c) for i, c in enumerate(CHATS)]
    longest, out = max(len(by_hand(shape.name, i, None, "none")[0]) for i in range(len(CHATS))), 0
    for n in (2, 3, 5, 9, 17, 30, longest - 1, longest):
        reading = Reading(max_seq_len=n, truncate=side)
        step = Extract(wild(), Request(reading=reading, route="padded"), program(shape))
        judge(wild(), shape, stored(step, rows), rows, reading)
        reasons = [step.leave_out(r) for r in rows]
        out += sum(r is not None for r in reasons)
        assert all(r is None or "target" in r for r in reasons)
    assert out > 0
    step = Extract(wild(), Request(reading=Reading(max_seq_len=longest - 1)), program(shape))
    out = [step.leave_out(r) for r in rows if step.leave_out(r)]
    assert out == [f"too long: more than {longest - 1} tokens"]


# ---- the judge can convict -----------------------------------------------------------------------------------------


def one_late(picks, stream, read):
    "Each target gets the distribution that was drawn from after it"
    return dict(stream_logits=lambda lm, ids, reads, **how: stream(lm, ids, [r + 1 for r in reads], **how))


def one_early(picks, stream, read):
    back = lambda r: np.maximum(r - 1, 0) + (np.arange(len(r)) if len(r) and r[0] == 0 else 0)
    return dict(stream_logits=lambda lm, ids, reads, **how: stream(lm, ids, [back(r) for r in reads], **how))


def other_rows(picks, stream, read):
    "The logits of another row"
    return dict(picks=lambda *a, **k: picks(*a, **k)[::-1])


def mask_by_one(picks, stream, read):
    def shifted(*args):
        text = read(*args)
        return replace(text, positions=text.positions[:-1] + 0)

    return dict(read=shifted)


def mask_moved(picks, stream, read):
    def shifted(*args):
        text = read(*args)
        return replace(text, positions=text.positions - (text.positions > 1))

    return dict(read=shifted)


@pytest.mark.parametrize("fault", [one_late, one_early, other_rows, mask_by_one, mask_moved])
@pytest.mark.parametrize("lm", [wild, known])
def test_the_judge_can_convict(monkeypatch, fault, lm):
    shape, reading = EVERY[5], Reading()
    rows = [dict(index=i, messages=CHATS[i]) for i in (1, 1 + 1)]
    step = lambda: Extract(lm(), Request(reading=reading, route="padded"), program(shape))
    assert judge(lm(), shape, stored(step(), rows), rows, reading) > 0
    for name, wrong in fault(module.picks, module.stream_logits, module.read).items():
        monkeypatch.setattr(module, name, wrong)
    with pytest.raises((AssertionError, ValueError)) as caught:
        judge(lm(), shape, stored(step(), rows), rows, reading)
    assert caught.type is AssertionError or fault is other_rows
