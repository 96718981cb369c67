# SPDX-License-Identifier: Apache-2.0
"""Slide file -> slide embedding, in memory that does not grow with the number of tiles.

Letters: N tiles, K codewords, D feature width, E joint width.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .image_processing_dre_slcl import DreSlclImageProcessor
from .slide_state import SlideState


@torch.no_grad()
def encode_tile_batches(
    model: PreTrainedModel, image_processor: Any, batches: Iterable[np.ndarray], *, keep_features: bool = False
) -> tuple[SlideState, torch.Tensor | None]:
    """Encodes a stream of tiles of one slide into its running state.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        batches (iterable of `np.ndarray` of shape `(n, H, W, 3)`, uint8): RGB tiles.
        keep_features (`bool`, defaults to `False`): also return each tile's feature.

    Returns:
        `tuple`: the `SlideState`, and features of shape `(N, D)`, float32, on CPU, or `None`.
    """
    state, kept = model.empty_state(), []
    for tiles in batches:
        features = model.get_tile_features(image_processor.tiles_to_pixel_values(tiles, model.device).to(model.dtype))
        state.add(features, model.codebook)
        if keep_features:
            kept.append(features.float().cpu())
    return state, torch.cat(kept) if kept else None


@torch.no_grad()
def describe_state(model: PreTrainedModel, state: SlideState) -> dict[str, torch.Tensor]:
    """A slide's running state -> its named vectors, on CPU.

    Returns:
        `dict`: `slide_embedding` `(D,)`, `slide_projection` `(E,)` and `residuals` `(K, D)`, float32, and
        `codeword_counts` `(K,)`, int64.
    """
    outputs = model.get_state_features(state)
    return {
        "slide_embedding": outputs.slide_embedding[0].float().cpu(),
        "slide_projection": outputs.slide_projection[0].float().cpu(),
        "residuals": outputs.residuals[0].float().cpu(),
        "codeword_counts": state.counts.cpu(),
    }


def encode_slide(
    model: PreTrainedModel,
    path: str | Path,
    *,
    image_processor: Any = None,
    slide_id: str | None = None,
    mpp: float | None = None,
    min_tissue_fraction: float = 0.25,
    tile_batch_size: int = 32,
    num_threads: int = 2,
    return_tile_features: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Reads, tiles and encodes one slide with the geometry that the model was trained with.

    Args:
        model (`DreSlclModel`): the model.
        path (`str` or `Path`): the slide, in any format that OpenSlide opens.
        image_processor (`DreSlclImageProcessor`, *optional*): by default the one beside the model's weights.
        slide_id (`str`, *optional*): name of the slide; by default the file's stem.
        mpp (`float`, *optional*): level-0 resolution in um/px, for a file that does not state it.
        min_tissue_fraction (`float`, defaults to 0.25): tiles with less tissue are left out.
        tile_batch_size (`int`, defaults to 32): tiles encoded at once.
        num_threads (`int`, defaults to 2): threads that read tiles while others are encoded.
        return_tile_features (`bool`, defaults to `False`): also return `tile_features` and `tile_xy`.
        progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `dict`: `slide_id`, `num_tiles`, `mpp`, `slide_embedding` `(D,)`, `slide_projection` `(E,)`, `residuals`
        `(K, D)`, `codeword_counts` `(K,)`; with `return_tile_features` also `tile_features` `(N, D)`, float32, and
        `tile_xy` `(N, 2)`, int32, level-0 (x, y) of each tile's top-left corner, and `tile_size_level0_px`.

    Raises:
        SlideError: if the slide cannot be read, has no usable mpp, or no tissue.
    """
    # Here, so that a model that never opens a slide needs neither OpenSlide nor OpenCV.
    from .slide_reader import SlideReader
    from .slide_tiles import iter_tile_batches, tile_slide
    from .tile_grid import TileGridConfig

    if image_processor is None:
        image_processor = _image_processor_of(model)
    grid_config = TileGridConfig(
        tile_size_px=model.config.tile_size_px,
        tile_mpp=float(model.config.tile_mpp),
        min_tissue_fraction=min_tissue_fraction,
    )
    with SlideReader(path, slide_id=slide_id, mpp=mpp) as reader:
        info, grid = reader.info, tile_slide(reader, grid_config)
    batches = iter_tile_batches(
        path,
        grid,
        batch_size=tile_batch_size,
        mpp=info.mpp,
        slide_id=info.slide_id,
        num_threads=num_threads,
        progress=progress,
    )
    training, _ = model.training, model.eval()
    try:
        pixels = (tiles for _, tiles in batches)
        state, features = encode_tile_batches(model, image_processor, pixels, keep_features=return_tile_features)
        result = {"slide_id": info.slide_id, "num_tiles": len(grid), "mpp": info.mpp, **describe_state(model, state)}
    finally:
        model.train(training)
    if return_tile_features:
        result["tile_features"] = features
        result["tile_xy"] = torch.from_numpy(grid.tile_xy.astype(np.int32))
        result["tile_size_level0_px"] = grid.tile_size_level0_px
    return result


def _image_processor_of(model: PreTrainedModel) -> DreSlclImageProcessor:
    """Loads the image processor from where the model came from, at the same revision."""
    source = model.config._name_or_path
    if not source:
        raise ValueError(
            "This model was not loaded by `from_pretrained`, so that its image processor is not known; pass "
            "`image_processor=DreSlclImageProcessor(...)`."
        )
    revision = getattr(model.config, "_commit_hash", None) or "main"
    return DreSlclImageProcessor.from_pretrained(source, revision=revision)
