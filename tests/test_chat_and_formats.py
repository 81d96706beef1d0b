"""Chats through the template, every accepted data format, several files."""

import gzip
import json

import pytest
import torch
from conftest import DEMONSTRATIONS, PREFERENCES, read_rows, tiny_lm, tiny_scalar, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import common
import ppo
import reward_model
import sft
from data import tiny_model
from plumbing import rows as rows_
from plumbing import scorers

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# renders a chat as the plain text of Anthropic's format
HH = (
    "{% for m in messages %}{{ '\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}{{ m['content'] }}{% endfor %}"
    "{{ '\n\nAssistant:' if add_generation_prompt }}"
)
CHAT = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "A fox meets a cub."},
    {"role": "assistant", "content": "The fox helps the cub."}, {"role": "user", "content": "An owl?"},
    {"role": "assistant", "content": "The owl sings."},
]


def a_tokenizer(template=CHATML, eos="<|im_end|>"):
    texts = [text for row in DEMONSTRATIONS for text in row.values()]
    tokenizer = tiny_model.train_tokenizer(texts, vocab_size=310)
    tokenizer.add_special_tokens({"bos_token": "<|start|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    return tokenizer


@pytest.fixture(scope="module")
def chat_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    for name, tokenizer in (("lm", a_tokenizer()), ("hh", a_tokenizer(HH, "<|end|>"))):
        model = tiny_lm(vocab_size=len(tokenizer), max_position_embeddings=256)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_one_conversation_has_the_same_ids_in_all_three_stages_with_one_bos_and_one_eos(tmp_path):
    tokenizer, cfg = a_tokenizer(), sft.Config()
    eos_ids = [tokenizer.eos_token_id]
    prompt, response = CHAT[:-1], CHAT[-1:]
    text = (
        "<|start|><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nA fox meets a cub.<|im_end|>\n<|im_start|>assistant\n"
        "The fox helps the cub.<|im_end|>\n<|im_start|>user\nAn owl?<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]  # the oracle: the text by hand
    answer = tokenizer("The owl sings.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert expected.count(tokenizer.bos_token_id) == 1 and answer.count(tokenizer.eos_token_id) == 1

    paths = [write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt}])]
    (row,), _ = rows_.load_prompts(ppo.Config(prompts=paths, eval_prompts=paths), tokenizer)
    assert row.prompt_ids == expected and row == {"prompt": prompt}
    for row in ({"prompt": prompt, "completion": response}, {"prompt": prompt, "completion": "The owl sings."}):
        assert list(sft.encode_row(row, tokenizer, eos_ids, cfg)) == [(expected, answer)]
    assert list(sft.encode_row({"messages": CHAT}, tokenizer, eos_ids, cfg))[-1] == (expected, answer)
    other = [{"role": "assistant", "content": "Go away."}]
    pairs = (
        {"prompt": prompt, "chosen": response, "rejected": other}, {"chosen": CHAT, "rejected": prompt + other},
        {"prompt": "An owl?", "chosen": CHAT, "rejected": prompt + other}, {"prompt": prompt, "chosen": CHAT, "rejected": prompt + other},
        {"prompt": prompt, "chosen": "The owl sings.", "rejected": "Go away."},
    )
    rejected = expected + tokenizer("Go away.<|im_end|>", add_special_tokens=False)["input_ids"]
    for row in pairs:
        assert list(reward_model.encode_row(row, tokenizer, eos_ids, cfg)) == [(expected + answer, rejected)]


def test_each_turn_of_the_assistant_is_one_example_that_answers_the_chat_before_it():
    dialogues = sft.row_dialogues({"messages": CHAT})
    assert dialogues == [(CHAT[:2], CHAT[2:3]), (CHAT[:4], CHAT[4:5])]
    assert sft.row_dialogues({"prompt": CHAT[:3] + CHAT[3:4], "completion": CHAT[4:]}) == [(CHAT[:4], CHAT[4:5])]
    assert sft.row_dialogues({"messages": CHAT[2:]}) == [(CHAT[2:4], CHAT[4:5])]  # an opening answers nothing
    twice = CHAT[:3] + CHAT[2:3]  # the second of two answers in a row answers nothing
    assert sft.row_dialogues({"messages": twice}) == [(CHAT[:2], CHAT[2:3])]
    assert rows_.preference({"chosen": twice, "rejected": CHAT[:3] + CHAT[4:5]}) == (CHAT[:2], twice[2:], CHAT[2:3] + CHAT[4:5])
    for chat in (CHAT[:2], CHAT[2:3]):  # nobody answers; nothing is answered
        with pytest.raises(ValueError, match="without a message of the assistant"):
            sft.row_dialogues({"messages": chat})


def test_a_response_ends_at_any_eos_of_the_model_and_gets_one_where_the_template_writes_none():
    tokenizer = a_tokenizer(eos="<|end|>")
    end, im_end = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    _, known = common.encode(tokenizer, CHAT[:2], CHAT[2:3], [end, im_end])
    assert known[-1] == im_end and end not in known  # the line feed behind it is cut
    tokenizer = a_tokenizer(HH, "<|end|>")
    _, added = common.encode(tokenizer, CHAT[1:2], CHAT[2:3])
    assert added[-1] == end and added.count(end) == 1


def test_a_response_ends_where_the_policys_own_would_whatever_the_template_writes_behind_it():
    """Phi-3's template writes the end of the turn and then EOS; a model that lists both stops at the first."""
    phi = CHATML[: CHATML.index("{% if add")] + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
    tokenizer = a_tokenizer(phi, "<|end|>")
    end, im_end = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    _, ids = common.encode(tokenizer, CHAT[:2], CHAT[2:3], [end, im_end])
    assert ids[-1] == im_end and ids.count(im_end) == 1 and end not in ids
    _, several = common.encode(tokenizer, CHAT[:2], CHAT[2:], [end, im_end])  # the end of the last turn, not of the first
    assert tokenizer.decode(several).endswith("The owl sings.<|im_end|>") and several.count(im_end) == 3
    _, short = common.encode(tokenizer, CHAT[:2], CHAT[2:4] + [{"role": "assistant", "content": "A"}], [end, im_end])
    assert tokenizer.decode(short).endswith("assistant\nA<|im_end|>") and short.count(im_end) == 3
    tokenizer = a_tokenizer()
    for content in ("", " ", "user", "assistant\n"):  # no words, or words that the template writes too
        silent = [{"role": "assistant", "content": content}]
        expected = tokenizer(content.strip() + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert common.encode(tokenizer, CHAT[:2], silent)[1] == expected
        assert common.encode(tokenizer, CHAT[:2], CHAT[2:4] + silent)[1][-len(expected) :] == expected


@pytest.mark.parametrize("words", ["Write <|end|> to stop. More.", "<|end|>", "The end. <|end|>"])
def test_an_eos_within_the_words_of_a_response_cuts_nothing(words):
    tokenizer = a_tokenizer(HH, "<|end|>")
    _, ids = common.encode(tokenizer, CHAT[1:2], [{"role": "assistant", "content": words}])
    assert ids == tokenizer(f" {words}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    _, plain = common.encode(tokenizer, "a", " Done.<|end|>")
    assert plain.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("template, problem", [
    ("{{ raise_exception('roles must alternate') }}", "does not fit the chat template: roles must alternate"),
    ("{% if", "does not fit the chat template"),
    (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "opens a thought that the reply does not go on with"),
    (None, "has no chat template; write plain strings"),
])
def test_a_template_that_cannot_take_a_chat_is_named_with_file_and_line(tmp_path, template, problem):
    rows = rows_.read_rows([write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}])], [("messages",)])
    tokenizer = a_tokenizer(template)
    with pytest.raises(common.UserError, match="chats.jsonl line 1") as error:
        rows_.convert(rows, lambda row: sft.encode_row(row, tokenizer, [], sft.Config()), "demonstrations")
    assert problem in str(error.value)


