# SPDX-License-Identifier: Apache-2.0
"""How the few tiles that a step encodes stand for their whole slides: one small class per `bank_mode`.

A mode says what joins the sampled tiles in the model's `forward` (see `residual_estimate.estimate_residuals`), and
which tiles the sampler plans for it. docs/bank_modes.md says which to use when.

Letters: b slides of this process, M sampled tiles of each, K codewords, D feature width.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from modeling_dre_slcl import DreSlclModel
from modeling_dre_slcl.residual_encoder import residual_sums
from modeling_dre_slcl.residual_estimate import MovedSums

from .config import TrainConfig
from .sampler import StepPlan, StepSampler, generator
from .whole_slides import WholeSlides, trained_encoder_parameters

Arguments = dict[str, torch.Tensor | MovedSums | bool]


@dataclass(frozen=True)
class PlannedTiles:
    """A step's plan, as the bank addresses it.

    Args:
        plan (`StepPlan`): the plan.
        slides (`torch.Tensor` of shape `(b,)`, int64): its slides, by their place in the bank.
    """

    plan: StepPlan
    slides: torch.Tensor

    @property
    def sampled(self) -> torch.Tensor:
        """The sampled tiles: `torch.Tensor` of shape `(b, M)`, int64; -1 is padding."""
        return torch.from_numpy(self.plan.sampled)


class BankMode:
    """What all modes have in common.

    Args:
        config (`TrainConfig`): the run's settings.
        whole_slides (`WholeSlides`): reaches all tiles, for the modes that look at them.

    Attributes:
        retrieves (`bool`): whether the sampler plans tiles to retrieve from the bank.
        stratified (`bool`): whether it samples in proportion to codewords.
    """

    retrieves = False
    stratified = False

    def __init__(self, config: TrainConfig, whole_slides: WholeSlides) -> None:
        self.config, self.whole_slides = config, whole_slides

    def arguments_on(self, device: torch.device, model: DreSlclModel, tiles: PlannedTiles) -> Arguments:
        """What `arguments` returns, with its tensors on a device, where gradients by them are collected."""
        return {
            name: value.detach().to(device).requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.arguments(model, tiles).items()
        }

    def arguments(self, model: DreSlclModel, tiles: PlannedTiles) -> Arguments:
        """Returns the arguments of `forward` that stand for the tiles which are not encoded with gradient.

        Reads the bank and changes nothing.
        """
        raise NotImplementedError

    def other_gradient(
        self, model: DreSlclModel, tiles: PlannedTiles, arguments: Arguments
    ) -> list[torch.Tensor] | None:
        """After the backward pass: what the tiles that were not sampled add to the encoder's gradient.

        Returns:
            `list` of `torch.Tensor`, *optional*: one per parameter of `trained_encoder_parameters`; `None`: nothing.
        """
        return None


class Paper(BankMode):
    """The paper's: the s sampled tiles and r retrieved ones, at equal weight."""

    retrieves = True

    def arguments(self, model: DreSlclModel, tiles: PlannedTiles) -> Arguments:
        """Retrieves tiles; see `BankMode.arguments`."""
        features, is_stored = model.memory_bank.read(tiles.slides, torch.from_numpy(tiles.plan.retrieved))
        residuals, counts = residual_sums(features, model.codebook.to(features.device), is_stored)
        return {"stored_residuals": residuals, "stored_counts": counts}


class Full(BankMode):
    """All tiles of the slide, by the bank's running sums: the sampled ones as they are now, all others as stored."""

    def arguments(self, model: DreSlclModel, tiles: PlannedTiles) -> Arguments:
        """Takes the sampled tiles out of the running sums; see `BankMode.arguments`."""
        residuals, counts = model.memory_bank.residuals_of_others(tiles.slides, tiles.sampled, model.codebook)
        return {"stored_residuals": residuals, "stored_counts": counts}


class Corrected(BankMode):
    """All tiles; stored ones moved along with what the sampled ones show of the drift; the gradient of all."""

    stratified = True

    def arguments(self, model: DreSlclModel, tiles: PlannedTiles) -> Arguments:
        """Adds what the sampled tiles were when they were stored; see `BankMode.arguments`."""
        bank, step = model.memory_bank, tiles.plan.step
        features, is_stored = bank.read(tiles.slides, tiles.sampled)
        return {
            "stored_tile_features": features,
            "stored_tile_ages": bank.ages(tiles.slides, tiles.sampled, step),
            "stored_tile_mask": is_stored,
            "moved_sums": partial(bank.moved_residuals_of_others, tiles.slides, tiles.sampled, model.codebook, step),
            "stand_for_all": True,
        }


class TwoPass(BankMode):
    """All tiles as they are now: a pass without gradient over those not sampled, which stand for all in it."""

    stratified = True

    def arguments(self, model: DreSlclModel, tiles: PlannedTiles) -> Arguments:
        """Encodes the others without gradient; see `BankMode.arguments`."""
        residuals, counts = self.whole_slides.residuals(model, tiles.plan, range(len(tiles.slides)))
        return {"stored_residuals": residuals, "stored_counts": counts, "stand_for_all": True}


class Exact(BankMode):
    """All tiles with their gradient, by a second pass: the gradient of whole slides, in constant memory."""

    def arguments(self, model: DreSlclModel, tiles: PlannedTiles) -> Arguments:
        """Encodes the others without gradient; see `BankMode.arguments`."""
        residuals, counts = self.whole_slides.residuals(model, tiles.plan, range(len(tiles.slides)))
        return {"stored_residuals": residuals.requires_grad_(), "stored_counts": counts}

    def other_gradient(
        self, model: DreSlclModel, tiles: PlannedTiles, arguments: Arguments
    ) -> list[torch.Tensor] | None:
        """Encodes the others again, with gradient; see `BankMode.other_gradient`."""
        upstream = arguments["stored_residuals"].grad
        return self.whole_slides.gradient(model, tiles.plan, range(len(tiles.slides)), upstream)


BANK_MODES: dict[str, type[BankMode]] = {
    "paper": Paper,
    "full": Full,
    "corrected": Corrected,
    "two_pass": TwoPass,
    "exact": Exact,
}


def drop_stale(
    arguments: Arguments, plan: StepPlan, sampler: StepSampler, probability: float, num_codewords: int
) -> Arguments:
    """Adds stale-feature dropout: at random codewords of each slide the tiles encoded now stand for all of it.

    Args:
        arguments (`dict`): from `BankMode.arguments`.
        plan (`StepPlan`): the step's plan.
        sampler (`StepSampler`): names slides; randomness is a function of (seed, step, slide).
        probability (`float`): of a codeword.
        num_codewords (`int`): K.
    """
    names = [sampler.slide_ids[slide] for slide in plan.slides.tolist()]
    drawn = [generator(sampler.seed, "stale dropout", plan.step, name).random(num_codewords) for name in names]
    return arguments | {"dropped_codewords": torch.from_numpy(np.stack(drawn) < probability)}


def add_gradient(model: DreSlclModel, gradient: list[torch.Tensor]) -> None:
    """Adds a gradient from `BankMode.other_gradient` to that of the tile encoder's parameters."""
    for parameter, part in zip(trained_encoder_parameters(model), gradient, strict=True):
        parameter.grad = part if parameter.grad is None else parameter.grad + part
