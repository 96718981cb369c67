# SPDX-License-Identifier: Apache-2.0
"""Embeddings come out of every format as they were put in, and what cannot be used is told."""

import json

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import save_file

from dre_slcl.training.embed_files import EmbedRecord, write_embedding, write_table
from dre_slcl.training.evaluation.embedding_table import make_table, mean_by_case, read_embeddings
from dre_slcl.training.manifest import ManifestRow

from .foreign_files import write_atlaspatch, write_clam_features, write_stamp, write_trident_features

IDS = ["s0", "s1", "s2"]
VECTORS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def check(table, ids=IDS, vectors=VECTORS):
    assert table.ids == list(ids)
    assert table.features.dtype == np.float32
    np.testing.assert_allclose(table.features, vectors, rtol=1e-6)


def lists(vectors=VECTORS):
    return pa.array([None if v is None else v.tolist() for v in vectors], pa.list_(pa.float32()))


def write_slide_h5(folder, ids=IDS, vectors=VECTORS, *, as_row=False):
    """TRIDENT's slide features: one vector, and the corners of the tiles it was made of."""
    folder.mkdir(parents=True)
    for slide_id, vector in zip(ids, vectors, strict=True):
        with h5py.File(folder / f"{slide_id}.h5", "w") as file:
            file["features"] = vector[None] if as_row else vector
            file["coords"] = np.zeros((4, 2), np.int64)
    return folder


@pytest.fixture
def embedded(tmp_path):
    """What `dre-slcl embed` leaves: a table, and a file per slide with features of its tiles."""
    rows = [
        ManifestRow(slide_id, tmp_path / f"{slide_id}.svs", f"{slide_id}.svs", f"case-{slide_id}")
        for slide_id in [*IDS, "bad"]
    ]
    records = {slide_id: EmbedRecord(slide_id) for slide_id in IDS}
    records["bad"] = EmbedRecord("bad", "refused", "no_tissue", "nothing found")
    for place, slide_id in enumerate(IDS):
        tiles = torch.arange(10.0).reshape(2, 5) + place
        vector = torch.tensor(VECTORS[place])
        result = {"slide_embedding": vector, "slide_projection": vector[:2] * 2, "residuals": torch.zeros(2, 5)}
        result |= {"codeword_counts": torch.zeros(2), "tile_features": tiles, "tile_xy": torch.zeros(2, 2)}
        result |= {"slide_id": slide_id, "num_tiles": 2, "mpp": 0.5}
        path = tmp_path / "out" / "embeddings" / f"{slide_id}.safetensors"
        write_embedding(path, result, with_tiles=True)
    write_table(tmp_path / "out", rows, records, "safetensors")
    return tmp_path / "out"


def test_a_folder_of_embed(embedded):
    table = read_embeddings(str(embedded))
    check(table)
    assert table.case_ids == ["case-s0", "case-s1", "case-s2"]
    assert [(item["id"], item["reason"]) for item in table.left_out] == [("bad", "no_tissue")]
    check(read_embeddings(f"{embedded}::slide_projection"), vectors=VECTORS[:, :2] * 2)
    check(read_embeddings(str(embedded / "embeddings")))
    means = np.stack([np.arange(10.0).reshape(2, 5).mean(axis=0) + place for place in range(3)])
    check(read_embeddings(f"{embedded}::tile_features", pool="mean"), vectors=means)
    with pytest.raises(ValueError, match="averaged only if asked for"):
        read_embeddings(f"{embedded}::tile_features")


@pytest.mark.parametrize(
    "kind", ["one", "named", "large", "fixed", "double", "numbered", "extension", "folder", "saved"]
)
def test_arrow_tables(tmp_path, kind):
    path, source = tmp_path / "vectors.parquet", str(tmp_path / "vectors.parquet")
    column = {
        "large": pa.array(VECTORS.tolist(), pa.large_list(pa.float32())),
        "fixed": pa.array(VECTORS.tolist(), pa.list_(pa.float32(), 5)),
        "double": pa.array(VECTORS.tolist(), pa.list_(pa.float64())),
    }.get(kind, lists())
    columns = {"slide_id": [f"{name}.svs" for name in IDS] if kind == "extension" else IDS, "embedding": column}
    if kind == "named":
        columns["other"], source = lists(VECTORS * 2), f"{source}::embedding"
    if kind == "numbered":
        columns = {"wsi": IDS, "age": [1.0, 2.0, 3.0]} | {f"f{place}": VECTORS[:, place] for place in (0, 4, 2, 1, 3)}
    if kind == "saved":
        Dataset(pa.table(columns)).save_to_disk(str(tmp_path / "saved"))
        source = str(tmp_path / "saved")
    if kind == "folder":
        (tmp_path / "data").mkdir()
        for part in range(3):
            one = {"slide_id": [IDS[part]], "embedding": lists([VECTORS[part]])}
            pq.write_table(pa.table(one), tmp_path / "data" / f"train-{part}.parquet")
        source = str(tmp_path)
    else:
        pq.write_table(pa.table(columns), path)
    check(read_embeddings(source))


@pytest.mark.parametrize("style", ["json", "spaces", "numbered"])
def test_text_tables(tmp_path, style):
    path = tmp_path / "vectors.csv"
    if style == "numbered":
        lines = [",".join(["case_id", "age", *(f"dim_{place}" for place in range(1, 6))])]
        lines += [",".join([name, "60", *map(str, row)]) for name, row in zip(IDS, VECTORS.tolist(), strict=True)]
    else:
        cells = [json.dumps(row) if style == "json" else " ".join(map(str, row)) for row in VECTORS.tolist()]
        lines = ["slide_id,case_id,vector", *(f'{name},c,"{cell}"' for name, cell in zip(IDS, cells, strict=True))]
    path.write_text("\n".join(lines))
    check(read_embeddings(str(path)))


