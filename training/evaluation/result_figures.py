# SPDX-License-Identifier: Apache-2.0
"""The pictures of a task: all methods with their intervals, and what the first method's predictions are worth."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ..figures import COLOURS, new_figure, save_figure
from .result_curves import draw_confusion, draw_precision_recall, draw_reliability, draw_roc, tidy_axes
from .score_titles import is_lower_better, score_text, score_title
from .scores import import_survival
from .task_result import MethodResult, TaskResult

_GREY = "#777777"
_NULL_COLOURS = ("#777777", "#a8a8a8", "#555555")
_FEW_SHOT = re.compile(r"few_shot_(\d+)_?(.*)")
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


def draw_result(result: TaskResult, folder: Path, name: str | None = None) -> list[tuple[Path, str]]:
    """Draws everything that a task's rows allow.

    Curves are of the method that was asked for first, rather than of the one that happened to do best.

    Args:
        result (`TaskResult`): the task.
        folder (`Path`): where pictures go, as `<name>-<picture>.png`.
        name (`str`, *optional*): by default the task's.

    Returns:
        `list` of `tuple`: picture and its caption, in the order in which to show them.
    """
    stem = _NOT_IN_NAMES.sub("_", name or result.task).strip("_")[:60] or "task"
    rows = curve_rows(result)
    drawn = []

    def path(name: str) -> Path:
        return folder / f"{stem}-{name}.png"

    def keep(name: str, was_drawn: bool, caption: str) -> None:
        if was_drawn:
            drawn.append((path(name), caption))

    title = score_title(result.main_metric, result)
    keep(
        "methods",
        draw_forest(result, path("methods")),
        f"{title} of every method, with 95% intervals over cases; grey: without the embeddings' own merit.",
    )
    keep(
        "few_shot",
        draw_few_shot(result, path("few_shot")),
        f"{title} with k labelled cases of each class, with 95% intervals over cases.",
    )
    if not rows:
        return drawn
    main = rows[0]
    what = f"{main.method} on {main.encoder}"
    seed = f", seed {main.predictions[0].get('seed')}"
    keep("roc", draw_roc(rows, result, path("roc")), f"ROC of {what}{seed}; band: 95% over cases. Grey: null rows.")
    keep(
        "precision_recall",
        draw_precision_recall(rows, result, path("precision_recall")),
        f"Precision and recall of {what}{seed}; band: 95% over cases. Grey: null rows.",
    )
    keep(
        "calibration",
        draw_reliability(main, result, path("calibration")),
        f"Calibration of {what}{seed}: below the diagonal it is too sure.",
    )
    keep("confusion", draw_confusion(main, result, path("confusion")), f"Right and predicted classes, {what}{seed}.")
    if result.kind == "survival":
        keep(
            "survival",
            draw_kaplan_meier(main, result, path("survival")),
            f"Kaplan-Meier curves of the held-out items, each fold halved by the risk that {what} predicts{seed}.",
        )
    if result.kind == "regression":
        keep("predictions", draw_scatter(main, result, path("predictions")), f"What {what} predicts{seed}.")
    if result.kind == "retrieval":
        keep(
            "recall",
            draw_recall(rows, result, path("recall")),
            f"Share of queries with a right answer among the first k, {what}. Grey: null rows.",
        )
    return drawn


def curve_rows(result: TaskResult) -> list[MethodResult]:
    """The rows of the first method that has predictions, on every set of embeddings, those evaluated first."""
    with_predictions = [row for row in result.rows if row.predictions]
    ours = [row for row in with_predictions if not row.is_null and not _FEW_SHOT.fullmatch(row.method)]
    ours = ours or [row for row in with_predictions if not row.is_null]
    return [row for row in with_predictions if row.method == ours[0].method] if ours else []


def draw_forest(result: TaskResult, out_path: Path) -> bool:
    """Draws the main score of every row with its interval; few-shot rows have a picture of their own.

    Args:
        result (`TaskResult`): the task.
        out_path (`Path`): the picture.

    Returns:
        `bool`: whether there was anything to draw.
    """
    metric = result.main_metric
    rows = [row for row in result.rows if metric in row.scores and not _FEW_SHOT.fullmatch(row.method)]
    chance = [row for row in rows if row.method == "chance"]
    rows = [row for row in rows if row.method != "chance"]
    if not rows:
        return False
    by_method = defaultdict(list)
    for row in rows:
        by_method[row.method].append(row)
    figure = new_figure(7.2, 1.1 + 0.3 * len(rows) + 0.18 * len(by_method))
    axes = figure.add_subplot()
    place, ticks, names = 0.0, [], []
    colours = _encoder_colours(rows)
    for method, members in by_method.items():
        for row in members:
            score, colour = row.scores[metric], colours[row.encoder]
            if score.interval:
                axes.plot(score.interval, [place, place], color=colour, linewidth=2 if not row.is_null else 1.4)
            marker = "o" if row.is_null else "s"
            axes.plot([score.value], [place], marker, color=colour, markersize=5 if row.is_null else 6.5)
            axes.annotate(
                score_text(score), (1.01, place), xycoords=("axes fraction", "data"), fontsize=8, va="center",
                color=_GREY if row.is_null else "#222222",
            )  # fmt: skip
            ticks.append(place)
            names.append(f"{method}, {row.encoder}")
            place += 1
        place += 0.6
    if chance:
        value = chance[0].scores[metric].value
        axes.axvline(value, color=_GREY, linewidth=0.9, linestyle=":")
        axes.annotate(
            f"chance {value:.3g}", (value, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", fontsize=8, color=_GREY, ha="center",
        )  # fmt: skip
    axes.set_yticks(ticks, names, fontsize=8.5)
    axes.set_ylim(ticks[-1] + 0.8, -0.8)
    better = ", lower is better" if is_lower_better(metric) else ""
    axes.set_xlabel(f"{result.task}: {score_title(metric, result)}{better}")
    tidy_axes(axes)
    axes.grid(visible=False, axis="y")
    save_figure(figure, out_path)
    return True


def _encoder_colours(rows: list[MethodResult]) -> dict[str, str]:
    """Null rows are shades of grey, others of one encoder have one colour."""
    encoders = list(dict.fromkeys(row.encoder for row in rows if not row.is_null))
    null = list(dict.fromkeys(row.encoder for row in rows if row.is_null))
    colours = {encoder: _NULL_COLOURS[place % len(_NULL_COLOURS)] for place, encoder in enumerate(null)}
    return colours | {encoder: COLOURS[place % 6] for place, encoder in enumerate(encoders)}


def draw_few_shot(result: TaskResult, out_path: Path) -> bool:
    """Draws the main score over the number of labelled cases of each class; arguments as in `draw_forest`."""
    metric = result.main_metric
    lines: dict[tuple[str, str, bool], list[tuple[int, MethodResult]]] = defaultdict(list)
    for row in result.rows:
        match = _FEW_SHOT.fullmatch(row.method)
        if match and metric in row.scores:
            lines[match[2] or "prototypes", row.encoder, row.is_null].append((int(match[1]), row))
    if not lines:
        return False
    figure = new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    colours = _encoder_colours([row for points in lines.values() for _, row in points])
    heads = list(dict.fromkeys(head for head, _, _ in lines))
    for place, ((head, encoder, is_null), points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        # Side by side, so that intervals can be told apart.
        shots = np.array([shots for shots, _ in points]) * 1.04 ** (place - (len(lines) - 1) / 2)
        values = [row.scores[metric].value for _, row in points]
        style = ("-", "--", ":", "-.")[heads.index(head) % 4]
        label = f"{head}, {encoder}"
        axes.plot(shots, values, style, marker="o", markersize=4, color=colours[encoder], label=label,
                  linewidth=1.1 if is_null else 1.8)  # fmt: skip
        for shot, (_, row) in zip(shots, points, strict=True):
            if row.scores[metric].interval:
                axes.plot([shot, shot], row.scores[metric].interval, color=colours[encoder], linewidth=0.9, alpha=0.7)
    _mark_whole_training(axes, result)
    shown = sorted({shots for points in lines.values() for shots, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(shots) for shots in shown])
    axes.minorticks_off()
    axes.set_xlabel("labelled cases of each class")
    axes.set_ylabel(score_title(metric, result))
    axes.set_title(result.task, loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    tidy_axes(axes)
    save_figure(figure, out_path)
    return True


def _mark_whole_training(axes: Axes, result: TaskResult) -> None:
    """Lines at chance, and at what the first method reaches with all labels."""
    metric = result.main_metric
    whole = [row for row in result.rows if not row.is_null and not _FEW_SHOT.fullmatch(row.method)]
    chance = [row for row in result.rows if row.method == "chance"]
    for row, name in [
        *((row, f"{row.method}, all labels") for row in whole[:1]),
        *((row, "chance") for row in chance),
    ]:
        if metric in row.scores:
            colour = _GREY if row.is_null else "#222222"
            axes.axhline(row.scores[metric].value, color=colour, linewidth=0.9, linestyle=(0, (5, 3)))
            # The one above the curves' beginning, the other below their end.
            x, align, above = (0.99, "right", -11) if row.is_null else (0.01, "left", 3)
            axes.annotate(
                name,
                (x, row.scores[metric].value),
                xycoords=("axes fraction", "data"),
                xytext=(0, above),
                textcoords="offset points",
                fontsize=8,
                color=colour,
                ha=align,
            )


def draw_kaplan_meier(row: MethodResult, result: TaskResult, out_path: Path) -> bool:
    """Draws the survival of the items with the higher and with the lower half of risks of their fold.

    Args:
        row (`MethodResult`): the row, of a survival task.
        result (`TaskResult`): whose it is.
        out_path (`Path`): the picture.

    Returns:
        `bool`: whether there was anything to draw.
    """
    items = [item for item in row.predictions if item["seed"] == row.predictions[0]["seed"]]
    times = np.array([item["truth"]["time"] for item in items], dtype=float)
    events = np.array([item["truth"]["event"] for item in items], dtype=bool)
    risks = np.array([item["prediction"] for item in items], dtype=float)
    # Risks of different folds, each of a model of its own, have no common scale.
    folds = np.array([item["fold"] for item in items])
    is_high = np.zeros(len(items), dtype=bool)
    for fold in np.unique(folds):
        is_high[folds == fold] = risks[folds == fold] > np.median(risks[folds == fold])
    if not is_high.any() or is_high.all():
        return False
    estimate = import_survival("sksurv.nonparametric").kaplan_meier_estimator
    figure = new_figure(6.2, 5.0)
    axes, table = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    ends = np.linspace(0, times.max(), 7)
    for place, (name, chosen) in enumerate({"lower risk": ~is_high, "higher risk": is_high}.items()):
        x, share, (low, high) = estimate(events[chosen], times[chosen], conf_type="log-log")
        x, share, low, high = (np.r_[start, values] for start, values in ((0, x), (1, share), (1, low), (1, high)))
        colour = COLOURS[place]
        axes.step(x, share, where="post", color=colour, linewidth=2, label=f"{name} (n = {chosen.sum()})")
        axes.fill_between(x, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        censored = np.sort(times[chosen & ~events])
        at = share[np.searchsorted(x, censored, side="right") - 1]
        axes.plot(censored, at, "|", color=colour, markersize=6, markeredgewidth=1)
        for end in ends:
            table.text(end, -place, str(int((times[chosen] >= end).sum())), ha="center", va="center", fontsize=8.5,
                       color=colour)  # fmt: skip
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("share without event")
    score = row.scores.get("c_index")
    shown = f", c-index {score_text(score)}" if score else ""
    axes.set_title(f"{result.task}: {row.method} on {row.encoder}{shown}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9, title=_log_rank(events, times, is_high), title_fontsize=9)
    table.set_ylim(-1.6, 0.6)
    table.set_yticks([0, -1], ["lower", "higher"], fontsize=8.5)
    table.set_title("at risk", loc="left", fontsize=8.5)
    table.set_xlabel("time")
    table.tick_params(length=0)
    tidy_axes(axes)
    table.spines[:].set_visible(False)
    save_figure(figure, out_path)
    return True


def _log_rank(events: np.ndarray, times: np.ndarray, is_high: np.ndarray) -> str:
    if not events[is_high].any() or not events[~is_high].any():
        return ""
    outcomes = import_survival("sksurv.util").Surv.from_arrays(events, times)
    _, p_value = import_survival("sksurv.compare").compare_survival(outcomes, is_high.astype(int))
    return "log-rank p < 0.001" if p_value < 0.001 else f"log-rank p = {p_value:.3f}"


def draw_scatter(row: MethodResult, result: TaskResult, out_path: Path) -> bool:
    """Draws predicted numbers over right ones; arguments as in `draw_kaplan_meier`, of a regression task."""
    items = [item for item in row.predictions if item["seed"] == row.predictions[0]["seed"]]
    right, predicted = (np.array([item[name] for item in items], dtype=float) for name in ("truth", "prediction"))
    figure = new_figure(5.2, 5.2)
    axes = figure.add_subplot()
    ends = [min(right.min(), predicted.min()), max(right.max(), predicted.max())]
    axes.plot(ends, ends, color=_GREY, linewidth=0.9)
    alpha = float(np.clip(60 / max(len(right), 1), 0.15, 0.8))
    axes.plot(right, predicted, "o", color=COLOURS[0], markersize=4, alpha=alpha, markeredgewidth=0)
    axes.set_xlabel("right")
    axes.set_ylabel("predicted")
    axes.set_aspect("equal")
    shown = f", R² {score_text(row.scores['r2'])}" if "r2" in row.scores else ""
    axes.set_title(f"{result.task}: {row.method}{shown}", loc="left", fontsize=10)
    tidy_axes(axes)
    save_figure(figure, out_path)
    return True


def draw_recall(rows: list[MethodResult], result: TaskResult, out_path: Path) -> bool:
    """Draws the share of queries with a right answer among the first k, over k.

    Args:
        rows (`list` of `MethodResult`): rows of a retrieval task, whose predictions are ranks.
        result (`TaskResult`): whose they are.
        out_path (`Path`): the picture.

    Returns:
        `bool`: whether there was anything to draw.
    """
    figure = new_figure(5.6, 4.2)
    axes = figure.add_subplot()
    colours = _encoder_colours(rows)
    longest = max(2, max(int(item["prediction"]) for row in rows for item in row.predictions))
    places = np.arange(1, longest + 1)
    for row in rows:
        ranks = np.array([item["prediction"] for item in row.predictions], dtype=float)
        shares = (ranks[:, None] <= places).mean(axis=0)
        style = {"linestyle": "--", "linewidth": 1.2} if row.is_null else {"linewidth": 2}
        axes.step(places, shares, where="post", color=colours[row.encoder], label=row.encoder, **style)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k")
    axes.set_ylabel("queries with a right answer among the first k")
    axes.set_title(result.task, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    tidy_axes(axes)
    save_figure(figure, out_path)
    return True
