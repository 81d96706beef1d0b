"""What two stages share and no equation names: flags, data, tokenizers, models and checkpoints.

Nothing here knows about RLHF. The losses, masks, log-probabilities and training loops stand in the stage files, in the
order in which they run; this file is the plumbing to look up when a name in them is not clear.
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

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import GenerationConfig, HfArgumentParser

HERE = pathlib.Path(__file__).parent
DATA = HERE / "data"  # the embedded world


# === Flags and errors =============================================================================
class UserError(Exception):
    """The user can mend this: shown as one line on standard error, exit status 2, no traceback."""


@contextlib.contextmanager
def command_line():
    """Run a stage as a command: libraries keep quiet, and a `UserError` ends it with one line and status 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except UserError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{pathlib.Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def arg(default, help, group=None):
    """One line of a stage's `Config`: a default, its help text, and on the first flag of a group the group's heading."""
    return dataclasses.field(default=default, metadata={"help": help.replace("%", "%%"), "group": group})


class _Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(message)


class _HelpFormatter(argparse.HelpFormatter):
    """`--max-grad-norm FLOAT   help (default: 1.0)`: dashes only, and the default where it says something."""

    def _format_action_invocation(self, action):
        names = [name for name in action.option_strings if "_" not in name]
        if action.nargs is None and action.option_strings:
            kind = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.type.__name__.upper()
            names[-1] += f" {kind}"
        return ", ".join(names)

    def _get_help_string(self, action):
        shown = action.option_strings and action.default not in (None, argparse.SUPPRESS, False)
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


def parse_args(config_class, description, argv=None):
    """The command line as a `config_class`, a dataclass of `arg` fields (`argv` defaults to `sys.argv[1:]`).

    Raises:
        UserError: an unknown flag (with the nearest known one), a value of the wrong type, a value not among the choices.
    """
    groups = []  # HfArgumentParser makes one --help heading per dataclass, so the fields are dealt out by heading
    for field in dataclasses.fields(config_class):
        if field.metadata["group"]:
            groups.append((field.metadata["group"], []))
        plain = dataclasses.field(default=field.default, metadata={"help": field.metadata["help"]})
        groups[-1][1].append((field.name, field.type, plain))
    parts = [
        dataclasses.make_dataclass("Group", fields, namespace={"_argument_group_name": heading})
        for heading, fields in groups
    ]
    usage = f"python {pathlib.Path(sys.argv[0]).name} [--flag value ...]"
    format_help = lambda prog: _HelpFormatter(prog, max_help_position=34, width=118)
    parser = _Parser(parts, description=description, usage=usage, formatter_class=format_help, allow_abbrev=False)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        known = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(config_class)]
        nearest = difflib.get_close_matches(unknown[0].replace("_", "-"), known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the flags"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    return config_class(**{name: value for part in parsed for name, value in vars(part).items()})


def check_range(cfg, **rules):
    """Stop on the first flag out of its range, (lowest, highest), both allowed; None is not checked."""
    for name, (low, high) in rules.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            rule = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {rule}")


def by_size(value, table, model):
    """`value` if the user gave one, else the entry of `table`, ((parameters below, value), ...), for the model's size."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return value if value is not None else next(choice for limit, choice in table if size < limit)


# === Device and arithmetic ========================================================================
def pick_device(name):
    """The torch.device for `--device`: 'auto' is the first CUDA GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used: {str(error).splitlines()[0]}") from None


def arithmetic(device, dtype):
    """The autocast context for `--dtype`: bf16 matrix products if 'bf16', or if 'auto' on a CUDA GPU; else float32.

    The weights stay float32 in either case. An Adam step moves a weight by about the learning rate; at 3e-6 that is
    below half the spacing of bf16 numbers near 0.02, so bf16 weights would round most updates away.
    """
    bf16 = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def now(device):
    """Seconds, after the device has finished what it was given, so that differences are the time of a phase."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# === Data =========================================================================================
def read_rows(path, formats):
    """The rows of a JSON Lines file (.jsonl or .jsonl.gz) as dicts.

    Args:
        path: the file.
        formats: the accepted sets of keys, e.g. [("prompt", "completion"), ("text",)]; each row has one of them, all
            strings. Other keys are kept.

    Raises:
        UserError: no such file, no rows, or a row that is not such an object, by file and line.
    """
    example = " or ".join(json.dumps({key: "..." for key in keys}) for keys in formats)
    rows = []
    try:
        with gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_parse_row(line, formats, f"{path} line {number}", example))
    except (OSError, EOFError) as error:
        raise UserError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise UserError(f"{path} has no rows; each line is one like {example}")
    return rows


def _parse_row(line, formats, where, example):
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the line); write one like {example}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({getattr(error, 'msg', error)}); write one like {example}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object; write one like {example}")
    keys = next((keys for keys in formats if all(key in row for key in keys)), None)
    if keys is None:
        raise UserError(f"{where}: has the keys {', '.join(row) or '(none)'}; write one like {example}")
    for key in keys:
        if not isinstance(row[key], str):
            raise UserError(f"{where}: {key!r} is a {type(row[key]).__name__}, not a string; write one like {example}")
        if any("\ud800" <= letter <= "\udfff" for letter in row[key]):
            raise UserError(f"{where}: {key!r} has half of a surrogate pair, which no tokenizer can read; remove it")
    return row


def report_dropped(num_dropped, num_rows, source):
    """Say how many rows were too long; stop if no other is left."""
    if num_dropped == num_rows:
        raise UserError(f"no row of {source} fits; raise --max-prompt-length or --response-length")
    if num_dropped:
        print(f"  {num_dropped} of {num_rows} rows of {source} are too long and were left out (--max-prompt-length, --response-length)")


def hold_out(rows, most, seed):
    """(training rows, held-out rows): a tenth of the rows, at most `most`, drawn at random by `seed`."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    number = min(most, len(rows) // 10)
    if number == 0:
        raise UserError(f"{len(rows)} rows are too few to hold a tenth of them out; add rows or give the held-out ones in a file of their own")
    return [rows[i] for i in order[number:]], [rows[i] for i in order[:number]]


def length_bucketed(lengths, batch_size, generator):
    """One epoch of batches (lists of row indices), each of rows of like length, in random order.

    Rows of like length share a batch, so little is padding. Sorting the whole set would make every epoch's batches the
    same, so the rows are shuffled first and sorted only within windows of 32 batches. The last batch may be smaller.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = 32 * batch_size
    batches = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda row: lengths[row])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def pad(sequences, pad_id, side):
    """Lists of token ids as (tokens (B, T) int64, attention_mask (B, T) bool), padded on `side`, 'left' or 'right'.

    Either side is right as long as mask and position ids follow. Prompts are padded left so that all responses start
    in one column; finished texts are padded right.
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
    """The tokenizer of a folder or hub id, with an EOS token and a pad token that is not the EOS token.

    pad = eos harms only code that finds the end of a text by asking "is this pad?". Nothing in this project does, but
    `AutoModelForSequenceClassification` does: with pad = eos it reads the token before EOS. So the folders written
    here have a pad token of their own, `<|pad|>` if the tokenizer brings none.
    """
    tokenizer = _load(AutoTokenizer, path, made_by)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no EOS token, so no response could end; set eos_token in it")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def encode_prompt(tokenizer, text):
    """Token ids of a prompt, with BOS in front where the tokenizer puts one, and no second BOS."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer("a")["input_ids"][0]  # what the tokenizer itself puts before a text
    starts_with_bos = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    return ids if not starts_with_bos or ids[:1] == [first] else [first] + ids


def encode_response(tokenizer, text):
    """Token ids of a response and the EOS that ends it. Prompt ids + response ids are the whole sequence."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def eos_token_ids(tokenizer, model):
    """All ids that end a text, sorted: the tokenizer's EOS and those of the model's generation config (chat models have several)."""
    stored = getattr(model, "generation_config", model.config).eos_token_id
    stored = stored if isinstance(stored, list) else [stored]
    return sorted({tokenizer.eos_token_id, *(token for token in stored if token is not None)})


# === Models =======================================================================================
def _load(auto_class, path, made_by, **options):
    """`auto_class.from_pretrained(path)`, safetensors only, no remote code; `made_by` is the command that makes `path`."""
    is_model = hasattr(auto_class, "_model_mapping")
    try:
        if made_by and not os.path.isdir(path) and (HERE / path).parent.name == "ckpt":
            raise OSError("no such folder")
        options |= {"use_safetensors": True, "output_loading_info": True} if is_model else {}
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = "is not a folder here or a model that can be fetched" if not os.path.isdir(path) else "can't be loaded"
        raise UserError(f"{path} {where}: {reason}" + (f"; make it with: {made_by}" if made_by else "")) from None


def _config_without_dropout(path, made_by, **options):
    """The model's config with every dropout rate at 0: two passes with different dropout masks are two policies."""
    config = _load(AutoConfig, path, made_by, **options)
    for name, value in config.to_dict().items():
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_causal_lm(path, tokenizer, made_by=None):
    """A causal LM in float32, without dropout, with an embedding for every token of `tokenizer`.

    dtype is always passed: transformers 5 otherwise takes the checkpoint's, often bf16.
    """
    config = _config_without_dropout(path, made_by)
    model, info = _load(AutoModelForCausalLM, path, made_by, config=config, dtype=torch.float32)
    if info["missing_keys"]:
        raise UserError(f"{path} is not a whole causal LM: it has no {sorted(info['missing_keys'])[0]}")
    fit_embeddings(model, tokenizer)
    set_generation_defaults(model, tokenizer)
    return model


def set_generation_defaults(model, tokenizer, temperature=1.0):
    """Replace the generation settings stored with a model (top_k = 50, a minimum length, ...) by plain sampling.

    `generate` fills what its caller leaves open from these, so they would leak into the rollouts; and the folder that
    is saved then samples from the very distribution that was trained.
    """
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos_token_ids(tokenizer, model), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.config.pad_token_id = tokenizer.pad_token_id


def load_scalar_model(path, tokenizer, made_by=None):
    """(model, head_is_new): a sequence classifier with one label in float32, as reward model or critic.

    A causal LM's folder gives a trunk with a new, untrained head, and head_is_new is True.
    """
    config = _config_without_dropout(path, made_by, num_labels=1)
    config.pad_token_id = tokenizer.pad_token_id
    config.reward_mean, config.reward_std = getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)
    model, info = _load(AutoModelForSequenceClassification, path, made_by, config=config, dtype=torch.float32)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(f"{path}: a {type(model).__name__} has no per-token `score` head; use a decoder-only model")
    fit_embeddings(model, tokenizer)
    return model, bool(info["missing_keys"])


