# SPDX-License-Identifier: Apache-2.0
"""What is known about a slide before its pixels are read, and the rules by which a slide is refused.

No OpenSlide and no files here: the rules work on the sizes and the text properties that a reader found.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REASONS = frozenset(
    {
        "unreadable",
        "truncated",
        "unsupported",
        "too_large",
        "no_tissue",
        "mpp_missing",
        "mpp_out_of_range",
        "mpp_too_coarse",
        "duplicate_id",
        "report_missing",
        "unsafe_name",
        "not_a_file",
        "changed_during_run",
        "misaligned",
        "geometry_mismatch",
        "mask_missing",
        "mask_unusable",
        "coordinates_missing",
        "timeout",
        "reader_aborted",
        "non_finite",
    }
)

MIN_MPP = 0.05
MAX_MPP = 10.0
_NATIVE_TOLERANCE = 0.02  # a level this close to the wanted resolution is used as it is
_MAX_MPP_DIFFERENCE = 0.05  # of x and y, relative
_MAX_LEVELS = 32
_MAX_SIDE_PX = 1 << 20
_MAX_AREA_PX = 1 << 38
_MAX_TILE_AREA_PX = 1 << 26
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class SlideError(ValueError):
    """What is wrong with one slide.

    Args:
        slide_id (`str`): the slide.
        reason (`str`): one of `REASONS`, for tables and counts.
        message (`str`): what was found, what was expected and how to mend it, for people.
    """

    def __init__(self, slide_id: str, reason: str, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"reason: expected one of {sorted(REASONS)}, found {reason!r}.")
        super().__init__(slide_id, reason, message)
        self.slide_id = slide_id
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.slide_id}: {self.reason}: {self.message}"


@dataclass(frozen=True)
class SlideInfo:
    """What is known about a slide before any pixel is read.

    Args:
        slide_id (`str`): name of the slide.
        path (`Path`): its file; for a DICOM series one of its files.
        width_px (`int`): columns of level 0.
        height_px (`int`): rows of level 0.
        mpp (`float`): resolution of level 0, um/px.
        vendor (`str`): format as OpenSlide names it, such as "aperio".
        level_downsamples (`tuple[float, ...]`): level-0 pixels per pixel of each level, finest first.
        bounds (`tuple[int, int, int, int]`): x, y, width, height of the scanned area, level-0 pixels; the whole
            canvas where the format does not say.
        background_rgb (`tuple[int, int, int]`): colour shown where nothing was scanned.
    """

    slide_id: str
    path: Path
    width_px: int
    height_px: int
    mpp: float
    vendor: str
    level_downsamples: tuple[float, ...]
    bounds: tuple[int, int, int, int]
    background_rgb: tuple[int, int, int]

    def tile_downsample(self, tile_mpp: float) -> float:
        """Level-0 pixels per pixel of a tile at `tile_mpp` um/px.

        That of a level which is within 2% of the wanted resolution, since such a level is used pixel by pixel: so
        tiles neither overlap nor leave gaps, and coincide with the level's own compressed tiles. Otherwise exact.
        """
        wanted = tile_mpp / self.mpp
        native = [level for level in self.level_downsamples if is_native_level(wanted, level)]
        return min(native, key=lambda level: abs(wanted / level - 1)) if native else wanted

    def level_for(self, downsample: float) -> int:
        """The level to read from: the coarsest one at least as fine as `downsample` level-0 pixels per pixel."""
        fine = [
            (level_downsample, level)
            for level, level_downsample in enumerate(self.level_downsamples)
            if level_downsample <= downsample * (1 + _NATIVE_TOLERANCE)
        ]
        return max(fine)[1] if fine else 0


def is_native_level(downsample: float, level_downsample: float) -> bool:
    """Whether a level is so close to the wanted resolution that its pixels are used as they are."""
    return abs(downsample / level_downsample - 1) <= _NATIVE_TOLERANCE


def make_slide_info(
    slide_id: str,
    path: Path,
    *,
    level_sizes: tuple[tuple[int, int], ...],
    level_downsamples: tuple[float, ...],
    properties: Mapping[str, str],
    mpp: float | None = None,
) -> SlideInfo:
    """Checks what a reader found out about a slide.

    Args:
        slide_id (`str`): name of the slide.
        path (`Path`): its file.
        level_sizes (`tuple[tuple[int, int], ...]`): width and height of each level, px, finest first.
        level_downsamples (`tuple[float, ...]`): level-0 pixels per pixel of each level.
        properties (`Mapping[str, str]`): OpenSlide's properties. They are asked for by name, never listed: listing
            fails on names that are not UTF-8.
        mpp (`float`, *optional*): resolution of level 0, um/px, used instead of what the properties say.

    Returns:
        `SlideInfo`: numbers that can be relied on.

    Raises:
        SlideError: `too_large`, `unreadable`, `mpp_missing` or `mpp_out_of_range`.
    """
    _check_limits(slide_id, path, level_sizes, properties)
    return SlideInfo(
        slide_id=slide_id,
        path=path,
        width_px=level_sizes[0][0],
        height_px=level_sizes[0][1],
        mpp=_decide_mpp(slide_id, path, properties, mpp),
        vendor=properties.get("openslide.vendor", "unknown"),
        level_downsamples=tuple(float(value) for value in level_downsamples),
        bounds=_read_bounds(properties, level_sizes[0]),
        background_rgb=_read_background(properties),
    )


def _check_limits(
    slide_id: str, path: Path, sizes: tuple[tuple[int, int], ...], properties: Mapping[str, str]
) -> None:
    """Refuses sizes that no scanner makes, before memory is asked for them."""
    width, height = sizes[0]
    if min(width, height) < 1:
        raise SlideError(slide_id, "unreadable", f"{path}: the image is empty ({width} x {height} px)")
    if max(width, height) > _MAX_SIDE_PX or width * height > _MAX_AREA_PX or len(sizes) > _MAX_LEVELS:
        raise SlideError(
            slide_id,
            "too_large",
            f"{path}: {width} x {height} px in {len(sizes)} levels; at most {_MAX_SIDE_PX} px a side, "
            f"{_MAX_AREA_PX} px and {_MAX_LEVELS} levels are read",
        )
    for level in range(len(sizes)):
        block_width, block_height = (
            _parse_decimal(properties.get(f"openslide.level[{level}].tile-{side}")) or 1.0
            for side in ("width", "height")
        )
        if block_width * block_height > _MAX_TILE_AREA_PX:
            raise SlideError(
                slide_id,
                "too_large",
                f"{path}: level {level} is compressed in blocks of {block_width:g} x {block_height:g} px; at most "
                f"{_MAX_TILE_AREA_PX} px per block are read. Convert it to a tiled, pyramidal TIFF",
            )


def _decide_mpp(slide_id: str, path: Path, properties: Mapping[str, str], override: float | None) -> float:
    """Returns the resolution of level 0, um/px: what the user says, or else what the file says if that makes sense."""
    if override is not None:
        if not MIN_MPP <= override <= MAX_MPP:
            raise _mpp_out_of_range(slide_id, path, f"the given mpp of {override}")
        return float(override)
    # OpenSlide reads Aperio's text by C rules, where "0x1p-1" is 0.5, and drops "nan": look at the text itself.
    source = properties.get("aperio.MPP")
    if source is not None and _parse_decimal(source.replace(",", ".", 1)) is None:
        raise _mpp_out_of_range(slide_id, path, f"aperio.MPP of {source!r}")
    texts = [properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
    if not all(texts):
        raise SlideError(
            slide_id, "mpp_missing", f"{path}: the file does not say its resolution; give mpp (20x is 0.5, 40x 0.25)"
        )
    x, y = (_parse_decimal(text) for text in texts)
    if x is None or y is None or not (MIN_MPP <= x <= MAX_MPP and MIN_MPP <= y <= MAX_MPP):
        raise _mpp_out_of_range(slide_id, path, f"mpp-x of {texts[0]!r} and mpp-y of {texts[1]!r}")
    if abs(x - y) > _MAX_MPP_DIFFERENCE * min(x, y):
        raise _mpp_out_of_range(slide_id, path, f"mpp-x of {x:g} and mpp-y of {y:g}, more than 5% apart,")
    return (x + y) / 2


def _mpp_out_of_range(slide_id: str, path: Path, found: str) -> SlideError:
    return SlideError(
        slide_id,
        "mpp_out_of_range",
        f"{path}: {found} can not be used; expected square pixels of {MIN_MPP} to {MAX_MPP:g} um. Give the right mpp",
    )


def _parse_decimal(text: str | None) -> float | None:
    """Reads a plain decimal number; None for anything else, such as "nan", "inf", "0x1p-1" or "0,5"."""
    if text is None or not _DECIMAL.fullmatch(text.strip()):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _read_bounds(properties: Mapping[str, str], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The scanned area, cut to the canvas; the whole canvas where the format names none or one outside of it."""
    values = [_parse_decimal(properties.get(f"openslide.bounds-{name}")) for name in ("x", "y", "width", "height")]
    if None in values:
        return (0, 0, *size)
    x, y, width, height = (round(value) for value in values)
    left, top = max(0, x), max(0, y)
    right, bottom = min(size[0], x + width), min(size[1], y + height)
    if right <= left or bottom <= top:
        return (0, 0, *size)
    return (left, top, right - left, bottom - top)


def _read_background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    """The background colour, white where the file names none."""
    text = properties.get("openslide.background-color", "")
    if not re.fullmatch(r"[0-9A-Fa-f]{6}", text):
        return (255, 255, 255)
    return (int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16))
