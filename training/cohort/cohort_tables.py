# SPDX-License-Identifier: Apache-2.0
"""A folder of TCGA or CPTAC slides and the archives' tables -> the tables that tiling, training and evaluation take.

    OUT/manifest.csv          slide_id, path, case_id, split, report and the labels; for `dre-slcl tiles` and `embed`
    OUT/labels.csv            slide_id, case_id and the labels; for `dre-slcl evaluate`
    OUT/splits/heldout.csv    columns train, val, test of slide ids, as CLAM has them
    OUT/splits/external.csv   the same: trained on TCGA, tested on CPTAC; if there are slides of both
    OUT/cohort.json           how many slides have what, and which were left out and why

Labels: tissue and tissue_frozen (tumor or normal; the latter of frozen slides alone), preparation, site, program,
subtype, os_days, os_event and the genes. On a slide of normal tissue the last ones are empty, as is its report: the
tumour that they speak of is not on it. TCGA's slides of normal tissue are all frozen, its diagnostic slides all
tumour: whoever learns `tissue` may learn the preparation, so that cancer recognition takes `tissue_frozen`.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from modeling_dre_slcl.atomic_files import write_json, write_text

from ..manifest import find_slides
from ..manifest_checks import check_ids
from .barcodes import CPTAC, FROZEN, NORMAL, SlideName, parse_slide_name
from .clinical_tables import Clinical
from .cohort_splits import split_cases
from .mutation_tables import Mutations


@dataclass(frozen=True)
class CohortSources:
    """What a cohort is made of.

    Args:
        slides (sequence of `Path`): folders of slides.
        reports (`Mapping[str, str]`): case -> report.
        clinical (`Clinical`): cancer types, survival, tissue.
        mutations (`dict`): case -> gene -> 1, 0 or `None`.
        genes (sequence of `str`): the genes, in the order of their columns.
        preparation (`str`, *optional*): "ffpe" or "frozen", to leave the others out.
    """

    slides: Sequence[Path]
    reports: Mapping[str, str] = field(default_factory=dict)
    clinical: Clinical = field(default_factory=Clinical)
    mutations: Mutations = field(default_factory=dict)
    genes: Sequence[str] = ()
    preparation: str | None = None


@dataclass(frozen=True)
class CohortSummary:
    """What was written.

    Args:
        num_slides (`int`), num_cases (`int`): slides and cases in the tables.
        num_reports (`int`): slides with a report.
        values (`dict`): label column -> value -> slides, empty cells under "".
        splits (`dict`): split -> slides.
        left_out (`list` of `dict`): `path` and `reason` of slides that are in no table.
        warnings (`list` of `str`): what an evaluation on these tables would stumble over.
    """

    num_slides: int
    num_cases: int
    num_reports: int
    values: dict[str, dict[str, int]]
    splits: dict[str, int]
    left_out: list[dict[str, str]]
    warnings: list[str]


def write_cohort_tables(
    sources: CohortSources,
    out_dir: str | Path,
    *,
    val_fraction: float = 0.0,
    test_fraction: float = 0.2,
    split_unit: str = "case",
    seed: int = 0,
) -> CohortSummary:
    """Joins slides and tables by the case in the slides' names, and writes what the module's text lists.

    CPTAC's slides are all tested on, where there are TCGA's to train on.

    Args:
        sources (`CohortSources`): slides and tables.
        out_dir (`str` or `Path`): the folder to write to.
        val_fraction, test_fraction, split_unit, seed (*optional*): as in `split_cases`, for the cases to train on.

    Returns:
        `CohortSummary`: what was written.

    Raises:
        ValueError: if no slide has a name of TCGA or CPTAC, one is there twice, or the splits do not work out.
    """
    out_dir = Path(out_dir)
    named, left_out = _find(sources)
    if not named:
        found = ", ".join(sorted({item["path"] for item in left_out})[:3]) or "no slide"
        raise ValueError(
            f"{', '.join(map(str, sources.slides))}: expected slides named as TCGA's "
            f"(TCGA-05-4244-01Z-00-DX1.<uuid>.svs) or CPTAC's (C3L-00001-21.svs), found {found}."
        )
    check_ids([path.stem for path, _ in named], [path for path, _ in named])
    site_of_case = {name.case_id: name.site for _, name in named}
    external = {name.case_id for _, name in named if name.program == CPTAC}
    inside = {case: site for case, site in site_of_case.items() if case not in external} or site_of_case
    splits = dict.fromkeys(external, "test") | split_cases(
        inside, val_fraction=val_fraction, test_fraction=test_fraction, unit=split_unit, seed=seed
    )
    labels = [_labels(path, name, sources) for path, name in named]
    rows = [
        {
            "slide_id": path.stem,
            "path": _relative(path, out_dir),
            "case_id": name.case_id,
            "split": splits[name.case_id],
        }
        | {"report": "" if label["tissue"] == NORMAL else sources.reports.get(name.case_id, "")}
        | label
        for (path, name), label in zip(named, labels, strict=True)
    ]
    write_text(out_dir / "manifest.csv", _to_csv(rows))
    without = ("path", "split", "report")
    write_text(out_dir / "labels.csv", _to_csv([{k: v for k, v in row.items() if k not in without} for row in rows]))
    _write_splits(out_dir / "splits", rows, is_mixed=0 < len(external) < len(site_of_case))
    summary = _summarise(rows, list(labels[0]), left_out, sources)
    write_json(out_dir / "cohort.json", {item.name: getattr(summary, item.name) for item in fields(summary)})
    return summary


def _find(sources: CohortSources) -> tuple[list[tuple[Path, SlideName]], list[dict[str, str]]]:
    named, left_out = [], []
    for path in sorted(path for folder in sources.slides for path in find_slides(Path(folder))):
        name = parse_slide_name(path.stem)
        if name is None:
            left_out.append({"path": path.name, "reason": "its name is neither TCGA's nor CPTAC's"})
        elif sources.preparation not in (None, name.preparation):
            left_out.append({"path": path.name, "reason": f"it is {name.preparation}, not {sources.preparation}"})
        else:
            named.append((path, name))
    return named, left_out


def _labels(path: Path, name: SlideName, sources: CohortSources) -> dict[str, Any]:
    clinical, case = sources.clinical, name.case_id
    tissue = name.tissue or clinical.tissue.get(path.stem)
    genes = sources.mutations.get(case, {})
    of_tumor = {
        "subtype": clinical.cancer_type.get(case),
        "os_days": clinical.os_days.get(case),
        "os_event": clinical.os_event.get(case),
        **{gene: genes.get(gene) for gene in sources.genes},
    }
    tissues = {"tissue": tissue, "tissue_frozen": tissue if name.preparation == FROZEN else None}
    origin = {"preparation": name.preparation, "site": name.site, "program": name.program}
    return tissues | origin | (dict.fromkeys(of_tumor) if tissue == NORMAL else of_tumor)


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    except ValueError:  # on another drive
        return str(path.absolute())


def _write_splits(folder: Path, rows: list[dict[str, Any]], *, is_mixed: bool) -> None:
    columns = {split: [row["slide_id"] for row in rows if row["split"] == split] for split in ("train", "val", "test")}
    if is_mixed:
        external = [row["slide_id"] for row in rows if row["program"] == CPTAC]
        inside = [row["slide_id"] for row in rows if row["program"] != CPTAC]
        _write_split(folder / "external.csv", {"train": inside, "val": [], "test": external})
        columns["test"] = [slide for slide in columns["test"] if slide not in set(external)]
    _write_split(folder / "heldout.csv", columns)


def _write_split(path: Path, columns: dict[str, list[str]]) -> None:
    height = max(map(len, columns.values()))
    cells = {name: slides + [None] * (height - len(slides)) for name, slides in columns.items()}
    write_text(path, _to_csv([{"": i} | {name: cells[name][i] for name in cells} for i in range(height)]))


def _to_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _summarise(
    rows: list[dict[str, Any]], labels: list[str], left_out: list[dict[str, str]], sources: CohortSources
) -> CohortSummary:
    shown = [name for name in labels if name not in ("site", "os_days")]
    values = {
        name: dict(sorted(Counter("" if row[name] is None else str(row[name]) for row in rows).items()))
        for name in shown
    }
    num_reports = sum(bool(row["report"]) for row in rows)
    warnings = [
        f"Clinical tables disagree about the cancer type of {case}; it has none."
        for case in sources.clinical.conflicts
    ]
    if sources.reports and not num_reports:
        warnings.append("No slide has a report: are these reports of other cases?")
    tissues = {row["tissue"] for row in rows} - {None}
    pairs = {(row["tissue"], row["preparation"]) for row in rows if row["tissue"] and row["program"] != CPTAC}
    if len(tissues) > 1 and any((NORMAL, made) not in pairs for _, made in pairs):
        warnings.append(
            "TCGA's slides of normal tissue are frozen sections, its diagnostic slides (DX) are tumour only: a model "
            "would tell the preparation instead of cancer. For cancer recognition take the label `tissue_frozen`."
        )
    return CohortSummary(
        num_slides=len(rows),
        num_cases=len({row["case_id"] for row in rows}),
        num_reports=num_reports,
        values=values,
        splits=dict(Counter(row["split"] for row in rows)),
        left_out=left_out,
        warnings=warnings,
    )
