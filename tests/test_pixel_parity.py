# SPDX-License-Identifier: Apache-2.0
"""Every way of reading a slide against OpenSlide alone, on every layout and on every real slide that opens.

What OpenSlide shows depends on the position. It takes level-0 pixels, divides by the downsample of the level, and
where the quotient is not whole it interpolates bilinearly between pixels of the level, in steps of 1/128 px. On a
painted slide (steepest edge about 130 of 255 per pixel) it then differs from the level's own pixels by 1 of 255 at a
shift of 1/128 px, by 2 at 1/64, by 16 at 1/8 and by 66 at 1/2. Negative positions are cut to whole pixels of the
level, towards zero (-20 is 4 px outside where the downsample is 4.0003, not 5), and regions are drawn in blocks of
4096 px that each start at a whole level-0 pixel. So:

- on level 0, and where the quotient is whole, OpenSlide's region is the level's own pixels, and exact comparison is
  meaningful at any position;
- a region from (0, 0) of at most 4096 px shows a whole level without interpolation. It is the reference for all
  other positions of readers that take the nearest pixel of the level, which is SlideReader's rule;
- where SlideReader itself asks OpenSlide for pixels that no level-0 position names exactly, the reference is
  OpenSlide's region at the nearest level-0 position: shifted by at most half a level-0 pixel.
"""

import io
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from modeling_dre_slcl.slide_reader import SlideError, SlideReader
from modeling_dre_slcl.slide_tiles import iter_tile_batches, tile_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

from .slide_layouts import LAYOUTS, write_slide

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MAX_DIFFERENCE = 2  # of 255, between two builds of libjpeg
MAX_ROUNDING = 0.51  # of an average that is rounded to a whole number
MAX_REGION_PX = 4096
LAYOUTS_THAT_OPEN = sorted(name for name, layout in LAYOUTS.items() if layout.opens and layout.cut is None)
# One of each way through the reader; the others take longer and run with the slow tests.
FIRST = {
    *("jpeg_256", "jpeg_240", "jpeg_rgb_numbered", "jpeg_odd_ratios", "jpeg_one_tile_missing", "generic_decoy"),
    *("deflate", "leica", "CMU-1-Small-Region.svs", "erosion_HE_5x.scn"),
}
# Read by whole pixels of the level at any position; the others as OpenSlide interpolates.
PLAIN = {name for name, layout in LAYOUTS.items() if layout.is_jpeg}
# Where tiles are missing or hard to find, a reader may do one or the other.
EITHER = {name for name, layout in LAYOUTS.items() if layout.missing or layout.extra == "decoy"}
RESAMPLED = (0.53, 0.737, 1.0, 2.9)  # um/px, off the steps of all pyramids


def real_slides():
    """All slides of the test data that OpenSlide opens, one file of each DICOM series."""
    found = []
    for folder in ("slides", "slides_full", "containers", "vendor"):
        for path in sorted((DATA / folder).rglob("*")):
            first_of_series = path.suffix != ".dcm" or path == min(path.parent.glob("*.dcm"))
            if path.is_file() and first_of_series and openslide.OpenSlide.detect_format(path):
                found.append(path)
    return found


REAL_SLIDES = real_slides()


def slow_but_first(cases):
    """Parameters with names as their ids; those that are not among `FIRST` are marked slow."""
    names = [getattr(case, "name", case) for case in cases]
    marks = [() if name in FIRST else pytest.mark.slow for name in names]
    return [pytest.param(case, id=name, marks=mark) for case, name, mark in zip(cases, names, marks, strict=True)]


class Reference:
    """A slide as OpenSlide shows it, over its background: slow, plain, and without any code of the reader."""

    def __init__(self, path, mpp):
        self.slide = openslide.OpenSlide(path)
        self.mpp = mpp
        self.downsamples = self.slide.level_downsamples
        colour = self.slide.properties.get("openslide.background-color", "FFFFFF")
        self.background = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)])
        self.levels = {}

    def region(self, x, y, level, width, height):
        """float64 (height, width, 3) from a level-0 position."""
        rgba = np.asarray(self.slide.read_region((x, y), level, (width, height))).astype(np.float64)
        alpha = rgba[..., 3:] / 255
        return rgba[..., :3] * alpha + self.background * (1 - alpha)

    def level_pixels(self, level, x, y, width, height):
        """float64 (height, width, 3) from a position in pixels of the level; background beyond it."""
        if level == 0 and max(self.slide.dimensions) > MAX_REGION_PX:
            return self.region(x, y, 0, width, height)
        if level not in self.levels:
            self.levels[level] = self.region(0, 0, level, *self.shown_size(level))
        return self.paste(self.levels[level], x, y, width, height)

    def nearest_region(self, level, x, y, width, height):
        """The same as OpenSlide shows it at the nearest level-0 position; never from a negative one."""
        left, top = max(x, 0), max(y, 0)
        part = (max(1, x + width - left), max(1, y + height - top))
        origin = round(left * self.downsamples[level]), round(top * self.downsamples[level])
        return self.paste(self.region(*origin, level, *part), x - left, y - top, width, height)

    def paste(self, pixels, x, y, width, height):
        """Cuts (height, width) out of pixels at (x, y), with background around them."""
        area = np.empty((height, width, 3))
        area[:] = self.background
        top, bottom, left, right = (
            max(y, 0), min(y + height, pixels.shape[0]), max(x, 0), min(x + width, pixels.shape[1])
        )  # fmt: skip
        if bottom > top and right > left:
            area[top - y : bottom - y, left - x : right - x] = pixels[top:bottom, left:right]
        return area

    def shown_size(self, level):
        """Width and height of the level, as far as one region shows it."""
        return tuple(min(side, MAX_REGION_PX) for side in self.slide.level_dimensions[level])

    def plan(self, tile_mpp):
        """The documented rule: the coarsest level that is fine enough within 2%, and its pixels per pixel."""
        wanted = tile_mpp / self.mpp
        level = max(i for i, downsample in enumerate(self.downsamples) if i == 0 or downsample <= wanted * 1.02)
        ratio = wanted / self.downsamples[level]
        return level, 1.0 if abs(ratio - 1) <= 0.02 else ratio

    def difference(self, tile, x, y, tile_mpp, *, whole_pixels):
        """Largest difference of a tile from what it should be.

        `whole_pixels` says whether it should show the nearest pixels of the level, or what OpenSlide shows at the
        nearest level-0 position; None if either will do. Of positions in the middle of two pixels either is right.
        """
        level, ratio = self.plan(tile_mpp)
        size = tile.shape[0]
        side = max(1, round(size * ratio))
        reads = {True: [self.level_pixels], False: [self.nearest_region]}
        return min(
            np.abs(tile - resize(read(level, level_x, level_y, side, side), size)).max()
            for read in reads.get(whole_pixels, [self.level_pixels, self.nearest_region])
            for level_x in nearest(x / self.downsamples[level])
            for level_y in nearest(y / self.downsamples[level])
        )


