"""Stage 2 of RLHF, the reward model: a number per text, fitted to what humans preferred.

Goal      maximize the likelihood of the preferences under the model of Bradley and Terry

(1) model P(chosen is preferred) = sigma(s_chosen - s_rejected)
(2) loss  L = - mean over the batch's pairs of  log sigma(s_chosen - s_rejected)
(3) scale s <- (s - mean) / std, both over the training pairs' responses

          Only differences enter (1), so the pairs do not fix the zero of the scores, and the noise
          of the labels sets their unit. (3) makes the mean 0 and the standard deviation 1 over the
          training responses. Otherwise a KL coefficient or an EOS penalty would mean something else
          for each reward model. PPO reads mean and std from the model's config.

Shapes    B pairs; 2B texts of T tokens (padded on the right), the chosen ones first.
Score     A linear head reads the last attended token, normally the EOS: only there has a causal
          model seen the whole text. The attention mask finds it, not "the last that is not pad".
Head      New heads have standard deviation 1/sqrt(d + 1) and bias 0 (Stiennon et al. 2020).
Epochs    One. Preference labels are noisy, and a second pass mostly memorizes the noise.

Differs   (3) sets mean and standard deviation over all responses of the training pairs; the sources
          below only shift scores, so that demonstrations or reference summaries have mean 0. The
          saved model is loaded again and must give the same scores to within 1e-3.

Sources   Stiennon et al. 2020; Ouyang et al. 2022; Huang et al. 2024, "The N+ Implementation
          Details of RLHF with PPO". Its settings for TL;DR summaries with 1 B parameters are a
          start for models of that size: --lr 3e-6 --epochs 1 --batch-size 64, cosine decay; its
          held-out accuracies are 0.628 at 1 B, 0.669 at 2.8 B and 0.689 at 6.9 B parameters.

Run       python reward_model.py                                       from ckpt/sft, on data/
          python reward_model.py --model ckpt/sft --data mine.jsonl    your own pairs
Data      {"prompt": ..., "chosen": ..., "rejected": ...}, strings or message lists, one row a line;
          without a prompt the others are whole dialogues, and their common beginning is the prompt
Writes    ckpt/reward_model: a Hugging Face folder (sequence classification, one label) with
          reward_mean and reward_std in its config, args.json and metrics.jsonl
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes while torch loads

import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import common
import harness
from common import UserError
from harness import DATA, Count, Positive, Share, arg


# === 0. Configuration =============================================================================
# An optimizer step learns from --batch-size pairs; --microbatch-size affects memory and speed only.
@dataclass(frozen=True)
class Config(harness.RunConfig):  # the flags that all stages share are in harness.py
    output: str = arg("ckpt/reward_model", "folder for the model and the logs")
    save_every: Count = arg(500, "optimizer steps between checkpoints")

    model: str = arg("ckpt/sft", "causal LM, or a reward model to train further")
    data: list[str] | None = arg(None, "JSONL of prompt, chosen, rejected; None: toy task in data/")
    eval_data: list[str] | None = arg(None, "held-out JSONL files; None: a tenth of --data")
    max_prompt_length: Count = arg(512, "in tokens; pairs with longer prompts are dropped")
    response_length: Count = arg(512, "in tokens, with EOS; pairs with longer ones are dropped")

    epochs: Count = arg(1, "passes over the pairs; usually 1, as more overfit")
    batch_size: Count = arg(32, "pairs per optimizer step")
    microbatch_size: Count | None = arg(None, "pairs at once; None: fastest that fits, CPU: 32")
    lr: Share | None = arg(None, "peak learning rate; None: by size, 1e-3 to 3e-6")
    warmup: Share = arg(0.05, "share of steps in which lr rises from 0; then a cosine to 0")
    weight_decay: Share = arg(0.0, "weight decay of AdamW; usually 0 to 0.1")
    max_grad_norm: Positive = arg(1.0, "clip the gradient to this norm")


# Learning rates by number of parameters: at a tiny model's rate, a large one forgets.
LR_BY_SIZE = ((10e6, 1e-3), (1e9, 1e-5), (math.inf, 3e-6))  # (parameters below, learning rate)
FORMATS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]  # the keys of a row


# === 1. Model: a causal LM's trunk and one number =================================================
def init_head(model):
    """Starts the head at std 1/sqrt(d + 1): scores of order 1 from features of order 1."""
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    if model.score.bias is not None:
        torch.nn.init.zeros_(model.score.bias)


# === 2. Data: rows to ids =========================================================================
# FORK: other preferences become a prompt, a chosen and a rejected response here.
def preference(row):
    """Returns the (prompt, chosen, rejected) of a data row, as `common.encode` takes them.

    Without a "prompt", or where chosen and rejected are chats, these may be whole dialogues. Then
    their common beginning is the prompt.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("has a string as one response and messages as the other")
    if isinstance(chosen, str):  # texts
        return (prompt, chosen, rejected) if "prompt" in row else split_texts(chosen, rejected)
    if isinstance(prompt, list):  # chats, with a prompt of their own
        have_prompt = [chat[: len(prompt)] == prompt for chat in (chosen, rejected)]
        if not any(have_prompt):
            chosen, rejected = prompt + chosen, prompt + rejected
        elif not all(have_prompt):
            raise ValueError("has the prompt within one of the two responses and not the other")
    common_chat, chosen, rejected = split_chats(chosen, rejected)  # whole dialogues
    contents = [message["content"] for message in common_chat]  # of the prompt
    if isinstance(prompt, str) and prompt not in contents:
        raise ValueError("has a string as the prompt that is no message of the two chats")
    return common_chat, chosen, rejected


