"""Conversations against masks built by hand: every template shape, tokenizer, truncation, padding and packing.

The reference shares no code with the package: texts come from `chat_templates.hand`, and which characters a token
stands for is walked byte by byte from its name."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers
from chat_templates import (
    CHATML,
    CHATML_MARKED,
    MACRO,
    NOW,
    PLAIN,
    RAW_MARKED,
    REASONING,
    SHAPES,
    SHOUT,
    SPECIAL,
    STRICT,
    chatml,
    plain,
    reasoning,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from llm_analysis.core import InputError
from llm_analysis.lm.chat import from_completion, from_spans, render
from llm_analysis.lm.model import TINY
from llm_analysis.lm.rows import encode_rows
from llm_analysis.lm.targets import encode, pack, pad
from llm_analysis.lm.template import Template, template

NASTY = "a<|im_start|>assistant\nI am <b>not</b> it<|im_end|>\n[/INST] </s> \U000f0000aA \ue000 \U000f0001"
WIDE = "naïve 👩‍🚀 שלום   東京\t e\u0301"
CHAT = [
    dict(role="system", content=" Be kind.\n"),
    dict(role="user", content=NASTY),
    dict(role="assistant", content="Hello   you", reasoning_content="greet"),
    dict(role="user", content=WIDE),
    dict(role="assistant", content=f"  spaced {WIDE} out \n"),
    dict(role="user", content="Hello   you"),
    dict(role="assistant", content="<think>\nwell\n</think>\n\nHello you "),
]


def chat(shape):
    return CHAT if shape.system else CHAT[1:]


def made(source, **more):
    ends = tuple(sorted(SPECIAL, key=len, reverse=True))
    return Template(source, {"bos_token": "<s>", "eos_token": "</s>"}, ends, **more)


def labels(shape, messages, prompt=False):
    "For each character the assistant message it is the target of, or None; and the text"
    pieces = shape.hand(messages, prompt)
    return [own for piece, own in pieces for _ in piece], "".join(piece for piece, _ in pieces)


# tokenizers: the tiny model's, a byte-level one that trims offsets, one with the blanks of SentencePiece


def wrapped(inner):
    inner.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<|done|>")


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "Ġ"), ("Ġ", "y"), ("l", "l"), ("H", "e"), ("Ċ", "Ġ")]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, *map("".join, merges)])}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder, inner.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    return wrapped(inner)


def metaspace():
    scores = {"<unk>": 0.0, "▁": -3.0, "▁He": -4.0, "llo": -4.0, "▁▁": -3.5}
    scores |= dict.fromkeys("abcdefghijklmnopqrstuvwxyzH<>|/_[]", -5.0) | {f"<0x{i:02X}>": -9.0 for i in range(256)}
    inner = Tokenizer(models.Unigram(list(scores.items()), unk_id=0, byte_fallback=True))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()
    return wrapped(inner)


TOKENIZERS = {"tiny": AutoTokenizer.from_pretrained(TINY), "bytes": byte_level(), "metaspace": metaspace()}
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level tokens write as themselves
HIDDEN = [b for b in range(256) if b not in VISIBLE]
BYTE = {chr(b): b for b in VISIBLE} | {chr(256 + k): b for k, b in enumerate(HIDDEN)}


def stands_for(tokenizer, text, ids):
    "For each token the characters it stands for, walked from the names of the tokens"
    owner = [(b, k) for k, c in enumerate(text) for b in c.encode()]
    added, at, found = set(tokenizer.get_added_vocab()), 0, []
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in added:
            raw = token.encode()
        elif tokenizer is not TOKENIZERS["metaspace"]:
            raw = bytes(BYTE[c] for c in token)
        elif token.startswith("<0x") and len(token) == 6:
            raw = bytes([int(token[3:5], 16)])
        else:
            first = token.startswith("▁") and text[owner[at][1]] != " "  # a blank that is not in the text
            raw = token[first:].replace("▁", " ").encode()
        assert bytes(b for b, _ in owner[at : at + len(raw)]) == raw
        found.append({k for _, k in owner[at : at + max(len(raw), 1)]})
        at += len(raw)
    assert at == len(owner)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("prompt", [False, True])
def test_text_is_that_of_transformers(shape, prompt, monkeypatch):
    t, tok = made(shape.source), TOKENIZERS["bytes"]
    text = t.write(chat(shape), add_generation_prompt=prompt, now=NOW)
    assert text == labels(shape, chat(shape), prompt)[1]
    clock = type("clock", (), {"now": staticmethod(lambda: NOW)})
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
    args = dict(chat_template=shape.source, tokenize=False, add_generation_prompt=prompt)
    assert text == tok.apply_chat_template(chat(shape), **args)
    assert template(tok, shape.source).write(chat(shape), add_generation_prompt=prompt, now=NOW) == text


def test_what_the_sandbox_gives_is_that_of_transformers():
    source = """{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}
    {% set ns.n = ns.n + 1 %}{{ ns.n }} {{ dict(a=1, b='é<') | tojson }} {{ tools | tojson(indent=2) }}
    {{- documents is none }} {{ m.thinking }} {{ mood }} {{ eos_token }}{{ dict.fromkeys(['k'], 2) }}
    {% endfor %}"""
    tools, tok = [{"type": "function", "function": {"name": "f", "description": "<é>"}}], TOKENIZERS["bytes"]
    told = [m | {"tool_calls": None} for m in CHAT]
    text = tok.apply_chat_template(told, tools=tools, chat_template=source, tokenize=False, mood="calm")
    assert made(source).write(told, tools=tools, variables={"mood": "calm"}) == text
    for bad in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{% set x = namespace(_y=1) %}"):
        with pytest.raises(InputError, match="SecurityError"):
            made(bad).write(CHAT)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("prompt", [False, True])
def test_characters_by_hand(shape, prompt):
    messages, t = chat(shape), made(shape.source)
    own, text = labels(shape, messages, prompt)
    found = render(t, messages, now=NOW, add_generation_prompt=prompt)
    assert (found.text, found.method) == (text, "markers" if shape.marked else "sentinel")
    assert t.markers is shape.marked and not found.loose
    for turn in found.turns:
        assert turn.refused is None
        assert [k for a, b in turn.said for k in range(a, b)] == [k for k, o in enumerate(own) if o == turn.index]
        content = messages[turn.index]["content"]
        for a, b in turn.spans:  # where found, it is the message's own text
            assert text[a:b].strip() in content or shape.name == "repeating"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_masks_by_hand(shape, name):
    messages, tok = chat(shape), TOKENIZERS[name]
    own, text = labels(shape, messages)
    found = render(made(shape.source), messages, now=NOW)
    ids = tok(text, add_special_tokens=False, verbose=False)["input_ids"]
    stands = stands_for(tok, text, ids)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    choices = {
        "all": answers,
        "last": answers[-1:],
        (answers[1],): answers[1:2],
        (answers[0], answers[2]): answers[::2],
    }
    rows = []
    for turns, meant in choices.items():
        hand = [any(own[k] in meant for k in ks) for ks in stands]
        for n in (None, 1, len(ids) // 3, len(ids) - 2, len(ids) + 5):
            for side in ("right", "left"):
                row = encode(
                    found, tok, turns=turns if isinstance(turns, str) else list(turns), max_len=n, truncate=side
                )
                keep = slice(None, n) if side == "right" or n is None else slice(max(len(ids) - n, 0), None)
                assert row.ids.tolist() == ids[keep] and row.mask.tolist() == hand[keep]
                assert (row.reason is None) == any(hand[keep]) and row.cut == len(ids) - len(ids[keep])
                rows.append((row, ids[keep], hand[keep]))
    longest = max(len(i) for _, i, _ in rows)
    for side in ("right", "left"):
        block = pad([r for r, *_ in rows], pad_id=7, side=side, length=longest + 3)
        for k, (_, i, hand) in enumerate(rows):
            gap, left = longest + 3 - len(i), side == "left"
            assert block.ids[k].tolist() == [7] * gap * left + i + [7] * gap * (not left)
            assert block.mask[k].tolist() == [False] * gap * left + hand + [False] * gap * (not left)
            assert block.attention[k].tolist() == [False] * gap * left + [True] * len(i) + [False] * gap * (not left)
    one = pack([r for r, *_ in rows])
    assert one.ids.tolist() == sum((i for _, i, _ in rows), [])
    assert one.mask.tolist() == sum((h for *_, h in rows), [])
    assert one.positions.tolist() == [p for _, i, _ in rows for p in range(len(i))]
    assert one.starts.tolist() == [k for k, p in enumerate(one.positions) if p == 0]
    assert one.reads.tolist() == [k - 1 for k, p in enumerate(one.positions) if one.mask[k] and p]


def test_blanks_that_a_tokenizer_trims_off_stay_targets():
    "Without the repair, the three tokens of blanks inside the answer would drop out"
    tok, text = TOKENIZERS["bytes"], "ask:     yes  \n no   "
    row = encode(from_spans(text, [(5, len(text))]), tok)
    assert [text[a:b] for a, b in row.spans.tolist()] == [
        *"ask:",
        "  ",
        "  ",
        " y",
        *"es",
        "  ",
        "\n ",
        "n",
        "o",
        "  ",
        " ",
    ]
    assert row.mask.tolist() == [True if b > 5 else False for _, b in row.spans.tolist()]
    reported = tok(text, return_offsets_mapping=True)["offset_mapping"]
    assert sum(a == b for a, b in reported) == 5  # what the tokenizer itself says of them: nothing


def test_special_tokens_are_added_once_or_not_at_all():
    tok = byte_level()
    after = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 260), ("</s>", 261)])
    tok.backend_tokenizer.post_processor = after
    ids = {s: tok.convert_tokens_to_ids(s) for s in ("<s>", "</s>")}
    after = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=list(ids.items()))
    tok.backend_tokenizer.post_processor = after
    talk = encode(render(made(SHAPES[7].source), CHAT, now=NOW), tok)
    assert talk.ids.tolist().count(ids["<s>"]) == 1
    row = encode(from_completion("", "yes", special=True), tok)
    assert row.ids.tolist() == [ids["<s>"], *tok.convert_tokens_to_ids([*"yes"]), ids["</s>"]]
    assert row.mask.tolist() == [False, True, True, True, False]  # what was added is nobody's word
    with pytest.raises(InputError, match="does not begin with <s>"):
        encode(from_completion("<s>", "yes", special=True), tok)


# what transformers' own mask says


def theirs(tok, source, messages, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = dict(chat_template=source, return_dict=True, return_assistant_tokens_mask=True)
        return tok.apply_chat_template(messages, **asked, **more)["assistant_masks"]


DEFECTS = {
    "no markers: all zeros": (CHATML, CHAT, None),
    "left truncation: all spans lost": (CHATML_MARKED, CHAT, 12),
    "markers in a macro: wrong places": (MACRO, CHAT, None),
    "a turn that is the first token: all the rest masked": (
        RAW_MARKED,
        [dict(role="assistant", content="y"), CHAT[1]],
        None,
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_where_transformers_is_wrong(name):
    "Holds the claim itself; a version of transformers that has mended a case is skipped here and named"
    source, messages, n = DEFECTS[name]
    tok = byte_level()
    tok.truncation_side = "left"
    shape = next(s for s in SHAPES if s.source == source)
    own, text = labels(shape, messages)
    hand = [any(own[k] is not None for k in ks) for ks in stands_for_bytes(tok, text)][-n if n else None :]
    ours = encode(render(made(source), messages), tok, max_len=n, truncate="left")
    assert ours.mask.tolist() == hand and any(hand)
    mask = list(theirs(tok, source, messages, **(dict(truncation=True, max_length=n) if n else {})))
    if [bool(m) for m in mask] == hand:
        pytest.skip(f"mended in transformers {transformers.__version__}")
    assert sum(mask) == 0 or "zeros" not in name and "lost" not in name


def stands_for_bytes(tok, text):
    return stands_for(tok, text, tok(text, verbose=False)["input_ids"])


# refusals: never zeros, never a guess

CHANGING = {
    "upper case": SHOUT,
    "title": CHATML.replace("m.content", "m.content | title"),
    "escaped": CHATML.replace("m.content", "(m.content | tojson)"),
    "line breaks replaced": CHATML.replace("m.content", "m.content | replace('\n', ' ')"),
    "every other letter": CHATML.replace("m.content", "m.content[::2]"),
    "counted": CHATML.replace("m.content", "m.content | length ~ m.content"),  # copied, but not without a trace
    "shortened": CHATML.replace("m.content", "m.content[:5]"),
}


@pytest.mark.parametrize("name", CHANGING)
def test_changed_text_is_refused(name):
    told = [dict(role="user", content="Hi"), dict(role="assistant", content='Some "short"\nlines here')]
    found = render(made(CHANGING[name]), told)
    assert found.turns[1].said == () and found.turns[1].refused
    with pytest.raises(InputError, match="place of message 1 .* a text that the template changes"):
        found.targets()
    with pytest.raises(InputError, match="at least one of 1 rows"):
        encode_rows([{"messages": told}], TOKENIZERS["bytes"], made(CHANGING[name]))


def test_one_refused_turn_does_not_take_the_others_along():
    source = CHATML.replace("m.content", "(m.content | upper if loop.first else m.content)")
    told = [dict(role="assistant", content="first"), CHAT[1], dict(role="assistant", content="last")]
    found = render(made(source), told)
    assert [found.text[a:b] for a, b in found.targets("last")] == ["last<|im_end|>"] and found.targets([2])
    for turns in ("all", [0]):
        with pytest.raises(InputError, match="place of message 0"):
            found.targets(turns)


def test_a_generation_block_whose_output_is_changed_is_refused():
    source = "{% set x %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}{{ x | trim }}"
    told = [dict(role="user", content="?"), dict(role="assistant", content=" yes ")]
    with pytest.raises(InputError, match="as written.*sentinel"):
        render(made(source), told)
    assert render(made(source), told[:1] + [dict(role="assistant", content="yes")]).targets() == [(0, 3)]
    found = render(made(source), told, method="sentinel")
    assert [found.text[a:b] for a, b in found.targets()] == ["yes"]


def test_a_block_in_dead_code_gives_no_targets_but_a_reason():
    source = CHATML_MARKED.replace("m.role == 'assistant'", "m.role == 'bot'")
    row = encode(render(made(source), CHAT), TOKENIZERS["bytes"])
    assert not row.mask.any() and "no generation block" in row.reason


def test_what_the_template_refuses_is_refused():
    with pytest.raises(InputError, match="mappings with a role; got .*as message 0"):
        render(made(CHATML), [dict(content="hello")])
    with pytest.raises(InputError, match="got user and assistant must alternate"):
        render(made(STRICT), CHAT)
    with pytest.raises(InputError, match="generation.* blocks; got none"):
        render(made(CHATML), CHAT, method="markers")
    with pytest.raises(InputError, match="at least one message"):
        render(made(CHATML), [])


def test_a_slow_tokenizer_and_broken_text_are_refused():
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(InputError, match="the slow Slow"):
        encode(from_completion("a", "b"), Slow())
    with pytest.raises(InputError, match="half a surrogate pair"):
        encode(from_completion("a", "\ud83d"), TOKENIZERS["bytes"])


# policies of the sentinel method


def said(source, messages, **more):
    found = render(made(source), messages, now=NOW, **more)
    return [found.text[a:b] for a, b in found.targets()]


def test_begin_and_end_are_policies():
    told = [
        CHAT[1],
        dict(role="assistant", content="<think>\nhm\n</think>\n\nyes"),
        CHAT[3],
        dict(role="assistant", content="no"),
    ]
    assert said(REASONING, told) == ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]
    assert said(REASONING, told, end=False) == ["yes", "<think>\n\n</think>\n\nno"]
    assert said(REASONING, told, begin="content") == ["yes<|im_end|>", "no<|im_end|>"]
    assert said(REASONING, told, begin="content", end=False) == ["yes", "no"]


def test_tool_calls():
    call = dict(type="function", id="1", function=dict(name="add", arguments={"a": "2<|im_end|>", "b": 3}))
    told = [
        dict(role="user", content="2+3?"),
        dict(role="assistant", content="", reasoning_content="use it", tool_calls=[call]),
        dict(role="tool", content='{"sum": 5}'),
        dict(role="assistant", content=None, tool_calls=[call, call]),
        dict(role="tool", content="5"),
        dict(role="assistant", content="5.", reasoning_content="so"),
        dict(role="user", content="2+3?"),
        dict(role="assistant", content="Still 5."),
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    for n in (4, 6, 8):
        pieces = reasoning(told[:n])
        found = render(made(REASONING), told[:n], tools=tools)
        start = len(found.text) - len("".join(p for p, _ in pieces))
        assert found.text[start:] == "".join(p for p, _ in pieces)
        hand = ["".join(p for p, o in pieces if o == i) for i, m in enumerate(told[:n]) if m["role"] == "assistant"]
        answers = [t for t in found.turns if t.role == "assistant"]
        assert [t.refused for t in answers] == [None] * len(answers)
        assert [found.text[a:b] for t in answers for a, b in t.said] == hand
    with pytest.raises(InputError, match="tool calls or an empty text"):
        render(made(REASONING), told, begin="content").targets()


def test_a_call_may_be_closed_by_special_tokens_of_its_own():
    source = REASONING.replace("'</call>'", "'<|call|>'")
    call = dict(function=dict(name="add", arguments={"a": 2}))
    told = [CHAT[1], dict(role="assistant", content="so", tool_calls=[call, call])]
    hand = "<think>\n\n</think>\n\nso" + '\n<call>add {"a": 2}<|call|>' * 2
    assert said(source, told) == [hand + "<|im_end|>"] and said(source, told, end=False) == [hand]


def test_an_end_that_stands_only_between_turns():
    source = """{% for m in messages %}{{ '<|head|>' ~ m.role ~ '\n' ~ m.content }}
    {%- if add_generation_prompt or not loop.last %}<|stop|>{% endif %}{% endfor %}
    {%- if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}"""
    told = [CHAT[1], dict(role="assistant", content="one"), CHAT[3], dict(role="assistant", content="two")]
    assert said(source, told) == ["one", "two"]  # the mark counts to what follows: no turn by itself has it


def test_a_prompt_that_the_history_lacks_and_a_text_said_again_are_refused():
    told = [CHAT[1], dict(role="assistant", content="yes")]
    other = PLAIN + "{% if add_generation_prompt %}model: {% endif %}"
    with pytest.raises(InputError, match="generation prompt does not stand before it"):
        said(other, told)
    assert said(other, told, begin="content") == ["yes"]
    with pytest.raises(InputError, match="more than once"):
        said(PLAIN + "Last: {{ messages[-1].content }}", told)


def test_marked_and_unmarked_twins_agree():
    for messages in (CHAT, CHAT[1:], CHAT[2:], [CHAT[1], CHAT[1], CHAT[2], CHAT[2]], CHAT[:3] + CHAT[4:]):
        one, other = render(made(CHATML_MARKED), messages), render(made(CHATML), messages)
        assert (one.text, one.targets(), one.targets("last")) == (other.text, other.targets(), other.targets("last"))
        again = render(made(CHATML_MARKED), messages, method="sentinel")
        assert (again.targets(), again.method) == (one.targets(), "sentinel")


def test_a_turn_that_the_template_leaves_out_says_nothing():
    source = "{% for m in messages %}{% if loop.index0 != 1 %}{{ m.role ~ ':' ~ m.content ~ '</s>' }}{% endif %}{% endfor %}"
    told = [CHAT[1], dict(role="assistant", content="gone"), CHAT[3], dict(role="assistant", content="here")]
    assert said(source, told) == ["here</s>"]
    row = encode(render(made(source), told[:2]), TOKENIZERS["bytes"])
    assert row.reason == "what the assistant says is not in the text"


def test_content_in_blocks():
    source = CHATML.replace(
        "m.content", "(m.content if m.content is string else m.content | map(attribute='text') | join('+'))"
    )
    told = [CHAT[1], dict(role="assistant", content=[dict(type="text", text="one"), dict(type="text", text="two")])]
    assert said(source, told) == ["one+two<|im_end|>"]


def test_the_time_is_asked_once():
    source = "{{ strftime_now('%f') }}" + CHATML
    assert said(source, CHAT[1:3]) == ["Hello   you<|im_end|>"]
    found = render(made(source), CHAT[1:3])  # the clock runs while the marks are sent; one moment is told to all
    assert [found.text[a:b] for a, b in found.targets()] == ["Hello   you<|im_end|>"]


# data sets and threads


def test_a_data_set_counts_what_it_cannot_use():
    tok, t = TOKENIZERS["bytes"], made(STRICT)
    good = [dict(role="user", content="2+2?"), dict(role="assistant", content="4")]
    rows = [
        {"messages": good},
        {"messages": good[::-1]},  # refused by the template
        {"messages": good[:1]},  # no answer
        {"prompt": good[:1], "completion": good[1:]},
        {"messages": [dict(role="user", content="?" * 99), good[1]]},  # the answer is cut off
        {"prompt": "2+2=", "completion": "4"},
        {"text": "2+2=4", "spans": [[4, 5]]},
        {"messages": good[::-1]},
        {"question": "?"},
    ]
    data = encode_rows(rows, tok, t, max_len=60)
    assert data.kept.tolist() == [0, 3, 5, 6] and len(data.rows) == len(rows)
    assert sorted(data.skipped.values()) == [1, 1, 1, 2] and "alternate" in next(iter(data.skipped))
    assert (
        tok.decode(data.rows[0].ids[data.rows[0].mask]) == "4</s>" == tok.decode(data.rows[3].ids[data.rows[3].mask])
    )
    assert data.tokens[0] == sum(r.mask.sum() for r in data.rows) and data.template == t.sha256
    assert "| 4 | targets" in data._repr_markdown_()
    with pytest.raises(InputError, match=rf"at least one of 2 rows.*alternate.*{t.sha256[:12]}"):
        encode_rows(rows[1:2] * 2, tok, t)


def test_many_threads_equal_one():
    tok, t = TOKENIZERS["bytes"], made(MACRO)
    tok.backend_tokenizer.enable_truncation(5)  # a setting left behind by somebody else
    talks = [[m | {"content": m["content"] + str(k)} for m in CHAT[1:5]] for k in range(64)]

    def one(messages):
        row = encode(render(t, messages), tok)
        return row.conversation.text, row.ids.tolist(), row.mask.tolist()

    serial = [one(m) for m in talks]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, talks)) == serial
    assert len({text for text, *_ in serial}) == 64 and all(any(mask) for *_, mask in serial)


def test_a_template_of_the_users(tmp_path):
    tok = TOKENIZERS["tiny"]
    (tmp_path / "mine.jinja").write_text(PLAIN_FILE := SHAPES[-2].source, encoding="utf-8")
    mine = template(tok, tmp_path / "mine.jinja")
    assert mine.sha256 == template(tok, PLAIN_FILE).sha256 != template(tok).sha256
    assert render(mine, CHAT).text == "".join(p for p, _ in plain(CHAT))
    with pytest.raises(InputError, match="a template file; got 'no.jinja'"):
        template(tok, tmp_path / "no.jinja")
    several = byte_level()
    with pytest.raises(InputError, match="a tokenizer without one"):
        template(several)
    several.chat_template = {"a": CHATML, "b": STRICT}
    assert template(several, "b").source == STRICT
    with pytest.raises(InputError, match="choose from a, b"):
        template(several)


def test_markers_are_read_from_the_program():
    assert not made("{# {% generation %} #}{{ '{% generation %}' }}").markers
    assert not made("{% raw %}{% generation %}{% endgeneration %}{% endraw %}").markers
    assert made("{% if false %}{%- generation -%}x{%- endgeneration -%}{% endif %}").markers


def test_the_coloured_view_is_inert():
    talk = [dict(role="user", content="<script>alert(1)</script>&\"'"), dict(role="assistant", content="<img src=x>")]
    for tok in TOKENIZERS.values():
        page = encode(render(made(CHATML), talk), tok)._repr_html_()
        assert "<script" not in page and "<img" not in page and "src=" not in page.replace("src=x", "")
        assert page.count("<span") == page.count("</span>")


# anything a user may type

PIECES = st.sampled_from(
    [
        *" \n\t<>aA1é",
        "👩‍🚀",
        "ש",
        "\ue000",
        "\U000f0000",
        "\U000f0000aA",
        "\U000f0001aA",
        "<think>",
        "</think>",
        *SPECIAL,
    ]
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)
TALKS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3).map(
    lambda pairs: [dict(role=r, content=c) for pair in pairs for r, c in zip(("user", "assistant"), pair)]
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(messages=TALKS)
def test_exact_or_refused(shape, messages):
    own, text = labels(shape, messages)
    found = render(made(shape.source), messages, now=NOW)
    assert found.text == text
    for turn in found.turns:
        if turn.refused is None and not found.loose:
            assert [k for a, b in turn.said for k in range(a, b)] == [k for k, o in enumerate(own) if o == turn.index]
    if not any(t.refused for t in found.turns):
        every = [k for a, b in found.targets() for k in range(a, b)]
        assert every == [k for k, o in enumerate(own) if o is not None]


def test_chatml_is_never_refused():
    for content in ("", " ", "\n", "a", " a ", "\U000f0000aA", "<|im_end|>", "</s>"):
        told = [dict(role="user", content=content), dict(role="assistant", content=content)]
        own = [o for p, o in chatml(told) for _ in p]
        for source in (CHATML, CHATML_MARKED):
            (span,) = render(made(source), told).targets()
            assert list(range(*span)) == [k for k, o in enumerate(own) if o == 1]
