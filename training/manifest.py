# SPDX-License-Identifier: Apache-2.0
"""Reads the list of slides (manifest): one row per slide with its path, case, report, split and labels.

A manifest is a CSV, TSV or Parquet file, a `datasets.Dataset`, or simply a folder of slides. Everything that can be
checked without opening a slide is checked here. No slide is opened.
"""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .manifest_checks import SPLIT_ALIASES, check_case_splits, check_cells, check_ids, check_paths, raise_offenders
from .manifest_table import MISSING, Label, label_column, read_table, table_of_dataset, text_column

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# Column names of other tools (slide2vec, TRIDENT, STAMP, CLAM) that mean the same.
ALIASES: dict[str, tuple[str, ...]] = {
    "slide_id": ("slide_id", "wsi", "sample_id", "FILENAME"),
    "path": ("path", "image_path", "wsi_path", "slide_path"),
    "case_id": ("case_id", "patient_id", "PATIENT", "pat_id"),
    "mpp": ("mpp", "spacing_at_level_0"),
    "mask": ("mask", "mask_path"),
    "report": ("report",),
    "split": ("split",),
}
# Columns that the slide dataset writes itself: a label of that name would be overwritten.
DATASET_COLUMNS = (
    *("slide_id", "case_id", "split", "path", "fingerprint", "vendor", "width_px", "height_px", "mpp"),
    *("tile_size_px", "tile_mpp", "stride_px", "tile_size_level0_px", "tile_xy", "tile_start", "num_tiles"),
    *("num_copied", "tissue_fraction", "report", "status", "reason"),
)
SLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"}
)


@dataclass(frozen=True)
class TileGuide:
    """A file that says where a slide's tissue or its tiles are; see `tile_guides`.

    Attributes:
        kind (`str`): "mask" or "coordinates".
        path (`Path`): the file.
        sha256 (`str`): hash of its content, "" if it is missing.
        problem (`str`): reason code if it is missing, else "".
    """

    kind: str
    path: Path
    sha256: str = ""
    problem: str = ""

    @property
    def content(self) -> list[str]:
        """What the tiles of its slide depend on: kind and hash, as datasets record it."""
        return [self.kind, self.sha256]


@dataclass(frozen=True)
class ManifestRow:
    """One slide of a manifest.

    Attributes:
        slide_id (`str`): unique name, `[A-Za-z0-9._-]`, at most 128 characters, not starting with a dot or dash.
        path (`Path`): where to open the slide, absolute.
        stored_path (`str`): what a dataset records: relative to the slides' root, or only the file's name.
        case_id (`str`): the patient; equal to `slide_id` if the manifest has no cases.
        mpp (`float` or `None`): micrometres per level-0 pixel, if the manifest gives it.
        report (`str`): the pathology report, "" if there is none.
        split (`str` or `None`): "train", "val" or "test"; `None` until `assign_splits`.
        labels (`dict[str, str | int | float | bool | None]`): all other columns; `None` is a missing value.
        mask_path (`Path` or `None`): its tissue mask, if the manifest names one.
        guide (`TileGuide` or `None`): what says where its tissue or its tiles are, once `add_guides` has looked.
    """

    slide_id: str
    path: Path
    stored_path: str
    case_id: str
    mpp: float | None = None
    report: str = ""
    split: str | None = None
    labels: dict[str, Label] = field(default_factory=dict)
    mask_path: Path | None = None
    guide: TileGuide | None = None


def read_manifest(
    source: "str | Path | datasets.Dataset", *, slides_root: str | Path | None = None
) -> list[ManifestRow]:
    """Reads a manifest, or lists a folder of slides.

    Args:
        source (`str`, `Path` or `datasets.Dataset`): a `.csv`, `.tsv` or `.parquet` file, a dataset, or a folder.
        slides_root (`str` or `Path`, *optional*): the folder that relative paths start from; default: the manifest's
            folder. If it is given, paths that lead out of it are refused.

    Returns:
        `list[ManifestRow]`: in the order of the manifest; a folder's slides in the order of their paths.

    Raises:
        ValueError: with every offending row, if ids are missing, unsafe or used twice, a path is missing or leads out
            of `slides_root`, an mpp is no number, a split is unknown, or a case is in two splits.
        FileNotFoundError: if `source` does not exist.
    """
    root = None if slides_root is None else Path(slides_root)
    if not isinstance(source, (str, Path)):
        rows = _rows_of_table(table_of_dataset(source), Path(), root)
    elif Path(source).is_dir():
        rows = _rows_of_folder(Path(source), root or Path(source))
    else:
        rows = _rows_of_table(read_table(Path(source)), Path(source).parent, root)
    check_ids([row.slide_id for row in rows], [row.stored_path for row in rows])
    check_paths([row.stored_path for row in rows])
    check_case_splits((row.case_id, row.split) for row in rows)
    return rows


