# SPDX-License-Identifier: Apache-2.0
"""S3 and H4: small files that ask for gigabytes or for hours, as slides, as lists of slides and as JSON.

Each is read by a fresh process, which must refuse it within 2 s of processor time and never have had more than 300 MB.
Where a header says too much the header must be what it is refused for (`too_large`).
"""

import gzip
import io
import struct
import time
import zipfile
import zlib

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dre_slcl.training.slide_worker import prepare_worker
from dre_slcl.training.worker_pool import run_in_workers

from .bomb_reader import read_bomb
from .campaign import MEMORY_BYTES, check, run_campaign
from .seed_slides import paint, write_dicom, write_tiff
from .tiff_editor import TiffEditor

MAX_SECONDS = 2.0
MAX_MB = 300
BOMBS = {}


def bomb(suffix, what="slide", end="SlideError"):
    """Registers a function that writes a bomb; `end` is how the message must begin."""

    def register(function):
        BOMBS[function.__name__] = (function, suffix, what, end)
        return function

    return register


def tiff(path, entries, *, size=None, big=False):
    """One directory of (tag, type, count, value), in a file that is sparse beyond it."""
    with path.open("wb") as handle:
        if big:
            handle.write(b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, len(entries)))
            handle.write(b"".join(struct.pack("<HHQQ", *entry) for entry in entries) + bytes(8))
        else:
            handle.write(b"II*\0" + struct.pack("<IH", 8, len(entries)))
            handle.write(b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4))
        if size is not None:
            handle.truncate(size)


def image(width, height, *, block=256, tables=1 << 12):
    """Fields of a tiled RGB image whose tables lie one behind the other from byte `tables` on."""
    num = -(-width // block) * -(-height // block)
    return [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, 3)),
        *((322, 4, 1, block), (323, 4, 1, block), (324, 4, num, tables), (325, 4, num, tables + 4 * num)),
    ], tables + 8 * num


@bomb(".tif", end="SlideError: too_large")
def tiff_sides_of_2_31_minus_1(path):
    tiff(path, image(2**31 - 1, 2**31 - 1)[0][:8])


@bomb(".tif", end="SlideError: too_large")
def tiff_one_column_of_2_31(path):
    tiff(path, image(1, 2**31)[0][:8])


@bomb(".tif", end="SlideError: too_large")
def tiff_million_by_million_with_sparse_tables(path):
    entries, size = image(10**6, 10**6)
    tiff(path, entries, size=size)


@bomb(".ndpi", end="SlideError: too_large")
def tiff_million_by_million_named_ndpi(path):
    entries, size = image(10**6, 10**6)
    tiff(path, entries, size=size)


@bomb(".svs", end="SlideError: too_large")
def bigtiff_million_by_million(path):
    entries, size = image(10**6, 10**6)
    tiff(path, entries, size=size, big=True)


@bomb(".tif", end="SlideError: too_large")
def tiff_blocks_of_65520_px(path):
    entries, size = image(200_000, 200_000, block=65_520)
    tiff(path, entries, size=size)


@bomb(".tif", end="SlideError: too_large")
def tiff_strip_count_of_4_gib(path):
    tiff(path, [(256, 4, 1, 1000), (257, 4, 1, 1000), (273, 4, 2**30, 4096), (279, 4, 2**30, 4096)], size=5 << 30)


@bomb(".tif", end="SlideError: too_large")
def tiff_block_of_1_gib(path):
    entries, _ = image(256, 256)
    tiff(path, [*entries[:-1], (325, 4, 1, 1 << 30)], size=2 << 30)


@bomb(".tif", end="SlideError: too_large")
def tiff_100000_directories(path):
    with path.open("wb") as handle:
        handle.write(b"II*\0" + struct.pack("<I", 8))
        for i in range(100_000):
            handle.write(struct.pack("<HHHIII", 1, 256, 4, 1, 64, 8 + 18 * (i + 1)))


@bomb(".tif", end="SlideError: too_large")
def tiff_directories_that_share_a_table(path):
    with path.open("wb") as handle:
        handle.write(b"II*\0" + struct.pack("<I", 8))
        for i in range(9_000):
            tables = b"".join(struct.pack("<HHII", tag, 16, 1 << 22, 1 << 20) for tag in (324, 325))
            handle.write(struct.pack("<H", 2) + tables + struct.pack("<I", 8 + 30 * (i + 1)))
        handle.truncate((1 << 20) + (32 << 20))


