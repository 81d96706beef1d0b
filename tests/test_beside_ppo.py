"""examples/beside_ppo: the losses by hand and by enumeration, runs, best of n, the comparison."""

import itertools
import json
import math
import re
import shutil
import statistics
import sys

import pytest
import torch
from conftest import ROOT, read_rows, tiny_lm, write_rows
from test_resume import contents

sys.path.append(str(ROOT / "examples" / "beside_ppo"))
import best_of_n  # noqa: E402
import compare  # noqa: E402
import dpo  # noqa: E402

import common  # noqa: E402
import harness  # noqa: E402
import ppo  # noqa: E402

PAGE = (ROOT / "examples" / "beside_ppo" / "README.md").read_text(encoding="utf-8")


def sigma(x):
    return 1 / (1 + math.exp(-x))


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def flags_of(world, *more):
    pairs = world / "pairs.jsonl"
    return [
        "--policy", world / "sft", "--data", pairs, "--eval-data", pairs, "--batch-size", 8, "--epochs", 2,
        "--response-length", 20, "--lr", 1e-3, "--save-every", 2, "--eval-every", 3, "--device", "cpu", *more,
    ]


@pytest.fixture
def spec(tmp_path):
    """A judge or reward: the length of a response."""
    (tmp_path / "mine.py").write_text(
        "def length(prompts, responses, rows):\n    return [len(text) for text in responses]\n"
    )
    return f"{tmp_path / 'mine.py'}:length"


# === Losses =======================================================================================
@pytest.mark.parametrize("loss, by_hand", [
    ("dpo", [-math.log(sigma(0.6)), -math.log(sigma(-0.9))]), ("ipo", [0.25**2, 3.5**2]),
    ("kto", [1 - (sigma(0.4 * 0.7) + sigma(0.4 * 0.8)) / 2, 1 - (sigma(0.4 * -2.3) + sigma(0.4 * 0.05)) / 2]),
])
def test_the_losses_by_hand(loss, by_hand):
    found = dpo.preference_loss(double(1.0, -2.0), double(-0.5, 0.25), loss, 0.4, 0.3)
    assert found.tolist() == pytest.approx(by_hand, rel=1e-12)


REWARDS, REF_LOGITS = double(1.0, -0.5, 0.3, 2.0, 0.0), double(0.2, 1.0, -1.0, 0.5, -0.3)


def fitted(loss, beta):
    """Returns h of each response where the loss over all pairs, each as often as people who follow the rewards
    have it, is least.
    """
    logits = REF_LOGITS.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=1200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    win, lose = torch.tensor(list(itertools.permutations(range(len(REWARDS)), 2))).T
    share = torch.sigmoid(REWARDS[win] - REWARDS[lose])

    def closure():
        optimizer.zero_grad()
        h = logits.log_softmax(0) - REF_LOGITS.log_softmax(0)
        total = (share * dpo.preference_loss(h[win], h[lose], loss, beta)).sum()
        total.backward()
        return total

    optimizer.step(closure)
    return (logits.log_softmax(0) - REF_LOGITS.log_softmax(0)).detach()


def test_dpo_and_ipo_end_at_the_closed_forms_of_their_papers():
    """DPO at pi_ref exp(r / beta) / Z. IPO at h_i - h_j = (p_i - p_j) / beta, where p_i is how often i wins
    against a response drawn evenly.
    """
    expected = (REF_LOGITS + REWARDS / 0.7).log_softmax(0)
    found = fitted("dpo", 0.7) + REF_LOGITS.log_softmax(0)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, REF_LOGITS.log_softmax(0), atol=0.1)
    wins = torch.sigmoid(REWARDS[:, None] - REWARDS[None]).mean(1)
    h = fitted("ipo", 0.7)
    assert torch.allclose(h - h[0], (wins - wins[0]) / 0.7, atol=1e-6)


# === Log-ratios ===================================================================================
@torch.no_grad()
def test_log_ratios_are_those_of_each_text_alone():
    policy, ref_policy = tiny_lm(), tiny_lm(1)
    texts = [(([2, 3], [4, 1]), ([2, 3], [5, 6, 7, 1])), (([8], [9, 9, 1]), ([8], [1]))]

    def alone(model, text):
        prompt_ids, response_ids = text
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0].log_softmax(-1)
        return sum(logits[len(prompt_ids) - 1 + t, id] for t, id in enumerate(response_ids))

    ratios = torch.stack(dpo.log_ratios(policy, texts, dpo.all_logprobs(ref_policy, texts, 1)), 1)
    by_hand = [[alone(policy, text) - alone(ref_policy, text) for text in pair] for pair in texts]
    assert torch.allclose(ratios, torch.tensor(by_hand), atol=1e-4) and ratios.abs().min() > 1e-2


