# SPDX-License-Identifier: Apache-2.0
"""What is reached without the embeddings' own merit: the rows beside which a score is read.

Letters: n items, C classes, L labels.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .case_bootstrap import paired_difference
from .case_folds import Fold
from .label_table import TaskLabels
from .protocol import MethodRun
from .scores import chance_scores
from .task_result import MethodResult, Score

CHANCE = "chance"
SHUFFLED = "shuffled labels"


def chance_row(labels: TaskLabels, folds: Sequence[Fold]) -> MethodResult:
    """Scores of saying the same of every held-out item: the frequencies of classes or labels, the mean, one risk.

    Args:
        labels (`TaskLabels`): of the n items.
        folds (sequence of `Fold`): their test parts are the held-out items.
    """
    items = np.unique(np.concatenate([fold.test for fold in folds]))
    options = {"is_ordered": labels.is_ordered} if labels.kind == "classification" else {}
    found = chance_scores(labels.kind, labels.targets[items], len(labels.classes), **options)
    scores = {name: Score(value) for name, value in found.items()}
    return MethodResult(CHANCE, CHANCE, scores, is_null=True, settings={"says": "the same of every item"})


def shuffle_labels(labels: TaskLabels, case_ids: Sequence[str], seed: int) -> TaskLabels:
    """Deals the answers out anew among cases.

    Where all items of each case have one answer, cases swap answers. Else the answers, case after case in random
    order, are laid over the items in theirs, so that most answers of a case stay together.

    Args:
        labels (`TaskLabels`): of the n items.
        case_ids (sequence of `str`): of the n items.
        seed (`int`): of the order.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, case_id in enumerate(case_ids):
        rows[case_id].append(row)
    members = [rows[case_id] for case_id in sorted(rows)]
    order = np.random.default_rng(seed).permutation(len(members))
    shuffled = labels.targets.copy()
    if all(len({labels.targets[row].tobytes() for row in places}) == 1 for places in members):
        for places, giver in zip(members, order, strict=True):
            shuffled[places] = labels.targets[members[giver][0]]
    else:
        shuffled[np.concatenate(members)] = labels.targets[np.concatenate([members[giver] for giver in order])]
    return replace(labels, targets=shuffled)


def with_differences(run: MethodRun, baselines: Sequence[MethodRun]) -> MethodResult:
    """Adds to a row how it differs from the same method on other embeddings, on the same bootstrap samples.

    Args:
        run (`MethodRun`): the row.
        baselines (sequence of `MethodRun`): the same method, folds and seeds on the same items.

    Returns:
        `MethodResult`: `settings["differences"]` holds for each baseline and score `difference`, its 95% `interval`
        and a two-sided `p_value`.
    """
    found: dict[str, Any] = {}
    for baseline in baselines:
        scores: dict[str, Any] = {}
        for name, ours in run.samples.items():
            pair = paired_difference(ours, baseline.samples[name]) if name in baseline.samples else None
            if pair is not None:
                gap = run.result.scores[name].value - baseline.result.scores[name].value
                scores[name] = {"difference": gap, **pair}
        found[baseline.result.encoder] = scores
    return replace(run.result, settings={**run.result.settings, "differences": found}) if found else run.result
