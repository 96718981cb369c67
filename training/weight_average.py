# SPDX-License-Identifier: Apache-2.0
"""A running average of a model's trained weights, which is often better than the weights of any one step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WeightAverage:
    """An exponential moving average of parameters.

    Early on the decay is lower, `(1 + step) / (10 + step)`, so that the random weights of the start are forgotten.

    Args:
        parameters (`dict`): name -> parameter; those that are trained.
        decay (`float`): share of the average that a step keeps.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after `step` completed steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, [p.detach() for p in self.parameters.values()], 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Gives the model the average for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the average inside, and its own weights again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(own[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the average, on CPU, for a checkpoint."""
        return {name: value.cpu().contiguous() for name, value in self.averages.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts back what `tensors` returned.

        Raises:
            ValueError: if it is of other parameters.
        """
        if tensors.keys() != self.averages.keys():
            other = sorted(tensors.keys() ^ self.averages.keys())
            raise ValueError(f"The average of the checkpoint is of other weights than this model's: `{other[0]}`.")
        for name, value in tensors.items():
            self.averages[name].copy_(value)
