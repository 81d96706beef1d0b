"""PPO beside DPO, IPO, KTO, RLOO, a KL in the loss and best of n: true reward against KL.

    python examples/beside_ppo/compare.py                  the embedded world; hours of CPU time
    python examples/beside_ppo/compare.py --seeds 2 --jobs 1 --work /tmp/beside
    python examples/beside_ppo/compare.py --stories MODEL STORIES.jsonl --seeds 1

Each seed has its own SFT policy and reward model; all methods start from them, on the same pairs,
prompts and judge. Every method runs over its coefficients with the first two seeds; the one with
the best true reward on prompts that are for this choice alone is run with all seeds, and what is
reported is of other prompts, 4 samples each. Runs that are finished in --work are not run again, so
the same command goes on after a stop; after a change of code it needs a new --work. The curves
along training are those of the first two seeds; CPU seconds are of the others if there are some,
without the evaluations in between. (The first two seeds chose the coefficient, on other prompts,
and are among those reported.)

With --stories a real pretrained model learns to go on with two sentences; the pairs are two of its
own, and the judge counts words (cheerful.py) and errs. Writes --output (JSON), the picture beside
it (needs matplotlib) and prints the table.
"""

import argparse
import concurrent.futures
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import types
from dataclasses import dataclass

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
SFT, REWARD_MODEL, PPO = "sft.py", "reward_model.py", "ppo.py"
DPO, TRL = "examples/beside_ppo/dpo.py", "examples/beside_ppo/trl_ppo.py"
NUM_SAMPLES = 4  # to each prompt, of what is measured; best of n has more


# === What is compared =============================================================================
@dataclass(frozen=True)
class Method:
    """A script with one coefficient; `fork` is a patch of examples/forks that is applied first."""

    script: str
    flag: str
    coefficients: tuple
    more: tuple = ()
    fork: str | None = None


METHODS = {
    "PPO": Method(PPO, "--kl-coef", (0.05, 0.1, 0.15, 0.3, 1.0)),
    "PPO, KL target": Method(PPO, "--kl-target", (1.0, 2.0, 4.0, 8.0)),
    "RLOO": Method(PPO, "--kl-coef", (0.05, 0.1, 0.15, 0.3), fork="rloo.patch"),
    "KL in the loss": Method(PPO, "--kl-coef", (0.03, 0.1, 0.3, 1.0), fork="kl_in_loss.patch"),
    "DPO": Method(DPO, "--beta", (0.03, 0.1, 0.3, 1.0), ("--loss", "dpo")),
    "IPO": Method(DPO, "--beta", (0.01, 0.03, 0.1, 0.3), ("--loss", "ipo")),
    "KTO": Method(DPO, "--beta", (0.03, 0.1, 0.3, 1.0), ("--loss", "kto")),
}
KNOBS = {  # of PPO, one at a time: with --methods; the defaults are those of PPO with 0.15
    "lam": Method(PPO, "--lam", (0.9, 1.0)),
    "epochs": Method(PPO, "--ppo-epochs", (2, 8)),
    "minibatch": Method(PPO, "--minibatch-size", (16, 64, 128)),
    "lr": Method(PPO, "--lr", (1e-4, 5e-4, 1e-3)),
    "critic lr": Method(PPO, "--critic-lr", (1e-4, 1e-3, 3e-3)),
    "clip": Method(PPO, "--clip-eps", (0.1, 0.4)),
    "value clip": Method(PPO, "--value-clip-eps", (0.1, 100.0)),
    "iterations": Method(PPO, "--iterations", (60,)),
}
PEER = {"TRL's PPO": Method(TRL, "--kl-coef", (0.15,))}  # needs trl; the embedded world only
ALL = METHODS | KNOBS | PEER


