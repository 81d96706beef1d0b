"""PPO beside DPO, IPO, KTO, RLOO, GRPO, a KL in the loss and best of n: true reward against KL.

    python examples/beside_ppo/compare.py                  the embedded world; hours of CPU time
    python examples/beside_ppo/compare.py --seeds 2 --jobs 1 --work /tmp/beside
    python examples/beside_ppo/compare.py --stories MODEL STORIES.jsonl --seeds 1

Each seed has its own SFT policy and reward model; all methods start from them, on the same pairs,
prompts and judge. Every method runs over its coefficients with the first two seeds; the one with
the best true reward on prompts used for this choice alone is run with all seeds, and results are
reported on other prompts, 4 samples each. Runs that are finished in --work are not run again, so
the same command continues after a stop; after a change of code it needs a new --work. CPU seconds
are those of the seeds after the second if there are some, which do not evaluate while training.

With --stories a real pretrained model learns to continue with two sentences; the pairs are two of
its own samples, and the judge counts words (cheerful.py) and errs. Writes --output (JSON), the
picture beside it (needs matplotlib) and prints the table.
"""

import argparse
import concurrent.futures
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
from dataclasses import dataclass

import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import best_of_n  # noqa: E402
import make_world  # noqa: E402

import common  # noqa: E402
import harness  # noqa: E402
import ppo  # noqa: E402
from rewards import FunctionScorer, load_scorer  # noqa: E402

SFT, REWARD_MODEL, PPO = "sft.py", "reward_model.py", "ppo.py"
DPO, TRL = "examples/beside_ppo/dpo.py", "examples/beside_ppo/trl_ppo.py"
RESULTS = ROOT / "docs" / "results"
NUM_SAMPLES = 4  # per prompt, where policies are measured; best of n has more


# === What is compared =============================================================================
@dataclass(frozen=True)
class Method:
    """A script with one coefficient. `fork` is a patch of examples/forks that is applied first, and
    `edit` a text of the forked ppo.py and what then replaces it.
    """

    script: str
    flag: str
    coefficients: tuple
    more: tuple = ()
    fork: str | None = None
    edit: tuple = ()


METHODS = {
    "PPO": Method(PPO, "--kl-coef", (0.05, 0.1, 0.15, 0.3, 1.0)),
    "PPO, KL target": Method(PPO, "--kl-target", (1.0, 2.0, 4.0, 8.0)),
    "RLOO": Method(PPO, "--kl-coef", (0.05, 0.1, 0.15, 0.3), fork="rloo"),
    "GRPO": Method(PPO, "--kl-coef", (0.03, 0.1, 0.3, 1.0), fork="grpo"),
    "KL in the loss": Method(PPO, "--kl-coef", (0.03, 0.1, 0.3, 1.0), fork="kl_in_loss"),
    "KL in the loss, times the ratio": Method(
        PPO, "--kl-coef", (0.03, 0.1, 0.3, 1.0), fork="kl_in_loss",
        edit=("kl_coef * k3.sum()", "kl_coef * (ratio * k3).sum()"),
    ),
    "DPO": Method(DPO, "--beta", (0.03, 0.1, 0.3, 1.0), ("--loss", "dpo")),
    "IPO": Method(DPO, "--beta", (0.01, 0.03, 0.1, 0.3), ("--loss", "ipo")),
    "KTO": Method(DPO, "--beta", (0.03, 0.1, 0.3, 1.0), ("--loss", "kto")),
}
PEER = {"TRL's PPO": Method(TRL, "--kl-coef", (0.15,))}  # needs trl; the embedded world only
ALL = METHODS | PEER


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
    """Returns the world of data/, and writes prompts for the choice that none of its files has."""
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
    """Returns a world of two sentences per story, from a JSONL file of prompt and completion."""
    rows = {}
    for line in pathlib.Path(stories).read_text("utf-8").splitlines():
        row = json.loads(line)
        two = re.match(r"\s*(?:[^.!?]*[.!?]+[\"']?){1,2}", row["completion"])
        if two:
            prompt = row["prompt"].strip()
            rows[prompt] = {"prompt": prompt, "completion": " " + two[0].strip()}
    rows = list(rows.values())
    random.Random(0).shuffle(rows)
    parts = {"heldout": rows[:256], "choice": rows[256:512], "pair": rows[512:]}
    files = {name: work / f"{name}_prompts.jsonl" for name in parts}
    for name, some in parts.items():
        write_rows(files[name], [{"prompt": row["prompt"]} for row in some])
    demonstrations = work / "demonstrations.jsonl"
    write_rows(demonstrations, parts["pair"])
    sft = ("--model", model, "--data", str(demonstrations), "--epochs", "3", "--lr", "1e-3")
    judge = f"{HERE / 'cheerful.py'}:cheerful"
    # The rates that the scripts have for so small a model suit one from scratch: with ppo.py's the
    # first approx_kl is 0.10 here, above what is healthy; with dpo.py's, beta 1 moves 26 nats.
    ppo_flags = ("--judge", judge, "--lr", "1e-4", "--iterations", "20")
    ppo_flags += ("--prompts", str(files["pair"]), "--eval-prompts", str(files["heldout"]))
    dpo_flags = ("--lr", "1e-4", "--eval-every", "100")
    return World(work, judge, 96, sft, ppo_flags, dpo_flags, makes_pairs=True, best_of=64)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# === One run, in a worker process =================================================================
