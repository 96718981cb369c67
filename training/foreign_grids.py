# SPDX-License-Identifier: Apache-2.0
"""Coordinates of TRIDENT, CLAM, AtlasPatch, STAMP and slide2vec as the tile grid of a slide.

Tile t of the grid is row t of the file, whatever its order, so that row t of the features that the tool computed
belongs to tile t. The tiles must have the size that our settings give on this slide: nothing is resampled.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from modeling_dre_slcl.slide_info import SlideError, SlideInfo
from modeling_dre_slcl.tile_grid import TileGrid, TileGridConfig, tile_size_at_level0

from .coordinate_files import META_SUFFIX, NPZ_SUFFIX, ForeignTiles, TileGeometry, read_tiles
from .foreign_worker import time_limit
from .hdf5_files import ForeignFileError
from .manifest_checks import raise_offenders

_HDF5_SUFFIXES = (".h5", ".hdf5")
_TRIDENT_ENDING = "_patches"
# Where the tools keep coordinates; copies of them lie in their feature files too.
_COORDINATE_FOLDERS = ("patches", "tiles")
_SIZE_TOLERANCE = 0.02  # the reader takes a level that close to the wanted resolution pixel by pixel
_ROUNDING_PX = 0.5  # by which tools round sizes to whole level-0 pixels


def index_coordinates(folder: str | Path) -> dict[str, tuple[Path, ...]]:
    """Lists the files below a folder that may hold coordinates, by slide; no file is opened.

    Args:
        folder (`str` or `Path`): a tool's output folder, or any folder above it. Hidden folders are left out.

    Returns:
        `dict[str, tuple[Path, ...]]`: slide id to files; for `find_coordinates`.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of coordinates.")
    found: dict[str, list[Path]] = defaultdict(list)
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        present = set(names)
        for name in sorted(names):
            for slide_id in _slide_ids(name, present):
                found[slide_id].append(Path(directory) / name)
    return {slide_id: tuple(paths) for slide_id, paths in found.items()}


def _slide_ids(name: str, present: set[str]) -> list[str]:
    """The slides that a file may belong to, judged by its name among the names `present` in its folder."""
    stem, suffix = Path(name).stem, Path(name).suffix
    if name.startswith("."):
        return []
    if suffix.lower() in _HDF5_SUFFIXES:
        # A slide's own name may end like TRIDENT's files.
        return [stem, stem.removesuffix(_TRIDENT_ENDING)] if stem.endswith(_TRIDENT_ENDING) else [stem]
    if name.endswith(NPZ_SUFFIX):
        return [name.removesuffix(NPZ_SUFFIX)]
    if name.endswith(META_SUFFIX):
        slide_id = name.removesuffix(META_SUFFIX)
        return [] if f"{slide_id}{NPZ_SUFFIX}" in present else [slide_id]
    return []


def find_coordinates(source: str | Path | Mapping[str, tuple[Path, ...]], slide_id: str) -> Path | None:
    """Returns the coordinate file of a slide.

    Files in folders named `patches` or `tiles`, where the tools keep coordinates, go before copies in feature files.

    Args:
        source (`str`, `Path` or `Mapping`): a folder, or what `index_coordinates` found in it, which is much faster
            for many slides.
        slide_id (`str`): the slide.

    Returns:
        `Path` or `None`: the file, `None` if the slide has none.

    Raises:
        ValueError: if several files remain, naming them.
        FileNotFoundError: if there is no such folder.
    """
    index = source if isinstance(source, Mapping) else index_coordinates(source)
    paths = index.get(slide_id, ())
    candidates = [path for path in paths if path.parent.name in _COORDINATE_FOLDERS] or list(paths)
    if len(candidates) > 1:
        raise_offenders(
            f"Slide {slide_id} must have one coordinate file; name the folder of the run that is meant",
            [str(path) for path in candidates],
        )
    return candidates[0] if candidates else None


def read_coordinates(path: Path, info: SlideInfo, config: TileGridConfig, *, max_seconds: float = 60.0) -> TileGrid:
    """Reads a coordinate file of another tool as the tile grid of a slide.

    Micrometres (STAMP) become `round(um / info.mpp)` level-0 pixels; that is exact to the pixel if STAMP used the same
    mpp for this slide.

    Args:
        path (`Path`): the file, from `find_coordinates`.
        info (`SlideInfo`): the slide.
        config (`TileGridConfig`): size, resolution and stride that the tiles must have; its other numbers have no
            meaning here.
        max_seconds (`float`, *optional*, defaults to 60.0): in a worker process, how long reading may take; damaged
            attributes can hang the HDF5 library. The worker then ends, which its parent notices.

    Returns:
        `TileGrid`: at least one tile, in the file's order. `tissue_fraction` is NaN where the tool does not say it
            (all but slide2vec): unknown, and no comparison takes it for a measurement.

    Raises:
        SlideError: `geometry_mismatch` if the tiles have another size or stride, lie outside of the slide, or belong
            to a slide of another size; `no_tissue` if there is no tile; `unreadable`, `truncated`, `unsupported`,
            `too_large` or `not_a_file` for the file itself.
        ImportError: if h5py is needed and not installed.
    """
    try:
        with time_limit(max_seconds):
            tiles = read_tiles(path)
    except ForeignFileError as error:
        raise SlideError(info.slide_id, error.reason, f"coordinate file {error}") from error
    _check_slide_size(path, tiles.geometry, info)
    if len(tiles.corners) == 0:
        raise SlideError(
            info.slide_id, "no_tissue", f"coordinate file {path.name}: {tiles.geometry.source_format} found no tile"
        )
    _check_tile_size(path, tiles.geometry, info, config)
    unknown = np.full(len(tiles.corners), np.nan, dtype=np.float32)
    return TileGrid(
        tile_xy=_level0_corners(path, tiles, info),
        tissue_fraction=unknown if tiles.tissue_fraction is None else tiles.tissue_fraction,
        tile_size_px=config.tile_size_px,
        tile_mpp=config.tile_mpp,
        stride_px=config.effective_stride_px,
        tile_size_level0_px=tile_size_at_level0(config.tile_size_px, info.tile_downsample(config.tile_mpp)),
    )


