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
from .slide_opening import OpenedSlide
from .slide_state import SlideState
from .slide_sums import describe_state


class TileBatchEncoder:
    """Pixels of tiles -> their features, in batches of one size.

    Numerical libraries choose other ways to add for other shapes, which changes the last bits of a result. So a batch
    that is not full is filled up, and a tile has the same feature whatever tiles are encoded beside it.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        batch_size (`int`): tiles encoded at once.
    """

    def __init__(self, model: PreTrainedModel, image_processor: Any, batch_size: int) -> None:
        self.model, self.image_processor, self.batch_size = model, image_processor, batch_size

    @torch.no_grad()
    def __call__(self, tiles: np.ndarray) -> torch.Tensor:
        """Encodes tiles.

        Args:
            tiles (`np.ndarray` of shape `(n, H, W, 3)`, uint8): RGB pixels, `1 <= n <= batch_size`.

        Returns:
            `torch.Tensor` of shape `(n, D)`, on the model's device, perhaps still being computed.
        """
        count = len(tiles)
        if count < self.batch_size:
            padding = np.zeros((self.batch_size - count, *tiles.shape[1:]), dtype=np.uint8)
            tiles = np.concatenate([tiles, padding])
        model = self.model
        values = self.image_processor.tiles_to_pixel_values(tiles, model.device).to(model.dtype)
        return model.get_tile_features(values)[:count]


@torch.no_grad()
def encode_tile_batches(
    model: PreTrainedModel, image_processor: Any, batches: Iterable[np.ndarray], *, keep_features: bool = False
) -> tuple[SlideState, torch.Tensor | None]:
    """Encodes a stream of tiles of one slide into its running state.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        batches (iterable of `np.ndarray` of shape `(n, H, W, 3)`, uint8): RGB tiles; none is larger than the first.
        keep_features (`bool`, defaults to `False`): also return each tile's feature.

    Returns:
        `tuple`: the `SlideState`, and features of shape `(N, D)`, float32, on CPU, or `None`.
    """
    state, kept, encoder = model.empty_state(), [], None
    for tiles in batches:
        encoder = encoder or TileBatchEncoder(model, image_processor, len(tiles))
        features = encoder(tiles).float().cpu()
        state.add(features, model.codebook)
        if keep_features:
            kept.append(features)
    return state, torch.cat(kept) if kept else None


def check_model(model: PreTrainedModel) -> None:
    """Refuses a model that cannot embed anything.

    Raises:
        ValueError: if its codebook was never fitted, or a weight is not finite.
    """
    name = model.config._name_or_path or "This model"
    if not model.codebook.any():
        raise ValueError(
            f"{name}: all codewords of its codebook are zero, so it was never fitted. Train the model "
            "(`dre-slcl train` fits the codebook), or export it from a finished run."
        )
    for field, tensor in (*model.named_parameters(), ("codebook", model.codebook)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: the weights `{field}` are not finite; download or train the model again.")


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
    tolerance: float | None = None,
    max_tiles: int | None = None,
    seed: int = 0,
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
        tolerance (`float`, *optional*): encode only so many tiles, drawn evenly over the slide, that 1 - cosine to
            the embedding of all of them is below this in about 95% of draws; how many that takes depends on the
            model (docs/embedding.md).
        max_tiles (`int`, *optional*): most tiles that are encoded.
        seed (`int`, defaults to 0): another number draws other tiles.
        progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `dict`: `slide_id`, `num_tiles`, `num_tiles_encoded`, `mpp`, `slide_embedding` `(D,)`, `slide_projection`
        `(E,)`, `residuals` `(K, D)`, `codeword_counts` `(K,)`, and `tile_xy` `(N, 2)`, int32, level-0 (x, y) of the
        top-left corner of each encoded tile; with `return_tile_features` also `tile_features` `(N, D)`, float32, and
        `tile_size_level0_px`. With `tolerance` or `max_tiles` also `estimated_error` and `error_bound`, 1 - cosine to
        the embedding of all tiles on average and in 95% of draws; `residuals` and `codeword_counts` are then what
        they are expected to be over all tiles.

    Raises:
        SlideError: if the slide cannot be read, has no usable mpp, no tissue, or a feature that is not finite.
        ValueError: if the model's codebook was never fitted, or an option is out of its range.
    """
    check_model(model)
    opened = OpenedSlide(
        model,
        path,
        slide_id=slide_id,
        mpp=mpp,
        min_tissue_fraction=min_tissue_fraction,
        tile_batch_size=tile_batch_size,
        num_threads=num_threads,
        return_tile_features=return_tile_features,
        tolerance=tolerance,
        max_tiles=max_tiles,
        seed=seed,
        progress=progress,
    )
    return encode_opened_slide(model, opened, image_processor=image_processor)


def encode_opened_slide(model: PreTrainedModel, opened: OpenedSlide, *, image_processor: Any = None) -> dict[str, Any]:
    """Encodes a slide that is open, and closes it; the model was checked before.

    Args:
        model (`DreSlclModel`): the model that it was opened for.
        opened (`OpenedSlide`): the slide.
        image_processor (`DreSlclImageProcessor`, *optional*): by default the one beside the model's weights.

    Returns:
        `dict`: see `encode_slide`.

    Raises:
        SlideError: if a tile cannot be read, or its feature is not finite.
    """
    if image_processor is None:
        image_processor = _image_processor_of(model)
    training, _ = model.training, model.eval()
    try:
        with opened:
            _encode_until_finished(TileBatchEncoder(model, image_processor, opened.tile_batch_size), opened)
        result = {"slide_id": opened.slide_id, "mpp": opened.mpp, **opened.sums.describe()}
    finally:
        model.train(training)
    if "tile_features" in result:
        result["tile_size_level0_px"] = opened.grid.tile_size_level0_px
    return result


def _encode_until_finished(encoder: TileBatchEncoder, opened: OpenedSlide) -> None:
    """Adds tiles to a slide's sums, in order, until these say that it is enough."""
    start, sums = 0, opened.sums
    for tiles in opened.batches():
        features = encoder(tiles).float().cpu()
        stop = start + len(features)
        while start < stop:
            end = min(stop, sums.limit)
            sums.add(features[len(features) - (stop - start) :][: end - start], start)
            if sums.is_finished():
                return
            start = end


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


__all__ = [
    "TileBatchEncoder",
    "check_model",
    "describe_state",
    "encode_opened_slide",
    "encode_slide",
    "encode_tile_batches",
]
