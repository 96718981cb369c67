# SPDX-License-Identifier: Apache-2.0
"""What is reached without the embeddings' own merit: the rows beside which a score is read.

Letters: n items, C classes, L labels.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .case_bootstrap import paired_difference
from .case_folds import Fold
from .embedding_table import EmbeddingTable
from .label_table import TaskLabels
from .protocol import MethodRun, run_method
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


def shuffle_labels(
    labels: TaskLabels, case_ids: Sequence[str], seed: int, groups: Sequence[int] | np.ndarray | None = None
) -> TaskLabels:
    """Deals the answers out anew among cases.

    Where all items of each case have one answer, cases swap answers. Else the answers, case after case in random
    order, are laid over the items in theirs, so that most answers of a case stay together.

    Args:
        labels (`TaskLabels`): of the n items.
        case_ids (sequence of `str`): of the n items.
        seed (`int`): of the order.
        groups (sequence of `int`, *optional*): of the n items, one group for a case; answers stay in their group.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, case_id in enumerate(case_ids):
        rows[case_id].append(row)
    is_constant = all(len({labels.targets[row].tobytes() for row in places}) == 1 for places in rows.values())
    by_group: dict[int, list[list[int]]] = defaultdict(list)
    for case_id in sorted(rows):
        by_group[0 if groups is None else int(groups[rows[case_id][0]])].append(rows[case_id])
    random = np.random.default_rng(seed)
    shuffled = labels.targets.copy()
    for members in (by_group[group] for group in sorted(by_group)):
        order = random.permutation(len(members))
        if is_constant:
            for places, giver in zip(members, order, strict=True):
                shuffled[places] = labels.targets[members[giver][0]]
        else:
            shuffled[np.concatenate(members)] = labels.targets[np.concatenate([members[giver] for giver in order])]
    return replace(labels, targets=shuffled)


def parts_of_items(folds: Sequence[Fold], num_items: int) -> np.ndarray | None:
    """The part of a division that each item is in, int `(n,)`, within which answers may be dealt out anew.

    So every part keeps its classes, and rows with shuffled labels differ from the others in the answers alone.

    Args:
        folds (sequence of `Fold`): of one seed.
        num_items (`int`): n.

    Returns:
        `np.ndarray`: `None` if an item is held out twice, for then there are no such parts.
    """
    held_out = np.zeros(num_items, dtype=np.int64)
    place = np.full(num_items, -1, dtype=np.int64)
    for number, fold in enumerate(folds):
        held_out[fold.test] += 1
        place[fold.test] = number
    if (held_out > 1).any():
        return None
    if len(folds) == 1:
        place[folds[0].validation] = 1
    return place


def shuffled_row(
    method: Any,
    table: EmbeddingTable,
    labels: TaskLabels,
    folds: Sequence[Fold],
    seeds: Sequence[int],
    *,
    num_bootstrap: int = 1000,
    progress: Callable[[], None] | None = None,
) -> MethodResult:
    """Repeats a method with the answers dealt out anew among cases, for each seed in another way.

    Answers stay within the part of the folds that they are in, and are also those that predictions are scored by.

    Args:
        method (`Any`), table (`EmbeddingTable`), labels (`TaskLabels`), folds (sequence of `Fold`),
            seeds (sequence of `int`), num_bootstrap (`int`), progress (callable, *optional*): as for `run_method`.

    Returns:
        `MethodResult`: a score is the mean over seeds; its interval, the mean of the seeds' intervals, is that of a
        single deal.
    """
    results = []
    for seed in seeds:
        of_seed = [fold for fold in folds if fold.seed in (None, seed)]
        dealt = shuffle_labels(labels, table.case_ids, seed, parts_of_items(of_seed, len(table)))
        options = {"num_bootstrap": num_bootstrap, "encoder": SHUFFLED, "is_null": True, "progress": progress}
        results.append(run_method(method, table, dealt, of_seed, [seed], **options))
    scores = {}
    for name in (name for name in results[0].scores if all(name in result.scores for result in results)):
        values = [result.scores[name].value for result in results]
        bounds = [result.scores[name].interval for result in results]
        is_known = all(bound is not None for bound in bounds)
        low, high = np.mean(bounds, axis=0).tolist() if is_known else (None, None)
        scores[name] = Score(float(np.mean(values)), (low, high) if is_known else None, values)
    settings = {key: [entry for result in results for entry in result.settings[key]] for key in results[0].settings}
    predictions = [row for result in results for row in result.predictions]
    return replace(results[0], scores=scores, settings=settings, predictions=predictions)


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
