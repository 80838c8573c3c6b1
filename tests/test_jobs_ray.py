"""Workers of a Ray cluster: killed, stopped, badly placed; drivers killed; machines and clusters lost."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs import cluster, dispatch
from llm_analysis.jobs.batch import StepError
from llm_analysis.jobs.cluster import run_ray
from llm_analysis.jobs.connect import _token, connected
from llm_analysis.jobs.dispatch import Brief, Dispatch
from llm_analysis.jobs.executor import run_here
from llm_analysis.jobs.job import Job, JobOptions
from llm_analysis.jobs.testing import Digests, faults, texts

if __name__ != "__main__":
    pytest.importorskip("ray", reason="needs the extra `ray`: pip install -e '.[ray]'")


@pytest.fixture(scope="module")
def ray():
    "One private cluster for all tests of this module; a home that must stay as it is"
    token = Path.home() / ".ray" / "auth_token"
    before = token.exists()
    with connected(workers=4) as ray:
        yield ray
    assert token.exists() == before and not ray.is_initialized()


@pytest.fixture
def home():
    "In memory where that is possible: what is tested here is order, not the disk"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as home:
        (Path(home) / "pause").write_text("0")
        yield Path(home)


class Watch:
    "A control that keeps a record, and halts when it is told to"

    def __init__(self, halt=lambda watch: False):
        self.said, self.stands, self.when = [], {}, halt

    def halt(self):
        return self.when(self)

    def say(self, text):
        self.said.append(text)

    def seen(self, worker, now):
        self.stands[worker] = now

    def settled(self, worker, shard, now=None):
        self.stands[worker] = now

    def gone(self, worker):
        self.stands.pop(worker, None)


def planned(step, rows, out, part_rows=40, max_batch_size=16):
    "The brief of a run and its dispatcher, as `Job` makes them"
    options = JobOptions(batch_tokens=160, max_batch_size=max_batch_size, part_rows=part_rows)
    job = Job(rows, step, output_dir=out, options=options, progress=False, part_seconds=5.0)
    plan, log = job.settle()
    return Brief(step, job.source, plan, job.folder, log.fingerprint, job.loop), Dispatch(plan, log)


def answers(brief):
    "What is on disk, but for the process that wrote it"
    return brief.log().open_table(["index", "digest"]).sort_by("index")


def workers(home, gone=()):
    "Processes that set up a step, and live"
    found = [int(p.name.split("-")[2]) for p in home.glob("worker-*")]
    return [pid for pid in found if pid not in gone and alive(pid)]


def alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


def count(home):
    "Rows that were computed, by whoever"
    with suppress(OSError):
        return sum(int(x.split()[1]) for x in (home / "computed").read_text().splitlines())
    return 0


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


# ---- the same answer


def test_three_actors_give_what_one_process_gives(ray, home):
    rows = texts(600)
    alone, tasks = planned(Digests(), rows, home / "alone")
    run_here(alone, tasks, Watch())
    brief, tasks = planned(Digests(str(home)), rows, home / "out")
    watch = Watch()
    assert run_ray(brief, tasks, watch, workers=3) == 0
    assert answers(brief).equals(answers(alone)) and len(workers(home)) <= 3
    names = lambda b: [(p.path.name, p.stop, p.rows) for p in b.log().parts()]
    assert sorted(watch.stands) == ["worker 0", "worker 1", "worker 2"] and names(brief) == names(alone)
    assert watch.said[0].startswith("Ray: 1 machine, ")
    assert run_ray(brief, Dispatch(brief.plan, brief.log(), []), watch) == 0  # nothing to do: nothing is started


def test_killed_actors_are_started_again_and_nothing_is_lost(ray, home):
    rows, killed = texts(1500), []
    (home / "pause").write_text("0.03")
    brief, tasks = planned(Digests(str(home)), rows, home / "out")

    def kill(watch):
        if len(killed) < 2 and sum(n is not None and not isinstance(n, str) for n in watch.stands.values()) > 1:
            pids = workers(home, killed)
            if len(pids) > 1:
                os.kill(pids[0], signal.SIGKILL)
                killed.append(pids[0])
        return False

    watch = Watch(kill)
    assert run_ray(brief, tasks, watch, workers=3) == 2 == len(killed)
    assert not any(faults(home / "out", rows).values())
    assert sum("died: Ray starts it again" in text for text in watch.said) == 2
    assert 1500 <= count(home) <= 1500 + 2 * (40 + 32)  # a part's buffer and the batches at work


# ---- rows that kill, steps that fail


class Deadly(Digests):
    "One row ends every process that touches it"

    def process(self, rows):
        for row in rows:
            if row["text"].startswith("row7 "):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().process(rows)


@pytest.mark.slow
def test_only_the_deadly_row_is_condemned(ray, home, monkeypatch):
    monkeypatch.setattr(dispatch, "SUSPECT", 1), monkeypatch.setattr(dispatch, "CONVICTED", 2)
    monkeypatch.setattr(dispatch, "FATAL_ROW", 1)
    rows = texts(120)
    brief, tasks = planned(Deadly(), rows, home / "out")
    assert run_ray(brief, tasks, Watch(), workers=1) == 3
    assert brief.log().skipped() == [(7, "failed", "killed its worker: its process ended")]
    assert faults(home / "out", rows) == dict(missing=1, doubled=0, wrong=0)


class Unready(Digests):
    def __init__(self, how):
        self.how = how

    def setup(self, device):
        if self.how == "raises":
            raise OSError(f"no weights for {device}")
        print("the last words")
        os._exit(9)


def test_a_setup_that_fails_ends_the_run(ray, home):
    brief, tasks = planned(Unready("raises"), texts(40), home / "raises")
    with pytest.raises(WorldError, match="no weights for cpu"):
        run_ray(brief, tasks, Watch(), workers=1)


@pytest.mark.slow
def test_a_setup_that_dies_ends_the_run_at_the_third_time(ray, home):
    brief, tasks = planned(Unready("dies"), texts(40), home / "dies")
    with pytest.raises(WorldError, match="got 3 that died in setup, the last on .*: the last words; see worker-"):
        run_ray(brief, tasks, Watch(), workers=1)


class Failing(Digests):
    def process(self, rows):
        raise ValueError("no such label")


def test_errors_of_the_step_and_steps_that_cannot_travel(ray, home):
    brief, tasks = planned(Failing(), texts(40), home / "out")
    with pytest.raises(StepError, match="every row of the first batch failed.*no such label"):
        run_ray(brief, tasks, Watch(), workers=1)
    step = Digests()  # one that cannot travel
    brief, tasks = planned(step, texts(40), home / "generator")
    step.rest = (x for x in range(3))
    with pytest.raises(InputError, match="a step that can be copied to workers.*generator"):
        run_ray(brief, tasks, Watch())


def test_actors_refuse_a_wrong_place(ray, home, monkeypatch):
    brief, tasks = planned(Digests(), texts(40), home / "out")
    other, more = planned(Digests(), texts(41), home / "other")
    elsewhere = dataclasses.replace(brief, folder=other.folder)
    with pytest.raises(WorldError, match="the run in .* on every machine; got another run on .* file system"):
        run_ray(elsewhere, tasks, Watch(), workers=1)
    monkeypatch.setattr(cluster, "versions", lambda: "Python 3.99 and llm-analysis-lab 0.1.0")
    with pytest.raises(WorldError, match="expected Python 3.99 .* on every machine; got Python 3.*; install the same"):
        run_ray(other, more, Watch(), workers=1)


# ---- stopping, waiting


@pytest.mark.slow  # it needs a machine with nothing else to do
def test_halt_finishes_the_batch_and_commits(ray, home):
    rows = texts(1500)
    (home / "pause").write_text("0.2")
    brief, tasks = planned(Digests(str(home)), rows, home / "out", part_rows=10_000, max_batch_size=2)
    watch = Watch(lambda watch: count(home) > 20)
    assert run_ray(brief, tasks, watch, workers=2) == 0
    assert 20 < brief.log().open_table().num_rows == count(home) < 200
    (home / "pause").write_text("0")
    run_ray(brief, Dispatch(brief.plan, brief.log()), Watch(), workers=1)
    assert count(home) == 1500 and not any(faults(home / "out", rows).values())


@pytest.mark.slow  # it needs a machine with nothing else to do
def test_a_stopped_actor_loses_its_shard_and_does_no_harm(ray, home):
    rows, stopped, woken = texts(1200), [], []
    (home / "pause").write_text("0.05")
    brief, tasks = planned(Digests(str(home)), rows, home / "out")

    def stop(watch):
        silent = any("has been silent" in text for text in watch.said)
        if not stopped and len(workers(home)) == 2 and brief.log().parts():
            stopped.append(workers(home)[0])
            os.kill(stopped[0], signal.SIGSTOP)
        if silent and not woken:
            woken.append(os.kill(stopped[0], signal.SIGCONT))
        return False

    assert run_ray(brief, tasks, Watch(stop), workers=2, patience=1.0) == 0
    assert woken and not any(faults(home / "out", rows).values())


def test_who_finds_no_place_says_so(ray, home, monkeypatch):
    monkeypatch.setattr(cluster, "PLACE", 1.0)
    brief, tasks = planned(Digests(), texts(40), home / "out")
    watch = Watch(lambda watch: len(watch.said) > 1)
    run_ray(brief, tasks, watch, workers=2, device="cuda")
    assert watch.said[1].startswith(
        "expected a free GPU for each of 2 workers; got 0 free of 0 in the cluster; 2 wait"
    )


# ---- drivers of their own: killed, interrupted, told to end

LEAD = """
    import os, sys
    from pathlib import Path
    from llm_analysis.jobs.cluster import run_ray
    from llm_analysis.jobs.dispatch import Brief
    from llm_analysis.jobs.job import Job, JobOptions
    from llm_analysis.jobs.testing import Digests, texts

    WORDS = {"index": "digest"}

    def mark(digest):
        return {"index": digest}.get(next(iter(WORDS)), "nothing")

    class Mine(Digests):  # a step of __main__, with a function and a global of __main__
        def process(self, rows):
            return [mark(digest) for digest in super().process(rows)]

    class RayJob(Job):
        def _execute(self, plan, log, dispatch, control):
            brief = Brief(self.step, self.source, plan, self.folder, log.fingerprint, self.loop)
            return run_ray(brief, dispatch, control, workers=int(sys.argv[4]), patience=self.patience)

    home, rows, part_rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    options = JobOptions(batch_tokens=160, max_batch_size=16, part_rows=part_rows)
    job = RayJob(texts(rows), Mine(str(home)), output_dir=home / "out", options=options, part_seconds=5.0)
    done = job.run()
    print(done)
    sys.exit(0 if done.complete else 5)
