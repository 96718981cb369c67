# SPDX-License-Identifier: Apache-2.0
"""Results of an evaluation: as one structure, as a table, as files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_dre_slcl.atomic_files import write_json, write_text

from .embed_split import EmbeddedSplit

RESULT_HEADER = ("task", "score", "trained", "random weights", "chance")
_TASKS = {
    "zero_shot": "zero-shot, from text alone",
    "linear_probe": "linear probe",
    "slide_to_report": "slide to report",
    "report_to_slide": "report to slide",
}
_SCORES = {
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "accuracy": "accuracy",
    "recall@1": "recall@1",
    "recall@5": "recall@5",
    "recall@10": "recall@10",
    "mean_average_precision": "mean average precision",
    "median_rank": "median rank (low is good)",
}
_EXPLANATION = """\
Brackets: 95% intervals over {num_bootstrap} bootstrap samples of whole cases. They say how scores vary with the choice
of cases, not with the seed of training; with few cases they are too narrow, and a score that is perfect on every case
has an interval without width, which is no certainty. Random weights: the same architecture untrained, its codebook
fitted on its own features. Chance: expected of guesses, for accuracy of always saying the most frequent class.
"""


@dataclass
class Evaluation:
    """What `evaluate_model` returns. Letters: S slides, U distinct reports, E joint width.

    Args:
        metrics (`dict`): all scores, ready for JSON; `metrics["tasks"][task]` holds `trained`, `random` and `chance`.
        predictions (`list` of `dict`): a row per slide, without report text.
        test (`EmbeddedSplit`): the trained model's embeddings of the held-out slides.
        train (`EmbeddedSplit`, *optional*): of the training slides, if a linear probe was fitted.
        reports (`list` of `str`): the distinct held-out reports; empty without retrieval.
        report_projection (`np.ndarray` of shape `(U, E)`, float32, *optional*): their projections, L2-normalised.
    """

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]
    test: EmbeddedSplit
    train: EmbeddedSplit | None
    reports: list[str]
    report_projection: np.ndarray | None


def result_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """The scores as text, in rows under `RESULT_HEADER`.

    Args:
        metrics (`dict`): `Evaluation.metrics`.
    """
    rows = []
    for task, title in _TASKS.items():
        result = metrics["tasks"].get(task, {})
        # Among ten reports or fewer, the first ten always hold the right one.
        scores = [name for name in _SCORES if name in result.get("chance", {}) and not _is_certain(result, name)]
        rows.extend(
            (
                title,
                _SCORES[name],
                _with_interval(result["trained"], name),
                _with_interval(result["random"], name) if "random" in result else "-",
                _number(name, result["chance"][name]),
            )
            for name in scores
        )
    return rows


def results_table(metrics: dict[str, Any]) -> str:
    """The scores as a Markdown table, with what its columns mean.

    Args:
        metrics (`dict`): `Evaluation.metrics`.
    """
    lines = [RESULT_HEADER, ("---",) * len(RESULT_HEADER), *result_rows(metrics)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    refused = f", {len(metrics['refused'])} more could not be read" if metrics["refused"] else ""
    counts = f"{metrics['num_slides']} slides of {metrics['num_cases']} cases{refused}"
    explanation = _EXPLANATION.format(num_bootstrap=metrics["num_bootstrap"])
    return f"{metrics['dataset']}, split {metrics['split']}: {counts}.\n\n{table}\n\n{explanation}"


def write_evaluation(path: str | Path, evaluation: Evaluation) -> None:
    """Writes metrics to `path`, and beside it the table (`.md`) and predictions (`.predictions.jsonl`), atomically.

    Args:
        path (`str` or `Path`): the metrics file, `metrics.json`.
        evaluation (`Evaluation`): what is written.
    """
    path = Path(path)
    rows = (json.dumps(row, allow_nan=False) + "\n" for row in evaluation.predictions)
    write_text(path.with_suffix(".predictions.jsonl"), "".join(rows))
    write_text(path.with_suffix(".md"), results_table(evaluation.metrics))
    write_json(path, evaluation.metrics)


def _with_interval(scores: dict[str, Any], name: str) -> str:
    interval = scores["interval"].get(name)
    bounds = f" [{', '.join(_number(name, bound) for bound in interval)}]" if interval else ""
    return f"{_number(name, scores[name])}{bounds}"


def _number(name: str, value: float) -> str:
    return f"{value:g}" if name == "median_rank" else f"{value:.3f}"


def _is_certain(result: dict[str, Any], name: str) -> bool:
    return name.startswith("recall@") and result["chance"][name] > 1 - 1e-9