@pytest.mark.parametrize("row, problem", [
    ({"prompt": CHAT[:3]}, "ends with the assistant's message"), ({"prompt": []}, "an empty list under 'prompt'"),
    ({"prompt": ["hello"]}, "whose items are not all"), ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "whose items are not all"),
])
def test_a_prompt_that_is_no_chat_to_answer_is_refused(tmp_path, row, problem):
    with pytest.raises(common.UserError, match="chats.jsonl line 1") as error:
        rows_.load_prompts(ppo.Config(prompts=[write_rows(tmp_path / "chats.jsonl", [row])]), a_tokenizer())
    assert problem in str(error.value)


@pytest.mark.parametrize("row, problem", [
    ({"chosen": "a", "rejected": CHAT}, "a string as one response and messages as the other"),
    ({"chosen": CHAT[:2], "rejected": CHAT}, "does not end with the assistant's message"),
    ({"chosen": CHAT[2:3], "rejected": CHAT[4:]}, "share no message which the assistant answers"),
    ({"chosen": CHAT[1:3], "rejected": CHAT[3:]}, "share no message which the assistant answers"),
    ({"prompt": "Another question.", "chosen": CHAT, "rejected": CHAT[:4] + CHAT[2:3]}, "a string as the prompt that is no message of the two chats"),
    ({"prompt": CHAT[:4], "chosen": CHAT, "rejected": CHAT[2:3]}, "the prompt within one of the two responses and not the other"),
])
def test_pairs_that_are_no_two_answers_to_one_prompt_are_refused(row, problem):
    with pytest.raises(ValueError, match=problem):
        rows_.preference(row)


