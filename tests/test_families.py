"""Every model family through the same checks and all three stages; the models are tiny and random.

`python tests/test_families.py` prints the worst differences as a table.
"""

import pytest
import torch
import transformers
from conftest import read_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import ppo
import reward_model
import sft

VOCAB, EOS, PAD = 320, 1, 0
SPECIAL = dict(vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
SIZES = dict(SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
GROUPED = dict(SIZES, num_key_value_heads=2, initializer_range=0.3)
OPT = dict(SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=64, init_std=0.3)

FAMILIES = {  # learned absolute positions: gpt2, opt; windows of 4 tokens, shorter than the texts: *_window, gemma
    "gpt2": lambda t: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **SPECIAL),
    "gpt_neox": lambda t: t.GPTNeoXConfig(initializer_range=0.3, **SIZES),
    "opt": lambda t: t.OPTConfig(word_embed_proj_dim=32, **OPT),
    "opt_projected": lambda t: t.OPTConfig(word_embed_proj_dim=16, do_layer_norm_before=False, **OPT),
    "llama_untied": lambda t: t.LlamaConfig(tie_word_embeddings=False, **GROUPED),
    "llama_tied": lambda t: t.LlamaConfig(tie_word_embeddings=True, **GROUPED),
    "mistral_window": lambda t: t.MistralConfig(sliding_window=4, **GROUPED),
    "qwen2": lambda t: t.Qwen2Config(tie_word_embeddings=True, **GROUPED),
    "qwen2_window": lambda t: t.Qwen2Config(use_sliding_window=True, sliding_window=4, max_window_layers=1, **GROUPED),
    "qwen3": lambda t: t.Qwen3Config(head_dim=8, **GROUPED),
    "gemma2": lambda t: t.Gemma2Config(head_dim=8, sliding_window=4, **GROUPED),
    "gemma3": lambda t: t.Gemma3TextConfig(head_dim=8, sliding_window=4, **GROUPED),
    "phi3": lambda t: t.Phi3Config(original_max_position_embeddings=64, **GROUPED),
}
everywhere = pytest.mark.parametrize("family", FAMILIES)


def make_lm(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](transformers), dtype=torch.float32).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [EOS], PAD
    return model


def make_scalar(family, seed=5):
    torch.manual_seed(seed)
    config = FAMILIES[family](transformers)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def a_rollout(policy, temperature=0.7):
    """Responses to left-padded prompts of 2 to 13 tokens, with the sampler's own log-probabilities."""
    torch.manual_seed(1)
    prompts, prompt_mask = common.pad([[5] * k + [6] for k in (1, 3, 7, 12)], PAD, "left")
    logits, sample_tokens = [], common.sample_tokens

    def recording(step_logits, temperature):
        logits.append(step_logits)
        return sample_tokens(step_logits, temperature)

    common.sample_tokens = recording
    eos_ids, policy.generation_config.eos_token_id = policy.generation_config.eos_token_id, []  # nothing ends
    response = common.generate_responses(policy, prompts, prompt_mask, 12, temperature)
    common.sample_tokens, policy.generation_config.eos_token_id = sample_tokens, eos_ids
    response[0, 5:], response[1, 9:] = PAD, PAD  # as if an EOS had come there: both paddings occur
    response[0, 4], response[1, 8] = EOS, EOS
    sampled = (torch.stack(logits, 1) / temperature).log_softmax(-1).gather(-1, response[..., None]).squeeze(-1)
    response_mask = ppo.mask_through_first_eos(response, [EOS])
    return torch.cat([prompts, response], 1), torch.cat([prompt_mask, response_mask], 1), response_mask, sampled


def worst_logprob_difference(family):
    policy = make_lm(family)
    tokens, attention_mask, response_mask, sampled = a_rollout(policy)
    logprobs, _, _ = ppo.forward_responses(policy, None, tokens, attention_mask, response_mask.shape[1], 0.7)
    assert response_mask.sum() > 20 and logprobs[response_mask].std() > 0.3  # far from uniform
    return (logprobs - sampled)[response_mask].abs().max().item()


