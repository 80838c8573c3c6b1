"""One long text as a job: any number of workers, killed or not, gives what one process gives, to the bit."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from llm_analysis.explain.blocks import explain_long
from llm_analysis.explain.step import Ask
from llm_analysis.explain.values import LabelMargin
from llm_analysis.jobs.job import JobOptions
from llm_analysis.lm.model import load

TEXT = "The film was not bad at all although my brother found the ending rather dull and slow"
ASK = Ask("text", "Review: {text}\nSentiment:", LabelMargin((" bad", " good")), budget=400, route="padded")


@pytest.fixture(scope="module")
def lm():
    return load("tiny", device="cpu")


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(a, b):
    np.testing.assert_array_equal(a.values, b.values)
    np.testing.assert_array_equal(a.stderr, b.stderr)
    assert (a.evaluations, a.estimator, a.base_value, a.full_value) == (
        b.evaluations,
        b.estimator,
        b.base_value,
        b.full_value,
    )


def test_parts_of_a_run_add_up(lm, tmp_path, one_thread):
    "A run that stops after every few blocks, and one that does not"
    whole = explain_long(lm, TEXT, ASK, output_dir=tmp_path / "whole", size=32)
    assert whole.evaluations == 400 and whole.efficiency_gap < 1e-9
    again = explain_long(lm, TEXT, ASK, output_dir=tmp_path / "whole", size=32)  # nothing is left to compute
    same(whole, again)
    assert again.prompts == whole.prompts


@pytest.mark.slow
def test_two_workers_killed_ten_times_give_what_one_process_gives(lm, tmp_path, one_thread):
    from psutil import Process

    whole = explain_long(lm, TEXT, ASK, output_dir=tmp_path / "whole", size=16)
    done, killed = threading.Event(), []

    def kill():
        while not done.wait(0.7):
            own = [p for p in Process(os.getpid()).children(recursive=True) if "python" in p.name()]
            if own and len(killed) < 10:
                killed.append(own[0].pid)
                os.kill(own[0].pid, signal.SIGKILL)
                time.sleep(2)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    for _ in range(20):
        jobs = JobOptions(num_workers=2, part_rows=1)
        found = explain_long(lm, TEXT, ASK, output_dir=tmp_path / "two", size=16, place="tiny", jobs=jobs)
        if not hasattr(found, "complete") or found.complete:
            break
    done.set()
    thread.join()
    print(len(killed), "workers killed")
    same(whole, found)
