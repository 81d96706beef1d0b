"""ppo.py --shard in two processes of torchrun, against one process, in float64."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import PROMPTS, ROOT, read_rows, write_rows
from test_cli import refused
from test_resume import TIMES, contents
from transformers import AutoModelForCausalLM

import common
import ppo
from plumbing import sharding

# What calls itself float32 is float64 here, so that two ways of adding up differ by 1e-12 and no
# sampled token flips. It also notes what each process holds, and fails where it is told to.
DRIVER = f"""
import inspect, json, os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from transformers.models.llama import modeling_llama
import common, ppo
from plumbing import cli, processes

class Double:
    def __getattr__(self, name):
        return getattr(torch, {{"float32": "float64", "float": "float64"}}.get(name, name))

ppo.torch = common.torch = modeling_llama.torch = Double()
torch.Tensor.float = torch.Tensor.double
torch.set_default_dtype(torch.float64)
make, rewards, calls = ppo.make_optimizer, ppo.kl_shaped_rewards, []

def noted(cfg, policy, critic):
    held = {{}}
    for name, model in (("policy", policy), ("critic", critic)):
        weights = [w.to_local() if hasattr(w, "to_local") else w for w in model.parameters()]
        held[name] = sum(weight.nbytes for weight in weights)
    pathlib.Path(f"{{cfg.output}}.held{{processes.RANK}}").write_text(json.dumps(held))
    return make(cfg, policy, critic)

def failing(*arguments):
    calls.append(None)
    if len(calls) == 4 and os.environ.get("FAILS") == str(processes.RANK):
        raise common.UserError("told to fail")
    return rewards(*arguments)

ppo.make_optimizer, ppo.kl_shaped_rewards = noted, failing
rehearse = inspect.getsource(ppo.rehearse).replace('run.device.type != "cuda"', "False")  # on a CPU too
exec(rehearse.replace("devices=[run.device]", "devices=[]"), vars(ppo))
with cli.command_line():
    ppo.main(cli.parse_args(ppo.Config, ""))
"""


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """run(number of processes, output, *flags) -> the finished process of a run of ppo.py."""
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "ppo.py").write_text(DRIVER)
    held_out = write_rows(folder / "held_out.jsonl", PROMPTS[:5])  # two processes can't halve them
    flags = ["--policy", world / "sft", "--reward", world / "reward_model", "--prompts", world / "prompts.jsonl", "--eval-prompts", held_out,
             "--iterations", 4, "--batch-size", 8, "--minibatch-size", 4, "--microbatch-size", 1, "--ppo-epochs", 2, "--response-length", 6,
             "--lr", "1e-3", "--save-every", 2, "--eval-every", 2, "--device", "cpu"]

    def run(count, output, *more, fails=None):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        given = more if "--resume" in more else [*flags, *more]
        command = [sys.executable, *(torchrun if count else []), folder / "ppo.py", *given, "--output", folder / output]
        env = os.environ | {"OMP_NUM_THREADS": "1", "FAILS": str(fails)}
        return subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)

    run.folder = folder
    return run


@pytest.fixture(scope="module", params=["separate", "shared"])
def pair(run, request):
    """The folders of the same run in two processes, divided, and in one."""
    critic = request.param
    for count, name, more in ((2, "sharded", ["--shard"]), (0, "one", [])):
        done = run(count, f"{name}_{critic}", "--critic", critic, *more)
        assert done.returncode == 0, done.stderr
    return run.folder / f"sharded_{critic}", run.folder / f"one_{critic}"


def logs(folder):
    rows = [row for name in ("metrics.jsonl", "samples.jsonl") for row in read_rows(folder / name)]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_close(folder, other):
    """Logs and weights are those of the other run, but for rounding."""
    mine, theirs = logs(folder), logs(other)
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for row, expected in zip(mine, theirs):
        for key, value in row.items():
            assert value == (expected[key] if isinstance(value, str) else pytest.approx(expected[key], abs=1e-6)), key
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors")) and len(files) == 2
    for file in files:
        weights, expected = (safetensors.torch.load_file(each / file) for each in (folder, other))
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_two_processes_with_divided_models_learn_what_one_learns(pair):
    assert_close(*pair)
    assert sum(row.get("split") != "eval" and "kl" in row for row in read_rows(pair[0] / "metrics.jsonl")) == 4


def test_the_folder_of_divided_models_is_an_ordinary_one(pair, world):
    sharded, one = pair
    model, untrained = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (sharded, world / "sft"))
    expected = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float64)
    tokens = torch.arange(20).view(2, 10) + 3
    logits, before, after = (each(tokens).logits for each in (model, untrained, expected))
    torch.testing.assert_close(logits, after, rtol=0, atol=1e-6)
    assert (logits - before).abs().max() > 1e-3
    assert json.loads((sharded / "config.json").read_text()) == json.loads((one / "config.json").read_text())
    assert sorted(path.name for path in sharded.iterdir()) == sorted(path.name for path in one.iterdir())


def test_each_process_holds_about_half_of_every_model(pair):
    sharded, one = (path.parent / path.name for path in pair)
    whole = json.loads(one.with_name(one.name + ".held0").read_text())
    parts = [json.loads(sharded.with_name(f"{sharded.name}.held{rank}").read_text()) for rank in range(2)]
    assert {name: parts[0][name] + parts[1][name] for name in whole} == whole
    for part in parts:
        assert 0.4 < part["policy"] / whole["policy"] < 0.6 and sum(part.values()) < 0.6 * sum(whole.values())


@pytest.mark.parametrize("pair", ["shared"], indirect=True)
def test_a_divided_run_that_failed_goes_on_to_the_last_bit_and_alone_but_for_rounding(run, pair):
    failed = run(2, "failed", "--critic", "shared", "--shard", fails=0)
    assert failed.returncode != 0 and "ppo.py: error: told to fail" in failed.stderr
    assert [path.name for path in (run.folder / "failed").glob("checkpoint-*")] == ["checkpoint-2"]  # none of the 3 steps
    shutil.copytree(run.folder / "failed", run.folder / "alone")
    resumed = run(2, "failed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert contents(run.folder / "failed") == contents(pair[0])
    alone = run(0, "alone", "--resume", "--shard", "false")
    assert alone.returncode == 0 and "1 processes, 2 before" in alone.stdout, alone.stderr
    assert_close(run.folder / "alone", pair[1])


def test_what_can_not_be_divided_is_refused(run_stage, tmp_path):
    refused(run_stage(ppo, "--shard", "--output", tmp_path / "out"), "ppo", "start by torchrun, or give --shard false")
    for changes, words in (({"compile": True}, "--compile"), ({"lora_rank": 8}, "--lora-rank"), ({"minibatch_size": 16, "batch_size": 32}, "--minibatch-size 16 among 3")):
        with pytest.raises(common.UserError, match=words):
            sharding.check(ppo.Config(shard=True, **changes), 3)
    sharding.check(ppo.Config(minibatch_size=16), 3)


def test_rows_are_filled_up_with_the_first_ones(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert sharding.fill_up(list("abcde"), ppo.Config()) == list("abcde")
    assert [sharding.fill_up(list("abcde"[:n]), ppo.Config(shard=True)) for n in (1, 4, 5)] == [list("aaaa"), list("abcd"), list("abcdeabc")]