def worst_score_difference(family):
    model, worst = make_scalar(family), 0.0
    texts = [[5, 6, EOS], [5, 6, 7, 8, 9, 10, 11, 12, EOS], [4], [5, PAD, 6, PAD]]
    alone = [model(torch.tensor([ids])) if ids[-1] != PAD else None for ids in texts]  # its own pooling
    for side in ("left", "right"):
        tokens, mask = common.pad(texts, PAD, side)
        scores = common.token_scores(model, tokens, mask).gather(1, common.last_token_index(mask)[:, None])[:, 0]
        by_hand = [model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]).item() for ids in texts]
        worst = max(worst, *((scores - torch.tensor(by_hand)).abs().tolist()))
        worst = max(worst, *(abs(s - a.logits.item()) for s, a in zip(scores.tolist(), alone) if a is not None))
    return worst


@everywhere
def test_the_samplers_logprobs_are_the_recomputed_ones(family):
    assert worst_logprob_difference(family) < 1e-4


@everywhere
def test_rows_that_end_leave_the_batch_and_disturb_none_that_stays(family, monkeypatch):
    """In place of random tokens, the likeliest, 2nd, 3rd, ...: each row alone, from scratch, is the oracle."""
    policy, left = make_lm(family), []
    policy.generation_config.eos_token_id = list(range(policy.config.get_text_config().vocab_size))[6::4]
    pick = lambda logits, t: logits.topk(10).indices[..., t]
    monkeypatch.setattr(common, "sample_tokens", lambda logits, _: (left.append(len(logits)), pick(logits, len(left) - 1))[1])
    rows = [[5] * (1 + i) + [7 + i] for i in range(12)]
    response = common.generate_responses(policy, *common.pad(rows, PAD, "left"), 10, 1.0)
    assert left[0] == 12 and left[-1] <= 0.75 * 12  # rows did leave
    for ids, row in zip(rows, response.tolist()):
        expected = []
        while len(expected) < 10 and not (expected and expected[-1] in policy.generation_config.eos_token_id):
            expected.append(pick(policy(torch.tensor([ids + expected])).logits[0, -1], len(expected)).item())
        assert row == (expected + [PAD] * 10)[: response.shape[1]] and len(expected) <= response.shape[1]


def test_rows_of_a_recurrent_model_stay_in_the_batch(monkeypatch):
    """Qwen3.5 mixes attention with linear layers, whose state transformers' cache can't take rows from."""
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, head_dim=8)
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    torch.manual_seed(0)
    policy = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(vocab_size=30, initializer_range=0.3, **sizes, **linear)).eval()
    policy.generation_config.eos_token_id, policy.generation_config.pad_token_id = list(range(1, 30, 4)), PAD
    left = []
    pick = lambda logits, t: logits.topk(10).indices[..., t]
    monkeypatch.setattr(common, "sample_tokens", lambda logits, _: (left.append(len(logits)), pick(logits, len(left) - 1))[1])
    rows = [[7, 8, 10 + i] for i in range(12)]
    response = common.generate_responses(policy, *common.pad(rows, PAD, "left"), 8, 1.0)
    ended = torch.isin(response, torch.tensor(policy.generation_config.eos_token_id)).any(1)
    assert set(left) == {12} and ended.sum() > 3
    for ids, row in zip(rows, response.tolist()):
        expected = []
        while len(expected) < response.shape[1] and not (expected and expected[-1] in policy.generation_config.eos_token_id):
            expected.append(pick(policy(torch.tensor([ids + expected]), use_cache=False).logits[0, -1], len(expected)).item())
        assert row == (expected + [PAD] * 8)[: response.shape[1]]


@everywhere
def test_a_score_is_the_same_alone_and_in_a_batch_padded_on_either_side(family):
    assert worst_score_difference(family) < 1e-4


