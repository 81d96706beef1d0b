"""What a run of ppo.py says of itself: metrics and what is healthy, warnings, evaluations."""

import math
import sys

import torch

from common import UserError
from plumbing import sharding

try:
    import resource
except ImportError:  # Windows
    resource = None


def ppo_metrics(run, batch, score_parts, truths, ended, entropy, steps, kl_coef):
    """The iteration's row of metrics.jsonl; the comments say what is healthy."""
    mask, value_mask, scores = batch.response_mask, batch.value_mask, score_parts.sum(0)
    token_kl = torch.where(mask, batch.logprobs - batch.ref_logprobs, 0.0)  # (B, R)
    steps = [{name: sharding.plain(x) for name, x in step.items()} for step in steps]
    means = torch.stack([torch.stack([*step.values()]) for step in steps]).mean(0).tolist()
    means = dict(zip(steps[0], means))
    error, returns = (batch.returns - batch.values)[value_mask], batch.returns[value_mask]
    unexplained = (error.var(correction=0) / returns.var(correction=0)).item()
    seconds, peak = run.phase("evaluation"), peak_memory(mask.device)
    return {
        "iteration": run.step,
        "episodes": run.step * run.cfg.batch_size,
        "score": scores.mean().item(),  # before the EOS penalty; rises
        "score_parts": score_parts.mean(1).tolist(),  # of each --reward, in their order
        "score_std": scores.std(correction=0).item(),  # shrinks; near 0 nothing is left to learn
        "true_reward": None if truths is None else truths.mean().item(),  # falls when hacked
        "kl": token_kl.sum(1).mean().item(),  # 0, then up to about 10; below 0 only by chance
        "kl_k3": (torch.exp(-token_kl) - 1 + token_kl).sum(1).mean().item(),  # the same, never < 0
        "kl_coef": kl_coef,
        "kl_target": run.cfg.kl_target,
        "entropy": entropy[mask].mean().item(),  # falls slowly; near 0 there is one answer to all
        "response_length": mask.sum(1).float().mean().item(),  # no sudden trend
        "eos_rate": ended.float().mean().item(),  # near 1
        "policy_loss": means["policy_loss"],  # slightly below 0
        "value_loss": means["value_loss"],  # falls
        "approx_kl": means["approx_kl"],  # 0.001 to 0.05
        "clip_fraction": means["clip_fraction"],  # 0.01 to 0.2
        "ratio_first": steps[0]["ratio"].item(),  # 1 up to rounding
        "sampler_gap": run.sampler_gap,  # 0 up to rounding: see SAMPLER_GAP
        "approx_kl_first": steps[0]["approx_kl"].item(),  # 0 up to rounding; a mean hides noise
        "explained_variance": 1 - unexplained,  # below 0 at first, then up
        "optimizer_steps": len(steps),  # skipped ones too; with --max-approx-kl, one not taken
        "skipped_steps": run.num_skipped,  # 0
        "grad_norm": means["policy"],  # before clipping; steady
        "critic_grad_norm": means.get("critic"),  # before clipping; steady
        "lr": run.schedule.get_last_lr()[0],  # the policy's
        "seconds_rollout": seconds["rollout"],
        "seconds_score": seconds["score"] + seconds["log-probabilities"],  # and the advantages
        "seconds_update": seconds["backward"] + seconds["optimizer step"],
        "tokens_per_second": mask.sum().item() / sum(seconds.values()),  # of responses, all phases
        "peak_memory_gb": peak and peak / 1e9,  # so far; tensors on CUDA, else the whole process
    }


# Of mean |log pi as sampled - log pi recomputed|, in nats: ten times what tests/test_families.py
# finds in the worst of its families, by --dtype; above END nothing may be learned.
SAMPLER_GAP, END = {False: 2.1e-5, True: 0.28}, 0.5  # {is it bf16?: warn above}


