"""The documentation against the code: paths, flags, functions, metrics, commands, equations."""

import dataclasses
import re

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser
from test_cli import METRICS

import ppo
import reward_model
import sft

README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES = {"sft": sft, "reward_model": reward_model, "ppo": ppo}
DOCS = {"README.md": README} | {f"{name}.py": module.__doc__ for name, module in STAGES.items()}


def flags_of(module):
    return {"--" + field.name.replace("_", "-") for field in dataclasses.fields(module.Config)}


@pytest.mark.parametrize("name", DOCS)
def test_every_flag_in_the_text_exists(name):
    torchrun = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    known = {"--help", "--pretrain"}.union(  # the second is OpenRLHF's
        torchrun, *map(flags_of, STAGES.values())
    )
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", DOCS[name])) <= known


@pytest.mark.parametrize("name", DOCS)
def test_every_example_command_gives_its_stage_flags_that_it_has(name):
    commands = re.findall(r"python (sft|reward_model|ppo)\.py((?: +--[a-z-]+(?: +[^\s&|`-][^\s&|`]*)?)*)", DOCS[name])
    assert commands
    for script, flags in commands:
        assert set(re.findall(r"--[a-z-]+", flags)) <= flags_of(STAGES[script])


def test_every_file_the_readme_names_exists_with_about_the_lines_it_says():
    table = README[README.index("## The files") : README.index("Places made")]
    rows = re.findall(r"^\| `([^`]+)` \| (\d*) \|", table, re.M)
    assert len(rows) >= 6
    for path, lines in rows:
        assert (ROOT / path).exists(), path
        if lines:
            actual = len((ROOT / path).read_text(encoding="utf-8").splitlines())
            assert abs(int(lines) - actual) <= 0.05 * actual, (path, actual)


def test_every_function_of_the_formula_table_is_in_the_file_it_names():
    table = README[README.index("## From formula") : README.index("## The files")]
    pairs = re.findall(r"`(\w+)` in `(\w+)\.py`", table)
    assert len(pairs) >= 12
    for function, module in pairs:
        assert callable(getattr(STAGES[module], function)), function


def test_every_metric_the_readme_names_is_written():
    table = README[README.index("## What to inspect") : README.index("## Reproducibility")]
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+|kl|score)`", table))
    assert named and named <= METRICS | {"reward_model"}


def test_the_readmes_test_command_is_the_one_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "python -m pytest -q tests\n" in ci and "&& python -m pytest -q tests\n" in README


@pytest.mark.parametrize("name", STAGES)
def test_every_numbered_equation_of_a_docstring_is_marked_where_it_is_computed(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    numbers = set(re.findall(r"^\((\d\w?)\) ", STAGES[name].__doc__, re.M))
    code = source[source.index("# === 1.") :]
    marked = set()
    for numbered in re.findall(r"[Ee]qs?\. ([\dab ,and-]+)", code):
        for first, last in re.findall(r"(\d\w?)(?:-(\d))?", numbered):
            marked |= {str(n) for n in range(int(first[0]), int(last or first[0]) + 1)} | {first}
    assert numbers and numbers <= marked, numbers - marked


def test_no_source_line_is_longer_than_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        long = [i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 100]
        assert not long, (path.name, long)


def test_stages_import_common_and_never_each_other():
    for name in STAGES:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.M))
        assert "common" in imported and not imported & set(STAGES)
    assert not set(re.findall(r"^(?:import|from) (\w+)", (ROOT / "common.py").read_text(), re.M)) & set(STAGES)
