# SPDX-License-Identifier: Apache-2.0
"""Reads pathology reports: TCGA-Reports as it is published, or any table with a column of cases and one of texts.

TCGA-Reports (Kefeli and Tatonetti, Patterns 2024, doi 10.1016/j.patter.2024.100933) is one CSV file with the columns
`patient_filename`, such as `TCGA-BP-5195.25c0b433-5557-4165-922e-2c1eac9c26f0`, and `text`, a report each.
"""

from pathlib import Path

from .barcodes import case_of
from .published_tables import is_missing, read_columns, read_rows

_CASE_COLUMNS = ("patient_filename", "case_id", "Case_ID", "patient_id", "PATIENT_ID", "submitter_id")
_TEXT_COLUMNS = ("text", "report", "report_text")


def read_reports(path: Path) -> dict[str, str]:
    """Reads the reports of cases.

    Args:
        path (`Path`): the table.

    Returns:
        `dict[str, str]`: case -> report, with white space made single; several reports of a case follow each other.

    Raises:
        ValueError: if a column is missing, or no row names a case.
    """
    columns = read_columns(path)
    case_column = next((name for name in _CASE_COLUMNS if name in columns), None)
    text_column = next((name for name in _TEXT_COLUMNS if name in columns), None)
    if case_column is None or text_column is None:
        raise ValueError(
            f"{path}: expected reports with the columns `patient_filename` and `text`, as in TCGA-Reports, found "
            f"{', '.join(columns[:12])}."
        )
    texts: dict[str, list[str]] = {}
    for row in read_rows(path):
        case, text = case_of(row[case_column]), " ".join(row[text_column].split())
        if case is not None and not is_missing(text) and text not in texts.setdefault(case, []):
            texts[case].append(text)
    if not texts:
        raise ValueError(f"{path}: no cell of `{case_column}` begins with a case of TCGA or CPTAC.")
    return {case: "\n".join(parts) for case, parts in texts.items() if parts}
