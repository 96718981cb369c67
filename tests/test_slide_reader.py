# SPDX-License-Identifier: Apache-2.0
"""Pixels against OpenSlide with area averaging in numpy, the rules for resolution and limits, and damaged files."""

import copy
import hashlib
import os
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile

from modeling_dre_slcl.slide_reader import REASONS, SlideError, SlideReader, slide_fingerprint

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real slides are not here")


def smooth_pixels(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def write_slide(path, pixels, *, mpp="0.5", levels=(), **options):
    """Writes an Aperio-style pyramid without loss; `levels` are the downsamples below level 0."""
    description = "Aperio Image Library v1\n10x10|AppMag = 20" + (f"|MPP = {mpp}" if mpp is not None else "")
    common = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate", "metadata": None, **options}
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as writer:
        common.pop("bigtiff", None)
        writer.write(pixels, description=description, **common)
        for factor in levels:
            size = (pixels.shape[1] // factor, pixels.shape[0] // factor)
            writer.write(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), description=description, **common)
    return path


def area_weights(length_in, length_out):
    """Share of each input cell in each output cell, (out, in): plain interval arithmetic."""
    ratio = length_in / length_out
    weights = np.zeros((length_out, length_in))
    for i in range(length_out):
        for j in range(length_in):
            weights[i, j] = max(0.0, min((i + 1) * ratio, j + 1) - max(i * ratio, j)) / ratio
    return weights


def area_average(pixels, width, height):
    rows, columns = area_weights(pixels.shape[0], height), area_weights(pixels.shape[1], width)
    return np.einsum("ih,hwc,jw->ijc", rows, pixels.astype(np.float64), columns, optimize=True)


def reference_tile(path, x, y, level, size, tile_size_px):
    """OpenSlide's own pixels of one level over white, averaged in float64."""
    with openslide.OpenSlide(path) as slide:
        rgba = np.asarray(slide.read_region((x, y), level, (size, size))).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return area_average(rgba[..., :3] * alpha + 255 * (1 - alpha), tile_size_px, tile_size_px)


@pytest.fixture
def slide(tmp_path):
    return write_slide(tmp_path / "a.svs", smooth_pixels(700, 900), levels=(4,))


def test_info(slide):
    with SlideReader(slide) as reader:
        info = reader.info
    assert (info.slide_id, info.path, info.width_px, info.height_px) == ("a", slide, 900, 700)
    assert (info.mpp, info.vendor, info.bounds, info.background_rgb) == (0.5, "aperio", (0, 0, 900, 700), (255,) * 3)
    assert info.level_downsamples == pytest.approx((1.0, 4.0))


def test_native_tiles_are_the_files_pixels(slide):
    with SlideReader(slide) as reader:
        tile = reader.read_tile(np.int32(37), np.int32(51), tile_size_px=256, tile_mpp=0.5)
    np.testing.assert_array_equal(tile, smooth_pixels(700, 900)[51:307, 37:293])
    assert tile.dtype == np.uint8


def test_a_resolution_within_two_percent_is_read_pixel_by_pixel(tmp_path):
    path = write_slide(tmp_path / "a.svs", smooth_pixels(400, 400), mpp="0.4955")
    with SlideReader(path) as reader:
        tile = reader.read_tile(3, 5, tile_size_px=256, tile_mpp=0.5)
    np.testing.assert_array_equal(tile, smooth_pixels(400, 400)[5:261, 3:259])


@pytest.mark.parametrize(
    ("mpp", "level", "size"),
    # 64 px at 1 um/px: 256 level-0 px at 0.25 from level 0 or 64 level-1 px; 227.8 at 0.281; 61.5 at 1.04.
    [("0.25", 1, 64), ("0.281", 0, 228), ("0.5", 0, 128), ("0.9", 0, 71)],
)
def test_tiles_are_area_averages_of_the_coarsest_fine_enough_level(tmp_path, mpp, level, size):
    path = write_slide(tmp_path / "a.svs", smooth_pixels(640, 640), mpp=mpp, levels=(4,))
    with SlideReader(path) as reader:
        tile = reader.read_tile(80, 120, tile_size_px=64, tile_mpp=1.0)
    expected = reference_tile(path, 80, 120, level, size, 64)
    assert np.abs(tile - expected).max() <= 0.51 + 1e-6


def test_tiles_beyond_the_canvas_show_the_background(slide):
    with SlideReader(slide) as reader:
        tile = reader.read_tile(800, -50, tile_size_px=256, tile_mpp=0.5)
    expected = np.full((256, 256, 3), 255, np.uint8)
    expected[50:, :100] = smooth_pixels(700, 900)[:206, 800:]
    np.testing.assert_array_equal(tile, expected)


def test_magnifying_more_than_five_percent_is_refused(tmp_path):
    path = write_slide(tmp_path / "a.svs", smooth_pixels(400, 400), mpp="0.52")
    with SlideReader(path) as reader:
        assert reader.read_tile(0, 0, tile_size_px=256, tile_mpp=0.5).shape == (256, 256, 3)
        with pytest.raises(SlideError, match=r"0\.52 um/px") as caught:
            reader.read_tile(0, 0, tile_size_px=256, tile_mpp=0.49)
    assert caught.value.reason == "mpp_too_coarse"


def test_overview_is_the_area_average_of_the_scanned_area(slide):
    with SlideReader(slide) as reader:
        overview, downsample = reader.read_overview(5.0)
    assert (overview.shape, downsample) == ((70, 90, 3), 10.0)
    expected = area_average(cv2.resize(smooth_pixels(700, 900), (225, 175), interpolation=cv2.INTER_AREA), 90, 70)
    assert np.abs(overview - expected).max() <= 0.51


def test_overview_from_a_nearly_fitting_level_states_that_levels_downsample(slide):
    with SlideReader(slide) as reader:
        overview, downsample = reader.read_overview(2.035)
    assert (overview.shape, downsample) == ((175, 225, 3), 4.0)
    np.testing.assert_array_equal(
        overview, cv2.resize(smooth_pixels(700, 900), (225, 175), interpolation=cv2.INTER_AREA)
    )


def test_overview_in_blocks_equals_the_overview_at_once(slide, monkeypatch):
    with SlideReader(slide) as reader:
        at_once, _ = reader.read_overview(1.0)
    with SlideReader(slide) as reader:
        monkeypatch.setattr("modeling_dre_slcl.slide_reader._MAX_READ_PX", 128)
        in_blocks, _ = reader.read_overview(1.0)
    np.testing.assert_array_equal(at_once, in_blocks)


def test_overview_is_never_finer_than_level_0_and_never_huge(slide, monkeypatch):
    with SlideReader(slide) as reader:
        overview, downsample = reader.read_overview(0.1)
        assert (overview.shape, downsample) == ((700, 900, 3), 1.0)
        assert reader.read_overview(0.1)[0] is overview
        assert not overview.flags.writeable
        monkeypatch.setattr("modeling_dre_slcl.slide_reader._MAX_OVERVIEW_PX", 100)
        overview, downsample = reader.read_overview(0.1)
        assert (overview.shape, downsample) == ((78, 100, 3), 9.0)
        assert reader.read_overview(1e6)[0].shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "mpp_missing"),
        ("nan", "mpp_out_of_range"),
        ("inf", "mpp_out_of_range"),
        ("-0.499", "mpp_out_of_range"),
        ("0", "mpp_out_of_range"),
        ("4990", "mpp_out_of_range"),
        ("1e9999", "mpp_out_of_range"),
        ("0x1p-1", "mpp_out_of_range"),
        ("0.5\xff", "mpp_out_of_range"),
        ("0.04", "mpp_out_of_range"),
    ],
)
def test_senseless_resolutions_are_refused_unless_overridden(tmp_path, text, reason):
    path = write_slide(tmp_path / "a.svs", smooth_pixels(64, 64), mpp=None if text is None else "#" * len(text))
    if text is not None:  # tifffile writes ASCII only
        path.write_bytes(path.read_bytes().replace(b"#" * len(text), text.encode("latin-1")))
    with pytest.raises(SlideError, match="a: ") as caught:
        SlideReader(path)
    assert caught.value.reason == reason
    with SlideReader(path, mpp=0.5) as reader:
        assert reader.info.mpp == 0.5


