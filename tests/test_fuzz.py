"""Mutated data files and argument lists, 540 and 300 of them: an error in words, or fine; no traceback, no hang."""

import gzip
import json
import random
import time

import pytest
from conftest import DEMONSTRATIONS, PREFERENCES, PROMPTS
from test_chat_and_formats import CHAT, a_tokenizer

import common
import ppo
import reward_model
import sft
from plumbing import cli
from plumbing import rows as rows_

TEMPLATED, PLAIN = a_tokenizer(), a_tokenizer(None)
CHATS = [{"messages": CHAT}, {"prompt": CHAT[:4], "completion": CHAT[4:]}, {"text": "A fox sees a cub."}]
PAIRS = [{"prompt": CHAT[:4], "chosen": CHAT[4:], "rejected": CHAT[2:3]}, {"chosen": CHAT, "rejected": CHAT[:4] + CHAT[2:3]}, {"chosen": "a b", "rejected": "a c"}]
ROWS = {"sft": DEMONSTRATIONS[:3] + CHATS, "reward_model": PREFERENCES[:3] + PAIRS, "ppo": PROMPTS[:3] + [{"prompt": CHAT[:4], "answer": 7}]}
NASTY = [
    None, True, -1, 10**400, 1.5, "", " ", "\0", "\ud800", "é" * 99, "x" * 10_000, [], {}, [[]], [None], [{}], {"role": "user"}, [{"role": "user", "content": ""}],
    [{"role": "", "content": "a"}], [{"role": "user", "content": None}], [{"role": "assistant", "content": "a"}], CHAT, CHAT[::-1], "<|end|>", "<|im_end|>" * 9, "\n\nAssistant:",
]


def load(stage, path, tokenizer):
    """What the stage does with a data file, up to the model."""
    if stage == "ppo":
        return rows_.load_prompts(ppo.Config(prompts=[path], eval_prompts=[path]), tokenizer)[0]
    module = {"sft": sft, "reward_model": reward_model}[stage]
    cfg = module.Config(data=[path], eval_data=[path])
    rows, _ = rows_.read_and_hold_out(cfg, module.FORMATS, most=512)
    return rows_.convert(rows, lambda row: module.encode_row(row, tokenizer, [1], cfg))


def mutate(rng, rows):
    """The bytes of a data file after one to three accidents."""
    rows = [json.loads(json.dumps(row)) for row in rows]
    for _ in range(rng.choice([0, 1, 1, 2])):
        row = rng.choice(rows)
        key = rng.choice(list(row) or ["text"])
        match rng.randrange(4):
            case 0: row[key] = rng.choice(NASTY)
            case 1: row.pop(key, None)
            case 2: row[rng.choice(["prompt", "completion", "messages", "text", "chosen", "rejected", "prompt_ids", "where"])] = rng.choice(NASTY)
            case 3:
                if isinstance(row.get(key), list) and row[key]:
                    row[key][rng.randrange(len(row[key]))] = rng.choice(NASTY)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for _ in range(rng.choice([0, 0, 1, 2])):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0: content = content[:at]
            case 1: content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
            case 2: content = content[:at] + rng.choice([b"\n", b"\r\n", b"\0", b"\xff\xfe", b"[" * 3000, b'"', b"}{", "\u2028".encode()]) + content[at:]
            case 3: content = content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b""]))
            case 4: content = rng.choice([b"\xef\xbb\xbf", "[".encode(), b"#"]) + content
            case 5: content = content.decode("utf-8", "ignore").encode(rng.choice(["utf-16", "utf-8", "latin-1"]), "ignore")
    return gzip.compress(content)[: rng.choice([None, None, -9])] if rng.random() < 0.15 else content


@pytest.mark.parametrize("stage", ROWS)
def test_mutated_data_files_give_examples_or_one_message_that_names_the_file(stage, tmp_path):
    rng, refused, took = random.Random(stage), 0, 0
    for number in range(180):
        content = mutate(rng, ROWS[stage])
        path = tmp_path / f"{number}.jsonl{'.gz' if content[:2] == gzip.compress(b'')[:2] or rng.random() < 0.03 else ''}"
        path.write_bytes(content)
        began = time.monotonic()
        try:
            examples = load(stage, str(path), rng.choice([TEMPLATED, TEMPLATED, TEMPLATED, PLAIN]))
            took += len(examples) > 0
        except common.UserError as error:
            refused += 1
            assert path.name in str(error), error
        assert time.monotonic() - began < 10, content[:200]
    assert refused > 30 and took > 30  # both happen


def test_a_line_of_ten_megabytes_is_read_in_seconds(tmp_path):
    for name, text in (("words", "fox" + " fox" * 2_500_000), ("spaces", " " * 10_000_000), ("word", "x" * 10_000_000)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"chosen": text + " a", "rejected": text + " b"}) + "\n")
        began = time.monotonic()
        (row,) = rows_.read_rows([str(path)], [("chosen", "rejected")])
        assert rows_.preference(row)[1:] == ((" a", " b") if name != "spaces" else (text + " a", text + " b"))
        assert time.monotonic() - began < 10


WORDS = ["1"] * 20 + ["", "-", "--", "0", "-1", "1", "1.5", "1e9", "1e400", "nan", "inf", "-inf", "9" * 30, "True", "None", "a b", "\0", "é", "../x", "[1]", "{}", "auto", "cpu", "gae", "ckpt/sft", "x.py:f", "--seed", "-h"]


@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_mutated_argument_lists_give_a_config_or_one_message(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng, refused, taken = random.Random(module.__name__), 0, 0
    names = ["--" + name.replace("_", "-") for name in module.Config.__dataclass_fields__]
    for _ in range(100):
        argv = []
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(names)
            name = rng.choice([name] * 9 + [name.replace("-", "_"), name[:-1], name + "x", name.upper()])
            argv += [f"{name}={rng.choice(WORDS)}"] if rng.random() < 0.2 else [name, *rng.choices(WORDS, k=rng.choice([0, 1, 1, 1, 2]))]
        try:
            getattr(module, "check_config", cli.check_ranges)(cli.parse_args(module.Config, "", argv))
            taken += 1
        except common.UserError as error:
            refused += 1
            assert str(error)
        except SystemExit as stop:
            assert stop.code == 0 and {"-h", "--help"} & set(argv)
    assert refused > 30 and taken > 5
    capsys.readouterr()
