# SPDX-License-Identifier: Apache-2.0
"""Finds marks of felt pens on a picture of a slide by their colour and size. Pure arrays, no files.

Haematoxylin and eosin, diaminobenzidine and blood let more red light pass than green. Blue, green and cyan inks (and
fluorescence) leave little red. Red ink leaves almost only red, black ink nothing; blood and pigment come near these,
but less strong, or in smaller spots within tissue.
"""

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None

# Lengths on the slide in um, areas in um^2.
_MARGIN_UM = 40.0
_REACH_UM = 250.0
_RED_REACH_UM = 800.0
_PEN_RADIUS_UM = 75.0
_MIN_COLD_UM2 = 2_000.0
_MIN_WARM_UM2 = 30_000.0
_MAX_PIGMENT_UM2 = 500_000.0
_MAX_PIGMENT_LIGHT = 0.25
_MAX_BROWN = 6.0  # red above blue, mean of a part


def find_pen_marks(rgb: np.ndarray, mpp: float) -> np.ndarray:
    """Marks pen ink and a margin for its pale edges.

    Args:
        rgb (`np.ndarray` of shape `(h, w, 3)`, uint8): picture whose glass is white.
        mpp (`float`): its resolution, um/px.

    Returns:
        `np.ndarray` of shape `(h, w)`, bool: True where there is ink.
    """
    red, green, blue = cv2.split(rgb)
    warmer = cv2.max(green, blue)
    highest, lowest = cv2.max(red, warmer), cv2.min(cv2.min(red, green), blue)
    chroma = cv2.subtract(highest, lowest)
    # 8-bit arithmetic that saturates: `a - b > n` as `subtract(a, b) > n`.
    cold = (cv2.subtract(green, cv2.convertScaleAbs(red, alpha=1.3)) > 10) & (chroma > 25)
    cold |= cv2.subtract(blue, cv2.convertScaleAbs(red, alpha=2.0)) > 30
    scarlet = (cv2.subtract(red, warmer) > 115) & (green < 62) & (cv2.absdiff(green, blue) < 45)
    black = (highest < 90) & (chroma <= 20)
    black = _black_ink(black, cv2.subtract(red, blue), lowest, mpp) if black.any() else black
    cold = _keep_parts(cold, _MIN_COLD_UM2 / mpp**2)
    small_scarlet = scarlet
    scarlet = _keep_parts(scarlet, _MIN_WARM_UM2 / mpp**2)
    if not (black.any() or cold.any() or scarlet.any()):
        return black
    # Near ink that is sure: ink over tissue or over other ink, too dark for a colour of its own, and pale ink.
    near_cold, near_black = _within(cold, _REACH_UM / mpp), _within(black, _MARGIN_UM / mpp)
    near_scarlet = _within(scarlet, _RED_REACH_UM / mpp)
    dark = highest < 75
    reddish = ((cv2.subtract(red, warmer) > 45) & (green < 75)) | (cv2.subtract(red, warmer) > 110)
    ink = cold | black | scarlet
    ink |= (dark | (cv2.subtract(green, red) > 12)) & (near_cold | near_black)
    ink |= (dark | reddish) & near_scarlet
    ink |= small_scarlet & (near_cold | near_black)
    ink |= (highest < 110) & near_cold & near_scarlet
    return _within(ink, _MARGIN_UM / mpp)


def _within(mask: np.ndarray, distance_px: float) -> np.ndarray:
    """Pixels, bool (h, w), that are nearer than a distance to a mask."""
    if not mask.any():
        return mask
    return cv2.distanceTransform(1 - mask.astype(np.uint8), cv2.DIST_L2, 3) < distance_px


def _black_ink(black: np.ndarray, brown: np.ndarray, lowest: np.ndarray, mpp: float) -> np.ndarray:
    """Those parts of black pixels, bool (h, w), that are as wide as a pen, and no pigment: brown, or within tissue."""
    side = 2 * max(0, round(_PEN_RADIUS_UM / mpp)) + 1
    wide = cv2.erode(black.astype(np.uint8), np.ones((side, side), np.uint8))
    num_parts, labels, statistics, _ = cv2.connectedComponentsWithStats(black.astype(np.uint8), connectivity=8)
    is_ink = np.bincount(labels[wide > 0], minlength=num_parts) > 0
    is_ink[0] = False
    if not is_ink.any():
        return is_ink[labels]
    brownness = np.bincount(labels[black], brown[black], minlength=num_parts)
    is_ink &= brownness <= _MAX_BROWN * statistics[:, cv2.CC_STAT_AREA]
    for part in np.flatnonzero(is_ink & (statistics[:, cv2.CC_STAT_AREA] < _MAX_PIGMENT_UM2 / mpp**2)).tolist():
        left, top, width, height = statistics[part, :4].tolist()
        area = np.s_[max(0, top - 4) : top + height + 4, max(0, left - 4) : left + width + 4]
        spot = (labels[area] == part).astype(np.uint8)
        ring = (cv2.dilate(spot, np.ones((7, 7), np.uint8)) > 0) & (spot == 0)
        is_ink[part] = (lowest[area][ring] > 215).mean() > _MAX_PIGMENT_LIGHT if ring.any() else True
    return is_ink[labels]


def _keep_parts(mask: np.ndarray, min_area_px: float) -> np.ndarray:
    """Keeps the connected parts of a mask, bool (h, w), with at least `min_area_px` pixels."""
    if not mask.any():
        return mask
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    is_kept = statistics[:, cv2.CC_STAT_AREA] >= min_area_px
    is_kept[0] = False
    return is_kept[labels]
