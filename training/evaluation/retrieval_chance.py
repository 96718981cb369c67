# SPDX-License-Identifier: Apache-2.0
"""What retrieval scores when the gallery is in random order.

Letters: Q queries, G gallery items.
"""

import numpy as np

from ..metrics.recall_at_k.rank_gallery import RECALL_AT


def retrieval_chance(num_relevant: np.ndarray, gallery_size: int) -> dict[str, float]:
    """Expected retrieval scores when the gallery is in random order, exactly.

    Args:
        num_relevant (`np.ndarray` of shape `(Q,)`, int): relevant items of each query.
        gallery_size (`int`): G.

    Returns:
        `dict`: keys as `recall_scores` gives them. `median_rank` is the median over queries and orders.
    """
    relevant, weights = np.unique(num_relevant, return_counts=True)
    weights = weights / weights.sum()
    places = np.arange(gallery_size)
    # (R values, G): no relevant item among the first k + 1, drawn without replacement.
    missed = np.clip((gallery_size - relevant[:, None] - places) / (gallery_size - places), 0, 1).cumprod(axis=1)
    found = weights @ (1 - missed)
    # Place i is relevant with probability R / G, and then each place before it with (R - 1) / (G - 1).
    others = (relevant[:, None] - 1) / max(gallery_size - 1, 1)
    precision = (1 + places * others) / (places + 1) / gallery_size
    return {
        **{f"recall@{k}": float(found[min(k, gallery_size) - 1]) for k in RECALL_AT},
        "mean_average_precision": float(weights @ precision.sum(axis=1)),
        "median_rank": float(np.argmax(found >= 0.5 - 1e-12) + 1),
    }
