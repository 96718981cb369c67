# SPDX-License-Identifier: Apache-2.0
"""Divides a manifest among machines (`--shard i/n`): a pure function of its slides and the sizes of their files."""

from collections.abc import Sequence

from .dataset_info import hash_json
from .manifest import ManifestRow


def parse_share(text: str) -> tuple[int, int]:
    """Reads "2/5": the second of five shares.

    Raises:
        ValueError: if it is anything but "i/n" with 1 <= i <= n.
    """
    index, _, count = text.partition("/")
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit()):
        raise ValueError(f"--shard: expected i/n such as 2/5, found {text!r}.")
    if not 1 <= int(index) <= int(count):
        raise ValueError(f"--shard: expected i/n with i from 1 to n, found {text!r}.")
    return int(index), int(count)


def divide_manifest(rows: Sequence[ManifestRow], count: int) -> list[list[int]]:
    """Divides slides into shares of about equal bytes: the largest first, each to the share that has least so far.

    Args:
        rows (`Sequence[ManifestRow]`): all slides.
        count (`int`): number of shares.

    Returns:
        `list[list[int]]`: for each share the positions of its slides in `rows`, in order.
    """
    sizes = [_file_bytes(row) for row in rows]
    # Files that are missing or hold little still cost some time each.
    order = sorted(range(len(rows)), key=lambda position: (-sizes[position], rows[position].slide_id))
    shares: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, 0)] * count
    for position in order:
        share = filled.index(min(filled))
        shares[share].append(position)
        filled[share] = filled[share][0] + sizes[position], filled[share][1] + 1
    return [sorted(share) for share in shares]


def share_info(rows: Sequence[ManifestRow], positions: Sequence[int], index: int, count: int) -> dict:
    """Returns what the dataset of a share says about it, so that the shares can be joined: see `join_datasets`."""
    slides = [[row.slide_id, row.case_id, row.split, _file_bytes(row)] for row in rows]
    return {
        "index": index,
        "count": count,
        "num_slides": len(rows),
        "manifest": hash_json(slides),
        "positions": {rows[position].slide_id: position for position in positions},
    }


def _file_bytes(row: ManifestRow) -> int:
    return row.path.stat().st_size if row.path.is_file() else 0