def nearest(position):
    """The whole number next to a position, or both if it lies in the middle."""
    if abs(position - np.floor(position) - 0.5) < 1e-6:
        return [int(np.floor(position)), int(np.ceil(position))]
    return [round(position)]


def resize(pixels, size):
    """Area average in float64 to (size, size, 3); bilinear where it is magnified."""
    length = pixels.shape[0]
    if length == size:
        return pixels
    weights = area_weights(length, size) if length > size else bilinear_weights(length, size)
    rows = (weights @ pixels.reshape(length, -1)).reshape(size, length, 3)
    return weights @ rows


@lru_cache(maxsize=32)
def area_weights(length_in, length_out):
    """Share of each input cell in each output cell, (out, in)."""
    edges_in, edges_out = np.arange(length_in + 1.0), np.linspace(0, length_in, length_out + 1)
    overlap = np.minimum(edges_out[1:, None], edges_in[None, 1:]) - np.maximum(
        edges_out[:-1, None], edges_in[None, :-1]
    )
    return np.maximum(overlap, 0) * length_out / length_in


@lru_cache(maxsize=32)
def bilinear_weights(length_in, length_out):
    """Weights of the two input cells nearest to the centre of each output cell, (out, in)."""
    centres = np.clip((np.arange(length_out) + 0.5) * length_in / length_out - 0.5, 0, length_in - 1)
    return np.maximum(1 - np.abs(centres[:, None] - np.arange(length_in)), 0)


def positions(reference, level, size, count, seed):
    """Level-0 positions: corners, aligned to 256 px of the level, anywhere, and partly or wholly outside."""
    rng = np.random.default_rng([seed, level])
    width, height = reference.shown_size(level)
    downsample = reference.downsamples[level]
    inside = rng.integers(0, (max(1, width - size), max(1, height - size)), (count, 2))
    grid = rng.integers(0, (-(-width // 256), -(-height // 256)), (count // 2, 2)) * 256
    rim = np.array([[0, 0], [-size // 3, -size // 2], [width - size // 2, 5], [7, height - 3], [width + 9, 0]])
    places = np.concatenate([inside, grid, rim[[0, 1]], rim[2:] if max(width, height) < MAX_REGION_PX else rim[:0]])
    places = np.rint(places * downsample).astype(int)
    anywhere = rng.integers(0, np.maximum(1, (np.array([width, height]) - size) * downsample), (count, 2)).astype(int)
    return np.concatenate([places, anywhere]).tolist()


@pytest.fixture(scope="module")
def worst():
    """Largest difference seen for each layout and way of reading; printed at the end (`pytest -s`)."""
    seen = {}
    yield seen
    for (name, way), difference in sorted(seen.items()):
        print(f"{name:36s} {way:16s} {difference:6.2f}")  # noqa: T201


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Path of a layout's slide, written once."""
    folder, paths = tmp_path_factory.mktemp("layouts"), {}

    def path_of(name):
        if name not in paths:
            paths[name] = write_slide(folder / f"{name}.tif", name)
        return paths[name]

    return path_of


def note(worst, name, way, difference):
    worst[name, way] = max(worst.get((name, way), 0), float(difference))


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


def open_mpp(path):
    """The slide's resolution, or 1 um/px where it says none that can be used."""
    try:
        with SlideReader(path) as reader:
            return reader.info.mpp
    except SlideError as error:
        return 1.0 if error.reason.startswith("mpp") else pytest.skip(f"refused: {error.reason}")


@pytest.mark.parametrize("path", slow_but_first(REAL_SLIDES))
def test_real_slides_read_as_openslide_shows_them(path, worst):
    mpp, is_plain = open_mpp(path), None
    check_native(path, path.name, worst, mpp=mpp, whole_pixels=is_plain, count=4)
    check_resampled(path, path.name, worst, mpp=mpp, tile_mpps=(mpp * 1.37, mpp * 2), whole_pixels=is_plain)


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
