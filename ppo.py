"""Stage 3 of RLHF, PPO: one batch of text from prompt to optimizer.step(), read from top to bottom.

Goal      maximise  E_{x ~ prompts, y ~ pi(.|x)}[ score(x, y) ] - beta * KL(pi || pi_ref)

(1) rewards     r_t     = -beta * (log pi_old(y_t) - log pi_ref(y_t)) + [t is last] * score(x, y)
(2) advantages  delta_t = r_t + gamma * V_{t+1} - V_t ;   A_t = delta_t + gamma * lam * A_{t+1}
(3) returns     G_t     = A_t + V_t
(4) ratio       rho_t   = pi(y_t) / pi_old(y_t) = exp(log pi(y_t) - log pi_old(y_t))
(5) policy      L_clip  = mean_t min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t)
(6) value       L_value = 1/2 mean_t max((V_t - G_t)^2, (V_old + clip(V_t - V_old, -eps_v, eps_v) - G_t)^2)
(7) total       L       = -L_clip + c1 * L_value - c2 * entropy
(8) adaptive    beta   <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * batch / horizon)

          With --advantage bandit the whole response is one action: A = sum_t r_t - V(x) for each of its tokens (2b)
          and L_value = mean (V(x) - sum_t r_t)^2 (6b).

Shapes    B prompts, P prompt tokens (left-padded), R response tokens (right-padded), V vocabulary.
Time      Column t of every (B, R) tensor is about response token y_t:
          logprobs[:, t] = log pi(y_t | x, y_<t);  values[:, t] = V(x, y_<t), the state just before y_t.
Mask      response_mask is True where a token counts: up to and including the first EOS the policy chose.

Models    policy        starts at --policy              trained   writes the responses
          ref policy    a copy of it                    frozen    KL is measured against it
          reward model  --reward                        frozen    judges finished texts: one score per response
          critic        starts at the reward model      trained   predicts the rewards still to come from an unfinished
                        (separate) or is a value head             text; that is why a reward model does not replace it
                        on the policy's trunk (shared)
          pi_old needs no model: it is the policy before the update, and only its log-probabilities are kept.

Differs   The score is paid at the last counted token (OpenAI's and TRL's code put it one slot later).
          Log-probabilities of old, new and reference come from one function, at the sampling temperature, in float32;
          the sampler's own are not used, since its cache and shapes alone move a bf16 ratio by several per cent.
          The losses are divided once per optimizer step by its own number of tokens, not by a mean of means.
          Advantages are whitened over the tokens of the whole rollout; rewards are not.

Sources   Schulman et al. 2017 (PPO), 2016 (GAE); Ziegler et al. 2019 (KL reward, eq. 8); Stiennon et al. 2020;
          Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO". From there, for a model of about 1 B
          parameters: --lr 3e-6 --critic-lr 3e-6 --kl-coef 0.05 --batch-size 512 --minibatch-size 512 --temperature 0.7
          --response-length 53 and about 100,000 episodes.

Run       python ppo.py --policy ckpt/sft                                      the embedded world
          python ppo.py --critic shared --advantage bandit --entropy-coef 0.01   the recipe in its simplest form
          python ppo.py --policy ckpt/sft --prompts mine.jsonl --reward mine.py:reward
Writes    ckpt/ppo: the policy as a Hugging Face folder, critic/, args.json, metrics.jsonl, samples.jsonl
"""

import copy
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import random
import shutil
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import set_seed

import common
from common import UserError, arg


# === 0. Configuration =============================================================================
@dataclass(frozen=True)
class Config:
    policy: str = arg("ckpt/sft", "causal LM to train, folder or hub id; also the frozen reference", "models and data")
    reward: str = arg("ckpt/reward_model", "reward model, folder or hub id, or file.py:function, called as function(prompts, responses, rows) -> list of floats")
    judge: str | None = arg(None, "file.py:function that gives the true reward, only to report it; on by itself for the embedded prompts")
    prompts: str = arg(str(common.DATA / "prompts.jsonl"), "training prompts, JSONL rows of prompt; other keys reach the reward function")
    eval_prompts: str | None = arg(None, "held-out prompts; without it the embedded ones, or up to 128 rows taken out of --prompts")
    output: str = arg("ckpt/ppo", "folder for the trained policy, the critic and the log")

    iterations: int = arg(30, "rollouts, each followed by an update", "rollout")
    batch_size: int = arg(128, "prompts per iteration")
    max_prompt_length: int = arg(512, "longest prompt in tokens; rows above it are dropped and counted")
    response_length: int = arg(64, "most tokens per response; what has not ended by then is cut and penalised")
    temperature: float = arg(1.0, "sampling temperature, also of all log-probabilities; 0.7 to 1")
    missing_eos_penalty: float = arg(1.0, "taken off the score of a response without EOS, in score deviations; 0 to 2")

    kl_coef: float = arg(0.1, "beta of eq. 1, at the start if --kl-target is set; 0.02 to 0.2, 0 invites reward hacking", "reward")
    kl_target: float | None = arg(None, "adapt beta to hold the KL per response near this, in nats (eq. 8); 3 to 10")
    kl_horizon: int = arg(2000, "horizon of eq. 8 in episodes; 10,000 for runs of a million")

    advantage: Literal["gae", "bandit"] = arg("gae", "gae: credit per token (eq. 2); bandit: the response is one action (eq. 2b)", "advantage")
    gamma: float = arg(1.0, "discount per token of eq. 2; 1, since a text is paid once, at a known end")
    lam: float = arg(0.95, "lambda of eq. 2: 0 trusts the critic, 1 trusts the sampled return; 0.9 to 1")
    critic: Literal["separate", "shared"] = arg("separate", "separate: a model of its own; shared: a value head on the policy's trunk")

    ppo_epochs: int = arg(4, "passes over each rollout, freshly shuffled; 1 to 4", "update")
    minibatch_size: int = arg(32, "sequences per optimizer step")
    microbatch_size: int = arg(32, "sequences per forward pass; changes memory, not the gradient")
    clip_eps: float = arg(0.2, "epsilon of eq. 5; 0.1 to 0.3")
    value_clip_eps: float = arg(0.2, "epsilon of eq. 6; 0.1 to 0.3, inf for none")
    value_coef: float = arg(0.1, "c1 of eq. 7; matters for the shared critic, Adam undoes it for a separate one")
    entropy_coef: float = arg(0.0, "c2 of eq. 7; 0 to 0.01")
    target_kl: float | None = arg(None, "stop the epochs of an update once approx_kl is above it; 0.01 to 0.05")
    lr: float | None = arg(None, "learning rate of the policy; without it 3e-4 below 10 M parameters, 1e-5 below 1 B, 3e-6 above; falls linearly to 0")
    critic_lr: float | None = arg(None, "learning rate of the critic; without it the same table")
    max_grad_norm: float = arg(1.0, "gradient clipping, by the norm over the policy and over the critic")

    eval_every: int = arg(10, "iterations between evaluations on held-out prompts; always at the start and the end", "run")
    save_every: int = arg(10, "iterations between checkpoints; always at the end")
    seed: int = arg(0, "seed of samples and data order")
    device: str = arg("auto", "cpu, cuda, cuda:1; auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "arithmetic of the matrix products; weights are float32; auto is bf16 on CUDA")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, a third slower")
    explain: bool = arg(False, "print one response as a table, token by token, in the first iteration and at evaluations")

    @property
    def num_minibatches(self):
        return self.batch_size // self.minibatch_size


