"""Runs that stop and continue: exact resume, signals, kills, locks, full disks, damaged states."""

import contextlib
import errno
import io
import json
import os
import pathlib
import shlex
import shutil
import signal
import sys

import filelock
import pytest
import safetensors.torch
import torch
from conftest import read_rows, tiny_scalar, write_rows
from test_cli import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import ppo
import reward_model
import sft

STAGES = {"sft": sft, "reward_model": reward_model, "ppo": ppo}
TIMES = {"seconds_rollout", "seconds_score", "seconds_update", "tokens_per_second", "peak_memory_gb"}


def flags_of(stage, world, *more):
    """Returns the flags of a run of six iterations that saves every second one."""
    data = world / {"sft": "sft.jsonl", "reward_model": "pairs.jsonl", "ppo": "prompts.jsonl"}[stage]
    flags = ["--model", world / "sft", "--data", data, "--eval-data", data, "--epochs", 2]
    if stage == "ppo":
        flags = ["--policy", world / "sft", "--reward", world / "reward_model", "--prompts", data]
        flags += ["--eval-prompts", data, "--iterations", 6, "--minibatch-size", 4, "--response-length", 6]
        flags += ["--kl-target", 3, "--eval-every", 3]
    return [*flags, "--batch-size", 8, "--lr", 1e-3, "--save-every", 2, "--device", "cpu", *more]


def contents(folder):
    """Returns what two equal runs have in common: all weights, and the logs without times."""
    folder, files = pathlib.Path(folder), {}
    for path in folder.rglob("*.safetensors"):
        files[str(path.relative_to(folder))] = path.read_bytes()
    for path in folder.glob("*.jsonl"):
        files[path.name] = [{k: row[k] for k in row if k not in TIMES} for row in read_rows(path)]
    assert len(files) > 1
    return files


def bytes_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def interrupted(module, iteration, action):
    """Within, action() is called in the middle of this iteration of a run. Yields a list of all calls."""
    clip, calls = module.clip_grad_norm_, []

    def wrapped(*arguments):
        calls.append(None)
        if len(calls) == (iteration - 1) * calls_per_step(module) + 1:
            action()
        return clip(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "clip_grad_norm_", wrapped)
        yield calls


def calls_per_step(module):
    return 16 if module is ppo else 1  # it clips two models in each of 8 optimizer steps


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def stopped(monkeypatch, run_stage, stage, output, flags, iteration=3):
    """Returns what a run prints that is asked to stop in an iteration."""
    with interrupted(STAGES[stage], iteration, stop):
        status, _, err = run_stage(STAGES[stage], *flags, "--output", output)
    assert status == 128 + signal.SIGTERM
    return err


