# SPDX-License-Identifier: Apache-2.0
"""Takes tiles of unchanged slides over from the dataset that a new build replaces.

So adding a slide, correcting a report or moving a case to another split does not read every slide again.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from modeling_dre_slcl.atomic_files import atomic_file

from .dataset_info import read_dataset_info
from .parquet_join import TableSlice, join_tables, slice_table
from .slide_part import PartRecord, SlideTask, table_path, write_record
from .slide_pictures import picture_names

logger = logging.getLogger(__name__)

# Columns of the `slides` table that are fields of a `PartRecord`.
RECORD_COLUMNS = (
    *("slide_id", "status", "reason", "vendor", "width_px", "height_px", "mpp", "tile_size_level0_px"),
    *("num_tiles", "num_copied", "tissue_fraction"),
)


def restore_parts(out_dir: Path, tasks: Sequence[SlideTask], parameters: Mapping[str, Any]) -> int:
    """Writes the parts of those slides whose tile images the finished dataset in `out_dir` already holds.

    Datasets without images are not used: finding the tiles of a slide again is quick.

    Args:
        out_dir (`Path`): folder with the old dataset, if any.
        tasks (`Sequence[SlideTask]`): slides without a part.
        parameters (`Mapping[str, Any]`): the numbers of the new build; tiles are taken over only if the old ones are
            the same, and the slide's fingerprint and given mpp too.

    Returns:
        `int`: number of parts written.
    """
    try:
        info = read_dataset_info(out_dir)
    except ValueError:
        return 0
    if info["parameters"] != dict(parameters):
        return 0
    wanted = {
        task.slide_id: task
        for task in tasks
        if info["given_mpp"].get(task.slide_id) == task.mpp
        and info["guides"].get(task.slide_id) == (task.guide and task.guide.content)
        and all((out_dir / name).is_file() for name in picture_names(task.slide_id, has_mask=task.looks_for_tissue))
    }
    num_restored = 0
    for split in info["num_tiles"]:
        num_restored += _restore_split(out_dir, split, wanted)
    return num_restored


def _restore_split(out_dir: Path, split: str, wanted: Mapping[str, SlideTask]) -> int:
    slides = pq.read_table(
        out_dir / f"slides/{split}-00000-of-00001.parquet", columns=[*RECORD_COLUMNS, "fingerprint"]
    ).to_pylist()
    matching = {
        row["slide_id"]: row
        for row in slides
        if row["status"] == "ok"
        and row["slide_id"] in wanted
        and row["fingerprint"] == wanted[row["slide_id"]].fingerprint
    }
    num_restored = 0
    for path in sorted(out_dir.glob(f"tiles/{split}-*.parquet")):
        for slide_id, groups in slides_of_shard(path):
            if slide_id in matching:
                _restore_part(out_dir, slice_table(path, groups), wanted[slide_id], matching[slide_id])
                num_restored += 1
    return num_restored


def slides_of_shard(path: Path) -> list[tuple[str, list[int]]]:
    """Returns each slide of a shard with its row groups, which never span two slides."""
    groups: dict[str, list[int]] = {}
    metadata = pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        groups.setdefault(metadata.row_group(group).column(0).statistics.min, []).append(group)
    return list(groups.items())


def _restore_part(out_dir: Path, tiles: TableSlice, task: SlideTask, row: Mapping[str, Any]) -> None:
    for name in picture_names(task.slide_id, has_mask=task.looks_for_tissue):
        with atomic_file(task.parts_dir / name) as temporary:
            shutil.copyfile(out_dir / name, temporary)
    target = table_path(task.parts_dir, task.slide_id)
    with atomic_file(target) as temporary:
        join_tables(temporary, [tiles])
    write_record(task.parts_dir, record_of_row(row, key=task.key, table_bytes=target.stat().st_size))


def record_of_row(row: Mapping[str, Any], *, key: str, table_bytes: int = 0) -> PartRecord:
    """Returns what tiling gave for a slide, from its row of a `slides` table."""
    return PartRecord(key=key, table_bytes=table_bytes, **{name: row[name] for name in RECORD_COLUMNS})
