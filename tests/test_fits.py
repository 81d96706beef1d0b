"""bench/fits.py: what it computes is what an update takes."""

import dataclasses
import itertools
import json
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from transformers import LlamaConfig

import common
import ppo
from plumbing import cli

sys.path.insert(0, str(ROOT / "bench"))
import fits  # noqa: E402

SIZES = ["--batch-size", "4", "--minibatch-size", "4", "--microbatch-size", "4", "--max-prompt-length", "6", "--response-length", "10"]


def config(tmp_path, *flags, **changes):
    """fits.py's Config for a Llama of two layers, from a config.json without weights beside it."""
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    model = LlamaConfig(**(sizes | dict(pad_token_id=1, bos_token_id=None, tie_word_embeddings=False) | changes))
    (tmp_path / "config.json").write_text(json.dumps(model.to_dict()))
    return cli.parse_args(fits.Config, "", [*SIZES, "--model", str(tmp_path / "config.json"), *flags])


# Numbers of that Llama, counted by hand: two layers of matrices, norms, embedding or head.
MATRICES, NORMS, EMBEDDING = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64), 5 * 32, 96 * 32
TRAINED = 2 * (MATRICES + NORMS) + 2 * EMBEDDING + EMBEDDING + 32  # the policy with its head, the critic with its score


def test_weights_gradients_moments_and_cache_are_those_counted_by_hand(tmp_path):
    parts, phases = fits.computed(config(tmp_path))
    ref_policy = 2 * (MATRICES + EMBEDDING) + 4 * (EMBEDDING + NORMS)  # the head in bf16, the embedding not
    reward_model = 2 * MATRICES + 4 * (EMBEDDING + NORMS + 32)
    assert parts["weights"] == 4 * TRAINED + ref_policy + reward_model
    assert parts["gradients"] == 4 * TRAINED and parts["Adam's moments"] == 8 * TRAINED
    one = 4 * 2 * 15 * 8 * 2  # rows, heads, tokens, width, bytes of bf16: keys or values of a layer
    assert parts["key-value cache"] == 4 * (-(-one // 512) * 512)
    stays = parts["weights"] + parts["Adam's moments"]
    assert min(phases.values()) > stays and phases["backward"] > stays + parts["activations"]
    assert phases["optimizer step"] >= stays + parts["gradients"]


@pytest.mark.parametrize("flags", [["--dtype", "bf16"], ["--dtype", "bf16", "--gradient-checkpointing"]])
def test_the_backward_phase_is_what_torch_allocates_in_a_real_update(tmp_path, flags):
    cfg = config(tmp_path, *flags, "--device", "cpu", vocab_size=3000, hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    parts, phases = fits.computed(cfg, on_cuda=False)
    policy, _, critic, _ = fits.load_models(cfg)
    tokens = torch.full((4, 16), 5)
    mask = torch.ones_like(tokens).bool()
    mask[0, 0] = False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        outputs = ppo.forward_responses(policy, critic, tokens, mask, 10, 1.0)
        sum(output.sum() for output in outputs).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert phases["backward"] - parts["weights"] - parts["Adam's moments"] == pytest.approx(peak, rel=0.05)


def test_only_eager_attention_keeps_the_probabilities(tmp_path):
    long = ["--max-prompt-length", "300", "--response-length", "20"]
    plain, eager = (fits.computed(config(tmp_path, *long, "--attention", name))[0]["activations"] for name in ("auto", "eager"))
    probabilities = 2 * 2 * 4 * 4 * 319**2 * 2  # two models, two layers, rows, heads, bf16
    assert eager - plain > 0.9 * probabilities and plain < 0.5 * eager


def test_less_is_taken_by_checkpointing_by_a_shared_critic_and_without_a_reward_model(tmp_path):
    most = lambda *flags: max(fits.computed(config(tmp_path, *flags, hidden_size=128, intermediate_size=512, vocab_size=32))[1].values())
    whole = most()
    assert most("--gradient-checkpointing") < whole and most("--critic", "shared") < 0.7 * whole and most("--reward", "x.py:f") < whole


def test_adapters_share_what_is_frozen_and_train_rank_times_in_plus_out(tmp_path):
    pytest.importorskip("peft")
    parts, _ = fits.computed(config(tmp_path, "--lora-rank", "4"))
    adapters = 4 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # rank, layers, each matrix's in + out
    assert parts["gradients"] == 4 * (2 * adapters + 32)  # policy and critic, whose score is trained too
    base = 2 * (2 * MATRICES + 4 * (EMBEDDING + NORMS)) + 2 * EMBEDDING  # that of the policy, and the reward model's
    assert parts["weights"] == base + 4 * 32 + parts["gradients"]


def test_a_card_needs_room_to_spare():
    assert [fits.smallest_card({"rollout": 1e9, "backward": size * 1e9}) for size in (10.5, 10.6, 22, 22.1, 73.6, 73.7)] == [12, 16, 24, 48, 80, None]


def test_the_command_prints_parts_phases_and_a_card_and_changes_nothing(tmp_path, capsys):
    config(tmp_path)
    kept = common.generate_responses, torch.pow, torch.nn.functional.scaled_dot_product_attention
    fits.main([*SIZES, "--model", str(tmp_path / "config.json")])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 5 + 5 + 1 and lines[-1] == "a card of 12 GB holds it"
    assert kept == (common.generate_responses, torch.pow, torch.nn.functional.scaled_dot_product_attention)


@pytest.mark.parametrize("flags, words", [(["--model", "nowhere/at/all"], "there is no folder"), (["--batch-size", "5"], "not a multiple"), (["--lora-rank", "-1"], "--lora-rank is -1")])
def test_bad_flags_end_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        fits.main([*SIZES, *flags])
    assert stopped.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_the_models_are_as_large_as_their_names():
    for name, billions in {"0.5B": 0.494, "1B": 1.236, "3B": 3.213, "8B": 8.030}.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(fits.iteration.model_config(dataclasses.replace(fits.MODELS[name])))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.002)