@everywhere
@pytest.mark.parametrize("critic_kind", ["separate", "shared"])
def test_junk_under_the_padding_changes_no_bit_of_loss_and_gradient(family, critic_kind):
    results = []
    for junk in (PAD, 7):
        policy = make_lm(family)
        torch.manual_seed(3)
        critic = make_scalar(family) if critic_kind == "separate" else ppo.ValueHead(policy.get_output_embeddings().in_features, 1)
        tokens, attention_mask, mask, _ = a_rollout(policy)
        tokens = torch.where(attention_mask, tokens, junk)
        outputs = ppo.forward_responses(policy, critic, tokens, attention_mask, mask.shape[1], 0.7, True)
        loss = sum((x[mask] * torch.linspace(-1, 1, int(mask.sum()))).sum() for x in outputs)
        loss.backward()
        results.append([loss, *(p.grad for m in (policy, critic) for p in m.parameters() if p.grad is not None)])
    assert len(results[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@everywhere
def test_rounding_a_frozen_models_matrices_changes_no_bit_under_autocast_and_halves_them(family):
    tokens, attention_mask, mask, _ = a_rollout(make_lm(family))
    policy, reward_model = make_lm(family), make_scalar(family)
    before = sum(p.nbytes for p in policy.parameters())

    @torch.no_grad()
    def outputs():
        logprobs, _, entropy = ppo.forward_responses(policy, None, tokens, attention_mask, mask.shape[1], 0.7, True)
        return logprobs, entropy, common.token_scores(reward_model, tokens, attention_mask)

    for model in (policy, reward_model):
        common.place(model, tokens.device, "bf16")
        assert all(p.dtype == torch.float32 for p in model.parameters())  # trained
    plain = outputs()
    for model in (policy, reward_model):
        common.place(model.requires_grad_(False), tokens.device, "bf16")
    assert all(torch.equal(a, b) for a, b in zip(plain, outputs(), strict=True))
    matrices = [m.weight for m in policy.modules() if type(m).__name__ in ("Linear", "Conv1D") and m.weight is not policy.get_input_embeddings().weight]
    assert matrices and all(weight.dtype == torch.bfloat16 for weight in matrices)
    assert before - sum(p.nbytes for p in policy.parameters()) >= sum(weight.nbytes for weight in matrices)
    assert policy.get_input_embeddings().weight.dtype == reward_model.score.weight.dtype == torch.float32


@everywhere
def test_a_shared_head_reads_the_hidden_state_that_the_lm_head_reads(family):
    policy, head = make_lm(family), ppo.ValueHead(make_lm(family).get_output_embeddings().in_features, 1)
    seen = []
    policy.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    tokens, attention_mask, mask, _ = a_rollout(policy)
    seen.clear()
    _, values, _ = ppo.forward_responses(policy, head, tokens, attention_mask, mask.shape[1], 1.0)
    assert torch.allclose(values, head(seen[0]).squeeze(-1), atol=1e-6)


@everywhere
def test_three_stages_hand_over_and_reload_to_equal_logits(family, world, tmp_path, run_stage):
    make_lm(family).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / "base")
    short = ["--device", "cpu", "--lr", "1e-3"]
    data = ["--data", world / "sft.jsonl", "--eval-data", world / "sft.jsonl", "--epochs", 1]
    assert run_stage(sft, "--model", tmp_path / "base", "--output", tmp_path / "sft", *data, *short)[0] == 0
    data = ["--data", world / "pairs.jsonl", "--eval-data", world / "pairs.jsonl"]
    status, out, _ = run_stage(reward_model, "--model", tmp_path / "sft", "--output", tmp_path / "rm", *data, *short)
    assert status == 0 and "scores after reloading differ by at most 0" in out
    for critic in ("separate", "shared"):
        status, _, err = run_stage(
            ppo, "--policy", tmp_path / "sft", "--reward", tmp_path / "rm", "--output", tmp_path / critic, "--prompts",
            world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl", "--iterations", 2, "--batch-size", 8,
            "--minibatch-size", 4, "--microbatch-size", 3, "--response-length", 8, "--critic", critic, *short,
        )
        assert status == 0, err
        rows = [row for row in read_rows(tmp_path / critic / "metrics.jsonl") if "split" not in row]
        assert abs(rows[0]["kl"]) < 1e-5 and all(abs(row["ratio_first"] - 1) < 1e-5 for row in rows)
        assert all(row["approx_kl_first"] < 1e-6 < row["approx_kl"] for row in rows)

    # what any user loads is what the stages load, and it was trained
    tokens, mask = common.pad([[5, 6, 7, 8, 9, 10]], PAD, "right")
    tokenizer = common.load_tokenizer(str(tmp_path / "separate"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "separate")
    ours, before = (common.load_causal_lm(str(tmp_path / name), tokenizer) for name in ("separate", "sft"))
    logits, logits_before = ours(tokens).logits, before(tokens).logits
    assert torch.equal(plain(tokens).logits, logits) and not torch.allclose(logits, logits_before, atol=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    ours, _ = common.load_scalar_model(str(tmp_path / "rm"), tokenizer)
    raw = common.token_scores(ours, tokens, mask)[0, -1] * ours.config.reward_std + ours.config.reward_mean
    assert torch.allclose(plain(tokens).logits[0, 0], raw, atol=1e-5)


def special(tokenizer, model, kind):
    """Change the special tokens of a tokenizer and a model; returns the ids that end a response."""
    ends = {EOS}
    if kind == "several EOS":
        model.generation_config.eos_token_id = [EOS, 9]
        ends = {EOS, 9}
    elif kind == "no pad":
        tokenizer.pad_token = None
        model.config.pad_token_id = model.generation_config.pad_token_id = None
    elif kind == "pad = EOS":
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = model.generation_config.pad_token_id = EOS
    elif kind == "BOS = EOS":
        from tokenizers import processors

        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", EOS)]
        )
        model.config.bos_token_id = EOS
    return ends


@pytest.mark.parametrize("kind", ["several EOS", "no pad", "pad = EOS", "BOS = EOS", "no BOS"])
def test_special_tokens_of_any_kind_go_through_the_three_stages(kind, world, tmp_path, run_stage):
    tokenizer, model = AutoTokenizer.from_pretrained(world / "sft"), make_lm("llama_untied")
    ends = special(tokenizer, model, kind)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    short = ["--device", "cpu", "--lr", "1e-3"]
    data = ["--data", world / "sft.jsonl", "--eval-data", world / "sft.jsonl", "--epochs", 1]
    assert run_stage(sft, "--model", tmp_path / "base", "--output", tmp_path / "sft", *data, *short)[0] == 0
    data = ["--data", world / "pairs.jsonl", "--eval-data", world / "pairs.jsonl"]
    assert run_stage(reward_model, "--model", tmp_path / "sft", "--output", tmp_path / "rm", *data, *short)[0] == 0
    status, out, err = run_stage(
        ppo, "--policy", tmp_path / "sft", "--reward", tmp_path / "rm", "--output", tmp_path / "ppo", "--prompts",
        world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl", "--iterations", 1, "--batch-size", 8,
        "--minibatch-size", 8, "--response-length", 40, *short,
    )
    assert status == 0 and "critic" in out and "starts from the policy" not in out, err  # the reward model's tokens are the policy's
    row = read_rows(tmp_path / "ppo" / "metrics.jsonl")[1]
    assert abs(row["kl"]) < 1e-5 and abs(row["ratio_first"] - 1) < 1e-5
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    assert set(saved.generation_config.eos_token_id) == ends and saved.generation_config.pad_token_id not in ends
    prompt_ids, _ = common.encode(common.load_tokenizer(str(tmp_path / "ppo")), "A fox meets a cub.")
    assert prompt_ids.count(EOS) == (kind == "BOS = EOS") and (prompt_ids[0] == EOS) == (kind == "BOS = EOS")


if __name__ == "__main__":
    print(f"{'family':<16}{'log-prob difference':>20}{'score difference':>20}")
    for name in FAMILIES:
        print(f"{name:<16}{worst_logprob_difference(name):>20.1e}{worst_score_difference(name):>20.1e}")