def run_job(job):
    """Trains, then measures, unless that is done already. Returns the result."""
    record = job["folder"] / "compare.json"
    if record.exists():
        done = json.loads(record.read_text())
        if done["command"] == job["command"]:
            return done["result"]
    result = train(job) if job["command"] else {}
    if job.get("measure"):
        result |= job["measure"](job)
    job["folder"].mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"command": job["command"], "result": result}))
    print(f"  seed {job['seed']}: {job['folder'].name}", flush=True)
    return result


def train(job):
    """Runs the command to its end. Returns CPU seconds and peak memory of its process."""
    job["folder"].parent.mkdir(parents=True, exist_ok=True)
    again = ["--overwrite", "--output", str(job["folder"]), "--seed", str(job["seed"])]
    with open(f"{job['folder']}.log", "w") as log:
        command = [sys.executable, *job["command"], *again]
        run = subprocess.Popen(command, cwd=job["root"], stdout=log, stderr=log)
        _, run.returncode, usage = os.wait4(run.pid, 0)
    if run.returncode:
        raise RuntimeError(f"{job['folder']} failed, see {job['folder']}.log")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_memory_gb": peak}


def load(job, policy):
    """Returns the tokenizer, policy, SFT policy, scorers and judge of a job."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = harness.pick_device("auto")
    sft = str(job["seed_folder"] / "sft")
    tokenizer = common.load_tokenizer(sft)
    policy = common.load_causal_lm(str(policy), tokenizer)
    ref_policy = common.load_causal_lm(sft, tokenizer)
    scorers = []
    reward_model = job["seed_folder"] / "reward_model"
    if reward_model.exists():
        options = {"trust_remote_code": False}
        scorers.append(load_scorer(str(reward_model), policy, tokenizer, 64, **options))
    for model in [policy, ref_policy, *(scorer.model for scorer in scorers)]:
        common.to_device(model.requires_grad_(False), device, "auto")
    return tokenizer, policy, ref_policy, scorers, FunctionScorer(job["world"].judge)


def prompt_rows(job, name, tokenizer):
    rows = harness.read_rows([str(job["world"].data / f"{name}_prompts.jsonl")], [("prompt",)])
    for row in rows:
        row.prompt_ids, _ = common.encode(tokenizer, row["prompt"])
    return rows


def measure(job):
    """Returns means over prompts x samples, for the report and the choice, and the run's log."""
    policy = job.get("policy", job["folder"])
    tokenizer, policy, ref_policy, scorers, judge = load(job, policy)
    length = job["world"].response_length
    cfg = ppo.Config(response_length=length, seed=job["seed"], microbatch_size=32)
    result = {}
    for name in ("heldout", "choice"):
        rows = [row for row in prompt_rows(job, name, tokenizer) for _ in range(NUM_SAMPLES)]
        samples = ppo.evaluate(cfg, policy, ref_policy, tokenizer, scorers, judge, rows)
        responses = [each["response"] for each in samples]
        result[name] = {key: mean_of(samples, key) for key in ("true_reward", "score", "kl")}
        result[name]["words"] = statistics.fmean(len(response.split()) for response in responses)
        result[name]["different"] = len(set(responses)) / len(responses)
    log = job["folder"] / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    keys = ("iteration", "kl", "true_reward", "score")
    evals = [row for row in lines if row.get("split") == "eval"]
    result["curve"] = [{key: row[key] for key in keys} for row in evals]
    result["pairs"] = [row for row in lines if row.get("split") == "pairs"]
    return result


