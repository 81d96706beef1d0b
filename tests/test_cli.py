"""The three commands as a user runs them, their flags, and what bad input prints."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import DEMONSTRATIONS, PREFERENCES, PROMPTS, ROOT, read_rows, tiny_lm, write_rows
from transformers import AutoModelForSequenceClassification

import common
import harness
import ppo
import reward_model
import sft
from data import tiny_model

METRICS = set(
    "iteration episodes score score_parts score_std true_reward kl kl_k3 kl_coef kl_target entropy response_length "
    "eos_rate policy_loss value_loss approx_kl clip_fraction ratio_first approx_kl_first sampler_gap "
    "explained_variance optimizer_steps skipped_steps grad_norm critic_grad_norm lr seconds_rollout seconds_score "
    "seconds_update tokens_per_second peak_memory_gb".split()
)


def python(*words, cwd):
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def ppo_flags(world, output, *more):
    return [
        "--policy", world / "sft", "--reward", world / "reward_model", "--output", output,
        "--prompts", world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl",
        "--iterations", 1, "--batch-size", 8, "--minibatch-size", 4, "--microbatch-size", 4,
        "--response-length", 5, "--device", "cpu", *more,
    ]


def refused(result, script, *fragments):
    status, _, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), err
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def test_the_three_commands_hand_over_to_each_other_and_log_what_the_docs_say(tmp_path):
    for name, rows in (("sft", DEMONSTRATIONS * 3), ("pairs", PREFERENCES), ("prompts", PROMPTS)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    lines = [
        "sft.py --data sft.jsonl --epochs 4", "reward_model.py --data pairs.jsonl --eval-data pairs.jsonl",
        "ppo.py --prompts prompts.jsonl --batch-size 8 --minibatch-size 4 --microbatch-size 2 "
        "--kl-target 3 --iterations 3 --response-length 12 --eval-every 2",
    ]
    program = "import runpy, sys\nfor line in sys.argv[1:]:\n    sys.argv = line.split()\n    "
    program += f"runpy.run_path(f'{ROOT}/{{sys.argv[0]}}', run_name='__main__')"
    run = python("-c", program, *lines, cwd=tmp_path)  # one process, as a start takes seconds
    assert run.returncode == 0, run.stderr
    for line in run.stderr.replace("\r", "\n").splitlines():  # a progress bar, nothing from a library
        is_ours = line.startswith("warning, iteration") or not line.strip()
        assert is_ours or re.search(r"\d+/\d+ \[", line), line
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {"ppo", "reward_model", "sft"}
    output = tmp_path / "ckpt" / "ppo"
    rows = read_rows(output / "metrics.jsonl")
    steps, evals = [r for r in rows if "split" not in r], [r for r in rows if "split" in r]
    assert [set(row) for row in steps] == [METRICS] * 3 and [row["episodes"] for row in steps] == [8, 16, 24]
    assert [row["iteration"] for row in evals] == [0, 2, 3]
    for row in evals:
        assert set(row) == {"split", "iteration", "score", "true_reward", "kl", "win_rate"}
    assert evals[0]["win_rate"] == 0.5 and abs(evals[0]["kl"]) < 1e-5 and abs(steps[0]["kl"]) < 1e-5
    for row in steps:  # the phases are all of an iteration's time, without evaluations
        tokens = row["tokens_per_second"] * sum(row[f"seconds_{phase}"] for phase in ("rollout", "score", "update"))
        assert tokens == pytest.approx(8 * row["response_length"], rel=0.02) and abs(row["ratio_first"] - 1) < 1e-6
    assert steps[1]["kl_coef"] != steps[0]["kl_coef"] == ppo.Config.kl_coef
    assert all(row["true_reward"] is None for row in rows)  # only the embedded prompts have a judge
    keys = {"iteration", "prompt", "response", "sft_response", "score", "kl", "true_reward"}
    assert keys == set(read_rows(output / "samples.jsonl")[0])
    assert json.loads((output / "args.json").read_text())["iterations"] == 3
    AutoModelForSequenceClassification.from_pretrained(output / "critic")
    code = run.stdout[run.stdout.index("    from transformers") :].replace("    ", "")
    loaded = python("-c", code, cwd=tmp_path)  # the lines that ppo.py prints do load the result
    assert loaded.returncode == 0 and " meets a " in loaded.stdout, loaded.stderr


# === Flags ========================================================================================
@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_flags_have_help_and_ranges_are_read_and_take_dashes_and_underscores(module, capsys):
    assert harness.parse_args(module.Config, "", []) == module.Config()
    for argv in ("--max-grad-norm 3", "--max_grad_norm 3", "--max-grad-norm=3"):
        changed = dataclasses.replace(module.Config(), max_grad_norm=3.0)
        assert harness.parse_args(module.Config, "", argv.split()) == changed
    for argv in ("--max-grad-nrom 3", "--max-grad 3", "--lr x", "stray", "--dtype fp16"):
        with pytest.raises(common.UserError, match=argv.split()[0]):
            harness.parse_args(module.Config, "", argv.split())
    with pytest.raises(common.UserError, match="--data is given twice"):
        harness.parse_args(sft.Config, "", ["--data", "a", "--epochs", "1", "--data=b"])
    with pytest.raises(SystemExit, match="^0$"):
        harness.parse_args(module.Config, module.__doc__.splitlines()[0], ["--help"])
    text = capsys.readouterr().out
    files = [f"{name}.py" for name in (module.__name__, "harness", "rewards")]
    code = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name.replace('_', '-')} " in text
        is_read = re.search(rf'\b(cfg|self|namespace)\.{field.name}\b|"{field.name}"', code)
        assert is_read, f"nothing reads --{field.name}"
        low, high = re.search(r"Range\(low=(.*), high=(.*?)\)|()", str(field.type)).group(1, 2)
        bad = [float(low) - 1, math.nan] if low else []
        bad += [float(high) + 1] if high not in (None, "inf") else []
        for value in bad:
            with pytest.raises(common.UserError, match=f"{harness.flag_of(field.name)} is {value}; it must be"):
                dataclasses.replace(module.Config(), **{field.name: value})


BAD_FLAGS = """
--batch-size 100 --minibatch-size 32 | --batch-size 100 | --minibatch-size 32
--samples-per-prompt 3 | --batch-size 8 | --samples-per-prompt 3
--iterations many | --iterations | 'many'
--advantage grpo | --advantage | gae | bandit
--device cuda:99 | --device cuda:99
--prompts nowhere.jsonl | can't read nowhere.jsonl
--prompts a.jsonl a.jsonl | a.jsonl is given twice
--response-length 500 | do not fit | 128 positions | --response-length
--kl-target 3 --kl-coef 0 | --kl-target | --kl-coef above 0
--kl-target 3 --kl-horizon 4 | --kl-horizon is 4 | at least --batch-size
--kl-horizon 300 | --kl-horizon | needs a --kl-target
--reward a.py:f a.py:f | --reward names | twice
--reward-device cpu --lora-rank 2 | --reward-device | --lora-rank
--policy {world}/reward_model | no causal LM but a LlamaForSequenceClassification
--reward {world}/sft | no trained reward model: it has no score.weight | python reward_model.py
--policy ckpt/nowhere | there is no folder 'ckpt/nowhere'; make it with: python sft.py
--reward ckpt/nowhere | there is no folder 'ckpt/nowhere'; make it with: python reward_model.py
--reward missing.py:f | there is no file 'missing.py' | give file.py:function
--reward {bad}/nan.py:f | returned nan, not a finite number | A fox meets a cub.
--reward {bad}/zero.py:f | failed: ZeroDivisionError: division by zero | zero.py line 1
--reward {bad}/zero.py:g | has no function g
--reward {bad}/syntax.py:f | fails: SyntaxError
--reward {bad}/exits.py:f | fails: SystemExit: 3
--policy {bad}/cut | cut can't be loaded
--policy {bad}/small | the model only 20
--policy {bad}/pickled | never read
--policy {bad}/incomplete | up_proj
--reward {bad}/other | no trained reward model
""".strip().splitlines()


@pytest.fixture(scope="module")
def bad(world, tmp_path_factory):
    """A folder of reward functions and models that can't be used."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "nan.py").write_text("def f(prompts, responses, rows): return [float('nan')] * len(rows)")
    (folder / "zero.py").write_text("def f(prompts, responses, rows): return 1 / 0")
    (folder / "syntax.py").write_text("def f(:")
    (folder / "exits.py").write_text("raise SystemExit(3)")
    for name in ("cut", "pickled", "incomplete", "small", "other"):
        shutil.copytree(world / "sft", folder / name)
    os.truncate(folder / "cut" / "model.safetensors", 5000)
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(tiny_lm().state_dict(), folder / "pickled" / "pytorch_model.bin")
    weights = safetensors.torch.load_file(world / "sft" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, folder / "incomplete" / "model.safetensors", {"format": "pt"})
    tiny_lm(vocab_size=20).save_pretrained(folder / "small")
    tiny_model.train_tokenizer(["quite other words"] * 9, 280).save_pretrained(folder / "other")
    return folder


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused_by_name_value_and_rule(world, bad, tmp_path, run_stage, case):
    flags, *fragments = case.format(world=world, bad=bad).split(" | ")
    whole_batch = ["--batch-size", 24, "--minibatch-size", 24] if ".py:f" in flags else []
    refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out", *whole_batch), *flags.split()), "ppo", *fragments)
    assert not (tmp_path / "out").exists()


