"""bench/fits.py: what it accounts for is what an update holds."""

import itertools
import json
import sys
import weakref

import pytest
import torch
from conftest import ROOT, tiny_lm, tiny_scalar

import common
import ppo
from plumbing.rows import Row

sys.path.insert(0, str(ROOT / "bench"))
import fits  # noqa: E402


def measured_peak(function):
    """Bytes allocated at the most while a function runs, above what was held before; by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(held)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vocab_size", [200, 3000])
@pytest.mark.parametrize("critic_kind", ["separate", "shared"])
def test_the_estimate_of_activations_is_within_15_percent_of_the_measured_peak(dtype, checkpointing, critic_kind, vocab_size):
    cfg = ppo.Config(critic=critic_kind, dtype=dtype, gradient_checkpointing=checkpointing, response_length=40, microbatch_size=24)
    policy = tiny_lm(vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=6, max_position_embeddings=64)
    critic = tiny_scalar(vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=6, max_position_embeddings=64)
    critic = critic if critic_kind == "separate" else ppo.ValueHead(64, 1)
    cpu, row = torch.device("cpu"), Row(prompt="x")
    row.prompt_ids = [5] * 20
    for model in (policy, critic):
        common.place(model, cpu, dtype, checkpointing)
    ref_policy = tiny_lm(1, vocab_size=500)
    parts = fits.estimate_memory(policy, critic, ref_policy, [], [row], cfg, cpu)
    trained = [*policy.parameters(), *critic.parameters()]
    numbers = sum(p.numel() for p in trained)
    assert parts["gradients"] == 4 * numbers and parts["Adam"] == 8 * numbers
    assert parts["weights"] == 4 * (numbers + sum(p.numel() for p in ref_policy.parameters()))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.full((24, 60), 5)

    def update():
        outputs = ppo.forward_responses(policy, critic, tokens, torch.ones_like(tokens).bool(), 40, 1.0)
        sum(output.sum() for output in outputs).backward()

    estimate = parts["activations"] + parts["backward"]
    assert estimate == pytest.approx(measured_peak(update), rel=0.15)


def test_counting_what_autograd_keeps_lets_go_of_it():
    model, x = torch.nn.Linear(50, 50), torch.ones(100, 50)
    seen = []

    def function():
        hidden = model(x).exp()  # exp keeps its own output: a tensor that knows its graph
        seen.append(weakref.ref(hidden))
        return hidden.exp()

    assert fits.kept_bytes(function, model.parameters()) == 3 * 100 * 50 * 4  # x and both exps
    assert seen[0]() is None


def test_the_command_prints_each_part_and_their_sum_and_a_shared_critic_takes_less(tmp_path, capsys):
    tiny = ["--hidden", "16", "--layers", "1", "--intermediate", "32", "--vocabulary", "64", "--batch-size", "4"]
    tiny += ["--microbatch-size", "2", "--prompt-length", "5", "--response-length", "6"]
    together, of = {}, {}
    for critic in ("separate", "shared"):
        fits.main([*tiny, "--output", str(tmp_path / "fits.json"), "--", "--critic", critic])
        parts = json.loads((tmp_path / "fits.json").read_text())["bytes"]
        together[critic], of[critic] = parts.pop("together"), parts
        assert set(parts) == {"weights", "gradients", "Adam", "activations", "backward"} and sum(parts.values()) == together[critic]
        assert len(capsys.readouterr().out.strip().splitlines()) == 2 + 6  # two lines about the rows come before
    separate, shared = of["separate"], of["shared"]
    assert shared["gradients"] <= 0.6 * separate["gradients"] and shared["Adam"] == 2 * shared["gradients"]
    assert shared["weights"] < 0.8 * separate["weights"] and shared["activations"] < 0.8 * separate["activations"]
    assert together["shared"] < 0.7 * together["separate"]
