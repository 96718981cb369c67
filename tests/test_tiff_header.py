# SPDX-License-Identifier: Apache-2.0
"""Hostile and half-copied TIFF headers, written byte by byte."""

import struct
import time

import pytest

from modeling_dre_slcl.slide_reader import SlideError, SlideReader
from modeling_dre_slcl.tiff_header import check_tiff_header


def tiff_bytes(entries, next_directory=0):
    """A classic TIFF with one directory of (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", next_directory)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff_bytes([(256, 4, 1, 2**31 - 1), (257, 4, 1, 1)]), "too_large"),
        (tiff_bytes([(256, 4, 1, 10**6), (257, 4, 1, 10**6)]), "too_large"),
        (tiff_bytes([(322, 3, 1, 65520), (323, 3, 1, 65520)]), "too_large"),
        (tiff_bytes([(324, 4, 2**31, 100)]), "too_large"),
        (tiff_bytes([(324, 4, 1000, 100)]), "truncated"),
        (tiff_bytes([], next_directory=8), "unreadable"),
        (tiff_bytes([], next_directory=9999), "truncated"),
        (tiff_bytes([(324, 4, 1, 10), (325, 4, 1, 10**6)]), "truncated"),
        (tiff_bytes([(324, 4, 1, 10), (325, 4, 1, 65 << 20)]), "too_large"),
        (tiff_bytes([(256, 9, 1, 2**32 - 1), (257, 4, 1, 1)]), "too_large"),  # signed: -1
        (b"II*\0", "truncated"),
        (b"MM\0+\0\x08\0\0" + struct.pack(">Q", 2**63), "truncated"),
        (b"II*\0" + struct.pack("<IH", 8, 60000) + bytes(100), "unreadable"),
        (b"PK\x03\x04 not a TIFF", None),
        (tiff_bytes([(256, 4, 1, 64), (257, 3, 1, 64), (324, 4, 1, 0), (325, 4, 1, 0)]), None),
    ],
)
def test_tiff_headers_are_judged_before_any_library_reads_them(tmp_path, content, reason):
    (tmp_path / "a.tif").write_bytes(content)
    problem = check_tiff_header(tmp_path / "a.tif")
    assert (problem.reason if problem else None) == reason
    if reason is not None:
        with pytest.raises(SlideError) as caught:
            SlideReader(tmp_path / "a.tif")
        assert caught.value.reason == reason


def ndpi_bytes(directories, start):
    """Directories of Hamamatsu's form (links of 64 bits) as they stand from byte `start` of a file on."""
    content, place = b"", start
    for i, entries in enumerate(directories):
        place += 2 + 12 * len(entries) + 8
        body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        link = 0 if i == len(directories) - 1 else place
        content += struct.pack("<H", len(entries)) + body + struct.pack("<Q", link)
    return content


@pytest.mark.parametrize("name", ["a.ndpi", "a.tif"])
def test_ndpi_beyond_4_gib_is_understood_and_told_by_its_mark_and_not_by_its_name(tmp_path, name):
    start = 5 << 30  # sparse: takes no room on the disk
    # The one strip of an image is the whole JPEG, of a size that does not fit into 32 bits.
    image = [(256, 4, 1, 150_000), (257, 4, 1, 100_000), (273, 4, 1, 5), (279, 4, 1, 2**32 - 1), (65420, 4, 1, 1)]
    path = tmp_path / name

    def write(directories):
        with path.open("wb") as handle:
            handle.write(b"II*\0" + struct.pack("<Q", start))
            handle.seek(start)
            handle.write(ndpi_bytes(directories, start))

    write([image, image])
    assert check_tiff_header(path) is None
    write([image, [(256, 4, 1, 2**21), *image[1:]]])
    assert check_tiff_header(path).reason == "too_large"


def test_a_bomb_is_no_ndpi_because_it_is_named_so(tmp_path):
    (tmp_path / "a.ndpi").write_bytes(tiff_bytes([(256, 4, 1, 10**6), (257, 4, 1, 10**6)]))
    assert check_tiff_header(tmp_path / "a.ndpi").reason == "too_large"


def test_directories_that_share_a_large_table_do_not_multiply_the_work(tmp_path):
    """A table of 32 MiB, once in the file and in 1,000 directories: 64 GB to read."""
    num_directories, table_bytes, num_numbers = 1000, 32 << 20, 4 << 20
    body_bytes = 2 + 2 * 12 + 4
    with (tmp_path / "a.tif").open("wb") as handle:
        handle.write(b"II*\0" + struct.pack("<I", 8))
        for i in range(num_directories):
            link = 0 if i == num_directories - 1 else 8 + body_bytes * (i + 1)
            entries = [struct.pack("<HHII", tag, 16, num_numbers, 1 << 20) for tag in (324, 325)]
            handle.write(struct.pack("<H", 2) + b"".join(entries) + struct.pack("<I", link))
        handle.truncate((1 << 20) + table_bytes)
    start = time.process_time()
    assert check_tiff_header(tmp_path / "a.tif").reason == "too_large"
    assert time.process_time() - start < 5
