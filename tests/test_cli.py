"""The three commands as a user runs them, and what bad input prints."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import DEMONSTRATIONS, PREFERENCES, PROMPTS, ROOT, read_rows, tiny_lm, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ppo
import reward_model
import sft
from data import tiny_model

METRICS = {
    "iteration", "episodes", "score", "score_parts", "score_std", "true_reward", "kl", "kl_k3", "kl_coef", "entropy", "response_length",
    "eos_rate", "policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio_first", "approx_kl_first", "sampler_gap", "kl_target",
    "explained_variance", "optimizer_steps", "skipped_steps", "grad_norm", "critic_grad_norm", "lr", "seconds_rollout", "seconds_score",
    "seconds_update", "tokens_per_second", "peak_memory_gb",
}


def command(script, *flags, cwd):
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_three_commands_hand_over_to_each_other_and_log_what_the_docs_say(tmp_path):
    write_rows(tmp_path / "sft.jsonl", DEMONSTRATIONS * 3)
    write_rows(tmp_path / "pairs.jsonl", PREFERENCES)
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    runs = [
        command("sft.py", "--data", "sft.jsonl", "--epochs", 4, cwd=tmp_path),
        command("reward_model.py", "--data", "pairs.jsonl", "--eval-data", "pairs.jsonl", cwd=tmp_path),
        command("ppo.py", "--prompts", "prompts.jsonl", "--iterations", 3, "--batch-size", 8, "--minibatch-size", 4,
                "--microbatch-size", 2, "--response-length", 12, "--eval-every", 2, "--kl-target", 3, cwd=tmp_path),
    ]
    for run in runs:
        assert run.returncode == 0, run.stderr
        noise = [line for line in run.stderr.replace("\r", "\n").splitlines() if line.strip()]
        for line in noise:  # progress bars and the stage's own warnings, nothing from a library
            assert re.search(r"\d+/\d+ \[", line) or line.startswith("warning, iteration"), line
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["ppo", "reward_model", "sft"]

    output = tmp_path / "ckpt" / "ppo"
    rows = read_rows(output / "metrics.jsonl")
    steps, evals = [r for r in rows if "split" not in r], [r for r in rows if "split" in r]
    assert [set(row) for row in steps] == [METRICS] * 3 and [row["episodes"] for row in steps] == [8, 16, 24]
    assert [row["iteration"] for row in evals] == [0, 2, 3]
    assert all(set(row) == {"split", "iteration", "score", "true_reward", "kl", "win_rate"} for row in evals)
    assert evals[0]["win_rate"] == 0.5 and abs(evals[0]["kl"]) < 1e-5 and abs(steps[0]["kl"]) < 1e-5
    assert all(abs(row["ratio_first"] - 1) < 1e-6 for row in steps)
    for row in steps:  # the phases are all of an iteration's time, without evaluations and checkpoints
        seconds = sum(row[f"seconds_{phase}"] for phase in ("rollout", "score", "update"))
        assert row["tokens_per_second"] * seconds == pytest.approx(8 * row["response_length"], rel=0.02)
    assert steps[1]["kl_coef"] != steps[0]["kl_coef"] == ppo.Config.kl_coef
    assert all(row["true_reward"] is None for row in rows)  # the judge is for the embedded prompts only
    samples = read_rows(output / "samples.jsonl")
    assert {"iteration", "prompt", "response", "sft_response", "score", "kl", "true_reward"} == set(samples[0])
    assert json.loads((output / "args.json").read_text())["iterations"] == 3
    AutoModelForSequenceClassification.from_pretrained(output / "critic")

    # the lines that ppo.py prints do load the result
    code = runs[2].stdout[runs[2].stdout.index("    from transformers") :].replace("    ", "")
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert loaded.returncode == 0 and " meets a " in loaded.stdout, loaded.stderr


def test_the_shared_critics_head_is_saved(world, tmp_path, run_stage):
    status, *_ = run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--critic", "shared"))
    weights = safetensors.torch.load_file(tmp_path / "out" / "critic" / "value_head.safetensors")
    assert status == 0 and weights["weight"].shape == (1, 16) and weights["weight"].abs().max() > 0


def ppo_flags(world, output, *more):
    return [
        "--policy", world / "sft", "--reward", world / "reward_model", "--prompts", world / "prompts.jsonl", "--eval-prompts",
        world / "prompts.jsonl", "--output", output, "--iterations", 1, "--batch-size", 8, "--minibatch-size", 4,
        "--microbatch-size", 4, "--response-length", 5, "--device", "cpu", *more,
    ]


def refused(result, script, *fragments):
    status, _, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2 and len(lines) == 1, err
    assert lines[0].startswith(f"{script}.py: error: ")
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def test_a_missing_checkpoint_names_the_command_that_makes_it(world, tmp_path, run_stage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run_stage(ppo), "ppo", "ckpt/sft", "make it with: python sft.py")
    refused(run_stage(ppo, "--policy", world / "sft"), "ppo", "ckpt/reward_model", "python reward_model.py")
    refused(run_stage(reward_model), "reward_model", "ckpt/sft", "python sft.py")
    assert not (tmp_path / "ckpt").exists() or not list((tmp_path / "ckpt").iterdir())


def test_a_reward_model_without_a_trained_head_is_refused(world, tmp_path, run_stage):
    flags = ppo_flags(world, tmp_path / "out", "--reward", world / "sft")
    refused(run_stage(ppo, *flags), "ppo", "is no trained reward model: it has no score.weight", "python reward_model.py")
    assert not (tmp_path / "out").exists()


def test_a_reward_model_is_no_policy(world, tmp_path, run_stage):
    flags = ppo_flags(world, tmp_path / "out", "--policy", world / "reward_model")
    refused(run_stage(ppo, *flags), "ppo", "is no causal LM but a LlamaForSequenceClassification")


def test_a_causal_lm_with_other_tokens_is_no_reward_model(world, tmp_path, run_stage):
    tokenizer = tiny_model.train_tokenizer(["quite other words"] * 9, 280)
    tiny_lm(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    flags = ppo_flags(world, tmp_path / "out", "--reward", tmp_path / "other")
    refused(run_stage(ppo, *flags), "ppo", "is no trained reward model")


@pytest.mark.parametrize("flags, fragments", [
    (["--batch-size", 100, "--minibatch-size", 32], ["--batch-size 100", "--minibatch-size 32", "use --minibatch-size 25"]),
    (["--minibatch-size", 16], ["--batch-size 8", "--minibatch-size 16", "use --minibatch-size 8"]),
    (["--minibatch-size", 0], ["--minibatch-size is 0", "at least 1"]), (["--microbatch-size", 0], ["--microbatch-size is 0"]),
    (["--batch-size", 0], ["--batch-size is 0", "at least 1"]), (["--temperature", 0], ["--temperature is 0"]),
    (["--gamma", 1.5], ["--gamma is 1.5", "from 0 to 1"]), (["--kl-coef", "nan"], ["--kl-coef is nan"]),
    (["--kl-coef", "-1"], ["--kl-coef is -1"]), (["--clip-eps", 2], ["--clip-eps"]), (["--iterations", "many"], ["invalid int value", "many"]),
    (["--advantage", "grpo"], ["--advantage", "gae", "bandit"]), (["--kl-coeff", 1], ["unknown argument --kl-coeff", "--kl-coef?"]),
    (["--device", "cuda:99"], ["--device cuda:99"]), (["--device", "abacus"], ["--device abacus"]), (["--device", "meta"], ["--device meta"]),
    (["--seed", -1], ["--seed is -1"]), (["--eval-prompts", ""], ["can't read"]), (["--prompts", "a\0b"], ["can't read"]),
    (["--response-length", 500], ["do not fit the model's 128 positions", "--response-length"]),
    (["--kl-target", 3, "--kl-coef", 0], ["--kl-target", "--kl-coef above 0"]),
    (["--kl-target", 3, "--kl-horizon", 4], ["--kl-horizon is 4", "at least 8"]),
])
def test_bad_flags_are_refused_by_name_value_rule(world, tmp_path, run_stage, flags, fragments):
    refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out", *flags)), "ppo", *fragments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source, spec, fragments", [
    (None, "missing.py:f", ["no file", "file.py:function"]), ("def f(p, r, rows): return [0]*len(p)", "{}", ["file.py:function"]),
    ("def f(p, r, rows): return [0]*len(p)", "{}:g", ["has no function g"]), ("def f(:", "{}:f", ["fails", "SyntaxError"]),
    ("def f(p, r, rows): return [0.0]", "{}:f", ["returned 1 scores for 24 responses"]), ("def f(p, r, rows): return None", "{}:f", ["NoneType"]),
    ("def f(p, r, rows): return ['0.5']*len(p)", "{}:f", ["'0.5'", "not a finite number"]),
    ("def f(p, r, rows): return [float('nan')]*len(p)", "{}:f", ["nan", "not a finite number"]),
    ("def f(p, r, rows): return [None]*len(p)", "{}:f", ["None", "not a finite number", "A fox meets a cub."]),
    ("def f(p, r, rows): return 1/0", "{}:f", ["failed: ZeroDivisionError: division by zero", "reward.py line 1"]), ("def f(p): return 0", "{}:f", ["TypeError"]), ("def f(p, r, rows): return [1e300]*len(p)", "{}:f", ["1e+300", "not a finite number"]),
    ("def f(p, r, rows): return {i: 0.0 for i in range(len(p))}", "{}:f", ["f() returned a dict"]),
])
def test_a_bad_reward_function_is_refused_and_says_what_it_returned(world, tmp_path, run_stage, source, spec, fragments):
    path = tmp_path / "reward.py"
    if source:
        path.write_text(source)
    flags = ppo_flags(world, tmp_path / "out", "--batch-size", 24, "--minibatch-size", 24, "--reward", spec.format(path))
    refused(run_stage(ppo, *flags), "ppo", *fragments)
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_too_long_are_dropped_and_counted_and_an_error_if_none_is_left(world, tmp_path, run_stage):
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPTS + [{"prompt": "A fox. " * 50}, {"prompt": ""}])
    status, out, _ = run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--prompts", prompts, "--max-prompt-length", 40))
    assert status == 0 and f"{prompts}: {len(PROMPTS) + 2} rows read, {len(PROMPTS)} examples used; " in out
    assert "1 dropped (prompt above --max-prompt-length 40)" in out and "1 dropped (empty)" in out
    result = run_stage(ppo, *ppo_flags(world, tmp_path / "out2", "--prompts", prompts, "--max-prompt-length", 1))
    refused(result, "ppo", f"{len(PROMPTS) + 2} rows read and none can be used", "--max-prompt-length 1")


@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_a_bad_data_file_stops_each_stage_and_leaves_an_earlier_output_alone(world, tmp_path, run_stage, module):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a"}\n')
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("kept")
    (output / "metrics.jsonl").write_text("")
    (output / "args.json").write_text('{"written": []}')  # as a run leaves it
    flags = {"sft": ["--data", bad], "reward_model": ["--model", world / "sft", "--data", bad]}
    flags = flags.get(module.__name__) or ppo_flags(world, output, "--prompts", bad)
    refused(run_stage(module, *flags, "--output", output, "--overwrite"), module.__name__, "bad.jsonl line 1", "'question'", '"prompt": "..."')
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "out"]
    assert (output / "precious").read_text() == "kept"


def test_a_truncated_checkpoint_and_a_pickled_one_are_refused(world, tmp_path, run_stage):
    tokenizer, model = AutoTokenizer.from_pretrained(world / "sft"), AutoModelForCausalLM.from_pretrained(world / "sft")
    for name in ("cut", "pickled"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        if name == "pickled":
            weights.unlink()
            torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
        refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--policy", tmp_path / name)), "ppo", f"{name} can't be loaded")


def test_a_folder_that_no_run_wrote_is_never_replaced(world, tmp_path, run_stage):
    (tmp_path / "sft").mkdir()
    (tmp_path / "thesis.txt").write_text("kept")
    for module, flags in ((sft, ["--data", world / "sft.jsonl"]), (ppo, ppo_flags(world, tmp_path))):
        refused(run_stage(module, *flags, "--output", tmp_path), module.__name__, "holds files of something else")
    for name in ("", ".", ".."):
        refused(run_stage(sft, "--data", world / "sft.jsonl", "--output", name), "sft", "is no name for a new folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sft", "thesis.txt"]


def test_a_checkpoint_that_lacks_a_weight_or_a_scale_is_refused(world, tmp_path, run_stage):
    for name, source in (("cut", "sft"), ("scaleless", "reward_model")):
        shutil.copytree(world / source, tmp_path / name)
    weights = safetensors.torch.load_file(tmp_path / "cut" / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    flags = ["--data", world / "pairs.jsonl", "--eval-data", world / "pairs.jsonl", "--output", tmp_path / "out"]
    refused(run_stage(reward_model, "--model", tmp_path / "cut", *flags), "reward_model", "is not whole", "up_proj")
    config = json.loads((tmp_path / "scaleless" / "config.json").read_text()) | {"reward_std": 0.0}
    (tmp_path / "scaleless" / "config.json").write_text(json.dumps(config))
    refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--reward", tmp_path / "scaleless")), "ppo", "reward_std")


def test_a_tokenizer_much_larger_than_the_model_is_refused(world, tmp_path, run_stage):
    tiny_lm(vocab_size=20).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / "small")
    refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--policy", tmp_path / "small")), "ppo", "the model embeds only 20", "do not belong together")


def test_an_output_that_is_a_file_is_refused_before_the_work(world, tmp_path, run_stage):
    (tmp_path / "file").write_text("")
    refused(run_stage(sft, "--data", world / "sft.jsonl", "--output", tmp_path / "file"), "sft", "--output", "is a file")
    refused(run_stage(sft, "--data", world / "sft.jsonl", "--output", tmp_path / "file" / "out"), "sft", "--output", "can't be written")
    refused(run_stage(ppo, *ppo_flags(world, tmp_path / "file")), "ppo", "is a file")
