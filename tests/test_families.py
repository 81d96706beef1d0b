"""Every model family through the same checks, some through all three stages; tiny random models.

`python tests/test_families.py` prints the worst differences as a table.
"""

import json
import re
import tempfile

import pytest
import torch
import transformers
from conftest import read_rows
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import ppo
import reward_model
import sft
import zoo
from data import tiny_model

EOS, PAD = zoo.EOS, zoo.PAD
CPU = torch.device("cpu")
TOKENIZER = tiny_model.train_tokenizer(["a fox"], 320)
WITH_CLASSIFIER = {*AutoModelForSequenceClassification._model_mapping}  # of transformers' own
everywhere = pytest.mark.parametrize("family", zoo.RUN)


def make_lm(family, seed=0):
    torch.manual_seed(seed)
    config = zoo.FAMILIES[family][1](transformers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [EOS], PAD
    with torch.no_grad():  # an embedding of 0, as it is made, would hide who reads the padding
        model.get_input_embeddings().weight[PAD].normal_()
    return model


def make_scalar(family):
    with tempfile.TemporaryDirectory() as folder:
        make_lm(family, 5).save_pretrained(folder)
        model, head_is_new = common.load_scalar_model(folder, TOKENIZER)
    assert head_is_new
    torch.nn.init.normal_(model.score.weight)
    return model


def a_rollout(policy):
    """Responses to left-padded prompts of 2 to 13 tokens, with both paddings: tokens,
    attention_mask, response_mask, and the sampler's own log-probabilities.
    """
    torch.manual_seed(1)
    prompts, prompt_mask = common.pad([[5] * k + [6] for k in (1, 3, 7, 12)], PAD, "left")
    policy.generation_config.eos_token_id = []
    response, sampled = common.generate_responses(policy, prompts, prompt_mask, 12, 0.7)
    policy.generation_config.eos_token_id = [EOS]
    response[0, 5:], response[1, 9:] = PAD, PAD  # as if an EOS had come there
    response[0, 4], response[1, 8] = EOS, EOS
    mask = ppo.mask_through_first_eos(response, [EOS])
    return torch.cat([prompts, response], 1), torch.cat([prompt_mask, mask], 1), mask, sampled


@torch.no_grad()
def logprob_differences(family, dtype="float32"):
    """(largest, mean) |log pi as sampled - log pi recomputed|, in nats per token."""
    policy = make_lm(family)
    policy.use_bf16 = dtype == "bf16"
    tokens, attention_mask, mask, sampled = a_rollout(policy)
    logprobs, _, _ = ppo.forward_responses(policy, None, tokens, attention_mask, 12, 0.7)
    assert mask.sum() > 20 and logprobs[mask].std() > 0.3  # far from uniform
    mask[0, 4] = mask[1, 8] = False  # that EOS was not what had been drawn
    difference = (logprobs - sampled)[mask].abs()
    return difference.max().item(), difference.mean().item()


@torch.no_grad()
def worst_score_difference(family):
    """Against each text alone: by hand, and by the forward pass of transformers' own classes."""
    model, expected = make_scalar(family), []
    texts = [[5, 6, EOS], [5, 6, 7, 8, 9, 10, 11, 12, EOS], [4], [5, PAD, 6, PAD]]
    for ids in texts:
        expected.append(model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]))
        if type(model.config) in WITH_CLASSIFIER and ids[-1] != PAD:
            assert (model(torch.tensor([ids])).logits - expected[-1]).abs() < 1e-4
    scores = [common.text_scores(model, *common.pad(texts, 7, side)) for side in ("left", "right")]
    return (torch.stack(scores) - torch.cat(expected)).abs().max().item()


