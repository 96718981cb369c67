# SPDX-License-Identifier: Apache-2.0
"""Encodes all the tiles of a step's slides that it did not sample, in chunks, in memory that does not grow with them.

Two passes make the gradient of whole slides (gradient caching): `residuals` encodes without gradient; the loss says
how much it depends on those residuals; `gradient` encodes again, chunk by chunk, and passes that on to the encoder.

Letters: b slides of this process, n of them, K codewords, D feature width, c tiles of a chunk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from modeling_dre_slcl import DreSlclImageProcessor, DreSlclModel
from modeling_dre_slcl.residual_encoder import assign_codewords
from modeling_dre_slcl.slide_state import fixed_point, from_fixed_point

from .sampler import StepPlan
from .step_dataset import StepDataset
from .tile_loader import load_in_order

_MANY_CHUNKS = 8  # below, starting worker processes takes longer than reading


class _Chunks(Dataset):
    """Chunks of the tiles of a plan's slides that the plan does not sample."""

    def __init__(self, dataset: StepDataset, plan: StepPlan, places: Sequence[int], batch_size: int) -> None:
        self.dataset, self.plan = dataset, plan
        self.chunks = []
        for row, place in enumerate(places):
            tiles = np.arange(dataset.sampler.num_tiles[int(plan.slides[place])])
            tiles = np.setdiff1d(tiles, plan.sampled[place], assume_unique=True)
            self.chunks.extend(
                (row, place, tiles[start : start + batch_size]) for start in range(0, len(tiles), batch_size)
            )

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        row, place, tiles = self.chunks[index]
        slide, step = int(self.plan.slides[place]), self.plan.step
        return row, torch.from_numpy(self.dataset.read(slide, tiles, "augment others", step, int(tiles[0])))


class WholeSlides:
    """The tiles of a step's slides beside those that it sampled.

    Args:
        dataset (`StepDataset`): reads tiles.
        image_processor (`DreSlclImageProcessor`): prepares them.
        accelerator (`Accelerator`): the run's.
        batch_size (`int`): c, tiles encoded at once.
        num_workers (`int`): processes that read tiles.
    """

    def __init__(
        self,
        dataset: StepDataset,
        image_processor: DreSlclImageProcessor,
        accelerator: Accelerator,
        *,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self.dataset, self.image_processor, self.accelerator = dataset, image_processor, accelerator
        self.batch_size, self.num_workers = batch_size, num_workers

    @torch.no_grad()
    def residuals(
        self, model: DreSlclModel, plan: StepPlan, places: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual sums over the tiles that the plan does not sample.

        Args:
            model (`DreSlclModel`): unwrapped.
            plan (`StepPlan`): the step's plan.
            places (sequence of `int`): the slides, by their places in the plan.

        Returns:
            `tuple`: residuals of shape `(n, K, D)`, in the codebook's dtype, and counts of shape `(n, K)`, int64.
        """
        states = [model.empty_state() for _ in places]
        for row, features in self._features(model, plan, places):
            states[row].add(features, model.codebook)
        residuals = torch.stack([state.residuals(model.codebook) for state in states])
        return residuals.to(model.codebook), torch.stack([state.counts for state in states])

    def gradient(
        self, model: DreSlclModel, plan: StepPlan, places: Sequence[int], residual_gradients: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradient of the tile encoder's parameters through the residuals that `residuals` returned.

        Args:
            model (`DreSlclModel`), plan (`StepPlan`), places (sequence of `int`): as for `residuals`.
            residual_gradients (`torch.Tensor` of shape `(n, K, D)`, float): of the loss by those residuals.

        Returns:
            `list` of `torch.Tensor`: one per parameter of `trained_encoder_parameters`, of this process's tiles.
        """
        parameters = trained_encoder_parameters(model)
        total = [torch.zeros_like(parameter) for parameter in parameters]
        if not parameters:
            return total
        for row, features in self._features(model, plan, places):
            # A tile's residual moves as its feature does, at the codeword that the first pass gave it.
            codeword = assign_codewords(from_fixed_point(fixed_point(features.detach())), model.codebook)
            upstream = residual_gradients[row][codeword]
            parts = torch.autograd.grad(features, parameters, upstream.to(features), allow_unused=True)
            for whole, part in zip(total, parts, strict=True):
                if part is not None:
                    whole += part
        return total

    def _features(
        self, model: DreSlclModel, plan: StepPlan, places: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields rows of `places` and features `(c, D)`, with a graph where gradients are enabled."""
        chunks = _Chunks(self.dataset, plan, places, self.batch_size)
        num_workers = self.num_workers if len(chunks) > _MANY_CHUNKS else 0
        loader = load_in_order(chunks, range(len(chunks)), num_workers=num_workers, seed=self.dataset.sampler.seed)
        for index, (row, pixels) in enumerate(loader):
            values = self.image_processor.tiles_to_pixel_values(pixels, self.accelerator.device)
            # Both passes must drop the same units; and the step's own random numbers must not depend on this.
            with random_state(plan.step * 1_000_003 + index), self.accelerator.autocast():
                features = model.get_tile_features(values)
            yield row, features


def trained_encoder_parameters(model: DreSlclModel) -> list[torch.nn.Parameter]:
    """The parameters of the tile encoder that training changes."""
    return [parameter for parameter in model.tile_encoder.parameters() if parameter.requires_grad]


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Seeds PyTorch's random numbers, and puts their state back at the end."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
