"""Kill a stage with SIGKILL at random moments, resume, and compare with a run that was left alone.

    python tests/kill_and_resume.py STAGE KILLS [--seed 0] [--end]

Every second step is saved, so that many kills fall into a save. With --end they all come after the
last row of the log, around run.finish(). Equal means: all weights, and all log rows without times,
to the last bit, and no checkpoint is left.
"""

import argparse
import collections
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from conftest import DEMONSTRATIONS, PREFERENCES, PROMPTS, ROOT, write_rows  # noqa: E402
from test_resume import contents  # noqa: E402

STAGES = ("sft", "reward_model", "ppo")
DATA = {"sft": DEMONSTRATIONS * 4, "reward_model": PREFERENCES * 4, "ppo": PROMPTS}


def start(stage, folder, output, *more):
    data = folder / f"{stage}.jsonl"
    flags = ["--data", data, "--batch-size", 8, "--epochs", 3]
    if stage == "reward_model":
        flags += ["--model", folder / "sft"]
    if stage == "ppo":
        flags = ["--policy", folder / "sft", "--reward", folder / "reward_model", "--prompts", data]
        flags += ["--eval-prompts", data, "--batch-size", 16, "--minibatch-size", 8]
        flags += ["--iterations", 12, "--response-length", 12, "--kl-target", 3, "--eval-every", 3]
    flags += ["--output", output, "--save-every", 2, "--device", "cpu", *more]
    command = [sys.executable, ROOT / f"{stage}.py", *flags]
    words = list(map(str, command))
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]


def read(path):
    return path.read_text() if path.exists() else ""


def wait_for_rows(output, process, number):
    """Waits for this many rows in the log, or with None for the end. Returns the time."""
    while process.poll() is None:
        if number is None and '"finished": true' in read(output / "args.json"):
            break
        if number is not None and read(output / "metrics.jsonl").count("\n") >= number:
            break
        time.sleep(0.001)
    return time.monotonic()


def place_of(output):
    """Returns where in a run the kill came."""
    names = " ".join(path.name for path in output.glob("checkpoint-*"))
    args = json.loads(read(output / "args.json") or "{}")
    if args.get("written"):
        return "in run.finish()" if names else "after the end"
    return "in a save" if "partial" in names else "after a save" if names else "before"


def main(stage, num_kills, seed, at_end):
    rng, places, num_equal = random.Random(seed), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for data, rows in DATA.items():
            write_rows(folder / f"{data}.jsonl", rows)
        for each in STAGES[: STAGES.index(stage) + 1]:  # and the stages that it reads
            finish(start(each, folder, folder / each))
        whole = contents(folder / stage)
        num_rows = len(whole["metrics.jsonl"])
        process = start(stage, folder, folder / "timed")
        began = wait_for_rows(folder / "timed", process, 1)
        last = wait_for_rows(folder / "timed", process, num_rows)
        row_seconds = (last - began) / num_rows
        end_seconds = 1.2 * (wait_for_rows(folder / "timed", process, None) - last)
        finish(process)
        for kill in range(num_kills):
            output = folder / f"killed_{kill}"
            process = start(stage, folder, output)
            number = num_rows if at_end else rng.randrange(num_rows)
            wait_for_rows(output, process, number)
            time.sleep(rng.random() * (end_seconds if at_end else row_seconds))  # saves included
            process.send_signal(signal.SIGKILL)
            process.communicate()
            places[place_of(output)] += 1
            finish(start(stage, folder, output, "--resume"))
            num_equal += contents(output) == whole and not list(output.glob("checkpoint-*"))
            shutil.rmtree(output)
    print(f"{stage}: {num_equal} of {num_kills} equal to the run left alone; {dict(places)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--end", action="store_true", help="kill around run.finish()")
    given = parser.parse_args()
    main(given.stage, given.kills, given.seed, given.end)
