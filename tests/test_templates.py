"""Chat templates of today's kinds: what is learned of a chat, what they are told by --chat-template-kwargs, and their date."""

import shutil
import types
import copy
import datetime
import itertools
import json

import pytest
import transformers
from conftest import read_rows, tiny_lm, write_rows
from templates import KINDS, template
from transformers import AutoTokenizer

import common
import ppo
import reward_model
import sft
from data import tiny_model
from plumbing import rows as rows_
from plumbing import scorers

DAY = "2024-07-04"
user = lambda text: {"role": "user", "content": text}
assistant = lambda text, **more: {"role": "assistant", "content": text, **more}
SYSTEM, ASK, OWL, MORE, CUB = {"role": "system", "content": "Sys"}, user("Ask"), assistant("Owl"), user("More"), assistant("Cub")
THOUGHT = assistant("<think>\nHm\n</think>\n\nOwl")  # inline; as a key of its own it is made in `chat_of`
CELLS = {
    "plain": [ASK, OWL], "turns": [ASK, OWL, MORE, CUB], "system": [SYSTEM, ASK, OWL], "inline": [ASK, THOUGHT],
    "key": [ASK, OWL], "context": [ASK, THOUGHT, MORE, CUB],
}

# What is learned: (prompt, response) of each cell, written down by hand; a string is why there is none.
LOST = "the template drops, from 'Hm Owl' on"
OPENED = "opens a thought that the reply does not go on with"
NONE = "no system role"
THINKS = "<think>\nHm\n</think>\n\nOwl"
IM = "<|im_start|>"
ASKED = f"{IM}user\nAsk<|im_end|>\n{IM}assistant\n"
GONE_ON = f"{IM}user\nMore<|im_end|>\n{IM}assistant\n"
LLAMA = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 04 Jul 2024<|eot_id|>"
HEAD = lambda role: f"<|start_header_id|>{role}<|end_header_id|>\n\n"
OSS = "<|start|>system<|message|>Date: 2024-07-04 Reasoning: medium<|end|>"
GRANITE = "<|start_of_role|>system<|end_of_role|>Today's Date: July 04, 2024.<|end_of_text|>\n"
SMOL = f"{IM}system\nDate: 04 July 2024\nMode: /think\n<|im_end|>\n"
MAGISTRAL = "<s>[SYSTEM_PROMPT]Today is 2024-07-04.[/SYSTEM_PROMPT]"
QWEN = f"{IM}system\nYou are Qwen.<|im_end|>\n"
KIMI = "<|im_system|>system<|im_middle|>You are Kimi.<|im_end|>"
TABLE = {
    "ChatML": [
        (ASKED, "Owl<|im_end|>"), (f"{ASKED}Owl<|im_end|>\n{GONE_ON}", "Cub<|im_end|>"), (f"{IM}system\nSys<|im_end|>\n{ASKED}", "Owl<|im_end|>"),
        (ASKED, f"{THINKS}<|im_end|>"), LOST, (f"{ASKED}{THINKS}<|im_end|>\n{GONE_ON}", "Cub<|im_end|>"),
    ],
    "Qwen2.5": [
        (QWEN + ASKED, "Owl<|im_end|>"), (f"{QWEN}{ASKED}Owl<|im_end|>\n{GONE_ON}", "Cub<|im_end|>"), (f"{IM}system\nSys<|im_end|>\n{ASKED}", "Owl<|im_end|>"),
        (QWEN + ASKED, f"{THINKS}<|im_end|>"), LOST, (f"{QWEN}{ASKED}{THINKS}<|im_end|>\n{GONE_ON}", "Cub<|im_end|>"),
    ],
    "Qwen3": [  # a reply without a thought learns to write an empty one
        (ASKED, "<think>\n\n</think>\n\nOwl<|im_end|>"), (f"{ASKED}Owl<|im_end|>\n{GONE_ON}", "<think>\n\n</think>\n\nCub<|im_end|>"),
        (f"{IM}system\nSys<|im_end|>\n{ASKED}", "<think>\n\n</think>\n\nOwl<|im_end|>"),
        (ASKED, f"{THINKS}<|im_end|>"), (ASKED, f"{THINKS}<|im_end|>"), (f"{ASKED}Owl<|im_end|>\n{GONE_ON}", "<think>\n\n</think>\n\nCub<|im_end|>"),
    ],
    "Qwen3, thinking only": [  # the thought is opened for the policy; without one it learns to close it
        (f"{ASKED}<think>\n", "\n</think>\n\nOwl<|im_end|>"), (f"{ASKED}Owl<|im_end|>\n{GONE_ON}<think>\n", "\n</think>\n\nCub<|im_end|>"),
        (f"{IM}system\nSys<|im_end|>\n{ASKED}<think>\n", "\n</think>\n\nOwl<|im_end|>"),
        (f"{ASKED}<think>\n", "Hm\n</think>\n\nOwl<|im_end|>"), (f"{ASKED}<think>\n", "Hm\n</think>\n\nOwl<|im_end|>"),
        (f"{ASKED}Owl<|im_end|>\n{GONE_ON}<think>\n", "\n</think>\n\nCub<|im_end|>"),
    ],
    "DeepSeek-R1": [OPENED] * 6,  # opens a thought, and renders every reply without
    "DeepSeek-V3.1": [
        ("<|bos|><|User|>Ask<|Assistant|></think>", "Owl<|eos|>"), ("<|bos|><|User|>Ask<|Assistant|></think>Owl<|eos|><|User|>More<|Assistant|></think>", "Cub<|eos|>"),
        ("<|bos|>Sys<|User|>Ask<|Assistant|></think>", "Owl<|eos|>"), LOST, LOST,
        ("<|bos|><|User|>Ask<|Assistant|></think>Owl<|eos|><|User|>More<|Assistant|></think>", "Cub<|eos|>"),
    ],
    "Llama 3": [
        (f"{LLAMA}{HEAD('user')}Ask<|eot_id|>{HEAD('assistant')}", "Owl<|eot_id|>"),
        (f"{LLAMA}{HEAD('user')}Ask<|eot_id|>{HEAD('assistant')}Owl<|eot_id|>{HEAD('user')}More<|eot_id|>{HEAD('assistant')}", "Cub<|eot_id|>"),
        (f"{LLAMA}{HEAD('system')}Sys<|eot_id|>{HEAD('user')}Ask<|eot_id|>{HEAD('assistant')}", "Owl<|eot_id|>"),
        (f"{LLAMA}{HEAD('user')}Ask<|eot_id|>{HEAD('assistant')}", f"{THINKS}<|eot_id|>"), LOST,
        (f"{LLAMA}{HEAD('user')}Ask<|eot_id|>{HEAD('assistant')}{THINKS}<|eot_id|>{HEAD('user')}More<|eot_id|>{HEAD('assistant')}", "Cub<|eot_id|>"),
    ],
    "Gemma": [
        ("<bos><start_of_turn>user\nAsk<end_of_turn>\n<start_of_turn>model\n", "Owl<end_of_turn>"),
        ("<bos><start_of_turn>user\nAsk<end_of_turn>\n<start_of_turn>model\nOwl<end_of_turn>\n<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n", "Cub<end_of_turn>"),
        NONE, ("<bos><start_of_turn>user\nAsk<end_of_turn>\n<start_of_turn>model\n", f"{THINKS}<end_of_turn>"), LOST,
        (f"<bos><start_of_turn>user\nAsk<end_of_turn>\n<start_of_turn>model\n{THINKS}<end_of_turn>\n<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n", "Cub<end_of_turn>"),
    ],
    "Gemma 3": [
        ("<bos><start_of_turn>user\nAsk<end_of_turn>\n<start_of_turn>model\n", "Owl<end_of_turn>"),
        ("<bos><start_of_turn>user\nAsk<end_of_turn>\n<start_of_turn>model\nOwl<end_of_turn>\n<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n", "Cub<end_of_turn>"),
        ("<bos><start_of_turn>user\nSys\n\nAsk<end_of_turn>\n<start_of_turn>model\n", "Owl<end_of_turn>"),
        ("<bos><start_of_turn>user\nAsk<end_of_turn>\n<start_of_turn>model\n", f"{THINKS}<end_of_turn>"), LOST,
        (f"<bos><start_of_turn>user\nAsk<end_of_turn>\n<start_of_turn>model\n{THINKS}<end_of_turn>\n<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n", "Cub<end_of_turn>"),
    ],
    "Mistral": [  # nothing opens the turn but the end of the question
        ("<s>[INST] Ask[/INST]", " Owl</s>"), ("<s>[INST] Ask[/INST] Owl</s>[INST] More[/INST]", " Cub</s>"), ("<s>[INST] Sys\n\nAsk[/INST]", " Owl</s>"),
        ("<s>[INST] Ask[/INST]", f" {THINKS}</s>"), LOST, (f"<s>[INST] Ask[/INST] {THINKS}</s>[INST] More[/INST]", " Cub</s>"),
    ],
    "Magistral": [
        (f"{MAGISTRAL}[INST]Ask[/INST]", "Owl</s>"), (f"{MAGISTRAL}[INST]Ask[/INST]Owl</s>[INST]More[/INST]", "Cub</s>"),
        (f"{MAGISTRAL}[SYSTEM_PROMPT]Sys[/SYSTEM_PROMPT][INST]Ask[/INST]", "Owl</s>"), (f"{MAGISTRAL}[INST]Ask[/INST]", "[THINK]Hm[/THINK]Owl</s>"), LOST,
        (f"{MAGISTRAL}[INST]Ask[/INST]Owl</s>[INST]More[/INST]", "Cub</s>"),
    ],
    "Phi": [  # a policy whose generation config names <|end|> too stops at that
        ("<|user|>\nAsk<|end|>\n<|assistant|>\n", "Owl<|end|>\n<|endoftext|>"),
        ("<|user|>\nAsk<|end|>\n<|assistant|>\nOwl<|end|>\n<|user|>\nMore<|end|>\n<|assistant|>\n", "Cub<|end|>\n<|endoftext|>"),
        ("<|system|>\nSys<|end|>\n<|user|>\nAsk<|end|>\n<|assistant|>\n", "Owl<|end|>\n<|endoftext|>"),
        ("<|user|>\nAsk<|end|>\n<|assistant|>\n", f"{THINKS}<|end|>\n<|endoftext|>"), LOST,
        (f"<|user|>\nAsk<|end|>\n<|assistant|>\n{THINKS}<|end|>\n<|user|>\nMore<|end|>\n<|assistant|>\n", "Cub<|end|>\n<|endoftext|>"),
    ],
    "Zephyr": [
        ("<|user|>\nAsk</s>\n<|assistant|>\n", "Owl</s>"), ("<|user|>\nAsk</s>\n<|assistant|>\nOwl</s>\n<|user|>\nMore</s>\n<|assistant|>\n", "Cub</s>"),
        ("<|system|>\nSys</s>\n<|user|>\nAsk</s>\n<|assistant|>\n", "Owl</s>"), ("<|user|>\nAsk</s>\n<|assistant|>\n", f"{THINKS}</s>"), LOST,
        (f"<|user|>\nAsk</s>\n<|assistant|>\n{THINKS}</s>\n<|user|>\nMore</s>\n<|assistant|>\n", "Cub</s>"),
    ],
    "gpt-oss": [  # the policy chooses its channel
        (f"{OSS}<|start|>user<|message|>Ask<|end|><|start|>assistant", "<|channel|>final<|message|>Owl<|return|>"),
        (f"{OSS}<|start|>user<|message|>Ask<|end|><|start|>assistant<|channel|>final<|message|>Owl<|end|><|start|>user<|message|>More<|end|><|start|>assistant", "<|channel|>final<|message|>Cub<|return|>"),
        (f"{OSS}<|start|>developer<|message|>Sys<|end|><|start|>user<|message|>Ask<|end|><|start|>assistant", "<|channel|>final<|message|>Owl<|return|>"),
        (f"{OSS}<|start|>user<|message|>Ask<|end|><|start|>assistant", f"<|channel|>final<|message|>{THINKS}<|return|>"),
        (f"{OSS}<|start|>user<|message|>Ask<|end|><|start|>assistant", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Owl<|return|>"),
        (f"{OSS}<|start|>user<|message|>Ask<|end|><|start|>assistant<|channel|>final<|message|>{THINKS}<|end|><|start|>user<|message|>More<|end|><|start|>assistant", "<|channel|>final<|message|>Cub<|return|>"),
    ],
    "Granite": [
        (f"{GRANITE}<|start_of_role|>user<|end_of_role|>Ask<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", "Owl<|end_of_text|>"),
        (f"{GRANITE}<|start_of_role|>user<|end_of_role|>Ask<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>Owl<|end_of_text|>\n"
         "<|start_of_role|>user<|end_of_role|>More<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", "Cub<|end_of_text|>"),
        (f"{GRANITE}<|start_of_role|>system<|end_of_role|>Sys<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Ask<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", "Owl<|end_of_text|>"),
        (f"{GRANITE}<|start_of_role|>user<|end_of_role|>Ask<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", f"{THINKS}<|end_of_text|>"), LOST,
        (f"{GRANITE}<|start_of_role|>user<|end_of_role|>Ask<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>{THINKS}<|end_of_text|>\n"
         "<|start_of_role|>user<|end_of_role|>More<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", "Cub<|end_of_text|>"),
    ],
    "SmolLM3": [
        (SMOL + ASKED, "Owl<|im_end|>"), (f"{SMOL}{ASKED}Owl<|im_end|>\n{GONE_ON}", "Cub<|im_end|>"), (f"{SMOL}{IM}system\nSys<|im_end|>\n{ASKED}", "Owl<|im_end|>"),
        (SMOL + ASKED, f"{THINKS}<|im_end|>"), (SMOL + ASKED, f"{THINKS}<|im_end|>"), (f"{SMOL}{ASKED}Owl<|im_end|>\n{GONE_ON}", "Cub<|im_end|>"),
    ],
    "Cohere": [
        ("<BOS_TOKEN><|START_OF_TURN|><|USER|>Ask<|END_OF_TURN|><|START_OF_TURN|><|CHATBOT|>", "Owl<|END_OF_TURN|>"),
        ("<BOS_TOKEN><|START_OF_TURN|><|USER|>Ask<|END_OF_TURN|><|START_OF_TURN|><|CHATBOT|>Owl<|END_OF_TURN|><|START_OF_TURN|><|USER|>More<|END_OF_TURN|><|START_OF_TURN|><|CHATBOT|>", "Cub<|END_OF_TURN|>"),
        ("<BOS_TOKEN><|START_OF_TURN|><|SYSTEM|>Sys<|END_OF_TURN|><|START_OF_TURN|><|USER|>Ask<|END_OF_TURN|><|START_OF_TURN|><|CHATBOT|>", "Owl<|END_OF_TURN|>"),
        ("<BOS_TOKEN><|START_OF_TURN|><|USER|>Ask<|END_OF_TURN|><|START_OF_TURN|><|CHATBOT|>", f"{THINKS}<|END_OF_TURN|>"), LOST,
        (f"<BOS_TOKEN><|START_OF_TURN|><|USER|>Ask<|END_OF_TURN|><|START_OF_TURN|><|CHATBOT|>{THINKS}<|END_OF_TURN|><|START_OF_TURN|><|USER|>More<|END_OF_TURN|><|START_OF_TURN|><|CHATBOT|>", "Cub<|END_OF_TURN|>"),
    ],
    "GLM-4.5": [  # the template ends no turn; the EOS is put
        ("[gMASK]<sop><|user|>\nAsk<|assistant|>", "\n<think></think>\nOwl<|endoftext|>"), ("[gMASK]<sop><|user|>\nAsk<|assistant|>Owl<|user|>\nMore<|assistant|>", "\n<think></think>\nCub<|endoftext|>"),
        ("[gMASK]<sop><|system|>\nSys<|user|>\nAsk<|assistant|>", "\n<think></think>\nOwl<|endoftext|>"), ("[gMASK]<sop><|user|>\nAsk<|assistant|>", "\n<think>Hm</think>\nOwl<|endoftext|>"),
        ("[gMASK]<sop><|user|>\nAsk<|assistant|>", "\n<think>Hm</think>\nOwl<|endoftext|>"), ("[gMASK]<sop><|user|>\nAsk<|assistant|>Owl<|user|>\nMore<|assistant|>", "\n<think></think>\nCub<|endoftext|>"),
    ],
    "Hunyuan": [
        ("<|startoftext|>Ask<|extra_0|>", "Owl<|eos|>"), ("<|startoftext|>Ask<|extra_0|>Owl<|eos|>More<|extra_0|>", "Cub<|eos|>"), ("<|startoftext|>Sys<|extra_4|>Ask<|extra_0|>", "Owl<|eos|>"),
        ("<|startoftext|>Ask<|extra_0|>", "<think>\nHm\n</think>\n<answer>\nOwl<|eos|>"), LOST, ("<|startoftext|>Ask<|extra_0|>Owl<|eos|>More<|extra_0|>", "Cub<|eos|>"),
    ],
    "Nemotron": [
        ("<s><|user|>Ask<|eot|><|assistant|>", "Owl<|eot|>"), ("<s><|user|>Ask<|eot|><|assistant|>Owl<|eot|><|user|>More<|eot|><|assistant|>", "Cub<|eot|>"),
        ("<s><|system|>Sys<|eot|><|user|>Ask<|eot|><|assistant|>", "Owl<|eot|>"), LOST, LOST, ("<s><|user|>Ask<|eot|><|assistant|>Owl<|eot|><|user|>More<|eot|><|assistant|>", "Cub<|eot|>"),
    ],
    "Nemotron Nano": [OPENED] * 6,  # a reply stands in the thought that is opened, and nothing closes it; or a second is opened
    "Kimi": [
        (f"{KIMI}<|im_user|>user<|im_middle|>Ask<|im_end|><|im_assistant|>assistant<|im_middle|>", "Owl<|im_end|>"),
        (f"{KIMI}<|im_user|>user<|im_middle|>Ask<|im_end|><|im_assistant|>assistant<|im_middle|>Owl<|im_end|><|im_user|>user<|im_middle|>More<|im_end|><|im_assistant|>assistant<|im_middle|>", "Cub<|im_end|>"),
        ("<|im_system|>system<|im_middle|>Sys<|im_end|><|im_user|>user<|im_middle|>Ask<|im_end|><|im_assistant|>assistant<|im_middle|>", "Owl<|im_end|>"),
        (f"{KIMI}<|im_user|>user<|im_middle|>Ask<|im_end|><|im_assistant|>assistant<|im_middle|>", f"{THINKS}<|im_end|>"), LOST,
        (f"{KIMI}<|im_user|>user<|im_middle|>Ask<|im_end|><|im_assistant|>assistant<|im_middle|>{THINKS}<|im_end|><|im_user|>user<|im_middle|>More<|im_end|><|im_assistant|>assistant<|im_middle|>", "Cub<|im_end|>"),
    ],
    "Vicuna": [
        ("<s>USER: Ask ASSISTANT:", " Owl</s>"), ("<s>USER: Ask ASSISTANT: Owl</s>USER: More ASSISTANT:", " Cub</s>"), ("<s>Sys USER: Ask ASSISTANT:", " Owl</s>"),
        ("<s>USER: Ask ASSISTANT:", f" {THINKS}</s>"), LOST, (f"<s>USER: Ask ASSISTANT: {THINKS}</s>USER: More ASSISTANT:", " Cub</s>"),
    ],
}
# The same of a template that is told something.
TOLD = {
    ("Qwen3", '{"enable_thinking": false}'): [
        (f"{ASKED}<think>\n\n</think>\n\n", "Owl<|im_end|>"), (f"{ASKED}Owl<|im_end|>\n{GONE_ON}<think>\n\n</think>\n\n", "Cub<|im_end|>"),
        (f"{IM}system\nSys<|im_end|>\n{ASKED}<think>\n\n</think>\n\n", "Owl<|im_end|>"), "is not rendered as the chat so far", "is not rendered as the chat so far",
        (f"{ASKED}Owl<|im_end|>\n{GONE_ON}<think>\n\n</think>\n\n", "Cub<|im_end|>"),
    ],
    ("DeepSeek-V3.1", '{"thinking": true}'): [OPENED] * 6,
    ("gpt-oss", '{"reasoning_effort": "high"}'): [
        cell if isinstance(cell, str) else (cell[0].replace("medium", "high"), cell[1]) for cell in TABLE["gpt-oss"]
    ],
    ("Granite", '{"thinking": true}'): [
        cell if isinstance(cell, str) else (cell[0].replace("2024.", "2024. Think first."), cell[1]) for cell in TABLE["Granite"]
    ],
    ("SmolLM3", '{"enable_thinking": false}'): [
        (SMOL.replace("/think", "/no_think") + ASKED + "<think>\n\n</think>\n\n", "Owl<|im_end|>"),
        (f"{SMOL.replace('/think', '/no_think')}{ASKED}Owl<|im_end|>\n{GONE_ON}<think>\n\n</think>\n\n", "Cub<|im_end|>"),
        (f"{SMOL.replace('/think', '/no_think')}{IM}system\nSys<|im_end|>\n{ASKED}<think>\n\n</think>\n\n", "Owl<|im_end|>"),
        "is not rendered as the chat so far", "is not rendered as the chat so far",
        (f"{SMOL.replace('/think', '/no_think')}{ASKED}Owl<|im_end|>\n{GONE_ON}<think>\n\n</think>\n\n", "Cub<|im_end|>"),
    ],
    ("GLM-4.5", '{"enable_thinking": false}'): [
        ("[gMASK]<sop><|user|>\nAsk/nothink<|assistant|>\n<think></think>", "\nOwl<|endoftext|>"),
        ("[gMASK]<sop><|user|>\nAsk/nothink<|assistant|>Owl<|user|>\nMore/nothink<|assistant|>\n<think></think>", "\nCub<|endoftext|>"),
        ("[gMASK]<sop><|system|>\nSys<|user|>\nAsk/nothink<|assistant|>\n<think></think>", "\nOwl<|endoftext|>"),
        "is not rendered as the chat so far", "is not rendered as the chat so far",
        ("[gMASK]<sop><|user|>\nAsk/nothink<|assistant|>Owl<|user|>\nMore/nothink<|assistant|>\n<think></think>", "\nCub<|endoftext|>"),
    ],
    ("Hunyuan", '{"enable_thinking": false}'): [
        ("<|startoftext|>/no_thinkAsk<|extra_0|>", "Owl<|eos|>"), ("<|startoftext|>/no_thinkAsk<|extra_0|>Owl<|eos|>/no_thinkMore<|extra_0|>", "Cub<|eos|>"),
        ("<|startoftext|>Sys<|extra_4|>/no_thinkAsk<|extra_0|>", "Owl<|eos|>"), ("<|startoftext|>/no_thinkAsk<|extra_0|>", "<think>\nHm\n</think>\n<answer>\nOwl<|eos|>"), LOST,
        ("<|startoftext|>/no_thinkAsk<|extra_0|>Owl<|eos|>/no_thinkMore<|extra_0|>", "Cub<|eos|>"),
    ],
}
EVERY = [(kind, None, cells) for kind, cells in TABLE.items()] + [(kind, told, cells) for (kind, told), cells in TOLD.items()]


@pytest.fixture(scope="module")
def tokenizer_of():
    """tokenizer_of(kind, told=None) -> a tokenizer with the kind's template and EOS, rendering of 2024-07-04."""
    base = tiny_model.train_tokenizer(["Ask Owl More Cub Sys Hm"], vocab_size=280)

    def make(kind, told=None):
        tokenizer = copy.deepcopy(base)
        tokenizer.add_special_tokens({"eos_token": KINDS[kind]["eos"]})
        tokenizer.chat_template = template(KINDS[kind])
        tokenizer.init_kwargs["rendered_on"] = DAY
        if told is not None:
            common.set_template_kwargs(tokenizer, told)
        return tokenizer

    return make


def chat_of(kind, cell):
    chat = CELLS[cell]
    return [*chat[:-1], {**chat[-1], KINDS[kind].get("key", "reasoning_content"): "Hm"}] if cell == "key" else chat


@pytest.mark.parametrize("kind, told, cells", EVERY, ids=[f"{kind} {told or ''}" for kind, told, _ in EVERY])
def test_what_is_learned_of_a_chat_is_what_the_table_says_and_all_stages_read_the_same(kind, told, cells, tokenizer_of, tmp_path):
    tokenizer, cfg = tokenizer_of(kind, told), sft.Config()
    text = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for cell, expected in zip(CELLS, cells, strict=True):
        chat = chat_of(kind, cell)
        row, pair = {"prompt": chat[:-1], "completion": chat[-1:]}, {"chosen": chat, "rejected": [*chat[:-1], {**chat[-1], "content": f"{chat[-1]['content']} no"}]}
        if isinstance(expected, str):
            for encode_row, refused in ((sft.encode_row, row), (reward_model.encode_row, pair)):
                with pytest.raises(ValueError) as error:
                    list(encode_row(refused, tokenizer, [], cfg))
                assert expected in str(error.value), (cell, str(error.value))
                switch = KINDS[kind].get("switch", [""])[0]
                assert expected == NONE or switch in str(error.value) and bool(switch) == ("--chat-template-kwargs" in str(error.value))
            continue
        ((prompt, response),) = sft.encode_row(row, tokenizer, [], cfg)
        assert (text(prompt), text(response)) == expected, cell
        ((chosen, rejected),) = reward_model.encode_row(pair, tokenizer, [], cfg)
        assert chosen == prompt + response and rejected[: len(prompt)] == prompt
        path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": chat[:-1]}])
        (asked,), _ = rows_.load_prompts(ppo.Config(prompts=[path], eval_prompts=[path]), tokenizer)
        assert asked.prompt_ids == prompt


def test_what_a_policy_wrote_is_scored_whatever_the_template_drops_of_it(tokenizer_of):
    """Rows with such words are refused before a run; a response must not end it."""
    tokenizer = tokenizer_of("Nemotron")
    prompt, response = common.encode(tokenizer, [ASK], "Hm</think>Owl", may_drop=True)
    assert tokenizer.decode(prompt + response) == "<s><|user|>Ask<|eot|><|assistant|>Owl<|eot|>"
    model = tiny_lm(vocab_size=len(tokenizer))
    model.config.reward_mean = 0.0
    scorer = scorers.TextScorer("rm", model, tokenizer, 4)
    assert scorer.encode({"prompt": [ASK]}, "Hm</think>Owl") == {"input_ids": prompt + response}


def test_of_several_turns_only_the_last_needs_its_thought(tokenizer_of):
    tokenizer = tokenizer_of("Qwen3")
    common.notes.clear()
    _, ids = common.encode(tokenizer, [ASK], [THOUGHT, MORE, {**THOUGHT, "content": "<think>Hm</think>Cub"}])
    assert tokenizer.decode(ids) == f"Owl<|im_end|>\n{GONE_ON}<think>\nHm\n</think>\n\nCub<|im_end|>"
    assert [*common.notes] == ["with words of an earlier turn, thoughts say, that the template drops"]
    with pytest.raises(ValueError, match="drops, from 'Hm Cub' on"):  # though the first turn has the same word
        common.encode(tokenizer_of("ChatML"), [ASK], [assistant("Hm"), MORE, {**CUB, "reasoning_content": "Hm"}])


# === --chat-template-kwargs =======================================================================
VALUES = [
    True, False, None, 0, -7, 2**70, 1.5, -1e-7, 1e22, "", "high", "it's \"so\"", "#} {% x %} {# {{ y }} #}\n", common.DEFAULTS[1], "a\\n\\x23#\t\r\n\x00\u2028", "caf\xe9 \u9f99 \U0001f989",
    [], [1, [None, "#"]], {}, {"a": {"#'": [False]}},
]
BODY = "{% macro told() %}<{{ x }}>{% endmacro %}{{ told() }}{% for m in messages %}{{ x | tojson }}{% if x is defined and x %}!{% endif %}{% endfor %}\n\n{{ x }}\n"
BEGINNINGS = [
    "", "\n", "\n\n", "  ", " {% if x is defined %}a{% endif %}", "{%- set y = 1 %}\n", "{%- if true %}b{% endif %}\n ", "{#- c -#}\n", "\n{{- 'd' }}", "{%+ if true %}e{%+ endif %}",
    "{% if x is not defined %}{% set x = 'own' %}{% endif %}\n", "{%- set z = x | default('own') -%}  {{ z }}", "{%- set x = x | default('own') %}", "{% generation %}f{% endgeneration %}{% for i in [1, 2] %}{% break %}{% endfor %}",
]
OTHER_DAY = datetime.datetime(2031, 2, 3)


def rendered(tokenizer, **told):
    return tokenizer.apply_chat_template([ASK, OWL], tokenize=False, **told)


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_values_written_into_a_template_render_as_if_they_were_passed_and_may_be_passed_still(beginning, tokenizer_of, tmp_path):
    bare, told = tokenizer_of("ChatML"), tokenizer_of("ChatML")
    bare.chat_template = told.chat_template = beginning + BODY
    for value in VALUES:
        common.set_template_kwargs(told, json.dumps({"x": value}))
        assert rendered(told) == rendered(bare, x=value) and rendered(told, x="passed") == rendered(bare, x="passed")
        common.set_template_kwargs(told, json.dumps({"x": value}, ensure_ascii=False))  # again: in place of the same
        assert told.chat_template.count("set x = ") == 1 + beginning.count("set x = ")
        told.save_pretrained(tmp_path / "told")
        assert rendered(AutoTokenizer.from_pretrained(tmp_path / "told")) == rendered(bare, x=value)
    common.set_template_kwargs(told, "{}")
    assert told.chat_template == bare.chat_template


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "switch" in KINDS[kind]])
def test_every_switch_renders_as_if_it_were_passed(kind, tokenizer_of):
    bare, (name, default, changes) = tokenizer_of(kind), KINDS[kind]["switch"]
    texts = {}
    for value, opens in itertools.product(changes, (False, True)):
        told = tokenizer_of(kind, json.dumps({name: value}))
        texts[value, opens] = told.apply_chat_template([ASK], tokenize=False, add_generation_prompt=opens)
        assert texts[value, opens] == bare.apply_chat_template([ASK], tokenize=False, add_generation_prompt=opens, **{name: value})
    assert len({texts[value, True] for value in changes}) == len(changes)  # the switch is not ignored
    assert texts[default, True] == bare.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    assert common.template_arguments(bare) == [name]


