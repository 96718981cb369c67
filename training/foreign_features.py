# SPDX-License-Identifier: Apache-2.0
"""Tile features that TRIDENT, CLAM, AtlasPatch, STAMP and slide2vec computed, read one slide at a time.

Row t is the feature of the tile at row t of `tile_xy`, in the order of the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from modeling_dre_slcl.slide_info import SlideError

from .array_files import open_tensor, read_npz
from .coordinate_files import NPZ_SUFFIX, ForeignTiles, TileGeometry, hdf5_geometry, read_corners, read_slide2vec_tiles
from .feature_files import HDF5_SUFFIXES, FeatureFile, FeatureFolder, slide2vec_meta
from .foreign_worker import read_foreign
from .hdf5_files import ForeignFileError, find_dataset, find_group, open_hdf5, positive_number, read_array

READ_SECONDS = 900.0  # a large file on a slow share
_ROWS_PER_CHECK = 4096


@dataclass(frozen=True, eq=False)
class FeatureBag:
    """The tile features of one slide.

    Args:
        slide_id (`str`): the slide.
        tile_features (`np.ndarray` of shape `(N, D)`, float32): finite, in the file's order.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32, *optional*): top-left corners, level-0 pixels.
        tile_size_level0_px (`int`, *optional*): side of a tile, level-0 pixels.
        tile_size_px (`int`, *optional*): side of a tile, pixels at `tile_mpp`.
        tile_mpp (`float`, *optional*): resolution of a tile, um/px.
        mpp (`float`, *optional*): resolution of level 0, um/px.
        encoder (`str`, *optional*): the tile encoder.
        source_format (`str`): the tool.
    """

    slide_id: str
    tile_features: np.ndarray
    tile_xy: np.ndarray | None
    tile_size_level0_px: int | None
    tile_size_px: int | None
    tile_mpp: float | None
    mpp: float | None
    encoder: str | None
    source_format: str


def read_feature_bag(file: FeatureFile, *, mpp: float | None = None) -> FeatureBag:
    """Reads the tile features of a slide.

    Args:
        file (`FeatureFile`): from `open_feature_folder`.
        mpp (`float`, *optional*): resolution of the slide's level 0, um/px. Without it STAMP's features, which are
            placed in micrometres, have no `tile_xy`.

    Returns:
        `FeatureBag`: its features, and what is known of its tiles.

    Raises:
        SlideError: `unreadable` if the file is damaged, a feature is not finite, or features and coordinates differ in
            number; `too_large`.
    """
    try:
        features, tiles = _read_values(file)
        features = _to_float32(features, file)
        if tiles is not None and len(tiles.corners) not in (0, file.num_tiles):
            raise ForeignFileError(
                "unreadable", f"{file.path.name}: {file.num_tiles} features, but {len(tiles.corners)} coordinates"
            )
        return _make_bag(file, features, tiles, mpp)
    except ForeignFileError as error:
        raise SlideError(file.slide_id, error.reason, f"feature file {error}") from error


def iter_feature_bags(
    folder: FeatureFolder, *, mpp: Mapping[str, float] | None = None, isolated: bool = False
) -> Iterator[FeatureBag | SlideError]:
    """Yields the features of each slide in order, or why they are refused; one slide is in memory at a time.

    Args:
        folder (`FeatureFolder`): from `open_feature_folder`.
        mpp (`Mapping[str, float]`, *optional*): slide id to um/px of level 0, where known; see `read_feature_bag`.
        isolated (`bool`, *optional*, defaults to `False`): read in another process, which a damaged file may kill or
            keep for ever.
    """
    tasks = [(file, (mpp or {}).get(file.slide_id)) for file in folder.files]
    names = [file.path.name for file in folder.files]
    results = read_foreign(_read_task, tasks, names=names, seconds=READ_SECONDS, isolated=isolated)
    for file, result in zip(folder.files, results, strict=True):
        if isinstance(result, ForeignFileError):
            result = SlideError(file.slide_id, result.reason, f"feature file {result}")
        yield result


def _read_task(task: tuple[FeatureFile, float | None]) -> FeatureBag | SlideError:
    file, mpp = task
    try:
        return read_feature_bag(file, mpp=mpp)
    except SlideError as error:
        return error


def _read_values(file: FeatureFile) -> tuple[np.ndarray, ForeignTiles | None]:
    """Returns features (N, D), and corners with geometry where the file, or slide2vec's file beside it, has them."""
    path, suffix = file.path, file.path.suffix.lower()
    if suffix in HDF5_SUFFIXES:
        return _read_hdf5(file)
    rows = None
    if suffix == ".npz":
        arrays = read_npz(path, ("features", "tile_index"))
        features, rows = arrays["features"], arrays.get("tile_index")
    else:
        # NumPy has no bfloat16.
        features = open_tensor(path).float().numpy()
    if file.source_format != "slide2vec":
        return features, None
    return features, _slide2vec_tiles(file, rows)


