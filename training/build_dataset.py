# SPDX-License-Identifier: Apache-2.0
"""From a folder or table of slides to a slide dataset that `datasets.load_dataset` can load.

Order of work: read the manifest, fingerprint the slides, tile each slide in a worker process into a part, merge the
parts into shards, put everything in place. A killed build goes on with the parts it has; a finished build that is
started again finds nothing to do; several processes that build the same into one folder share the work. While parts
are merged, the disk holds the tiles twice, but for slides that fill a shard.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_dre_slcl.atomic_files import TEMPORARY_PREFIX, remove_temporary, write_text
from modeling_dre_slcl.slide_info import SlideError
from modeling_dre_slcl.tile_grid import TileGridConfig

from .build_options import BuildOptions
from .build_progress import BuildProgress
from .build_records import BuildSummary, refused_lines, summarise
from .build_tiling import POLL_SECONDS, tile_slides
from .dataset_commit import OWN_SUFFIXES, PARTS_NAME, finish_dataset
from .dataset_info import DATASET_INFO_NAME, hash_json, read_dataset_info
from .dataset_reuse import restore_parts
from .dataset_writer import SlideEntry
from .disk_space import disk_full_error, is_disk_full
from .manifest import ManifestRow, assign_splits, read_manifest
from .manifest_shares import divide_manifest, share_info
from .parquet_join import slice_table
from .private_ids import hide_ids
from .slide_claims import BuildMember, release_claim, take_claim
from .slide_part import PartRecord, SlideTask, find_part, forget_refusal, table_path
from .slide_tasks import fingerprint_slides, guide_content, make_tasks
from .tile_guides import add_guides

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_FINISH = ".finish"  # the claim to merge; no slide can have this name


def build_dataset(
    source: "str | Path | datasets.Dataset | Sequence[ManifestRow]",
    out_dir: str | Path,
    grid_config: TileGridConfig | None = None,
    *,
    slides_root: str | Path | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    share: tuple[int, int] | None = None,
    private_ids: str | Path | None = None,
    mask_dir: str | Path | None = None,
    coordinates: str | Path | None = None,
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
        share (`tuple[int, int]`, *optional*): (i, n) tiles the i-th of n shares of the manifest, i from 1; the n
            datasets are put together by `join_datasets`.
        private_ids (`str` or `Path`, *optional*): hash the names of slides and cases, and keep the key and what
            belongs to what in this file; see `hide_ids`.
        mask_dir (`str` or `Path`, *optional*): folder with a tissue mask for every slide, named after it; see
            `read_mask`. Masks in the manifest go before these.
        coordinates (`str` or `Path`, *optional*): output folder of TRIDENT, CLAM, AtlasPatch, STAMP or slide2vec;
            the tiles are those that it laid, see `read_coordinates`.
        options: further fields of `BuildOptions`.

    Returns:
        `BuildSummary`: counts, times and `exit_code`.

    Raises:
        ValueError: if the manifest or an option is wrong, or `out_dir` holds something else.
        BlockingIOError: if another process builds something else in `out_dir`.
        DiskFullError: if the disk is full.
        OSError: if the disk is not writable.
    """
    start = time.perf_counter()
    settings = BuildOptions(grid_config=grid_config or TileGridConfig(), **options)
    is_rows = isinstance(source, Sequence) and not isinstance(source, str)
    rows = list(source) if is_rows else read_manifest(source, slides_root=slides_root)
    rows = assign_splits(rows, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    out_dir = Path(out_dir)
    check_out_dir(out_dir)
    rows = add_guides(rows, mask_dir=mask_dir, coordinates=coordinates)
    if private_ids is not None:
        rows = hide_ids(rows, Path(private_ids), out_dir=out_dir)
    info: dict[str, Any] = {}
    if share is not None:
        positions = divide_manifest(rows, share[1])[share[0] - 1]
        if not positions:
            raise ValueError(f"share {share[0]} of {share[1]} is empty: the manifest has only {len(rows)} slides.")
        info = {"share": share_info(rows, positions, *share)}
        rows = [rows[position] for position in positions]
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        return _build(_Plan(rows, fingerprint_slides(rows), out_dir, settings, info), start)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise disk_full_error(out_dir, _bytes_to_come(out_dir, len(rows))) from error


def check_out_dir(out_dir: Path) -> None:
    """Refuses to write a dataset into a folder of something else.

    Raises:
        ValueError: if the folder is not new, empty, or of an earlier build, or a folder in it is a link.
    """
    is_ours = (out_dir / DATASET_INFO_NAME).is_file() or (out_dir / PARTS_NAME).is_dir()
    if out_dir.exists() and not is_ours and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir}: expected a new or empty folder, or a slide dataset of an earlier build.")
    links = [name for name in (PARTS_NAME, *OWN_SUFFIXES) if (out_dir / name).is_symlink()]
    if links:
        raise ValueError(f"{out_dir}: {', '.join(links)} must be folders, not links to somewhere else.")


