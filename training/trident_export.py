# SPDX-License-Identifier: Apache-2.0
"""Writes a slide dataset, or tile features, in the layout that TRIDENT reads.

```
<job>/
    slides.csv                            wsi, mpp: for --custom_list_of_wsis, and a manifest of ours
    thumbnails/<id>.jpg                   the dataset's thumbnails
    contours_geojson/<id>.geojson         the dataset's tissue outlines, if it has them
    <mag>x_<size>px_<overlap>px_overlap/
        patches/<id>_patches.h5           `coords` (N, 2) int64, level-0 px, with attributes
        visualization/<id>.jpg            the dataset's previews
        features_<encoder>/<id>.h5        `features` (N, D) float32 with `coords`: see `write_trident_features`
```
"""

import csv
import io
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from modeling_dre_slcl.atomic_files import atomic_file, read_json, remove_temporary, write_json, write_text
from modeling_dre_slcl.slide_info import SlideError
from modeling_dre_slcl.trident_encoder import magnification

from .dataset_info import GEOMETRY_KEYS, read_dataset_info
from .folder_lock import folder_lock
from .hdf5_files import require_h5py
from .manifest import SLIDE_SUFFIXES
from .manifest_checks import is_safe_id
from .mask_geojson import move_to_canvas

try:
    import h5py
except ImportError:
    h5py = None

logger = logging.getLogger(__name__)

CSV_NAME = "slides.csv"
Attributes = Mapping[str, int | float | str]

_READ_TOLERANCE = 0.02
_CHUNK_ROWS = 1024  # TRIDENT's own chunks of one row are read several times more slowly
_SLIDES_PER_BATCH = 16
_SAFE_START = re.compile(r"[A-Za-z0-9_./]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_COLUMNS = (
    *("slide_id", "path", "width_px", "height_px", "mpp", "tile_size_px", "tile_mpp", "stride_px"),
    *("tile_size_level0_px", "tile_xy", "status"),
)


@dataclass
class ExportSummary:
    """What was exported.

    Attributes:
        run_name (`str`): folder of the coordinates, such as "20x_256px_0px_overlap".
        num_slides (`int`), num_tiles (`int`): written.
        num_without_tiles (`int`): slides that the dataset itself refuses, which are left out.
        refused (`list[SlideError]`): slides that TRIDENT's layout cannot hold, with reasons.
    """

    run_name: str
    num_slides: int = 0
    num_tiles: int = 0
    num_without_tiles: int = 0
    refused: list[SlideError] = field(default_factory=list)


def coordinate_attributes(
    slide_id: str,
    *,
    mpp: float,
    width_px: int,
    height_px: int,
    tile_size_px: int,
    tile_mpp: float,
    stride_px: int,
    tile_size_level0_px: int,
) -> dict[str, int | float | str]:
    """Returns the attributes of `coords`.

    TRIDENT reads `patch_size * level0_magnification / target_magnification` level-0 pixels per tile. Where its names
    for both resolutions would give tiles more than 2% off, `level0_magnification` is the number that gives ours, a
    float. `mpp` and `tile_mpp` are additions of ours: the true resolutions of level 0 and of a tile.

    Args:
        slide_id (`str`): the slide.
        mpp (`float`): resolution of level 0, um/px.
        width_px (`int`), height_px (`int`): size of level 0.
        tile_size_px (`int`), tile_mpp (`float`), stride_px (`int`): geometry of the tiles.
        tile_size_level0_px (`int`): side of a tile, level-0 pixels.
    """
    level0, target = magnification(mpp), magnification(tile_mpp)
    if abs(tile_size_px * level0 / target - tile_size_level0_px) > _READ_TOLERANCE * tile_size_level0_px:
        level0 = target * tile_size_level0_px / tile_size_px
    return {
        "patch_size": tile_size_px,
        "patch_size_level0": tile_size_level0_px,
        "level0_magnification": level0,
        "target_magnification": target,
        "overlap": tile_size_px - stride_px,
        "name": slide_id,
        # TRIDENT writes a path of its machine here and reads it nowhere.
        "savetodir": run_name(tile_size_px=tile_size_px, tile_mpp=tile_mpp, stride_px=stride_px),
        "level0_width": width_px,
        "level0_height": height_px,
        "mpp": mpp,
        "tile_mpp": tile_mpp,
    }