@pytest.mark.parametrize("told, problem", [
    ('{"enable_thinking": false', "is not JSON"), ("", "is not JSON"), ("[1]", "is no JSON object"), ("null", "is no JSON object"), ('"enable_thinking"', "is no JSON object"),
    ('{"enable_thinking": NaN}', "is not JSON"), ('{"enable_thinking": 1e999}', "is not JSON"), ("[" * 100_000, "is not JSON"),
    ('{"enable_thinkin": false}', "'enable_thinkin' is nothing that the chat template can be told; it can: enable_thinking"),
    *((f'{{"enable_thinking": true, "{name}": 1}}', f"{name!r} is nothing that the chat template can be told; it can: enable_thinking") for name in (
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "raise_exception", "strftime_now", "m", "loop", "reply", "range", "true", "a b", "", "role",
    )),
])
def test_arguments_that_a_template_cannot_be_told_are_refused(told, problem, tokenizer_of):
    tokenizer = tokenizer_of("Qwen3")
    before = tokenizer.chat_template = "{{ bos_token }}{{ documents }}{{ continue_final_message }}" + tokenizer.chat_template
    with pytest.raises(common.UserError) as error:
        common.set_template_kwargs(tokenizer, told)
    assert problem in str(error.value) and tokenizer.chat_template == before


