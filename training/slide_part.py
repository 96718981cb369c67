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

import cv2
import numpy as np

from modeling_dre_slcl.atomic_files import atomic_file, read_json, write_json
from modeling_dre_slcl.slide_reader import SlideError, SlideReader, slide_fingerprint
from modeling_dre_slcl.slide_tiles import tile_mask
from modeling_dre_slcl.tile_grid import TileGrid, TileGridConfig
from modeling_dre_slcl.tissue import tissue_mask

from .arrow_columns import ByteStrings, join_strings
from .dataset_tables import COORDINATE_SCHEMA, MAX_GROUP_BYTES, MAX_GROUP_TILES, TILE_SCHEMA, TileTableWriter
from .manifest import TileGuide
from .mask_files import read_mask
from .slide_claims import release_claim, take_claim
from .slide_pictures import encode_jpeg, write_pictures
from .worker_process import report_progress

logger = logging.getLogger(__name__)

STAGES = ("open", "mask", "read", "write")
_REFUSED_NAME = "refused"
_SAY_MPP = "Say it in the manifest's mpp column, or for all slides with --slide-mpp"
_ADVICE = {"mpp_missing": _SAY_MPP, "mpp_out_of_range": _SAY_MPP}


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
        tissue (`str`): how tissue is found.
        mask_frame (`str`): where positions in masks count from.
        guide (`TileGuide` or `None`): mask or coordinates of this slide, instead of the tissue that can be seen.
        pixels (`str`): "copy", "encode" or "none"; see `BuildOptions`.
        refuses_misaligned (`bool`): whether a slide of which a tile cannot be copied is refused.
        jpeg_quality (`int`): 1-100, of tiles that are encoded.
        parts_dir (`Path`): where the part is written.
        member (`str`): the process that builds, in whose name the slide is claimed.
    """

    slide_id: str
    path: Path
    stored_path: str
    mpp: float | None
    fingerprint: str
    key: str
    grid_config: TileGridConfig
    tissue: str
    mask_frame: str
    guide: TileGuide | None
    pixels: str
    refuses_misaligned: bool
    jpeg_quality: int
    parts_dir: Path
    member: str = ""

    @property
    def looks_for_tissue(self) -> bool:
        """Whether the tiles are laid over tissue, and not where coordinates say."""
        return self.guide is None or self.guide.kind != "coordinates"


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
        num_copied (`int`): those of them that are the slide's own compressed tiles.
        tissue_fraction (`float` or `None`): share of the scanned area that is tissue; `None` if not looked for.
        table_bytes (`int`): size of the part's table, to recognise a torn file.
        seconds (`dict[str, float]`), cpu_seconds (`dict[str, float]`): by the clock and of the processor, per stage
            of `STAGES`; encoding belongs to "read".
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
    num_copied: int = 0
    tissue_fraction: float | None = None
    table_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)


def refuse_slide(task: SlideTask, reason: str, message: str) -> PartRecord:
    """Returns the record of a refused slide; folders and names of this machine are taken out of the message."""
    hidden = [(str(task.path), task.stored_path), (str(task.path.parent), ".")]
    if task.path.stem not in task.stored_path:
        hidden.append((task.path.stem, task.slide_id))
    if task.guide is not None and task.guide.path.name:
        hidden[:0] = [(str(task.guide.path), "the file"), (task.guide.path.name, "the file")]
    for private, public in hidden:
        message = message.replace(private, public)
    if advice := _ADVICE.get(reason):
        message = f"{message.rstrip('.')}. {advice}"
    return PartRecord(task.slide_id, task.key, status="refused", reason=reason, message=message)


def table_path(parts_dir: Path, slide_id: str) -> Path:
    """Returns where a part's tile table lies."""
    return parts_dir / f"{slide_id}.parquet"


def write_record(parts_dir: Path, record: PartRecord) -> None:
    """Writes a part's record, which completes the part, or the record of a refusal."""
    folder = parts_dir / _REFUSED_NAME if record.status == "refused" else parts_dir
    write_json(folder / f"{record.slide_id}.json", asdict(record))