LR_BY_SIZE = ((10e6, 3e-4), (1e9, 1e-5), (float("inf"), 3e-6))  # (parameters below, learning rate)


def check_config(cfg):
    """Every rule about the flags that needs no model."""
    many, positive, share = (1, math.inf), (0, math.inf), (0, 1)
    common.check_range(cfg, {
        "iterations": many, "batch_size": many, "max_prompt_length": many, "response_length": many,
        "temperature": (0.01, 100), "missing_eos_penalty": positive, "kl_coef": positive, "kl_target": (1e-6, math.inf),
        "kl_horizon": (cfg.batch_size, math.inf), "gamma": share, "lam": share, "ppo_epochs": many,
        "minibatch_size": (1, cfg.batch_size), "microbatch_size": (1, cfg.minibatch_size), "clip_eps": share,
        "value_clip_eps": positive, "value_coef": positive, "entropy_coef": positive, "target_kl": positive,
        "lr": share, "critic_lr": share, "max_grad_norm": positive, "eval_every": many, "save_every": many,
    })  # fmt: skip
    if cfg.batch_size % cfg.minibatch_size:
        near = min((n for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0), key=lambda n: abs(n - cfg.minibatch_size))
        raise UserError(f"--batch-size {cfg.batch_size} is not a multiple of --minibatch-size {cfg.minibatch_size}; "
                        f"use --minibatch-size {near}")  # fmt: skip


# === 1. Rollout: x ~ prompts, y ~ pi_old(. | x) ===================================================
def load_prompts(path, tokenizer, max_prompt_length):
    """The rows of a prompt file that fit, each with its token ids under "prompt_ids"."""
    rows = common.read_rows(path, [("prompt",)])
    rows = [row | {"prompt_ids": common.encode_prompt(tokenizer, row["prompt"])} for row in rows]
    kept = [row for row in rows if 0 < len(row["prompt_ids"]) <= max_prompt_length]
    common.report_dropped(len(rows) - len(kept), len(rows), path)
    return kept


def endless_batches(rows, batch_size, rng):
    """Batches of rows for ever: every row once in random order, then again in another."""
    order = []
    while True:
        while len(order) < batch_size:
            order += rng.sample(rows, len(rows))
        yield order[:batch_size]
        order = order[batch_size:]


def mask_through_first_eos(response, eos_ids):
    """True up to and including the first EOS, (B, R) bool. EOS is an action that the policy chose; what follows is padding.

    Built from the generated tokens alone: `response == pad` would be wrong where pad is a token that can be sampled.
    """
    is_eos = torch.isin(response, torch.tensor(eos_ids, device=response.device)).long()
    return is_eos.cumsum(1) - is_eos == 0  # no EOS strictly before t


def sample_responses(policy, rows, cfg, device):
    """One sampled response per row: tokens and attention_mask (B, P+R), response_mask (B, R), ended (B,)."""
    settings = policy.generation_config
    prompts, prompt_mask = (x.to(device) for x in common.pad([row["prompt_ids"] for row in rows], settings.pad_token_id, "left"))
    with common.arithmetic(device, cfg.dtype):
        response = common.generate_responses(policy, prompts, prompt_mask, cfg.response_length, cfg.temperature)
    response_mask = mask_through_first_eos(response, settings.eos_token_id)
    ended = torch.isin(response, torch.tensor(settings.eos_token_id, device=device)).any(1)
    return torch.cat([prompts, response], 1), torch.cat([prompt_mask, response_mask], 1), response_mask, ended


