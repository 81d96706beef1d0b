"""plot.py: what is read, what is drawn, what bad input prints. Drawing needs matplotlib."""

import math
import os
import pathlib
import re
import struct
import sys

import pytest
from conftest import ROOT, write_rows

import plot

KEYS = sorted({key for panel in plot.PANELS["ppo.py"] for key in panel.metrics})


def iteration(number, **changes):
    """Returns a training row of ppo.py in which each metric has its own value."""
    return {"iteration": number} | {key: number + i / 64 for i, key in enumerate(KEYS)} | changes


RUNS = {
    "ppo": [
        {"split": "eval", "iteration": 0, "score": 0.25, "true_reward": 1.5, "kl": 0.0},
        iteration(1, true_reward=None), iteration(2, score=math.nan, true_reward=-math.inf),
        iteration(3, kl=-0.5),  # what is no finite number is a gap
        {"split": "eval", "iteration": 3, "score": 1.5, "true_reward": 2.25, "kl": 2.5},
    ],
    "reward_model": [
        {"iteration": 1, "loss": 0.75, "accuracy": 0.5, "lr": 0.001},
        {"split": "eval", "iteration": 1, "loss": 0.625, "accuracy": 0.75},
    ],
    "sft": [{"iteration": 1, "loss": 7.0, "lr": 0.5}, {"split": "eval", "iteration": 1, "loss": 5.0}],
}
RUNS["_$a^$"] = [row | {"true_reward": None} for row in RUNS["ppo"]]  # without a judge


def lines_of(axes):
    """Returns {(label, is it a row of markers): [(x, y), ...]}; None stands for a gap."""
    lines = {}
    for line in axes.lines:
        points = [(x, None if math.isnan(y) else y) for x, y in zip(*line.get_data(orig=True))]
        lines[line.get_label(), line.get_linestyle() == "None"] = points
    return lines


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """The runs, in the folder that is current."""
    monkeypatch.chdir(tmp_path)
    for name, rows in RUNS.items():
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "metrics.jsonl", rows)


