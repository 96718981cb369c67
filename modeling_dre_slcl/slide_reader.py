# SPDX-License-Identifier: Apache-2.0
"""Reads whole-slide images: the only file that touches OpenSlide.

OpenSlide defines which pixels are right; on top of it stand limits, a strict rule for the resolution, area averaging
to the wanted resolution, and one kind of error. Whatever a slide does, its user sees a `SlideError` with a reason
from `REASONS`, never a raw OpenSlide error.

Colours are those of the file; an embedded ICC profile is not applied, as is usual for slide encoders.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from .slide_info import REASONS, SlideError, SlideInfo, make_slide_info
from .tiff_header import check_tiff_header

try:
    import openslide
except (ImportError, OSError):
    openslide = None
try:
    import cv2
except ImportError:
    cv2 = None

__all__ = ["REASONS", "SlideError", "SlideInfo", "SlideReader", "slide_fingerprint"]

_NATIVE_TOLERANCE = 0.02  # a level this close to the wanted resolution is used as it is
_MAX_MAGNIFICATION = 1.05
_MAX_OVERVIEW_PX = 8192
_MAX_READ_PX = 4096  # side of the largest region read at once: 64 MiB of RGBA
_FINGERPRINT_BYTES = 1 << 20
_UNSUPPORTED_SIGNS = ("unsupported", "not supported", "concatenation member", "no pyramid levels")
_ADVICE = {
    "unsupported": "Convert it to a format that OpenSlide reads, or copy it again if it is one",
    "truncated": "The file seems to be cut off; copy it again",
    "unreadable": "The file seems to be damaged; copy it again",
}
_TRUNCATED_SIGNS = ("short read", "end of file", "eof", "truncated", "premature", "beyond end")


class SlideReader:
    """An open slide. Use one per thread, as a context manager or with `close`.

    After a read has failed every later read fails too (OpenSlide's rule): open the slide again to go on.

    Args:
        path (`str` or `Path`): the slide file; for a DICOM series any of its files, for MIRAX the `.mrxs` file.
        slide_id (`str`, *optional*): name of the slide in errors; the file's stem by default.
        mpp (`float`, *optional*): resolution of level 0, um/px, used instead of what the file says.

    Raises:
        SlideError: if the slide is refused; its reason says why.
        ImportError: if OpenSlide or OpenCV is not installed.

    Example:

    ```python
    with SlideReader("slide.svs") as reader:
        tile = reader.read_tile(0, 0, tile_size_px=256, tile_mpp=0.5)  # uint8 (256, 256, 3)
    ```
    """

    def __init__(self, path: str | Path, *, slide_id: str | None = None, mpp: float | None = None) -> None:
        _require_packages()
        path = Path(path)
        self._overview: tuple[np.ndarray, float] | None = None
        slide_id = path.stem if slide_id is None else slide_id
        _check_regular_file(path, slide_id)
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

    def __enter__(self) -> "SlideReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._slide.close()

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

    def read_tile(self, x: int, y: int, *, tile_size_px: int, tile_mpp: float) -> np.ndarray:
        """Reads one square tile.

        Pixels come from the coarsest level that is fine enough. A level within 2% of `tile_mpp` is used pixel by
        pixel; from any other the footprint of `tile_size_px * tile_mpp` um is reduced by area averaging.

        Args:
            x (`int`), y (`int`): top-left corner, level-0 pixels; may lie outside of the canvas.
            tile_size_px (`int`): side of the tile, pixels at `tile_mpp`.
            tile_mpp (`float`): resolution of the tile, um/px.

        Returns:
            `np.ndarray` of shape `(tile_size_px, tile_size_px, 3)`, uint8: RGB over the background colour.

        Raises:
            SlideError: if the pixels can not be read, or `mpp_too_coarse`.
        """
        self.check_resolution(tile_mpp)
        return self._read_area(x, y, tile_mpp / self.info.mpp, tile_size_px, tile_size_px)

    def read_overview(self, mpp: float) -> tuple[np.ndarray, float]:
        """Reads a small picture of the scanned area.

        The last one is kept: without a pyramid it costs as much as reading the whole slide.

        Args:
            mpp (`float`): wanted resolution, um/px. The picture is coarser where it would be finer than level 0 or
                have a side of more than 8192 px, and finer where it would have less than one pixel.

        Returns:
            `tuple[np.ndarray, float]`: the picture, uint8 RGB `(h, w, 3)`, read-only, and its level-0 pixels
                per pixel.

        Raises:
            SlideError: if the pixels can not be read.
        """
        x, y, width, height = self.info.bounds
        downsample = min(mpp / self.info.mpp, width, height, _MAX_READ_PX)
        downsample = float(max(downsample, 1, max(width, height) / _MAX_OVERVIEW_PX))
        level_downsample = self.info.level_downsamples[self._level_for(downsample)]
        if _is_native(downsample, level_downsample):
            # Across a whole slide 2% are many pixels: say the level's own factor.
            downsample = level_downsample
        if self._overview is None or self._overview[1] != downsample:
            out_width, out_height = max(1, round(width / downsample)), max(1, round(height / downsample))
            overview_rgb = self._read_area(x, y, downsample, out_width, out_height)
            overview_rgb.flags.writeable = False
            self._overview = overview_rgb, downsample
        return self._overview

    def _read_area(self, x: int, y: int, downsample: float, width: int, height: int) -> np.ndarray:
        """Reads uint8 `(height, width, 3)` with `downsample` level-0 pixels per pixel, from `(x, y)` on level 0.

        Large areas are read in blocks, so memory stays bounded for slides without a pyramid.
        """
        level = self._level_for(downsample)
        level_downsample = self.info.level_downsamples[level]
        ratio = downsample / level_downsample
        if _is_native(downsample, level_downsample):
            ratio = 1.0
        block = max(1, int(_MAX_READ_PX / ratio))
        x, y = int(x), int(y)  # the C library does not take numpy's integers
        area = np.empty((height, width, 3), dtype=np.uint8)
        for top, bottom in _blocks(height, block):
            for left, right in _blocks(width, block):
                level_x, level_y = round(left * ratio), round(top * ratio)
                size = max(1, round(right * ratio) - level_x), max(1, round(bottom * ratio) - level_y)
                origin = x + round(level_x * level_downsample), y + round(level_y * level_downsample)
                pixels = self._read_region(origin, level, size)
                area[top:bottom, left:right] = _resample(pixels, right - left, bottom - top)
        return area

    def _level_for(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as `downsample`, within the tolerance; else the finest."""
        fine = [
            (level_downsample, level)
            for level, level_downsample in enumerate(self.info.level_downsamples)
            if level_downsample <= downsample * (1 + _NATIVE_TOLERANCE)
        ]
        return max(fine)[1] if fine else 0

    def _read_region(self, origin: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        """Reads uint8 RGB `(height, width, 3)` of one level; `origin` is (x, y) on level 0, `size` (width, height)."""
        with _openslide_errors(self.info.slide_id, self.info.path):
            rgba = np.asarray(self._slide.read_region(origin, level, size))
        return _composite(rgba, self.info.background_rgb)


def slide_fingerprint(path: str | Path) -> str:
    """Tells whether a slide file has changed, without reading all of it.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        `str`: SHA-256, in hexadecimal, of the size in bytes (as decimal text and a line feed), the first MiB and the
        last MiB.

    Raises:
        SlideError: `not_a_file` or `unreadable`.
    """
    path = Path(path)
    _check_regular_file(path, path.stem)
    with path.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        digest = hashlib.sha256(f"{size}\n".encode())
        for start in (0, max(0, size - _FINGERPRINT_BYTES)):
            handle.seek(start)
            digest.update(handle.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()


def _require_packages() -> None:
    if openslide is None:
        raise ImportError("Reading slides needs OpenSlide: pip install openslide-python openslide-bin")
    if cv2 is None:
        raise ImportError("Reading slides needs OpenCV: pip install opencv-python-headless")


def _check_regular_file(path: Path, slide_id: str) -> None:
    """Refuses what is not a readable file before OpenSlide waits on it (a pipe) or reads it for ever (a device)."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        denied = getattr(error, "errno", None) == errno.EACCES
        reason = "unreadable" if denied else "not_a_file"
        raise SlideError(slide_id, reason, f"{str(path)!r}: expected a slide file ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise SlideError(
            slide_id, "not_a_file", f"{path}: expected a regular file; for a DICOM series give one of its .dcm files"
        )
    if status.st_size == 0:
        raise SlideError(slide_id, "truncated", f"{path}: the file is empty; copy it again")
    if not os.access(path, os.R_OK):
        raise SlideError(slide_id, "unreadable", f"{path}: no permission to read the file")


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


def _composite(rgba: np.ndarray, background_rgb: tuple[int, int, int]) -> np.ndarray:
    """Lays uint8 RGBA `(h, w, 4)` over a colour; returns uint8 RGB `(h, w, 3)`."""
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    # 255 * 255 + 127 still fits into 16 bits.
    weight = alpha.astype(np.uint16)
    under = np.array(background_rgb, dtype=np.uint16) * (255 - weight)
    return ((rgba[..., :3] * weight + under + 127) // 255).astype(np.uint8)


def _resample(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Reduces uint8 `(h, w, 3)` by area averaging, or magnifies it (by a few percent) bilinearly."""
    if pixels.shape[:2] == (height, width):
        return pixels
    reduces = pixels.shape[0] >= height and pixels.shape[1] >= width
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if reduces else cv2.INTER_LINEAR)


def _is_native(downsample: float, level_downsample: float) -> bool:
    """Whether a level is so close to the wanted resolution that its pixels are used as they are."""
    return abs(downsample / level_downsample - 1) <= _NATIVE_TOLERANCE


def _blocks(length: int, block: int) -> list[tuple[int, int]]:
    """Cuts `range(length)` into runs of at most `block`: (start, stop) pairs."""
    return [(start, min(start + block, length)) for start in range(0, length, block)]
