"""Chat templates of today's kinds: what is learned of a chat, and --chat-template-kwargs."""

import copy
import json

import pytest
from conftest import read_rows, tiny_lm, write_rows
from templates import KINDS, template
from transformers import AutoTokenizer

import common
import ppo
import reward_model
import rewards
import sft
from data import tiny_model


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


# === What is learned ==============================================================================
ASK, OWL, MORE, CUB = user("Ask"), assistant("Owl"), user("More"), assistant("Cub")
THINKS, EMPTY = "<think>\nHm\n</think>\n\nOwl", "<think>\n\n</think>\n\n"
NO_SYSTEM, LOST = "no system role", "the assistant that the template drops"
DIFFERS = "does not continue"  # the chat with its reply, or a thought that the prompt opens


def chats_of(kind):
    """Chats whose last reply is learned: to a question, to a second one, to one after the system's
    words, with a thought in it, with a thought under the kind's key, and after an earlier thought.
    """
    thought = {KINDS[kind].get("key", "reasoning_content"): "Hm"}
    system = {"role": "system", "content": "Sys"}
    return [
        [ASK, OWL], [ASK, OWL, MORE, CUB], [system, ASK, OWL], [ASK, assistant(THINKS)],
        [ASK, assistant("Owl", **thought)], [ASK, assistant(THINKS), MORE, CUB],
    ]


