"""examples/scale: a thread samples one update behind, and a run repeats to the last bit."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import PROMPTS, ROOT, write_rows
from test_forks import check_size, load_fork, steps_of
from test_resume import contents

import common
import ppo as plain

FOLDER = ROOT / "examples" / "scale"
PATCH = FOLDER / "sampling_ahead.patch"
sys.path.append(str(FOLDER))  # a user copies ahead.py to ppo.py


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    return load_fork(PATCH, tmp_path_factory.mktemp("ahead"))


def flags_of(world, output, *more):
    return [
        "--policy", world / "sft", "--reward", world / "reward_model", "--prompts", world / "prompts.jsonl",
        "--eval-prompts", world / "prompts.jsonl", "--iterations", 4, "--batch-size", 8, "--minibatch-size", 4,
        "--response-length", 6, "--eval-every", 3, "--save-every", 2, "--lr", 1e-3, "--device", "cpu",
        "--output", output, "--sampler-device", "cpu", *more,
    ]


def record(module, monkeypatch):
    """Returns a list that gets (Batch, weights of the policy before the update) of each rollout."""
    seen, policies, load = [], [], module.load_models

    def loaded(cfg, tokenizer, longest, device):
        models = load(cfg, tokenizer, longest, device)
        policies.append(models[0])
        return models

    class Recorded(module.Batch):
        def micro_batches(self, index, size):
            if not seen or seen[-1][0] is not self:
                weights = {name: x.clone() for name, x in policies[-1].state_dict().items()}
                seen.append((self, weights))
            return super().micro_batches(index, size)

    monkeypatch.setattr(module, "load_models", loaded)
    monkeypatch.setattr(module, "Batch", Recorded)
    return seen


@torch.no_grad()
def logprobs_of(policy, weights, batch):
    """By a whole pass of transformers' own model and a log_softmax, at the responses' tokens."""
    policy.load_state_dict(weights)
    width, mask = batch.response_mask.shape[1], batch.attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = policy(input_ids=batch.tokens, attention_mask=mask, position_ids=positions)
    logprobs = output.logits[:, -width - 1 : -1].log_softmax(-1)
    return logprobs.gather(2, batch.tokens[:, -width:, None])[..., 0]


def test_the_patch_is_small_and_runs_as_a_command_beside_its_module(ppo, world, tmp_path):
    check_size(PATCH, 40)
    project = shutil.copytree(os.path.dirname(ppo.__file__), tmp_path / "project")
    shutil.copy(FOLDER / "ahead.py", project)
    (project / "bad.py").write_text(
        "calls = []\ndef bad(prompts, responses, rows):\n    calls.append(0)\n"
        "    return [1 / (len(calls) < 4)] * len(rows)\n"  # 3 in the evaluation, then training
    )
    command = map(str, [sys.executable, "ppo.py", *flags_of(world, "out", "--judge", "bad.py:bad")])
    run = subprocess.run([*command], cwd=project, capture_output=True, text=True, timeout=120)
    # While the second rollout is sampled the first one's score ends the run, and the thread.
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert "bad.py:bad failed" in run.stderr and (project / "out" / "metrics.jsonl").exists()


def test_old_logprobs_are_those_of_the_weights_before_the_last_update(ppo, world, tmp_path, run_stage, monkeypatch):
    many = write_rows(tmp_path / "many.jsonl", [{"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(PROMPTS)])
    flags = flags_of(world, tmp_path / "out", "--prompts", many, "--lr", 1e-2)
    seen, usual = record(ppo, monkeypatch), record(plain, monkeypatch)
    status, out, err = run_stage(ppo, *flags)
    assert status == 0 and "first ratios" not in out and len(seen) == 4, err
    tokenizer = common.load_tokenizer(str(world / "sft"))
    policy = common.load_causal_lm(str(world / "sft"), tokenizer)
    for i, (batch, _) in enumerate(seen):
        gaps = []
        for _, weights in seen:  # before update 1, before update 2, ...
            gap = (logprobs_of(policy, weights, batch) - batch.logprobs)[batch.response_mask].abs().max()
            gaps.append(gap.item())
        assert gaps.pop(max(i - 1, 0)) < 1e-5 and min(gaps) > 1e-3, (i, gaps)
    first, *later = steps_of(tmp_path / "out")
    assert (first["ratio_first"], first["approx_kl_first"], first["kl"]) == (1, 0, 0)
    assert later[0]["kl"] == 0  # sampled by the same weights as the first
    for row in later:  # it was sampled from that very distribution, and learned one update later
        assert row["approx_kl_first"] > 1e-3 and row["sampler_gap"] < 1e-5
    # Prompts come in the order in which they come without it; without the flag nothing changes.
    without = [*flags[: flags.index("--sampler-device")], "--prompts", many]
    assert run_stage(plain, *without, "--output", tmp_path / "usual")[0] == 0
    asked = [[batch.tokens[:, : -batch.response_mask.shape[1]].tolist() for batch, _ in some] for some in (seen, usual)]
    assert asked[0] == asked[1] and len({*map(str, asked[0])}) == 4
    assert run_stage(ppo, *without, "--output", tmp_path / "unasked")[0] == 0
    assert contents(tmp_path / "unasked") == contents(tmp_path / "usual")


@pytest.mark.parametrize("step, more", [(3, []), (2, ["--critic", "shared", "--advantage", "bandit"])])
def test_a_run_repeats_exactly_with_a_slow_sampler_and_after_a_stop_or_a_crash(
    step, more, ppo, world, tmp_path, run_stage, monkeypatch
):
    flags = flags_of(world, tmp_path / "parts", *more)
    assert run_stage(ppo, *flags, "--output", tmp_path / "whole")[0] == 0
    randint, clip, calls = torch.randint, ppo.clip_grad_norm_, []

    def late(*arguments, **options):  # time for the main thread to draw first, if it could
        time.sleep(0.03)
        return randint(*arguments, **options)

    def norm(*arguments):
        calls.append(None)
        if len(calls) == 2 * 16 + 1:  # two models, 8 steps: within iteration 3
            if step == 2:
                raise common.UserError("crashed")
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", late)
        patch.setattr(ppo, "clip_grad_norm_", norm)
        assert run_stage(ppo, *flags)[0] == (2 if step == 2 else 128 + signal.SIGTERM)
    state = torch.load(tmp_path / "parts" / f"checkpoint-{step}" / "state.pt", weights_only=True)
    assert state["kept"]["pending"][0].shape[0] == 8
    assert run_stage(ppo, "--resume", "--output", tmp_path / "parts")[0] == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert state["kept"]["pending"] is None  # after the last nothing is sampled


@pytest.mark.parametrize("number, error, words", [
    (1, common.UserError("the sampler has had enough"), "has had enough"),
    (3, torch.OutOfMemoryError("CUDA out of memory."), "out of memory (rollout): halve --batch-size"),
])
def test_an_error_in_the_sampler_ends_the_run_in_one_line(
    number, error, words, ppo, world, tmp_path, run_stage, monkeypatch
):
    sample, calls = ppo.sample_responses, []

    def failing(*arguments):
        calls.extend([None] * (threading.current_thread().name == "sampler"))
        if len(calls) == number:
            raise error
        return sample(*arguments)

    monkeypatch.setattr(ppo, "sample_responses", failing)
    status, _, err = run_stage(ppo, *flags_of(world, tmp_path / "out"))
    [line] = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and words in line and "Traceback" not in err
    monkeypatch.setattr(ppo, "sample_responses", sample)
    assert run_stage(ppo, "--resume", "--output", tmp_path / "out")[0] == 0
    assert len(steps_of(tmp_path / "out")) == 4


def test_a_device_that_is_not_there_and_torchrun_are_refused(ppo, world, tmp_path, run_stage, monkeypatch):
    flags = flags_of(world, tmp_path / "out")
    status, _, err = run_stage(ppo, *flags, "--sampler-device", "gpu")
    assert status == 2 and "--sampler-device gpu can't be used" in err
    monkeypatch.setattr(ppo.ahead.harness, "IS_TORCHRUN", True)
    status, _, err = run_stage(ppo, *flags)
    assert status == 2 and "--sampler-device is for one process" in err and not (tmp_path / "out").exists()


def test_adapters_are_sampled_with_too(ppo, world, tmp_path, run_stage):
    pytest.importorskip("peft")
    assert run_stage(ppo, *flags_of(world, tmp_path / "out", "--lora-rank", 2, "--lr", 1e-2))[0] == 0
    first, *later = steps_of(tmp_path / "out")
    assert (first["ratio_first"], first["kl"], later[0]["kl"]) == (1, 0, 0) and later[1]["kl_k3"] > 0
    for row in later:
        assert row["approx_kl_first"] > 1e-6 and row["sampler_gap"] < 1e-5
