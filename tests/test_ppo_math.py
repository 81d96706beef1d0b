"""Masks, rewards, advantages and losses of ppo.py, against values worked by hand in float64."""

import math
import random
import statistics
import unittest.mock

import pytest
import torch

import common
import ppo

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(a, b):
    assert a.dtype == torch.float64
    assert torch.allclose(a, torch.as_tensor(b, dtype=torch.float64), rtol=0, atol=1e-12), (a, b)


def random_rewards_and_values(seed):
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mask_is_true_through_the_first_eos_of_any_kind_and_a_sampled_pad_token_counts():
    rows = [[5, 1, 0, 0], [5, 6, 7, 8], [1, 5, 1, 0], [2, 0, 0, 0], [5, 6, 7, 1], [0, 0, 1, 5], [0, 5, 0, 6]]
    mask = ppo.mask_through_first_eos(torch.tensor(rows), [1, 2])
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[t < length for t in range(4)] for length in (2, 4, 1, 1, 4, 3, 4)]


def test_score_lands_on_the_last_counted_token_and_kl_lowers_the_reward_of_every_token():
    kl = float64([[0.5, 0.5, -0.5, 0.5], [0.5, 0.5, 9, 9], [0.5, 9, 9, 9]])
    rewards = ppo.kl_shaped_rewards(float64([2.0, -1.0, 5.0]), kl, MASK, kl_coef=0.2)
    close(rewards, [[-0.1, -0.1, 0.1, 1.9], [-0.1, -1.1, 0, 0], [4.9, 0, 0, 0]])


