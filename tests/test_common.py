"""Padding, token ids, loading models, precision, and the sampling loop."""

import contextlib
import json
import math

import pytest
import torch
from conftest import tiny_lm, tiny_scalar
from tokenizers import processors
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers import OPTConfig, OPTForCausalLM

import common
from data import tiny_model


def test_padding_goes_to_the_given_side_and_positions_skip_it():
    tokens, mask = common.pad([[5, 6], [7]], 0, "left")
    assert tokens.tolist() == [[5, 6], [0, 7]] and mask.tolist() == [[True, True], [False, True]]
    tokens, mask = common.pad([[5, 6], [7]], 0, "right")
    assert tokens.tolist() == [[5, 6], [7, 0]] and mask.tolist() == [[True, True], [True, False]]
    _, mask = common.pad([[5, 6, 7], [8]], 0, "left")
    assert common.position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert common.last_token_index(mask).tolist() == [2, 2]
    assert common.last_token_index(mask.flip(1)).tolist() == [2, 0]


@pytest.mark.parametrize("template", [None, "<|start|> $A", "<|start|> $A <|end|>"])
def test_prompt_and_response_ids_join_to_the_whole_text_with_one_bos_and_one_eos(template):
    tokenizer, bos = tiny_model.train_tokenizer(["a fox sees a cub"] * 9, 300), []
    if template:
        tokenizer.add_special_tokens({"bos_token": "<|start|>"})
        bos = [tokenizer.bos_token_id]
        special = [("<|start|>", bos[0]), ("<|end|>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
        assert common.encode(tokenizer, "<|start|>a fox")[0] == common.encode(tokenizer, "a fox")[0]
    prompt, response = common.encode(tokenizer, "a fox", " sees a cub")
    assert common.encode(tokenizer, "a fox") == (prompt, [])  # what PPO has before it samples
    assert common.encode(tokenizer, "")[0] == bos
    plain = tokenizer(["a fox", " sees a cub"], add_special_tokens=False)["input_ids"]
    assert prompt == bos + plain[0] and response == plain[1] + [tokenizer.eos_token_id]
    assert tokenizer.decode(prompt + response, skip_special_tokens=True) == "a fox sees a cub"


@pytest.mark.parametrize("pad_token", [None, "<|end|>"])
def test_a_tokenizer_without_a_pad_of_its_own_gets_one_and_the_model_a_row(tmp_path, pad_token):
    tokenizer = tiny_model.train_tokenizer(["a fox sees a cub"] * 9, 300)
    tokenizer.pad_token = pad_token
    model = tiny_lm(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = common.load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id != loaded.eos_token_id == tokenizer.eos_token_id
    policy = common.load_causal_lm(str(tmp_path), loaded)
    assert policy.get_input_embeddings().num_embeddings >= len(loaded) > loaded.pad_token_id
    assert policy.generation_config.pad_token_id == policy.config.pad_token_id
    assert policy.config.pad_token_id == loaded.pad_token_id


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


def test_dropout_is_off_in_every_model_even_in_train_mode(tmp_path):
    tokenizer = tiny_model.train_tokenizer(["a"], 300)
    special = dict(vocab_size=300, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=1, **special)
    opt = OPTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        word_embed_proj_dim=16, layerdrop=0.5, **special,
    )
    tokens, mask = common.pad([[5, 6, 7, 8, 9]] * 64, 0, "right")
    for number, model in enumerate(
        (GPT2LMHeadModel(gpt2), OPTForCausalLM(opt), GPT2ForSequenceClassification(gpt2))
    ):
        path = str(tmp_path / str(number))
        model.save_pretrained(path)
        if number == 2:
            loaded, _ = common.load_scalar_model(path, tokenizer)
            output = common.token_scores(loaded.train(), tokens, mask)
        else:
            loaded = common.load_causal_lm(path, tokenizer).train()
            output = loaded(tokens, attention_mask=mask).logits
        assert (output - output[:1]).abs().max() < 1e-5, number


@pytest.mark.parametrize("dtype", ["bf16", "auto", "float32"])
def test_precision_is_that_of_autocast_without_a_context_and_scores_have_a_float32_head(
    dtype, monkeypatch
):
    """The oracle is torch.autocast around the calls of models that `to_device` has not seen."""
    (tokens, mask), is_bf16 = common.pad([[5, 6, 7], [6]], 0, "left"), dtype == "bf16"
    sample_tokens, seen = common.sample_tokens, []

    def keep_logits(logits, *arguments):
        seen.append(logits)
        return sample_tokens(logits, *arguments)

    monkeypatch.setattr(common, "sample_tokens", keep_logits)
    policy, scalar = tiny_lm(), tiny_scalar()
    for model in (policy, scalar):
        common.to_device(model, torch.device("cpu"), dtype)
    seen.clear()
    logits = common.forward(policy, tokens, mask).logits
    common.generate_responses(policy, tokens, mask, 5, 1.0, torch.Generator().manual_seed(0))
    scores, sampled = common.token_scores(scalar, tokens, mask), [*seen]
    assert not torch.is_autocast_enabled("cpu") and scores.dtype == torch.float32
    assert {x.dtype for x in (logits, *sampled)} == {torch.bfloat16 if is_bf16 else torch.float32}
    policy, scalar = tiny_lm(), tiny_scalar()
    seen.clear()
    monkeypatch.setattr(common, "autocast", contextlib.nullcontext)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        inputs = dict(attention_mask=mask, position_ids=common.position_ids(mask))
        hidden = scalar.model(tokens, **inputs).last_hidden_state.float()
        assert torch.equal(policy(tokens, **inputs).logits, logits)
        common.generate_responses(policy, tokens, mask, 5, 1.0, torch.Generator().manual_seed(0))
    scores_by_hand = (torch.nn.functional.linear(hidden, scalar.score.weight)[..., 0] - 0.25) / 2
    assert torch.equal(scores_by_hand, scores)
    assert len(sampled) == 5 and all(torch.equal(a, b) for a, b in zip(seen, sampled, strict=True))


# === Sampling =====================================================================================
def test_sampling_by_inversion_reaches_rare_tokens_and_no_impossible_one():
    """A token of probability 3e-9 behind 2^20 - 1 likely ones has its own share of its block."""
    size, top = 2**20, 2**31 - 1
    logits = torch.zeros(1, size)
    logits[0, 7], logits[0, -1] = -math.inf, math.log(size * 3e-9)
    share = 3e-9 * size / (127 + 3e-9 * size)  # of the last token in the last block of 128 ids
    for block, in_block, expected in (
        (0, 0, 0), (0, 6.5 / 127, 6), (0, 7.5 / 127, 8), (top, 1, size - 1),
        (top, 1 - 0.9 * share, size - 1), (top, 1 - 1.1 * share, size - 2),
    ):
        uniform = torch.tensor([[block, min(int(in_block * 2**31), top)]])
        drawn, logprob = common.sample_tokens(logits, 1.0, uniform)
        exact = logits.double().log_softmax(-1)[0, expected].item()
        assert drawn.item() == expected and logprob.item() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 300, 1000])
def test_evenly_spread_numbers_draw_each_token_as_often_as_its_probability(size):
    """A grid of 512 x 512 pairs in place of random ones: only its width is left of the error."""
    logits = 2 * torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    grid = torch.arange(512) * 2**22 + 2**21
    pairs = torch.cartesian_prod(grid, grid)
    drawn, _ = common.sample_tokens(logits.expand(len(pairs), -1), 0.7, pairs)
    found = torch.bincount(drawn, minlength=size).double() / len(pairs)
    p = (logits.double() / 0.7).softmax(-1)[0]
    blocks = torch.arange(size) // 128
    of_block = torch.zeros(8, dtype=torch.float64).index_add(0, blocks, p)[blocks]
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_not_sampled_from(bad):
    model, (prompts, mask) = tiny_lm(), common.pad([[3, 4], [5]], 0, "left")
    with torch.no_grad():
        model.lm_head.weight[2, 0] = bad
    with pytest.raises(common.UserError, match="not finite"):
        common.generate_responses(model, prompts, mask, 6, 1.0)