@dataclass(frozen=True)
class _Plan:
    """One build: what goes in (slides in the order of the manifest, their fingerprints or why there is none)."""

    rows: Sequence[ManifestRow]
    found: Mapping[str, str | SlideError]
    out_dir: Path
    options: BuildOptions
    extra_info: Mapping[str, Any]

    @property
    def parts_dir(self) -> Path:
        return self.out_dir / PARTS_NAME

    @property
    def fingerprints(self) -> dict[str, str | None]:
        return {slide_id: value if isinstance(value, str) else None for slide_id, value in self.found.items()}

    @cached_property
    def key(self) -> str:
        return hash_build(self.rows, self.fingerprints, self.options, self.extra_info)


def hash_build(
    rows: Sequence[ManifestRow],
    fingerprints: Mapping[str, str | None],
    options: BuildOptions,
    extra_info: Mapping[str, Any],
) -> str:
    """Hashes everything a dataset's files depend on.

    Args:
        rows (`Sequence[ManifestRow]`): its slides in the order of the manifest.
        fingerprints (`Mapping[str, str | None]`): fingerprint of each slide, `None` if its file cannot be read.
        options (`BuildOptions`): how they are tiled.
        extra_info (`Mapping[str, Any]`): what is added to the dataset's info file.
    """
    slides = [
        [
            *(row.slide_id, row.stored_path, row.case_id, options.mpp_of(row.mpp)),
            *(row.report, row.split, row.labels, guide_content(row)),
        ]
        for row in rows
    ]
    return hash_json([options.to_dict(), slides, [fingerprints[row.slide_id] for row in rows], dict(extra_info)])


def _build(plan: _Plan, start: float) -> BuildSummary:
    finished = find_finished(plan.out_dir, plan.key)
    if finished is not None:
        _remove_parts(plan.out_dir, plan.key)  # left by a kill after the last rename
        return finished
    plan.parts_dir.mkdir(parents=True, exist_ok=True)
    leftovers = _list_temporary(plan.out_dir)
    try:
        with BuildMember(plan.parts_dir, plan.key) as member:
            return _build_as_member(plan, member, leftovers, start)
    except FileNotFoundError:
        # Another process that finished the dataset has removed the parts.
        if find_finished(plan.out_dir, plan.key) is None:
            raise
        return _found_finished(plan.out_dir, plan.key)


def _build_as_member(plan: _Plan, member: BuildMember, leftovers: Sequence[Path], start: float) -> BuildSummary:
    """Tiles what is not tiled yet, and finishes the dataset; `start` is when the build began, by `perf_counter`."""
    options, parts_dir = plan.options, plan.parts_dir
    tasks, refused = make_tasks(plan.rows, plan.found, options=options, parts_dir=parts_dir, member=member.name)
    if not member.others():
        _clean_up(leftovers, tasks, member)
    records = {record.slide_id: record for record in refused}
    reused = _reuse_parts(tasks, plan.out_dir, options)
    remaining = [task for task in tasks if task.slide_id not in reused]
    with BuildProgress(len(plan.rows), len(plan.rows) - len(remaining), shows_bar=options.progress) as progress:
        tiled = tile_slides(
            remaining,
            num_workers=options.num_workers,
            member=member,
            progress=progress,
            is_finished=lambda: find_finished(plan.out_dir, plan.key) is not None,
        )
    if tiled is None:
        return _found_finished(plan.out_dir, plan.key)
    records |= reused | tiled
    fingerprints = plan.fingerprints
    entries = [_entry(row, fingerprints[row.slide_id], records[row.slide_id], parts_dir) for row in plan.rows]
    summary = summarise(entries, reused=set(reused), tiling_seconds=time.perf_counter() - start)
    if options.strict and summary.num_refused:
        return _give_up(entries, parts_dir / "refused.jsonl", summary.as_strict_failure())
    if summary.num_ok == 0 and not plan.extra_info:  # a share without a usable slide is still needed to join
        return _give_up(entries, plan.out_dir / "refused.jsonl", summary)

    def finish() -> BuildSummary:
        places = {"build_key": plan.key, "summary": summary, "extra_info": plan.extra_info}
        return finish_dataset(entries, plan.out_dir, options, **places)

    return finish_once(member, plan.out_dir, plan.key, finish)


def _entry(row: ManifestRow, fingerprint: str | None, record: PartRecord, parts_dir: Path) -> SlideEntry:
    if record.status == "refused":
        return SlideEntry(row, fingerprint, record)
    tiles = slice_table(table_path(parts_dir, row.slide_id))
    return SlideEntry(row, fingerprint, record, tiles, parts_dir)


