# SPDX-License-Identifier: Apache-2.0
"""The cohort of `benchmarks.learning`: slides painted tile by tile, their reports, and a slide dataset on disk.

A slide is a bag of 100 to 120 tiles of 24 px. Most are stroma, lymphocytes, necrosis, mucin, fat and benign glands;
5 to 20% are tumour. Tumour nuclei are as many, as large and as dark whatever the subtype. `cue` says what tells it:

- by their arrangement alone (around a lumen, scattered, in rows), the largest difference between tumour tiles; or
- by the nuclei alone (round, spindle-shaped, with a pale centre), a small difference beside their arrangement, which
  then differs from tile to tile and tells nothing.

Some tumour tiles of each slide show another subtype's. Benign glands, in every slide, are rings of small nuclei.
Stains differ from slide to slide in colour and strength, which tells nothing. Reports are synoptic, as protocols of
cancer reporting ask for: the subtype among procedure, site, size and margins, which no tile shows, and lymphocytes,
necrosis, mucin and grade, which tiles do.

Letters: n tiles, M nuclei of each.
"""

import dataclasses
from pathlib import Path

import numpy as np

from dre_slcl.training.arrow_columns import join_strings
from dre_slcl.training.dataset_card import write_card
from dre_slcl.training.dataset_tables import TILE_SCHEMA, TileTableWriter
from dre_slcl.training.dataset_writer import SlideEntry, write_tables
from dre_slcl.training.demo.cohort import make_cases
from dre_slcl.training.demo.report_writer import PROCEDURES, SITES, SUBTYPES
from dre_slcl.training.demo.text_model import write_text_model
from dre_slcl.training.demo.tissue_painter import CaseTraits, random_stream
from dre_slcl.training.manifest import ManifestRow
from dre_slcl.training.parquet_join import slice_table
from dre_slcl.training.slide_part import PartRecord
from dre_slcl.training.slide_pictures import encode_jpeg
from modeling_dre_slcl.atomic_files import atomic_folder
from modeling_dre_slcl.tile_grid import TileGridConfig

TILE_PX, TILE_MPP = 24, 2.0
CUES = ("arrangement", "nuclei")
_UNITS = 32  # side of a tile in the units of the numbers below
KINDS = ("stroma", "lymphocytes", "necrosis", "mucin", "fat", "benign gland", "tumour")
_JPEG_QUALITY = 95
# Optical density of haematoxylin and eosin in red, green and blue (Ruifrok and Johnston, 2001).
_HAEMATOXYLIN, _EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])
_NUM_NUCLEI = 16


@dataclasses.dataclass(frozen=True)
class CohortSize:
    """How large and how hard a cohort is.

    Args:
        num_train_cases (`int`), num_test_cases (`int`): of each of the three subtypes; a case has one slide.
        tumour_fraction (`tuple[float, float]`): range of the share of tumour tiles.
        purity (`float`): share of the tumour tiles with their slide's own subtype; others show another one's.
        stain_spread (`float`): standard deviation of the logarithm of stain strengths, between slides.
        num_tiles (`tuple[int, int]`): range of the tiles of a slide.
        cue (`str`): what tells the subtype, of `CUES`.
    """

    num_train_cases: int = 128
    num_test_cases: int = 48
    tumour_fraction: tuple[float, float] = (0.05, 0.20)
    purity: float = 0.9
    stain_spread: float = 0.25
    num_tiles: tuple[int, int] = (100, 120)
    cue: str = "arrangement"


def write_cohort(folder: Path, seed: int, size: CohortSize) -> Path:
    """Writes `dataset/` and `text_model/` into a folder, unless they are there already.

    Returns:
        `Path`: the folder.
    """
    if (folder / "dataset").is_dir() and (folder / "text_model").is_dir():
        return folder
    cases = make_cases(size.num_train_cases + size.num_test_cases, seed=seed)
    reports = [write_report(case, seed) for case in cases]
    num_train = size.num_train_cases * len(SUBTYPES)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_model(folder / "text_model", reports[:num_train], seed=seed)
    grid_config = TileGridConfig(tile_size_px=TILE_PX, tile_mpp=TILE_MPP)
    with atomic_folder(folder / "dataset") as staging:
        parts = staging / "parts"
        parts.mkdir()
        entries = [
            _write_part(parts, case, report, "train" if place < num_train else "test", seed, size)
            for place, (case, report) in enumerate(zip(cases, reports, strict=True))
        ]
        files = write_tables(staging, entries, grid_config=grid_config, has_pixels=True, shard_bytes=1 << 30)
        for path in parts.iterdir():
            path.unlink()
        parts.rmdir()
        card = write_card(
            entries, files, title="Synthetic cohort", grid_config=grid_config, jpeg_quality=_JPEG_QUALITY
        )
        (staging / "README.md").write_text(card, encoding="utf-8")
    return folder


