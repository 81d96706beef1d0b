"""The example of a real instruct model: its prompts, its reward, and what is measured."""

import json
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, read_rows

HERE = ROOT / "examples" / "instruct"
sys.path.append(str(HERE))
import make_data  # noqa: E402
import measure  # noqa: E402
import reward  # noqa: E402


def test_the_script_writes_its_rows_whose_held_out_topics_and_new_kinds_are_not_trained_on(tmp_path):
    subprocess.run([sys.executable, HERE / "make_data.py", tmp_path], check=True)
    files = {path.stem: read_rows(path) for path in tmp_path.iterdir()}
    assert {name: len(rows) for name, rows in files.items()} == {
        "prompts": 512, "heldout_prompts": 96, "new_kinds_prompts": 64,
    }
    assert files["prompts"] == make_data.make_data()["prompts.jsonl"]  # the same each time
    kinds = {}
    for name, rows in files.items():
        texts = [row["prompt"][0]["content"] for row in rows]
        assert len(set(texts)) == len(rows)
        for text, row in zip(texts, rows):
            (first, a), (second, b) = row["instructions"]
            assert first != second and {first, second} not in make_data.CONFLICTS
            for value in (a, b):
                assert value is None or str(value) in text
            kinds.setdefault(name, set()).update([first, second])
            topics = make_data.TOPICS if name == "prompts" else make_data.HELDOUT_TOPICS
            requests = [request.format(topic) for request in make_data.REQUESTS for topic in topics]
            assert any(text.startswith(f"{request} ") for request in requests)
    assert kinds["prompts"] == kinds["heldout_prompts"] == set(make_data.KINDS)
    assert kinds["new_kinds_prompts"] - kinds["prompts"] == {"capitals", "question"}
    assert not set(make_data.TOPICS) & set(make_data.HELDOUT_TOPICS)
    assert all(row["instructions"][0][0] in make_data.NEW_KINDS for row in files["new_kinds_prompts"])


@pytest.mark.parametrize("kind, value, good, bad", [
    ("words", 3, "Foxes don't bark.", "Foxes do not bark."),
    ("sentences", 2, 'They run. He said "Go!"', "They run. They sleep. The end"),
    ("sentences", 2, "They cost 2.5 cents. So what?", "They cost 2.5 cents each."),
    ("include", "golden", "A GOLDEN fox ran.", "A goldenrod fox ran."),
    ("avoid", "a", "The fox ran away.", "The fox saw a hen."),
    ("begin", "Maybe", '"maybe" foxes run.', "Foxes maybe run."),
    ("end", "good night", "Foxes run. Good night!", "Good night, dear foxes."),
    ("lowercase", None, "foxes run far.", "Foxes run far."),
    ("capitals", None, "FOXES RUN FAR.", "FOXES run FAR."),
    ("question", None, 'Do foxes run?"', "Do foxes run? Yes."),
])
def test_an_instruction_is_obeyed_by_the_text_that_obeys_it_and_not_by_the_other(kind, value, good, bad):
    assert reward.obeys(good, kind, value) and not reward.obeys(bad, kind, value)
    for too_short in ("", "  ", "Go on", "?", "2 3 4 5"):  # no answer at all
        assert not reward.obeys(too_short, kind, value)


def test_the_score_is_the_share_of_instructions_that_are_obeyed_and_a_table_counts_them_by_kind():
    row = {"instructions": [["lowercase", None], ["words", 4]]}
    other = {"instructions": [["question", None], ["words", 9]]}
    texts = ["foxes run far", "Foxes run very far away", "Foxes run very far", "Do foxes run far?"]
    rows = [row, row, row, other]
    assert reward.obeyed([""] * 4, texts, rows) == [1.0, 0.0, 0.5, 1.0]
    kinds = {"lowercase": [1, 3], "words": [3, 4], "question": [1, 1]}
    assert measure.summarize(rows, texts) == {
        "score": 0.625, "first": 0.5, "both": 0.5, "words": 4.0, "kinds": kinds,
    }
    with pytest.raises(ValueError, match="unknown kind"):
        reward.obeys("foxes run far", "rhyme", None)
    with pytest.raises(ValueError):
        reward.obeyed([""], texts[:3], rows)  # a text for each row


def test_the_tables_of_the_page_are_those_of_the_results():
    page = (HERE / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "docs" / "results" / "instruct.json").read_text(encoding="utf-8"))
    measured = list(results["measured"].values())  # one for each seed

    def cell(name, file, key, digits=2):
        values = [each[name][file][key] for each in measured if name in each]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and any(values) else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = {"before": "before", "PPO": "PPO", "PPO, 1e-5": "PPO, `--lr 1e-5`"}
    lines["PPO, minibatches of 16"] = "PPO, `--minibatch-size 16`"
    lines |= {"rejection sampling": "rejection sampling", "best of 8": "best of 8, chosen by the reward"}
    for name, line in lines.items():
        cells = [cell(name, "heldout", "score"), cell(name, "heldout", "both"), cell(name, "new_kinds", "first")]
        cells.append(cell(name, "heldout", "words", 0))
        cells.append("" if name == "best of 8" else cell(name, "heldout", "kl"))
        assert f"| {line} | {' | '.join(cells)}".rstrip() in page
    for start in ("3e-5", "1e-5", "minibatches"):
        seconds = [run["cpu_seconds"] for name, run in results["ppo"].items() if name.startswith(start)]
        assert f"| {statistics.mean(seconds):.0f} |" in page and len(seconds) == 3
    rejection = [run["cpu_seconds_sampling"] + run["cpu_seconds_sft"] for run in results["rejection"].values()]
    assert f"| {statistics.mean(rejection):.0f} |" in page
    for start, words in (("3e-5", "was {}, {} and {} in the first"), ("1e-5", "it was {}, {} and {}. All")):
        runs = [run for name, run in results["ppo"].items() if name.startswith(start)]
        firsts = [f"{run['iterations'][0]['approx_kl']:.3f}" for run in runs]
        assert words.format(*firsts) in " ".join(page.split())
    changes = [
        seed["PPO, minibatches of 16"]["heldout"]["score"] - seed["PPO"]["heldout"]["score"] for seed in measured
    ]
    difference = f"a difference of {statistics.mean(changes):.2f} ± {statistics.stdev(changes):.2f}"
    assert difference in " ".join(page.split())
    for kind, line in {
        "words": "at most so many words", "avoid": "without a word", "include": "with a word",
        "begin": "begin with a word", "end": "end with two words", "lowercase": "lowercase letters only",
        "sentences": "exactly so many sentences", "question": "new: end with a question mark",
        "capitals": "new: capital letters only",
    }.items():
        shares = []
        for name in ("before", "PPO", "rejection sampling", "best of 8"):
            files = [file["kinds"] for each in measured if name in each for file in each[name].values()]
            counts = [kinds[kind] for kinds in files if kind in kinds]
            shares.append(f"{sum(kept for kept, _ in counts) / sum(number for _, number in counts):.2f}")
        assert f"| {line} | {' | '.join(shares)} |" in page


def test_the_answers_that_the_page_shows_have_the_score_that_it_says():
    page = (HERE / "README.md").read_text(encoding="utf-8")
    rows = {row["prompt"][0]["content"]: row for file in make_data.make_data().values() for row in file}
    perfect = page.partition("the checker calls perfect")[2].splitlines()
    answers = [line.strip("| ").split(" | ")[:2] for line in perfect if line.startswith("| ")][1:]
    assert len(answers) == 10
    for prompt, answer in answers:
        assert reward.obeyed([prompt], [answer], [rows[prompt]]) == [1.0], answer
