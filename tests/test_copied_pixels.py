# SPDX-License-Identifier: Apache-2.0
"""Copied tiles against OpenSlide, on every layout and on every real slide that opens; see `openslide_reference`."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from modeling_dre_slcl.slide_reader import SlideError, SlideReader

from .openslide_reference import (
    LAYOUTS_THAT_OPEN,
    MAX_DIFFERENCE,
    REAL_SLIDES,
    Reference,
    layout_writer,
    note,
    noted_differences,
    open_mpp,
    slow_but_first,
)
from .slide_layouts import LAYOUTS

OWN_TABLES = {"jpeg_progressive"}  # each tile has its own, so they begin in different ways


@pytest.fixture(scope="module")
def worst():
    yield from noted_differences()


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return layout_writer(tmp_path_factory.mktemp("layouts"))


def decoded(jpeg):
    """A JPEG file by two independent libraries, uint8 RGB each."""
    image = Image.open(io.BytesIO(jpeg))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    bgr = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    return np.asarray(image), cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def own_tiles(reference, level, tile):
    """(column, row, x, y) of all tiles of a level; x and y on level 0."""
    width, height = reference.slide.level_dimensions[level]
    downsample = reference.downsamples[level]
    return [
        (column, row, round(column * tile[1] * downsample), round(row * tile[0] * downsample))
        for row in range(-(-height // tile[0]))
        for column in range(-(-width // tile[1]))
    ]


def check_copied(reader, reference, level, tile, places, worst, name):
    """Compares copied tiles with OpenSlide's pixels; returns the (column, row) of those that were copied."""
    copied = set()
    tile_mpp = reference.mpp * reference.downsamples[level]
    check_batches(reader, [place[2:] for place in places], tile[0], tile_mpp, name)
    for column, row, x, y in places:
        jpeg = reader.compressed_tile(x, y, tile_size_px=tile[0], tile_mpp=tile_mpp)
        if jpeg is None:
            continue
        copied.add((column, row))
        for pixels in decoded(jpeg):
            assert pixels.shape == (*tile, 3)
            difference = reference.difference(pixels, x, y, tile_mpp, whole_pixels=True)
            note(worst, name, "copied", difference)
            assert difference <= MAX_DIFFERENCE, f"level {level}, tile ({column}, {row})"
    return copied


def check_batches(reader, tile_xy, size, tile_mpp, name):
    """Many tiles at once must be the tiles one by one; those unlike the others may be left out."""
    asked = {"tile_size_px": size, "tile_mpp": tile_mpp}
    singles = [reader.compressed_tile(x, y, **asked) for x, y in tile_xy]
    start = 0
    while start < len(tile_xy):
        room = 40_000 if start else 1  # some tiles, and one at first, however little room there is
        content, offsets = reader.compressed_tiles(np.array(tile_xy[start:]), **asked, max_bytes=room)
        assert len(offsets) > 1
        assert len(offsets) == 2 or offsets[-1] <= room
        for single, first, end in zip(singles[start:], offsets[:-1], offsets[1:], strict=False):
            given = content[first:end].tobytes()
            assert given == (single or b"") or (name in OWN_TABLES and given == b"")
        start += len(offsets) - 1


@pytest.mark.parametrize("name", slow_but_first(LAYOUTS_THAT_OPEN))
def test_copied_tiles_are_what_openslide_shows_there(slides, worst, name):
    # OpenSlide takes a tile of an Aperio slide for missing too where the level above lacks a part of it.
    layout, reference = LAYOUTS[name], Reference(slides(name), 0.5)
    before = set()
    with SlideReader(slides(name)) as reader:
        for level in range(len(reference.downsamples)):
            width, height = reference.slide.level_dimensions[level]
            columns = -(-width // layout.tile[1])
            places = own_tiles(reference, level, layout.tile)
            whole = {
                (column, row)
                for column, row, _, _ in places
                if (column + 1) * layout.tile[1] <= width and (row + 1) * layout.tile[0] <= height
            }
            absent = {(index % columns, index // columns) for of_level, index in layout.missing if of_level == level}
            if layout.vendor == "aperio" and level:
                absent |= {(column // 4, row // 4) for column, row in before}
            before = absent
            is_copied = layout.is_jpeg and layout.tile[0] == layout.tile[1]
            if (level and layout.vendor == "philips") or (level == 1 and layout.extra == "decoy"):
                is_copied = False  # not the size of OpenSlide's level, or not the only one of its size
            copied = check_copied(reader, reference, level, layout.tile, places, worst, name)
            assert copied == (whole - absent if is_copied else set()), f"level {level}"


@pytest.mark.parametrize("name", ["jpeg_256", "jpeg_240", "jpeg_512", "generic_jpeg"])
def test_nothing_is_copied_where_the_tile_is_not_the_files_own(slides, name):
    size = LAYOUTS[name].tile[0]
    with SlideReader(slides(name)) as reader:
        assert reader.compressed_tile(size, 0, tile_size_px=size, tile_mpp=0.5) is not None
        assert reader.compressed_tile(size, 0, tile_size_px=size, tile_mpp=0.5045) is not None  # within 2%
        for x, y, asked, tile_mpp in [
            (size + 1, 0, size, 0.5),
            (size, 1, size, 0.5),
            (size, 0, size - 16, 0.5),
            (size, 0, size // 2, 0.5),
            (size, 0, 2 * size, 0.5),
            (size, 0, size, 0.52),
            (size, 0, size, 1.0),
            (-size, 0, size, 0.5),
            (0, -size, size, 0.5),
            (100 * size, 0, size, 0.5),
            (0, 100 * size, size, 0.5),
        ]:
            assert reader.compressed_tile(x, y, tile_size_px=asked, tile_mpp=tile_mpp) is None, (x, y, asked, tile_mpp)
        with pytest.raises(SlideError, match="mpp_too_coarse"):
            reader.compressed_tile(size, 0, tile_size_px=size, tile_mpp=0.4)


def test_a_tile_that_was_cut_off_is_an_error_and_never_a_tile(slides):
    path = slides("jpeg_cut_tile")
    x, y = 256, 256  # the seventh tile of five a row
    with SlideReader(path) as reader:
        before = reader.read_tile(0, 0, tile_size_px=256, tile_mpp=0.5)
        np.testing.assert_array_equal(before, Reference(path, 0.5).region(0, 0, 0, 256, 256))
        assert reader.compressed_tile(0, 0, tile_size_px=256, tile_mpp=0.5) is not None
        assert reader.compressed_tile(x, y, tile_size_px=256, tile_mpp=0.5) is None
        with pytest.raises(SlideError) as caught:
            reader.read_tile(x + 200, y + 200, tile_size_px=256, tile_mpp=0.5)
    assert caught.value.reason in ("truncated", "unreadable")


@pytest.mark.parametrize("path", slow_but_first(REAL_SLIDES))
def test_copied_tiles_of_real_slides_are_what_openslide_shows_there(path, worst):
    reference = Reference(path, open_mpp(path))
    with SlideReader(path, mpp=reference.mpp) as reader:
        for level in range(len(reference.downsamples)):
            names = [f"openslide.level[{level}].tile-{side}" for side in ("height", "width")]
            if not all(name in reference.slide.properties for name in names):
                continue
            tile = tuple(int(reference.slide.properties[name]) for name in names)
            width, height = reference.shown_size(level)
            places = [
                place
                for place in own_tiles(reference, level, tile)
                if (place[0] + 1) * tile[1] <= width and (place[1] + 1) * tile[0] <= height
            ]
            check_copied(reader, reference, level, tile, places[:: max(1, len(places) // 20)], worst, path.name)
