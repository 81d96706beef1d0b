"""What two stages share and no equation names: flags, data, tokenizers, models and checkpoints.

Nothing here is about RLHF. Losses, masks, log-probabilities and training loops stand in the stage
files, in the order in which they run; look here when a helper's name is not enough.
"""

import argparse
import contextlib
import dataclasses
import difflib
import gzip
import json
import math
import os
import pathlib
import random
import shutil
import sys
import time
import warnings
import zlib

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, GenerationConfig, HfArgumentParser

HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE / "data"  # the embedded world


# === Flags and errors =============================================================================
class UserError(Exception):
    """The user can mend this: one line on standard error, exit status 2, no traceback."""


@contextlib.contextmanager
def command_line():
    """Run a stage as a command: quiet libraries, and one line in place of a traceback."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    script = pathlib.Path(sys.argv[0]).name
    try:
        yield
    except UserError as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(130)


def arg(default, help, group=None):
    """One flag of a `Config`: default, help, and the heading if it opens a group of --help."""
    metadata = {"help": help.replace("%", "%%"), "group": group}
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(message)


class _HelpFormatter(argparse.HelpFormatter):
    """`--max-grad-norm FLOAT   help (default: 1.0)`, where argparse would name underscores too."""

    def _format_action_invocation(self, action):
        names = [name for name in action.option_strings if "_" not in name]
        if action.nargs is None and action.option_strings:
            choices = action.choices and "{" + ",".join(map(str, action.choices)) + "}"
            names[-1] += " " + (choices or action.type.__name__.upper())
        return ", ".join(names)

    def _get_help_string(self, action):
        shown = action.option_strings and action.default not in (None, argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


def parse_args(config_class, description, argv=None):
    """The command line as a `config_class`, a dataclass of `arg` fields.

    Raises:
        UserError: an unknown flag (the nearest one is named), a wrong type, a value not offered.
    """
    groups = []  # HfArgumentParser prints one heading per dataclass: deal the fields out to some
    for field in dataclasses.fields(config_class):
        if field.metadata["group"]:
            groups.append((field.metadata["group"], []))
        metadata = {"help": field.metadata["help"]}
        plain = dataclasses.field(default=field.default, metadata=metadata)
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
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not known; use auto, cpu, cuda, cuda:1 or mps")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} can't be used: {reason}") from None


def arithmetic(device, dtype):
    """The autocast context of --dtype: matrix products in bf16, or in float32.

    The weights are float32 either way. An Adam step moves a weight by about the learning rate; at
    3e-6 that is far below half the spacing of bf16 numbers near 0.02, so in bf16 weights most
    updates would be rounded away.
    """
    bf16 = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def now(device):
    """Seconds, once the device has finished what it was given; differences time a phase."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# === Data =========================================================================================
def read_rows(path, formats):
    """The rows of a JSON Lines file, .jsonl or .jsonl.gz, as dicts.

    Args:
        path: the file.
        formats: the accepted sets of keys, such as [("prompt", "completion"), ("text",)]. Each row
            has all keys of one of them, with strings as values; other keys are kept.

    Raises:
        UserError: no such file, no rows, or a row that does not fit, by file and line.
    """
    example = " or ".join(json.dumps(dict.fromkeys(keys, "...")) for keys in formats)
    rows = []
    try:
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                rows.append(_parse_row(line, formats, f"{path} line {number}", example))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't read {path}: {reason}") from None
    if not rows:
        raise UserError(f"{path} has no rows; a line is like {example}")
    return rows


def _parse_row(line, formats, where, example):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({error})" if line.strip() else "is empty"
    else:
        problem = _row_problem(row, formats)
    if problem:
        raise UserError(f"{where} {problem}; write lines like {example}")
    return row


def _row_problem(row, formats):
    if not isinstance(row, dict):
        return f"is a JSON {type(row).__name__}, not an object"
    keys = next((keys for keys in formats if all(key in row for key in keys)), None)
    if keys is None:
        return f"has the keys {', '.join(map(repr, row)) or '(none)'}"
    for key in keys:
        if not isinstance(row[key], str):
            return f"has a {type(row[key]).__name__} under {key!r}, not a string"
        if any("\ud800" <= letter <= "\udfff" for letter in row[key]):
            return f"has half of a surrogate pair under {key!r}, which is not text"
    return None


