# SPDX-License-Identifier: Apache-2.0
"""CPU time of reading a tile: OpenSlide, SlideReader, its batches, copied tiles, and the JPEG decoder alone.

    python benchmarks/read_tiles.py                    # synthetic slides with tiles of about 16 kB
    python benchmarks/read_tiles.py --slide slide.svs  # tissue of a real one, at its own and at half its resolution

Every way reads the same tiles, run after run of neighbours that were not read before, all ways in turn within each
round, in one process: what disturbs the machine disturbs all of them. Times are medians over the rounds, in
milliseconds of CPU time per tile (of all threads). The last line is one line of JSON: of each case the times, the
largest difference between the reader's pixels and OpenSlide's, and how many times less than OpenSlide each way takes.

Ways: `openslide` is `read_region` and conversion to RGB, `openslide_area` and `openslide_bicubic` with reduction by
OpenCV's area averaging or by Pillow's bicubic filter; `reader` is `SlideReader.read_tile`; `batches` is
`iter_tile_batches` with one thread, including opening the slide once for four times as many tiles; `decoder` is
libjpeg-turbo (through OpenCV) on the tile's bytes in memory; `copied` is `SlideReader.compressed_tiles`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
from large_slide import write_large_slide
from PIL import Image

from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.slide_tiles import iter_tile_batches, tile_slide
from modeling_dre_slcl.tile_grid import TileGrid, TileGridConfig

TILE_PX = 256
MPP = 0.25  # of the synthetic slides
SLIDE_PX = 16_384
_COLUMNS = 16  # tiles side by side: about as wide as a piece of tissue
_BATCHES_SHARE = 4  # how many times more tiles `batches` reads at once, since a slide is opened for thousands
_COPIED_BYTES = 64 << 20
_MAX_DIFFERENCE = {"native": 2, "reduced": 3}  # two builds of libjpeg; and rounding of the average

Way = Callable[[np.ndarray], object]


@dataclass
class Case:
    """Tiles of one slide that all ways read.

    Args:
        path (`Path`): the slide.
        tile_xy (`np.ndarray`): (n, 2), level-0 pixels, neighbours following each other.
        mpp (`float`): of level 0, um/px.
        tile_mpp (`float`): of the tiles, um/px.
        tile_size_px (`int`): side of the tiles.
        times (`dict[str, list[float]]`): of each way its CPU times per tile, ms.
        max_difference (`int`): largest difference between `reader` and OpenSlide, of 255.
    """

    path: Path
    tile_xy: np.ndarray
    mpp: float
    tile_mpp: float
    tile_size_px: int = TILE_PX
    times: dict[str, list[float]] = field(default_factory=dict)
    max_difference: int = 0

    @property
    def footprint_px(self) -> int:
        """Side of a tile in level-0 pixels."""
        return round(self.tile_size_px * self.tile_mpp / self.mpp)

    def grid(self, tile_xy: np.ndarray) -> TileGrid:
        """Some of the tiles as a grid."""
        return TileGrid(
            tile_xy=tile_xy.astype(np.int32),
            tissue_fraction=np.ones(len(tile_xy), np.float32),
            tile_size_px=self.tile_size_px,
            tile_mpp=self.tile_mpp,
            stride_px=self.tile_size_px,
            tile_size_level0_px=self.footprint_px,
        )


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slide", type=Path, help="slide to read (default: synthetic ones)")
    parser.add_argument("--mpp", type=float, help="resolution of --slide, um/px, if it does not say or to override it")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all ways (default: 7)")
    parser.add_argument("--tiles", type=int, default=64, help="tiles that each way reads in a round (default: 64)")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if arguments.slide is None:
            cases = synthetic_cases(Path(folder))
        else:
            cases = real_cases(arguments.slide, arguments.mpp)
        measure(cases, stack, rounds=arguments.rounds, tiles=arguments.tiles)
    report(cases)
    return 0


def synthetic_cases(folder: Path) -> dict[str, Case]:
    """Writes slides that are all tissue, and names the tiles to read."""
    slides = {
        name: write_large_slide(
            folder / f"{name}.svs", SLIDE_PX, SLIDE_PX, mpp=MPP, tissue_share=1, store_once=True, **options
        )
        for name, options in {
            "jpeg_256": {},
            "jpeg_240": {"tile_size_px": 240},
            "jpeg_512": {"tile_size_px": 512},
            "jpeg2000_256": {"codec": "jpeg2000"},
        }.items()
    }

    def case(
        name: str, tile_size_px: int = TILE_PX, *, tile_mpp: float = MPP, start: tuple[int, int] = (0, 0)
    ) -> Case:
        tile_xy = row_major(start, round(tile_size_px * tile_mpp / MPP))
        return Case(slides[name], tile_xy, MPP, tile_mpp, tile_size_px)

    return {
        "native, file tiles of 256": case("jpeg_256"),
        "native, file tiles of 240": case("jpeg_240", 240),
        "native, file tiles of 512": case("jpeg_512", 512),
        "native, 256 px tiles off the file's grid": case("jpeg_256", start=(100, 37)),
        "native, 256 px tiles from file tiles of 240": case("jpeg_240"),
        "native, 256 px tiles from file tiles of 512": case("jpeg_512"),
        "half resolution": case("jpeg_256", tile_mpp=2 * MPP),
        "half resolution, off the file's grid": case("jpeg_256", tile_mpp=2 * MPP, start=(100, 37)),
        "half resolution, file tiles of 240": case("jpeg_240", tile_mpp=2 * MPP),
        "JPEG 2000, file tiles of 256": case("jpeg2000_256"),
    }


def row_major(start: tuple[int, int], step_px: int) -> np.ndarray:
    """Level-0 positions (n, 2) of the tiles of some columns, row by row."""
    rows = (SLIDE_PX - start[1]) // step_px
    return np.array([(start[0] + x * step_px, start[1] + y * step_px) for y in range(rows) for x in range(_COLUMNS)])


def real_cases(path: Path, mpp: float | None) -> dict[str, Case]:
    """Names tiles of a real slide's tissue, at its own and at half its resolution."""
    cases = {}
    with SlideReader(path, mpp=mpp) as reader:
        for name, factor in (("native", 1), ("half resolution", 2)):
            tile_mpp = factor * reader.info.mpp
            grid = tile_slide(reader, TileGridConfig(tile_size_px=TILE_PX, tile_mpp=tile_mpp))
            cases[name] = Case(path, grid.tile_xy, reader.info.mpp, tile_mpp)
    return cases


