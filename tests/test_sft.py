"""Stage 1: what is imitated, how it is averaged, what is written."""

import math

import pytest
import torch
from conftest import DEMONSTRATIONS, read_rows, tiny_lm, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import sft
from data import tiny_model
from plumbing import cli

EXAMPLES = [([5, 6, 7], [8, 1]), ([5], [9, 10, 11, 1]), ([], [4, 1])]


def test_completion_mask_covers_completion_and_eos_but_no_prompt_and_no_padding():
    tokens, attention_mask, completion_mask = sft.collate(EXAMPLES, pad_id=0)
    assert tokens.tolist() == [[5, 6, 7, 8, 1], [5, 9, 10, 11, 1], [4, 1, 0, 0, 0]]
    assert attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    # the very first token has nothing before it, so nothing can predict it
    assert completion_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]


def test_loss_is_the_sum_of_each_completion_tokens_surprise_computed_one_by_one():
    model = tiny_lm()
    expected = 0.0
    for prompt, completion in EXAMPLES:
        ids = prompt + completion
        for i in range(max(len(prompt), 1), len(ids)):
            logits = model(torch.tensor([ids[:i]])).logits[0, -1].double()
            expected -= logits.log_softmax(-1)[ids[i]].item()
    nll = sft.completion_nll(model, *sft.collate(EXAMPLES, pad_id=0)).item()
    assert abs(nll - expected) < 1e-4
    num_tokens = 2 + 4 + 1
    assert abs(sft.evaluate(model, EXAMPLES, 2, 0) - expected / num_tokens) < 1e-5


def test_junk_in_the_padding_leaves_loss_and_gradients_bit_identical():
    results = []
    for junk in (0, 7):
        model = tiny_lm()
        tokens, attention_mask, completion_mask = sft.collate(EXAMPLES, pad_id=junk)
        loss = sft.completion_nll(model, tokens, attention_mask, completion_mask)
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

    monkeypatch.setattr(sft, "clip_grad_norm_", record)
    for size in (8, 3, 1):
        with pytest.raises(GradientSeen):
            run_stage(sft, "--model", world / "sft", "--data", world / "sft.jsonl", "--output", tmp_path / "out",
                      "--batch-size", 8, "--microbatch-size", size, "--device", "cpu", "--overwrite")
    assert max(g.abs().max() for g in gradients[0]) > 1e-3
    for other in gradients[1:]:
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(gradients[0], other, strict=True))


def test_from_scratch_it_learns_and_writes_a_folder_that_loads_and_generates(tmp_path, run_stage):
    data = write_rows(tmp_path / "data.jsonl", DEMONSTRATIONS * 8)
    status, out, _ = run_stage(sft, "--data", data, "--output", tmp_path / "out", "--epochs", 6, "--device", "cpu")
    assert status == 0 and "next: python reward_model.py" in out
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert rows[-1]["split"] == "eval" and rows[-1]["loss"] < 1.0 < rows[-1]["loss_before"]
    assert [row["iteration"] for row in rows[:-1]] == list(range(1, len(rows)))
    assert rows[-2]["lr"] < 0.1 * max(row["lr"] for row in rows[:-1]) and rows[0]["lr"] == 0  # warm-up, decay
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    ids = tokenizer(DEMONSTRATIONS[0]["prompt"], return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=20)[0])
    assert text.endswith("<|end|>") and " fox " in text  # it has learned to end


def test_rows_that_are_too_long_are_dropped_and_counted_never_cut(world, tmp_path, run_stage):
    rows = DEMONSTRATIONS + [{"prompt": "A fox.", "completion": " It runs." * 40}, {"prompt": "A fox. " * 80, "completion": " It."}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    arguments = ["--model", world / "sft", "--data", data, "--eval-data", world / "sft.jsonl", "--epochs", 1, "--output", tmp_path / "out"]
    status, out, _ = run_stage(sft, *arguments, "--max-prompt-length", 40, "--response-length", 40)
    assert status == 0 and f"{data}: {len(rows)} rows read, {len(DEMONSTRATIONS)} examples used; 1 dropped (response above --response-length 40); 1 dropped (prompt above" in out and f"{len(DEMONSTRATIONS)} demonstrations" in out


def test_plain_text_rows_are_completions_of_nothing():
    assert sft.row_dialogues({"text": "abc"}) == [("", "abc")]
    assert sft.row_dialogues({"prompt": "a", "completion": "b"}) == [("a", "b")]
    assert sft.row_dialogues({"text": "abc", "completion": "b"}) == [("", "abc")]


def test_a_lone_eos_is_dropped_since_nothing_predicts_it():
    tokenizer, cfg = tiny_model.train_tokenizer(["a"], 300), sft.Config()
    rows = [{"text": ""}, {"text": "a"}, {"prompt": "a", "completion": ""}]
    examples = [list(sft.encode_row(row, tokenizer, [1], cfg)) for row in rows]
    assert examples[0] == ["empty"] and [len(x + y) for (x, y), in examples[1:]] == [2, 2]


def test_gradients_of_one_step_do_not_reach_the_next(world, tmp_path, run_stage):
    """With learning rate 0 and one batch, each epoch's gradient is the same one again."""
    run_stage(sft, "--model", world / "sft", "--data", world / "sft.jsonl", "--eval-data", world / "sft.jsonl", "--output",
              tmp_path / "out", "--batch-size", 24, "--lr", 0, "--epochs", 3, "--device", "cpu")
    norms = [row["grad_norm"] for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
    assert len(norms) == 3 and norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_batches_hold_rows_of_like_length_each_row_once_in_new_orders():
    lengths = torch.randint(1, 200, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    generator = torch.Generator().manual_seed(0)
    batches = common.epochs_by_length(lengths, 16, generator)
    first, second = ([next(batches) for _ in range(63)] for _ in range(2))
    assert sorted(sum(first, [])) == list(range(1000)) and first != second
    spread = lambda batch: max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
    assert sum(map(spread, first)) / len(first) < 20  # 175 or so at random
    starts = [lengths[batch[0]] for batch in first]
    assert starts != sorted(starts)  # not short ones first


def test_the_learning_rate_follows_the_models_size_unless_given():
    model = tiny_lm()
    assert cli.by_size(None, sft.LR_BY_SIZE, model) == 3e-3
    assert cli.by_size(1e-7, sft.LR_BY_SIZE, model) == 1e-7
    huge = torch.nn.Linear(1, 1)
    huge.parameters = lambda: [torch.empty(1_500_000_000, device="meta")]
    assert cli.by_size(None, sft.LR_BY_SIZE, huge) == 3e-6
    assert math.isinf(sft.LR_BY_SIZE[-1][0])
