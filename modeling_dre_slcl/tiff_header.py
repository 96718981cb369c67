# SPDX-License-Identifier: Apache-2.0
"""Looks at the directories of a TIFF file before a library does.

A few bytes of a hostile or half-copied TIFF can make a reader allocate gigabytes or search for minutes, and a slide
that was cut off while being copied often opens well and only fails hours later. Here only directories and block
tables are read, never pixels. What is not a TIFF, or is fine, passes.
"""

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

_MAX_SIDE_PX = 1 << 20
_MAX_AREA_PX = 1 << 38
_MAX_BLOCK_AREA_PX = 1 << 26
_MAX_BLOCK_BYTES = 64 << 20
_MAX_TABLE_BYTES = 64 << 20
_MAX_ALL_TABLES_BYTES = 256 << 20
_MAX_DIRECTORIES = 10_000
_MAX_ENTRIES = 4096
_WIDTH, _HEIGHT, _BLOCK_WIDTH, _BLOCK_HEIGHT = 256, 257, 322, 323
_BLOCK_OFFSETS, _BLOCK_BYTES = 324, 325
_STRIP_OFFSETS, _STRIP_BYTES = 273, 279
_NDPI_MARK = 65420
# numpy's names of the TIFF field types that hold whole numbers: BYTE, SHORT, LONG, IFD, LONG8, IFD8, and the signed
# ones, which libtiff accepts too; a negative size is as impossible as the huge one that it looks like here.
_INTEGER_TYPES = {1: "u1", 3: "u2", 4: "u4", 6: "u1", 8: "u2", 9: "u4", 13: "u4", 16: "u8", 17: "u8", 18: "u8"}
_NUMBERS_AT_ONCE = 1 << 20


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
    is_ndpi: bool = False

    @property
    def inline_bytes(self) -> int:
        return struct.calcsize(self.pointer_format)

    @property
    def link_format(self) -> str:
        """How directories point to the next one; Hamamatsu's NDPI has 64 bits here in a file that is else classic."""
        return self.order + "Q" if self.is_ndpi else self.pointer_format


def check_tiff_header(path: str | Path) -> TiffProblem | None:
    """Looks for sizes that can not be real, loops, and blocks that lie beyond the end of the file.

    Args:
        path (`str` or `Path`): an existing regular file of any format.

    Returns:
        `TiffProblem`, *optional*: the first problem found, or `None`.
    """
    try:
        with Path(path).open("rb") as handle:
            file_bytes = handle.seek(0, 2)
            handle.seek(0)
            layout = _read_layout(handle.read(8))
            if layout is None:
                return None
            if _is_ndpi(handle, layout, file_bytes):
                layout = replace(layout, is_ndpi=True)
            return _check_directories(handle, layout, file_bytes)
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


def _is_ndpi(handle: BinaryIO, layout: _Layout, file_bytes: int) -> bool:
    """Whether a little-endian classic file has the mark of NDPI in its first directory, as OpenSlide decides it."""
    if layout.pointer_format != "<I":
        return False
    try:
        handle.seek(4)
        offset = _read_number(handle, "<Q")
        if offset >= file_bytes:
            return False
        handle.seek(offset)
        num_entries = _read_number(handle, "<H")
        fields = _parse_entries(layout, _read_exactly(handle, min(num_entries, _MAX_ENTRIES) * layout.entry_bytes))
    except (struct.error, EOFError):
        return False
    return _NDPI_MARK in fields


def _check_directories(handle: BinaryIO, layout: _Layout, file_bytes: int) -> TiffProblem | None:
    """Follows the chain of directories."""
    handle.seek(4 if layout.inline_bytes == 4 else 8)
    offset = _read_number(handle, layout.link_format)
    visited: set[int] = set()
    table_bytes = 0
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
        fields = _parse_entries(layout, _read_exactly(handle, num_entries * layout.entry_bytes))
        offset = _read_number(handle, layout.link_format)
        # Many directories may share one table: what counts is the work of reading it each time.
        table_bytes += sum(_table_bytes(fields.get(tag)) for tag in _TABLE_TAGS)
        if table_bytes > _MAX_ALL_TABLES_BYTES:
            return TiffProblem("too_large", f"block tables of more than {_MAX_ALL_TABLES_BYTES} bytes in all")
        problem = _check_sizes(layout, fields)
        if problem is None and not layout.is_ndpi:  # whose block tables are for libraries that do not know NDPI
            problem = _check_tables(layout, fields, file_bytes) or _check_blocks(handle, layout, fields, file_bytes)
        if problem is not None:
            return problem
    return None