def measure(cases: dict[str, Case], stack: ExitStack, *, rounds: int, tiles: int) -> None:
    """Runs all ways of all cases in turn, `rounds` times; the first run of each is not counted."""
    ways = {name: dict(open_ways(case, stack)) for name, case in cases.items()}
    for name, case in cases.items():
        case.times = {way: [] for way in ways[name]}
        check_pixels(case, case.tile_xy[:tiles:4])
    for number in range(rounds + 1):
        for name, case in cases.items():
            names = list(ways[name])
            for way in names[number % len(names) :] + names[: number % len(names)]:
                count = tiles * (_BATCHES_SHARE if way == "batches" else 1)
                start = number * tiles % max(1, len(case.tile_xy) - count + 1)
                tile_xy = case.tile_xy[start : start + count]
                started = time.process_time()
                ways[name][way](tile_xy)
                milliseconds = 1000 * (time.process_time() - started) / len(tile_xy)
                if number:
                    case.times[way].append(milliseconds)


def open_ways(case: Case, stack: ExitStack) -> Iterator[tuple[str, Way]]:
    """Yields the ways to read a case's tiles by their names, each with a handle and caches of its own."""
    size, footprint = case.tile_size_px, case.footprint_px
    asked = {"tile_size_px": size, "tile_mpp": case.tile_mpp}
    references = [("openslide", None)]
    if footprint != size:
        references = [("openslide_area", reduce_area), ("openslide_bicubic", reduce_bicubic)]
    for name, reduce in references:
        slide = stack.enter_context(openslide.OpenSlide(case.path))
        yield (
            name,
            lambda tile_xy, slide=slide, reduce=reduce: drain(read_plain(slide, xy, case, reduce) for xy in tile_xy),
        )
    reader = stack.enter_context(SlideReader(case.path, mpp=case.mpp))
    yield "reader", lambda tile_xy: drain(reader.read_tile(x, y, **asked) for x, y in tile_xy.tolist())
    yield (
        "batches",
        lambda tile_xy: drain(
            iter_tile_batches(case.path, case.grid(tile_xy), batch_size=32, mpp=case.mpp, num_threads=1)
        ),
    )
    copier = stack.enter_context(SlideReader(case.path, mpp=case.mpp))
    if any(copier.compressed_tile(x, y, **asked) is not None for x, y in case.tile_xy[:32].tolist()):
        yield "copied", lambda tile_xy: copier.compressed_tiles(tile_xy, **asked, max_bytes=_COPIED_BYTES)
        yield "decoder", Decoder(copier, case)


