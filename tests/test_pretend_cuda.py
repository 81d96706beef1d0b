"""The stages on pretended CUDA devices: devices, memory, resume, errors, waits of the host.

tests/pretend_cuda.py says what it shows and what only a real GPU can. All runs are made at once, in
two processes; the tests look at what they left. Nothing here needs a GPU.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import PROMPTS, ROOT, read_rows, write_rows
from test_resume import STAGES, TIMES, contents
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import harness

# Ceilings on how often the host waits for the device, without evaluations and checkpoints.
PER_TOKEN = 1.25  # sampled, of all rows at once: its attention mask; every fourth, who is open
PER_ROLLOUT = 18  # prompts and uniform numbers to the device, responses to the host, texts
PER_PART = 6  # of score or log-probabilities, a --microbatch-size at a time, per model that reads
PER_MICRO_BATCH = 7  # of the update: 2 in attention masks of each model, 2 of what counts, its rows
PER_OPTIMIZER_STEP = 6  # the clock (2), the gradients' norms
PER_ITERATION = 24  # what is left: the clock, metrics

BATCH, MINIBATCH, MICRO_BATCH, LENGTH = 8, 4, 2, 8  # of the runs of ppo.py
OOM = {  # {phase: (where memory runs out in a run of ppo.py, PHASE@STEP:N; what helps)}
    "loading": ("loading@0:5", "smaller model"),
    "evaluation": ("evaluation@0:30", "--microbatch-size"),  # step 0: in the dry run
    "rollout": ("rollout@2:3", "--batch-size"),
    "log-probabilities": ("log-probabilities@1:20", "--microbatch-size"),
    "backward": ("backward@1:40", "--microbatch-size"),
    "optimizer step": ("_init_group", "--critic shared"),
    "checkpoint": ("checkpoint@1", ""),
}


def never_ends(folder, world):
    """Saves a copy of the SFT policy in whose every response the EOS has probability 0."""
    model = AutoModelForCausalLM.from_pretrained(world / "sft")
    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    with torch.no_grad():  # dimension 0 is 1 before every layer and nothing writes to it
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -1e3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def flags_of(stage, world, files):
    """Returns the flags of a run of three steps that is saved after the second and the third."""
    flags = ["--batch-size", BATCH, "--microbatch-size", MICRO_BATCH, "--lr", 1e-3]
    flags += ["--save-every", 2]
    if stage == "ppo":
        flags += ["--policy", world / "sft", "--reward", world / "reward_model", "--ppo-epochs", 1]
        flags += ["--prompts", world / "prompts.jsonl", "--eval-prompts", files / "eval.jsonl"]
        flags += ["--iterations", 3, "--minibatch-size", MINIBATCH, "--eval-every", 9]
        return [*flags, "--response-length", LENGTH]
    name = "sft.jsonl" if stage == "sft" else "pairs.jsonl"
    flags += ["--model", world / "sft", "--data", world / name, "--epochs", 1]
    return [*flags, "--eval-data", write_rows(files / name, read_rows(world / name)[::6])]


def jobs_of(world, files):
    """Returns {name: [the arguments of each run of a chain]}, for tests/pretend_cuda.py."""
    long = {"prompt": " ".join([PROMPTS[0]["prompt"]] * 4)}  # the dry run takes it
    write_rows(files / "eval.jsonl", [long, *PROMPTS[:3]])
    write_rows(files / "one.jsonl", PROMPTS[:1])
    never_ends(files / "endless", world)

    def run(pretending, stage, output, more, is_new=True):
        """Returns the arguments of one run: of the pretending, then of the stage."""
        words = [*pretending.split(), f"{stage}.py", "--output", files / output, *more.split()]
        flags = flags_of(stage, world, files) if is_new else []
        for flag, value in zip(flags[::2], flags[1::2]):
            words += [flag, value] if flag not in more.split() else []
        return [str(word) for word in words] + ([] if is_new else ["--resume"])

    jobs, on_second = {}, "--device cuda:1 --dtype float32"
    for stage in STAGES:
        fail = f"--devices 2 --fail {'rollout@3' if stage == 'ppo' else 'backward@3'}"
        jobs[stage] = [
            run("", stage, f"{stage}_cpu", "--device cpu --dtype float32"),
            run("--devices 2 --deterministic", stage, f"{stage}_whole", on_second),
            run(fail, stage, f"{stage}_parts", on_second),
            run("--devices 3", stage, f"{stage}_parts", "", is_new=False),
        ]
    jobs["ppo"] += [
        run("--devices 2 --fail rollout@3", "ppo", "ppo_moved", on_second),
        run("", "ppo", "ppo_moved", "--device cpu", is_new=False),
    ]
    for phase, (where, _) in OOM.items():
        more = f"--device cuda --iterations {2 if phase == 'rollout' else 1}"
        jobs[phase] = [run(f"--fail {where}", "ppo", phase, more)]
    jobs["sft step"] = [run("--fail _init_group", "sft", "sft step", "--device cuda")]
    one = files / "one.jsonl"
    more = f"--device cuda --policy {files / 'endless'} --prompts {one} --eval-prompts {one}"
    jobs["endless"] = [run("", "ppo", "endless_out", more)]
    return jobs


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """(the folder of all outputs, {name: [what each run of a chain printed and its report]})."""
    if not shutil.which("g++") or torch.version.cuda or torch.version.hip:
        pytest.skip("pretending needs g++ and a torch without CUDA")
    files = tmp_path_factory.mktemp("pretended")
    (files / "jobs.json").write_text(json.dumps(jobs_of(world, files)))
    command = [sys.executable, "tests/pretend_cuda.py", "--jobs", files / "jobs.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    return files, json.loads(ended.stdout)


def succeeded(run):
    assert run["status"] == 0, run["err"][-2000:]
    return run["report"]


def near(a, b):
    """Returns whether two rows of metrics are the same up to rounding."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a if key not in TIMES)
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) if isinstance(a, float) else a == b