def split_texts(chosen, rejected):
    """Returns (common prompt, rest of chosen, rest of rejected) of two whole dialogues as strings.

    In the format of Anthropic's HH data the prompt ends with the last "Assistant:" of both. Without
    one it ends before the first word that differs and the space before it: cut elsewhere, the rest
    would begin with tokens that no other text has there.
    """
    opening = os.path.commonprefix([chosen, rejected])
    marker = "\n\nAssistant:"
    if marker in opening:
        length = opening.rindex(marker) + len(marker)  # up to the last answer of both
    else:
        last_word = "" if opening[-1:].isspace() else (opening.split() or [""])[-1]
        length = len(opening[: len(opening) - len(last_word)].rstrip())
    return opening[:length], chosen[length:], rejected[length:]


def split_chats(chosen, rejected):
    """Returns (common messages, rest of chosen, rest of rejected), rests by the assistant."""
    for rest in (chosen, rejected):
        if rest[-1]["role"] != "assistant":
            raise ValueError("has a chat that does not end with the assistant's message")
    length = 0  # messages that both have, up to an answer
    for i, (one, other) in enumerate(zip(chosen, rejected)):
        is_answer = i > 0 and chosen[i - 1]["role"] != "assistant"
        if is_answer and one["role"] == other["role"] == "assistant":
            length = i
        if one != other:
            break
    if length == 0:
        what = "has two chats without a common message that the assistant answers"
        raise ValueError(f"{what}; put the prompt, as messages, into both or under 'prompt'")
    return chosen[:length], chosen[length:], rejected[length:]


def prompt_of(row):
    """Returns a row's prompt: no prompt should be both trained on and held out."""
    try:
        return preference(row)[0]
    except ValueError:  # `encode_row` refuses the row, with its place
        return row.get("prompt")


def encode_row(row, tokenizer, eos_ids, cfg):
    """Yields the (chosen ids, rejected ids) of a row, prompt and response with EOS, or why not."""
    prompt, chosen, rejected = preference(row)
    tools = row.get("tools")  # JSON schemas for the chat template
    prompt_ids, chosen_ids = common.encode(tokenizer, prompt, chosen, eos_ids, tools)
    _, rejected_ids = common.encode(tokenizer, prompt, rejected, eos_ids, tools)
    reason = harness.too_long(cfg, prompt_ids, max(chosen_ids, rejected_ids, key=len))
    if chosen_ids == rejected_ids:
        reason = "chosen and rejected the same"  # its loss is log 2 and its gradient 0
    yield reason or (prompt_ids + chosen_ids, prompt_ids + rejected_ids)


# === 3. Scores and loss: eqs. 1-2 =================================================================
def pair_scores(model, pairs, pad_id):
    """Returns the scores of the chosen and of the rejected texts, (B,) float32 each, from one
    forward pass.
    """
    texts = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]  # 2B lists
    tokens, attention_mask = common.pad(texts, pad_id, "right")  # (2B, T)
    tokens, attention_mask = tokens.to(model.device), attention_mask.to(model.device)  # (2B, T)
    return common.text_scores(model, tokens, attention_mask).chunk(2)  # read at the last token


def preference_loss(chosen_scores, rejected_scores):
    """Returns the negative log-likelihood of each pair, (B,) in nats; log 2 for equal scores."""
    return -F.logsigmoid(chosen_scores - rejected_scores)  # eqs. 1-2


# === 4. Held-out evaluation =======================================================================
@torch.no_grad()
def score_pairs(model, pairs, microbatch_size, pad_id, name):
    """Returns the chosen and the rejected scores of all pairs, (N,) float32 each, on the CPU."""
    order = sorted(range(len(pairs)), key=lambda i: max(map(len, pairs[i])))  # little padding
    order = common.share(order)  # under torchrun a part, else all
    scores = torch.zeros(2, len(pairs), device=model.device)  # chosen, rejected
    for start in tqdm(range(0, len(order), microbatch_size), desc=name, leave=False):
        rows = order[start : start + microbatch_size]  # indices of pairs
        chosen, rejected = pair_scores(model, [pairs[i] for i in rows], pad_id)  # (b,) each
        scores[:, rows] = torch.stack([chosen, rejected])  # in the order of the pairs
    chosen, rejected = common.total(scores).cpu()
    return chosen, rejected


