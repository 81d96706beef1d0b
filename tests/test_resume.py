"""Runs that stop and continue: exact resume, signals, kills, locks, full disks, damaged states."""

import errno
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
PHASES = ("seconds_rollout", "seconds_score", "seconds_update")
TIMES = {*PHASES, "tokens_per_second", "peak_memory_gb"}


def flags_of(stage, world, *more):
    """Returns the flags of a run of six iterations that saves every second one."""
    files = {"sft": "sft.jsonl", "reward_model": "pairs.jsonl", "ppo": "prompts.jsonl"}
    data = world / files[stage]
    flags = ["--model", world / "sft", "--data", data, "--eval-data", data, "--epochs", 2]
    if stage == "ppo":
        flags = ["--policy", world / "sft", "--reward", world / "reward_model", "--prompts", data]
        flags += ["--eval-prompts", data, "--iterations", 6, "--minibatch-size", 4]
        flags += ["--response-length", 6, "--kl-target", 3, "--eval-every", 3]
    return [*flags, "--batch-size", 8, "--lr", 1e-3, "--save-every", 2, "--device", "cpu", *more]


def contents(folder):
    """Returns what two equal runs have in common: all weights, and the logs without times."""
    folder, files = pathlib.Path(folder), {}
    for path in folder.rglob("*.safetensors"):
        files[str(path.relative_to(folder))] = path.read_bytes()
    for path in folder.glob("*.jsonl"):
        rows = read_rows(path)
        files[path.name] = [{k: row[k] for k in row if k not in TIMES} for row in rows]
    assert len(files) > 1
    return files


def interrupt(monkeypatch, module, iteration, action):
    """Calls action() in the middle of this iteration of the stage's next run. Returns the undo."""
    clip, calls = module.clip_grad_norm_, []
    per_step = 16 if module is ppo else 1  # it clips two models in each of 8 optimizer steps

    def wrapped(*arguments):
        calls.append(None)
        if len(calls) == (iteration - 1) * per_step + 1:
            action()
        return clip(*arguments)

    def undo():
        monkeypatch.setattr(module, "clip_grad_norm_", clip)
        return len(calls) / per_step

    monkeypatch.setattr(module, "clip_grad_norm_", wrapped)
    return undo


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise ZeroDivisionError


def stopped(monkeypatch, run_stage, stage, output, flags, iteration=3):
    """Returns what a run prints that is asked to stop in an iteration."""
    undo = interrupt(monkeypatch, STAGES[stage], iteration, stop)
    status, _, err = run_stage(STAGES[stage], *flags, "--output", output)
    undo()
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
            flags = flags_of(stage, world, *more, "--output", output)
            assert run_stage(STAGES[stage], *flags)[0] == 0
            wholes[stage, more] = output
        return wholes[stage, more]

    return run


# === Stopping and resuming ========================================================================
KINDS = [*((stage, ()) for stage in STAGES), ("ppo", ("--critic", "shared"))]
KINDS += [("ppo", ("--advantage", "bandit", "--gradient-checkpointing"))]


@pytest.mark.parametrize("stage, more", KINDS)
@pytest.mark.parametrize("action", [stop, crash])
def test_a_run_that_stops_and_resumes_equals_one_that_does_not_bit_for_bit(
    stage, more, action, world, tmp_path, run_stage, monkeypatch, whole
):
    module, output, expected = STAGES[stage], tmp_path / "parts", contents(whole(stage, *more))
    flags = flags_of(stage, world, *more)
    if action is stop:
        err = stopped(monkeypatch, run_stage, stage, output, flags)
        assert f"stopped; to go on: python {stage}.py --resume --output {output}" in err
    else:
        undo = interrupt(monkeypatch, module, 3, crash)
        with pytest.raises(ZeroDivisionError):
            run_stage(module, *flags, "--output", output)
        undo()
    [checkpoint] = output.glob("checkpoint-*")
    assert checkpoint.name == ("checkpoint-3" if action is stop else "checkpoint-2")
    AutoTokenizer.from_pretrained(checkpoint)  # an ordinary folder
    saved = torch.load(checkpoint / "state.pt", weights_only=True)
    assert saved["step"] == int(checkpoint.name[11:]) and not (output / "config.json").exists()
    status, out, err = run_stage(module, "--resume", "--output", output)  # as it was printed
    assert status == 0 and f"resumed after {saved['step']} iterations" in out, err
    assert contents(output)["metrics.jsonl"] == expected["metrics.jsonl"]
    assert contents(output) == expected and os.listdir(tmp_path) == ["parts"]
    assert sorted(os.listdir(output)) == sorted(os.listdir(whole(stage, *more)))
    if "shared" in more:
        head = safetensors.torch.load_file(output / "critic" / "value_head.safetensors")
        assert head["weight"].shape == (1, 16) and head["weight"].abs().max() > 0


