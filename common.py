"""Tokenizers and models, as the stages share them: padding, encoding, loading, scoring, sampling.

Shapes    B rows, T columns of tokens; in sampling P of them are prompt and R response, and b rows
          of the B have not left the batch.
"""

import collections
import contextlib
import datetime
import inspect
import json
import math
import os
import re
from functools import partial

import jinja2.meta
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jinja2 import nodes
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DynamicCache
from transformers import GenerationConfig, PreTrainedConfig, StaticCache
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

HEAD = "score.safetensors"  # of a scalar model of a family without ForSequenceClassification
ADAPTER = "adapter_config.json"  # in a folder with what peft has trained, and no base model


class UserError(Exception):
    """The user can mend this: one line on standard error, exit status 2, no traceback."""


def is_out_of_memory(error):
    """Has a GPU, one of its libraries or the machine ("can't allocate memory") no memory left?"""
    texts = "out of memory|ALLOC_FAILED|allocate memory"
    is_one = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_one or re.search(texts, str(error)) is not None


# === Precision ====================================================================================
def place(model, device, dtype, gradient_checkpointing=False, compiled=False):
    """Move a model to its device and give it the precision of --dtype: see `autocast`.

    Trained weights stay float32. An Adam step moves a weight by about the learning rate; at 3e-6
    that is far below half the spacing of bf16 numbers near 0.02, so in bf16 weights most updates
    would be rounded away. Frozen matrices are rounded to bf16, which autocast does at each use
    anyway: half the memory, the same outputs to the last bit. What autocast does not round
    stays float32: embeddings, an lm_head tied to them, norms, and the score head (`token_scores`).
    """
    if not hasattr(model, "base_model"):  # a value head
        model.to(device)
        return
    in_bf16 = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    model.in_bf16 = model.base_model.in_bf16 = in_bf16
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    if in_bf16:
        score = getattr(getattr(model, "score", None), "weight", None)
        kept = {model.get_input_embeddings().weight, score}
        for module in model.modules():
            is_matrix = isinstance(module, (torch.nn.Linear, Conv1D)) and module.weight not in kept
            if is_matrix and not module.weight.requires_grad:
                module.to(torch.bfloat16)
    model.to(device)  # after the rounding, for there is less to move
    if gradient_checkpointing and is_trained:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"--gradient-checkpointing: {error}") from error
        model.train()  # transformers checkpoints only in train mode; what is random is off
    if is_trained:
        prove(model)
    if compiled:  # of a scalar model only the trunk is called
        (model.base_model if has_token_head(model) else model).compile(dynamic=True)
    model.samples_compiled = compiled and device.type == "cuda"


@torch.no_grad()
def prove(model):
    """Stop if something that all stages take for granted does not hold for this model.

    In the mode that trains, two forward passes give the same bits (nearly, on a GPU, which may add
    in another order): else they are two policies. A text gives the same beside padding as alone,
    whatever stands there, and its beginning the same as if it ended there. It can be sampled from.
    """
    is_scalar, name = has_token_head(model), type(model).__name__
    trunk = model.base_model if is_scalar else model
    tokens = torch.arange(3, 67, device=model.device).view(2, 32)
    tokens, mask = tokens % model.get_input_embeddings().num_embeddings, tokens > 0
    mask[1, :9] = False  # not the pad token stands there, whose embedding may be 0

    def read(*part):
        output = forward(trunk, tokens[part], mask[part])
        return (output.last_hidden_state if is_scalar else output.logits).float()

    differ = lambda a, b: ((a - b).norm() / b.norm()).item()
    try:
        whole, again = (read(slice(2), slice(32)) for _ in range(2))
        padded = differ(whole[1:, 9:], read(slice(1, 2), slice(9, 32)))
        ahead = differ(whole[:1, :20], read(slice(1), slice(20)))
        if not is_scalar:
            on_cuda = model.device.type == "cuda"
            with torch.random.fork_rng(devices=[model.device] if on_cuda else []):
                generate_responses(model, tokens, mask, 2, 1.0)
    except Exception as error:  # each family has its own
        if is_out_of_memory(error) or isinstance(error, FloatingPointError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"a {name} can't be read or sampled from: {reason}") from error
    if differ(whole, again) > (0 if model.device.type == "cpu" else 1e-3):
        what = "draws random numbers in its forward pass; what in its config.json is noise?"
    elif max(padded, ahead) > 0.05:
        what = f"reads {'the padding' if padded > 0.05 else 'what comes later'}: no policy here"
    else:
        return
    raise UserError(f"a {name} {what}")


def check_hidden_states(model):
    """Stop if the last hidden states of a causal LM are not (B, T, width)."""
    one = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    hidden = forward(model, one, one.bool(), output_hidden_states=True).hidden_states[-1]
    if hidden.shape != (1, 1, model.get_output_embeddings().in_features):
        what = f"the hidden states of a {type(model).__name__} are {tuple(hidden.shape)}"
        raise UserError(f"{what} for one token; take --critic separate")