@everywhere
def test_sampled_logprobs_are_the_recomputed_ones_and_scores_are_those_of_each_text_alone(family):
    largest, mean = logprob_differences(family)
    assert largest < 1e-4 and mean * 5 <= ppo.SAMPLER_GAP  # ten times what was measured
    _, mean = logprob_differences(family, "bf16")
    assert mean * 5 <= ppo.SAMPLER_GAP_BF16 < ppo.MAX_GAP
    assert worst_score_difference(family) < 1e-4


@pytest.mark.parametrize("family", [*zoo.REFUSED, *zoo.NO_CAUSAL_LM])
def test_families_whose_batches_are_not_their_texts_are_refused_in_one_line(family, tmp_path):
    if family in zoo.NO_CAUSAL_LM:
        zoo.FAMILIES[family][1](transformers).save_pretrained(tmp_path)
    else:
        make_lm(family).save_pretrained(tmp_path)
    for dtype in ("float32", "bf16"):
        with pytest.raises(common.UserError, match=zoo.REFUSED.get(family)) as caught:
            common.to_device(common.load_causal_lm(str(tmp_path), TOKENIZER), CPU, dtype)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", [*zoo.RUN, "phimoe"])  # whose router reads its noise
def test_every_model_passes_the_checks_and_checkpointing_changes_no_bit_of_a_gradient(family, tmp_path):
    model = make_lm(family)
    for config in (model.config, model.config.get_text_config()):
        for name, value in list(vars(config).items()):
            if re.search("drop|jitter", name) and isinstance(value, float):
                setattr(config, name, 0.1)
    model.save_pretrained(tmp_path)
    text = torch.tensor([[5, 6, 7, 8, 9]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = plain(text, labels=text).loss  # of transformers alone, with the noise switched off
    tokens, mask = common.pad([[5, 6, 7, 8, 9], [5, 6]], 7, "left")
    gradients = []
    for checkpointing in (False, True):
        model = common.load_causal_lm(str(tmp_path), TOKENIZER)
        common.to_device(model, CPU, "float32", checkpointing)
        nll = sft.completion_nll(model, text, torch.ones_like(text).bool(), torch.ones_like(text).bool())
        assert abs(nll / 4 - expected) < 1e-5
        common.forward(model, tokens, mask).logits.logsumexp(-1)[mask].sum().backward()
        gradients.append([w.grad for w in model.parameters() if w.grad is not None])
    assert len(gradients[0]) > 5 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@everywhere
def test_rows_that_finish_leave_the_batch_and_disturb_none_that_stays(family, monkeypatch):
    """Not random tokens but the likeliest, 2nd, 3rd, ...: each row alone is the oracle."""
    policy, left = make_lm(family), []
    ends = list(range(policy.config.get_text_config().vocab_size))[6::4]
    policy.generation_config.eos_token_id = ends

    def pick(logits, *arguments):
        left.append(len(logits))
        return logits.topk(10).indices[:, len(left) - 1], torch.zeros(len(logits))

    monkeypatch.setattr(common, "sample_tokens", pick)
    rows = [[5] * (1 + i) + [7 + i] for i in range(12)]
    response, _ = common.generate_responses(policy, *common.pad(rows, PAD, "left"), 10, 1.0)
    assert left[0] == 12 and left[-1] <= 0.75 * 12  # rows did leave
    for ids, row in zip(rows, response.tolist()):
        expected = []
        while len(expected) < 10 and not (expected and expected[-1] in ends):
            logits = policy(torch.tensor([ids + expected])).logits[0, -1]
            expected.append(logits.topk(10).indices[len(expected)].item())
        assert len(expected) <= response.shape[1]
        assert row == (expected + [PAD] * 10)[: response.shape[1]]


@everywhere
@pytest.mark.parametrize("critic_kind", ["separate", "shared"])
def test_junk_in_the_padding_changes_no_bit_and_a_head_reads_what_the_lm_head_reads(family, critic_kind):
    policy, results, seen = make_lm(family), [], []
    critic = ppo.ValueHead(policy.get_output_embeddings().in_features, 1)
    critic = critic if critic_kind == "shared" else make_scalar(family)
    tokens, attention_mask, mask, _ = a_rollout(policy)
    policy.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[1][0]))
    weights = [*policy.parameters(), *critic.parameters()]
    for junk in (PAD, 7):
        tokens = torch.where(attention_mask, tokens, junk)
        outputs = ppo.forward_responses(policy, critic, tokens, attention_mask, 12, 0.7, True)
        counted = torch.stack(outputs)[:, mask] * torch.linspace(-1, 1, int(mask.sum()))
        gradients = torch.autograd.grad(counted.sum(), weights, allow_unused=True)
        results.append([counted, *(gradient for gradient in gradients if gradient is not None)])
        if critic_kind == "shared":
            assert torch.allclose(outputs[1], critic(seen[-1]).squeeze(-1), atol=1e-6)
    # where junk goes through experts, their products have other shapes
    bound = 1e-4 if any("expert" in name for name, _ in policy.named_modules()) else 0
    assert len(results[0]) > 10 and all(torch.allclose(a, b, bound, bound) for a, b in zip(*results, strict=True))


