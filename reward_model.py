"""Stage 2 of RLHF, the reward model: a number per text, fitted to what humans preferred.

Goal      maximise the likelihood of the preferences under the model of Bradley and Terry

(1) model P(chosen is preferred) = sigma(s_chosen - s_rejected)
(2) loss  L = - mean over the batch's pairs of  log sigma(s_chosen - s_rejected)
(3) scale s <- (s - mean) / deviation, both over the training pairs' responses

          Only differences enter (1), so the pairs do not say where zero is, and only the noise in
          the labels says what one unit is. (3) puts zero at the average response and makes the
          deviation the unit; without it a KL coefficient or an EOS penalty would mean something
          else for each reward model. PPO reads mean and deviation from this model's config.

Shapes    B pairs; 2B texts of T tokens (padded on the right), the chosen ones first.
Score     A linear head reads the last attended token, normally the EOS: only there has a causal
          model seen the whole text. The attention mask finds it, not "the last that is not pad".
Head      New heads have deviation 1/sqrt(d + 1) and bias 0 (Stiennon et al. 2020).
Epochs    One. Preference labels are noisy, and a second pass mostly memorises the noise.

Differs   (3) uses all responses of the training pairs, and scales too; the sources below centre the
          scores of demonstrations or reference summaries.
          The model is saved with its head, loaded again and held to the scores from before.

Sources   Stiennon et al. 2020; Ouyang et al. 2022; Huang et al. 2024, "The N+ Implementation
          Details of RLHF with PPO". The last one's settings for TL;DR summaries with 1 B parameters
          are a start for a model of that size: --lr 3e-6 --epochs 1 --batch-size 64, cosine decay;
          held-out accuracies there are 0.628 at 1 B, 0.669 at 2.8 B and 0.689 at 6.9 B parameters.

Run       python reward_model.py                                       from ckpt/sft, on data/
          python reward_model.py --model ckpt/sft --data mine.jsonl    your own pairs
Data      {"prompt": ..., "chosen": ..., "rejected": ...}, strings or message lists, one row a line;
          without a prompt the others are whole dialogues, and what both begin with is the prompt
Writes    ckpt/reward_model: a Hugging Face folder (sequence classification, one label) with
          reward_mean and reward_std in its config, args.json and metrics.jsonl; until the run is
          finished also trainer_state/ (for --resume); with --lora-rank adapter/ too
"""

import plumbing  # first: Ctrl-C while torch loads is no traceback

import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import common
from common import UserError
from plumbing import adapters, cli, processes, report
from plumbing.cli import DATA, RunConfig, arg
from plumbing.folders import checkpoints
from plumbing.rows import convert, preference, read_and_hold_out, too_long
from plumbing.runs import Run, adamw_with_cosine


# === 0. Configuration =============================================================================
# An optimizer step takes --batch-size pairs; --microbatch-size of them are in memory at a time.
@dataclass(frozen=True)
class Config(RunConfig):  # the flags that all stages share are in plumbing/cli.py
    output: str = arg("ckpt/reward_model", "folder for the model and the logs", heading="run")

    model: str = arg("ckpt/sft", "causal LM, or a reward model to train on", heading="data")
    data: list[str] = arg([str(DATA / "preferences.jsonl")], "JSONL; see the README")
    eval_data: list[str] | None = arg(None, "held-out pairs; else a tenth of --data, at most 512")
    max_prompt_length: int = arg(512, "in tokens; pairs above are dropped and counted", 1)
    response_length: int = arg(512, "in tokens, EOS included; pairs above are dropped too", 1)

    epochs: int = arg(1, "passes over the pairs; 1", 1, heading="optimisation")
    batch_size: int = arg(32, "pairs per optimizer step", 1)
    microbatch_size: int = arg(32, "pairs per forward pass; memory only, same gradient", 1)
    lr: float | None = arg(None, "peak learning rate; else by size, see LR_BY_SIZE", 0, 1)
    warmup: float = arg(0.05, "share of steps in which lr rises from 0; then a cosine to 0", 0, 1)
    weight_decay: float = arg(0.0, "of AdamW; 0 to 0.1", 0, 1)
    max_grad_norm: float = arg(1.0, "clip the gradient to this norm", 1e-9)


# Learning rates by number of parameters: what a tiny model learns from, a large one forgets from.
LR_BY_SIZE = ((10e6, 1e-3), (1e9, 1e-5), (math.inf, 3e-6))  # (parameters below, learning rate)
FORMATS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]  # the keys of a row


# === 1. Model: a causal LM's trunk and one number =================================================
def init_head(model):
    """Start the head at deviation 1/sqrt(d + 1): scores of order 1 from features of order 1."""
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    if model.score.bias is not None:
        torch.nn.init.zeros_(model.score.bias)


