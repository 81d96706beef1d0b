"""Invariants of ppo.py with real (tiny, random) models: log-probabilities, masks, the update."""

import collections
import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
from conftest import read_rows, tiny_lm, write_rows
from safetensors.torch import load_file
from test_ppo_math import naive_gae
from test_resume import contents
from transformers import AutoModelForCausalLM

import common
import harness
import ppo
from rewards import FunctionScorer

EOS, PAD, WEIGHTS = 1, 0, "model.safetensors"
KINDS = [("separate", "gae"), ("separate", "bandit"), ("shared", "gae"), ("shared", "bandit")]


@pytest.fixture(scope="module")
def world(world, tmp_path_factory):
    """The same with a policy that ends soon, so that responses have unequal lengths."""
    folder = shutil.copytree(world, tmp_path_factory.mktemp("ends") / "world")
    path = folder / "sft" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(range(1, 60))}))
    return folder


@pytest.fixture
def train(world, tmp_path, run_stage):
    """train(*flags, output=tmp_path) -> (the training rows of metrics.jsonl, what is printed)."""

    def run(*more, output=tmp_path):
        prompts = world / "prompts.jsonl"
        flags = ["--policy", world / "sft", "--reward", world / "reward_model", "--prompts", prompts]
        flags += ["--eval-prompts", prompts, "--output", output, "--iterations", 1, "--response-length", 6]
        flags += ["--batch-size", 8, "--minibatch-size", 8, "--microbatch-size", 8, "--device", "cpu"]
        status, out, err = run_stage(ppo, *flags, *more)
        assert status == 0, err
        return [row for row in read_rows(output / "metrics.jsonl") if "split" not in row], out

    return run


def a_rollout(policy):
    """Sampled responses to prompts of unequal length: tokens, attention_mask, response_mask."""
    torch.manual_seed(1)
    prompts, prompt_mask = common.pad([[5] * (1 + row % 3) + [6] for row in range(6)], PAD, "left")
    response, _ = common.generate_responses(policy, prompts, prompt_mask, 7, 1.0)
    response_mask = ppo.mask_through_first_eos(response, [EOS])
    return torch.cat([prompts, response], 1), torch.cat([prompt_mask, response_mask], 1), response_mask


def alone(policy, critic, ids, num_response, temperature):
    """The oracle of `forward_responses`: a row without padding, read token by token."""
    first = len(ids) - num_response
    output = policy(ids[None], output_hidden_states=True)
    distributions = (output.logits[0] / temperature).log_softmax(-1)
    if isinstance(critic, ppo.ValueHead):
        values = critic(output.hidden_states[-1][0]).squeeze(-1)
    else:
        values = (critic.score(critic.model(ids[None]).last_hidden_state[0]).squeeze(-1) - 0.25) / 2
    logprobs, entropies = [], []
    for t in range(first, len(ids)):
        before = distributions[t - 1]  # what the model said just before this token
        logprobs.append(before[ids[t]])
        entropies.append(-(before.exp() * before).sum())
    return torch.stack(logprobs), values[first - 1 : -1], torch.stack(entropies)


@pytest.mark.parametrize("prompt, temperature", [([3, 2], 1.0), ([2], 0.6)])
def test_sampled_responses_follow_the_distribution_that_is_scored(prompt, temperature):
    """Counts of all possible responses lie within 5 sigma of 8,000 samples (false alarm < 1e-4)."""
    policy, number = tiny_lm(vocab_size=4), 8000
    torch.manual_seed(0)
    padded, mask = common.pad([prompt, [2, 2, 2]], PAD, "left")  # padded by the other one
    prompts, prompt_mask = padded[:1].expand(number, -1), mask[:1].expand(number, -1)
    sampled, _ = common.generate_responses(policy, prompts, prompt_mask, 3, temperature)
    counts = collections.Counter(tuple(row) for row in sampled.tolist())
    responses = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(4))
    mask = ppo.mask_through_first_eos(responses, [EOS])
    responses = responses[((responses == PAD) | mask).all(1)]  # one way to fill up after an EOS
    tokens = torch.cat([torch.tensor([prompt]).expand(len(responses), -1), responses], 1)
    mask = ppo.mask_through_first_eos(responses, [EOS])
    logprobs, _, _ = ppo.forward_responses(policy, None, tokens, torch.ones_like(tokens).bool(), 3, temperature)
    p = torch.where(mask, logprobs, 0.0).sum(1).exp().double()
    seen = torch.tensor([counts.pop(tuple(row), 0) for row in responses.tolist()])
    assert not counts and abs(p.sum().item() - 1) < 1e-5
    assert ((seen - number * p).abs() < 5 * (number * p * (1 - p)).sqrt() + 1).all()


