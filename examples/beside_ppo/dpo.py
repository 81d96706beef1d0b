"""DPO, IPO and KTO: a policy learns from preferred pairs, without a reward model and rollouts.

Goal      PPO's:  maximize  E_{x ~ prompts, y ~ pi(.|x)}[ r(x, y) ] - beta * KL(pi || pi_ref)

          Its optimum is pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x). Solved for r, that is
          the reward which a policy maximizes:  r(x, y) = beta * h(x, y) + beta * log Z(x), with

(1) log-ratio  h(x, y) = log pi(y|x) - log pi_ref(y|x), a sum over the tokens of y, its EOS too

          Put into Bradley and Terry's model of a preference, log Z cancels, and reward_model.py's
          loss becomes one of the policy itself. Chosen is y_w, rejected y_l:

(2) DPO   L = - mean  log sigma(beta * (h_w - h_l))
(3) IPO   L =   mean  (h_w - h_l - 1 / (2 beta))^2,  finite also where all labels agree
(4) KTO   L =   mean over the texts of  1 - sigma(beta * (h_w - z))  or  1 - sigma(beta * (z - h_l))
(5)       z = max(0, mean h(x, y')), y' a response of another row; a constant for the gradient

          (3) has the same optimum, with the probability that y wins as r in place of Bradley and
          Terry's score. (4) does not: it maximizes a utility of h that is flat far from z.

Shapes    B pairs; 2B texts of T tokens (padded on the right), the chosen ones first.
Mask      As in sft.py: a completion and its EOS count, a prompt does not.
Models    One. log pi_ref is that of the policy before its first step, computed once and kept. With
          a --judge a frozen copy of the policy is kept as well, for the KL of what is sampled.
beta      The weight of the KL against a reward that (1) defines: its scale is that of the labels'
          noise, so the number is not comparable with ppo.py's. Smaller moves the policy further.

Differs   The papers' sums of log-probabilities, not means per token, in all three; some libraries
          take means for IPO. (4) has its paper's weights at 1: here each pair has one text of
          either kind. (5) is a mean over the whole batch; the paper's code takes a micro-batch's.

Sources   Rafailov et al. 2023 ((1), their eqs. 4 to 6, and (2), eq. 7); Azar et al. 2023 ((3), eq.
          17, whose tau is beta); Ethayarajh et al. 2024 ((4), eq. 8 as at ICML).

Run       python examples/beside_ppo/dpo.py                          DPO, on the embedded pairs
          python examples/beside_ppo/dpo.py --policy ckpt/sft --data mine.jsonl --loss kto
Data      as for reward_model.py: {"prompt": ..., "chosen": ..., "rejected": ...} and its like
Writes    ckpt/dpo: the policy, args.json, metrics.jsonl and, with a judge, samples.jsonl
"""

import dataclasses
import math
import pathlib
import random
import sys
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import harness  # noqa: E402
import ppo  # noqa: E402
from best_of_n import encode_prompts  # noqa: E402
from common import UserError  # noqa: E402
from harness import DATA, Count, Positive, Range, Share, arg  # noqa: E402
from reward_model import FORMATS, accuracy, preference, prompt_of  # noqa: E402
from rewards import FunctionScorer  # noqa: E402
from sft import collate  # noqa: E402


# === 0. Configuration =============================================================================
@dataclasses.dataclass(frozen=True)
class Config(harness.RunConfig):  # the flags that all stages share are in harness.py
    output: str = arg("ckpt/dpo", "folder for the policy and the logs")
    save_every: Count = arg(500, "optimizer steps between checkpoints")
    eval_every: Count = arg(20, "optimizer steps between evaluations")

    policy: str = arg("ckpt/sft", "causal LM to train; as it is now it is the reference")
    data: list[str] | None = arg(None, "JSONL files of pairs (default: the embedded preferences)")
    eval_data: list[str] | None = arg(None, "held-out pairs (default: some of --data)")
    judge: str | None = arg(None, "file.py:function, the true reward: reported, not trained on")
    eval_prompts: list[str] | None = arg(None, "JSONL files of prompts for the judge")
    max_prompt_length: Count = arg(512, "tokens; pairs with longer prompts are dropped and counted")
    response_length: Count = arg(512, "tokens with EOS; pairs with longer ones are dropped, too")
    temperature: Annotated[float, Range(0.01, 100)] = arg(1.0, "of responses for the judge")

    loss: Literal["dpo", "ipo", "kto"] = arg("dpo", "eq. 2, 3 or 4")
    beta: Positive = arg(0.1, "weight of the KL; 0.01 to 1")
    epochs: Count = arg(3, "passes over the pairs; 1 for a pretrained model")
    batch_size: Count = arg(32, "pairs per optimizer step")
    microbatch_size: Count = arg(32, "pairs in memory at a time; changes no gradient")
    lr: Share | None = arg(None, "peak learning rate (default: by model size)")
    warmup: Share = arg(0.05, "share of steps in which lr rises from 0; then a cosine to 0")
    weight_decay: Share = arg(0.0, "weight decay of AdamW; 0 to 0.1")
    max_grad_norm: Positive = arg(1.0, "clip the gradient to this norm")