def naive_gae(rewards, values, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, straight from the definition, in Python floats."""
    length, values = len(rewards), [*values, 0.0]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
    powers = [(gamma * lam) ** k for k in range(length)]
    return [sum(powers[k - t] * delta[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_its_definition(gamma, lam):
    rewards, values = random_rewards_and_values(0)
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    for row, length in enumerate((4, 2, 1)):
        kept = values[row, :length]
        expected = naive_gae(rewards[row, :length].tolist(), kept.tolist(), gamma, lam)
        close(advantages[row, :length], expected)
        close(returns[row, :length], float64(expected) + kept)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_bandit_gives_every_token_the_whole_return_minus_v_of_the_prompt_which_is_regressed():
    rewards = float64([[1.0, 2.0, 0.0, 3.0], [1.0, -4.0, 9.0, 9.0], [0.5, 9.0, 9.0, 9.0]])
    values = float64([[0.5, 9.0, 9.0, 9.0], [1.0, 9.0, 9.0, 9.0], [0.25, 9.0, 9.0, 9.0]])
    advantages, returns = ppo.bandit(rewards, values, MASK)
    close(advantages, [[5.5, 5.5, 5.5, 5.5], [-4, -4, 0, 0], [0.25, 0, 0, 0]])
    close(returns, [[6, 6, 6, 6], [-3, -3, 0, 0], [0.5, 0, 0, 0]])
    values = float64([1.0, 5.0, 2.5]), float64([0.0, 0.0, 0.0]), float64([2.0, 2.0, 2.0])
    close(ppo.value_loss(*values, 0.2, "bandit"), [1.0, 9.0, 0.25])


def test_whitened_advantages_have_mean_0_and_standard_deviation_1_over_counted_tokens():
    advantages, _ = random_rewards_and_values(1)
    whitened = ppo.whiten(advantages, MASK)
    counted = whitened[MASK].tolist()
    assert abs(statistics.mean(counted)) < 1e-12 and abs(statistics.pstdev(counted) - 1) < 1e-6
    assert not whitened[~MASK].any()


def test_policy_loss_is_the_clipped_objective_by_hand_and_0_only_what_pushes_further_out():
    log_ratio = float64([1.0, 1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    loss = ppo.policy_loss(log_ratio.exp(), float64([2.0, 1.0, -1.0, 1.0, -1.0]), 0.2)
    close(loss, [-2.0, -1.2, 1.5, -0.5, 0.8])  # -min(rho A, clip(rho, .8, 1.2) A)
    loss.sum().backward()
    close(log_ratio.grad, [-2.0, 0.0, 1.5, -0.5, 0.0])  # -rho A where it is not clipped away


def test_value_loss_takes_the_larger_of_the_plain_and_the_clipped_error_unless_eps_is_inf():
    new, old = float64([1.0, 0.5, 0.1, -1.0]), float64([0.0, 0.0, 0.0, 0.0])
    returns = float64([2.0, 0.5, 1.0, 2.0])
    # plain errors 1, 0, .9, 3; clipped values .2, .2, .1, -.2 with errors 1.8, .3, .9, 2.2
    expected = [0.5 * 1.8**2, 0.5 * 0.3**2, 0.5 * 0.9**2, 0.5 * 3**2]
    close(ppo.value_loss(new, old, returns, 0.2, "gae"), expected)
    new.requires_grad_()
    loss = ppo.value_loss(new, old, returns, math.inf, "gae")
    close(loss, [0.5, 0.0, 0.5 * 0.9**2, 0.5 * 3**2])
    loss.sum().backward()
    close(new.grad, [-1.0, 0.0, -0.9, -3.0])  # of 1/2 (V - G)^2
    assert ppo.harness.parse_args(ppo.Config, "", ["--value-clip-eps", "inf"]).value_clip_eps == math.inf


def test_statistics_of_micro_batches_add_up_and_any_key_is_averaged_over_the_steps():
    steps = [{}, {}]
    for step, term in ((steps[0], 1.0), (steps[0], 2.0), (steps[1], 5.0)):
        number = torch.tensor(term, requires_grad=True)
        ppo.add_statistics(step, ratio=number, approx_kl=number, mine=10 * number)
    assert not any(number.requires_grad for number in steps[0].values())
    first = {"ratio_first": 3.0, "approx_kl_first": 3.0, "optimizer_steps": 2}
    assert ppo.update_metrics(steps) == {"approx_kl": 4.0, "mine": 40.0} | first


@pytest.mark.parametrize("kl, error", [(6.0, 0), (6.6, 0.1), (4.8, -0.2), (60, 0.2), (0, -0.2)])
def test_beta_moves_against_the_target_by_at_most_a_fifth_of_batch_over_horizon(kl, error):
    beta = ppo.adapt_kl_coef(0.15, kl, 6.0, 0.064, 0.15)
    assert abs(beta - 0.15 * (1 + error * 0.064)) < 1e-12


@pytest.mark.parametrize("iterations", [1, 12, 30, 2000])
@pytest.mark.parametrize("kl, bound", [(1e9, 1.5), (0.0, 0.015)])
def test_by_default_beta_can_go_a_factor_of_ten_in_a_run_and_no_further(iterations, kl, bound):
    kl_coef, step_size = 0.15, min(1, 12 / iterations)  # a horizon of a twelfth of the episodes
    for _ in range(iterations):
        kl_coef = ppo.adapt_kl_coef(kl_coef, kl, 6.0, step_size, 0.15)
        assert 0.015 <= kl_coef <= 1.5
    is_enough = iterations >= 30 or iterations == 12 and kl == 0
    assert not is_enough or abs(kl_coef / bound - 1) < 0.2
    for _ in range(3000):
        kl_coef = ppo.adapt_kl_coef(kl_coef, kl, 6.0, step_size, 0.15)
    assert kl_coef == pytest.approx(bound)


def test_minibatches_cover_every_row_once_per_epoch_in_new_orders():
    steps = [rows.tolist() for rows in ppo.minibatches(12, 4, 3, torch.Generator().manual_seed(0))]
    epochs = [sum(steps[i : i + 3], []) for i in (0, 3, 6)]
    assert len(steps) == 9 and all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("k", [1, 3])
def test_prompts_stand_k_times_side_by_side_and_none_comes_again_before_all_have_come(k):
    batches = ppo.endless_batches(list(range(10)), 4 * k, k, random.Random(0))
    seen = []
    for _ in range(5):
        batch = next(batches)
        assert len(batch) == 4 * k and batch == sorted(batch, key=batch.index)
        seen += batch[::k]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]


def test_micro_batches_hold_each_row_once_by_length_and_lose_no_token_that_counts():
    torch.manual_seed(0)
    num_prompt, num_response = torch.randint(1, 7, (20,)), torch.randint(1, 9, (20,))
    column = torch.arange(14)  # P = 6, R = 8
    attention_mask = (column >= 6 - num_prompt[:, None]) & (column < 6 + num_response[:, None])
    index = torch.tensor([3, 17, 0, 5, 9, 11, 2])
    parts = list(common.parts_by_length(attention_mask, index, 3))
    order = torch.cat([rows for rows, _ in parts])
    assert [len(rows) for rows, _ in parts] == [3, 3, 1]
    assert sorted(order.tolist()) == sorted(index.tolist())
    lengths = (num_prompt + num_response)[order]
    assert (lengths.diff() >= 0).all() and lengths[0] < lengths[-1]
    for rows, columns in parts:
        part = attention_mask[rows, columns]
        assert part.sum() == attention_mask[rows].sum()  # no token is lost
        assert part[:, [0, -1]].any(0).all()  # and no column of padding is left outside


@pytest.mark.parametrize("new_truths, old_truths, mean, rate", [
    ([2, 1, 0, 2], [1, 1, 1, 1], 1.25, (1 + 0.5 + 0 + 1) / 4), ([None] * 4, [None] * 4, None, 1),
])
def test_win_rate_counts_ties_half_and_prefers_the_judge(new_truths, old_truths, mean, rate):
    new = [{"score": 9, "true_reward": truth, "kl": 1.0} for truth in new_truths]
    old = [{"score": 0, "true_reward": truth, "kl": 0.0} for truth in old_truths]
    expected = {"score": 9, "true_reward": mean, "kl": 1, "win_rate": rate}
    assert ppo.summarize(new, old) == expected


HEALTHY = dict(
    approx_kl=0.02, approx_kl_first=0.0, ratio_first=1.0, eos_rate=0.95, response_length=20.0,
    score_std=1.0, kl=3.0, kl_k3=3.0, kl_target=None, explained_variance=0.3, skipped_steps=0,
)


@pytest.mark.parametrize("symptom, change, num_iterations", [
    ("ratio", {"approx_kl_first": 0.01}, 1), ("ratio", {"approx_kl_first": math.nan}, 1), ("far", {"kl": 80.0}, 1),
    ("ratio", {"ratio_first": 0.9}, 1), ("eos", {"eos_rate": 0.4}, 1), ("length", {"response_length": 4}, 1),
    ("score", {"score_std": 0.001}, 1), ("overshoot", {"approx_kl": 0.3}, 1), ("negative", {"kl": -2.0}, 1),
    ("gradient", {"skipped_steps": 1}, 1), ("critic", {"explained_variance": -0.1}, 10),
    ("target", {"kl_target": 1.9}, 10),
])
def test_each_symptom_has_its_warning_and_a_healthy_row_has_none(symptom, change, num_iterations):
    bad = [HEALTHY | change] * num_iterations
    for history, expected in (([HEALTHY] * 9 + bad, [symptom]), (bad[1:] + [HEALTHY], []), (bad + [HEALTHY], [])):
        run = unittest.mock.Mock(history=history)
        ppo.warn_if_unhealthy(run)
        assert [call.args[0] for call in run.warn.call_args_list] == expected