def autocast(model):
    """A context with the model's precision: matrix products in bf16, or all in float32."""
    in_bf16 = getattr(model, "in_bf16", False)  # float32 unless `place` said otherwise
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=in_bf16)


def forward(model, tokens, attention_mask, **options):
    """The model's output for tokens (B, T), in its precision and with positions that skip padding.

    Left to itself, a model counts the padding on the left too, and reads another text.
    """
    with autocast(model):
        return model(
            input_ids=tokens, attention_mask=attention_mask, use_cache=False,
            position_ids=position_ids(attention_mask), **options,
        )


# === Several processes ============================================================================
# Under torchrun each process has the models and the whole batch, takes its share of the rows
# through them, and writes what comes out into its rows of a tensor of zeros: the sum is the whole.
def share(rows):
    """This process's part of rows, a list or a tensor: every n-th of them; alone, all."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def total(tensor):
    """The sum of the tensors that all processes call this with, in place and on each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# === Padding and batches ==========================================================================
def pad(sequences, pad_id, side):
    """Lists of token ids as tokens (B, T) int64 and attention_mask (B, T) bool.

    `side`, 'left' or 'right', is where the padding goes. Either is right as long as mask and
    position ids follow; prompts go left so that all responses start in the same column.
    """
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    ones = [torch.ones(len(ids), dtype=torch.bool) for ids in sequences]
    tokens = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    return tokens, pad_sequence(ones, batch_first=True, padding_side=side)


def position_ids(attention_mask):
    """0, 1, 2, ... from each row's first attended token on, (B, T); `generate` counts the same."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_token_index(attention_mask):
    """Index of each row's last attended token, (B,), on whichever side the padding is."""
    return attention_mask.long().cumsum(-1).argmax(-1)


def epochs_by_length(lengths, batch_size, generator):
    """Batches of row indices for ever, each of rows of like length, in random order.

    Rows of like length need little padding. Sorting the whole set would make the batches the same
    in every epoch, so rows are shuffled first and sorted within windows of 32 batches.
    """
    while True:
        order, batches = torch.randperm(len(lengths), generator=generator).tolist(), []
        for start in range(0, len(order), 32 * batch_size):
            window = sorted(order[start : start + 32 * batch_size], key=lambda row: lengths[row])
            batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def parts_by_length(attention_mask, index, size):
    """Parts of up to `size` rows, each with the columns that it needs; of several processes each
    has its own.

    Args:
        attention_mask: (B, T), best on the CPU, where reading it makes nobody wait.
        index: the rows that are wanted, int64 on the CPU.

    Yields:
        rows: indices (b,) of `index` in order of length, prompt and response together.
        columns: the slice of the T columns from the first attended one to the last.

    What is left out is padding, which no result depends on; what stays is the longest prompt of the
    part beside its longest response. A part without padding spares attention its mask (not under
    --compile), and so gets the fastest kernel.
    """
    attention_mask = attention_mask.cpu()
    by_length = attention_mask[index].sum(1).argsort(stable=True)
    mine = share(index[by_length])
    for rows in mine.split(size) if len(mine) else ():
        first, last = attention_mask[rows].any(0).nonzero()[[0, -1], 0].tolist()
        yield rows, slice(first, last + 1)


