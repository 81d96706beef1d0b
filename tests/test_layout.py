"""Flags, rows, logs and checkpoints; and which file may import which."""

import ast
import dataclasses
import gzip
import json
import re
import types

import pytest
import torch
from conftest import ROOT, tiny_lm

import common
import ppo
import reward_model
import sft
from data import tiny_model
from plumbing import cli, folders, runs
from plumbing import rows as rows_

PAIR = [("prompt", "completion"), ("text",)]


def read(tmp_path, content, formats=PAIR, name="data.jsonl"):
    (tmp_path / name).write_bytes(content)
    return rows_.read_rows([str(tmp_path / name)], formats)


def test_rows_of_either_format_bom_crlf_and_gzip_are_read_and_other_keys_kept(tmp_path):
    content = b'\xef\xbb\xbf{"prompt": "a", "completion": "b", "id": 7}\r\n{"text": "\\u00e9"}'
    expected = [{"prompt": "a", "completion": "b", "id": 7}, {"text": "é"}]
    assert read(tmp_path, content) == expected
    assert read(tmp_path, gzip.compress(content), name="data.jsonl.gz") == expected


@pytest.mark.parametrize("line, problem", [
    (b"", "is empty"), (b"   ", "is empty"), (b'{"text": "a", "tools": 7}', "has a int under 'tools', not a list"), (b'{"text": ', "is not JSON"), (b"[1]", "is a JSON list"), (b"7", "is a JSON int"),
    (b'{"prompt": "a"}', "has the keys 'prompt'"), (b"{}", "(none)"), (b'{"text": 7}', "has a int under 'text'"),
    (b'{"text": null}', "has the keys 'text' (null);"), (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    (b'{"text": "\xff"}', "is not UTF-8 at byte 10"), (b"[" * 100_000, "is not JSON"), (b'{"prompt": ["a"], "completion": "b"}', "has a list under 'prompt' whose items are not all"), (b'{"text": []}', "has an empty list under 'text', not a string;"),
    (b'{"prompt": [{"role": "user"}], "completion": "b"}', 'not all {"role": "...", "content": "..."}'), (b'{"prompt": [{"role": "user", "content": "\\ud800"}], "completion": "b"}', "half of a surrogate pair under 'prompt'"),
])
def test_a_bad_line_is_named_with_file_line_problem_and_an_example(tmp_path, line, problem):
    with pytest.raises(common.UserError) as error:
        read(tmp_path, b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    message = str(error.value)
    assert "data.jsonl line 2" in message and problem in message
    assert '{"prompt": "...", "completion": "..."} or {"text": "..."}' in message


@pytest.mark.parametrize("content, name", [(b"", "a.jsonl"), (b"not gzip", "a.jsonl.gz"), (gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], "b.jsonl.gz"), (gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:12] + b"\xff" * 30, "c.jsonl.GZ")])
def test_an_empty_or_damaged_file_is_named(tmp_path, content, name):
    with pytest.raises(common.UserError, match=name):
        read(tmp_path, content, name=name)


def test_a_flag_or_a_file_given_twice_is_refused(tmp_path):
    with pytest.raises(common.UserError, match="--data is given twice"):
        cli.parse_args(sft.Config, "", ["--data", "a", "--epochs", "1", "--data=b"])
    with pytest.raises(common.UserError, match="a.jsonl is given twice"):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a"}\n')
        rows_.read_rows([str(path), str(path)], PAIR)


@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_flags_take_dashes_underscores_and_equals_and_defaults_are_the_config(module):
    assert cli.parse_args(module.Config, "", []) == module.Config()
    for argv in (["--max-grad-norm", "3"], ["--max_grad_norm", "3"], ["--max-grad-norm=3"]):
        assert cli.parse_args(module.Config, "", argv) == dataclasses.replace(module.Config(), max_grad_norm=3.0)
    for argv, hint in ((["--max-grad-nrom", "3"], "did you mean --max-grad-norm?"), (["--max-grad", "3"], "--max-grad-norm"), (["--lr", "x"], "--lr"), (["stray"], "stray"), (["--dtype", "fp16"], "fp16")):
        with pytest.raises(common.UserError, match=hint.replace("?", r"\?")):
            cli.parse_args(module.Config, "", argv)