@pytest.mark.parametrize("text, problem", [(None, "the tokenizer has no chat template"), ("{% if", "the chat template is none: "), ("a", "it can: nothing")])
def test_a_template_that_knows_no_arguments_is_told_none(text, problem, tokenizer_of):
    tokenizer = tokenizer_of("ChatML")
    tokenizer.chat_template = text
    with pytest.raises(common.UserError) as error:
        common.set_template_kwargs(tokenizer, '{"x": 1}')
    assert problem in str(error.value)


@pytest.mark.parametrize("text, names", [
    ("{%- set x = x | default('own') %}{{ x }}", ["x"]), ("{{ messages[0].x }}{{ x(bos_token) if x is defined }}", ["x"]), ("{% if x is undefined %}{% set x = 1 %}{% endif %}", ["x"]),
    ("{% for m in messages %}{% set x = m.y %}{% if m %}{% set x = 'a' %}{% endif %}{{ x }}{% endfor %}", []), ("x {# y #} {% macro x(y) %}{{ y }}{% endmacro %}{{ x(1) }}", []),
])
def test_what_a_template_can_be_told_is_what_it_reads_and_does_not_make_itself(text, names, tokenizer_of):
    tokenizer = tokenizer_of("ChatML")
    tokenizer.chat_template = text
    assert common.template_arguments(tokenizer) == names