def mean_of(rows, key):
    return statistics.fmean(row[key] for row in rows)


def sample_sft(job, n, name, scorers_are_judge=False):
    """Returns (rows, texts, scores, true rewards) of n samples of the SFT policy per prompt."""
    tokenizer, policy, _, scorers, judge = load(job, job["seed_folder"] / "sft")
    cfg = best_of_n.Config(
        n=n, response_length=job["world"].response_length, batch_size=512, seed=job["seed"]
    )
    scorers = [judge] if scorers_are_judge else scorers
    rows = prompt_rows(job, name, tokenizer)
    return rows, *best_of_n.sample_all(cfg, policy, tokenizer, scorers, judge, rows)


def measure_best_of_n(job):
    """Returns score and true reward of the best of n SFT samples, on the held-out prompts."""
    _, _, scores, truths = sample_sft(job, job["world"].best_of, "heldout")
    rows = []
    for n in [2**i for i in range(job["world"].best_of.bit_length())]:
        rows.append({
            "n": n, "kl": best_of_n.kl_bound(n),
            "score": best_of_n.best_of(scores, scores, n).mean().item(),
            "true_reward": best_of_n.best_of(scores, truths, n).mean().item(),
        })
    return {"best_of": rows}


def make_pairs(job):
    """Writes pairs of the SFT policy's samples that the judge rates differently; it may err."""
    rows, samples, _, truths = sample_sft(job, 8, "pair", scorers_are_judge=True)
    rng = random.Random(job["seed"])
    pairs = []
    for row, some, true in zip(rows, samples, truths.tolist()):
        for first, second in ((0, 1), (2, 3), (4, 5), (6, 7)):
            if true[first] == true[second]:
                continue
            # 1.5: it errs in 18 % of the pairs that are one word apart
            wins = rng.random() < 1 / (1 + math.exp(1.5 * (true[second] - true[first])))
            chosen, rejected = (first, second) if wins else (second, first)
            texts = {"chosen": some[chosen], "rejected": some[rejected]}
            pairs.append({"prompt": row["prompt"]} | texts)
    write_rows(job["seed_folder"] / "pairs.jsonl", pairs)
    return {}


# === All runs =====================================================================================
def slug(text):
    return re.sub(r"[^\w.]+", "_", text)


def forked(work, patch, edit=()):
    """Returns a copy of the project, in a folder of `work`, with a patch applied. Then the first
    text of `edit`, if there is one, is replaced in ppo.py by the second.
    """
    project = work / patch.stem
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(ROOT / "data", project / "data")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, project)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)  # else git looks further up
    subprocess.run(["git", "apply", patch], cwd=project, check=True)
    if edit:
        script = (project / PPO).read_text(encoding="utf-8")
        assert script.count(edit[0]) == 1, edit
        (project / PPO).write_text(script.replace(edit[0], edit[1]), encoding="utf-8")
    return project


def first_jobs(world, work, seed):
    """Returns the jobs that come before all methods, in their order."""
    folder = work / f"seed{seed}"
    pairs = ["--data", str(folder / "pairs.jsonl")] if world.makes_pairs else []
    reward_model = [REWARD_MODEL, "--model", str(folder / "sft"), *pairs]
    steps = [("sft", [SFT, *world.sft], None)]
    steps += [("pairs", None, make_pairs)] if world.makes_pairs else []
    steps += [("reward_model", reward_model, None)]
    steps += [("best_of_n", None, measure_best_of_n), ("sft_measured", None, measure)]
    jobs = []
    for name, command, then in steps:
        jobs.append({
            "world": world, "seed": seed, "seed_folder": folder, "root": ROOT, "measure": then,
            "folder": folder / name, "command": command, "policy": folder / "sft",
        })
    return jobs


