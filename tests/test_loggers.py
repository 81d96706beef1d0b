"""examples/loggers.py: every number of a row reaches TensorBoard and Weights & Biases."""

import sys
from unittest import mock

import pytest
from conftest import ROOT, read_rows
from test_forks import flags_of

import ppo

FILE = ROOT / "examples" / "loggers.py"


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_every_number_of_the_log_arrives_and_a_missing_package_ends_the_run_in_one_line(
    name, module, world, tmp_path, run_stage, monkeypatch
):
    package = mock.Mock(run=None)  # both packages, pretended
    monkeypatch.setitem(sys.modules, module, package)
    monkeypatch.delitem(sys.modules, "loggers", raising=False)
    flags = flags_of(world, tmp_path / "out", world / "reward_model", "--log", f"{FILE}:{name}")
    assert run_stage(ppo, *flags)[0] == 0
    expected = {}
    for row in read_rows(tmp_path / "out" / "metrics.jsonl"):
        prefix = "eval/" if row.pop("split", None) else ""
        iteration = row.pop("iteration")
        row |= {f"score_parts/{i}": part for i, part in enumerate(row.pop("score_parts", []))}
        numbers = {key: number for key, number in row.items() if type(number) in (int, float)}
        expected |= {(prefix + key, iteration): number for key, number in numbers.items()}
    scalars = [call.args for call in package.SummaryWriter().add_scalar.call_args_list]
    seen = {(key, iteration): number for key, number, iteration in scalars}
    for call in package.log.call_args_list:
        seen |= {(key, call.kwargs["step"]): number for key, number in call.args[0].items()}
    assert seen == expected and ("score_parts/0", 2) in seen and ("eval/kl", 0) in seen
    package.log.side_effect = package.SummaryWriter().add_scalar.side_effect = KeyError("no network")
    status, _, err = run_stage(ppo, *flags, "--overwrite")
    assert status == 2 and f"error: --log {FILE}:{name} failed: KeyError: 'no network'" in err
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "loggers")
    status, _, err = run_stage(ppo, *flags, "--overwrite")
    [line] = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and module in line and "Traceback" not in err
