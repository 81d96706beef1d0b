"""Stage 3 of RLHF: train a language model with PPO.

To follow one batch from the prompt to optimizer.step(), start at `# 1. ROLLOUT` in `main` and look
up each function, mostly in the section of that number. common.py has decoding and model calls,
rewards.py the scorers. harness.py (logs, checkpoints, several processes) can stay closed.

Goal      maximize  E_{x ~ prompts, y ~ pi(.|x)}[ score(x, y) ] - beta * KL(pi || pi_ref)

(1)  rewards     r_t     = -beta * (log pi_old(y_t) - log pi_ref(y_t)) + [t is last] * score(x, y),
                           if y has no EOS, --missing-eos-penalty is subtracted from its score
(2)  advantages  delta_t = r_t + gamma * V_{t+1} - V_t ;   A_t = delta_t + gamma * lam * A_{t+1}
(3)  returns     G_t     = A_t + V_t
(4)  ratio       rho_t   = pi(y_t) / pi_old(y_t) = exp(log pi(y_t) - log pi_old(y_t))
(5)  policy      L_clip  = mean_t min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t)
(6)  value       L_value = 1/2 mean_t max((V'_t - G_t)^2,
                                          (V_t + clip(V'_t - V_t, -eps_v, eps_v) - G_t)^2)
(7)  total       L       = -L_clip + c1 * L_value - c2 * entropy,  minimized
(8)  adaptive    beta   <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * batch / horizon), kept
                           between a tenth and ten times its initial value; only with --kl-target

          V is the critic before the update, computed once per rollout, and 0 after the last token;
          V' is the critic now. A_t in (5) is whitened: mean 0 and standard deviation 1 over all
          response tokens of the rollout. mean_t is over all response tokens of a minibatch; entropy
          is the mean_t of the policy's exact entropy. Flags: beta --kl-coef, eps --clip-eps,
          eps_v --value-clip-eps, c1 --value-coef, c2 --entropy-coef, target --kl-target,
          horizon --kl-horizon, batch --batch-size.

          With --advantage bandit the whole response is one action; gamma, lam and eps_v are unused:
(2b)      A       = sum_t r_t - V(x), the same for every token; ratio and clip are still per token
(6b)      L_value = mean (V'(x) - sum_t r_t)^2 over responses, without the 1/2 of (6)

Shapes    B responses, P prompt tokens (left-padded), R response tokens (right-padded), S scorers
          (what --reward names). A micro-batch has b rows, r response columns and N unmasked tokens.
Time      Column t of every (B, R) tensor belongs to the response token y_t:
          logprobs[:, t] = log pi_old(y_t | x, y_<t).  values[:, t] = V(x, y_<t), the prediction
          before y_t is chosen, because a baseline must not depend on the action.
Mask      response_mask is True where a token counts: up to and including the first EOS.

Models    policy        starts at --policy              trained  writes the responses
          ref policy    a copy of it                    frozen   the KL is measured from it
          reward model  --reward; several are summed    frozen   scores a whole response
          critic        separate: a copy of the first   trained  predicts the rewards to come, from
                        reward model that reads tokens,          an unfinished response
                        else of the policy with a head
                        of zeros; shared: a value head
          pi_old needs no model. It is the policy before the update; its log-probabilities are kept.

Exact     One function computes all log-probabilities that enter the equations (old, new and
          reference), at the sampling temperature and with the softmax in float32. Each sum in (5)
          to (7) is divided by the count of the whole minibatch, so micro-batches change the
          gradient by rounding only.
Differs   TRL adds the score one position after the last token that counts, when there is room; here
          it is at that token. In Huang et al. a response without EOS gets a fixed score; here a
          penalty is subtracted from its score.

Sources   Schulman et al. 2017 (PPO), 2016 (GAE); Ziegler et al. 2019 (our eqs. 1, 8); Stiennon et
          al. 2020; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO". Its
          settings are a good starting point for 1 B parameters: --lr 3e-6 --critic-lr 3e-6
          --kl-coef 0.05 --batch-size 512 --minibatch-size 512 --temperature 0.7
          --response-length 53 --iterations 1953, about 1,000,000 episodes.

Run       python ppo.py --policy ckpt/sft                               the toy task in data/
          python ppo.py --critic shared --advantage bandit --entropy-coef 0.01   fewest models
          python ppo.py --policy ckpt/sft --prompts mine.jsonl --reward mine.py:reward
Writes    ckpt/ppo: the policy as a Hugging Face folder, critic/, state.pt (for --resume),
          args.json, metrics.jsonl, samples.jsonl
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit quietly on Ctrl-C while torch loads

import dataclasses
import json
import math
import os
import random
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import common
import harness
from common import UserError
from harness import DATA, Count, Positive, Range, Share, Weight, arg
from rewards import FunctionScorer, load_scorer, mean_and_std


# === 0. Configuration =============================================================================
# Three batch sizes: an iteration samples --batch-size responses; an optimizer step learns from
# --minibatch-size of them; a forward pass of scoring or learning takes --microbatch-size, which
# affects memory and speed only. An iteration has up to ppo_epochs * batch_size / minibatch_size
# optimizer steps.
@dataclass(frozen=True)
class Config(harness.RunConfig):  # the flags that all stages share are in harness.py
    output: str = arg("ckpt/ppo", "folder for the policy, the critic and the logs")
    eval_every: Count = arg(10, "iterations between evaluations on held-out prompts")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = arg("auto", "auto: by model")
    compile: bool = arg(False, "use torch.compile in scoring and update: slow start, then faster")
    explain: bool = arg(False, "at times, print KL, reward, V, ... of one response, by token")

    policy: str = arg("ckpt/sft", "causal LM to train; a copy of it is the reference")
    reward: list[str] = arg(["ckpt/reward_model"], "reward models or file.py:function; summed")
    judge: str | None = arg(None, "file.py:function, logged as true_reward, never trained on")
    prompts: list[str] | None = arg(None, "JSONL with a prompt key; None: toy task in data/")
    eval_prompts: list[str] | None = arg(None, "held-out JSONL; None: 1/10 of --prompts, up to 128")

    iterations: Count = arg(30, "number of rollouts, each followed by an update")
    batch_size: Count = arg(128, "responses per iteration")
    samples_per_prompt: Count = arg(1, "responses to each prompt; must divide --batch-size")
    max_prompt_length: Count = arg(512, "in tokens; longer prompts are dropped and counted")
    response_length: Count = arg(64, "maximum in tokens; longer responses are truncated")
    temperature: Annotated[float, Range(0.01, 100)] = arg(1.0, "divides logits; usually 0.7 to 1")

    # beta trades score for distance from the reference. If the score rises while the texts get
    # worse, the reward model is over-optimized: raise beta or stop earlier, and trust a judge, the
    # KL, lengths and your own reading more than the score.
    kl_coef: Weight = arg(0.15, "KL penalty beta; usually 0.02 to 0.2; 0 invites reward hacking")
    kl_target: Positive | None = arg(None, "KL that beta aims for; 3 to 10 nats; None: beta fixed")
    kl_horizon: Count | None = arg(None, "responses in which beta moves <= 1/5; None: total / 12")
    reward_device: str | None = arg(None, "for reference and reward models; None: --device")
    missing_eos_penalty: Weight = arg(1.0, "subtracted from the score of a response without EOS")

    # gamma is 1 because a response is finite and a reward counts the same wherever it comes. lam
    # trades bias for variance: 0 trusts the critic at the next token, 1 uses the full return.
    advantage: Literal["gae", "bandit"] = arg("gae", "gae: one per token; bandit: one per response")
    gamma: Share = arg(1.0, "discount per token; 1 for text")
    lam: Share = arg(0.95, "lambda of GAE; usually 0.9 to 1")
    critic: Literal["separate", "shared"] = arg("separate", "own model, or a head on the policy")

    ppo_epochs: Count = arg(4, "passes over each rollout; usually 1 to 4")
    minibatch_size: Count = arg(32, "responses per optimizer step; must divide --batch-size")
    microbatch_size: Count | None = arg(None, "responses at once; None: fastest that fits, CPU: 32")
    clip_eps: Share = arg(0.2, "clip range of the ratio; usually 0.1 to 0.3")
    value_clip_eps: Annotated[float, Range(0)] = arg(0.2, "clip of a value's change; inf: none")
    value_coef: Weight = arg(0.1, "weight of the value loss; matters mostly for a shared critic")
    entropy_coef: Weight = arg(0.0, "weight of the entropy bonus; usually 0 to 0.01")
    max_approx_kl: Weight | None = arg(None, "end an update above this approx_kl; usually 0.02")
    lr: Share | None = arg(None, "policy's, falls to 0; None: by size, 3e-4 (tiny) to 3e-6 (1 B)")
    critic_lr: Share | None = arg(None, "critic's, falls to 0; None: by its own size")
    max_grad_norm: Positive = arg(1.0, "clip the gradients of policy and critic, each to this")


# === 1. Rollout: x ~ prompts, y ~ pi_old(. | x) ===================================================
def mask_through_first_eos(response, eos_ids):
    """Returns a mask (B, R) that is True up to and including the first EOS; all True without one.

    The EOS counts: it is an action, chosen like any other token, and the score is added there. What
    follows is padding. The mask is built from the sampled tokens alone, because `response == pad`
    is wrong wherever the pad token can be sampled or is the EOS.
    """
    eos_ids = torch.tensor(eos_ids, dtype=torch.int64, device=response.device)
    is_eos = torch.isin(response, eos_ids).long()
    return (is_eos.cumsum(1) - is_eos) == 0  # no EOS strictly before t


@dataclass(frozen=True)
class Rollout:
    """One response to each prompt. R is the length of the longest response."""

    tokens: torch.Tensor  # (B, P+R) int64          prompt, then response
    attention_mask: torch.Tensor  # (B, P+R) bool   False on both paddings
    response_mask: torch.Tensor  # (B, R) bool      True up to and including the first EOS
    finished: torch.Tensor  # (B,) bool             True if it ends with an EOS
    sampled_logprobs: torch.Tensor  # (B, R)        the sampler's own; only check_sampler reads them
    texts: list  # B strings                        decoded responses, without the EOS


def sample_responses(policy, tokenizer, prompt_rows, response_length, temperature, generator):
    """Returns a Rollout, by plain sampling without top-k or top-p.

    The decoding loop is `common.generate_responses`. Sampling settings stored with the model are
    not read; `common.set_generation_defaults` has replaced them, for those who load it later.
    """
    settings = policy.generation_config  # only the EOS ids and the pad id are read from it
    # Padded on the left, all prompts end in column P - 1 and all responses start in column P.
    prompt_ids = [row.prompt_ids for row in prompt_rows]
    prompts, prompt_mask = common.pad(prompt_ids, settings.pad_token_id, "left")  # (B, P)
    prompts, prompt_mask = prompts.to(policy.device), prompt_mask.to(policy.device)  # (B, P)
    response, sampled_logprobs = common.generate_responses(
        policy, prompts, prompt_mask, response_length, temperature, generator
    )  # (B, R) each; after an EOS: pad tokens, log-probability 0
    response_mask = mask_through_first_eos(response, settings.eos_token_id)  # (B, R)
    eos_ids = torch.tensor(settings.eos_token_id, dtype=torch.int64, device=response.device)
    finished = torch.isin(response, eos_ids).any(1)  # (B,)
    lengths = (response_mask.sum(1) - finished.long()).tolist()  # without EOS
    texts = []  # decoded after the prompt: a first token alone may lose its leading space
    for ids, response_ids, length in zip(prompt_ids, response.tolist(), lengths):
        texts.append(common.decode(tokenizer, ids, response_ids[:length]))
    return Rollout(
        tokens=torch.cat([prompts, response], 1),  # (B, P+R)
        attention_mask=torch.cat([prompt_mask, response_mask], 1),  # (B, P+R)
        response_mask=response_mask,
        finished=finished,
        sampled_logprobs=sampled_logprobs,
        texts=texts,
    )


# === 2. Score: one number per response ============================================================
def score_responses(scorers, rollout, prompt_rows):
    """Returns the score of each response by each of the S scorers, (S, B) float32, no gradient.

    A reward model trained by reward_model.py reads the tokens as the policy wrote them. Its score
    is the output at the last token (the EOS, if any); on texts like its training pairs, scores have
    mean 0 and standard deviation 1. A reward model with a different tokenizer reads the decoded
    texts. A Python function's values are used as returned. See rewards.py.
    """
    scores = []
    for scorer in scorers:
        scores.append(scorer(rollout.tokens, rollout.attention_mask, prompt_rows, rollout.texts))
        if not scores[-1].isfinite().all():
            what = "see its weights and --dtype, or the function"
            raise UserError(f"a score of {scorer.spec} is not finite; {what}")
    return torch.stack(scores)  # (S, B)


# === 3. Log-probabilities and values: log pi_old, log pi_ref, V_old at every response token =======
class ValueHead(torch.nn.Linear):
    """The critic of --critic shared: reads V from the policy's own last hidden states."""


