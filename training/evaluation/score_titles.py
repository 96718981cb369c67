# SPDX-License-Identifier: Apache-2.0
"""How scores are called and written in tables and pictures."""

import re

from .scores import LOWER_IS_BETTER
from .task_result import Score, TaskResult

_TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "quadratic_kappa": "quadratic kappa",
    "calibration_error": "calibration error",
    "r2": "R²",
    "pearson": "Pearson r",
    "spearman": "Spearman r",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "c_index": "c-index",
    "mean_average_precision": "mean average precision",
    "median_rank": "median rank",
}
# Scores of the first k of a gallery, such as "acc@5".
_AT = re.compile(r"^(acc|mvacc|map)(@\d+)$")
_AT_TITLES = {"acc": "Acc", "mvacc": "MVAcc", "map": "mAP"}


def score_title(name: str, result: TaskResult) -> str:
    """A score's name for readers; that of a class or label names it.

    Args:
        name (`str`): as in `MethodResult.scores`, such as "auroc/2".
        result (`TaskResult`): whose it is.
    """
    base, _, column = name.partition("/")
    title = _TITLES.get(base, _AT.sub(lambda match: _AT_TITLES[match[1]] + match[2], base).replace("_", " "))
    if not column:
        return title
    is_place = column.isdigit() and int(column) < len(result.classes)
    return f"{title} of {result.classes[int(column)] if is_place else column}"


def is_lower_better(name: str) -> bool:
    """Whether less of a score is better."""
    return name.partition("/")[0] in LOWER_IS_BETTER


def score_text(score: Score | None, *, with_interval: bool = True) -> str:
    """A score as text, such as "0.912 [0.874, 0.945]"; "-" if there is none."""
    if score is None:
        return "-"
    bounds = f" [{_number(score.interval[0])}, {_number(score.interval[1])}]" if score.interval else ""
    return f"{_number(score.value)}{bounds if with_interval else ''}"


def score_names(result: TaskResult, *, detailed: bool = False) -> list[str]:
    """The scores that rows of a task have, the main one first.

    Args:
        result (`TaskResult`): the task.
        detailed (`bool`, defaults to `False`): those of single classes or labels, rather than the others.
    """
    names = dict.fromkeys(name for row in result.rows for name in row.scores if ("/" in name) == detailed)
    return sorted(names, key=lambda name: name != result.main_metric)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
