# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl import-features`: tile features that another tool computed -> a dataset that `load_dataset` loads.

```
<out>/
    README.md                        dataset card
    features/<split>-00000.parquet   a row per slide; see `feature_dataset`
    refused.jsonl                    slides whose features cannot be used, with reason codes
    dre_slcl_features.json           written last: encoder, width, counts, sizes of the files
```
"""

import argparse
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from modeling_dre_slcl.atomic_files import (
    remove_temporary,
    sync_path,
    sync_tree,
    temporary_path,
    write_json,
    write_text,
)

from .dataset_info import FORMAT_VERSION
from .feature_dataset import FeatureSlides, refused_lines
from .folder_lock import folder_lock
from .manifest import ManifestRow, assign_splits, read_manifest

logger = logging.getLogger(__name__)

FEATURES_INFO_NAME = "dre_slcl_features.json"
_SHARD_BYTES = 500 << 20
_ENTRIES = ("features", "README.md", "refused.jsonl", FEATURES_INFO_NAME)


def import_features(
    folder: str | Path,
    out_dir: str | Path,
    *,
    encoder: str | None = None,
    width: int | None = None,
    manifest: list[ManifestRow] | None = None,
    license_name: str = "unknown",
    isolated: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the tile features of a folder as a dataset.

    Args:
        folder (`str` or `Path`): features of TRIDENT, CLAM, AtlasPatch, STAMP or slide2vec.
        out_dir (`str` or `Path`): a new or empty folder, or one of an earlier import, which is replaced.
        encoder (`str`, *optional*), width (`int`, *optional*): which features; see `open_feature_folder`.
        manifest (`list[ManifestRow]`, *optional*): the slides wanted, with case, split, report, labels and mpp.
        license_name (`str`, *optional*, defaults to `"unknown"`): licence of the features for the card.
        isolated (`bool`, *optional*, defaults to `True`): read in another process; see `open_feature_folder`.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar if the output is a terminal.

    Returns:
        `dict`: the content of `dre_slcl_features.json`.

    Raises:
        ValueError: see `open_feature_folder`, if no slide can be used, or if `out_dir` holds something else.
        BlockingIOError: if another process writes to `out_dir`.
        OSError: if the disk is full or not writable.
    """
    out_dir = Path(out_dir)
    is_ours = (out_dir / FEATURES_INFO_NAME).is_file()
    if out_dir.exists() and not is_ours and (not out_dir.is_dir() or _visible(out_dir)):
        raise ValueError(f"{out_dir}: expected a new or empty folder, or a dataset of an earlier import.")
    slides = FeatureSlides(folder, encoder=encoder, width=width, manifest=manifest, isolated=isolated)
    out_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(out_dir):
        remove_temporary(out_dir)
        staging = temporary_path(out_dir / "staging")
        try:
            staging.mkdir()
            info = _write_dataset(slides, staging, out_dir.resolve().name, license_name, progress=progress)
            _commit(staging, out_dir)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return info


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".tmp-")]