@torch.no_grad()
def test_the_reference_point_is_a_mean_over_responses_to_other_prompts_and_never_below_0():
    policy, ref_policy = tiny_lm(), tiny_lm(1)
    pairs = [(([i], [i + 3, 1]), ([i], [i + 4, i + 5, 1])) for i in range(2, 7)]
    texts = dpo.with_unrelated(pairs, 0)
    for i, (chosen, rejected, (prompt_ids, response_ids)) in enumerate(texts):
        others = [pair for j, pair in enumerate(pairs) if j != i]
        assert (chosen, rejected) == pairs[i] and prompt_ids == [i + 2]
        assert response_ids in [ids for pair in others for _, ids in pair]
    refs, own = dpo.all_logprobs(ref_policy, texts, 3), dpo.all_logprobs(policy, texts, 3)
    mean = (own - refs)[:, 2].mean().item()
    points = [dpo.reference_point(policy, texts, refs, 2), dpo.reference_point(ref_policy, texts, own, 2)]
    assert points == pytest.approx([max(0, mean), max(0, -mean)], abs=1e-5) and abs(mean) > 0.1
    with pytest.raises(common.UserError, match="two pairs and two held-out ones"):
        dpo.with_unrelated(pairs[:1], 0)


# === The stage ====================================================================================
@pytest.mark.parametrize("loss, start, more", [
    ("dpo", math.log(2), ["--lora-rank", 4]), ("ipo", 1 / (4 * 0.1**2), []), ("kto", 0.5, []),
])
def test_a_run_starts_at_the_reference_and_learns_and_micro_batches_change_nothing(
    loss, start, more, world, tmp_path, run_stage
):
    if more:
        pytest.importorskip("peft")
    logs = []
    for size in (8, 3):
        output = ["--loss", loss, "--microbatch-size", size, "--output", tmp_path / f"{size}"]
        status, out, err = run_stage(dpo, *flags_of(world, *output, *more))
        assert status == 0 and ("M trained" in out) == bool(more), err
        logs.append(read_rows(tmp_path / f"{size}" / "metrics.jsonl"))
    rows, other = [[row for row in log if "split" not in row] for log in logs]
    assert rows[0]["loss"] == pytest.approx(start, rel=1e-4) and len(rows) == 6
    for row, again in zip(rows, other):
        for key in ("loss", "grad_norm", *["reference_point"] * (loss == "kto")):
            assert row[key] == pytest.approx(again[key], rel=2e-3, abs=1e-4)
        assert (row["reference_point"] is None) == (loss != "kto")
    last = [row for row in logs[0] if row.get("split") == "pairs"][-1]
    assert last["iteration"] == 6 and last["loss"] < start and last["accuracy"] > 0.8
    assert last["chosen_log_ratio"] > last["rejected_log_ratio"]
    assert "log-ratios chosen" in out and "true reward" not in out
    assert not (tmp_path / "8" / "samples.jsonl").exists()
    assert (tmp_path / "8" / "adapter").is_dir() == bool(more)
    common.load_causal_lm(str(tmp_path / "8"), common.load_tokenizer(str(tmp_path / "8")))