# === Tokenizers ===================================================================================
def load_tokenizer(path, made_by=None, trust_remote_code=False, needs_eos=True, chat_kwargs=None):
    """The tokenizer of a folder or hub id, with an EOS token and another pad token.

    `chat_kwargs` are for `set_template_kwargs`. Where the chat template writes today's date, it
    stays that of the first stage: tomorrow the same chat would be other tokens.

    pad = EOS harms only code that finds the end of a text by asking "is this pad?". Nothing here
    does, but transformers' sequence classification does: it would read the token before the EOS.
    """
    tokenizer = load(AutoTokenizer, path, made_by, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None and needs_eos:
        raise UserError(f"the tokenizer of {path} has no EOS token, so no text could end; set one")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if chat_kwargs is not None:
        set_template_kwargs(tokenizer, chat_kwargs)
    if "strftime_now" in str(tokenizer.chat_template):  # kept in tokenizer_config.json
        tokenizer.init_kwargs.setdefault("rendered_on", str(datetime.date.today()))
    return tokenizer


notes = collections.Counter()  # what `encode` met that must not go unsaid: {what: examples}


def encode(tokenizer, prompt, response=None, eos_ids=(), tools=None, may_drop=False):
    """(prompt ids, response ids) of one text or chat; all stages make their ids here.

    Args:
        prompt: a string, or a chat up to the assistant's turn, a list of {"role", "content"}.
        response: a string, or messages that go on with the chat; None has no ids.
        eos_ids: what may end a response besides the tokenizer's EOS.
        tools: of a chat, a list of JSON schemas for its template.
        may_drop: whether the template may leave out words of the response, as thoughts.

    A response's ids are those by which the whole text goes on from the prompt's. They end with one
    EOS, where the policy's own response would: at the first one behind its words. (An EOS quoted
    within the words ends nothing here.) A string is begun as this tokenizer begins every text, with
    BOS or GLM's two tokens. A chat is rendered by the template, which writes BOS itself, up to the
    words that open the assistant's turn, and whole; what the second adds is the response.

    Raises:
        ValueError: no template, or it does not take this chat, or drops what is to be learned.
    """
    eos = [id for id in [tokenizer.eos_token_id] if id is not None]
    is_end = lambda id: id in eos or id in eos_ids
    if isinstance(prompt, str):
        opening, before = prompt, _ids_before_texts(tokenizer)
    else:
        opening, before = _opening(tokenizer, prompt, tools), []
    if tools and (isinstance(prompt, str) or "tools" not in str(tokenizer.chat_template)):
        notes["with tools that nothing renders"] += 1
    prompt_ids = _ids(tokenizer, opening)
    prompt_ids = prompt_ids if prompt_ids[: len(before)] == before else before + prompt_ids
    if response is None:
        return prompt_ids, []
    if isinstance(prompt, str):
        text, words = _string_response(tokenizer, response, {*eos, *eos_ids})
    else:
        text, words = _chat_response(tokenizer, prompt, response, opening, tools, may_drop)
    if not words.strip():
        notes["with an empty response, of which only the EOS is left"] += 1
    reply = _ids_behind(tokenizer, opening, text)
    num_within = sum(map(is_end, _ids(tokenizer, words)))  # of earlier turns, or quoted
    ends = [i for i, id in enumerate(reply) if is_end(id)][num_within:]
    return prompt_ids, reply[: ends[0] + 1] if ends else reply + eos


def decode(tokenizer, prompt_ids, response_ids):
    """The text of a response: what it adds to the decoded prompt, for no piece is decoded alone.

    Nothing is cleaned up or left out of it but EOS and padding: the texts of `encode` come back.
    """
    left_out = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    kept = [id for id in response_ids if id not in left_out]
    ids = [prompt_ids, prompt_ids + kept]
    prompt, whole = (tokenizer.decode(x, clean_up_tokenization_spaces=False) for x in ids)
    return whole[len(os.path.commonprefix([prompt, whole])) :]


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _ids_before_texts(tokenizer):
    """What the tokenizer puts before every text: BOS, nothing, or tokens of its own."""
    bare, full = _ids(tokenizer, "a"), tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    return full[: starts[0]] if starts else []


def _ids_behind(tokenizer, opening, text):
    """The ids of `text` behind `opening`: the rest of those of both.

    Where a token of both would reach across the border, `text` is tokenised behind something else
    that keeps its tokens to itself, so that prompt and response still decode to the same as both:
    alone it may get a space in front (SentencePiece, WordPiece).
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    first, both = _ids(tokenizer, opening), _ids(tokenizer, opening + text)
    if both[: len(first)] == first:
        return both[len(first) :]
    notes["with a token across the border of prompt and response, tokenised apart"] += 1
    for anchor in ("", "\n", ".", "a", "0", "Z", "-"):
        alone, rest = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
        keeps_apart = rest[: len(alone)] == alone
        if keeps_apart and decode(first + rest[len(alone) :]) == decode(both):
            return rest[len(alone) :]
    notes["that are not their text where prompt and response meet"] += 1
    return _ids(tokenizer, text)


def _string_response(tokenizer, response, eos_ids):
    """(a string, its words: all but the EOS and white space that it ends in)."""
    if not isinstance(response, str):
        raise ValueError("has a string as the prompt and messages as the response")
    ends = [re.escape(tokenizer.decode([id])) for id in eos_ids]
    words = re.sub(rf"(\s|{'|'.join(ends)})+\Z", "", response) if ends else response
    if any(id in eos_ids for id in _ids(tokenizer, words)):
        notes["with text behind an EOS, where no response gets"] += 1
    return response, words


def _opening(tokenizer, prompt, tools):
    """The text of a chat up to the words that open the assistant's turn."""
    if prompt[-1]["role"] == "assistant":
        raise ValueError("has a chat that ends with the assistant's message: nothing to answer")
    return render_chat(tokenizer, prompt, tools=tools, add_generation_prompt=True)


def _chat_response(tokenizer, prompt, response, opening, tools, may_drop):
    """(what the response adds to the opening of a chat, that up to the end of its last words)."""
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    whole = render_chat(tokenizer, prompt + response, tools=tools)
    shared, text = len(os.path.commonprefix([opening, whole])), whole[len(opening) :]
    mark = re.search(r"[<[]think(ing)?[]>](?=\s*\Z)", opening, re.IGNORECASE)
    opens, closes = (mark[0], f"{mark[0][0]}/{mark[0][1:]}") if mark else ("", "")  # a thought
    is_closed = may_drop or closes in text and not (opens and text.lstrip().startswith(opens))
    if shared < len(opening) or not is_closed:
        what = "a reply is not rendered as the chat so far and more"
        what = "its prompt opens a thought that the reply does not go on with" if opens else what
        place = max(shared - 12, 0)  # with some of what both have
        raise ValueError(
            f"does not fit the chat template: {what}, so no model that goes on with the one could "
            f"write the other: {opening[place:]!r} ends the prompt, and the whole has "
            f"{whole[place:][:40]!r}{_switches(tokenizer)}"
        )
    words = response[-1]["content"].strip()
    before = _opening(tokenizer, prompt + response[:-1], tools) if response[1:] else opening
    last_turn = len(before) - len(opening) if whole.startswith(before) else 0
    lost = _lost_words(text[last_turn:], response[-1])
    if lost and not may_drop:
        what = "has words of the assistant (or its reasoning_content) that the template drops"
        raise ValueError(f"{what}, from {lost!r} on; leave them out{_switches(tokenizer)}")
    if any(_lost_words(text, each) for each in response[:-1] if each["role"] == "assistant"):
        notes["with words of an earlier turn, thoughts say, that the template drops"] += 1
    words_start = text.find(words, last_turn)  # not there if the template changes them
    has_thoughts = set(response[-1]) > {"role", "content"}
    if before == opening and text[: max(words_start, 0)].strip() and not has_thoughts:
        notes["whose response begins with words of the template, a role or an empty thought"] += 1
    return text, text[: words_start + len(words) if words_start >= 0 else last_turn]


def _lost_words(text, message):
    """Words of a message, thoughts first, from the first that the text has not in its place; or "".

    White space and the marks of a thought are the template's own to write.
    """
    keys, position = ("reasoning_content", "reasoning", "thinking", "content"), 0
    parts = dict.fromkeys(str(message[key]) for key in keys if message.get(key))  # of two names one
    words = re.sub(r"</?\w+>|\[/?[A-Z]+\]", " ", " ".join(parts)).split()
    for i, word in enumerate(words):
        position = text.find(word, position) + len(word)
        if position < len(word):
            return " ".join(words[i : i + 4])
    return ""


def render_chat(tokenizer, messages, **options):
    """The text of a chat by the tokenizer's template; a ValueError if there is none or it fails."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"holds messages, but the tokenizer of {tokenizer.name_or_path or 'this model'} has no "
            "chat template; write plain strings, or give the tokenizer a template"
        )
    try:
        if day := tokenizer.init_kwargs.get("rendered_on"):
            day, template = datetime.datetime.fromisoformat(day), tokenizer.get_chat_template
            dated = lambda call: repr(day.strftime(call[2]))
            template = re.sub(TODAY, dated, template(tools=options.get("tools")))
            options["chat_template"] = template  # the one that is saved has today's date
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates are programs and raise what they like
        raise ValueError(f"does not fit the chat template: {error}") from error


TODAY = r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)"""  # transformers' function in a template
DEFAULTS = "{# --chat-template-kwargs #}", "{# end of --chat-template-kwargs #}\n"  # render as ""
ITS_OWN = (  # what transformers defines or keeps for itself, so that no default of it would be read
    r"messages|tools|documents|add_generation_prompt|continue_final_message|\w+_tokens?"
    "|raise_exception|strftime_now"
)

ASKED = "defined", "undefined", "default", "d"  # {% if enable_thinking is defined %}


def set_template_kwargs(tokenizer, text):
    """Write the arguments of --chat-template-kwargs into the chat template, as its defaults.

    So they are stored with the tokenizer and hold in later stages, pipelines and servers, whose
    callers may pass others. They replace those written before; {} leaves the bare template.
    """
    flag = f"--chat-template-kwargs {text}"
    try:
        kwargs = json.loads(text)
        json.dumps(kwargs, allow_nan=False, ensure_ascii=False).encode()  # Jinja can write all else
        known = template_arguments(tokenizer)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} is not JSON: {error}") from None
    except jinja2.TemplateError as error:
        raise UserError(f"{flag}: the chat template is none: {error}") from None
    if not isinstance(kwargs, dict):
        raise UserError(f'{flag} is no JSON object, like {{"enable_thinking": false}}')
    if not tokenizer.chat_template:
        raise UserError(f"{flag}: the tokenizer has no chat template")
    for name in [name for name in kwargs if name not in known]:
        what = f"{name!r} is nothing that the chat template can be told"
        raise UserError(f"{flag}: {what}; it can: {', '.join(known) or 'nothing'}")
    each = "{{% if {0} is not defined %}}{{% set {0} = {1!r} %}}{{% endif %}}"
    block = "".join(each.format(*item) for item in kwargs.items())  # Jinja reads Python's literals
    block = block.join(DEFAULTS) if block else ""
    templates = _templates(tokenizer)
    for name, template in templates.items():
        templates[name] = block + (template.partition(DEFAULTS[1])[2] or template)
    tokenizer.chat_template = templates if any(templates) else templates[""]