def find_part(parts_dir: Path, slide_id: str, key: str) -> PartRecord | None:
    """Returns the record of a complete part made with the same key."""
    record = _read_record(parts_dir / f"{slide_id}.json", key)
    table = table_path(parts_dir, slide_id)
    is_whole = record is not None and table.is_file() and table.stat().st_size == record.table_bytes
    return record if is_whole else None


def find_record(parts_dir: Path, slide_id: str, key: str) -> PartRecord | None:
    """Returns the record of a complete part or of a refusal made with the same key."""
    found = find_part(parts_dir, slide_id, key)
    return found or _read_record(parts_dir / _REFUSED_NAME / f"{slide_id}.json", key)


def forget_refusal(parts_dir: Path, slide_id: str) -> None:
    """Removes the record of a refusal, so that the slide is tried again."""
    (parts_dir / _REFUSED_NAME / f"{slide_id}.json").unlink(missing_ok=True)


def _read_record(path: Path, key: str) -> PartRecord | None:
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    return PartRecord(**content) if content.get("key") == key else None


def tile_claimed_slide(task: SlideTask) -> PartRecord | None:
    """Tiles a slide unless another process has done so or is at it; returns `None` in that case of being at it."""
    if not take_claim(task.parts_dir, task.slide_id, task.member):
        return find_record(task.parts_dir, task.slide_id, task.key)
    try:
        # Looked for after the claim: whoever had it before may have finished.
        return find_record(task.parts_dir, task.slide_id, task.key) or tile_one_slide(task)
    finally:
        release_claim(task.parts_dir, task.slide_id, task.member)


def tile_one_slide(task: SlideTask) -> PartRecord:
    """Tiles a slide and writes its part; whatever is wrong with the slide becomes a refusal.

    Raises:
        OSError: if the part cannot be written (disk full), which is not the slide's fault.
        ImportError: if a package is missing that its coordinates need.
    """
    cv2.setNumThreads(1)  # the workers themselves are the parallelism
    try:
        record = _tile(task)
        if slide_fingerprint(task.path) != task.fingerprint:
            raise SlideError(task.slide_id, "changed_during_run", "the file was changed while it was read; run again")
    except SlideError as error:
        record = refuse_slide(task, error.reason, error.message)
    except (OSError, ImportError):
        raise
    except MemoryError:
        record = refuse_slide(task, "too_large", "it takes more memory than a worker may use")
    except Exception as error:
        logger.exception("Slide %s cannot be tiled.", task.slide_id)
        record = refuse_slide(task, "unreadable", f"{type(error).__name__}: {error}")
    write_record(task.parts_dir, record)
    return record


def _tile(task: SlideTask) -> PartRecord:
    timer = StageTimer()
    with timer.stage("open"):
        reader = SlideReader(task.path, slide_id=task.slide_id, mpp=task.mpp, on_read=report_progress)
    with reader:
        with timer.stage("mask"):
            mask = _find_tissue(reader, task)
            grid = _make_grid(reader, task, mask)
            write_pictures(task.parts_dir, reader, task.grid_config.mask_mpp, grid, mask)
        num_copied = _write_tiles(task, reader, grid, timer)
        info = reader.info
    return PartRecord(
        slide_id=task.slide_id,
        key=task.key,
        vendor=info.vendor,
        width_px=info.width_px,
        height_px=info.height_px,
        mpp=info.mpp,
        tile_size_level0_px=grid.tile_size_level0_px,
        num_tiles=len(grid),
        num_copied=num_copied,
        tissue_fraction=None if mask is None else round(float(mask.mean()), 6),
        table_bytes=table_path(task.parts_dir, task.slide_id).stat().st_size,
        seconds=timer.seconds,
        cpu_seconds=timer.cpu_seconds,
    )


def _find_tissue(reader: SlideReader, task: SlideTask) -> np.ndarray | None:
    """Returns the tissue mask, bool (h, w), over the slide's bounds; `None` if coordinates say where the tiles are."""
    if not task.looks_for_tissue:
        return None
    overview_rgb, downsample = reader.read_overview(task.grid_config.mask_mpp)
    if task.guide is None:
        return tissue_mask(overview_rgb, reader.info.mpp * downsample, task.tissue)
    shape = overview_rgb.shape[:2]
    try:
        mask_frame = task.mask_frame
        return read_mask(task.guide.path, info=reader.info, shape=shape, downsample=downsample, frame=mask_frame)
    except ValueError as error:
        message = str(error).replace(str(task.guide.path), task.guide.path.name)
        raise SlideError(task.slide_id, "mask_unusable", message) from error


