"""DPO, IPO and KTO: a policy learns from preferred pairs, without a reward model and rollouts.

Goal      PPO's:  maximise  E_{x ~ prompts, y ~ pi(.|x)}[ r(x, y) ] - beta * KL(pi || pi_ref)

          Its optimum is pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x). Solved for r, that says
          which reward a policy is the best for:  r(x, y) = beta * h(x, y) + beta * log Z(x), with

(1) log-ratio  h(x, y) = log pi(y|x) - log pi_ref(y|x), a sum over the tokens of y, its EOS too

          Put into Bradley and Terry's model of a preference, log Z cancels, and reward_model.py's
          loss becomes one of the policy itself. Chosen is y_w, rejected y_l:

(2) DPO   L = - mean  log sigma(beta * (h_w - h_l))
(3) IPO   L =   mean  (h_w - h_l - 1 / (2 beta))^2,  which also ends where all labels agree
(4) KTO   L =   mean over the texts of  1 - sigma(beta * (h_w - z))  or  1 - sigma(beta * (z - h_l))
(5)       z = max(0, mean h(x, y')), y' a response of another row; a constant for the gradient

          (3) is of the same optimum, with the chance that y wins as r in place of Bradley and
          Terry's score. (4) is not: it maximises a utility of h that is flat far from z.

Shapes    B pairs; 2B texts of T tokens (padded on the right), the chosen ones first.
Mask      As in sft.py: a completion and its EOS count, a prompt does not.
Models    One. log pi_ref is that of the policy before its first step, computed once and kept. With
          a --judge a copy of it stays too, for the KL of what is sampled.
beta      The weight of the KL, but of a reward that (1) invents: its scale is that of the labels'
          noise, so the number is not comparable with ppo.py's. Smaller goes further.

Differs   The papers' sums of log-probabilities, not means per token, in all three; some libraries
          take means for IPO. (4) has its paper's weights at 1: here each pair has one text of
          either kind. (5) is a mean over the whole batch, where the paper's code takes that of a
          micro-batch; y' is drawn once per row, so that its log pi_ref is kept like the others'.
          That other row may have the same prompt.

Sources   Rafailov et al. 2023 ((1), their eqs. 4 to 6, and (2), eq. 7); Azar et al. 2023 ((3), eq.
          17, whose tau is beta); Ethayarajh et al. 2024 ((4), eq. 8 as at ICML).

Run       python examples/beside_ppo/dpo.py                                  DPO, on data/
          python examples/beside_ppo/dpo.py --loss kto --output ckpt/kto
          python examples/beside_ppo/dpo.py --policy ckpt/sft --data mine.jsonl
Data      as for reward_model.py: {"prompt": ..., "chosen": ..., "rejected": ...} and its like
Writes    ckpt/dpo: the policy as a Hugging Face folder, args.json, metrics.jsonl and, with a judge,
          samples.jsonl; until the run is finished also trainer_state/ (for --resume)
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import plumbing  # noqa: E402, F401 - first: Ctrl-C while torch loads is no traceback

import dataclasses
import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import common
import ppo
from common import UserError
from plumbing import adapters, cli, metrics, processes, report
from plumbing.cli import DATA, RunConfig, arg
from plumbing.rows import convert, preference, read_and_hold_out, read_rows, too_long
from plumbing.runs import Run, adamw_with_cosine
from plumbing.scorers import FunctionScorer
from reward_model import accuracy
from sft import collate


# === 0. Configuration =============================================================================
@dataclass(frozen=True)
class Config(RunConfig):  # the flags that all stages share are in plumbing/cli.py
    output: str = arg("ckpt/dpo", "folder for the policy and the logs", heading="run")
    eval_every: int = arg(20, "optimizer steps between evaluations", 1)

    policy: str = arg("ckpt/sft", "causal LM to train, and the reference", heading="data")
    data: list[str] = arg([str(DATA / "preferences.jsonl")], "JSONL; see the README")
    eval_data: list[str] | None = arg(None, "held-out pairs; else a tenth of --data, at most 512")
    judge: str | None = arg(None, "file.py:function, the true reward; reported, not trained on")
    eval_prompts: list[str] | None = arg(None, "answered for the judge; else the held-out pairs'")
    max_prompt_length: int = arg(512, "in tokens; pairs above are dropped and counted", 1)
    response_length: int = arg(512, "in tokens, EOS included; pairs above are dropped too", 1)
    temperature: float = arg(1.0, "of the responses that are judged", 0.01, 100)

    loss: Literal["dpo", "ipo", "kto"] = arg("dpo", "eq. 2, 3 or 4", heading="optimisation")
    beta: float = arg(0.1, "weight of the KL; 0.01 to 1", 1e-9, 1e9)
    epochs: int = arg(3, "passes over the pairs; 1 if pretrained", 1)
    batch_size: int = arg(32, "pairs per optimizer step", 1)
    microbatch_size: int = arg(32, "pairs per forward pass; memory only, same gradient", 1)
    lr: float | None = arg(None, "peak learning rate; else by size, see LR_BY_SIZE", 0, 1)
    warmup: float = arg(0.05, "share of steps in which lr rises from 0; then a cosine to 0", 0, 1)
    weight_decay: float = arg(0.0, "of AdamW; 0 to 0.1", 0, 1)
    max_grad_norm: float = arg(1.0, "clip the gradient to this norm", 1e-9)


# Learning rates by number of parameters: the first was measured here, the last is of the size of
# those that Rafailov et al. 2023 (1e-6, for 2.8 B parameters) and most recipes since; what lies
# between was not measured.
LR_BY_SIZE = ((10e6, 5e-4), (1e9, 5e-6), (math.inf, 1e-6))  # (parameters below, learning rate)
FORMATS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]  # the keys of a row


def with_embedded_defaults(cfg):
    """The embedded pairs come with a judge who knows the true reward, and prompts to answer."""
    if cfg.data != Config().data:
        return cfg
    judge = cfg.judge or f"{DATA / 'true_reward.py'}:true_reward"
    eval_prompts = cfg.eval_prompts or [str(DATA / "heldout_prompts.jsonl")]
    return dataclasses.replace(cfg, judge=judge, eval_prompts=eval_prompts)


# === 1. Data: rows to texts =======================================================================
def encode_row(row, tokenizer, eos_ids, cfg):
    """The chosen and the rejected text of a row, each (prompt ids, response ids with EOS), or why
    not.
    """
    prompt, chosen, rejected = preference(row)  # strings or chats, from any accepted format
    tools = row.get("tools")
    prompt_ids, chosen_ids = common.encode(tokenizer, prompt, chosen, eos_ids, tools)
    _, rejected_ids = common.encode(tokenizer, prompt, rejected, eos_ids, tools)
    reason = too_long(cfg, prompt_ids, chosen_ids, rejected_ids)
    if chosen_ids == rejected_ids:
        reason = "chosen and rejected the same"  # there is nothing to prefer
    if not prompt_ids:
        reason = "with nothing before the response"  # nothing would predict its first token
    yield reason or ((prompt_ids, chosen_ids), (prompt_ids, rejected_ids))


def with_unrelated(pairs, seed):
    """The pairs, each with a third text, for eq. 5: its prompt and a response to another row."""
    rng = random.Random(seed)
    if len(pairs) < 2:
        raise UserError("--loss kto needs two pairs and two held-out ones: eq. 5 mixes their texts")
    others = [(i + rng.randrange(1, len(pairs))) % len(pairs) for i in range(len(pairs))]
    unrelated = [rng.choice(pairs[other])[1] for other in others]
    return [(*pair, (pair[0][0], ids)) for pair, ids in zip(pairs, unrelated)]


# === 2. Log-ratios: eq. 1 =========================================================================
def response_logprobs(model, texts, pad_id):
    """log pi(y | x) of texts, (prompt ids, response ids) each: (B,) float32, sums over tokens."""
    tokens, attention_mask, response_mask = (x.to(model.device) for x in collate(texts, pad_id))
    logits = common.forward(model, tokens, attention_mask).logits  # (B, T, vocabulary)
    # Position i predicts token i + 1: drop the last column of the logits and the first of the rest.
    is_target = response_mask[:, 1:]  # (B, T-1)
    predictions, targets = logits[:, :-1][is_target], tokens[:, 1:][is_target]  # of N tokens
    logprobs = -F.cross_entropy(predictions.float(), targets, reduction="none")  # (N,)
    rows = is_target.nonzero()[:, 0]  # which text each of them belongs to
    return torch.zeros(len(texts), device=model.device).index_add(0, rows, logprobs)


@torch.no_grad()
def all_logprobs(model, texts, microbatch_size, pad_id, desc):
    """`response_logprobs` of rows with k texts each, (N, k) float32, in their order."""
    length = lambda i: max(len(x) + len(y) for x, y in texts[i])
    order = common.share(sorted(range(len(texts)), key=length))  # little padding
    logprobs = torch.zeros(len(texts), len(texts[0]), device=model.device)
    for start in tqdm(range(0, len(order), microbatch_size), desc=desc, leave=False):
        rows = order[start : start + microbatch_size]
        flat = [text for i in rows for text in texts[i]]
        logprobs[rows] = response_logprobs(model, flat, pad_id).view(len(rows), -1)
    return common.total(logprobs)


def log_ratios(model, texts, ref_logprobs, pad_id):
    """Eq. 1 of the chosen and of the rejected texts, (B,) each, from one forward pass."""
    flat = [chosen for chosen, *_ in texts] + [rejected for _, rejected, *_ in texts]  # 2B texts
    logprobs = response_logprobs(model, flat, pad_id).view(2, -1)
    return (logprobs - ref_logprobs[:, :2].T).unbind()


@torch.no_grad()
def reference_point(model, texts, ref_logprobs, cfg, pad_id):
    """Eq. 5, a number: how far the policy is from the reference on texts that say nothing."""
    total = torch.zeros((), device=model.device)
    for start in range(0, len(texts), cfg.microbatch_size):
        part = slice(start, start + cfg.microbatch_size)
        unrelated = [text for _, _, text in texts[part]]
        logprobs = response_logprobs(model, unrelated, pad_id)
        total += (logprobs - ref_logprobs[part, 2]).sum()
    sums = processes.add_up([], {"log_ratios": total.item(), "texts": len(texts)})
    return max(0.0, sums["log_ratios"] / sums["texts"])


# === 3. Losses: eqs. 2-4 ==========================================================================
# All take log-ratios (B,) of the chosen and of the rejected texts and give the loss of each pair.
def dpo_loss(chosen, rejected, beta, z):
    """Rafailov et al. 2023, eq. 7: the loss of a reward model whose score is beta * h."""
    return -F.logsigmoid(beta * (chosen - rejected))  # eq. 2


def ipo_loss(chosen, rejected, beta, z):
    """Azar et al. 2023, eq. 17: the difference of log-ratios goes to a number and no further.

    With (2) it grows without end where one text always wins, however large beta is.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2  # eq. 3


