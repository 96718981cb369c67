# SPDX-License-Identifier: Apache-2.0
"""TRIDENT's layout: what its readers expect, and that our own readers get the dataset back from it."""

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from dre_slcl.training import manifest
from dre_slcl.training.dataset_info import read_dataset_info, write_dataset_info
from dre_slcl.training.feature_files import open_feature_folder
from dre_slcl.training.foreign_features import read_feature_bag
from dre_slcl.training.foreign_grids import find_coordinates, index_coordinates, read_coordinates
from dre_slcl.training.manifest import read_manifest
from dre_slcl.training.trident_export import (
    coordinate_attributes,
    export_trident,
    magnification,
    slides_csv,
    write_trident_coordinates,
    write_trident_features,
)
from dre_slcl_cli import main
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.slide_tiles import tile_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

from .slide_cohort import GRID, build, write_cohort

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def read_as_trident(path):
    """How TRIDENT reads coordinates, and which level-0 region it then reads for a tile."""
    with h5py.File(path, "r") as file:
        attributes, coords = dict(file["coords"].attrs), file["coords"][:]
    downsample = (10 / attributes["target_magnification"]) / (10 / attributes["level0_magnification"])
    return attributes, coords, round(attributes["patch_size"] * downsample)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    build(write_cohort(root), root / "dataset")
    return root / "dataset"


