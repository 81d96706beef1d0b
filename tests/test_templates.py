"""Chat templates of today's kinds: what is learned of a chat, and --chat-template-kwargs."""

import copy
import json

import pytest
from conftest import read_rows, tiny_lm, write_rows
from templates import KINDS, template
from test_cli import refused
from transformers import AutoTokenizer

import common
import ppo
import reward_model
import rewards
import sft
from data import tiny_model


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


# === What is learned ==============================================================================
ASK, MORE = {"role": "user", "content": "Ask"}, {"role": "user", "content": "More"}
OWL, CUB = assistant("Owl"), assistant("Cub")
THINKS, EMPTY = "<think>\nHm\n</think>\n\nOwl", "<think>\n\n</think>\n\n"
NO_SYSTEM, LOST = "no system role", "the assistant that the template drops"
DIFFERS = "does not continue"  # the chat with its reply, or a thought that the prompt opens


def chats_of(kind):
    """Chats whose last reply is learned: to a question, to a second one, to one after the system's words, with a
    thought in it, with a thought under the kind's key, and after an earlier thought.
    """
    thought = {KINDS[kind].get("key", "reasoning_content"): "Hm"}
    return [
        [ASK, OWL], [ASK, OWL, MORE, CUB], [{"role": "system", "content": "Sys"}, ASK, OWL], [ASK, assistant(THINKS)],
        [ASK, assistant("Owl", **thought)], [ASK, assistant(THINKS), MORE, CUB],
    ]


def learned(start, system, ask, close, end=None, mark="", lead="", earlier="", inline=None, key=LOST, kept=THINKS):
    """Returns (prompt, response) of each of these chats, or the words of the error, from texts written down by hand.

    start, ask: the parts of the prompt "Ask". system: what stands in place of start if the system speaks, or the whole
    prompt. mark: what ends every prompt besides. close, end: what follows an earlier and the last reply. lead, earlier:
    what precedes them. inline, key: the last reply with a thought. kept: what becomes of an earlier one.
    """
    end = close.strip() if end is None else end
    first, then = start + ask, close + ask.replace("Ask", "More") + mark
    replies = [lead + THINKS if inline is None else inline, key]
    with_system = system if "Ask" in system else system + ask
    return [
        (first + mark, lead + "Owl" + end),
        (first + earlier + "Owl" + then, lead + "Cub" + end),
        NO_SYSTEM if system == NO_SYSTEM else (with_system + mark, lead + "Owl" + end),
        *(text if text in (LOST, DIFFERS) else (first + mark, text + end) for text in replies),
        (first + earlier + kept + then, lead + "Cub" + end),
    ]


