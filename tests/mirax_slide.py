# SPDX-License-Identifier: Apache-2.0
"""Writes a painted slide as 3DHISTECH scanners do: MIRAX, photos that overlap, at positions of their own.

The camera takes photos on a raster; each lies a few pixels off its nominal place, and beside tissue there are none.
A photo is stored as 2 x 2 images, and of lower levels as one image, then as a part of an image of several photos.
Source: openslide.org/formats/mirax, and what OpenSlide asks of `Slidedat.ini`, `Index.dat` and the data files.
"""

import struct

import cv2
import numpy as np

PHOTOS_X, PHOTOS_Y = 7, 6
PHOTO_PX, OVERLAP_PX, DIVISIONS = 256, 24, 2
IMAGE_PX = PHOTO_PX // DIVISIONS
NUM_LEVELS = 3
FILL_RGB = (250, 247, 243)
_SLIDE_ID = "0123456789ABCDEF0123456789ABCDEF"
_MAX_JITTER_PX = 5


def photo_positions():
    """Level-0 position of each photo that was taken, by its (column, row): none at the left and upper edge."""
    rng = np.random.default_rng(0)
    step = PHOTO_PX - OVERLAP_PX
    taken = [(x, y) for y in range(1, PHOTOS_Y) for x in range(1, PHOTOS_X) if (x, y) not in ((1, 1), (4, 3))]
    jitter = rng.integers(-_MAX_JITTER_PX, _MAX_JITTER_PX + 1, (len(taken), 2))
    return dict(zip(taken, map(tuple, (np.array(taken) * step + jitter).tolist()), strict=True))


def write_mirax(path, pixels, *, mpp=0.5):
    """Writes `path`, which ends in .mrxs, and the folder beside it.

    Args:
        path: the file; its folder's name is the file's without the suffix.
        pixels: what lies under the camera, uint8 RGB (h, w, 3); level-0 position (x, y) shows `pixels[y, x]`.
        mpp: of level 0, um/px.

    Returns:
        the path.
    """
    folder = path.with_suffix("")
    folder.mkdir()
    positions = photo_positions()
    height_px, width_px = (number * (PHOTO_PX + _MAX_JITTER_PX) for number in (PHOTOS_Y, PHOTOS_X))
    lacking = max(0, height_px - pixels.shape[0]), max(0, width_px - pixels.shape[1])
    padded = np.pad(pixels, [(0, lacking[0]), (0, lacking[1]), (0, 0)], mode="reflect")
    photos = {place: padded[y : y + PHOTO_PX, x : x + PHOTO_PX] for place, (x, y) in positions.items()}
    data, levels = bytearray(), []
    for level in range(NUM_LEVELS):
        records = []
        for index, image in _level_images(photos, level):
            jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            records.append((index, len(data), len(jpeg), 0))
            data += jpeg
        levels.append(records)
    buffer = b"".join(
        struct.pack("<bii", 0, *positions.get((column, row), (0, 0)))
        for row in range(PHOTOS_Y)
        for column in range(PHOTOS_X)
    )
    (folder / "Data0000.dat").write_bytes(bytes(data) + buffer)
    (folder / "Index.dat").write_bytes(_index(levels, (len(data), len(buffer), 0)))
    (folder / "Slidedat.ini").write_text(_slidedat(mpp), encoding="utf-8")
    small = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA)
    path.write_bytes(cv2.imencode(".jpg", small[..., ::-1])[1].tobytes())
    return path


def _level_images(photos, level):
    """Yields the images of a level: number on the raster of level-0 images, and pixels (IMAGE_PX, IMAGE_PX, 3)."""
    if level == 0:
        for (column, row), photo in photos.items():
            for y, x in np.ndindex(DIVISIONS, DIVISIONS):
                part = photo[y * IMAGE_PX : (y + 1) * IMAGE_PX, x * IMAGE_PX : (x + 1) * IMAGE_PX]
                yield _number(column * DIVISIONS + x, row * DIVISIONS + y), part
        return
    joined = 2**level // DIVISIONS  # photos side by side in an image
    side = IMAGE_PX // joined
    for row in range(0, PHOTOS_Y, joined):
        for column in range(0, PHOTOS_X, joined):
            image = np.full((IMAGE_PX, IMAGE_PX, 3), FILL_RGB, dtype=np.uint8)
            held = [(x, y) for y, x in np.ndindex(joined, joined) if (column + x, row + y) in photos]
            for x, y in held:
                small = cv2.resize(photos[column + x, row + y], (side, side), interpolation=cv2.INTER_AREA)
                image[y * side : (y + 1) * side, x * side : (x + 1) * side] = small
            if held:
                yield _number(column * DIVISIONS, row * DIVISIONS), image


def _number(x, y):
    return y * PHOTOS_X * DIVISIONS + x


def _index(levels, position_record):
    """`Index.dat`: a tree of int32 places in this file, down to (number, offset, length, file) of the images."""
    head = b"01.02" + _SLIDE_ID.encode()
    content = bytearray(head + bytes(8))

    def add(*numbers):
        place = len(content)
        content.extend(struct.pack(f"<{len(numbers)}i", *numbers))
        return place

    pages = [add(len(records), 0, *(number for record in records for number in record)) for records in levels]
    level_table = add(*[add(0, page) for page in pages])
    page = add(1, 0, 0, 0, *position_record)
    other_table = add(add(0, page))
    struct.pack_into("<ii", content, len(head), level_table, other_table)
    return bytes(content)


def _slidedat(mpp):
    blue_green_red = FILL_RGB[2] << 16 | FILL_RGB[1] << 8 | FILL_RGB[0]
    lines = ["[GENERAL]", "SLIDE_VERSION=01.02", f"SLIDE_ID={_SLIDE_ID}"]
    lines += [f"IMAGENUMBER_X={PHOTOS_X * DIVISIONS}", f"IMAGENUMBER_Y={PHOTOS_Y * DIVISIONS}"]
    lines += ["OBJECTIVE_MAGNIFICATION=20", f"CameraImageDivisionsPerSide={DIVISIONS}"]
    lines += ["[HIERARCHICAL]", "HIER_COUNT=1", "NONHIER_COUNT=1", "INDEXFILE=Index.dat"]
    lines += ["HIER_0_NAME=Slide zoom level", f"HIER_0_COUNT={NUM_LEVELS}"]
    lines += [f"HIER_0_VAL_{level}_SECTION=LAYER_0_LEVEL_{level}_SECTION" for level in range(NUM_LEVELS)]
    lines += ["NONHIER_0_NAME=VIMSLIDE_POSITION_BUFFER", "NONHIER_0_COUNT=1", "NONHIER_0_VAL_0=default"]
    lines += ["[DATAFILE]", "FILE_COUNT=1", "FILE_0=Data0000.dat"]
    for level in range(NUM_LEVELS):
        lines += [f"[LAYER_0_LEVEL_{level}_SECTION]", f"IMAGE_CONCAT_FACTOR={min(level, 1)}"]
        lines += [f"OVERLAP_{axis}={OVERLAP_PX / 2**level}" for axis in "XY"]
        lines += [f"MICROMETER_PER_PIXEL_{axis}={mpp * 2**level}" for axis in "XY"]
        lines += [f"IMAGE_FILL_COLOR_BGR={blue_green_red}", "IMAGE_FORMAT=JPEG"]
        lines += [f"DIGITIZER_WIDTH={IMAGE_PX}", f"DIGITIZER_HEIGHT={IMAGE_PX}"]
    return "\n".join(lines) + "\n"
