# SPDX-License-Identifier: Apache-2.0
"""Embeddings and a label file -> the results of every task, each row beside its null rows."""

import logging
from collections import Counter
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
from .scores import MAIN_METRIC, undefined_labels
from .sites import find_sites
from .task_items import case_rule, find_cases, make_items, share_cases
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


@dataclass(frozen=True, eq=False)
class PreparedTask:
    """A task of which everything is settled but the methods.

    Args:
        tables (`list` of `EmbeddingTable`): the embeddings, then peers, then baselines, all of the same items.
        num_peers (`int`): how many are peers.
        labels (`TaskLabels`): answers of the items.
        level (`str`): "slide" or "case".
        folds (`list` of `Fold`), folds_from (`dict`): of the items, and where they come from.
        sites (`list` of `str`, *optional*): of the items.
    """

    tables: list[EmbeddingTable]
    num_peers: int
    labels: TaskLabels
    level: str
    folds: list[Fold]
    folds_from: dict[str, Any]
    sites: list[str] | None

    @property
    def held_out(self) -> np.ndarray:
        """The items in a test part, int."""
        return np.unique(np.concatenate([fold.test for fold in self.folds]))


def prepare_task(
    table: EmbeddingTable,
    labels: LabelTable,
    task: TaskLabels,
    protocol: Protocol,
    *,
    baselines: Sequence[EmbeddingTable] = (),
    peers: Sequence[EmbeddingTable] = (),
) -> PreparedTask:
    """Joins embeddings and labels, and divides the items.

    Args:
        table (`EmbeddingTable`): the embeddings.
        labels (`LabelTable`): the label file.
        task (`TaskLabels`): from `make_tasks`.
        protocol (`Protocol`): how.
        baselines (sequence of `EmbeddingTable`): embeddings without merit of their own, such as those of a random
            encoder or means of tiles, for null rows.
        peers (sequence of `EmbeddingTable`): embeddings of other encoders, for rows beside.

    Raises:
        ValueError: if labels, folds and embeddings do not fit together; it says how to mend that.
    """
    rule = case_rule(protocol.case_pattern)
    every = share_cases((table, *peers, *baselines))
    joined = [make_items(one, labels, task, level=protocol.level, pattern=rule) for one in every]
    tables, items, level = _common_items(joined)
    sites = None
    if protocol.preserve_sites or protocol.site_column:
        sites = find_sites(tables[0], labels, protocol.site_column)
    folds, origin = _folds(every[0], tables[0], labels, items, protocol, sites)
    return PreparedTask(tables, len(peers), items, level, folds, origin, sites)


def evaluate_task(prepared: PreparedTask, protocol: Protocol, *, progress: bool = True) -> TaskResult:
    """Runs every method on every table of embeddings.

    Args:
        prepared (`PreparedTask`): from `prepare_task`.
        protocol (`Protocol`): how.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        `TaskResult`: rows of the embeddings, of peers, and null rows last; all on the same items, folds, seeds and
        bootstrap samples.

    Raises:
        ValueError: if a method cannot do this kind of task, or a training part is too small for it.
    """
    labels, items, folds = prepared.labels, prepared.tables[0], prepared.folds
    smallest = None
    if labels.kind == "classification":
        smallest = smallest_class_size(labels, items.case_ids, [fold.train for fold in folds])
    methods, notes = make_methods(labels, protocol.methods, smallest)
    if not methods:
        raise ValueError(f"Task {labels.task}: no method is left; {notes[0]}.")
    if labels.kind == "multilabel":
        alike = undefined_labels(labels.targets[prepared.held_out])
        notes += [f"{labels.classes[place]}: its known held-out items are all alike, so no score" for place in alike]
    for note in notes:
        logger.warning("Task %s: left out %s", labels.task, note)
    rows = _rows(methods, prepared, protocol, progress=progress)
    return TaskResult(
        task=labels.task,
        kind=labels.kind,
        rows=[*rows, chance_row(labels, folds)],
        main_metric=MAIN_METRIC[labels.kind],
        classes=labels.classes,
        num_items=len(prepared.held_out),
        num_cases=len({items.case_ids[row] for row in prepared.held_out}),
        protocol={**_describe(protocol, prepared), "folds_from": prepared.folds_from, "notes": notes},
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


def _rows(methods: Sequence[Any], prepared: PreparedTask, protocol: Protocol, *, progress: bool) -> list[MethodResult]:
    """Rows of the embeddings, then of peers, then null rows; all of a method on the same samples."""
    tables, labels, folds, num_peers = prepared.tables, prepared.labels, prepared.folds, prepared.num_peers
    fits = sum(len([fold for fold in folds if fold.seed in (None, seed)]) for seed in protocol.seeds)
    episodes = sum(getattr(method, "num_episodes", 1) for method in methods)
    total = (len(tables) + protocol.with_shuffled) * episodes * fits
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


def _describe(protocol: Protocol, prepared: PreparedTask) -> dict[str, Any]:
    """The protocol, ready for JSON; no paths of this machine."""
    left_out = prepared.tables[0].left_out
    return {
        "level": prepared.level,
        "embeddings": [{"name": one.name, "width": one.features.shape[1]} for one in prepared.tables],
        "num_folds": len({fold.name for fold in prepared.folds}),
        "seeds": list(protocol.seeds),
        "num_bootstrap": protocol.num_bootstrap,
        "case_pattern": protocol.case_pattern,
        "num_sites": None if prepared.sites is None else len(set(prepared.sites)),
        "balance": describe_folds(prepared.folds, prepared.labels, prepared.sites),
        "left_out": left_out,
        "left_out_reasons": dict(Counter(item["reason"] for item in left_out)),
    }
