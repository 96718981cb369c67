# SPDX-License-Identifier: Apache-2.0
"""What building a slide dataset costs, in processor time per tile, beside OpenSlide with JPEG encoding.

    python benchmarks/build_dataset.py                      # 4 slides of 20,000 tiles, some minutes
    python benchmarks/build_dataset.py --slides 1 --tiles 5000

Synthetic slides of JPEG tiles (256 px, 0.5 um/px, like an Aperio scan) are built by the real command in processes of
its own, Parquet shards included. `*_ms_per_tile` is processor time of all its processes, user and system, over the
tiles; `*_marginal_ms_per_tile` leaves out what the same command needs for a slide of few tiles (start of the
interpreter, imports). The reference reads every n-th tile with OpenSlide and encodes it with OpenCV, without writing
anything. `grid_cpu_seconds` is opening, tissue mask and grid of a 40,000 x 30,000 slide; `peak_rss_mib` is that of
the largest process of a build of a 200,000 x 200,000 slide with coordinates only and with copied tiles. The last line
is JSON.
"""

import argparse
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

TILE_PX = 256
_LEVEL_FACTORS = (1, 4, 16, 64)
_QUALITY = 80
_DESCRIPTION = "Aperio Image Library v12.0.0\n{}x{} (256x256) JPEG/RGB Q=80|AppMag = 20|MPP = 0.5"
_NUM_DIFFERENT_TILES = 64


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slides", type=int, default=4, help="slides that are built (%(default)s)")
    parser.add_argument("--tiles", type=int, default=20_000, help="tiles of each of them (%(default)s)")
    parser.add_argument("--reference-tiles", type=int, default=1_000, help="tiles of the reference (%(default)s)")
    parser.add_argument("--huge-px", type=int, default=200_000, help="side of the slide for memory (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(measure(Path(folder), arguments)))
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, float | int | str]:
    """Returns the named figures."""
    side_px = round(arguments.tiles**0.5) * TILE_PX
    for number in range(arguments.slides):
        slide = write_slide(folder / "many" / f"slide-{number}.svs", side_px, side_px, seed=number)
    few = write_slide(folder / "few" / "slide.svs", 4 * TILE_PX, 4 * TILE_PX)
    large = write_slide(folder / "large" / "slide.svs", 40_000, 30_000)
    huge = write_slide(folder / "huge" / "slide.svs", arguments.huge_px, arguments.huge_px, shares_tiles=True)
    figures: dict[str, float | int | str] = {"machine": platform.machine(), "cpus": os.cpu_count() or 1}
    figures["tile_bytes"] = round(slide.stat().st_size / (side_px / TILE_PX) ** 2)
    figures["reference_ms_per_tile"] = reference_ms_per_tile(slide, arguments.reference_tiles)
    for pixels in ("encode", "copy", "none"):
        start_seconds, _, _ = build(few, folder / f"few-{pixels}", pixels)
        seconds, num_tiles, _ = build(slide, folder / f"out-{pixels}", pixels)
        figures["num_tiles"] = num_tiles
        figures[f"{pixels}_ms_per_tile"] = 1000 * seconds / num_tiles
        figures[f"{pixels}_marginal_ms_per_tile"] = 1000 * max(0.0, seconds - start_seconds) / num_tiles
    for pixels in ("encode", "copy"):
        for kind in ("", "_marginal"):
            ratio = figures["reference_ms_per_tile"] / figures[f"{pixels}{kind}_ms_per_tile"]
            figures[f"reference_over_{pixels}{kind}"] = ratio
    figures["grid_cpu_seconds"] = grid_cpu_seconds(large)
    for pixels in ("none", "copy"):
        _, figures["huge_num_tiles"], figures[f"huge_{pixels}_peak_rss_mib"] = build(
            huge, folder / f"huge-{pixels}", pixels
        )
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def build(slide: Path, out: Path, pixels: str) -> tuple[float, int, int]:
    """Builds a dataset in a process of its own; returns processor seconds, number of tiles and peak memory in MiB."""
    program = (
        "import json, resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))\n"
    )
    command = [sys.executable, "-m", "dre_slcl_cli", "tiles", "--slides", str(slide.parent), "--out", str(out)]
    command += ["--pixels", pixels, "--misaligned", "refuse", "--num-workers", "1", "--min-tissue", "0.5"]
    done = subprocess.run([sys.executable, "-c", program, *command], check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout)
    summary = json.loads((out / "summary.json").read_text())
    print(f"{pixels} {slide.parent.name}: cpu {seconds:.2f} s, {summary['cpu_seconds']}", flush=True)
    peak_mib = round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))
    return seconds, summary["num_tiles"], peak_mib


