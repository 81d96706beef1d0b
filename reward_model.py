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
          finished also trainer_state/ (for --resume)
"""

import itertools
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

import common
from common import UserError, arg


# === 0. Configuration =============================================================================
# An optimizer step takes --batch-size pairs; --microbatch-size of them are in memory at a time.
@dataclass(frozen=True)
class Config:
    model: str = arg("ckpt/sft", "causal LM, or a reward model to train on", "model and data")
    data: list[str] = arg([str(common.DATA / "preferences.jsonl")], "JSONL; see the README")
    eval_data: list[str] | None = arg(None, "held-out pairs; else a tenth of --data, at most 512")
    output: str = arg("ckpt/reward_model", "folder for the trained model")
    max_prompt_length: int = arg(512, "in tokens; pairs above are dropped and counted")
    response_length: int = arg(512, "in tokens, EOS included; pairs above are dropped and counted")

    epochs: int = arg(1, "passes over the pairs; 1", "optimisation")
    batch_size: int = arg(32, "pairs per optimizer step")
    microbatch_size: int = arg(32, "pairs per forward pass; memory only, same gradient")
    lr: float | None = arg(None, "peak learning rate; by size if not given, see LR_BY_SIZE")
    warmup: float = arg(0.05, "share of the steps in which lr rises from 0; then a cosine to 0")
    weight_decay: float = arg(0.0, "of AdamW; 0 to 0.1")
    max_grad_norm: float = arg(1.0, "clip the gradient to this norm")

    save_every: int = arg(500, "optimizer steps between checkpoints", "run")
    resume: bool = arg(False, "go on with the run in --output, if there is one")
    overwrite: bool = arg(False, "start anew although --output holds a run")
    tensorboard: bool = arg(False, "write the metrics for TensorBoard too, if it is installed")
    seed: int = arg(0, "of the head and the data order")
    device: str = arg("auto", "cpu, cuda, cuda:1; auto is a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "of matrix products; bf16 on CUDA")
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, more time")
    trust_remote_code: bool = arg(False, "run code that comes with --model")


# Learning rates by number of parameters: what a tiny model learns from, a large one forgets from.
LR_BY_SIZE = ((10e6, 1e-3), (1e9, 1e-5), (math.inf, 3e-6))  # (parameters below, learning rate)


def check_config(cfg):
    """Every rule about the flags that needs no model."""
    many = (1, math.inf)
    common.check_range(
        cfg, max_prompt_length=many, response_length=many, epochs=many, batch_size=many,
        microbatch_size=many, lr=(0, 1), warmup=(0, 1), weight_decay=(0, 1),
        max_grad_norm=(1e-9, math.inf), save_every=many,
    )
    if cfg.tensorboard:
        common.import_tensorboard()


# Where memory may run out: {function: (what it does, the flag to halve)}
MEMORY_FLAGS = {
    "main": ("the update", "--microbatch-size"), "score_pairs": ("scoring", "--microbatch-size")
}


# === 1. Model: a causal LM's trunk and one number =================================================
def init_head(model):
    """Start the head at deviation 1/sqrt(d + 1): scores of order 1 from features of order 1."""
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    if model.score.bias is not None:
        torch.nn.init.zeros_(model.score.bias)


# === 2. Data ======================================================================================
# FORK: other data formats become a prompt, a chosen and a rejected response here.
def row_dialogues(row):
    """(prompt, chosen, rejected) of a data row, as `common.encode` takes them.

    Without a "prompt", or where chosen and rejected are chats, they may be whole dialogues: then
    what both begin with is the prompt.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("has a string as one response and messages as the other")
    if isinstance(chosen, str):
        return (prompt, chosen, rejected) if "prompt" in row else split_texts(chosen, rejected)
    if isinstance(prompt, list):
        whole = [chat[: len(prompt)] == prompt for chat in (chosen, rejected)]
        if not any(whole):
            chosen, rejected = prompt + chosen, prompt + rejected
        elif not all(whole):
            raise ValueError("has the prompt within one of the two responses and not the other")
    dialogues = split_chats(chosen, rejected)
    if isinstance(prompt, str) and prompt not in [message["content"] for message in dialogues[0]]:
        raise ValueError("has a string as the prompt that is no message of the two chats")
    return dialogues


