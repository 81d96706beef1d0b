"""Chat templates of today's kinds, built from what is known of each: its marks and their order.

A kind is a dict:
    eos                  what ends a reply; the tokenizer's EOS
    start                written before all messages
    default              the system message of a chat that has none
    system, user, reply  a message, {} is its content; the system's may be "raise", or "first": before the user's words
    last, opens          the same as reply, for the last message; the words that open the assistant's turn
    inline               <think>..</think> within a reply is kept (default), "drop"ped, or "split" off as a thought
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
        {%- set is_told = k.system == 'first' and messages[loop.index0 - 1].role == 'system' -%}
        {{- k.user.replace('{}', (messages[0].content ~ '\n\n' if is_told else '') ~ m.content) -}}
    {%- else -%}
        {%- set parts, thought = m.content.split('</think>'), m[k.key] or '' -%}
        {%- set reply = parts[-1].lstrip('\n') if k.inline else m.content -%}
        {%- set thought = parts[0].split('<think>')[-1] if k.inline == 'split' and parts[1] else thought -%}
        {%- set thought = k.thought.replace('{}', thought | trim) if thought else k.bare or '' -%}
        {%- set is_shown = messages[loop.index0:] | rejectattr('role', 'equalto', 'assistant') | list == [] -%}
        {{- (k.last if k.last and loop.last else k.reply).replace('{}', (thought if is_shown else '') ~ reply) -}}
    {%- endif -%}
{%- endfor -%}
{{- k.opens or '' if add_generation_prompt -}}
"""


def template(kind):
    """Returns a chat template of the kind."""
    name, default, changes = kind.get("switch", ("unused", None, {None: {}}))
    settings = {value: kind | change | {"switch": None} for value, change in changes.items()}
    return f"{{%- set k = {settings}[{name} if {name} is defined else {default!r}] -%}}{PROGRAM}"


def turns(before, after, roles="system user assistant", **more):
    """Returns a kind whose messages differ only in the word of their role."""
    system, user, reply = (before.replace("ROLE", role) for role in roles.split())
    forms = {"system": system + "{}" + after, "user": user + "{}" + after}
    return forms | {"reply": reply + "{}" + after, "opens": reply, "eos": after.strip()} | more


EMPTY, THINKS = "<think>\n\n</think>\n\n", "<|assistant|><think>\n"
IM = turns("<|im_start|>ROLE\n", "<|im_end|>\n")
THOUGHT = dict(inline="split", key="reasoning_content", thought="<think>\n{}\n</think>\n\n")
FINAL, EFFORT = "<|channel|>final<|message|>", "<|start|>system<|message|>Reasoning: {}<|end|>"
OSS = turns("<|start|>ROLE<|message|>", "<|end|>", "developer user assistant") | dict(
    eos="<|return|>", reply=f"<|start|>assistant{FINAL}{{}}<|end|>", opens="<|start|>assistant",
    last="<|start|>assistant{}<|return|>", key="thinking", bare=FINAL,
    thought=f"<|channel|>analysis<|message|>{{}}<|end|><|start|>assistant{FINAL}",
    switch=("reasoning_effort", "medium", {x: dict(start=EFFORT.format(x)) for x in ("low", "medium", "high")}),
)
DEEPSEEK = dict(eos="<|eos|>", start="<|bos|>", system="{}", user="<|User|>{}", inline="drop")
KINDS = {
    "ChatML": IM,
    "Qwen3": IM | THOUGHT | dict(bare=EMPTY, switch=(
        "enable_thinking", True, {True: {}, False: dict(opens=IM["opens"] + EMPTY)},
    )),
    "Qwen3, thinking": IM | THOUGHT | dict(bare=EMPTY, opens=IM["opens"] + "<think>\n"),
    "DeepSeek-R1": DEEPSEEK | dict(reply="<|Assistant|>{}<|eos|>", opens="<|Assistant|><think>\n"),
    "DeepSeek-V3.1": DEEPSEEK | dict(
        user="<|User|>{}<|Assistant|>", reply="</think>{}<|eos|>",
        switch=("thinking", False, {False: dict(opens="</think>"), True: dict(opens="<think>")}),
    ),
    "Gemma": turns("<start_of_turn>ROLE\n", "<end_of_turn>\n", "system user model", start="<bos>", system="raise"),
    "Mistral": dict(eos="</s>", start="<s>", system="first", user="[INST] {}[/INST]", reply=" {}</s>"),
    "Magistral": dict(
        eos="</s>", start="<s>", system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", user="[INST]{}[/INST]", reply="{}</s>",
        inline="split", thought="[THINK]{}[/THINK]",
    ),
    "Zephyr": turns("<|ROLE|>\n", "</s>\n"),
    "gpt-oss": OSS,
    "GLM-4.5": THOUGHT | dict(
        eos="<|endoftext|>", start="[gMASK]<sop>", system="<|system|>\n{}", reply="<|assistant|>{}",
        thought="\n<think>{}</think>\n", bare="\n<think></think>\n", user="<|user|>\n{}", opens="<|assistant|>",
    ),
    "Nemotron": turns("<|ROLE|>", "<|eot|>", start="<s>", inline="drop"),
    "Nemotron Nano": turns("<|ROLE|>", "<|eot|>", last=f"{THINKS}{{}}<|eot|>", opens=THINKS),
    "Kimi": turns("<|ROLE|><|im_middle|>", "<|im_end|>", default="You are Kimi."),
}