@bomb(".tif")
def tiff_block_that_inflates_a_thousandfold(path):
    write_tiff(path, paint(1, 256))
    editor = TiffEditor(path.read_bytes())
    data = zlib.compress(bytes(1 << 30), 1)
    place = len(editor.data)
    editor.set(324, place, index=0)
    editor.set(325, len(data), index=0)
    editor.set(256, 128)
    editor.set(257, 128)
    editor.remove(282)  # no resolution: refused at the latest here
    path.write_bytes(bytes(editor.data) + data)


@bomb(".tif")
def jpeg_block_that_says_65500_px(path):
    write_tiff(path, paint(1), compression="jpeg")
    editor = TiffEditor(path.read_bytes())
    for index in range(16):
        frame = editor.data.index(b"\xff\xc0", editor.block(index).start)
        struct.pack_into(">HH", editor.data, frame + 5, 65_500, 65_500)
    path.write_bytes(editor.data)


@bomb(".dcm", end="SlideError: too_large")
def dicom_canvas_of_2_31(path):
    write_dicom(path, paint(1))
    path.write_bytes(path.read_bytes().replace(b"UL\x04\0\0\x02\0\0", b"UL\x04\0\xff\xff\xff\x7f"))


@bomb(".dcm")
def dicom_frames_of_65535_px(path):
    write_dicom(path, paint(1))
    data = path.read_bytes()
    for element in (b"\x10", b"\x11"):
        data = data.replace(b"(\0" + element + b"\0US\x02\0\x80\0", b"(\0" + element + b"\0US\x02\0\xff\xff")
    path.write_bytes(data)


@bomb(".dcm")
def dicom_two_billion_frames(path):
    write_dicom(path, paint(1))
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x0016", b"IS\x0a\x002147483647"))


# Kills libdicom, by a stack overflow; this is what slides are read in processes of their own for.
@bomb(".dcm", end="the process that read the slide died")
def dicom_100000_nested_sequences(path):
    write_dicom(path, paint(1))
    data = path.read_bytes()
    start = data.index(struct.pack("<HH2s", 0x5200, 0x9229, b"SQ"))
    level = struct.pack("<HH2sHL", 0x5200, 0x9229, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    path.write_bytes(data[:start] + level * 100_000 + data[start:])


@bomb(".dcm")
def dicom_element_of_4_gib(path):
    write_dicom(path, paint(1))
    data = path.read_bytes()
    start = data.index(struct.pack("<HH2s", 0x0020, 0x000D, b"UI"))
    path.write_bytes(data[:start] + struct.pack("<HH2sHL", 0x0009, 0x0010, b"OB", 0, 0xFFFFFFF0) + data[start:])


@bomb(".vms")
def hamamatsu_index_of_billions_of_files(path):
    lines = ["[Virtual Microscope Specimen]", "NoLayers=1", "NoJpegColumns=2000000000", "NoJpegRows=2000000000"]
    path.write_text("\n".join([*lines, "ImageFile=a.jpg", "MapFile=b.jpg", "OptimisationFile="]))


@bomb(".mrxs")
def mirax_index_of_billions_of_images(path):
    path.write_bytes(b"")
    folder = path.with_suffix("")
    folder.mkdir()
    lines = ["[GENERAL]", "SLIDE_VERSION=01.02", "SLIDE_ID=x", "IMAGENUMBER_X=2147483647", "IMAGENUMBER_Y=2147483647"]
    lines += ["OBJECTIVE_MAGNIFICATION=20", "CameraImageDivisionsPerSide=1", "[HIERARCHICAL]", "HIER_COUNT=2147483647"]
    lines += ["INDEXFILE=Index.dat", "HIER_0_NAME=Slide zoom level", "HIER_0_COUNT=2147483647", "[DATAFILE]"]
    (folder / "Slidedat.ini").write_text("\n".join([*lines, "FILE_COUNT=2147483647", "FILE_0=Data.dat"]))
    (folder / "Index.dat").write_bytes(bytes(1000))
    path.write_bytes(b"\xff\xd8\xff")


# Not parsed far enough to be taken for Leica's format, so what is left is an ordinary TIFF.
@bomb(".scn", end="accepted")
def leica_description_with_entities_that_multiply(path):
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    text = f'<?xml version="1.0"?><!DOCTYPE scn [<!ENTITY a0 "ha">{entities}]>'
    text += '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection>&a11;</collection></scn>'
    write_tiff(path, paint(1), description=text, metadata=None)


@bomb(".tif")
def png_of_100000_px(path):
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1 << 20) + b"IDAT" + zlib.compress(bytes(1 << 26))
    )


