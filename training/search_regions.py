# SPDX-License-Identifier: Apache-2.0
"""Which regions of a slide match a text: each region encoded as a slide of its own, from stored tile features.

A slide's residuals are sums over tiles, so those of a region are sums over its tiles: no pixel is read again.

Letters: N tiles, R regions, K codewords, D feature width, E joint width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from modeling_dre_slcl.residual_encoder import assign_codewords

from .stored_features import StoredTiles

_REGIONS_AT_ONCE = 128
_FULL_SHARE = 0.25  # of a region's places for tiles; what holds less is an edge, not a region


@dataclass(frozen=True)
class Regions:
    """Square regions of one slide that hold tissue.

    Args:
        projection (`torch.Tensor` of shape `(R, E)`, float32): of each region, L2-normalised: compare with text.
        region_xy (`np.ndarray` of shape `(R, 2)`, int64): level-0 (x, y) of the top-left corners.
        size_level0_px (`int`): their side on level 0.
        num_tiles (`np.ndarray` of shape `(R,)`, int64): tiles in each.
        region_of_tile (`np.ndarray` of shape `(N,)`, int64): region of each tile, -1 for none.
    """

    projection: torch.Tensor
    region_xy: np.ndarray
    size_level0_px: int
    num_tiles: np.ndarray
    region_of_tile: np.ndarray


@torch.no_grad()
def encode_regions(model: PreTrainedModel, tiles: StoredTiles, region_tiles: int = 4) -> Regions:
    """Divides a slide into squares and encodes each as a slide of its own.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        tiles (`StoredTiles`): of the slide.
        region_tiles (`int`, defaults to 4): side of a region in tiles; 1 makes every tile a region. A region with
            tissue in less than a quarter of its places is left out.

    Returns:
        `Regions`: from top to bottom, then from left to right.

    Raises:
        ValueError: if `region_tiles` is below 1, or nothing says how large a tile is.
    """
    if region_tiles < 1:
        raise ValueError(f"region_tiles: expected at least 1, found {region_tiles}.")
    side = tiles.side_level0_px(model.config)
    size = region_tiles * side
    origin = tiles.tile_xy.min(axis=0).astype(np.int64)
    # A tile belongs to the region that holds its centre, whatever rounding did to its corner.
    cells = (tiles.tile_xy - origin + side // 2) // size
    rows_first, inverse, counts = np.unique(cells[:, ::-1], axis=0, return_inverse=True, return_counts=True)
    kept = counts >= max(1, _FULL_SHARE * region_tiles**2)
    if not kept.any():  # a slide of a few tiles
        kept[:] = True
    number = np.where(kept, np.cumsum(kept) - 1, -1)
    region_of_tile = number[inverse.reshape(-1)]
    features = torch.from_numpy(tiles.tile_features)
    return Regions(
        projection=_project(model, features, torch.from_numpy(region_of_tile), int(kept.sum())),
        region_xy=rows_first[kept][:, ::-1] * size + origin,
        size_level0_px=size,
        num_tiles=counts[kept],
        region_of_tile=region_of_tile,
    )


def _project(model: PreTrainedModel, features: torch.Tensor, region: torch.Tensor, num_regions: int) -> torch.Tensor:
    """Features `(N, D)` and the region of each tile `(N,)` -> projections of the regions `(R, E)`."""
    codebook = model.codebook
    num_codewords, width = codebook.shape
    order = torch.argsort(region, stable=True)
    bounds = torch.searchsorted(region[order], torch.arange(num_regions + 1))
    projections = []
    for start in range(0, num_regions, _REGIONS_AT_ONCE):
        stop = min(start + _REGIONS_AT_ONCE, num_regions)
        own = order[bounds[start] : bounds[stop]]
        part = features[own].to(model.device, model.dtype)
        assignment = assign_codewords(part, codebook)
        place = (region[own].to(model.device) - start) * num_codewords + assignment
        residuals = torch.zeros((stop - start) * num_codewords, width, dtype=torch.float64, device=model.device)
        residuals.index_add_(0, place, part.double() - codebook[assignment].double())
        counts = torch.bincount(place, minlength=len(residuals)).view(-1, num_codewords)
        encoded = model.encode_residuals(residuals.view(-1, num_codewords, width), counts)
        projections.append(encoded.slide_projection.float().cpu())
    return torch.cat(projections)
