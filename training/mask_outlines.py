# SPDX-License-Identifier: Apache-2.0
"""From a mask to the polygons around it, and back. Pure arrays, no files.

Mask coordinates: pixel (row r, column c) is the square from (x, y) = (c, r) to (c + 1, r + 1); its centre decides
whether it lies in a polygon. Filling the traced polygons so gives the same mask again, bit by bit, but for pixels
that met only at a corner: these are joined.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None

# Outlines run through the middles of pixel edges, at least 0.35 px from every pixel centre; less than that may be cut.
_TOLERANCE_PX = 0.34
MAX_FILL_COST = 2_000_000_000
_CROSSING_COST = 100
_CROSSINGS_AT_ONCE = 2_000_000


def trace_outlines(mask: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Traces the parts of a mask.

    Args:
        mask (`np.ndarray` of shape `(h, w)`, bool): the mask.

    Yields:
        `list[np.ndarray]`: rings of one connected part, float64 `(n, 2)` as (x, y), not closed: first the outer
        ring, then its holes. Rings neither cross themselves nor each other; the signed area (sum of
        `x1 * y2 - x2 * y1`) of outer rings is positive, that of holes negative.

    Raises:
        ImportError: if OpenCV is not installed.
    """
    if cv2 is None:
        raise ImportError("Tracing masks needs OpenCV: pip install opencv-python-headless")
    if not mask.any():
        return
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    pixels = _join_corners(mask[top : top + height, left : left + width])
    # Twice as large, every pixel has a corner of its own on each side, so that corners of pixels can be told apart.
    doubled = cv2.resize(pixels, (2 * width, 2 * height), interpolation=cv2.INTER_NEAREST)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(2 * left, 2 * top))
    holes_of: dict[int, list[int]] = {}
    for index, parent in enumerate(hierarchy[0, :, 3].tolist()):
        holes_of.setdefault(parent, []).append(index)
    for outer in holes_of.get(-1, []):
        yield [_smooth_ring(contours[index][:, 0]) for index in (outer, *holes_of.get(outer, []))]


def fill_polygon(mask: np.ndarray, rings: Sequence[np.ndarray], *, max_cost: int = MAX_FILL_COST) -> int:
    """Sets the pixels of a mask whose centres lie in a polygon (even-odd rule); what reaches beyond is cut.

    Args:
        mask (`np.ndarray` of shape `(h, w)`, bool): changed in place.
        rings (sequence of `np.ndarray` of shape `(n, 2)`, float): (x, y), closed or not; holes as further rings.
        max_cost (`int`, *optional*): the most work that is done.

    Returns:
        `int`: the work done, about a nanosecond each: pixels looked at and rows that edges crossed.

    Raises:
        ValueError: if it would be more than `max_cost`.
    """
    start = np.concatenate([np.asarray(ring, dtype=np.float64) for ring in rings])
    stop = np.concatenate([np.roll(np.asarray(ring, dtype=np.float64), -1, axis=0) for ring in rings])
    height, width = mask.shape
    # Rows whose centres (r + 0.5) an edge passes, the lower end included, the upper not.
    ends = [np.ceil(np.clip(points[:, 1] - 0.5, 0, height)).astype(np.int64) for points in (start, stop)]
    first, num_rows = np.minimum(*ends), np.abs(ends[0] - ends[1])
    left, right = np.clip([math.floor(start[:, 0].min()), math.ceil(start[:, 0].max())], 0, width).tolist()
    top, bottom = int(min(end.min() for end in ends)), int(max(end.max() for end in ends))
    cost = (bottom - top) * (right - left) + _CROSSING_COST * int(num_rows.sum())
    if cost > max_cost:
        raise ValueError("its outlines are too many or too intricate; simplify them")
    if bottom == top or right == left:
        return cost
    used = num_rows > 0
    start, stop, first, num_rows = start[used], stop[used], first[used], num_rows[used]
    # Each crossing turns the parity of all pixels to its right.
    turns = np.zeros((bottom - top, right - left + 1), dtype=np.uint8)
    groups = np.cumsum(num_rows) // _CROSSINGS_AT_ONCE
    shift = np.array([left, 0])
    for group in np.unique(groups).tolist():
        chosen = groups == group
        _add_turns(turns, top, start[chosen] - shift, stop[chosen] - shift, first[chosen], num_rows[chosen])
    inside = np.add.accumulate(turns, axis=1, out=turns) & 1
    mask[top:bottom, left:right] |= inside[:, :-1].astype(bool)
    return cost


def _add_turns(
    turns: np.ndarray, top: int, start: np.ndarray, stop: np.ndarray, first: np.ndarray, num_rows: np.ndarray
) -> None:
    """Adds the crossings of edges (n, 2) -> (n, 2) to uint8 (rows, w + 1)."""
    edges = np.repeat(np.arange(len(first)), num_rows)
    offsets = np.arange(len(edges)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
    rows = first[edges] + offsets
    slopes = (stop[:, 0] - start[:, 0]) / (stop[:, 1] - start[:, 1])
    x = start[edges, 0] + (rows + 0.5 - start[edges, 1]) * slopes[edges]
    columns = np.ceil(np.clip(x - 0.5, 0, turns.shape[1] - 1)).astype(np.int64)
    np.add.at(turns, (rows - top, columns), np.uint8(1))


def _join_corners(mask: np.ndarray) -> np.ndarray:
    """Fills one more pixel wherever two pixels meet only at a corner, uint8 (h, w), so that rings never touch."""
    joined = mask.astype(np.uint8)
    while True:
        upper_left, upper_right = joined[:-1, :-1], joined[:-1, 1:]
        lower_left, lower_right = joined[1:, :-1], joined[1:, 1:]
        falling = upper_left & lower_right & ~upper_right & ~lower_left & 1
        rising = upper_right & lower_left & ~upper_left & ~lower_right & 1
        if not (falling.any() or rising.any()):
            return joined
        joined[:-1, 1:] |= falling
        joined[:-1, :-1] |= rising


def _smooth_ring(contour: np.ndarray) -> np.ndarray:
    """Turns a contour of the doubled mask, int32 (n, 2), into a ring through the middles of pixel edges, float64."""
    # An even coordinate is the left or upper half of a pixel, whose corner is at its left; an odd one at its right.
    corners = (contour + 1) // 2
    corners = corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]
    middles_doubled = corners + np.roll(corners, -1, axis=0)
    ring = cv2.approxPolyDP(middles_doubled.astype(np.int32), 2 * _TOLERANCE_PX, closed=True)
    return ring[::-1, 0].astype(np.float64) / 2
