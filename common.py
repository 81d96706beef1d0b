"""Tokenizers and models: padding, encoding, loading, adapters, scores, and the sampling loop.

Shapes    B rows, T columns of tokens. In sampling, P of the columns are prompt and R response, and
          b of the B rows are still being sampled.
"""

import collections
import copy
import functools
import inspect
import json
import os
import re

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedConfig
from transformers.modeling_layers import GenericForSequenceClassification as ClassifierParts
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D


class UserError(Exception):
    """An error that the user can mend: one line on standard error and exit status 2."""


def is_out_of_memory(error):
    """Returns whether an error says that GPU or machine memory ran out."""
    if isinstance(error, UserError):
        return False
    is_one = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_one or bool(re.search("out of memory|ALLOC_FAILED|allocate memory", str(error)))


def explain(error, what):
    """Raises a UserError or a lack of memory as it is, any other error as a one-line UserError."""
    if is_out_of_memory(error) or isinstance(error, UserError):
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    raise UserError(f"{what}: {text[:300]}") from error


# === Precision ====================================================================================
def to_device(model, device, dtype, gradient_checkpointing=False, compile=False):
    """Moves a model to its device, gives it the precision of --dtype, and checks a trained one.

    Trained weights stay float32: an Adam step of 3e-6 is far below half the spacing of bf16 numbers
    near 0.02 and would round to nothing. Frozen matrices become bf16, as autocast would round them
    anyway: half the memory, the same outputs. Embeddings, norms and score heads stay float32.
    """
    if isinstance(model, torch.nn.Linear):  # a value head
        model.to(device)
        return
    use_bf16 = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    model.use_bf16 = model.base_model.use_bf16 = use_bf16
    embedding = model.get_input_embeddings().weight  # an LM head may be tied to it
    for name, module in model.named_modules():
        if use_bf16 and isinstance(module, (torch.nn.Linear, Conv1D)) and name != "score":
            if not module.weight.requires_grad and module.weight is not embedding:
                module.to(torch.bfloat16)
    model.to(device)
    if any(weight.requires_grad for weight in model.parameters()):
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():  # all else stays in evaluation mode, without dropout
                module.training = isinstance(module, GradientCheckpointingLayer)
        check_model(model)
    if compile:  # of a scalar model only the trunk is called
        (model.base_model if has_token_head(model) else model).compile(dynamic=True)


def autocast(model):
    """Returns a context with the precision that `to_device` has set, else float32."""
    use_bf16 = getattr(model, "use_bf16", False)
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=use_bf16)


def forward(model, tokens, attention_mask, **options):
    """Returns the model's output for tokens (B, T). Positions skip the padding: by itself, a model
    would count padding on the left, too, and read another text.
    """
    with autocast(model):
        return model(
            input_ids=tokens, attention_mask=attention_mask, use_cache=False,
            position_ids=position_ids(attention_mask), **options,
        )


@torch.no_grad()
def check_model(model):
    """Raises UserError unless two forward passes give the same numbers, a row's numbers depend
    neither on the padding beside it nor on later tokens, and a causal LM can be sampled from.
    """
    name = f"a {type(model).__name__}"
    is_scalar = has_token_head(model)
    trunk = model.base_model if is_scalar else model
    key = "last_hidden_state" if is_scalar else "logits"
    tokens = torch.arange(3, 67, device=model.device).view(2, 32)
    tokens %= model.get_input_embeddings().num_embeddings
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :9] = False  # no pad token is put there: its embedding may be 0
    try:
        whole = forward(trunk, tokens, mask)[key].float()
        again = forward(trunk, tokens, mask)[key].float()
        alone = forward(trunk, tokens[1:, 9:], mask[1:, 9:])[key].float()
        beginning = forward(trunk, tokens[:1, :20], mask[:1, :20])[key].float()
        if not is_scalar:
            generate_responses(model, tokens, mask, 2, 1.0, torch.Generator())
    except Exception as error:  # each family has its own
        explain(error, f"{name} can't be read or sampled from")
    if not whole.isfinite().all():
        raise UserError(f"{name} gives numbers that are not finite: are its weights broken?")
    exact = 0 if model.device.type == "cpu" else 1e-3  # a GPU may add in another order
    for one, other, limit, what in (
        (whole, again, exact, "draws random numbers in its forward pass"),
        (whole[1:, 9:], alone, 0.05, "reads the padding"),
        (whole[:1, :20], beginning, 0.05, "lets tokens see later ones: it can't be a policy"),
    ):
        if not (one - other).norm() <= limit * other.norm():
            raise UserError(f"{name} {what}")


