"""Chat templates of today's kinds: what is learned of a chat, what they are told by --chat-template-kwargs, and their date."""

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
OPENED = "ends the prompt, a thought that the reply has not"
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
