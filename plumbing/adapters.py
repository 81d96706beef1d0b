"""Adapters, --lora-rank: of each matrix W, frozen, W + 2 B A is used, and only B and A are trained.

No adapter is ever switched on or off: each model is a module tree of its own over the same weights.
The reference is the policy's tree from before it has adapters, the critic the reward model's with
adapters of its own. One set of frozen weights serves them all, and no code that uses a model knows.
B starts at 0, so that a model with adapters starts as the one without, to the last bit.
"""

import copy
import re

import safetensors.torch
import torch

import common
from common import UserError

FOLDER = "adapter"  # in a checkpoint, beside the merged weights


def import_peft():
    """The package that puts adapters into models; optional, so it is asked for where it is used."""
    try:
        import peft
    except ImportError:
        raise UserError("--lora-rank needs the package peft; pip install peft") from None
    return peft


def twin(model, rank):
    """A copy of the model; if it is for adapters (a rank), over the same weights, which take no
    more memory. A score head stays its own: a critic trains it.
    """
    shared = [] if rank is None else model.named_parameters()
    weights = {id(weight): weight for name, weight in shared if not name.startswith("score.")}
    return copy.deepcopy(model, weights)


def share(model, other, rank):
    """Let a scalar model use the weights of the causal LM that it was made from too, by name."""
    weights = {} if rank is None else dict(other.base_model.named_parameters())
    for name, weight in [*model.base_model.named_parameters(remove_duplicate=False)]:
        if name in weights and weight.shape == weights[name].shape:
            parent, _, last = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), last, weights[name])


def add(model, rank, base):
    """The model with adapters in place, which alone are trained, and its score head if it has one.

    They go beside every linear layer but the LM head, which may be tied to the embedding, and the
    score head. Without a rank the model stays as it is. `base` is where the model came from.
    """
    if rank is None:
        return model
    is_scalar, name = common.has_token_head(model), type(model).__name__
    if any(re.search("expert|moe", weight) for weight, _ in model.named_parameters()):
        raise UserError(f"--lora-rank: a {name} is a mixture of experts; it can't adapt those")
    if any(hasattr(module, "A_log") and hasattr(module, "D") for module in model.modules()):
        what = "has state-space layers, which read their weights past an adapter"
        raise UserError(f"--lora-rank: a {name} {what}")
    config = import_peft().LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear",
        task_type="SEQ_CLS" if is_scalar else "CAUSAL_LM", base_model_name_or_path=base,
    )
    try:
        import_peft().inject_adapter_in_model(config, model)
    except Exception as error:  # peft has many
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--lora-rank: peft can't adapt a {name}: {reason}") from error
    if is_scalar:
        model.score.requires_grad_(True)
        config.modules_to_save = ["score"]
    config.inference_mode = True  # as peft writes it
    return model


def is_adapted(model):
    return hasattr(model, "peft_config")


def trained(model):
    """{name as peft writes it: weight} of the adapters, and of a score head."""
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {f"base_model.model.{name.replace('.default.', '.')}": own[name] for name in own}


@torch.no_grad()
def merged_weight(layer):
    """W + 2 B A in float32."""
    return layer.get_base_layer().weight.float() + layer.get_delta_weight("default")


def _layers(model):
    """{name: layer} of those with an adapter."""
    modules = [*model.named_modules()]
    return {name: module for name, module in modules if hasattr(module, "get_delta_weight")}


def merge(model):
    """Put the adapters into the weights, in place; where the weights are bf16 the sum is rounded to
    it once, as autocast would round it at each use.
    """
    for name, layer in _layers(model).items():
        base = layer.get_base_layer()
        base.weight.data = merged_weight(layer).to(base.weight.dtype)
        model.set_submodule(name, base)
    vars(model).pop("peft_config", None)


def save(model, folder):
    """An ordinary folder of the merged model in float32, and `adapter/` in peft's own format.

    --resume reads the second, as sums can't be undone; frozen weights come from where they did.
    """
    layers, state = _layers(model), {}
    for key, weight in model.state_dict().items():
        name = key.removesuffix(".base_layer.weight")
        if name != key:
            weight = merged_weight(layers[name]).cpu()
        elif weight.dtype == torch.bfloat16:
            weight = weight.float().cpu()
        if ".lora_" not in key:
            state[key.replace(".base_layer.", ".")] = weight
    common.save_model(model, folder, state)
    adapter, config = folder / FOLDER, model.peft_config["default"]
    config.save_pretrained(adapter)
    weights = {name: weight.detach().contiguous() for name, weight in trained(model).items()}
    safetensors.torch.save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})


@torch.no_grad()
def read(model, folder):
    """Put the adapters, and a score head, that `save` wrote back into the model."""
    held = safetensors.torch.load_file(folder / FOLDER / "adapter_model.safetensors")
    own = trained(model)
    if held.keys() != own.keys():
        raise ValueError(f"it holds other adapters: {min(held.keys() ^ own.keys())}")
    for name, weight in own.items():
        weight.copy_(held[name])
