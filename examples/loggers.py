"""Loggers for --log: they send every number of metrics.jsonl to TensorBoard or Weights & Biases.

    python ppo.py --log examples/loggers.py:tensorboard      writes to runs/, TensorBoard's default
    python ppo.py --log examples/loggers.py:wandb            set WANDB_PROJECT for the project

Your own logger is a function of one row, a dict.
"""

import functools
import importlib

from common import UserError


@functools.cache
def load(module, package):
    """Returns a module of an optional package."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"--log needs the package {package}: pip install {package}") from None


def numbers(row):
    """Returns {name: number} of a row; names of held-out results begin with eval/."""
    prefix, result = f"{row['split']}/" if "split" in row else "", {}
    parts = {f"score_parts/{i}": part for i, part in enumerate(row.get("score_parts", []))}
    for name, value in (row | parts).items():
        if isinstance(value, (int, float)) and name != "iteration":
            result[prefix + name] = value
    return result


@functools.cache
def summary_writer():
    return load("torch.utils.tensorboard", "tensorboard").SummaryWriter()


def tensorboard(row):
    for name, number in numbers(row).items():
        summary_writer().add_scalar(name, number, row["iteration"])
    summary_writer().flush()


def wandb(row):
    package = load("wandb", "wandb")
    if package.run is None:
        package.init()
    package.log(numbers(row), step=row["iteration"])
