"""The example of a verifiable reward: its sums, its human, its reward, and the way to PPO."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, read_rows, write_rows

import harness
import ppo
import sft
from data import tiny_model

HERE = ROOT / "examples" / "arithmetic"
FILES = ("demonstrations.jsonl", "prompts.jsonl", "heldout_prompts.jsonl")
REWARD = f"{HERE / 'reward.py'}:correct"


def number(digits):
    """Returns 15 for "1 5"; nothing but digits that stand apart is a number."""
    assert re.fullmatch(r"\d( \d)*", digits), digits
    return int(digits.replace(" ", ""))


def operands(row):
    left, right = re.fullmatch(r"(.*) \+ (.*) =", row["prompt"]).groups()
    return number(left), number(right)


def test_the_script_writes_the_shipped_files_whose_held_out_sums_are_not_trained_on(tmp_path):
    subprocess.run([sys.executable, HERE / "make_data.py", tmp_path], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    size, pairs = 0, []
    for name in FILES:
        data = (HERE / name).read_bytes()
        assert (tmp_path / name).read_bytes() == data
        size += len(data)
        rows = read_rows(HERE / name)
        pairs.append([tuple(sorted(operands(row))) for row in rows])  # in either order
        for row in rows if name != FILES[0] else ():
            a, b = operands(row)
            assert 10 <= a <= 99 and 10 <= b <= 99 and row["answer"] == a + b, row
    assert size < 400_000
    demonstrated, prompts, held_out = (set(each) for each in pairs)
    assert len(held_out) == len(pairs[2]) == 495 and not held_out & prompts
    assert demonstrated == prompts and len(prompts) == 3600


def test_the_human_is_wrong_half_the_time_mostly_forgets_to_carry_and_only_right_sums_score():
    rows, right, right_with_carry = read_rows(HERE / FILES[0]), [], []
    for row in rows:
        a, b = operands(row)
        tens, ones, total = re.fullmatch(r" (.*) \+ (.*) = (.*)", row["completion"]).groups()
        # a slip is by one ten and by one, and a forgotten carry takes ten more
        assert abs(number(tens) - (a // 10 + b // 10) * 10) in (0, 10), row
        assert abs(number(ones) - (a % 10 + b % 10)) <= 1, row
        assert number(tens) + number(ones) - number(total) in (0, 10), row
        right.append(number(total) == a + b)
        if a % 10 + b % 10 > 9:
            right_with_carry.append(right[-1])
        row["answer"] = a + b
    assert 0.5 < sum(right) / len(right) < 0.6
    assert sum(right_with_carry) / len(right_with_carry) < 0.4
    completions = [row["completion"] for row in rows]
    assert harness.load_function(REWARD)([""] * len(rows), completions, rows) == right


def test_each_digit_is_a_token_of_its_own():
    texts = [text for row in read_rows(HERE / FILES[0]) for text in row.values()]
    tokenizer = tiny_model.train_tokenizer(texts)
    for text in texts[:500]:
        pieces = [tokenizer.decode([token]).strip() for token in tokenizer(text)["input_ids"]]
        assert pieces == text.split() and set(map(len, pieces)) == {1}, text


def test_the_reward_by_hand():
    right = [  # as the human writes; without working; a number is a number; space means nothing;
        # the working is not judged; what comes last is the answer
        " 7 0 + 1 5 = 8 5", " 8 5", " 85", "= 8 5 \n", " 6 0 + 5 = 8 5", " 7 0 + 1 5 = 7 5 = 8 5",
    ]
    wrong = [  # another number, too few or many digits, two guesses, signs, zeros, no number
        " 7 0 + 1 5 = 7 5", " 7 0 + 1 5 = 8 5 = 7 5", " 8 5 + 0 = 8 4", " 7 0 + 1 5 = 8",
        " 7 0 + 1 5 = 8 5 0", " 7 0 + 1 5 = 8 5 8 4", " 7 0 + 1 5 = 8 5 +", " 7 0 + 1 5 = 8 5.",
        " 7 0 + 1 5 = 8 5 =", " 7 0 + 1 5 = 0 8 5", " 7 0 + 1 5 = - 8 5", " 7 0 + 1 5 = + 8 5",
        " 7 0 + 1 5", " eighty-five", "=", "", "\uff18\uff15",
    ]
    correct = harness.load_function(REWARD)
    for responses, score in ((right, 1.0), (wrong, 0.0)):
        rows = [{"answer": 85}] * len(responses)
        assert correct(["2 7 + 5 8 ="] * len(rows), responses, rows) == [score] * len(rows)
    rows = [{"answer": 21}, {"answer": 22}, {"answer": -3}]  # each by its own row
    assert correct([""] * 3, [" 2 1", " 2 1", " - 3"], rows) == [1.0, 0.0, 1.0]


def test_the_commands_of_the_docstring_parse_and_name_files_that_exist():
    text = (HERE / "reward.py").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    python (sft|ppo)\.py (.*)", text, re.M)
    assert [stage for stage, _ in commands] == ["sft", "ppo"]
    for stage, flags in commands:
        config = harness.parse_args({"sft": sft, "ppo": ppo}[stage].Config, "", flags.split())
        for path in re.findall(r"examples/[\w./]+", flags):
            assert (ROOT / path).is_file(), path
    assert ppo.check_config(config).policy in commands[0][1]


def test_the_answers_of_the_rows_reach_the_reward_in_a_run(run_stage, world, tmp_path):
    """A random policy never adds; but answers set to what it writes make half of its scores 1."""
    rows = read_rows(HERE / FILES[2])[:16]
    for expected in (0, 0.5):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        status, _, error = run_stage(
            ppo, "--policy", world / "sft", "--prompts", path, "--eval-prompts", path,
            "--reward", REWARD, "--output", tmp_path / "out", "--overwrite", "--iterations", 1,
            "--batch-size", 16, "--minibatch-size", 16, "--ppo-epochs", 1, "--response-length", 6,
        )
        assert status == 0, error
        samples = read_rows(tmp_path / "out" / "samples.jsonl")[:16]  # before any update
        assert read_rows(tmp_path / "out" / "metrics.jsonl")[0]["score"] == expected
        for row, sample in list(zip(rows, samples))[::2]:
            row["answer"] = re.sub(r"\s|.*=", "", sample["response"], flags=re.S)
    assert [sample["score"] for sample in samples] == [1.0, 0.0] * 8
