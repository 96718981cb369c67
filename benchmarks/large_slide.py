# SPDX-License-Identifier: Apache-2.0
"""Writes slides as large as scanners make them, in about a second: a few compressed tiles, repeated.

The canvas is cut into square blocks of about 1024 px. A block shows either the same painted tissue or the same empty
glass, so that a level needs only a few different tiles, and the levels of the pyramid fit each other exactly. The
file is a tiled BigTIFF in the manner of Aperio scanners: JPEG streams without tables and one JPEGTables field per
level, or JPEG 2000.
Source: TIFF 6.0, TIFF Technical Note 2 (JPEG), BigTIFF; OpenSlide's description of the Aperio format.

    python benchmarks/large_slide.py huge.svs --width-px 200000 --height-px 200000 --store-once
"""

import argparse
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from dre_slcl.training.demo.tissue_painter import CaseTraits, paint_slide

JPEG_QUALITY = 87  # makes a 256 px tile of the painted tissue as large as one of a scanned slide at 40x, 16 kB
JPEG_2000_DECIBELS = 40
_BLOCK_PX = 1024  # at most, on level 0
_ONE_PIECE = "large-10"  # a name for which the painter cuts one piece of tissue, not several with glass between them
_LEVEL_STEP = 4
_SMALLEST_LEVEL_PX = 4096
_REDUCED_IMAGE = 1  # NewSubfileType of the lower levels
_YCBCR, _RGB = 6, 2  # PhotometricInterpretation
_ASCII, _SHORT, _LONG, _UNDEFINED, _LONG8 = 2, 3, 4, 7, 16  # field types of BigTIFF
_TYPE_CODES = {_ASCII: "B", _SHORT: "H", _LONG: "I", _UNDEFINED: "B", _LONG8: "Q"}
_TABLE_MARKERS = (0xDB, 0xC4)  # DQT, DHT
_APP0, _START_OF_SCAN = 0xE0, 0xDA
_COMPRESSIONS = {"jpeg": 7, "jpeg2000": 33005}

Fields = list[tuple[int, int, np.ndarray | list[int]]]


def main() -> int:
    """Writes one slide; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path, help="file to write, such as large.svs")
    parser.add_argument("--width-px", type=int, default=40_000, help="columns of level 0 (default: 40000)")
    parser.add_argument("--height-px", type=int, default=30_000, help="rows of level 0 (default: 30000)")
    parser.add_argument("--mpp", type=float, default=0.25, help="resolution of level 0, um/px (default: 0.25)")
    parser.add_argument("--tile-size-px", type=int, default=256, help="side of the file's own tiles (default: 256)")
    parser.add_argument("--store-once", action="store_true", help="store equal tiles once: a small file")
    arguments = vars(parser.parse_args())
    write_large_slide(**arguments)
    return 0


def write_large_slide(
    path: str | Path,
    width_px: int,
    height_px: int,
    *,
    mpp: float = 0.25,
    tile_size_px: int = 256,
    tissue_share: float = 0.35,
    codec: str = "jpeg",
    store_once: bool = False,
    seed: int = 0,
) -> Path:
    """Writes a slide with a pyramid (every level a quarter as wide as the one before, down to 4096 px).

    Args:
        path (`str` or `Path`): the file to write.
        width_px (`int`), height_px (`int`): size of level 0.
        mpp (`float`, *optional*, defaults to 0.25): resolution of level 0, um/px.
        tile_size_px (`int`, *optional*, defaults to 256): side of the file's own tiles, a multiple of 16, at most
            1024.
        tissue_share (`float`, *optional*, defaults to 0.35): share of the blocks that show tissue.
        codec (`str`, *optional*, defaults to `"jpeg"`): `"jpeg"` (YCbCr 4:2:0) or `"jpeg2000"` (RGB; needs
            imagecodecs).
        store_once (`bool`, *optional*, defaults to `False`): whether equal tiles share their place in the file, as
            TIFF allows. The file is then a few MB whatever the slide's size; reading it is never bound by the disk.
        seed (`int`, *optional*, defaults to 0): where the tissue lies. What it looks like is always the same.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if a size, the share or the codec can not be used.
    """
    path = Path(path)
    _check_arguments(width_px, height_px, tile_size_px, tissue_share, codec)
    tiles_per_block = 1 << ((_BLOCK_PX // tile_size_px).bit_length() - 1)
    block_px = tiles_per_block * tile_size_px
    is_tissue = _tissue_blocks(-(-height_px // block_px), -(-width_px // block_px), tissue_share, seed)
    description = f"Aperio synthetic slide\n{width_px}x{height_px}|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
    with path.open("wb") as handle:
        handle.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        link = 8  # where the offset of the next directory belongs
        downsample = 1
        while True:
            size = max(1, width_px // downsample), max(1, height_px // downsample)
            grid = -(-size[1] // tile_size_px), -(-size[0] // tile_size_px)
            tiles, index = _level_tiles(is_tissue, grid, downsample, tiles_per_block, tile_size_px)
            fields = _level_fields(handle, tiles, index, size, tile_size_px, codec, store_once)
            fields.append((254, _LONG, [0 if downsample == 1 else _REDUCED_IMAGE]))  # NewSubfileType
            fields.append((270, _ASCII, [*description.encode("ascii"), 0]))  # ImageDescription
            link = _write_directory(handle, fields, link)
            if max(size) <= _SMALLEST_LEVEL_PX or downsample * _LEVEL_STEP > block_px // 16:
                return path
            downsample *= _LEVEL_STEP


@lru_cache(maxsize=4)
def painted_block(block_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Paints a block of tissue and a block of empty glass, uint8 RGB (block_px, block_px, 3) each."""
    traits = CaseTraits("large", "tubular", brisk_lymphocytes=True, necrosis=False, mucin=False, nuclear_grade=2)
    side = max(1000, round(1.75 * block_px))  # the middle of the section, where all is tissue
    start = (side - block_px) // 2
    section = paint_slide(traits, _ONE_PIECE, seed=0, side_range_px=(side, side))
    tissue = np.ascontiguousarray(section[start : start + block_px, start : start + block_px])
    noise = np.random.default_rng(0).normal(243, 1.5, (block_px, block_px, 3))
    return tissue, np.clip(np.rint(noise), 0, 255).astype(np.uint8)


