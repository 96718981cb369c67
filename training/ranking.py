# SPDX-License-Identifier: Apache-2.0
"""Similarities -> where the right answers rank; apart from `metrics`, whose import takes seconds.

Letters: Q queries, G gallery items.
"""

import numpy as np


def rank_gallery(similarity: np.ndarray, is_relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks a gallery for each query. Ties count against the model: relevant items come last among equals.

    Args:
        similarity (`np.ndarray` of shape `(Q, G)`, float): higher is nearer.
        is_relevant (`np.ndarray` of shape `(Q, G)`, bool): at least one per query.

    Returns:
        `tuple`: rank of the first relevant item, int64 `(Q,)`, 1 is best; average precision, float64 `(Q,)`.
    """
    order = np.lexsort((is_relevant, -similarity), axis=-1)
    hits = np.take_along_axis(is_relevant, order, axis=-1)
    precision = hits.cumsum(axis=-1) / np.arange(1, hits.shape[1] + 1)
    return hits.argmax(axis=-1) + 1, (precision * hits).sum(axis=-1) / hits.sum(axis=-1)
