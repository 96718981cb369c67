# SPDX-License-Identifier: Apache-2.0
"""Large slides that are written by repetition: OpenSlide opens them and every level shows the same picture."""

import cv2
import numpy as np
import openslide
import pytest
import tifffile

from benchmarks.large_slide import painted_block, write_large_slide


def read(slide, level, x, y, side):
    """uint8 RGB of a square of one level, in pixels of that level."""
    downsample = round(slide.level_downsamples[level])
    rgba = np.asarray(slide.read_region((x * downsample, y * downsample), level, (side, side)))
    assert rgba[..., 3].min() == 255
    return rgba[..., :3]


@pytest.mark.parametrize(
    ("tile_size_px", "codec", "block_px"), [(240, "jpeg", 960), (256, "jpeg", 1024), (256, "jpeg2000", 1024)]
)
def test_every_level_shows_the_painted_block(tmp_path, tile_size_px, codec, block_px):
    path = write_large_slide(
        tmp_path / "a.svs", 5000, 4100, mpp=0.5, tile_size_px=tile_size_px, codec=codec, tissue_share=1
    )
    tissue, _ = painted_block(block_px)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        assert slide.level_dimensions == ((5000, 4100), (1250, 1025))
        for level, size in enumerate((block_px, block_px // 4)):
            shown = read(slide, level, size, 2 * size, size)
            expected = cv2.resize(tissue, (size, size), interpolation=cv2.INTER_AREA)
            # Wrong colours or a shift by one pixel would differ by more than ten on average.
            assert np.abs(shown.astype(int) - expected).mean() < 6


def test_a_huge_slide_of_shared_tiles_is_a_small_file(tmp_path):
    path = write_large_slide(tmp_path / "a.svs", 200_000, 150_000, store_once=True, tissue_share=0.3)
    assert path.stat().st_size < 20e6
    with tifffile.TiffFile(path) as tiff:
        counts = np.asarray(tiff.pages[0].databytecounts)
        assert [len(page.dataoffsets) for page in tiff.pages] == [782 * 586, 196 * 147, 49 * 37, 13 * 10]
    tissue = counts > 6000
    assert tissue.mean() == pytest.approx(0.3, abs=0.02)
    assert 13_000 < counts[tissue].mean() < 19_000
    with openslide.OpenSlide(path) as slide:
        assert slide.level_downsamples == pytest.approx((1, 4, 16, 64), rel=1e-3)
        whole = read(slide, 3, 0, 0, 2304)
        assert (whole.std(axis=2) > 8).mean() == pytest.approx(0.3, abs=0.06)


def test_the_same_arguments_give_the_same_bytes_and_the_seed_moves_the_tissue(tmp_path):
    first, again, other = (
        write_large_slide(tmp_path / name, 9000, 7000, seed=seed).read_bytes()
        for name, seed in (("a.svs", 0), ("b.svs", 0), ("c.svs", 1))
    )
    assert first == again != other


@pytest.mark.parametrize("wrong", [{"codec": "png"}, {"tile_size_px": 250}, {"tissue_share": 1.5}, {"width_px": 0}])
def test_arguments_that_make_no_slide_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        write_large_slide(tmp_path / "a.svs", **{"width_px": 1000, "height_px": 1000, **wrong})