def in_child(function, *arguments):
    """Returns the exit status of a process that calls a function; minus the signal that ends it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = function(*arguments)[0]
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


wholes = {}  # {(stage, more): folder}


@pytest.fixture
def whole(world, run_stage, tmp_path_factory):
    """whole(stage, *more) -> the folder of a run that was left alone; it must not be changed."""

    def run(stage, *more):
        if (stage, more) not in wholes:
            output = tmp_path_factory.mktemp("whole") / "out"
            assert run_stage(STAGES[stage], *flags_of(stage, world, *more, "--output", output))[0] == 0
            wholes[stage, more] = output
        return wholes[stage, more]

    return run


def assert_equal(output, expected):
    """Both runs learned and logged the same, and nothing else is left in or beside the folder."""
    assert contents(output)["metrics.jsonl"] == contents(expected)["metrics.jsonl"]
    assert contents(output) == contents(expected)
    assert sorted(os.listdir(output)) == sorted(os.listdir(expected))
    assert os.listdir(output.parent) == [output.name]


# === Stopping and resuming ========================================================================
@pytest.mark.parametrize("stage, more", [
    *((stage, ()) for stage in STAGES), ("ppo", ("--critic", "shared")),
    ("ppo", ("--advantage", "bandit", "--gradient-checkpointing")),
])
def test_a_run_that_stops_and_resumes_equals_one_that_does_not_bit_for_bit(
    stage, more, world, tmp_path, run_stage, monkeypatch, whole
):
    output = tmp_path / "parts"
    err = stopped(monkeypatch, run_stage, stage, output, flags_of(stage, world, *more))
    assert f"stopped; to go on: python {stage}.py --resume --output {output}" in err
    [checkpoint] = output.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3" and not (output / "config.json").exists()
    AutoTokenizer.from_pretrained(checkpoint)  # an ordinary folder
    status, out, err = run_stage(STAGES[stage], "--resume", "--output", output)  # as it was printed
    assert status == 0 and "resumed after 3 iterations" in out, err
    assert_equal(output, whole(stage, *more))
    if "shared" in more:
        head = safetensors.torch.load_file(output / "critic" / "value_head.safetensors")
        assert head["weight"].shape == (1, 16) and head["weight"].abs().max() > 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_neither_overwritten_nor_mixed_up_unasked(stage, world, tmp_path, run_stage, whole):
    module, output = STAGES[stage], tmp_path / "out"
    shutil.copytree(whole(stage), output)
    flags = flags_of(stage, world, "--output", output)
    refused(run_stage(module, *flags), stage, "holds a run", "--resume", "--overwrite")
    refused(run_stage(module, *flags, "--resume", "--overwrite"), stage, "--resume", "--overwrite")
    if stage == "ppo":  # the others keep no state, as they can't be extended
        result = run_stage(module, *flags, "--resume", "--lr", 5e-4)
        refused(result, stage, "--lr is 0.0005, but the run", "began with 0.001")
    status, out, _ = run_stage(module, *flags, "--resume")  # a job that is started again is done
    assert status == 0 and "is finished" in out
    assert ("a higher --iterations continues it" in out) == (stage == "ppo")
    assert_equal(output, whole(stage))
    assert run_stage(module, *flags, "--overwrite", "--seed", 1)[0] == 0
    assert contents(output) != contents(whole(stage))


def test_a_run_continues_by_the_printed_command_under_another_spelling_elsewhere_and_longer(
    world, tmp_path, run_stage, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    err = stopped(monkeypatch, run_stage, "ppo", "my run", flags_of("ppo", world))
    command = err[err.index("to go on: ") + 10 :].splitlines()[0]
    assert shlex.split(command) == ["python", "ppo.py", "--resume", "--output", "my run"]
    for number, spelling in enumerate(("./my run", tmp_path / "my run")):
        assert run_stage(ppo, "--resume", "--output", spelling, "--iterations", 6 + number)[0] == 0
    shutil.move("my run", "moved")
    assert run_stage(ppo, "--resume", "--output", "moved", "--iterations", 8)[0] == 0
    rows = [row for row in read_rows("moved/metrics.jsonl") if "split" not in row]
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert rows[7]["lr"] == pytest.approx(1e-3 * (1 - 7 / 8)) and rows[7]["policy_loss"] != 0
    assert rows[6]["lr"] == pytest.approx(1e-3 * (1 - 6 / 7))  # each by the schedule of its time


def test_the_scale_of_a_reward_model_is_not_measured_again(world, tmp_path, run_stage, monkeypatch):
    shutil.copytree(world / "reward_model", tmp_path / "rm")
    vocab_size = AutoModelForCausalLM.from_pretrained(world / "sft").config.vocab_size
    model = tiny_scalar(vocab_size=vocab_size, max_position_embeddings=128)
    del model.config.reward_mean, model.config.reward_std
    model.save_pretrained(tmp_path / "rm")
    flags = flags_of("ppo", world, "--reward", tmp_path / "rm")
    status, out, _ = run_stage(ppo, *flags, "--output", tmp_path / "whole")
    assert status == 0 and "become 0 and 1" in out
    stopped(monkeypatch, run_stage, "ppo", tmp_path / "parts", flags)
    status, out, _ = run_stage(ppo, "--resume", "--output", tmp_path / "parts")
    assert status == 0 and "become 0 and 1" not in out
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


# === Kills ========================================================================================
MOMENTS = {  # {moment: (audit event, end of the path, which of them, iterations that are saved)}
    "start": ("os.rename", "args.partial", 1, 0),
    "first metrics": ("open", "metrics.jsonl", 2, 0),
    "models": ("open", "checkpoint-4.partial/tokenizer_config.json", 1, 2),
    "state": ("open", "checkpoint-4.partial/state.pt", 1, 2),
    "before the rename": ("os.rename", "checkpoint-4.partial", 1, 2),
    "before the older one goes": ("os.rename", "checkpoint-2", 1, 4),
    "older one under another name": ("shutil.rmtree", "checkpoint-2.partial", 1, 4),
    "older one half gone": ("os.remove", "config.json", 1, 4),
    "last evaluation": ("open", "metrics.jsonl", 12, 6),  # of sft.py and reward_model.py, which then only finish
    "end: before the list": ("os.rename", "args.partial", 3, 6),
    "end: nothing copied": ("shutil.copyfile", "", 1, 6),
    "end: half copied": ("shutil.copyfile", "", 4, 6),
    "end: before the mark": ("os.rename", "args.partial", 4, 6),
    "end: after the mark": ("os.rename", "checkpoint-6", 1, 6),
    "end: last one half gone": ("shutil.rmtree", "checkpoint-6.partial", 1, 6),
}
ENDS = [moment for moment in MOMENTS if moment.startswith("end")]  # sft.py keeps no state there


def run_until(moment, run_stage, module, flags):
    """Runs a stage and kills this process right before something that it does to a file."""
    wanted, ending, number, _ = MOMENTS[moment]
    seen = []

    def hook(event, arguments):
        if event == wanted and str(arguments[0]).endswith(ending):
            seen.append(None)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return run_stage(module, *flags)


@pytest.mark.parametrize("stage, moment", [
    *(("ppo", moment) for moment in MOMENTS if moment != "last evaluation"),
    *(("sft", moment) for moment in ("first metrics", "models", "last evaluation", *ENDS)),
    *(("reward_model", moment) for moment in ("first metrics", "models", "last evaluation")),
])
def test_a_kill_at_any_moment_leaves_a_run_that_resumes_to_the_same_end(
    stage, moment, world, tmp_path, run_stage, whole
):
    (tmp_path / "runs").mkdir()
    module, output, expected = STAGES[stage], tmp_path / "runs" / "parts", whole(stage)
    flags = flags_of(stage, world, "--output", output, "--resume")  # at first there is nothing to resume
    assert in_child(run_until, moment, run_stage, module, flags) == -signal.SIGKILL
    is_marked = moment in ("end: after the mark", "end: last one half gone")
    if (output / "args.json").exists() and not is_marked:
        result = run_stage(sft, *flags_of("sft", world, "--model", output, "--output", tmp_path / "next"))
        refused(result, "sft", f"{output} is not finished")
    with interrupted(module, 99, stop) as calls:
        status, _, err = run_stage(module, *flags)
    assert status == 0, err
    assert len(calls) == (6 - MOMENTS[moment][3]) * calls_per_step(module)  # from the checkpoint on
    assert_equal(output, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once_and_leaves_the_last_checkpoint(number, world, tmp_path, run_stage):
    def twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    with interrupted(ppo, 4, twice):
        assert in_child(run_stage, ppo, *flags_of("ppo", world, "--output", tmp_path / "out")) == -number
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


# === The folder ===================================================================================
def test_what_a_user_keeps_in_the_folder_survives_and_nothing_of_an_overwritten_run_does(
    world, tmp_path, run_stage, monkeypatch
):
    (tmp_path / "real").mkdir()
    output = tmp_path / "link"
    output.symlink_to(tmp_path / "real")  # a link is written through
    kept = {name: f"mine: {name}".encode() for name in ("notes.md", "variant/model.safetensors", "checkpoint-best/x")}

    def keep():
        for name, text in kept.items():
            (output / name).parent.mkdir(exist_ok=True)
            (output / name).write_bytes(text)

    with interrupted(ppo, 1, keep):
        assert run_stage(ppo, *flags_of("ppo", world), "--output", output)[0] == 0
    first = bytes_in(output).keys()
    flags = flags_of("ppo", world, "--critic", "shared", "--overwrite")
    stopped(monkeypatch, run_stage, "ppo", output, flags, iteration=4)
    assert run_stage(ppo, "--resume", "--output", output)[0] == 0
    files = bytes_in(output)
    written = {*json.loads(files["args.json"])["written"]}
    assert files.keys() == written | kept.keys() | {"args.json", "metrics.jsonl", "samples.jsonl"}
    assert {"model.safetensors", "critic/value_head.safetensors", "state.pt"} <= written
    assert first - files.keys() == {"critic/model.safetensors", "critic/config.json"}
    assert files | kept == files
    assert sorted(os.listdir(tmp_path)) == ["link", "real"] and output.is_symlink()


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_is_read_is_finished_and_is_not_written(stage, world, tmp_path, run_stage, monkeypatch):
    folder = tmp_path / "sft"
    stopped(monkeypatch, run_stage, "sft", folder, flags_of("sft", world))
    for path, result in ((folder, 2), (folder / "checkpoint-3", 0)):  # who names it means it
        flags = [path if flag == world / "sft" else flag for flag in flags_of(stage, world)]
        status, _, err = run_stage(STAGES[stage], *flags, "--output", tmp_path / "out")
        assert status == result and (status == 0 or f"{folder} is not finished" in err), err
    result = run_stage(STAGES[stage], *flags, "--output", folder / "checkpoint-3", "--overwrite")
    refused(result, stage, "is a folder that the run reads")
    assert (folder / "checkpoint-3" / "model.safetensors").exists()


def test_two_runs_cannot_write_one_folder(world, tmp_path, run_stage):
    flags = flags_of("sft", world, "--output", tmp_path)
    with filelock.FileLock(tmp_path / "run.lock"):
        refused(run_stage(sft, *flags), "sft", "another run is writing to --output")
        assert os.listdir(tmp_path) == ["run.lock"]
    assert run_stage(sft, *flags)[0] == 0 and not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(
    stage, world, tmp_path, run_stage, monkeypatch
):
    save = torch.save

    def full(state, path):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        status, _, err = run_stage(STAGES[stage], *flags_of(stage, world), "--output", tmp_path)
    line = err.strip().splitlines()[-1]
    assert status == 2 and "can't write" in line and "No space left on device" in line, err
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert run_stage(STAGES[stage], "--resume", "--output", tmp_path)[0] == 0


class Bomb:
    """Creates the file "ran" in the working directory when it is unpickled."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("ran"),)


