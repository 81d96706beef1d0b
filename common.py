"""What two stages share and no equation names: flags, data, tokenizers, models and checkpoints.

Nothing here is about RLHF. Losses, masks, log-probabilities and training loops stand in the stage
files, in the order in which they run; look here when a helper's name is not enough.
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import functools
import gzip
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
import zlib

import huggingface_hub
import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, HfArgumentParser
from transformers import StaticCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.pytorch_utils import Conv1D

HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE / "data"  # the embedded world


# === Flags and errors =============================================================================
class UserError(Exception):
    """The user can mend this: one line on standard error, exit status 2, no traceback."""


@contextlib.contextmanager
def command_line(memory_flags=()):
    """Run a stage as a command: quiet libraries, and one line in place of a traceback.

    Args:
        memory_flags: {function: (what it does, the flag to halve)}, for when memory runs out in it.
    """
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    script = pathlib.Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 is no error
    try:
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if is_out_of_memory(error):
                raise UserError(explain_out_of_memory(error, dict(memory_flags))) from error
            if "probability tensor" in str(error) or "device-side assert" in str(error):
                # so says torch.multinomial, in generate_compiled
                raise UserError(explain_bad_sampling(error)) from error
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise UserError(f"--compile failed: {str(error).splitlines()[0]}") from error
            raise
        except FloatingPointError as error:
            raise UserError(explain_bad_sampling(error)) from error
    except UserError as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # StopRequest took them
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while _locks:
            file = _locks.pop()
            os.unlink(file.name)
            file.close()


def is_out_of_memory(error):
    """Has a GPU or (with "can't allocate memory") the machine no memory left?"""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error)


def explain_out_of_memory(error, memory_flags):
    """Which phase of which function, at which sizes, and the one flag to halve."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    named = [frame for frame in frames if frame.f_code.co_name in memory_flags]
    mains = [frame for frame in frames if frame.f_code.co_name == "main"]
    if not mains or named[-1:] == mains and "progress" not in mains[0].f_locals:  # before the loop
        return "out of memory while loading; use a smaller model or a device with more"
    phase, flag = memory_flags[named[-1].f_code.co_name]
    sizes = {name: getattr(mains[0].f_locals["cfg"], name) for name in SIZES}
    sizes = ", ".join(f"--{name.replace('_', '-')} {size}" for name, size in sizes.items())
    return f"out of memory in {phase}, with {sizes}; halve {flag}, or try --gradient-checkpointing"


def explain_bad_sampling(error):
    """When the logits held an inf or nan."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    seen = [frame.f_locals.get("iteration") for frame in frames if frame.f_code.co_name == "main"]
    when = f"in iteration {seen[0]}" if seen and seen[0] else "before the first iteration"
    return f"sampling failed {when}: the policy's logits are not finite; lower --lr, see --dtype"


SIZES = ("batch_size", "microbatch_size", "max_prompt_length", "response_length")


def arg(default, help, group=None):
    """One flag of a `Config`: default, help, and the heading if it opens a group of --help."""
    metadata = {"help": help.replace("%", "%%"), "group": group}
    return _field(default, metadata)


def _field(default, metadata):
    if isinstance(default, list):  # a flag that takes one or more values
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(message)


class _HelpFormatter(argparse.HelpFormatter):
    """`--max-grad-norm FLOAT   help (default: 1.0)`, where argparse would name underscores too."""

    def _format_action_invocation(self, action):
        names = [name for name in action.option_strings if "_" not in name]
        if action.nargs in (None, "+") and action.option_strings:
            choices = action.choices and "{" + ",".join(map(str, action.choices)) + "}"
            names[-1] += " " + (choices or action.type.__name__.upper())
            names[-1] += " ..." if action.nargs else ""
        return ", ".join(names)

    def _get_help_string(self, action):
        default = action.default
        if not action.option_strings or default in (None, argparse.SUPPRESS):
            return action.help or ""
        default = " ".join(default) if isinstance(default, list) else default
        return f"{action.help} (default: {default})"


def parse_args(config_class, description, argv=None):
    """The command line as a `config_class`, a dataclass of `arg` fields.

    With --resume, the flags that are not given are those that the run began with.

    Raises:
        UserError: an unknown flag (the nearest one is named), a wrong type, a value not offered.
    """
    cfg = _parse_args(config_class, description, argv, {})
    saved = pathlib.Path(cfg.output) / "args.json"
    if not cfg.resume or not saved.is_file():
        return cfg
    return _parse_args(config_class, description, argv, read_saved_args(saved, config_class))


def read_saved_args(path, config_class):
    """The flags in an args.json as a dict, those that `config_class` has."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(config_class)}
        return {name: value for name, value in saved.items() if name in names - RUN_FLAGS}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"can't read {path}: {error}; start anew with --overwrite") from None


RUN_FLAGS = {"resume", "overwrite"}  # how a run is started; no part of it


