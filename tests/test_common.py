"""The plumbing: data rows, token ids, model loading, flags, folders."""

import json
import math

import pytest
import torch
from conftest import tiny_lm, tiny_scalar
from tokenizers import processors
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import common
from data import tiny_model


def test_padding_goes_to_the_asked_side():
    assert [x.tolist() for x in common.pad([[5, 6], [7]], 0, "left")] == [[[5, 6], [0, 7]], [[True, True], [False, True]]]
    assert [x.tolist() for x in common.pad([[5, 6], [7]], 0, "right")] == [[[5, 6], [7, 0]], [[True, True], [True, False]]]
    tokens, mask = common.pad([[5, 6, 7], [8]], 0, "left")
    assert common.position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert common.last_token_index(mask).tolist() == [2, 2]
    assert common.last_token_index(mask.flip(1)).tolist() == [2, 0]


def with_bos(tokenizer, both_ends=False):
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    special = [("<|start|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    single = "<|start|> $A <|end|>" if both_ends else "<|start|> $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def test_prompt_and_response_ids_join_to_the_whole_text_with_one_bos_and_one_eos():
    for change in (lambda t: t, with_bos, lambda t: with_bos(t, both_ends=True)):
        tokenizer = change(tiny_model.train_tokenizer(["a fox sees a cub"] * 9, 300))
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
        prompt, response = common.encode(tokenizer, "a fox", " sees a cub")
        assert common.encode(tokenizer, "a fox") == (prompt, [])  # what PPO has before it samples
        plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        assert prompt == bos + plain("a fox") and response == plain(" sees a cub") + [tokenizer.eos_token_id]
        assert tokenizer.decode(prompt + response, skip_special_tokens=True) == "a fox sees a cub"
        if bos:
            assert common.encode(tokenizer, "<|start|>a fox")[0] == prompt  # no second BOS
            assert common.encode(tokenizer, "")[0] == bos


def test_a_tokenizer_without_pad_or_with_pad_equal_eos_gets_a_pad_of_its_own_and_the_model_a_row(tmp_path):
    for pad_token in (None, "<|end|>"):
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
        assert policy.generation_config.pad_token_id == policy.config.pad_token_id == loaded.pad_token_id


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = tiny_model.train_tokenizer(["a"], 300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="no EOS token"):
        common.load_tokenizer(str(tmp_path))


def test_all_eos_ids_of_the_model_end_a_text():
    tokenizer = tiny_model.train_tokenizer(["a"], 300)
    model = tiny_lm(vocab_size=300)
    for stored, expected in (([7, 1, 9], [1, 7, 9]), (7, [1, 7]), (None, [1])):
        model.generation_config.eos_token_id = stored
        assert common.eos_token_ids(tokenizer, model) == expected


@pytest.mark.parametrize("ids", [-1, [1, -1], "1", [[1]]])
def test_eos_ids_that_are_none_are_refused(ids):
    model = tiny_lm(vocab_size=300)
    model.generation_config.eos_token_id = ids
    with pytest.raises(common.UserError, match="eos_token_id is"):
        common.eos_token_ids(tiny_model.train_tokenizer(["a"], 300), model)


def test_what_is_no_hub_id_is_not_looked_for_on_the_hub(capsys):
    for path in ("", "./nothing", "a/b/c", "C:\\x", "../x", "/no/where"):
        with pytest.raises(common.UserError, match="there is no folder"):
            common.load_tokenizer(path)
    assert "hub" not in capsys.readouterr().out


def test_generation_settings_stored_with_a_model_do_not_reach_sampling(world, tmp_path):
    tokenizer = common.load_tokenizer(str(world / "sft"))
    model = common.load_causal_lm(str(world / "sft"), tokenizer)
    model.generation_config.update(top_k=2, top_p=0.1, repetition_penalty=3.0, min_new_tokens=5, temperature=9.0)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["top_k"] == 2
    settings = common.load_causal_lm(str(tmp_path), tokenizer).generation_config
    assert (settings.top_k, settings.top_p, settings.temperature, settings.do_sample) == (0, 1.0, 1.0, True)
    assert settings.min_new_tokens is None and settings.repetition_penalty in (None, 1.0)


def test_dropout_is_off_in_every_model_even_in_train_mode(tmp_path):
    tokenizer = tiny_model.train_tokenizer(["a"], 300)
    sizes = dict(vocab_size=300, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    gpt2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes)
    opt = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16, layerdrop=0.5, **sizes)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(**gpt2)), "opt": OPTForCausalLM(OPTConfig(**opt)),
        "head": GPT2ForSequenceClassification(GPT2Config(num_labels=1, **gpt2)),
    }
    tokens, mask = common.pad([[5, 6, 7, 8, 9]] * 64, 0, "right")
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        load = common.load_scalar_model if name == "head" else common.load_causal_lm
        loaded = load(str(tmp_path / name), tokenizer)
        loaded = (loaded[0] if name == "head" else loaded).train()
        output = common.token_scores(loaded, tokens, mask) if name == "head" else loaded(tokens, attention_mask=mask).logits
        assert (output - output[:1]).abs().max() < 1e-5, name


