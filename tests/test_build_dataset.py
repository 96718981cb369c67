# SPDX-License-Identifier: Apache-2.0
"""Slides to dataset: what `datasets` and OpenSlide say about the result."""

import argparse
import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import openslide
import pandas as pd
import PIL.Image
import pyarrow.parquet as pq
import pytest
import yaml

from dre_slcl.training import tiles_command as module
from dre_slcl.training.dataset_info import read_dataset_geometry
from dre_slcl.training.dataset_tables import TILE_SCHEMA
from dre_slcl.training.dataset_writer import plan_shards
from dre_slcl.training.manifest import read_manifest
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.slide_tiles import tile_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

from .slide_cohort import GRID, build, parquet_hashes, write_cohort, write_slide

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def built(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "dataset"
    return out, build(manifest, out)


@pytest.fixture(scope="module")
def loaded(built, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return {name: datasets.load_dataset(str(built[0]), name, cache_dir=cache) for name in ("slides", "tiles")}


def test_summary_and_exit_code(built):
    out, summary = built
    assert summary.exit_code == 3
    assert (summary.num_slides, summary.num_ok, summary.num_refused, summary.num_reused) == (7, 4, 3, 0)
    assert (
        summary.refused_by_reason == {"no_tissue": 1, "not_a_file": 1, "unreadable": 1}
        or sum(summary.refused_by_reason.values()) == 3
    )
    content = json.loads((out / "summary.json").read_text())
    assert content["num_tiles"] == summary.num_tiles == sum(content["tiles_per_split"].values()) > 40
    assert set(content["seconds"]) == {"open", "mask", "read", "write", "tiling", "merge", "total"}
    assert content["slides_per_second"] > 0
    assert content["tiles_per_second"] > 0
    assert "| num_ok | 4 |" in (out / "summary.md").read_text()
    refused = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert {line["slide_id"] for line in refused} == {"broken", "blank", "gone"}
    assert {line["slide_id"]: line["reason"] for line in refused}["blank"] == "no_tissue"
    assert {line["slide_id"]: line["reason"] for line in refused}["gone"] == "not_a_file"
    assert all(line["message"] for line in refused)


def test_both_configurations_load_with_their_features(built, loaded):
    slides, tiles = loaded["slides"], loaded["tiles"]
    assert list(slides) == ["train", "val", "test"]
    assert list(tiles) == ["train", "test"]  # the only slide of val was refused, and empty splits cannot be loaded
    features = slides["train"].features
    assert features["tile_xy"] == datasets.List(datasets.List(datasets.Value("int32"), length=2))
    kinds = {name: features[name].dtype for name in ("diagnosis", "grade", "age", "code", "mpp", "tile_start")}
    assert kinds == {
        "diagnosis": "string",
        "grade": "int64",
        "age": "float64",
        "code": "string",
        "mpp": "float64",
        "tile_start": "int64",
    }
    kinds = {"slide_id": "string", "tile_index": "int32", "x": "int32", "y": "int32"}
    expected = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    expected["image"] = datasets.Image()
    assert tiles["train"].features == expected
    assert isinstance(tiles["train"][0]["image"], PIL.Image.Image)
    assert tiles["train"][0]["image"].size == (64, 64)
    assert expected.arrow_schema.equals(TILE_SCHEMA, check_metadata=True)
    written = pq.read_schema(built[0] / "slides" / "train-00000-of-00001.parquet")
    assert features.arrow_schema.equals(written)
    assert json.loads(features.arrow_schema.metadata[b"huggingface"]) == json.loads(written.metadata[b"huggingface"])


def test_slide_rows_hold_the_manifest_and_the_refusals(loaded):
    rows = {row["slide_id"]: row for split in loaded["slides"].values() for row in split}
    assert [row["slide_id"] for row in loaded["slides"]["train"]] == ["s0", "broken", "s1", "s2"]
    first = rows["s0"]
    assert (first["case_id"], first["split"], first["path"], first["report"]) == (
        "c0",
        "train",
        "slides/s0.tif",
        "Benign.",
    )
    assert (first["width_px"], first["height_px"], first["tile_size_level0_px"]) == (512, 512, 64)
    assert (first["tile_size_px"], first["tile_mpp"], first["stride_px"]) == (64, 1.0, 64)
    assert first["mpp"] == pytest.approx(1.0, rel=1e-6)
    assert (first["diagnosis"], first["grade"], first["age"], first["code"]) == ("benign", None, 61.5, "007")
    assert (rows["s2"]["diagnosis"], rows["s2"]["grade"], rows["s2"]["report"]) == (None, 2, "")
    for name in ("broken", "blank", "gone"):
        row = rows[name]
        assert (row["status"], row["num_tiles"], row["tile_xy"]) == ("refused", 0, [])
        assert row["reason"]
    assert all(rows[name]["status"] == "ok" and rows[name]["reason"] == "" for name in ("s0", "s1", "s2", "s3"))
    assert rows["gone"]["fingerprint"] is None
    assert len({row["fingerprint"] for row in rows.values()}) == 7


def test_tile_start_invariant(loaded):
    """Tile t of a slide is row `tile_start + t` of its split, and no row belongs to no slide."""
    for split, tiles in loaded["tiles"].items():
        columns = tiles.select_columns(["slide_id", "tile_index", "x", "y"]).to_pandas()
        start = 0
        for row in loaded["slides"][split]:
            assert row["tile_start"] == start
            part = columns[start : start + row["num_tiles"]]
            assert set(part.slide_id) <= {row["slide_id"]}
            assert part.tile_index.tolist() == list(range(row["num_tiles"]))
            assert part[["x", "y"]].to_numpy().tolist() == row["tile_xy"]
            start += row["num_tiles"]
        assert start == len(tiles)


def test_grid_is_the_one_of_the_model_code(manifest, loaded):
    for row in loaded["slides"]["train"]:
        if row["status"] == "ok":
            with SlideReader(manifest.parent / row["path"]) as reader:
                expected = tile_slide(reader, GRID).tile_xy
            np.testing.assert_array_equal(row["tile_xy"], expected)


def test_pixels_are_those_of_openslide(manifest, loaded):
    tiles = loaded["tiles"]["train"].cast_column("image", datasets.Image(decode=False))
    slides = {row["slide_id"]: openslide.OpenSlide(manifest.parent / row["path"]) for row in _ok(loaded["slides"])}
    assert len(tiles) > 20
    for tile in tiles:
        assert tile["image"]["path"] is None
        region = slides[tile["slide_id"]].read_region((tile["x"], tile["y"]), 0, (64, 64)).convert("RGB")
        expected = np.asarray(region, dtype=np.float64)
        decoded = PIL.Image.open(io.BytesIO(tile["image"]["bytes"]))
        assert decoded.format == "JPEG"
        error = np.asarray(decoded, dtype=np.float64) - expected
        assert abs(error.mean()) < 1  # no shift in colour, channels not exchanged
        assert np.sqrt((error**2).mean()) < 6


def _ok(slides):
    return [row for split in slides.values() for row in split if row["status"] == "ok"]


def test_streaming_gives_the_same_rows(built, loaded):
    for name in ("slides", "tiles"):
        stream = datasets.load_dataset(str(built[0]), name, streaming=True)
        assert list(stream) == list(loaded[name])
        for split in stream:
            rows = list(stream[split])
            assert len(rows) == len(loaded[name][split])
            key = "tile_xy" if name == "slides" else "tile_index"
            assert [row[key] for row in rows] == list(loaded[name][split][key])


def test_geometry_for_training(built, tmp_path):
    assert read_dataset_geometry(built[0]) == {"tile_size_px": 64, "tile_mpp": 1.0, "stride_px": 64}
    with pytest.raises(ValueError, match="not a finished slide dataset"):
        read_dataset_geometry(tmp_path)


def test_nothing_of_this_machine_is_published(built, manifest):
    private = [str(manifest.parent).encode(), str(built[0].parent).encode()]
    if len(os.uname().nodename) >= 6:  # shorter ones occur in compressed pictures by chance
        private.append(os.uname().nodename.encode())
    for path in built[0].rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(text in content for text in private), path


def test_previews_and_clean_folder(built):
    out, _ = built
    previews = ["contact_sheet.jpg", *(f"s{i}.jpg" for i in range(4))]
    assert sorted(path.name for path in (out / "previews").iterdir()) == previews
    assert sorted(path.name for path in (out / "masks").iterdir()) == [f"s{i}.geojson" for i in range(4)]
    assert PIL.Image.open(out / "previews" / "s0.jpg").size == (64, 64)
    assert sorted(path.name for path in (out / "thumbnails").iterdir()) == [f"s{i}.jpg" for i in range(4)]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "dre_slcl_dataset.json",
        "masks",
        "previews",
        "refused.jsonl",
        "slides",
        "summary.json",
        "summary.md",
        "thumbnails",
        "tiles",
    ]


def test_parquet_layout(built):
    file = pq.ParquetFile(built[0] / "tiles" / "train-00000-of-00001.parquet")
    for group in range(file.num_row_groups):
        columns = {
            file.metadata.row_group(group).column(i).path_in_schema: i for i in range(file.metadata.num_columns)
        }
        image = file.metadata.row_group(group).column(columns["image.bytes"])
        assert image.compression == "UNCOMPRESSED"
        assert image.has_offset_index
        names = file.metadata.row_group(group).column(columns["slide_id"])
        assert names.has_dictionary_page
        assert names.statistics.min == names.statistics.max  # one slide per row group


def test_coordinates_only(manifest, built, tmp_path):
    out = tmp_path / "out"
    summary = build(manifest, out, pixels="none")
    assert summary.num_tiles == built[1].num_tiles
    assert not (out / "tiles").exists()
    header = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert [(config["config_name"], config["default"]) for config in header["configs"]] == [("slides", True)]
    assert (out / "slides" / "train-00000-of-00001.parquet").read_bytes() == (
        built[0] / "slides" / "train-00000-of-00001.parquet"
    ).read_bytes()
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"][0]["num_tiles"] > 0
    build(manifest, out)  # and back: the old configuration is replaced
    assert parquet_hashes(out) == parquet_hashes(built[0])
    build(manifest, out, pixels="none")
    assert not (out / "tiles").exists()


def test_shards_keep_the_order(manifest, built, loaded, tmp_path):
    out = tmp_path / "out"
    build(manifest, out, shard_bytes=1)
    names = sorted(path.name for path in (out / "tiles").iterdir())
    assert names == ["test-00000-of-00001.parquet", *(f"train-{i:05d}-of-00003.parquet" for i in range(3))]
    tiles = datasets.load_dataset(str(out), "tiles", split="train", cache_dir=str(tmp_path / "cache"))
    for column in ("slide_id", "tile_index", "x", "y"):
        assert list(tiles[column]) == list(loaded["tiles"]["train"][column])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([], []), ([5], [[0]]), ([4, 4, 4], [[0, 1], [2]]), ([20, 1, 1], [[0], [1, 2]]), ([1, 20, 1], [[0], [1], [2]])],
)
def test_plan_shards(sizes, expected):
    assert plan_shards(sizes, 8) == expected


