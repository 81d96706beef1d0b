"""The benchmarks run, and what they compute is what it says."""

import dataclasses
import json
import pathlib
import sys

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import iteration  # noqa: E402
import rollout  # noqa: E402
import scaling  # noqa: E402

TINY = ["--hidden", "16", "--layers", "1", "--intermediate", "32", "--vocabulary", "64", "--batch-size", "4", "--microbatch-size", "2", "--prompt-length", "5", "--response-length", "6", "--repeats", "2", "--warm-up", "1"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_flops_of_the_floor_are_those_that_torch_counts(family):
    """Attention aside, which torch counts whole and the floor only where it is causal."""
    shape = iteration.Shape(family, 32, 2, 4, 4 if family == "gpt2" else 2, 64, 100, False, batch_size=3, prompt_length=5, response_length=7)
    model = transformers.AutoModelForCausalLM.from_config(iteration.model_config(shape), attn_implementation="eager")
    tokens = torch.zeros(3, 12, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False, logits_to_keep=7)
    counted = {str(op).split(".")[-1]: number for op, number in counter.get_flop_counts()["Global"].items()}
    matrices, attention = counted.get("mm", 0) + counted.get("addmm", 0), counted["bmm"]
    rotary = 3 * 12 * 4 * 2  # the angles, which transformers 5.17 multiplies as matrices
    assert iteration.matrix_flops(shape)[0]["rollout"] == pytest.approx(matrices + attention // 2, abs=rotary)


def test_an_iteration_is_timed_by_phase_and_written_with_its_command(tmp_path, capsys):
    argv = [*TINY, "--output", str(tmp_path / "result.json"), "--", "--critic", "shared", "--ppo-epochs", "1"]
    iteration.main(argv)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"].endswith(" ".join(argv)) and result["flags"] == argv[-4:]
    assert result["repeats"] == 2 and set(result["seconds"]) == {"rollout", "score", "update", "total"}
    for phase, (median, low, high) in result["seconds"].items():
        assert 0 < low <= median <= high and result["floor_share"][phase] == result["floor_seconds"][phase] / median
    assert result["shape"]["minibatch_size"] == 4 and result["shape"]["ppo_epochs"] == 1 and 5 < result["response_length"] <= 6 and result["peak_memory_gb"] > 0.1
    assert "response tokens per second" in capsys.readouterr().out


def test_slopes_are_those_of_power_laws_and_each_axis_scales_its_own():
    assert scaling.slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert scaling.slope([1, 10, 100], [7, 700, 70000]) == pytest.approx(2)
    base, shapes = iteration.Shape(), [scaling.scaled(iteration.Shape(), axis, 2) for axis in ("batch", "length", "parameters")]
    changed = [{name for name, value in vars(shape).items() if value != getattr(base, name)} for shape in shapes]
    assert changed == [{"batch_size", "minibatch_size"}, {"prompt_length", "response_length"}, {"hidden", "intermediate", "heads", "kv_heads"}]
    assert scaling.size_of(shapes[2], "parameters") > 3 * scaling.size_of(base, "parameters")


def test_scaling_and_rollout_run_and_write_their_results(tmp_path, capsys):
    scaling.main([*TINY, "--factors", "1", "2", "--output", str(tmp_path / "scaling.json")])
    assert set(json.loads((tmp_path / "scaling.json").read_text())["axes"]) == {"batch", "length", "parameters"}
    rollout.main([*TINY, "--end-probability", "0.1", "--output", str(tmp_path / "rollout.json")])
    engines = json.loads((tmp_path / "rollout.json").read_text())["engines"]
    assert {"ours", "generate", "generate, fixed"} <= set(engines) and all(e["tokens_per_second"][0] > 0 for e in engines.values())


def test_the_shapes_are_those_of_the_models_they_are_named_after():
    """Parameters in millions, as published: GPT-2 124, Qwen2.5-0.5B 494, Llama-3.2-1B 1236."""
    for name, millions in (("S", 124), ("M", 494), ("L", 1236), ("cpu", 5.26)):
        shape = dataclasses.replace(iteration.SHAPES[name], prompt_length=512, response_length=512)  # GPT-2 has 1,024 positions
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(iteration.model_config(shape))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("argv, words", [
    (["--hidden", "33"], "heads must divide"), (["--repeats", "0"], "--repeats is 0"), (["--family", "t5"], "invalid choice"),
    (["--output", "nowhere/x.json"], "there is no folder nowhere"), (["--", "--iterations", "3"], "they are set here"), (["--warm-up", "-1"], "must not be negative"),
])
def test_bad_arguments_end_in_one_line_before_anything_runs(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(iteration, "run_ppo", None)
    with pytest.raises(SystemExit) as stopped:
        iteration.main(argv)
    assert stopped.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags, device", [(["--lr", "1", "--device", "cpu"], "cpu"), (["--device=cuda:1"], "cuda:1"), ([], "cuda:0")])
def test_the_device_is_that_of_ppos_own_flag(flags, device, monkeypatch):
    monkeypatch.setattr(iteration.cli, "pick_device", lambda name, flag=None: torch.device("cuda:0" if name == "auto" else name))
    assert iteration.device_of(flags) == torch.device(device)


def test_a_result_is_of_the_device_in_force_though_another_is_there(monkeypatch):
    """With a GPU at hand and --device cpu, rates, dtype and name are the CPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(iteration, "machine_rates", lambda device, dtype: (1e9, 1e9) if (device.type, dtype) == ("cpu", torch.float32) else None)
    row = {"seconds_rollout": 1, "seconds_score": 1, "seconds_update": 1, "tokens_per_second": 1, "response_length": 1, "peak_memory_gb": 1}
    result = iteration.summarize(iteration.Shape(), [row], 0, {"device": "cpu", "dtype": "auto", "critic": "separate"})
    assert "threads" in result["device"] and result["matrix_dtype"] == "torch.float32"


def test_a_device_that_is_not_there_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        rollout.main([*TINY, "--device", "tpu"])
    assert stopped.value.code == 2 and "--device tpu is not known" in capsys.readouterr().err.splitlines()[-1]