# === Several processes ============================================================================
# Under torchrun each process has the models and the whole batch. It takes its share of the rows
# through the models and writes the results into its rows of a tensor of zeros; their sum is whole.
def share(rows):
    """Returns this process's part of rows, a list or tensor: every n-th one. Alone: all of them."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def total(tensor):
    """Returns the sum of the tensors that all processes call this with, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# === Padding and batches ==========================================================================
def pad(sequences, pad_id, side):
    """Returns lists of token ids as tokens (B, T) int64 and attention_mask (B, T) bool. Padding on
    the 'left' lets all responses start in one column; mask and positions make either side right.
    """
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    ones = [torch.ones(len(ids), dtype=torch.bool) for ids in sequences]
    tokens = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    return tokens, pad_sequence(ones, batch_first=True, padding_side=side)


def position_ids(attention_mask):
    """Returns 0, 1, 2, ... from each row's first attended token on, (B, T)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_token_index(attention_mask):
    """Returns the index of each row's last attended token, (B,), wherever the padding is."""
    return attention_mask.long().cumsum(-1).argmax(-1)


def epochs_by_length(lengths, batch_size, generator):
    """Yields batches of row indices for ever, each of rows with similar lengths (little padding).

    Sorting all rows would make the same batches in every epoch. So rows are shuffled, then sorted
    within windows of 32 batches.
    """
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), 32 * batch_size):
            window = sorted(order[start : start + 32 * batch_size], key=lambda row: lengths[row])
            batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def parts_by_length(attention_mask, index, size):
    """Yields micro-batches of up to `size` of the rows `index` (int64, on the CPU), in order of
    length: (row indices (b,), slice of the columns of attention_mask (B, T) without the outer ones
    that are padding in every row). Under torchrun each process gets its share of the rows.
    """
    mask = attention_mask.cpu()
    rows = share(index[mask[index].sum(1).argsort(stable=True)])
    for part in rows.split(size) if len(rows) else ():
        attended = mask[part].any(0).nonzero()[:, 0]
        yield part.to(attention_mask.device), slice(attended[0].item(), attended[-1].item() + 1)


# === Tokenizers ===================================================================================
def load_tokenizer(path, made_by=None, trust_remote_code=False, chat_template_kwargs=None):
    """Returns the tokenizer of a folder or hub id. It needs an EOS token, which is also the pad
    token if there is no other: masks tell padding from text here, so the vocabulary stays as it is.
    """
    tokenizer = load(AutoTokenizer, path, made_by, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no EOS token, so no text could end; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template_kwargs is not None:
        set_template_arguments(tokenizer, chat_template_kwargs)
    if "strftime_now" in str(tokenizer.chat_template):
        print("  warning: the chat template writes today's date: tomorrow's tokens will differ")
    return tokenizer


def give_pad_token(tokenizer):
    """Gives a reward model's tokenizer a pad token other than its EOS, an unused one or a new one:
    with pad = EOS, transformers' sequence classification reads the token before the EOS.
    """
    names = []
    for token in tokenizer.added_tokens_decoder.values():
        if re.search("pad|endoftext|reserved|unused", token.content, re.IGNORECASE):
            if token.content not in (tokenizer.bos_token, tokenizer.eos_token):
                names.append(token.content)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": [*names, "<|pad|>"][0]})


def set_template_arguments(tokenizer, text):
    """Writes the JSON object of --chat-template-kwargs into the chat template as its defaults, so
    that they hold in later stages, pipelines and servers as well.
    """
    flag = f"--chat-template-kwargs {text}"
    templates = tokenizer.chat_template or ""
    templates = templates if isinstance(templates, dict) else {"": templates}
    try:
        arguments = json.loads(text).items()
    except (ValueError, AttributeError) as error:
        explain(error, f"{flag} is no JSON object")
    own = ("messages", "tools", "documents", "add_generation_prompt")  # transformers sets these
    for name, value in arguments:
        is_read = name.isidentifier() and re.search(rf"\b{name}\b", str(templates))
        if not is_read or name in own:
            raise UserError(f"{flag}: the chat template does not read {name!r}")
        default = f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}\n"
        templates = {kind: default + template for kind, template in templates.items()}
    tokenizer.chat_template = templates.get("", templates)