# === 2. Data: rows to ids =========================================================================
def encode_row(row, tokenizer, eos_ids, cfg):
    """The (chosen ids, rejected ids) of a row, prompt and response with EOS, or why not."""
    prompt, chosen, rejected = preference(row)  # strings or chats, from any accepted format
    tools = row.get("tools")
    prompt_ids, chosen_ids = common.encode(tokenizer, prompt, chosen, eos_ids, tools)
    _, rejected_ids = common.encode(tokenizer, prompt, rejected, eos_ids, tools)
    reason = too_long(cfg, prompt_ids, chosen_ids, rejected_ids)
    if chosen_ids == rejected_ids:
        reason = "chosen and rejected the same"  # its loss is log 2 and its gradient 0
    yield reason or (prompt_ids + chosen_ids, prompt_ids + rejected_ids)


# === 3. Scores and loss: eqs. 1-2 =================================================================
def pair_scores(model, pairs, pad_id):
    """Scores of the chosen and of the rejected texts, (B,) float32 each, from one forward pass."""
    texts = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]  # 2B lists
    tokens, attention_mask = common.pad(texts, pad_id, "right")  # (2B, T)
    tokens, attention_mask = tokens.to(model.device), attention_mask.to(model.device)
    return common.text_scores(model, tokens, attention_mask).chunk(2)  # read at the last token


def preference_loss(chosen_scores, rejected_scores):
    """Negative log-likelihood of each pair, (B,) in nats; log 2 where the scores are equal."""
    return -F.logsigmoid(chosen_scores - rejected_scores)  # eqs. 1-2


# === 4. Held-out evaluation =======================================================================
@torch.no_grad()
def score_pairs(model, pairs, microbatch_size, pad_id, desc=None):
    """Chosen and rejected scores of all pairs, (N,) float32 each, on the CPU, in their order."""
    order = sorted(range(len(pairs)), key=lambda i: max(map(len, pairs[i])))  # little padding
    order = common.share(order)  # under torchrun
    scores = torch.zeros(2, len(pairs), device=model.device)
    for start in tqdm(range(0, len(order), microbatch_size), desc=desc, leave=False):
        rows = order[start : start + microbatch_size]
        micro = [pairs[i] for i in rows]
        scores[:, rows] = torch.stack(pair_scores(model, micro, pad_id))
    return common.total(scores).cpu().unbind()


def accuracy(better, worse):
    """(share of pairs with better > worse, ties counting half; twice its standard error).

    The error is that of Agresti and Coull 1998, two more wins and losses: of few pairs, all won, it
    is not 0.
    """
    share = ((better > worse).float() + 0.5 * (better == worse).float()).mean().item()
    number = len(better) + 4
    expected = (share * len(better) + 2) / number
    return share, 2 * math.sqrt(expected * (1 - expected) / number)


def calibration(differences, num_bins=4):
    """Is the model as sure as it is right? A row per quantile of |s_chosen - s_rejected|.

    Each row is (mean |difference|, promised accuracy, accuracy). Promised is the mean of
    sigma(|difference|): by eq. 1, the chance that the text with the higher score is preferred.
    """
    rows = []
    for group in differences[differences.abs().argsort()].tensor_split(num_bins):
        if len(group):
            size = group.abs()  # how sure it is
            right, _ = accuracy(group, torch.zeros_like(group))  # chosen above rejected
            rows.append((size.mean().item(), size.sigmoid().mean().item(), right))
    return rows


def held_out_metrics(raw_chosen, raw_rejected, pairs):
    """The `eval` row of metrics.jsonl, from raw scores: eq. 1 is about those, not scaled ones."""
    right, two_sigma = accuracy(raw_chosen, raw_rejected)
    lengths = [torch.tensor([float(len(text)) for text in texts]) for texts in zip(*pairs)]
    return {
        "loss": preference_loss(raw_chosen, raw_rejected).mean().item(),  # below log 2 = 0.693
        "accuracy": right,  # 0.6 to 0.75 on human labels; near 1 suggests a leak
        "accuracy_two_sigma": two_sigma,  # of chance alone, by the number of pairs
        "longer_wins": accuracy(*lengths)[0],  # accuracy should beat this and 1 - this clearly
    }


# === Main loop ====================================================================================
def read_back(run, model, tokenizer, eval_pairs, expected, cfg):
    """Put the scale into the checkpoint; what a model read from it then scores must be `expected`.

    Returns the largest difference. The run is finished only if there is none to speak of.
    """
    folder = checkpoints(run.folder)[-1]
    if processes.RANK == 0:
        model.config.to_json_file(folder / "config.partial")  # where PPO will find the scale
        os.replace(folder / "config.partial", folder / "config.json")  # whole or not at all
    processes.wait()  # all read it
    options = {"trust_remote_code": cfg.trust_remote_code}
    saved, _ = common.load_scalar_model(str(folder), tokenizer, **options)
    common.place(saved.requires_grad_(False), run.device, cfg.dtype)
    scores = score_pairs(saved, eval_pairs, cfg.microbatch_size, tokenizer.pad_token_id, "reload")
    drift = max((new - old).abs().max().item() for new, old in zip(scores, expected))
    if not drift < 1e-3:  # a lost head scores noise
        raise UserError(f"the saved model scores differently, by up to {drift:.2g}: not kept")
    return drift


