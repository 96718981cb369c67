# SPDX-License-Identifier: Apache-2.0
"""Datasets whose tiles are the slides' own compressed ones, against OpenSlide's pixels and tifffile's bytes."""

import io
import json

import cv2
import numpy as np
import openslide
import PIL.Image
import pyarrow.parquet as pq
import pytest
import simplejpeg
import tifffile

from modeling_dre_slcl.tile_grid import TileGridConfig

from .slide_cohort import build, parquet_hashes

TILE_PX = 64
GRID = TileGridConfig(tile_size_px=TILE_PX, tile_mpp=1.0, mask_mpp=8.0)


def write_jpeg_slide(path, *, side_px=512, tile_px=TILE_PX, mpp=1.0, seed=0):
    rng = np.random.default_rng(seed)
    image = np.full((side_px, side_px, 3), 244, dtype=np.uint8)
    stain = np.array([190, 110, 160]) + rng.integers(-30, 30, size=(side_px // 8, side_px // 8, 3))
    stain = cv2.resize(stain.astype(np.uint8), (side_px, side_px), interpolation=cv2.INTER_CUBIC)
    image[100:-60, 70:-90] = stain[100:-60, 70:-90]
    description = f"Aperio Image Library v12\n{side_px}x{side_px} ({tile_px}x{tile_px}) JPEG/RGB|MPP = {mpp}"
    tifffile.imwrite(
        path,
        image,
        tile=(tile_px, tile_px),
        photometric="ycbcr",
        compression="jpeg",
        compressionargs={"level": 85},
        description=description,
        metadata=None,
    )
    return path


def rows_of(out, table="tiles"):
    return [row for path in sorted(out.glob(f"{table}/*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_jpeg_slide(folder / "own.svs")
    write_jpeg_slide(folder / "other.svs", tile_px=128, seed=1)
    return folder


def test_copied_tiles_are_the_files_own_and_show_what_openslide_shows(slides, tmp_path):
    summary = build(slides, tmp_path / "out", GRID, pixels="copy")
    rows = {row["slide_id"]: row for row in rows_of(tmp_path / "out", "slides")}
    assert rows["own"]["num_copied"] == rows["own"]["num_tiles"] > 20
    assert rows["other"]["num_copied"] == 0 < rows["other"]["num_tiles"]
    assert summary.num_copied == rows["own"]["num_copied"]
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert content["num_copied"] == summary.num_copied
    assert content["cpu_seconds"].keys() == {"open", "mask", "read", "write", "merge"}
    with tifffile.TiffFile(slides / "own.svs") as file, openslide.OpenSlide(slides / "own.svs") as opened:
        page, content = file.pages[0], (slides / "own.svs").read_bytes()
        for tile in rows_of(tmp_path / "out"):
            if tile["slide_id"] != "own":
                continue
            number = tile["y"] // TILE_PX * (page.imagewidth // TILE_PX) + tile["x"] // TILE_PX
            start, size = page.dataoffsets[number], page.databytecounts[number]
            scan = content[start : start + size]
            assert scan[scan.index(b"\xff\xda") :] in tile["image"]["bytes"]  # the compressed picture as it is
            region = opened.read_region((tile["x"], tile["y"]), 0, (TILE_PX, TILE_PX)).convert("RGB")
            shown = np.asarray(region, dtype=np.int16)
            decoded = simplejpeg.decode_jpeg(tile["image"]["bytes"]).astype(np.int16)
            np.testing.assert_array_equal(decoded, shown)
            other = np.asarray(PIL.Image.open(io.BytesIO(tile["image"]["bytes"])), dtype=np.int16)
            assert np.abs(other - shown).max() <= 4  # another decoder, with other rounding


def test_what_cannot_be_copied_is_refused_if_asked(slides, tmp_path):
    summary = build(slides, tmp_path / "out", GRID, pixels="copy", misaligned="refuse")
    assert (summary.num_ok, summary.refused_by_reason, summary.exit_code) == (1, {"misaligned": 1}, 3)
    line = json.loads((tmp_path / "out" / "refused.jsonl").read_text())
    assert line["slide_id"] == "other"
    assert "--misaligned encode" in line["message"]


def test_encoded_fallback_equals_an_encoded_dataset(slides, tmp_path):
    build(slides, tmp_path / "copy", GRID, pixels="copy")
    build(slides, tmp_path / "encode", GRID, pixels="encode")
    copied, encoded = ([t for t in rows_of(tmp_path / n) if t["slide_id"] == "other"] for n in ("copy", "encode"))
    assert copied == encoded


def test_a_copied_dataset_restarts_and_grows(slides, tmp_path):
    build(slides, tmp_path / "out", GRID, pixels="copy")
    assert build(slides, tmp_path / "out", GRID, pixels="copy").is_up_to_date
    (tmp_path / "more").mkdir()
    for path in slides.iterdir():
        (tmp_path / "more" / path.name).write_bytes(path.read_bytes())
    write_jpeg_slide(tmp_path / "more" / "new.svs", seed=5)
    summary = build(tmp_path / "more", tmp_path / "out", GRID, pixels="copy")
    assert (summary.num_ok, summary.num_reused) == (3, 2)
    build(tmp_path / "more", tmp_path / "fresh", GRID, pixels="copy")
    assert parquet_hashes(tmp_path / "out") == parquet_hashes(tmp_path / "fresh")
    # With encoded pixels nothing of it may be taken over.
    assert build(tmp_path / "more", tmp_path / "out", GRID, pixels="encode").num_reused == 0


def test_large_slides_become_shards_by_themselves(slides, tmp_path):
    build(slides, tmp_path / "out", GRID, pixels="copy", shard_bytes=1)
    build(slides, tmp_path / "one", GRID, pixels="copy")
    assert len(list((tmp_path / "out" / "tiles").iterdir())) == 2
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "one")
