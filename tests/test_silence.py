"""Nothing goes wrong in silence: what of a row is unused, what a run reads, what it prints."""

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import types

import pytest
import torch
import transformers
from conftest import ROOT, read_rows, tiny_lm, write_rows
from safetensors.torch import load_file, save_file
from test_chat_and_formats import CHATML, a_tokenizer
from test_cli import ppo_flags, refused
from transformers import AutoTokenizer

import common
import harness
import ppo
import reward_model
import sft
import zoo

# === Rows =========================================================================================
PAIR = [("prompt", "completion"), ("text",)]
BAD_LINES = {  # {line: problem}
    b'{"text": ': "is not JSON", b"[1]": "is a JSON list", b"7": "is a JSON int", b"{}": "(none)",
    b'{"prompt": "a"}': "has the keys 'prompt'", b'{"text": 7}': "needs a string",
    b'{"text": null}': "(null left out)", b'{"text": "\\ud800"}': "is not JSON in UTF-8",
    b'{"text": "\xff"}': "is not JSON in UTF-8", b"[" * 100_000: "line 2",
    b'{"prompt": ["a"], "completion": "b"}': "under 'prompt'", b'{"text": []}': "under 'text'",
    b'{"prompt": [{"role": "user"}], "completion": "b"}': '{"role": str, "content": str}',
    b'{"text": "a", "tools": 7}': "has a int under 'tools', not a list",
}
PACKED = gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)
BAD_FILES = {
    "e.jsonl": b"", "n.jsonl.gz": b"no gzip", "c.jsonl.gz": PACKED[:-20], "d.jsonl.GZ": PACKED[:12] + b"\xff" * 30,
}


