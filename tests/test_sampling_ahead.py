"""examples/scale/sampling_ahead.patch: rollouts sampled one update behind, in a thread, by a run that repeats to the last bit."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import PROMPTS, ROOT, read_rows, write_rows
from test_cli import refused
from test_forks import changed_lines, forked
from test_resume import contents

import common
import ppo as plain

FOLDER = ROOT / "examples" / "scale"
PATCH = FOLDER / "sampling_ahead.patch"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = forked(tmp_path_factory.mktemp("ahead"))
    subprocess.run(["git", "apply", str(PATCH)], cwd=folder, check=True)
    return folder


@pytest.fixture
def ppo(project, monkeypatch):
    """The patched ppo.py as a module; all else is that of this project."""
    spec = importlib.util.spec_from_file_location("ppo_ahead", project / "ppo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ppo_ahead", module)
    spec.loader.exec_module(module)
    return module


def flags_of(world, output, *more):
    return ["--policy", world / "sft", "--reward", world / "reward_model", "--prompts", world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl",
            "--iterations", 5, "--batch-size", 8, "--minibatch-size", 4, "--response-length", 6, "--eval-every", 3, "--save-every", 2, "--lr", 1e-3,
            "--device", "cpu", "--output", output, "--sampler-device", "cpu", *more]


def record(module, monkeypatch):
    """What comes to be learned from, rollout by rollout: (prompts, the Batch, the policy before the update)."""
    seen, prompts, held = [], [], {}
    load, score, batch = module.load_models, module.score_responses, module.Batch

    def loaded(*arguments):
        models = load(*arguments)
        held["policy"] = models[0]
        return models

    def scored(scorers, tokens, attention_mask, rows, responses):
        prompts.append([row["prompt"] for row in rows])
        return score(scorers, tokens, attention_mask, rows, responses)

    class Recorded(batch):
        def __post_init__(self):
            super().__post_init__()
            if sys._getframe(2).f_code.co_name == "main":  # not a micro-batch
                weights = {name: weight.clone() for name, weight in held["policy"].state_dict().items()}
                seen.append((prompts[-1], self, weights))

    monkeypatch.setattr(module, "load_models", loaded)
    monkeypatch.setattr(module, "score_responses", scored)
    monkeypatch.setattr(module, "Batch", Recorded)
    return seen


def logprobs_of(world, weights, batch):
    """By a whole pass of transformers' own model and a log_softmax, at the responses' tokens."""
    policy = common.load_causal_lm(str(world / "sft"), common.load_tokenizer(str(world / "sft")))
    policy.load_state_dict(weights)
    width, mask = batch.response_mask.shape[1], batch.attention_mask.long()
    with torch.no_grad():
        logits = policy(input_ids=batch.tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    return logits[:, -width - 1 : -1].log_softmax(-1).gather(2, batch.tokens[:, -width:, None])[..., 0]


def rows_of(output):
    return [row for row in read_rows(output / "metrics.jsonl") if "split" not in row]


def samplers():
    time.sleep(0.1)  # for one that has said that it is done
    return [thread for thread in threading.enumerate() if thread.name == "sampler"]


def in_sampler(module, monkeypatch, number, action):
    """Do something in the sampler's thread as it begins its so-manieth rollout."""
    sample, calls = module.sample_responses, []

    def wrapped(*arguments):
        if threading.current_thread() is not threading.main_thread():
            calls.append(None)
            if len(calls) == number:
                action()
        return sample(*arguments)

    monkeypatch.setattr(module, "sample_responses", wrapped)
    return lambda: monkeypatch.setattr(module, "sample_responses", sample)


