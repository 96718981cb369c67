# SPDX-License-Identifier: Apache-2.0
"""Steps -> pixels: a map-style dataset whose index is the training step, so that resuming is starting at a step.

Letters: b slides of this process, M sampled tiles of each, H = W = `tile_size_px`.
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
    """A step's plan and its sampled tiles `tiles` (`torch.Tensor` of shape `(b, M, H, W, 3)`, uint8; padding is 0)."""

    plan: StepPlan
    tiles: torch.Tensor

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
        size = self.source.tile_size_px
        tiles = np.zeros((*plan.sampled.shape, size, size, 3), dtype=np.uint8)
        for place, (slide, sampled) in enumerate(zip(plan.slides.tolist(), plan.sampled, strict=True)):
            indices = sampled[sampled != PADDING]
            random = generator(self.sampler.seed, "augment", step, self.sampler.slide_ids[slide])
            for row, pixels in enumerate(self.source.read(slide, indices)):
                tiles[place, row] = self._augment(pixels, random)
        return StepBatch(plan, torch.from_numpy(tiles))

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
