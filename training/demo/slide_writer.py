# SPDX-License-Identifier: Apache-2.0
"""Plays the laboratory and the scanner: stain maps become pixels, and pixels a pyramidal slide file.

Stain follows the Beer-Lambert law: light = background * exp(-(h * haematoxylin + e * eosin)). The file is a tiled JPEG
TIFF in the manner of Aperio scanners, so that OpenSlide finds levels and microns per pixel. OpenCV encodes the tiles
and the container is written here: tifffile would want imagecodecs even for tiles that are encoded already.
Source: TIFF 6.0 and TIFF Technical Note 2 (JPEG); OpenSlide's description of the Aperio format.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

STAIN_STEPS = 128  # value of a stain map that means concentration 1
HAEMATOXYLIN_OD = (0.75, 0.95, 0.42)  # optical density of concentration 1 in red, green, blue
EOSIN_OD = (0.09, 0.72, 0.28)
PEN_COLOURS = ((35, 60, 150), (25, 110, 70), (40, 40, 45))
TIFF_TILE_PX = 256
JPEG_QUALITY = 88
REDUCED_IMAGE = 1  # NewSubfileType of the lower levels
_ASCII, _SHORT, _LONG = 2, 3, 4  # field types of TIFF


def scan_slide(
    haematoxylin: np.ndarray,
    eosin: np.ndarray,
    *,
    case_rng: np.random.Generator,
    slide_rng: np.random.Generator,
) -> np.ndarray:
    """Stains a section and scans it, with the faults of both.

    Args:
        haematoxylin (`np.ndarray`): uint8 (h, w), `STAIN_STEPS` for concentration 1; changed in place by folds.
        eosin (`np.ndarray`): uint8 (h, w), as above.
        case_rng (`np.random.Generator`): stain of the case, new for every slide of it.
        slide_rng (`np.random.Generator`): everything else.

    Returns:
        `np.ndarray`: uint8 (h, w, 3), red, green, blue.
    """
    _fold(slide_rng, haematoxylin, eosin)
    rgb = _stain(case_rng, slide_rng, haematoxylin, eosin)
    _add_bubble(slide_rng, rgb)
    _add_dust(slide_rng, rgb)
    _add_pen(slide_rng, rgb)
    return _expose(slide_rng, rgb)


def _fold(rng: np.random.Generator, *stains: np.ndarray) -> None:
    """Doubles the stain along a bent strip on one slide in four: tissue folded onto itself."""
    if rng.random() > 0.25:
        return
    height, width = stains[0].shape
    start = rng.uniform(0.3, 0.7, 2) * [width, height]
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.12, 30))
    path = start + np.cumsum(np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(8, 14), 0)
    strip = np.zeros((height, width), np.uint8)
    cv2.polylines(strip, [np.rint(path).astype(np.int32)], False, 255, int(rng.integers(10, 22)), cv2.LINE_AA)
    for stain in stains:
        cv2.add(stain, stain, dst=stain, mask=strip)


def _stain(
    case_rng: np.random.Generator, slide_rng: np.random.Generator, haematoxylin: np.ndarray, eosin: np.ndarray
) -> np.ndarray:
    """Returns the light that passes, by a table of all pairs of concentrations; uint8 (h, w, 3).

    Slides of a case differ from each other as much as cases do: were the stain the case's own, a few dozen training
    cases could be told apart by colour, and an encoder would learn that instead of the arrangement of cells.
    """
    dyes = []
    for density in (HAEMATOXYLIN_OD, EOSIN_OD):
        hue = np.asarray(density)
        for rng in (case_rng, slide_rng):
            hue = hue * np.exp(rng.normal(0, 0.06) + rng.normal(0, 0.025, 3))
        dyes.append(hue)
    background = 243 + case_rng.normal(0, 1.5) + slide_rng.normal(0, 1.5, 3)
    levels = np.arange(256)[:, None] / STAIN_STEPS
    densities = (levels * dyes[0])[:, None] + (levels * dyes[1])[None]
    table = np.rint(background * np.exp(-densities)).clip(0, 255).astype(np.uint8).reshape(-1, 3)
    return np.take(table, (haematoxylin.astype(np.uint16) << 8) | eosin, axis=0)


def _add_bubble(rng: np.random.Generator, rgb: np.ndarray) -> None:
    """Draws the grey rim of an air bubble on one slide in six."""
    if rng.random() > 1 / 6:
        return
    height, width = rgb.shape[:2]
    centre = tuple(int(value) for value in rng.uniform(0, 1, 2) * [width, height])
    radius = int(rng.integers(60, 160))
    rim = np.zeros((height, width), np.uint8)
    cv2.circle(rim, centre, radius, 90, 9, cv2.LINE_AA)
    cv2.circle(rim, centre, radius - 4, 150, 3, cv2.LINE_AA)
    left, top = max(centre[0] - radius - 9, 0), max(centre[1] - radius - 9, 0)
    area = np.s_[top : centre[1] + radius + 9, left : centre[0] + radius + 9]
    rgb[area] = np.rint(rgb[area] * (1 - cv2.GaussianBlur(rim[area], (0, 0), 2.0)[..., None] / 255.0))


def _add_dust(rng: np.random.Generator, rgb: np.ndarray) -> None:
    """Draws dark specks on every slide and a hair on one in three."""
    height, width = rgb.shape[:2]
    for x, y in (rng.uniform(0, 1, (int(rng.integers(5, 40)), 2)) * [width, height]).astype(int).tolist():
        size = tuple(int(value) for value in rng.integers(1, 5, 2))
        grey = int(rng.integers(50, 120))
        cv2.ellipse(rgb, (x, y), size, 0, 0, 360, (grey + 15, grey + 5, grey), -1, cv2.LINE_AA)
    if rng.random() < 1 / 3:
        angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.25, 40))
        path = rng.uniform(0, 1, 2) * [width, height]
        path = path + np.cumsum(np.stack([np.cos(angles), np.sin(angles)], 1) * 8, 0)
        cv2.polylines(rgb, [np.rint(path).astype(np.int32)], False, (95, 100, 120), 2, cv2.LINE_AA)


def _add_pen(rng: np.random.Generator, rgb: np.ndarray) -> None:
    """Draws a pathologist's pen stroke through a corner on one slide in five; the ink lets some light through."""
    if rng.random() > 0.2:
        return
    height, width = rgb.shape[:2]
    corner = np.array([width, height]) * rng.integers(0, 2, 2)
    inward = np.where(corner == 0, 1, -1)
    reach = rng.uniform(0.12, 0.28) * min(width, height)
    turns = np.linspace(0, np.pi / 2, 24)
    arc = corner + inward * np.stack([np.cos(turns), np.sin(turns)], 1) * reach + rng.normal(0, 2.5, (24, 2))
    ink = np.zeros((height, width), np.uint8)
    cv2.polylines(ink, [np.rint(arc).astype(np.int32)], False, 225, int(rng.integers(14, 34)), cv2.LINE_AA)
    x, y, box_width, box_height = cv2.boundingRect(ink)
    area = np.s_[y : y + box_height, x : x + box_width]
    colour = np.array(PEN_COLOURS[int(rng.integers(len(PEN_COLOURS)))])
    share = ink[area][..., None] / 255.0
    rgb[area] = np.rint(rgb[area] * (1 - share) + np.minimum(rgb[area], colour) * share)