def test_of_several_templates_each_is_told(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("ChatML")
    tokenizer.chat_template = several = {"default": "D{{ x }}{{ y }}", "tool_use": "T{{ x }}"}
    common.set_template_kwargs(tokenizer, '{"x": "1"}')
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert rendered(loaded, y=2) == "D12" and common.render_chat(loaded, [ASK], tools=[{"type": "function"}]) == "T1"
    common.set_template_kwargs(loaded, "{}")
    assert loaded.chat_template == several


# === The date =====================================================================================
def test_the_day_of_the_first_stage_is_kept_and_the_saved_template_stays_live(tokenizer_of, tmp_path, monkeypatch):
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(2024, 7, 4)

    class Later(datetime.datetime):
        @classmethod
        def now(cls):
            return OTHER_DAY

    live = tokenizer_of("Llama 3")
    live.init_kwargs.pop("rendered_on")
    live.save_pretrained(tmp_path / "hub")
    monkeypatch.setattr(common.datetime, "date", Day)
    first = common.load_tokenizer(str(tmp_path / "hub"))
    first.save_pretrained(tmp_path / "sft")
    Day.today = classmethod(lambda cls: cls(2025, 1, 1))
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Later)
    for folder, expected in (("sft", "04 Jul 2024"), ("hub", "01 Jan 2025")):
        tokenizer = common.load_tokenizer(str(tmp_path / folder))
        assert f"Today Date: {expected}<" in tokenizer.decode(common.encode(tokenizer, [ASK])[0])
        assert tokenizer.chat_template == live.chat_template and "Today Date: 03 Feb 2031<" in rendered(tokenizer)
    undated = tokenizer_of("ChatML")
    undated.init_kwargs.pop("rendered_on")
    undated.save_pretrained(tmp_path / "none")
    assert "rendered_on" not in common.load_tokenizer(str(tmp_path / "none")).init_kwargs


