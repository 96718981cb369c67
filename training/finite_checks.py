# SPDX-License-Identifier: Apache-2.0
"""Stops a run at the first number that is not finite, before it reaches a weight, and says where it came from."""

from typing import Any

import torch
from torch import nn

from .run_data import RunData
from .sampler import PADDING, StepPlan


class FiniteChecks:
    """Watches the forward passes of a model, so that a loss that is not finite can be traced to a tile.

    Args:
        data (`RunData`): names slides.
        model (`DreSlclModel`): the model.
    """

    def __init__(self, data: RunData, model: nn.Module) -> None:
        self.data = data
        self._tile_features: torch.Tensor | None = None
        model.register_forward_hook(self._keep)

    def check_loss(self, loss: torch.Tensor, plan: StepPlan) -> None:
        """Checks a step's loss.

        Raises:
            FloatingPointError: naming the step and the tile or the report that is not finite, else all its slides.
        """
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss of step {plan.step} is not finite: {self._cause(plan)}.")

    def check_gradient(self, norm: float | torch.Tensor, plan: StepPlan) -> None:
        """Checks the norm of a step's gradient, before the optimizer takes the step.

        Raises:
            FloatingPointError: naming the step and its slides.
        """
        if not torch.isfinite(torch.as_tensor(norm)):
            raise FloatingPointError(
                f"The gradient of step {plan.step} is not finite; slides of this process: {self.data.names(plan)}. "
                "No weight was changed. Lower the learning rates, or use `mixed_precision: no`."
            )

    def _cause(self, plan: StepPlan) -> str:
        features = self._tile_features
        if features is not None and features.shape[:2] == plan.sampled.shape:
            wrong = ~torch.isfinite(features).all(dim=-1).cpu() & torch.from_numpy(plan.sampled != PADDING)
            for place, tile in wrong.nonzero().tolist():
                name = self.data.source.slides[int(plan.slides[place])].slide_id
                return f"the feature of tile {plan.sampled[place, tile]} of slide {name} is not"
        for slide in plan.slides.tolist():
            if not torch.isfinite(self.data.report_embeds[slide]).all():
                return f"the encoding of the report of slide {self.data.source.slides[slide].slide_id} is not"
        return f"slides of this process: {self.data.names(plan)}"

    def _keep(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        features = getattr(outputs, "tile_features", None)
        self._tile_features = None if features is None else features.detach()
