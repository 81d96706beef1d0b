"""Invariants of ppo.py with real (tiny, random) models: log-probabilities, masks, the update."""

import contextlib
import copy
import importlib.util
import itertools
import math
import re
import types

import pytest
import torch
from conftest import read_rows, tiny_lm, tiny_scalar, write_rows
from transformers import GPT2Config, GPT2LMHeadModel

import common
import ppo
from plumbing import metrics, report, rows, scorers

EOS, PAD = 1, 0
SAMPLERS = {False: common.generate_responses, True: common.generate_compiled}
KINDS = list(itertools.product(["separate", "shared"], ["gae", "bandit"]))


def shared_head(seed=3):
    torch.manual_seed(seed)
    return ppo.ValueHead(16, 1)


def left_padded(prompts):
    return common.pad(prompts, PAD, "left")


def a_rollout(policy, num_rows=6, response_length=7):
    """Sampled responses to prompts of unequal length: tokens, attention_mask, response_mask."""
    torch.manual_seed(1)
    prompts, prompt_mask = left_padded([[5] * (1 + row % 3) + [6] for row in range(num_rows)])
    response, _ = common.generate_responses(policy, prompts, prompt_mask, response_length, 1.0)
    response_mask = ppo.mask_through_first_eos(response, [EOS])
    return torch.cat([prompts, response], 1), torch.cat([prompt_mask, response_mask], 1), response_mask


def tiny_gpt2():
    """Learned absolute positions: left padding shifts them unless position ids are passed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, pad_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [1], 0
    return model


@pytest.mark.parametrize("make_policy", [tiny_lm, tiny_gpt2])
def test_logprobs_are_those_of_the_unpadded_sequence_one_token_at_a_time(make_policy):
    policy, temperature = make_policy(), 0.7
    tokens, attention_mask, response_mask = a_rollout(policy)
    num_columns = response_mask.shape[1]
    logprobs, _, entropy = ppo.forward_responses(policy, None, tokens, attention_mask, num_columns, temperature, True)
    for row in range(len(tokens)):
        ids = tokens[row][attention_mask[row]]  # no padding, default position ids
        num_prompt = len(ids) - response_mask[row].sum()
        distributions = (policy(ids[None]).logits[0].double() / temperature).log_softmax(-1)
        for t in range(int(response_mask[row].sum())):
            before = distributions[num_prompt + t - 1]  # what the model said just before y_t
            assert abs(logprobs[row, t].item() - before[ids[num_prompt + t]].item()) < 1e-5
            assert abs(entropy[row, t].item() + (before.exp() * before).sum().item()) < 1e-5


@pytest.mark.parametrize("critic_kind", ["separate", "shared"])
def test_values_read_the_prefix_before_their_token_and_nothing_after(critic_kind):
    policy, critic = tiny_lm(), tiny_scalar(5) if critic_kind == "separate" else shared_head()
    tokens, attention_mask, response_mask = a_rollout(policy)
    num_columns = response_mask.shape[1]
    _, values, _ = ppo.forward_responses(policy, critic, tokens, attention_mask, num_columns, 1.0)
    for row, t in itertools.product(range(len(tokens)), range(num_columns)):
        if not response_mask[row, t]:
            continue
        prefix = tokens[row, : tokens.shape[1] - num_columns + t]  # x, y_<t
        prefix = prefix[attention_mask[row, : len(prefix)]][None]
        if critic_kind == "separate":
            alone = (critic.score(critic.model(prefix).last_hidden_state[0, -1]).item() - 0.25) / 2.0
        else:
            alone = critic(policy.model(prefix).last_hidden_state[0, -1]).item()
        assert abs(values[row, t].item() - alone) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampled_tokens_follow_the_distribution_that_is_scored(temperature, compiled):
    """Each of the 5 first tokens' counts in 4,000 samples lies within 5 sigma (false alarm < 1e-5)."""
    policy, number = tiny_lm(vocab_size=5), 4000
    prompt, mask = left_padded([[3, 4], [4]])
    for row in range(2):
        torch.manual_seed(row)
        prompts, prompt_mask = (x[row : row + 1].expand(number, -1) for x in (prompt, mask))
        first = SAMPLERS[compiled](policy, prompts, prompt_mask, 1, temperature)[0][:, 0]
        candidates = torch.cat([prompt[row].expand(5, -1), torch.arange(5)[:, None]], 1)
        everything = torch.cat([mask[row].expand(5, -1), torch.ones(5, 1).bool()], 1)
        p = ppo.forward_responses(policy, None, candidates, everything, 1, temperature)[0][:, 0].exp()
        assert abs(p.sum().item() - 1) < 1e-5
        sigma = (number * p * (1 - p)).sqrt()
        assert ((torch.bincount(first, minlength=5) - number * p).abs() < 5 * sigma + 1).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_whole_sampled_responses_follow_the_distribution_that_is_scored(compiled):
    """Counts of all responses of up to 3 tokens over a vocabulary of 4, some of which end, within 5 sigma of 8,000."""
    policy, number = tiny_lm(vocab_size=4), 8000
    torch.manual_seed(0)
    prompts, prompt_mask = (x.expand(number, -1) for x in left_padded([[3, 2]]))
    sampled, _ = SAMPLERS[compiled](policy, prompts, prompt_mask, 3, 1.0)
    counts = {}
    for row in sampled.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    responses = torch.tensor([y for y in itertools.product(range(4), repeat=3)])
    mask = ppo.mask_through_first_eos(responses, [EOS])
    responses = responses[((responses == PAD) | mask).all(1)]
    mask = ppo.mask_through_first_eos(responses, [EOS])
    tokens = torch.cat([torch.tensor([[3, 2]]).expand(len(responses), -1), responses], 1)
    attention = torch.cat([torch.ones(len(responses), 2).bool(), mask], 1)
    logprobs = ppo.forward_responses(policy, None, tokens, attention, 3, 1.0)[0]
    p = torch.where(mask, logprobs, 0.0).sum(1).exp().double()
    seen = torch.tensor([counts.pop(tuple(row), 0) for row in responses.tolist()])
    assert not counts and abs(p.sum().item() - 1) < 1e-5
    assert ((seen - number * p).abs() < 5 * (number * p * (1 - p)).sqrt() + 1).all()