def test_a_run_that_goes_on_on_another_day_keeps_its_own(tokenizer_of, tmp_path, run_stage, monkeypatch):
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(2024, 7, 4)

    tokenizer, seen = tokenizer_of("Llama 3"), []
    tokenizer.init_kwargs.pop("rendered_on")
    a_model(KINDS["Llama 3"], tokenizer, tmp_path / "hub")
    (tmp_path / "reward.py").write_text("def length(prompts, responses, rows):\n    return [float(len(text)) for text in responses]\n")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": [ASK]}] * 8)
    monkeypatch.setattr(common.datetime, "date", Day)
    original = ppo.sample_responses
    monkeypatch.setattr(ppo, "sample_responses", lambda policy, rows, *rest: seen.append(tokenizer.decode(rows[0].prompt_ids)) or original(policy, rows, *rest))
    flags = ["--policy", tmp_path / "hub", "--reward", f"{tmp_path / 'reward.py'}:length", "--prompts", prompts, "--eval-prompts", prompts]
    flags += ["--batch-size", 4, "--minibatch-size", 4, "--response-length", 4, "--iterations", 1, "--device", "cpu", "--output", tmp_path / "out"]
    assert run_stage(ppo, *flags)[0] == 0
    Day.today = classmethod(lambda cls: cls(2025, 1, 1))
    assert run_stage(ppo, "--resume", "--iterations", 2, "--output", tmp_path / "out")[0] == 0
    assert len(seen) > 2 and all("Today Date: 04 Jul 2024<" in prompt for prompt in seen)


