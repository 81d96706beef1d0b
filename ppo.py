"""Stage 3 of RLHF, PPO: one batch of text from prompt to optimizer.step(), read top to bottom.

Goal      maximise  E_{x ~ prompts, y ~ pi(.|x)}[ score(x, y) ] - beta * KL(pi || pi_ref)

(1)  rewards     r_t     = -beta * (log pi_old(y_t) - log pi_ref(y_t)) + [t is last] * score(x, y),
                           with --missing-eos-penalty taken off the score if no EOS came
(2)  advantages  delta_t = r_t + gamma * V_{t+1} - V_t ;   A_t = delta_t + gamma * lam * A_{t+1}
(3)  returns     G_t     = A_t + V_t
(4)  ratio       rho_t   = pi(y_t) / pi_old(y_t) = exp(log pi(y_t) - log pi_old(y_t))
(5)  policy      L_clip  = mean_t min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t)
(6)  value       L_value = 1/2 mean_t max((V_t - G_t)^2,
                                          (V_old + clip(V_t - V_old, -eps_v, eps_v) - G_t)^2)
(7)  total       L       = -L_clip + c1 * L_value - c2 * entropy
(8)  adaptive    beta   <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * batch / horizon), kept
                           within a tenth and ten times what it began with

          The V of (2) and (3) is V_old, the critic from before the update; that of (6) learns. The
          A_t of (5) are those of (2) or (2b), whitened over all tokens of the rollout; rewards not.

          With --advantage bandit a response is one step, and gamma, lam and eps_v play no part:
(2b)      A       = sum_t r_t - V(x), for each of its tokens; ratio and clip stay per token
(6b)      L_value = mean (V(x) - sum_t r_t)^2, without the 1/2 of (6)

Shapes    B prompts, P prompt tokens (left-padded), R response tokens (right-padded), S scorers (the
          reward models and functions of --reward). In a micro-batch: b rows, r columns of
          responses, and N tokens that count. V is the critic; the vocabulary has no letter.
Time      Column t of every (B, R) tensor is about response token y_t:
          logprobs[:, t] = log pi_old(y_t | x, y_<t);  values[:, t] = V(x, y_<t), before y_t is
          chosen: a baseline must not know the action.
Mask      response_mask is True where a token counts: up to and including the first EOS.

Models    policy        starts at --policy              trained  writes the responses
          ref policy    a copy of it                    frozen   the KL is measured against it
          reward model  --reward, one or several, or    frozen   scores a finished text, once
                        functions; their sum counts
          critic        separate: starts at the reward  trained  predicts, from an unfinished text,
                        model; shared: a value head              the rewards still to come; a
                        on the policy's trunk                    reward model reads finished ones
          pi_old needs no model: it is the policy before the update; its log-probabilities are kept.

Differs   The score is paid at the last counted token; TRL pays it one slot later if there is one.
          One function computes all log-probabilities, old, new and reference, at the sampling
          temperature and with the softmax in float32. The sampler's own are not used: its cache and
          shapes alone can move a bf16 ratio by several per cent before anything has been learned.
          Each mean of (5) to (7) is a sum divided once, by the count of the whole minibatch.
          Under torchrun common.py gives each process a share of the rows wherever models read
          them, and sums (`common.total`, `processes.add_up`) make it whole. Alone they do nothing.

Read      the main loop first, then sections 1 to 6 in its order; 0, 7 and 8 can wait.

Sources   Schulman et al. 2017 (PPO) and 2016 (GAE); Ziegler et al. 2019 ((1) and (8)); Stiennon et
          al. 2020; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", whose
          settings for 1 B parameters are a start for a model of that size: --lr 3e-6
          --critic-lr 3e-6 --kl-coef 0.05 --batch-size 512 --minibatch-size 512 --temperature 0.7
          --response-length 53, and 1,000,000 episodes.

Run       python ppo.py --policy ckpt/sft                                        embedded world
          python ppo.py --critic shared --advantage bandit --entropy-coef 0.01   simplest recipe
          python ppo.py --policy ckpt/sft --prompts mine.jsonl --reward mine.py:reward
          python ppo.py --policy ckpt/sft --reward ckpt/reward_model mine.py:length_penalty
Writes    ckpt/ppo: the policy as a Hugging Face folder, critic/, trainer_state/ (for --resume),
          args.json, metrics.jsonl, samples.jsonl; with --lora-rank also adapter/
"""

import plumbing  # first: Ctrl-C while torch loads is no traceback

import dataclasses
import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import common
from common import UserError
from plumbing import adapters, cli, metrics, processes, report, sharding
from plumbing.cli import DATA, RunConfig, arg
from plumbing.rows import load_prompts
from plumbing.runs import Run
from plumbing.scorers import FunctionScorer, load_scorer, measure_scales


