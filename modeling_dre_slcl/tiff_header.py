# SPDX-License-Identifier: Apache-2.0
"""Looks at the directories of a TIFF file before a library does.

A few bytes of a hostile or half-copied TIFF can make a reader allocate gigabytes or search for minutes, and a slide
that was cut off while being copied often opens well and only fails hours later. Here only directories and block
tables are read, never pixels. What is not a TIFF, or is fine, passes.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

_MAX_SIDE_PX = 1 << 20
_MAX_AREA_PX = 1 << 38
_MAX_BLOCK_AREA_PX = 1 << 26
_MAX_TABLE_BYTES = 64 << 20
_MAX_DIRECTORIES = 10_000
_MAX_ENTRIES = 4096
_WIDTH, _HEIGHT, _BLOCK_WIDTH, _BLOCK_HEIGHT = 256, 257, 322, 323
_BLOCK_OFFSETS, _BLOCK_BYTES = 324, 325
_STRIP_OFFSETS, _STRIP_BYTES = 273, 279
# numpy's names of the TIFF field types that hold whole numbers: SHORT, LONG, LONG8, IFD8.
_INTEGER_TYPES = {3: "u2", 4: "u4", 16: "u8", 18: "u8"}


@dataclass(frozen=True)
class TiffProblem:
    """Why a TIFF file is refused.

    Args:
        reason (`str`): "truncated", "too_large" or "unreadable".
        message (`str`): what was found and how to mend it.
    """

    reason: str
    message: str


@dataclass(frozen=True)
class _Layout:
    """Sizes of the parts of a classic or a big TIFF directory."""

    order: str
    count_format: str
    entry_bytes: int
    pointer_format: str

    @property
    def inline_bytes(self) -> int:
        return struct.calcsize(self.pointer_format)


def check_tiff_header(path: str | Path) -> TiffProblem | None:
    """Looks for sizes that can not be real, loops, and blocks that lie beyond the end of the file.

    Args:
        path (`str` or `Path`): an existing regular file of any format.

    Returns:
        `TiffProblem`, *optional*: the first problem found, or `None`.
    """
    path = Path(path)
    # NDPI looks like TIFF but has offsets of 64 bits split over two places.
    if path.suffix.lower() == ".ndpi":
        return None
    try:
        with path.open("rb") as handle:
            file_bytes = handle.seek(0, 2)
            handle.seek(0)
            layout = _read_layout(handle.read(8))
            return None if layout is None else _check_directories(handle, layout, file_bytes)
    except (struct.error, EOFError):
        return TiffProblem("truncated", "the file ends within its header; copy it again")
    except OSError as error:
        return TiffProblem("unreadable", f"the file can not be read ({error})")


def _read_layout(start: bytes) -> _Layout | None:
    """Recognises a TIFF by its first bytes."""
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None or len(start) < 4:
        return None
    version = struct.unpack(order + "H", start[2:4])[0]
    if version == 42:
        return _Layout(order, order + "H", 12, order + "I")
    if version == 43:
        return _Layout(order, order + "Q", 20, order + "Q")
    return None


def _check_directories(handle: BinaryIO, layout: _Layout, file_bytes: int) -> TiffProblem | None:
    """Follows the chain of directories."""
    handle.seek(4 if layout.inline_bytes == 4 else 8)
    offset = _read_number(handle, layout.pointer_format)
    visited: set[int] = set()
    while offset:
        if offset in visited:
            return TiffProblem("unreadable", "its directories form a loop: the file is damaged")
        visited.add(offset)
        if len(visited) > _MAX_DIRECTORIES:
            return TiffProblem("too_large", f"more than {_MAX_DIRECTORIES} images in one file")
        if offset >= file_bytes:
            return TiffProblem("truncated", _describe_missing("a directory", offset, file_bytes))
        handle.seek(offset)
        num_entries = _read_number(handle, layout.count_format)
        if num_entries > _MAX_ENTRIES:
            return TiffProblem("unreadable", f"a directory claims {num_entries} entries: the file is damaged")
        entries = _read_exactly(handle, num_entries * layout.entry_bytes)
        offset = _read_number(handle, layout.pointer_format)
        problem = _check_directory(handle, layout, entries, file_bytes)
        if problem is not None:
            return problem
    return None


def _check_directory(handle: BinaryIO, layout: _Layout, entries: bytes, file_bytes: int) -> TiffProblem | None:
    """Checks one image of the file."""
    fields = _parse_entries(layout, entries)
    numbers = {tag: _first_number(layout, fields[tag]) for tag in _SIZE_TAGS if tag in fields}
    width, height = numbers.get(_WIDTH, 0), numbers.get(_HEIGHT, 0)
    if max(width, height) > _MAX_SIDE_PX or width * height > _MAX_AREA_PX:
        return TiffProblem("too_large", f"an image of {width} x {height} px; at most {_MAX_SIDE_PX} a side are read")
    block_width, block_height = numbers.get(_BLOCK_WIDTH, 0), numbers.get(_BLOCK_HEIGHT, 0)
    if block_width * block_height > _MAX_BLOCK_AREA_PX:
        return TiffProblem(
            "too_large", f"compressed in blocks of {block_width} x {block_height} px; convert it to blocks of 256 px"
        )
    for tag in (_BLOCK_OFFSETS, _BLOCK_BYTES, _STRIP_OFFSETS, _STRIP_BYTES):
        problem = _check_table(layout, fields.get(tag), file_bytes)
        if problem is not None:
            return problem
    return _check_blocks(handle, layout, fields, file_bytes)


_SIZE_TAGS = (_WIDTH, _HEIGHT, _BLOCK_WIDTH, _BLOCK_HEIGHT)
# Field type, number of values, and the bytes that hold the value or point to it.
_Field = tuple[int, int, bytes]


def _parse_entries(layout: _Layout, entries: bytes) -> dict[int, _Field]:
    """Splits a directory into its fields, by tag; of fields given twice the first counts."""
    fields: dict[int, _Field] = {}
    for start in range(0, len(entries), layout.entry_bytes):
        entry = entries[start : start + layout.entry_bytes]
        tag, kind = struct.unpack(layout.order + "HH", entry[:4])
        count = struct.unpack(layout.pointer_format, entry[4 : 4 + layout.inline_bytes])[0]
        fields.setdefault(tag, (kind, count, entry[4 + layout.inline_bytes :]))
    return fields


def _first_number(layout: _Layout, field: _Field) -> int:
    """The value of a field that holds one whole number; 0 if it does not."""
    kind, count, value = field
    if kind not in _INTEGER_TYPES or count < 1:
        return 0
    numbers = np.frombuffer(value, dtype=layout.order + _INTEGER_TYPES[kind], count=1) if _fits(field) else [0]
    return int(numbers[0])


def _fits(field: _Field) -> bool:
    """Whether a field's values are in the directory itself rather than elsewhere in the file."""
    kind, count, value = field
    return count * np.dtype(_INTEGER_TYPES[kind]).itemsize <= len(value)


