"""Chat templates of today's kinds, built from what is known of each: its marks and their order.

A kind is a dict:
    eos                    what ends a reply; the tokenizer's EOS
    start                  written before all messages; {date} is today's in the format of `date`, {x} a switch's value
    default                the system message of a chat that has none
    system, user, reply    a message, with {} for its content; the system's may be "raise" or "first" (put before the first user's words)
    last                   the same as reply, for the last message
    opens                  the words that open the assistant's turn
    finally                written behind all messages
    trim, alternates       contents are trimmed; roles other than user, assistant, user, ... raise
    inline                 of <think>..</think> within a reply: "keep" it, "drop" it always, or "split" it off as a thought
    key                    where a message may have a thought besides
    thought, bare          how the thought of the turn behind the last question is written, and what stands there if there is none
    switch                 (name, value if not told, {value: {what of the above is another then}})
"""

q = repr  # Jinja reads Python's strings


def _message(form, content):
    before, after = form.split("{}")
    return f"{{{{ {q(before)} }}}}{{{{ {content} }}}}{{{{ {q(after)} }}}}"


def _body(kind):
    """The template of one setting of the switches."""
    content = "(m['content'] | trim)" if kind.get("trim") else "m['content']"
    text = f"{{{{ {q(kind.get('start', ''))}.replace('{{date}}', strftime_now({q(kind.get('date', ''))})) }}}}" if "date" in kind else f"{{{{ {q(kind.get('start', ''))} }}}}"
    if "default" in kind:
        text += f"{{% if messages[0]['role'] != 'system' %}}{{{{ {q(kind['system'].format(kind['default']))} }}}}{{% endif %}}"
    text += "{% for m in messages %}"
    if kind.get("alternates"):
        first = "messages[0]['role'] == 'system'"
        text += f"{{% if m['role'] != 'system' and (m['role'] == 'user') != ((loop.index0 - ({first}) | int) % 2 == 0) %}}{{{{ raise_exception('roles must alternate') }}}}{{% endif %}}"
    text += "{% if m['role'] == 'system' %}"
    if kind["system"] == "raise":
        text += "{{ raise_exception('no system role') }}"
    elif kind["system"] != "first":
        text += _message(kind["system"], content)
    text += "{% elif m['role'] == 'user' %}"
    if kind["system"] == "first":
        content = f"((messages[0]['content'] ~ '\\n\\n') if loop.index0 == 1 and messages[0]['role'] == 'system' else '') ~ {content}"
    text += _message(kind["user"], content)
    text += "{% else %}{% set reply = m['content'] %}{% set thought = '' %}"
    if "key" in kind:
        text += f"{{% set thought = m[{q(kind['key'])}] or '' %}}"
    if kind.get("inline", "keep") != "keep":
        parts = "{% set thought = reply.split('</think>')[0].split('<think>')[-1] %}" if kind["inline"] == "split" else ""
        text += f"{{% if '</think>' in reply %}}{parts}{{% set reply = reply.split('</think>')[-1].lstrip('\\n') %}}{{% endif %}}"
    reply = "(reply | trim)" if kind.get("trim") else "reply"
    before, after = kind["reply"].split("{}")
    before_last, after_last = kind.get("last", kind["reply"]).split("{}")
    thought = "''"
    if "thought" in kind:
        begin, end = kind["thought"].split("{}")
        is_last = "not (messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list)"
        thought = f"(({q(begin)} ~ (thought | trim) ~ {q(end)}) if thought else {q(kind.get('bare', ''))}) if {is_last} else ''"
    text += f"{{{{ {q(before_last)} if loop.last else {q(before)} }}}}{{{{ {thought} }}}}{{{{ {reply} }}}}{{{{ {q(after_last)} if loop.last else {q(after)} }}}}"
    return text + f"{{% endif %}}{{% endfor %}}{{{{ {q(kind.get('opens', ''))} if add_generation_prompt else {q(kind.get('finally', ''))} }}}}"


