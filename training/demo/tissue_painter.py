# SPDX-License-Identifier: Apache-2.0
"""Paints synthetic haematoxylin-and-eosin slides whose three subtypes differ in the arrangement of cells only.

One pixel is one micron. A tumour is a bent hexagonal lattice of units. Each unit owns a number of nuclei, an area of
cytoplasm and the area of one white space, drawn without regard to the subtype; the subtype then only decides where
they lie: nuclei in a ring around the white space (tubular), packed in a disc with the white space in the stroma beside
it (solid), or in two-cell rows with the white space between rows (trabecular). So neither colour nor cell count nor
white area tells the subtypes apart. No files here. Shapes: n points, h and w in pixels, points are (x, y).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from .slide_writer import scan_slide

PAINTER_VERSION = 1  # raise it when painted pixels change, so that cohorts on disk are painted anew
SLIDE_MPP = 1.0
PITCH_UM = 96.0  # distance between the centres of neighbouring tumour units
ROW_PITCH_UM = PITCH_UM * np.sqrt(3) / 2
TEXTURE_PX = 1024
MIN_SIDE_PX = 1000


@dataclass(frozen=True)
class CaseTraits:
    """What the slides of one case show and its report says.

    Args:
        case_id (`str`): the patient.
        subtype (`str`): `"tubular"`, `"solid"` or `"trabecular"`.
        brisk_lymphocytes (`bool`): many lymphocyte aggregates instead of next to none.
        necrosis (`bool`): patches of pink granular debris.
        mucin (`bool`): pale blue pools.
        nuclear_grade (`int`): 1 to 3; nuclei grow with it.
    """

    case_id: str
    subtype: str
    brisk_lymphocytes: bool
    necrosis: bool
    mucin: bool
    nuclear_grade: int


@dataclass(frozen=True)
class _Unit:
    """One tumour unit: `outer_um` and `inner_um` fix the areas of cytoplasm and white space for every subtype."""

    outer_um: float
    inner_um: float
    num_nuclei: int
    is_white_above: bool

    @property
    def cytoplasm_um2(self) -> float:
        return float(np.pi * (self.outer_um**2 - self.inner_um**2))


@dataclass(frozen=True)
class _Arrangement:
    """A unit in its own frame: cytoplasm outlines, the outline of the white space, nuclei (n, 3) as x, y, angle."""

    cytoplasm: list[np.ndarray]
    white_space: np.ndarray
    nuclei: np.ndarray


class _Frame:
    """A rotated and bent coordinate frame; bending displaces across each wave, so that areas are kept."""

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.centre = np.array([width, height]) / 2
        angle, directions = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 6)
        self.rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.waves = np.stack([np.cos(directions), np.sin(directions)], 1)
        self.wave_numbers = 2 * np.pi / rng.uniform(450, 1000, 6)
        self.phases = rng.uniform(0, 2 * np.pi, 6)
        self.swings = rng.uniform(12, 24, 6)

    def bend(self, points: np.ndarray) -> np.ndarray:
        """Returns the displacement (n, 2) at slide positions (n, 2)."""
        swing = self.swings * np.cos((points @ self.waves.T) * self.wave_numbers + self.phases)
        return swing @ np.stack([-self.waves[:, 1], self.waves[:, 0]], 1)

    def to_slide(self, points: np.ndarray) -> np.ndarray:
        """Maps lattice positions (n, 2) to slide pixels (n, 2)."""
        straight = points @ self.rotation.T + self.centre
        return straight + self.bend(straight)

    def texture_map(self, width: int, height: int) -> np.ndarray:
        """Returns where to look up a texture for every pixel, float32 (h, w, 2); computed coarsely, then resized."""
        step = 16
        rows, columns = np.mgrid[0 : height + step : step, 0 : width + step : step]
        points = np.stack([columns.ravel(), rows.ravel()], 1).astype(np.float64)
        pulled = (points - self.bend(points) - self.centre) @ self.rotation + TEXTURE_PX / 2
        coarse = pulled.reshape(*rows.shape, 2).astype(np.float32)
        fine = cv2.resize(coarse, (rows.shape[1] * step, rows.shape[0] * step))
        return np.ascontiguousarray(fine[:height, :width])


@dataclass
class _Canvas:
    """Everything that is painted before staining; uint8 (h, w) each; 0 is nothing there."""

    tissue: np.ndarray
    cytoplasm: np.ndarray
    white: np.ndarray
    nuclei: np.ndarray
    necrosis: np.ndarray
    mucin: np.ndarray

    def is_free(self, points: np.ndarray) -> np.ndarray:
        """Tells for slide positions (n, 2) whether they lie on bare stroma; bool (n,)."""
        height, width = self.tissue.shape
        x, y = np.rint(points).astype(int).T
        inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
        x, y = np.where(inside, x, 0), np.where(inside, y, 0)
        covered = self.cytoplasm[y, x] | self.white[y, x] | self.necrosis[y, x] | self.mucin[y, x]
        return inside & (self.tissue[y, x] > 0) & (covered == 0)


def random_stream(seed: int, *names: str) -> np.random.Generator:
    """Returns a generator that is a function of the seed and the names alone, whatever ran before."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def paint_slide(
    traits: CaseTraits, slide_id: str, *, seed: int, side_range_px: tuple[int, int] = (1536, 2048)
) -> np.ndarray:
    """Paints one slide; the same traits, slide and seed give the same pixels.

    Args:
        traits (`CaseTraits`): what the case shows.
        slide_id (`str`): names the random stream of the slide.
        seed (`int`): seed of the cohort.
        side_range_px (`tuple[int, int]`, *optional*, defaults to `(1536, 2048)`): range of both sides at 1 um/px.

    Returns:
        `np.ndarray`: uint8 (h, w, 3), red, green, blue.

    Raises:
        ValueError: if the subtype has no arrangement, or slides would be too small to hold three pieces with tumour.
    """
    if traits.subtype not in ARRANGEMENTS:
        raise ValueError(f"subtype: expected one of {sorted(ARRANGEMENTS)}, found {traits.subtype!r}.")
    if side_range_px[0] < MIN_SIDE_PX:
        raise ValueError(f"side_range_px: expected sides of at least {MIN_SIDE_PX} px, found {side_range_px}.")
    rng = random_stream(seed, "layout", slide_id)
    width, height = (int(side) for side in rng.integers(*side_range_px, 2, endpoint=True))
    frame = _Frame(rng, width, height)
    canvas = _Canvas(*(np.zeros((height, width), np.uint8) for _ in range(6)))
    _paint_pieces(rng, canvas.tissue)
    _paint_tumour(rng, random_stream(seed, "cells", slide_id), canvas, frame, traits)
    _paint_stromal_cells(rng, canvas, frame)
    _paint_lymphocytes(rng, canvas, is_brisk=traits.brisk_lymphocytes)
    haematoxylin, eosin = _concentrations(rng, canvas, frame)
    return scan_slide(haematoxylin, eosin, case_rng=random_stream(seed, "stain", traits.case_id), slide_rng=rng)