# === 0. Configuration =============================================================================
# Three batch words: --batch-size prompts are answered at once in each iteration, --minibatch-size
# of the responses make an optimizer step, and scoring and update hold --microbatch-size of them at
# a time. So an iteration takes ppo_epochs * batch_size / minibatch_size optimizer steps at most.
@dataclass(frozen=True)
class Config(RunConfig):  # the flags that all stages share are in plumbing/cli.py
    output: str = arg("ckpt/ppo", "folder for the policy, the critic and the logs", heading="run")
    save_every: int = arg(10, "iterations between checkpoints", 1)
    eval_every: int = arg(10, "iterations between evaluations on held-out prompts", 1)
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = arg("auto", "of all models")
    compile: bool = arg(False, "torch.compile the models; minutes to start, then faster")
    shard: bool = arg(False, "divide models and Adam among the processes of torchrun, by FSDP2")
    explain: bool = arg(False, "print a response token by token, at first and at evaluations")

    policy: str = arg("ckpt/sft", "causal LM to train, and the reference", heading="models, data")
    reward: list[str] = arg(["ckpt/reward_model"], "models or file.py:function; several are summed")
    judge: str | None = arg(None, "file.py:function, the true reward; reported, not trained on")
    prompts: list[str] = arg([str(DATA / "prompts.jsonl")], "JSONL rows with a prompt")
    eval_prompts: list[str] | None = arg(None, "held-out prompts; else up to 128 of --prompts")

    iterations: int = arg(30, "rollouts, each followed by an update", 1, heading="rollout")
    batch_size: int = arg(128, "prompts per iteration", 1)
    max_prompt_length: int = arg(512, "in tokens; longer prompts are dropped and counted", 1)
    response_length: int = arg(64, "in tokens; what has not ended by then is cut and penalised", 1)
    temperature: float = arg(1.0, "of sampling and of all log-probabilities; 0.7 to 1", 0.01, 100)

    # beta trades score for distance from the reference. If the score rises and the texts get worse,
    # the reward model is over-optimised: raise beta or stop earlier, and look at a judge, the KL,
    # lengths and repetition rather than at the score.
    kl_coef: float = arg(0.15, "beta of eq. 1; 0.02 to 0.2; 0 invites hacking", 0, 1e9, "reward")
    kl_target: float | None = arg(None, "KL to hold by eq. 8, in nats; 3 to 10", 1e-6, 1e9)
    kl_horizon: int | None = arg(None, "of eq. 8, in episodes; else a 12th of the run's", 1)
    reward_device: str | None = arg(None, "of reward models and reference; else --device")
    missing_eos_penalty: float = arg(1.0, "off the score if no EOS came; 0 to 2", 0, 1e9)

    # gamma 1: a response is finite, and no part of it is worth more for coming sooner. lam trades
    # the critic's bias (0: believe V one token on) for the return's variance (1: ignore V after t).
    advantage: Literal["gae", "bandit"] = arg("gae", "per token, or one", heading="advantage")
    gamma: float = arg(1.0, "discount per token of eq. 2; 1", 0, 1)
    lam: float = arg(0.95, "lambda of eq. 2; 0.9 to 1", 0, 1)
    critic: Literal["separate", "shared"] = arg("separate", "a model, or a head on the policy")

    ppo_epochs: int = arg(4, "passes over each rollout, in new orders; 1 to 4", 1, heading="update")
    minibatch_size: int = arg(32, "sequences per optimizer step", 1)
    microbatch_size: int = arg(32, "sequences per scoring or update pass; memory and speed", 1)
    clip_eps: float = arg(0.2, "epsilon of eq. 5; 0.1 to 0.3", 0, 1)
    value_clip_eps: float = arg(0.2, "eps_v of eq. 6, in units of reward; 0.2 for deviation 1", 0)
    value_coef: float = arg(0.1, "c1 of eq. 7; Adam all but undoes it if separate", 0, 1e9)
    entropy_coef: float = arg(0.0, "c2 of eq. 7; 0 to 0.01", 0, 1e9)
    max_approx_kl: float | None = arg(None, "of a step ends the update before it; 0.02", 0, 1e9)
    lr: float | None = arg(None, "of the policy, falls linearly; else see LR_BY_SIZE", 0, 1)
    critic_lr: float | None = arg(None, "of the critic, falls linearly; else by size", 0, 1)
    max_grad_norm: float = arg(1.0, "clip the gradient of policy and of critic to it", 1e-9)


# Learning rates by number of parameters. What suits a tiny model ruins a large one within an
# iteration, so there is no one default; the start-up report prints the one in use. The first two
# were measured here (at 0.3, 1 and 5 M parameters approx_kl starts at 0.01 to 0.05), the last is
# that of Huang et al. 2024 for 1 to 7 B; what lies between was not.
LR_BY_SIZE = ((5e5, 3e-4), (10e6, 5e-5), (1e9, 1e-5), (math.inf, 3e-6))  # (below, learning rate)
# What --resume may be given anew; --iterations changes the learning rates still to come.
MAY_CHANGE = ("iterations", "eval_every", "explain")
MAY_CHANGE += ("attention", "compile", "shard", "reward_device")  # where and how it runs


def check_config(cfg):
    """Every rule about the flags that needs no model."""
    cli.check_ranges(cfg)
    if len({*cfg.reward}) < len(cfg.reward):
        raise UserError("--reward names one twice; it would count twice")
    if cfg.reward_device and cfg.lora_rank is not None:
        raise UserError("--lora-rank shares the models' weights; no --reward-device can have some")
    if cfg.kl_horizon is not None and cfg.kl_target is None:
        raise UserError("--kl-horizon is of eq. 8, which needs a --kl-target")
    if cfg.kl_target is not None and cfg.kl_coef == 0:
        raise UserError("--kl-target scales beta, so it needs a --kl-coef above 0 to start from")
    if cfg.kl_target is not None and (cfg.kl_horizon or math.inf) < cfg.batch_size:
        raise UserError(f"--kl-horizon is {cfg.kl_horizon}; it must be at least {cfg.batch_size}")
    if cfg.batch_size % cfg.minibatch_size:
        divisors = [n for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0]
        near = min(divisors, key=lambda n: abs(n - cfg.minibatch_size))
        raise UserError(
            f"--batch-size {cfg.batch_size} is not a multiple of --minibatch-size "
            f"{cfg.minibatch_size}; use --minibatch-size {near}"
        )