def template(kind):
    """A chat template of the kind."""
    if "switch" not in kind:
        return _body(kind)
    name, default, changes = kind["switch"]
    text = f"{{% if {name} is not defined %}}{{% set {name} = {default!r} %}}{{% endif %}}"
    text += "".join(f"{{% {'if' if i == 0 else 'elif'} {name} == {value!r} %}}{_body(kind | change)}" for i, (value, change) in enumerate(changes.items()))
    return text + f"{{% else %}}{{{{ raise_exception('no such {name}') }}}}{{% endif %}}"


IM = dict(eos="<|im_end|>", system="<|im_start|>system\n{}<|im_end|>\n", user="<|im_start|>user\n{}<|im_end|>\n", reply="<|im_start|>assistant\n{}<|im_end|>\n", opens="<|im_start|>assistant\n")
THINK = dict(inline="split", key="reasoning_content", thought="<think>\n{}\n</think>\n\n", bare="<think>\n\n</think>\n\n")
GPT_OSS = dict(
    eos="<|return|>", date="%Y-%m-%d", system="<|start|>developer<|message|>{}<|end|>", user="<|start|>user<|message|>{}<|end|>", opens="<|start|>assistant",
    reply="<|start|>assistant<|channel|>final<|message|>{}<|end|>", last="<|start|>assistant{}<|return|>", key="thinking",
    thought="<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>", bare="<|channel|>final<|message|>",
    switch=("reasoning_effort", "medium", {effort: dict(start=f"<|start|>system<|message|>Date: {{date}} Reasoning: {effort}<|end|>") for effort in ("low", "medium", "high")}),
)
KINDS = {
    "ChatML": IM,
    "Qwen2.5": IM | dict(default="You are Qwen."),
    "Qwen3": IM | THINK | dict(switch=("enable_thinking", True, {True: {}, False: dict(opens="<|im_start|>assistant\n<think>\n\n</think>\n\n")})),
    "Qwen3, thinking only": IM | THINK | dict(opens="<|im_start|>assistant\n<think>\n"),
    "DeepSeek-R1": dict(eos="<|eos|>", start="<|bos|>", system="{}", user="<|User|>{}", reply="<|Assistant|>{}<|eos|>", opens="<|Assistant|><think>\n", inline="drop"),
    "DeepSeek-V3.1": dict(
        eos="<|eos|>", start="<|bos|>", system="{}", user="<|User|>{}<|Assistant|>", reply="</think>{}<|eos|>", inline="drop",
        switch=("thinking", False, {False: dict(opens="</think>"), True: dict(opens="<think>")}),
    ),
    "Llama 3": dict(
        eos="<|eot_id|>", start="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: {date}<|eot_id|>", date="%d %b %Y", trim=True,
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>", user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        reply="<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>", opens="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Gemma": dict(
        eos="<end_of_turn>", start="<bos>", system="raise", user="<start_of_turn>user\n{}<end_of_turn>\n", reply="<start_of_turn>model\n{}<end_of_turn>\n",
        opens="<start_of_turn>model\n", trim=True, alternates=True,
    ),
    "Gemma 3": dict(
        eos="<end_of_turn>", start="<bos>", system="first", user="<start_of_turn>user\n{}<end_of_turn>\n", reply="<start_of_turn>model\n{}<end_of_turn>\n",
        opens="<start_of_turn>model\n", trim=True, alternates=True,
    ),
    "Mistral": dict(eos="</s>", start="<s>", system="first", user="[INST] {}[/INST]", reply=" {}</s>", alternates=True),
    "Magistral": dict(
        eos="</s>", start="<s>[SYSTEM_PROMPT]Today is {date}.[/SYSTEM_PROMPT]", date="%Y-%m-%d", system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", user="[INST]{}[/INST]",
        reply="{}</s>", inline="split", thought="[THINK]{}[/THINK]",
    ),
    "Phi": dict(eos="<|endoftext|>", system="<|system|>\n{}<|end|>\n", user="<|user|>\n{}<|end|>\n", reply="<|assistant|>\n{}<|end|>\n", opens="<|assistant|>\n", **{"finally": "<|endoftext|>"}),
    "Zephyr": dict(eos="</s>", system="<|system|>\n{}</s>\n", user="<|user|>\n{}</s>\n", reply="<|assistant|>\n{}</s>\n", opens="<|assistant|>\n"),
    "gpt-oss": GPT_OSS,
    "Granite": dict(
        eos="<|end_of_text|>", date="%B %d, %Y", system="<|start_of_role|>system<|end_of_role|>{}<|end_of_text|>\n", user="<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n",
        reply="<|start_of_role|>assistant<|end_of_role|>{}<|end_of_text|>\n", opens="<|start_of_role|>assistant<|end_of_role|>",
        switch=("thinking", False, {
            False: dict(start="<|start_of_role|>system<|end_of_role|>Today's Date: {date}.<|end_of_text|>\n"),
            True: dict(start="<|start_of_role|>system<|end_of_role|>Today's Date: {date}. Think first.<|end_of_text|>\n"),
        }),
    ),
    "SmolLM3": IM | THINK | dict(date="%d %B %Y", bare="", switch=("enable_thinking", True, {
        True: dict(start="<|im_start|>system\nDate: {date}\nMode: /think\n<|im_end|>\n"),
        False: dict(start="<|im_start|>system\nDate: {date}\nMode: /no_think\n<|im_end|>\n", opens="<|im_start|>assistant\n<think>\n\n</think>\n\n", bare="<think>\n\n</think>\n\n"),
    })),
    "Cohere": dict(
        eos="<|END_OF_TURN|>", start="<BOS_TOKEN>", system="<|START_OF_TURN|><|SYSTEM|>{}<|END_OF_TURN|>", user="<|START_OF_TURN|><|USER|>{}<|END_OF_TURN|>",
        reply="<|START_OF_TURN|><|CHATBOT|>{}<|END_OF_TURN|>", opens="<|START_OF_TURN|><|CHATBOT|>", trim=True,
    ),
    "GLM-4.5": dict(
        eos="<|endoftext|>", start="[gMASK]<sop>", system="<|system|>\n{}", reply="<|assistant|>{}", inline="split", key="reasoning_content", trim=True,
        thought="\n<think>{}</think>\n", bare="\n<think></think>\n",
        switch=("enable_thinking", True, {True: dict(user="<|user|>\n{}", opens="<|assistant|>"), False: dict(user="<|user|>\n{}/nothink", opens="<|assistant|>\n<think></think>")}),
    ),
    "Hunyuan": dict(
        eos="<|eos|>", start="<|startoftext|>", system="{}<|extra_4|>", reply="{}<|eos|>", inline="split", thought="<think>\n{}\n</think>\n<answer>\n",
        switch=("enable_thinking", True, {True: dict(user="{}<|extra_0|>"), False: dict(user="/no_think{}<|extra_0|>")}),
    ),
    "Nemotron": dict(eos="<|eot|>", start="<s>", system="<|system|>{}<|eot|>", user="<|user|>{}<|eot|>", reply="<|assistant|>{}<|eot|>", opens="<|assistant|>", inline="drop", trim=True),
    "Nemotron Nano": dict(
        eos="<|eot|>", system="<|system|>{}<|eot|>", user="<|user|>{}<|eot|>", reply="<|assistant|>{}<|eot|>", last="<|assistant|><think>\n{}<|eot|>", opens="<|assistant|><think>\n",
    ),
    "Kimi": dict(
        eos="<|im_end|>", default="You are Kimi.", system="<|im_system|>system<|im_middle|>{}<|im_end|>", user="<|im_user|>user<|im_middle|>{}<|im_end|>",
        reply="<|im_assistant|>assistant<|im_middle|>{}<|im_end|>", opens="<|im_assistant|>assistant<|im_middle|>",
    ),
    "Vicuna": dict(eos="</s>", start="<s>", system="{} ", user="USER: {} ", reply="ASSISTANT: {}</s>", opens="ASSISTANT:"),
}
