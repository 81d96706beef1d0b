"""examples/beside_ppo: the losses by hand and by enumeration, the stage like the others, best of n, the comparison."""

import dataclasses
import itertools
import json
import math
import pathlib
import shutil
import statistics
import sys

import pytest
import torch
from conftest import PREFERENCES, ROOT, read_rows, tiny_lm, write_rows
from test_resume import contents, interrupt

sys.path.append(str(ROOT / "examples" / "beside_ppo"))
import best_of_n  # noqa: E402
import compare  # noqa: E402
import dpo  # noqa: E402

import common  # noqa: E402
import ppo  # noqa: E402
from plumbing import cli, processes  # noqa: E402

sigma = lambda x: 1 / (1 + math.exp(-x))
double = lambda *values: torch.tensor(values, dtype=torch.float64)


def flags_of(world, *more):
    return ["--policy", world / "sft", "--data", world / "pairs.jsonl", "--eval-data", world / "pairs.jsonl", "--batch-size", 8, "--epochs", 2,
            "--response-length", 20, "--lr", 1e-3, "--save-every", 2, "--eval-every", 3, "--device", "cpu", *more]


# === Losses =======================================================================================
def test_the_losses_by_hand():
    chosen, rejected, beta, z = double(1.0, -2.0), double(-0.5, 0.25), 0.4, 0.3
    assert dpo.dpo_loss(chosen, rejected, beta, z).tolist() == pytest.approx([-math.log(sigma(0.6)), -math.log(sigma(-0.9))], rel=1e-12)
    assert dpo.ipo_loss(chosen, rejected, beta, z).tolist() == pytest.approx([0.25**2, 3.5**2], rel=1e-12)
    by_hand = [1 - (sigma(0.4 * 0.7) + sigma(0.4 * 0.8)) / 2, 1 - (sigma(0.4 * -2.3) + sigma(0.4 * 0.05)) / 2]
    assert dpo.kto_loss(chosen, rejected, beta, z).tolist() == pytest.approx(by_hand, rel=1e-12)


def fitted(loss, rewards, ref_logits, beta):
    """h of each response, where the loss over all pairs of responses, each as often as people who follow the rewards have it, is least."""
    logits = ref_logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=400, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe")
    pairs = list(itertools.permutations(range(len(rewards)), 2))
    win, lose = (torch.tensor(side) for side in zip(*pairs))
    share = torch.sigmoid(rewards[win] - rewards[lose])

    def closure():
        optimizer.zero_grad()
        h = logits.log_softmax(0) - ref_logits.log_softmax(0)
        total = (share * loss(h[win], h[lose], beta, 0.0)).sum()
        total.backward()
        return total

    for _ in range(3):
        optimizer.step(closure)
    return (logits.log_softmax(0) - ref_logits.log_softmax(0)).detach()


def test_dpo_ends_at_the_policy_that_is_best_for_reward_less_kl():
    rewards, ref_logits, beta = double(1.0, -0.5, 0.3, 2.0, 0.0), double(0.2, 1.0, -1.0, 0.5, -0.3), 0.7
    expected = (ref_logits + rewards / beta).log_softmax(0)  # pi_ref exp(r / beta) / Z
    found = fitted(dpo.dpo_loss, rewards, ref_logits, beta) + ref_logits.log_softmax(0)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, ref_logits.log_softmax(0), atol=0.1)


def test_ipo_ends_at_the_closed_form_of_its_paper():
    """h_i - h_j = (p_i - p_j) / beta, where p_i is how often i wins against a response drawn evenly."""
    rewards, ref_logits, beta = double(1.0, -0.5, 0.3, 2.0, 0.0), double(0.2, 1.0, -1.0, 0.5, -0.3), 0.7
    wins = torch.sigmoid(rewards[:, None] - rewards[None]).mean(1)
    h = fitted(dpo.ipo_loss, rewards, ref_logits, beta)
    assert torch.allclose(h - h[0], (wins - wins[0]) / beta, atol=1e-6)