def with_embedded_defaults(cfg):
    """The embedded prompts come with held-out ones and with a judge that knows the true reward."""
    if cfg.prompts != Config().prompts:
        return cfg
    judge = cfg.judge or f"{DATA / 'true_reward.py'}:true_reward"
    eval_prompts = cfg.eval_prompts or [str(DATA / "heldout_prompts.jsonl")]
    return dataclasses.replace(cfg, judge=judge, eval_prompts=eval_prompts)


# === 1. Rollout: x ~ prompts, y ~ pi_old(. | x) ===================================================
def endless_batches(rows, batch_size, rng):
    """Batches of rows for ever: all rows once in random order, then again in another order."""
    order = []
    while True:
        while len(order) < batch_size:
            order += rng.sample(rows, len(rows))
        yield order[:batch_size]
        order = order[batch_size:]


def mask_through_first_eos(response, eos_ids):
    """True up to and including the first EOS, (B, R) bool; all True where none came.

    The EOS is inside: it is an action, chosen like any other token, and the score is paid there.
    What follows is padding. The mask is built from the generated tokens alone: `response == pad`
    would go wrong wherever the pad token can be sampled or is the EOS.
    """
    is_eos = torch.isin(response, torch.tensor(eos_ids, device=response.device)).long()
    return is_eos.cumsum(1) - is_eos == 0  # no EOS strictly before t


def sample_responses(policy, prompt_rows, response_length, temperature):
    """One response per row, plainly sampled: no top-k, no top-p, nothing stored with the model.

    Returns:
        tokens (B, P+R) int64, attention_mask (B, P+R) bool, response_mask (B, R) bool, ended (B,)
        bool, True where an EOS came, and the sampler's own log-probabilities (B, R), which only
        `check_sampler` reads. R is the longest response, at most response_length.
    """
    settings = policy.generation_config
    # Padded on the left, all prompts end in column P - 1 and all responses start in column P.
    prompt_ids = [row.prompt_ids for row in prompt_rows]
    prompts, prompt_mask = common.pad(prompt_ids, settings.pad_token_id, "left")  # (B, P)
    prompts, prompt_mask = prompts.to(policy.device), prompt_mask.to(policy.device)
    compiled = getattr(policy, "samples_compiled", False)  # by --compile, on CUDA
    sample = common.generate_compiled if compiled else common.generate_responses
    sampled = sample(policy, prompts, prompt_mask, response_length, temperature)
    response, sampled_logprobs = sampled  # (B, R) each
    response_mask = mask_through_first_eos(response, settings.eos_token_id)
    eos_ids = torch.tensor(settings.eos_token_id, device=response.device)
    ended = torch.isin(response, eos_ids).any(1)  # (B,)
    attention_mask = torch.cat([prompt_mask, response_mask], 1)  # (B, P+R)
    tokens = torch.cat([prompts, response], 1)  # (B, P+R)
    return tokens, attention_mask, response_mask, ended, sampled_logprobs


def decode_responses(tokens, attention_mask, response_mask, ended, tokenizer):
    """The texts of the responses: what each adds to its decoded prompt, but for the EOS."""
    prompt_length, texts = tokens.shape[1] - response_mask.shape[1], []
    for ids, mask, has_eos in zip(tokens.cpu(), attention_mask.cpu(), ended.tolist()):
        prompt, response = ids[:prompt_length], ids[prompt_length:]
        prompt = prompt[mask[:prompt_length]].tolist()
        response = response[mask[prompt_length:]].tolist()
        texts.append(common.decode(tokenizer, prompt, response[: len(response) - has_eos]))
    return texts


# === 2. Score: one number per response ============================================================
def score_responses(scorers, tokens, attention_mask, prompt_rows, responses):
    """What each of the S scorers, usually one, says of each response: (S, B) float32.

    A scorer is called with these arguments and gives (B,), without gradient. A reward model of
    reward_model.py reads the tokens as the policy wrote them and is asked at the last attended one,
    the EOS if there is one; its scores have mean 0 and deviation 1 on texts like the SFT policy's.
    One with other tokens is asked about the texts. What a Python function says counts as it is.
    """
    scores = [score(tokens, attention_mask, prompt_rows, responses) for score in scorers]
    return torch.stack(scores)


# === 3. Evaluate: log pi_old, log pi_ref and V_old at every response token ========================
PIECE = 2**25  # logits at a time: 128 MB in float32; half a dozen tensors of the size come and go


class ValueHead(torch.nn.Linear):
    """The critic of --critic shared: V read from the policy's own last hidden states."""


def token_logprobs(logits, tokens, temperature, with_entropy):
    """Log-probabilities of tokens (b, R) and entropies, (b, R) float32 each, from their logits.

    The sampler divided the logits by the temperature, so every log-probability does, the
    reference's too: the policy that is optimised is the tempered one, and its KL starts at 0.
    """
    all_logprobs = (logits.float() / temperature).log_softmax(-1)  # (b, R, vocabulary)
    logprobs = all_logprobs.gather(-1, tokens[..., None]).squeeze(-1)
    if not with_entropy:
        return logprobs, torch.zeros_like(logprobs)
    return logprobs, -(all_logprobs.exp() * all_logprobs).sum(-1)