def test_each_stage_ends_with_one_line_where_it_cannot_tell_the_template(world, tmp_path, run_stage, tokenizer_of):
    a_model(KINDS["Qwen3"], tokenizer_of("Qwen3"), tmp_path / "hub")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": [ASK]}] * 8)
    for stage, flag, value in ((sft, "--model", tmp_path / "hub"), (reward_model, "--model", tmp_path / "hub"), (ppo, "--policy", tmp_path / "hub")):
        status, _, err = run_stage(stage, flag, value, "--output", tmp_path / "out", "--chat-template-kwargs", '{"thinking": false}', *(["--prompts", prompts] if stage is ppo else []))
        assert status == 2 and err == (
            f"{stage.__name__}.py: error: --chat-template-kwargs {{\"thinking\": false}}: 'thinking' is nothing that the chat template can be told; it can: enable_thinking\n"
        )
    status, _, err = run_stage(sft, "--output", tmp_path / "out", "--chat-template-kwargs", "{}")  # from scratch
    assert (status, err) == (2, "sft.py: error: --chat-template-kwargs {}: the tokenizer has no chat template\n")


# === From the first stage to the last =============================================================
R1 = KINDS["DeepSeek-R1"] | dict(inline="split", thought="<think>\n{}\n</think>\n\n", switch=("thinking", False, {True: {}, False: dict(opens="<|Assistant|>")}))
END_TO_END = {  # kind, flag of the first stage, the reply's other keys, its content, prompt and response as each stage's model sees them
    "a switch, as Qwen3's": (KINDS["Qwen3"], '{"enable_thinking": false}', {}, "Owl", f"{ASKED}<think>\n\n</think>\n\n", "Owl<|im_end|>"),
    "channels, as gpt-oss's": (
        KINDS["gpt-oss"], '{"reasoning_effort": "high"}', {"thinking": "Hm"}, "Owl",
        "<|start|>system<|message|>Date: 2024-07-04 Reasoning: high<|end|><|start|>user<|message|>Ask<|end|><|start|>assistant",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Owl<|return|>",
    ),
    "an opened thought, as R1's": (R1, '{"thinking": true}', {}, "<think>\nHm\n</think>\n\nOwl", "<|bos|><|User|>Ask<|Assistant|><think>\n", "Hm\n</think>\n\nOwl<|eos|>"),
}


