"""Several processes of one run, started by torchrun, on one machine or several.

Each has all models and the whole batch. What they share of the work, and how it comes together, is
in common.py (`share`, `total`); here is how they meet, what they add up besides, and who speaks.
Rank 0 alone locks the folder, prints, logs and saves.
"""

import datetime
import math
import os
import re

import torch
import torch.distributed as dist

import common
from common import UserError
from plumbing import sharding

IS_TORCHRUN = dist.is_torchelastic_launched()
RANK, LOCAL_RANK, COUNT, LOCAL_COUNT = (
    int(os.environ[name]) if IS_TORCHRUN else alone
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
)
_met = []  # the store that the processes have met by


def device_of(name):
    """This process's own device by the name of rank 0's: as many further as its local rank."""
    kind, _, index = name.partition(":")
    return f"cuda:{int(index or 0) + LOCAL_RANK}" if kind == "cuda" and IS_TORCHRUN else name


def meet(cfg, device):
    """Join the other processes, by NCCL on GPUs and by gloo on CPUs.

    A process that ends early takes the others with it, by torchrun; so they need no short timeout,
    and may wait for a reward function or a checkpoint of rank 0.
    """
    sharding.check(cfg, COUNT if IS_TORCHRUN else 0)
    if not IS_TORCHRUN:
        return
    size = getattr(cfg, "minibatch_size", cfg.batch_size)
    if size < COUNT:
        raise UserError(f"{COUNT} processes share {size} rows of an optimizer step: each needs one")
    if device.type == "mps":
        raise UserError("--device mps is one, and takes one process")
    if getattr(cfg, "compile", False) and device.type == "cuda":
        raise UserError("--compile draws each GPU's own random numbers; leave it out with torchrun")
    options = {"timeout": datetime.timedelta(days=1), "rank": RANK, "world_size": COUNT}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    store, _, _ = next(dist.rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, **options)
    _met.append(store)


def part():
    """Leave the others, at the end of a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def add_up(models, numbers):
    """The sums over all processes: of the models' gradients, in place, and of `numbers`, a dict of
    numbers or scalar tensors, returned. Alone, nothing is added; those of divided weights are sums.
    """
    if not dist.is_initialized():
        return numbers
    weights = [w for model in models for w in model.parameters() if w.requires_grad]
    weights = [weight for weight in weights if not sharding.is_divided(weight)]
    for weight in weights:
        if weight.grad is None:  # of a process that had no rows
            weight.grad = torch.zeros_like(weight)
    for bucket in _buckets(weights):  # one sum of many small gradients: each takes its time
        whole = common.total(torch.cat([weight.grad.flatten() for weight in bucket]))
        for weight, part in zip(bucket, whole.split([weight.numel() for weight in bucket])):
            weight.grad.copy_(part.view_as(weight))
    own = [torch.as_tensor(x, dtype=torch.float64, device=_device()) for x in numbers.values()]
    whole = common.total(torch.stack(own)).tolist()
    back = lambda old, new: torch.full_like(old, new) if torch.is_tensor(old) else new
    return {name: back(old, new) for (name, old), new in zip(numbers.items(), whole)}


def _buckets(weights, size=2**24):
    """Lists of weights with about `size` numbers together."""
    buckets, held = [], math.inf
    for weight in weights:
        if held + weight.numel() > size:
            buckets, held = [*buckets, []], 0
        buckets[-1].append(weight)
        held += weight.numel()
    return buckets


def agree(number):
    """The greatest of the numbers that all processes call this with, an int."""
    if not dist.is_initialized():
        return number
    greatest = torch.tensor(number, device=_device())
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return greatest.item()


def wait():
    """Go on when all processes are here."""
    agree(0)


def _device():
    """Where what is added up must lie."""
    is_nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def may_speak():
    """Is it for this process to tell of an error? For the first that has one; for rank 0 before
    they have met.
    """
    if not _met:
        return RANK == 0
    try:
        return _met[0].add("errors", 1) == 1
    except RuntimeError:  # the store has ended too
        return True


def is_lost(error):
    """Does an error of torch say that another process has ended?"""
    texts = "gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Ss]ocket"
    return dist.is_initialized() and COUNT > 1 and re.search(texts, str(error)) is not None
