# SPDX-License-Identifier: Apache-2.0
"""Part 1, the tile encoder: pixels of tiles -> one L2-normalised feature per tile.

Any vision model of transformers, or of timm through `TimmWrapper`, serves. It is nested in the slide encoder as an
ordinary `PreTrainedModel`, so attention implementations, sharding plans and checkpointing reach it.

Letters: N tiles, C channels, H and W pixels, T tokens, D feature width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel


def build_tile_encoder(encoder_config: PreTrainedConfig, tile_pooling: str) -> PreTrainedModel:
    """Builds the tile encoder without loading weights.

    Args:
        encoder_config (`PreTrainedConfig`): a transformers vision config, or a `TimmWrapperConfig`.
        tile_pooling (`str`): as in `DreSlclConfig`. Unless it is `"pooler"`, a transformers encoder's own pooler with
            parameters is removed: they would never receive a gradient, which stops distributed training.

    Returns:
        `PreTrainedModel`: the encoder, in the dtype and on the device of the caller's context.
    """
    encoder = AutoModel.from_config(encoder_config)
    if hasattr(encoder, "timm_model") and not next(encoder.parameters()).is_meta:
        _initialise_as_timm(encoder)
    pooler = getattr(encoder, "pooler", None)
    if tile_pooling != "pooler" and pooler is not None and any(True for _ in pooler.parameters()):
        encoder.pooler = None
    return encoder


def _initialise_as_timm(encoder: PreTrainedModel) -> None:
    """Gives a wrapped timm model the initial weights that timm would.

    transformers draws every layer's weights from the same narrow normal distribution, from which convolutions hardly
    learn; timm knows what suits each architecture.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("This tile encoder is a timm model: install timm (`pip install timm`).") from error
    config = encoder.config
    own = timm.create_model(config.architecture, pretrained=False, num_classes=0, **(config.model_args or {}))
    encoder.timm_model.load_state_dict(own.state_dict())


def tile_encoder_width(encoder: PreTrainedModel) -> int:
    """Returns the width of the encoder's features.

    Raises:
        ValueError: if the encoder's config does not tell.
    """
    if hasattr(encoder, "timm_model"):
        return int(encoder.timm_model.num_features)
    width = (
        getattr(encoder.config, "hidden_size", None) or (getattr(encoder.config, "hidden_sizes", None) or [None])[-1]
    )
    if width is None:
        raise ValueError(
            f"The width of tile encoder '{encoder.config.model_type}' could not be read from its config "
            "(`hidden_size` or `hidden_sizes`); use another transformers vision model, or a timm model."
        )
    return int(width)


def pool_tile_states(
    last_hidden_state: torch.Tensor, pooler_output: torch.Tensor | None, pooling: str
) -> torch.Tensor:
    """Pools an encoder's output to one vector per tile.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(N, T, D)` or `(N, D, H, W)`): token states or a feature map.
        pooler_output (`torch.Tensor` of shape `(N, D)` or `(N, D, 1, 1)`, *optional*): the encoder's own pooling.
        pooling (`str`): `"cls"`, `"mean"` or `"pooler"`.

    Returns:
        `torch.Tensor` of shape `(N, D)`.

    Raises:
        ValueError: if the encoder does not give what `pooling` needs.
    """
    if pooling == "pooler":
        if pooler_output is None:
            raise ValueError(
                "`tile_pooling='pooler'`, but this tile encoder has no pooled output; use 'cls' or 'mean'."
            )
        return pooler_output.flatten(1)
    if last_hidden_state.ndim == 4:
        if pooling == "cls":
            raise ValueError(
                "`tile_pooling='cls'`, but this tile encoder gives a feature map; use 'mean' or 'pooler'."
            )
        return last_hidden_state.mean(dim=(2, 3))
    return last_hidden_state[:, 0] if pooling == "cls" else last_hidden_state.mean(dim=1)


def encode_tiles(encoder: nn.Module, pixel_values: torch.Tensor, pooling: str) -> torch.Tensor:
    """Encodes tiles.

    Args:
        encoder (`nn.Module`): from `build_tile_encoder`.
        pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, float): normalised pixels.
        pooling (`str`): `"cls"`, `"mean"` or `"pooler"`.

    Returns:
        `torch.Tensor` of shape `(N, D)`, float: features of unit L2 norm, as the memory bank stores them.
    """
    outputs = encoder(pixel_values=pixel_values, return_dict=True)
    features = pool_tile_states(outputs.last_hidden_state, getattr(outputs, "pooler_output", None), pooling)
    return F.normalize(features, dim=-1)


def encode_in_parts(
    encode: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor, num_parts: int
) -> torch.Tensor:
    """Encodes tiles in parts whose activations are not kept: the backward pass encodes each part again (GradCache).

    The loss still sees all tiles at once, so features and gradients are those of one part, to rounding; memory is that
    of one part. Splitting the loss instead would take negatives away from a contrastive loss.

    Args:
        encode (callable): pixels `(n, C, H, W)` -> features `(n, D)`.
        pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, float): normalised pixels.
        num_parts (`int`): parts, at most one per tile; 1 keeps all activations.

    Returns:
        `torch.Tensor` of shape `(N, D)`.
    """
    if num_parts == 1 or not torch.is_grad_enabled():
        return encode(pixel_values)
    part_size = -(-len(pixel_values) // num_parts)
    parts = [checkpoint(encode, part, use_reentrant=False) for part in pixel_values.split(part_size)]
    return torch.cat(parts)