def a_model(kind, tokenizer, folder):
    """A folder with a tiny policy of random weights that has a token for each mark of the kind."""
    marks = [word for form in (kind["user"], kind["reply"], kind.get("thought", "")) for word in form.replace("{}", " ").replace("\n", " ").replace("><", "> <").split() if word[0] == "<"]
    tokenizer.add_tokens(marks)
    tokenizer.chat_template = template(kind)
    model = tiny_lm(vocab_size=len(tokenizer), max_position_embeddings=256)
    common.set_generation_defaults(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", END_TO_END)
def test_what_the_first_stage_is_told_holds_to_the_last(name, tokenizer_of, tmp_path, run_stage, monkeypatch):
    kind, told, more, content, prompt, response = END_TO_END[name]
    tokenizer = tokenizer_of(next((known for known in KINDS if KINDS[known] == kind), "DeepSeek-R1"))
    a_model(kind, tokenizer, tmp_path / "hub")
    seen = {}  # what each stage's model was given, ids

    def spy(module, function, stage, ids_of):
        original = getattr(module, function)

        def spied(*args, **kwargs):
            result = original(*args, **kwargs)
            seen.setdefault(stage, ids_of(args, result))
            return result

        monkeypatch.setattr(module, function, spied)

    spy(sft, "completion_nll", "sft.py", lambda args, _: args[1][0][args[2][0]].tolist())
    spy(reward_model, "pair_scores", "reward_model.py", lambda args, _: args[1][0][0])
    spy(ppo, "sample_responses", "ppo.py", lambda args, result: result[0][0][result[1][0]].tolist())
    spy(scorers.TokenScorer, "__call__", "ppo.py's reward", lambda args, _: args[1][0][args[2][0]].tolist())
    reply, no = assistant(content, **more), assistant(f"{content} no", **more)
    data = write_rows(tmp_path / "sft.jsonl", [{"messages": [ASK, reply]}] * 8)
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": [ASK], "chosen": [reply], "rejected": [no]}] * 8)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": [ASK]}] * 8)
    common_flags = ["--device", "cpu", "--batch-size", 4]
    folder = lambda stage: tmp_path / stage
    stages = (
        (sft, "--model", folder("hub"), "--data", data, "--eval-data", data, "--epochs", 1, "--output", folder("sft"), "--chat-template-kwargs", told),
        (reward_model, "--model", folder("sft"), "--data", pairs, "--eval-data", pairs, "--output", folder("rm")),
        (ppo, "--policy", folder("sft"), "--reward", folder("rm"), "--prompts", prompts, "--eval-prompts", prompts, "--iterations", 2, "--minibatch-size", 4,
         "--response-length", 6, "--output", folder("ppo")),
        (ppo, "--resume", "--iterations", 3, "--output", folder("ppo")),
    )
    for stage, *flags in stages:
        status, out, err = run_stage(stage, *flags, *(common_flags if "--resume" not in flags else []))
        assert status == 0, err
    learned = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for stage, ids in seen.items():
        print(f"{name}, {stage}: {tokenizer.decode(ids[: len(start)])!r} + {tokenizer.decode(ids[len(start) :])!r}")
        assert ids == learned if stage in ("sft.py", "reward_model.py") else ids[: len(start)] == start
    assert seen["ppo.py"] == seen["ppo.py's reward"] and len(seen) == 4
    result = AutoTokenizer.from_pretrained(folder("ppo"))
    assert result.init_kwargs.get("rendered_on") == DAY and result.chat_template == AutoTokenizer.from_pretrained(folder("sft")).chat_template
    assert result.chat_template.endswith(template(kind)) and len(read_rows(folder("ppo") / "metrics.jsonl")) >= 3


def test_adapters_that_resume_keep_the_tokenizer_of_their_checkpoint_and_the_weights_of_their_base(world, tmp_path):
    shutil.copytree(world / "sft", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    path = tmp_path / "checkpoint" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rendered_on": "2024-07-04"}))
    cfg = sft.Config(model=str(world / "sft"), lora_rank=2)
    model, tokenizer = sft.load_model(cfg, str(tmp_path / "checkpoint"), [])
    assert tokenizer.init_kwargs["rendered_on"] == "2024-07-04" and model.num_parameters() > 0


def test_half_a_character_is_no_value():
    tokenizer = types.SimpleNamespace(chat_template="{{ mood }}")
    with pytest.raises(common.UserError, match="is not JSON"):
        common.set_template_kwargs(tokenizer, '{"mood": "\\ud800"}')