def kto_loss(chosen, rejected, beta, z):
    """Ethayarajh et al. 2024, eq. 8: a text alone is good or bad, and no pair is needed.

    Far from z the sigmoid is flat: what is already much better, or hopeless, moves nothing.
    """
    return 1 - (torch.sigmoid(beta * (chosen - z)) + torch.sigmoid(beta * (z - rejected))) / 2


LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "kto": kto_loss}


# === 4. Held-out evaluation =======================================================================
def held_out_metrics(log_ratios, cfg):
    """Of held-out pairs, from their eq. 1, (N, 2), and a third column for eq. 5 in KTO.

    Both log-ratios may fall: (2) and (3) see nothing but their difference.
    """
    chosen, rejected = log_ratios[:, 0], log_ratios[:, 1]
    z = max(0.0, log_ratios[:, 2].mean().item()) if cfg.loss == "kto" else 0.0
    return {
        "loss": LOSSES[cfg.loss](chosen, rejected, cfg.beta, z).mean().item(),
        "accuracy": accuracy(chosen, rejected)[0],  # of h as a reward model
        "chosen_log_ratio": chosen.mean().item(),  # nats; below 0: less likely than at the start
        "rejected_log_ratio": rejected.mean().item(),
    }


def load_judge(cfg, tokenizer, eval_rows):
    """The function of --judge and the rows whose prompts are answered for it, or (None, [])."""
    if cfg.judge is None:
        return None, []
    rows = read_rows(cfg.eval_prompts, [("prompt",)]) if cfg.eval_prompts else eval_rows

    def encode(row):
        row.unread, row["prompt"] = (), row["prompt"] if cfg.eval_prompts else preference(row)[0]
        row.prompt_ids, _ = common.encode(tokenizer, row["prompt"], tools=row.get("tools"))
        yield (too_long(cfg, row.prompt_ids) if row.prompt_ids else "empty") or row

    return FunctionScorer(cfg.judge), convert(rows, encode, "prompts for the judge")


