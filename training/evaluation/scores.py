# SPDX-License-Identifier: Apache-2.0
"""Scores of predictions, one flat dict per kind of task, by scikit-learn and scikit-survival.

A score that these items leave undefined (an AUROC where one class is present, a correlation with a constant) is not in
the dict: there is never a NaN. Few milliseconds a call, so that a bootstrap may ask a thousand times; `names` asks for
fewer scores.

Letters: n items, C classes, L labels.
"""

import importlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import sklearn
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import (
    accuracy_score,
    auc,
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_curve,
    root_mean_squared_error,
)

from ..metrics.calibration_error.expected_calibration_error import expected_calibration_error

MAIN_METRIC = {
    "classification": "auroc",
    "multilabel": "auroc",
    "regression": "r2",
    "survival": "c_index",
    "retrieval": "mean_average_precision",
}
# Everything else is better when it is higher.
LOWER_IS_BETTER = ("calibration_error", "mae", "rmse", "median_rank")


def classification_scores(
    references: np.ndarray,
    probabilities: np.ndarray,
    *,
    is_ordered: bool = False,
    names: Collection[str] | None = None,
) -> dict[str, float]:
    """Scores class probabilities; the class of the highest is the prediction.

    Args:
        references (`np.ndarray` of shape `(n,)`, int): the right classes, 0 to C - 1.
        probabilities (`np.ndarray` of shape `(n, C)`, float): they sum to 1.
        is_ordered (`bool`, defaults to `False`): whether classes are grades, which `quadratic_kappa` is for.
        names (collection of `str`, *optional*): the scores wanted; by default all.

    Returns:
        `dict`: `balanced_accuracy` (over the classes present), `auroc` and `auprc` (of class 1 for two classes; else
        one class against the rest, mean over the classes present), for more than two classes `auroc/<index>` of each,
        `weighted_f1`, `accuracy`, `calibration_error` (expected, of the predicted class) and `quadratic_kappa`.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    references, predicted = np.asarray(references), probabilities.argmax(axis=1)
    num_classes = probabilities.shape[1]
    columns = [1] if num_classes == 2 else list(range(num_classes))
    with _fast():
        ways: dict[str, Callable[[], float]] = {
            "balanced_accuracy": lambda: balanced_accuracy_score(references, predicted),
            "accuracy": lambda: accuracy_score(references, predicted),
            "weighted_f1": lambda: f1_score(references, predicted, average="weighted", zero_division=0),
            "calibration_error": lambda: expected_calibration_error(references, probabilities),
        }
        if is_ordered:
            ways["quadratic_kappa"] = lambda: cohen_kappa_score(
                references, predicted, labels=range(num_classes), weights="quadratic"
            )
        scores = {name: float(way()) for name, way in ways.items() if _is_wanted(name, names)}
        is_class = {column: references == column for column in columns}
        defined = {column: truth for column, truth in is_class.items() if 0 < truth.sum() < len(truth)}
        scores |= _per_column("auroc", _area_under_roc, defined, probabilities, names, detailed=num_classes > 2)
        scores |= _per_column("auprc", average_precision_score, defined, probabilities, names, detailed=False)
    return _finite(scores)


def multilabel_scores(
    references: np.ndarray, probabilities: np.ndarray, *, names: Collection[str] | None = None
) -> dict[str, float]:
    """Scores the probabilities of L labels, each of which is there or not.

    Args:
        references (`np.ndarray` of shape `(n, L)`, float): 1, 0, or NaN where it is not known.
        probabilities (`np.ndarray` of shape `(n, L)`, float): of each label.
        names (collection of `str`, *optional*): the scores wanted; by default all.

    Returns:
        `dict`: `auroc/<index>` and `auprc/<index>` of each label on its known items, and their means `auroc` and
        `auprc`. A label that all known items have, or none, is left out of them; `undefined_labels` names it.
    """
    references, probabilities = np.asarray(references, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    left_out = set(undefined_labels(references))
    defined = {label: references[:, label] for label in range(references.shape[1]) if label not in left_out}
    with _fast():
        scores = _per_column("auroc", _area_under_roc, defined, probabilities, names, detailed=True)
        scores |= _per_column("auprc", average_precision_score, defined, probabilities, names, detailed=True)
    return _finite(scores)


def undefined_labels(references: np.ndarray) -> list[int]:
    """The labels of a multi-label task that have no scores, since their known items are all alike or there are none.

    Args:
        references (`np.ndarray` of shape `(n, L)`, float): 1, 0, or NaN where it is not known.
    """
    references = np.asarray(references, dtype=np.float64)
    return [label for label, column in enumerate(references.T) if not ((column == 0).any() and (column == 1).any())]


def regression_scores(
    references: np.ndarray, predictions: np.ndarray, *, names: Collection[str] | None = None
) -> dict[str, float]:
    """Scores predicted numbers.

    Args:
        references (`np.ndarray` of shape `(n,)`, float): the right numbers.
        predictions (`np.ndarray` of shape `(n,)`, float): the predicted ones.
        names (collection of `str`, *optional*): the scores wanted; by default all.

    Returns:
        `dict`: `r2`, `pearson`, `spearman`, `mae` and `rmse`.
    """
    references, predictions = np.asarray(references, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    ways = {
        "r2": lambda: r2_score(references, predictions) if np.ptp(references) else np.nan,
        "pearson": lambda: pearsonr(references, predictions).statistic if len(references) > 1 else np.nan,
        "spearman": lambda: spearmanr(references, predictions).statistic if len(references) > 1 else np.nan,
        "mae": lambda: mean_absolute_error(references, predictions),
        "rmse": lambda: root_mean_squared_error(references, predictions),
    }
    with _fast():
        return _finite({name: float(way()) for name, way in ways.items() if _is_wanted(name, names)})


def survival_scores(
    times: np.ndarray,
    events: np.ndarray,
    risks: np.ndarray,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    names: Collection[str] | None = None,
) -> dict[str, float]:
    """Scores predicted risks.

    Args:
        times (`np.ndarray` of shape `(n,)`, float): to the event or to the end of observation, in any one unit.
        events (`np.ndarray` of shape `(n,)`, bool): whether the event was seen; else the item is censored.
        risks (`np.ndarray` of shape `(n,)`, float): higher for an earlier event.
        groups (sequence of `str`, *optional*): of each item; only pairs within a group are compared, since risks of
            different models have different scales.
        names (collection of `str`, *optional*): the scores wanted; by default all.

    Returns:
        `dict`: `c_index`, Harrell's concordance index: the share of comparable pairs in which the item with the
        earlier event has the higher risk; ties of risk count half.

    Raises:
        ImportError: if scikit-survival is not installed; it names the extra.
    """
    if not _is_wanted("c_index", names):
        return {}
    times, events, risks = np.asarray(times), np.asarray(events, dtype=bool), np.asarray(risks)
    groups = np.zeros(len(events)) if groups is None else np.asarray(groups)
    pairs = np.sum([_count_pairs(times[inside], events[inside], risks[inside]) for inside in _each(groups)], axis=0)
    right, wrong, tied = np.broadcast_to(pairs, 3)
    compared = right + wrong + tied
    return {"c_index": float((right + tied / 2) / compared)} if compared else {}


def _each(groups: np.ndarray) -> Iterator[np.ndarray]:
    """Which items are in each group."""
    yield from (groups == group for group in np.unique(groups))


def _count_pairs(times: np.ndarray, events: np.ndarray, risks: np.ndarray) -> tuple[int, int, int]:
    """Comparable pairs whose order is right, wrong, and open since their risks are equal."""
    concordance_index_censored = import_survival("sksurv.metrics").concordance_index_censored
    no_comparable_pair = import_survival("sksurv.exceptions").NoComparablePairException
    if len(events) < 2 or not events.any():
        return 0, 0, 0
    try:
        with _fast():
            return concordance_index_censored(events, times, risks)[1:4]
    except no_comparable_pair:
        return 0, 0, 0


def import_survival(module: str) -> Any:
    """Imports a module of scikit-survival.

    Args:
        module (`str`): its full name.

    Raises:
        ImportError: if scikit-survival is not installed; it names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "Survival tasks need scikit-survival, which is not installed: pip install 'dre-slcl[survival]'."
        ) from error