def find_finished(out_dir: Path, build_key: str) -> BuildSummary | None:
    """Returns the summary of the finished dataset in `out_dir` if it has this build key."""
    try:
        info = read_dataset_info(out_dir)
    except ValueError:
        return None
    if info["build_key"] != build_key:
        return None
    return BuildSummary(**info["summary"], is_up_to_date=True)


def _found_finished(out_dir: Path, build_key: str) -> BuildSummary:
    logger.info("%s was finished by another process.", out_dir)
    finished = find_finished(out_dir, build_key)
    if finished is None:
        raise OSError(f"{out_dir}: the dataset was finished and has vanished since.")
    shutil.rmtree(out_dir / PARTS_NAME, ignore_errors=True)
    return finished


def finish_once(
    member: BuildMember, out_dir: Path, build_key: str, finish: Callable[[], BuildSummary]
) -> BuildSummary:
    """Calls `finish` if no other member does; otherwise waits until the dataset is there, or that member has died.

    Args:
        member (`BuildMember`): this process.
        out_dir (`Path`): folder of the dataset.
        build_key (`str`): hash of everything the dataset depends on.
        finish (`Callable[[], BuildSummary]`): puts the dataset in place.
    """
    parts_dir = out_dir / PARTS_NAME
    while find_finished(out_dir, build_key) is None:
        # Whoever finishes removes the folder, and claims cannot be made in it any more.
        with suppress(FileNotFoundError):
            if take_claim(parts_dir, _FINISH, member.name):
                break
            if member.is_free(_FINISH):
                continue
        time.sleep(POLL_SECONDS)
    else:
        return _found_finished(out_dir, build_key)
    try:
        summary = finish()
    finally:
        release_claim(parts_dir, _FINISH, member.name)
    counts = (summary.num_ok, summary.num_tiles, summary.num_refused)
    logger.info("%s: %d slides with %d tiles; %d slides refused.", out_dir, *counts)
    return summary


def _give_up(entries: Sequence[SlideEntry], refused_path: Path, summary: BuildSummary) -> BuildSummary:
    write_text(refused_path, refused_lines(entries))
    logger.error("No dataset is written: %d slides are refused; see %s.", summary.num_refused, refused_path)
    return summary


def _list_temporary(out_dir: Path) -> list[Path]:
    """Lists temporary files before this process shows itself as a member.

    A process that wrote one of them and lives is a member by then, and one that comes later sees this process.
    """
    parts_dir = out_dir / PARTS_NAME
    folders = [out_dir, parts_dir, *(path for path in parts_dir.iterdir() if path.is_dir())]
    return [path for folder in folders for path in folder.glob(f"{TEMPORARY_PREFIX}*")]


def _clean_up(leftovers: Sequence[Path], tasks: Sequence[SlideTask], member: BuildMember) -> None:
    """Removes what killed processes left, while no other process builds here; refused slides are tried again."""
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    member.clear_dead()
    for task in tasks:
        forget_refusal(task.parts_dir, task.slide_id)


def _remove_parts(out_dir: Path, build_key: str) -> None:
    """Removes the parts of a finished dataset, unless another process uses them."""
    if (out_dir / PARTS_NAME).is_dir():
        with suppress(BlockingIOError), BuildMember(out_dir / PARTS_NAME, build_key) as member:
            if not member.others():
                shutil.rmtree(out_dir / PARTS_NAME, ignore_errors=True)
                remove_temporary(out_dir)


def _reuse_parts(tasks: Sequence[SlideTask], out_dir: Path, options: BuildOptions) -> dict[str, PartRecord]:
    """Returns the records of slides that need not be read again."""
    parts_dir = out_dir / PARTS_NAME
    missing = [task for task in tasks if find_part(parts_dir, task.slide_id, task.key) is None]
    if missing and options.pixels != "none":
        # Another member may exchange the old dataset for the new one meanwhile.
        with suppress(FileNotFoundError):
            restore_parts(out_dir, missing, options.parameters())
    found = {task.slide_id: find_part(parts_dir, task.slide_id, task.key) for task in tasks}
    reused = {slide_id: record for slide_id, record in found.items() if record is not None}
    if reused:
        logger.info("%d of %d slides were tiled before and are reused.", len(reused), len(tasks))
    return reused


def _bytes_to_come(out_dir: Path, num_slides: int) -> int:
    """Estimates what a build still has to write: the parts that are missing, and all of them once more to merge."""
    sizes = [path.stat().st_size for path in (out_dir / PARTS_NAME).glob("[!.]*.parquet")]
    return round(sum(sizes) / len(sizes) * (2 * num_slides - len(sizes))) if sizes else 0
