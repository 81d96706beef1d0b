"""A CUDA graph that is only pretended: it replays the operations of a step on the CPU.

Like a real one it replays the same operations on the same tensors, and capturing changes no tensor.
What makes the host wait for the device is refused, since no graph can hold it, and so is autocast's
cache, whose casts may be freed before the replay. It shows neither speed nor memory nor streams.
"""

import contextlib
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount")
alive = weakref.WeakSet()  # the graphs that have not been freed
replays = []  # the number of operations of each replay


class PretendedGraph(TorchDispatchMode):
    """Records the operations within a `with` block, and undoes them at its end."""

    def __enter__(self):
        alive.add(self)
        self.calls, self.undo = [], []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in WAITS, f"{func} waits for the device"
        assert not torch.is_autocast_cache_enabled(), "the graph may read a cast that is freed"
        if func._schema.is_mutable:
            self.undo.append((args[0], args[0].clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.undo):
            tensor.copy_(before)

    def replay(self):
        replays.append(len(self.calls))
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def install(monkeypatch):
    """Lets torch.cuda make such graphs until the end of a test."""
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", torch.device)  # both accept a device
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, capture_error_mode: graph)
    replays.clear()
