# SPDX-License-Identifier: Apache-2.0
"""Retrieval and classification of slides as `evaluate.Metric`, with chance levels and case-level intervals.

Importing this module imports `evaluate`, which takes seconds: import it where metrics are computed. The classes are
instantiated directly, `SlideRetrieval(keep_in_memory=True)`; nothing is fetched.

Letters: Q queries, G gallery items, n slides, C classes.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata

from ..evaluation.case_bootstrap import bootstrap_intervals
from ..ranking import rank_gallery

RECALL_AT = (1, 5, 10)
_QUERIES_AT_ONCE = 1024


def retrieval_chance(num_relevant: np.ndarray, gallery_size: int) -> dict[str, float]:
    """Expected retrieval scores when the gallery is in random order, exactly.

    Args:
        num_relevant (`np.ndarray` of shape `(Q,)`, int): relevant items of each query.
        gallery_size (`int`): G.

    Returns:
        `dict`: keys as the scores of `SlideRetrieval`. `median_rank` is the median over queries and orders.
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


def classification_scores(references: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Scores a classifier.

    Args:
        references (`np.ndarray` of shape `(n,)`, int): the right classes.
        scores (`np.ndarray` of shape `(n, C)`, float): a score per class; the highest is the prediction.

    Returns:
        `dict`: `balanced_accuracy` (mean recall over the classes present), `auroc` (one class against the rest, mean
        over the classes present) and `accuracy`.
    """
    present = np.unique(references)
    is_class = references[:, None] == present
    is_right = scores.argmax(axis=1) == references
    # Mann-Whitney: how often a slide of the class scores higher than one of the rest; ties count half.
    positives = is_class.sum(axis=0)
    negatives = len(references) - positives
    rank_sums = (rankdata(scores[:, present], axis=0) * is_class).sum(axis=0)
    defined = negatives > 0
    areas = (rank_sums - positives * (positives + 1) / 2)[defined] / (positives * negatives)[defined]
    return {
        "balanced_accuracy": float(np.mean([is_right[column].mean() for column in is_class.T])),
        "auroc": float(areas.mean()) if len(areas) else float("nan"),
        "accuracy": float(is_right.mean()),
    }


class SlideRetrieval(evaluate.Metric):
    """How well slides find their reports, reports their slides, or slides each other.

    `compute` takes `queries` `(Q, E)` and `query_groups` `(Q,)`, which may also be added batch by batch, and
    `gallery` `(G, E)` with `gallery_groups` `(G,)`. A gallery item is relevant to a query of the same group: the case,
    or the cases that share a report. Similarity is the cosine. Options: `num_bootstrap` (1000) and `seed` (0).

    It returns `recall@1`, `recall@5`, `recall@10` (the share of queries with a relevant item among the first k),
    `mean_average_precision`, `median_rank` (of the first relevant item, 1 is best), `interval` (95%, over groups),
    `chance` (expected in random order), `num_queries` and `gallery_size`.

    Example:

    ```python
    metric = SlideRetrieval(keep_in_memory=True)
    metric.compute(queries=slides, query_groups=cases, gallery=reports, gallery_groups=report_cases)["recall@1"]
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        columns = {"queries": datasets.List(datasets.Value("float32")), "query_groups": datasets.Value("string")}
        return _metric_info(type(self), columns)

    def _compute(
        self,
        queries: Sequence[Sequence[float]],
        query_groups: Sequence[str],
        gallery: np.ndarray,
        gallery_groups: Sequence[str],
        num_bootstrap: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        query_vectors, gallery_vectors = _unit_rows(queries, "queries"), _unit_rows(gallery, "gallery")
        sought, offered = np.asarray(query_groups, dtype=str), np.asarray(gallery_groups, dtype=str)
        if len(offered) != len(gallery_vectors):
            raise ValueError(
                f"gallery_groups: expected {len(gallery_vectors)}, one per gallery item, not {len(offered)}."
            )
        lost = sorted(set(sought) - set(offered))
        if lost:
            raise ValueError(
                f"query_groups: no gallery item is relevant to group '{lost[0]}' ({len(lost)} such groups)."
            )
        parts, num_relevant = [], []
        for start in range(0, len(sought), _QUERIES_AT_ONCE):
            chunk = slice(start, start + _QUERIES_AT_ONCE)
            is_relevant = sought[chunk, None] == offered
            parts.append(rank_gallery(query_vectors[chunk] @ gallery_vectors.T, is_relevant))
            num_relevant.append(is_relevant.sum(axis=1))
        ranks, precisions = (np.concatenate(part) for part in zip(*parts, strict=True))

        def score(sample: np.ndarray) -> dict[str, float]:
            return {
                **{f"recall@{k}": float((ranks[sample] <= k).mean()) for k in RECALL_AT},
                "mean_average_precision": float(precisions[sample].mean()),
                "median_rank": float(np.median(ranks[sample])),
            }

        return {
            **score(np.arange(len(ranks))),
            "interval": bootstrap_intervals(score, query_groups, num_bootstrap=num_bootstrap, seed=seed),
            "chance": retrieval_chance(np.concatenate(num_relevant), len(offered)),
            "num_queries": len(ranks),
            "gallery_size": len(offered),
        }


class SlideClassification(evaluate.Metric):
    """How well scores tell the classes of slides.

    `compute` takes `references` `(n,)`, class indices, and `scores` `(n, C)`, which may also be added batch by batch.
    Options: `cases` `(n,)`, by which intervals are drawn (default: each slide its own), `num_bootstrap` (1000) and
    `seed` (0).

    It returns `balanced_accuracy`, `auroc` (one against the rest, mean over classes), `accuracy`, `interval` (95%,
    over cases within classes), `chance` (guessing evenly; for accuracy always saying the most frequent class),
    `confusion` (C x C, rows are the right classes) and `num_slides`.

    Example:

    ```python
    metric = SlideClassification(keep_in_memory=True)
    metric.compute(references=[0, 1, 1], scores=[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])["balanced_accuracy"]
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        columns = {"references": datasets.Value("int64"), "scores": datasets.List(datasets.Value("float64"))}
        return _metric_info(type(self), columns)

    def _compute(
        self,
        references: Sequence[int],
        scores: Sequence[Sequence[float]],
        cases: Sequence[str] | None = None,
        num_bootstrap: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        right, table = np.asarray(references), _matrix(scores, "scores")
        num_classes = table.shape[1]
        present, counts = np.unique(right, return_counts=True)
        if len(present) < 2 or present[0] < 0 or present[-1] >= num_classes:
            raise ValueError(
                f"references: expected at least two of the classes 0 to {num_classes - 1}, found {present.tolist()}."
            )
        confusion = np.zeros((num_classes, num_classes), dtype=int)
        np.add.at(confusion, (right, table.argmax(axis=1)), 1)
        return {
            **classification_scores(right, table),
            "interval": bootstrap_intervals(
                lambda sample: classification_scores(right[sample], table[sample]),
                list(map(str, range(len(right)))) if cases is None else cases,
                references,
                num_bootstrap=num_bootstrap,
                seed=seed,
            ),
            "chance": {
                "balanced_accuracy": 1 / num_classes,
                "auroc": 0.5,
                "accuracy": float(counts.max() / counts.sum()),
            },
            "confusion": confusion.tolist(),
            "num_slides": len(right),
        }


def _metric_info(metric: type, columns: dict[str, Any]) -> evaluate.MetricInfo:
    text = metric.__doc__ or ""
    return evaluate.MetricInfo(
        description=text.partition("\n")[0],
        citation="",
        inputs_description=text,
        features=datasets.Features(columns),
    )


def _matrix(rows: Sequence[Sequence[float]] | np.ndarray, name: str) -> np.ndarray:
    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"{name}: expected finite numbers in rows of one length, found shape {matrix.shape}.")
    return matrix


def _unit_rows(rows: Sequence[Sequence[float]] | np.ndarray, name: str) -> np.ndarray:
    matrix = _matrix(rows, name)
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