def chance_scores(kind: str, references: np.ndarray, num_classes: int = 0, **options: Any) -> dict[str, float]:
    """Scores of saying the same of every item: the frequencies of classes or labels, the mean, the same risk.

    Args:
        kind (`str`): "classification", "multilabel", "regression" or "survival".
        references (`np.ndarray`): as the function of that kind takes them; not looked at for survival.
        num_classes (`int`, defaults to 0): C, for classification.
        options: as that function takes them.

    Returns:
        `dict`: as that function gives it. A correlation with a constant counts as 0. Calibration has no chance level:
        whoever says the frequencies is calibrated.
    """
    if kind == "survival":
        return {"c_index": 0.5}
    references = np.asarray(references, dtype=np.int64 if kind == "classification" else np.float64)
    if kind == "classification":
        frequencies = np.bincount(references, minlength=num_classes) / len(references)
        scores = classification_scores(references, np.tile(frequencies, (len(references), 1)), **options)
        scores.pop("calibration_error", None)
        return scores
    if kind == "multilabel":
        known = np.maximum((~np.isnan(references)).sum(axis=0), 1)
        return multilabel_scores(references, np.tile(np.nansum(references, axis=0) / known, (len(references), 1)))
    if kind == "regression":
        constant = np.full(len(references), references.mean())
        return {
            **regression_scores(references, constant, names=("r2", "mae", "rmse")),
            "pearson": 0.0,
            "spearman": 0.0,
        }
    raise ValueError(
        f"kind: there is no chance level for {kind!r} here; expected classification, multilabel, "
        "regression or survival."
    )


