# SPDX-License-Identifier: Apache-2.0
"""Tiles one slide, in a worker process, and writes the result as one part: a tile table and a JSON record.

A part is complete when its record exists; it is kept until the dataset is finished, so a killed build goes on where
it stopped. No torch, no datasets here: see `slide_worker`.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from modeling_dre_slcl.atomic_files import atomic_file, read_json, write_json
from modeling_dre_slcl.slide_reader import SlideError, SlideInfo, SlideReader, slide_fingerprint
from modeling_dre_slcl.slide_tiles import draw_tile_grid, iter_tile_batches, tile_slide
from modeling_dre_slcl.tile_grid import TileGrid, TileGridConfig

from .dataset_tables import COORDINATE_SCHEMA, TILE_SCHEMA, TileTableWriter

logger = logging.getLogger(__name__)

STAGES = ("open", "mask", "read_encode", "write")
_BATCH_BYTES = 32 << 20
_MAX_PREVIEW_PX = 1024
_PREVIEW_QUALITY = 85


@dataclass(frozen=True)
class SlideTask:
    """What a worker needs to know to tile a slide.

    Attributes:
        slide_id (`str`): name of the slide and of its part.
        path (`Path`): the slide.
        stored_path (`str`): what messages call the slide, without the folders of this machine.
        mpp (`float` or `None`): micrometres per level-0 pixel, instead of the file's own value.
        fingerprint (`str`): the slide's fingerprint before it is read.
        key (`str`): hash of everything the part depends on.
        grid_config (`TileGridConfig`): where tiles are placed.
        jpeg_quality (`int` or `None`): 1-100; `None` stores coordinates only.
        parts_dir (`Path`): where the part is written.
        previews_dir (`Path`): where the preview is written.
    """

    slide_id: str
    path: Path
    stored_path: str
    mpp: float | None
    fingerprint: str
    key: str
    grid_config: TileGridConfig
    jpeg_quality: int | None
    parts_dir: Path
    previews_dir: Path


@dataclass
class PartRecord:
    """What is known about a slide after it was tiled or refused.

    Attributes:
        slide_id (`str`): the slide.
        key (`str`): hash of everything the part depends on.
        status (`str`): "ok" or "refused".
        reason (`str`): reason code of a refusal, "" if ok.
        message (`str`): the refusal in words.
        vendor, width_px, height_px, mpp: of level 0; `None` if refused.
        tile_size_level0_px (`int` or `None`): side of a tile in level-0 pixels.
        num_tiles (`int`): tiles in the part's table.
        table_bytes (`int`): size of the part's table, to recognise a torn file.
        seconds (`dict[str, float]`): wall time per stage, see `STAGES`.
    """

    slide_id: str
    key: str
    status: str = "ok"
    reason: str = ""
    message: str = ""
    vendor: str | None = None
    width_px: int | None = None
    height_px: int | None = None
    mpp: float | None = None
    tile_size_level0_px: int | None = None
    num_tiles: int = 0
    table_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def refuse_slide(task: SlideTask, reason: str, message: str) -> PartRecord:
    """Returns the record of a refused slide; folders of this machine are taken out of the message."""
    for private, public in ((str(task.path), task.stored_path), (str(task.path.parent), ".")):
        message = message.replace(private, public)
    return PartRecord(task.slide_id, task.key, status="refused", reason=reason, message=message)


def table_path(parts_dir: Path, slide_id: str) -> Path:
    """Returns where a part's tile table lies."""
    return parts_dir / f"{slide_id}.parquet"


def write_record(parts_dir: Path, record: PartRecord) -> None:
    """Writes a part's record, which completes the part."""
    write_json(parts_dir / f"{record.slide_id}.json", asdict(record))


def find_part(parts_dir: Path, slide_id: str, key: str) -> PartRecord | None:
    """Returns the record of a complete part made with the same key; refused slides leave none and are tried again."""
    path = parts_dir / f"{slide_id}.json"
    content = read_json(path) if path.is_file() else {}
    if content.get("key") != key:
        return None
    record = PartRecord(**content)
    table = table_path(parts_dir, slide_id)
    is_whole = table.is_file() and table.stat().st_size == record.table_bytes
    return record if is_whole else None


