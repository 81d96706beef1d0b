"""One batch of ppo.py from prompt to optimizer step: the pictures and numbers of docs/one_batch.md.

    python docs/one_batch.py --device cpu      after python sft.py and python reward_model.py
    python docs/one_batch.py --redraw          after a change of a template or a picture

Runs ppo.main() itself and records what its functions get and return, so the page shows an iteration
of the loop and not of a copy. It uses up no random number of the run. It takes the flags of ppo.py
and some of its own.

Writes    one_batch/numbers.json, one_batch/*.png, and a page from each one_batch*.template.md
Needs     matplotlib: pip install matplotlib
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import statistics
import string
import sys
import tempfile
from typing import Annotated
from unittest import mock

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import harness  # noqa: E402
import ppo  # noqa: E402
from common import UserError  # noqa: E402
from harness import Count, Range, arg  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config(ppo.Config):  # the flags of ppo.py, and these
    iteration: Count = arg(7, "the iteration that the page shows")
    row: Annotated[int, Range(0)] = arg(12, "the row of its batch that the page follows")
    redraw: bool = arg(False, "do not run ppo.py; draw what numbers.json holds")
    folder: str = arg(str(HERE / "one_batch"), "for pictures and numbers; pages go beside it")


# The flags of ppo.py that the numbers depend on. All are defaults, which the test checks.
SETTINGS = (
    "iterations", "batch_size", "response_length", "temperature", "kl_coef", "kl_target",
    "missing_eos_penalty", "advantage", "gamma", "lam", "critic", "ppo_epochs", "minibatch_size",
    "clip_eps", "value_clip_eps", "value_coef", "entropy_coef", "max_grad_norm", "seed",
)
TIMES = ("seconds", "tokens_per", "peak")  # how names of metrics of the machine begin
HISTORY = ("score", "true_reward", "kl", "explained_variance")


# === 1. Recording a run ===========================================================================
RECORDED = (
    "sample_responses", "evaluate_tokens", "kl_shaped_rewards", "gae", "rollout_metrics",
    "update_metrics",
)


class Recorded(Exception):
    """Ends the run after the iteration that is shown."""


def record_iteration(cfg):
    """Runs ppo.main() up to the end of cfg.iteration and returns what was recorded, a dict.

    Under each name of RECORDED it has (arguments, result) of the last call of that function.
    "steps" has, for each optimizer step, the rows of its minibatch and what evaluate_tokens
    returns after it; "history" has the training rows of metrics.jsonl.
    """
    calls, real, num_updates = {"steps": []}, {}, 0

    def recorder(name):
        def function(*inputs):
            calls[name] = inputs, real[name](*inputs)
            return calls[name][1]

        return function

    def minibatches(batch_size, minibatch_size, epochs, generator):
        nonlocal num_updates
        num_updates += 1
        for index in real["minibatches"](batch_size, minibatch_size, epochs, generator):
            yield index
            # The loop asks for the next minibatch after the optimizer step of this one.
            if num_updates == cfg.iteration:
                inputs, _ = calls["evaluate_tokens"]
                calls["steps"].append((index.tolist(), real["evaluate_tokens"](*inputs)))

    def stop(run):
        if run.step == cfg.iteration:
            run.bar.close()
            calls["history"] = run.history
            raise Recorded

    for name in (*RECORDED, "minibatches"):
        real[name] = getattr(ppo, name)
    functions = {name: recorder(name) for name in RECORDED}
    functions |= {"minibatches": minibatches, "warn_if_unhealthy": stop}  # called after the log
    with mock.patch.multiple(ppo, **functions), contextlib.suppress(Recorded):
        ppo.main(cfg)
    return calls


# === 2. The record: what numbers.json holds =======================================================
def is_cut(ratio, advantage, clip_eps):
    """Returns whether the gradient of eq. 5 is 0: the ratio is outside, and A pushes it out."""
    return (ratio > 1 + clip_eps and advantage > 0) or (ratio < 1 - clip_eps and advantage < 0)


def rows_of(x, mask, digits=4):
    """Returns x (B, R) as a list of lists: the tokens that count, rounded."""
    rows = []
    for row, counts in zip(x, mask):
        rows.append([round(value, digits) for value in row[counts].tolist()])
    return rows


def make_record(cfg, calls):
    """Returns the iteration as plain numbers. Lists over the B rows hold the tokens that count,
    with four decimals; those of the response that is shown have seven.
    """
    (batch, _, true_rewards, finished, _), _ = calls["rollout_metrics"]
    (final_scores, _, mask, kl_coef), rewards = calls["kl_shaped_rewards"]
    _, (raw_advantages, _) = calls["gae"]
    (steps,), _ = calls["update_metrics"]
    row, per_epoch = calls["history"][-1], cfg.batch_size // cfg.minibatch_size
    after_epochs = [outputs for _, outputs in calls["steps"][per_epoch - 1 :: per_epoch]]
    columns = {
        "logprobs": batch.logprobs, "ref_logprobs": batch.ref_logprobs, "values": batch.values,
        "rewards": rewards, "advantages": raw_advantages, "whitened": batch.advantages,
    }
    prompt_length = batch.tokens.shape[1] - mask.shape[1]
    return {
        "settings": {name: getattr(cfg, name) for name in (*SETTINGS, "iteration")},
        "metrics": {name: x for name, x in row.items() if not name.startswith(TIMES)},
        "history": [{name: old[name] for name in HISTORY} for old in calls["history"]],
        "steps": [{name: float(x) for name, x in step.items()} for step in steps],
        "batch": {
            "columns": [prompt_length, mask.shape[1]],
            "prompt_lengths": batch.attention_mask[:, :prompt_length].sum(1).tolist(),
            "ended": finished.tolist(), "kl_coef": kl_coef,
            "final_scores": [round(score, 6) for score in final_scores.tolist()],
            "true_rewards": true_rewards.tolist(),
            **{name: rows_of(x, mask) for name, x in columns.items()},
            "new_logprobs": [rows_of(outputs[0], mask) for outputs in after_epochs],
            "new_values": rows_of(after_epochs[-1][2], mask),
            "minibatches": [rows for rows, _ in calls["steps"]],
        },
        "response": record_response(calls, columns, cfg.row),
    }


def record_response(calls, columns, i):
    """Returns row i of the batch, the tokens that count only."""
    (batch, score_parts, true_rewards, finished, _), _ = calls["rollout_metrics"]
    (_, tokenizer, prompt_rows, _, _, _), rollout = calls["sample_responses"]
    (rewards, values, mask, gamma, _), _ = calls["gae"]
    deltas, _ = ppo.gae(rewards, values, mask, gamma, lam=0.0)  # with lambda 0, A_t is delta_t
    columns = columns | {"deltas": deltas, "returns": batch.returns}
    prompt_ids = batch.tokens[i, : -mask.shape[1]].tolist()
    ids = batch.tokens[i, -mask.shape[1] :][mask[i]].tolist()
    logprobs_after = [outputs[0] for _, outputs in calls["steps"]]  # each optimizer step
    return {
        "row": i, "prompt": prompt_rows[i]["prompt"], "text": rollout.texts[i],
        "prompt_ids": prompt_ids, "ids": ids,
        "prompt_tokens": [harness.token_text(tokenizer, id) for id in prompt_ids],
        "tokens": [harness.token_text(tokenizer, id) for id in ids],
        "special_ids": {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id},
        "score": score_parts.sum(0)[i].item(), "ended": finished[i].item(),
        "true_reward": true_rewards[i].item(),
        **{name: rows_of(x[i : i + 1], mask[i : i + 1], 7)[0] for name, x in columns.items()},
        "new_logprobs": [rows_of(x[i : i + 1], mask[i : i + 1], 7)[0] for x in logprobs_after],
    }


# === 3. The numbers of the page ===================================================================
def flat(rows):
    return [x for row in rows for x in row]


def differences(xs, ys):
    return [x - y for x, y in zip(xs, ys)]


def summary(record):
    """Returns {name: value} of the fields in the templates, all computed from the record."""
    settings, first = record["settings"], record["history"][0]
    numbers = {
        **record["metrics"], **settings,
        "gamma_lam": settings["gamma"] * settings["lam"],
        "updates_before": settings["iteration"] - 1,
        "next_lr_share": 1 - settings["iteration"] / settings["iterations"],
        **numbers_of_batch(record), **numbers_of_response(record), **numbers_of_epochs(record),
    }
    for name in ("score", "true_reward", "explained_variance"):
        numbers[f"first_{name}"] = first[name]
    for when, step in (("1", record["steps"][0]), ("n", record["steps"][-1])):
        for name in ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm"):
            numbers[f"{name}_{when}"] = step[name]
    return numbers


def numbers_of_batch(record):
    """Returns sizes, the KL and its signs, and advantages, of all rows."""
    batch, row = record["batch"], record["response"]["row"]
    lengths, prompts = [len(row) for row in batch["values"]], batch["prompt_lengths"]
    (p, r), num_finished = batch["columns"], sum(batch["ended"])
    logprobs, ref_logprobs = batch["logprobs"], batch["ref_logprobs"]
    token_kl = differences(flat(logprobs), flat(ref_logprobs))
    summed = [sum(differences(x, y)) for x, y in zip(logprobs, ref_logprobs)]
    raw, white, new_values = flat(batch["advantages"]), flat(batch["whitened"]), batch["new_values"]
    returns = [a + v for a, v in zip(raw, flat(batch["values"]))]
    errors = differences(returns, flat(new_values))
    return {
        "P": p, "R": r, "before_P": p - 1, "N": sum(lengths), "places": r * len(lengths),
        "padding_share": 1 - (sum(lengths) + sum(prompts)) / ((p + r) * len(lengths)),
        "shortest_prompt": min(prompts), "longest_prompt": max(prompts),
        "prompt_tokens": prompts[row], "prompt_pads": p - prompts[row],
        "num_ended": num_finished, "num_cut": len(lengths) - num_finished,
        "mean_length": statistics.mean(lengths),
        "kl_error": statistics.pstdev(summed) / math.sqrt(len(summed)),
        "kl_per_token": statistics.mean(token_kl),
        "negative_tokens": statistics.mean(x < 0 for x in token_kl),
        "negative_responses": sum(x < 0 for x in summed), "lowest_kl": min(summed),
        "mean_advantage": statistics.mean(raw), "deviation": statistics.pstdev(raw),
        "sign_changed": statistics.mean((a > 0) != (w > 0) for a, w in zip(raw, white)),
        "explained_after": 1 - statistics.pvariance(errors) / statistics.pvariance(returns),
        "correlation": statistics.correlation(batch["final_scores"], batch["true_rewards"]),
    }


def numbers_of_response(record):
    """Returns the response that is shown: its largest KL, delta and advantage, its first and last
    two tokens, and the table of all tokens.
    """
    one, settings = record["response"], record["settings"]
    kl = differences(one["logprobs"], one["ref_logprobs"])
    beta, last = record["batch"]["kl_coef"], len(kl) - 1
    words = [token.strip() for token in one["tokens"]]
    most, rise = kl.index(max(kl)), one["deltas"].index(max(one["deltas"][:-1]))
    a = one["whitened"].index(max(one["whitened"]))
    before_steps = [one["logprobs"], *one["new_logprobs"]]
    own = [step for step, rows in enumerate(record["batch"]["minibatches"]) if one["row"] in rows]
    ratios = [math.exp(before_steps[step][a] - one["logprobs"][a]) for step in own]
    eps = settings["clip_eps"]
    num_pushed = sum(not is_cut(ratio, one["whitened"][a], eps) for ratio in ratios)
    a_old, a_new = math.exp(one["logprobs"][a]), math.exp(one["new_logprobs"][-1][a])
    last_ratios = [math.exp(x) for x in differences(one["new_logprobs"][-1], one["logprobs"])]
    numbers = {
        "row": one["row"], "prompt": one["prompt"], "text": one["text"].strip(), "T": last + 1,
        "t_last": last, "t_before": last - 1, "r_score": one["score"], "r_true": one["true_reward"],
        "pad_id": one["special_ids"]["pad"], "eos_id": one["special_ids"]["eos"],
        "last_prompt_token": one["prompt_tokens"][-1].strip(), "first_token": words[0],
        "first_probability": math.exp(one["logprobs"][0]),
        "kl_t": most, "kl_token": words[most], "kl_max": kl[most], "kl_times": math.exp(kl[most]),
        "kl_logprob": one["logprobs"][most], "kl_ref_logprob": one["ref_logprobs"][most],
        "kl_price": -beta * kl[most], "r_kl": sum(kl), "r_price": -beta * sum(kl), "kl_T": kl[last],
        "final_score": record["batch"]["final_scores"][one["row"]],
        "lowest_reward": min(one["rewards"][:last]), "highest_reward": max(one["rewards"][:last]),
        "r_sum": sum(one["rewards"]), "bandit": sum(one["rewards"]) - one["values"][0],
        "delta_t": rise, "delta_token": words[rise], "delta_max": one["deltas"][rise],
        "delta_V": one["values"][rise], "delta_next": one["values"][rise + 1],
        "lowest_advantage": min(one["advantages"]), "highest_advantage": max(one["advantages"]),
        "reaching_first": (settings["gamma"] * settings["lam"]) ** last, "a_pushed": num_pushed,
        "a_t": a, "a_token": words[a], "a_old": a_old, "a_new": a_new, "a_ratio": a_new / a_old,
        "r_cut": sum(is_cut(ratio, w, eps) for ratio, w in zip(last_ratios, one["whitened"])),
    }
    names = ("logprobs", "rewards", "values", "deltas", "advantages", "returns", "whitened")
    for name in names:
        for where, t in (("0", 0), ("before", last - 1), ("T", last)):
            numbers[f"{name}_{where}"] = one[name][t]
    columns = [one["logprobs"], one["ref_logprobs"], kl, *(one[name] for name in names[1:])]
    rows = []
    for t, word in enumerate(words):
        cells = [show(column[t], ".3f") for column in columns]
        rows.append([f"{t}", "`" + word.replace("|", r"\|") + "`", *cells])
    return numbers | {"rows_of_tokens": table(rows)}


def numbers_of_epochs(record):
    """Returns the ratios of all tokens after each epoch as a table, and of the last one approx_kl,
    how many tokens are cut, and the shares of approx_kl that the extremes and the cut tokens have.
    """
    batch, eps, rows = record["batch"], record["settings"]["clip_eps"], []
    for epoch, new_logprobs in enumerate(batch["new_logprobs"], 1):
        log_ratios = differences(flat(new_logprobs), flat(batch["logprobs"]))
        ratios = [math.exp(x) for x in log_ratios]
        terms = [ratio - 1 - x for ratio, x in zip(ratios, log_ratios)]  # k3, of approx_kl
        kl = statistics.mean(terms)
        outside = statistics.mean(abs(ratio - 1) > eps for ratio in ratios)
        are_cut = [is_cut(x, a, eps) for x, a in zip(ratios, flat(batch["whitened"]))]
        cut = statistics.mean(are_cut)
        extremes = [f"{min(ratios):.4f}", f"{max(ratios):.2f}"]
        rows.append([f"{epoch}", f"{kl:.4f}", *extremes, f"{outside:.1%}", f"{cut:.1%}"])
    return {
        "last_approx_kl": kl, "last_cut": cut, "rows_of_epochs": table(rows),
        "lowest_share": terms[ratios.index(min(ratios))] / sum(terms),
        "highest_share": terms[ratios.index(max(ratios))] / sum(terms),
        "cut_share": sum(term for term, is_one in zip(terms, are_cut) if is_one) / sum(terms),
    }


def show(number, form):
    """Returns a formatted number with a minus sign; one that is rounded to 0 has no sign."""
    text = f"{number:{form}}"
    if not any(digit in text for digit in "123456789"):
        return text.lstrip("+-")
    return text.replace("-", "−", text.startswith("-"))  # the first one only: not that of 1e-5


def table(rows):
    """Returns rows of a Markdown table; its head is words and stands in the template."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# === 4. The pictures ==============================================================================
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#DDDDDD", "#222222"  # Okabe and Ito 2008