def token_logprobs(logits, tokens, temperature, with_entropy):
    """Returns the tokens' log-probabilities and the entropies (0 unless `with_entropy`), (b, r)
    float32 each.

    The sampler divides the logits by the temperature, so we do the same for every log-probability:
    policy and reference are both tempered, and their KL starts at 0, up to rounding.
    """
    all_logprobs = (logits.float() / temperature).log_softmax(-1)  # (b, r, vocabulary)
    logprobs = all_logprobs.gather(-1, tokens[..., None]).squeeze(-1)  # (b, r)
    if not with_entropy:
        return logprobs, torch.zeros_like(logprobs)  # saves a pass over the vocabulary
    return logprobs, -(all_logprobs.exp() * all_logprobs).sum(-1)  # (b, r): the exact entropy


def forward_responses(
    policy, critic, tokens, attention_mask, num_columns, temperature, with_entropy=False
):
    """Returns log-probabilities, values and entropies of response tokens: (b, r) float32 each, with
    r = num_columns. Values are 0 without a critic, entropies are 0 unless `with_entropy`.

    A causal model's output at position i is its distribution over token i + 1. So the outputs for
    the r response tokens stand one position earlier, starting at the last prompt token. This is the
    only shift between outputs and tokens; after it, column t of every tensor belongs to y_t.

        position   ...  P-2   P-1    P    P+1  ...  P+r-2     P+r-1
        token      ...  x     x      y_0  y_1  ...  y_{r-2}   y_{r-1}
        predicts   ...  x     y_0    y_1  y_2  ...  y_{r-1}   (dropped)
    """
    is_shared = isinstance(critic, ValueHead)  # then it needs the policy's hidden states
    tokens, attention_mask = tokens.to(policy.device), attention_mask.to(policy.device)
    # The last position would predict a token after y_{r-1}: drop it, and keep the last r outputs.
    inputs, input_mask = tokens[:, :-1], attention_mask[:, :-1]  # (b, P+r-1)
    output = common.forward(
        policy, inputs, input_mask, logits_to_keep=num_columns, output_hidden_states=is_shared
    )
    logprobs, entropies = token_logprobs_in_pieces(
        output.logits, tokens[:, -num_columns:], temperature, with_entropy
    )  # (b, r) each
    if critic is None:
        values = torch.zeros_like(logprobs)  # no values are wanted
    elif is_shared:
        hidden = output.hidden_states[-1][:, -num_columns:]  # (b, r, hidden size)
        values = critic(hidden.float()).squeeze(-1)  # (b, r)
    else:
        values = common.token_scores(critic, inputs, input_mask)[:, -num_columns:]  # (b, r)
    return logprobs, values, entropies


