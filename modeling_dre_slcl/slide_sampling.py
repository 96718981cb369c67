# SPDX-License-Identifier: Apache-2.0
"""Embeds a slide from a part of its tiles, and says how far that may be from the embedding of all of them.

A first part is drawn evenly over the slide: it is cut along a space-filling curve, and the draw takes from everywhere
at once. Where that part says that tiles move the embedding most, more are drawn (`sampling_strata`). The tiles of each
stratum fall in turn into a few groups. How much the embedding moves when a group is left out, and the others of its
stratum stand for it, says how much it depends on the draw (delete-a-group jackknife, stratum by stratum); the share of
the stratum that was never drawn scales that (finite population). The head that turns sums into an embedding costs
almost nothing, so it is evaluated for each group exactly, not approximated.

Letters: N tiles of the slide, n drawn tiles, H strata, G groups, K codewords, D feature width.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .sampling_strata import Strata, rank_within
from .slide_state import fixed_point, from_fixed_point

NUM_GROUPS = 16
# Tiles after which the error is estimated first; then after half as many again each time.
FIRST_ROUND = 128
_GROWTH = 1.25
# The first part, drawn evenly: a sixteenth of the slide between these numbers, and a quarter of what is drawn at most.
_FIRST_PART = (128, 1024)
_LEAST_FIRST_PART = 96
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
        rounds = {most, self.first_part(num_tiles) or most}
        if self.tolerance is not None:
            size = float(FIRST_ROUND)
            while size < 0.9 * most:
                rounds.add(int(size) // NUM_GROUPS * NUM_GROUPS)
                size *= _GROWTH
        return sorted(rounds)

    def first_part(self, num_tiles: int) -> int:
        """Returns how many tiles are drawn evenly before the draw of the rest is planned; 0 if it is not."""
        most = num_tiles if self.max_tiles is None else min(num_tiles, self.max_tiles)
        if self.tolerance is None and most == num_tiles:
            return 0
        size = min(most // 4, max(_FIRST_PART[0], min(_FIRST_PART[1], num_tiles // 16)))
        return size // NUM_GROUPS * NUM_GROUPS if size >= _LEAST_FIRST_PART else 0


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


class DrawnSums:
    """Sums of the drawn tiles per stratum, group and codeword, exact in any order.

    Args:
        strata (`Strata`): the slide's strata, and the order in which tiles are drawn.
        codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.
    """

    def __init__(self, strata: Strata, codebook: torch.Tensor) -> None:
        self._sizes, self._codebook = strata.sizes, codebook.detach().to("cpu", torch.float64)
        drawn_stratum = strata.stratum[strata.order]
        rank = rank_within(drawn_stratum)
        # Each beginning of the order visits everywhere in turn, always in the same turn: moved on by one each time, a
        # group is not one place of the slide.
        group = (rank + rank // NUM_GROUPS) % NUM_GROUPS
        self._cell = torch.from_numpy(drawn_stratum * NUM_GROUPS + group)
        shape = (len(strata.sizes), NUM_GROUPS, *codebook.shape)
        self._sums = torch.zeros(shape, dtype=torch.int64)
        self._counts = torch.zeros(shape[:-1], dtype=torch.int64)

    def add(self, features: torch.Tensor, assignment: torch.Tensor, start: int) -> None:
        """Adds features `(n, D)` at codewords `(n,)`, of the tiles at place `start` of the order and after it."""
        place = self._cell[start : start + len(features)] * len(self._codebook) + assignment.cpu()
        self._sums.view(-1, self._sums.shape[-1]).index_add_(0, place, fixed_point(features).cpu())
        self._counts.view(-1).index_add_(0, place, torch.ones_like(place))

    def stand_for_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the sums of all tiles are expected to be: residuals `(K, D)` and counts `(K,)`, float64."""
        weights = self._weights(self._counts.sum((1, 2)))
        residuals = self._residuals(self._sums.sum(1), self._counts.sum(1))
        return (weights[:, None, None] * residuals).sum(0), (weights[:, None] * self._counts.sum(1)).sum(0)

    @torch.no_grad()
    def estimate_error(self, model: PreTrainedModel) -> SamplingError:
        """Estimates how far the embedding of the drawn tiles may be from that of all tiles.

        Args:
            model (`DreSlclModel`): the model.

        Returns:
            `SamplingError`: zero if all tiles were drawn, and 1 if there are too few to say.
        """
        sizes, drawn = torch.from_numpy(self._sizes), self._counts.sum((1, 2))
        if torch.equal(drawn, sizes):
            return SamplingError()
        if int(drawn.sum()) < 2 * NUM_GROUPS or bool((drawn == 0).any()):
            return SamplingError(1.0, 1.0)
        whole = self.stand_for_all()
        moved = torch.cat([self._moves(model, one, *whole) for one in (drawn < sizes).nonzero()[:, 0].tolist()])
        # Variance along the principal directions of what the draw changes; the trace is the whole variance.
        gram = moved @ moved.T
        variance = float(gram.trace())
        if variance == 0:
            return SamplingError()
        # A sum of squares in few directions varies more than one in many (Satterthwaite's degrees of freedom).
        freedom = variance**2 / float(gram.square().sum())
        # Half the squared distance of unit vectors is 1 - cosine.
        return SamplingError(variance / 2, variance / 2 * _upper_factor(freedom) * _ESTIMATE_FACTOR)

    def _moves(
        self, model: PreTrainedModel, stratum: int, residuals: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """How the embedding's direction moves without each group of a stratum, scaled to its variance, `(G, D)`.

        Residuals and counts are those of `stand_for_all`.
        """
        sums, numbers = self._sums[stratum], self._counts[stratum]
        used = numbers.sum(1) > 0
        drawn, size = int(numbers.sum()), int(self._sizes[stratum])
        rest_sums, rest_numbers = sums.sum(0) - sums[used], numbers.sum(0) - numbers[used]
        own = size / drawn
        stands = size / rest_numbers.sum(1).double()
        without = residuals - own * self._residuals(sums.sum(0), numbers.sum(0))
        without = without + stands[:, None, None] * self._residuals(rest_sums, rest_numbers)
        counts_without = counts - own * numbers.sum(0) + stands[:, None] * rest_numbers
        # A codeword that only the group had is empty without it: exactly zero, not what rounding leaves.
        is_empty = self._counts.sum((0, 1)) - numbers[used] == 0
        without[is_empty], counts_without[is_empty] = 0, 0
        device = model.codebook.device
        embeddings = model.encode_residuals(without.to(device), counts_without.to(device)).slide_embedding
        units = F.normalize(embeddings.double().cpu(), dim=-1)
        scale = (len(units) - 1) / len(units) * (1 - drawn / size)
        return (units - units.mean(0)) * scale**0.5

    def _weights(self, drawn: torch.Tensor) -> torch.Tensor:
        """How many tiles a drawn one stands for, per stratum, float64 (H,)."""
        return torch.from_numpy(self._sizes).double() / drawn.clamp(min=1)

    def _residuals(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return from_fixed_point(sums) - counts[..., None] * self._codebook


def _upper_factor(freedom: float) -> float:
    """Returns the 95% quantile of a chi-squared variable over its mean (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return (1 - spread + 1.645 * spread**0.5) ** 3


__all__ = ["NUM_GROUPS", "DrawnSums", "SamplingConfig", "SamplingError", "sampling_order"]
