"""Stage 1: what is imitated, how it is averaged, what is written."""

import torch
from conftest import DEMONSTRATIONS, read_rows, tiny_lm, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import harness
import sft
from data import tiny_model

EXAMPLES = [([5, 6, 7], [8, 1]), ([5], [9, 10, 11, 1]), ([], [4, 1])]


def test_completion_mask_covers_completion_and_eos_but_no_prompt_and_no_padding():
    tokens, attention_mask, completion_mask = sft.collate(EXAMPLES, pad_id=0)
    assert tokens.tolist() == [[5, 6, 7, 8, 1], [5, 9, 10, 11, 1], [4, 1, 0, 0, 0]]
    assert attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    # the very first token has nothing before it, so nothing can predict it
    assert completion_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]


def test_loss_is_the_sum_of_each_completion_tokens_surprise_whatever_the_padding_holds():
    model, expected, results = tiny_lm(), 0.0, []
    for prompt, completion in EXAMPLES:
        ids = prompt + completion
        for i in range(max(len(prompt), 1), len(ids)):
            logits = model(torch.tensor([ids[:i]])).logits[0, -1].double()
            expected -= logits.log_softmax(-1)[ids[i]].item()
    for junk in (0, 7):
        loss = sft.completion_nll(model, *sft.collate(EXAMPLES, pad_id=junk))
        assert abs(loss.item() - expected) < 1e-4
        results.append([loss, *torch.autograd.grad(loss, model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    num_tokens = 2 + 4 + 1
    assert abs(sft.evaluate(model, EXAMPLES, 2, 0) - expected / num_tokens) < 1e-5


def test_micro_batch_size_changes_no_gradient_and_none_reaches_the_next_step(world, tmp_path, run_stage, monkeypatch):
    """With learning rate 0 and one batch, each epoch's gradient is the same one again."""
    gradients = []

    def record(weights, max_norm):
        gradients.append([weight.grad.clone() for weight in weights])
        return torch.tensor(1.0)

    monkeypatch.setattr(sft, "clip_grad_norm_", record)
    for size in (24, 7, 1):
        flags = ["--model", world / "sft", "--data", world / "sft.jsonl", "--eval-data", world / "sft.jsonl"]
        flags += ["--output", tmp_path / str(size), "--lr", 0, "--epochs", 2, "--batch-size", 24, "--device", "cpu"]
        assert run_stage(sft, *flags, "--microbatch-size", size)[0] == 0
    assert len(gradients) == 6 and max(gradient.abs().max() for gradient in gradients[0]) > 1e-3
    for other in gradients[1:]:
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(gradients[0], other, strict=True))


def test_from_scratch_it_learns_and_writes_a_folder_that_loads_and_generates(tmp_path, run_stage):
    data, output = write_rows(tmp_path / "data.jsonl", DEMONSTRATIONS * 8), tmp_path / "out"
    run = ["--data", data, "--output", output, "--epochs", 6, "--device", "cpu"]
    status, out, _ = run_stage(sft, *run)
    assert status == 0 and "next: python reward_model.py" in out
    *rows, last = read_rows(output / "metrics.jsonl")
    assert last["split"] == "eval" and last["loss"] < 1.0 < last["loss_before"]
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    rates = [row["lr"] for row in rows]
    assert rates[0] == 0 and max(rates) == 3e-3 and rates[-1] < 3e-4  # warm-up to the rate by size, decay
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    ids = tokenizer(DEMONSTRATIONS[0]["prompt"], return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=20)[0])
    assert text.endswith("<|end|>") and " fox " in text  # it has learned to end


def test_rows_that_are_too_long_or_empty_are_dropped_and_counted_never_cut(tmp_path, capsys):
    tokenizer = tiny_model.train_tokenizer([row["completion"] for row in DEMONSTRATIONS], 320)
    cfg = sft.Config(max_prompt_length=40, response_length=40)
    long = [{"prompt": "A.", "completion": " It" * 40}, {"prompt": "A. " * 80, "completion": "."}]
    # an EOS alone is predicted by nothing, and after a prompt it is
    short = [{"text": ""}, {"text": "a"}, {"prompt": "a", "completion": ""}]
    path = write_rows(tmp_path / "data.jsonl", DEMONSTRATIONS + long + short)
    rows = harness.read_rows([path], sft.FORMATS)
    examples = harness.convert(rows, lambda row: sft.encode_row(row, tokenizer, [1], cfg))
    assert [len(x + y) for x, y in examples[-2:]] == [2, 2]
    assert (
        f"{path}: 29 rows read, 26 examples used; 1 dropped (response above --response-length 40); "
        "1 dropped (prompt above --max-prompt-length 40); 1 dropped (empty)"
    ) in capsys.readouterr().out


def test_batches_hold_rows_of_similar_length_each_row_once_in_new_orders():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (1000,), generator=generator).tolist()
    batches = common.epochs_by_length(lengths, 16, generator)
    first, second = [[next(batches) for _ in range(63)] for _ in range(2)]
    assert sorted(sum(first, [])) == list(range(1000)) and first != second
    spreads = [max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in first]
    assert sum(spreads) / len(first) < 20  # 175 or so at random
    starts = [lengths[rows[0]] for rows in first]
    assert starts != sorted(starts)  # not short ones first
