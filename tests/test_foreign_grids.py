# SPDX-License-Identifier: Apache-2.0
"""Coordinates of five tools as our tile grid: files in each tool's layout, expected values worked out by hand."""

import functools
import re
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest

from dre_slcl.training.foreign_grids import find_coordinates, index_coordinates, read_coordinates
from dre_slcl.training.foreign_worker import read_foreign
from modeling_dre_slcl.slide_info import SlideError, SlideInfo
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.slide_tiles import iter_tile_batches
from modeling_dre_slcl.tile_grid import TileGridConfig

from .foreign_files import (
    Payload,
    damage_heap,
    trident_attributes,
    write_atlaspatch,
    write_clam,
    write_slide2vec,
    write_stamp,
    write_trident,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WRITERS = {
    "trident": write_trident,
    "clam": write_clam,
    "atlaspatch": write_atlaspatch,
    "stamp": write_stamp,
    "slide2vec": write_slide2vec,
}
CONFIG = TileGridConfig()  # 256 px at 0.5 um/px: 512 level-0 pixels at 0.25 um/px


def make_info(*, mpp=0.25, width_px=2000, height_px=1500):
    return SlideInfo(
        slide_id="a",
        path=Path("a.svs"),
        width_px=width_px,
        height_px=height_px,
        mpp=mpp,
        vendor="aperio",
        level_downsamples=(1.0, 2.0),
        bounds=(0, 0, width_px, height_px),
        background_rgb=(255, 255, 255),
    )


def refusal(path, info=None, config=CONFIG):
    with pytest.raises(SlideError) as caught:
        read_coordinates(path, info or make_info(), config)
    assert caught.value.slide_id == "a"
    assert re.search(rf"{path.name.split('.')[0]}\.[a-z]", caught.value.message)  # the file, or the JSON beside it
    assert str(path.parent) not in caught.value.message
    return caught.value.reason, caught.value.message


@pytest.mark.parametrize("tool", WRITERS)
def test_each_tool_gives_the_grid_in_its_own_order(tool, tmp_path):
    path = WRITERS[tool](tmp_path)
    grid = read_coordinates(find_coordinates(tmp_path, "a"), make_info(), CONFIG)
    assert find_coordinates(tmp_path, "a") == path
    assert grid.tile_xy.tolist() == [[0, 0], [0, 512], [512, 0], [512, 512], [1024, 0], [1024, 512]]
    assert (grid.tile_xy.dtype, grid.tissue_fraction.dtype) == (np.int32, np.float32)
    assert (grid.tile_size_px, grid.tile_mpp, grid.stride_px, grid.tile_size_level0_px) == (256, 0.5, 256, 512)
    if tool == "slide2vec":
        np.testing.assert_allclose(grid.tissue_fraction, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], rtol=1e-6)
    else:
        assert np.isnan(grid.tissue_fraction).all()


@pytest.mark.parametrize("tool", ["trident", "clam", "atlaspatch", "stamp"])
def test_a_file_under_another_name_is_recognised_by_its_content(tool, tmp_path):
    path = WRITERS[tool](tmp_path).rename(tmp_path / "renamed_patches.h5")
    assert len(read_coordinates(path, make_info(), CONFIG)) == 6


def test_micrometres_become_the_nearest_level0_pixels(tmp_path):
    # 0.2527 um/px: 253 px are 63.9331 um; 100.1 um are 396.12 px, 100.2 um are 396.52 px.
    path = write_stamp(tmp_path, corners_um=[[0, 63.9331], [100.1, 100.2]], tile_size_um=129.0)
    grid = read_coordinates(path, make_info(mpp=0.2527), CONFIG)
    assert grid.tile_xy.tolist() == [[0, 253], [396, 397]]
    assert grid.tile_size_level0_px == 512  # 506.5, but the level of downsample 2 is within 2% and used as it is


def test_stamp_files_before_2_1_call_the_size_tile_size(tmp_path):
    path = write_stamp(tmp_path, without=("tile_size_um",), tile_size=128.0)
    assert len(read_coordinates(path, make_info(), CONFIG)) == 6


@pytest.mark.parametrize(
    ("side", "is_accepted"), [(507, True), (517, True), (522.2, True), (501.8, True), (522.4, False), (501.6, False)]
)
def test_a_footprint_within_two_percent_is_ours(side, is_accepted, tmp_path):
    path = write_trident(tmp_path, patch_size_level0=side)
    if is_accepted:
        assert read_coordinates(path, make_info(), CONFIG).tile_size_level0_px == 512
    else:
        assert refusal(path)[0] == "geometry_mismatch"