# === What a flag names ============================================================================
def test_prompts_that_do_not_fit_are_counted_and_an_error_if_none_is_left(world, tmp_path, run_stage):
    prompts = write_rows(tmp_path / "a.jsonl", [*PROMPTS, {"prompt": "A fox. " * 50}, {"prompt": ""}])
    flags = ppo_flags(world, tmp_path / "out", "--prompts", prompts, "--max-prompt-length", 40)
    status, out, _ = run_stage(ppo, *flags)
    assert status == 0 and f"{prompts}: 26 rows read, 24 examples used; " in out
    assert "1 dropped (prompt above --max-prompt-length 40)" in out and "1 dropped (empty)" in out
    result = run_stage(ppo, *flags, "--max-prompt-length", 1, "--overwrite")
    refused(result, "ppo", "26 rows read and none can be used", "--max-prompt-length 1")


@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_a_bad_data_file_stops_a_stage_and_leaves_an_earlier_output_alone(world, tmp_path, run_stage, module):
    bad, output = write_rows(tmp_path / "bad.jsonl", [{"question": "a"}]), tmp_path / "out"
    kept = {"precious": "kept", "metrics.jsonl": "{}", "args.json": '{"written": []}'}  # as a run leaves it
    output.mkdir()
    for name, text in kept.items():
        (output / name).write_text(text)
    flags = {"sft": ["--data", bad], "reward_model": ["--model", world / "sft", "--data", bad]}
    flags = flags.get(module.__name__) or ppo_flags(world, output, "--prompts", bad)
    result = run_stage(module, *flags, "--output", output, "--overwrite")
    refused(result, module.__name__, "bad.jsonl line 1", "'question'", '"prompt": "..."')
    assert {path.name: path.read_text() for path in output.iterdir()} == kept
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "out"]