def decode_responses(tokens, response_mask, tokenizer):
    """The texts of the responses, without special tokens."""
    response = tokens[:, -response_mask.shape[1] :]
    return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in zip(response, response_mask)]


# === 2. Score: one number per response ============================================================
def load_function(spec):
    """The function named by "file.py:function". Your own code: it is run as it is."""
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        raise UserError(f"{spec}: there is no file {path or spec}; give file.py:function")
    module_spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{spec}: {path} can't be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{spec}: {path} has no function {name}; it has {', '.join(names) or 'none'}")
    return getattr(module, name)


# FORK: a reward of your own is one function(prompts, responses, rows) -> list of floats, one per response.
def call_reward(function, rows, responses):
    """Scores (B,) float32 from a Python function, checked: one finite number per response."""
    scores = function([row["prompt"] for row in rows], responses, rows)
    if len(scores) != len(rows):
        raise UserError(f"the reward function returned {len(scores)} scores for {len(rows)} responses; return one for each")
    for score, row, response in zip(scores, rows, responses):
        if isinstance(score, str) or not hasattr(score, "__float__") or not math.isfinite(score):
            raise UserError(f"the reward function returned {score!r} for prompt {row['prompt']!r}, response {response!r}; "
                            "return a finite number")  # fmt: skip
    return torch.tensor([float(score) for score in scores])


@torch.no_grad()
def score_responses(reward, tokens, attention_mask, rows, responses, cfg):
    """One score per response, (B,) float32, in score deviations for a reward model, as it is for a function.

    The reward model reads prompt and response as the policy wrote them and is asked at the last attended token.
    """
    if not isinstance(reward, torch.nn.Module):
        return call_reward(reward, rows, responses).to(tokens.device)
    scores = []
    for micro in torch.arange(len(tokens)).split(cfg.microbatch_size):
        last = common.last_token_index(attention_mask[micro])
        with common.arithmetic(tokens.device, cfg.dtype):
            scores.append(common.token_scores(reward, tokens[micro], attention_mask[micro]).gather(1, last[:, None])[:, 0])
    return torch.cat(scores)


# === 3. Evaluate: log pi_old, log pi_ref and V_old at every response token ========================
def forward_responses(policy, critic, tokens, attention_mask, response_length, temperature, with_entropy=False):
    """The one function that turns tokens into log-probabilities, for old, new and reference policy alike.

    Returns:
        logprobs, values, entropy, each (B, R) float32. values is None without a critic, entropy None unless asked for.

    A causal model's output at position i is its distribution of token i + 1, so what concerns the R response tokens
    comes from the last prompt token up to the last response token but one. This is the only shift in the file:

        position      P-2   P-1 |  P   P+1  ...  P+R-1
        token         x     x   |  y_0  y_1 ...  y_{R-1}
        read for            y_0    y_1  y_2 ...              values[:, 0] is V(x), from the whole prompt
    """
    shared = isinstance(critic, torch.nn.Linear)
    output = policy(
        input_ids=tokens, attention_mask=attention_mask, position_ids=common.position_ids(attention_mask),
        logits_to_keep=response_length + 1, output_hidden_states=shared, use_cache=False,
    )  # fmt: skip
    # Sampling divided the logits by the temperature. So must every log-probability, the reference's too: the policy
    # that is optimised is the tempered one, and the KL of a copy of it must be 0.
    logits = output.logits[:, :-1].float() / temperature  # (B, R, V)
    normalizer = logits.logsumexp(-1)
    logprobs = logits.gather(-1, tokens[:, -response_length:, None]).squeeze(-1) - normalizer  # no (B, R, V) log-softmax
    entropy = normalizer - (logits.softmax(-1) * logits).sum(-1) if with_entropy else None  # -sum p log p
    if critic is None:
        return logprobs, None, entropy
    if shared:
        values = critic(output.hidden_states[-1][:, -response_length - 1 : -1].float()).squeeze(-1)
    else:
        values = common.token_scores(critic, tokens, attention_mask)[:, -response_length - 1 : -1]
    return logprobs, values.float(), entropy


@torch.no_grad()
def evaluate_tokens(policy, critic, ref_policy, tokens, attention_mask, response_length, cfg):
    """logprobs, ref_logprobs, values, entropy of a whole rollout, each (B, R) float32, by micro-batches."""
    parts = []
    for micro in torch.arange(len(tokens)).split(cfg.microbatch_size):
        inputs = tokens[micro], attention_mask[micro], response_length, cfg.temperature
        with common.arithmetic(tokens.device, cfg.dtype):
            logprobs, values, entropy = forward_responses(policy, critic, *inputs, with_entropy=True)
            ref_logprobs, _, _ = forward_responses(ref_policy, None, *inputs)
        parts.append((logprobs, ref_logprobs, logprobs.new_zeros(logprobs.shape) if values is None else values, entropy))
    return (torch.cat(part) for part in zip(*parts))


# === 4. Rewards: eqs. 1 and 8 =====================================================================
def kl_shaped_rewards(scores, kl, response_mask, kl_coef):
    """Eq. 1: what each token is paid, (B, R).

    Args:
        scores: (B,), one per response.
        kl: (B, R), log pi_old(y_t) - log pi_ref(y_t).

    The reward model judges the finished text, so its whole score arrives at the last token, while every token pays for
    its own distance from the reference. The advantages carry both back to the tokens that caused them.
    """
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    last_index = response_mask.sum(1, keepdim=True) - 1  # of the EOS, or of the last token where none came
    return rewards.scatter_add(1, last_index, scores[:, None])


