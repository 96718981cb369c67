# SPDX-License-Identifier: Apache-2.0
"""Tissue masks as GeoJSON: written so that QuPath opens them, and read as QuPath and others write them.

Coordinates stand in one of two frames. `qupath`: what QuPath shows, level-0 pixels from the top-left corner of the
scanned area (`SlideInfo.bounds`). `canvas`: level-0 pixels of OpenSlide's canvas, as TRIDENT and CLAM write. The two
differ only for formats whose canvas is larger than the scanned area (MIRAX, Leica SCN). GeoJSON written here says its
frame, and is read in it. Pixels of masks in memory count from the top-left corner of the bounds, as in `tile_grid`.

Source: RFC 7946; for the properties of annotations, QuPath's `PathObjectTypeAdapters`; for its frame, QuPath's
`OpenslideImageServer`, which crops to the bounds.
"""

import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modeling_dre_slcl.atomic_files import write_text
from modeling_dre_slcl.regions import list_of, parse_geojson, ring_points
from modeling_dre_slcl.slide_info import SlideInfo

from .mask_outlines import MAX_FILL_COST, fill_polygon, trace_outlines

MASK_FRAMES = ("qupath", "canvas")
# Regions of these classes (in any case, with or without QuPath's "*") are cut out of the tissue.
EXCLUDED_CLASSES = frozenset({"ignore", "background", "exclude", "artifact", "artefact"})
# Objects of QuPath that are measurements rather than drawn regions.
_SKIPPED_OBJECTS = frozenset({"detection", "cell", "tile", "root"})
_TISSUE_CLASS = {"name": "Tissue", "color": [0, 150, 60]}
_FRAME_KEY, _BOUNDS_KEY = "dre_slcl_frame", "dre_slcl_bounds"
_MAX_OVERHANG = 0.05  # of the slide's size, by which outlines may reach beyond it


