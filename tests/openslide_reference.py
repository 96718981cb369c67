# SPDX-License-Identifier: Apache-2.0
"""OpenSlide alone as the reference for every way of reading a slide, on every layout and every real slide.

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

from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import openslide
import pytest

from modeling_dre_slcl.slide_reader import SlideError, SlideReader

from .slide_layouts import LAYOUTS, write_slide

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MAX_DIFFERENCE = 2  # of 255, between two builds of libjpeg
MAX_ROUNDING = 0.51  # of an average that is rounded to a whole number
MAX_REGION_PX = 4096
LAYOUTS_THAT_OPEN = sorted(name for name, layout in LAYOUTS.items() if layout.opens and layout.cut is None)
# One of each way through the reader; the others take longer and run with the slow tests.
FIRST = {
    *("jpeg_256", "jpeg_240", "jpeg_rgb_numbered", "jpeg_odd_ratios", "jpeg_one_tile_missing", "generic_decoy"),
    *("deflate", "leica", "mirax", "CMU-1-Small-Region.svs", "erosion_HE_5x.scn"),
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


def noted_differences():
    """For a fixture: the largest difference of each layout and way of reading, printed at the end (`pytest -s`)."""
    seen = {}
    yield seen
    for (name, way), difference in sorted(seen.items()):
        print(f"{name:36s} {way:16s} {difference:6.2f}")  # noqa: T201


def layout_writer(folder):
    """A function that returns the path of a layout's slide, written once."""

    @cache
    def path_of(name):
        return write_slide(folder / f"{name}.tif", name)

    return path_of


def note(worst, name, way, difference):
    worst[name, way] = max(worst.get((name, way), 0), float(difference))


def open_mpp(path):
    """The slide's resolution, or 1 um/px where it says none that can be used."""
    try:
        with SlideReader(path) as reader:
            return reader.info.mpp
    except SlideError as error:
        return 1.0 if error.reason.startswith("mpp") else pytest.skip(f"refused: {error.reason}")
