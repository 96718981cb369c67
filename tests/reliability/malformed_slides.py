# SPDX-License-Identifier: Apache-2.0
"""S2: slides that are wrong in one known way each, with the reason code that each must get.

The list follows what OpenSlide's own tests vary: loops, empty and missing fields, tables of the wrong length, blocks
of the wrong size, levels that are not there. "ok" stands for damage that OpenSlide defines a meaning for: an
empty block is one that was not scanned, an image without blocks is no level. One dataset is built of all of them and
must hold nothing else than the slides that are ok.
"""

import struct

import cv2

from .campaign import build_counting, check, refusals, run_campaign, slide_rows
from .seed_slides import paint, write_dicom, write_svs, write_tiff
from .tiff_editor import TiffEditor

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR = 256, 257, 258, 259, 262, 277, 284
BLOCK_WIDTH, BLOCK_HEIGHT, OFFSETS, SIZES = 322, 323, 324, 325
CASES = {}


def case(reason, kind="deflate", suffix=".tif"):
    """Registers a function that makes damaged bytes out of a TIFF's editor or of plain bytes."""

    def register(function):
        CASES[function.__name__] = (function, reason, kind, suffix)
        return function

    return register


def edits(name, reason, change, kind="deflate", suffix=".tif"):
    """Registers a change of a TIFF's fields."""

    def make(data):
        editor = TiffEditor(data)
        change(editor)
        return bytes(editor.data)

    CASES[name] = (make, reason, kind, suffix)


def changes(name, reason, change, kind="deflate", suffix=".tif"):
    """Registers a change of plain bytes."""
    CASES[name] = (change, reason, kind, suffix)


def replaced(old, new):
    """A change that puts bytes in place of equally many others."""

    def change(data):
        if data.count(old) == 0 or len(old) != len(new):
            raise ValueError(old)
        return data.replace(old, new, 1)

    return change


