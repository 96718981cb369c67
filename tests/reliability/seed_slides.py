# SPDX-License-Identifier: Apache-2.0
"""Six kinds of small files, written here, from which damaged ones are made. No file of anybody else is used."""

import struct

import cv2
import numpy as np
import tifffile

SIDE_PX = 512
_LONG_KINDS = (b"OB", b"OW", b"SQ", b"UN", b"UT")
_UID = "1.2.826.0.1.3680043.10.1."


def paint(seed, side=SIDE_PX):
    """A picture of stained, textured tissue on glass, uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    tissue = (x / rng.uniform(0.3, 0.45)) ** 2 + (y / rng.uniform(0.3, 0.45)) ** 2 < 1
    waves = np.sin(40 * x * rng.uniform(0.5, 1.5)) * np.cos(40 * y * rng.uniform(0.5, 1.5))
    stained = np.stack([170 + 25 * waves, 90 + 25 * waves, 150 + 25 * waves], axis=-1)
    return np.where(tissue[..., None], stained, 244).astype(np.uint8)


def write_tiff(path, pixels, *, mpp=1.0, compression="deflate", **options):
    """A tiled TIFF whose resolution tags OpenSlide reads."""
    tifffile.imwrite(
        path,
        pixels,
        tile=(128, 128),
        photometric="rgb",
        compression=compression,
        resolution=(10_000 / mpp, 10_000 / mpp),
        resolutionunit="CENTIMETER",
        **options,
    )


def write_svs(path, pixels, *, mpp="1.0", extra="", label=None, macro=None):
    """A pyramid of Aperio's form: two levels, thumbnail, and if given label and macro images."""
    text = "Aperio Image Library v12.0.15\r\n{0}x{0} [0,0 {0}x{0}] (128x128) JPEG/RGB Q=70"
    fields = f"|AppMag = 10{'' if mpp is None else f'|MPP = {mpp}'}{extra}"
    side = pixels.shape[0]
    tiled = {"tile": (128, 128), "photometric": "rgb", "compression": "jpeg", "metadata": None}
    striped = {"photometric": "rgb", "compression": "jpeg", "metadata": None, "rowsperstrip": 64}
    with tifffile.TiffWriter(path) as writer:
        writer.write(pixels, description=text.format(side) + fields, **tiled)
        small = cv2.resize(pixels, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
        writer.write(small, description=text.format(side) + fields, **striped)
        writer.write(small, description=text.format(side) + f" -> {side // 4}x{side // 4}" + fields, **tiled)
        if label is not None:
            writer.write(label, description="Aperio Image Library v12.0.15\r\nlabel 64x64", subfiletype=1, **striped)
        if macro is not None:
            writer.write(macro, description="Aperio Image Library v12.0.15\r\nmacro 64x64", subfiletype=9, **striped)


def write_dicom(path, pixels, *, mpp=1.0, patient=()):
    """A DICOM slide of one level: JPEG frames of 128 px, TILED_FULL. `patient`: more (group, element, VR, text)."""
    side, frame = pixels.shape[0], 128
    frames = []
    for top in range(0, side, frame):
        for left in range(0, side, frame):
            tile = np.ascontiguousarray(pixels[top : top + frame, left : left + frame, ::-1])
            data = cv2.imencode(".jpg", tile)[1].tobytes()
            frames.append(data + b"\0" * (len(data) % 2))
    millimetres = f"{mpp / 1000:.6f}"
    measures = _element(0x0028, 0x0030, b"DS", f"{millimetres}\\{millimetres}")
    groups = _sequence(0x0028, 0x9110, measures)
    elements = [
        (0x0008, 0x0008, b"CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
        (0x0008, 0x0016, b"UI", "1.2.840.10008.5.1.4.1.1.77.1.6"),
        (0x0008, 0x0018, b"UI", _UID + "1"),
        (0x0008, 0x0060, b"CS", "SM"),
        *patient,
        (0x0020, 0x000D, b"UI", _UID + "2"),
        (0x0020, 0x000E, b"UI", _UID + "3"),
        (0x0020, 0x9311, b"CS", "TILED_FULL"),
        (0x0028, 0x0002, b"US", struct.pack("<H", 3)),
        (0x0028, 0x0004, b"CS", "YBR_FULL_422"),
        (0x0028, 0x0006, b"US", struct.pack("<H", 0)),
        (0x0028, 0x0008, b"IS", str(len(frames))),
        (0x0028, 0x0010, b"US", struct.pack("<H", frame)),
        (0x0028, 0x0011, b"US", struct.pack("<H", frame)),
        (0x0028, 0x0100, b"US", struct.pack("<H", 8)),
        (0x0028, 0x0101, b"US", struct.pack("<H", 8)),
        (0x0028, 0x0102, b"US", struct.pack("<H", 7)),
        (0x0028, 0x0103, b"US", struct.pack("<H", 0)),
        (0x0048, 0x0006, b"UL", struct.pack("<L", side)),
        (0x0048, 0x0007, b"UL", struct.pack("<L", side)),
    ]
    body = b"".join(_element(*element) for element in elements) + _sequence(0x5200, 0x9229, groups)
    starts = np.cumsum([0, *(len(data) + 8 for data in frames[:-1])]).astype("<u4").tobytes()
    items = b"".join(struct.pack("<HHL", 0xFFFE, 0xE000, len(item)) + item for item in [starts, *frames])
    body += struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF) + items
    body += struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    meta = _element(0x0002, 0x0001, b"OB", b"\0\1") + _element(0x0002, 0x0002, b"UI", "1.2.840.10008.5.1.4.1.1.77.1.6")
    meta += _element(0x0002, 0x0003, b"UI", _UID + "1") + _element(0x0002, 0x0010, b"UI", "1.2.840.10008.1.2.4.50")
    meta += _element(0x0002, 0x0012, b"UI", _UID + "9")
    meta = _element(0x0002, 0x0000, b"UL", struct.pack("<L", len(meta))) + meta
    path.write_bytes(bytes(128) + b"DICM" + meta + body)


def _element(group, element, kind, value):
    if isinstance(value, str):
        value = value.encode()
        value += (b"\0" if kind == b"UI" else b" ") * (len(value) % 2)
    if kind in _LONG_KINDS:
        return struct.pack("<HH2sHL", group, element, kind, 0, len(value)) + value
    return struct.pack("<HH2sH", group, element, kind, len(value)) + value


def _sequence(group, element, content):
    """A sequence of one item."""
    return _element(group, element, b"SQ", struct.pack("<HHL", 0xFFFE, 0xE000, len(content)) + content)


def write_seeds(folder):
    """Writes the six files, each of another picture; returns their paths by kind. The plain image is no slide."""
    folder.mkdir(parents=True)
    names = {
        "deflate": "deflate.tif",
        "jpeg": "jpeg.tif",
        "bigtiff": "bigtiff.tif",
        "svs": "svs.svs",
        "dicom": "dicom.dcm",
        "plain": "plain.tif",
    }
    paths = {kind: folder / name for kind, name in names.items()}
    write_tiff(paths["deflate"], paint(1))
    write_tiff(paths["jpeg"], paint(2), compression="jpeg")
    write_tiff(paths["bigtiff"], paint(3), bigtiff=True)
    write_svs(paths["svs"], paint(4))
    write_dicom(paths["dicom"], paint(5))
    paths["plain"].write_bytes(cv2.imencode(".png", paint(6))[1].tobytes())
    return paths