def _blob(rng: np.random.Generator, radius: float, *, num_points: int, roughness: float, stretch: float) -> np.ndarray:
    """Returns an irregular closed outline (num_points, 2) around the origin that encloses pi * radius**2."""
    theta = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    orders = np.arange(2, 2 + num_points // 4)
    waves = np.cos(theta[:, None] * orders + rng.uniform(0, 2 * np.pi, len(orders)))
    outline = np.maximum(1 + roughness * waves @ (rng.normal(0, 1, len(orders)) / orders), 0.4)
    points = outline[:, None] * np.stack([np.cos(theta) * stretch, np.sin(theta) / stretch], 1)
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return points @ turn * radius * np.sqrt(np.pi / area)


def _fill(canvas: np.ndarray, outline: np.ndarray, value: int) -> None:
    """Fills an outline (n, 2) with sub-pixel corners."""
    cv2.fillPoly(canvas, [np.rint(outline * 8).astype(np.int32)], value, lineType=cv2.LINE_AA, shift=3)


def _paint_pieces(rng: np.random.Generator, tissue: np.ndarray) -> None:
    """Paints one to three tissue pieces side by side along the longer side."""
    height, width = tissue.shape
    num_pieces = int(rng.integers(1, min(3, width // 500) + 1))
    for piece in range(num_pieces):
        share = (piece + 0.5) / num_pieces
        centre = np.array([width * share, height * rng.uniform(0.46, 0.54)])
        stretch = np.sqrt(0.98 * width / num_pieces / height) * rng.uniform(0.95, 1.05)
        outline = _blob(rng, 1.0, num_points=160, roughness=0.12, stretch=1.0) * [stretch, 1 / stretch]
        _fill(tissue, centre + outline * 0.43 * np.sqrt(width * height / num_pieces), 255)


def _tumour_mask(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """Returns where tumour units may be centred, uint8 (h, w): most of the tissue, off its edge."""
    height, width = tissue.shape
    field = cv2.resize(rng.random((5, 5), dtype=np.float32), (width // 8, height // 8), interpolation=cv2.INTER_CUBIC)
    small = cv2.resize(tissue, (width // 8, height // 8), interpolation=cv2.INTER_AREA)
    inner = cv2.erode(small, np.ones((15, 15), np.uint8), borderValue=0) > 127
    limit = np.quantile(field[inner], rng.uniform(0.10, 0.35))
    return cv2.resize(((field > limit) & inner).astype(np.uint8), (width, height))


def _lattice(rng: np.random.Generator, extent: float) -> np.ndarray:
    """Returns jittered centres (n, 2) of a hexagonal lattice that covers a disc of diameter `extent`."""
    half = int(extent / 2 / ROW_PITCH_UM) + 1
    rows, columns = np.mgrid[-half : half + 1, -half : half + 1]
    points = np.stack([(columns + 0.5 * (rows % 2)) * PITCH_UM, rows * ROW_PITCH_UM], -1).reshape(-1, 2)
    return points + rng.uniform(-6, 6, points.shape)


def _tubule(rng: np.random.Generator, unit: _Unit) -> _Arrangement:
    stretch = rng.uniform(1.0, 1.25)
    angles = (np.arange(unit.num_nuclei) + rng.uniform(-0.3, 0.3, unit.num_nuclei)) * 2 * np.pi / unit.num_nuclei
    radii = unit.inner_um + (unit.outer_um - unit.inner_um) * rng.uniform(0.4, 0.8, unit.num_nuclei)
    spots = radii[:, None] * np.stack([np.cos(angles) * stretch, np.sin(angles) / stretch], 1)
    outer = _blob(rng, unit.outer_um, num_points=28, roughness=0.05, stretch=1.0)
    # The scanner blurs the dark rim into the lumen: 2 % make up for the white that is lost.
    inner = _blob(rng, 1.02 * unit.inner_um, num_points=20, roughness=0.10, stretch=1.0)
    squeeze = np.array([stretch, 1 / stretch])
    return _Arrangement([outer * squeeze], inner * squeeze, np.column_stack([spots, angles]))


def _nest(rng: np.random.Generator, unit: _Unit) -> _Arrangement:
    radius = np.sqrt(unit.cytoplasm_um2 / np.pi)
    ranks = np.arange(unit.num_nuclei)
    # A sunflower head packs any number of cells evenly into a disc.
    angles = ranks * np.pi * (3 - np.sqrt(5)) + rng.uniform(0, 2 * np.pi)
    radii = 0.9 * radius * np.sqrt((ranks + 0.5) / unit.num_nuclei)
    spots = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1) + rng.normal(0, 1.0, (unit.num_nuclei, 2))
    outline = _blob(rng, radius, num_points=28, roughness=0.05, stretch=rng.uniform(1.0, 1.1))
    white = _blob(rng, unit.inner_um, num_points=20, roughness=0.10, stretch=rng.uniform(1.0, 1.25))
    white += [0, PITCH_UM / np.sqrt(3) * (1 if unit.is_white_above else -1)]
    return _Arrangement([outline], white, np.column_stack([spots, rng.uniform(0, np.pi, unit.num_nuclei)]))


def _cords(rng: np.random.Generator, unit: _Unit) -> _Arrangement:
    half_width = unit.cytoplasm_um2 / 2 / PITCH_UM / 2
    sides = np.arange(unit.num_nuclei) % 2 * 2 - 1
    along = ((np.arange(unit.num_nuclei) // 2 + 0.5) / np.ceil(unit.num_nuclei / 2) - 0.5) * PITCH_UM
    # Two rows per cord: neighbours along the cord alternate between its edges.
    across = (np.arange(unit.num_nuclei) // 2 % 2 * 2 - 1) * 0.45 * half_width + sides * ROW_PITCH_UM / 4
    spots = np.stack([along, across], 1) + rng.normal(0, 1.0, (unit.num_nuclei, 2))
    x = np.linspace(-PITCH_UM / 2, PITCH_UM / 2, 9)
    cords = []
    for side in (-1, 1):
        edges = [half_width * sign + side * ROW_PITCH_UM / 4 + rng.normal(0, 0.8, 9) for sign in (-1, 1)]
        cords.append(np.concatenate([np.stack([x, edges[0]], 1), np.stack([x, edges[1]], 1)[::-1]]))
    gap = ROW_PITCH_UM / 4 - half_width
    white = _blob(rng, unit.inner_um, num_points=20, roughness=0.0, stretch=1.0)
    white *= [unit.inner_um / (0.8 * gap), 0.8 * gap / unit.inner_um]
    white += [0, 0 if unit.is_white_above else ROW_PITCH_UM / 2]
    return _Arrangement(cords, white, np.column_stack([spots, rng.normal(0, 0.25, unit.num_nuclei)]))


ARRANGEMENTS: dict[str, Callable[[np.random.Generator, _Unit], _Arrangement]] = {
    "tubular": _tubule,
    "solid": _nest,
    "trabecular": _cords,
}


def _draw_unit(rng: np.random.Generator) -> _Unit:
    outer_um, inner_um = rng.uniform(27, 40), rng.uniform(10, 16)
    num_nuclei = np.pi * (outer_um**2 - inner_um**2) * rng.uniform(0.0066, 0.0082)
    return _Unit(outer_um, inner_um, round(num_nuclei), bool(rng.random() < 0.5))


def _paint_tumour(
    rng: np.random.Generator, cell_rng: np.random.Generator, canvas: _Canvas, frame: _Frame, traits: CaseTraits
) -> None:
    """Paints patches of necrosis and mucin and the tumour units around them; `cell_rng` is the subtype's own."""
    mask = _tumour_mask(rng, canvas.tissue)
    lattice = _lattice(rng, float(np.hypot(*mask.shape)) + 2 * PITCH_UM)
    centres = frame.to_slide(lattice)
    x, y = np.clip(np.rint(centres).astype(int), 0, [mask.shape[1] - 1, mask.shape[0] - 1]).T
    in_tumour = mask[y, x] > 0
    extent_um = np.sqrt(np.count_nonzero(canvas.tissue))
    for is_present, layer, share in ((traits.necrosis, canvas.necrosis, 0.085), (traits.mucin, canvas.mucin, 0.075)):
        for spot in rng.choice(centres[in_tumour], 3):
            size = share * extent_um * rng.uniform(0.8, 1.2)
            outline = spot + _blob(rng, size, num_points=40, roughness=0.15, stretch=rng.uniform(1, 1.3))
            if is_present:
                _fill(layer, outline, 255)
                in_tumour &= np.hypot(*(centres - spot).T) > size + PITCH_UM / 2
    nuclei = []
    for centre in lattice[in_tumour & (rng.random(len(lattice)) > 0.08)]:
        unit = _draw_unit(rng)
        arrangement = ARRANGEMENTS[traits.subtype](cell_rng, unit)
        shade = int(rng.integers(120, 200))
        for outline in arrangement.cytoplasm:
            _fill(canvas.cytoplasm, frame.to_slide(outline + centre), shade)
        _fill(canvas.white, frame.to_slide(arrangement.white_space + centre), 255)
        nuclei.append(arrangement.nuclei + np.append(centre, 0))
    if nuclei:
        _paint_epithelial_nuclei(rng, canvas, frame, np.concatenate(nuclei), traits.nuclear_grade)


def _paint_epithelial_nuclei(
    rng: np.random.Generator, canvas: _Canvas, frame: _Frame, nuclei: np.ndarray, grade: int
) -> None:
    spots = frame.to_slide(nuclei[:, :2])
    heading = frame.to_slide(nuclei[:, :2] + np.stack([np.cos(nuclei[:, 2]), np.sin(nuclei[:, 2])], 1)) - spots
    long_um = rng.normal(4.1, 0.35, len(spots)) * (0.94 + 0.06 * grade)
    axes = np.stack([long_um, long_um * rng.uniform(0.62, 0.85, len(spots))], 1)
    shades = rng.integers(120, 190, len(spots))
    _paint_nuclei(rng, canvas.nuclei, spots, axes, np.arctan2(heading[:, 1], heading[:, 0]), shades)


def _paint_nuclei(
    rng: np.random.Generator,
    layer: np.ndarray,
    spots: np.ndarray,
    axes_um: np.ndarray,
    angles: np.ndarray,
    shades: np.ndarray,
) -> None:
    """Paints ellipses with a wavy rim: `spots` (n, 2), half-`axes_um` (n, 2), `angles` (n,), `shades` (n,) uint8."""
    theta = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    rim = 1 + rng.normal(0, 0.07, (len(spots), len(theta)))
    long, short = rim * np.cos(theta) * axes_um[:, :1], rim * np.sin(theta) * axes_um[:, 1:]
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    corners = np.stack([long * cosine - short * sine, long * sine + short * cosine], -1) + spots[:, None]
    for polygon, shade in zip(np.rint(corners * 8).astype(np.int32), shades.tolist(), strict=True):
        cv2.fillConvexPoly(layer, polygon, shade, lineType=cv2.LINE_AA, shift=3)


def _paint_stromal_cells(rng: np.random.Generator, canvas: _Canvas, frame: _Frame) -> None:
    """Paints spindle-shaped nuclei along the fibres of the stroma, and debris in necrosis."""
    height, width = canvas.tissue.shape
    spots = rng.uniform(0, 1, (int(width * height / 900), 2)) * [width, height]
    step = np.array([[1.0, 0.0]]) @ frame.rotation.T
    ahead = spots + step
    heading = ahead + frame.bend(ahead) - spots - frame.bend(spots)
    angles = np.arctan2(heading[:, 1], heading[:, 0]) + rng.normal(0, 0.2, len(spots))
    axes = np.stack([rng.uniform(4.5, 7, len(spots)), rng.uniform(1.2, 1.9, len(spots))], 1)
    shades = rng.integers(110, 180, len(spots))
    keep = canvas.is_free(spots)
    _paint_nuclei(rng, canvas.nuclei, spots[keep], axes[keep], angles[keep], shades[keep])
    debris = np.argwhere(canvas.necrosis[::9, ::9] > 0)[:, ::-1] * 9.0
    debris = debris[rng.random(len(debris)) < 0.3]
    debris = debris + rng.uniform(-6, 6, debris.shape)
    sizes = rng.uniform(0.8, 2.2, (len(debris), 2))
    _paint_nuclei(rng, canvas.nuclei, debris, sizes, np.zeros(len(debris)), rng.integers(90, 200, len(debris)))


def _paint_lymphocytes(rng: np.random.Generator, canvas: _Canvas, *, is_brisk: bool) -> None:
    """Paints small dark round nuclei: a few scattered always, aggregates when the infiltrate is brisk."""
    height, width = canvas.tissue.shape
    spots = [rng.uniform(0, 1, (250 if is_brisk else 80, 2)) * [width, height]]
    for _ in range(36 if is_brisk else 1):
        centre = rng.uniform(0, 1, 2) * [width, height]
        spots.append(centre + rng.normal(0, 1, (int(rng.integers(60, 130)), 2)) * rng.uniform(22, 40, 2))
    places = np.concatenate(spots)
    places = places[canvas.is_free(places)]
    radii = np.repeat(rng.normal(2.9, 0.25, (len(places), 1)), 2, axis=1)
    _paint_nuclei(rng, canvas.nuclei, places, radii, np.zeros(len(places)), rng.integers(185, 235, len(places)))


def _over(base: np.ndarray, top: np.ndarray | int, alpha: np.ndarray) -> np.ndarray:
    """Returns `top` laid over `base` where `alpha` is 255; uint8 (h, w)."""
    layer = np.full_like(base, top) if isinstance(top, int) else top
    kept = cv2.multiply(base, cv2.bitwise_not(alpha), scale=1 / 255)
    return cv2.add(kept, cv2.multiply(layer, alpha, scale=1 / 255))


def _noise(rng: np.random.Generator, shape: tuple[int, int], sigma: tuple[float, float]) -> np.ndarray:
    """Returns smooth noise around 128 with standard deviation 32, uint8 (h, w); `sigma` in pixels along x and y."""
    raw = np.frombuffer(rng.bytes(shape[0] * shape[1]), np.uint8).reshape(shape)
    smooth = cv2.GaussianBlur(raw, (0, 0), sigma[0], sigmaY=sigma[1], borderType=cv2.BORDER_REFLECT)
    mean, deviation = (float(value.item()) for value in cv2.meanStdDev(smooth))
    return cv2.convertScaleAbs(smooth, alpha=32 / deviation, beta=128 - mean * 32 / deviation)


def _concentrations(rng: np.random.Generator, canvas: _Canvas, frame: _Frame) -> tuple[np.ndarray, np.ndarray]:
    """Returns how much haematoxylin and eosin every pixel binds, uint8 (h, w), `STAIN_STEPS` for concentration 1."""
    height, width = shape = canvas.tissue.shape
    fibres = _noise(rng, (TEXTURE_PX, TEXTURE_PX), (14.0, 1.1))
    lookup = frame.texture_map(width, height)
    fibres = cv2.remap(fibres, lookup, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    clouds = cv2.resize(_noise(rng, (height // 16, width // 16), (4.0, 4.0)), (width, height))
    grain = _noise(rng, shape, (0.9, 0.9))
    haematoxylin = cv2.convertScaleAbs(clouds, alpha=0.10)
    eosin = cv2.addWeighted(fibres, 0.33, clouds, 0.2, -18)
    body = cv2.convertScaleAbs(canvas.cytoplasm, alpha=2.0)
    haematoxylin = _over(haematoxylin, cv2.multiply(canvas.cytoplasm, grain, scale=0.28 / 128), body)
    eosin = _over(eosin, cv2.addWeighted(grain, 0.15, clouds, 0.2, 5), body)
    haematoxylin, eosin = _over(haematoxylin, 10, canvas.necrosis), _over(eosin, grain, canvas.necrosis)
    wisps = cv2.convertScaleAbs(fibres, alpha=0.12)
    haematoxylin, eosin = _over(haematoxylin, wisps, canvas.mucin), _over(eosin, 8, canvas.mucin)
    haematoxylin, eosin = _over(haematoxylin, 1, canvas.white), _over(eosin, 2, canvas.white)
    core = cv2.convertScaleAbs(canvas.nuclei, alpha=2.0)
    haematoxylin = _over(haematoxylin, cv2.multiply(canvas.nuclei, grain, scale=1 / 128), core)
    eosin = _over(eosin, cv2.convertScaleAbs(grain, alpha=0.3), core)
    return tuple(cv2.multiply(layer, canvas.tissue, scale=1 / 255) for layer in (haematoxylin, eosin))