def drain(tiles: Iterable[Any]) -> None:
    """Takes tiles one after the other and keeps none, as training and embedding do."""
    deque(tiles, maxlen=0)


class Decoder:
    """Decodes tiles whose bytes are in memory: the least that reading can cost. Fetching them is not counted."""

    def __init__(self, reader: SlideReader, case: Case) -> None:
        asked = {"tile_size_px": case.tile_size_px, "tile_mpp": case.tile_mpp}
        streams = [(xy, reader.compressed_tile(*xy, **asked)) for xy in map(tuple, case.tile_xy.tolist())]
        self.streams = {xy: np.frombuffer(jpeg, np.uint8) for xy, jpeg in streams if jpeg is not None}

    def __call__(self, tile_xy: np.ndarray) -> None:
        """Decodes the tiles that can be copied."""
        streams = [self.streams.get(xy) for xy in map(tuple, tile_xy.tolist())]
        drain(cv2.imdecode(stream, cv2.IMREAD_COLOR) for stream in streams if stream is not None)


def read_plain(
    slide: openslide.OpenSlide, xy: np.ndarray, case: Case, reduce: Callable[[Image.Image, int], np.ndarray] | None
) -> np.ndarray:
    """Reads a tile with OpenSlide from level 0 as its documentation shows; uint8 RGB."""
    side = case.footprint_px
    region = slide.read_region((int(xy[0]), int(xy[1])), 0, (side, side)).convert("RGB")
    return np.asarray(region) if reduce is None else reduce(region, case.tile_size_px)


def reduce_area(region: Image.Image, size: int) -> np.ndarray:
    """Averages areas with OpenCV."""
    return cv2.resize(np.asarray(region), (size, size), interpolation=cv2.INTER_AREA)


def reduce_bicubic(region: Image.Image, size: int) -> np.ndarray:
    """Filters with Pillow's bicubic kernel."""
    return np.asarray(region.resize((size, size), Image.Resampling.BICUBIC))


def check_pixels(case: Case, tile_xy: np.ndarray) -> None:
    """Compares the reader's tiles with OpenSlide's, so that no speed is reported for wrong pixels."""
    reduces = case.footprint_px != case.tile_size_px
    with openslide.OpenSlide(case.path) as slide, SlideReader(case.path, mpp=case.mpp) as reader:
        for xy in tile_xy:
            tile = reader.read_tile(*xy.tolist(), tile_size_px=case.tile_size_px, tile_mpp=case.tile_mpp)
            expected = read_plain(slide, xy, case, reduce_area if reduces else None)
            case.max_difference = max(case.max_difference, int(cv2.norm(tile, expected, cv2.NORM_INF)))
    if case.max_difference > _MAX_DIFFERENCE["reduced" if reduces else "native"]:
        raise RuntimeError(f"{case.path.name}: the reader's tiles differ from OpenSlide's by {case.max_difference}.")


def report(cases: dict[str, Case]) -> None:
    """Prints a table for people and one line of JSON."""
    results = {}
    for name, case in cases.items():
        medians = {way: statistics.median(times) for way, times in case.times.items()}
        references = [way for way in medians if way.startswith("openslide")]
        times_less = {
            reference: {way: round(medians[reference] / medians[way], 2) for way in medians if way not in references}
            for reference in references
        }
        print(f"\n{name} (largest difference {case.max_difference})")
        for way, milliseconds in medians.items():
            less = [f"{times[way]:.1f} times less than {other}" for other, times in times_less.items() if way in times]
            print(f"  {way:18s} {milliseconds:8.3f} ms   {', '.join(less)}")
        results[name] = {
            "cpu_ms_per_tile": {way: round(milliseconds, 4) for way, milliseconds in medians.items()},
            "times_less_than": times_less,
            "max_difference": case.max_difference,
        }
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
