# SPDX-License-Identifier: Apache-2.0
"""Regions against matplotlib's geometry, GeoJSON as QuPath writes it, and embeddings of regions without encoding."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.path import Path as Outline

from modeling_dre_slcl.regions import Region, box_region, read_regions, tiles_in_region

from .tiny_models import tiny_model

SIDE = 10


def make_tiles(columns=40, rows=30):
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int32) * SIDE


def star(seed, centre=(200.0, 150.0), points=37):
    rng = np.random.default_rng(seed)
    angle, radius = np.sort(rng.uniform(0, 2 * np.pi, points)), rng.uniform(20, 140, points)
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


@pytest.mark.parametrize("seed", range(8))
def test_tiles_in_a_polygon_with_a_hole_are_those_of_another_library(seed):
    tiles, outer, hole = make_tiles(), star(seed), star(seed, points=700) * 0.25 + [150.0, 112.5]
    found = tiles_in_region(Region("tumour", ((outer, hole),)), tiles, SIDE)
    centres = tiles + SIDE / 2
    inside = [Outline(np.concatenate([ring, ring[:1]])).contains_points(centres) for ring in (outer, hole)]
    assert np.array_equal(found, inside[0] ^ inside[1])
    assert 0 < found.sum() < len(tiles)


def test_boxes_divide_tiles_without_rest_or_overlap():
    tiles = make_tiles()
    boxes = [box_region(x, 0, 125, 400) for x in (0, 125, 250, 375)]
    members = np.stack([tiles_in_region(box, tiles, SIDE) for box in boxes])
    assert (members.sum(axis=0) == 1).all()
    with pytest.raises(ValueError, match="positive width"):
        box_region(0, 0, 0, 5)


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def closed(ring):
    return [*ring.tolist(), ring[0].tolist()]


def test_qupath_annotations_are_read_with_names_and_frame(tmp_path):
    outer, hole = star(1), star(1) * 0.2 + [160.0, 120.0]
    moved = np.array([7, 11])
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [closed(outer), closed(hole)]},
            "properties": {"objectType": "annotation", "name": "core", "classification": {"name": "Tumor"}},
        },
        {
            "type": "Feature",
            "geometry": {"type": "MultiPolygon", "coordinates": [[closed(hole)], [closed(outer + 400)]]},
            "properties": {"objectType": "annotation", "classification": {"name": "Stroma"}},
        },
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {}},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [closed(hole)]}, "properties": None},
    ]
    path = write(tmp_path / "slide.geojson", {"type": "FeatureCollection", "features": features})
    regions = read_regions(path, origin_xy=(7, 11))
    assert [region.name for region in regions] == ["core", "Stroma", "region 3"]
    np.testing.assert_allclose(regions[0].polygons[0][1][:-1], hole + moved)
    tiles = make_tiles()
    assert np.array_equal(
        tiles_in_region(regions[0], tiles, SIDE),
        tiles_in_region(Region("", ((outer + moved, hole + moved),)), tiles, SIDE),
    )


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": []},
        {"type": "FeatureCollection"},
        {"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]},
        {"type": "Polygon", "coordinates": [[[0, 0], [1, "a"], [2, 2]]]},
        {"type": "Star"},
        [3],
    ],
)
def test_what_is_no_region_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"slide\.geojson"):
        read_regions(write(tmp_path / "slide.geojson", content))


def test_a_region_and_the_rest_make_the_slide_without_new_encoding():
    model, tiles = tiny_model(), make_tiles(10, 8)
    features = F.normalize(torch.randn(80, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    inside = torch.from_numpy(tiles_in_region(box_region(0, 0, 42, 80), tiles, SIDE))
    whole, region = model.state_of_tiles(features), model.state_of_tiles(features[inside])
    assert region.num_tiles == 32
    assert whole - region == model.state_of_tiles(features[~inside])
    with torch.no_grad():
        expected = model.get_slide_features(features[~inside][None]).slide_embedding
    torch.testing.assert_close(model.get_state_features(whole - region).slide_embedding, expected, rtol=0, atol=1e-5)