def fit_embeddings(model, tokenizer):
    """Add rows for tokens that the tokenizer has and the model has not (a new pad token); many models have spare ones."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def check_context(model, length, flags):
    """Stop if sequences of `length` tokens do not fit the positions that the model was made with."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"sequences of up to {length} tokens do not fit the model's {limit} positions; lower {flags}")


def enable_gradient_checkpointing(model):
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradients."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in train mode only; dropout is off by the config


def position_ids(attention_mask):
    """0, 1, 2, ... from each row's first attended token, (B, T). Left-padded rows need it: `generate` numbers them so."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def token_scores(model, tokens, attention_mask):
    """The scalar model's output at every token, (B, T) float32: a reward model's score, or a critic's value, up to there.

    Scaled by the model's `reward_mean` and `reward_std`, so that the reference completions have mean 0 and deviation 1.
    """
    hidden = model.base_model(
        input_ids=tokens, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
    ).last_hidden_state
    with torch.autocast(tokens.device.type, enabled=False):  # bf16 would keep three digits of a score
        scores = model.score(hidden.float()).squeeze(-1)
    return (scores - model.config.reward_mean) / model.config.reward_std


def last_token_index(attention_mask):
    """Index of each row's last attended token, (B,), whichever side the padding is on."""
    return attention_mask.long().cumsum(-1).argmax(-1)


