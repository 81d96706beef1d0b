"""Several processes: the results of one, and under torchrun errors that are printed once."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import DEMONSTRATIONS, PREFERENCES, PROMPTS, ROOT, read_rows, write_rows
from test_resume import STAGES, TIMES
from test_rewards import save_encoder
from transformers.models.llama import modeling_llama

import common
import harness
import ppo

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
KINDS = {  # {name: [stage, flag, ...]}
    "sft": ["sft"], "reward_model": ["reward_model"],
    "adaptive": ["ppo", "--kl-target", 0.01, "--kl-coef", 0.3, "--max-approx-kl", 1e-3],
    "sum": ["ppo", "--reward", "{}/mine.py:reward", "{}/reward_model", "--judge", "{}/mine.py:reward",
            "--samples-per-prompt", 2],
    "shared": ["ppo", "--critic", "shared", "--advantage", "bandit", "--entropy-coef", 0.01,
               "--reward", "{}/encoder"],  # which reads texts
}


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


def flags_of(folder, stage, *more):
    """Returns the flags of a short run; those in `more` replace the ones here."""
    words = ["--batch-size", 8, "--microbatch-size", 2, "--lr", 1e-3, "--device", "cpu"]
    if stage == "ppo":
        words += ["--policy", folder / "sft", "--reward", folder / "reward_model", "--minibatch-size", 4]
        words += ["--prompts", folder / "prompts.jsonl", "--eval-prompts", folder / "few.jsonl"]
        words += ["--response-length", 6, "--iterations", 2, "--eval-every", 1, "--ppo-epochs", 2]
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


# === Forks of this process ========================================================================
def be_one_of(count, rank, port, stage, flags):
    """Runs a stage as one of several processes, in float64, where rounding hides nothing."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    for module in (common, ppo, modeling_llama):  # other libraries must go on to know what float32 is
        module.torch = types.ModuleType("torch")
        vars(module.torch).update(vars(torch), float32=torch.float64, float=torch.float64)
    if count > 1:  # as torchrun sets them
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        harness.IS_TORCHRUN, harness.RANK = True, rank
    sys.argv = [f"{stage}.py", *flags]

    def main(cfg):
        STAGES[stage].main(cfg)
        assert count == 1 or dist.get_world_size() == count

    harness.run_stage(main, STAGES[stage].Config, "")


def run_forks(count, stage, flags):
    """Runs a stage in several forks of this process, which saves their start. Returns the exit statuses."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    forks = [fork.Process(target=be_one_of, args=(count, rank, port, stage, flags)) for rank in range(count)]
    for process in forks:
        process.start()
    for process in forks:
        process.join(100)
    return [process.exitcode for process in forks]


@pytest.mark.parametrize("name", KINDS)
def test_three_processes_change_no_metric_and_no_weight(name, folder, tmp_path, capfd):
    (stage, *more), one, many = KINDS[name], tmp_path / "1", tmp_path / "3"
    assert run_forks(1, stage, [*flags_of(folder, stage, *more), "--output", str(one)]) == [0]
    capfd.readouterr()
    assert run_forks(3, stage, [*flags_of(folder, stage, *more), "--output", str(many)]) == [0] * 3
    assert capfd.readouterr().out.count("wrote ") == 1  # rank 0 alone prints
    rows, others = read_rows(one / "metrics.jsonl"), read_rows(many / "metrics.jsonl")
    assert len(rows) == len(others) > 1
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for key in row.keys() - TIMES - {"split"}:
            same = row[key] if row[key] is None else pytest.approx(row[key], rel=1e-6, abs=1e-9)
            assert other[key] == same, (key, row["iteration"])
    moved, begun = 0.0, safetensors.torch.load_file(folder / "sft" / "model.safetensors")
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


def test_bad_input_is_printed_once_and_a_lone_process_says_that_it_is_alone(folder, tmp_path, monkeypatch, capfd):
    assert run_forks(2, "ppo", flags_of(folder, "ppo", "--minibatch-size", 1, "--output", tmp_path / "run")) == [2, 2]
    [error] = re.findall("ppo.py: .*", capfd.readouterr().err)
    assert "more processes than" in error and not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "4")
    harness.join_processes(None, None)
    assert "this process trains alone" in capfd.readouterr().out


def test_shares_cover_all_rows_once(monkeypatch):
    rows, tensor, numbers = [1, 2, 3], torch.ones(2), {"loss": 1.5}
    assert common.share(rows) is rows and common.total(tensor) is tensor  # alone
    assert harness.sum_over_processes([], numbers) is numbers and harness.greatest(7) == 7
    monkeypatch.setattr(dist, "is_initialized", Mock(return_value=True))
    monkeypatch.setattr(dist, "get_world_size", Mock(return_value=3))
    for rows in ([], [5], list(range(10)), torch.arange(10)):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(dist, "get_rank", Mock(return_value=rank))
            shares.append([int(row) for row in common.share(rows)])
        assert sorted(sum(shares, [])) == [int(row) for row in rows]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert list(common.parts_by_length(torch.ones(2, 4).bool(), torch.arange(2), 1)) == []


@pytest.mark.parametrize("is_torchrun, name, own", [
    (True, "cuda", "cuda:2"), (True, "cuda:4", "cuda:6"), (True, "cpu", "cpu"),
    (False, "cuda", "cuda"), (False, "cuda:1", "cuda:1"),
])
def test_each_process_has_a_gpu_of_its_own(is_torchrun, name, own, monkeypatch):
    zeros = Mock()
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(harness, "IS_TORCHRUN", is_torchrun)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert harness.pick_device(name) == zeros.return_value.device
    zeros.assert_called_once_with(1, device=own)


# === torchrun =====================================================================================
def torchrun(program, *flags):
    """Starts a program in two processes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, program, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, words)), env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


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


def test_a_signal_stops_all_and_one_process_alone_can_continue(folder, tmp_path, run_stage):
    output = tmp_path / "run"
    run = torchrun("ppo.py", *flags_of(folder, "ppo", "--iterations", 400, "--output", output))
    wait_for_rows(run, output, 4)
    run.send_signal(signal.SIGTERM)  # torchrun hands it on
    errors, err = errors_of(run)
    assert err.count("stopping after this iteration") == 1 and not errors, err
    assert err.count("stopped; to go on: torchrun ... ppo.py --resume --output") == 1, err
    [checkpoint] = harness.checkpoints(output)
    step = int(checkpoint.name[11:])
    status, out, err = run_stage(ppo, "--resume", "--output", output, "--iterations", step + 1)
    assert status == 0 and step < 400 and f"resumed after {step} iterations" in out, err
    rows = [row for row in read_rows(output / "metrics.jsonl") if "split" not in row]
    assert [row["iteration"] for row in rows] == list(range(1, step + 2))


@pytest.mark.parametrize("rank, problem", [
    (0, "failed: AssertionError: mine"), (1, "process 1: error: out of memory"),
])
def test_an_error_of_one_process_is_printed_once_and_ends_all(rank, problem, folder, tmp_path):
    program, reward, now = "ppo.py", f"{folder}/mine.py:reward", folder / "now"
    if rank == 1:  # memory runs out there
        program, reward = tmp_path / "ppo.py", folder / "reward_model"
        program.write_text(SCARCE.format(root=str(ROOT), now=str(now)))
    output = tmp_path / "run"
    run = torchrun(program, *flags_of(folder, "ppo", "--iterations", 400, "--reward", reward, "--output", output))
    wait_for_rows(run, output, 4)
    now.touch()
    errors, err = errors_of(run)
    now.unlink()
    assert len(errors) == 1 and problem in errors[0], err