@pytest.mark.parametrize("as_row", [False, True])
def test_trident_slide_features(tmp_path, as_row):
    job = tmp_path / "job"
    folder = write_slide_h5(job / "20x_256px_0px_overlap" / "slide_features_titan", as_row=as_row)
    check(read_embeddings(str(folder)))
    check(read_embeddings(str(job)))
    write_slide_h5(job / "20x_256px_0px_overlap" / "slide_features_prism")
    with pytest.raises(ValueError, match=r"several encoders .*slide_features_prism.*slide_features_titan"):
        read_embeddings(str(job))


def test_a_folder_of_safetensors(tmp_path):
    for slide_id, vector in zip(IDS, VECTORS, strict=True):
        save_file({"slide_embedding": vector, "other": vector[:2]}, tmp_path / f"{slide_id}.safetensors")
    check(read_embeddings(str(tmp_path)))
    check(read_embeddings(f"{tmp_path}::other"), vectors=VECTORS[:, :2])


@pytest.mark.parametrize("tool", ["trident", "clam", "atlaspatch", "stamp"])
def test_tile_features_are_averaged_only_when_asked(tmp_path, tool):
    tiles = np.random.default_rng(1).normal(size=(3, 6, 5)).astype(np.float32)
    for slide_id, features in zip(IDS, tiles, strict=True):
        if tool == "trident":
            write_trident_features(tmp_path, features, slide_id)
        elif tool == "clam":
            write_clam_features(tmp_path, features, slide_id)
        elif tool == "atlaspatch":
            write_atlaspatch(tmp_path, slide_id, features={"uni": features})
        else:
            write_stamp(tmp_path, slide_id, features=features)
    stored = tiles.astype(np.float16) if tool == "stamp" else tiles
    table = read_embeddings(str(tmp_path), pool="mean")
    assert table.ids == IDS
    np.testing.assert_allclose(table.features, stored.astype(np.float64).mean(axis=1), atol=1e-6)
    with pytest.raises(ValueError, match="features of tiles, not of slides"):
        read_embeddings(str(tmp_path))


def test_what_is_not_finite_or_damaged_is_left_out_with_its_reason(tmp_path):
    vectors = VECTORS.copy()
    vectors[1, 2] = np.nan
    folder = write_slide_h5(tmp_path / "slide_features_x", vectors=vectors)
    (folder / "s3.h5").write_bytes(b"not an HDF5 file")
    with h5py.File(folder / "s4.h5", "w") as file:
        file["features"] = np.zeros((7, 5))
    table = read_embeddings(str(folder))
    check(table, ["s0", "s2"], vectors[[0, 2]])
    assert {item["id"]: item["reason"] for item in table.left_out} == {
        "s1": "not_finite",
        "s3": "unreadable",
        "s4": "unreadable",
    }


def test_what_is_open_or_contradicts_itself_is_refused(tmp_path):
    def write(file_name, **columns):
        pq.write_table(pa.table(columns), tmp_path / file_name)
        return str(tmp_path / file_name)

    with pytest.raises(ValueError, match=r"may occur once.*Found 1: s0 \(2 times\)"):
        read_embeddings(write("double.parquet", slide_id=["s0.svs", "s1", "s0"], v=lists()))
    with pytest.raises(ValueError, match=r"columns of vectors: a, b; name the one that is meant, as in .*::COLUMN"):
        read_embeddings(write("two.parquet", slide_id=IDS, a=lists(), b=lists()))
    with pytest.raises(ValueError, match="`c` is none of them"):
        read_embeddings(write("two.parquet", slide_id=IDS, a=lists(), b=lists()) + "::c")
    with pytest.raises(ValueError, match="no column of vectors"):
        read_embeddings(write("none.parquet", slide_id=IDS, age=[1, 2, 3]))
    with pytest.raises(ValueError, match="expected `slide_id` or `case_id`"):
        read_embeddings(write("ids.parquet", name=IDS, v=lists()))
    with pytest.raises(ValueError, match=r"widths \[3, 5\]"):
        read_embeddings(write("widths.parquet", slide_id=IDS, v=lists([VECTORS[0], VECTORS[1][:3], VECTORS[2]])))
    with pytest.raises(ValueError, match="no usable embedding; the first of 3 left out"):
        read_embeddings(write("null.parquet", slide_id=IDS, v=lists([None, None, None])))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_embeddings(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="the file of one slide; give its folder"):
        read_embeddings(str(write_slide_h5(tmp_path / "h5") / "s0.h5"))


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 5)])
def test_a_row_without_a_vector_is_told_and_moves_no_other(tmp_path, kind):
    cells = [VECTORS[0].tolist(), None, [1.0, 2.0, None, 4.0, 5.0], VECTORS[2].tolist()]
    ids = ["s0", "empty", "holes", "s2"]
    pq.write_table(pa.table({"slide_id": ids, "v": pa.array(cells, kind)}), tmp_path / "v.parquet")
    table = read_embeddings(str(tmp_path / "v.parquet"))
    check(table, ["s0", "s2"], VECTORS[[0, 2]])
    assert {item["id"]: item["reason"] for item in table.left_out} == {"empty": "no_embedding", "holes": "not_finite"}


def test_slides_of_a_case_are_averaged():
    table = make_table("x", IDS, ["b", "a", "b"], VECTORS)
    by_case = mean_by_case(table)
    assert (by_case.ids, by_case.case_ids) == (["b", "a"], ["b", "a"])
    np.testing.assert_allclose(by_case.features, [(VECTORS[0] + VECTORS[2]) / 2, VECTORS[1]], rtol=1e-6)
