# SPDX-License-Identifier: Apache-2.0
"""Scored queries -> a row of results, with intervals over the cases of the queries.

Letters: Q queries.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .case_bootstrap import bootstrap_intervals
from .task_result import MethodResult, Score

METHOD = "cosine"


def query_row(
    encoder: str,
    score: Callable[[np.ndarray], dict[str, float]],
    query_cases: Sequence[str],
    *,
    predictions: Sequence[dict[str, Any]] = (),
    num_bootstrap: int = 1000,
    is_null: bool = False,
) -> MethodResult:
    """Makes a row of results.

    Args:
        encoder (`str`): name of the row's embeddings.
        score (callable): places of queries, with repetitions -> scores.
        query_cases (sequence of `str`): the case, or group of cases, of each of the Q queries.
        predictions (sequence of `dict`): see `MethodResult`.
        num_bootstrap (`int`, defaults to 1000): samples of whole cases; 0 for no intervals.
        is_null (`bool`, defaults to `False`): whether it is a null row.
    """
    values = score(np.arange(len(query_cases)))
    intervals = bootstrap_intervals(score, query_cases, num_bootstrap=num_bootstrap, seed=0)
    scores = {
        name: Score(value, tuple(intervals[name]) if name in intervals else None, [value])
        for name, value in values.items()
    }
    return MethodResult(METHOD, encoder, scores, is_null, predictions=list(predictions))


def mean_row(encoder: str, found: Sequence[dict[str, float]]) -> MethodResult:
    """A null row that is the mean over several draws, one per seed.

    Args:
        encoder (`str`): what was drawn, such as "shuffled labels".
        found (sequence of `dict`): the scores of each draw.
    """
    names = [name for name in found[0] if all(name in scores for scores in found)]
    values = {name: [scores[name] for scores in found] for name in names}
    scores = {name: Score(float(np.mean(drawn)), None, list(drawn)) for name, drawn in values.items()}
    return MethodResult(METHOD, encoder, scores, is_null=True)


def chance_row_of(scores: dict[str, float]) -> MethodResult:
    """The row of a gallery in random order.

    Args:
        scores (`dict`): its expected scores.
    """
    settings = {"says": "the gallery in random order"}
    return MethodResult("chance", "chance", {name: Score(value) for name, value in scores.items()}, True, settings)
