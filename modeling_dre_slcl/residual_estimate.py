# SPDX-License-Identifier: Apache-2.0
"""From the few tiles of a slide that are encoded now, and what is stored of the others, to the residuals of all.

In formulas, with S the tiles encoded now, phi_j their residuals, psi_j the stored ones, and w_j how many tiles of the
slide each of them stands for:

    V_k = sum over S of phi_j + sum over others of (psi_j + D_k) + c * sum over S of (w_j - 1) (phi_j - psi_j - D_k)

D_k is the drift, the mean movement of the tiles at codeword k since they were stored (`codeword_drift`), and c, from 0
to 1, how far the slide's own movement beyond it counts (a control variate; at c = 1 the estimate is unbiased as long
as no tile goes over to another codeword). The gradient of each phi_j is multiplied by w_j, so that in expectation it
is that of all tiles; the value is not.

Letters: B slides, M tiles of each, K codewords, D feature width.
"""

import torch
import torch.distributed as dist

from .residual_encoder import assign_codewords, residual_sums


def estimate_residuals(
    tile_features: torch.Tensor,
    codebook: torch.Tensor,
    tile_mask: torch.Tensor | None = None,
    *,
    tile_weights: torch.Tensor | None = None,
    stored_residuals: torch.Tensor | None = None,
    stored_counts: torch.Tensor | None = None,
    stale_counts: torch.Tensor | None = None,
    dropped_codewords: torch.Tensor | None = None,
    stored_tile_features: torch.Tensor | None = None,
    stored_tile_mask: torch.Tensor | None = None,
    control_strength: float = 0.0,
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
        stale_counts (`torch.Tensor` of shape `(B, K)`, *optional*): how many of them may have moved since they were
            stored; default all.
        dropped_codewords (`torch.Tensor` of shape `(B, K)`, bool, *optional*): codewords at which the tiles encoded
            now stand for the whole slide, wherever there are any (stale-feature dropout).
        stored_tile_features (`torch.Tensor` of shape `(B, M, D)`, *optional*): what is stored of the tiles encoded
            now; with it stored residuals are corrected for drift. Collective then.
        stored_tile_mask (`torch.Tensor` of shape `(B, M)`, bool, *optional*): False where nothing is stored.
        control_strength (`float`, defaults to 0.0): c.

    Returns:
        `tuple`: residuals of shape `(B, K, D)` and counts of shape `(B, K)`, at least float32.
    """
    values = tile_features.detach()
    if tile_weights is not None:
        tile_features = values + tile_weights[..., None].to(values) * (tile_features - values)
    residuals, counts = residual_sums(tile_features, codebook, tile_mask)
    if stored_residuals is None:
        return residuals, counts
    stored_residuals, stored_counts = stored_residuals.to(residuals), stored_counts.to(counts)
    if stored_tile_features is not None:
        stale_counts = stored_counts if stale_counts is None else stale_counts.to(counts)
        stored = stored_tile_features.to(values)
        drift = codeword_drift(values, stored, stored_tile_mask, codebook)
        stored_residuals = stored_residuals + stale_counts[..., None] * drift
        if control_strength and tile_weights is not None:
            factors = control_strength * (tile_weights.to(counts) - 1) * stored_tile_mask
            excess = _excess_movement(values, stored, drift, factors, codebook)
            stale_share = stale_counts.sum(dim=1) / stored_counts.sum(dim=1).clamp(min=1)
            stored_residuals = stored_residuals + stale_share[:, None, None] * excess
    if dropped_codewords is not None:
        kept = ~(dropped_codewords.to(counts.device) & (counts > 0)).unsqueeze(-1)
        stored_residuals, stored_counts = stored_residuals * kept, stored_counts * kept[..., 0]
    return residuals + stored_residuals, counts + stored_counts


@torch.no_grad()
def codeword_drift(
    fresh: torch.Tensor, stored: torch.Tensor, is_stored: torch.Tensor, codebook: torch.Tensor
) -> torch.Tensor:
    """How far features have moved since they were stored, at each codeword, measured on the tiles encoded now.

    Stored features lag behind the tile encoder. Much of that is common to all tiles near a codeword, so what the
    fresh tiles show of it corrects the stale ones. Collective: the tiles of all processes count.

    Args:
        fresh (`torch.Tensor` of shape `(B, M, D)`, float): features of the sampled tiles.
        stored (`torch.Tensor` of shape `(B, M, D)`, float): what the bank holds of them.
        is_stored (`torch.Tensor` of shape `(B, M)`, bool): False for padding and for tiles never stored.
        codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.

    Returns:
        `torch.Tensor` of shape `(K, D)`, float32: mean movement of the tiles at each codeword; where there are none,
        that of all tiles.
    """
    stored = stored.to(fresh.device)
    # (B, M, D) -> (n, D)
    moved = (fresh.float() - stored.float())[is_stored]
    codeword = assign_codewords(stored[is_stored].float(), codebook.float())
    table = torch.zeros(len(codebook), moved.shape[-1] + 1, dtype=torch.float64, device=moved.device)
    table.index_add_(0, codeword, torch.cat([moved, torch.ones_like(moved[:, :1])], dim=1).double())
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(table)
    sums, counts = table[:, :-1], table[:, -1:]
    overall = sums.sum(dim=0) / counts.sum().clamp(min=1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), overall).float()


def _excess_movement(
    fresh: torch.Tensor, stored: torch.Tensor, drift: torch.Tensor, factors: torch.Tensor, codebook: torch.Tensor
) -> torch.Tensor:
    """Sums `factors * (phi - psi - D)` over the tiles of each slide, at their stored codewords: `(B, K, D)`.

    A tile that went over to another codeword counts by its movement alone: times its weight, all of its residual
    would drown what is stored at both.
    """
    codeword = assign_codewords(stored, codebook)
    movement = factors[..., None] * (fresh - stored - drift.to(stored)[codeword]).to(factors.dtype)
    excess = torch.zeros(len(fresh), *codebook.shape, dtype=factors.dtype, device=fresh.device)
    return excess.scatter_add_(1, codeword[..., None].expand_as(movement), movement)
