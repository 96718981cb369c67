# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl tiles`: from a folder or table of slides to a slide dataset that `datasets.load_dataset` can load.

Order of work: read the manifest, fingerprint the slides, tile each slide in a worker process into a part, merge the
parts into shards, put everything in place. A killed build goes on with the parts it has; a finished build that is
started again finds nothing to do. While parts are merged, the disk holds the tiles twice.
"""

import argparse
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from modeling_dre_slcl.atomic_files import remove_temporary, write_text
from modeling_dre_slcl.tile_grid import TileGridConfig

from .build_options import BuildOptions
from .build_records import BuildSummary, refused_lines, summarise
from .dataset_commit import PARTS_NAME, PREVIEWS_NAME, finish_dataset
from .dataset_info import DATASET_INFO_NAME, hash_json, read_dataset_info
from .dataset_reuse import restore_parts
from .dataset_writer import SlideEntry
from .folder_lock import folder_lock
from .manifest import ManifestRow, assign_splits, read_manifest
from .slide_part import PartRecord, SlideTask, find_part, refuse_slide
from .slide_tasks import fingerprint_slides, make_tasks
from .slide_worker import prepare_worker, tile_in_worker
from .worker_pool import WorkerCrash, run_in_workers

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def build_dataset(
    source: "str | Path | datasets.Dataset | Sequence[ManifestRow]",
    out_dir: str | Path,
    grid_config: TileGridConfig | None = None,
    *,
    slides_root: str | Path | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> BuildSummary:
    """Tiles slides into a slide dataset.

    Args:
        source: folder of slides, manifest file, dataset, or rows of `read_manifest`.
        out_dir (`str` or `Path`): folder of the dataset: a new one, an empty one, or one of an earlier build.
        grid_config (`TileGridConfig`, *optional*): where tiles are placed; default: 256 px at 0.5 um/px.
        slides_root (`str` or `Path`, *optional*): where relative paths of the manifest start.
        val_fraction (`float`, *optional*, defaults to 0.0): share of cases for validation; see `assign_splits`.
        test_fraction (`float`, *optional*, defaults to 0.0): share of cases for testing.
        seed (`int`, *optional*, defaults to 0): for the split.
        options: further fields of `BuildOptions`.

    Returns:
        `BuildSummary`: counts, times and `exit_code` (0 complete, 3 some slides refused, 1 none usable).

    Raises:
        ValueError: if the manifest or an option is wrong, or `out_dir` holds something else.
        BlockingIOError: if another process builds in `out_dir`.
        OSError: if the disk is full or not writable.
    """
    settings = BuildOptions(grid_config=grid_config or TileGridConfig(), **options)
    is_rows = isinstance(source, Sequence) and not isinstance(source, str)
    rows = list(source) if is_rows else read_manifest(source, slides_root=slides_root)
    rows = assign_splits(rows, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    out_dir = Path(out_dir)
    _check_out_dir(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(out_dir):
        for folder in (out_dir, out_dir / PARTS_NAME, out_dir / PREVIEWS_NAME):
            remove_temporary(folder)
        return _build(rows, out_dir, settings)


def _check_out_dir(out_dir: Path) -> None:
    is_ours = (out_dir / DATASET_INFO_NAME).is_file() or (out_dir / PARTS_NAME).is_dir()
    if out_dir.exists() and not is_ours and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir}: expected a new or empty folder, or a slide dataset of an earlier build.")


def _build(rows: Sequence[ManifestRow], out_dir: Path, options: BuildOptions) -> BuildSummary:
    start = time.perf_counter()
    found = fingerprint_slides(rows)
    fingerprints = {slide_id: value if isinstance(value, str) else None for slide_id, value in found.items()}
    build_key = _build_key(rows, fingerprints, options)
    finished = _finished_summary(out_dir, build_key)
    if finished is not None:
        return finished
    tasks, refused = make_tasks(
        rows,
        found,
        options=options,
        parts_dir=out_dir / PARTS_NAME,
        previews_dir=out_dir / PREVIEWS_NAME,
    )
    (out_dir / PARTS_NAME).mkdir(exist_ok=True)
    records = {record.slide_id: record for record in refused}
    reused = _reuse_parts(tasks, out_dir, options)
    records.update(reused)
    remaining = [task for task in tasks if task.slide_id not in reused]
    records.update(_tile_slides(remaining, num_slides=len(rows), options=options))
    entries = [SlideEntry(row, fingerprints[row.slide_id], records[row.slide_id]) for row in rows]
    summary = summarise(entries, reused=set(reused), tiling_seconds=time.perf_counter() - start)
    if summary.num_ok == 0:
        logger.error("No slide could be tiled; see %s.", out_dir / "refused.jsonl")
        write_text(out_dir / "refused.jsonl", refused_lines(entries))
        return summary
    summary = finish_dataset(entries, out_dir, options, build_key=build_key, summary=summary)
    counts = (summary.num_ok, summary.num_tiles, summary.num_refused)
    logger.info("%s: %d slides with %d tiles; %d slides refused.", out_dir, *counts)
    return summary


def _build_key(rows: Sequence[ManifestRow], fingerprints: Mapping[str, str | None], options: BuildOptions) -> str:
    """Hashes everything the dataset's files depend on."""
    slides = [[row.slide_id, row.stored_path, row.case_id, row.mpp, row.report, row.split, row.labels] for row in rows]
    texts = [options.license_name, options.stain, options.shard_bytes, options.mpp]
    return hash_json([options.parameters(), texts, slides, [fingerprints[row.slide_id] for row in rows]])