def _make_grid(reader: SlideReader, task: SlideTask, mask: np.ndarray | None) -> TileGrid:
    """Decides where the tiles of a slide are: the one place for it."""
    if mask is None:
        from .foreign_grids import read_coordinates  # loads HDF5

        reader.check_resolution(task.grid_config.tile_mpp)
        return read_coordinates(task.guide.path, reader.info, task.grid_config)
    _, downsample = reader.read_overview(task.grid_config.mask_mpp)
    return tile_mask(reader, mask, downsample, task.grid_config)


def _write_tiles(task: SlideTask, reader: SlideReader, grid: TileGrid, timer: "StageTimer") -> int:
    """Writes the part's table; returns how many tiles were copied."""
    source = _PixelSource(task, reader)
    schema = COORDINATE_SCHEMA if task.pixels == "none" else TILE_SCHEMA
    target = table_path(task.parts_dir, task.slide_id)
    with timer.stage("write"), atomic_file(target) as temporary, TileTableWriter(temporary, schema) as writer:
        start = 0
        while start < len(grid):
            images = None
            stop = min(start + MAX_GROUP_TILES, len(grid))
            if task.pixels != "none":
                with timer.stage("read"):
                    images = source.read_group(grid.tile_xy[start:stop])
                stop = start + len(images)
            writer.write_group(task.slide_id, start, grid.tile_xy[start:stop], images)
            start = stop
    return source.num_copied


class _PixelSource:
    """Gives the JPEG files of a slide's tiles: the slide's own, or encoded."""

    def __init__(self, task: SlideTask, reader: SlideReader) -> None:
        self.num_copied = 0
        self._reader = reader
        self._size = {"tile_size_px": task.grid_config.tile_size_px, "tile_mpp": task.grid_config.tile_mpp}
        self._quality = task.jpeg_quality
        self._copies = task.pixels == "copy"
        self._refuses = task.refuses_misaligned

    def read_group(self, tile_xy: np.ndarray) -> ByteStrings:
        """Returns the first of the tiles at these level-0 corners, int32 (n, 2): as many as a row group may hold.

        They are valid until the next call.
        """
        report_progress()
        own = ByteStrings(np.empty(0, dtype=np.uint8), np.zeros(len(tile_xy) + 1, dtype=np.int32))
        if self._copies:
            own = ByteStrings(*self._reader.compressed_tiles(tile_xy, **self._size, max_bytes=MAX_GROUP_BYTES))
        if own.lengths.all():
            self.num_copied += len(own)
            return own
        images: list[bytes | memoryview] = []
        num_bytes = 0
        for (x, y), copied in zip(tile_xy.tolist(), own.to_list(), strict=False):
            image = copied or (self._reader.compressed_tile(x, y, **self._size) if self._copies else None)
            is_copied = image is not None
            image = image if is_copied else self._encode(x, y)
            num_bytes += len(image)
            if images and num_bytes > MAX_GROUP_BYTES:
                break
            self.num_copied += is_copied
            images.append(image)
        return join_strings(images)

    def _encode(self, x: int, y: int) -> bytes:
        if self._copies and self._refuses:
            raise SlideError(
                self._reader.info.slide_id,
                "misaligned",
                f"the tile at ({x}, {y}) is not one of the slide's own JPEG tiles, so it cannot be copied; choose "
                "--tile-size and --mpp of a level of the slide, or allow --misaligned encode",
            )
        return encode_jpeg(self._reader.read_tile(x, y, **self._size), self._quality)


class StageTimer:
    """Adds up wall and processor time per stage; time of an inner stage does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.cpu_seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block; may be entered inside another stage."""
        before = self._sums()
        start = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            inner = [now - then for now, then in zip(self._sums(), before, strict=True)]
            self.seconds[name] += time.perf_counter() - start[0] - inner[0]
            self.cpu_seconds[name] += time.process_time() - start[1] - inner[1]

    def _sums(self) -> tuple[float, float]:
        return sum(self.seconds.values()), sum(self.cpu_seconds.values())