@pytest.mark.parametrize("with_entropy", [False, True])
def test_log_probabilities_in_pieces_have_the_gradients_of_whole_ones_and_keep_only_the_logits(with_entropy):
    """The oracle is torch's log_softmax over the whole; the vocabulary is the widest thing by far."""
    gradients, num_columns = [], 7
    for whole in (True, False):
        policy = tiny_lm(vocab_size=3000)
        tokens, attention_mask, response_mask = a_rollout(policy, 6, num_columns)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            if whole:
                logits = policy(input_ids=tokens, attention_mask=attention_mask, position_ids=common.position_ids(attention_mask)).logits
                distribution = (logits[:, -num_columns - 1 : -1] / 0.7).log_softmax(-1)
                logprobs = distribution.gather(-1, tokens[:, -num_columns:, None]).squeeze(-1)
                entropy = -(distribution.exp() * distribution).sum(-1) if with_entropy else torch.zeros_like(logprobs)
            else:
                logprobs, _, entropy = ppo.forward_responses(policy, None, tokens, attention_mask, num_columns, 0.7, with_entropy)
        (logprobs * torch.linspace(-1, 1, num_columns) + entropy)[response_mask].sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
        logits_bytes = 6 * num_columns * 3000 * 4
        wide = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept if x.shape[-1:] == (3000,) and x.ndim == 3}
        assert whole or sum(wide.values()) == logits_bytes
    assert all((a - b).abs().max() < 1e-5 * a.abs().max() for a, b in zip(*gradients, strict=True))


