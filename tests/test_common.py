"""Padding, token ids, loading models, precision, and the sampling loop."""

import contextlib
import json
import math

import pytest
import torch
from conftest import tiny_lm, tiny_scalar
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

import common
from data import tiny_model


def test_padding_goes_to_the_given_side_and_positions_skip_it():
    for side, ids, attended, positions, last in (
        ("left", [[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]], [[0, 1, 2], [0, 0, 0]], [2, 2]),
        ("right", [[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]], [[0, 1, 2], [0, 0, 0]], [2, 0]),
    ):
        tokens, mask = common.pad([[5, 6, 7], [8]], 0, side)
        assert tokens.tolist() == ids and mask.dtype == torch.bool and mask.int().tolist() == attended
        assert common.position_ids(mask).tolist() == positions and common.last_token_index(mask).tolist() == last


def test_a_tokenizer_that_writes_bos_and_eos_itself_gives_one_of_each():
    tokenizer = tiny_model.train_tokenizer(["a fox sees a cub"] * 9, 300)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", bos), ("<|end|>", eos)]
    )
    plain = tokenizer(["a fox", " sees a cub"], add_special_tokens=False)["input_ids"]
    for prompt in ("a fox", "<|start|>a fox"):
        assert common.encode(tokenizer, prompt, " sees a cub") == ([bos, *plain[0]], [*plain[1], eos])
    assert common.encode(tokenizer, "a fox") == ([bos, *plain[0]], [])  # what PPO has before it samples
    assert common.encode(tokenizer, "")[0] == [bos]


@pytest.mark.parametrize("pad_token", [None, "<|end|>"])
def test_a_policy_without_a_pad_of_its_own_is_padded_with_eos_and_keeps_its_vocabulary(tmp_path, pad_token):
    tokenizer = tiny_model.train_tokenizer(["a fox sees a cub"] * 9, 300)
    tokenizer.pad_token = pad_token
    size = len(tokenizer)
    for part in (tokenizer, tiny_lm(vocab_size=size)):
        part.save_pretrained(tmp_path)
    loaded = common.load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id and len(loaded) == size
    policy = common.load_causal_lm(str(tmp_path), loaded)
    assert policy.get_input_embeddings().num_embeddings == size
    assert policy.generation_config.pad_token_id == policy.config.pad_token_id == loaded.pad_token_id


@pytest.mark.parametrize("pad_token, tokens, expected", [
    ("<|pad|>", [], "<|pad|>"), (None, ["<|reserved_0|>", "<|image|>"], "<|reserved_0|>"),
    ("<|endoftext|>", ["<|im_end|>"], "<|endoftext|>"),  # another token ends its texts
    (None, ["<|image|>"], "<|pad|>"),  # nothing that is clearly unused
])
def test_a_reward_models_pad_token_is_an_unused_one_before_a_new_one(pad_token, tokens, expected):
    core = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    end = "<|im_end|>" if "<|im_end|>" in tokens else "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=pad_token)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    size = len(tokenizer)
    common.give_pad_token(tokenizer)
    assert tokenizer.pad_token == expected and tokenizer.pad_token != tokenizer.eos_token
    assert len(tokenizer) == size + (expected == "<|pad|>" and pad_token is None)


def test_a_tokenizer_without_eos_and_what_is_no_hub_id_are_refused(tmp_path, capsys):
    tokenizer = tiny_model.train_tokenizer(["a"], 300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="no EOS token"):
        common.load_tokenizer(str(tmp_path))
    for path in ("", "./nothing", "a/b/c", "C:\\x", "../x", "/no/where"):
        with pytest.raises(common.UserError, match="there is no folder"):
            common.load_tokenizer(path)
    assert "hub" not in capsys.readouterr().out


def test_all_eos_ids_of_the_model_end_a_text():
    tokenizer, model = tiny_model.train_tokenizer(["a"], 300), tiny_lm(vocab_size=300)
    for stored, expected in (([7, 1, 9], [1, 7, 9]), (7, [1, 7]), (None, [1])):
        model.generation_config.eos_token_id = stored
        assert common.eos_token_ids(tokenizer, model) == expected


def test_no_stored_generation_settings_and_no_stored_dtype_reach_a_loaded_model(world, tmp_path):
    tokenizer = common.load_tokenizer(str(world / "sft"))
    model = common.load_causal_lm(str(world / "sft"), tokenizer)
    stored = dict(top_k=2, top_p=0.1, repetition_penalty=3.0, min_new_tokens=5, temperature=9.0)
    model.generation_config.update(**stored)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["top_k"] == 2
    loaded = common.load_causal_lm(str(tmp_path), tokenizer)
    settings = loaded.generation_config
    assert (settings.top_k, settings.top_p, settings.temperature) == (0, 1.0, 1.0)
    assert settings.do_sample is True and settings.min_new_tokens is None
    assert settings.repetition_penalty in (None, 1.0)
    scalar, head_is_new = common.load_scalar_model(str(tmp_path), tokenizer)
    assert loaded.dtype == scalar.dtype == torch.float32 and head_is_new is True
    assert common.load_scalar_model(str(world / "reward_model"), tokenizer)[1] is False


