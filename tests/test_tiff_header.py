# SPDX-License-Identifier: Apache-2.0
"""Hostile and half-copied TIFF headers, written byte by byte."""

import struct

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