@pytest.fixture
def run_plot(monkeypatch, capsys):
    """run_plot(*arguments) -> what an error prints, or "" after a picture."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot.py", *arguments])
        try:
            plot.main()
        except SystemExit as stop:
            assert stop.code == 2 and not os.path.exists("curves.png")
        return capsys.readouterr().err

    return run


def test_runs_are_named_by_the_shortest_end_of_the_path_that_tells_them_apart():
    paths = [pathlib.Path(name) for name in ("a/ppo/metrics.jsonl", "b/ppo/metrics.jsonl", "x/sft", "one.jsonl")]
    assert plot.run_names(paths) == [os.path.join("a", "ppo"), os.path.join("b", "ppo"), "sft", "one.jsonl"]


def test_the_stages_log_every_metric_that_is_drawn_and_name_the_same_healthy_range():
    for stage, panels in plot.PANELS.items():
        source = (ROOT / stage).read_text(encoding="utf-8")
        for key in {key for panel in panels for key in [panel.x, *panel.metrics]}:
            assert f'"{key}":' in source or f"            {key}=" in source, (stage, key)
        assert f'"{plot.MARKS[stage]}":' in source
    assert re.search(r"clip_fraction[^.]{,60} 0\.01 to 0\.2", (ROOT / "ppo.py").read_text())
    assert any("fraction 0.01 to 0.2" in panel.title for panel in plot.PANELS["ppo.py"])


@pytest.mark.parametrize("text, problem", [
    ("", "no iteration yet"), ('{"split": "eval", "iteration": 0}', "no iteration yet"),
    ('{"iteration": 1, "loss": 1}\n{"iteration": 2, "lo', "line 2 is not JSON"),
    ("[" * 100_000, "line 1 is not JSON"), ('{"loss": "\udcff"}', "line 1 is not JSON"),
    ("[1]", "line 1 is no object with an iteration"), ('{"loss": 1}', "no object with an iter"),
    ('{"iteration": 1, "loss": "low"}', "line 1 has 'low' under 'loss'"),
    ('{"iteration": 1, "loss": true}', "has True under 'loss'"),
    ('{"iteration": 1, "loss": null}', "no number under kl_coef, accuracy, loss"),
])
def test_a_bad_metrics_file_is_refused_by_file_and_line(run_plot, text, problem):
    pathlib.Path("sft/metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    error = run_plot("sft")
    assert error.startswith("plot.py: error: sft/metrics.jsonl") and error.count("\n") == 1
    assert problem in error


@pytest.mark.parametrize("arguments, problem", [
    ([], "required: run"), (["ppo", "--out", "x.png"], "--out"), (["no"], "can't read no:"),
    (["ppo", "--output", "a.pdf"], "ends in .png"), (["ppo", "./ppo/"], "ppo is given twice"),
    (["ppo"] * 7, "7 runs are too many"), (["ppo", "--panels", "0"], "--panels"),
    (["ppo", "sft"], "ppo is a run of ppo.py and sft one of sft.py"),
    (["ppo", "--output", "none/a.png"], "can't write none/a.png"),
])
def test_bad_arguments_are_refused(run_plot, arguments, problem):
    pytest.importorskip("matplotlib")
    assert problem in run_plot(*arguments).splitlines()[-1] and len(os.listdir()) == 4


def test_matplotlib_draws_a_picture_and_without_it_one_line_says_what_to_install(run_plot, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # its import is an ImportError
        assert run_plot("ppo") == "plot.py: error: plot.py needs the package matplotlib; pip install matplotlib\n"
    pytest.importorskip("matplotlib")
    for flags, ratio in ([], (0.6, 1)), (["--panels", "1"], (2, 3)):  # high, and wide
        assert run_plot("ppo", *flags) == ""
        data = pathlib.Path("curves.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # of the header chunk IHDR
        assert data.startswith(b"\x89PNG") and ratio[0] < width / height < ratio[1] and width > 1500


@pytest.mark.parametrize("name", ["ppo", "reward_model", "sft"])
def test_the_lines_are_the_training_rows_and_the_markers_the_held_out_ones(name):
    pytest.importorskip("matplotlib")
    [run] = plot.read_runs([name])
    axes = plot.draw([run]).axes
    if name == "ppo":
        points = [(row["kl"], row["score"]) for row in (RUNS["ppo"][0], RUNS["ppo"][-1])]
        assert lines_of(axes.pop(1))["ppo score", True] == points
        assert axes[2].get_ylabel() == "beta (kl_coef)" and axes[2].get_ylim()[0] <= 0  # 0 is in sight
    drawn, expected = {}, {}
    for each in axes:
        drawn |= lines_of(each)
    for key in {key for panel in plot.PANELS[run.stage] for key in panel.metrics}:
        for is_held_out, rows in ((False, run.training), (True, run.held_out)):
            if any(key in row for row in rows):
                expected[f"{name} {key}", is_held_out] = [(row["iteration"], row[key]) for row in rows]
    assert drawn == expected
    assert name != "ppo" or [y for _, y in drawn["ppo true_reward", False][:2]] == [None, None]


def test_a_run_is_one_colour_a_metric_one_style_and_no_judge_is_not_spoken_of():
    pytest.importorskip("matplotlib")
    figure = plot.draw(plot.read_runs(["ppo", "_$a^$"]))
    looks = {}
    for line in figure.axes[0].lines:
        if line.get_linestyle() != "None":
            looks[line.get_label()] = (line.get_color(), line.get_linestyle())
    blue, orange = plot.COLOURS[:2]
    assert looks == {"ppo score": (blue, "-"), "ppo true_reward": (blue, "--"), "_$a^$ score": (orange, "-")}
    figure.draw_without_rendering()  # names of runs are not read as formulas
    for axes in figure.axes[:2]:  # legends lie above the data, and titles end in the picture
        assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1
        assert axes._left_title.get_window_extent().x1 <= figure.bbox.x1
    titles = [axes.get_title(loc="left") for axes in plot.draw(plot.read_runs(["_$a^$"])).axes]
    assert "score (proxy)" in titles and "hacking" not in str(titles)
