"""What a run needs besides RLHF: flags, data files, OUTPUT, checkpoints, logs, several processes.

A reader of PPO can leave this file closed. OUTPUT holds the logs and, while a run is going on, its
newest checkpoint, OUTPUT/checkpoint-N/, which can be loaded as a model folder. It is written under
another name and then renamed, so a kill at any moment leaves one that is complete. At the end its
files are copied into OUTPUT itself. In args.json, "written" lists them; "finished" is set last.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import gc
import gzip
import importlib.util
import itertools
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import warnings
import zlib
from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints

import filelock
import huggingface_hub
import safetensors.torch
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import common
from common import UserError

DATA = pathlib.Path(__file__).resolve().parent / "data"  # the embedded world
IS_TORCHRUN = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if IS_TORCHRUN else 0


# === Flags ========================================================================================
class Range(NamedTuple):  # the values that a flag accepts, both ends included
    low: float
    high: float = math.inf


Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0, 1e9)]
Positive = Annotated[float, Range(1e-9, 1e9)]


def arg(default, help):
    """Returns one flag of a Config: its default and its help."""
    metadata = {"help": help.replace("%", "%%")}
    if isinstance(default, list):  # a flag that takes one or more values
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The flags that all stages share. A stage's Config adds its own."""

    output: str = arg("ckpt/run", "folder for the result and the logs")
    resume: bool = arg(False, "continue the run in --output if there is one")
    overwrite: bool = arg(False, "delete the run in --output and start again")
    save_every: Count = arg(10, "iterations between checkpoints; only the newest is kept")
    seed: Annotated[int, Range(0, 2**32 - 1)] = arg(0, "seed of weights, data order and samples")
    device: str = arg("auto", "cpu, cuda or cuda:1; auto: a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "matmul precision; auto: bf16 on CUDA")
    lora_rank: Count | None = arg(None, "LoRA rank, 8 to 64, needs peft; None: train all")
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, more time")
    log: str | None = arg(None, "file.py:function, called with each row of metrics.jsonl")
    trust_remote_code: bool = arg(False, "run code that comes with a model")
    chat_template_kwargs: str | None = arg(None, 'JSON object, like {"enable_thinking": false}')

    def __post_init__(self):
        """Raises UserError on the first flag outside its Range."""
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for part in (kind, *get_args(kind)):  # in `Count | None` it is a part
                limits = getattr(part, "__metadata__", [None])[0]
                if limits and value is not None and not limits.low <= value <= limits.high:
                    rule = f"from {limits.low:g} to {limits.high:g}"
                    raise UserError(f"{flag_of(name)} is {value}; it must be {rule}")


def stage_name():  # ppo for ppo.py
    return pathlib.Path(sys.argv[0]).stem


def flag_of(name):  # --max-grad-norm for max_grad_norm
    return "--" + name.replace("_", "-")


def parse_args(config_class, description, argv=None):
    """Returns the command line as a `config_class`; a UserError for what does not fit it. With
    --resume, flags that are not given keep the value that the run began with.
    """
    given = sys.argv[1:] if argv is None else argv
    parser = transformers.HfArgumentParser(
        config_class, description=description, usage="%(prog)s [flags]", allow_abbrev=False,
        exit_on_error=False,
    )
    words = [word.split("=")[0].replace("_", "-") for word in given]
    for field in dataclasses.fields(config_class):
        flag = flag_of(field.name)
        if "list" in str(field.type) and words.count(flag) > 1:  # the first would be lost
            raise UserError(f"{flag} is given twice; give all values at once: {flag} A B")
    try:
        namespace, unknown = parser.parse_known_args(given)
        if getattr(namespace, "resume", False):
            saved = read_args(namespace.output)
            stage = saved.pop("stage", stage_name())  # of the script that wrote it
            for name in ("written", "finished", "output", "resume", "overwrite"):
                saved.pop(name, None)
            if stage != stage_name() or saved.keys() - vars(namespace).keys():
                raise UserError(f"{namespace.output} holds a run of another stage or version")
            parser.set_defaults(**saved)
            namespace, unknown = parser.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; --help lists the flags")
    return config_class(**vars(namespace))


def lr_by_size(lr, table, model):
    """Returns `lr` if given, else the rate in `table`, ((parameters below, rate), ...). LoRA gets
    ten times that of the weights it adapts, up to 1e-3: more may ruin the policy in one update.
    """
    if lr is not None:
        return lr
    weights = list(model.parameters())
    frozen = [weight for weight in weights if not weight.requires_grad]
    size = sum(weight.numel() for weight in frozen or weights)
    rate = next(rate for limit, rate in table if size < limit)
    return min(10 * rate, 1e-3) if frozen else rate


def trainable(model):  # all weights, or with --lora-rank the adapters
    return [weight for weight in model.parameters() if weight.requires_grad]


def pick_device(name, flag="--device"):
    """Returns the torch.device of a flag; under torchrun each process takes the next GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and IS_TORCHRUN:
        name = f"cuda:{int(index or 0) + int(os.environ['LOCAL_RANK'])}"
    try:
        if kind not in ("cpu", "cuda", "mps"):
            raise RuntimeError("use auto, cpu, cuda or cuda:1")
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        common.explain(error, f"{flag} {name} can't be used")


def load_function(spec):
    """Returns the function that "file.py:function" names. Each file runs once, as one module. Its
    folder joins the import path, so it can import its neighbours and spawned workers can import it
    (as folder.file if another module has the file's name).
    """
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        raise UserError(f"{spec}: there is no file {path!r}; give file.py:function")
    path = pathlib.Path(path).resolve()
    known = {getattr(module, "__file__", None): module for module in list(sys.modules.values())}
    module = known.get(str(path))
    if module is None:
        sys.path += [str(path.parent), str(path.parent.parent)]
        stem = path.stem.replace(".", "_")
        found = importlib.util.find_spec(stem)  # another one, if the file is called math.py
        is_own = found and found.origin == str(path)
        module_name = stem if is_own else f"{path.parent.name}.{stem}"
        module_spec = importlib.util.spec_from_file_location(module_name, path)
        module = sys.modules[module_name] = importlib.util.module_from_spec(module_spec)
        try:
            with torch.random.fork_rng(devices=[]):  # what it draws does not change the run
                module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise UserError(f"{spec}: {path} fails: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {path} has no function {name}")
    return getattr(module, name)


# === Data files ===================================================================================
class Row(dict):
    """A data row. `path` and `line` are where it stands; `unread` are the keys nobody reads."""

    unread = ()


def read_rows(paths, formats):
    """Returns the rows of JSON Lines files (.jsonl or .jsonl.gz), each a `Row` with all keys of one
    of the `formats`, which are tuples of keys. A UserError names file and line of what is wrong.
    """
    chat = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
    examples = [{key: chat if key == "messages" else "..." for key in keys} for keys in formats]
    hint = "write lines like " + " or ".join(map(json.dumps, examples))
    rows = []
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice")
        num_before = len(rows)
        try:
            with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        rows.append(parse_row(line, formats))
                        rows[-1].path, rows[-1].line = path, number
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"can't read {path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} {error}; {hint}") from None
        if len(rows) == num_before:
            raise UserError(f"{path} has no rows; {hint}")
    return rows


def parse_row(line, formats):
    """Returns the Row of one line. A ValueError's text is to follow "FILE line 3"."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is not text
    except ValueError as error:
        raise ValueError(f"is not JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}, not an object")
    of_formats = set().union(*formats)  # exported tables hold null under keys of other formats
    row = Row({key: x for key, x in row.items() if x is not None or key not in of_formats})
    keys = next((keys for keys in formats if row.keys() >= set(keys)), None)
    if keys is None:
        raise ValueError(f"has the keys {', '.join(map(repr, row)) or '(none)'} (null left out)")
    for key in keys:
        is_text = isinstance(row[key], str) and key != "messages"
        is_chat = isinstance(row[key], list) and row[key] and key != "text"
        for message in row[key] if is_chat else ():
            parts = [isinstance(message, dict) and message.get(x) for x in ("role", "content")]
            is_chat = is_chat and all(isinstance(part, str) for part in parts)
        if not (is_text or is_chat):
            chat = 'messages ({"role": str, "content": str})'
            wanted = {"text": "a string", "messages": chat}.get(key, f"a string or {chat}")
            raise ValueError(f"needs {wanted} under {key!r}")
    if not isinstance(row.get("tools") or [], list):
        raise ValueError(f"has a {type(row['tools']).__name__} under 'tools', not a list")
    row.unread = [key for key in row if key not in (*keys, "tools")]
    return row


def hold_out(rows, most, seed, prompt_of):
    """Returns (training rows, held-out rows): a tenth is held out, at most `most`. Rows with the
    same prompt stay together if they can: a held-out answer to a trained prompt shows little.
    """
    number = min(most, len(rows) // 10)
    if number == 0:
        raise UserError(f"{len(rows)} rows are too few to hold some out; name held-out rows")
    num_duplicates = len(rows) - len(set(map(json.dumps, rows)))
    if num_duplicates:
        print(f"  {num_duplicates} of {len(rows)} rows are duplicates of others")
    together = collections.defaultdict(list)
    for i, row in enumerate(rows):
        together[json.dumps(prompt_of(row))].append(i)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    chosen = {}  # row indices, in order
    for i in order:
        group = together[json.dumps(prompt_of(rows[i]))]
        if len(chosen) < number and len(group) <= number:  # not the one prompt of most rows
            chosen |= dict.fromkeys(group)
    rest = [i for i in order if i not in chosen]
    chosen |= dict.fromkeys(rest[: max(0, number - len(chosen))])
    training = [rows[i] for i in order if i not in chosen]
    held_out = [rows[i] for i in chosen]
    report_overlap(training, held_out, prompt_of)
    return training, held_out


def report_overlap(rows, held_out, prompt_of):
    """Prints how many of the held-out rows' prompts are trained on as well."""
    prompts = {json.dumps(prompt_of(row)) for row in rows}
    number = sum(json.dumps(prompt_of(row)) in prompts for row in held_out)
    if number:
        print(f"  {number} of {len(held_out)} held-out rows have a prompt that is trained on too")


def convert(rows, encode, name=None):
    """Returns the examples that `encode` makes of all rows; prints what was dropped, and why.
    `encode(row)` yields examples, or why one is dropped. Its ValueError gets file and line.
    """
    made = []
    common.notes.clear()
    for row in tqdm(rows, desc="tokenize", delay=2, leave=False):
        try:
            made += encode(row)
        except ValueError as error:
            raise UserError(f"{row.path} line {row.line} {error}") from error
    examples = [example for example in made if not isinstance(example, str)]
    dropped = collections.Counter(reason for reason in made if isinstance(reason, str))
    name = name or " ".join(dict.fromkeys(row.path for row in rows))
    notes = "".join(f"; {number} dropped ({reason})" for reason, number in dropped.items())
    if not examples:
        raise UserError(f"{name}: {len(rows)} rows read and none can be used{notes}")
    notes += "".join(f"; {number} {what}" for what, number in common.notes.items())
    unread = dict.fromkeys(key for row in rows for key in row.unread)
    notes += f"; keys that are not read: {', '.join(map(repr, unread))}" if unread else ""
    print(f"  {name}: {len(rows)} rows read, {len(examples)} examples used{notes}")
    return examples


def too_long(cfg, prompt_ids, response_ids=()):
    """Returns why an example is dropped, or None. A cut example would teach never to stop."""
    if len(prompt_ids) > cfg.max_prompt_length:
        return f"prompt above --max-prompt-length {cfg.max_prompt_length}"
    if len(response_ids) > cfg.response_length:
        return f"response above --response-length {cfg.response_length}"


# === Processes ====================================================================================
def join_processes(cfg, device):
    """Joins the other processes of torchrun: NCCL on GPUs, gloo on CPUs. Each holds all models and
    takes its share of the rows (`common.share`) through them; sums (`common.total`,
    `sum_over_processes`) give every process the result that one alone would have.
    """
    if not IS_TORCHRUN:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            print("  WORLD_SIZE is set but torchrun is not used: this process trains alone")
        return
    num_rows = getattr(cfg, "minibatch_size", cfg.batch_size)
    if num_rows < int(os.environ["WORLD_SIZE"]):
        raise UserError(f"more processes than the {num_rows} rows of an optimizer step; use fewer")
    options = {"timeout": datetime.timedelta(days=1)}  # others may wait long for a reward function
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)


def sum_over_processes(models, numbers):
    """Sums the models' gradients in place and returns the sums of `numbers`, a dict of scalars."""
    if not dist.is_initialized():
        return numbers
    for model in models:
        for weight in trainable(model):
            if weight.grad is None:  # this process had no rows
                weight.grad = torch.zeros_like(weight)
            common.total(weight.grad)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in numbers.values()]
    return dict(zip(numbers, common.total(torch.stack(values)).unbind()))


def greatest(number):
    """Returns the greatest of the integers that all processes call this with; waits for all."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


# === OUTPUT =======================================================================================
def read_args(folder):
    """Returns the args.json of a run's folder as a dict; empty if there is none."""
    try:
        saved = json.loads((pathlib.Path(folder) / "args.json").read_text(encoding="utf-8"))
        return saved if "written" in saved else {}
    except (OSError, ValueError, TypeError):
        return {}


def flush(path):  # to disk, so that a crash of the machine can't lose it after a rename
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def checkpoints(folder):
    """Returns the folders of complete checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def remove_checkpoint(path):  # renamed first: a kill leaves no broken checkpoint
    shutil.rmtree(path.rename(path.with_name(path.name + ".partial")), ignore_errors=True)


def checksum(path):
    """Returns a checksum of an input's files: names, sizes and last 64 KB. A hub id has none."""
    path = pathlib.Path(re.sub(r"\.py:\w+$", ".py", path))
    kinds = (".safetensors", ".json", ".jinja", ".model")
    files = [path] if path.is_file() else sorted(path.glob("*"))
    result = 0
    for file in files:
        if file == path or file.suffix in kinds and file.name != "args.json":
            size = file.stat().st_size
            with open(file, "rb") as opened:
                opened.seek(max(0, size - 2**16))
                result = zlib.crc32(f"{file.name} {size}".encode() + opened.read(), result)
    return result


# === A run ========================================================================================
# Flags that --resume may change, in every stage: nothing but rounding depends on them.
MAY_CHANGE = (
    "output", "resume", "overwrite", "microbatch_size", "save_every", "log", "device",
    "gradient_checkpointing", "trust_remote_code",
)
INPUTS = ("model", "policy", "reward", "judge", "data", "eval_data", "prompts", "eval_prompts")
LOGS = ("metrics.jsonl", "samples.jsonl")
LOCK = "run.lock"  # in OUTPUT while a run writes to it
# Of this process's run; "signals" are those that wait while a process is forked.
current = {"phase": "loading", "lock": None, "signals": ()}


# A pool in a reward function ends its forked workers by SIGTERM. A new worker still has the run's
# handler, and Python loses a signal that comes before the handler can run: the pool would wait for
# ever. So SIGTERM is blocked during a fork and has its default action in the worker.
def before_fork():
    signal.pthread_sigmask(signal.SIG_BLOCK, current["signals"])


def after_fork():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, current["signals"])