def split_texts(chosen, rejected):
    """(common prompt, rest of chosen, rest of rejected) of two whole dialogues as strings.

    In the format of Anthropic's HH data the prompt ends with the last "Assistant:" that both have.
    Without one it ends before the word in which they part: cut within a word, or behind the space,
    the rest would have other tokens than in any other text.
    """
    opening, marker = os.path.commonprefix([chosen, rejected]), "\n\nAssistant:"
    if marker in opening:
        length = opening.rindex(marker) + len(marker)
    else:
        last_word = "" if opening[-1:].isspace() else (opening.split() or [""])[-1]
        length = len(opening[: len(opening) - len(last_word)].rstrip())
    return opening[:length], chosen[length:], rejected[length:]


def split_chats(chosen, rejected):
    """(common messages, rest of chosen, rest of rejected), each rest the assistant's to begin."""
    for rest in (chosen, rejected):
        if rest[-1]["role"] != "assistant":
            raise ValueError("has a chat that does not end with the assistant's message")
    length = 0
    for i, (one, other) in enumerate(zip(chosen, rejected)):
        answers = i and chosen[i - 1]["role"] != "assistant"
        if answers and one["role"] == other["role"] == "assistant":
            length = i
        if one != other:
            break
    if length == 0:
        raise ValueError(
            "has two chats that share no message which the assistant answers; put the prompt, as "
            "messages, into both or under 'prompt'"
        )
    return chosen[:length], chosen[length:], rejected[length:]


def encode_row(row, tokenizer, eos_ids, cfg):
    """The (chosen ids, rejected ids) of a row, prompt and response with EOS, or why not."""
    prompt, chosen, rejected = row_dialogues(row)
    prompt_ids, chosen_ids = common.encode(tokenizer, prompt, chosen, eos_ids)
    _, rejected_ids = common.encode(tokenizer, prompt, rejected, eos_ids)
    reason = common.too_long(cfg, prompt_ids, chosen_ids, rejected_ids)
    if chosen_ids == rejected_ids:
        reason = "chosen and rejected the same"
    yield reason or (prompt_ids + chosen_ids, prompt_ids + rejected_ids)


# === 3. Scores and loss: eqs. 1-2 =================================================================
def pair_scores(model, pairs, pad_id, device):
    """Scores of the chosen and of the rejected texts, (B,) float32 each, from one forward pass."""
    texts = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    tokens, attention_mask = (x.to(device) for x in common.pad(texts, pad_id, "right"))  # (2B, T)
    token_scores = common.token_scores(model, tokens, attention_mask)  # (2B, T)
    last_index = common.last_token_index(attention_mask)  # (2B,)
    return token_scores.gather(1, last_index[:, None]).squeeze(1).chunk(2)


def preference_loss(chosen_scores, rejected_scores):
    """Negative log-likelihood of each pair, (B,) in nats; log 2 where the scores are equal."""
    return -F.logsigmoid(chosen_scores - rejected_scores)  # eqs. 1-2


# === 4. Held-out evaluation =======================================================================
@torch.no_grad()
def score_pairs(model, pairs, cfg, pad_id, device, desc):
    """Chosen and rejected scores of all pairs, (N,) float32 each, on the CPU, in their order."""
    order = sorted(range(len(pairs)), key=lambda i: max(map(len, pairs[i])))  # little padding
    parts = []
    for start in tqdm(range(0, len(order), cfg.microbatch_size), desc=desc, leave=False):
        micro = [pairs[i] for i in order[start : start + cfg.microbatch_size]]
        with common.arithmetic(device, cfg.dtype):
            parts.append([scores.cpu() for scores in pair_scores(model, micro, pad_id, device)])
    in_order = torch.tensor(order).argsort()
    return [torch.cat(scores)[in_order] for scores in zip(*parts)]


def accuracy(better, worse):
    """(share of pairs with better > worse, ties counting half; twice its standard error)."""
    share = ((better > worse).float() + 0.5 * (better == worse).float()).mean().item()
    return share, 2 * math.sqrt(share * (1 - share) / len(better))