@dataclass(frozen=True)
class World:
    """What the runs are given: files, a judge, and flags that all scripts of a kind get."""

    data: pathlib.Path  # heldout_prompts.jsonl, choice_prompts.jsonl, and others where flags say so
    judge: str
    response_length: int
    sft: tuple = ()
    ppo: tuple = ()
    dpo: tuple = ()
    makes_pairs: bool = False
    best_of: int = 256  # samples to each prompt for best of n


def embedded_world(work):
    """The world of data/, and prompts for the choice of coefficients that none of its files has."""
    sys.path.insert(0, str(ROOT / "data"))
    import make_world

    known = {row["prompt"] for rows in make_world.make_world().values() for row in rows}
    rng, prompts = random.Random(1), {}
    while len(prompts) < make_world.NUM_HELDOUT:
        prompt, _, _ = make_world.write_prompt(rng)
        if prompt not in known:
            prompts[prompt] = None
    write_rows(work / "choice_prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    shutil.copy(ROOT / "data" / "heldout_prompts.jsonl", work)
    return World(work, f"{ROOT / 'data' / 'true_reward.py'}:true_reward", 64)


def story_world(work, model, stories):
    """Prompts and demonstrations of two sentences from a file of stories, and a judge of words."""
    rows = [json.loads(line) for line in pathlib.Path(stories).read_text("utf-8").splitlines()]
    two = lambda text: re.match(r"\s*(?:[^.!?]*[.!?]+[\"']?){1,2}", text)
    rows = [
        {"prompt": row["prompt"].strip(), "completion": " " + two(row["completion"])[0].strip()}
        for row in rows if two(row["completion"])
    ]
    rows = list({row["prompt"]: row for row in rows}.values())
    random.Random(0).shuffle(rows)
    held_out, choice, rest = rows[:256], rows[256:512], rows[512:]
    for name, some in (("heldout", held_out), ("choice", choice), ("pair", rest)):
        write_rows(work / f"{name}_prompts.jsonl", [{"prompt": row["prompt"]} for row in some])
    write_rows(work / "demonstrations.jsonl", rest)
    data = lambda name: str(work / f"{name}.jsonl")
    sft = ("--model", model, "--data", data("demonstrations"), "--epochs", "3", "--lr", "1e-3")
    judge = f"{HERE / 'cheerful.py'}:cheerful"
    # The rates that the scripts have for so small a model suit one from scratch: with ppo.py's the
    # first approx_kl is 0.10 here, above what is healthy; with dpo.py's, beta 1 moves 26 nats.
    ppo = ("--judge", judge, "--lr", "1e-4", "--iterations", "20")
    ppo += ("--prompts", data("pair_prompts"), "--eval-prompts", data("heldout_prompts"))
    dpo = ("--lr", "1e-4", "--eval-every", "100")
    return World(work, judge, 96, sft, ppo, dpo, makes_pairs=True, best_of=64)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# === One run, in a worker process =================================================================
def run_job(job):
    """Train, then measure; what is in the folder already is not done again. Returns the record."""
    record = job["folder"] / "compare.json"
    if record.exists():
        done = json.loads(record.read_text())
        if done.get("ran", job["command"]) == job["command"]:
            return done
    result = train(job) if job["command"] else {}
    if job["kind"] == "policy":
        result |= measure(job)
    elif job["kind"] == "best of n":
        result |= measure_best_of_n(job)
    elif job["kind"] == "pairs":
        make_pairs(job)
    job["folder"].mkdir(parents=True, exist_ok=True)
    result["ran"] = job["command"]
    record.write_text(json.dumps(result))
    print(f"  {job['name']}", flush=True)
    return result


def train(job):
    """Run the command to its end: CPU seconds and peak memory of its process."""
    job["folder"].parent.mkdir(parents=True, exist_ok=True)
    again = ["--overwrite", "--output", str(job["folder"]), "--seed", str(job["seed"])]
    with open(f"{job['folder']}.log", "w") as log:
        run = subprocess.Popen(
            [sys.executable, *job["command"], *again], cwd=job["root"], stdout=log, stderr=log
        )
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = status
    if status:
        raise RuntimeError(f"{job['name']} failed, see {job['folder']}.log")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_memory_gb": peak}


def load(job, policy):
    """What `ppo.evaluate` takes: a run, policy, SFT policy, tokenizer, scorers and judge."""
    import torch

    import common
    import ppo
    from plumbing import cli
    from plumbing.scorers import FunctionScorer, load_scorer

    torch.set_num_threads(1)
    cli.warnings.simplefilter("ignore")
    cli.transformers.logging.set_verbosity_error()
    cli.transformers.logging.disable_progress_bar()
    device = cli.pick_device("auto")
    cfg = ppo.Config(response_length=job["world"].response_length, seed=job["seed"])
    run = types.SimpleNamespace(cfg=cfg, phase=lambda name: None, device=device)
    tokenizer = common.load_tokenizer(str(job["seed_folder"] / "sft"))
    models = []
    for folder in (policy, job["seed_folder"] / "sft"):
        model = common.load_causal_lm(str(folder), tokenizer).requires_grad_(False)
        common.set_generation_defaults(model, tokenizer)
        common.place(model, device, "auto")
        models.append(model)
    reward_model = job["seed_folder"] / "reward_model"
    scorers, options = [], {"trust_remote_code": False}
    if reward_model.exists():
        scorers = [load_scorer(str(reward_model), models[0], tokenizer, 64, **options)]
        common.place(scorers[0].model, device, "auto")
    return run, *models, tokenizer, scorers, FunctionScorer(job["world"].judge)


def prompt_rows(job, name, tokenizer):
    import common
    from plumbing.rows import read_rows

    rows = read_rows([str(job["world"].data / f"{name}_prompts.jsonl")], [("prompt",)])
    for row in rows:
        row.prompt_ids, _ = common.encode(tokenizer, row["prompt"])
    return rows


def measure(job):
    """Means over prompts x samples, for the report and for the choice; and the run's own log."""
    import ppo

    run, policy, ref_policy, tokenizer, scorers, judge = load(job, job.get("policy", job["folder"]))
    result = {}
    for name in ("heldout", "choice"):
        rows = [row for row in prompt_rows(job, name, tokenizer) for _ in range(NUM_SAMPLES)]
        samples = ppo.evaluate(run, policy, ref_policy, tokenizer, scorers, judge, rows)
        keys = ("true_reward", "score", "kl")
        result[name] = {key: statistics.fmean(each[key] for each in samples) for key in keys}
        words = [len(each["response"].split()) for each in samples]
        result[name]["words"] = statistics.fmean(words)
        result[name]["different"] = len({each["response"] for each in samples}) / len(samples)
    log = job["folder"] / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    result["curve"] = [
        {key: row[key] for key in ("iteration", "kl", "true_reward", "score")}
        for row in lines if row.get("split") == "eval"
    ]
    result["pairs"] = [row for row in lines if row.get("split") == "pairs"]
    return result


def measure_best_of_n(job):
    """{n: score and true reward} of the best of n SFT samples, on the held-out prompts."""
    import torch

    import best_of_n

    _, policy, _, tokenizer, scorers, judge = load(job, job["seed_folder"] / "sft")
    torch.manual_seed(job["seed"])
    world = job["world"]
    cfg = best_of_n.Config(n=world.best_of, response_length=world.response_length, batch_size=512)
    rows = prompt_rows(job, "heldout", tokenizer)
    _, scores, truths = best_of_n.sample_all(cfg, policy, tokenizer, scorers, judge, rows)
    mean = lambda values, n: best_of_n.best_of(scores, values, n).mean().item()
    numbers = [2**i for i in range(world.best_of.bit_length())]
    return {
        "best_of": [
            {"n": n, "kl": best_of_n.kl_bound(n), "score": mean(scores, n),
             "true_reward": mean(truths, n)}
            for n in numbers
        ]
    }


def make_pairs(job):
    """Pairs of the SFT policy's responses between which the judge sees a difference; it may err."""
    import torch

    import best_of_n

    _, policy, _, tokenizer, _, judge = load(job, job["seed_folder"] / "sft")
    torch.manual_seed(job["seed"])
    rng = random.Random(job["seed"])
    cfg = best_of_n.Config(n=8, response_length=job["world"].response_length, batch_size=512)
    rows = prompt_rows(job, "pair", tokenizer)
    texts, _, truths = best_of_n.sample_all(cfg, policy, tokenizer, [judge], judge, rows)
    pairs = []
    for row, some, true in zip(rows, texts, truths.tolist()):
        for first, second in ((0, 1), (2, 3), (4, 5), (6, 7)):
            if true[first] == true[second]:
                continue
            # 1.5: it errs in 18 % of the pairs that are one word apart
            wins = rng.random() < 1 / (1 + math.exp(1.5 * (true[second] - true[first])))
            chosen, rejected = (first, second) if wins else (second, first)
            pairs.append(
                {"prompt": row["prompt"], "chosen": some[chosen], "rejected": some[rejected]}
            )
    write_rows(job["seed_folder"] / "pairs.jsonl", pairs)


# === All runs =====================================================================================
def forked(work, patch):
    """A copy of the project with a patch of examples/forks applied."""
    project = work / patch.removesuffix(".patch")
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    for name in ("sft.py", "reward_model.py", "ppo.py", "common.py"):
        shutil.copy(ROOT / name, project)
    for name in ("plumbing", "data"):
        shutil.copytree(ROOT / name, project / name)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)  # else git looks further up
    subprocess.run(["git", "apply", ROOT / "examples" / "forks" / patch], cwd=project, check=True)
    return project


