# SPDX-License-Identifier: Apache-2.0
"""What is done to areas of pixels after they were read: laid over a background, reduced, cut into blocks."""

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None


def composite(rgba: np.ndarray, background_rgb: tuple[int, int, int]) -> np.ndarray:
    """Lays pixels over a colour.

    Args:
        rgba (`np.ndarray` of shape `(h, w, 4)`, uint8): pixels, not premultiplied.
        background_rgb (`tuple[int, int, int]`): the colour.

    Returns:
        `np.ndarray` of shape `(h, w, 3)`, uint8: RGB.
    """
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    # 255 * 255 + 127 still fits into 16 bits.
    weight = alpha.astype(np.uint16)
    under = np.array(background_rgb, dtype=np.uint16) * (255 - weight)
    return ((rgba[..., :3] * weight + under + 127) // 255).astype(np.uint8)


def reduce_area(pixels: np.ndarray, out: np.ndarray) -> None:
    """Reduces pixels by area averaging, or magnifies them (by a few percent) bilinearly.

    Args:
        pixels (`np.ndarray` of shape `(h, w, 3)`, uint8): the pixels.
        out (`np.ndarray` of shape `(H, W, 3)`, uint8): receives them in its size.
    """
    height, width = out.shape[:2]
    reduces = pixels.shape[0] >= height and pixels.shape[1] >= width
    cv2.resize(pixels, (width, height), dst=out, interpolation=cv2.INTER_AREA if reduces else cv2.INTER_LINEAR)


def cut_length(length: int, block: int) -> list[tuple[int, int]]:
    """Cuts `range(length)` into runs of at most `block`: (start, stop) pairs."""
    return [(start, min(start + block, length)) for start in range(0, length, block)]
