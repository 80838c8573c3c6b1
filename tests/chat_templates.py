"""Chat templates of every shape that the tests know, each with its text written a second time by hand.

A shape's `hand` is a plain Python function that puts the same text together from pieces and says of every piece
which assistant message it is the target of, or None. It shares nothing with the template but the words."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

NOW = datetime(2024, 2, 29, 12, 30)
SPECIAL = (
    "<s> </s> <|im_start|> <|im_end|> <|head|> <|/head|> <|stop|> <turn> </turn> [INST] [/INST] "
    "<|begin|> <|lane|> <|body|> <|done|> <|close|> <|call|>"
).split()
Pieces = list[tuple[str, int | None]]


@dataclass(frozen=True)
class Shape:
    name: str
    source: str
    hand: Callable[[list[dict], bool], Pieces]
    system: bool = True  # whether it takes a system message
    marked: bool = False


def chatml(messages, prompt=False) -> Pieces:
    out = []
    for i, m in enumerate(messages):
        own = i if m["role"] == "assistant" else None
        out += [(f"<|im_start|>{m['role']}\n", None), (m["content"] + "<|im_end|>", own), ("\n", None)]
    return out + [("<|im_start|>assistant\n", None)] * prompt


CHATML = """{% for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

CHATML_MARKED = """{% for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content ~ '<|im_end|>' }}{% endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

MACRO = """{% macro say(m) %}
{{- '<|im_start|>' ~ m.role ~ '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content ~ '<|im_end|>' }}{% endif %}
{{- '\n' }}
{%- endmacro %}
{%- for m in messages %}{{ say(m) }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

PARTIAL = """{% for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\n' }}
{%- if m.role == 'assistant' %}{{ 'Answer: ' }}
{%- generation %}{{ m.content.split(' ')[0] }}{% endgeneration %}{{ m.content[m.content.split(' ')[0] | length:] }}
{%- else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def partial(messages, prompt=False) -> Pieces:
    out = []
    for i, m in enumerate(messages):
        out.append((f"<|im_start|>{m['role']}\n", None))
        if m["role"] == "assistant":
            word, *_ = m["content"].split(" ")
            out += [("Answer: ", None), (word, i), (m["content"][len(word) :], None)]
        else:
            out.append((m["content"], None))
        out.append(("<|im_end|>\n", None))
    return out + [("<|im_start|>assistant\n", None)] * prompt


TWO_BLOCKS = """{% for m in messages %}
{{- '[' ~ m.role ~ ']' }}
{%- if m.role == 'assistant' %}
{%- if m.reasoning_content %}{% generation %}{{ '(' ~ m.reasoning_content ~ ')' }}{% endgeneration %}{{ ' -> ' }}{% endif %}
{%- generation %}{{ m.content }}{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}
{%- endfor %}"""


def two_blocks(messages, prompt=False) -> Pieces:
    out = []
    for i, m in enumerate(messages):
        out.append((f"[{m['role']}]", None))
        if m["role"] == "assistant" and m.get("reasoning_content"):
            out += [(f"({m['reasoning_content']})", i), (" -> ", None)]
        out.append((m["content"], i if m["role"] == "assistant" else None))
    return out


RAW_MARKED = """{% for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{%- endfor %}"""


def raw(messages, prompt=False) -> Pieces:
    return [(m["content"], i if m["role"] == "assistant" else None) for i, m in enumerate(messages)]


HEADERS = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set told = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set told = 'Be of help.' %}{% set rest = messages %}{% endif %}
{{- '<|head|>system<|/head|>\n\nDate: ' ~ strftime_now('%d %b %Y') ~ '\n\n' ~ told ~ '<|stop|>' }}
{%- for m in rest %}{{ '<|head|>' ~ m.role ~ '<|/head|>\n\n' ~ m.content | trim ~ '<|stop|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""


def headers(messages, prompt=False) -> Pieces:
    first = messages[0]["role"] == "system"
    told = messages[0]["content"].strip() if first else "Be of help."
    out = [(f"<s><|head|>system<|/head|>\n\nDate: 29 Feb 2024\n\n{told}<|stop|>", None)]
    for i, m in enumerate(messages):
        if i or not first:
            own = i if m["role"] == "assistant" else None
            out += [(f"<|head|>{m['role']}<|/head|>\n\n", None), (m["content"].strip() + "<|stop|>", own)]
    return out + [("<|head|>assistant<|/head|>\n\n", None)] * prompt


MERGED = """{{- bos_token }}
{%- set ns = namespace(head='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% set ns.head = m.content | trim ~ '\n\n' %}{% continue %}{% endif %}
{{- '<turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ ns.head ~ m.content | trim ~ '</turn>\n' }}
{%- set ns.head = '' %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""


def merged(messages, prompt=False) -> Pieces:
    out, head = [("<s>", None)], ""
    for i, m in enumerate(messages):
        if m["role"] == "system":
            head = m["content"].strip() + "\n\n"
            continue
        name, own = ("model", i) if m["role"] == "assistant" else (m["role"], None)
        out += [(f"<turn>{name}\n{head}", None), (m["content"].strip() + "</turn>", own), ("\n", None)]
        head = ""
    return out + [("<turn>model\n", None)] * prompt


STRICT = """{{- bos_token }}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}
{%- endfor %}"""


def strict(messages, prompt=False) -> Pieces:
    out = [("<s>", None)]
    for i, m in enumerate(messages):
        if m["role"] == "user":
            out.append((f"[INST] {m['content']} [/INST]", None))
        else:
            out += [(" ", None), (m["content"] + "</s>", i)]  # no generation prompt: the turn begins with its text
    return out


REASONING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\nTools: ' ~ tools | tojson ~ '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set text = m.content or '' %}{% set why = m.reasoning_content or '' %}
{%- if '</think>' in text %}
{%- set why = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or why) %}{{ '<think>\n' ~ why ~ '\n</think>\n\n' }}{% endif %}
{{- text }}
{%- for c in m.tool_calls or [] %}{{ '\n<call>' ~ c.function.name ~ ' ' ~ c.function.arguments | tojson ~ '</call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<result>' ~ m.content ~ '</result><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def reasoning(messages, prompt=False) -> Pieces:
    out, users = [], [i for i, m in enumerate(messages) if m["role"] == "user"]
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            text, why = m.get("content") or "", m.get("reasoning_content") or ""
            if "</think>" in text:
                why = text.split("</think>")[0].split("<think>")[-1].strip("\n")
                text = text.split("</think>")[-1].lstrip("\n")
            late = not users or i > users[-1]
            said = f"<think>\n{why}\n</think>\n\n" if late and (why or i == len(messages) - 1) else ""
            said += text
            for c in m.get("tool_calls") or []:
                said += f"\n<call>{c['function']['name']} {json.dumps(c['function']['arguments'], ensure_ascii=False)}</call>"
            out += [("<|im_start|>assistant\n", None), (said + "<|im_end|>", i), ("\n", None)]
        elif m["role"] == "tool":
            out.append((f"<|im_start|>user\n<result>{m['content']}</result><|im_end|>\n", None))
        else:
            out.append((f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", None))
    return out + [("<|im_start|>assistant\n", None)] * prompt


LANES = """{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.thinking and loop.last and not add_generation_prompt %}
{{- '<|begin|>assistant<|lane|>analysis<|body|>' ~ m.thinking ~ '<|close|>' }}
{%- endif %}
{{- '<|begin|>assistant<|lane|>final<|body|>' ~ m.content }}
{{- '<|done|>' if loop.last and not add_generation_prompt else '<|close|>' }}
{%- else %}{{ '<|begin|>' ~ m.role ~ '<|body|>' ~ m.content ~ '<|close|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|begin|>assistant' }}{% endif %}"""


def lanes(messages, prompt=False) -> Pieces:
    out = []
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            last, thought = i == len(messages) - 1 and not prompt, m.get("thinking") or m.get("reasoning_content")
            if thought and last:
                said = f"<|lane|>analysis<|body|>{thought}<|close|><|begin|>assistant<|lane|>final<|body|>"
            else:
                said = "<|lane|>final<|body|>"
            out += [("<|begin|>assistant", None), (said + m["content"] + ("<|done|>" if last else "<|close|>"), i)]
        else:
            out.append((f"<|begin|>{m['role']}<|body|>{m['content']}<|close|>", None))
    return out + [("<|begin|>assistant", None)] * prompt


REPEATING = """{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ ' | ' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def repeating(messages, prompt=False) -> Pieces:
    twice = [m | {"content": f"{m['content']} | {m['content']}"} for m in messages]
    return chatml(twice, prompt)


PLAIN = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"


def plain(messages, prompt=False) -> Pieces:
    out = []
    for i, m in enumerate(messages):
        out += [(f"{m['role']}: ", None), (m["content"], i if m["role"] == "assistant" else None), ("\n", None)]
    return out  # no end-of-turn token: the turn is its text


OPEN = """{% for m in messages %}{{ '<|head|>' ~ m.role ~ '\n' ~ m.content ~ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}"""


def open_ended(messages, prompt=False) -> Pieces:
    "The next turn's header begins with a special token, and nothing ends this one"
    out = []
    for i, m in enumerate(messages):
        own = i if m["role"] == "assistant" else None
        out += [(f"<|head|>{m['role']}\n", None), (m["content"], own), ("\n", None)]
    return out + [("<|head|>assistant\n", None)] * prompt


SHOUT = CHATML.replace("m.content", "m.content | upper")
CLOSED = CHATML.replace(
    "{%- endfor %}", "{%- endfor %}{% if messages[-1].role == 'assistant' %}{{ '</s>' }}{% endif %}"
)


def closed(messages, prompt=False) -> Pieces:
    "One more token at the very end, which no turn ends with"
    end = [("</s>", None)] * (messages[-1]["role"] == "assistant")
    return chatml(messages) + end + [("<|im_start|>assistant\n", None)] * prompt


SHAPES = [
    Shape("chatml-marked", CHATML_MARKED, chatml, marked=True),
    Shape("macro", MACRO, chatml, marked=True),
    Shape("partial", PARTIAL, partial, marked=True),
    Shape("two-blocks", TWO_BLOCKS, two_blocks, marked=True),
    Shape("raw-marked", RAW_MARKED, raw, marked=True),
    Shape("chatml", CHATML, chatml),
    Shape("closed", CLOSED, closed),
    Shape("headers", HEADERS, headers),
    Shape("merged", MERGED, merged),
    Shape("strict", STRICT, strict, system=False),
    Shape("reasoning", REASONING, reasoning),
    Shape("lanes", LANES, lanes),
    Shape("repeating", REPEATING, repeating),
    Shape("plain", PLAIN, plain),
    Shape("open", OPEN, open_ended),
]


def by_turn(write: Callable[[str, str], Pieces], *, before: str = "", prompt: str = "") -> Callable:
    "The hand of a shape that writes one turn after the other; `write` says with True what of a turn is the answer"

    def hand(messages, ask=False) -> Pieces:
        out = [(before, None)]
        for i, m in enumerate(messages):
            own = i if m["role"] == "assistant" else None
            out += [(text, own if said else None) for text, said in write(m["role"], m["content"])]
        return out + [(prompt, None)] * ask

    return hand


EYES = """{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
eyes = by_turn(lambda r, c: [(f"<|{r}|>\n", 0), (c + "</s>", 1), ("\n", 0)], prompt="<|assistant|>\n")

SHORT_PROMPT = """{{- 'A chat. ' }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{ 'ASSISTANT: ' ~ m.content ~ eos_token }}
{%- else %}{{ m.role | upper ~ ': ' ~ m.content ~ ' ' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
short_prompt = by_turn(  # the blank behind the colon is not in the prompt: the model says it
    lambda r, c: [("ASSISTANT:", 0), (f" {c}</s>", 1)] if r == "assistant" else [(f"{r.upper()}: {c} ", 0)],
    before="A chat. ",
    prompt="ASSISTANT:",
)

HEADINGS = """{% for m in messages %}
{{- '### ' ~ ('Response' if m.role == 'assistant' else 'Instruction') ~ ':\n' ~ m.content ~ '\n\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""
headings = by_turn(
    lambda r, c: [
        (f"### {'Response' if r == 'assistant' else 'Instruction'}:\n", 0),
        (c, 1),
        ("\n\n", 0),
    ],
    prompt="### Response:\n",
)

FRAMED = """{% for m in messages %}
{%- if m.role == 'system' %}{{ '<<SYS>>\n' ~ m.content ~ '\n<</SYS>>\n\n' }}
{%- elif m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ m.content | trim ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"""
framed = by_turn(
    lambda r, c: {
        "system": [(f"<<SYS>>\n{c}\n<</SYS>>\n\n", 0)],
        "user": [(f"<s>[INST] {c.strip()} [/INST]", 0)],
        "assistant": [(" ", 0), (f"{c.strip()} </s>", 1)],
    }[r]
)

UNKNOWN_END = """{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|over|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
unknown_end = by_turn(  # `<|over|>` is no token of its own: the turn is its text
    lambda r, c: [(f"<|{r}|>\n", 0), (c, 1), ("<|over|>\n", 0)], prompt="<|assistant|>\n"
)

NAMES = """{{- bos_token }}{% set who = dict(assistant='BOT', user='GUEST', system='HOST') %}{% for m in messages %}
{{- '<|begin|><|lane|>' ~ who[m.role] ~ '<|body|>' ~ m.content ~ '<|done|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|begin|><|lane|>BOT<|body|>' }}{% endif %}"""
_WHO = dict(assistant="BOT", user="GUEST", system="HOST")
names = by_turn(
    lambda r, c: [(f"<|begin|><|lane|>{_WHO[r]}<|body|>", 0), (f"{c}<|done|>", 1)],
    before="<s>",
    prompt="<|begin|><|lane|>BOT<|body|>",
)

LATE_SYSTEM = """{{- bos_token }}{% set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '[INST] ' ~ (messages[0].content ~ '\n\n' if loop.index0 == ns.last and messages[0].role == 'system' else '') }}
{{- m.content ~ '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"""


def late_system(messages, prompt=False) -> Pieces:
    "The system's words stand before those of the last user: they move as the conversation goes on"
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    out = [("<s>", None)]
    for i, m in enumerate(messages):
        if m["role"] == "user":
            told = f"{messages[0]['content']}\n\n" * (messages[0]["role"] == "system" and i == users[-1])
            out.append((f"[INST] {told}{m['content']}[/INST]", None))
        elif m["role"] == "assistant":
            out += [(" ", None), (m["content"] + "</s>", i)]
    return out


PLAIN_ROLES = """{{- bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ 'User: ' ~ m.content ~ '\n\n' }}
{%- elif m.role == 'assistant' %}{{ 'Assistant: ' ~ m.content ~ eos_token }}
{%- else %}{{ m.content ~ '\n\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
plain_roles = by_turn(
    lambda r, c: {
        "user": [(f"User: {c}\n\n", 0)],
        "assistant": [("Assistant:", 0), (f" {c}</s>", 1)],
        "system": [(f"{c}\n\n", 0)],
    }[r],
    before="<s>",
    prompt="Assistant:",
)

SAME_LINE = """{% for m in messages %}{{ '<|head|>' ~ m.role ~ '<|/head|>' ~ m.content ~ '<|stop|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}"""
same_line = by_turn(
    lambda r, c: [(f"<|head|>{r}<|/head|>", 0), (f"{c}<|stop|>", 1), ("\n", 0)], prompt="<|head|>assistant<|/head|>"
)

LINE_MARKED = """{% for m in messages %}{{ m.role ~ '> ' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content ~ '\n' }}{% endgeneration %}
{%- else %}{{ m.content ~ '\n' }}{% endif %}{% endfor %}"""
line_marked = by_turn(lambda r, c: [(f"{r}> ", 0), (f"{c}\n", 1)])

HEADER_MARKED = """{{- bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}{{ '<turn>model\n' ~ m.content | trim ~ '</turn>\n' }}{% endgeneration %}
{%- else %}{{ '<turn>' ~ m.role ~ '\n' ~ m.content | trim ~ '</turn>\n' }}{% endif %}{% endfor %}"""
header_marked = by_turn(
    lambda r, c: [(f"<turn>{'model' if r == 'assistant' else r}\n{c.strip()}</turn>\n", 1)], before="<s>"
)

NUMBERED = """{% for m in messages %}
{{- '<|im_start|>' ~ loop.index ~ ' ' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>' ~ (messages | length + 1) ~ ' assistant\n' }}{% endif %}"""


def numbered(messages, prompt=False) -> Pieces:
    out = []
    for i, m in enumerate(messages):
        own = i if m["role"] == "assistant" else None
        out += [(f"<|im_start|>{i + 1} {m['role']}\n", None), (m["content"] + "<|im_end|>", own), ("\n", None)]
    return out + [(f"<|im_start|>{len(messages) + 1} assistant\n", None)] * prompt


MORE = [
    Shape("eyes", EYES, eyes),
    Shape("short-prompt", SHORT_PROMPT, short_prompt),
    Shape("headings", HEADINGS, headings),
    Shape("framed", FRAMED, framed),
    Shape("unknown-end", UNKNOWN_END, unknown_end),
    Shape("names", NAMES, names),
    Shape("late-system", LATE_SYSTEM, late_system),
    Shape("plain-roles", PLAIN_ROLES, plain_roles),
    Shape("same-line", SAME_LINE, same_line),
    Shape("line-marked", LINE_MARKED, line_marked, marked=True),
    Shape("header-marked", HEADER_MARKED, header_marked, marked=True),
    Shape("numbered", NUMBERED, numbered),
]