def reference_ms_per_tile(slide: Path, num_tiles: int) -> float:
    """The usual way: each tile read with OpenSlide, made RGB, encoded with OpenCV; nothing is written."""
    import openslide

    with openslide.OpenSlide(slide) as opened:
        columns, rows = (side // TILE_PX for side in opened.dimensions)
        # Whole rows, so that OpenSlide's cache helps as it would.
        places = [(i % columns * TILE_PX, i // columns * TILE_PX) for i in range(min(num_tiles, columns * rows))]
        start = time.process_time()
        for place in places:
            pixels = np.asarray(opened.read_region(place, 0, (TILE_PX, TILE_PX)).convert("RGB"))
            cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
        return 1000 * (time.process_time() - start) / len(places)


def grid_cpu_seconds(slide: Path) -> float:
    """Processor time of opening a slide, finding its tissue and laying the grid; the least of three."""
    program = (
        "import sys, time\n"
        "from dre_slcl.training.slide_worker import prepare_worker\n"
        "prepare_worker()\n"
        "from modeling_dre_slcl.slide_reader import SlideReader\n"
        "from modeling_dre_slcl.slide_tiles import tile_slide\n"
        "from modeling_dre_slcl.tile_grid import TileGridConfig\n"
        "start = time.process_time()\n"
        "with SlideReader(sys.argv[1]) as reader:\n"
        "    tile_slide(reader, TileGridConfig())\n"
        "print(time.process_time() - start)\n"
    )
    command = [sys.executable, "-c", program, str(slide)]
    return min(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3))


def write_slide(path: Path, width_px: int, height_px: int, *, shares_tiles: bool = False, seed: int = 0) -> Path:
    """Writes a pyramidal BigTIFF of JPEG tiles, tissue but for a margin of glass.

    Args:
        path (`Path`): the file.
        width_px (`int`), height_px (`int`): size of level 0.
        shares_tiles (`bool`, *optional*, defaults to `False`): store each different tile once, however often it
            occurs, so that a huge slide is a small file.
        seed (`int`, *optional*, defaults to 0): another seed gives other tiles.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tissue = [_jpeg(_tissue_pixels(rng)) for _ in range(_NUM_DIFFERENT_TILES)]
    glass = _jpeg(np.full((TILE_PX, TILE_PX, 3), 243, dtype=np.uint8))
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        places: dict[bytes, int] = {}
        link = 8
        for factor in _LEVEL_FACTORS:
            size = -(-width_px // factor), -(-height_px // factor)
            if factor > 1 and min(size) < TILE_PX:
                break
            tiles = _level_tiles(size, (width_px / factor, height_px / factor), tissue, glass)
            offsets = []
            for tile in tiles:
                if not shares_tiles or tile not in places:
                    places[tile] = file.tell()
                    file.write(tile)
                offsets.append(places[tile])
            link = _write_directory(file, link, size, offsets, [len(tile) for tile in tiles])
    return path


def _tissue_pixels(rng: np.random.Generator) -> np.ndarray:
    """Something with the colours and about the compressed size of H&E at 20x."""
    noise = rng.normal(0, 1, (TILE_PX, TILE_PX, 3)).astype(np.float32)
    texture = 45 * cv2.GaussianBlur(noise, (0, 0), 1.2) + 60 * cv2.GaussianBlur(noise, (0, 0), 4)
    return np.clip(np.array([200, 130, 175], dtype=np.float32) + 2 * texture, 0, 255).astype(np.uint8)


def _jpeg(rgb: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[
        1
    ].tobytes()


def _level_tiles(
    size: tuple[int, int], whole: tuple[float, float], tissue: Sequence[bytes], glass: bytes
) -> list[bytes]:
    """The tiles of a level, row by row: tissue where their centre is not within 2% of the slide's edge."""
    columns, rows = (-(-side // TILE_PX) for side in size)
    tiles = []
    for row in range(rows):
        for column in range(columns):
            x, y = (column + 0.5) * TILE_PX / whole[0], (row + 0.5) * TILE_PX / whole[1]
            is_tissue = 0.02 < x < 0.98 and 0.02 < y < 0.98
            tiles.append(tissue[(row * columns + column) % len(tissue)] if is_tissue else glass)
    return tiles


def _write_directory(
    file: BinaryIO, link: int, size: tuple[int, int], offsets: Sequence[int], lengths: Sequence[int]
) -> int:
    """Writes a BigTIFF directory, enters its place at `link`, and returns where the next one's is to be entered."""
    text = _DESCRIPTION.format(*size).encode() + b"\0"
    values = {256: ("I", [size[0]]), 257: ("I", [size[1]]), 258: ("H", [8, 8, 8]), 259: ("H", [7]), 262: ("H", [6])}
    values |= {270: ("s", text), 277: ("H", [3]), 322: ("I", [TILE_PX]), 323: ("I", [TILE_PX])}
    values |= {324: ("Q", offsets), 325: ("I", lengths), 530: ("H", [2, 2])}
    entries = b""
    for tag, (kind, content) in sorted(values.items()):
        data = content if kind == "s" else struct.pack(f"<{len(content)}{kind}", *content)
        if len(data) > 8:  # stored elsewhere, by its place
            place = file.tell()
            file.write(data)
            data = struct.pack("<Q", place)
        entries += struct.pack("<HHQ8s", tag, {"s": 2, "H": 3, "I": 4, "Q": 16}[kind], len(content), data)
    start = file.tell()
    file.write(struct.pack("<Q", len(values)) + entries)
    next_link = file.tell()
    file.write(struct.pack("<Q", 0))
    file.seek(link)
    file.write(struct.pack("<Q", start))
    file.seek(0, os.SEEK_END)
    return next_link


if __name__ == "__main__":
    sys.exit(main())