@everywhere
@torch.no_grad()
def test_rounding_a_frozen_models_matrices_changes_no_bit_under_autocast_and_halves_them(family):
    tokens, attention_mask, _, _ = a_rollout(make_lm(family))
    policy, scalar, results = make_lm(family), make_scalar(family), []
    size = sum(weight.nbytes for weight in policy.parameters())
    for is_trained in (True, False):
        for model in (policy, scalar):
            common.to_device(model.requires_grad_(is_trained), CPU, "bf16")
            assert ({weight.dtype for weight in model.parameters()} == {torch.float32}) == is_trained
        outputs = ppo.forward_responses(policy, None, tokens, attention_mask, 12, 0.7, True)
        results.append([*outputs, common.token_scores(scalar, tokens, attention_mask)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    embedding, halved = policy.get_input_embeddings().weight, 0
    for module in policy.modules():
        is_matrix = isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
        if is_matrix and module.weight is not embedding:
            assert module.weight.dtype == torch.bfloat16
            halved += module.weight.nbytes
    assert size - sum(weight.nbytes for weight in policy.parameters()) >= halved > 0
    assert embedding.dtype == scalar.score.weight.dtype == torch.float32


# === All three stages =============================================================================
def change_special_tokens(tokenizer, model, kind):
    """Returns the ids that end a response."""
    if kind == "several EOS":
        model.generation_config.eos_token_id = [EOS, 9]
    elif kind == "no pad":
        tokenizer.pad_token = None
        model.config.pad_token_id = model.generation_config.pad_token_id = None
    elif kind == "GPT-2":  # no special token but the EOS
        tokenizer.pad_token = None
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] == EOS]
        state["model"]["vocab"]["?"] = state["model"]["vocab"].pop("<|pad|>")
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    elif kind == "pad = EOS":
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = model.generation_config.pad_token_id = EOS
    elif kind == "BOS = EOS":
        tokenizer.bos_token, model.config.bos_token_id = tokenizer.eos_token, EOS
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", EOS)]
        )
    return {EOS, 9} if kind == "several EOS" else {EOS}