@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_every_flag_is_in_help_with_dashes_and_is_read_by_the_code(module, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse_args(module.Config, module.__doc__.splitlines()[0], ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    stage = (ROOT / f"{module.__name__}.py").read_text(encoding="utf-8")
    code = stage[stage.index("# === 1.") :] + "".join(path.read_text(encoding="utf-8") for path in (ROOT / "plumbing").glob("*.py"))
    named_by_string = ("model", "policy", "reward", "data", *cli.SIZES)  # folders.claim and cli look these up in any stage's flags
    for field in dataclasses.fields(module.Config):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", text, re.M)
        assert re.search(rf"\b(cfg|self)\.{field.name}\b", code) or field.name in named_by_string, f"nothing reads --{field.name}"
    assert not re.search(r"--\w+_\w+", text) and text.index("run:") < text.index("data:")
    assert all(f"cfg.{name}" in stage for name in ("policy", "reward", "batch_size", "response_length")) or module is not ppo


def test_a_flag_out_of_its_range_is_refused_and_one_without_a_value_is_not_checked():
    for module in (sft, reward_model, ppo):
        cli.check_ranges(module.Config())
        for field in dataclasses.fields(module.Config):
            low, high = field.metadata["range"]
            for bad in ([] if low is None else [low - 1]) + ([] if high is None else [high + 1]):
                with pytest.raises(common.UserError, match=f"{cli.flag_of(field.name)} is {bad}; it must be"):
                    cli.check_ranges(dataclasses.replace(module.Config(), **{field.name: bad}))


def a_run(folder):
    run = types.SimpleNamespace(folder=folder)
    return lambda name, row: runs.Run.append(run, name, row)


def test_numbers_that_are_not_finite_become_null_in_the_log(tmp_path):
    a_run(tmp_path)("log", {"a": float("nan"), "b": float("inf"), "c": 1.5, "d": None, "e": "é"})
    assert json.loads((tmp_path / "log").read_text(encoding="utf-8")) == {"a": None, "b": None, "c": 1.5, "d": None, "e": "é"}


def test_a_checkpoint_takes_the_place_of_the_one_before_whole_or_not_at_all(tmp_path):
    cfg, tokenizer, model = sft.Config(output=str(tmp_path / "out")), tiny_model.train_tokenizer(["a"], 300), tiny_lm(vocab_size=300)
    folders.clear(tmp_path / "out", cfg)
    (tmp_path / "out" / "notes.md").write_text("mine")
    save = lambda step, models: folders.write_checkpoint(tmp_path / "out", cfg, models, tokenizer, {"step": step, "args": {}})
    names = lambda: sorted(path.name for path in (tmp_path / "out").iterdir())
    save(1, {"policy": model})
    assert names() == ["args.json", "checkpoint-1", "metrics.jsonl", "notes.md"] and folders.written(tmp_path / "out") == []

    def fail(folder):
        (folder / "half").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save(2, {"policy": model, "critic": types.SimpleNamespace(save_pretrained=fail)})
    assert names() == ["args.json", "checkpoint-1", "metrics.jsonl", "notes.md"]
    save(10, {"policy": model, "critic": ppo.ValueHead(16, 1)})
    assert names() == ["args.json", "checkpoint-10", "metrics.jsonl", "notes.md"]
    assert folders.read_state(tmp_path / "out", cfg, set(dataclasses.asdict(cfg)))[0].name == "checkpoint-10"
    folders.finish(tmp_path / "out", cfg, keep_state=True)
    assert set(folders.written(tmp_path / "out")) <= {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert {"config.json", "model.safetensors", "critic/value_head.safetensors", "trainer_state/state.pt"} <= set(folders.written(tmp_path / "out"))
    folders.clear(tmp_path / "out", cfg)  # --overwrite
    assert [path.name for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()] == ["args.json", "metrics.jsonl", "notes.md"]


def test_out_of_memory_is_told_by_its_text_or_its_class():
    for error in (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):
        assert common.is_out_of_memory(error)
    assert not common.is_out_of_memory(RuntimeError("shape mismatch"))


# === Which file may import which ==================================================================
STAGES = ("sft", "reward_model", "ppo")


def imports_of(source):
    """All modules that a source imports, within functions too: {name bound: dotted module}."""
    bound = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name: f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return bound


def wrong_imports(path, source):
    """Imports against the one way: stage -> plumbing -> common -> libraries; data.tiny_model for sft alone."""
    ours = {name: module for name, module in imports_of(source).items() if module.split(".")[0] in (*STAGES, "common", "plumbing", "data", "bench", "tests", "plot", "")}
    stem = path.removesuffix(".py")
    allowed = {
        "common": (), "plumbing": ("common", "plumbing"), "sft": ("common", "plumbing", "data.tiny_model"), "plot": ("common", "plumbing"),
    }.get("plumbing" if "/" in stem else stem, ("common", "plumbing"))
    return [module for module in ours.values() if not any(module == root or module.startswith(f"{root}.") for root in allowed)]


def names_of_plumbing(source, wanted):
    """{function: names bound by an import from plumbing that it uses}, of the functions and classes for which wanted(line, name)."""
    bound = {name for name, module in imports_of(source).items() if module.split(".")[0] == "plumbing"}
    used = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and wanted(node.lineno, node.name):
            names = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)} & bound
            used |= {node.name: names} if names else {}
    return used


def in_sections_1_to_6(source):
    lines, section, number = source.splitlines(), [], 0
    for line in lines:
        ruler = re.match(r"# === (\d+)\.", line)
        number = int(ruler[1]) if ruler else 99 if line.startswith("# === ") else number
        section.append(number)
    return lambda lineno, name: 1 <= section[lineno - 1] <= 6


def test_imports_go_one_way():
    files = [*(f"{stage}.py" for stage in STAGES), "common.py", "plot.py", *(f"plumbing/{path.name}" for path in (ROOT / "plumbing").glob("*.py"))]
    assert len(files) > 10
    for name in files:
        assert wrong_imports(name, (ROOT / name).read_text(encoding="utf-8")) == [], name
    for name in STAGES:
        bound = imports_of((ROOT / f"{name}.py").read_text(encoding="utf-8")).values()
        assert "common" in bound and any(module.startswith("plumbing.") for module in bound)


@pytest.mark.parametrize("name, line, found", [
    ("ppo.py", "import sft", "sft"), ("ppo.py", "def f():\n    from reward_model import main", "reward_model.main"), ("common.py", "from plumbing import cli", "plumbing.cli"),
    ("common.py", "import ppo as x", "ppo"), ("plumbing/runs.py", "import ppo", "ppo"), ("plumbing/rows.py", "from data import tiny_model", "data.tiny_model"),
    ("reward_model.py", "from data import tiny_model", "data.tiny_model"), ("plumbing/rows.py", "from . import cli", "..cli"),
])
def test_an_import_the_other_way_is_found(name, line, found):
    source = (ROOT / name).read_text(encoding="utf-8") + f"\n{line}\n"
    assert wrong_imports(name, source) == [found]


def test_no_equation_names_anything_of_plumbing():
    source = (ROOT / "ppo.py").read_text(encoding="utf-8")
    wanted = in_sections_1_to_6(source)
    inside = [node.name for node in ast.parse(source).body if hasattr(node, "name") and wanted(node.lineno, node.name)]
    assert {"sample_responses", "score_responses", "gae", "policy_loss", "Batch", "total_loss"} <= set(inside) and not {"main", "Config", "load_models"} & set(inside)
    assert names_of_plumbing(source, wanted) == {}
    for stage, function in (("sft", "completion_nll"), ("reward_model", "preference_loss")):
        source = (ROOT / f"{stage}.py").read_text(encoding="utf-8")
        assert f"def {function}(" in source and names_of_plumbing(source, lambda line, name: name == function) == {}


def test_a_name_of_plumbing_in_an_equation_is_found():
    source = (ROOT / "ppo.py").read_text(encoding="utf-8")
    doctored = source.replace("    ratio = torch.exp(new_logprobs - logprobs)", "    cli.enter('loss')\n    ratio = torch.exp(new_logprobs - logprobs)")
    assert doctored != source and names_of_plumbing(doctored, in_sections_1_to_6(doctored)) == {"policy_loss": {"cli"}}
