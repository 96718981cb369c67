# SPDX-License-Identifier: Apache-2.0
"""A slide small enough to be encoded in a moment."""

from pathlib import Path

import cv2
import numpy as np
import tifffile


def write_tiny_slide(path: Path, *, tissue: bool = True) -> Path:
    """Writes a tiled TIFF of 768 x 512 px at 0.5 um/px, with an ellipse of tissue unless told otherwise."""
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal(243, 2, (512, 768, 3)), 0, 255).astype(np.uint8)
    if tissue:
        inside = cv2.ellipse(np.zeros((512, 768), np.uint8), (384, 256), (150, 110), 0, 0, 360, 1, -1).astype(bool)
        texture = rng.normal((190, 110, 160), 25, (int(inside.sum()), 3))
        pixels[inside] = np.clip(texture, 0, 255).astype(np.uint8)
    resolution = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", compression="jpeg", **resolution)
    return path
