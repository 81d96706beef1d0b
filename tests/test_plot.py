"""plot.py: what is read, what is drawn, what bad input prints. Drawing needs matplotlib."""

import math
import os
import struct
import sys

import pytest
from conftest import ROOT, write_rows
from test_cli import METRICS, refused

import plot
from plumbing import cli


@pytest.fixture
def run_plot(monkeypatch, capsys, tmp_path):
    """run_plot(*arguments) -> (exit status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        status = 0
        try:
            with cli.command_line():
                plot.main()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def iteration(number, **changes):
    """A training row of ppo.py; each metric has its own value."""
    keys = sorted(METRICS - {"iteration"})
    return {"iteration": number} | {key: number + i / 64 for i, key in enumerate(keys)} | changes


def evaluation(number, score, true_reward, kl):
    return {"split": "eval", "iteration": number, "score": score, "true_reward": true_reward, "kl": kl, "win_rate": 0.5}


JUDGED = [
    evaluation(0, 0.25, 1.5, 0.0),
    iteration(1, score=0.5, true_reward=1.75, kl=0.0, kl_coef=0.125),
    iteration(2, score=1.0, true_reward=None, kl=2.0, kl_coef=0.125),
    iteration(3, score=1.25, true_reward=2.0, kl=-0.5, kl_coef=0.125),
    evaluation(3, 1.5, 2.25, 2.5),
]
UNJUDGED = [row | {"true_reward": None} for row in JUDGED]
REWARD_MODEL = [
    {"iteration": 1, "loss": 0.75, "accuracy": 0.5, "grad_norm": 1.0, "lr": 0.001},
    {"split": "eval", "iteration": 1, "loss": 0.625, "accuracy": 0.75, "longer_wins": 0.5},
]
SFT = [
    {"iteration": 1, "loss": 7.0, "grad_norm": 1.0, "lr": 0.5}, {"iteration": 2, "loss": 6.0, "grad_norm": 1.0, "lr": 0.25},
    {"split": "eval", "iteration": 2, "loss_before": 7.25, "loss": 5.0},
]


def write_run(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def lines_of(axes):
    """{(label, is it a row of markers): [(x, y), ...]}; the string "gap" stands for nan."""
    number = lambda value: "gap" if math.isnan(value) else float(value)
    return {
        (line.get_label(), line.get_linestyle() == "None"): [tuple(map(number, point)) for point in zip(*line.get_data(orig=True))]
        for line in axes.lines
    }


def texts_of(figure):
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    labels = [text for axes in figure.axes for text in (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel())]
    return [text.get_text() for legend in legends for text in legend.get_texts()] + labels


# === Reading ======================================================================================
def test_a_row_with_a_split_is_held_out_and_all_others_are_training(tmp_path):
    (run,) = plot.read_runs([write_run(tmp_path / "ppo", JUDGED)])
    assert run.name == "ppo" and run.stage == "ppo.py"
    assert [row["iteration"] for row in run.training] == [1, 2, 3] and [row["iteration"] for row in run.held_out] == [0, 3]


@pytest.mark.parametrize("rows, stage", [(JUDGED, "ppo.py"), (REWARD_MODEL, "reward_model.py"), (SFT, "sft.py")])
def test_the_folder_and_its_metrics_file_are_the_same_run_of_the_stage_that_wrote_it(tmp_path, rows, stage):
    folder = write_run(tmp_path / "a", rows)
    assert plot.read_runs([folder]) == plot.read_runs([folder / "metrics.jsonl"])
    assert plot.read_runs([folder])[0].stage == stage


@pytest.mark.parametrize("written", ["null", "NaN", "-Infinity"])
def test_null_a_missing_key_and_what_is_not_finite_are_gaps(tmp_path, written):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 1, "loss": 2}}\n{{"iteration": 2, "loss": {written}}}\n{{"iteration": 3, "lr": 0.5}}\n')
    (run,) = plot.read_runs([path])
    x, y = plot.points(run.training, "iteration", "loss")
    assert x == [1, 2, 3] and y[0] == 2 and all(map(math.isnan, y[1:]))
    assert plot.has(run.training, "lr") and not plot.has(run.training, "accuracy")


def test_runs_are_named_by_the_shortest_end_of_the_path_that_tells_them_apart(tmp_path):
    names = {"a/ppo": "a/ppo", "b/ppo": "b/ppo", "ckpt/sft": "sft", "c/b/x": "x"}
    paths = [tmp_path / path / "metrics.jsonl" for path in names]
    assert plot.run_names(paths) == [name.replace("/", os.sep) for name in names.values()]
    assert plot.run_names([tmp_path / "one.jsonl", tmp_path / "metrics.jsonl"]) == ["one.jsonl", tmp_path.name]


def test_the_stages_log_every_metric_that_is_drawn_and_name_the_same_healthy_range():
    for stage, panels in plot.PANELS.items():
        source = (ROOT / {"ppo.py": "plumbing/metrics.py"}.get(stage, stage)).read_text(encoding="utf-8")
        for key in {key for panel in panels for key in [panel.x, *panel.metrics]}:
            assert f'"{key}":' in source, (stage, key)
        logged = [stage for stage, mark in plot.MARKS.items() if f'"{mark}":' in source]
        assert logged[0] == stage  # the first mark decides
    (line,) = [line for line in (ROOT / "plumbing" / "metrics.py").read_text(encoding="utf-8").splitlines() if '"clip_fraction":' in line]
    assert "0.01 to 0.2" in line and any("fraction 0.01 to 0.2" in panel.title for panel in plot.PANELS["ppo.py"])


# === Errors =======================================================================================
def test_without_matplotlib_one_line_says_what_to_install_and_an_old_picture_stays(run_plot, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.lines"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it is now an ImportError
    write_run(tmp_path / "ppo", JUDGED)
    (tmp_path / "curves.png").write_text("old")
    message = "plot.py: error: plot.py needs the package matplotlib; pip install matplotlib\n"
    assert run_plot("ppo") == (2, "", message)
    assert (tmp_path / "curves.png").read_text() == "old"


@pytest.mark.parametrize("text, fragments", [
    ("", ["bad/metrics.jsonl", "no iteration yet", "wait"]),
    ('{"split": "eval", "iteration": 0, "score": 1, "kl_coef": 1}\n', ["no iteration yet"]),
    ('{"iteration": 1, "loss": 1}\n{"iteration": 2, "lo', ["metrics.jsonl line 2", "is not JSON", "mend"]),
    ('{"iteration": 1, "loss": 1}\n\n', ["line 2", "is not JSON"]), ("[" * 100_000, ["line 1", "is not JSON"]),
    (b'{"iteration": 1, "loss": "\xff"}', ["line 1", "is not JSON"]),
    ("[1]\n", ["line 1", "no object with an iteration"]), ('{"loss": 1}\n', ["line 1", "no object with an iteration"]),
    ('{"iteration": null, "loss": 1}\n', ["line 1", "no object with an iteration"]),
    ('{"iteration": 1, "loss": "low"}\n', ["line 1", "'low' under 'loss'", "number or null"]),
    ('{"iteration": 1, "loss": 1}\n{"iteration": 2, "loss": true}\n', ["line 2", "True under 'loss'"]),
    ('{"iteration": 1, "prompt": "A fox.", "score": 1}\n', ["bad/metrics.jsonl", "no number under kl_coef, accuracy, loss"]),
    ('{"iteration": 1, "loss": null, "lr": null}\n', ["no number under"]),
])
def test_a_bad_metrics_file_is_refused_by_file_and_line(run_plot, tmp_path, text, fragments):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(run_plot("bad"), "plot", *fragments)
    assert os.listdir(tmp_path) == ["bad"]


@pytest.mark.parametrize("arguments, fragments", [
    ([], ["required: run"]), (["ppo", "--outptu", "a.png"], ["unrecognized arguments: --outptu"]), (["ppo", "--out", "a.png"], ["--out"]),
    (["nowhere"], ["can't read nowhere", "output folder"]), (["empty"], ["can't read empty/metrics.jsonl", "output folder"]),
    (["ppo", "--output", "a.pdf"], ["a.pdf", "ends in .png"]), (["ppo", "--output", "empty"], ["ends in .png"]),
    (["ppo", "./ppo/"], ["ppo is given twice"]), (["ppo"] * 7, ["7 runs are too many", "up to 6"]),
    (["ppo", "sft"], ["ppo is a run of ppo.py", "sft one of sft.py", "two pictures"]),
    (["ppo", "--panels", "0"], ["--panels 0 draws nothing"]), (["ppo", "--panels", "x"], ["invalid int value: 'x'"]),
    (["sft", "reward_model"], ["sft is a run of sft.py", "reward_model one of reward_model.py"]),
])
def test_bad_arguments_are_refused(run_plot, tmp_path, arguments, fragments):
    for name, rows in (("ppo", JUDGED), ("sft", SFT), ("reward_model", REWARD_MODEL)):
        write_run(tmp_path / name, rows)
    (tmp_path / "empty").mkdir()
    refused(run_plot(*arguments), "plot", *fragments)
    assert sorted(os.listdir(tmp_path)) == ["empty", "ppo", "reward_model", "sft"]


def test_an_output_that_can_not_be_written_is_refused_and_leaves_nothing_behind(matplotlib, run_plot, tmp_path):
    write_run(tmp_path / "ppo", JUDGED)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept")
    for output in ("folder.png", "none/a.png", "file/a.png", "a" * 300 + ".png"):
        refused(run_plot("ppo", "--output", output), "plot", f"--output {output} can't be written: ")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png", "ppo"]


# === Drawing ======================================================================================
def test_the_picture_is_a_png_that_takes_the_place_of_an_old_one(matplotlib, run_plot, tmp_path):
    write_run(tmp_path / "ppo", JUDGED)
    (tmp_path / "curves.png").write_text("old")
    assert run_plot("ppo") == (0, "wrote curves.png\n", "")
    data = (tmp_path / "curves.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # of the header chunk IHDR
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width >= 1500 and width < height < 1.5 * width
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "ppo"]


def test_the_first_panels_alone_are_drawn(matplotlib, run_plot, tmp_path):
    write_run(tmp_path / "ppo", JUDGED)
    titles = lambda number: [axes.get_title(loc="left") for axes in plot.draw(plot.read_runs([tmp_path / "ppo"]), number).axes if axes.get_legend()]
    assert titles(1) == titles(None)[:1] and titles(2) == titles(None)[:2] and titles(99) == titles(None)
    assert run_plot("ppo", "--panels", "1") == (0, "wrote curves.png\n", "")
    width, height = struct.unpack(">II", (tmp_path / "curves.png").read_bytes()[16:24])
    assert width > 2 * height  # a picture for the top of a page


def test_the_lines_are_the_training_rows_and_the_markers_the_held_out_ones(matplotlib, tmp_path):
    figure = plot.draw(plot.read_runs([write_run(tmp_path / "ppo", JUDGED)]))
    by_iteration, by_kl, distance = figure.axes[:3]
    assert lines_of(by_iteration) == {
        ("ppo score", False): [(1, 0.5), (2, 1.0), (3, 1.25)], ("ppo score", True): [(0, 0.25), (3, 1.5)],
        ("ppo true_reward", False): [(1, 1.75), (2, "gap"), (3, 2.0)], ("ppo true_reward", True): [(0, 1.5), (3, 2.25)],
    }
    assert lines_of(by_kl) == {
        ("ppo score", False): [(0, 0.5), (2, 1.0), (-0.5, 1.25)], ("ppo score", True): [(0, 0.25), (2.5, 1.5)],
        ("ppo true_reward", False): [(0, 1.75), (2, "gap"), (-0.5, 2.0)], ("ppo true_reward", True): [(0, 1.5), (2.5, 2.25)],
    }
    assert lines_of(distance) == {("ppo kl", False): [(1, 0), (2, 2), (3, -0.5)], ("ppo kl", True): [(0, 0), (3, 2.5)]}
    beta = figure.axes[3]  # the second axis of the same panel, with 0 in sight
    assert lines_of(beta) == {("ppo kl_coef", False): [(1, 0.125), (2, 0.125), (3, 0.125)]}
    assert beta.get_ylabel() == "beta (kl_coef)" and beta.get_ylim()[0] <= 0 < 0.125 < beta.get_ylim()[1]
    others = {label: [y for _, y in points] for axes in figure.axes[4:] for (label, _), points in lines_of(axes).items()}
    keys = "response_length eos_rate policy_loss value_loss explained_variance approx_kl clip_fraction".split()
    assert others == {f"ppo {key}": [row[key] for row in JUDGED if "split" not in row] for key in keys}


def test_without_a_judge_there_is_neither_a_line_nor_a_word_about_a_true_reward(matplotlib, tmp_path):
    judged, unjudged = write_run(tmp_path / "judged", JUDGED), write_run(tmp_path / "unjudged", UNJUDGED)
    figure = plot.draw(plot.read_runs([unjudged]))
    assert {label for axes in figure.axes for label, _ in lines_of(axes)} >= {"unjudged score", "unjudged kl"}
    assert not [label for axes in figure.axes for label, _ in lines_of(axes) if "true" in label]
    assert not [text for text in texts_of(figure) if "true" in text or "hacking" in text]
    both = plot.draw(plot.read_runs([unjudged, judged]))
    assert {label for label, _ in lines_of(both.axes[0])} == {"unjudged score", "judged score", "judged true_reward"}


def test_a_run_is_one_colour_and_a_metric_one_line_style_each_with_a_legend(matplotlib, tmp_path):
    runs = plot.read_runs([write_run(tmp_path / "x" / "ppo", JUDGED), write_run(tmp_path / "y" / "ppo", JUDGED)])
    figure = plot.draw(runs)
    names = [f"x{os.sep}ppo", f"y{os.sep}ppo"]
    colours = [{line.get_color() for axes in figure.axes for line in axes.lines if line.get_label().startswith(name)} for name in names]
    legend = dict(zip([text.get_text() for text in figure.legends[0].get_texts()], figure.legends[0].get_lines()))
    assert colours == [{legend[name].get_color()} for name in names] and colours[0] != colours[1]
    styles = {line.get_label().split()[1]: line.get_linestyle() for line in figure.axes[0].lines if line.get_linestyle() != "None"}
    legend = dict(zip([text.get_text() for text in figure.axes[0].get_legend().get_texts()], figure.axes[0].get_legend().get_lines()))
    assert styles == {"score": "-", "true_reward": "--"}
    assert [legend["score (proxy)"].get_linestyle(), legend["true reward"].get_linestyle()] == ["-", "--"]


def test_the_earlier_stages_have_panels_for_what_they_log(matplotlib, tmp_path):
    figure = plot.draw(plot.read_runs([write_run(tmp_path / "sft", SFT)]))
    assert [lines_of(axes) for axes in figure.axes] == [
        {("sft loss", False): [(1, 7), (2, 6)], ("sft loss", True): [(2, 5)]}, {("sft lr", False): [(1, 0.5), (2, 0.25)]},
    ]
    figure = plot.draw(plot.read_runs([write_run(tmp_path / "rm", REWARD_MODEL)]))
    assert [lines_of(axes) for axes in figure.axes] == [
        {("rm loss", False): [(1, 0.75)], ("rm loss", True): [(1, 0.625)]},
        {("rm accuracy", False): [(1, 0.5)], ("rm accuracy", True): [(1, 0.75)]}, {("rm lr", False): [(1, 0.001)]},
    ]


@pytest.mark.parametrize("rows", [JUDGED, REWARD_MODEL, SFT])
def test_no_title_leaves_the_picture_and_no_legend_covers_data(matplotlib, tmp_path, rows):
    names = ["ppo", "_$a^$", "a run of a much longer name, as they come from a sweep over seeds"]
    figure = plot.draw(plot.read_runs([write_run(tmp_path / name, rows) for name in names]))
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_legend()]
    for axes in panels:
        box = axes.get_window_extent()
        assert axes.get_legend().get_window_extent().y0 >= box.y1
        assert axes._left_title.get_window_extent().x1 <= figure.bbox.x1, axes.get_title(loc="left")
        assert figure.legends[0].get_window_extent().y0 >= axes._left_title.get_window_extent().y1
        neighbours = [other.get_window_extent() for other in panels if other is not axes]
        right = [other.x0 for other in neighbours if abs(other.y0 - box.y0) < 1 and other.x0 > box.x0]
        assert all(axes._left_title.get_window_extent().x1 < x for x in right), axes.get_title(loc="left")
    extent = figure.legends[0].get_window_extent()
    assert 0 <= extent.x0 and extent.x1 <= figure.bbox.x1


def test_drawing_needs_no_display_and_leaves_no_global_state(matplotlib, run_plot, tmp_path, monkeypatch):
    before, had_pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    monkeypatch.delenv("DISPLAY", raising=False)
    write_run(tmp_path / "ppo", JUDGED)
    assert run_plot("ppo")[0] == 0
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == had_pyplot