def start_worker():
    if current["signals"]:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    after_fork()
    current["signals"] = ()
    current["lock"] = None  # it is the parent's


if hasattr(os, "register_at_fork"):  # Windows forks nothing
    os.register_at_fork(
        before=before_fork, after_in_parent=after_fork, after_in_child=start_worker
    )


class Run:
    """One run of a stage, in the order of use: Run(), restore(), then for each of steps(): phase(),
    may_step(), log() and save_if_due(); at last finish().

    `may_change` are more flags that --resume may change. If a run can be extended (by a higher
    --iterations), its state is kept after the end. `done` is the number of steps (in ppo.py
    iterations) done before, `kept` what `save_if_due` was given then and a chosen micro-batch size.
    """

    def __init__(self, cfg, may_change=(), can_be_extended=False):
        transformers.set_seed(cfg.seed)
        self.cfg = cfg
        self.device = pick_device(cfg.device)
        if self.device.type == "cpu" and cfg.dtype == "auto":  # float32, the same on every machine
            can = torch.cpu.get_capabilities()
            if can.get("avx512_bf16") or can.get("amx_bf16"):
                print("  this CPU has bf16 instructions: --dtype bf16 can be twice as fast")
        join_processes(cfg, self.device)
        self.folder = pathlib.Path(os.path.realpath(cfg.output))
        self.logger = load_function(cfg.log) if cfg.log else None
        self.can_be_extended = can_be_extended
        self.inputs = {}
        self.step = 0
        self.warned = set()
        self.stop_signal = 0
        self.skipped_in_a_row = 0
        self.generator = torch.Generator()
        self.seconds = collections.Counter()
        self.entered = ("loading", time.perf_counter())
        current["phase"] = "loading"
        self.check_inputs()
        if RANK == 0:
            self.claim()
        saved = read_args(self.folder) if cfg.resume else {}
        self.state = self.read_state(saved, {*MAY_CHANGE, *may_change}) if saved else {}
        self.done = self.state.get("step", 0)
        self.kept = self.state.get("kept", {})
        can_go_on = can_be_extended and self.done < cfg.iterations
        if saved.get("finished") and not can_go_on:
            how = "a higher --iterations continues it, " if can_be_extended else ""
            print(f"  the run in {cfg.output} is finished; {how}--overwrite starts again")
            for path in checkpoints(self.folder) if RANK == 0 else ():  # a kill has left it
                remove_checkpoint(path)
            sys.exit(0)  # a job that is started again has nothing to do
        greatest(0)  # all processes have looked before the first one writes

    def check_inputs(self):
        """Notes the checksums of all inputs; refuses OUTPUT itself and unfinished runs."""
        for name in INPUTS:
            values = getattr(self.cfg, name, None) or []
            for value in [values] if isinstance(values, str) else values:
                if os.path.realpath(value) == str(self.folder):
                    raise UserError(f"--output {self.cfg.output} is a folder that the run reads")
                if read_args(value).get("finished") is False:
                    how = f"--resume --output {value} continues it"
                    raise UserError(f"{value} is not finished; {how}")
                self.inputs[f"{flag_of(name)} {value}"] = checksum(value)

    def claim(self):
        """Locks OUTPUT: a new folder or, with --resume or --overwrite, one that holds a run."""
        output = f"--output {self.cfg.output}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / LOCK, blocking=False)
            lock.acquire()  # the system releases it even after a kill
        except filelock.Timeout:
            raise UserError(f"another run is writing to {output}; wait or name another") from None
        except OSError as error:
            raise UserError(f"{output} can't be written: {error.strerror}") from None
        current["lock"] = lock  # for run_stage to release
        saved = read_args(self.folder)
        if not saved and {*os.listdir(self.folder)} - {LOCK, "args.partial"}:
            raise UserError(f"{output} holds files of something else; name a new folder")
        if saved and self.cfg.resume == self.cfg.overwrite:
            raise UserError(f"{output} holds a run; give --resume to continue or --overwrite")
        for path in self.folder.glob("checkpoint-*.partial"):  # left by a kill
            shutil.rmtree(path, ignore_errors=True)

    def read_state(self, saved, may_change):
        """Returns the newest state or {}. Refuses changed inputs, and flags not in `may_change`."""
        for name, value in vars(self.cfg).items():
            began = saved.get(name, value)
            if name not in may_change and began != value:
                what = f"{flag_of(name)} is {value}, but the run began with {began}"
                raise UserError(f"{what}; leave it out, or start again with --overwrite")
        folder = (checkpoints(self.folder) or [self.folder])[-1]
        if folder == self.folder and not (folder / "state.pt").exists():
            return {}
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch has many kinds
            common.explain(error, f"can't resume {folder}")
        for name, size in state["log_sizes"].items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size < size:
                raise UserError(f"can't resume: {path} is gone or shorter than it was")
        for what, value in state["inputs"].items():
            if self.inputs.get(what, value) != value:
                raise UserError(f"{what} has changed since the run began: put it back")
        return state

    def restore(self, tokenizer, models, optimizer, schedule):
        """Registers what to save, loads a resumed run's state into it, and opens the logs.
        `models` is {name: model}. Nothing is written before this.
        """
        self.tokenizer = tokenizer
        self.models = models
        self.optimizer = optimizer
        self.schedule = schedule
        state = self.state
        self.state = {}
        self.history = []  # the rows of metrics.jsonl without a "split"
        optimizer.state.clear()  # of a dry run
        if self.done:
            for name, model in models.items():
                model.load_state_dict(state["weights"][name], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            schedule._last_lr = schedule.get_lr()  # the run may be longer now
            for group, lr in zip(optimizer.param_groups, schedule.get_last_lr()):
                group["lr"] = lr
            random.setstate(state["random"])
            torch.set_rng_state(state["torch_random"])
            print(f"  resumed after {self.done} iterations")
        if RANK > 0:
            return
        written = read_args(self.folder).get("written", [])
        self.write_args(written, False)
        if not self.done:  # new, or nothing was saved yet
            for name in [*written, *LOGS]:
                (self.folder / name).unlink(missing_ok=True)
            for path in checkpoints(self.folder):
                remove_checkpoint(path)
            self.write_args([], False)
        for name, size in state.get("log_sizes", {}).items():
            os.truncate(self.folder / name, size)  # rows after the checkpoint will come again
        log = self.folder / "metrics.jsonl"
        log.touch()
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        self.history = [row for row in rows if "split" not in row]

    def own_generator(self):  # of the loop: what a reward function draws does not change it
        self.generator.set_state(self.state.get("generator", torch.get_rng_state()))
        return self.generator

    def write_args(self, names, is_finished):  # whole or not at all
        args = dataclasses.asdict(self.cfg) | {"written": names, "finished": is_finished}
        args["stage"] = stage_name()
        partial = self.folder / "args.partial"
        partial.write_text(json.dumps(args, indent=2), encoding="utf-8")
        flush(partial)
        os.replace(partial, self.folder / "args.json")

    def steps(self, batches, num_steps):
        """Yields (step, batch) of all steps to do; the batches of steps done are drawn and skipped.
        Ctrl-C and SIGTERM finish the step, save and stop; the same signal again stops at once.
        """

        def ask_to_stop(number, frame):
            if not IS_TORCHRUN:  # which repeats the signal by itself
                signal.signal(number, signal.SIG_DFL)
            if not self.stop_signal and RANK == 0:
                os.write(2, b"\nstopping after this iteration\n")
            self.stop_signal = number

        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, ask_to_stop) for number in signals}
        current["signals"] = (signal.SIGTERM,)
        self.num_steps = num_steps
        script = sys.argv[0]
        batches = itertools.islice(batches, self.done, num_steps)
        self.bar = tqdm(batches, stage_name(), num_steps, initial=self.done)
        try:
            for self.step, batch in enumerate(self.bar, self.done + 1):
                self.seconds.clear()
                self.num_skipped = 0
                self.entered = ("step", time.perf_counter())
                yield self.step, batch
                if self.stopping and self.step < num_steps:
                    self.bar.close()
                    command = shlex.join([script, "--resume", "--output", self.cfg.output])
                    start = "torchrun ..." if IS_TORCHRUN else "python"
                    print(f"\nstopped; to go on: {start} {command}", file=sys.stderr)
                    sys.exit(128 + self.stopping)
        finally:
            current["signals"] = ()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def phase(self, name):
        """Begins a phase: its seconds are counted. Returns the seconds of this step's phases."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        last, since = self.entered
        self.entered = (name, time.perf_counter())
        self.seconds[last] += self.entered[1] - since
        current["phase"] = name
        return self.seconds

    def may_step(self, grad_norm):
        """Returns whether the gradient is finite; three in a row that are not end the run."""
        self.phase("optimizer step")
        is_finite = bool(torch.as_tensor(grad_norm).isfinite())
        self.num_skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 3:
            what = "three optimizer steps in a row had a gradient that is not finite"
            raise UserError(f"{what}: --lr is too high, or rewards are enormous")
        return is_finite

    def log(self, row, shown=()):
        """Adds a row to metrics.jsonl and shows the keys `shown` beside the progress bar."""
        self.append("metrics.jsonl", row)
        if self.logger and RANK == 0:
            try:
                self.logger(dict(row))
            except (Exception, SystemExit) as error:
                what = f"{type(error).__name__}: {error}"
                raise UserError(f"--log {self.cfg.log} failed: {what}") from error
        if "split" not in row:
            self.history.append(row)
            numbers = {key: f"{row[key]:.3g}" for key in shown if row.get(key) is not None}
            self.bar.set_postfix(numbers, refresh=False)

    def append(self, name, row):
        """Adds a row to a log file. A number that is not finite becomes null."""
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row = row | {key: None}
        if RANK == 0:
            try:
                with open(self.folder / name, "a", encoding="utf-8", errors="replace") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except OSError as error:
                raise UserError(f"can't write {self.folder / name}: {error.strerror}") from None

    def warn(self, symptom, message):
        """Prints a warning above the progress bar, once for each symptom."""
        if symptom not in self.warned:
            self.bar.write(f"warning, iteration {self.step}: {message}")
            self.warned.add(symptom)

    def is_due(self, every):  # in this step
        return self.step == self.num_steps or self.step % every == 0

    def save_if_due(self, kept):
        """Writes a checkpoint every --save-every steps, at the last step, and before a stop: models
        as Hugging Face folders, the first one at the top, and state.pt, with the loop's `kept`.
        """
        self.stopping = greatest(self.stop_signal)  # a signal may reach one process before another
        if not (self.is_due(self.cfg.save_every) or self.stopping):
            return
        self.phase("checkpoint")
        if RANK > 0:
            return
        partial = self.folder / f"checkpoint-{self.step}.partial"
        logs = [self.folder / name for name in LOGS if (self.folder / name).exists()]
        state = {
            "step": self.step, "kept": self.kept | kept, "inputs": self.inputs, "weights": {},
            "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
            "random": random.getstate(), "torch_random": torch.get_rng_state(),
            "generator": self.generator.get_state(),
            "log_sizes": {log.name: log.stat().st_size for log in logs},
        }
        for name, model in self.models.items():
            trained = [(key, w) for key, w in model.named_parameters() if w.requires_grad]
            state["weights"][name] = {key: w.detach() for key, w in trained}
        try:
            for i, (name, model) in enumerate(self.models.items()):
                common.save_model(model, partial / name if i else partial)
            self.tokenizer.save_pretrained(partial)
            torch.save(state, partial / "state.pt")
            mode = (partial / "state.pt").stat().st_mode  # by the umask; safetensors writes 0600
            for path in [*partial.rglob("*"), *logs]:
                if path.is_file():
                    path.chmod(mode)
                    flush(path)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            common.explain(error, f"can't write {partial} (the checkpoint before it is complete)")
        partial.rename(partial.with_suffix(""))
        for path in checkpoints(self.folder)[:-1]:
            remove_checkpoint(path)

    def finish(self):
        """Moves the last checkpoint into OUTPUT itself. If interrupted, --resume does it again."""
        if RANK > 0:
            return
        last = checkpoints(self.folder)[-1]
        names = [str(path.relative_to(last)) for path in last.rglob("*") if path.is_file()]
        if not self.can_be_extended:
            names.remove("state.pt")
        self.write_args(names, False)
        for name in names:
            (self.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(last / name, self.folder / name)
            flush(self.folder / name)
        self.write_args(names, True)
        remove_checkpoint(last)


def adamw_with_cosine(cfg, model, table, num_steps):
    """Returns (AdamW, a schedule from 0 up to the learning rate and by a cosine down to 0)."""
    lr = lr_by_size(cfg.lr, table, model)
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=cfg.weight_decay, fused=True)
    num_warmup = round(cfg.warmup * num_steps)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, num_warmup, num_steps)
    return optimizer, schedule


def choose_microbatch_size(run, optimizer, default, largest, try_size):
    """Returns --microbatch-size; if it is not given, on CUDA the fastest that fits, else `default`.

    `try_size(size)` takes `size` of the longest rows through a forward and a backward pass, without
    waiting for other processes. On CUDA it is called beside tensors of the size of Adam's moments,
    which then stay until `Run.restore`. A resumed run keeps the size that it has once chosen.
    """
    if run.device.type != "cuda":
        return run.cfg.microbatch_size or default
    run.phase("optimizer step")
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
            optimizer.state[weight] = {"moments": torch.stack([weight.grad, weight.grad])}
    run.phase("backward")
    size = run.cfg.microbatch_size or run.kept.get("microbatch_size")
    if size is None:
        size = -greatest(-fastest_size(run, largest, try_size))  # the smallest of all processes
        if size == 0:
            remedy = "give --gradient-checkpointing, --lora-rank or, in ppo.py, --critic shared"
            raise UserError(f"out of memory with a micro-batch of a single row: {remedy}")
        run.kept["microbatch_size"] = size
        print(f"  micro-batch size {size}, chosen by the dry run")
    else:
        try_size(min(size, largest))  # if memory is short, it runs out now
    optimizer.zero_grad()
    return size


def fastest_size(run, largest, try_size):
    """Returns the fastest micro-batch size that fits this process's GPU, or 0. Sizes double up to
    `largest` while 15 % of the memory stays free and rows per second rise by more than 5 %.
    """
    fastest = 0
    most = 0.0  # rows per second; all rows are equally long
    for size in [2**i for i in range((largest - 1).bit_length())] + [largest]:  # 1, 2, 4, ...
        speed = 0.0  # stays 0 if memory runs out
        try:
            try_size(size)  # warms up
            run.phase("backward")
            run.seconds.clear()
            try_size(size)
            speed = size / run.phase("backward")["backward"]
        except torch.OutOfMemoryError:
            pass  # here the traceback still holds tensors, so memory is freed below
        free, total = torch.cuda.mem_get_info(run.device)  # bytes
        torch.cuda.empty_cache()  # what this size took must not count for the next
        if speed <= 1.05 * most or (fastest and free < 0.15 * total):
            break
        fastest = size
        most = speed
    gc.collect()
    torch.cuda.empty_cache()
    return fastest


# === The screen ===================================================================================
def print_models(models):
    """Prints a line about each (role, model), and the memory of all weights together."""
    weights = set()
    for role, model in models:
        own = list(model.parameters())
        size = sum(weight.numel() for weight in own) / 1e6
        num_trained = sum(weight.numel() for weight in trainable(model)) / 1e6
        state = f"{num_trained:.3f} M trained" if 0 < num_trained < size else "trained"
        state = state if num_trained else "frozen"
        dtypes = "+".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in own}))
        print(f"  {role:<14}{type(model).__name__:<34}{size:>10.3f} M  {dtypes:<18}{state}")
        weights.update(own)  # those that two models share count once
    gb = sum(weight.nbytes * (4 if weight.requires_grad else 1) for weight in weights) / 1e9
    print(f"  weights, gradients and Adam's moments take {gb:.3g} GB")


def print_steps(cfg, num_examples, num_held_out, num_steps, optimizer):
    """Prints the arithmetic of the batches and the learning rate of the first two stages."""
    print(
        f"  {num_examples} examples, {num_held_out} held out; {cfg.epochs} epochs in batches of "
        f"{cfg.batch_size} = {num_steps} optimizer steps\n"
        f"  peak lr {optimizer.defaults['lr']:g} (by model size, unless --lr is given)"
    )


def print_tokens(tokenizer, model, prompt_ids, response_ids=()):
    """Prints the special tokens, and one row token by token: a doubled BOS or a lost EOS shows."""
    eos_ids = common.eos_token_ids(tokenizer, model)
    eos = ", ".join(f"{id} {tokenizer.convert_ids_to_tokens(id)}" for id in eos_ids)
    print(f"  EOS {eos}; pad {tokenizer.pad_token_id} {tokenizer.pad_token}; one row:")
    parts = [[token_text(tokenizer, id) for id in ids] for ids in (prompt_ids, response_ids)]
    line = "  =>  ".join("|".join(part) for part in parts if part).replace("\n", "\\n")
    print(wrapped(f"    {line if len(line) <= 240 else f'{line[:150]} ... {line[-80:]}'}"))


def token_text(tokenizer, id):
    """Returns a token's text; where that is no whole character, its name in the vocabulary."""
    once = tokenizer.decode([id])  # alone a token may lose its leading space
    text = tokenizer.decode([id, id])[len(once) :]
    return tokenizer.convert_ids_to_tokens(id) if "\ufffd" in text else text