notes = collections.Counter()  # {what `encode` met that the user should know: how often}


def encode(tokenizer, prompt, response=None, eos_ids=(), tools=None, may_drop=False):
    """Returns (prompt ids, response ids) of one text or chat. All stages make their ids here.

    Args:
        prompt: a string, or a chat up to the assistant's turn: a list of {"role", "content"}.
        response: a string, or messages that continue the chat; None has no ids.
        eos_ids: ids that may end a response besides the tokenizer's EOS.
        tools: JSON schemas for the template of a chat.
        may_drop: whether the template may leave out words of the response, thoughts for example.

    Prompt and response are tokenized together. A response ends with one EOS, the first after its
    words. A string begins as the tokenizer begins every text (BOS, or GLM's two tokens); a chat
    template writes BOS itself. Raises ValueError if a chat does not fit the template, or if that
    drops words.
    """
    opening, text = prompt, response
    before = []
    if not isinstance(prompt, str):
        opening, text = render_response(tokenizer, prompt, response, tools, may_drop)
    elif response is not None and not isinstance(response, str):
        raise ValueError("has a string as the prompt and messages as the response")
    else:  # what the tokenizer puts before every text
        ids, first = tokenizer("a")["input_ids"], token_ids(tokenizer, "a")[0]
        before = ids[: ids.index(first)] if first in ids else []
    if tools and (isinstance(prompt, str) or "tools" not in str(tokenizer.chat_template)):
        notes["with tools that nothing renders"] += 1
    opening_ids = token_ids(tokenizer, opening)
    has_beginning = opening_ids[: len(before)] == before
    prompt_ids = opening_ids if has_beginning else before + opening_ids
    if response is None:
        return prompt_ids, []
    reply = ids_after(tokenizer, opening, opening_ids, text)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = {*eos, *eos_ids}
    last = len(reply)  # one past the last word: what follows is EOS and white space
    while last and (reply[last - 1] in ends or is_blank(tokenizer, reply[last - 1])):
        last -= 1
    if last == 0:
        notes["with an empty response, of which only the EOS is left"] += 1
    for i in range(last, len(reply)):
        if reply[i] in ends:
            return prompt_ids, reply[: i + 1]
    return prompt_ids, reply + eos


@functools.cache
def is_blank(tokenizer, id):  # remembered, as a text may end in a thousand spaces
    return not tokenizer.decode(id).strip()


