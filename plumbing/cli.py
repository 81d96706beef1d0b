"""A stage's Config dataclass as its command line, and one line in place of every traceback."""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import warnings
from dataclasses import dataclass
from typing import Literal

import huggingface_hub
import torch
import transformers

from common import UserError, is_out_of_memory
from plumbing import processes

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"  # the embedded world
flag_of = lambda name: "--" + name.replace("_", "-")  # --max-grad-norm of max_grad_norm


# === Flags ========================================================================================
def arg(default, help, low=None, high=None, heading=None):
    """One flag: its default, its help, its least and greatest value; `heading` opens a group."""
    metadata = {"help": help.replace("%", "%%"), "range": (low, high), "heading": heading}
    if isinstance(default, list):  # a flag that takes one or more values
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """The flags that all stages share; a stage's Config adds its own."""

    output: str = arg("ckpt/run", "folder for the result and the logs", heading="run")
    resume: bool = arg(False, "go on with the run in --output, if there is one")
    overwrite: bool = arg(False, "start anew although --output holds a run")
    save_every: int = arg(500, "optimizer steps between checkpoints", 1)
    seed: int = arg(0, "of all that is drawn: weights, data order, samples", 0, 2**32 - 1)
    device: str = arg("auto", "cpu, cuda, cuda:1; auto is a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "of matrix products; bf16 on CUDA")
    lora_rank: int | None = arg(None, "train adapters of this rank by peft; 8 to 64", 1)
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, more time")
    tensorboard: bool = arg(False, "write the metrics for TensorBoard too, if it is installed")
    trust_remote_code: bool = arg(False, "run code that comes with a model")
    chat_template_kwargs: str | None = arg(None, "JSON, told to the chat template; see README")

    @property
    def of_tokenizer(self):
        """What `common.load_tokenizer` takes of the flags."""
        chat_kwargs = self.chat_template_kwargs
        return {"trust_remote_code": self.trust_remote_code, "chat_kwargs": chat_kwargs}


class _Parser(transformers.HfArgumentParser):
    def error(self, message):
        raise UserError(message)

    def _parse_dataclass_field(self, parser, field):  # argparse must not see range and heading
        if field.metadata["heading"]:
            self.group = self.add_argument_group(field.metadata["heading"])
        field = copy.copy(field)
        field.metadata = {"help": field.metadata["help"]}
        super()._parse_dataclass_field(self.group, field)
        flag = self._actions[-1]
        flag.metavar = None if flag.choices else flag.type.__name__.upper()
        if flag.default not in (None, False):
            default = flag.default if isinstance(flag.default, list) else [flag.default]
            default = " ".join(map(str, default)).replace(f"{DATA.parent}{os.sep}", "")
            flag.help += f" (default: {default})"

    def format_help(self):  # flags are also taken with underscores and as --resume true
        for flag in self._actions:
            flag.option_strings = [name for name in flag.option_strings if "_" not in name]
            flag.nargs = 0 if flag.nargs == "?" else flag.nargs
        return super().format_help()


def parse_args(config_class, description, argv=None):
    """The command line as a `config_class`, a frozen dataclass of `arg` fields.

    With --resume, the flags that are not given are those that the run began with.

    Raises:
        UserError: an unknown flag (the nearest one is named), a wrong type, one not offered.
    """
    parser = _Parser(
        config_class, description=description, allow_abbrev=False,
        usage=f"python {pathlib.Path(sys.argv[0]).name} [flags]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
    )
    given = sys.argv[1:] if argv is None else argv
    flags = {flag_of(field.name): field.type for field in dataclasses.fields(config_class)}
    names = [word.split("=")[0].replace("_", "-") for word in given if word.startswith("--")]
    for flag, kind in flags.items():  # of flags that take one value, the last one counts
        if "list" in str(kind) and names.count(flag) > 1:
            raise UserError(f"{flag} is given twice; give all its values at once: {flag} A B")
    namespace, unknown = parser.parse_known_args(given)
    saved = pathlib.Path(namespace.output) / "args.json"
    if getattr(namespace, "resume", False) and saved.is_file():
        parser.set_defaults(**read_args(saved, config_class))
        namespace, unknown = parser.parse_known_args(given)
    if unknown:
        nearest = difflib.get_close_matches(unknown[0].replace("_", "-"), flags, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the flags"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    if [] in vars(namespace).values():  # argparse makes this of --lr=--
        raise UserError("-- is no value for a flag")
    return config_class(**vars(namespace))


def read_args(path, config_class):
    """The flags in an args.json as a dict, but for those that say where and how a run starts."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(config_class)}
        if unknown := saved.keys() - names - {"written"}:
            raise ValueError(f"flags of another stage or version ({', '.join(sorted(unknown))})")
        names -= {"output", "resume", "overwrite"}
        return {name: value for name, value in saved.items() if name in names}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"can't read {path}: {error}; start anew with --overwrite") from None


def check_ranges(cfg):
    """Stop on the first flag below or above what its `arg` allows; None is not checked."""
    for field in dataclasses.fields(cfg):
        value, (low, high) = getattr(cfg, field.name), field.metadata["range"]
        high = math.inf if high is None else high
        if value is not None and low is not None and not low <= value <= high:
            rule = f"at least {low}" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"{flag_of(field.name)} is {value}; it must be {rule}")


def by_size(value, table, model):
    """`value` if given, else the learning rate of `table`, ((parameters below, rate), ...), for the
    model. Adapters take ten times the rate of the weights that they stand for, up to 1e-3: beyond,
    a first update of PPO may ruin the policy, the sooner the higher the rank.
    """
    if value is not None:
        return value
    size = sum(weight.numel() for weight in model.parameters())
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    has_adapters = 0 < frozen < size
    size = frozen if has_adapters else size
    rate = next(rate for limit, rate in table if size < limit)
    return min(10 * rate, 1e-3) if has_adapters else rate


def trainable(model):
    """The weights of a model that are trained: all, or with --lora-rank few."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def pick_device(name, flag="--device"):
    """The torch.device of a flag; 'auto' is the first CUDA GPU, or else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"{flag} {name} is not known; use auto, cpu, cuda or cuda:1")
    try:
        return torch.zeros(1, device=processes.device_of(name)).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"{flag} {name} can't be used: {reason}") from None


def warn_of_bf16(cfg, device):
    """bf16 is slower than float32 where it is only imitated: older CPUs; T4, V100."""
    if device.type == "cuda":
        has_bf16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        is_wanted = cfg.dtype != "float32"
    else:
        known = torch.cpu.get_capabilities().items()
        has_bf16 = any(value for name, value in known if "bf16" in name)
        is_wanted = cfg.dtype == "bf16" and device.type == "cpu"
    if is_wanted and not has_bf16:
        kind = {"cuda": "GPU", "cpu": "CPU"}[device.type]
        print(f"  warning: this {kind} has no bf16 instructions; --dtype float32 is faster here")


# === Errors =======================================================================================
ADVICE = {  # {phase of a run: what helps if memory runs out in it}
    "loading": "use a smaller model or a device with more", "rollout": "halve --batch-size",
    "score": "halve --microbatch-size", "log-probabilities": "halve --microbatch-size",
    "backward": "halve --microbatch-size, or try --gradient-checkpointing",
    "optimizer step": "use a smaller model; in ppo.py, --critic shared",
    "evaluation": "halve --microbatch-size; in ppo.py, --batch-size",
    "checkpoint": "use a smaller model or a device with more",
}
SIZES = ("batch_size", "microbatch_size", "max_prompt_length", "response_length")
now_in = {}  # the "phase" that the run is in, its "step" and "cfg": errors name them
at_end = []  # functions to call when the command ends, however it does
at_error = []  # functions to call when it ends with an error of the user's; each says what it did


class _Deaf:
    """A stream whose reader may go away (`| head`): what is printed then is lost, and no more."""

    def __init__(self, stream):
        self.stream, self.closed_early = stream, False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _try(self, method, *arguments):
        with contextlib.suppress(BrokenPipeError, ValueError):  # by its reader; by a user's code
            return None if self.closed_early else method(*arguments)
        self.closed_early = True
        with contextlib.suppress(ValueError):  # for Python's last flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text):
        return self._try(self.stream.write, text) or len(text)

    def flush(self):
        self._try(self.stream.flush)


@contextlib.contextmanager
def command_line():
    """Run a stage as a command: quiet libraries, and one line in place of a traceback."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    script = pathlib.Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 is no error
    now_in.update(phase="loading", step=0, cfg=None)
    at_error.clear()
    streams = sys.stdout, sys.stderr
    quiet = [open(os.devnull, "w")] * 2 if processes.RANK > 0 else streams
    sys.stdout, sys.stderr = map(_Deaf, quiet)
    try:
        try:
            yield
            processes.part()
        except SystemExit:  # of a run that was asked to stop, or had nothing to do
            processes.part()
            raise
        except (RuntimeError, MemoryError, FloatingPointError) as error:
            if not is_out_of_memory(error):
                at_error.clear()  # who knows what state the models are in
            raise UserError(_explain(error)) from error
    except UserError as error:
        done = ""
        with contextlib.suppress(UserError, RuntimeError):
            done = "".join(function() for function in at_error)
        if processes.may_speak():
            if processes.RANK > 0:  # below the progress bar of rank 0
                script = f"\n{script}: process {processes.RANK}"
            text = " ".join(f"{error}{done}".split())
            print(f"{script}: error: {text}", file=_Deaf(streams[1]))
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        stop_at_once()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while at_end:
            at_end.pop(0)()
        sys.stdout, sys.stderr = streams


def _explain(error):
    """An error of torch in words for the user; one that is nobody's but ours is raised again."""
    reason, step = (str(error).splitlines() or [""])[0], now_in["step"]
    when = f"in iteration {step}" if step else "before the first iteration"
    if "device-side assert" in reason:
        what = "an index was out of range on the GPU, or no number; --device cpu says where"
        return f"{now_in['phase']} failed {when}: {what}"
    if processes.is_lost(error):
        how = f"; what is saved is whole: {resume_command(now_in['cfg'])}" if step else ""
        return f"another process of the run has ended {when}{how}"
    if is_out_of_memory(error):
        cfg, phase = now_in["cfg"], now_in["phase"]
        sizes = " ".join(f"{flag_of(name)} {getattr(cfg, name)}" for name in SIZES if cfg)
        what = f"out of memory ({phase}, {when}): {ADVICE[phase]}"
        return f"{what}; now {sizes}; {reason}" if sizes else f"{what}; {reason}"
    # torch.multinomial, in generate_compiled, speaks of a probability tensor
    if "probability tensor" in str(error) or isinstance(error, FloatingPointError):
        what = "the policy's logits are not finite; lower --lr, see --dtype"
        return f"sampling failed {when}: {what}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile failed: {reason}"
    raise error


def stop_at_once():
    """From now on Ctrl-C and SIGTERM raise KeyboardInterrupt at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def resume_command(cfg):
    """What the user types to go on with the run."""
    nodes = processes.COUNT // processes.LOCAL_COUNT
    many = f"--nproc-per-node {processes.LOCAL_COUNT} " + (f"--nnodes {nodes} ... " * (nodes > 1))
    start = f"torchrun {many}" if processes.IS_TORCHRUN else "python "
    script = os.path.relpath(sys.argv[0])  # as it was called, from the folder that it was called in
    return f"{start}{shlex.quote(script)} --resume --output {shlex.quote(cfg.output)}"
