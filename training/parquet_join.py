# SPDX-License-Identifier: Apache-2.0
"""Joins row groups of Parquet files into one file by copying their bytes: no page is decoded, checked or cut anew.

Only places change: the footer (Thrift compact protocol, Parquet format 2.x, `parquet.thrift`) and the offset indexes
name bytes by their offset in the file, so these two are written again. A file joined of all row groups of a single
file that pyarrow wrote is that file, byte for byte.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from .thrift_compact import LIST, STRUCT, Struct, decode_struct, encode_struct

_MAGIC = b"PAR1"
_BLOCK_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20
_NUM_ROWS, _ROW_GROUPS, _SCHEMA = 3, 4, 2  # fields of FileMetaData
_COLUMNS, _GROUP_ROWS, _GROUP_OFFSET, _ORDINAL = 1, 3, 5, 7  # of RowGroup
_COLUMN_META, _OFFSET_INDEX, _COLUMN_INDEX = 3, 4, 6  # of ColumnChunk: the indexes' places; their lengths are next
_CHUNK_BYTES, _PAGE_OFFSETS, _BLOOM_OFFSET = 7, (9, 10, 11), 14  # of ColumnMetaData
_LOCATIONS, _LOCATION_OFFSET = 1, 1  # of OffsetIndex and PageLocation
_MAX_ORDINAL = (1 << 15) - 1
# Between two file systems, or on one that does not know how.
_CANNOT_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM})


@dataclass(frozen=True)
class TableSlice:
    """Some row groups of a Parquet file.

    Args:
        path (`Path`): the file.
        groups (`tuple[int, ...]`): indices of its row groups.
        num_bytes (`int`): their bytes, without footer and indexes.
        is_whole (`bool`): whether the file has no others.
    """

    path: Path
    groups: tuple[int, ...]
    num_bytes: int
    is_whole: bool


def slice_table(path: Path, groups: Sequence[int] | None = None) -> TableSlice:
    """Returns some or all row groups of a file.

    Raises:
        ValueError: if it is no Parquet file.
    """
    try:
        found = pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: expected a whole Parquet file.") from error
    every = tuple(range(found.num_row_groups))
    wanted = every if groups is None else tuple(groups)
    chunks = (found.row_group(group).column(column) for group in wanted for column in range(found.num_columns))
    num_bytes = sum(chunk.total_compressed_size for chunk in chunks)
    return TableSlice(path, wanted, num_bytes, is_whole=wanted == every)


def join_tables(target: Path, slices: Sequence[TableSlice]) -> None:
    """Writes one file with the row groups of all slices, in order.

    Args:
        target (`Path`): the file to write.
        slices (`Sequence[TableSlice]`): at least one; all files must have the same schema.

    Raises:
        ValueError: if schemas differ or a file is laid out in another way than pyarrow does.
        OSError: if a file cannot be read or written.
    """
    groups: list[Struct] = []
    column_indexes: list[tuple[Struct, bytes]] = []
    offset_indexes: list[tuple[Struct, bytes]] = []
    footer: Struct | None = None
    with target.open("wb", buffering=0) as out:
        out.write(_MAGIC)
        for piece in slices:
            with piece.path.open("rb", buffering=0) as source:
                found = _read_footer(source, piece.path)
                footer = footer or found
                if found[_SCHEMA] != footer[_SCHEMA]:
                    raise ValueError(f"{piece.path}: its columns are not those of {slices[0].path}.")
                for index in piece.groups:
                    group = found[_ROW_GROUPS][1][1][index]
                    start, length = _extent(group, piece.path)
                    shift = out.tell() - start
                    for column in _list(group, _COLUMNS):
                        _take_indexes(source, column, shift, column_indexes, offset_indexes)
                    _copy_bytes(source, out, start, length)
                    _move_group(group, shift, len(groups))
                    groups.append(group)
        if footer is None:
            raise ValueError(f"{target}: there is nothing to join.")
        _write_indexes(out, column_indexes, _COLUMN_INDEX)
        _write_indexes(out, offset_indexes, _OFFSET_INDEX)
        footer[_NUM_ROWS] = footer[_NUM_ROWS][0], sum(group[_GROUP_ROWS][1] for group in groups)
        footer[_ROW_GROUPS] = LIST, (STRUCT, groups)
        content = encode_struct(footer)
        out.write(content + len(content).to_bytes(4, "little") + _MAGIC)


def _read_footer(file: BinaryIO, path: Path) -> Struct:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or not 0 < length <= size - 12:
        raise ValueError(f"{path}: expected a whole Parquet file.")
    file.seek(size - 8 - length)
    return decode_struct(file.read(length))


def _list(struct: Struct, field: int) -> list[Any]:
    return struct[field][1][1]


def _extent(group: Struct, path: Path) -> tuple[int, int]:
    """Returns where a row group starts and how many bytes it has; its column chunks must follow one another."""
    start = end = None
    for column in _list(group, _COLUMNS):
        meta = column[_COLUMN_META][1]
        first = min(meta[field][1] for field in _PAGE_OFFSETS if field in meta)
        if (end is not None and first != end) or _BLOOM_OFFSET in meta:
            raise ValueError(f"{path}: its row groups are not laid out as pyarrow does, so they cannot be copied.")
        start = first if start is None else start
        end = first + meta[_CHUNK_BYTES][1]
    if start is None or end is None:
        raise ValueError(f"{path}: has a row group without columns.")
    return start, end - start


def _take_indexes(
    source: BinaryIO,
    column: Struct,
    shift: int,
    column_indexes: list[tuple[Struct, bytes]],
    offset_indexes: list[tuple[Struct, bytes]],
) -> None:
    """Reads a column chunk's page indexes; column indexes name no offsets, offset indexes are moved by `shift`."""
    if _COLUMN_INDEX in column:
        column_indexes.append((column, _read_index(source, column, _COLUMN_INDEX)))
    if _OFFSET_INDEX in column:
        index = decode_struct(_read_index(source, column, _OFFSET_INDEX))
        for location in _list(index, _LOCATIONS):
            _add(location, _LOCATION_OFFSET, shift)
        offset_indexes.append((column, encode_struct(index)))