def _mismatch(path: Path, info: SlideInfo, message: str) -> SlideError:
    return SlideError(info.slide_id, "geometry_mismatch", f"coordinate file {path.name}: {message}")


def _check_slide_size(path: Path, geometry: TileGeometry, info: SlideInfo) -> None:
    if geometry.slide_size_px is None:
        return
    sizes = zip(geometry.slide_size_px, (info.width_px, info.height_px), strict=True)
    difference = max(abs(stated - found) for stated, found in sizes)
    if not difference <= geometry.slide_size_tolerance_px:
        width, height = geometry.slide_size_px
        raise _mismatch(
            path,
            info,
            f"was made for a slide of {width:g} x {height:g} px, but this one has {info.width_px} x {info.height_px}; "
            "take the coordinates of this very file",
        )


def _check_tile_size(path: Path, geometry: TileGeometry, info: SlideInfo, config: TileGridConfig) -> None:
    scale = 1 / info.mpp if geometry.is_in_um else 1.0
    side_px = geometry.tile_side * scale
    expected_px = config.tile_size_px * config.tile_mpp / info.mpp
    if not _is_close(side_px, expected_px):
        raise _mismatch(
            path,
            info,
            f"its tiles are {side_px:.6g} level-0 px wide, but {config.tile_size_px} px at {config.tile_mpp:g} um/px "
            f"are {expected_px:.6g} on this slide of {info.mpp:g} um/px. {_advice(geometry, side_px, info, config)}",
        )
    expected_px = config.effective_stride_px * config.tile_mpp / info.mpp
    if geometry.stride is not None and not _is_close(geometry.stride * scale, expected_px):
        fitting = max(1, round(geometry.stride * scale * info.mpp / config.tile_mpp))
        raise _mismatch(
            path,
            info,
            f"its tiles are {geometry.stride * scale:.6g} level-0 px apart, but a stride of "
            f"{config.effective_stride_px} px is {expected_px:.6g}. A stride_px of {fitting} would fit",
        )


def _is_close(found_px: float, expected_px: float) -> bool:
    return abs(found_px - expected_px) <= max(_SIZE_TOLERANCE * expected_px, _ROUNDING_PX)


def _advice(geometry: TileGeometry, side_px: float, info: SlideInfo, config: TileGridConfig) -> str:
    """Says with which settings tiles of `side_px` level-0 pixels would have been right."""
    same_mpp = max(1, round(side_px * info.mpp / config.tile_mpp))
    text = f"tile_size_px {same_mpp} with tile_mpp {config.tile_mpp:g} would fit"
    if geometry.tile_size_px is not None:
        tile_mpp = side_px * info.mpp / geometry.tile_size_px
        text = f"tile_size_px {geometry.tile_size_px} with tile_mpp {tile_mpp:.4g}, or {text}"
    return text


def _level0_corners(path: Path, tiles: ForeignTiles, info: SlideInfo) -> np.ndarray:
    """Returns the corners in level-0 pixels, int32 (N, 2), all different and on the slide."""
    corners = tiles.corners / info.mpp if tiles.geometry.is_in_um else tiles.corners
    whole = np.rint(corners)
    if not tiles.geometry.is_in_um and (whole != corners).any():
        raise SlideError(
            info.slide_id,
            "unreadable",
            f"coordinate file {path.name}: level-0 pixels must be whole numbers, found "
            f"{corners[whole != corners][0]:g}",
        )
    outside = np.flatnonzero(((whole < 0) | (whole >= (info.width_px, info.height_px))).any(axis=1))
    if len(outside):
        x, y = whole[outside[0]]
        raise _mismatch(
            path,
            info,
            f"{len(outside)} of {len(whole)} tiles begin outside of the slide of {info.width_px} x {info.height_px} "
            f"px, the first is tile {outside[0]} at ({x:.0f}, {y:.0f}); take the coordinates of this very file",
        )
    tile_xy = whole.astype(np.int32)
    num_different = len(np.unique(tile_xy, axis=0))
    if num_different < len(tile_xy):
        raise SlideError(
            info.slide_id,
            "unreadable",
            f"coordinate file {path.name}: {len(tile_xy) - num_different} of {len(tile_xy)} tiles occur twice; make "
            "it again",
        )
    return tile_xy
