"""Chat templates of today's kinds, built from what is known of each: its marks and their order.

A kind is a dict:
    eos                  what ends a reply; the tokenizer's EOS
    start                written before all messages
    default              the system message of a chat that has none
    system, user, reply  a message, {} is its content; the system's may be "raise", or "first",
                         which puts its words before the first user's
    last                 the same as reply, for the last message
    opens                the words that open the assistant's turn
    finally              written after all messages
    inline               <think>..</think> within a reply is kept (default), "drop" drops it always,
                         "split" splits it off as a thought
    key                  where a message may have a thought besides
    thought, bare        how a thought after the last question is written; what stands there if none
    switch               (name, default, {value: {what of the above is another then}})
"""


PROGRAM = r"""
{{- k.start or '' -}}
{{- k.system.replace('{}', k.default) if k.default and messages[0].role != 'system' -}}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}
        {{- raise_exception('no system role') if k.system == 'raise' -}}
        {{- k.system.replace('{}', m.content) if k.system != 'first' -}}
    {%- elif m.role == 'user' -%}
        {%- set follows = loop.index0 == 1 and messages[0].role == 'system' -%}
        {%- set system = messages[0].content ~ '\n\n' if follows and k.system == 'first' else '' -%}
        {{- k.user.replace('{}', system ~ m.content) -}}
    {%- else -%}
        {%- set parts, thought = m.content.split('</think>'), m[k.key] or '' -%}
        {%- set reply = parts[-1].lstrip('\n') if k.inline else m.content -%}
        {%- if k.inline == 'split' and parts | length == 2 -%}
            {%- set thought = parts[0].split('<think>')[-1] -%}
        {%- endif -%}
        {%- set thought = k.thought.replace('{}', thought | trim) if thought else k.bare or '' -%}
        {%- set later = messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list -%}
        {%- set thought = thought if k.thought and not later else '' -%}
        {{- (k.last if k.last and loop.last else k.reply).replace('{}', thought ~ reply) -}}
    {%- endif -%}
{%- endfor -%}
{{- k.opens or '' if add_generation_prompt else k.finally or '' -}}
"""


def template(kind):
    """Returns a chat template of the kind."""
    name, default, changes = kind.get("switch", ("unused", None, {None: {}}))
    settings = {value: kind | change | {"switch": None} for value, change in changes.items()}
    switch = f"{name} if {name} is defined else {default!r}"
    return "{%- set k = " + f"{settings}[{switch}]" + " -%}" + PROGRAM


def turns(before, after, roles="system user assistant", **more):
    """Returns a kind whose messages differ only in the word of their role."""
    system, user, reply = (before.replace("ROLE", role) for role in roles.split())
    forms = {"system": system + "{}" + after, "user": user + "{}" + after}
    return forms | {"reply": reply + "{}" + after, "opens": reply, "eos": after.strip()} | more


