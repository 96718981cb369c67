# SPDX-License-Identifier: Apache-2.0
"""Loads a pretrained tile encoder, whole, and never from a pickle.

Letters: C channels, H = W the encoder's input size in px.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from .pretrained import check_loaded, load_pretrained, refuse_pickled_weights

logger = logging.getLogger(__name__)
# Names under which timm takes the same places.
_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Preprocessing:
    """What a tile encoder expects of its input, as far as its own files say.

    Args:
        mean, std (`list[float]`, *optional*): of each channel.
        size_px (`int`, *optional*): side of its input.
    """

    mean: list[float] | None = None
    std: list[float] | None = None
    size_px: int | None = None


def load_tile_encoder(name: str) -> tuple[PreTrainedModel, Preprocessing]:
    """Loads a tile encoder and what it expects of its input.

    Args:
        name (`str`): a folder, or a Hub repository, in transformers' or timm's layout; `hf-hub:` may stand before it.

    Raises:
        ValueError: if there are no weights as safetensors, or tensors are missing or left over.
    """
    source = encoder_source(name)
    refuse_pickled_weights(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        # Some repositories of timm's layout say twice that there is no head; transformers says so itself.
        (getattr(config, "model_args", None) or {}).pop("num_classes", None)
        encoder, loading = load_pretrained(source, config=config, output_loading_info=True, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"Tile encoder {name} cannot be loaded from a config.json and safetensors weights: {error} Pickled "
            "weights are not read; download them and see `dre-slcl convert-encoder --help`."
        ) from error
    check_loaded(f"tile encoder {name}", encoder, loading, may_lack=("pooler.",))
    return encoder, read_preprocessing(source, encoder)


def encoder_source(name: str) -> str:
    """The folder or Hub repository that a tile encoder's name means."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def read_preprocessing(source: str, encoder: PreTrainedModel) -> Preprocessing:
    """Reads what a tile encoder expects: timm keeps it in config.json, transformers in preprocessor_config.json."""
    timm_says = getattr(encoder.config, "pretrained_cfg", None)
    if timm_says:
        size = timm_says.get("input_size") or (None,)
        return Preprocessing(_floats(timm_says.get("mean")), _floats(timm_says.get("std")), size[-1])
    try:
        stored, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:
        return Preprocessing()
    size = stored.get("size")
    if stored.get("do_center_crop") and stored.get("crop_size"):
        size = stored["crop_size"]
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return Preprocessing(_floats(stored.get("image_mean")), _floats(stored.get("image_std")), size)


def _floats(values: Any) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


@torch.no_grad()
def check_input_size(encoder: PreTrainedModel, size_px: int, tile_size_px: int) -> None:
    """Encodes one empty tile, so that an encoder for another size is refused before anything else is done.

    Raises:
        ValueError: naming both sizes and the settings that mend it.
    """
    training, _ = encoder.training, encoder.eval()
    parameter = next(encoder.parameters())
    tile = torch.zeros(1, getattr(encoder.config, "num_channels", 3), size_px, size_px)
    try:
        encoder(pixel_values=tile.to(parameter))
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"The tile encoder does not take tiles of {size_px} x {size_px} px ({str(error).strip()}). Tiles of the "
            f"dataset have {tile_size_px} px; set `encoder_image_size_px` to the size that the encoder takes, or "
            "`image_size` in `tile_encoder_config`."
        ) from error
    finally:
        encoder.train(training)
    if size_px != tile_size_px:
        logger.info("Tiles of %d px are resized to %d px for the tile encoder.", tile_size_px, size_px)
