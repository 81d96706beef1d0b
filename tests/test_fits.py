"""bench/fits.py: what it computes is what an update takes."""

import gc
import itertools
import json
import sys

import pytest
import torch
import transformers
from conftest import ROOT

import common
import harness
import ppo

sys.path.append(str(ROOT / "bench"))
import fits  # noqa: E402

SIZES = "--batch-size 4 --minibatch-size 4 --microbatch-size 4 --max-prompt-length 6 --response-length 10".split()
# Numbers of the Llama of `config`, by hand: matrices of two layers, norms, embedding or head.
MATRICES, NORMS, EMBEDDING = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), 5 * 32, 96 * 32
TRAINED = 2 * (MATRICES + NORMS) + 3 * EMBEDDING + 32  # policy and its head; critic and its score


def config(tmp_path, flags="", **changes):
    """Returns fits.py's Config for a small Llama, from a config.json without weights beside it."""
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=False)
    model = transformers.LlamaConfig(**(sizes | dict(pad_token_id=1, bos_token_id=None) | changes))
    (tmp_path / "config.json").write_text(json.dumps(model.to_dict()))
    return harness.parse_args(fits.Config, "", [*SIZES, "--model", str(tmp_path / "config.json"), *flags.split()])


def test_weights_gradients_moments_and_cache_are_those_counted_by_hand(tmp_path):
    parts, phases = fits.computed(config(tmp_path))
    ref_policy = 2 * (MATRICES + EMBEDDING) + 4 * (EMBEDDING + NORMS)  # bf16 but the embedding
    reward_model = 2 * MATRICES + 4 * (EMBEDDING + NORMS + 32)
    assert parts["weights"] == 4 * TRAINED + ref_policy + reward_model
    assert parts["gradients"] == 4 * TRAINED and parts["Adam's moments"] == 8 * TRAINED
    one = 4 * 2 * 15 * 8 * 2  # rows, heads, tokens, width, bytes: keys or values of a layer
    assert parts["key-value cache"] == 4 * (-(-one // 512) * 512)
    checkpointing, _ = fits.computed(config(tmp_path, "--gradient-checkpointing"))
    assert checkpointing["key-value cache"] == parts["key-value cache"]  # a rollout has it all the same
    stays = parts["weights"] + parts["Adam's moments"]
    assert {*phases} == {"optimizer step", "rollout", "score", "log-probabilities", "backward"}
    assert min(phases.values()) > stays and phases["backward"] > stays + parts["activations"]
    assert phases["optimizer step"] >= stays + parts["gradients"]
    pytest.importorskip("peft")
    parts, _ = fits.computed(config(tmp_path, "--lora-rank 4"))
    adapters = 4 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # rank, layers, in + out
    assert parts["gradients"] == 4 * (2 * adapters + 32)  # the critic's score is trained, too
    base = 2 * (2 * MATRICES + 4 * (EMBEDDING + NORMS)) + 2 * EMBEDDING  # policy's, reward model's
    assert parts["weights"] == base + 4 * 32 + parts["gradients"]


@pytest.mark.parametrize("flags", ["", " --gradient-checkpointing"])
def test_the_backward_phase_is_what_torch_allocates_in_a_real_update(tmp_path, flags):
    sizes = dict(vocab_size=3000, hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    cfg = config(tmp_path, "--dtype bf16 --device cpu" + flags, **sizes)
    parts, phases = fits.computed(cfg, on_cuda=False)
    policy, _, critic, _ = fits.load_models(cfg)
    mask = torch.ones(4, 16).bool()
    mask[0, 0] = False
    gc.collect()  # an earlier test's tensors, freed during the profile, would count as less memory
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        for _ in range(2):  # the second time beside the gradients of the first
            outputs = ppo.forward_responses(policy, critic, torch.full((4, 16), 5), mask, 10, 1.0)
            sum(output.sum() for output in outputs).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    activations = phases["backward"] - parts["weights"] - parts["Adam's moments"]
    assert activations == pytest.approx(peak, rel=0.05)


def test_attention_checkpointing_critic_and_reward_take_what_they_should(tmp_path):
    long = "--max-prompt-length 300 --response-length 20"
    plain, eager = [
        fits.computed(config(tmp_path, long + attention))[0]["activations"] for attention in ("", " --attention eager")
    ]
    probabilities = 2 * 2 * 4 * 4 * 319**2 * 2  # two models, two layers, rows, heads, bf16
    assert eager - plain > 0.9 * probabilities and plain < 0.5 * eager
    most = {}
    for flags in ("", "--gradient-checkpointing", "--critic shared", "--reward x.py:f"):
        sizes = dict(hidden_size=128, intermediate_size=512, vocab_size=32, num_hidden_layers=1)
        most[flags] = max(fits.computed(config(tmp_path, flags, **sizes))[1].values())
    assert most["--gradient-checkpointing"] < most[""] and most["--reward x.py:f"] < most[""]
    assert most["--critic shared"] < 0.7 * most[""]


def test_the_command_prints_parts_phases_and_a_card_and_refuses_bad_flags(tmp_path, run_stage):
    replaced = (common, "generate_responses"), (torch, "pow"), (torch.nn.functional, "scaled_dot_product_attention")
    kept = [getattr(module, name) for module, name in replaced]
    status, out, err = run_stage(fits, *SIZES, "--model", config(tmp_path).model)
    lines = out.strip().splitlines()
    assert status == 0 and len(lines) == 5 + 5 + 1 and lines[-1] == "a card of 12 GB holds it", err
    assert [getattr(module, name) for module, name in replaced] == kept
    sizes = (10.5, 10.6, 22, 22.1, 73.6, 73.7)
    cards = [fits.smallest_card({"rollout": 1e9, "backward": size * 1e9}) for size in sizes]
    assert cards == [12, 16, 24, 48, 80, None]  # with room to spare
    for words, more in (("there is no folder", ("--model", "not/at/all")), ("not a multiple", ("--batch-size", 5))):
        status, _, err = run_stage(fits, *SIZES, *more)
        assert status == 2 and words in err.splitlines()[-1]