# Learning rates by number of parameters: the first was measured here, the last is that of Rafailov
# et al. 2023 for 2.8 B parameters; what lies between was not measured.
LR_BY_SIZE = ((10e6, 5e-4), (1e9, 5e-6), (math.inf, 1e-6))  # (parameters below, learning rate)


def with_embedded_defaults(cfg):
    """Returns cfg, where the embedded pairs come with a judge and with prompts for it."""
    if cfg.data is not None:
        return cfg
    return dataclasses.replace(
        cfg, data=[str(DATA / "preferences.jsonl")],
        eval_prompts=cfg.eval_prompts or [str(DATA / "heldout_prompts.jsonl")],
        judge=cfg.judge or f"{DATA / 'true_reward.py'}:true_reward",
    )


# === 1. Data: rows to texts =======================================================================
def encode_row(row, tokenizer, eos_ids, cfg):
    """Yields a row's chosen and rejected text, each (prompt ids, response ids), or why not."""
    prompt, chosen, rejected = preference(row)  # strings or chats, from any accepted format
    tools = row.get("tools")
    prompt_ids, chosen_ids = common.encode(tokenizer, prompt, chosen, eos_ids, tools)
    _, rejected_ids = common.encode(tokenizer, prompt, rejected, eos_ids, tools)
    reason = harness.too_long(cfg, prompt_ids, max(chosen_ids, rejected_ids, key=len))
    if chosen_ids == rejected_ids:
        reason = "chosen and rejected the same"  # there is nothing to prefer
    if not prompt_ids:
        reason = "with nothing before the response"  # nothing would predict its first token
    yield reason or ((prompt_ids, chosen_ids), (prompt_ids, rejected_ids))


def with_unrelated(pairs, seed):
    """Returns pairs with a third text each, for eq. 5: its prompt and a response to another row."""
    if len(pairs) < 2:
        raise UserError("--loss kto needs two pairs and two held-out ones: eq. 5 mixes their texts")
    texts = []
    rng = random.Random(seed)
    others = [(i + rng.randrange(1, len(pairs))) % len(pairs) for i in range(len(pairs))]
    for (chosen, rejected), other in zip(pairs, others):
        _, response_ids = rng.choice(pairs[other])
        texts.append((chosen, rejected, (chosen[0], response_ids)))
    return texts


def longest(texts):
    """Returns the length of the longest of a row's texts, in tokens."""
    return max(len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in texts)


# === 2. Log-ratios: eq. 1 =========================================================================
def response_logprobs(model, texts):
    """Returns log pi(y | x) of texts, (prompt ids, response ids) each: (B,) sums over tokens."""
    tokens, attention_mask, response_mask = collate(texts, model.generation_config.pad_token_id)
    tokens, attention_mask = tokens.to(model.device), attention_mask.to(model.device)
    logits = common.forward(model, tokens, attention_mask).logits  # (B, T, vocabulary)
    # Position i predicts token i + 1: drop the last column of the logits and the first of the rest.
    is_target = response_mask[:, 1:].to(model.device)  # (B, T-1)
    predictions, targets = logits[:, :-1][is_target], tokens[:, 1:][is_target]  # of N tokens
    logprobs = -F.cross_entropy(predictions.float(), targets, reduction="none")  # (N,)
    rows = is_target.nonzero()[:, 0]  # which text each of them belongs to
    return torch.zeros(len(texts), device=model.device).index_add(0, rows, logprobs)


@torch.no_grad()
def all_logprobs(model, texts, microbatch_size):
    """Returns `response_logprobs` of rows with k texts each, (N, k) float32, in their order."""
    order = sorted(range(len(texts)), key=lambda i: longest(texts[i]))
    order = common.share(order)  # under torchrun a part, else all
    logprobs = torch.zeros(len(texts), len(texts[0]), device=model.device)
    for start in tqdm(range(0, len(order), microbatch_size), delay=2, leave=False):
        rows = order[start : start + microbatch_size]
        flat = [text for i in rows for text in texts[i]]
        logprobs[rows] = response_logprobs(model, flat).view(len(rows), -1)
    return common.total(logprobs)


