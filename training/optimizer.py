# SPDX-License-Identifier: Apache-2.0
"""AdamW in groups, and its learning rate as a function of the step, so that there is no scheduler state to lose."""

import math

import timm
import torch
from transformers import PreTrainedModel

from modeling_dre_slcl import DreSlclModel

from .config import TrainConfig
from .lora import add_lora


def choose_trained(model: DreSlclModel, config: TrainConfig) -> None:
    """Freezes what a run does not train, so that every parameter that is left receives a gradient.

    Args:
        model (`DreSlclModel`): its tile encoder is frozen, trained, or given adapters.
        config (`TrainConfig`): `train_tile_encoder`, `lora` and `objective`.
    """
    model.tile_encoder.requires_grad_(config.train_tile_encoder)
    if config.lora is not None:
        add_lora(model.tile_encoder, config.lora)
    if config.objective == "labels":
        model.slide_projection.requires_grad_(False)
        model.text_projection.requires_grad_(False)
        for parameter in (model.logit_scale, model.logit_bias):
            if parameter is not None:
                parameter.requires_grad_(False)


def build_optimizer(model: DreSlclModel, config: TrainConfig) -> torch.optim.AdamW:
    """Builds AdamW: the tile encoder at its own learning rate, weight decay on matrices only.

    Args:
        model (`DreSlclModel`): its parameters that require a gradient are optimised.
        config (`TrainConfig`): learning rates, their decay by block, and weight decay.
    """
    encoder = dict.fromkeys(model.tile_encoder.parameters(), 1.0)
    if config.layer_decay < 1:
        depths = block_depths(model.tile_encoder)
        last = max(depths.values())
        encoder = {p: config.layer_decay ** (last - depths[name]) for name, p in model.tile_encoder.named_parameters()}
    groups: dict[tuple[bool, float, bool], list[torch.nn.Parameter]] = {}
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        key = (parameter in encoder, encoder.get(parameter, 1.0), parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    # The tile encoder from its output on, matrices before the rest; the head last.
    order = sorted(groups, reverse=True)
    return torch.optim.AdamW(
        [
            {
                "params": groups[in_encoder, factor, is_matrix],
                "weight_decay": config.weight_decay if is_matrix else 0.0,
                "peak_learning_rate": factor * (config.learning_rate if in_encoder else config.head_learning_rate),
            }
            for in_encoder, factor, is_matrix in order
        ],
        lr=0.0,
    )


def block_depths(encoder: PreTrainedModel) -> dict[str, int]:
    """How deep each parameter of a tile encoder lies: 0 for the embedding, 1 for the first block, and so on.

    A timm model says itself how its parameters are grouped. Those of a transformers model are told by the number of
    their block in the first list of blocks; what comes after the blocks lies as deep as the last, as in timm.

    Raises:
        ValueError: for an encoder without such a list.
    """
    if hasattr(encoder, "timm_model"):
        timm_model = encoder.timm_model
        depths = timm.models.group_parameters(timm_model, timm_model.group_matcher(coarse=False), reverse=True)
        return {f"timm_model.{name}": depth for name, depth in depths.items()}
    lists = [name for name, module in encoder.named_modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise ValueError("`layer_decay` needs a tile encoder of numbered blocks; this one has none. Set it to 1.")
    prefix = f"{lists[0]}."
    num_blocks = len(encoder.get_submodule(lists[0]))
    first_block = next(i for i, (name, _) in enumerate(encoder.named_parameters()) if name.startswith(prefix))
    depths = {}
    for place, (name, _) in enumerate(encoder.named_parameters()):
        if name.startswith(prefix):
            depths[name] = 1 + int(name.removeprefix(prefix).split(".")[0])
        else:
            depths[name] = 0 if place < first_block else num_blocks
    return depths


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