def adapt_kl_coef(kl_coef, kl, kl_target, batch_size, kl_horizon):
    """Eq. 8 (Ziegler et al. 2019): raise beta while the KL is above its target, lower it while below."""
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * batch_size / kl_horizon)


# === 5. Advantages: eqs. 2-3 ======================================================================
# FORK: another advantage estimator is one more function like these two.
def gae(rewards, values, response_mask, gamma, lam):
    """Advantages and returns of token-level GAE, eqs. 2 and 3, each (B, R), 0 at padding (Schulman et al. 2016).

    `values` are those from before the update: returns are targets, fixed over the epochs. After the last token there
    is nothing left to earn, so V is 0 there, also where the response was cut: the penalty speaks for that.
    """
    rewards = torch.where(response_mask, rewards, 0.0)
    values = torch.where(response_mask, values, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)  # V_{t+1}
    deltas = rewards + gamma * next_values - values  # eq. 2
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running  # eq. 2
        advantages[:, t] = running
    return advantages, advantages + values  # eq. 3


def one_step(rewards, values, response_mask):
    """Advantages and returns where the whole response is one action (bandit), eq. 2b, each (B, R), 0 at padding.

    The baseline is V(x), the critic before the first token; every token gets the advantage of the whole text. With
    gamma = lam = 1, GAE gives the return from t minus V_t instead: the same idea with a baseline for each prefix.
    """
    returns = torch.where(response_mask, rewards, 0.0).sum(1, keepdim=True)  # (B, 1)
    advantages = returns - values[:, :1]
    return torch.where(response_mask, advantages, 0.0), torch.where(response_mask, returns, 0.0)


def estimate_advantages(advantage, rewards, values, response_mask, gamma, lam):
    """Advantages and returns by the chosen estimator, and value_mask, True where the critic is trained; each (B, R)."""
    if advantage == "gae":
        return *gae(rewards, values, response_mask, gamma, lam), response_mask
    first_token = torch.zeros_like(response_mask)
    first_token[:, 0] = True  # bandit uses V(x) alone, so V(x) alone is trained
    return *one_step(rewards, values, response_mask), first_token


def masked_mean(x, mask):
    """Mean of x over the True positions, a scalar."""
    return x[mask].mean()


def whiten(x, mask):
    """Shift and scale x to mean 0 and (population) deviation 1 over the True positions; 0 elsewhere.

    The policy's step then does not depend on the reward's scale, and about half of the tokens are pushed up and half down.
    """
    counted = x[mask]
    return torch.where(mask, (x - counted.mean()) / (counted.std(correction=0) + 1e-8), 0.0)


# === 6. Update: eqs. 4-7 ==========================================================================
@dataclass(frozen=True)
class Batch:
    """One rollout as constants of the update: what the old policy did and how it went."""

    tokens: torch.Tensor  # (B, P+R) int64    prompt, then response
    attention_mask: torch.Tensor  # (B, P+R) bool     False on both paddings
    response_mask: torch.Tensor  # (B, R)   bool     True up to and including the first EOS
    value_mask: torch.Tensor  # (B, R)   bool     True where the critic is trained
    logprobs: torch.Tensor  # (B, R)   float32  log pi_old(y_t)
    values: torch.Tensor  # (B, R)   float32  V_old(x, y_<t)
    advantages: torch.Tensor  # (B, R)   float32  whitened
    returns: torch.Tensor  # (B, R)   float32  from before whitening

    def __post_init__(self):
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            shape = (self.tokens if field.name in ("tokens", "attention_mask") else self.response_mask).shape
            dtype = torch.int64 if field.name == "tokens" else torch.bool if "mask" in field.name else torch.float32
            assert x.shape == shape and x.dtype == dtype, (field.name, x.shape, x.dtype)

    def rows(self, index):
        """The Batch of some of the sequences."""
        return Batch(**{field.name: getattr(self, field.name)[index] for field in dataclasses.fields(self)})


def minibatches(batch_size, minibatch_size, epochs):
    """Row indices of every optimizer step of an update: `epochs` passes, each in an order of its own."""
    for _ in range(epochs):
        yield from torch.randperm(batch_size).split(minibatch_size)


# FORK: another policy loss goes here.
def policy_loss(new_logprobs, logprobs, advantages, clip_eps):
    """Loss and ratio of each token, eqs. 4 and 5, shaped like the inputs.

    At ratio 1 the loss is -A, about 0 on the mean over whitened advantages, and still there is a gradient: the
    derivative of the ratio is the ratio times that of log pi, so the first step is REINFORCE with advantage A. Past the
    clip, where A would push further out, the minimum is a constant and the gradient 0.
    """
    ratio = torch.exp(new_logprobs - logprobs)  # eq. 4
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)  # eq. 5
    return -objective, ratio


def value_loss(new_values, values, returns, value_clip_eps):
    """Loss of each token's value, eq. 6: the worse of the plain and the clipped error. With None for the clip, eq. 6b.

    The clip keeps the critic near the one that the advantages were computed with, as eq. 5 does for the policy.
    """
    if value_clip_eps is None:
        return (new_values - returns) ** 2  # eq. 6b
    clipped = values + (new_values - values).clamp(-value_clip_eps, value_clip_eps)
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)  # eq. 6


STATISTICS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio")


