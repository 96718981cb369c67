# SPDX-License-Identifier: Apache-2.0
"""K-means over tile features -> the codebook of the residual encoder."""

import numpy as np


def fit_codebook(features: np.ndarray, num_codewords: int, seed: int, start: np.ndarray | None = None) -> np.ndarray:
    """Fits the codebook.

    Args:
        features (`np.ndarray` of shape `(n, D)`, float): L2-normalised tile features, a sample over all slides.
        num_codewords (`int`): number K of codewords.
        seed (`int`): of the k-means++ start; the same features and seed give the same bits.
        start (`np.ndarray` of shape `(K, D)`, *optional*): where K-means starts instead, so that a codebook fitted
            again keeps the order of its codewords.

    Returns:
        `np.ndarray` of shape `(K, D)`, float32.

    Raises:
        ValueError: if there are fewer distinct features than codewords, or features that are not finite.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    features = np.ascontiguousarray(features, dtype=np.float32)
    if not np.isfinite(features).all():
        raise ValueError("The codebook cannot be fitted: some tile features are not finite.")
    if len(np.unique(features, axis=0)) < num_codewords:
        raise ValueError(
            f"The codebook needs at least {num_codewords} distinct tile features, found "
            f"{len(np.unique(features, axis=0))}; use more slides or fewer codewords (`num_codewords`)."
        )
    # One thread: several would add partial sums in an order that differs from run to run.
    with threadpool_limits(limits=1):
        means = KMeans(
            num_codewords, init="k-means++" if start is None else start, n_init=1, max_iter=100, random_state=seed
        ).fit(features)
    return means.cluster_centers_.astype(np.float32)
