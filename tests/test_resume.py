"""Runs that stop and go on: exact resume, signals, kills, locks, full disks, damaged state."""

import errno
import json
import os
import pathlib
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import safetensors.torch
import torch
from conftest import ROOT, read_rows, tiny_scalar
from test_cli import refused
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import common
import ppo
import reward_model
import sft
from plumbing import cli, folders, report
from plumbing import rows as rows_

STAGES = {"sft": sft, "reward_model": reward_model, "ppo": ppo}
TIMES = {"seconds_rollout", "seconds_score", "seconds_update", "tokens_per_second", "peak_memory_gb"}


def flags_of(stage, world, *more):
    """A run of six iterations that saves every second one."""
    data = lambda name: ["--data", world / name, "--eval-data", world / name, "--batch-size", 8, "--epochs", 2]
    flags = {
        "sft": ["--model", world / "sft", *data("sft.jsonl")],
        "reward_model": ["--model", world / "sft", *data("pairs.jsonl")],
        "ppo": ["--policy", world / "sft", "--reward", world / "reward_model", "--prompts", world / "prompts.jsonl",
                "--eval-prompts", world / "prompts.jsonl", "--iterations", 6, "--batch-size", 8, "--minibatch-size", 4,
                "--response-length", 6, "--kl-target", 3, "--eval-every", 3],
    }[stage]
    return [*flags, "--lr", 1e-3, "--save-every", 2, "--device", "cpu", *more]


def contents(folder):
    """What two equal runs have in common: all weights, and the logs without times."""
    folder = pathlib.Path(folder)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            files[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in read_rows(folder / name)]
    assert len(files) > 1
    return files


def interrupt(monkeypatch, module, iteration, action):
    """Call action() in the middle of this iteration of the stage's next run."""
    clip, calls = module.clip_grad_norm_, []
    steps = {"ppo": 16}.get(module.__name__, 1)  # ppo clips two models in each of 8 optimizer steps

    def wrapped(*arguments):
        calls.append(None)
        if len(calls) == (iteration - 1) * steps + 1:
            action()
        return clip(*arguments)

    monkeypatch.setattr(module, "clip_grad_norm_", wrapped)
    return lambda: monkeypatch.setattr(module, "clip_grad_norm_", clip)


KINDS = [(stage, []) for stage in STAGES] + [("ppo", ["--critic", "shared"]), ("ppo", ["--advantage", "bandit", "--gradient-checkpointing"])]


@pytest.mark.parametrize("stage, more", KINDS)
@pytest.mark.parametrize("how", ["asked to stop", "crashed"])
def test_a_run_that_stops_and_resumes_equals_one_that_does_not_bit_for_bit(stage, how, more, world, tmp_path, run_stage, monkeypatch):
    module, flags = STAGES[stage], flags_of(stage, world, *more)
    assert run_stage(module, *flags, "--output", tmp_path / "whole")[0] == 0

    def crash():
        raise ZeroDivisionError

    action = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if how == "asked to stop" else crash
    undo = interrupt(monkeypatch, module, 3, action)
    if how == "crashed":
        with pytest.raises(ZeroDivisionError):
            run_stage(module, *flags, "--output", tmp_path / "parts")
    else:
        status, _, err = run_stage(module, *flags, "--output", tmp_path / "parts")
        assert status == 128 + signal.SIGTERM
        assert f"stopped; to go on: python {stage}.py --resume --output {tmp_path / 'parts'}" in err
    undo()
    saved = 3 if how == "asked to stop" else 2
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    done = torch.load(tmp_path / "parts" / f"checkpoint-{saved}" / "trainer_state" / "state.pt", weights_only=True)
    assert done["step"] == saved and not (tmp_path / "parts" / "config.json").exists()
    AutoTokenizer.from_pretrained(tmp_path / "parts" / f"checkpoint-{saved}")  # an ordinary folder
    status, _, err = run_stage(module, "--resume", "--output", tmp_path / "parts")  # the command that was printed
    assert status == 0, err
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert whole["metrics.jsonl"] == parts["metrics.jsonl"] and whole == parts
    assert sorted(os.listdir(tmp_path)) == ["parts", "whole"]  # no leftovers beside them


