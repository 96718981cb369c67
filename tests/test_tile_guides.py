# SPDX-License-Identifier: Apache-2.0
"""Masks and coordinates that decide where tiles are, through the whole build."""

import json

import cv2
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from dre_slcl.training.manifest import read_manifest
from dre_slcl.training.tile_guides import add_guides
from modeling_dre_slcl.tile_grid import TileGridConfig

from .slide_cohort import build, write_slide

GRID = TileGridConfig(tile_size_px=64, tile_mpp=1.0, min_tissue_fraction=0.9)


@pytest.fixture
def slides(tmp_path):
    """Two slides of 512 x 512 px at 1 um/px; see `slide_cohort`."""
    (tmp_path / "slides").mkdir()
    for name in ("a", "b"):
        write_slide(tmp_path / "slides" / f"{name}.tif", seed=ord(name))
    return tmp_path / "slides"


def square(left, top, right, bottom):
    return {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]],
        },
        "properties": {"objectType": "annotation"},
    }


def rows_of(out):
    return {row["slide_id"]: row for row in pq.read_table(out / "slides").to_pylist()}


def test_tiles_lie_where_masks_say(slides, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": [square(64, 128, 192, 256)]})
    )
    image = np.zeros((128, 128), np.uint8)
    image[96:, 112:] = 255  # the lower right corner, at a quarter of the slide's size
    cv2.imwrite(str(masks / "b.png"), image)
    summary = build(slides, tmp_path / "out", GRID, mask_dir=masks)
    assert summary.exit_code == 0
    rows = rows_of(tmp_path / "out")
    assert rows["a"]["tile_xy"] == [[64, 128], [128, 128], [64, 192], [128, 192]]
    assert rows["b"]["tile_xy"] == [[448, 384], [448, 448]]
    assert rows["a"]["tissue_fraction"] == pytest.approx(128 * 128 / 512**2, abs=0.01)
    exported = json.loads((tmp_path / "out" / "masks" / "a.geojson").read_text())
    corners = np.concatenate([f["geometry"]["coordinates"][0] for f in exported["features"]])
    np.testing.assert_allclose([corners.min(axis=0), corners.max(axis=0)], [[64, 128], [192, 256]], atol=8)


def test_a_missing_or_broken_mask_costs_its_slide_only(slides, tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text(
        "slide_id,path,mask\na,slides/a.tif,a.geojson\nb,slides/b.tif,\nc,slides/../slides/b.tif,no.png\n"
    )
    (tmp_path / "a.geojson").write_text('{"type": "FeatureCollection", "features": [{"type": "Feat')
    summary = build(table, tmp_path / "out", TileGridConfig(tile_size_px=64, tile_mpp=1.0))
    assert (summary.exit_code, summary.refused_by_reason) == (3, {"mask_missing": 1, "mask_unusable": 1})
    assert rows_of(tmp_path / "out")["b"]["num_tiles"] > 0  # an empty cell: tissue is looked for
    assert str(tmp_path) not in (tmp_path / "out" / "refused.jsonl").read_text()


def test_a_changed_mask_is_noticed(slides, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("a", "b"):
        (masks / f"{name}.geojson").write_text(json.dumps(square(0, 0, 128, 128)))
    build(slides, tmp_path / "out", GRID, mask_dir=masks)
    assert build(slides, tmp_path / "out", GRID, mask_dir=masks).is_up_to_date
    (masks / "b.geojson").write_text(json.dumps(square(0, 0, 128, 64)))
    summary = build(slides, tmp_path / "out", GRID, mask_dir=masks)
    assert (summary.is_up_to_date, summary.num_reused) == (False, 1)
    rows = rows_of(tmp_path / "out")
    assert (rows["a"]["num_tiles"], rows["b"]["num_tiles"]) == (4, 2)


def test_tiles_of_another_tool_are_taken(slides, tmp_path):
    folder = tmp_path / "job" / "20x_64px_0px_overlap" / "patches"
    folder.mkdir(parents=True)
    corners = [[128, 0], [0, 64], [448, 448]]
    with h5py.File(folder / "a_patches.h5", "w") as file:
        file["coords"] = np.array(corners, dtype=np.int64)
        file["coords"].attrs.update({"patch_size": 64, "patch_size_level0": 64, "overlap": 0, "name": "a"})
        file["coords"].attrs.update({"level0_width": 512, "level0_height": 512, "savetodir": "None"})
        file["coords"].attrs.update({"level0_magnification": 10, "target_magnification": 10})
    summary = build(slides, tmp_path / "out", GRID, coordinates=tmp_path / "job")
    assert (summary.exit_code, summary.refused_by_reason) == (3, {"coordinates_missing": 1})
    row = rows_of(tmp_path / "out")["a"]
    assert (row["tile_xy"], row["tissue_fraction"]) == (corners, None)
    assert not (tmp_path / "out" / "masks").exists()
    assert build(slides, tmp_path / "out", GRID, coordinates=tmp_path / "job").is_up_to_date


def test_both_masks_and_coordinates_are_refused(slides, tmp_path):
    rows = read_manifest(slides)
    with pytest.raises(ValueError, match="given both"):
        add_guides(rows, mask_dir=slides, coordinates=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder of masks"):
        add_guides(rows, mask_dir=tmp_path / "nowhere")
