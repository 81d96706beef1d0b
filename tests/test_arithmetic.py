"""The example of a verifiable reward: its sums, its human, its reward, and the way to PPO."""

import re
import subprocess
import sys

from conftest import ROOT, read_rows

import harness
import ppo
import sft
from data import tiny_model

HERE = ROOT / "examples" / "arithmetic"
FILES = ("demonstrations.jsonl", "prompts.jsonl", "heldout_prompts.jsonl")


def number(digits):
    """Returns 15 for "1 5"; nothing but digits that stand apart is a number."""
    assert re.fullmatch(r"\d( \d)*", digits), digits
    return int(digits.replace(" ", ""))


def operands(row):
    left, right = re.fullmatch(r"(.*) \+ (.*) =", row["prompt"]).groups()
    return number(left), number(right)


def correct(responses, answers):
    rows = [{"answer": answer} for answer in answers]
    return harness.load_function(f"{HERE / 'reward.py'}:correct")([""] * len(rows), responses, rows)


def test_the_script_writes_the_shipped_files_whose_held_out_sums_are_not_trained_on(tmp_path):
    subprocess.run([sys.executable, HERE / "make_data.py", tmp_path], check=True)
    shipped = [(HERE / name).read_bytes() for name in FILES]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict(zip(FILES, shipped))
    assert len(b"".join(shipped)) < 400_000
    demonstrated, *asked = [read_rows(HERE / name) for name in FILES]
    for row in asked[0] + asked[1]:
        a, b = operands(row)
        assert 10 <= a <= 99 and 10 <= b <= 99 and row["answer"] == a + b, row
    prompts, held_out = [{tuple(sorted(operands(row))) for row in rows} for rows in asked]  # in either order
    assert len(held_out) == len(asked[1]) == 495 and not held_out & prompts and len(prompts) == 3600
    assert {tuple(sorted(operands(row))) for row in demonstrated} == prompts


def test_the_human_is_wrong_half_the_time_mostly_forgets_to_carry_and_only_right_sums_score():
    rows, right, right_with_carry, answers = read_rows(HERE / FILES[0]), [], [], []
    for row in rows:
        a, b = operands(row)
        tens, ones, total = map(number, re.fullmatch(r" (.*) \+ (.*) = (.*)", row["completion"]).groups())
        # a slip is by one ten and by one, and a forgotten carry takes ten more
        assert abs(tens - (a // 10 + b // 10) * 10) in (0, 10), row
        assert abs(ones - (a % 10 + b % 10)) <= 1 and tens + ones - total in (0, 10), row
        right.append(total == a + b)
        answers.append(a + b)
        if a % 10 + b % 10 > 9:
            right_with_carry.append(right[-1])
    assert 0.5 < sum(right) / len(right) < 0.6
    assert sum(right_with_carry) / len(right_with_carry) < 0.4
    assert correct([row["completion"] for row in rows], answers) == right


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
        " 7 0 + 1 5 = 7 5", " 7 0 + 1 5 = 8 5 = 7 5", " 8 5 + 0 = 8 4", " 7 0 + 1 5 = 8", " 7 0 + 1 5 = 8 5 0",
        " 7 0 + 1 5 = 8 5 8 4", " 7 0 + 1 5 = 8 5 +", " 7 0 + 1 5 = 8 5.", " 7 0 + 1 5 = 8 5 =", " 7 0 + 1 5 = 0 8 5",
        " 7 0 + 1 5 = - 8 5", " 7 0 + 1 5 = + 8 5", " 7 0 + 1 5", " eighty-five", "=", "", "\uff18\uff15",
    ]
    assert correct(right + wrong, [85] * 23) == [1.0] * 6 + [0.0] * 17
    assert correct([" 2 1", " 2 1", " - 3"], [21, 22, -3]) == [1.0, 0.0, 1.0]  # each by its own row


def test_the_commands_of_the_docstring_parse_and_name_files_that_exist():
    text = (HERE / "reward.py").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    python (sft|ppo)\.py (.*)", text, re.M)
    assert [stage for stage, _ in commands] == ["sft", "ppo"]
    for stage, flags in commands:
        config = harness.parse_args({"sft": sft, "ppo": ppo}[stage].Config, "", flags.split())
        assert all((ROOT / path).is_file() for path in re.findall(r"examples/[\w./]+", flags))
    assert ppo.check_config(config).policy in commands[0][1]
