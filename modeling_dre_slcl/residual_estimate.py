# SPDX-License-Identifier: Apache-2.0
"""From the few tiles of a slide that are encoded now, and what is stored of the others, to the residuals of all.

In formulas, with S the tiles encoded now, x_j features and y_j stored ones:

    V_k = sum over S at k of (x_j - c_k) + sum over others at k of (y_j + d_j - c_k)

d_j is the movement since the tile was stored that the tiles of S show (`feature_drift`), or zero, and a tile is at
the codeword nearest to where it is by now.

Values count a tile once. Gradients need not: all n_k tiles of a slide at codeword k have the same upstream gradient,
that of V_k, so each of the s_k tiles of S there can stand for n_k / s_k of them (post-stratification: what counts is
the codeword where tiles are now, whatever the draw was made by). Where s_k = 0, the tile of S nearest to c_k stands
for all n_k.

Letters: B slides, M tiles of each, K codewords, D feature width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .feature_drift import FeatureDrift, fit_drift
from .residual_encoder import assign_codewords, residual_sums

MovedSums = Callable[[FeatureDrift], tuple[torch.Tensor, torch.Tensor]]


def estimate_residuals(
    tile_features: torch.Tensor,
    codebook: torch.Tensor,
    tile_mask: torch.Tensor | None = None,
    *,
    stand_for_all: bool = False,
    stored_residuals: torch.Tensor | None = None,
    stored_counts: torch.Tensor | None = None,
    dropped_codewords: torch.Tensor | None = None,
    stored_tile_features: torch.Tensor | None = None,
    stored_tile_ages: torch.Tensor | None = None,
    stored_tile_mask: torch.Tensor | None = None,
    moved_sums: MovedSums | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates residual sums of whole slides; differentiable in `tile_features` and in `stored_residuals`.

    Args:
        tile_features (`torch.Tensor` of shape `(B, M, D)`, float): features of the tiles encoded now.
        codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.
        tile_mask (`torch.Tensor` of shape `(B, M)`, bool, *optional*): False for padding.
        stand_for_all (`bool`, defaults to `False`): in the gradient, the tiles encoded now stand for all tiles that
            the residuals count; else each for itself.
        stored_residuals (`torch.Tensor` of shape `(B, K, D)`, *optional*): residual sums over other tiles.
        stored_counts (`torch.Tensor` of shape `(B, K)`, *optional*): the number of those tiles.
        dropped_codewords (`torch.Tensor` of shape `(B, K)`, bool, *optional*): codewords at which the tiles encoded
            now stand for all of the slide there, as many times as that has tiles, if there are any (stale-feature
            dropout).
        stored_tile_features (`torch.Tensor` of shape `(B, M, D)`, *optional*): what is stored of the tiles encoded
            now. Only with `moved_sums`, as the two that follow.
        stored_tile_ages (`torch.Tensor` of shape `(B, M)`, *optional*): steps since it was stored.
        stored_tile_mask (`torch.Tensor` of shape `(B, M)`, bool, *optional*): False where nothing is stored.
        moved_sums (callable, *optional*): takes the drift that the tiles encoded now show, and returns in place of
            `stored_residuals` and `stored_counts` those of the other tiles where they are by now
            (`MemoryBank.moved_residuals_of_others`). Collective then.

    Returns:
        `tuple`: residuals of shape `(B, K, D)` and counts of shape `(B, K)`, at least float32.
    """
    values = tile_features.detach()
    residuals, counts = residual_sums(values if stand_for_all else tile_features, codebook, tile_mask)
    if moved_sums is not None:
        drift = fit_drift(values, stored_tile_features, stored_tile_ages, stored_tile_mask)
        stored_residuals, stored_counts = moved_sums(drift)
    if stored_residuals is not None:
        stored_residuals, stored_counts = stored_residuals.to(residuals), stored_counts.to(counts)
        all_counts = counts + stored_counts
        if dropped_codewords is not None:
            is_dropped = (dropped_codewords.to(counts.device) & (counts > 0)).unsqueeze(-1)
            # A codeword weighs as much as before: its fresh tiles count as often as it has tiles.
            repeats = (all_counts / counts.clamp(min=1)).unsqueeze(-1)
            residuals = torch.where(is_dropped, residuals * repeats, residuals)
            stored_residuals = stored_residuals * ~is_dropped
        residuals, counts = residuals + stored_residuals, all_counts
    if stand_for_all:
        shares = tiles_stood_for(values, codebook, counts, tile_mask)
        with torch.autocast(values.device.type, enabled=False):
            # Zero, with a gradient: (B, M, K), (B, M, D) -> (B, K, D)
            residuals = residuals + torch.einsum("bmk,bmd->bkd", shares, (tile_features - values).to(residuals))
    return residuals, counts


@torch.no_grad()
def tiles_stood_for(
    features: torch.Tensor, codebook: torch.Tensor, counts: torch.Tensor, tile_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Shares out a slide's tiles among those encoded now: evenly at each codeword, to the nearest where it has none.

    Args:
        features (`torch.Tensor` of shape `(B, M, D)`, float): of the tiles encoded now.
        codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.
        counts (`torch.Tensor` of shape `(B, K)`, float): the slide's tiles at each codeword.
        tile_mask (`torch.Tensor` of shape `(B, M)`, bool, *optional*): False for padding, which stands for nothing.

    Returns:
        `torch.Tensor` of shape `(B, M, K)`, in the dtype of `counts`: over tiles they sum to `counts`.
    """
    is_tile = torch.ones_like(features[..., 0], dtype=torch.bool) if tile_mask is None else tile_mask
    is_tile = is_tile.unsqueeze(-1).to(counts)
    own = F.one_hot(assign_codewords(features, codebook), len(codebook)).to(counts) * is_tile
    with torch.autocast(features.device.type, enabled=False):
        distances = torch.cdist(features.to(counts), codebook.to(counts).expand(len(features), -1, -1))
    nearest = distances.masked_fill(is_tile == 0, torch.inf).argmin(dim=1)
    nearest = F.one_hot(nearest, features.shape[1]).to(counts).transpose(1, 2) * is_tile
    num_own = own.sum(dim=1, keepdim=True)
    return torch.where(num_own > 0, own / num_own.clamp(min=1), nearest) * counts.unsqueeze(1)