def _check_arguments(width_px: int, height_px: int, tile_size_px: int, tissue_share: float, codec: str) -> None:
    if min(width_px, height_px) < 1:
        raise ValueError(f"width_px and height_px: expected at least 1, found {width_px} and {height_px}.")
    if tile_size_px % 16 or not 16 <= tile_size_px <= 1024:
        raise ValueError(f"tile_size_px: expected a multiple of 16 from 16 to 1024, found {tile_size_px}.")
    if not 0 <= tissue_share <= 1:
        raise ValueError(f"tissue_share: expected 0 to 1, found {tissue_share}.")
    if codec not in _COMPRESSIONS:
        raise ValueError(f"codec: expected one of {sorted(_COMPRESSIONS)}, found {codec!r}.")


def _tissue_blocks(rows: int, columns: int, share: float, seed: int) -> np.ndarray:
    """Tells which blocks show tissue, bool (rows, columns): smooth pieces with the wanted share of all blocks."""
    coarse = np.random.default_rng(seed).random((5, 5), dtype=np.float32)
    field = cv2.resize(coarse, (columns, rows), interpolation=cv2.INTER_CUBIC)
    is_tissue = np.zeros(rows * columns, dtype=bool)
    is_tissue[np.argsort(-field, axis=None, kind="stable")[: round(share * field.size)]] = True
    return is_tissue.reshape(rows, columns)


