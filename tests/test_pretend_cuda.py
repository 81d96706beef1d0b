"""The stages on pretended CUDA devices: devices, memory, random numbers, errors, waits of the host.

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
import safetensors.torch
import torch
from conftest import PROMPTS, ROOT, read_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from plumbing import cli

# Ceilings on how often the host waits for the device, without evaluations and checkpoints.
PER_TOKEN = 1.25  # sampled, of all rows at once: in its attention mask; every fourth, which rows are open
PER_ROLLOUT = 18  # prompts to the device, responses to the host, texts
PER_PART = 6  # of score or log-probabilities, a --microbatch-size at a time, per model that reads it
PER_MICRO_BATCH = 7  # of the update: 2 in attention masks of each model, 2 of what counts, its rows
PER_OPTIMIZER_STEP = 6  # the clock (2), the gradients' norms
PER_ITERATION = 24  # what is left: the clock, metrics

STAGES = ("sft", "reward_model", "ppo")
TIMES = {"seconds_rollout", "seconds_score", "seconds_update", "tokens_per_second", "peak_memory_gb"}
BATCH, MINIBATCH, MICRO_BATCH, LENGTH = 8, 4, 2, 8  # of the runs of ppo.py
ADVICE = {  # phase: what its advice must name, and must not
    "loading": ("smaller model", "batch-size"),
    "rollout": ("--batch-size", "--microbatch-size"),
    "score": ("--microbatch-size", "--batch-size"),
    "log-probabilities": ("--microbatch-size", "--batch-size"),
    "backward": ("--microbatch-size", "--batch-size"),
    "optimizer step": ("--critic shared", "batch-size"),
    "evaluation": ("--batch-size", "--gradient"),
    "checkpoint": ("smaller model", "batch-size"),
}
TEXTS = {  # how CUDA says that there is no memory left
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuda": getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nCUDA kernel errors might be"),
    "cuda, an older torch": RuntimeError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
}
OOM = {  # name: (where, how), each an end of a run of ppo.py; before the first iteration is @0
    "loading": ("loading@0:5", "memory"),
    "rollout": ("rollout@2:3", "memory"),  # an iteration is done, and saved by then
    "score": ("score@0", "memory"),
    "log-probabilities": ("log-probabilities@0:20", "memory"),
    "backward": ("backward@1:40", "memory"),
    "optimizer step": ("optimizer step@1", "memory"),
    "evaluation": ("evaluation@0:30", "memory"),
    "checkpoint": ("checkpoint@1", "memory"),
    "loading, cublas": ("prove", "cublas"),
    "rollout, cuda": ("rollout@0", "cuda"),
    "backward, cudnn": ("backward@0:50", "cudnn"),
    "optimizer step, in the rehearsal": ("_init_group", "memory"),
}


def never_ends(folder, world):
    """A copy of the SFT policy in whose every response the EOS has probability 0."""
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
    """A run of three steps that is saved after the second and the third."""
    data = lambda name: ["--data", world / name, "--eval-data", files / name, "--epochs", 1]
    flags = {
        "sft": ["--model", world / "sft", *data("sft.jsonl")],
        "reward_model": ["--model", world / "sft", *data("pairs.jsonl")],
        "ppo": ["--reward", world / "reward_model", "--iterations", 3, "--minibatch-size", MINIBATCH,
                "--ppo-epochs", 1, "--response-length", LENGTH, "--eval-every", 9],
    }[stage]
    return [*flags, "--batch-size", BATCH, "--microbatch-size", MICRO_BATCH, "--lr", 1e-3, "--save-every", 2]


def jobs_of(world, files):
    """{name: [the arguments of each run of a chain]}, for tests/pretend_cuda.py."""
    long = {"prompt": " ".join([PROMPTS[0]["prompt"]] * 4)}
    prompts = {
        "--prompts": world / "prompts.jsonl",
        "--eval-prompts": write_rows(files / "eval.jsonl", [long, *PROMPTS[:3]]),  # rehearsed too
    }
    one_prompt = dict.fromkeys(prompts, write_rows(files / "one.jsonl", PROMPTS[:1]))
    for name in ("sft.jsonl", "pairs.jsonl"):
        write_rows(files / name, read_rows(world / name)[::6])
    never_ends(files / "endless", world)

    def run(stage, output, *more, policy=world / "sft", prompts=prompts, new=True, **options):
        """The arguments of one run: of the pretending, then of the stage."""
        named = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
        words = [word for word in sum(named, ()) if word is not True] + [f"{stage}.py"]
        words += flags_of(stage, world, files) if new else ["--resume"]
        if new and stage == "ppo":
            words += ["--policy", policy, *sum(prompts.items(), ())]
        return [*map(str, [*words, "--output", files / output, *more])]

    jobs, one, cuda, cuda_1 = {}, ("--iterations", 1), ("--device", "cuda"), ("--device", "cuda:1")
    options = dict(one_generator=True, deterministic=True)
    for stage in STAGES:
        jobs[f"{stage} float32"] = [
            run(stage, f"{stage}_cpu", "--device", "cpu"),
            run(stage, f"{stage}_cuda", *cuda, "--dtype", "float32", **options),
        ]
        where = "rollout@3" if stage == "ppo" else "backward@3"
        jobs[f"{stage} resumed"] = [
            run(stage, f"{stage}_whole", *cuda_1, devices=2),
            run(stage, f"{stage}_parts", *cuda_1, devices=2, fail=where),
            run(stage, f"{stage}_parts", new=False, devices=3),
        ]
    jobs["ppo float32"] += [
        run("ppo", "ppo_cuda", "--device", "cpu", "--iterations", 4, new=False),
        run("ppo", "ppo_cpu", *cuda, "--iterations", 4, new=False),
    ]
    for name, (where, how) in OOM.items():
        some = [*cuda, "--iterations", 2 if name == "rollout" else 1]
        jobs[f"out of memory: {name}"] = [run("ppo", name, *some, fail=where, how=how)]
    jobs["out of memory: sft"] = [run("sft", "sft_oom", *cuda, fail="_init_group")]
    jobs["assert"] = [run("ppo", "assert", *cuda, *one, fail="rollout@1:20", how="assert")]
    jobs["endless"] = [run("ppo", "endless_out", *cuda, policy=files / "endless", prompts=one_prompt)]
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
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return files, json.loads(ended.stdout)


def succeeded(run):
    assert run["status"] == 0, run["err"][-2000:]
    return run["report"]


def contents(folder):
    """What two equal runs have in common: all weights, and the logs without times."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    for path in (folder / "metrics.jsonl", folder / "samples.jsonl"):
        if path.exists():
            found[path.name] = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(path)]
    return found


