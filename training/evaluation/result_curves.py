# SPDX-License-Identifier: Apache-2.0
"""What probabilities are worth, drawn: ROC and precision-recall curves, calibration, confusion.

Curves show one seed, since to draw means of predictions over seeds would show another, better model.

Letters: n items, C classes or labels, K columns that are drawn, B bootstrap samples, P points of a curve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from ..figures import COLOURS, new_figure, save_figure
from .case_bootstrap import draw_cases
from .task_result import MethodResult, TaskResult

_GRID = np.linspace(0, 1, 201)
_NUM_BOOTSTRAP = 200
_NULL_STYLES = ((0, (5, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))
_GREY = "#777777"
_MAX_CLASS_CURVES = 7
_CALIBRATION_BINS = 10


@dataclass(frozen=True, eq=False)
class Stated:
    """The probabilities that a row of results states in its first seed.

    Args:
        truth (`np.ndarray` of shape `(n, C)`, float): 1, 0, or NaN where it is not known.
        probabilities (`np.ndarray` of shape `(n, C)`, float): of each class or label.
        case_ids (`list` of `str`): of the n items.
        columns (`list` of `int`): the K columns that curves show: of two classes the second.
        names (`list` of `str`): the classes or labels.
    """

    truth: np.ndarray
    probabilities: np.ndarray
    case_ids: list[str]
    columns: list[int]
    names: list[str]


def stated_by(row: MethodResult, result: TaskResult) -> Stated | None:
    """Reads a row's predictions; `None` if there are none, or they are no probabilities.

    Args:
        row (`MethodResult`): a row.
        result (`TaskResult`): whose it is.
    """
    if not row.predictions or result.kind not in ("classification", "multilabel"):
        return None
    seed = row.predictions[0]["seed"]
    items = [item for item in row.predictions if item["seed"] == seed]
    if result.kind == "classification":
        truth = np.eye(len(result.classes))[[result.classes.index(item["truth"]) for item in items]]
    else:
        truth = np.array([[np.nan if flag is None else flag for flag in item["truth"]] for item in items], dtype=float)
    is_binary = result.kind == "classification" and len(result.classes) == 2
    columns = [
        column
        for column in ([1] if is_binary else range(len(result.classes)))
        if (truth[:, column] == 1).any() and (truth[:, column] == 0).any()
    ]
    probabilities = np.array([item["prediction"] for item in items], dtype=float)
    return Stated(truth, probabilities, [item["case_id"] for item in items], columns, result.classes)


def draw_roc(rows: Sequence[MethodResult], result: TaskResult, out_path: Path) -> bool:
    """Draws the ROC curve of the first row with its 95% band over cases, and those of the others.

    Args:
        rows (sequence of `MethodResult`): the row that matters first.
        result (`TaskResult`): whose they are.
        out_path (`Path`): the picture.

    Returns:
        `bool`: whether there was anything to draw.
    """

    def points(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        false, true, _ = roc_curve(truth, scores, sample_weight=weights)
        # At 0 a curve may rise at once: the last of the points there counts.
        return np.interp(_GRID, false + np.linspace(0, 1e-9, len(false)), true)

    def frame(axes: Axes, stated: Stated) -> None:
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8)
        axes.text(0.6, 0.53, "chance", color=_GREY, fontsize=8, rotation=45, rotation_mode="anchor")
        axes.set_xlabel("1 - specificity")
        axes.set_ylabel("sensitivity")

    return _draw_curves(rows, result, out_path, points, frame, "auroc", "AUROC", "lower right")


def draw_precision_recall(rows: Sequence[MethodResult], result: TaskResult, out_path: Path) -> bool:
    """Draws precision-recall curves; arguments and result as in `draw_roc`."""

    def points(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        precision, recall, _ = precision_recall_curve(truth, scores, sample_weight=weights)
        # A step function: at each recall the precision of the threshold that reaches it.
        return precision[len(recall) - 1 - np.searchsorted(recall[::-1], _GRID - 1e-12)]

    def frame(axes: Axes, stated: Stated) -> None:
        prevalence = float(np.nanmean(stated.truth[:, stated.columns], axis=0).mean())
        axes.axhline(prevalence, color=_GREY, linewidth=0.8)
        axes.text(0.02, prevalence + 0.015, "chance", color=_GREY, fontsize=8)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")

    return _draw_curves(rows, result, out_path, points, frame, "auprc", "AUPRC", "best")


def _draw_curves(
    rows: Sequence[MethodResult],
    result: TaskResult,
    out_path: Path,
    points: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray],
    frame: Callable[[Axes, Stated], None],
    metric: str,
    title: str,
    legend_place: str,
) -> bool:
    all_stated = [(row, stated) for row in rows if (stated := stated_by(row, result)) is not None and stated.columns]
    if not all_stated:
        return False
    figure = new_figure(5.2, 5.2)
    axes = figure.add_subplot()
    main = all_stated[0][1]
    frame(axes, main)
    has_class_curves = 1 < len(main.columns) <= _MAX_CLASS_CURVES
    if has_class_curves:
        for place, column in enumerate(main.columns):
            curve = _mean_curve(main, points, None, [column])
            axes.plot(_GRID, curve, color=COLOURS[1 + place % 6], linewidth=0.9, label=main.names[column])
    low, high = _band(main, points)
    if low is not None:
        axes.fill_between(_GRID, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, zorder=1)
    num_null, num_peers = 0, 0
    for place, (row, stated) in enumerate(all_stated):
        score = row.scores.get(metric)
        value = f", {title} {score.value:.3f}" if score else ""
        style = {"color": COLOURS[0], "linewidth": 2.2, "zorder": 5}
        if row.is_null:
            style = {"color": _GREY, "linewidth": 1.2, "linestyle": _NULL_STYLES[num_null % len(_NULL_STYLES)]}
            num_null += 1
        elif place:
            # The colours are taken where classes have curves.
            colour = "#222222" if has_class_curves else COLOURS[1 + num_peers % 6]
            style = {"color": colour, "linewidth": 1.6, "linestyle": ("--", "-.", ":")[num_peers % 3]}
            num_peers += 1
        mean = "mean of " if len(stated.columns) > 1 and not place else ""
        axes.plot(_GRID, _mean_curve(stated, points), label=f"{mean}{row.encoder}{value}", **style)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_aspect("equal")
    axes.set_title(f"{result.task}: {all_stated[0][0].method}", loc="left", fontsize=10)
    axes.legend(fontsize=8, loc=legend_place, frameon=True, framealpha=0.9, edgecolor="none")
    tidy_axes(axes)
    save_figure(figure, out_path)
    return True


def _mean_curve(
    stated: Stated,
    points: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray],
    weights: np.ndarray | None = None,
    columns: Sequence[int] | None = None,
) -> np.ndarray:
    """The mean of the columns' curves on the grid, `(P,)`; one that a sample leaves undefined is not in it."""
    curves = []
    for column in stated.columns if columns is None else columns:
        known = ~np.isnan(stated.truth[:, column])
        if weights is not None:
            known &= weights > 0
        truth = stated.truth[known, column]
        if 0 < truth.sum() < len(truth):
            chosen = None if weights is None else weights[known]
            curves.append(points(truth, stated.probabilities[known, column], chosen))
    return np.mean(curves, axis=0) if curves else np.full(len(_GRID), np.nan)