@pytest.mark.parametrize("chosen, rejected, expected", [
    ("\n\nHuman: hi\n\nAssistant: I do", "\n\nHuman: hi\n\nAssistant: I don't", ("\n\nHuman: hi\n\nAssistant:", " I do", " I don't")),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
     ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", " e")),
    ("A fox. The fox helps", "A fox. The fox hides", ("A fox. The fox", " helps", " hides")),  # not within the word
    ("A fox. The", "A fox. The end", ("A fox.", " The", " The end")), ("one", "two", ("", "one", "two")), ("a  b", "a  c", ("a", "  b", "  c")),
    ("one two\na", "one two\nb", ("one two", "\na", "\nb")), ("", "a", ("", "", "a")),
])
def test_whole_texts_part_after_the_marker_or_before_the_word_that_differs(chosen, rejected, expected):
    assert rows_.split_texts(chosen, rejected) == expected
    assert expected[0] + expected[1] == chosen and expected[0] + expected[2] == rejected


def test_where_chats_differ_early_the_rest_holds_several_messages():
    chosen, rejected = CHAT, [*CHAT[:2], {"role": "assistant", "content": "Hm."}, *CHAT[3:]]
    assert rows_.preference({"chosen": chosen, "rejected": rejected}) == (CHAT[:2], chosen[2:], rejected[2:])
    ((good, bad),) = reward_model.encode_row({"chosen": chosen, "rejected": rejected}, a_tokenizer(), [], sft.Config())
    decode = a_tokenizer().decode
    assert decode(good).endswith("The owl sings.<|im_end|>") and "Hm.<|im_end|>\n<|im_start|>user\nAn owl?" in decode(bad)


QUESTIONS = [(f"Does the {a} see the {b}?", f"The {a} helps the {b}.", f"The {b} hides.") for a in ("fox", "owl", "bear") for b in ("cub", "lamb")]


def pairs_in(kind):
    """The same preference pairs in each accepted format, for the HH template."""
    rows = []
    for question, good, bad in QUESTIONS:
        text = f"\n\nHuman: {question}\n\nAssistant:"
        user, chosen, rejected = ([{"role": role, "content": content}] for role, content in (("user", question), ("assistant", good), ("assistant", bad)))
        rows.append({
            "plain": {"prompt": text, "chosen": f" {good}", "rejected": f" {bad}"},
            "whole texts": {"chosen": f"{text} {good}", "rejected": f"{text} {bad}"},
            "chat": {"prompt": user, "chosen": chosen, "rejected": rejected},
            "whole chats": {"chosen": user + chosen, "rejected": user + rejected},
            "prompt twice": {"prompt": question, "chosen": user + chosen, "rejected": user + rejected},
            "answers as strings": {"prompt": user, "chosen": good, "rejected": bad},
        }[kind])
    return rows


