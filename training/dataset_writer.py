# SPDX-License-Identifier: Apache-2.0
"""Merges the parts of all slides into the Parquet shards of a slide dataset; the bytes depend on the parts alone.

Row groups are copied as they are; a part that is a shard by itself is linked, where the file system can.
"""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_dre_slcl.tile_grid import TileGridConfig

from .dataset_tables import read_tile_xy, slide_schema, write_slide_table
from .manifest import ManifestRow
from .manifest_checks import SPLITS
from .parquet_join import TableSlice, join_tables
from .slide_part import PartRecord


@dataclass(frozen=True)
class SlideEntry:
    """A slide of the dataset: its manifest row, its fingerprint, what tiling it gave, and where its tile table is.

    Attributes:
        row (`ManifestRow`): the slide in the manifest.
        fingerprint (`str` or `None`): its fingerprint, if its file could be read.
        record (`PartRecord`): what tiling gave.
        tiles (`TableSlice` or `None`): its tiles; `None` if refused.
        pictures_dir (`Path` or `None`): folder with the folders of its pictures.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32, *optional*): its tiles' corners, where `tiles` has none.
    """

    row: ManifestRow
    fingerprint: str | None
    record: PartRecord
    tiles: TableSlice | None = None
    pictures_dir: Path | None = None
    tile_xy: np.ndarray | None = None

    @property
    def split(self) -> str:
        """The split the slide belongs to."""
        return str(self.row.split)


def group_by_split(entries: Sequence[SlideEntry]) -> dict[str, list[SlideEntry]]:
    """Returns the entries of each split that occurs, in the order train, val, test."""
    groups = {split: [entry for entry in entries if entry.split == split] for split in SPLITS}
    return {split: group for split, group in groups.items() if group}


def write_tables(
    staging: Path,
    entries: Sequence[SlideEntry],
    *,
    grid_config: TileGridConfig,
    has_pixels: bool,
    shard_bytes: int,
) -> list[str]:
    """Writes the `slides` and, with pixels, the `tiles` shards of all splits.

    Args:
        staging (`Path`): folder to write to.
        entries (`Sequence[SlideEntry]`): all slides in the order of the manifest.
        grid_config (`TileGridConfig`): geometry of the tiles.
        has_pixels (`bool`): whether the parts hold images; without, no `tiles` configuration is written.
        shard_bytes (`int`): size above which a new shard begins.

    Returns:
        `list[str]`: the files, relative to `staging`. A split without any tile has no file in `tiles`, because
            `load_dataset` refuses empty splits.
    """
    schema = slide_schema(entry.row.labels for entry in entries)
    names = []
    for split, group in group_by_split(entries).items():
        name = f"slides/{split}-00000-of-00001.parquet"
        (staging / "slides").mkdir(parents=True, exist_ok=True)
        write_slide_table(staging / name, schema, _slide_rows(group, grid_config), map(_corners, group))
        names.append(name)
        if has_pixels:
            names += _write_tile_shards(staging, split, group, shard_bytes)
    return names


def _slide_rows(group: Sequence[SlideEntry], grid_config: TileGridConfig) -> list[dict[str, Any]]:
    """Returns the columns of each slide except `tile_xy`; `tile_start` counts the tiles of the split."""
    rows, tile_start = [], 0
    for entry in group:
        row, record = entry.row, entry.record
        rows.append(
            {
                "slide_id": row.slide_id,
                "case_id": row.case_id,
                "split": row.split,
                "path": row.stored_path,
                "fingerprint": entry.fingerprint,
                "vendor": record.vendor,
                "width_px": record.width_px,
                "height_px": record.height_px,
                "mpp": record.mpp,
                "tile_size_px": grid_config.tile_size_px,
                "tile_mpp": grid_config.tile_mpp,
                "stride_px": grid_config.effective_stride_px,
                "tile_size_level0_px": record.tile_size_level0_px,
                "tile_start": tile_start,
                "num_tiles": record.num_tiles,
                "num_copied": record.num_copied,
                "tissue_fraction": record.tissue_fraction,
                "report": row.report,
                **row.labels,
                "status": record.status,
                "reason": record.reason,
            }
        )
        tile_start += record.num_tiles
    return rows


def _corners(entry: SlideEntry) -> np.ndarray:
    if entry.tile_xy is not None:
        return entry.tile_xy
    return np.empty((0, 2), dtype=np.int32) if entry.tiles is None else read_tile_xy(entry.tiles)


def plan_shards(sizes: Sequence[int], shard_bytes: int) -> list[list[int]]:
    """Returns which items go into which shard, in order; a shard ends before it would exceed `shard_bytes`."""
    shards: list[list[int]] = []
    filled = 0
    for index, size in enumerate(sizes):
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += size
    return shards


def _write_tile_shards(staging: Path, split: str, group: Sequence[SlideEntry], shard_bytes: int) -> list[str]:
    tables = [entry.tiles for entry in group if entry.tiles is not None]
    shards = plan_shards([table.num_bytes for table in tables], shard_bytes)
    names = [f"tiles/{split}-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
    for name, indices in zip(names, shards, strict=True):
        (staging / "tiles").mkdir(parents=True, exist_ok=True)
        _write_shard(staging / name, [tables[index] for index in indices])
    return names


def _write_shard(target: Path, tables: Sequence[TableSlice]) -> None:
    if len(tables) == 1 and tables[0].is_whole:
        link_or_copy(tables[0].path, target)
    else:
        join_tables(target, tables)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
            raise
        shutil.copyfile(source, target)


def count_tiles(entries: Sequence[SlideEntry]) -> Mapping[str, int]:
    """Returns the number of tiles of each split."""
    return {split: sum(e.record.num_tiles for e in group) for split, group in group_by_split(entries).items()}
