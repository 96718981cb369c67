# SPDX-License-Identifier: Apache-2.0
"""Reads whole-slide images: the only file that touches OpenSlide.

OpenSlide defines which pixels are right; on top of it stand limits, a strict rule for the resolution, area averaging
to the wanted resolution, and one kind of error. Whatever a slide does, its user sees a `SlideError` with a reason
from `REASONS`, never a raw OpenSlide error.

Pixels of a level are taken whole: a level-0 position means the nearest pixel of the level. (OpenSlide interpolates at
positions between two pixels of a level, so the two agree exactly where a position falls on a pixel, and always on
level 0.) Tiled JPEG TIFFs are decoded without OpenSlide, several times faster, after one tile of each level has been
compared with what OpenSlide shows.

Colours are those of the file; an embedded ICC profile is not applied, as is usual for slide encoders.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from .pixel_areas import composite, cut_length, reduce_area
from .slide_file import check_regular_file, slide_fingerprint
from .slide_info import REASONS, SlideError, SlideInfo, is_native_level, make_slide_info
from .tiff_header import check_tiff_header
from .tiff_tiles import CACHE_BYTES, TiffTiles
from .tile_copies import is_whole

try:
    import openslide
except (ImportError, OSError):
    openslide = None
try:
    import cv2
except ImportError:
    cv2 = None

__all__ = ["REASONS", "SlideError", "SlideInfo", "SlideReader", "slide_fingerprint"]

logger = logging.getLogger(__name__)

_MAX_MAGNIFICATION = 1.05
_MAX_OVERVIEW_PX = 4096  # what is found on it is worked out on fewer pixels still; memory goes with its square
_MAX_READ_PX = 4096  # side of the largest region read at once: 64 MiB of RGBA
# Formats that OpenSlide shows as the file's own tiles side by side; others overlap, shift or blend them.
_PLAIN_FORMATS = frozenset({"aperio", "generic-tiff", "philips"})
_MAX_DIFFERENCE = 2  # of 255, between two builds of libjpeg
_MAX_SHIFT_PX = 0.01  # of a level, up to which a position counts as falling on one of its pixels
_UNSUPPORTED_SIGNS = ("unsupported", "not supported", "concatenation member", "no pyramid levels")
_ADVICE = {
    "unsupported": "Convert it to a format that OpenSlide reads, or copy it again if it is one",
    "truncated": "The file seems to be cut off; copy it again",
    "unreadable": "The file seems to be damaged; copy it again",
}
# Level to read, its level-0 pixels per pixel, and its pixels per wanted pixel: 1 where they are used as they are.
_Plan = tuple[int, float, float]
_TRUNCATED_SIGNS = ("short read", "end of file", "eof", "truncated", "premature", "beyond end")


class SlideReader:
    """An open slide. Use one per thread, as a context manager or with `close`.

    After a read has failed every later read fails too (OpenSlide's rule): open the slide again to go on.

    Args:
        path (`str` or `Path`): the slide file; for a DICOM series any of its files, for MIRAX the `.mrxs` file.
        slide_id (`str`, *optional*): name of the slide in errors; the file's stem by default.
        mpp (`float`, *optional*): resolution of level 0, um/px, used instead of what the file says.
        cache_bytes (`int`, *optional*): memory for decoded tiles of the file, for tiles that do not coincide with
            them.
        on_read (`Callable[[], None]`, *optional*): called after each region that was read, of which large overviews
            have many.

    Raises:
        SlideError: if the slide is refused; its reason says why.
        ImportError: if OpenSlide or OpenCV is not installed.

    Example:

    ```python
    with SlideReader("slide.svs") as reader:
        tile = reader.read_tile(0, 0, tile_size_px=256, tile_mpp=0.5)  # uint8 (256, 256, 3)
    ```
    """

    def __init__(
        self,
        path: str | Path,
        *,
        slide_id: str | None = None,
        mpp: float | None = None,
        cache_bytes: int = CACHE_BYTES,
        on_read: Callable[[], None] | None = None,
    ) -> None:
        _require_packages()
        path = Path(path)
        self._overview: tuple[np.ndarray, float] | None = None
        self._on_read = on_read
        self._tiles: TiffTiles | None = None
        self._trusted_levels: dict[int, bool] = {}
        self._plans: dict[float, _Plan] = {}
        slide_id = path.stem if slide_id is None else slide_id
        check_regular_file(path, slide_id)
        problem = check_tiff_header(path)
        if problem is not None:
            raise SlideError(slide_id, problem.reason, f"{path}: {problem.message}")
        with _openslide_errors(slide_id, path):
            self._slide = openslide.OpenSlide(path)
        try:
            with _openslide_errors(slide_id, path):
                self.info = make_slide_info(
                    slide_id,
                    path,
                    level_sizes=self._slide.level_dimensions,
                    level_downsamples=self._slide.level_downsamples,
                    properties=self._slide.properties,
                    mpp=mpp,
                )
        except SlideError:
            self.close()
            raise
        if self.info.vendor in _PLAIN_FORMATS:
            self._tiles = TiffTiles(path, self._slide.level_dimensions, cache_bytes=cache_bytes)
            if self.info.vendor == "aperio":
                self._tiles.spread_missing_tiles()

    def __enter__(self) -> "SlideReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._slide.close()
        if self._tiles is not None:
            self._tiles.close()

    def check_resolution(self, tile_mpp: float) -> None:
        """Checks that tiles at `tile_mpp` um/px need no magnification beyond 5%.

        Raises:
            SlideError: `mpp_too_coarse` otherwise.
        """
        if self.info.mpp > tile_mpp * _MAX_MAGNIFICATION:
            raise SlideError(
                self.info.slide_id,
                "mpp_too_coarse",
                f"the slide has {self.info.mpp:g} um/px, but tiles are wanted at {tile_mpp:g} um/px, and magnifying "
                f"would invent detail; use a finer scan, or a model with tile_mpp of {self.info.mpp:g} or more",
            )

    def read_tile(
        self, x: int, y: int, *, tile_size_px: int, tile_mpp: float, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads one square tile.

        Pixels come from the coarsest level that is fine enough. A level within 2% of `tile_mpp` is used pixel by
        pixel; from any other the footprint of `tile_size_px * tile_mpp` um, in whole pixels of the level, is reduced
        by area averaging.

        Args:
            x (`int`), y (`int`): top-left corner, level-0 pixels; may lie outside of the canvas.
            tile_size_px (`int`): side of the tile, pixels at `tile_mpp`.
            tile_mpp (`float`): resolution of the tile, um/px.
            out (`np.ndarray` of shape `(tile_size_px, tile_size_px, 3)`, uint8, contiguous, *optional*): receives
                the pixels.

        Returns:
            `np.ndarray` of shape `(tile_size_px, tile_size_px, 3)`, uint8: RGB over the background colour.

        Raises:
            SlideError: if the pixels can not be read, or `mpp_too_coarse`.
        """
        if out is None:
            out = np.empty((tile_size_px, tile_size_px, 3), dtype=np.uint8)
        self._read_area(x, y, self._plan(tile_mpp), out)
        return out

    def compressed_tile(self, x: int, y: int, *, tile_size_px: int, tile_mpp: float) -> bytes | None:
        """Returns the file's own compressed tile if it is exactly the tile that `read_tile` would read.

        Args:
            x (`int`), y (`int`): top-left corner, level-0 pixels.
            tile_size_px (`int`): side of the tile, pixels at `tile_mpp`.
            tile_mpp (`float`): resolution of the tile, um/px.

        Returns:
            `bytes`, *optional*: a JPEG file with the scanner's own pixels; `None` where tiles of the file do not
                coincide with the wanted one, are not JPEG, or reach beyond the level.
        """
        level, index = self._own_tiles(np.array([[x, y]]), tile_size_px, tile_mpp)
        if index[0] < 0:
            return None
        row, column = divmod(int(index[0]), self._tiles.levels[level].num_columns)
        jpeg = self._tiles.jpeg(level, column, row)
        return jpeg if jpeg is not None and is_whole(jpeg) else None

    def compressed_tiles(
        self, tile_xy: np.ndarray, *, tile_size_px: int, tile_mpp: float, max_bytes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `compressed_tile` does of many tiles, in a fraction of the time.

        Args:
            tile_xy (`np.ndarray` of shape `(n, 2)`, int): top-left corners, level-0 pixels; at least one.
            tile_size_px (`int`): side of the tiles, pixels at `tile_mpp`.
            tile_mpp (`float`): resolution of the tiles, um/px.
            max_bytes (`int`): only as many of the first tiles are read as together are no larger, but at least one.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: uint8 `(b,)`, valid until the next call, and int32 `(m + 1,)`: the JPEG
                file of the i-th tile is `content[offsets[i]:offsets[i + 1]]`. Empty where `compressed_tile` has to be
                asked: the tile cannot be copied, or is unlike the others.
        """
        level, index = self._own_tiles(tile_xy, tile_size_px, tile_mpp)
        if (index < 0).all():
            return np.empty(0, dtype=np.uint8), np.zeros(len(index) + 1, dtype=np.int32)
        return self._tiles.jpegs(level, index, max_bytes)

    def _own_tiles(self, tile_xy: np.ndarray, tile_size_px: int, tile_mpp: float) -> tuple[int, np.ndarray]:
        """The level of tiles and which of the file's they are, int64 (n,); -1 for those that are none of them."""
        level, level_downsample, ratio = self._plan(tile_mpp)
        index = np.full(len(tile_xy), -1)
        if self._tiles is not None and self._tiles.levels[level] is not None and ratio == 1:
            level_xy = np.rint(tile_xy / level_downsample).astype(np.int64)
            own = self._tiles.levels[level].find_tiles(level_xy, tile_size_px)
            if (own >= 0).any() and self._trusts_tiles(level, *level_xy[own >= 0][0].tolist()):
                index = own
        return level, index

    def read_overview(self, mpp: float) -> tuple[np.ndarray, float]:
        """Reads a small picture of the scanned area.

        The last one is kept: without a pyramid it costs as much as reading the whole slide.

        Args:
            mpp (`float`): wanted resolution, um/px. The picture is coarser where it would be finer than level 0 or
                have a side of more than 4096 px, and finer where it would have less than one pixel.

        Returns:
            `tuple[np.ndarray, float]`: the picture, uint8 RGB `(h, w, 3)`, read-only, and its level-0 pixels
                per pixel.

        Raises:
            SlideError: if the pixels can not be read.
        """
        x, y, width, height = self.info.bounds
        downsample = min(mpp / self.info.mpp, width, height, _MAX_READ_PX)
        downsample = float(max(downsample, 1, max(width, height) / _MAX_OVERVIEW_PX))
        level_downsample = self.info.level_downsamples[self.info.level_for(downsample)]
        if is_native_level(downsample, level_downsample):
            # Across a whole slide 2% are many pixels: say the level's own factor.
            downsample = level_downsample
        if self._overview is None or self._overview[1] != downsample:
            out_width, out_height = max(1, round(width / downsample)), max(1, round(height / downsample))
            overview_rgb = np.empty((out_height, out_width, 3), dtype=np.uint8)
            self._read_area(x, y, self._plan_level(downsample), overview_rgb)
            overview_rgb.flags.writeable = False
            self._overview = overview_rgb, downsample
        return self._overview

    def _plan(self, tile_mpp: float) -> _Plan:
        """How tiles at `tile_mpp` um/px are read; worked out once."""
        if tile_mpp not in self._plans:
            self.check_resolution(tile_mpp)
            self._plans[tile_mpp] = self._plan_level(self.info.tile_downsample(tile_mpp))
        return self._plans[tile_mpp]

    def _plan_level(self, downsample: float) -> _Plan:
        level = self.info.level_for(downsample)
        level_downsample = self.info.level_downsamples[level]
        is_native = is_native_level(downsample, level_downsample)
        return level, level_downsample, 1.0 if is_native else downsample / level_downsample

    def _read_area(self, x: int, y: int, plan: _Plan, out: np.ndarray) -> None:
        """Reads `out`, uint8 `(h, w, 3)`, from `(x, y)` on level 0.

        Large areas are read in blocks, so memory stays bounded for slides without a pyramid.
        """
        level, level_downsample, ratio = plan
        start_x, start_y = round(x / level_downsample), round(y / level_downsample)
        block = max(1, int(_MAX_READ_PX / ratio))
        for top, bottom in cut_length(out.shape[0], block):
            for left, right in cut_length(out.shape[1], block):
                left_px, top_px = round(left * ratio), round(top * ratio)
                width, height = max(1, round(right * ratio) - left_px), max(1, round(bottom * ratio) - top_px)
                target = out[top:bottom, left:right]
                x_px, y_px, factor = start_x + left_px, start_y + top_px, int(ratio)
                if (height, width) == (factor * target.shape[0], factor * target.shape[1]) and self._read_tiles(
                    level, x_px, y_px, target, factor
                ):
                    continue
                pixels = target if target.shape[:2] == (height, width) else np.empty((height, width, 3), np.uint8)
                if not self._read_tiles(level, x_px, y_px, pixels):
                    self._read_openslide(level, x_px, y_px, pixels)
                if pixels is not target:
                    reduce_area(pixels, target)
                if self._on_read is not None:
                    self._on_read()

    def _read_tiles(self, level: int, x: int, y: int, out: np.ndarray, factor: int = 1) -> bool:
        """Reads `out`, uint8 RGB `(h, w, 3)`, from `(x, y)` of a level through the file's own tiles, if they serve."""
        return self._trusts_tiles(level, x, y) and self._tiles.read(
            level, x, y, out, self.info.background_rgb, factor=factor
        )

    def _read_openslide(self, level: int, x: int, y: int, out: np.ndarray) -> None:
        """Reads `out`, uint8 RGB `(h, w, 3)`, from `(x, y)` in pixels of a level, through OpenSlide."""
        downsample = self.info.level_downsamples[level]
        # OpenSlide cuts negative positions to whole pixels of the level, towards zero: up to one pixel off.
        left, top = max(-x, 0), max(-y, 0)
        if left or top:
            out[:] = self.info.background_rgb
        part = out[top:, left:]
        if part.size == 0:
            return
        origin = round((x + left) * downsample), round((y + top) * downsample)
        with _openslide_errors(self.info.slide_id, self.info.path):
            rgba = np.asarray(self._slide.read_region(origin, level, (part.shape[1], part.shape[0])))
        part[:] = composite(rgba, self.info.background_rgb)

    def _trusts_tiles(self, level: int, x: int, y: int) -> bool:
        """Whether the file's own tiles of a level may be used: decided once, at a tile near `(x, y)` of the level."""
        if self._tiles is None or self._tiles.levels[level] is None:
            return False
        if level not in self._trusted_levels:
            is_same = self._compare_tile(level, x, y)
            if is_same is None:
                return False
            self._trusted_levels[level] = is_same
        return self._trusted_levels[level]

    def _compare_tile(self, level: int, x: int, y: int) -> bool | None:
        """Whether a tile of the file is what OpenSlide shows in its place; `None` if the tile cannot be read."""
        tiled, downsample = self._tiles.levels[level], self.info.level_downsamples[level]
        left = _whole_start(x, tiled.tile_width_px, tiled.width_px, downsample)
        top = _whole_start(y, tiled.tile_height_px, tiled.height_px, downsample)
        size = min(tiled.tile_height_px, tiled.height_px - top), min(tiled.tile_width_px, tiled.width_px - left)
        own, shown = (np.empty((*size, 3), dtype=np.uint8) for _ in range(2))
        if not self._tiles.read(level, left, top, own, self.info.background_rgb):
            return None
        self._read_openslide(level, left, top, shown)
        difference = int(cv2.norm(own, shown, cv2.NORM_INF))
        allowed = _MAX_DIFFERENCE + 255 * sum(_shift_px(start, downsample) for start in (left, top))
        if difference > allowed:
            logger.warning(
                "%s: level %d is read through OpenSlide, which is slower: the file's own tiles differ from it by %d.",
                self.info.slide_id,
                level,
                difference,
            )
        return difference <= allowed


def _require_packages() -> None:
    if openslide is None:
        raise ImportError("Reading slides needs OpenSlide: pip install openslide-python openslide-bin")
    if cv2 is None:
        raise ImportError("Reading slides needs OpenCV: pip install opencv-python-headless")


@contextmanager
def _openslide_errors(slide_id: str, path: Path) -> Iterator[None]:
    """Turns whatever OpenSlide raises into a `SlideError`."""
    try:
        yield
    except openslide.OpenSlideError as error:
        reason = _error_reason(error)
        raise SlideError(slide_id, reason, f"{path}: OpenSlide says: {error}. {_ADVICE[reason]}") from error


def _error_reason(error: "openslide.OpenSlideError") -> str:
    """Tells a damaged file from one of a kind that OpenSlide does not know."""
    detail = str(error).lower()
    if isinstance(error, openslide.OpenSlideUnsupportedFormatError):
        return "unsupported"
    if any(sign in detail for sign in _UNSUPPORTED_SIGNS):
        return "unsupported"
    return "truncated" if any(sign in detail for sign in _TRUNCATED_SIGNS) else "unreadable"


def _whole_start(position: int, tile_px: int, length_px: int, downsample: float) -> int:
    """Start of a tile near `position` along one axis of a level that level-0 pixels can name without a shift."""
    starts = range(0, max(1, length_px - tile_px + 1), tile_px)
    whole = [start for start in starts if _shift_px(start, downsample) <= _MAX_SHIFT_PX]
    return min(whole, key=lambda start: abs(start - position))


def _shift_px(position: int, downsample: float) -> float:
    """How far the nearest whole level-0 pixel is from a position of a level, pixels of the level."""
    return abs(position * downsample - round(position * downsample)) / downsample
