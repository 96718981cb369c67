# SPDX-License-Identifier: Apache-2.0
"""H1, H2, H6 and H8: names and cells that try to lead out of a folder, to be run, or to confuse.

H1: 80 strings as slide_id, case_id, path and report, from CSV, Parquet and a `Dataset`: nothing outside of the output
folder may change, paths stay below `slides_root`, and a refusal names the row and the column. H2: cells that a
spreadsheet would run, and separators, must come back exactly, and no table that a spreadsheet opens is written.
H6: 40 odd names of slide files and of folders: processed or refused, with a message that can be printed. H8: slides
that are the same, or in two splits.
"""

import csv
import os
import shutil

import pandas as pd
from datasets import Dataset

from dre_slcl.training.manifest import read_manifest

from .campaign import build, check, refusals, run_campaign, slide_rows, tree
from .seed_slides import paint, write_tiff

STRINGS = [
    *("..", "../", "../outside", "../../outside", "a/../../outside", "./../outside", "..\\outside"),
    *("a\\..\\..\\x", "/etc/passwd", "//host/share/x", "\\\\host\\share\\x", "\\\\?\\C:\\x", "C:\\x"),
    *("C:x", "C:/x", "~", "~/x", "~root/x", "$HOME/x", "${HOME}/x", "%HOME%/x", "%TEMP%\\x", "`id`"),
    *("$(id)", "; touch x", "| touch x", "%2e%2e%2foutside", "..%2foutside", "%252e%252e%252foutside"),
    *("..%c0%afoutside", "\u2024\u2024/outside", "\uff0e\uff0e/outside", "..\u2215outside"),
    *("..\u2044outside", "..\uff0foutside", "\u202e..", "a\u200b/../..", "a\x00b", "a\x00/../../x", "\x00"),
    *("a\nb", "a\r\nb", "a\tb", "\x1b[2J", "a\x7fb", ".", "./", ".hidden", "-rf", "--out=x", "CON"),
    *("con.txt", "NUL", "COM1", "LPT9.tif", "a.", "a ", " a", "a" * 129, "a" * 256, "a" * 5000, "a/b"),
    *("a//b", "/", "//", "///outside", "/dev/zero", "/dev/stdin", "/proc/self/environ", "/proc/self/mem"),
    *("file:///etc/passwd", "http://host/x", "s3://bucket/x", "a:b", "a*b", "a?b", 'a"b', "a<b>"),
    *(
        "{slide_id}",
        "%s%n",
        "../.tmp-1/x",
    ),
]
FIELDS = ("slide_id", "case_id", "path", "report")
CELLS = [
    *("=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", 'a,b"c', "a;b", "'=1"),
    *(
        "a\tb",
        'x"\n=1',
    ),
]
ODD_NAMES = [
    *(b"a\xff", b"\xfe\xfe", b"caf\xe9", b"\xed\xa0\x80", b"\xf0\x9f\x94\xac", b"\xe2\x80\xaeabc"),
    *(b"\xd7\x90\xd7\x91", b"e\xcc\x81", b"\xc3\xa9", b"\xe4\xb8\xad\xe6\x96\x87", b"a" * 250, b"-rf"),
    *(b"--help", b"a\nb", b"a\rb", b"a\tb", b"\x1b[31m", b"\x07", b"CON", b"NUL", b"com1", b"aux.x"),
    *(b"a b", b" a", b"a ", b"a.", b"a..b", b"...a", b"%s%n", b"{0}", b"$HOME", b"`id`", b"a;b", b"a|b"),
    *(
        b"a&b",
        b"a'b",
        b'a"b',
        b"a\\b",
        b"a*b",
        b"a?b",
    ),
]


def sources(folder, table):
    """The same table in the three forms; a CSV file is left out where it cannot hold the text."""
    frame = pd.DataFrame(table)
    frame.to_csv(folder / "manifest.csv", index=False, quoting=csv.QUOTE_ALL)
    frame.to_parquet(folder / "manifest.parquet")
    return {
        "csv": folder / "manifest.csv",
        "parquet": folder / "manifest.parquet",
        "dataset": Dataset.from_dict(table),
    }


def path_traversal(root, problems):
    """H1; returns the number of cases."""
    slides = root / "slides"
    slides.mkdir(parents=True)
    (root / "outside").mkdir()
    (root / "outside" / "precious.txt").write_text("x")
    for i in range(len(STRINGS) + 1):
        write_tiff(slides / f"s{i}.tif", paint(i, 512))
    os.chdir(slides)
    accepted = {field: [] for field in FIELDS}
    num_cases = 0
    for field in FIELDS:
        for i, text in enumerate(STRINGS):
            row = {"slide_id": f"s{i}", "path": f"s{i}.tif", "case_id": f"c{i}", "report": "Benign."} | {field: text}
            for kind, source in sources(root / "outside", {name: [value] for name, value in row.items()}).items():
                num_cases += 1
                try:
                    (found,) = read_manifest(source, slides_root=slides)
                except ValueError as error:
                    is_named = "row 1" in str(error) or "fields in every row" in str(error) or "UTF-8" in str(error)
                    check(
                        problems,
                        (is_named and field in str(error)) or (field == "path" and is_named),
                        f"{text!r}: {error}",
                    )
                    continue
                is_below = found.path.is_relative_to(slides)
                check(problems, is_below, f"{field} {text!r} from {kind} leads to {found.path}")
                if kind == "parquet":
                    accepted[field].append(row)
    shutil.rmtree(root / "outside")
    (root / "outside").mkdir()
    (root / "outside" / "precious.txt").write_text("x")
    before = tree(root)
    for field, rows in accepted.items():
        if rows:
            rows = list({row["slide_id"].strip().casefold(): row for row in rows}.values())
            table = {name: [*(row[name] for row in rows), good] for name, good in GOOD.items()}
            frame = pd.DataFrame(table)
            build(Dataset.from_pandas(frame), root / "out" / field, slides_root=slides)
    after = {name: value for name, value in tree(root).items() if name != "out" and not name.startswith("out/")}
    check(problems, after == before, f"changed outside: {sorted(set(after.items()) ^ set(before.items()))[:5]}")
    return num_cases, sum(len(rows) for rows in accepted.values())