def run_name(*, tile_size_px: int, tile_mpp: float, stride_px: int) -> str:
    """Returns the name of the folder for tiles of a geometry, such as "20x_256px_0px_overlap"."""
    return f"{magnification(tile_mpp)}x_{tile_size_px}px_{tile_size_px - stride_px}px_overlap"


def write_trident_coordinates(target: Path, tile_xy: np.ndarray, attributes: Attributes) -> None:
    """Writes `<id>_patches.h5`.

    Args:
        target (`Path`): the file; an existing one is replaced.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): top-left corners, level-0 pixels; N may be 0.
        attributes (`Mapping`): from `coordinate_attributes`.
    """
    require_h5py()
    with atomic_file(target) as temporary, h5py.File(temporary, "w") as file:
        _write_coordinates(file, tile_xy, attributes)


def write_trident_features(
    target: Path, features: np.ndarray, tile_xy: np.ndarray, *, encoder: str, attributes: Attributes
) -> None:
    """Writes the tile features of a slide, `features_<encoder>/<id>.h5`.

    Args:
        target (`Path`): the file; an existing one is replaced.
        features (`np.ndarray` of shape `(N, D)`): stored as float32.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): top-left corners, level-0 pixels.
        encoder (`str`): name of the tile encoder.
        attributes (`Mapping`): from `coordinate_attributes`.

    Raises:
        ValueError: if features and corners differ in number, or a feature is not finite.
    """
    require_h5py()
    features = np.ascontiguousarray(features, dtype=np.float32)
    if features.ndim != 2 or len(features) != len(tile_xy) or not np.isfinite(features).all():
        raise ValueError(
            f"{target.name}: expected finite features (N, D) for {len(tile_xy)} tiles, found shape {features.shape}."
        )
    chunks = (min(_CHUNK_ROWS, len(features)), features.shape[1]) if features.size else None
    with atomic_file(target) as temporary, h5py.File(temporary, "w") as file:
        dataset = file.create_dataset("features", data=features, chunks=chunks)
        dataset.attrs.update(name=attributes["name"], savetodir=target.parent.name, encoder=encoder)
        _write_coordinates(file, tile_xy, attributes)


def _write_coordinates(file: "h5py.File", tile_xy: np.ndarray, attributes: Attributes) -> None:
    dataset = file.create_dataset("coords", data=np.asarray(tile_xy, dtype=np.int64).reshape(-1, 2))
    for name, value in attributes.items():
        dataset.attrs[name] = value


def export_trident(dataset: str | Path, job_dir: str | Path, *, progress: bool = True) -> ExportSummary:
    """Writes the coordinates of a slide dataset in TRIDENT's layout.

    Files are named by slide id. `slides.csv` lists a slide only if its id can be read back from it exactly: TRIDENT
    and our own manifest know a slide by the stem of its file.

    Args:
        dataset (`str` or `Path`): folder of a finished slide dataset.
        job_dir (`str` or `Path`): TRIDENT's job folder; what else lies in it stays.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar if the output is a terminal.

    Returns:
        `ExportSummary`: counts, and the slides that could not be exported or listed.

    Raises:
        ValueError: if the dataset is not finished.
        BlockingIOError: if another process exports to `job_dir`.
        ImportError: if h5py is not installed.
    """
    require_h5py()
    dataset, job_dir = Path(dataset), Path(job_dir)
    info = read_dataset_info(dataset)
    summary = ExportSummary(run_name(**{name: info["geometry"][name] for name in GEOMETRY_KEYS}))
    patches_dir = job_dir / summary.run_name / "patches"
    patches_dir.mkdir(parents=True, exist_ok=True)
    listed: list[Mapping[str, Any]] = []
    hidden = None if progress else True  # None: hidden unless the output is a terminal
    with folder_lock(job_dir):
        for folder in (job_dir, patches_dir):
            remove_temporary(folder)
        for row in tqdm(_iter_slides(dataset, info["files"]), unit="slide", disable=hidden):
            if row["status"] != "ok":
                summary.num_without_tiles += 1
            elif not is_safe_id(row["slide_id"]):
                summary.refused.append(SlideError(row["slide_id"], "unsafe_name", "the id cannot be a file's name"))
            else:
                _export_slide(row, dataset, job_dir, summary)
                listed.append({key: row[key] for key in ("slide_id", "path", "mpp")})
        text, refused = slides_csv(listed)
        write_text(job_dir / CSV_NAME, text)
    summary.refused += refused
    return summary


