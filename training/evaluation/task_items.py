# SPDX-License-Identifier: Apache-2.0
"""Embeddings x labels -> the items of a task: slides or cases, each with its case, its vector and its answer.

What is left out is recorded with its reason; what contradicts itself is refused by name.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..cohort.barcodes import TCGA_CASE
from ..manifest_checks import raise_offenders
from .embedding_table import EmbeddingTable, mean_by_case
from .label_table import LabelTable, TaskLabels

logger = logging.getLogger(__name__)
LEVELS = ("slide", "case")
CASE_RULES = {"tcga": TCGA_CASE, "slide": re.compile(r"(.*)")}


def case_rule(text: str | None) -> "re.Pattern[str] | None":
    """The rule that finds a case in a slide's id.

    Args:
        text (`str`, *optional*): "tcga" (the first three parts of a barcode), "slide" (each slide is a case of its
            own), or a regular expression whose first group is the case.

    Raises:
        ValueError: if it is no regular expression with a group.
    """
    if text is None or text in CASE_RULES:
        return CASE_RULES.get(text or "")
    try:
        rule = re.compile(text)
    except re.error as error:
        raise ValueError(f"--case-pattern {text}: expected tcga, slide or a regular expression ({error}).") from error
    if rule.groups < 1:
        raise ValueError(f"--case-pattern {text}: put the case in brackets, as in '([^_]+)_.*'.")
    return rule


def make_items(
    table: EmbeddingTable,
    labels: LabelTable,
    task: TaskLabels,
    *,
    level: str | None = None,
    pattern: "re.Pattern[str] | None" = None,
) -> tuple[EmbeddingTable, TaskLabels, str]:
    """Joins embeddings and labels.

    Args:
        table (`EmbeddingTable`): of slides, or of cases where its ids are those of the label file's cases.
        labels (`LabelTable`): the label file.
        task (`TaskLabels`): from `make_tasks`, with a target per row of the file.
        level (`str`, *optional*): "slide", or "case" to average the slides of a case and ask for one answer per case.
            By default "slide" where labels are given by slide, else "case".
        pattern (`re.Pattern`, *optional*): finds the case in a slide's id, see `case_rule`.

    Returns:
        `tuple`: the items with a label, their answers, and the level. `left_out` of the table tells of all others.

    Raises:
        ValueError: if cases are unknown, embeddings and labels disagree about a case, a case has two answers at level
            "case", or no item is left.
    """
    if level not in (None, *LEVELS):
        raise ValueError(f"--level: expected slide or case, found {level!r}.")
    is_by_case = _are_cases(table, labels)
    level = level or ("slide" if labels.slide_ids and not is_by_case else "case")
    if is_by_case:
        if level == "slide":
            raise ValueError(f"{table.name}: holds embeddings of cases; use --level case.")
        table = replace(table, case_ids=list(table.ids))
    else:
        table = replace(table, case_ids=find_cases(table, labels, pattern))
    return _by_slide(table, labels, task) if level == "slide" else _by_case(table, labels, task)


def _are_cases(table: EmbeddingTable, labels: LabelTable) -> bool:
    """Whether a table's ids are cases: it says so itself, or the label file knows them as cases only."""
    if all(id_ == case_id for id_, case_id in zip(table.ids, table.case_ids, strict=True)):
        return not set(table.ids) & set(labels.slide_ids)
    return bool(set(table.ids) & set(labels.case_ids)) and not set(table.ids) & set(labels.slide_ids)


def find_cases(table: EmbeddingTable, labels: LabelTable, pattern: "re.Pattern[str] | None" = None) -> list[str]:
    """Finds the case of each slide: from the label file, the table of embeddings, or the slide's id by a rule.

    Args:
        table (`EmbeddingTable`): of slides.
        labels (`LabelTable`): the label file.
        pattern (`re.Pattern`, *optional*): see `case_rule`.

    Raises:
        ValueError: naming the slides of which the case is not known, or which have two.
    """
    told = dict(zip(labels.slide_ids, labels.case_ids, strict=True)) if labels.slide_ids and labels.case_ids else {}
    listed = set(labels.slide_ids)
    found, unknown, wrong = [], [], []
    for id_, own in zip(table.ids, table.case_ids, strict=True):
        case_id = told.get(id_) or own
        if told.get(id_) and own and own != told[id_]:
            wrong.append(f"{id_}: {own} and {told[id_]}")
        if not case_id and pattern is not None:
            match = pattern.match(id_)
            case_id = match[1] if match and match[1] else ""
        if not case_id and (not listed or id_ in listed):
            unknown.append(id_)
        found.append(case_id or id_)
    raise_offenders("The embeddings and the label file name different cases of a slide", wrong)
    raise_offenders(
        "The case of every slide must be known, for splits are made by case: add a column `case_id` to the label "
        "file, or give a rule, --case-pattern tcga for TCGA barcodes, --case-pattern slide if each slide is a case",
        unknown,
    )
    return found


