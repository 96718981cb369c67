# SPDX-License-Identifier: Apache-2.0
"""What building a slide dataset costs, in processor time per tile, beside OpenSlide with JPEG encoding.

    python benchmarks/build_dataset.py                      # 4 slides of 20,000 tiles, some minutes
    python benchmarks/build_dataset.py --slides 1 --tiles 5000

Synthetic slides of JPEG tiles (256 px, 0.5 um/px, like an Aperio scan) are built by the real command in processes of
its own, Parquet shards included. `*_ms_per_tile` is processor time of all its processes, user and system, over the
tiles; `*_marginal_ms_per_tile` leaves out what the same command needs for a slide of few tiles (start of the
interpreter, imports), which thousands of slides share. The reference reads tiles with OpenSlide, encodes them with
OpenCV and writes them to Parquet; it looks for no tissue and draws nothing. `grid_cpu_seconds` is opening, tissue mask
and grid of a 40,000 x 30,000 slide at 0.5 um/px (`grid_40x_cpu_seconds`: at 0.25); `peak_rss_mib` is that of the
largest process of a build of a 200,000 x 200,000 slide with coordinates only and with copied tiles. The last line is
JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import openslide
import pyarrow as pa
import pyarrow.parquet as pq
from large_slide import write_large_slide

if TYPE_CHECKING:
    import PIL.Image

TILE_PX = 256
_REFERENCE_GROUP = 250
_REFERENCE_SCHEMA = pa.schema([("x", pa.int32()), ("y", pa.int32()), ("image", pa.binary())])


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
        # Of different sizes, for slides of the same content are refused.
        slide = write_slide(
            folder / "many" / f"slide-{number}.svs", side_px + number * TILE_PX, side_px, tissue_share=1
        )
    few = write_slide(folder / "few" / "slide.svs", 1024, 1024, tissue_share=1)
    large = write_slide(folder / "large" / "slide.svs", 40_000, 30_000)
    large_40x = write_slide(folder / "large_40x" / "slide.svs", 40_000, 30_000, mpp=0.25)
    huge = write_slide(folder / "huge" / "slide.svs", arguments.huge_px, arguments.huge_px, store_once=True)
    figures: dict[str, float | int | str] = {"machine": platform.machine(), "cpus": os.cpu_count() or 1}
    figures["tile_bytes"] = round(slide.stat().st_size / (side_px / TILE_PX) ** 2)
    references = []
    for pixels in ("encode", "copy", "none"):
        # Before each build, since the speed of a shared machine changes within minutes.
        references.append(reference_ms_per_tile(slide, arguments.reference_tiles))
        start_seconds, _, _ = build(few, folder / f"few-{pixels}", pixels)
        seconds, num_tiles, _ = build(slide, folder / f"out-{pixels}", pixels)
        figures["num_tiles"] = num_tiles
        figures[f"{pixels}_ms_per_tile"] = 1000 * seconds / num_tiles
        figures[f"{pixels}_marginal_ms_per_tile"] = 1000 * max(0.0, seconds - start_seconds) / num_tiles
    figures["reference_ms_per_tile"] = statistics.median(references)
    for pixels in ("encode", "copy"):
        for kind in ("", "_marginal"):
            ratio = figures["reference_ms_per_tile"] / figures[f"{pixels}{kind}_ms_per_tile"]
            figures[f"reference_over_{pixels}{kind}"] = ratio
    figures["grid_cpu_seconds"] = grid_cpu_seconds(large)
    figures["grid_40x_cpu_seconds"] = grid_cpu_seconds(large_40x)
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


def write_slide(path: Path, width_px: int, height_px: int, *, mpp: float = 0.5, **options: Any) -> Path:
    """Writes a slide into a folder of its own; see `write_large_slide`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_large_slide(path, width_px, height_px, mpp=mpp, **options)


def reference_ms_per_tile(slide: Path, num_tiles: int) -> float:
    """The usual way: each tile read with OpenSlide, made RGB, encoded with OpenCV, and written to Parquet."""
    with openslide.OpenSlide(slide) as opened, tempfile.TemporaryDirectory(dir=slide.parent.parent) as folder:
        columns, rows = (side // TILE_PX for side in opened.dimensions)
        # Whole rows, so that OpenSlide's cache helps as it would.
        places = [(i % columns * TILE_PX, i // columns * TILE_PX) for i in range(min(num_tiles, columns * rows))]
        start = time.process_time()
        with pq.ParquetWriter(Path(folder) / "tiles.parquet", _REFERENCE_SCHEMA, compression="none") as writer:
            for first in range(0, len(places), _REFERENCE_GROUP):
                group = places[first : first + _REFERENCE_GROUP]
                images = [encode(opened.read_region(place, 0, (TILE_PX, TILE_PX))) for place in group]
                xs, ys = zip(*group, strict=True)
                writer.write_table(pa.table([list(xs), list(ys), images], schema=_REFERENCE_SCHEMA))
        return 1000 * (time.process_time() - start) / len(places)


def encode(region: "PIL.Image.Image") -> bytes:
    """Encodes what OpenSlide returns as JPEG."""
    pixels = cv2.cvtColor(np.asarray(region.convert("RGB")), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


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


if __name__ == "__main__":
    sys.exit(main())
