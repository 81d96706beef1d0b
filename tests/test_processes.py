"""Several processes by torchrun: the results of one, and errors that are printed once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import safetensors.torch
import torch
from conftest import DEMONSTRATIONS, PREFERENCES, PROMPTS, ROOT, read_rows, write_rows
from test_resume import TIMES
from test_rewards import save_encoder

import common
import harness

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
REWARD = """
import os, pathlib
def reward(prompts, responses, rows):
    longest = max(map(len, responses))
    assert not os.path.exists(pathlib.Path(__file__).with_name("now")) or len(rows) < 8, "mine"
    return [len(response) / longest for response in responses]
"""
SCARCE = """
import os, sys, torch
sys.path.insert(0, {root!r})
import harness, ppo
forward = ppo.forward_responses
def scarce(*arguments, **options):
    if harness.RANK == 1 and os.path.exists({now!r}):
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(*arguments, **options)
ppo.forward_responses = scarce
harness.run_stage(ppo.main, ppo.Config, "")
"""
KINDS = {  # {name: [stage, flag, ...]}; of ppo, flags that replace those of `flags_of`
    "sft": ["sft"], "reward_model": ["reward_model"], "gae": ["ppo"],
    "adaptive": ["ppo", "--kl-target", 0.01, "--kl-coef", 0.3, "--max-approx-kl", 1e-3],
    "shared": ["ppo", "--critic", "shared", "--advantage", "bandit", "--entropy-coef", 0.01],
    "function": ["ppo", "--reward", "{}/mine.py:reward", "{}/reward_model", "--judge",
                 "{}/mine.py:reward", "--samples-per-prompt", 2],
    "elsewhere": ["ppo", "--reward", "{}/encoder"],  # reads texts
}


def returns(value):
    def function():
        return value

    return function


def start(command, count=1):
    """Starts a command, by torchrun if there are several processes of it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    words = [sys.executable, *(torchrun if count > 1 else []), *command]
    pipe = subprocess.PIPE
    words = list(map(str, words))
    return subprocess.Popen(words, env=ENVIRONMENT, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def flags_of(folder, stage, *more):
    """Returns the flags of a short run; those in `more` replace the ones here."""
    words = ["--batch-size", 8, "--microbatch-size", 2, "--lr", 1e-3, "--device", "cpu"]
    if stage == "ppo":
        words += ["--policy", folder / "sft", "--reward", folder / "reward_model"]
        words += ["--prompts", folder / "prompts.jsonl", "--eval-prompts", folder / "few.jsonl"]
        words += ["--minibatch-size", 4, "--response-length", 6, "--iterations", 2]
        words += ["--eval-every", 1]
    else:
        data = folder / f"{stage}.jsonl"
        words += ["--model", folder / "sft", "--data", data, "--eval-data", data, "--epochs", 1]
    flags = {}
    for word in map(str, [*words, *more]):
        if word.startswith("--"):
            name = word
            flags[name] = []
        flags[name].append(word.format(folder))
    return sum(flags.values(), [])


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """The models and the data of all runs here."""
    folder = tmp_path_factory.mktemp("several")
    for name in ("sft", "reward_model"):
        (folder / name).symlink_to(world / name)
    write_rows(folder / "prompts.jsonl", PROMPTS)
    write_rows(folder / "few.jsonl", PROMPTS[:1])  # fewer rows than processes
    write_rows(folder / "sft.jsonl", DEMONSTRATIONS[:17])  # a last batch of one row
    write_rows(folder / "reward_model.jsonl", PREFERENCES[:17])
    (folder / "mine.py").write_text(REWARD)
    save_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """The folder with the runs of one process in 1/ and of three in 3/, each from one start."""
    for count in (1, 3):
        commands = []
        for name, (stage, *more) in KINDS.items():
            output = folder / str(count) / name
            commands.append([stage, *flags_of(folder, stage, *more), "--output", str(output)])
        (folder / f"{count}.json").write_text(json.dumps(commands))
        run = start(["tests/several.py", folder / f"{count}.json"], count)
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        assert out.count("wrote ") == len(commands), out  # rank 0 alone prints
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_three_processes_change_no_metric_and_no_weight(name, results):
    one, many = results / "1" / name, results / "3" / name
    rows, others = read_rows(one / "metrics.jsonl"), read_rows(many / "metrics.jsonl")
    assert len(rows) == len(others) > 1
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for key in row.keys() - TIMES - {"split"}:
            same = row[key]
            if same is not None:
                same = pytest.approx(same, rel=1e-6, abs=1e-9)
            assert other[key] == same, (key, row["iteration"])
    moved, begun = 0.0, safetensors.torch.load_file(results / "sft" / "model.safetensors")
    for path in one.rglob("*.safetensors"):
        ours = safetensors.torch.load_file(path)
        theirs = safetensors.torch.load_file(many / path.relative_to(one))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.dtype == torch.float64
            assert torch.allclose(value, theirs[key], rtol=0, atol=1e-6), key
            if key in begun:
                moved = max(moved, (value - begun[key]).abs().max().item())
    assert moved > 1e-4  # something was learned


def test_shares_cover_all_rows_once_and_each_process_has_its_device(monkeypatch):
    rows, tensor, numbers = [1, 2, 3], torch.ones(2), {"loss": 1.5}
    assert common.share(rows) is rows and common.total(tensor) is tensor  # alone
    assert harness.sum_over_processes([], numbers) is numbers and harness.greatest(7) == 7
    monkeypatch.setattr(torch.distributed, "is_initialized", returns(True))
    monkeypatch.setattr(torch.distributed, "get_world_size", returns(3))
    for rows in ([], [5], list(range(10)), torch.arange(10)):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(torch.distributed, "get_rank", returns(rank))
            shares.append([int(row) for row in common.share(rows)])
        assert sorted(sum(shares, [])) == [int(row) for row in rows]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert list(common.parts_by_length(torch.ones(2, 4).bool(), torch.arange(2), 1)) == []


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    def zeros(size, device):
        return types.SimpleNamespace(device=device)

    monkeypatch.setattr(torch, "zeros", zeros)
    for is_torchrun, name, own in (
        (True, "cuda", "cuda:2"), (True, "cuda:4", "cuda:6"), (True, "cpu", "cpu"),
        (False, "cuda", "cuda"), (False, "cuda:1", "cuda:1"),
    ):
        monkeypatch.setattr(harness, "IS_TORCHRUN", is_torchrun)
        monkeypatch.setenv("LOCAL_RANK", "2")
        assert harness.pick_device(name) == own


def wait_for_rows(run, folder, number):
    log, since = folder / "metrics.jsonl", time.monotonic()
    while not (log.exists() and log.read_text().count("\n") > number):
        assert run.poll() is None and time.monotonic() - since < 60, run.communicate()[1]
        time.sleep(0.02)


def errors_of(run):
    """Returns the stage's own error lines at the end of a run, and all of standard error."""
    _, err = run.communicate(timeout=100)
    assert run.returncode != 0
    return re.findall(r"ppo\.py: .*error: .*", err), err


def test_a_signal_stops_all_a_kill_of_one_ends_all_and_both_leave_a_checkpoint(folder, tmp_path):
    output = tmp_path / "run"
    flags = flags_of(folder, "ppo", "--save-every", 3, "--iterations", 400)
    run = start(["ppo.py", *flags, "--output", output], 2)
    wait_for_rows(run, output, 4)
    run.send_signal(signal.SIGTERM)  # torchrun hands it on
    errors, err = errors_of(run)
    assert err.count("stopping after this iteration") == 1 and not errors, err
    assert err.count("stopped; to go on: torchrun ... ppo.py --resume --output") == 1, err
    [checkpoint] = output.glob("checkpoint-*")
    step = torch.load(checkpoint / "state.pt", weights_only=True)["step"]
    assert checkpoint.name == f"checkpoint-{step}" and step < 400
    resume = ["ppo.py", "--resume", "--output", output]
    run = start(resume, 2)
    wait_for_rows(run, output, 2 * step + 7)  # two rows an iteration; a later one was saved
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    errors_of(run)
    last = harness.checkpoints(output)[-1]
    step = int(last.name[11:]) + 1
    assert step > int(checkpoint.name[11:]) + 1
    alone = start([*resume, "--iterations", step])
    _, err = alone.communicate(timeout=100)
    assert alone.returncode == 0, err
    rows = [row for row in read_rows(output / "metrics.jsonl") if "split" not in row]
    assert [row["iteration"] for row in rows] == list(range(1, step + 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_is_printed_once_and_ends_all(rank, folder, tmp_path):
    program, reward, now = "ppo.py", folder / "reward_model", folder / "now"
    if rank == 0:
        reward = f"{folder}/mine.py:reward"
    else:  # memory runs out there
        program = tmp_path / "ppo.py"
        program.write_text(SCARCE.format(root=str(ROOT), now=str(now)))
    output = tmp_path / "run"
    flags = flags_of(folder, "ppo", "--iterations", 400, "--reward", reward)
    run = start([program, *flags, "--output", output], 2)
    wait_for_rows(run, output, 4)
    now.touch()
    errors, err = errors_of(run)
    now.unlink()
    assert len(errors) == 1, err
    assert ("failed: AssertionError: mine", "process 1: error: out of memory")[rank] in errors[0]


def test_bad_input_is_printed_once_and_a_lone_process_says_that_it_is_alone(
    folder, tmp_path, monkeypatch, capsys
):
    flags = flags_of(folder, "ppo", "--minibatch-size", 1, "--output", tmp_path / "run")
    errors, err = errors_of(start(["ppo.py", *flags], 2))
    assert len(errors) == 1 and "each process needs a row" in errors[0], err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "4")
    harness.join_processes(None, None)
    assert "this process trains alone" in capsys.readouterr().out