def test_a_preference_set_in_each_format_gives_the_same_reward_model_to_the_last_bit(chat_world, tmp_path, run_stage):
    weights = {}
    for kind in ("plain", "whole texts", "chat", "whole chats", "prompt twice", "answers as strings", "gzip", "two files"):
        rows = pairs_in("plain" if kind in ("gzip", "two files") else kind)
        files = [write_rows(tmp_path / "pairs.jsonl", rows)]
        if kind == "gzip":
            files = [tmp_path / "pairs.jsonl.gz"]
            files[0].write_bytes(gzip.compress((tmp_path / "pairs.jsonl").read_bytes()))
        elif kind == "two files":
            files = [write_rows(tmp_path / "first.jsonl", rows[:2]), write_rows(tmp_path / "second.jsonl", rows[2:])]
        flags = ["--model", chat_world / "hh", "--data", *files, "--eval-data", *files, "--batch-size", 2, "--device", "cpu"]
        status, out, err = run_stage(reward_model, *flags, "--output", tmp_path / "out", "--overwrite")
        assert status == 0 and f"{len(rows)} rows read, {len(rows)} examples used\n" in out, err
        weights[kind] = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(chat_world / "hh" / "model.safetensors")
    assert any(not torch.equal(before[key], weights["plain"][key]) for key in weights["plain"] if key in before)
    for kind, tensors in weights.items():
        assert all(torch.equal(tensors[key], weights["plain"][key]) for key in tensors), kind


