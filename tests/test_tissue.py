# SPDX-License-Identifier: Apache-2.0
"""The tissue mask on painted slides with a known answer, and on real ones."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.tissue import TISSUE_METHODS, draw_tissue_outline, tissue_mask

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # its files import each other so
import drawn_overviews

SEED = 300  # none that the mask was made with
# One for each thing that the mask must master; all others are slow.
FAST = (
    *("pale_beside_strong", "haematoxylin_only", "adipose", "ihc_dab", "blood", "anthracosis", "small_fragments"),
    *("pen_blue_crossing", "pen_red_crossing", "coverslip_edges", "white_outside_scan", "glass_pink"),
    *("all_tissue_pale", "empty_dirt", "empty_pens", "empty_fluorescence"),
)
SITUATIONS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in drawn_overviews.SITUATIONS
]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
EOSIN, PALE, NUCLEI = (214, 140, 180), (240, 222, 232), (110, 70, 150)
SHAPE = (300, 400)


def glass(colour=(243, 243, 243), noise=2.0, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(np.array(colour) + rng.normal(0, noise, (*SHAPE, 3)), 0, 255).astype(np.uint8)


def blob(centre=(200, 150), axes=(90, 60)):
    return cv2.ellipse(np.zeros(SHAPE, np.uint8), centre, axes, 20, 0, 360, 1, -1).astype(bool)


def paint(picture, where, colour, noise=6.0):
    rng = np.random.default_rng(1)
    texture = np.array(colour) + rng.normal(0, noise, (int(where.sum()), 3))
    picture[where] = np.clip(texture, 0, 255).astype(np.uint8)
    return picture


def overlap(found, truth):
    return (found & truth).sum() / (found | truth).sum()


@pytest.mark.parametrize("colour", [EOSIN, PALE, NUCLEI])
@pytest.mark.parametrize("background", [(255, 255, 255), (243, 243, 243), (205, 205, 205), (244, 238, 226)])
def test_finds_tissue_of_any_strength_on_any_glass(colour, background):
    stained = np.array(colour) * np.array(background) / 255
    picture = paint(glass(background), blob(), stained, noise=3.0)
    assert overlap(tissue_mask(picture, 8.0), blob()) > 0.93


@pytest.mark.parametrize("background", [(255, 255, 255), (243, 243, 243), (200, 200, 200), (244, 238, 226), (0, 0, 0)])
def test_a_slide_without_tissue_gives_an_empty_mask(background):
    assert not tissue_mask(glass(background, noise=4.0), 8.0).any()


def test_all_tissue_gives_a_full_mask():
    assert tissue_mask(paint(glass(), np.ones(SHAPE, bool), EOSIN), 8.0).all()


def test_black_and_white_areas_outside_of_the_scan_are_not_tissue():
    picture = paint(glass(), blob(), EOSIN)
    picture[:, :60], picture[:, -60:] = 0, 255
    found = tissue_mask(picture, 8.0)
    assert not found[:, :58].any()
    assert overlap(found, blob()) > 0.9


@pytest.mark.parametrize("ink", [(40, 70, 180), (30, 140, 110), (20, 90, 40), (25, 25, 25), (200, 25, 30)])
def test_pen_marks_are_rejected(ink):
    picture = paint(glass(), blob(), EOSIN)
    line = cv2.line(np.zeros(SHAPE, np.uint8), (20, 20), (20, 280), 1, 12).astype(bool)
    picture = cv2.GaussianBlur(paint(picture, line, ink), (0, 0), 1.5)
    found = tissue_mask(picture, 8.0)
    assert not found[:, :60].any()
    assert overlap(found, blob()) > 0.93


def test_a_slide_with_only_pen_marks_is_empty():
    assert not tissue_mask(paint(glass(), blob(), (40, 70, 180)), 8.0).any()


def test_fluorescence_is_not_brightfield_tissue():
    assert not tissue_mask(paint(glass((3, 3, 6)), blob(), (5, 5, 140)), 8.0).any()


def test_specks_are_dropped_and_small_holes_filled_but_not_large_ones():
    picture = paint(glass(), blob(), EOSIN)
    picture[20:24, 20:24] = EOSIN
    picture[140:150, 160:170] = 243
    picture[140:175, 200:235] = 243
    found = tissue_mask(picture, 8.0)
    assert not found[:40, :40].any()
    assert found[140:150, 160:170].all()
    assert not found[150:165, 210:225].any()


def test_lengths_are_those_of_the_slide_not_of_the_picture():
    picture = cv2.GaussianBlur(paint(glass(), blob(), EOSIN), (0, 0), 1)
    fine = cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    found = cv2.resize(tissue_mask(fine, 4.0).astype(np.uint8), SHAPE[::-1], interpolation=cv2.INTER_AREA).astype(bool)
    assert overlap(found, tissue_mask(picture, 8.0)) > 0.97


@pytest.mark.parametrize("situation", SITUATIONS)
def test_finds_what_was_drawn(situation):
    drawn = drawn_overviews.draw_overview(situation, SEED)
    found = tissue_mask(drawn.overview_rgb, drawn_overviews.OVERVIEW_MPP)
    if situation.startswith("empty"):
        assert not drawn.tissue.any()
        assert not found.any()
        return
    shared = (found & drawn.tissue).sum()
    assert shared / found.sum() > 0.93
    assert shared / drawn.tissue.sum() > 0.88


def test_drawn_slides_are_what_they_are_called():
    drawn = drawn_overviews.draw_overview("pen_green_crossing", SEED)
    red, green, _ = np.moveaxis(drawn.overview_rgb.astype(int), 2, 0)
    assert (green - red > 40).sum() > 2000
    assert drawn.tissue[green - red > 40].mean() < 0.05
    assert 0.05 < drawn.tissue.mean() < 0.6
    assert (np.ptp(drawn.overview_rgb.astype(int), axis=2)[drawn.tissue] > 20).mean() > 0.9


@pytest.mark.parametrize("method", TISSUE_METHODS)
def test_every_method_finds_plain_tissue(method):
    assert overlap(tissue_mask(cv2.GaussianBlur(paint(glass(), blob(), EOSIN), (0, 0), 1), 8.0, method), blob()) > 0.9


def test_the_methods_of_others_keep_their_known_faults():
    # Users who ask for them by name want what they know.
    ink = paint(glass(), blob(), (40, 70, 180))
    assert not tissue_mask(ink, 8.0).any()
    for method in ("otsu", "hsv"):
        assert overlap(tissue_mask(ink, 8.0, method), blob()) > 0.9
    assert tissue_mask(glass((244, 238, 226)), 8.0, "hsv").all()


def test_a_large_overview_is_worked_on_in_small():
    small = paint(glass(), blob(), EOSIN)
    large = cv2.resize(small, None, fx=12, fy=12, interpolation=cv2.INTER_NEAREST)
    truth = cv2.resize(blob().astype(np.uint8), large.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    found = tissue_mask(large, 8.0)
    assert found.shape == truth.shape
    assert overlap(found, truth) > 0.95


def test_the_outline_lies_on_the_edge_of_the_tissue_and_of_its_holes():
    picture, mask = glass(), blob()
    mask[140:160, 190:210] = False
    drawn = draw_tissue_outline(picture, mask)
    changed = (drawn != picture).any(axis=2)
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_C, 3)
    assert changed[distance == 1].all()
    assert not changed[(distance == 0) | (distance > 2)].any()
    assert (draw_tissue_outline(picture, np.zeros(SHAPE, bool)) == picture).all()
    with pytest.raises(ValueError, match="mask"):
        draw_tissue_outline(picture, mask[1:])


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 2, 3), (0, 5, 3)])
def test_tiny_pictures_do_not_fail(shape):
    assert not tissue_mask(np.full(shape, 240, np.uint8), 8.0).any()


@pytest.mark.parametrize("picture", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_other_arrays_are_refused(picture):
    with pytest.raises(ValueError, match="overview_rgb"):
        tissue_mask(picture, 8.0)
    with pytest.raises(ValueError, match="mpp"):
        tissue_mask(np.zeros((4, 4, 3), np.uint8), 0.0)
    with pytest.raises(ValueError, match="method: expected one of stain, otsu, hsv, found 'hest'"):
        tissue_mask(np.zeros((4, 4, 3), np.uint8), 8.0, "hest")


@pytest.mark.skipif(not DATA.is_dir(), reason="the real slides are not here")
@pytest.mark.parametrize(
    ("name", "low", "high"),
    # Shares of tissue as judged by eye on previews.
    [
        ("slides/celiac_HE_5x.svs", 0.28, 0.40),
        ("slides/lung-scc_HE3_10x.svs", 0.15, 0.24),
        ("slides/pdac-trucut_HE3_10x.svs", 0.06, 0.11),
        ("containers/erosion_HE_5x.scn", 0.36, 0.46),
    ],
)
def test_real_slides(name, low, high):
    with SlideReader(DATA / name) as reader:
        overview_rgb, downsample = reader.read_overview(8.0)
        found = tissue_mask(overview_rgb, reader.info.mpp * downsample)
    assert low < found.mean() < high
    # What was found is darker and more colourful than what was left out.
    spread = np.ptp(overview_rgb.astype(int), axis=2)
    assert spread[found].mean() > 25 > 12 > spread[~found].mean()


@pytest.mark.skipif(not DATA.is_dir(), reason="the real slides are not here")
@pytest.mark.parametrize("mpp", [0.5, 8.0])  # the file does not say; 8 is about right
def test_pen_marks_of_a_real_slide_are_left_out(mpp):
    with SlideReader(DATA / "vendor/tcga_xk_aaju_dicom/level0_repaired.dcm", mpp=mpp) as reader:
        overview_rgb, downsample = reader.read_overview(8.0)
        found = tissue_mask(overview_rgb, reader.info.mpp * downsample)
    red, green, _ = np.moveaxis(overview_rgb.astype(int), 2, 0)
    teal = green - red > 40
    assert teal.sum() > 500
    assert found[teal].mean() < 0.02
    assert 0.3 < found.mean() < 0.5


@pytest.mark.skipif(not DATA.is_dir(), reason="the real slides are not here")
def test_a_real_fluorescence_slide_has_no_tissue():
    with SlideReader(DATA / "vendor/hamamatsu_test3-DAPI-2-387.ndpi") as reader:
        overview_rgb, downsample = reader.read_overview(8.0)
        assert not tissue_mask(overview_rgb, reader.info.mpp * downsample).any()