@pytest.fixture(scope="module")
def job(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("job")
    assert main(["export", "--dataset", str(dataset), "--format", "trident", "--out", str(out)]) == 0
    return out


def slide_rows(dataset):
    return [row for path in sorted((dataset / "slides").glob("*")) for row in pq.read_table(path).to_pylist()]


def test_the_layout(job, dataset):
    usable = sorted(row["slide_id"] for row in slide_rows(dataset) if row["status"] == "ok")
    assert usable == ["s0", "s1", "s2", "s3"]
    run = job / "10x_64px_0px_overlap"  # 1 um/px
    assert sorted(path.name for path in job.iterdir()) == [run.name, "contours_geojson", "slides.csv", "thumbnails"]
    assert sorted(path.name for path in run.iterdir()) == ["patches", "visualization"]
    assert sorted(path.name for path in (run / "patches").iterdir()) == [f"{name}_patches.h5" for name in usable]
    for folder, ours in ((job / "thumbnails", "thumbnails"), (run / "visualization", "previews")):
        assert sorted(path.name for path in folder.iterdir()) == [f"{name}.jpg" for name in usable]
        assert (folder / "s1.jpg").read_bytes() == (dataset / ours / "s1.jpg").read_bytes()


def test_coordinates_are_as_trident_expects_them(job, dataset):
    for row in slide_rows(dataset):
        if row["status"] != "ok":
            continue
        path = job / "10x_64px_0px_overlap" / "patches" / f"{row['slide_id']}_patches.h5"
        attributes, coords, read_px = read_as_trident(path)
        assert coords.dtype == np.int64
        assert coords.tolist() == row["tile_xy"]
        assert read_px == 64
        assert attributes == {
            "patch_size": 64,
            "patch_size_level0": 64,
            "level0_magnification": 10,
            "target_magnification": 10,
            "overlap": 0,
            "name": row["slide_id"],
            "savetodir": "10x_64px_0px_overlap",
            "level0_width": 512,
            "level0_height": 512,
            "mpp": row["mpp"],
            "tile_mpp": 1.0,
        }


def test_our_reader_gets_the_grid_back(job, dataset):
    index = index_coordinates(job)
    root = dataset.parent / "slides"
    for slide_id in ("s0", "s1", "s2", "s3"):
        with SlideReader(root / f"{slide_id}.tif") as reader:
            expected = tile_slide(reader, GRID)
            found = read_coordinates(find_coordinates(index, slide_id), reader.info, GRID)
        np.testing.assert_array_equal(found.tile_xy, expected.tile_xy)
        for name in ("tile_size_px", "tile_mpp", "stride_px", "tile_size_level0_px"):
            assert getattr(found, name) == getattr(expected, name)


def test_the_table_of_slides_reads_back_as_a_manifest(job, dataset):
    rows = read_manifest(job / "slides.csv", slides_root=dataset.parent)
    expected = [row for row in slide_rows(dataset) if row["status"] == "ok"]
    found = {row.slide_id: (row.stored_path, row.mpp, row.path.is_file()) for row in rows}
    assert found == {row["slide_id"]: (row["path"], row["mpp"], True) for row in expected}


def test_outlines_go_along_and_a_second_export_changes_nothing(dataset, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    # As of a slide whose scanned area starts at (100, 50) of the canvas, where TRIDENT counts from.
    outline = json.loads((copy / "masks" / "s2.geojson").read_text())
    outline["dre_slcl_bounds"] = [100, 50, 512, 512]
    (copy / "masks" / "s2.geojson").write_text(json.dumps(outline))
    job = tmp_path / "job"
    (job / "10x_64px_0px_overlap" / "patches").mkdir(parents=True)
    leftover = job / "10x_64px_0px_overlap" / "patches" / ".tmp-1-dead-s0_patches.h5"
    leftover.touch()
    (job / "contours").mkdir()
    contents = []
    for _ in range(2):
        summary = export_trident(copy, job, progress=False)
        contents.append({path: path.read_bytes() for path in job.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
    moved = json.loads((job / "contours_geojson" / "s2.geojson").read_text())
    before, after = (np.array(x["features"][0]["geometry"]["coordinates"][0]) for x in (outline, moved))
    np.testing.assert_allclose(after - before, np.broadcast_to([100, 50], before.shape))
    assert (job / "contours").is_dir()
    assert not leftover.exists()
    assert (summary.num_slides, summary.num_without_tiles, summary.refused) == (4, 3, [])


@pytest.mark.parametrize(
    ("mpp", "expected"),
    [
        *((0.1, 80), (0.17, 60), (0.23, 40), (0.2999, 40), (0.3, 20), (0.5, 20), (0.599, 20), (0.6, 10), (1.0, 10)),
        *((1.2, 5), (2.3, 5), (2.4, 4), (4.0, 2), (30.0, 1)),
    ],
)
def test_magnifications(mpp, expected):
    assert magnification(mpp) == expected


@pytest.mark.parametrize("mpp", [0.1, 0.16, 0.175, 0.23, 0.25, 0.2527, 0.28, 0.35, 0.4, 0.499, 0.5])
@pytest.mark.parametrize(("tile_size_px", "tile_mpp"), [(256, 0.5), (224, 0.5), (256, 0.35), (512, 1.0)])
def test_trident_reads_tiles_of_our_size(mpp, tile_size_px, tile_mpp, tmp_path):
    if mpp > tile_mpp:
        tile_mpp = mpp
    side = round(tile_size_px * tile_mpp / mpp)
    attributes = coordinate_attributes(
        "a",
        mpp=mpp,
        width_px=5000,
        height_px=4000,
        tile_size_px=tile_size_px,
        tile_mpp=tile_mpp,
        stride_px=tile_size_px,
        tile_size_level0_px=side,
    )
    write_trident_coordinates(tmp_path / "a_patches.h5", np.zeros((0, 2)), attributes)
    stored, coords, read_px = read_as_trident(tmp_path / "a_patches.h5")
    assert coords.shape == (0, 2)
    assert abs(read_px - side) <= max(1, 0.02 * side)
    assert (stored["patch_size_level0"], stored["mpp"]) == (side, mpp)


def test_names_of_magnifications_are_kept_where_they_tell_the_truth():
    sizes = {"width_px": 1, "height_px": 1, "tile_size_px": 256, "tile_mpp": 0.5, "stride_px": 192}
    usual = coordinate_attributes("a", mpp=0.2527, tile_size_level0_px=507, **sizes)
    assert (usual["level0_magnification"], usual["target_magnification"], usual["overlap"]) == (40, 20, 64)
    # A slide of 0.35 um/px is "20x" to TRIDENT, which would read 256 pixels where a tile has 366.
    unusual = coordinate_attributes("a", mpp=0.35, tile_size_level0_px=366, **sizes)
    assert unusual["level0_magnification"] == pytest.approx(28.59375)


def test_features_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    tile_xy = rng.permutation(4000 * 2).reshape(-1, 2).astype(np.int32)[:3000]
    features = rng.normal(size=(3000, 8)).astype(np.float32)
    sizes = {"width_px": 9000, "height_px": 9000, "tile_size_px": 256, "tile_mpp": 0.5, "stride_px": 256}
    attributes = coordinate_attributes("a", mpp=0.25, tile_size_level0_px=512, **sizes)
    path = tmp_path / "20x_256px_0px_overlap" / "features_dre_slcl" / "a.h5"
    write_trident_features(path, features, tile_xy, encoder="dre_slcl", attributes=attributes)
    with h5py.File(path) as file:
        assert file["features"].chunks == (1024, 8)
        assert file["features"].attrs["encoder"] == "dre_slcl"
        assert file["coords"].dtype == np.int64
    [slide] = open_feature_folder(tmp_path).files
    bag = read_feature_bag(slide)
    np.testing.assert_array_equal(bag.tile_features, features)
    np.testing.assert_array_equal(bag.tile_xy, tile_xy)
    assert (bag.encoder, bag.tile_size_level0_px, bag.tile_mpp, bag.mpp) == ("dre_slcl", 512, 0.5, 0.25)
    with pytest.raises(ValueError, match="3000 tiles"):
        write_trident_features(path, features[:5], tile_xy, encoder="dre_slcl", attributes=attributes)
    features[7] = np.nan
    with pytest.raises(ValueError, match="finite"):
        write_trident_features(path, features, tile_xy, encoder="dre_slcl", attributes=attributes)
    np.testing.assert_array_equal(read_feature_bag(slide).tile_xy, tile_xy)  # the file is the old one


@pytest.mark.parametrize("start", ["=", "+", "-", "@", '"', "'", ";", ",", " ", "|", "%", "\uff1d"])
def test_a_path_that_looks_like_a_formula_reads_back_exactly(start, tmp_path):
    stem = f"{start}cmd"
    rows = [
        {"slide_id": stem, "path": f"{stem}.svs", "mpp": 0.1 + 0.2},
        {"slide_id": "b", "path": f"{stem}/b.svs", "mpp": 1e-1},
    ]
    text, refused = slides_csv(rows)
    assert refused == []
    (tmp_path / "slides.csv").write_text(text)
    with (tmp_path / "slides.csv").open(newline="") as handle:
        cells = [cell for row in csv.reader(handle) for cell in row]
    assert not any(cell[0] in "=+-@\t\r\uff1d" for cell in cells)
    # Ids that are no file names cannot be in a dataset; the reader of the table is asked without that check.
    found = manifest._rows_of_table(manifest.read_table(tmp_path / "slides.csv"), tmp_path, None)
    assert [(row.slide_id, row.stored_path, row.mpp) for row in found] == [
        (row["slide_id"], row["path"], row["mpp"]) for row in rows
    ]


@pytest.mark.parametrize(
    ("slide_id", "path", "reason"),
    [
        ("a", "\ta.svs", "unsafe_name"),
        ("a", "\ra.svs", "unsafe_name"),
        ("a", "a\nb.svs", "unsafe_name"),
        ("a", "a.svs ", "unsafe_name"),
        ("a", "a.png", "unsafe_name"),
        ("a", "other.svs", "unsafe_name"),
        ("c", "x/c.svs", "duplicate_id"),
    ],
)
def test_a_slide_that_cannot_be_read_back_is_left_out_of_the_table(slide_id, path, reason):
    rows = [{"slide_id": slide_id, "path": path, "mpp": 0.5}, {"slide_id": "b", "path": "b.svs", "mpp": 0.5}]
    if reason == "duplicate_id":
        rows.append({"slide_id": "C", "path": "y/C.svs", "mpp": 0.5})
    text, refused = slides_csv(rows)
    assert text.splitlines() == ["wsi,mpp", "b.svs,0.5"]
    assert refused[0].slide_id == slide_id
    assert {error.reason for error in refused} == {reason}


def test_an_id_that_is_not_its_files_name_is_status_3(dataset, tmp_path, caplog, capsys):
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    path = copy / "slides" / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    ids = ["renamed" if slide_id == "s3" else slide_id for slide_id in table["slide_id"].to_pylist()]
    pq.write_table(table.set_column(0, table.schema.field(0), [ids]), path)
    info = read_dataset_info(dataset)
    files = list(info.pop("files"))
    info.pop("format_version")
    write_dataset_info(copy, content=info, files=files)
    assert main(["export", "--dataset", str(copy), "--out", str(tmp_path / "job")]) == 3
    assert "'renamed' is refused: unsafe_name" in caplog.text
    assert "4 slides" in capsys.readouterr().out
    assert (tmp_path / "job" / "10x_64px_0px_overlap" / "patches" / "renamed_patches.h5").is_file()


def test_an_unfinished_dataset_is_status_1(tmp_path, caplog):
    assert main(["export", "--dataset", str(tmp_path), "--out", str(tmp_path / "job")]) == 1
    assert "dre_slcl_dataset.json" in caplog.text
    assert not (tmp_path / "job").exists()


@pytest.mark.skipif(not (DATA / "slides").is_dir(), reason="the real slides are not on this machine")
def test_real_slides_to_trident_and_back(tmp_path):
    rows = [row for row in read_manifest(DATA / "manifest.csv") if row.slide_id.endswith("_5x")][:3]
    grid = TileGridConfig(tile_size_px=64, tile_mpp=4.0, stride_px=48)
    build(rows, tmp_path / "dataset", grid, pixels="none")
    summary = export_trident(tmp_path / "dataset", tmp_path / "job", progress=False)
    assert (summary.num_slides, summary.run_name) == (3, "2x_64px_16px_overlap")
    for row in rows:
        with SlideReader(row.path) as reader:
            path = find_coordinates(tmp_path / "job", row.slide_id)
            found = read_coordinates(path, reader.info, grid)
            np.testing.assert_array_equal(found.tile_xy, tile_slide(reader, grid).tile_xy)
            attributes, _, read_px = read_as_trident(path)
            assert (attributes["level0_width"], attributes["level0_height"]) == reader._slide.dimensions
            assert read_px == found.tile_size_level0_px
