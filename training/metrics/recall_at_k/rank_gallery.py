# SPDX-License-Identifier: Apache-2.0
"""Similarities -> where the right answers rank, without the metric's import of seconds.

Letters: Q queries, G gallery items, E width.
"""

from collections.abc import Sequence

import numpy as np

RECALL_AT = (1, 5, 10)
_QUERIES_AT_ONCE = 1024


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


def rank_queries(
    queries: Sequence[Sequence[float]] | np.ndarray,
    query_groups: Sequence[str],
    gallery: Sequence[Sequence[float]] | np.ndarray,
    gallery_groups: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks a gallery by cosine; an item is relevant to the queries of its group.

    Args:
        queries (`np.ndarray` of shape `(Q, E)`, float), gallery (`np.ndarray` of shape `(G, E)`, float): vectors.
        query_groups (sequence of `str`), gallery_groups (sequence of `str`): a group for each.

    Returns:
        `tuple`: rank of the first relevant item, average precision (see `rank_gallery`), and number of relevant items,
        int64 `(Q,)`.

    Raises:
        ValueError: if a vector is not finite, groups are too many or too few, or a query has no relevant item.
    """
    query_vectors, gallery_vectors = unit_rows(queries, "queries"), unit_rows(gallery, "gallery")
    sought, offered = np.asarray(query_groups, dtype=str), np.asarray(gallery_groups, dtype=str)
    for name, groups, vectors in (
        ("query_groups", sought, query_vectors),
        ("gallery_groups", offered, gallery_vectors),
    ):
        if len(groups) != len(vectors):
            raise ValueError(f"{name}: expected {len(vectors)}, one per vector, not {len(groups)}.")
    if lost := sorted(set(sought) - set(offered)):
        raise ValueError(f"query_groups: no gallery item is relevant to group '{lost[0]}' ({len(lost)} such groups).")
    parts = []
    for start in range(0, len(sought), _QUERIES_AT_ONCE):
        chunk = slice(start, start + _QUERIES_AT_ONCE)
        is_relevant = sought[chunk, None] == offered
        ranked = rank_gallery(query_vectors[chunk] @ gallery_vectors.T, is_relevant)
        parts.append((*ranked, is_relevant.sum(axis=1)))
    ranks, precisions, num_relevant = (np.concatenate(part) for part in zip(*parts, strict=True))
    return ranks, precisions, num_relevant


def recall_scores(ranks: np.ndarray, precisions: np.ndarray, k: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Scores of ranked queries.

    Args:
        ranks (`np.ndarray` of shape `(Q,)`, int): see `rank_gallery`.
        precisions (`np.ndarray` of shape `(Q,)`, float): see `rank_gallery`.
        k (sequence of `int`): how many items are looked at.

    Returns:
        `dict`: `recall@<k>`, `mean_average_precision` and `median_rank`.
    """
    return {
        **{f"recall@{place}": float((ranks <= place).mean()) for place in k},
        "mean_average_precision": float(precisions.mean()),
        "median_rank": float(np.median(ranks)),
    }


def unit_rows(rows: Sequence[Sequence[float]] | np.ndarray, name: str) -> np.ndarray:
    """Brings rows to unit length, as float64 `(n, E)`.

    Raises:
        ValueError: if they are no finite numbers in rows of one length; it names `name`.
    """
    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"{name}: expected finite numbers in rows of one length, found shape {matrix.shape}.")
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