changes("no_bytes", "truncated", lambda data: b"")
changes("first_six_bytes_only", "truncated", lambda data: data[:6])
changes("first_half_only", "truncated", lambda data: data[: len(data) // 2])
changes("last_kilobyte_missing", "truncated", lambda data: data[:-1000])
changes("text", "unsupported", lambda data: b"this is no slide\n" * 100)
changes("zeros", "unsupported", lambda data: bytes(len(data)))
changes("png", "unsupported", lambda data: cv2.imencode(".png", paint(1))[1].tobytes())
changes("unknown_byte_order", "unsupported", lambda data: b"XX" + data[2:])
changes("unknown_version", "unsupported", lambda data: b"II\x2c\0" + data[4:])
changes("bigtiff_with_odd_offset_size", "unsupported", lambda data: data[:4] + b"\x10\0" + data[6:], kind="bigtiff")
changes("too_many_entries", "unreadable", lambda data: b"II*\0" + struct.pack("<IH", 8, 60_000) + data[10:])

edits("directory_loop", "unreadable", lambda tiff: tiff.link(0, tiff.directories()[0]))
edits("directory_beyond_the_end", "truncated", lambda tiff: tiff.link(0, len(tiff.data) + 100))
edits("width_of_zero", "unreadable", lambda tiff: tiff.set(WIDTH, 0))
edits("height_of_zero", "unreadable", lambda tiff: tiff.set(HEIGHT, 0))
edits("width_is_missing", "unreadable", lambda tiff: tiff.remove(WIDTH))
edits("width_is_a_text", "unreadable", lambda tiff: tiff.set_field(WIDTH, kind=2))
edits("width_beyond_all_limits", "too_large", lambda tiff: tiff.set_field(WIDTH, kind=4, value=2**31 - 1))
edits("block_width_of_zero", "unreadable", lambda tiff: tiff.set(BLOCK_WIDTH, 0))
edits("block_height_of_zero", "unreadable", lambda tiff: tiff.set(BLOCK_HEIGHT, 0))
edits("blocks_of_65520_px", "too_large", lambda tiff: [tiff.set(tag, 65_520) for tag in (BLOCK_WIDTH, BLOCK_HEIGHT)])
edits("no_blocks_but_strips", "unsupported", lambda tiff: [tiff.remove(tag) for tag in (322, 323, 324, 325)])
edits("block_places_are_missing", "unreadable", lambda tiff: tiff.remove(OFFSETS))
edits("block_sizes_are_missing", "unreadable", lambda tiff: tiff.remove(SIZES))
edits("too_few_block_places", "unreadable", lambda tiff: tiff.set_field(OFFSETS, count=3))
edits("too_few_block_sizes", "unreadable", lambda tiff: tiff.set_field(SIZES, count=3))
edits("table_of_4_gib", "too_large", lambda tiff: tiff.set_field(OFFSETS, count=2**30))
edits("table_beyond_the_end", "truncated", lambda tiff: tiff.set_field(OFFSETS, value=len(tiff.data) - 8))
edits("block_beyond_the_end", "truncated", lambda tiff: tiff.set(OFFSETS, len(tiff.data), index=5))
edits("block_of_half_a_gigabyte", "too_large", lambda tiff: tiff.set(SIZES, 1 << 29, index=5))
edits("empty_block_in_the_tissue", "ok", lambda tiff: tiff.set(SIZES, 0, index=5))
edits("unknown_compression", "unsupported", lambda tiff: tiff.set(COMPRESSION, 12_345))
edits("no_samples", "unreadable", lambda tiff: tiff.set(SAMPLES, 0))
edits("unknown_colours", "unreadable", lambda tiff: tiff.set(PHOTOMETRIC, 77))


@case("unreadable")
def block_that_does_not_inflate(data):
    editor = TiffEditor(data)
    place = editor.block(5)
    editor.data[place] = b"\x55" * (place.stop - place.start)
    return bytes(editor.data)


@case("unreadable", kind="jpeg")
def block_that_is_no_jpeg(data):
    editor = TiffEditor(data)
    place = editor.block(5)
    editor.data[place] = b"\x55" * (place.stop - place.start)
    return bytes(editor.data)


@case("unreadable", kind="jpeg")
def jpeg_block_of_another_size(data):
    editor = TiffEditor(data)
    for index in range(16):
        start = editor.block(index).start
        frame = editor.data.index(b"\xff\xc0", start)
        struct.pack_into(">HH", editor.data, frame + 5, 64, 64)
    return bytes(editor.data)


@case("unreadable", kind="jpeg")
def jpeg_block_without_its_start(data):
    editor = TiffEditor(data)
    start = editor.block(5).start
    editor.data[start : start + 4] = bytes(4)
    return bytes(editor.data)


svs = {"kind": "svs", "suffix": ".svs"}
edits("svs_label_only", "unsupported", lambda tiff: [tiff.remove(tag) for tag in (322, 323, 324, 325)], **svs)
edits("svs_second_level_lacks_its_blocks", "ok", lambda tiff: tiff.remove(OFFSETS, directory=2), **svs)
edits("svs_second_level_is_cut_off", "truncated", lambda tiff: tiff.set(SIZES, 1 << 20, directory=2), **svs)
edits("svs_without_the_second_level", "ok", lambda tiff: tiff.link(0, 0), **svs)
changes("svs_mpp_is_nan", "mpp_out_of_range", replaced(b"MPP = 1.0", b"MPP = nan"), **svs)
changes("svs_without_mpp", "mpp_missing", replaced(b"MPP = 1.0", b"XYZ = 1.0"), **svs)

dicom = {"kind": "dicom", "suffix": ".dcm"}
changes("dicom_first_half_only", "truncated", lambda data: data[: len(data) // 2], **dicom)
changes("dicom_header_cut", "truncated", lambda data: data[:300], **dicom)
changes("dicom_of_another_kind", "unsupported", lambda data: data.replace(b".1.1.77.1.6", b".1.1.77.1.4"), **dicom)
changes("dicom_unknown_syntax", "unsupported", replaced(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.99"), **dicom)
changes(
    "dicom_canvas_of_zero", "unreadable", replaced(b"\x48\0\x06\0UL\x04\0\0\x02", b"\x48\0\x06\0UL\x04\0\0\0"), **dicom
)
changes("dicom_side_of_2_31", "too_large", replaced(b"UL\x04\0\0\x02\0\0", b"UL\x04\0\xff\xff\xff\x7f"), **dicom)
changes("dicom_of_16_bits", "unreadable", replaced(b"(\0\0\x01US\x02\0\x08", b"(\0\0\x01US\x02\0\x10"), **dicom)


def write_sources(folder):
    """The whole files that the damaged ones are made of."""
    folder.mkdir()
    write_tiff(folder / "deflate", paint(1))
    write_tiff(folder / "bigtiff", paint(1), bigtiff=True)
    write_tiff(folder / "jpeg", paint(1), compression="jpeg")
    write_svs(folder / "svs", paint(1))
    write_dicom(folder / "dicom", paint(1))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def campaign(root, count, seed):
    sources = write_sources(root / "sources")
    for name, (make, _, kind, suffix) in CASES.items():
        path = root / "slides" / name / f"{name}{suffix}" if kind == "dicom" else root / "slides" / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make(sources[kind]))
    for kind, suffix in (("deflate", ".tif"), ("jpeg", ".tif"), ("svs", ".svs")):
        (root / "slides" / f"whole-{kind}{suffix}").write_bytes(sources[kind])
    _, ends = build_counting(root / "slides", root / "out")
    found = {name: row["reason"] or row["status"] for name, row in slide_rows(root / "out").items()}
    problems = []
    for name, (_, reason, *_) in CASES.items():
        check(problems, found.get(name) == reason, f"{name}: expected {reason}, found {found.get(name)}")
    for kind in ("deflate", "jpeg", "svs"):
        check(problems, found.get(f"whole-{kind}") == "ok", f"whole-{kind}: {found.get(f'whole-{kind}')}")
    refused = refusals(root / "out")
    usable = {name for name, (_, reason, *_) in CASES.items() if reason == "ok"}
    check(problems, set(refused) == set(CASES) - usable, "refused.jsonl differs from the table")
    died = sum(num for end, num in ends.items() if end != "ok" and end != "refused")
    return {"cases": len(CASES), "faults": len(problems), "workers_died_or_hung": died}


if __name__ == "__main__":
    run_campaign(campaign, count=len(CASES), doc=__doc__)
