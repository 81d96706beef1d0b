"""Stage 2: the Bradley-Terry loss, where the score is read, the scale, what is saved."""

import math
import os

import pytest
import torch
from conftest import read_rows, tiny_scalar
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import reward_model

PAIRS = [([5, 6, 7, 1], [5, 6, 8, 9, 10, 1]), ([4, 1], [4, 0, 0]), ([5, 6, 11, 11, 11, 1], [5, 1])]


def test_preference_loss_by_hand():
    chosen, rejected = torch.tensor([[2.0, 0.0, -1.0, 800.0], [1.0, 0.0, 1.0, -800.0]]).double()
    expected = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(2)), 0.0]
    loss = reward_model.preference_loss(chosen, rejected)
    assert torch.allclose(loss, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_score_is_read_at_the_last_attended_token_and_comes_back_in_the_order_of_the_pairs():
    model = tiny_scalar()  # reward_mean 0.25, reward_std 2
    scores = torch.stack(reward_model.score_pairs(model, PAIRS, 2, 0, ""), 1)
    for row, pair in enumerate(PAIRS):
        for column, ids in enumerate(pair):
            hidden = model.model(torch.tensor([ids])).last_hidden_state
            alone = (model.score(hidden[0, -1]).item() - 0.25) / 2.0
            assert abs(scores[row, column].item() - alone) < 1e-5


def test_junk_in_the_padding_leaves_loss_and_gradients_bit_identical():
    results, model = [], tiny_scalar()
    for junk in (0, 7):
        loss = reward_model.preference_loss(*reward_model.pair_scores(model, PAIRS, junk)).sum()
        results.append([loss, *torch.autograd.grad(loss, model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def flags(world, output, *more):
    pairs = world / "pairs.jsonl"
    files = ["--model", world / "sft", "--data", pairs, "--eval-data", pairs, "--output", output]
    return [reward_model, *files, "--device", "cpu", *more]


def test_micro_batch_size_changes_no_gradient_and_none_reaches_the_next_step(world, tmp_path, run_stage, monkeypatch):
    """With learning rate 0 and one batch, each epoch's gradient is the same one again."""
    gradients = []

    def record(weights, max_norm):
        gradients.append([weight.grad.clone() for weight in weights])
        return torch.tensor(1.0)

    monkeypatch.setattr(reward_model, "clip_grad_norm_", record)
    for size in (24, 7, 1):
        more = ["--lr", 0, "--epochs", 2, "--batch-size", 24, "--microbatch-size", size]
        assert run_stage(*flags(world, tmp_path / str(size), *more))[0] == 0
    assert len(gradients) == 6 and max(gradient.abs().max() for gradient in gradients[0]) > 1e-3
    for other in gradients[1:]:
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(gradients[0], other, strict=True))


def test_a_new_head_starts_at_standard_deviation_one_over_root_d_plus_one():
    model, sigma = tiny_scalar(), 1 / math.sqrt(40_001)
    model.score = torch.nn.Linear(40_000, 1)
    torch.manual_seed(0)
    reward_model.init_head(model)
    assert abs(model.score.weight.std().item() / sigma - 1) < 0.02
    assert abs(model.score.weight.mean().item()) < 5 * sigma / 200 and model.score.bias.item() == 0


def test_accuracy_counts_ties_half_and_two_sigma_is_that_of_two_wins_and_losses_more():
    better, worse = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [0.0, 2, 9, 1, 1, 1, 1, 1]])
    expected = ((6 + 0.5) / 8, 2 * math.sqrt((8.5 / 12) * (3.5 / 12) / 12))  # six wins, a tie and a loss
    assert reward_model.accuracy(better, worse) == pytest.approx(expected, abs=1e-9)


def test_it_learns_stores_the_scale_and_writes_a_classifier_that_loads(world, tmp_path, run_stage):
    status, out, _ = run_stage(*flags(world, tmp_path, "--epochs", 20, "--lr", 0.01))
    assert status == 0 and "held-out accuracy" in out and "choosing the longer text" in out
    row = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert row["split"] == "eval" and row["accuracy"] > 0.9 and row["loss"] < 0.5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), model.config
    assert config.num_labels == 1 and config.pad_token_id == tokenizer.pad_token_id
    assert (config.reward_mean, config.reward_std) == (row["reward_mean"], row["reward_std"])
    # eq. 3, with transformers' own forward pass: training responses have mean 0 and std 1
    scores = []
    for pair in read_rows(world / "pairs.jsonl"):
        for key in ("chosen", "rejected"):
            ids = sum(common.encode(tokenizer, pair["prompt"], pair[key]), [])
            scores.append(model(torch.tensor([ids])).logits.item())
    scores = (torch.tensor(scores) - row["reward_mean"]) / row["reward_std"]
    assert abs(scores.mean()) < 1e-3 and abs(scores.std() - 1) < 1e-3


def test_nothing_is_kept_of_a_model_that_gives_other_scores_when_loaded(world, tmp_path, run_stage, monkeypatch):
    load, calls = common.load_scalar_model, []

    def broken(path, *arguments, **options):
        model, head_is_new = load(path, *arguments, **options)
        calls.append(path)
        if len(calls) == 2:  # the check of what was saved
            torch.nn.init.normal_(model.score.weight)
        return model, head_is_new

    monkeypatch.setattr(common, "load_scalar_model", broken)
    status, _, err = run_stage(*flags(world, tmp_path / "rm"))
    assert status == 2 and "gives other scores" in err and "config.json" not in os.listdir(tmp_path / "rm")
