# SPDX-License-Identifier: Apache-2.0
"""Checks a gathered slide dataset before it goes to the Hub: whole shards, no case in two splits, no local paths.

Nothing is believed that the tables themselves can tell: a folder may have been changed by hand since it was built.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .check_export import Finding, check_text

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_MEND = "run `dre-slcl tiles` again"
_NEEDED_COLUMNS = ("slide_id", "case_id", "split", "path", "reason", "num_tiles")
_LOCAL = re.compile(r"(?:^|\s)(?:/|~/|[A-Za-z]:[\\/]|\\\\)")
_PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?://)([^)\s]+)\)")
_MAX_NAMED = 5


def check_dataset(folder: str | Path) -> list[Finding]:
    """Checks a folder that holds what is to be published, and nothing else.

    Args:
        folder (`str` or `Path`): written by `gather_dataset`.

    Returns:
        `list[Finding]`: everything that must be mended; empty if the folder may go out.
    """
    folder = Path(folder)
    needed = ("README.md", "slides/*.parquet")
    findings = [Finding(name, f"is missing; {_MEND}") for name in needed if not list(folder.glob(name))]
    for path in sorted(path for suffix in ("*.md", "*.json") for path in folder.glob(suffix)):
        text = path.read_text(encoding="utf-8")
        findings += check_text(path, path.name, text)
        if path.name == "README.md":
            pictures = sorted(name for name in set(_PICTURE.findall(text)) if not (folder / name).is_file())
            findings += [Finding(path.name, f"shows {name}, which is not there; {_MEND}") for name in pictures]
    torn, slides = _read_slides(folder)
    findings += torn
    for name, table in slides.items():
        findings += _check_paths(name, table)
    findings += _check_splits(slides)
    return findings + _check_tiles(folder, slides)


def _read_slides(folder: Path) -> tuple[list[Finding], dict[str, "pa.Table"]]:
    """Reads the `slides` tables that are whole and have the columns that the checks need."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    findings, tables = [], {}
    for path in sorted(folder.glob("slides/*.parquet")):
        name = f"slides/{path.name}"
        try:
            missing = sorted(set(_NEEDED_COLUMNS) - set(pq.read_schema(path).names))
            if missing:
                findings.append(Finding(name, f"lacks the columns {', '.join(missing)}; {_MEND}"))
            else:
                tables[name] = pq.read_table(path, columns=list(_NEEDED_COLUMNS))
        except (pa.ArrowInvalid, OSError) as error:
            findings.append(Finding(name, f"cannot be read ({_first_line(error)}); {_MEND}"))
    return findings, tables


def _check_paths(name: str, table: "pa.Table") -> list[Finding]:
    """Finds folders of this machine in the columns that could hold some."""
    findings = []
    for column in ("path", "reason"):
        local = [value for value in table.column(column).to_pylist() if value and _LOCAL.search(value)]
        if local:
            message = (
                f"column `{column}` holds {len(local)} paths of this machine; build the dataset again with the slides "
                "below --slides-root, so that paths are relative to it"
            )
            findings.append(Finding(name, message))
    return findings


def _check_splits(slides: dict[str, "pa.Table"]) -> list[Finding]:
    """Finds cases that are in two splits, and slides whose split is not that of their file."""
    findings = []
    splits_of: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for name, table in slides.items():
        split_of_file = _split_of(name)
        rows = [table.column(column).to_pylist() for column in ("slide_id", "case_id", "split")]
        for slide_id, case_id, split in zip(*rows, strict=True):
            counts[slide_id] += 1
            splits_of.setdefault(case_id, set()).update((split, split_of_file))
        strangers = [slide_id for slide_id, _, split in zip(*rows, strict=True) if split != split_of_file]
        if strangers:
            findings.append(Finding(name, f"holds slides of other splits ({_some(strangers)}); {_MEND}"))
    leaking = sorted(str(case_id) for case_id, splits in splits_of.items() if len(splits) > 1)
    if leaking:
        message = (
            f"{len(leaking)} cases are in two splits ({_some(leaking)}), so that scores on one would be learned from "
            "the other; give all slides of a case one split, and build the dataset again"
        )
        findings.append(Finding("slides", message))
    twice = sorted(slide_id for slide_id, count in counts.items() if count > 1)
    return findings + ([Finding("slides", f"holds slides twice ({_some(twice)}); {_MEND}")] if twice else [])


def _check_tiles(folder: Path, slides: dict[str, "pa.Table"]) -> list[Finding]:
    """Compares the tiles of every slide with its row in `slides`, by what the shards' ends say."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    findings: list[Finding] = []
    found: Counter[tuple[str, str]] = Counter()  # (split, slide)
    shards = sorted(folder.glob("tiles/*.parquet"))
    for path in shards:
        try:
            with pq.ParquetFile(path) as shard:
                for index in range(shard.num_row_groups):
                    group = shard.metadata.row_group(index)
                    found[_split_of(path.name), _slide_of(group)] += group.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            findings.append(Finding(f"tiles/{path.name}", f"cannot be read ({_first_line(error)}); {_MEND}"))
    if findings or not shards:
        return findings
    for name, table in slides.items():
        split = _split_of(name)
        wanted = dict(zip(*(table.column(column).to_pylist() for column in ("slide_id", "num_tiles")), strict=True))
        there = {slide_id: count for (of_split, slide_id), count in found.items() if of_split == split}
        wrong = sorted(slide for slide in {*wanted, *there} if there.get(slide, 0) != (wanted.get(slide) or 0))
        if wrong:
            message = f"the tiles of {len(wrong)} slides of split '{split}' are not those of `slides` ({_some(wrong)})"
            findings.append(Finding("tiles", f"{message}; {_MEND}"))
    return findings


def _slide_of(group: "pq.RowGroupMetaData") -> str:
    """The slide of a row group by its statistics; "two slides" where it is not one."""
    for index in range(group.num_columns):
        column = group.column(index)
        statistics = column.statistics
        if column.path_in_schema == "slide_id" and statistics is not None and statistics.min == statistics.max:
            return str(statistics.min)
    return "two slides in one row group"


def _split_of(name: str) -> str:
    return Path(name).name.split("-")[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