@pytest.mark.parametrize("loss, step", [("kto", 4), ("dpo", "end")])
def test_a_run_with_a_judge_resumes_bit_for_bit_also_between_last_checkpoint_and_end(
    loss, step, spec, world, tmp_path, run_stage, monkeypatch
):
    whole = []  # rows without a prompt of their own
    for row in read_rows(world / "pairs.jsonl"):
        whole.append({key: row["prompt"] + row[key] for key in ("chosen", "rejected")})
    flags = flags_of(world, "--loss", loss, "--judge", spec, "--eval-prompts", world / "prompts.jsonl")
    flags += ["--eval-data", write_rows(tmp_path / "whole.jsonl", whole)]
    status, out, err = run_stage(dpo, *flags, "--output", tmp_path / "whole")
    assert status == 0, err
    evals = [row for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if row.get("split") == "eval"]
    assert [row["iteration"] for row in evals] == [0, 3, 6] and evals[0]["kl"] == 0 and evals[-1]["kl"] != 0
    for row in read_rows(tmp_path / "whole" / "samples.jsonl"):
        assert row["true_reward"] == len(row["response"]) and row["prompt"]
    clip, calls = dpo.clip_grad_norm_, []

    def crash(*arguments):
        calls.append(None)
        if step == "end" or len(calls) == step:
            raise ZeroDivisionError
        return clip(*arguments)

    where = (harness.Run, "finish") if step == "end" else (dpo, "clip_grad_norm_")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(*where, crash)
        run_stage(dpo, *flags, "--output", tmp_path / "parts")
    status, resumed, err = run_stage(dpo, "--resume", "--output", tmp_path / "parts")
    assert status == 0 and f"resumed after {6 if step == 'end' else 2} iterations" in resumed, err
    result = out[out.index("held-out pairs: accuracy") : out.index("\nwrote")]
    assert result in resumed and "true reward" in result
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


SAME = {"prompt": "A fox", "chosen": " runs.", "rejected": " runs."}


@pytest.mark.parametrize("row, more, message", [
    (SAME, [], "none can be used"), ({"prompt": "A fox", "chosen": " runs."}, [], "line 1 has the keys"),
    (SAME, ["--beta", 0], "--beta is 0"), (SAME, ["--eval-prompts", "nowhere.jsonl"], "name both"),
    (SAME, ["--loss", "rpo"], "invalid choice"),
])
def test_bad_input_is_refused_in_one_line(row, more, message, world, tmp_path, run_stage):
    data = write_rows(tmp_path / "rows.jsonl", [row] * 30)
    status, _, err = run_stage(dpo, *flags_of(world, "--data", data, *more, "--output", tmp_path / "out"))
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


# === Best of n ====================================================================================
def test_the_best_of_n_is_the_mean_over_all_sets_of_n():
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    for n, row in itertools.product((1, 2, 4, 6), range(3)):
        best = [max(some, key=scores[row].__getitem__) for some in itertools.combinations(range(6), n)]
        expected = statistics.fmean(values[row, i].item() for i in best)
        assert best_of_n.best_of(scores, values, n)[row].item() == pytest.approx(expected, rel=1e-12)


def test_the_kl_of_best_of_n_is_at_most_its_bound_and_near_it_for_many_outcomes():
    for number, n in ((3, 4), (5, 2), (4000, 8)):
        pi = torch.rand(number, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
        pi = pi / pi.sum()  # outcome i has score i
        cumulated = pi.cumsum(0)
        best = cumulated**n - (cumulated - pi).clamp(min=0) ** n  # the greatest of n draws
        kl, bound = (best * (best / pi).log()).sum().item(), best_of_n.kl_bound(n)
        assert kl <= bound and (number < 100 or kl > bound - 0.01)
    assert best_of_n.kl_bound(1) == 0


def test_the_best_response_by_score_is_written_and_the_table_has_n_itself(spec, world, tmp_path, run_stage):
    asked = [row | {"topic": "animals"} for row in read_rows(world / "prompts.jsonl")]
    flags = ["--policy", world / "sft", "--reward", spec, "--judge", spec, "--n", 3, "--batch-size", 10]
    flags += ["--prompts", write_rows(tmp_path / "mine.jsonl", asked)]
    flags += ["--response-length", 6, "--device", "cpu", "--output", tmp_path / "best.jsonl"]
    status, out, err = run_stage(best_of_n, *flags)
    assert status == 0, err
    rows = read_rows(tmp_path / "best.jsonl")
    for row, given in zip(rows, asked, strict=True):
        assert row == given | {"completion": row["completion"], "score": len(row["completion"])}
    table = [line.split() for line in out.split("true reward")[1].splitlines()[1:4]]
    assert [row[0] for row in table] == ["1", "2", "3"]
    assert float(table[0][2]) < float(table[1][2]) < float(table[2][2])
    mean = statistics.fmean(row["score"] for row in rows)
    assert float(table[2][2]) == pytest.approx(mean, abs=1e-3) and table[2][2] == table[2][3]


@pytest.mark.parametrize("more, message", [
    (["--output", "{tmp}"], "Is a directory"),  # before it samples
    (["--output", "{tmp}/mine.jsonl"], "would replace --prompts"),
    (["--reward", "{tmp}/mine.py:fail", "{tmp}/mine.py:fail"], "names one twice"),
    ([], "start it with python"),
])
def test_best_of_n_is_refused_before_it_samples_and_replaces_no_input(
    more, message, world, tmp_path, run_stage, monkeypatch
):
    (tmp_path / "mine.py").write_text("def fail(prompts, responses, rows):\n    raise ValueError\n")
    prompts = shutil.copy(world / "prompts.jsonl", tmp_path / "mine.jsonl")
    monkeypatch.setattr(harness, "IS_TORCHRUN", not more)
    flags = ["--policy", world / "sft", "--reward", f"{tmp_path / 'mine.py'}:fail", "--device", "cpu"]
    flags += ["--prompts", prompts, "--response-length", 6, "--output", tmp_path / "best.jsonl"]
    status, _, err = run_stage(best_of_n, *flags, *[word.format(tmp=tmp_path) for word in more])
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "best.jsonl").exists()
    assert read_rows(prompts) == read_rows(world / "prompts.jsonl")