@pytest.mark.parametrize("text", ["0,4990", "0.499", " 0.499 ", "4.99e-1"])
def test_sensible_resolutions_are_accepted(tmp_path, text):
    with SlideReader(write_slide(tmp_path / "a.svs", smooth_pixels(64, 64), mpp=text)) as reader:
        assert reader.info.mpp == pytest.approx(0.499)


@pytest.mark.parametrize("override", [0.0, -1.0, 11.0, float("nan"), float("inf")])
def test_senseless_overrides_are_refused(slide, override):
    with pytest.raises(SlideError, match="the given mpp") as caught:
        SlideReader(slide, mpp=override)
    assert caught.value.reason == "mpp_out_of_range"


def test_transparent_pixels_show_the_background_colour():
    from modeling_dre_slcl.pixel_areas import composite

    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [100, 200, 0, 128]]], dtype=np.uint8)
    assert composite(rgba, (240, 230, 220))[0].tolist() == [[10, 20, 30], [240, 230, 220], [170, 215, 110]]


def refuse(path, **arguments):
    with pytest.raises(SlideError) as caught:
        SlideReader(path, **arguments)
    assert str(caught.value).startswith(f"{caught.value.slide_id}: {caught.value.reason}: ")
    return caught.value.reason


def test_what_is_not_a_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.svs")
    (tmp_path / "folder.svs").mkdir()
    (tmp_path / "loop.svs").symlink_to("loop.svs")
    (tmp_path / "dangling.svs").symlink_to("nothing")
    (tmp_path / "empty.svs").touch()
    for name in ("pipe.svs", "folder.svs", "loop.svs", "dangling.svs", "absent.svs", "nul\0.svs"):
        assert refuse(tmp_path / name) == "not_a_file"
    assert refuse("/dev/zero") == "not_a_file"
    assert refuse(tmp_path / "empty.svs") == "truncated"


