# SPDX-License-Identifier: Apache-2.0
"""The rows of the `slides` table that training and evaluation use.

Letters: n tiles of a slide.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from .manifest import DATASET_COLUMNS

_COPIED = ("slide_id", "case_id", "path", "mpp", "tile_start", "tile_size_px", "tile_mpp", "tile_size_level0_px")


@dataclass(frozen=True)
class SlideRow:
    """One usable slide of a slide dataset.

    Args:
        slide_id (`str`): its name.
        case_id (`str`): its case.
        path (`str`): its file, relative to the folder of slides.
        report (`str`): its report; empty where there is none.
        mpp (`float`): level-0 resolution in um/px.
        tile_xy (`np.ndarray` of shape `(n, 2)`, int32): level-0 (x, y) of each tile's top-left corner; read-only.
        tile_start (`int`): row of its first tile in the `tiles` configuration of the same split.
        tile_size_px (`int`): side of a tile in its own pixels.
        tile_mpp (`float`): resolution of a tile in um/px.
        tile_size_level0_px (`int`): side of a tile in level-0 pixels.
        fingerprint (`str`, *optional*): of its file, see `slide_fingerprint`.
        labels (`dict`): the label columns.
    """

    slide_id: str
    case_id: str
    path: str
    report: str
    mpp: float
    tile_xy: np.ndarray
    tile_start: int
    tile_size_px: int
    tile_mpp: float
    tile_size_level0_px: int
    fingerprint: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return len(self.tile_xy)


def read_slide_rows(table: pa.Table) -> list[SlideRow]:
    """Returns the usable slides of a `slides` table: those with status `ok` and at least one tile.

    Args:
        table (`pyarrow.Table`): the table; `tile_xy` of the rows are views of it, so what is memory-mapped stays on
            disk.
    """
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name != "tile_xy"}
    corners = [chunk.slice(i, 1) for chunk in table.column("tile_xy").chunks for i in range(len(chunk))]
    labels = [name for name in columns if name not in DATASET_COLUMNS]
    fingerprints = columns.get("fingerprint", [None] * len(corners))
    rows = []
    for i, (status, num_tiles) in enumerate(zip(columns["status"], columns["num_tiles"], strict=True)):
        if status != "ok" or num_tiles == 0:
            continue
        rows.append(
            SlideRow(
                **{name: columns[name][i] for name in _COPIED},
                report=columns["report"][i] or "",
                tile_xy=_corner_array(corners[i]),
                fingerprint=fingerprints[i],
                labels={name: columns[name][i] for name in labels},
            )
        )
    return rows


def _corner_array(corners: pa.ListArray) -> np.ndarray:
    """Returns the only entry of a list of (x, y) pairs as int32 `(n, 2)`, without a copy where it is stored so."""
    flat = corners.flatten().flatten().to_numpy(zero_copy_only=False)
    flat = flat.astype(np.int32, copy=False).reshape(-1, 2)
    flat.flags.writeable = False
    return flat