def _templates(tokenizer):
    """{name: chat template}; the only one of most tokenizers has the name ""."""
    templates = tokenizer.chat_template or {}
    return dict(templates) if isinstance(templates, dict) else {"": templates}


def template_arguments(tokenizer):
    """What the chat template may be told: names that it reads and either never sets or asks for."""
    environment, names = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]), set()
    for template in _templates(tokenizer).values():
        template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tag
        tree = environment.parse(template)
        is_set = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
        asked = [x.node for x in tree.find_all((nodes.Test, nodes.Filter)) if x.name in ASKED]
        is_set -= {node.name for node in asked if isinstance(node, nodes.Name)}
        names |= jinja2.meta.find_undeclared_variables(tree) - is_set
    return sorted(name for name in names if not re.fullmatch(ITS_OWN, name))


def _switches(tokenizer):
    """What an error says of them."""
    names = ", ".join(template_arguments(tokenizer))
    return f"; --chat-template-kwargs may tell the template: {names}" if names else ""


def eos_token_ids(tokenizer, model):
    """All ids that end a text, sorted: the tokenizer's EOS, and those stored with the model."""
    stored = getattr(getattr(model, "generation_config", model.config), "eos_token_id", None)
    stored = [id for id in (stored if isinstance(stored, list) else [stored]) if id is not None]
    size = model.get_input_embeddings().num_embeddings
    if not all(isinstance(id, int) and 0 <= id < size for id in stored):
        raise UserError(f"the model's eos_token_id is {stored}; it must be one or more token ids")
    return sorted({*stored, tokenizer.eos_token_id} - {None})


