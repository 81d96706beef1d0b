"""The folder of a run, OUTPUT: who may write it, what to go on from, its checkpoints.

OUTPUT holds the logs and, while the run goes on, its newest checkpoint, OUTPUT/checkpoint-N/:
written under another name, handed to the disk and renamed once, so that a kill at any moment leaves
one whole. At the end its files lie in OUTPUT itself. "written" in args.json lists them; whatever
else is in the folder is not touched.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import shutil

import filelock
import safetensors.torch
import torch

import common
from common import UserError, is_out_of_memory
from plumbing import adapters, cli, processes

LOGS = ("metrics.jsonl", "samples.jsonl")
VALUE_HEAD = "value_head.safetensors"  # of a critic that is no model of transformers
CHECKPOINT = r"checkpoint-\d+(\.partial)?"


def claim(cfg):
    """The folder of --output, locked until the end, if this run may write it; else a UserError."""
    output, folder = f"--output {cfg.output}", pathlib.Path(os.path.realpath(cfg.output))
    if processes.RANK > 0:  # rank 0 looks
        return folder
    if pathlib.Path(cfg.output).name in ("", ".."):
        raise UserError(f"--output {cfg.output!r} is no name for a new folder")
    read = [getattr(cfg, name, None) for name in ("model", "policy")]
    for path in filter(None, read + getattr(cfg, "reward", [])):
        if os.path.realpath(path) == str(folder):
            raise UserError(f"{output} is a folder that the run reads; name another")
        if written(path) == [] or written(path) and checkpoints(path):
            raise UserError(f"{path} is not finished; --resume --output {path} goes on with it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{output} is a file; name a folder")
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it; give one of them")
    lock = filelock.FileLock(f"{folder}.lock", blocking=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError):  # a file system without locks
            lock.acquire()  # the system lets go of it even after a kill
    except filelock.Timeout:
        raise UserError(f"another run is writing to {output}; wait or name another") from None
    except OSError as error:
        raise UserError(f"{output} can't be written: {error.strerror}") from None
    cli.at_end += [lambda: pathlib.Path(lock.lock_file).unlink(missing_ok=True), lock.release]
    if folder.exists() and os.listdir(folder):
        if written(folder) is None:
            what = "files of something else, or a run of an earlier version"
            raise UserError(f"{output} holds {what}; name a new folder")
        if not (cfg.resume or cfg.overwrite):
            how = "--resume goes on with it, --overwrite replaces it"
            raise UserError(f"{output} holds a run; {how}")
    for path in folder.glob("checkpoint-*"):  # what a kill has left
        left = path.name.endswith(".partial") or written(folder) and path not in checkpoints(folder)
        if left and re.fullmatch(CHECKPOINT, path.name):
            shutil.rmtree(path, ignore_errors=True)
    return folder


def written(folder):
    """What a run has put into a folder besides its logs; None if no run was here."""
    try:
        text = (pathlib.Path(folder) / "args.json").read_text(encoding="utf-8")
        return [str(name) for name in json.loads(text)["written"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_args(folder, cfg, names):
    """args.json: the flags, and what the run has written; whole or not at all."""
    text = json.dumps(dataclasses.asdict(cfg) | {"written": sorted(map(str, names))}, indent=2)
    (folder / "args.partial").write_text(text, encoding="utf-8")
    os.replace(folder / "args.partial", folder / "args.json")


def checkpoints(folder):
    """The whole checkpoints in a folder, oldest first."""
    states = pathlib.Path(folder).glob("checkpoint-*/trainer_state")
    numbered = {path.parent.name.partition("-")[2]: path.parent for path in states}
    return [numbered[number] for number in sorted(filter(str.isdecimal, numbered), key=int)]


def read_state(folder, cfg, may_change):
    """(folder of the weights, state) that `write_checkpoint` wrote last; (None, {}) if nothing.

    A finished run may have no state but its "args". A UserError says that the state can't be read,
    or that the run began with other flags than may change.
    """
    source = (checkpoints(folder) or [folder])[-1]
    names = [path.name for path in folder.glob("checkpoint-*")]
    if source == folder and written(folder) == [] and names:
        what = f"{folder / names[0]} has lost its trainer_state"
        raise UserError(f"can't resume: {what}; put it back, or start anew with --overwrite")
    path = source / "trainer_state" / "state.pt"
    if source == folder and not written(folder):
        return None, {}
    state = {"args": cli.read_args(folder / "args.json", type(cfg))}
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state["args"], state["step"]
        except Exception as error:  # torch has many
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"can't resume from {path.parent}: {reason}") from None
        for name, size in state["log_sizes"].items():
            if not (folder / name).exists() or (folder / name).stat().st_size < size:
                what = f"{folder / name} is gone or shorter than at the checkpoint"
                raise UserError(f"{what}; put it back, or start anew with --overwrite")
    for name, value in dataclasses.asdict(cfg).items():
        began = state["args"].get(name, value)
        if name not in may_change and began != value:
            raise UserError(
                f"{cli.flag_of(name)} is {value}, but the run in {folder} began with {began}; "
                "leave it out, or start anew with --overwrite. May change: "
                f"{', '.join(sorted(may_change))}"
            )
    return source, state


READS = ("policy", "reward", "judge", "data", "eval_data", "prompts", "eval_prompts")


def fingerprints(cfg):
    """{flag, value: hash} of what the flags name, by content: models with their tokenizer, data
    rows as parsed, the source of functions. A resumed run needs the same under the same names.
    """
    reads = READS if cfg.lora_rank is None else ("model", *READS)  # a checkpoint has its own copy
    given = {name: getattr(cfg, name, None) or [] for name in reads}
    every = [(name, x) for name, v in given.items() for x in ([v] if isinstance(v, str) else v)]
    return {f"{cli.flag_of(name)} {value}": _fingerprint(value) for name, value in every}


def _fingerprint(path):
    digest = hashlib.sha256()
    if re.search(r"\.py:\w+$", path):
        digest.update(pathlib.Path(path.rpartition(":")[0]).read_bytes())
    elif os.path.isfile(path):
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            for line in filter(bytes.strip, file):
                row = json.loads(line.decode("utf-8-sig"))
                digest.update(json.dumps(row, sort_keys=True).encode())
    else:
        folder, base = pathlib.Path(path), common.adapter_base(path)
        if base:
            digest.update(_fingerprint(base).encode())
        else:
            folder = pathlib.Path(common.find_file(path, "config.json") or path).parent
        for file in sorted(folder.glob("*")):
            if file.suffix == ".safetensors":
                _add_blocks(digest, file)
            elif file.name in ("config.json", common.ADAPTER):
                config = json.loads(file.read_text(encoding="utf-8"))
                known = {k: v for k, v in config.items() if k != "transformers_version"}
                digest.update(json.dumps(known, sort_keys=True).encode())
            elif file.name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _add_blocks(digest, file):
    """A weights file: whole up to 1 GB, above that 1,000 evenly spaced blocks, the header first."""
    size, block = file.stat().st_size, 2**20
    digest.update(str(size).encode())
    with open(file, "rb") as opened:
        for start in range(0, size, block if size < 1e9 else size // 1000):
            opened.seek(start)
            digest.update(opened.read(block))


def clear(folder, cfg):
    """Make the folder of a new run: empty logs, and nothing that an earlier one has written."""
    for name in [*(written(folder) or []), *LOGS]:
        (folder / name).unlink(missing_ok=True)
    for path in [*checkpoints(folder), folder / "tensorboard"]:
        remove(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_args(folder, cfg, [])
    (folder / "metrics.jsonl").touch()


def remove(path):
    """Remove a folder, first under a name where nobody looks for a checkpoint."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(path.name + ".partial")), ignore_errors=True)