def wrapped(text):
    """Returns a text with lines of at most 100 columns."""
    lines = [textwrap.fill(line, 100, subsequent_indent="      ") for line in text.splitlines()]
    return "\n".join(lines)


def peak_memory(device):
    """Returns the most bytes held so far: by tensors on CUDA, else by the process, or None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = pathlib.Path("/proc/self/status")  # getrusage also counts what the parent process held
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return found and int(found[1]) * 1024


class Stream:
    """An output stream. The run goes on after its reader is gone (`| head`), or if it is closed."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")  # a terminal that is not UTF-8

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(ValueError, OSError):  # Python flushes once more at its exit
                number = self.stream.fileno()
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return len(text)

    def flush(self):
        pass


REMEDIES = {  # {phase in which memory ran out: what helps}; else a smaller --microbatch-size does
    "loading": "use a smaller model or --lora-rank",
    "rollout": "halve --batch-size",
    "backward": "halve --microbatch-size, or give --gradient-checkpointing or --lora-rank",
    "optimizer step": "give --lora-rank, or in ppo.py --critic shared",
}


def run_stage(main, config_class, description):
    """Runs main(cfg) as a command. What the user can mend ends with one line and status 2."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream(streams[0]), Stream(streams[1])
    errors = sys.stderr
    if RANK > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        main(parse_args(config_class, description))
    except (UserError, OSError, ModuleNotFoundError, RuntimeError, MemoryError) as error:
        text = str(error)
        if common.is_out_of_memory(error):
            remedy = REMEDIES.get(current["phase"], "halve --microbatch-size")
            text = f"out of memory ({current['phase']}): {remedy}; {(text.splitlines() or [''])[0]}"
        elif isinstance(error, RuntimeError):
            raise
        script = pathlib.Path(sys.argv[0]).name + (f": process {RANK}" if RANK else "")
        if RANK == 0 or dist.is_initialized():
            print(f"{script}: error: {' '.join(text.split())}", file=errors)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if lock := current["lock"]:
            with contextlib.suppress(OSError):  # an OUTPUT without files goes, too
                os.unlink(lock.lock_file)
                os.rmdir(os.path.dirname(lock.lock_file))
            lock.release()
            current["lock"] = None
        sys.stdout, sys.stderr = streams
