# SPDX-License-Identifier: Apache-2.0
"""H11: strings planted where scanners and archives keep patient data must not reach a dataset or a log.

Planted are fields of Aperio's and DICOM's headers, tags of TIFF, comments in the JPEG data of label and macro images,
a folder above the slides, and values that get into error messages. What the user hands over on purpose is data, and
does reach the dataset: the manifest's columns with the report, and the name of the slide's file (column `path`). So
is what stands in the one field that is read, MPP, if it is no number: the refusal quotes it. The report is searched
for as well: that it is found shows that the search works.
"""

import io
import logging

import numpy as np
import pyarrow.parquet as pq

from .campaign import build, check, run_campaign, slide_rows
from .seed_slides import paint, write_dicom, write_svs, write_tiff

APERIO_FIELDS = ("Patient", "PatientName", "Title", "Filename", "User", "ScanScope ID", "Barcode", "ImageID")
# Name, id, other ids, address, ethnic group, comments.
DICOM_FIELDS = {0x10: b"PN", 0x20: b"LO", 0x1000: b"LO", 0x1040: b"LO", 0x2160: b"SH", 0x4000: b"LT"}
TIFF_TAGS = (315, 316, 269, 270)  # Artist, HostComputer, DocumentName, ImageDescription


def planted(number):
    return f"ZQXV{number:02d}MUSTERMANN"


def write_slides(folder):
    """Writes slides that hold planted strings; returns all of them, with the place of each."""
    places = {}

    def plant(place):
        text = planted(len(places))
        places[text] = place
        return text

    extra = "".join(f"|{name} = {plant(f'aperio.{name}')}" for name in APERIO_FIELDS)
    label, macro = (np.ascontiguousarray(paint(number, 64)) for number in (8, 9))
    folder = folder / plant("folder above the slides") / "slides"
    folder.mkdir(parents=True)
    write_svs(folder / "aperio.svs", paint(1), extra=extra, label=label, macro=macro)
    data = (folder / "aperio.svs").read_bytes()
    for kind in (b"label", b"macro"):
        text = plant(f"description of the {kind.decode()} image").encode()
        old = b"v12.0.15\r\n" + kind + b" 64x64"
        if old not in data:
            raise ValueError(old)
        data = data.replace(old, text.ljust(len(old)))  # in place, so that the file stays whole
    (folder / "aperio.svs").write_bytes(data)
    # The same fields in slides that are refused, for what is said about them.
    write_svs(folder / "refused-mpp.svs", paint(2), mpp="nan", extra=extra)
    (folder / "refused-cut.svs").write_bytes(data[: len(data) // 2])
    patient = [(0x10, element, kind, plant(f"DICOM 0010,{element:04x}")) for element, kind in DICOM_FIELDS.items()]
    (folder / "dicom").mkdir()
    write_dicom(folder / "dicom" / "a.dcm", paint(3), patient=patient)
    tags = [(tag, "s", 0, plant(f"TIFF tag {tag}"), True) for tag in TIFF_TAGS]
    write_tiff(folder / "tags.tif", paint(4), metadata=None, extratags=tags)
    return folder, places


def campaign(root, count, seed):
    problems, log = [], io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)
    folder, places = write_slides(root)
    report = "ZQXV-REPORT"
    lines = [f"{name},{path},{report}" for name, path in sorted(PATHS.items())]
    (folder / "manifest.csv").write_text("\n".join(["slide_id,path,report", *lines]))
    for pixels in ("encode", "none"):
        build(folder / "manifest.csv", root / pixels, pixels=pixels)
    logging.getLogger().removeHandler(handler)
    rows = slide_rows(root / "encode")
    usable = sorted(name for name, row in rows.items() if row["status"] == "ok")
    check(problems, usable == ["aperio", "dicom", "tags"], f"usable: {usable}")
    content = everything(root / "encode") + everything(root / "none")
    check(problems, report.encode() in content, "the search does not find the report")
    for text, place in places.items():
        is_machine = place == "folder above the slides"  # the log is the user's own, on this machine
        found = content + (b"" if is_machine else log.getvalue().encode())
        check(
            problems,
            text.encode() not in found,
            f"{place} reaches the {'dataset' if text.encode() in content else 'log'}",
        )
    return {"cases": len(places), "faults": len(problems)}


PATHS = {
    "aperio": "aperio.svs",
    "dicom": "dicom/a.dcm",
    "tags": "tags.tif",
    "refused-mpp": "refused-mpp.svs",
    "refused-cut": "refused-cut.svs",
}


def everything(folder):
    """All bytes of a dataset: the files themselves, and the cells and metadata of its tables uncompressed."""
    content = b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
    for path in sorted(folder.rglob("*.parquet")):
        table = pq.read_table(path)
        content += repr(table.schema.metadata).encode() + repr(table.to_pylist()).encode()
    return content + " ".join(path.name for path in folder.rglob("*")).encode()


if __name__ == "__main__":
    run_campaign(campaign, count=len(APERIO_FIELDS) + len(DICOM_FIELDS) + len(TIFF_TAGS) + 3, doc=__doc__)
