"""One batch of ppo.py from prompt to optimizer step: the pictures and numbers of docs/one_batch.md.

    python docs/one_batch.py --device cpu      after python sft.py and python reward_model.py

Runs ppo.main() itself and listens at its functions, so what is shown is the loop's own iteration
and not a copy's. Nothing is drawn from the run's random numbers: without a listener it would have
come out the same. All flags are those of ppo.py, but for two of its own, which --help names.

Writes    one_batch/numbers.json, one_batch/*.png and, from each *.template.md, the page beside it
Needs     matplotlib, for the pictures only: pip install matplotlib
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import plumbing  # noqa: E402, F401 - first: Ctrl-C while torch loads is no traceback

import argparse
import contextlib
import json
import math
import re
import statistics
import tempfile
from unittest import mock

import torch

import common
import ppo
from common import UserError
from plumbing import cli
from plumbing.metrics import piece

# The flags of ppo.py that the numbers depend on; all are defaults, which the test checks.
SETTINGS = (
    "iterations", "batch_size", "response_length", "temperature", "kl_coef", "kl_target",
    "missing_eos_penalty", "advantage", "gamma", "lam", "critic", "ppo_epochs", "minibatch_size",
    "clip_eps", "value_clip_eps", "value_coef", "entropy_coef", "max_grad_norm", "seed",
)
LONGEST = 27  # tokens of the response that is shown: three lines of a picture


# === 1. Listening to a run ========================================================================
class Heard(Exception):
    """Ends the run: the iteration was heard to its end."""


def listen(cfg, iteration):
    """What the functions of ppo.py were given and gave in one iteration of a run: a dict.

    Keys: each wrapped function's (arguments, result); "steps", after each optimizer step its rows
    and what evaluate_tokens then says; "probes"; "metrics", (arguments, row); "history".
    """
    heard, updates = {"steps": []}, []
    names = ("load_models", "sample_responses", "decode_responses", "evaluate_tokens")
    names += ("kl_shaped_rewards", "gae")
    real = {name: getattr(ppo, name) for name in (*names, "minibatches")}
    real_metrics = ppo.metrics.ppo_metrics

    def wrapped(name):
        def function(*inputs):
            outputs = real[name](*inputs)
            heard[name] = inputs, outputs
            return outputs

        return function

    def minibatches(*sizes):  # the loop asks for the next one when its optimizer step is done
        updates.append(sizes)
        inputs = heard["evaluate_tokens"][0]
        if len(updates) == iteration:
            weights = [weight.detach().clone() for weight in inputs[0].parameters()]
            heard["probes"] = probe(*inputs, heard["sample_responses"][0][1])
        for index in real["minibatches"](*sizes):
            yield index
            if len(updates) == iteration:
                heard["steps"].append((index.tolist(), real["evaluate_tokens"](*inputs)))
                if len(heard["steps"]) == 1:
                    heard["probes"] |= probe_rounding(weights, inputs[0].parameters())

    def ppo_metrics(run, *inputs):
        row = real_metrics(run, *inputs)
        if run.step == iteration:
            run.bar.close()
            heard.update(metrics=(inputs, row), history=[*run.history, row])
            raise Heard
        return row

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(ppo, name, wrapped(name)))
        estimators = ppo.ESTIMATORS | {"gae": (ppo.gae, ppo.value_loss)}
        stack.enter_context(mock.patch.object(ppo, "ESTIMATORS", estimators))
        stack.enter_context(mock.patch.object(ppo, "minibatches", minibatches))
        stack.enter_context(mock.patch.object(ppo.metrics, "ppo_metrics", ppo_metrics))
        with contextlib.suppress(Heard):
            ppo.main(cfg)
    return heard


@torch.no_grad()
def probe(policy, critic, ref_policy, tokens, attention_mask, num_columns, temperature, size, rows):
    """Answers to questions about this batch that the loop does not ask, before the update."""
    args = tokens, attention_mask, num_columns
    old, _, _ = ppo.forward_responses(policy, None, *args, temperature)
    mask = attention_mask[:, -num_columns:]
    inputs = tokens[:, :-1], attention_mask[:, :-1]
    read = lambda model: common.forward(model, *inputs, logits_to_keep=num_columns)
    logits = [
        (read(model).logits.float() / temperature).log_softmax(-1) for model in (policy, ref_policy)
    ]
    exact = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)  # over the vocabulary, (B, R)
    padding = 0.0
    for i, m in enumerate(attention_mask):  # each row again, without its padding
        its = tokens[i][m][None], m[m][None], int(mask[i].sum()), temperature
        alone, _, _ = ppo.forward_responses(policy, None, *its)
        padding = max(padding, (alone[0] - old[i][mask[i]]).abs().max().item())
    # Dropout, where the model has it in attention; sampling; neither from the run's random numbers.
    layers = [m for m in policy.modules() if hasattr(m, "attention_dropout")]
    was_training = policy.training
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy.train()
        for layer in layers:
            layer.attention_dropout = 0.1
        dropped, _, _ = ppo.forward_responses(policy, None, *args, temperature)
        for layer in layers:
            layer.attention_dropout = 0.0
        policy.train(was_training)
        cold = ppo.sample_responses(ref_policy, rows, num_columns, 0.7)
    ratio = (dropped - old).exp()[mask]
    its_args = *cold[:2], cold[2].shape[1]
    cooled, undivided = (
        ppo.forward_responses(ref_policy, None, *its_args, t)[0] for t in (0.7, 1.0)
    )
    return {
        "exact_kl": exact.where(mask, 0.0).sum(1).tolist(),
        "padding": padding,
        "dropout_outside": ((ratio - 1).abs() > 0.2).float().mean().item(),
        "undivided_kl": (cooled - undivided).where(cold[2], 0.0).sum(1).mean().item(),
    }


@torch.no_grad()
def probe_rounding(before, after):
    """The first optimizer step of each weight that moved, and the weight itself: (weights,) each."""
    before, after = (torch.cat([w.flatten() for w in weights]) for weights in (before, after))
    moved = before != after
    return {"weights": before[moved], "step": (after - before)[moved]}


# === 2. The record: what numbers.json holds =======================================================
def is_cut(ratio, advantage, clip_eps):
    """Where the gradient of eq. 5 is 0: the ratio is outside, on the side that A pushes to."""
    return (ratio > 1 + clip_eps and advantage > 0) or (ratio < 1 - clip_eps and advantage < 0)


def rows_of(x, mask, digits=4):
    """(B, R) as a list of lists: of each row what counts, rounded."""
    return [[round(value, digits) for value in row[m].tolist()] for row, m in zip(x, mask)]


def choose(ratios, advantages, clip_eps):
    """The row that is shown: among those of up to LONGEST tokens, one where the clip has cut after
    the last epoch on both sides, if there is one, and of these the one with the most tokens cut."""

    def how_often(i):
        signs = [a > 0 for r, a in zip(ratios[i], advantages[i]) if is_cut(r, a, clip_eps)]
        return len({*signs}), len(signs)

    short = [i for i, row in enumerate(ratios) if len(row) <= LONGEST] or range(len(ratios))
    return max(short, key=how_often)


def make_record(cfg, iteration, heard):
    """The iteration as plain numbers. Lists over the B rows hold each row's counted tokens, to four
    decimals; what concerns the response that is shown has seven."""
    (batch, _, truths, ended, *_, steps, _), row = heard["metrics"]
    mask, (final_scores, _, _, kl_coef) = batch.response_mask, heard["kl_shaped_rewards"][0]
    per_epoch = cfg.batch_size // cfg.minibatch_size
    epochs = [outputs for _, outputs in heard["steps"][per_epoch - 1 :: per_epoch]]
    ratios = rows_of((epochs[-1][0] - batch.logprobs).exp(), mask)
    shown = choose(ratios, rows_of(batch.advantages, mask), cfg.clip_eps)
    columns = {"logprobs": batch.logprobs, "ref_logprobs": batch.ref_logprobs}
    columns |= {"values": batch.values, "rewards": heard["kl_shaped_rewards"][1]}
    columns |= {"advantages": heard["gae"][1][0], "whitened": batch.advantages}
    columns |= {"new_values": epochs[-1][2]}
    prompt_length = batch.tokens.shape[1] - mask.shape[1]
    timing = ("seconds", "tokens_per", "peak")  # of the machine; all else is of the algorithm
    history = ("score", "true_reward", "kl", "explained_variance")
    return {
        "settings": {name: getattr(cfg, name) for name in SETTINGS} | {"iteration": iteration},
        "metrics": {key: value for key, value in row.items() if not key.startswith(timing)},
        "history": [{key: old[key] for key in history} for old in heard["history"]],
        "steps": [{name: float(x) for name, x in step.items()} for step in steps],
        "probes": finish_probes(heard, row["lr"]),
        "batch": {
            "columns": [prompt_length, mask.shape[1]],
            "prompt_lengths": batch.attention_mask[:, :prompt_length].sum(1).tolist(),
            "ended": ended.tolist(), "kl_coef": kl_coef,
            "final_scores": [round(score, 6) for score in final_scores.tolist()],
            "true_rewards": None if truths is None else truths.tolist(),
            **{name: rows_of(x, mask) for name, x in columns.items()},
            "new_logprobs": [rows_of(new_logprobs, mask) for new_logprobs, *_ in epochs],
            "minibatches": [index for index, _ in heard["steps"]],
            "exact_kl": [round(kl, 4) for kl in heard["probes"]["exact_kl"]],
        },
        "response": one_response(cfg, heard, shown),
    }


def finish_probes(heard, lr):
    """The probes as numbers: also what bf16 weights would have missed of the first step."""
    probes, critic = dict(heard["probes"]), heard["load_models"][1][2]
    weights, step, _ = probes.pop("weights"), probes.pop("step"), probes.pop("exact_kl")
    add = lambda step: weights.bfloat16() + step.bfloat16()
    still = lambda step: (add(step) == weights.bfloat16()).float().mean().item()
    probes["median_step"] = step.abs().median().item()
    probes["bf16_still"], probes["bf16_still_3e-6"] = still(step), still(step * 3e-6 / lr)
    probes["reward_mean"], probes["reward_std"] = common.score_scale(critic.config)
    return probes


def one_response(cfg, heard, i):
    """All about row i, its counted tokens only."""
    (batch, score_parts, truths, ended, *_), _ = heard["metrics"]
    (_, tokenizer, *_), _ = heard["load_models"]
    mask, columns = batch.response_mask, batch.response_mask.shape[1]
    counted = lambda x: rows_of(x[i : i + 1], mask[i : i + 1], 7)[0]
    rewards, (advantages, *_) = heard["kl_shaped_rewards"][1], heard["gae"][1]
    deltas, *_ = ppo.gae(rewards, batch.values, mask, cfg.gamma, 0.0)  # lambda 0: A_t is delta_t
    ids, attended = batch.tokens[i], batch.attention_mask[i]
    return {
        "row": i,
        "prompt": heard["sample_responses"][0][1][i]["prompt"],
        "text": heard["decode_responses"][1][i],
        "prompt_ids": ids[:-columns].tolist(),
        "prompt_tokens": [piece(tokenizer, id) for id in ids[:-columns].tolist()],
        "ids": ids[-columns:][mask[i]].tolist(),
        "tokens": [piece(tokenizer, id) for id in ids[-columns:][mask[i]].tolist()],
        "special_ids": {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id},
        "position_ids": common.position_ids(attended[None])[0].tolist(),
        "score": score_parts.sum(0)[i].item(), "ended": ended[i].item(),
        "true_reward": None if truths is None else truths[i].item(),
        "logprobs": counted(batch.logprobs), "ref_logprobs": counted(batch.ref_logprobs),
        "values": counted(batch.values), "rewards": counted(rewards),
        "deltas": counted(deltas), "advantages": counted(advantages),
        "returns": counted(batch.returns),
        "whitened": counted(batch.advantages),
        "new_logprobs": [counted(outputs[0]) for _, outputs in heard["steps"]],  # after each step
    }


# === 3. The numbers of the page ===================================================================
def flat(rows):
    return [x for row in rows for x in row]


def ratios_of(record):
    """The ratio of each counted token after each epoch: epochs of flat lists."""
    batch = record["batch"]
    old = flat(batch["logprobs"])
    return [[math.exp(new - x) for new, x in zip(flat(rows), old)] for rows in batch["new_logprobs"]]


def explained(values, returns):
    """1 - var(G - V) / var(G)."""
    errors = [g - v for g, v in zip(returns, values)]
    return 1 - statistics.pvariance(errors) / (statistics.pvariance(returns) or math.nan)


def summary(record):
    """{name: what one_batch.template.md has under it}, from what the record holds."""
    numbers = dict(record["settings"]) | record["probes"] | {"lr": record["metrics"]["lr"]}
    first, last = record["history"][0], record["metrics"]
    of_run = ("score", "score_std", "true_reward", "kl", "approx_kl", "clip_fraction", "ratio_first")
    of_run += ("sampler_gap", "explained_variance", "eos_rate", "optimizer_steps", "entropy")
    numbers |= {name: last[name] for name in of_run}
    numbers |= {f"first_{name}": first[name] for name in ("score", "true_reward", "explained_variance")}
    for i, step in (("1", record["steps"][0]), ("n", record["steps"][-1])):
        numbers |= {f"{name}_{i}": step[name] for name in ("policy_loss", "value_loss", "policy")}
    numbers["next_lr_share"] = 1 - record["settings"]["iteration"] / record["settings"]["iterations"]
    return numbers | summary_of_batch(record) | summary_of_response(record) | tables(record)


def summary_of_batch(record):
    batch, settings = record["batch"], record["settings"]
    lengths, (p, r) = [len(row) for row in batch["logprobs"]], batch["columns"]
    count, eps_v, lam = sum(lengths), settings["value_clip_eps"], settings["lam"]
    kls = [[x - y for x, y in zip(*rows)] for rows in zip(batch["logprobs"], batch["ref_logprobs"])]
    summed, exact = [sum(row) for row in kls], batch["exact_kl"]
    error = lambda xs: statistics.pstdev(xs) / math.sqrt(len(xs))
    raw, white = flat(batch["advantages"]), flat(batch["whitened"])
    values, new_values = flat(batch["values"]), flat(batch["new_values"])
    returns = [a + v for a, v in zip(raw, values)]
    far = [abs(new - v) > eps_v for new, v in zip(new_values, values)]
    kept = [  # as eq. 6 has it: V_old +- eps_v is the worse guess, and it does not depend on V
        abs(v + math.copysign(eps_v, new - v) - g) > abs(new - g) and is_far
        for v, new, g, is_far in zip(values, new_values, returns, far)
    ]
    means = [statistics.mean(flat(batch["whitened"][i] for i in rows))
             for rows in batch["minibatches"][: settings["batch_size"] // settings["minibatch_size"]]]
    truths = batch["true_rewards"] or [0.0, 1.0] * (len(lengths) // 2)
    deviation = lambda lam: statistics.pstdev(flat(advantages_of(batch, settings["gamma"], lam)))
    return {
        "P": p, "R": r, "N": count, "cells": r * len(lengths), "padding_share":
        1 - (count + sum(batch["prompt_lengths"])) / ((p + r) * len(lengths)),
        "shortest_prompt": min(batch["prompt_lengths"]), "longest_prompt": max(batch["prompt_lengths"]),
        "shortest": min(lengths), "mean_length": count / len(lengths),
        "num_ended": sum(batch["ended"]), "num_cut": len(lengths) - sum(batch["ended"]),
        "kl_error": error(summed), "exact_kl": statistics.mean(exact), "exact_kl_error": error(exact),
        "kl_per_token": sum(summed) / count, "negative_tokens": sum(x < 0 for x in flat(kls)) / count,
        "negative_responses": sum(x < 0 for x in summed), "lowest_kl": min(summed),
        "mean_advantage": statistics.mean(raw), "deviation": statistics.pstdev(raw),
        "white_mean": abs(round(statistics.mean(white), 3)), "white_deviation": statistics.pstdev(white),
        "sign_changed": sum((a > 0) != (w > 0) for a, w in zip(raw, white)) / count,
        "lowest_minibatch_mean": min(means), "highest_minibatch_mean": max(means),
        "explained_after": explained(new_values, returns),
        "values_far": sum(far) / count, "values_kept": sum(kept) / count,
        "correlation": statistics.correlation(batch["final_scores"], truths),
        "deviation_0": deviation(0.0), "deviation_lam": deviation(lam), "deviation_1": deviation(1.0),
    }


def advantages_of(batch, gamma, lam):
    """Eq. 2 with another lambda: of each row a list."""
    mask = torch.zeros(len(batch["ended"]), batch["columns"][1], dtype=torch.bool)
    rewards, values = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for i, (its_rewards, its_values) in enumerate(zip(batch["rewards"], batch["values"])):
        n = len(its_rewards)
        mask[i, :n] = True
        rewards[i, :n], values[i, :n] = torch.tensor(its_rewards), torch.tensor(its_values)
    return rows_of(ppo.gae(rewards, values, mask, gamma, lam)[0], mask)


def summary_of_response(record):
    one, settings = record["response"], record["settings"]
    kl = [x - y for x, y in zip(one["logprobs"], one["ref_logprobs"])]
    t, at = len(kl) - 1, kl.index(max(kl))
    num_pads = len(one["prompt_ids"]) - record["batch"]["prompt_lengths"][one["row"]]
    numbers = {
        "row": one["row"], "prompt": one["prompt"], "text": one["text"].strip(), "r_score": one["score"],
        "r_true": one["true_reward"], "T": t + 1, "t_last": t, "num_pads": num_pads,
        "its_length": len(one["prompt_ids"]) - num_pads, "before_P": len(one["prompt_ids"]) - 1,
        "padding_behind": record["batch"]["columns"][1] - t - 1,
        "pad_id": one["special_ids"]["pad"], "eos_id": one["special_ids"]["eos"],
        "first_token": one["tokens"][0].strip(), "first_logprob": one["logprobs"][0],
        "first_probability": math.exp(one["logprobs"][0]),
        "last_prompt_token": one["prompt_tokens"][-1].strip(), "last_logprob": one["logprobs"][t],
        "kl_t": at, "kl_token": one["tokens"][at].strip(), "kl_max": kl[at],
        "kl_max_logprob": one["logprobs"][at], "kl_max_ref_logprob": one["ref_logprobs"][at],
        "kl_max_price": one["rewards"][at] if at < t else -settings["kl_coef"] * kl[at],
        "r_kl": sum(kl), "r_price": -settings["kl_coef"] * sum(kl), "last_kl": kl[t],
        "lowest_reward": min(one["rewards"][:t]), "highest_reward": max(one["rewards"][:t]),
        "r_sum": sum(one["rewards"]), "bandit": sum(one["rewards"]) - one["values"][0],
        "lowest_advantage": min(one["advantages"]), "highest_advantage": max(one["advantages"]),
        "reaching_first": (settings["gamma"] * settings["lam"]) ** t,
    }
    for name in ("rewards", "values", "deltas", "advantages", "returns", "whitened"):
        numbers |= {f"{name}_0": one[name][0], f"{name}_T": one[name][t], f"{name}_before": one[name][t - 1]}
    return numbers | three_tokens(record)[1]


def three_tokens(record):
    """([t, t, t], their numbers): of those of probability below 0.9 the one with the highest
    advantage, that with the lowest, and of the others the one that moved most against its own."""
    one = record["response"]
    old, new, white = one["logprobs"], one["new_logprobs"][-1], one["whitened"]
    order = range(len(old))
    open_ = [t for t in order if math.exp(old[t]) < 0.9] or [*order]
    up, down = max(open_, key=lambda t: white[t]), min(open_, key=lambda t: white[t])
    against = lambda t: -(new[t] - old[t]) * white[t] / (abs(white[t]) or 1)
    other = max((t for t in order if t not in (up, down)), key=against, default=up)
    numbers = {}
    for name, t in zip("abc", (up, down, other)):
        numbers |= {
            f"{name}_t": t, f"{name}_token": one["tokens"][t].strip(), f"{name}_A": white[t],
            f"{name}_old": math.exp(old[t]), f"{name}_new": math.exp(new[t]),
            f"{name}_ratio": math.exp(new[t] - old[t]), f"{name}_word": "rose" if new[t] > old[t] else "fell",
        }
    return [up, down, other], numbers


def tables(record):
    """The page's two tables: the shown response token by token, and the ratios by epoch."""
    one, eps = record["response"], record["settings"]["clip_eps"]
    names = ("logprobs", "ref_logprobs", "rewards", "values", "deltas", "advantages", "returns")
    lines = ["| t | token | log π | log π_ref | KL | r | V | δ | A | G | A, whitened |", "|---:|---|" + "---:|" * 9]
    for t, (token, *cells) in enumerate(zip(one["tokens"], *map(one.get, names), one["whitened"])):
        cells.insert(2, cells[0] - cells[1])
        lines.append(f"| {t} | `{token.strip()}` | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    white = flat(record["batch"]["whitened"])
    epochs = ["| after epoch | approx_kl | lowest ratio | highest ratio | outside 1 ± ε | cut |", "|---:|" + "---:|" * 5]
    for epoch, ratios in enumerate(ratios_of(record), 1):
        kl = statistics.mean(ratio - 1 - math.log(ratio) for ratio in ratios)
        outside = statistics.mean(abs(ratio - 1) > eps for ratio in ratios)
        cut = statistics.mean(is_cut(ratio, a, eps) for ratio, a in zip(ratios, white))
        epochs.append(f"| {epoch} | {kl:.4f} | {min(ratios):.3f} | {max(ratios):.2f} | {outside:.1%} | {cut:.1%} |")
    numbers = dict(zip(("last_approx_kl", "last_outside", "last_cut"), (kl, outside, cut)))
    return numbers | {"table_of_tokens": "\n".join(lines), "table_of_epochs": "\n".join(epochs)}


# === 4. The pictures ==============================================================================
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#DDDDDD", "#222222"  # Okabe and Ito 2008
WIDTH, PER_LINE = 7.0, 9  # inches; tokens of a strip in one line


def new_figure(height):
    """A matplotlib Figure, made without pyplot: no display, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("one_batch.py needs the package matplotlib; pip install matplotlib") from None
    return Figure(figsize=(WIDTH, height), layout="constrained")


def clean(axes):
    """Only the axes that are read."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def shade(value, scale):
    """White at 0, orange above, blue below; the number stands in the cell, so colour only helps."""
    from matplotlib.colors import to_rgb

    share = min(abs(value) / scale, 1) * 0.75
    return [1 - share * (1 - x) for x in to_rgb(ORANGE if value > 0 else BLUE)]


def draw_strips(lines, rows):
    """Words, and under each its numbers.

    `lines` is a list of (first t, words); `rows` of (label, numbers, their format, scale of the
    colour or None, marks): a mark of a number is "" or what stands beside it in a thick frame.
    """
    height = len(rows) + 2.1  # of a line, in cells
    figure = new_figure(0.22 * height * len(lines) + 0.05)
    axes = figure.add_subplot()
    axes.set(xlim=(-1.75, PER_LINE + 0.03), ylim=(height * len(lines) - 0.5, 0))
    axes.axis("off")
    for line, (start, words) in enumerate(lines):
        top = line * height + 0.1
        axes.text(-0.1, top + 0.5, "t", ha="right", va="center", fontsize=8.5, style="italic", color="0.4")
        for x, word in enumerate(words):
            center = {"ha": "center", "va": "center"}
            axes.text(x + 0.5, top + 0.5, f"{start + x}", fontsize=8, color="0.4", **center)
            size = 10 if len(word) < 9 else 8.5
            axes.text(x + 0.5, top + 1.3, word, fontsize=size, weight="bold", parse_math=False, **center)
        for y, (label, numbers, form, scale, marks) in enumerate(rows):
            y += top + 1.85
            axes.text(-0.1, y + 0.5, label, ha="right", va="center", fontsize=9)
            for x in range(len(words)):
                number, mark = numbers[start + x], marks[start + x] if marks else ""
                colour = shade(number - (scale[0]), scale[1]) if scale else "white"
                draw_cell(axes, x, y, f"{number:{form}}{mark}", colour, mark)
    return figure


def draw_cell(axes, x, y, text, colour, mark):
    from matplotlib.patches import Rectangle

    frame = {"linewidth": 2.0, "edgecolor": INK, "zorder": 3} if mark else {"linewidth": 0.5, "edgecolor": "0.7"}
    axes.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=colour, **frame))
    weight = "bold" if mark else "normal"
    axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=9, weight=weight, zorder=4)


