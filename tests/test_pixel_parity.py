# SPDX-License-Identifier: Apache-2.0
"""Tiles against OpenSlide, on every layout and on every real slide that opens; see `openslide_reference`."""

import numpy as np
import pytest
import tifffile

from modeling_dre_slcl.slide_reader import SlideError, SlideReader
from modeling_dre_slcl.slide_tiles import iter_tile_batches, tile_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

from .openslide_reference import (
    EITHER,
    LAYOUTS_THAT_OPEN,
    MAX_DIFFERENCE,
    MAX_ROUNDING,
    PLAIN,
    REAL_SLIDES,
    RESAMPLED,
    Reference,
    layout_writer,
    note,
    noted_differences,
    open_mpp,
    positions,
    slow_but_first,
)
from .slide_layouts import LAYOUTS


@pytest.fixture(scope="module")
def worst():
    yield from noted_differences()


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return layout_writer(tmp_path_factory.mktemp("layouts"))


def check_native(path, name, worst, *, mpp, whole_pixels, count=4):
    """Compares tiles at the resolution of each level; `whole_pixels` is None where both readings are right."""
    reference = Reference(path, mpp)
    with SlideReader(path, mpp=mpp) as reader:
        for level, downsample in enumerate(reference.downsamples):
            tile_mpp = mpp * downsample
            for size in (61, 256):
                for x, y in positions(reference, level, size, count, seed=size):
                    tile = reader.read_tile(x, y, tile_size_px=size, tile_mpp=tile_mpp)
                    if level == 0:
                        difference = np.abs(tile - reference.region(x, y, 0, size, size)).max()
                    else:
                        difference = reference.difference(tile, x, y, tile_mpp, whole_pixels=whole_pixels)
                    note(worst, name, "native" if level == 0 else "native, level>0", difference)
                    assert difference <= MAX_DIFFERENCE, f"level {level}, {size} px tile at ({x}, {y})"


@pytest.mark.parametrize("name", slow_but_first(LAYOUTS_THAT_OPEN))
def test_tiles_of_a_level_are_openslides_pixels(slides, worst, name):
    whole = None if name in EITHER else name in PLAIN
    check_native(slides(name), name, worst, mpp=0.5, whole_pixels=whole)


def check_resampled(path, name, worst, *, mpp, tile_mpps, whole_pixels, size=113):
    """Compares tiles that are reduced (or magnified) from a level."""
    reference = Reference(path, mpp)
    with SlideReader(path, mpp=mpp) as reader:
        for tile_mpp in tile_mpps:
            level, ratio = reference.plan(tile_mpp)
            for x, y in positions(reference, level, round(size * ratio), 2, seed=size):
                tile = reader.read_tile(x, y, tile_size_px=size, tile_mpp=tile_mpp)
                difference = reference.difference(tile, x, y, tile_mpp, whole_pixels=whole_pixels)
                note(worst, name, "resampled", difference)
                assert difference <= MAX_DIFFERENCE + MAX_ROUNDING, f"{tile_mpp} um/px at ({x}, {y})"


@pytest.mark.parametrize("name", slow_but_first(LAYOUTS_THAT_OPEN))
def test_resampled_tiles_are_area_averages_of_openslides_pixels(slides, worst, name):
    whole = None if name in EITHER else name in PLAIN
    check_resampled(slides(name), name, worst, mpp=0.5, tile_mpps=RESAMPLED, whole_pixels=whole)


@pytest.mark.parametrize("name", ["jpeg_256", "jpeg_240", "deflate", "leica"])
def test_magnified_tiles_are_interpolated(slides, worst, name):
    check_resampled(slides(name), name, worst, mpp=0.5, tile_mpps=(0.48,), whole_pixels=name in PLAIN)


@pytest.mark.parametrize(
    "name", ["jpeg_240", "jpeg_256", "jpeg_rgb_420", "jpeg_missing_tiles", "jpeg2000_rgb", "leica"]
)
@pytest.mark.parametrize("tile_mpp", [0.5, 1.0])
def test_batches_are_the_tiles(slides, worst, name, tile_mpp):
    path = slides(name)
    reference = Reference(path, 0.5)
    with SlideReader(path) as reader:
        grid = tile_slide(reader, TileGridConfig(tile_size_px=128, tile_mpp=tile_mpp, mask_mpp=4.0))
    count = 0
    for indices, pixels in iter_tile_batches(path, grid, batch_size=7, num_threads=2):
        for index, tile in zip(indices, pixels, strict=True):
            x, y = grid.tile_xy[index].tolist()
            difference = reference.difference(tile, x, y, tile_mpp, whole_pixels=True)
            note(worst, name, "batches", difference)
            assert difference <= MAX_DIFFERENCE + (MAX_ROUNDING if tile_mpp != 0.5 else 0), (x, y)
            count += 1
    assert count == len(grid) > 10


def test_a_decoy_is_not_taken_for_a_level_even_where_both_are_glass(slides):
    """The file holds another picture of the size of level 1; reading starts where both show nothing."""
    path = slides("generic_decoy")
    reference = Reference(path, 0.5)
    tile_mpp = 0.5 * reference.downsamples[1]
    with tifffile.TiffFile(path) as tiff:
        decoy = next(page for page in tiff.pages[1:] if not page.is_reduced).asarray()
    level = reference.level_pixels(1, 0, 0, *decoy.shape[1::-1])
    difference = np.abs(decoy - level).max(axis=2)
    assert difference.max() > 60
    same = [
        (x, y) for y in range(0, 252, 32) for x in range(0, 309, 32) if difference[y : y + 32, x : x + 32].max() < 2
    ]
    assert len(same) > 2
    for x, y in same:
        with SlideReader(path) as reader:
            for place in [(round(4 * x), round(4 * y)), *positions(reference, 1, 64, 10, seed=0)]:
                tile = reader.read_tile(*place, tile_size_px=64, tile_mpp=tile_mpp)
                assert reference.difference(tile, *place, tile_mpp, whole_pixels=None) <= MAX_DIFFERENCE, (x, y, place)


@pytest.mark.parametrize("name", sorted(name for name, layout in LAYOUTS.items() if not layout.opens))
def test_layouts_that_openslide_does_not_open_are_refused(slides, name):
    with pytest.raises(SlideError) as caught:
        SlideReader(slides(name))
    assert caught.value.reason == "unsupported"


@pytest.mark.parametrize("path", slow_but_first(REAL_SLIDES))
def test_real_slides_read_as_openslide_shows_them(path, worst):
    mpp, is_plain = open_mpp(path), None
    check_native(path, path.name, worst, mpp=mpp, whole_pixels=is_plain, count=4)
    check_resampled(path, path.name, worst, mpp=mpp, tile_mpps=(mpp * 1.37, mpp * 2), whole_pixels=is_plain)