def new_figure(height):
    """Returns a matplotlib Figure, 7 inches wide. Without pyplot it needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the pictures need matplotlib; pip install matplotlib") from None
    return Figure(figsize=(7, height), layout="constrained")


def label_axes(axes, one, what):
    """Puts the tokens below and the legend above, and faint lines in place of the frame."""
    axes.set_ylabel(what)
    words = [token.strip() for token in one["tokens"]]
    look = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": 9}
    axes.set_xticks(range(len(words)), words, parse_math=False, **look)
    axes.set_xlim(-0.8, len(words) - 0.2)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.98), ncols=4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def draw_batch(record):
    """Draws the table of tokens: padding, prompts, responses, their EOS, and the row shown."""
    batch, row = record["batch"], record["response"]["row"]
    (p, r), rows = batch["columns"], []
    for prompt, response, ended in zip(batch["prompt_lengths"], batch["values"], batch["ended"]):
        length = len(response)
        tokens = [0.0] * (p - prompt) + [0.3] * prompt + [0.6] * (length - ended) + [1.0] * ended
        rows.append(tokens + [0.0] * (r - length))  # how dark each cell is
    axes = new_figure(4.0).add_subplot()
    extent = (0, p + r, len(rows), 0)
    axes.imshow(rows, cmap="Greys", aspect="auto", interpolation="nearest", extent=extent)
    axes.axvline(p, color=ORANGE)
    end, y, arrow = p + len(batch["values"][row]), row + 0.5, {"arrowstyle": "->"}
    axes.annotate(f"row {row}", (end, y), (end + 6, y), va="center", arrowprops=arrow)
    key = "white: padding; light grey: prompt; dark grey: response; black: its EOS"
    axes.set(xlabel="column, of P + R", ylabel="row, of B", title=key)
    return axes.figure


def draw_advantages(record):
    """Draws values, returns and their difference above, and deltas and advantages below."""
    one = record["response"]
    ts = range(len(one["ids"]))
    figure = new_figure(4.8)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(ts, one["returns"], "s--", color=ORANGE, markersize=4, label="G = A + V")
    upper.plot(ts, one["values"], "o-", color=BLUE, markersize=4, label="V")
    upper.vlines(ts, one["values"], one["returns"], color="0.6", linewidth=1, label="A")
    lower.bar(ts, one["deltas"], color=GREY, edgecolor="0.5", hatch="..", label="δ (TD error)")
    lower.plot(ts, one["advantages"], "D-", color=INK, markersize=4, label="A")
    lower.axhline(0, color=INK, linewidth=0.8)
    label_axes(upper, one, "reward to come")
    label_axes(lower, one, "advantage")
    lower.set_xlabel("token of the response; V is predicted before it")
    return figure


def draw_ratios(record):
    """Draws the ratio of each token after each epoch, and which are cut after the last one."""
    one, settings = record["response"], record["settings"]
    eps, per_epoch = settings["clip_eps"], settings["batch_size"] // settings["minibatch_size"]
    axes = new_figure(3.6).add_subplot()
    axes.axhspan(1 - eps, 1 + eps, color=GREY, alpha=0.5, label="1 ± ε")
    for t, advantage in enumerate(one["whitened"]):
        curve = [math.exp(new[t] - one["logprobs"][t]) for new in one["new_logprobs"]]
        ratios, colour = curve[per_epoch - 1 :: per_epoch], ORANGE if advantage > 0 else BLUE
        axes.plot([t] * (len(ratios) + 1), [1.0, *ratios], ".-", color=colour, markersize=5)
        mark = "X" if is_cut(ratios[-1], advantage, eps) else "o"
        axes.plot(t, ratios[-1], mark, color=colour, markersize=8)
    marks = (ORANGE, "o", "whitened A > 0"), (BLUE, "o", "whitened A < 0"), (INK, "X", "cut")
    for colour, mark, name in marks:
        axes.plot([], [], mark, color=colour, label=name)
    label_axes(axes, one, "ratio ρ, after each epoch")
    axes.set_xlabel("token of the response")
    return axes.figure


PICTURES = {
    "1_batch.png": draw_batch, "2_advantages.png": draw_advantages, "3_ratio.png": draw_ratios,
}


# === 5. The files =================================================================================
MARK = "<!-- Made by docs/one_batch.py from the template beside it: change that, and run it. -->\n"


class Numbers(string.Formatter):
    """Formats numbers by `show`."""

    def format_field(self, value, form):
        is_number = isinstance(value, (int, float)) and form
        return show(value, form) if is_number else super().format_field(value, form)


def fill(template, numbers):
    """Returns the page: each {name} or {name:.2f} of the template is the number of that name."""
    return MARK + Numbers().vformat(template, (), numbers)


def to_digits(x):
    """Returns x with all floats rounded to seven digits, which is what a float32 holds."""

    def rounded(text):
        return float(f"{float(text):.7g}")

    return json.loads(json.dumps(x), parse_float=rounded)


def run(cfg):
    """Returns the record of a run with these flags."""
    if cfg.iteration > cfg.iterations or cfg.row >= cfg.batch_size:
        raise UserError("--iteration goes up to --iterations, and --row stays below --batch-size")
    if cfg.advantage != "gae" or cfg.max_approx_kl or not ppo.check_config(cfg).judge:
        raise UserError("the page shows --advantage gae, all optimizer steps and a --judge")
    with tempfile.TemporaryDirectory() as output:
        cfg = dataclasses.replace(cfg, output=output)
        return to_digits(make_record(cfg, record_iteration(cfg)))


def main(cfg):
    folder = pathlib.Path(cfg.folder)
    new_figure(1)  # if matplotlib is missing, this says so before the run
    if cfg.redraw:
        record = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    else:
        record = run(cfg)
    record["page"] = to_digits(summary(record))
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(record).savefig(folder / name, dpi=180)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    (folder / "numbers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    for template in sorted(HERE.glob("one_batch*.template.md")):
        page = fill(template.read_text(encoding="utf-8"), record["page"])
        name = template.name.replace(".template", "")
        (folder.parent / name).write_text(page, encoding="utf-8")
    print(f"wrote {folder} and the pages beside it")


if __name__ == "__main__":
    harness.run_stage(main, Config, __doc__.splitlines()[0])