def test_weights_are_float32_whatever_the_checkpoint_holds(world, tmp_path):
    tokenizer = common.load_tokenizer(str(world / "sft"))
    common.load_causal_lm(str(world / "sft"), tokenizer).to(torch.bfloat16).save_pretrained(tmp_path)
    assert common.load_causal_lm(str(tmp_path), tokenizer).dtype == torch.float32
    assert common.load_scalar_model(str(tmp_path), tokenizer)[0].dtype == torch.float32


def test_bf16_is_the_arithmetic_of_matrix_products_only_and_scores_keep_a_float32_head():
    tokens, mask = common.pad([[5, 6, 7]], 0, "right")
    for dtype, expected in (("bf16", torch.bfloat16), ("auto", torch.float32), ("float32", torch.float32)):
        model = tiny_scalar()
        common.place(model, torch.device("cpu"), dtype)
        with common.autocast(model):
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == expected
        assert common.token_scores(model, tokens, mask).dtype == torch.float32
        assert model.score.weight.dtype == torch.float32


def test_a_new_head_is_recognised_as_untrained(world):
    tokenizer = common.load_tokenizer(str(world / "sft"))
    assert common.load_scalar_model(str(world / "sft"), tokenizer)[1] is True
    assert common.load_scalar_model(str(world / "reward_model"), tokenizer)[1] is False


def test_sampling_by_inversion_reaches_rare_tokens_and_no_impossible_one():
    """A token of probability 3e-9 behind 2 ** 20 - 1 likely ones is drawn at its own share of its block."""
    size, top = 2**20, 2**31 - 1
    logits = torch.zeros(1, size)
    logits[0, 7], logits[0, -1] = -math.inf, math.log(size * 3e-9)
    share = 3e-9 * size / (127 + 3e-9 * size)  # of the last token in the last block of 128 ids
    within = lambda x: int(x * 2**31)
    for pair, expected in (
        ((0, 0), 0), ((0, within(6.5 / 127)), 6), ((0, within(7.5 / 127)), 8), ((top, top), size - 1),
        ((top, within(1 - 0.9 * share)), size - 1), ((top, within(1 - 1.1 * share)), size - 2),
    ):
        drawn, logprob = common.sample_tokens(logits, 1.0, torch.tensor([pair]))
        assert drawn.item() == expected
        assert logprob.item() == pytest.approx(logits.double().log_softmax(-1)[0, expected].item(), abs=1e-5)


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 300, 1000])
def test_evenly_spread_numbers_draw_each_token_as_often_as_its_probability_says(size):
    """A grid of 512 x 512 pairs in place of random ones, so that only the grid's width is left of the error."""
    logits = 2 * torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    grid = torch.arange(512) * 2**22 + 2**21
    drawn, _ = common.sample_tokens(logits.expand(512 * 512, -1), 0.7, torch.cartesian_prod(grid, grid))
    found = torch.bincount(drawn, minlength=size).double() / 512**2
    probability = (logits.double() / 0.7).softmax(-1)[0]
    blocks = torch.arange(size) // 128
    of_block = torch.zeros(8, dtype=torch.float64).index_add(0, blocks, probability)[blocks]
    assert len(found) == size and ((found - probability).abs() <= (1.01 * (of_block + probability / of_block) + 1 / 512) / 512).all()


def test_there_are_as_many_columns_as_the_longest_response_has_tokens():
    """Who has ended is read every fourth token only; what is sampled between is not handed out."""
    model, widths = tiny_lm(), set()
    model.generation_config.eos_token_id = [1, 2, 3]
    for seed in range(12):
        torch.manual_seed(seed)
        response, logprobs = common.generate_responses(model, *common.pad([[9, 9], [10]], 0, "left"), 9, 1.0)
        is_eos = (response >= 1) & (response <= 3)
        lengths = [row.index(True) + 1 if any(row) else 9 for row in is_eos.tolist()]
        assert response.shape == logprobs.shape == (2, max(lengths))
        assert all((response[i, n:] == 0).all() and (logprobs[i, n:] == 0).all() for i, n in enumerate(lengths))
        widths.add(max(lengths))
    assert len(widths) > 2 and widths - {4, 8, 9}


def test_logits_that_are_not_finite_are_not_sampled_from():
    for bad in (math.nan, math.inf):
        model = tiny_lm()
        with torch.no_grad():
            model.lm_head.weight[2, 0] = bad
        with pytest.raises(FloatingPointError):
            common.generate_responses(model, *common.pad([[3, 4], [5]], 0, "left"), 6, 1.0)