def test_only_the_logits_are_kept_for_backward(monkeypatch):
    """The vocabulary is the widest by far."""
    monkeypatch.setattr(ppo, "PIECE", 2 * 7 * 3000)  # two rows at a time
    policy, kept = tiny_lm(vocab_size=3000), {}
    tokens, mask, _ = a_rollout(policy)

    def keep(x):
        if x.shape[-1:] == (3000,) and x.ndim == 3:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, torch.nn.Identity()):
        ppo.forward_responses(policy, None, tokens, mask, 7, 0.7, True)
    assert sum(x.untyped_storage().nbytes() for x in kept.values()) == 6 * 7 * 3000 * 4


# === The update of the real loop, by hand =========================================================
PASSES = [4, 3, 1, 4, 3, 1]  # sizes of micro-batches; in the last three, junk in masked slots


def junk_where_masked(batch):
    changes = {"tokens": torch.where(batch.attention_mask, batch.tokens, 7)}
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
        changes[name] = torch.where(batch.response_mask, getattr(batch, name), math.nan)
    return dataclasses.replace(batch, **changes)


def record_the_update(monkeypatch):
    """Makes pi_old, pi_ref and V_old differ from the models, and each pass take another size of
    micro-batches. Returns a record of models, batch, old numbers and gradients.
    """
    seen = {"gradients": []}
    evaluate_tokens, micro_batches, load_models = ppo.evaluate_tokens, ppo.Batch.micro_batches, ppo.load_models

    def evaluate_with_noise(policy, critic, *arguments):
        results = evaluate_tokens(policy, critic, *arguments)
        if critic is not None:  # in the loop
            noise = torch.randn(results.shape, generator=torch.Generator().manual_seed(0))
            noise[0, 1, 0] = 400  # a ratio of 0; its logarithm is finite before exp
            results = results + 0.3 * noise
            seen["old"] = results
        return results.unbind()

    def micro_batches_of_changing_size(batch, index, size):
        number = len(seen["gradients"]) // 4  # two models, two minibatches
        seen["batch"] = batch
        assert size == 5  # as the flag says
        return micro_batches(junk_where_masked(batch) if number > 2 else batch, index, PASSES[number])

    def keep_gradients(weights, max_norm):
        seen["gradients"].append([weight.grad.clone() for weight in weights])
        return torch.tensor(1.0)

    def keep_models(*arguments):
        seen["models"] = load_models(*arguments)
        return seen["models"]

    def minibatches(batch_size, minibatch_size, epochs, generator):
        assert (batch_size, minibatch_size, epochs) == (8, 4, len(PASSES))
        return [torch.tensor([0, 2, 4, 6]), torch.tensor([1, 3, 5, 7])] * epochs

    for name, replacement in (
        ("evaluate_tokens", evaluate_with_noise), ("clip_grad_norm_", keep_gradients),
        ("load_models", keep_models), ("minibatches", minibatches), ("MAX_GAP", math.inf),
        ("PIECE", 2 * 6 * 320),  # logits of two rows
    ):
        monkeypatch.setattr(ppo, name, replacement)
    monkeypatch.setattr(ppo.Batch, "micro_batches", micro_batches_of_changing_size)
    return seen


