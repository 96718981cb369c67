# SPDX-License-Identifier: Apache-2.0
"""Decides, before any pixel is read, which slides are to be tiled and which are refused."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modeling_dre_slcl.slide_reader import SlideError, slide_fingerprint

from .build_options import BuildOptions
from .dataset_info import FORMAT_VERSION, hash_json
from .manifest import ManifestRow, TileGuide
from .slide_part import PartRecord, SlideTask, refuse_slide

_NUM_THREADS = 8
# Formats whose named file does not hold the pixels: equal files need not be equal slides.
_INDEX_SUFFIXES = frozenset({".mrxs", ".vms", ".vmu"})


def fingerprint_slides(rows: Sequence[ManifestRow]) -> dict[str, str | SlideError]:
    """Returns the fingerprint of every slide, or why there is none; files are read in parallel."""

    def fingerprint(row: ManifestRow) -> str | SlideError:
        try:
            return slide_fingerprint(row.path)
        except SlideError as error:
            return error
        except OSError as error:
            return SlideError(row.slide_id, "unreadable", f"{row.path}: {error.strerror}")

    with ThreadPoolExecutor(_NUM_THREADS) as executor:
        return dict(zip([row.slide_id for row in rows], executor.map(fingerprint, rows), strict=True))


def is_duplicate(row: ManifestRow, first: str) -> bool:
    """Whether a slide must be refused because slide `first` (the first with its fingerprint) is the same."""
    return first != row.slide_id and row.path.suffix.lower() not in _INDEX_SUFFIXES


def guide_content(row: ManifestRow) -> list[str] | None:
    """Returns what the tiles of a slide depend on beside the slide and the options: kind and hash of its guide."""
    return None if row.guide is None else row.guide.content


def _missing_guide(guide: TileGuide) -> str:
    return f"there is no {guide.kind} file of the slide; add it, or leave the slide out"


def make_tasks(
    rows: Sequence[ManifestRow],
    fingerprints: Mapping[str, str | SlideError],
    *,
    options: BuildOptions,
    parts_dir: Path,
    member: str = "",
) -> tuple[list[SlideTask], list[PartRecord]]:
    """Returns a task for each slide that can be tried, and the records of those refused already.

    Refused are slides without a readable file, and slides that are the same file as an earlier one: the same pixels
    under two names could end up in two splits.

    Args:
        rows (`Sequence[ManifestRow]`): all slides.
        fingerprints (`Mapping`): from `fingerprint_slides`.
        options (`BuildOptions`): how to tile them.
        parts_dir (`Path`): where workers write.
        member (`str`, *optional*): the process that builds, in whose name slides are claimed.
    """
    tasks, refused = [], []
    first_with: dict[str, str] = {}
    for row in rows:
        found = fingerprints[row.slide_id]
        mpp = options.mpp_of(row.mpp)
        fingerprint = found if isinstance(found, str) else ""
        task = SlideTask(
            slide_id=row.slide_id,
            path=row.path,
            stored_path=row.stored_path,
            mpp=mpp,
            fingerprint=fingerprint,
            key=hash_json([FORMAT_VERSION, options.parameters(), mpp, fingerprint, guide_content(row)]),
            grid_config=options.grid_config,
            tissue=options.tissue,
            mask_frame=options.mask_frame,
            guide=row.guide,
            pixels=options.pixels,
            refuses_misaligned=options.misaligned == "refuse",
            jpeg_quality=options.jpeg_quality,
            parts_dir=parts_dir,
            member=member,
        )
        if isinstance(found, SlideError):
            refused.append(refuse_slide(task, found.reason, found.message))
            continue
        if row.guide is not None and row.guide.problem:
            refused.append(refuse_slide(task, row.guide.problem, _missing_guide(row.guide)))
            continue
        first = first_with.setdefault(found, row.slide_id)
        if is_duplicate(row, first):
            refused.append(refuse_slide(task, "duplicate_id", f"the file has the same content as slide {first}"))
        else:
            tasks.append(task)
    return tasks, refused
