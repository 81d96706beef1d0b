"""Sampling one step ahead, for examples/scale/sampling_ahead.patch: a thread and a model's copy.

While the main thread learns from rollout i, the copy samples rollout i + 1 with the weights from
before update i: one update behind then, and never more.
"""

import copy
import threading
import time

import torch

import common
from common import UserError
from plumbing import cli, processes


def pick_device(name):
    """The torch.device of --sampler-device."""
    if processes.IS_TORCHRUN:
        raise UserError("--sampler-device is for one process; leave it out with torchrun")
    return cli.pick_device(name, "--sampler-device")


class Sampler:
    """A copy of the policy, and a thread in which sample(copy, rows) gives a tuple of tensors."""

    def __init__(self, run, policy, sample):
        self.run, self.policy, self.sample = run, policy, sample
        self.result, self.error = run.kept.get("pending"), None
        self.is_stopped, self.seconds = False, 0.0
        self.has_drawn, self.is_done = threading.Event(), threading.Event()
        self.is_done.set()
        device = pick_device(run.cfg.sampler_device)
        frozen = lambda w: torch.nn.Parameter(w.detach().to(device, copy=True), requires_grad=False)
        self.copy = copy.deepcopy(policy, {id(w): frozen(w) for w in policy.parameters()})
        common.place(self.copy, device, run.cfg.dtype)  # not compiled, even if the policy is
        self.copy.get_input_embeddings().register_forward_pre_hook(self._at_token)
        cli.at_end.append(self._stop)

    def rollout(self, rows, next_rows):
        """What `sample` gave for rows, on the run's device, or the error that it ended in. The
        thread goes on to next_rows, with the weights as they are now, unless this step is the last.
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
        return [tensor.to(self.run.device) for tensor in result]

    def pending(self):
        """What the next rollout() will give, waited for: it belongs to a checkpoint."""
        since = time.perf_counter()
        self.is_done.wait()  # join() would believe, after a Ctrl-C, that the thread has ended
        self.seconds = time.perf_counter() - since
        return self.result

    @torch.no_grad()
    def _start(self, rows):
        for own, weight in zip(self.copy.parameters(), self.policy.parameters()):
            if weight.requires_grad:  # with --lora-rank few
                own.copy_(weight)
        self.has_drawn.clear()
        is_done = threading.Event()
        threading.Thread(target=self._work, args=(rows, is_done), name="sampler").start()
        self.is_done = is_done
        self.has_drawn.wait()  # both draw from torch's one generator: never by chance who is first

    def _work(self, rows, is_done):
        try:
            self.result = [tensor.cpu() for tensor in self.sample(self.copy, rows)]
        except BaseException as error:  # for rollout() to raise
            self.error = error
        finally:
            self.has_drawn.set()
            is_done.set()

    def _at_token(self, module, inputs):
        self.has_drawn.set()  # all of a rollout's numbers are drawn before its first token
        if self.is_stopped:
            raise InterruptedError

    def _stop(self):
        self.is_stopped = True
        self.pending()
