# SPDX-License-Identifier: Apache-2.0
"""Writes a finished slide dataset beside the old one and puts it in its place.

Everything is first written to a staging folder. During the exchange `dre_slcl_dataset.json` is absent, so old and new
files are never taken for one dataset; a crash in between is mended by the next build from the parts.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from modeling_dre_slcl.atomic_files import sync_path, sync_tree, temporary_path, write_json, write_text

from .build_options import BuildOptions
from .build_records import BuildSummary, refused_lines, versions
from .dataset_card import write_card, write_summary_text
from .dataset_info import DATASET_INFO_NAME, write_dataset_info
from .dataset_writer import SlideEntry, count_tiles, write_tables

PARTS_NAME = ".parts"
PREVIEWS_NAME = "previews"
_REPLACED_ENTRIES = ("slides", "tiles", "README.md", "refused.jsonl", "summary.json", "summary.md")


def finish_dataset(
    entries: Sequence[SlideEntry], out_dir: Path, options: BuildOptions, *, build_key: str, summary: BuildSummary
) -> BuildSummary:
    """Merges the parts, puts the dataset in place, and removes the parts.

    ```
    out_dir/
      README.md              dataset card
      slides/, tiles/        Parquet shards per split (tiles only with pixels)
      previews/<id>.jpg      the grid over the slide
      refused.jsonl          one line per refused slide
      summary.json, .md      counts and times
      dre_slcl_dataset.json  written last: geometry, build key, sizes of the shards
    ```

    Args:
        entries (`Sequence[SlideEntry]`): all slides in the order of the manifest.
        out_dir (`Path`): folder of the dataset, with the parts in `.parts`.
        options (`BuildOptions`): how the slides were tiled.
        build_key (`str`): hash of everything the dataset depends on.
        summary (`BuildSummary`): counts so far.

    Returns:
        `BuildSummary`: with the time of merging.
    """
    start = time.perf_counter()
    staging = temporary_path(out_dir / "staging")
    staging.mkdir()
    files = write_tables(
        staging,
        entries,
        parts_dir=out_dir / PARTS_NAME,
        grid_config=options.grid_config,
        has_pixels=options.stored_quality is not None,
        shard_bytes=options.shard_bytes,
    )
    seconds = time.perf_counter() - start
    summary = summary.with_seconds(merge=seconds, total=summary.seconds["tiling"] + seconds)
    title = out_dir.resolve().name
    _write_texts(staging, entries, files, title=title, build_key=build_key, options=options, summary=summary)
    commit_dataset(staging, out_dir)
    remove_stale_previews(out_dir / PREVIEWS_NAME, entries)
    given_mpp = {entry.row.slide_id: options.mpp_of(entry.row.mpp) for entry in entries}
    content = {
        "geometry": options.geometry(),
        "parameters": options.parameters(),
        "given_mpp": {slide_id: mpp for slide_id, mpp in given_mpp.items() if mpp is not None},
        "build_key": build_key,
        "num_tiles": dict(count_tiles(entries)),
        "summary": summary.to_dict(),
        "versions": versions(),
    }
    write_dataset_info(out_dir, content=content, files=files)
    shutil.rmtree(out_dir / PARTS_NAME)
    shutil.rmtree(staging)
    return summary


def _write_texts(
    staging: Path,
    entries: Sequence[SlideEntry],
    files: Sequence[str],
    *,
    title: str,
    build_key: str,
    options: BuildOptions,
    summary: BuildSummary,
) -> None:
    card = write_card(
        entries,
        files,
        title=title,
        grid_config=options.grid_config,
        jpeg_quality=options.stored_quality,
        license_name=options.license_name,
        stain=options.stain,
        pixels=options.pixels,
        build_key=build_key,
        folder=staging,
    )
    content = {**summary.to_dict(), "parameters": options.parameters(), "versions": versions()}
    write_text(staging / "README.md", card)
    write_text(staging / "refused.jsonl", refused_lines(entries))
    write_json(staging / "summary.json", content)
    write_text(staging / "summary.md", write_summary_text(content))


def commit_dataset(staging: Path, out_dir: Path) -> None:
    """Puts the staged files in place of the old ones and deletes the old ones; the info file is removed first.

    A crash in between leaves a folder without `dre_slcl_dataset.json`, which no reader takes for a dataset and which
    the next build completes from the parts.
    """
    sync_tree(staging)
    (out_dir / DATASET_INFO_NAME).unlink(missing_ok=True)
    sync_path(out_dir)
    for name in _REPLACED_ENTRIES:
        _remove(out_dir / name)
    for name in _REPLACED_ENTRIES:
        if (staging / name).exists():
            (staging / name).replace(out_dir / name)
    sync_path(out_dir)


def _remove(path: Path) -> None:
    """Removes a file, or a folder that holds nothing but Parquet files, so that no stranger's folder is lost."""
    if path.is_dir() and not path.is_symlink():
        foreign = [entry.name for entry in path.iterdir() if entry.suffix != ".parquet"]
        if foreign:
            raise ValueError(f"{path}: holds {foreign[:5]}, which no build has written; move them away.")
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_stale_previews(previews_dir: Path, entries: Sequence[SlideEntry]) -> None:
    """Removes previews of slides that are not part of the dataset (any more)."""
    wanted = {f"{entry.row.slide_id}.jpg" for entry in entries if entry.record.status == "ok"}
    for path in previews_dir.glob("*.jpg"):
        if path.name not in wanted:
            path.unlink()
