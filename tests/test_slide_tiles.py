# SPDX-License-Identifier: Apache-2.0
"""From a slide to batches of tiles, and the pictures drawn of them."""

import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from modeling_dre_slcl import slide_tiles
from modeling_dre_slcl.slide_reader import SlideError, SlideReader
from modeling_dre_slcl.slide_tiles import draw_heatmap, draw_tile_grid, iter_tile_batches, tile_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real slides are not here")
CONFIG = TileGridConfig(tile_size_px=64, tile_mpp=0.5, mask_mpp=4.0)


def write_slide(path, *, tissue=True, mpp=0.5, side=1024):
    pixels = np.full((side, side, 3), 244, np.uint8)
    if tissue:
        rng = np.random.default_rng(0)
        stained = rng.integers(-20, 20, pixels.shape) + np.array([200, 120, 170])
        where = cv2.circle(np.zeros(pixels.shape[:2], np.uint8), (side // 2, side // 2), side // 3, 1, -1) > 0
        pixels[where] = stained[where]
    description = "Aperio Image Library v1\n10x10" + (f"|MPP = {mpp}" if mpp else "")
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate", "metadata": None}
    tifffile.imwrite(path, pixels, description=description, **options)
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_slide(tmp_path_factory.mktemp("slide") / "a.svs")


@pytest.fixture(scope="module")
def grid(slide):
    with SlideReader(slide) as reader:
        return tile_slide(reader, CONFIG)


def test_tiles_cover_the_tissue_and_little_else(grid):
    centres = grid.tile_xy + 32 - 512
    distance = np.hypot(centres[:, 0], centres[:, 1])
    assert distance.max() < 341 + 32
    covered = len(grid) * 64**2 / (np.pi * 341**2)
    assert 0.95 < covered < 1.2


def test_no_tissue_is_refused(tmp_path):
    with SlideReader(write_slide(tmp_path / "a.svs", tissue=False)) as reader, pytest.raises(SlideError) as caught:
        tile_slide(reader, CONFIG)
    assert caught.value.reason == "no_tissue"


def test_too_coarse_a_slide_is_refused_before_pixels_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(SlideReader, "read_overview", None)
    with SlideReader(write_slide(tmp_path / "a.svs", mpp=0.6)) as reader, pytest.raises(SlideError) as caught:
        tile_slide(reader, CONFIG)
    assert caught.value.reason == "mpp_too_coarse"


@pytest.mark.parametrize(("batch_size", "num_threads"), [(1, 1), (7, 2), (50, 3), (1000, 2)])
def test_batches_are_in_order_and_complete(slide, grid, batch_size, num_threads):
    read = iter_tile_batches(slide, grid, batch_size=batch_size, num_threads=num_threads)
    batches = [(indices, pixels.copy()) for indices, pixels in read]
    indices = np.concatenate([indices for indices, _ in batches])
    np.testing.assert_array_equal(indices, np.arange(len(grid)))
    assert indices.dtype == np.int64
    assert [len(indices) for indices, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    pixels = np.concatenate([pixels for _, pixels in batches])
    assert (pixels.shape, pixels.dtype) == ((len(grid), 64, 64, 3), np.uint8)
    with SlideReader(slide) as reader:
        for (x, y), tile in zip(grid.tile_xy, pixels, strict=True):
            np.testing.assert_array_equal(tile, reader.read_tile(x, y, tile_size_px=64, tile_mpp=0.5))


def test_few_batches_are_read_ahead(slide, grid, monkeypatch):
    read = []
    original = SlideReader.read_tile

    def count(self, *arguments, **options):
        read.append(threading.get_ident())
        return original(self, *arguments, **options)

    monkeypatch.setattr(SlideReader, "read_tile", count)
    for done, _ in enumerate(iter_tile_batches(slide, grid, batch_size=8, num_threads=3)):
        assert len(read) <= 8 * (done + 2)
    assert len(read) == len(grid)


def test_stopping_early_leaves_no_threads_and_no_open_files(slide, grid, monkeypatch):
    closed = []
    original = SlideReader.close
    monkeypatch.setattr(SlideReader, "close", lambda self: (closed.append(self), original(self))[1])
    batches = iter_tile_batches(slide, grid, batch_size=8, num_threads=3)
    next(batches)
    batches.close()
    assert len(closed) == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tile-reader")]


def test_an_unreadable_tile_is_an_error_of_the_slide(slide, grid, monkeypatch):
    def fail(self, x, y, **options):
        raise SlideError("a", "unreadable", "damaged block")

    monkeypatch.setattr(SlideReader, "read_tile", fail)
    with pytest.raises(SlideError, match="damaged block"):
        list(iter_tile_batches(slide, grid, batch_size=8))


def test_a_grid_made_for_another_resolution_is_refused(slide, grid):
    with pytest.raises(ValueError, match=r"64 level-0 pixels wide, but at the slide's 0\.25 um/px they would be 128"):
        next(iter_tile_batches(slide, grid, batch_size=8, mpp=0.25))


def test_override_and_slide_id_are_passed_on(tmp_path):
    path = write_slide(tmp_path / "a.svs", mpp=None)
    with SlideReader(path, mpp=0.5) as reader:
        grid = tile_slide(reader, CONFIG)
    assert sum(len(indices) for indices, _ in iter_tile_batches(path, grid, batch_size=64, mpp=0.5)) == len(grid)
    with pytest.raises(SlideError, match="other: mpp_missing"):
        next(iter_tile_batches(path, grid, batch_size=64, slide_id="other"))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 4, "num_threads": 0}])
