# SPDX-License-Identifier: Apache-2.0
"""Reads folds from files, as they are published.

| origin | file |
| --- | --- |
| CLAM | `splits_<k>.csv`, a fold each: columns train, val, test of slide ids; `splits_<k>_bool.csv`: a row per slide |
| Patho-Bench | `k=all.tsv`: a row per slide, columns `fold_0` ... hold train, val or test |
| TITAN | `<task>_train.csv`, `<task>_val.csv`, `<task>_test.csv`: a fold; rows are slides |
| ours | a row per slide or case, column `split`: a fold; or columns `fold_0` ... as above |
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..manifest import ALIASES
from ..manifest_checks import SPLIT_ALIASES, raise_offenders
from ..manifest_table import MISSING, read_table, text_column
from .case_folds import Fold, check_folds
from .embedding_table import EmbeddingTable, slide_name

PARTS = ("train", "val", "test")
_CLAM_FILE = re.compile(r"splits_(\d+)\.csv")
_FOLD_COLUMN = re.compile(r"fold_(\d+)")
_PART_FILE = re.compile(r"(.*)_(train|val|test)\.(csv|tsv|parquet)")
_TRUE = {"true", "1", "1.0"}


@dataclass(frozen=True)
class FoldIds:
    """A fold as a file tells it.

    Args:
        name (`str`): of the fold.
        origin (`str`): whose format it is.
        parts (`dict`): "train", "val", "test" -> ids of slides or cases.
    """

    name: str
    origin: str
    parts: dict[str, list[str]]


def read_fold_files(paths: Sequence[str | Path]) -> list[FoldIds]:
    """Reads folds.

    Args:
        paths (sequence of `str` or `Path`): files, see above, or a folder with CLAM's `splits_<k>.csv`.

    Returns:
        `list` of `FoldIds`: in the order of the files and their columns.

    Raises:
        ValueError: if a file is of none of these formats, or a fold has no training or no test part.
    """
    files = [file for path in paths for file in _files_of(Path(path))]
    shared: dict[str, dict[str, Path]] = defaultdict(dict)
    folds = []
    for file in files:
        match = _PART_FILE.fullmatch(file.name)
        table = read_table(file)
        found = _folds_of_table(file, table)
        if not found and match is not None:
            shared[str(file.with_name(match[1]))][match[2]] = file
            continue
        if not found:
            raise ValueError(
                f"{file}: has columns {list(table)[:20]}; expected train, val, test (CLAM), fold_0 ... (Patho-Bench), "
                "or split; or a file that ends in _train, _val or _test."
            )
        folds += found
    for stem, part_files in shared.items():
        parts = {part: _ids(read_table(file), file) for part, file in part_files.items()}
        folds.append(FoldIds(Path(stem).name, "TITAN", parts))
    wrong = [f"fold {fold.name} ({part})" for fold in folds for part in ("train", "test") if not fold.parts.get(part)]
    raise_offenders("Every fold needs a training and a test part", wrong)
    return folds


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = {int(match[1]): file for file in path.iterdir() if (match := _CLAM_FILE.fullmatch(file.name))}
    if not found:
        raise ValueError(f"{path}: holds no splits_0.csv, splits_1.csv ...; give the files themselves.")
    return [found[number] for number in sorted(found)]


def _folds_of_table(file: Path, table: dict[str, list[Any]]) -> list[FoldIds]:
    numbered = sorted((int(match[1]), name) for name in table if (match := _FOLD_COLUMN.fullmatch(name)))
    if numbered:
        ids = _ids(table, file)
        return [FoldIds(str(number), "Patho-Bench", _parts(ids, table[name], file, name)) for number, name in numbered]
    if "train" in table and "test" in table:
        return [_clam_fold(file, table)]
    if "split" in table:
        return [FoldIds("0", "split column", _parts(_ids(table, file), table["split"], file, "split"))]
    return []


def _clam_fold(file: Path, table: dict[str, list[Any]]) -> FoldIds:
    columns = {part: text_column(part, table[part]) for part in PARTS if part in table}
    name = file.stem.removeprefix("splits_").removesuffix("_bool")
    cells = {cell.casefold() for column in columns.values() for cell in column}
    if not cells <= {"true", "false", "0", "1", "0.0", "1.0"}:
        parts = {
            part: [slide_name(cell) for cell in column if cell.casefold() not in MISSING]
            for part, column in columns.items()
        }
        return FoldIds(name, "CLAM", parts)
    key = next((key for key in table if key in ("", "Unnamed: 0", *ALIASES["slide_id"], *ALIASES["case_id"])), None)
    if key is None:
        raise ValueError(f"{file}: holds True and False, but no column of ids (the first, without a name).")
    ids = [slide_name(text) for text in text_column(key, table[key])]
    chosen = {
        part: [id_ for id_, cell in zip(ids, column, strict=True) if cell.casefold() in _TRUE]
        for part, column in columns.items()
    }
    return FoldIds(name, "CLAM", chosen)


def _ids(table: dict[str, list[Any]], file: Path) -> list[str]:
    key = next((name for kind in ("slide_id", "case_id") for name in table if name in ALIASES[kind]), None)
    if key is None:
        raise ValueError(f"{file}: has columns {list(table)[:20]}; expected `slide_id` or `case_id` among them.")
    return [slide_name(text) for text in text_column(key, table[key])]


def _parts(ids: Sequence[str], cells: Sequence[Any], file: Path, column: str) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    wrong = []
    for row, (id_, cell) in enumerate(zip(ids, text_column(column, cells), strict=True), 1):
        part = SPLIT_ALIASES.get(cell.casefold(), cell.casefold())
        if part in parts:
            parts[part].append(id_)
        elif part not in MISSING:
            wrong.append(f"row {row}: {cell!r}")
    raise_offenders(f"{file}: column `{column}` must hold train, val, test or nothing", wrong)
    return parts


def match_folds(
    found: Sequence[FoldIds], table: EmbeddingTable, case_of: dict[str, str] | None = None
) -> tuple[list[Fold], dict[str, Any]]:
    """Finds the items of folds by their ids.

    Args:
        found (sequence of `FoldIds`): from `read_fold_files`.
        table (`EmbeddingTable`): the items.
        case_of (`dict`, *optional*): slide -> case, for items that are cases where files name slides.

    Returns:
        `tuple`: the folds, and a report ready for JSON: `origin`, how many ids of the files are no items, with some of
        them, and how many items are in no fold.

    Raises:
        ValueError: if a case is in two parts of a fold, or no item is in a training or test part.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    known = set(table.ids)
    told = {id_ for fold in found for ids in fold.parts.values() for id_ in ids}
    by_slide = bool(told & known)
    for row, (id_, case_id) in enumerate(zip(table.ids, table.case_ids, strict=True)):
        rows[id_ if by_slide else case_id].append(row)
    if not by_slide and case_of:
        for slide_id, case_id in case_of.items():
            if slide_id not in rows and case_id in rows:
                rows[slide_id] = rows[case_id]
    folds = []
    for fold in found:
        parts = {
            part: np.unique([row for id_ in ids for row in rows.get(id_, [])]).astype(np.int64)
            for part, ids in fold.parts.items()
        }
        empty = np.zeros(0, dtype=np.int64)
        folds.append(Fold(fold.name, parts["train"], parts["test"], parts.get("val", empty)))
    wrong = [f"fold {fold.name}" for fold in folds if not len(fold.train) or not len(fold.test)]
    raise_offenders("No item of the training or the test part has an embedding and a label; compare the ids", wrong)
    check_folds(folds, table.case_ids)
    unknown = sorted(told - set(rows))
    used = np.unique(np.concatenate([part for fold in folds for part in (fold.train, fold.validation, fold.test)]))
    report = {
        "origin": found[0].origin,
        "ids_without_item": len(unknown),
        "such_as": unknown[:10],
        "items_in_no_fold": len(table) - len(used),
    }
    return folds, report
