# SPDX-License-Identifier: Apache-2.0
"""The same architecture without training: what a trained model must beat.

Letters: K codewords, D feature width.
"""

import copy
import logging
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from modeling_dre_slcl import DreSlclModel

from .codebook import fit_codebook
from .sampler import generator
from .tile_source import TileSource

logger = logging.getLogger(__name__)


@torch.no_grad()
def random_baseline(
    model: PreTrainedModel,
    image_processor: Any,
    source_train: TileSource,
    *,
    seed: int,
    codebook_sample: int = 8192,
    batch_size: int = 64,
) -> DreSlclModel:
    """Builds a model of the same config with random weights, and fits its codebook on its own features.

    Reports are read by the trained model's text model, which is frozen in training and shared, not copied.

    Args:
        model (`DreSlclModel`): the trained model.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        source_train (`TileSource`): training slides; a sample of their tiles makes the codebook.
        seed (`int`): of weights and sample.
        codebook_sample (`int`, defaults to 8192): tiles in the sample, over all slides.
        batch_size (`int`, defaults to 64): tiles encoded at once.

    Returns:
        `DreSlclModel`: in evaluation mode, with the device and dtype of `model`.

    Raises:
        ValueError: if the training slides have too few distinct tiles for the codebook.
    """
    config = copy.deepcopy(model.config)
    config.text_config = None
    # Weights are drawn on the CPU, from a generator that is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        baseline = DreSlclModel(config)
    baseline = baseline.to(model.device, model.dtype).eval()
    baseline.text_encoder = model.text_encoder
    per_slide = max(1, codebook_sample // len(source_train.slides))
    features = [
        _sample_features(baseline, image_processor, source_train, place, per_slide, seed, batch_size)
        for place in range(len(source_train.slides))
    ]
    codebook = fit_codebook(np.concatenate(features), config.num_codewords, seed)
    baseline.codebook.copy_(torch.from_numpy(codebook))
    return baseline


def _sample_features(
    model: DreSlclModel,
    image_processor: Any,
    source: TileSource,
    place: int,
    per_slide: int,
    seed: int,
    batch_size: int,
) -> np.ndarray:
    """Features of random tiles of a slide: `(at most per_slide, D)`, float32; fewer if it cannot be read."""
    row = source.slides[place]
    tiles = np.sort(generator(seed, "baseline", row.slide_id).permutation(row.num_tiles)[:per_slide])
    kept = [np.zeros((0, model.config.hidden_size), dtype=np.float32)]
    for start in range(0, len(tiles), batch_size):
        try:
            pixels = source.read(place, tiles[start : start + batch_size])
        except (ValueError, OSError) as error:
            logger.warning("Slide %s is left out of the codebook: %s", row.slide_id, error)
            break
        values = image_processor.tiles_to_pixel_values(pixels, model.device).to(model.dtype)
        kept.append(model.get_tile_features(values).float().cpu().numpy())
    return np.concatenate(kept)
