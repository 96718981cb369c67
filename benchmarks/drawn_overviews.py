# SPDX-License-Identifier: Apache-2.0
"""Draws overviews of slides whose tissue is known: one function per situation that a tissue mask must master.

Everything is drawn at 4 um/px as amounts of dye and of dirt, turned into light by the Beer-Lambert law, reduced to
8 um/px, and spoiled by the noise of a camera and JPEG compression. The truth is what was drawn: the outlines of the
pieces, their lumens up to 120 um included (as an annotator draws them, and as CLAM and TRIDENT fill them), holes from
500 um on excluded, areas under ink excluded. The same situation and seed give the same pixels. No files here.
"""

import hashlib
from collections.abc import Callable

import cv2
import numpy as np
from drawn_slide import (
    BLOOD,
    EOSIN,
    HAEMATOXYLIN,
    HEIGHT_PX,
    INKS,
    MELANIN,
    MPP,
    OVERVIEW_MPP,
    SOOT,
    WIDTH_PX,
    DrawnOverview,
    DrawnSlide,
)

__all__ = ["OVERVIEW_MPP", "SITUATIONS", "DrawnOverview", "draw_overview"]


def draw_overview(situation: str, seed: int) -> DrawnOverview:
    """Draws one situation of `SITUATIONS`; another seed gives other shapes, dyes, dirt and noise."""
    digest = hashlib.sha256(f"{situation}/{seed}".encode()).digest()
    slide = DrawnSlide(np.random.default_rng(int.from_bytes(digest[:8], "little")))
    SITUATIONS[situation](slide)
    return slide.scan()


def _pale(slide: DrawnSlide) -> None:
    slide.section(slide.pieces(), slide.rng.uniform(0.02, 0.05), slide.rng.uniform(0.09, 0.14))


def _pale_beside_strong(slide: DrawnSlide) -> None:
    slide.he(slide.blob((0.28, 0.5), 1400), strength=1.3)
    slide.section(slide.blob((0.74, 0.5), 1100), 0.03, slide.rng.uniform(0.09, 0.14))


def _haematoxylin_only(slide: DrawnSlide) -> None:
    slide.section(slide.pieces(), slide.rng.uniform(0.15, 0.6), 0.0)


def _adipose(slide: DrawnSlide) -> None:
    """A piece of tissue that runs into fat: cells of 60 to 100 um, empty but for their thin pink membranes."""
    slide.he(slide.blob((0.35, 0.5), 1300))
    fat = slide.blob((0.62, 0.5), 1300) * (1 - slide.tissue)
    slide.tissue = np.maximum(slide.tissue, fat)
    centres = slide.rng.uniform(0, 1, (int(WIDTH_PX * HEIGHT_PX * MPP**2 / 80**2), 2)) * [WIDTH_PX, HEIGHT_PX]
    empty = np.full(slide.shape, 255, np.uint8)
    empty[
        np.clip(centres[:, 1].astype(int), 0, HEIGHT_PX - 1), np.clip(centres[:, 0].astype(int), 0, WIDTH_PX - 1)
    ] = 0
    _, labels = cv2.distanceTransformWithLabels(empty, cv2.DIST_L2, 5)
    labels = labels.astype(np.float32)
    membrane = (cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((2, 2))) > 0).astype(np.float32)
    slide.dye(fat * membrane * np.clip(1 + 0.3 * slide.noise(60), 0.3, 2) * slide.rng.uniform(0.5, 0.8), EOSIN)
    slide.dye(fat * membrane * 0.12, HAEMATOXYLIN)


def _dab(slide: DrawnSlide) -> None:
    slide.section(slide.pieces(), slide.rng.uniform(0.12, 0.3), 0.0, dab=slide.rng.uniform(0.4, 1.0))


def _dab_negative(slide: DrawnSlide) -> None:
    slide.section(slide.pieces(), slide.rng.uniform(0.09, 0.16), 0.0)


def _blood(slide: DrawnSlide) -> None:
    area = slide.he()
    pools = area * (slide.noise(350) > 0.5)
    clot = slide.blob((0.1, 0.12), 450)
    slide.tissue = np.maximum(slide.tissue, clot)
    slide.dye(np.maximum(pools, clot) * slide.rng.uniform(0.7, 1.15) * (1 + 0.15 * slide.noise(8)), BLOOD)


def _melanin(slide: DrawnSlide) -> None:
    area = slide.he(strength=0.5)
    slide.dye(area * np.clip(slide.noise(180) - 0.3, 0, 1) * (1 + 0.3 * slide.noise(8)), MELANIN)


def _anthracosis(slide: DrawnSlide) -> None:
    area = slide.he()
    slide.dye(slide.scatter(area * (slide.noise(300) > 0.5), 250, (10, 60)) * area * slide.rng.uniform(0.4, 0.8), SOOT)


def _cores(slide: DrawnSlide) -> None:
    for place in (0.25, 0.5, 0.75):
        start = np.array([slide.rng.uniform(0.04, 0.12), place])
        slide.he(slide.stroke(start, slide.rng.normal(0, 0.05), slide.rng.uniform(3000, 5000), 500, 0.03))