def forward_responses(
    policy, critic, tokens, attention_mask, num_columns, temperature, with_entropy=False
):
    """The log-probabilities of old, new and reference policy: all that are learned from.

    Returns:
        logprobs, values, entropy, each (B, R) float32 with R = num_columns. Without a critic the
        values are 0, and so is the entropy unless asked for: it takes a softmax more.

    A causal model's output at position i is its distribution over token i + 1. So what belongs to
    the R response tokens is read one position earlier, from the last prompt token on. Models are
    read with a shift here and nowhere else; after it every column t is about y_t.

        position   ...  P-2   P-1    P    P+1  ...  P+R-2   P+R-1
        holds      ...  x     x      y_0  y_1  ...  y_{R-2} y_{R-1}
        predicts   ...  x     y_0    y_1  y_2  ...  y_{R-1}  (left out)
    """
    is_shared = isinstance(critic, ValueHead)
    tokens, attention_mask = tokens.to(policy.device), attention_mask.to(policy.device)
    # The last token predicts nothing that counts: left out, the last R positions are the wanted.
    # common.forward adds position ids that skip the padding, and the model's precision.
    inputs, attention_mask = tokens[:, :-1], attention_mask[:, :-1]  # (B, P+R-1)
    output = common.forward(
        policy, inputs, attention_mask, logits_to_keep=num_columns, output_hidden_states=is_shared
    )
    # Some rows at a time, and what backward needs of them is computed again there (checkpoint): of
    # tensors as wide as the vocabulary only the logits, and in backward their gradients, are whole.
    num_rows = max(1, PIECE // (num_columns * output.logits.shape[-1]))
    pieces = zip(output.logits.split(num_rows), tokens[:, -num_columns:].split(num_rows))
    done = [
        checkpoint(
            token_logprobs, *piece, temperature, with_entropy, use_reentrant=False,
            preserve_rng_state=False,
        )
        for piece in pieces
    ]
    logprobs, entropy = (torch.cat(piece) for piece in zip(*done))
    if critic is None:
        values = torch.zeros_like(logprobs)
    elif is_shared:
        hidden = output.hidden_states[-1][:, -num_columns:]  # (B, R, width)
        values = critic(hidden.float()).squeeze(-1)  # float32, as the separate critic's head
    else:
        values = common.token_scores(critic, inputs, attention_mask)[:, -num_columns:]
    return logprobs, values, entropy


@torch.no_grad()
def evaluate_tokens(
    policy, critic, ref_policy, tokens, attention_mask, num_columns, temperature, microbatch_size
):
    """logprobs, ref_logprobs, values, entropy of a whole rollout, each (B, R) float32.

    The old log-probabilities are computed here although the sampler had some: they must come from
    the function that the update uses, or the first ratio is not 1. What is left of a difference is
    rounding, which may depend on the shapes a row is computed in: approx_kl_first in the log.
    It goes by parts of like length, each without the columns that are padding in all its rows.
    """
    results = torch.zeros(4, len(tokens), num_columns, device=tokens.device)
    everything, prompt_length = torch.arange(len(tokens)), tokens.shape[1] - num_columns
    for part, columns in common.parts_by_length(attention_mask, everything, microbatch_size):
        part = part.to(tokens.device)
        width = columns.stop - prompt_length
        inputs = tokens[part, columns], attention_mask[part, columns], width, temperature
        logprobs, values, entropy = forward_responses(policy, critic, *inputs, with_entropy=True)
        ref_logprobs, _, _ = forward_responses(ref_policy, None, *inputs)
        ref_logprobs = ref_logprobs.to(tokens.device)  # from --reward-device
        results[:, part, :width] = torch.stack([logprobs, ref_logprobs, values, entropy])
    return common.total(results).unbind()


# === 4. Rewards: eqs. 1 and 8 =====================================================================
def kl_shaped_rewards(scores, token_kl, response_mask, kl_coef):
    """Eq. 1: what each token is paid, (B, R), 0 at padding.

    Args:
        scores: (B,), one per response.
        token_kl: (B, R), log pi_old(y_t) - log pi_ref(y_t). Summed over a response, its mean over
            the policy's own samples is the KL; the exact sum over the vocabulary would need both
            whole distributions.

    The reward model judges the finished text, so its whole score arrives at the last counted token;
    every token pays for its own distance from the reference. Advantages carry both back in time.
    In the reward, and not in the loss, the KL is credited to the tokens that lead to it.
    """
    rewards = torch.where(response_mask, -kl_coef * token_kl, 0.0)  # eq. 1, left
    last_index = response_mask.sum(1, keepdim=True) - 1  # (B, 1): the EOS, or the cut
    return rewards.scatter_add(1, last_index, scores[:, None])  # eq. 1, right


def adapt_kl_coef(kl_coef, kl, cfg):
    """Eq. 8: raise beta while the KL is above its target, else lower it; without one it stays.

    `kl` is the batch's mean of token_kl summed over each response, in nats. Beta stays within a
    tenth and ten times --kl-coef: beyond, either the score or the KL would count for nothing. The
    default horizon lets it go about as far within a run: 10 times in 30 iterations.

    Ziegler et al. 2019, whose paper has a constant 0.1 where their code has batch / horizon.
    """
    if cfg.kl_target is None:
        return kl_coef
    horizon = cfg.kl_horizon or max(cfg.batch_size, cfg.iterations * cfg.batch_size / 12)
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    kl_coef *= 1 + error * cfg.batch_size / horizon  # eq. 8
    return min(max(kl_coef, cfg.kl_coef / 10), cfg.kl_coef * 10)


# === 5. Advantages: eqs. 2-3 ======================================================================
# FORK: another advantage estimator is one more function like these two, named at ESTIMATORS, beside
# a value loss, and in --advantage. One without a critic leaves value_mask False everywhere; let
# `load_critic` return None for it.
def gae(rewards, values, response_mask, gamma, lam):
    """Advantages, returns and value_mask, each (B, R), by eqs. 2 and 3 (Schulman et al. 2016).

    `values` are from before the update, so the returns are targets that stay put over the epochs.
    After the last token nothing is left to earn: V is 0 there, even where the response was cut.
    With gamma = 1, lam = 1 gives A_t = r_t + r_{t+1} + ... - V_t, and lam = 0 gives delta_t.
    """
    rewards = torch.where(response_mask, rewards, 0.0)
    values = torch.where(response_mask, values, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)  # V_{t+1}
    deltas = rewards + gamma * next_values - values  # eq. 2, left
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])  # A_{t+1}
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running  # eq. 2, right
        advantages[:, t] = running
    return advantages, advantages + values, response_mask  # eq. 3; every value is trained


