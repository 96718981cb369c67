# SPDX-License-Identifier: Apache-2.0
"""Outlines of masks: filled by a slow rule of its own they are the mask again, and they never cross."""

import itertools

import cv2
import numpy as np
import pytest

from dre_slcl.training.mask_outlines import fill_polygon, trace_outlines

SHAPES = [(1, 1), (1, 7), (5, 5), (9, 14), (30, 21)]


def random_mask(shape, seed):
    """Noise of several grains, without pixels that meet only at a corner."""
    rng = np.random.default_rng([*shape, seed])
    noise = rng.random(shape, dtype=np.float32)
    if seed % 2:
        noise = cv2.GaussianBlur(noise, (0, 0), 1.5)
    mask = noise > np.quantile(noise, rng.uniform(0.2, 0.8))
    for row, column in itertools.product(range(shape[0] - 1), range(shape[1] - 1)):
        block = mask[row : row + 2, column : column + 2]
        if block.sum() == 2 and block[0, 0] == block[1, 1]:
            mask[row : row + 2, column : column + 2] = True
    return mask if not has_saddle(mask) else None


def has_saddle(mask):
    return bool(
        ((mask[:-1, :-1] == mask[1:, 1:]) & (mask[:-1, 1:] == mask[1:, :-1]) & (mask[:-1, 1:] != mask[1:, 1:])).any()
    )


def slow_fill(shape, parts):
    """Even-odd rule at each pixel centre, ray to the left, one edge after the other."""
    filled = np.zeros(shape, bool)
    for row, column in itertools.product(*map(range, shape)):
        x, y = column + 0.5, row + 0.5
        for rings in parts:
            num_left = 0
            for ring in rings:
                for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
                    if (y1 > y) != (y2 > y) and x1 + (y - y1) * (x2 - x1) / (y2 - y1) < x:
                        num_left += 1
            filled[row, column] |= num_left % 2 == 1
    return filled


def cross(start, stop, other_start, other_stop):
    """Whether two segments cross or touch."""

    def side(a, b, c):
        return np.sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))

    if max(start[0], stop[0]) < min(other_start[0], other_stop[0]) or max(start[1], stop[1]) < min(
        other_start[1], other_stop[1]
    ):
        return False
    if max(other_start[0], other_stop[0]) < min(start[0], stop[0]) or max(other_start[1], other_stop[1]) < min(
        start[1], stop[1]
    ):
        return False
    return (
        side(start, stop, other_start) * side(start, stop, other_stop) <= 0
        and side(other_start, other_stop, start) * side(other_start, other_stop, stop) <= 0
    )


@pytest.mark.parametrize(("shape", "seed"), itertools.product(SHAPES, range(6)))
def test_outlines_filled_slowly_are_the_mask(shape, seed):
    mask = random_mask(shape, seed)
    if mask is None:
        mask = cv2.dilate(np.eye(*shape, dtype=np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    assert (slow_fill(shape, list(trace_outlines(mask))) == mask).all()


@pytest.mark.parametrize("seed", range(4))
def test_rings_do_not_cross_themselves_nor_each_other(seed):
    mask = random_mask((22, 22), seed)
    mask = np.ones((22, 22), bool) if mask is None else mask
    edges = [
        (number, index, len(ring), ring[index], ring[(index + 1) % len(ring)])
        for number, ring in enumerate(ring for rings in trace_outlines(mask) for ring in rings)
        for index in range(len(ring))
    ]
    for (ring, index, length, *edge), (other_ring, other_index, _, *other) in itertools.combinations(edges, 2):
        is_next = ring == other_ring and (other_index - index) % length in (1, length - 1)
        assert is_next or not cross(*edge, *other)


def test_outer_rings_turn_one_way_and_holes_the_other():
    mask = np.ones((20, 20), bool)
    mask[4:9, 5:12] = mask[12:15, 3:6] = False
    ((outer, *holes),) = trace_outlines(mask)

    def signed_area(ring):
        x, y = ring.T
        return np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2

    assert 398 < signed_area(outer) <= 400
    assert sorted(round(signed_area(hole)) for hole in holes) in ([-35, -9], [-34, -8], [-35, -8], [-34, -9])


def test_pixels_that_meet_at_a_corner_are_joined():
    mask = np.zeros((6, 6), bool)
    mask[1, 1] = mask[2, 2] = True
    (rings,) = trace_outlines(mask)
    filled = slow_fill(mask.shape, [rings])
    assert filled[mask].all()
    assert filled.sum() == 3


def test_an_empty_mask_has_no_outlines_and_a_full_one_one():
    assert list(trace_outlines(np.zeros((4, 5), bool))) == []
    assert len(list(trace_outlines(np.ones((4, 5), bool)))) == 1


@pytest.mark.parametrize("seed", range(8))
def test_filling_is_the_even_odd_rule_at_pixel_centres(seed):
    rng = np.random.default_rng(seed)
    rings = [rng.uniform(-6, 26, (int(rng.integers(3, 9)), 2)) for _ in range(2)]
    mask = np.zeros((17, 23), bool)
    assert fill_polygon(mask, rings) > 0
    assert (mask == slow_fill(mask.shape, [rings])).all()


@pytest.mark.parametrize("where", [(-50, 5), (500, 5), (5, -50), (5, 500)])
def test_polygons_beside_the_mask_leave_it_empty(where):
    mask = np.zeros((20, 20), bool)
    fill_polygon(mask, [np.array([[0, 0], [9, 0], [9, 9], [0, 9]]) + where])
    assert not mask.any()


def test_what_is_filled_is_added():
    mask = np.zeros((5, 5), bool)
    mask[4, 4] = True
    fill_polygon(mask, [np.array([[0.0, 0], [2, 0], [2, 2], [0, 2]])])
    assert mask.sum() == 5


def test_too_much_work_is_refused():
    with pytest.raises(ValueError, match="too intricate"):
        fill_polygon(np.zeros((100, 100), bool), [np.array([[0.0, 0], [100, 0], [50, 100]])], max_cost=5000)
