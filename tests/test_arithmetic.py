"""The example of a verifiable reward: its sums, its human, its reward, and the way to PPO."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, read_rows, write_rows

import ppo
import sft
from data import tiny_model
from plumbing import cli, scorers

HERE = ROOT / "examples" / "arithmetic"
FILES = ("demonstrations.jsonl", "prompts.jsonl", "heldout_prompts.jsonl")
correct = scorers.FunctionScorer(f"{HERE / 'reward.py'}:correct").function


def number(digits):
    """1 5 -> 15, and nothing but digits that stand apart."""
    assert re.fullmatch(r"\d( \d)*", digits), digits
    return int(digits.replace(" ", ""))


def operands(row):
    left, right = re.fullmatch(r"(.*) \+ (.*) =", row["prompt"]).groups()
    return number(left), number(right)


@pytest.fixture(scope="module")
def data():
    return {name: read_rows(HERE / name) for name in FILES}


def test_the_script_writes_the_shipped_files_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, HERE / "make_data.py", tmp_path], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), name


def test_the_files_are_under_400_kilobytes_together():
    assert sum((HERE / name).stat().st_size for name in FILES) < 400_000


def test_held_out_sums_occur_in_no_training_file_in_either_order(data):
    pairs = {name: [tuple(sorted(operands(row))) for row in rows] for name, rows in data.items()}
    held_out = set(pairs[FILES[2]])
    assert len(held_out) == len(pairs[FILES[2]]) == 495
    assert set(pairs[FILES[0]]) == set(pairs[FILES[1]]) and len(set(pairs[FILES[0]])) == 3600
    assert not held_out & set(pairs[FILES[0]])


@pytest.mark.parametrize("name", FILES[1:])
def test_every_answer_of_the_prompts_is_the_sum(data, name):
    for row in data[name]:
        a, b = operands(row)
        assert 10 <= a <= 99 and 10 <= b <= 99 and row["answer"] == a + b, row


def test_the_human_is_wrong_about_half_the_time_and_mostly_forgets_to_carry(data):
    right, right_with_carry = [], []
    for row in data["demonstrations.jsonl"]:
        a, b = operands(row)
        tens, ones, total = re.fullmatch(r" (.*) \+ (.*) = (.*)", row["completion"]).groups()
        # a slip is by one ten and by one, and a forgotten carry takes ten more
        assert abs(number(tens) - (a // 10 + b // 10) * 10) in (0, 10), row
        assert abs(number(ones) - (a % 10 + b % 10)) <= 1, row
        assert number(tens) + number(ones) - number(total) in (0, 10), row
        is_right = number(total) == a + b
        right.append(is_right)
        if a % 10 + b % 10 > 9:
            right_with_carry.append(is_right)
    assert 0.5 < sum(right) / len(right) < 0.6
    assert sum(right_with_carry) / len(right_with_carry) < 0.4


def test_each_digit_is_a_token_of_its_own(data):
    rows = data["demonstrations.jsonl"]
    texts = [text for row in rows for text in row.values()]
    tokenizer = tiny_model.train_tokenizer(texts)
    for text in texts[:500]:
        pieces = [tokenizer.decode([token]).strip() for token in tokenizer(text)["input_ids"]]
        assert pieces == text.split() and set(map(len, pieces)) == {1}, text


@pytest.mark.parametrize("response, score", [
    (" 7 0 + 1 5 = 8 5", 1.0),  # the human's form
    (" 8 5", 1.0),  # without working
    (" 85", 1.0),  # a number is a number
    ("= 8 5 \n", 1.0),  # space around it means nothing
    (" 6 0 + 5 = 8 5", 1.0),  # the answer is judged, the working is not
    (" 7 0 + 1 5 = 7 5 = 8 5", 1.0),  # what comes last is the answer
    (" 7 0 + 1 5 = 7 5", 0.0),
    (" 7 0 + 1 5 = 8 5 = 7 5", 0.0),
    (" 8 5 + 0 = 8 4", 0.0),
    (" 7 0 + 1 5 = 8", 0.0),  # stopped too early
    (" 7 0 + 1 5 = 8 5 0", 0.0),
    (" 7 0 + 1 5 = 8 5 8 4", 0.0),  # two guesses are none
    (" 7 0 + 1 5 = 8 5 +", 0.0),
    (" 7 0 + 1 5 = 8 5.", 0.0),
    (" 7 0 + 1 5 = 8 5 =", 0.0),
    (" 7 0 + 1 5 = 0 8 5", 0.0),  # leading zeros
    (" 7 0 + 1 5 = - 8 5", 0.0),
    (" 7 0 + 1 5 = + 8 5", 0.0),
    (" 7 0 + 1 5", 0.0),
    (" eighty-five", 0.0),
    ("=", 0.0),
    ("", 0.0),
    ("\uff18\uff15", 0.0),  # other digits than the data's
])
def test_the_reward_by_hand(response, score):
    assert correct(["2 7 + 5 8 ="], [response], [{"answer": 85}]) == [score]


def test_each_response_is_compared_with_its_own_row():
    rows = [{"answer": 21}, {"answer": 22}, {"answer": -3}]
    assert correct([""] * 3, [" 2 1", " 2 1", " - 3"], rows) == [1.0, 0.0, 1.0]


def test_the_right_demonstrations_and_no_others_are_paid(data):
    rows = data["demonstrations.jsonl"]
    rows = [row | {"answer": sum(operands(row))} for row in rows]
    scores = correct([row["prompt"] for row in rows], [row["completion"] for row in rows], rows)
    for row, score in zip(rows, scores):
        assert score == (number(row["completion"].split(" = ")[1]) == row["answer"]), row


def test_the_answers_of_the_rows_reach_the_reward_in_a_run(run_stage, world, tmp_path):
    """A random policy never adds; but answers set to what it says make half of its scores 1."""
    rows = read_rows(HERE / "heldout_prompts.jsonl")[:16]

    def run(name):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        status, _, error = run_stage(
            ppo, "--policy", world / "sft", "--prompts", HERE / "prompts.jsonl",
            "--eval-prompts", path, "--reward", f"{HERE / 'reward.py'}:correct",
            "--output", tmp_path / name, "--iterations", 1, "--batch-size", 16,
            "--minibatch-size", 16, "--ppo-epochs", 1, "--response-length", 6,
        )
        assert status == 0, error
        samples = read_rows(tmp_path / name / "samples.jsonl")[:16]
        assert {sample["iteration"] for sample in samples} == {0}
        return read_rows(tmp_path / name / "metrics.jsonl")[0], samples

    before, samples = run("sums")
    assert before["score"] == 0
    for row, sample in list(zip(rows, samples))[::2]:
        row["answer"] = re.sub(r"\s|.*=", "", sample["response"], flags=re.S)
    after, samples = run("echoes")
    assert after["score"] == 0.5
    assert [sample["score"] for sample in samples] == [1.0, 0.0] * 8


def test_the_commands_of_the_docstring_parse_and_name_files_that_exist():
    text = sys.modules[correct.__module__].__doc__
    commands = re.findall(r"^    python (.*)", text.replace("\\\n", " "), re.M)
    assert [command.split()[0] for command in commands] == ["sft.py", "ppo.py"]
    for command, stage in zip(commands, (sft, ppo)):
        cfg = cli.parse_args(stage.Config, "", shlex.split(command)[1:])
        getattr(stage, "check_config", cli.check_ranges)(cfg)  # sft.py has no rules beyond the ranges
        for path in re.findall(r"examples/[\w./]+", command):
            assert (ROOT / path).is_file(), path
    assert cfg.policy in commands[0]