def calibration(differences, num_bins=4):
    """Is the model as sure as it is right? A row per quantile of |s_chosen - s_rejected|.

    Each row is (mean |difference|, promised accuracy, accuracy). Promised is the mean of
    sigma(|difference|): by eq. 1, the chance that the text with the higher score is preferred.
    """
    rows = []
    for group in differences[differences.abs().argsort()].tensor_split(num_bins):
        if len(group):
            size = group.abs()
            right, _ = accuracy(group, torch.zeros_like(group))
            rows.append((size.mean().item(), size.sigmoid().mean().item(), right))
    return rows


def held_out_metrics(raw_chosen, raw_rejected, pairs):
    """The `eval` row of metrics.jsonl, from raw scores: eq. 1 is about those, not scaled ones."""
    right, two_sigma = accuracy(raw_chosen, raw_rejected)
    lengths = [torch.tensor([float(len(text)) for text in texts]) for texts in zip(*pairs)]
    return {
        "loss": preference_loss(raw_chosen, raw_rejected).mean().item(),  # below log 2 = 0.693
        "accuracy": right,  # 0.6 to 0.75 on human labels; near 1 suggests a leak
        "accuracy_two_sigma": two_sigma,
        "longer_wins": accuracy(*lengths)[0],  # accuracy should beat this and 1 - this clearly
    }


# === Main loop ====================================================================================
def load_data(cfg):
    """(training rows, held-out rows)."""
    formats = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
    rows = common.read_rows(cfg.data, formats)
    if cfg.eval_data is not None:
        return rows, common.read_rows(cfg.eval_data, formats)
    return common.hold_out(rows, 512, cfg.seed, "--eval-data")


def save_and_read_back(model, tokenizer, eval_pairs, expected, cfg, device):
    """Write the folder; keep it only if the model that is read from it gives the same scores."""
    with common.saved_run(cfg) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        trust = cfg.trust_remote_code
        reloaded, _ = common.load_scalar_model(str(folder), tokenizer, trust_remote_code=trust)
        pad_id = tokenizer.pad_token_id
        scores = score_pairs(reloaded.to(device), eval_pairs, cfg, pad_id, device, "reload")
        drift = max((new - old).abs().max().item() for new, old in zip(scores, expected))
        if not drift < 1e-3:
            raise UserError(f"the saved model scores differently, by up to {drift:.2g}: not kept")
    return drift


def print_result(row, raw_chosen, raw_rejected, drift):
    """Accuracy beside its trivial rival, calibration, and the scale that PPO will use."""
    print(
        f"\nheld-out accuracy {row['accuracy']:.3f} +- {row['accuracy_two_sigma']:.3f} (2 sigma); "
        f"'the longer one wins' has {row['longer_wins']:.3f}\n"
        f"held-out loss {row['loss']:.3f} nats; knowing nothing has {math.log(2):.3f}\n"
        f"score mean {row['reward_mean']:.3f}, deviation {row['reward_std']:.3f}; "
        f"scores after reloading differ by at most {drift:.1g}\n"
        f"\n{'score difference':>18}{'promised accuracy':>20}{'accuracy':>11}"
    )
    for size, promised, right in calibration(raw_chosen - raw_rejected):
        print(f"{size:>18.2f}{promised:>20.2f}{right:>11.2f}")


