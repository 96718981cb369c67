# SPDX-License-Identifier: Apache-2.0
"""AdamW in groups, and its learning rate as a function of the step, so that there is no scheduler state to lose."""

import math

import torch

from modeling_dre_slcl import DreSlclModel

from .config import TrainConfig


def build_optimizer(model: DreSlclModel, config: TrainConfig) -> torch.optim.AdamW:
    """Builds AdamW: the tile encoder at its own learning rate, weight decay on matrices only.

    Args:
        model (`DreSlclModel`): its parameters that require a gradient are optimised.
        config (`TrainConfig`): learning rates and weight decay.
    """
    encoder = set(model.tile_encoder.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = []
    for in_encoder in (True, False):
        for is_matrix in (True, False):
            chosen = [p for p in trained if (p in encoder) == in_encoder and (p.ndim > 1) == is_matrix]
            if chosen:
                decay = config.weight_decay if is_matrix else 0.0
                peak = config.learning_rate if in_encoder else config.head_learning_rate
                groups.append({"params": chosen, "weight_decay": decay, "peak_learning_rate": peak})
    return torch.optim.AdamW(groups, lr=0.0)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to zero; again for finalizing.

    Args:
        step (`int`): counted from 0; steps from `num_steps` on finalize the head.
        config (`TrainConfig`): `num_steps`, `warmup_steps` and `finalize_steps`.
    """
    if step >= config.num_steps:
        return _cosine((step - config.num_steps) / max(1, config.finalize_steps))
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return _cosine((step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
    """Sets every group's learning rate for a step; returns the last group's, which is the head's."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"] * learning_rate_factor(step, config)
    return optimizer.param_groups[-1]["lr"]


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * min(1.0, progress))) / 2
