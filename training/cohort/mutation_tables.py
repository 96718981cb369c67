# SPDX-License-Identifier: Apache-2.0
"""Reads which genes of a case are mutated: 1, 0, or unknown because the case was not sequenced.

Understood as they are:
- MAF files (GDC, MC3, `data_mutations.txt` of cBioPortal): a row per variant, with `Hugo_Symbol`,
  `Variant_Classification` and `Tumor_Sample_Barcode`. A gene is mutated if it has a variant that changes the protein.
  A MAF names no case without variants: those that were sequenced and have none come from `sequenced`.
- Tables with a column per gene: cBioPortal's download, whose cells are `WT`, `NS` or `NP` (not sequenced) or the
  change, or a user's own with 0, 1 and empty cells.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from .barcodes import case_of, is_normal_sample
from .published_tables import is_missing, read_columns, read_rows

PROTEIN_CHANGING = frozenset(
    {"Missense_Mutation", "Nonsense_Mutation", "Frame_Shift_Del", "Frame_Shift_Ins", "In_Frame_Del", "In_Frame_Ins"}
    | {"Splice_Site", "Translation_Start_Site", "Nonstop_Mutation"}
)
_MAF_COLUMNS = ("Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode")
_SAMPLE_COLUMNS = ("SAMPLE_ID", "Sample ID", "PATIENT_ID", "Patient ID", "case_id", "Case_ID", "patient_id")
_WILD_TYPE, _NOT_SEQUENCED = frozenset({"wt", "0", "0.0", "false", "no"}), frozenset({"ns", "np"})

Mutations = dict[str, dict[str, int | None]]


def read_mutations(paths: Sequence[Path], genes: Sequence[str], *, sequenced: Sequence[Path] = ()) -> Mutations:
    """Reads the mutations of cases from one or several files.

    Args:
        paths (sequence of `Path`): MAF files or tables with a column per gene; a case mutated in one of them is.
        genes (sequence of `str`): Hugo symbols.
        sequenced (sequence of `Path`, *optional*): files that list the sequenced cases or samples, such as
            cBioPortal's `case_lists/cases_sequenced.txt`; without them those that a MAF names.

    Returns:
        `dict[str, dict[str, int | None]]`: case -> gene -> 1, 0 or `None` for not known.

    Raises:
        ValueError: if a file is neither, a gene occurs in no file, or a file names no case.
    """
    found: Mutations = {}
    seen: set[str] = set()
    for path in paths:
        columns = read_columns(path)
        if all(name in columns for name in _MAF_COLUMNS):
            cases = _read_maf(path, genes, found, seen)
        elif any(gene in columns for gene in genes):
            cases = _read_matrix(path, columns, genes, found, seen)
        else:
            raise ValueError(
                f"{path}: expected a MAF with the columns {', '.join(_MAF_COLUMNS)}, or a table with a column for "
                f"{', '.join(genes)}, found {', '.join(columns[:12])}."
            )
        if not cases:
            raise ValueError(f"{path}: names no case of TCGA or CPTAC.")
    if absent := [gene for gene in genes if gene not in seen]:
        raise ValueError(f"{', '.join(absent)}: in none of the mutation files. Genes are given by their Hugo symbol.")
    for case in {case for path in sequenced for case in _read_case_list(path)}:
        _set(found, case, dict.fromkeys(genes, 0))
    return found


def _read_maf(path: Path, genes: Sequence[str], found: Mutations, seen: set[str]) -> int:
    num_cases = 0
    for row in read_rows(path):
        barcode = row["Tumor_Sample_Barcode"]
        case = case_of(barcode)
        if case is None or is_normal_sample(barcode):
            continue
        num_cases += 1
        gene = row["Hugo_Symbol"]
        seen.update({gene} & set(genes))
        is_mutated = gene in genes and row["Variant_Classification"] in PROTEIN_CHANGING
        _set(found, case, dict.fromkeys(genes, 0) | ({gene: 1} if is_mutated else {}))
    return num_cases


def _read_matrix(path: Path, columns: list[str], genes: Sequence[str], found: Mutations, seen: set[str]) -> int:
    id_columns = [name for name in _SAMPLE_COLUMNS if name in columns]
    present = [gene for gene in genes if gene in columns]
    seen.update(present)
    num_cases = 0
    for row in read_rows(path):
        case = next((case for case in (case_of(row[name]) for name in id_columns) if case), None)
        if case is not None:
            num_cases += 1
            _set(found, case, {gene: _mutated(row[gene]) for gene in present})
    return num_cases


def _set(found: Mutations, case: str, values: dict[str, int | None]) -> None:
    """Adds what is known: mutated in one sample of the case is mutated, and unknown gives way to known."""
    of_case = found.setdefault(case, {})
    for gene, value in values.items():
        known = of_case.get(gene)
        of_case[gene] = known if value is None else max(value, known or 0)


def _mutated(cell: str) -> int | None:
    text = cell.strip().casefold()
    if is_missing(text) or text in _NOT_SEQUENCED:
        return None
    return 0 if text in _WILD_TYPE else 1


def _read_case_list(path: Path) -> set[str]:
    """The cases that a text file names, wherever in it."""
    text = path.read_text(encoding="utf-8-sig")
    cases = {case for case in map(case_of, re.split(r"[\s,;:\"]+", text)) if case is not None}
    if not cases:
        raise ValueError(f"{path}: expected a list of sequenced cases, but it names none of TCGA or CPTAC.")
    return cases
