# SPDX-License-Identifier: Apache-2.0
"""From the few tiles of a slide that are encoded now, and what is stored of the others, to the residuals of all.

In formulas, with S the tiles encoded now, x_j features, y_j stored ones, and w_j how many tiles of the slide each of S
stands for:

    V_k = sum over S at k of (x_j - c_k) + sum over others at k of (y_j + d_j - c_k)

d_j is the movement since the tile was stored that the tiles of S show (`feature_drift`), or zero, and a tile is at
the codeword nearest to where it is by now. The gradient of each x_j is multiplied by w_j, so that in expectation it is
that of all tiles; the value is not.

Letters: B slides, M tiles of each, K codewords, D feature width.
"""

from collections.abc import Callable

import torch

from .feature_drift import FeatureDrift, fit_drift
from .residual_encoder import residual_sums

MovedSums = Callable[[FeatureDrift], tuple[torch.Tensor, torch.Tensor]]


def estimate_residuals(
    tile_features: torch.Tensor,
    codebook: torch.Tensor,
    tile_mask: torch.Tensor | None = None,
    *,
    tile_weights: torch.Tensor | None = None,
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
        tile_weights (`torch.Tensor` of shape `(B, M)`, float, *optional*): w, how many tiles of its slide each stands
            for in the gradient; default 1.
        stored_residuals (`torch.Tensor` of shape `(B, K, D)`, *optional*): residual sums over other tiles.
        stored_counts (`torch.Tensor` of shape `(B, K)`, *optional*): the number of those tiles.
        dropped_codewords (`torch.Tensor` of shape `(B, K)`, bool, *optional*): codewords at which the tiles encoded
            now stand for the whole slide, wherever there are any (stale-feature dropout).
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
    if tile_weights is not None:
        tile_features = values + tile_weights[..., None].to(values) * (tile_features - values)
    residuals, counts = residual_sums(tile_features, codebook, tile_mask)
    if moved_sums is not None:
        drift = fit_drift(values, stored_tile_features, stored_tile_ages, stored_tile_mask)
        stored_residuals, stored_counts = moved_sums(drift)
    if stored_residuals is None:
        return residuals, counts
    stored_residuals, stored_counts = stored_residuals.to(residuals), stored_counts.to(counts)
    if dropped_codewords is not None:
        kept = ~(dropped_codewords.to(counts.device) & (counts > 0)).unsqueeze(-1)
        stored_residuals, stored_counts = stored_residuals * kept, stored_counts * kept[..., 0]
    return residuals + stored_residuals, counts + stored_counts
