# SPDX-License-Identifier: Apache-2.0
"""Reads rows of the text tables that archives publish, as they are: commas or tabs, comments, packed or not.

The header tells the delimiter, lines before it that begin with # are comments (MAF, cBioPortal), `.gz` is unpacked.
Rows come one by one: a MAF has hundreds of thousands, of which a few columns matter.
"""

import csv
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ..manifest_table import MAX_FIELD_CHARS, bounded_lines

# How GDC, cBioPortal, TCGA-CDR and spreadsheets write that a value is not known.
_MISSING = frozenset({"", "'--", "--", "na", "n/a", "#n/a", "nan", "null", "not reported", "not available"})
_MISSING |= {"unknown", "[not available]", "[not applicable]", "[unknown]", "[not evaluated]", "[discrepancy]"}


def is_missing(cell: str) -> bool:
    """Whether a cell says that its value is not known."""
    return cell.strip().casefold() in _MISSING


def read_columns(path: Path) -> list[str]:
    """The column names of a table, in order."""
    with _open_text(path) as handle:
        return _read_header(path, handle)[0]


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of a table as column -> cell.

    Raises:
        ValueError: if the file is no UTF-8 text table, has a column twice, or a row with more fields than columns.
        FileNotFoundError: if it is not there.
    """
    limit = csv.field_size_limit(MAX_FIELD_CHARS)
    number = 0
    try:
        with _open_text(path) as handle:
            columns, delimiter = _read_header(path, handle)
            # In tab-separated files a quotation mark is a character like any other.
            quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
            for number, cells in enumerate(csv.reader(bounded_lines(handle), delimiter=delimiter, quoting=quoting), 1):
                if len(cells) > len(columns):
                    raise ValueError(f"{path}, row {number}: {len(cells)} fields, but the header has {len(columns)}.")
                if any(cells):
                    # Programs leave empty fields at the end of a row out.
                    yield dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=True))
    except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}, after row {number}: expected a UTF-8 text table ({error}).") from error
    finally:
        csv.field_size_limit(limit)


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as handle:
        yield handle


def _read_header(path: Path, handle: TextIO) -> tuple[list[str], str]:
    line = "#"
    while line.startswith("#"):
        line = handle.readline(MAX_FIELD_CHARS)
    delimiter = "\t" if "\t" in line else ";" if ";" in line and "," not in line else ","
    columns = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    if len(columns) < 2:
        raise ValueError(f"{path}: expected a table with a line of column names, found {line[:80]!r}.")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: columns must differ, found twice: {', '.join(twice)}.")
    return columns, delimiter