def check_sampler(run, policy, sampled_logprobs, logprobs, response_mask):
    """Was it sampled from the distribution that is learned from? `run.sampler_gap` says how nearly.

    It is None under --compile on CUDA. In a run's first rollout a large one ends the run.
    """
    run.sampler_gap = None
    if sampled_logprobs is None:
        return
    run.sampler_gap = (sampled_logprobs - logprobs)[response_mask].abs().mean().item()
    what = f"the sampler's log-probabilities are off by {run.sampler_gap:.2g} nats a token"
    if run.step == run.done + 1 and not run.sampler_gap <= END:
        raise UserError(f"{what}: a {type(policy).__name__} can't be sampled token by token here")
    if run.sampler_gap > SAMPLER_GAP[getattr(policy, "in_bf16", False)]:
        causes = "a cache that rounds, experts that flip: is it gone with --dtype float32?"
        run.warn("sampler", f"{what}. Usual causes: {causes}")


PPO_BAR = {"score": "score", "true": "true_reward", "kl": "kl", "length": "response_length"}


def health_warnings(history):
    """What looks wrong in the last of the metrics rows: {symptom: message}."""
    row = history[-1]
    unexplained = sum((old["explained_variance"] or 0) < -0.05 for old in history[-10:]) == 10
    norms = row["grad_norm"] + (row["critic_grad_norm"] or 0)
    target = row.get("kl_target") or math.inf
    missed = sum(old["kl"] > 1.5 * target for old in history[-10:]) == 10
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
        ("overshoot", row["approx_kl"] > 0.2, f"approx_kl {row['approx_kl']:.2g}, far too much",
         "--lr too high, 0.3 of it may do; too many --ppo-epochs; see --max-approx-kl"),
        ("target", missed, f"KL {row['kl']:.1f} has been far above --kl-target for 10 iterations",
         "--lr too high; a --kl-coef that is too small to start from; --kl-horizon too long"),
        ("negative", row["kl"] < -0.1 - 0.2 * row["kl_k3"], f"KL {row['kl']:.2f}, negative",
         "text from another distribution than the one scored: a sampling setting, a second EOS"),
        ("critic", unexplained, "explained variance below 0 for 10 iterations",
         "--critic-lr too high or too low; a reward that is noise given the prompt"),
        ("gradient", not math.isfinite(norms), "a gradient was not finite, its step was skipped",
         "--lr too high; rewards of enormous size"),
    )
    return {name: f"{what}. Usual causes: {causes}" for name, seen, what, causes in rules if seen}


def piece(tokenizer, id):
    """A token's text within others; where it is no whole character, its name in the vocabulary."""
    text = tokenizer.decode([id, id])[len(tokenizer.decode([id])) :]  # alone it may lose a space
    return tokenizer.convert_ids_to_tokens(id) if "\ufffd" in text else text


def explain_response(tokenizer, batch, rewards, advantages, row=0):
    """One response as a table: the score lands on the last token, the advantages carry it back."""
    heads = ("log pi", "log pi_0", "KL", "V", "reward", "advant.", "return")
    lines = [f"\n{'t':>3} {'token':<14}" + "".join(f"{head:>9}" for head in heads)]
    columns = (
        batch.logprobs, batch.ref_logprobs, batch.logprobs - batch.ref_logprobs, batch.values,
        rewards, advantages, batch.returns,
    )
    response = batch.tokens[row, -batch.response_mask.shape[1] :]
    for t in range(int(batch.response_mask[row].sum())):
        token = piece(tokenizer, response[t].item())[:13]
        numbers = "".join(f"{column[row, t].item():>9.3f}" for column in columns)
        lines.append(f"{t:>3} {token!r:<14}{numbers}")
    return "\n".join([*lines, "    (advantages are shown before whitening)"])


def log_evaluation(run, samples, baseline):
    """Write the `eval` row, and 16 samples beside the SFT policy's; a resumed run has the first."""
    if samples is baseline and run.done:
        return
    run.log({"split": "eval", "iteration": run.step} | summarize(samples, baseline))
    for sample, old in list(zip(samples, baseline))[:16]:
        row = {"iteration": run.step} | sample | {"sft_response": old["response"]}
        run.append("samples.jsonl", row)


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


def peak_memory(device):
    """The most bytes held so far: on CUDA by tensors, else by the process; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