def losses_by_hand(seen, advantage):
    """Eqs. 1 to 7 in Python: (loss, [policy and value loss, approx_kl, clip fraction]) of each of
    the two minibatches, and the means of the two estimates of the KL.
    """
    (policy, _, critic, (scorer,)), batch = seen["models"], seen["batch"]
    rows, everything, kls, k3s = [], [], [], []
    for i, mask in enumerate(batch.response_mask):
        ids, length = batch.tokens[i][batch.attention_mask[i]], int(mask.sum())
        old, old_ref, old_values, _ = seen["old"][:, i, :length]
        score = (scorer.model.score(scorer.model.model(ids[None]).last_hidden_state[0, -1]).item() - 0.25) / 2
        score -= 0 if ids[-1] in policy.generation_config.eos_token_id else 1.5
        token_kl = (old - old_ref).tolist()
        kls.append(sum(token_kl))
        k3s.append(sum(math.exp(-x) - 1 + x for x in token_kl))
        rewards = [-0.15 * x for x in token_kl]  # eq. 1
        rewards[-1] += score
        if advantage == "gae":
            advantages = naive_gae(rewards, old_values.tolist(), 0.9, 0.8)  # eq. 2
            returns = old_values + torch.tensor(advantages)  # eq. 3
        else:
            returns = [sum(rewards)]  # eq. 2b
            advantages = [returns[0] - old_values[0].item()] * length
        rows.append((ids, old, old_values, advantages, returns))
        everything += advantages
    mean = sum(everything) / len(everything)
    std = math.sqrt(sum((a - mean) ** 2 for a in everything) / len(everything))
    results = []
    for first in (0, 1):
        terms = collections.defaultdict(list)
        for ids, old, old_values, advantages, returns in rows[first::2]:
            logprobs, values, entropy = alone(policy, critic, ids, len(old), 0.8)
            terms["entropy"] += entropy
            for log_ratio, advantage_t in zip(logprobs - old, advantages):
                ratio, a = log_ratio.exp(), (advantage_t - mean) / std  # eq. 4
                terms["policy"].append(-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a))  # eq. 5
                terms["kl"].append(math.expm1(log_ratio.item()) - log_ratio.item())
                terms["clipped"].append(not 0.8 <= ratio.item() <= 1.2)
            for v, v_old, target in zip(values, old_values, returns):
                error, clipped = (v - target) ** 2, v_old + (v - v_old).clamp(-0.1, 0.1)
                half_max = 0.5 * torch.max(error, (clipped - target) ** 2)
                terms["value"].append(half_max if advantage == "gae" else error)  # eq. 6
        means = {name: sum(numbers) / len(numbers) for name, numbers in terms.items()}
        loss = means["policy"] + 0.1 * means["value"] - 0.01 * means["entropy"]  # eq. 7
        results.append((loss, [float(means[k]) for k in ("policy", "value", "kl", "clipped")]))
    return results, [sum(kls) / len(kls), sum(k3s) / len(k3s)]


@pytest.mark.parametrize("critic, advantage, more", [
    (*KINDS[0], ["--gradient-checkpointing"]), (*KINDS[1], []), (*KINDS[2], []), (*KINDS[3], []),
])
def test_gradients_of_the_loop_are_those_of_eqs_1_to_7_by_hand_at_any_micro_batch_size(
    tmp_path, train, monkeypatch, critic, advantage, more
):
    """And junk in masked slots changes no bit of them, and none is left for the next step."""
    seen = record_the_update(monkeypatch)
    (row,), _ = train(
        "--lr", 0, "--critic-lr", 0, "--gamma", 0.9, "--lam", 0.8, "--temperature", 0.8, "--entropy-coef", 0.01,
        "--critic", critic, "--advantage", advantage, "--minibatch-size", 4, "--microbatch-size", 5,
        "--ppo-epochs", len(PASSES), "--missing-eos-penalty", 1.5, "--value-clip-eps", 0.1, *more,
    )
    policy, _, critic, _ = seen["models"]
    assert policy.is_gradient_checkpointing == bool(more)
    weights, pairs = [*policy.parameters(), *critic.parameters()], iter(seen["gradients"])
    steps = [of_policy + of_critic for of_policy, of_critic in zip(pairs, pairs)]
    lengths = seen["batch"].response_mask.sum(1)
    assert len(steps) == 2 * len(PASSES) and lengths.min() < lengths.max()
    losses, kls = losses_by_hand(seen, advantage)
    for i, (loss, _) in enumerate(losses):
        expected = torch.autograd.grad(loss, weights, allow_unused=True)
        for step in (steps[i], steps[i + 2], steps[i + 4]):
            for ours, theirs in zip(step, expected, strict=True):
                assert (ours - theirs).abs().max() < 1e-5 + 1e-5 * theirs.abs().max()
        for ours, theirs in zip(steps[i + 2] + steps[i + 4], steps[i] * 2, strict=True):
            assert (ours - theirs).abs().max() < 1e-6
    for plain, junk in zip(steps[:6], steps[6:]):
        assert all(torch.equal(a, b) for a, b in zip(plain, junk, strict=True))
    logged = [row[name] for name in ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "kl", "kl_k3")]
    means = [(a + b) / 2 for a, b in zip(losses[0][1], losses[1][1])]
    assert logged == pytest.approx([*means, *kls], rel=1e-4)