def bandit(rewards, values, response_mask, gamma, lam):
    """The same where the whole response is one action, eq. 2b; gamma and lam play no part.

    One baseline V(x), the value before the first token, serves the whole text, and every token gets
    the same advantage. GAE with gamma = lam = 1 is its cousin: the return from t on, minus V_t.
    """
    returns = torch.where(response_mask, rewards, 0.0).sum(1, keepdim=True)  # (B, 1)
    advantages = torch.where(response_mask, returns - values[:, :1], 0.0)  # eq. 2b
    is_first = torch.zeros_like(response_mask)
    is_first[:, 0] = True  # only V(x) is used, so only V(x) is trained
    return advantages, torch.where(response_mask, returns, 0.0), is_first


def whiten(x, mask):
    """x with mean 0 and (population) deviation 1 over the True positions; 0 elsewhere.

    It fixes the scale of the policy loss against value loss, entropy and gradient clip, and takes
    out what all tokens share, as where the critic is too low throughout. Over the whole rollout, as
    a minibatch's mean would be noisy; after the returns, which keep their unit.
    """
    counted = x[mask]
    return torch.where(mask, (x - counted.mean()) / (counted.std(correction=0) + 1e-8), 0.0)


# === 6. Update: eqs. 4-7 ==========================================================================
@dataclass(frozen=True)
class Batch:
    """One rollout as constants of the update: what the old policy did, and how it went."""

    tokens: torch.Tensor  # (B, P+R) int64          prompt, then response
    attention_mask: torch.Tensor  # (B, P+R) bool   False on both paddings
    response_mask: torch.Tensor  # (B, R) bool      True up to and including the first EOS
    value_mask: torch.Tensor  # (B, R) bool         True where the critic is trained
    logprobs: torch.Tensor  # (B, R) float32        log pi_old(y_t): all that remains of pi_old
    ref_logprobs: torch.Tensor  # (B, R) float32    log pi_ref(y_t), for a fork's KL in the loss
    values: torch.Tensor  # (B, R) float32          V_old(x, y_<t)
    advantages: torch.Tensor  # (B, R) float32      whitened
    returns: torch.Tensor  # (B, R) float32         from before whitening

    def __post_init__(self):
        for name, x in vars(self).items():  # the table above, checked
            wide = name in ("tokens", "attention_mask")
            shape = len(self.tokens), (self.tokens if wide else self.response_mask).shape[1]
            dtype = torch.bool if "mask" in name else torch.int64 if wide else torch.float32
            assert x.shape == shape and x.dtype == dtype, (name, x.shape, x.dtype)

    def micro_batches(self, index, size):
        """The rows of a minibatch as Batches of up to `size`, without what is padding in each."""
        prompt_length = self.tokens.shape[1] - self.response_mask.shape[1]
        for part, columns in common.parts_by_length(self.mask_on_host, index, size):
            part, of_response = part.to(self.tokens.device), slice(columns.stop - prompt_length)
            wide = {"tokens": columns, "attention_mask": columns}
            yield Batch(**{
                field.name: getattr(self, field.name)[part, wide.get(field.name, of_response)]
                for field in dataclasses.fields(self)
            })

    def counted(self):
        """The indices of tokens that count, and of values that are trained."""
        return [mask.nonzero(as_tuple=True) for mask in (self.response_mask, self.value_mask)]

    @cached_property
    def mask_on_host(self):
        """attention_mask on the CPU, fetched once: the host cuts micro-batches without waiting."""
        return self.attention_mask.cpu()


def minibatches(batch_size, minibatch_size, epochs):
    """The row indices of every optimizer step of an update; each epoch in an order of its own."""
    for _ in range(epochs):
        yield from torch.randperm(batch_size).split(minibatch_size)


# FORK: another policy loss goes here.
def policy_loss(new_logprobs, logprobs, advantages, clip_eps):
    """Loss and ratio of each token, eqs. 4 and 5, in the shape of the inputs.

    In the first minibatch every ratio is 1, up to rounding, and the loss is -A. That depends on no
    weight, yet it has a gradient: d ratio = ratio * d log pi, so that step is REINFORCE with A.
    Where the ratio is clipped and A pushes further out, the minimum is constant: gradient 0.
    """
    ratio = torch.exp(new_logprobs - logprobs)  # eq. 4
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages), ratio  # eq. 5