def lines_of(one):
    words = [token.strip() or repr(token) for token in one["tokens"]]
    return [(start, words[start : start + PER_LINE]) for start in range(0, len(words), PER_LINE)]


def draw_batch(record):
    """The table of tokens: padding, prompts, responses, and the row that is followed."""
    batch, row = record["batch"], record["response"]["row"]
    p, r = batch["columns"]
    kinds = [
        [0.0] * (p - prompt) + [0.35] * prompt + [0.75] * (len(response) - 1) + [1.0]
        + [0.0] * (r - len(response))
        for prompt, response in zip(batch["prompt_lengths"], batch["logprobs"])
    ]
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    axes.imshow(kinds, cmap="Greys", vmin=0, vmax=1.1, aspect="auto", interpolation="nearest",
                extent=(0, p + r, len(kinds), 0))
    axes.axvline(p, color=ORANGE, linewidth=1.5)
    axes.text(p, -1.5, f"P = {p}", ha="center", va="bottom", color=ORANGE, fontsize=10, weight="bold")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 2}
    y = len(kinds) * 0.08
    axes.text(p * 0.55, y, "prompt", ha="center", fontsize=10, bbox=box)
    axes.text(p + r * 0.18, y, "response", ha="center", fontsize=10, bbox=box)
    axes.text(p + r * 0.85, y, "padding", ha="center", fontsize=10, bbox=box)
    last = p + len(batch["logprobs"][row])
    axes.annotate(
        f"row {row}: EOS", (last, row + 0.5), (p + r * 0.85, row + 0.5), ha="center", va="center",
        fontsize=10, bbox=box, arrowprops={"arrowstyle": "->", "color": ORANGE, "linewidth": 1.5},
    )
    axes.axhline(row + 0.5, color=ORANGE, linewidth=1, linestyle=":", zorder=0.5)
    axes.set_xlabel(f"position, P + R = {p} + {r}", fontsize=10)
    axes.set_ylabel(f"row, B = {len(kinds)}", fontsize=10)
    return figure