def test_kl_and_k3_have_the_exact_kl_as_their_mean_over_all_responses():
    """All responses of up to 3 tokens from a vocabulary of 4, each weighed by its probability."""
    policy, ref_policy = tiny_lm(0, vocab_size=4), tiny_lm(9, vocab_size=4)
    responses = torch.tensor([y for y in itertools.product(range(4), repeat=3)])
    mask = ppo.mask_through_first_eos(responses, [EOS])
    is_canonical = ((responses == PAD) | mask).all(1)  # one way to fill up after an EOS
    responses, mask = responses[is_canonical], mask[is_canonical]
    tokens = torch.cat([torch.full((len(responses), 2), 3), responses], 1)
    attention = torch.cat([torch.ones(len(responses), 2).bool(), mask], 1)
    logprobs, ref_logprobs = (
        ppo.forward_responses(m, None, tokens, attention, 3, 1.0)[0].double() for m in (policy, ref_policy)
    )
    weight = torch.where(mask, logprobs, 0.0).sum(1).exp()
    assert abs(weight.sum().item() - 1) < 1e-5

    # The oracle: chain rule over prefixes, each with the KL of its two next-token distributions.
    def exact(prefix, depth):
        if depth == 3:
            return 0.0
        p, q = (m(torch.tensor([prefix])).logits[0, -1].double().softmax(-1) for m in (policy, ref_policy))
        here = (p * (p / q).log()).sum().item()
        return here + sum(p[i].item() * exact(prefix + [i], depth + 1) for i in range(4) if i != EOS)

    kl = torch.where(mask, logprobs - ref_logprobs, 0.0)
    k3 = torch.exp(-kl) - 1 + kl
    true_kl = exact([3, 3], 0)
    assert true_kl > 0.1
    assert abs((weight * kl.sum(1)).sum().item() - true_kl) < 1e-4
    assert abs((weight * k3.sum(1)).sum().item() - true_kl) < 1e-4