@pytest.mark.parametrize(
    ("tool", "changes", "mpp"),
    [
        ("trident", {"patch_size_level0": 256}, 0.35),  # "20x" on a slide of 0.35 um/px
        ("trident", {"patch_size": 512, "patch_size_level0": 1024}, 0.25),
        ("clam", {"patch_size": 224, "patch_level": 0, "downsample": (1.0, 1.0), "level_dim": (2000, 1500)}, 0.25),
        ("atlaspatch", {"patch_size": 224, "patch_size_level0": 448}, 0.25),
        ("stamp", {"tile_size_um": 256.0, "tile_size_px": 224}, 0.25),
        ("slide2vec", {"tiling": {"tile_size_lv0": 448, "step_px_lv0": 448, "requested_tile_size_px": 224}}, 0.25),
    ],
)
def test_a_mismatch_states_both_sizes_and_settings_that_would_fit(tool, changes, mpp, tmp_path):
    path = WRITERS[tool](tmp_path, **changes)
    reason, message = refusal(path, make_info(mpp=mpp))
    assert reason == "geometry_mismatch"
    assert f"{256 * 0.5 / mpp:.6g}" in message
    advice = re.findall(r"tile_size_px (\d+) with tile_mpp ([\d.]+\d)", message)
    assert len(advice) == 2
    for size, tile_mpp in advice:
        config = TileGridConfig(tile_size_px=int(size), tile_mpp=float(tile_mpp))
        assert len(read_coordinates(path, make_info(mpp=mpp), config)) == 6


def test_another_stride_is_refused_with_the_one_that_fits(tmp_path):
    corners = [[0, 0], [256, 0], [512, 0]]
    path = write_trident(tmp_path, corners=corners, overlap=128)
    reason, message = refusal(path)
    assert reason == "geometry_mismatch"
    assert "256 level-0 px apart" in message
    assert "stride_px of 128" in message
    grid = read_coordinates(path, make_info(), TileGridConfig(stride_px=128))
    assert (grid.tile_xy.tolist(), grid.stride_px) == (corners, 128)


@pytest.mark.parametrize("tool", ["trident", "clam", "atlaspatch", "slide2vec"])
def test_coordinates_of_another_slide_are_refused(tool, tmp_path):
    reason, message = refusal(WRITERS[tool](tmp_path), make_info(width_px=2100))
    assert reason == "geometry_mismatch"
    assert "2000 x 1500" in message
    assert "2100 x 1500" in message


def test_sizes_that_the_tool_left_open_are_not_compared(tmp_path):
    path = write_trident(tmp_path, level0_width=None, level0_height=None)
    with h5py.File(path) as file:
        assert file["coords"].attrs["level0_width"] == "None"
    assert len(read_coordinates(path, make_info(width_px=5000), CONFIG)) == 6


def test_the_rounded_size_of_a_coarser_level_is_no_mismatch(tmp_path):
    path = write_clam(tmp_path, level_dim=(999, 750))
    assert len(read_coordinates(path, make_info(width_px=1999), CONFIG)) == 6


@pytest.mark.parametrize("tool", ["trident", "clam", "atlaspatch", "slide2vec"])
def test_no_tile_is_no_tissue(tool, tmp_path):
    WRITERS[tool](tmp_path, corners=np.empty((0, 2), dtype=np.int64))
    reason, message = refusal(find_coordinates(tmp_path, "a"))
    assert reason == "no_tissue"
    assert tool in message


@pytest.mark.parametrize(
    ("corners", "reason", "message"),
    [
        ([[0, 0], [-1, 5]], "geometry_mismatch", "1 of 2 tiles begin outside"),
        ([[0, 0], [0, 1500]], "geometry_mismatch", r"tile 1 at \(0, 1500\)"),
        ([[0, 0], [5, 5], [0, 0]], "unreadable", "1 of 3 tiles occur twice"),
        ([[0, 0, 1]], "unreadable", "expected"),
        ([0, 0], "unreadable", "expected"),
    ],
)
def test_corners_that_cannot_be(corners, reason, message, tmp_path):
    path = write_trident(tmp_path)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["coords"].attrs)
        del file["coords"]
        file["coords"] = np.array(corners)
        file["coords"].attrs.update(attributes)
    found = refusal(path)
    assert found[0] == reason
    assert re.search(message, found[1])