def draw_tokens(record):
    """The row's prompt with its padding, and its response with its mask."""
    one = record["response"]
    prompt = [token.strip() for token in one["prompt_tokens"]]
    num_pads = len(prompt) - record["batch"]["prompt_lengths"][one["row"]]
    extra = [f"{'<pad>'}"] * min(3, record["batch"]["columns"][1] - len(one["tokens"]))
    words = ["<pad>"] * num_pads + prompt[num_pads:], [*map(str.strip, one["tokens"])] + extra
    p = len(prompt)
    mask = [0] * num_pads + [1] * (p - num_pads), [1] * len(one["tokens"]) + [0] * len(extra)
    figure = new_figure(0.22 * 4.1 * sum(math.ceil(len(x) / 10) for x in words) + 0.7)
    axes = figure.add_subplot()
    axes.axis("off")
    top = 0.0
    for name, its, counts, start, what in zip(("prompt", "response"), words, mask, (0, p), ("attention", "response")):
        axes.text(-1.6, top + 0.5, name, fontsize=10.5, weight="bold", va="center", color=ORANGE)
        top += 1
        for first in range(0, len(its), 10):
            for y, label in enumerate(("position", "token", f"{what}_mask")):
                axes.text(-0.1, top + y + 0.5, label, ha="right", va="center", fontsize=8.5, color="0.3")
            for x, (word, count) in enumerate(zip(its[first : first + 10], counts[first : first + 10])):
                axes.text(x + 0.5, top + 0.5, f"{start + first + x}", ha="center", va="center", fontsize=8, color="0.4")
                weight, colour = ("bold", INK) if count else ("normal", "0.55")
                axes.text(x + 0.5, top + 1.5, word, ha="center", va="center", fontsize=9, weight=weight, color=colour, parse_math=False)
                draw_cell(axes, x, top + 2, "1" if count else "0", GREY if count else "white", "")
            top += 3.5
    axes.set(xlim=(-1.7, 10.05), ylim=(top - 0.3, 0))
    return figure


