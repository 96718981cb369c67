# SPDX-License-Identifier: Apache-2.0
"""Makes a JPEG file out of a compressed tile of a TIFF, without decoding it.

TIFF stores the tables that its tiles share once (tag JPEGTables), and says in its own tags (PhotometricInterpretation)
whether the three components are RGB or YCbCr. A JPEG file must hold both itself. The sources are ITU-T T.81, Annex B
(markers), and Adobe TN 5116 (the APP14 marker, whose last byte is the colour transform).
"""

_SOI, _SOS, _APP0, _APP14 = 0xD8, 0xDA, 0xE0, 0xEE
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # Huffman-coded DCT: baseline, extended, progressive
_OTHER_FRAMES = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


def complete_header(
    stream: bytes, tables: bytes, *, is_rgb: bool, width_px: int, height_px: int
) -> tuple[int, bytes] | None:
    """Makes the header that turns the JPEG stream of a TIFF tile into a JPEG file.

    Args:
        stream (`bytes`): the compressed tile.
        tables (`bytes`): content of the JPEGTables tag; empty if the stream needs none.
        is_rgb (`bool`): whether the components are RGB (PhotometricInterpretation 2) rather than YCbCr (6).
        width_px (`int`), height_px (`int`): size that the tile must have.

    Returns:
        `tuple[int, bytes]`, *optional*: the number of bytes that the header takes at the start of the stream, and
            what to put in their place, so that every decoder takes the right tables and colours; `None` if the
            stream is not one of 8 bits and three components of that size.
    """
    header = _read_header(stream, width_px, height_px)
    if header is None or (tables and (tables[:2] != b"\xff\xd8" or tables[-2:] != b"\xff\xd9")):
        return None
    segments, has_jfif, scan_start = header
    # Decoders believe a JFIF marker first and an Adobe marker second.
    if has_jfif and not is_rgb and not tables:
        return scan_start, stream[:scan_start]
    adobe = _ADOBE + (b"\x00" if is_rgb else b"\x01")
    return scan_start, b"".join([b"\xff\xd8", adobe, tables[2:-2], *segments])


def _read_header(stream: bytes, width_px: int, height_px: int) -> tuple[list[bytes], bool, int] | None:
    """Returns the segments before the scan without colour markers, whether JFIF was marked, and the scan's start."""
    if stream[:2] != b"\xff\xd8":
        return None
    segments, has_jfif, has_frame, position = [], False, False, 2
    while position + 4 <= len(stream) and stream[position] == 0xFF:
        marker = stream[position + 1]
        length = 2 + (stream[position + 2] << 8 | stream[position + 3])
        segment = stream[position : position + length]
        if marker == _SOS:
            return (segments, has_jfif, position) if has_frame else None
        if marker in _OTHER_FRAMES or (marker in _FRAMES and not _is_expected_frame(segment, width_px, height_px)):
            return None
        has_frame = has_frame or marker in _FRAMES
        if marker == _APP0:
            has_jfif = has_jfif or segment[4:9] == b"JFIF\x00"
        elif marker != _APP14:
            segments.append(segment)
        position += length
    return None


def _is_expected_frame(segment: bytes, width_px: int, height_px: int) -> bool:
    """Whether a frame header says 8 bits, three components and the given size."""
    if len(segment) < 10:
        return False
    height, width = segment[5] << 8 | segment[6], segment[7] << 8 | segment[8]
    return segment[4] == 8 and (width, height) == (width_px, height_px) and segment[9] == 3
