# SPDX-License-Identifier: Apache-2.0
"""Many compressed tiles of a file at once: read straight to their places in memory, one JPEG file behind the other.

A tile costs a few microseconds so: tiles that lie side by side in the file are read by one call to the system, and
each lands where it stays, behind the header that makes a JPEG file of it.
"""

import os
from typing import BinaryIO

import numpy as np

_END_OF_IMAGE = b"\xff\xd9"
_MAX_STREAMS = 512  # that one call reads: the system takes at most 1024 pieces of memory


def is_whole(jpeg: bytes | memoryview) -> bool:
    """Whether a JPEG stream has its end: one that was cut off still decodes, with grey in place of what is missing."""
    return jpeg[-2:] == _END_OF_IMAGE or bytes(jpeg).rstrip(b"\0").endswith(_END_OF_IMAGE)


def copy_streams(
    file: BinaryIO, starts: np.ndarray, sizes: np.ndarray, header: tuple[bytes, bytes], memory: np.ndarray
) -> np.ndarray:
    """Reads the streams of tiles, and makes JPEG files of them, one behind the other.

    Args:
        file (`BinaryIO`): the file, unbuffered.
        starts (`np.ndarray` of shape `(n,)`, int64): where each stream lies in the file.
        sizes (`np.ndarray` of shape `(n,)`, int64): its bytes; 0 for a tile that is not to be copied.
        header (`tuple[bytes, bytes]`): how streams begin, and what a JPEG file has in its place.
        memory (`np.ndarray` of shape `(b,)`, uint8): takes the files; at least as large as all together.

    Returns:
        `np.ndarray` of shape `(n + 1,)`, int32: file i is `memory[offsets[i]:offsets[i + 1]]`; empty where the stream
            begins in another way or has no end.
    """
    stored, completed = header
    lengths = np.where(sizes > 0, sizes + len(completed) - len(stored), 0)
    ends = np.cumsum(lengths)
    used, view = np.flatnonzero(lengths), memoryview(memory)
    heads = np.empty((len(used), len(stored)), dtype=np.uint8)
    scans = []
    for begin, end in zip((ends - lengths)[used].tolist(), ends[used].tolist(), strict=True):
        view[begin : begin + len(completed)] = completed
        scans.append(view[begin + len(completed) : end])
    is_good = np.zeros(len(lengths), dtype=bool)
    is_good[used] = _read_pieces(file, starts[used], sizes[used], [memoryview(head) for head in heads], scans)
    is_good[used] &= (heads == np.frombuffer(stored, dtype=np.uint8)).all(axis=1)
    is_good[used] &= [is_whole(scan) for scan in scans]
    if not is_good.all():
        kept = [memory[end - length : end] for end, length in zip(ends[is_good], lengths[is_good], strict=True)]
        joined = np.concatenate([memory[:0], *kept])
        memory[: len(joined)] = joined
        lengths[~is_good] = 0
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _read_pieces(
    file: BinaryIO, starts: np.ndarray, sizes: np.ndarray, heads: list[memoryview], scans: list[memoryview]
) -> np.ndarray:
    """Reads each stream into two pieces of memory; returns which are there in full, bool (n,)."""
    is_read = np.zeros(len(heads), dtype=bool)
    is_begin = np.concatenate([[True], starts[1:] != starts[:-1] + sizes[:-1]])[: len(heads)]
    is_begin[::_MAX_STREAMS] = True
    begins = np.flatnonzero(is_begin).tolist()
    for begin, end in zip(begins, [*begins[1:], len(heads)], strict=True):
        pieces = [piece for pair in zip(heads[begin:end], scans[begin:end], strict=True) for piece in pair]
        is_read[begin:end] = np.cumsum(sizes[begin:end]) <= _read_run(file, int(starts[begin]), pieces)
    return is_read


def _read_run(file: BinaryIO, start: int, pieces: list[memoryview]) -> int:
    """Fills pieces of memory with what follows one place of the file; returns the number of bytes."""
    if hasattr(os, "preadv"):  # moves no position that a forked process would share
        return os.preadv(file.fileno(), pieces, start)
    file.seek(start)
    return sum(file.readinto(piece) for piece in pieces)