def value_loss(new_values, values, returns, value_clip_eps):
    """Loss of each value, eq. 6: the worse of the plain and the clipped error.

    Where V has moved more than eps_v and is nearer to the target than V_old +- eps_v is, the
    clipped error is the larger and the gradient 0; moving away from the target is never clipped. It
    mirrors eq. 5, and is a brake on trusting one rollout too far, not a bound.
    """
    clipped = values + (new_values - values).clamp(-value_clip_eps, value_clip_eps)
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)  # eq. 6


def bandit_value_loss(new_values, values, returns, value_clip_eps):
    """Loss of each V(x), eq. 6b: the plain squared error."""
    return (new_values - returns) ** 2  # eq. 6b


ESTIMATORS = {"gae": (gae, value_loss), "bandit": (bandit, bandit_value_loss)}  # of --advantage


def total_loss(
    policy_losses, value_losses, entropy, num_tokens, num_values, value_coef, entropy_coef
):
    """Eq. 7, a scalar: sums over what is given, divided by the counts of the whole minibatch.

    The policy's mean is over tokens, the critic's over the positions where it is trained (without a
    critic there are none, and num_values is 1 to divide by). Dividing a micro-batch's sums by the
    minibatch's counts makes the gradients of its micro-batches add up to the minibatch's own.
    """
    policy_term = (policy_losses - entropy_coef * entropy).sum() / num_tokens
    return policy_term + value_coef * value_losses.sum() / num_values  # eq. 7


@torch.no_grad()
def update_statistics(policy_losses, value_losses, ratio, num_tokens, num_values, clip_eps):
    """A micro-batch's share of the optimizer step's means, {metric: number}: shares add up.

    approx_kl estimates KL(pi_old || pi) by rho - 1 - log rho, never negative (Schulman 2020,
    "Approximating KL divergence"). It says how far one update went; `kl` how far the whole run did.
    clip_fraction counts all ratios outside 1 +- eps, also those whose gradient is not 0.
    """
    return {
        "policy_loss": policy_losses.sum() / num_tokens,
        "value_loss": value_losses.sum() / num_values,
        "approx_kl": (ratio - 1 - ratio.log()).sum() / num_tokens,
        "clip_fraction": ((ratio - 1).abs() > clip_eps).sum() / num_tokens,
        "ratio": ratio.sum() / num_tokens,
    }


# === 7. The models, and where the critic starts ===================================================
def load_models(cfg, tokenizer, rows, device):
    """policy, ref_policy, critic and the list of scorers, on the device.

    Trained weights are float32, and dropout is off (loading sets all rates to 0): two passes
    with two dropout masks are two policies, and the ratio would not be 1.
    """
    attention = None if cfg.attention == "auto" else cfg.attention  # what transformers takes
    options = {"trust_remote_code": cfg.trust_remote_code, "attn_implementation": attention}
    policy = common.load_causal_lm(cfg.policy, tokenizer, "python sft.py", **options)
    common.set_generation_defaults(policy, tokenizer, cfg.temperature)
    if cfg.lora_rank is None and not cfg.shard:  # out of the host's memory, before the next is read
        policy.to(device)
    ref_policy = adapters.twin(policy, cfg.lora_rank).requires_grad_(False)
    load = lambda spec: load_scorer(spec, policy, tokenizer, cfg.microbatch_size, **options)
    scorers = [load(spec) for spec in cfg.reward]
    critic = load_critic(cfg, scorers, policy, tokenizer, **options)
    adapters.add(policy, cfg.lora_rank, cfg.policy)  # the others have the policy without them
    longest = max(len(row.prompt_ids) for row in rows) + cfg.response_length
    for model in (policy, *(scorer.model for scorer in scorers if scorer.reads_tokens)):
        common.check_context(model, longest)
    others = cli.pick_device(cfg.reward_device or cfg.device, "--reward-device")
    dtype = "bf16" if cfg.dtype == "auto" and device.type == "cuda" else cfg.dtype  # of all alike
    for model in (policy, ref_policy, critic, *(scorer.model for scorer in scorers)):
        if model is not None:  # functions have none
            its_device = device if model in (policy, critic) else others
            common.place(model, its_device, dtype, cfg.gradient_checkpointing, cfg.compile)
            sharding.divide(model, cfg)  # before the next is moved to the device
    return policy, ref_policy, critic, scorers


def load_critic(cfg, scorers, policy, tokenizer, **options):
    """The critic: a copy of the first reward model that reads the policy's tokens; if there is
    none, of the policy with a head in place of its logits.

    A reward model has learned what scores depend on, which is most of what a critic must know.
    --critic shared is only a linear head: it saves a model and its optimizer, but its loss,
    weighted by c1, trains the policy's trunk too, and the two may pull apart. New heads start at 0.
    """
    if cfg.critic == "shared":
        common.check_hidden_states(policy)
        critic = ValueHead(policy.get_output_embeddings().in_features, 1)
        torch.nn.init.zeros_(critic.weight)
        torch.nn.init.zeros_(critic.bias)
        return critic
    for scorer in scorers:
        if scorer.reads_tokens:
            critic = adapters.twin(scorer.model, cfg.lora_rank).requires_grad_(True)
            return adapters.add(critic, cfg.lora_rank, scorer.spec)
    critic, _ = common.load_scalar_model(cfg.policy, tokenizer, **options)
    torch.nn.init.zeros_(critic.score.weight)
    adapters.share(critic, policy, cfg.lora_rank)
    return adapters.add(critic, cfg.lora_rank, cfg.policy)


