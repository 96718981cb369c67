# SPDX-License-Identifier: Apache-2.0
"""Writes a finished slide dataset beside the old one and puts it in its place.

Everything is first written to a staging folder. During the exchange `dre_slcl_dataset.json` is absent, so old and new
files are never taken for one dataset; a crash in between is mended by the next build from the parts. Files are
exchanged one by one, each by a rename, and nothing of the new dataset is ever removed: so a process that was thought
dead, and comes back in the midst of it after another has finished, puts equal files in place of equal files.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_dre_slcl.atomic_files import read_json, sync_path, sync_tree, temporary_path, write_json, write_text

from .build_options import BuildOptions
from .build_records import BuildSummary, refused_lines, summary_text, versions
from .contact_sheet import SheetEntry, write_contact_sheet
from .dataset_card import write_card
from .dataset_info import DATASET_INFO_NAME, check_files, write_dataset_info
from .dataset_writer import SlideEntry, count_tiles, link_or_copy, write_tables
from .slide_pictures import PICTURE_SUFFIXES, picture_names
from .slide_tasks import guide_content

PARTS_NAME = ".parts"
_TABLE_FOLDERS = ("slides", "tiles")
# Folder of the dataset -> suffix of the files in it that belong to a build.
OWN_SUFFIXES = dict.fromkeys(_TABLE_FOLDERS, ".parquet") | PICTURE_SUFFIXES


def finish_dataset(
    entries: Sequence[SlideEntry],
    out_dir: Path,
    options: BuildOptions,
    *,
    build_key: str,
    summary: BuildSummary,
    extra_info: Mapping[str, Any],
) -> BuildSummary:
    """Writes the dataset, puts it in place, and removes the parts.

    ```
    out_dir/
      README.md              dataset card
      slides/, tiles/        Parquet shards per split (tiles only with pixels)
      thumbnails/<id>.jpg    the slide
      previews/<id>.jpg      tissue and grid over the slide
      previews/contact_sheet.jpg  all slides at a glance
      masks/<id>.geojson     the tissue, for QuPath
      refused.jsonl          one line per refused slide
      summary.json, .md      counts and times
      dre_slcl_dataset.json  written last: geometry, build key, sizes of the shards
    ```

    Args:
        entries (`Sequence[SlideEntry]`): all slides in the order of the manifest.
        out_dir (`Path`): folder of the dataset.
        options (`BuildOptions`): how the slides were tiled.
        build_key (`str`): hash of everything the dataset depends on.
        summary (`BuildSummary`): counts so far.
        extra_info (`Mapping[str, Any]`): more for the dataset's info file.

    Returns:
        `BuildSummary`: with the time of merging.

    Raises:
        ValueError: if a folder of the dataset holds files that no build has written.
    """
    start = time.perf_counter(), time.process_time()
    staging = temporary_path(out_dir / "staging")
    staging.mkdir()
    files = write_tables(
        staging,
        entries,
        grid_config=options.grid_config,
        has_pixels=options.pixels != "none",
        shard_bytes=options.shard_bytes,
    )
    stage_pictures(staging, entries)
    seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    summary = summary.with_merge(seconds, cpu_seconds)
    title = out_dir.resolve().name
    _write_texts(staging, entries, files, title=title, build_key=build_key, options=options, summary=summary)
    commit_dataset(staging, out_dir, build_key=build_key)
    guides = {entry.row.slide_id: guide_content(entry.row) for entry in entries if entry.row.guide is not None}
    given_mpp = {entry.row.slide_id: options.mpp_of(entry.row.mpp) for entry in entries}
    content = {
        "geometry": options.geometry(),
        "parameters": options.parameters(),
        "options": options.to_dict(),
        "given_mpp": {slide_id: mpp for slide_id, mpp in given_mpp.items() if mpp is not None},
        "guides": guides,
        "build_key": build_key,
        "num_tiles": dict(count_tiles(entries)),
        "summary": summary.to_dict(),
        "versions": versions(),
        **extra_info,
    }
    write_dataset_info(out_dir, content=content, files=files)
    # The parts go last: by them the next build sees that a kill has left something behind. Another member of the same
    # build may still be there for a moment, and write.
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(out_dir / PARTS_NAME, ignore_errors=True)
    return summary


def stage_pictures(staging: Path, entries: Sequence[SlideEntry]) -> None:
    """Gives the pictures of all slides a second name in the staging folder, and draws them all on contact sheets."""
    for folder in PICTURE_SUFFIXES:
        (staging / folder).mkdir()
    for entry in entries:
        if entry.pictures_dir is not None:
            for name in picture_names(entry.row.slide_id, has_mask=entry.record.tissue_fraction is not None):
                link_or_copy(entry.pictures_dir / name, staging / name)
    write_contact_sheet([_sheet_entry(entry, staging) for entry in entries], staging / "previews")


def _sheet_entry(entry: SlideEntry, staging: Path) -> SheetEntry:
    slide_id, record = entry.row.slide_id, entry.record
    picture = staging / "previews" / f"{slide_id}.jpg" if record.status == "ok" else None
    return SheetEntry(slide_id, picture, record.num_tiles, record.tissue_fraction, record.reason)


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
    sheets = [path.relative_to(staging).as_posix() for path in (staging / "previews").glob("contact_sheet*.jpg")]
    card = write_card(
        entries,
        [*files, *sheets],
        title=title,
        grid_config=options.grid_config,
        jpeg_quality=None if options.pixels == "none" else options.jpeg_quality,
        license_name=options.license_name,
        stain=options.stain,
        source_text=options.source_text,
        pixels=options.pixels,
        num_copied=summary.num_copied,
        build_key=build_key,
        folder=staging,
    )
    content = {**summary.to_dict(), "parameters": options.parameters(), "versions": versions()}
    write_text(staging / "README.md", card)
    write_text(staging / "refused.jsonl", refused_lines(entries))
    write_json(staging / "summary.json", content)
    write_text(staging / "summary.md", summary_text(content))


def commit_dataset(staging: Path, out_dir: Path, *, build_key: str) -> None:
    """Puts the staged files in place of the old ones and deletes those that are left; the info file goes first.

    A crash in between leaves a folder without `dre_slcl_dataset.json`, which no reader takes for a dataset and which
    the next build completes from the parts.
    """
    for folder in _TABLE_FOLDERS:
        _check_own(out_dir / folder)
    sync_tree(staging)
    if not _set_info_aside(staging, out_dir, build_key):
        return
    staged = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != DATASET_INFO_NAME)
    for path in staged:
        target = out_dir / path.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    names = {path.relative_to(staging).as_posix() for path in staged}
    for folder, suffix in OWN_SUFFIXES.items():
        for path in (out_dir / folder).glob(f"*{suffix}"):
            if f"{folder}/{path.name}" not in names:
                path.unlink(missing_ok=True)
        if (out_dir / folder).is_dir():
            if not any((out_dir / folder).iterdir()):
                (out_dir / folder).rmdir()
            else:
                sync_path(out_dir / folder)
    sync_path(out_dir)


def _set_info_aside(staging: Path, out_dir: Path, build_key: str) -> bool:
    """Moves the old info file away; if it turns out to be that of this very build, puts it back and returns False."""
    try:
        (out_dir / DATASET_INFO_NAME).replace(staging / DATASET_INFO_NAME)
    except FileNotFoundError:
        return True
    try:
        found = read_json(staging / DATASET_INFO_NAME)
        check_files(found, out_dir)
        is_finished = found["build_key"] == build_key
    except (ValueError, KeyError, TypeError):
        is_finished = False
    if is_finished:
        (staging / DATASET_INFO_NAME).replace(out_dir / DATASET_INFO_NAME)
        return False
    sync_path(out_dir)
    return True


def _check_own(folder: Path) -> None:
    """Refuses a folder that holds anything but Parquet files, so that no stranger's files get among ours."""
    foreign = [path.name for path in folder.iterdir() if path.suffix != ".parquet"] if folder.is_dir() else []
    if foreign:
        raise ValueError(f"{folder}: holds {foreign[:5]}, which no build has written; move them away.")