# === Models =======================================================================================
def load(auto_class, path, made_by=None, **options):
    """`auto_class.from_pretrained`: no pickles, no code unasked; `made_by` is what makes `path`."""
    hint = f"; make it with: {made_by}" if made_by else ""
    base = adapter_base(path)
    if base and not (auto_class is AutoTokenizer and find_file(path, "tokenizer_config.json")):
        try:
            return load(auto_class, base, **options)
        except UserError as error:
            raise UserError(f"{path} is an adapter of {base}: {error}") from error
    if not os.path.isdir(path):
        is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)
        if not is_hub_id or hint and path.split("/")[0] == "ckpt":
            raise UserError(f"there is no folder {path!r}{hint}")  # no use in asking the hub
        if auto_class is AutoTokenizer:  # the first that is asked for
            print(f"  {path} is no folder here: looking for it on the Hugging Face hub", flush=True)
    try:
        return auto_class.from_pretrained(path, **options)
    except Exception as error:  # transformers, tokenizers and safetensors each have their own
        if is_out_of_memory(error):
            raise
        remedy = ""
        what = "can't be loaded" if os.path.isdir(path) else "is no folder and can't be fetched"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if "trust_remote_code=True" in str(error):
            lines = ["it brings code of its own, which is run only with --trust-remote-code"]
        if options.get("attn_implementation"):  # may be a package that is not installed
            remedy = f"; or leave out --attention {options['attn_implementation']}"
        names = os.listdir(path) if os.path.isdir(path) else []
        if any(name.endswith(".bin") for name in names) and "model.safetensors" not in names:
            remedy = "; pickled weights (.bin) are never read: save them as safetensors"
        reason = " ".join(line.strip() for line in lines[:2]).rstrip(".")[:300]
        raise UserError(f"{path} {what}: {reason}{remedy}") from error


def adapter_base(path):
    """The folder or hub id of what `path` adapts, if it is a folder of peft's; else None."""
    file = os.path.join(path, ADAPTER)
    if not os.path.isfile(file):
        return None
    if os.path.isfile(os.path.join(path, "config.json")):  # transformers would load both in one
        raise UserError(f"{path} holds a model and an adapter; give each a folder of its own")
    try:
        with open(file, encoding="utf-8") as opened:
            base = json.load(opened)["base_model_name_or_path"]
        if not base or os.path.realpath(base) == os.path.realpath(path):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is an adapter, but its {ADAPTER} names no base model") from None
    return base