@torch.no_grad()
def update_statistics(policy_losses, value_losses, ratio, clip_eps, num_tokens, num_values):
    """A micro-batch's share of the optimizer step's means, named by STATISTICS, (5,).

    approx_kl estimates KL(pi_old || pi) from samples of pi_old as rho - 1 - log rho, which is never negative
    (Schulman, "Approximating KL Divergence"). It bounds one update; `kl`, to the reference, bounds the whole run.
    """
    approx_kl = ratio - 1 - ratio.log()
    is_clipped = ((ratio - 1).abs() > clip_eps).float()
    sums = [policy_losses.sum(), value_losses.sum(), approx_kl.sum(), is_clipped.sum(), ratio.sum()]
    return torch.stack(sums) / torch.stack([num_tokens, num_values, num_tokens, num_tokens, num_tokens])


# === 7. Held-out evaluation (not part of the algorithm) ===========================================
@torch.no_grad()
def evaluate(policy, ref_policy, reward, judge, rows, tokenizer, cfg, device):
    """One response to each held-out prompt, always from the same random numbers.

    Returns:
        A dict of lists, one entry per row: "prompt", "response", "score", "true_reward" (None without a judge), "kl".
    """
    results = {"prompt": [row["prompt"] for row in rows], "response": [], "score": [], "true_reward": [], "kl": []}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(cfg.seed)
        for start in range(0, len(rows), cfg.batch_size):
            some = rows[start : start + cfg.batch_size]
            tokens, attention_mask, response_mask, _ = sample_responses(policy, some, cfg, device)
            responses = decode_responses(tokens, response_mask, tokenizer)
            logprobs, ref_logprobs, _, _ = evaluate_tokens(
                policy, None, ref_policy, tokens, attention_mask, response_mask.shape[1], cfg
            )
            results["response"] += responses
            results["score"] += score_responses(reward, tokens, attention_mask, some, responses, cfg).tolist()
            results["true_reward"] += call_reward(judge, some, responses).tolist() if judge else [None] * len(some)
            results["kl"] += torch.where(response_mask, logprobs - ref_logprobs, 0.0).sum(1).tolist()
    return results


def summarize(results, baseline):
    """An `eval` row: means, and the share of prompts won against the SFT policy's responses, ties counting half."""
    mean = lambda key: sum(results[key]) / len(results[key])
    key = "score" if results["true_reward"][0] is None else "true_reward"
    wins = [(new > old) + 0.5 * (new == old) for new, old in zip(results[key], baseline[key])]
    return {
        "score": mean("score"),
        "true_reward": None if results["true_reward"][0] is None else mean("true_reward"),
        "kl": mean("kl"),
        "win_rate": sum(wins) / len(wins),
    }


# === 8. What the user sees (not part of the algorithm) ============================================
def metrics_row(iteration, cfg, lr, kl_coef, scores, truths, kl, entropy, ended, batch, steps, grad_norms, clock):
    """The iteration's line of metrics.jsonl. The comments give what is healthy."""
    mask, mask_v = batch.response_mask, batch.value_mask
    update = dict(zip(STATISTICS, torch.stack(steps).mean(0).tolist()))
    rollout, score, optimize = (end - begin for begin, end in zip(clock, clock[1:]))
    error = (batch.returns - batch.values)[mask_v]
    mean_norms = torch.tensor(grad_norms).mean(0).tolist()
    return {
        "iteration": iteration,
        "episodes": iteration * cfg.batch_size,
        "score": scores.mean().item(),  # rises; a reward model's unit is its deviation on reference completions
        "score_std": scores.std(correction=0).item(),  # shrinks slowly; near 0 there is nothing left to learn from
        "true_reward": None if truths is None else truths.mean().item(),  # rises; falls when the score is being hacked
        "kl": kl.sum(1).mean().item(),  # 0 at first, then up to about 10; a mean below 0 is a bug
        "kl_k3": (torch.exp(-kl) - 1 + kl).sum(1).mean().item(),  # another estimate of kl, never negative; close to it
        "kl_coef": kl_coef,  # constant without --kl-target
        "entropy": masked_mean(entropy, mask).item(),  # falls slowly; near 0 the policy says one thing only
        "response_length": mask.sum(1).float().mean().item(),  # no trend, or a slow one
        "eos_rate": ended.float().mean().item(),  # near 1
        "policy_loss": update["policy_loss"],  # near 0, slightly negative
        "value_loss": update["value_loss"],  # falls, then follows the scale of the returns
        "approx_kl": update["approx_kl"],  # 0.001 to 0.05
        "clip_fraction": update["clip_fraction"],  # 0.01 to 0.2
        "ratio_first": steps[0][STATISTICS.index("ratio")].item(),  # exactly 1
        "explained_variance": 1 - (error.var(correction=0) / batch.returns[mask_v].var(correction=0)).item(),  # above 0, to 1
        "grad_norm": mean_norms[0],  # before clipping; steady
        "critic_grad_norm": mean_norms[1],  # before clipping; steady
        "lr": lr,
        "seconds_rollout": rollout,
        "seconds_score": score,  # reward model, old and reference log-probabilities, values
        "seconds_update": optimize,
        "tokens_per_second": mask.sum().item() / (rollout + score + optimize),  # response tokens, all phases
    }


def show_iteration(output, progress, row, history):
    """Append the row to metrics.jsonl, move the bar, and name each new symptom once."""
    common.append_json_line(output / "metrics.jsonl", row)
    shown = {"score": row["score"], "true": row["true_reward"], "kl": row["kl"], "length": row["response_length"]}
    progress.set_postfix({key: f"{value:.2f}" for key, value in shown.items() if value is not None})
    already = {metric for i, old in enumerate(history) for metric in health_warnings(old, history[:i])}
    for metric, (symptom, causes) in health_warnings(row, history).items():
        if metric not in already:
            progress.write(f"warning, iteration {row['iteration']}: {symptom}. Usual causes: {causes}")


