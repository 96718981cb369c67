# SPDX-License-Identifier: Apache-2.0
"""MIRAX: photos at places of their own on a canvas that is larger than what was scanned, against what was painted.

That tiles are OpenSlide's pixels is tested beside the other layouts, in `test_pixel_parity`.
"""

import numpy as np
import openslide
import pytest

from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.slide_tiles import tile_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

from .mirax_slide import FILL_RGB, PHOTO_PX, photo_positions, write_mirax
from .slide_layouts import painted_pixels


@pytest.fixture(scope="module")
def pixels():
    return painted_pixels(1700, 1500)


@pytest.fixture(scope="module")
def path(pixels, tmp_path_factory):
    return write_mirax(tmp_path_factory.mktemp("mirax") / "slide.mrxs", pixels)


def covered(shape):
    """Where a photo lies, bool (h, w)."""
    mask = np.zeros(shape, dtype=bool)
    for x, y in photo_positions().values():
        mask[y : y + PHOTO_PX, x : x + PHOTO_PX] = True
    return mask


def test_what_is_known_of_the_slide(path):
    corners = np.array(list(photo_positions().values()))
    with openslide.OpenSlide(path) as slide, SlideReader(path) as reader:
        info = reader.info
        assert (info.vendor, info.mpp) == ("mirax", 0.5)
        assert (info.width_px, info.height_px) == slide.dimensions
        assert info.level_downsamples == slide.level_downsamples == (1, 2, 4)
        # The last photos reach a few pixels beyond the canvas, whose size is that of photos in their nominal places.
        low, high = corners.min(axis=0), np.minimum(corners.max(axis=0) + PHOTO_PX, slide.dimensions)
        assert info.bounds == (*low.tolist(), *(high - low).tolist())
        assert info.background_rgb == FILL_RGB
    assert low.min() > 200  # else a grid that forgets the bounds would go unnoticed


def test_level_0_positions_name_the_pixels_under_the_camera(path, pixels):
    is_covered = covered(pixels.shape[:2])
    with SlideReader(path) as reader:
        for x, y in [(230, 470), (511, 700), (1000, 420), (901, 643), (1300, 1100)]:
            tile = reader.read_tile(x, y, tile_size_px=96, tile_mpp=0.5).astype(float)
            shown = is_covered[y : y + 96, x : x + 96]
            painted = np.where(shown[..., None], pixels[y : y + 96, x : x + 96], np.array(FILL_RGB))
            difference = np.abs(tile - painted).mean()
            beside = np.abs(tile[:, 1:] - painted[:, :-1]).mean()
            assert difference < 3 < beside, (x, y)  # compressed with loss; a shift by one pixel is far worse


@pytest.mark.parametrize("tile_mpp", [0.5, 1.0, 2.0])
def test_the_grid_starts_at_the_bounds_and_covers_what_was_scanned(path, tile_mpp):
    config = TileGridConfig(tile_size_px=32, tile_mpp=tile_mpp, mask_mpp=4.0, min_tissue_fraction=0.5)
    with SlideReader(path) as reader:
        grid = tile_slide(reader, config)
        left, top, width, height = reader.info.bounds
    side = round(32 * tile_mpp / 0.5)
    assert ((grid.tile_xy - (left, top)) % side == 0).all()
    assert (grid.tile_xy >= (left, top)).all()
    assert (grid.tile_xy < (left + width, top + height)).all()
    assert len(grid) > 40
    # What was not scanned is no tissue (masks are 40 px off at most), but for the hole of one photo: holes are filled.
    is_scanned = covered((1500, 1700))
    is_scanned[650:1000, 900:1200] = True
    assert all(is_scanned[y - 40 : y + side + 40, x - 40 : x + side + 40].any() for x, y in grid.tile_xy.tolist())
