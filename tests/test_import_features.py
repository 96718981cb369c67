# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl import-features`: what `load_dataset` finds, exit statuses, and what an interrupted import leaves."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import get_dataset_config_names, load_dataset

from dre_slcl.training import import_features as module
from dre_slcl.training.import_features import FEATURES_INFO_NAME, import_features
from dre_slcl_cli import main

from .foreign_files import CORNERS, damage_heap, write_clam_features, write_stamp, write_trident_features
from .test_foreign_features import FEATURES


def write_job(folder, slide_ids=("a", "b", "c"), bad=()):
    for slide_id in slide_ids:
        features = np.full_like(FEATURES, np.nan) if slide_id in bad else FEATURES + ord(slide_id[0])
        write_trident_features(folder, features, slide_id)
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_job_loads_as_a_dataset(tmp_path, capsys):
    job, out = write_job(tmp_path / "job"), tmp_path / "out"
    assert main(["import-features", "--from", str(job), "--out", str(out), "--license", "cc-by-nc-4.0"]) == 0
    assert capsys.readouterr().out == f"{out}: 3 slides, 18 tiles, 0 refused\n"
    assert get_dataset_config_names(str(out)) == ["features"]
    dataset = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert list(dataset) == ["train"]
    rows = dataset["train"].with_format("numpy")
    assert [row["slide_id"] for row in rows] == ["a", "b", "c"]
    for row in rows:
        np.testing.assert_array_equal(row["tile_features"], FEATURES + ord(row["slide_id"]))
        assert row["tile_xy"].tolist() == CORNERS.tolist()
    info = json.loads((out / FEATURES_INFO_NAME).read_text())
    assert (info["encoder"], info["width"], info["source_formats"]) == ("uni_v1", 4, ["trident"])
    card = (out / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "| tile encoder | uni_v1 |" in card
    assert str(tmp_path) not in card
    streamed = load_dataset(str(out), split="train", streaming=True)
    assert [row["num_tiles"] for row in streamed] == [6, 6, 6]


def test_refused_slides_are_listed_and_the_status_is_3(tmp_path, caplog, capsys):
    job, out = write_job(tmp_path / "job", bad=("b",)), tmp_path / "out"
    assert main(["import-features", "--from", str(job), "--out", str(out)]) == 3
    [line] = (out / "refused.jsonl").read_text().splitlines()
    assert json.loads(line)["slide_id"] == "b"
    assert json.loads(line)["reason"] == "unreadable"
    assert "'b' is refused: unreadable" in caplog.text
    assert capsys.readouterr().out.endswith("2 slides, 12 tiles, 1 refused\n")
    assert len(load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))) == 2


def test_a_table_of_slides_gives_splits_labels_and_mpp(tmp_path):
    for slide_id in ("a", "b", "extra"):
        write_stamp(tmp_path / "in", slide_id)
    (tmp_path / "slides.csv").write_text(
        "slide_id,path,case_id,mpp,split,diagnosis\n"
        "a,a.svs,c1,0.25,train,benign\nb,b.svs,c2,0.5,test,tumor\nabsent,x.svs,c3,0.5,test,tumor\n"
    )
    out = tmp_path / "out"
    command = ["import-features", "--from", str(tmp_path / "in"), "--out", str(out)]
    assert main([*command, "--slides", str(tmp_path / "slides.csv")]) == 3
    dataset = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: list(rows["slide_id"]) for split, rows in dataset.items()} == {"train": ["a"], "test": ["b"]}
    [row] = dataset["test"]
    assert (row["case_id"], row["diagnosis"], row["path"], row["mpp"]) == ("c2", "tumor", "b.svs", 0.5)
    assert row["tile_xy"] == (CORNERS // 2).tolist()
    assert json.loads((out / "refused.jsonl").read_text())["reason"] == "not_a_file"


def test_rows_without_coordinates_are_null(tmp_path):
    (tmp_path / "in").mkdir()
    torch.save(torch.from_numpy(FEATURES), tmp_path / "in" / "a.pt")
    import_features(tmp_path / "in", tmp_path / "out", isolated=False, progress=False)
    [row] = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert (row["tile_xy"], row["tile_size_px"], row["encoder"]) == (None, None, None)


def test_a_file_ends_when_it_is_large_enough_and_holds_a_slide_per_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BYTES", 300)  # a slide of 6 x 4 float32 and 6 x 2 int32 has about 250 bytes
    job, out = write_job(tmp_path / "job", ["a", "b", "c", "d", "e"]), tmp_path / "out"
    info = import_features(job, out, isolated=False, progress=False)
    assert len(info["files"]) == 3
    for name, size in info["files"].items():
        assert (out / name).stat().st_size == size
        table = pq.ParquetFile(out / name)
        assert [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)] == [
            1
        ] * table.num_row_groups
    rows = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(rows["slide_id"]) == ["a", "b", "c", "d", "e"]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    job = write_job(tmp_path / "job", bad=("c",))
    for name in ("one", "two"):
        import_features(job, tmp_path / name / "out", isolated=False, progress=False)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_an_import_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    import_features(write_job(tmp_path / "job"), out, isolated=False, progress=False)
    before = files_of(out)
    write_job(tmp_path / "job", ["d"])
    monkeypatch.setattr(module, "write_features_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        import_features(tmp_path / "job", out, isolated=False, progress=False)
    assert files_of(out) == before
    monkeypatch.undo()
    (out / ".tmp-1-staging").mkdir()  # what a killed process leaves
    assert import_features(tmp_path / "job", out, isolated=False, progress=False)["num_slides"] == 4
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        FEATURES_INFO_NAME,
        "features",
        "refused.jsonl",
    ]


def test_a_strangers_folder_is_left_alone(tmp_path, caplog):
    job, out = write_job(tmp_path / "job"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    assert main(["import-features", "--from", str(job), "--out", str(out)]) == 1
    assert "new or empty folder" in caplog.text
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_no_features_is_status_1(name, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    assert main(["import-features", "--from", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
    assert name in caplog.text
    assert not (tmp_path / "out").exists()


def test_without_h5py_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_clam_features(tmp_path / "in", FEATURES)
    monkeypatch.setattr("dre_slcl.training.hdf5_files.h5py", None)
    with pytest.raises(ImportError, match=r"dre-slcl\[interop\]"):
        import_features(tmp_path / "in", tmp_path / "out", isolated=False, progress=False)


def test_a_file_that_hangs_the_library_costs_its_slide_only(tmp_path, monkeypatch):
    job = write_job(tmp_path / "job")
    damage_heap(job / "20x_256px_0px_overlap" / "features_uni_v1" / "b.h5")
    monkeypatch.setattr("dre_slcl.training.feature_files.HEADER_SECONDS", 3.0)
    info = import_features(job, tmp_path / "out", progress=False)
    assert (info["num_slides"], info["refused_by_reason"]) == (2, {"unreadable": 1})
    [line] = (tmp_path / "out" / "refused.jsonl").read_text().splitlines()
    assert json.loads(line)["slide_id"] == "b"


def test_reading_in_another_process_gives_the_same(tmp_path):
    job = write_job(tmp_path / "job", bad=("c",))
    import_features(job, tmp_path / "one" / "out", isolated=True, progress=False)
    import_features(job, tmp_path / "two" / "out", isolated=False, progress=False)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
