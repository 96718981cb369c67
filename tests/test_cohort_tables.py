# SPDX-License-Identifier: Apache-2.0
"""Published tables -> manifest, labels and splits, against what the synthetic cohort is made of."""

import csv
import json

import pandas as pd
import pytest

from dre_slcl.training.cohort.barcodes import case_of, parse_slide_name
from dre_slcl.training.cohort.clinical_tables import cancer_type_of, read_clinical
from dre_slcl.training.cohort.cohort_splits import split_cases
from dre_slcl.training.cohort.mutation_tables import read_mutations
from dre_slcl.training.cohort.report_tables import read_reports
from dre_slcl.training.manifest import read_manifest
from dre_slcl_cli import main

from . import published_cohort as published


@pytest.fixture
def cohort(tmp_path):
    """Empty files with the names of slides, and the tables of their archives."""
    tcga, cptac = published.tcga_cases(20), published.cptac_cases(4)
    for place, case in enumerate(tcga):
        folder = tmp_path / "slides" / f"{place:08d}-uuid"  # as gdc-client downloads
        folder.mkdir(parents=True)
        for kind in ("01Z-00-DX1", "01A-01-TS1", *(["11A-01-TS1"] if place < 8 else [])):
            (folder / f"{published.tcga_slide_name(case, kind)}.svs").touch()
    for case in cptac:
        for number in (21, 26):
            (tmp_path / "slides" / f"{case.case_id}-{number}.svs").touch()
    (tmp_path / "slides" / "our-hospital-7.svs").touch()
    published.write_reports(tmp_path / "TCGA_Reports.csv", tcga)
    published.write_gdc_clinical(tmp_path / "clinical.tsv", tcga)
    published.write_cptac_slides(tmp_path / "cptac.csv", cptac)
    published.write_maf(tmp_path / "tcga.maf.gz", tcga)
    published.write_cbioportal_mutations(tmp_path / "mutations.txt", cptac)
    return tmp_path, {case.case_id: case for case in [*tcga, *cptac]}


def run_command(folder, *more):
    arguments = ["--slides", folder / "slides", "--reports", folder / "TCGA_Reports.csv", "--out", folder / "out"]
    arguments += ["--clinical", folder / "clinical.tsv", folder / "cptac.csv", "--genes", *published.GENES]
    arguments += ["--mutations", folder / "tcga.maf.gz", folder / "mutations.txt", *more]
    return main(["cohort", *map(str, arguments)])


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_every_slide_gets_what_its_tables_say(cohort, capsys):
    folder, cases = cohort
    assert run_command(folder) == 3  # the hospital's own slide is in none of them
    rows = rows_of(folder / "out" / "manifest.csv")
    assert len(rows) == 20 * 2 + 8 + 4 * 2
    reports = {row["patient_filename"][:12]: row["text"] for row in rows_of(folder / "TCGA_Reports.csv")}
    for row in rows:
        case = cases[row["case_id"]]
        assert row["slide_id"].startswith(case.case_id)
        is_normal = "-11A-" in row["slide_id"] or row["slide_id"].endswith("-26")
        assert row["tissue"] == ("normal" if is_normal else "tumor")
        assert row["preparation"] == ("ffpe" if "-DX1" in row["slide_id"] else "frozen")
        assert row["tissue_frozen"] == ("" if row["preparation"] == "ffpe" else row["tissue"])
        assert row["site"] == (row["case_id"][5:7] if row["program"] == "TCGA" else "CPTAC")
        assert row["subtype"] == ("" if is_normal else case.cancer_type)
        assert row["report"] == ("" if is_normal else reports.get(case.case_id, ""))
        for gene in published.GENES:
            is_unknown = is_normal or case.mutated is None
            assert row[gene] == ("" if is_unknown else str(int(gene in case.mutated)))
        if row["program"] == "TCGA" and not is_normal:
            assert (float(row["os_days"]), row["os_event"]) == (case.days, str(int(case.is_dead)))
    summary = json.loads((folder / "out" / "cohort.json").read_text())
    assert summary["left_out"] == [{"path": "our-hospital-7.svs", "reason": "its name is neither TCGA's nor CPTAC's"}]
    assert summary["values"]["tissue"] == {"normal": 12, "tumor": 44}
    assert summary["num_reports"] == 40
    assert any("frozen sections" in warning for warning in summary["warnings"])
    assert "subtype: unknown 12, LUAD 22, LUSC 22" in capsys.readouterr().out


def test_the_manifest_is_one_that_tiling_reads_and_labels_are_its_columns(cohort):
    folder, _ = cohort
    run_command(folder, "--preparation", "frozen")
    rows = read_manifest(folder / "out" / "manifest.csv")
    assert all(row.path.is_file() and "DX1" not in row.slide_id for row in rows)
    assert not json.loads((folder / "out" / "cohort.json").read_text())["warnings"]
    labels = rows_of(folder / "out" / "labels.csv")
    assert [row["slide_id"] for row in labels] == [row.slide_id for row in rows]
    assert set(labels[0]) == {"slide_id", "case_id", *rows[0].labels}
    assert all(row.split == "test" for row in rows if row.labels["program"] == "CPTAC")


