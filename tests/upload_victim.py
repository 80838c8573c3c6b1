"""An uploader in a process of its own, which may be killed at any time; its clock runs much too fast."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.utils._http as client

from llm_analysis.jobs.identity import read_spec, spec_fingerprint
from llm_analysis.jobs.parts import Log
from llm_analysis.jobs.upload import Upload

SPEED = 60  # virtual seconds in a second


def fast(zero: float):
    "A clock that all processes of this machine share"
    return lambda: (time.monotonic() - zero) * SPEED


def wait(seconds: float) -> None:
    time.sleep(seconds / SPEED)


def main(folder: str, repo: str, zero: float, end: str) -> None:
    "Send whatever appears in a folder, as soon as the budget allows, until the file `end` is there; then the rest"
    client.time = type("fast", (), {**vars(time), "sleep": staticmethod(wait)})  # the client's own pauses
    log = Log(folder, spec_fingerprint(read_spec(folder)))
    up = Upload(log, repo, every=1, clock=fast(zero), wait=wait).start()
    Path(folder, "_job", f"ready-{os.getpid()}").touch()
    while not Path(end).exists():
        time.sleep(0.02)
    print(json.dumps(asdict(up.finish(86_400))))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
