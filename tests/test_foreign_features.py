# SPDX-License-Identifier: Apache-2.0
"""Tile features of five tools: files in each tool's layout, and what must be refused."""

import json

import h5py
import numpy as np
import pytest
import torch

from dre_slcl.training.feature_dataset import features_dataset
from dre_slcl.training.feature_files import open_feature_folder
from dre_slcl.training.foreign_features import iter_feature_bags, read_feature_bag
from dre_slcl.training.manifest import ManifestRow
from modeling_dre_slcl.slide_info import SlideError

from .foreign_files import (
    CORNERS,
    write_atlaspatch,
    write_clam_features,
    write_pickles,
    write_slide2vec,
    write_slide2vec_features,
    write_stamp,
    write_trident,
    write_trident_features,
)

# Exact in float16, so that every tool stores the same numbers.
FEATURES = (np.arange(24, dtype=np.float32).reshape(6, 4) - 7) / 4


def write_tool(tool, folder, features=FEATURES, slide_id="a"):
    if tool == "trident":
        return write_trident_features(folder, features, slide_id)
    if tool == "clam":
        return write_clam_features(folder, features, slide_id)[0]
    if tool == "atlaspatch":
        return write_atlaspatch(folder, slide_id, features={"uni_v1": features})
    if tool == "stamp":
        return write_stamp(folder, slide_id, features=features, extractor="uni_v1")
    write_slide2vec(folder, slide_id)
    return write_slide2vec_features(folder, features, slide_id, encoder="uni_v1")


def read_all(folder, **options):
    opened = open_feature_folder(folder, **options)
    return opened, list(iter_feature_bags(opened))


TOOLS = ["trident", "clam", "atlaspatch", "stamp", "slide2vec"]


@pytest.mark.parametrize("tool", TOOLS)
def test_features_of_each_tool(tool, tmp_path):
    path = write_tool(tool, tmp_path)
    folder = open_feature_folder(tmp_path)
    [file] = folder.files
    assert (file.path, file.slide_id, file.source_format, file.num_tiles, file.width) == (path, "a", tool, 6, 4)
    assert folder.encoder == (None if tool == "clam" else "uni_v1")
    bag = read_feature_bag(file, mpp=0.25)
    assert bag.tile_features.dtype == np.float32
    np.testing.assert_array_equal(bag.tile_features, FEATURES)
    assert bag.tile_xy.dtype == np.int32
    assert bag.tile_xy.tolist() == CORNERS.tolist()
    sizes = (bag.tile_size_level0_px, bag.tile_size_px, bag.tile_mpp)
    assert sizes == ((None, None, None) if tool == "clam" else (512, 256, 0.5))


