# SPDX-License-Identifier: Apache-2.0
"""The manifest: other tools' names are understood, ids stay text, and every mistake is named with all offenders."""

import collections
import hashlib
import json
import logging
import os
from pathlib import Path

import datasets
import pandas as pd
import pytest

from dre_slcl.training.manifest import ManifestRow, assign_splits, find_slides, read_manifest
from dre_slcl.training.manifest_checks import is_safe_id

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def write(folder, text, name="manifest.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def make_rows(num_cases, split=None):
    return [
        ManifestRow(f"s{i}", Path(f"s{i}.svs"), f"s{i}.svs", f"c{i // 2}", split=split) for i in range(num_cases * 2)
    ]


def test_ids_stay_text_and_defaults_are_filled(tmp_path):
    path = write(tmp_path, "slide_id,path,mpp,report\n007,a/x.svs,0.25,\n008,y.svs,,Benign.\n")
    first, second = read_manifest(path)
    assert (first.slide_id, first.case_id, first.mpp, first.report, first.split) == ("007", "007", 0.25, "", None)
    assert (first.path, first.stored_path) == (tmp_path / "a" / "x.svs", "a/x.svs")
    assert (second.mpp, second.report, second.labels) == (None, "Benign.", {})


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("sample_id,image_path,spacing_at_level_0,patient_id", "01,01.svs,0.5,p1"),  # slide2vec
        ("slide_id,wsi_path,mpp,PATIENT", "01,01.svs,0.5,p1"),
        ("slide_id,slide_path,mpp,pat_id", "01,01.svs,0.5,p1"),
        ("wsi,mpp,case_id", "01.svs,0.5,p1"),  # TRIDENT: the id is the stem
        ("FILENAME,mpp,PATIENT", "01.svs,0.5,p1"),  # STAMP
    ],
)
def test_column_names_of_other_tools(tmp_path, header, values):
    (row,) = read_manifest(write(tmp_path, f"{header}\n{values}\n"))
    assert (row.slide_id, row.path, row.case_id, row.mpp) == ("01", tmp_path / "01.svs", "p1", 0.5)


def test_clam_table_without_paths_finds_slides_by_stem(tmp_path):
    (tmp_path / "slides" / "sub").mkdir(parents=True)
    (tmp_path / "slides" / "sub" / "01.svs").touch()
    (tmp_path / "slides" / "02.tiff").touch()
    table = write(tmp_path, "case_id,slide_id,label\np1,01,tumor\np2,02,normal\n")
    rows = read_manifest(table, slides_root=tmp_path / "slides")
    assert [row.stored_path for row in rows] == ["sub/01.svs", "02.tiff"]
    table = write(tmp_path, "case_id,slide_id,label\np1,01,tumor\np2,03,normal\n")
    with pytest.raises(ValueError, match="03: 0 files"):
        read_manifest(table, slides_root=tmp_path / "slides")


