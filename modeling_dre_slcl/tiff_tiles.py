# SPDX-License-Identifier: Apache-2.0
"""The compressed tiles of a tiled JPEG TIFF: where they lie in the file, their bytes, and their pixels.

OpenSlide decodes such tiles with the same library (libjpeg-turbo), and then spends several times longer on laying them
out as premultiplied ARGB. Here they are laid out as RGB. tifffile reads the directories, simplejpeg decodes. Whether
the pixels really are OpenSlide's is for the reader to check: this file knows no OpenSlide.

Only plain grids: levels whose tiles lie side by side without overlap, JPEG-compressed, 8 bits, RGB or YCbCr.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .jpeg_stream import complete_header

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
try:
    import tifffile
except ImportError:
    tifffile = None

if TYPE_CHECKING:
    from tifffile import TiffPage

logger = logging.getLogger(__name__)

_JPEG, _RGB, _YCBCR, _CONTIGUOUS = 7, 2, 6, 1  # TIFF's numbers of compression, colours and planar configuration
_MAX_TILE_PX = 4096
_MAX_TILE_BYTES = 64 << 20
CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class TiledLevel:
    """A level of the pyramid whose tiles can be read.

    Args:
        width_px (`int`), height_px (`int`): size of the level.
        tile_width_px (`int`), tile_height_px (`int`): size of its compressed tiles; those at the right and lower
            edge reach beyond the level.
        is_rgb (`bool`): whether the compressed components are RGB rather than YCbCr.
        tables (`bytes`): JPEG tables that the tiles share.
        offsets (`np.ndarray`), sizes (`np.ndarray`): place of each tile in the file in bytes, uint64 `(n,)`, row by
            row; a size of 0 marks a tile that is not stored.
    """

    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    is_rgb: bool
    tables: bytes
    offsets: np.ndarray
    sizes: np.ndarray

    @property
    def num_columns(self) -> int:
        """Number of tiles side by side."""
        return -(-self.width_px // self.tile_width_px)

    @property
    def num_rows(self) -> int:
        """Number of rows of tiles."""
        return -(-self.height_px // self.tile_height_px)


class TiffTiles:
    """The tiled levels of a TIFF file. For one thread.

    Args:
        path (`Path`): the file.
        level_sizes (`Sequence[tuple[int, int]]`): width and height of the slide's levels, finest first; each is
            looked for among the images of the file.
        cache_bytes (`int`, *optional*): decoded tiles kept, for areas that do not coincide with tiles.

    Attributes:
        levels (`list[TiledLevel | None]`): for each of `level_sizes` its tiles, `None` where the file has none that
            can be read here. All are `None` for files that are not TIFF.
    """

    def __init__(self, path: Path, level_sizes: Sequence[tuple[int, int]], *, cache_bytes: int = CACHE_BYTES) -> None:
        self.levels = _find_levels(path, level_sizes)
        self._file = path.open("rb", buffering=0) if any(self.levels) else None
        # Of each level the header of the last tile, as stored and as completed: most tiles have the same.
        self._headers: dict[int, tuple[bytes, bytes]] = {}
        self._cache: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._cached_bytes, self._cache_bytes = 0, cache_bytes

    def spread_missing_tiles(self) -> None:
        """Takes a tile for missing where the next finer level lacks a part of it, as OpenSlide does for Aperio slides.

        The scanner's encoder made such tiles of nothing, and they are sometimes damaged.
        Source: OpenSlide's `openslide-vendor-aperio.c`.
        """
        for finer, coarser in zip(self.levels, self.levels[1:], strict=False):
            if finer is None or coarser is None:
                continue
            rows, columns = np.divmod(np.flatnonzero(finer.sizes == 0), finer.num_columns)
            step_x = max(1, int(finer.num_columns / coarser.num_columns + 0.5))
            step_y = max(1, int(finer.num_rows / coarser.num_rows + 0.5))
            index = rows // step_y * coarser.num_columns + columns // step_x
            coarser.sizes[index[index < coarser.sizes.size]] = 0

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
        self.levels = [None] * len(self.levels)
        self._cache.clear()

    def jpeg(self, level: int, column: int, row: int) -> bytes | None:
        """Returns a tile as a JPEG file, its pixels as compressed by the scanner; `None` if it is not stored so."""
        tiled = self.levels[level]
        if tiled is None or not (0 <= column < tiled.num_columns and row >= 0):
            return None
        index = row * tiled.num_columns + column
        if index >= len(tiled.sizes):
            return None
        num_bytes = int(tiled.sizes[index])
        if not 0 < num_bytes <= _MAX_TILE_BYTES:
            return None
        return self._complete(level, self._read_at(int(tiled.offsets[index]), num_bytes))

    def _read_at(self, offset: int, num_bytes: int) -> bytes:
        """Reads from the file; without moving a position that a forked process would share, where that is possible."""
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), num_bytes, offset)
        self._file.seek(offset)
        return self._file.read(num_bytes)

    def _complete(self, level: int, stream: bytes) -> bytes | None:
        """Makes a JPEG file of a tile's stream; `None` if it is none of the expected kind."""
        stored, completed = self._headers.get(level, (b"", b""))
        if not stored or not stream.startswith(stored):
            tiled = self.levels[level]
            size = {"width_px": tiled.tile_width_px, "height_px": tiled.tile_height_px}
            header = complete_header(stream, tiled.tables, is_rgb=tiled.is_rgb, **size)
            if header is None:
                return None
            stored, completed = stream[: header[0]], header[1]
            self._headers[level] = stored, completed
        return stream if stored == completed else completed + stream[len(stored) :]

    def read(self, level: int, x: int, y: int, out: np.ndarray, background_rgb: tuple[int, int, int]) -> bool:
        """Reads pixels of one level.

        Args:
            level (`int`): place in `levels`.
            x (`int`), y (`int`): top-left corner, pixels of the level; may lie outside of it.
            out (`np.ndarray` of shape `(h, w, 3)`, uint8, contiguous): receives the pixels, RGB.
            background_rgb (`tuple[int, int, int]`): colour outside of the level.

        Returns:
            `bool`: whether all tiles that it needs could be read; if not, the content of `out` is undefined.
        """
        tiled = self.levels[level]
        if tiled is None:
            return False
        height, width = out.shape[:2]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, tiled.width_px), min(y + height, tiled.height_px)
        if (right - left, bottom - top) != (width, height):
            out[:] = background_rgb
            if right <= left or bottom <= top:
                return True
        tile_width, tile_height = tiled.tile_width_px, tiled.tile_height_px
        if (width, height) == (tile_width, tile_height) and x == left and y == top:
            column, row = x // tile_width, y // tile_height
            if (column * tile_width, row * tile_height) == (x, y) and (x + width, y + height) == (right, bottom):
                return self._decode(level, column, row, out) is not None
        for row in range(top // tile_height, -(-bottom // tile_height)):
            for column in range(left // tile_width, -(-right // tile_width)):
                tile = self._cached_tile(level, column, row)
                if tile is None:
                    return False
                tile_x, tile_y = column * tile_width, row * tile_height
                x0, x1 = max(left, tile_x), min(right, tile_x + tile_width)
                y0, y1 = max(top, tile_y), min(bottom, tile_y + tile_height)
                part = tile[y0 - tile_y : y1 - tile_y, x0 - tile_x : x1 - tile_x]
                out[y0 - y : y1 - y, x0 - x : x1 - x] = part
        return True

    def _cached_tile(self, level: int, column: int, row: int) -> np.ndarray | None:
        """A tile's pixels, uint8 RGB, from the cache of those used last."""
        key = (level, column, row)
        tile = self._cache.get(key)
        if tile is not None:
            self._cache.move_to_end(key)
            return tile
        tile = self._decode(level, column, row, self._make_room(self.levels[level]))
        if tile is not None:
            self._cache[key] = tile
            self._cached_bytes += tile.nbytes
        return tile

    def _make_room(self, tiled: TiledLevel) -> np.ndarray | None:
        """Drops tiles used long ago; returns the memory of one, since asking the system for more costs time.

        Two rows of tiles are all that reading a slide row by row profits from.
        """
        shape = (tiled.tile_height_px, tiled.tile_width_px, 3)
        tile_bytes = 3 * tiled.tile_height_px * tiled.tile_width_px
        limit = min(self._cache_bytes, (2 * tiled.num_columns + 1) * tile_bytes)
        dropped = None
        while self._cache and self._cached_bytes + tile_bytes > limit:
            dropped = self._cache.popitem(last=False)[1]
            self._cached_bytes -= dropped.nbytes
        return dropped if dropped is not None and dropped.shape == shape else None

    def _decode(self, level: int, column: int, row: int, out: np.ndarray | None = None) -> np.ndarray | None:
        """Decodes a tile; `None` if it is not stored or damaged."""
        jpeg = self.jpeg(level, column, row)
        if jpeg is None:
            return None
        try:
            return simplejpeg.decode_jpeg(jpeg, buffer=out)
        except ValueError as error:
            logger.debug("Tile (%d, %d) of level %d cannot be decoded: %s", column, row, level, error)
            return None


def _find_levels(path: Path, level_sizes: Sequence[tuple[int, int]]) -> list[TiledLevel | None]:
    """Looks for each level among the images of a TIFF file."""
    nothing: list[TiledLevel | None] = [None] * len(level_sizes)
    if tifffile is None or simplejpeg is None:
        return nothing
    try:
        with tifffile.TiffFile(path) as file:
            # Of several tiled images of the same size nothing tells which one OpenSlide shows.
            candidates: dict[tuple[int, int], TiledLevel | None] = {}
            for page in file.pages:
                size = (page.imagewidth, page.imagelength)
                if size in level_sizes and page.is_tiled:
                    is_only = size not in candidates
                    candidates[size] = _tiled_level(page) if is_only and _is_plain_jpeg(page) else None
    # tifffile raises whatever its parsing of a damaged file runs into.
    except Exception as error:  # noqa: BLE001
        logger.debug("%s: its tiles are read through OpenSlide (%s).", path, error)
        return nothing
    return [candidates.get(size) for size in level_sizes]


def _is_plain_jpeg(page: "TiffPage") -> bool:
    """Whether an image of the file consists of JPEG tiles of 8-bit colours."""
    return (
        page.is_tiled
        and page.compression == _JPEG
        and page.photometric in (_RGB, _YCBCR)
        and page.planarconfig == _CONTIGUOUS
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.imagedepth == 1
        and max(page.tilewidth, page.tilelength) <= _MAX_TILE_PX
        and len(page.dataoffsets) == len(page.databytecounts)
    )


def _tiled_level(page: "TiffPage") -> TiledLevel:
    return TiledLevel(
        width_px=page.imagewidth,
        height_px=page.imagelength,
        tile_width_px=page.tilewidth,
        tile_height_px=page.tilelength,
        is_rgb=page.photometric == _RGB,
        tables=page.jpegtables or b"",
        offsets=np.asarray(page.dataoffsets, dtype=np.uint64),
        sizes=np.asarray(page.databytecounts, dtype=np.uint64),
    )