@pytest.mark.parametrize("stage", STAGES)
def test_resume_starts_at_the_start_where_nothing_was_saved(stage, world, tmp_path, run_stage, monkeypatch):
    module, flags = STAGES[stage], flags_of(stage, world)
    assert run_stage(module, *flags, "--output", tmp_path / "whole")[0] == 0

    def crash():
        raise ZeroDivisionError

    undo = interrupt(monkeypatch, module, 2, crash)
    with pytest.raises(ZeroDivisionError):
        run_stage(module, *flags, "--output", tmp_path / "parts")
    undo()
    assert sorted(os.listdir(tmp_path / "parts")) in (["args.json", "metrics.jsonl"], ["args.json", "metrics.jsonl", "samples.jsonl"])
    assert run_stage(module, "--resume", "--output", tmp_path / "parts")[0] == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    assert run_stage(module, *flags, "--resume", "--output", tmp_path / "new")[0] == 0  # nor is there a folder
    assert contents(tmp_path / "whole") == contents(tmp_path / "new")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_neither_overwritten_nor_mixed_up_unasked(stage, world, tmp_path, run_stage):
    module, output = STAGES[stage], tmp_path / "out"
    flags = [*flags_of(stage, world), "--output", output]
    assert run_stage(module, *flags)[0] == 0
    before = contents(output)
    refused(run_stage(module, *flags), stage, "holds a run; --resume goes on with it, --overwrite replaces it")
    refused(run_stage(module, *flags, "--resume", "--overwrite"), stage, "give one of them")
    if stage == "ppo":
        hint = "a higher --iterations goes on with it"
    else:
        hint = "--overwrite starts anew"
    refused(run_stage(module, *flags, "--resume", "--lr", 5e-4), stage, "--lr is 0.0005, but the run in", "began with 0.001", "device, ")
    status, out, _ = run_stage(module, *flags, "--resume")  # a job that is started again is done
    assert status == 0 and f"is finished; {hint}" in out
    assert contents(output) == before
    assert run_stage(module, *flags, "--overwrite", "--seed", 1)[0] == 0
    assert contents(output) != before


