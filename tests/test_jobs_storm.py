"""A run under a storm of signals: every row exactly once, nothing torn, nobody left over."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from llm_analysis.jobs.storm import KINDS, storm
from llm_analysis.jobs.testing import Reader, faults, texts


@pytest.fixture
def tmp_path():
    "In memory where that is possible: signals are tested here, not the disk"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as home:
        yield Path(home)


FULL = dict(zip(KINDS, (200, 150, 50, 10, 5, 3)))
SHORT = dict(zip(KINDS, (8, 3, 2, 1, 1, 0)))


def test_a_short_storm(tmp_path):
    result = storm(tmp_path / "storm", rows=2500, seed=0, wanted=SHORT, limit=120)
    assert result.ok, result
    assert result.handed_on >= 1 and set(result.happened) == set(KINDS)
    assert result.reads > result.parts, "the reader looked once, at the end: nothing was read while it happened"
    assert all(result.happened[k] >= n for k, n in SHORT.items())


@pytest.mark.slow
def test_two_parents(tmp_path):
    wanted = dict(zip(KINDS, (6, 2, 1, 1, 1, 3)))
    result = storm(tmp_path / "storm", rows=4000, seed=2, wanted=wanted, limit=240)
    assert result.ok and result.beside > 0, result


def test_the_judges_can_convict(tmp_path):
    "Rows that are missing, doubled or wrong, a torn file: each is seen by those who are to see it"
    from llm_analysis.jobs.job import Job, JobOptions
    from llm_analysis.jobs.testing import Digests

    rows, out = texts(200), tmp_path / "out"
    Job(rows, Digests(), output_dir=out, options=JobOptions(batch_tokens=64, part_rows=40), progress=False).run()
    parts = sorted((out / "data").iterdir())
    blob = parts[0].read_bytes()
    (out / "data" / "attempt-2.parquet").write_bytes(blob)
    assert faults(out, rows)["doubled"] > 0
    (out / "data" / "attempt-2.parquet").unlink()
    parts[0].unlink()
    assert faults(out, rows)["missing"] > 0
    parts[0].write_bytes(blob)
    assert faults(out, [{"text": r["text"] + "!"} for r in rows])["wrong"] == 200
    reader = Reader(out)
    parts[1].write_bytes(parts[1].read_bytes()[:-7])
    while not reader.unreadable:
        reader.closing.wait(0.05)
    assert reader.close()


if __name__ == "__main__":  # make torture: the storm as it is promised, five seeds
    seeds = [int(x) for x in sys.argv[1:]] or range(5)
    results = []
    for seed in seeds:
        home = Path(tempfile.mkdtemp()) / "storm"
        results.append(storm(home, rows=20_000, seed=seed, wanted=FULL, limit=3600))
        print(results[-1], flush=True)
        shutil.rmtree(home.parent)
    sys.exit(not all(r.ok for r in results))
