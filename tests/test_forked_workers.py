"""A pool of processes that a reward function forks and ends by SIGTERM while they are starting."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = """
import collections, multiprocessing
import harness

run = harness.Run.__new__(harness.Run)
run.done, run.stop_signal, run.stopping, run.seconds = 0, 0, 0, collections.Counter()
for step, batch in run.steps(["a batch"], 1):
    for _ in range(300):
        with multiprocessing.get_context("fork").Pool(4) as pool:  # at its end: terminate()
            assert pool.map(len, ["a"] * 8) == [1] * 8
print("fine")
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks nothing")
def test_a_pool_that_ends_its_workers_while_they_start_does_not_hang_a_run():
    command = [sys.executable, "-c", SCRIPT]
    pipe = subprocess.PIPE
    run = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        out, err = run.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # with the workers that wait for ever
        raise
    assert out == "fine\n", err