def draw_kl(record):
    one = record["response"]
    kl = [x - y for x, y in zip(one["logprobs"], one["ref_logprobs"])]
    scale = 0, max(map(abs, kl)) or 1
    rows = [("log π", one["logprobs"], ".2f", None, None), ("log π_ref", one["ref_logprobs"], ".2f", None, None)]
    return draw_strips(lines_of(one), [*rows, ("KL", kl, "+.2f", scale, None)])


def word_axis(axes, one):
    words = [token.strip() for token in one["tokens"]]
    axes.set_xticks(range(len(words)), words, rotation=60, ha="right", rotation_mode="anchor", fontsize=9, parse_math=False)
    axes.set_xlim(-0.8, len(words) - 0.2)
    axes.tick_params(axis="y", labelsize=9)
    clean(axes)


def draw_rewards(record):
    one, beta = record["response"], record["batch"]["kl_coef"]
    score = record["batch"]["final_scores"][one["row"]]
    paid = [-beta * (x - y) for x, y in zip(one["logprobs"], one["ref_logprobs"])]
    figure = new_figure(3.1)
    axes = figure.add_subplot()
    t = len(paid) - 1
    axes.bar(range(len(paid)), paid, color=BLUE, label="−β KL, at every token")
    axes.bar([t], [score], bottom=[max(paid[t], 0) if score > 0 else min(paid[t], 0)], color=ORANGE, hatch="//", edgecolor="white",
             label="score, at the last token")
    axes.annotate(f"{score:+.2f}", (t, score / 2), (t - 0.7, score / 2), ha="right", va="center", fontsize=10, weight="bold")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_ylabel("r", fontsize=10)
    axes.legend(fontsize=9.5, frameon=False, loc="upper left" if score > 0 else "lower left")
    word_axis(axes, one)
    return figure


