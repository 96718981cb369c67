# SPDX-License-Identifier: Apache-2.0
"""The command line of `dre-slcl embed`."""

import argparse
from pathlib import Path

from .build_tiling import DEADLINE_SECONDS
from .embed_files import FORMATS


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Embeds slides with a trained model. Slides that were embedded before are skipped, so an interrupted run goes "
        "on when it is started again. On several devices: `accelerate launch -m dre_slcl.training.embed_slides`."
    )
    parser.epilog = (
        "Exit status: 0 all embedded, 3 some refused (see refused.jsonl), 4 some refused under --strict, 1 none "
        "embedded or failed, 5 disk full."
    )
    _add_paths(parser.add_argument_group("input and output"))
    _add_slides(parser.add_argument_group("slides"))
    part = parser.add_argument_group("encoding a part of the tiles")
    part.add_argument(
        "--tolerance",
        type=float,
        metavar="ERROR",
        help="encode tiles, drawn evenly over the slide, until 1 - cosine to the embedding of all of them is below "
        "this in about 95%% of draws, such as 0.005 (default: encode all tiles)",
    )
    part.add_argument("--max-tiles", type=int, metavar="N", help="most tiles of a slide that are encoded")
    part.add_argument("--seed", type=int, default=0, help="another number draws other tiles (default: %(default)s)")
    work = parser.add_argument_group("work")
    work.add_argument("--batch-size", type=int, default=32, help="tiles encoded at once (default: %(default)s)")
    work.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="processes that read slides (default: one per core but one); 0 reads in this process, where a file that "
        "crashes a library ends the run",
    )
    work.add_argument(
        "--slide-timeout",
        type=float,
        default=DEADLINE_SECONDS,
        metavar="SECONDS",
        help="a slide of which no tile was read for so long is refused (default: %(default)g)",
    )
    work.add_argument("--strict", action="store_true", help="exit with status 4 if any slide was refused")
    work.add_argument("--device", help="for example cpu or cuda:0 (default: the first accelerator)")


def _add_paths(paths: "argparse._ArgumentGroup") -> None:
    inputs = paths.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--slides", type=Path, help="a slide, a folder of slides, or a manifest")
    inputs.add_argument(
        "--join", nargs="+", type=Path, metavar="OUT", help="put the folders of all shares (see --shard) together"
    )
    paths.add_argument("--model", help="folder or Hub repository of a DRE-SLCL model (not for --join)")
    paths.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    paths.add_argument("--out", required=True, type=Path, help="folder for the embeddings")
    paths.add_argument("--slides-root", type=Path, help="folder that a manifest's paths start from (default: its own)")
    paths.add_argument(
        "--shard", metavar="I/N", help="embed only the I-th of N shares of the slides, I from 1; --join joins them"
    )
    paths.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0], help="of the files of slides (default: %(default)s)"
    )
    paths.add_argument("--tile-features", action="store_true", help="also store each tile's feature and place")
    paths.add_argument(
        "--trident", type=Path, metavar="JOB_DIR", help="also write embeddings in TRIDENT's layout, to this folder"
    )


def _add_slides(slides: "argparse._ArgumentGroup") -> None:
    slides.add_argument("--mpp", type=float, help="level-0 resolution in um/px, for slides that do not state it")
    slides.add_argument(
        "--min-tissue-fraction", type=float, default=0.25, help="tiles with less are left out (default: %(default)s)"
    )