def near(a, b):
    """Are two rows of metrics the same up to rounding?"""
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(near, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a if key not in TIMES)
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) if isinstance(a, float) else a == b


def times(report, kind, phase=None, step=None):
    """How often something is counted in a phase and step of a run; all of them if not given."""
    return sum(
        row["times"] for row in report[kind]
        if phase in (None, row["phase"]) and step in (None, row["step"])
    )


# === Devices ======================================================================================
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_on_cuda_in_float32_equals_one_on_the_cpu_that_draws_the_same_numbers(stage, done):
    files, runs = done  # and by deterministic algorithms alone
    cpu, cuda = runs[f"{stage} float32"][:2]
    assert not succeeded(cpu)["peak"] and succeeded(cuda)["peak"]["cuda:0"] > 0
    rows = [read_rows(files / f"{stage}_{device}" / "metrics.jsonl") for device in ("cpu", "cuda")]
    rows = [[row for row in some if row["iteration"] <= 3] for some in rows]
    assert len(rows[0]) >= 4 and near(*rows), rows
    if stage == "ppo":  # two evaluations of four rows
        texts = [[row["response"] for row in read_rows(files / f"ppo_{device}" / "samples.jsonl")][:8]
                 for device in ("cpu", "cuda")]
        assert texts[0] == texts[1] and len({*texts[0]}) > 4
    if stage == "sft":
        drawn = [re.findall(r"    ->(.*)", run["out"]) for run in (cpu, cuda)]
        assert drawn[0] == drawn[1] and len(drawn[0]) == 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_on_the_cpu_starts_no_cuda_and_asks_it_nothing(stage, done):
    report = succeeded(done[1][f"{stage} float32"][0])
    assert {name for name, *_ in report["calls"]} <= {"is_initialized"}, report["calls"]
    if report["started"]:  # optimizers of torch 2.13 ask for the current stream
        file, line = report["started"].split()[0].split(":")
        assert "optimizer.step()" in (ROOT / file).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_on_the_second_gpu_allocates_nothing_on_the_first(stage, done):
    peak = succeeded(done[1][f"{stage} resumed"][0])["peak"]
    assert peak["cuda:1"] > 0 and peak.get("cuda:0", 0) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_no_number_on_the_device_is_float64_which_mps_does_not_have(stage, done):
    report = succeeded(done[1][f"{stage} resumed"][0])
    assert {(row["what"], row["at"]) for row in report["float64"]} == set()


