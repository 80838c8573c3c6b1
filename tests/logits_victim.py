"""Runs of `logits.run.extract` in children that may be killed at any time: one process has imported everything, and
forks for each run. Its clock for the Hub runs much too fast; what it computes is noted in a ledger."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

SPEED = 60  # seconds of the upload's clock in a second


def prepare(zero: float) -> None:
    "Import, load once, and let the upload and the Hub's client live in a faster time"
    import huggingface_hub.utils._http as client
    import torch

    from llm_analysis.jobs import job, upload
    from llm_analysis.lm.model import load
    from llm_analysis.logits import extract, run  # noqa: F401

    torch.set_num_threads(1)
    lm = load("tiny", device="cpu")
    run.load = lambda *given, **more: lm  # weights are read by several threads, which a fork does not survive
    fast = lambda: (time.monotonic() - zero) * SPEED
    wait = lambda seconds: time.sleep(seconds / SPEED)
    client.time = type("fast", (), {**vars(time), "sleep": staticmethod(wait)})
    upload.Upload = partial(upload.Upload, clock=fast, wait=wait)
    job.PATIENCE = 86_400.0


def child(asked: dict) -> int:
    "Run, with a note of every batch before it is computed; 0 if it is complete, 5 if not"
    from llm_analysis.jobs.options import JobOptions
    from llm_analysis.logits import run
    from llm_analysis.logits.extract import Extract

    real, ledger, pause = Extract.process, asked.pop("ledger"), asked.pop("pause")

    def noted(self, rows):
        fd = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{os.getpid()} {' '.join(str(r['index']) for r in rows)}\n".encode())
        os.close(fd)
        time.sleep(pause)
        return real(self, rows)

    Extract.process = noted
    asked["jobs"] = JobOptions(**asked["jobs"])
    done = run.extract(**asked)
    print(done, flush=True)
    return 0 if done.complete else 5


def serve(said: str, zero: float) -> None:
    "Obey lines of JSON: fork a run, or say how one ended (null: it lives)"
    prepare(zero)
    print("null", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "poll":
            pid, status = os.waitpid(order["pid"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif (pid := os.fork()) == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number in (1, 2):
                os.dup2(out, number)
            try:
                code = child(order["run"])
            except BaseException as e:
                print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
                code = 1
            sys.stdout.flush()
            os._exit(code)
        else:
            print(pid, flush=True)


class Victims:
    "The one process, and the runs that it has begun"

    def __init__(self, said: Path, env: dict[str, str], zero: float = 0.0):
        self.said = said
        env = env | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.server = subprocess.Popen([sys.executable, __file__, str(said), str(zero)], **pipes)
        self.live: set[int] = set()
        self._said()

    def _said(self):
        line = self.server.stdout.readline()
        assert line, "the process that forks has ended"
        return json.loads(line)

    def _ask(self, **order):
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return self._said()

    def start(self, run: dict) -> int:
        "Its process id"
        pid = self._ask(do="start", run=run)
        self.live.add(pid)
        return pid

    def poll(self, pid: int) -> int | None:
        "How it ended; None: it lives"
        code = self._ask(do="poll", pid=pid)
        if code is not None:
            self.live.discard(pid)
        return code

    def wait(self, pid: int, seconds: float = 120) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll(pid)) is None:
            assert time.monotonic() < end, "a run that does not end"
            time.sleep(0.02)
        return code

    def close(self) -> None:
        for pid in self.live:
            os.kill(pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait(30)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