IM = dict(
    start="", system="<|im_start|>system\nSys<|im_end|>\n", close="<|im_end|>\n",
    ask="<|im_start|>user\nAsk<|im_end|>\n<|im_start|>assistant\n",
)
OPENED_FOR_IT = "Hm\n</think>\n\nOwl"
NO_THINKING = dict(kept="Owl", inline=DIFFERS, key=DIFFERS)
FINAL = "<|channel|>final<|message|>"
OSS = "<|start|>system<|message|>Reasoning: medium<|end|>"
GLM_THINKS = "\n<think>Hm</think>\nOwl"
TABLE = {
    "ChatML": learned(**IM),
    # A reply without a thought learns to write an empty one.
    "Qwen3": learned(**IM, lead=EMPTY, kept="Owl", inline=THINKS, key=THINKS),
    'Qwen3 {"enable_thinking": false}': learned(**IM, **NO_THINKING, mark=EMPTY),
    "Qwen3, thinking": learned(  # a thought is opened for the policy; without one it learns to close it
        **IM, mark="<think>\n", lead="\n</think>\n\n", kept="Owl", inline=OPENED_FOR_IT, key=OPENED_FOR_IT,
    ),
    "DeepSeek-R1": [DIFFERS] * 6,  # it opens a thought, and writes every reply without
    "DeepSeek-V3.1": learned(
        "<|bos|>", "<|bos|>Sys", "<|User|>Ask<|Assistant|></think>", "<|eos|>", inline=LOST, kept="Owl"
    ),
    'DeepSeek-V3.1 {"thinking": true}': [DIFFERS] * 6,
    "Gemma": learned(
        "<bos>", NO_SYSTEM, "<start_of_turn>user\nAsk<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"
    ),
    "Mistral": learned(  # only the end of the question opens the turn
        "<s>", "<s>[INST] Sys\n\nAsk[/INST]", "[INST] Ask[/INST]", "</s>", lead=" ", earlier=" "
    ),
    "Magistral": learned(
        "<s>", "<s>[SYSTEM_PROMPT]Sys[/SYSTEM_PROMPT]", "[INST]Ask[/INST]", "</s>",
        inline="[THINK]Hm[/THINK]Owl", kept="Owl",
    ),
    "Zephyr": learned("", "<|system|>\nSys</s>\n", "<|user|>\nAsk</s>\n<|assistant|>\n", "</s>\n"),
    "gpt-oss": learned(  # the policy chooses its channel
        OSS, f"{OSS}<|start|>developer<|message|>Sys<|end|>", "<|start|>user<|message|>Ask<|end|><|start|>assistant",
        "<|end|>", "<|return|>", lead=FINAL, earlier=FINAL,
        key=f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{FINAL}Owl",
    ),
    "GLM-4.5": learned(  # the template ends no turn, so an EOS is added
        "[gMASK]<sop>", "[gMASK]<sop><|system|>\nSys", "<|user|>\nAsk<|assistant|>", "", "<|endoftext|>",
        lead="\n<think></think>\n", kept="Owl", inline=GLM_THINKS, key=GLM_THINKS,
    ),
    "Nemotron": learned(
        "<s>", "<s><|system|>Sys<|eot|>", "<|user|>Ask<|eot|><|assistant|>", "<|eot|>", inline=LOST, kept="Owl",
    ),
    "Nemotron Nano": [DIFFERS] * 6,  # nothing closes the thought, or a second one is opened
    "Kimi": learned(
        "<|system|><|im_middle|>You are Kimi.<|im_end|>", "<|system|><|im_middle|>Sys<|im_end|>",
        "<|user|><|im_middle|>Ask<|im_end|><|assistant|><|im_middle|>", "<|im_end|>",
    ),
}


@pytest.fixture(scope="module")
def tokenizer_of():
    """tokenizer_of("Qwen3 {...}") -> a tokenizer with the kind's template, arguments and EOS."""
    base = tiny_model.train_tokenizer(["Ask Owl More Cub Sys Hm"], vocab_size=280)

    def make(name):
        kind, brace, rest = name.partition(" {")
        tokenizer = copy.deepcopy(base)
        tokenizer.add_special_tokens({"eos_token": KINDS[kind]["eos"]})
        tokenizer.chat_template = template(KINDS[kind])
        if brace:
            common.set_template_arguments(tokenizer, "{" + rest)
        return tokenizer

    return make


@pytest.mark.parametrize("name", TABLE)
def test_what_is_learned_is_what_the_table_says_and_all_stages_read_the_same(name, tokenizer_of, tmp_path):
    tokenizer, cfg = tokenizer_of(name), sft.Config()
    for chat, expected in zip(chats_of(name.partition(" {")[0]), TABLE[name], strict=True):
        other = [*chat[:-1], {**chat[-1], "content": f"{chat[-1]['content']} no"}]
        row, pair = {"prompt": chat[:-1], "completion": chat[-1:]}, {"chosen": chat, "rejected": other}
        if isinstance(expected, str):
            for encode_row, given in ((sft.encode_row, row), (reward_model.encode_row, pair)):
                with pytest.raises(ValueError, match=expected) as error:
                    list(encode_row(given, tokenizer, [], cfg))
                assert (expected == DIFFERS) == ("--chat-template-kwargs" in str(error.value))
            continue
        ((prompt, response),) = sft.encode_row(row, tokenizer, [], cfg)
        assert tuple(tokenizer.batch_decode([prompt, response], clean_up_tokenization_spaces=False)) == expected
        ((chosen, rejected),) = reward_model.encode_row(pair, tokenizer, [], cfg)
        assert chosen == prompt + response and rejected[: len(prompt)] == prompt
        path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": chat[:-1]}])
        (asked,), _ = ppo.load_prompts(ppo.Config(prompts=[path], eval_prompts=[path]), tokenizer)
        assert asked.prompt_ids == prompt