def report_dropped(num_dropped, num_rows, source):
    """Say how many rows were too long; stop if none is left."""
    flags = "--max-prompt-length and --response-length"
    if num_dropped == num_rows:
        raise UserError(f"all {num_rows} rows of {source} are empty or too long; see {flags}")
    if num_dropped:
        print(f"  dropped {num_dropped} of {num_rows} rows of {source}: empty or above {flags}")


def hold_out(rows, most, seed):
    """(training rows, held-out rows): a tenth of the rows, at most `most`, drawn by `seed`."""
    number = min(most, len(rows) // 10)
    if number == 0:
        raise UserError(f"{len(rows)} rows are too few to hold some out; give them in a file")
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[number:]], [rows[i] for i in order[:number]]


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
def load_tokenizer(path, made_by=None):
    """The tokenizer of a folder or hub id, with an EOS token and another pad token.

    pad = EOS harms only code that finds the end of a text by asking "is this pad?". Nothing here
    does, but transformers' sequence classification does: it would read the token before the EOS.
    """
    tokenizer = _load(AutoTokenizer, path, made_by)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no EOS token, so no text could end; set one")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def encode_prompt(tokenizer, text):
    """Token ids of a prompt, with one BOS in front if this tokenizer begins its texts with it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id]
    begins_with_bos = tokenizer("a")["input_ids"][:1] == bos
    return bos + ids if begins_with_bos and ids[:1] != bos else ids


def encode_response(tokenizer, text):
    """Token ids of a response and its EOS. Prompt ids + response ids are the whole sequence."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def eos_token_ids(tokenizer, model):
    """All ids that end a text, sorted: the tokenizer's EOS, and those stored with the model."""
    stored = getattr(model, "generation_config", model.config).eos_token_id
    stored = stored if isinstance(stored, list) else [stored]
    return sorted({tokenizer.eos_token_id, *stored} - {None})


# === Models =======================================================================================
def _load(auto_class, path, made_by, **options):
    """`auto_class.from_pretrained`: no remote code, no pickles; `made_by` is what makes `path`."""
    if "dtype" in options:  # a model
        options |= {"use_safetensors": True, "output_loading_info": True}
    hint = f"; make it with: {made_by}" if made_by else ""
    if hint and not os.path.isdir(path) and path.split("/")[0] == "ckpt":
        raise UserError(f"there is no folder {path}{hint}")  # no use in asking the hub
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # transformers, tokenizers and safetensors each have their own
        what = "can't be loaded" if os.path.isdir(path) else "is no folder and can't be fetched"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{path} {what}: {reason}{hint}") from error


def _config_without_dropout(path, made_by, **options):
    """The model's config with all dropout off: two passes under two masks are two policies."""
    config = _load(AutoConfig, path, made_by, **options)
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_causal_lm(path, tokenizer, made_by=None):
    """A causal LM in float32, without dropout, with an embedding for each of the tokens.

    The dtype is always passed: transformers 5 otherwise takes the checkpoint's, often bf16.
    """
    config = _config_without_dropout(path, made_by)
    model, info = _load(AutoModelForCausalLM, path, made_by, config=config, dtype=torch.float32)
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