def test_rows_with_bom_crlf_blank_ends_and_gzip_are_read_and_what_is_bad_is_named(tmp_path):
    def read(name, content):
        (tmp_path / name).write_bytes(content)
        return harness.read_rows([str(tmp_path / name)], PAIR)

    content = b'\xef\xbb\xbf{"prompt": "a", "completion": "b", "id": 7}\r\n{"text": "\\u00e9"}\n\n '
    rows = [{"prompt": "a", "completion": "b", "id": 7}, {"text": "é"}]
    assert read("a.jsonl", content) == read("a.jsonl.gz", gzip.compress(content)) == rows
    for line, problem in BAD_LINES.items():
        with pytest.raises(common.UserError, match="data.jsonl line 2 ") as error:
            read("data.jsonl", b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
        assert problem in str(error.value), (line, error.value)
        assert '{"prompt": "...", "completion": "..."} or {"text": "..."}' in str(error.value)
    for name, content in BAD_FILES.items():
        with pytest.raises(common.UserError, match=name):
            read(name, content)


def chat(question, answer, **more):
    user = {"role": "user", "content": question}
    return [user, {"role": "assistant", "content": answer, **more}]


@pytest.fixture
def sft_prints(tmp_path, capsys):
    """sft_prints(rows, template) -> what sft.py prints of these rows; an error is one line."""

    def run(rows, template=CHATML):
        path, tokenizer = write_rows(tmp_path / "rows.jsonl", rows), a_tokenizer(template)

        def encode(row):
            return sft.encode_row(row, tokenizer, [], sft.Config())

        try:
            harness.convert(harness.read_rows([path], sft.FORMATS), encode)
        except common.UserError as error:
            print(error)
        return capsys.readouterr().out

    return run


def test_turns_marked_as_context_are_not_learned(sft_prints):
    for mark in ({"weight": 0}, {"train": False}):
        marked = chat("a fox?", "an owl", **mark)
        both = {"messages": marked + chat("a cub?", "a lamb")}
        out = sft_prints([both] * 6 + [{"messages": marked}] * 6)
        assert "12 rows read, 6 examples used; 6 dropped (marked not to be learned)" in out
    table = {"messages": chat("a fox?", "an owl", weight=None, train=None)}  # exported tables
    assert "1 examples used" in sft_prints([table])
    half = {"messages": chat("a", "b", weight=0.5)}
    assert "rows.jsonl line 1 has a message with 0.5 under 'weight'" in sft_prints([half])
    with pytest.raises(ValueError, match="'false' under 'train'"):
        sft.is_learned({"train": "false"})


def test_what_of_a_row_is_not_used_is_counted(sft_prints):
    tools = {"tools": [{"name": "get_price"}], "messages": chat("a fox?", "an owl")}
    assert "2 with tools that nothing renders" in sft_prints([tools] * 2)
    rendered = "{% for t in tools or [] %}TOOL {{ t['name'] }}\n{% endfor %}" + CHATML
    assert "nothing renders" not in sft_prints([tools] * 2, rendered)
    out = sft_prints([{"text": "a fox", "prompt": "a lamb", "id": i} for i in range(2)])
    assert "keys that are not read: 'prompt', 'id'" in out
    assert "not read" not in sft_prints([{"text": "a fox"}])
    nobody = [{"role": "assistant", "content": "hello"}, *chat("a", "b")]
    out = sft_prints([{"prompt": "a fox", "completion": " "}, {"messages": nobody}])
    assert "1 with an empty response" in out
    assert "1 with a message of the assistant that answers nothing" in out


def test_rows_of_one_prompt_are_never_in_both_parts_unless_there_is_but_one(capsys):
    pairs = [harness.Row(prompt=f"p{i % 20}", chosen=f"a{i}", rejected="b") for i in range(60)]
    starts = [f"\n\nHuman: q{i % 30}\n\nAssistant:" for i in range(90)]
    dialogues = [harness.Row(chosen=f"{start} a{i}", rejected=f"{start} b") for i, start in enumerate(starts)]
    texts = [harness.Row(text=f"t{i % 60}") for i in range(120)]
    for rows, module, number in (pairs, reward_model, 6), (dialogues, reward_model, 9), (texts, sft, 12):
        training, held_out = harness.hold_out(rows, 512, 0, module.prompt_of)
        assert len(held_out) == number and len(training) == len(rows) - number
        known = {json.dumps(module.prompt_of(row)) for row in training}
        assert not known & {json.dumps(module.prompt_of(row)) for row in held_out}
        assert "trained on too" not in capsys.readouterr().out
    same = [harness.Row(prompt="same", completion=f"c{i}") for i in range(50)]
    training, held_out = harness.hold_out(same, 512, 0, sft.prompt_of)
    assert len(held_out) == 5 and len(training) == 45
    assert "5 of 5 held-out rows have a prompt that is trained on too" in capsys.readouterr().out


# === Runs =========================================================================================
@pytest.fixture
def ppo_run(world, tmp_path, run_stage):
    """ppo_run(*flags) -> (status, out, err) of a short run in a copy of the world."""
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world" / "mine.py").write_text("def f(p, r, rows): return [len(x) for x in r]\n")
    flags = ppo_flags(tmp_path / "world", tmp_path / "out", "--iterations", 2)
    reward = ["--reward", tmp_path / "world" / "reward_model", f"{tmp_path / 'world'}/mine.py:f"]

    def run(*more):
        return run_stage(ppo, *flags, *reward, *more)

    return run


def flip_weights(path):
    weights = load_file(path)
    name = min(weights)
    save_file(weights | {name: weights[name].flip(0).contiguous()}, path, {"format": "pt"})


def test_a_resumed_run_notices_what_has_changed_under_its_name(ppo_run, tmp_path):
    assert ppo_run()[0] == 0
    for path in tmp_path.rglob("*"):
        os.utime(path)  # a time stamp is no content
    status, _, err = ppo_run("--resume", "--iterations", 3)
    assert status == 0, err
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    for name, flag in (
        ("sft/model.safetensors", "--policy"), ("reward_model/model.safetensors", "--reward"), ("mine.py", "--reward"),
        ("sft/tokenizer.json", "--policy"), ("prompts.jsonl", "--"),
    ):
        path = tmp_path / "world" / name
        kept = path.read_bytes()
        if path.suffix == ".safetensors":
            flip_weights(path)
        else:
            path.write_bytes(kept.replace(b"fox", b"dog").replace(b"len(x)", b"0 * len(x)"))
        refused(ppo_run("--resume", "--iterations", 4), "ppo", flag, "has changed since the run began")
        path.write_bytes(kept)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    assert ppo_run("--resume", "--iterations", 4)[0] == 0


def test_a_reader_that_goes_away_or_a_closed_output_ends_no_run(world, tmp_path):
    (tmp_path / "shut.py").write_text(
        "import multiprocessing, sys\ndef f(prompts, responses, rows):\n    sys.stdout.close()\n"
        "    pool = multiprocessing.get_context('fork').Pool(4)\n    lengths = pool.map(len, responses)\n"
        "    pool.close()\n    pool.join()\n    return lengths\n"  # so that each worker flushes at its end
    )
    data, runs = world / "sft.jsonl", {}
    for stage, ending, flags in (
        ("sft", ">&- 2>&-", ["--model", world / "sft", "--data", data, "--eval-data", data, "--batch-size", 8]),
        ("ppo", "2>&1 | head -1", ppo_flags(world, ".", "--judge", f"{tmp_path}/shut.py:f")),
    ):
        words = [sys.executable, ROOT / f"{stage}.py", *flags, "--output", tmp_path / stage]
        words = ["bash", "-c", f"{shlex.join(map(str, words))} {ending}; exit ${{PIPESTATUS[0]}}"]
        pipe = subprocess.PIPE
        runs[stage] = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True)
    for stage, run in runs.items():  # both at once
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, (stage, err)
        assert "Traceback" not in err and "Broken" not in err and "Exception" not in err, err
        assert json.loads((tmp_path / stage / "args.json").read_text())["finished"]