def accuracy(better, worse):
    """Returns the share of pairs with better > worse, ties counting half, and twice its standard
    error: that of Agresti and Coull 1998, which adds two wins and two losses, so that it is not 0
    for a few pairs that were all won.
    """
    share = ((better > worse).float() + 0.5 * (better == worse).float()).mean().item()
    number = len(better) + 4  # two wins and two losses more
    expected = (share * len(better) + 2) / number  # the share with them
    return share, 2 * math.sqrt(expected * (1 - expected) / number)


def held_out_metrics(chosen, rejected, pairs):
    """Returns held-out metrics from raw scores, because eq. 1 is about scores before (3)."""
    right, two_sigma = accuracy(chosen, rejected)  # chosen above rejected
    chosen_lengths = torch.tensor([float(len(text)) for text, _ in pairs])
    rejected_lengths = torch.tensor([float(len(text)) for _, text in pairs])
    longer_wins, _ = accuracy(chosen_lengths, rejected_lengths)  # a trivial rival
    return {
        "loss": preference_loss(chosen, rejected).mean().item(),  # below log 2 = 0.693
        "accuracy": right,  # 0.6 to 0.75 on human labels; near 1 suggests a leak
        "accuracy_two_sigma": two_sigma,
        "longer_wins": longer_wins,  # accuracy should clearly beat this and 1 - this
    }


def print_result(row, drift):
    """Prints the accuracy beside its trivial rival, the loss, and the scale."""
    print(
        f"\nheld-out accuracy {row['accuracy']:.3f} +- {row['accuracy_two_sigma']:.3f} (2 sigma); "
        f"always choosing the longer text: {row['longer_wins']:.3f}\n"
        f"held-out loss {row['loss']:.3f} nats; equal scores would give {math.log(2):.3f}\n"
        f"score mean {row['reward_mean']:.3f}, standard deviation {row['reward_std']:.3f}; "
        f"after reloading, scores differ by at most {drift:.1g}"
    )


# === Main loop ====================================================================================
def check_saved(run, model, tokenizer, eval_pairs, chosen, rejected, microbatch_size):
    """Writes the scale into the checkpoint's config, loads the checkpoint, and returns the largest
    difference of its scores from those expected. A lost head would give noise.
    """
    folder = harness.checkpoints(run.folder)[-1]  # of the last step
    if harness.RANK == 0:
        model.config.save_pretrained(folder)  # where PPO will find the scale
    harness.greatest(0)  # all processes read it
    saved, _ = common.load_scalar_model(
        str(folder), tokenizer, trust_remote_code=run.cfg.trust_remote_code
    )
    common.to_device(saved.requires_grad_(False), run.device, run.cfg.dtype)
    new_chosen, new_rejected = score_pairs(
        saved, eval_pairs, microbatch_size, tokenizer.pad_token_id, "reload"
    )
    drift = max((new_chosen - chosen).abs().max(), (new_rejected - rejected).abs().max()).item()
    if not drift < 1e-3:
        raise UserError(f"the model in {folder} gives other scores, by up to {drift:.2g}")
    return drift