# === Whole runs ===================================================================================
@pytest.mark.parametrize("critic, advantage", KINDS)
def test_updates_start_at_ratio_1_the_run_at_kl_0(tmp_path, train, critic, advantage):
    """And --explain shows eqs. 1 to 3, and the printed memory is that of the models trained."""
    rows, out = train(
        "--critic", critic, "--advantage", advantage, "--iterations", 3, "--temperature", 0.8, "--lr", 0.01,
        "--minibatch-size", 4, "--microbatch-size", 3, "--explain", "--eval-every", 1,
    )
    assert len(rows) == 3 and abs(rows[0]["kl"]) < 1e-5 and rows[2]["kl"] != 0
    for row in rows:
        assert abs(row["ratio_first"] - 1) < 1e-6 and row["approx_kl_first"] < 1e-6
        assert row["approx_kl"] > 0 and row["kl_coef"] == 0.15  # without --kl-target
    tables = re.findall(r" t token.*\n((?: *\d+ .*\n)+)", out)
    assert len(tables) == 3 and max(table.count("\n") for table in tables) > 1
    for table in tables:
        lines = [[float(x) for x in line.split()[-7:]] for line in table.splitlines()]
        for logprob, ref_logprob, kl, value, reward, advantage_t, result in lines:
            assert kl == pytest.approx(logprob - ref_logprob, abs=2e-3)
            baseline = value if advantage == "gae" else lines[0][3]
            assert result == pytest.approx(advantage_t + baseline, abs=2e-3)
        scores = [line[4] + 0.15 * line[2] for line in lines]  # reward without the penalty
        assert abs(scores[-1]) > 2e-3 and max(map(abs, [0, *scores[:-1]])) < 2e-3
    policy = 4 * AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()  # bytes
    reward_model = policy - 4 * 16 * 319  # 320 rows of an LM head, one of a score head
    trained = policy + (reward_model if critic == "separate" else 0)
    memory = float(re.search(r"weights, gradients and Adam's moments take ([\d.e-]+) GB", out)[1])
    assert memory == pytest.approx((4 * trained + policy + reward_model) / 1e9, rel=0.01)


def test_a_small_step_changes_most_weights_of_policy_and_critic(world, tmp_path, train):
    train("--lr", 3e-6, "--critic-lr", 3e-6)
    for saved, original in ((".", "sft"), ("critic", "reward_model")):
        new, old = load_file(tmp_path / saved / WEIGHTS), load_file(world / original / WEIGHTS)
        del new["model.embed_tokens.weight"]  # most of its tokens never came
        changed = sum((new[key] != old[key]).sum().item() for key in new)
        assert changed > 0.5 * sum(weight.numel() for weight in new.values())


def test_lr_falls_beta_follows_eq_8_and_max_approx_kl_ends_an_update(train):
    limits = ["--max-approx-kl", 1e-4, "--kl-target", 0.2]
    rows, _ = train("--iterations", 15, "--lr", 0.01, "--response-length", 2, *limits)
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * (1 - i / 15) for i in range(15)])
    assert all(row["optimizer_steps"] == 2 for row in rows)  # one taken, the second is too far
    for row, following in zip(rows, rows[1:]):
        error = min(max(row["kl"] / 0.2 - 1, -0.2), 0.2)  # by default the horizon is 15 * 8 / 12
        assert following["kl_coef"] == pytest.approx(row["kl_coef"] * (1 + error * 8 / 10))


