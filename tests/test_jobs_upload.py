"""Results on the Hub: exactly once through refusals, lost replies and kills, readable at every commit, never in the way."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import HfApi
from loopback_hub import Faults, environment, hurry, point, serve
from upload_victim import fast

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs import pace
from llm_analysis.jobs.card import MARK
from llm_analysis.jobs.fetch import fetch
from llm_analysis.jobs.identity import read_spec, spec_fingerprint
from llm_analysis.jobs.job import Job, JobOptions
from llm_analysis.jobs.merge import compact
from llm_analysis.jobs.parts import Chunk, Log
from llm_analysis.jobs.pretend import PretendedApi, refusal
from llm_analysis.jobs.sender import Sender, Turn
from llm_analysis.jobs.testing import Digests, faults, texts
from llm_analysis.jobs.upload import Upload, send, upload
from llm_analysis.jobs.verify import verify

TOKEN = "hf_" + "madeUpForThisTest" * 2
REPO = "user/digests"


# ---- runs, hubs and a judge ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def tmp_path():
    "In memory where that is possible: the network is tested here, not the disk"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as home:
        yield Path(home)


@pytest.fixture
def at_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hurry(monkeypatch)
    return lambda hub: point(monkeypatch, hub.address, tmp_path / "cache")


@pytest.fixture
def hub(at_hub):
    with serve(token=TOKEN) as hub:
        at_hub(hub)
        yield hub
        assert not hub.leaks and not hub.broken


def made(folder: Path, rows: list[dict], share: int = 0, shares: int = 1, part_rows: int = 12, **more) -> Job:
    "A run of known results, in parts of about `part_rows` rows"
    how = dict(batch_tokens=64, max_batch_size=4, part_rows=part_rows, num_shards=shares, shard_index=share)
    return Job(rows, Digests(), output_dir=folder, options=JobOptions(**(how | more)), progress=False)


def log_of(folder: Path) -> Log:
    return Log(folder, spec_fingerprint(read_spec(folder)))


def parts_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "data").iterdir()}


def judge(states: list[dict[str, bytes]], rows: list[dict] | None = None) -> list[str]:
    "What is wrong with a history of trees: at every commit a reader must see whole parts, each row once"
    found, seen = [], {}
    added: Counter = Counter()
    for n, tree in enumerate(states):
        data = {p.removeprefix("data/"): blob for p, blob in tree.items() if p.startswith("data/")}
        said = {p["name"]: p for p in json.loads(tree.get("manifest.json", b'{"parts": []}'))["parts"]}
        if set(data) != set(said):
            found.append(f"commit {n}: the manifest says other parts than there are")
        before = states[n - 1] if n else {}
        added.update(name for name in data if f"data/{name}" not in before)
        ids = Counter()
        for name, blob in data.items():
            if blob not in seen:
                seen[blob] = (remote_sha(blob), pq.read_table(io.BytesIO(blob))["index"].to_pylist())
            sha256, its = seen[blob]
            ids.update(its)
            if name in said and (sha256, len(its)) != (said[name]["sha256"], said[name]["rows"]):
                found.append(f"commit {n}: {name} is not what the manifest says")
        if twice := [i for i, k in ids.items() if k > 1]:
            found.append(f"commit {n}: {len(twice)} rows twice")
        if data and yaml.safe_load(tree["README.md"].decode().split("\n---\n")[0])["configs"][0]["data_files"] != [
            {"split": "train", "path": "data/*.parquet"}
        ]:
            found.append(f"commit {n}: the card does not say what data are")
    found += [f"{name} was added {k} times" for name, k in added.items() if k > 1]
    if rows is not None and (lost := len(rows) - len(ids)):
        found.append(f"{lost} rows are not there in the end")
    return found


def remote_sha(blob: bytes) -> str:
    import hashlib

    return hashlib.sha256(blob).hexdigest()


def trees(repo) -> list[dict[str, bytes]]:
    "Of every commit, from a loopback Hub or a pretended one"
    return [c.files if hasattr(c, "files") else {p: b.data for p, b in c.tree.items()} for c in repo.commits]


def busiest(times: list[float], seconds: float = 3600.0) -> int:
    "The most events in any stretch of so many seconds"
    return max((sum(t <= u < t + seconds for u in times) for t in times), default=0)


def test_the_judge_can_convict(tmp_path):
    rows = texts(120)
    made(tmp_path / "run", rows).run()
    hub = PretendedApi(REPO)
    send(log_of(tmp_path / "run"), REPO, api=hub)
    good = trees(hub)
    assert judge(good, rows) == [] and judge(good, rows + rows[:1]) == ["1 rows are not there in the end"]
    last = good[-1]
    one, other = sorted(p for p in last if p.startswith("data/"))[:2]
    fewer = {p: b for p, b in last.items() if p != one}
    assert any("other parts" in x for x in judge([*good, fewer]))
    assert any("rows twice" in x for x in judge([*good, last | {"data/extra.parquet": last[one]}]))
    assert any("is not what" in x for x in judge([*good, last | {one: last[other]}]))
    assert any("added 2 times" in x for x in judge([*good, fewer, last]))
    assert any("card" in x for x in judge([*good, last | {"README.md": b"---\nconfigs: [{data_files: x}]\n---\n"}]))


# ---- decisions, in virtual time -----------------------------------------------------------------------------------

METHODS = ("repo_info", "list_repo_tree", "hf_hub_download", "preupload_lfs_files", "create_commit", "create_repo")


class Moody(PretendedApi):
    "A Hub that refuses or loses what it is asked, by chance"

    draw, share = None, 0.3

    def _answer(self, method, repo, do):
        if self.draw is not None and not self.fates.get(method):
            fates = [refusal(429, Retry_After="30"), refusal(503), refusal(504), ("lost", ConnectionError("lost"))]
            self.fail(method, self.draw.choice(fates) if self.draw.random() < self.share else None)
        return super()._answer(method, repo, do)


class Time:
    "Virtual seconds; waiting lets others have a turn"

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def run_of_forty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forty") / "run"
    made(folder, texts(480)).run()
    return folder


@pytest.mark.parametrize("seed", range(12))
def test_exactly_once_whatever_the_hub_does(run_of_forty, tmp_path, seed):
    clock, folder = Time(), shutil.copytree(run_of_forty, tmp_path / "run")
    hub = Moody(REPO, clock=clock)
    hub.draw = random.Random(seed)
    up = Upload(log_of(folder), REPO, every=1, say=lambda _: None, api=hub, clock=clock, wait=clock.wait)
    up.patience, up.end = 3600.0, 1e9
    up.closing.set()
    up.loop(up.due)
    sent = up.sent()
    assert (sent.left, up.stopped) == (0, None) and judge(trees(hub), texts(480)) == []
    assert {p: b for p, b in hub.files.items() if p.startswith("data/")} == {
        f"data/{n}": b for n, b in parts_of(folder).items()
    }
    assert sent.commits == len(hub.commits) - 1 == len(up.budget.spent())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lost", [False, True])
def test_every_request_fails_once(run_of_forty, tmp_path, method, lost):
    clock, hub = Time(), PretendedApi(REPO)
    folder = shutil.copytree(run_of_forty, tmp_path / "run")
    kinds = [
        refusal(429),
        refusal(412),
        refusal(409),
        refusal(500),
        ConnectionResetError(),
        TimeoutError(),
        refusal(400),
    ]
    hub.fail(method, *[("lost", e) if lost else e for e in kinds])
    up = Upload(log_of(folder), REPO, every=1, say=lambda _: None, api=hub, clock=clock, wait=clock.wait)
    up.closing.set()
    up.loop(up.due)
    assert up.sent().left == 0 and len(hub.commits) == 2 and judge(trees(hub), texts(480)) == []


def test_several_writers_take_turns_in_any_order(tmp_path, monkeypatch):
    "Static shards of one run from three machines, their steps interleaved at random"
    monkeypatch.setattr("llm_analysis.jobs.sender.PARTS", 2)
    rows, clock, hub = texts(360), Time(), Moody(REPO)
    for share in range(3):
        made(tmp_path / f"m{share}", rows, share, 3).run()
    hub.draw, hub.share = random.Random(1), 0.15
    senders = [Sender(log_of(tmp_path / f"m{k}"), REPO, hub, True, print, clock) for k in range(3)]
    draw, busy, conflicts = random.Random(0), set(range(3)), 0
    while busy:
        k = draw.choice(sorted(busy))
        clock.now += 100
        try:
            if senders[k].step(lambda todo: True, last=True) is None:
                busy.discard(k)
        except OSError as e:
            conflicts += e.response.status_code == 412 if hasattr(e, "response") else 0
            senders[k].remote = None
    assert conflicts >= 2 and judge(trees(hub), rows) == []


def test_two_that_computed_the_same(tmp_path):
    "The first that arrives stays; nobody replaces anybody's parts, however often both look again"
    rows, hub = texts(120), PretendedApi(REPO)
    for name in ("a", "b"):
        made(tmp_path / name, rows).run()
    send(log_of(tmp_path / "a"), REPO, api=hub)
    head = hub.commits[-1].oid
    for name in ("b", "a", "b"):
        assert send(log_of(tmp_path / name), REPO, api=hub).left == 0
    assert hub.commits[-1].oid == head


def test_sixty_commits_in_any_hour(tmp_path):
    "A run that always has something to commit, stopped and started again; the last commits of an hour are for its end"
    rows, clock, hub = texts(1000), Time(), PretendedApi(REPO)
    hub.clock = clock
    made(tmp_path / "whole", rows).run()
    live = tmp_path / "live"
    shutil.copytree(tmp_path / "whole", live, ignore=shutil.ignore_patterns("data"))
    (live / "data").mkdir()
    names = sorted(p.name for p in (tmp_path / "whole" / "data").iterdir())
    for n, name in enumerate(names):
        if n % 10 == 0:
            up = Upload(log_of(live), REPO, every=1, api=hub, clock=clock, wait=clock.wait)
        os.link(tmp_path / "whole" / "data" / name, live / "data" / name)
        while (pause := up.step(up.due, last=False)) is not None:
            clock.now += pause
        clock.now += 10
    times = [c.time for c in hub.commits[1:]]
    assert busiest(times) == 54 and len(times) > 60 and len(names) > 60
    up.closing.set()
    up.loop(up.due)
    assert judge(trees(hub), rows) == []


def test_what_is_due(tmp_path):
    made(tmp_path / "run", texts(120)).run()
    clock, hub = Time(), PretendedApi(REPO)

    def commits(**how) -> int:
        up = Upload(log_of(tmp_path / "run"), REPO, api=hub, clock=clock, **how)
        for _ in range(10):
            up.step(up.due, last=False)
        return len(hub.commits)

    assert commits() == commits(every=121) == 1  # neither large nor old
    up = Upload(log_of(tmp_path / "run"), REPO, api=hub, clock=clock)
    while (pause := up.step(up.due, last=False)) is not None:
        clock.now += pause
    assert 300 <= clock.now <= 310 and len(hub.commits) == 2  # old enough
    hub = PretendedApi(REPO)
    assert commits(every=120) == 2
    hub = PretendedApi(REPO)
    assert commits(size_mb=1e-6) == 2


def test_parts_that_were_merged_are_taken_away(tmp_path):
    rows, hub = texts(240), PretendedApi(REPO)
    made(tmp_path / "run", rows).run()
    send(log_of(tmp_path / "run"), REPO, api=hub)
    before, after = compact(log_of(tmp_path / "run"))
    assert after < before
    sent = send(log_of(tmp_path / "run"), REPO, api=hub)
    assert (sent.commits, sent.sent) == (1, after) and judge(trees(hub), rows) == []
    assert {p for p in hub.files if p.startswith("data/")} == {f"data/{n}" for n in parts_of(tmp_path / "run")}


def test_pieces_that_fit_no_longer(tmp_path):
    "The same shard, computed elsewhere in other pieces: if nothing is lacking nothing is sent, else it is refused by name"
    rows, nothing = texts(240), Chunk(Digests.schema.empty_table())
    cuts = {"a": ((0, 3), (3, 6)), "b": ((0, 2), (2, 4), (4, 6)), "c": ((0, 3),)}
    for name, ranges in cuts.items():
        _, log = made(tmp_path / name, rows).settle()
        for start, stop in ranges:
            log.publish(0, start, [nothing] * (stop - start))
    hub = PretendedApi(REPO)
    for name in ("a", "b", "c"):
        assert send(log_of(tmp_path / name), REPO, api=hub).left == 0
    assert len(hub.commits) == 2
    hub = PretendedApi(REPO)
    send(log_of(tmp_path / "c"), REPO, api=hub)
    with pytest.raises(WorldError, match="disjoint or cover each other; got part-.* there and part-"):
        send(log_of(tmp_path / "b"), REPO, api=hub)
    assert len(hub.commits) == 2


def test_a_part_that_was_computed_anew(tmp_path):
    "Under the same name, with other bytes: what was sent ahead of the first is not committed for the second"
    rows, hub = texts(60), PretendedApi(REPO)
    made(tmp_path / "run", rows).run()
    sender = Sender(log_of(tmp_path / "run"), REPO, hub, True, print, Time())
    sender.step(lambda todo: False, last=False)
    assert len(sender.ahead) == len(parts_of(tmp_path / "run"))
    other = elsewhere(tmp_path, rows)
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(other, tmp_path / "run")
    new = parts_of(tmp_path / "run")
    while sender.step(lambda todo: True, last=True) is not None:
        pass
    assert {f"data/{n}": b for n, b in new.items()} == {p: b for p, b in hub.files.items() if p.startswith("data/")}
    assert judge(trees(hub), rows) == []


def elsewhere(home: Path, rows: list[dict]) -> Path:
    "The same run by another process, whose number is in its results"
    code = "import sys; from test_jobs_upload import made, texts; made(sys.argv[1], texts(int(sys.argv[2]))).run()"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))}
    subprocess.run([sys.executable, "-c", code, home / "other", str(len(rows))], env=env, check=True)
    return home / "other"


def test_waiting_for_the_budget_is_not_forgetting(tmp_path):
    "What has been due stays due, however long the budget makes it wait"
    made(tmp_path / "run", texts(60)).run()
    clock, hub = Time(), PretendedApi(REPO)
    up = Upload(log_of(tmp_path / "run"), REPO, api=hub, clock=clock)
    for _ in range(60):
        up.budget.spend()
    while up.step(up.due, last=False) is not None:
        clock.now += 2
    assert 3600 <= clock.now < 3620


def test_a_repository_that_goes_away(tmp_path):
    "One that was there and is no more is not made again"
    made(tmp_path / "run", texts(60)).run()
    hub, clock, said = PretendedApi(REPO), Time(), []
    up = Upload(log_of(tmp_path / "run"), REPO, every=1, say=said.append, api=hub, clock=clock, wait=clock.wait)
    up.check()
    hub.commits.clear()
    up.remote = None  # as after a failure
    up.start().thread.join(30)
    assert up.state == "↑ stopped" and hub.commits == [] and len(said) == 1 and "there is no data set repo" in said[0]


def test_while_somebody_merges(tmp_path, monkeypatch):
    "Parts that vanish between the look and the sending are looked for again"
    rows, hub = texts(240), PretendedApi(REPO)
    made(tmp_path / "run", rows).run()
    done, ahead = [], Sender.send_ahead

    def late(self, names):
        if not done:
            done.append(compact(log_of(tmp_path / "run")))
        return ahead(self, names)

    monkeypatch.setattr(Sender, "send_ahead", late)
    assert send(log_of(tmp_path / "run"), REPO, api=hub, wait=lambda s: None).left == 0
    assert judge(trees(hub), rows) == [] and done


def test_a_part_that_rots_is_not_sent(tmp_path):
    made(tmp_path / "run", texts(60)).run()
    path = sorted((tmp_path / "run" / "data").iterdir())[0]
    blob = bytearray(path.read_bytes())
    blob[20] ^= 1
    path.write_bytes(blob)
    hub = PretendedApi(REPO)
    with pytest.raises(WorldError, match=f"{path.name} as it was written; got other bytes.*--repair"):
        send(log_of(tmp_path / "run"), REPO, api=hub)
    assert len(hub.commits) == 1


def test_a_card_that_somebody_wrote(tmp_path):
    said, hub = [], PretendedApi(REPO, {"README.md": b"# Mine\n"})
    made(tmp_path / "run", texts(240)).run()
    send(log_of(tmp_path / "run"), REPO, api=hub, say=said.append)
    assert hub.files["README.md"] == b"# Mine\n"
    assert len(said) == 1 and "data_files be data/*.parquet" in said[0]
    hub.add("the owner takes ours", hub.files | {"README.md": f"---\na: 1\n---\n{MARK}\n".encode()})
    compact(log_of(tmp_path / "run"))
    send(log_of(tmp_path / "run"), REPO, api=hub, say=said.append)
    assert b"load_dataset" in hub.files["README.md"] and len(said) == 1


def test_a_repository_that_was_meddled_with(tmp_path):
    "A part that was removed or swapped there is sent again; after three times it is said"
    rows, hub = texts(120), PretendedApi(REPO)
    made(tmp_path / "run", rows).run()
    send(log_of(tmp_path / "run"), REPO, api=hub)
    one, other = sorted(p for p in hub.files if p.startswith("data/"))[:2]
    hub.add("remove one, swap one", {p: b for p, b in hub.files.items() if p != one} | {other: b"rot"})
    assert send(log_of(tmp_path / "run"), REPO, api=hub).sent == 2
    assert judge([hub.files], rows) == []

    class Forgetful(PretendedApi):
        "One part never stays"

        def add(self, title, files):
            return super().add(title, {p: b for p, b in files.items() if p != one})

    with pytest.raises(WorldError, match="three commits of part-"):
        send(log_of(tmp_path / "run"), REPO, api=Forgetful(REPO))


def test_one_process_at_a_time(tmp_path, monkeypatch):
    made(tmp_path / "run", texts(60)).run()
    hub, held = PretendedApi(REPO), Turn(tmp_path / "run")
    assert held.take()
    with pytest.raises(WorldError, match="only one that sends"):
        send(log_of(tmp_path / "run"), REPO, api=hub)
    clock = Time()
    up = Upload(log_of(tmp_path / "run"), REPO, every=1, say=lambda _: None, api=hub, clock=clock)
    up.closing.set()
    up.end = 100.0
    up.wait = lambda s: (clock.wait(s), clock.now > 50 and held.leave())
    up.loop(up.due)
    assert up.sent().left == 0 and clock.now > 50  # it took over


def test_looking_costs_little(tmp_path, monkeypatch):
    "After a look at the folder that took a second, there is none for fifty"
    made(tmp_path / "run", texts(60)).run()
    clock, looks = Time(), []
    sender = Sender(log_of(tmp_path / "run"), REPO, PretendedApi(REPO), True, print, clock)
    monkeypatch.setattr(sender.here, "look", lambda again=False: looks.append(clock.now))
    monkeypatch.setattr("llm_analysis.jobs.sender.time", type("fake", (), {"thread_time": lambda: float(len(looks))}))
    for clock.now in range(0, 200, 10):
        sender.step(lambda todo: False, last=False)
    assert looks == [0, 50, 100, 150]


def test_what_the_bar_shows(tmp_path):
    made(tmp_path / "run", texts(60)).run()
    clock, hub = Time(), PretendedApi(REPO)
    up = Upload(log_of(tmp_path / "run"), REPO, api=hub, clock=clock, say=lambda _: None)
    assert up.state is None
    up.check()
    assert up.state == f"↑ {len(parts_of(tmp_path / 'run'))} parts"
    up.failed(refusal(503))
    assert up.state.endswith("parts, waiting")
    up.failed(refusal(403))
    assert up.state == "↑ stopped"


def test_a_hub_that_never_answers(tmp_path, monkeypatch):
    "A request is left to itself after a while; if it is carried out later, that is seen"
    rows, hub, gate = texts(60), PretendedApi(REPO), threading.Event()
    made(tmp_path / "run", rows).run()
    monkeypatch.setattr("llm_analysis.jobs.sender.SECONDS", 0.2)
    commit, stuck = hub.create_commit, []

    def slow(*args, **how):
        if not stuck:
            stuck.append(threading.current_thread())
            gate.wait(10)
        return commit(*args, **how)

    hub.create_commit = slow
    sent = send(log_of(tmp_path / "run"), REPO, api=hub, wait=lambda s: None, say=lambda _: None)
    assert sent.left == 0 and len(hub.commits) == 2 and stuck[0].is_alive()
    gate.set()
    stuck[0].join(10)
    assert len(hub.commits) == 2 and judge(trees(hub), rows) == []  # too late: the head is another


def test_messages_carry_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    for text in (f"Bearer {TOKEN}", "sent an-odd-token there", f"https://x/?token={TOKEN}"):
        assert TOKEN not in pace.masked(text) and "odd" not in pace.masked(text)
    t = pace.trouble(RuntimeError(f"{TOKEN} was refused"), REPO)
    assert TOKEN not in str(t)
    assert TOKEN not in str(pace.trouble(refusal(422, f"{TOKEN} is bad"), REPO))


# ---- the real client, a server on this machine --------------------------------------------------------------------


def test_beside_a_run(hub, tmp_path, capfd, monkeypatch):
    "Commits while it computes; the parts, the manifest and the card are there, and no token is anywhere"
    rows = texts(480)
    job = made(tmp_path / "run", rows)
    _, log = job.settle()
    up = Upload(log, REPO, every=100)
    up.check()
    assert hub.repo(REPO).private
    up.start()
    publish, published = Log.publish, []

    def patient(*args):
        "The twentieth part waits until something is on the Hub"
        published.append(args)
        for _ in range(600 if len(published) == 20 else 0):
            time.sleep(0.0 if len(hub.repo(REPO).commits) > 1 else 0.1)
        return publish(*args)

    monkeypatch.setattr(Log, "publish", patient)
    job.run()
    sent = up.finish(60)
    repo = hub.repo(REPO)
    assert sent.left == 0 and sent.parts == len(parts_of(tmp_path / "run"))
    assert 2 <= len(repo.commits) - 1 == sent.commits and judge(trees(repo), rows) == []
    files = repo.files()
    assert {n: files[f"data/{n}"] for n in parts_of(tmp_path / "run")} == parts_of(tmp_path / "run")
    assert json.loads(files["manifest.json"]) == json.loads((tmp_path / "run" / "manifest.json").read_text())
    everything = [*files.values(), *(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())]
    assert not [b for b in everything if TOKEN.encode() in b]
    assert TOKEN not in "".join(capfd.readouterr())
    assert str(tmp_path) not in files["README.md"].decode() + files["manifest.json"].decode()
    before = dict(hub.seen)
    again = upload(str(tmp_path / "run"), repo=REPO)
    assert (again.sent, again.commits) == (0, 0) and hub.seen["put"] == before["put"]


LOADERS = """
import sys, datasets, pandas
repo, commit = sys.argv[1:]
print(len(datasets.load_dataset(repo, split="train", revision=commit)))
print(len(pandas.read_parquet(f"hf://datasets/{repo}@{commit}/data")))
"""


def loaded(hub, home: Path, commit: str) -> list[int]:
    "Rows that `datasets` and `pandas` read at a commit, each in the way that the card names"
    env = environment(hub.address, home, HF_TOKEN=TOKEN)
    done = subprocess.run([sys.executable, "-c", LOADERS, REPO, commit], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(x) for x in done.stdout.split()]


def test_readers_need_nothing_else(hub, tmp_path):
    made(tmp_path / "run", texts(120)).run()
    upload(str(tmp_path / "run"), repo=REPO)
    assert loaded(hub, tmp_path / "cache", hub.repo(REPO).head) == [120, 120]


def test_a_quota_and_an_outage(at_hub, tmp_path):
    "The Hub allows two commits an hour and is down for ten minutes: it takes as long as it takes, and nobody says much"
    rows, clock, said = texts(240), Time(), []
    made(tmp_path / "run", rows).run()
    names = sorted(parts_of(tmp_path / "run"))
    (tmp_path / "later").mkdir()
    for name in names[4:]:
        (tmp_path / "run" / "data" / name).rename(tmp_path / "later" / name)
    with serve(token=TOKEN, commits_per_hour=2, clock=clock) as hub:
        at_hub(hub)
        hub.down()

        def wait(seconds: float) -> None:
            clock.now += seconds
            if clock.now >= 600 and not hub._server.servers:
                hub.up()
            if clock.now >= 600 and names[4:] and hub.repos and len(hub.repo(REPO).commits) > 1:
                name = names.pop()
                (tmp_path / "later" / name).rename(tmp_path / "run" / "data" / name)
                up.closing.set() if not names[4:] else None

        up = Upload(log_of(tmp_path / "run"), REPO, every=1, say=said.append, clock=clock, wait=wait)
        up.loop(up.due)
        repo = hub.repo(REPO)
        assert up.sent().left == 0 and judge(trees(repo), rows) == []
        assert busiest([c.time for c in repo.commits[1:]]) == 2 and clock.now > 3600
        assert 2 <= len(said) <= 8 and not [s for s in said if TOKEN in s]


def test_the_first_machine_vanished(hub, tmp_path):
    "An empty folder goes on from the Hub; what is computed twice is what had not been committed there"
    rows = texts(480)
    first = made(tmp_path / "first", rows)
    plan, log = first.settle()
    first.run()
    names = sorted(parts_of(tmp_path / "first"))
    for name in names[len(names) // 2 :]:  # computed here, but not committed to the Hub when the machine vanished
        (tmp_path / "first" / "data" / name).unlink()
    upload(str(tmp_path / "first"), repo=REPO)
    shutil.rmtree(tmp_path / "first")
    hub.faults = Faults(rates={"*": {"429": 0.1, "503": 0.1, "lost": 0.1}}, seed=3, seconds=0)
    count = fetch(REPO, tmp_path / "second", wait=lambda s: None, say=lambda _: None)
    hub.faults = Faults()
    assert count == len(names) // 2
    there = sum(p.rows for p in log_of(tmp_path / "second").parts())
    second = made(tmp_path / "second", rows)
    done = second.run()
    assert done.complete and done.computed == 480 - there
    assert second.verify().ok and faults(tmp_path / "second", rows) == dict(missing=0, doubled=0, wrong=0)
    upload(str(tmp_path / "second"), repo=REPO)
    assert judge(trees(hub.repo(REPO)), rows) == []


def test_a_fetch_that_is_cut_off_goes_on(hub, tmp_path):
    rows = texts(240)
    made(tmp_path / "first", rows).run()
    upload(str(tmp_path / "first"), repo=REPO)
    count = len(parts_of(tmp_path / "first"))
    hub.script = None
    hub.faults = Faults(script={"blob": {n: "closed" for n in range(6, 400)}})
    with pytest.raises(WorldError):
        fetch(REPO, tmp_path / "second", patience=3, wait=lambda s: None, say=lambda _: None, clock=Ticks())
    hub.faults = Faults()
    there = len(list((tmp_path / "second" / "data").iterdir()))
    assert 0 < there < count
    assert fetch(REPO, tmp_path / "second") == count - there
    assert parts_of(tmp_path / "second") == parts_of(tmp_path / "first")
    assert not (tmp_path / "second" / "_job" / "fetch").exists()
    assert verify(log_of(tmp_path / "second")).unsigned == 0


class Ticks:
    "A clock that moves a little whenever it is read"

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def test_a_download_that_was_tampered_with(hub, tmp_path):
    rows = texts(60)
    made(tmp_path / "first", rows).run()
    upload(str(tmp_path / "first"), repo=REPO)
    repo = hub.repo(REPO)
    name = sorted(parts_of(tmp_path / "first"))[1]
    b = repo.at().tree[f"data/{name}"]
    repo.large[b.sha256] = type(b)(b.data[:-1] + b"?", b.size, b.sha256, True)
    with pytest.raises(WorldError, match=f"{name} as the manifest of {REPO} says"):
        fetch(REPO, tmp_path / "second", wait=lambda s: None)
    assert not (tmp_path / "second" / "data" / name).exists()


def test_with_xet(tmp_path):
    "Where the client goes the way of Xet, parts do, too"
    pytest.importorskip("hf_xet")
    made(tmp_path / "run", texts(60)).run()
    code = "import sys; from llm_analysis.jobs.upload import upload; print(upload(sys.argv[1], repo=sys.argv[2]))"
    with serve(token=TOKEN, xet=True) as hub:
        env = environment(hub.address, tmp_path / "cache", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="0")
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        how = [sys.executable, "-c", code, str(tmp_path / "run"), REPO]
        done = subprocess.run(how, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "holds all" in done.stdout, done.stderr
        assert done.stderr == "" and hub.seen["put"] == 0 and not hub.leaks
        tree = hub.repo(REPO).at().tree
        want = {f"data/{n}": remote_sha(b) for n, b in parts_of(tmp_path / "run").items()}
        assert {p: b.sha256 for p, b in tree.items() if p.startswith("data/")} == want


# ---- what cannot be done is said in one line ----------------------------------------------------------------------


def one_line(raised) -> str:
    text = str(raised.value)
    assert "\n" not in text and TOKEN not in text and len(text) < 400
    return text


@pytest.mark.parametrize(
    "repo", ["digests", "user/a/b", "https://huggingface.co/datasets/user/digests", "user/a b", ""]
)
def test_no_name_of_a_repository(tmp_path, repo):
    made(tmp_path / "run", texts(20)).run()
    for call in (lambda: upload(str(tmp_path / "run"), repo=repo), lambda: fetch(repo, tmp_path / "new")):
        with pytest.raises(InputError, match="USER/NAME") as raised:
            call()
        one_line(raised)


def test_repositories_of_others(hub, tmp_path):
    made(tmp_path / "run", texts(20)).run()
    made(tmp_path / "other", texts(21)).run()
    upload(str(tmp_path / "other"), repo="user/other")
    hub.add("user/foreign", hub.repo("user/other").files() | {"data/train-00000.parquet": b"x"})
    hub.add("user/model", {"README.md": b"", "model.safetensors": b"x"})
    hub.add("user/strange", {p: b for p, b in hub.repo("user/other").files().items() if p != "manifest.json"})
    asked = hub.seen["commit"]
    for repo, says, folder in (
        ("user/other", "got run", "run"),
        ("user/foreign", "got data/train-00000.parquet", "other"),
        ("user/model", "got model.safetensors", "run"),
    ):
        with pytest.raises(WorldError, match=says) as raised:
            upload(str(tmp_path / folder), repo=repo)
        one_line(raised)
        with pytest.raises(WorldError, match=says):
            Upload(log_of(tmp_path / folder), repo).check()
    assert hub.seen["commit"] == asked
    with pytest.raises(WorldError, match="does not know"):
        fetch("user/strange", tmp_path / "new")
    with pytest.raises(InputError, match="another one: data.rows"):
        fetch("user/other", tmp_path / "run")


def test_no_token_no_right(hub, tmp_path, monkeypatch):
    made(tmp_path / "run", texts(20)).run()
    hub.add(REPO, {})
    for setting, says in (
        (lambda: setattr(hub, "may_write", False), r"no right to write to it \(403\)"),
        (lambda: monkeypatch.setenv("HF_TOKEN", "hf_someOtherMadeUpToken"), r"not accepted \(401\)"),
        (lambda: monkeypatch.delenv("HF_TOKEN"), r"no token was found \(401\)"),
    ):
        setting()
        said = []
        with pytest.raises(WorldError, match=says + ".*hf auth login") as raised:
            upload(str(tmp_path / "run"), repo=REPO)
        one_line(raised)
        up = Upload(log_of(tmp_path / "run"), REPO, every=1, say=said.append).start()
        up.thread.join(30)  # a background upload gives up, says so once, and nothing is raised
        assert not up.thread.is_alive() and up.state == "↑ stopped" and len(said) == 1 and TOKEN not in said[0]
        assert up.finish(1).left == len(parts_of(tmp_path / "run"))
    assert [f for c in hub.repo(REPO).commits for f in c.tree] == []


def test_offline_and_unreachable(at_hub, tmp_path, monkeypatch):
    made(tmp_path / "run", texts(20)).run()
    with serve(token=TOKEN) as hub:
        at_hub(hub)
        hub.down()
        for call in (lambda: upload(str(tmp_path / "run"), repo=REPO), lambda: fetch(REPO, tmp_path / "new")):
            with pytest.raises(WorldError, match="no reply from the Hub .*refused.*check the network") as raised:
                call()
            one_line(raised)
        said = []
        Upload(log_of(tmp_path / "run"), REPO, say=said.append).check()  # the run goes on
        assert len(said) == 1 and "asked again" in said[0]
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for call in (lambda: upload(str(tmp_path / "run"), repo=REPO), lambda: fetch(REPO, tmp_path / "new")):
            with pytest.raises(WorldError, match="HF_HUB_OFFLINE is set.*unset it") as raised:
                call()
            one_line(raised)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"parts": [{"name": "x"}]}', b'{"parts": 3}', b"\xff\xfe"])
def test_a_manifest_that_is_none(tmp_path, text):
    made(tmp_path / "run", texts(60)).run()
    hub = PretendedApi(REPO)
    send(log_of(tmp_path / "run"), REPO, api=hub)
    compact(log_of(tmp_path / "run"))
    hub.add("somebody edits", hub.files | {"manifest.json": text})
    for call in (
        lambda: send(log_of(tmp_path / "run"), REPO, api=hub),
        lambda: fetch(REPO, tmp_path / "new", api=hub),
    ):
        with pytest.raises(WorldError, match="manifest.json on the Hub; got .*; remove") as raised:
            call()
        one_line(raised)


def test_no_run_to_send_or_fetch(hub, tmp_path):
    with pytest.raises(WorldError, match="got no spec in 'empty'"):
        upload(str(tmp_path / "empty"), repo=REPO)
    hub.add("user/empty", {})
    for repo in ("user/nowhere", "user/empty"):
        with pytest.raises(WorldError, match="a run"):
            fetch(repo, tmp_path / "new")
        assert fetch(repo, tmp_path / "new", must_exist=False, say=lambda _: None) == 0


# ---- the Hub is down ----------------------------------------------------------------------------------------------


def beside(folder: Path, rows: list[dict], pause: float, api: HfApi | None) -> tuple[float, float, float]:
    "Seconds of a run; of those, in calls of the upload by its thread; and CPU seconds of the upload's own thread"
    job, spent, cpu = made(folder, rows), 0.0, 0.0
    (folder.parent / "ledger").mkdir(parents=True, exist_ok=True)
    (folder.parent / "ledger" / "pause").write_text(str(pause))
    job.step.ledger = str(folder.parent / "ledger")
    _, log = job.settle()
    up = Upload(log, REPO, every=50, api=api, say=lambda _: None) if api else None
    if up:
        begun = time.perf_counter()
        run = up._run
        used = []
        up._run = lambda: (run(), used.append(time.thread_time()))
        up.start()
        spent += time.perf_counter() - begun
    began = time.perf_counter()
    done = job.run()
    whole = time.perf_counter() - began
    if up:
        for _ in range(int(10 * whole)):  # a bar asks ten times a second
            begun = time.perf_counter()
            up.state  # noqa: B018
            spent += time.perf_counter() - begun
        left = up.finish(0.1).left
        up.thread.join(30)
        cpu = sum(used)
        assert left == len(parts_of(folder))
    assert done.complete
    return whole, spent, cpu


def test_down_throughout(at_hub, tmp_path):
    "Results are whole on this machine, and the run's thread spends next to nothing on the upload"
    rows = texts(240)
    with serve(token=TOKEN) as hub:
        at_hub(hub)
        hub.down()
        whole, spent, cpu = beside(tmp_path / "run", rows, 0.02, HfApi(endpoint=hub.address))
    assert faults(tmp_path / "run", rows) == dict(missing=0, doubled=0, wrong=0)
    assert verify(log_of(tmp_path / "run")).ok
    assert spent < 0.02 * whole, f"{spent:.4f} s of {whole:.1f} s"


# ---- torture ------------------------------------------------------------------------------------------------------

VICTIM = Path(__file__).with_name("upload_victim.py")


def begin(hub, home: Path, folder: Path, zero: float) -> subprocess.Popen:
    env = environment(hub.address, home / "cache", HF_TOKEN=TOKEN)
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    asked = json.dumps(dict(folder=str(folder), repo=REPO, zero=zero, end=str(home / "end")))
    with open(home / f"said-{folder.name}", "ab") as said:
        own = dict(stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=env)
        return subprocess.Popen([sys.executable, VICTIM, asked], **own)


class Torture:
    "Two machines push static shards of one run into one repository; the Hub is moody, the first machine's uploader dies"

    def __init__(self, home: Path, rows: int, kills: int, seconds: float, seed: int = 0):
        self.home, self.rows, self.kills, self.seconds = home, texts(rows), kills, seconds
        self.draw, self.zero = random.Random(seed), time.monotonic()
        self.live = [home / "a", home / "b"]
        for share, live in enumerate(self.live):
            whole = home / f"whole-{live.name}"
            made(whole, self.rows, share, 2).run()
            shutil.copytree(whole, live, ignore=shutil.ignore_patterns("data"))
            (live / "data").mkdir()
        names = [(live, n) for live in self.live for n in sorted(parts_of(home / f"whole-{live.name}"))]
        self.names = self.draw.sample(names, len(names))

    def feed(self) -> None:
        "Let the parts appear, one after the other"
        for live, name in self.names:
            os.link(self.home / f"whole-{live.name}" / "data" / name, live / "data" / name)
            time.sleep(self.seconds / len(self.names))

    def run(self, hub) -> dict:
        "What happened, and what is wrong with it"
        feeder = threading.Thread(target=self.feed, daemon=True)
        workers = [begin(hub, self.home, live, self.zero) for live in self.live]
        feeder.start()
        for _ in range(self.kills):
            while not (self.live[0] / "_job" / f"ready-{workers[0].pid}").exists():
                time.sleep(0.05)
            time.sleep(self.draw.uniform(0.1, self.seconds / max(self.kills, 1) * 0.8))
            workers[0].send_signal(signal.SIGKILL)
            workers[0].wait()
            workers[0] = begin(hub, self.home, self.live[0], self.zero)
        feeder.join()
        (self.home / "end").touch()
        codes = [w.wait(900) for w in workers]
        return self.verdict(hub, codes)

    def verdict(self, hub, codes: list[int]) -> dict:
        repo = hub.repo(REPO)
        wrong = judge(trees(repo), self.rows)
        want = {n: b for live in self.live for n, b in parts_of(live).items()}
        there = {p.removeprefix("data/"): b for p, b in repo.files().items() if p.startswith("data/")}
        wrong += [] if want == there else ["what is there is not what is here"]
        said = b"".join(p.read_bytes() for p in self.home.rglob("*") if p.is_file() and p.suffix != ".parquet")
        wrong += ["a token was written"] if TOKEN.encode() in said else []
        wrong += [f"exit {code}" for code in codes if code] + hub.leaks
        by = {live.name: [] for live in self.live}
        states = trees(repo)
        for before, c in zip(states, repo.commits[1:]):
            new = {p.removeprefix("data/") for p in c.tree if p.startswith("data/") and p not in before}
            for live in self.live:
                if new & set(parts_of(live)):
                    by[live.name].append(c.time)
        most = {name: busiest(times) for name, times in by.items()}
        wrong += [f"{k} commits in an hour by {name}" for name, k in most.items() if k > 60]
        given = Counter(f for (_, f), k in hub.given.items() for _ in range(k))
        hours = (repo.commits[-1].time - repo.commits[0].time) / 3600
        facts = dict(parts=len(there), commits=len(repo.commits) - 1, busiest_hour=most, virtual_hours=round(hours, 1))
        conflicts = sum(a.kind == "commit" and a.status == 412 for a in hub.log)
        faults_given = dict(given) | {"412": conflicts}
        return dict(wrong=wrong) | facts | dict(requests=len(hub.log), faults=faults_given)


RATES = {"*": {"429": 0.05, "ratelimit": 0.05, "503": 0.05, "504": 0.03, "500": 0.02, "lost": 0.1}}


def torture(home: Path, rows: int, kills: int, seconds: float, seed: int = 0, samples: int = 0) -> dict:
    t = Torture(home, rows, kills, seconds, seed)
    with serve(token=TOKEN, faults=Faults(RATES, seed=seed, seconds=1), clock=fast(t.zero)) as hub:
        found = t.run(hub)
        hub.faults = Faults()
        commits = hub.repo(REPO).commits[1:]
        for c in random.Random(seed).sample(commits, min(samples, len(commits))):
            rows_there = json.loads(c.tree["manifest.json"].data)["rows"]
            if loaded(hub, home / "cache", c.oid) != [rows_there] * 2:
                found["wrong"].append(f"load_dataset at {c.oid[:7]}")
    return found


def test_a_short_torture(tmp_path):
    found = torture(tmp_path, rows=960, kills=3, seconds=9, samples=1)
    assert found["wrong"] == [] and sum(found["faults"].values()) > 20 and found["faults"]["lost"], found


@pytest.mark.slow
def test_torture(tmp_path):
    found = torture(tmp_path, rows=12_000, kills=20, seconds=100, samples=5)
    assert found["wrong"] == [] and found["parts"] >= 1000, found


if __name__ == "__main__":  # make torture: as it is promised
    with tempfile.TemporaryDirectory() as home:
        began = time.monotonic()
        found = torture(Path(home), rows=12_000, kills=20, seconds=100, samples=5)
        print(json.dumps(found | dict(seconds=round(time.monotonic() - began))), flush=True)
    with tempfile.TemporaryDirectory() as home:
        rows = texts(1200)
        bare, _, _ = beside(Path(home) / "bare" / "run", rows, 0.05, None)
        whole, spent, cpu = beside(Path(home) / "down" / "run", rows, 0.05, HfApi(endpoint="http://127.0.0.1:9"))
        share = f"{spent / whole:.4%} of the run's thread, {cpu / whole:.2%} of a core in the upload's"
        print(f"the Hub down throughout: {bare:.1f} s without an upload, {whole:.1f} s with one; {share}", flush=True)
    sys.exit(bool(found["wrong"]))