def jobs_of(world, work, seed, method=None, coefficient=None, look=True):
    """The job of a method; without one, those that come before all methods, in their order."""
    folder = work / f"seed{seed}"
    sft, reward_model = folder / "sft", folder / "reward_model"
    base = {"world": world, "seed": seed, "seed_folder": folder, "root": ROOT}
    pairs = ("--data", str(folder / "pairs.jsonl")) if world.makes_pairs else ()
    if method is None:
        first = [SFT, *world.sft], [REWARD_MODEL, "--model", str(sft), *pairs]
        jobs = [{"kind": "stage", "folder": sft, "command": first[0]}]
        if world.makes_pairs:
            jobs += [{"kind": "pairs", "folder": folder / "pairs", "command": None}]
        jobs += [
            {"kind": "stage", "folder": reward_model, "command": first[1]},
            {"kind": "best of n", "folder": folder / "best_of_n", "command": None},
            {"kind": "policy", "folder": folder / "sft_measured", "command": None, "policy": sft},
        ]
        return [base | job | {"name": f"seed {seed}: {job['folder'].name}"} for job in jobs]
    of = ALL[method]
    command = [of.script, "--policy", str(sft), of.flag, str(coefficient), *of.more]
    if of.script == DPO:
        command += [*pairs, "--response-length", str(world.response_length), "--judge", world.judge]
        command += ["--eval-prompts", str(world.data / "heldout_prompts.jsonl"), *world.dpo]
    else:
        command += ["--reward", str(reward_model)]
    if of.script == PPO:
        command += [*world.ppo, "--response-length", str(world.response_length)]
    if of.script != TRL and not look:
        command += ["--eval-every", "1000000"]
    slug = re.sub(r"[^\w.]+", "_", f"{method}_{coefficient:g}")
    job = {"kind": "policy", "folder": folder / slug, "command": command}
    root = work / of.fork.removesuffix(".patch") if of.fork else ROOT
    return base | job | {"root": root, "name": f"seed {seed}: {method} {coefficient:g}"}