def test_other_files_are_unsupported(tmp_path):
    (tmp_path / "noise.svs").write_bytes(bytes(range(256)) * 20)
    cv2.imwrite(str(tmp_path / "plain.png"), smooth_pixels(64, 64))
    assert refuse(tmp_path / "noise.svs", slide_id="other") == "unsupported"
    assert refuse(tmp_path / "plain.png") == "unsupported"


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.99])
def test_slides_cut_off_while_copying_are_refused_when_opened(tmp_path, share, bigtiff):
    whole = write_slide(tmp_path / "a.svs", smooth_pixels(700, 900), levels=(4,), bigtiff=bigtiff).read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[: max(9, int(share * len(whole)))])
    assert refuse(tmp_path / "cut.svs") == "truncated"


def test_damaged_pixels_give_a_slide_error_on_reading(tmp_path):
    path = write_slide(tmp_path / "a.svs", smooth_pixels(256, 256), compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = b"\x00" * size
    path.write_bytes(content)
    with SlideReader(path) as reader, pytest.raises(SlideError, match="copy it again") as caught:
        reader.read_tile(0, 0, tile_size_px=64, tile_mpp=0.5)
    assert caught.value.reason == "unreadable"


def read_or_refuse(path):
    """Reason of the refusal, or None; any other exception fails the test."""
    try:
        with SlideReader(path, mpp=0.5) as reader:
            reader.read_tile(0, 0, tile_size_px=128, tile_mpp=0.5)
    except SlideError as error:
        return error.reason
    return None


def test_slides_with_changed_bytes_are_read_or_refused(tmp_path):
    content = write_slide(tmp_path / "a.svs", smooth_pixels(128, 128), compression="jpeg").read_bytes()
    rng = np.random.default_rng(0)
    reasons = set()
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 1000), 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "b.svs").write_bytes(damaged)
        reasons.add(read_or_refuse(tmp_path / "b.svs"))
    assert {None, "truncated", "unsupported"} < reasons <= {None, *REASONS}


def test_errors_survive_the_way_back_from_a_worker_process():
    # Copying takes an error apart and builds it anew, as sending it to another process does.
    error = copy.deepcopy(SlideError("a", "no_tissue", "nothing stained"))
    assert (error.slide_id, error.reason, error.message) == ("a", "no_tissue", "nothing stained")
    with pytest.raises(ValueError, match="reason"):
        SlideError("a", "bad_luck", "")


def test_fingerprint_sees_size_start_and_end(tmp_path):
    content = np.random.default_rng(0).bytes(3 << 20)
    path = tmp_path / "a.svs"
    path.write_bytes(content)
    expected = hashlib.sha256(f"{3 << 20}\n".encode() + content[: 1 << 20] + content[-(1 << 20) :]).hexdigest()
    assert slide_fingerprint(path) == expected
    fingerprints = {expected}
    for changed in (content[:-1], content + b"\0", b"\0" + content[1:], content[:-1] + b"\0", content[:100]):
        path.write_bytes(changed)
        fingerprints.add(slide_fingerprint(path))
    assert len(fingerprints) == 6
    with pytest.raises(SlideError, match="not_a_file"):
        slide_fingerprint(tmp_path)