def test_a_corner_may_be_the_last_pixel_of_the_slide(tmp_path):
    path = write_trident(tmp_path, corners=[[1999, 1499]])
    assert read_coordinates(path, make_info(), CONFIG).tile_xy.tolist() == [[1999, 1499]]


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.5, "whole numbers")]
)
def test_corners_that_are_no_pixels(value, message, tmp_path):
    path = write_trident(tmp_path)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["coords"].attrs)
        del file["coords"]
        file["coords"] = np.array([[0, 0], [value, 0]])
        file["coords"].attrs.update(attributes)
    assert refusal(path)[0] == "unreadable"
    assert message in refusal(path)[1]


@pytest.mark.parametrize(
    ("tool", "changes", "message"),
    [
        ("trident", {"without": ("patch_size_level0", "target_magnification")}, "patch_size_level0"),
        ("trident", {"patch_size_level0": None}, ""),
        ("trident", {"patch_size_level0": -512}, "patch_size_level0"),
        ("trident", {"patch_size_level0": "wide"}, "'wide'"),
        ("clam", {"without": ("downsample",)}, "downsample"),
        ("clam", {"downsample": (np.nan, 2.0)}, "downsample"),
        ("stamp", {"without": ("tile_size_um",)}, "tile_size_um"),
        ("stamp", {"unit": "px"}, "'px'"),
        ("slide2vec", {"with_meta": False}, "coordinates.meta.json"),
        ("slide2vec", {"tiling": {"tile_size_lv0": 0}}, "tile_size_lv0"),
        ("slide2vec", {"tiling": {"n_tiles": 7}}, "7 tiles|expected"),
        ("slide2vec", {"fractions": [0, 0, 0, 0, 0, 1.5]}, "tissue_fractions"),
    ],
)
def test_missing_and_wrong_attributes_are_named(tool, changes, message, tmp_path):
    path = WRITERS[tool](tmp_path, **changes)
    if changes == {"patch_size_level0": None}:  # 256 px at 20x of 40x: the magnifications say 512 px as well
        assert read_coordinates(path, make_info(), CONFIG).tile_size_level0_px == 512
        return
    reason, found = refusal(path)
    assert reason in ("unsupported", "unreadable")
    assert re.search(message, found)


def test_damaged_files(tmp_path):
    path = write_trident(tmp_path, corners=np.arange(4000).reshape(-1, 2) % 1400)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert refusal(path)[0] == "truncated"
    path.write_bytes(b"")
    assert refusal(path)[0] == "truncated"
    path.write_bytes(b"no HDF5 at all")
    assert refusal(path)[0] == "unreadable"
    path.unlink()
    assert refusal(path)[0] == "not_a_file"
    path.mkdir()
    assert refusal(path)[0] == "not_a_file"


def test_damage_inside_of_a_file_is_a_refusal_or_harmless(tmp_path):
    original = write_trident(tmp_path)
    content = original.read_bytes()
    rng = np.random.default_rng(0)
    reasons = set()
    for position in rng.integers(0, len(content), 300):
        changed = bytearray(content)
        changed[position] ^= 1 << int(rng.integers(8))
        original.write_bytes(changed)
        try:
            reasons.add(len(read_coordinates(original, make_info(), CONFIG)))
        except SlideError as error:
            reasons.add(error.reason)
    assert {6, "unreadable"} <= reasons


def test_a_file_that_hangs_the_library_ends_its_worker_only(tmp_path):
    good, bad = write_trident(tmp_path), write_trident(tmp_path, "b")
    damage_heap(bad)
    read = functools.partial(read_coordinates, info=make_info(), config=CONFIG, max_seconds=2.0)
    results = read_foreign(read, [good, bad], names=["good", "bad"], seconds=200, isolated=True)
    assert len(next(results)) == 6
    try:
        result = str(next(results))
    except SlideError as error:  # by an HDF5 library that notices
        result = error.reason
    assert result == "unreadable" or result.startswith("bad: the process that read it died")


def test_links_out_of_the_file_are_not_followed(tmp_path):
    secret = write_trident(tmp_path / "elsewhere")
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["coords"] = h5py.ExternalLink(str(secret), "coords")
    assert refusal(path) == ("unsupported", "coordinate file a.h5: `coords` is a link; copy the data into the file")
    (tmp_path / "raw").write_bytes(bytes(16))
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", (1, 2), "i8", external=[(str(tmp_path / "raw"), 0, 16)])
        file["coords"].attrs.update(trident_attributes())
    assert refusal(path)[0] == "unsupported"


