# SPDX-License-Identifier: Apache-2.0
"""What a finished slide dataset says about itself: `dre_slcl_dataset.json`, written last, read by training.

The file holds the geometry of the tiles, the build key (which inputs and numbers the dataset was made from), and the
sizes of the data files. A folder without it is not a finished dataset.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from modeling_dre_slcl.atomic_files import read_json, write_json

DATASET_INFO_NAME = "dre_slcl_dataset.json"
FORMAT_VERSION = 1
GEOMETRY_KEYS = ("tile_size_px", "tile_mpp", "stride_px")


def hash_json(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_dataset_info(out_dir: str | Path) -> dict[str, Any]:
    """Reads `dre_slcl_dataset.json` and checks that the data files it names are there in full.

    Args:
        out_dir (`str` or `Path`): folder of the slide dataset.

    Returns:
        `dict`: `format_version`, `geometry`, `parameters`, `options` (of the build), `given_mpp` (of slides whose own
            is not used), `build_key`, `num_tiles` (per split), `summary`, `versions`, `files` (relative path to size
            in bytes), and `share` if it is one machine's share of a manifest.

    Raises:
        ValueError: if the dataset is not finished, of another format version, or lacks a file.
    """
    folder = Path(out_dir)
    path = folder / DATASET_INFO_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: not a finished slide dataset (no {DATASET_INFO_NAME}); run `dre-slcl tiles`.")
    info = read_json(path)
    if not isinstance(info, dict) or info.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}; build the dataset again.")
    check_files(info, folder)
    return info


def check_files(info: dict[str, Any], folder: Path) -> None:
    """Checks that the data files which an info file names are in a folder, in full.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, size in info["files"].items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise ValueError(f"{file}: expected {size} bytes, found {found or 'no file'}; build the dataset again.")


def read_dataset_geometry(out_dir: str | Path) -> dict[str, int | float]:
    """Returns `tile_size_px` (px), `tile_mpp` (um/px) and `stride_px` (px) of a finished slide dataset.

    Raises:
        ValueError: see `read_dataset_info`.
    """
    geometry = read_dataset_info(out_dir)["geometry"]
    return {key: geometry[key] for key in GEOMETRY_KEYS}


def write_dataset_info(out_dir: Path, *, content: dict[str, Any], files: list[str]) -> None:
    """Writes `dre_slcl_dataset.json`, which declares the dataset finished.

    Args:
        out_dir (`Path`): folder of the slide dataset, with all data files in place.
        content (`dict`): see `read_dataset_info`, without `format_version` and `files`.
        files (`list[str]`): data files, relative to `out_dir`.
    """
    sizes = {name: (out_dir / name).stat().st_size for name in files}
    write_json(out_dir / DATASET_INFO_NAME, {"format_version": FORMAT_VERSION, **content, "files": sizes})
