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
OOM = {  # {phase: (where memory runs out in a run of ppo.py, STEP:N, step 0 before the loop; what helps)}
    "loading": ("0:5", "smaller model"), "evaluation": ("0:30", "--microbatch-size"),
    "rollout": ("2:3", "--batch-size"), "log-probabilities": ("1:20", "--microbatch-size"),
    "backward": ("1:40", "--microbatch-size"), "optimizer step": ("0:1", "--critic shared"), "checkpoint": ("1", ""),
}
# Micro-batches of 1, 2 and 4 rows take 0.80, 1.02 and 1.48 MB in ppo.py, of 1, 2, 4 and 8 rows 0.34, 0.41, 0.56 and
# 0.85 MB in sft.py, 0.27, 0.36, 0.54 and 0.90 MB in reward_model.py, weights included.
LIMITS = {  # {job: (stage, bytes of the device, micro-batch size)}
    "full": ("ppo", 1_100_000, 1),  # 2 rows would fit, with 93 % used
    "some": ("ppo", 1_600_000, 2),  # 4 rows would fit, with 93 % used
    "sft some": ("sft", 600_000, 2), "reward_model some": ("reward_model", 800_000, 4),
}
SEARCH = {  # {job: (where memory runs out in a run of ppo.py that chooses the size, words of the one line)}
    "at one row": ("backward@0:9", "a single row: give --gradient-checkpointing, --lora-rank or, in ppo.py, --critic"),
    "in the second pass": ("backward@0:700", "a single row: give"),
    "in the dry run's rollout": ("rollout@0:9", "out of memory (rollout): halve --batch-size"),
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


def jobs_of(world, files):
    """Returns {name: [the arguments of each run of a chain]}, for tests/pretend_cuda.py."""
    long = {"prompt": " ".join([PROMPTS[0]["prompt"]] * 4)}  # the dry run takes it
    write_rows(files / "eval.jsonl", [long, *PROMPTS[:3]])
    one = write_rows(files / "one.jsonl", PROMPTS[:1])
    never_ends(files / "endless", world)
    flags = {  # of runs of three steps that are saved after the second and the third
        "ppo": {
            "--policy": world / "sft", "--reward": world / "reward_model", "--prompts": world / "prompts.jsonl",
            "--eval-prompts": files / "eval.jsonl", "--iterations": 3, "--minibatch-size": MINIBATCH,
            "--ppo-epochs": 1, "--eval-every": 9, "--response-length": LENGTH,
        },
    }
    for stage, name in (("sft", "sft.jsonl"), ("reward_model", "pairs.jsonl")):
        eval_data = write_rows(files / name, read_rows(world / name)[::6])
        flags[stage] = {"--model": world / "sft", "--data": world / name, "--eval-data": eval_data, "--epochs": 1}

    def run(pretending, stage, output, changes):
        """Returns the arguments of one run: of the pretending, then of the stage."""
        all_flags = {"--batch-size": BATCH, "--microbatch-size": MICRO_BATCH, "--lr": 1e-3, "--save-every": 2}
        all_flags |= flags[stage] | {"--output": files / output} | changes
        words = [str(word) for flag in all_flags.items() if flag[1] is not None for word in flag]
        return [*pretending, f"{stage}.py", *words]

    jobs, cuda, second = {}, {"--device": "cuda"}, {"--device": "cuda:1", "--dtype": "float32"}
    for stage in STAGES:
        fail = ["--devices", "2", "--fail", "rollout@3" if stage == "ppo" else "backward@3"]
        resume = [f"{stage}.py", "--resume", "--output"]
        jobs[stage] = [
            run([], stage, f"{stage}_cpu", {"--device": "cpu", "--dtype": "float32"}),
            run(["--devices", "2", "--deterministic"], stage, f"{stage}_whole", second),
            run(fail, stage, f"{stage}_parts", second),
            ["--devices", "3", *resume, str(files / f"{stage}_parts")],
        ]
        if stage == "ppo":
            jobs[stage].append(run(fail, stage, "ppo_moved", second))
            jobs[stage].append([*resume, str(files / "ppo_moved"), "--device", "cpu"])
    for phase, (where, _) in OOM.items():
        changes = cuda | {"--iterations": 2 if phase == "rollout" else 1}
        jobs[phase] = [run(["--fail", f"{phase}@{where}"], "ppo", phase, changes)]
    jobs["sft step"] = [run(["--fail", "optimizer step@1:2"], "sft", "sft step", cuda)]
    changes = cuda | {"--policy": files / "endless", "--prompts": one, "--eval-prompts": one}
    jobs["endless"] = [run([], "ppo", "endless_out", changes)]
    cuda |= {"--dtype": "float32"}  # as the sizes in LIMITS
    unset = cuda | {"--microbatch-size": None}
    for name, (stage, memory, size) in LIMITS.items():
        more = {"--iterations": 2 if name == "some" else 1, "--save-every": 1} if stage == "ppo" else {}
        if name.endswith("some"):
            jobs[f"{name}, given"] = [run([], stage, f"{name}, given", cuda | more | {"--microbatch-size": size})]
        jobs[name] = [run(["--memory", str(memory)], stage, name, unset | more)]
    jobs["some"][0][:0] = ["--fail", "rollout@2"]
    resume = ["ppo.py", "--resume", "--output", str(files / "some")]
    jobs["some"] += [resume, [*resume, "--iterations", "3", "--microbatch-size", "1"]]
    for name, (where, _) in SEARCH.items():
        jobs[name] = [run(["--fail", where, "--memory", "9000000"], "ppo", name, unset)]
    jobs["at two rows"] = [run(["--fail", "backward@0:1700", "--memory", "9000000"], "ppo", "at two rows", unset)]
    return jobs


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """(the folder of all outputs, {name: [what each run of a chain printed and its report]})."""
    if not shutil.which("g++") or torch.version.cuda or torch.version.hip:
        pytest.skip("pretending needs g++ and a torch without CUDA")
    files = tmp_path_factory.mktemp("pretended")
    (files / "jobs.json").write_text(json.dumps(jobs_of(world, files)))
    command = [sys.executable, "tests/pretend_cuda.py", files / "jobs.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
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
@pytest.mark.parametrize("stage, run, output", [
    *((stage, 1, f"{stage}_whole") for stage in STAGES), ("ppo", 5, "ppo_moved"),
])
def test_a_run_on_cuda_in_float32_equals_one_on_the_cpu_or_one_that_moves_there(stage, run, output, done):
    files, runs = done  # all draw the same random numbers; by deterministic algorithms alone
    succeeded(runs[stage][run])
    rows, found = (read_rows(files / name / "metrics.jsonl") for name in (f"{stage}_cpu", output))
    assert len(rows) == (5 if stage == "ppo" else 4) and near(rows, found), (rows, found)
    if stage == "ppo":
        samples = [read_rows(files / name / "samples.jsonl") for name in ("ppo_cpu", output)]
        texts = [[row["response"] for row in rows] for rows in samples]
        assert texts[0] == texts[1] and len({*texts[0]}) > 4
    if stage == "sft":
        drawn = [re.findall(r"    ->(.*)", each["out"]) for each in runs["sft"][:2]]
        assert drawn[0] == drawn[1] and len(drawn[0]) == 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_uses_its_own_device_alone_without_float64_and_random_numbers_of_it(stage, done):
    cpu, cuda = (succeeded(run) for run in done[1][stage][:2])
    assert not cpu["peak"] and cuda["peak"]["cuda:1"] > 0 and cuda["peak"].get("cuda:0", 0) == 0
    assert cuda["float64"] == [] and cuda["draws"] == []  # mps has no float64


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
    folder, [run] = done[0] / name, done[1][name]
    stage, phase = ("sft", "optimizer step") if name == "sft step" else ("ppo", name)
    assert run["status"] == 2 and "Traceback" not in run["err"], run["err"][-2000:]
    line = run["err"].strip().splitlines()[-1]
    assert line.startswith(f"{stage}.py: error: out of memory ({phase}): "), line
    advice = line.split("): ")[1].split("; CUDA")[0]
    assert OOM[phase][1] in advice and (phase != "optimizer step" or "batch-size" not in advice), advice
    assert not list(folder.rglob("*.partial")) and not list(folder.glob("checkpoint-*"))
    assert not (folder / "run.lock").exists()
    for path in folder.glob("*.jsonl"):
        assert path.read_text() == "" or read_rows(path)


def test_whatever_says_that_there_is_no_memory_left_is_understood():
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be", "cuDNN error: ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    ):
        assert common.is_out_of_memory(RuntimeError(text)), text
    assert common.is_out_of_memory(torch.OutOfMemoryError("x")) and common.is_out_of_memory(MemoryError())
    assert not common.is_out_of_memory(RuntimeError("shape mismatch"))


def peak(report, device):
    """Returns the most bytes in the phases of the dry run, and those in the loop."""
    most = {True: 0, False: 0}
    for index, phase, step, size in report["peaks"]:
        if index == device and phase != "loading":
            most[step == 0] = max(most[step == 0], size)
    return most[True], most[False]


def test_the_dry_run_takes_what_the_largest_real_batch_takes(done):
    tried, real = peak(succeeded(done[1]["endless"][0]), 0)
    assert 0.9 * real <= tried <= 1.05 * real, (tried, real)


def test_peak_memory_in_the_metrics_is_that_of_the_run_and_not_of_its_dry_run(done):
    tried, real = peak(succeeded(done[1]["ppo"][1]), 1)  # only its held-out prompts are long
    rows = [row for row in read_rows(done[0] / "ppo_whole" / "metrics.jsonl") if "split" not in row]
    assert rows[-1]["peak_memory_gb"] * 1e9 == pytest.approx(real, rel=1e-6) and real < 0.9 * tried


# === The micro-batch size that the dry run chooses ================================================
def dry_run_peak(run):
    """Returns the most bytes of the passes that try sizes."""
    [size] = [row[3] for row in succeeded(run)["peaks"] if row[1:3] == ["backward", 0]]
    return size


def sizes_in(text):
    return [int(size) for size in re.findall(r"^  micro-batch size (\d+), chosen by the dry run", text, re.M)]


@pytest.mark.parametrize("name", LIMITS)
def test_the_largest_micro_batch_is_chosen_that_leaves_15_percent_of_the_memory_free(name, done):
    _, memory, size = LIMITS[name]
    run = done[1][name][0]
    assert sizes_in(run["out"]) == [size]
    most = max(row[3] for row in run["report"]["peaks"] if row[2] > 0)  # of the training that followed
    assert most <= memory and (name == "some" or succeeded(run))


@pytest.mark.parametrize("name", ["some", "sft some", "reward_model some"])
def test_a_chosen_size_learns_bit_for_bit_what_it_learns_when_given_and_is_kept_by_a_resumed_run(name, done):
    files, runs = done
    used = dry_run_peak(runs[f"{name}, given"][0]) / LIMITS[name][1]
    assert 0.6 < used < 0.85, "the numbers beside LIMITS are out of date"
    if name == "some":
        assert runs[name][0]["status"] == 2 and runs[name][0]["err"].count("resumed") == 0
        assert "resumed after 1 iterations" in runs[name][1]["out"] and not sizes_in(runs[name][1]["out"])
        assert dry_run_peak(runs[name][1]) == dry_run_peak(runs[f"{name}, given"][0])
        assert dry_run_peak(runs[name][2]) < dry_run_peak(runs[name][1])  # another one is given
        state = torch.load(files / name / "state.pt", weights_only=True)
        assert state["kept"]["microbatch_size"] == 2
    rows, given = (read_rows(files / folder / "metrics.jsonl") for folder in (name, f"{name}, given"))
    rows = [row for row in rows if row["iteration"] < 3 or name != "some"]  # of ppo.py a third was added
    assert len(rows) > 2
    for row, other in zip(rows, given):
        assert {key: row[key] for key in row.keys() - TIMES} == {key: other[key] for key in other.keys() - TIMES}
    args = json.loads((files / name / "args.json").read_text())
    assert args["microbatch_size"] == (1 if name == "some" else None)  # what the user gave


@pytest.mark.parametrize("name", SEARCH)
def test_memory_that_runs_out_in_the_search_is_one_line(name, done):
    [run] = done[1][name]
    assert run["status"] == 2 and "Traceback" not in run["err"], run["err"][-2000:]
    line = run["err"].strip().splitlines()[-1]
    assert line.startswith("ppo.py: error: out of memory") and SEARCH[name][1] in line, line


def test_memory_that_runs_out_at_two_rows_leaves_one_row_and_a_run_like_any_other(done):
    run = done[1]["at two rows"][0]
    assert sizes_in(run["out"]) == [1] and succeeded(run)


# === Waits ========================================================================================
def test_the_host_waits_seldom_for_the_device(done):
    num_parts, num_steps = BATCH // MICRO_BATCH, BATCH // MINIBATCH
    allowed = {
        "rollout": PER_TOKEN * LENGTH + PER_ROLLOUT,  # no response ends early
        "score": PER_PART * num_parts,
        "log-probabilities": 3 * PER_PART * num_parts,  # policy, critic and reference
        "backward": PER_MICRO_BATCH * num_steps * MINIBATCH // MICRO_BATCH,
        "optimizer step": PER_OPTIMIZER_STEP * num_steps,
        "evaluation": PER_ITERATION,
    }
    waits = [row for row in succeeded(done[1]["endless"][0])["waits"] if row[2] == 2]  # of the second iteration
    for phase, most in allowed.items():
        found = [row[4] for row in waits if row[1] == phase]
        assert 0 < sum(found) <= most, (phase, sum(found), most, waits)
