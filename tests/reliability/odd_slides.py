# SPDX-License-Identifier: Apache-2.0
"""S4 to S7: bad slides among good ones, odd resolutions, odd tissue, and paths that are no slide files."""

import os
import socket
import time
from dataclasses import replace

import numpy as np

from dre_slcl.training.manifest import read_manifest

from .campaign import build, build_counting, check, refusals, run_campaign, slide_rows, tile_digests
from .seed_slides import paint, write_svs, write_tiff

NUM_SLIDES, NUM_BAD = 100, 30
MAX_SECONDS = 5.0


def mixed_run(root, problems):
    """S4: of 100 slides 30 are bad; the other 70 must come out as if they had been alone."""
    for folder in ("all", "good"):
        (root / folder).mkdir(parents=True)
    expected = {}
    for i in range(NUM_SLIDES):
        name = f"s{i:03d}.tif"
        is_bad = i % 10 in (1, 4, 7)
        write_tiff(root / "all" / name, np.full((192, 192, 3), 240, np.uint8) if i % 10 == 1 else paint(i, 192))
        data = (root / "all" / name).read_bytes()
        if i % 10 == 1:
            (root / "all" / name).write_bytes(data + f"{i}".encode())  # each another file
            expected[f"s{i:03d}"] = "no_tissue"
        elif i % 10 == 4:
            (root / "all" / name).write_bytes(data[: len(data) // 2])
            expected[f"s{i:03d}"] = "truncated"
        elif i % 10 == 7:
            (root / "all" / name).write_bytes(data.replace(b"II*", b"IX*", 1))
            expected[f"s{i:03d}"] = "unsupported"
        if not is_bad:
            (root / "good" / name).write_bytes(data)
    summary, _ = build_counting(root / "all", root / "out-all")
    build(root / "good", root / "out-good")
    check(problems, (summary.num_ok, summary.exit_code) == (NUM_SLIDES - NUM_BAD, 3), f"mixed run: {summary}")
    check(problems, refusals(root / "out-all") == expected, "mixed run: other refusals")
    check(problems, tile_digests(root / "out-all") == tile_digests(root / "out-good"), "mixed run: other tiles")
    rows = [slide_rows(root / out) for out in ("out-all", "out-good")]
    kept = {name: {**row, "tile_start": 0} for name, row in rows[0].items() if row["status"] == "ok"}
    check(problems, kept == {name: {**row, "tile_start": 0} for name, row in rows[1].items()}, "mixed run: other rows")
    return NUM_SLIDES


RESOLUTIONS = {
    "missing": (None, "mpp_missing"),
    "nan": ("nan", "mpp_out_of_range"),
    "infinite": ("inf", "mpp_out_of_range"),
    "negative": ("-0.499", "mpp_out_of_range"),
    "zero": ("0", "mpp_out_of_range"),
    "nanometres": ("4990", "mpp_out_of_range"),
    "overflow": ("1e9999", "mpp_out_of_range"),
    "comma": ("0,4990", ""),  # a decimal comma has one meaning
    "hexadecimal": ("0x1p-1", "mpp_out_of_range"),
    "not-utf8": ("0.5\xff", "mpp_out_of_range"),
}


def resolutions(root, problems):
    """S5: what the file may say about micrometres per pixel; all are read when the user says 0.5."""
    (root / "slides").mkdir(parents=True)
    for number, (name, (text, _)) in enumerate(RESOLUTIONS.items()):
        path = root / "slides" / f"{name}.svs"
        is_ascii = text is None or text.isascii()
        write_svs(path, paint(number), mpp=text if is_ascii else "#" * len(text))
        if not is_ascii:  # which the writer does not write
            path.write_bytes(path.read_bytes().replace(b"= " + b"#" * len(text), b"= " + text.encode("latin-1")))
    write_tiff(root / "slides" / "oblong.tif", paint(20))
    data = (root / "slides" / "oblong.tif").read_bytes()
    horizontal = data.index((10_000).to_bytes(4, "little") + (1).to_bytes(4, "little"))
    data = data[:horizontal] + (11_000).to_bytes(4, "little") + data[horizontal + 4 :]
    (root / "slides" / "oblong.tif").write_bytes(data)
    expected = {name: reason for name, (_, reason) in RESOLUTIONS.items()} | {"oblong": "mpp_out_of_range"}
    build(root / "slides", root / "out")
    found = {name: row["reason"] for name, row in slide_rows(root / "out").items()}
    for name, reason in expected.items():
        check(problems, found[name] == reason, f"mpp {name}: expected {reason!r}, found {found[name]!r}")
    check(problems, slide_rows(root / "out")["comma"]["mpp"] == 0.499, "mpp comma: another number")
    build([replace(row, mpp=0.5) for row in read_manifest(root / "slides")], root / "given")
    rows = slide_rows(root / "given").values()
    unused = [row["slide_id"] for row in rows if (row["mpp"], row["status"]) != (0.5, "ok")]
    check(problems, not unused, f"a given mpp is not used: {unused}")
    return len(expected)


def tissue_extremes(root, problems):
    """S6: pictures in which tissue detection has nothing, everything, or something else to find."""
    (root / "slides").mkdir(parents=True)
    side = 512
    stained = paint(3, side)[side // 2, side // 2] + np.zeros((side, side, 3), np.uint8)
    texture = (np.indices((side, side)).sum(axis=0) % 13)[..., None].astype(np.uint8)
    pen = np.full((side, side, 3), 244, np.uint8)
    pen[100:130, 50:450] = (30, 60, 200)
    pictures = {
        "no-tissue": (np.full((side, side, 3), 244, np.uint8) - texture % 3, "no_tissue", None),
        "all-tissue": (stained + texture, "", (side // 64) ** 2),
        "one-tile": ((stained + texture)[:72, :72], "", 1),
        "smaller-than-a-tile": (paint(7, side)[230:270, 230:270], "no_tissue", None),
        "black": (np.zeros((side, side, 3), np.uint8), "no_tissue", None),
        "white": (np.full((side, side, 3), 255, np.uint8), "no_tissue", None),
        "pen-only": (pen, "no_tissue", None),
    }
    for name, (pixels, _, _) in pictures.items():
        write_tiff(root / "slides" / f"{name}.tif", np.ascontiguousarray(pixels))
    build(root / "slides", root / "out")
    rows = slide_rows(root / "out")
    for name, (_, reason, num_tiles) in pictures.items():
        row = rows[name]
        holds = row["reason"] == reason and (num_tiles is None or row["num_tiles"] == num_tiles)
        check(
            problems, holds, f"{name}: expected {reason!r}, {num_tiles}; found {row['reason']!r}, {row['num_tiles']}"
        )
    return len(pictures)


def not_a_file(root, problems):
    """S7: what stands where a slide should be; and slides that vanish or change while they are read."""
    slides = root / "slides"
    slides.mkdir(parents=True)
    (slides / "folder.svs").mkdir()
    os.mkfifo(slides / "pipe.svs")
    (slides / "device.svs").symlink_to("/dev/zero")
    (slides / "loop.svs").symlink_to(slides / "loop.svs")
    (slides / "dangling.svs").symlink_to(slides / "nothing.svs")
    (slides / "empty.svs").write_bytes(b"")
    write_tiff(slides / "forbidden.tif", paint(1, 192))
    (slides / "forbidden.tif").chmod(0)
    for name, number in (("vanishes.tif", 2), ("changes.tif", 3), ("good.tif", 4)):
        write_tiff(slides / name, paint(number))
    reasons = dict.fromkeys(("folder", "pipe", "device", "loop", "dangling", "socket"), "not_a_file")
    expected = {**reasons, "empty": "truncated", "forbidden": "unreadable"}
    expected |= {"vanishes": "not_a_file", "changes": "changed_during_run", "good": ""}
    if os.geteuid() == 0:
        expected["forbidden"] = ""  # nothing is forbidden to root
    lines = ["slide_id,path"]
    lines += [f"{path.stem},{path.name}" for path in sorted(slides.iterdir()) if path.stem != "good"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(slides / "socket.svs"))
        (slides / "manifest.csv").write_text("\n".join([*lines, "good,good.tif", "socket,socket.svs"]))
        start = time.monotonic()
        with _meddling(slides):
            build(slides / "manifest.csv", root / "out")
        seconds = time.monotonic() - start
    found = {name: row["reason"] for name, row in slide_rows(root / "out").items()}
    for name, reason in expected.items():
        check(problems, found[name] == reason, f"{name}: expected {reason!r}, found {found[name]!r}")
    check(problems, seconds < MAX_SECONDS, f"not a file: {seconds:.1f} s")
    return len(expected) - 1


class _meddling:  # noqa: N801
    """While a slide is tiled: one is deleted before it is opened, one grows by a byte after it was read."""

    def __init__(self, slides):
        self.slides = slides

    def __enter__(self):
        from dre_slcl.training import slide_part

        self.module, self.tile = slide_part, slide_part._tile

        def tile(task):
            if task.slide_id == "vanishes":
                task.path.unlink()
            record = self.tile(task)
            if task.slide_id == "changes":
                with task.path.open("ab") as handle:
                    handle.write(b"x")
            return record

        slide_part._tile = tile

    def __exit__(self, *error):
        self.module._tile = self.tile


def campaign(root, count, seed):
    problems, figures = [], {}
    for group in (mixed_run, resolutions, tissue_extremes, not_a_file):
        figures[group.__name__] = group(root / group.__name__, problems)
    return {"cases": sum(figures.values()), "faults": len(problems), **figures}


if __name__ == "__main__":
    run_campaign(campaign, count=NUM_SLIDES + len(RESOLUTIONS) + 1 + 7 + 10, doc=__doc__)
