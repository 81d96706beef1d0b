"""The search for the micro-batch size, on a GPU that is only imagined: its memory, its clock, its processes."""

import collections
import functools
import gc
import multiprocessing
import os
import socket
import types
import weakref

import pytest
import torch
import torch.distributed as dist

import common
import harness

FREE = 64  # rows fill the imagined GPU


class Gpu:
    """Takes `seconds_of(rows)` for a pass over that many rows, of which `room` fit. Counts all passes in `tried`."""

    def __init__(self, monkeypatch, room=FREE, seconds_of=lambda rows: 1.0):
        self.room, self.seconds_of, self.now = room, seconds_of, 0.0
        self.tried, self.events, self.held = [], [], None
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty_cache)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.room - self.tried[-1], self.room))
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def empty_cache(self):
        self.events.append(("empty", self.held is None or self.held() is None))

    def try_size(self, rows):
        self.tried.append(rows)
        self.now += self.seconds_of(rows)
        taken = torch.zeros(rows)
        loop = [taken]
        loop.append(loop)  # only a garbage collection frees it, or the end of the frame
        self.held = weakref.ref(taken)
        if rows > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loop.clear()


def a_run(given=None, device="cuda", **kept):
    """Returns (what the search reads of a harness.Run, an optimizer that has made no step)."""
    weight = torch.nn.Parameter(torch.ones(3))
    cfg = types.SimpleNamespace(microbatch_size=given)
    run = types.SimpleNamespace(cfg=cfg, kept=kept, device=torch.device(device), seconds=collections.Counter())
    run.entered = ("loading", 0.0)
    run.phase = functools.partial(harness.Run.phase, run)
    return run, torch.optim.AdamW([weight], lr=1.0, weight_decay=0.5)


def choose(gpu, largest=32, given=None, device="cuda", **kept):
    run, optimizer = a_run(given, device, **kept)
    return harness.choose_microbatch_size(run, optimizer, 16, largest, gpu.try_size)


def twice(*sizes):
    return [size for size in sizes for _ in range(2)]


def test_sizes_double_up_to_the_largest_and_each_is_warmed_up_and_timed_once(monkeypatch, capsys):
    gpu = Gpu(monkeypatch)
    assert choose(gpu) == 32 and gpu.tried == twice(1, 2, 4, 8, 16, 32)
    assert capsys.readouterr().out == "  micro-batch size 32, chosen by the dry run\n"
    for largest, sizes in (1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (48, (1, 2, 4, 8, 16, 32, 48)):
        gpu = Gpu(monkeypatch)
        assert choose(gpu, largest) == largest and gpu.tried == twice(*sizes)


@pytest.mark.parametrize("room, chosen, tried", [
    (0, None, [1]), (1, 1, [*twice(1), 2]), (2, 1, twice(1, 2)), (3, 2, [*twice(1, 2), 4]),
    (9, 4, twice(1, 2, 4, 8)), (10, 8, [*twice(1, 2, 4, 8), 16]),  # 8 rows fill 89 and 80 %
])
def test_15_percent_of_the_memory_stays_free_except_with_a_single_row(room, chosen, tried, monkeypatch, capsys):
    gpu = Gpu(monkeypatch, room)
    if chosen:
        assert choose(gpu) == chosen
    else:
        flags = "--gradient-checkpointing, --lora-rank or, in ppo.py, --critic shared"
        with pytest.raises(common.UserError, match=f"single row: give {flags}"):
            choose(gpu)
    assert gpu.tried == tried and len(capsys.readouterr().out.splitlines()) == bool(chosen)


@pytest.mark.parametrize("gain, chosen", [(1.04, 4), (1.06, 8), (0.5, 4)])
def test_a_size_that_is_hardly_faster_is_not_taken(gain, chosen, monkeypatch):
    rates = {1: 1.0, 2: 2.0, 4: 4.0, 8: 4.0 * gain, 16: 4.0 * gain, 32: 99.0}  # rows per second
    gpu = Gpu(monkeypatch, seconds_of=lambda rows: rows / rates[rows])
    assert choose(gpu) == chosen and gpu.tried[-1] == 2 * chosen


def test_the_first_pass_at_a_size_is_not_timed(monkeypatch):
    gpu = Gpu(monkeypatch, seconds_of=lambda rows: 1.0 if len(gpu.tried) % 2 == 0 else 1000.0 * rows**2)
    assert choose(gpu) == 32


def test_what_a_pass_without_memory_held_is_freed_and_the_cache_is_emptied_after_each_size(monkeypatch):
    gc.disable()
    try:
        gpu = Gpu(monkeypatch, room=5)
        assert choose(gpu) == 4
    finally:
        gc.enable()
    assert len(gpu.events) >= 4 and gpu.events[-1] == ("empty", True)


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, KeyError])
def test_only_a_lack_of_gpu_memory_is_caught(kind, monkeypatch):
    gpu = Gpu(monkeypatch)

    def fails(size):
        raise kind("out of memory")

    gpu.try_size = fails
    with pytest.raises(kind):
        choose(gpu)


