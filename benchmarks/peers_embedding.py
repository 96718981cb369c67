# SPDX-License-Identifier: Apache-2.0
"""Embedding a folder of slides: one stream of tiles across slides, or one slide after the other.

Both ways get the same slides, tiles, encoder, batches, reader processes and threads, and write one file per slide:

- `stream`: the engine of `dre-slcl embed`;
- `per_slide`: what TRIDENT and CLAM do, written anew: for each slide find tissue, lay the grid, start a DataLoader
  with reader processes, encode, aggregate, write an HDF5 file of features and coordinates, go on. Its workers read
  through OpenSlide (`per_slide`) as these tools do, or through this package's reader (`per_slide_our_reader`), so
  that what the reader brings and what the stream brings can be told apart.

Each run is a process of its own; its peak memory is that of all its processes together, sampled, shared pages counted
once (PSS).
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from embed_slides import make_model
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from dre_slcl.training.embed_engine import EmbedOptions, SlideJob, iter_embeddings
from modeling_dre_slcl.residual_encoder import residual_sums
from modeling_dre_slcl.slide_inference import TileBatchEncoder
from modeling_dre_slcl.slide_info import SlideError
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.slide_tiles import tile_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

WAYS = ("stream", "per_slide", "per_slide_our_reader")
_BATCH_SIZE, _NUM_WORKERS = 32, 1
_SAMPLE_SECONDS = 0.1


class SlideTiles(Dataset):
    """The tiles of one slide; each worker opens the file itself.

    Args:
        path (`Path`): the slide.
        tile_xy (`np.ndarray` of shape `(N, 2)`): top-left corners, level-0 pixels.
        tile_size_px (`int`), tile_mpp (`float`): of the tiles.
        use_openslide (`bool`): read with OpenSlide instead of this package's reader.
    """

    def __init__(
        self, path: Path, tile_xy: np.ndarray, *, tile_size_px: int, tile_mpp: float, use_openslide: bool
    ) -> None:
        self.path, self.tile_xy, self.use_openslide = path, tile_xy, use_openslide
        self.tile_size_px, self.tile_mpp = tile_size_px, tile_mpp
        self._slide: Any = None

    def __len__(self) -> int:
        return len(self.tile_xy)

    def __getitem__(self, place: int) -> np.ndarray:
        x, y = self.tile_xy[place].tolist()
        size = self.tile_size_px
        if self.use_openslide:
            if self._slide is None:
                import openslide

                self._slide = openslide.OpenSlide(self.path)
                mpp = float(self._slide.properties["openslide.mpp-x"])
                self._level = self._slide.get_best_level_for_downsample(1.01 * self.tile_mpp / mpp)
                self._source_px = round(size * self.tile_mpp / mpp / self._slide.level_downsamples[self._level])
            region = self._slide.read_region((x, y), self._level, (self._source_px,) * 2).convert("RGB")
            return np.asarray(region if self._source_px == size else region.resize((size, size)))
        if self._slide is None:
            self._slide = SlideReader(self.path)
        return self._slide.read_tile(x, y, tile_size_px=size, tile_mpp=self.tile_mpp)


def embed_per_slide(model: Any, image_processor: Any, slides: list[Path], out: Path, *, use_openslide: bool) -> int:
    """One slide after the other; returns the number of tiles."""
    config = TileGridConfig(tile_size_px=model.config.tile_size_px, tile_mpp=model.config.tile_mpp)
    encoder = TileBatchEncoder(model, image_processor, _BATCH_SIZE)
    num_tiles = 0
    for path in slides:
        with SlideReader(path) as reader:
            grid = tile_slide(reader, config)
        tiles = SlideTiles(
            path,
            grid.tile_xy,
            tile_size_px=config.tile_size_px,
            tile_mpp=config.tile_mpp,
            use_openslide=use_openslide,
        )
        loader = DataLoader(tiles, batch_size=_BATCH_SIZE, num_workers=_NUM_WORKERS)
        features = torch.cat([encoder(batch.numpy()).cpu() for batch in loader])
        with torch.inference_mode():
            residuals, counts = residual_sums(features[None], model.codebook)
            embedding = model.encode_residuals(residuals, counts).slide_embedding[0].numpy()
        with h5py.File(out / f"{path.stem}.h5", "w") as file:
            file["features"], file["coords"] = features.numpy(), grid.tile_xy
            file["slide_embedding"] = embedding
        num_tiles += len(features)
    return num_tiles


def embed_stream(model: Any, image_processor: Any, slides: list[Path], out: Path) -> int:
    """All slides in one stream; returns the number of tiles."""
    jobs = [SlideJob(path.stem, path) for path in slides]
    options = EmbedOptions(batch_size=_BATCH_SIZE, num_workers=_NUM_WORKERS, keep_features=True)
    num_tiles = 0
    for place, result in iter_embeddings(model, image_processor, jobs, options):
        if isinstance(result, SlideError):
            raise result
        names = ("slide_embedding", "tile_features", "tile_xy")
        tensors = {name: torch.as_tensor(result[name]).contiguous() for name in names}
        save_file(tensors, out / f"{jobs[place].slide_id}.safetensors")
        num_tiles += result["num_tiles"]
    return num_tiles


def run_way(way: str, folder: Path, out: Path, tile_mpp: float) -> dict[str, float]:
    """Embeds a folder in this process; returns seconds, tiles and peak memory."""
    torch.set_num_threads(1)
    model, image_processor = make_model("cpu")
    model.config.tile_mpp = tile_mpp
    slides = sorted(folder.glob("*.svs"))
    out.mkdir()
    tiles = np.zeros((_BATCH_SIZE, model.config.tile_size_px, model.config.tile_size_px, 3), dtype=np.uint8)
    TileBatchEncoder(model, image_processor, _BATCH_SIZE)(tiles)  # what a library takes at its first use
    with peak_memory() as peak:
        started = time.monotonic()
        if way == "stream":
            num_tiles = embed_stream(model, image_processor, slides, out)
        else:
            num_tiles = embed_per_slide(model, image_processor, slides, out, use_openslide=way == "per_slide")
        seconds = time.monotonic() - started
    return {"seconds": seconds, "num_tiles": num_tiles, "num_slides": len(slides), "peak_mib": peak[0]}


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Samples the memory of this process and all below it; the list holds the peak in MiB afterwards."""
    peak, stop = [0.0], threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            peak[0] = max(peak[0], sum(map(_pss_mib, _processes_below(_own_pid()))))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _own_pid() -> int:
    return int(Path("/proc/self").resolve().name)


def _processes_below(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _processes_below(int(child))
    return found


def _pss_mib(pid: int) -> float:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
    return 0.0


def measure(folder: Path, scratch: Path, *, tile_mpp: float, repetitions: int) -> dict[str, dict[str, float]]:
    """Runs every way in turns, each in a process of its own; returns the fastest run of each."""
    best: dict[str, dict[str, float]] = {}
    for repetition in range(repetitions):
        for way in WAYS:
            out = scratch / f"{folder.name}-{way}-{repetition}"
            command = [sys.executable, __file__, way, str(folder), str(out), str(tile_mpp)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            if way not in best or found["seconds"] < best[way]["seconds"]:
                best[way] = found
    return best


def main() -> None:
    """One way in this process; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tile_mpp", type=float)
    arguments = parser.parse_args()
    print(json.dumps(run_way(arguments.way, arguments.folder, arguments.out, arguments.tile_mpp)))


if __name__ == "__main__":
    main()