def test_an_output_that_is_a_link_is_written_through(world, tmp_path, run_stage):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run_stage(ppo, *flags_of("ppo", world), "--output", tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_what_a_user_keeps_in_the_folder_survives_save_resume_overwrite_and_the_end(stage, world, tmp_path, run_stage, monkeypatch):
    module, output = STAGES[stage], tmp_path / "out"

    def keep():
        (output / "notes.md").write_text("mine")
        (output / "variant").mkdir(exist_ok=True)
        (output / "variant" / "model.safetensors").write_text("mine too")
        (output / "checkpoint-best").mkdir(exist_ok=True)

    def is_kept():
        return (output / "notes.md").read_text() == "mine" and (output / "variant" / "model.safetensors").read_text() == "mine too" and (output / "checkpoint-best").is_dir()

    undo = interrupt(monkeypatch, module, 1, keep)
    assert run_stage(module, *flags_of(stage, world), "--output", output)[0] == 0 and is_kept()
    undo()
    undo = interrupt(monkeypatch, module, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_stage(module, *flags_of(stage, world), "--output", output, "--overwrite", "--seed", 1)[0] == 128 + signal.SIGTERM and is_kept()
    undo()
    status, _, err = run_stage(module, "--resume", "--output", output)
    assert status == 0 and is_kept(), err


def test_a_folder_that_no_run_or_one_of_the_former_form_wrote_is_neither_resumed_nor_overwritten(world, tmp_path, run_stage):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "metrics.jsonl").write_text("mine")
    shutil.copytree(world / "sft", tmp_path / "former")
    (tmp_path / "former" / "metrics.jsonl").write_text("")
    (tmp_path / "former" / "args.json").write_text(json.dumps({"epochs": 2}))
    (tmp_path / "former" / "trainer_state").mkdir()
    for name in ("project", "former"):
        before = sorted(str(path) for path in (tmp_path / name).rglob("*"))
        for how in ("--resume", "--overwrite"):
            result = run_stage(sft, *flags_of("sft", world), "--output", tmp_path / name, how)
            refused(result, "sft", "holds files of something else, or a run of an earlier version; name a new folder")
        assert before == sorted(str(path) for path in (tmp_path / name).rglob("*"))


@pytest.mark.parametrize("stage", STAGES)
def test_an_output_that_is_not_finished_is_not_taken_by_the_next_stage(stage, world, tmp_path, run_stage, monkeypatch):
    undo = interrupt(monkeypatch, sft, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run_stage(sft, *flags_of("sft", world), "--output", tmp_path / "sft")
    undo()
    flags = [tmp_path / "sft" if flag == world / "sft" else flag for flag in flags_of(stage, world)]
    refused(run_stage(STAGES[stage], *flags, "--output", tmp_path / "out"), stage, f"{tmp_path / 'sft'} is not finished; --resume --output {tmp_path / 'sft'} goes on")
    flags = [tmp_path / "sft" / "checkpoint-3" if flag == tmp_path / "sft" else flag for flag in flags]
    assert run_stage(STAGES[stage], *flags, "--output", tmp_path / "out")[0] == 0  # who names the checkpoint means it


def test_a_run_goes_on_under_another_spelling_and_from_another_place_and_the_printed_command_is_one_for_a_shell(world, tmp_path, run_stage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags_of("ppo", world)
    undo = interrupt(monkeypatch, ppo, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    _, _, err = run_stage(ppo, *flags, "--output", "my run")
    undo()
    command = err[err.index("to go on: ") :].splitlines()[0].removeprefix("to go on: ")
    assert shlex.split(command) == ["python", "ppo.py", "--resume", "--output", "my run"]
    for number, spelling in enumerate(("./my run", tmp_path / "my run")):
        status, _, err = run_stage(ppo, "--resume", "--output", spelling, "--iterations", 6 + number)
        assert status == 0, err
    shutil.move("my run", "moved")
    assert run_stage(ppo, "--resume", "--output", "moved", "--iterations", 8)[0] == 0
    assert len([row for row in read_rows("moved/metrics.jsonl") if "split" not in row]) == 8


def test_nothing_of_an_overwritten_run_stays_beside_the_new_one(world, tmp_path, run_stage):
    output = tmp_path / "out"
    assert run_stage(ppo, *flags_of("ppo", world), "--output", output)[0] == 0
    (output / "model.safetensors").rename(output / "model-00001-of-00001.safetensors")  # as if it had been sharded
    args = json.loads((output / "args.json").read_text())
    args["written"] = [name.replace("model.safetensors", "model-00001-of-00001.safetensors") if "/" not in name else name for name in args["written"]]
    (output / "args.json").write_text(json.dumps(args))
    assert run_stage(ppo, *flags_of("ppo", world, "--critic", "shared"), "--output", output, "--overwrite")[0] == 0
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert not {"model-00001-of-00001.safetensors", "critic/model.safetensors", "critic/config.json"} & files
    assert {"model.safetensors", "critic/value_head.safetensors"} <= files
    assert files == {*json.loads((output / "args.json").read_text())["written"], "args.json", "metrics.jsonl", "samples.jsonl"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_does_not_write_what_it_reads(stage, world, tmp_path, run_stage):
    shutil.copytree(world / "sft", tmp_path / "sft")
    flags = [tmp_path / "sft" if flag == world / "sft" else flag for flag in flags_of(stage, world)]
    output = tmp_path / "new" if stage == "none" else tmp_path / "sft"
    refused(run_stage(STAGES[stage], *flags, "--output", output, "--overwrite"), stage, "is a folder that the run reads")
    assert (tmp_path / "sft" / "model.safetensors").exists()


def test_a_finished_ppo_run_can_be_made_longer(world, tmp_path, run_stage):
    flags = flags_of("ppo", world, "--output", tmp_path / "out")
    assert run_stage(ppo, *flags)[0] == 0
    status, _, err = run_stage(ppo, "--resume", "--output", tmp_path / "out", "--iterations", 8)
    rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
    assert status == 0 and [row["iteration"] for row in rows] == list(range(1, 9)), err
    assert rows[6]["lr"] == pytest.approx(1e-3 * (1 - 6 / 8)) and rows[6]["policy_loss"] != 0  # of the new schedule


def test_two_runs_cannot_write_one_folder(world, tmp_path, run_stage):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "out.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(run_stage(sft, *flags_of("sft", world), "--output", tmp_path / "out"), "sft", "another run is writing to --output")
    assert not (tmp_path / "out").exists()


def test_the_second_signal_ends_at_once_and_leaves_the_last_checkpoint(world, tmp_path, run_stage, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    undo = interrupt(monkeypatch, ppo, 4, twice)
    status, _, err = run_stage(ppo, *flags_of("ppo", world), "--output", tmp_path / "out")
    undo()
    assert status == 130 and "interrupted" in err
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Killed(BaseException):
    """SIGKILL runs no clean-up, so the folders are left as they are at that moment."""


def kill_at(monkeypatch, moment):
    """Make the second save, or the end, of the next run stop at this moment as a kill would."""
    calls = {"save": 0}
    save, rename, copytree, replace, write_args = torch.save, pathlib.Path.rename, shutil.copytree, os.replace, folders.write_args

    def die(*arguments, **options):
        monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        raise Killed

    def save_or_die(state, path, **options):
        calls["save"] += 1
        if calls["save"] == 2 and moment == "state":
            pathlib.Path(path).write_bytes(b"half")
            die()
        return save(state, path, **options)

    def rename_or_die(self, target):
        second = calls["save"] == 2 and self.name.endswith(".partial")
        if second and moment == "before the rename" or self.name == "checkpoint-2" and moment == "before the older one goes":
            die()
        renamed = rename(self, target)
        if second and moment == "after the rename" or self.name == "checkpoint-2" and moment == "older one half gone":
            die()
        if self.name == "checkpoint-6" and moment == "end: half gone":
            die()
        return renamed

    def write_args_or_die(folder, cfg, names):
        if names and moment == "end: before the list":
            die()
        write_args(folder, cfg, names)
        if names and moment == "end: after the list":
            die()

    def copytree_or_die(source, target, *arguments, **options):
        if moment == "end: half copied":
            shutil.copyfile(source / "config.json", target / "config.json")
            die()
        return copytree(source, target, *arguments, **options)

    def replace_or_die(source, target):
        replace(source, target)
        if moment == "end: state moved" and pathlib.Path(target).name == "trainer_state":
            die()

    monkeypatch.setattr(torch, "save", save_or_die)
    monkeypatch.setattr(pathlib.Path, "rename", rename_or_die)
    monkeypatch.setattr(folders, "write_args", write_args_or_die)
    monkeypatch.setattr(shutil, "copytree", copytree_or_die)
    monkeypatch.setattr(os, "replace", replace_or_die)
    if moment == "models":
        def half(model, folder, *arguments, **options):
            (pathlib.Path(folder) / "config.json").write_text("{}")
            if calls["save"] == 1:
                die()
            return original(model, folder, *arguments, **options)

        original = PreTrainedModel.save_pretrained
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)


SAVES = ["models", "state", "before the rename", "after the rename", "before the older one goes", "older one half gone"]
ENDS = ["end: before the list", "end: after the list", "end: half copied", "end: state moved", "end: half gone"]


@pytest.mark.parametrize("stage, moment", [("ppo", moment) for moment in SAVES + ENDS] + [("sft", moment) for moment in SAVES + ENDS if moment != "end: state moved"])
def test_a_kill_within_a_save_or_the_end_leaves_a_checkpoint_to_resume_from(stage, moment, world, tmp_path, run_stage, monkeypatch):
    module, output = STAGES[stage], tmp_path / "parts"
    assert run_stage(module, *flags_of(stage, world), "--output", tmp_path / "whole")[0] == 0
    kill_at(monkeypatch, moment)
    with pytest.raises(Killed):
        run_stage(module, *flags_of(stage, world), "--output", output)
    monkeypatch.undo()
    if moment not in ("end: state moved", "end: half gone"):
        status, _, err = run_stage(sft, *flags_of("sft", world), "--model", output, "--output", tmp_path / "next")
        assert status == 2 and f"{output} is not finished" in err.splitlines()[-1]
    clip, steps = module.clip_grad_norm_, []
    monkeypatch.setattr(module, "clip_grad_norm_", lambda *arguments: steps.append(None) or clip(*arguments))
    status, out, err = run_stage(module, "--resume", "--output", output)
    first = {"models": 2, "state": 2, "before the rename": 2}.get(moment, 6 if moment in ENDS else 4)
    assert status == 0 and len(steps) == (6 - first) * (16 if stage == "ppo" else 1), err  # from the checkpoint on, and not from the start
    assert contents(output) == contents(tmp_path / "whole") and sorted(os.listdir(tmp_path)) == ["parts", "whole"]
    assert sorted(os.listdir(output)) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(stage, world, tmp_path, run_stage, monkeypatch):
    module, output, saves = STAGES[stage], tmp_path / "out", []
    save = torch.save

    def full(state, path, **options):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path, **options)

    monkeypatch.setattr(torch, "save", full)
    result = run_stage(module, *flags_of(stage, world), "--output", output)
    assert result[0] == 2 and "No space left on device" in result[2] and f"python {stage}.py --resume --output {output}" in result[2]
    assert "Traceback" not in result[2] and [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(torch, "save", save)
    assert run_stage(module, "--resume", "--output", output)[0] == 0


@pytest.mark.parametrize("damage", ["cut", "pickle", "other flags"])
def test_a_damaged_state_is_refused_and_nothing_in_it_is_run(damage, world, tmp_path, run_stage, monkeypatch):
    undo = interrupt(monkeypatch, sft, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    flags = [*flags_of("sft", world), "--output", tmp_path / "out"]
    run_stage(sft, *flags)
    undo()
    path = tmp_path / "out" / "checkpoint-3" / "trainer_state" / "state.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "pickle":
        class Bomb:
            def __reduce__(self):
                return (pathlib.Path.touch, (tmp_path / "ran",))

        torch.save({"args": Bomb()}, path)
        pickle.loads(pickle.dumps(1))
    else:
        (tmp_path / "out" / "args.json").write_text("[1]")
    words = "can't read" if damage == "other flags" else "can't resume from"
    refused(run_stage(sft, *flags, "--resume"), "sft", words)
    assert not (tmp_path / "ran").exists()


def test_pickle_bombs_in_every_file_that_a_stage_could_read_are_never_run(world, tmp_path, run_stage):
    class Bomb:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "ran",))

    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "model.safetensors", "value_head.safetensors"):
        for source in ("sft", "reward_model"):
            folder = tmp_path / source
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(world / source, folder)
            if name.startswith("pytorch_model"):
                (folder / "model.safetensors").unlink()
            torch.save({"weight": Bomb()}, folder / name)
        for stage in STAGES:
            flags = [str(flag).replace(str(world / "sft"), str(tmp_path / "sft")).replace(str(world / "reward_model"), str(tmp_path / "reward_model")) for flag in flags_of(stage, world)]
            status, _, err = run_stage(STAGES[stage], *flags, "--output", tmp_path / "out", "--overwrite")
            assert status in (0, 2) and "Traceback" not in err
            assert not (tmp_path / "ran").exists(), name


def test_the_saved_state_of_a_reward_models_scale_is_that_of_the_start(world, tmp_path, run_stage, monkeypatch):
    model = tiny_scalar(vocab_size=common.load_causal_lm(str(world / "sft"), common.load_tokenizer(str(world / "sft"))).config.vocab_size, max_position_embeddings=128)
    del model.config.reward_mean, model.config.reward_std
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / "rm")
    flags = [*flags_of("ppo", world), "--reward", tmp_path / "rm"]
    assert run_stage(ppo, *flags, "--output", tmp_path / "whole")[0] == 0
    undo = interrupt(monkeypatch, ppo, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run_stage(ppo, *flags, "--output", tmp_path / "parts")
    undo()
    status, out, _ = run_stage(ppo, "--resume", "--output", tmp_path / "parts")
    assert status == 0 and "scores are taken by mean" not in out  # not measured again
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


@pytest.mark.parametrize("stage", STAGES)
def test_three_gradients_in_a_row_that_are_not_finite_end_the_run_two_do_not(stage, world, tmp_path, run_stage, monkeypatch):
    module, clip = STAGES[stage], STAGES[stage].clip_grad_norm_
    for bad in (2, 3):
        calls, models = [], 2 if stage == "ppo" else 1

        def wrapped(parameters, most):
            parameters = list(parameters)
            step = len(calls) // models
            calls.append(None)
            if (step < bad or step == 4) and len(calls) % models == 1 % models:  # two, then two good ones, then another; of the policy alone
                parameters[0].grad.fill_(float("nan"))
            return clip(parameters, most)

        monkeypatch.setattr(module, "clip_grad_norm_", wrapped)
        status, _, err = run_stage(module, *flags_of(stage, world), "--output", tmp_path / f"out{bad}")
        assert status == (0 if bad == 2 else 2), err
        assert ("three optimizer steps in a row had a gradient that is not finite" in err) == (bad == 3)
    rows = [row for row in read_rows(tmp_path / "out2" / "metrics.jsonl") if "split" not in row]
    assert stage != "ppo" or [row["skipped_steps"] for row in rows] == [3, 0, 0, 0, 0, 0]
    weights = safetensors.torch.load_file(tmp_path / "out2" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("stage, owner, name, phase, when, advice", [
    ("ppo", torch.nn.Module, "to", "loading", "before the first iteration", "use a smaller model"), ("sft", torch.nn.Module, "to", "loading", "before the first iteration", "use a smaller model"),
    ("ppo", common, "generate_responses", "evaluation", "before the first iteration", "halve --microbatch-size; in ppo.py, --batch-size"),
    ("ppo", ppo, "decode_responses", "rollout", "in iteration 1", "halve --batch-size"), ("ppo", ppo, "score_responses", "score", "in iteration 1", "halve --microbatch-size"),
    ("ppo", ppo, "evaluate_tokens", "log-probabilities", "in iteration 1", "halve --microbatch-size"),
    ("ppo", ppo, "policy_loss", "backward", "in iteration 1", "halve --microbatch-size, or try --gradient-checkpointing"),
    ("ppo", torch.optim.Adam, "step", "optimizer step", "in iteration 1", "in ppo.py, --critic shared"),
    ("sft", torch.optim.AdamW, "step", "optimizer step", "in iteration 1", "use a smaller model"),
    ("sft", torch.Tensor, "backward", "backward", "in iteration 1", "halve --microbatch-size, or try"), ("reward_model", reward_model, "preference_loss", "backward", "in iteration 1", "halve --microbatch-size, or try"),
    ("reward_model", reward_model, "score_pairs", "evaluation", "in iteration 6", "halve --microbatch-size"),
])
def test_out_of_memory_names_the_phase_the_sizes_and_what_helps(stage, owner, name, phase, when, advice, world, tmp_path, run_stage, monkeypatch):
    if phase in ("rollout", "score", "log-probabilities", "evaluation") and stage == "ppo":  # these functions serve the evaluation before, too
        original = getattr(owner, name)
        late = lambda *arguments, **options: out_of_memory() if cli.now_in["phase"] == phase else original(*arguments, **options)
        monkeypatch.setattr(owner, name, late)
    else:
        monkeypatch.setattr(owner, name, out_of_memory)
    status, _, err = run_stage(STAGES[stage], *flags_of(stage, world), "--output", tmp_path / "out")
    line = err.strip().splitlines()[-1]
    assert status == 2 and line.startswith(f"{stage}.py: error: out of memory ({phase}, {when}): ") and advice in line, err
    assert phase == "loading" or "--batch-size 8 --microbatch-size" in line and "--max-prompt-length 512" in line
    assert "Tried to allocate 2.00 GiB" in line


def test_sigkill_in_a_real_process_then_resume(world, tmp_path):
    """One of many: tests/kill_and_resume.py does this at random moments for each stage."""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    flags = list(map(str, flags_of("sft", world, "--epochs", 40, "--save-every", 1, "--output", tmp_path / "parts")))
    process = subprocess.Popen([sys.executable, str(ROOT / "sft.py"), *flags], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "parts").glob("checkpoint-?*/trainer_state")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None  # in the middle
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = subprocess.run([sys.executable, str(ROOT / "sft.py"), *flags, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    steps = [row["iteration"] for row in read_rows(tmp_path / "parts" / "metrics.jsonl") if "split" not in row]
    assert steps == list(range(1, 121))
    AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "args.json").read_text())["epochs"] == 40


def rehearse_on_cpu(monkeypatch, cfg, rows):
    """ppo.rehearse as on CUDA; (models, what was run of the policy, phases in order)."""
    fork_rng = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda *arguments, devices=(), **options: fork_rng(*arguments, devices=[], **options))
    monkeypatch.setattr(report, "measured_peak", lambda device: phases.append("told"))
    tokenizer, shapes, phases = common.load_tokenizer(cfg.policy), [], []
    run = types.SimpleNamespace(cfg=cfg, device=types.SimpleNamespace(type="cuda"), phase=phases.append)
    models = ppo.load_models(cfg, tokenizer, rows, torch.device("cpu"))
    optimizer = torch.optim.Adam([*models[0].parameters(), *models[2].parameters()], lr=1.0)
    before = [p.clone() for m in (models[0], models[2]) for p in m.parameters()]
    models[0].model.register_forward_pre_hook(lambda module, arguments, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True)
    random_state = torch.get_rng_state()
    ppo.rehearse(run, *models, optimizer, rows)
    after = [p for m in (models[0], models[2]) for p in m.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True)) and all(p.grad is None for p in after)
    assert torch.equal(random_state, torch.get_rng_state()) and not optimizer.state
    assert models[0].generation_config.eos_token_id == [tokenizer.eos_token_id]
    return models, shapes, phases


def test_the_rehearsal_takes_prompts_of_one_token_and_leaves_everything_as_it_was(world, monkeypatch):
    cfg = ppo.Config(policy=str(world / "sft"), reward=[str(world / "reward_model")], batch_size=4, minibatch_size=2, microbatch_size=1, response_length=1)
    row = rows_.Row(prompt="A")
    row.prompt_ids = [5]
    _, shapes, _ = rehearse_on_cpu(monkeypatch, cfg, [row])
    assert shapes[0] == (4, 1)


def test_the_rehearsal_runs_the_longest_batch_at_full_length_and_names_its_phases(world, monkeypatch):
    prompts = [str(world / "prompts.jsonl")]
    cfg = ppo.Config(policy=str(world / "sft"), reward=[str(world / "reward_model")], batch_size=6, minibatch_size=3, microbatch_size=3, response_length=9, prompts=prompts, eval_prompts=prompts)
    rows, _ = rows_.load_prompts(cfg, common.load_tokenizer(cfg.policy))
    _, shapes, phases = rehearse_on_cpu(monkeypatch, cfg, rows)
    longest = max(len(row.prompt_ids) for row in rows)
    assert shapes[:9] == [(6, longest)] + [(6, 1)] * 8 and shapes[9:] == [(3, longest + 8)] * 3  # sampled at 6; scored twice and trained once at 3
    assert phases == ["optimizer step", "rollout", "score", "log-probabilities", "backward", "told"]


def test_on_a_cpu_nothing_is_rehearsed(monkeypatch):
    monkeypatch.setattr(ppo, "sample_responses", None)
    ppo.rehearse(types.SimpleNamespace(device=torch.device("cpu")), None, None, None, None, None, None)


def test_weights_that_are_not_finite_are_named_and_logits_that_are_not_name_the_iteration(world, tmp_path, run_stage, monkeypatch):
    shutil.copytree(world / "sft", tmp_path / "sft")
    weights = safetensors.torch.load_file(tmp_path / "sft" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, tmp_path / "sft" / "model.safetensors", {"format": "pt"})
    refused(run_stage(ppo, *flags_of("ppo", world, "--policy", tmp_path / "sft"), "--output", tmp_path / "out"), "ppo", "not finite, in model.norm.weight")

    generate, calls = common.generate_responses, []

    def poisoned(model, *arguments, **options):
        calls.append(None)
        if len(calls) == 5:  # the proof and the evaluation of the start, then the third rollout
            model.get_output_embeddings().weight.data.fill_(float("nan"))
        return generate(model, *arguments, **options)

    monkeypatch.setattr(common, "generate_responses", poisoned)
    flags = [*flags_of("ppo", world, "--batch-size", 24, "--minibatch-size", 24), "--output", tmp_path / "out"]
    status, _, err = run_stage(ppo, *flags)
    assert status == 2 and err.strip().splitlines()[-1].startswith("ppo.py: error: sampling failed in iteration 3: the policy's logits are not finite")


def test_paths_in_data_rows_are_never_opened_and_a_run_writes_ordinary_files_in_its_folder(world, tmp_path, run_stage):
    secret = tmp_path / "secret.txt"
    secret.write_text("kept")
    rows = [{"prompt": f"A fox {i}.", "image": str(secret), "path": f"file://{secret}", "prompt_ids": str(secret)} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    status, _, err = run_stage(ppo, *flags_of("ppo", world, "--prompts", tmp_path / "prompts.jsonl"), "--output", tmp_path / "out")
    assert status == 0 and str(tmp_path / "prompts.jsonl") in opened and str(secret) not in opened, err
    files = [path for path in (tmp_path / "out").rglob("*") if not path.is_dir()]
    assert len(files) > 8 and all(path.is_file() and not path.is_symlink() for path in files)
    assert sorted(os.listdir(tmp_path)) == ["out", "prompts.jsonl", "secret.txt"]


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_what_fails_after_the_last_step_loses_no_training(stage, world, tmp_path, run_stage, monkeypatch):
    module, output = STAGES[stage], tmp_path / "out"
    assert run_stage(module, *flags_of(stage, world), "--output", tmp_path / "whole")[0] == 0
    name = {"sft": "evaluate", "reward_model": "score_pairs"}[stage]
    original, calls = getattr(module, name), []

    def fail(*arguments):
        calls.append(None)
        if len(calls) == (2 if stage == "sft" else 1):  # sft evaluates at the start too
            os.kill(os.getpid(), signal.SIGTERM)  # nothing waits for an iteration any more: it stops now
        return original(*arguments)

    monkeypatch.setattr(module, name, fail)
    assert run_stage(module, *flags_of(stage, world), "--output", output)[0] == 130
    clip, steps = module.clip_grad_norm_, []
    monkeypatch.setattr(module, "clip_grad_norm_", lambda *arguments: steps.append(None) or clip(*arguments))
    status, out, err = run_stage(module, "--resume", "--output", output)
    assert status == 0 and not steps and "resumed after 6 iterations" in out, err
    assert contents(output) == contents(tmp_path / "whole") and not (output / "trainer_state").exists() and not list(output.glob("checkpoint-*"))


def test_data_that_have_changed_since_the_run_began_are_noticed(world, tmp_path, run_stage, monkeypatch):
    shutil.copy(world / "sft.jsonl", tmp_path / "data.jsonl")
    flags = [*flags_of("sft", world, "--data", tmp_path / "data.jsonl"), "--output", tmp_path / "out"]
    undo = interrupt(monkeypatch, sft, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run_stage(sft, *flags)
    undo()
    with open(tmp_path / "data.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    status, _, err = run_stage(sft, *flags, "--resume")
    assert status == 2 and "data.jsonl has changed since the run began" in err