def test_split_files_hold_every_slide_once_and_cases_and_sites_whole(cohort):
    folder, _ = cohort
    run_command(folder, "--split-by", "site", "--val-fraction", "0.2", "--test-fraction", "0.3")
    rows = {row["slide_id"]: row for row in rows_of(folder / "out" / "manifest.csv")}
    heldout = pd.read_csv(folder / "out" / "splits" / "heldout.csv", index_col=0)
    assert list(heldout) == ["train", "val", "test"]
    slides = {split: set(heldout[split].dropna()) for split in heldout}
    assert all(slides.values())
    assert sum(map(len, slides.values())) == sum(row["program"] == "TCGA" for row in rows.values())
    sites = [{rows[slide]["site"] for slide in slides[split]} for split in heldout]
    assert len(set.union(*sites)) == sum(map(len, sites))
    external = pd.read_csv(folder / "out" / "splits" / "external.csv", index_col=0)
    assert {rows[slide]["program"] for slide in external["test"].dropna()} == {"CPTAC"}
    assert set(external["train"].dropna()) == set().union(*slides.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("TCGA-05-4244-01Z-00-DX1.d4ff32cd-38cf-40ea-8213-45c2b100ac01", ("TCGA-05-4244", "05", "tumor", "ffpe")),
        ("TCGA-05-4244-11A-01-BS1.4b2e", ("TCGA-05-4244", "05", "normal", "frozen")),
        ("TCGA-MP-A4T4-02A-01-TSA", ("TCGA-MP-A4T4", "MP", "tumor", "frozen")),
        ("C3N-00169-22", ("C3N-00169", "CPTAC", None, "frozen")),
        ("11LU013-34", ("11LU013", "CPTAC", None, "frozen")),
        ("TCGA-05-4244", None),
        ("TCGA-05-42445-01Z-00-DX1", None),
        ("slide-7", None),
    ],
)
def test_names_of_slides(name, expected):
    found = parse_slide_name(name)
    assert (found and (found.case_id, found.site, found.tissue, found.preparation)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("TCGA-BP-5195.25c0b433-5557-4165-922e-2c1eac9c26f0", "TCGA-BP-5195"),
        ("TCGA-05-4244-01A-01D-1105-08", "TCGA-05-4244"),
        ("C3L-00001", "C3L-00001"),
        ("6b960b58-28e1-41c0-bd6d-7e669c6aa4ef", None),
        ("TCGA-05-42444", None),
    ],
)
def test_cases_of_barcodes(text, expected):
    assert case_of(text) == expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        *(("TCGA-LUAD", "LUAD"), ("LUSC", "LUSC"), ("LSCC", "LUSC"), ("TCGA-BRCA", "BRCA"), ("CPTAC-3", None)),
        *(("Lung Squamous Cell Carcinoma", "LUSC"), ("Adenocarcinoma, NOS", "LUAD"), ("Lung Adenocarcinoma", "LUAD")),
        *(("Adenosquamous carcinoma", None), ("primary", None)),
    ],
)
def test_cancer_types(cell, expected):
    assert cancer_type_of(cell) == expected


def test_a_maf_and_the_portals_table_of_the_same_cases_agree(tmp_path):
    cases = published.tcga_cases(15)
    maf = read_mutations([published.write_maf(tmp_path / "a.maf.gz", cases)], published.GENES)
    table = read_mutations(
        [published.write_cbioportal_mutations(tmp_path / "mutations.txt", cases, suffix="-01")], published.GENES
    )
    unknown = [case.case_id for case in cases if case.mutated is None]
    assert unknown
    assert {case: table.pop(case) for case in unknown} == dict.fromkeys(
        unknown, dict.fromkeys(published.GENES)
    )  # a MAF does not even name them
    assert maf == table
    everyone = tmp_path / "cases_sequenced.txt"
    everyone.write_text("stable_id: x_sequenced\ncase_list_ids: " + "\t".join(f"{case}-01" for case in unknown) + "\n")
    known = read_mutations([tmp_path / "a.maf.gz"], published.GENES, sequenced=[everyone])
    assert all(known[case] == dict.fromkeys(published.GENES, 0) for case in unknown)
    assert {case: genes for case, genes in known.items() if case not in unknown} == maf