def draw_advantages(record):
    one = record["response"]
    ts = range(len(one["tokens"]))
    figure = new_figure(5.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(ts, one["returns"], "s--", color=ORANGE, markersize=4, label="G = A + V")
    upper.plot(ts, one["values"], "o-", color=BLUE, markersize=4, label="V")
    upper.vlines(ts, one["values"], one["returns"], color="0.6", linewidth=1, zorder=0, label="A")
    lower.bar(ts, one["deltas"], color=GREY, edgecolor="0.5", hatch="..", label="δ")
    lower.plot(ts, one["advantages"], "D-", color=INK, markersize=4, label="A")
    lower.axhline(0, color=INK, linewidth=0.8)
    for axes, label in ((upper, "G, V"), (lower, "A, δ")):
        axes.set_ylabel(label, fontsize=10)
        axes.legend(fontsize=9.5, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 0.98))
    clean(upper)
    upper.tick_params(labelbottom=False, labelsize=9)
    word_axis(lower, one)
    return figure


def draw_whitening(record):
    """The advantages of all counted tokens before and after, and those of the response as ticks."""
    figure = new_figure(2.6)
    for axes, key, title in zip(figure.subplots(1, 2, sharey=True), ("advantages", "whitened"), ("A", "A, whitened")):
        every, its = flat(record["batch"][key]), record["response"][key]
        mean, deviation = statistics.mean(every), statistics.pstdev(every)
        axes.hist(every, bins=45, color=GREY, edgecolor="0.55", linewidth=0.4)
        axes.axvline(mean, color=ORANGE, linewidth=2)
        for side in (-1, 1):
            axes.axvline(mean + side * deviation, color=ORANGE, linewidth=1.2, linestyle="--")
        axes.plot(its, [-0.05] * len(its), "|", color=BLUE, markersize=9, transform=axes.get_xaxis_transform(), clip_on=False)
        shown = f"mean {mean:.2f}" if key == "advantages" else "mean 0"
        axes.set_title(f"{title}: {shown}, deviation {deviation:.2f}", fontsize=10)
        axes.tick_params(labelsize=9, pad=7)
        clean(axes)
    return figure