def test_max_approx_kl_stops_a_ratio_that_overflows(world, tmp_path, train, monkeypatch):
    """In float32, exp(99) is inf; inf - 1 - log(inf) would be nan, which is above no limit."""
    evaluate_tokens = ppo.evaluate_tokens

    def evaluate_far_off(policy, critic, *arguments):
        logprobs, *rest = evaluate_tokens(policy, critic, *arguments)
        return logprobs - 99.0 * (critic is not None), *rest

    monkeypatch.setattr(ppo, "evaluate_tokens", evaluate_far_off)
    monkeypatch.setattr(ppo, "MAX_GAP", math.inf)
    (row,), _ = train("--max-approx-kl", 0.5, "--lr", 0.01)
    assert row["optimizer_steps"] == 1 and row["approx_kl"] is None  # of inf, JSON has none
    new, old = load_file(tmp_path / WEIGHTS), load_file(world / "sft" / WEIGHTS)
    assert all(torch.equal(new[key], old[key]) for key in old)


REWARDS = """
import random, torch
calls, drawn = [], []
def zero(prompts, responses, rows):
    calls.append((prompts, responses, rows))
    return [0.0] * len(rows)
def drawing(prompts, responses, rows):
    drawn.append((random.random(), torch.rand(1).item()))
    if len(drawn) == 4:
        random.seed(99), torch.manual_seed(99)
    return [0.0] * len(rows)
"""


def test_a_reward_sees_each_prompt_k_times_a_missing_eos_costs_and_random_numbers_change_nothing(tmp_path, train):
    (tmp_path / "reward.py").write_text(REWARDS)
    prompts = write_rows(tmp_path / "mine.jsonl", [{"prompt": f"A fox {i}.", "answer": i} for i in range(8)])
    runs = []
    for name in ("zero", "drawing"):
        rows, _ = train(
            "--reward", f"{tmp_path}/reward.py:{name}", "--prompts", prompts, "--samples-per-prompt", 2, "--lr", 0.01,
            "--iterations", 2, "--ppo-epochs", 1, "--missing-eos-penalty", 3, "--advantage", "bandit", "--kl-coef", 0,
            output=tmp_path / name,
        )
        runs.append(contents(tmp_path / name))
    assert runs[0] == runs[1] and rows[1]["kl"] != 0
    seen = harness.load_function(f"{tmp_path}/reward.py:zero").__globals__
    assert len(seen["drawn"]) == 8 and all(len(set(column)) == 8 for column in zip(*seen["drawn"]))
    in_loop = seen["calls"][3:5]  # 24 held-out prompts come first, and last, 8 at a time
    assert len(seen["calls"]) == 3 + 2 + 3
    for prompts, responses, given in in_loop:
        answers = [row["answer"] for row in given]
        assert prompts == [f"A fox {i}." for i in answers] and answers[::2] == answers[1::2]
        assert len(set(responses)) > 4 and all(isinstance(text, str) for text in responses)
    assert sorted(row["answer"] for _, _, given in in_loop for row in given[::2]) == list(range(8))
    assert rows[0]["score"] == 0 and 0 < rows[0]["eos_rate"] < 1
    assert rows[0]["value_loss"] == pytest.approx(9 * (1 - rows[0]["eos_rate"]))  # V starts at 0


# === Models and evaluation ========================================================================
def loaded(world, **changes):
    """(cfg, tokenizer, rows, models) as main has them before its loop."""
    prompts = [str(world / "prompts.jsonl")]
    files = dict(policy=str(world / "sft"), reward=[str(world / "reward_model")], prompts=prompts, eval_prompts=prompts)
    cfg = ppo.Config(response_length=6, batch_size=16, microbatch_size=32, **files, **changes)
    tokenizer = common.load_tokenizer(cfg.policy)
    rows, _ = ppo.load_prompts(cfg, tokenizer)
    return cfg, tokenizer, rows, ppo.load_models(cfg, tokenizer, 64, torch.device("cpu"))


