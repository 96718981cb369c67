# SPDX-License-Identifier: Apache-2.0
"""Changes single fields of a small classic little-endian TIFF, to make files that are wrong in one known way."""

import struct

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1}


class TiffEditor:
    """The bytes of a TIFF, with access to the fields of its directories by tag."""

    def __init__(self, data):
        self.data = bytearray(data)

    def directories(self):
        """Places of all directories."""
        places, place = [], struct.unpack_from("<I", self.data, 4)[0]
        while place:
            places.append(place)
            place = struct.unpack_from("<I", self.data, self._link(place))[0]
        return places

    def _link(self, place):
        return place + 2 + 12 * struct.unpack_from("<H", self.data, place)[0]

    def _entry(self, directory, tag):
        place = self.directories()[directory]
        for i in range(struct.unpack_from("<H", self.data, place)[0]):
            entry = place + 2 + 12 * i
            if struct.unpack_from("<H", self.data, entry)[0] == tag:
                return entry
        raise KeyError(tag)

    def get(self, tag, *, directory=0, index=0):
        """One number of a field."""
        return struct.unpack_from(*self._value(directory, tag, index))[0]

    def set(self, tag, value, *, directory=0, index=0):
        """Sets one number of a field, within the type that it has."""
        number_format, data, place = self._value(directory, tag, index)
        struct.pack_into(number_format, data, place, value)

    def _value(self, directory, tag, index):
        entry = self._entry(directory, tag)
        kind, count = struct.unpack_from("<HI", self.data, entry + 2)
        size = _SIZES[kind]
        place = entry + 8 if size * count <= 4 else struct.unpack_from("<I", self.data, entry + 8)[0]
        return {1: "<B", 2: "<I", 4: "<I"}[size], self.data, place + index * size

    def set_field(self, tag, *, directory=0, kind=None, count=None, value=None, new_tag=None):
        """Sets parts of the entry itself: its type, its count, its value or pointer (32 bits), or its tag."""
        entry = self._entry(directory, tag)
        for number_format, place, number in (
            ("<I", entry + 8, value),
            ("<I", entry + 4, count),
            ("<H", entry + 2, kind),
            ("<H", entry, new_tag),
        ):
            if number is not None:
                struct.pack_into(number_format, self.data, place, number)

    def remove(self, tag, *, directory=0):
        """Makes a field unknown, by a tag that means nothing; entries need not be in order for any reader we know."""
        self.set_field(tag, directory=directory, new_tag=65000)

    def link(self, directory, target):
        """Sets where a directory says that the next one is."""
        struct.pack_into("<I", self.data, self._link(self.directories()[directory]), target)

    def block(self, index, *, directory=0):
        """Slice of the compressed bytes of a block."""
        start = self.get(324, directory=directory, index=index)
        return slice(start, start + self.get(325, directory=directory, index=index))
