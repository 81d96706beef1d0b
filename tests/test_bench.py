"""The benchmarks run, and what they compute is right."""

import json
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "bench"))
import fits  # noqa: E402
import iteration  # noqa: E402
import rollout  # noqa: E402


@pytest.mark.parametrize("family, kv_heads", [("llama", 2), ("gpt2", 4), ("qwen2", 2)])
def test_the_flops_of_the_floor_are_those_that_torch_counts(family, kv_heads):
    """Attention aside, which torch counts whole and the floor only where it is causal."""
    shape = iteration.Shape(family, 32, 2, 4, kv_heads, 64, 100, False, 3, 5, 7)
    config = iteration.model_config(shape)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 12).long(), use_cache=False, logits_to_keep=7)
    counts = {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}
    counted = sum(number / 2 if "bmm" in op else number for op, number in counts.items())
    rotary = 3 * 12 * 4 * 2  # the angles, which transformers multiplies as matrices
    assert iteration.matrix_flops(shape)["rollout"] == pytest.approx(counted, abs=rotary)


@pytest.mark.parametrize("name, millions", [
    ("S", 124), ("M", 494), ("L", 1236), ("T", 1236), ("cpu", 5.26), ("3B", 3213), ("8B", 8030),
])
def test_the_shapes_are_those_of_the_models_they_are_named_after(name, millions):
    """Parameters as published: GPT-2, Qwen2.5-0.5B, Llama-3.2-1B and 3B, Llama-3.1-8B."""
    with torch.device("meta"):
        config = iteration.model_config((iteration.SHAPES | fits.MODELS)[name])
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


def test_an_iteration_and_a_rollout_are_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench/iteration.py"])
    monkeypatch.setattr(iteration, "matrix_rate", lambda device, dtype: 1e9)  # takes seconds
    tiny = iteration.Shape("llama", 16, 1, 4, 4, 32, 64, False, 4, 5, 6, 4, 2)
    monkeypatch.setitem(iteration.SHAPES, "cpu", tiny)
    argv = ["--repeats", "2", "--warm-up", "1", "--output", str(tmp_path / "result.json")]
    flags = ["--device", "cpu", "--critic", "shared", "--ppo-epochs", "1"]
    iteration.main([*argv, "--", *flags])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"].endswith(" ".join(argv + ["--"] + flags)) and result["flags"] == flags
    assert result["repeats"] == 2 and "threads" in result["device"]  # of --device, not of a GPU
    assert {*result["seconds"]} == {"rollout", "score", "update", "total"}
    for phase, (median, low, high) in result["seconds"].items():
        assert 0 < low <= median <= high
        assert result["floor_share"][phase] == result["floor_seconds"][phase] / median
    floor = result["floor_seconds"]
    assert floor["total"] == pytest.approx(floor["rollout"] + floor["score"] + floor["update"])
    assert result["shape"]["ppo_epochs"] == 1 and result["peak_memory_gb"] > 0.1
    rollout.main([*argv, "--device", "cpu", "--end-probability", "0.1"])
    engines = json.loads((tmp_path / "result.json").read_text())["engines"]
    assert {"ours", "generate"} == {*engines} and engines["ours"]["tokens_per_second"][0] > 0
    for words in (["--repeats", "0"], ["--output", "nowhere/x.json"]):
        with pytest.raises(SystemExit) as stopped:
            iteration.main(words)
        assert stopped.value.code == 2 and "error" in capsys.readouterr().err.splitlines()[-1]
