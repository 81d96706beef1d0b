"""Masks, rewards, advantages and losses of ppo.py, against values worked by hand in float64."""

import math

import pytest
import torch

import common
import ppo
from plumbing import metrics

MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(a, b):
    assert a.dtype == torch.float64
    assert torch.allclose(a, torch.as_tensor(b, dtype=torch.float64), rtol=0, atol=1e-12), (a, b)


def test_mask_is_true_through_the_first_eos_of_any_kind():
    response = torch.tensor([[5, 1, 0, 0], [5, 6, 7, 8], [1, 5, 1, 0], [2, 0, 0, 0], [5, 6, 7, 1], [0, 0, 1, 5]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert ppo.mask_through_first_eos(response, [1, 2]).tolist() == torch.tensor(expected).bool().tolist()


def test_a_sampled_pad_token_counts_and_a_missing_eos_masks_nothing():
    assert ppo.mask_through_first_eos(torch.tensor([[0, 5, 0, 6]]), [1]).all()


def test_score_lands_on_the_last_counted_token_and_kl_on_every_token():
    scores, kl = float64([2.0, -1.0, 5.0]), torch.full((3, 4), 0.5).double()
    rewards = ppo.kl_shaped_rewards(scores, kl, MASK, kl_coef=0.2)
    close(rewards, [[-0.1, -0.1, -0.1, 1.9], [-0.1, -1.1, 0, 0], [4.9, 0, 0, 0]])


def test_kl_penalty_lowers_the_reward_of_tokens_likelier_than_under_the_reference():
    kl = torch.tensor([[1.0, -1.0]])
    rewards = ppo.kl_shaped_rewards(torch.zeros(1), kl, torch.ones(1, 2).bool(), kl_coef=0.1)
    assert rewards[0, 0] < 0 < rewards[0, 1]


def naive_gae(rewards, values, length, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, straight from the definition, in Python floats."""
    value = lambda t: values[t] if t < length else 0.0
    delta = [rewards[t] + gamma * value(t + 1) - value(t) for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_its_definition(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in "rv")
    advantages, returns, _ = ppo.gae(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(MASK.sum(1).tolist()):
        expected = naive_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        close(advantages[row, :length], expected)
        close(returns[row, :length], float64(expected) + values[row, :length])
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_gae_with_lambda_one_is_reward_to_go_minus_value():
    rewards, values = float64([[1.0, 2.0, 4.0]]), float64([[0.5, 7.0, -3.0]])
    advantages, returns, _ = ppo.gae(rewards, values, torch.ones(1, 3).bool(), 1.0, 1.0)
    close(returns, [[7.0, 6.0, 4.0]])
    close(advantages, [[6.5, -1.0, 7.0]])


def test_gae_with_lambda_zero_is_the_one_step_error():
    rewards, values = float64([[1.0, 2.0, 4.0]]), float64([[0.5, 7.0, -3.0]])
    advantages, _, _ = ppo.gae(rewards, values, torch.ones(1, 3).bool(), 0.5, 0.0)
    close(advantages, [[1 + 0.5 * 7 - 0.5, 2 + 0.5 * -3 - 7, 4 - -3]])


def test_bandit_gives_every_token_the_whole_return_minus_the_prompts_value():
    rewards = float64([[1.0, 2.0, 0.0, 3.0], [1.0, -4.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    values = float64([[0.5, 9.0, 9.0, 9.0], [1.0, 9.0, 9.0, 9.0], [0.25, 9.0, 9.0, 9.0]])
    arguments = rewards, values, MASK, 1.0, 0.95
    assert ppo.ESTIMATORS["bandit"] == (ppo.bandit, ppo.bandit_value_loss) and ppo.ESTIMATORS["gae"] == (ppo.gae, ppo.value_loss)
    advantages, returns, value_mask = ppo.bandit(*arguments)
    close(advantages, [[5.5, 5.5, 5.5, 5.5], [-4, -4, 0, 0], [0.25, 0, 0, 0]])
    close(returns, [[6, 6, 6, 6], [-3, -3, 0, 0], [0.5, 0, 0, 0]])
    assert value_mask.tolist() == [[True, False, False, False]] * 3
    assert ppo.gae(*arguments)[2] is MASK


@pytest.mark.parametrize("advantage", ["gae", "bandit"])
def test_whitened_advantages_have_mean_0_and_deviation_1_over_counted_tokens(advantage):
    generator = torch.Generator().manual_seed(1)
    rewards, values = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in "rv")
    rewards = torch.where(MASK, rewards, 0.0)
    advantages, _, _ = ppo.ESTIMATORS[advantage][0](rewards, values, MASK, 1.0, 0.95)
    counted = ppo.whiten(advantages, MASK)[MASK].tolist()
    mean = sum(counted) / len(counted)
    assert abs(mean) < 1e-12
    assert abs(math.sqrt(sum((x - mean) ** 2 for x in counted) / len(counted)) - 1) < 1e-6
    assert not ppo.whiten(advantages, MASK)[~MASK].any()


def test_policy_loss_is_the_clipped_objective_by_hand():
    ratios, advantages = [1.0, 1.5, 1.5, 0.5, 0.5], [2.0, 1.0, -1.0, 1.0, -1.0]
    new = float64(ratios).log() - 1.0
    loss, ratio = ppo.policy_loss(new, torch.full((5,), -1.0).double(), float64(advantages), 0.2)
    close(ratio, ratios)
    close(loss, [-2.0, -1.2, 1.5, -0.5, 0.8])  # -min(rho A, clip(rho, .8, 1.2) A)


def test_gradient_is_0_only_where_the_ratio_is_clipped_and_the_advantage_pushes_further_out():
    new = float64([1.0, 1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = float64([2.0, 1.0, -1.0, 1.0, -1.0])
    loss, _ = ppo.policy_loss(new, torch.zeros(5).double(), advantages, 0.2)
    loss.sum().backward()
    close(new.grad, [-2.0, 0.0, 1.5, -0.5, 0.0])  # -rho A where it is not clipped away


def test_value_loss_takes_the_worse_of_the_plain_and_the_clipped_error():
    new, old = float64([1.0, 0.5, 0.1, -1.0]), torch.zeros(4).double()
    returns = float64([2.0, 0.5, 1.0, 2.0])
    loss = ppo.value_loss(new, old, returns, 0.2)
    # plain errors 1, 0, .9, 3; clipped values .2, .2, .1, -.2 with errors 1.8, .3, .9, 2.2
    close(loss, [0.5 * 1.8**2, 0.5 * 0.3**2, 0.5 * 0.9**2, 0.5 * 3**2])


def test_the_bandits_value_loss_is_the_plain_squared_error():
    values = float64([1.0, 5.0]), torch.zeros(2).double(), float64([2.0, 2.0])
    close(ppo.bandit_value_loss(*values, 0.2), [1.0, 9.0])


def test_total_loss_adds_up_over_micro_batches_by_hand():
    policy, value = float64([1.0, 2.0, 3.0]), float64([4.0, 8.0])
    entropy = float64([0.5, 0.25, 0.25])
    whole = ppo.total_loss(policy, value, entropy, torch.tensor(3), torch.tensor(2), 0.1, 0.5)
    close(whole, 6 / 3 + 0.1 * 12 / 2 - 0.5 * 1 / 3)
    counts = torch.tensor(3), torch.tensor(2), 0.1, 0.5
    parts = ppo.total_loss(policy[:1], value[:1], entropy[:1], *counts)
    parts = parts + ppo.total_loss(policy[1:], value[1:], entropy[1:], *counts)
    close(parts, whole)


def test_approx_kl_estimates_the_kl_from_old_to_new_policy():
    old, new = float64([0.5, 0.3, 0.2]), float64([0.4, 0.2, 0.4])
    exact = sum(p * math.log(p / q) for p, q in zip(old.tolist(), new.tolist()))
    counts = torch.tensor([5, 3, 2])  # samples of the old policy in exact proportion
    ratio = (new / old).repeat_interleave(counts)
    zeros = torch.zeros_like(ratio)
    named = ppo.update_statistics(zeros, zeros, ratio, torch.tensor(10), torch.tensor(10), 0.25)
    assert abs(named["approx_kl"] - exact) < 1e-12
    assert abs(named["clip_fraction"] - 0.5) < 1e-12  # ratios 0.8 (inside), 0.667 and 2 (outside)
    assert abs(named["ratio"] - 1.0) < 1e-12  # the mean over old samples of new / old


def test_update_statistics_divide_each_loss_by_its_own_count():
    ratio = torch.ones(4).double()
    statistics = ppo.update_statistics(
        float64([1.0, 2, 3, 4]), float64([6.0]), ratio, torch.tensor(8), torch.tensor(3), 0.2
    )
    expected = {"policy_loss": 10 / 8, "value_loss": 6 / 3, "approx_kl": 0, "clip_fraction": 0, "ratio": 4 / 8}
    assert {name: float(number) for name, number in statistics.items()} == expected


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (6.6, 1 + 0.1 * 0.064), (60, 1 + 0.2 * 0.064), (0, 1 - 0.2 * 0.064)])
def test_beta_moves_against_the_target_by_at_most_a_fifth_of_batch_over_horizon(kl, factor):
    cfg = ppo.Config(kl_coef=0.15, kl_target=6.0, batch_size=64, kl_horizon=1000)
    assert abs(ppo.adapt_kl_coef(0.15, kl, cfg) - 0.15 * factor) < 1e-12


def test_beta_stays_without_a_target():
    assert ppo.adapt_kl_coef(0.15, 100.0, ppo.Config(kl_coef=0.15)) == 0.15


@pytest.mark.parametrize("iterations", [1, 12, 30, 2000])
@pytest.mark.parametrize("kl, bound", [(1e9, 1.5), (0.0, 0.015)])
def test_by_default_beta_can_go_a_factor_of_ten_within_the_run_and_never_further(iterations, kl, bound):
    cfg, kl_coef = ppo.Config(kl_coef=0.15, kl_target=6.0, iterations=iterations), 0.15
    for _ in range(iterations):
        assert 0.8 <= ppo.adapt_kl_coef(kl_coef, kl, cfg) / kl_coef <= 1.2
        kl_coef = ppo.adapt_kl_coef(kl_coef, kl, cfg)
    enough = iterations >= 30 or iterations == 12 and kl == 0
    assert 0.015 <= kl_coef <= 1.5 and (not enough or abs(kl_coef / bound - 1) < 0.2)
    for _ in range(3000):
        kl_coef = ppo.adapt_kl_coef(kl_coef, kl, cfg)
    assert kl_coef == pytest.approx(bound)


def test_minibatches_cover_every_row_once_per_epoch_in_new_orders():
    torch.manual_seed(0)
    steps = [index.tolist() for index in ppo.minibatches(12, 4, epochs=3)]
    epochs = [sum(steps[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_prompt_batches_use_every_prompt_before_any_comes_again():
    import random

    batches = ppo.endless_batches(list(range(10)), 4, random.Random(0))
    seen = [row for _ in range(5) for row in next(batches)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]


def test_batch_refuses_tensors_that_differ_from_its_table():
    good = dict(
        tokens=torch.zeros(2, 5).long(), attention_mask=torch.ones(2, 5).bool(), response_mask=torch.ones(2, 3).bool(),
        value_mask=torch.ones(2, 3).bool(), **{name: torch.zeros(2, 3) for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns")},
    )
    assert [micro.tokens.shape for micro in ppo.Batch(**good).micro_batches(torch.tensor([1, 0]), 1)] == [(1, 5), (1, 5)]
    for name, wrong in (("values", torch.zeros(2, 4)), ("ref_logprobs", torch.zeros(2, 4)), ("returns", torch.zeros(2, 3).double()), ("tokens", torch.zeros(2, 5))):
        with pytest.raises(AssertionError, match=name):
            ppo.Batch(**(good | {name: wrong}))


def test_micro_batches_hold_each_row_once_by_length_and_lose_no_token_that_counts():
    torch.manual_seed(0)
    num_prompt, num_response = torch.randint(1, 7, (20,)), torch.randint(1, 9, (20,))
    column = torch.arange(14)  # P = 6, R = 8
    attention_mask = (column >= 6 - num_prompt[:, None]) & (column < 6 + num_response[:, None])
    index = torch.tensor([3, 17, 0, 5, 9, 11, 2])
    parts = list(common.parts_by_length(attention_mask, index, 3))
    order = torch.cat([rows for rows, _ in parts])
    assert [len(rows) for rows, _ in parts] == [3, 3, 1] and sorted(order.tolist()) == sorted(index.tolist())
    lengths = (num_prompt + num_response)[order]
    assert (lengths.diff() >= 0).all() and lengths[0] < lengths[-1]
    for rows, columns in parts:
        assert attention_mask[rows, columns].sum() == attention_mask[rows].sum()  # no token is lost
        assert attention_mask[rows, columns][:, [0, -1]].any(0).all()  # and no column of padding is left outside


def test_win_rate_counts_ties_half_and_prefers_the_judge():
    sample = lambda score, truth: {"score": score, "true_reward": truth, "kl": 1.0}
    old = [sample(0, 1), sample(0, 1), sample(0, 1), sample(0, 1)]
    new = [sample(9, 2), sample(9, 1), sample(9, 0), sample(9, 2)]
    assert metrics.summarize(new, old)["win_rate"] == (1 + 0.5 + 0 + 1) / 4
    blind = [[sample(s["score"], None) for s in samples] for samples in (new, old)]
    assert metrics.summarize(*blind)["win_rate"] == 1.0 and metrics.summarize(*blind)["true_reward"] is None


HEALTHY = dict(
    approx_kl=0.02, approx_kl_first=0.0, ratio_first=1.0, eos_rate=0.95, response_length=20.0, score_std=1.0, kl=3.0, kl_k3=3.0,
    explained_variance=0.3, grad_norm=1.0, critic_grad_norm=1.0,
)


@pytest.mark.parametrize("symptom, change", [
    ("ratio", {"approx_kl_first": 0.01}), ("ratio", {"ratio_first": 0.9}), ("eos", {"eos_rate": 0.4}),
    ("length", {"response_length": 4.0}), ("score", {"score_std": 0.001}), ("far", {"kl": 80.0}),
    ("negative", {"kl": -2.0}), ("gradient", {"grad_norm": math.nan}), ("gradient", {"critic_grad_norm": math.inf}),
])
def test_each_symptom_has_its_warning_and_a_healthy_row_has_none(symptom, change):
    assert metrics.health_warnings([HEALTHY]) == {}
    assert list(metrics.health_warnings([HEALTHY | change])) == [symptom]


def test_the_critic_is_called_useless_only_after_ten_iterations():
    bad = HEALTHY | {"explained_variance": -0.1}
    assert metrics.health_warnings([bad] * 9) == {}
    assert list(metrics.health_warnings([bad] * 10)) == ["critic"]
    assert metrics.health_warnings([bad] * 10 + [HEALTHY]) == {}