def _level_tiles(
    is_tissue: np.ndarray, grid: tuple[int, int], downsample: int, tiles_per_block: int, tile_size_px: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the different tiles of a level, uint8 (tile, tile, 3), and which of them lies where, int (grid,)."""
    block_px = tiles_per_block * tile_size_px // downsample
    reduced = [
        cv2.resize(block, (block_px, block_px), interpolation=cv2.INTER_AREA)
        for block in reversed(painted_block(tiles_per_block * tile_size_px))
    ]
    rows, columns = grid
    if downsample <= tiles_per_block:
        # A tile is a part of one block: all parts of glass, then all parts of tissue.
        parts = tiles_per_block // downsample
        starts = [(row * tile_size_px, column * tile_size_px) for row in range(parts) for column in range(parts)]
        tiles = [block[y : y + tile_size_px, x : x + tile_size_px] for block in reduced for y, x in starts]
        row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
        part = (row % parts) * parts + column % parts
        return tiles, (is_tissue[row // parts, column // parts] * parts**2 + part).reshape(-1)
    # A tile shows several blocks: one tile for every pattern of tissue and glass that occurs.
    covered = downsample // tiles_per_block
    padded = np.zeros((rows * covered, columns * covered), dtype=np.uint8)
    padded[: is_tissue.shape[0], : is_tissue.shape[1]] = is_tissue[: padded.shape[0], : padded.shape[1]]
    patterns = padded.reshape(rows, covered, columns, covered).swapaxes(1, 2).reshape(-1, covered * covered)
    patterns, index = np.unique(patterns, axis=0, return_inverse=True)
    choices = np.stack(reduced)
    # (patterns, y block, x block, y, x, 3) -> (patterns, tile, tile, 3)
    shown = choices[patterns.reshape(-1, covered, covered)].swapaxes(2, 3)
    return list(shown.reshape(-1, tile_size_px, tile_size_px, 3)), index.reshape(-1)


def _level_fields(
    handle: BinaryIO,
    tiles: list[np.ndarray],
    index: np.ndarray,
    size: tuple[int, int],
    tile_size_px: int,
    codec: str,
    store_once: bool,
) -> Fields:
    """Writes the compressed tiles of one level at the end of the file; returns the fields of its directory."""
    streams, photometric, tables = _encode_jpeg(tiles) if codec == "jpeg" else _encode_jpeg_2000(tiles)
    order = np.arange(len(streams)) if store_once else index
    byte_counts = np.array([len(stream) for stream in streams], dtype=np.int64)
    starts = handle.tell() + np.concatenate([[0], np.cumsum(byte_counts[order])[:-1]])
    handle.writelines(streams[number] for number in order.tolist())
    fields: Fields = [
        (256, _LONG, [size[0]]),  # ImageWidth
        (257, _LONG, [size[1]]),  # ImageLength
        (258, _SHORT, [8, 8, 8]),  # BitsPerSample
        (259, _SHORT, [_COMPRESSIONS[codec]]),  # Compression
        (262, _SHORT, [photometric]),  # PhotometricInterpretation
        (277, _SHORT, [3]),  # SamplesPerPixel
        (284, _SHORT, [1]),  # PlanarConfiguration: samples interleaved
        (322, _LONG, [tile_size_px]),  # TileWidth
        (323, _LONG, [tile_size_px]),  # TileLength
        (324, _LONG8, starts[index] if store_once else starts),  # TileOffsets
        (325, _LONG, byte_counts[index]),  # TileByteCounts
    ]
    if tables is not None:
        fields += [(347, _UNDEFINED, list(tables)), (530, _SHORT, [2, 2])]  # JPEGTables, YCbCrSubSampling
    return fields


def _encode_jpeg(tiles: list[np.ndarray]) -> tuple[list[bytes], int, bytes]:
    """Compresses tiles as YCbCr 4:2:0; returns streams without tables, the photometric, and the tables for all."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    pairs = [
        split_jpeg_tables(cv2.imencode(".jpg", np.ascontiguousarray(tile[..., ::-1]), options)[1].tobytes())
        for tile in tiles
    ]
    return [stream for stream, _ in pairs], _YCBCR, pairs[0][1]


def split_jpeg_tables(stream: bytes) -> tuple[bytes, bytes]:
    """Splits a JPEG as TIFF stores it: (stream without tables and JFIF header, stream of nothing but tables)."""
    image, tables, place = bytearray(b"\xff\xd8"), bytearray(b"\xff\xd8"), 2
    while stream[place + 1] != _START_OF_SCAN:
        marker, length = struct.unpack_from(">xBH", stream, place)
        segment = stream[place : place + 2 + length]
        if marker in _TABLE_MARKERS:
            tables += segment
        elif marker != _APP0:
            image += segment
        place += 2 + length
    return bytes(image + stream[place:]), bytes(tables + b"\xff\xd9")


def _encode_jpeg_2000(tiles: list[np.ndarray]) -> tuple[list[bytes], int, None]:
    """Compresses tiles as RGB with the irreversible wavelet, as Aperio scanners do; results as `_encode_jpeg`."""
    import imagecodecs

    encode: Callable[..., bytes] = imagecodecs.jpeg2k_encode
    options = {"level": JPEG_2000_DECIBELS, "codecformat": "J2K", "mct": True, "reversible": False}
    return [bytes(encode(np.ascontiguousarray(tile), **options)) for tile in tiles], _RGB, None


def _write_directory(handle: BinaryIO, fields: Fields, link: int) -> int:
    """Writes a directory at the end of the file and links it; returns where the next one's offset belongs."""
    entries = []
    for tag, kind, values in sorted(fields, key=lambda field: field[0]):
        value = np.asarray(values).astype(f"<{_TYPE_CODES[kind]}").tobytes()
        if len(value) > 8:  # what does not fit into the entry is stored before the directory and pointed to
            place = handle.tell()
            handle.write(value)
            entry = struct.pack("<Q", place)
        else:
            entry = value.ljust(8, b"\0")
        entries.append(struct.pack("<HHQ", tag, kind, len(values)) + entry)
    start = handle.tell()
    handle.write(struct.pack("<Q", len(entries)) + b"".join(entries) + bytes(8))
    end = handle.tell()
    handle.seek(link)
    handle.write(struct.pack("<Q", start))
    handle.seek(end)
    return end - 8


if __name__ == "__main__":
    sys.exit(main())