def make_optimizer(cfg, policy, critic):
    """(Adam over policy and critic, each with its own rate; a schedule that takes both to 0)."""
    sized = policy if isinstance(critic, ValueHead) else critic  # a head: by its trunk
    groups = [{"params": cli.trainable(policy), "lr": cli.by_size(cfg.lr, LR_BY_SIZE, policy)}]
    if critic is not None:
        critic_lr = cli.by_size(cfg.critic_lr, LR_BY_SIZE, sized)
        groups += [{"params": cli.trainable(critic), "lr": critic_lr}]
    # eps: OpenAI's choice, see Huang et al. 2024. fused: one pass over the weights, not a dozen.
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / cfg.iterations)
    return optimizer, schedule


# === Main loop: sections 1 to 6 in order, then beta ===============================================
def main(cfg):
    check_config(cfg)
    cfg = with_embedded_defaults(cfg)
    run = Run(cfg, MAY_CHANGE, cfg.iterations)
    tokenizer = common.load_tokenizer(run.source or cfg.policy, "python sft.py", **cfg.of_tokenizer)
    rows, eval_rows = load_prompts(cfg, tokenizer)
    all_rows = rows + eval_rows
    models = policy, ref_policy, critic, scorers = load_models(cfg, tokenizer, all_rows, run.device)
    trained = {"policy": policy} if critic is None else {"policy": policy, "critic": critic}
    optimizer, schedule = make_optimizer(cfg, policy, critic)
    judge = FunctionScorer(cfg.judge) if cfg.judge else None
    report.ppo_start(cfg, *models, schedule.base_lrs, tokenizer, rows, eval_rows)
    rehearse(run, *models, optimizer, all_rows)
    look = partial(evaluate, run, policy, ref_policy, tokenizer)
    scales = measure_scales(scorers, run.kept, lambda one: look([one], None, all_rows[:256]))
    # -- scales: for reward models from elsewhere; the start: as at the checkpoint, if there is one
    run.restore(tokenizer, trained, optimizer, schedule, read_weights=True)
    baseline = run.kept.get("baseline") or look(scorers, judge, eval_rows)
    kl_coef = run.kept.get("kl_coef", cfg.kl_coef)
    run.start()
    metrics.log_evaluation(run, baseline, baseline)
    credit, loss_of_values = ESTIMATORS[cfg.advantage]
    batches = endless_batches(rows, cfg.batch_size, random.Random(cfg.seed))
    for iteration, prompt_rows in run.steps(batches, cfg.iterations):
        # 1. ROLLOUT     prompt_rows -> tokens, attention_mask (B, P+R); response_mask (B, R); ended
        run.phase("rollout")
        rollout = sample_responses(policy, prompt_rows, cfg.response_length, cfg.temperature)
        tokens, attention_mask, response_mask, ended, sampled_logprobs = rollout
        responses = decode_responses(tokens, attention_mask, response_mask, ended, tokenizer)

        # 2. SCORE       tokens, texts -> score_parts (S, B); final_scores (B,), less if it was cut
        run.phase("score")
        score_parts = score_responses(scorers, tokens, attention_mask, prompt_rows, responses)
        final_scores = score_parts.sum(0) - cfg.missing_eos_penalty * (~ended).float()

        # 3. EVALUATE    tokens -> logprobs, ref_logprobs, values, entropy (B, R)
        run.phase("log-probabilities")
        inputs = tokens, attention_mask, response_mask.shape[1], cfg.temperature
        logprobs, ref_logprobs, values, entropy = evaluate_tokens(
            policy, critic, ref_policy, *inputs, cfg.microbatch_size
        )
        metrics.check_sampler(run, policy, sampled_logprobs, logprobs, response_mask)

        # 4. REWARDS     final_scores, logprobs -> token_kl, rewards (B, R)                 eq. 1
        token_kl = torch.where(response_mask, logprobs - ref_logprobs, 0.0)  # < 0 for some tokens
        rewards = kl_shaped_rewards(final_scores, token_kl, response_mask, kl_coef)

        # 5. ADVANTAGES  rewards, values -> advantages, returns, value_mask (B, R)          eqs. 2-3
        advantages, returns, value_mask = credit(rewards, values, response_mask, cfg.gamma, cfg.lam)

        # 6. UPDATE      a batch of constants -> policy, critic; only new_* has gradient    eqs. 4-7
        batch = Batch(
            tokens=tokens, attention_mask=attention_mask, response_mask=response_mask,
            value_mask=value_mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values,
            advantages=whiten(advantages, response_mask), returns=returns,
        )
        steps = []  # of each optimizer step its statistics, {metric: number}
        for index in minibatches(cfg.batch_size, cfg.minibatch_size, cfg.ppo_epochs):
            run.phase("backward")
            optimizer.zero_grad()
            counts = response_mask[index].sum(), value_mask[index].sum().clamp(min=1)
            steps.append(Counter())  # its update() adds
            for micro in batch.micro_batches(index, cfg.microbatch_size):  # gradients add up
                new_logprobs, new_values, new_entropy = forward_responses(
                    policy, critic, micro.tokens, micro.attention_mask,
                    micro.response_mask.shape[1], cfg.temperature, cfg.entropy_coef > 0,
                )  # (b, r) each
                at, at_v = micro.counted()  # x[at]: only what counts, (N,)
                policy_losses, ratio = policy_loss(
                    new_logprobs[at], micro.logprobs[at], micro.advantages[at], cfg.clip_eps
                )
                value_losses = loss_of_values(
                    new_values[at_v], micro.values[at_v], micro.returns[at_v], cfg.value_clip_eps
                )
                losses, entropies = (policy_losses, value_losses), new_entropy[at]
                total_loss(*losses, entropies, *counts, cfg.value_coef, cfg.entropy_coef).backward()
                steps[-1].update(update_statistics(*losses, ratio, *counts, cfg.clip_eps))
            steps[-1] = processes.add_up(trained.values(), steps[-1])  # and all gradients
            norms = [clip_grad_norm_(m.parameters(), cfg.max_grad_norm) for m in trained.values()]
            steps[-1].update(dict(zip(trained, norms)))  # as they were before clipping
            if cfg.max_approx_kl is not None and steps[-1]["approx_kl"] > cfg.max_approx_kl:
                break  # far enough from pi_old: without this step, and without those left
            if run.may_step(norms):  # finite: one bad batch is skipped, and is no reason to stop
                optimizer.step()
        optimizer.zero_grad()  # the rollout can use the gradients' memory

        # 7. ADAPT       the KL as measured -> beta of the next iteration; its learning rates  eq. 8
        truths = judge(tokens, attention_mask, prompt_rows, responses) if judge else None
        row = metrics.ppo_metrics(run, batch, score_parts, truths, ended, entropy, steps, kl_coef)
        kl_coef = adapt_kl_coef(kl_coef, row["kl"], cfg)
        schedule.step()
        run.log(row, metrics.PPO_BAR, metrics.health_warnings)
        if cfg.explain and (iteration == 1 or run.is_due(cfg.eval_every)):
            run.bar.write(metrics.explain_response(tokenizer, batch, rewards, advantages))
        if run.is_due(cfg.eval_every):
            samples = look(scorers, judge, eval_rows)
            metrics.log_evaluation(run, samples, baseline)
        run.save_if_due(kl_coef=kl_coef, baseline=baseline, scales=scales)
    run.finish()
    report.ppo_result(cfg, baseline, samples)


