# SPDX-License-Identifier: Apache-2.0
"""Writes a painted slide in every layout that scanners and converters use, to compare readers with OpenSlide.

`LAYOUTS` names them; `write_slide` writes one. A layout says how pixels lie in the file, not what they show: all show
the same painted section, at a size that is a multiple of nothing, with black where tiles reach beyond the picture, so
that any pixel out of place, of a wrong colour or from beyond the edge is far from the right one.
Source: TIFF 6.0, TIFF Technical Note 2 (JPEG), Adobe TN 5116 (APP14); OpenSlide's descriptions of formats.
"""

import struct
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import imagecodecs
import numpy as np
import tifffile

from benchmarks.large_slide import split_jpeg_tables
from dre_slcl.training.demo.tissue_painter import CaseTraits, paint_slide

from .mirax_slide import write_mirax

WIDTH_PX, HEIGHT_PX = 1237, 1011
REDUCED_IMAGE = 1  # NewSubfileType
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # the byte of the colour transform follows
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_COMPRESSION = {"jpeg": 7, "jpeg2000-ycbcr": 33003, "jpeg2000-rgb": 33005, "lzw": 5, "deflate": 8, "none": None}


@dataclass(frozen=True)
class Layout:
    """How a slide lies in its file.

    Args:
        vendor: "aperio", "generic", "philips", "leica", "ome", or "mirax", which is no TIFF: see `mirax_slide`.
        tile: height and width of the compressed tiles, or None for strips.
        codec: a key of `_COMPRESSION`.
        photometric: "ycbcr" or "rgb" components in JPEG tiles.
        subsampling: horizontal and vertical, of the second and third component of JPEG tiles.
        shared_tables: whether JPEG tables are stored once per level (tag JPEGTables).
        marker: which marker JPEG tiles have: "jfif", "adobe", "none", or "numbers": none and the components
            are numbered 1, 2, 3 as if they were YCbCr.
        downsamples: of the levels below level 0.
        missing: (level, index) of tiles that are not stored.
        cut: (level, index) of a tile whose second half is missing.
        extra: what else the file holds: "associated" (thumbnail, label and macro in strips) or "decoy" (another
            picture of the size of level 1, of other colours where there is tissue).
        mode: "rgb", "grey", "rgba" or "rgb16".
        planar: "contig" or "separate".
        progressive, bigtiff, byteorder: as the words say.
        opens: whether OpenSlide opens it.
    """

    vendor: str = "aperio"
    tile: tuple[int, int] | None = (256, 256)
    codec: str = "jpeg"
    photometric: str = "ycbcr"
    subsampling: tuple[int, int] = (2, 2)
    shared_tables: bool = True
    marker: str = "none"
    downsamples: tuple[float, ...] = (4, 16)
    missing: tuple[tuple[int, int], ...] = ()
    cut: tuple[int, int] | None = None
    extra: str | None = None
    mode: str = "rgb"
    planar: str = "contig"
    progressive: bool = False
    bigtiff: bool = False
    byteorder: str = "<"
    opens: bool = True

    @property
    def is_jpeg(self):
        """Whether the tiles of level 0 can be copied as JPEG files."""
        return (
            self.codec == "jpeg"
            and self.mode == "rgb"
            and self.planar == "contig"
            and self.vendor not in ("leica", "mirax")
        )