def _finished_summary(out_dir: Path, build_key: str) -> BuildSummary | None:
    """Returns the summary of the finished dataset in `out_dir` if it has the same build key."""
    try:
        info = read_dataset_info(out_dir)
    except ValueError:
        return None
    if info["build_key"] != build_key:
        return None
    logger.info("%s is up to date: nothing to do.", out_dir)
    shutil.rmtree(out_dir / PARTS_NAME, ignore_errors=True)  # left by a kill after the last rename
    return BuildSummary(**info["summary"], is_up_to_date=True)


def _reuse_parts(tasks: Sequence[SlideTask], out_dir: Path, options: BuildOptions) -> dict[str, PartRecord]:
    """Returns the records of slides that need not be read again."""
    parts_dir = out_dir / PARTS_NAME
    missing = [task for task in tasks if find_part(parts_dir, task.slide_id, task.key) is None]
    if missing and options.pixels == "encode":
        restore_parts(out_dir, missing, options.parameters())
    found = {task.slide_id: find_part(parts_dir, task.slide_id, task.key) for task in tasks}
    reused = {slide_id: record for slide_id, record in found.items() if record is not None}
    if reused:
        logger.info("%d of %d slides were tiled before and are reused.", len(reused), len(tasks))
    return reused


def _tile_slides(tasks: Sequence[SlideTask], *, num_slides: int, options: BuildOptions) -> dict[str, PartRecord]:
    """Tiles slides in workers; a worker that dies costs its slide only."""
    num_workers = options.num_workers
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    records: dict[str, PartRecord] = {}
    num_tiles = 0
    log_every = max(1, len(tasks) // 20)
    hidden = None if options.progress else True  # None: hidden unless the output is a terminal
    with tqdm(total=num_slides, initial=num_slides - len(tasks), unit="slide", disable=hidden) as bar:
        results = run_in_workers(
            tile_in_worker, tasks, num_workers=min(num_workers, len(tasks)), initializer=prepare_worker
        )
        for index, result in results:
            task = tasks[index]
            if isinstance(result, WorkerCrash):
                result = refuse_slide(
                    task, "reader_aborted", f"the process that read the slide died (exit code {result.exit_code})"
                )
            records[task.slide_id] = result
            if result.status == "refused":
                logger.warning("Slide %s is refused: %s: %s", task.slide_id, result.reason, result.message)
            num_tiles += result.num_tiles
            bar.update()
            bar.set_postfix(tiles=num_tiles, refresh=False)
            if bar.disable and len(records) % log_every == 0:
                logger.info("%d of %d slides done.", len(records), len(tasks))
    return records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dre-slcl tiles`."""
    parser.description = (
        "Cut whole-slide images into tiles and write them as a Hugging Face dataset. A stopped run goes on where it "
        "was when the same command is given again."
    )
    grid, options = TileGridConfig(), BuildOptions()
    paths = parser.add_argument_group("input and output")
    paths.add_argument(
        "--slides",
        required=True,
        metavar="DIR|TABLE",
        help="a folder of slides, or a .csv, .tsv or .parquet table with the columns slide_id, path and, if you have "
        "them, case_id, mpp, report, split and any labels",
    )
    paths.add_argument(
        "--out", required=True, metavar="DATASET", help="folder of the dataset; new, or of an earlier run"
    )
    paths.add_argument("--slides-root", metavar="DIR", help="where relative paths start (default: the table's folder)")
    tiles = parser.add_argument_group("tiles")
    tiles.add_argument("--tile-size-px", type=int, default=grid.tile_size_px, help="side of a tile (%(default)s)")
    tiles.add_argument(
        "--tile-mpp", type=float, default=grid.tile_mpp, help="um per pixel of a tile; 0.5 is called 20x (%(default)s)"
    )
    tiles.add_argument("--stride-px", type=int, help="distance between tiles (default: the tile size, no overlap)")
    tiles.add_argument(
        "--min-tissue-fraction",
        type=float,
        default=grid.min_tissue_fraction,
        help="tiles with less tissue are left out (%(default)s)",
    )
    tiles.add_argument(
        "--mask-mpp", type=float, default=grid.mask_mpp, help="um per pixel when looking for tissue (%(default)s)"
    )
    tiles.add_argument(
        "--mpp", type=float, help="um per pixel of the slides themselves, if the files say nothing or something wrong"
    )
    tiles.add_argument(
        "--pixels",
        choices=("encode", "none"),
        default=options.pixels,
        help="encode: store tiles as JPEG; none: only coordinates, training then reads the slides (%(default)s)",
    )
    tiles.add_argument("--jpeg-quality", type=int, default=options.jpeg_quality, help="1 to 100 (%(default)s)")
    splits = parser.add_argument_group("splits, by case; only if the table has no split column (default: all train)")
    splits.add_argument("--val-fraction", type=float, default=0.0, help="share of the cases for validation")
    splits.add_argument("--test-fraction", type=float, default=0.0, help="share of the cases for testing")
    splits.add_argument("--seed", type=int, default=0, help="another number draws other cases (%(default)s)")
    other = parser.add_argument_group("other")
    other.add_argument("--num-workers", type=int, help="processes that read slides (default: one per core)")
    other.add_argument("--license", default="unknown", help="licence of the images for the dataset card (%(default)s)")
    other.add_argument("--stain", default="unknown", help='stain for the dataset card, such as "H&E" (%(default)s)')


def run(args: argparse.Namespace) -> int:
    """Runs `dre-slcl tiles`; returns 0 if complete, 3 if some slides were refused, 1 if it failed."""
    try:
        grid_config = TileGridConfig(
            tile_size_px=args.tile_size_px,
            tile_mpp=args.tile_mpp,
            stride_px=args.stride_px,
            min_tissue_fraction=args.min_tissue_fraction,
            mask_mpp=args.mask_mpp,
        )
        summary = build_dataset(
            args.slides,
            args.out,
            grid_config,
            slides_root=args.slides_root,
            val_fraction=args.val_fraction,
            test_fraction=args.test_fraction,
            seed=args.seed,
            pixels=args.pixels,
            jpeg_quality=args.jpeg_quality,
            mpp=args.mpp,
            num_workers=args.num_workers,
            license_name=args.license,
            stain=args.stain,
        )
    except (ValueError, OSError, RuntimeError) as error:
        logger.error("%s", error)
        return 1
    sys.stdout.write(
        f"{args.out}: {summary.num_ok} slides, {summary.num_tiles} tiles, {summary.num_refused} refused\n"
    )
    return summary.exit_code