def assign_splits(
    rows: Sequence[ManifestRow], *, val_fraction: float = 0.0, test_fraction: float = 0.0, seed: int = 0
) -> list[ManifestRow]:
    """Gives every row a split, by case, as a function of the seed and the case ids alone.

    Cases are ordered by a hash of (seed, case_id); the first ones become the test split, the next ones the
    validation split. The order of the rows does not matter. Rows that already have splits are returned as they are.

    Args:
        rows (`Sequence[ManifestRow]`): slides, either all or none with a split.
        val_fraction (`float`, *optional*, defaults to 0.0): share of the cases for validation.
        test_fraction (`float`, *optional*, defaults to 0.0): share of the cases for testing.
        seed (`int`, *optional*, defaults to 0): another seed draws other cases.

    Raises:
        ValueError: if fractions are not in [0, 1), leave no case for training, or the manifest has splits already.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction}: expected shares from 0 to below 1 that "
            "leave a part for training."
        )
    if any(row.split is not None for row in rows):
        if val_fraction or test_fraction:
            raise ValueError("The manifest has a `split` column: remove it, or leave out val_fraction/test_fraction.")
        return list(rows)
    cases = sorted({row.case_id for row in rows}, key=lambda case: hashlib.sha256(f"{seed}:{case}".encode()).digest())
    num_test = max(1, round(len(cases) * test_fraction)) if test_fraction else 0
    num_val = max(1, round(len(cases) * val_fraction)) if val_fraction else 0
    if cases and num_test + num_val >= len(cases):
        raise ValueError(f"{len(cases)} cases are too few for these splits: no case would be left for training.")
    split_of = dict.fromkeys(cases, "train")
    split_of.update(dict.fromkeys(cases[:num_test], "test"))
    split_of.update(dict.fromkeys(cases[num_test : num_test + num_val], "val"))
    return [replace(row, split=split_of[row.case_id]) for row in rows]


def find_slides(folder: Path) -> list[Path]:
    """Lists the slide files below a folder by their suffix, sorted; one file for each folder of DICOM files."""
    paths, dicom_folders = [], set()
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if is_hidden or path.suffix.lower() not in SLIDE_SUFFIXES or not path.is_file():
            continue
        if path.suffix.lower() == ".dcm":
            if path.parent in dicom_folders:
                continue  # the levels of one slide: OpenSlide finds them from any of the files
            dicom_folders.add(path.parent)
        paths.append(path)
    return paths


def _rows_of_folder(folder: Path, root: Path) -> list[ManifestRow]:
    paths = find_slides(folder)
    if not paths:
        raise ValueError(f"{folder}: found no slides; expected files ending in {', '.join(sorted(SLIDE_SUFFIXES))}.")
    rows = []
    for path in paths:
        slide_id = path.parent.resolve().name if path.suffix.lower() == ".dcm" else path.stem
        opened, stored = _locate(str(path.absolute()), root)
        rows.append(ManifestRow(slide_id, opened, stored or opened.name, case_id=slide_id))
    return rows


def _rows_of_table(table: Mapping[str, list[Any]], base: Path, slides_root: Path | None) -> list[ManifestRow]:
    """Builds rows from columns; `base` is where relative paths start if no root was asked for."""
    names = _match_columns(list(table))
    root = slides_root or base
    columns = {key: text_column(name, table[name]) for key, name in names.items()}
    if "path" not in columns:
        columns["path"], columns["slide_id"] = _paths_from_ids(columns["slide_id"], root)
    if "slide_id" not in columns:
        columns["slide_id"] = [Path(path).stem for path in columns["path"]]
    if "mpp" in columns:
        columns["mpp"] = ["" if text.casefold() in MISSING else text for text in columns["mpp"]]
    check_cells(columns)
    labels = _label_columns(table, used=set(names.values()))
    located = [_locate(path, root) for path in columns["path"]]
    masks = [_locate(path, root) if path else None for path in columns.get("mask", [""] * len(located))]
    outside = [f"row {i}: {opened}" for i, (opened, stored) in enumerate(located, 1) if stored is None]
    if slides_root is not None:
        outside += [f"row {i}: mask {mask[0]}" for i, mask in enumerate(masks, 1) if mask and mask[1] is None]
        raise_offenders(f"Paths must stay below the slides' root {slides_root}", outside)
    if outside:
        logger.warning(
            "%d slides lie outside the folder %s: only their file names are recorded. --slides-root keeps their "
            "folders.",
            len(outside),
            root,
        )
    return [
        _build_row(
            {key: values[i] for key, values in columns.items()},
            located[i],
            {name: values[i] for name, values in labels.items()},
            masks[i][0] if masks[i] else None,
        )
        for i in range(len(located))
    ]


def _build_row(
    cells: Mapping[str, str], location: tuple[Path, str | None], labels: dict[str, Label], mask_path: Path | None
) -> ManifestRow:
    opened, stored = location
    split = cells.get("split") or None
    return ManifestRow(
        slide_id=cells["slide_id"],
        path=opened,
        stored_path=stored or opened.name,
        case_id=cells.get("case_id") or cells["slide_id"],
        mpp=float(cells["mpp"]) if cells.get("mpp") else None,
        report=cells.get("report", ""),
        split=SPLIT_ALIASES.get(split, split) if split else None,
        labels=labels,
        mask_path=mask_path,
    )


def _match_columns(columns: list[str]) -> dict[str, str]:
    """Maps our column names to the manifest's."""
    found = {key: [name for name in columns if name in aliases] for key, aliases in ALIASES.items()}
    double = [f"{names} all mean `{key}`" for key, names in found.items() if len(names) > 1]
    raise_offenders("Manifest columns are ambiguous; keep one of each", double)
    if not found["slide_id"] and not found["path"]:
        accepted = "; ".join(f"`{key}` or {', '.join(ALIASES[key][1:])}" for key in ("path", "slide_id"))
        raise ValueError(f"The manifest has columns {columns}; expected at least one of: {accepted}.")
    return {key: names[0] for key, names in found.items() if names}