def _expose(rng: np.random.Generator, rgb: np.ndarray) -> np.ndarray:
    """Returns the image out of a slightly soft lens with sensor noise, uint8 (h, w, 3)."""
    soft = cv2.GaussianBlur(rgb, (0, 0), rng.uniform(0.55, 0.95))
    noise = np.frombuffer(rng.bytes(soft.size), np.uint8).reshape(soft.shape) >> 5
    return cv2.subtract(cv2.add(soft, noise), np.full_like(noise, 3))  # noise of -3 to 4


def write_slide(path: str | Path, pixels: np.ndarray, *, mpp: float, num_levels: int = 3) -> None:
    """Writes `encode_slide(pixels)` to a file, atomically; arguments and errors as there."""
    # Imported here: processes that only paint and encode must not wait for torch, which the package imports.
    from modeling_dre_slcl.atomic_files import atomic_file

    data = encode_slide(pixels, mpp=mpp, num_levels=num_levels)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def encode_slide(pixels: np.ndarray, *, mpp: float, num_levels: int = 3) -> bytes:
    """Encodes pixels as a pyramidal slide that OpenSlide opens as an Aperio file; every level halves the one before.

    Args:
        pixels (`np.ndarray`): uint8 (h, w, 3), red, green, blue.
        mpp (`float`): microns per pixel of `pixels`.
        num_levels (`int`, *optional*, defaults to 3): levels of the pyramid.

    Returns:
        `bytes`: a little-endian TIFF; the same pixels give the same bytes.

    Raises:
        ValueError: if `pixels` is not uint8 (h, w, 3), or the file would reach the 4 GiB that this TIFF can address.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels: expected uint8 (h, w, 3), found {pixels.dtype} {pixels.shape}.")
    description = f"Aperio synthetic slide\n{pixels.shape[1]}x{pixels.shape[0]}|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
    data = bytearray(b"II*\0" + bytes(4))
    link = 4  # where the offset of the next directory belongs
    for level in range(num_levels):
        if level:
            size = max(pixels.shape[1] // 2, 1), max(pixels.shape[0] // 2, 1)
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        link = _append_level(data, pixels, link=link, subfile=REDUCED_IMAGE if level else 0, description=description)
    return bytes(data)


def _append_level(data: bytearray, pixels: np.ndarray, *, link: int, subfile: int, description: str) -> int:
    """Appends the tiles and the directory of one level; returns where the offset of the next directory belongs."""
    offsets, counts = [], []
    for tile in _encode_tiles(pixels):
        offsets.append(_append(data, tile))
        counts.append(len(tile))
    fields = (
        (254, _LONG, [subfile]),  # NewSubfileType
        (256, _LONG, [pixels.shape[1]]),  # ImageWidth
        (257, _LONG, [pixels.shape[0]]),  # ImageLength
        (258, _SHORT, [8, 8, 8]),  # BitsPerSample
        (259, _SHORT, [7]),  # Compression: JPEG
        (262, _SHORT, [6]),  # PhotometricInterpretation: YCbCr, what a JPEG of OpenCV holds
        (270, _ASCII, list(description.encode("ascii") + b"\0")),  # ImageDescription
        (277, _SHORT, [3]),  # SamplesPerPixel
        (284, _SHORT, [1]),  # PlanarConfiguration: samples interleaved
        (322, _LONG, [TIFF_TILE_PX]),  # TileWidth
        (323, _LONG, [TIFF_TILE_PX]),  # TileLength
        (324, _LONG, offsets),  # TileOffsets
        (325, _LONG, counts),  # TileByteCounts
        (530, _SHORT, [2, 2]),  # YCbCrSubSampling
    )
    directory = struct.pack("<H", len(fields))
    for tag, kind, values in fields:
        value = struct.pack(f"<{len(values)}{ {_ASCII: 'B', _SHORT: 'H', _LONG: 'I'}[kind] }", *values)
        # What does not fit into four bytes is stored elsewhere and pointed to.
        inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", _append(data, value))
        directory += struct.pack("<HHI", tag, kind, len(values)) + inline
    start = _append(data, directory + bytes(4))
    struct.pack_into("<I", data, link, start)
    return start + len(directory)


def _append(data: bytearray, block: bytes) -> int:
    """Appends a block at an even position, as TIFF demands, and returns the position."""
    data.extend(bytes(len(data) % 2))
    if len(data) + len(block) >= 2**32:
        raise ValueError("pixels: expected a slide below 4 GiB, but its file would be larger. Paint a smaller one.")
    data.extend(block)
    return len(data) - len(block)


def _encode_tiles(pixels: np.ndarray) -> Iterator[bytes]:
    """Yields the JPEG streams of all tiles, row by row; the last ones repeat their edge, so that it stays clean."""
    height, width = pixels.shape[:2]
    below, right = -height % TIFF_TILE_PX, -width % TIFF_TILE_PX
    padded = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    for top in range(0, height, TIFF_TILE_PX):
        for left in range(0, width, TIFF_TILE_PX):
            tile = padded[top : top + TIFF_TILE_PX, left : left + TIFF_TILE_PX, ::-1]
            yield cv2.imencode(".jpg", np.ascontiguousarray(tile), options)[1].tobytes()
