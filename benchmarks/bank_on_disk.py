# SPDX-License-Identifier: Apache-2.0
"""A memory bank mapped from a disk against one in host memory: steps per second, and memory of the process.

`python -m benchmarks.bank_on_disk` prints one line of JSON. The mapped bank has the paper's geometry at a tenth of
11,000 slides x 15,000 tiles (12.7 GB of float16 features; `--full`: all of it, 127 GB), in a sparse file. A bank in
memory cannot have that size on a small machine, so it holds fewer slides; a step costs both the same. Of each slide
`STORED` tiles all over it hold features and are drawn from, so every step reads, subtracts and overwrites stored rows.

- `step_ratio`: steps per second, mapped to in memory, with a tile encoder of realistic cost. The stand-in encodes
  `STAND_IN_TILES` tiles of 256 px with the paper's ViT-S forward and backward, out of the 128 of a real step: it is
  cheaper than the real one, so the ratio of a real step is nearer to 1. Target: at least 0.90.
- `bank_only_ratio`: the same for reading and writing the bank alone, with its pages in the system's cache.
- `cold_bank_ms`: reading and writing the mapped bank after the system's cache was emptied of it.
- `anonymous_growth_mib`, `resident_growth_mib`: what the process holds more with the mapped bank than with one of a
  tenth of the size after as many steps. Target: at most 50.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dre_slcl.training.disk_space import disk_full_error
from modeling_dre_slcl import DreSlclConfig, DreSlclModel, MemoryBank
from modeling_dre_slcl.bank_storage import bank_tables

NUM_SLIDES, TILES_PER_SLIDE, WIDTH, CODEWORDS = 11_000, 15_000, 384, 16
SLIDES_PER_BATCH, SAMPLED, STORED, STAND_IN_TILES = 4, 32, 64, 4


class BankSteps:
    """Steps on a bank whose slides each hold `STORED` tiles."""

    def __init__(self, num_slides: int, folder: Path | None) -> None:
        self.num_slides, self.step, self.random = num_slides, 0, np.random.default_rng(0)
        self.codebook = F.normalize(torch.randn(CODEWORDS, WIDTH), dim=-1)
        self.bank = MemoryBank(WIDTH, CODEWORDS)
        started = time.perf_counter()
        self.bank.allocate([TILES_PER_SLIDE] * num_slides, folder=folder)
        self.allocate_seconds = time.perf_counter() - started
        self.features = F.normalize(torch.randn(SLIDES_PER_BATCH, SAMPLED, WIDTH), dim=-1)
        pool = F.normalize(torch.randn(1, STORED, WIDTH), dim=-1)
        for slide in range(num_slides):
            tiles = torch.arange(STORED)[None] * (TILES_PER_SLIDE // STORED)
            self.bank.write(torch.tensor([slide]), tiles, pool, self.codebook, 0)

    def run(self) -> None:
        """Reads the sums of all other tiles, and writes."""
        self.step += 1
        slides = torch.from_numpy(self.random.choice(self.num_slides, SLIDES_PER_BATCH, replace=False))
        drawn = np.stack([self.random.choice(STORED, SAMPLED, replace=False) for _ in range(SLIDES_PER_BATCH)])
        tiles = torch.from_numpy(drawn) * (TILES_PER_SLIDE // STORED)
        self.bank.residuals_of_others(slides, tiles, self.codebook)
        self.bank.write(slides, tiles, self.features, self.codebook, self.step)


def encoder_stand_in() -> Callable[[], None]:
    """Forward and backward pass of the paper's ViT-S over a few tiles."""
    model = DreSlclModel(DreSlclConfig())
    pixels = torch.randn(STAND_IN_TILES, 3, model.config.tile_size_px, model.config.tile_size_px)
    return lambda: model.get_tile_features(pixels).sum().backward()


def median_ms(ways: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each way; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: float(np.median(values)) for name, values in times.items()}