_APERIO = Layout()
_GENERIC = Layout(vendor="generic")
_RGB = replace(_APERIO, photometric="rgb", subsampling=(1, 1))
LAYOUTS = {
    "jpeg_256": _APERIO,
    "jpeg_240": replace(_APERIO, tile=(240, 240)),
    "jpeg_512": replace(_APERIO, tile=(512, 512)),
    "jpeg_oblong": replace(_APERIO, tile=(128, 320)),
    "jpeg_422": replace(_APERIO, subsampling=(2, 1)),
    "jpeg_444": replace(_APERIO, subsampling=(1, 1)),
    "jpeg_complete_jfif": replace(_APERIO, shared_tables=False, marker="jfif"),
    "jpeg_complete_adobe": replace(_APERIO, shared_tables=False, marker="adobe"),
    "jpeg_shared_adobe": replace(_APERIO, marker="adobe"),
    "jpeg_progressive": replace(_APERIO, shared_tables=False, marker="jfif", progressive=True),
    "jpeg_rgb_adobe": replace(_RGB, marker="adobe"),
    "jpeg_rgb_complete_adobe": replace(_RGB, marker="adobe", shared_tables=False),
    "jpeg_rgb_bare": _RGB,
    "jpeg_rgb_numbered": replace(_RGB, marker="numbers"),
    "jpeg_rgb_jfif": replace(_RGB, marker="jfif", shared_tables=False),
    "jpeg_rgb_420": replace(_RGB, marker="numbers", subsampling=(2, 2), tile=(240, 240)),
    "jpeg_bigtiff": replace(_APERIO, bigtiff=True),
    "jpeg_big_endian": replace(_APERIO, byteorder=">", opens=False),
    "jpeg_big_endian_bigtiff": replace(_APERIO, byteorder=">", bigtiff=True),
    "jpeg_odd_ratios": replace(_APERIO, downsamples=(1.7, 3.9, 11.3)),
    "jpeg_no_pyramid": replace(_APERIO, downsamples=()),
    "jpeg_missing_tiles": replace(_APERIO, missing=((0, 7), (0, 19), (1, 1), (2, 0))),
    "jpeg_one_tile_missing": replace(_APERIO, tile=(64, 64), missing=((0, 150),)),
    "jpeg_cut_tile": replace(_APERIO, cut=(0, 6)),
    "jpeg_associated": replace(_APERIO, extra="associated"),
    "jpeg_grey": replace(_APERIO, mode="grey", shared_tables=False, marker="jfif"),
    "jpeg2000_rgb": replace(_APERIO, codec="jpeg2000-rgb"),
    "jpeg2000_ycbcr": replace(_APERIO, codec="jpeg2000-ycbcr", tile=(240, 240)),
    "lzw": replace(_APERIO, codec="lzw"),
    "deflate": replace(_APERIO, codec="deflate", tile=(240, 240)),
    "deflate_planar": replace(_APERIO, codec="deflate", planar="separate"),
    "deflate_16_bit": replace(_APERIO, codec="deflate", mode="rgb16"),
    "deflate_grey": replace(_GENERIC, codec="deflate", mode="grey"),
    "deflate_alpha": replace(_GENERIC, codec="deflate", mode="rgba"),
    "uncompressed": replace(_GENERIC, codec="none"),
    "generic_jpeg": _GENERIC,
    "generic_jpeg_bigtiff": replace(_GENERIC, bigtiff=True, tile=(512, 512)),
    "generic_missing_tiles": replace(_GENERIC, missing=((0, 7), (1, 1))),
    "generic_decoy": replace(_GENERIC, extra="decoy", tile=(32, 32)),
    "philips": replace(_GENERIC, vendor="philips", tile=(512, 512), downsamples=(2, 4)),
    "leica": replace(_GENERIC, vendor="leica", bigtiff=True),
    "mirax": replace(_GENERIC, vendor="mirax", downsamples=(2, 4)),
    "ome": Layout(vendor="ome", downsamples=(2, 4), shared_tables=False, marker="jfif"),
    "strips": replace(_APERIO, tile=None, codec="deflate", opens=False),
}


