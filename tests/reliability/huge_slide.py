# SPDX-License-Identifier: Apache-2.0
"""Writes slides of any size in little room: their blocks point to one of two compressed ones, glass or tissue."""

import struct

import cv2
import numpy as np

from .seed_slides import paint

BLOCK_PX = 256
MPP = 0.5
_TEXT = b"Aperio Image Library v12.0.15|AppMag = 20|MPP = 0.5\0"


def write_huge_slide(path, side, *, num_tissue=8, factors=(1, 4, 16, 64)):
    """A BigTIFF pyramid of Aperio's form, `side` px wide, with tissue on `num_tissue` squared blocks in the middle.

    Levels below the first show tissue where it is, as well as their blocks can.
    """
    tissue = paint(1, 512)[128:384, 128:384]
    blocks = [cv2.imencode(".jpg", image)[1].tobytes() for image in (np.full_like(tissue, 244), tissue)]
    levels = [side // factor for factor in factors if side // factor >= BLOCK_PX]
    with path.open("wb") as handle:
        handle.write(b"II+\0\x08\0\0\0" + bytes(8))
        places = []
        for block in blocks:
            places.append(handle.tell())
            handle.write(block)
        text_place = handle.tell()
        handle.write(_TEXT)
        link_place = 8
        for level, width in enumerate(levels):
            across = -(-width // BLOCK_PX)
            middle, reach = across // 2, max(1, num_tissue // factors[level])
            is_tissue = np.zeros((across, across), dtype=np.int64)
            start = middle - reach // 2
            is_tissue[start : start + reach, start : start + reach] = 1
            kinds = is_tissue.ravel()
            tables = []
            for values in (np.array(places), np.array([len(block) for block in blocks])):
                tables.append(handle.tell())
                handle.write(values[kinds].astype("<u8").tobytes())
            here = handle.tell()
            handle.seek(link_place)
            handle.write(struct.pack("<Q", here))
            handle.seek(here)
            count = across * across
            bits = struct.unpack("<Q", struct.pack("<HHHH", 8, 8, 8, 0))[0]
            subsampling = struct.unpack("<Q", struct.pack("<HHHH", 2, 2, 0, 0))[0]
            entries = [(256, 4, 1, width), (257, 4, 1, width), (258, 3, 3, bits), (259, 3, 1, 7), (262, 3, 1, 6)]
            entries += [(270, 2, len(_TEXT), text_place), (277, 3, 1, 3), (284, 3, 1, 1), (322, 3, 1, BLOCK_PX)]
            entries += [(323, 3, 1, BLOCK_PX), (324, 16, count, tables[0]), (325, 16, count, tables[1])]
            entries += [(530, 3, 2, subsampling)]
            if count == 1:
                entries = [
                    (tag, kind, num, places[kinds[0]] if tag == 324 else value) for tag, kind, num, value in entries
                ]
                entries = [(t, k, n, len(blocks[kinds[0]]) if t == 325 else value) for t, k, n, value in entries]
            handle.write(struct.pack("<Q", len(entries)))
            handle.write(b"".join(struct.pack("<HHQQ", *entry) for entry in entries))
            link_place = handle.tell()
            handle.write(bytes(8))
