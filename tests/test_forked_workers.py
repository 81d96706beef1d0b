"""Processes that a reward function forks and ends by SIGTERM while they are starting, as pools do."""

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = """
import collections, os, signal, time
import harness

run = harness.Run.__new__(harness.Run)
run.done, run.stop_signal, run.stopping, run.seconds = 0, 0, 0, collections.Counter()
ends = collections.Counter()
for step, batch in run.steps(["a batch"], 1):
    for _ in range(300):
        pid = os.fork()
        if pid == 0:
            time.sleep(1)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)
        ends[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
print(dict(ends), run.stop_signal)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks nothing")
def test_a_process_that_a_function_has_forked_ends_by_a_signal_that_comes_at_once():
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "{-15: 300} 0\n", run.stdout + run.stderr  # a dropped signal: 0
