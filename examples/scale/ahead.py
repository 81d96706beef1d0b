"""Sampling one step ahead, for sampling_ahead.patch: a copy of the policy and a thread.

While the main thread learns from rollout i, the copy samples rollout i + 1 with the weights from
before update i: it is one update behind then, and never more.
"""

import copy
import threading
import time

import torch

import common
import harness
from common import UserError


def pick_device(name):
    """Returns the torch.device of --sampler-device."""
    if harness.IS_TORCHRUN:
        raise UserError("--sampler-device is for one process; leave it out with torchrun")
    return harness.pick_device(name, "--sampler-device")


class Sampler:
    """A copy of the policy, and a thread in which sample(copy, rows) returns tensors and lists."""

    def __init__(self, run, policy, sample):
        self.run, self.policy, self.sample = run, policy, sample
        self.result, self.error, self.seconds = run.kept.get("pending"), None, 0.0
        self.has_drawn, self.is_done = threading.Event(), threading.Event()
        self.is_done.set()
        device, weights = pick_device(run.cfg.sampler_device), {}
        for weight in policy.parameters():
            own = weight.detach().to(device, copy=True)
            weights[id(weight)] = torch.nn.Parameter(own, requires_grad=False)
        self.copy = copy.deepcopy(policy, weights)
        common.to_device(self.copy, device, run.cfg.dtype)
        self.copy.get_input_embeddings().register_forward_pre_hook(self._before_token)

    def rollout(self, rows, next_rows):
        """Returns what `sample` returned for rows, on the run's device, or raises its error. The
        thread continues with next_rows and the weights as they are now, unless this is the last.
        """
        self.run.seconds["rollout"] += self.seconds
        if self.pending() is None and self.error is None:  # the first: by the policy as it is
            self._start(rows)
        else:
            self.run.warned.add("ratio")  # that first ratios are not 1 is no symptom now
        result, self.result = self.pending(), None
        if self.error is not None:
            raise self.error
        if self.run.step < self.run.num_steps:
            self._start(next_rows)
        return [x.to(self.run.device) if isinstance(x, torch.Tensor) else x for x in result]

    def pending(self):
        """Waits for the next rollout and returns it: it belongs to a checkpoint."""
        since = time.perf_counter()
        self.is_done.wait()
        self.seconds = time.perf_counter() - since
        return self.result

    @torch.no_grad()
    def _start(self, rows):
        for own, weight in zip(self.copy.parameters(), self.policy.parameters()):
            if weight.requires_grad:  # with --lora-rank few
                own.copy_(weight)
        self.has_drawn.clear()
        self.is_done = threading.Event()
        threading.Thread(target=self._work, args=(rows, self.is_done), name="sampler").start()
        self.has_drawn.wait()  # both threads draw from one generator, always in the same order

    def _work(self, rows, is_done):
        try:
            result = self.sample(self.copy, rows)
            self.result = [x.cpu() if isinstance(x, torch.Tensor) else x for x in result]
        except BaseException as error:  # rollout() raises it
            self.error = error
        finally:
            self.has_drawn.set()
            is_done.set()

    def _before_token(self, module, inputs):
        self.has_drawn.set()  # all of a rollout's numbers are drawn before its first token
        if not threading.main_thread().is_alive():  # the run has ended, with an error
            raise InterruptedError
