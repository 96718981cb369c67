# SPDX-License-Identifier: Apache-2.0
"""Every slide of a split -> its embedding, by the code that embeds slides everywhere else.

Letters: S slides, D feature width, E joint width.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_dre_slcl.slide_inference import describe_state, encode_tile_batches
from modeling_dre_slcl.slide_reader import SlideError

from .slide_rows import SlideRow
from .tile_source import TileSource, check_geometry

logger = logging.getLogger(__name__)


@dataclass
class EmbeddedSplit:
    """Embeddings of the slides of a split, in the dataset's order.

    Args:
        slide_ids (`list` of `str`), case_ids (`list` of `str`), reports (`list` of `str`): of each slide.
        labels (`dict`): label column -> value of each slide.
        slide_embedding (`np.ndarray` of shape `(S, D)`, float32): for probes and slide-to-slide search.
        slide_projection (`np.ndarray` of shape `(S, E)`, float32): L2-normalised, for comparison with text.
        refused (`list` of `dict`): `slide_id`, `reason` and `message` of slides that could not be read.
    """

    slide_ids: list[str]
    case_ids: list[str]
    reports: list[str]
    labels: dict[str, list[Any]]
    slide_embedding: np.ndarray
    slide_projection: np.ndarray
    refused: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.slide_ids)


class _TileReadError(Exception):
    """Tells an error of reading, which concerns one slide, from one of the model, which concerns all."""


def embed_split(
    model: PreTrainedModel,
    image_processor: Any,
    source: TileSource,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> EmbeddedSplit:
    """Embeds all slides of a split; a slide that cannot be read is logged, recorded and left out.

    Tiles are read by a thread while others are encoded; memory does not grow with the number of tiles.

    Args:
        model (`DreSlclModel`): the model; its mode is the same afterwards.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        source (`TileSource`): the split.
        batch_size (`int`, defaults to 64): tiles encoded at once.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `EmbeddedSplit`.

    Raises:
        ValueError: if the dataset's tiles are not those of the model, no slide can be read, or an embedding is not
            finite.
    """
    check_geometry(source, model.config.tile_size_px, float(model.config.tile_mpp))
    kept, vectors, refused = [], [], []
    training, _ = model.training, model.eval()
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="tile-reader") as reader:
            bar = tqdm(source.slides, desc=f"embedding {source.split}", unit="slide", disable=not progress)
            for place, row in enumerate(bar):
                try:
                    state, _ = encode_tile_batches(
                        model, image_processor, _read_ahead(reader, source.iter_batches(place, batch_size))
                    )
                except _TileReadError as error:
                    refused.append(_refusal(row, error))
                    continue
                vectors.append(_vectors(describe_state(model, state), row))
                kept.append(row)
    finally:
        model.train(training)
    if not kept:
        raise ValueError(f"{source.dataset}: none of the {len(refused)} slides of split '{source.split}' can be read.")
    embedding, projection = (np.stack(arrays) for arrays in zip(*vectors, strict=True))
    return EmbeddedSplit(
        slide_ids=[row.slide_id for row in kept],
        case_ids=[row.case_id for row in kept],
        reports=[row.report for row in kept],
        labels={name: [row.labels.get(name) for row in kept] for name in kept[0].labels},
        slide_embedding=embedding,
        slide_projection=projection,
        refused=refused,
    )


def _read_ahead(reader: Executor, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields batches of tiles, the next being read meanwhile."""
    pending = reader.submit(next, batches, None)
    while True:
        try:
            tiles = pending.result()
        except (ValueError, OSError) as error:
            raise _TileReadError(str(error)) from error
        if tiles is None:
            return
        pending = reader.submit(next, batches, None)
        yield tiles


def _refusal(row: SlideRow, error: _TileReadError) -> dict[str, str]:
    logger.warning("Slide %s is left out: %s", row.slide_id, error)
    reason = error.__cause__.reason if isinstance(error.__cause__, SlideError) else "unreadable"
    return {"slide_id": row.slide_id, "reason": reason, "message": str(error)}


def _vectors(described: dict[str, Any], row: SlideRow) -> tuple[np.ndarray, np.ndarray]:
    """Embedding `(D,)` and projection `(E,)` of a slide, float32."""
    embedding, projection = (described[name].numpy() for name in ("slide_embedding", "slide_projection"))
    if not (np.isfinite(embedding).all() and np.isfinite(projection).all()):
        raise ValueError(f"The embedding of slide {row.slide_id} is not finite; the model's weights are damaged.")
    return embedding, projection
