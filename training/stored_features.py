# SPDX-License-Identifier: Apache-2.0
"""Tile features of one slide, from the file that `dre-slcl embed --tile-features` or another tool wrote.

Letters: N tiles, D feature width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from modeling_dre_slcl.feature_fit import check_features_fit

from .feature_files import HDF5_SUFFIXES, open_feature_folder
from .foreign_features import read_feature_bag
from .hdf5_files import find_dataset, open_hdf5, read_array, read_attributes


@dataclass(frozen=True, eq=False)
class StoredTiles:
    """The tile features of one slide.

    Args:
        slide_id (`str`): the slide.
        tile_features (`np.ndarray` of shape `(N, D)`, float32): as the file has them.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): top-left corners, level-0 pixels.
        tile_size_level0_px (`int`, *optional*): side of a tile, level-0 pixels, where the file says it.
        mpp (`float`, *optional*): resolution of level 0, um/px, where the file says it.
        fingerprint (`str`, *optional*): of the slide's file, see `slide_fingerprint`, where the file says it.
        is_own (`bool`): whether `dre-slcl embed` wrote the file, so that features are of unit norm.
    """

    slide_id: str
    tile_features: np.ndarray
    tile_xy: np.ndarray
    tile_size_level0_px: int | None = None
    mpp: float | None = None
    fingerprint: str | None = None
    is_own: bool = True

    def __len__(self) -> int:
        return len(self.tile_features)

    def side_level0_px(self, config: Any) -> int:
        """Side of a tile, level-0 pixels: as the file says, else by the model's resolution and the slide's.

        Raises:
            ValueError: if the file says neither.
        """
        if self.tile_size_level0_px is not None:
            return self.tile_size_level0_px
        if self.mpp is None:
            raise ValueError(
                f"Stored tile features of {self.slide_id} without their tiles' size or the slide's mpp; embed again."
            )
        return round(config.tile_size_px * config.tile_mpp / self.mpp)


def stored_file(folder: str | Path, slide_id: str) -> Path:
    """Where `dre-slcl embed --out FOLDER` keeps a slide's file: the one that is there, else the default's name."""
    files = [
        Path(folder) / "embeddings" / f"{slide_id}{suffix}" for suffix in (".safetensors", *sorted(HDF5_SUFFIXES))
    ]
    return next((file for file in files if file.is_file()), files[0])


def read_stored_tiles(
    path: str | Path, config: Any, *, mpp: float | None = None, allow_mismatch: bool = False
) -> StoredTiles:
    """Reads the tile features of a slide.

    Args:
        path (`str` or `Path`): what `dre-slcl embed --tile-features` wrote, or a feature file of TRIDENT, CLAM,
            AtlasPatch, STAMP or slide2vec.
        config (`DreSlclConfig`): of the model that the features must fit.
        mpp (`float`, *optional*): resolution of the slide's level 0, um/px, from which the resolution of tiles follows
            where the file does not say it.
        allow_mismatch (`bool`, defaults to `False`): take features of another encoder, resolution or tile size.

    Returns:
        `StoredTiles`: at least one tile; features are finite.

    Raises:
        ValueError: if the file cannot be read, holds no tile features or coordinates, a feature is not finite (names
            the tile), or the features do not fit (names both values).
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file of tile features; embed the slide with `dre-slcl embed --tile-features`."
        )
    tiles = _read_own(path)
    if tiles is None:
        return _read_foreign(path, config, mpp=mpp, allow_mismatch=allow_mismatch)
    check_features_fit(
        config,
        width=tiles.tile_features.shape[1],
        source=f"The tile features of {path}",
        allow_mismatch=allow_mismatch,
    )
    return tiles


def _read_own(path: Path) -> StoredTiles | None:
    """Reads a file of `dre-slcl embed`; `None` if it is of another tool."""
    names = ("tile_features", "tile_xy")
    if path.suffix.lower() == ".safetensors":
        try:
            with safe_open(path, framework="np") as stored:
                facts, found = stored.metadata() or {}, set(stored.keys())
                arrays = [stored.get_tensor(name) for name in names if name in found]
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read ({error}). Embed the slide again.") from error
    elif path.suffix.lower() in HDF5_SUFFIXES:
        with open_hdf5(path) as file:
            datasets = [find_dataset(file, name, path) for name in names]
            if datasets[0] is None and find_dataset(file, "slide_embedding", path) is None:
                return None
            facts = read_attributes(file, path)
            arrays = [read_array(dataset, path) for dataset in datasets if dataset is not None]
    else:
        return None
    if len(arrays) < 2:
        raise ValueError(f"{path}: holds no tile features; embed the slide again with --tile-features.")
    features, tile_xy = arrays
    if features.ndim != 2 or tile_xy.shape != (len(features), 2) or not len(features):
        raise ValueError(f"{path}: tile features {features.shape} and corners {tile_xy.shape} do not belong together.")
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(wrong):
        raise ValueError(f"{path}: the feature of tile {wrong[0]} is not finite; embed the slide again.")
    side, mpp = facts.get("tile_size_level0_px"), facts.get("mpp")
    return StoredTiles(
        slide_id=str(facts.get("slide_id", path.stem)),
        tile_features=np.ascontiguousarray(features, dtype=np.float32),
        tile_xy=tile_xy.astype(np.int32),
        tile_size_level0_px=None if side is None else int(side),
        mpp=None if mpp is None else float(mpp),
        fingerprint=facts.get("fingerprint"),
    )


def _read_foreign(path: Path, config: Any, *, mpp: float | None, allow_mismatch: bool) -> StoredTiles:
    folder = open_feature_folder(path.parent, slide_ids=[path.stem])
    file = next((file for file in folder.files if file.path == path), None)
    if file is None:
        raise ValueError(f"{path}: holds no tile features of TRIDENT, CLAM, AtlasPatch, STAMP or slide2vec.")
    bag = read_feature_bag(file, mpp=mpp)
    if bag.tile_xy is None:
        raise ValueError(f"{path}: does not say where its tiles lie; take the tool's file with coordinates.")
    check_features_fit(
        config,
        width=bag.tile_features.shape[1],
        encoder=bag.encoder,
        tile_mpp=bag.tile_mpp,
        tile_size_px=bag.tile_size_px,
        source=f"The tile features of {path}",
        allow_mismatch=allow_mismatch,
    )
    return StoredTiles(
        slide_id=bag.slide_id,
        tile_features=bag.tile_features,
        tile_xy=bag.tile_xy,
        tile_size_level0_px=bag.tile_size_level0_px,
        mpp=bag.mpp,
        is_own=False,
    )