@pytest.mark.parametrize("family, critic, kind", [
    ("gpt2", "separate", "several EOS"), ("llama_tied", "shared", "no pad"), ("llama_untied", "separate", "BOS = EOS"),
    ("llama_untied", "shared", "pad = EOS"), ("gemma3", "separate", "pad = EOS"), ("opt_projected", "shared", "no BOS"),
    ("cohere2", "separate", "no BOS"), ("deepseek_v3", "shared", "no BOS"), ("mamba", "separate", "no BOS"),
    ("qwen3_5", "shared", "no BOS"), ("gpt2", "shared", "GPT-2"),
    ("lfm2", "separate", "no pad"), ("mixtral", "shared", "several EOS"),
])
def test_three_stages_hand_over_with_any_special_tokens_and_reload_to_equal_numbers(
    family, critic, kind, world, tmp_path, run_stage
):
    tokenizer, model = AutoTokenizer.from_pretrained(world / "sft"), make_lm(family)
    ends = change_special_tokens(tokenizer, model, kind)
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "base")

    def stage_ends_well(module, name, rows, *more):
        flags = ["--output", tmp_path / name, "--device", "cpu", "--lr", 1e-3, *more]
        for flag in ("prompts", "eval-prompts") if name == "ppo" else ("data", "eval-data"):
            flags += [f"--{flag}", world / f"{rows}.jsonl"]
        status, out, err = run_stage(module, *flags)
        assert status == 0, err
        return out

    stage_ends_well(sft, "sft", "sft", "--model", tmp_path / "base", "--epochs", 1)
    out = stage_ends_well(reward_model, "rm", "pairs", "--model", tmp_path / "sft")
    assert "scores differ by at most 0" in out
    out = stage_ends_well(
        ppo, "ppo", "prompts", "--policy", tmp_path / "sft", "--reward", tmp_path / "rm", "--critic", critic,
        "--iterations", 2, "--batch-size", 8, "--minibatch-size", 4, "--microbatch-size", 3, "--response-length", 8,
    )
    assert "starts from the policy" not in out
    rows = [row for row in read_rows(tmp_path / "ppo" / "metrics.jsonl") if "split" not in row]
    assert abs(rows[0]["kl"]) < 1e-5 and all(abs(row["ratio_first"] - 1) < 1e-5 for row in rows)
    assert all(row["approx_kl_first"] < 1e-6 < row["approx_kl"] for row in rows)

    # what any user loads is what the stages load, and it was trained
    tokens, mask = common.pad([[5, 6, 7, 8, 9, 10]], PAD, "right")
    tokenizer = common.load_tokenizer(str(tmp_path / "ppo"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo").eval()
    ours = common.load_causal_lm(str(tmp_path / "ppo"), tokenizer)(tokens).logits
    before = common.load_causal_lm(str(tmp_path / "sft"), tokenizer)(tokens).logits
    assert torch.equal(plain(tokens).logits, ours) and not torch.allclose(ours, before, atol=1e-4)
    assert set(plain.generation_config.eos_token_id) == ends
    base = AutoTokenizer.from_pretrained(tmp_path / "base")  # the policy keeps its vocabulary
    assert tokenizer.get_vocab() == base.get_vocab()
    assert plain.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    pad_id = AutoConfig.from_pretrained(tmp_path / "rm").pad_token_id  # other code reads by it
    assert pad_id not in ends and (pad_id == len(base)) == (kind == "GPT-2")
    prompt_ids, _ = common.encode(tokenizer, "A fox meets a cub.")
    assert prompt_ids.count(EOS) == (prompt_ids[0] == EOS) == (kind == "BOS = EOS")
    if type(model.config) in WITH_CLASSIFIER:
        score = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")(tokens).logits[0, 0]
    else:  # a trunk and a vector
        head = load_file(tmp_path / "rm" / "model.safetensors")["score.weight"][0]
        score = AutoModel.from_pretrained(tmp_path / "rm")(tokens).last_hidden_state[0, -1] @ head
    ours, _ = common.load_scalar_model(str(tmp_path / "rm"), tokenizer)
    mean, std = common.score_scale(ours.config)
    assert torch.allclose(score, common.text_scores(ours, tokens, mask)[0] * std + mean, atol=1e-5)


if __name__ == "__main__":
    print(f"{'family':<18}{'log-prob, largest':>20}{'mean':>20}{'mean in bf16':>20}{'score':>20}")
    for name in zoo.RUN:
        gaps = [*logprob_differences(name), logprob_differences(name, "bf16")[1]]
        gaps.append(worst_score_difference(name))
        print(f"{name:<18}" + "".join(f"{gap:>20.1e}" for gap in gaps))
