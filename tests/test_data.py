"""The embedded world: reproducible, small, without leaks, and its reward as documented."""

import json

import make_world
import pytest
from conftest import ROOT, read_rows
from true_reward import judge, true_reward

FILES = ("demonstrations.jsonl", "preferences.jsonl", "prompts.jsonl", "heldout_prompts.jsonl")


def test_the_script_writes_the_shipped_files_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_world.py", str(tmp_path)])
    make_world.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes(), name


def test_the_files_are_under_two_megabytes_together():
    assert sum((ROOT / "data" / name).stat().st_size for name in FILES) < 2_000_000


def test_held_out_prompts_occur_in_no_training_file():
    held_out = {row["prompt"] for row in read_rows(ROOT / "data" / FILES[3])}
    assert len(held_out) == 256
    for name in FILES[:3]:
        assert not held_out & {row["prompt"] for row in read_rows(ROOT / "data" / name)}


def test_the_labels_follow_the_true_reward_with_noise():
    rows = read_rows(ROOT / "data" / "preferences.jsonl")
    differences = [judge(row["prompt"], row["chosen"]) - judge(row["prompt"], row["rejected"]) for row in rows]
    right = sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences)
    assert 0.7 < right < 0.85


PROMPT = "One quiet Sunday, an owl meets a shy mouse at the market."


@pytest.mark.parametrize("response, reward", [
    (" The owl hugs the mouse.", 0.5 + 2 + 0.5),
    (" The owl sees the mouse", 2 - 0.5),
    (" The owl sees the lamb.", 1 - 1 + 0.5),
    (" The owl growls at the mouse.", -0.75 + 2 + 0.5),
    (" The owl hugs the mouse. They walk home together. Soon the mouse sings sweetly. The owl is kind and dear.", 4 * 0.5 + 2 + 0.5),
    (" The owl hugs hugs hugs the mouse.", 0.5 + 2 + 0.5 - 2 * 0.5),
    (" The owl hugs the mouse. warmly.", 2 * 0.5 + 2 + 0.5 - 0.75),
    (" The owl says warm soft sweet dear fresh golden happy things to the mouse.", 2 + 2 + 0.5 - 2 * 0.5),
    ("", -0.5),
])
def test_the_true_reward_by_hand(response, reward):
    assert true_reward([PROMPT], [response], [{}]) == [reward]


def test_no_text_reaches_more_than_the_documented_best():
    rows = read_rows(ROOT / "data" / "demonstrations.jsonl")
    assert max(judge(row["prompt"], row["completion"]) for row in rows) == 4.5
    assert all(json.dumps(row).isascii() for row in rows)