def test_numbers_that_are_not_finite_become_null_in_the_log(tmp_path):
    run = types.SimpleNamespace(folder=tmp_path)
    row = {"a": float("nan"), "b": float("inf"), "c": 1.5, "d": None, "e": "é"}
    harness.Run.append(run, "log", row)
    assert read_rows(tmp_path / "log") == [row | {"a": None, "b": None}]


def test_a_sampler_that_draws_from_another_distribution_ends_the_run_before_it_learns(ppo_run, tmp_path, monkeypatch):
    sample = common.sample_tokens

    def rolled(logits, temperature, uniform):
        return sample(logits.roll(1, -1), temperature, uniform)

    monkeypatch.setattr(common, "sample_tokens", rolled)
    status, _, err = ppo_run()
    assert status == 2 and "the sampler's log-probabilities are off by" in err
    assert [row["split"] for row in read_rows(tmp_path / "out" / "metrics.jsonl")] == ["eval"]
    monkeypatch.setattr(common, "sample_tokens", sample)
    assert ppo_run("--overwrite")[0] == 0
    gaps = [row["sampler_gap"] for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
    assert len(gaps) == 2 and all(0 <= gap < ppo.SAMPLER_GAP for gap in gaps)


# === Models =======================================================================================
@pytest.mark.parametrize("name, settings", [
    ("mixtral", {"router_jitter_noise": 0.5}), ("mixtral", {"output_router_logits": True}), ("opt", {"layerdrop": 0.5}),
    ("gpt2", {"resid_pdrop": 0.5}), ("phimoe", {}), ("llama_tied", {"return_dict": False}),  # the fifth is jittered
])
def test_what_a_config_makes_random_or_returns_is_put_right(name, settings, world, tmp_path):
    torch.manual_seed(0)
    config = zoo.FAMILIES[name][1](transformers)
    config.update(settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path)
    model = common.load_causal_lm(str(tmp_path), common.load_tokenizer(str(tmp_path)))
    common.to_device(model, torch.device("cpu"), "float32", gradient_checkpointing=True)
    tokens, mask = common.pad([[5, 6, 7], [8, 9]], 0, "left")
    first, second = (common.forward(model, tokens, mask).logits for _ in range(2))
    assert any(module.training for module in model.modules())
    assert torch.allclose(first[mask], second[mask], atol=1e-5)
    common.generate_responses(model, tokens, mask, 3, 1.0)


def test_a_model_that_draws_random_numbers_is_refused_whatever_they_are_called():
    def noise(module, inputs, output):
        output.logits = output.logits + 0.01 * torch.randn_like(output.logits)

    model = tiny_lm()
    model.register_forward_hook(noise)
    with pytest.raises(common.UserError, match="draws random numbers in its forward pass"):
        common.to_device(model, torch.device("cpu"), "float32")


def test_layers_that_the_config_drops_are_reported(world, tmp_path, capsys):
    shutil.copytree(world / "sft", tmp_path / "lm")
    path, words = str(tmp_path / "lm"), "has weights that its config has no place for"
    tokenizer = common.load_tokenizer(path)
    common.load_causal_lm(path, tokenizer)
    assert words not in capsys.readouterr().out
    config = transformers.AutoConfig.from_pretrained(path)
    config.num_hidden_layers -= 1
    config.save_pretrained(path)
    common.load_causal_lm(path, tokenizer)
    assert words in capsys.readouterr().out


# === What people see ==============================================================================
HEALTHY = {
    "approx_kl_first": 0.0, "kl": 0.0, "kl_k3": 0.0, "ratio_first": 1.0, "eos_rate": 1.0, "response_length": 20.0,
    "score_std": 1.0, "explained_variance": 0.5, "approx_kl": 0.06, "kl_target": 6.0, "skipped_steps": 0,
}


@pytest.mark.parametrize("number, changes, warned", [
    (12, {}, {}), (9, {"kl": 9.5}, {}), (10, {"kl": 9.5}, {"target": "--kl-target"}),
    (12, {"kl": 9.5, "kl_target": None}, {}), (1, {"approx_kl": 0.64}, {"overshoot": "--lr too high"}),
    (1, {"eos_rate": 0.4}, {"eos": "40%"}), (1, {"skipped_steps": 1}, {"gradient": "--lr too high"}),
])
def test_an_update_that_goes_too_far_and_a_target_that_is_missed_are_warned_of(number, changes, warned):
    seen = {}
    ppo.warn_if_unhealthy(types.SimpleNamespace(history=[HEALTHY | changes] * number, warn=seen.__setitem__))
    assert seen.keys() == warned.keys() and all(words in seen[name] for name, words in warned.items()), seen


@pytest.mark.parametrize("size, rate", [(0.3e6, 3e-4), (1e6, 5e-5), (5e8, 1e-5), (7e9, 3e-6)])
def test_the_learning_rate_falls_with_the_size_of_the_model(size, rate):
    model = torch.nn.Linear(int(size), 1, bias=False, device="meta")
    assert harness.lr_by_size(None, ppo.LR_BY_SIZE, model) == rate
    assert harness.lr_by_size(0.5, ppo.LR_BY_SIZE, model) == 0.5


def test_half_characters_are_shown_by_name_and_what_a_run_prints_fits_100_columns(world, tmp_path, ppo_run):
    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    ids = common.token_ids(tokenizer, "文")
    shown = [harness.token_text(tokenizer, id) for id in ids]
    assert len(ids) > 1 and "\ufffd" not in "".join(shown)
    assert harness.token_text(tokenizer, common.token_ids(tokenizer, " fox")[0]).startswith(" ")
    judge = f"{tmp_path / 'world'}/mine.py:f"
    status, out, err = ppo_run("--judge", judge, "--response-length", 60, "--explain")
    assert status == 0 and "python plot.py" in out and "log pi" in out, err
    for line in out.splitlines():  # paths are as long as they are, and a warning is one line
        is_long = line.startswith("warning") or str(tmp_path) in line
        assert len(line) <= 100 or is_long, line