def decode(tokenizer, prompt_ids, response_ids):
    """Returns the text of a response: what it adds to the decoded prompt, without EOS and padding
    at its end.
    """
    kept = list(response_ids)
    while kept and kept[-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        kept.pop()
    prompt = tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(prompt_ids + kept, clean_up_tokenization_spaces=False)
    return whole[len(os.path.commonprefix([prompt, whole])) :]


def token_ids(tokenizer, text):  # without special tokens
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ids_after(tokenizer, opening, first, text):
    """Returns the ids of `text` after `opening`, whose own ids are `first`. If a token would
    span both, `text` is tokenized after an anchor that no token joins to it (alone it might get a
    space in front), so that prompt and response still decode to the same text.
    """
    both = token_ids(tokenizer, opening + text)
    if both[: len(first)] == first:
        return both[len(first) :]
    notes["with a token across the border of prompt and response, tokenized apart"] += 1
    wanted = tokenizer.decode(both, clean_up_tokenization_spaces=False)
    for anchor in ("", "\n", ".", "a", "0", "Z", "-"):
        alone, rest = token_ids(tokenizer, anchor), token_ids(tokenizer, anchor + text)
        ids = rest[len(alone) :]
        if rest[: len(alone)] == alone:
            if tokenizer.decode(first + ids, clean_up_tokenization_spaces=False) == wanted:
                return ids
    notes["whose tokens decode to other text where prompt and response meet"] += 1
    return token_ids(tokenizer, text)


def render_chat(tokenizer, messages, **options):
    """Returns the text of a chat by the tokenizer's template; a ValueError if that fails."""
    if not tokenizer.chat_template:
        raise ValueError("holds messages, but the tokenizer has no chat template; write strings")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates are programs and raise what they like
        raise ValueError(f"does not fit the chat template: {error}") from error


def render_response(tokenizer, prompt, response, tools, may_drop):
    """Returns (the text of a chat up to the assistant's turn, what the response adds to it)."""
    if prompt[-1]["role"] == "assistant":
        raise ValueError("has a chat that ends with the assistant's message: nothing to answer")
    opening = render_chat(tokenizer, prompt, tools=tools, add_generation_prompt=True)
    if response is None:
        return opening, None
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    whole = render_chat(tokenizer, prompt + response, tools=tools)
    text = whole[len(opening) :]
    thought = re.search(r"[<\[](think(?:ing)?)[>\]]\s*\Z", opening[-40:], re.IGNORECASE)
    is_open = thought and not may_drop and f"/{thought[1]}" not in text
    is_doubled = thought and text.lstrip().startswith(thought[0].rstrip())
    if not whole.startswith(opening) or is_open or is_doubled:
        place = max(0, len(os.path.commonprefix([opening, whole])) - 12)
        raise ValueError(
            "does not fit the chat template: with its reply the chat does not continue the prompt, "
            f"or a thought in it stays open. {opening[place:]!r} ends the prompt, and the chat has "
            f"{whole[place:][:40]!r} there; see --chat-template-kwargs"
        )
    for message in response:
        if message["role"] == "assistant" and (lost := lost_words(text, message)):
            if message is response[-1] and not may_drop:
                what = "has words (or tool_calls) of the assistant that the template drops"
                raise ValueError(f"{what}: {lost[:40]!r}; leave them out")
            notes["with words of the assistant, thoughts for example, that the template drops"] += 1
    return opening, text


def lost_words(text, message):
    """Returns a part of a message that its rendered text lacks, but for tags and spaces, or ""."""
    parts = [message.get(key) for key in ("reasoning_content", "reasoning", "thinking", "content")]
    for call in message.get("tool_calls") or []:
        call = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict):
            raise ValueError("has tool_calls that are no list of objects")
        arguments = call.get("arguments") or {}
        values = arguments.values() if isinstance(arguments, dict) else [arguments]
        parts.append(call.get("name"))
        parts += [str(value) for value in values if type(value) in (str, int, float)]
    tags = r"</?\w+>|\[/?[A-Z]+\]|\s"
    rendered = re.sub(tags, "", text)
    for part in parts:
        if isinstance(part, str) and re.sub(tags, "", part) not in rendered:
            as_json = json.dumps(part, ensure_ascii=False)[1:-1]  # of the arguments of a call
            if re.sub(tags, "", as_json) not in rendered:
                return part
    return ""


def eos_token_ids(tokenizer, model):
    """Returns the sorted ids that end a text: the tokenizer's EOS and those of the model."""
    stored = getattr(getattr(model, "generation_config", model.config), "eos_token_id", None)
    stored = stored if isinstance(stored, list) else [stored]
    return sorted({*stored, tokenizer.eos_token_id} - {None})


# === Models =======================================================================================
def load(auto_class, path, made_by=None, **options):
    """Returns auto_class.from_pretrained(path), that of the base model if path is an adapter. A
    UserError says what would help. `made_by` is the command that makes `path`.
    """
    if not os.path.isdir(path):
        is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)
        if not is_hub_id or made_by and path.startswith("ckpt/"):
            hint = f"; make it with: {made_by}" if made_by else ""
            raise UserError(f"there is no folder {path!r}{hint}")
        if auto_class is AutoTokenizer:
            print(f"  {path} is no folder here: looking for it on the Hugging Face hub", flush=True)
    base = adapter_base(path)
    if base and not (auto_class is AutoTokenizer and "tokenizer_config.json" in os.listdir(path)):
        return load(auto_class, base, made_by, **options)
    try:
        return auto_class.from_pretrained(path, **options)
    except Exception as error:  # transformers, tokenizers and safetensors each have their own
        if "trust_remote_code=True" in str(error):
            error = ValueError("it brings code of its own; see --trust-remote-code")
        is_model = auto_class not in (AutoTokenizer, AutoConfig)
        remedy = " (weights must be safetensors; pickled ones are never read)" if is_model else ""
        explain(error, f"{path} can't be loaded{remedy}")


