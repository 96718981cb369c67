# SPDX-License-Identifier: Apache-2.0
"""Embeds a slide from a part of its tiles, and says how far that may be from the embedding of all of them.

Tiles are drawn evenly over the slide: it is cut along a space-filling curve, and the draw takes from everywhere at
once. They fall in turn into a few groups, each of which is a small sample of the slide. How much the embedding moves
when a group is left out says how much it depends on the draw (delete-a-group jackknife); the share of tiles that was
never drawn scales that (finite population). The head that turns sums into an embedding costs almost nothing, so it is
evaluated for each group exactly, not approximated.

Letters: N tiles of the slide, n drawn tiles, G groups, K codewords, D feature width.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .slide_state import SlideState

NUM_GROUPS = 32
# Tiles after which the error is estimated first; then after half as many again each time.
FIRST_ROUND = 128
_GROWTH = 1.25
_CURVE_BITS = 16
# The variance is itself estimated from few groups, and looked at again and again until it is small: both flatter.
_ESTIMATE_FACTOR = 1.15


@dataclass(frozen=True)
class SamplingConfig:
    """How many tiles of a slide are encoded.

    Args:
        tolerance (`float`, *optional*): stop as soon as 1 - cosine to the embedding of all tiles is below this, with
            a confidence of about 95%; `None` goes on to `max_tiles`.
        max_tiles (`int`, *optional*): most tiles of a slide; `None` for no limit.
        seed (`int`, defaults to 0): another number draws other tiles.

    Raises:
        ValueError: if a number is out of its range.
    """

    tolerance: float | None = None
    max_tiles: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: expected a number between 0 and 1, such as 0.001, found {self.tolerance}.")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"max_tiles: expected at least 1, found {self.max_tiles}.")

    @property
    def takes_all(self) -> bool:
        """Whether every tile of every slide is encoded."""
        return self.tolerance is None and self.max_tiles is None

    def rounds(self, num_tiles: int) -> list[int]:
        """Returns how many tiles are drawn when the error is looked at: rising, the last is the most that is drawn."""
        most = num_tiles if self.max_tiles is None else min(num_tiles, self.max_tiles)
        rounds = []
        if self.tolerance is not None:
            size = float(FIRST_ROUND)
            while size < 0.9 * most:
                rounds.append(int(size) // NUM_GROUPS * NUM_GROUPS)
                size *= _GROWTH
        return [*rounds, most]


def sampling_order(tile_xy: np.ndarray, slide_id: str, seed: int) -> np.ndarray:
    """Returns an order of tiles in which every beginning is spread evenly over the slide.

    A function of its arguments alone: of no other slide, process or machine.

    Args:
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): corners of the tiles, level-0 pixels.
        slide_id (`str`): the slide.
        seed (`int`): another number draws another order.

    Returns:
        `np.ndarray` of shape `(N,)`, int64: a permutation.
    """
    digest = hashlib.sha256(f"{seed}:{slide_id}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    count = len(tile_xy)
    along_curve = np.argsort(_curve_position(tile_xy), kind="stable")
    # The curve is cut into as many pieces as there are tiles; pieces are visited in van der Corput's order (halves,
    # quarters, eighths, ...) from a random start, with the two halves of each piece in random turn.
    bits = max(1, int(count - 1).bit_length())
    place = np.zeros(1 << bits, dtype=np.int64)
    for bit in range(bits):
        # Owen's scrambling: at each depth, each piece decides by itself which of its halves comes first.
        flips = rng.integers(0, 2, 1 << bit)
        index = np.arange(1 << bits)
        half = (index >> (bits - 1 - bit)) & 1
        piece = index >> (bits - bit)
        place |= (half ^ flips[piece]) << bit
    # Fractions of the curve in visiting order; with fewer tiles than places several share a tile: the first counts.
    visited = np.argsort(place, kind="stable") * count >> bits
    _, first = np.unique(visited, return_index=True)
    return along_curve[visited[np.sort(first)]].astype(np.int64)


def _curve_position(tile_xy: np.ndarray) -> np.ndarray:
    """Position of each tile along a Hilbert curve over the slide, int64 (N,)."""
    span = np.ptp(tile_xy.astype(np.int64), axis=0).max(initial=1)
    scaled = (tile_xy.astype(np.int64) - tile_xy.min(axis=0)) * ((1 << _CURVE_BITS) - 1) // max(1, span)
    x, y = scaled[:, 0].copy(), scaled[:, 1].copy()
    position = np.zeros(len(tile_xy), dtype=np.int64)
    side = 1 << (_CURVE_BITS - 1)
    while side:
        right, upper = (x & side) > 0, (y & side) > 0
        position += side * side * ((3 * right) ^ upper)
        # Turn the quadrant so that the curve enters and leaves it at neighbouring corners.
        turned = ~upper
        mirrored = turned & right
        x[mirrored], y[mirrored] = side - 1 - (x[mirrored] & (side - 1)), side - 1 - (y[mirrored] & (side - 1))
        x[turned], y[turned] = y[turned].copy(), x[turned].copy()
        side >>= 1
    return position


@dataclass(frozen=True)
class SamplingError:
    """How far the embedding of the drawn tiles may be from that of all tiles, as 1 - cosine.

    Attributes:
        expected (`float`): on average over draws.
        bound (`float`): what is exceeded in about one of twenty draws.
    """

    expected: float = 0.0
    bound: float = 0.0


@torch.no_grad()
def estimate_error(model: PreTrainedModel, groups: list[SlideState], num_tiles: int) -> SamplingError:
    """Estimates how far the embedding of the drawn tiles may be from that of all tiles.

    Args:
        model (`DreSlclModel`): the model.
        groups (`list[SlideState]`): states of the G groups of drawn tiles.
        num_tiles (`int`): tiles N of the slide.

    Returns:
        `SamplingError`: zero if all tiles were drawn, and 1 if there are too few to say.
    """
    residuals = torch.stack([group.residuals(model.codebook) for group in groups])
    counts = torch.stack([group.counts for group in groups])
    drawn = int(counts.sum())
    if drawn >= num_tiles:
        return SamplingError()
    if drawn < 2 * len(groups):
        return SamplingError(1.0, 1.0)
    without, counts_without = residuals.sum(0) - residuals, counts.sum(0) - counts
    # A codeword that only the group had is empty without it: exactly zero, not what rounding leaves.
    without[counts_without == 0] = 0
    embeddings = model.encode_residuals(without, counts_without).slide_embedding
    units = F.normalize(embeddings.double().cpu(), dim=-1)
    centered = units - units.mean(0)
    # Variance along the principal directions of what the draw changes; the trace is the whole variance.
    gram = centered @ centered.T
    variance = float(gram.trace()) * (len(groups) - 1) / len(groups)
    # Half the squared distance of unit vectors is 1 - cosine.
    expected = variance / 2 * (1 - drawn / num_tiles)
    if expected == 0:
        return SamplingError()
    # A sum of squares in few directions varies more than one in many (Satterthwaite's degrees of freedom).
    freedom = float(gram.trace() ** 2 / gram.square().sum())
    return SamplingError(expected, expected * _upper_factor(freedom) * _ESTIMATE_FACTOR)


def _upper_factor(freedom: float) -> float:
    """Returns the 95% quantile of a chi-squared variable over its mean (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return (1 - spread + 1.645 * spread**0.5) ** 3


__all__ = ["NUM_GROUPS", "SamplingConfig", "SamplingError", "estimate_error", "sampling_order"]