def health_warnings(row, history):
    """What looks wrong in a metrics row: {metric: (symptom, usual causes)}; `history` holds the rows before it."""
    unexplained = sum(old["explained_variance"] < 0 for old in history[-10:]) == 10
    rules = [
        ("ratio_first", abs(row["ratio_first"] - 1) > 0.01, f"the first ratio is {row['ratio_first']:.4f}, not 1",
         "dropout is on; log-probabilities at another temperature; position ids missing; another dtype or batch shape"),
        ("eos_rate", row["eos_rate"] < 0.5, f"only {row['eos_rate']:.0%} of the responses end",
         "--response-length is too short; SFT without EOS; another EOS id"),
        ("response_length", row["response_length"] < 5, f"responses have {row['response_length']:.1f} tokens",
         "the reward favours short texts; prompts that end in EOS; --kl-coef is too small"),
        ("score_std", row["score_std"] < 0.01, f"the scores hardly differ (deviation {row['score_std']:.2g})",
         "one answer to every prompt; a constant reward; an untrained head"),
        ("kl", row["kl"] > 50, f"the KL is {row['kl']:.0f} nats per response, far from the reference",
         "--kl-coef is too small; --lr is too high; if the score still rises, look at samples for reward hacking"),
        ("kl", row["kl"] < -0.1 - 0.2 * row["kl_k3"], f"the KL is {row['kl']:.2f}, below 0 by more than chance",
         "the text is not from the distribution that is scored: a sampling setting, a second EOS"),
        ("explained_variance", unexplained, "the critic explained nothing for 10 iterations",
         "--critic-lr is too high or too low; a reward that is noise given the prompt"),
        ("grad_norm", not math.isfinite(row["grad_norm"] + row["critic_grad_norm"]),
         "a gradient was not finite, and its step was skipped", "--lr is too high; rewards of enormous size"),
    ]  # fmt: skip
    return {metric: (symptom, causes) for metric, is_seen, symptom, causes in rules if is_seen}


def explain_response(tokenizer, batch, ref_logprobs, rewards, raw_advantages, row=0):
    """One response as a table, token by token: where the score lands and how the advantages carry it back."""
    lines = [f"{'t':>3} {'token':<14}{'log pi':>9}{'log pi_0':>10}{'KL':>9}{'V':>9}{'reward':>9}{'advantage':>11}{'return':>9}"]
    response = batch.tokens[row, -batch.response_mask.shape[1] :]
    columns = batch.logprobs, ref_logprobs, batch.logprobs - ref_logprobs, batch.values, rewards, raw_advantages, batch.returns
    for t in range(int(batch.response_mask[row].sum())):
        numbers = [column[row, t].item() for column in columns]
        line = "".join(f"{number:>{width}.3f}" for number, width in zip(numbers, (9, 10, 9, 9, 9, 11, 9)))
        lines.append(f"{t:>3} {tokenizer.decode([response[t].item()])[:13]!r:<14}{line}")
    lines.append(f"sum {'':<14}{'':>19}{columns[2][row][batch.response_mask[row]].sum():>9.3f}{'':>9}"
                 f"{rewards[row][batch.response_mask[row]].sum():>9.3f}   (advantages before whitening)")  # fmt: skip
    return "\n".join(lines)


def print_report(cfg, policy, critic, reward, tokenizer, rows, eval_rows):
    """What will run: the models, the batch arithmetic, the special tokens."""
    steps = cfg.ppo_epochs * cfg.num_minibatches
    print(common.describe("policy", policy, trained=True))
    print(common.describe("ref policy", policy, trained=False))
    print(common.describe("critic", critic, trained=True))
    is_model = isinstance(reward, torch.nn.Module)
    print(common.describe("reward", reward, trained=False) if is_model else f"  {'reward':<14}the function {cfg.reward}")
    print(f"  {cfg.batch_size} prompts per iteration; {cfg.ppo_epochs} epochs x {cfg.num_minibatches} minibatches of "
          f"{cfg.minibatch_size} = {steps} optimizer steps, each in {math.ceil(cfg.minibatch_size / cfg.microbatch_size)} "
          f"forward(s) of up to {cfg.microbatch_size}")  # fmt: skip
    print(f"  {cfg.iterations} iterations = {cfg.iterations * cfg.batch_size} episodes over {len(rows)} prompts, "
          f"{len(eval_rows)} held out; judge: {cfg.judge or 'none'}")  # fmt: skip
    common.print_tokens(tokenizer, policy, rows[0]["prompt_ids"])


def print_result(before, after, baseline, results, cfg):
    """The table, samples side by side, and the lines that load the policy."""
    print(f"\n{'held-out prompts':<18}{'SFT':>9}{'PPO':>9}")
    for key in ("score", "true_reward", "kl", "win_rate"):
        if before[key] is not None:
            print(f"{key:<18}{before[key]:>9.3f}{after[key]:>9.3f}")
    for i in range(min(3, len(results["prompt"]))):
        print(f"\n  {results['prompt'][i]}")
        for name, source in (("SFT", baseline), ("PPO", results)):
            truth = "" if source["true_reward"][i] is None else f", true {source['true_reward'][i]:.2f}"
            print(f"    {name} (score {source['score'][i]:.2f}{truth}):{source['response'][i]}")
    print(f"""
wrote {cfg.output}; it is an ordinary Hugging Face folder:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("{cfg.output}")
    model = AutoModelForCausalLM.from_pretrained("{cfg.output}")
    print(tokenizer.decode(model.generate(**tokenizer("One quiet Sunday,", return_tensors="pt"), max_new_tokens=64)[0]))""")