def _parse_args(config_class, description, argv, defaults):
    groups = []  # HfArgumentParser prints one heading per dataclass: deal the fields out to some
    for field in dataclasses.fields(config_class):
        if field.metadata["group"]:
            groups.append((field.metadata["group"], []))
        default = defaults.get(field.name, getattr(config_class(), field.name))
        plain = _field(default, {"help": field.metadata["help"]})
        groups[-1][1].append((field.name, field.type, plain))
    parts = [
        dataclasses.make_dataclass("Group", fields, namespace={"_argument_group_name": heading})
        for heading, fields in groups
    ]
    parser = _Parser(
        parts, description=description, usage=f"python {pathlib.Path(sys.argv[0]).name} [flags]",
        formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=36, width=110),
        allow_abbrev=False,
    )
    given = sys.argv[1:] if argv is None else argv
    names = [word.split("=")[0].replace("_", "-") for word in given if word.startswith("--")]
    lists = [f.name for f in dataclasses.fields(config_class) if "list" in str(f.type)]
    for name in lists:  # of other flags the last one counts
        flag = "--" + name.replace("_", "-")
        if names.count(flag) > 1:
            raise UserError(f"{flag} is given twice; give all its values at once: {flag} A B")
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(config_class)]
        nearest = difflib.get_close_matches(unknown[0].replace("_", "-"), known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the flags"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    return config_class(**{name: value for part in parsed for name, value in vars(part).items()})


def check_range(cfg, **rules):
    """Stop on the first flag out of its (lowest, highest), both allowed; None is not checked."""
    rules["seed"] = (0, 2**32 - 1)  # what all random generators take
    for name, (low, high) in rules.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            rule = f"at least {low}" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {rule}")


def by_size(value, table, model):
    """`value` if given, else that of `table`, ((parameters below, value), ...), for this model."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return value if value is not None else next(given for limit, given in table if size < limit)


# === Device and arithmetic ========================================================================
def pick_device(name):
    """The torch.device of --device; 'auto' is the first CUDA GPU, or else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not known; use auto, cpu, cuda or cuda:1")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} can't be used: {reason}") from None


def arithmetic(device, dtype):
    """The autocast context of --dtype: matrix products in bf16, or in float32.

    Trained weights are float32 either way. An Adam step moves a weight by about the learning rate;
    at 3e-6 that is far below half the spacing of bf16 numbers near 0.02, so in bf16 weights most
    updates would be rounded away.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16(device, dtype))


def is_bf16(device, dtype):
    """Does --dtype mean bf16 on this device?"""
    return dtype == "bf16" or (dtype == "auto" and device.type == "cuda")


def round_matrices(model):
    """Round the matrices of a frozen model to bf16, as autocast does at each use: half the memory.

    Its outputs under autocast stay the same to the last bit. Embeddings and norms, which autocast
    does not round, stay float32, and so do an lm_head tied to the embedding, and the score head,
    which `token_scores` uses outside autocast.
    """
    score = getattr(getattr(model, "score", None), "weight", None)
    kept = {model.get_input_embeddings().weight, score}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module.weight not in kept:
            module.to(torch.bfloat16)


def peak_memory(device):
    """The most bytes held so far: on CUDA by tensors, else by the process; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tensor_bytes(tensors):
    """Bytes of memory behind some tensors, each counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def kept_bytes(function, weights):
    """Bytes that autograd keeps for the backward pass of what `function()` gives, weights aside."""
    kept = []
    keep = lambda tensor: kept.append(tensor.detach())  # itself it would hold its graph for ever
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        _held = function()
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    return tensor_bytes(x for x in kept if x.untyped_storage().data_ptr() not in own)


def now(device):
    """Seconds, once the device has finished what it was given; differences time a phase."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# === Data =========================================================================================
class Row(dict):
    """A data row; `where` is its file and line, for messages."""

    where = "a row"


def read_rows(paths, formats):
    """The rows of some JSON Lines files, .jsonl or .jsonl.gz, each a `Row`.

    Args:
        paths: the files.
        formats: the accepted sets of keys, such as [("prompt", "completion"), ("text",)]. Each row
            has all keys of one of them. A value is a string or a chat, a list of messages
            {"role": ..., "content": ...}; "text" is a string, "messages" a chat. Other keys are
            kept as they are.

    Raises:
        UserError: no such file, no rows, or a row that does not fit, by file and line.
    """
    example = " or ".join(map(_example, formats))
    rows = []
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice")
        number_before = len(rows)
        try:
            with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    rows.append(_parse_row(line, formats, f"{path} line {number}", example))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"can't read {path}: {reason}") from None
        if len(rows) == number_before:
            raise UserError(f"{path} has no rows; a line is like {example}")
    return rows


def _example(keys):
    chat = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
    return json.dumps({key: chat if key == "messages" else "..." for key in keys})


def _parse_row(line, formats, where, example):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({error})" if line.strip() else "is empty"
    else:
        problem = _row_problem(row, formats)
        if not problem:  # exported tables hold null under the keys of other formats
            empty = [key for key in set().union(*formats) if row.get(key, 0) is None]
            row = {key: value for key, value in row.items() if key not in empty}
    if problem:
        raise UserError(f"{where} {problem}; write lines like {example}")
    row = Row(row)
    row.where = where
    return row


def _row_problem(row, formats):
    if not isinstance(row, dict):
        return f"is a JSON {type(row).__name__}, not an object"
    fits = lambda keys: all(row.get(key) is not None for key in keys)
    keys = next(filter(fits, formats), None)
    if keys is None:
        named = [f"{key!r}" + (" (null)" if row[key] is None else "") for key in row]
        return f"has the keys {', '.join(named) or '(none)'}"
    return next(filter(None, (_value_problem(key, row[key]) for key in keys)), None)