def _per_column(
    name: str,
    score: Callable[[np.ndarray, np.ndarray], float],
    truths: dict[int, np.ndarray],
    probabilities: np.ndarray,
    names: Collection[str] | None,
    *,
    detailed: bool,
) -> dict[str, float]:
    """A score of each column that has a truth (NaN: not known), and their mean."""
    details = {column: f"{name}/{column}" for column in truths if detailed}
    is_mean_wanted = _is_wanted(name, names)
    found = {}
    for column, truth in truths.items():
        if is_mean_wanted or (detailed and _is_wanted(details[column], names)):
            known = ~np.isnan(truth)
            found[column] = float(score(truth[known], probabilities[known, column]))
    scores = {name: float(np.mean(list(found.values())))} if is_mean_wanted and found else {}
    return scores | {
        details[column]: value for column, value in found.items() if _is_wanted(details.get(column), names)
    }


def _area_under_roc(truth: np.ndarray, scores: np.ndarray) -> float:
    """What `roc_auc_score` gives, in a third of its time: it looks at the kind of its input again and again."""
    false_positive_rates, true_positive_rates, _ = roc_curve(truth, scores, drop_intermediate=False)
    return auc(false_positive_rates, true_positive_rates)


def _is_wanted(name: str | None, names: Collection[str] | None) -> bool:
    return name is not None and (names is None or name in names)


def _finite(scores: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if np.isfinite(value)}


@contextmanager
def _fast() -> Iterator[None]:
    """Leaves out checks that cost more than the scores, and warnings of what is left out of the result."""
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        warnings.simplefilter("ignore", ConstantInputWarning)
        warnings.filterwarnings("ignore", "A single label was found")
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
        yield
