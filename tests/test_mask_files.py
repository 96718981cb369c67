# SPDX-License-Identifier: Apache-2.0
"""Masks as files: what QuPath expects, what QuPath and others write, images, and files that are no masks."""

import json
import os
import struct
import time
import uuid
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from dre_slcl.training.mask_files import find_mask_file, read_mask
from dre_slcl.training.mask_geojson import mask_to_geojson, write_mask_geojson
from modeling_dre_slcl.slide_info import SlideInfo
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.tissue import tissue_mask

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SHAPE, DOWNSAMPLE = (60, 80), 16.0


def slide(bounds=(0, 0, 1280, 960), canvas=(1280, 960)):
    return SlideInfo("s", Path("s.svs"), *canvas, 0.5, "aperio", (1.0,), bounds, (255, 255, 255))


PLAIN = slide()
CROPPED = slide(bounds=(400, 700, 1280, 960), canvas=(2000, 1900))


def drawn_mask():
    mask = cv2.ellipse(np.zeros(SHAPE, np.uint8), (40, 28), (25, 17), 20, 0, 360, 1, -1)
    mask[20:28, 30:38] = 0
    mask[50:58, 2:12] = 1
    return mask.astype(bool)


def read(path, info=PLAIN, **options):
    return read_mask(path, info=info, shape=SHAPE, downsample=DOWNSAMPLE, **options)


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def pixels(left, top, right, bottom):
    """The mask of a box whose corners are mask pixels."""
    mask = np.zeros(SHAPE, bool)
    mask[top:bottom, left:right] = True
    return mask


def feature(geometry, name=None, **properties):
    if name is not None:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    return {"type": "Feature", "id": str(uuid.uuid4()), "geometry": geometry, "properties": properties}


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


