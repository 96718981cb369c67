# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl tiles`: the command line of building and joining slide datasets."""

import argparse
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from modeling_dre_slcl.tile_grid import TileGridConfig
from modeling_dre_slcl.tissue import TISSUE_METHODS

from .build_dataset import build_dataset
from .build_options import MISALIGNED, PIXELS, BuildOptions
from .build_records import BuildSummary, report_text
from .disk_space import DiskFullError
from .join_datasets import join_datasets
from .manifest_shares import parse_share
from .mask_geojson import MASK_FRAMES

logger = logging.getLogger(__name__)

_USAGE, _FAILED, _DISK_FULL = 2, 1, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dre-slcl tiles`."""
    parser.description = (
        "Cut whole-slide images into tiles and write them as a Hugging Face dataset. A stopped run goes on where it "
        "was when the same command is given again; the same command on several machines with one shared --out "
        "divides the work among them."
    )
    parser.epilog = (
        "Exit status: 0 complete, 3 partial (some slides were refused), 1 failed, 2 wrong usage, 4 slides were "
        "refused under --strict, 5 disk full, 128 + n when signal n stopped it."
    )
    _add_paths(parser.add_argument_group("input and output"))
    _add_tiles(parser.add_argument_group("tiles"))
    splits = parser.add_argument_group("splits, by case; only if the table has no split column (default: all train)")
    splits.add_argument("--val-fraction", type=float, default=0.0, help="share of the cases for validation")
    splits.add_argument("--test-fraction", type=float, default=0.0, help="share of the cases for testing")
    splits.add_argument("--seed", type=int, default=0, help="another number draws other cases (%(default)s)")
    other = parser.add_argument_group("other")
    other.add_argument("--num-workers", type=int, help="processes that read slides (default: one per core)")
    other.add_argument("--strict", action="store_true", help="make no dataset if any slide is refused")
    other.add_argument("--license", default="unknown", help="licence of the images for the dataset card (%(default)s)")
    other.add_argument("--stain", default="unknown", help='stain for the dataset card, such as "H&E" (%(default)s)')
    other.add_argument("--source", default="", metavar="TEXT", help="where the slides come from, for the dataset card")


def _add_paths(paths: "argparse._ArgumentGroup") -> None:
    inputs = paths.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--slides",
        metavar="DIR|TABLE",
        help="a folder of slides, or a .csv, .tsv or .parquet table with the columns slide_id, path and, if you have "
        "them, case_id, mpp, report, split and any labels",
    )
    inputs.add_argument(
        "--join", nargs="+", metavar="DATASET", help="put the datasets of all shares (see --shard) together instead"
    )
    paths.add_argument(
        "--out", required=True, metavar="DATASET", help="folder of the dataset; new, or of an earlier run"
    )
    paths.add_argument("--slides-root", metavar="DIR", help="where relative paths start (default: the table's folder)")
    paths.add_argument(
        "--shard",
        metavar="I/N",
        help="tile only the I-th of N shares of the slides, I from 1, for machines that share no folder; --join puts "
        "the N datasets together",
    )
    paths.add_argument(
        "--hash-ids",
        nargs="?",
        const="",
        metavar="FILE",
        help="write hashes instead of the names of slides and cases; the private FILE that says which is which "
        "(default: DATASET.private.json beside the dataset) holds the key, which machines must share",
    )


def _add_tiles(tiles: "argparse._ArgumentGroup") -> None:
    grid, options = TileGridConfig(), BuildOptions()
    tiles.add_argument(
        "--tile-size", type=int, default=grid.tile_size_px, metavar="PX", help="side of a tile in pixels (%(default)s)"
    )
    tiles.add_argument(
        "--mpp", type=float, default=grid.tile_mpp, help="um per pixel of a tile; 0.5 is called 20x (%(default)s)"
    )
    tiles.add_argument(
        "--stride", type=int, metavar="PX", help="distance between tiles (default: the tile size, no overlap)"
    )
    tiles.add_argument(
        "--min-tissue",
        type=float,
        default=grid.min_tissue_fraction,
        metavar="FRACTION",
        help="tiles with less tissue are left out (%(default)s)",
    )
    tiles.add_argument(
        "--tissue",
        choices=TISSUE_METHODS,
        default=options.tissue,
        help="how tissue is found: stain leaves pen marks and the edges of glass out; otsu and hsv are as in TRIDENT "
        "and CLAM (%(default)s)",
    )
    tiles.add_argument(
        "--mask-dir",
        metavar="DIR",
        help="folder with a tissue mask for every slide, <slide_id>.geojson from QuPath or <slide_id>.png; a table "
        "can name masks in its mask column instead",
    )
    tiles.add_argument(
        "--mask-frame",
        choices=MASK_FRAMES,
        default=options.mask_frame,
        help="where positions in masks count from: the scanned area as in QuPath, or OpenSlide's canvas (%(default)s)",
    )
    tiles.add_argument(
        "--coordinates",
        metavar="DIR",
        help="take the tiles that TRIDENT, CLAM, AtlasPatch, STAMP or slide2vec laid, from its output folder",
    )
    tiles.add_argument(
        "--mask-mpp", type=float, default=grid.mask_mpp, help="um per pixel when looking for tissue (%(default)s)"
    )
    tiles.add_argument(
        "--slide-mpp",
        type=float,
        metavar="MPP",
        help="um per pixel of the slides themselves, if the files say nothing or something wrong; a table can say it "
        "per slide in its mpp column",
    )
    tiles.add_argument(
        "--pixels",
        choices=PIXELS,
        default=options.pixels,
        help="copy: take over the slides' own compressed tiles, without loss and at the speed of the disk; encode: "
        "store tiles as JPEG; none: only coordinates, training then reads the slides (%(default)s)",
    )
    tiles.add_argument(
        "--misaligned",
        choices=MISALIGNED,
        default=options.misaligned,
        help="what copy does with tiles that are not the slide's own: encode them, or refuse the slide (%(default)s)",
    )
    tiles.add_argument(
        "--jpeg-quality", type=int, default=options.jpeg_quality, help="1 to 100, of encoded tiles (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `dre-slcl tiles`; returns its exit status."""
    try:
        grid_config, options = _options(args)
        share = parse_share(args.shard) if args.shard else None
    except ValueError as error:
        logger.error("%s", error)
        return _USAGE
    try:
        with _terminates_as_exception():
            summary = _run(args, grid_config, options, share)
    except DiskFullError as error:
        logger.error("%s", error)
        return _DISK_FULL
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logger.error("%s", error)
        return _FAILED
    sys.stdout.write(report_text(summary, args.out))
    return summary.exit_code


def _options(args: argparse.Namespace) -> tuple[TileGridConfig, dict[str, Any]]:
    grid_config = TileGridConfig(
        tile_size_px=args.tile_size,
        tile_mpp=args.mpp,
        stride_px=args.stride,
        min_tissue_fraction=args.min_tissue,
        mask_mpp=args.mask_mpp,
    )
    options = {
        "pixels": args.pixels,
        "misaligned": args.misaligned,
        "jpeg_quality": args.jpeg_quality,
        "tissue": args.tissue,
        "mask_frame": args.mask_frame,
        "slide_mpp": args.slide_mpp,
        "num_workers": args.num_workers,
        "license_name": args.license,
        "stain": args.stain,
        "source_text": args.source,
        "strict": args.strict,
    }
    BuildOptions(grid_config=grid_config, **options)  # checks them
    return grid_config, options


def _run(
    args: argparse.Namespace, grid_config: TileGridConfig, options: dict[str, Any], share: tuple[int, int] | None
) -> BuildSummary:
    if args.join:
        return join_datasets(args.join, args.out)
    private_ids = args.hash_ids
    if private_ids == "":
        private_ids = f"{args.out.rstrip('/')}.private.json"
    return build_dataset(
        args.slides,
        args.out,
        grid_config,
        slides_root=args.slides_root,
        val_fraction=args.val_fraction,
        test_fraction=args.test_fraction,
        seed=args.seed,
        share=share,
        private_ids=private_ids,
        mask_dir=args.mask_dir,
        coordinates=args.coordinates,
        **options,
    )


@contextmanager
def _terminates_as_exception() -> Iterator[None]:
    """Lets SIGTERM, which schedulers send, end the run in order: workers stop, claims are given back, status 143."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
