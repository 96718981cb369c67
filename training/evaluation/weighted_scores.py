# SPDX-License-Identifier: Apache-2.0
"""The scores of `scores` for many bootstrap samples at once: a sample says how often each item is in it.

Scikit-learn scores one sample a call, which for a thousand samples of every method takes minutes; these take parts of
a second. Tests hold them equal to `scores` on every sample.

Letters: B samples, n items, C classes, L labels.
"""

import warnings

import numpy as np
from scipy.sparse import csr_array

_CALIBRATION_BINS = 15


def weighted_classification(
    references: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, *, is_ordered: bool = False
) -> dict[str, np.ndarray]:
    """Scores as `classification_scores` gives them, for each sample.

    Args:
        references (`np.ndarray` of shape `(n,)`, int), probabilities (`np.ndarray` of shape `(n, C)`, float),
            is_ordered (`bool`): as there.
        weights (`np.ndarray` of shape `(B, n)`, int): how often each item is in each sample.

    Returns:
        `dict`: score -> float64 `(B,)`, NaN where a sample leaves it undefined.
    """
    weights, num_classes = weights.astype(np.float64), probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    scores = _confusion_scores(references, predicted, weights, num_classes, is_ordered=is_ordered)
    scores["calibration_error"] = _calibration_error(predicted == references, probabilities.max(axis=1), weights)
    columns = [1] if num_classes == 2 else range(num_classes)
    areas = {c: _areas(references == c, probabilities[:, c], weights) for c in columns}
    scores |= {name: _mean([area[name] for area in areas.values()]) for name in ("auroc", "auprc")}
    return scores | ({f"auroc/{c}": area["auroc"] for c, area in areas.items()} if num_classes > 2 else {})


def weighted_multilabel(
    references: np.ndarray, probabilities: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores as `multilabel_scores` gives them, for each sample.

    Args:
        references (`np.ndarray` of shape `(n, L)`, float), probabilities (`np.ndarray` of shape `(n, L)`, float): as
            there.
        weights (`np.ndarray` of shape `(B, n)`, int): how often each item is in each sample.

    Returns:
        `dict`: score -> float64 `(B,)`, NaN where a sample leaves it undefined.
    """
    weights = weights.astype(np.float64)
    areas = []
    for label, truth in enumerate(references.T):
        known = ~np.isnan(truth)
        areas.append(_areas(truth[known] > 0, probabilities[known, label], weights[:, known]))
    means = {name: _mean([area[name] for area in areas]) for name in ("auroc", "auprc")}
    return means | {f"{name}/{label}": area[name] for label, area in enumerate(areas) for name in means}


def _mean(columns: list[np.ndarray]) -> np.ndarray:
    """Mean over the columns that a sample defines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a sample that defines none
        return np.nanmean(np.stack(columns), axis=0)


def _confusion_scores(
    references: np.ndarray, predicted: np.ndarray, weights: np.ndarray, num_classes: int, *, is_ordered: bool
) -> dict[str, np.ndarray]:
    pairs = _indicator(references * num_classes + predicted, num_classes**2)
    confusion = (weights @ pairs).reshape(len(weights), num_classes, num_classes)
    total, support, said = weights.sum(axis=1), confusion.sum(axis=2), confusion.sum(axis=1)
    right = np.diagonal(confusion, axis1=1, axis2=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = right / support
        f1 = np.nan_to_num(2 * right / (support + said))
        scores = {
            "balanced_accuracy": _mean(list(recall.T)),
            "accuracy": right.sum(axis=1) / total,
            "weighted_f1": (f1 * support).sum(axis=1) / total,
        }
        if is_ordered:
            places = np.arange(num_classes)
            cost = (places[:, None] - places) ** 2
            by_chance = support[:, :, None] * said[:, None, :] / total[:, None, None]
            scores["quadratic_kappa"] = 1 - (confusion * cost).sum(axis=(1, 2)) / (by_chance * cost).sum(axis=(1, 2))
    return scores


def _calibration_error(is_right: np.ndarray, confidence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    bins = np.searchsorted(np.linspace(0, 1, _CALIBRATION_BINS + 1)[1:-1], confidence)
    gaps = (weights * (is_right - confidence)) @ _indicator(bins, _CALIBRATION_BINS)
    return np.abs(gaps).sum(axis=1) / weights.sum(axis=1)


def _indicator(places: np.ndarray, count: int) -> csr_array:
    """A one in each of n rows, sparse `(n, count)`: adds up what belongs together without a pass for each."""
    rows = len(places)
    return csr_array((np.ones(rows), places, np.arange(rows + 1)), shape=(rows, count))


def _areas(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """`auroc`, how often an item of the class scores higher than one of the rest, ties half; `auprc`, the average
    precision. NaN where one of both is missing.
    """
    if not len(scores):
        return dict.fromkeys(("auroc", "auprc"), np.full(len(weights), np.nan))
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    every = weights[:, order]
    positive = every * truth[order]
    if len(starts) < len(order):
        positive, every = (np.add.reduceat(part, starts, axis=1) for part in (positive, every))
    found, passed = positive.cumsum(axis=1), every.cumsum(axis=1)
    num_positive, num_all = found[:, -1], passed[:, -1]
    num_negative = num_all - num_positive
    negative = every - positive
    with np.errstate(invalid="ignore", divide="ignore"):
        # Negatives that score lower: all but those met so far.
        below = num_negative[:, None] - (passed - found)
        area = (positive * (below + negative / 2)).sum(axis=1) / (num_positive * num_negative)
        precision = (positive * np.nan_to_num(found / passed)).sum(axis=1) / num_positive
    precision[(num_positive == 0) | (num_negative == 0)] = np.nan
    return {"auroc": area, "auprc": precision}