# === The comparison ===============================================================================
@pytest.fixture
def small(spec, world, tmp_path):
    """A world with a seed's folder whose SFT policy and reward model are the tests'."""
    work = tmp_path / "work"
    for name in ("sft", "reward_model"):
        shutil.copytree(world / name, work / "seed0" / name)
    for name in ("heldout", "choice", "pair"):
        write_rows(work / f"{name}_prompts.jsonl", read_rows(world / "prompts.jsonl")[:6])
    return compare.World(work, spec, 6, makes_pairs=True, best_of=4)


def test_every_command_of_the_comparison_is_one_that_its_script_takes(small):
    folders = set()
    for name, method in compare.METHODS.items():
        for coefficient in method.coefficients:
            job = compare.job_of(small, small.data, 0, name, coefficient, evaluates=False)
            script = dpo if job["command"][0] == compare.DPO else ppo
            cfg = harness.parse_args(script.Config, "", job["command"][1:])
            assert getattr(cfg, method.flag[2:].replace("-", "_")) == coefficient
            assert cfg.policy == str(small.data / "seed0" / "sft") and job["folder"] not in folders
            folders.add(job["folder"])


def test_the_stories_are_cut_after_two_sentences_and_its_runs_get_their_flags(tmp_path):
    completion = ' He said "Hi {}!" Then he slept. The end.'
    rows = [{"prompt": f"Tom {i} ran.", "completion": completion.format(i)} for i in range(600)]
    rows += [*rows[:5], {"prompt": "No end", "completion": "..."}]
    world = compare.story_world(tmp_path, "MODEL", write_rows(tmp_path / "stories.jsonl", rows))
    prompts = {}
    for name in ("heldout_prompts", "choice_prompts", "pair_prompts", "demonstrations"):
        prompts[name] = {row["prompt"] for row in read_rows(tmp_path / f"{name}.jsonl")}
    assert prompts.pop("demonstrations") == prompts["pair_prompts"]
    assert len(prompts["heldout_prompts"]) == len(prompts["choice_prompts"]) == 256
    assert len(set().union(*prompts.values())) == sum(map(len, prompts.values()))
    for row in read_rows(tmp_path / "demonstrations.jsonl"):
        assert row["completion"].endswith('!" Then he slept.') or row["prompt"] == "No end"
    command = compare.first_jobs(world, tmp_path, 0)[0]["command"]
    assert command[1:4] == ["--model", "MODEL", "--data"]
    for name, script in (("PPO", ppo), ("RLOO", ppo), ("DPO", dpo), ("KTO", dpo)):
        command = compare.job_of(world, tmp_path, 0, name, 0.5)["command"]
        cfg = harness.parse_args(script.Config, "", command[1:])
        assert cfg.lr == 1e-4 and cfg.response_length == 96 and cfg.judge == world.judge
        assert cfg.eval_prompts == [str(tmp_path / "heldout_prompts.jsonl")]