def test_an_array_that_a_small_file_inflates_is_not_read(tmp_path):
    path = write_trident(tmp_path)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["coords"].attrs)
        del file["coords"]
        file.create_dataset("coords", (9_000_000, 2), "i8", chunks=(1 << 16, 2), compression="gzip")
        file["coords"].attrs.update(attributes)
    assert path.stat().st_size < 1 << 20
    assert refusal(path)[0] == "too_large"
    with h5py.File(path, "r+") as file:
        del file["coords"]
        file.create_dataset("coords", (1 << 40, 2), "i8", chunks=(1 << 16, 2))
        file["coords"].attrs.update(attributes)
    assert refusal(path)[0] == "too_large"


@pytest.mark.parametrize("name", ["x", "tissue_fractions"])
def test_object_arrays_are_not_loaded(name, tmp_path):
    path = write_slide2vec(tmp_path)
    with np.load(path) as archive:
        arrays = dict(archive)
    marker = tmp_path / "marker"
    arrays[name] = np.array([Payload(marker)] * 6, dtype=object)
    np.savez(path, **arrays)
    assert refusal(path)[0] == "unreadable"
    assert not marker.exists()


def test_the_index_prefers_coordinates_to_their_copies_in_feature_files(tmp_path):
    job = tmp_path / "job"
    path = write_trident(job)
    copy = job / "20x_256px_0px_overlap" / "features_uni_v1" / "a.h5"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    (job / ".cache").mkdir()
    (job / ".cache" / "b.h5").touch()
    index = index_coordinates(job)
    assert find_coordinates(index, "a") == path
    assert find_coordinates(index, "b") is None
    assert find_coordinates(copy.parent, "a") == copy  # where there is nothing else, features will do
    assert len(read_coordinates(copy, make_info(), CONFIG)) == 6


def test_two_runs_in_one_job_are_ambiguous(tmp_path):
    first = write_trident(tmp_path)
    second = write_trident(tmp_path, run="10x_256px_0px_overlap")
    with pytest.raises(ValueError, match=r"20x_256px.*|10x_256px") as caught:
        find_coordinates(tmp_path, "a")
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)
    assert find_coordinates(tmp_path / "10x_256px_0px_overlap", "a") == second


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        find_coordinates(tmp_path / "absent", "a")


@pytest.mark.skipif(not (DATA / "slides").is_dir(), reason="the real slides are not on this machine")
@pytest.mark.parametrize("tool", WRITERS)
def test_on_a_real_slide_the_tiles_are_what_openslide_shows_there(tool, tmp_path):
    slide_path = DATA / "slides" / "lung-scc_HE3_10x.svs"
    with openslide.OpenSlide(slide_path) as slide:
        width, height = slide.dimensions
        mpp = float(slide.properties["openslide.mpp-x"])
        corners = np.array([[width // 2, height // 3], [64, 128], [width - 100, height - 200]])
        expected = [np.asarray(slide.read_region(tuple(map(int, xy)), 0, (64, 64)))[..., :3] for xy in corners]
    level0 = {"level0_width": width, "level0_height": height}
    changes = {
        "trident": {"patch_size": 64, "patch_size_level0": 64, **level0},
        "atlaspatch": {"patch_size": 64, "patch_size_level0": 64, **level0},
        "clam": {"patch_size": 64, "patch_level": 0, "downsample": (1.0, 1.0), "level_dim": (width, height)},
        "stamp": {"tile_size_um": 64 * mpp, "tile_size_px": 64},
        "slide2vec": {"tiling": {"tile_size_lv0": 64, "step_px_lv0": 64}},
    }[tool]
    corners_name = "corners_um" if tool == "stamp" else "corners"
    path = WRITERS[tool](tmp_path, **{corners_name: corners * (mpp if tool == "stamp" else 1)}, **changes)
    if tool == "slide2vec":
        meta = path.with_name("a.coordinates.meta.json")
        meta.write_text(meta.read_text().replace("2000", str(width)).replace("1500", str(height)))
    with SlideReader(slide_path) as reader:
        grid = read_coordinates(path, reader.info, TileGridConfig(tile_size_px=64, tile_mpp=mpp))
    assert grid.tile_xy.tolist() == corners.tolist()
    [(_, pixels)] = iter_tile_batches(slide_path, grid, batch_size=8)
    inside = np.asarray(expected[:2]).astype(int)
    assert np.abs(pixels[:2].astype(int) - inside).max() <= 1