EMPTY = "<think>\n\n</think>\n\n"
IM = turns("<|im_start|>ROLE\n", "<|im_end|>\n")
THOUGHT = dict(inline="split", key="reasoning_content", thought="<think>\n{}\n</think>\n\n")
FINAL, START = "<|channel|>final<|message|>", "<|start_of_role|>system<|end_of_role|>"
GPT_OSS = turns("<|start|>ROLE<|message|>", "<|end|>", "developer user assistant") | dict(
    eos="<|return|>", reply=f"<|start|>assistant{FINAL}{{}}<|end|>", opens="<|start|>assistant",
    last="<|start|>assistant{}<|return|>", key="thinking", bare=FINAL,
    thought="<|channel|>analysis<|message|>{}<|end|><|start|>assistant" + FINAL,
    switch=("reasoning_effort", "medium", {
        effort: dict(start=f"<|start|>system<|message|>Reasoning: {effort}<|end|>")
        for effort in ("low", "medium", "high")
    }),
)
GEMMA = turns("<start_of_turn>ROLE\n", "<end_of_turn>\n", "system user model", start="<bos>")
DEEPSEEK = dict(
    eos="<|eos|>", start="<|bos|>", system="{}", user="<|User|>{}", reply="<|Assistant|>{}<|eos|>",
    opens="<|Assistant|><think>\n", inline="drop",
)
KINDS = {
    "ChatML": IM,
    "Qwen2.5": IM | dict(default="You are Qwen."),
    "Qwen3": IM | THOUGHT | dict(bare=EMPTY, switch=("enable_thinking", True, {
        True: {}, False: dict(opens=f"<|im_start|>assistant\n{EMPTY}"),
    })),
    "Qwen3, thinking": IM | THOUGHT | dict(bare=EMPTY, opens="<|im_start|>assistant\n<think>\n"),
    "DeepSeek-R1": DEEPSEEK,
    "DeepSeek-V3.1": DEEPSEEK | dict(
        user="<|User|>{}<|Assistant|>", reply="</think>{}<|eos|>",
        switch=("thinking", False, {False: dict(opens="</think>"), True: dict(opens="<think>")}),
    ),
    "Llama 3": turns(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", start="<|begin_of_text|>"
    ),
    "Gemma": GEMMA | dict(system="raise"),
    "Gemma 3": GEMMA | dict(system="first"),
    "Mistral": dict(
        eos="</s>", start="<s>", system="first", user="[INST] {}[/INST]", reply=" {}</s>"
    ),
    "Magistral": dict(
        eos="</s>", start="<s>", system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", user="[INST]{}[/INST]",
        reply="{}</s>", inline="split", thought="[THINK]{}[/THINK]",
    ),
    "Phi": turns("<|ROLE|>\n", "<|end|>\n") | {"eos": "<|endoftext|>", "finally": "<|endoftext|>"},
    "Zephyr": turns("<|ROLE|>\n", "</s>\n"),
    "gpt-oss": GPT_OSS,
    "Granite": turns("<|start_of_role|>ROLE<|end_of_role|>", "<|end_of_text|>\n", switch=(
        "thinking", False, {False: {}, True: dict(start=f"{START}Think first.<|end_of_text|>\n")},
    )),
    "SmolLM3": IM | THOUGHT | dict(switch=("enable_thinking", True, {
        True: dict(start="<|im_start|>system\nMode: /think\n<|im_end|>\n"),
        False: dict(start="<|im_start|>system\nMode: /no_think\n<|im_end|>\n", bare=EMPTY,
                    opens=f"<|im_start|>assistant\n{EMPTY}"),
    })),
    "Cohere": turns(
        "<|START_OF_TURN|><|ROLE|>", "<|END_OF_TURN|>", "SYSTEM USER CHATBOT", start="<BOS_TOKEN>"
    ),
    "GLM-4.5": THOUGHT | dict(
        eos="<|endoftext|>", start="[gMASK]<sop>", system="<|system|>\n{}", reply="<|assistant|>{}",
        thought="\n<think>{}</think>\n", bare="\n<think></think>\n",
        switch=("enable_thinking", True, {
            True: dict(user="<|user|>\n{}", opens="<|assistant|>"),
            False: dict(user="<|user|>\n{}/nothink", opens="<|assistant|>\n<think></think>"),
        }),
    ),
    "Hunyuan": dict(
        eos="<|eos|>", start="<|startoftext|>", system="{}<|extra_4|>", reply="{}<|eos|>",
        inline="split", thought="<think>\n{}\n</think>\n<answer>\n",
        switch=("enable_thinking", True, {
            True: dict(user="{}<|extra_0|>"), False: dict(user="/no_think{}<|extra_0|>"),
        }),
    ),
    "Nemotron": turns("<|ROLE|>", "<|eot|>", start="<s>", inline="drop"),
    "Nemotron Nano": turns("<|ROLE|>", "<|eot|>") | dict(
        last="<|assistant|><think>\n{}<|eot|>", opens="<|assistant|><think>\n"
    ),
    "Kimi": turns("<|ROLE|><|im_middle|>", "<|im_end|>", default="You are Kimi."),
    "Vicuna": dict(
        eos="</s>", start="<s>", system="{} ", user="USER: {} ", reply="ASSISTANT: {}</s>",
        opens="ASSISTANT:",
    ),
}