def write_checkpoint(folder, cfg, models, tokenizer, state, whole={}):
    """OUTPUT/checkpoint-STEP in place of those before it; whole or not at all.

    `models` is {name: model}; the first lies in the folder itself, others in one of their name.
    `state` is what --resume needs besides: tensors, numbers, strings, lists and dicts.
    `whole` is {name of a model: its state dict} of those that are divided.
    """
    target, older = folder / f"checkpoint-{state['step']}", checkpoints(folder)
    partial = folder / f"{target.name}.partial"
    try:
        for name, (model, path) in zip(models, places(models, partial)):
            path.mkdir(parents=True, exist_ok=True)
            if adapters.is_adapted(model):
                adapters.save(model, path)
            elif hasattr(model, "save_pretrained"):
                common.save_model(model, path, whole.get(name))
            else:
                safetensors.torch.save_file(whole.get(name, model.state_dict()), path / VALUE_HEAD)
        tokenizer.save_pretrained(partial)
        logs = [folder / name for name in LOGS if (folder / name).exists()]
        state["log_sizes"] = {log.name: log.stat().st_size for log in logs}
        (partial / "trainer_state").mkdir()
        torch.save(state, partial / "trainer_state" / "state.pt")
        for path in [*partial.rglob("*"), *logs]:  # handed to the disk before the rename
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        kinds = (OSError, RuntimeError, safetensors.SafetensorError)
        if not isinstance(error, kinds) or is_out_of_memory(error):
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise UserError(
            f"can't write {partial} ({free:.0f} MB are free there): {str(error).splitlines()[0]}; "
            "the checkpoint before it, if there was one, is whole: make room and go on with: "
            f"{cli.resume_command(cfg)}"
        ) from error
    partial.rename(target)
    for path in older:
        remove(path)


def places(models, folder):
    """(model, folder) of each model in a checkpoint."""
    return [(models[name], folder / name if i else folder) for i, name in enumerate(models)]


def read_weights(models, folder):
    """Put what `write_checkpoint` wrote of the models back into them."""
    for model, path in places(models, folder):
        try:
            if adapters.is_adapted(model):
                adapters.read(model, path)
            elif hasattr(model, "save_pretrained"):
                common.read_model(model, path)
            else:
                model.load_state_dict(safetensors.torch.load_file(path / VALUE_HEAD))
        except Exception as error:  # transformers, safetensors and torch each have their own
            if is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"can't resume: {path} is damaged: {reason}") from error


def finish(folder, cfg, keep_state):
    """The newest checkpoint's files come to lie in OUTPUT itself; it goes last, with its state."""
    checkpoint, old_state = checkpoints(folder)[-1], folder / "trainer_state"
    for name in written(folder):
        (folder / name).unlink(missing_ok=True)
    files = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    files = [name for name in files if keep_state or name.parts[0] != old_state.name]
    write_args(folder, cfg, files)
    skip_state = shutil.ignore_patterns(old_state.name)
    shutil.copytree(checkpoint, folder, ignore=skip_state, dirs_exist_ok=True)
    if keep_state:
        shutil.rmtree(old_state, ignore_errors=True)
        os.replace(checkpoint / old_state.name, old_state)
    remove(checkpoint)
