# SPDX-License-Identifier: Apache-2.0
"""Draws overviews of slides whose tissue is known: one function per situation that a tissue mask must master.

Everything is drawn at 4 um/px as amounts of dye and of dirt, turned into light by the Beer-Lambert law, reduced to
8 um/px, and spoiled by the noise of a camera and JPEG compression. The truth is what was drawn: the outlines of the
pieces, their lumens up to 120 um included (as an annotator draws them, and as CLAM and TRIDENT fill them), holes from
500 um on excluded, areas under ink excluded. The same situation and seed give the same pixels. No files here.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

OVERVIEW_MPP = 8.0
HEIGHT_PX, WIDTH_PX = 1280, 1600  # while drawing, at 4 um/px
_MPP = OVERVIEW_MPP / 2
# Optical density (log10) of one unit of dye in red, green and blue. Each drawn slide varies them.
_HAEMATOXYLIN, _EOSIN, _DAB = (0.55, 0.62, 0.28), (0.06, 0.50, 0.20), (0.28, 0.50, 0.75)
_BLOOD, _MELANIN, _SOOT = (0.10, 0.52, 0.46), (0.55, 0.75, 0.95), (1.0, 1.0, 0.98)
INKS = {
    "blue": ((40, 60, 170), (25, 35, 140), (60, 100, 200)),
    "green": ((20, 100, 60), (30, 150, 110), (60, 140, 50)),
    "black": ((25, 25, 28), (45, 42, 45), (15, 15, 20)),
    "red": ((205, 25, 40), (220, 40, 60), (180, 15, 30)),
}


@dataclass(frozen=True)
class DrawnOverview:
    """An overview and its truth.

    Attributes:
        overview_rgb (`np.ndarray` of shape `(h, w, 3)`, uint8): the picture, at `OVERVIEW_MPP`.
        tissue (`np.ndarray` of shape `(h, w)`, bool): where tissue was drawn.
    """

    overview_rgb: np.ndarray
    tissue: np.ndarray


def draw_overview(situation: str, seed: int) -> DrawnOverview:
    """Draws one situation of `SITUATIONS`; another seed gives other shapes, dyes, dirt and noise."""
    digest = hashlib.sha256(f"{situation}/{seed}".encode()).digest()
    slide = _Slide(np.random.default_rng(int.from_bytes(digest[:8], "little")))
    SITUATIONS[situation](slide)
    return slide.scan()


class _Slide:
    """A slide while it is drawn; arrays are float32 (HEIGHT_PX, WIDTH_PX) and lengths are in um unless said."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.shape = (HEIGHT_PX, WIDTH_PX)
        self.tissue = np.zeros(self.shape, np.float32)
        self.density = np.zeros((*self.shape, 3), np.float32)
        self.ink = np.zeros(self.shape, np.float32)
        self.glass = np.full(3, rng.uniform(238, 250)) + rng.normal(0, 1, 3)
        self.light = np.ones(self.shape, np.float32)
        self.outside: list[tuple[np.ndarray, tuple[int, int, int]]] = []

    # --- shapes: coverage in [0, 1] ---

    def blob(self, centre: tuple[float, float], radius_um: float, roughness: float = 0.25) -> np.ndarray:
        """An irregular shape; the centre is (x, y) as shares of the slide."""
        theta = np.linspace(0, 2 * np.pi, 240, endpoint=False)
        orders = np.arange(2, 40)
        waves = np.cos(theta[:, None] * orders + self.rng.uniform(0, 2 * np.pi, len(orders)))
        outline = np.maximum(1 + roughness * waves @ (self.rng.normal(0, 1, len(orders)) / orders), 0.35)
        stretch = self.rng.uniform(0.8, 1.25)
        points = outline[:, None] * np.stack([np.cos(theta) * stretch, np.sin(theta) / stretch], 1)
        points = points * radius_um / _MPP + np.array(centre) * [WIDTH_PX, HEIGHT_PX]
        return self._fill([points])

    def stroke(self, start: np.ndarray, angle: float, length_um: float, width_um: float, bend: float) -> np.ndarray:
        """A bent line from `start` (x, y shares)."""
        steps = 60
        angles = angle + np.cumsum(self.rng.normal(0, bend, steps))
        walk = np.stack([np.cos(angles), np.sin(angles)], 1) * (length_um / _MPP / steps)
        points = np.asarray(start) * [WIDTH_PX, HEIGHT_PX] + np.cumsum(walk, 0)
        canvas = np.zeros(self.shape, np.uint8)
        width_px = max(1, round(width_um / _MPP))
        cv2.polylines(canvas, [np.rint(points * 8).astype(np.int32)], False, 255, width_px, cv2.LINE_AA, 3)
        return canvas.astype(np.float32) / 255

    def scatter(self, within: np.ndarray, num: int, radius_um: tuple[float, float]) -> np.ndarray:
        """Ellipses at random places of an area."""
        rows, columns = np.nonzero(within > 0.5)
        canvas = np.zeros(self.shape, np.uint8)
        for place in self.rng.integers(0, len(rows), num) if len(rows) else ():
            axes = np.maximum(np.rint(self.rng.uniform(*radius_um, 2) / _MPP * 8), 1).astype(int).tolist()
            centre = (int(columns[place]) * 8, int(rows[place]) * 8)
            cv2.ellipse(canvas, centre, axes, int(self.rng.integers(180)), 0, 360, 255, -1, cv2.LINE_AA, 3)
        return canvas.astype(np.float32) / 255

    def noise(self, scale_um: float) -> np.ndarray:
        """Smooth noise with mean 0 and standard deviation 1."""
        scale_px = max(scale_um / _MPP, 0.5)
        step = max(1, int(scale_px / 3))
        small = self.rng.standard_normal((HEIGHT_PX // step + 8, WIDTH_PX // step + 8), dtype=np.float32)
        small = cv2.GaussianBlur(small, (0, 0), scale_px / step)
        field = cv2.resize(small, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_LINEAR)
        return (field - field.mean()) / field.std()

    def _fill(self, polygons: list[np.ndarray]) -> np.ndarray:
        canvas = np.zeros(self.shape, np.uint8)
        for points in polygons:
            cv2.fillPoly(canvas, [np.rint(points * 8).astype(np.int32)], 255, cv2.LINE_AA, 3)
        return canvas.astype(np.float32) / 255

    def pieces(self) -> np.ndarray:
        """One to three pieces of tissue."""
        num = int(self.rng.integers(1, 4))
        places = [((i + 0.5) / num + self.rng.uniform(-0.04, 0.04), self.rng.uniform(0.42, 0.58)) for i in range(num)]
        radius = min(WIDTH_PX / num, HEIGHT_PX) * _MPP * 0.36
        return np.max([self.blob(place, radius * self.rng.uniform(0.7, 1)) for place in places], axis=0)

    # --- what is laid on the slide ---

    def dye(self, amount: np.ndarray, density: tuple[float, float, float]) -> None:
        """Adds a dye, float32 (h, w), whose hue varies from slide to slide."""
        hue = np.array(density) * np.exp(self.rng.normal(0, 0.06, 3))
        self.density += np.maximum(amount, 0)[..., None] * hue.astype(np.float32)

    def shade(self, amount: np.ndarray, density: tuple[float, float, float]) -> None:
        """Takes light away without a dye: refraction."""
        self.density += amount[..., None] * np.array(density, np.float32)

    def section(self, area: np.ndarray, haematoxylin: float, eosin: float, dab: float = 0.0) -> None:
        """Lays a stained section: fibres, clouds, nuclei and lumens up to 120 um."""
        self.tissue = np.maximum(self.tissue, area)
        solid = area * (1 - self.scatter(area, int(area.sum() / 4000), (8, 60)))
        clouds = np.exp(0.25 * self.noise(250) + 0.15 * self.noise(40))
        cells = np.clip(1 + 0.7 * self.noise(5) + 0.4 * self.noise(70), 0.05, 4)
        self.dye(solid * haematoxylin * cells * clouds, _HAEMATOXYLIN)
        self.dye(solid * eosin * clouds * np.clip(1 + 0.25 * self.noise(8), 0.3, 2), _EOSIN)
        if dab:
            positive = np.clip(self.noise(300) + 0.3, 0, 1.5) * np.clip(1 + 0.8 * self.noise(6), 0, 3)
            self.dye(solid * dab * positive, _DAB)

    def he(self, area: np.ndarray | None = None, strength: float = 1.0) -> np.ndarray:
        """Lays haematoxylin and eosin; returns the area."""
        area = self.pieces() if area is None else area
        haematoxylin, eosin = self.rng.uniform(0.25, 0.6), self.rng.uniform(0.25, 0.6)
        self.section(area, strength * haematoxylin, strength * eosin)
        return area

    def pen(self, colour: str, *, is_crossing: bool) -> None:
        """Draws a stroke of a felt pen of 0.4 to 1 mm, through the tissue or beside it."""
        ink = self.rng.permutation(INKS[colour])[0]
        width_um = self.rng.uniform(400, 1000)
        if is_crossing:
            rows, columns = np.nonzero(self.tissue > 0.5)
            target = self.rng.integers(len(rows))
            middle = np.array([columns[target] / WIDTH_PX, rows[target] / HEIGHT_PX])
            angle = self.rng.uniform(0, 2 * np.pi)
            start = middle - np.array([np.cos(angle) / WIDTH_PX, np.sin(angle) / HEIGHT_PX]) * 2000 / _MPP
            line = self.stroke(start, angle, 4000, width_um, 0.03)
        else:
            line = self._stroke_beside_tissue(width_um)
        streaks = np.clip(1 + 0.2 * self.noise(60), 0.6, 1.5)
        amount = cv2.GaussianBlur(line, (0, 0), 3) * streaks
        self.density += amount[..., None] * (-np.log10(np.maximum(ink, 1) / 255)).astype(np.float32)
        self.ink = np.maximum(self.ink, line)

    def _stroke_beside_tissue(self, width_um: float) -> np.ndarray:
        margin = cv2.dilate(self.tissue, np.ones((41, 41), np.uint8))
        for _ in range(60):
            start = self.rng.uniform(0.03, 0.97, 2)
            line = self.stroke(start, self.rng.uniform(0, 2 * np.pi), self.rng.uniform(1500, 4000), width_um, 0.06)
            if not ((line > 0) & (margin > 0)).any():
                break
        else:
            line = self.stroke(np.array([0.0, 0.04]), 0.0, 5000, width_um / 2, 0.0) * (margin == 0)
        return line

    def dust(self, num: int) -> None:
        """Specks of up to 40 um, brown, grey and blue, and lint."""
        everywhere = np.ones(self.shape, np.float32)
        for hue in ((0.5, 0.5, 0.5), (0.4, 0.5, 0.7), (0.6, 0.5, 0.3), (0.2, 0.7, 0.4)):
            self.dye(self.scatter(everywhere, num, (4, 20)), hue)
        for _ in range(3):
            line = self.stroke(self.rng.uniform(0, 1, 2), self.rng.uniform(0, 6.3), 900, 10, 0.25)
            self.dye(line, (0.5, 0.45, 0.35))

    def coverslip_edges(self) -> None:
        """Straight grey lines from edge to edge of the slide, with a bright and a coloured fringe."""
        for is_upright in (True, False):
            place, lean = self.rng.uniform(0.03, 0.97), self.rng.normal(0, 0.01)
            start = np.array([place, -0.05]) if is_upright else np.array([-0.05, place])
            angle = (np.pi / 2 if is_upright else 0.0) + lean
            line = self.stroke(start, angle, 7500, self.rng.uniform(16, 40), 0.0)
            self.shade(cv2.GaussianBlur(line, (0, 0), 1.5), (0.35, 0.34, 0.32))
            self.shade(np.roll(line, (4, 4), (0, 1)), (0.02, 0.04, 0.07))
            self.shade(np.roll(line, (-4, -4), (0, 1)), (0.07, 0.04, 0.02))

    def bubbles(self) -> None:
        """Rims of air bubbles with coloured fringes."""
        for _ in range(4):
            centre = (self.rng.uniform(0, WIDTH_PX, 1).item(), self.rng.uniform(0, HEIGHT_PX, 1).item())
            radius = self.rng.uniform(200, 900) / _MPP
            rim = np.zeros(self.shape, np.uint8)
            cv2.circle(rim, tuple(int(8 * value) for value in centre), int(8 * radius), 255, 8, cv2.LINE_AA, 3)
            rim = cv2.GaussianBlur(rim.astype(np.float32) / 255, (0, 0), 2)
            self.shade(rim, (0.40, 0.38, 0.36))
            self.shade(np.roll(rim, 4, 1), (0.08, 0.05, 0.02))

    def stepped_area(self, colour: tuple[int, int, int]) -> None:
        """Fills what a scanner left out around the tissue, in steps of its fields of view, with a colour."""
        field = 160
        seen = cv2.dilate(self.tissue, np.ones((61, 61), np.uint8)) > 0
        seen = seen[: HEIGHT_PX // field * field].reshape(HEIGHT_PX // field, field, WIDTH_PX // field, field)
        scanned = np.kron(seen.any(axis=(1, 3)), np.ones((field, field), bool))
        self.outside.append((~scanned, colour))

    # --- the scanner ---

    def scan(self) -> DrawnOverview:
        """Turns dyes into an overview."""
        picture = self.glass * self.light[..., None] * np.power(10.0, -self.density)
        truth = self.tissue * (self.ink < 0.3)
        for area, colour in self.outside:
            picture[area] = colour
            truth = truth * ~area
        size = (WIDTH_PX // 2, HEIGHT_PX // 2)
        picture = cv2.resize(picture.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        picture += self.rng.normal(0, self.rng.uniform(0.5, 2.0), picture.shape)
        rgb = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(self.rng.integers(70, 92))]
        rgb = cv2.imdecode(cv2.imencode(".jpg", rgb[..., ::-1], quality)[1], cv2.IMREAD_COLOR)[..., ::-1]
        tissue = cv2.resize(truth.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.5
        return DrawnOverview(np.ascontiguousarray(rgb), tissue)


def _pale(slide: _Slide) -> None:
    slide.section(slide.pieces(), slide.rng.uniform(0.02, 0.05), slide.rng.uniform(0.09, 0.14))


def _pale_beside_strong(slide: _Slide) -> None:
    slide.he(slide.blob((0.28, 0.5), 1400), strength=1.3)
    slide.section(slide.blob((0.74, 0.5), 1100), 0.03, slide.rng.uniform(0.09, 0.14))


def _haematoxylin_only(slide: _Slide) -> None:
    slide.section(slide.pieces(), slide.rng.uniform(0.15, 0.6), 0.0)


def _adipose(slide: _Slide) -> None:
    """A piece of tissue that runs into fat: cells of 60 to 100 um, empty but for their thin pink membranes."""
    slide.he(slide.blob((0.35, 0.5), 1300))
    fat = slide.blob((0.62, 0.5), 1300) * (1 - slide.tissue)
    slide.tissue = np.maximum(slide.tissue, fat)
    centres = slide.rng.uniform(0, 1, (int(WIDTH_PX * HEIGHT_PX * _MPP**2 / 80**2), 2)) * [WIDTH_PX, HEIGHT_PX]
    empty = np.full(slide.shape, 255, np.uint8)
    empty[
        np.clip(centres[:, 1].astype(int), 0, HEIGHT_PX - 1), np.clip(centres[:, 0].astype(int), 0, WIDTH_PX - 1)
    ] = 0
    _, labels = cv2.distanceTransformWithLabels(empty, cv2.DIST_L2, 5)
    labels = labels.astype(np.float32)
    membrane = (cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((2, 2))) > 0).astype(np.float32)
    slide.dye(fat * membrane * np.clip(1 + 0.3 * slide.noise(60), 0.3, 2) * slide.rng.uniform(0.5, 0.8), _EOSIN)
    slide.dye(fat * membrane * 0.12, _HAEMATOXYLIN)


def _dab(slide: _Slide) -> None:
    slide.section(slide.pieces(), slide.rng.uniform(0.12, 0.3), 0.0, dab=slide.rng.uniform(0.4, 1.0))


def _dab_negative(slide: _Slide) -> None:
    slide.section(slide.pieces(), slide.rng.uniform(0.09, 0.16), 0.0)


def _blood(slide: _Slide) -> None:
    area = slide.he()
    pools = area * (slide.noise(350) > 0.5)
    clot = slide.blob((0.1, 0.12), 450)
    slide.tissue = np.maximum(slide.tissue, clot)
    slide.dye(np.maximum(pools, clot) * slide.rng.uniform(0.7, 1.15) * (1 + 0.15 * slide.noise(8)), _BLOOD)


def _melanin(slide: _Slide) -> None:
    area = slide.he(strength=0.5)
    slide.dye(area * np.clip(slide.noise(180) - 0.3, 0, 1) * (1 + 0.3 * slide.noise(8)), _MELANIN)


def _anthracosis(slide: _Slide) -> None:
    area = slide.he()
    slide.dye(
        slide.scatter(area * (slide.noise(300) > 0.5), 250, (10, 60)) * area * slide.rng.uniform(0.4, 0.8), _SOOT
    )


def _cores(slide: _Slide) -> None:
    for place in (0.25, 0.5, 0.75):
        start = np.array([slide.rng.uniform(0.04, 0.12), place])
        slide.he(slide.stroke(start, slide.rng.normal(0, 0.05), slide.rng.uniform(3000, 5000), 500, 0.03))


def _fragments(slide: _Slide) -> None:
    places = slide.rng.permutation([(x, y) for x in np.arange(0.1, 1, 0.16) for y in np.arange(0.12, 1, 0.19)])[:14]
    areas = [slide.blob(tuple(place), slide.rng.uniform(90, 240)) for place in places]
    slide.he(np.max(areas, axis=0))


def _holes(slide: _Slide) -> None:
    area = slide.blob((0.5, 0.5), 2000)
    holes = [slide.blob(place, slide.rng.uniform(260, 420)) for place in ((0.4, 0.42), (0.6, 0.4), (0.5, 0.65))]
    slide.he(area * (1 - np.max(holes, axis=0)))


def _everything(slide: _Slide) -> None:
    slide.he(np.ones(slide.shape, np.float32))


def _everything_pale(slide: _Slide) -> None:
    slide.section(np.ones(slide.shape, np.float32), 0.05, slide.rng.uniform(0.12, 0.18))


def _with(after: Callable[[_Slide], None], before: Callable[[_Slide], None] = lambda slide: None) -> Callable:
    """A slide of haematoxylin and eosin with something before the tissue is laid and something after."""

    def draw(slide: _Slide) -> None:
        before(slide)
        slide.he()
        after(slide)

    return draw


def _glass(colour: tuple[int, int, int]) -> Callable[[_Slide], None]:
    def tint(slide: _Slide) -> None:
        slide.glass = np.array(colour) + slide.rng.normal(0, 2, 3)

    return _with(tint)


def _uneven_light(slide: _Slide) -> None:
    rows, columns = np.mgrid[-1 : 1 : HEIGHT_PX * 1j, -1 : 1 : WIDTH_PX * 1j].astype(np.float32)
    slope = slide.rng.uniform(-0.08, 0.08, 2)
    slide.light = 0.92 + slope[0] * rows + slope[1] * columns - 0.06 * (rows**2 + columns**2) / 2
    # The lamp's colour drifts a little, too.
    slide.density += (slide.rng.normal(0, 0.003, 3) * columns[..., None]).astype(np.float32)


def _black_border(slide: _Slide) -> None:
    for side in slide.rng.permutation(4)[:2]:
        area = np.zeros(slide.shape, bool)
        depth = int(slide.rng.integers(40, 160))
        np.rot90(area, int(side))[:depth] = True
        slide.outside.append((area, (0, 0, 0)))


def _white_fill(slide: _Slide) -> None:
    slide.glass = np.array([238, 232, 224]) + slide.rng.normal(0, 3, 3)
    slide.stepped_area((255, 255, 255))


def _all_pens(slide: _Slide) -> None:
    for colour in INKS:
        slide.pen(colour, is_crossing=False)


def _fluorescence(slide: _Slide) -> None:
    slide.glass = np.array([4.0, 4.0, 9.0])
    cells = slide.scatter(slide.pieces(), 3000, (4, 15))
    slide.density -= cells[..., None] * np.array([0.0, 0.1, 1.35], np.float32)


def _dirt(slide: _Slide) -> None:
    slide.dust(60)
    slide.coverslip_edges()
    slide.bubbles()


SITUATIONS: dict[str, Callable[[_Slide], None]] = {
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
    "coverslip_edges": _with(_Slide.coverslip_edges),
    "dust": _with(lambda slide: slide.dust(60)),
    "air_bubbles": _with(_Slide.bubbles),
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
