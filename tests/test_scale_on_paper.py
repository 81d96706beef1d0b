"""The tables of docs/scale.md are what its script prints, and cells of it are redone by hand."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import scale_on_paper  # noqa: E402
from scale_on_paper import Rank  # noqa: E402


def test_the_pages_tables_are_those_that_the_script_prints():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for table in scale_on_paper.tables():
        assert f"\n\n{table}\n\n" in page


def test_an_update_of_1b_on_one_card_takes_the_flops_counted_by_hand():
    matrices, head = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192), 2048 * 128256
    attention = 16 * 2 * 1024**2 * 2048  # a row's, causal
    trunk_row, head_row = 2 * 1024 * matrices + attention, 2 * 512 * head
    forwards = 512 * (2 * trunk_row + head_row)  # policy and critic
    seconds, _ = Rank("1B", 1).seconds(shard=False)
    assert seconds["update"] == pytest.approx(4 * 4 * forwards / (0.4 * 989e12))


def test_sums_gathers_and_files_of_8b_are_those_by_hand():
    policy, critic = 8.03e9, 7.50e9  # Llama-3.1-8B, with and without its LM head
    copies, saving = Rank("8B", 8).seconds(shard=False)
    assert copies["update's links"] == pytest.approx(4 * 2 * 7 / 8 * 4 * (policy + critic) / 360e9, rel=2e-3)
    assert saving == pytest.approx(12 * (policy + critic) / 2e9, rel=2e-3)
    sharded, _ = Rank("8B", 64).seconds(shard=True)  # 8 rows a rank: one micro-batch an epoch
    assert sharded["whole weights"] == pytest.approx(63 / 64 * 2 * policy / 320e9, rel=2e-3)
    assert sharded["update's links"] == pytest.approx(4 * 63 / 64 * 8 * (policy + critic) / 320e9, rel=2e-3)


def test_a_decoding_step_of_8b_with_8_rows_reads_15_gb_of_weights_and_under_1_of_cache():
    weights, cache = Rank("8B", 64).step_bytes()
    assert weights == pytest.approx(15.0e9, rel=2e-3)
    assert cache == 8 * 768 * 2 * 32 * 8 * 128 * 2  # rows, mean length, K and V, layers, heads, width, bf16


def test_weights_gradients_and_moments_are_those_that_fits_counts():
    """docs/running.md, and `bench/fits.py --batch-size 512 --microbatch-size 8`: 15.88, 9.89, 19.77; 17.16 of cache."""
    rollout, update = Rank("1B", 1).memory(shard=False, shard_frozen=False)
    assert update - scale_on_paper.PASSING["1B"] == pytest.approx(15.88 + 9.89 + 19.77, abs=0.02)
    assert rollout == pytest.approx(15.88 + 19.77 + 17.16 + 2.47, abs=0.04)  # and the bf16 copy
    whole, _ = Rank("8B", 8).memory(shard=True, shard_frozen=False)
    assert whole == pytest.approx(12 * 15.53 / 8 + 17.11 + 16.06 + 16.06 + 8.59, rel=2e-3)
