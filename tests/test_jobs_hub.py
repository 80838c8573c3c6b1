"""The flags of a run that goes to the Hub: sent while it goes on, continued on another machine, never held up."""

import json
import subprocess
import sys

import datasets
import pyarrow.parquet as pq
import pytest
from loopback_hub import environment, hurry, point, serve

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs.job import Job, JobOptions
from llm_analysis.jobs.testing import Digests, faults, texts

REPO, TOKEN, ROWS = "user/digests", "hf_" + "madeUpForThisTest" * 2, texts(160)
SMALL = dict(batch_tokens=64, max_batch_size=4, part_rows=12, push_to_hub=REPO)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hurry(monkeypatch)
    with serve(token=TOKEN) as hub:
        point(monkeypatch, hub.address, tmp_path / "cache")
        yield hub
        assert not hub.leaks and not hub.broken


def job(folder, ledger=None, rows=ROWS, **more) -> Job:
    return Job(rows, Digests(ledger), output_dir=folder, options=JobOptions(**SMALL | more), progress=False)


def names(hub, pattern="data/") -> set[str]:
    return {p for p in hub.repo(REPO).files() if p.startswith(pattern)}


def test_a_run_is_on_the_hub_when_it_ends(hub, tmp_path):
    done = job(tmp_path / "out", upload_every=24).run()
    assert done.complete and done.sent.left == 0 and "holds all" in str(done)
    assert names(hub) == {f"data/{p.name}" for p in (tmp_path / "out" / "data").iterdir()}
    assert hub.repo(REPO).private
    loaded = datasets.load_dataset(REPO, split="train", cache_dir=str(tmp_path / "loaded"))
    assert sorted(loaded["index"]) == list(range(len(ROWS)))
    again = job(tmp_path / "out").run()
    assert again.computed == 0 and again.sent.commits == 0


def test_another_machine_goes_on(hub, tmp_path):
    "The first machine is gone with everything on it; the second knows the repository alone"
    first = Stopping(ROWS, Digests(), output_dir=tmp_path / "first", options=JobOptions(**SMALL), progress=False)
    assert 0 < first.run().done < len(ROWS)
    sent = sum(pq.read_metadata(p).num_rows for p in (tmp_path / "first" / "data").iterdir())
    (tmp_path / "ledger").mkdir()
    second = job(tmp_path / "second", str(tmp_path / "ledger"), resume_from_hub=True).run()
    computed = sum(int(x.split()[1]) for x in (tmp_path / "ledger" / "computed").read_text().splitlines())
    assert second.complete and computed == len(ROWS) - sent == second.computed
    assert not any(faults(tmp_path / "second", ROWS).values()) and second.sent.left == 0


class Stopping(Job):
    "Stops after some batches, as a deadline would"

    def _execute(self, plan, log, dispatch, control):
        asked = iter(range(10**6))
        real, control.halt = control.halt, lambda: next(asked) > 20
        try:
            return super()._execute(plan, log, dispatch, control)
        finally:
            control.halt = real


def test_a_repository_of_another_run_is_refused_before_any_work(hub, tmp_path):
    job(tmp_path / "one").run()
    (tmp_path / "ledger").mkdir()
    with pytest.raises((InputError, WorldError), match="expected run .* got run"):
        job(tmp_path / "two", str(tmp_path / "ledger"), rows=texts(90, seed=1)).run()
    assert not (tmp_path / "ledger" / "computed").exists()


def test_nothing_on_the_hub_yet(hub, tmp_path, capfd):
    assert job(tmp_path / "out", resume_from_hub=True).run().complete
    assert "not there yet" in capfd.readouterr().err


def test_a_hub_that_is_down_stops_nobody(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_analysis.jobs.job.PATIENCE", 1.0)
    hub.down()
    done = job(tmp_path / "out").run()
    assert done.complete and done.sent.left == done.parts and "are NOT in" in str(done)
    assert not any(faults(tmp_path / "out", ROWS).values())
    hub.up()
    assert job(tmp_path / "out").run().sent.left == 0


def test_commands(hub, tmp_path):
    "A study pushes with flags alone, and a folder is sent by hand; no token is told to anybody"
    env = environment(hub.address, tmp_path / "home", HF_TOKEN=TOKEN, NO_PROXY="127.0.0.1")
    command = [sys.executable, "-c", "import sys; from llm_analysis.cli import main; sys.exit(main())"]
    out = tmp_path / "out"
    words = ["explain", "run", "tiny/reviews", "--max-samples", "4", "--budget", "80", "--output-dir", str(out)]
    said = subprocess.run([*command, *words, "--push-to-hub", REPO], env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert names(hub) == {f"data/{p.name}" for p in (out / "data").iterdir()}
    words = ["job", "upload", str(out), "--repo", "user/second"]
    second = subprocess.run([*command, *words], env=env, capture_output=True, text=True)
    assert second.returncode == 0 and "holds all" in second.stdout, second.stderr
    everything = said.stdout + said.stderr + second.stdout + second.stderr
    everything += "".join(p.read_text(errors="replace") for p in out.rglob("*") if p.is_file())
    assert TOKEN not in everything
    card = hub.repo(REPO).files()["README.md"]
    assert b"tiny" in bytes(card) and TOKEN.encode() not in bytes(card)
    assert json.loads(bytes(hub.repo(REPO).files()["manifest.json"]))["parts"]


def test_what_needs_no_network_works_without(tmp_path):
    "The address of the Hub leads nowhere: whoever needs it says so, everybody else does not notice"
    env = environment("http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", "import sys; from llm_analysis.cli import main; sys.exit(main())"]
    run = lambda *words: subprocess.run([*command, *words], env=env, capture_output=True, text=True)
    out = str(tmp_path / "out")
    first = run("explain", "run", "tiny/reviews", "--max-samples", "2", "--budget", "80", "--output-dir", out)
    assert first.returncode == 0, first.stderr
    for words in (["status", out], ["verify", out], ["compact", out]):
        found = run("job", *words)
        assert found.returncode == 0, found.stderr
    for words in (
        ["job", "upload", out, "--repo", REPO],
        ["explain", "run", "user/nowhere", "--output-dir", out + "2"],
    ):
        found = run(*words)
        assert found.returncode in (1, 2) and len(found.stderr.strip().splitlines()) == 1, found.stderr
