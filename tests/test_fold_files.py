# SPDX-License-Identifier: Apache-2.0
"""Published folds, laid out as their tools write them, give the parts that stand in them."""

import csv

import numpy as np
import pytest

from dre_slcl.training.evaluation.embedding_table import make_table
from dre_slcl.training.evaluation.fold_files import match_folds, read_fold_files

# Slide -> its part; two slides a case.
PARTS = {f"s{number}": ("train", "train", "val", "test", "train")[number // 2] for number in range(10)}
TABLE = make_table("slides", list(PARTS), [f"c{number // 2}" for number in range(10)], np.eye(10))


def write(path, rows, delimiter=","):
    with path.open("w", newline="") as handle:
        csv.writer(handle, delimiter=delimiter).writerows(rows)
    return path


def write_clam(folder, number, parts=PARTS):
    """As `save_splits` of CLAM: an index without a name, columns of different lengths, padded with empty cells."""
    columns = [[slide for slide, part in parts.items() if part == name] for name in ("train", "val", "test")]
    longest = max(map(len, columns))
    rows = [[row, *(column[row] if row < len(column) else "" for column in columns)] for row in range(longest)]
    return write(folder / f"splits_{number}.csv", [["", "train", "val", "test"], *rows])


def write_clam_bool(folder, number, parts=PARTS):
    rows = [[slide, *(part == name for name in ("train", "val", "test"))] for slide, part in parts.items()]
    return write(folder / f"splits_{number}_bool.csv", [["", "train", "val", "test"], *rows])


def parts_of(fold, table=TABLE):
    rows = {"train": fold.train, "val": fold.validation, "test": fold.test}
    return {table.ids[row]: part for part, places in rows.items() for row in places}


def test_clam(tmp_path):
    turned = {slide: {"train": "test", "test": "train"}.get(part, part) for slide, part in PARTS.items()}
    paths = [write_clam(tmp_path, 0), write_clam(tmp_path, 10, turned)]
    write_clam_bool(tmp_path, 0)
    write(tmp_path / "splits_0_descriptor.csv", [["", "train", "val", "test"], ["LUAD", 3, 1, 1]])
    folds, report = match_folds(read_fold_files(paths), TABLE)
    assert [fold.name for fold in folds] == ["0", "10"]
    assert (parts_of(folds[0]), parts_of(folds[1])) == (PARTS, turned)
    assert (report["origin"], report["ids_without_item"], report["items_in_no_fold"]) == ("CLAM", 0, 0)
    of_folder, _ = match_folds(read_fold_files([tmp_path]), TABLE)
    assert [parts_of(fold) for fold in of_folder] == [PARTS, turned]
    (boolean,), _ = match_folds(read_fold_files([write_clam_bool(tmp_path, 3, turned)]), TABLE)
    assert (boolean.name, parts_of(boolean)) == ("3", turned)


def test_patho_bench(tmp_path):
    rows = [["case_id", "slide_id", "BAP1_mutation", "fold_0", "fold_1", "fold_10"]]
    for slide, part in PARTS.items():
        first = "train" if part == "val" else part
        rows.append([f"c{int(slide[1]) // 2}", f"{slide}.svs", 1, first, "test" if part == "val" else "train", ""])
    rows[1][5], rows[2][5], rows[3][5] = "train", "train", "test"
    folds, report = match_folds(read_fold_files([write(tmp_path / "k=all.tsv", rows, "\t")]), TABLE)
    assert [fold.name for fold in folds] == ["0", "1", "10"]
    assert parts_of(folds[0]) == {slide: "train" if part == "val" else part for slide, part in PARTS.items()}
    assert parts_of(folds[1]) == {slide: "test" if part == "val" else "train" for slide, part in PARTS.items()}
    assert parts_of(folds[2]) == {"s0": "train", "s1": "train", "s2": "test"}
    assert report["origin"] == "Patho-Bench"


def test_titan(tmp_path):
    for part in ("train", "val", "test"):
        rows = [[slide, f"c{int(slide[1]) // 2}", "LUAD", "05"] for slide, of in PARTS.items() if of == part]
        write(tmp_path / f"tcga-ot_{part}.csv", [["slide_id", "case_id", "OncoTreeCode", "site"], *rows])
    paths = [tmp_path / f"tcga-ot_{part}.csv" for part in ("train", "val", "test")]
    (fold,), report = match_folds(read_fold_files(paths), TABLE)
    assert (fold.name, parts_of(fold), report["origin"]) == ("tcga-ot", PARTS, "TITAN")
    with pytest.raises(
        ValueError, match=r"Every fold needs a training and a test part. Found 1: fold tcga-ot \(test\)"
    ):
        read_fold_files(paths[:2])


def test_ours_by_slide_and_by_case(tmp_path):
    by_case = [["case_id", "split"], *([f"c{case}", PARTS[f"s{2 * case}"]] for case in range(5))]
    (fold,), _ = match_folds(read_fold_files([write(tmp_path / "cases.csv", by_case)]), TABLE)
    assert parts_of(fold) == PARTS
    names = {"val": "validation"}
    by_slide = [["slide_id", "split"], *([slide, names.get(part, part)] for slide, part in PARTS.items())]
    path = write(tmp_path / "slides.csv", by_slide)
    (fold,), _ = match_folds(read_fold_files([path]), TABLE)
    assert parts_of(fold) == PARTS
    # Items that are cases, folds that name slides.
    cases = make_table("cases", [f"c{case}" for case in range(5)], [f"c{case}" for case in range(5)], np.eye(5))
    case_of = {slide: f"c{int(slide[1]) // 2}" for slide in PARTS}
    (fold,), report = match_folds(read_fold_files([path]), cases, case_of)
    assert parts_of(fold, cases) == {f"c{case}": PARTS[f"s{2 * case}"] for case in range(5)}
    assert report["ids_without_item"] == 0


def test_a_case_in_two_parts_is_refused_and_unknown_ids_are_told(tmp_path):
    torn = {**PARTS, "s1": "test"}
    with pytest.raises(ValueError, match=r"fold 0: case c0 in train and test"):
        match_folds(read_fold_files([write_clam(tmp_path, 0, torn)]), TABLE)
    some = {slide: part for slide, part in PARTS.items() if slide not in ("s0", "s1")} | {"elsewhere": "train"}
    folds, report = match_folds(read_fold_files([write_clam(tmp_path, 0, some)]), TABLE)
    assert (report["ids_without_item"], report["such_as"], report["items_in_no_fold"]) == (1, ["elsewhere"], 2)
    assert 0 not in np.concatenate([folds[0].train, folds[0].validation, folds[0].test])
    strange = {f"x{slide}": part for slide, part in PARTS.items()}
    with pytest.raises(ValueError, match="No item of the training or the test part"):
        match_folds(read_fold_files([write_clam(tmp_path, 1, strange)]), TABLE)


def test_what_is_no_fold_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected train, val, test \(CLAM\), fold_0"):
        read_fold_files([write(tmp_path / "labels.csv", [["slide_id", "label"], ["s0", "x"]])])
    with pytest.raises(ValueError, match=r"must hold train, val, test or nothing. Found 1: row 2: 'holdout'"):
        read_fold_files([write(tmp_path / "s.csv", [["slide_id", "split"], ["s0", "train"], ["s1", "holdout"]])])
    with pytest.raises(ValueError, match=r"holds no splits_0.csv"):
        read_fold_files([tmp_path])
