# SPDX-License-Identifier: Apache-2.0
"""Scores and codewords of tiles as files: a picture with its scale, GeoJSON for QuPath, a Parquet table.

Scores are drawn from blue (against) over white to red (for), with zero always white and the scale ending at the 98th
percentile of their size, so that single outliers do not flatten the rest; the GeoJSON and the table hold them as they
are.

Source: RFC 7946; for the properties of objects, QuPath's `PathObjectTypeAdapters`.

Letters: N tiles, K codewords.
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from modeling_dre_slcl.atomic_files import atomic_file, write_text

from .mask_geojson import frame_origin

_SCORE_COLOURS, _OPACITY, _SCALE_PERCENTILE = "RdBu_r", 0.6, 98
_MAX_PICTURE_PX = 1600
_DPI = 130


@dataclass(frozen=True, eq=False)
class TileMap:
    """What is known of each tile of a slide.

    Args:
        slide_id (`str`): the slide.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): top-left corners, level-0 pixels of the canvas.
        tile_size_level0_px (`int`): side of a tile, level-0 pixels.
        codewords (`np.ndarray` of shape `(N,)`, int): the codeword of each tile.
        num_codewords (`int`): K.
        scores (`np.ndarray` of shape `(N,)`, float, *optional*): a finite number per tile.
        title (`str`, defaults to `""`): what the scores are of.

    Raises:
        ValueError: if there is not one codeword, and one finite score, per tile.
    """

    slide_id: str
    tile_xy: np.ndarray
    tile_size_level0_px: int
    codewords: np.ndarray
    num_codewords: int
    scores: np.ndarray | None = None
    title: str = ""

    def __post_init__(self) -> None:
        number = len(self.tile_xy)
        for name in ("codewords", "scores"):
            values = getattr(self, name)
            if values is not None and (values.shape != (number,) or not np.isfinite(values).all()):
                raise ValueError(f"{name}: expected {number} finite numbers, one per tile, found {values.shape}.")


def score_limit(scores: np.ndarray) -> float:
    """Returns where the colour scale of scores ends, on both sides of zero."""
    limit = float(np.percentile(np.abs(scores), _SCALE_PERCENTILE)) if len(scores) else 0.0
    return limit or float(np.abs(scores).max(initial=0)) or 1.0


def tile_colours(tiles: TileMap, *, by_codeword: bool = False) -> np.ndarray:
    """Returns the colour of each tile, by its score or by its codeword: `np.ndarray` of shape `(N, 3)`, uint8 RGB."""
    if by_codeword:
        return _codeword_palette(tiles.num_codewords)[tiles.codewords]
    limit = score_limit(tiles.scores)
    unit = np.clip(tiles.scores / (2 * limit) + 0.5, 0, 1)
    return (mpl.colormaps[_SCORE_COLOURS](unit)[:, :3] * 255).round().astype(np.uint8)


def paint_tiles(
    overview_rgb: np.ndarray, downsample: float, bounds: tuple[int, int, int, int], tiles: TileMap, colours: np.ndarray
) -> np.ndarray:
    """Lays a colour per tile over an overview; where tiles overlap, their colours are averaged.

    Args:
        overview_rgb (`np.ndarray` of shape `(h, w, 3)`, uint8): picture of the bounds, from `read_overview`.
        downsample (`float`): level-0 pixels per overview pixel.
        bounds (`tuple[int, int, int, int]`): x, y, width, height shown by the overview, level-0 pixels.
        tiles (`TileMap`): the tiles.
        colours (`np.ndarray` of shape `(N, 3)`, uint8): from `tile_colours`.

    Returns:
        `np.ndarray` of shape `(h, w, 3)`, uint8.
    """
    height, width = overview_rgb.shape[:2]
    start = (tiles.tile_xy - np.array(bounds[:2])) / downsample
    stop = start + tiles.tile_size_level0_px / downsample
    start = np.clip(np.rint(start).astype(np.int64), 0, [width - 1, height - 1])
    stop = np.clip(np.rint(stop).astype(np.int64), start + 1, [width, height])
    total, count = np.zeros(overview_rgb.shape, dtype=np.float32), np.zeros((height, width, 1), dtype=np.float32)
    for (left, top), (right, bottom), colour in zip(start.tolist(), stop.tolist(), colours, strict=True):
        total[top:bottom, left:right] += colour
        count[top:bottom, left:right] += 1
    # Grey, so that the stain does not read as a score.
    grey = overview_rgb.mean(axis=2, keepdims=True)
    painted = _OPACITY * total / np.maximum(count, 1) + (1 - _OPACITY) * grey
    return np.where(count > 0, painted, overview_rgb).round().astype(np.uint8)


def draw_tile_map(
    path: str | Path,
    overview_rgb: np.ndarray,
    downsample: float,
    bounds: tuple[int, int, int, int],
    tiles: TileMap,
    *,
    by_codeword: bool = False,
) -> None:
    """Writes the overview with its tiles coloured by score, or by codeword, and the scale beside it, as PNG.

    Arguments as in `paint_tiles`; `path` is replaced atomically.
    """
    step = max(1, -(-max(overview_rgb.shape[:2]) // _MAX_PICTURE_PX))
    overview_rgb, downsample = overview_rgb[::step, ::step], downsample * step
    picture = paint_tiles(overview_rgb, downsample, bounds, tiles, tile_colours(tiles, by_codeword=by_codeword))
    height, width = picture.shape[:2]
    scale = 8 / max(height, width)
    figure = Figure(figsize=(max(3.5, width * scale + 1.6), max(3.0, height * scale + 0.6)), dpi=_DPI)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    if by_codeword:
        bar = _codeword_scale(tiles.num_codewords)
        figure.colorbar(bar, ax=axes, label="codeword", ticks=range(tiles.num_codewords), fraction=0.05)
    else:
        limit = score_limit(tiles.scores)
        bar = ScalarMappable(Normalize(-limit, limit), _SCORE_COLOURS)
        label = "against  \N{LEFTWARDS ARROW}  what the score loses without the tile  \N{RIGHTWARDS ARROW}  for"
        scale = figure.colorbar(bar, ax=axes, label=label, extend="both", extendfrac=0.03, fraction=0.05, shrink=0.8)
        # Effects of single tiles are small: 5 and a power of ten beside the scale, not 0.00050.
        scale.formatter.set_powerlimits((-2, 3))
        scale.outline.set_visible(False)
    axes.set_title(tiles.title or tiles.slide_id, loc="left", fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def tile_map_geojson(
    tiles: TileMap, *, bounds: tuple[int, int, int, int], frame: str = "qupath", by_codeword: bool = False
) -> dict[str, Any]:
    """Turns scored tiles into GeoJSON that QuPath (0.4 and later) opens as tiles with measurements.

    Args:
        tiles (`TileMap`): the tiles.
        bounds (`tuple[int, int, int, int]`): x, y, width, height of the scanned area, level-0 pixels.
        frame (`str`, defaults to `"qupath"`): one of `MASK_FRAMES`, see `mask_geojson`.
        by_codeword (`bool`, defaults to `False`): colour by codeword instead of score.

    Returns:
        `dict`: a FeatureCollection; the same tiles give the same one, ids included.
    """
    corners = (tiles.tile_xy - frame_origin(frame, bounds)).tolist()
    side = tiles.tile_size_level0_px
    colours = tile_colours(tiles, by_codeword=by_codeword).tolist()
    features = []
    for number, ((x, y), colour) in enumerate(zip(corners, colours, strict=True)):
        measurements = {"codeword": int(tiles.codewords[number])}
        if tiles.scores is not None:
            measurements["score"] = float(tiles.scores[number])
        properties = {"objectType": "tile", "color": colour, "measurements": measurements, "tile_index": number}
        if by_codeword:
            properties["classification"] = {"name": f"codeword {measurements['codeword']}", "color": colour}
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{tiles.slide_id} {number} {ring}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": properties,
            }
        )
    return {
        "type": "FeatureCollection",
        "dre_slcl_frame": frame,
        "dre_slcl_bounds": list(bounds),
        "features": features,
    }


def write_tile_map_geojson(path: str | Path, tiles: TileMap, **options: Any) -> None:
    """Writes `tile_map_geojson` to a file, atomically; options as there."""
    geojson = tile_map_geojson(tiles, **options)
    write_text(path, json.dumps(geojson, separators=(",", ":"), allow_nan=False) + "\n")


def write_tile_map_table(path: str | Path, tiles: TileMap) -> None:
    """Writes slide_id, x, y (level-0 pixels), score and codeword of each tile to a Parquet file, atomically.

    The schema's metadata holds `tile_size_level0_px` and `title`.
    """
    number = len(tiles.tile_xy)
    scores = pa.nulls(number, pa.float32()) if tiles.scores is None else pa.array(tiles.scores, pa.float32())
    columns = {
        "slide_id": pa.array([tiles.slide_id] * number, pa.string()),
        "x": pa.array(tiles.tile_xy[:, 0], pa.int32()),
        "y": pa.array(tiles.tile_xy[:, 1], pa.int32()),
        "score": scores,
        "codeword": pa.array(tiles.codewords, pa.int32()),
    }
    facts = {"tile_size_level0_px": str(tiles.tile_size_level0_px), "title": tiles.title}
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns).replace_schema_metadata(facts), temporary)


def _codeword_palette(num_codewords: int) -> np.ndarray:
    """A colour per codeword, uint8 (K, 3)."""
    if num_codewords <= 20:
        colours = mpl.colormaps["tab20"](np.arange(num_codewords))
    else:
        colours = mpl.colormaps["hsv"](np.arange(num_codewords) / num_codewords)
    return (colours[:, :3] * 255).round().astype(np.uint8)


def _codeword_scale(num_codewords: int) -> ScalarMappable:
    return ScalarMappable(Normalize(-0.5, num_codewords - 0.5), ListedColormap(_codeword_palette(num_codewords) / 255))
