"""Sampling one step ahead, for examples/scale/sampling_ahead.patch: a thread, and a copy of a model.

While the main thread learns from rollout i, the copy samples rollout i + 1 with the weights from
before update i: one update behind then, and never more.
"""

import copy
import threading
import time

import torch
from torch.overrides import TorchFunctionMode

import common
from common import UserError
from plumbing import cli, processes


def pick_device(name):
    """The torch.device of --sampler-device."""
    if processes.IS_TORCHRUN:
        raise UserError("--sampler-device is for one process; leave it out with torchrun")
    try:
        return cli.pick_device(name)
    except UserError as error:
        raise UserError(str(error).replace("--device", "--sampler-device")) from None


class OwnRandom(TorchFunctionMode):
    """In its thread torch.randint draws from this generator: from the global one, which is the main
    thread's, it would be chance who draws first.
    """

    def __init__(self, seed):
        super().__init__()
        self.own = {"generator": torch.Generator().manual_seed(seed)}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}), **(self.own if function is torch.randint else {}))


class Sampler:
    """A copy of the policy, and a thread in which sample(copy, rows) gives a tuple of tensors."""

    def __init__(self, run, policy, sample):
        self.run, self.policy, self.sample = run, policy, sample
        self.result, self.thread = run.kept.get("pending"), None
        self.error, self.is_stopped, self.seconds = None, False, 0.0
        device = pick_device(run.cfg.sampler_device)
        frozen = lambda w: torch.nn.Parameter(w.detach().to(device, copy=True), requires_grad=False)
        self.copy = copy.deepcopy(policy, {id(w): frozen(w) for w in policy.parameters()})
        common.place(self.copy, device, run.cfg.dtype)  # not compiled, even if the policy is
        self.copy.get_input_embeddings().register_forward_pre_hook(self._go_on)
        cli.at_end.append(self._stop)

    def rollout(self, rows, next_rows):
        """What `sample` gave for rows, on the run's device, or the error that it ended in. The
        thread goes on to next_rows, with the weights as they are now, unless this step is the last.
        """
        self.run.seconds["rollout"] += self.seconds
        if self.thread is None and self.result is None:  # a run's first: by the policy as it is
            self._start(rows)
        else:
            self.run.warned.add("ratio")  # that first ratios are not 1 is no symptom now
        result, self.result = self.pending(), None
        if self.error is not None:
            raise self.error
        if self.run.step < self.run.num_steps:
            self._start(next_rows)
        return [tensor.to(self.run.device) for tensor in result]

    def pending(self):
        """What the next rollout() will give, waited for: it belongs to a checkpoint."""
        since = time.perf_counter()
        if self.thread is not None:
            self.thread.join()
        self.seconds = time.perf_counter() - since
        return self.result

    @torch.no_grad()
    def _start(self, rows):
        for own, weight in zip(self.copy.parameters(), self.policy.parameters()):
            if weight.requires_grad:  # with --lora-rank few
                own.copy_(weight)
        seed = torch.randint(2**31, ()).item()  # by the main thread, whose state is in a checkpoint
        self.thread = threading.Thread(target=self._work, args=(rows, seed))
        self.thread.start()

    def _work(self, rows, seed):
        try:
            with OwnRandom(seed):
                self.result = [tensor.cpu() for tensor in self.sample(self.copy, rows)]
        except BaseException as error:  # for rollout() to raise
            self.error = error

    def _go_on(self, module, inputs):  # called at each token
        if self.is_stopped:
            raise InterruptedError

    def _stop(self):
        self.is_stopped = True
        self.pending()