def _read_hdf5(file: FeatureFile) -> tuple[np.ndarray, ForeignTiles | None]:
    path = file.path
    with open_hdf5(path) as opened:
        group, _, name = file.dataset.rpartition("/")
        parent = find_group(opened, group, path) if group else opened
        features = read_array(find_dataset(parent, name, path), path)
        coords = find_dataset(opened, "coords", path)
        geometry = hdf5_geometry(opened, coords, path)
        corners = np.empty((0, 2)) if coords is None else read_corners(coords, path)
    return features, ForeignTiles(corners, geometry)


def _slide2vec_geometry(file: FeatureFile) -> TileGeometry:
    """What the JSON beside the features says about the tiles, for features without coordinates."""
    meta = slide2vec_meta(file.path) or {}
    names = ("tile_size_lv0", "requested_tile_size_px", "requested_spacing_um")
    side, size, tile_mpp = (positive_number(meta, name, file.path) for name in names)
    size = None if size is None else round(size)
    return TileGeometry("slide2vec", tile_side=side, tile_size_px=size, tile_mpp=tile_mpp)


def _slide2vec_tiles(file: FeatureFile, rows: np.ndarray | None) -> ForeignTiles:
    """Returns the tiles that the features belong to; `rows` (N,) names them where features are in another order."""
    folder = file.path.parent
    inner = () if folder.name == "tile_embeddings" else (folder.name,)  # a folder per annotated class
    root = folder.parent if not inner else folder.parent.parent
    npz_path = root.joinpath("tiles", *inner, f"{file.slide_id}{NPZ_SUFFIX}")
    if not npz_path.is_file():
        return ForeignTiles(np.empty((0, 2)), _slide2vec_geometry(file))
    tiles = read_slide2vec_tiles(npz_path)
    if rows is None:
        return tiles
    if rows.dtype.kind not in "iu" or rows.ndim != 1 or not ((rows >= 0) & (rows < len(tiles.corners))).all():
        raise ForeignFileError("unreadable", f"{file.path.name}: `tile_index` names tiles that {npz_path.name} lacks")
    return ForeignTiles(tiles.corners[rows], tiles.geometry)


def _to_float32(features: np.ndarray, file: FeatureFile) -> np.ndarray:
    """Returns finite float32 features; numbers too large for float32 are not finite either."""
    if features.shape != (file.num_tiles, file.width) or features.dtype.kind != "f":
        raise ForeignFileError(
            "unreadable",
            f"{file.path.name}: features of {features.dtype} {features.shape}, expected floating-point numbers",
        )
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(features, dtype=np.float32)
    for start in range(0, len(features), _ROWS_PER_CHECK):
        is_finite = np.isfinite(features[start : start + _ROWS_PER_CHECK]).all(axis=1)
        if not is_finite.all():
            tile = start + int(np.argmin(is_finite))
            raise ForeignFileError(
                "unreadable", f"{file.path.name}: the feature of tile {tile} is not finite; compute it again"
            )
    return features


def _make_bag(file: FeatureFile, features: np.ndarray, tiles: ForeignTiles | None, mpp: float | None) -> FeatureBag:
    geometry = TileGeometry(file.source_format) if tiles is None else tiles.geometry
    mpp = geometry.slide_mpp if mpp is None else mpp
    # Level-0 pixels per unit of the file.
    scale = 1.0 if not geometry.is_in_um else None if mpp is None else 1 / mpp
    tile_xy = None
    if tiles is not None and len(tiles.corners) and scale is not None:
        whole = np.rint(tiles.corners * scale)
        if (np.abs(whole) > np.iinfo(np.int32).max).any():
            raise ForeignFileError("unreadable", f"{file.path.name}: coordinates beyond any slide")
        tile_xy = whole.astype(np.int32)
    side = None if geometry.tile_side is None or scale is None else max(1, round(geometry.tile_side * scale))
    tile_mpp = geometry.tile_mpp
    if tile_mpp is None and None not in (side, mpp, geometry.tile_size_px):
        tile_mpp = side * mpp / geometry.tile_size_px
    return FeatureBag(
        slide_id=file.slide_id,
        tile_features=features,
        tile_xy=tile_xy,
        tile_size_level0_px=side,
        tile_size_px=geometry.tile_size_px,
        tile_mpp=tile_mpp,
        mpp=mpp,
        encoder=file.encoder,
        source_format=file.source_format,
    )
