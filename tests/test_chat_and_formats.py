"""Chats through the template, every accepted data format, several files."""

import gzip
import json
import re

import pytest
from conftest import DEMONSTRATIONS, write_rows
from test_cli import refused

import common
import harness
import ppo
import reward_model
import sft
from data import tiny_model

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HH = (  # renders a chat as the plain text of Anthropic's format
    "{% for m in messages %}{{ '\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}"
    "{{ m['content'] }}{% endfor %}{{ '\n\nAssistant:' if add_generation_prompt }}"
)


def message(role, content):
    return {"role": role, "content": content}


CHAT = [
    message("system", "Be kind."), message("user", "A fox meets a cub."),
    message("assistant", "The fox helps the cub."), message("user", "An owl?"), message("assistant", "The owl sings."),
]
GO_AWAY = [message("assistant", "Go away.")]


def a_tokenizer(template=CHATML, eos="<|im_end|>"):
    texts = [text for row in DEMONSTRATIONS for text in row.values()]
    tokenizer = tiny_model.train_tokenizer(texts, vocab_size=310)
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"bos_token": "<|start|>", "additional_special_tokens": marks})
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    return tokenizer


# === Ids ==========================================================================================
def test_one_conversation_has_the_same_ids_in_all_stages_with_one_bos_and_one_eos(tmp_path):
    tokenizer, cfg, eos_ids = a_tokenizer(), sft.Config(), []
    prompt, response = CHAT[:-1], CHAT[-1:]
    text = (
        "<|start|><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nA fox meets a cub.<|im_end|>\n<|im_start|>"
        "assistant\nThe fox helps the cub.<|im_end|>\n<|im_start|>user\nAn owl?<|im_end|>\n<|im_start|>assistant\n"
    )
    expected, answer, refusal = tokenizer(
        [text, "The owl sings.<|im_end|>", "Go away.<|im_end|>"], add_special_tokens=False
    )["input_ids"]  # the oracle: the text by hand
    paths = [write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt}])]
    (row,), _ = ppo.load_prompts(ppo.Config(prompts=paths, eval_prompts=paths), tokenizer)
    assert row.prompt_ids == expected and row == {"prompt": prompt}
    for row in ({"messages": CHAT}, *({"prompt": prompt, "completion": x} for x in (response, "The owl sings."))):
        assert list(sft.encode_row(row, tokenizer, eos_ids, cfg))[-1] == (expected, answer)
    for row in (
        {"prompt": prompt, "chosen": response, "rejected": GO_AWAY},
        {"chosen": CHAT, "rejected": prompt + GO_AWAY},
        {"prompt": "An owl?", "chosen": CHAT, "rejected": prompt + GO_AWAY},
        {"prompt": prompt, "chosen": CHAT, "rejected": prompt + GO_AWAY},
        {"prompt": prompt, "chosen": "The owl sings.", "rejected": "Go away."},
    ):
        pairs = list(reward_model.encode_row(row, tokenizer, eos_ids, cfg))
        assert pairs == [(expected + answer, expected + refusal)]


def test_a_response_ends_where_the_policys_own_would_whatever_the_template_writes_after_it():
    """Phi-3's template ends the turn, then the text; a model that lists both stops at the first."""
    tokenizer = a_tokenizer(CHATML + "{% if not add_generation_prompt %}<|end|>{% endif %}", "<|end|>")
    ends, turn = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"]), "The fox helps the cub.<|im_end|>"
    later = "\n<|im_start|>user\nAn owl?<|im_end|>\n<|im_start|>assistant\nThe owl sings.<|im_end|>"
    for reply, text in ((CHAT[2:3], turn), (CHAT[2:], turn + later)):
        _, ids = common.encode(tokenizer, CHAT[:2], reply, ends)
        assert tokenizer.decode(ids) == text
    tokenizer = a_tokenizer()
    for content in ("", " ", "user", "assistant\n"):  # no words, or words that the template writes
        silent = [message("assistant", content)]
        _, ids = common.encode(tokenizer, CHAT[:2], silent)
        assert tokenizer.decode(ids) == content.strip() + "<|im_end|>"
        _, several = common.encode(tokenizer, CHAT[:2], CHAT[2:4] + silent)
        assert several[-len(ids) :] == ids
    tokenizer = a_tokenizer(HH, "<|end|>")  # the template writes no EOS, and words may hold one
    for words in ("Hi.", "Write <|end|> to stop. More.", "The end.<|end|>"):
        _, ids = common.encode(tokenizer, CHAT[1:2], [message("assistant", words)])
        assert tokenizer.decode(ids) == f" {words.removesuffix('<|end|>')}<|end|>"