def choose(results, name, seeds):
    """The coefficient with the best mean true reward on the prompts that are for this choice."""
    reward = lambda c, seed: results[name, c, seed]["choice"]["true_reward"]
    mean = lambda c: statistics.fmean(reward(c, seed) for seed in seeds)
    return max(ALL[name].coefficients, key=mean)


def compare(world, work, num_seeds, num_jobs, methods):
    """All runs: {"methods": {name: {...}}, "best_of_n": ..., "sft": ...}."""
    for method in ALL.values():
        if method.fork and not (work / method.fork.removesuffix(".patch")).exists():
            forked(work, method.fork)
    seeds, first = range(num_seeds), range(min(2, num_seeds))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_jobs, mp_context=context) as pool:
        before = list(zip(*(jobs_of(world, work, seed) for seed in seeds)))
        done = [list(pool.map(run_job, jobs)) for jobs in before]
        tried = [(name, c) for name in methods for c in ALL[name].coefficients]
        swept = [(name, c, seed) for name, c in tried for seed in first]
        results = dict(zip(swept, pool.map(run_job, [
            jobs_of(world, work, seed, name, c) for name, c, seed in swept
        ])))
        best = {name: choose(results, name, first) for name in methods}
        rest = [(name, best[name], seed) for name in methods for seed in seeds if seed not in first]
        results |= dict(zip(rest, pool.map(run_job, [
            jobs_of(world, work, seed, name, c, look=False) for name, c, seed in rest
        ])))
    for result in results.values():
        result.pop("ran", None)
    runs = lambda name, c: {
        str(seed): results[name, c, seed] for seed in seeds if (name, c, seed) in results
    }
    return {
        "methods": {
            name: {
                "flag": ALL[name].flag, "chosen": best[name],
                "runs": {str(c): runs(name, c) for c in ALL[name].coefficients},
            }
            for name in methods
        },
        "sft": {str(seed): done[-1][seed] for seed in seeds},
        "best_of_n": {str(seed): done[-2][seed]["best_of"] for seed in seeds},
        "stages": {
            str(seed): {"sft": done[0][seed], "reward_model": done[-3][seed]} for seed in seeds
        },
    }