def test_what_a_policy_wrote_is_scored_whatever_the_template_drops_of_it(tokenizer_of):
    """Rows with such words are refused before a run; a response must not end it."""
    tokenizer = tokenizer_of("Nemotron")
    model = tiny_lm(vocab_size=len(tokenizer))
    model.config.reward_mean = 0.0
    ids = rewards.TextScorer("rm", model, tokenizer, 4).encode({"prompt": [ASK]}, "Hm</think>Owl")["input_ids"]
    assert tokenizer.decode(ids) == "<s><|user|>Ask<|eot|><|assistant|>Owl<|eot|>"


def test_of_several_turns_only_the_last_needs_its_thought(tokenizer_of):
    common.notes.clear()
    tokenizer = tokenizer_of("Qwen3")
    _, ids = common.encode(tokenizer, [ASK], [assistant(THINKS), MORE, assistant("<think>Hm</think>Cub")])
    turn = IM["ask"].replace("Ask", "More")
    assert tokenizer.decode(ids) == f"Owl<|im_end|>\n{turn}<think>\nHm\n</think>\n\nCub<|im_end|>"
    ((note, count),) = common.notes.items()
    assert "thoughts for example, that the template drops" in note and count == 1


@pytest.mark.parametrize("written, lost", [
    ("", "price"), ("{{ c.name }}", "goat"), ("{{ c.arguments }}", "price"), ("{{ c.name }} {{ c.arguments }}", None),
])
def test_calls_that_the_template_drops_are_lost_words_and_those_it_writes_are_the_reply(written, lost, tokenizer_of):
    tokenizer = tokenizer_of("ChatML")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for t in m.tool_calls or [] %}{% set c = t.function %}"
        f"{written}{{% endfor %}}<|im_end|>{{% endfor %}}"
    )
    for arguments in ({"item": "goat"}, '{"item": "goat"}'):
        call = {"type": "function", "function": {"name": "price", "arguments": arguments}}
        for content in ("", "I look."):
            reply = [assistant(content, tool_calls=[call])]
            common.notes.clear()
            if lost:
                with pytest.raises(ValueError, match=f"{LOST}.*: .*{lost}"):
                    common.encode(tokenizer, [ASK], reply)
            else:
                _, ids = common.encode(tokenizer, [ASK], reply)
                assert tokenizer.decode(ids) == f"{content}price {arguments}<|im_end|>"
                assert not common.notes  # it is not "empty"


def test_arguments_that_a_template_writes_as_json_are_not_lost():
    call = {"function": {"name": "run", "arguments": {"code": 'print("é")\n'}}}
    for text, lost in (('run {"code": "print(\\"é\\")\\n"}', False), ("run print", True)):
        assert bool(common.lost_words(text, assistant("", tool_calls=[call]))) == lost


@pytest.mark.parametrize("calls", ['[{"name": "f"}]', ["f"], [{"function": None}], {"name": "f"}])
def test_calls_that_are_no_list_of_objects_are_refused_with_their_place(calls, tokenizer_of):
    with pytest.raises(ValueError, match="has tool_calls that are no list of objects"):
        common.lost_words("x", assistant("x", tool_calls=calls))


