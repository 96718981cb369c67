# SPDX-License-Identifier: Apache-2.0
"""The sampler is a pure function of (seed, step), partitions by case, and does not know how many processes run."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from dre_slcl.training.sampler import PADDING, StepSampler, generator, partition_slides, shards_of_process

CASES = [f"case-{index // 3}" for index in range(30)] + [f"single-{index}" for index in range(7)]
NUM_TILES = [3 + 5 * (index % 9) for index in range(len(CASES))]


def make_sampler(shards, owned, seed=3, sampled=8, retrieved=16):
    ids = [f"slide-{index}" for index in range(len(CASES))]
    return StepSampler(
        shards, owned, ids, NUM_TILES, tiles_per_slide=sampled, retrieved_per_slide=retrieved, seed=seed
    )


def test_every_slide_is_in_exactly_one_shard_and_cases_stay_together():
    shards = partition_slides(CASES, 4, seed=0)
    assert sorted(slide for shard in shards for slide in shard) == list(range(len(CASES)))
    for case in set(CASES):
        assert sum(any(CASES[slide] == case for slide in shard) for shard in shards) == 1
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 3


def test_too_few_cases_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="different cases, but there are only 2"):
        partition_slides(["a", "a", "b"], 3, seed=0)


def test_a_batch_never_holds_two_slides_of_a_case():
    sampler = make_sampler(partition_slides(CASES, 5, seed=1), range(5))
    for step in range(50):
        cases = [CASES[slide] for slide in sampler.plan(step).slides]
        assert len(set(cases)) == len(cases)


def test_each_pass_over_a_shard_visits_each_of_its_slides_once():
    shards = partition_slides(CASES, 4, seed=0)
    sampler = make_sampler(shards, range(4))
    for index, shard in enumerate(shards):
        for cycle in range(3):
            visited = [sampler.slide_at(index, cycle * len(shard) + place) for place in range(len(shard))]
            assert sorted(visited) == shard


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_together_plan_the_same_batch(num_processes):
    shards = partition_slides(CASES, 4, seed=0)
    whole = make_sampler(shards, range(4))
    parts = [make_sampler(shards, shards_of_process(4, rank, num_processes)) for rank in range(num_processes)]
    for step in (0, 1, 17):
        plans = [part.plan(step) for part in parts]
        np.testing.assert_array_equal(np.concatenate([plan.slides for plan in plans]), whole.plan(step).slides)
        np.testing.assert_array_equal(np.concatenate([plan.sampled for plan in plans]), whole.plan(step).sampled)
        np.testing.assert_array_equal(np.concatenate([plan.retrieved for plan in plans]), whole.plan(step).retrieved)


def test_tiles_are_distinct_valid_and_padded_only_when_a_slide_is_small():
    sampler = make_sampler(partition_slides(CASES, 4, seed=0), range(4))
    for slide, num_tiles in enumerate(NUM_TILES):
        sampled, retrieved = sampler.tiles_at(slide, 5)
        drawn = np.concatenate([sampled, retrieved])
        real = drawn[drawn != PADDING]
        assert len(np.unique(real)) == len(real) == min(24, num_tiles)
        assert real.min() >= 0
        assert real.max() < num_tiles
        assert (sampled != PADDING).sum() == min(8, num_tiles)


def test_drawing_tiles_takes_no_memory_or_time_that_grows_with_the_slide():
    """A permutation of so many tiles would take terabytes."""
    sampler = StepSampler([[0]], [0], ["x"], [10**12], tiles_per_slide=32, retrieved_per_slide=64, seed=0)
    sampled, retrieved = sampler.tiles_at(0, 0)
    drawn = np.concatenate([sampled, retrieved])
    assert len(np.unique(drawn)) == 96
    assert drawn.min() >= 0
    assert 10**11 < drawn.max() < 10**12


def test_tiles_are_drawn_uniformly():
    sampler = make_sampler(partition_slides(CASES, 4, seed=0), range(4))
    slide = int(np.argmax(NUM_TILES))
    counts = Counter(tile for step in range(4000) for tile in sampler.tiles_at(slide, step)[0].tolist())
    expected = 4000 * 8 / NUM_TILES[slide]
    chi_square = sum((counts[tile] - expected) ** 2 / expected for tile in range(NUM_TILES[slide]))
    # 42 degrees of freedom: the 99.99% quantile is about 88.
    assert chi_square < 88


def test_a_draw_costs_as_much_from_a_million_tiles_as_from_a_thousand():
    peaks = []
    for num_tiles in (1_000, 1_000_000):
        sampler = StepSampler([[0]], [0], ["slide"], [num_tiles], tiles_per_slide=16, retrieved_per_slide=64, seed=0)
        tracemalloc.start()
        sampler.tiles_at(0, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A shuffle of a million tiles would take 8 MB.
    assert peaks[1] < peaks[0] + 10_000


@pytest.mark.parametrize(("num_tiles", "refreshed"), [(1, 3), (2, 1), (43, 8), (64, 16), (100, 7)])
def test_refreshes_go_round_the_slide(num_tiles, refreshed):
    options = {"tiles_per_slide": 1, "retrieved_per_slide": 0, "refreshed_per_slide": refreshed, "seed": 0}
    sampler = StepSampler([[0]], [0], ["slide"], [num_tiles], **options)
    last, visits = {}, 6 * num_tiles
    for visit in range(visits):
        due = [tile for tile in sampler.refreshed_at(0, visit).tolist() if tile != PADDING]
        assert len(set(due)) == len(due) == min(refreshed, num_tiles)
        # Those never refreshed, or refreshed the longest ago, are due.
        ages = {tile: visit - last.get(tile, -1) for tile in range(num_tiles)}
        others = set(range(num_tiles)) - set(due)
        assert min(ages[tile] for tile in due) >= max((ages[tile] for tile in others), default=0)
        last |= dict.fromkeys(due, visit)
    assert set(last) == set(range(num_tiles))


def test_sampled_tiles_are_not_refreshed_again():
    sampler = make_sampler(partition_slides(CASES, 4, seed=0), range(4))
    sampler.refreshed_per_slide = 6
    for step in range(20):
        plan = sampler.plan(step)
        for sampled, refreshed in zip(plan.sampled, plan.refreshed, strict=True):
            assert not set(refreshed[refreshed != PADDING]) & set(sampled)


def test_a_different_key_gives_a_different_stream():
    values = {
        tuple(generator(*key).integers(1 << 30, size=4)) for key in [(0, 1), (1, 0), ("01",), (0, "1", ""), (0,)]
    }
    assert len(values) == 5


def test_an_uneven_number_of_processes_is_refused_with_those_that_fit():
    with pytest.raises(ValueError, match="start 1 or 2 or 3 or 6 processes"):
        shards_of_process(6, 0, 4)
