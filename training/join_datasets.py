# SPDX-License-Identifier: Apache-2.0
"""Joins the datasets of all shares of a manifest (`--shard i/n`) into the one that a single machine would have built.

No slide is read: rows come from the shares' `slides` tables, tiles are copied as whole row groups.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from .build_dataset import check_out_dir, find_finished, finish_once, hash_build
from .build_options import BuildOptions
from .build_records import BuildSummary, summarise
from .dataset_commit import PARTS_NAME, finish_dataset
from .dataset_info import read_dataset_info
from .dataset_reuse import record_of_row, slides_of_shard
from .dataset_writer import SlideEntry
from .manifest import DATASET_COLUMNS, ManifestRow, TileGuide
from .parquet_join import TableSlice, slice_table
from .slide_claims import BuildMember
from .slide_part import PartRecord
from .slide_tasks import is_duplicate


def join_datasets(shares: Sequence[str | Path], out_dir: str | Path) -> BuildSummary:
    """Writes one dataset from the datasets of all shares.

    Its tables and shards are byte for byte those of a build of the whole manifest; times in its summary are sums.

    Args:
        shares (`Sequence[str | Path]`): folders of the shares' finished datasets, in any order.
        out_dir (`str` or `Path`): folder of the joined dataset.

    Returns:
        `BuildSummary`: counts, and times of all shares together.

    Raises:
        ValueError: if a share is missing, given twice, or belongs to another manifest or other options.
    """
    folders, out_dir = [Path(share) for share in shares], Path(out_dir)
    infos = [read_dataset_info(folder) for folder in folders]
    _check_shares(folders, infos, out_dir)
    entries = _mark_duplicates(_read_entries(folders, infos))
    options = BuildOptions.from_dict(infos[0]["options"])
    fingerprints = {entry.row.slide_id: entry.fingerprint for entry in entries}
    build_key = hash_build([entry.row for entry in entries], fingerprints, options, {})
    finished = find_finished(out_dir, build_key)
    if finished is not None:
        return finished
    summary = _add_times(summarise(entries, reused=set(), tiling_seconds=1.0), infos)
    check_out_dir(out_dir)
    (out_dir / PARTS_NAME).mkdir(parents=True, exist_ok=True)
    with BuildMember(out_dir / PARTS_NAME, build_key) as member:
        return finish_once(
            member,
            out_dir,
            build_key,
            lambda: finish_dataset(entries, out_dir, options, build_key=build_key, summary=summary, extra_info={}),
        )


def _check_shares(folders: Sequence[Path], infos: Sequence[Mapping[str, Any]], out_dir: Path) -> None:
    for folder, info in zip(folders, infos, strict=True):
        if "share" not in info:
            raise ValueError(f"{folder}: is not the dataset of a share; build it with --shard.")
        if folder.resolve() == out_dir.resolve():
            raise ValueError(f"{out_dir}: --out must be another folder than the datasets to join.")
        if info["share"]["manifest"] != infos[0]["share"]["manifest"]:
            raise ValueError(f"{folder}: its share is of another list of slides than that of {folders[0]}.")
        for name, value in info["options"].items():
            if value != infos[0]["options"][name]:
                raise ValueError(
                    f"{folder}: was built with {name}={value!r}, but {folders[0]} with {infos[0]['options'][name]!r}."
                )
    count = infos[0]["share"]["count"]
    found = sorted(info["share"]["index"] for info in infos)
    if any(info["share"]["count"] != count for info in infos) or found != list(range(1, count + 1)):
        raise ValueError(f"Joining needs each of the shares 1 to {count} once, found {found}.")


def _read_entries(folders: Sequence[Path], infos: Sequence[Mapping[str, Any]]) -> list[SlideEntry]:
    """Returns all slides in the order of the whole manifest."""
    entries: dict[int, SlideEntry] = {}
    for folder, info in zip(folders, infos, strict=True):
        positions = info["share"]["positions"]
        refused = [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]
        messages = {line["slide_id"]: line["message"] for line in refused}
        tiles = {
            slide_id: slice_table(path, groups)
            for path in sorted(folder.glob("tiles/*.parquet"))
            for slide_id, groups in slides_of_shard(path)
        }
        for path in sorted(folder.glob("slides/*.parquet")):
            for row in pq.read_table(path).to_pylist():
                slide_id = row["slide_id"]
                guide = info["guides"].get(slide_id)
                entry = _entry(row, folder, tiles.get(slide_id), info["given_mpp"].get(slide_id), guide)
                record = replace(entry.record, message=messages.get(slide_id, ""))
                entries[positions[slide_id]] = replace(entry, record=record)
    return [entries[position] for position in sorted(entries)]


def _entry(
    row: Mapping[str, Any],
    folder: Path,
    tiles: TableSlice | None,
    given_mpp: float | None,
    guide: Sequence[str] | None,
) -> SlideEntry:
    manifest_row = ManifestRow(
        slide_id=row["slide_id"],
        path=Path(row["path"]),
        stored_path=row["path"],
        case_id=row["case_id"],
        mpp=given_mpp,
        report=row["report"],
        split=row["split"],
        labels={name: value for name, value in row.items() if name not in DATASET_COLUMNS},
        guide=None if guide is None else TileGuide(guide[0], Path(), guide[1]),
    )
    return SlideEntry(
        manifest_row,
        row["fingerprint"],
        record_of_row(row, key=""),
        tiles,
        folder if row["status"] == "ok" else None,
        np.asarray(row["tile_xy"], dtype=np.int32).reshape(-1, 2),
    )


def _mark_duplicates(entries: Sequence[SlideEntry]) -> list[SlideEntry]:
    """Refuses slides that are the same file as an earlier one, which machines cannot see in their own share."""
    first_with: dict[str, str] = {}
    marked = []
    for entry in entries:
        first = first_with.setdefault(entry.fingerprint, entry.row.slide_id) if entry.fingerprint else ""
        if first and is_duplicate(entry.row, first):
            message = f"the file has the same content as slide {first}"
            record = PartRecord(entry.row.slide_id, "", status="refused", reason="duplicate_id", message=message)
            entry = SlideEntry(entry.row, entry.fingerprint, record)
        marked.append(entry)
    return marked


def _add_times(summary: BuildSummary, infos: Sequence[Mapping[str, Any]]) -> BuildSummary:
    """Sums the times of the shares; the rates are those of all machines together."""
    parts = [info["summary"] for info in infos]
    seconds = {name: round(sum(part["seconds"][name] for part in parts), 3) for name in parts[0]["seconds"]}
    del seconds["merge"], seconds["total"]
    cpu_seconds = {
        name: round(sum(part["cpu_seconds"][name] for part in parts), 3) for name in parts[0]["cpu_seconds"]
    }
    return replace(
        summary,
        num_reused=sum(part["num_reused"] for part in parts),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        slides_per_second=round(sum(part["slides_per_second"] for part in parts), 3),
        tiles_per_second=round(sum(part["tiles_per_second"] for part in parts), 3),
    )
