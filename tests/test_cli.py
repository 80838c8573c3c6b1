"""The command line's grammar, its exit codes, and that it imports no more than it must"""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_analysis.cli import COMMANDS, Command, main
from llm_analysis.core import InputError, WorldError
from llm_analysis.grammar import ALIASES, options, page, resolve


@dataclass(frozen=True)
class Stopping:
    "When to stop"

    tol: float = 0.1  # half-width of the interval
    max_calls: int | None = 1000  # model calls at the most


@dataclass(frozen=True)
class Spread:
    "How the work is spread"

    FLAT: ClassVar[bool] = True

    num_workers: int = 1  # workers on this machine
    note: str | None = None  # said at the end
    resume: bool = False  # go on


def study(
    dataset: str,  # name of a data set
    output_dir: str,  # folder to write
    *,
    players: Literal["words", "tokens"] = "words",  # parts that share the answer
    max_samples: int | None = 7,  # rows to take, 100% if null
    layers: list[int] | None = None,  # layers to look at
    label_words: list[str] | None = None,  # answers to choose from
    prompt: str | None = None,  # the text in its prompt
    advisor: bool = True,  # ask the advisor first
    pickle: bool = False,  # write a pickle too
    stopping: Stopping = Stopping(),  # when to stop
    spread: Spread = Spread(),  # how the work is spread
) -> dict:
    "A made study that returns what it was given"
    fail = {"input": InputError("no"), "world": WorldError("gone"), "other": OSError("disk\nfull hf_abcdefghijkl")}
    if dataset in fail:
        raise fail[dataset]
    if dataset == "stop":
        raise KeyboardInterrupt
    return {k: v for k, v in locals().items() if k != "fail"}


TABLE = [*COMMANDS, Command("made", "run", f"{__name__}:study", "a made study")]
BASE = ["d", "--output-dir", "o"]


def call(*words: str) -> dict:
    "The arguments that `words` give to the made study"
    return resolve(study, words, command="llm-analysis made run")


def failed(capsys, *words: str) -> tuple[int, str]:
    "Exit code and the one line on stderr"
    code = main(["made", "run", *words], TABLE)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said
    return code, said.err


@pytest.mark.parametrize("name", ["--max-samples", "--max_samples", "--limit"])
@pytest.mark.parametrize("form", ["{} 3", "{}=3"])
def test_one_thing_under_all_its_names(name, form):
    want = study("d", "o", max_samples=3)
    assert call(*BASE, *form.format(name).split()) == want
    assert call(*form.format(name).split(), "--output=o", "d") == want
    assert call("--output_dir", "o", *form.format(name).split(), "--dataset", "d") == want


@pytest.mark.parametrize("name", ["--max-samples", "--max_samples", "--limit"])
@pytest.mark.parametrize("form", ["{} 3", "{}=3"])
@pytest.mark.parametrize("key", ["max-samples", "max_samples", "limit"])
def test_the_command_line_beats_the_file_wherever_it_stands(tmp_path, name, form, key):
    file = tmp_path / "c.yaml"
    file.write_text(f"{key}: 9\noutput: o\ndataset: filed\nstopping:\n  max-calls: 5\n")
    option, stopping = form.format(name).split(), Stopping(max_calls=5)
    for config in (["--config", str(file)], [f"--config={file}"]):
        for words in ([*config, "d", *option], [*option, *config, "d"], ["d", *option, *config]):
            assert call(*words) == study("d", "o", max_samples=3, stopping=stopping)
        assert call(*config) == study("filed", "o", max_samples=9, stopping=stopping)
        assert call(*config, "--stopping.tol", "0.5")["stopping"] == Stopping(0.5, 5)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--no-advisor", "--pickle", "--layers", "1,2", "--stopping.max-calls", "null", "--max-samples", "null"],
        ["--prompt", "yes: {text}\n- 1e3", "--players=tokens", "--stopping.tol=1e-4"],
        ["--num-workers", "3", "--note", "null and\n# 1e3: void", "--resume"],
    ],
)
def test_print_config_is_a_config(tmp_path, capsys, words):
    assert main(["made", "run", *BASE, *words, "--print-config"], TABLE) == 0
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    assert call("--config", str(tmp_path / "c.yaml")) == call(*BASE, *words)
    assert main(["made", "run", "--print_config", "--config", str(tmp_path / "c.yaml")], TABLE) == 0
    assert capsys.readouterr().out == printed


