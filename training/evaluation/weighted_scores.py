# SPDX-License-Identifier: Apache-2.0
"""The scores of `scores` for many bootstrap samples at once: a sample says how often each item is in it.

Scikit-learn scores one sample a call, which for a thousand samples of every method takes minutes; these take parts of
a second. Tests hold them equal to `scores` on every sample.

Letters: B samples, n items, C classes, L labels.
"""

import warnings

import numpy as np

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
    areas = {c: _area_under_roc(references == c, probabilities[:, c], weights) for c in columns}
    precisions = [_average_precision(references == c, probabilities[:, c], weights) for c in columns]
    scores |= {"auroc": _mean(areas.values()), "auprc": _mean(precisions)}
    return scores | ({f"auroc/{c}": area for c, area in areas.items()} if num_classes > 2 else {})


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
    details = {}
    for name, score in (("auroc", _area_under_roc), ("auprc", _average_precision)):
        for label, truth in enumerate(references.T):
            known = ~np.isnan(truth)
            found = score(truth[known] > 0, probabilities[known, label], weights[:, known])
            details[f"{name}/{label}"] = found
    means = {
        name: _mean([found for key, found in details.items() if key.startswith(name)]) for name in ("auroc", "auprc")
    }
    return means | details


def _mean(columns: "list[np.ndarray] | dict[int, np.ndarray]") -> np.ndarray:
    """Mean over the columns that a sample defines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a sample that defines none
        return np.nanmean(np.stack(list(columns)), axis=0)


def _confusion_scores(
    references: np.ndarray, predicted: np.ndarray, weights: np.ndarray, num_classes: int, *, is_ordered: bool
) -> dict[str, np.ndarray]:
    is_class = references[:, None] == np.arange(num_classes)
    is_said = predicted[:, None] == np.arange(num_classes)
    confusion = np.stack([(weights * is_class[:, c]) @ is_said for c in range(num_classes)], axis=1)  # (B, C, C)
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
    in_bin = bins[:, None] == np.arange(_CALIBRATION_BINS)
    gaps = weights @ ((is_right - confidence)[:, None] * in_bin)
    return np.abs(gaps).sum(axis=1) / weights.sum(axis=1)


def _area_under_roc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How often an item of the class scores higher than one of the rest; ties count half."""
    positive, negative = _by_score(truth, scores, weights, descending=False)
    below = negative.cumsum(axis=1) - negative
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * (below + negative / 2)).sum(axis=1) / pairs


def _average_precision(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    positive, negative = _by_score(truth, scores, weights, descending=True)
    found = positive.cumsum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(found / (found + negative.cumsum(axis=1)))
        area = (positive * precision).sum(axis=1) / found[:, -1]
    # As for AUROC, nothing is said where one class is missing.
    area[(positive.sum(axis=1) == 0) | (negative.sum(axis=1) == 0)] = np.nan
    return area


def _by_score(
    truth: np.ndarray, scores: np.ndarray, weights: np.ndarray, *, descending: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the class and of the rest for each different score, in order: two arrays `(B, scores)`."""
    if not len(scores):
        empty = np.zeros((len(weights), 1))
        return empty, empty
    order = np.argsort(-scores if descending else scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    sorted_weights, is_positive = weights[:, order], truth[order]
    both = (sorted_weights * is_positive, sorted_weights * ~is_positive)
    return tuple(np.add.reduceat(part, starts, axis=1) for part in both)
