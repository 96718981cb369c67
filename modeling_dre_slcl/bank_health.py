# SPDX-License-Identifier: Apache-2.0
"""How full, how old, how far behind and how well spread a memory bank is, from counts.

Letters: n tiles, K codewords, D feature width, T steps.
"""

import math

import torch

AGE_QUANTILES = {"median_age_steps": 0.5, "p90_age_steps": 0.9, "max_age_steps": 1.0}


def describe_health(
    num_tiles: float, drift_sums: torch.Tensor, codeword_counts: torch.Tensor, step_counts: torch.Tensor
) -> dict[str, float]:
    """Describes a bank.

    Args:
        num_tiles (`float`): tiles that it has room for.
        drift_sums (`torch.Tensor` of shape `(3,)`, float64): tiles written again in the latest step, the sum of the
            L2 distances between what was stored of them and what is now, the sum of the cosines.
        codeword_counts (`torch.Tensor` of shape `(K,)`): stored tiles at each codeword.
        step_counts (`torch.Tensor` of shape `(T,)`): stored tiles written last at each step; the last is now.

    Returns:
        `dict`: `coverage` (share of tiles with a feature), `mean_age_steps`, `median_age_steps`, `p90_age_steps` and
        `max_age_steps` of those features, `codewords_used` (share of codewords with at least one tile),
        `codeword_entropy` (of the tiles' codewords, 1 where all are used alike), `drift_l2` and `drift_cosine` (means
        over the tiles written again in the latest step; 0 and 1 where there are none).
    """
    ages = step_counts.flip(0).double()
    stored = float(ages.sum())
    mean_age = float((ages * torch.arange(len(ages))).sum()) / max(stored, 1.0)
    health = {"coverage": stored / num_tiles if num_tiles else 0.0, "mean_age_steps": mean_age}
    health |= {name: float(age_quantile(ages, share)) for name, share in AGE_QUANTILES.items()}
    shares = codeword_counts.double() / codeword_counts.sum().clamp(min=1)
    entropy = -float(torch.xlogy(shares, shares).sum())
    health["codewords_used"] = float((codeword_counts > 0).double().mean())
    health["codeword_entropy"] = max(0.0, entropy) / math.log(len(shares)) if len(shares) > 1 else 1.0
    moved, distance, cosine = drift_sums.tolist()
    return health | {"drift_l2": distance / moved if moved else 0.0, "drift_cosine": cosine / moved if moved else 1.0}


def age_quantile(ages: torch.Tensor, share: float) -> int:
    """Returns the least age that `share` of the tiles do not exceed, from the number of tiles of each age `(T,)`."""
    if not ages.sum():
        return 0
    needed = torch.tensor([math.ceil(share * float(ages.sum()))], dtype=torch.float64)
    return int(torch.searchsorted(ages.double().cumsum(0), needed))


def measure_drift(old: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Compares what was stored of tiles with what is stored now.

    Args:
        old (`torch.Tensor` of shape `(n, D)`, float32), fresh (`torch.Tensor` of shape `(n, D)`, float32): features.

    Returns:
        `torch.Tensor` of shape `(3,)`, float64: n, the sum of their L2 distances, the sum of their cosines.
    """
    distance = (fresh - old).double().norm(dim=1).sum()
    cosine = torch.cosine_similarity(fresh, old, dim=1).double().sum()
    return torch.stack([torch.full_like(distance, len(old)), distance, cosine])
