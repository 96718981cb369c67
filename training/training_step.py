# SPDX-License-Identifier: Apache-2.0
"""One training step: `plan -> refresh -> forward -> backward -> optimizer -> bank`.

Letters: b slides of this process, M sampled tiles of each, K codewords, D feature width.
"""

import torch
from accelerate import Accelerator
from torch import nn

from modeling_dre_slcl import DreSlclImageProcessor

from .bank_modes import BANK_MODES, Arguments, PlannedTiles, add_gradient, drop_stale
from .config import TrainConfig
from .gradient_check import GradientCheck
from .optimizer_step import OptimizerStep
from .run_data import RunData
from .sampler import PADDING
from .step_dataset import StepBatch, StepDataset
from .whole_slides import WholeSlides


class TrainingStep:
    """Takes steps with gradient through the tile encoder.

    Args:
        config (`TrainConfig`): the run's settings.
        data (`RunData`): its slides, and what they are trained towards.
        dataset (`StepDataset`): reads their tiles.
        model (`torch.nn.Module`): as `accelerator.prepare` returned it.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        accelerator (`Accelerator`): the run's.
        optimizer_step (`OptimizerStep`): what all steps have in common.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: RunData,
        dataset: StepDataset,
        model: nn.Module,
        image_processor: DreSlclImageProcessor,
        accelerator: Accelerator,
        optimizer_step: OptimizerStep,
    ) -> None:
        self.config, self.data, self.model = config, data, model
        # Only the forward pass goes through DistributedDataParallel; everything else speaks to the model itself.
        self.unwrapped = accelerator.unwrap_model(model)
        self.image_processor, self.accelerator, self.optimizer_step = image_processor, accelerator, optimizer_step
        whole_slides = WholeSlides(
            dataset,
            image_processor,
            accelerator,
            batch_size=config.encode_batch_size,
            num_workers=config.num_workers,
        )
        self.mode = BANK_MODES[config.bank_mode](config, whole_slides)
        self.gradient_check = GradientCheck(self.mode, whole_slides)

    def take(self, batch: StepBatch) -> dict[str, float]:
        """Takes a step. Collective.

        Returns:
            `dict`: `loss`, `learning_rate`, `gradient_norm`, and where it was due `gradient_cosine`.

        Raises:
            FloatingPointError: at the first number that is not finite, before it reaches a weight or the bank.
        """
        plan, model, device = batch.plan, self.unwrapped, self.accelerator.device
        learning_rate = self.optimizer_step.start(plan.step)
        tiles = PlannedTiles(plan, self.data.bank_places(plan.slides))
        self._refresh(batch, tiles)
        pixel_values = self.image_processor.tiles_to_pixel_values(batch.tiles, device)
        texts = self.data.texts(plan, device)
        row = {}
        every = self.config.gradient_check_steps
        if every and (plan.step + 1) % every == 0:
            shard = plan.step // every % len(self.data.shards)
            row["gradient_cosine"] = self.gradient_check.cosine(model, tiles, pixel_values, texts, shard)
        arguments = self._stored(tiles)
        tile_mask = (tiles.sampled != PADDING).to(device)
        outputs = self.model(pixel_values=pixel_values, tile_mask=tile_mask, **arguments, **texts)
        self.optimizer_step.finite.check_loss(outputs.loss, plan)
        self.accelerator.backward(outputs.loss)
        gradient = self.mode.other_gradient(model, tiles, arguments)
        if gradient is not None:
            # Outside of the wrapper's backward pass, which averages the rest.
            add_gradient(model, [self.accelerator.reduce(part, "mean") for part in gradient])
        norm = self.optimizer_step.descend(plan)
        model.memory_bank.write(tiles.slides, tiles.sampled, outputs.tile_features, model.codebook, plan.step + 1)
        return {"loss": outputs.loss.item(), "learning_rate": learning_rate, "gradient_norm": norm, **row}

    def _stored(self, tiles: PlannedTiles) -> Arguments:
        """What stands for the tiles that are not sampled, by `bank_mode`: arguments of the model's `forward`."""
        arguments = self.mode.arguments_on(self.accelerator.device, self.unwrapped, tiles)
        if self.config.stale_dropout > 0:
            probability, num_codewords = self.config.stale_dropout, len(self.unwrapped.codebook)
            arguments = drop_stale(arguments, tiles.plan, self.data.sampler, probability, num_codewords)
        return arguments

    @torch.no_grad()
    def _refresh(self, batch: StepBatch, tiles: PlannedTiles) -> None:
        """Encodes the tiles whose refresh is due into the bank."""
        due = torch.from_numpy(batch.plan.refreshed)
        if not due.shape[1]:
            return
        model = self.unwrapped
        for slide, wanted, pixels in zip(tiles.slides, due, batch.refreshed_tiles, strict=True):
            values = self.image_processor.tiles_to_pixel_values(pixels, self.accelerator.device)
            with self.accelerator.autocast():
                features = model.get_tile_features(values).float()
            model.memory_bank.write(slide[None], wanted[None], features[None], model.codebook, batch.plan.step + 1)