@torch.no_grad()
def evaluate_tokens(policy, critic, ref_policy, rollout, temperature, microbatch_size):
    """Returns logprobs, ref_logprobs, values and entropies of a rollout, (B, R) float32 each. They
    mean something only where response_mask is True.

    The old log-probabilities are computed here although the sampler returns some, too: they must
    come from the function that the update uses, or the first ratio is not 1. Only rounding
    differences remain, which depend on the micro-batches' shapes (approx_kl_first in the log).
    """
    tokens, attention_mask = rollout.tokens, rollout.attention_mask  # (B, P+R) each
    num_columns = rollout.response_mask.shape[1]  # R
    prompt_length = tokens.shape[1] - num_columns  # P
    results = torch.zeros(4, len(tokens), num_columns, device=tokens.device)
    everything = torch.arange(len(tokens))  # all B rows
    for rows, columns in common.parts_by_length(attention_mask, everything, microbatch_size):
        # `columns` trims, on both sides, the columns that are padding in all of these rows.
        part, mask = tokens[rows, columns], attention_mask[rows, columns]
        width = columns.stop - prompt_length
        logprobs, values, entropies = forward_responses(
            policy, critic, part, mask, width, temperature, with_entropy=True
        )
        ref_logprobs, _, _ = forward_responses(ref_policy, None, part, mask, width, temperature)
        ref_logprobs = ref_logprobs.to(tokens.device)  # from --reward-device
        results[:, rows, :width] = torch.stack([logprobs, ref_logprobs, values, entropies])
    return common.total(results)  # (4, B, R); under torchrun each process has filled only its rows


# === 4. Rewards: eqs. 1 and 8 =====================================================================
def kl_shaped_rewards(scores, token_kl, response_mask, kl_coef):
    """Returns the reward of each token by eq. 1, (B, R), 0 at padding.

    Args:
        scores: (B,), one per response.
        token_kl: (B, R), log pi_old(y_t) - log pi_ref(y_t). Its sum over a response is a one-sample
            estimate of the KL; the mean of many such sums approaches the KL.

    The reward model judges the whole text, so the whole score is added at the last token; every
    token is penalized for its own distance from the reference. GAE carries both back in time: as
    the KL is in the reward, and not in the loss, a token is also charged for the KL of later ones.
    """
    rewards = torch.where(response_mask, -kl_coef * token_kl, 0.0)  # eq. 1, left
    last_index = response_mask.sum(1, keepdim=True) - 1  # (B, 1): the EOS, or the cut
    return rewards.scatter_add(1, last_index, scores[:, None])  # eq. 1, right


def adapt_kl_coef(kl_coef, kl, kl_target, step_size, initial_kl_coef):
    """Returns beta for the next iteration by eq. 8: higher if the KL is above its target.

    `kl` is the batch's mean KL per response, in nats; `step_size` is batch / horizon, as in the
    code of Ziegler et al. 2019 (their paper has a constant 0.1). The limits of a tenth and ten
    times the initial beta are ours: outside them, either the score or the KL would hardly matter.
    Without a target beta stays as it is.
    """
    if kl_target is None:
        return kl_coef
    error = min(max(kl / kl_target - 1, -0.2), 0.2)  # relative, limited
    kl_coef *= 1 + error * step_size  # eq. 8
    return min(max(kl_coef, initial_kl_coef / 10), initial_kl_coef * 10)


# === 5. Advantages: eqs. 2-3 ======================================================================
# FORK: to use another estimator, write a function of rewards, values and response_mask that returns
# advantages and returns, and call it in step 5 of the loop. examples/forks has GRPO and RLOO.
def gae(rewards, values, response_mask, gamma, lam):
    """Returns advantages and returns by eqs. 2 and 3, (B, R) each (Schulman et al. 2016).

    `values` were computed before the update, so returns are fixed targets in all epochs. No reward
    follows the last token, so V is 0 after it, for a truncated response, too (no bootstrap).
    With gamma = 1, lam = 1 gives A_t = r_t + r_{t+1} + ... - V_t, and lam = 0 gives delta_t.
    """
    rewards = torch.where(response_mask, rewards, 0.0)  # (B, R)
    values = torch.where(response_mask, values, 0.0)  # V is 0 after the last token
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)  # V_{t+1}
    deltas = rewards + gamma * next_values - values  # eq. 2, left  # (B, R)
    advantages = torch.zeros_like(deltas)  # (B, R)
    running = torch.zeros_like(deltas[:, 0])  # A_{t+1}
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running  # eq. 2, right
        advantages[:, t] = running
    return advantages, advantages + values  # eq. 3


def bandit(rewards, values, response_mask):
    """Returns advantages and returns when the whole response is one action, eq. 2b, (B, R) each.

    One baseline, the value V(x) before the first token, is used for the whole response, and every
    token gets the same advantage. GAE with gamma = lam = 1 is similar: rewards to come minus V_t.
    """
    returns = torch.where(response_mask, rewards, 0.0).sum(1, keepdim=True)  # (B, 1)
    advantages = torch.where(response_mask, returns - values[:, :1], 0.0)  # eq. 2b
    return advantages, torch.where(response_mask, returns, 0.0)


def whiten(x, mask):
    """Returns x with mean 0 and (population) standard deviation 1 over the True positions, and 0
    elsewhere.

    This fixes the scale of the policy loss relative to value loss, entropy and gradient clipping,
    and centers it. It is done over the whole rollout, because the mean of a minibatch is noisy, and
    after the returns are computed, so that the critic's targets keep their scale.
    """
    counted = x[mask]  # (number of True positions,)
    return torch.where(mask, (x - counted.mean()) / (counted.std(correction=0) + 1e-8), 0.0)