def load_config(path, made_by, options):
    """Returns a model's config with dropout off and with outputs as the code here expects them.
    Two dropout masks would be two policies, and checkpointed layers run in train mode.
    """
    configs = [load(AutoConfig, path, made_by, **options)]
    for config in configs:  # the list grows by nested configs
        configs += [each for each in vars(config).values() if isinstance(each, PreTrainedConfig)]
        config.return_dict = True
        for name, value in list(vars(config).items()):
            if "drop" in name and type(value) in (int, float):
                setattr(config, name, type(value)(0))
            elif name in ("output_router_logits", "output_attentions", "output_hidden_states"):
                setattr(config, name, False)
    return configs[0]


def load_model(auto_class, path, made_by, config, **options):
    """Returns (model in float32 and evaluation mode, names of the weights that `path` lacks)."""
    base = adapter_base(path)
    if base:
        model, missing = load_model(auto_class, base, made_by, config, **options)
        return model, sorted({*missing} - merge_adapter(model, path))
    # The dtype is passed, as transformers 5 otherwise takes the checkpoint's, often bf16.
    options |= {"config": config, "dtype": torch.float32, "use_safetensors": True}
    model, info = load(auto_class, path, made_by, output_loading_info=True, **options)
    layers = [name for name in info["unexpected_keys"] if re.search(r"\.\d+\.", name)]
    if layers:  # other parts, like a head, are left out on purpose
        print(f"  {path} has weights that its config has no place for: {len(layers)}, {layers[0]}")
    return model.eval(), sorted(info["missing_keys"])  # one of another shape is an error


def load_causal_lm(path, tokenizer, made_by=None, **options):
    """Returns a causal LM in float32, without dropout, with an embedding for each token."""
    config = load_config(path, made_by, options)
    kind = (config.architectures or [type(config).__name__])[0]
    if config.is_encoder_decoder or re.search("Classification|MaskedLM", kind):
        raise UserError(f"{path} is no causal LM but a {kind}")
    model, missing = load_model(AutoModelForCausalLM, path, made_by, config, **options)
    if missing:
        raise UserError(f"{path} is no causal LM: it has no {missing[0]}")
    fit_embeddings(model, tokenizer)
    set_generation_defaults(model, tokenizer)
    return model


def set_generation_defaults(model, tokenizer, temperature=1.0):
    """Replaces the generation settings stored with a model (top-k 50, ...), which `generate` reads,
    by plain sampling: a saved folder then samples from the very distribution that was trained.
    """
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        eos_token_id=eos_token_ids(tokenizer, model),
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id  # a reward model reads these


def load_classifier(path, made_by=None, **options):
    """Returns (sequence classifier with one label, names of the weights that `path` lacks). Where
    transformers has no such class for a family, it is made of transformers' own parts.
    """
    config = load_config(path, made_by, options)
    if "SequenceClassification" in str(config.architectures) and config.num_labels != 1:
        raise UserError(f"{path} has {config.num_labels} labels; a reward model has one")
    config.num_labels = 1
    if adapter_base(path):  # the scale is that of its base
        vars(config).pop("reward_mean", None)
        vars(config).pop("reward_std", None)
    classes = AutoModelForSequenceClassification
    causal_lms = AutoModelForCausalLM._model_mapping
    has_code = "AutoModelForSequenceClassification" in getattr(config, "auto_map", {})
    if type(config) not in classes._model_mapping and type(config) in causal_lms and not has_code:
        kind = causal_lms[type(config)]
        base = next(each for each in kind.__mro__ if each.__name__.endswith("PreTrainedModel"))
        name = kind.__name__.replace("CausalLM", "SequenceClassification")
        members = {"base_model_prefix": kind.base_model_prefix}
        made = type(name, (ClassifierParts, base), members)
        classes.register(type(config), made, exist_ok=True)
        classes = made  # transformers 5.17 ignores what is registered for a config of its own
    model, missing = load_model(classes, path, made_by, config, **options)
    model.base_model._init_weights(model.base_model)  # buffers that no folder holds: Falcon-H1's
    return model, missing


