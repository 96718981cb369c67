# SPDX-License-Identifier: Apache-2.0
"""A slide while it is drawn: shapes, dyes, dirt and light; scanned into an overview whose tissue is known."""

from dataclasses import dataclass

import cv2
import numpy as np

OVERVIEW_MPP = 8.0
HEIGHT_PX, WIDTH_PX = 1280, 1600  # while drawing, at 4 um/px
MPP = OVERVIEW_MPP / 2
# Optical density (log10) of one unit of dye in red, green and blue. Each drawn slide varies them.
HAEMATOXYLIN, EOSIN, _DAB = (0.55, 0.62, 0.28), (0.06, 0.50, 0.20), (0.28, 0.50, 0.75)
BLOOD, MELANIN, SOOT = (0.10, 0.52, 0.46), (0.55, 0.75, 0.95), (1.0, 1.0, 0.98)
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


class DrawnSlide:
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
        points = points * radius_um / MPP + np.array(centre) * [WIDTH_PX, HEIGHT_PX]
        return self._fill([points])

    def stroke(self, start: np.ndarray, angle: float, length_um: float, width_um: float, bend: float) -> np.ndarray:
        """A bent line from `start` (x, y shares)."""
        steps = 60
        angles = angle + np.cumsum(self.rng.normal(0, bend, steps))
        walk = np.stack([np.cos(angles), np.sin(angles)], 1) * (length_um / MPP / steps)
        points = np.asarray(start) * [WIDTH_PX, HEIGHT_PX] + np.cumsum(walk, 0)
        canvas = np.zeros(self.shape, np.uint8)
        width_px = max(1, round(width_um / MPP))
        cv2.polylines(canvas, [np.rint(points * 8).astype(np.int32)], False, 255, width_px, cv2.LINE_AA, 3)
        return canvas.astype(np.float32) / 255

    def scatter(self, within: np.ndarray, num: int, radius_um: tuple[float, float]) -> np.ndarray:
        """Ellipses at random places of an area."""
        rows, columns = np.nonzero(within > 0.5)
        canvas = np.zeros(self.shape, np.uint8)
        for place in self.rng.integers(0, len(rows), num) if len(rows) else ():
            axes = np.maximum(np.rint(self.rng.uniform(*radius_um, 2) / MPP * 8), 1).astype(int).tolist()
            centre = (int(columns[place]) * 8, int(rows[place]) * 8)
            cv2.ellipse(canvas, centre, axes, int(self.rng.integers(180)), 0, 360, 255, -1, cv2.LINE_AA, 3)
        return canvas.astype(np.float32) / 255

    def noise(self, scale_um: float) -> np.ndarray:
        """Smooth noise with mean 0 and standard deviation 1."""
        scale_px = max(scale_um / MPP, 0.5)
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
        radius = min(WIDTH_PX / num, HEIGHT_PX) * MPP * 0.36
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
        self.dye(solid * haematoxylin * cells * clouds, HAEMATOXYLIN)
        self.dye(solid * eosin * clouds * np.clip(1 + 0.25 * self.noise(8), 0.3, 2), EOSIN)
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
            start = middle - np.array([np.cos(angle) / WIDTH_PX, np.sin(angle) / HEIGHT_PX]) * 2000 / MPP
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
            radius = self.rng.uniform(200, 900) / MPP
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
