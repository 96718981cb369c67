# SPDX-License-Identifier: Apache-2.0
"""Columns of Arrow tables, made of the buffers that Arrow's format asks for, and read from them.

pyarrow's own conversions from and to lists and NumPy load pandas, which takes half a second of a process that writes
a table.
Source: Arrow Columnar Format (validity bitmaps, variable-size binary layout).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

_NUMPY_TYPES = {"bool": np.bool_, "int32": np.int32, "int64": np.int64, "double": np.float64}


@dataclass(frozen=True)
class ByteStrings:
    """Byte strings that lie one behind the other in memory, as Arrow wants them.

    Args:
        content (`np.ndarray` of shape `(b,)`, uint8): the bytes.
        offsets (`np.ndarray` of shape `(n + 1,)`, int32): string i is `content[offsets[i]:offsets[i + 1]]`.
    """

    content: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of each string, int32 (n,)."""
        return np.diff(self.offsets)

    def to_list(self) -> list[memoryview]:
        """The strings one by one, valid as long as the memory is."""
        content, places = memoryview(self.content), self.offsets.tolist()
        return [content[start:stop] for start, stop in itertools.pairwise(places)]


def join_strings(values: Sequence[bytes | memoryview]) -> ByteStrings:
    """Puts byte strings, together below 2 GiB, one behind the other."""
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    return ByteStrings(np.frombuffer(b"".join(values), dtype=np.uint8), offsets)


def number_column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Makes a column of numbers (n,) of this type."""
    numbers = np.ascontiguousarray(values, dtype=_NUMPY_TYPES[str(kind)])
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def binary_column(strings: ByteStrings, kind: pa.DataType, is_missing: np.ndarray | None = None) -> pa.Array:
    """Makes a column of byte strings or, if they are UTF-8, of texts, without copying them.

    Args:
        strings (`ByteStrings`): the values; an empty one for each missing.
        kind (`pa.DataType`): `pa.binary()` or `pa.string()`.
        is_missing (`np.ndarray` of shape `(n,)`, bool, *optional*): which values are missing.
    """
    buffers = [_validity(is_missing), pa.py_buffer(strings.offsets), pa.py_buffer(strings.content)]
    return pa.Array.from_buffers(kind, len(strings), buffers)


def value_column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Makes a column of truth values, numbers or texts, of which some are `None`.

    Args:
        values (`Sequence`): the values.
        kind (`pa.DataType`): bool, int32, int64, double or string.

    Raises:
        TypeError, ValueError: if a value is not of that type.
    """
    is_missing = np.array([value is None for value in values], dtype=bool)
    if pa.types.is_string(kind):
        return binary_column(join_strings([(value or "").encode() for value in values]), kind, is_missing)
    known = np.array([0 if value is None else value for value in values], dtype=_NUMPY_TYPES[str(kind)])
    content = np.packbits(known, bitorder="little") if pa.types.is_boolean(kind) else known
    return pa.Array.from_buffers(kind, len(known), [_validity(is_missing), pa.py_buffer(content)])


def read_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Reads a column of int32 without missing values; int32 (n,)."""
    parts = [np.empty(0, dtype=np.int32)]
    for chunk in column.chunks:
        numbers = np.frombuffer(chunk.buffers()[1], dtype=np.int32)
        parts.append(numbers[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)


def _validity(is_missing: np.ndarray | None) -> pa.Buffer | None:
    """The bitmap of the values that are there; `None` if all are."""
    if is_missing is None or not is_missing.any():
        return None
    return pa.py_buffer(np.packbits(~is_missing, bitorder="little"))