def job_of(world, work, seed, method, coefficient, evaluates=True):
    """Returns the job of a method with one of its coefficients."""
    folder, this = work / f"seed{seed}", ALL[method]
    command = [this.script, "--policy", str(folder / "sft"), this.flag, str(coefficient)]
    command += this.more
    if this.script == DPO:
        command += ["--data", str(folder / "pairs.jsonl")] if world.makes_pairs else []
        command += ["--response-length", str(world.response_length), "--judge", world.judge]
        command += ["--eval-prompts", str(world.data / "heldout_prompts.jsonl"), *world.dpo]
    else:
        command += ["--reward", str(folder / "reward_model")]
    if this.script == PPO:
        command += [*world.ppo, "--response-length", str(world.response_length)]
    if this.script != TRL and not evaluates:
        command += ["--eval-every", "1000000"]
    return {
        "world": world, "seed": seed, "seed_folder": folder, "measure": measure,
        "root": work / slug(method) / this.fork if this.fork else ROOT,
        "folder": folder / slug(f"{method}_{coefficient:g}"), "command": command,
    }


def choose(results, name, seeds):
    """Returns the coefficient with the best mean true reward on the prompts for this choice."""

    def mean(c):
        return mean_of([results[name, c, seed]["choice"] for seed in seeds], "true_reward")

    return max(ALL[name].coefficients, key=mean)


def compare(world, work, num_seeds, num_jobs, methods):
    """Does all runs. Returns {"methods": {name: {...}}, "best_of_n": ..., "sft": ...}."""
    for name in methods:
        fork, edit = ALL[name].fork, ALL[name].edit
        if fork and not (work / slug(name) / fork).exists():
            forked(work / slug(name), HERE.parent / "forks" / f"{fork}.patch", edit)
    results = {}  # {(method, coefficient, seed): record}
    stages = {}  # {name: a record per seed}
    compared = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_jobs, mp_context=context) as pool:

        def run_all(keys, evaluates):
            jobs = [job_of(world, work, seed, name, c, evaluates) for name, c, seed in keys]
            results.update(zip(keys, pool.map(run_job, jobs)))

        for jobs in zip(*(first_jobs(world, work, seed) for seed in range(num_seeds))):
            stages[jobs[0]["folder"].name] = dict(enumerate(pool.map(run_job, jobs)))
        first = range(min(2, num_seeds))
        tried = [(name, c) for name in methods for c in ALL[name].coefficients]
        run_all([(name, c, seed) for name, c in tried for seed in first], True)
        best = {name: choose(results, name, first) for name in methods}
        others = range(len(first), num_seeds)
        run_all([(name, best[name], seed) for name in methods for seed in others], False)
    for name in methods:
        runs = {str(c): {} for c in ALL[name].coefficients}
        compared[name] = {"flag": ALL[name].flag, "chosen": best[name], "runs": runs}
    for (name, c, seed), result in results.items():
        compared[name]["runs"][str(c)][str(seed)] = result
    return {
        "methods": compared, "sft": stages["sft_measured"],
        "best_of_n": {seed: result["best_of"] for seed, result in stages["best_of_n"].items()},
        "stages": {name: stages[name] for name in ("sft", "reward_model")},
    }


# === Table and picture ============================================================================
KEYS = ("true_reward", "kl", "score", "different")
HEADS = ("", "coefficient", "true reward", "KL, nats", "score", "different texts")


def spread(values):
    """Returns mean ± standard deviation as text; of one value the value."""
    values = list(values)
    std = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{std}"


