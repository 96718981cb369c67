# SPDX-License-Identifier: Apache-2.0
"""Pictures, GeoJSON and tables of tile scores, each read back."""

import json

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from dre_slcl.training import heatmap_files
from modeling_dre_slcl.regions import read_regions, tiles_in_region

BOUNDS, SIDE, DOWNSAMPLE = (100, 40, 800, 600), 50, 4.0


def make_tiles(scored=True, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[1:11, 2:14]
    tile_xy = (np.stack([x.ravel(), y.ravel()], axis=1) * SIDE + BOUNDS[:2]).astype(np.int32)
    scores = rng.normal(size=len(tile_xy)) if scored else None
    return heatmap_files.TileMap("slide-1", tile_xy, SIDE, rng.integers(0, 16, len(tile_xy)), 16, scores, "tumor")


def make_overview():
    return np.full((150, 200, 3), 240, dtype=np.uint8)


def test_geojson_read_back_holds_the_same_tiles_scores_and_colours(tmp_path):
    tiles = make_tiles()
    heatmap_files.write_tile_map_geojson(tmp_path / "a.geojson", tiles, bounds=BOUNDS)
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["dre_slcl_frame"] == "qupath"
    regions = read_regions(tmp_path / "a.geojson", origin_xy=BOUNDS[:2])
    assert len(regions) == len(tiles.tile_xy)
    colours = heatmap_files.tile_colours(tiles)
    for number, (feature, region) in enumerate(zip(content["features"], regions, strict=True)):
        ring = region.polygons[0][0]
        assert np.array_equal(ring.min(axis=0), tiles.tile_xy[number])
        assert np.array_equal(ring.max(axis=0), tiles.tile_xy[number] + SIDE)
        assert tiles_in_region(region, tiles.tile_xy, SIDE).nonzero()[0].tolist() == [number]
        properties = feature["properties"]
        assert properties["objectType"] == "tile"
        measured = {"score": tiles.scores[number], "codeword": tiles.codewords[number]}
        assert properties["measurements"] == measured
        assert properties["color"] == colours[number].tolist()
    assert len({feature["id"] for feature in content["features"]}) == len(regions)
    canvas = heatmap_files.tile_map_geojson(tiles, bounds=BOUNDS, frame="canvas")
    assert canvas["features"][0]["geometry"]["coordinates"][0][0] == tiles.tile_xy[0].tolist()


def test_the_table_holds_every_tile(tmp_path):
    tiles = make_tiles()
    heatmap_files.write_tile_map_table(tmp_path / "a.parquet", tiles)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["slide_id", "x", "y", "score", "codeword"]
    assert set(table["slide_id"].to_pylist()) == {"slide-1"}
    assert np.array_equal(np.stack([table["x"], table["y"]], axis=1), tiles.tile_xy)
    np.testing.assert_allclose(table["score"].to_numpy(), tiles.scores, rtol=1e-6)
    assert table["codeword"].to_pylist() == tiles.codewords.tolist()
    assert table.schema.metadata[b"tile_size_level0_px"] == b"50"
    heatmap_files.write_tile_map_table(tmp_path / "b.parquet", make_tiles(scored=False))
    assert pq.read_table(tmp_path / "b.parquet")["score"].null_count == len(tiles.tile_xy)


def test_colours_are_red_for_and_blue_against_and_white_at_zero():
    tiles = heatmap_files.TileMap(
        "s", np.zeros((4, 2), np.int32), 1, np.zeros(4, int), 2, np.array([-1.0, 0.0, 1.0, 1.0])
    )
    against, none, speaks_for, _ = heatmap_files.tile_colours(tiles).astype(int)
    assert against[2] > against[0] + 50
    assert speaks_for[0] > speaks_for[2] + 50
    assert np.ptp(none) < 5
    assert none.min() > 240


def test_a_painted_pixel_has_the_colour_of_its_tile():
    tiles = make_tiles()
    colours = heatmap_files.tile_colours(tiles, by_codeword=True)
    assert len(np.unique(heatmap_files._codeword_palette(16), axis=0)) == 16
    painted = heatmap_files.paint_tiles(make_overview(), DOWNSAMPLE, BOUNDS, tiles, colours)
    for number, corner in enumerate(tiles.tile_xy):
        x, y = ((corner - BOUNDS[:2] + SIDE / 2) / DOWNSAMPLE).astype(int)
        assert np.abs(painted[y, x].astype(int) - (0.6 * colours[number] + 0.4 * 240)).max() <= 1
    assert (painted[:5] == 240).all()


@pytest.mark.parametrize("by_codeword", [False, True])
def test_the_picture_opens_and_shows_more_than_the_slide(tmp_path, by_codeword):
    path = tmp_path / "a.png"
    heatmap_files.draw_tile_map(path, make_overview(), DOWNSAMPLE, BOUNDS, make_tiles(), by_codeword=by_codeword)
    with PIL.Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 30


@pytest.mark.parametrize("scores", [np.array([0.0, np.nan]), np.zeros(3)])
def test_one_finite_score_per_tile_is_wanted(scores):
    with pytest.raises(ValueError, match="2 finite numbers"):
        heatmap_files.TileMap("s", np.zeros((2, 2), np.int32), 1, np.zeros(2, int), 4, scores)


def test_equal_scores_have_a_scale():
    assert heatmap_files.score_limit(np.zeros(5)) == 1.0
    assert heatmap_files.score_limit(np.array([0.0] * 99 + [3.0])) == 3.0
