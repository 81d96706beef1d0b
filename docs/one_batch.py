"""One batch of ppo.py from prompt to optimizer step: the pictures and numbers of docs/one_batch.md.

    python docs/one_batch.py --device cpu      after python sft.py and python reward_model.py
    python docs/one_batch.py --redraw          after a change of a template or a picture

Runs ppo.main() itself and listens at its functions, so what is shown is the loop's own iteration
and not a copy's. Nothing is drawn from the run's random numbers: without a listener it would have
come out the same. It takes the flags of ppo.py and some of its own.

Writes    one_batch/numbers.json, one_batch/*.png, and a page from each one_batch*.template.md
Needs     matplotlib, for the pictures only: pip install matplotlib
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import plumbing  # noqa: E402, F401 - first: Ctrl-C while torch loads is no traceback

import argparse
import contextlib
import io
import json
import math
import statistics
import string
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
COLD, DROPOUT, SMALL_LR, OPEN = 0.7, 0.1, 3e-6, 0.9  # of the probes; OPEN of `three_tokens`


# === 1. Listening to a run ========================================================================
class Heard(Exception):
    """Ends the run: the iteration was heard to its end."""


class Listener:
    """Stands in for functions of ppo.py, calls them, and keeps what they were given and gave.

    `heard` has of each function of KEPT the latest (arguments, result); of the wanted iteration
    "steps", after each optimizer step its rows and what evaluate_tokens then says; "probes";
    "metrics", the arguments of ppo_metrics and its row; "history", the rows up to it.
    """

    KEPT = (
        "load_models", "sample_responses", "decode_responses", "evaluate_tokens",
        "kl_shaped_rewards", "gae",
    )

    def __init__(self, iteration):
        self.iteration, self.num_updates, self.heard = iteration, 0, {"steps": []}
        self.real = {name: getattr(ppo, name) for name in (*self.KEPT, "minibatches")}
        self.real_metrics = ppo.metrics.ppo_metrics

    def keep(self, name):
        def function(*inputs):
            outputs = self.real[name](*inputs)
            self.heard[name] = inputs, outputs
            return outputs

        return function

    def minibatches(self, *sizes):
        """The loop asks for the next one when the optimizer step of the last is done."""
        self.num_updates += 1
        if self.num_updates != self.iteration:
            yield from self.real["minibatches"](*sizes)
            return
        inputs, (logprobs, *_) = self.heard["evaluate_tokens"]
        (policy, _, ref_policy, *of_batch, _), asked = inputs, self.heard["sample_responses"][0]
        weights = [weight.detach().clone() for weight in policy.parameters()]
        self.heard["probes"] = {
            "exact_kl": exact_kl(policy, ref_policy, *of_batch),
            "padding": padding_gap(policy, logprobs, *of_batch),
            "dropout": dropout_ratios(policy, logprobs, *of_batch),
            "undivided_kl": undivided_kl(ref_policy, *asked[1:3]),
        }
        for index in self.real["minibatches"](*sizes):
            yield index
            outputs = self.real["evaluate_tokens"](*inputs)
            self.heard["steps"].append((index.tolist(), outputs))
            if len(self.heard["steps"]) == 1:
                self.heard["probes"]["first_step"] = first_step(weights, policy.parameters())

    def ppo_metrics(self, run, *inputs):
        row = self.real_metrics(run, *inputs)
        if run.step == self.iteration:
            run.bar.close()
            self.heard.update(metrics=(inputs, row), history=[*run.history, row])
            raise Heard
        return row


def listen(cfg, iteration):
    """What a Listener heard of a run, which ends with this iteration."""
    listener = Listener(iteration)
    functions = {name: listener.keep(name) for name in Listener.KEPT}
    functions["ESTIMATORS"] = {"gae": (functions["gae"], ppo.value_loss)}
    with (
        mock.patch.multiple(ppo, minibatches=listener.minibatches, **functions),
        mock.patch.object(ppo.metrics, "ppo_metrics", listener.ppo_metrics),
        contextlib.suppress(Heard),
    ):
        ppo.main(cfg)
    return listener.heard


# What the loop does not ask but readers do, of the policy before the update. What is drawn for it
# is drawn from other random numbers than the run's.
@torch.no_grad()
def exact_kl(policy, ref_policy, tokens, attention_mask, num_columns, temperature):
    """At each response token the KL as a sum over the vocabulary, of a response the sum: (B,)."""
    inputs = tokens[:, :-1], attention_mask[:, :-1]
    logprobs, ref_logprobs = (
        common.forward(model, *inputs, logits_to_keep=num_columns).logits.float().div(temperature)
        .log_softmax(-1) for model in (policy, ref_policy)
    )
    kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)  # (B, R)
    return torch.where(attention_mask[:, -num_columns:], kl, 0.0).sum(1)


@torch.no_grad()
def padding_gap(policy, logprobs, tokens, attention_mask, num_columns, temperature):
    """The most that a log-probability moves where each row is read alone, without its padding."""
    gaps = []
    for its_logprobs, ids, mask in zip(logprobs, tokens, attention_mask):
        counts = mask[-num_columns:]
        its = ids[mask][None], mask[mask][None], int(counts.sum()), temperature
        alone, _, _ = ppo.forward_responses(policy, None, *its)
        gaps.append((alone[0] - its_logprobs[counts]).abs().max().item())
    return max(gaps)


@torch.no_grad()
def dropout_ratios(policy, logprobs, *inputs):
    """exp(log pi in a pass with DROPOUT in attention - log pi), (B, R)."""
    layers = [module for module in policy.modules() if hasattr(module, "attention_dropout")]
    was_training = policy.training
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy.train()
        for layer in layers:
            layer.attention_dropout = DROPOUT
        dropped, _, _ = ppo.forward_responses(policy, None, *inputs)
        for layer in layers:
            layer.attention_dropout = 0.0
        policy.train(was_training)
    return (dropped - logprobs).exp()


@torch.no_grad()
def undivided_kl(ref_policy, prompt_rows, response_length):
    """Of each response that the reference samples at COLD, its KL to the same reference read at
    temperature 1: (B,)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rollout = ppo.sample_responses(ref_policy, prompt_rows, response_length, COLD)
    tokens, attention_mask, mask, *_ = rollout
    cold, plain = (
        ppo.forward_responses(ref_policy, None, tokens, attention_mask, mask.shape[1], t)[0]
        for t in (COLD, 1.0)
    )
    return torch.where(mask, cold - plain, 0.0).sum(1)


