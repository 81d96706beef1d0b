"""examples/loggers.py: every number of a row reaches TensorBoard and Weights & Biases."""

import sys
import types

import pytest
from conftest import ROOT, read_rows
from test_forks import flags_of

import ppo

FILE = ROOT / "examples" / "loggers.py"


@pytest.fixture
def seen(monkeypatch):
    """Pretends that both packages are installed. Returns {(name, iteration): number}."""
    numbers = {}
    monkeypatch.delitem(sys.modules, "loggers", raising=False)

    class SummaryWriter:
        def add_scalar(self, name, number, iteration):
            numbers[name, iteration] = number

        def flush(self):
            pass

    def log(row, step):
        numbers.update({(name, step): number for name, number in row.items()})

    def init():
        wandb.run = "begun"

    wandb = types.SimpleNamespace(run=None, init=init, log=log)
    board = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return numbers


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_every_number_of_the_log_arrives(name, seen, world, tmp_path, run_stage):
    flags = flags_of(world, tmp_path / "out", world / "reward_model", "--log", f"{FILE}:{name}")
    assert run_stage(ppo, *flags)[0] == 0
    expected = {}
    for row in read_rows(tmp_path / "out" / "metrics.jsonl"):
        prefix = "eval/" if row.pop("split", None) else ""
        iteration = row.pop("iteration")
        row |= {f"score_parts/{i}": part for i, part in enumerate(row.pop("score_parts", []))}
        numbers = {key: number for key, number in row.items() if type(number) in (int, float)}
        expected |= {(prefix + key, iteration): number for key, number in numbers.items()}
    assert seen == expected and ("score_parts/0", 2) in seen and ("eval/kl", 0) in seen


@pytest.mark.parametrize("name, module", [
    ("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"),
])
def test_a_package_that_is_missing_is_named_in_one_line(
    name, module, seen, world, tmp_path, run_stage, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    flags = flags_of(world, tmp_path / "out", world / "reward_model", "--log", f"{FILE}:{name}")
    status, _, err = run_stage(ppo, *flags)
    assert status == 2 and f"needs the package {name}: pip install {name}" in err