def test_each_turn_of_the_assistant_is_one_example_that_answers_the_chat_before_it():
    both = [(CHAT[:2], CHAT[2:3]), (CHAT[:4], CHAT[4:5])]
    assert sft.row_dialogues({"messages": CHAT}) == both
    assert sft.row_dialogues({"prompt": CHAT[:4], "completion": CHAT[4:]}) == both[1:]
    assert sft.row_dialogues({"messages": CHAT[2:]}) == [(CHAT[2:4], CHAT[4:5])]  # an opening answers nothing
    twice = CHAT[:3] + CHAT[2:3]  # the second of two answers in a row answers nothing
    assert sft.row_dialogues({"messages": twice}) == both[:1]
    pair = reward_model.preference({"chosen": twice, "rejected": CHAT[:3] + CHAT[4:5]})
    assert pair == (CHAT[:2], twice[2:], CHAT[2:3] + CHAT[4:5])
    hm = [*CHAT[:2], message("assistant", "Hm."), *CHAT[3:]]  # they differ early
    pair = reward_model.preference({"chosen": CHAT, "rejected": hm})
    assert pair == (CHAT[:2], CHAT[2:], hm[2:])
    for chat in (CHAT[:2], CHAT[2:3]):  # nobody answers; nothing is answered
        with pytest.raises(ValueError, match="in which the assistant answers nothing"):
            sft.row_dialogues({"messages": chat})


# === Refused ======================================================================================
@pytest.mark.parametrize("template, problem", [
    ("{{ raise_exception('roles must alternate') }}", "does not fit the chat template: roles must"),
    ("{% if", "does not fit the chat template"), (None, "has no chat template; write strings"),
])
def test_a_template_that_fails_on_a_chat_is_named_with_file_and_line(tmp_path, template, problem):
    paths = [write_rows(tmp_path / "chats.jsonl", [{"prompt": CHAT[:4]}])]
    with pytest.raises(common.UserError, match=f"chats.jsonl line 1 .*{problem}"):
        ppo.load_prompts(ppo.Config(prompts=paths, eval_prompts=paths), a_tokenizer(template))