def test_an_incomplete_model_is_refused_by_the_second_stage_too(world, bad, tmp_path, run_stage):
    flags = ["--data", world / "pairs.jsonl", "--model", bad / "incomplete", "--output", tmp_path / "out"]
    refused(run_stage(reward_model, *flags), "reward_model", "is incomplete", "up_proj")


def test_an_output_that_is_a_file_or_holds_something_else_is_refused(world, tmp_path, run_stage):
    file = tmp_path / "thesis.txt"
    file.write_text("kept")
    for more in ([], ["--overwrite"], ["--resume"]):
        refused(run_stage(ppo, *ppo_flags(world, tmp_path, *more)), "ppo", "holds files of something else")
    for output in (file, file / "out"):
        refused(run_stage(ppo, *ppo_flags(world, output)), "ppo", "--output", "can't be written")
    assert os.listdir(tmp_path) == ["thesis.txt"] and file.read_text() == "kept"


@pytest.mark.parametrize("flag, dtype, is_told", [
    ("avx512_bf16", "auto", True), ("amx_bf16", "auto", True), ("avx512_f", "auto", False),
    ("amx_bf16", "float32", False),
])
def test_a_cpu_with_bf16_instructions_is_told_and_computes_in_float32_all_the_same(
    flag, dtype, is_told, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    harness.Run(harness.RunConfig(output=str(tmp_path / "out"), device="cpu", dtype=dtype))
    harness.current["lock"].release()
    assert ("--dtype bf16" in capsys.readouterr().out) == is_told
