"""One run of a stage: start or go on, steps, log, stop, save."""

import collections
import dataclasses
import importlib
import itertools
import json
import math
import os
import pathlib
import random
import signal
import sys
import time

import torch
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from common import UserError
from plumbing import adapters, cli, folders, processes, sharding

# The flags that --resume may be given anew. They change nothing but rounding: another device, and
# in bf16 another micro-batch; another device also has other random numbers.
MAY_CHANGE = (
    "output", "resume", "overwrite", "microbatch_size", "save_every", "tensorboard", "device",
    "gradient_checkpointing", "trust_remote_code",
)


def _in_a_worker():
    """A process that a reward function forks has no run to stop: a pool ends its own by SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run finishes its iteration, and needs them


if hasattr(os, "register_at_fork"):  # not on Windows, which forks nothing
    os.register_at_fork(after_in_child=_in_a_worker)


class Run:
    """One run, its parts in the order of use: Run(), restore(), start(), then for each of steps():
    phase(), may_step(), log(), save_if_due(); and finish().

    `done` steps (in ppo.py iterations) were done before; `source` is the folder of the checkpoint
    that they lead to, or None, and `kept` what save_if_due() was given for it.
    """

    def __init__(self, cfg, may_change=(), num_steps=None):
        """Seed, take the folder and find what to go on from, before the work.

        `may_change` are flags that --resume may be given anew, besides MAY_CHANGE; `num_steps` is
        given if the run can be made longer, and then its state is kept at the end.
        """
        set_seed(cfg.seed)
        self.cfg, self.device = cfg, cli.pick_device(cfg.device)
        processes.meet(cfg, self.device)
        cli.warn_of_bf16(cfg, self.device)
        self.step, self.history, self.signal, self.warned = 0, [], None, set()
        self.num_skipped, self.skipped_in_a_row = 0, 0
        self.seconds, self.entered = collections.Counter(), ("loading", time.perf_counter())
        if cfg.tensorboard:
            try:
                self.tensorboard = importlib.import_module("torch.utils.tensorboard")
            except ImportError:
                what = "needs the package tensorboard; pip install tensorboard"
                raise UserError(f"--tensorboard {what}") from None
        if cfg.lora_rank is not None:
            adapters.import_peft()
        self.folder, self.source, self.state = folders.claim(cfg), None, {}
        self.keep_state, may_change = num_steps is not None, {*MAY_CHANGE, *may_change}
        processes.wait()  # rank 0 has tidied up
        if cfg.resume:
            self.source, self.state = folders.read_state(self.folder, cfg, may_change)
        processes.wait()  # all have read it, before rank 0 writes
        self.done, self.kept = self.state.get("step", 0), self.state.get("kept", {})
        if self.source and (not self.done or self.keep_state and self.done >= num_steps):
            if self.source != self.folder:  # killed just before its end
                self.finish()
            longer, anew = "a higher --iterations goes on with it", "--overwrite starts anew"
            print(f"  the run in {cfg.output} is finished; {longer if self.done else anew}")
            sys.exit(0)  # a job that is started again is done

    def restore(self, tokenizer, models, optimizer, schedule, read_weights=False):
        """Say what belongs to a checkpoint, and put back what was saved of it.

        Weights are put back with `read_weights`, else they were loaded from `source` already.
        Adapters always are, and all else was loaded from where it was at the start.
        """
        self.phase("evaluation")
        self.models, self.tokenizer = models, tokenizer
        self.optimizer, self.schedule = optimizer, schedule
        state, self.inputs = self.state, folders.fingerprints(self.cfg)
        if not self.done:
            return
        for what, fingerprint in self.inputs.items():
            if state.get("inputs", self.inputs).get(what) != fingerprint:
                how = "put it back, or start anew with --overwrite"
                raise UserError(f"{what} has changed since the run began: {how}")
        if read_weights or self.cfg.lora_rank is not None:
            folders.read_weights(models, self.source)
        optimizer.load_state_dict(sharding.like_weights(optimizer, state["optimizer"]))
        schedule.load_state_dict(state["schedule"])
        schedule._last_lr = schedule.get_lr()  # the run may be longer now
        for group, lr in zip(optimizer.param_groups, schedule.get_last_lr()):
            group["lr"] = lr
        random.setstate(state["random"])
        torch.set_rng_state(state["torch_random"])
        of_device = state.get("device_random")
        if of_device is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(of_device, self.device)
        elif (of_device is not None) != (self.device.type == "cuda"):
            what = "what is drawn there, under --compile, has other random numbers"
            print(f"  another kind of device than before: {what}")
        print(f"  resumed after {self.done} iterations")
        before = state.get("processes", 1)
        if before != processes.COUNT:
            what = "sums of as many parts are rounded in another way"
            print(f"  {processes.COUNT} processes, {before} before: {what}")

    def start(self):
        """The folder with its logs: new, or as they were at the checkpoint."""
        self.writer = None
        if processes.RANK > 0:  # its log is nowhere
            self.state = {}
            return
        if not self.done:  # a new run, --overwrite, or nothing was saved before
            folders.clear(self.folder, self.cfg)
        else:
            for name, size in self.state["log_sizes"].items():
                os.truncate(self.folder / name, size)  # rows after the checkpoint come again
            folders.write_args(self.folder, self.cfg, folders.written(self.folder))
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            self.history = [row for row in map(json.loads, lines) if "split" not in row]
        self.state = {}  # the optimizer has its own copies
        if self.cfg.tensorboard:
            self.writer = self.tensorboard.SummaryWriter(self.folder / "tensorboard")

    def steps(self, batches, num_steps):
        """(step, batch) of all steps to do; the batches of those done are drawn and left out."""

        def ask_to_stop(number, frame):  # Ctrl-C or SIGTERM; the second one stops at once
            if processes.IS_TORCHRUN:  # which sends a second one itself, and a kill after 30 s
                told = b"\nstopping after this iteration\n"
            else:
                cli.stop_at_once()
                told = b"\nstopping after this iteration; once more stops at once\n"
            if self.signal is None and processes.RANK == 0:
                os.write(2, told)
            self.signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)
        batches, self.num_steps = itertools.islice(batches, self.done, num_steps), num_steps
        name = pathlib.Path(sys.argv[0]).stem
        self.bar = tqdm(batches, desc=name, unit="it", initial=self.done, total=num_steps)
        cli.at_error.append(self.rescue)
        for self.step, batch in enumerate(self.bar, self.done + 1):
            self.random = self.random_states()  # for `rescue`
            self.seconds.clear()
            self.num_skipped, self.entered = 0, ("step", time.perf_counter())
            yield self.step, batch
            if self.stopping and self.step < num_steps:
                self.bar.close()
                print(f"\nstopped; to go on: {cli.resume_command(self.cfg)}", file=sys.stderr)
                sys.exit(128 + self.stopping)
        cli.stop_at_once()

    def phase(self, name):
        """A phase begins: errors name it, its seconds are counted. Returns those of this step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        (last, since), self.entered = self.entered, (name, time.perf_counter())
        self.seconds[last] += self.entered[1] - since
        cli.now_in.update(phase=name, step=self.step, cfg=self.cfg)
        return self.seconds

    def may_step(self, norms):
        """Are the gradients' norms, scalar tensors, finite? Else the step is skipped; three in a
        row end the run.
        """
        self.phase("optimizer step")  # it comes next
        finite = bool(torch.stack([*map(sharding.plain, norms)]).isfinite().all())
        self.num_skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 3:
            keys = ("iteration", "score", "kl", "loss", "policy_loss", "grad_norm")
            rows = [{key: row[key] for key in keys if key in row} for row in self.history[-3:]]
            raise UserError(
                "three optimizer steps in a row had a gradient that is not finite, after "
                f"{rows or 'no iteration'}; usual causes: --lr too high, rewards of enormous size. "
                "The last checkpoint is kept"
            )
        return finite

    def log(self, row, show=None, find_warnings=None):
        """Add a row to metrics.jsonl and, if asked, to TensorBoard.

        `show` is {name: key}, what of it stands beside the progress bar, `find_warnings` a function
        from the rows so far to {symptom: message}; each symptom is told once.
        """
        self.append("metrics.jsonl", row)
        for key, value in row.items() if self.writer else ():
            if key != "iteration" and isinstance(value, (int, float)):
                name = f"{row.get('split', 'train')}/{key}"
                self.writer.add_scalar(name, value, row["iteration"])
        if self.writer:
            self.writer.flush()
        if show:
            self.history.append(row)
            shown = {name: row[key] for name, key in show.items() if row[key] is not None}
            self.bar.set_postfix({n: f"{x:.3g}" for n, x in shown.items()}, refresh=False)
        for symptom, message in find_warnings(self.history).items() if find_warnings else ():
            self.warn(symptom, message)

    def warn(self, symptom, message):
        """Print a warning beside the progress bar, once for each symptom."""
        if symptom not in self.warned:
            self.bar.write(f"warning, iteration {self.step}: {message}")
            self.warned.add(symptom)

    def append(self, name, row):
        """Add a row to a log; a number that is not finite becomes null."""
        is_nan = lambda value: isinstance(value, float) and not math.isfinite(value)
        row = {key: None if is_nan(value) else value for key, value in row.items()}
        if processes.RANK > 0:
            return
        try:
            with open(self.folder / name, "a", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            what = f"can't write {self.folder / name}: {error.strerror}"
            raise UserError(f"{what}; the last checkpoint is whole, --resume goes on") from None

    def is_due(self, every):
        """Is this step the last or one of every so many?"""
        return self.step == self.num_steps or self.step % every == 0

    def random_states(self):
        """Those of Python, of torch and of the run's own GPU, which --resume puts back."""
        on_cuda = self.device.type == "cuda"
        return {
            "random": random.getstate(), "torch_random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if on_cuda else None,
        }

    def save_if_due(self, **kept):
        """A checkpoint every --save-every steps, at the last, and before a stop."""
        self.latest = kept
        self.stopping = processes.agree(self.signal or 0)  # one may have the signal before another
        if self.is_due(self.cfg.save_every) or self.stopping:
            self.save(self.step, self.random_states())

    def save(self, step, random_states):
        """A checkpoint of `step` steps."""
        self.phase("checkpoint")
        optimizer = sharding.whole_optimizer(self.optimizer)  # all processes gather them
        whole = sharding.whole_models(self.models)
        if processes.RANK > 0:
            return
        state = random_states | {
            "args": dataclasses.asdict(self.cfg), "step": step, "kept": self.latest,
            "inputs": self.inputs, "processes": processes.COUNT,
            "optimizer": optimizer, "schedule": self.schedule.state_dict(),
        }
        models = self.models, self.tokenizer
        folders.write_checkpoint(self.folder, self.cfg, *models, state, whole)

    def rescue(self):
        """What an error may end before the models have changed in a step is saved first."""
        before, phases = self.step - 1, ("rollout", "score", "log-probabilities")
        if before <= self.done or self.entered[0] not in phases or processes.RANK > 0:
            return ""
        if getattr(self.cfg, "shard", False):  # the others may not come to gather the weights
            return ""
        saved = folders.checkpoints(self.folder)
        if not saved or saved[-1].name != f"checkpoint-{before}":
            self.save(before, self.random)
        return f"; {before} iterations are saved: {cli.resume_command(self.cfg)}"

    def finish(self):
        """The newest checkpoint's files come to lie in the folder itself."""
        if processes.RANK == 0:
            folders.finish(self.folder, self.cfg, self.keep_state)


def adamw_with_cosine(cfg, model, lr_by_size, num_steps):
    """(AdamW, a schedule from 0 up to --lr and by a cosine down to 0), of the first two stages."""
    lr = cli.by_size(cfg.lr, lr_by_size, model)
    weights, decay = cli.trainable(model), cfg.weight_decay
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=decay, fused=True)
    num_warmup = round(cfg.warmup * num_steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, num_warmup, num_steps)
