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
(8)  adaptive    beta   <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * batch / horizon)

          In (2) and (3) V is the critic from before the update, V_old in (6).

          With --advantage bandit a response is one step, and gamma, lam and eps_v play no part:
(2b)      A       = sum_t r_t - V(x), for each of its tokens; ratio and clip stay per token
(6b)      L_value = mean (V(x) - sum_t r_t)^2, without the 1/2 of (6)

Shapes    B prompts, P prompt tokens (left-padded), R response tokens (right-padded), V vocabulary,
          S scorers (the reward models and functions of --reward). In a micro-batch: b rows, T
          columns, r of them of responses, and N tokens that count.
Time      Column t of every (B, R) tensor is about response token y_t:
          logprobs[:, t] = log pi_old(y_t | x, y_<t);  values[:, t] = V(x, y_<t), before y_t is
          chosen: a baseline must not know the action.
Mask      response_mask is True where a token counts: up to and including the first EOS.

Models    policy        starts at --policy               trained  writes the responses
          ref policy    a copy of it                     frozen   the KL is measured against it
          reward model  --reward, one or several, or     frozen   scores a finished text, once
                        functions; their sum counts
          critic        separate: starts at the reward   trained  predicts, from an unfinished text,
                        model; shared: a value head               the rewards still to come; a
                        on the policy's trunk                     reward model reads finished ones
          pi_old needs no model: it is the policy before the update; its log-probabilities are kept.

Differs   The score is paid at the last counted token; TRL pays it one slot later if there is one.
          One function computes all log-probabilities, old, new and reference, at the sampling
          temperature and with the softmax in float32. The sampler's own are not used: its cache and
          shapes alone can move a bf16 ratio by several per cent before anything has been learned.
          Each mean of (5) to (7) is a sum divided once, by the count of the whole minibatch.
          As in TRL, advantages are whitened over all tokens of the rollout and rewards are not.

Sources   Schulman et al. 2017 (PPO) and 2016 (GAE); Ziegler et al. 2019 (eqs. 1 and 8); Stiennon et
          al. 2020; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO". The last
          one's settings for 1 B parameters are a start for a model of that size: --lr 3e-6
          --critic-lr 3e-6 --kl-coef 0.05 --batch-size 512 --minibatch-size 512 --temperature 0.7
          --response-length 53, and 1,000,000 episodes.

Run       python ppo.py --policy ckpt/sft                                        embedded world
          python ppo.py --critic shared --advantage bandit --entropy-coef 0.01   simplest recipe
          python ppo.py --policy ckpt/sft --prompts mine.jsonl --reward mine.py:reward
          python ppo.py --policy ckpt/sft --reward ckpt/reward_model mine.py:length_penalty
Writes    ckpt/ppo: the policy as a Hugging Face folder, critic/, trainer_state/ (for --resume),
          args.json, metrics.jsonl, samples.jsonl