def main(cfg):
    cli.check_ranges(cfg)
    run = Run(cfg)  # seeds, takes --output, finds what --resume goes on from

    # -- setup: data, tokenizer, model, optimizer
    rows, eval_rows = read_and_hold_out(cfg, FORMATS, most=512)
    source, made_by = run.source or cfg.model, "python sft.py"  # a checkpoint has its own copy
    options = {"trust_remote_code": cfg.trust_remote_code}
    tokenizer = common.load_tokenizer(source, made_by, **cfg.of_tokenizer)
    source = source if cfg.lora_rank is None else cfg.model  # adapters are put onto their base
    model, head_is_new = common.load_scalar_model(source, tokenizer, made_by, **options)
    if head_is_new:  # --model was a causal LM
        init_head(model)
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0  # raw scores until eq. 3, below
    adapters.add(model, cfg.lora_rank, cfg.model)
    pad_id, eos_ids = tokenizer.pad_token_id, common.eos_token_ids(tokenizer, model)
    encode = lambda row: encode_row(row, tokenizer, eos_ids, cfg)
    pairs = convert(rows, encode)
    eval_pairs = convert(eval_rows, encode, "held out")  # says what was dropped, and why
    lengths = [max(map(len, pair)) for pair in pairs]  # in tokens
    common.check_context(model, max(len(ids) for pair in pairs + eval_pairs for ids in pair))
    common.place(model, run.device, cfg.dtype, cfg.gradient_checkpointing)  # and its precision
    num_steps = cfg.epochs * math.ceil(len(pairs) / cfg.batch_size)  # the last may be smaller
    optimizer, schedule = adamw_with_cosine(cfg, model, LR_BY_SIZE, num_steps)
    sizes = len(pairs), len(eval_pairs)
    report.supervised_start(cfg, "reward model", model, "pairs", *sizes, optimizer)
    report.print_tokens(tokenizer, model, pairs[0][0])

    # -- the start
    run.restore(tokenizer, {"reward_model": model}, optimizer, schedule)
    run.start()  # nothing is written before
    generator = torch.Generator().manual_seed(cfg.seed)  # its own: --resume draws the same again
    batches = common.epochs_by_length(lengths, cfg.batch_size, generator)
    for step, index in run.steps(batches, num_steps):
        run.phase("backward")
        loss, num_right, mine = 0.0, 0, common.share(index)  # under torchrun
        for start in range(0, len(mine), cfg.microbatch_size):  # same gradient, less memory
            micro = [pairs[i] for i in mine[start : start + cfg.microbatch_size]]
            chosen, rejected = pair_scores(model, micro, pad_id)  # (b,) each
            micro_loss = preference_loss(chosen, rejected).sum() / len(index)  # divided once
            micro_loss.backward()  # gradients add up
            loss += micro_loss.item()  # in nats per pair
            num_right += (chosen > rejected).sum().item()
        sums = {"loss": loss, "right": num_right}
        sums = processes.add_up([model], sums)  # and all gradients
        grad_norm = clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        if run.may_step([grad_norm]):  # finite: one bad batch is no reason to stop
            optimizer.step()
        lr = schedule.get_last_lr()[0]  # of this step
        schedule.step()  # for the next
        optimizer.zero_grad()

        # -- log, save
        row = {
            "iteration": step,
            "loss": sums["loss"],  # nats per pair; from 0.7 to 0.9 (log 2 is 0.693) down
            "accuracy": sums["right"] / len(index),  # in epoch 1 of new pairs; from 0.5 up
            "grad_norm": grad_norm.item(),  # before clipping; steady after the warm-up
            "lr": lr,  # up, then down
        }
        run.log(row, show={"loss": "loss", "accuracy": "accuracy"})
        run.save_if_due()

    # -- held-out result, scale (eq. 3)
    run.phase("evaluation")
    adapters.merge(model)
    raw = score_pairs(model, eval_pairs, cfg.microbatch_size, pad_id, "held-out pairs")
    reference = torch.cat(score_pairs(model, pairs, cfg.microbatch_size, pad_id, "score scale"))
    mean, deviation = reference.mean().item(), reference.std().item()  # of all training responses
    if not deviation > 0:  # or nan
        raise UserError("the model gives all texts one score, or none; lower --lr or check --data")
    model.config.reward_mean, model.config.reward_std = mean, deviation
    scale = {"reward_mean": mean, "reward_std": deviation}
    row = {"split": "eval", "iteration": num_steps} | held_out_metrics(*raw, eval_pairs) | scale
    run.log(row)
    expected = [(scores - mean) / deviation for scores in raw]  # eq. 3
    drift = read_back(run, model, tokenizer, eval_pairs, expected, cfg)
    run.finish()  # --output is now a model's folder
    report.reward_model_result(row, calibration(raw[0] - raw[1]), drift)
    data = "" if cfg.data == Config().data else " --prompts YOUR_PROMPTS.jsonl"
    flags = f"--policy {cfg.model} --reward {cfg.output}{data}"
    print(f"\nwrote {cfg.output}; next: python ppo.py {flags}")


if __name__ == "__main__":
    with cli.command_line():
        main(cli.parse_args(Config, __doc__.splitlines()[0]))
