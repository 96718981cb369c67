# SPDX-License-Identifier: Apache-2.0
"""S1: damages six kinds of slides at random and builds datasets of them, in the midst of good slides.

Flipped bits, cuts, edited header fields, spliced-in pieces of other files. No damage may end or hang the run, go
unreported, or change a bit of the good slides. Workers may die: that is what they are for; it is counted, and the
case's number is printed, from which `damage` makes the same file again.
"""

import shutil
import struct
from collections import Counter
from pathlib import Path

import numpy as np

from .campaign import build, build_counting, check, refusals, run_campaign, tile_digests, unreported
from .seed_slides import write_seeds

SLIDES_PER_BUILD = 1000
ODD_NUMBERS = [0, 1, 2, 3, 7, 8, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


def damage(contents, kind, seed, number):
    """Returns the damaged bytes of case `number`."""
    rng = np.random.default_rng([seed, number])
    data = bytearray(contents[kind])
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        _DAMAGES[int(rng.integers(len(_DAMAGES)))](data, contents, rng)
    return bytes(data)


def _place(data, rng):
    """A place in the file; half of the time where headers are."""
    if rng.random() < 0.5:
        near = int(rng.integers(min(2000, len(data))))
        return near if rng.random() < 0.7 else len(data) - 1 - near
    return int(rng.integers(len(data)))


def _flip_bits(data, contents, rng):
    for _ in range(int(rng.integers(1, 17))):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))


def _cut(data, contents, rng):
    if rng.random() < 0.5:
        del data[max(16, _place(data, rng)) :]
    else:
        start = _place(data, rng)
        del data[start : min(start + int(rng.integers(1, 5000)), len(data) - 16)]


def _splice(data, contents, rng):
    other = contents[list(contents)[int(rng.integers(len(contents)))]]
    start, length = int(rng.integers(len(other))), int(rng.integers(1, 3000))
    place = _place(data, rng)
    data[place : place + (length if rng.random() < 0.5 else 0)] = other[start : start + length]


def _edit_number(data, contents, rng):
    width = int(rng.choice([1, 2, 4, 8]))
    place = min(_place(data, rng), len(data) - width)
    number = ODD_NUMBERS[int(rng.integers(len(ODD_NUMBERS)))] % (1 << (8 * width))
    data[place : place + width] = number.to_bytes(width, "little")


def _edit_field(data, contents, rng):
    """Sets type, count or value of a field of a TIFF directory to an odd number."""
    places = _tiff_entries(bytes(data))
    if not places:
        return _edit_number(data, contents, rng)
    place, width = places[int(rng.integers(len(places)))]
    start, length = [(place + 2, 2), (place + 4, width), (place + 4 + width, width)][int(rng.integers(3))]
    odd = ODD_NUMBERS[int(rng.integers(len(ODD_NUMBERS)))] if length > 2 else int(rng.integers(20))
    data[start : start + length] = (odd % (1 << (8 * length))).to_bytes(length, "little")
    return None


def _tiff_entries(data):
    """Places of all directory entries of a little-endian TIFF, with the width of their numbers."""
    is_big = data[:4] == b"II+\0"
    if not is_big and data[:4] != b"II*\0":
        return []
    width, entry_bytes, count_format = (8, 20, "<Q") if is_big else (4, 12, "<H")
    places, link = [], 8 if is_big else 4
    try:
        for _ in range(10):
            start = int.from_bytes(data[link : link + width], "little")
            if not start:
                break
            num = struct.unpack_from(count_format, data, start)[0]
            start += struct.calcsize(count_format)
            places += [(start + i * entry_bytes, width) for i in range(min(num, 100))]
            link = start + num * entry_bytes
    except (struct.error, OverflowError):
        pass
    return [(place, width) for place, width in places if place + entry_bytes <= len(data)]


_DAMAGES = (_flip_bits, _cut, _splice, _edit_number, _edit_field, _edit_field)


def campaign(root, count, seed):
    seeds = write_seeds(root / "seeds")
    contents = {kind: path.read_bytes() for kind, path in seeds.items()}
    reference = _good_digests(root / "reference", contents)
    problems, ends, reasons, fatal = [], Counter(), Counter(), []
    for first in range(0, count, SLIDES_PER_BUILD):
        numbers = range(first, min(first + SLIDES_PER_BUILD, count))
        folder = root / f"batch-{first}"
        _write_good(folder / "slides", contents)
        ids = {}
        for number in numbers:
            kind = list(contents)[number % len(contents)]
            ids[f"case{number:06d}-{kind}"] = damage(contents, kind, seed, number)
        for slide_id, data in ids.items():
            _write(folder / "slides", slide_id, data)
        summary, found = build_counting(folder / "slides", folder / "out")
        ends.update(found)
        reasons.update(summary.refused_by_reason)
        lost = unreported(folder / "out", ids)
        check(problems, not lost, f"unreported: {lost}")
        digests = tile_digests(folder / "out")
        changed = [slide_id for slide_id in reference if digests.get(slide_id) != reference[slide_id]]
        check(problems, not changed, f"good slides changed: {changed}")
        check(problems, not found.get("hung"), f"{found.get('hung')} hung")
        fatal += [name for name, why in refusals(folder / "out").items() if why in ("reader_aborted", "timeout")]
        shutil.rmtree(folder)
    dead = {end.removeprefix("died "): num for end, num in sorted(ends.items()) if end.startswith("died")}
    return {
        "cases": count,
        "faults": len(problems),
        "parent_crashes": 0,
        "hung": ends["hung"],
        "workers_died": dead,
        "fatal_kinds": dict(Counter(name.rpartition("-")[2] for name in fatal)),
        "fatal_cases": fatal[:5],
        "still_usable": ends["ok"],
        "reasons": dict(sorted(reasons.items())),
    }


def _good_digests(folder, contents):
    _write_good(folder / "slides", contents)
    build(folder / "slides", folder / "out")
    return tile_digests(folder / "out")


def _write_good(folder, contents):
    for kind, data in contents.items():
        if kind != "plain":
            _write(folder, f"a-good-{kind}", data)


def _write(folder, slide_id, data):
    """A folder for each slide of DICOM, because OpenSlide looks for its levels beside it."""
    is_dicom = slide_id.endswith("dicom")
    suffix = {"dicom": ".dcm", "svs": ".svs"}.get(slide_id.split("-")[-1], ".tif")
    path = folder / slide_id / f"a{suffix}" if is_dicom else folder / f"{slide_id}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)


if __name__ == "__main__":
    run_campaign(campaign, count=2000, doc=__doc__)