# === 8. Held-out evaluation, rehearsal (not part of the algorithm) ================================
@torch.no_grad()
def evaluate(run, policy, ref_policy, tokenizer, scorers, judge, rows):
    """One response to each prompt, from the same random numbers at every call.

    Returns:
        A dict per row: "prompt", "response", "score", "true_reward" (None without a judge), "kl".
        The score is that of the scorers, without --missing-eos-penalty.
    """
    run.phase("evaluation")
    cfg, samples, num_rows = run.cfg, [], len(rows)
    rows = sharding.fill_up(rows, cfg)
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(cfg.seed)
        for start in range(0, len(rows), cfg.batch_size):
            some = rows[start : start + cfg.batch_size]
            tokens, attention_mask, response_mask, ended, _ = sample_responses(
                policy, some, cfg.response_length, cfg.temperature
            )
            texts = decode_responses(tokens, attention_mask, response_mask, ended, tokenizer)
            asked = tokens, attention_mask, some, texts
            inputs = tokens, attention_mask, response_mask.shape[1], cfg.temperature
            logprobs, ref_logprobs, _, _ = evaluate_tokens(
                policy, None, ref_policy, *inputs, cfg.microbatch_size
            )
            columns = {
                "prompt": [row["prompt"] for row in some], "response": texts,
                "score": score_responses(scorers, *asked).sum(0).tolist(),
                "true_reward": judge(*asked).tolist() if judge else [None] * len(some),
                "kl": torch.where(response_mask, logprobs - ref_logprobs, 0.0).sum(1).tolist(),
            }
            samples += [dict(zip(columns, values)) for values in zip(*columns.values())]
    return samples[:num_rows]


def rehearse(run, policy, ref_policy, critic, scorers, optimizer, rows):
    """On CUDA, the largest batch once before all else, so that memory fails in the first minute.

    With all that Adam will keep, the longest prompt with responses of full length is sampled,
    scored and taken through a backward pass. Nothing is learned, and no random number used up.
    """
    if run.device.type != "cuda":
        return
    run.phase("optimizer step")
    for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # with gradients of 0 it moves nothing
    optimizer.zero_grad()
    run.phase("rollout")
    cfg, settings = run.cfg, policy.generation_config
    longest = max(rows, key=lambda row: len(row.prompt_ids))
    sizes, eos_ids = (cfg.response_length, cfg.temperature), settings.eos_token_id
    settings.eos_token_id = []  # nothing ends
    with torch.random.fork_rng(devices=[run.device]):
        tokens, mask, *_ = sample_responses(policy, [longest] * cfg.batch_size, *sizes)
    settings.eos_token_id = eos_ids
    mask[0, 0] = len(longest.prompt_ids) == 1  # attention needs a mask in most micro-batches
    run.phase("score")
    for scorer in (scorer for scorer in scorers if scorer.reads_tokens):
        scorer(tokens, mask, None, None)
    run.phase("log-probabilities")
    evaluate_tokens(policy, critic, ref_policy, tokens, mask, *sizes, cfg.microbatch_size)
    run.phase("backward")
    part = slice(min(cfg.microbatch_size, cfg.minibatch_size))
    inputs = tokens[part], mask[part], *sizes
    for _ in range(1 + (cfg.minibatch_size > cfg.microbatch_size)):  # the second beside gradients
        outputs = forward_responses(policy, critic, *inputs, with_entropy=cfg.entropy_coef > 0)
        sum(output.sum() for output in outputs).backward()
    optimizer.zero_grad()
    optimizer.state.clear()
    report.measured_peak(run.device)


if __name__ == "__main__":
    with cli.command_line():
        main(cli.parse_args(Config, __doc__.splitlines()[0]))