# === Devices ======================================================================================
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_on_cuda_in_float32_equals_one_on_the_cpu_or_one_that_moves_there(stage, done):
    files, runs = done  # all draw the same random numbers; by deterministic algorithms alone
    others = ["whole", "moved"] if stage == "ppo" else ["whole"]
    rows = read_rows(files / f"{stage}_cpu" / "metrics.jsonl")
    for run, other in zip([runs[stage][1], runs[stage][-1]], others):
        succeeded(run)
        found = read_rows(files / f"{stage}_{other}" / "metrics.jsonl")
        assert len(rows) == (5 if stage == "ppo" else 4) and near(rows, found), (rows, found)
        if stage == "ppo":
            names = [files / f"ppo_{x}" / "samples.jsonl" for x in ("cpu", other)]
            texts = [[row["response"] for row in read_rows(name)] for name in names]
            assert texts[0] == texts[1] and len({*texts[0]}) > 4
    if stage == "sft":
        drawn = [re.findall(r"    ->(.*)", run["out"]) for run in runs["sft"][:2]]
        assert drawn[0] == drawn[1] and len(drawn[0]) == 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_uses_its_own_device_alone_without_float64_and_random_numbers_of_it(stage, done):
    cpu, cuda = (succeeded(run) for run in done[1][stage][:2])
    assert cuda["peak"]["cuda:1"] > 0 and cuda["peak"].get("cuda:0", 0) == 0
    assert cuda["float64"] == [] and cuda["draws"] == []  # mps has no float64
    assert not cpu["peak"] and {name for name, *_ in cpu["calls"]} <= {"is_initialized"}
    if cpu["started"]:  # optimizers of torch 2.13 ask for the current stream
        file, line = cpu["started"].split()[0].split(":")
        assert "optimizer.step()" in (ROOT / file).read_text().splitlines()[int(line) - 1]