@torch.no_grad()
def generate_responses(model, prompts, prompt_mask, response_length, temperature):
    """Sample one response per left-padded prompt, (B, P) -> (B, R) token ids, R <= response_length; pad after an EOS.

    Temperature is the only setting: top-k and top-p would sample from another distribution than the one whose
    log-probabilities PPO computes. Call it inside the autocast context of the training forward.
    """
    plain = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=response_length,
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=model.generation_config.pad_token_id,
    )  # fmt: skip
    tokens = model.generate(prompts, attention_mask=prompt_mask, generation_config=plain, use_cache=True)
    return tokens[:, prompts.shape[1] :]


def describe(role, model, trained):
    """One start-up line about a model: its size, data type and whether it is trained."""
    size = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"  {role:<14}{type(model).__name__:<34}{size / 1e6:>9.2f} M  {dtype:<9}{'trained' if trained else 'frozen'}"


def print_tokens(tokenizer, model, prompt, response=()):
    """A start-up line with the special tokens and one row token by token, where a doubled BOS or a lost EOS is seen."""
    ends = ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)!r}" for token in eos_token_ids(tokenizer, model))
    print(f"  EOS {ends}; pad {tokenizer.pad_token_id} {tokenizer.pad_token!r}; the first row, token by token:")
    show = lambda ids: "|".join(tokenizer.decode([token]).replace("\n", "\\n") for token in ids)
    line = show(prompt) + (" => " + show(response) if len(response) else "")
    print(f"    {line if len(line) <= 300 else line[:200] + ' ... ' + line[-100:]}")


# === Checkpoints ==================================================================================
def prepare_output(output):
    """Make the folder that the checkpoint's folder goes into, so that a bad path fails before the work and not after."""
    try:
        pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(pathlib.Path(output).with_suffix(".probe")):
            pass
        shutil.rmtree(pathlib.Path(output).with_suffix(".probe"))
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror}") from None


def append_json_line(path, row):
    """Add one row to a JSON Lines file; a number that is not finite becomes null, since JSON has no NaN."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def written_whole(output):
    """Yield an empty folder beside `output`; it takes the place of `output` when the block ends, or goes if it fails."""
    output = pathlib.Path(output)
    fresh, replaced = (output.with_name(output.name + suffix) for suffix in (".new", ".old"))
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
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