def tile_one_slide(task: SlideTask) -> PartRecord:
    """Tiles a slide and writes its part; whatever is wrong with the slide becomes a refusal.

    Raises:
        OSError: if the part cannot be written (disk full), which is not the slide's fault.
    """
    cv2.setNumThreads(1)  # the workers themselves are the parallelism
    try:
        record = _tile(task)
        if slide_fingerprint(task.path) != task.fingerprint:
            raise SlideError(task.slide_id, "changed_during_run", "the file was changed while it was read; run again")
    except SlideError as error:
        return refuse_slide(task, error.reason, error.message)
    except OSError:
        raise
    except Exception as error:
        logger.exception("Slide %s cannot be tiled.", task.slide_id)
        return refuse_slide(task, "unreadable", f"{type(error).__name__}: {error}")
    write_record(task.parts_dir, record)
    return record


def _tile(task: SlideTask) -> PartRecord:
    seconds = dict.fromkeys(STAGES, 0.0)
    with _timed(seconds, "open"):
        reader = SlideReader(task.path, slide_id=task.slide_id, mpp=task.mpp)
    with reader:
        info = reader.info
        with _timed(seconds, "mask"):
            grid = tile_slide(reader, task.grid_config)
            _write_preview(reader, task, grid)
    _write_tiles(task, info, grid, seconds)
    return PartRecord(
        slide_id=task.slide_id,
        key=task.key,
        vendor=info.vendor,
        width_px=info.width_px,
        height_px=info.height_px,
        mpp=info.mpp,
        tile_size_level0_px=grid.tile_size_level0_px,
        num_tiles=len(grid),
        table_bytes=table_path(task.parts_dir, task.slide_id).stat().st_size,
        seconds=seconds,
    )


def _write_tiles(task: SlideTask, info: SlideInfo, grid: TileGrid, seconds: dict[str, float]) -> None:
    schema = COORDINATE_SCHEMA if task.jpeg_quality is None else TILE_SCHEMA
    corners = grid.tile_xy.tolist()
    target = table_path(task.parts_dir, task.slide_id)
    with atomic_file(target) as temporary, TileTableWriter(temporary, schema) as writer:
        images = _encoded_tiles(task, info, grid)
        for index, (x, y) in enumerate(corners):
            with _timed(seconds, "read_encode"):
                image = next(images)
            with _timed(seconds, "write"):
                writer.add_tile(task.slide_id, index, (x, y), image)


def _encoded_tiles(task: SlideTask, info: SlideInfo, grid: TileGrid) -> Iterator[bytes | None]:
    """Yields the JPEG bytes of every tile in order, or `None` for each if only coordinates are stored."""
    if task.jpeg_quality is None:
        yield from [None] * len(grid)
        return
    batch_size = max(1, min(256, _BATCH_BYTES // (3 * grid.tile_size_px**2)))
    batches = iter_tile_batches(
        task.path, grid, batch_size=batch_size, mpp=info.mpp, slide_id=task.slide_id, num_threads=1
    )
    for _, pixels in batches:
        for tile in pixels:
            yield encode_jpeg(tile, task.jpeg_quality)


def encode_jpeg(rgb: np.ndarray, quality: int) -> bytes:
    """Encodes uint8 RGB (h, w, 3) as JPEG with 4:2:0 chroma, the usual form of slides' own tiles."""
    succeeded, data = cv2.imencode(
        ".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)]
    )
    if not succeeded:
        raise ValueError(f"A tile of shape {rgb.shape} could not be encoded as JPEG.")
    return data.tobytes()


def _write_preview(reader: SlideReader, task: SlideTask, grid: TileGrid) -> None:
    overview_rgb, downsample = reader.read_overview(task.grid_config.mask_mpp)
    preview = draw_tile_grid(overview_rgb, downsample, reader.info.bounds, grid)
    scale = _MAX_PREVIEW_PX / max(preview.shape[:2])
    if scale < 1:
        size = (max(1, round(preview.shape[1] * scale)), max(1, round(preview.shape[0] * scale)))
        preview = cv2.resize(preview, size, interpolation=cv2.INTER_AREA)
    with atomic_file(task.previews_dir / f"{task.slide_id}.jpg") as temporary:
        temporary.write_bytes(encode_jpeg(preview, _PREVIEW_QUALITY))


@contextmanager
def _timed(seconds: dict[str, Any], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - start