def test_compile_wraps_each_of_the_four_models_and_changes_no_gradient(world, monkeypatch):
    """Traced by dynamo, with torch's plain kernels in place of generated ones."""
    compile_module, compiled, gradients = torch.nn.Module.compile, [], []

    def compile_plainly(model, dynamic):
        compiled.append(f"{type(model).__name__} {dynamic}")
        compile_module(model, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_plainly)
    loaded(world, compile=True)
    assert sorted(compiled) == ["LlamaForCausalLM True"] * 2 + ["LlamaModel True"] * 2
    tokens, mask, response_mask = a_rollout(tiny_lm())
    for is_compiled in (False, True):
        policy = tiny_lm()
        common.to_device(policy, torch.device("cpu"), "float32", compile=is_compiled)
        logprobs, _, _ = ppo.forward_responses(policy, None, tokens, mask, 7, 1.0)
        gradients.append(torch.autograd.grad(logprobs[response_mask].sum(), policy.parameters()))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*gradients, strict=True))


def test_evaluation_samples_are_the_same_at_each_call_and_draw_nothing_from_torch(world):
    cfg, tokenizer, rows, (policy, ref_policy, _, scorers) = loaded(world)
    judge = FunctionScorer(f"{harness.DATA / 'true_reward.py'}:true_reward")
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(ppo.evaluate(cfg, policy, ref_policy, tokenizer, scorers, judge, rows))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]
    assert [sample["prompt"] for sample in results[0]] == [row["prompt"] for row in rows]
    assert len({sample["response"] for sample in results[0]}) > 12  # not one for all prompts
    other = dataclasses.replace(cfg, seed=1)
    assert ppo.evaluate(other, policy, ref_policy, tokenizer, scorers, judge, rows) != results[0]


@pytest.mark.parametrize("dtype, attention", [("float32", "auto"), ("bf16", "eager")])
def test_frozen_matrices_are_bf16_attention_is_that_of_the_flag_and_the_critic_a_copy(world, dtype, attention):
    *_, (policy, ref_policy, critic, (scorer,)) = loaded(world, dtype=dtype, attention=attention)
    frozen = torch.bfloat16 if dtype == "bf16" else torch.float32
    for model in (policy, ref_policy, critic, scorer.model):
        is_trained = model in (policy, critic)
        assert model.base_model.layers[0].mlp.up_proj.weight.dtype == (torch.float32 if is_trained else frozen)
        assert all(weight.requires_grad == is_trained for weight in model.parameters())
        assert model.config._attn_implementation == {"auto": "sdpa"}.get(attention, attention)
    assert scorer.model.score.weight.dtype == torch.float32
    tokens, mask, _ = a_rollout(tiny_lm())  # it predicts the score itself at the end
    assert torch.equal(common.token_scores(critic, tokens, mask), common.token_scores(scorer.model, tokens, mask))
    assert critic.score.weight.data_ptr() != scorer.model.score.weight.data_ptr()
    with pytest.raises(common.UserError, match="sft can't be loaded.*[Ff]lash"):
        loaded(world, attention="flash_attention_2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ratio_1_and_kl_0_hold_on_cuda_in_bf16(tmp_path, train, critic):
    """For another shape cuBLAS may add in another order. Then a logit is the next bf16 number, at
    most 2^-8 of its size away, and a log-probability moves by at most twice that.
    """
    rows, _ = train("--critic", critic, "--dtype", "bf16", "--device", "cuda", "--lr", 1e-4, "--iterations", 2)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    bound = 2 * 2**-8 * policy(torch.arange(3, 67)[None]).logits.abs().max().item()  # nats a token
    assert all(abs(row["ratio_first"] - 1) <= math.expm1(bound) for row in rows)
    assert all(row["approx_kl_first"] <= math.expm1(bound) - bound for row in rows)
    assert abs(rows[0]["kl"]) <= bound * rows[0]["response_length"]