def draw_ratios(record):
    """The ratio of each token after each epoch; ✂ and a frame where its gradient is 0."""
    one, settings = record["response"], record["settings"]
    per_epoch = len(one["new_logprobs"]) // settings["ppo_epochs"]
    rows = [("A", one["whitened"], "+.2f", (0, 3), None)]
    for epoch in range(settings["ppo_epochs"]):
        new = one["new_logprobs"][(epoch + 1) * per_epoch - 1]
        ratios = [math.exp(x - y) for x, y in zip(new, one["logprobs"])]
        marks = ["×" if is_cut(r, a, settings["clip_eps"]) else "" for r, a in zip(ratios, one["whitened"])]
        rows.append((f"ρ, epoch {epoch + 1}", ratios, ".2f", (1, 1), marks))
    return draw_strips(lines_of(one), rows)


def draw_probabilities(record):
    """Three tokens' probability after each optimizer step; a filled marker where the response was
    in the minibatch."""
    one, (ts, _) = record["response"], three_tokens(record)
    own = [one["row"] in rows for rows in record["batch"]["minibatches"]]
    figure = new_figure(3.3)
    axes = figure.add_subplot()
    looks = (("o", "-", ORANGE), ("s", "--", BLUE), ("^", ":", INK))
    steps = range(len(own) + 1)
    for t, (marker, line, colour) in zip(ts, looks):
        curve = [math.exp(x[t]) for x in [one["logprobs"], *one["new_logprobs"]]]
        axes.plot(steps, curve, line, color=colour, linewidth=1.5)
        for inside, filled in ((True, colour), (False, "white")):
            at = [step for step in steps if (step > 0 and own[step - 1]) == inside]
            axes.plot(at, [curve[step] for step in at], marker, color=colour, markerfacecolor=filled, markersize=6 if inside else 4)
        label = f" {one['tokens'][t].strip()}, t = {t}\n A = {one['whitened'][t]:+.2f}"
        axes.text(len(own) + 0.2, curve[-1], label, va="center", fontsize=9.5, color=colour, parse_math=False)
    per_epoch = len(own) // record["settings"]["ppo_epochs"]
    for step in steps[::per_epoch][:-1]:
        axes.axvline(step, color="0.8", linewidth=1, zorder=0)
        axes.text(step + per_epoch / 2, 1.01, f"epoch {step // per_epoch + 1}", transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
    axes.set(xlim=(-0.3, len(own) * 1.22), ylim=(0, None))
    axes.set_xticks(steps[::per_epoch])
    axes.set_xlabel("optimizer steps", fontsize=10)
    axes.set_ylabel("π(token)", fontsize=10)
    axes.tick_params(labelsize=9)
    clean(axes)
    return figure


PICTURES = {
    "1_batch.png": draw_batch, "2_tokens.png": draw_tokens, "3_kl.png": draw_kl,
    "4_rewards.png": draw_rewards, "5_advantages.png": draw_advantages,
    "6_whitening.png": draw_whitening, "7_ratio.png": draw_ratios,
    "8_probability.png": draw_probabilities,
}


def save_picture(figure, path):
    """A PNG of 64 colours, a third of the size of one of all colours."""
    import io

    from PIL import Image  # matplotlib needs it too

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, metadata={"Software": None})
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


