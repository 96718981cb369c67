# SPDX-License-Identifier: Apache-2.0
"""The rules a manifest must keep; each check names all offending rows at once, so that one correction is enough."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {"validation": "val", "valid": "val", "dev": "val"}
_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RESERVED = "contact_sheet"  # the name of a picture beside those of the slides
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAX_NAMED_OFFENDERS = 50

T = TypeVar("T")


def raise_offenders(requirement: str, offenders: Sequence[str]) -> None:
    """Raises a `ValueError` that states the requirement and lists the offenders, if there are any."""
    if offenders:
        shown = "; ".join(offenders[:_MAX_NAMED_OFFENDERS])
        more = f"; and {len(offenders) - _MAX_NAMED_OFFENDERS} more" if len(offenders) > _MAX_NAMED_OFFENDERS else ""
        raise ValueError(f"{requirement}. Found {len(offenders)}: {shown}{more}.")


def is_safe_id(slide_id: str) -> bool:
    """Whether an id can be a file name on every system and cannot lead out of a folder."""
    return (
        bool(_SAFE_ID.fullmatch(slide_id))
        and not slide_id.startswith(_RESERVED)
        and not _DEVICE_NAMES.fullmatch(slide_id)
        and slide_id[-1] != "."
    )


def check_cells(columns: Mapping[str, Sequence[str]]) -> None:
    """Checks single cells of the columns path, case_id, mpp and split (text, "" if missing).

    Raises:
        ValueError: if a path is missing, a name holds control characters, an mpp is no number, or splits are given
            for some rows only or have other names than train, val and test.
    """
    raise_offenders("Every slide needs a path", [f"row {i}" for i, path in enumerate(columns["path"], 1) if not path])
    for key in ("path", "case_id"):
        wrong = [f"row {i}: {text!r}" for i, text in enumerate(columns.get(key, []), 1) if _CONTROL.search(text)]
        raise_offenders(f"Column `{key}` must not hold control characters", wrong)
    wrong = [f"row {i}: {text!r}" for i, text in enumerate(columns.get("mpp", []), 1) if text and not _is_number(text)]
    raise_offenders("Column `mpp` must hold numbers such as 0.25 (micrometres per pixel)", wrong)
    splits = columns.get("split", [])
    if any(splits):
        known = {*SPLITS, *SPLIT_ALIASES}
        wrong = [f"row {i}: {text!r}" for i, text in enumerate(splits, 1) if text not in known]
        raise_offenders(f"Column `split` must hold one of {', '.join(SPLITS)} in every row, or in none", wrong)


def check_ids(slide_ids: Sequence[str], places: Sequence[str | Path]) -> None:
    """Checks that slide ids are safe file names and unique.

    Args:
        slide_ids (`Sequence[str]`): one per row.
        places (`Sequence[str | Path]`): the slides' paths, for the message.

    Raises:
        ValueError: naming every unsafe id, or every group of rows with the same id.
    """
    unsafe = [f"row {i}: {slide_id!r}" for i, slide_id in enumerate(slide_ids, 1) if not is_safe_id(slide_id)]
    raise_offenders(
        "A slide_id must be 1-128 letters, digits, '.', '_' or '-', not starting with '.' or '-'; rename the file or "
        "write a manifest with a `slide_id` column",
        unsafe,
    )
    # Ids become file names, and some file systems do not tell upper from lower case.
    groups = _group((name.casefold(), f"{name} ({place})") for name, place in zip(slide_ids, places, strict=True))
    raise_offenders(
        "Each slide_id may occur once (upper and lower case count as equal)",
        [", ".join(entries) for entries in groups.values() if len(entries) > 1],
    )


def check_paths(stored_paths: Sequence[str]) -> None:
    """Checks that paths can be stored as text, which names of files in another encoding than UTF-8 cannot.

    Raises:
        ValueError: naming every such path.
    """
    wrong = [repr(path) for path in stored_paths if any(0xD800 <= ord(char) < 0xE000 for char in path)]
    raise_offenders("Paths must be UTF-8; rename the file or the folder, or start further down (--slides-root)", wrong)


def check_case_splits(case_splits: Iterable[tuple[str, str | None]]) -> None:
    """Checks that no case is in two splits.

    Raises:
        ValueError: naming every such case and its splits.
    """
    groups = {case: sorted({str(split) for split in splits}) for case, splits in _group(case_splits).items()}
    raise_offenders(
        "A case must be in one split only, or the evaluation would see training patients",
        [f"{case}: {', '.join(splits)}" for case, splits in groups.items() if len(splits) > 1],
    )


def _group(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
