"""Mutated data files and argument lists: an error in words, or fine; no traceback, no hang."""

import copy
import gzip
import json
import random
import time

import pytest
from conftest import DEMONSTRATIONS, PREFERENCES, PROMPTS
from test_chat_and_formats import CHAT, a_tokenizer

import common
import harness
import ppo
import reward_model
import sft

TOKENIZERS = [a_tokenizer()] * 4 + [a_tokenizer(None)]  # the last without a chat template
OPENING, ANSWER, OTHER = CHAT[:4], CHAT[4:], CHAT[2:3]
ROWS = {
    sft: [*DEMONSTRATIONS[:3], {"messages": CHAT}, {"prompt": OPENING, "completion": ANSWER}, {"text": "A fox."}],
    reward_model: PREFERENCES[:3] + [
        {"prompt": OPENING, "chosen": ANSWER, "rejected": OTHER}, {"chosen": CHAT, "rejected": OPENING + OTHER},
        {"chosen": "a b", "rejected": "a c"},
    ],
    ppo: PROMPTS[:3] + [{"prompt": OPENING, "answer": 7}],
}
NASTY = [
    None, True, -1, 10**400, 1.5, "", " ", "\0", "\ud800", "é" * 99, "x" * 10_000, [], {}, [[]], [None], [{}], CHAT,
    CHAT[::-1], {"role": "user"}, [{"role": "user", "content": ""}], [{"role": "user", "content": None}], "<|end|>",
    [{"role": "", "content": "a"}], [{"role": "assistant", "content": "a"}], "<|im_end|>" * 9, "\n\nAssistant:",
]
KEYS = ["prompt", "completion", "messages", "text", "chosen", "rejected", "prompt_ids", "path"]
BYTES = [b"\n", b"\r\n", b"\0", b"\xff\xfe", b"[" * 3000, b'"', b"}{", "\u2028".encode()]
WORDS = "- -- 0 -1 1 1.5 1e9 1e400 nan inf -inf True None \0 é ../x [1] {} auto cpu gae ckpt/sft x.py:f --seed -h"
WORDS = ["1"] * 20 + WORDS.split(" ") + ["", "9" * 30, "a b"]


def load(stage, path, tokenizer):
    """What the stage does with a data file, up to the model."""
    if stage is ppo:
        return ppo.load_prompts(ppo.Config(prompts=[path], eval_prompts=[path]), tokenizer)[0]
    cfg, rows = stage.Config(), harness.read_rows([path], stage.FORMATS)
    harness.report_overlap(rows, rows, stage.prompt_of)
    return harness.convert(rows, lambda row: stage.encode_row(row, tokenizer, [1], cfg))


def mutate(rng, rows):
    """The bytes of a data file after a few accidents."""
    rows = json.loads(json.dumps(rows))
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        row, value = rng.choice(rows), copy.deepcopy(rng.choice(NASTY))
        key, what = rng.choice(list(row) or ["text"]), rng.randrange(4)
        if what == 0:
            row.pop(key, None)
        elif what == 1 and isinstance(row.get(key), list) and row[key]:
            row[key][rng.randrange(len(row[key]))] = value
        else:
            row[rng.choice(KEYS) if what == 2 else key] = value
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for _ in range(rng.choice([0, 0, 1, 2])):
        i = rng.randrange(len(content) + 1)
        content = rng.choice([
            content[:i], content[:i] + bytes([rng.randrange(256)]) + content[i + 1 :],
            content[:i] + rng.choice(BYTES) + content[i:], rng.choice([b"\xef\xbb\xbf", b"[", b"#"]) + content,
            content.decode("utf-8", "ignore").encode(rng.choice(["utf-16", "latin-1"]), "ignore"),
            content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b""])),
        ])
    is_gzip = rng.random() < 0.15
    return gzip.compress(content)[: rng.choice([None, None, -9])] if is_gzip else content


@pytest.mark.parametrize("stage", ROWS)
def test_mutated_data_files_give_examples_or_one_message_that_names_the_file(stage, tmp_path):
    rng, refused, used = random.Random(stage.__name__), 0, 0
    for number in range(180):
        content = mutate(rng, ROWS[stage])
        is_gzip = content[:2] == gzip.compress(b"")[:2] or rng.random() < 0.03
        path = tmp_path / f"{number}.jsonl{'.gz' if is_gzip else ''}"
        path.write_bytes(content)
        began = time.monotonic()
        try:
            used += len(load(stage, str(path), rng.choice(TOKENIZERS))) > 0
        except common.UserError as error:
            refused += 1
            assert path.name in str(error), error
        assert time.monotonic() - began < 10, content[:200]
    assert refused > 30 and used > 30  # both happen


@pytest.mark.parametrize("word, rest", [("fox", " fox"), ("", " "), ("", "x")])
def test_a_line_of_ten_megabytes_is_read_in_seconds(tmp_path, word, rest):
    text = word + rest * (10_000_000 // len(rest))
    path, began = tmp_path / "long.jsonl", time.monotonic()
    path.write_text(json.dumps({"chosen": text + " a", "rejected": text + " b"}) + "\n")
    (row,) = harness.read_rows([str(path)], reward_model.FORMATS)
    common_part = "" if rest == " " else text
    pair = [text.removeprefix(common_part) + answer for answer in (" a", " b")]
    assert reward_model.preference(row) == (common_part, *pair)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("stage", ROWS)
def test_mutated_argument_lists_give_a_config_or_one_message(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng, refused, taken = random.Random(stage.__name__), 0, 0
    names = [harness.flag_of(name) for name in stage.Config.__dataclass_fields__]
    for _ in range(100):
        argv = []
        for name in rng.sample(names, rng.randint(1, 2)):
            name = rng.choice([name] * 9 + [name.replace("-", "_"), name[:-1], name + "x", name.upper()])
            words = rng.choices(WORDS, k=rng.choice([0, 1, 1, 2]))
            argv += [name, *words] if rng.random() < 0.8 else [f"{name}={rng.choice(WORDS)}"]
        try:
            cfg = harness.parse_args(stage.Config, "", argv)
            taken += 1
            if stage is ppo:
                ppo.check_config(cfg)
        except common.UserError as error:
            refused += 1
            assert str(error)
        except SystemExit as stop:
            assert stop.code == 0 and {"-h", "--help"} & set(argv)
    assert refused > 30 and taken > 5
    capsys.readouterr()