# === 6. Update: eqs. 4-7 ==========================================================================
@dataclass(frozen=True)
class Batch:
    """A rollout with all that the update needs; constant during the update."""

    tokens: torch.Tensor  # (B, P+R) int64          prompt, then response
    attention_mask: torch.Tensor  # (B, P+R) bool   False on both paddings
    response_mask: torch.Tensor  # (B, R) bool      True up to and including the first EOS
    value_mask: torch.Tensor  # (B, R) bool         as response_mask; bandit: only column 0
    logprobs: torch.Tensor  # (B, R) float32        log pi_old(y_t)
    ref_logprobs: torch.Tensor  # (B, R) float32    log pi_ref(y_t); forks use it in the loss
    values: torch.Tensor  # (B, R) float32          V_old(x, y_<t)
    advantages: torch.Tensor  # (B, R) float32      whitened
    returns: torch.Tensor  # (B, R) float32         not whitened

    def micro_batches(self, index, size):
        """Yields the rows `index` in Batches of up to `size` rows of similar length, without the
        columns that are all padding; under torchrun, only this process's share.
        """
        prompt_length = self.tokens.shape[1] - self.response_mask.shape[1]
        for rows, columns in common.parts_by_length(self.attention_mask, index, size):
            width = columns.stop - prompt_length
            yield Batch(
                tokens=self.tokens[rows, columns],
                attention_mask=self.attention_mask[rows, columns],
                response_mask=self.response_mask[rows, :width],
                value_mask=self.value_mask[rows, :width],
                logprobs=self.logprobs[rows, :width],
                ref_logprobs=self.ref_logprobs[rows, :width],
                values=self.values[rows, :width],
                advantages=self.advantages[rows, :width],
                returns=self.returns[rows, :width],
            )


def minibatches(batch_size, minibatch_size, epochs, generator):
    """Yields the row indices of every optimizer step of an update; each epoch has a new order."""
    for _ in range(epochs):
        order = torch.randperm(batch_size, generator=generator)
        yield from order.split(minibatch_size)  # each row once


# FORK: put another policy loss here.
def policy_loss(ratio, advantages, clip_eps):
    """Returns the loss of each token, the negated term of eq. 5, in the shape of the inputs.

    In the first minibatch of an update every ratio is 1 and the loss is -A, whose mean is about 0.
    The gradient is not 0: d ratio = ratio * d log pi, so this step is REINFORCE with the advantage
    A. Where the ratio is clipped and A pushes it further out, the minimum is constant and the
    gradient is 0.
    """
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (N,)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def value_loss(new_values, values, returns, value_clip_eps, advantage):
    """Returns the loss of each value, eq. 6: the larger of the plain and the clipped error.

    Where V' is more than eps_v from V and nearer to its target than the clipped value, the gradient
    is 0. Like eq. 5, this removes the incentive to move further, but is no bound on the movement.
    With --advantage bandit it is the squared error, eq. 6b.
    """
    if advantage == "bandit":
        return (new_values - returns) ** 2  # eq. 6b
    clipped = values + (new_values - values).clamp(-value_clip_eps, value_clip_eps)  # near V_old
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)  # eq. 6


@torch.no_grad()
def add_statistics(sums, **terms):
    """Adds a micro-batch's terms to the sums of its optimizer step; the means of these sums over
    all steps are logged. To log another number, add a keyword.
    """
    for name, term in terms.items():
        sums[name] = sums.get(name, 0.0) + term


# === Main loop: sections 1 to 6 in order ==========================================================
def main(cfg):
    cfg = check_config(cfg)  # adds the toy prompts if none are given
    run = harness.Run(cfg, MAY_CHANGE, can_be_extended=True)  # sets seeds, claims --output
    code = cfg.trust_remote_code  # allow models that ship their own Python code
    tokenizer = common.load_tokenizer(cfg.policy, "python sft.py", code, cfg.chat_template_kwargs)
    rows, eval_rows = load_prompts(cfg, tokenizer)
    all_rows = rows + eval_rows
    longest = max(len(row.prompt_ids) for row in all_rows) + cfg.response_length
    policy, ref_policy, critic, scorers = load_models(cfg, tokenizer, longest, run.device)
    judge = FunctionScorer(cfg.judge) if cfg.judge else None
    optimizer, schedule = make_optimizer(cfg, policy, critic)
    print_start(cfg, policy, ref_policy, critic, scorers, optimizer, len(rows), len(eval_rows))
    harness.print_tokens(tokenizer, policy, rows[0].prompt_ids)
    cfg = dry_run(run, policy, ref_policy, critic, scorers, optimizer, tokenizer, all_rows)
    generator = run.own_generator()  # of sampling and minibatches, alike in all processes
    run.phase("evaluation")
    # Before `restore`, as these belong to the initial policy; a resumed run has kept them.
    scales = measure_scales(cfg, run.kept, policy, ref_policy, tokenizer, scorers, all_rows)
    baseline = run.kept.get("baseline")  # its responses to held-out prompts
    baseline = baseline or evaluate(cfg, policy, ref_policy, tokenizer, scorers, judge, eval_rows)
    samples = run.kept.get("samples", baseline)  # the latest evaluation
    kl_coef = run.kept.get("kl_coef", cfg.kl_coef)  # beta
    horizon = cfg.kl_horizon or max(cfg.batch_size, cfg.iterations * cfg.batch_size / 12)
    kl_step_size = cfg.batch_size / horizon  # of eq. 8
    run.restore(tokenizer, {"policy": policy, "critic": critic}, optimizer, schedule)
    if not run.done:
        log_evaluation(run, samples, baseline)
    batches = endless_batches(rows, cfg.batch_size, cfg.samples_per_prompt, random.Random(cfg.seed))
    for iteration, prompt_rows in run.steps(batches, cfg.iterations):
        # 1. ROLLOUT     prompt_rows -> tokens, attention_mask (B, P+R); response_mask (B, R); texts
        run.phase("rollout")  # the decoding loop is common.generate_responses
        rollout = sample_responses(
            policy, tokenizer, prompt_rows, cfg.response_length, cfg.temperature, generator
        )
        response_mask = rollout.response_mask  # True where a token counts

        # 2. SCORE       tokens or texts -> score_parts (S, B); final_scores, true_rewards (B,)
        run.phase("score")
        score_parts = score_responses(scorers, rollout, prompt_rows)
        final_scores = score_parts.sum(0) - cfg.missing_eos_penalty * (~rollout.finished).float()
        true_rewards = score_responses([judge], rollout, prompt_rows)[0] if judge else None

        # 3. LOGPROBS    tokens -> logprobs, ref_logprobs, values, old_entropies (B, R)
        run.phase("log-probabilities")
        logprobs, ref_logprobs, values, old_entropies = evaluate_tokens(
            policy, critic, ref_policy, rollout, cfg.temperature, cfg.microbatch_size
        )
        sampler_gap = check_sampler(run, policy, rollout, logprobs)

        # 4. REWARDS     final_scores, logprobs -> token_kl, rewards (B, R)                 eq. 1
        token_kl = torch.where(response_mask, logprobs - ref_logprobs, 0.0)  # sums estimate KL
        kl = token_kl.sum(1).mean().item()  # nats per response
        rewards = kl_shaped_rewards(final_scores, token_kl, response_mask, kl_coef)

        # 5. ADVANTAGES  rewards, values -> advantages, returns (B, R)                      eqs. 2-3
        if cfg.advantage == "gae":
            advantages, returns = gae(rewards, values, response_mask, cfg.gamma, cfg.lam)
            value_mask = response_mask
        else:
            advantages, returns = bandit(rewards, values, response_mask)
            value_mask = torch.zeros_like(response_mask)
            value_mask[:, 0] = True  # only V(x) is used, so only V(x) is trained
        batch = Batch(
            tokens=rollout.tokens, attention_mask=rollout.attention_mask,
            response_mask=response_mask, value_mask=value_mask,
            logprobs=logprobs, ref_logprobs=ref_logprobs, values=values,
            advantages=whiten(advantages, response_mask), returns=returns,
        )

        # 6. UPDATE      batch -> updated policy and critic; only new_* carries gradient    eqs. 4-7
        steps = []  # the statistics of each optimizer step
        for index in minibatches(cfg.batch_size, cfg.minibatch_size, cfg.ppo_epochs, generator):
            run.phase("backward")
            optimizer.zero_grad()
            num_tokens, num_values = response_mask[index].sum(), value_mask[index].sum()
            step = {}  # {statistic: number}
            for micro in batch.micro_batches(index, cfg.microbatch_size):  # gradients accumulate
                new_logprobs, new_values, new_entropies = forward_responses(
                    policy, critic, micro.tokens, micro.attention_mask,
                    micro.response_mask.shape[1], cfg.temperature, cfg.entropy_coef > 0,
                )  # (b, r) each
                counted = micro.response_mask.nonzero(as_tuple=True)  # indices of the N tokens
                log_ratio = new_logprobs[counted] - micro.logprobs[counted]
                ratio = torch.exp(log_ratio)  # eq. 4
                policy_losses = policy_loss(ratio, micro.advantages[counted], cfg.clip_eps)  # eq. 5
                trained = micro.value_mask.nonzero(as_tuple=True)  # indices of trained values
                value_losses = value_loss(
                    new_values[trained], micro.values[trained], micro.returns[trained],
                    cfg.value_clip_eps, cfg.advantage,
                )  # eq. 6
                loss = (
                    (policy_losses - cfg.entropy_coef * new_entropies[counted]).sum() / num_tokens
                    + cfg.value_coef * value_losses.sum() / num_values
                )  # eq. 7
                loss.backward()  # adds to the gradients
                add_statistics(
                    step,
                    policy_loss=policy_losses.sum() / num_tokens,
                    value_loss=value_losses.sum() / num_values,
                    approx_kl=(ratio - 1 - log_ratio).sum() / num_tokens,
                    clip_fraction=((ratio - 1).abs() > cfg.clip_eps).sum() / num_tokens,
                    ratio=ratio.sum() / num_tokens,
                )
            step = harness.sum_over_processes([policy, critic], step)  # and sums gradients
            step["grad_norm"] = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            step["critic_grad_norm"] = clip_grad_norm_(critic.parameters(), cfg.max_grad_norm)
            steps.append(step)  # the norms are those before clipping
            if cfg.max_approx_kl is not None and step["approx_kl"] > cfg.max_approx_kl:
                break  # earlier steps have gone too far from pi_old: skip this one and the rest
            if run.may_step(step["grad_norm"] + step["critic_grad_norm"]):  # are they finite?
                optimizer.step()
        optimizer.zero_grad()  # frees memory for the rollout

        # LOG, ADAPT     metrics; beta and learning rates of the next iteration             eq. 8
        row = run_metrics(run, response_mask) | {"kl": kl, "kl_coef": kl_coef}
        row |= rollout_metrics(batch, score_parts, true_rewards, rollout.finished, old_entropies)
        row |= {"sampler_gap": sampler_gap} | update_metrics(steps)
        run.log(row, shown=("score", "true_reward", "kl", "response_length"))
        warn_if_unhealthy(run)
        kl_coef = adapt_kl_coef(kl_coef, kl, cfg.kl_target, kl_step_size, cfg.kl_coef)  # eq. 8
        schedule.step()  # both learning rates fall linearly
        if cfg.explain and (iteration == 1 or run.is_due(cfg.eval_every)):
            run.bar.write(explain_response(tokenizer, batch, rewards, advantages))
        if run.is_due(cfg.eval_every):
            samples = evaluate(cfg, policy, ref_policy, tokenizer, scorers, judge, eval_rows)
            log_evaluation(run, samples, baseline)
        kept = {"kl_coef": kl_coef, "scales": scales, "baseline": baseline, "samples": samples}
        run.save_if_due(kept)
    run.finish()  # --output becomes a model folder
    print_result(cfg, baseline, samples)