@torch.no_grad()
def first_step(before, after):
    """(weights, steps), (n,) each, of those weights that an optimizer step has moved."""
    before, after = (torch.cat([w.flatten() for w in weights]) for weights in (before, after))
    moved = before != after
    return before[moved], (after - before)[moved]


def rounded_away(weights, steps):
    """The share of weights that would stay where they are if all were bf16."""
    weights, steps = weights.bfloat16(), steps.bfloat16()
    return (weights + steps == weights).float().mean().item()


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
        "probes": finish_probes(heard, row["lr"], mask, cfg.clip_eps),
        "batch": {
            "columns": [prompt_length, mask.shape[1]],
            "prompt_lengths": batch.attention_mask[:, :prompt_length].sum(1).tolist(),
            "ended": ended.tolist(), "kl_coef": kl_coef,
            "final_scores": [round(score, 6) for score in final_scores.tolist()],
            "true_rewards": truths.tolist(),
            **{name: rows_of(x, mask) for name, x in columns.items()},
            "new_logprobs": [rows_of(new_logprobs, mask) for new_logprobs, *_ in epochs],
            "minibatches": [rows for rows, _ in heard["steps"]],
            "exact_kl": [round(kl, 4) for kl in heard["probes"]["exact_kl"].tolist()],
        },
        "response": one_response(cfg, heard, shown),
    }


def finish_probes(heard, lr, mask, clip_eps):
    """The probes as numbers."""
    probes, (*_, scorers) = heard["probes"], heard["load_models"][1]
    (weights, steps), ratio = probes["first_step"], probes["dropout"][mask]
    config = getattr(scorers[0].model, "config", None)  # a function has none
    mean, deviation = common.score_scale(config)
    undivided = probes["undivided_kl"].tolist()
    return {
        "padding": probes["padding"], "undivided_kl": statistics.mean(undivided),
        "undivided_kl_error": standard_error(undivided),
        "dropout_outside": ((ratio - 1).abs() > clip_eps).float().mean().item(),
        "median_step": steps.abs().median().item(), "bf16_still": rounded_away(weights, steps),
        "bf16_still_small": rounded_away(weights, steps * SMALL_LR / lr),  # Adam's goes by its rate
        "reward_mean": mean, "reward_std": deviation,
    }


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
        "true_reward": truths[i].item(),
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


def standard_error(xs):
    return statistics.pstdev(xs) / math.sqrt(len(xs))


def explained(values, returns):
    """1 - var(G - V) / var(G)."""
    errors = [g - v for g, v in zip(returns, values)]
    return 1 - statistics.pvariance(errors) / statistics.pvariance(returns)


