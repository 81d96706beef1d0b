"""The curves of one or several runs of a stage, as one picture.

Draws     the panels of PANELS for which the runs have numbers
Reads     the metrics.jsonl of each run. Lines are training batches, markers are held-out data.
          Nothing is smoothed; a null, which stands for a number that was not finite, is a gap.
Needs     matplotlib, which only this file uses: pip install matplotlib
Run       python plot.py ckpt/ppo
          python plot.py ckpt/ppo ckpt/ppo_beta0 --output curves.png
"""

import argparse
import json
import math
import os
import pathlib
from typing import NamedTuple

from common import UserError


# === 1. What is drawn =============================================================================
class Panel(NamedTuple):
    title: str  # what to see, or what is healthy
    metrics: dict  # {key: name}; the first is a solid line, the second a dashed one
    label: str  # of the left axis, with its unit
    right_label: str | None = None  # if given, the second metric has an axis of its own
    x: str = "iteration"


REWARDS = {"score": "score (proxy)", "true_reward": "true reward"}
RATE = Panel("Learning rate: up, then down", {"lr": "learning rate"}, "per optimizer step")
# FORK: a metric of your own gets a panel here. A panel without a number in any run is left out.
PANELS = {
    "ppo.py": [
        Panel("Both rise: good. Score up, true reward down: hacking",
              REWARDS, "reward per response"),
        Panel("What distance from the SFT policy buys", REWARDS, "reward per response", x="kl"),
        Panel("Distance from the SFT policy, and its price", {"kl": "KL", "kl_coef": "beta"},
              "nats per response", "beta (kl_coef)"),
        Panel("No sudden trend in length; EOS rate near 1",
              {"response_length": "response length", "eos_rate": "EOS rate"},
              "tokens per response", "share of responses"),
        Panel("Policy loss slightly below 0; value loss falls",
              {"policy_loss": "policy loss", "value_loss": "value loss"},
              "policy loss", "value loss"),
        Panel("Explained variance: rises above 0",
              {"explained_variance": "explained variance"}, "share of the variance"),
        Panel("Small updates: clip fraction 0.01 to 0.2",
              {"approx_kl": "approx_kl", "clip_fraction": "clip fraction"},
              "nats per token", "share of tokens"),
    ],
    "reward_model.py": [
        Panel("Loss: falls below log 2 = 0.693", {"loss": "loss"}, "nats per pair"),
        Panel("Accuracy: rises above 0.5", {"accuracy": "accuracy"}, "share of pairs"), RATE,
    ],
    "sft.py": [Panel("Loss: falls fast, then slowly", {"loss": "loss"}, "nats per token"), RATE],
}
MARKS = {"ppo.py": "kl_coef", "reward_model.py": "accuracy", "sft.py": "loss"}  # tell them apart
METRICS = {key for panels in PANELS.values() for panel in panels for key in panel.metrics}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito 2008


# === 2. Reading ===================================================================================
class Run(NamedTuple):
    name: str
    stage: str  # a key of PANELS
    training: list  # rows
    held_out: list  # rows with a "split"


def run_names(files):
    """Returns the shortest ends of paths that tell the runs apart: ppo, sft, or a/ppo, b/ppo."""
    runs = [file.parent if file.name == "metrics.jsonl" else file for file in files]
    paths = [pathlib.Path(os.path.abspath(run)).parts for run in runs]
    names = []
    for run, path in zip(runs, paths):
        if paths.count(path) > 1:
            raise UserError(f"{run} is given twice; name each run once")
        length = 1
        while sum(other[-length:] == path[-length:] for other in paths) > 1:
            length += 1
        names.append(os.path.join(*path[-length:]))
    return names


def parse_row(line, where):
    """Returns a line of a metrics.jsonl as a dict, with a float or None for each metric."""
    try:
        row = json.loads(line, parse_int=float, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); mend the line or delete it") from None
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), float):
        raise UserError(f"{where} is no object with an iteration; mend the line or delete it")
    for key in METRICS & set(row):
        if not isinstance(row[key], float | None):
            raise UserError(f"{where} has {row[key]!r} under {key!r}; make it a number or null")
    return row


def has(rows, key):
    """Returns whether one of the rows has a number under this key."""
    return any(row.get(key) is not None for row in rows)


