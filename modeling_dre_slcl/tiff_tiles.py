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
from .tile_copies import copy_streams

try:
    import cv2
except ImportError:
    cv2 = None
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

    def find_tiles(self, level_xy: np.ndarray, tile_size_px: int) -> np.ndarray:
        """Numbers of the tiles, row by row, that are exactly the square areas at these places.

        Args:
            level_xy (`np.ndarray` of shape `(n, 2)`, int64): top-left corners, pixels of the level.
            tile_size_px (`int`): side of the areas.

        Returns:
            `np.ndarray` of shape `(n,)`, int64: -1 where there is no such tile, or it reaches beyond the level.
        """
        if (self.tile_width_px, self.tile_height_px) != (tile_size_px, tile_size_px):
            return np.full(len(level_xy), -1)
        is_inside = (level_xy >= 0) & (level_xy + tile_size_px <= (self.width_px, self.height_px))
        is_tile = (is_inside & (level_xy % tile_size_px == 0)).all(axis=1)
        columns, rows = (level_xy // tile_size_px).T
        return np.where(is_tile, rows * self.num_columns + columns, -1)


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
        self._scratch = np.empty((0, 0, 3), dtype=np.uint8)
        self._copied = np.empty(0, dtype=np.uint8)

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

    def jpegs(self, level: int, index: np.ndarray, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns tiles as JPEG files, as `jpeg` does, but many at once and many times faster.

        Args:
            level (`int`): place in `levels`, where there must be tiles.
            index (`np.ndarray` of shape `(n,)`, int64): numbers of the tiles, row by row; -1 for none.
            max_bytes (`int`): only as many of the first tiles are read as together are no larger, but at least one.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: uint8 `(b,)`, valid until the next call, and int32 `(m + 1,)`: the file of
                the i-th tile is `content[offsets[i]:offsets[i + 1]]`. Empty where `jpeg` has to be asked: some tiles
                are not like the others, some are not there.
        """
        tiled = self.levels[level]
        is_there = (index >= 0) & (index < len(tiled.sizes))
        place = np.where(is_there, index, 0)
        starts, sizes = tiled.offsets[place].astype(np.int64), tiled.sizes[place].astype(np.int64)
        file_bytes = os.fstat(self._file.fileno()).st_size
        is_there &= (sizes > 0) & (sizes <= _MAX_TILE_BYTES) & (starts >= 0) & (starts <= file_bytes - sizes)
        header = self._common_header(level, index[is_there])
        sizes = np.where(is_there & (sizes > len(header[0])) & (len(header[0]) > 0), sizes, 0)
        lengths = np.cumsum(np.where(sizes > 0, sizes + len(header[1]) - len(header[0]), 0))
        count = max(1, int(np.searchsorted(lengths, max_bytes, side="right")))
        if self._copied.size < lengths[count - 1]:
            self._copied = np.empty(max(int(1.2 * lengths[count - 1]), max_bytes // 4), dtype=np.uint8)
        return self._copied, copy_streams(self._file, starts[:count], sizes[:count], header, self._copied)

    def _common_header(self, level: int, index: np.ndarray) -> tuple[bytes, bytes]:
        """How streams of a level begin, and what a JPEG file has in its place; looked up at the first tile (n,)."""
        if level not in self._headers and index.size:
            row, column = divmod(int(index[0]), self.levels[level].num_columns)
            self.jpeg(level, column, row)
        return self._headers.get(level, (b"", b""))

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

    def read(
        self,
        level: int,
        x: int,
        y: int,
        out: np.ndarray,
        background_rgb: tuple[int, int, int],
        *,
        factor: int = 1,
    ) -> bool:
        """Reads pixels of one level, or averages of `factor` x `factor` of them.

        Args:
            level (`int`): place in `levels`.
            x (`int`), y (`int`): top-left corner, pixels of the level; may lie outside of it.
            out (`np.ndarray` of shape `(h, w, 3)`, uint8, contiguous): receives the pixels, RGB.
            background_rgb (`tuple[int, int, int]`): colour outside of the level.
            factor (`int`, *optional*, defaults to 1): pixels of the level per pixel of `out` along each axis. Each
                tile is reduced as soon as it is decoded, which larger areas cannot be.

        Returns:
            `bool`: whether all tiles that it needs could be read, and no average lies across the edge of a tile; if
                not, the content of `out` is undefined.
        """
        tiled = self.levels[level]
        if tiled is None:
            return False
        height, width = (factor * side for side in out.shape[:2])
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, tiled.width_px), min(y + height, tiled.height_px)
        if (right - left, bottom - top) != (width, height):
            if factor > 1:
                return False
            out[:] = background_rgb
            if right <= left or bottom <= top:
                return True
        tile_width, tile_height = tiled.tile_width_px, tiled.tile_height_px
        for row in range(top // tile_height, -(-bottom // tile_height)):
            y0, y1 = max(top, row * tile_height), min(bottom, (row + 1) * tile_height)
            for column in range(left // tile_width, -(-right // tile_width)):
                x0, x1 = max(left, column * tile_width), min(right, (column + 1) * tile_width)
                target = out[(y0 - y) // factor : (y1 - y) // factor, (x0 - x) // factor : (x1 - x) // factor]
                if (factor * target.shape[0], factor * target.shape[1]) != (y1 - y0, x1 - x0):
                    return False
                corner = x0 - column * tile_width, y0 - row * tile_height
                if not self._read_part(level, column, row, corner, target, factor):
                    return False
        return True

    def _read_part(
        self, level: int, column: int, row: int, corner: tuple[int, int], target: np.ndarray, factor: int
    ) -> bool:
        """Fills `target` from a tile, starting at `corner` (x, y) of the tile."""
        tiled = self.levels[level]
        height, width = (factor * side for side in target.shape[:2])
        is_whole = (height, width) == (tiled.tile_height_px, tiled.tile_width_px)
        if is_whole and factor == 1 and target.flags.c_contiguous:
            return self._decode(level, column, row, target) is not None
        tile = self._tile(level, column, row, keeps=not is_whole)
        if tile is None:
            return False
        part = tile[corner[1] : corner[1] + height, corner[0] : corner[0] + width]
        if factor == 1:
            target[:] = part
        else:
            cv2.resize(part, target.shape[1::-1], dst=target, interpolation=cv2.INTER_AREA)
        return True

    def _tile(self, level: int, column: int, row: int, *, keeps: bool) -> np.ndarray | None:
        """A tile's pixels, uint8 RGB, valid until the next call; kept if another area will want the rest of it."""
        key = (level, column, row)
        tile = self._cache.get(key)
        if tile is not None:
            self._cache.move_to_end(key)
            return tile
        tiled = self.levels[level]
        if not keeps:
            if self._scratch.shape != (tiled.tile_height_px, tiled.tile_width_px, 3):
                self._scratch = np.empty((tiled.tile_height_px, tiled.tile_width_px, 3), dtype=np.uint8)
            return self._decode(level, column, row, self._scratch)
        tile = self._decode(level, column, row, self._make_room(tiled))
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
    if None in (cv2, tifffile, simplejpeg):
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