@bomb(".tif")
def jpeg_of_65500_px(path):
    data = bytearray(cv2.imencode(".jpg", paint(1))[1].tobytes())
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 65_500, 65_500)
    path.write_bytes(data)


@bomb(".tif")
def jpeg2000_of_2_31_px(path):
    size = struct.pack(">HIIIIIIIIH", 0, 2**31 - 1, 2**31 - 1, 0, 0, 2**31 - 1, 2**31 - 1, 0, 0, 3)
    path.write_bytes(b"\xff\x4f\xff\x51" + struct.pack(">H", len(size)) + size + bytes(1000))


@bomb(".svs")
def gzip_of_256_mb(path):
    path.write_bytes(gzip.compress(bytes(1 << 28), 1))


@bomb(".svs")
def zip_of_256_mb(path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.svs", bytes(1 << 28))
    path.write_bytes(content.getvalue())


def _parquet(path, column):
    pq.write_table(pa.table({"path": column}), path, compression="zstd")


@bomb(".parquet", what="manifest", end="ValueError: ")
def parquet_dictionary_of_a_billion_characters(path):
    indices = pa.array(np.zeros(10**6, dtype=np.int32))
    _parquet(path, pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 10_000])))


@bomb(".parquet", what="manifest", end="ValueError: ")
def parquet_of_a_hundred_million_rows(path):
    _parquet(path, pa.array(np.zeros(10**8, dtype=np.int8)))


@bomb(".parquet", what="manifest", end="ValueError: ")
def parquet_that_inflates_to_2_gib(path):
    with pq.ParquetWriter(path, pa.schema({"path": pa.string()}), compression="zstd", use_dictionary=False) as writer:
        table = pa.table({"path": ["x" * (512 << 20)]})
        for _ in range(5):
            writer.write_table(table)


@bomb(".csv", what="manifest", end="ValueError: ")
def csv_of_3_gib(path):
    with path.open("wb") as handle:
        handle.write(b"slide_id,path\n")
        handle.truncate(3 << 30)


@bomb(".csv", what="manifest", end="ValueError: ")
def csv_that_is_a_device(path):
    path.symlink_to("/dev/zero")


@bomb(".csv", what="manifest", end="ValueError: ")
def csv_cell_of_100_mb(path):
    path.write_bytes(b"slide_id,path\na," + b"x" * 100_000_000)


@bomb(".json", what="json", end="ValueError: ")
def json_nested_a_million_times(path):
    path.write_text("[" * 1_000_000)


@bomb(".json", what="json", end="ValueError: ")
def json_number_of_a_million_digits(path):
    path.write_text("1" * 1_000_000)


def campaign(root, count, seed):
    problems, most_seconds, most_mb = [], 0.0, 0
    for name, (write, suffix, what, end) in BOMBS.items():
        folder = root / name
        folder.mkdir()
        path = folder / f"bomb{suffix}"
        write(path)
        start = time.monotonic()
        ((_, result),) = run_in_workers(
            read_bomb,
            [(what, str(path))],
            num_workers=1,
            initializer=prepare_worker,
            deadline_seconds=20,
            memory_bytes=MEMORY_BYTES,
        )
        found, seconds, megabytes = result if isinstance(result, tuple) else (str(result), time.monotonic() - start, 0)
        print(f"{name}: {found} ({seconds:.2f} s, {megabytes} MB)", flush=True)
        check(problems, found.startswith(end), f"{name}: expected {end}, found {found}")
        check(problems, seconds <= MAX_SECONDS, f"{name}: {seconds} s")
        check(problems, megabytes <= MAX_MB, f"{name}: {megabytes} MB")
        most_seconds, most_mb = max(most_seconds, seconds), max(most_mb, megabytes)
        path.unlink()
    return {"cases": len(BOMBS), "faults": len(problems), "most_seconds": round(most_seconds, 2), "most_mb": most_mb}


if __name__ == "__main__":
    run_campaign(campaign, count=len(BOMBS), doc=__doc__)
