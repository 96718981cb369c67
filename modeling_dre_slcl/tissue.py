# SPDX-License-Identifier: Apache-2.0
"""Finds tissue on a low-resolution picture of a slide: no weights, no GPU, some tens of milliseconds.

Stained tissue has colour, glass does not. So the measure is the chroma (largest minus smallest channel) after the
glass has been made white, with a threshold found per slide but kept within limits, so that a blank slide stays blank
and a pale one is still seen. Ink, black borders and specks are taken out. Meant for brightfield stains such as H&E;
pure arrays, no files.
"""

import math

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None

# Lengths on the slide in um, areas in um^2: independent of the resolution of the picture.
_BLUR_SIGMA_UM = 6.0
_CLOSE_RADIUS_UM = 16.0
_INK_MARGIN_UM = 60.0
_MIN_COLD_INK_UM2 = 2_000.0
_MIN_WARM_INK_UM2 = 20_000.0
_MIN_TISSUE_UM2 = 5_000.0
_MAX_HOLE_UM2 = 40_000.0
# Chroma of 8-bit colours. Noise of scanners and JPEG stays below the first, pale eosin lies above.
_MIN_CHROMA = 13.0
_MAX_CHROMA = 30.0
_BLACK = 45


def tissue_mask(overview_rgb: np.ndarray, mpp: float) -> np.ndarray:
    """Marks the pixels that show tissue.

    Args:
        overview_rgb (`np.ndarray` of shape `(h, w, 3)`, uint8): picture of the slide, RGB.
        mpp (`float`): its resolution, um/px; about 8 works best.

    Returns:
        `np.ndarray` of shape `(h, w)`, bool: True where there is tissue; all False on a slide without.

    Raises:
        ValueError: if the picture or its resolution is not of the expected form.
        ImportError: if OpenCV is not installed.
    """
    if cv2 is None:
        raise ImportError("Finding tissue needs OpenCV: pip install opencv-python-headless")
    if overview_rgb.ndim != 3 or overview_rgb.shape[2] != 3 or overview_rgb.dtype != np.uint8:
        raise ValueError(f"overview_rgb: expected (h, w, 3) uint8, found {overview_rgb.shape} {overview_rgb.dtype}.")
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp: expected a positive number of um/px, found {mpp}.")
    if overview_rgb.size == 0:
        return np.zeros(overview_rgb.shape[:2], dtype=bool)
    smooth_rgb = cv2.GaussianBlur(overview_rgb, (0, 0), max(_BLUR_SIGMA_UM / mpp, 0.1))
    white_rgb = _whiten_glass(smooth_rgb)
    lowest, highest = _channel_range(white_rgb)
    chroma = highest - lowest
    # Where the raw picture is black nothing was scanned, whatever colour the whitening gave it.
    black = _channel_range(smooth_rgb)[1] < _BLACK
    usable = ~(black | _find_ink(white_rgb, chroma, highest, mpp))
    tissue = usable & (chroma > _chroma_threshold(chroma[usable]))
    return _tidy(tissue, mpp) & usable


def _channel_range(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest channel of each pixel, uint8 (h, w) each; ten times faster than numpy's min and max."""
    red, green, blue = cv2.split(rgb)
    return cv2.min(cv2.min(red, green), blue), cv2.max(cv2.max(red, green), blue)


def _whiten_glass(rgb: np.ndarray) -> np.ndarray:
    """Scales the channels, uint8 (h, w, 3), so that the glass of the slide becomes white."""
    glass = _glass_colour(rgb)
    table = np.clip(np.rint(np.arange(256)[:, None] * (255.0 / glass)), 0, 255).astype(np.uint8)
    return cv2.LUT(rgb, table[:, None, :])


def _glass_colour(rgb: np.ndarray) -> np.ndarray:
    """Colour of the empty glass, float64 (3,): the commonest light, nearly grey one; white if there is none.

    Pure white is left out where other light pixels exist: it fills areas that were not scanned.
    """
    lowest, highest = _channel_range(rgb)
    light = (lowest >= 170) & (highest - lowest <= 30)
    scanned = light & (lowest < 255)
    candidates = scanned if scanned.mean() >= 0.02 else light
    if candidates.mean() < 0.02:
        return np.full(3, 255.0)
    pixels = rgb[candidates]
    brightness = pixels.min(axis=1)
    # The peak of the brightness histogram, then the median colour around it.
    counts = np.convolve(np.bincount(brightness, minlength=256), np.ones(5), mode="same")
    peak = int(counts.argmax())
    near = np.abs(brightness.astype(np.int16) - peak) <= 3
    return np.maximum(np.median(pixels[near], axis=0), 1.0)


def _chroma_threshold(chroma: np.ndarray) -> float:
    """Otsu's threshold of the chroma values (n,), kept within limits."""
    if chroma.size == 0:
        return _MAX_CHROMA
    threshold, _ = cv2.threshold(chroma.reshape(-1, 1), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return float(np.clip(threshold, _MIN_CHROMA, _MAX_CHROMA))


def _find_ink(rgb: np.ndarray, chroma: np.ndarray, highest: np.ndarray, mpp: float) -> np.ndarray:
    """Pen marks with a margin for their pale edges, bool (h, w).

    Haematoxylin and eosin both absorb green most, so stained tissue keeps more red than green. Blue, green and cyan
    inks (and fluorescence) leave little red; red ink leaves almost only red; black ink leaves nothing. Red and black
    also occur in tissue, as blood and pigment, so only large parts of these count.
    """
    red, green, blue = (channel.astype(np.int16) for channel in cv2.split(rgb))
    cold_ink = (chroma > 25) & (10 * green > 13 * red + 100) | (blue > 2 * red + 30)
    red_ink = (red - np.maximum(green, blue) > 110) & (np.abs(green - blue) < 40)
    black_ink = (highest < 2 * _BLACK) & (chroma < _MAX_CHROMA)
    ink = _drop_small(cold_ink, _MIN_COLD_INK_UM2 / mpp**2)
    ink |= _drop_small(red_ink | black_ink, _MIN_WARM_INK_UM2 / mpp**2)
    if not ink.any():
        return ink
    return cv2.dilate(ink.astype(np.uint8), _disc(_INK_MARGIN_UM / mpp)).astype(bool)


def _tidy(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Closes gaps between cells, drops specks, fills small holes."""
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, _disc(_CLOSE_RADIUS_UM / mpp)).astype(bool)
    tissue = _drop_small(closed, _MIN_TISSUE_UM2 / mpp**2)
    # A frame joins all glass that reaches the edge of the picture, which so is no hole however small.
    framed = np.pad(~tissue, 1, constant_values=True)
    glass = _drop_small(framed, _MAX_HOLE_UM2 / mpp**2)
    glass |= cv2.floodFill(framed.astype(np.uint8), None, (0, 0), 2)[1] == 2
    return ~glass[1:-1, 1:-1]


def _drop_small(mask: np.ndarray, min_area_px: float) -> np.ndarray:
    """Keeps the connected parts of a mask, bool (h, w), with at least `min_area_px` pixels."""
    num_parts, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    is_kept = statistics[:num_parts, cv2.CC_STAT_AREA] >= min_area_px
    is_kept[0] = False
    return is_kept[labels]


def _disc(radius_px: float) -> np.ndarray:
    side = 2 * max(0, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
