"""Tiny models, a tiny tokenizer and a way to run a stage in this process, for all tests."""

import json
import pathlib
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import common  # noqa: E402
import harness  # noqa: E402
from data import tiny_model  # noqa: E402

torch.set_num_threads(1)  # the models are too small to share out


def tiny_config(vocab_size=12, **changes):
    """A Llama whose weights are large enough that its distributions are far from uniform."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    special = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.3)
    return LlamaConfig(vocab_size=vocab_size, **(sizes | special | changes))


def tiny_lm(seed=0, **changes):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [1], 0
    return model


def tiny_scalar(seed=0, **changes):
    torch.manual_seed(seed)
    config = tiny_config(num_labels=1, **changes)
    config.reward_mean, config.reward_std = 0.25, 2.0
    return LlamaForSequenceClassification(config).eval()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


DEMONSTRATIONS = [
    {"prompt": f"A {a} meets a {b}.", "completion": f" The {a} {verb} the {b}."}
    for a in ("fox", "owl", "bear") for b in ("cub", "lamb") for verb in ("helps", "hugs", "sees", "hears")
]
PREFERENCES = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " It rains. It rains again."}
    for row in DEMONSTRATIONS
]
PROMPTS = [{"prompt": row["prompt"]} for row in DEMONSTRATIONS]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Small data files, and an SFT policy and a reward model of random weights that fit them."""
    folder = tmp_path_factory.mktemp("world")
    texts = [text for row in DEMONSTRATIONS + PREFERENCES for text in row.values()]
    tokenizer = tiny_model.train_tokenizer(texts, vocab_size=320)
    policy = tiny_lm(vocab_size=len(tokenizer), max_position_embeddings=128)
    common.set_generation_defaults(policy, tokenizer)
    reward_model = tiny_scalar(vocab_size=len(tokenizer), max_position_embeddings=128)
    for name, model in (("sft", policy), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, rows in (("sft", DEMONSTRATIONS), ("pairs", PREFERENCES), ("prompts", PROMPTS)):
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def run_stage(monkeypatch, capsys):
    """run_stage(module, *flags) -> (exit status, stdout, stderr), as the command line would."""

    def run(module, *flags):
        groups = {}  # a flag given again replaces the earlier one, also where it takes several values
        for word in map(str, flags):
            if word.startswith("--"):
                name = word
                groups[name] = []
            groups[name].append(word)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *sum(groups.values(), [])])
        status = 0
        try:
            harness.run_stage(module.main, module.Config, module.__doc__.splitlines()[0])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
