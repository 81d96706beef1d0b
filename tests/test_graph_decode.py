"""examples/scale/graph_decode.patch samples what the plain loop samples, in steps of one shape that can be replayed."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_families import make_lm
from test_forks import check_size, compare, flags_of, steps_of
from test_pretend_cuda import near

import common
import ppo
import pretend_graph
import zoo

PATCH = ROOT / "examples" / "scale" / "graph_decode.patch"
FIXED = ["gpt2", "bloom", "llama_tied", "qwen2", "qwen3", "deepseek_v3", "mixtral"]
GROWING = ["mistral_window", "gemma3", "mamba", "qwen3_5"]  # a window or a recurrent state in some layer
SHAPES = [([1, 3, 7, 12, 12, 5], 24), ([9, 9], 30), ([2, 20, 4], 44), ([5, 6], 2), ([4], 1)]  # prompts, response
ENDS = ([zoo.EOS], [zoo.EOS, *range(5, zoo.VOCAB, 25)], [*range(zoo.VOCAB)])  # few rows end early, most, all at once


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    folder = compare.forked(tmp_path_factory.mktemp("graph"), PATCH)
    spec = importlib.util.spec_from_file_location("common_graph_decode", folder / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_same(fork, model, kinds_of_ends, device="cpu"):
    """Samples with both modules, responses of each shape that end at any of some ids."""
    model.train()  # as some modules are under gradient checkpointing
    for ends in kinds_of_ends:
        model.generation_config.eos_token_id = ends
        for lengths, response_length in SHAPES:
            prompts, mask = common.pad([[5 + i] * n for i, n in enumerate(lengths)], zoo.PAD, "left")
            found = []
            for module in (common, fork):
                inputs = [prompts.to(device), mask.to(device), response_length, 0.7, torch.Generator().manual_seed(3)]
                found.append([*module.generate_responses(model, *inputs), inputs[-1].get_state()])
                assert all(part.training for part in model.modules()) and torch.is_autocast_cache_enabled()
            torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-4)
            assert torch.equal(found[1][0], found[0][0]) and torch.equal(found[1][2], found[0][2])


@pytest.mark.parametrize("family", [*FIXED, *GROWING])
def test_each_family_samples_the_same_and_in_steps_of_one_shape_where_it_can(family, fork, monkeypatch):
    unused = fork.GrowingCache if family in FIXED else fork.FixedCache
    monkeypatch.setattr(unused, "update", None)  # an error if it were called
    check_same(fork, make_lm(family), ENDS)
    for module in (common, fork):  # the second of two processes; it gets nothing where there is one prompt
        monkeypatch.setattr(module, "share", lambda rows: rows[1::2])
    check_same(fork, make_lm(family), ENDS[1:2])


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mixtral"])
def test_a_captured_step_holds_no_number_of_python_and_no_kept_cast_and_is_freed(family, fork, monkeypatch):
    model = make_lm(family)
    pretend_graph.install(monkeypatch)
    monkeypatch.setattr(fork, "side_stream", torch.device)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    check_same(fork, model, ENDS[2:])
    assert len(pretend_graph.replays) == 3 * 15  # tokens 0 and 1 come before, and after token 16 a look finds the end
    check_same(fork, model, ENDS[:2])
    assert len(pretend_graph.replays) > 3 * 15 + 60 and not pretend_graph.alive


def test_the_patch_is_small_and_a_run_has_the_same_metrics(world, tmp_path, run_stage):
    check_size(PATCH, 60)
    flags = [*flags_of(world, tmp_path / "plain", world / "reward_model"), "--response-length", 20]
    assert run_stage(ppo, *flags)[0] == 0
    command = [sys.executable, "ppo.py", *map(str, flags), "--output", str(tmp_path / "patched")]
    subprocess.run(command, cwd=compare.forked(tmp_path, PATCH), check=True, timeout=120)
    expected, found = (steps_of(tmp_path / name) for name in ("plain", "patched"))
    assert len(found) == 2 and near(expected, found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "qwen2", "qwen3"])
def test_on_cuda_a_graph_samples_what_the_loop_samples_and_leaves_no_memory(family, fork):
    model, used = make_lm(family).to("cuda"), []
    for _ in range(2):
        check_same(fork, model, ENDS, "cuda")
        used.append(torch.cuda.memory_allocated())
    assert used[1] <= used[0]