@pytest.fixture
def saved(tmp_path):
    def save(content, name="mask.geojson"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return save


# --- GeoJSON that we write ---


def test_geojson_has_what_qupath_reads():
    geojson = mask_to_geojson(drawn_mask(), downsample=DOWNSAMPLE, bounds=PLAIN.bounds)
    assert geojson["type"] == "FeatureCollection"
    assert len(geojson["features"]) == 2
    assert [item["properties"]["tissue_id"] for item in geojson["features"]] == [0, 1]
    assert sorted(len(item["geometry"]["coordinates"]) for item in geojson["features"]) == [1, 2]
    for item in geojson["features"]:
        uuid.UUID(item["id"])
        assert item["type"] == "Feature"
        assert item["properties"]["objectType"] == "annotation"
        assert item["properties"]["classification"]["name"] == "Tissue"
        assert [type(value) for value in item["properties"]["classification"]["color"]] == [int] * 3
        assert item["geometry"]["type"] == "Polygon"
        for ring in item["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
    json.dumps(geojson, allow_nan=False)
    again = mask_to_geojson(drawn_mask(), downsample=DOWNSAMPLE, bounds=PLAIN.bounds)
    assert again == geojson


def test_geojson_lies_where_the_tissue_is():
    # An independent rasteriser: PIL's, at level 0.
    mask = drawn_mask()
    geojson = mask_to_geojson(mask, downsample=DOWNSAMPLE, bounds=PLAIN.bounds)
    canvas = PIL.Image.new("1", (1280, 960))
    draw = PIL.ImageDraw.Draw(canvas)
    for item in geojson["features"]:
        outer, *holes = item["geometry"]["coordinates"]
        draw.polygon([tuple(point) for point in outer], fill=1)
        for hole in holes:
            draw.polygon([tuple(point) for point in hole], fill=0)
    filled, truth = np.asarray(canvas), np.kron(mask, np.ones((16, 16), bool))
    assert (filled & truth).sum() / (filled | truth).sum() > 0.97
    assert (filled[8::16, 8::16] == mask).mean() > 0.999


@pytest.mark.parametrize("frame", ["qupath", "canvas"])
@pytest.mark.parametrize("info", [PLAIN, CROPPED])
def test_geojson_is_read_as_the_same_mask(tmp_path, info, frame):
    mask = drawn_mask()
    write_mask_geojson(tmp_path / "m.geojson", mask, downsample=DOWNSAMPLE, bounds=info.bounds, frame=frame)
    # The file says its frame.
    assert (read(tmp_path / "m.geojson", info, frame="canvas") == mask).all()
    first = json.loads((tmp_path / "m.geojson").read_text())["features"][0]["geometry"]["coordinates"][0]
    assert np.min(first, axis=0)[1] > 0
    shift = np.array(info.bounds[:2]) if frame == "canvas" else np.zeros(2)
    assert (np.min(first, axis=0) - shift < 1280).all()
    assert (np.min(first, axis=0) >= shift).all()


@pytest.mark.skipif(not DATA.is_dir(), reason="the real slides are not here")
@pytest.mark.parametrize("name", ["slides/tubularadenoma-flat_HE_5x.svs", "containers/erosion_HE_5x.scn"])
def test_masks_of_real_slides_survive(tmp_path, name):
    with SlideReader(DATA / name) as reader:
        overview_rgb, downsample = reader.read_overview(8.0)
        info = reader.info
    mask = tissue_mask(overview_rgb, info.mpp * downsample)
    path = tmp_path / "mask.geojson"
    write_mask_geojson(path, mask, downsample=downsample, bounds=info.bounds)
    again = read_mask(path, info=info, shape=mask.shape, downsample=downsample)
    assert (again & mask).sum() / (again | mask).sum() > 0.999
    assert path.stat().st_size < 200_000


def test_a_mask_without_tissue_is_an_empty_collection(tmp_path):
    write_mask_geojson(tmp_path / "m.geojson", np.zeros(SHAPE, bool), downsample=DOWNSAMPLE, bounds=PLAIN.bounds)
    assert json.loads((tmp_path / "m.geojson").read_text())["features"] == []
    assert not read(tmp_path / "m.geojson").any()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="mask"):
        mask_to_geojson(np.zeros(SHAPE), downsample=1.0, bounds=PLAIN.bounds)
    with pytest.raises(ValueError, match="downsample"):
        mask_to_geojson(np.zeros(SHAPE, bool), downsample=0.0, bounds=PLAIN.bounds)
    with pytest.raises(ValueError, match="frame: expected one of qupath, canvas"):
        mask_to_geojson(np.zeros(SHAPE, bool), downsample=1.0, bounds=PLAIN.bounds, frame="slide")


# --- GeoJSON that others write ---


def test_what_qupath_exports_is_read(saved):
    # As QuPath 0.5 writes it: a hole in a polygon, a class of its own, cells and a line beside the annotations.
    content = {
        "type": "FeatureCollection",
        "features": [
            feature(polygon(box(160, 160, 480, 480), box(320, 320, 400, 400)), "Tumor", objectType="annotation"),
            feature(
                {"type": "MultiPolygon", "coordinates": [[box(640, 0, 800, 160)], [box(0, 640, 160, 800)]]},
                objectType="annotation",
                isLocked=True,
                name="two pieces",
            ),
            feature(polygon(box(160, 160, 240, 240)), "Ignore*", objectType="annotation"),
            feature(polygon(box(640, 0, 720, 80)), "Background: fold", objectType="annotation"),
            feature(polygon(box(960, 800, 1120, 960)), objectType="cell"),
            feature({"type": "LineString", "coordinates": [[0, 0], [900, 900]]}, objectType="annotation"),
        ],
    }
    expected = pixels(10, 10, 30, 30) & ~pixels(20, 20, 25, 25) | pixels(40, 0, 50, 10) | pixels(0, 40, 10, 50)
    expected &= ~pixels(10, 10, 15, 15) & ~pixels(40, 0, 45, 5)
    assert (read(saved(content)) == expected).all()
    # QuPath 0.2 wrote a bare list; some editors write a byte order mark.
    assert (read(saved("\ufeff" + json.dumps(content["features"]), "mask.json")) == expected).all()


@pytest.mark.parametrize("wrap", ["geometry", "feature", "collection", "list"])
def test_bare_geometries_and_collections_are_read(saved, wrap):
    geometry = polygon(box(160, 160, 480, 480))
    content = {
        "geometry": geometry,
        "feature": {"type": "Feature", "geometry": geometry, "properties": None},
        "collection": {
            "type": "GeometryCollection",
            "geometries": [geometry, {"type": "Point", "coordinates": [1, 2]}],
        },
        "list": [[geometry]],
    }[wrap]
    assert (read(saved(content)) == pixels(10, 10, 30, 30)).all()


def test_regions_of_trident_are_read_in_the_canvas_frame(saved):
    content = {"type": "FeatureCollection", "features": [feature(polygon(box(560, 860, 880, 1180)), tissue_id=0)]}
    assert (read(saved(content), CROPPED, frame="canvas") == pixels(10, 10, 30, 30)).all()
    shifted = {"type": "FeatureCollection", "features": [feature(polygon(box(160, 160, 480, 480)))]}
    assert (read(saved(shifted), CROPPED) == pixels(10, 10, 30, 30)).all()


def test_a_pixel_belongs_to_the_tissue_if_its_centre_does(saved):
    found = read(saved(polygon(box(7.9, 7.9, 24.1, 24.1))))
    assert (found == pixels(0, 0, 2, 2)).all()
    assert not read(saved(polygon(box(8.1, 8.1, 23.9, 23.9)))).any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "could not be parsed"),
        ("[" * 500_000, "could not be parsed"),
        ('{"type":' * 100_000, "could not be parsed"),
        ("NaN", "could not be parsed"),
        ("1" * 1_000_000, "expected an object with a type"),
        ("null", "expected an object with a type"),
        ('{"type": "Sphere"}', "expected a type of GeoJSON, found 'Sphere'"),
        ('{"type": ["Polygon"]}', "expected a type of GeoJSON"),
        ('{"type": "FeatureCollection"}', "lacks 'features'"),
        ('{"type": "FeatureCollection", "features": {}}', "features: expected a list"),
        ('{"type": "Feature", "geometry": {"type": "Polygon"}, "properties": {}}', "lacks 'coordinates'"),
        ('{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": []}, "properties": 3}', "properties"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], ["a", 0], [5, 5]]]}', "pairs"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [9], [5, 5]]]}', "pairs"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "at least three"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1e999, 0], [5, 5]]]}', "finite"),
        ('{"type": "Polygon", "coordinates": [null]}', "pairs"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [12800, 0], [5, 5]]]}', "level-0 pixels of this slide"),
        ('{"type": "Point", "coordinates": [5, 5]}', "expected polygons, found none"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(saved, content, message):
    path = saved(content)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith(str(path))


def test_geojson_that_would_take_minutes_is_refused(saved):
    comb = [[x % 1280, 960 * (x % 2)] for x in range(2_000)]
    path = saved({"type": "MultiPolygon", "coordinates": [[comb]] * 300})
    start = time.process_time()
    with pytest.raises(ValueError, match="simplify"):
        read(path)
    assert time.process_time() - start < 10


# --- images ---


def image(tmp_path, values, name="mask.png", **options):
    PIL.Image.fromarray(values, **options).save(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("scale", [1, 3, 0.5])
@pytest.mark.parametrize("name", ["mask.png", "mask.jpg", "mask.tif"])
def test_images_of_any_size_are_read(tmp_path, scale, name):
    large = cv2.resize(drawn_mask().astype(np.uint8) * 255, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    found, mask = read(image(tmp_path, large, name)), drawn_mask()
    assert (found & mask).sum() / (found | mask).sum() > (0.85 if scale < 1 else 0.98)
    if scale == 1 and name != "mask.jpg":
        assert (found == mask).all()


@pytest.mark.parametrize("kind", ["bool", "labels", "blue", "transparent", "palette", "16 bit"])
def test_the_usual_kinds_of_masks_are_read(tmp_path, kind):
    mask = drawn_mask()
    ones = mask.astype(np.uint8)
    values = {
        "bool": mask,
        "labels": ones * 2,
        "blue": np.stack([0 * ones, 0 * ones, 255 * ones], 2),
        "transparent": np.dstack([np.full((*SHAPE, 3), 255, np.uint8), 255 * ones]),
        "palette": ones,
        "16 bit": ones.astype(np.uint16) * 40_000,
    }[kind]
    picture = PIL.Image.fromarray(values)
    if kind == "palette":
        picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(tmp_path / "mask.png")
    assert (read(tmp_path / "mask.png") == mask).all()


def test_an_image_shows_the_frame(tmp_path):
    mask = drawn_mask()
    assert (read(image(tmp_path, mask.astype(np.uint8) * 255), CROPPED) == mask).all()
    canvas = np.zeros((1900, 2000), np.uint8)
    canvas[700:1660, 400:1680] = np.kron(mask, np.ones((16, 16), np.uint8)) * 255
    found = read(image(tmp_path, canvas), CROPPED, frame="canvas")
    assert (found & mask).sum() / (found | mask).sum() > 0.97
    coarse = cv2.resize(canvas, (500, 475), interpolation=cv2.INTER_AREA)
    found = read(image(tmp_path, coarse), CROPPED, frame="canvas")
    assert (found & mask).sum() / (found | mask).sum() > 0.95


def test_the_noise_of_an_empty_jpeg_is_no_tissue(tmp_path):
    noise = np.random.default_rng(0).integers(0, 9, SHAPE, dtype=np.uint8)
    assert not read(image(tmp_path, noise, "mask.jpg")).any()


def png_of(width, height):
    """A PNG whose header promises a size that its data does not keep."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 50)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of(40_000, 30_000), "exceeds limit|at most"),
        (png_of(12_000, 9_000), "at most"),
        (png_of(36_000, 27), "at most"),
        (png_of(80, 80), "another aspect ratio"),
        (png_of(80, 60), "can not be used"),
        (b"no image", "can not be used"),
    ],
)
def test_images_that_are_no_masks_are_refused_from_the_header(tmp_path, content, message):
    path = tmp_path / "mask.png"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert time.process_time() - start < 2


def test_fractions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="fractions"):
        read(image(tmp_path, drawn_mask().astype(np.float32), "mask.tif"))


# --- files ---


@pytest.mark.parametrize(("name", "mebibytes"), [("mask.geojson", 33), ("mask.png", 257)])
def test_huge_files_are_not_read(tmp_path, name, mebibytes):
    path = tmp_path / name
    path.touch()
    os.truncate(path, mebibytes << 20)
    with pytest.raises(ValueError, match="MiB are read"):
        read(path)


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path / "none.png", tmp_path / "a\0.png"):
        with pytest.raises(ValueError, match="expected a mask file"):
            read(path)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.geojson")
    for name in ("folder.png", "pipe.geojson"):
        with pytest.raises(ValueError, match="regular file"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="ending in"):
        read(tmp_path / "mask.npy")


def test_masks_are_found_by_slide_id(tmp_path):
    assert find_mask_file(tmp_path, "s1") is None
    (tmp_path / "s1.png").touch()
    (tmp_path / "s11.png").touch()
    assert find_mask_file(tmp_path, "s1") == tmp_path / "s1.png"
    (tmp_path / "s1.geojson").touch()
    with pytest.raises(ValueError, match=r"expected one mask of s1, found s1\.geojson, s1\.png"):
        find_mask_file(tmp_path, "s1")
