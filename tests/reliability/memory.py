# SPDX-License-Identifier: Apache-2.0
"""M1 and M2: the memory of a build does not depend on the size of its slides, nor on how many there are.

M1: a slide of 10,000 x 10,000 px and one of 200,000 x 200,000 px, both with the same tissue, each in a fresh worker:
at most 1.5 GB. M2: one worker tiles many slides; after the twentieth neither its memory nor its open files may grow,
and the building process is left with as many open files and children as before.
"""

import multiprocessing

from modeling_dre_slcl.tile_grid import TileGridConfig

from .campaign import build, check, run_campaign, watched_workers
from .huge_slide import write_huge_slide
from .memory_worker import num_open_files, tile_and_measure
from .seed_slides import paint, write_tiff

MAX_MB = 1536
MAX_GROWTH = 0.01
WARM_SLIDES = 20
SIDES = (10_000, 200_000)


def build_measured(source, out, **options):
    """Builds with one worker; returns the summary and what `tile_and_measure` noted, slide by slide."""
    with watched_workers(function=tile_and_measure, deadline_seconds=None) as records:
        summary = build(source, out, num_workers=1, **options)
    return summary, [record.seconds for record in records]


def huge_slides(root, problems):
    """M1; returns the peak of each size in MB."""
    peaks = {}
    for side in SIDES:
        folder = root / f"{side}"
        folder.mkdir(parents=True)
        write_huge_slide(folder / "slide.svs", side, num_tissue=16)
        grid = TileGridConfig(tile_size_px=256, tile_mpp=0.5, mask_mpp=8.0)
        summary, found = build_measured(folder, root / f"out-{side}", grid_config=grid)
        check(problems, summary.num_ok == 1 and summary.num_tiles > 50, f"{side} px: {summary}")
        peaks[side] = round(found[0]["peak_mb"])
        check(problems, 0 < peaks[side] <= MAX_MB, f"{side} px: {peaks[side]} MB")
        print(f"{side} px: {summary.num_tiles} tiles, at most {peaks[side]} MB, {summary.seconds}", flush=True)
    return peaks


def many_slides(root, count, problems):
    """M2; returns the growth of memory and of open files after the twentieth slide."""
    root.mkdir()
    for i in range(count):
        write_tiff(root / f"s{i:04d}.tif", paint(i, 256))
    before = num_open_files()
    summary, found = build_measured(root, root.with_name("out-many"))
    check(problems, summary.num_ok == count, f"many: {summary}")
    warm, last = found[WARM_SLIDES], found[-1]
    growth = max(entry["now_mb"] for entry in found[-10:]) / max(entry["now_mb"] for entry in found[:WARM_SLIDES]) - 1
    check(problems, growth <= MAX_GROWTH, f"memory grows by {growth:.1%}")
    check(problems, last["open_files"] <= warm["open_files"], f"open files: {warm} -> {last}")
    check(problems, not multiprocessing.active_children(), "children are left")
    after = num_open_files()
    check(problems, after <= before, f"open files here: {before} -> {after}")
    return round(100 * growth, 2), last["open_files"] - warm["open_files"]


def campaign(root, count, seed):
    if count <= WARM_SLIDES:
        raise SystemExit(f"--count {count}: give more than {WARM_SLIDES}, after which growth is looked at")
    problems = []
    peaks = huge_slides(root, problems)
    growth, open_files = many_slides(root / "many", count, problems)
    figures = {"cases": len(peaks) + count, "faults": len(problems)}
    figures |= {f"peak_mb_{side}_px": peak for side, peak in peaks.items()}
    return figures | {"growth_percent": growth, "more_open_files": open_files}


if __name__ == "__main__":
    run_campaign(campaign, count=200, doc=__doc__)
