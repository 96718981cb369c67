# SPDX-License-Identifier: Apache-2.0
"""How near a step's gradient is to the exact one, measured while training, on one slide.

Letters: b slides of this process, M sampled tiles of each, K codewords, D feature width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from modeling_dre_slcl import DreSlclModel
from modeling_dre_slcl.residual_encoder import residual_sums
from modeling_dre_slcl.residual_estimate import estimate_residuals

from .bank_modes import BankMode, PlannedTiles
from .whole_slides import WholeSlides, random_state, trained_encoder_parameters

Texts = dict[str, torch.Tensor]


class GradientCheck:
    """Compares gradients of the tile encoder, each through one slide's tiles. Changes nothing in the run.

    The exact one is that of all tiles of the slide, with the other slides of the batch as the mode sees them.

    Args:
        mode (`BankMode`): the run's.
        whole_slides (`WholeSlides`): reaches all tiles.
    """

    def __init__(self, mode: BankMode, whole_slides: WholeSlides) -> None:
        self.mode, self.whole_slides = mode, whole_slides
        self.accelerator = whole_slides.accelerator

    def cosine(
        self,
        model: DreSlclModel,
        tiles: PlannedTiles,
        pixel_values: torch.Tensor,
        texts: Texts,
        shard: int,
    ) -> float:
        """Measures the cosine. Collective.

        Args:
            model (`DreSlclModel`): unwrapped.
            tiles (`PlannedTiles`): the step's plan.
            pixel_values (`torch.Tensor` of shape `(b, M, C, H, W)`, float): its sampled tiles.
            texts (`dict`): the reports, as `DreSlclModel.contrast` takes them.
            shard (`int`): the slide, by its place in the batch of all processes.

        Returns:
            `float`: the same on every process; NaN where a gradient is zero.
        """
        cosine = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        owned = list(self.whole_slides.dataset.sampler.owned_shards)
        places = [owned.index(shard)] if shard in owned else []
        with _undisturbed(model, tiles.plan.step):
            features = self.features(model, pixel_values)
            residuals, counts, found = self.mode_gradient(model, tiles, pixel_values, features, texts, places)
            exact = self.exact_gradient(
                model, tiles, pixel_values, features, texts, places, others=(residuals, counts)
            )
        if places:
            cosine += F.cosine_similarity(flat(found), flat(exact), dim=0)
        return float(self.accelerator.reduce(cosine, "sum"))

    @torch.no_grad()
    def features(self, model: DreSlclModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes sampled tiles `(b, M, C, H, W)` slide by slide: `torch.Tensor` of shape `(b, M, D)`."""
        return torch.stack([self._encode(model, slide) for slide in pixel_values])

    def mode_gradient(
        self,
        model: DreSlclModel,
        tiles: PlannedTiles,
        pixel_values: torch.Tensor,
        features: torch.Tensor,
        texts: Texts,
        places: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """The encoder's gradient as the mode has it, through the slides at `places` of this process's plan.

        Collective. Arguments as in `cosine`; `features` from the method above.

        Returns:
            `tuple`: residuals of shape `(b, K, D)` and counts of shape `(b, K)` as the mode estimates them, and a
            `list` of `torch.Tensor`, one gradient per parameter of `trained_encoder_parameters`.
        """
        device = pixel_values.device
        arguments = self.mode.arguments_on(device, model, tiles)
        features = features.clone().requires_grad_()
        mask = tiles.sampled.to(device) >= 0
        residuals, counts = estimate_residuals(features, model.codebook, mask, **arguments)
        others = arguments.get("stored_residuals")
        inputs = [value for value in (features, others) if value is not None and value.requires_grad]
        upstream = torch.autograd.grad(_loss(model, residuals, counts, texts), inputs)
        gradient = self._sampled_gradient(model, pixel_values, upstream[0], places)
        if len(upstream) > 1:
            others = self.whole_slides.gradient(model, tiles.plan, places, upstream[1][places])
            gradient = _sum(gradient, others)
        return residuals.detach(), counts, gradient

    def exact_gradient(
        self,
        model: DreSlclModel,
        tiles: PlannedTiles,
        pixel_values: torch.Tensor,
        features: torch.Tensor,
        texts: Texts,
        places: Sequence[int],
        *,
        others: tuple[torch.Tensor, torch.Tensor],
    ) -> list[torch.Tensor]:
        """The encoder's gradient through all tiles of the slides at `places`.

        Collective. Arguments as in `mode_gradient`; `others` are residuals and counts of all slides of the plan, of
        which those at `places` are not used.
        """
        mask = tiles.sampled.to(pixel_values.device) >= 0
        features = features.clone().requires_grad_()
        sampled, sampled_counts = residual_sums(features, model.codebook, mask)
        residuals, counts = others[0].clone(), others[1].clone()
        if places:
            rest, rest_counts = self.whole_slides.residuals(model, tiles.plan, places)
            residuals[places] = sampled.detach()[places] + rest.to(residuals)
            counts[places] = sampled_counts[places] + rest_counts.to(counts)
        residuals.requires_grad_()
        (upstream,) = torch.autograd.grad(_loss(model, residuals, counts, texts), [residuals])
        (by_feature,) = torch.autograd.grad(sampled, [features], upstream)
        rest = self.whole_slides.gradient(model, tiles.plan, places, upstream[places])
        return _sum(rest, self._sampled_gradient(model, pixel_values, by_feature, places))

    def _sampled_gradient(
        self, model: DreSlclModel, pixel_values: torch.Tensor, upstream: torch.Tensor, places: Sequence[int]
    ) -> list[torch.Tensor]:
        """Passes a gradient by features `(b, M, D)` on to the encoder, through the slides at `places`."""
        parameters = trained_encoder_parameters(model)
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for place in places:
            features = self._encode(model, pixel_values[place])
            total = _sum(total, torch.autograd.grad(features, parameters, upstream[place].to(features)))
        return total

    def _encode(self, model: DreSlclModel, pixel_values: torch.Tensor) -> torch.Tensor:
        with self.accelerator.autocast():
            return model.get_tile_features(pixel_values)


def _loss(model: DreSlclModel, residuals: torch.Tensor, counts: torch.Tensor, texts: Texts) -> torch.Tensor:
    return model.contrast(model.encode_residuals(residuals, counts), **texts).loss


def _sum(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [a + b for a, b in zip(first, second, strict=True)]


def flat(gradient: Sequence[torch.Tensor]) -> torch.Tensor:
    """A gradient as one vector, float64."""
    return torch.cat([part.flatten().double() for part in gradient])


@contextmanager
def _undisturbed(model: DreSlclModel, step: int) -> Iterator[None]:
    """Evaluation mode without dropout, and random numbers of its own; both are put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with random_state(step):
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