def read_run(file, name):
    """Returns a metrics.jsonl as a Run."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}; name a run, like ckpt/ppo") from None
    rows = [parse_row(line, f"{file} line {number}") for number, line in enumerate(lines, 1)]
    training = [row for row in rows if "split" not in row]
    if not training:
        raise UserError(f"{file} has no iteration yet; wait until the run has logged one")
    stages = [stage for stage, mark in MARKS.items() if has(training, mark)]
    if not stages:
        keys = ", ".join(MARKS.values())
        raise UserError(f"{file} has no number under {keys}; give the metrics.jsonl of a stage")
    return Run(name, stages[0], training, [row for row in rows if "split" in row])


def read_runs(paths):
    """Returns the runs of one picture: of one stage, and no more than there are colours."""
    if len(paths) > len(COLOURS):
        raise UserError(f"{len(paths)} runs are too many to tell apart; give up to {len(COLOURS)}")
    paths = [pathlib.Path(path) for path in paths]
    files = [path / "metrics.jsonl" if path.is_dir() else path for path in paths]
    runs = [read_run(file, name) for file, name in zip(files, run_names(files))]
    for run in runs:
        if run.stage != runs[0].stage:
            kinds = f"{runs[0].name} is a run of {runs[0].stage} and {run.name} one of {run.stage}"
            raise UserError(f"{kinds}; draw them in two pictures")
    return runs


# === 3. Drawing ===================================================================================
def points(rows, x, y):
    """Returns two lists for a curve, with nan, for which matplotlib leaves a gap, for no number."""
    return [[math.nan if row.get(key) is None else row[key] for row in rows] for key in (x, y)]


def draw_panel(axes, panel, runs):
    """Draws a colour per run and a line style per metric, with the legend above the data."""
    from matplotlib.lines import Line2D

    legend = []
    for (key, name), style, inside in zip(panel.metrics.items(), ("-", "--"), (None, "white")):
        if not any(has(run.training + run.held_out, key) for run in runs):
            continue  # no judge, no true reward: neither a line nor a word about it
        side = axes
        if style == "--" and panel.right_label:
            side, name = axes.twinx(), f"{name} (right)"
            side.set_ylabel(panel.right_label)
        for run, colour in zip(runs, COLOURS):
            look = {"color": colour, "markerfacecolor": inside, "label": f"{run.name} {key}"}
            if has(run.training, key):
                training = points(run.training, panel.x, key)
                side.plot(*training, style, marker=".", markersize=4, **look)  # a lone point shows
            if has(run.held_out, key):
                side.plot(*points(run.held_out, panel.x, key), "o", **look)
        if side is not axes:  # a constant such as beta is read against 0
            low, high = min(0, side.get_ylim()[0]), side.get_ylim()[1]
            side.set_ylim(low, high + 0.05 * (high - low))
        look = {"marker": "o" if any(has(run.held_out, key) for run in runs) else ""}
        look |= {"color": "0.3", "linestyle": style, "markerfacecolor": inside, "label": name}
        legend.append(Line2D([], [], **look))
    title = panel.title if len(legend) == len(panel.metrics) else legend[0].get_label()
    axes.set_title(title, loc="left", pad=25, fontsize=11, fontweight="bold")
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.03), "borderpad": 0, "borderaxespad": 0}
    axes.legend(handles=legend, ncols=2, frameon=False, **place)
    axes.set(xlabel=panel.x, ylabel=panel.label)
    axes.grid(alpha=0.3)
    axes.ticklabel_format(useOffset=False, scilimits=(-7, 7))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.x == "kl":  # runs differ tenfold in KL; one batch's estimate may be below 0
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("KL, nats per response; logarithmic above 1")


def draw(runs, number=None):
    """Returns the first panels, or all, as a matplotlib Figure; no pyplot, so no display."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError("plot.py needs the package matplotlib; pip install matplotlib") from None
    rows = [row for run in runs for row in run.training + run.held_out]
    panels = [
        panel for panel in PANELS[runs[0].stage]
        if has(rows, panel.x) and any(has(rows, key) for key in panel.metrics)
    ][:number]
    odd, height = len(panels) % 2, math.ceil(len(panels) / 2)
    heights = [1 + 0.4 * odd] + [1] * (height - 1)  # of an odd number, the first is large
    figure = Figure(figsize=(9.5, 0.5 + 2.5 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(height, 2, height_ratios=heights)
    cells = [grid[0, :]] * odd + [grid[i // 2, i % 2] for i in range(2 * odd, 2 * height)]
    for cell, panel in zip(cells, panels):
        draw_panel(figure.add_subplot(cell), panel, runs)
    handles = [Line2D([], [], color=colour, linewidth=4) for colour in COLOURS[: len(runs)]]
    handles += [Line2D([], [], color="0.3"), Line2D([], [], color="0.3", marker="o", linestyle="")]
    names = [run.name.replace("$", r"\$") for run in runs] + ["training batches", "held-out data"]
    columns = max(1, min(len(names), 110 // (8 + max(map(len, names)))))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", nargs="+", help="output folder of a stage, or a metrics.jsonl")
    parser.add_argument("--output", default="curves.png", help="PNG file (default: %(default)s)")
    parser.add_argument("--panels", type=int, choices=range(1, 8), help="how many (default: all)")
    args = parser.parse_args()
    try:
        if not args.output.lower().endswith(".png"):
            raise UserError(f"--output {args.output!r} is no PNG; give a name that ends in .png")
        draw(read_runs(args.run), args.panels).savefig(args.output, dpi=180)
    except UserError as error:
        parser.exit(2, f"plot.py: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"plot.py: error: can't write {args.output}: {error.strerror}\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
