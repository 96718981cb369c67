# SPDX-License-Identifier: Apache-2.0
"""What a reader process of an embedding run does: opens slides, and reads tiles into memory that all processes share.

Loads no torch. Pixels never pass through a pipe: a task names the places of a shared buffer that it fills.
"""

import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any

import numpy as np

from modeling_dre_slcl.slide_info import SlideError
from modeling_dre_slcl.slide_reader import SlideReader, slide_fingerprint
from modeling_dre_slcl.slide_tiles import tile_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

from .slide_handles import SlideHandles
from .worker_process import report_progress

# A reader is at one or two slides at a time; each open slide may hold some ten MB of decoded tiles.
_MAX_OPEN_SLIDES = 3


@dataclass(frozen=True)
class SlideJob:
    """A slide that is to be embedded.

    Attributes:
        slide_id (`str`): its name.
        path (`Path`): its file, absolute.
        mpp (`float` or `None`): level-0 resolution in um/px, where the file's own is not to be used.
    """

    slide_id: str
    path: Path
    mpp: float | None = None


@dataclass(frozen=True)
class OpenTask:
    """Asks for the tile grid of a slide."""

    job: SlideJob


@dataclass(frozen=True)
class ReadTask:
    """Asks for the pixels of some tiles of a slide.

    Attributes:
        job (`SlideJob`): the slide, with the mpp that its grid was made with.
        fingerprint (`str`): of its file when the grid was made.
        tile_xy (`np.ndarray` of shape `(n, 2)`, int32): top-left corners, level-0 pixels.
        start (`int`): place of the first tile in the shared buffer.
    """

    job: SlideJob
    fingerprint: str
    tile_xy: np.ndarray
    start: int


@dataclass(frozen=True)
class OpenedSlide:
    """What is known of a slide once it is open.

    Attributes:
        fingerprint (`str`): of its file.
        mpp (`float`), width_px (`int`), height_px (`int`): of level 0.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): its tiles, level-0 pixels.
        tile_size_level0_px (`int`): side of a tile, level-0 pixels.
        open_seconds (`float`), mask_seconds (`float`): what opening it took, and finding its tissue.
    """

    fingerprint: str
    mpp: float
    width_px: int
    height_px: int
    tile_xy: np.ndarray
    tile_size_level0_px: int
    open_seconds: float = 0.0
    mask_seconds: float = 0.0


class SlideReading:
    """Serves tasks in a reader process, or in this one; what a slide does comes back as a `SlideError`.

    Args:
        buffer (`SynchronizedArray`): shared bytes, from `multiprocessing`'s `RawArray`.
        grid_config (`TileGridConfig`): geometry of the tiles.
        tissue (`str`): how tissue is found.
    """

    def __init__(self, buffer: "SynchronizedArray[Any]", grid_config: TileGridConfig, tissue: str) -> None:
        self._buffer, self._grid_config, self._tissue = buffer, grid_config, tissue
        self._handles = SlideHandles("/", max_open=_MAX_OPEN_SLIDES)
        self._pixels: np.ndarray | None = None

    def __call__(self, task: OpenTask | ReadTask) -> OpenedSlide | float | SlideError:
        """Does a task.

        Returns:
            `OpenedSlide` for an `OpenTask`, for a `ReadTask` the seconds that it took; or why the slide is refused.
        """
        try:
            return self._open(task.job) if isinstance(task, OpenTask) else self._read(task)
        except SlideError as error:
            self._handles.drop(task.job.slide_id)
            return SlideError(task.job.slide_id, error.reason, error.message)
        except (OSError, MemoryError) as error:
            self._handles.drop(task.job.slide_id)
            text = f"{task.job.path}: {error or type(error).__name__}; look at the file, or give more memory"
            return SlideError(task.job.slide_id, "unreadable", text)

    def _handle(self, job: SlideJob, fingerprint: str | None) -> SlideReader:
        return self._handles.open(job.slide_id, str(job.path), mpp=job.mpp, fingerprint=fingerprint)

    def _open(self, job: SlideJob) -> OpenedSlide:
        start = time.monotonic()
        fingerprint = slide_fingerprint(job.path)
        reader = self._handle(job, None)
        opened = time.monotonic()
        report_progress()
        grid = tile_slide(reader, self._grid_config, tissue=self._tissue)
        info = reader.info
        return OpenedSlide(
            fingerprint=fingerprint,
            mpp=info.mpp,
            width_px=info.width_px,
            height_px=info.height_px,
            tile_xy=grid.tile_xy,
            tile_size_level0_px=grid.tile_size_level0_px,
            open_seconds=opened - start,
            mask_seconds=time.monotonic() - opened,
        )

    def _read(self, task: ReadTask) -> float:
        start = time.monotonic()
        config = self._grid_config
        if self._pixels is None:
            self._pixels = pixel_view(self._buffer, config.tile_size_px)
        reader = self._handle(task.job, task.fingerprint)
        for place, (x, y) in enumerate(task.tile_xy.tolist(), task.start):
            reader.read_tile(x, y, tile_size_px=config.tile_size_px, tile_mpp=config.tile_mpp, out=self._pixels[place])
            report_progress()
        return time.monotonic() - start


def pixel_view(buffer: "SynchronizedArray[Any]", tile_size_px: int) -> np.ndarray:
    """Returns a shared buffer as tiles, `np.ndarray` of shape `(n, tile_size_px, tile_size_px, 3)`, uint8."""
    return np.frombuffer(buffer, dtype=np.uint8).reshape(-1, tile_size_px, tile_size_px, 3)