def load_scalar_model(path, tokenizer, made_by=None, **options):
    """Returns (a decoder with a score head, in float32, without dropout; whether the head is new).
    From the folder of a causal LM it is that trunk with an untrained head.
    """
    model, missing = load_classifier(path, made_by, **options)
    if not has_token_head(model):
        raise UserError(f"{path} is a {type(model).__name__}; only decoders with a head are read")
    for name in missing:
        if not name.startswith("score."):
            raise UserError(f"{path} is incomplete: it has no {name}")
    fit_embeddings(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    try:  # the ids that end a causal LM's texts may stand only there
        stored = GenerationConfig.from_pretrained(adapter_base(path) or path).eos_token_id
        model.config.eos_token_id = model.config.eos_token_id if stored is None else stored
    except OSError:
        pass
    return model, bool(missing)


def has_token_head(model):
    """Returns whether the score is one linear layer on a token's last hidden state."""
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


def fit_embeddings(model, tokenizer):
    """Adds an embedding for a new pad token if the model has no spare one."""
    size = model.get_input_embeddings().num_embeddings
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > size + 1:
        name = tokenizer.name_or_path
        raise UserError(f"the tokenizer of {name} has {needed} ids, the model only {size}")
    if needed > size:
        model.resize_token_embeddings(needed)


def check_context(model, length, flags="--max-prompt-length or --response-length"):
    """Raises UserError if sequences of `length` tokens do not fit the model's positions."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or -1  # XLNet has -1 for none
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # above this, one long row changes all rows beside it
        limit = rope.get("original_max_position_embeddings", limit)
    if 0 < limit < length:
        what = f"{length} tokens do not fit the {limit} positions of"
        raise UserError(f"{what} {model.name_or_path or type(model).__name__}; lower {flags}")


# === Adapters: --lora-rank, and folders that peft has saved =======================================
# A matrix W that is frozen is used as W + 2 B A, and only B and A are trained. B starts at 0, so a
# model starts as the one without adapters, bit for bit. No adapter is ever switched on or off:
# reference and critic are module trees of their own over the same frozen weights.
def adapter_base(path):
    """Returns the folder or hub id of the model that `path` adapts, or None if it is no adapter."""
    file = os.path.join(path, "adapter_config.json")
    if not os.path.isfile(file):
        return None
    if any(name.endswith(".safetensors") and "adapter" not in name for name in os.listdir(path)):
        raise UserError(f"{path} holds a model and an adapter; give each a folder of its own")
    try:
        with open(file, encoding="utf-8") as opened:
            base = json.load(opened).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        explain(error, f"can't read {file}")
    if not base or os.path.realpath(base) == os.path.realpath(path):
        raise UserError(f"{path} is an adapter, but its adapter_config.json names no base model")
    return base


def merge_adapter(model, path):
    """Adds the adapter in a folder to the model's weights, in place. Returns the names it holds."""
    try:
        import peft

        held = {*safetensors.torch.load_file(os.path.join(path, "adapter_model.safetensors"))}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        config = peft.PeftConfig.from_pretrained(path)
        config.task_type = None  # else peft would call methods that only a causal LM has
        adapted = peft.PeftModel.from_pretrained(model, path, config=config, torch_device="cpu")
        is_same = (head, embedding) == (model.get_output_embeddings(), model.get_input_embeddings())
        if head is not None and head.weight is embedding.weight and not is_same:
            raise ValueError("it changes an embedding that is tied to the LM head")
        known = {*peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)}
        odd = [name for name in known ^ held if ".base_layer." not in name]  # an adapted embedding
        if head is None:  # of a scalar model, which needs no LM head
            odd = [name for name in odd if "lm_head" not in name and "embed_out" not in name]
        if odd:
            raise ValueError(f"its weights do not match the model's: {min(odd)}")
        adapted.merge_and_unload().requires_grad_(True)
    except Exception as error:  # peft, safetensors and torch each have their own
        explain(error, f"the adapter {path} can't be merged")
    return {name.removeprefix("base_model.model.") for name in held}


def shared_copy(model, lora_rank):
    """Returns a copy of a model. With adapters (a rank) it shares the weights, which are frozen and
    take no more memory; a score head stays its own, as a critic trains it.
    """
    if lora_rank is None:
        return copy.deepcopy(model)
    shared = [weight for name, weight in model.named_parameters() if not name.startswith("score.")]
    return copy.deepcopy(model, {id(weight): weight for weight in shared})


def share_trunk(model, other):
    """Lets a scalar model use the weights of the causal LM that it was made from."""
    weights = dict(other.base_model.named_parameters())
    model.base_model.load_state_dict(weights, strict=False, assign=True)