def test_mps_is_tried_like_any_device():
    with pytest.raises(common.UserError, match="--device mps can't be used: .*(?i:mps)"):
        cli.pick_device("mps")


# === Resume =======================================================================================
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_on_cuda_that_stops_and_resumes_equals_one_that_does_not_bit_for_bit(stage, done):
    files, runs = done  # with one GPU more, since the other GPUs are none of its business
    whole, stopped, resumed = runs[f"{stage} resumed"]
    succeeded(whole)
    assert stopped["status"] == 2 and "out of memory" in stopped["err"], stopped["err"]
    succeeded(resumed)
    assert "resumed after 2 iterations" in resumed["out"]
    one, other = contents(files / f"{stage}_whole"), contents(files / f"{stage}_parts")
    assert one["metrics.jsonl"] == other["metrics.jsonl"] and len(one) > 1 and one == other


def test_the_random_states_of_the_cpu_and_of_the_runs_own_gpu_are_kept_and_no_others(done):
    files, runs = done
    succeeded(runs["ppo resumed"][0])
    state = torch.load(files / "ppo_whole" / "trainer_state" / "state.pt", weights_only=True)
    del state["optimizer"]
    leaves, found = [state], []
    for each in leaves:  # it grows
        leaves += each.values() if isinstance(each, dict) else each if isinstance(each, (list, tuple)) else []
        found += [each] if isinstance(each, torch.Tensor) and each.dtype == torch.uint8 else []
    assert len(found) == 2 and not torch.equal(*found)


@pytest.mark.parametrize("run, where", [(2, "on the CPU after a run on CUDA"), (3, "on CUDA after one on the CPU")])
def test_random_numbers_that_cant_be_put_back_are_spoken_of(run, where, done):
    resumed = done[1]["ppo float32"][run]
    succeeded(resumed)
    assert "resumed after 3 iterations" in resumed["out"]
    assert re.search("random", resumed["out"] + resumed["err"]), where


# === Errors =======================================================================================
def error_line(run, script="ppo.py"):
    """The one line of a run that ended with an error of the user's."""
    last = run["err"].strip().splitlines()[-1]
    assert run["status"] == 2 and "Traceback" not in run["err"], run["err"][-2000:]
    assert last.startswith(f"{script}: error: "), last
    return last


@pytest.mark.parametrize("name", OOM)
def test_memory_that_runs_out_is_one_line_with_the_phase_and_what_helps_there(name, done):
    files, runs = done
    phase = name.split(",")[0]
    line = error_line(*runs[f"out of memory: {name}"])
    assert f"out of memory ({phase}, " in line
    assert ("in iteration" in line) == bool(re.search("@[12]", OOM[name][0])), line
    advice = re.split("; now |; CUDA|; cuDNN", line.split("): ")[1])[0]
    wanted, unwanted = ADVICE[phase]
    assert wanted in advice and unwanted not in advice, advice
    assert ("1 iterations are saved" in line) == (name == "rollout"), line