# === Not the algorithm: flags, prompts and models =================================================
# Flags that --resume may change; --iterations also changes the learning rates and the
# default of --kl-horizon.
MAY_CHANGE = ("iterations", "eval_every", "explain", "attention", "compile", "reward_device")


def check_config(cfg):
    """Returns cfg, with the toy prompts and judge filled in unless --prompts is given. Raises
    UserError if flags do not fit together.
    """
    if len({os.path.normpath(spec) for spec in cfg.reward}) < len(cfg.reward):
        raise UserError("--reward names the same reward twice; it would count twice")
    if cfg.reward_device and cfg.lora_rank is not None:
        raise UserError("--reward-device can't be used with --lora-rank, which shares weights")
    if cfg.kl_horizon is not None and cfg.kl_target is None:
        raise UserError("--kl-horizon needs a --kl-target")
    if cfg.kl_target is not None and cfg.kl_coef == 0:
        raise UserError("--kl-target scales beta, so it needs a --kl-coef above 0 to start from")
    if cfg.kl_horizon is not None and cfg.kl_horizon < cfg.batch_size:
        what = f"--batch-size, {cfg.batch_size}"
        raise UserError(f"--kl-horizon is {cfg.kl_horizon}; it must be at least {what}")
    for name in ("minibatch_size", "samples_per_prompt"):
        if cfg.batch_size % getattr(cfg, name):
            what = f"--batch-size {cfg.batch_size} is not a multiple of {harness.flag_of(name)}"
            raise UserError(f"{what} {getattr(cfg, name)}")
    if cfg.prompts is not None:  # the user's own; else the toy task
        return cfg
    return dataclasses.replace(
        cfg, prompts=[str(DATA / "prompts.jsonl")],
        eval_prompts=cfg.eval_prompts or [str(DATA / "heldout_prompts.jsonl")],
        judge=cfg.judge or f"{DATA / 'true_reward.py'}:true_reward",
    )


# FORK: to use other prompt data, build rows with a "prompt" here.
def load_prompts(cfg, tokenizer):
    """Returns rows and held-out rows that fit, each with its token ids as `row.prompt_ids`."""

    def encode(row):
        row.unread = ()  # none: a reward may use every key
        row.prompt_ids, _ = common.encode(tokenizer, row["prompt"], tools=row.get("tools"))
        problem = harness.too_long(cfg, row.prompt_ids) if row.prompt_ids else "empty"
        yield problem or row

    formats = [("prompt",)]  # a row needs this key; others are kept
    rows = harness.convert(harness.read_rows(cfg.prompts, formats), encode)
    if cfg.eval_prompts is None:
        return harness.hold_out(rows, 128, cfg.seed, prompt_of)
    eval_rows = harness.read_rows(cfg.eval_prompts, formats)
    harness.report_overlap(rows, eval_rows, prompt_of)
    return rows, harness.convert(eval_rows, encode, "held out")


def prompt_of(row):
    return row["prompt"]


def endless_batches(rows, batch_size, samples_per_prompt, rng):
    """Yields batches of rows endlessly: all rows in random order, then again in another order. Each
    row appears `samples_per_prompt` times in succession.
    """
    order = []  # rows still to come
    num_prompts = batch_size // samples_per_prompt
    while True:
        while len(order) < num_prompts:
            order += rng.sample(rows, len(rows))  # one more pass over all rows
        yield [row for row in order[:num_prompts] for _ in range(samples_per_prompt)]
        order = order[num_prompts:]


