# SPDX-License-Identifier: Apache-2.0
"""Labels of slides or cases, from a CSV, TSV or Parquet file, and what kind of task a column is.

Letters: m rows of the file, C classes, L labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..manifest import ALIASES
from ..manifest_checks import raise_offenders
from ..manifest_table import Label, label_column, read_table, text_column
from .embedding_table import slide_name

MOST_GUESSED_CLASSES = 20
SURVIVAL_TARGET = np.dtype([("event", bool), ("time", float)])  # as scikit-survival takes it
# False and True are 0 and 1 as keys.
_YES_OR_NO: dict[Any, float] = {0: 0.0, 1: 1.0, "0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}
_EVENTS = {**_YES_OR_NO, "dead": 1.0, "deceased": 1.0, "1:deceased": 1.0, "alive": 0.0, "living": 0.0, "0:living": 0.0}


@dataclass(frozen=True)
class LabelTable:
    """The rows of a label file.

    Args:
        path (`str`): the file, for messages.
        slide_ids (`list` of `str`), case_ids (`list` of `str`): of the m rows; empty if the file has no such column.
        columns (`dict`): column -> its m values.
    """

    path: str
    slide_ids: list[str]
    case_ids: list[str]
    columns: dict[str, list[Label]]


@dataclass(frozen=True, eq=False)
class TaskLabels:
    """The right answers of one task.

    Args:
        task (`str`): its name in results: the label column, or all of them.
        kind (`str`): "classification", "multilabel", "regression" or "survival".
        targets (`np.ndarray`): of m rows or n items: int64 `(n,)`, -1 where missing; float64 `(n, L)` of 0 and 1, or
            float64 `(n,)`, NaN where missing; or of `SURVIVAL_TARGET` `(n,)`, with a time of NaN where missing.
        classes (`list` of `str`): names of the C classes or L labels; else empty.
        is_ordered (`bool`): whether classes are whole numbers, such as grades.
    """

    task: str
    kind: str
    targets: np.ndarray
    classes: list[str]
    is_ordered: bool = False

    @property
    def is_known(self) -> np.ndarray:
        """Which items have a label, bool `(n,)`; in a task of several labels, any."""
        if self.kind == "classification":
            return self.targets >= 0
        if self.kind == "survival":
            return ~np.isnan(self.targets["time"])
        return ~np.isnan(self.targets) if self.targets.ndim == 1 else ~np.isnan(self.targets).all(axis=1)

    def take(self, rows: Sequence[int] | np.ndarray) -> "TaskLabels":
        """Returns the labels of some rows, in their order."""
        return replace(self, targets=self.targets[np.asarray(rows, dtype=np.int64)])


def read_labels(path: str | Path) -> LabelTable:
    """Reads a label file: columns `slide_id` and/or `case_id`, or their other names (see the guide), and labels.

    Args:
        path (`str` or `Path`): a .csv, .tsv or .parquet file.

    Raises:
        ValueError: if it has neither ids of slides nor of cases, two columns mean the same, or a slide occurs twice.
    """
    table = read_table(Path(path))
    keys = {}
    for key in ("slide_id", "case_id"):
        found = [name for name in table if name in ALIASES[key]]
        raise_offenders(f"{path}: keep one column of `{key}`", found if len(found) > 1 else [])
        keys[key] = found[0] if found else None
    if not any(keys.values()):
        accepted = ", ".join(name for key in keys for name in ALIASES[key])
        raise ValueError(f"{path}: has columns {list(table)[:20]}; expected one of {accepted}.")
    ids = {key: text_column(name, table[name]) if name else [] for key, name in keys.items()}
    slide_ids = [slide_name(text) for text in ids["slide_id"]]
    raise_offenders(
        f"{path}: every row needs a `{keys['slide_id'] or keys['case_id']}`",
        [f"row {i}" for i, text in enumerate(slide_ids or ids["case_id"], 1) if not text],
    )
    seen: dict[str, int] = {}
    for text in slide_ids:
        seen[text] = seen.get(text, 0) + 1
    raise_offenders(f"{path}: a slide may occur once", [text for text, count in seen.items() if count > 1])
    used = set(keys.values()) | set(ALIASES["path"]) | set(ALIASES["report"])
    columns = {name: values for name, values in table.items() if name and name not in used}
    return LabelTable(str(path), slide_ids, ids["case_id"], {n: _labels(n, values) for n, values in columns.items()})


def _labels(name: str, values: Sequence[Any]) -> list[Label]:
    """A column of labels; one of something else, such as vectors, counts as empty."""
    try:
        return label_column(name, values)
    except ValueError:
        return [None] * len(values)


def make_tasks(
    labels: LabelTable,
    columns: Sequence[str],
    *,
    kind: str | None = None,
    time: str | None = None,
    event: str | None = None,
    name: str | None = None,
) -> list[TaskLabels]:
    """Makes tasks of columns.

    Without `kind`: `time` and `event` make a survival task; several columns of 0 and 1 make one multi-label task, and
    other columns a task each; text, flags and up to 20 whole numbers are classes, other numbers are predicted as such.

    Args:
        labels (`LabelTable`): the file.
        columns (sequence of `str`): label columns; for survival none, or the name of the task.
        kind (`str`, *optional*): "classification", "multilabel", "regression" or "survival".
        time (`str`, *optional*), event (`str`, *optional*): columns of a survival task.
        name (`str`, *optional*): of a survival or multi-label task.

    Returns:
        `list` of `TaskLabels`: with a target for each of the m rows of the file.

    Raises:
        ValueError: if a column is not there, values do not fit the kind, or there are fewer than two classes.
    """
    is_survival = kind == "survival" or bool(time or event)
    for column in [text for text in (time, event) if text] if is_survival else columns:
        if column not in labels.columns:
            raise ValueError(f"{labels.path}: has no column `{column}`; it has {', '.join(labels.columns)}.")
    if is_survival:
        if kind not in (None, "survival") or not (time and event):
            raise ValueError("A survival task needs --time and --event, the columns of both, and no other kind.")
        return [_survival(labels, time, event, name or (columns[0] if columns else f"survival ({time})"))]
    if not columns:
        raise ValueError("Name a label column (--task), or for survival --time and --event.")
    values = {column: labels.columns[column] for column in columns}
    are_flags = all(_are_flags(cells) for cells in values.values())
    if kind == "multilabel" or (kind is None and len(columns) > 1 and are_flags):
        return [_multilabel(labels.path, values, name)]
    made = []
    for column, cells in values.items():
        guessed = kind or _guess(cells)
        build = {"classification": _classification, "regression": _regression}.get(guessed)
        if build is None:
            raise ValueError(f"kind: expected classification, multilabel, regression or survival, found {kind!r}.")
        made.append(build(labels.path, column, cells))
    return made


def _are_flags(cells: Sequence[Label]) -> bool:
    return all(_flag(cell) is not None for cell in cells if cell is not None)


def _flag(cell: Label, words: dict[Any, float] = _YES_OR_NO) -> float | None:
    return words.get(cell.strip().casefold() if isinstance(cell, str) else cell)


def _guess(cells: Sequence[Label]) -> str:
    present = {cell for cell in cells if cell is not None}
    if any(isinstance(cell, float) and not cell.is_integer() for cell in present):
        return "regression"
    is_number = all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in present)
    return "regression" if is_number and len(present) > MOST_GUESSED_CLASSES else "classification"


def _classification(path: str, column: str, cells: Sequence[Label]) -> TaskLabels:
    # A whole column of numbers with gaps comes as floats from some tools.
    plain = [int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in cells]
    present = {cell for cell in plain if cell is not None}
    if len(present) < 2:
        raise ValueError(
            f"{path}: column `{column}` holds {sorted(map(str, present))}; two classes or more are needed."
        )
    is_ordered = all(isinstance(cell, int) and not isinstance(cell, bool) for cell in present)
    ordered = sorted(present) if is_ordered else sorted(present, key=str)
    place = {cell: index for index, cell in enumerate(ordered)}
    targets = np.array([-1 if cell is None else place[cell] for cell in plain], dtype=np.int64)
    return TaskLabels(
        column, "classification", targets, [str(cell) for cell in ordered], is_ordered and len(ordered) > 2
    )


def _regression(path: str, column: str, cells: Sequence[Label]) -> TaskLabels:
    wrong = [f"row {i}: {cell!r}" for i, cell in enumerate(cells, 1) if isinstance(cell, str)]
    raise_offenders(f"{path}: column `{column}` must hold numbers", wrong)
    targets = np.array([math.nan if cell is None else float(cell) for cell in cells])
    if len(set(targets[~np.isnan(targets)])) < 2:
        raise ValueError(f"{path}: column `{column}` holds fewer than two different numbers.")
    return TaskLabels(column, "regression", targets, [])


def _multilabel(path: str, values: dict[str, Sequence[Label]], name: str | None) -> TaskLabels:
    for column, cells in values.items():
        wrong = [f"row {i}: {cell!r}" for i, cell in enumerate(cells, 1) if cell is not None and _flag(cell) is None]
        raise_offenders(f"{path}: column `{column}` of a multi-label task must hold 0, 1 or nothing", wrong)
    table = [[math.nan if cell is None else _flag(cell) for cell in cells] for cells in values.values()]
    return TaskLabels(name or ", ".join(values), "multilabel", np.array(table, dtype=np.float64).T, list(values))


def _survival(labels: LabelTable, time: str, event: str, name: str) -> TaskLabels:
    times, events = labels.columns[time], labels.columns[event]
    wrong = [f"row {i}: {cell!r}" for i, cell in enumerate(times, 1) if isinstance(cell, str) or (cell or 0) < 0]
    raise_offenders(f"{labels.path}: column `{time}` must hold times, numbers from 0 on", wrong)
    seen = [None if cell is None else _flag(cell, _EVENTS) for cell in events]
    wrong = [f"row {i}: {cell!r}" for i, cell in enumerate(events, 1) if cell is not None and seen[i - 1] is None]
    raise_offenders(f"{labels.path}: column `{event}` must hold 1 where the event was seen, else 0", wrong)
    targets = np.zeros(len(times), dtype=SURVIVAL_TARGET)
    is_missing = np.array([t is None or e is None for t, e in zip(times, seen, strict=True)])
    targets["time"] = [math.nan if missing else float(t) for t, missing in zip(times, is_missing, strict=True)]
    targets["event"] = [not missing and e == 1.0 for e, missing in zip(seen, is_missing, strict=True)]
    if not targets["event"].any():
        raise ValueError(f"{labels.path}: column `{event}` holds no event at all.")
    return TaskLabels(name, "survival", targets, [])