def write_report(case: CaseTraits, seed: int) -> str:
    """Writes a case's synoptic report."""
    random = random_stream(seed, "synoptic report", case.case_id)
    procedure, site = (str(random.choice(options)) for options in (PROCEDURES, SITES))
    return (
        f"Procedure: {procedure}. Site: {site}. {describe_subtype(case.subtype)} Grade: {case.nuclear_grade}. "
        f"Lymphocytes: {'brisk' if case.brisk_lymphocytes else 'sparse'}. "
        f"Necrosis: {'present' if case.necrosis else 'absent'}. Mucin: {'present' if case.mucin else 'absent'}. "
        f"Size: {random.uniform(0.8, 6.5):.1f} cm. Margins: {random.choice(['free', 'involved'])}."
    )


def describe_subtype(subtype: str) -> str:
    """What a report says of the subtype; the prompt of a zero-shot classifier too."""
    return f"Histologic type: {SUBTYPES[subtype][0]}. Growth pattern: {subtype}."


def _write_part(parts: Path, case: CaseTraits, report: str, split: str, seed: int, size: CohortSize) -> SlideEntry:
    """Paints a slide and writes its tiles, as tiling a slide file would."""
    tiles, _ = paint_slide(case, seed, size)
    columns = int(np.ceil(len(tiles) ** 0.5))
    places = np.arange(len(tiles))
    tile_xy = np.stack([places % columns, places // columns], axis=1).astype(np.int32) * TILE_PX
    path = parts / f"{case.case_id}.parquet"
    with TileTableWriter(path, TILE_SCHEMA) as writer:
        images = join_strings([encode_jpeg(tile, _JPEG_QUALITY) for tile in tiles])
        writer.write_group(case.case_id, 0, tile_xy, images)
    side = columns * TILE_PX
    record = PartRecord(
        case.case_id, key="", vendor="painted", width_px=side, height_px=side, mpp=TILE_MPP,
        tile_size_level0_px=TILE_PX, num_tiles=len(tiles), tissue_fraction=1.0, table_bytes=path.stat().st_size,
    )  # fmt: skip
    row = ManifestRow(
        case.case_id, path, f"{case.case_id}.svs", case.case_id, TILE_MPP, report, split, {"subtype": case.subtype}
    )
    return SlideEntry(row, None, record, slice_table(path))


def paint_slide(case: CaseTraits, seed: int, size: CohortSize) -> tuple[np.ndarray, np.ndarray]:
    """Paints the tiles of a case's slide.

    Returns:
        `tuple`: tiles `(n, 24, 24, 3)`, uint8, and the kind of each `(n,)`, an index into `KINDS`.
    """
    random = random_stream(seed, "learning", case.case_id)
    num_tiles = int(random.integers(size.num_tiles[0], size.num_tiles[1] + 1))
    kinds = _draw_kinds(case, num_tiles, size, random)
    haematoxylin, eosin = _draw_tissue(case, kinds, size, random)
    spread = size.stain_spread
    # Strength of each stain, and its colour, belong to the slide.
    stains = [
        vector * random.lognormal(0, spread) * random.lognormal(0, spread / 2, size=3)
        for vector in (_HAEMATOXYLIN, _EOSIN)
    ]
    density = haematoxylin[..., None] * stains[0] + eosin[..., None] * stains[1]
    light = 243 * random.lognormal(0, spread / 10, size=3)
    pixels = light * np.exp(-density) + random.normal(scale=4, size=density.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8), kinds


def _draw_kinds(case: CaseTraits, num_tiles: int, size: CohortSize, random: np.random.Generator) -> np.ndarray:
    """Draws the kind of each tile: shares of the kinds follow from the case's traits and chance."""
    shares = np.array([
        *(3.0 * random.lognormal(0, 0.3), random.uniform(0.8, 1.6) if case.brisk_lymphocytes else 0.15),
        *(random.uniform(0.5, 1.0) if flag else 0.0 for flag in (case.necrosis, case.mucin)),
        *(random.uniform(0.3, 1.2), random.uniform(0.4, 1.2)),
    ])  # fmt: skip
    num_tumour = max(2, round(num_tiles * random.uniform(*size.tumour_fraction)))
    others = random.choice(len(shares), size=num_tiles - num_tumour, p=shares / shares.sum())
    return random.permutation(np.concatenate([others, np.full(num_tumour, KINDS.index("tumour"))]))


def _draw_tissue(
    case: CaseTraits, kinds: np.ndarray, size: CohortSize, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws tiles of given kinds: amounts of haematoxylin and eosin, each `(n, 32, 32)`."""
    n, grid = len(kinds), (np.arange(TILE_PX) - (TILE_PX - 1) / 2) * (_UNITS / TILE_PX)
    x, y = np.broadcast_arrays(grid[None, None, :], grid[None, :, None])
    angle = random.uniform(0, np.pi, size=(n, 1, 1))
    along = np.cos(angle) * x + np.sin(angle) * y
    waves = np.sin(2 * np.pi * along / random.uniform(6, 11, size=(n, 1, 1)) + random.uniform(0, 6.3, size=(n, 1, 1)))
    base = np.array([0.40, 0.30, 0.55, 0.06, 0.04, 0.32, 0.36])[kinds] * random.lognormal(0, 0.15, size=n)
    fibres = np.array([0.12, 0.03, 0.08, 0.03, 0.0, 0.05, 0.03])[kinds]
    noise = np.array([0.03, 0.03, 0.16, 0.02, 0.01, 0.03, 0.03])[kinds]
    eosin = base[:, None, None] + fibres[:, None, None] * waves
    eosin = eosin + noise[:, None, None] * random.normal(size=(n, TILE_PX, TILE_PX))
    haematoxylin = np.full_like(eosin, 0.05)
    haematoxylin[kinds == KINDS.index("mucin")] += 0.12 * (1 + waves[kinds == KINDS.index("mucin")]) / 2
    nuclei = (part.astype(np.float32)[..., None, None] for part in _draw_nuclei(case, kinds, size, random))
    centres, radii, depth, length, tilt, pallor = nuclei
    x, y = (part.astype(np.float32) for part in (x, y))
    for number in range(_NUM_NUCLEI):
        dx, dy = x - centres[:, number, 0], y - centres[:, number, 1]
        cos, sin = np.cos(tilt[:, number]), np.sin(tilt[:, number])
        # An ellipse of the same area, `length` times as long and as thin as the circle.
        along, across = (cos * dx + sin * dy) / length[:, number], (cos * dy - sin * dx) * length[:, number]
        distance = np.sqrt(along**2 + across**2)
        inside = (0.5 + radii[:, number] - distance).clip(0, 1)
        centre = (0.5 + 0.6 * radii[:, number] - distance).clip(0, 1)
        amount = depth[:, number] * (inside - pallor[:, number] * centre)
        haematoxylin = np.maximum(haematoxylin, amount)
    # Fat: a large drop with a thin rim.
    is_fat = kinds == KINDS.index("fat")
    rim = np.abs(np.hypot(x, y) - random.uniform(9, 14, size=(n, 1, 1))) < 1
    eosin[is_fat] += 0.35 * np.broadcast_to(rim, eosin.shape)[is_fat]
    return haematoxylin.clip(min=0), eosin.clip(min=0)


def _draw_nuclei(
    case: CaseTraits, kinds: np.ndarray, size: CohortSize, random: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """Draws nuclei.

    Returns:
        `tuple`: centres `(n, M, 2)`, radii, amounts of haematoxylin (0: left out), lengths and tilts of ellipses, and
        pallor of centres, each `(n, M)`.
    """
    n = len(kinds)
    counts = np.array([3, 15, 14, 1, 1, 11, 12])[kinds]
    mean_radius = np.array([1.6, 1.5, 0.8, 1.4, 1.2, 1.7, 2.0 + 0.25 * case.nuclear_grade])[kinds]
    radii = mean_radius[:, None] * random.lognormal(0, 0.12, size=(n, _NUM_NUCLEI))
    depth = 1.1 * random.lognormal(0, 0.15, size=(n, _NUM_NUCLEI))
    depth = depth * (np.arange(_NUM_NUCLEI) < counts[:, None])
    names = sorted(SUBTYPES)
    other = random.integers(1, len(names), size=n) * (random.random(n) > size.purity)
    subtype = (names.index(case.subtype) + other) % len(names)
    centres = random.uniform(-15, 15, size=(n, _NUM_NUCLEI, 2))
    for place in np.flatnonzero(kinds == KINDS.index("benign gland")):
        centres[place] = _arrange("tubular", 11, random)
    is_tumour = kinds == KINDS.index("tumour")
    shown = subtype if size.cue == "arrangement" else random.integers(0, len(names), size=n)
    for place in np.flatnonzero(is_tumour):
        centres[place] = _arrange(names[shown[place]], 12, random)
    length, tilt, pallor = np.ones_like(radii), np.zeros_like(radii), np.zeros_like(radii)
    if size.cue == "nuclei":
        tilt = random.uniform(0, np.pi, size=radii.shape)
        length = np.where((is_tumour & (subtype == 1))[:, None], 1.5 * random.lognormal(0, 0.05, radii.shape), 1.0)
        is_pale = (is_tumour & (subtype == 2))[:, None]
        pallor = pallor + np.where(is_pale, 0.8, 0.0)
        depth = np.where(is_pale, depth * 1.3, depth)  # as dark in all
    return centres, radii, depth, length, tilt, pallor


def _arrange(subtype: str, count: int, random: np.random.Generator) -> np.ndarray:
    """Places `count` nuclei as a subtype does, turned and shifted at random: `(M, 2)`; the rest are not drawn."""
    if subtype == "tubular":
        angle = 2 * np.pi * np.arange(count) / count
        points = random.uniform(8.5, 11) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    elif subtype == "trabecular":
        row, place = np.divmod(np.arange(count), -(-count // 3))
        points = np.stack([(row - 1) * random.uniform(8, 10), (place - 1.5) * 7.0], axis=1)
    else:
        points = np.stack(np.divmod(random.choice(25, size=count, replace=False), 5), axis=1) * 6.4 - 12.8
    turn = random.uniform(0, 2 * np.pi)
    turned = points @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    placed = turned + random.uniform(-3, 3, size=2) + random.normal(scale=0.8, size=turned.shape)
    return np.concatenate([placed, np.full((_NUM_NUCLEI - count, 2), 99.0)])