# === --chat-template-kwargs =======================================================================
VALUES = [
    True, False, None, 0, -7, 2**70, 1.5, -1e-7, 1e22, "", "high", "it's \"so\"", "#} {% x %} {# {{ y }} #}\n",
    "a\\n\\x23#\t\r\n\x00\u2028", "caf\xe9 \u9f99 \U0001f989", [], [1, [None, "#"]], {}, {"a": {"#'": [False]}},
]
BODY = (
    "{% macro told() %}<{{ x }}>{% endmacro %}{{ told() }}{% for m in messages %}{{ x | tojson }}"
    "{% if x is defined and x %}!{% endif %}{% endfor %}\n\n{{ x }}\n"
)
BEGINNINGS = [
    "", "\n\n", "  ", "{%- set y = 1 %}\n", "{%- if true %}b{% endif %}\n ", "{#- c -#}\n", "\n{{- 'd' }}",
    "{% if x is not defined %}{% set x = 'own' %}{% endif %}\n", "{%- set z = x | default('own') -%}  {{ z }}",
    "{% generation %}f{% endgeneration %}",
]


def rendered(tokenizer, **arguments):
    return tokenizer.apply_chat_template([ASK, OWL], tokenize=False, **arguments)


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_arguments_written_into_a_template_hold_as_if_passed_and_may_still_be_passed(beginning, tokenizer_of, tmp_path):
    bare = tokenizer_of("ChatML")
    bare.chat_template = beginning + BODY
    for value in VALUES:
        told = copy.deepcopy(bare)
        common.set_template_arguments(told, json.dumps({"x": "replaced"}))
        common.set_template_arguments(told, json.dumps({"x": value}))
        assert rendered(told) == rendered(bare, x=value)
        assert rendered(told, x="passed") == rendered(bare, x="passed")
        told.save_pretrained(tmp_path / "told")
        assert rendered(AutoTokenizer.from_pretrained(tmp_path / "told")) == rendered(bare, x=value)


@pytest.mark.parametrize("arguments, problem", [
    *((text, "is no JSON object") for text in ('{"enable_thinking": false', "", "[1]", "null", '"high"')),
    ('{"enable_thinkin": false}', "does not read 'enable_thinkin'"),
    ('{"enable_thinking": true, "a b": 1}', "does not read 'a b'"), ('{"": 1}', "does not read ''"),
])
def test_arguments_that_the_template_does_not_read_are_refused(arguments, problem, tokenizer_of):
    tokenizer = tokenizer_of("Qwen3")
    before = tokenizer.chat_template
    with pytest.raises(common.UserError, match=problem):
        common.set_template_arguments(tokenizer, arguments)
    assert tokenizer.chat_template == before
    tokenizer.chat_template = None
    with pytest.raises(common.UserError, match="is no JSON object|does not read"):
        common.set_template_arguments(tokenizer, arguments)