def _value_problem(key, value):
    wanted = {"text": "a string", "messages": "a list of messages"}
    wanted = wanted.get(key, "a string or a list of messages")
    if isinstance(value, str) and key != "messages":
        texts = [value]
    elif isinstance(value, list) and value and key != "text":
        texts = [m.get(part) if isinstance(m, dict) else None for m in value for part in CHAT_KEYS]
    else:
        return f"has {_kind(value)} under {key!r}, not {wanted}"
    if not all(isinstance(text, str) for text in texts):
        return f"has a list under {key!r} whose items are not all " + json.dumps(
            dict.fromkeys(CHAT_KEYS, "...")
        )
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        return f"has half of a surrogate pair under {key!r}, which is not text"
    return None


CHAT_KEYS = ("role", "content")


def _kind(value):
    return "an empty list" if value == [] else f"a {type(value).__name__}"


def convert_rows(rows, convert, source):
    """What `convert` makes of all rows, and a line that says how many were used and why not more.

    `convert(row)` yields examples, or a string: why there is one less. Its ValueError, worded to
    follow the place of the row, becomes a UserError. So does it if no example is left.
    """
    examples, dropped = [], collections.Counter()
    for row in rows:
        try:
            for example in convert(row):
                if isinstance(example, str):
                    dropped[example] += 1
                else:
                    examples.append(example)
        except ValueError as error:
            raise UserError(f"{row.where} {error}") from error
    reasons = "; ".join(f"{number} dropped ({reason})" for reason, number in dropped.items())
    reasons = f"; {reasons}" if reasons else ""
    if not examples:
        raise UserError(f"{source}: {len(rows)} rows read and none can be used{reasons}")
    print(f"  {source}: {len(rows)} rows read, {len(examples)} examples used{reasons}")
    return examples


def too_long(cfg, prompt_ids, *responses_ids):
    """Why an example is dropped, or None. It is not cut: a cut text teaches never to end."""
    if len(prompt_ids) > cfg.max_prompt_length:
        return f"prompt above --max-prompt-length {cfg.max_prompt_length}"
    if max(map(len, responses_ids), default=0) > cfg.response_length:
        return f"response above --response-length {cfg.response_length}"
    return None


def hold_out(rows, most, seed, flag):
    """(training rows, held-out rows): a tenth, at most `most`; `flag` is another way to them."""
    number = min(most, len(rows) // 10)
    if number == 0:
        raise UserError(f"{len(rows)} rows are too few to hold some out; give some with {flag}")
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[number:]], [rows[i] for i in order[:number]]


def endless_epochs(lengths, batch_size, generator):
    """Batches of row indices, one `length_bucketed` epoch after the other."""
    while True:
        yield from length_bucketed(lengths, batch_size, generator)


