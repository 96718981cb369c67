# SPDX-License-Identifier: Apache-2.0
"""What every step of a run does around its loss: learning rate and randomness before, checks and descent after."""

import torch
from accelerate import Accelerator
from torch import nn

from .config import TrainConfig
from .finite_checks import FiniteChecks
from .optimizer import set_learning_rates
from .sampler import StepPlan


class OptimizerStep:
    """Prepares steps, and takes them.

    Args:
        config (`TrainConfig`): the run's settings.
        model (`torch.nn.Module`): as `accelerator.prepare` returned it.
        optimizer (`torch.optim.Optimizer`): of its trained parameters.
        accelerator (`Accelerator`): the run's.
        finite (`FiniteChecks`): stops the run at the first number that is not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        finite: FiniteChecks,
    ) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.accelerator, self.finite = accelerator, finite

    def start(self, step: int) -> float:
        """Sets what a step's arithmetic depends on, as a function of the step alone; returns the learning rate."""
        seed = self.config.seed * 1_000_003 + step
        self.accelerator.unwrap_model(self.model).residual_encoder.dropout_seed = seed
        # Dropout of the tile encoder itself is drawn by each process.
        torch.manual_seed(seed * 4099 + self.accelerator.process_index)
        return set_learning_rates(self.optimizer, step, self.config)

    def descend(self, plan: StepPlan) -> float:
        """Clips gradients and steps the optimizer; returns the gradient's norm before clipping.

        Raises:
            FloatingPointError: if it is not finite; no weight is changed then.
        """
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)
        self.finite.check_gradient(norm, plan)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)