def test_of_several_templates_each_gets_the_arguments(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("ChatML")
    tokenizer.chat_template = {"default": "D{{ x }}{{ y }}", "tool_use": "T{{ x }}"}
    common.set_template_arguments(tokenizer, '{"x": "1"}')
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert rendered(loaded, y=2) == "D12"
    assert common.render_chat(loaded, [ASK], tools=[{"type": "function"}]) == "T1"


def test_a_template_that_writes_todays_date_is_warned_of(tokenizer_of, tmp_path, capsys):
    tokenizer = tokenizer_of("ChatML")
    for date in ("", "{{ strftime_now('%Y') }}"):
        tokenizer.chat_template = date + template(KINDS["ChatML"])
        tokenizer.save_pretrained(tmp_path)
        common.load_tokenizer(str(tmp_path))
        assert ("today's date" in capsys.readouterr().out) == bool(date)


# === From the first stage to the last =============================================================
def test_what_the_first_stage_is_told_holds_to_the_last_which_resumes(tokenizer_of, tmp_path, run_stage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, forward = tokenizer_of("gpt-oss"), common.forward
    read = {}  # {the model's class: the ids of the rows that a stage gives to it}
    model = tiny_lm(vocab_size=len(tokenizer), max_position_embeddings=512)
    common.set_generation_defaults(model, tokenizer)
    model.save_pretrained("hub")
    tokenizer.save_pretrained("hub")
    reply, no = assistant("Owl", thinking="Hm"), assistant("Owl no", thinking="Hm")
    rows = {
        "sft": {"messages": [ASK, reply]}, "prompts": {"prompt": [ASK]},
        "pairs": {"prompt": [ASK], "chosen": [reply], "rejected": [no]},
    }
    for file, row in rows.items():
        write_rows(tmp_path / f"{file}.jsonl", [row] * 16)
    prompt, response = TABLE["gpt-oss"][4]
    prompt = prompt.replace("medium", "high")
    texts = [prompt, prompt + response, prompt + response.replace("Owl", "Owl no")]
    asked, chosen, rejected = map(tuple, tokenizer(texts, add_special_tokens=False)["input_ids"])

    def spied(model, tokens, attention_mask, **options):
        ids = {tuple(row[mask].tolist()) for row, mask in zip(tokens, attention_mask)}
        read.setdefault(type(model).__name__, set()).update(ids)
        return forward(model, tokens, attention_mask, **options)

    monkeypatch.setattr(common, "forward", spied)
    monkeypatch.setattr(common, "check_model", repr)  # it reads other tokens
    options = ["--device", "cpu", "--batch-size", 4, "--max-prompt-length", 256]
    told = ["--chat-template-kwargs", '{"reasoning_effort": "high"}']
    for stage, expected, flags, more in (
        (sft, {"LlamaForCausalLM": {chosen}}, "--model hub --data sft.jsonl --epochs 1 --output sft", options + told),
        (reward_model, {"LlamaModel": {chosen, rejected}}, "--model sft --data pairs.jsonl --output rm", options),
        (ppo, None, "--policy sft --reward rm --prompts prompts.jsonl --iterations 1 --minibatch-size 4 "
         "--response-length 6 --output ppo", options),
        (ppo, None, "--resume --iterations 2 --output ppo", []),
    ):
        read.clear()
        status, out, err = run_stage(stage, *flags.split(), *more)
        assert status == 0 and expected in (None, read), err
    assert read.keys() == {"LlamaForCausalLM", "LlamaModel"}
    for ids in read["LlamaForCausalLM"]:  # without the last token, which predicts nothing
        assert ids[: len(asked)] == asked and any(ids == whole[: len(ids)] for whole in read["LlamaModel"])
    first = read_rows("ppo/metrics.jsonl")[1]
    assert abs(first["kl"]) < 1e-5 and abs(first["ratio_first"] - 1) < 1e-6
    printed = []  # the lines that ppo.py prints answer a chat
    exec(out[out.index("    from transformers") :].replace("    ", ""), {"print": printed.append})
    ((answer,),) = printed
    assert answer["generated_text"][0] == ASK and answer["generated_text"][1]["role"] == "assistant"
    result = AutoTokenizer.from_pretrained("ppo")  # pipelines and servers have the argument, too
    assert result.chat_template == AutoTokenizer.from_pretrained("sft").chat_template
    assert result.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True) == prompt


def test_each_stage_ends_with_one_line_where_the_template_does_not_read_an_argument(world, tmp_path, run_stage):
    given = ["--output", tmp_path / "out", "--chat-template-kwargs", '{"thinking": false}']
    for stage, *flags in ((sft, "--model", world / "sft"), (reward_model, "--model", world / "sft"),
                          (ppo, "--policy", world / "sft", "--prompts", world / "prompts.jsonl"), (sft,)):
        words = "does not read 'thinking'" if flags else "--chat-template-kwargs"  # a new model has no template
        refused(run_stage(stage, *flags, *given), stage.__name__, "--chat-template-kwargs", words)