def length_bucketed(lengths, batch_size, generator):
    """One epoch of batches (lists of row indices), each of rows of like length, in random order.

    Rows of like length need little padding. Sorting the whole set would make the batches the same
    in every epoch, so rows are shuffled first and sorted within windows of 32 batches.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), 32 * batch_size):
        window = sorted(order[start : start + 32 * batch_size], key=lambda row: lengths[row])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def pad(sequences, pad_id, side):
    """Lists of token ids as tokens (B, T) int64 and attention_mask (B, T) bool.

    `side`, 'left' or 'right', is where the padding goes. Either is right as long as mask and
    position ids follow; prompts go left so that all responses start in the same column.
    """
    width = max(map(len, sequences))
    tokens = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        columns = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        tokens[row, columns] = torch.tensor(ids, dtype=torch.int64)
        mask[row, columns] = True
    return tokens, mask


# === Tokenizers ===================================================================================
def load_tokenizer(path, made_by=None, trust_remote_code=False, needs_eos=True):
    """The tokenizer of a folder or hub id, with an EOS token and another pad token.

    pad = EOS harms only code that finds the end of a text by asking "is this pad?". Nothing here
    does, but transformers' sequence classification does: it would read the token before the EOS.
    """
    tokenizer = _load(AutoTokenizer, path, made_by, trust_remote_code)
    if tokenizer.eos_token_id is None and needs_eos:
        raise UserError(f"the tokenizer of {path} has no EOS token, so no text could end; set one")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def encode(tokenizer, prompt, response=None, eos_ids=()):
    """(prompt ids, response ids) of one text or chat; all stages make their ids here.

    Args:
        prompt: a string, or a chat up to the assistant's turn, a list of {"role", "content"}.
        response: a string, or messages that go on with the chat; None has no ids.
        eos_ids: what may end a response besides the tokenizer's EOS.

    A string becomes its ids, with one BOS in front of the prompt if this tokenizer begins its texts
    with it, and one EOS behind the response. A chat is rendered by the tokenizer's template twice:
    up to the words that open the assistant's turn, and whole; what the second adds is the
    response, up to the first EOS behind its words: there the policy's own response would end.
    (An EOS quoted within the words ends nothing here.) The template writes BOS itself.
    Prompt and response are tokenised apart, as PPO must: it has the prompt before any response.

    Raises:
        ValueError: no template, or the template does not take this chat.
    """
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    eos = [id for id in [tokenizer.eos_token_id] if id is not None]
    if isinstance(prompt, str):
        if response is not None and not isinstance(response, str):
            raise ValueError("has a string as the prompt and messages as the response")
        bos, prompt_ids = [tokenizer.bos_token_id], ids(prompt)
        begins_with_bos = tokenizer("a")["input_ids"][:1] == bos and prompt_ids[:1] != bos
        prompt_ids = bos + prompt_ids if begins_with_bos else prompt_ids
        response_ids = ids(response or "")
        if response is not None and not {*response_ids[-1:]} & {*eos, *eos_ids}:
            response_ids += eos
        return prompt_ids, response_ids
    if prompt[-1]["role"] == "assistant":
        raise ValueError("has a chat that ends with the assistant's message: nothing to answer")
    opening = render_chat(tokenizer, prompt, add_generation_prompt=True)
    if response is None:
        return ids(opening), []
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    whole = render_chat(tokenizer, prompt + response)
    if not whole.startswith(opening):
        raise ValueError(
            "does not fit the chat template: a reply is not rendered as the chat so far and more, "
            "so no model that goes on with the one could write the other"
        )
    text, words = whole[len(opening) :], response[-1]["content"].strip()
    before = render_chat(tokenizer, prompt + response[:-1], add_generation_prompt=True)
    last_turn = len(before) - len(opening) if whole.startswith(before) else 0
    words_start = text.find(words, last_turn)  # not there if the template changes them
    words_end = words_start + len(words) if words_start >= 0 else last_turn
    is_end = lambda id: id in {*eos, *eos_ids}
    num_within = sum(map(is_end, ids(text[:words_end])))  # of earlier turns, or quoted
    response_ids = ids(text)
    ends = [i for i, id in enumerate(response_ids) if is_end(id)][num_within:]
    return ids(opening), response_ids[: ends[0] + 1] if ends else response_ids + eos


def render_chat(tokenizer, messages, **options):
    """The text of a chat by the tokenizer's template; a ValueError if there is none or it fails."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"holds messages, but the tokenizer of {tokenizer.name_or_path or 'this model'} has no "
            "chat template; write plain strings, or give the tokenizer a template"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates are programs and raise what they like
        raise ValueError(f"does not fit the chat template: {error}") from error


def shown(prompt):
    """A prompt as one text for the screen: of a chat, the last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def eos_token_ids(tokenizer, model):
    """All ids that end a text, sorted: the tokenizer's EOS, and those stored with the model."""
    stored = getattr(getattr(model, "generation_config", model.config), "eos_token_id", None)
    stored = [id for id in (stored if isinstance(stored, list) else [stored]) if id is not None]
    if not all(isinstance(id, int) and id >= 0 for id in stored):
        raise UserError(f"the model's eos_token_id is {stored}; it must be one or more token ids")
    return sorted({*stored, tokenizer.eos_token_id} - {None})


# === Models =======================================================================================
@functools.cache
def _say_that_the_hub_is_asked(path):
    print(f"  {path} is no folder here: looking for it on the Hugging Face hub", flush=True)


def _load(auto_class, path, made_by, trust_remote_code, **options):
    """`auto_class.from_pretrained`: no pickles, no code unasked; `made_by` is what makes `path`."""
    if "dtype" in options:  # a model
        options |= {"use_safetensors": True, "output_loading_info": True}
    hint = f"; make it with: {made_by}" if made_by else ""
    if not os.path.isdir(path):
        is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)
        if not is_hub_id or hint and path.split("/")[0] == "ckpt":
            raise UserError(f"there is no folder {path!r}{hint}")  # no use in asking the hub
        _say_that_the_hub_is_asked(path)
    try:
        loaded = auto_class.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # transformers, tokenizers and safetensors each have their own
        if is_out_of_memory(error):
            raise
        what = "can't be loaded" if os.path.isdir(path) else "is no folder and can't be fetched"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if "trust_remote_code=True" in str(error):
            lines = ["it brings code of its own, which is run only with --trust-remote-code"]
        reason = " ".join(line.strip() for line in lines[:2]).rstrip(".")[:300]
        raise UserError(f"{path} {what}: {reason}{hint}") from error
    for name, weight in loaded[0].named_parameters() if "dtype" in options else ():
        if not weight.isfinite().all():
            raise UserError(f"{path} holds a weight that is not finite, in {name}")
    return loaded


def _config_without_dropout(path, made_by, trust_remote_code, **options):
    """The model's config with all dropout off: two passes under two masks are two policies."""
    config = _load(AutoConfig, path, made_by, trust_remote_code, **options)
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_causal_lm(path, tokenizer, made_by=None, trust_remote_code=False):
    """A causal LM in float32, without dropout, with an embedding for each of the tokens.

    The dtype is always passed: transformers 5 otherwise takes the checkpoint's, often bf16.
    """
    config = _config_without_dropout(path, made_by, trust_remote_code)
    if re.search("Classification|MaskedLM", str(config.architectures)):
        raise UserError(f"{path} is no causal LM but a {config.architectures[0]}")
    model, info = _load(
        AutoModelForCausalLM, path, made_by, trust_remote_code, config=config, dtype=torch.float32
    )
    if info["missing_keys"]:
        raise UserError(f"{path} is no causal LM: it has no {sorted(info['missing_keys'])[0]}")
    fit_embeddings(model, tokenizer)
    set_generation_defaults(model, tokenizer)
    return model


