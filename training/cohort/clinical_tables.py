# SPDX-License-Identifier: Apache-2.0
"""Reads clinical tables: cancer type and survival of cases, and which slides show tumour (CPTAC).

Understood as they are: `clinical.tsv` of GDC (old and new column names), clinical tables of cBioPortal (downloaded, or
`data_clinical_patient.txt` and `data_clinical_sample.txt`), TCGA-CDR as CSV, and CPTAC's table of slides from the
Cancer Imaging Archive (`Case_ID, Slide_ID, Specimen_Type, Tumor`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .barcodes import NORMAL, TUMOR, case_of
from .published_tables import is_missing, read_columns, read_rows

_CASE_COLUMNS = ("case_submitter_id", "cases.submitter_id", "bcr_patient_barcode", "PATIENT_ID", "Patient ID")
_CASE_COLUMNS += ("patientId", "Case_ID", "case_id", "submitter_id", "SAMPLE_ID", "Sample ID")
# The first that says something decides: what a project calls its cases, then coded types, then words.
_TYPE_COLUMNS = ("project_id", "project.project_id", "cases.project.project_id", "type", "ONCOTREE_CODE")
_TYPE_COLUMNS += ("Oncotree Code", "CANCER_TYPE_ACRONYM", "TCGA PanCanAtlas Cancer Type Acronym", "Tumor")
_TYPE_COLUMNS += ("CANCER_TYPE_DETAILED", "Cancer Type Detailed", "primary_diagnosis", "diagnoses.primary_diagnosis")
_SLIDE_COLUMN, _SPECIMEN_COLUMN = "Slide_ID", "Specimen_Type"

_EVENT_COLUMNS = ("OS", "OS_STATUS", "Overall Survival Status", "vital_status", "demographic.vital_status")
_DAYS_COLUMNS = ("OS.time",)
_MONTHS_COLUMNS = ("OS_MONTHS", "Overall Survival (Months)")
_DEATH_COLUMNS = ("days_to_death", "demographic.days_to_death")
_ALIVE_COLUMNS = ("days_to_last_follow_up", "diagnoses.days_to_last_follow_up", "days_to_last_followup")
_DAYS_PER_MONTH = 365.25 / 12
_DEAD, _ALIVE = frozenset({"1", "1.0", "dead", "deceased"}), frozenset({"0", "0.0", "alive", "living"})


@dataclass
class Clinical:
    """What clinical tables say.

    Args:
        cancer_type (`dict`): case -> such as "LUAD".
        os_days (`dict`), os_event (`dict`): case -> days to death or to the last contact, and 1 for death.
        tissue (`dict`): slide -> "tumor" or "normal".
        conflicts (`list`): cases of which two tables tell different cancer types; they have none here.
    """

    cancer_type: dict[str, str] = field(default_factory=dict)
    os_days: dict[str, float] = field(default_factory=dict)
    os_event: dict[str, int] = field(default_factory=dict)
    tissue: dict[str, str] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)


def read_clinical(paths: Sequence[Path]) -> Clinical:
    """Reads one or several tables; of survival, the first table that tells it for a case is believed.

    Raises:
        ValueError: if a table has no column of cases, or none of its rows names one.
    """
    clinical = Clinical()
    types: dict[str, set[str]] = {}
    for path in paths:
        columns = read_columns(path)
        case_columns = [name for name in _CASE_COLUMNS if name in columns]
        if not case_columns:
            raise ValueError(f"{path}: expected a column of cases ({', '.join(_CASE_COLUMNS)}).")
        num_cases = 0
        for row in read_rows(path):
            case = next((case for case in (case_of(row[name]) for name in case_columns) if case), None)
            if case is None:
                continue
            num_cases += 1
            if (found := _first(row, _TYPE_COLUMNS, cancer_type_of)) is not None:
                types.setdefault(case, set()).add(found)
            _add_survival(clinical, case, row)
            _add_tissue(clinical, row)
        if not num_cases:
            raise ValueError(f"{path}: no cell of {', '.join(case_columns)} begins with a case of TCGA or CPTAC.")
    clinical.cancer_type = {case: next(iter(found)) for case, found in types.items() if len(found) == 1}
    clinical.conflicts = sorted(case for case, found in types.items() if len(found) > 1)
    return clinical


def cancer_type_of(cell: str) -> str | None:
    """A type's short name as TCGA has it: "LUAD" of "TCGA-LUAD", "LUSC" of "LSCC" or "Squamous cell carcinoma, NOS".

    Words are understood for lung only; `None` for what is not understood.
    """
    text = cell.strip()
    code = text.upper().removeprefix("TCGA-").removeprefix("CPTAC-")
    if code == "LSCC":  # CPTAC's name
        return "LUSC"
    if code.isalpha() and len(code) in (3, 4) and text.upper() == text:
        return code
    words = text.casefold()
    if "adenosquamous" in words:
        return None
    if "squamous" in words:
        return "LUSC"
    return "LUAD" if "adenocarcinoma" in words else None


def _add_survival(clinical: Clinical, case: str, row: Mapping[str, str]) -> None:
    event = _first(row, _EVENT_COLUMNS, _event_of)
    if event is None or case in clinical.os_days:
        return
    days = _first(row, _DAYS_COLUMNS, _number)
    if days is None and (months := _first(row, _MONTHS_COLUMNS, _number)) is not None:
        days = months * _DAYS_PER_MONTH
    if days is None:
        days = _first(row, _DEATH_COLUMNS if event else _ALIVE_COLUMNS, _number)
    if days is not None and days >= 0:
        clinical.os_days[case], clinical.os_event[case] = round(days, 1), event


def _add_tissue(clinical: Clinical, row: Mapping[str, str]) -> None:
    slide, specimen = row.get(_SLIDE_COLUMN, "").strip(), row.get(_SPECIMEN_COLUMN, "").casefold()
    if slide and (NORMAL in specimen or TUMOR in specimen):
        clinical.tissue[slide] = NORMAL if NORMAL in specimen else TUMOR


def _first(row: Mapping[str, str], columns: Iterable[str], read: Callable[[str], Any]) -> Any:
    cells = (row[name] for name in columns if name in row and not is_missing(row[name]))
    return next((value for value in map(read, cells) if value is not None), None)


def _event_of(cell: str) -> int | None:
    word = cell.strip().casefold().split(":")[-1]  # cBioPortal: "1:DECEASED"
    return 1 if word in _DEAD else 0 if word in _ALIVE else None


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