def _iter_slides(dataset: Path, files: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Yields the rows of all splits, `tile_xy` as int32 (N, 2)."""
    for name in files:
        if name.startswith("slides/"):
            with pq.ParquetFile(dataset / name) as table:
                for batch in table.iter_batches(batch_size=_SLIDES_PER_BATCH, columns=list(_COLUMNS)):
                    corners = batch.column("tile_xy")
                    rows = batch.drop_columns(["tile_xy"]).to_pylist()
                    for row, xy in zip(rows, corners, strict=True):
                        yield row | {"tile_xy": _to_corners(xy)}


def _to_corners(value: pa.ListScalar) -> np.ndarray:
    if value.values is None:
        return np.empty((0, 2), dtype=np.int32)
    return value.values.flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)


def _export_slide(row: Mapping[str, Any], dataset: Path, job_dir: Path, summary: ExportSummary) -> None:
    slide_id, run_dir = row["slide_id"], job_dir / summary.run_name
    names = ("mpp", "width_px", "height_px", "tile_size_px", "tile_mpp", "stride_px", "tile_size_level0_px")
    attributes = coordinate_attributes(slide_id, **{name: row[name] for name in names})
    write_trident_coordinates(run_dir / "patches" / f"{slide_id}_patches.h5", row["tile_xy"], attributes)
    for pictures, folder in (("previews", run_dir / "visualization"), ("thumbnails", job_dir / "thumbnails")):
        source = dataset / pictures / f"{slide_id}.jpg"
        if source.is_file():
            with atomic_file(folder / source.name) as temporary:
                shutil.copyfile(source, temporary)
    outline = dataset / "masks" / f"{slide_id}.geojson"
    if outline.is_file():
        write_json(job_dir / "contours_geojson" / outline.name, move_to_canvas(read_json(outline)))
    summary.num_slides += 1
    summary.num_tiles += len(row["tile_xy"])


def slides_csv(rows: list[Mapping[str, Any]]) -> tuple[str, list[SlideError]]:
    """Returns a table of slides as CSV which no spreadsheet takes for formulas and our manifest reads back exactly.

    A path that starts with a sign such as "=" is written with "./" in front, which names the same file.

    Args:
        rows (`list[Mapping[str, Any]]`): `slide_id`, `path` (relative to the folder of slides) and `mpp` (um/px).

    Returns:
        `tuple[str, list[SlideError]]`: the CSV with the columns `wsi` and `mpp`, and the slides left out of it.
    """
    stems = Counter(Path(row["path"]).stem.casefold() for row in rows)
    text, refused = io.StringIO(), []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("wsi", "mpp"))
    for row in rows:
        problem = _listing_problem(row["slide_id"], row["path"], stems)
        if problem is None:
            is_plain = _SAFE_START.match(row["path"]) is not None
            writer.writerow((row["path"] if is_plain else f"./{row['path']}", repr(float(row["mpp"]))))
        else:
            reason, message = problem
            refused.append(SlideError(row["slide_id"], reason, f"{CSV_NAME} leaves it out: {message}"))
    return text.getvalue(), refused


def _listing_problem(slide_id: str, path: str, stems: Mapping[str, int]) -> tuple[str, str] | None:
    """Returns reason and message if a slide's id cannot be read back from its path in a table."""
    if _CONTROL.search(path) or path != path.rstrip():
        return "unsafe_name", f"its path {path!r} holds control characters or ends with a space; rename the file"
    if Path(path).suffix.lower() not in SLIDE_SUFFIXES:
        return "unsafe_name", f"its path {path!r} has not the suffix of a slide; rename the file"
    if Path(path).stem != slide_id:
        return (
            "unsafe_name",
            f"TRIDENT would call it {Path(path).stem!r}, after its file; rename one of them",
        )
    if stems[Path(path).stem.casefold()] > 1:
        return "duplicate_id", f"other files are called {Path(path).stem!r} too; rename them"
    return None