def test_a_pair_that_is_far_from_the_reference_point_moves_little_in_kto_and_much_in_ipo():
    h = double(0.0, 30.0).requires_grad_()
    [grad] = torch.autograd.grad(dpo.kto_loss(h, h.detach() * 0, 0.5, 0.0).sum(), h)
    assert grad[0] == pytest.approx(-0.5 * 0.25 / 2) and abs(grad[1]) < 1e-6
    [grad] = torch.autograd.grad(dpo.ipo_loss(h, h.detach() * 0, 0.5, 0.0).sum(), h)
    assert grad[0] == pytest.approx(-2) and grad[1] == pytest.approx(58)


# === Log-ratios ===================================================================================
def test_the_probabilities_of_all_responses_of_two_tokens_add_up_to_one():
    model = tiny_lm(vocab_size=6)
    with torch.no_grad():
        texts = [([2, 3, 4], list(pair)) for pair in itertools.product(range(6), repeat=2)]
        texts += [([5], list(pair)) for pair in itertools.product(range(6), repeat=2)]
        probabilities = dpo.response_logprobs(model, texts, 0).exp()
    assert probabilities[:36].sum() == pytest.approx(1, abs=1e-5) and probabilities[36:].sum() == pytest.approx(1, abs=1e-5)
    assert probabilities[:36].std() > 1e-3


def test_log_ratios_are_those_of_each_text_alone(world):
    policy, ref_policy = tiny_lm(), tiny_lm(1)
    texts = [(([2, 3], [4, 1]), ([2, 3], [5, 6, 7, 1])), (([8], [9, 9, 1]), ([8], [1]))]

    def alone(model, prompt_ids, response_ids):
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0].log_softmax(-1)
        return sum(logits[len(prompt_ids) - 1 + t, id] for t, id in enumerate(response_ids))

    with torch.no_grad():
        refs = dpo.all_logprobs(ref_policy, texts, 1, 0, None)
        chosen, rejected = dpo.log_ratios(policy, texts, refs, 0)
        for i, (one, other) in enumerate(texts):
            assert chosen[i] == pytest.approx((alone(policy, *one) - alone(ref_policy, *one)).item(), abs=1e-4)
            assert rejected[i] == pytest.approx((alone(policy, *other) - alone(ref_policy, *other)).item(), abs=1e-4)
    assert chosen.abs().min() > 1e-2


def test_the_reference_point_is_a_mean_over_responses_to_other_prompts_and_never_below_0():
    policy, ref_policy, cfg = tiny_lm(), tiny_lm(1), dpo.Config(microbatch_size=2)
    pairs = [(([i], [i + 3, 1]), ([i], [i + 4, i + 5, 1])) for i in range(2, 7)]
    texts = dpo.with_unrelated(pairs, 0)
    for i, (chosen, rejected, (prompt_ids, response_ids)) in enumerate(texts):
        assert (chosen, rejected) == pairs[i] and prompt_ids == [i + 2]
        assert response_ids in [ids for j, pair in enumerate(pairs) if j != i for _, ids in pair]
    with torch.no_grad():
        refs = dpo.all_logprobs(ref_policy, texts, 3, 0, None)
        own = dpo.all_logprobs(policy, texts, 3, 0, None)
        mean = (own - refs)[:, 2].mean().item()
        swapped = dpo.reference_point(ref_policy, texts, own, cfg, 0)
    point = dpo.reference_point(policy, texts, refs, cfg, 0)
    assert [point, swapped] == pytest.approx([max(0, mean), max(0, -mean)], abs=1e-5) and abs(mean) > 0.1
    with pytest.raises(common.UserError, match="two pairs and two held-out ones"):
        dpo.with_unrelated(pairs[:1], 0)