# === 5. The files =================================================================================
def fill(template, numbers):
    """The page: each {name} or {name:.2f} of the template is the number of that name."""
    marked = re.sub(r"(?s)\A<!--.*?-->\n", MARK, template)
    return marked.format_map(numbers)


MARK = "<!-- Made by docs/one_batch.py from the template beside it: change that, and run it again. -->\n"


def to_seven(x):
    """Floats with seven digits: what a float32 holds."""
    if isinstance(x, float):
        return float(f"{x:.7g}")
    if isinstance(x, dict):
        return {key: to_seven(value) for key, value in x.items()}
    return [to_seven(value) for value in x] if isinstance(x, list) else x


def write_numbers(record, path):
    """One line for each key, and for each row of the batch: a change shows where it is."""
    text = json.dumps(record, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_all(record, folder):
    """numbers.json and the pictures into the folder, and each page beside its template."""
    figures = {name: draw(record) for name, draw in PICTURES.items()}  # before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    write_numbers(record, folder / "numbers.json")
    for name, figure in figures.items():
        save_picture(figure, folder / name)
    numbers = summary(record)
    for template in sorted(HERE.glob("one_batch*.template.md")):
        page = fill(template.read_text(encoding="utf-8"), numbers)
        target = folder.parent / template.name.replace(".template", "")
        target.write_text(page, encoding="utf-8")


def main(argv=None):
    """From the command line to the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--iteration", type=int, default=7, help="which one (default: %(default)s)")
    parser.add_argument("--folder", type=pathlib.Path, default=HERE / "one_batch", help="of the pictures; the page lies beside it")
    args, flags = parser.parse_known_args(argv)
    new_figure(1)  # matplotlib is asked for before the run
    with tempfile.TemporaryDirectory() as output:
        cfg = cli.parse_args(ppo.Config, __doc__.splitlines()[0], [*flags, "--output", output])
        if not 1 <= args.iteration <= cfg.iterations:
            raise UserError(f"--iteration is {args.iteration}; it must be from 1 to {cfg.iterations}")
        record = to_seven(make_record(cfg, args.iteration, listen(cfg, args.iteration)))
    write_all(record, args.folder)
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    with cli.command_line():
        main()