def summary(record):
    """{name: what one_batch.template.md has under it}, from what the record holds."""
    settings, last, first = record["settings"], record["metrics"], record["history"][0]
    of_run = ("score", "score_std", "true_reward", "kl", "approx_kl", "clip_fraction", "lr")
    of_run += ("ratio_first", "sampler_gap", "explained_variance", "optimizer_steps")
    numbers = settings | record["probes"] | {name: last[name] for name in of_run} | {
        "cold": COLD, "dropout": DROPOUT, "small_lr": SMALL_LR, "open": OPEN,
        "gamma_lam": settings["gamma"] * settings["lam"],
        "updates_before": settings["iteration"] - 1,
        "next_lr_share": 1 - settings["iteration"] / settings["iterations"],
    }
    for name in ("score", "true_reward", "explained_variance"):
        numbers[f"first_{name}"] = first[name]
    for name in ("policy_loss", "value_loss", "policy", "critic"):  # the last two are norms
        numbers |= {f"{name}_{when}": record["steps"][i][name] for when, i in (("1", 0), ("n", -1))}
    of_parts = (of_places, of_kl, of_advantages, of_values, of_response, of_three_tokens, of_epochs)
    return numbers | {key: x for part in of_parts for key, x in part(record).items()}


def of_places(record):
    """Columns, lengths, padding."""
    batch, one = record["batch"], record["response"]
    lengths, prompts = [*map(len, batch["values"])], batch["prompt_lengths"]
    (p, r), of_prompt = batch["columns"], prompts[one["row"]]
    return {
        "P": p, "R": r, "before_P": p - 1, "N": sum(lengths), "places": r * len(lengths),
        "padding_share": 1 - (sum(lengths) + sum(prompts)) / ((p + r) * len(lengths)),
        "shortest_prompt": min(prompts), "longest_prompt": max(prompts),
        "num_ended": sum(batch["ended"]), "num_cut": len(lengths) - sum(batch["ended"]),
        "prompt_pads": p - of_prompt, "prompt_tokens": of_prompt,
        "pads_behind": r - len(one["ids"]),
    }


def of_kl(record):
    """Two estimates of the KL per response and their standard errors; its signs."""
    batch = record["batch"]
    pairs = zip(batch["logprobs"], batch["ref_logprobs"])
    kls = [[x - y for x, y in zip(*pair)] for pair in pairs]
    summed, exact = [*map(sum, kls)], batch["exact_kl"]
    gaps = [x - y for x, y in zip(exact, summed)]  # of the same responses
    return {
        "kl_gap": statistics.mean(gaps), "kl_gap_error": standard_error(gaps),
        "kl_error": standard_error(summed), "exact_kl": statistics.mean(exact),
        "exact_kl_error": standard_error(exact), "kl_per_token": statistics.mean(flat(kls)),
        "negative_tokens": statistics.mean(x < 0 for x in flat(kls)),
        "negative_responses": sum(x < 0 for x in summed), "lowest_kl": min(summed),
    }