def test_same_file_under_two_names_is_refused_once(tmp_path):
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "a.tif", 1)
    (tmp_path / "slides" / "b.tif").write_bytes((tmp_path / "slides" / "a.tif").read_bytes())
    summary = build(tmp_path / "slides", tmp_path / "out")
    assert (summary.num_ok, summary.refused_by_reason) == (1, {"duplicate_id": 1})
    line = json.loads((tmp_path / "out" / "refused.jsonl").read_text())
    assert (line["slide_id"], line["message"]) == ("b", "the file has the same content as slide a")


def test_mpp_from_manifest_before_option_before_file(tmp_path):
    write_slide(tmp_path / "a.tif", 1, mpp=1.0)
    write_slide(tmp_path / "b.tif", 2, mpp=1.0)
    (tmp_path / "m.csv").write_text("slide_id,path,mpp\na,a.tif,0.5\nb,b.tif,\n")
    build(tmp_path / "m.csv", tmp_path / "out", slide_mpp=0.8)
    rows = pq.read_table(tmp_path / "out" / "slides" / "train-00000-of-00001.parquet").to_pylist()
    assert [(row["mpp"], row["tile_size_level0_px"]) for row in rows] == [(0.5, 128), (0.8, 80)]


@pytest.mark.parametrize(
    "options", [{"pixels": "jpeg"}, {"jpeg_quality": 0}, {"num_workers": -1}, {"val_fraction": 0.2}]
)
def test_wrong_options(manifest, tmp_path, options):
    with pytest.raises(ValueError, match=r"pixels|jpeg_quality|num_workers|split"):
        build(manifest, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_command_line(manifest, built, tmp_path, capsys, caplog):
    parser = argparse.ArgumentParser(prog="dre-slcl tiles")
    module.add_arguments(parser)
    common = ["--slides", str(manifest), "--tile-size", "64", "--mpp", "1", "--num-workers", "0"]
    args = parser.parse_args([*common, "--out", str(tmp_path / "out"), "--license", "cc-by-4.0", "--stain", "H&E"])
    assert module.run(args) == 3
    assert "4 slides" in capsys.readouterr().out
    header = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert (header["license"], header["stain"]) == ("cc-by-4.0", "H&E")
    assert parquet_hashes(tmp_path / "out") == parquet_hashes(built[0])
    assert module.run(parser.parse_args([*common, "--out", str(manifest.parent)])) == 1
    assert "expected a new or empty folder" in caplog.text
    assert module.run(parser.parse_args([*common, "--out", str(tmp_path / "x"), "--mpp", "-1"])) == 2
    assert "tile_mpp" in caplog.text


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real slides are not here")
def test_real_slides_among_broken_ones(tmp_path):
    names = ["containers/erosion_HE_5x_generic.tif", "slides/erosion_HE_5x.svs", "broken/broken.svs"]
    names += ["broken/openslide_unopenable.tiff", "broken/openslide_unreadable.svs"]
    names += ["broken/highdicom_sm_image_jpegls.dcm"]
    table = pd.DataFrame({"slide_id": [f"s{i}" for i in range(len(names))], "path": names})
    table.to_parquet(tmp_path / "m.parquet")
    rows = read_manifest(tmp_path / "m.parquet", slides_root=REAL_DATA)
    summary = build(rows, tmp_path / "out", TileGridConfig(tile_size_px=64, tile_mpp=4.0))
    assert (summary.num_ok, summary.num_refused) == (2, 4)
    rows = pq.read_table(tmp_path / "out" / "slides" / "train-00000-of-00001.parquet").to_pylist()
    assert rows[0]["num_tiles"] == pytest.approx(rows[1]["num_tiles"], abs=3)  # the same tissue in two containers
