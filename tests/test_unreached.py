"""Refusals and cuts that no other test reaches, and the table of PPO's knobs against its file."""

import json
import statistics
import sys

import pytest
import torch
from conftest import ROOT
from test_cli import ppo_flags
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import ppo
import reward_model
import rewards
import sft

sys.path.append(str(ROOT / "examples" / "beside_ppo"))
import dpo  # noqa: E402


def test_a_score_that_is_not_finite_is_refused_with_the_name_of_the_model(
    world, tmp_path, run_stage
):
    model = AutoModelForSequenceClassification.from_pretrained(world / "reward_model")
    model.config.reward_std = 0.0  # every score is divided by it
    model.save_pretrained(tmp_path / "flat")
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / "flat")
    flags = ppo_flags(world, tmp_path / "out", "--reward", tmp_path / "flat", "--critic", "shared")
    status, _, err = run_stage(ppo, *flags)
    assert status == 2 and f"a score of {tmp_path / 'flat'} is not finite" in err


def test_a_text_beyond_a_foreign_reward_models_context_loses_its_prompts_beginning(world, capsys):
    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    model = AutoModelForSequenceClassification.from_pretrained(world / "reward_model")
    model.config.max_position_embeddings = 12
    scorer = rewards.TextScorer("theirs", model, tokenizer, 4)
    rows = [{"prompt": "A fox meets a cub. " * 9}, {"prompt": "A fox"}]
    scores = scorer(torch.zeros(1), None, rows, [" The fox helps.", " It rains."])
    prompt_ids, response_ids = common.encode(tokenizer, rows[0]["prompt"], " The fox helps.")
    ids = prompt_ids + response_ids
    tokens, mask = common.pad([ids[:1] + ids[-11:]], 0, "right")
    assert torch.allclose(scores[0], common.text_scores(model, tokens, mask)[0], atol=1e-5)
    captured = capsys.readouterr()
    assert "theirs reads 12 tokens" in captured.out + captured.err


def test_the_folder_of_another_stage_is_not_resumed(world, tmp_path, run_stage):
    flags = ["--data", world / "sft.jsonl", "--eval-data", world / "sft.jsonl", "--epochs", 1]
    assert run_stage(sft, *flags, "--output", tmp_path / "out")[0] == 0
    for stage, more in (ppo, ppo_flags(world, tmp_path / "out")), (reward_model, ["--output", tmp_path / "out"]):
        status, _, err = run_stage(stage, *more, "--resume")  # the flags of the first two have the same names
        assert status == 2 and "another stage or version" in err


def test_the_page_has_the_knobs_that_were_measured():
    """Mean and standard deviation, the differences to the default seed by seed, and to best of n."""
    page = (ROOT / "examples" / "beside_ppo" / "README.md").read_text(encoding="utf-8")
    table = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.splitlines()]
    result = json.loads((ROOT / "docs" / "results" / "ppo_knobs.json").read_text(encoding="utf-8"))
    for runs in (result["runs"], result["five_seeds"]):
        default = runs[0]["seeds"]
        for run in runs:
            seeds = run["seeds"]
            cells = [both([row[key] for row in seeds.values()]) for key in ("true_reward", "kl", "score")]
            for key in ("true_reward", "kl") if len(seeds) == 5 else ():
                pairs = zip(seeds.values(), default.values())
                gaps = [row[key] - other[key] for row, other in pairs]
                cells.append("" if run is runs[0] else both(gaps, "+"))
            for key in ("score_less_best_of_n", "true_less_best_of_n"):
                cells.append(f"{statistics.mean(row[key] for row in seeds.values()):+.2f}")
            assert [run["flags"], *cells] in [row[: 1 + len(cells)] for row in table]


def both(numbers, sign=""):
    return f"{statistics.mean(numbers):{sign}.2f} ± {statistics.stdev(numbers):.2f}"


def test_the_gradient_of_a_far_pair_is_small_in_kto_and_large_in_ipo():
    h = torch.tensor([0.0, 30.0], dtype=torch.float64, requires_grad=True)
    [grad] = torch.autograd.grad(dpo.preference_loss(h, h.detach() * 0, "kto", 0.5).sum(), h)
    assert grad[0] == pytest.approx(-0.5 * 0.25 / 2) and abs(grad[1]) < 1e-6
    [grad] = torch.autograd.grad(dpo.preference_loss(h, h.detach() * 0, "ipo", 0.5).sum(), h)
    assert grad[0] == pytest.approx(-2) and grad[1] == pytest.approx(58)