def falls_on_a_pixel(start, downsample):
    """The first level-0 position from `start` on that is a pixel of a level: between pixels OpenSlide interpolates."""
    return next(x for x in range(start, start + 10_000) if abs(x / downsample - round(x / downsample)) < 0.002)


@needs_data
@pytest.mark.parametrize(
    ("name", "mpp", "tile_mpp", "level", "size"),
    [
        ("slides_full/tubularadenoma-flat_HE.svs", None, 0.5, 0, 256),
        ("slides_full/lung-scc_HE3.svs", None, 0.5, 0, 512),
        ("slides_full/lung-scc_HE3.svs", None, 1.0, 1, 256),
        ("vendor/CMU-1-Small-Region.svs", None, 0.8, 0, 410),
        ("vendor/CMU-1-Small-Region.svs", None, 0.5, 0, 256),
        ("vendor/TCGA-CR-7395-01A-01-TS1.svs", 0.25, 0.5, 1, 256),
        ("vendor/hamamatsu_test3-DAPI-2-387.ndpi", None, 0.5, 1, 280),
        ("containers/erosion_HE_5x.scn", None, 4.0, 1, 256),
        ("containers/erosion_HE_5x_dicom/level1.dcm", None, 3.0, 0, 384),
        ("containers/erosion_HE_5x_philips.tiff", None, 2.0, 0, 256),
        ("containers/erosion_HE_5x.ome.tif", None, 2.0, 0, 256),
    ],
)
def test_real_tiles_are_openslides_pixels_area_averaged(name, mpp, tile_mpp, level, size):
    with SlideReader(DATA / name, mpp=mpp) as reader:
        info = reader.info
        downsample = info.level_downsamples[level]
        x = falls_on_a_pixel(info.bounds[0] + info.bounds[2] // 3, downsample)
        y = falls_on_a_pixel(info.bounds[1] + info.bounds[3] // 3, downsample)
        tile = reader.read_tile(x, y, tile_size_px=256, tile_mpp=tile_mpp)
    expected = reference_tile(DATA / name, x, y, level, size, 256)
    assert np.abs(tile - expected).max() <= 0.51
    if size == 256:
        np.testing.assert_array_equal(tile, expected)


@needs_data
def test_the_same_tissue_in_every_container_gives_the_same_picture():
    pictures = {}
    for path in sorted((DATA / "containers").glob("erosion_HE_5x*")):
        with SlideReader(path if path.is_file() else path / "level0.dcm") as reader:
            assert reader.info.bounds == (0, 0, 1650, 2109)
            pictures[path.name] = reader.read_overview(8.0)[0].astype(int)
    # The one without a pyramid is averaged here, the others were reduced by whoever wrote them.
    reference = pictures["erosion_HE_5x_generic.tif"]
    for name, picture in pictures.items():
        assert picture.shape == reference.shape, name
        assert np.abs(picture - reference).mean() < 4, name


@needs_data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken/broken.svs", "unsupported"),
        ("broken/openslide_unopenable.tiff", "unsupported"),
        ("broken/dicom_concatenation/ezwsi_test_wsi.dcm", "unsupported"),
        ("broken/dicom_no_pyramid/ezwsi_test.dcm", "unsupported"),
        ("broken/highdicom_sm_image_jpegls.dcm", "unsupported"),
        ("broken/openslide_unreadable.svs", "unreadable"),
        ("vendor/TCGA-CR-7395-01A-01-TS1.svs", "mpp_missing"),
        ("vendor/tcga_xk_aaju_dicom/level0_repaired.dcm", "mpp_missing"),
        ("vendor/camelyon_dicom/camelyon_multiframe.dcm", "mpp_out_of_range"),
        ("vendor/openslide_boxes.tiff", "mpp_out_of_range"),
        ("containers/erosion_HE_5x_dicom", "not_a_file"),
    ],
)
def test_real_slides_that_must_be_refused(name, reason):
    with pytest.raises(SlideError) as caught, SlideReader(DATA / name) as reader:
        reader.read_tile(0, 0, tile_size_px=16, tile_mpp=0.5)
    assert caught.value.reason == reason
