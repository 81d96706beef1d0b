"""The embedded world: reproducible, small, without leaks, and its reward as documented."""

import make_world
import pytest
from conftest import ROOT, read_rows
from true_reward import judge, true_reward

FILES = ["demonstrations.jsonl", "heldout_prompts.jsonl", "preferences.jsonl", "prompts.jsonl"]
PROMPT = "One quiet Sunday, an owl meets a shy mouse at the market."


def test_the_script_writes_the_shipped_files_byte_for_byte_and_no_prompt_leaks(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["make_world.py", str(tmp_path)])
    make_world.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    shipped = [(ROOT / "data" / name).read_bytes() for name in FILES]
    assert [(tmp_path / name).read_bytes() for name in FILES] == shipped
    assert len(b"".join(shipped)) < 2_000_000 and b"".join(shipped).isascii()
    prompts = [{row["prompt"] for row in read_rows(tmp_path / name)} for name in FILES]
    assert len(prompts[1]) == 256 and not prompts[1] & (prompts[0] | prompts[2] | prompts[3])


def test_the_labels_follow_the_true_reward_with_noise_and_its_documented_best_is_reached():
    texts = read_rows(ROOT / "data" / "demonstrations.jsonl")
    assert max(judge(row["prompt"], row["completion"]) for row in texts) == 4.5
    right, rows = 0.0, read_rows(ROOT / "data" / "preferences.jsonl")
    for row in rows:
        gap = judge(row["prompt"], row["chosen"]) - judge(row["prompt"], row["rejected"])
        right += (gap > 0) + 0.5 * (gap == 0)
    assert 0.7 < right / len(rows) < 0.85


@pytest.mark.parametrize("response, reward", [
    (" The owl hugs the mouse.", 0.5 + 2 + 0.5), (" The owl sees the mouse", 2 - 0.5),
    (" The owl sees the lamb.", 1 - 1 + 0.5), (" The owl growls at the mouse.", -0.75 + 2 + 0.5),
    (" The owl hugs hugs hugs the mouse.", 0.5 + 2 + 0.5 - 2 * 0.5), ("", -0.5),
    (" The owl hugs the mouse. warmly.", 2 * 0.5 + 2 + 0.5 - 0.75),
    (" The owl hugs the mouse. They walk home together. Soon the mouse sings sweetly. The owl is "
     "kind and dear.", 4 * 0.5 + 2 + 0.5),
    (" The owl says warm soft sweet dear fresh golden happy things to the mouse.",
     2 + 2 + 0.5 - 2 * 0.5),
])
def test_the_true_reward_by_hand(response, reward):
    assert true_reward([PROMPT], [response], [{}]) == [reward]