@pytest.mark.parametrize("stage", STAGES)
def test_resume_starts_from_scratch_where_nothing_was_saved(
    stage, world, tmp_path, run_stage, monkeypatch, whole
):
    undo = interrupt(monkeypatch, STAGES[stage], 2, crash)
    with pytest.raises(ZeroDivisionError):
        run_stage(STAGES[stage], *flags_of(stage, world), "--output", tmp_path / "parts")
    undo()
    names = {"args.json", "metrics.jsonl", "samples.jsonl"}
    assert {*os.listdir(tmp_path / "parts")} <= names
    for name in ("parts", "new"):  # where there is no folder, too
        flags = flags_of(stage, world, "--resume", "--output", tmp_path / name)
        assert run_stage(STAGES[stage], *flags)[0] == 0
        assert contents(whole(stage)) == contents(tmp_path / name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_neither_overwritten_nor_mixed_up_unasked(
    stage, world, tmp_path, run_stage, whole
):
    module, output = STAGES[stage], tmp_path / "out"
    shutil.copytree(whole(stage), output)
    flags = flags_of(stage, world, "--output", output)
    refused(run_stage(module, *flags), stage, "holds a run", "--resume", "--overwrite")
    refused(run_stage(module, *flags, "--resume", "--overwrite"), stage, "--resume", "--overwrite")
    result = run_stage(module, *flags, "--resume", "--lr", 5e-4)
    if stage == "ppo":  # the others keep no state, as they can't be extended
        refused(result, stage, "--lr is 0.0005, but the run", "began with 0.001")
    status, out, _ = run_stage(module, *flags, "--resume")  # a job that is started again is done
    assert status == 0 and "is finished" in out
    assert ("a higher --iterations continues it" in out) == (stage == "ppo")
    assert contents(output) == contents(whole(stage))
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
        flags = ["--resume", "--output", spelling, "--iterations", 6 + number]
        status, _, err = run_stage(ppo, *flags)
        assert status == 0, err
    shutil.move("my run", "moved")
    assert run_stage(ppo, "--resume", "--output", "moved", "--iterations", 8)[0] == 0
    rows = [row for row in read_rows("moved/metrics.jsonl") if "split" not in row]
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert rows[7]["lr"] == pytest.approx(1e-3 * (1 - 7 / 8)) and rows[7]["policy_loss"] != 0
    assert rows[6]["lr"] == pytest.approx(1e-3 * (1 - 6 / 7))  # each by the schedule of its time


def test_the_scale_of_a_reward_model_is_not_measured_again(
    world, tmp_path, run_stage, monkeypatch
):
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
    "end: before the list": ("os.rename", "args.partial", 3, 6),
    "end: nothing copied": ("shutil.copyfile", "", 1, 6),
    "end: half copied": ("shutil.copyfile", "", 4, 6),
    "end: before the mark": ("os.rename", "args.partial", 4, 6),
    "end: after the mark": ("os.rename", "checkpoint-6", 1, 6),
    "end: last one half gone": ("shutil.rmtree", "checkpoint-6.partial", 1, 6),
}


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


ENDS = [moment for moment in MOMENTS if moment.startswith("end")]  # sft.py keeps no state there


