# SPDX-License-Identifier: Apache-2.0
"""Where other tools say a slide's tiles are: what their coordinate files hold, as one kind of object.

| tool | where | recognised by |
| --- | --- | --- |
| TRIDENT | HDF5, `coords` (N, 2), level-0 px | attribute `patch_size_level0` of `coords` |
| CLAM and its kin | HDF5, `coords` (N, 2), level-0 px | attribute `patch_level` of `coords` |
| AtlasPatch | HDF5, `coords` (N, 5) = x, y, width, height, level | attribute `patch_size_level0` of the file |
| STAMP | HDF5, `coords` (N, 2), micrometres | attributes `unit` "um" and `tile_size_um` of the file |
| slide2vec (hs2p) | .npz with `x`, `y` (N,), level-0 px, and a .meta.json beside it | the arrays and the JSON |

Nothing is checked against a slide here: see `foreign_grids`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeling_dre_slcl.atomic_files import read_json

from .array_files import ZIP_SIGNATURE, file_signature, npz_shape, read_npz
from .hdf5_files import (
    MAX_TILES,
    ForeignFileError,
    find_dataset,
    open_hdf5,
    positive_number,
    read_array,
    read_attributes,
)

if TYPE_CHECKING:
    from h5py import Dataset, File

NPZ_SUFFIX = ".coordinates.npz"
META_SUFFIX = ".coordinates.meta.json"


@dataclass(frozen=True)
class TileGeometry:
    """What a file says about its tiles; `None` where it is silent.

    Args:
        source_format (`str`): "trident", "clam", "atlaspatch", "stamp" or "slide2vec".
        is_in_um (`bool`): whether lengths on the slide are micrometres instead of level-0 pixels.
        tile_side (`float`, *optional*): side of a tile on the slide, in that unit.
        stride (`float`, *optional*): distance between neighbouring tiles on the slide, in that unit.
        tile_size_px (`int`, *optional*): side of a tile as the tool gives it to its encoder, px.
        tile_mpp (`float`, *optional*): resolution of a tile, um/px.
        slide_mpp (`float`, *optional*): resolution of level 0, um/px.
        slide_size_px (`tuple[float, float]`, *optional*): width and height of level 0, px.
        slide_size_tolerance_px (`float`, defaults to 0): by how much that size may be off.
    """

    source_format: str
    is_in_um: bool = False
    tile_side: float | None = None
    stride: float | None = None
    tile_size_px: int | None = None
    tile_mpp: float | None = None
    slide_mpp: float | None = None
    slide_size_px: tuple[float, float] | None = None
    slide_size_tolerance_px: float = 0.0


@dataclass(frozen=True, eq=False)
class ForeignTiles:
    """The tiles of one file.

    Args:
        corners (`np.ndarray` of shape `(N, 2)`, float64): (x, y) of each tile's top-left corner, in the file's order
            and unit.
        geometry (`TileGeometry`): unit, sizes and resolutions.
        tissue_fraction (`np.ndarray` of shape `(N,)`, float32, *optional*): share of tissue, where the tool says it.
    """

    corners: np.ndarray
    geometry: TileGeometry
    tissue_fraction: np.ndarray | None = None


def read_tiles(path: Path) -> ForeignTiles:
    """Reads a coordinate file, or the coordinates of a feature file, of any of the five tools.

    Args:
        path (`Path`): an HDF5 file, or slide2vec's `<id>.coordinates.npz` or, for a slide without tiles, its
            `<id>.coordinates.meta.json`.

    Returns:
        `ForeignTiles`: numbers as the file has them.

    Raises:
        ForeignFileError: if the file cannot be read, is of no known kind, or lacks the size of its tiles.
    """
    signature = file_signature(path)
    if signature.startswith(ZIP_SIGNATURE) or signature.lstrip().startswith(b"{"):
        return read_slide2vec_tiles(path)
    with open_hdf5(path) as file:
        dataset = find_dataset(file, "coords", path)
        if dataset is None:
            raise ForeignFileError("unsupported", f"{path.name}: has no dataset `coords`")
        geometry = hdf5_geometry(file, dataset, path)
        if geometry.tile_side is None:
            raise ForeignFileError(
                "unsupported",
                f"{path.name}: does not say how large its tiles are; expected an attribute patch_size_level0 "
                "(TRIDENT, AtlasPatch), patch_level with patch_size and downsample (CLAM), or tile_size_um (STAMP). "
                "Take the tool's coordinate files instead of its feature files",
            )
        return ForeignTiles(read_corners(dataset, path), geometry)


def read_corners(dataset: "Dataset", path: Path) -> np.ndarray:
    """Reads the corners of all tiles of an HDF5 file.

    Args:
        dataset (`h5py.Dataset`): shape (N, 2), or (N, 5) with the corner in the first two columns.
        path (`Path`): its file, for messages.

    Returns:
        `np.ndarray` of shape `(N, 2)`, float64, finite.

    Raises:
        ForeignFileError: `unreadable` if the shape is another or a number is not finite, `too_large`.
    """
    shape = dataset.shape
    if shape is None or len(shape) != 2 or shape[1] not in (2, 5):
        raise ForeignFileError("unreadable", f"{path.name}: `coords` has shape {shape}, expected (tiles, 2)")
    if shape[0] > MAX_TILES:
        raise ForeignFileError("too_large", f"{path.name}: {shape[0]} tiles; at most {MAX_TILES} are read")
    return _finite_corners(read_array(dataset, path)[:, :2], path)


def _finite_corners(corners: np.ndarray, path: Path) -> np.ndarray:
    corners = corners.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(corners).all(axis=1))
    if len(wrong):
        raise ForeignFileError(
            "unreadable",
            f"{path.name}: {len(wrong)} coordinates are not finite, the first is of tile {wrong[0]}",
        )
    return corners


def hdf5_geometry(file: "File", coords: "Dataset | None", path: Path) -> TileGeometry:
    """Recognises the tool that wrote an HDF5 file by its attributes, and reads what it says about its tiles.

    Args:
        file (`h5py.File`): the file.
        coords (`h5py.Dataset`, *optional*): its coordinates.
        path (`Path`): its path, for messages.

    Returns:
        `TileGeometry`: format "clam" without any number if there are no attributes at all, as in CLAM's feature files.

    Raises:
        ForeignFileError: `unreadable` if an attribute is not what it must be.
    """
    of_file = read_attributes(file, path)
    of_coords = {} if coords is None else read_attributes(coords, path)
    if "stamp_version" in of_file or "tile_size_um" in of_file or of_file.get("unit") == "um":
        return _stamp_geometry(of_file, path)
    if {"patch_size_level0", "target_magnification"} & set(of_coords):
        return _trident_geometry(of_coords, path, source_format="trident")
    if "patch_level" in of_coords:
        return _clam_geometry(of_coords, path)
    if "patch_size_level0" in of_file:
        return _trident_geometry(of_file, path, source_format="atlaspatch")
    return TileGeometry("clam")


def _trident_geometry(attributes: Mapping[str, Any], path: Path, *, source_format: str) -> TileGeometry:
    """AtlasPatch uses the names of TRIDENT. `mpp` and `tile_mpp` are our own additions."""
    names = ("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "mpp", "tile_mpp")
    number = {name: positive_number(attributes, name, path) for name in names}
    size, side = number["patch_size"], number["patch_size_level0"]
    magnifications = number["level0_magnification"], number["target_magnification"]
    if side is None and size is not None and None not in magnifications:
        side = size * magnifications[0] / magnifications[1]
    stride = None
    overlap = attributes.get("overlap")
    if side is not None and size is not None and isinstance(overlap, (int, float)):
        stride = side * (size - overlap) / size
    return TileGeometry(
        source_format,
        tile_side=side,
        stride=stride,
        tile_size_px=None if size is None else round(size),
        tile_mpp=number["tile_mpp"],
        slide_mpp=number["mpp"],
        slide_size_px=_size([attributes.get("level0_width"), attributes.get("level0_height")], (1, 1), path),
    )


def _clam_geometry(attributes: Mapping[str, Any], path: Path) -> TileGeometry:
    size = positive_number(attributes, "patch_size", path)
    downsample = attributes.get("downsample")
    factors = downsample if isinstance(downsample, list) else [downsample]
    factors = [positive_number({"downsample": factor}, "downsample", path) for factor in factors]
    if size is None or None in factors or not factors:
        missing = "patch_size" if size is None else "downsample"
        raise ForeignFileError("unsupported", f"{path.name}: lacks the attribute {missing}, so its tiles have no size")
    return TileGeometry(
        "clam",
        tile_side=size * sum(factors) / len(factors),
        tile_size_px=round(size),
        slide_size_px=_size(attributes.get("level_dim"), (factors[0], factors[-1]), path),
        # The size of a coarser level is rounded to whole pixels of that level.
        slide_size_tolerance_px=0.0 if max(factors) == 1 else 2 * max(factors),
    )


def _stamp_geometry(attributes: Mapping[str, Any], path: Path) -> TileGeometry:
    """`tile_size_um` was called `tile_size` before STAMP 2.1."""
    if attributes.get("unit") not in (None, "um"):
        raise ForeignFileError("unsupported", f"{path.name}: coordinates in {attributes['unit']!r}, expected 'um'")
    side = positive_number(attributes, "tile_size_um", path) or positive_number(attributes, "tile_size", path)
    size = positive_number(attributes, "tile_size_px", path)
    return TileGeometry(
        "stamp",
        is_in_um=True,
        tile_side=side,
        stride=side,
        tile_size_px=None if size is None else round(size),
        tile_mpp=None if size is None or side is None else side / size,
    )


def read_slide2vec_tiles(path: Path) -> ForeignTiles:
    """Reads `<id>.coordinates.npz` with `<id>.coordinates.meta.json`, which stands alone if a slide has no tiles.

    Raises:
        ForeignFileError: if one of them is missing or damaged.
    """
    folder, slide_id = path.parent, path.name.removesuffix(NPZ_SUFFIX).removesuffix(META_SUFFIX)
    meta_path, npz_path = folder / f"{slide_id}{META_SUFFIX}", folder / f"{slide_id}{NPZ_SUFFIX}"
    geometry, num_tiles = _slide2vec_geometry(meta_path)
    if num_tiles == 0:
        return ForeignTiles(np.empty((0, 2)), geometry)
    for name in ("x", "y"):
        shape = npz_shape(npz_path, name) if npz_path.is_file() else None
        if shape != (num_tiles,):
            raise ForeignFileError(
                "unreadable",
                f"{npz_path.name}: `{name}` has shape {shape}, expected ({num_tiles},) as {meta_path.name} says",
            )
    arrays = read_npz(npz_path, ("x", "y", "tissue_fractions"))
    corners = _finite_corners(np.stack([arrays["x"], arrays["y"]], axis=1), npz_path)
    fraction = arrays.get("tissue_fractions")
    if fraction is not None and (fraction.shape != (num_tiles,) or not ((fraction >= 0) & (fraction <= 1)).all()):
        raise ForeignFileError(
            "unreadable", f"{npz_path.name}: `tissue_fractions` must be {num_tiles} numbers from 0 to 1"
        )
    return ForeignTiles(corners, geometry, None if fraction is None else fraction.astype(np.float32))


def _slide2vec_geometry(path: Path) -> tuple[TileGeometry, int]:
    """Returns the geometry and the number of tiles that the JSON beside the coordinates states."""
    if not path.is_file():
        raise ForeignFileError("unsupported", f"{path.name}: is missing; it says how large the tiles are")
    try:
        content = read_json(path)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError("unreadable", f"{path.name}: expected a JSON file") from error
    sections = content if isinstance(content, dict) else {}
    tiling, slide = sections.get("tiling"), sections.get("slide")
    if not isinstance(tiling, dict) or not isinstance(slide, dict):
        raise ForeignFileError("unsupported", f"{path.name}: lacks the sections `tiling` and `slide`")
    num_tiles = tiling.get("n_tiles")
    if not isinstance(num_tiles, int) or not 0 <= num_tiles <= MAX_TILES:
        raise ForeignFileError("unreadable", f"{path.name}: `n_tiles` is {num_tiles!r}")
    side, size = (positive_number(tiling, name, path) for name in ("tile_size_lv0", "requested_tile_size_px"))
    if side is None:
        raise ForeignFileError("unsupported", f"{path.name}: lacks `tile_size_lv0`, so its tiles have no size")
    geometry = TileGeometry(
        "slide2vec",
        tile_side=side,
        stride=positive_number(tiling, "step_px_lv0", path),
        tile_size_px=None if size is None else round(size),
        tile_mpp=positive_number(tiling, "requested_spacing_um", path),
        slide_mpp=positive_number(slide, "base_spacing_um", path),
        slide_size_px=_size(slide.get("dimensions"), (1, 1), path),
    )
    return geometry, num_tiles


def _size(sides: Any, factors: tuple[float, float], path: Path) -> tuple[float, float] | None:
    """Returns width and height, each times its factor; `None` if the file does not state both."""
    if not isinstance(sides, list) or len(sides) != 2 or None in sides:
        return None
    width, height = (positive_number({"size of the slide": side}, "size of the slide", path) for side in sides)
    return (width * factors[0], height * factors[1])