def _band(
    stated: Stated, points: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Where 95% of the curves of samples of whole cases lie."""
    samples = draw_cases(stated.case_ids, num_bootstrap=_NUM_BOOTSTRAP, seed=0)
    if samples is None:
        return None, None
    curves = np.array([_mean_curve(stated, points, weights) for weights in samples])
    return tuple(np.nanpercentile(curves, [2.5, 97.5], axis=0))


def draw_reliability(row: MethodResult, result: TaskResult, out_path: Path) -> bool:
    """Draws how often stated probabilities come true, above how often each is stated.

    Of two classes it is the probability of the second, of several that of the predicted one, of labels that of all.

    Args:
        row (`MethodResult`): the row.
        result (`TaskResult`): whose it is.
        out_path (`Path`): the picture.

    Returns:
        `bool`: whether there was anything to draw.
    """
    stated = stated_by(row, result)
    if stated is None:
        return False
    if result.kind == "multilabel":
        known = ~np.isnan(stated.truth)
        comes_true, probability, title = stated.truth[known] == 1, stated.probabilities[known], "of a label"
    elif len(stated.names) == 2:
        comes_true, probability = stated.truth[:, 1] == 1, stated.probabilities[:, 1]
        title = f"of {stated.names[1]}"
    else:
        comes_true = stated.probabilities.argmax(axis=1) == stated.truth.argmax(axis=1)
        probability, title = stated.probabilities.max(axis=1), "of the predicted class"
    probability = probability.clip(0, 1)
    observed, means = calibration_curve(comes_true, probability, pos_label=True, n_bins=_CALIBRATION_BINS)
    figure = new_figure(5.2, 5.8)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8)
    axes.text(0.56, 0.6, "calibrated", color=_GREY, fontsize=8, rotation=45, rotation_mode="anchor")
    counts = np.histogram(probability, bins=_CALIBRATION_BINS, range=(0, 1))[0]
    sizes = 25 + 200 * counts[counts > 0] / counts.max() if (counts > 0).sum() == len(means) else 40
    axes.plot(means, observed, color=COLOURS[0], linewidth=1.2)
    axes.scatter(means, observed, s=sizes, color=COLOURS[0], zorder=3)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("share that comes true")
    error = row.scores.get("calibration_error")
    shown = f" (calibration error {error.value:.3f})" if error else ""
    axes.set_title(f"{result.task}: {row.method} on {row.encoder}{shown}", loc="left", fontsize=10)
    below.hist(probability, bins=np.linspace(0, 1, _CALIBRATION_BINS + 1), color=COLOURS[0], alpha=0.6, rwidth=0.92)
    below.set_xlabel(f"stated probability {title}")
    below.set_ylabel("items")
    below.set_xlim(-0.02, 1.02)
    tidy_axes(axes)
    tidy_axes(below)
    save_figure(figure, out_path)
    return True


def draw_confusion(row: MethodResult, result: TaskResult, out_path: Path) -> bool:
    """Draws counts of right classes against predicted ones, shaded by share of the row.

    Args:
        row (`MethodResult`): the row, of a classification task.
        result (`TaskResult`): whose it is.
        out_path (`Path`): the picture.

    Returns:
        `bool`: whether there was anything to draw.
    """
    stated = stated_by(row, result) if result.kind == "classification" else None
    if stated is None:
        return False
    num_classes = len(stated.names)
    right, called = stated.truth.argmax(axis=1), stated.probabilities.argmax(axis=1)
    counts = confusion_matrix(right, called, labels=range(num_classes))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.2, 1.6 + 0.62 * num_classes)
    figure = new_figure(side, side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)
    for (place, column), count in np.ndenumerate(counts):
        colour = "white" if shares[place, column] > 0.6 else "#222222"
        text = f"{count}\n{shares[place, column]:.0%}" if num_classes <= 10 else str(count)
        axes.text(column, place, text, ha="center", va="center", fontsize=9, color=colour)
    names = [name if len(name) <= 16 else f"{name[:15]}…" for name in stated.names]
    is_long = max(map(len, names)) * num_classes > 30
    axes.set_xticks(
        range(num_classes),
        names,
        fontsize=8.5,
        rotation=40 if is_long else 0,
        ha="right" if is_long else "center",
        rotation_mode="anchor" if is_long else "default",
    )
    axes.set_yticks(range(num_classes), names, fontsize=8.5)
    axes.set_xlabel("predicted")
    axes.set_ylabel("right")
    axes.set_title(f"{result.task}: {row.method} on {row.encoder}", loc="left", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(figure, out_path)
    return True


def tidy_axes(axes: Axes) -> None:
    """Takes away what distracts from the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