def test_null_under_the_keys_of_another_format_is_as_good_as_no_key(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": None, "completion": None, "messages": CHAT, "id": None}, {"prompt": None, "chosen": "a b", "rejected": "a c"}])
    rows = rows_.read_rows([path], [("prompt", "completion"), ("messages",), ("prompt", "chosen", "rejected"), ("chosen", "rejected")])
    assert rows == [{"messages": CHAT, "id": None}, {"chosen": "a b", "rejected": "a c"}]
    assert len(sft.row_dialogues(rows[0])) == 2 and rows_.preference(rows[1]) == ("a", " b", " c")


def test_rows_that_are_dropped_are_counted_by_reason(tmp_path, capsys):
    tokenizer = a_tokenizer()
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3 + [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2
    rows += [{"prompt": "a" * 99, "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c" * 99}]
    cfg = reward_model.Config(max_prompt_length=20, response_length=30)
    rows = rows_.read_rows([write_rows(tmp_path / "pairs.jsonl", rows)], [("prompt", "chosen", "rejected")])
    pairs = rows_.convert(rows, lambda row: reward_model.encode_row(row, tokenizer, [], cfg), "preferences")
    assert len(pairs) == 3
    assert capsys.readouterr().out == (
        "  preferences: 7 rows read, 3 examples used; 2 dropped (chosen and rejected the same); 1 dropped (prompt above "
        "--max-prompt-length 20); 1 dropped (response above --response-length 30)\n"
    )
    with pytest.raises(common.UserError, match="7 rows read and none can be used; 5 dropped .* 2 dropped"):
        cfg = reward_model.Config(max_prompt_length=0)
        rows_.convert(rows, lambda row: reward_model.encode_row(row, tokenizer, [], cfg), "preferences")


def test_chats_go_through_all_three_stages_and_the_result_answers_a_chat(chat_world, tmp_path, run_stage):
    questions = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": q}] for q, *_ in QUESTIONS]
    answers = [[{"role": "assistant", "content": good}] for _, good, _ in QUESTIONS]
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": q + a} for q, a in zip(questions, answers)])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"chosen": q + a, "rejected": q + [{"role": "assistant", "content": "No."}]} for q, a in zip(questions, answers)])
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": q, "id": i} for i, q in enumerate(questions)])
    short = ["--device", "cpu", "--lr", "1e-2"]
    status, out, err = run_stage(sft, "--model", chat_world / "lm", "--data", chats, "--eval-data", chats, "--output", tmp_path / "sft", *short)
    assert status == 0 and "|\\n  =>  " in out and "|<|im_end|>\n" in out, err  # the row shown opens the turn, then ends it
    status, _, err = run_stage(reward_model, "--model", tmp_path / "sft", "--data", pairs, "--eval-data", pairs, "--output", tmp_path / "rm", *short)
    assert status == 0, err
    reward = tmp_path / "reward.py"
    reward.write_text("def last(prompts, responses, rows):\n    assert all(p == r['prompt'] and p[-1]['role'] == 'user' for p, r in zip(prompts, rows))\n    return [0.0] * len(rows)\n")
    flags = ["--policy", tmp_path / "sft", "--reward", tmp_path / "rm", f"{reward}:last", "--prompts", prompts, "--eval-prompts", prompts]
    flags += ["--output", tmp_path / "ppo", "--iterations", 1, "--batch-size", 6, "--minibatch-size", 3, "--response-length", 12]
    status, out, err = run_stage(ppo, *flags, *short)
    assert status == 0, err
    row = read_rows(tmp_path / "ppo" / "metrics.jsonl")[1]
    assert abs(row["kl"]) < 1e-5 and abs(row["ratio_first"] - 1) < 1e-6
    assert read_rows(tmp_path / "ppo" / "samples.jsonl")[0]["prompt"] == questions[0] and "\n  Does the fox see the cub?\n" in out

    code = out[out.index("    from transformers") :].replace("    ", "")  # the lines that ppo.py prints
    from transformers import pipeline  # noqa: F401

    printed = []
    exec(code, {"print": printed.append})
    (answer,) = printed[0]
    assert answer["generated_text"][-1]["role"] == "assistant" and answer["generated_text"][0] == questions[0][-1]
    assert set(AutoModelForCausalLM.from_pretrained(tmp_path / "ppo").generation_config.eos_token_id) == {a_tokenizer().eos_token_id}


@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_chats_without_a_template_stop_each_stage_and_name_the_plain_way(module, world, tmp_path, run_stage):
    write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT, "prompt": CHAT[:4], "chosen": CHAT[4:], "rejected": CHAT[2:3]}])
    data = ["--data", tmp_path / "chats.jsonl", "--eval-data", tmp_path / "chats.jsonl"]
    flags = {
        "sft": ["--model", world / "sft", *data], "reward_model": ["--model", world / "sft", *data],
        "ppo": ["--policy", world / "sft", "--reward", world / "reward_model", "--prompts", tmp_path / "chats.jsonl"],
    }[module.__name__]
    status, _, err = run_stage(module, *flags, "--output", tmp_path / "out")
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert "chats.jsonl line 1 holds messages, but the tokenizer of" in err and "has no chat template; write plain strings" in err
    assert not (tmp_path / "out").exists()


def test_demonstrations_from_scratch_need_plain_strings(tmp_path, run_stage):
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 10)
    status, _, err = run_stage(sft, "--data", data, "--output", tmp_path / "out")
    assert status == 2 and "has no chat template; write plain strings" in err


def test_a_reward_model_in_the_same_chat_template_is_read_token_by_token(tmp_path):
    tokenizer = a_tokenizer()
    tiny_scalar(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    policy = tiny_lm(vocab_size=len(tokenizer))
    load = lambda policy_tokenizer: scorers.load_scorer(str(tmp_path / "rm"), policy, policy_tokenizer, 8, trust_remote_code=False)
    ours, others = load(a_tokenizer()), load(a_tokenizer(HH))  # the same tokens, but another template
    assert isinstance(ours, scorers.TokenScorer) and ours.reads_tokens
    assert isinstance(others, scorers.TextScorer) and not others.reads_tokens


def test_the_example_of_a_format_in_an_error_is_valid_json(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for keys in (("messages",), ("prompt", "completion"), ("chosen", "rejected")):
        with pytest.raises(common.UserError) as error:
            rows_.read_rows([str(tmp_path / "empty.jsonl")], [keys])
        assert set(json.loads(str(error.value).split("a line is like ")[1])) == set(keys)
