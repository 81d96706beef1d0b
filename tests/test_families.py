"""Every model family through the same checks and all three stages; the models are tiny and random.

`python tests/test_families.py` prints the worst differences as a table.
"""

from functools import partial

import pytest
import safetensors.torch
import torch
import transformers
from conftest import read_rows
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import ppo
import reward_model
import sft
import zoo
from data import tiny_model
from plumbing import metrics

EOS, PAD = zoo.EOS, zoo.PAD
SHORT = ["gpt2", "llama_tied", "gemma3", "opt_projected", "cohere2", "deepseek_v3", "mamba", "qwen3_5", "lfm2", "mixtral"]  # through three stages
everywhere = pytest.mark.parametrize("family", zoo.RUN)


def make_lm(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(zoo.FAMILIES[family][1](transformers), dtype=torch.float32).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [EOS], PAD
    with torch.no_grad():  # an embedding of 0, as it is made, would hide who reads the padding
        model.get_input_embeddings().weight[PAD].normal_()
    return model


def make_scalar(family, seed=5):
    torch.manual_seed(seed)
    config = zoo.FAMILIES[family][1](transformers)
    config.num_labels = 1
    if type(config) in AutoModelForSequenceClassification._model_mapping:
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    model.score = torch.nn.Linear(model.get_input_embeddings().embedding_dim, 1, bias=False)
    return model


def a_rollout(policy, temperature=0.7):
    """Responses to left-padded prompts of 2 to 13 tokens, with the sampler's own log-probabilities."""
    torch.manual_seed(1)
    prompts, prompt_mask = common.pad([[5] * k + [6] for k in (1, 3, 7, 12)], PAD, "left")
    eos_ids, policy.generation_config.eos_token_id = policy.generation_config.eos_token_id, []  # nothing ends
    response, sampled = common.generate_responses(policy, prompts, prompt_mask, 12, temperature)
    policy.generation_config.eos_token_id = eos_ids
    response[0, 5:], response[1, 9:] = PAD, PAD  # as if an EOS had come there: both paddings occur
    response[0, 4], response[1, 8] = EOS, EOS
    response_mask = ppo.mask_through_first_eos(response, [EOS])
    return torch.cat([prompts, response], 1), torch.cat([prompt_mask, response_mask], 1), response_mask, sampled


def worst_logprob_difference(family, dtype="float32"):
    """(largest, mean) |log pi as sampled - log pi recomputed|, in nats a token; and the reference is the family's own forward."""
    policy = make_lm(family)
    policy.in_bf16 = dtype == "bf16"
    tokens, attention_mask, response_mask, sampled = a_rollout(policy)
    with torch.no_grad():
        logprobs, _, _ = ppo.forward_responses(policy, None, tokens, attention_mask, response_mask.shape[1], 0.7)
    assert response_mask.sum() > 20 and logprobs[response_mask].std() > 0.3  # far from uniform
    kept = response_mask.clone()
    kept[0, 4] = kept[1, 8] = False  # that EOS was not what had been drawn
    difference = (logprobs - sampled)[kept].abs()
    return difference.max().item(), difference.mean().item()


def worst_score_difference(family):
    model, worst = make_scalar(family), 0.0
    texts = [[5, 6, EOS], [5, 6, 7, 8, 9, 10, 11, 12, EOS], [4], [5, PAD, 6, PAD]]
    own = model.base_model is not model  # its own pooling
    alone = [model(torch.tensor([ids])) if ids[-1] != PAD and own else None for ids in texts]
    for side in ("left", "right"):
        tokens, mask = common.pad(texts, 7, side)
        scores = common.token_scores(model, tokens, mask).gather(1, common.last_token_index(mask)[:, None])[:, 0]
        by_hand = [model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]).item() for ids in texts]
        differences = (scores - torch.tensor(by_hand)).abs().tolist()
        differences += [abs(s - a.logits.item()) for s, a in zip(scores.tolist(), alone) if a is not None]
        worst = max(worst, *differences)
    return worst


@everywhere
def test_the_samplers_logprobs_are_the_recomputed_ones(family):
    largest, mean = worst_logprob_difference(family)
    assert largest < 1e-4 and mean * 5 <= metrics.SAMPLER_GAP[False]  # ten times what was measured, where it was
    _, mean = worst_logprob_difference(family, "bf16")
    assert mean * 5 <= metrics.SAMPLER_GAP[True] < metrics.END