def mask_to_geojson(
    mask: np.ndarray, *, downsample: float, bounds: tuple[int, int, int, int], frame: str = "qupath"
) -> dict[str, Any]:
    """Turns a tissue mask into GeoJSON that QuPath (0.4 and later) opens as annotations.

    One feature per connected piece of tissue: a polygon with its holes, class "Tissue", and TRIDENT's property
    `tissue_id`. `read_mask` makes the same mask of it again, but for pixels that met only at a corner.

    Args:
        mask (`np.ndarray` of shape `(h, w)`, bool): True where there is tissue; covers the bounds.
        downsample (`float`): level-0 pixels per mask pixel.
        bounds (`tuple[int, int, int, int]`): x, y, width, height of the scanned area, level-0 pixels.
        frame (`str`, defaults to `"qupath"`): one of `MASK_FRAMES`.

    Returns:
        `dict`: a FeatureCollection; the same mask gives the same one, ids included.

    Raises:
        ValueError: if an argument is not of the expected form.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"mask: expected (h, w) bool, found {mask.shape} {mask.dtype}.")
    if not (math.isfinite(downsample) and downsample > 0):
        raise ValueError(f"downsample: expected a positive number, found {downsample}.")
    origin = frame_origin(frame, bounds)
    # The last row and column of a mask may reach beyond the bounds by a part of a pixel.
    corner = np.array(bounds[2:], dtype=np.float64)
    features = []
    for number, rings in enumerate(trace_outlines(mask)):
        coordinates = []
        for ring in rings:
            points = np.round(np.minimum(ring * downsample, corner) + np.array(bounds[:2]) - origin, 2).tolist()
            coordinates.append([*points, points[0]])
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(coordinates))),
                "geometry": {"type": "Polygon", "coordinates": coordinates},
                "properties": {"objectType": "annotation", "classification": _TISSUE_CLASS, "tissue_id": number},
            }
        )
    return {"type": "FeatureCollection", _FRAME_KEY: frame, _BOUNDS_KEY: list(bounds), "features": features}


def move_to_canvas(geojson: dict[str, Any]) -> dict[str, Any]:
    """Moves what `mask_to_geojson` made to the frame in which TRIDENT and CLAM draw: OpenSlide's canvas.

    Args:
        geojson (`dict`): the FeatureCollection; it is changed.

    Returns:
        `dict`: the same one.
    """
    if geojson.get(_FRAME_KEY) == "qupath" and _BOUNDS_KEY in geojson:
        left, top = geojson[_BOUNDS_KEY][:2]
        for feature in geojson["features"]:
            rings = feature["geometry"]["coordinates"]
            feature["geometry"]["coordinates"] = [[[x + left, y + top] for x, y in ring] for ring in rings]
        geojson[_FRAME_KEY] = "canvas"
    return geojson


def write_mask_geojson(
    path: str | Path,
    mask: np.ndarray,
    *,
    downsample: float,
    bounds: tuple[int, int, int, int],
    frame: str = "qupath",
) -> None:
    """Writes `mask_to_geojson` to a file, atomically."""
    geojson = mask_to_geojson(mask, downsample=downsample, bounds=bounds, frame=frame)
    write_text(path, json.dumps(geojson, separators=(",", ":"), allow_nan=False) + "\n")


def read_mask_geojson(
    path: str | Path, *, info: SlideInfo, shape: tuple[int, int], downsample: float, frame: str = "qupath"
) -> np.ndarray:
    """Reads a tissue mask from GeoJSON; see `read_mask` for what counts as tissue, and for the limit of its size.

    Args:
        path (`str` or `Path`): the file.
        info (`SlideInfo`): the slide.
        shape (`tuple[int, int]`): rows and columns of the mask, which covers the slide's bounds.
        downsample (`float`): level-0 pixels per pixel of the mask.
        frame (`str`, defaults to `"qupath"`): one of `MASK_FRAMES`; a file that says its frame is read in that.

    Returns:
        `np.ndarray` of shape `shape`, bool: True where there is tissue.

    Raises:
        ValueError: if the file is no GeoJSON, or not of this slide; the message names it.
    """
    content = parse_geojson(Path(path))
    if isinstance(content, dict):
        frame = content.get(_FRAME_KEY, frame)
    try:
        shift = frame_origin(frame, info.bounds) - np.array(info.bounds[:2])
        masks = {is_excluded: np.zeros(shape, dtype=bool) for is_excluded in (False, True)}
        num_objects = num_polygons = 0
        budget = MAX_FILL_COST
        for is_excluded, polygons in _regions(content):
            num_objects += 1
            for rings in filter(None, polygons):
                num_polygons += 1
                outlines = [ring_points(ring) for ring in rings]
                _check_on_slide(outlines, info, frame)
                rings = [(outline + shift) / downsample for outline in outlines]
                budget -= fill_polygon(masks[is_excluded], rings, max_cost=budget)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not a GeoJSON mask of this slide: {reason}.") from error
    if num_objects and not num_polygons:
        raise ValueError(f"{path}: expected polygons, found none in its {num_objects} objects.")
    return masks[False] & ~masks[True]


def frame_origin(frame: str, bounds: tuple[int, int, int, int]) -> np.ndarray:
    """Where a frame's (0, 0) lies on the canvas.

    Args:
        frame (`str`): one of `MASK_FRAMES`.
        bounds (`tuple[int, int, int, int]`): x, y, width, height of the scanned area, level-0 pixels.

    Returns:
        `np.ndarray` of shape `(2,)`, int64: (x, y), level-0 pixels.

    Raises:
        ValueError: if there is no such frame.
    """
    if frame not in MASK_FRAMES:
        raise ValueError(f"frame: expected one of {', '.join(MASK_FRAMES)}, found {frame!r}.")
    return np.array(bounds[:2] if frame == "qupath" else (0, 0))


def _regions(content: Any) -> Iterator[tuple[bool, list[Any]]]:
    """Yields for each object whether it is cut out, and its polygons as lists of rings, in the order of the file."""
    pending = [(content, False)]
    while pending:
        item, is_excluded = pending.pop()
        if isinstance(item, list):
            pending += [(member, is_excluded) for member in reversed(item)]
            continue
        if not isinstance(item, dict):
            raise ValueError(f"expected an object with a type, found {str(item)[:40]!r}")
        kind = item.get("type")
        if kind == "FeatureCollection":
            pending.append((list_of(item, "features"), is_excluded))
        elif kind == "GeometryCollection":
            pending.append((list_of(item, "geometries"), is_excluded))
        elif kind == "Feature":
            properties = item.get("properties") or {}
            if not isinstance(properties, dict):
                raise ValueError("properties: expected an object")
            if item.get("geometry") is None or _object_type(item, properties) in _SKIPPED_OBJECTS:
                yield False, []
            else:
                pending.append((item["geometry"], _is_excluded(properties)))
        elif kind == "Polygon":
            yield is_excluded, [list_of(item, "coordinates")]
        elif kind == "MultiPolygon":
            yield is_excluded, list_of(item, "coordinates")
        elif kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
            yield False, []
        else:
            raise ValueError(f"expected a type of GeoJSON, found {str(kind)[:40]!r}")


def _object_type(feature: dict[str, Any], properties: dict[str, Any]) -> str:
    """What QuPath calls the object, such as "annotation"; QuPath 0.2 wrote names like PathCellObject as the id."""
    name = properties.get("objectType", properties.get("object_type", feature.get("id")))
    return str(name).removeprefix("Path").removesuffix("Object").lower()


def _is_excluded(properties: dict[str, Any]) -> bool:
    """Whether a region's class says that it is no tissue; of "Ignore*: Necrosis" the first part counts."""
    label = properties.get("classification")
    if isinstance(label, dict):
        label = label.get("name", (label.get("names") or [None])[0])
    return isinstance(label, str) and label.partition(":")[0].strip().rstrip("*").lower() in EXCLUDED_CLASSES


def _check_on_slide(outlines: list[np.ndarray], info: SlideInfo, frame: str) -> None:
    """Refuses outlines that leave the slide: they belong to another slide, frame or resolution."""
    size = np.array(info.bounds[2:] if frame == "qupath" else (info.width_px, info.height_px))
    low, high = np.min([o.min(axis=0) for o in outlines], axis=0), np.max([o.max(axis=0) for o in outlines], axis=0)
    if (low < -_MAX_OVERHANG * size).any() or (high > (1 + _MAX_OVERHANG) * size).any():
        raise ValueError(
            f"an outline reaches from {tuple(low.tolist())} to {tuple(high.tolist())}, but the slide has "
            f"{size[0]} x {size[1]} px at level 0 (frame {frame!r}). Coordinates must be level-0 pixels of this slide"
        )
