"""Several processes by torchrun: the same results as one, and an end that is told once, by whoever ends first."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from conftest import DEMONSTRATIONS, PREFERENCES, PROMPTS, ROOT, read_rows, write_rows
from test_resume import TIMES, contents
from test_rewards import save_encoder

import common
from plumbing import processes

SEVERAL = str(ROOT / "tests" / "several.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LENGTHS = "def reward(prompts, responses, rows):\n    longest = max(map(len, responses))\n    return [len(r) / longest for r in responses]\n"


def torchrun(count, *command, **options):
    """A run of `count` processes; the rendezvous takes a free port."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, start)), env=ENVIRONMENT, cwd=ROOT, **pipes | options)


def ppo_flags(folder, *more):
    """["ppo", flag, value, ...]; a flag that is given in `more` replaces the one here."""
    data = ["--policy", folder / "sft", "--reward", folder / "reward_model", "--prompts", folder / "prompts.jsonl",
            "--eval-prompts", folder / "few.jsonl", "--batch-size", 8, "--minibatch-size", 4, "--microbatch-size", 2,
            "--response-length", 6, "--lr", 1e-3, "--device", "cpu", "--iterations", 2, "--eval-every", 1]
    flags = {}
    for word in map(str, [*data, *more]):
        if word.startswith("--"):
            name = word
            flags[name] = []
        flags[name].append(word)
    return ["ppo", *sum(flags.values(), [])]


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """{number of processes: folder of the runs}; one start of torchrun has all kinds of runs."""
    folder = tmp_path_factory.mktemp("several")
    for name in ("sft", "reward_model"):
        (folder / name).symlink_to(world / name)
    write_rows(folder / "prompts.jsonl", PROMPTS)
    write_rows(folder / "few.jsonl", PROMPTS[:1])  # fewer rows than processes
    write_rows(folder / "sft.jsonl", DEMONSTRATIONS[:17])  # a last batch of one row
    write_rows(folder / "pairs.jsonl", PREFERENCES[:17])
    (folder / "lengths.py").write_text(LENGTHS)
    save_encoder(folder / "encoder")  # reads texts
    data = lambda name: ["--model", folder / "sft", "--data", folder / name, "--eval-data", folder / name, "--batch-size", 8,
                         "--microbatch-size", 2, "--epochs", 1, "--lr", 1e-3, "--device", "cpu"]
    commands = {
        "sft": ["sft", *data("sft.jsonl")], "reward_model": ["reward_model", *data("pairs.jsonl")],
        "gae": ppo_flags(folder), "adaptive": ppo_flags(folder, "--kl-target", 0.01, "--kl-coef", 0.3, "--max-approx-kl", 1e-3),
        "shared": ppo_flags(folder, "--critic", "shared", "--advantage", "bandit", "--entropy-coef", 0.01),
        "function": ppo_flags(folder, "--reward", f"{folder / 'lengths.py'}:reward", folder / "reward_model", "--judge", f"{folder / 'lengths.py'}:reward"),
        "elsewhere": ppo_flags(folder, "--reward", folder / "encoder"),
    }
    for count in (1, 3):
        named = [[*command, "--output", folder / f"{count}" / name] for name, command in commands.items()]
        (folder / f"{count}.json").write_text(json.dumps([list(map(str, command)) for command in named]))
    alone = subprocess.run([sys.executable, SEVERAL, folder / "1.json"], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert alone.returncode == 0, alone.stderr
    run = torchrun(3, SEVERAL, folder / "3.json")
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert out.count("wrote ") == len(commands), out  # rank 0 alone prints
    return folder


@pytest.mark.parametrize("name", ["sft", "reward_model", "gae", "adaptive", "shared", "function", "elsewhere"])
def test_three_processes_change_no_metric_and_no_weight(name, results):
    one, many = results / "1" / name, results / "3" / name
    rows, others = read_rows(one / "metrics.jsonl"), read_rows(many / "metrics.jsonl")
    assert len(rows) == len(others) > 1 and all(row.keys() == other.keys() for row, other in zip(rows, others))
    for row, other in zip(rows, others):
        for key in row.keys() - TIMES - {"split"}:
            same = row[key] if row[key] is None else pytest.approx(row[key], rel=1e-6, abs=1e-9)
            assert other[key] == same, (key, row["iteration"])
    moved = 0.0
    for path in one.rglob("*.safetensors"):
        begun = {k: v.double() for k, v in safetensors.torch.load_file(results / "sft" / "model.safetensors").items()}
        ours, theirs = (safetensors.torch.load_file(folder / path.relative_to(one)) for folder in (one, many))
        assert ours.keys() == theirs.keys() and {v.dtype for v in ours.values()} == {torch.empty(0, dtype=torch.double).dtype}
        for key, value in ours.items():
            assert torch.allclose(value, theirs[key], rtol=0, atol=1e-6), key
            moved = max(moved, (value - begun[key]).abs().max().item() if key in begun else 0.0)
    assert moved > 1e-4  # something was learned


def test_shares_cover_all_rows_once_and_none_is_left_where_there_are_fewer(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rows in ([], [5], list(range(10)), torch.arange(10)):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
            shares.append([int(row) for row in common.share(rows)])
        assert sorted(sum(shares, [])) == [int(row) for row in rows]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    assert list(common.parts_by_length(torch.ones(2, 4).bool(), torch.arange(2), 1)) == []


def test_alone_nothing_is_shared_or_added():
    rows, tensor, numbers = [1, 2, 3], torch.ones(2), {"loss": 1.5}
    assert common.share(rows) is rows and common.total(tensor) is tensor
    assert processes.add_up([], numbers) is numbers and processes.agree(7) == 7 and processes.may_speak()
    assert processes.device_of("cuda") == "cuda" and processes.device_of("cuda:1") == "cuda:1"


def test_each_process_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(processes, "IS_TORCHRUN", True)
    monkeypatch.setattr(processes, "LOCAL_RANK", 2)
    names = ("cuda", "cuda:0", "cuda:4", "cpu")
    assert [processes.device_of(name) for name in names] == ["cuda:2", "cuda:2", "cuda:6", "cpu"]


def a_run(world, tmp_path, *more, iterations=200):
    flags = ["--eval-prompts", world / "prompts.jsonl", "--iterations", iterations, "--save-every", 3, "--output", tmp_path / "run", *more]
    return [ROOT / "ppo.py", *ppo_flags(world, *flags)[1:]]


def wait_for_iteration(run, folder, number):
    log, since = folder / "metrics.jsonl", time.monotonic()
    while not (log.exists() and log.read_text().count("\n") > number):
        assert run.poll() is None and time.monotonic() - since < 60, run.communicate()[1]
        time.sleep(0.02)


def workers_of(run):
    """The process ids of what torchrun has started, by rank."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/environ", "rb") as environ:
                if int(stat.read().rpartition(")")[2].split()[1]) == run.pid:
                    found[int(re.search(rb"\0RANK=(\d+)", environ.read())[1])] = int(pid)
        except (OSError, TypeError):
            pass  # it has ended, or is no worker
    return found


def ours(err):
    """The lines of the stages themselves; torchrun adds a report of its own."""
    return [line for line in err.splitlines() if line.startswith("ppo.py")]


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the processes in /proc")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_to_torchrun_stops_all_after_the_iteration_and_resume_goes_on_to_the_same_end(number, world, tmp_path):
    run = torchrun(2, *a_run(world, tmp_path, iterations=9))
    wait_for_iteration(run, tmp_path / "run", 4)
    since = time.monotonic()
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert time.monotonic() - since < 60
    assert err.count("stopping after this iteration") == 1 and err.count("stopped; to go on: torchrun --nproc-per-node 2 ppo.py --resume") == 1, err
    assert "Traceback (most recent call last):\n  File \"" + str(ROOT / "ppo.py") not in err
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    state = torch.load(checkpoint / "trainer_state" / "state.pt", weights_only=True)
    assert state["step"] == int(checkpoint.name.partition("-")[2]) and state["processes"] == 2
    if number == signal.SIGTERM:
        whole = torchrun(2, *a_run(world, tmp_path / "other", iterations=9))
        assert whole.wait(timeout=100) == 0
        resumed = torchrun(2, ROOT / "ppo.py", "--resume", "--output", tmp_path / "run")
        assert resumed.wait(timeout=100) == 0
        assert contents(tmp_path / "run") == contents(tmp_path / "other" / "run")


@needs_proc
@pytest.mark.parametrize("rank", [1])
def test_a_process_that_is_killed_ends_the_others_with_one_line_and_leaves_a_whole_checkpoint(rank, world, tmp_path):
    run = torchrun(2, *a_run(world, tmp_path))
    wait_for_iteration(run, tmp_path / "run", 9)  # two rows an iteration; the third was saved
    os.kill(workers_of(run)[rank], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    [line] = ours(err)
    assert "another process of the run has ended" in line and "torchrun --nproc-per-node 2 ppo.py --resume --output" in line
    alone = subprocess.run([sys.executable, ROOT / "ppo.py", "--resume", "--output", tmp_path / "run", "--iterations", "8"], env=ENVIRONMENT, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert "1 processes, 2 before" in alone.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_is_told_once_and_ends_all(rank, world, tmp_path):
    body = f"import os\ndef reward(prompts, responses, rows):\n    if len(rows) == 8 and os.path.exists({str(tmp_path / 'now')!r}): raise ZeroDivisionError('mine')\n    return [1.0 for r in rows]\n"
    (tmp_path / "mine.py").write_text(body)
    more = ["--reward", f"{tmp_path / 'mine.py'}:reward"] if rank == 0 else ["--reward", world / "reward_model"]
    program = ROOT / "ppo.py"
    if rank == 1:  # memory runs out there
        program = tmp_path / "ppo.py"
        program.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport os, torch, ppo\nfrom plumbing import cli, processes\nforward = ppo.forward_responses\n"
            f"def scarce(*args, **kwargs):\n    if processes.RANK == 1 and os.path.exists({str(tmp_path / 'now')!r}): raise torch.OutOfMemoryError('CUDA out of memory')\n    return forward(*args, **kwargs)\n"
            "ppo.forward_responses = scarce\nwith cli.command_line():\n    ppo.main(cli.parse_args(ppo.Config, ''))\n"
        )
    run = torchrun(2, program, *a_run(world, tmp_path, *more)[1:])
    wait_for_iteration(run, tmp_path / "run", 4)
    (tmp_path / "now").touch()
    _, err = run.communicate(timeout=60)
    [line] = ours(err)
    expected = "reward() failed: ZeroDivisionError: mine" if rank == 0 else "process 1: error: out of memory"
    assert expected in line and run.returncode != 0


@pytest.mark.parametrize("more, message", [
    (["--minibatch-size", 2], "3 processes share 2 rows of an optimizer step"),  # before they have met, and after
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
])
def test_bad_input_is_told_once(more, message, world, tmp_path):
    run = torchrun(3, *a_run(world, tmp_path, *more))
    _, err = run.communicate(timeout=60)
    [line] = ours(err)
    assert message in line and not (tmp_path / "run").exists()
