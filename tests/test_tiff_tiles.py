# SPDX-License-Identifier: Apache-2.0
import io
import logging

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from modeling_dre_slcl.jpeg_stream import complete_header
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.tiff_tiles import TiffTiles

TILE_PX = 64
SVS = "Aperio Image Library v12\n300x200 [0,0 300x200] (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"


def picture(height, width, seed=0):
    """Smooth colours with a few sharp edges, so that a shift or wrong colours show."""
    rng = np.random.default_rng(seed)
    small = rng.integers(40, 250, size=(height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    image[height // 3 : height // 2, width // 4 : width // 2] = (200, 20, 120)
    return image


def write_svs(path, image, photometric="ycbcr", **options):
    compression = {"compression": "jpeg", "compressionargs": {"level": 90, "outcolorspace": photometric}}
    if photometric == "rgb":
        compression["compressionargs"]["colorspace"] = "rgb"
    tifffile.imwrite(
        path,
        image,
        tile=(TILE_PX, TILE_PX),
        photometric=photometric,
        description=SVS,
        metadata=None,
        **{**compression, **options},
    )


def split_tables(jpeg):
    """Splits a JPEG file into an abbreviated stream and the tables it needs, as TIFF stores them."""
    tables, rest, position = [b"\xff\xd8"], [b"\xff\xd8"], 2
    while jpeg[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        (tables if jpeg[position + 1] in (0xDB, 0xC4) else rest).append(jpeg[position:end])
        position = end
    return b"".join([*rest, jpeg[position:]]), b"".join([*tables, b"\xff\xd9"])


def jpeg_of(image, colorspace="RGB"):
    return simplejpeg.encode_jpeg(image, quality=90, colorspace=colorspace, colorsubsampling="420")


def complete_jpeg(stream, tables, *, is_rgb=False):
    header = complete_header(stream, tables, is_rgb=is_rgb, width_px=TILE_PX, height_px=TILE_PX)
    return None if header is None else header[1] + stream[header[0] :]


def decoders(jpeg):
    """What three other ways of decoding make of a JPEG file."""
    yield np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    yield cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    yield simplejpeg.decode_jpeg(jpeg)


def test_an_abbreviated_stream_becomes_a_file_with_the_same_pixels():
    image = picture(TILE_PX, TILE_PX)
    jpeg = jpeg_of(image)
    stream, tables = split_tables(jpeg)
    with pytest.raises(ValueError, match="table"):
        simplejpeg.decode_jpeg(stream)
    completed = complete_jpeg(stream, tables)
    for pixels in decoders(completed):
        np.testing.assert_array_equal(pixels, simplejpeg.decode_jpeg(jpeg))


@pytest.mark.parametrize("is_rgb", [True, False])
def test_the_tags_of_the_tiff_decide_on_the_colour_transform(is_rgb):
    """The stream itself is marked as JFIF, which means YCbCr; the TIFF may say that its components are RGB."""
    jpeg = jpeg_of(picture(TILE_PX, TILE_PX))
    as_ycbcr = np.asarray(Image.open(io.BytesIO(jpeg)).convert("YCbCr")).astype(int)
    completed = complete_jpeg(jpeg, b"", is_rgb=is_rgb)
    for pixels in decoders(completed):
        expected = as_ycbcr if is_rgb else simplejpeg.decode_jpeg(jpeg)
        # Pillow goes through RGB to get at the components.
        assert np.abs(pixels - expected).max() <= (3 if is_rgb else 0)


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xda\x00\x04\x00\x00",
        b"not a jpeg at all",
        jpeg_of(picture(TILE_PX, TILE_PX))[:200],
        jpeg_of(picture(TILE_PX, 2 * TILE_PX)),
        simplejpeg.encode_jpeg(picture(TILE_PX, TILE_PX)[..., :1].copy(), colorspace="GRAY"),
    ],
)
def test_what_is_no_colour_tile_of_the_size_is_not_completed(stream):
    assert complete_jpeg(stream, b"") is None


@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])
def test_areas_are_what_tifffile_decodes(tmp_path, photometric):
    path = tmp_path / "slide.svs"
    write_svs(path, picture(200, 300), photometric)
    decoded = tifffile.imread(path)
    padded = np.full((600, 700, 3), (1, 2, 3), dtype=np.uint8)
    padded[200:400, 200:500] = decoded
    tiles = TiffTiles(path, [(300, 200), (150, 100)], cache_bytes=3 * TILE_PX**2 * 3)
    assert tiles.levels[1] is None
    for x, y, width, height in [
        (0, 0, 64, 64),
        (64, 128, 64, 64),
        (30, 17, 200, 150),
        (-50, 90, 100, 200),
        (290, 190, 64, 64),
    ]:
        out = np.empty((height, width, 3), dtype=np.uint8)
        assert tiles.read(0, x, y, out, (1, 2, 3))
        np.testing.assert_array_equal(out, padded[200 + y : 200 + y + height, 200 + x : 200 + x + width])
    tiles.close()
    assert not tiles.read(0, 0, 0, out, (1, 2, 3))