"""

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import random
import re
import sys
import traceback
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import set_seed

import common
from common import UserError, arg


# === 0. Configuration =============================================================================
# Three batch words: --batch-size prompts are answered at once in each iteration, --minibatch-size
# of the responses make an optimizer step, and scoring and update hold --microbatch-size of them at
# a time. So an iteration takes ppo_epochs * batch_size / minibatch_size optimizer steps.
@dataclass(frozen=True)
class Config:
    policy: str = arg("ckpt/sft", "causal LM to train, and the reference", "models and data")
    reward: list[str] = arg(["ckpt/reward_model"], "models or file.py:function; several are summed")
    judge: str | None = arg(None, "file.py:function, the true reward; reported, not trained on")
    prompts: list[str] = arg([str(common.DATA / "prompts.jsonl")], "JSONL rows with a prompt")
    eval_prompts: list[str] | None = arg(None, "held-out prompts; else up to 128 of --prompts")
    output: str = arg("ckpt/ppo", "folder for the policy, the critic and the logs")

    iterations: int = arg(30, "rollouts, each followed by an update", "rollout")
    batch_size: int = arg(128, "prompts per iteration")
    max_prompt_length: int = arg(512, "in tokens; longer prompts are dropped and counted")
    response_length: int = arg(64, "in tokens; a response not ended by then is cut and penalised")
    temperature: float = arg(1.0, "of sampling and of all log-probabilities; 0.7 to 1")

    # beta trades score for distance from the reference. If the score rises and the texts get worse,
    # the reward model is over-optimised: raise beta or stop earlier, and look at a judge, the KL,
    # lengths and repetition rather than at the score.
    kl_coef: float = arg(0.15, "beta of eq. 1; 0.02 to 0.2, and 0 invites reward hacking", "reward")
    kl_target: float | None = arg(None, "adapt beta to hold the KL here, in nats (eq. 8); 3 to 10")
    kl_horizon: int = arg(300, "horizon of eq. 8, in episodes; 10,000 for a million of them")
    missing_eos_penalty: float = arg(1.0, "off the score of a response without EOS; 0 to 2")

    # gamma 1: a response is finite, and no part of it is worth more for coming sooner. lam trades
    # the critic's bias (0: believe V one token on) for the return's variance (1: ignore V after t).
    advantage: Literal["gae", "bandit"] = arg("gae", "per token, or one per response", "advantage")
    gamma: float = arg(1.0, "discount per token of eq. 2; 1")
    lam: float = arg(0.95, "lambda of eq. 2; 0.9 to 1")
    critic: Literal["separate", "shared"] = arg("separate", "a model, or a head on the policy")

    ppo_epochs: int = arg(4, "passes over each rollout, each in a new order; 1 to 4", "update")
    minibatch_size: int = arg(32, "sequences per optimizer step")
    microbatch_size: int = arg(32, "sequences per scoring or update pass; memory and speed")
    clip_eps: float = arg(0.2, "epsilon of eq. 5; 0.1 to 0.3")
    value_clip_eps: float = arg(0.2, "eps_v of eq. 6, in units of reward; 0.2 for deviation 1")
    value_coef: float = arg(0.1, "c1 of eq. 7; Adam all but undoes it for a separate critic")
    entropy_coef: float = arg(0.0, "c2 of eq. 7; 0 to 0.01")
    target_kl: float | None = arg(None, "end an update when approx_kl is above this; 0.01 to 0.05")
    lr: float | None = arg(None, "of the policy, falls linearly; else by size, see LR_BY_SIZE")
    critic_lr: float | None = arg(None, "of the critic, falls linearly; else by size")
    max_grad_norm: float = arg(1.0, "clip the gradient of policy and of critic to this norm")

    eval_every: int = arg(10, "iterations between evaluations on held-out prompts", "run")
    save_every: int = arg(10, "iterations between checkpoints")
    resume: bool = arg(False, "go on with the run in --output, if there is one")
    overwrite: bool = arg(False, "start anew although --output holds a run")
    seed: int = arg(0, "of samples and data order")
    device: str = arg("auto", "cpu, cuda, cuda:1; auto is a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "of matrix products; bf16 on CUDA")
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, more time")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = arg("auto", "of all models")
    compile: bool = arg(False, "torch.compile the models; minutes to start, then faster")
    explain: bool = arg(False, "print a response token by token, at evaluations")
    tensorboard: bool = arg(False, "write the metrics for TensorBoard too, if it is installed")
    trust_remote_code: bool = arg(False, "run code that comes with --policy or --reward")


# Learning rates by number of parameters. What suits a tiny model ruins a large one within an
# iteration, so there is no one default; the start-up report prints the one in use.
LR_BY_SIZE = ((10e6, 3e-4), (1e9, 1e-5), (math.inf, 3e-6))  # (parameters below, learning rate)


# What --resume may be given anew; --iterations changes the learning rates still to come.
MAY_CHANGE = (*common.MAY_CHANGE, "iterations", "eval_every", "explain", "attention", "compile")
# Where memory may run out: {function: (what it does, the flag to halve)}
MEMORY_FLAGS = {
    "main": ("the update", "--microbatch-size"),
    "sample_responses": ("sampling", "--batch-size"),
    "score_responses": ("scoring", "--microbatch-size"),
    "evaluate_tokens": ("the log-probabilities", "--microbatch-size"),
    "estimate_memory": ("a trial of three rows", "--response-length"),
    "rehearse": ("a trial of the update", "--microbatch-size"),
}


def check_config(cfg):
    """Every rule about the flags that needs no model."""
    many, not_negative, share = (1, math.inf), (0, 1e9), (0, 1)
    common.check_range(
        cfg, iterations=many, batch_size=many, max_prompt_length=many, response_length=many,
        temperature=(0.01, 100), kl_coef=not_negative, kl_target=(1e-6, 1e9),
        kl_horizon=(cfg.batch_size if cfg.kl_target else 1, math.inf),
        missing_eos_penalty=not_negative, gamma=share, lam=share, ppo_epochs=many,
        minibatch_size=many, microbatch_size=many,
        clip_eps=share, value_clip_eps=(0, math.inf), value_coef=not_negative,
        entropy_coef=not_negative, target_kl=not_negative, lr=share, critic_lr=share,
        max_grad_norm=(1e-9, math.inf), eval_every=many, save_every=many,
    )
    if cfg.tensorboard:
        common.import_tensorboard()
    if cfg.kl_target is not None and cfg.kl_coef == 0:
        raise UserError("--kl-target scales beta, so it needs a --kl-coef above 0 to start from")
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
    judge = cfg.judge or f"{common.DATA / 'true_reward.py'}:true_reward"
    eval_prompts = cfg.eval_prompts or [str(common.DATA / "heldout_prompts.jsonl")]
    return dataclasses.replace(cfg, judge=judge, eval_prompts=eval_prompts)


# === 1. Rollout: x ~ prompts, y ~ pi_old(. | x) ===================================================
# FORK: other prompt data become rows with a "prompt" here.
def load_prompts(paths, tokenizer, cfg, source):
    """The rows of prompt files that fit, each with its token ids as the attribute prompt_ids."""

    def convert(row):
        row.prompt_ids, _ = common.encode(tokenizer, row["prompt"])
        reason = common.too_long(cfg, row.prompt_ids) if row.prompt_ids else "empty"
        yield reason or row

    return common.convert_rows(common.read_rows(paths, [("prompt",)]), convert, source)


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


def sample_responses(policy, rows, cfg, device, to_the_full=False):
    """One response per row, plainly sampled: no top-k, no top-p, nothing stored with the model.

    Returns:
        tokens (B, P+R) int64, attention_mask (B, P+R) bool, response_mask (B, R) bool, and ended
        (B,) bool, True where an EOS came.
    """
    settings = policy.generation_config
    # Padded on the left, all prompts end in column P - 1 and all responses start in column P.
    prompts = common.pad([row.prompt_ids for row in rows], settings.pad_token_id, "left")
    prompts, prompt_mask = (x.to(device) for x in prompts)  # (B, P)
    with common.arithmetic(device, cfg.dtype):
        response = common.generate_responses(
            policy, prompts, prompt_mask, cfg.response_length, cfg.temperature, to_the_full,
            compiled=cfg.compile and device.type == "cuda",
        )  # (B, R), pad after an EOS; R is the longest response, at most --response-length
    response_mask = mask_through_first_eos(response, settings.eos_token_id)
    ended = torch.isin(response, torch.tensor(settings.eos_token_id, device=device)).any(1)
    attention_mask = torch.cat([prompt_mask, response_mask], 1)  # (B, P+R)
    return torch.cat([prompts, response], 1), attention_mask, response_mask, ended


def decode_responses(tokens, response_mask, tokenizer):
    """The texts of the responses, without special tokens."""
    response = tokens[:, -response_mask.shape[1] :]
    counted = [ids[mask] for ids, mask in zip(response.cpu(), response_mask.cpu())]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in counted]


# === 2. Score: one number per response ============================================================
def load_function(spec):
    """The function that "file.py:function" names. It is the user's own code and is run as it is."""
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        raise UserError(f"{spec} names no function: no file {path!r}; give file.py:function")
    name_here = f"user_{len(sys.modules)}_{pathlib.Path(path).stem}"  # it may be called math.py
    module_spec = importlib.util.spec_from_file_location(name_here, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look it up there
    sys.path.append(str(pathlib.Path(path).resolve().parent))  # it may import its neighbours
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{spec}: {path} fails: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {path} has no function {name}")
    return getattr(module, name)


# FORK: a reward of your own is one function(prompts, responses, rows) -> a float per response.
# A prompt is what the row holds, a string or a chat; a response is a string.
def call_reward(function, rows, responses):
    """Scores (B,) float32 from a Python function, checked to be one finite number per response."""
    name = getattr(function, "__name__", "the reward function") + "()"
    try:
        its_rows = copy.deepcopy(rows)  # what it does to them stays its own
        scores = function([row["prompt"] for row in its_rows], list(responses), its_rows)
        scores = scores if isinstance(scores, (str, dict, set)) else list(scores)
    except (Exception, SystemExit) as error:
        if common.is_out_of_memory(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({place.filename} line {place.lineno})"
        reason += "; it is called as function(prompts, responses, rows)"
        raise UserError(f"{name} failed: {reason}") from error
    if not isinstance(scores, list):
        raise UserError(f"{name} returned a {type(scores).__name__}, not a list of numbers")
    if len(scores) != len(rows):
        raise UserError(f"{name} returned {len(scores)} scores for {len(rows)} responses")
    for score, row, response in zip(scores, rows, responses):
        try:
            is_number = not isinstance(score, str) and torch.tensor(float(score)).isfinite()
        except Exception:  # whatever its __float__ raises
            is_number = False
        if not is_number:
            raise UserError(
                f"{name} returned {score!r}, not a finite number, for prompt {row['prompt']!r} and "
                f"response {response!r}"
            )
    return torch.tensor([float(score) for score in scores])


class TextScorer:
    """A reward model that reads other tokens than the policy writes: it is asked about texts.

    Each text is encoded as this model expects it. One that reward_model.py made reads what it was
    trained on, the ids of `common.encode`. Another reads the text whole by its chat template if it
    has one (a prompt that is no chat becomes the user's message), a pair of texts if it is an
    encoder, else prompt, response and EOS. Texts do not show whether a response ended, so a cut one
    is read as ended; --missing-eos-penalty makes up for it.
    """

    def __init__(self, classifier, tokenizer, cfg, device):
        self.classifier, self.tokenizer = classifier, tokenizer
        self.cfg, self.device = cfg, device
        self.is_ours = hasattr(classifier.config, "reward_mean")  # reward_model.py made it
        self.eos_ids = common.eos_token_ids(tokenizer, classifier)

    def encode(self, prompt, response):
        """The model's inputs for one prompt and response: lists under "input_ids" and so on."""
        if self.is_ours:
            response = response if isinstance(prompt, str) else response.strip()
            ids = common.encode(self.tokenizer, prompt, response, self.eos_ids)
            return {"input_ids": sum(ids, [])}
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chat = [*chat, {"role": "assistant", "content": response.strip()}]
            text = common.render_chat(self.tokenizer, chat)
            return dict(self.tokenizer(text, add_special_tokens=False))
        if isinstance(prompt, str) and not common.has_token_head(self.classifier):
            return dict(self.tokenizer(prompt, response.strip()))
        prompt_ids, response_ids = common.encode(self.tokenizer, prompt, response)
        return {"input_ids": prompt_ids + response_ids}

    @torch.no_grad()
    def __call__(self, prompts, responses):
        """Scores (B,) float32, normalised."""
        try:
            inputs = [self.encode(*texts) for texts in zip(prompts, responses)]
        except ValueError as error:
            where = self.tokenizer.name_or_path
            raise UserError(f"{where} can't read the prompts: a row {error}") from error
        longest = max(len(each["input_ids"]) for each in inputs)
        common.check_context(self.classifier, longest, "--max-prompt-length or --response-length")
        scores, (mean, deviation) = [], common.score_scale(self.classifier.config)
        for start in range(0, len(inputs), self.cfg.microbatch_size):
            some = inputs[start : start + self.cfg.microbatch_size]
            padded = self.tokenizer.pad(some, padding_side="right", return_tensors="pt")
            try:
                with common.arithmetic(self.device, self.cfg.dtype):
                    logits = self.classifier(**padded.to(self.device)).logits  # (b, 1)
            except (IndexError, ValueError, RuntimeError) as error:
                if common.is_out_of_memory(error):  # others: RoBERTa has fewer positions than its
                    raise  # config says, BART wants an EOS, DeBERTa can't do bf16
                where, reason = self.tokenizer.name_or_path, str(error).splitlines()[0]
                raise UserError(f"{where} can't read {longest} tokens: {reason}") from error
            scores.append(logits[:, 0].float())
        return (torch.cat(scores) - mean) / deviation


def parts_by_length(attention_mask, index, size):
    """Parts of up to `size` rows, each with the columns that it needs.

    Yields:
        rows: indices (b,), all of `index` in order of length, prompt and response together.
        columns: the slice of the P+R columns from the first attended one to the last.

    What is left out is padding, which no result depends on; what stays is the longest prompt of the
    part beside its longest response. A part without padding spares attention its mask (not under
    --compile), and so gets the fastest kernel.
    """
    index = index.to(attention_mask.device)
    by_length = attention_mask[index].sum(1).argsort(stable=True)
    for rows in index[by_length].split(size):
        first, last = attention_mask[rows].any(0).nonzero()[[0, -1], 0].tolist()
        yield rows, slice(first, last + 1)


def score_tokens(reward_model, tokens, attention_mask, cfg):
    """Normalised scores (B,) float32, read at each row's last attended token."""
    scores = torch.zeros(len(tokens), device=tokens.device)
    everything = torch.arange(len(tokens))
    for rows, columns in parts_by_length(attention_mask, everything, cfg.microbatch_size):
        micro_tokens, micro_mask = tokens[rows, columns], attention_mask[rows, columns]  # (b, T)
        last_index = common.last_token_index(micro_mask)[:, None]  # (b, 1)
        with common.arithmetic(tokens.device, cfg.dtype):
            token_scores = common.token_scores(reward_model, micro_tokens, micro_mask)  # (b, T)
        scores[rows] = token_scores.gather(1, last_index).squeeze(1)
    return scores


@torch.no_grad()
def score_responses(scorers, tokens, attention_mask, rows, responses, cfg):
    """What each of the S scorers, usually one, says of each response: (S, B) float32.

    A function's value counts as it is, a reward model's is normalised. A reward model reads prompt
    and response as the policy wrote them, token by token, and is asked at the last attended
    token, the EOS if there is one. One with other tokens is asked about the texts.
    """
    parts = []
    for scorer in scorers:
        if isinstance(scorer, TextScorer):
            parts.append(scorer([row["prompt"] for row in rows], responses))
        elif isinstance(scorer, torch.nn.Module):
            parts.append(score_tokens(scorer, tokens, attention_mask, cfg))
        else:
            parts.append(call_reward(scorer, rows, responses).to(tokens.device))
        if not parts[-1].isfinite().all():
            raise UserError("a score is not finite; look at --reward, its model and --dtype")
    return torch.stack(parts)


# === 3. Evaluate: log pi_old, log pi_ref and V_old at every response token ========================
def token_logprobs(logits, tokens, temperature, with_entropy):
    """Log-probabilities of tokens (b, R) and entropies, from logits (b, R, V): (b, R) float32 each.

    The sampler divided the logits by the temperature, so every log-probability does, the
    reference's too: the policy that is optimised is the tempered one, and its KL starts at 0.
    """
    logits = logits.float() / temperature
    normalizer = logits.logsumexp(-1)
    logprobs = logits.gather(-1, tokens[..., None]).squeeze(-1) - normalizer
    if not with_entropy:
        return logprobs, torch.zeros_like(logprobs)
    return logprobs, normalizer - (logits.softmax(-1) * logits).sum(-1)


def forward_responses(
    policy, critic, tokens, attention_mask, num_columns, temperature, with_entropy=False
):
    """The one function that turns tokens into log-probabilities: of old, new and reference policy.

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
    shared = isinstance(critic, torch.nn.Linear)
    # The last token predicts nothing that counts: left out, what is left are the R positions.
    inputs, attention_mask = tokens[:, :-1], attention_mask[:, :-1]  # (B, P+R-1)
    output = policy(
        input_ids=inputs, attention_mask=attention_mask, use_cache=False,
        position_ids=common.position_ids(attention_mask),
        logits_to_keep=num_columns, output_hidden_states=shared,
    )
    # Two rows at a time, and what backward needs of them is computed again there (checkpoint): of
    # tensors as wide as the vocabulary only the logits and their gradient are ever whole.
    pieces = zip(output.logits.split(2), tokens[:, -num_columns:].split(2))
    parts = [
        checkpoint(
            token_logprobs, *piece, temperature, with_entropy, use_reentrant=False,
            preserve_rng_state=False,
        )
        for piece in pieces
    ]
    logprobs, entropy = (torch.cat(part) for part in zip(*parts))
    values = torch.zeros_like(logprobs)
    if shared:
        hidden = output.hidden_states[-1][:, -num_columns:]  # (B, R, width)
        with torch.autocast(tokens.device.type, enabled=False):  # as the separate critic's head
            values = critic(hidden.float()).squeeze(-1)
    elif critic is not None:
        values = common.token_scores(critic, inputs, attention_mask)[:, -num_columns:]
    return logprobs, values, entropy


@torch.no_grad()
def evaluate_tokens(policy, critic, ref_policy, tokens, attention_mask, num_columns, cfg):
    """logprobs, ref_logprobs, values, entropy of a whole rollout, each (B, R) float32.

    The old log-probabilities are computed here although the sampler had some: they must come from
    the function that the update uses, or the first ratio is not 1. What is left of a difference is
    rounding, which may depend on the shapes that a row is computed in: see `approx_kl_first`. In an
    evaluation there is no critic, and no entropy.
    """
    results = torch.zeros(4, len(tokens), num_columns, device=tokens.device)
    everything, prompt_length = torch.arange(len(tokens)), tokens.shape[1] - num_columns
    for rows, columns in parts_by_length(attention_mask, everything, cfg.microbatch_size):
        width = columns.stop - prompt_length
        inputs = tokens[rows, columns], attention_mask[rows, columns], width, cfg.temperature
        with common.arithmetic(tokens.device, cfg.dtype):
            logprobs, values, entropy = forward_responses(
                policy, critic, *inputs, with_entropy=critic is not None
            )
            ref_logprobs, _, _ = forward_responses(ref_policy, None, *inputs)
        results[:, rows, :width] = torch.stack([logprobs, ref_logprobs, values, entropy])
    return results.unbind()


# === 4. Rewards: eqs. 1 and 8 =====================================================================
def kl_shaped_rewards(scores, kl, response_mask, kl_coef):
    """Eq. 1: what each token is paid, (B, R), 0 at padding.

    Args:
        scores: (B,), one per response.
        kl: (B, R), log pi_old(y_t) - log pi_ref(y_t). Its mean over the policy's own samples is the
            KL; the exact sum over the vocabulary would need both whole distributions.

    The reward model judges the finished text, so its whole score arrives at the last counted token;
    every token pays for its own distance from the reference. Advantages carry both back in time.
    In the reward, and not in the loss, the KL is credited to the tokens that lead to it.
    """
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)  # eq. 1, left
    last_index = response_mask.sum(1, keepdim=True) - 1  # (B, 1): the EOS, or the cut
    return rewards.scatter_add(1, last_index, scores[:, None])  # eq. 1, right


def adapt_kl_coef(kl_coef, kl, kl_target, batch_size, kl_horizon):
    """Eq. 8: raise beta while the KL is above its target, else lower it; None leaves it.

    Ziegler et al. 2019, whose paper has a constant 0.1 where their code has batch / horizon.
    """
    if kl_target is None:
        return kl_coef
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * batch_size / kl_horizon)  # eq. 8


# === 5. Advantages: eqs. 2-3 ======================================================================
# FORK: another advantage estimator is one more function like these two.
def gae(rewards, values, response_mask, gamma, lam):
    """Advantages and returns of every token, eqs. 2 and 3 (Schulman et al. 2016), each (B, R).

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
    return advantages, advantages + values  # eq. 3


def one_step(rewards, values, response_mask):
    """Advantages and returns where the whole response is one action, eq. 2b, each (B, R).

    One baseline V(x), the value before the first token, serves the whole text, and every token gets
    the same advantage. GAE with gamma = lam = 1 is its cousin: the return from t on, minus V_t.
    """
    returns = torch.where(response_mask, rewards, 0.0).sum(1, keepdim=True)  # (B, 1)
    advantages = returns - values[:, :1]  # eq. 2b
    return torch.where(response_mask, advantages, 0.0), torch.where(response_mask, returns, 0.0)


def estimate_advantages(advantage, rewards, values, response_mask, gamma, lam):
    """Advantages, returns and value_mask (True where the critic is trained), each (B, R)."""
    if advantage == "gae":
        return *gae(rewards, values, response_mask, gamma, lam), response_mask
    is_first = torch.zeros_like(response_mask)
    is_first[:, 0] = True  # only V(x) is used, so only V(x) is trained
    return *one_step(rewards, values, response_mask), is_first


def whiten(x, mask):
    """x with mean 0 and (population) deviation 1 over the True positions; 0 elsewhere.

    It fixes the scale of the policy loss against value loss, entropy and gradient clip, and keeps a
    critic that is wrong by a constant from pushing all tokens one way. Over the whole rollout, as
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
    values: torch.Tensor  # (B, R) float32          V_old(x, y_<t)
    advantages: torch.Tensor  # (B, R) float32      whitened
    returns: torch.Tensor  # (B, R) float32         from before whitening

    def __post_init__(self):
        for name, x in vars(self).items():  # the table above, checked
            wide = name in ("tokens", "attention_mask")
            shape = (self.tokens if wide else self.response_mask).shape
            dtype = torch.bool if "mask" in name else torch.int64 if wide else torch.float32
            assert x.shape == shape and x.dtype == dtype, (name, x.shape, x.dtype)

    def micro_batches(self, index, size):
        """The rows of a minibatch as Batches of up to `size`, without what is padding in each."""
        prompt_length = self.tokens.shape[1] - self.response_mask.shape[1]
        for rows, columns in parts_by_length(self.attention_mask, index, size):
            of_response = slice(columns.stop - prompt_length)
            wide = {"tokens": columns, "attention_mask": columns}
            yield Batch(**{
                name: x[rows, wide.get(name, of_response)] for name, x in vars(self).items()
            })


def minibatches(batch_size, minibatch_size, epochs):
    """The row indices of every optimizer step of an update; each epoch in an order of its own."""
    for _ in range(epochs):
        yield from torch.randperm(batch_size).split(minibatch_size)


# FORK: another policy loss goes here.
def policy_loss(new_logprobs, logprobs, advantages, clip_eps):
    """Loss and ratio of each token, eqs. 4 and 5, in the shape of the inputs.

    In the first minibatch every ratio is 1 and the loss is -A, near 0 on average over whitened
    advantages, yet it has a gradient: d ratio = ratio * d log pi, so that step is REINFORCE.
    Where the ratio is clipped and A pushes further out, the minimum is constant: gradient 0.
    """
    ratio = torch.exp(new_logprobs - logprobs)  # eq. 4
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages), ratio  # eq. 5


def value_loss(new_values, values, returns, value_clip_eps):
    """Loss of each value, eq. 6: the worse of the plain and the clipped error. None: eq. 6b.

    Where V has moved more than eps_v and is nearer to the target than V_old +- eps_v is, the
    clipped error is the larger and the gradient 0; moving away from the target is never clipped. It
    mirrors eq. 5: no update trusts one rollout too far.
    """
    if value_clip_eps is None:
        return (new_values - returns) ** 2  # eq. 6b
    clipped = values + (new_values - values).clamp(-value_clip_eps, value_clip_eps)
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)  # eq. 6


def total_loss(
    policy_losses, value_losses, entropy, num_tokens, num_values, value_coef, entropy_coef
):
    """Eq. 7, a scalar: sums over what is given, divided by the counts of the whole minibatch.

    The policy's mean is over tokens, the critic's over the positions where it is trained. Dividing
    a micro-batch's sums by the minibatch's counts makes the gradients of its micro-batches add up
    to the minibatch's own, whatever their sizes.
    """
    policy_term = (policy_losses - entropy_coef * entropy).sum() / num_tokens
    return policy_term + value_coef * value_losses.sum() / num_values  # eq. 7


STATISTICS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio")
APPROX_KL, RATIO = STATISTICS.index("approx_kl"), STATISTICS.index("ratio")


@torch.no_grad()
def update_statistics(policy_losses, value_losses, ratio, clip_eps, num_tokens, num_values):
    """A micro-batch's share of the optimizer step's means, in the order of STATISTICS, (5,).

    approx_kl estimates KL(pi_old || pi) by rho - 1 - log rho, never negative (Schulman 2020,
    "Approximating KL divergence"). It says how far one update went; `kl` how far the whole run did.
    clip_fraction counts all ratios outside 1 +- eps, also those whose gradient is not 0.
    """
    approx_kl = ratio - 1 - ratio.log()
    is_clipped = ((ratio - 1).abs() > clip_eps).float()
    per_token = torch.stack([policy_losses, approx_kl, is_clipped, ratio]).sum(1) / num_tokens
    return torch.cat([per_token[:1], value_losses.sum()[None] / num_values, per_token[1:]])


# === 7. Held-out evaluation (not part of the algorithm) ===========================================
@torch.no_grad()
def evaluate(policy, ref_policy, scorers, judge, rows, tokenizer, cfg, device):
    """One response to each held-out prompt, from the same random numbers at every call.

    Returns:
        A dict per row: "prompt", "response", "score", "true_reward" (None without a judge), "kl".
    """
    samples = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(cfg.seed)
        for start in range(0, len(rows), cfg.batch_size):
            some = rows[start : start + cfg.batch_size]
            tokens, attention_mask, response_mask, _ = sample_responses(policy, some, cfg, device)
            responses = decode_responses(tokens, response_mask, tokenizer)
            parts = score_responses(scorers, tokens, attention_mask, some, responses, cfg)
            scores = parts.sum(0)
            truths = call_reward(judge, some, responses).tolist() if judge else [None] * len(some)
            logprobs, ref_logprobs, _, _ = evaluate_tokens(
                policy, None, ref_policy, tokens, attention_mask, response_mask.shape[1], cfg
            )
            kl = torch.where(response_mask, logprobs - ref_logprobs, 0.0).sum(1)
            columns = responses, scores.tolist(), truths, kl.tolist()
            for row, *values in zip(some, *columns):
                names = ("response", "score", "true_reward", "kl")
                samples.append({"prompt": row["prompt"]} | dict(zip(names, values)))
    return samples


def summarize(samples, baseline):
    """Means, and the share of prompts won against the SFT policy's samples, ties counting half.

    A win is a higher true reward if there is a judge, else a higher score.
    """
    judged = samples[0]["true_reward"] is not None
    key = "true_reward" if judged else "score"
    pairs = [(sample[key], old[key]) for sample, old in zip(samples, baseline)]
    mean = lambda name: sum(sample[name] for sample in samples) / len(samples)
    return {
        "score": mean("score"),
        "true_reward": mean("true_reward") if judged else None,
        "kl": mean("kl"),
        "win_rate": sum((new > old) + 0.5 * (new == old) for new, old in pairs) / len(pairs),
    }


# === 8. What the user sees (not part of the algorithm) ============================================
def metrics_row(
    iteration, cfg, schedule, kl_coef, parts, truths, kl, entropy, ended, batch, steps,
    grad_norms, clock,
):
    """The iteration's row of metrics.jsonl; the comments say what is healthy."""
    mask, value_mask, scores = batch.response_mask, batch.value_mask, parts.sum(0)
    update = dict(zip(STATISTICS, torch.stack(steps).mean(0).tolist()))
    error, returns = (batch.returns - batch.values)[value_mask], batch.returns[value_mask]
    unexplained = (error.var(correction=0) / returns.var(correction=0)).item()
    policy_norm, critic_norm = torch.tensor(grad_norms).mean(0).tolist()
    rollout, score, optimize = (end - begin for begin, end in zip(clock, clock[1:]))
    peak = common.peak_memory(mask.device)
    return {
        "iteration": iteration,
        "episodes": iteration * cfg.batch_size,
        "score": scores.mean().item(),  # before the EOS penalty; rises
        "score_parts": parts.mean(1).tolist(),  # of each --reward, in their order
        "score_std": scores.std(correction=0).item(),  # shrinks; near 0 nothing is left to learn
        "true_reward": None if truths is None else truths.mean().item(),  # falls when hacked
        "kl": kl.sum(1).mean().item(),  # 0, then up to about 10; below 0 only by chance
        "kl_k3": (torch.exp(-kl) - 1 + kl).sum(1).mean().item(),  # estimates kl too, never below 0
        "kl_coef": kl_coef,
        "entropy": entropy[mask].mean().item(),  # falls slowly; near 0 there is one answer to all
        "response_length": mask.sum(1).float().mean().item(),  # no sudden trend
        "eos_rate": ended.float().mean().item(),  # near 1
        "policy_loss": update["policy_loss"],  # slightly below 0
        "value_loss": update["value_loss"],  # falls
        "approx_kl": update["approx_kl"],  # 0.001 to 0.05
        "clip_fraction": update["clip_fraction"],  # 0.01 to 0.2
        "ratio_first": steps[0][RATIO].item(),  # 1 up to rounding
        "approx_kl_first": steps[0][APPROX_KL].item(),  # 0 up to rounding; a mean ratio hides noise
        "explained_variance": 1 - unexplained,  # below 0 at first, then up
        "optimizer_steps": len(steps),  # skipped ones too; with --target-kl, the last not taken
        "skipped_steps": sum(not math.isfinite(sum(norms)) for norms in grad_norms),  # 0
        "grad_norm": policy_norm,  # before clipping; steady
        "critic_grad_norm": critic_norm,  # before clipping; steady
        "lr": schedule.get_last_lr()[0],  # the policy's
        "seconds_rollout": rollout,
        "seconds_score": score,  # the reward, and step 3's log-probabilities and values
        "seconds_update": optimize,
        "tokens_per_second": mask.sum().item() / (clock[-1] - clock[0]),  # of responses, all phases
        "peak_memory_gb": peak and peak / 1e9,  # so far; tensors on CUDA, else the whole process
    }


def health_warnings(history):
    """What looks wrong in the last of the metrics rows: {symptom: message}."""
    row = history[-1]
    unexplained = sum((old["explained_variance"] or 0) < -0.05 for old in history[-10:]) == 10
    norms = row["grad_norm"] + row["critic_grad_norm"]
    rules = (  # name, is it seen, symptom, usual causes
        ("ratio", row["approx_kl_first"] > 1e-3 or abs(row["ratio_first"] - 1) > 1e-2,
         f"the first ratios are not 1 (approx_kl {row['approx_kl_first']:.2g})",
         "dropout on; rounding: is it gone with --dtype float32?"),
        ("eos", row["eos_rate"] < 0.5, f"only {row['eos_rate']:.0%} of the responses end",
         "--response-length too short; SFT without EOS; another EOS id"),
        ("length", row["response_length"] < 5, f"{row['response_length']:.1f} tokens per response",
         "a reward that favours short texts; prompts that end in EOS; --kl-coef too small"),
        ("score", row["score_std"] < 0.01, f"score deviation {row['score_std']:.2g}",
         "one answer to every prompt; a constant reward; an untrained reward head"),
        ("far", row["kl"] > 50, f"KL {row['kl']:.0f} nats per response",
         "--kl-coef too small; --lr too high; if the score still rises, reward hacking"),
        ("negative", row["kl"] < -0.1 - 0.2 * row["kl_k3"], f"KL {row['kl']:.2f}, negative",
         "text from another distribution than the one scored: a sampling setting, a second EOS"),
        ("critic", unexplained, "explained variance below 0 for 10 iterations",
         "--critic-lr too high or too low; a reward that is noise given the prompt"),
        ("gradient", not math.isfinite(norms), "a gradient was not finite, its step was skipped",
         "--lr too high; rewards of enormous size"),
    )
    return {name: f"{what}. Usual causes: {causes}" for name, seen, what, causes in rules if seen}


def recent(history):
    """The last iterations in words, for when the run has to stop."""
    keys = ("iteration", "score", "kl", "policy_loss", "grad_norm")
    rows = [", ".join(f"{key} {row[key]}" for key in keys) for row in history[-3:]]
    return "after " + ("; ".join(rows) or "no iteration")


def show_iteration(log, progress, history, told):
    """Log the last row, put it on the bar, and tell of each symptom once; `told` has the told."""
    row = history[-1]
    log(row)
    shown = {"score": "score", "true": "true_reward", "kl": "kl", "length": "response_length"}
    shown = {short: f"{row[key]:.2f}" for short, key in shown.items() if row[key] is not None}
    progress.set_postfix(shown)
    for name, message in health_warnings(history).items():
        if name not in told:
            progress.write(f"warning, iteration {row['iteration']}: {message}")
            told.add(name)


def explain_response(tokenizer, batch, ref_logprobs, rewards, advantages, row=0):
    """One response as a table: the score lands on the last token, the advantages carry it back."""
    lines = [
        f"\n{'t':>3} {'token':<14}{'log pi':>9}{'log pi_0':>9}{'KL':>9}{'V':>9}{'reward':>9}"
        f"{'advant.':>9}{'return':>9}"
    ]
    response = batch.tokens[row, -batch.response_mask.shape[1] :]
    kl = batch.logprobs - ref_logprobs
    columns = batch.logprobs, ref_logprobs, kl, batch.values, rewards, advantages, batch.returns
    for t in range(int(batch.response_mask[row].sum())):
        token = tokenizer.decode([response[t].item()])[:13]
        numbers = "".join(f"{column[row, t].item():>9.3f}" for column in columns)
        lines.append(f"{t:>3} {token!r:<14}{numbers}")
    return "\n".join([*lines, "    (advantages are shown before whitening)"])


def print_report(cfg, models, lrs, tokenizer, rows, eval_rows):
    """What will run: the models, the batch arithmetic, the learning rates, the special tokens."""
    policy, ref_policy, critic, scorers = models
    print(common.describe("policy", policy, True))
    print(common.describe("ref policy", ref_policy, False))
    print(common.describe("critic", critic, True))
    for scorer, spec in zip(scorers, cfg.reward):
        model = getattr(scorer, "classifier", scorer)
        is_model = isinstance(model, torch.nn.Module)
        print(common.describe("reward", model, False) if is_model else f"  {'reward':<14}{spec}")
        if isinstance(scorer, TextScorer):
            print(f"  {'':<14}{spec} reads texts: responses are decoded and encoded for it")
    if cfg.critic == "separate" and not any(isinstance(s, torch.nn.Module) for s in scorers):
        print(f"  {'':<14}the critic starts from the policy, with a head of zeros")
    num_minibatches = cfg.batch_size // cfg.minibatch_size
    num_micro = math.ceil(cfg.minibatch_size / cfg.microbatch_size)
    print(
        f"  {cfg.iterations} iterations x {cfg.batch_size} prompts = "
        f"{cfg.iterations * cfg.batch_size} episodes, from {len(rows)} prompts; "
        f"{len(eval_rows)} held out; judge: {cfg.judge or 'none'}\n"
        f"  {cfg.ppo_epochs} epochs x {num_minibatches} minibatches of {cfg.minibatch_size} = "
        f"{cfg.ppo_epochs * num_minibatches} optimizer steps per iteration, each in {num_micro} "
        f"micro-batches of up to {cfg.microbatch_size}\n"
        f"  lr {lrs[0]:g}, critic lr {lrs[1]:g} (by model size, unless --lr, --critic-lr are given)"
    )
    common.print_tokens(tokenizer, policy, rows[0].prompt_ids)


def print_result(before, after, baseline, samples, output):
    """The table, samples side by side, and the lines that load the policy."""
    print(f"\n{'held-out prompts':<18}{'SFT':>9}{'PPO':>9}")
    for key in before:
        if before[key] is not None:
            print(f"{key:<18}{before[key]:>9.3f}{after[key]:>9.3f}")
    for old, new in list(zip(baseline, samples))[:3]:
        print(f"\n  {common.shown(new['prompt'])}")
        for name, sample in (("SFT", old), ("PPO", new)):
            truth = sample["true_reward"]
            truth = "" if truth is None else f", true {truth:.2f}"
            print(f"    {name} (score {sample['score']:.2f}{truth}):{sample['response']}")
    prompt = samples[0]["prompt"]
    prompt = prompt[:66] if isinstance(prompt, str) else [prompt[-1]]
    print(f'''
wrote {output}, an ordinary Hugging Face folder; to load and try it:
    from transformers import pipeline
    generate = pipeline("text-generation", "{output}")
    print(generate({json.dumps(prompt)}, max_new_tokens=64))''')


KEPT = ("iterations_done", "kl_coef", "baseline")  # in trainer_state, to go on with


def read_history(output):
    """The rows of the iterations so far."""
    rows = common.read_json_lines(output / "metrics.jsonl")
    return [row for row in rows if "split" not in row]


def log_evaluation(log, output, iteration, samples, baseline):
    """Write the `eval` row, and 16 samples beside the SFT policy's; the summary."""
    summary = summarize(samples, baseline)
    log({"split": "eval", "iteration": iteration} | summary)
    for sample, old in list(zip(samples, baseline))[:16]:
        row = {"iteration": iteration} | sample | {"sft_response": old["response"]}
        common.append_json_line(output / "samples.jsonl", row)
    return summary


def save_checkpoint(cfg, policy, critic, tokenizer, num_rows, optimizer, schedule, **more):
    """Policy, critic, logs and all that --resume needs; the folder is there whole or not at all."""
    with common.saved_run(cfg, num_rows, optimizer, schedule, **more) as folder:
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if cfg.critic == "separate":
            critic.save_pretrained(folder / "critic")
        else:
            (folder / "critic").mkdir()
            weights = folder / "critic" / "value_head.safetensors"
            safetensors.torch.save_file(critic.state_dict(), weights)


def load_checkpoint(cfg, policy, critic, tokenizer):
    """Put the weights that `save_checkpoint` saved into policy and critic."""
    trust = cfg.trust_remote_code
    saved = common.load_causal_lm(cfg.output, tokenizer, trust_remote_code=trust)
    policy.load_state_dict(saved.state_dict())
    folder = f"{cfg.output}/critic"
    if cfg.critic == "shared":
        critic.load_state_dict(safetensors.torch.load_file(f"{folder}/value_head.safetensors"))
    else:
        saved, _ = common.load_scalar_model(folder, tokenizer, trust_remote_code=trust)
        critic.load_state_dict(saved.state_dict())


# === 9. Models and main loop: sections 1 to 6 in order ============================================
def load_scorer(spec, cfg, policy, tokenizer, device):
    """A function, a frozen reward model that reads the policy's tokens, or else a TextScorer.

    Only one that reward_model.py made on this tokenizer and chat template is read token by token.
    At which token another was trained to answer, only its own forward knows.
    """
    if re.search(r"\.py(:|$)", spec) and not os.path.isdir(spec):
        return load_function(spec)
    made_by, trust = "python reward_model.py", cfg.trust_remote_code
    if os.path.isdir(f"{spec}/trainer_state"):
        raise UserError(f"{spec} is not finished; {made_by} --resume --output {spec} goes on")
    theirs = common.load_tokenizer(spec, made_by, trust, needs_eos=False)
    classifier, own = common.load_text_scorer(spec, made_by, trust)  # its own pad token
    classifier.requires_grad_(False).to(device)
    is_ours = hasattr(classifier.config, "reward_mean") and common.has_token_head(classifier)
    same_tokens = theirs.get_vocab() == tokenizer.get_vocab()
    same_chats = theirs.chat_template == tokenizer.chat_template
    num_embedded = classifier.get_input_embeddings().num_embeddings
    knows_all = num_embedded >= policy.get_output_embeddings().out_features  # that may be sampled
    if is_ours and same_tokens and same_chats and knows_all:
        return classifier
    return TextScorer(classifier, own, cfg, device)


def reward_models(scorers):
    """The models among the scorers, those that read texts included."""
    models = [getattr(scorer, "classifier", scorer) for scorer in scorers]
    return [model for model in models if isinstance(model, torch.nn.Module)]


def set_score_scales(known, scorers, policy, ref_policy, rows, tokenizer, cfg, device):
    """Give reward models from elsewhere the scale that reward_model.py would have given them.

    Mean and deviation of their scores on the SFT policy's responses become 0 and 1. Returns them,
    as {reward: (mean, deviation)}, which a resumed run has in `known`.
    """
    scales = dict(known)
    for scorer, spec in zip(scorers, cfg.reward):
        if not isinstance(scorer, TextScorer) or scorer.is_ours:
            continue
        if spec not in scales:
            samples = evaluate(policy, ref_policy, [scorer], None, rows, tokenizer, cfg, device)
            scores = torch.tensor([sample["score"] for sample in samples])
            mean, deviation = scales[spec] = scores.mean().item(), scores.std(correction=0).item()
            if not 0 < deviation < math.inf:
                raise UserError(f"{spec} gives all responses of {cfg.policy} the score {mean:g}")
            print(
                f"  {spec}: scores are taken by mean {mean:.3f} and deviation {deviation:.3f} of "
                f"those of {len(samples)} responses by {cfg.policy}"
            )
        scorer.classifier.config.reward_mean, scorer.classifier.config.reward_std = scales[spec]
    return scales


def load_critic(cfg, scorers, policy, tokenizer):
    """The critic: a copy of the first reward model that reads the policy's tokens, or the policy.

    A reward model has learned what scores depend on, which is most of what a critic must know.
    --critic shared is only a linear head: it saves a model and its optimizer, but its loss,
    weighted by c1, trains the policy's trunk too, and the two may pull apart. New heads start at 0.
    """
    if cfg.critic == "shared":
        critic = torch.nn.Linear(policy.get_output_embeddings().in_features, 1)
        torch.nn.init.zeros_(critic.weight)
        torch.nn.init.zeros_(critic.bias)
        return critic
    for scorer in scorers:
        if isinstance(scorer, torch.nn.Module):
            return copy.deepcopy(scorer).requires_grad_(True)
    trust = cfg.trust_remote_code
    critic, _ = common.load_scalar_model(cfg.policy, tokenizer, trust_remote_code=trust)
    torch.nn.init.zeros_(critic.score.weight)
    return critic


def load_models(cfg, tokenizer, rows, device):
    """policy, ref_policy, critic and the list of scorers, on the device.

    Trained weights are float32, since an Adam step of 3e-6 is lost in bf16 weights, and dropout is
    off everywhere, since two passes with two dropout masks are two policies: the ratio would not be
    1.
    """
    made_by, trust = "python sft.py", cfg.trust_remote_code
    policy = common.load_causal_lm(cfg.policy, tokenizer, made_by, trust).to(device)
    common.set_generation_defaults(policy, tokenizer, cfg.temperature)
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    scorers = [load_scorer(spec, cfg, policy, tokenizer, device) for spec in cfg.reward]
    longest = max(len(row.prompt_ids) for row in rows) + cfg.response_length
    for model in (policy, *(s for s in scorers if isinstance(s, torch.nn.Module))):
        common.check_context(model, longest, "--max-prompt-length or --response-length")
    critic = load_critic(cfg, scorers, policy, tokenizer).to(device)
    trained = (policy, critic) if cfg.critic == "separate" else (policy,)
    frozen = (ref_policy, *reward_models(scorers))
    for model in (*trained, *frozen):
        if cfg.attention != "auto":  # what transformers takes for this model
            common.set_attention(model, cfg.attention)
        if cfg.compile:  # of a critic only the trunk is called
            (model.base_model if hasattr(model, "score") else model).compile(dynamic=True)
    for model in frozen if common.is_bf16(device, cfg.dtype) else ():
        common.round_matrices(model)  # the critic was copied before
    for model in trained if cfg.gradient_checkpointing else ():
        common.enable_gradient_checkpointing(model)
    return policy, ref_policy, critic, scorers


def make_optimizer(cfg, policy, critic):
    """(Adam over policy and critic, each with its own rate; a schedule that takes both to 0)."""
    lr = common.by_size(cfg.lr, LR_BY_SIZE, policy)
    sized = policy if cfg.critic == "shared" else critic
    critic_lr = common.by_size(cfg.critic_lr, LR_BY_SIZE, sized)
    groups = [
        {"params": list(policy.parameters()), "lr": lr},
        {"params": list(critic.parameters()), "lr": critic_lr},
    ]
    # eps: OpenAI's choice, see Huang et al. 2024. fused: one pass over the weights, not a dozen.
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / cfg.iterations)
    return optimizer, schedule


def estimate_memory(policy, critic, ref_policy, scorers, rows, cfg, device):
    """What an update will hold where it holds most, in its backward pass: {part: bytes}.

    Weights, gradients and Adam's two moments are counted. What autograd keeps of a micro-batch is
    measured on two rows of full length and on three, as each row adds the same. To it come, after
    a separate critic's share is gone, the logits' gradient and the float32 pieces; or, with
    --gradient-checkpointing, one layer whole while it is computed again.
    """
    models = [policy, critic, ref_policy, *reward_models(scorers)]
    trained = [*policy.parameters(), *critic.parameters()]
    checkpointed = [policy, critic] if cfg.critic == "separate" else [policy]
    width = max(len(row.prompt_ids) for row in rows) + cfg.response_length
    num_rows = min(cfg.microbatch_size, cfg.minibatch_size)

    def kept(number, critic):
        tokens = torch.zeros(number, width, dtype=torch.int64, device=device)
        mask = torch.ones_like(tokens).bool()
        mask[0, 0] = False  # so that attention needs a mask, as in most micro-batches
        with common.arithmetic(device, cfg.dtype):
            return common.kept_bytes(lambda: forward_responses(
                policy, critic, tokens, mask, cfg.response_length, cfg.temperature,
                with_entropy=cfg.entropy_coef > 0,
            ), trained)

    def kept_of_microbatch(critic):
        two, three = kept(2, critic), kept(3, critic)
        return two + (three - two) * (num_rows - 2)

    activations = kept_of_microbatch(critic)
    row_of_logits = cfg.response_length * policy.get_output_embeddings().out_features
    gradient = num_rows * row_of_logits * (2 if common.is_bf16(device, cfg.dtype) else 4)
    pieces = 4 * 2 * row_of_logits * 4  # four tensors of two rows
    of_policy = activations if cfg.critic == "shared" else kept_of_microbatch(None)
    backward = max(0, of_policy + gradient + pieces - activations)
    if cfg.gradient_checkpointing:
        num_layers = sum(m.config.get_text_config().num_hidden_layers for m in checkpointed)
        for model in checkpointed:
            model.eval()  # transformers checkpoints only in train mode
        backward = max(backward, (kept_of_microbatch(critic) - activations) // num_layers)
        for model in checkpointed:
            model.train()
    return {
        "weights": common.tensor_bytes(p for model in models for p in model.parameters()),
        "gradients": common.tensor_bytes(trained), "Adam": 2 * common.tensor_bytes(trained),
        "activations": activations, "backward": backward,
    }


def rehearse(policy, critic, ref_policy, scorers, optimizer, rows, cfg, device):
    """The worst case once before the first iteration, so that memory fails in the first minute.

    With all that Adam will keep, a full batch of the longest prompt with responses of full length
    is sampled, scored and taken through a backward pass. Weights, random numbers and optimizer are
    then what they were. Reward models that are asked about texts are not part of it.
    """
    for parameter in [*policy.parameters(), *critic.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # with gradients of 0 it moves nothing
    longest = max(rows, key=lambda row: len(row.prompt_ids))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        tokens, mask, response_mask, _ = sample_responses(
            policy, [longest] * cfg.batch_size, cfg, device, to_the_full=True
        )
    num_columns = response_mask.shape[1]
    mask = torch.ones_like(mask)  # an EOS that came by chance shortens nothing
    if len(longest.prompt_ids) > 1:
        mask[0, 0] = False  # and attention needs a mask, as in most micro-batches
    models = [scorer for scorer in scorers if isinstance(scorer, torch.nn.Module)]
    if models:
        score_responses(models, tokens, mask, None, None, cfg)
    evaluate_tokens(policy, critic, ref_policy, tokens, mask, num_columns, cfg)
    size = min(cfg.microbatch_size, cfg.minibatch_size)
    with common.arithmetic(device, cfg.dtype):
        outputs = forward_responses(
            policy, critic, tokens[:size], mask[:size], num_columns, cfg.temperature,
            with_entropy=cfg.entropy_coef > 0,
        )
    sum(output.sum() for output in outputs).backward()
    optimizer.zero_grad()
    optimizer.state.clear()


def main(cfg):
    check_config(cfg)
    cfg = with_embedded_defaults(cfg)
    set_seed(cfg.seed)
    device = common.pick_device(cfg.device)
    state = common.open_run(cfg, MAY_CHANGE)
    if state and state["iterations_done"] >= cfg.iterations:
        common.finish(f"the run in {cfg.output} is finished; a higher --iterations goes on with it")

    # -- setup: data, models, optimizer
    tokenizer = common.load_tokenizer(cfg.policy, "python sft.py", cfg.trust_remote_code)
    rows = load_prompts(cfg.prompts, tokenizer, cfg, " ".join(cfg.prompts))
    if cfg.eval_prompts is not None:
        eval_rows = load_prompts(cfg.eval_prompts, tokenizer, cfg, "held out")
    else:
        rows, eval_rows = common.hold_out(rows, 128, cfg.seed, "--eval-prompts")
    judge = None if cfg.judge is None else load_function(cfg.judge)
    all_rows = rows + eval_rows
    models = load_models(cfg, tokenizer, all_rows, device)
    policy, ref_policy, critic, scorers = models
    score_scales = set_score_scales(
        state["score_scales"] if state else {}, scorers, policy, ref_policy, all_rows[:256],
        tokenizer, cfg, device,
    )
    optimizer, schedule = make_optimizer(cfg, policy, critic)
    print_report(cfg, models, schedule.base_lrs, tokenizer, rows, eval_rows)

    memory = estimate_memory(policy, critic, ref_policy, scorers, all_rows, cfg, device)
    parts = " + ".join(f"{part} {size / 1e9:.3g}" for part, size in memory.items())
    print(f"  memory in an update, GB: {parts} = {sum(memory.values()) / 1e9:.3g}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        rehearse(policy, critic, ref_policy, scorers, optimizer, all_rows, cfg, device)
        print(f"  measured in a trial of the longest batch: {common.peak_memory(device) / 1e9:.2f}")

    # -- the start: a held-out evaluation of the SFT policy, which later ones are compared with
    if state:
        load_checkpoint(cfg, policy, critic, tokenizer)
        common.restore(state, len(rows), optimizer, schedule)
        iterations_done, kl_coef, baseline = (state[key] for key in KEPT)
    else:
        iterations_done, kl_coef = 0, cfg.kl_coef
        baseline = evaluate(policy, ref_policy, scorers, judge, eval_rows, tokenizer, cfg, device)
    output = common.start_logs(cfg, state)
    log = common.open_log(output, cfg.tensorboard)
    before = summarize(baseline, baseline)
    if not state:
        log_evaluation(log, output, 0, baseline, baseline)
    history, told = read_history(output), set()
    value_clip_eps = cfg.value_clip_eps if cfg.advantage == "gae" else None  # None is eq. 6b
    batches = endless_batches(rows, cfg.batch_size, random.Random(cfg.seed))
    batches = itertools.islice(batches, iterations_done, cfg.iterations)  # resumed: the same draws
    stop, skipped = common.StopRequest(), common.SkippedSteps()
    progress = tqdm(batches, desc="ppo", unit="it", initial=iterations_done, total=cfg.iterations)
    for iteration, prompt_rows in enumerate(progress, iterations_done + 1):
        # 1. ROLLOUT     prompt_rows -> tokens, attention_mask (B, P+R); response_mask (B, R); ended
        clock = [common.now(device)]
        tokens, attention_mask, response_mask, ended = sample_responses(
            policy, prompt_rows, cfg, device
        )
        responses = decode_responses(tokens, response_mask, tokenizer)
        num_columns = response_mask.shape[1]  # R
        clock.append(common.now(device))

        # 2. SCORE       tokens -> parts (S, B), scores (B,); a text that was cut loses the penalty
        parts = score_responses(scorers, tokens, attention_mask, prompt_rows, responses, cfg)
        scores = parts.sum(0)
        final_scores = scores - cfg.missing_eos_penalty * (~ended).float()

        # 3. EVALUATE    tokens -> logprobs, ref_logprobs, values, entropy (B, R)
        logprobs, ref_logprobs, values, entropy = evaluate_tokens(
            policy, critic, ref_policy, tokens, attention_mask, num_columns, cfg
        )

        # 4. REWARDS     scores, logprobs -> kl, rewards (B, R)                             eq. 1
        # A token's term may be negative; the mean estimates KL(pi || pi_ref), which is not.
        kl = torch.where(response_mask, logprobs - ref_logprobs, 0.0)
        rewards = kl_shaped_rewards(final_scores, kl, response_mask, kl_coef)
        clock.append(common.now(device))

        # 5. ADVANTAGES  rewards, values -> advantages, returns, value_mask (B, R)          eqs. 2-3
        advantages, returns, value_mask = estimate_advantages(
            cfg.advantage, rewards, values, response_mask, cfg.gamma, cfg.lam
        )

        # 6. UPDATE      a batch of constants -> policy, critic; only new_* has gradient    eqs. 4-7
        batch = Batch(
            tokens, attention_mask, response_mask, value_mask, logprobs, values,
            whiten(advantages, response_mask), returns,
        )
        steps, grad_norms = [], []
        for index in minibatches(cfg.batch_size, cfg.minibatch_size, cfg.ppo_epochs):
            optimizer.zero_grad()
            num_tokens, num_values = response_mask[index].sum(), value_mask[index].sum()
            steps.append(torch.zeros(len(STATISTICS), device=device))
            for micro in batch.micro_batches(index, cfg.microbatch_size):  # gradients add up
                with common.arithmetic(device, cfg.dtype):  # autocast
                    new_logprobs, new_values, new_entropy = forward_responses(
                        policy, critic, micro.tokens, micro.attention_mask,
                        micro.response_mask.shape[1], cfg.temperature,
                        with_entropy=cfg.entropy_coef > 0,
                    )  # (b, r) each
                # Indexing by a mask leaves the N that count, (N,): from here no padding exists.
                at, at_v = micro.response_mask, micro.value_mask
                policy_losses, ratio = policy_loss(
                    new_logprobs[at], micro.logprobs[at], micro.advantages[at], cfg.clip_eps
                )
                value_losses = value_loss(
                    new_values[at_v], micro.values[at_v], micro.returns[at_v], value_clip_eps
                )
                loss = total_loss(
                    policy_losses, value_losses, new_entropy[at], num_tokens, num_values,
                    cfg.value_coef, cfg.entropy_coef,
                )
                loss.backward()
                steps[-1] += update_statistics(
                    policy_losses, value_losses, ratio, cfg.clip_eps, num_tokens, num_values
                )
            norms = [clip_grad_norm_(m.parameters(), cfg.max_grad_norm) for m in (policy, critic)]
            grad_norms.append(norms)
            if cfg.target_kl is not None and steps[-1][APPROX_KL] > cfg.target_kl:
                break  # far enough from pi_old: without this step, and without the epochs left
            if skipped.may_step(norms, recent(history)):  # one bad batch is no reason to stop
                optimizer.step()
        optimizer.zero_grad()  # the rollout can use the gradients' memory
        clock.append(common.now(device))

        # -- log, adapt beta, evaluate, save
        truths = call_reward(judge, prompt_rows, responses) if judge else None
        row = metrics_row(
            iteration, cfg, schedule, kl_coef, parts, truths, kl, entropy, ended, batch, steps,
            grad_norms, clock,
        )
        history.append(row)
        show_iteration(log, progress, history, told)
        schedule.step()
        kl_coef = adapt_kl_coef(kl_coef, row["kl"], cfg.kl_target, cfg.batch_size, cfg.kl_horizon)
        is_last = iteration == cfg.iterations
        if is_last or iteration % cfg.eval_every == 0:
            samples = evaluate(
                policy, ref_policy, scorers, judge, eval_rows, tokenizer, cfg, device
            )
            after = log_evaluation(log, output, iteration, samples, baseline)
        if cfg.explain and (is_last or iteration == 1 or iteration % cfg.eval_every == 0):
            progress.write(explain_response(tokenizer, batch, ref_logprobs, rewards, advantages))
        if is_last or stop.signal or iteration % cfg.save_every == 0:
            more = dict(zip(KEPT, (iteration, kl_coef, baseline)), score_scales=score_scales)
            save_checkpoint(
                cfg, policy, critic, tokenizer, len(rows), optimizer, schedule, **more
            )
        if stop.signal and not is_last:
            progress.close()
            stop.leave(cfg)
    print_result(before, after, baseline, samples, cfg.output)


if __name__ == "__main__":
    with common.command_line(MEMORY_FLAGS):
        main(common.parse_args(Config, __doc__.splitlines()[0]))
