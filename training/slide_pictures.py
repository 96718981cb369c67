# SPDX-License-Identifier: Apache-2.0
"""Pictures of one slide to check a build by: a thumbnail, tissue and tile grid drawn over it, and the mask as GeoJSON.

They lie beside the slide's part until the dataset is finished, so that a build that is given up changes no picture.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from modeling_dre_slcl.atomic_files import atomic_file
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.slide_tiles import draw_tile_grid
from modeling_dre_slcl.tile_grid import TileGrid
from modeling_dre_slcl.tissue import draw_tissue_outline

from .mask_geojson import write_mask_geojson

# Folder -> suffix of a slide's file in it; the same below the parts and in the dataset.
PICTURE_SUFFIXES = {"thumbnails": ".jpg", "previews": ".jpg", "masks": ".geojson"}
_MAX_PICTURE_PX = 1024
_PICTURE_QUALITY = 85


def picture_names(slide_id: str, *, has_mask: bool) -> Iterator[str]:
    """Yields where the pictures of a slide lie, relative to the folder of parts or of the dataset."""
    for folder, suffix in PICTURE_SUFFIXES.items():
        if has_mask or folder != "masks":
            yield f"{folder}/{slide_id}{suffix}"


def write_pictures(
    folder: Path, reader: SlideReader, mask_mpp: float, grid: TileGrid, mask: np.ndarray | None
) -> None:
    """Writes the pictures of an open slide.

    Args:
        folder (`Path`): where the folders of `PICTURE_SUFFIXES` are.
        reader (`SlideReader`): the slide; its overview at `mask_mpp` is read already.
        mask_mpp (`float`): resolution of the overview, um/px.
        grid (`TileGrid`): the slide's tiles.
        mask (`np.ndarray` of shape `(h, w)`, bool, *optional*): its tissue, of the size of the overview.
    """
    slide_id = reader.info.slide_id
    overview_rgb, downsample = reader.read_overview(mask_mpp)
    factor = math.ceil(max(overview_rgb.shape[:2]) / _MAX_PICTURE_PX)  # whole numbers are averaged much faster
    size = [math.ceil(side / factor) for side in overview_rgb.shape[1::-1]]
    thumbnail = cv2.resize(overview_rgb, size, interpolation=cv2.INTER_AREA)
    preview = draw_tile_grid(thumbnail, downsample * factor, reader.info.bounds, grid)
    if mask is not None:
        write_mask_geojson(
            folder / "masks" / f"{slide_id}.geojson", mask, downsample=downsample, bounds=reader.info.bounds
        )
        small = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
        preview = draw_tissue_outline(preview, small)
    for name, picture in (("thumbnails", thumbnail), ("previews", preview)):
        with atomic_file(folder / name / f"{slide_id}.jpg") as temporary:
            temporary.write_bytes(encode_jpeg(picture, _PICTURE_QUALITY))


def encode_jpeg(rgb: np.ndarray, quality: int) -> bytes:
    """Encodes uint8 RGB (h, w, 3) as JPEG with 4:2:0 chroma, the usual form of slides' own tiles."""
    succeeded, data = cv2.imencode(
        ".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)]
    )
    if not succeeded:
        raise ValueError(f"A tile of shape {rgb.shape} could not be encoded as JPEG.")
    return data.tobytes()