def test_a_flat_class_is_flat_in_the_file_too(tmp_path, capsys):
    "Its fields stand where they can be typed, in their order; below the parameter's name they are read as well"
    assert main(["made", "run", *BASE, "--num-workers=3", "--print-config"], TABLE) == 0
    form = yaml.safe_load(capsys.readouterr().out)
    assert list(form)[-4:] == ["stopping", "num_workers", "note", "resume"] and form["num_workers"] == 3
    assert form["stopping"] == {"tol": 0.1, "max_calls": 1000}
    file = tmp_path / "c.yaml"
    for nested in ("spread:\n  num-workers: 3\n", "spread.num_workers: 3\n", "num-workers: 3\n"):
        file.write_text(nested)
        assert call(*BASE, "--config", str(file))["spread"] == Spread(3)
        assert call(*BASE, "--config", str(file), "--num-workers", "4")["spread"] == Spread(4)
    file.write_text("spread: {num_workers: 3}\nnum-workers: 3\n")
    assert "num_workers once" in failed(capsys, *BASE, "--config", str(file))[1]


def test_print_config_of_nothing_is_a_form_to_fill_in(tmp_path, capsys):
    assert main(["made", "run", "--print-config"], TABLE) == 0
    form = yaml.safe_load(capsys.readouterr().out)
    assert form["dataset"] is None and form["max_samples"] == 7
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(form | {"output_dir": "o"}))
    assert call("--config", str(tmp_path / "c.yaml"), "d") == study("d", "o")
    with pytest.raises(InputError, match="DATASET"):
        call("--config", str(tmp_path / "c.yaml"))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda t: t != "null")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    text,
    text,
    st.integers(),
    st.lists(st.integers(), min_size=1),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_values_arrive_as_they_were_given(prompt, output, n, layers, flag, tol):
    words = ["--prompt=" + prompt, "--output=" + output, f"--limit={n}", f"--layers={','.join(map(str, layers))}"]
    words += ["--advisor" if flag else "--no-advisor", f"--pickle={str(flag).lower()}", f"--stopping.tol={tol!r}"]
    want = study("d", output, prompt=prompt, max_samples=n, layers=layers, advisor=flag, pickle=flag)
    assert call("d", *words) == want | {"stopping": Stopping(tol)}


@pytest.mark.parametrize(
    "odd", ["# {text}", "&a", "~", "Null", "--", "-", "", "yes", "1e3", "{text}", "[a]", "a: b", "%", "\r\n"]
)
def test_a_text_is_never_read_as_anything_else(tmp_path, odd):
    assert call(*BASE, f"--prompt={odd}")["prompt"] == odd
    assert call("d", f"--output={odd}")["output_dir"] == odd
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"prompt": odd, "label-words": [odd]}))
    got = call(*BASE, "--config", str(tmp_path / "c.yaml"))
    assert (got["prompt"], got["label_words"]) == (odd, [odd])
    assert call(*BASE, "--prompt=null")["prompt"] is None
    assert call(*BASE, "--label-words= good, bad")["label_words"] == [" good", " bad"]


@pytest.mark.parametrize("words, value", [("--pickle", True), ("--pickle true", True), ("--pickle=false", False)])
def test_a_switch_does_not_swallow_the_data_set(words, value):
    assert call("--output=o", *words.split(), "d")["pickle"] is value


