"""Kill each stage with SIGKILL at random moments, resume, and compare with a run that was left alone.

    python tests/kill_and_resume.py [kills per stage, 20] [seed, 0]

Every second step is saved, so that many kills fall into a save. Equal means: all weights, and all
log rows but for times, to the last bit.
"""

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

DATA = {"sft": DEMONSTRATIONS * 4, "pairs": PREFERENCES * 4, "prompts": PROMPTS}


def flags_of(stage, folder):
    data = lambda name: ["--data", folder / f"{name}.jsonl", "--batch-size", 8, "--epochs", 3]
    return {
        "sft": data("sft"), "reward_model": ["--model", folder / "sft", *data("pairs")],
        "ppo": ["--policy", folder / "sft", "--reward", folder / "reward_model", "--prompts", folder / "prompts.jsonl",
                "--eval-prompts", folder / "prompts.jsonl", "--iterations", 12, "--batch-size", 16, "--minibatch-size", 8,
                "--response-length", 12, "--kl-target", 3, "--eval-every", 3],
    }[stage] + ["--save-every", 2, "--device", "cpu"]


def start(stage, *flags):
    command = [sys.executable, ROOT / f"{stage}.py", *flags]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_rows(output, process, number):
    """Until the log has this many rows; the time then."""
    log = output / "metrics.jsonl"
    while process.poll() is None:
        try:
            if log.read_text().count("\n") >= number:
                break
        except OSError:
            pass  # not there yet, or being replaced
        time.sleep(0.005)
    return time.monotonic()


def finish(process):
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]


def main(num_kills=20, seed=0):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for data, rows in DATA.items():
            write_rows(folder / f"{data}.jsonl", rows)
        for stage in ("sft", "reward_model", "ppo"):
            flags = [*flags_of(stage, folder), "--output", folder / stage]
            process = start(stage, *flags)
            began = wait_for_rows(folder / stage, process, 1)
            finish(process)
            whole = contents(folder / stage)
            num_rows = len(whole["metrics.jsonl"])
            seconds = (time.monotonic() - began) / num_rows
            equal, places = 0, []
            for kill in range(num_kills):
                output = folder / f"{stage}_{kill}"
                flags[-1] = output
                process = start(stage, *flags)
                wait_for_rows(output, process, rng.randrange(num_rows))
                time.sleep(rng.random() * seconds)  # anywhere in the next row, saves included
                process.send_signal(signal.SIGKILL)
                process.communicate()
                names = {path.name for path in output.glob("checkpoint-*")}
                saving, done = any(name.endswith(".partial") for name in names), (output / "config.json").exists()
                places.append("in a save" if saving else "at the end" if names and done else "after a save" if names else "finished" if done else "before")
                if places[-1] != "finished":
                    finish(start(stage, *flags, "--resume"))
                equal += contents(output) == whole
                for leftover in folder.glob(f"{output.name}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            counts = ", ".join(f"{places.count(place)} {place}" for place in sorted(set(places)))
            print(f"{stage}: {equal} of {num_kills} equal to the run that was left alone; killed {counts}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