@pytest.mark.parametrize(
    "options",
    [{"compression": "deflate"}, {"compression": "jpeg", "planarconfig": "separate"}, {"compression": None}],
)
def test_other_layouts_are_left_to_openslide(tmp_path, options):
    path = tmp_path / "slide.tif"
    image = picture(200, 300)
    if options.get("planarconfig"):
        image = np.moveaxis(image, -1, 0)
    tifffile.imwrite(path, image, tile=(TILE_PX, TILE_PX), photometric="rgb", **options)
    assert TiffTiles(path, [(300, 200)]).levels == [None]


def test_files_that_are_no_tiff_have_no_tiles(tmp_path):
    (tmp_path / "slide.dcm").write_bytes(b"\0" * 128 + b"DICM")
    assert TiffTiles(tmp_path / "slide.dcm", [(300, 200)]).levels == [None]


def test_a_copied_tile_is_what_the_reader_shows(tmp_path):
    path = tmp_path / "slide.svs"
    write_svs(path, picture(200, 300))
    with SlideReader(path) as reader:
        copied = 0
        for y in range(0, 200, 32):
            for x in range(0, 300, 32):
                jpeg = reader.compressed_tile(x, y, tile_size_px=TILE_PX, tile_mpp=0.5)
                is_own = x % TILE_PX == 0 and y % TILE_PX == 0 and x + TILE_PX <= 300 and y + TILE_PX <= 200
                assert (jpeg is not None) == is_own
                if jpeg is not None:
                    copied += 1
                    shown = reader.read_tile(x, y, tile_size_px=TILE_PX, tile_mpp=0.5)
                    np.testing.assert_array_equal(simplejpeg.decode_jpeg(jpeg), shown)
        assert copied == 12
        assert reader.compressed_tile(0, 0, tile_size_px=TILE_PX, tile_mpp=1.0) is None
        assert reader.compressed_tile(0, 0, tile_size_px=32, tile_mpp=0.5) is None


def test_tiles_that_are_not_what_openslide_shows_are_not_used(tmp_path, monkeypatch, caplog):
    """A sabotaged tile table: everything is shifted by one tile."""
    path = tmp_path / "slide.svs"
    write_svs(path, picture(200, 300))
    with SlideReader(path) as reader:
        expected = reader.read_tile(64, 64, tile_size_px=TILE_PX, tile_mpp=0.5)
    jpeg = TiffTiles.jpeg
    monkeypatch.setattr(TiffTiles, "jpeg", lambda self, level, column, row: jpeg(self, level, column + 1, row))
    with SlideReader(path) as reader, caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(reader.read_tile(64, 64, tile_size_px=TILE_PX, tile_mpp=0.5), expected)
        assert reader.compressed_tile(0, 0, tile_size_px=TILE_PX, tile_mpp=0.5) is None
    assert "through OpenSlide" in caplog.text


def test_a_cut_off_stream_is_not_copied(tmp_path):
    path = tmp_path / "slide.svs"
    write_svs(path, picture(200, 300))
    with tifffile.TiffFile(path) as file:
        offset, num_bytes = file.pages[0].dataoffsets[1], file.pages[0].databytecounts[1]
    content = bytearray(path.read_bytes())
    content[offset + num_bytes // 2 : offset + num_bytes] = b"\0" * (num_bytes - num_bytes // 2)
    path.write_bytes(content)
    with SlideReader(path) as reader:
        assert reader.compressed_tile(0, 0, tile_size_px=TILE_PX, tile_mpp=0.5) is not None
        assert reader.compressed_tile(TILE_PX, 0, tile_size_px=TILE_PX, tile_mpp=0.5) is None