def test_a_policy_is_measured_once_and_pairs_of_its_samples_are_rated_by_the_judge(small, monkeypatch):
    jobs = {job["folder"].name: job for job in compare.first_jobs(small, small.data, 0)}
    result = compare.run_job(jobs["sft_measured"])
    assert result["heldout"]["kl"] == 0  # the SFT policy is its own reference
    assert {*result["heldout"]} == {"true_reward", "score", "kl", "words", "different"}
    assert compare.run_job(jobs["sft_measured"] | {"measure": None}) == result  # not done again
    rows = compare.run_job(jobs["best_of_n"])["best_of"]
    assert [row["n"] for row in rows] == [1, 2, 4] and rows[0]["kl"] == 0
    assert rows[0]["score"] < rows[1]["score"] < rows[2]["score"]
    compare.run_job(jobs["pairs"])
    pairs = read_rows(small.data / "seed0" / "pairs.jsonl")
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in pairs]
    assert len(pairs) > 6 and 0 not in gaps and sum(gap > 0 for gap in gaps) > 0.7 * len(gaps)


def test_the_prompts_for_the_choice_are_in_no_file_of_the_world(tmp_path):
    compare.embedded_world(tmp_path)
    chosen = {row["prompt"] for row in read_rows(tmp_path / "choice_prompts.jsonl")}
    for path in (ROOT / "data").glob("*.jsonl"):
        assert not chosen & {row["prompt"] for row in read_rows(path)}
    assert len(chosen) == 256


def test_the_coefficient_is_chosen_by_the_true_reward_on_the_prompts_for_the_choice():
    results = {}
    for (i, c), seed in itertools.product(enumerate(compare.METHODS["KTO"].coefficients), (0, 1)):
        choice = (0.5, 2.0)[seed] if i == 1 else 1.0
        results["KTO", c, seed] = {"choice": {"true_reward": choice}, "heldout": {"true_reward": 5.0 - 5 * (i == 1)}}
    assert compare.choose(results, "KTO", (0, 1)) == compare.METHODS["KTO"].coefficients[1]


def fake_run(kl):
    held_out = {"true_reward": 1 + kl / 4, "score": kl / 3, "kl": kl, "different": 0.5}
    return {"heldout": held_out, "cpu_seconds": 30.0, "peak_memory_gb": 0.5}


def test_the_table_has_the_chosen_coefficient_with_its_spread():
    runs = {"0.1": dict(zip("012", map(fake_run, (3.0, 3.5, 3.2)))), "0.3": dict(zip("01", map(fake_run, (1.0, 1.1))))}
    methods = {"PPO": {"flag": "--kl-coef", "chosen": 0.1, "runs": runs}}
    best = [{"n": 2**i, "kl": best_of_n.kl_bound(2**i), "score": i / 4, "true_reward": 1 + i / 4} for i in range(9)]
    result = {"methods": methods, "best_of_n": {"0": best, "1": best}, "sft": {"0": fake_run(0.0), "1": fake_run(0.0)}}
    lines = compare.table(result) + compare.sweep_table(result)
    for line in (
        "PPO | `--kl-coef 0.1` | 1.81 ± 0.06 | 3.23 ± 0.25 | 1.08 ± 0.08 | 0.50 ± 0.00 | 30 | 0.50 | 3",
        "best of n | n = 4 | 1.50 ± 0.00 | at most 0.64 | 0.50 ± 0.00 |  |  |  | 2",
        "PPO | `--kl-coef 0.3` | 1.26 ± 0.02 | 1.05 ± 0.07 | 0.35 ± 0.02 | 0.50 ± 0.00 | 2",
        "PPO | `--kl-coef 0.1` | 1.81 ± 0.09 | 3.25 ± 0.35 | 1.08 ± 0.12 | 0.50 ± 0.00 | 2",  # without seed 2
    ):
        assert f"| {line} |" in lines
    assert compare.spread([1.5]) == "1.50"  # one value has no spread


def test_the_cost_of_the_run_that_the_readme_names_is_on_the_page_and_in_the_results():
    path = ROOT / "docs" / "results" / "beside_ppo_stories.json"
    run = json.loads(path.read_text(encoding="utf-8"))["methods"]["PPO"]["runs"]["0.15"]["0"]
    seconds, memory = f"{run['cpu_seconds']:.0f} CPU seconds", f"{run['peak_memory_gb']:.2f} GB"
    assert f"with `--kl-coef 0.15` took {seconds} and {memory}" in " ".join(PAGE.split())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| {seconds} | {memory} |" in readme
    reached = [f"{run['heldout'][key]:.2f}" for key in ("true_reward", "kl")]
    assert f"→ {reached[0]} at a KL of {reached[1]} nats" in readme