GOOD = {"slide_id": "good", "path": f"s{len(STRINGS)}.tif", "case_id": "good", "report": ""}


def spreadsheet_cells(root, problems):
    """H2."""
    root.mkdir()
    for i in range(len(CELLS)):
        write_tiff(root / f"s{i}.tif", paint(i, 512))
    names = [f"s{i}" for i in range(len(CELLS))]
    table = {"slide_id": names, "path": [f"{name}.tif" for name in names], "report": CELLS, "note": CELLS}
    pd.DataFrame(table).to_csv(root / "manifest.csv", index=False, quoting=csv.QUOTE_ALL)
    build(root / "manifest.csv", root / "out")
    rows = slide_rows(root / "out")
    for name, cell in zip(names, CELLS, strict=True):
        found = (rows[name]["report"], rows[name]["note"])
        check(problems, found == (cell.strip(), cell.strip()), f"cell {cell!r} came back as {found!r}")
    opened = [path.name for path in (root / "out").rglob("*") if path.suffix in (".csv", ".tsv", ".xls", ".xlsx")]
    check(problems, not opened, f"written for spreadsheets: {opened}")
    return len(CELLS)


def odd_names(root, problems):
    """H6: each name once for a file and once for a folder."""
    num_processed = 0
    for number, name in enumerate(ODD_NAMES):
        for kind in ("file", "folder"):
            slides = root / f"{number}-{kind}"
            slides.mkdir(parents=True)
            target = os.fsencode(slides) + b"/" + name
            if kind == "folder":
                os.mkdir(target)  # noqa: PTH102 - the name may be no text
                target += b"/ok"
            write_tiff(slides / "good.tif", paint(1, 512))
            write_tiff(slides / "second.tif", paint(2, 512))
            os.rename(slides / "second.tif", target + b".tif")  # noqa: PTH104
            try:
                summary = build(slides, slides / "out")
                num_processed += summary.num_ok == 2
                texts = [path.read_text(encoding="utf-8") for path in (slides / "out").glob("*.*")]
            except Exception as error:  # noqa: BLE001 - what comes but for our own refusals is a fault
                is_refusal = type(error) is ValueError  # and not its child, an error of a codec
                check(problems, is_refusal, f"{kind} {name!r}: {type(error).__name__}: {error!r}"[:200])
                texts = [str(error)] if is_refusal else []
            for text in texts:
                is_printable = not any(
                    (ord(char) < 32 and char != "\n") or 0xD800 <= ord(char) < 0xE000 for char in text
                )
                check(problems, is_printable, f"{kind} {name!r}: the text cannot be printed: {text!r}"[:300])
    return 2 * len(ODD_NAMES), num_processed


def identity(root, problems):
    """H8: four ways in which slides or cases can be the same; all that offend must be listed."""
    (root / "slides" / "b").mkdir(parents=True)
    for i, name in enumerate(("a0", "a1", "a2", "b/a0")):
        write_tiff(root / "slides" / f"{name}.tif", paint(i, 512))

    def expect(name, words, make):
        try:
            make()
        except ValueError as error:
            missing = [word for word in words if word not in str(error)]
            check(problems, not missing, f"{name}: the message lacks {missing}: {error}")
        else:
            check(problems, False, f"{name}: accepted")

    def table(lines):
        (root / "slides" / "manifest.csv").write_text("\n".join(lines))
        return read_manifest(root / "slides" / "manifest.csv")

    ids = ["slide_id,path", "x,a0.tif", "X,a1.tif", "y,a2.tif", "y,b/a0.tif"]
    expect("the same slide_id", ["x (a0.tif)", "X (a1.tif)", "y (a2.tif)", "y (b/a0.tif)"], lambda: table(ids))
    expect("the same name in two folders", ["a0.tif", "b/a0.tif"], lambda: read_manifest(root / "slides"))
    cases = [
        "slide_id,path,case_id,split",
        "x,a0.tif,c,train",
        "y,a1.tif,c,test",
        "z,a2.tif,d,train",
        "w,b/a0.tif,d,val",
    ]
    expect("a case in two splits", ["c: test, train", "d: train, val"], lambda: table(cases))
    shutil.copy(root / "slides" / "a0.tif", root / "slides" / "copy.tif")
    rows = ["slide_id,path", "x,a0.tif", "y,copy.tif", "z,a1.tif"]
    build(table(rows), root / "out")
    check(problems, refusals(root / "out") == {"y": "duplicate_id"}, f"the same bytes: {refusals(root / 'out')}")
    return 4


def campaign(root, count, seed):
    problems = []
    traversal, num_harmless = path_traversal(root / "traversal", problems)
    num_cells = spreadsheet_cells(root / "cells", problems)
    num_names, num_processed = odd_names(root / "names", problems)
    num_same = identity(root / "identity", problems)
    return {
        "cases": traversal + num_cells + num_names + num_same,
        "faults": len(problems),
        "path_traversal": traversal,
        "harmless_text": num_harmless,
        "spreadsheet_cells": num_cells,
        "odd_names": num_names,
        "odd_names_processed": num_processed,
        "identity": num_same,
    }


if __name__ == "__main__":
    run_campaign(campaign, count=len(STRINGS), doc=__doc__)
