# SPDX-License-Identifier: Apache-2.0
"""Embeddings and a label file -> the results of every task, each row beside its null rows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .case_folds import Fold, check_folds, describe_folds, make_folds
from .embedding_table import EmbeddingTable
from .fold_files import match_folds, read_fold_files
from .label_table import LabelTable, TaskLabels
from .methods import make_methods, smallest_class_size
from .null_rows import chance_row, shuffled_row, with_differences
from .protocol import MethodRun, evaluate_method
from .scores import MAIN_METRIC
from .sites import find_sites
from .task_items import case_rule, find_cases, make_items
from .task_result import MethodResult, TaskResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """How a task is evaluated.

    Args:
        methods (`tuple` of `str`): names of methods; empty for those that suit the kind of task.
        num_folds (`int`, defaults to 5): folds, drawn anew for each seed.
        fold_files (`tuple` of `str`): files with folds instead, see `fold_files`.
        validation_fraction (`float`, defaults to 0.0): share of the training cases for choices; 0 lets each method
            take folds of the training part.
        preserve_sites (`bool`, defaults to `False`): no site in two folds.
        site_column (`str`, *optional*): column of sites; without it they are read out of TCGA barcodes.
        seeds (`tuple` of `int`, defaults to `(0, 1, 2)`): of folds and methods.
        num_bootstrap (`int`, defaults to 1000): samples of whole cases for intervals and differences.
        level (`str`, *optional*): "slide" or "case", see `make_items`.
        case_pattern (`str`, *optional*): see `case_rule`.
        with_shuffled (`bool`, defaults to `True`): repeat every method with the answers dealt out anew among cases.
    """

    methods: tuple[str, ...] = ()
    num_folds: int = 5
    fold_files: tuple[str, ...] = ()
    validation_fraction: float = 0.0
    preserve_sites: bool = False
    site_column: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    num_bootstrap: int = 1000
    level: str | None = None
    case_pattern: str | None = None
    with_shuffled: bool = True


def evaluate_embeddings(
    table: EmbeddingTable,
    labels: LabelTable,
    task: TaskLabels,
    protocol: Protocol,
    *,
    baselines: Sequence[EmbeddingTable] = (),
    peers: Sequence[EmbeddingTable] = (),
    progress: bool = True,
) -> TaskResult:
    """Evaluates embeddings on one task.

    Args:
        table (`EmbeddingTable`): the embeddings.
        labels (`LabelTable`): the label file.
        task (`TaskLabels`): from `make_tasks`.
        protocol (`Protocol`): how.
        baselines (sequence of `EmbeddingTable`): embeddings without merit of their own, such as those of a random
            encoder or means of tiles, for null rows.
        peers (sequence of `EmbeddingTable`): embeddings of other encoders, for rows beside.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `TaskResult`: rows of the embeddings, of peers, and null rows last; all on the same items, folds, seeds and
        bootstrap samples.

    Raises:
        ValueError: if labels, folds and embeddings do not fit together; it says how to mend that.
    """
    rule = case_rule(protocol.case_pattern)
    joined = [make_items(one, labels, task, level=protocol.level, pattern=rule) for one in (table, *peers, *baselines)]
    tables, items, level = _common_items(joined)
    sites = None
    if protocol.preserve_sites or protocol.site_column:
        sites = find_sites(tables[0], labels, protocol.site_column)
    folds, origin = _folds(table, tables[0], labels, items, protocol, sites)
    train_parts = [fold.train for fold in folds]
    smallest = smallest_class_size(items, tables[0].case_ids, train_parts) if task.kind == "classification" else None
    methods, notes = make_methods(items, protocol.methods, smallest)
    for note in notes:
        logger.warning("Task %s: left out %s", task.task, note)
    rows = _rows(methods, tables, items, folds, protocol, num_peers=len(peers), progress=progress)
    held_out = np.unique(np.concatenate([fold.test for fold in folds]))
    return TaskResult(
        task=task.task,
        kind=task.kind,
        rows=[*rows, chance_row(items, folds)],
        main_metric=MAIN_METRIC[task.kind],
        classes=items.classes,
        num_items=len(held_out),
        num_cases=len({tables[0].case_ids[row] for row in held_out}),
        protocol=_describe(protocol, tables, items, folds, sites, level) | {"folds_from": origin, "notes": notes},
    )


def _common_items(
    joined: Sequence[tuple[EmbeddingTable, TaskLabels, str]],
) -> tuple[list[EmbeddingTable], TaskLabels, str]:
    """All embeddings on the items that each of them has."""
    levels = {level for _, _, level in joined}
    if len(levels) > 1:
        raise ValueError("Some embeddings are of slides and others of cases; use --level case for all.")
    common = set(joined[0][0].ids).intersection(*(one.ids for one, _, _ in joined[1:]))
    if not common:
        raise ValueError("No slide or case has an embedding in all of the tables that are compared.")
    tables = []
    for one, _, _ in joined:
        tables.append(one.take([row for row, id_ in enumerate(one.ids) if id_ in common]))
    first, labels, level = joined[0]
    for other, _, _ in joined[1:]:
        gone = sorted(set(first.ids) - set(other.ids))
        notes = [
            {"id": id_, "reason": "no_embedding", "message": f"{other.name} has no embedding of it"} for id_ in gone
        ]
        tables[0] = replace(tables[0], left_out=[*tables[0].left_out, *notes])
    kept = [row for row, id_ in enumerate(first.ids) if id_ in common]
    return tables, labels.take(kept), level


def _folds(
    source: EmbeddingTable,
    items: EmbeddingTable,
    labels: LabelTable,
    targets: TaskLabels,
    protocol: Protocol,
    sites: Sequence[str] | None,
) -> tuple[list[Fold], dict[str, Any]]:
    if protocol.fold_files:
        if sites is not None:
            raise ValueError("Folds come from files, so sites cannot be kept together: give one of the two.")
        cases_of = {}
        if set(items.ids) == set(items.case_ids):  # cases, where files may name slides
            known = labels.slide_ids and labels.case_ids
            pairs = (labels.slide_ids, labels.case_ids) if known else (source.ids, _cases(source, labels, protocol))
            cases_of = dict(zip(*pairs, strict=True))
        folds, report = match_folds(read_fold_files(protocol.fold_files), items, cases_of)
        if report["ids_without_item"]:
            logger.warning(
                "%d ids of the fold files have no embedding or no label, such as %s",
                report["ids_without_item"],
                report["such_as"][0],
            )
        return folds, {**report, "files": [Path(path).name for path in protocol.fold_files]}
    folds = make_folds(
        targets,
        items.case_ids,
        protocol.num_folds,
        protocol.seeds,
        sites=sites,
        validation_fraction=protocol.validation_fraction,
    )
    check_folds(folds, items.case_ids)
    return folds, {"origin": "stratified by case" if sites is None else "stratified by case, sites kept together"}


def _cases(source: EmbeddingTable, labels: LabelTable, protocol: Protocol) -> list[str]:
    return find_cases(source, labels, case_rule(protocol.case_pattern))


def _rows(
    methods: Sequence[Any],
    tables: Sequence[EmbeddingTable],
    labels: TaskLabels,
    folds: Sequence[Fold],
    protocol: Protocol,
    *,
    num_peers: int,
    progress: bool,
) -> list[MethodResult]:
    """Rows of the embeddings, then of peers, then null rows; all of a method on the same samples."""
    per_method = len(tables) + protocol.with_shuffled
    fits = [len([f for f in folds if f.seed in (None, seed)]) for seed in protocol.seeds]
    total = per_method * sum(getattr(method, "num_episodes", 1) * sum(fits) for method in methods)
    ours, beside, null = [], [], []
    with tqdm(total=total, desc=labels.task, unit="fit", disable=not progress) as bar:
        for method in methods:
            bar.set_postfix_str(method.name)
            options = {"num_bootstrap": protocol.num_bootstrap, "progress": bar.update}
            runs: list[MethodRun] = [
                evaluate_method(method, one, labels, folds, protocol.seeds, is_null=place > num_peers, **options)
                for place, one in enumerate(tables)
            ]
            ours.append(with_differences(runs[0], runs[1:]))
            beside += [run.result for run in runs[1 : 1 + num_peers]]
            null += [run.result for run in runs[1 + num_peers :]]
            if protocol.with_shuffled:
                null.append(shuffled_row(method, tables[0], labels, folds, protocol.seeds, **options))
    return [*ours, *beside, *null]


def _describe(
    protocol: Protocol,
    tables: Sequence[EmbeddingTable],
    labels: TaskLabels,
    folds: Sequence[Fold],
    sites: Sequence[str] | None,
    level: str,
) -> dict[str, Any]:
    """The protocol, ready for JSON; no paths of this machine."""
    reasons: dict[str, int] = {}
    for item in tables[0].left_out:
        reasons[item["reason"]] = reasons.get(item["reason"], 0) + 1
    return {
        "level": level,
        "embeddings": [{"name": one.name, "width": one.features.shape[1]} for one in tables],
        "num_folds": len({fold.name for fold in folds}),
        "seeds": list(protocol.seeds),
        "num_bootstrap": protocol.num_bootstrap,
        "case_pattern": protocol.case_pattern,
        "num_sites": None if sites is None else len(set(sites)),
        "balance": describe_folds(folds, labels, sites),
        "left_out": tables[0].left_out,
        "left_out_reasons": reasons,
    }
