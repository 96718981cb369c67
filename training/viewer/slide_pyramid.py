# SPDX-License-Identifier: Apache-2.0
"""A slide as Deep Zoom tiles, through OpenSlide's own `DeepZoomGenerator`, for many threads."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import PIL.Image
from openslide.deepzoom import DeepZoomGenerator

from modeling_dre_slcl.slide_info import SlideInfo
from modeling_dre_slcl.slide_reader import SlideError, SlideReader

TILE_PX = 256
JPEG_QUALITY = 85
_MAX_READ_PX = 4096**2
_MAX_OVERVIEW_PX = 2048
_Handle = tuple[openslide.OpenSlide, DeepZoomGenerator]


class SlidePyramid:
    """Deep Zoom levels and tiles of one slide. Safe to use from several threads: each reads through its own handle.

    Tiles have 256 px and do not overlap; only the scanned area (OpenSlide's bounds) is shown. Level L has the size of
    the area divided by 2 ** (number of levels - 1 - L), so the last level is the slide itself.

    Args:
        path (`str` or `Path`): the slide.
        slide_id (`str`): its name.
        mpp (`float`, *optional*): level-0 resolution in um/px, for a file that does not state it.

    Raises:
        SlideError: if the slide is refused.
    """

    def __init__(self, path: str | Path, slide_id: str, mpp: float | None = None) -> None:
        self.path, self.slide_id = Path(path), slide_id
        # Its checks come first: they refuse files that would harm the library.
        with SlideReader(self.path, slide_id=slide_id, mpp=mpp) as reader:
            self.info: SlideInfo = reader.info
        self._lock = threading.Lock()
        self._idle: list[_Handle] = []
        self._overview: np.ndarray | None = None
        self._overview_lock = threading.Lock()
        with self._generator() as generator:
            self.level_sizes: list[tuple[int, int]] = list(generator.level_dimensions)
            self._level_tiles = list(generator.level_tiles)

    def describe(self) -> dict[str, Any]:
        """What a viewer needs to know: sizes in pixels, resolution in um/px, level-0 corner of the shown area."""
        left, top = self.info.bounds[:2]
        return {
            "slide_id": self.slide_id,
            "width_px": self.level_sizes[-1][0],
            "height_px": self.level_sizes[-1][1],
            "num_levels": len(self.level_sizes),
            "tile_px": TILE_PX,
            "mpp": self.info.mpp,
            "left_px": left,
            "top_px": top,
        }

    def tile(self, level: int, column: int, row: int) -> PIL.Image.Image:
        """Reads one tile.

        Args:
            level (`int`): Deep Zoom level; 0 is one pixel.
            column (`int`), row (`int`): of the tile in its level.

        Returns:
            `PIL.Image.Image`: RGB, up to 256 x 256 px.

        Raises:
            IndexError: if there is no such tile.
            SlideError: if the pixels can not be read.
        """
        if not 0 <= level < len(self.level_sizes):
            raise IndexError(f"{self.slide_id}: no level {level}")
        columns, rows = self._level_tiles[level]
        if not (0 <= column < columns and 0 <= row < rows):
            raise IndexError(f"{self.slide_id}: no tile {column}, {row} in level {level}")
        with self._generator() as generator:
            _, _, (width, height) = generator.get_tile_coordinates(level, (column, row))
            if width * height <= _MAX_READ_PX:
                return generator.get_tile(level, (column, row))
        # Without a small level of its own the whole slide would be read at once.
        return self._tile_of_overview(level, column, row)

    def tile_jpeg(self, level: int, column: int, row: int) -> bytes:
        """A tile as a JPEG file; raises as `tile`."""
        buffer = io.BytesIO()
        self.tile(level, column, row).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()

    def thumbnail_jpeg(self, size_px: int) -> bytes:
        """The whole slide as a JPEG file whose longer side has at most `size_px` px."""
        large = [level for level, size in enumerate(self.level_sizes) if max(size) >= size_px]
        picture = self._stitch(min(large, default=len(self.level_sizes) - 1))
        picture.thumbnail((size_px, size_px))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()

    def close(self) -> None:
        """Closes the handles that are not in use."""
        with self._lock:
            handles, self._idle = self._idle, []
        for slide, _ in handles:
            slide.close()

    def _stitch(self, level: int) -> PIL.Image.Image:
        columns, rows = self._level_tiles[level]
        # Tiles at the edges may lack a pixel.
        whole = PIL.Image.new("RGB", self.level_sizes[level], "white")
        for row in range(rows):
            for column in range(columns):
                whole.paste(self.tile(level, column, row), (column * TILE_PX, row * TILE_PX))
        return whole

    def _tile_of_overview(self, level: int, column: int, row: int) -> PIL.Image.Image:
        with self._overview_lock:
            if self._overview is None:
                with SlideReader(self.path, slide_id=self.slide_id, mpp=self.info.mpp) as reader:
                    side = max(self.info.bounds[2:])
                    self._overview = reader.read_overview(self.info.mpp * max(1.0, side / _MAX_OVERVIEW_PX))[0]
        whole = PIL.Image.fromarray(self._overview).resize(self.level_sizes[level], PIL.Image.Resampling.BOX)
        left, top = column * TILE_PX, row * TILE_PX
        return whole.crop((left, top, min(left + TILE_PX, whole.width), min(top + TILE_PX, whole.height)))

    @contextmanager
    def _generator(self) -> Iterator[DeepZoomGenerator]:
        """Lends a handle to one thread; one that fails is closed, since every later read would fail too."""
        with self._lock:
            handle = self._idle.pop() if self._idle else None
        try:
            if handle is None:
                slide = openslide.OpenSlide(self.path)
                handle = slide, DeepZoomGenerator(slide, tile_size=TILE_PX, overlap=0, limit_bounds=True)
            yield handle[1]
        except openslide.OpenSlideError as error:
            if handle is not None:
                handle[0].close()
            raise SlideError(self.slide_id, "unreadable", f"{self.path}: OpenSlide says: {error}") from error
        with self._lock:
            self._idle.append(handle)
