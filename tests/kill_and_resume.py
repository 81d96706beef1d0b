"""Kill a stage with SIGKILL at random moments, resume, and compare with a run that was left alone.

    python tests/kill_and_resume.py STAGE KILLS [--seed 0]

Every second step is saved, so that many kills fall into a save, and some into run.finish(). Equal means:
all weights, and all log rows without times, to the last bit, and no checkpoint is left.
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

DATA = {"sft": DEMONSTRATIONS * 4, "reward_model": PREFERENCES * 4, "ppo": PROMPTS}  # in the order of the stages


def start(stage, folder, output, *more):
    data = folder / f"{stage}.jsonl"
    flags = ["--data", data, "--batch-size", 8, "--epochs", 3]
    if stage == "reward_model":
        flags += ["--model", folder / "sft"]
    if stage == "ppo":
        flags = ["--policy", folder / "sft", "--reward", folder / "reward_model", "--prompts", data]
        flags += ["--eval-prompts", data, "--batch-size", 16, "--minibatch-size", 8, "--iterations", 12]
        flags += ["--response-length", 12, "--kl-target", 3, "--eval-every", 3]
    flags += ["--output", output, "--save-every", 2, "--device", "cpu", *more]
    words = [sys.executable, ROOT / f"{stage}.py", *flags]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]


def wait_for_first_row(output, process):
    log = output / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.001)


def place_of(output):
    """Returns where in a run the kill came."""
    names = " ".join(path.name for path in output.glob("checkpoint-*"))
    if json.loads((output / "args.json").read_text())["written"]:
        return "in run.finish()" if names else "after the end"
    return "in a save" if "partial" in names else "after a save" if names else "before"


def main(stage, num_kills, seed):
    rng, places, num_equal = random.Random(seed), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for each, rows in DATA.items():  # the stages that this one reads, and a run of it that is left alone
            write_rows(folder / f"{each}.jsonl", rows)
            process = start(each, folder, folder / each)
            wait_for_first_row(folder / each, process)
            began = time.monotonic()
            finish(process)
            seconds = time.monotonic() - began
            if each == stage:
                break
        for kill in range(num_kills):
            output = folder / f"killed_{kill}"
            process = start(stage, folder, output)
            wait_for_first_row(output, process)
            time.sleep(rng.random() * seconds)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            places[place_of(output)] += 1
            finish(start(stage, folder, output, "--resume"))
            num_equal += contents(output) == contents(folder / stage) and not list(output.glob("checkpoint-*"))
            shutil.rmtree(output)
    print(f"{stage}: {num_equal} of {num_kills} equal to the run left alone; {dict(places)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=DATA)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.stage, given.kills, given.seed)
