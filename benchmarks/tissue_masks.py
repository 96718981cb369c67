# SPDX-License-Identifier: Apache-2.0
"""Precision and recall of the tissue masks on drawn overviews, whose tissue is known pixel by pixel.

    python benchmarks/tissue_masks.py
    python benchmarks/tissue_masks.py --seeds 0 1 2 --situations adipose ihc_dab --methods stain --pictures folder

A table with a row for each situation of `drawn_overviews.py`, then one line of JSON with `precision_mean`,
`recall_mean` and `iou_mean` over the situations with tissue, `precision_min` and `recall_min` of the worst situation,
`precision_worst` and `recall_worst` of the worst single overview, `empty_found_max`, the largest share of a slide
without tissue that is called tissue, `cpu_ms_per_megapixel`, and all situations by name: those figures are of the
default method, and the other methods' stand under their names. No setting was chosen on the default seeds: those
used while the mask was made are all below 300. Pictures show the truth in blue, what the first method found in green.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from drawn_overviews import OVERVIEW_MPP, SITUATIONS, DrawnOverview, draw_overview

from modeling_dre_slcl.tissue import TISSUE_METHODS, tissue_mask

_DEFAULT_SEEDS = (400, 401, 402, 403, 404)


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=_DEFAULT_SEEDS, help="one overview each")
    parser.add_argument(
        "--situations", nargs="+", choices=tuple(SITUATIONS), default=tuple(SITUATIONS), metavar="NAME"
    )
    parser.add_argument("--methods", nargs="+", choices=TISSUE_METHODS, default=TISSUE_METHODS)
    parser.add_argument("--pictures", type=Path, help="folder to draw truth and masks into")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    seconds, megapixels = dict.fromkeys(arguments.methods, 0.0), 0.0
    scores: dict[str, dict[str, np.ndarray]] = {method: {} for method in arguments.methods}
    print("situation".ljust(22), *(f"{method}: precision recall IoU".rjust(32) for method in arguments.methods))
    for situation in arguments.situations:
        rows: dict[str, list[tuple[float, float, float]]] = {method: [] for method in arguments.methods}
        for seed in arguments.seeds:
            drawn = draw_overview(situation, seed)
            megapixels += drawn.tissue.size / 1e6
            for method in arguments.methods:
                start = time.process_time()
                found = tissue_mask(drawn.overview_rgb, OVERVIEW_MPP, method)
                seconds[method] += time.process_time() - start
                rows[method].append(score(found, drawn.tissue))
                if arguments.pictures is not None and method == arguments.methods[0]:
                    save_picture(arguments.pictures / f"{situation}_{seed}.png", drawn, found)
        for method in arguments.methods:
            scores[method][situation] = np.array(rows[method])
        print(situation.ljust(22), *(table_cell(situation, scores[method][situation]) for method in arguments.methods))
    figures = {method: summarise(scores[method]) for method in arguments.methods}
    for method in arguments.methods:
        figures[method]["cpu_ms_per_megapixel"] = round(1000 * seconds[method] / megapixels, 1)
    first = arguments.methods[0]
    print(json.dumps({"method": first, "seeds": list(arguments.seeds), **figures.pop(first), **figures}))
    return 0


def score(found: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and IoU of a mask; where there is no tissue, the share that was found, three times."""
    if not truth.any():
        return (float(found.mean()),) * 3
    shared = np.count_nonzero(found & truth)
    return (
        shared / max(np.count_nonzero(found), 1),
        shared / np.count_nonzero(truth),
        shared / np.count_nonzero(found | truth),
    )


def is_empty(situation: str) -> bool:
    """Whether the overviews of a situation hold no tissue."""
    return situation.startswith("empty_")


def table_cell(situation: str, rows: np.ndarray) -> str:
    """Means over the seeds, float (seeds, 3), for the table."""
    means = rows.mean(axis=0)
    if is_empty(situation):
        return f"{means[0]:.4%} found".rjust(32)
    return "  ".join(f"{value:.3f}" for value in means).rjust(32)


def summarise(scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Figures over all situations of one method, and by situation; rows are float (seeds, 3)."""
    with_tissue = {name: rows for name, rows in scores.items() if not is_empty(name)}
    empty = [rows[:, 0].max() for name, rows in scores.items() if is_empty(name)]
    figures: dict[str, Any] = {}
    for column, name in enumerate(("precision", "recall", "iou")):
        means = [rows[:, column].mean() for rows in with_tissue.values()]
        if means:
            figures[f"{name}_mean"] = round(float(np.mean(means)), 4)
            figures[f"{name}_min"] = round(float(np.min(means)), 4)
            figures[f"{name}_worst"] = round(float(min(rows[:, column].min() for rows in with_tissue.values())), 4)
    if empty:
        figures["empty_found_max"] = round(float(max(empty)), 6)
    figures["situations"] = {
        name: round(float(rows[:, 0].mean()), 6)
        if is_empty(name)
        else dict(zip(("precision", "recall", "iou"), rows.mean(axis=0).round(4).tolist(), strict=True))
        for name, rows in scores.items()
    }
    return figures


def save_picture(path: Path, drawn: DrawnOverview, found: np.ndarray) -> None:
    """Writes an overview with the outlines of the truth (blue) and of the mask (green) over it."""
    picture = drawn.overview_rgb[..., ::-1].copy()
    for mask, colour in ((drawn.tissue, (255, 0, 0)), (found, (0, 200, 0))):
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, colour, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture)


if __name__ == "__main__":
    sys.exit(main())