def of_advantages(record):
    """Before and after whitening, by minibatch, and what other lambdas would give."""
    batch, settings = record["batch"], record["settings"]
    raw, white = flat(batch["advantages"]), flat(batch["whitened"])
    first_epoch = batch["minibatches"][: settings["batch_size"] // settings["minibatch_size"]]
    means = [statistics.mean(flat(batch["whitened"][i] for i in rows)) for rows in first_epoch]
    numbers = {
        "mean_advantage": statistics.mean(raw), "deviation": statistics.pstdev(raw),
        "sign_changed": statistics.mean((a > 0) != (w > 0) for a, w in zip(raw, white)),
        "lowest_mean": min(means), "highest_mean": max(means),
        "correlation": statistics.correlation(batch["final_scores"], batch["true_rewards"]),
    }
    mask = torch.zeros(len(batch["ended"]), batch["columns"][1], dtype=torch.bool)
    rewards, values = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for i, pair in enumerate(zip(batch["rewards"], batch["values"])):
        mask[i, : len(pair[0])] = True
        rewards[i, mask[i]], values[i, mask[i]] = map(torch.tensor, pair)
    for lam in (0.0, 1.0):
        advantages, *_ = ppo.gae(rewards, values, mask, settings["gamma"], lam)
        numbers[f"deviation_{lam:.0f}"] = statistics.pstdev(advantages[mask].tolist())
    return numbers


def of_values(record):
    """How far the update moved the critic, and where the clip of eq. 6 holds it."""
    batch, eps = record["batch"], record["settings"]["value_clip_eps"]
    old, new = flat(batch["values"]), flat(batch["new_values"])
    returns = [a + v for a, v in zip(flat(batch["advantages"]), old)]
    far = [abs(x - v) > eps for x, v in zip(new, old)]
    held = [  # the clipped error is the larger, and it does not depend on V
        is_far and abs(v + math.copysign(eps, x - v) - g) > abs(x - g)
        for v, x, g, is_far in zip(old, new, returns, far)
    ]
    shares = {"values_far": statistics.mean(far), "values_held": statistics.mean(held)}
    return shares | {"explained_after": explained(new, returns)}


def of_response(record):
    """The response that is shown: its largest KL, its first and its last two tokens, its table."""
    one, settings, kl = record["response"], record["settings"], kl_of(record["response"])
    t, at, beta = len(kl) - 1, kl.index(max(kl)), record["batch"]["kl_coef"]
    up = max(range(t), key=lambda t: one["deltas"][t])
    word = lambda t: one["tokens"][t].strip()
    numbers = {
        "row": one["row"], "prompt": one["prompt"], "text": one["text"].strip(), "T": t + 1,
        "t_last": t, "t_before": t - 1, "r_score": one["score"], "r_true": one["true_reward"],
        "pad_id": one["special_ids"]["pad"], "eos_id": one["special_ids"]["eos"],
        "last_prompt_token": one["prompt_tokens"][-1].strip(), "first_token": word(0),
        "logprobs_0": one["logprobs"][0], "first_probability": math.exp(one["logprobs"][0]),
        "delta_t": up, "delta_token": word(up), "delta_max": one["deltas"][up],
        "delta_V": one["values"][up], "delta_next": one["values"][up + 1],
        "kl_t": at, "kl_token": word(at), "kl_max": kl[at], "kl_times": math.exp(kl[at]),
        "kl_logprob": one["logprobs"][at], "kl_ref_logprob": one["ref_logprobs"][at],
        "kl_price": -beta * kl[at], "r_kl": sum(kl), "r_price": -beta * sum(kl), "kl_T": kl[t],
        "final_score": record["batch"]["final_scores"][one["row"]],
        "lowest_reward": min(one["rewards"][:t]), "highest_reward": max(one["rewards"][:t]),
        "r_sum": sum(one["rewards"]), "bandit": sum(one["rewards"]) - one["values"][0],
        "lowest_advantage": min(one["advantages"]), "highest_advantage": max(one["advantages"]),
        "reaching_first": (settings["gamma"] * settings["lam"]) ** t,
    }
    columns = ("logprobs", "rewards", "values", "deltas", "advantages", "returns", "whitened")
    for name in columns:
        numbers |= {f"{name}_T": one[name][t], f"{name}_before": one[name][t - 1]}
        numbers[f"{name}_0"] = one[name][0]
    columns = one["logprobs"], one["ref_logprobs"], kl, *map(one.get, columns[1:])
    names = ["`" + word(t).replace("|", r"\|") + "`" for t in range(t + 1)]
    rows = [[f"{i}", names[i], *(show(x[i], ".3f") for x in columns)] for i in range(t + 1)]
    return numbers | {"rows_of_tokens": table(rows)}


def kl_of(one):
    return [x - y for x, y in zip(one["logprobs"], one["ref_logprobs"])]


def three_tokens(one):
    """[t, t, t]: of the tokens whose probability was below OPEN that with the highest advantage and
    that with the lowest, and of the rest the one that moved most against its own."""
    old, new, white = one["logprobs"], one["new_logprobs"][-1], one["whitened"]
    is_open = [t for t, x in enumerate(old) if math.exp(x) < OPEN]
    up, down = (pick(is_open, key=lambda t: white[t]) for pick in (max, min))
    against = lambda t: math.copysign(1, white[t]) * (old[t] - new[t])
    return [up, down, max((t for t in is_open if t not in (up, down)), key=against)]


def of_three_tokens(record):
    """Of each its t, word and probabilities; of the first also the last ratio, and in how many of
    the minibatches that had its response it was not cut."""
    one, eps, numbers = record["response"], record["settings"]["clip_eps"], {}
    for name, t in zip("abc", three_tokens(one)):
        old, new = math.exp(one["logprobs"][t]), math.exp(one["new_logprobs"][-1][t])
        numbers |= {f"{name}_t": t, f"{name}_old": old, f"{name}_new": new}
        numbers[f"{name}_token"] = one["tokens"][t].strip()
    t, before = three_tokens(one)[0], [one["logprobs"], *one["new_logprobs"]]  # each step
    own = [step for step, rows in enumerate(record["batch"]["minibatches"]) if one["row"] in rows]
    ratios = [math.exp(before[step][t] - one["logprobs"][t]) for step in own]
    numbers["a_pushed"] = sum(not is_cut(ratio, one["whitened"][t], eps) for ratio in ratios)
    return numbers | {"a_ratio": numbers["a_new"] / numbers["a_old"]}


def of_epochs(record):
    """The ratios of all tokens after each epoch, and how many are cut."""
    batch, eps = record["batch"], record["settings"]["clip_eps"]
    old, white, rows = flat(batch["logprobs"]), flat(batch["whitened"]), []
    for epoch, new in enumerate(map(flat, batch["new_logprobs"]), 1):
        ratios = [math.exp(x - y) for x, y in zip(new, old)]
        kl = statistics.mean(ratio - 1 - math.log(ratio) for ratio in ratios)
        outside = statistics.mean(abs(ratio - 1) > eps for ratio in ratios)
        cut = statistics.mean(is_cut(ratio, a, eps) for ratio, a in zip(ratios, white))
        cells = f"{kl:.4f}", f"{min(ratios):.4f}", f"{max(ratios):.2f}"
        rows.append([f"{epoch}", *cells, f"{outside:.1%}", f"{cut:.1%}"])
    return {"last_approx_kl": kl, "last_cut": cut, "rows_of_epochs": table(rows)}


def show(number, form):
    """A formatted number, with a minus sign; one that is rounded to 0 has no sign."""
    text = f"{number:{form}}"
    zero = not any(digit in text for digit in "123456789")
    return text.lstrip("+-") if zero else text.replace("-", "−", text.startswith("-"))


def table(rows):
    """The rows of a Markdown table; its head has words, and those are the template's."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# === 4. The pictures ==============================================================================
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#DDDDDD", "#222222"  # Okabe and Ito 2008
WIDTH, PER_LINE = 7.0, 9  # inches; tokens of a strip in one line
CENTER = {"ha": "center", "va": "center"}
PLAIN = {"parse_math": False}  # a token may hold a $


def new_figure(height):
    """A matplotlib Figure, made without pyplot: no display, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        what = "one_batch.py needs the package matplotlib; pip install matplotlib"
        raise UserError(what) from None
    return Figure(figsize=(WIDTH, height), layout="constrained")


def clean(axes):
    """No frame on two sides, and faint lines to read off by."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.tick_params(labelsize=9)


def shade(value, scale):
    """White at 0, orange above, blue below. The number stands in the cell: colour only helps."""
    from matplotlib.colors import to_rgb

    share = 0.75 * min(abs(value) / scale, 1)
    return [1 - share * (1 - x) for x in to_rgb(ORANGE if value > 0 else BLUE)]


def draw_cell(axes, x, y, text, colour, framed=False):
    from matplotlib.patches import Rectangle

    edge = {"linewidth": 2, "edgecolor": INK} if framed else {"linewidth": 0.5, "edgecolor": "0.7"}
    edge["zorder"] = 3 if framed else 1
    axes.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=colour, **edge))
    weight = "bold" if framed else "normal"
    axes.text(x + 0.5, y + 0.52, text, fontsize=9, weight=weight, zorder=4, **CENTER)


def draw_strips(one, rows):
    """The words, and under each its numbers.

    `rows` is a list of (label, numbers, their format, (white at, full colour so far off) or None,
    where ✂ stands beside the number, in a frame, or None).
    """
    words, height = [*map(str.strip, one["tokens"])], len(rows) + 2.3  # of a line, in cells
    num_lines = math.ceil(len(words) / PER_LINE)
    figure = new_figure(0.22 * height * num_lines)
    axes = figure.add_subplot()
    axes.set(xlim=(-1.75, PER_LINE + 0.03), ylim=(height * num_lines - 0.2, 0))
    axes.axis("off")
    for line in range(num_lines):
        label = {"x": -0.1, "ha": "right", "va": "center"}
        axes.text(y=line * height + 0.5, s="t", fontsize=9, style="italic", color="0.4", **label)
        for y, (name, *_) in enumerate(rows):
            axes.text(y=line * height + 2.35 + y, s=name, fontsize=9, **label)
    for t, word in enumerate(words):
        x, top = t % PER_LINE, t // PER_LINE * height
        axes.text(x + 0.5, top + 0.5, f"{t}", fontsize=8, color="0.4", **CENTER)
        size = 10 if len(word) < 9 else 8
        axes.text(x + 0.5, top + 1.3, word, fontsize=size, weight="bold", **CENTER, **PLAIN)
        for y, (_, numbers, form, scale, marks) in enumerate(rows):
            colour = shade(numbers[t] - scale[0], scale[1]) if scale else "white"
            mark = bool(marks and marks[t])
            text = show(numbers[t], form) + "✂" * mark
            draw_cell(axes, x, top + 1.85 + y, text, colour, mark)
    return figure


def draw_batch(record):
    """The table of tokens: padding, prompts, responses, their EOS, and the row that is shown."""
    batch, row = record["batch"], record["response"]["row"]
    p, r = batch["columns"]
    kinds = [  # of each cell its darkness
        [0.0] * (p - prompt) + [0.3] * prompt + [0.6] * (len(its) - ended) + [1.0] * ended
        + [0.0] * (r - len(its))
        for prompt, its, ended in zip(batch["prompt_lengths"], batch["logprobs"], batch["ended"])
    ]
    figure, rows = new_figure(4.0), len(kinds)
    axes = figure.add_subplot()
    options = {"vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
    axes.imshow(kinds, cmap="Greys", extent=(0, p + r, rows, 0), **options)
    axes.axvline(p, color=ORANGE, linewidth=1.5)
    axes.text(p, -0.02 * rows, f"P = {p}", ha="center", color=ORANGE, fontsize=10, weight="bold")
    box = {"facecolor": "white", "edgecolor": "0.5", "linewidth": 0.5, "pad": 3}
    box = {"bbox": box, "fontsize": 10, **CENTER}
    y = (0.6 if row < rows / 2 else 0.3) * rows
    for x, name in ((0.6 * p, "prompt"), (p + 0.16 * r, "response"), (p + 0.85 * r, "padding")):
        axes.text(x, y, name, **box)
    end = p + len(batch["logprobs"][row]), row + 0.5
    arrow = {"arrowstyle": "->", "color": ORANGE, "linewidth": 1.5}
    axes.annotate(f"row {row}", end, (p + 0.85 * r, row + 0.5), arrowprops=arrow, **box)
    axes.set_xlabel("column, P + R")
    axes.set_ylabel("row of B")
    axes.tick_params(labelsize=9)
    return figure


def draw_tokens(record):
    """The shown row: its prompt with its padding, and its response with the first of its."""
    one, (p, r) = record["response"], record["batch"]["columns"]
    length, behind = record["batch"]["prompt_lengths"][one["row"]], r - len(one["tokens"])
    prompt = ["<pad>"] * (p - length) + one["prompt_tokens"][p - length :]
    response = one["tokens"] + ["<pad>"] * min(3, behind)
    parts = [
        ("prompt", "attention_mask", prompt, range(p - length, p), 0),
        ("response", "response_mask", response, range(len(one["tokens"])), p),
    ]
    per_line, top = 10, 0.0
    figure = new_figure(0.22 * sum(1 + 3.4 * math.ceil(len(part[2]) / per_line) for part in parts))
    axes = figure.add_subplot()
    for name, mask, words, counted, start in parts:
        axes.text(-1.65, top + 0.5, name, fontsize=10.5, weight="bold", va="center", color=ORANGE)
        for i, word in enumerate(words):
            x, y, counts = i % per_line, top + 1 + 3.4 * (i // per_line), i in counted
            for below, label in enumerate(("column", "token", mask) if x == 0 else ()):
                label = {"s": label, "fontsize": 8.5, "color": "0.3", "ha": "right"}
                axes.text(-0.1, y + below + 0.5, va="center", **label)
            axes.text(x + 0.5, y + 0.5, f"{start + i}", fontsize=8, color="0.4", **CENTER)
            look = {"weight": "bold", "color": INK} if counts else {"color": "0.5"}
            axes.text(x + 0.5, y + 1.5, word.strip(), fontsize=9, **look, **CENTER, **PLAIN)
            draw_cell(axes, x, y + 2, f"{counts:d}", GREY if counts else "white")
        top += 1 + 3.4 * math.ceil(len(words) / per_line)
    axes.set(xlim=(-1.7, per_line + 0.05), ylim=(top - 0.3, 0))
    axes.axis("off")
    return figure


def draw_kl(record):
    one, kl = record["response"], kl_of(record["response"])
    names = {"log π": "logprobs", "log π_ref": "ref_logprobs"}
    rows = [(name, one[key], ".2f", None, None) for name, key in names.items()]
    scale = 0, max(map(abs, kl)) or 1
    return draw_strips(one, [*rows, ("KL", kl, "+.2f", scale, None)])


def label_words(axes, one):
    words = [*map(str.strip, one["tokens"])]
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(words)), words, **turned, **PLAIN)
    axes.set_xlim(-0.8, len(words) - 0.2)
    axes.axhline(0, color=INK, linewidth=0.8)
    clean(axes)


def draw_rewards(record):
    """What each token is paid; at the last one the score stands upon the price of its KL."""
    one, beta = record["response"], record["batch"]["kl_coef"]
    score, t = record["batch"]["final_scores"][one["row"]], len(one["ids"]) - 1
    paid = [-beta * x for x in kl_of(one)]
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    axes.bar(range(t + 1), paid, color=BLUE, label="−β KL")
    look = {"color": ORANGE, "hatch": "//", "edgecolor": "white"}
    below = paid[t] if paid[t] * score > 0 else 0.0
    axes.bar([t], [score], bottom=below, label="score", **look)
    text = {"fontsize": 10, "weight": "bold", "ha": "right", "va": "center"}
    axes.text(t - 0.6, score / 2, f"{score:+.2f}", **text)
    axes.set_ylabel("r")
    axes.legend(fontsize=10, frameon=False, loc="upper left" if score > 0 else "lower left")
    label_words(axes, one)
    return figure


def draw_advantages(record):
    one, ts = record["response"], range(len(record["response"]["ids"]))
    figure = new_figure(4.8)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(ts, one["returns"], "s--", color=ORANGE, markersize=4, label="G = A + V")
    upper.plot(ts, one["values"], "o-", color=BLUE, markersize=4, label="V")
    upper.vlines(ts, one["values"], one["returns"], color="0.6", linewidth=1, zorder=0, label="A")
    lower.bar(ts, one["deltas"], color=GREY, edgecolor="0.5", hatch="..", label="δ")
    lower.plot(ts, one["advantages"], "D-", color=INK, markersize=4, label="A")
    for axes in (upper, lower):
        place = {"loc": "lower left", "bbox_to_anchor": (0, 0.98), "ncols": 3}
        axes.legend(fontsize=10, frameon=False, **place)
    clean(upper)
    label_words(lower, one)
    return figure


def draw_whitening(record):
    """The advantages of all counted tokens before and after; below, those of the response."""
    figure = new_figure(2.5)
    titles = {"advantages": "A", "whitened": "A, whitened"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        every, its = flat(record["batch"][key]), record["response"][key]
        mean, deviation = statistics.mean(every), statistics.pstdev(every)
        axes.hist(every, bins=45, color=GREY, edgecolor="0.55", linewidth=0.4)
        axes.axvline(mean, color=ORANGE, linewidth=2)
        for side in (-1, 1):
            axes.axvline(mean + side * deviation, color=ORANGE, linewidth=1.2, linestyle="--")
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(its, [-0.06] * len(its), "|", color=BLUE, markersize=8, **place)
        name = f"mean {show(mean, '.2f')}, deviation {deviation:.2f}"
        axes.set_title(f"{title}: {name}", fontsize=10)
        clean(axes)
        axes.tick_params(axis="x", pad=12)
    return figure


def draw_ratios(record):
    """The ratio of each token after each epoch; ✂ and a frame where its gradient is 0."""
    one, settings = record["response"], record["settings"]
    eps, white = settings["clip_eps"], one["whitened"]
    per_epoch = len(one["new_logprobs"]) // settings["ppo_epochs"]
    rows = [("A, whitened", white, "+.2f", (0, 3), None)]
    for epoch, new in enumerate(one["new_logprobs"][per_epoch - 1 :: per_epoch], 1):
        ratios = [math.exp(x - y) for x, y in zip(new, one["logprobs"])]
        marks = [is_cut(ratio, a, eps) for ratio, a in zip(ratios, white)]
        rows.append((f"ρ, epoch {epoch}", ratios, ".2f", (1, 1), marks))
    return draw_strips(one, rows)


def draw_probabilities(record):
    """Three tokens' probability after each optimizer step, and what the clip allows."""
    one, eps = record["response"], record["settings"]["clip_eps"]
    own = [False, *(one["row"] in rows for rows in record["batch"]["minibatches"])]
    per_epoch, figure = (len(own) - 1) // record["settings"]["ppo_epochs"], new_figure(2.9)
    for axes, t in zip(figure.subplots(1, 3), three_tokens(one)):
        curve = [math.exp(x[t]) for x in [one["logprobs"], *one["new_logprobs"]]]
        axes.plot(curve, "-", color=INK, linewidth=1.2)
        at = [step for step, is_in in enumerate(own) if is_in]
        axes.plot(at, [curve[step] for step in at], "o", color=INK, markersize=5)
        for bound, sign in ((1 + eps, "+"), (1 - eps, "−")):
            axes.axhline(bound * curve[0], color=ORANGE, linewidth=1.2, linestyle="--")
            place = {"va": "bottom", "ha": "right"} if sign == "+" else {"va": "top", "ha": "left"}
            x = len(own) - 1 if sign == "+" else 0
            axes.text(x, bound * curve[0], f"1 {sign} ε", color=ORANGE, fontsize=9, **place)
        word = one["tokens"][t].strip()
        moved = f"A = {show(one['whitened'][t], '+.2f')}, ρ = {curve[-1] / curve[0]:.2f}"
        axes.set_title(f"{word}, t = {t}\n{moved}", fontsize=10, **PLAIN)
        low, high = min(*curve, (1 - eps) * curve[0]), max(*curve, (1 + eps) * curve[0])
        axes.set_ylim(low - 0.2 * (high - low), high + 0.15 * (high - low))
        axes.set_xticks(range(0, len(own), per_epoch))
        axes.set_xlabel("optimizer step", fontsize=9)
        clean(axes)
        axes.grid(axis="x", alpha=0.5)
    return figure


PICTURES = {
    "1_batch.png": draw_batch, "2_tokens.png": draw_tokens, "3_kl.png": draw_kl,
    "4_rewards.png": draw_rewards, "5_advantages.png": draw_advantages,
    "6_whitening.png": draw_whitening, "7_ratio.png": draw_ratios,
    "8_probability.png": draw_probabilities,
}


def save_picture(figure, path):
    """A PNG of 64 colours, which has a third of the bytes that one of all colours has."""
    from PIL import Image  # matplotlib needs it too

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


# === 5. The files =================================================================================
MARK = "<!-- Made by docs/one_batch.py from the template beside it: change that, and run it. -->\n"


def fill(template, numbers):
    """The page: each {name} or {name:.2f} of the template is the number of that name."""
    return MARK + Numbers().vformat(template, (), numbers)


class Numbers(string.Formatter):
    """Formats numbers by `show`."""

    def format_field(self, value, form):
        is_number = isinstance(value, (int, float)) and form
        return show(value, form) if is_number else super().format_field(value, form)


def to_digits(x, digits=7):
    """All floats with seven digits: what a float32 holds."""
    if isinstance(x, dict):
        return {key: to_digits(value, digits) for key, value in x.items()}
    if isinstance(x, list):
        return [to_digits(value, digits) for value in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x


def write_all(record, folder):
    """numbers.json and the pictures into the folder, and each page beside it."""
    figures = {name: draw(record) for name, draw in PICTURES.items()}  # before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    (folder / "numbers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    for name, figure in figures.items():
        save_picture(figure, folder / name)
    for template in sorted(HERE.glob("one_batch*.template.md")):
        page = fill(template.read_text(encoding="utf-8"), record["page"])
        name = template.name.replace(".template", "")
        (folder.parent / name).write_text(page, encoding="utf-8")


def run(iteration, flags):
    """The record of a run with these flags of ppo.py."""
    with tempfile.TemporaryDirectory() as output:
        cfg = cli.parse_args(ppo.Config, __doc__.splitlines()[0], [*flags, "--output", output])
        if not 1 <= iteration <= cfg.iterations:
            raise UserError(f"--iteration is {iteration}; it must be from 1 to {cfg.iterations}")
        if cfg.advantage != "gae" or cfg.max_approx_kl or not ppo.with_embedded_defaults(cfg).judge:
            raise UserError("the page shows --advantage gae, all optimizer steps and a --judge")
        return to_digits(make_record(cfg, iteration, listen(cfg, iteration)))


def main(argv=None):
    """From the command line to the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--iteration", type=int, default=7, help="(default: %(default)s)")
    place = {"type": pathlib.Path, "default": HERE / "one_batch"}
    parser.add_argument("--folder", **place, help="of pictures and numbers, beside the page")
    parser.add_argument("--redraw", action="store_true", help="no run: what numbers.json holds")
    args, flags = parser.parse_known_args(argv)
    new_figure(1)  # no matplotlib is told before the run
    if args.redraw:
        record = json.loads((args.folder / "numbers.json").read_text(encoding="utf-8"))
    else:
        record = run(args.iteration, flags)
    record["page"] = to_digits(summary(record))
    write_all(record, args.folder)
    print(f"wrote {args.folder} and the page beside it")


if __name__ == "__main__":
    with cli.command_line():
        main()
