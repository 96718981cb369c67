# SPDX-License-Identifier: Apache-2.0
"""Draws tiles of a slide in proportion to its codewords: the same kinds of tissue in every step.

Strata are the codewords that the tiles had when the codebook was last fitted. Being fixed from then on, they let
worker processes plan steps ahead, and a resumed run plan as before. Tiles of each slide are kept sorted by stratum, so
that a draw costs O(tiles drawn + codewords), whatever the slide's size.

Letters: K codewords, M tiles drawn, T tiles of all slides.
"""

from collections.abc import Sequence

import numpy as np
import torch

_STATE = "strata"


class Strata:
    """The strata of some slides. Until `assign`, all tiles of a slide are in one.

    Args:
        slides (sequence of `int`): the slides, in the order in which `assign` takes their tiles.
        num_tiles (sequence of `int`): their numbers of tiles.
    """

    def __init__(self, slides: Sequence[int], num_tiles: Sequence[int]) -> None:
        self._place = {slide: place for place, slide in enumerate(slides)}
        self._start = np.concatenate([[0], np.cumsum(num_tiles, dtype=np.int64)])
        self.assign(torch.zeros(int(self._start[-1]), dtype=torch.int16))

    def assign(self, codeword: torch.Tensor) -> None:
        """Takes the codeword of every tile, `(T,)`, int16; tiles with none (-1) are a stratum of their own."""
        self.codeword = codeword.cpu().clone()
        self._order = np.empty(len(codeword), dtype=np.int32)
        self._ends: list[np.ndarray] = []
        for start, end in zip(self._start[:-1], self._start[1:], strict=True):
            found = self.codeword[start:end].numpy()
            self._order[start:end] = np.argsort(found, kind="stable")
            self._ends.append(np.cumsum(np.unique(found, return_counts=True)[1]))

    def state(self, slides: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns the strata of some slides, for a checkpoint."""
        return {_STATE: torch.cat([self.codeword[self._rows(slide)] for slide in slides])}

    def restore(self, slides: Sequence[int], state: dict[str, torch.Tensor]) -> None:
        """Puts back what `state` returned for the same slides."""
        codeword, start = self.codeword.clone(), 0
        for slide in slides:
            rows = self._rows(slide)
            count = rows.stop - rows.start
            codeword[rows] = state[_STATE][start : start + count]
            start += count
        self.assign(codeword)

    def draw(self, slide: int, num_drawn: int, random: np.random.Generator) -> np.ndarray:
        """Draws tiles without repetition; within a stratum all are as likely.

        Args:
            slide (`int`): the slide.
            num_drawn (`int`): M; all tiles, if the slide has fewer.
            random (`np.random.Generator`): decides.

        Returns:
            `np.ndarray` of shape `(M,)`, int64: the tiles.
        """
        rows, ends = self._rows(slide), self._ends[self._place[slide]]
        total = rows.stop - rows.start
        if len(ends) > num_drawn:
            # More codewords than tiles to draw: neighbours in the order by codeword share a stratum.
            ends = np.arange(1, num_drawn + 1) * total // num_drawn
        sizes = np.diff(ends, prepend=0)
        shares = proportional_shares(sizes, min(num_drawn, total))
        places = [
            end - size + random.choice(size, size=share, replace=False)
            for end, size, share in zip(ends.tolist(), sizes.tolist(), shares.tolist(), strict=True)
        ]
        return self._order[rows][np.concatenate(places)].astype(np.int64)

    def _rows(self, slide: int) -> slice:
        place = self._place[slide]
        return slice(int(self._start[place]), int(self._start[place + 1]))


def proportional_shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """Shares a number of draws among strata in proportion to their sizes, at least one each, by largest remainders.

    Args:
        sizes (`np.ndarray` of shape `(n,)`, int): sizes of the strata, at least 1 each.
        total (`int`): draws, at least n and at most the sum of `sizes`.

    Returns:
        `np.ndarray` of shape `(n,)`, int64: they sum to `total`, and none exceeds its stratum's size.
    """
    wanted = sizes * (total / sizes.sum())
    shares = np.maximum(np.floor(wanted), 1).astype(np.int64)
    while (missing := total - int(shares.sum())) != 0:
        # Where a share may grow (or, since the least strata took one each, must shrink), the furthest off goes first.
        possible = shares < sizes if missing > 0 else shares > 1
        off = np.where(possible, (wanted - shares) * np.sign(missing), -np.inf)
        furthest = np.argsort(-off, kind="stable")[: min(abs(missing), int(possible.sum()))]
        shares[furthest] += np.sign(missing)
    return shares