def numbers(runs):
    """Returns the cells of runs on the held-out prompts, by KEYS."""
    return [spread(run["heldout"][key] for run in runs) for key in KEYS]


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def table(result):
    """Returns Markdown: a row per method, at the chosen coefficient, on the held-out prompts."""
    rows = [["SFT policy", "", *numbers(result["sft"].values()), "", "", str(len(result["sft"]))]]
    for name, method in result["methods"].items():
        runs = method["runs"][str(method["chosen"])]
        timed = [run for seed, run in runs.items() if int(seed) > 1] or list(runs.values())
        seconds, memory = mean_of(timed, "cpu_seconds"), mean_of(timed, "peak_memory_gb")
        what = f"`{method['flag']} {method['chosen']:g}`"
        cost = [f"{seconds:.0f}", f"{memory:.2f}", str(len(runs))]
        rows.append([name, what, *numbers(runs.values()), *cost])
    for same_n in list(zip(*result["best_of_n"].values()))[2::2]:
        true, score = (spread(row[key] for row in same_n) for key in ("true_reward", "score"))
        number, bound = f"n = {same_n[0]['n']}", f"at most {same_n[0]['kl']:.2f}"
        rows.append(["best of n", number, true, bound, score, "", "", "", str(len(same_n))])
    return markdown([*HEADS, "CPU seconds", "GB", "seeds"], rows)


def first_two(by_seed):
    """Returns the values of seeds 0 and 1, the only ones that ran every coefficient."""
    return [value for seed, value in by_seed.items() if int(seed) < 2]


def sweep_table(result):
    """Returns Markdown: a row per method and coefficient, all over the same seeds, 0 and 1."""
    rows = []
    for name, method in result["methods"].items():
        for c, by_seed in method["runs"].items():
            what, runs = f"`{method['flag']} {c}`", first_two(by_seed)
            rows.append([name, what, *numbers(runs), str(len(runs))])
    return markdown([*HEADS, "seeds"], rows)


def draw(result, path):
    """Draws true reward by coefficient and along training, and the score, against the KL, all over
    seeds 0 and 1.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (sweep, along, proxy) = pyplot.subplots(3, 1, figsize=(9, 15))
    best = list(zip(*first_two(result["best_of_n"])))  # the seeds' rows, for each n
    for axes, key, title in (
        (sweep, "true_reward", "true reward, by coefficient"),
        (along, "true_reward", "true reward along training, smallest coefficient"),
        (proxy, "score", "score of the reward model, by coefficient"),
    ):
        bounds = [mean_of(rows, "kl") for rows in best]
        label = "best of n (KL at most)"
        axes.plot(bounds, [mean_of(rows, key) for rows in best], "k--", label=label)
        axes.set(title=title, xlabel="KL to the SFT policy, nats")
        axes.set_xscale("symlog", linthresh=1)
        axes.grid(alpha=0.3)
    for number, (name, method) in enumerate(result["methods"].items()):
        style = {"color": f"C{number}", "marker": "osD^vPX*"[number % 8], "lw": 1, "label": name}
        by_coefficient = [first_two(by_seed) for by_seed in method["runs"].values()]
        points = [[run["heldout"] for run in runs] for runs in by_coefficient]
        points.sort(key=lambda rows: mean_of(rows, "kl"))
        kls = [mean_of(rows, "kl") for rows in points]
        sweep.plot(kls, [mean_of(rows, "true_reward") for rows in points], **style)
        if method["flag"] != "--beta":  # DPO and its kin do not train on the score
            proxy.plot(kls, [mean_of(rows, "score") for rows in points], **style)
        for run in by_coefficient[0]:  # of the smallest coefficient
            kls = [row["kl"] for row in run["curve"]]
            along.plot(kls, [row["true_reward"] for row in run["curve"]], **style | {"ms": 3})
    sweep.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def machine():
    """Returns what made the numbers: command, commit, versions."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="ckpt/beside_ppo", help="folder for all runs")
    parser.add_argument("--output", default=str(RESULTS / "beside_ppo.json"), help="JSON file")
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
        seconds = [run["cpu_seconds"] for run in result["stages"][stage].values()]
        print(f"{stage}.py: {spread(seconds)} CPU seconds")
    if importlib.util.find_spec("matplotlib"):
        draw(result, pathlib.Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
