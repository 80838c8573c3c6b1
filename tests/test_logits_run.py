"""`logits.run.extract`, killed, stopped, spread and misled by the Hub: every row once, as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from logits_victim import Victims
from loopback_hub import Faults, environment, point, serve
from test_jobs_upload import REPO, TOKEN, judge, trees

from llm_analysis.core import InputError, WorldError
from llm_analysis.jobs import merge as merging
from llm_analysis.jobs.job import JobOptions
from llm_analysis.jobs.verify import skipped_table
from llm_analysis.jobs.folder import open_run
from llm_analysis.logits import run as module
from llm_analysis.logits.extract import Selection
from llm_analysis.logits.run import extract
from llm_analysis.logits.store import LogitStore
from llm_analysis.logits.texts import Reading
from llm_analysis.tiny.chats import chats

torch.set_num_threads(1)
PART = 8  # rows of a part
CUT = dict(batch_tokens=256, max_batch_size=4, part_rows=PART)
PLAIN = dict(model="tiny", device="cpu", route="padded", seed=3)


@pytest.fixture(autouse=True)
def tmp_path():
    "In memory where that is possible: signals and the network are tested here, not the disk"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as home:
        yield Path(home)


def conversations(path: Path, n: int) -> list[int]:
    "A file of chats, every ninth of them without an answer; the rows that have one"
    told = [row["messages"] for row in chats()]
    rows = [told[i % len(told)] for i in range(n)]
    rows = [[*m[:1], dict(role="user", content=f"Hello {i}")][-1:] if i % 9 == 4 else m for i, m in enumerate(rows)]
    path.write_text("".join(json.dumps({"messages": m, "name": f"row {i}"}) + "\n" for i, m in enumerate(rows)))
    return [i for i in range(n) if i % 9 != 4]


def table_of(folder: Path) -> pa.Table:
    "What a plain reader of the parts sees, in the order of the rows; every part has the same schema and metadata"
    tables = [pq.read_table(p) for p in sorted((folder / "data").glob("*.parquet"))]
    assert len({t.schema.metadata[b"llm_analysis"] for t in tables}) == 1
    return pa.concat_tables([t.replace_schema_metadata() for t in tables]).sort_by("index")


def described(folder: Path) -> dict:
    return json.loads(pq.read_schema(next((folder / "data").glob("*.parquet"))).metadata[b"llm_analysis"])


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "An undisturbed run: its data, the rows that it keeps, and its folder"
    home = tmp_path_factory.mktemp("calm")
    kept = conversations(home / "chats.jsonl", 90)
    done = extract(str(home / "chats.jsonl"), output_dir=home / "out", jobs=JobOptions(**CUT), **PLAIN)
    assert (done.complete, done.skipped, done.failed) == (True, 10, 0) and done.parts > 8
    return home / "chats.jsonl", kept, home / "out"


# ---- killed ---------------------------------------------------------------------------------------------------------


def storm(victims: Victims, runs: list[dict], folder: Path, kills: int, seed: int = 0) -> list[int]:
    "Run side by side, kill one at random, now and then before it has done anything, and begin it again; whom it hit"
    draw, killed = random.Random(seed), []
    count = lambda: len(list((folder / "data").glob("*.parquet")))
    pids = {i: victims.start(run) for i, run in enumerate(runs)}
    until, at = count() + draw.randint(1, 2), time.monotonic() + draw.uniform(0, 3)
    while pids:
        time.sleep(0.005)
        for i, pid in list(pids.items()):
            if (code := victims.poll(pid)) is not None:
                assert code == 0, f"ended with {code}"
                del pids[i]
        if pids and len(killed) < kills and (count() >= until or time.monotonic() > at):
            time.sleep(draw.choice((0, 0, draw.uniform(0, 0.1))))
            i = draw.choice(list(pids))
            if victims.poll(pids[i]) is None:
                os.kill(pids[i], signal.SIGKILL)
                assert victims.wait(pids[i]) == -signal.SIGKILL
                killed.append(pids[i])
                pids[i] = victims.start(runs[i])
            elif len(pids) == 1:
                break
            until, at = count() + draw.randint(1, 2), time.monotonic() + draw.uniform(0.2, 3)
    return killed


def rework(ledger: Path, folder: Path, killed: list[int]) -> dict:
    "Rows that were computed, and how many of those more than once"
    lines = [list(map(int, x.split())) for x in ledger.read_text().splitlines()]
    seen = Counter(i for _, *rows in lines for i in rows)
    return dict(computed=sum(seen.values()), again=sum(seen.values()) - len(seen), rows=len(seen))


def asked(data: Path, out: Path, ledger: Path, pause: float = 0.02, **jobs) -> dict:
    return PLAIN | dict(
        dataset=str(data), output_dir=str(out), ledger=str(ledger), pause=pause, jobs=CUT | jobs
    )


def same(folder: Path, calm_folder: Path, kept: list[int]) -> None:
    "Every row once, and each as if nothing had happened"
    mine = table_of(folder)
    assert mine["index"].to_pylist() == kept
    assert mine == table_of(calm_folder) and described(folder) == described(calm_folder)
    report = module_verify(folder)
    assert report.ok and not report.twice and not report.missing


def module_verify(folder: Path):
    from llm_analysis.jobs.command import verify

    return verify(str(folder))


def test_killed_ten_times(calm, tmp_path):
    "Two processes share the rows in one folder; of what a killed one had computed no more than a part is done again"
    data, kept, quiet = calm
    out, ledger = tmp_path / "out", tmp_path / "ledger"
    victims = Victims(tmp_path / "said", dict(os.environ))
    try:
        runs = [asked(data, out, ledger, num_shards=2, shard_index=i) for i in range(2)]
        killed = storm(victims, runs, out, 10)
        last = victims.start(asked(data, out, ledger))
        assert victims.wait(last) == 0, (tmp_path / "said").read_text()[-2000:]
    finally:
        victims.close()
    found = rework(ledger, out, killed)
    assert len(killed) == 10 and found["rows"] == len(kept)
    assert found["again"] <= 10 * PART, found
    same(out, quiet, kept)