"""


def lead(home, rows, part_rows=64, workers=3, **more):
    "A process that leads; what it says goes to a file"
    (home / "tmp").mkdir(exist_ok=True)
    env = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
    env |= dict(TQDM_DISABLE="0", TMPDIR=str(home / "tmp"), **more)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", textwrap.dedent(LEAD), str(home), *map(str, (rows, part_rows, workers))]
    with open(home / "said", "ab") as said:
        own = dict(stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        return subprocess.Popen(command, env=env, **own)


def test_a_driver_is_killed_then_interrupted_and_the_run_goes_on(ray, home):
    "Drivers with a step of their own that join the cluster by its address, with its token"
    (home / "pause").write_text("0.05")
    own = dict(RAY_ADDRESS=ray.get_runtime_context().gcs_address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_token())
    driver = lead(home, 2000, workers=2, **own)
    wait_for(lambda: count(home) > 200 or driver.poll() is not None)
    driver.kill()
    driver.wait()
    wait_for(lambda: not workers(home), 30)  # actors end with their driver
    before = count(home)
    driver = lead(home, 2000, workers=2, **own)
    wait_for(lambda: count(home) > before + 200 or driver.poll() is not None)
    os.killpg(driver.pid, signal.SIGTERM)  # first: finish what is at work
    assert driver.wait(30) == 5, (home / "said").read_text()
    (home / "pause").write_text("0")
    assert lead(home, 2000, workers=2, **own).wait(60) == 0, (home / "said").read_text()
    assert not any(faults(home / "out", texts(2000)).values())
    written = Counter(pid for f in (home / "out" / "data").iterdir() for pid in pq.read_table(f)["pid"].to_pylist())
    assert 0 <= count(home) - sum(written.values()) <= 2 * (64 + 32)  # what the first two had not written yet
    said = (home / "said").read_text()
    assert "interrupted: finishing what is at work" in said and "run the same again to go on" in said
    assert _token() not in said and not (home / ".ray").exists()


def test_what_is_told_to_those_who_have_no_cluster(home):
    code = """
        import os, signal, sys
        import llm_analysis.jobs.cluster
        from llm_analysis.jobs.connect import connected
        assert "ray" not in sys.modules
        def said(address):
            try:
                with connected(address):
                    pass
            except (RuntimeError, ValueError) as e:
                print(type(e).__name__, e)
        said("ray://elsewhere:10001"), said("127.0.0.1:1"), said("nonsense")
        for name in [n for n in sys.modules if n.split(".")[0] == "ray"]:
            del sys.modules[name]
        sys.modules["ray"] = None
        said(None)
    """
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=60
    )
    client, closed, nonsense, none = out.stdout.splitlines()
    assert client.startswith(
        "InputError expected auto or HOST:PORT; got ray://elsewhere:10001; run on a machine of the"
    )
    assert closed.startswith("WorldError expected a Ray cluster at 127.0.0.1:1; got [Errno 111] Connection refused;")
    assert nonsense.startswith("WorldError expected a Ray cluster at nonsense; got invalid literal")
    assert none.endswith("got none; install llm-analysis-lab[ray], or use the executor local")


# ---- private clusters, and what becomes of clusters


def family(pid):
    "name → pid of all processes that descend from `pid`"
    import psutil

    with suppress(psutil.NoSuchProcess):
        return {p.name(): p.pid for p in psutil.Process(pid).children(recursive=True)}
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_private_cluster_is_shut_and_leaves_nothing(home, number):
    "Its token stands in no file, nobody gets in without it, a signal for everybody ends it in good order"
    (home / "pause").write_text("0.1")
    (home / "user").mkdir()
    driver = lead(home, 2000, HOME=str(home / "user"))
    wait_for(lambda: count(home) > 100 or driver.poll() is not None)
    environ = Path(f"/proc/{workers(home)[0]}/environ").read_bytes().split(b"\0")
    token = next(x for x in environ if x.startswith(b"RAY_AUTH_TOKEN=")).partition(b"=")[2]
    written = [p for p in home.rglob("*") if p.is_file() and token in p.read_bytes()]
    code = "import ray, sys; ray.init(address=sys.argv[1]); print('inside')"
    head = Path(f"/proc/{family(driver.pid)['raylet']}/cmdline").read_text()
    address = next(x.split("=")[1] for x in head.split("\0") if x.startswith("--gcs-address"))
    for more in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * len(token)}):
        env = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")} | dict(HOME=str(home / "user")) | more
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with subprocess.Popen([sys.executable, "-c", code, address], env=env, **pipe) as stranger:
            line = next(x for x in stranger.stdout if "inside" in x or "AuthToken" in x)
            stranger.kill()
        assert "Unauthenticated: RPC error: InvalidAuthToken" in line
    family_then = family(driver.pid)
    os.killpg(driver.pid, number)
    assert driver.wait(60) == 5, (home / "said").read_text()[-3000:]
    assert len(token) == 64 and not written
    wait_for(lambda: not any(map(alive, family_then.values())), 30)
    assert not list((home / "user").iterdir()) and not list((home / "tmp").glob("ray-*"))
    assert token.decode() not in (home / "said").read_text()
    kept = sum(pq.read_metadata(f).num_rows for f in (home / "out" / "data").iterdir())
    assert 0 <= count(home) - kept <= (0 if number == signal.SIGINT else 3 * (64 + 32))  # SIGTERM ends Ray, too


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, says",
    [("gcs_server", "head of the Ray cluster; got"), ("raylet", "Ray's own process on this machine; got")],
)
def test_a_lost_cluster_ends_the_run_with_a_reason(home, what, says):
    (home / "pause").write_text("0.2")
    driver = lead(home, 20_000)
    wait_for(lambda: count(home) > 100 or driver.poll() is not None)
    os.kill(family(driver.pid)[what], signal.SIGKILL)
    began = time.monotonic()
    assert driver.wait(90) == 1 and says in (home / "said").read_text(), (home / "said").read_text()
    print(
        what, f"{time.monotonic() - began:.0f} s", [x for x in (home / "said").read_text().splitlines() if says in x]
    )
    (home / "pause").write_text("0")
    assert lead(home, 20_000).wait(120) == 0
    assert not any(faults(home / "out", texts(20_000)).values())


@pytest.mark.slow
def test_an_actor_that_never_wakes_up_is_replaced(ray, home):
    rows, stopped = texts(1200), []
    (home / "pause").write_text("0.2")
    brief, tasks = planned(Digests(str(home)), rows, home / "out")

    def stop(watch):
        if not stopped and len(workers(home)) == 2:
            stopped.extend(workers(home)[:1])
            os.kill(stopped[0], signal.SIGSTOP)
        if len(workers(home, stopped)) == 2:
            (home / "pause").write_text("0")
        return False

    assert run_ray(brief, tasks, Watch(stop), workers=2, patience=1.0) == 1
    assert len(workers(home, stopped)) == 2 or not alive(stopped[0])
    assert not any(faults(home / "out", rows).values())


TWO = """
    import os, sys, time
    from pathlib import Path
    import ray
    from ray.cluster_utils import Cluster

    machines = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False))
    there = [machines.add_node(num_cpus=2), machines.add_node(num_cpus=2)]
    print(machines.address, flush=True)
    for line in sys.stdin:
        machines.remove_node(there.pop(0), allow_graceful=line.strip() == "leave")
        print("removed", flush=True)
    machines.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["leave", "die"])
