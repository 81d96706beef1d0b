"""What is learned, scored and shown is the text of the row, whatever the tokenizer; the oracle is the tokenizer on whole texts."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import common
import ppo
import sft
from data import tiny_model
from plumbing.rows import convert

TEXTS = ["her room. She was happy", "do not eat the cabbage, they said", "yes ! a fox meets an owl ?"] * 20
LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyzS .,!?\n\u2581"))
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<tag>"]


def sentencepiece(legacy):
    """As in tokenizer.json of Llama 2 (a space before every text by the normalizer), or of its like since (Metaspace, first)."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, initial_alphabet=LETTERS, show_progress=False))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        core.pre_tokenizer = None
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return core


def unigram():
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=LETTERS, show_progress=False))
    return core


def wordpiece():
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    core.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, initial_alphabet=LETTERS, show_progress=False))
    return core


def byte_level():
    return tiny_model.train_tokenizer(TEXTS, 320).backend_tokenizer


CORES = {"Llama 2": lambda: sentencepiece(True), "Metaspace, first": lambda: sentencepiece(False), "Unigram": unigram, "WordPiece": wordpiece, "byte-level": byte_level}


def make(kind, **options):
    core = CORES[kind]()
    special = dict(eos_token="<|end|>", pad_token="<|pad|>") if kind == "byte-level" else dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tag>"]})
    return tokenizer


everywhere = pytest.mark.parametrize("kind", CORES)
text_of = lambda tokenizer, ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@everywhere
@pytest.mark.parametrize("prompt, response", [("her room.", " She was happy"), ("do not eat", " the cabbage, they said"), ("", "a fox"), ("yes !\n", "an owl ?")])
def test_a_response_goes_on_with_the_texts_own_tokens(kind, prompt, response):
    tokenizer = make(kind)
    whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    common.notes.clear()
    prompt_ids, response_ids = common.encode(tokenizer, prompt, response)
    assert prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"] and not common.notes
    assert prompt_ids + response_ids == whole + [tokenizer.eos_token_id]


@everywhere
@pytest.mark.parametrize("prompt, response", [("her room. Sh", "e was happy"), ("a fox meets an o", "wl ?"), ("her room. ", "She was"), ("ca", "bbage")])
def test_where_tokens_cross_the_border_the_text_stays_the_text_and_the_row_is_counted(kind, prompt, response):
    tokenizer = make(kind)
    whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    common.notes.clear()
    prompt_ids, response_ids = common.encode(tokenizer, prompt, response)
    assert prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]  # PPO has no more
    assert text_of(tokenizer, prompt_ids + response_ids[:-1]) == text_of(tokenizer, whole)  # no space put in or lost
    crosses = whole[: len(prompt_ids)] != prompt_ids
    assert sum(common.notes.values()) == crosses and all("across the border" in note for note in common.notes)
    if kind == "byte-level":
        assert text_of(tokenizer, whole) == prompt + response


@everywhere
def test_a_decoded_response_is_what_it_adds_to_the_prompt_with_its_tags_and_without_eos(kind):
    tokenizer = make(kind, clean_up_tokenization_spaces=True)
    for prompt, response in (("her room.", " She was happy ?"), ("do not eat", " <tag>the cabbage, they said")):
        prompt_ids, response_ids = common.encode(tokenizer, prompt, response)
        text = common.decode(tokenizer, prompt_ids, [*response_ids, tokenizer.pad_token_id])
        assert text == text_of(tokenizer, prompt_ids + response_ids[:-1])[len(text_of(tokenizer, prompt_ids)) :]
        assert ("<tag>" in text) == ("<tag>" in response) and tokenizer.eos_token not in text
        if kind in ("byte-level", "Llama 2", "Metaspace, first") and "<tag>" not in response:
            assert text == response


def test_the_texts_of_a_rollout_end_before_any_eos_and_without_padding():
    tokenizer = make("byte-level")
    prompt, response = common.encode(tokenizer, "a fox meets", " an owl")
    tokens, attention_mask = common.pad([prompt + response, prompt + response[:2]], tokenizer.pad_token_id, "right")
    response_mask, ended = attention_mask[:, len(prompt) :], torch.tensor([True, False])
    texts = ppo.decode_responses(tokens, attention_mask, response_mask, ended, tokenizer)
    assert texts == [" an owl", tokenizer.decode(response[:2])]
    tokens[0, -1] = 7  # another EOS of the model's: `ended` says it
    assert ppo.decode_responses(tokens, attention_mask, response_mask, ended, tokenizer) == texts


@pytest.mark.parametrize("tail", ["", "<|end|>", "<|end|>\n", "<|end|><|end|> \n"])
def test_a_string_that_ends_in_eos_gets_no_second_one(tail):
    tokenizer = make("byte-level")
    expected = common.encode(tokenizer, "a fox", " meets an owl")
    assert common.encode(tokenizer, "a fox", " meets an owl" + tail) == expected
    assert common.encode(tokenizer, "a fox", " meets\n")[1].count(tokenizer.eos_token_id) == 1  # white space alone is text


def test_text_behind_an_eos_is_counted():
    tokenizer = make("byte-level")
    common.notes.clear()
    _, ids = common.encode(tokenizer, "a fox", " meets<|end|> an owl")
    assert ids.count(tokenizer.eos_token_id) == 2 and [*common.notes] == ["with text behind an EOS, where no response gets"]


def test_texts_begin_as_the_tokenizer_begins_them_bos_or_not():
    """GLM begins every text with two tokens, neither of them a BOS by name."""
    tokenizer = make("byte-level")
    tokenizer.add_tokens(["[gMASK]", "<sop>"], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", ids[0]), ("<sop>", ids[1])])
    prompt_ids, _ = common.encode(tokenizer, "a fox", " meets")
    assert prompt_ids == tokenizer("a fox")["input_ids"] and prompt_ids[:2] == ids
    assert common.encode(tokenizer, "[gMASK]<sop>a fox", " meets")[0] == prompt_ids


def test_the_line_about_the_rows_counts_those_whose_tokens_cross_the_border(capsys):
    from plumbing.rows import Row

    tokenizer, rows = make("byte-level"), [Row(prompt="her room. ", completion="She was"), Row(prompt="her room.", completion=" She was")]
    for number, row in enumerate(rows, 1):
        row.path, row.line = "mine.jsonl", number
    cfg = sft.Config()
    assert len(convert(rows, lambda row: sft.encode_row(row, tokenizer, [], cfg))) == 2
    assert "2 rows read, 2 examples used; 1 with a token across the border" in capsys.readouterr().out