# === Main loop ====================================================================================
def main(cfg):
    cli.check_ranges(cfg)
    cfg = with_embedded_defaults(cfg)
    if cfg.eval_prompts and cfg.judge is None:
        raise UserError("--eval-prompts are answered for a judge; name one with --judge")
    run = Run(cfg, ("eval_every",))  # seeds, takes --output, finds what --resume goes on from

    # -- setup: data, tokenizer, models, optimizer
    rows, eval_rows = read_and_hold_out(cfg, FORMATS, most=512)
    tokenizer = common.load_tokenizer(run.source or cfg.policy, "python sft.py", **cfg.of_tokenizer)
    options = {"trust_remote_code": cfg.trust_remote_code}
    policy = common.load_causal_lm(cfg.policy, tokenizer, "python sft.py", **options)
    common.set_generation_defaults(policy, tokenizer, cfg.temperature)
    pad_id, eos_ids = tokenizer.pad_token_id, policy.generation_config.eos_token_id
    encode = lambda row: encode_row(row, tokenizer, eos_ids, cfg)
    pairs = convert(rows, encode)
    eval_pairs = convert(eval_rows, encode, "held out")  # says what was dropped, and why
    if cfg.loss == "kto":
        pairs, eval_pairs = (with_unrelated(all_, cfg.seed) for all_ in (pairs, eval_pairs))
    judge, prompt_rows = load_judge(cfg, tokenizer, eval_rows)
    lengths = [max(len(x) + len(y) for x, y in texts) for texts in pairs]  # in tokens
    sampled = [len(row.prompt_ids) + cfg.response_length for row in prompt_rows]
    read = [len(x) + len(y) for texts in eval_pairs for x, y in texts]
    common.check_context(policy, max(lengths + sampled + read))
    ref_policy = adapters.twin(policy, cfg.lora_rank).requires_grad_(False) if judge else None
    adapters.add(policy, cfg.lora_rank, cfg.policy)  # the reference has the policy without them
    for model in filter(None, (policy, ref_policy)):
        common.place(model, run.device, cfg.dtype, cfg.gradient_checkpointing)  # and its precision
    num_steps = cfg.epochs * math.ceil(len(pairs) / cfg.batch_size)  # the last may be smaller
    optimizer, schedule = adamw_with_cosine(cfg, policy, LR_BY_SIZE, num_steps)
    report.supervised_start(cfg, "policy", policy, "pairs", len(pairs), len(eval_pairs), optimizer)
    report.print_tokens(tokenizer, policy, *pairs[0][0])

    # -- the start: log pi_ref is the policy's own, from before it learns or is resumed
    read_all = lambda texts, what: all_logprobs(policy, texts, cfg.microbatch_size, pad_id, what)
    ref_logprobs, eval_ref = read_all(pairs, "reference"), read_all(eval_pairs, "reference")
    run.restore(tokenizer, {"policy": policy}, optimizer, schedule, read_weights=True)
    ask = lambda: ppo.evaluate(run, policy, ref_policy, tokenizer, [judge], judge, prompt_rows)
    baseline = run.kept.get("baseline") or (ask() if judge else None)
    held_out, samples = run.kept.get("held_out"), run.kept.get("samples")  # of the last evaluation
    run.start()  # nothing is written before
    if judge:
        metrics.log_evaluation(run, baseline, baseline)
    generator = torch.Generator().manual_seed(cfg.seed)  # its own: --resume draws the same again
    batches = common.epochs_by_length(lengths, cfg.batch_size, generator)
    for step, index in run.steps(batches, num_steps):
        run.phase("backward")
        mine = common.share(index)  # under torchrun a part of the batch, else all of it
        texts, refs = [pairs[i] for i in mine], ref_logprobs[mine]
        z = reference_point(policy, texts, refs, cfg, pad_id) if cfg.loss == "kto" else 0.0
        loss, num_right = 0.0, 0
        for start in range(0, len(mine), cfg.microbatch_size):  # same gradient, less memory
            part = slice(start, start + cfg.microbatch_size)
            chosen, rejected = log_ratios(policy, texts[part], refs[part], pad_id)  # (b,) each
            losses = LOSSES[cfg.loss](chosen, rejected, cfg.beta, z)  # eq. 2, 3 or 4
            micro_loss = losses.sum() / len(index)  # divided once
            micro_loss.backward()  # gradients add up
            loss += micro_loss.item()
            num_right += ((chosen - rejected).sign() + 1).sum().item() / 2  # ties count half
        sums = processes.add_up([policy], {"loss": loss, "right": num_right})  # and all gradients
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_step([grad_norm]):  # finite: one bad batch is no reason to stop
            optimizer.step()
        lr = schedule.get_last_lr()[0]  # of this step
        schedule.step()  # for the next
        optimizer.zero_grad()

        # -- log, look, save
        row = {
            "iteration": step,
            "loss": sums["loss"],  # falls, from 0.69 (dpo), 1 / (4 beta^2) (ipo), 0.5 (kto)
            "accuracy": sums["right"] / len(index),  # h_w > h_l; from 0.5 up
            "reference_point": z if cfg.loss == "kto" else None,  # eq. 5, in nats
            "grad_norm": grad_norm.item(),  # before clipping
            "lr": lr,  # up, then down
        }
        run.log(row, show={"loss": "loss", "accuracy": "accuracy"})
        if run.is_due(cfg.eval_every):
            run.phase("evaluation")
            held_out = held_out_metrics(read_all(eval_pairs, "held-out pairs") - eval_ref, cfg)
            run.log({"split": "pairs", "iteration": step} | held_out)
            samples = ask() if judge else None
            if judge:
                metrics.log_evaluation(run, samples, baseline)
        run.save_if_due(baseline=baseline, held_out=held_out, samples=samples)
    run.finish()  # --output is now a model's folder
    print_result(cfg, held_out, samples, baseline)


def print_result(cfg, held_out, samples, baseline):
    """Held-out pairs, and what the judge says of the policy's own responses."""
    log_ratio = "chosen {chosen_log_ratio:+.2f}, rejected {rejected_log_ratio:+.2f} nats"
    print("\nheld-out pairs: accuracy {accuracy:.3f}; log-ratios ".format(**held_out), end="")
    print(log_ratio.format(**held_out))
    if samples:
        before, after = (metrics.summarize(some, baseline) for some in (baseline, samples))
        print(
            f"true reward {before['true_reward']:.3f} -> {after['true_reward']:.3f}, "
            f"KL {after['kl']:.2f} nats, wins {after['win_rate']:.0%} against the policy before"
        )
    print(f"\nwrote {cfg.output}, an ordinary Hugging Face folder")


if __name__ == "__main__":
    with cli.command_line():
        main(cli.parse_args(Config, __doc__.splitlines()[0]))