# === The stage ====================================================================================
@pytest.mark.parametrize("loss, start", [("dpo", math.log(2)), ("ipo", 1 / (4 * 0.1**2)), ("kto", 0.5)])
def test_a_run_starts_at_the_reference_prefers_more_chosen_texts_and_no_micro_batch_changes_it(loss, start, world, tmp_path, run_stage):
    logs = []
    for size in (8, 3):
        status, out, err = run_stage(dpo, *flags_of(world, "--loss", loss, "--microbatch-size", size, "--output", tmp_path / f"{size}"))
        assert status == 0, err
        logs.append(read_rows(tmp_path / f"{size}" / "metrics.jsonl"))
    rows, other = ([row for row in log if "split" not in row] for log in logs)
    assert rows[0]["loss"] == pytest.approx(start, rel=1e-4) and len(rows) == 6
    for row, again in zip(rows, other):
        keys = ["loss", "grad_norm"] + ["reference_point"] * (loss == "kto")
        assert [row[key] for key in keys] == pytest.approx([again[key] for key in keys], rel=2e-3, abs=1e-4)
        assert (row["reference_point"] is None) == (loss != "kto")
    held_out = [row for row in logs[0] if row.get("split") == "pairs"]
    assert held_out[-1]["iteration"] == 6 and held_out[-1]["loss"] < start and held_out[-1]["accuracy"] > 0.8
    assert held_out[-1]["chosen_log_ratio"] > held_out[-1]["rejected_log_ratio"]
    assert "log-ratios chosen" in out and "true reward" not in out and not (tmp_path / "8" / "samples.jsonl").exists()
    common.load_causal_lm(str(tmp_path / "8"), common.load_tokenizer(str(tmp_path / "8")))


