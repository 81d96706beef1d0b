"""Run the rows of docs/results.md anew: several seeds, each with its own models.

    python bench/learning.py                   hours of CPU time, 5 seeds; finished runs are kept
    python bench/learning.py --seeds 2 --jobs 1

Writes docs/results/embedded_world.json and prints the table. The seeds' folders are those of
examples/beside_ppo/compare.py, so what one of the two has trained the other does not train again.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "beside_ppo")]
import compare  # noqa: E402

ROWS = {
    "ppo": "",
    "ppo_beta0": "--kl-coef 0 --iterations 60",
    "ppo_bandit": "--advantage bandit",
    "ppo_shared": "--critic shared",
    "ppo_shared_bandit": "--critic shared --advantage bandit",
    "ppo_shared_bandit_entropy": "--critic shared --advantage bandit --entropy-coef 0.01",
    "ppo_target": "--kl-target 3",
}
KEYS = ("score", "true_reward", "kl", "win_rate")


def job_of(world, work, seed, name):
    """Returns a run of ppo.py from the seed's own SFT policy and reward model, by its defaults."""
    folder = work / f"seed{seed}"
    models = ["--policy", str(folder / "sft"), "--reward", str(folder / "reward_model")]
    return {
        "world": world, "seed": seed, "seed_folder": folder, "root": ROOT,
        "folder": folder / name, "command": ["ppo.py", *models, *ROWS[name].split()],
        "name": f"seed {seed}: {name}",
    }


def rows_of(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def result_of(folder):
    """Returns held-out prompts before and after, and what should hold at the start."""
    rows = rows_of(folder)
    evals = [row for row in rows if row.get("split") == "eval"]
    steps = [row for row in rows if "split" not in row]
    return {
        "before": {key: evals[0][key] for key in KEYS},
        "after": {key: evals[-1][key] for key in KEYS},
        "mean_kl_of_last_ten_iterations": statistics.fmean(row["kl"] for row in steps[-10:]),
        "largest_abs_ratio_first_minus_1": max(abs(row["ratio_first"] - 1) for row in steps),
        "first_kl": steps[0]["kl"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="ckpt/beside_ppo", help="folder for all runs")
    parser.add_argument("--output", default=str(ROOT / "docs" / "results" / "embedded_world.json"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    work = pathlib.Path(args.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    world, seeds = compare.embedded_world(work), range(args.seeds)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for stage in ("sft", "reward_model"):
            jobs = [job for seed in seeds for job in compare.first_jobs(world, work, seed)]
            list(pool.map(compare.run_job, [job for job in jobs if job["folder"].name == stage]))
        list(pool.map(compare.run_job, [job_of(world, work, s, n) for s in seeds for n in ROWS]))
    stages, runs = [], []
    for seed in seeds:
        folder = work / f"seed{seed}"
        stages.append({name: rows_of(folder / name)[-1] for name in ("sft", "reward_model")})
    for name, flags in ROWS.items():
        results = [{"seed": seed} | result_of(work / f"seed{seed}" / name) for seed in seeds]
        runs.append({"command": f"python ppo.py {flags}".strip(), "seeds": results})
    what = "embedded world: held-out prompts before and after PPO, each seed with its own models"
    result = {"what": what} | compare.machine() | {"stages": stages, "runs": runs}
    pathlib.Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    lines = [("SFT policy", [each["before"] for each in runs[0]["seeds"]])]
    lines += [(run["command"], [each["after"] for each in run["seeds"]]) for run in runs]
    for name, some in lines:
        numbers = [compare.spread([each[key] for each in some]) for key in KEYS]
        print(f"| {name} | {' | '.join(numbers)} |")


if __name__ == "__main__":
    main()
