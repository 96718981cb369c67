# SPDX-License-Identifier: Apache-2.0
"""A cohort of tiny synthetic slides with what goes wrong in real ones, and short ways to build it."""

import hashlib

import numpy as np
import pandas as pd
import tifffile

from dre_slcl.training.build_dataset import build_dataset
from modeling_dre_slcl.tile_grid import TileGridConfig

GRID = TileGridConfig(tile_size_px=64, tile_mpp=1.0, mask_mpp=8.0)


def write_slide(path, seed, *, mpp=1.0, size=512, is_blank=False):
    """Writes a tiled TIFF with one textured, stained ellipse; OpenSlide takes its mpp from the resolution tags."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    tissue = (x / rng.uniform(0.25, 0.45)) ** 2 + (y / rng.uniform(0.25, 0.45)) ** 2 < 1
    waves = np.sin(40 * x * rng.uniform(0.5, 1.5)) * np.cos(40 * y * rng.uniform(0.5, 1.5))
    stained = np.stack([170 + 25 * waves, 90 + 25 * waves, 150 + 25 * waves], axis=-1)
    image = np.where((tissue & (not is_blank))[..., None], stained, 244).astype(np.uint8)
    resolution = (10_000 / mpp, 10_000 / mpp)
    tifffile.imwrite(
        path,
        image,
        tile=(128, 128),
        compression="deflate",
        photometric="rgb",
        resolution=resolution if mpp else None,
        resolutionunit="CENTIMETER" if mpp else "NONE",
    )


def write_cohort(folder):
    """Six slides of four cases, of which one has no tissue, one is no slide, and one is not there."""
    (folder / "slides").mkdir(parents=True)
    for i, name in enumerate(["s0", "s1", "s2", "s3"]):
        write_slide(folder / "slides" / f"{name}.tif", i)
    write_slide(folder / "slides" / "blank.tif", 9, is_blank=True)
    (folder / "slides" / "broken.tif").write_bytes(b"II*\x00 this is no slide")
    table = pd.DataFrame(
        {
            "slide_id": ["s0", "broken", "s1", "s2", "blank", "s3", "gone"],
            "path": [f"slides/{n}.tif" for n in ["s0", "broken", "s1", "s2", "blank", "s3", "gone"]],
            "case_id": ["c0", "c0", "c1", "c1", "c2", "c3", "c3"],
            "report": ["Benign.", "", "Tumor, grade 2.", "", "", "Tumor | grade 3.", ""],
            "split": ["train", "train", "train", "train", "val", "test", "test"],
            "diagnosis": ["benign", "benign", "tumor", "NA", "benign", "tumor", "tumor"],
            "grade": ["", "", "2", "2", "", "3", "3"],
            "age": ["61.5", "61.5", "40", "40", "", "70", "70"],
            "code": ["007", "007", "010", "010", "1", "2", "2"],
        }
    )
    table.to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


def build(source, out, grid=GRID, **options):
    return build_dataset(source, out, grid, **{"num_workers": 0, "progress": False, **options})


def parquet_hashes(out):
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.parquet"))
    }
