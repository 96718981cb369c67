# SPDX-License-Identifier: Apache-2.0
"""Takes tiles of unchanged slides over from the dataset that a new build replaces.

So adding a slide, correcting a report or moving a case to another split does not read every slide again.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from modeling_dre_slcl.atomic_files import atomic_file

from .dataset_info import read_dataset_info
from .dataset_tables import TILE_SCHEMA, TileTableWriter
from .slide_part import PartRecord, SlideTask, table_path, write_record

logger = logging.getLogger(__name__)

_COLUMNS = ["slide_id", "fingerprint", "status", "vendor", "width_px", "height_px", "mpp", "tile_size_level0_px"]


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
        if info["given_mpp"].get(task.slide_id) == task.mpp and (out_dir / f"previews/{task.slide_id}.jpg").is_file()
    }
    num_restored = 0
    for split in info["num_tiles"]:
        num_restored += _restore_split(out_dir, split, wanted)
    return num_restored


def _restore_split(out_dir: Path, split: str, wanted: Mapping[str, SlideTask]) -> int:
    slides = pq.read_table(out_dir / f"slides/{split}-00000-of-00001.parquet", columns=_COLUMNS).to_pylist()
    matching = {
        row["slide_id"]: row
        for row in slides
        if row["status"] == "ok"
        and row["slide_id"] in wanted
        and row["fingerprint"] == wanted[row["slide_id"]].fingerprint
    }
    num_restored = 0
    for path in sorted(out_dir.glob(f"tiles/{split}-*.parquet")):
        with pq.ParquetFile(path) as shard:
            for slide_id, groups in _groups_by_slide(shard):
                if slide_id in matching:
                    _restore_part(shard, groups, wanted[slide_id], matching[slide_id])
                    num_restored += 1
    return num_restored


def _groups_by_slide(shard: pq.ParquetFile) -> Iterator[tuple[str, list[int]]]:
    """Yields each slide of a shard with its row groups, which never span two slides."""
    current, groups = "", []
    for group in range(shard.num_row_groups):
        slide_id = shard.metadata.row_group(group).column(0).statistics.min
        if groups and slide_id != current:
            yield current, groups
            groups = []
        current = slide_id
        groups.append(group)
    if groups:
        yield current, groups


def _restore_part(shard: pq.ParquetFile, groups: list[int], task: SlideTask, row: Mapping[str, Any]) -> None:
    target = table_path(task.parts_dir, task.slide_id)
    with atomic_file(target) as temporary, TileTableWriter(temporary, TILE_SCHEMA) as writer:
        writer.copy_groups(shard, groups)
    record = PartRecord(
        slide_id=task.slide_id,
        key=task.key,
        num_tiles=sum(shard.metadata.row_group(group).num_rows for group in groups),
        table_bytes=target.stat().st_size,
        **{name: row[name] for name in ("vendor", "width_px", "height_px", "mpp", "tile_size_level0_px")},
    )
    write_record(task.parts_dir, record)
