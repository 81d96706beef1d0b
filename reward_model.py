"""Stage 2 of RLHF, the reward model: one number per text, fitted to which of two responses a human preferred.

Goal      maximise the likelihood of the preferences under Bradley and Terry's model:

(1) model       P(chosen preferred) = sigma(s_chosen - s_rejected)
(2) loss        L = - mean over the batch's pairs of  log sigma(s_chosen - s_rejected)
(3) scale       s <- (s - mean) / deviation, both over the training completions, so that PPO's rewards have a unit

          Only differences enter (1), so the pairs do not say where zero is; (3) puts it at the average completion.
          Without (3) a KL coefficient or a penalty for a missing EOS would mean something else for every model.

Shapes    B pairs; 2B sequences of T tokens (padded on the right), the chosen ones first; scores (2B,).
Score     A linear head reads the last attended token, normally the EOS that ends the response: there a causal model
          has seen the whole text. It is found by the attention mask, never by asking which token is the pad token.
Head      New heads start at N(0, 1/sqrt(d + 1)) with d inputs: scores of order 1, a loss near log 2 (Huang et al. 2024).
One epoch Preference labels are noisy and few; a second pass mostly memorises them (Stiennon et al. 2020 train one).

Differs   Chosen and rejected run through one forward pass: half the calls, and both see the same arithmetic.
          The head is never left out of a checkpoint, and the scores after reloading it are checked against those before.

Settings for a model of about 1 B parameters to start from: lr 3e-6, one epoch, batches of 64 pairs, cosine decay
(Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", TL;DR summarisation with Pythia 1B, where the
held-out accuracy is 0.628; 0.669 at 2.8 B and 0.689 at 6.9 B).

Run       python reward_model.py                                   from ckpt/sft, on data/
          python reward_model.py --model ckpt/sft --data mine.jsonl  {"prompt", "chosen", "rejected"} per line
Writes    ckpt/reward_model, an ordinary Hugging Face folder with reward_mean and reward_std in its config
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

import common
from common import UserError, arg


# === 0. Configuration =============================================================================
@dataclass(frozen=True)
class Config:
    model: str = arg("ckpt/sft", "causal LM to start from, folder or hub id; or a reward model, to train it further", "model and data")
    data: str = arg(str(common.DATA / "preferences.jsonl"), "preference pairs, JSONL rows of prompt, chosen, rejected")
    eval_data: str | None = arg(None, "held-out pairs; without it a tenth of --data, at most 512 pairs")
    output: str = arg("ckpt/reward_model", "folder for the trained model")
    max_prompt_length: int = arg(512, "longest prompt in tokens; pairs above it are dropped and counted")
    response_length: int = arg(512, "longest response in tokens, EOS included; pairs above it are dropped and counted")

    epochs: int = arg(1, "passes over the pairs; more than 1 mostly memorises the noise in the labels", "optimisation")
    batch_size: int = arg(32, "pairs per optimizer step")
    microbatch_size: int = arg(32, "pairs per forward pass; changes memory, not the gradient")
    lr: float | None = arg(None, "peak learning rate; without it 1e-3 below 10 M parameters, 1e-5 below 1 B, 3e-6 above")
    warmup: float = arg(0.05, "share of the steps in which the learning rate rises from 0; then it follows a cosine to 0")
    weight_decay: float = arg(0.0, "AdamW's decoupled weight decay; 0 to 0.1")
    max_grad_norm: float = arg(1.0, "gradient clipping, by the norm over all parameters")

    seed: int = arg(0, "seed of the head and the data order", "run")
    device: str = arg("auto", "cpu, cuda, cuda:1; auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "arithmetic of the matrix products; weights are float32; auto is bf16 on CUDA")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, a third slower")


LR_BY_SIZE = ((10e6, 1e-3), (1e9, 1e-5), (float("inf"), 3e-6))  # (parameters below, learning rate)


def check_config(cfg):
    """Every rule about the flags that needs no model."""
    many = (1, float("inf"))
    common.check_range(
        cfg, max_prompt_length=many, response_length=many, epochs=many, batch_size=many,
        microbatch_size=(1, cfg.batch_size), lr=(0, 1), warmup=(0, 1), weight_decay=(0, 1),
        max_grad_norm=(1e-9, math.inf),
    )  # fmt: skip


# === 1. Model: a causal LM's trunk and one number =================================================
def init_head(model):
    """Start the score head at N(0, 1/sqrt(d + 1)), bias 0: the scores of unit-sized features are then of order 1."""
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    if model.score.bias is not None:
        torch.nn.init.zeros_(model.score.bias)


# === 2. Data ======================================================================================
# FORK: other preference formats become (prompt, chosen, rejected) here.
def encode_rows(rows, tokenizer, cfg, source):
    """Rows as [(chosen ids, rejected ids)], prompt and response with EOS in each, without pairs that are too long."""
    pairs = []
    for row in rows:
        prompt = common.encode_prompt(tokenizer, row["prompt"])
        responses = [common.encode_response(tokenizer, row[key]) for key in ("chosen", "rejected")]
        if len(prompt) <= cfg.max_prompt_length and max(map(len, responses)) <= cfg.response_length:
            pairs.append(tuple(prompt + response for response in responses))
    common.report_dropped(len(rows) - len(pairs), len(rows), source)
    return pairs


# === 3. Scores and loss: eqs. 1-2 =================================================================
def pair_scores(model, pairs, pad_id, device):
    """Scores of the chosen and of the rejected texts, each (B,) float32, from one forward pass over all 2B."""
    texts = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    tokens, attention_mask = (x.to(device) for x in common.pad(texts, pad_id, "right"))  # (2B, T)
    scores = common.token_scores(model, tokens, attention_mask)  # (2B, T)
    scores = scores.gather(1, common.last_token_index(attention_mask)[:, None]).squeeze(1)  # (2B,)
    return scores.chunk(2)


def preference_loss(chosen_scores, rejected_scores):
    """Bradley-Terry negative log-likelihood of each pair, (B,) in nats; log 2 for a model that knows nothing."""
    return -F.logsigmoid(chosen_scores - rejected_scores)  # eqs. 1-2


# === 4. Held-out evaluation =======================================================================
@torch.no_grad()
def score_pairs(model, pairs, cfg, pad_id, device, desc=None):
    """Chosen and rejected scores of all pairs, each (N,) float32 on the CPU, in the order of the pairs."""
    chosen, rejected = [], []
    order = sorted(range(len(pairs)), key=lambda i: max(map(len, pairs[i])))  # rows of like length share a batch
    for start in tqdm(range(0, len(order), cfg.microbatch_size), desc=desc, disable=desc is None, leave=False):
        with common.arithmetic(device, cfg.dtype):
            batch = [pairs[i] for i in order[start : start + cfg.microbatch_size]]
            scores = pair_scores(model, batch, pad_id, device)
        chosen.append(scores[0].cpu())
        rejected.append(scores[1].cpu())
    back = torch.tensor(order).argsort()
    return torch.cat(chosen)[back], torch.cat(rejected)[back]


def accuracy(wins):
    """(share, 2 sigma) of a list of 1, 0 and, for a tie, 0.5: the mean and twice its binomial standard error."""
    share = sum(wins) / len(wins)
    return share, 2 * math.sqrt(share * (1 - share) / len(wins))


def calibration(differences, num_bins=4):
    """Is the model as sure as it is right? Rows (mean |difference|, promised accuracy, accuracy), by |difference|.

    Promised is the mean of sigma(|s_chosen - s_rejected|), which eq. 1 says is the chance that the higher score wins.
    """
    rows = []
    for bin in differences[differences.abs().argsort()].tensor_split(num_bins):
        if len(bin):
            rows.append((bin.abs().mean().item(), bin.abs().sigmoid().mean().item(), (bin > 0).float().mean().item()))
    return rows


# === Main loop ====================================================================================
def main(cfg):
    check_config(cfg)
    set_seed(cfg.seed)
    device = common.pick_device(cfg.device)
    common.prepare_output(cfg.output)

    # -- setup: data, tokenizer, model, optimizer
    formats = [("prompt", "chosen", "rejected")]
    rows = common.read_rows(cfg.data, formats)
    if cfg.eval_data:
        eval_rows = common.read_rows(cfg.eval_data, formats)
    else:
        rows, eval_rows = common.hold_out(rows, 512, cfg.seed)
    tokenizer = common.load_tokenizer(cfg.model, made_by="python sft.py")
    model, head_is_new = common.load_scalar_model(cfg.model, tokenizer, made_by="python sft.py")
    if head_is_new:
        init_head(model)
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0  # raw scores while training; eq. 3 sets them at the end
    model.to(device)
    pairs = encode_rows(rows, tokenizer, cfg, cfg.data)
    eval_pairs = encode_rows(eval_rows, tokenizer, cfg, cfg.eval_data or f"the held-out part of {cfg.data}")
    common.check_context(model, max(len(ids) for pair in pairs + eval_pairs for ids in pair), "--response-length")
    if cfg.gradient_checkpointing:
        common.enable_gradient_checkpointing(model)
    num_steps = cfg.epochs * math.ceil(len(pairs) / cfg.batch_size)
    lr = common.by_size(cfg.lr, LR_BY_SIZE, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=cfg.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(cfg.warmup * num_steps), num_steps)
    generator = torch.Generator().manual_seed(cfg.seed)
    pad_id = tokenizer.pad_token_id

    # -- startup report
    print(common.describe("reward model", model, trained=True))
    print(f"  {len(pairs)} pairs, {len(eval_pairs)} held out; {cfg.epochs} epoch(s) of {cfg.batch_size} pairs per optimizer "
          f"step = {num_steps} steps; lr {lr:g}" + ("" if cfg.lr else " (by model size; --lr sets it)"))  # fmt: skip
    common.print_tokens(tokenizer, model, pairs[0][0])

    log = []
    progress = tqdm(total=num_steps, desc="reward model", unit="step")
    for _ in range(cfg.epochs):
        for rows in common.length_bucketed([max(map(len, pair)) for pair in pairs], cfg.batch_size, generator):
            loss, num_right = 0.0, 0
            for start in range(0, len(rows), cfg.microbatch_size):  # same gradient at any size, less memory
                micro = [pairs[row] for row in rows[start : start + cfg.microbatch_size]]
                with common.arithmetic(device, cfg.dtype):
                    chosen, rejected = pair_scores(model, micro, pad_id, device)
                micro_loss = preference_loss(chosen, rejected).sum() / len(rows)  # divided once, by the batch's pairs
                micro_loss.backward()
                loss += micro_loss.item()
                num_right += (chosen > rejected).sum().item()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            log.append(
                {
                    "iteration": len(log) + 1,
                    "loss": loss,  # nats per pair; from about 0.69 (= log 2) downwards
                    "accuracy": num_right / len(rows),  # on pairs not yet trained on in the first epoch; above 0.5
                    "grad_norm": grad_norm.item(),  # before clipping
                    "lr": schedule.get_last_lr()[0],
                }
            )
            progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{log[-1]['accuracy']:.2f}")
            progress.update()
    progress.close()

    # -- scale: eq. 3
    scores = torch.cat(score_pairs(model, pairs, cfg, pad_id, device, desc="score scale"))
    model.config.reward_mean, model.config.reward_std = scores.mean().item(), scores.std().item()
    if not model.config.reward_std > 0:
        raise UserError("all texts get the same score, so there is nothing to save; check --lr and the data")

    # -- checkpoint, read back and held to the scores from before
    before = score_pairs(model, eval_pairs, cfg, pad_id, device)
    chosen, rejected = before
    share, two_sigma = accuracy(((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).tolist())
    longer, _ = accuracy([(len(c) > len(r)) + 0.5 * (len(c) == len(r)) for c, r in eval_pairs])
    raw_differences = (chosen - rejected) * model.config.reward_std  # eq. 1 is about the raw scores
    eval_loss = preference_loss(raw_differences, 0 * raw_differences).mean().item()
    log.append({"split": "eval", "iteration": num_steps, "loss": eval_loss, "accuracy": share, "accuracy_two_sigma": two_sigma,
                "longer_wins": longer, "reward_mean": model.config.reward_mean, "reward_std": model.config.reward_std})  # fmt: skip
    with common.written_whole(cfg.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for row in log:
            common.append_json_line(folder / "metrics.jsonl", row)
        reloaded, _ = common.load_scalar_model(str(folder), tokenizer)
        after = score_pairs(reloaded.to(device), eval_pairs, cfg, pad_id, device)
        drift = max((a - b).abs().max().item() for a, b in zip(before, after))
        if drift > 1e-3:
            raise UserError(f"the saved model scores differently by up to {drift:.2g} (in deviations); nothing was kept")

    # -- report
    print(f"\nheld-out accuracy {share:.3f} +- {two_sigma:.3f} (2 sigma, {len(eval_pairs)} pairs); the rule 'the longer one "
          f"wins' has {longer:.3f}\nheld-out loss {eval_loss:.3f} nats (knowing nothing: {math.log(2):.3f})")  # fmt: skip
    print(f"scores before scaling: mean {model.config.reward_mean:.3f}, deviation {model.config.reward_std:.3f}; after reloading "
          f"they differ by at most {drift:.1g}")  # fmt: skip
    print("calibration   |difference|   promised   right")
    for size, promised, right in calibration(raw_differences):
        print(f"              {size:>12.2f}{promised:>11.2f}{right:>8.2f}")
    print(f"wrote {cfg.output}; next: python ppo.py --policy ckpt/sft --reward {cfg.output}")


if __name__ == "__main__":
    with common.command_line():
        main(common.parse_args(Config, __doc__.splitlines()[0]))