def load_scalar_model(path, tokenizer, made_by=None):
    """(model, head_is_new): a sequence classifier with one label in float32, without dropout.

    From the folder of a causal LM it is that trunk with a new, untrained head.
    """
    config = _config_without_dropout(path, made_by, num_labels=1)
    for name, neutral in (("reward_mean", 0.0), ("reward_std", 1.0)):
        setattr(config, name, getattr(config, name, neutral))
    if not (math.isfinite(config.reward_mean) and 0 < config.reward_std < math.inf):
        raise UserError(f"{path}: reward_mean and reward_std in its config are no scale of scores")
    model, info = _load(
        AutoModelForSequenceClassification, path, made_by, config=config, dtype=torch.float32
    )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(f"{path} is a {type(model).__name__}; only decoders with a head are read")
    lost = sorted(key for key in info["missing_keys"] if not key.startswith("score."))
    if lost:
        raise UserError(f"{path} is not whole: it has no {lost[0]}")
    fit_embeddings(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, bool(info["missing_keys"] or info["mismatched_keys"])


def fit_embeddings(model, tokenizer):
    """Add an embedding for the new pad token if the model has no spare one."""
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size + 1:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model embeds only {size}")
    if len(tokenizer) > size:
        model.resize_token_embeddings(len(tokenizer))


def check_context(model, length, flags):
    """Stop if sequences of `length` tokens do not fit the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"{length} tokens do not fit the model's {limit} positions; lower {flags}")


def enable_gradient_checkpointing(model):
    """Recompute activations in the backward pass: less memory, more time, the same gradient."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints only in train mode; dropout is off by the config


def position_ids(attention_mask):
    """0, 1, 2, ... from each row's first attended token on, (B, T); `generate` counts the same."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def token_scores(model, tokens, attention_mask):
    """The scalar model's output at each token, (B, T) float32: score or value of the text so far.

    In the unit of `reward_mean` and `reward_std`: reference completions have mean 0, deviation 1.
    """
    hidden = model.base_model(
        input_ids=tokens, attention_mask=attention_mask, use_cache=False,
        position_ids=position_ids(attention_mask),
    ).last_hidden_state  # (B, T, width)
    with torch.autocast(tokens.device.type, enabled=False):  # bf16 keeps three digits of a score
        scores = model.score(hidden.float()).squeeze(-1)
    return (scores - model.config.reward_mean) / model.config.reward_std


def last_token_index(attention_mask):
    """Index of each row's last attended token, (B,), on whichever side the padding is."""
    return attention_mask.long().cumsum(-1).argmax(-1)


@torch.no_grad()
def generate_responses(model, prompts, prompt_mask, response_length, temperature):
    """Sample a response to each left-padded prompt: (B, P) -> (B, R) ids, R <= response_length.

    After an EOS a row holds pad. Temperature is the only setting, since top-k or top-p would sample
    from another distribution than the one whose log-probabilities are computed.
    """
    stored = model.generation_config
    sampling = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=response_length,
        eos_token_id=stored.eos_token_id, pad_token_id=stored.pad_token_id,
    )
    training = model.training
    model.eval()  # in train mode, gradient checkpointing would sample without the key-value cache
    tokens = model.generate(prompts, attention_mask=prompt_mask, generation_config=sampling)
    model.train(training)
    return tokens[:, prompts.shape[1] :]


# === Start-up report ==============================================================================
def describe(role, model, trained):
    """One line about a model: its role, class, size, data type, and whether it is trained."""
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    name, state = type(model).__name__, "trained" if trained else "frozen"
    return f"  {role:<14}{name:<34}{size:>10.3f} M  {dtype:<9}{state}"


def print_tokens(tokenizer, model, prompt, response=()):
    """The special tokens, and one row token by token: a doubled BOS or a lost EOS is seen here."""
    eos = [f"{i} {tokenizer.convert_ids_to_tokens(i)}" for i in eos_token_ids(tokenizer, model)]
    pieces = [tokenizer.decode([i]).replace("\n", "\\n") for i in [*prompt, *response]]
    prompt_text, response_text = "|".join(pieces[: len(prompt)]), "|".join(pieces[len(prompt) :])
    line = f"{prompt_text}  =>  {response_text}" if response_text else prompt_text
    line = line if len(line) <= 240 else f"{line[:150]} ... {line[-80:]}"
    pad_token = f"{tokenizer.pad_token_id} {tokenizer.pad_token}"
    print(f"  EOS {', '.join(eos)}; pad {pad_token}; a row:\n    {line}")


# === Checkpoints ==================================================================================
def prepare_output(output):
    """Stop now, and not after the work, if `output` can't be written or holds other things.

    A run replaces its output folder whole, so only one that an earlier run wrote may be there.
    """
    if pathlib.Path(output).name in ("", ".."):
        raise UserError(f"--output {output!r} is no name for a new folder")
    probe = pathlib.Path(f"{output}.probe")
    try:
        probe.mkdir(parents=True, exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror}") from None
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f"--output {output} is a file; name a folder")
    held = set(os.listdir(output)) if os.path.isdir(output) else set()
    if held and "metrics.jsonl" not in held:
        raise UserError(f"--output {output} holds files of something else; name a new folder")


def append_json_line(path, row):
    """Add a row to a JSON Lines file; a number that is not finite becomes null."""
    is_nan = lambda value: isinstance(value, float) and not math.isfinite(value)
    row = {key: None if is_nan(value) else value for key, value in row.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def written_whole(output):
    """An empty folder beside `output` that takes its place when the block ends without an error."""
    output = pathlib.Path(output)
    fresh, replaced = pathlib.Path(f"{output}.new"), pathlib.Path(f"{output}.old")
    for leftover in (fresh, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if output.exists():
        output.rename(replaced)
    fresh.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