@pytest.mark.parametrize("family", zoo.REFUSED)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_families_whose_batches_are_not_their_texts_are_refused_in_one_line(family, dtype, tmp_path):
    make_lm(family).save_pretrained(tmp_path)
    tokenizer = tiny_model.train_tokenizer(["a fox"], 320)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match=zoo.REFUSED[family]):
        model = common.load_causal_lm(str(tmp_path), common.load_tokenizer(str(tmp_path)))
        common.place(model, torch.device("cpu"), dtype)


@pytest.mark.parametrize("family", zoo.NO_CAUSAL_LM)
def test_what_is_no_causal_lm_is_refused(family, tmp_path):
    zoo.FAMILIES[family][1](transformers).save_pretrained(tmp_path)
    with pytest.raises(common.UserError):
        common.load_causal_lm(str(tmp_path), None)


@everywhere
def test_what_every_stage_takes_for_granted_is_proved_with_and_without_checkpointing(family, tmp_path):
    """And gradient checkpointing changes no bit of a gradient."""
    gradients = []
    make_lm(family).save_pretrained(tmp_path)
    config = common._load_config(str(tmp_path), None, {})  # all that is random switched off
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = [EOS], PAD
        common.place(model, torch.device("cpu"), "float32", checkpointing)
        tokens, mask = common.pad([[5, 6, 7, 8, 9], [5, 6]], 7, "left")
        common.forward(model, tokens, mask).logits.logsumexp(-1)[mask].sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 5 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@everywhere
def test_rows_that_end_leave_the_batch_and_disturb_none_that_stays(family, monkeypatch):
    """In place of random tokens, the likeliest, 2nd, 3rd, ...: each row alone, from scratch, is the oracle."""
    policy, left = make_lm(family), []
    policy.generation_config.eos_token_id = list(range(policy.config.get_text_config().vocab_size))[6::4]
    pick = lambda logits, t: logits.topk(10).indices[..., t]
    monkeypatch.setattr(common, "sample_tokens", lambda logits, *_: (left.append(len(logits)), (pick(logits, len(left) - 1), torch.zeros(len(logits))))[1])
    rows = [[5] * (1 + i) + [7 + i] for i in range(12)]
    response, _ = common.generate_responses(policy, *common.pad(rows, PAD, "left"), 10, 1.0)
    assert left[0] == 12 and left[-1] <= 0.75 * 12  # rows did leave
    for ids, row in zip(rows, response.tolist()):
        expected = []
        while len(expected) < 10 and not (expected and expected[-1] in policy.generation_config.eos_token_id):
            expected.append(pick(policy(torch.tensor([ids + expected])).logits[0, -1], len(expected)).item())
        assert row == (expected + [PAD] * 10)[: response.shape[1]] and len(expected) <= response.shape[1]


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
    same = torch.equal  # but where junk goes through experts, whose products have other shapes then
    if any("expert" in name for name, _ in policy.named_modules()):
        same = partial(torch.allclose, rtol=1e-4, atol=1e-4)
    assert len(results[0]) > 10 and all(same(a, b) for a, b in zip(*results, strict=True))


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
    matrices = [m.weight for m in policy.modules() if isinstance(m, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)) and m.weight is not policy.get_input_embeddings().weight]
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


@pytest.mark.parametrize("family", SHORT)
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
    if (tmp_path / "rm" / common.HEAD).exists():  # as the README reads it
        trunk = AutoModel.from_pretrained(tmp_path / "rm")
        head = safetensors.torch.load_file(tmp_path / "rm" / common.HEAD)["weight"][0]
        plain_score = trunk(tokens).last_hidden_state[0, -1] @ head
    else:
        plain_score = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")(tokens).logits[0, 0]
    ours, _ = common.load_scalar_model(str(tmp_path / "rm"), tokenizer)
    raw = common.token_scores(ours, tokens, mask)[0, -1] * ours.config.reward_std + ours.config.reward_mean
    assert torch.allclose(plain_score, raw, atol=1e-5)


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
    print(f"{'family':<18}{'log-prob, largest':>20}{'mean':>20}{'mean in bf16':>20}{'score':>20}")
    for name in zoo.RUN:
        gaps = worst_logprob_difference(name)[0], *(worst_logprob_difference(name, dtype)[1] for dtype in ("float32", "bf16"))
        print(f"{name:<18}" + "".join(f"{x:>20.1e}" for x in (*gaps, worst_score_difference(name))))