def test_prompts_and_pairs_that_are_no_chat_to_answer_are_refused(tmp_path):
    for prompt in (CHAT[:3], [], ["hello"], [message("user", [{"type": "text"}])]):
        problem = "ends with the assistant's message" if prompt == CHAT[:3] else "needs a string or messages"
        path = write_rows(tmp_path / "chats.jsonl", [{"prompt": prompt}])
        with pytest.raises(common.UserError, match=f"chats.jsonl line 1 .*{problem}"):
            ppo.load_prompts(ppo.Config(prompts=[path], eval_prompts=[path]), a_tokenizer())
    for prompt, chosen, rejected, problem in (
        (None, "a", CHAT, "a string as one response and messages as the other"),
        (None, CHAT[:2], CHAT, "does not end with the assistant's message"),
        (None, CHAT[2:3], CHAT[4:], "without a common message"),
        (None, CHAT[1:3], CHAT[3:], "without a common message"),
        ("Another question.", CHAT, CHAT[:4] + CHAT[2:3], "a string as the prompt that is no message of the two chats"),
        (CHAT[:4], CHAT, CHAT[2:3], "the prompt within one of the two responses and not the other"),
    ):
        with pytest.raises(ValueError, match=problem):
            reward_model.preference({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def test_chats_without_a_template_stop_each_stage_with_one_line(world, tmp_path, run_stage):
    row = {"messages": CHAT, "prompt": CHAT[:4], "chosen": CHAT[4:], "rejected": CHAT[2:3]}
    chats = write_rows(tmp_path / "chats.jsonl", [row] * 10)
    data = ["--data", chats, "--eval-data", chats]
    for module, *flags in (
        (sft, *data), (sft, *data, "--model", world / "sft"),  # from scratch, too
        (reward_model, *data, "--model", world / "sft"),
        (ppo, "--policy", world / "sft", "--reward", world / "reward_model", "--prompts", chats),
    ):
        result = run_stage(module, *flags, "--output", tmp_path / "out")
        refused(result, module.__name__, "chats.jsonl line 1 holds messages", "write strings")
        assert not (tmp_path / "out").exists()


# === Formats ======================================================================================
@pytest.mark.parametrize("chosen, rejected, expected", [
    ("\n\nHuman: hi\n\nAssistant: I do", "\n\nHuman: hi\n\nAssistant: I don't",
     ("\n\nHuman: hi\n\nAssistant:", " I do", " I don't")),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
     "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
     ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", " e")),
    # without the marker, before the word that differs and not within it
    ("A fox. The fox helps", "A fox. The fox hides", ("A fox. The fox", " helps", " hides")),
    ("A fox. The", "A fox. The end", ("A fox.", " The", " The end")),
    ("one", "two", ("", "one", "two")), ("a  b", "a  c", ("a", "  b", "  c")),
    ("one two\na", "one two\nb", ("one two", "\na", "\nb")), ("", "a", ("", "", "a")),
])
def test_texts_part_after_the_marker_or_before_the_word_that_differs(chosen, rejected, expected):
    assert reward_model.split_texts(chosen, rejected) == expected


def test_a_preference_set_in_each_format_gives_the_same_examples(tmp_path, capsys):
    tokenizer, cfg = a_tokenizer(HH, "<|end|>"), reward_model.Config()
    sets, expected = {}, []
    for animal in ("fox", "owl", "bear", "cub", "lamb", "hen"):
        question, good, bad = f"Does the {animal} see?", f"The {animal} helps.", f"{animal} hides."
        text, user = f"\n\nHuman: {question}\n\nAssistant:", [message("user", question)]
        chosen, rejected = ([message("assistant", words)] for words in (good, bad))
        expected.append(tuple(tokenizer([f"{text} {good}<|end|>", f"{text} {bad}<|end|>"])["input_ids"]))
        for kind, prompt, one, other in (
            ("plain", text, f" {good}", f" {bad}"), ("whole texts", None, f"{text} {good}", f"{text} {bad}"),
            ("chat", user, chosen, rejected), ("answers as strings", user, good, bad),
            ("whole chats", None, user + chosen, user + rejected),
            ("prompt twice", question, user + chosen, user + rejected),
        ):
            row = {"prompt": prompt, "chosen": one, "rejected": other, "messages": None}
            sets.setdefault(kind, []).append(row)
    files = {kind: [write_rows(tmp_path / f"{kind}.jsonl", rows)] for kind, rows in sets.items()}
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress((tmp_path / "plain.jsonl").read_bytes()))
    files["gzip"] = [str(tmp_path / "pairs.jsonl.gz")]
    first = write_rows(tmp_path / "first.jsonl", sets["plain"][:2])
    files["two files"] = [first, write_rows(tmp_path / "second.jsonl", sets["chat"][2:])]

    def encode(row):
        return reward_model.encode_row(row, tokenizer, [], cfg)

    for kind, paths in files.items():
        assert harness.convert(harness.read_rows(paths, reward_model.FORMATS), encode) == expected, kind
        assert "6 rows read, 6 examples used" in capsys.readouterr().out


def test_rows_that_are_dropped_are_counted_by_reason(tmp_path, capsys):
    tokenizer, rows = a_tokenizer(), []
    for prompt, rejected, number in (("a", "c", 3), ("a", "b", 2), ("a" * 99, "c", 1), ("a", "c" * 99, 1)):
        rows += [{"prompt": prompt, "chosen": "b", "rejected": rejected}] * number
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    rows = harness.read_rows([path], reward_model.FORMATS)

    def encode(row):
        return reward_model.encode_row(row, tokenizer, [], cfg)

    cfg = reward_model.Config(max_prompt_length=20, response_length=30)
    assert len(harness.convert(rows, encode)) == 3
    assert capsys.readouterr().out == (
        f"  {path}: 7 rows read, 3 examples used; 2 dropped (chosen and rejected the same); "
        "1 dropped (prompt above --max-prompt-length 20); 1 dropped (response above --response-length 30)\n"
    )
    cfg = reward_model.Config(response_length=1)
    with pytest.raises(common.UserError, match="7 rows read and none can be used; .* 2 dropped"):
        harness.convert(rows, encode)


def test_the_example_of_a_format_in_an_error_is_valid_json(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for keys in (("messages",), ("prompt", "completion"), ("chosen", "rejected")):
        with pytest.raises(common.UserError) as error:
            harness.read_rows([str(tmp_path / "empty.jsonl")], [keys])
        example = json.loads(re.search(r"write lines like (.*)", str(error.value))[1])
        assert set(example) == set(keys)