def _label_columns(table: Mapping[str, list[Any]], *, used: set[str]) -> dict[str, list[Label]]:
    labels = {name: label_column(name, values) for name, values in table.items() if name and name not in used}
    raise_offenders(
        "Label columns must not have the name of a column that the dataset writes itself; rename them",
        sorted(set(labels) & set(DATASET_COLUMNS)),
    )
    return labels


def _paths_from_ids(values: list[str], root: Path) -> tuple[list[str], list[str]]:
    """Returns (paths, ids) for a table without paths, whose entries are relative paths (TRIDENT) or stems (CLAM)."""
    if all(Path(value).suffix.lower() in SLIDE_SUFFIXES for value in values):
        return values, [Path(value).stem for value in values]
    files: dict[str, list[Path]] = defaultdict(list)
    for path in find_slides(root):
        files[path.stem].append(path)
    wrong = [f"{value}: {len(files[value])} files" for value in values if len(files[value]) != 1]
    raise_offenders(f"Without a `path` column each slide_id must be the stem of one slide below {root}", wrong)
    return [files[value][0].relative_to(root).as_posix() for value in values], values


def _locate(path: str, root: Path) -> tuple[Path, str | None]:
    """Returns the path to open and the path below `root`, `None` if it is not below.

    Symbolic links are not followed: folders of links into a slide archive are usual.
    """
    absolute_root = Path(os.path.normpath(root.absolute()))
    opened = Path(os.path.normpath(absolute_root / path))
    return opened, opened.relative_to(absolute_root).as_posix() if opened.is_relative_to(absolute_root) else None
