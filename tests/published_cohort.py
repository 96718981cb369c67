# SPDX-License-Identifier: Apache-2.0
"""A synthetic lung cohort in the names and tables of TCGA, CPTAC, GDC and cBioPortal; all values are made up.

LUAD slides show tubules, LUSC slides solid nests, normal slides cords; EGFR is mutated where lymphocytes are brisk.
"""

import csv
import gzip
import uuid
from dataclasses import dataclass
from pathlib import Path

from training.demo.report_writer import write_report
from training.demo.slide_writer import write_slide
from training.demo.tissue_painter import MIN_SIDE_PX, SLIDE_MPP, CaseTraits, paint_slide

GENES = ("EGFR", "KRAS", "STK11", "TP53")
_SITES = ("05", "22", "44", "55", "69", "86")
_PATTERNS = {"LUAD": "tubular", "LUSC": "solid"}


@dataclass(frozen=True)
class Case:
    """A case: its barcode, "LUAD" or "LUSC", and its mutated genes, `None` if it was not sequenced."""

    case_id: str
    cancer_type: str
    mutated: tuple[str, ...] | None
    days: int
    is_dead: bool
    seed: int

    @property
    def traits(self) -> CaseTraits:
        """What its tumour slides show."""
        is_brisk = self.mutated is not None and "EGFR" in self.mutated
        return CaseTraits(self.case_id, _PATTERNS[self.cancer_type], is_brisk, False, False, self.seed % 3 + 1)


def tcga_cases(count: int) -> list[Case]:
    """`count` cases, LUAD and LUSC in turn, each site with both; every seventh was not sequenced."""
    cases = []
    for place in range(count):
        site = _SITES[place // 2 % len(_SITES)]
        genes = tuple(gene for number, gene in enumerate(GENES) if (3 * place + 2 * number) % 5 < 2)
        mutated = None if place % 7 == 6 else genes
        case_id = f"TCGA-{site}-{4000 + place}"
        cases.append(Case(case_id, ("LUAD", "LUSC")[place % 2], mutated, 100 + 37 * place, place % 3 == 0, place))
    return cases


def cptac_cases(count: int) -> list[Case]:
    """`count` cases of CPTAC, LUAD and LUSC in turn."""
    return [
        Case(f"C3L-{100 + place:05d}", ("LUAD", "LUSC")[place % 2], ("TP53",), 200, False, 500 + place)
        for place in range(count)
    ]


def tcga_slide_name(case: Case, kind: str) -> str:
    """A file's stem; `kind` is what follows the case, such as "01Z-00-DX1"."""
    return f"{case.case_id}-{kind}.{uuid.uuid5(uuid.NAMESPACE_URL, case.case_id + kind)}"


def paint(path: Path, case: Case, *, is_normal: bool = False) -> None:
    """Paints a slide of a case to a file."""
    traits = case.traits
    if is_normal:
        traits = CaseTraits(case.case_id, "trabecular", False, False, False, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = paint_slide(traits, path.stem, seed=case.seed, side_range_px=(MIN_SIDE_PX, MIN_SIDE_PX))
    write_slide(path, pixels, mpp=SLIDE_MPP)


def write_reports(path: Path, cases: list[Case]) -> Path:
    """TCGA_Reports.csv."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["patient_filename", "text"])
        for case in cases:
            writer.writerow([f"{case.case_id}.{uuid.uuid4()}", write_report(case.traits, seed=case.seed)])
    return path


def write_gdc_clinical(path: Path, cases: list[Case]) -> Path:
    """clinical.tsv of GDC: two rows per case, one per treatment."""
    columns = ["case_id", "case_submitter_id", "project_id", "days_to_death", "gender", "vital_status"]
    columns += ["days_to_last_follow_up", "primary_diagnosis", "treatment_type"]
    diagnosis = {"LUAD": "Adenocarcinoma, NOS", "LUSC": "Squamous cell carcinoma, NOS"}
    lines = ["\t".join(columns)]
    for case in cases:
        death, alive = (str(case.days), "'--") if case.is_dead else ("'--", str(case.days))
        cells = [str(uuid.uuid4()), case.case_id, f"TCGA-{case.cancer_type}", death, "'--"]
        cells += ["Dead" if case.is_dead else "Alive", alive, diagnosis[case.cancer_type]]
        lines += ["\t".join([*cells, treatment]) for treatment in ("Radiation Therapy, NOS", "Surgery")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_maf(path: Path, cases: list[Case]) -> Path:
    """A MAF of GDC, packed: comments, then a row per variant; every sequenced case has a silent variant of TTN."""
    columns = ["Hugo_Symbol", "Entrez_Gene_Id", "Center", "NCBI_Build", "Chromosome", "Variant_Classification"]
    columns += ["Variant_Type", "Tumor_Sample_Barcode", "Matched_Norm_Sample_Barcode", "HGVSp_Short", "Consequence"]
    lines = ["#version gdc-1.0.0", '#annotation.spec "gdc"', "\t".join(columns)]
    for case in (case for case in cases if case.mutated is not None):
        sample = f"{case.case_id}-01A-01D-1105-08\t{case.case_id}-10A-01D-1105-08"
        lines.append(f'TTN\t7273\tBI\tGRCh38\tchr2\tSilent\tSNP\t{sample}\tp.A1="\tsynonymous_variant')
        lines += [
            f"{gene}\t1\tBI\tGRCh38\tchr7\tMissense_Mutation\tSNP\t{sample}\tp.L858R\tmissense_variant"
            for gene in case.mutated
        ]
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.write("\n".join(lines) + "\n")
    return path


def write_cbioportal_mutations(path: Path, cases: list[Case], *, suffix: str = "") -> Path:
    """mutations.txt of cBioPortal's download page."""
    lines = ["\t".join(["STUDY_ID", "SAMPLE_ID", *GENES])]
    for case in cases:
        cells = ["NS" if case.mutated is None else "R175H" if gene in case.mutated else "WT" for gene in GENES]
        lines.append("\t".join(["lung_study", f"{case.case_id}{suffix}", *cells]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_cptac_slides(path: Path, cases: list[Case]) -> Path:
    """CPTAC's table of slides from the Cancer Imaging Archive: slide -21 shows tumour, -26 normal tissue."""
    types = {"LUAD": "LUAD", "LUSC": "LSCC"}
    lines = ["Case_ID,Tumor,Slide_ID,Specimen_ID,Specimen_Type,Topographic_Site"]
    for case in cases:
        for number, specimen in ((21, "tumor_tissue"), (26, "normal_tissue")):
            slide = f"{case.case_id}-{number}"
            lines.append(f"{case.case_id},{types[case.cancer_type]},{slide},{case.case_id}-0{number},{specimen},Lung")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
