# SPDX-License-Identifier: Apache-2.0
"""Regions of a slide, drawn in QuPath or given as numbers, and the tiles that lie in them.

A region's embedding needs no new encoding: its state is the sum over its tiles, and what is left of the slide is the
slide's state minus it.

```python
inside = tiles_in_region(read_regions("slide.geojson")[0], tile_xy, tile_size_level0_px)
region = model.state_of_tiles(tile_features[inside])
rest = model.state_of_tiles(tile_features) - region
```

Source: RFC 7946; for names of annotations, QuPath's `PathObjectTypeAdapters`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_EDGES_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a slide.

    Args:
        name (`str`): what it is called.
        polygons (`tuple` of `tuple` of `np.ndarray` of shape `(n, 2)`, float64): the rings of each polygon, the outer
            one first, then its holes; (x, y), level-0 pixels of the canvas.
    """

    name: str
    polygons: tuple[tuple[np.ndarray, ...], ...]


def box_region(x: float, y: float, width: float, height: float, name: str = "box") -> Region:
    """Returns the region of a box, level-0 pixels of the canvas.

    Raises:
        ValueError: if its width or height is not positive.
    """
    if not (width > 0 and height > 0):
        raise ValueError(f"Expected a box of positive width and height, found {width} x {height}.")
    ring = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], dtype=np.float64)
    return Region(name, ((ring,),))


def read_regions(path: str | Path, *, origin_xy: tuple[float, float] = (0.0, 0.0)) -> list[Region]:
    """Reads the areas of a GeoJSON file, as QuPath and others write them; points and lines are passed over.

    A region is called after its `name`, or its class, or its number in the file.

    Args:
        path (`str` or `Path`): the file; coordinates are level-0 pixels.
        origin_xy (`tuple` of two `float`, defaults to `(0.0, 0.0)`): where the file's (0, 0) lies on the canvas. For
            QuPath that is the corner of `SlideInfo.bounds`, which differs from zero for MIRAX and Leica only.

    Returns:
        `list` of `Region`: at least one, in the order of the file.

    Raises:
        ValueError: if the file is no GeoJSON or holds no area; the message names it.
    """
    content = parse_geojson(Path(path))
    regions = []
    try:
        for feature, geometry in _areas(content, {}):
            kind, coordinates = geometry["type"], list_of(geometry, "coordinates")
            polygons = [coordinates] if kind == "Polygon" else coordinates
            rings = tuple(tuple(ring_points(ring) + origin_xy for ring in rings) for rings in polygons if rings)
            if rings:
                regions.append(Region(_name_of(feature) or f"region {len(regions) + 1}", rings))
    except (TypeError, ValueError, KeyError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not GeoJSON of regions: {reason}.") from error
    if not regions:
        raise ValueError(f"{path}: expected at least one polygon, found none; draw an area and export it again.")
    return regions


def tiles_in_region(region: Region, tile_xy: np.ndarray, tile_size_level0_px: float) -> np.ndarray:
    """Which tiles lie in a region: those whose centre does (even-odd rule within a polygon).

    So tiles that do not overlap are divided without rest among regions that do not.

    Args:
        region (`Region`): the region.
        tile_xy (`np.ndarray` of shape `(N, 2)`): top-left corners of tiles, level-0 pixels of the canvas.
        tile_size_level0_px (`float`): side of a tile, level-0 pixels.

    Returns:
        `np.ndarray` of shape `(N,)`, bool: True for tiles inside.
    """
    centres = np.asarray(tile_xy, dtype=np.float64) + tile_size_level0_px / 2
    inside = np.zeros(len(centres), dtype=bool)
    for rings in region.polygons:
        low, high = (
            np.min([ring.min(axis=0) for ring in rings], axis=0),
            np.max([r.max(axis=0) for r in rings], axis=0),
        )
        near = ((centres >= low) & (centres <= high)).all(axis=1)
        inside[near] |= _is_enclosed(centres[near], rings)
    return inside


def _is_enclosed(points: np.ndarray, rings: tuple[np.ndarray, ...]) -> np.ndarray:
    """Even-odd rule for points `(n, 2)`: how often a ray to the right crosses the rings."""
    start = np.concatenate(rings)
    stop = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    is_odd = np.zeros(len(points), dtype=bool)
    x, y = points[:, :1], points[:, 1:]
    for first in range(0, len(start), _EDGES_AT_ONCE):
        (x1, y1), (x2, y2) = (ends[first : first + _EDGES_AT_ONCE].T for ends in (start, stop))
        passes = (y1 <= y) != (y2 <= y)
        with np.errstate(divide="ignore", invalid="ignore"):  # of level edges, which no ray passes
            crossing = x1 + (y - y1) * (x2 - x1) / (y2 - y1)
        is_odd ^= (passes & (crossing > x)).sum(axis=1) % 2 == 1
    return is_odd


def parse_geojson(path: Path) -> Any:
    """Reads a JSON file as GeoJSON: integers become floats, NaN and infinity are refused.

    Raises:
        ValueError: if it cannot be parsed; names the file.
    """

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no number")

    try:
        # Integers as floats: a number of a million digits would take Python minutes.
        return json.loads(path.read_bytes().decode("utf-8-sig"), parse_int=float, parse_constant=refuse)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: expected GeoJSON, but it could not be parsed ({error}).") from error


def list_of(item: dict[str, Any], key: str) -> list[Any]:
    """Returns a member that must be a list.

    Raises:
        ValueError: if it is anything else.
        KeyError: if it is absent.
    """
    if not isinstance(item[key], list):
        raise ValueError(f"{key}: expected a list")
    return item[key]


def ring_points(ring: Any) -> np.ndarray:
    """Checks one ring of a GeoJSON polygon; returns `np.ndarray` of shape `(n, 2)`, float64.

    Raises:
        ValueError: if it is not of at least three finite points.
    """
    try:
        points = np.array([point[:2] for point in ring], dtype=np.float64)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"expected rings of [x, y] pairs, found {str(ring)[:60]!r}") from error
    if points.ndim != 2 or len(points) < 3 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"expected rings of at least three finite [x, y] pairs, found {str(ring)[:60]!r}")
    return points


def _areas(content: Any, feature: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields each polygon or multi-polygon with the feature that it belongs to, in the order of the file."""
    pending = [(content, feature)]
    while pending:
        item, feature = pending.pop()
        if isinstance(item, list):
            pending += [(member, feature) for member in reversed(item)]
            continue
        if not isinstance(item, dict):
            raise ValueError(f"expected an object with a type, found {str(item)[:40]!r}")
        kind = item.get("type")
        if kind in ("FeatureCollection", "GeometryCollection"):
            members = list_of(item, "features" if kind == "FeatureCollection" else "geometries")
            pending.append((members, feature))
        elif kind == "Feature":
            if item.get("geometry") is not None:
                pending.append((item["geometry"], item))
        elif kind in ("Polygon", "MultiPolygon"):
            yield feature, item
        elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
            raise ValueError(f"expected a type of GeoJSON, found {str(kind)[:40]!r}")


def _name_of(feature: dict[str, Any]) -> str:
    properties = feature.get("properties") or {}
    label = properties.get("classification") or {}
    found = properties.get("name") or (label.get("name") if isinstance(label, dict) else label)
    return str(found) if found else ""


__all__ = ["Region", "box_region", "list_of", "parse_geojson", "read_regions", "ring_points", "tiles_in_region"]