def test_the_patch_is_small_and_as_long_as_its_readme_says():
    number = changed_lines(PATCH)
    assert number <= 40
    assert re.search(rf"^\| `{PATCH.name}` \| {number} \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M), number


def test_the_patched_file_runs_as_a_command_and_keeps_to_100_columns(project, world, tmp_path):
    run = subprocess.run([sys.executable, "ppo.py", *map(str, flags_of(world, tmp_path / "out", "--iterations", 2))], cwd=project, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    assert len(rows_of(tmp_path / "out")) == 2
    assert max(map(len, (project / "ppo.py").read_text(encoding="utf-8").splitlines())) <= 100


def test_old_logprobs_are_those_of_the_weights_before_the_last_update(ppo, world, tmp_path, run_stage, monkeypatch):
    seen = record(ppo, monkeypatch)
    assert run_stage(ppo, *flags_of(world, tmp_path / "out"))[0] == 0
    assert len(seen) == 5
    versions = [weights for _, _, weights in seen]  # before update 1, before update 2, ...
    for i, (_, batch, _) in enumerate(seen):
        off = [(logprobs_of(world, weights, batch) - batch.logprobs)[batch.response_mask].abs().max().item() for weights in versions]
        assert off[max(i - 1, 0)] < 1e-5, (i, off)
        assert all(gap > 1e-3 for j, gap in enumerate(off) if j != max(i - 1, 0)), (i, off)
    rows = rows_of(tmp_path / "out")
    assert all(row["sampler_gap"] < 1e-5 for row in rows)  # it was sampled from that very distribution


def test_the_first_rollout_is_the_policys_own_and_the_later_ones_are_not_and_that_is_no_warning(ppo, world, tmp_path, run_stage):
    status, out, _ = run_stage(ppo, *flags_of(world, tmp_path / "out", "--lr", 1e-2))
    first, *later = rows_of(tmp_path / "out")
    assert status == 0 and "first ratios" not in out
    assert (first["ratio_first"], first["approx_kl_first"], first["kl"]) == (1, 0, 0)
    assert all(row["approx_kl_first"] > 1e-3 for row in later)  # what would be the warning
    assert later[0]["kl"] == 0  # sampled by the same weights as the first


def test_prompts_come_in_the_order_in_which_they_come_without_it(ppo, world, tmp_path, run_stage, monkeypatch):
    write_rows(tmp_path / "many.jsonl", [{"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(PROMPTS)])
    ahead = record(ppo, monkeypatch)
    assert run_stage(ppo, *flags_of(world, tmp_path / "ahead", "--prompts", tmp_path / "many.jsonl"))[0] == 0
    usual = record(plain, monkeypatch)
    flags = flags_of(world, tmp_path / "usual", "--prompts", tmp_path / "many.jsonl")
    without = flags[: flags.index("--sampler-device")] + flags[flags.index("--sampler-device") + 2 :]
    assert run_stage(plain, *without)[0] == 0
    prompts, tokenizer = [prompts for prompts, _, _ in usual], common.load_tokenizer(str(world / "sft"))
    for (given, batch, _), wanted in zip(ahead, prompts):  # what was sampled from, not only what was handed out
        columns = slice(batch.tokens.shape[1] - batch.response_mask.shape[1])
        assert given == wanted == [tokenizer.decode(ids[mask]) for ids, mask in zip(batch.tokens[:, columns], batch.attention_mask[:, columns])]
    assert len(ahead) == len({*map(str, prompts)}) == 5
    assert run_stage(ppo, *without, "--output", tmp_path / "unasked")[0] == 0  # without the flag nothing is changed
    assert contents(tmp_path / "unasked") == contents(tmp_path / "usual")


def test_two_runs_of_a_seed_are_equal_and_the_sampler_may_be_slow(ppo, world, tmp_path, run_stage, monkeypatch):
    assert run_stage(ppo, *flags_of(world, tmp_path / "one"))[0] == 0
    randint = torch.randint

    def late(*arguments, **options):  # time for the main thread to draw first, if it could
        time.sleep(0.03)
        return randint(*arguments, **options)

    monkeypatch.setattr(torch, "randint", late)
    assert run_stage(ppo, *flags_of(world, tmp_path / "two"))[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("how, more", [("asked to stop", []), ("error", []), ("crashed", []), ("error", ["--critic", "shared", "--advantage", "bandit"])])
def test_resume_is_exact_with_the_rollout_that_was_pending(how, more, ppo, world, tmp_path, run_stage, monkeypatch):
    flags = [*flags_of(world, tmp_path / "parts", *more), "--iterations", 6]
    assert run_stage(ppo, *flags, "--output", tmp_path / "whole")[0] == 0
    clip, score, calls = ppo.clip_grad_norm_, ppo.score_responses, []

    def norm(*arguments):
        calls.append(None)
        if len(calls) == 2 * 16 + 1 and how == "asked to stop":  # two models, 8 steps: within iteration 3
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == 2 * 16 + 1 and how == "crashed":
            raise ZeroDivisionError
        return clip(*arguments)

    def failing(*arguments):
        if len(calls) == 3 * 16 and sys._getframe(1).f_code.co_name == "main" and how == "error":
            raise common.UserError("the reward gave up")
        return score(*arguments)

    monkeypatch.setattr(ppo, "clip_grad_norm_", norm)
    monkeypatch.setattr(ppo, "score_responses", failing)
    if how == "crashed":
        with pytest.raises(ZeroDivisionError):
            run_stage(ppo, *flags)
    else:
        status, _, err = run_stage(ppo, *flags)
        assert status == (2 if how == "error" else 128 + signal.SIGTERM), err
    monkeypatch.undo()
    saved = 2 if how == "crashed" else 3
    state = torch.load(tmp_path / "parts" / f"checkpoint-{saved}" / "trainer_state" / "state.pt", weights_only=True)
    assert state["kept"]["pending"][0].shape[0] == 8
    monkeypatch.setitem(sys.modules, "ppo_ahead", ppo)
    assert run_stage(ppo, "--resume", "--output", tmp_path / "parts")[0] == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    state = torch.load(tmp_path / "parts" / "trainer_state" / "state.pt", weights_only=True)
    assert state["kept"]["pending"] is None  # after the last nothing is sampled


def test_an_error_in_the_sampler_ends_the_run_in_one_line_and_what_was_done_is_saved(ppo, world, tmp_path, run_stage, monkeypatch):
    def refuse():
        raise common.UserError("the sampler has had enough")

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    def last_line(result):
        status, _, err = result
        lines = [line for line in err.splitlines() if "error" in line]
        assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
        return lines[0]

    undo = in_sampler(ppo, monkeypatch, 4, refuse)  # that of iteration 4
    line = last_line(run_stage(ppo, *flags_of(world, tmp_path / "one")))
    assert line.startswith("ppo_ahead.py: error: the sampler has had enough; 3 iterations are saved")
    undo()
    assert [path.name for path in (tmp_path / "one").glob("checkpoint-*")] == ["checkpoint-3"]
    assert run_stage(ppo, "--resume", "--output", tmp_path / "one")[0] == 0 and len(rows_of(tmp_path / "one")) == 5
    undo = in_sampler(ppo, monkeypatch, 4, no_memory)
    assert "out of memory (rollout, in iteration 4): halve --batch-size" in last_line(run_stage(ppo, *flags_of(world, tmp_path / "two")))
    undo()
    in_sampler(ppo, monkeypatch, 1, refuse)  # before anything was drawn
    assert "had enough" in last_line(run_stage(ppo, *flags_of(world, tmp_path / "three")))
    assert not samplers()


def test_a_second_ctrl_c_stops_the_sampler_at_its_next_token(ppo, world, tmp_path, run_stage, monkeypatch):
    sample, counted = common.sample_tokens, []

    def interrupted(*arguments):
        if threading.current_thread().name == "sampler":
            counted.append(None)
            if len(counted) == 2:
                os.kill(os.getpid(), signal.SIGINT)
                while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
        return sample(*arguments)

    monkeypatch.setattr(common, "sample_tokens", interrupted)
    status, _, err = run_stage(ppo, *flags_of(world, tmp_path / "out", "--response-length", 64))
    assert status == 130 and "interrupted" in err
    assert len(counted) == 2 and not samplers()


def test_a_device_that_is_not_there_and_torchrun_are_refused(ppo, project, world, tmp_path, run_stage, monkeypatch):
    refused(run_stage(ppo, *flags_of(world, tmp_path / "out", "--sampler-device", "gpu")), "ppo_ahead", "--sampler-device gpu is not known")
    monkeypatch.setattr(ppo.ahead.processes, "IS_TORCHRUN", True)
    refused(run_stage(ppo, *flags_of(world, tmp_path / "out")), "ppo_ahead", "--sampler-device is for one process; leave it out with torchrun")
    assert not (tmp_path / "out").exists()


def test_adapters_are_sampled_with_too(ppo, world, tmp_path, run_stage, monkeypatch):
    pytest.importorskip("peft")
    assert run_stage(ppo, *flags_of(world, tmp_path / "out", "--lora-rank", 2, "--lr", 1e-2))[0] == 0
    first, *later = rows_of(tmp_path / "out")
    assert (first["ratio_first"], first["kl"], later[0]["kl"]) == (1, 0, 0)
    assert later[1]["kl_k3"] > 0 and all(row["approx_kl_first"] > 1e-6 and row["sampler_gap"] < 1e-5 for row in later)
