"""The plumbing: data rows, token ids, model loading, flags, folders."""

import dataclasses
import gzip
import json
import math
import pathlib

import pytest
import torch
from conftest import tiny_lm, tiny_scalar
from tokenizers import processors
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import common
import ppo
import reward_model
import sft

PAIR = [("prompt", "completion"), ("text",)]


def read(tmp_path, content, formats=PAIR, name="data.jsonl"):
    (tmp_path / name).write_bytes(content)
    return common.read_rows([str(tmp_path / name)], formats)


def test_rows_of_either_format_bom_crlf_and_gzip_are_read_and_other_keys_kept(tmp_path):
    content = b'\xef\xbb\xbf{"prompt": "a", "completion": "b", "id": 7}\r\n{"text": "\\u00e9"}'
    expected = [{"prompt": "a", "completion": "b", "id": 7}, {"text": "é"}]
    assert read(tmp_path, content) == expected
    assert read(tmp_path, gzip.compress(content), name="data.jsonl.gz") == expected


@pytest.mark.parametrize("line, problem", [
    (b"", "is empty"), (b"   ", "is empty"), (b'{"text": ', "is not JSON"), (b"[1]", "is a JSON list"), (b"7", "is a JSON int"),
    (b'{"prompt": "a"}', "has the keys 'prompt'"), (b"{}", "(none)"), (b'{"text": 7}', "has a int under 'text'"),
    (b'{"text": null}', "has the keys 'text' (null);"), (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    (b'{"text": "\xff"}', "is not UTF-8 at byte 10"), (b"[" * 100_000, "is not JSON"), (b'{"prompt": ["a"], "completion": "b"}', "has a list under 'prompt' whose items are not all"), (b'{"text": []}', "has an empty list under 'text', not a string;"),
    (b'{"prompt": [{"role": "user"}], "completion": "b"}', 'not all {"role": "...", "content": "..."}'), (b'{"prompt": [{"role": "user", "content": "\\ud800"}], "completion": "b"}', "half of a surrogate pair under 'prompt'"),
])
def test_a_bad_line_is_named_with_file_line_problem_and_an_example(tmp_path, line, problem):
    with pytest.raises(common.UserError) as error:
        read(tmp_path, b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    message = str(error.value)
    assert "data.jsonl line 2" in message and problem in message
    assert '{"prompt": "...", "completion": "..."} or {"text": "..."}' in message


@pytest.mark.parametrize("content, name", [(b"", "a.jsonl"), (b"not gzip", "a.jsonl.gz"), (gzip.compress(b'{"text": "a"}\n' * 99)[:-20], "b.jsonl.gz"), (gzip.compress(b'{"text": "a"}\n' * 99)[:12] + b"\xff" * 30, "c.jsonl.GZ")])
def test_an_empty_or_damaged_file_is_named(tmp_path, content, name):
    with pytest.raises(common.UserError, match=name):
        read(tmp_path, content, name=name)


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
        tokenizer = change(sft.train_tokenizer(["a fox sees a cub"] * 9, 300))
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
        tokenizer = sft.train_tokenizer(["a fox sees a cub"] * 9, 300)
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
    tokenizer = sft.train_tokenizer(["a"], 300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="no EOS token"):
        common.load_tokenizer(str(tmp_path))


def test_all_eos_ids_of_the_model_end_a_text():
    tokenizer = sft.train_tokenizer(["a"], 300)
    model = tiny_lm(vocab_size=300)
    for stored, expected in (([7, 1, 9], [1, 7, 9]), (7, [1, 7]), (None, [1])):
        model.generation_config.eos_token_id = stored
        assert common.eos_token_ids(tokenizer, model) == expected


@pytest.mark.parametrize("ids", [-1, [1, -1], "1", [[1]]])
def test_eos_ids_that_are_none_are_refused(ids):
    model = tiny_lm(vocab_size=300)
    model.generation_config.eos_token_id = ids
    with pytest.raises(common.UserError, match="eos_token_id is"):
        common.eos_token_ids(sft.train_tokenizer(["a"], 300), model)


def test_a_flag_or_a_file_given_twice_is_refused(tmp_path):
    with pytest.raises(common.UserError, match="--data is given twice"):
        common.parse_args(sft.Config, "", ["--data", "a", "--epochs", "1", "--data=b"])
    with pytest.raises(common.UserError, match="a.jsonl is given twice"):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a"}\n')
        common.read_rows([str(path), str(path)], PAIR)


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
    tokenizer = sft.train_tokenizer(["a"], 300)
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
    model, device = tiny_scalar(), torch.device("cpu")
    tokens, mask = common.pad([[5, 6, 7]], 0, "right")
    with common.arithmetic(device, "bf16"):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
        assert common.token_scores(model, tokens, mask).dtype == torch.float32
    with common.arithmetic(device, "auto"):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_a_new_head_is_recognised_as_untrained(world):
    tokenizer = common.load_tokenizer(str(world / "sft"))
    assert common.load_scalar_model(str(world / "sft"), tokenizer)[1] is True
    assert common.load_scalar_model(str(world / "reward_model"), tokenizer)[1] is False


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    output = tmp_path / "out"
    with common.written_whole(output) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError):
        with common.written_whole(output) as folder:
            (folder / "b").write_text("2")
            raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [path.name for path in output.iterdir()] == ["a"]
    with common.written_whole(output) as folder:
        (folder / "c").write_text("3")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [path.name for path in output.iterdir()] == ["c"]


def test_numbers_that_are_not_finite_become_null_in_the_log(tmp_path):
    common.append_json_line(tmp_path / "log", {"a": float("nan"), "b": float("inf"), "c": 1.5, "d": None, "e": "é"})
    assert json.loads((tmp_path / "log").read_text(encoding="utf-8")) == {"a": None, "b": None, "c": 1.5, "d": None, "e": "é"}


@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_flags_take_dashes_underscores_and_equals_and_defaults_are_the_config(module):
    assert common.parse_args(module.Config, "", []) == module.Config()
    for argv in (["--max-grad-norm", "3"], ["--max_grad_norm", "3"], ["--max-grad-norm=3"]):
        assert common.parse_args(module.Config, "", argv) == dataclasses.replace(module.Config(), max_grad_norm=3.0)
    for argv, hint in ((["--max-grad-nrom", "3"], "did you mean --max-grad-norm?"), (["--max-grad", "3"], "--max-grad-norm"), (["--lr", "x"], "--lr"), (["stray"], "stray"), (["--dtype", "fp16"], "fp16")):
        with pytest.raises(common.UserError, match=hint.replace("?", r"\?")):
            common.parse_args(module.Config, "", argv)


@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_every_flag_in_help_is_read_by_the_code(module, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse_args(module.Config, module.__doc__.splitlines()[0], ["--help"])
    assert stop.value.code == 0
    text, source = capsys.readouterr().out, pathlib.Path(module.__file__).read_text(encoding="utf-8")
    code = source[source.index("# === 1.") :] + pathlib.Path(common.__file__).read_text(encoding="utf-8")
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"cfg.{field.name}" in code, f"nothing reads --{field.name}"


def test_sampling_by_inversion_reaches_rare_tokens_and_no_impossible_one():
    """A token of probability 3e-9 behind 2 ** 20 - 1 likely ones is drawn at its own share of the uniform."""
    size = 2**20
    logits = torch.zeros(1, size)
    logits[0, 7], logits[0, -1] = -math.inf, math.log(size * 3e-9)
    for uniform, expected in ((0.0, 0), (7.5 / (size - 2), 8), (1 - 2e-9, size - 1), (1 - 2**-53, size - 1), (1 - 5e-9, size - 2)):
        fixed = lambda like: torch.full_like(like, uniform)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand_like", fixed)
            assert common.sample_tokens(logits, 1.0).item() == expected


def test_logits_that_are_not_finite_are_not_sampled_from():
    for bad in (math.nan, math.inf):
        logits = torch.zeros(3, 5)
        logits[1, 2] = bad
        with pytest.raises(FloatingPointError):
            common.sample_tokens(logits, 1.0)