def _fragments(slide: DrawnSlide) -> None:
    places = slide.rng.permutation([(x, y) for x in np.arange(0.1, 1, 0.16) for y in np.arange(0.12, 1, 0.19)])[:14]
    areas = [slide.blob(tuple(place), slide.rng.uniform(90, 240)) for place in places]
    slide.he(np.max(areas, axis=0))


def _holes(slide: DrawnSlide) -> None:
    area = slide.blob((0.5, 0.5), 2000)
    holes = [slide.blob(place, slide.rng.uniform(260, 420)) for place in ((0.4, 0.42), (0.6, 0.4), (0.5, 0.65))]
    slide.he(area * (1 - np.max(holes, axis=0)))


def _everything(slide: DrawnSlide) -> None:
    slide.he(np.ones(slide.shape, np.float32))


def _everything_pale(slide: DrawnSlide) -> None:
    slide.section(np.ones(slide.shape, np.float32), 0.05, slide.rng.uniform(0.12, 0.18))


def _with(after: Callable[[DrawnSlide], None], before: Callable[[DrawnSlide], None] = lambda slide: None) -> Callable:
    """A slide of haematoxylin and eosin with something before the tissue is laid and something after."""

    def draw(slide: DrawnSlide) -> None:
        before(slide)
        slide.he()
        after(slide)

    return draw


def _glass(colour: tuple[int, int, int]) -> Callable[[DrawnSlide], None]:
    def tint(slide: DrawnSlide) -> None:
        slide.glass = np.array(colour) + slide.rng.normal(0, 2, 3)

    return _with(tint)


def _uneven_light(slide: DrawnSlide) -> None:
    rows, columns = np.mgrid[-1 : 1 : HEIGHT_PX * 1j, -1 : 1 : WIDTH_PX * 1j].astype(np.float32)
    slope = slide.rng.uniform(-0.08, 0.08, 2)
    slide.light = 0.92 + slope[0] * rows + slope[1] * columns - 0.06 * (rows**2 + columns**2) / 2
    # The lamp's colour drifts a little, too.
    slide.density += (slide.rng.normal(0, 0.003, 3) * columns[..., None]).astype(np.float32)


def _black_border(slide: DrawnSlide) -> None:
    for side in slide.rng.permutation(4)[:2]:
        area = np.zeros(slide.shape, bool)
        depth = int(slide.rng.integers(40, 160))
        np.rot90(area, int(side))[:depth] = True
        slide.outside.append((area, (0, 0, 0)))


def _white_fill(slide: DrawnSlide) -> None:
    slide.glass = np.array([238, 232, 224]) + slide.rng.normal(0, 3, 3)
    slide.stepped_area((255, 255, 255))


def _all_pens(slide: DrawnSlide) -> None:
    for colour in INKS:
        slide.pen(colour, is_crossing=False)


def _fluorescence(slide: DrawnSlide) -> None:
    slide.glass = np.array([4.0, 4.0, 9.0])
    cells = slide.scatter(slide.pieces(), 3000, (4, 15))
    slide.density -= cells[..., None] * np.array([0.0, 0.1, 1.35], np.float32)


def _dirt(slide: DrawnSlide) -> None:
    slide.dust(60)
    slide.coverslip_edges()
    slide.bubbles()


SITUATIONS: dict[str, Callable[[DrawnSlide], None]] = {
    "he": lambda slide: slide.he() is None,
    "pale_eosin": _pale,
    "pale_beside_strong": _pale_beside_strong,
    "haematoxylin_only": _haematoxylin_only,
    "adipose": _adipose,
    "ihc_dab": _dab,
    "ihc_negative": _dab_negative,
    "blood": _blood,
    "melanin": _melanin,
    "anthracosis": _anthracosis,
    "core_biopsies": _cores,
    "small_fragments": _fragments,
    "large_holes": _holes,
    "all_tissue": _everything,
    "all_tissue_pale": _everything_pale,
    **{f"pen_{c}_beside": _with(lambda slide, c=c: slide.pen(c, is_crossing=False)) for c in INKS},
    **{f"pen_{c}_crossing": _with(lambda slide, c=c: slide.pen(c, is_crossing=True)) for c in INKS},
    "coverslip_edges": _with(DrawnSlide.coverslip_edges),
    "dust": _with(lambda slide: slide.dust(60)),
    "air_bubbles": _with(DrawnSlide.bubbles),
    "black_border": _with(_black_border),
    "black_outside_scan": _with(lambda slide: slide.stepped_area((0, 0, 0))),
    "white_outside_scan": _with(_white_fill),
    "glass_warm": _glass((246, 238, 222)),
    "glass_cold": _glass((226, 236, 246)),
    "glass_pink": _glass((240, 228, 238)),
    "glass_grey": _glass((205, 205, 205)),
    "glass_uneven": _with(_uneven_light),
    "empty_blank": lambda slide: None,
    "empty_uneven": _uneven_light,
    "empty_dirt": _dirt,
    "empty_pens": _all_pens,
    "empty_fluorescence": _fluorescence,
}
