"""Loggers for --log: they send every number of metrics.jsonl to TensorBoard or Weights & Biases.

    python ppo.py --log examples/loggers.py:tensorboard      writes to runs/, TensorBoard's default
    python ppo.py --log examples/loggers.py:wandb            set WANDB_PROJECT for the project

Your own logger is a function of one row, a dict.
"""

import functools


def numbers(row):
    """Returns {name: number} of a row; names of held-out results begin with eval/."""
    prefix = f"{row['split']}/" if "split" in row else ""
    parts = {f"score_parts/{i}": part for i, part in enumerate(row.get("score_parts", []))}
    result = {}
    for name, value in (row | parts).items():
        if isinstance(value, (int, float)) and name != "iteration":
            result[prefix + name] = value
    return result


@functools.cache
def summary_writer():
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter()


def tensorboard(row):
    for name, number in numbers(row).items():
        summary_writer().add_scalar(name, number, row["iteration"])
    summary_writer().flush()


def wandb(row):
    import wandb

    if wandb.run is None:
        wandb.init()
    wandb.log(numbers(row), step=row["iteration"])