def start_logs(output):
    """The output folder with empty metrics.jsonl and samples.jsonl, as a path."""
    common.prepare_output(output)
    output = pathlib.Path(output)
    output.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (output / name).write_text("")
    return output


def log_evaluation(output, iteration, results, baseline):
    """Write the evaluation's `eval` row and its samples beside the SFT policy's; the row."""
    row = {"split": "eval", "iteration": iteration} | summarize(results, baseline)
    common.append_json_line(output / "metrics.jsonl", row)
    for i in range(min(16, len(results["prompt"]))):
        sample = {key: values[i] for key, values in results.items()} | {"sft_response": baseline["response"][i]}
        common.append_json_line(output / "samples.jsonl", {"iteration": iteration} | sample)
    return row


def save_checkpoint(output, policy, critic, tokenizer, cfg):
    """The policy, the critic, the flags and the logs so far, as one folder that is there whole or not at all."""
    with common.written_whole(output) as folder:
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if isinstance(critic, torch.nn.Linear):
            (folder / "critic").mkdir()
            safetensors.torch.save_file(critic.state_dict(), folder / "critic" / "value_head.safetensors")
        else:
            critic.save_pretrained(folder / "critic")
        (folder / "args.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2))
        for name in ("metrics.jsonl", "samples.jsonl"):
            shutil.copy(pathlib.Path(output) / name, folder)


# === Main loop: the same six steps, now with models ===============================================
def load_models(cfg, tokenizer, device):
    """policy, ref_policy, critic, reward (a frozen model or a function), on their device."""
    policy = common.load_causal_lm(cfg.policy, tokenizer, made_by="python sft.py").to(device)
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    if ":" in cfg.reward and cfg.reward.rpartition(":")[0].endswith(".py"):
        reward, start = load_function(cfg.reward), cfg.policy
    else:
        vocabulary = common.load_tokenizer(cfg.reward, made_by="python reward_model.py").get_vocab()
        if vocabulary != tokenizer.get_vocab():
            raise UserError(f"{cfg.reward} and {cfg.policy} have different vocabularies; train the reward model from this policy")
        reward, head_is_new = common.load_scalar_model(cfg.reward, tokenizer, made_by="python reward_model.py")
        if head_is_new:
            raise UserError(f"{cfg.reward} has no trained reward head, its scores would be noise; make one with: "
                            f"python reward_model.py --model {cfg.reward}")  # fmt: skip
        reward, start = reward.to(device).requires_grad_(False), cfg.reward
    if cfg.critic == "shared":
        critic = torch.nn.Linear(policy.config.get_text_config().hidden_size, 1).to(device)
        torch.nn.init.zeros_(critic.weight), torch.nn.init.zeros_(critic.bias)
    else:
        critic, head_is_new = common.load_scalar_model(start, tokenizer)
        critic.to(device)
        if head_is_new:  # the reward is a function: start from the policy's trunk, predicting 0
            torch.nn.init.zeros_(critic.score.weight)
    if cfg.gradient_checkpointing:
        common.enable_gradient_checkpointing(policy)
        common.enable_gradient_checkpointing(critic) if cfg.critic == "separate" else None
    return policy, ref_policy, critic, reward


def main(cfg):
    check_config(cfg)
    set_seed(cfg.seed)
    device = common.pick_device(cfg.device)

    # -- setup: data, models, optimizer
    if cfg.prompts == Config.prompts:  # the embedded world knows the truth
        cfg = dataclasses.replace(
            cfg, judge=cfg.judge or f"{common.DATA / 'true_reward.py'}:true_reward",
            eval_prompts=cfg.eval_prompts or str(common.DATA / "heldout_prompts.jsonl"),
        )  # fmt: skip
    tokenizer = common.load_tokenizer(cfg.policy, made_by="python sft.py")
    rows = load_prompts(cfg.prompts, tokenizer, cfg.max_prompt_length)
    if cfg.eval_prompts:
        eval_rows = load_prompts(cfg.eval_prompts, tokenizer, cfg.max_prompt_length)
    else:
        rows, eval_rows = common.hold_out(rows, 128, cfg.seed)
    judge = load_function(cfg.judge) if cfg.judge else None
    policy, ref_policy, critic, reward = load_models(cfg, tokenizer, device)
    longest = max(len(row["prompt_ids"]) for row in rows + eval_rows)
    common.check_context(policy, longest + cfg.response_length, "--response-length or --max-prompt-length")
    lr, critic_lr = common.by_size(cfg.lr, LR_BY_SIZE, policy), common.by_size(cfg.critic_lr, LR_BY_SIZE, policy)
    optimizer = torch.optim.AdamW(
        [{"params": list(policy.parameters()), "lr": lr}, {"params": list(critic.parameters()), "lr": critic_lr}],
        eps=1e-5, weight_decay=0.0,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 1 - iteration / cfg.iterations)
    print_report(cfg, policy, critic, reward, tokenizer, rows, eval_rows)
    print(f"  lr {lr:g}, critic lr {critic_lr:g}" + ("" if cfg.lr and cfg.critic_lr else " (by model size unless given)"))

    # -- held-out evaluation of the start: the SFT policy that later ones are compared with
    output = start_logs(cfg.output)
    baseline = evaluate(policy, ref_policy, reward, judge, eval_rows, tokenizer, cfg, device)
    before = after = log_evaluation(output, 0, baseline, baseline)
    kl_coef, history = cfg.kl_coef, []
    value_clip_eps = cfg.value_clip_eps if cfg.advantage == "gae" else None  # None is eq. 6b
    batches = endless_batches(rows, cfg.batch_size, random.Random(cfg.seed))
    progress = tqdm(range(1, cfg.iterations + 1), desc="ppo", unit="it")
    for iteration in progress:
        clock = [common.now(device)]
        # 1. ROLLOUT     prompts (B, P)     -> tokens, attention_mask (B, P+R), response_mask (B, R), ended (B,)
        batch_rows = next(batches)
        tokens, attention_mask, response_mask, ended = sample_responses(policy, batch_rows, cfg, device)
        responses, num_columns = decode_responses(tokens, response_mask, tokenizer), response_mask.shape[1]
        clock.append(common.now(device))

        # 2. SCORE       tokens             -> scores (B,)
        scores = score_responses(reward, tokens, attention_mask, batch_rows, responses, cfg)
        final_scores = scores - cfg.missing_eos_penalty * (~ended).float()  # the score of a cut text judges no whole text

        # 3. EVALUATE    tokens             -> logprobs, ref_logprobs, values, entropy (B, R)
        logprobs, ref_logprobs, values, entropy = evaluate_tokens(
            policy, critic, ref_policy, tokens, attention_mask, num_columns, cfg
        )

        # 4. REWARDS     scores, logprobs   -> kl, rewards (B, R)                                            eq. 1
        kl = torch.where(response_mask, logprobs - ref_logprobs, 0.0)  # estimates KL(pi || pi_ref), see `kl` below
        rewards = kl_shaped_rewards(final_scores, kl, response_mask, kl_coef)
        clock.append(common.now(device))

        # 5. ADVANTAGES  rewards, values    -> advantages, returns, value_mask (B, R)                      eqs. 2-3
        advantages, returns, value_mask = estimate_advantages(
            cfg.advantage, rewards, values, response_mask, cfg.gamma, cfg.lam
        )

        # 6. UPDATE      batch of constants -> policy, critic; only new_* carries gradient                 eqs. 4-7
        whitened = whiten(advantages, response_mask)
        batch = Batch(tokens, attention_mask, response_mask, value_mask, logprobs, values, whitened, returns)
        steps, grad_norms = [], []
        for index in minibatches(cfg.batch_size, cfg.minibatch_size, cfg.ppo_epochs):
            optimizer.zero_grad()
            num_tokens, num_values = response_mask[index].sum(), value_mask[index].sum()  # each divided by once
            steps.append(torch.zeros(len(STATISTICS), device=device))
            for micro in map(batch.rows, index.split(cfg.microbatch_size)):  # same gradient at any size, less memory
                with common.arithmetic(device, cfg.dtype):
                    new_logprobs, new_values, new_entropy = forward_responses(
                        policy, critic, micro.tokens, micro.attention_mask, num_columns, cfg.temperature,
                        with_entropy=cfg.entropy_coef > 0,
                    )  # fmt: skip
                is_token, is_value = micro.response_mask, micro.value_mask  # x[is_token] is (N,): padding ends here
                losses, ratio = policy_loss(
                    new_logprobs[is_token], micro.logprobs[is_token], micro.advantages[is_token], cfg.clip_eps
                )
                value_losses = value_loss(
                    new_values[is_value], micro.values[is_value], micro.returns[is_value], value_clip_eps
                )
                loss = losses.sum() / num_tokens + cfg.value_coef * value_losses.sum() / num_values  # eq. 7
                if cfg.entropy_coef > 0:
                    loss = loss - cfg.entropy_coef * new_entropy[is_token].sum() / num_tokens
                loss.backward()
                steps[-1] += update_statistics(losses, value_losses, ratio, cfg.clip_eps, num_tokens, num_values)
            if cfg.target_kl is not None and steps[-1][STATISTICS.index("approx_kl")] > cfg.target_kl:
                break  # far enough from pi_old: the rest of the epochs would only fight the clip
            grad_norms.append([clip_grad_norm_(model.parameters(), cfg.max_grad_norm) for model in (policy, critic)])
            if torch.tensor(grad_norms[-1]).isfinite().all():
                optimizer.step()
        clock.append(common.now(device))

        # -- log, evaluate, save
        truths = call_reward(judge, batch_rows, responses) if judge else None
        lr_now = schedule.get_last_lr()[0]
        row = metrics_row(
            iteration, cfg, lr_now, kl_coef, scores, truths, kl, entropy, ended, batch, steps, grad_norms, clock
        )
        show_iteration(output, progress, row, history)
        history.append(row)
        if cfg.kl_target is not None:
            kl_coef = adapt_kl_coef(kl_coef, row["kl"], cfg.kl_target, cfg.batch_size, cfg.kl_horizon)  # eq. 8
        schedule.step()
        is_last = iteration == cfg.iterations
        if iteration % cfg.eval_every == 0 or is_last:
            results = evaluate(policy, ref_policy, reward, judge, eval_rows, tokenizer, cfg, device)
            after = log_evaluation(output, iteration, results, baseline)
        if cfg.explain and (iteration == 1 or iteration % cfg.eval_every == 0 or is_last):
            progress.write(explain_response(tokenizer, batch, ref_logprobs, rewards, advantages))
        if iteration % cfg.save_every == 0 or is_last:
            save_checkpoint(output, policy, critic, tokenizer, cfg)
    print_result(before, after, baseline, results, cfg)


if __name__ == "__main__":
    with common.command_line():
        main(common.parse_args(Config, __doc__.splitlines()[0]))