def learned(
    start, system, ask, close, end=None, mark="", lead="", earlier="",
    inline=None, key=LOST, kept=THINKS,
):
    """Returns the (prompt, response) of each of these chats, or the words of the error, from texts
    that are written down by hand.

    start, ask: the parts of the prompt "Ask". system: what stands in place of start if the system
    speaks, or the whole prompt. mark: what ends every prompt besides. close, end: what follows an
    earlier and the last reply. lead, earlier: what precedes them. inline, key: the last reply with
    a thought. kept: what becomes of an earlier one.
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
SMOL = "<|im_start|>system\nMode: /{}\n<|im_end|>\n"
OPENED_FOR_IT = "Hm\n</think>\n\nOwl"
NO_THINKING = dict(kept="Owl", inline=DIFFERS, key=DIFFERS)
GEMMA = "<start_of_turn>user\n{}Ask<end_of_turn>\n<start_of_turn>model\n"
FINAL = "<|channel|>final<|message|>"
OSS = dict(
    ask="<|start|>user<|message|>Ask<|end|><|start|>assistant", close="<|end|>", end="<|return|>",
    lead=FINAL, earlier=FINAL,
    key=f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{FINAL}Owl",
)
GLM_THINKS = "\n<think>Hm</think>\nOwl"
TABLE = {
    "ChatML": learned(**IM),
    "Qwen2.5": learned(**IM | dict(start="<|im_start|>system\nYou are Qwen.<|im_end|>\n")),
    # A reply without a thought learns to write an empty one.
    "Qwen3": learned(**IM, lead=EMPTY, kept="Owl", inline=THINKS, key=THINKS),
    'Qwen3 {"enable_thinking": false}': learned(**IM, **NO_THINKING, mark=EMPTY),
    # A thought is opened for the policy; without one it learns to close it.
    "Qwen3, thinking": learned(
        **IM, mark="<think>\n", lead="\n</think>\n\n", kept="Owl",
        inline=OPENED_FOR_IT, key=OPENED_FOR_IT,
    ),
    "DeepSeek-R1": [DIFFERS] * 6,  # it opens a thought, and writes every reply without
    "DeepSeek-V3.1": learned(
        "<|bos|>", "<|bos|>Sys", "<|User|>Ask<|Assistant|></think>", "<|eos|>",
        inline=LOST, kept="Owl",
    ),
    'DeepSeek-V3.1 {"thinking": true}': [DIFFERS] * 6,
    "Llama 3": learned(
        "<|begin_of_text|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSys<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nAsk<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
    ),
    "Gemma": learned("<bos>", NO_SYSTEM, GEMMA.format(""), "<end_of_turn>\n"),
    "Gemma 3": learned(
        "<bos>", "<bos>" + GEMMA.format("Sys\n\n"), GEMMA.format(""), "<end_of_turn>\n"
    ),
    "Mistral": learned(  # only the end of the question opens the turn
        "<s>", "<s>[INST] Sys\n\nAsk[/INST]", "[INST] Ask[/INST]", "</s>", lead=" ", earlier=" "
    ),
    "Magistral": learned(
        "<s>", "<s>[SYSTEM_PROMPT]Sys[/SYSTEM_PROMPT]", "[INST]Ask[/INST]", "</s>",
        inline="[THINK]Hm[/THINK]Owl", kept="Owl",
    ),
    "Phi": learned(  # a policy that has <|end|> among its EOS ids stops there
        "", "<|system|>\nSys<|end|>\n", "<|user|>\nAsk<|end|>\n<|assistant|>\n", "<|end|>\n",
        end="<|end|>\n<|endoftext|>",
    ),
    "Zephyr": learned("", "<|system|>\nSys</s>\n", "<|user|>\nAsk</s>\n<|assistant|>\n", "</s>\n"),
    "gpt-oss": learned(  # the policy chooses its channel
        "<|start|>system<|message|>Reasoning: medium<|end|>", "<|start|>system<|message|>"
        "Reasoning: medium<|end|><|start|>developer<|message|>Sys<|end|>", **OSS,
    ),
    "Granite": learned(
        "", "<|start_of_role|>system<|end_of_role|>Sys<|end_of_text|>\n",
        "<|start_of_role|>user<|end_of_role|>Ask<|end_of_text|>\n<|start_of_role|>assistant"
        "<|end_of_role|>", "<|end_of_text|>\n",
    ),
    "SmolLM3": learned(
        **IM | dict(start=SMOL.format("think"), system=SMOL.format("think") + IM["system"]),
        kept="Owl", inline=THINKS, key=THINKS,
    ),
    'SmolLM3 {"enable_thinking": false}': learned(
        **IM | dict(start=SMOL.format("no_think"), system=SMOL.format("no_think") + IM["system"]),
        **NO_THINKING, mark=EMPTY,
    ),
    "Cohere": learned(
        "<BOS_TOKEN>", "<BOS_TOKEN><|START_OF_TURN|><|SYSTEM|>Sys<|END_OF_TURN|>",
        "<|START_OF_TURN|><|USER|>Ask<|END_OF_TURN|><|START_OF_TURN|><|CHATBOT|>",
        "<|END_OF_TURN|>",
    ),
    "GLM-4.5": learned(  # the template ends no turn, so an EOS is added
        "[gMASK]<sop>", "[gMASK]<sop><|system|>\nSys", "<|user|>\nAsk<|assistant|>", "",
        end="<|endoftext|>", lead="\n<think></think>\n", kept="Owl",
        inline=GLM_THINKS, key=GLM_THINKS,
    ),
    'GLM-4.5 {"enable_thinking": false}': learned(
        "[gMASK]<sop>", "[gMASK]<sop><|system|>\nSys", "<|user|>\nAsk/nothink<|assistant|>", "",
        end="<|endoftext|>", mark="\n<think></think>", lead="\n", **NO_THINKING,
    ),
    "Hunyuan": learned(
        "<|startoftext|>", "<|startoftext|>Sys<|extra_4|>", "Ask<|extra_0|>", "<|eos|>",
        inline="<think>\nHm\n</think>\n<answer>\nOwl", kept="Owl",
    ),
    'Hunyuan {"enable_thinking": false}': learned(
        "<|startoftext|>", "<|startoftext|>Sys<|extra_4|>", "/no_thinkAsk<|extra_0|>", "<|eos|>",
        inline="<think>\nHm\n</think>\n<answer>\nOwl", kept="Owl",
    ),
    "Nemotron": learned(
        "<s>", "<s><|system|>Sys<|eot|>", "<|user|>Ask<|eot|><|assistant|>", "<|eot|>",
        inline=LOST, kept="Owl",
    ),
    "Nemotron Nano": [DIFFERS] * 6,  # nothing closes the thought, or a second one is opened
    "Kimi": learned(
        "<|system|><|im_middle|>You are Kimi.<|im_end|>", "<|system|><|im_middle|>Sys<|im_end|>",
        "<|user|><|im_middle|>Ask<|im_end|><|assistant|><|im_middle|>", "<|im_end|>",
    ),
    "Vicuna": learned("<s>", "<s>Sys ", "USER: Ask ASSISTANT:", "</s>", lead=" ", earlier=" "),
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
def test_what_is_learned_is_what_the_table_says_and_all_stages_read_the_same(
    name, tokenizer_of, tmp_path
):
    tokenizer, cfg = tokenizer_of(name), sft.Config()
    for chat, expected in zip(chats_of(name.partition(" {")[0]), TABLE[name], strict=True):
        other = [*chat[:-1], {**chat[-1], "content": f"{chat[-1]['content']} no"}]
        row = {"prompt": chat[:-1], "completion": chat[-1:]}
        pair = {"chosen": chat, "rejected": other}
        if isinstance(expected, str):
            for encode_row, refused in ((sft.encode_row, row), (reward_model.encode_row, pair)):
                with pytest.raises(ValueError, match=expected) as error:
                    list(encode_row(refused, tokenizer, [], cfg))
                assert (expected == DIFFERS) == ("--chat-template-kwargs" in str(error.value))
            continue
        ((prompt, response),) = sft.encode_row(row, tokenizer, [], cfg)
        texts = tokenizer.batch_decode([prompt, response], clean_up_tokenization_spaces=False)
        assert tuple(texts) == expected
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
    scorer = rewards.TextScorer("rm", model, tokenizer, 4)
    ids = scorer.encode({"prompt": [ASK]}, "Hm</think>Owl")["input_ids"]
    assert tokenizer.decode(ids) == "<s><|user|>Ask<|eot|><|assistant|>Owl<|eot|>"


def test_of_several_turns_only_the_last_needs_its_thought(tokenizer_of):
    common.notes.clear()
    last = assistant("<think>Hm</think>Cub")
    tokenizer = tokenizer_of("Qwen3")
    _, ids = common.encode(tokenizer, [ASK], [assistant(THINKS), MORE, last])
    assert tokenizer.decode(ids) == (
        "Owl<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nHm\n</think>\n\nCub<|im_end|>"
    )
    (note,) = common.notes
    assert "thoughts for example, that the template drops" in note and common.notes[note] == 1


@pytest.mark.parametrize("arguments", [{"item": "goat"}, '{"item": "goat"}'])
def test_calls_that_the_template_drops_are_lost_words_and_those_it_writes_are_the_reply(
    arguments, tokenizer_of
):
    tokenizer = tokenizer_of("ChatML")
    call = {"type": "function", "function": {"name": "price", "arguments": arguments}}
    for written, lost in (
        ("", "price"), ("{{ c.name }}", "goat"), ("{{ c.arguments }}", "price"),
        ("{{ c.name }} {{ c.arguments }}", None),
    ):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{% for t in m.tool_calls or [] %}"
            "{% set c = t.function %}" + written + "{% endfor %}<|im_end|>{% endfor %}"
        )
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


# === --chat-template-kwargs =======================================================================
VALUES = [
    True, False, None, 0, -7, 2**70, 1.5, -1e-7, 1e22, "", "high", "it's \"so\"",
    "#} {% x %} {# {{ y }} #}\n", "a\\n\\x23#\t\r\n\x00\u2028", "caf\xe9 \u9f99 \U0001f989", [],
    [1, [None, "#"]], {}, {"a": {"#'": [False]}},
]
BODY = (
    "{% macro told() %}<{{ x }}>{% endmacro %}{{ told() }}{% for m in messages %}{{ x | tojson }}"
    "{% if x is defined and x %}!{% endif %}{% endfor %}\n\n{{ x }}\n"
)
BEGINNINGS = [
    "", "\n\n", "  ", "{%- set y = 1 %}\n", "{%- if true %}b{% endif %}\n ", "{#- c -#}\n",
    "\n{{- 'd' }}", "{% if x is not defined %}{% set x = 'own' %}{% endif %}\n",
    "{%- set z = x | default('own') -%}  {{ z }}", "{% generation %}f{% endgeneration %}",
]


def rendered(tokenizer, **arguments):
    return tokenizer.apply_chat_template([ASK, OWL], tokenize=False, **arguments)


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_arguments_written_into_a_template_hold_as_if_passed_and_may_still_be_passed(
    beginning, tokenizer_of, tmp_path
):
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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "switch" in KINDS[kind]])
def test_every_switch_holds_as_if_it_were_passed(kind, tokenizer_of):
    bare, (name, default, values) = tokenizer_of(kind), KINDS[kind]["switch"]
    texts = []
    for value in values:
        told = tokenizer_of(f"{kind} {json.dumps({name: value})}")
        texts.append(rendered(told, add_generation_prompt=True))
        passed = {name: value}
        assert texts[-1] == rendered(bare, add_generation_prompt=True, **passed)
        assert rendered(told) == rendered(bare, **passed)
    assert len({*texts}) == len(values)  # the switch is not ignored
    assert texts[[*values].index(default)] == rendered(bare, add_generation_prompt=True)


@pytest.mark.parametrize("arguments, problem", [
    ('{"enable_thinking": false', "is no JSON object"), ("", "is no JSON object"),
    ("[1]", "is no JSON object"), ("null", "is no JSON object"), ('"high"', "is no JSON object"),
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
def save_model(kind, tokenizer, folder):
    """Writes a tiny policy of random weights that has a token for each mark of the kind."""
    forms = " ".join([kind["user"], kind["reply"], kind.get("thought", "")])
    marks = forms.replace("{}", " ").replace("\n", " ").replace("><", "> <").split()
    tokenizer.add_tokens([mark for mark in marks if mark[0] == "<"])
    tokenizer.chat_template = template(kind)
    model = tiny_lm(vocab_size=len(tokenizer), max_position_embeddings=256)
    common.set_generation_defaults(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


R1 = KINDS["DeepSeek-R1"] | dict(
    inline="split", thought="<think>\n{}\n</think>\n\n",
    switch=("thinking", False, {True: {}, False: dict(opens="<|Assistant|>")}),
)
END_TO_END = [  # kind, its template, flag of the first stage, reply, prompt and response as learned
    ("gpt-oss", KINDS["gpt-oss"], '{"reasoning_effort": "high"}', assistant("Owl", thinking="Hm"),
     TABLE["gpt-oss"][4][0].replace("medium", "high"), TABLE["gpt-oss"][4][1]),
    ("DeepSeek-R1", R1, '{"thinking": true}', assistant(THINKS),
     "<|bos|><|User|>Ask<|Assistant|><think>\n", "Hm\n</think>\n\nOwl<|eos|>"),
]


@pytest.mark.parametrize(
    "name, kind, arguments, reply, prompt, response", END_TO_END, ids=["gpt-oss", "R1"]
)
def test_what_the_first_stage_is_told_holds_to_the_last_which_resumes(
    name, kind, arguments, reply, prompt, response, tokenizer_of, tmp_path, run_stage, monkeypatch
):
    tokenizer, seen = tokenizer_of(name), {}  # what each stage's model was given first, ids
    save_model(kind, tokenizer, tmp_path / "hub")

    def first_ids(function, arguments):
        if function == "pair_scores":  # (model, pairs, pad_id)
            return arguments[1][0][0]
        tokens, mask = arguments[1:3]  # after the model or the scorer
        if function == "evaluate_tokens":  # (policy, critic, ref_policy, rollout, ...)
            tokens, mask = arguments[3].tokens, arguments[3].attention_mask
        return tokens[0][mask[0]].tolist()

    def spy(owner, function):
        original = getattr(owner, function)

        def spied(*arguments):
            seen.setdefault(function, first_ids(function, arguments))
            return original(*arguments)

        monkeypatch.setattr(owner, function, spied)

    spy(sft, "completion_nll")
    spy(reward_model, "pair_scores")
    spy(ppo, "evaluate_tokens")
    spy(rewards.TokenScorer, "__call__")
    no = {**reply, "content": reply["content"] + " no"}
    write_rows(tmp_path / "sft.jsonl", [{"messages": [ASK, reply]}] * 16)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": [ASK]}] * 16)
    pair = {"prompt": [ASK], "chosen": [reply], "rejected": [no]}
    write_rows(tmp_path / "pairs.jsonl", [pair] * 16)
    monkeypatch.chdir(tmp_path)
    small = " --device cpu --batch-size 4"
    for stage, flags in (
        (sft, "--model hub --data sft.jsonl --epochs 1 --output sft" + small),
        (reward_model, "--model sft --data pairs.jsonl --output rm" + small),
        (ppo, "--policy sft --reward rm --prompts prompts.jsonl --output ppo --iterations 1 "
              "--minibatch-size 4 --response-length 6" + small),
        (ppo, "--resume --iterations 2 --output ppo"),
    ):
        given = ["--chat-template-kwargs", arguments] if stage is sft else []
        status, out, err = run_stage(stage, *flags.split(), *given)
        assert status == 0, err
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    assert seen["completion_nll"] == seen["pair_scores"] == whole
    assert seen["evaluate_tokens"] == seen["__call__"]
    assert seen["__call__"][: len(start)] == start
    first = read_rows("ppo/metrics.jsonl")[1]
    assert abs(first["kl"]) < 1e-5 and abs(first["ratio_first"] - 1) < 1e-6
    code = out[out.index("    from transformers") :].replace("    ", "")
    printed = []
    exec(code, {"print": printed.append})  # the lines that ppo.py prints: a chat is answered
    (answer,) = printed[0]
    assert answer["generated_text"][0] == ASK
    assert answer["generated_text"][1]["role"] == "assistant"
    result = AutoTokenizer.from_pretrained("ppo")  # pipelines and servers have the argument, too
    assert result.chat_template == AutoTokenizer.from_pretrained("sft").chat_template
    asked = result.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    assert asked == prompt


def test_each_stage_ends_with_one_line_where_the_template_does_not_read_an_argument(
    tmp_path, run_stage, tokenizer_of
):
    save_model(KINDS["Qwen3"], tokenizer_of("Qwen3"), tmp_path / "hub")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": [ASK]}] * 8)
    given = ["--output", tmp_path / "out", "--chat-template-kwargs", '{"thinking": false}']
    for stage, *flags in (
        (sft, "--model", tmp_path / "hub"), (reward_model, "--model", tmp_path / "hub"),
        (ppo, "--policy", tmp_path / "hub", "--prompts", prompts), (sft,),
    ):
        status, _, err = run_stage(stage, *flags, *given)
        assert status == 2 and len(err.splitlines()) == 1
        assert f"{stage.__name__}.py: error: " in err and "--chat-template-kwargs" in err
        assert ("does not read 'thinking'" in err) == bool(flags)  # a new model has no template
