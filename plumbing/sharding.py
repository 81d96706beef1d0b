"""Models divided among the processes of torchrun by FSDP2, for --shard: of every weight, its
gradient and Adam's moments each process holds its rows, about an n-th of them.

A forward or backward pass gathers the weights of one layer at a time, so all processes must make as
many passes. A rollout, thousands of short ones, gathers all weights first and frees them after.
Under autocast they are gathered in float32, as what it does not round must stay exact.
"""

import contextlib
from functools import partial

import torch
import torch.distributed as dist
from transformers.modeling_layers import GradientCheckpointingLayer

import common
from common import UserError

if dist.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor


def check(cfg, num_processes):
    """Every rule about --shard that needs no model; `num_processes` is 0 without torchrun."""
    if not getattr(cfg, "shard", False):
        return
    if not num_processes:
        raise UserError("--shard needs processes: start by torchrun, or give --shard false")
    for flag in ("compile", "lora_rank", "reward_device"):
        if getattr(cfg, flag):
            raise UserError(f"--shard and --{flag.replace('_', '-')} don't go together; drop one")
    if cfg.minibatch_size % num_processes:
        what = f"--minibatch-size {cfg.minibatch_size} among {num_processes} processes"
        raise UserError(f"--shard can't divide {what}: all must have as many rows")


def divide(model, cfg):
    """With --shard, keep this process's rows of each weight of a whole model, in place."""
    if not cfg.shard:
        return
    num_weights, device = len([*model.parameters()]), next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    # What is called from outside is a root: of a scalar model its trunk, and then its head.
    roots = [model.score, model.base_model] if common.has_token_head(model) else [model]
    for part in layers[::-1] + roots:  # the inner ones first
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # The loss is divided by the counts of the whole minibatch: gradients are sums, no means.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    if len([*model.parameters()]) != num_weights:
        raise UserError(f"--shard: layers of a {type(model).__name__} have weights in common")
    model.register_load_state_dict_pre_hook(_divide_loaded)
    model.whole_weights = partial(whole_weights, model)


def fill_up(rows, cfg):
    """With --shard, the rows and the first of them again, until all processes can have as many."""
    num_more = -len(rows) % dist.get_world_size() if getattr(cfg, "shard", False) else 0
    return [rows[i % len(rows)] for i in range(len(rows) + num_more)]


@contextlib.contextmanager
def whole_weights(model):
    """All weights of a causal LM are here, for `common.generate_responses`."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    one = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    try:
        common.forward(model, one, one.bool())  # what it gathers stays
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def is_divided(tensor):
    return isinstance(tensor, DTensor)


def plain(tensor):
    """A tensor that may be divided as a whole one; all processes call this, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(state):
    """{name: tensor or number}, with what is divided whole and on the CPU; called by all processes,
    of which rank 0 has the result.
    """
    kept = {}
    for name, value in state.items():
        is_divided, value = isinstance(value, DTensor), plain(value)
        kept[name] = value.cpu() if is_divided and dist.get_rank() == 0 else value
    return kept


def whole_models(models):
    """{name: its whole state dict} of those of {name: model} that are divided."""
    divided = {name for name, m in models.items() if any(map(is_divided, m.parameters()))}
    return {name: whole(models[name].state_dict()) for name in models if name in divided}


def whole_optimizer(optimizer):
    """The optimizer's state as of one process, to go on with in any number of them."""
    state = optimizer.state_dict()
    return state | {"state": {i: whole(of_weight) for i, of_weight in state["state"].items()}}


def like_weights(optimizer, state):
    """The state of `whole_optimizer`, divided as the optimizer's weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    held = state["state"].items()
    divided = {i: {key: _like(x, weights[i]) for key, x in of.items()} for i, of in held}
    return state | {"state": divided}


def _like(tensor, weight):
    """This process's rows of a whole tensor, if it has them of the weight; a scalar as it is."""
    if not isinstance(weight, DTensor) or tensor.ndim == 0:
        return tensor
    mesh, tensor = weight.device_mesh, tensor.to(weight.device)
    return distribute_tensor(tensor, mesh, weight.placements, src_data_rank=None)


def _divide_loaded(model, state, prefix, *_):
    """Before load_state_dict of whole tensors."""
    for name, weight in model.state_dict(prefix=prefix).items():
        if name in state:
            state[name] = _like(state[name], weight)
