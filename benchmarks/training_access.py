# SPDX-License-Identifier: Apache-2.0
"""What random tiles of random slides cost while training, and whether memory stays flat.

    python benchmarks/training_access.py                        # paints 12 slides of 144 tiles and tiles them
    python benchmarks/training_access.py --num-slides 24 --steps 200 2000

CPU milliseconds per tile (user and system time of this process; of several rounds, the fastest), all of the same
random tiles:

- `datasets_default_ms`: `dataset[row]["image"]`, decoded by `datasets` with Pillow.
- `undecoded_rows_ms`: undecoded rows as Python dictionaries, then libjpeg-turbo and `np.stack`.
- `tile_source_ms`: `TileSource.read` on stored JPEG.
- `step_ms`: `StepDataset`, which also turns, mirrors and stains the tiles at random.
- `decode_limit_ms`: libjpeg-turbo on the same bytes in memory, straight into a batch: the limit.
- `slides_ms`: `TileSource.read` on a dataset of coordinates, through `SlideReader`; slides are opened and closed.
- `slides_open_ms`: the same where all slides are open already.

Memory, in MiB, while steps are read: `*_anonymous_mib` is the most that the process itself held (what cannot be given
back) up to each number of steps, after a warm-up of a fifth of the first number; `*_growth` is last over first. Pages
of the memory-mapped dataset are counted apart as `*_mapped_mib`: they belong to the system's page cache, grow to
the size of what was read, and are taken back whenever memory is short.

Ends in one line of JSON.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import datasets
import numpy as np
import simplejpeg

from dre_slcl.training.build_dataset import build_dataset
from dre_slcl.training.dataset_files import load_split
from dre_slcl.training.demo.slide_writer import write_slide
from dre_slcl.training.sampler import StepSampler
from dre_slcl.training.step_dataset import StepDataset
from dre_slcl.training.tile_source import TileSource
from modeling_dre_slcl.tile_grid import TileGridConfig

_TILE_PX = 256
_MPP = 0.5
_TILES_PER_READ = 16
_TILES_PER_STEP = 4  # of each of four slides, while memory is watched
_Plan = list[tuple[int, np.ndarray]]  # slide, its tiles


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-slides", type=int, default=12, help="slides to paint (default: 12)")
    parser.add_argument("--tiles-per-side", type=int, default=12, help="a slide has the square of it (default: 12)")
    parser.add_argument("--rounds", type=int, default=5, help="times everything is measured (default: 5)")
    parser.add_argument("--steps", type=int, nargs=2, default=(200, 2000), help="for memory (default: 200 2000)")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_datasets(root, arguments.num_slides, arguments.tiles_per_side)
        stored = TileSource(root / "encode", "train")
        read = TileSource(root / "none", "train", slides_root=root / "slides")
        figures = measure_times(root, stored, read, rounds=arguments.rounds)
        figures |= measure_memory("stored", stored, arguments.steps)
        figures |= measure_memory("slides", read, arguments.steps)
    print(json.dumps(figures))
    return 0


def write_datasets(root: Path, num_slides: int, tiles_per_side: int) -> None:
    """Paints slides that are all tissue, and makes a dataset with pixels and one of coordinates of them."""
    (root / "slides").mkdir()
    side = tiles_per_side * _TILE_PX
    for index in range(num_slides):
        random = np.random.default_rng(index)
        coarse = random.integers([110, 40, 90], [235, 160, 215], (side // 6, side // 6, 3)).astype(np.uint8)
        pixels = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        write_slide(root / "slides" / f"slide-{index}.svs", pixels, mpp=_MPP)
    for mode in ("encode", "none"):
        grid = TileGridConfig(tile_size_px=_TILE_PX, tile_mpp=_MPP)
        build_dataset(root / "slides", root / mode, grid, pixels=mode, num_workers=0, progress=False)


def measure_times(root: Path, stored: TileSource, read: TileSource, *, rounds: int) -> dict[str, float]:
    """CPU milliseconds per tile of every way, and their ratios."""
    random = np.random.default_rng(0)
    plan = [
        (slide, random.choice(stored.slides[slide].num_tiles, _TILES_PER_READ, replace=False))
        for slide in random.integers(len(stored.slides), size=32).tolist()
    ]
    table = load_split(root / "encode", "tiles", "train")
    undecoded = table.cast_column("image", datasets.Image(decode=False))
    rows = [(stored.slides[slide].tile_start + tiles).tolist() for slide, tiles in plan]
    encoded = [[undecoded[row]["image"]["bytes"] for row in batch] for batch in rows]
    opened = TileSource(root / "none", "train", slides_root=root / "slides")
    opened._handles.max_open = len(opened.slides)
    steps = step_dataset(stored, _TILES_PER_READ)
    ways: dict[str, Callable[[], None]] = {
        "datasets_default_ms": lambda: decode_default(table, rows),
        "undecoded_rows_ms": lambda: decode_rows(undecoded, rows),
        "tile_source_ms": lambda: read_all(stored, plan),
        "decode_limit_ms": lambda: decode_limit(encoded),
        "step_ms": lambda: [steps[step] for step in range(len(plan) // len(steps.sampler.shards))],
        "slides_ms": lambda: read_all(read, plan),
        "slides_open_ms": lambda: read_all(opened, plan),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):  # ways in turn, so that whatever else the machine does meets all of them
        for name, run in ways.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], 1e3 * (time.process_time() - started) / (_TILES_PER_READ * len(plan)))
    return {
        "num_tiles": sum(row.num_tiles for row in stored.slides),
        "tile_bytes": round(float(np.mean([len(data) for batch in encoded for data in batch]))),
        **{name: round(value, 3) for name, value in best.items()},
        "tile_source_to_limit": round(best["tile_source_ms"] / best["decode_limit_ms"], 2),
        "default_to_tile_source": round(best["datasets_default_ms"] / best["tile_source_ms"], 2),
        "slides_open_to_limit": round(best["slides_open_ms"] / best["decode_limit_ms"], 2),
    }


def decode_default(table: datasets.Dataset, rows: list[list[int]]) -> None:
    """As `datasets` does it by default."""
    for batch in rows:
        np.stack([np.asarray(table[row]["image"]) for row in batch])


def decode_rows(undecoded: datasets.Dataset, rows: list[list[int]]) -> None:
    """Undecoded rows as Python objects."""
    for batch in rows:
        images = undecoded[batch]["image"]
        np.stack([simplejpeg.decode_jpeg(image["bytes"]) for image in images])


def decode_limit(encoded: list[list[bytes]]) -> None:
    """Nothing but decoding into a batch."""
    for batch in encoded:
        pixels = np.empty((len(batch), _TILE_PX, _TILE_PX, 3), np.uint8)
        for place, data in enumerate(batch):
            simplejpeg.decode_jpeg(data, buffer=pixels[place])


def read_all(source: TileSource, plan: _Plan) -> None:
    """As training does it."""
    for slide, tiles in plan:
        source.read(slide, tiles)


def step_dataset(source: TileSource, tiles_per_slide: int) -> StepDataset:
    """Steps of four slides, augmented."""
    places = list(range(len(source.slides)))
    shards = [places[first::4] for first in range(4)]
    ids, counts = [row.slide_id for row in source.slides], [row.num_tiles for row in source.slides]
    sampler = StepSampler(
        shards, range(4), ids, counts, tiles_per_slide=tiles_per_slide, retrieved_per_slide=0, seed=0
    )
    return StepDataset(source, sampler, augment_flips=True, augment_stain=0.1)


def measure_memory(name: str, source: TileSource, steps: tuple[int, int]) -> dict[str, float]:
    """Peak of the memory that this process holds up to the first and up to the last number of steps."""
    dataset = step_dataset(source, _TILES_PER_STEP)
    peaks: list[float] = []
    peak = mapped = 0.0
    for step in range(steps[1]):
        dataset[step]
        if step >= steps[0] // 5:
            memory = memory_mib()
            peak, mapped = max(peak, memory["RssAnon"]), max(mapped, memory["RssFile"])
        if step + 1 in steps:
            peaks.append(peak)
    figures = {f"{name}_anonymous_mib": [round(value, 1) for value in peaks]}
    return figures | {f"{name}_growth": round(peaks[-1] / peaks[0], 3), f"{name}_mapped_mib": round(mapped)}


def memory_mib() -> dict[str, float]:
    """What Linux says of this process's memory: `RssAnon` its own, `RssFile` mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key: int(fields[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile")}


if __name__ == "__main__":
    sys.exit(main())
