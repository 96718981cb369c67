# SPDX-License-Identifier: Apache-2.0
"""Files that say where the tissue or the tiles of a slide are, instead of what can be seen on its picture.

A *guide* is a tissue mask (from the manifest's `mask` column or a folder of masks) or the coordinates that another
tool has laid. A slide's tiles depend on the content of its guide, so a changed guide means other tiles.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from modeling_dre_slcl.atomic_files import sha256_file

from .manifest import ManifestRow, TileGuide
from .mask_files import find_mask_file


def add_guides(
    rows: Sequence[ManifestRow], *, mask_dir: str | Path | None = None, coordinates: str | Path | None = None
) -> list[ManifestRow]:
    """Finds the guide of every slide.

    Args:
        rows (`Sequence[ManifestRow]`): all slides; those with a mask in the manifest keep it.
        mask_dir (`str` or `Path`, *optional*): folder with a mask for every other slide, see `find_mask_file`.
        coordinates (`str` or `Path`, *optional*): another tool's output folder, with coordinates of every slide.

    Returns:
        `list[ManifestRow]`: the slides with their `guide`; a guide that is missing has its reason in `problem`.

    Raises:
        ValueError: if masks and coordinates are given both, or a slide has several guides.
        FileNotFoundError: if a folder does not exist.
    """
    has_masks = mask_dir is not None or any(row.mask_path is not None for row in rows)
    if has_masks and coordinates is not None:
        raise ValueError("Masks and coordinates are given both: coordinates say already where the tiles are.")
    if mask_dir is not None and not Path(mask_dir).is_dir():
        raise FileNotFoundError(f"{mask_dir}: there is no such folder of masks.")
    if coordinates is not None:
        from .foreign_grids import find_coordinates, index_coordinates  # loads HDF5

        index = index_coordinates(coordinates)
        return [replace(row, guide=_guide("coordinates", find_coordinates(index, row.slide_id))) for row in rows]
    guided = []
    for row in rows:
        path = row.mask_path
        if path is None and mask_dir is not None:
            path = find_mask_file(mask_dir, row.slide_id)
        guided.append(replace(row, guide=_guide("mask", path)) if path or mask_dir is not None else row)
    return guided


def _guide(kind: str, path: Path | None) -> TileGuide:
    if path is None:
        return TileGuide(kind, Path(), problem=f"{kind}_missing")
    try:
        return TileGuide(kind, path, sha256_file(path))
    except OSError:
        return TileGuide(kind, path, problem=f"{kind}_missing")