def test_mps_is_tried_like_any_device():
    with pytest.raises(common.UserError, match="--device mps can't be used: .*(?i:mps)"):
        harness.pick_device("mps")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_on_cuda_that_stops_and_resumes_equals_one_that_does_not_bit_for_bit(stage, done):
    files, runs = done  # with one GPU more, since the other GPUs are none of its business
    whole, stopped, resumed = runs[stage][1:4]
    succeeded(whole)
    assert stopped["status"] == 2 and "out of memory" in stopped["err"], stopped["err"]
    succeeded(resumed)
    assert "resumed after 2 iterations" in resumed["out"]
    assert contents(files / f"{stage}_whole") == contents(files / f"{stage}_parts")


# === Memory =======================================================================================
@pytest.mark.parametrize("name", [*OOM, "sft step"])
def test_memory_that_runs_out_is_one_line_and_leaves_nothing_half_written(name, done):
    files, [run] = done[0], done[1][name]
    line = run["err"].strip().splitlines()[-1]
    stage, phase = ("sft", "optimizer step") if name == "sft step" else ("ppo", name)
    remedy = OOM[phase][1]
    assert run["status"] == 2 and "Traceback" not in run["err"], run["err"][-2000:]
    assert line.startswith(f"{stage}.py: error: out of memory ({phase}): "), line
    advice = line.split("): ")[1].split("; CUDA")[0]
    assert remedy in advice and (phase != "optimizer step" or "batch-size" not in advice), advice
    folder = files / name
    assert not list(folder.rglob("*.partial")) and not (folder / "run.lock").exists()
    assert not list(folder.glob("checkpoint-*"))
    for path in folder.glob("*.jsonl"):
        assert path.read_text() == "" or read_rows(path)


def test_whatever_says_that_there_is_no_memory_left_is_understood():
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be", "cuDNN error: ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    ):
        assert common.is_out_of_memory(RuntimeError(text)), text
    assert common.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert common.is_out_of_memory(MemoryError())
    assert not common.is_out_of_memory(RuntimeError("shape mismatch"))


def peak(report, device, is_dry_run):
    """Returns the most bytes in the phases of the dry run, or in the loop."""
    sizes = [0]
    for row in report["peaks"]:
        if row["device"] == device and (row["step"] == 0) == is_dry_run:
            sizes += [row["bytes"]] if row["phase"] != "loading" else []
    return max(sizes)


def test_the_dry_run_takes_what_the_largest_real_batch_takes(done):
    report = succeeded(done[1]["endless"][0])
    tried, real = peak(report, 0, True), peak(report, 0, False)
    assert 0.9 * real <= tried <= 1.05 * real, (tried, real)


def test_peak_memory_in_the_metrics_is_that_of_the_run_and_not_of_its_dry_run(done):
    files, runs = done
    report = succeeded(runs["ppo"][1])  # only its held-out prompts are long
    rows = [row for row in read_rows(files / "ppo_whole" / "metrics.jsonl") if "split" not in row]
    real = peak(report, 1, False)
    assert rows[-1]["peak_memory_gb"] * 1e9 == pytest.approx(real, rel=1e-6)
    assert real < 0.9 * peak(report, 1, True)


# === Waits ========================================================================================
def test_the_host_waits_seldom_for_the_device(done):
    report = succeeded(done[1]["endless"][0])
    num_parts, num_steps = BATCH // MICRO_BATCH, BATCH // MINIBATCH
    num_micro = num_steps * MINIBATCH // MICRO_BATCH
    allowed = {
        "rollout": PER_TOKEN * LENGTH + PER_ROLLOUT,  # no response ends early
        "score": PER_PART * num_parts,
        "log-probabilities": 3 * PER_PART * num_parts,  # policy, critic and reference
        "backward": PER_MICRO_BATCH * num_micro,
        "optimizer step": PER_OPTIMIZER_STEP * num_steps,
    }
    found, lines = dict.fromkeys(allowed, 0) | {"checkpoint": 0, "evaluation": 0}, []
    for row in report["waits"]:
        if row["step"] == 2:
            found[row["phase"]] += row["times"]
            lines.append((row["times"], row["phase"], row["what"], row["at"]))
    for phase, most in allowed.items():
        assert 0 < found[phase] <= most, (phase, found, most, lines)
    assert found["evaluation"] <= PER_ITERATION, lines