def _check_sizes(layout: _Layout, fields: dict[int, "_Field"]) -> TiffProblem | None:
    """Checks the size in pixels of one image of the file and of its blocks."""
    width, height, block_width, block_height = (
        _first_number(layout, fields[tag]) if tag in fields else 0 for tag in _SIZE_TAGS
    )
    if max(width, height) > _MAX_SIDE_PX or width * height > _MAX_AREA_PX:
        return TiffProblem("too_large", f"an image of {width} x {height} px; at most {_MAX_SIDE_PX} a side are read")
    if block_width * block_height > _MAX_BLOCK_AREA_PX:
        return TiffProblem(
            "too_large", f"compressed in blocks of {block_width} x {block_height} px; convert it to blocks of 256 px"
        )
    return None


_SIZE_TAGS = (_WIDTH, _HEIGHT, _BLOCK_WIDTH, _BLOCK_HEIGHT)
_TABLE_TAGS = (_BLOCK_OFFSETS, _BLOCK_BYTES, _STRIP_OFFSETS, _STRIP_BYTES)
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


def _table_bytes(field: _Field | None) -> int:
    """Bytes that a table of whole numbers takes elsewhere in the file."""
    if field is None or field[0] not in _INTEGER_TYPES or _fits(field):
        return 0
    return field[1] * np.dtype(_INTEGER_TYPES[field[0]]).itemsize


def _check_tables(layout: _Layout, fields: dict[int, _Field], file_bytes: int) -> TiffProblem | None:
    """Checks the sizes and places of the tables of offsets and byte counts."""
    for tag in _TABLE_TAGS:
        table_bytes = _table_bytes(fields.get(tag))
        if table_bytes > _MAX_TABLE_BYTES:
            return TiffProblem(
                "too_large", f"a block table of {table_bytes} bytes; at most {_MAX_TABLE_BYTES} are read"
            )
        if table_bytes:
            end = struct.unpack(layout.pointer_format, fields[tag][2])[0] + table_bytes
            if end > file_bytes:
                return TiffProblem("truncated", _describe_missing("a block table", end, file_bytes))
    return None


def _check_blocks(handle: BinaryIO, layout: _Layout, fields: dict[int, _Field], file_bytes: int) -> TiffProblem | None:
    """Checks that every compressed block of a tiled image has a possible size and lies inside the file."""
    if _BLOCK_OFFSETS not in fields or _BLOCK_BYTES not in fields:
        return None
    offsets, sizes = fields[_BLOCK_OFFSETS], fields[_BLOCK_BYTES]
    if offsets[1] != sizes[1] or offsets[0] not in _INTEGER_TYPES or sizes[0] not in _INTEGER_TYPES:
        return None
    num_beyond, furthest = 0, 0
    for start in range(0, sizes[1], _NUMBERS_AT_ONCE):
        block_offsets = _read_numbers(handle, layout, offsets, start)
        block_sizes = _read_numbers(handle, layout, sizes, start)
        if block_sizes.max() > _MAX_BLOCK_BYTES:
            return TiffProblem(
                "too_large", f"a block of {block_sizes.max()} compressed bytes; at most {_MAX_BLOCK_BYTES} are read"
            )
        # Compared as a difference: the sum of two 64-bit numbers could wrap around. Empty blocks may point anywhere.
        room = file_bytes - np.minimum(block_offsets, np.uint64(file_bytes))
        beyond = (block_sizes > 0) & (block_sizes > room)
        if beyond.any():
            num_beyond += int(beyond.sum())
            furthest = max(furthest, int(block_offsets[beyond].max()) + int(block_sizes[beyond].max()))
    if not num_beyond:
        return None
    return TiffProblem(
        "truncated", f"{num_beyond} of its blocks: " + _describe_missing("pixel data", furthest, file_bytes)
    )


def _read_numbers(handle: BinaryIO, layout: _Layout, field: _Field, start: int) -> np.ndarray:
    """Reads a part of a table of whole numbers from its `start`-th on, uint64 (n,)."""
    kind, count, value = field
    dtype = np.dtype(layout.order + _INTEGER_TYPES[kind])
    num = min(count - start, _NUMBERS_AT_ONCE)
    if not _fits(field):
        handle.seek(struct.unpack(layout.pointer_format, value)[0] + start * dtype.itemsize)
        value = _read_exactly(handle, num * dtype.itemsize)
    return np.frombuffer(value, dtype=dtype, count=num).astype(np.uint64)


def _read_number(handle: BinaryIO, number_format: str) -> int:
    return struct.unpack(number_format, handle.read(struct.calcsize(number_format)))[0]


def _read_exactly(handle: BinaryIO, num_bytes: int) -> bytes:
    content = handle.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError
    return content


def _describe_missing(what: str, end: int, file_bytes: int) -> str:
    return f"{what} reaches to byte {end}, but the file has only {file_bytes}; copy it again"
