# SPDX-License-Identifier: Apache-2.0
"""Files of other tools: what TRIDENT's chunks cost, how fast features are taken over and coordinates found.

    python benchmarks/foreign_files.py
    python benchmarks/foreign_files.py --num-slides 40 --num-tiles 20000 --width 1536

Ends in one JSON line. `read_*_cpu_s` is CPU time for the features of all slides from files with chunks of one row, as
TRIDENT writes them, and as we write them; the round of each is repeated and the least time counts, as a busy machine
only adds. `import_peak_mib_*` is the most memory that `dre-slcl import-features` held for a third of the slides
and for all of them, libraries included: it should not grow with their number.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from dre_slcl.training.feature_files import open_feature_folder
from dre_slcl.training.foreign_features import read_feature_bag
from dre_slcl.training.foreign_grids import find_coordinates, index_coordinates
from dre_slcl.training.import_features import import_features
from dre_slcl.training.trident_export import coordinate_attributes, write_trident_coordinates, write_trident_features

_ROUNDS = 3


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-slides", type=int, default=6, help="slides with features (default: %(default)s)")
    parser.add_argument("--num-tiles", type=int, default=15_000, help="tiles of each (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="numbers per feature (default: %(default)s)")
    parser.add_argument("--import-only", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument(
        "--num-indexed", type=int, default=5_000, help="coordinate files to find (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.import_only:
        print(json.dumps(import_only(*options.import_only)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder, options)
        sizes = {name: value for name, value in vars(options).items() if name != "import_only"}
        result = {**sizes, **measure_reading(folder), **measure_import(folder)}
        result.update(measure_index(folder / "job", options.num_indexed))
    print(json.dumps(result))
    return 0


def attributes_of(slide_id: str) -> dict[str, int | float | str]:
    """Attributes of an ordinary slide."""
    sizes = {"width_px": 90_000, "height_px": 80_000, "tile_size_px": 256, "tile_mpp": 0.5, "stride_px": 256}
    return coordinate_attributes(slide_id, mpp=0.25, tile_size_level0_px=512, **sizes)


def write_features(folder: Path, options: argparse.Namespace) -> None:
    """Writes the same features twice: with one row per chunk to `rows`, and as we write them to `ours`."""
    rng = np.random.default_rng(0)
    tile_xy = np.stack(np.divmod(np.arange(options.num_tiles), 200), axis=1) * 512
    (folder / "rows").mkdir()
    for index in range(options.num_slides):
        features = rng.standard_normal((options.num_tiles, options.width), dtype=np.float32)
        slide_id = f"slide-{index}"
        write_trident_features(
            folder / "ours" / f"{slide_id}.h5", features, tile_xy, encoder="e", attributes=attributes_of(slide_id)
        )
        with h5py.File(folder / "rows" / f"{slide_id}.h5", "w") as file:
            for name, values in (("features", features), ("coords", tile_xy)):
                shape = (None, values.shape[1])
                file.create_dataset(name, data=values, chunks=(1, values.shape[1]), maxshape=shape)
            file["features"].attrs["encoder"] = "e"
            file["coords"].attrs.update(attributes_of(slide_id))


def measure_reading(folder: Path) -> dict[str, float]:
    """CPU seconds to read all features of each layout."""
    seconds = {"rows": [], "ours": []}
    for _ in range(_ROUNDS):
        for name, times in seconds.items():
            start = time.process_time()
            for file in open_feature_folder(folder / name).files:
                read_feature_bag(file)
            times.append(time.process_time() - start)
    least = {name: min(times) for name, times in seconds.items()}
    return {
        "read_rows_cpu_s": round(least["rows"], 3),
        "read_ours_cpu_s": round(least["ours"], 3),
        "rows_over_ours": round(least["rows"] / least["ours"], 2),
    }


def measure_import(folder: Path) -> dict[str, float]:
    """CPU seconds of an import, and the memory it takes for a third of the slides and for all."""
    some = folder / "some"
    some.mkdir()
    paths = sorted((folder / "ours").iterdir())
    for path in paths[: max(1, len(paths) // 3)]:
        (some / path.name).symlink_to(path)
    # Memory that was once taken is rarely given back, so each import has a process of its own.
    few, all_slides = (
        _import_in_process(source, folder / f"imported-{source.name}") for source in (some, folder / "ours")
    )
    return {
        "import_cpu_s": all_slides["cpu_s"],
        "import_mib_per_cpu_s": round(all_slides["mib"] / all_slides["cpu_s"], 1),
        "import_peak_mib_third": few["peak_mib"],
        "import_peak_mib_all": all_slides["peak_mib"],
    }


def _import_in_process(source: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--import-only", str(source), str(out)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def import_only(source: str, out: str) -> dict[str, float]:
    """Imports features in this process; returns CPU seconds, MiB of features, and the most memory ever held."""
    start = time.process_time()
    info = import_features(source, out, progress=False)
    return {
        "cpu_s": round(time.process_time() - start, 3),
        "mib": info["num_tiles"] * info["width"] * 4 / 2**20,
        "peak_mib": round(peak_rss_mib(), 1),
    }


def peak_rss_mib() -> float:
    """The most memory that this process has held."""
    # `getrusage` also counts the process that this one was forked from; Linux's own peak does not.
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if platform.system() == "Darwin" else 1 << 10)


def measure_index(job: Path, num_slides: int) -> dict[str, float]:
    """CPU seconds to find the coordinates of all slides of a job folder."""
    patches = job / "20x_256px_0px_overlap" / "patches"
    write_trident_coordinates(patches / "slide-0_patches.h5", np.zeros((1, 2)), attributes_of("slide-0"))
    content = (patches / "slide-0_patches.h5").read_bytes()
    for index in range(num_slides):
        (patches / f"slide-{index}_patches.h5").write_bytes(content)
    start = time.process_time()
    found = index_coordinates(job)
    paths = [find_coordinates(found, f"slide-{index}") for index in range(num_slides)]
    seconds = time.process_time() - start
    if None in paths:
        raise RuntimeError("a coordinate file was not found")
    return {"index_cpu_s": round(seconds, 3)}


if __name__ == "__main__":
    sys.exit(main())
