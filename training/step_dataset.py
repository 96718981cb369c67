# SPDX-License-Identifier: Apache-2.0
"""Steps -> pixels: a map-style dataset whose index is the training step, so that resuming is starting at a step.

Letters: b slides of this process, M sampled and F refreshed tiles of each, H = W = `tile_size_px`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from .sampler import PADDING, StepPlan, StepSampler, generator
from .tile_loader import load_in_order
from .tile_source import TileSource

_TURNS = (None, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


@dataclass(frozen=True)
class StepBatch:
    """A step's plan and the pixels that it needs.

    Args:
        plan (`StepPlan`): the plan.
        tiles (`torch.Tensor` of shape `(b, M, H, W, 3)`, uint8): the sampled tiles; padding is 0.
        refreshed_tiles (`torch.Tensor` of shape `(b, F, H, W, 3)`, uint8): the refreshed tiles; padding is 0.
    """

    plan: StepPlan
    tiles: torch.Tensor
    refreshed_tiles: torch.Tensor

    def pin_memory(self) -> "StepBatch":
        """Returns the batch in page-locked memory, from which a GPU takes it faster; `DataLoader` calls this."""
        return StepBatch(self.plan, self.tiles.pin_memory())


class StepDataset(Dataset):
    """Reads the tiles that each step samples.

    Args:
        source (`TileSource`): the slides.
        sampler (`StepSampler`): plans the steps; its slides are places in `source.slides`.
        augment_flips (`bool`): turn and mirror each tile at random.
        augment_stain (`float`): standard deviation of the random factor on each colour channel's optical density.
    """

    def __init__(self, source: TileSource, sampler: StepSampler, *, augment_flips: bool, augment_stain: float) -> None:
        self.source, self.sampler = source, sampler
        self.augment_flips, self.augment_stain = augment_flips, augment_stain

    def __getitem__(self, step: int) -> StepBatch:
        """Reads one step."""
        plan = self.sampler.plan(step)
        tiles, refreshed = (
            self._read_slides(plan, wanted, purpose)
            for wanted, purpose in ((plan.sampled, "augment"), (plan.refreshed, "augment refreshed"))
        )
        return StepBatch(plan, tiles, refreshed)

    def read(self, slide: int, tiles: np.ndarray, *key: int | str) -> np.ndarray:
        """Reads tiles `(n,)` of a slide, augmented at random by `key`: `np.ndarray` of shape `(n, H, W, 3)`, uint8."""
        pixels = self.source.read(slide, tiles)
        random = generator(self.sampler.seed, *key, self.sampler.slide_ids[slide])
        return np.stack([self._augment(tile, random) for tile in pixels]) if len(pixels) else pixels

    def _read_slides(self, plan: StepPlan, wanted: np.ndarray, purpose: str) -> torch.Tensor:
        """Reads tiles `wanted` `(b, n)`, -1 for padding, of the slides of a plan: `(b, n, H, W, 3)`."""
        size = self.source.tile_size_px
        pixels = np.zeros((*wanted.shape, size, size, 3), dtype=np.uint8)
        for place, (slide, tiles) in enumerate(zip(plan.slides.tolist(), wanted, strict=True)):
            is_real = tiles != PADDING
            pixels[place, is_real] = self.read(slide, tiles[is_real], purpose, plan.step)
        return torch.from_numpy(pixels)

    def _augment(self, tile: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Augments a tile `(H, W, 3)`, uint8."""
        if self.augment_flips:
            turn = _TURNS[random.integers(4)]
            tile = tile if turn is None else cv2.rotate(tile, turn)
            tile = cv2.flip(tile, 1) if random.integers(2) else tile
        if self.augment_stain > 0:
            # Optical density is -log(v / 255), so a factor on it is a power of v / 255: one table per channel.
            factors = np.exp(random.normal(scale=self.augment_stain, size=3))
            table = 255 * (np.arange(256)[:, None] / 255) ** factors
            tile = cv2.LUT(tile, table.round().astype(np.uint8)[None])
        return tile


def step_loader(dataset: StepDataset, steps: Iterable[int], *, num_workers: int, seed: int) -> Iterator[StepBatch]:
    """Loads steps in the given order; what it yields does not depend on `num_workers`.

    Raises:
        SlideError: at the step that needs a slide which cannot be read; it names slide and tile.
    """
    return load_in_order(dataset, steps, num_workers=num_workers, seed=seed)