def _check_table(layout: _Layout, field: _Field | None, file_bytes: int) -> TiffProblem | None:
    """Checks the size and place of a table of offsets or byte counts."""
    if field is None or field[0] not in _INTEGER_TYPES or _fits(field):
        return None
    table_bytes = field[1] * np.dtype(_INTEGER_TYPES[field[0]]).itemsize
    if table_bytes > _MAX_TABLE_BYTES:
        return TiffProblem("too_large", f"a block table of {table_bytes} bytes; at most {_MAX_TABLE_BYTES} are read")
    end = struct.unpack(layout.pointer_format, field[2])[0] + table_bytes
    return TiffProblem("truncated", _describe_missing("a block table", end, file_bytes)) if end > file_bytes else None


def _check_blocks(handle: BinaryIO, layout: _Layout, fields: dict[int, _Field], file_bytes: int) -> TiffProblem | None:
    """Checks that every compressed block of a tiled image lies inside the file. Empty blocks may point anywhere."""
    if _BLOCK_OFFSETS not in fields or _BLOCK_BYTES not in fields:
        return None
    offsets = _read_table(handle, layout, fields[_BLOCK_OFFSETS])
    sizes = _read_table(handle, layout, fields[_BLOCK_BYTES])
    if offsets.size != sizes.size or offsets.size == 0:
        return None
    # Compared as a difference: the sum of two 64-bit numbers could wrap around.
    beyond = (sizes > 0) & ((offsets > file_bytes) | (sizes > file_bytes - np.minimum(offsets, file_bytes)))
    if not beyond.any():
        return None
    end = int(offsets[beyond].max()) + int(sizes[beyond].max())
    return TiffProblem(
        "truncated", f"{int(beyond.sum())} of its blocks: " + _describe_missing("pixel data", end, file_bytes)
    )


def _read_table(handle: BinaryIO, layout: _Layout, field: _Field) -> np.ndarray:
    """Reads a table of whole numbers, uint64 (n,); empty if it is of another type."""
    kind, count, value = field
    if kind not in _INTEGER_TYPES:
        return np.empty(0, dtype=np.uint64)
    dtype = np.dtype(layout.order + _INTEGER_TYPES[kind])
    if not _fits(field):
        handle.seek(struct.unpack(layout.pointer_format, value)[0])
        value = _read_exactly(handle, count * dtype.itemsize)
    return np.frombuffer(value, dtype=dtype, count=count).astype(np.uint64)


def _read_number(handle: BinaryIO, number_format: str) -> int:
    return struct.unpack(number_format, handle.read(struct.calcsize(number_format)))[0]


def _read_exactly(handle: BinaryIO, num_bytes: int) -> bytes:
    content = handle.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError
    return content


def _describe_missing(what: str, end: int, file_bytes: int) -> str:
    return f"{what} reaches to byte {end}, but the file has only {file_bytes}; copy it again"