def _write_dataset(
    slides: FeatureSlides, staging: Path, title: str, license_name: str, *, progress: bool
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    formats: set[str] = set()
    with ExitStack() as stack:
        shards: dict[str, _Shards] = {}
        for table in slides.iter_tables(progress=progress):
            split = table["split"][0].as_py()
            if split not in shards:
                shards[split] = stack.enter_context(_Shards(staging / "features", split, slides.schema))
            shards[split].write(table)
            counts[split] += 1
            formats.add(table["source_format"][0].as_py())
    slides.require_some()
    files = sorted((staging / "features").iterdir())
    info = {
        "format_version": FORMAT_VERSION,
        "encoder": slides.folder.encoder,
        "width": slides.folder.width,
        "source_formats": sorted(formats),
        "num_slides": slides.num_slides,
        "num_tiles": slides.num_tiles,
        "slides_per_split": dict(sorted(counts.items())),
        "refused_by_reason": dict(sorted(Counter(error.reason for error in slides.refused).items())),
        "files": {f"features/{path.name}": path.stat().st_size for path in files},
    }
    write_text(staging / "README.md", write_features_card(info, title=title, license_name=license_name))
    write_text(staging / "refused.jsonl", refused_lines(slides.refused))
    write_json(staging / FEATURES_INFO_NAME, info)
    for error in slides.refused:
        logger.warning("Slide %r is refused: %s: %s", error.slide_id, error.reason, error.message)
    return info


class _Shards:
    """The Parquet files of one split; a new one begins when a file is large enough."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._split, self._schema = folder, split, schema
        self._writer: pq.ParquetWriter | None = None
        self._num_files = self._num_bytes = 0

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, table: pa.Table) -> None:
        """Writes the row of one slide as a row group."""
        if self._writer is None:
            path = self._folder / f"{self._split}-{self._num_files:05d}.parquet"
            # Features hardly repeat: a dictionary would only cost memory.
            self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=False)
            self._num_files += 1
        self._writer.write_table(table)
        self._num_bytes += table.nbytes
        if self._num_bytes >= _SHARD_BYTES:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._num_bytes = None, 0


def write_features_card(info: Mapping[str, Any], *, title: str, license_name: str) -> str:
    """Returns the dataset card.

    Args:
        info (`Mapping[str, Any]`): the content of `dre_slcl_features.json`.
        title (`str`): heading.
        license_name (`str`): licence identifier of the Hub.
    """
    data_files = [{"split": split, "path": f"features/{split}-*.parquet"} for split in info["slides_per_split"]]
    header = {
        "license": license_name,
        "pretty_name": title,
        "tags": ["pathology", "whole-slide-image", "dre-slcl", "tile-features"],
        "configs": [{"config_name": "features", "data_files": data_files, "default": True}],
    }
    encoder = info["encoder"] or "unknown"
    rows = [
        ("tile encoder", encoder),
        ("width of a tile feature", info["width"]),
        ("computed with", ", ".join(info["source_formats"])),
        ("slides", ", ".join(f"{split}: {count}" for split, count in info["slides_per_split"].items())),
        ("tiles", info["num_tiles"]),
        ("refused slides", sum(info["refused_by_reason"].values())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{front}---\n\n# {title}\n\nTile features of whole-slide images, taken over by "
        "`dre-slcl import-features`. The licence of the encoder may restrict their use.\n\n"
        f"| | value |\n| --- | --- |\n{table}\n\n"
        '```python\nfrom datasets import load_dataset\n\nslides = load_dataset("path/or/repository")\n```\n\n'
        "There is one row per slide. `tile_features` has one row per tile; `tile_xy` holds the tiles' top-left "
        "corners in level-0 pixels in the same order, and is missing where the tool did not store them.\n"
    )


def _commit(staging: Path, out_dir: Path) -> None:
    """Puts the staged files in place of the old ones.

    Without the info file, which goes first and comes last, a folder is not a finished dataset.
    """
    sync_tree(staging)
    (out_dir / FEATURES_INFO_NAME).unlink(missing_ok=True)
    sync_path(out_dir)
    shutil.rmtree(out_dir / "features", ignore_errors=True)
    for name in _ENTRIES:
        (staging / name).replace(out_dir / name)
    sync_path(out_dir)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dre-slcl import-features`."""
    parser.description = (
        "Take over tile features that TRIDENT, CLAM, AtlasPatch, STAMP or slide2vec computed, as a Hugging Face "
        "dataset with one row per slide. Exit status: 0 all slides, 3 some refused (see refused.jsonl), 1 failed."
    )
    parser.add_argument("--from", required=True, dest="source", metavar="DIR", help="the tool's folder of features")
    parser.add_argument(
        "--out", required=True, metavar="DATASET", help="folder of the dataset; new, or of an earlier run"
    )
    parser.add_argument("--encoder", help="take this tile encoder's features, if the folder holds several")
    parser.add_argument("--width", type=int, help="take features of this width, if the folder holds several")
    parser.add_argument(
        "--slides",
        metavar="TABLE",
        help="a table of slides as for `dre-slcl tiles`: takes these slides only, with their cases, splits, reports, "
        "labels and mpp (which STAMP's coordinates need)",
    )
    parser.add_argument("--slides-root", metavar="DIR", help="where relative paths of the table start")
    parser.add_argument("--license", default="unknown", help="licence of the features for the card (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs `dre-slcl import-features`; returns 0 if complete, 3 if some slides were refused, 1 if it failed."""
    try:
        manifest = None
        if args.slides is not None:
            manifest = assign_splits(read_manifest(args.slides, slides_root=args.slides_root))
        info = import_features(
            args.source,
            args.out,
            encoder=args.encoder,
            width=args.width,
            manifest=manifest,
            license_name=args.license,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        logger.error("%s", error)
        return 1
    num_refused = sum(info["refused_by_reason"].values())
    sys.stdout.write(f"{args.out}: {info['num_slides']} slides, {info['num_tiles']} tiles, {num_refused} refused\n")
    return 3 if num_refused else 0