def test_a_damaged_run_is_refused_left_as_it_is_and_nothing_in_it_is_run(
    world, tmp_path, run_stage, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    stopped(monkeypatch, run_stage, "sft", "out", flags_of("sft", world))
    bomb = io.BytesIO()
    torch.save({"step": Bomb()}, bomb)
    for name, content, problem in (
        ("checkpoint-3/state.pt", bomb.getvalue(), "can't resume"),
        ("checkpoint-3/state.pt", bomb.getvalue()[:500], "can't resume"),
        ("checkpoint-3/state.pt", None, "state.pt"), ("metrics.jsonl", None, "is gone or shorter"),
        ("metrics.jsonl", b"", "is gone or shorter"), ("args.json", b"[1]", "holds files of something else"),
    ):
        shutil.rmtree("damaged", ignore_errors=True)
        shutil.copytree("out", "damaged")
        damaged = pathlib.Path("damaged", name)
        damaged.unlink() if content is None else damaged.write_bytes(content)
        before = bytes_in(pathlib.Path("damaged"))
        result = run_stage(sft, *flags_of("sft", world, "--resume", "--output", "damaged"))
        refused(result, "sft", problem)
        assert before == bytes_in(pathlib.Path("damaged")) and not os.path.exists("ran")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("names, status", [
    (("training_args.bin", "optimizer.pt", "tokenizer.pkl", "value_head.safetensors"), 0),
    (("model.safetensors",), 2), (("pytorch_model.bin",), 2),
])
def test_pickles_among_the_files_that_are_read_are_never_run(
    stage, names, status, world, tmp_path, run_stage, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for source in ("sft", "reward_model"):
        shutil.copytree(world / source, source)
        for name in names:
            torch.save({"weight": Bomb()}, f"{source}/{name}")
        if "pytorch_model.bin" in names:
            os.unlink(f"{source}/model.safetensors")
    flags = [flag.name if flag in (world / "sft", world / "reward_model") else flag for flag in flags_of(stage, world)]
    result = run_stage(STAGES[stage], *flags, "--output", "out")
    assert result[0] == status and "Traceback" not in result[2] and not os.path.exists("ran"), result


# === Numbers ======================================================================================
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_bad", [2, 3])
def test_three_gradients_in_a_row_that_are_not_finite_end_the_run_two_do_not(
    stage, num_bad, world, tmp_path, run_stage, monkeypatch
):
    module, clip, calls = STAGES[stage], STAGES[stage].clip_grad_norm_, []

    def wrapped(parameters, most):
        parameters = list(parameters)
        step, model = divmod(len(calls), 2 if stage == "ppo" else 1)
        calls.append(None)
        if (step < num_bad or step == 4) and model == 0:  # two, two good ones, and another
            parameters[0].grad.fill_(float("nan"))
        return clip(parameters, most)

    monkeypatch.setattr(module, "clip_grad_norm_", wrapped)
    status, _, err = run_stage(module, *flags_of(stage, world, "--output", tmp_path))
    what = "three optimizer steps in a row had a gradient that is not finite"
    assert status == (0 if num_bad == 2 else 2) and (what in err) == (num_bad == 3), err
    if num_bad == 2:
        skipped = [row.get("skipped_steps") for row in read_rows(tmp_path / "metrics.jsonl") if "split" not in row]
        assert stage != "ppo" or skipped == [3, 0, 0, 0, 0, 0]
        weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("first_bad", [1, 7])  # the check of the model; the third rollout
def test_weights_that_are_not_finite_at_the_start_or_later_end_the_run_in_one_line(
    first_bad, world, tmp_path, run_stage, monkeypatch
):
    generate, calls = common.generate_responses, []

    def poisoned(*arguments):
        calls.append(None)
        if len(calls) == first_bad:
            arguments[0].get_output_embeddings().weight.data.fill_(float("nan"))
        return generate(*arguments)

    monkeypatch.setattr(common, "generate_responses", poisoned)
    status, _, err = run_stage(ppo, *flags_of("ppo", world, "--output", tmp_path))
    line = err.strip().splitlines()[-1]
    assert status == 2 and line.startswith("ppo.py: error: ") and "not finite" in line, err