def write_slide(path, layout, *, mpp=0.5, width_px=WIDTH_PX, height_px=HEIGHT_PX):
    """Writes the painted section; `layout` is a `Layout` or a name from `LAYOUTS`. Returns the path."""
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    pixels = painted_pixels(width_px, height_px)
    if layout.vendor == "mirax":
        return write_mirax(path.with_suffix(".mrxs"), pixels, mpp=mpp)
    sizes = [(width_px, height_px)]
    sizes += [(max(1, int(width_px / factor)), max(1, int(height_px / factor))) for factor in layout.downsamples]
    if layout.vendor == "philips":
        pixels = _pad(pixels, layout.tile)
    descriptions = _descriptions(layout, sizes, mpp)
    with tifffile.TiffWriter(path, bigtiff=layout.bigtiff, byteorder=layout.byteorder, ome=False) as writer:
        for level, size in enumerate(sizes):
            if level and layout.vendor == "philips":
                size = tuple(
                    -(-side // factor) for side, factor in zip(pixels.shape[1::-1], [2**level] * 2, strict=True)
                )
            shown = pixels if level == 0 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            if level and layout.vendor == "philips":
                shown = _pad(shown, layout.tile)
            if level == 1 and layout.extra == "decoy":
                _write_level(writer, layout, np.ascontiguousarray(shown[..., [1, 2, 0]]), level, subfiletype=0)
            if level == 1 and layout.extra == "associated":
                _write_associated(writer, pixels, sizes[-1])
            options = {"description": descriptions[level]} if descriptions[level] else {}
            if layout.vendor in ("generic", "ome", "leica"):
                options |= {"resolution": (1e4 / mpp * size[0] / width_px,) * 2, "resolutionunit": "CENTIMETER"}
            if layout.vendor == "philips":
                options["software"] = "Philips DP v1.0"
            subfiletype = REDUCED_IMAGE if level and layout.vendor != "leica" else 0
            if layout.vendor == "ome" and level == 0:
                options["subifds"] = len(layout.downsamples)
            _write_level(writer, layout, shown, level, subfiletype=subfiletype, **options)
    return path


@lru_cache(maxsize=4)
def painted_pixels(width_px, height_px):
    """Part of a painted section, uint8 RGB (h, w, 3). Glass is of one colour: it tells a reader nothing."""
    traits = CaseTraits("layouts", "tubular", brisk_lymphocytes=True, necrosis=True, mucin=True, nuclear_grade=2)
    side = max(1000, round(1.1 * max(width_px, height_px)))
    section = paint_slide(traits, "layouts", seed=0, side_range_px=(side, side))
    pixels = np.ascontiguousarray(section[:height_px, :width_px])
    pixels[cv2.blur(pixels, (5, 5)).min(axis=2) > 232] = 243
    return pixels


def _write_level(writer, layout, shown, level, **options):
    stored = {
        "rgb": lambda: shown,
        "grey": lambda: np.ascontiguousarray(shown[..., 1]),
        "rgba": lambda: np.dstack([shown, np.where(shown.min(axis=2) > 225, 0, 255).astype(np.uint8)]),
        "rgb16": lambda: shown.astype(np.uint16) * 257,
    }[layout.mode]()
    options |= {"metadata": None, "planarconfig": layout.planar if stored.ndim == 3 else None}
    compression = _COMPRESSION[layout.codec]
    if not layout.codec.startswith("jpeg"):
        colours = "minisblack" if layout.mode == "grey" else "rgb"
        if layout.planar == "separate":
            stored = np.ascontiguousarray(stored.transpose(2, 0, 1))
        if layout.mode == "rgba":
            options["extrasamples"] = ["unassalpha"]
        writer.write(stored, tile=layout.tile, compression=compression, photometric=colours, **options)
        return
    streams, tables = [], None
    for index, tile in enumerate(_tiles(stored, layout.tile)):
        stream = _encode(tile, layout)
        if layout.codec == "jpeg" and layout.shared_tables:
            stream, tables = split_jpeg_tables(stream)
        if layout.codec == "jpeg":
            stream = _mark(stream, layout)
        if layout.cut == (level, index):
            stream = stream[: len(stream) // 2]
        streams.append(b"" if (level, index) in layout.missing else stream)
    if layout.mode == "grey":
        options["photometric"] = "minisblack"
    elif layout.codec == "jpeg":
        options |= {"subsampling": layout.subsampling, "photometric": "rgb"}
        options["compressionargs"] = {"outcolorspace": layout.photometric}
    else:
        options["photometric"] = "rgb"
    writer.write(
        iter(streams),
        shape=stored.shape,
        dtype=stored.dtype,
        tile=layout.tile,
        compression=compression,
        jpegtables=tables,
        **options,
    )


def _write_associated(writer, pixels, size):
    """Writes what Aperio files hold between and behind the levels: pictures in strips."""
    thumbnail = cv2.resize(255 - pixels, size, interpolation=cv2.INTER_AREA)
    common = {"metadata": None, "photometric": "rgb", "rowsperstrip": 16}
    writer.write(thumbnail, compression="jpeg", subfiletype=0, description="Aperio thumbnail", **common)
    writer.write(thumbnail, compression="lzw", subfiletype=1, description="Aperio\nlabel 387x463", **common)


def _tiles(pixels, tile):
    """Yields tiles row by row, with black beyond the picture."""
    padded = _pad(pixels, tile)
    for y in range(0, padded.shape[0], tile[0]):
        for x in range(0, padded.shape[1], tile[1]):
            yield np.ascontiguousarray(padded[y : y + tile[0], x : x + tile[1]])


def _pad(pixels, tile):
    below, right = -pixels.shape[0] % tile[0], -pixels.shape[1] % tile[1]
    return np.pad(pixels, [(0, below), (0, right), (0, 0)][: pixels.ndim])


def _encode(tile, layout):
    if layout.codec == "jpeg2000-rgb":
        return imagecodecs.jpeg2k_encode(tile, level=42, codecformat="J2K", mct=True, reversible=False)
    if layout.codec == "jpeg2000-ycbcr":
        components = cv2.cvtColor(tile, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
        return imagecodecs.jpeg2k_encode(components, level=42, codecformat="J2K", mct=False, reversible=False)
    if layout.progressive:
        options = [cv2.IMWRITE_JPEG_QUALITY, 85, cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
        return cv2.imencode(".jpg", tile[..., ::-1], options)[1].tobytes()
    if layout.mode == "grey":
        return imagecodecs.jpeg8_encode(tile, level=85)
    options = {"level": 85, "colorspace": "rgb", "outcolorspace": layout.photometric}
    if layout.photometric == "rgb" and layout.subsampling != (1, 1):
        # libjpeg does not reduce green and blue: it is told that they are chroma already.
        options |= {"colorspace": "ycbcr", "outcolorspace": "ycbcr"}
    return imagecodecs.jpeg8_encode(tile, subsampling=layout.subsampling, **options)


def _mark(stream, layout):
    """Replaces the markers that tell a JPEG's colours, and the numbers of its components."""
    image, place = bytearray(b"\xff\xd8"), 2
    if layout.marker == "jfif":
        image += _JFIF
    elif layout.marker == "adobe":
        image += _ADOBE + (b"\x01" if layout.photometric == "ycbcr" else b"\x00")
    while True:
        marker, length = struct.unpack_from(">xBH", stream, place)
        segment = bytearray(stream[place : place + 2 + length])
        if layout.marker in ("numbers", "jfif") and layout.photometric == "rgb":
            first, step = {0xC0: (10, 3), 0xDA: (5, 2)}.get(marker, (len(segment), 1))
            for number, at in enumerate(range(first, min(first + 3 * step, len(segment)), step), start=1):
                segment[at] = number
        if marker not in (0xE0, 0xEE):
            image += segment
        place += 2 + length
        if marker == 0xDA:
            return bytes(image + stream[place:])


def _descriptions(layout, sizes, mpp):
    """ImageDescription of each level, None where there is none."""
    if layout.vendor == "aperio":
        text = f"Aperio synthetic slide\n{sizes[0][0]}x{sizes[0][1]}|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
        return [text] * len(sizes)
    if layout.vendor == "philips":
        return [_philips_xml(layout, mpp)] + [f"level={level}" for level in range(1, len(sizes))]
    if layout.vendor == "leica":
        return [_leica_xml(sizes, mpp)] + [None] * (len(sizes) - 1)
    return [None] * len(sizes)


def _philips_xml(layout, mpp):
    def attribute(name, kind, value):
        return f'<Attribute Name="{name}" Group="0x301D" Element="0x1003" PMSVR="{kind}">{value}</Attribute>'

    def spacing(factor):
        return attribute("DICOM_PIXEL_SPACING", "IDoubleArray", f'"{mpp * factor / 1000:g}" "{mpp * factor / 1000:g}"')

    levels = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{spacing(factor)}</DataObject>'
        for factor in (1, *layout.downsamples)
    )
    levels = attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", "IDataObjectArray", f"<Array>{levels}</Array>")
    image = attribute("PIM_DP_IMAGE_TYPE", "IString", "WSI") + spacing(1) + levels
    images = f'<Array><DataObject ObjectType="DPScannedImage">{image}</DataObject></Array>'
    root = attribute("PIM_DP_SCANNED_IMAGES", "IDataObjectArray", images)
    return f'<?xml version="1.0" encoding="UTF-8"?><DataObject ObjectType="DPUfsImport">{root}</DataObject>'


def _leica_xml(sizes, mpp):
    """A canvas that is larger than the scanned area, which starts at (100, 57) px of level 0."""
    nm = mpp * 1000
    (width, height), (left, top) = sizes[0], (100, 57)
    levels = "".join(f'<dimension sizeX="{w}" sizeY="{h}" r="{i}" ifd="{i}"/>' for i, (w, h) in enumerate(sizes))
    return (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" sizeX="{round((width + 300) * nm)}" sizeY="{round((height + 200) * nm)}">'
        f'<image name="i"><pixels sizeX="{width}" sizeY="{height}">{levels}</pixels>'
        f'<view sizeX="{round(width * nm)}" sizeY="{round(height * nm)}" '
        f'offsetX="{round(left * nm)}" offsetY="{round(top * nm)}"/>'
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings>"
        "</image></collection></scn>"
    )