def load_models(cfg, tokenizer, longest, device):
    """Returns policy, ref_policy, critic and the list of scorers, on their devices.

    `longest` is the largest number of tokens in a sequence. Trained weights are float32, and
    dropout is off (as loaded): else two passes would differ, and the ratio would not be 1.
    """
    options = {"trust_remote_code": cfg.trust_remote_code}  # of all models
    if cfg.attention != "auto":
        options["attn_implementation"] = cfg.attention
    policy = common.load_causal_lm(cfg.policy, tokenizer, "python sft.py", **options)
    common.set_generation_defaults(policy, tokenizer, cfg.temperature)  # plain sampling
    if cfg.lora_rank is None:
        policy.to(device)  # now, to free host memory for the next model
    ref_policy = common.shared_copy(policy, cfg.lora_rank).requires_grad_(False)  # frozen
    scorers = []  # S of them
    for spec in cfg.reward:
        scorers.append(load_scorer(spec, policy, tokenizer, cfg.microbatch_size, **options))
    critic = load_critic(cfg, scorers, policy, tokenizer, **options)
    common.add_adapters(policy, cfg.lora_rank, cfg.policy)  # after copying: ref_policy has none
    common.check_context(policy, longest)  # is its context long enough?
    for model in (policy, critic):
        common.to_device(model, device, cfg.dtype, cfg.gradient_checkpointing, cfg.compile)
    frozen_device = harness.pick_device(cfg.reward_device or cfg.device, "--reward-device")
    dtype = "bf16" if cfg.dtype == "auto" and device.type == "cuda" else cfg.dtype  # the policy's
    for model in (ref_policy, *(scorer.model for scorer in scorers)):
        if model is not None:  # functions have none
            common.to_device(model, frozen_device, dtype, compile=cfg.compile)
    for scorer in scorers:
        if scorer.reads_tokens:
            common.check_context(scorer.model, longest)
    return policy, ref_policy, critic, scorers


def load_critic(cfg, scorers, policy, tokenizer, **options):
    """Returns the critic: a copy of the first reward model that reads the policy's tokens, or, if
    there is none, a copy of the policy with a head in place of its logits.

    A reward model already knows what drives the score, which is most of what a critic has to learn.
    With --critic shared the critic is only a linear head on the policy. That saves a model and its
    optimizer state, but the value loss, weighted by c1, then trains the policy's trunk as well, and
    the two losses may conflict. New heads start at 0.
    """
    if cfg.critic == "shared":
        critic = ValueHead(policy.get_output_embeddings().in_features, 1)  # hidden size -> V
        torch.nn.init.zeros_(critic.weight)
        torch.nn.init.zeros_(critic.bias)
        return critic
    for scorer in scorers:
        if scorer.reads_tokens:
            critic = common.shared_copy(scorer.model, cfg.lora_rank).requires_grad_(True)
            common.add_adapters(critic, cfg.lora_rank, scorer.spec)
            return critic
    critic, _ = common.load_scalar_model(cfg.policy, tokenizer, **options)
    torch.nn.init.zeros_(critic.score.weight)  # V starts at 0
    if cfg.lora_rank is not None:
        common.share_trunk(critic, policy)  # one set of frozen weights
    common.add_adapters(critic, cfg.lora_rank, cfg.policy)
    print("  the critic starts from the policy, with a head of zeros")
    return critic


# Learning rates by number of parameters: a rate that suits a tiny model can ruin a large one within
# one iteration. They were chosen by approx_kl in iteration 1. Models of 0.3, 1 and 5 M trained from
# scratch reach 0.01 to 0.05 with the first two; a pretrained 135 M model reaches 0.003 to 0.009
# with the third, and learned more at three times it (0.016 to 0.047). Last: Huang et al. 2024.
LR_BY_SIZE = ((5e5, 3e-4), (10e6, 5e-5), (1e9, 1e-5), (math.inf, 3e-6))  # (below, learning rate)


def make_optimizer(cfg, policy, critic):
    """Returns Adam over policy and critic, each with its own rate, and a schedule to 0."""
    sized = policy if isinstance(critic, ValueHead) else critic  # a head: by its trunk
    lr = harness.lr_by_size(cfg.lr, LR_BY_SIZE, policy)  # the flag, or the table
    critic_lr = harness.lr_by_size(cfg.critic_lr, LR_BY_SIZE, sized)
    groups = [
        {"params": harness.trainable(policy), "lr": lr},
        {"params": harness.trainable(critic), "lr": critic_lr},
    ]
    # eps 1e-5 is OpenAI's (Huang et al. 2024). fused=True updates all weights in few passes.
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / cfg.iterations)
    return optimizer, schedule


# === Not the algorithm: held-out evaluation =======================================================
@torch.no_grad()
def evaluate(cfg, policy, ref_policy, tokenizer, scorers, judge, rows):
    """Samples one response to each prompt, with the same seed each time.

    Returns:
        A dict per row with "prompt", "response", "score" (without --missing-eos-penalty),
        "true_reward" (None without a judge) and "kl".
    """
    samples = []  # a dict per row
    generator = torch.Generator().manual_seed(cfg.seed)  # not the loop's
    for start in range(0, len(rows), cfg.batch_size):
        some = rows[start : start + cfg.batch_size]
        rollout = sample_responses(
            policy, tokenizer, some, cfg.response_length, cfg.temperature, generator
        )
        scores = score_responses(scorers, rollout, some).sum(0).tolist()
        truths = [None] * len(some)  # true rewards
        if judge:
            truths = score_responses([judge], rollout, some)[0].tolist()
        logprobs, ref_logprobs, _, _ = evaluate_tokens(
            policy, None, ref_policy, rollout, cfg.temperature, cfg.microbatch_size
        )
        kls = torch.where(rollout.response_mask, logprobs - ref_logprobs, 0.0).sum(1).tolist()
        for row, text, score, truth, kl in zip(some, rollout.texts, scores, truths, kls):
            sample = {"prompt": row["prompt"], "response": text, "score": score}
            samples.append(sample | {"true_reward": truth, "kl": kl})
    return samples


def measure_scales(cfg, kept, policy, ref_policy, tokenizer, scorers, rows):
    """Sets mean and std of reward models without them, from scores of the initial policy's texts.

    Returns {reward: (mean, std)}, which checkpoints keep: a resumed run must use the same.
    """
    scales = kept.get("scales", {})  # {reward: (mean, std)}
    for scorer in scorers:
        if scorer.needs_scale:
            if scorer.spec not in scales:
                some = rows[:256]
                samples = evaluate(cfg, policy, ref_policy, tokenizer, [scorer], None, some)
                scales[scorer.spec] = mean_and_std(scorer, [each["score"] for each in samples])
            config = scorer.model.config
            config.reward_mean, config.reward_std = scales[scorer.spec]
    return scales


def log_evaluation(run, samples, baseline):
    """Writes the `eval` row, and 16 samples next to the SFT policy's."""
    run.log({"split": "eval", "iteration": run.step} | summarize(samples, baseline))
    for sample, old in list(zip(samples, baseline))[:16]:
        extra = {"sft_response": old["response"]}
        run.append("samples.jsonl", {"iteration": run.step} | sample | extra)


