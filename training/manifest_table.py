# SPDX-License-Identifier: Apache-2.0
"""Reads tables from CSV, TSV, Parquet or a `datasets.Dataset` into columns, and types their cells.

Ids, paths and reports stay text (leading zeros matter); label columns become numbers where all cells are numbers.
"""

import csv
import datetime as dt
import decimal
import math
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .manifest_checks import raise_offenders

if TYPE_CHECKING:
    import datasets

Label = str | int | float | bool | None

# How spreadsheets and statistics programs write a missing value.
MISSING = frozenset({"", "na", "n/a", "nan", "null", "#n/a"})
# A leading zero marks a code such as "007", not a number.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
MAX_FIELD_CHARS = 16 << 20
_MAX_TABLE_BYTES = 2 << 30
_MAX_CELLS = 20_000_000
_MAX_HEADER_CHARS = 1 << 20


def read_table(path: Path) -> dict[str, list[Any]]:
    """Reads a `.csv`, `.tsv` or `.parquet` file into columns; cells of text files are strings.

    Raises:
        ValueError: if the file is of another type, is no UTF-8 table, is empty, or has rows of different lengths.
    """
    suffix = path.suffix.lower()
    if suffix not in {".csv", ".tsv", ".parquet"}:
        raise ValueError(f"{path}: expected a folder of slides or a .csv, .tsv or .parquet table.")
    _check_file(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    lines = _read_lines(path, "\t" if suffix == ".tsv" else _delimiter(path))
    header = [name.strip() for name in lines[0]]
    raise_offenders(f"{path}: columns must differ", [repr(name) for name, n in Counter(header).items() if n > 1])
    wrong = [f"row {i}: {len(line)} fields" for i, line in enumerate(lines[1:], 1) if len(line) != len(header)]
    raise_offenders(f"{path}: expected {len(header)} fields in every row (quote text that holds commas)", wrong)
    return {name: [line[i] for line in lines[1:]] for i, name in enumerate(header)}


def _check_file(path: Path) -> None:
    """Refuses what would be read for ever (a device, a pipe) or could not be held in memory."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: expected a regular file.")
    _check_size(path, status.st_size)


def _check_size(path: Path, num_bytes: int) -> None:
    if num_bytes > _MAX_TABLE_BYTES:
        raise ValueError(f"{path}: {num_bytes} bytes are too much for a list of slides; at most {_MAX_TABLE_BYTES}.")


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    """Reads a Parquet file, in which a few bytes may stand for gigabytes: sizes are added up before they are made."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            num_values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
            if num_values > _MAX_CELLS:
                raise ValueError(
                    f"{path}: {num_values} cells are too many for a list of slides; at most {_MAX_CELLS}."
                )
            _check_size(path, sum(group.total_byte_size for group in groups))
            names = file.schema_arrow.names
        table = pq.read_table(path, read_dictionary=names)  # which concerns texts only
        text_bytes = 0
        for chunk in (chunk for column in table.columns for chunk in column.chunks):
            if pa.types.is_dictionary(chunk.type):
                lengths = pc.take(pc.binary_length(chunk.dictionary), chunk.indices)
                text_bytes += pc.sum(pc.cast(lengths, pa.int64())).as_py() or 0
        _check_size(path, text_bytes)
        return table.to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a Parquet file, but it could not be read ({error}).") from error


def _read_lines(path: Path, delimiter: str) -> list[list[str]]:
    previous_limit = csv.field_size_limit(MAX_FIELD_CHARS)  # a report may be longer than csv's 128 kB
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            lines = list(csv.reader(bounded_lines(handle), delimiter=delimiter, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a UTF-8 table with quoted text fields ({error}).") from error
    finally:
        csv.field_size_limit(previous_limit)
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    if len(lines) < 2:
        raise ValueError(f"{path}: the table is empty; expected a header with at least `path`, and one row per slide.")
    return lines


def bounded_lines(handle: TextIO) -> Iterator[str]:
    """Yields lines; one without end is given up before it fills the memory."""
    while line := handle.readline(MAX_FIELD_CHARS + 1):
        if len(line) > MAX_FIELD_CHARS:
            raise csv.Error(f"a line of more than {MAX_FIELD_CHARS} characters")
        yield line


def _delimiter(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as handle:
        header = handle.readline(_MAX_HEADER_CHARS)
    return ";" if ";" in header and "," not in header else ","  # spreadsheets of some locales write semicolons


def table_of_dataset(dataset: "datasets.Dataset") -> dict[str, list[Any]]:
    """Returns a dataset's columns, class labels by their names."""
    table = dataset.with_format(None).to_dict()
    for name, feature in dataset.features.items():
        if hasattr(feature, "int2str"):
            table[name] = [None if value is None or value < 0 else feature.int2str(value) for value in table[name]]
    return table


def text_column(name: str, values: Sequence[Any]) -> list[str]:
    """Returns a column of ids, paths, numbers or reports as text, "" where a cell is missing.

    Raises:
        ValueError: if a cell is neither text nor a number, naming its row.
    """
    return [_text(value, f"Manifest column `{name}`, row {i}") for i, value in enumerate(values, 1)]


def _text(value: Any, place: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{place}: expected text, found {type(value).__name__}.")


def label_column(name: str, values: Sequence[Any]) -> list[Label]:
    """Returns a label column of one type: integers, floats, booleans or strings; missing values are `None`.

    Text cells become numbers only if every cell that is not missing is one. `NA`, `N/A`, `NaN`, `null` and empty
    cells are missing.

    Raises:
        ValueError: if the column holds anything but text and numbers (lists, bytes), naming the column.
    """
    cells = [_plain(value, name) for value in values]
    present = [cell for cell in cells if cell is not None]
    kind = _common_type(present)
    return [None if cell is None else kind(cell) for cell in cells]


def _common_type(present: Sequence[Any]) -> type:
    types = {type(cell) for cell in present}
    if types == {str}:
        if all(_INTEGER.fullmatch(cell) for cell in present):
            return int
        is_number = all(_NUMBER.fullmatch(cell) and math.isfinite(float(cell)) for cell in present)
        return float if is_number else str
    if types == {int, float}:
        return float
    return types.pop() if len(types) == 1 else str


def _plain(value: Any, name: str) -> Label:
    if isinstance(value, str):
        text = value.strip()
        return None if text.casefold() in MISSING else text
    if isinstance(value, (float, decimal.Decimal)):
        number = float(value)
        if math.isinf(number):
            raise ValueError(f"Manifest column `{name}`: found an infinite number; leave the cell empty if unknown.")
        return None if math.isnan(number) else number
    if isinstance(value, (dt.date, dt.datetime)):
        return value.isoformat()
    if value is None or isinstance(value, (bool, int)):
        return value
    raise ValueError(f"Manifest column `{name}`: labels are text or numbers, found {type(value).__name__}.")
