"""What is learned, scored and shown is the text of the row, whatever the tokenizer.

The oracle is the tokenizer on whole texts.
"""

import pytest
import torch
from conftest import tiny_lm
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import common
import harness
import ppo
from data import tiny_model

TEXTS = ["her room. She was happy", "do not eat the cabbage, they said", "yes ! a fox meets an owl ?"] * 20
KINDS = ["Llama 2", "Metaspace, first", "Unigram", "byte-level"]


def make(kind, **options):
    """Returns a tokenizer of a kind. Llama 2 puts a space before every text by its normalizer."""
    if kind == "byte-level":
        core = tiny_model.train_tokenizer(TEXTS, 320).backend_tokenizer
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", **options)
    settings = dict(
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False, vocab_size=120,
        initial_alphabet=sorted({*"abcdefghijklmnopqrstuvwxyzS .,!?\n\u2581"}),
    )
    if kind == "Unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**settings | dict(vocab_size=80, unk_token="<unk>"))
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        parts = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(parts)
        trainer = trainers.BpeTrainer(**settings)
    core.train_from_iterator(TEXTS, trainer)
    if kind == "Llama 2":
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif kind == "Metaspace, first":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    options |= dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_continues_with_the_texts_own_tokens_and_where_they_cross_it_is_counted(kind):
    tokenizer, crossings = make(kind), 0
    for prompt, response, may_cross in (
        ("her room.", " She was happy", False), ("do not eat", " the cabbage, they said", False), ("", "a fox", False),
        ("yes !\n", "an owl ?", False), ("her room. Sh", "e was happy", True), ("a fox meets an o", "wl ?", True),
        ("her room. ", "She was", True), ("ca", "bbage", True),
    ):
        whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
        common.notes.clear()
        prompt_ids, response_ids = common.encode(tokenizer, prompt, response)
        assert prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]  # as PPO's
        assert response_ids.pop() == tokenizer.eos_token_id
        crosses = whole[: len(prompt_ids)] != prompt_ids
        assert may_cross or prompt_ids + response_ids == whole
        texts = tokenizer.batch_decode([prompt_ids + response_ids, whole], clean_up_tokenization_spaces=False)
        assert texts[0] == texts[1]  # no space added or lost
        assert sum(common.notes.values()) == crosses
        assert all("across the border" in note for note in common.notes)
        crossings += crosses
    assert crossings >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoded_response_is_what_it_adds_to_the_prompt_with_tags_and_without_eos(kind):
    tokenizer = make(kind, clean_up_tokenization_spaces=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tag>"]})
    for prompt, response in (("her room.", " She was ?"), ("do not eat", " <tag>the cabbage")):
        prompt_ids, response_ids = common.encode(tokenizer, prompt, response)
        text = common.decode(tokenizer, prompt_ids, [*response_ids, tokenizer.pad_token_id])
        whole = tokenizer.decode(prompt_ids + response_ids[:-1], clean_up_tokenization_spaces=False)
        before = tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
        assert before + text == whole and ("<tag>" in text) == ("<tag>" in response)
        if kind != "Unigram" and "<tag>" not in response:
            assert text == response


def test_a_pad_token_that_is_an_ordinary_word_goes_at_the_end_only():
    tokenizer = make("byte-level")
    tokenizer.pad_token = "!"
    prompt_ids, response_ids = common.encode(tokenizer, "Help", "! Oh! Run")
    assert common.decode(tokenizer, prompt_ids, response_ids + [tokenizer.pad_token_id] * 3) == "! Oh! Run"


def test_the_texts_of_a_rollout_end_before_any_eos_and_without_padding(monkeypatch):
    tokenizer = make("byte-level")
    prompt_ids, response = common.encode(tokenizer, "a fox meets", " an owl")
    policy, pad = tiny_lm(vocab_size=len(tokenizer)), tokenizer.pad_token_id
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]  # the model has two
    policy.generation_config.pad_token_id = pad
    cut = [*response[:-1], response[0]]  # no EOS came
    sampled = torch.tensor([response, [*response[:-1], 7], [response[0], 7, *response[2:]], cut])
    sampled[2, 2:] = pad

    def generate(*arguments):
        return sampled, torch.zeros(sampled.shape)

    monkeypatch.setattr(common, "generate_responses", generate)
    row = harness.Row(prompt="a fox meets")
    row.prompt_ids = prompt_ids
    rollout = ppo.sample_responses(policy, tokenizer, [row] * 4, len(response), 1.0, None)
    assert rollout.finished.tolist() == [True, True, True, False]
    first = tokenizer.decode(response[:1])
    assert rollout.texts == [" an owl", " an owl", first, " an owl" + first]


def test_one_eos_ends_a_string_what_follows_it_is_cut_and_an_earlier_one_is_text():
    tokenizer = make("byte-level")
    expected = common.encode(tokenizer, "a fox", " meets an owl")
    for tail in ("", "<|end|>", "<|end|>\n", "<|end|><|end|> \n"):
        assert common.encode(tokenizer, "a fox", " meets an owl" + tail) == expected
    _, ids = common.encode(tokenizer, "a fox", " meets\n")  # white space before no EOS is text
    assert tokenizer.decode(ids) == " meets\n<|end|>"
    _, ids = common.encode(tokenizer, "a fox", " meets<|end|> an owl")
    assert tokenizer.decode(ids) == " meets<|end|> an owl<|end|>"


def test_texts_begin_as_the_tokenizer_begins_them_with_a_bos_or_not():
    """GLM begins every text with two tokens, neither of them a BOS by name."""
    tokenizer = make("byte-level")
    tokenizer.add_tokens(["[gMASK]", "<sop>"], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", ids[0]), ("<sop>", ids[1])]
    )
    prompt_ids, _ = common.encode(tokenizer, "a fox", " meets")
    assert prompt_ids == tokenizer("a fox")["input_ids"] and prompt_ids[:2] == ids
    assert common.encode(tokenizer, "[gMASK]<sop>a fox", " meets")[0] == prompt_ids