def summarize(samples, baseline):
    """Returns means over samples, and their win rate against the SFT policy's (ties count half),
    by the true reward if there is a judge, else by the score.
    """
    has_judge = samples[0]["true_reward"] is not None
    key = "true_reward" if has_judge else "score"  # what decides a win
    wins = 0.0  # ties count half
    for sample, old in zip(samples, baseline):
        wins += (sample[key] > old[key]) + 0.5 * (sample[key] == old[key])
    row = {"score": None, "true_reward": None, "kl": None}
    for name in row:
        if name != "true_reward" or has_judge:
            row[name] = sum(sample[name] for sample in samples) / len(samples)
    return row | {"win_rate": wins / len(samples)}


# === Not the algorithm: memory ====================================================================
PIECE = 2**25  # logits per piece, unless one row has more: 128 MiB in float32


def token_logprobs_in_pieces(logits, tokens, temperature, with_entropy):
    """Returns the same as `token_logprobs`, in less memory: a softmax over the vocabulary takes
    several tensors of the logits' size, so a few rows are processed at a time and recomputed in
    the backward pass.
    """
    num_rows = max(1, PIECE // (logits.shape[1] * logits.shape[2]))
    logprobs = []  # (rows, r) of each piece
    entropies = []
    for part, ids in zip(logits.split(num_rows), tokens.split(num_rows)):
        part_logprobs, part_entropies = checkpoint(
            token_logprobs, part, ids, temperature, with_entropy,
            use_reentrant=False, preserve_rng_state=False,
        )
        logprobs.append(part_logprobs)
        entropies.append(part_entropies)
    return torch.cat(logprobs), torch.cat(entropies)  # (b, r) each


def dry_run(run, policy, ref_policy, critic, scorers, optimizer, tokenizer, rows):
    """Returns run.cfg with the micro-batch size to use, which the scorers get as well.

    On CUDA it also runs rollout, scorers that read tokens, and log-probabilities at full length, so
    that a lack of memory shows before training. Nothing is learned; the random state is unchanged.
    """
    settings = policy.generation_config
    longest = max(rows, key=lambda row: len(row.prompt_ids))  # the longest prompt
    length = len(longest.prompt_ids) + run.cfg.response_length  # P+R

    def try_size(size):
        tokens = torch.full((size, length), settings.pad_token_id)  # (size, P+R)
        attention_mask = torch.ones_like(tokens).bool()  # (size, P+R)
        if len(longest.prompt_ids) > 1:
            attention_mask[0, 0] = False  # some padding, as in most batches
        logprobs, values, entropies = forward_responses(
            policy, critic, tokens, attention_mask, run.cfg.response_length, run.cfg.temperature,
            run.cfg.entropy_coef > 0,
        )
        (logprobs.sum() + values.sum() + entropies.sum()).backward()

    size = harness.choose_microbatch_size(run, optimizer, 32, run.cfg.minibatch_size, try_size)
    cfg = dataclasses.replace(run.cfg, microbatch_size=size)  # args.json keeps what was given
    for scorer in scorers:
        scorer.microbatch_size = size
    if run.device.type != "cuda":
        return cfg
    run.phase("rollout")  # the other phases, once, at this size
    eos_ids = settings.eos_token_id
    settings.eos_token_id = []  # no response ends
    rollout = sample_responses(
        policy, tokenizer, [longest] * cfg.batch_size, cfg.response_length, cfg.temperature,
        torch.Generator(),
    )
    settings.eos_token_id = eos_ids
    if len(longest.prompt_ids) > 1:
        rollout.attention_mask[0, 0] = False  # again some padding
    run.phase("score")
    for scorer in scorers:
        if scorer.reads_tokens:
            scorer(rollout.tokens, rollout.attention_mask, None, None)
    run.phase("log-probabilities")
    evaluate_tokens(policy, critic, ref_policy, rollout, cfg.temperature, size)
    torch.cuda.reset_peak_memory_stats(run.device)  # peak_memory_gb is about the run itself
    return cfg


# === Not the algorithm: metrics. The comments say what is healthy =================================
def rollout_metrics(batch, score_parts, true_rewards, finished, entropies):
    """Returns the metrics of a rollout."""
    mask = batch.response_mask  # (B, R)
    scores = score_parts.sum(0)
    token_kl = torch.where(mask, batch.logprobs - batch.ref_logprobs, 0.0)  # (B, R)
    returns = batch.returns[batch.value_mask]  # where the critic is trained
    errors = returns - batch.values[batch.value_mask]  # G - V_old
    unexplained = errors.var(correction=0) / returns.var(correction=0)  # 1 if V is constant
    return {
        "score": scores.mean().item(),  # before the EOS penalty; rises
        "score_parts": score_parts.mean(1).tolist(),  # of each --reward, in their order
        "score_std": scores.std(correction=0).item(),  # shrinks; near 0: all responses score alike
        "true_reward": None if true_rewards is None else true_rewards.mean().item(),
        "kl_k3": (torch.exp(-token_kl) - 1 + token_kl).sum(1).mean().item(),  # kl, never < 0
        "entropy": entropies[mask].mean().item(),  # nats per token; near 0: always one answer
        "response_length": mask.sum(1).float().mean().item(),  # tokens; should not jump
        "eos_rate": finished.float().mean().item(),  # near 1
        "explained_variance": 1 - unexplained.item(),  # by V; may start below 0, then rises
    }


def update_metrics(steps):
    """Returns means over optimizer steps of what the loop recorded (not `ratio`), the number of
    steps tried, and two values of the first step, when the policy is still pi_old.

    approx_kl is rho - 1 - log rho, an estimate of KL(pi_old || pi) that is never negative (Schulman
    2020, "Approximating KL divergence"). It measures one update, `kl` the whole run. Healthy:
    policy_loss slightly below 0 (0 with a single step), value_loss falling, approx_kl 0.001 to
    0.05, clip_fraction (ratios outside 1 +- eps) 0.01 to 0.2, norms (before clipping) steady.
    """
    means = {}  # {statistic: its mean over optimizer steps}
    for name in steps[0]:
        means[name] = torch.stack([torch.as_tensor(step[name]) for step in steps]).mean().item()
    del means["ratio"]  # its mean after the first step says little
    return means | {
        "ratio_first": float(steps[0]["ratio"]),  # 1 up to rounding
        "approx_kl_first": float(steps[0]["approx_kl"]),  # 0 up to rounding
        "optimizer_steps": len(steps),  # includes skipped ones
    }


def run_metrics(run, response_mask):
    """Returns counters, learning rate, seconds per phase, response tokens per second and memory."""
    seconds = run.phase("evaluation")  # ends the earlier phases, returns their seconds
    peak = harness.peak_memory(run.device)
    return {
        "iteration": run.step,
        "episodes": run.step * run.cfg.batch_size,  # responses sampled so far
        "kl_target": run.cfg.kl_target,
        "lr": run.schedule.get_last_lr()[0],  # the policy's; falls linearly to 0
        "skipped_steps": run.num_skipped,  # without a finite gradient; should be 0
        "seconds_rollout": seconds["rollout"],
        "seconds_score": seconds["score"] + seconds["log-probabilities"],
        "seconds_update": seconds["backward"] + seconds["optimizer step"],
        "tokens_per_second": response_mask.sum().item() / sum(seconds.values()),
        "peak_memory_gb": peak and peak / 1e9,  # CUDA: tensors only; else the whole process
    }


# Warn above this mean |sampled - recomputed log pi|, in nats per token: ten times what
# tests/test_families.py finds in its worst family, for float32 and for bf16. Above MAX_GAP a run
# ends in its first iteration.
SAMPLER_GAP = 2.1e-5
SAMPLER_GAP_BF16 = 0.28
MAX_GAP = 0.5


def check_sampler(run, policy, rollout, logprobs):
    """Returns sampler_gap. Warns if it is large; above MAX_GAP the first iteration ends the run."""
    gap = (rollout.sampled_logprobs - logprobs)[rollout.response_mask].abs().mean().item()
    what = f"the sampler's log-probabilities are off by {gap:.2g} nats per token"
    if run.step == run.done + 1 and not gap <= MAX_GAP:
        name = type(policy).__name__
        raise UserError(f"{what}: {name} gives different probabilities in sampling and training")
    if gap > (SAMPLER_GAP_BF16 if policy.use_bf16 else SAMPLER_GAP):
        causes = "a cache that rounds, MoE routing that flips; try --dtype float32"
        run.warn("sampler", f"{what}. Usual causes: {causes}")
    return gap


def warn_if_unhealthy(run):
    """Warns, once per symptom, about what looks wrong in the last row of metrics."""
    row = run.history[-1]  # rows of metrics.jsonl
    last_ten = run.history[-10:]
    ten = len(last_ten) == 10
    unexplained = ten and all((old["explained_variance"] or 0) < -0.05 for old in last_ten)
    target = row["kl_target"] or math.inf  # without a target nothing misses it
    missed = ten and all((old["kl"] or 0) > 1.5 * target for old in last_ten)
    first_kl = row["approx_kl_first"]  # nan if the logits are not finite
    rules = (  # condition, name, symptom, usual causes
        (not first_kl <= 1e-3 or abs(row["ratio_first"] - 1) > 1e-2, "ratio",
         f"the first ratios are not 1 (approx_kl {first_kl:.2g})",
         "dropout on; rounding, try --dtype float32"),
        (row["eos_rate"] < 0.5, "eos", f"only {row['eos_rate']:.0%} of the responses finish",
         "--response-length too short; SFT on texts without EOS; another EOS id"),
        (row["response_length"] < 5, "length", f"{row['response_length']:.1f} tokens per response",
         "a reward that favors short texts; prompts that end in EOS; --kl-coef too small"),
        (row["score_std"] < 0.01, "score", f"standard deviation of scores {row['score_std']:.2g}",
         "one answer to every prompt; a constant reward; an untrained reward head"),
        (row["kl"] > 50, "far", f"KL {row['kl']:.0f} nats per response",
         "--kl-coef too small; --lr too high; if the score still rises, reward hacking"),
        (row["approx_kl"] > 0.2, "overshoot", f"approx_kl {row['approx_kl']:.2g}, far too much",
         "--lr too high, try a third of it; too many --ppo-epochs; see --max-approx-kl"),
        (missed, "target", f"KL {row['kl']:.1f}, far above --kl-target for 10 iterations",
         "--lr too high; --kl-coef too small to start from; --kl-horizon too long"),
        (row["kl"] < -0.1 - 0.2 * row["kl_k3"], "negative", f"KL {row['kl']:.2f}, negative",
         "a sampling setting changes the distribution; a second EOS id"),
        (unexplained, "critic", "explained variance below 0 for 10 iterations",
         "--critic-lr too high or too low; a reward that is noise given the prompt"),
        (row["skipped_steps"] > 0, "gradient", "a gradient was not finite; its step was skipped",
         "--lr too high; very large rewards"),
    )
    for is_seen, name, symptom, causes in rules:
        if is_seen:
            run.warn(name, f"{symptom}. Usual causes: {causes}")


# === Not the algorithm: what is printed ===========================================================
def print_start(cfg, policy, ref_policy, critic, scorers, optimizer, num_prompts, num_held_out):
    """Prints the models, the rewards, the arithmetic of the batches and the learning rates."""
    models = [("policy", policy), ("ref policy", ref_policy), ("critic", critic)]
    models += [("reward", scorer.model) for scorer in scorers if scorer.model is not None]
    harness.print_models(models)
    rates = [group["lr"] for group in optimizer.param_groups]  # of policy and critic
    num_steps = cfg.ppo_epochs * cfg.batch_size // cfg.minibatch_size  # per iteration
    print(
        f"  {cfg.iterations} iterations x {cfg.batch_size} responses = "
        f"{cfg.iterations * cfg.batch_size} episodes, from {num_prompts} prompts; "
        f"{num_held_out} held out\n  rewards: {' + '.join(cfg.reward)}; judge: {cfg.judge}\n"
        f"  {cfg.ppo_epochs} epochs of minibatches of {cfg.minibatch_size} = {num_steps} "
        "optimizer steps per iteration\n"
        f"  lr {rates[0]:g}, critic lr {rates[1]:g} (by model size, unless given)"
    )


def explain_response(tokenizer, batch, rewards, advantages, row=0):
    """Returns one response as a table: the score is at the last token; advantages carry it back."""
    columns = {
        "log pi": batch.logprobs, "log ref": batch.ref_logprobs,
        "KL": batch.logprobs - batch.ref_logprobs, "V": batch.values, "reward": rewards,
        "advant.": advantages, "return": batch.returns,
    }
    lines = [f"\n{'t':>3} {'token':<14}" + "".join(f"{name:>9}" for name in columns)]
    response = batch.tokens[row, -batch.response_mask.shape[1] :].tolist()  # token ids
    for t in range(int(batch.response_mask[row].sum())):
        token = repr(harness.token_text(tokenizer, response[t])[:13])
        numbers = "".join(f"{column[row, t].item():>9.3f}" for column in columns.values())
        lines.append(f"{t:>3} {token:<14}{numbers}")
    return "\n".join([*lines, "    (advantages before whitening)"])


def print_result(cfg, baseline, samples):
    """Prints the results, a few samples side by side, and how to load the policy."""
    before, after = summarize(baseline, baseline), summarize(samples, baseline)
    print(f"\n{'held-out prompts':<18}{'SFT':>9}{'PPO':>9}")
    for key in before:
        if before[key] is not None:
            print(f"{key:<18}{before[key]:>9.3f}{after[key]:>9.3f}")
    for old, new in list(zip(baseline, samples))[:3]:
        prompt = new["prompt"]
        print(f"\n  {prompt if isinstance(prompt, str) else prompt[-1]['content']}")
        for name, sample in (("SFT", old), ("PPO", new)):
            truth = "" if not cfg.judge else f", true {sample['true_reward']:.2f}"
            text = f"    {name} (score {sample['score']:.2f}{truth}):{sample['response']}"
            print(harness.wrapped(text))
    prompt = samples[0]["prompt"]  # a string or a chat
    prompt = prompt[:66] if isinstance(prompt, str) else prompt[-1:]
    print(f'''
the curves: python plot.py {cfg.output}
wrote {cfg.output}, an ordinary Hugging Face folder; to load and try it:
    from transformers import pipeline
    generate = pipeline("text-generation", "{cfg.output}")
    print(generate({json.dumps(prompt, ensure_ascii=False)}, max_new_tokens=64))''')


if __name__ == "__main__":
    harness.run_stage(main, Config, __doc__.splitlines()[0])