def log_ratios(model, texts, ref_logprobs):
    """Returns eq. 1 of the chosen and of the rejected texts, (B,) each, from one forward pass."""
    flat = [chosen for chosen, *_ in texts] + [rejected for _, rejected, *_ in texts]  # 2B texts
    logprobs = response_logprobs(model, flat).view(2, -1)
    return (logprobs - ref_logprobs[:, :2].T).unbind()


def reference_point(model, texts, ref_logprobs, microbatch_size):
    """Returns eq. 5: the mean log-ratio of unrelated texts, at least 0."""
    unrelated = [(text,) for _, _, text in texts]
    logprobs = all_logprobs(model, unrelated, microbatch_size)[:, 0]  # (B,)
    return max(0.0, (logprobs - ref_logprobs[:, 2]).mean().item())


# === 3. Losses: eqs. 2-4 ==========================================================================
def preference_loss(chosen, rejected, loss, beta, z=0.0):
    """Returns the loss of each pair, (B,), from the log-ratios (B,) of its two texts.

    With (2) the difference of log-ratios grows without bound where one text always wins, however
    large beta is; with (3) it goes to 1 / (2 beta) and no further. In (4) each text alone is good
    or bad. Far from z the sigmoid is flat: what is already much better, or hopeless, moves nothing.
    """
    if loss == "dpo":
        return -F.logsigmoid(beta * (chosen - rejected))  # eq. 2
    if loss == "ipo":
        return (chosen - rejected - 1 / (2 * beta)) ** 2  # eq. 3
    good = torch.sigmoid(beta * (chosen - z))
    bad = torch.sigmoid(beta * (z - rejected))
    return 1 - (good + bad) / 2  # eq. 4


# === 4. Held-out evaluation =======================================================================
def held_out_metrics(log_ratios, cfg):
    """Returns metrics of held-out pairs from eq. 1 of their texts, (N, 2); (N, 3) with eq. 5's.

    Both log-ratios may fall: (2) and (3) depend on nothing but their difference.
    """
    chosen, rejected = log_ratios[:, 0], log_ratios[:, 1]
    z = max(0.0, log_ratios[:, 2].mean().item()) if cfg.loss == "kto" else 0.0
    return {
        "loss": preference_loss(chosen, rejected, cfg.loss, cfg.beta, z).mean().item(),
        "accuracy": accuracy(chosen, rejected)[0],  # of h as a reward model
        "chosen_log_ratio": chosen.mean().item(),  # nats; below 0: less likely than at the start
        "rejected_log_ratio": rejected.mean().item(),
    }


