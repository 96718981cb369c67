# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl export`: a slide dataset in the layout of another tool."""

import argparse
import logging
import sys

from .trident_export import export_trident

logger = logging.getLogger(__name__)

_WRITERS = {"trident": export_trident}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dre-slcl export`."""
    parser.description = (
        "Write the tiles of a slide dataset in the layout of another tool, which can then compute features for them. "
        "Exit status: 0 all slides, 3 some cannot be exported or listed, 1 failed."
    )
    parser.add_argument("--dataset", required=True, metavar="DATASET", help="folder of a slide dataset")
    parser.add_argument("--format", choices=sorted(_WRITERS), default="trident", help="the layout (%(default)s)")
    parser.add_argument("--out", required=True, metavar="JOBDIR", help="folder to write to; TRIDENT's --job_dir")


def run(args: argparse.Namespace) -> int:
    """Runs `dre-slcl export`; returns 0 if complete, 3 if some slides were refused, 1 if it failed."""
    try:
        summary = _WRITERS[args.format](args.dataset, args.out)
    except (ValueError, OSError, ImportError) as error:
        logger.error("%s", error)
        return 1
    for error in summary.refused:
        logger.warning("Slide %r is refused: %s: %s", error.slide_id, error.reason, error.message)
    if summary.num_without_tiles:
        logger.info("%d slides have no tiles in the dataset and are left out.", summary.num_without_tiles)
    sys.stdout.write(
        f"{args.out}: {summary.num_slides} slides, {summary.num_tiles} tiles, {len(summary.refused)} refused\n"
    )
    return 3 if summary.refused else 0