def memory_mib() -> dict[str, float]:
    """What Linux says this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmRSS")}


def memory_of(num_slides: int, folder: Path, steps: int) -> dict[str, float]:
    """Memory that a process of its own holds after steps on a mapped bank."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        run = BankSteps(num_slides, folder)
        # Both sizes stop as many writes after the last time at which pages were given back.
        for _ in range(steps + (-num_slides - steps) % 64):
            run.run()
        os.write(writing, json.dumps(memory_mib()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as found:
        return json.load(found)


def empty_cache(bank: MemoryBank) -> None:
    """Writes a mapped bank to the disk and asks the system to forget its pages."""
    bank._mapped.release()
    for mapped in bank._mapped._maps.values():
        mapped.flush()
    for link in Path("/proc/self/map_files").glob("*") if os.access("/proc/self/map_files", os.R_OK) else []:
        try:
            descriptor = os.open(link, os.O_RDONLY)
        except OSError:
            continue
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="11,000 slides: 127 GB")
    parser.add_argument(
        "--dir", type=Path, default=None, help="folder on the disk (default: the system's for temporary)"
    )
    parser.add_argument("--share", type=float, default=0.1, help="share of 11,000 slides (%(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    num_slides = NUM_SLIDES if arguments.full else round(NUM_SLIDES * arguments.share)
    sizes = {"hidden_size": WIDTH, "num_codewords": CODEWORDS, "dtype": torch.float16}
    tables = bank_tables([TILES_PER_SLIDE] * num_slides, **sizes)
    needed = sum(table.num_bytes for table in tables.values())
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        status = os.statvfs(folder)
        if status.f_bavail * status.f_frsize < needed:
            raise disk_full_error(folder, needed)
        small = memory_of(num_slides // 10, folder, 300)
        large = memory_of(num_slides, folder, 300)
        inside, mapped = BankSteps(max(8, num_slides // 20), None), BankSteps(num_slides, folder)
        bank_only = median_ms({"inside": inside.run, "mapped": mapped.run}, 150)
        encode = encoder_stand_in()
        whole = median_ms({"inside": lambda: (encode(), inside.run()), "mapped": lambda: (encode(), mapped.run())}, 8)
        encoder_ms = median_ms({"encoder": encode}, 3)["encoder"]
        empty_cache(mapped.bank)
        cold = median_ms({"cold": mapped.run}, 20)["cold"]
        used = status.f_bavail - os.statvfs(folder).f_bavail
        sums = [bank.bank.feature_sums.clone() for bank in (inside,)]
        inside.bank.rebuild_sums()
        result = {
            "benchmark": "bank_on_disk",
            "machine": f"{platform.machine()}, 1 thread",
            "slides": num_slides,
            "tiles": num_slides * TILES_PER_SLIDE,
            "features_gb": round(tables["features"].num_bytes / 1e9, 2),
            "bank_gb": round(needed / 1e9, 2),
            "bytes_per_tile_to_features": round(needed / tables["features"].num_bytes, 4),
            "slides_in_memory": inside.num_slides,
            "allocate_seconds": round(mapped.allocate_seconds, 2),
            "disk_used_gb": round(used * status.f_frsize / 1e9, 2),
            "bank_only_ms": {way: round(value, 3) for way, value in bank_only.items()},
            "bank_only_ratio": round(bank_only["inside"] / bank_only["mapped"], 3),
            "stand_in_tiles": STAND_IN_TILES,
            "stand_in_ms": round(encoder_ms, 1),
            "step_ms": {way: round(value, 2) for way, value in whole.items()},
            "step_ratio": round(whole["inside"] / whole["mapped"], 3),
            "cold_bank_ms": round(cold, 2),
            "anonymous_mib": [round(small["RssAnon"]), round(large["RssAnon"])],
            "mapped_mib": [round(small["RssFile"]), round(large["RssFile"])],
            "anonymous_growth_mib": round(large["RssAnon"] - small["RssAnon"], 1),
            "resident_growth_mib": round(large["VmRSS"] - small["VmRSS"], 1),
            "sums_equal_recomputed": all(map(torch.equal, sums, [inside.bank.feature_sums])),
            "targets": {"step_ratio": ">= 0.90", "anonymous_growth_mib": "<= 50", "resident_growth_mib": "<= 50"},
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