def main(cfg):
    run = harness.Run(cfg)  # seeds, takes --output, reads the checkpoint of --resume

    # Data, tokenizer, model, optimizer
    rows = harness.read_rows(cfg.data or [str(DATA / "preferences.jsonl")], FORMATS)
    if cfg.eval_data is None:
        rows, eval_rows = harness.hold_out(rows, 512, cfg.seed, prompt_of)  # a tenth, at most 512
    else:
        eval_rows = harness.read_rows(cfg.eval_data, FORMATS)
        harness.report_overlap(rows, eval_rows, prompt_of)  # prompts that both have
    code = cfg.trust_remote_code  # may a model bring code of its own?
    made_by = "python sft.py"
    tokenizer = common.load_tokenizer(cfg.model, made_by, code, cfg.chat_template_kwargs)
    common.give_pad_token(tokenizer)  # other code finds a text's last token by it
    model, head_is_new = common.load_scalar_model(
        cfg.model, tokenizer, made_by, trust_remote_code=code
    )
    if head_is_new:  # --model was a causal LM
        init_head(model)
    model.config.reward_mean = 0.0  # raw scores until eq. 3
    model.config.reward_std = 1.0
    common.add_adapters(model, cfg.lora_rank, cfg.model)  # with --lora-rank
    pad_id = tokenizer.pad_token_id
    eos_ids = common.eos_token_ids(tokenizer, model)  # a list

    def encode(row):
        return encode_row(row, tokenizer, eos_ids, cfg)

    pairs = harness.convert(rows, encode)  # prints what was dropped, and why
    eval_pairs = harness.convert(eval_rows, encode, "held out")
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected in pairs]  # in tokens
    eval_lengths = [max(len(chosen), len(rejected)) for chosen, rejected in eval_pairs]
    longest = max(lengths + eval_lengths)
    common.check_context(model, longest)  # has it as many positions?
    common.to_device(model, run.device, cfg.dtype, cfg.gradient_checkpointing)  # and precision
    num_steps = cfg.epochs * math.ceil(len(pairs) / cfg.batch_size)  # an epoch's last is smaller
    optimizer, schedule = harness.adamw_with_cosine(cfg, model, LR_BY_SIZE, num_steps)
    harness.print_models([("reward model", model)])
    harness.print_steps(cfg, len(pairs), len(eval_pairs), num_steps, optimizer)
    harness.print_tokens(tokenizer, model, pairs[0][0])  # is the EOS there?
    largest = ([pad_id] * longest, [pad_id] * (longest - 1))  # for the dry run; with padding

    def try_size(size):
        chosen, rejected = pair_scores(model, [largest] * size, pad_id)
        preference_loss(chosen, rejected).sum().backward()

    microbatch_size = harness.choose_microbatch_size(run, optimizer, 32, cfg.batch_size, try_size)
    run.restore(tokenizer, {"reward_model": model}, optimizer, schedule)  # and opens the logs

    generator = torch.Generator().manual_seed(cfg.seed)  # its own: --resume draws the same again
    batches = common.epochs_by_length(lengths, cfg.batch_size, generator)
    for step, index in run.steps(batches, num_steps):
        run.phase("backward")
        loss = 0.0  # of the batch
        num_right = 0
        part = common.share(index)  # under torchrun this process's part, else all
        for start in range(0, len(part), microbatch_size):
            micro = [pairs[i] for i in part[start : start + microbatch_size]]
            chosen, rejected = pair_scores(model, micro, pad_id)  # (b,) each
            micro_loss = preference_loss(chosen, rejected).sum() / len(index)  # divided once
            micro_loss.backward()  # gradients add up to those of the whole batch
            loss += micro_loss.item()  # in nats per pair
            num_right += (chosen > rejected).sum().item()  # pairs
        sums = {"loss": loss, "num_right": num_right}  # of this process
        sums = harness.sum_over_processes([model], sums)  # and gradients; alone: as it is
        grad_norm = clip_grad_norm_(model.parameters(), cfg.max_grad_norm)  # before clipping
        if run.may_step(grad_norm):  # finite
            optimizer.step()  # AdamW
        optimizer.zero_grad()  # for the next step
        run.log({
            "iteration": step,
            "loss": float(sums["loss"]),  # nats per pair; from about 0.7 (log 2 is 0.693) down
            "accuracy": float(sums["num_right"]) / len(index),  # in epoch 1 of new pairs; rises
            "grad_norm": grad_norm.item(),  # before clipping; steady after the warm-up
            "lr": schedule.get_last_lr()[0],  # up, then down
        }, shown=("loss", "accuracy"))
        schedule.step()  # the learning rate of the next step
        run.save_if_due({})

    # Held-out result, scale (eq. 3)
    run.phase("evaluation")
    common.merge_adapters(model)  # what is saved and evaluated
    chosen, rejected = score_pairs(model, eval_pairs, microbatch_size, pad_id, "held-out pairs")
    reference = torch.cat(score_pairs(model, pairs, microbatch_size, pad_id, "score scale"))
    mean, std = reference.mean().item(), reference.std().item()  # of all training responses
    if not std > 1e-6 * max(1, abs(mean)):  # or nan
        raise UserError("the model gives all texts one score, or none; lower --lr or check --data")
    model.config.reward_mean, model.config.reward_std = mean, std  # PPO reads them
    row = {"split": "eval", "iteration": num_steps, "reward_mean": mean, "reward_std": std}
    row |= held_out_metrics(chosen, rejected, eval_pairs)
    run.log(row)  # the `eval` row
    chosen_scaled, rejected_scaled = (chosen - mean) / std, (rejected - mean) / std  # eq. 3
    drift = check_saved(
        run, model, tokenizer, eval_pairs, chosen_scaled, rejected_scaled, microbatch_size
    )
    run.finish()  # --output becomes a model folder
    print_result(row, drift)
    prompts = "" if cfg.data is None else " --prompts YOUR_PROMPTS.jsonl"  # like those of the pairs
    flags = f"--policy {cfg.model} --reward {cfg.output}{prompts}"
    print(f"\nwrote {cfg.output}; next: python ppo.py {flags}")


if __name__ == "__main__":
    harness.run_stage(main, Config, __doc__.splitlines()[0])