def test_a_machine_is_lost_and_the_others_go_on(home, how):
    "Two machines, as Ray simulates them, with a worker each: one goes away"
    rows, token = texts(4000), "0" * 40
    env = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
    env |= dict(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_USAGE_STATS_ENABLED="0", TMPDIR=str(home))
    env |= dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)), HOME=str(home))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    machines = subprocess.Popen([sys.executable, "-c", textwrap.dedent(TWO)], env=env, **pipes)
    try:
        address = machines.stdout.readline().strip()
        (home / "pause").write_text("0.1")
        driver = lead(home, 4000, workers=2, RAY_ADDRESS=address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        wait_for(lambda: len(workers(home)) == 2 and count(home) > 300 or driver.poll() is not None)
        before = workers(home)
        print(how, file=machines.stdin, flush=True)
        assert machines.stdout.readline() == "removed\n"
        wait_for(lambda: workers(home, before), 60)  # Ray started it again, on the other one
        (home / "pause").write_text("0")
        assert driver.wait(120) == 0, (home / "said").read_text()
        assert not any(faults(home / "out", rows).values()) and "3 machines, 4 CPUs" in (home / "said").read_text()
    finally:
        machines.stdin.close()
        machines.wait(60)


# ---- everything at once


def storm(home, rows, kills, ends, seed=0, part_rows=32):
    "Kill actors `kills` times and drivers `ends` times in one run on private clusters; what that cost"
    draw, texts_, began, took, starts = random.Random(seed), texts(rows), time.monotonic(), [], []
    victims, orphans, ended = set(), set(), 0
    waiting = None  # when an actor was killed whose successor has not appeared
    (home / "pause").write_text("0.3")
    driver, started = lead(home, rows, part_rows), time.monotonic()
    due = began
    while driver.poll() is None or driver.returncode != 0:
        assert time.monotonic() - began < 1800, "waited in vain"
        assert driver.returncode in (None, -signal.SIGKILL), (home / "said").read_text()[-2000:]
        if driver.returncode is not None:
            driver, started, waiting = lead(home, rows, part_rows), time.monotonic(), None
        there = workers(home, victims | orphans)
        if started and there:
            starts.append(time.monotonic() - started)
            started, due = None, time.monotonic() + 2
        if waiting and len(there) == 3:
            took.append(time.monotonic() - waiting)
            waiting = None
        if len(victims) == kills and ended == ends:
            (home / "pause").write_text("0")
        elif not started and time.monotonic() > due:
            due = time.monotonic() + draw.uniform(0.5, 3.5)
            if ended < ends and len(victims) >= kills * (ended + 1) // (ends + 1):
                driver.kill()
                ended += driver.wait() == -signal.SIGKILL
                orphans |= set(workers(home))
            elif len(victims) < kills and there:
                victims.add(victim := draw.choice(there))
                os.kill(victim, signal.SIGKILL)
                waiting = time.monotonic()
        time.sleep(0.02)
    alone = Job(texts_, Digests(), output_dir=home / "alone", progress=False, devices="cpu")
    assert alone.run().complete and len(victims) == kills and ended == ends
    read = lambda folder: pa.concat_tables(pq.read_table(f) for f in (folder / "data").iterdir())
    same = read(home / "out").sort_by("index").drop("pid").equals(read(home / "alone").sort_by("index").drop("pid"))
    middle = lambda times: f"{sorted(times)[len(times) // 2]:.1f} s" if times else "-"
    print(
        f"seed {seed}: {rows} rows, {kills} actors and {ends} drivers killed in {time.monotonic() - began:.0f} s; "
        f"{'the same' if same else 'ANOTHER'} answer as one local worker's, {faults(home / 'out', texts_)}; "
        f"paid for twice: {(count(home) - rows) / rows:.1%}; "
        f"first row after {middle(starts)}, an actor's successor set up after {middle(took)} (medians)",
        flush=True,
    )
    return same and not any(faults(home / "out", texts_).values()), (count(home) - rows) / rows


@pytest.mark.slow
def test_a_short_storm(home):
    right, rework = storm(home, 4000, kills=5, ends=1)
    assert right and rework <= (5 * 64 + 3 * 64) / 4000


if __name__ == "__main__":  # make torture: as it is promised
    results = []
    for seed in [int(x) for x in sys.argv[1:]] or [0]:
        with tempfile.TemporaryDirectory() as place:
            results.append(storm(Path(place), 20_000, kills=20, ends=2, seed=seed))
    sys.exit(not all(right and rework <= 0.05 for right, rework in results))