def test_micrometres_need_the_mpp_of_the_slide(tmp_path):
    [file] = open_feature_folder(write_stamp(tmp_path).parent).files
    bag = read_feature_bag(file)
    assert (bag.tile_xy, bag.tile_size_level0_px, bag.tile_mpp) == (None, None, 0.5)
    assert read_feature_bag(file, mpp=0.5).tile_xy.tolist() == (CORNERS // 2).tolist()


def test_a_trident_job_with_all_it_holds(tmp_path):
    for slide_id in ("a", "b"):
        write_trident(tmp_path, slide_id)
        path = write_trident_features(tmp_path, FEATURES, slide_id, named=False)
        slide_path = path.parents[1] / "slide_features_titan" / path.name
        slide_path.parent.mkdir(exist_ok=True)
        with h5py.File(slide_path, "w") as file:
            file["features"] = np.ones(768, dtype=np.float32)
            file["coords"] = CORNERS
    folder = open_feature_folder(tmp_path)
    assert [(file.slide_id, file.encoder, file.source_format) for file in folder.files] == [
        ("a", "uni_v1", "trident"),
        ("b", "uni_v1", "trident"),
    ]
    assert folder.refused == []


@pytest.mark.parametrize("chunks", [(1, 4), (1024, 4), None])
def test_any_chunking_is_read(chunks, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=FEATURES, chunks=chunks, maxshape=(None, 4) if chunks else None)
    _, [bag] = read_all(tmp_path)
    np.testing.assert_array_equal(bag.tile_features, FEATURES)
    assert bag.tile_xy is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_any_float_become_float32(dtype, tmp_path):
    torch.save(torch.from_numpy(FEATURES).to(dtype), tmp_path / "a.pt")
    torch.save(torch.from_numpy(FEATURES), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    _, bags = read_all(tmp_path)
    for bag in bags:
        assert bag.tile_features.dtype == np.float32
        np.testing.assert_array_equal(bag.tile_features, FEATURES)


def test_slide2vec_archives_name_the_tiles_of_their_features(tmp_path):
    write_slide2vec(tmp_path)
    write_slide2vec_features(tmp_path, FEATURES[:3], suffix="npz", tile_index=np.array([4, 0, 5]))
    _, [bag] = read_all(tmp_path)
    assert bag.tile_xy.tolist() == [[1024, 0], [0, 0], [1024, 512]]
    write_slide2vec_features(tmp_path, FEATURES[:3], suffix="npz", tile_index=np.array([4, 0, 6]))
    _, [error] = read_all(tmp_path)
    assert "tile_index" in error.message


def test_slide2vec_features_without_coordinates_keep_their_sizes(tmp_path):
    write_slide2vec_features(tmp_path, FEATURES)
    slide_path = tmp_path / "slide_embeddings" / "a.pt"
    slide_path.parent.mkdir()
    torch.save(torch.ones(1, 8), slide_path)
    slide_path.with_name("a.meta.json").write_text('{"artifact_type": "slide_embeddings"}')
    _, [bag] = read_all(tmp_path)
    assert (bag.tile_xy, bag.tile_size_level0_px, bag.tile_size_px, bag.tile_mpp) == (None, 512, 256, 0.5)


def test_encoders_are_never_mixed(tmp_path):
    write_trident_features(tmp_path, FEATURES, "a")
    write_trident_features(tmp_path, FEATURES, "b")
    odd = write_trident_features(tmp_path, FEATURES[:, :3], "c", encoder="conch")
    with pytest.raises(ValueError, match=r"2 of 3 files") as caught:
        open_feature_folder(tmp_path)
    assert str(odd.relative_to(tmp_path)) in str(caught.value)
    assert "features_uni_v1" not in str(caught.value)
    for choice in ({"encoder": "uni_v1"}, {"width": 4}):
        folder = open_feature_folder(tmp_path, **choice)
        assert [file.slide_id for file in folder.files] == ["a", "b"]
        [error] = folder.refused
        assert (error.slide_id, error.reason) == ("c", "unsupported")
        assert "conch" in error.message


def test_widths_are_never_mixed(tmp_path):
    write_clam_features(tmp_path, FEATURES, "a")
    write_clam_features(tmp_path, FEATURES[:, :3], "b")
    with pytest.raises(ValueError, match=r"width 3"):
        open_feature_folder(tmp_path)


def test_two_encoders_of_one_slide_must_be_chosen_from(tmp_path):
    write_atlaspatch(tmp_path, features={"uni_v1": FEATURES, "conch": FEATURES[:, :3], "__tmp_half": FEATURES[:2]})
    with pytest.raises(ValueError, match="conch") as caught:
        open_feature_folder(tmp_path)
    assert "__tmp_half" not in str(caught.value)
    assert open_feature_folder(tmp_path, encoder="conch").width == 3


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_cost_their_slide_only(tool, value, tmp_path):
    bad = FEATURES.copy()
    bad[4, 1] = value
    write_tool(tool, tmp_path, slide_id="a")
    write_tool(tool, tmp_path, bad, slide_id="b")
    write_tool(tool, tmp_path, slide_id="c")
    folder, bags = read_all(tmp_path)
    assert [file.slide_id for file in folder.files] == ["a", "b", "c"]
    assert [bags[0].slide_id, bags[2].slide_id] == ["a", "c"]
    assert isinstance(bags[1], SlideError)
    assert (bags[1].slide_id, bags[1].reason) == ("b", "unreadable")
    assert "tile 4" in bags[1].message


def test_numbers_beyond_float32_are_not_finite(tmp_path):
    torch.save(torch.tensor([[1e300, 0.0]], dtype=torch.float64), tmp_path / "a.pt")
    _, [error] = read_all(tmp_path)
    assert "tile 0" in error.message


def test_nothing_is_ever_unpickled(tmp_path):
    marker = tmp_path / "marker"
    folder = write_pickles(tmp_path / "features", marker)
    write_clam_features(folder, FEATURES, "good")
    opened = open_feature_folder(folder)
    assert [file.slide_id for file in opened.files] == ["good"]
    assert {error.slide_id: error.reason for error in opened.refused} == dict.fromkeys(
        ("new", "old", "objects"), "unreadable"
    )
    assert not any("weights_only" in error.message for error in opened.refused)
    assert len(list(iter_feature_bags(opened))) == 1
    assert not marker.exists()
    torch.load(folder / "new.pt", weights_only=False)  # the files do what they are made for
    assert marker.exists()


def break_nothing(path):
    path.write_bytes(b"")


def break_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [break_nothing, break_half])
@pytest.mark.parametrize("tool", TOOLS)
def test_damaged_files_cost_their_slide_only(tool, damage, tmp_path):
    write_tool(tool, tmp_path, slide_id="a")
    damage(write_tool(tool, tmp_path, slide_id="b"))
    if tool == "clam":
        (tmp_path / "pt_files" / "b.pt").unlink()
    opened = open_feature_folder(tmp_path)
    assert [file.slide_id for file in opened.files] == ["a"]
    [error] = opened.refused
    assert error.slide_id == "b"
    assert error.reason in ("truncated", "unreadable")


def write_matrix(path, features, corners):
    with h5py.File(path, "w") as file:
        file["features"] = features
        file["coords"] = corners


@pytest.mark.parametrize(
    ("features", "corners", "reason"),
    [
        (FEATURES, CORNERS[:5], "unreadable"),
        (FEATURES.astype(np.int32), CORNERS, "unreadable"),
        (FEATURES, CORNERS * 1e9, "unreadable"),
        (FEATURES, np.full((6, 2), np.nan), "unreadable"),
        (FEATURES, np.zeros((6, 3)), "unreadable"),
        (FEATURES[:0], CORNERS[:0], "no_tissue"),
    ],
)
def test_what_does_not_fit_together_is_refused(features, corners, reason, tmp_path):
    write_matrix(tmp_path / "a.h5", FEATURES, CORNERS)
    write_matrix(tmp_path / "b.h5", features, corners)
    opened, bags = read_all(tmp_path)
    [error] = opened.refused + [bag for bag in bags if isinstance(bag, SlideError)]
    assert (error.slide_id, error.reason) == ("b", reason)


def test_arrays_that_a_small_file_inflates_are_refused(tmp_path):
    write_matrix(tmp_path / "good.h5", FEATURES, CORNERS)
    with h5py.File(tmp_path / "zeros.h5", "w") as file:
        file.create_dataset("features", (20_000_000, 4), "f4", chunks=(1024, 4), compression="gzip")
    with h5py.File(tmp_path / "sparse.h5", "w") as file:
        file.create_dataset("features", (8_000_000, 4), "f4", chunks=(1024, 4), compression="gzip")
    torch.save(torch.ones(1, 4).expand(8_000_000, 4), tmp_path / "view.pt")
    np.savez_compressed(tmp_path / "npz.npz", features=np.zeros((8_000_000, 4), dtype=np.float32))
    opened, bags = read_all(tmp_path)
    errors = opened.refused + [bag for bag in bags if isinstance(bag, SlideError)]
    assert {error.slide_id: error.reason for error in errors} == dict.fromkeys(
        ("zeros", "sparse", "view", "npz"), "too_large"
    )


def test_names_that_are_no_ids(tmp_path):
    write_matrix(tmp_path / "good.h5", FEATURES, CORNERS)
    write_matrix(tmp_path / "=cmd|calc.h5", FEATURES, CORNERS)
    [error] = open_feature_folder(tmp_path).refused
    assert error.reason == "unsafe_name"


def test_folders_without_features(tmp_path):
    write_trident(tmp_path)
    with pytest.raises(ValueError, match="no tile features"):
        open_feature_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        open_feature_folder(tmp_path / "absent")
    write_matrix(tmp_path / "b.h5", FEATURES[:0], CORNERS[:0])
    with pytest.raises(ValueError, match="no_tissue"):
        open_feature_folder(tmp_path)


MANIFEST = [
    ManifestRow(
        "a", "a.svs", "slides/a.svs", case_id="c1", mpp=0.25, report="Benign.", split="val", labels={"grade": 1}
    ),
    ManifestRow("c", "c.svs", "slides/c.svs", case_id="c2", mpp=0.5, split="train", labels={"grade": None}),
    ManifestRow("gone", "g.svs", "slides/g.svs", case_id="c3", split="test", labels={"grade": 3}),
]


def test_the_dataset_has_the_columns_of_slides(tmp_path, caplog):
    for slide_id in ("a", "b", "c"):
        write_stamp(tmp_path / "in", slide_id, features=FEATURES)
    dataset = features_dataset(tmp_path / "in", cache_dir=tmp_path / "cache", manifest=MANIFEST, progress=False)
    rows = dataset.with_format("numpy")
    assert list(dataset["slide_id"]) == ["a", "c"]
    np.testing.assert_array_equal(rows[1]["tile_features"], FEATURES)
    assert rows[1]["tile_features"].dtype == np.float32
    assert rows[0]["tile_xy"].tolist() == CORNERS.tolist()
    assert rows[1]["tile_xy"].tolist() == (CORNERS // 2).tolist()
    first = {key: value for key, value in dataset[0].items() if not key.startswith("tile_")}
    assert first == {
        "slide_id": "a",
        "case_id": "c1",
        "split": "val",
        "path": "slides/a.svs",
        "encoder": "uni2",
        "source_format": "stamp",
        "mpp": 0.25,
        "num_tiles": 6,
        "report": "Benign.",
        "grade": 1,
        "status": "ok",
        "reason": "",
    }
    assert [dataset[0][key] for key in ("tile_size_px", "tile_mpp", "tile_size_level0_px")] == [256, 0.5, 512]
    assert '"gone"' in caplog.text


def test_the_cache_is_used_and_notices_changes(tmp_path, caplog):
    bad = np.full_like(FEATURES, np.nan)
    write_trident_features(tmp_path / "in", FEATURES, "a")
    write_trident_features(tmp_path / "in", bad, "b")
    cache = tmp_path / "cache"
    first = features_dataset(tmp_path / "in", cache_dir=cache, progress=False)
    [path] = cache.glob("*.arrow")
    written = path.stat().st_mtime_ns
    caplog.clear()
    again = features_dataset(tmp_path / "in", cache_dir=cache, progress=False)
    assert path.stat().st_mtime_ns == written
    assert '"b"' in caplog.text  # refusals are reported although nothing was read
    assert first[:] == again[:]
    assert json.loads(path.with_suffix(".refused.jsonl").read_text())["reason"] == "unreadable"
    write_trident_features(tmp_path / "in", FEATURES, "b")
    assert len(features_dataset(tmp_path / "in", cache_dir=cache, progress=False)) == 2


def test_a_dataset_without_any_usable_slide(tmp_path):
    write_trident_features(tmp_path / "in", np.full_like(FEATURES, np.nan), "a")
    with pytest.raises(ValueError, match="not finite"):
        features_dataset(tmp_path / "in", cache_dir=tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
