"""Stage 2: the Bradley-Terry loss, where the score is read, the scale, the read-back."""

import math
import os

import pytest
import torch
from conftest import read_rows, tiny_scalar
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import ppo
import reward_model

PAIRS = [([5, 6, 7, 1], [5, 6, 8, 9, 10, 1]), ([4, 1], [4, 0, 0]), ([5, 6, 11, 11, 11, 11, 1], [5, 6, 1])]


def test_preference_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0, 800.0]), torch.tensor([1.0, 0.0, 1.0, -800.0])
    expected = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(2)), 0.0]
    loss = reward_model.preference_loss(chosen.double(), rejected.double())
    assert torch.allclose(loss, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_score_is_read_at_the_last_attended_token_alone_or_beside_longer_texts():
    model = tiny_scalar()  # reward_mean 0.25, reward_std 2
    scores = torch.stack(reward_model.pair_scores(model, PAIRS, pad_id=0), 1)
    for row, pair in enumerate(PAIRS):
        for column, ids in enumerate(pair):
            hidden = model.model(torch.tensor([ids])).last_hidden_state
            alone = (model.score(hidden[0, -1]).item() - 0.25) / 2.0
            assert abs(scores[row, column].item() - alone) < 1e-5


def test_transformers_own_forward_agrees_on_texts_without_pad_tokens():
    model = tiny_scalar()
    for chosen, _ in PAIRS:
        ours = reward_model.pair_scores(model, [(chosen, chosen)], 0)[0].item()
        theirs = model(torch.tensor([chosen])).logits.item()
        assert abs(ours - (theirs - 0.25) / 2.0) < 1e-5


def test_junk_in_the_padding_leaves_loss_and_gradients_bit_identical():
    results = []
    for junk in (0, 7):
        model = tiny_scalar()
        loss = reward_model.preference_loss(*reward_model.pair_scores(model, PAIRS, junk)).sum()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class GradientSeen(Exception):
    pass


def test_micro_batch_size_changes_no_gradient_of_the_real_loop(world, tmp_path, run_stage, monkeypatch):
    gradients = []

    def record(parameters, _):
        gradients.append([p.grad.clone() for p in parameters])
        raise GradientSeen

    monkeypatch.setattr(reward_model, "clip_grad_norm_", record)
    for size in (8, 3, 1):
        with pytest.raises(GradientSeen):
            run_stage(reward_model, "--model", world / "sft", "--data", world / "pairs.jsonl", "--output", tmp_path / "out",
                      "--batch-size", 8, "--microbatch-size", size, "--device", "cpu", "--overwrite")
    assert max(g.abs().max() for g in gradients[0]) > 1e-3
    for other in gradients[1:]:
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(gradients[0], other, strict=True))


def test_a_new_head_starts_at_deviation_one_over_root_d_plus_one():
    model = tiny_scalar()
    model.score = torch.nn.Linear(40_000, 1)
    torch.manual_seed(0)
    reward_model.init_head(model)
    sigma = 1 / math.sqrt(40_001)
    assert abs(model.score.weight.std().item() / sigma - 1) < 0.02 and model.score.bias.item() == 0
    assert abs(model.score.weight.mean().item()) < 5 * sigma / 200


def test_accuracy_counts_ties_half_and_two_sigma_is_that_of_two_wins_and_losses_more():
    share, two_sigma = reward_model.accuracy(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.0, 2, 9, 1]))
    assert share == (1 + 0.5 + 0 + 1) / 4
    assert abs(two_sigma - 2 * math.sqrt((4.5 / 8) * (3.5 / 8) / 8)) < 1e-9


def test_calibration_bins_by_size_and_promises_the_mean_probability():
    differences = torch.tensor([0.1, -0.2, 3.0, -4.0, 2.0, 0.3, 5.0, -0.05])
    rows = reward_model.calibration(differences, num_bins=2)
    sizes = [[0.05, 0.1, 0.2, 0.3], [2.0, 3.0, 4.0, 5.0]]
    for (size, promised, right), expected, wins in zip(rows, sizes, (2, 3), strict=True):
        assert abs(size - sum(expected) / 4) < 1e-6
        assert abs(promised - sum(1 / (1 + math.exp(-x)) for x in expected) / 4) < 1e-6
        assert right == wins / 4


def test_scores_come_back_in_the_order_of_the_pairs():
    model = tiny_scalar()
    together = reward_model.score_pairs(model, PAIRS, 2, 0)
    for row, pair in enumerate(PAIRS):
        alone = reward_model.score_pairs(model, [pair], 2, 0)
        assert all(abs(together[side][row] - alone[side][0]) < 1e-5 for side in (0, 1))


def test_it_learns_stores_the_scale_and_writes_a_classifier_that_loads(world, tmp_path, run_stage):
    arguments = ["--model", world / "sft", "--data", world / "pairs.jsonl", "--eval-data", world / "pairs.jsonl", "--device", "cpu"]
    status, out, _ = run_stage(reward_model, *arguments, "--output", tmp_path / "rm", "--epochs", 20, "--lr", 0.01)
    assert status == 0 and "held-out accuracy" in out and "longer one wins" in out
    row = read_rows(tmp_path / "rm" / "metrics.jsonl")[-1]
    assert row["split"] == "eval" and row["accuracy"] > 0.9 and row["loss"] < 0.5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    assert (model.config.reward_mean, model.config.reward_std) == (row["reward_mean"], row["reward_std"])
    # eq. 3, with transformers' own forward pass: the training responses have mean 0 and deviation 1
    scores = []
    for pair in read_rows(world / "pairs.jsonl"):
        for key in ("chosen", "rejected"):
            ids = sum(common.encode(tokenizer, pair["prompt"], pair[key]), [])
            scores.append((model(torch.tensor([ids])).logits.item() - row["reward_mean"]) / row["reward_std"])
    scores = torch.tensor(scores)
    assert abs(scores.mean()) < 1e-3 and abs(scores.std() - 1) < 1e-3


def test_gradients_of_one_step_do_not_reach_the_next(world, tmp_path, run_stage):
    run_stage(reward_model, "--model", world / "sft", "--data", world / "pairs.jsonl", "--eval-data", world / "pairs.jsonl",
              "--output", tmp_path / "out", "--batch-size", 24, "--lr", 0, "--epochs", 3, "--device", "cpu")
    norms = [row["grad_norm"] for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
    assert len(norms) == 3 and norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_nothing_is_kept_of_a_model_that_reads_back_differently(world, tmp_path, run_stage, monkeypatch):
    load, calls = common.load_scalar_model, []

    def broken(path, *arguments, **options):
        model, head_is_new = load(path, *arguments, **options)
        calls.append(path)
        if len(calls) == 2:  # the reload
            torch.nn.init.normal_(model.score.weight)
        return model, head_is_new

    monkeypatch.setattr(common, "load_scalar_model", broken)
    status, _, err = run_stage(reward_model, "--model", world / "sft", "--data", world / "pairs.jsonl", "--output", tmp_path / "rm", "--device", "cpu")
    assert status == 2 and "not kept" in err and "config.json" not in os.listdir(tmp_path / "rm")
    flags = ["--policy", world / "sft", "--reward", tmp_path / "rm", "--prompts", world / "prompts.jsonl", "--output", tmp_path / "ppo"]
    status, _, err = run_stage(ppo, *flags)
    assert status == 2 and f"{tmp_path / 'rm'} is not finished" in err