def _merge_adapter(model, path):
    """(the model with an adapter summed into its weights; the names of what the adapter holds).

    Raises:
        UserError: no peft, no safetensors, or other weights than the model has a place for.
    """
    try:
        import peft  # optional
    except ImportError:
        raise UserError(f"{path} is an adapter: it needs peft; pip install peft") from None
    file = os.path.join(path, "adapter_model.safetensors")
    if not os.path.isfile(file):
        raise UserError(f"{path} has no adapter_model.safetensors; pickled weights are never read")
    try:
        config = peft.PeftConfig.from_pretrained(path)
        config.task_type = None  # its class would ask a causal LM's methods of a scalar model
        adapted = peft.PeftModel.from_pretrained(model, path, config=config, torch_device="cpu")
        known = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        held = safetensors.torch.load_file(file).keys()
        model = adapted.merge_and_unload().requires_grad_(True)
    except Exception as error:  # peft, safetensors and torch each have their own
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the adapter {path} can't be merged: {reason}") from error
    if known ^ held:
        what = f"{len(held - known)} weights too many, {len(known - held)} too few"
        raise UserError(f"the adapter {path} does not fit: {what} ({min(known ^ held)})")
    return model, {key.removeprefix("base_model.model.") for key in held}


def _load_config(path, made_by, options):
    """The model's config with all that is random off: two passes would be two policies.

    Dropout goes by many names, layers may be dropped and routers jittered, in nested configs too.
    Settings that change what a forward pass returns are put back.
    """
    config = load(AutoConfig, path, made_by, **options)
    configs = [config]
    for each in configs:  # it grows
        configs += [x for x in vars(each).values() if isinstance(x, PreTrainedConfig)]
        for name, value in list(vars(each).items()):
            if re.search("drop|jitter", name) and type(value) in (int, float):
                setattr(each, name, type(value)(0))
            elif name in ("output_router_logits", "output_attentions", "output_hidden_states"):
                setattr(each, name, False)
        each.return_dict = True
    return config


def _load_weights(auto_class, path, made_by, config, options):
    """(model in float32, names of the weights that `path` does not hold).

    The dtype is always passed: transformers 5 otherwise takes the checkpoint's, often bf16.
    """
    base, options = adapter_base(path), options | {"config": config}
    if base:
        model, missing = _load_weights(auto_class, base, None, config, options)
        model, held = _merge_adapter(model, path)
        missing = {*missing} - held
    else:
        options |= {"dtype": torch.float32, "use_safetensors": True}
        model, info = load(auto_class, path, made_by, output_loading_info=True, **options)
        layers = [key for key in info["unexpected_keys"] if re.search(r"\.\d+\.", key)]
        if layers:  # other parts, a head say, are left out on purpose
            what = f"weights that its config has no place for: {len(layers)}, {layers[0]}"
            print(f"  {path} has {what}")
        missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{path} holds a weight that is not finite, in {name}")
    return model, sorted(missing)


def load_causal_lm(path, tokenizer, made_by=None, **options):
    """A causal LM in float32, without dropout, with an embedding for each of the tokens."""
    config = _load_config(path, made_by, options)
    kind = (config.architectures or [type(config).__name__])[0]
    is_encoder = config.is_encoder_decoder or re.search("Classification|MaskedLM", kind)
    if is_encoder or find_file(path, HEAD):
        raise UserError(f"{path} is no causal LM but a {kind}")
    model, missing = _load_weights(AutoModelForCausalLM, path, made_by, config, options)
    if missing:
        raise UserError(f"{path} is no causal LM: it has no {missing[0]}")
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


def load_classifier(path, made_by=None, **options):
    """(one-label sequence classifier, names of the weights that `path` does not hold)."""
    config = _load_config(path, made_by, options)
    is_classifier = "SequenceClassification" in str(config.architectures)
    if is_classifier and config.num_labels != 1:
        raise UserError(f"{path} has {config.num_labels} labels; a reward model has one")
    config.num_labels = 1
    mean, deviation = score_scale(config)
    is_number = type(mean) in (int, float) and type(deviation) in (int, float)
    if not (is_number and math.isfinite(mean) and 0 < deviation < math.inf):
        raise UserError(f"{path}: reward_mean and reward_std in its config are no scale of scores")
    known = type(config) in AutoModelForSequenceClassification._model_mapping
    if known or "AutoModelForSequenceClassification" in getattr(config, "auto_map", {}):
        return _load_weights(AutoModelForSequenceClassification, path, made_by, config, options)
    return _load_trunk(path, made_by, config, options)


def find_file(path, name):
    """Where a file of a model's folder or hub id lies; None if it has none."""
    quiet = dict.fromkeys(("missing_entries", "connection_errors"), False)
    return cached_file(path, name, **{f"_raise_exceptions_for_{k}": v for k, v in quiet.items()})


def _load_trunk(path, made_by, config, options):
    """The same for a family without such a class: its base model, with a linear head `score`."""
    if adapter_base(path):  # of a causal LM, whose names it uses
        model, missing = _load_weights(AutoModelForCausalLM, path, made_by, config, options)
        model = model.base_model
    else:
        model, missing = _load_weights(AutoModel, path, made_by, config, options)
    model.score = torch.nn.Linear(config.get_text_config().hidden_size, 1, bias=False)
    file = find_file(path, HEAD)
    if file:
        model.score.load_state_dict(safetensors.torch.load_file(file))
    return model, missing + ["score.weight"] * (not file)