def test_the_portals_clinical_tables_say_what_gdcs_says(tmp_path):
    cases = published.tcga_cases(9)
    gdc = read_clinical([published.write_gdc_clinical(tmp_path / "clinical.tsv", cases)])
    patients = ["#Patient Identifier\tOverall Survival", "#STRING\tNUMBER", "PATIENT_ID\tOS_MONTHS\tOS_STATUS"]
    samples = ["#Patient", "PATIENT_ID\tSAMPLE_ID\tONCOTREE_CODE\tCANCER_TYPE_DETAILED"]
    for case in cases:
        status = "1:DECEASED" if case.is_dead else "0:LIVING"
        patients.append(f"{case.case_id}\t{case.days / (365.25 / 12)}\t{status}")
        samples.append(f"{case.case_id}\t{case.case_id}-01\t{case.cancer_type}\tunknown")
    paths = [tmp_path / "data_clinical_patient.txt", tmp_path / "data_clinical_sample.txt"]
    for path, lines in zip(paths, (patients, samples), strict=True):
        path.write_text("\n".join(lines) + "\n")
    assert read_clinical(paths) == gdc


def test_tables_that_disagree_leave_a_case_without_a_type(tmp_path):
    published.write_gdc_clinical(tmp_path / "a.tsv", published.tcga_cases(2))
    (tmp_path / "b.csv").write_text("case_id,type\nTCGA-05-4000,LUSC\nTCGA-05-4001,LUSC\n")
    clinical = read_clinical([tmp_path / "a.tsv", tmp_path / "b.csv"])
    assert clinical.conflicts == ["TCGA-05-4000"]
    assert clinical.cancer_type == {"TCGA-05-4001": "LUSC"}


def test_reports_of_a_case_are_joined_and_their_line_breaks_are_spaces(tmp_path):
    path = tmp_path / "TCGA_Reports.csv"
    path.write_text(
        'patient_filename,text\nTCGA-05-4000.A1,"Lung,\n ""right""."\nTCGA-05-4000.B2,Addendum.\n'
        "TCGA-05-4001.C3,\nTCGA-05-4000.D4,Addendum.\n"
    )
    assert read_reports(path) == {"TCGA-05-4000": 'Lung, "right".\nAddendum.'}


def test_splits_depend_on_names_and_seed_only_and_keep_their_shares():
    sites = {f"TCGA-{place % 7:02d}-{4000 + place}": f"{place % 7:02d}" for place in range(200)}
    split = split_cases(sites, val_fraction=0.1, test_fraction=0.2)
    shuffled = dict(sorted(sites.items(), key=lambda item: hash(item)))
    assert split_cases(shuffled, val_fraction=0.1, test_fraction=0.2) == split
    assert split_cases(sites, val_fraction=0.1, test_fraction=0.2, seed=1) != split
    counts = pd.Series(split).value_counts()
    assert counts.to_dict() == {"train": 140, "test": 40, "val": 20}
    by_site = split_cases(sites, val_fraction=0.1, test_fraction=0.3, unit="site")
    assert len({(sites[case], part) for case, part in by_site.items()}) == 7
    with pytest.raises(ValueError, match="too few"):
        split_cases({"a": "x", "b": "x"}, unit="site", test_fraction=0.5)


@pytest.mark.parametrize(
    ("name", "text", "arguments", "message"),
    [
        ("r.csv", "file,body\na,b\n", ["--reports"], "patient_filename"),
        ("r.csv", "patient_filename,text\nsomebody,b\n", ["--reports"], "begins with a case"),
        ("c.tsv", "name\tage\nTCGA-05-4000\t5\n", ["--clinical"], "column of cases"),
        ("c.tsv", "case_id\tage\n17\t5\n", ["--clinical"], "begins with a case"),
        ("c.csv", "case_id,age\nTCGA-05-4000,5,6\n", ["--clinical"], "row 1: 3 fields"),
        ("m.txt", "SAMPLE_ID\tBRAF\nTCGA-05-4000\tWT\n", ["--genes", "EGFR", "--mutations"], "expected a MAF"),
        ("m.txt", "SAMPLE_ID\tEGFR\nx\tWT\n", ["--genes", "EGFR", "--mutations"], "names no case"),
        ("m.txt", "SAMPLE_ID\tEGFR\nC3L-00001\tWT\n", ["--genes", "EGFR", "KRSA", "--mutations"], "KRSA: in none"),
        ("m.txt", "SAMPLE_ID\tEGFR\nC3L-00001\tWT\n", ["--mutations"], "belong together"),
    ],
)
def test_what_is_no_such_table_is_named(tmp_path, caplog, name, text, arguments, message):
    (tmp_path / "C3L-00001-21.svs").touch()
    (tmp_path / name).write_text(text)
    common = ["--slides", str(tmp_path), "--out", str(tmp_path / "out"), "--test-fraction", "0"]
    assert main(["cohort", *common, *arguments, str(tmp_path / name)]) == 1
    assert message in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_folder_without_such_slides_and_a_slide_twice_are_refused(tmp_path, caplog):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "slide-1.svs").touch()
    common = ["cohort", "--slides", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(common) == 1
    assert "expected slides named as TCGA's" in caplog.text
    for folder in ("one", "two"):
        (tmp_path / folder / "TCGA-05-4244-01Z-00-DX1.uuid.svs").touch()
    assert main(common) == 1
    assert "may occur once" in caplog.text