@pytest.mark.parametrize("stage, moment", [
    *(("ppo", moment) for moment in MOMENTS), *(("sft", moment) for moment in ENDS),
])
def test_a_kill_at_any_moment_leaves_a_run_that_resumes_to_the_same_end(
    stage, moment, world, tmp_path, run_stage, monkeypatch, whole
):
    module, output = STAGES[stage], tmp_path / "parts"
    flags = flags_of(stage, world, "--output", output)
    expected = whole(stage)
    assert in_child(run_until, moment, run_stage, module, flags) == -signal.SIGKILL
    is_marked = moment in ("end: after the mark", "end: last one half gone")
    if (output / "args.json").exists() and not is_marked:
        next_flags = flags_of("sft", world, "--model", output, "--output", tmp_path / "next")
        refused(run_stage(sft, *next_flags), "sft", f"{output} is not finished")
    undo = interrupt(monkeypatch, module, 99, stop)  # it only counts the steps
    status, out, err = run_stage(module, *flags, "--resume")
    assert status == 0 and undo() == 6 - MOMENTS[moment][3], err  # from the checkpoint on
    assert contents(output) == contents(expected) and os.listdir(tmp_path) == ["parts"]
    assert sorted(os.listdir(output)) == sorted(os.listdir(expected))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once_and_leaves_the_last_checkpoint(
    number, world, tmp_path, run_stage, monkeypatch
):
    def twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    interrupt(monkeypatch, ppo, 4, twice)
    flags = flags_of("ppo", world, "--output", tmp_path / "out")
    assert in_child(run_stage, ppo, *flags) == -number
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_what_fails_after_the_last_step_loses_no_training(
    stage, world, tmp_path, run_stage, monkeypatch, whole
):
    module, output, calls = STAGES[stage], tmp_path / "out", []
    name = {"sft": "evaluate", "reward_model": "score_pairs"}[stage]
    original = getattr(module, name)

    def fail(*arguments):
        calls.append(None)
        if len(calls) == (2 if stage == "sft" else 1):  # sft evaluates at the start, too
            crash()
        return original(*arguments)

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(ZeroDivisionError):
        run_stage(module, *flags_of(stage, world), "--output", output)
    undo = interrupt(monkeypatch, module, 99, stop)
    status, out, err = run_stage(module, "--resume", "--output", output)
    assert status == 0 and undo() == 0 and "resumed after 6 iterations" in out, err
    assert contents(output) == contents(whole(stage))
    assert sorted(os.listdir(output)) == sorted(os.listdir(whole(stage)))


# === The folder ===================================================================================
def test_what_a_user_keeps_in_the_folder_survives_and_nothing_of_an_overwritten_run_does(
    world, tmp_path, run_stage, monkeypatch
):
    (tmp_path / "real").mkdir()
    output = tmp_path / "link"
    output.symlink_to(tmp_path / "real")  # a link is written through
    kept = {"notes.md", "variant/model.safetensors", "checkpoint-best/x"}

    def keep():
        for name in kept:
            (output / name).parent.mkdir(exist_ok=True)
            (output / name).write_text(f"mine: {name}")

    undo = interrupt(monkeypatch, ppo, 1, keep)
    assert run_stage(ppo, *flags_of("ppo", world), "--output", output)[0] == 0
    undo()
    first = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    flags = flags_of("ppo", world, "--critic", "shared", "--overwrite")
    stopped(monkeypatch, run_stage, "ppo", output, flags, iteration=4)
    assert run_stage(ppo, "--resume", "--output", output)[0] == 0
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    written = {*json.loads((output / "args.json").read_text())["written"]}
    assert files == written | kept | {"args.json", "metrics.jsonl", "samples.jsonl"}
    assert {"model.safetensors", "critic/value_head.safetensors", "state.pt"} <= written
    assert first - files == {"critic/model.safetensors", "critic/config.json"}
    assert all((output / name).read_text() == f"mine: {name}" for name in kept)
    assert sorted(os.listdir(tmp_path)) == ["link", "real"] and output.is_symlink()


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_is_read_is_finished_and_is_not_written(
    stage, world, tmp_path, run_stage, monkeypatch
):
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
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / "run.lock"):
        result = run_stage(sft, *flags_of("sft", world), "--output", tmp_path / "out")
        refused(result, "sft", "another run is writing to --output")
        assert os.listdir(tmp_path / "out") == ["run.lock"]
    assert run_stage(sft, *flags_of("sft", world), "--output", tmp_path / "out")[0] == 0
    assert "run.lock" not in os.listdir(tmp_path / "out")


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(
    stage, world, tmp_path, run_stage, monkeypatch
):
    module, output, saves, save = STAGES[stage], tmp_path / "out", [], torch.save

    def full(state, path):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    status, _, err = run_stage(module, *flags_of(stage, world), "--output", output)
    line = err.strip().splitlines()[-1]
    assert status == 2 and "can't write" in line and "No space left on device" in line, err
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert run_stage(module, "--resume", "--output", output)[0] == 0


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


