# SPDX-License-Identifier: Apache-2.0
"""What an evaluation finds, as one structure that everything else draws, writes and publishes.

Letters: n items (slides or cases), C classes.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("classification", "multilabel", "regression", "survival", "retrieval")


@dataclass(frozen=True)
class Score:
    """One metric of one method.

    Args:
        value (`float`): mean over seeds; within a seed, over all held-out items of all folds together.
        interval (`tuple` of two `float`, *optional*): 95% bootstrap interval over whole cases; `None` where there are
            too few cases.
        by_seed (`list` of `float`): the value of each seed.
    """

    value: float
    interval: tuple[float, float] | None = None
    by_seed: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class MethodResult:
    """How one method does on one set of embeddings; a row of the table.

    Args:
        method (`str`): such as "linear_probe", "knn", "few_shot_4", "cox", "zero_shot".
        encoder (`str`): name of the embeddings: "slides" for those evaluated; a null row tells its kind, such as
            "random weights", "mean of tiles", "shuffled labels", "chance".
        scores (`dict`): metric -> `Score`.
        is_null (`bool`): whether the row only shows what would be reached without the embeddings' own merit.
        settings (`dict`): what was chosen, such as the regularisation of each fold; ready for JSON.
        predictions (`list` of `dict`): a row per held-out item and seed: `id`, `case_id`, `seed`, `fold`, `truth`,
            `prediction` (C probabilities, a number, or a risk). Empty for chance.
    """

    method: str
    encoder: str
    scores: dict[str, Score]
    is_null: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TaskResult:
    """All rows of one task.

    Args:
        task (`str`): label column, or "slide_to_report" and the like.
        kind (`str`): one of `KINDS`.
        rows (`list` of `MethodResult`): null rows last.
        main_metric (`str`): the metric that headlines and pictures show.
        classes (`list` of `str`): names of the C classes, or of the labels of a multi-label task; else empty.
        num_items (`int`), num_cases (`int`): held-out items and cases.
        protocol (`dict`): how it was found: folds, their origin, seeds, bootstrap samples, level ("slide" or "case"),
            items left out and why; ready for JSON.
    """

    task: str
    kind: str
    rows: list[MethodResult]
    main_metric: str
    classes: list[str] = field(default_factory=list)
    num_items: int = 0
    num_cases: int = 0
    protocol: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but predictions, ready for JSON."""
        content = asdict(self)
        for row in content["rows"]:
            del row["predictions"]
        return content
