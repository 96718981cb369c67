# SPDX-License-Identifier: Apache-2.0
"""Reads and writes structs of Thrift's compact protocol, as Parquet's footers are stored, without knowing the fields.

A struct is a dictionary of field id -> (type, value) in the order of the file; a list is (type of its elements,
values). Writing what was read gives the same bytes. Maps do not occur in Parquet and are refused.
"""

from typing import Any

Struct = dict[int, tuple[int, Any]]

TRUE, FALSE, I8, I16, I32, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12
_INTEGERS = frozenset({I16, I32, I64})


def decode_struct(data: bytes) -> Struct:
    """Reads one struct.

    Raises:
        ValueError: if the bytes are no struct of the compact protocol.
    """
    try:
        return _Decoder(data).struct()
    except (IndexError, RecursionError) as error:
        raise ValueError("expected a struct of Thrift's compact protocol, but the bytes end in the midst.") from error


def encode_struct(struct: Struct) -> bytes:
    """Writes one struct."""
    out = bytearray()
    _put_struct(out, struct)
    return bytes(out)


class _Decoder:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1]

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._position:
            raise IndexError
        self._position += length
        return self._data[self._position - length : self._position]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self) -> Struct:
        fields: Struct = {}
        field = 0
        while header := self._byte():
            field = field + (header >> 4) if header >> 4 else self._zigzag()
            kind = header & 0x0F
            fields[field] = kind, None if kind in (TRUE, FALSE) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in _INTEGERS:
            return self._zigzag()
        if kind == BINARY:
            return self._take(self._varint())
        if kind == STRUCT:
            return self.struct()
        if kind in (LIST, SET):
            header = self._byte()
            size = self._varint() if header >> 4 == 15 else header >> 4
            return header & 0x0F, [self._value(header & 0x0F) for _ in range(size)]
        if kind == DOUBLE:
            return self._take(8)
        if kind in (TRUE, FALSE, I8):  # inside a list each is a byte
            return self._byte()
        raise ValueError(f"type {kind} of Thrift's compact protocol is not expected in Parquet.")


def _put_struct(out: bytearray, struct: Struct) -> None:
    last = 0
    for field, (kind, value) in struct.items():
        if 0 < field - last <= 15:
            out.append((field - last) << 4 | kind)
        else:
            out.append(kind)
            _put_zigzag(out, field)
        last = field
        if kind not in (TRUE, FALSE):
            _put_value(out, kind, value)
    out.append(0)


def _put_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in _INTEGERS:
        _put_zigzag(out, value)
    elif kind == BINARY:
        _put_varint(out, len(value))
        out += value
    elif kind == STRUCT:
        _put_struct(out, value)
    elif kind in (LIST, SET):
        element, values = value
        if len(values) < 15:
            out.append(len(values) << 4 | element)
        else:
            out.append(0xF0 | element)
            _put_varint(out, len(values))
        for item in values:
            _put_value(out, element, item)
    elif kind == DOUBLE:
        out += value
    else:
        out.append(value)


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _put_zigzag(out: bytearray, value: int) -> None:
    _put_varint(out, value << 1 if value >= 0 else (-value << 1) - 1)