def test_a_given_size_and_that_of_a_resumed_run_are_tried_once_and_may_fail(monkeypatch, capsys):
    for given, kept, size in (8, {}, 8), (8, {"microbatch_size": 2}, 8), (None, {"microbatch_size": 2}, 2):
        gpu = Gpu(monkeypatch)
        assert choose(gpu, given=given, **kept) == size and gpu.tried == [size]
    gpu = Gpu(monkeypatch)
    assert choose(gpu, 4, given=64) == 64 and gpu.tried == [4]  # a step has no more rows
    with pytest.raises(torch.OutOfMemoryError):  # run_stage says what helps
        choose(Gpu(monkeypatch, room=1), given=8)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_it_is_the_flag_or_the_default_and_nothing_is_tried(device, monkeypatch):
    gpu = Gpu(monkeypatch)
    assert choose(gpu, device=device) == 16 and choose(gpu, device=device, microbatch_size=64) == 16
    assert choose(gpu, given=5, device=device) == 5 and gpu.tried == []


def test_the_search_learns_nothing_keeps_the_size_and_holds_adams_moments(monkeypatch):
    gpu = Gpu(monkeypatch)
    run, optimizer = a_run()
    [weight] = optimizer.param_groups[0]["params"]
    held = []

    def try_size(size):
        held.append(sum(tensor.numel() for tensor in optimizer.state[weight].values()))
        gpu.try_size(size)
        (7 * weight).sum().backward()

    random_before = torch.get_rng_state()
    assert harness.choose_microbatch_size(run, optimizer, 16, 4, try_size) == 4
    assert set(held) == {6}  # two for each of three numbers
    assert run.kept == {"microbatch_size": 4} and weight.grad is None
    assert weight.tolist() == [1.0] * 3 and torch.equal(torch.get_rng_state(), random_before)


# === Several processes ============================================================================
def be_one_of(rooms, rank, port, results):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=len(rooms))
    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu = Gpu(monkeypatch, rooms[rank])
        try:
            results.put((rank, choose(gpu), len(gpu.tried)))
        except common.UserError as error:
            results.put((rank, str(error), len(gpu.tried)))
    dist.destroy_process_group()


@pytest.mark.parametrize("rooms, size, passes", [
    ((64, 5, 20), 4, (12, 7, 11)),  # each has tried another number of sizes
    ((64, 0), "a single row", (12, 1)),
])
def test_all_processes_take_the_smallest_size_of_theirs(rooms, size, passes):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    forks = [fork.Process(target=be_one_of, args=(rooms, rank, port, results)) for rank in range(len(rooms))]
    for process in forks:
        process.start()
    found = sorted(results.get(timeout=60) for _ in forks)
    for process in forks:
        process.join(60)
    assert tuple(number for _, _, number in found) == passes
    for _, answer, _ in found:
        assert answer == size or isinstance(size, str) and size in answer