@pytest.mark.parametrize("dtype", ["bf16", "auto", "float32"])
def test_precision_is_that_of_autocast_without_a_context_and_scores_have_a_float32_head(dtype, monkeypatch):
    """The oracle is torch.autocast around the calls of models that `to_device` has not seen."""
    (tokens, mask), is_bf16 = common.pad([[5, 6, 7], [6]], 0, "left"), dtype == "bf16"
    sample_tokens, seen = common.sample_tokens, []

    def keep_logits(logits, *arguments):
        seen.append(logits)
        return sample_tokens(logits, *arguments)

    policy, scalar = tiny_lm(), tiny_scalar()
    for model in (policy, scalar):
        common.to_device(model, torch.device("cpu"), dtype)
    monkeypatch.setattr(common, "sample_tokens", keep_logits)
    logits = common.forward(policy, tokens, mask).logits
    common.generate_responses(policy, tokens, mask, 5, 1.0, torch.Generator().manual_seed(0))
    scores = common.token_scores(scalar, tokens, mask)
    assert not torch.is_autocast_enabled("cpu") and scores.dtype == torch.float32
    assert {x.dtype for x in (logits, *seen)} == {torch.bfloat16 if is_bf16 else torch.float32}
    policy, scalar = tiny_lm(), tiny_scalar()
    monkeypatch.setattr(common, "autocast", contextlib.nullcontext)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        inputs = dict(attention_mask=mask, position_ids=common.position_ids(mask))
        hidden = scalar.model(tokens, **inputs).last_hidden_state.float()
        assert torch.equal(policy(tokens, **inputs).logits, logits)
        common.generate_responses(policy, tokens, mask, 5, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal((torch.nn.functional.linear(hidden, scalar.score.weight)[..., 0] - 0.25) / 2, scores)
    assert len(seen) == 10 and all(torch.equal(a, b) for a, b in zip(seen[:5], seen[5:]))


# === Sampling =====================================================================================
def test_sampling_by_inversion_reaches_rare_tokens_and_no_impossible_one():
    """A token of probability 3e-9 behind 2^20 - 1 likely ones has its own share of its block."""
    size, top = 2**20, 2**31 - 1
    logits = torch.zeros(1, size)
    logits[0, [7, -1]] = torch.tensor([-math.inf, math.log(size * 3e-9)])
    share = 3e-9 * size / (127 + 3e-9 * size)  # of the last token in the last block of 128 ids
    for block, in_block, expected in (
        (0, 0, 0), (0, 6.5 / 127, 6), (0, 7.5 / 127, 8), (top, 1, size - 1), (top, 1 - 0.9 * share, size - 1),
        (top, 1 - 1.1 * share, size - 2),
    ):
        uniform = torch.tensor([[block, min(int(in_block * 2**31), top)]])
        drawn, logprob = common.sample_tokens(logits, 1.0, uniform)
        exact = logits.double().log_softmax(-1)[0, expected].item()
        assert drawn.item() == expected and logprob.item() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 300])
def test_evenly_spread_numbers_draw_each_token_as_often_as_its_probability(size):
    """A grid of 512 x 512 pairs in place of random ones: only its width is left of the error."""
    logits = 2 * torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    grid = torch.arange(512) * 2**22 + 2**21
    pairs = torch.cartesian_prod(grid, grid)
    drawn, _ = common.sample_tokens(logits.expand(len(pairs), -1), 0.7, pairs)
    found = torch.bincount(drawn, minlength=size).double() / len(pairs)
    p = (logits.double() / 0.7).softmax(-1)[0]
    blocks = torch.arange(size) // 128
    of_block = torch.zeros(3, dtype=torch.float64).index_add(0, blocks, p)[blocks]
    assert len(found) == size
    assert ((found - p).abs() <= (1.01 * (of_block + p / of_block) + 1 / 512) / 512).all()


def test_there_are_as_many_columns_as_the_longest_response_has_tokens():
    """Which rows have finished is read every fourth token only; what follows is cut off."""
    model, widths = tiny_lm(), set()
    model.generation_config.eos_token_id = [1, 2, 3]
    prompts, mask = common.pad([[9, 9], [10]], 0, "left")
    for seed in range(12):
        torch.manual_seed(seed)
        response, logprobs = common.generate_responses(model, prompts, mask, 9, 1.0)
        is_eos = ((response >= 1) & (response <= 3)).tolist()
        lengths = [row.index(True) + 1 if any(row) else 9 for row in is_eos]
        assert response.shape == logprobs.shape == (2, max(lengths))
        for row, length in enumerate(lengths):
            assert not response[row, length:].any() and not logprobs[row, length:].any()
        widths.add(max(lengths))
    assert len(widths) > 2 and widths - {4, 8, 9}