# === Table and picture ============================================================================
KEYS = ("true_reward", "kl", "score", "different")


def spread(values):
    """mean ± deviation, as text; of one value the value."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def table(result):
    """Markdown: a row per method, at the coefficient that was chosen, on the held-out prompts."""
    heads = ["", "coefficient", "true reward", "KL, nats", "score", "different texts"]
    lines = [heads + ["CPU seconds", "GB", "seeds"], 9 * ["---"]]
    numbers = lambda runs: [spread(run["heldout"][key] for run in runs) for key in KEYS]
    lines += [["SFT policy", "", *numbers(result["sft"].values()), "", "", str(len(result["sft"]))]]
    for name, method in result["methods"].items():
        runs = method["runs"][str(method["chosen"])]
        timed = [run for seed, run in runs.items() if int(seed) > 1] or list(runs.values())
        cost = [f"{statistics.fmean(run['cpu_seconds'] for run in timed):.0f}"]
        cost += [f"{statistics.fmean(run['peak_memory_gb'] for run in timed):.2f}", str(len(runs))]
        what = f"`{method['flag']} {method['chosen']:g}`"
        lines += [[name, what, *numbers(runs.values()), *cost]]
    best = list(zip(*result["best_of_n"].values()))
    for rows in best[2::2]:
        true, score = (spread(row[key] for row in rows) for key in ("true_reward", "score"))
        number, bound = f"n = {rows[0]['n']}", f"at most {rows[0]['kl']:.2f}"
        lines += [["best of n", number, true, bound, score, "", "", "", str(len(rows))]]
    return ["| " + " | ".join(line) + " |" for line in lines]


def sweep_table(result):
    """Markdown: a row per method and coefficient, over the seeds that ran it."""
    lines = [["", "coefficient", "true reward", "KL, nats", "score", "different texts", "seeds"]]
    lines += [7 * ["---"]]
    for name, method in result["methods"].items():
        for coefficient, runs in method["runs"].items():
            numbers = [spread(run["heldout"][key] for run in runs.values()) for key in KEYS]
            lines += [[name, f"`{method['flag']} {coefficient}`", *numbers, str(len(runs))]]
    return ["| " + " | ".join(line) + " |" for line in lines]


def draw(result, path):
    """True reward by coefficient and along training, and the score, all against the KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 9.5))
    sweep, along, proxy = (figure.add_subplot(*place) for place in ((2, 1, 1), (2, 2, 3), (2, 2, 4)))
    mean = lambda rows, key: statistics.fmean(row[key] for row in rows)
    error = lambda rows, key: statistics.stdev([row[key] for row in rows]) if len(rows) > 1 else 0
    best = list(zip(*result["best_of_n"].values()))
    for axes, key in ((sweep, "true_reward"), (along, "true_reward"), (proxy, "score")):
        numbers = [mean(rows, "kl") for rows in best], [mean(rows, key) for rows in best]
        axes.plot(*numbers, color="black", lw=1.5, ls="--", label="best of n (KL at most)")
        axes.set_xlabel("KL to the SFT policy, nats (square root scale)")
        axes.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
        axes.grid(alpha=0.3)
    for number, (name, method) in enumerate(result["methods"].items()):
        color, marker = f"C{number}", "osD^vPX"[number % 7]
        style = {"color": color, "marker": marker, "ms": 5, "lw": 1, "capsize": 2}
        points = [[run["heldout"] for run in runs.values()] for runs in method["runs"].values()]
        points.sort(key=lambda rows: mean(rows, "kl"))
        shown = ((sweep, "true_reward"), (proxy, "score"))
        for axes, key in shown if method["flag"] != "--beta" else shown[:1]:
            axes.errorbar(
                [mean(rows, "kl") for rows in points], [mean(rows, key) for rows in points],
                xerr=[error(rows, "kl") for rows in points],
                yerr=[error(rows, key) for rows in points], label=name, **style,
            )
        # along training: the coefficient that goes furthest, and so can over-optimise
        furthest = max(method["runs"].values(), key=lambda runs: max(
            run["heldout"]["kl"] for run in runs.values()
        ))
        curves = [run["curve"] for run in furthest.values() if len(run["curve"]) > 2]
        for i, curve in enumerate(curves):
            label = name if i == 0 else None
            along.plot(
                [row["kl"] for row in curve], [row["true_reward"] for row in curve],
                color=color, marker=marker, ms=3, lw=1, alpha=0.8, label=label,
            )
    for axes in (sweep, along, proxy):
        axes.set_xlim(left=0)
    sweep.set_title("true reward, by coefficient", fontsize=11)
    along.set_title("true reward along training, furthest coefficient", fontsize=11)
    proxy.set_title("score of the reward model, by coefficient", fontsize=11)
    sweep.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def machine():
    """What made the numbers: command, versions, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "command": " ".join(["python", *sys.argv]), "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version()} | versions,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="ckpt/beside_ppo", help="folder for all runs")
    parser.add_argument("--output", default="results/beside_ppo.json", help="JSON; the picture too")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--methods", nargs="+", choices=ALL, default=list(METHODS))
    parser.add_argument("--stories", nargs=2, metavar=("MODEL", "JSONL"), help="a real model")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    work = pathlib.Path(args.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    world = story_world(work, *args.stories) if args.stories else embedded_world(work)
    result = compare(world, work, args.seeds, args.jobs, args.methods)
    pathlib.Path(args.output).write_text(json.dumps(machine() | result, indent=1) + "\n")
    print("\n".join([*table(result), "", *sweep_table(result), ""]))
    for stage in ("sft", "reward_model"):
        seconds = [stages[stage]["cpu_seconds"] for stages in result["stages"].values()]
        print(f"{stage}.py: {spread(seconds)} CPU seconds")
    if importlib.util.find_spec("matplotlib"):
        draw(result, pathlib.Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
