# SPDX-License-Identifier: Apache-2.0
"""Starts the memory bank from tile features in files, instead of a first pass of the tile encoder.

The files are those of `dre-slcl bank --export`, TRIDENT, CLAM, AtlasPatch, STAMP or slide2vec, or a dataset that
`dre-slcl import-features` made of them. Features find their tiles by `slide_id` and level-0 coordinates, so the order
may differ. They must be of the tile encoder that the run starts with: that cannot be seen, only their width can.

Letters: n tiles, D feature width.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from modeling_dre_slcl import DreSlclModel
from modeling_dre_slcl.slide_info import SlideError

from .feature_files import open_feature_folder
from .foreign_features import iter_feature_bags
from .import_features import FEATURES_INFO_NAME
from .manifest_checks import raise_offenders
from .run_data import RunData
from .slide_rows import SlideRow

logger = logging.getLogger(__name__)
_ROWS_PER_WRITE = 1 << 12
_Found = tuple[str, np.ndarray | None, np.ndarray]


@torch.no_grad()
def start_bank(model: DreSlclModel, data: RunData, source: str | Path) -> int:
    """Stores the features of a folder for the slides that this process owns, L2-normalised, as written at step 0.

    Args:
        model (`DreSlclModel`): unwrapped; its bank is allocated.
        data (`RunData`): the slides of this process.
        source (`str` or `Path`): the folder.

    Returns:
        `int`: tiles stored. Tiles without a feature stay empty, as after a first pass over some tiles only.

    Raises:
        ValueError: if features have another width than the tile encoder's, lie at coordinates that are no tiles of
            their slide, have no coordinates, or cannot be read; it names the slides. Or if there are none for the
            slides of the run.
        FileNotFoundError: if there is no such folder.
    """
    bank, rows = model.memory_bank, {data.source.slides[slide].slide_id: slide for slide in data.owned}
    offenders, num_stored, found = [], 0, 0
    for slide_id, tile_xy, features in _iter_features(Path(source), set(rows)):
        slide = rows[slide_id]
        tiles, problem = match_tiles(data.source.slides[slide], tile_xy, features, bank.hidden_size)
        if problem:
            offenders.append(f"{slide_id}: {problem}")
            continue
        found += 1
        where = data.bank_places([slide])
        for start in range(0, len(tiles), _ROWS_PER_WRITE):
            chunk = slice(start, start + _ROWS_PER_WRITE)
            unit = F.normalize(torch.from_numpy(np.array(features[chunk], dtype=np.float32)), dim=-1)
            bank.write(where, torch.from_numpy(tiles[chunk])[None], unit[None], model.codebook, step=0)
            num_stored += len(unit)
    raise_offenders(f"{source}: tile features must be those of the tiles of this run's dataset", offenders)
    if not found:
        raise ValueError(f"{source}: holds features of none of the {len(rows)} slides of {data.source.dataset}.")
    if found < len(rows):
        logger.warning(
            "%s has no features of %d of %d slides; they start empty.", source, len(rows) - found, len(rows)
        )
    logger.info("The memory bank starts with %d tile features of %d slides from %s.", num_stored, found, source)
    return num_stored


def match_tiles(row: SlideRow, tile_xy: np.ndarray | None, features: np.ndarray, width: int) -> tuple[np.ndarray, str]:
    """Finds the tiles of a slide that features belong to.

    Args:
        row (`SlideRow`): the slide.
        tile_xy (`np.ndarray` of shape `(n, 2)`, int, *optional*): top-left corners of the features, level-0 pixels.
        features (`np.ndarray` of shape `(n, D)`): the features.
        width (`int`): the D that is needed.

    Returns:
        `tuple`: indices of tiles `(n,)`, int64, and what does not fit, empty if all does.
    """
    nothing = np.empty(0, dtype=np.int64)
    if features.ndim != 2 or features.shape[1] != width:
        return nothing, f"features of width {features.shape[-1]}, the tile encoder gives {width}"
    if tile_xy is None or len(tile_xy) != len(features):
        return nothing, f"{len(features)} features with {'no' if tile_xy is None else len(tile_xy)} coordinates"
    ours, theirs = _keys(row.tile_xy), _keys(tile_xy)
    order = np.argsort(ours)
    place = np.searchsorted(ours[order], theirs).clip(max=len(ours) - 1)
    tiles = order[place]
    is_missing = ours[tiles] != theirs
    if is_missing.any():
        first = tuple(np.asarray(tile_xy)[is_missing][0].tolist())
        return nothing, f"{int(is_missing.sum())} of {len(theirs)} coordinates are no tile of it, for example {first}"
    if len(np.unique(tiles)) != len(tiles):
        return nothing, "several features at one place"
    return tiles, ""


def _keys(tile_xy: np.ndarray) -> np.ndarray:
    """One int64 for each corner `(n, 2)`."""
    x, y = np.asarray(tile_xy, dtype=np.int64).T
    return (x << 32) + y


def _iter_features(source: Path, slide_ids: set[str]) -> Iterator[_Found]:
    """Yields slide id, corners and features of each wanted slide; one slide is in memory at a time."""
    if (source / FEATURES_INFO_NAME).is_file():
        yield from _iter_dataset(source, slide_ids)
        return
    folder = open_feature_folder(source, slide_ids=slide_ids)
    raise_offenders(f"{source}: feature files must be usable", [str(error) for error in folder.refused])
    for bag in iter_feature_bags(folder):
        if isinstance(bag, SlideError):
            raise ValueError(f"{source}: {bag}")
        yield bag.slide_id, bag.tile_xy, bag.tile_features


def _iter_dataset(source: Path, slide_ids: set[str]) -> Iterator[_Found]:
    for path in sorted((source / "features").glob("*.parquet")):
        with pq.ParquetFile(path) as table:
            for group in range(table.num_row_groups):
                if table.read_row_group(group, columns=["slide_id"])["slide_id"][0].as_py() not in slide_ids:
                    continue
                row = table.read_row_group(group, columns=["slide_id", "tile_xy", "tile_features"])
                corners, features = (row[name][0].values for name in ("tile_xy", "tile_features"))
                num_tiles = len(features)
                corners = None if corners is None else corners.flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)
                features = features.flatten().to_numpy(zero_copy_only=False).reshape(num_tiles, -1)
                yield row["slide_id"][0].as_py(), corners, features
