# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl cohort`: downloaded TCGA and CPTAC slides and tables -> manifest, labels and splits."""

import argparse
import logging
import sys
from pathlib import Path

from .barcodes import FFPE, FROZEN
from .clinical_tables import read_clinical
from .cohort_splits import SPLIT_UNITS
from .cohort_tables import CohortSources, CohortSummary, write_cohort_tables
from .mutation_tables import read_mutations
from .report_tables import read_reports

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dre-slcl cohort`."""
    parser.description = (
        "Make manifest.csv, labels.csv and splits of slides that TCGA or CPTAC named, from the tables that they "
        "publish, as they are: slides and tables are joined by the case in the slides' names. Exit status: 0 "
        "complete, 3 some slides have other names and are left out, 1 failed."
    )
    paths = parser.add_argument_group("slides and tables")
    paths.add_argument("--slides", type=Path, nargs="+", required=True, metavar="DIR", help="folders of slides")
    paths.add_argument(
        "--reports", type=Path, metavar="CSV", help="TCGA_Reports.csv, or a table with the columns case_id and text"
    )
    paths.add_argument(
        "--clinical",
        type=Path,
        nargs="+",
        default=[],
        metavar="TABLE",
        help="tables with cancer type and survival: clinical.tsv of GDC, clinical tables of cBioPortal, TCGA-CDR; and "
        "CPTAC's tables of slides (Case_ID, Slide_ID, Specimen_Type), which tell tumour from normal tissue",
    )
    paths.add_argument(
        "--mutations", type=Path, nargs="+", default=[], metavar="TABLE", help="MAF files or cBioPortal's downloads"
    )
    paths.add_argument(
        "--genes", nargs="+", default=[], metavar="GENE", help="a label column 0/1 for each, from these"
    )
    paths.add_argument(
        "--sequenced",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="lists of sequenced cases, such as cBioPortal's case_lists/cases_sequenced.txt: without a mutation they "
        "have 0, while other cases stay empty (default: the cases in the MAF)",
    )
    paths.add_argument("--preparation", choices=(FFPE, FROZEN), help="only such slides (default: all)")
    paths.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    splits = parser.add_argument_group("splits; all slides of CPTAC are tested on, if there are TCGA's to train on")
    splits.add_argument("--test-fraction", type=float, default=0.2, help="share of the cases to test on (%(default)s)")
    splits.add_argument("--val-fraction", type=float, default=0.1, help="share for validation (%(default)s)")
    splits.add_argument(
        "--split-by",
        choices=SPLIT_UNITS,
        default="case",
        help="what stays together: the slides of a case, or all cases of a hospital (%(default)s)",
    )
    splits.add_argument("--seed", type=int, default=0, help="another number draws other cases (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs `dre-slcl cohort`; returns its exit status."""
    try:
        if bool(args.genes) != bool(args.mutations):
            raise ValueError("--genes and --mutations belong together: which genes, and the tables that tell.")
        sources = CohortSources(
            slides=args.slides,
            reports=read_reports(args.reports) if args.reports else {},
            clinical=read_clinical(args.clinical),
            mutations=read_mutations(args.mutations, args.genes, sequenced=args.sequenced),
            genes=args.genes,
            preparation=args.preparation,
        )
        summary = write_cohort_tables(
            sources,
            args.out,
            val_fraction=args.val_fraction,
            test_fraction=args.test_fraction,
            split_unit=args.split_by,
            seed=args.seed,
        )
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    for warning in summary.warnings:
        logger.warning("%s", warning)
    for item in summary.left_out:
        logger.warning("%s is left out: %s", item["path"], item["reason"])
    sys.stdout.write(_report(summary, args.out))
    return 3 if any("name" in item["reason"] for item in summary.left_out) else 0


def _report(summary: CohortSummary, out: Path) -> str:
    splits = ", ".join(f"{count} {split}" for split, count in summary.splits.items())
    lines = [f"{out}: {summary.num_slides} slides of {summary.num_cases} cases ({splits})"]
    lines.append(f"  report: {summary.num_reports} slides")
    for name, values in summary.values.items():
        counts = ", ".join(f"{value or 'unknown'} {count}" for value, count in values.items())
        lines.append(f"  {name}: {counts}")
    return "\n".join(lines) + "\n"
