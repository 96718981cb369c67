# SPDX-License-Identifier: Apache-2.0
"""A few small slides that differ in colour, embedded by `dre-slcl embed` with a tiny model."""

import csv
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile

from dre_slcl_cli import main
from modeling_dre_slcl import DreSlclProcessor

from .tiny_models import tiny_image_processor, tiny_model, tiny_tokenizer

REPORTS = ("a tumor of grade", "normal tissue", "a tumor of grade", "a slide of <b>tissue</b>", "")


@dataclass(frozen=True)
class EmbeddedCohort:
    """Where things are: slides s0 ... s4 of the cases c0, c0, c1, c1, c2."""

    manifest: Path
    model: Path
    out: Path
    slides: dict[str, Path]


def write_slide(path: Path, seed: int) -> Path:
    """Writes a tiled TIFF of 768 x 512 px at 0.5 um/px with two kinds of tissue."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.normal(243, 2, (512, 768, 3)), 0, 255).astype(np.uint8)
    for centre in ((250, 256), (520, 256)):
        inside = cv2.ellipse(np.zeros((512, 768), np.uint8), centre, (130, 170), 0, 0, 360, 1, -1).astype(bool)
        colour = rng.integers((150, 60, 120), (220, 140, 200))
        texture = rng.normal(colour, rng.integers(10, 45), (int(inside.sum()), 3))
        pixels[inside] = np.clip(texture, 0, 255).astype(np.uint8)
    resolution = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", compression="jpeg", **resolution)
    return path


def write_embedded_cohort(folder: Path, *, text: bool = True) -> EmbeddedCohort:
    """Writes slides, a manifest and a model, and embeds the slides with their tile features."""
    (folder / "slides").mkdir(parents=True)
    slides = {f"s{place}": write_slide(folder / "slides" / f"s{place}.tif", place) for place in range(len(REPORTS))}
    with (folder / "manifest.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["slide_id", "path", "case_id", "report"])
        for place, (slide_id, path) in enumerate(slides.items()):
            writer.writerow([slide_id, path.relative_to(folder), f"c{place // 2}", REPORTS[place]])
    model = folder / "model"
    tiny_model(text=text).save_pretrained(model)
    if text:
        DreSlclProcessor(tiny_image_processor(), tiny_tokenizer()).save_pretrained(model)
    else:
        tiny_image_processor().save_pretrained(model)
    out = folder / "embedded"
    arguments = ["--model", str(model), "--slides", str(folder / "manifest.csv"), "--out", str(out)]
    assert main(["embed", *arguments, "--tile-features", "--device", "cpu"]) == 0
    return EmbeddedCohort(folder / "manifest.csv", model, out, slides)