def test_counts_below_one_are_refused(slide, grid, options):
    with pytest.raises(ValueError, match="at least 1"):
        next(iter_tile_batches(slide, grid, **options))


def test_preview_marks_tiles_and_pales_the_rest(slide, grid):
    with SlideReader(slide) as reader:
        overview, downsample = reader.read_overview(2.0)
        preview = draw_tile_grid(overview, downsample, reader.info.bounds, grid)
    assert (preview.shape, preview.dtype) == (overview.shape, np.uint8)
    x, y = (grid.tile_xy[0] // 4).tolist()
    assert preview[y, x].tolist() == preview[y + 15, x + 15].tolist() == list(slide_tiles._GRID_RGB)
    np.testing.assert_array_equal(preview[y + 5, x + 5], overview[y + 5, x + 5])
    np.testing.assert_array_equal(preview[0, 0], 128 + overview[0, 0] // 2)


def test_heatmap_colours_tiles_by_rank_and_ignores_outliers(slide, grid):
    values = grid.tile_xy[:, 0].astype(float)
    values[0] = 1e9
    with SlideReader(slide) as reader:
        overview, downsample = reader.read_overview(2.0)
        heatmap = draw_heatmap(overview, downsample, reader.info.bounds, grid, values)
    np.testing.assert_array_equal(heatmap[0, 0], overview[0, 0])
    left, right = heatmap[120:136, 60:76].astype(int), heatmap[120:136, 185:200].astype(int)
    assert left[..., 2].mean() > left[..., 0].mean()
    assert right[..., 0].mean() > right[..., 2].mean()
    same = draw_heatmap(overview, downsample, (0, 0, 1024, 1024), grid, np.ones(len(grid)))
    assert same.dtype == np.uint8


@pytest.mark.parametrize("values", [np.zeros(3), np.full(1, np.nan), np.zeros((2, 2))])
def test_heatmap_wants_one_finite_value_per_tile(slide, grid, values):
    values = np.full(len(grid), np.nan) if values.shape == (1,) else values
    with pytest.raises(ValueError, match="one per tile"):
        draw_heatmap(np.zeros((8, 8, 3), np.uint8), 128.0, (0, 0, 1024, 1024), grid, values)


@needs_data
def test_bounds_of_a_canvas_twice_as_large_are_respected():
    config = TileGridConfig(tile_mpp=2.0)
    grids = {}
    for name in ("erosion_HE_5x.scn", "erosion_HE_5x_generic.tif", "erosion_HE_5x_dicom/level0.dcm"):
        with SlideReader(DATA / "containers" / name) as reader:
            grids[name] = tile_slide(reader, config).tile_xy.tolist()
    assert len(next(iter(grids.values()))) == 27
    assert grids["erosion_HE_5x.scn"] == grids["erosion_HE_5x_generic.tif"] == grids["erosion_HE_5x_dicom/level0.dcm"]


@needs_data
def test_real_tiles_are_mostly_tissue():
    path = DATA / "slides_full" / "lung-scc_HE3.svs"
    with SlideReader(path) as reader:
        grid = tile_slide(reader, TileGridConfig(min_tissue_fraction=0.9))
    assert 100 < len(grid) < 245
    _, pixels = next(iter_tile_batches(path, grid, batch_size=32))
    assert np.ptp(pixels.astype(int), axis=3).mean(axis=(1, 2)).min() > 15


@needs_data
@pytest.mark.parametrize(
    "name", ["openslide_small.svs", "hd1/highdicom_sm_image.dcm", "hamamatsu_test3-DAPI-2-387.ndpi"]
)
def test_slides_without_brightfield_tissue_are_refused(name):
    with SlideReader(DATA / "vendor" / name) as reader, pytest.raises(SlideError) as caught:
        tile_slide(reader, TileGridConfig())
    assert caught.value.reason == "no_tissue"