@pytest.mark.parametrize("name", ["beside_ppo", "beside_ppo_stories"])
def test_the_tables_of_the_page_are_those_of_the_results_and_the_picture_is_drawn(name, tmp_path):
    result = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    for line in compare.table(result) + compare.sweep_table(result):
        assert line in PAGE
    pytest.importorskip("matplotlib")
    compare.draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_what_the_page_says_of_minibatches_on_the_story_model_is_in_the_results():
    runs = json.loads((ROOT / "docs" / "results" / "minibatches_stories.json").read_text())["runs"]
    small, large = runs["--minibatch-size 16"], runs["--minibatch-size 32"]
    for key in ("true_reward", "kl"):
        gains = [small[seed]["heldout"][key] - large[seed]["heldout"][key] for seed in large]
        assert f"{statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}" in PAGE
    assert len(large) == len(small) == 3


def test_what_the_page_says_of_the_runs_that_were_measured_later_is_in_the_results():
    results = json.loads((ROOT / "docs" / "results" / "beside_ppo_more.json").read_text(encoding="utf-8"))
    [page] = re.findall(r"### Measured later\n(.*?)\n## ", PAGE, re.S)
    page = " ".join(page.split())
    ratio = results["embedded world"]["KL in the loss, times the ratio"]
    alone = results["embedded world"]["KL in the loss"]["0.3"]["0"]["heldout"]["true_reward"]
    assert f"reached {alone:.2f} there" in page

    def of(runs, key, digits=2, spread=True):
        values = [run["heldout"][key] for run in runs]
        text = f"{statistics.mean(values):.{digits}f}"
        return text + (f" ± {statistics.stdev(values):.{digits}f}" if spread else "")

    for c in ("0.1", "0.3"):
        two, five = [ratio[c][seed] for seed in "01"], list(ratio[c].values())
        assert f"{of(two, 'true_reward', spread=False)} at {of(two, 'kl', 1, False)} nats with β = {c}" in page
        assert f"{of(five, 'true_reward')} at {of(five, 'kl', 1, False)} nats with β = {c}" in page and len(five) == 5
    stories = results["stories"]
    for name, c in (("GRPO", "0.03"), ("RLOO", "0.05")):
        runs = list(stories[name][c].values())
        assert f"{of(runs, 'true_reward')} at {of(runs, 'kl', 1)} nats in {of(runs, 'words', 0, False)} words" in page
        assert f"{name} with β = {c}" in page and len(runs) == 3
    first = json.loads((ROOT / "docs" / "results" / "beside_ppo_stories.json").read_text())["methods"]
    for name, c in (("PPO", "0.05"), ("KL in the loss", "0.1"), ("DPO", "0.03"), ("IPO", "0.01"), ("KTO", "0.03")):
        runs = [first[name]["runs"][c]["0"], *stories[name][c].values()]
        cells = f"{of(runs, 'true_reward')} | {of(runs, 'kl')} | {of(runs, 'words', 0, False)}"
        assert f"| {name} | {c} | {cells} |" in page and len(runs) == 3
    best = max(stories["GRPO"], key=lambda c: stories["GRPO"][c].get("0")["choice"]["true_reward"])
    assert best == "0.03" and len(stories["GRPO"]) == 4
    for name, c in (("GRPO", "0.1"), ("GRPO", "0.3"), ("RLOO", "0.05")):
        run = [stories[name][c]["0"]]
        assert f"{of(run, 'true_reward', spread=False)} at {of(run, 'kl', 1, False)}" in page


def test_the_row_with_the_ratio_differs_from_the_fork_by_that_factor_alone(tmp_path):
    method = compare.METHODS["KL in the loss, times the ratio"]
    patch = ROOT / "examples" / "forks" / f"{method.fork}.patch"
    scripts = []
    for name, edit in (("without", ()), ("with", method.edit)):
        project = compare.forked(tmp_path / name, patch, edit)
        scripts.append((project / "ppo.py").read_text(encoding="utf-8").splitlines())
    [(plain, times_ratio)] = [lines for lines in zip(*scripts, strict=True) if lines[0] != lines[1]]
    assert plain.strip() == "+ kl_coef * k3.sum() / num_tokens"
    assert times_ratio.strip() == "+ kl_coef * (ratio * k3).sum() / num_tokens"
    with pytest.raises(AssertionError):
        compare.forked(tmp_path, patch, ("a text that is not there", ""))