DAMAGES = {"cut state": "can't resume", "bomb in the state": "can't resume", "no state": "state.pt"}
DAMAGES |= {"no log": "is gone or shorter", "short log": "is gone or shorter"}
DAMAGES |= {"no args": "holds files of something else"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_left_as_it_is_and_nothing_in_it_is_run(
    damage, world, tmp_path, run_stage, monkeypatch
):
    output = tmp_path / "out"
    stopped(monkeypatch, run_stage, "sft", output, flags_of("sft", world))
    state, log = output / "checkpoint-3" / "state.pt", output / "metrics.jsonl"
    if damage == "cut state":
        state.write_bytes(state.read_bytes()[:1000])
    elif damage == "bomb in the state":
        torch.save({"step": Bomb(tmp_path / "ran")}, state)
    elif damage == "no args":
        (output / "args.json").write_text("[1]")
    elif damage == "short log":
        log.write_text("")
    else:
        (state if damage == "no state" else log).unlink()
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    result = run_stage(sft, *flags_of("sft", world, "--resume", "--output", output))
    refused(result, "sft", DAMAGES[damage])
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_pickles_among_the_files_that_are_read_are_never_run(stage, world, tmp_path, run_stage):
    flags = flags_of(stage, world, "--output", tmp_path / "out", "--overwrite")
    extra = ("training_args.bin", "optimizer.pt", "tokenizer.pkl", "value_head.safetensors")
    for names in (extra, ["model.safetensors"], ["pytorch_model.bin"]):
        for source in ("sft", "reward_model"):
            new = tmp_path / source
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree(world / source, new)
            flags = [new if flag == world / source else flag for flag in flags]
            for name in names:
                torch.save({"weight": Bomb(tmp_path / "ran")}, new / name)
            if names == ["pytorch_model.bin"]:
                (new / "model.safetensors").unlink()
        status, _, err = run_stage(STAGES[stage], *flags)
        assert status == (0 if names is extra else 2) and "Traceback" not in err
        assert not (tmp_path / "ran").exists(), names


def test_paths_in_data_rows_are_never_opened_and_a_run_writes_ordinary_files(
    world, tmp_path, run_stage
):
    secret, opened = tmp_path / "secret.txt", []
    secret.write_text("kept")
    row = {"image": str(secret), "path": f"file://{secret}", "prompt_ids": str(secret)}
    rows = [row | {"prompt": f"A fox {i}."} for i in range(12)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)

    def hook(event, arguments):
        if event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    flags = flags_of("ppo", world, "--prompts", prompts, "--output", tmp_path / "out")
    assert run_stage(ppo, *flags)[0] == 0
    assert prompts in opened and str(secret) not in opened
    files = [path for path in (tmp_path / "out").rglob("*") if not path.is_dir()]
    assert len(files) > 8 and all(path.is_file() and not path.is_symlink() for path in files)
    assert sorted(os.listdir(tmp_path)) == ["out", "prompts.jsonl", "secret.txt"]


# === Numbers and memory ===========================================================================
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_bad", [2, 3])
def test_three_gradients_in_a_row_that_are_not_finite_end_the_run_two_do_not(
    stage, num_bad, world, tmp_path, run_stage, monkeypatch
):
    module, clip, calls = STAGES[stage], STAGES[stage].clip_grad_norm_, []
    num_models = 2 if stage == "ppo" else 1

    def wrapped(parameters, most):
        parameters = list(parameters)
        step, model = divmod(len(calls), num_models)
        calls.append(None)
        if (step < num_bad or step == 4) and model == 0:  # two, two good ones, and another
            parameters[0].grad.fill_(float("nan"))
        return clip(parameters, most)

    monkeypatch.setattr(module, "clip_grad_norm_", wrapped)
    flags = flags_of(stage, world, "--output", tmp_path / "out")
    status, _, err = run_stage(module, *flags)
    what = "three optimizer steps in a row had a gradient that is not finite"
    assert status == (0 if num_bad == 2 else 2) and (what in err) == (num_bad == 3), err
    if num_bad == 2:
        rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
        skipped = [row.get("skipped_steps") for row in rows]
        assert stage != "ppo" or skipped == [3, 0, 0, 0, 0, 0]
        weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())


def test_weights_that_are_not_finite_at_the_start_or_later_end_the_run_in_one_line(
    world, tmp_path, run_stage, monkeypatch
):
    generate, calls = common.generate_responses, []

    def poisoned(*arguments):
        calls.append(None)
        if len(calls) == first_bad:
            arguments[0].get_output_embeddings().weight.data.fill_(float("nan"))
        return generate(*arguments)

    monkeypatch.setattr(common, "generate_responses", poisoned)
    flags = flags_of("ppo", world, "--output", tmp_path / "out", "--overwrite")
    for first_bad in (1, 7):  # the check of the model; the third rollout, after the evaluation
        calls.clear()
        status, _, err = run_stage(ppo, *flags)
        line = err.strip().splitlines()[-1]
        assert status == 2 and line.startswith("ppo.py: error: ") and "not finite" in line, err