def share_cases(tables: Sequence[EmbeddingTable]) -> list[EmbeddingTable]:
    """Tells each table the cases that another one knows: files of single slides name none.

    Args:
        tables (sequence of `EmbeddingTable`): of the same slides, more or less.

    Raises:
        ValueError: naming the slides of which two tables know different cases.
    """
    told: dict[str, str] = {}
    wrong = []
    for table in tables:
        for id_, case_id in zip(table.ids, table.case_ids, strict=True):
            if case_id and told.setdefault(id_, case_id) != case_id:
                wrong.append(f"{id_}: {told[id_]} and {case_id} ({table.name})")
    raise_offenders("The embeddings name different cases of a slide", wrong)
    return [replace(table, case_ids=[told.get(id_, "") for id_ in table.ids]) for table in tables]


def _by_slide(table: EmbeddingTable, labels: LabelTable, task: TaskLabels) -> tuple[EmbeddingTable, TaskLabels, str]:
    known = set(table.ids if labels.slide_ids else table.case_ids)
    if labels.slide_ids:
        row_of = {slide_id: row for row, slide_id in enumerate(labels.slide_ids)}
        rows, answers = [row_of.get(id_) for id_ in table.ids], task
        named = [id_ for id_, is_known in zip(labels.slide_ids, task.is_known, strict=True) if is_known]
    else:
        row_of, answers = _answers_of_cases(labels.case_ids, task, labels.path)
        rows, named = [row_of.get(case_id) for case_id in table.case_ids], list(row_of)
    return (*_keep(table, answers, rows, [id_ for id_ in named if id_ not in known]), "slide")


def _by_case(table: EmbeddingTable, labels: LabelTable, task: TaskLabels) -> tuple[EmbeddingTable, TaskLabels, str]:
    case_ids = labels.case_ids
    if not case_ids:
        case_of = dict(zip(table.ids, table.case_ids, strict=True))
        case_ids = [case_of.get(slide_id, "") for slide_id in labels.slide_ids]
    row_of, answers = _answers_of_cases(case_ids, task, labels.path)
    listed = set(labels.slide_ids)
    unlisted = [id_ for id_ in table.ids if id_ not in listed]
    if listed and len(unlisted) < len(table):
        # A slide that the label file does not name is no part of its case.
        notes = [_note(id_, "no_label", "the label file does not name this slide") for id_ in unlisted]
        kept = [row for row, id_ in enumerate(table.ids) if id_ in listed]
        table = replace(table.take(kept), left_out=[*table.left_out, *notes])
    table = mean_by_case(table)
    known = set(table.case_ids)
    rows = [row_of.get(case_id) for case_id in table.case_ids]
    return (*_keep(table, answers, rows, [case_id for case_id in row_of if case_id not in known]), "case")


def _answers_of_cases(case_ids: Sequence[str], task: TaskLabels, path: str) -> tuple[dict[str, int], TaskLabels]:
    """The row of each case that has an answer, and these answers, a row per case."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row in np.flatnonzero(task.is_known):
        if case_ids[row]:
            rows[case_ids[row]].append(int(row))
    wrong, answers = [], []
    for case_id, places in rows.items():
        told = task.targets[places]
        answer = told[0]
        if task.kind == "multilabel":  # what one slide leaves open another may tell
            answer = np.where(np.isnan(told).all(axis=0), np.nan, np.nan_to_num(told, nan=-1).max(axis=0))
            is_one = bool(((told == answer) | np.isnan(told)).all())
        else:
            is_one = all(one.tobytes() == answer.tobytes() for one in told)
        if not is_one:
            wrong.append(f"{case_id}: {' and '.join(sorted({_tell(task, place) for place in places}))}")
        answers.append(answer)
    raise_offenders(
        f"{path}: a case must have one answer in task {task.task}; mend the labels or use --level slide", wrong
    )
    merged = np.array(answers, dtype=task.targets.dtype).reshape(len(answers), *task.targets.shape[1:])
    return {case_id: place for place, case_id in enumerate(rows)}, replace(task, targets=merged)


def _tell(task: TaskLabels, row: int) -> str:
    value = task.targets[row]
    return task.classes[value] if task.kind == "classification" else str(value.tolist())


def _keep(
    table: EmbeddingTable, task: TaskLabels, rows: Sequence[int | None], missing: Sequence[str]
) -> tuple[EmbeddingTable, TaskLabels]:
    """The items with a label, in the order of their ids, so that the order of files does not matter."""
    kept = [place for place, row in enumerate(rows) if row is not None and task.is_known[row]]
    if not kept:
        raise ValueError(
            f"{table.name}: no embedding has a label of task {task.task}. The embeddings are of {table.ids[0]} and "
            f"{len(table) - 1} more; compare with the ids of the label file."
        )
    kept.sort(key=lambda place: table.ids[place])
    refused = {item["id"] for item in table.left_out}
    unlabelled = sorted(set(range(len(table))) - set(kept))
    notes = [_note(table.ids[place], "no_label", "has no label in this task") for place in unlabelled]
    notes += [_note(id_, "no_embedding", "has a label, but no embedding") for id_ in missing if id_ not in refused]
    items = replace(table.take(kept), left_out=[*table.left_out, *notes])
    for reason in sorted({item["reason"] for item in items.left_out}):
        of_reason = [item["id"] for item in items.left_out if item["reason"] == reason]
        logger.info("Task %s: %d left out (%s), such as %s", task.task, len(of_reason), reason, of_reason[0])
    return items, task.take([rows[place] for place in kept])


def _note(id_: str, reason: str, message: str) -> dict[str, str]:
    return {"id": id_, "reason": reason, "message": message}