def test_text_tables_in_all_dialects_are_equal(tmp_path):
    frame = pd.DataFrame(
        {"slide_id": ["01", "02"], "path": ["a.svs", "b.svs"], "report": ['He said "x", y', "two\nlines"]}
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_csv(tmp_path / "b.csv", index=False, sep=";", encoding="utf-8-sig")
    frame.to_parquet(tmp_path / "a.parquet")
    tables = [read_manifest(tmp_path / name) for name in ("a.csv", "a.tsv", "b.csv", "a.parquet")]
    assert [row.report for row in tables[0]] == ['He said "x", y', "two\nlines"]
    assert all(table == tables[0] for table in tables)


def test_labels_get_one_type_per_column(tmp_path):
    text = (
        "slide_id,path,code,grade,age,dx,empty,mixed\n"
        "a,a.svs,007,1,60.5,tumor,,1\n"
        "b,b.svs,010,NA,,NA,,x\n"
        "c,c.svs,100,3,7,normal,nan,2\n"
    )
    labels = [row.labels for row in read_manifest(write(tmp_path, text))]
    columns = {name: [row[name] for row in labels] for name in labels[0]}
    assert columns == {
        "code": ["007", "010", "100"],
        "grade": [1, None, 3],
        "age": [60.5, None, 7.0],
        "dx": ["tumor", None, "normal"],
        "empty": [None, None, None],
        "mixed": ["1", "x", "2"],
    }
    assert [type(value) for value in columns["age"]] == [float, type(None), float]


def test_dataset_as_manifest_gives_class_names(tmp_path):
    features = datasets.Features(
        {
            "slide_id": datasets.Value("string"),
            "path": datasets.Value("string"),
            "dx": datasets.ClassLabel(names=["normal", "tumor"]),
            "flag": datasets.Value("bool"),
        }
    )
    columns = {"slide_id": ["a", "b"], "path": ["/x/a.svs", "b.svs"], "dx": [1, 0], "flag": [True, None]}
    rows = read_manifest(datasets.Dataset.from_dict(columns, features=features), slides_root="/x")
    assert [row.labels for row in rows] == [{"dx": "tumor", "flag": True}, {"dx": "normal", "flag": None}]
    assert [str(row.path) for row in rows] == ["/x/a.svs", "/x/b.svs"]


def test_folder_of_slides(tmp_path):
    for name in ("b.svs", "sub/a.TIFF", "sub/notes.txt", ".hidden/c.svs", "._b.svs", "d1/1.dcm", "d1/2.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = read_manifest(tmp_path)
    assert [(row.slide_id, row.stored_path) for row in rows] == [
        ("b", "b.svs"),
        ("d1", "d1/1.dcm"),
        ("a", "sub/a.TIFF"),
    ]
    assert find_slides(tmp_path / "sub") == [tmp_path / "sub" / "a.TIFF"]
    (tmp_path / "sub" / "b.tif").touch()
    with pytest.raises(ValueError, match=r"b \(b\.svs\), b \(sub/b\.tif\)"):
        read_manifest(tmp_path)


def test_paths_outside_the_folder_lose_their_folders(tmp_path, caplog):
    path = write(tmp_path, "slide_id,path\na,../elsewhere/a.svs\nb,/archive/b.svs\nc,x/../c.svs\n")
    with caplog.at_level(logging.WARNING):
        rows = read_manifest(path)
    assert [row.stored_path for row in rows] == ["a.svs", "b.svs", "c.svs"]
    assert rows[0].path == tmp_path.parent / "elsewhere" / "a.svs"
    assert "2 slides lie outside" in caplog.text
    with pytest.raises(ValueError, match=r"Found 2: row 1: .*elsewhere/a\.svs; row 2: /archive/b\.svs"):
        read_manifest(path, slides_root=tmp_path)


def test_relative_and_absolute_calls_give_the_same_rows(tmp_path, monkeypatch):
    path = write(tmp_path, "slide_id,path\na,s/a.svs\n")
    monkeypatch.chdir(tmp_path)
    assert read_manifest("manifest.csv") == read_manifest(path)
    assert read_manifest("manifest.csv", slides_root=".") == read_manifest(path)


def test_links_into_an_archive_are_followed_when_opened_only(tmp_path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "x.svs").touch()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.svs").symlink_to(tmp_path / "archive" / "x.svs")
    (row,) = read_manifest(tmp_path / "links")
    assert (row.slide_id, row.stored_path) == ("a", "a.svs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,path\n../a,a.svs\nok,b.svs\n.b,c.svs\n", r"Found 2: row 1: '../a'; row 3: '.b'"),
        ("slide_id,path\na,1.svs\nb,2.svs\nA,3.svs\nb,4.svs\n", r"Found 2: a \(1.svs\), A \(3.svs\); b \(2.svs\)"),
        ("slide_id,path\na,\nb,b.svs\n", "Every slide needs a path. Found 1: row 1"),
        ("slide_id,path\n,a.svs\n", "row 1: ''"),
        ('slide_id,path,mpp\na,a.svs,"0,4990"\nb,b.svs,0x1p-1\n', r"Found 2: row 1: '0,4990'; row 2: '0x1p-1'"),
        ("slide_id,path,split\na,a.svs,train\nb,b.svs,\nc,c.svs,all\n", r"Found 2: row 2: ''; row 3: 'all'"),
        ("slide_id,path,wsi\na,a.svs,a\n", "all mean `slide_id`"),
        ("name,file\na,a.svs\n", "expected at least one of: `path` or image_path"),
        ("slide_id,path,width_px\na,a.svs,3\n", "Found 1: width_px"),
        ("slide_id,path\na,a.svs,extra\n", "row 1: 3 fields"),
        ("slide_id,path,x,x\na,a.svs,1,2\n", "columns must differ"),
        ("slide_id,path\n", "the table is empty"),
        ("", "the table is empty"),
        ("slide_id,path,case_id\na,a.svs,p\x071\n", "control characters"),
        ('slide_id,path\n"a,a.svs\n', "expected a UTF-8 table"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_manifest(write(tmp_path, text))


def test_case_in_two_splits_is_refused_with_all_offenders(tmp_path):
    text = "slide_id,path,case_id,split\na,a.svs,p1,train\nb,b.svs,p1,validation\nc,c.svs,p2,test\nd,d.svs,p2,val\n"
    with pytest.raises(ValueError, match="p1: train, val; p2: test, val"):
        read_manifest(write(tmp_path, text))


def test_wrong_files_are_named(tmp_path):
    write(tmp_path, "x", "a.xlsx")
    with pytest.raises(ValueError, match=r"a\.xlsx: expected a folder of slides or a \.csv"):
        read_manifest(tmp_path / "a.xlsx")
    (tmp_path / "b.csv").write_bytes("slide_id,path\n\u00e4,\u00e4.svs\n".encode("latin-1"))
    with pytest.raises(ValueError, match="expected a UTF-8 table"):
        read_manifest(tmp_path / "b.csv")
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "absent.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no slides"):
        read_manifest(tmp_path / "empty")
    pd.DataFrame({"slide_id": ["a"], "path": ["a.svs"], "v": [[1, 2]]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="`v`: labels are text or numbers, found list"):
        read_manifest(tmp_path / "c.parquet")


def test_long_report_and_strange_text_survive(tmp_path):
    report = json.dumps(["x" * 300_000, '"', ",", "\u202e"])
    frame = pd.DataFrame({"slide_id": ["a"], "path": ["a.svs"], "report": [report]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert read_manifest(tmp_path / "a.csv")[0].report == report


def test_a_mask_column_names_files_and_is_no_label(tmp_path):
    rows = read_manifest(write(tmp_path, "slide_id,path,mask_path\na,a.svs,masks/a.png\nb,b.svs,\n"))
    assert [row.labels for row in rows] == [{}, {}]
    assert [row.mask_path for row in rows] == [tmp_path / "masks" / "a.png", None]


def test_masks_outside_of_the_slides_root_are_refused(tmp_path):
    table = write(tmp_path, "slide_id,path,mask\na,a.svs,../a.png\n")
    with pytest.raises(ValueError, match=r"row 1: mask .*a\.png"):
        read_manifest(table, slides_root=tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".a",
        "-a",
        "a/b",
        "a\\b",
        "a b",
        "a\n",
        "a\x00",
        "~",
        "\u00e4",
        "a:b",
        "CON",
        "nul.svs",
        "a.",
        "x" * 129,
    ],
)
def test_unsafe_ids(name):
    assert not is_safe_id(name)


def test_safe_ids():
    assert all(is_safe_id(name) for name in ("a", "007", "TCGA-A1-A0SB-01Z-00-DX1.B34C", "_x", "x" * 128, "console"))


def test_splits_follow_cases_and_seed_not_row_order():
    rows = make_rows(40)
    first = assign_splits(rows, val_fraction=0.1, test_fraction=0.25, seed=3)
    split_of = {row.case_id: row.split for row in first}
    assert collections.Counter(split_of.values()) == {"train": 26, "test": 10, "val": 4}
    assert all(row.split == split_of[row.case_id] for row in first)
    backwards = assign_splits(rows[::-1], val_fraction=0.1, test_fraction=0.25, seed=3)
    assert backwards == first[::-1]
    assert assign_splits(rows, val_fraction=0.1, test_fraction=0.25, seed=4) != first
    assert {row.split for row in assign_splits(rows)} == {"train"}
    # The documented rule, computed anew: a silent change of it would move every user's cases.
    order = sorted(split_of, key=lambda case: hashlib.sha256(f"3:{case}".encode()).hexdigest())
    assert [split_of[case] for case in order] == ["test"] * 10 + ["val"] * 4 + ["train"] * 26


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="leave a part for training"):
        assign_splits(make_rows(4), val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match="2 cases are too few"):
        assign_splits(make_rows(2), val_fraction=0.1, test_fraction=0.1)
    with pytest.raises(ValueError, match="has a `split` column"):
        assign_splits(make_rows(2, split="train"), val_fraction=0.1)
    given = make_rows(2, split="val")
    assert assign_splits(given) == given


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real slides are not here")
def test_real_manifest():
    rows = read_manifest(REAL_DATA / "manifest.csv")
    assert len(rows) == 20
    assert all(row.path.is_file() and row.report for row in rows)
    assert {type(row.labels["neoplastic"]) for row in rows} == {int}


def test_names_that_are_no_text_are_refused_before_any_work(tmp_path):
    """A file system allows any bytes; a dataset stores text."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(folder)  # noqa: PTH102 - the name is no text
    except OSError:
        pytest.skip("this file system takes only text")
    with open(folder + b"/a.svs", "wb"):  # noqa: PTH123
        pass
    with pytest.raises(ValueError, match=r"must be UTF-8.*'caf\\udce9/a.svs'"):
        read_manifest(tmp_path)


def test_parquet_that_stands_for_gigabytes_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("dre_slcl.training.manifest_table._MAX_TABLE_BYTES", 100_000)
    path = tmp_path / "manifest.parquet"
    table = {"slide_id": [f"s{i}" for i in range(100)], "path": [f"s{i}.svs" for i in range(100)]}
    pd.DataFrame({**table, "report": ["x" * 500] * 100}).to_parquet(path)
    assert len(read_manifest(path)) == 100
    pd.DataFrame({**table, "report": ["x" * 5000] * 100}).to_parquet(path)
    assert path.stat().st_size < 20_000  # the text is there once
    with pytest.raises(ValueError, match=r"manifest.parquet: \d{6} bytes are too much"):
        read_manifest(path)


def test_a_table_that_is_no_file_or_no_parquet_is_named(tmp_path):
    (tmp_path / "device.csv").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"device.csv: expected a regular file"):
        read_manifest(tmp_path / "device.csv")
    with pytest.raises(ValueError, match=r"a.parquet: expected a Parquet file"):
        read_manifest(write(tmp_path, "slide_id,path\n", "a.parquet"))