# === Main loop ====================================================================================
def main(cfg):
    cfg = with_embedded_defaults(cfg)
    if (cfg.eval_prompts is None) != (cfg.judge is None):
        raise UserError("--judge reads answers to --eval-prompts: name both, or neither")
    run = harness.Run(cfg, ("eval_every",))
    rows = harness.read_rows(cfg.data, FORMATS)
    if cfg.eval_data is None:
        rows, eval_rows = harness.hold_out(rows, 512, cfg.seed, prompt_of)
    else:
        eval_rows = harness.read_rows(cfg.eval_data, FORMATS)
        harness.report_overlap(rows, eval_rows, prompt_of)
    code = cfg.trust_remote_code  # may a model bring code of its own?
    tokenizer = common.load_tokenizer(cfg.policy, "python sft.py", code, cfg.chat_template_kwargs)
    policy = common.load_causal_lm(cfg.policy, tokenizer, "python sft.py", trust_remote_code=code)
    common.set_generation_defaults(policy, tokenizer, cfg.temperature)

    def encode(row):
        return encode_row(row, tokenizer, policy.generation_config.eos_token_id, cfg)

    pairs = harness.convert(rows, encode)
    eval_pairs = harness.convert(eval_rows, encode, "held out")
    if cfg.loss == "kto":
        pairs, eval_pairs = with_unrelated(pairs, cfg.seed), with_unrelated(eval_pairs, cfg.seed)
    judge = FunctionScorer(cfg.judge) if cfg.judge else None
    prompt_rows = []  # the judge's
    if judge:
        prompt_rows = harness.read_rows(cfg.eval_prompts, [("prompt",)])
        prompt_rows = encode_prompts(prompt_rows, cfg, tokenizer, "prompts for the judge")
    lengths = [longest(texts) for texts in pairs]  # in tokens
    sampled = [len(row.prompt_ids) + cfg.response_length for row in prompt_rows]
    common.check_context(policy, max(lengths + sampled + [longest(texts) for texts in eval_pairs]))
    ref_policy = common.shared_copy(policy, cfg.lora_rank).requires_grad_(False)
    common.add_adapters(policy, cfg.lora_rank, cfg.policy)  # the reference has it without them
    common.to_device(policy, run.device, cfg.dtype, cfg.gradient_checkpointing)
    if judge:
        common.to_device(ref_policy, run.device, cfg.dtype)
    num_steps = cfg.epochs * math.ceil(len(pairs) / cfg.batch_size)  # an epoch's last is smaller
    optimizer, schedule = harness.adamw_with_cosine(cfg, policy, LR_BY_SIZE, num_steps)
    harness.print_models([("policy", policy)])
    harness.print_steps(cfg, len(pairs), len(eval_pairs), num_steps, optimizer)
    harness.print_tokens(tokenizer, policy, pairs[0][0][0], pairs[0][0][1])

    # log pi_ref is the policy's own, from before it learns or is resumed
    ref_logprobs = all_logprobs(policy, pairs, cfg.microbatch_size)  # (N, 2), with KTO (N, 3)
    eval_ref_logprobs = all_logprobs(policy, eval_pairs, cfg.microbatch_size)
    held_out = run.kept.get("held_out")
    baseline = run.kept.get("baseline")  # responses before training
    if judge and baseline is None:
        baseline = ppo.evaluate(cfg, policy, ref_policy, tokenizer, [judge], judge, prompt_rows)
    samples = run.kept.get("samples", baseline)
    run.restore(tokenizer, {"policy": policy}, optimizer, schedule)
    if judge and not run.done:
        ppo.log_evaluation(run, samples, baseline)

    generator = torch.Generator().manual_seed(cfg.seed)  # its own: --resume draws the same again
    batches = common.epochs_by_length(lengths, cfg.batch_size, generator)
    for step, index in run.steps(batches, num_steps):
        run.phase("backward")
        own = common.share(index)  # under torchrun this process's part, else all
        z = 0.0
        if cfg.loss == "kto":
            texts = [pairs[i] for i in index]
            z = reference_point(policy, texts, ref_logprobs[index], cfg.microbatch_size)
        loss = 0.0
        for start in range(0, len(own), cfg.microbatch_size):
            part = own[start : start + cfg.microbatch_size]
            texts = [pairs[i] for i in part]
            chosen, rejected = log_ratios(policy, texts, ref_logprobs[part])  # (b,) each
            losses = preference_loss(chosen, rejected, cfg.loss, cfg.beta, z)  # eq. 2, 3 or 4
            micro_loss = losses.sum() / len(index)  # divided once
            micro_loss.backward()  # gradients add up to those of the whole batch
            loss += micro_loss.item()
        sums = harness.sum_over_processes([policy], {"loss": loss})  # and gradients
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_step(grad_norm):  # finite
            optimizer.step()
        optimizer.zero_grad()
        run.log({
            "iteration": step,
            "loss": float(sums["loss"]),  # falls, from 0.69 (dpo), 1 / (4 beta^2) (ipo), 0.5 (kto)
            "reference_point": z if cfg.loss == "kto" else None,  # eq. 5, in nats
            "grad_norm": grad_norm.item(),  # before clipping
            "lr": schedule.get_last_lr()[0],  # up, then down
        }, shown=("loss",))
        schedule.step()
        if run.is_due(cfg.eval_every):
            run.phase("evaluation")
            logprobs = all_logprobs(policy, eval_pairs, cfg.microbatch_size)
            held_out = held_out_metrics(logprobs - eval_ref_logprobs, cfg)
            run.log({"split": "pairs", "iteration": step} | held_out)
            if judge:
                samples = ppo.evaluate(
                    cfg, policy, ref_policy, tokenizer, [judge], judge, prompt_rows
                )
                ppo.log_evaluation(run, samples, baseline)
        run.save_if_due({"baseline": baseline, "held_out": held_out, "samples": samples})
    run.finish()
    print_result(cfg, held_out, samples, baseline)


def print_result(cfg, held_out, samples, baseline):
    """Prints the held-out result, and what the judge says of the policy's own responses."""
    print(
        f"\nheld-out pairs: accuracy {held_out['accuracy']:.3f}; log-ratios chosen "
        f"{held_out['chosen_log_ratio']:+.2f}, rejected {held_out['rejected_log_ratio']:+.2f} nats"
    )
    if samples:
        before, after = ppo.summarize(baseline, baseline), ppo.summarize(samples, baseline)
        print(
            f"true reward {before['true_reward']:.3f} -> {after['true_reward']:.3f}, "
            f"KL {after['kl']:.2f} nats, wins {after['win_rate']:.0%} against the policy before"
        )
    print(f"\nwrote {cfg.output}, an ordinary Hugging Face folder")


if __name__ == "__main__":
    harness.run_stage(main, Config, __doc__.splitlines()[0])