def set_generation_defaults(model, tokenizer, temperature=1.0):
    """Replace the generation settings stored with a model (top-k 50, ...) by plain sampling.

    `generate` takes from them whatever its caller leaves open, so they would leak into rollouts;
    and a folder saved with plain ones samples from the very distribution that was trained.
    """
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        eos_token_id=eos_token_ids(tokenizer, model),
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id  # a reward model reads these


def _load_classifier(path, made_by, trust_remote_code):
    """(one-label sequence classifier, names of the weights that `path` does not hold)."""
    config = _config_without_dropout(path, made_by, trust_remote_code)
    is_classifier = "SequenceClassification" in str(config.architectures)
    if is_classifier and config.num_labels != 1:
        raise UserError(f"{path} has {config.num_labels} labels; a reward model has one")
    config.num_labels = 1
    mean, deviation = score_scale(config)
    is_number = type(mean) in (int, float) and type(deviation) in (int, float)
    if not (is_number and math.isfinite(mean) and 0 < deviation < math.inf):
        raise UserError(f"{path}: reward_mean and reward_std in its config are no scale of scores")
    model, info = _load(
        AutoModelForSequenceClassification, path, made_by, trust_remote_code, config=config,
        dtype=torch.float32,
    )
    return model, sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})


def load_scalar_model(path, tokenizer, made_by=None, trust_remote_code=False):
    """(model, head_is_new): a decoder that scores each token, in float32, without dropout.

    From the folder of a causal LM it is that trunk with a new, untrained head.
    """
    model, missing = _load_classifier(path, made_by, trust_remote_code)
    if not has_token_head(model):
        raise UserError(f"{path} is a {type(model).__name__}; only decoders with a head are read")
    lost = [key for key in missing if not key.startswith("score.")]
    if lost:
        raise UserError(f"{path} is not whole: it has no {lost[0]}")
    fit_embeddings(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    with contextlib.suppress(OSError):  # what ends a causal LM's texts may stand only there
        stored = GenerationConfig.from_pretrained(path).eos_token_id
        model.config.eos_token_id = model.config.eos_token_id if stored is None else stored
    return model, bool(missing)


def has_token_head(model):
    """Is it a decoder whose score is one linear layer on a token's last hidden state?"""
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


def load_text_scorer(path, made_by=None, trust_remote_code=False):
    """(model, tokenizer) of any one-label sequence classifier, to be asked about texts.

    Its own forward finds the token that it was trained to read, which depends on its pad token; so
    that stays as it is, and only a tokenizer without one gets a new one, to fill batches with.
    """
    tokenizer = _load(AutoTokenizer, path, made_by, trust_remote_code)
    model, missing = _load_classifier(path, made_by, trust_remote_code)
    if missing:
        raise UserError(
            f"{path} is no trained reward model: it has no {missing[0]}; make one with: {made_by}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    fit_embeddings(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def fit_embeddings(model, tokenizer):
    """Add an embedding for the new pad token if the model has no spare one."""
    size = model.get_input_embeddings().num_embeddings
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > size + 1:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has ids up to {needed - 1}, the model "
            f"embeds only {size}; they do not belong together"
        )
    if needed > size:
        model.resize_token_embeddings(needed)


def check_context(model, length, flags):
    """Stop if sequences of `length` tokens do not fit the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < length:  # XLNet says -1 for none
        raise UserError(
            f"{length} tokens do not fit the model's {limit} positions ({type(model).__name__}); "
            f"lower {flags}"
        )


def set_attention(model, name):
    """Choose among transformers' implementations of attention."""
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--attention {name}, {type(model).__name__}: {reason}") from None


def enable_gradient_checkpointing(model):
    """Recompute activations in the backward pass: less memory, more time, the same gradient."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints only in train mode; dropout is off by the config


def position_ids(attention_mask):
    """0, 1, 2, ... from each row's first attended token on, (B, T); `generate` counts the same."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def score_scale(config):
    """(mean, deviation) that the scores of a reward model are taken by; it may have none yet."""
    return getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)


def token_scores(model, tokens, attention_mask):
    """The scalar model's output at each token, (B, T) float32: score or value of the text so far.

    In the unit of `score_scale`: reference completions have mean 0 and deviation 1.
    """
    hidden = model.base_model(
        input_ids=tokens, attention_mask=attention_mask, use_cache=False,
        position_ids=position_ids(attention_mask),
    ).last_hidden_state  # (B, T, width)
    with torch.autocast(tokens.device.type, enabled=False):  # bf16 keeps three digits of a score
        scores = model.score(hidden.float()).squeeze(-1)
    mean, deviation = score_scale(model.config)
    return (scores - mean) / deviation


def last_token_index(attention_mask):
    """Index of each row's last attended token, (B,), on whichever side the padding is."""
    return attention_mask.long().cumsum(-1).argmax(-1)