@pytest.mark.parametrize("name", OOM)
def test_memory_that_runs_out_leaves_nothing_half_written(name, done):
    folder = done[0] / name
    assert not list(done[0].glob("*.lock")) and not list(folder.rglob("*.partial"))
    saved = [path.name for path in folder.glob("checkpoint-*")]
    assert saved == (["checkpoint-1"] if name == "rollout" else [])
    for path in folder.rglob("*.safetensors"):
        assert safetensors.torch.load_file(path)
    for path in folder.glob("*.jsonl"):
        assert path.read_text() == "" or read_rows(path)


def test_memory_that_runs_out_in_the_optimizers_first_step_is_not_blamed_on_the_micro_batch(done):
    line = error_line(*done[1]["out of memory: sft"], script="sft.py")
    assert "out of memory (optimizer step, in iteration 1)" in line
    assert "batch-size" not in line.split("): ")[1].split("; now ")[0]


@pytest.mark.parametrize("text", TEXTS)
def test_whatever_cuda_says_when_it_has_no_memory_is_understood(text, capsys):
    for phase in ADVICE:
        with pytest.raises(SystemExit) as stop, cli.command_line():
            cli.now_in.update(phase=phase, step=3, cfg=None)
            raise TEXTS[text]
        line = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and "\n" not in line
        assert f"out of memory ({phase}, in iteration 3)" in line and ADVICE[phase][0] in line


def test_an_index_out_of_range_on_the_device_is_told_as_what_it_is(done):
    line = error_line(*done[1]["assert"])
    assert "finite" not in line and "memory" not in line
    assert re.search("index|out of range", line)


# === Waits ========================================================================================
def test_the_host_waits_seldom_for_the_device(done):
    report = succeeded(done[1]["endless"][0])
    waited = lambda *phases: sum(times(report, "waits", phase, 2) for phase in phases)
    num_tokens = LENGTH  # nothing ends; and nothing is drawn on the device
    assert times(report, "draws", "rollout", 2) == 0
    num_parts, num_steps = BATCH // MICRO_BATCH, BATCH // MINIBATCH
    num_micro = num_steps * MINIBATCH // MICRO_BATCH
    allowed = {
        ("rollout",): PER_TOKEN * num_tokens + PER_ROLLOUT,
        ("score",): PER_PART * num_parts,
        ("log-probabilities",): 3 * PER_PART * num_parts,  # policy, critic and reference
        ("backward", "optimizer step"): PER_MICRO_BATCH * num_micro + PER_OPTIMIZER_STEP * num_steps,
    }
    found = {phases: waited(*phases) for phases in allowed}
    lines = sorted((row for row in report["waits"] if row["step"] == 2), key=lambda row: -row["times"])
    assert all(found[phases] <= allowed[phases] for phases in allowed), (found, allowed, lines[:20])
    rest = times(report, "waits", None, 2) - sum(found.values()) - waited("checkpoint")
    assert rest <= PER_ITERATION, lines


# === Memory =======================================================================================
def peak(report, device, is_counted):
    return max(row["bytes"] for row in report["peaks"] if row["device"] == device and is_counted(row))


is_rehearsal = lambda row: row["step"] == 0 and row["phase"] not in ("loading", "evaluation")


def test_the_rehearsal_takes_what_the_largest_real_batch_takes(done):
    report = succeeded(done[1]["endless"][0])
    rehearsed, real = peak(report, 0, is_rehearsal), peak(report, 0, lambda row: row["step"] > 0)
    assert 0.9 * real <= rehearsed <= 1.05 * real, (rehearsed, real)


def test_peak_memory_in_the_metrics_is_that_of_the_run_and_not_of_its_rehearsal(done):
    files, runs = done
    report = succeeded(runs["ppo resumed"][0])  # only its held-out prompts are long
    logged = [row for row in read_rows(files / "ppo_whole" / "metrics.jsonl") if "split" not in row][-1]
    real = peak(report, 1, lambda row: row["step"] > 0)
    assert logged["peak_memory_gb"] * 1e9 == pytest.approx(real, rel=1e-6)
    assert real < 0.9 * peak(report, 1, is_rehearsal)