def test_a_judge_sees_what_the_policy_answers_and_the_kl_starts_at_0(world, tmp_path, run_stage):
    (tmp_path / "mine.py").write_text("def length(prompts, responses, rows):\n    return [float(len(response)) for response in responses]\n")
    rows = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PREFERENCES]  # without a prompt of their own
    write_rows(tmp_path / "whole.jsonl", rows)
    status, out, err = run_stage(dpo, *flags_of(world, "--judge", f"{tmp_path / 'mine.py'}:length", "--eval-data", tmp_path / "whole.jsonl", "--output", tmp_path / "out"))
    assert status == 0, err
    seen = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if row.get("split") == "eval"]
    assert [row["iteration"] for row in seen] == [0, 3, 6] and seen[0]["kl"] == 0 and seen[-1]["kl"] != 0
    samples = read_rows(tmp_path / "out" / "samples.jsonl")
    assert all(row["true_reward"] == len(row["response"]) and row["prompt"] for row in samples) and "true reward" in out


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_run_that_stops_and_resumes_equals_one_that_does_not_bit_for_bit(loss, world, tmp_path, run_stage, monkeypatch):
    (tmp_path / "mine.py").write_text("def one(prompts, responses, rows):\n    return [1.0] * len(rows)\n")
    flags = flags_of(world, "--loss", loss, "--judge", f"{tmp_path / 'mine.py'}:one", "--eval-prompts", world / "prompts.jsonl")
    assert run_stage(dpo, *flags, "--output", tmp_path / "whole")[0] == 0

    def crash():
        raise RuntimeError("crash")

    undo = interrupt(monkeypatch, dpo, 4, crash)
    with pytest.raises(RuntimeError, match="crash"):
        run_stage(dpo, *flags, "--output", tmp_path / "parts")
    undo()
    status, out, err = run_stage(dpo, "--resume", "--output", tmp_path / "parts")
    assert status == 0 and "resumed after 2 iterations" in out, err
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_run_that_is_killed_between_its_last_checkpoint_and_its_end_says_its_result_when_it_resumes(world, tmp_path, run_stage, monkeypatch):
    (tmp_path / "mine.py").write_text("def length(prompts, responses, rows):\n    return [float(len(response)) for response in responses]\n")
    flags = flags_of(world, "--judge", f"{tmp_path / 'mine.py'}:length")
    whole = run_stage(dpo, *flags, "--output", tmp_path / "whole")

    def crash(run):
        raise RuntimeError("crash")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        patch.setattr(dpo.Run, "finish", crash)
        run_stage(dpo, *flags, "--output", tmp_path / "parts")
    status, out, err = run_stage(dpo, "--resume", "--output", tmp_path / "parts")
    result = lambda out: out[out.index("held-out pairs: accuracy") : out.index("\nwrote")]
    assert status == 0 and "resumed after 6 iterations" in out and result(out) == result(whole[1]), err
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_adapters_alone_are_trained(world, tmp_path, run_stage):
    pytest.importorskip("peft")
    status, out, err = run_stage(dpo, *flags_of(world, "--lora-rank", 4, "--output", tmp_path / "out"))
    assert status == 0 and "M trained" in out, err
    assert (tmp_path / "out" / "adapter").is_dir() and read_rows(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("rows, more, message", [
    ([{"prompt": "A fox", "chosen": " runs.", "rejected": " runs."}] * 30, [], "none can be used"),
    ([{"prompt": "A fox", "chosen": " runs."}] * 30, [], "line 1 has the keys"),
    (None, ["--beta", 0], "--beta is 0"),
    (None, ["--beta", "inf"], "--beta is inf"),
    (None, ["--eval-prompts", "nowhere.jsonl"], "name one with --judge"),
    (None, ["--loss", "rpo"], "invalid choice"),
    (None, ["--judge", "nowhere.py:f"], "no file 'nowhere.py'"),
])
def test_bad_input_is_refused_in_one_line(rows, more, message, world, tmp_path, run_stage):
    data = ["--data", write_rows(tmp_path / "rows.jsonl", rows)] if rows else []
    status, _, err = run_stage(dpo, *flags_of(world, *data, *more, "--output", tmp_path / "out"))
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


# === Best of n ====================================================================================
def test_the_best_of_n_is_the_mean_over_all_sets_of_n():
    generator = torch.Generator().manual_seed(0)
    scores, values = (torch.rand(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    for n in (1, 2, 4, 6):
        sets = list(itertools.combinations(range(6), n))
        for row in range(3):
            best = [max(some, key=lambda i: scores[row, i]) for some in sets]
            expected = sum(values[row, i].item() for i in best) / len(sets)
            assert best_of_n.best_of(scores, values, n)[row].item() == pytest.approx(expected, rel=1e-12)


def test_the_kl_of_best_of_n_is_at_most_its_bound_and_near_it_for_many_outcomes():
    for number, n in ((3, 4), (5, 2), (4000, 8)):
        pi = torch.rand(number, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
        pi = pi / pi.sum()  # outcome i has score i
        cumulated = pi.cumsum(0)
        best = cumulated**n - (cumulated - pi).clamp(min=0) ** n  # the greatest of n draws
        kl = (best * (best / pi).log()).sum().item()
        assert kl <= best_of_n.kl_bound(n) and (number < 100 or kl > best_of_n.kl_bound(n) - 0.01)
    assert best_of_n.kl_bound(1) == 0


def test_the_best_response_by_score_is_written_for_each_prompt(world, tmp_path, run_stage):
    (tmp_path / "mine.py").write_text("def length(prompts, responses, rows):\n    return [float(len(response)) for response in responses]\n")
    spec = f"{tmp_path / 'mine.py'}:length"
    flags = ["--policy", world / "sft", "--reward", spec, "--judge", spec, "--prompts", world / "prompts.jsonl", "--n", 4, "--batch-size", 10, "--response-length", 6, "--device", "cpu"]
    status, out, err = run_stage(best_of_n, *flags, "--output", tmp_path / "best.jsonl")
    assert status == 0, err
    rows = read_rows(tmp_path / "best.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read_rows(world / "prompts.jsonl")]
    assert all(row["score"] == len(row["completion"]) for row in rows)
    table = [list(map(float, line.split())) for line in out.split("true reward")[1].splitlines()[1:4]]
    assert [row[0] for row in table] == [1, 2, 4] and table[0][2] < table[1][2] < table[2][2]
    assert table[2][2] == pytest.approx(sum(row["score"] for row in rows) / len(rows), abs=1e-3) and all(row[2] == row[3] for row in table)


@pytest.mark.parametrize("more, message", [
    (["--output", "{tmp}/mine.py/best.jsonl"], "can't write --output"),  # before a reward function that would fail
    (["--output", "{tmp}/mine.jsonl"], "would replace --prompts"),
    (["--reward", "{tmp}/mine.py:fail", "{tmp}/mine.py:fail"], "names one twice"),
    ([], "start it with python"),
])
def test_best_of_n_is_refused_before_it_samples_and_replaces_no_input(more, message, world, tmp_path, run_stage, monkeypatch):
    (tmp_path / "mine.py").write_text("def fail(prompts, responses, rows):\n    raise ValueError\n")
    prompts = shutil.copy(world / "prompts.jsonl", tmp_path / "mine.jsonl")
    monkeypatch.setattr(processes, "IS_TORCHRUN", not more)
    flags = ["--policy", world / "sft", "--reward", f"{tmp_path / 'mine.py'}:fail", "--prompts", prompts, "--response-length", 6, "--device", "cpu", "--output", tmp_path / "best.jsonl"]
    status, _, err = run_stage(best_of_n, *flags, *(word.format(tmp=tmp_path) for word in more))
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "best.jsonl").exists() and read_rows(prompts) == read_rows(world / "prompts.jsonl")


def test_the_table_has_a_row_for_n_itself_and_each_line_of_the_file_keeps_what_its_prompt_has(world, tmp_path, run_stage):
    (tmp_path / "mine.py").write_text("def length(prompts, responses, rows):\n    return [float(len(response)) for response in responses]\n")
    prompts = write_rows(tmp_path / "mine.jsonl", [{"prompt": "A fox meets", "topic": "animals"}] * 2)
    flags = ["--policy", world / "sft", "--reward", f"{tmp_path / 'mine.py'}:length", "--prompts", prompts, "--n", 3, "--response-length", 6, "--device", "cpu"]
    status, out, err = run_stage(best_of_n, *flags, "--output", tmp_path / "best.jsonl")
    assert status == 0, err
    rows = read_rows(tmp_path / "best.jsonl")
    assert [row.keys() for row in rows] == [{"prompt", "topic", "completion", "score"}] * 2
    table = [line.split() for line in out.split("true reward")[1].splitlines()[1:4]]
    assert [row[0] for row in table] == ["1", "2", "3"] and float(table[2][2]) == pytest.approx(sum(row["score"] for row in rows) / 2, abs=1e-3)


# === The comparison ===============================================================================
@pytest.fixture
def small(world, tmp_path):
    """A seed's folder whose SFT policy and reward model are the tests'."""
    work, folder = tmp_path / "work", tmp_path / "work" / "seed0"
    folder.mkdir(parents=True)
    for name in ("sft", "reward_model"):
        shutil.copytree(world / name, folder / name)
    for name in ("heldout", "choice", "pair"):
        write_rows(work / f"{name}_prompts.jsonl", read_rows(world / "prompts.jsonl")[:6])
    return compare.World(work, f"{ROOT / 'examples' / 'beside_ppo' / 'cheerful.py'}:cheerful", 6, makes_pairs=True), work, folder


def test_every_command_of_the_comparison_is_one_that_its_script_takes(small, tmp_path):
    world, work, _ = small
    for name, method in (compare.METHODS | compare.KNOBS).items():
        for coefficient in method.coefficients:
            job = compare.jobs_of(world, work, 0, name, coefficient, look=False)
            script = {"ppo.py": ppo, compare.DPO: dpo}[job["command"][0]]
            if method.fork:
                script = ppo  # flags of the fork itself are not given
            cfg = cli.parse_args(script.Config, "", job["command"][1:])
            cli.check_ranges(cfg)
            assert getattr(cfg, method.flag[2:].replace("-", "_")) == coefficient and cfg.policy == str(work / "seed0" / "sft")
    folders = [compare.jobs_of(world, work, 0, n, c)["folder"] for n, m in compare.ALL.items() for c in m.coefficients]
    assert len({*folders}) == len(folders)


def test_the_stories_are_cut_after_two_sentences_and_its_runs_get_their_flags(tmp_path):
    rows = [{"prompt": f"Tom {i} ran.", "completion": f' He said "Hi {i}!" Then he slept. The end.'} for i in range(600)]
    write_rows(tmp_path / "stories.jsonl", rows + rows[:5] + [{"prompt": "No end", "completion": "..."}])
    world = compare.story_world(tmp_path, "MODEL", str(tmp_path / "stories.jsonl"))
    held_out, choice, pair = ({row["prompt"] for row in read_rows(tmp_path / f"{name}_prompts.jsonl")} for name in ("heldout", "choice", "pair"))
    assert len(held_out) == len(choice) == 256 and not held_out & choice | held_out & pair | choice & pair
    demonstrations = {row["prompt"]: row["completion"] for row in read_rows(tmp_path / "demonstrations.jsonl")}
    assert demonstrations.keys() == pair and {text.count("Then he slept.") for text in demonstrations.values() if "Hi" in text} == {1}
    assert not any("The end" in text for text in demonstrations.values())
    [sft_job, *_] = compare.jobs_of(world, tmp_path, 0)
    assert sft_job["command"][1:5] == ["--model", "MODEL", "--data", str(tmp_path / "demonstrations.jsonl")]
    for name, script in (("PPO", ppo), ("RLOO", ppo), ("DPO", dpo), ("KTO", dpo)):
        cfg = cli.parse_args(script.Config, "", compare.jobs_of(world, tmp_path, 0, name, 0.5)["command"][1:])
        assert cfg.lr == 1e-4 and cfg.response_length == 96 and cfg.judge == world.judge and cfg.eval_prompts == [str(tmp_path / "heldout_prompts.jsonl")]


def test_a_policy_is_measured_once_and_the_sft_policy_is_its_own_reference(small, monkeypatch):
    world, work, folder = small
    *_, best, sft_job = compare.jobs_of(world, work, 0)
    result = compare.run_job(sft_job)
    assert result["heldout"]["kl"] == 0 and result["heldout"].keys() == {"true_reward", "score", "kl", "words", "different"}
    monkeypatch.setattr(compare, "measure", None)
    assert compare.run_job(sft_job) == json.loads(json.dumps(result))  # it is not done again
    rows = compare.run_job(best | {"world": dataclasses.replace(world, best_of=4)})["best_of"]
    assert [row["n"] for row in rows] == [1, 2, 4] and rows[0]["score"] < rows[1]["score"] < rows[2]["score"] and rows[0]["kl"] == 0


def test_pairs_of_own_samples_are_of_different_texts_and_the_judge_mostly_right(small, monkeypatch):
    world, work, folder = small
    (work / "judge.py").write_text("def length(prompts, responses, rows):\n    return [float(len(response)) for response in responses]\n")
    world = compare.World(work, f"{work / 'judge.py'}:length", 6, makes_pairs=True)
    [job] = [job for job in compare.jobs_of(world, work, 0) if job["kind"] == "pairs"]
    compare.run_job(job)
    pairs = read_rows(folder / "pairs.jsonl")
    assert len(pairs) > 6 and all(row["chosen"] != row["rejected"] for row in pairs)
    right = [len(row["chosen"]) > len(row["rejected"]) for row in pairs if len(row["chosen"]) != len(row["rejected"])]
    assert sum(right) > 0.7 * len(right)


def test_a_fork_is_the_project_with_the_patch(tmp_path):
    project = compare.forked(tmp_path, "rloo.patch")
    assert "samples_per_prompt" in (project / "ppo.py").read_text() and (project / "plumbing" / "runs.py").exists()
    assert "samples_per_prompt" not in (ROOT / "ppo.py").read_text()


def test_prompts_for_the_choice_of_coefficients_are_in_no_file_of_the_world(tmp_path):
    compare.embedded_world(tmp_path)
    chosen = {row["prompt"] for row in read_rows(tmp_path / "choice_prompts.jsonl")}
    used = {row["prompt"] for path in (ROOT / "data").glob("*.jsonl") for row in read_rows(path)}
    assert len(chosen) == 256 and not chosen & used


def test_the_coefficient_is_chosen_by_the_true_reward_on_the_prompts_for_the_choice():
    first, second, *others = compare.METHODS["KTO"].coefficients
    run = lambda choice, heldout: {"choice": {"true_reward": choice}, "heldout": {"true_reward": heldout}}
    results = {("KTO", c, seed): run(1.0, 5.0) for c in (first, *others) for seed in (0, 1)}
    results |= {("KTO", second, 0): run(0.5, 0.0), ("KTO", second, 1): run(2.0, 0.0)}
    assert compare.choose(results, "KTO", (0, 1)) == second


def fake_result():
    run = lambda kl: {"heldout": {"true_reward": 1 + kl / 4, "score": kl / 3, "kl": kl, "different": 0.5}, "cpu_seconds": 30.0, "peak_memory_gb": 0.5,
                      "curve": [{"kl": kl * i / 3, "true_reward": 1 + i / 9, "score": i / 5} for i in range(4)]}
    method = lambda flag: {"flag": flag, "chosen": 0.1, "runs": {"0.1": {"0": run(3.0), "1": run(3.5), "2": run(3.2)}, "0.3": {"0": run(1.0), "1": run(1.1)}}}
    best = [{"n": 2**i, "kl": best_of_n.kl_bound(2**i), "score": i / 4, "true_reward": 1 + i / 4} for i in range(9)]
    return {"methods": {"PPO": method("--kl-coef"), "DPO": method("--beta")}, "sft": {"0": run(0.0), "1": run(0.0)}, "best_of_n": {"0": best, "1": best},
            "stages": {"0": {"sft": run(0.0), "reward_model": run(0.0)}}}


def test_one_value_has_no_spread():
    assert compare.spread([1.5]) == "1.50" and compare.spread(x for x in (1.0, 3.0)) == "2.00 ± 1.41"


def test_the_table_has_the_chosen_coefficient_with_its_spread_and_the_picture_is_drawn(tmp_path):
    lines = compare.table(fake_result())
    assert "| DPO | `--beta 0.1` | 1.81 ± 0.06 | 3.23 ± 0.25 | 1.08 ± 0.08 | 0.50 ± 0.00 | 30 | 0.50 | 3 |" in lines
    assert "| best of n | n = 4 | 1.50 ± 0.00 | at most 0.64 | 0.50 ± 0.00 |  |  |  | 2 |" in lines
    assert "| PPO | `--kl-coef 0.3` | 1.26 ± 0.02 | 1.05 ± 0.07 | 0.35 ± 0.02 | 0.50 ± 0.00 | 2 |" in compare.sweep_table(fake_result())
    pytest.importorskip("matplotlib")
    compare.draw(fake_result(), tmp_path / "picture.png")
    assert pathlib.Path(tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["beside_ppo", "beside_ppo_stories"])
def test_the_tables_of_the_page_are_those_of_the_results(name):
    path = ROOT / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip("not measured")
    page, result = (ROOT / "examples" / "beside_ppo" / "README.md").read_text(encoding="utf-8"), json.loads(path.read_text(encoding="utf-8"))
    for line in compare.table(result) + compare.sweep_table(result):
        assert line in page


def test_the_page_has_the_knobs_that_were_measured():
    """Mean ± deviation of true reward, KL and score, the differences to best of n, and with five seeds those to the default, seed by seed."""
    page, result = (ROOT / "examples" / "beside_ppo" / "README.md").read_text(encoding="utf-8"), json.loads((ROOT / "results" / "ppo_knobs.json").read_text(encoding="utf-8"))
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.splitlines()]
    column = lambda seeds, key: [row[key] for row in seeds.values()]
    both = lambda x, sign="": f"{statistics.mean(x):{sign}.2f} ± {statistics.stdev(x):.2f}"
    for runs in (result["runs"], result.get("five_seeds", [])):
        for run in runs:
            seeds, default = run["seeds"], runs[0]["seeds"]
            cells = [both(column(seeds, key)) for key in ("true_reward", "kl", "score")]
            if len(seeds) == 5 and run is not runs[0]:
                cells += [both([x - y for x, y in zip(column(seeds, key), column(default, key))], "+") for key in ("true_reward", "kl")]
            elif len(seeds) == 5:
                cells += ["", ""]
            cells += [f"{statistics.mean(column(seeds, key)):+.2f}" for key in ("score_less_best_of_n", "true_less_best_of_n")]
            assert [run["flags"], *cells] in [row[: 1 + len(cells)] for row in rows], (run["flags"], cells)


def test_the_command_that_goes_on_names_the_script_as_it_was_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/beside_ppo/dpo.py", "--loss", "ipo"])
    assert cli.resume_command(dpo.Config(output="ckpt/ipo")) == "python examples/beside_ppo/dpo.py --resume --output ckpt/ipo"