def sample_tokens(logits, temperature):
    """One id per row of logits (B, V), drawn from softmax(logits / temperature): (B,) int64.

    By inversion: the first id at which the summed probability exceeds a uniform number. The sum is
    float64, since in float32 a large vocabulary's rare tokens would drown in its rounding.
    torch.multinomial draws V random numbers a row, on a CPU half the time of a small model's step.

    Raises:
        FloatingPointError: a row of logits has no softmax: it holds an inf or a nan.
    """
    summed = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    if not summed[:, -1].isfinite().all():
        raise FloatingPointError("the logits are not finite")
    uniform = torch.rand_like(summed[:, :1])  # in [0, 1)
    return torch.searchsorted(summed / summed[:, -1:], uniform, right=True).squeeze(-1)


class KeysLikeValues:
    """A cache of transformers' whose keys have the dtype of the values.

    Under autocast the rotary embedding leaves the keys in float32, though attention reads them in
    bf16: kept as such, they would be cast and moved anew for each token.
    """

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


class GrowingCache(KeysLikeValues, DynamicCache):
    """Holds the tokens so far; rows may leave it."""


class FixedCache(KeysLikeValues, StaticCache):
    """Has room for all tokens from the start, so that each step has the same shapes."""


def generate_compiled(model, prompts, prompt_mask, response_length, temperature, to_the_full):
    """The same as `generate_responses`, by transformers' loop: a graph of fixed shapes on CUDA."""
    settings = model.generation_config
    sampling = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        max_new_tokens=response_length, min_new_tokens=response_length if to_the_full else None,
        eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id,
    )
    length = -(-(prompts.shape[1] + response_length) // 128) * 128  # few lengths, few graphs
    tokens = model.generate(
        prompts, attention_mask=prompt_mask, generation_config=sampling,
        past_key_values=FixedCache(config=model.config, max_cache_len=length),
    )
    return tokens[:, prompts.shape[1] :]


@torch.no_grad()
def generate_responses(
    model, prompts, prompt_mask, response_length, temperature, to_the_full=False, compiled=False
):
    """Sample a response to each left-padded prompt: (B, P) -> (B, R) ids, R <= response_length.

    After an EOS a row holds pad. Temperature is the only setting, since top-k or top-p would sample
    from another distribution than the one whose log-probabilities are computed. With `to_the_full`
    no response ends early: that is for trying out what fits into memory.

    A loop of our own, where `model.generate` would do, because a row that has ended leaves the
    batch: bench/rollout.py times both. A few wait for company, as leaving copies the cache; no row
    can leave the state of a recurrent layer.
    Under autocast all steps use one bf16 copy of the matrices, which lives as long as its context.
    """
    training = model.training
    model.eval()  # in train mode, gradient checkpointing would sample without the key-value cache
    if compiled:
        response = generate_compiled(
            model, prompts, prompt_mask, response_length, temperature, to_the_full
        )
        model.train(training)
        return response
    settings, device = model.generation_config, prompts.device
    eos_ids = torch.tensor([] if to_the_full else settings.eos_token_id, device=device)
    response = prompts.new_full((len(prompts), response_length), settings.pad_token_id)
    rows = torch.arange(len(prompts), device=device)  # which are in the batch, (b,)
    is_open = torch.ones_like(rows, dtype=torch.bool)  # and which of them have not ended, (b,)
    cache, inputs, mask = GrowingCache(config=model.config), prompts, prompt_mask
    for t in range(response_length):
        output = model.forward(  # model() is what --compile compiles, for other shapes than these
            input_ids=inputs, attention_mask=mask, past_key_values=cache, use_cache=True,
            position_ids=position_ids(mask)[:, -inputs.shape[1] :], logits_to_keep=1,
        )
        tokens = sample_tokens(output.logits[:, -1], temperature)  # (b,)
        tokens = torch.where(is_open, tokens, settings.pad_token_id)
        response[rows, t] = tokens
        is_open = is_open & ~torch.isin(tokens, eos_ids)
        num_open = int(is_open.sum())
        if num_open == 0:
            break
        is_recurrent = any(isinstance(x, LinearAttentionCacheLayerMixin) for x in cache.layers)
        if num_open <= 0.75 * len(rows) and not is_recurrent:
            cache.batch_select_indices(is_open.nonzero().squeeze(1))
            rows, tokens, mask, is_open = (x[is_open] for x in (rows, tokens, mask, is_open))
        inputs = tokens[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    model.train(training)
    return response[:, : t + 1]


# === Start-up report ==============================================================================
def describe(role, model, trained):
    """One line about a model: its role, class, size, data type, and whether it is trained."""
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    name, state = type(model).__name__, "trained" if trained else "frozen"
    return f"  {role:<14}{name:<34}{size:>10.3f} M  {'+'.join(sorted(dtypes)):<18}{state}"


def print_tokens(tokenizer, model, prompt, response=()):
    """The special tokens, and one row token by token: a doubled BOS or a lost EOS is seen here."""
    eos = [f"{i} {tokenizer.convert_ids_to_tokens(i)}" for i in eos_token_ids(tokenizer, model)]
    pieces = [tokenizer.decode([i]).replace("\n", "\\n") for i in [*prompt, *response]]
    prompt_text, response_text = "|".join(pieces[: len(prompt)]), "|".join(pieces[len(prompt) :])
    line = f"{prompt_text}  =>  {response_text}" if response_text else prompt_text
    line = line if len(line) <= 240 else f"{line[:150]} ... {line[-80:]}"
    pad_token = f"{tokenizer.pad_token_id} {tokenizer.pad_token}"
    print(f"  EOS {', '.join(eos)}; pad {pad_token}; a row:\n    {line}")


# === Runs and checkpoints =========================================================================
# An output folder holds the logs of a run and its last checkpoint. A checkpoint is written into
# OUTPUT.new-checkpoint, with the logs so far, and takes the place of OUTPUT, which for a moment is
# OUTPUT.old-checkpoint: a run killed at any time leaves one whole. trainer_state/ is what --resume
# needs besides the weights.
LOGS = ("args.json", "metrics.jsonl", "samples.jsonl")
# The flags that --resume may be given anew. They change nothing but rounding: another device, and
# in bf16 another micro-batch; another device also has other random numbers.
MAY_CHANGE = (
    "microbatch_size", "save_every", "tensorboard", "device", "gradient_checkpointing",
    "trust_remote_code",
)
_locks = []


def open_run(cfg, may_change=MAY_CHANGE):
    """Make sure that the output folder is this run's, before the work; what to go on from, or None.

    Args:
        cfg: with output, resume and overwrite.
        may_change: the flags that may be others than those the run began with.

    Returns:
        What `saved_run` was given, if there is a checkpoint to go on from; else None.

    Raises:
        UserError: the folder can't be written, another run writes it, it holds anything but a run,
            or a run that is neither to be resumed nor overwritten, or one with other flags.
    """
    if pathlib.Path(cfg.output).name in ("", ".."):
        raise UserError(f"--output {cfg.output!r} is no name for a new folder")
    output = output_folder(cfg)
    read = [getattr(cfg, name, None) for name in ("model", "policy")] + getattr(cfg, "reward", [])
    if any(path and os.path.realpath(path) == str(output) for path in read):
        raise UserError(f"--output {cfg.output} is a folder that the run reads; name another")
    for beside in map(functools.partial(_beside, output), ("new", "old", "gone")):
        if beside.is_file():
            raise UserError(f"{beside} is in the way of --output {cfg.output}; move it")
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it; give one of them")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _lock(output)
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror}") from None
    if not output.exists() and _beside(output, "old").is_dir():
        _beside(output, "old").rename(output)  # killed between the two renames of a save
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    _remove_replaced(output)
    held = set(os.listdir(output)) if output.is_dir() else set()
    if held and "metrics.jsonl" not in held:
        raise UserError(f"--output {output} holds files of something else; name a new folder")
    if held and not (cfg.resume or cfg.overwrite):
        raise UserError(
            f"--output {output} holds a run; --resume goes on with it, --overwrite replaces it"
        )
    if not cfg.resume or "config.json" not in held:
        return None  # nothing was saved yet
    return _read_state(output, cfg, may_change)


def output_folder(cfg):
    """--output as a path, through symbolic links: a save renames the folder itself."""
    return pathlib.Path(os.path.realpath(cfg.output))


def _beside(output, kind):
    return output.with_name(f"{output.name}.{kind}-checkpoint")


def _remove_replaced(output):
    """Remove a checkpoint that another has replaced, under a name where nobody looks for one."""
    replaced, gone = _beside(output, "old"), _beside(output, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    if replaced.is_dir():
        if (replaced / "tensorboard").exists() and not (output / "tensorboard").exists():
            (replaced / "tensorboard").rename(output / "tensorboard")  # moved: its files are open
        replaced.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _lock(output):
    """Hold OUTPUT.lock until the end of the run; the system lets go of it even after a kill."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = open(output.with_name(f"{output.name}.lock"), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another run is writing to --output {output}; wait or name another")
    except OSError:
        pass  # a file system without locks
    _locks.append(file)


def _read_state(output, cfg, may_change):
    if not (output / "trainer_state").is_dir():
        _check_flags(output, cfg, read_saved_args(output / "args.json", type(cfg)), may_change)
        finish(f"the run in {cfg.output} is finished; --overwrite starts anew")
    try:
        path = output / "trainer_state" / "state.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        began = state["args"]
    except Exception as error:  # torch has many
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"can't resume from {output / 'trainer_state'}: {reason}") from None
    _check_flags(output, cfg, began, may_change)
    return state


def _check_flags(output, cfg, began, may_change):
    for name, value in dataclasses.asdict(cfg).items():
        if name not in {*may_change, *RUN_FLAGS} and began.get(name, value) != value:
            flag, allowed = "--" + name.replace("_", "-"), ", ".join(sorted(may_change))
            raise UserError(
                f"{flag} is {value}, but the run in {output} began with {began[name]}; leave it "
                f"out, or start anew with --overwrite. May change: {allowed}"
            )


def finish(message):
    """End the process well: there is nothing left to do, so a job that is started again is done."""
    print(f"  {message}")
    sys.exit(0)


def start_logs(cfg, state):
    """The output folder with its logs: new, or as they were at the checkpoint of `state`."""
    output = output_folder(cfg)
    if state is None:
        if output.exists():  # --overwrite, or a run killed before its first checkpoint
            shutil.rmtree(_beside(output, "gone"), ignore_errors=True)
            output.rename(_beside(output, "gone"))
            shutil.rmtree(_beside(output, "gone"))
        output.mkdir(parents=True)
        (output / "metrics.jsonl").write_text("")
        (output / "args.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2))
        return output
    for name, size in state["log_sizes"].items():
        os.truncate(output / name, size)  # rows that came after the checkpoint come again
    return output


def restore(state, num_examples, optimizer, schedule):
    """Put back what `saved_run` saved of the optimizer, its schedule and the random generators."""
    if num_examples != state["num_examples"]:
        raise UserError(
            f"the data give {num_examples} examples now and gave {state['num_examples']} when the "
            "run began; put the files back, or start anew with --overwrite"
        )
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    schedule._last_lr = schedule.get_lr()  # the run may be longer now
    for group, lr in zip(optimizer.param_groups, schedule.get_last_lr()):
        group["lr"] = lr
    random.setstate(state["random"])
    torch.set_rng_state(state["torch_random"])
    if len(state["cuda_random"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_random"])
    print(f"  resumed after {schedule.last_epoch} iterations")


@contextlib.contextmanager
def saved_run(cfg, num_examples=None, optimizer=None, schedule=None, **more):
    """A folder to save models into; at the end it is the output folder, whole, with logs and state.

    Without an optimizer the run is finished, and cannot be resumed. `more` is kept with the state:
    tensors, numbers, strings, lists and dicts.
    """
    output = output_folder(cfg)
    try:
        with written_whole(output) as folder:
            yield folder
            (folder / "args.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2))
            if optimizer is not None:
                logs = [folder / name for name in LOGS[1:] if (folder / name).exists()]
                state = {
                    "args": dataclasses.asdict(cfg), "num_examples": num_examples,
                    "log_sizes": {log.name: log.stat().st_size for log in logs},
                    "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                    "random": random.getstate(), "torch_random": torch.get_rng_state(),
                    "cuda_random": torch.cuda.get_rng_state_all(),
                }
                (folder / "trainer_state").mkdir()
                torch.save(state | more, folder / "trainer_state" / "state.pt")
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        free = shutil.disk_usage(output.parent).free / 1e6
        raise UserError(
            f"can't write the checkpoint {output} ({free:.0f} MB are free there): "
            f"{str(error).splitlines()[0]}; the one before it, if there was one, is whole: make "
            f"room and go on with: {resume_command(cfg)}"
        ) from error


def resume_command(cfg):
    """What the user types to go on with the run."""
    return f"python {pathlib.Path(sys.argv[0]).name} --resume --output {cfg.output}"


class StopRequest:
    """Ctrl-C or SIGTERM: the first asks for a stop after this iteration, the second stops now."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        self.close()
        self.signal = number
        os.write(2, b"\nstopping after this iteration; once more stops at once\n")

    def close(self):
        """From now on a signal stops at once, by a KeyboardInterrupt."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    def leave(self, cfg):
        """End the process; the checkpoint has been written."""
        print(f"\nstopped; to go on: {resume_command(cfg)}", file=sys.stderr)
        sys.exit(128 + self.signal)


class SkippedSteps:
    """Steps whose gradient was not finite: each is skipped, and three in a row end the run."""

    def __init__(self):
        self.in_a_row = 0

    def may_step(self, norms, what):
        """Is the gradient finite? `what` is said if it was not for the third time in a row."""
        finite = all(math.isfinite(norm) for norm in norms)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row == 3:
            raise UserError(
                f"three optimizer steps in a row had a gradient that is not finite, {what}; usual "
                "causes: --lr too high, rewards of enormous size. The last checkpoint is kept"
            )
        return finite


def import_tensorboard():
    """torch's writer for TensorBoard, which is an optional package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        message = "--tensorboard needs the package tensorboard; pip install tensorboard"
        raise UserError(message) from None
    return SummaryWriter


def open_log(output, tensorboard=False):
    """A function that adds a row to metrics.jsonl and, if asked, its numbers to TensorBoard."""
    writer = import_tensorboard()(output / "tensorboard") if tensorboard else None

    def log(row):
        append_json_line(output / "metrics.jsonl", row)
        for name, value in row.items():
            if writer and name != "iteration" and isinstance(value, (int, float)):
                writer.add_scalar(f"{row.get('split', 'train')}/{name}", value, row["iteration"])
        if writer:
            writer.flush()

    return log


def append_json_line(path, row):
    """Add a row to a JSON Lines file; a number that is not finite becomes null."""
    is_nan = lambda value: isinstance(value, float) and not math.isfinite(value)
    row = {key: None if is_nan(value) else value for key, value in row.items()}
    try:
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(
            f"can't write {path}: {error.strerror}; the last checkpoint is whole, --resume goes on"
        ) from None


def read_json_lines(path):
    """The rows of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def written_whole(output):
    """A folder beside `output`, with its logs, that takes its place if the block ends well."""
    fresh = _beside(output, "new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        for name in LOGS:
            if (output / name).exists():
                shutil.copy(output / name, fresh)
        yield fresh
        for path in fresh.rglob("*"):  # handed to the disk before any name changes
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if output.exists():
        output.rename(_beside(output, "old"))
    fresh.rename(output)
    _remove_replaced(output)