def save_model(model, folder, state=None):
    """A model as a Hugging Face folder, with weights other than its own if `state` is given; a head
    that its class does not know as a file beside it.
    """
    if is_trunk(model):
        state = model.state_dict() if state is None else state
        head = {k.removeprefix("score."): v for k, v in state.items() if k.startswith("score.")}
        state = {k: v for k, v in state.items() if not k.startswith("score.")}
    model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    if is_trunk(model):
        safetensors.torch.save_file(head, os.path.join(folder, HEAD))


def read_model(model, folder):
    """Put what `save_model` wrote back into the model."""
    options = {"config": model.config, "dtype": torch.float32, "use_safetensors": True}
    weights = type(model).from_pretrained(folder, **options).state_dict()
    if os.path.exists(os.path.join(folder, HEAD)):
        head = safetensors.torch.load_file(os.path.join(folder, HEAD))
        weights |= {f"score.{key}": value for key, value in head.items()}
    model.load_state_dict(weights)


def load_scalar_model(path, tokenizer, made_by=None, **options):
    """(model, head_is_new): a decoder that scores each token, in float32, without dropout.

    From the folder of a causal LM it is that trunk with a new, untrained head.
    """
    model, missing = load_classifier(path, made_by, **options)
    if not has_token_head(model):
        raise UserError(f"{path} is a {type(model).__name__}; only decoders with a head are read")
    lost = [key for key in missing if not key.startswith("score.")]
    if lost:
        raise UserError(f"{path} is not whole: it has no {lost[0]}")
    fit_embeddings(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    with contextlib.suppress(OSError):  # what ends a causal LM's texts may stand only there
        stored = GenerationConfig.from_pretrained(adapter_base(path) or path).eos_token_id
        model.config.eos_token_id = model.config.eos_token_id if stored is None else stored
    return model, bool(missing)


def has_token_head(model):
    """Is it a decoder whose score is one linear layer on a token's last hidden state?"""
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


def is_trunk(model):
    """Is it a base model with a head added here, for want of a class of transformers?"""
    return has_token_head(model) and model.base_model is model


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


def check_context(model, length, flags="--max-prompt-length or --response-length"):
    """Stop if sequences of `length` tokens do not fit the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < length:  # XLNet says -1 for none
        raise UserError(
            f"{length} tokens do not fit the model's {limit} positions ({type(model).__name__}); "
            f"lower {flags}"
        )


# === Scores of a scalar model =====================================================================
def score_scale(config):
    """(mean, deviation) that the scores of a reward model are taken by; it may have none yet."""
    return getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)


def token_scores(model, tokens, attention_mask):
    """The scalar model's output at each token, (B, T) float32: score or value of the text so far.

    In the unit of `score_scale`: reference completions have mean 0 and deviation 1.
    """
    hidden = forward(model.base_model, tokens, attention_mask).last_hidden_state  # (B, T, width)
    scores = model.score(hidden.float()).squeeze(-1)  # in float32: bf16 keeps 3 digits of a score
    mean, deviation = score_scale(model.config)
    return (scores - mean) / deviation


def score_logits(model, **inputs):
    """A classifier's own logits (b, 1); those of a trunk with a head that its class does not know
    are raw `text_scores` of texts that are padded on the right.
    """
    if not is_trunk(model):
        return model(**inputs).logits
    mean, deviation = score_scale(model.config)
    scores = text_scores(model, inputs["input_ids"], inputs["attention_mask"].bool())
    return scores[:, None] * deviation + mean


def text_scores(model, tokens, attention_mask):
    """The score of each whole text, (B,) float32: the one at its last attended token.

    That is normally the EOS: only there has a causal model read everything.
    """
    last_index = last_token_index(attention_mask)[:, None]  # (B, 1)
    return token_scores(model, tokens, attention_mask).gather(1, last_index).squeeze(1)


# === Sampling =====================================================================================
def first_above(weights, uniform):
    """An index of weights (b, n), drawn in proportion to them by inversion: the first whose running
    sum exceeds uniform / 2^31 of the total; uniform (b,) int64 is below 2^31.

    The running sum is one of integers, exact in whatever order a GPU adds. In float32 it would lose
    small weights beside large ones; float64 not every GPU has.
    """
    shares = weights / weights.sum(-1, keepdim=True)
    summed = (shares * 2**31).long().cumsum(-1)  # (b, n)
    limit = uniform * summed[:, -1] >> 31  # below the total
    index = torch.searchsorted(summed, limit[:, None], right=True).squeeze(1)
    return index.clamp(max=weights.shape[1] - 1)  # it is n where a weight is nan


def sample_tokens(logits, temperature, uniform):
    """One id per row of logits (b, vocabulary), drawn from softmax(logits / temperature), and its
    log-probability, (b,) each.

    First a block of 128 ids, by the sums of their probabilities, then an id in it, each by a number
    of `uniform` (b, 2), see `first_above`. So only a few hundred numbers a row, and no vocabulary,
    are summed up one by one; torch.multinomial draws a random number per id. A row that holds an
    inf or a nan has no softmax: the log-probability is nan.
    """
    num_ids = logits.shape[1]
    logits = F.pad(logits, (0, -num_ids % 128), value=-math.inf)
    probabilities = (logits.float() / temperature).softmax(-1)
    blocks = probabilities.unflatten(1, (-1, 128))  # (b, blocks, 128)
    block = first_above(blocks.sum(-1), uniform[:, 0])
    in_block = blocks[torch.arange(len(block), device=block.device), block]  # (b, 128)
    tokens = (128 * block + first_above(in_block, uniform[:, 1])).clamp(max=num_ids - 1)
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


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


@torch.no_grad()
def generate_responses(model, prompts, prompt_mask, response_length, temperature):
    """Sample a response to each left-padded prompt (B, P): ids and log-probabilities, (B, R) each.

    R is at most response_length. After an EOS a row holds pad, and 0. Temperature is all: top-k or
    top-p would sample from another distribution than the log-probabilities' own. The loop is ours,
    where `model.generate` would do, since a row that has ended leaves the batch (bench/rollout.py
    times both): in company, as that copies the cache, and seen every fourth token, as a GPU's host
    waits to see it. State-space models want cache_params and a mask's end.
    """
    settings, training = model.generation_config, model.training
    eos_ids = torch.tensor(settings.eos_token_id, device=prompts.device)
    response = prompts.new_zeros(len(prompts), response_length)  # (B, R)
    logprobs, num_open = response.float(), response[0].clone()  # and how many have not ended, (R,)
    uniform = torch.randint(2**31, (*response.shape, 2)).to(prompts.device)  # drawn on the CPU
    is_state = "cache_params" in inspect.signature(model.forward).parameters
    rows = share(torch.arange(len(prompts), device=prompts.device))  # which are in the batch, (b,)
    is_open, response[rows] = torch.ones_like(rows, dtype=torch.bool), settings.pad_token_id
    cache, inputs, mask = GrowingCache(config=model.config), prompts[rows], prompt_mask[rows]
    as_cache = {"cache_params" if is_state else "past_key_values": cache}
    model.eval()  # in train mode, gradient checkpointing would sample without the key-value cache
    whole = getattr(model, "whole_weights", contextlib.nullcontext)  # of one divided by --shard
    with autocast(model), whole():  # all steps share one bf16 copy of the matrices
        for t in range(response_length if len(rows) else 0):  # prompts first, later a token each
            new = slice(-inputs.shape[1], None)
            output = model.forward(  # model() is what --compile compiles, for other shapes
                input_ids=inputs, attention_mask=mask[:, new] if is_state else mask, use_cache=True,
                position_ids=position_ids(mask)[:, new], logits_to_keep=1, **as_cache,
            )
            tokens, logprob = sample_tokens(output.logits[:, -1], temperature, uniform[rows, t])
            tokens = torch.where(is_open, tokens, settings.pad_token_id)
            response[rows, t], logprobs[rows, t] = tokens, torch.where(is_open, logprob, 0.0)
            num_open[t] = is_open.sum()
            is_open = is_open & ~torch.isin(tokens, eos_ids)
            inputs, mask = tokens[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            left = is_open.nonzero()[:, 0] if t % 4 == 3 else rows
            if len(left) == 0:
                break
            if len(left) <= 0.75 * len(rows):  # those that have ended leave
                cache.reorder_cache(left)  # recurrent states too
                rows, inputs, mask, is_open = (x[left] for x in (rows, inputs, mask, is_open))
    model.train(training)
    if not total(logprobs).isfinite().all():
        raise FloatingPointError("the logits are not finite")
    num_columns = total(num_open).count_nonzero()  # R: in the others all have ended
    return total(response)[:, :num_columns], logprobs[:, :num_columns]


@torch.no_grad()
def generate_compiled(model, prompts, prompt_mask, response_length, temperature):
    """The same by transformers' loop on a cache of fixed shapes: on CUDA one captured graph.

    The log-probabilities of what it draws would be logits of the whole vocabulary: there are none.
    """
    settings, training = model.generation_config, model.training
    sampling = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=response_length,
        eos_token_id=settings.eos_token_id or None, pad_token_id=settings.pad_token_id,
    )
    length = -(-(prompts.shape[1] + response_length) // 128) * 128  # few lengths, few graphs
    cache = FixedCache(config=model.config, max_cache_len=length)
    model.eval()
    with autocast(model):
        tokens = model.generate(
            prompts, attention_mask=prompt_mask, generation_config=sampling, past_key_values=cache
        )
    model.train(training)
    return tokens[:, prompts.shape[1] :], None