def add_adapters(model, lora_rank, base):
    """Puts LoRA adapters on all linear layers but the score head and the LM head (it may be tied).
    Only they and the score head are trained then. `base` is where the model came from.
    """
    if lora_rank is None:
        return
    is_scalar = has_token_head(model)
    try:
        import peft

        if any(re.search("expert|moe", name) for name, _ in model.named_parameters()):
            raise ValueError("peft has no adapters for a mixture of experts here")
        if any(hasattr(module, "A_log") and hasattr(module, "D") for module in model.modules()):
            raise ValueError("its state-space layers ignore adapters")
        config = peft.LoraConfig(
            r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear",
            task_type="SEQ_CLS" if is_scalar else "CAUSAL_LM", base_model_name_or_path=base,
        )
        peft.inject_adapter_in_model(config, model)
    except Exception as error:  # peft has many kinds
        explain(error, f"--lora-rank: a {type(model).__name__} can't be adapted")
    config.inference_mode = True  # as peft writes it
    if is_scalar:
        model.score.requires_grad_(True)
        config.modules_to_save = ["score"]


def merge_adapters(model):
    """Adds trained adapters to the weights, in place; bf16 weights get the sum rounded to bf16."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_delta_weight"):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    vars(model).pop("peft_config", None)


@torch.no_grad()
def save_model(model, folder):
    """Saves a model as a Hugging Face folder: adapters merged in float32, W + 2 B A, and once more
    in `adapter/`, in peft's format. A value head is saved as value_head.safetensors.
    """
    if isinstance(model, torch.nn.Linear):
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(model.state_dict(), folder / "value_head.safetensors")
    elif not hasattr(model, "peft_config"):
        model.save_pretrained(folder)
    else:
        merged = {}
        for name, weight in model.state_dict().items():
            layer = name.removesuffix(".base_layer.weight")
            # What has not changed stays where it is: it may be tied, and is then saved once.
            is_changed = layer != name or weight.dtype == torch.bfloat16
            weight = weight.float() if weight.dtype == torch.bfloat16 else weight
            if layer != name:
                weight = weight + model.get_submodule(layer).get_delta_weight("default")
            if ".lora_" not in name:
                merged[name.replace(".base_layer.", ".")] = weight.cpu() if is_changed else weight
        model.save_pretrained(folder, state_dict=merged)
        model.peft_config["default"].save_pretrained(folder / "adapter")
        adapter = {}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                adapter[f"base_model.model.{name.replace('.default.', '.')}"] = weight.contiguous()
        file = folder / "adapter" / "adapter_model.safetensors"
        safetensors.torch.save_file(adapter, file, {"format": "pt"})


# === Scores of a scalar model =====================================================================
def score_scale(config):
    """Returns the (mean, std) that normalize a reward model's scores; (0, 1) if it has none."""
    return getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)


def token_scores(model, tokens, attention_mask):
    """Returns the scalar model's score of the text up to each token, (B, T) float32, normalized by
    `score_scale`: training responses have mean 0 and standard deviation 1.
    """
    hidden = forward(model.base_model, tokens, attention_mask).last_hidden_state  # (B, T, width)
    scores = model.score(hidden.float()).squeeze(-1)  # in float32: bf16 keeps 3 digits of a score
    mean, std = score_scale(model.config)
    return (scores - mean) / std


def text_scores(model, tokens, attention_mask):
    """Returns the score of each whole text, (B,) float32: the one at its last attended token,
    normally the EOS, since only there has a causal model read everything.
    """
    last_index = last_token_index(attention_mask)[:, None]  # (B, 1)
    return token_scores(model, tokens, attention_mask).gather(1, last_index).squeeze(1)


# === Sampling =====================================================================================
def first_above(weights, uniform):
    """Returns an index per row of weights (b, n), drawn in proportion to them by inversion: the
    first whose running sum exceeds uniform / 2^31 of the total. uniform (b,) int64 is below 2^31.
    Sums of integers are exact in any order; float32 would lose small weights beside large ones.
    """
    shares = weights / weights.sum(-1, keepdim=True)
    summed = (shares * 2**31).long().cumsum(-1)  # (b, n)
    limit = uniform * summed[:, -1] >> 31  # below the total
    index = torch.searchsorted(summed, limit[:, None], right=True).squeeze(1)
    return index.clamp(max=weights.shape[1] - 1)  # it is n where a weight is nan