def main(cfg):
    check_config(cfg)
    set_seed(cfg.seed)
    device = common.pick_device(cfg.device)
    state = common.open_run(cfg)

    # -- setup: data, tokenizer, model, optimizer
    rows, eval_rows = load_data(cfg)
    made_by, trust = "python sft.py", cfg.trust_remote_code
    source = cfg.output if state else cfg.model
    tokenizer = common.load_tokenizer(source, made_by, trust)
    model, head_is_new = common.load_scalar_model(source, tokenizer, made_by, trust)
    if head_is_new:
        init_head(model)
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0  # raw scores until eq. 3, below
    pad_id, eos_ids = tokenizer.pad_token_id, common.eos_token_ids(tokenizer, model)
    encode = lambda row: encode_row(row, tokenizer, eos_ids, cfg)
    pairs = common.convert_rows(rows, encode, " ".join(cfg.data))
    eval_pairs = common.convert_rows(eval_rows, encode, "held out")
    lengths = [max(map(len, pair)) for pair in pairs]
    longest = max(len(ids) for pair in pairs + eval_pairs for ids in pair)
    common.check_context(model, longest, "--max-prompt-length or --response-length")
    model.to(device)
    if cfg.gradient_checkpointing:
        common.enable_gradient_checkpointing(model)
    num_steps = cfg.epochs * math.ceil(len(pairs) / cfg.batch_size)
    lr = common.by_size(cfg.lr, LR_BY_SIZE, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=cfg.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(cfg.warmup * num_steps), num_steps)
    generator = torch.Generator().manual_seed(cfg.seed)

    # -- start-up report
    print(common.describe("reward model", model, trained=True))
    print(
        f"  {len(pairs)} pairs, {len(eval_pairs)} held out; {cfg.epochs} epochs x "
        f"{math.ceil(len(pairs) / cfg.batch_size)} batches of {cfg.batch_size} = {num_steps} "
        f"optimizer steps\n  peak lr {lr:g} (by model size, unless --lr is given)"
    )
    common.print_tokens(tokenizer, model, pairs[0][0])

    if state:
        common.restore(state, len(pairs), optimizer, schedule)
    steps_done = state["steps_done"] if state else 0
    log = common.open_log(common.start_logs(cfg, state), cfg.tensorboard)
    stop, skipped = common.StopRequest(), common.SkippedSteps()
    batches = common.endless_epochs(lengths, cfg.batch_size, generator)
    batches = itertools.islice(batches, steps_done, num_steps)  # a resumed run repeats the draws
    progress = tqdm(
        batches, desc="reward model", unit="step", initial=steps_done, total=num_steps
    )
    for step, rows in enumerate(progress, steps_done + 1):
        loss, num_right = 0.0, 0
        for start in range(0, len(rows), cfg.microbatch_size):  # same gradient, less memory
            micro = [pairs[row] for row in rows[start : start + cfg.microbatch_size]]
            with common.arithmetic(device, cfg.dtype):
                chosen, rejected = pair_scores(model, micro, pad_id, device)
            micro_loss = preference_loss(chosen, rejected).sum() / len(rows)  # divided once
            micro_loss.backward()
            loss += micro_loss.item()
            num_right += (chosen > rejected).sum().item()
        grad_norm = clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
        if skipped.may_step([grad_norm], f"up to step {step}, where the loss is {loss:.3g}"):
            optimizer.step()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        optimizer.zero_grad()

        row = {
            "iteration": step,
            "loss": loss,  # nats per pair; from 0.7 to 0.9 (log 2 is 0.693) down
            "accuracy": num_right / len(rows),  # of pairs not yet seen, in epoch 1; from 0.5 up
            "grad_norm": grad_norm,  # before clipping; steady after the warm-up
            "lr": lr,
        }
        log(row)
        shown = {key: f"{row[key]:.3f}" for key in ("loss", "accuracy")}
        progress.set_postfix(shown, refresh=False)
        if stop.signal or step % cfg.save_every == 0 or step == num_steps:
            more = {"steps_done": step}
            with common.saved_run(cfg, len(pairs), optimizer, schedule, **more) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            if stop.signal:
                progress.close()
                stop.leave(cfg)
    stop.close()

    # -- held-out result, scale (eq. 3), checkpoint
    raw = score_pairs(model, eval_pairs, cfg, pad_id, device, "held-out pairs")
    reference = torch.cat(score_pairs(model, pairs, cfg, pad_id, device, "score scale"))
    mean, deviation = reference.mean().item(), reference.std().item()
    if not deviation > 0:
        raise UserError("the model gives all texts one score, or none; lower --lr or check --data")
    model.config.reward_mean, model.config.reward_std = mean, deviation
    scale = {"reward_mean": mean, "reward_std": deviation}
    row = {"split": "eval", "iteration": num_steps} | held_out_metrics(*raw, eval_pairs) | scale
    log(row)
    expected = [(scores - mean) / deviation for scores in raw]  # eq. 3
    drift = save_and_read_back(model, tokenizer, eval_pairs, expected, cfg, device)
    print_result(row, *raw, drift)
    data = "" if cfg.data == Config().data else " --prompts YOUR_PROMPTS.jsonl"
    flags = f"--policy {cfg.model} --reward {cfg.output}{data}"
    print(f"\nwrote {cfg.output}; next: python ppo.py {flags}")


if __name__ == "__main__":
    with common.command_line(MEMORY_FLAGS):
        main(common.parse_args(Config, __doc__.splitlines()[0]))