@pytest.mark.parametrize("critic_kind", ["separate", "shared"])
@pytest.mark.parametrize("advantage", ["gae", "bandit"])
def test_junk_in_masked_slots_leaves_loss_and_gradients_bit_identical(critic_kind, advantage):
    results = []
    for poison in (False, True):
        policy, critic = tiny_lm(), tiny_scalar(5) if critic_kind == "separate" else shared_head()
        tokens, attention_mask, response_mask = a_rollout(policy)
        assert not attention_mask[:, 0].all() and not response_mask.all()  # both paddings occur
        num_columns = response_mask.shape[1]
        generator = torch.Generator().manual_seed(0)
        rewards, values, logprobs = (torch.randn(response_mask.shape, generator=generator) for _ in range(3))
        junk = torch.tensor(float("nan"))
        if poison:
            tokens = torch.where(attention_mask, tokens, 7)
            values, logprobs = (torch.where(response_mask, x, junk) for x in (values, logprobs))
        rewards = torch.where(response_mask, rewards, 0.0)
        advantages, returns, value_mask = ppo.ESTIMATORS[advantage][0](rewards, values, response_mask, 1.0, 0.95)
        advantages = ppo.whiten(advantages, response_mask)
        if poison:
            advantages, returns = (torch.where(response_mask, x, junk) for x in (advantages, returns))
        b = ppo.Batch(
            tokens=tokens, attention_mask=attention_mask, response_mask=response_mask, value_mask=value_mask, logprobs=logprobs,
            ref_logprobs=logprobs, values=values, advantages=advantages, returns=returns,
        )
        at, at_v = b.response_mask, b.value_mask
        new_logprobs, new_values, entropy = ppo.forward_responses(
            policy, critic, b.tokens, b.attention_mask, num_columns, 1.0, True
        )
        losses, _ = ppo.policy_loss(new_logprobs[at], b.logprobs[at], b.advantages[at], 0.2)
        value_losses = ppo.value_loss(new_values[at_v], b.values[at_v], b.returns[at_v], 0.2)
        loss = ppo.total_loss(losses, value_losses, entropy[at], at.sum(), at_v.sum(), 0.1, 0.01)
        loss.backward()
        results.append([loss, *(p.grad for m in (policy, critic) for p in m.parameters() if p.grad is not None)])
    assert len(results[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_scores_are_the_same_alone_in_a_batch_and_padded_on_either_side():
    reward_model = tiny_scalar()
    texts = [[5, 6, EOS], [5, 6, 7, 8, 9, 10, EOS], [4], [5, PAD, 6, PAD]]  # a pad token may be sampled
    scorer = scorers.TokenScorer("rm", reward_model, microbatch_size=3)
    alone = [(reward_model.score(reward_model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item() - 0.25) / 2 for ids in texts]
    for side in ("left", "right"):
        tokens, mask = common.pad(texts, PAD, side)
        scores = ppo.score_responses([scorer], tokens, mask, None, None)[0]
        assert torch.allclose(scores, torch.tensor(alone), rtol=0, atol=1e-4)


def test_a_critic_copied_from_the_reward_model_predicts_the_score_itself_at_the_end():
    reward_model, policy = tiny_scalar(), tiny_lm()
    critic = ppo.load_critic(ppo.Config(), [scorers.TokenScorer("rm", reward_model, 8)], policy, None)
    tokens, attention_mask, _ = a_rollout(policy)
    ours, theirs = (common.token_scores(m, tokens, attention_mask) for m in (critic, reward_model))
    assert torch.equal(ours, theirs) and all(p.requires_grad for p in critic.parameters())
    assert critic.score.weight.data_ptr() != reward_model.score.weight.data_ptr()


def flags(world, output, *more):
    return [
        "--policy", world / "sft", "--reward", world / "reward_model", "--prompts", world / "prompts.jsonl",
        "--eval-prompts", world / "prompts.jsonl", "--output", output, "--iterations", "2", "--batch-size", "8",
        "--minibatch-size", "8", "--microbatch-size", "8", "--response-length", "6", "--device", "cpu", *more,
    ]


class GradientSeen(Exception):
    pass


@pytest.mark.parametrize("critic, advantage", KINDS)
def test_micro_batch_size_changes_no_gradient_of_the_real_loop(world, tmp_path, run_stage, monkeypatch, critic, advantage):
    gradients = {}

    def record(parameters, _):
        seen.append([p.grad.clone() for p in parameters if p.grad is not None])
        if len(seen) == 2:  # policy and critic
            raise GradientSeen
        return torch.tensor(0.0)

    monkeypatch.setattr(ppo, "clip_grad_norm_", record)
    for size in (8, 3, 1):
        seen = []
        more = ["--critic", critic, "--advantage", advantage, "--entropy-coef", "0.01", "--microbatch-size", size, "--overwrite"]
        with pytest.raises(GradientSeen):
            run_stage(ppo, *flags(world, tmp_path / "out", *more))
        gradients[size] = sum(seen, [])
    assert max(g.abs().max() for g in gradients[8]) > 1e-3
    for size in (3, 1):
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(gradients[8], gradients[size], strict=True))


@pytest.mark.parametrize("critic, advantage", KINDS)
def test_each_update_starts_at_ratio_1_and_the_run_at_kl_0(world, tmp_path, run_stage, critic, advantage):
    more = ["--critic", critic, "--advantage", advantage, "--temperature", "0.8", "--minibatch-size", "4", "--microbatch-size", "3"]
    status, out, _ = run_stage(ppo, *flags(world, tmp_path / "out", "--iterations", "3", "--lr", "0.01", *more))
    assert status == 0
    rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
    assert len(rows) == 3 and abs(rows[0]["kl"]) < 1e-5 and rows[2]["kl"] != 0
    for row in rows:
        assert abs(row["ratio_first"] - 1) < 1e-6 and row["approx_kl_first"] < 1e-6
        assert row["approx_kl"] > 0  # and moves on from there


def test_a_small_step_changes_most_weights_of_policy_and_critic_and_none_of_the_frozen(world, tmp_path, run_stage):
    status, *_ = run_stage(ppo, *flags(world, tmp_path / "out", "--iterations", "1", "--lr", "3e-6", "--critic-lr", "3e-6"))
    assert status == 0
    for saved, original in ((tmp_path / "out", world / "sft"), (tmp_path / "out" / "critic", world / "reward_model")):
        load = common.AutoModelForCausalLM if saved.name == "out" else common.AutoModelForSequenceClassification
        new, old = (load.from_pretrained(folder).state_dict() for folder in (saved, original))
        changed = sum((new[key] != old[key]).sum().item() for key in old)
        total = sum(weight.numel() for weight in old.values())
        unused = new["model.embed_tokens.weight"].shape[0] * 16  # embeddings of tokens that never came
        assert changed > 0.5 * (total - unused)


def test_gradients_of_one_step_do_not_reach_the_next(world, tmp_path, run_stage):
    """With learning rates 0 and one minibatch, each epoch's gradient is the same one again."""
    norms = []
    for epochs in (1, 3):
        more = ["--iterations", "1", "--lr", "0", "--critic-lr", "0", "--ppo-epochs", epochs, "--max-grad-norm", "1e9", "--overwrite"]
        assert run_stage(ppo, *flags(world, tmp_path / "out", *more))[0] == 0
        row = read_rows(tmp_path / "out" / "metrics.jsonl")[1]
        norms.append([row["grad_norm"], row["critic_grad_norm"]])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and min(norms[0]) > 0


def test_the_learning_rate_falls_linearly_and_max_approx_kl_ends_an_update_early(world, tmp_path, run_stage):
    more = ["--iterations", "4", "--lr", "0.01", "--max-approx-kl", "1e-4", "--ppo-epochs", "4"]
    status, *_ = run_stage(ppo, *flags(world, tmp_path / "out", *more))
    rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
    assert status == 0 and [round(row["lr"], 6) for row in rows] == [0.01, 0.0075, 0.005, 0.0025]
    assert all(row["optimizer_steps"] == 2 for row in rows)  # one taken, the second is too far


def test_missing_eos_costs_the_penalty_in_the_reward_but_not_in_the_logged_score(world, tmp_path, run_stage):
    reward = tmp_path / "reward.py"
    reward.write_text("def zero(prompts, responses, rows):\n    return [0.0] * len(rows)\n")
    more = ["--reward", f"{reward}:zero", "--iterations", "1", "--missing-eos-penalty", "3", "--advantage", "bandit"]
    status, *_ = run_stage(ppo, *flags(world, tmp_path / "out", *more))
    row = read_rows(tmp_path / "out" / "metrics.jsonl")[1]
    assert status == 0 and row["score"] == 0 and 0 <= row["eos_rate"] < 1
    # With a value head that starts at 0 and V(x) = 0, the first value loss is the mean squared return.
    penalised = 9.0 * (1 - row["eos_rate"])
    assert row["value_loss"] <= penalised + 1e-3 and row["value_loss"] > 0.2 * penalised


def test_python_rewards_see_prompts_responses_and_whole_rows(world, tmp_path, run_stage):
    seen = tmp_path / "seen.jsonl"
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import json\n"
        "def keep(prompts, responses, rows):\n"
        f"    with open({str(seen)!r}, 'a') as file:\n"
        "        for values in zip(prompts, responses, rows):\n"
        "            file.write(json.dumps(values) + '\\n')\n"
        "    return [len(response) for response in responses]\n"
    )
    rows = [{"prompt": f"A fox {i}.", "answer": i} for i in range(12)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    status, *_ = run_stage(ppo, *flags(world, tmp_path / "out", "--reward", f"{reward}:keep", "--prompts", prompts, "--iterations", "1"))
    calls = read_rows(seen)
    assert status == 0 and len(calls) == 24 + 8 + 24  # evaluation, rollout, evaluation
    assert all(row["prompt"] == prompt and isinstance(response, str) for prompt, response, row in calls)
    assert all(row["answer"] == int(prompt[6:-1]) for prompt, _, row in calls[24:32])
    logged = read_rows(tmp_path / "out" / "metrics.jsonl")[1]
    assert abs(logged["score"] - sum(len(response) for _, response, _ in calls[24:32]) / 8) < 1e-4


def test_a_reward_file_may_hold_dataclasses_import_neighbours_and_be_called_math(world, tmp_path, run_stage):
    (tmp_path / "neighbour_of_the_reward.py").write_text("BONUS = 2.0\n")
    (tmp_path / "math.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom neighbour_of_the_reward import BONUS\n"
        "@dataclasses.dataclass\nclass Rule:\n    bonus: float = BONUS\n"
        "def reward(prompts, responses, rows):\n    return [Rule().bonus] * len(rows)\n"
    )
    status, *_ = run_stage(ppo, *flags(world, tmp_path / "out", "--reward", f"{tmp_path}/math.py:reward", "--iterations", "1"))
    assert status == 0 and read_rows(tmp_path / "out" / "metrics.jsonl")[1]["score"] == 2.0


def test_gradient_checkpointing_changes_no_metric(world, tmp_path, run_stage):
    logs = []
    for more in ([], ["--gradient-checkpointing", "--overwrite"]):
        assert run_stage(ppo, *flags(world, tmp_path / "out", *more))[0] == 0
        logs.append(read_rows(tmp_path / "out" / "metrics.jsonl"))
    for plain, checkpointed in zip(*logs, strict=True):
        for key in plain:
            if isinstance(plain[key], float) and "second" not in key and key != "peak_memory_gb":  # the process's, so it only grows
                assert plain[key] == pytest.approx(checkpointed[key], rel=1e-3, abs=1e-5), key


def test_explain_shows_the_score_at_the_eos_and_the_return_of_each_token(world, tmp_path, run_stage):
    policy = tiny_lm()
    tokens, attention_mask, response_mask = a_rollout(policy)
    generator = torch.Generator().manual_seed(0)
    kl, values = (0.1 * torch.randn(response_mask.shape, generator=generator) for _ in range(2))
    rewards = ppo.kl_shaped_rewards(torch.full((len(tokens),), 5.0), kl, response_mask, 0.1)
    advantages, returns, _ = ppo.gae(rewards, values, response_mask, 1.0, 1.0)
    logprobs = torch.zeros_like(kl)
    batch = ppo.Batch(
        tokens=tokens, attention_mask=attention_mask, response_mask=response_mask, value_mask=response_mask, logprobs=logprobs,
        ref_logprobs=logprobs - kl, values=values, advantages=advantages, returns=returns,
    )
    tokenizer = common.load_tokenizer(str(world / "sft"))
    table = metrics.explain_response(tokenizer, batch, rewards, advantages, row=1)
    body = [line for line in table.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert len(body) == response_mask[1].sum()
    last = int(response_mask[1].sum()) - 1
    assert float(body[-1].split()[-3]) == pytest.approx(rewards[1, last].item(), abs=1e-3) and rewards[1, last] > 4
    assert [float(line.split()[-1]) for line in body] == pytest.approx(returns[1, : last + 1].tolist(), abs=1e-3)
    status, out, _ = run_stage(ppo, *flags(world, tmp_path / "out", "--explain", "--iterations", "1"))
    assert status == 0 and "advantage" in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("critic, advantage", KINDS)
def test_ratio_1_and_kl_0_hold_on_cuda_in_bf16(world, tmp_path, run_stage, critic, advantage):
    """cuBLAS may add in another order for another shape, so that a logit comes out as the neighbouring bf16 number,
    a spacing of 2^-8 of its size away; the normaliser may move as far. So a log-probability moves by at most twice that."""
    more = ["--critic", critic, "--advantage", advantage, "--device", "cuda", "--dtype", "bf16", "--lr", "1e-4"]
    assert run_stage(ppo, *flags(world, tmp_path / "out", *more))[0] == 0
    rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
    policy = common.load_causal_lm(str(tmp_path / "out"), common.load_tokenizer(str(tmp_path / "out")))
    largest = policy(torch.arange(3, 67)[None]).logits.abs().max().item()
    bound = 2 * 2**-8 * largest  # in nats a token
    assert all(abs(row["ratio_first"] - 1) <= math.expm1(bound) for row in rows)
    assert all(row["approx_kl_first"] <= math.expm1(bound) - bound for row in rows)
    assert abs(rows[0]["kl"]) <= bound * rows[0]["response_length"]


def test_compiled_models_train_to_the_same_figures(world, tmp_path, run_stage, monkeypatch):
    """Traced by dynamo and autograd as in a real --compile, with torch's plain kernels in place of generated ones."""
    compile_module, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: (compiled.append((type(model).__name__, options)), compile_module(model, backend="aot_eager", **options)))
    runs = []
    for more in ([], ["--compile"]):
        output = tmp_path / f"out{len(more)}"
        assert run_stage(ppo, *flags(world, output, "--microbatch-size", "4", "--lr", "0.01", *more))[0] == 0
        runs.append([row for row in read_rows(output / "metrics.jsonl") if "split" not in row])
    assert sorted(compiled) == [("LlamaForCausalLM", {"dynamic": True})] * 2 + [("LlamaModel", {"dynamic": True})] * 2
    for plain, traced in zip(*runs, strict=True):
        assert all(traced[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-4) for key in ("score", "kl", "policy_loss", "value_loss", "grad_norm", "ratio_first"))


def test_attention_is_chosen_for_every_model_and_one_that_is_not_installed_is_refused(world, tmp_path, run_stage, monkeypatch):
    seen, place = [], common.place
    record = lambda model, *arguments: (seen.append((type(model).__name__, model.config._attn_implementation)), place(model, *arguments))
    monkeypatch.setattr(common, "place", record)
    assert run_stage(ppo, *flags(world, tmp_path / "out", "--attention", "eager"))[0] == 0
    assert sorted(seen) == [("LlamaForCausalLM", "eager")] * 2 + [("LlamaForSequenceClassification", "eager")] * 2
    seen.clear()
    assert run_stage(ppo, *flags(world, tmp_path / "auto"))[0] == 0
    assert {attention for _, attention in seen} == {"sdpa"}  # what transformers takes
    if not importlib.util.find_spec("flash_attn"):
        status, _, err = run_stage(ppo, *flags(world, tmp_path / "none", "--attention", "flash_attention_2"))
        assert status == 2 and "sft can't be loaded: FlashAttention2" in err and "; or leave out --attention flash_attention_2" in err and "make it with" not in err and not (tmp_path / "none").exists()


def test_the_shared_critic_spares_the_second_trained_model(world, tmp_path, run_stage):
    memory = {}
    for critic in ("separate", "shared"):
        status, out, _ = run_stage(ppo, *flags(world, tmp_path / critic, "--critic", critic))
        memory[critic] = float(re.search(r"weights, gradients and Adam's moments take ([\d.e-]+) GB", out)[1])
        policy = 4 * common.AutoModelForCausalLM.from_pretrained(world / "sft").num_parameters()  # bytes of weights
        reward_model = 4 * common.AutoModelForSequenceClassification.from_pretrained(world / "reward_model").num_parameters()
        trained = policy + (reward_model if critic == "separate" else 4 * 17)
        expected = 4 * trained + policy + reward_model  # with a gradient and two moments; what is frozen has none
        assert status == 0 and memory[critic] == pytest.approx(expected / 1e9, rel=1e-2)
    assert memory["shared"] < 0.7 * memory["separate"]


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_with_bf16_the_frozen_models_matrices_are_bf16_and_the_trained_ones_float32(world, dtype):
    cfg = ppo.Config(policy=str(world / "sft"), reward=[str(world / "reward_model")], dtype=dtype)
    tokenizer, row = common.load_tokenizer(cfg.policy), rows.Row(prompt="A")
    row.prompt_ids = [5, 6]
    policy, ref_policy, critic, (scorer,) = ppo.load_models(cfg, tokenizer, [row], torch.device("cpu"))
    frozen = torch.bfloat16 if dtype == "bf16" else torch.float32
    for model, expected in ((policy, torch.float32), (critic, torch.float32), (ref_policy, frozen), (scorer.model, frozen)):
        assert model.base_model.layers[0].mlp.up_proj.weight.dtype == expected
    assert scorer.model.score.weight.dtype == torch.float32


def test_precision_is_a_property_of_a_model_and_needs_no_context_around_its_calls(monkeypatch):
    """The oracle is torch.autocast around the calls of a model that was placed nowhere."""
    prompts, mask = left_padded([[5, 6, 7], [6]])
    bf16, inputs = torch.autocast("cpu", torch.bfloat16), dict(input_ids=prompts, position_ids=common.position_ids(mask), attention_mask=mask)
    sample_tokens, read = common.sample_tokens, []
    monkeypatch.setattr(common, "sample_tokens", lambda logits, *rest: (read.append(logits), sample_tokens(logits, *rest))[1])

    def outputs(policy, scalar):
        """Logits and scores, and of five sampled tokens the ids and each step's logits."""
        torch.manual_seed(0)
        read.clear()
        logits, scores = common.forward(policy, prompts, mask).logits, common.token_scores(scalar, prompts, mask)
        return logits, scores, common.generate_responses(policy, prompts, mask, 5, 1.0)[0], *read

    placed = tiny_lm(), tiny_scalar()
    for model in placed:
        common.place(model, torch.device("cpu"), "bf16")
    ours, of_a_copy = outputs(*placed), outputs(*copy.deepcopy(placed))
    in_float32 = outputs(tiny_lm(), tiny_scalar())
    assert not torch.is_autocast_enabled("cpu") and all(logits.dtype == torch.float32 for logits in (in_float32[0], *in_float32[3:]))
    assert len(read) == 5 and all(logits.dtype == torch.bfloat16 for logits in (ours[0], *ours[3:])) and ours[1].dtype == torch.float32

    policy, scalar = tiny_lm(), tiny_scalar()
    with bf16:
        logits, hidden = policy(**inputs).logits, scalar.model(**inputs).last_hidden_state
    scores = (torch.nn.functional.linear(hidden.float(), scalar.score.weight).squeeze(-1) - 0.25) / 2  # the head in float32
    monkeypatch.setattr(common, "autocast", lambda model: contextlib.nullcontext())
    torch.manual_seed(0)
    read.clear()
    with bf16:
        sampled, _ = common.generate_responses(policy, prompts, mask, 5, 1.0)
    for theirs in (ours, of_a_copy):
        assert all(torch.equal(a, b) for a, b in zip(theirs, (logits, scores, sampled, *read), strict=True))


def without_a_critic(monkeypatch):
    """The fork as its two lines: an estimator that trains no value, and no critic."""

    def reinforce(rewards, values, response_mask, gamma, lam):
        advantages = torch.where(response_mask, rewards.sum(1, keepdim=True), 0.0)
        return advantages, torch.zeros_like(values), torch.zeros_like(response_mask)

    monkeypatch.setattr(ppo, "load_critic", lambda *arguments, **options: None)
    monkeypatch.setitem(ppo.ESTIMATORS, "gae", (reinforce, ppo.value_loss))


def test_an_advantage_without_a_critic_is_a_fork_of_one_function_and_critic_none_goes_through_everything(world, tmp_path, run_stage, monkeypatch):
    without_a_critic(monkeypatch)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--lr", "1e-3", "--explain", "--save-every", "1"]
    status, out, err = run_stage(ppo, *flags(world, whole, *more))
    assert status == 0 and "critic" not in out.replace("critic_", "").split("held-out")[0], err
    steps = lambda folder: [
        {key: value for key, value in row.items() if "second" not in key and key != "peak_memory_gb"}
        for row in read_rows(folder / "metrics.jsonl") if "split" not in row
    ]
    weights = lambda folder: common.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    new, old = weights(whole), weights(world / "sft")
    assert any(not torch.equal(new[key], old[key]) for key in old) and not (whole / "critic").exists()
    rows = steps(whole)
    assert len(rows) == 2 and all(row["critic_grad_norm"] is None and row["value_loss"] == 0 for row in rows)
    assert all(row["grad_norm"] > 0 and row["ratio_first"] == 1 for row in rows)

    adapt, calls = ppo.adapt_kl_coef, []
    monkeypatch.setattr(ppo, "adapt_kl_coef", lambda *arguments: calls.append(1) or (adapt(*arguments) if len(calls) == 1 else 1 / 0))
    with pytest.raises(ZeroDivisionError):  # in the second iteration, after its update
        run_stage(ppo, *flags(world, parts, *more))
    assert (parts / "checkpoint-1" / "model.safetensors").exists() and not (parts / "checkpoint-1" / "critic").exists()
    monkeypatch.setattr(ppo, "adapt_kl_coef", adapt)
    assert run_stage(ppo, "--resume", "--output", parts)[0] == 0
    resumed = weights(parts)
    assert steps(parts) == rows and all(torch.equal(resumed[key], new[key]) for key in new)
    assert run_stage(ppo, "--resume", "--output", parts, "--iterations", "3")[0] == 0  # and a finished one goes on
    assert [row["iteration"] for row in steps(parts)] == [1, 2, 3] and not (parts / "critic").exists()


def test_without_a_critic_the_rehearsal_runs_too_and_leaves_everything_as_it_was(world, monkeypatch):
    without_a_critic(monkeypatch)
    prompts, told = [str(world / "prompts.jsonl")], []
    cfg = ppo.Config(
        policy=str(world / "sft"), reward=[str(world / "reward_model")], prompts=prompts, eval_prompts=prompts, batch_size=4,
        minibatch_size=2, microbatch_size=2, response_length=5, entropy_coef=0.01,
    )
    tokenizer = common.load_tokenizer(cfg.policy)
    prompt_rows, _ = rows.load_prompts(cfg, tokenizer)
    models = policy, ref_policy, critic, _ = ppo.load_models(cfg, tokenizer, prompt_rows, torch.device("cpu"))
    optimizer, _ = ppo.make_optimizer(cfg, policy, critic)
    before = copy.deepcopy(policy.state_dict())
    fork_rng = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, **options: fork_rng(devices=[], **options))
    monkeypatch.setattr(report, "measured_peak", told.append)
    run = types.SimpleNamespace(cfg=cfg, device=types.SimpleNamespace(type="cuda"), phase=lambda name: None)
    ppo.rehearse(run, *models, optimizer, prompt_rows)
    assert critic is None and told == [run.device] and not optimizer.state and all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(before[key], weight) for key, weight in policy.state_dict().items())
