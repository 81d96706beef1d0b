"""The files: who may import whom, how long things are, and that nothing is unused."""

import ast
import collections
import dataclasses
import math

import pytest
from conftest import ROOT

import harness
import ppo

STAGES = ("sft", "reward_model", "ppo")
CORE = (*STAGES, "rewards", "harness", "common")
ALLOWED = {  # {file: what of ours it may import}; stage -> rewards -> harness -> common
    "common": [], "harness": ["common"], "rewards": ["common", "harness"],
    "reward_model": ["common", "harness", "rewards"], "ppo": ["common", "harness", "rewards"],
    "sft": ["common", "harness", "rewards", "data.tiny_model"], "plot": ["common", "harness"],
}
OURS = {path.stem for path in ROOT.glob("*.py")} | {"bench", "data", "examples", "tests", "docs"}
BY_LIBRARIES = ("update", "write", "flush", "__")  # what these call: a cache's, a stream's
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ALLOWED}


def definitions(source, kinds=(ast.FunctionDef, ast.ClassDef)):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def imports_of(source):
    """Returns {name bound: dotted module} of all imports, those within functions too."""
    bound = {}
    for node in definitions(source, (ast.Import, ast.ImportFrom)):
        folder = ""
        if isinstance(node, ast.ImportFrom):
            folder = f"{'.' * node.level}{node.module or ''}."
        for alias in node.names:
            bound[alias.asname or alias.name.split(".")[0]] = folder + alias.name
    return bound


def wrong_imports(name, source):
    """Returns the modules of ours that a file must not import."""
    found = []
    for module in imports_of(source).values():
        is_allowed = any(f"{module}.".startswith(f"{root}.") for root in ALLOWED[name])
        if (module.startswith(".") or module.split(".")[0] in OURS) and not is_allowed:
            found.append(module)
    return found


def names_in(node):
    """Returns how often each name and each attribute is used within a node."""
    used = collections.Counter()
    for child in ast.walk(node):
        if isinstance(child, (ast.Name, ast.Attribute)):
            used[child.id if isinstance(child, ast.Name) else child.attr] += 1
    return used


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_go_one_way_and_none_is_unused(name):
    assert wrong_imports(name, SOURCES[name]) == []
    used = names_in(ast.parse(SOURCES[name]))
    assert [bound for bound in imports_of(SOURCES[name]) if not used[bound]] == []


@pytest.mark.parametrize("name, line, found", [
    ("ppo", "import sft", "sft"), ("common", "import harness as x", "harness"),
    ("sft", "def f():\n    from reward_model import main", "reward_model.main"),
    ("harness", "import rewards", "rewards"), ("rewards", "from ppo import gae", "ppo.gae"),
    ("ppo", "from data import tiny_model", "data.tiny_model"), ("common", "from . import x", "..x"),
])
def test_an_import_the_other_way_is_found(name, line, found):
    assert wrong_imports(name, f"{SOURCES[name]}\n{line}\n") == [found]


def test_every_function_class_and_method_is_used_by_the_six_files_themselves():
    used, unused = collections.Counter(), []
    for name in CORE:
        used += names_in(ast.parse(SOURCES[name]))
        top = [node.name for node in ast.parse(SOURCES[name]).body if hasattr(node, "name")]
        assert len(top) == len({*top}), f"{name} defines something twice"
    for name in CORE:
        for node in definitions(SOURCES[name]):
            by_others = used[node.name] - names_in(node)[node.name]
            if by_others == 0 and not node.name.startswith(BY_LIBRARIES):
                unused.append(f"{name}.{node.name}")
    assert unused == []


@pytest.mark.parametrize("stage, functions", [
    ("ppo", "token_logprobs forward_responses kl_shaped_rewards adapt_kl_coef gae bandit whiten "
            "policy_loss value_loss minibatches mask_through_first_eos"),
    ("sft", "completion_nll"), ("reward_model", "preference_loss pair_scores"),
])
def test_an_equation_names_neither_flags_nor_a_run(stage, functions):
    nodes = {node.name: node for node in definitions(SOURCES[stage])}
    for name in functions.split():
        assert not {"harness", "cfg", "run"} & names_in(nodes[name]).keys(), name


def test_functions_main_and_the_loop_are_short_and_lines_fit_their_columns():
    for name in CORE:
        for node in definitions(SOURCES[name], ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (130 if node.name == "main" else 45), f"{name}.{node.name}: {length}"
            if node.name == "main" and name in STAGES:
                [loop] = [each for each in node.body if isinstance(each, ast.For)]
                assert loop.end_lineno - loop.lineno + 1 <= 100, name
    folders = [ROOT / name for name in OURS if (ROOT / name).is_dir()]
    for path in [*ROOT.glob("*.py"), *(path for each in folders for path in each.rglob("*.py"))]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            limit = 120 if path.parent.name == "tests" else 100
            limit = math.inf if path.name == "zoo.py" else limit  # a table of configs
            assert len(line) <= limit, f"{path} line {number}"


def test_there_are_at_most_12_flags_for_all_stages_and_36_more_for_ppo():
    shared = {field.name for field in dataclasses.fields(harness.RunConfig)}
    own = {field.name for field in dataclasses.fields(ppo.Config)} - shared
    assert len(shared) <= 12 and len(own) <= 36