@pytest.mark.parametrize(
    "words, parts",
    [
        ("d", ["--output-dir", "folder to write", "nothing"]),
        ("--output o", ["DATASET", "name of a data set"]),
        ("d --output o --limit x", ["--max-samples", "a whole number or null", "'x'"]),
        ("d --output o --limit 3.5", ["--max-samples", "'3.5'"]),
        ("d --output o --players letters", ["--players", "words, tokens", "'letters'"]),
        ("d --output o --layers a,b", ["--layers", "a list such as 1,2", "['a', 'b']"]),
        ("d --output o --stopping.tol=x", ["--stopping.tol", "a number", "'x'"]),
        ("d --output o --pickle=maybe", ["--pickle", "true or false", "'maybe'"]),
        ("d --output o --max-sampels 3", ["max-sampels", "did you mean --max-samples?"]),
        ("d --output o --max 3", ["'max'", "--max-samples"]),
        ("d --output o --no-players", ["no-players"]),
        ("d --output", ["--output-dir", "nothing"]),
        ("d --output --limit 3", ["--output-dir", "nothing"]),
        ("d e --output o", ["one DATASET", "'e'"]),
        ("d -o o", ["'-o'"]),
        ("d --config a --config b", ["one --config", "a and b"]),
        ("d --config absent.yaml", ["absent.yaml", "No such file"]),
        ("input --output o", ["no"]),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_2(capsys, words, parts):
    code, said = failed(capsys, *words.split())
    assert code == 2 and all(part in said for part in parts), said


@pytest.mark.parametrize(
    "content, parts",
    [
        ("max-sampels: 3", ["max_sampels", "--max-samples"]),
        ("limit: 3\nmax-samples: 4", ["max_samples", "twice"]),
        ("players: letters", ["players", "words, tokens", "letters"]),
        ("prompt: {text}", ["prompt", "text or null"]),
        ("stopping: {tol: x}", ["stopping.tol", "a number", "'x'"]),
        ("stopping: {tool: x}", ["stopping.tool"]),
        ("stopping: 3", ["stopping"]),
        ("config: other.yaml", ["config"]),
        ("a: [1", ["line"]),
        ("- a", ["list"]),
        ("\x00", ["c.yaml"]),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_2(capsys, tmp_path, content, parts):
    (tmp_path / "c.yaml").write_text(content)
    code, said = failed(capsys, *BASE, "--config", str(tmp_path / "c.yaml"))
    assert code == 2 and "--config" in said and all(part in said for part in parts), said


def test_exit_codes(capsys):
    assert failed(capsys, "world", "--output=o") == (1, "llm-analysis: gone\n")
    code, said = failed(capsys, "other", "--output=o")
    assert code == 1 and "OSError: disk full" in said and "hf_abc" not in said
    assert failed(capsys, "stop", "--output=o")[0] == 130
    assert main(["made", "run", *BASE], TABLE) == 0
    assert "'max_samples': 7" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["mad"], ["made"], ["made", "runn"], ["--runn"]])
def test_studies_and_verbs(capsys, words):
    code, said = main(words, TABLE), capsys.readouterr()
    assert (code, said.err) == (0, "") if not words else (code, said.err.count("\n")) == (2, 1)


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debug_adds_the_traceback(capsys, monkeypatch, how):
    if how == "variable":
        monkeypatch.setenv("LLM_ANALYSIS_DEBUG", "1")
    assert main([*["--debug"] * (how == "option"), "made", "run", "other", "--output=o"], TABLE) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "hf_abc" not in said


def test_help_is_made_of_the_comments():
    shown = page(study, "llm-analysis made run")
    assert "A made study" in shown and "usage: llm-analysis made run DATASET --output-dir" in shown
    said = " ".join(shown.split())
    for o in options(study):
        assert o.help and o.help in said and o.spelling in shown, o
    assert all("_" not in word for line in shown.splitlines() if line.startswith("  -") for word in line.split())
    assert all(f"--{alias}" in shown for alias in ALIASES)
    assert "half-width of the interval (default: 0.1)" in said and "(default: 7)" in said


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.study} {c.verb}")
def test_every_command_explains_each_of_its_options(capsys, command):
    module, name = command.target.split(":")
    function = getattr(import_module(module), name)
    assert function.__doc__ and [o.name for o in options(function) if not o.help] == []
    for flag in ("--help", "--print-config"):
        assert main([command.study, command.verb, flag]) == 0
    shown = capsys.readouterr().out
    assert all(o.spelling in shown and f"\n{o.name.split('.')[0]}:" in shown for o in options(function))


def shell(line: str, **env: str) -> subprocess.CompletedProcess:
    "The installed command in a process of its own, its output not a terminal"
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=os.environ | {"PATH": path} | env)


def test_the_installed_command():
    assert shell("llm-analysis --version").stdout.startswith("llm-analysis 0.")
    wrong = shell("llm-analysis explain rnu")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert shell("llm-analysis --help | true; exit ${PIPESTATUS[0]}").stderr == ""
    assert shell("llm-analysis --help", PYTHONIOENCODING="ascii").returncode == 0


@pytest.mark.parametrize("words", ["--help", "explain --help", "--version", ""])
def test_the_overview_imports_no_study_and_nothing_heavy(words):
    code = "import sys; from llm_analysis.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "transformers", "datasets", "pandas", "pyarrow", "matplotlib"}
    assert {m for m in loaded if m.startswith("llm_analysis.")} == {"llm_analysis.cli", "llm_analysis.core"}