def sample_tokens(logits, temperature, uniform):
    """Returns one id per row of logits (b, vocabulary), drawn from softmax(logits / temperature),
    and its log-probability, (b,) each.

    A block of 128 ids is drawn first, by the sums of their probabilities, then an id in the block,
    each with a number of `uniform` (b, 2). So the running sums are short, not over the vocabulary
    (and torch.multinomial draws a random number per id). Rows with inf or nan give nan.
    """
    num_ids = logits.shape[1]
    logits = F.pad(logits, (0, -num_ids % 128), value=-torch.inf)
    probabilities = (logits.float() / temperature).softmax(-1)
    blocks = probabilities.unflatten(1, (-1, 128))  # (b, blocks, 128)
    block = first_above(blocks.sum(-1), uniform[:, 0])
    in_block = blocks[torch.arange(len(block), device=block.device), block]  # (b, 128)
    tokens = (128 * block + first_above(in_block, uniform[:, 1])).clamp(max=num_ids - 1)
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


class GrowingCache(DynamicCache):
    """A key-value cache that stores keys in the dtype of the values: autocast leaves rotated keys
    in float32, and all of them would be cast again for each token.
    """

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


@torch.no_grad()
def generate_responses(model, prompts, prompt_mask, response_length, temperature, generator=None):
    """Samples a response to each left-padded prompt (B, P) without top-k or top-p. Returns ids and
    log-probabilities, (B, R) each, R at most response_length, with pad and 0 after an EOS.
    Unlike in `generate`, finished rows leave the batch: several at a time, as that copies the cache
    and makes the CPU wait for the GPU. `generator` draws on the CPU.
    """
    settings = model.generation_config
    eos_ids = torch.tensor(settings.eos_token_id, device=prompts.device)
    response = prompts.new_zeros(len(prompts), response_length)  # (B, R)
    logprobs = response.float()
    uniform = torch.randint(2**31, (*response.shape, 2), generator=generator).to(prompts.device)
    is_state_space = "cache_params" in inspect.signature(model.forward).parameters
    rows = share(torch.arange(len(prompts), device=prompts.device))  # those in the batch, (b,)
    response[rows] = settings.pad_token_id
    is_open = torch.ones_like(rows, dtype=torch.bool)  # which of them have not sampled an EOS
    inputs, mask = prompts[rows], prompt_mask[rows]
    cache = GrowingCache(config=model.config)
    checkpointing = [module for module in model.modules() if module.training]
    model.eval()  # in train mode, gradient checkpointing would turn the cache off
    with autocast(model):
        for t in range(response_length if len(rows) else 0):  # the prompts first, then one by one
            new = slice(-inputs.shape[1], None)
            output = model.forward(  # not model(), which --compile would compile for each length
                input_ids=inputs, position_ids=position_ids(mask)[:, new], use_cache=True,
                attention_mask=mask[:, new] if is_state_space else mask, logits_to_keep=1,
                **{"cache_params" if is_state_space else "past_key_values": cache},
            )
            tokens, logprob = sample_tokens(output.logits[:, -1], temperature, uniform[rows, t])
            response[rows, t] = tokens = torch.where(is_open, tokens, settings.pad_token_id)
            logprobs[rows, t] = torch.where(is_open, logprob, 0.0)
            is_open = is_open & ~torch.isin(tokens, eos_ids)
            inputs, mask = tokens[:, None], F.pad(mask, (0, 1), value=True)
            left = is_open.nonzero()[:, 0] if t % 4 == 3 else rows
            if len(left) == 0:
                break
            if len(left) <= 0.75 * len(rows):  # those that have finished leave
                cache.reorder_cache(left)  # of recurrent layers the state, too
                rows, inputs, mask, is_open = rows[left], inputs[left], mask[left], is_open[left]
    for module in checkpointing:
        module.training = True
    is_eos = torch.isin(total(response), eos_ids).long()
    num_columns = (is_eos.cumsum(1) == is_eos).any(0).sum()  # R: the longest response
    if not total(logprobs).isfinite().all():
        raise UserError("sampling failed: the logits are not finite; lower --lr, see the weights")
    return response[:, :num_columns], logprobs[:, :num_columns]