def _read_index(source: BinaryIO, column: Struct, field: int) -> bytes:
    source.seek(column[field][1])
    return source.read(column[field + 1][1])


def _write_indexes(out: BinaryIO, indexes: Sequence[tuple[Struct, bytes]], field: int) -> None:
    position = out.tell()
    for column, content in indexes:
        column[field] = column[field][0], position
        column[field + 1] = column[field + 1][0], len(content)
        position += len(content)
    out.write(b"".join(content for _, content in indexes))


def _move_group(group: Struct, shift: int, ordinal: int) -> None:
    """Moves all offsets of a row group by `shift` and gives it its number in the new file."""
    for column in _list(group, _COLUMNS):
        for field in _PAGE_OFFSETS:
            _add(column[_COLUMN_META][1], field, shift)
    _add(group, _GROUP_OFFSET, shift)
    if _ORDINAL in group and ordinal <= _MAX_ORDINAL:
        group[_ORDINAL] = group[_ORDINAL][0], ordinal
    else:
        group.pop(_ORDINAL, None)


def _add(struct: Struct, field: int, shift: int) -> None:
    if field in struct:
        kind, value = struct[field]
        struct[field] = kind, value + shift


def _copy_bytes(source: BinaryIO, out: BinaryIO, start: int, length: int) -> None:
    """Copies bytes to the end of `out`: inside the kernel, or even by reference, where the file system can."""
    end = start + length
    while start < end and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source.fileno(), out.fileno(), min(end - start, _BLOCK_BYTES), start)
        except OSError as error:
            if error.errno in _CANNOT_COPY:
                break
            raise
        if copied == 0:
            break
        start += copied
    source.seek(start)
    while start < end:
        block = source.read(min(end - start, _BUFFER_BYTES))
        if not block:
            raise ValueError(f"{source.name}: ends before its last row group; it is cut off.")
        view = memoryview(block)
        while view:
            view = view[out.write(view) :]
        start += len(block)
