# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: every slide has its place, refused ones are red, pages are bounded and old ones go."""

import numpy as np
import PIL.Image
import pytest

from dre_slcl.training.contact_sheet import SLIDES_PER_PAGE, SheetEntry, write_contact_sheet

COLOURS = [(200, 40, 40), (40, 180, 40), (40, 40, 200)]


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for number, colour in enumerate(COLOURS):
        path = tmp_path / f"{number}.jpg"
        PIL.Image.new("RGB", (600, 300 + 200 * number), colour).save(path)
        paths.append(path)
    return paths


def pixels(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def near(picture, colour):
    return (np.abs(picture - np.array(colour)) < 40).all(axis=2)


def test_every_picture_is_there_in_order_and_in_its_own_shape(tmp_path, pictures):
    entries = [SheetEntry(f"slide-{number}", path, 10, 0.25) for number, path in enumerate(pictures)]
    (page,) = write_contact_sheet(entries, tmp_path / "out")
    assert page == tmp_path / "out" / "contact_sheet.jpg"
    sheet = pixels(page)
    centres = []
    for number, colour in enumerate(COLOURS):
        rows, columns = np.nonzero(near(sheet, colour))
        assert np.ptp(columns) / np.ptp(rows) == pytest.approx(600 / (300 + 200 * number), rel=0.05)
        centres.append((rows.mean() // 280, columns.mean()))
    assert centres == sorted(centres)


def test_refused_slides_are_marked(tmp_path, pictures):
    (page,) = write_contact_sheet([SheetEntry("good", pictures[1], 5)], tmp_path / "good")
    assert not near(pixels(page), (180, 20, 20)).any()
    (page,) = write_contact_sheet([SheetEntry("bad", pictures[1], reason="no_tissue")], tmp_path / "bad")
    assert near(pixels(page), (180, 20, 20)).sum() > 1000


def test_missing_and_broken_pictures_leave_a_field(tmp_path, pictures, caplog):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(pictures[0].read_bytes()[:200])
    entries = [SheetEntry("none"), SheetEntry("gone", tmp_path / "gone.jpg"), SheetEntry("broken", broken)]
    (page,) = write_contact_sheet(entries, tmp_path / "out")
    assert near(pixels(page), (238, 238, 238)).sum() > 3 * 200 * 200
    assert "broken.jpg" in caplog.text


def test_more_slides_make_more_pages_and_old_pages_go(tmp_path, pictures):
    entries = [SheetEntry(f"s{number}", pictures[number % 3], 1) for number in range(SLIDES_PER_PAGE + 1)]
    pages = write_contact_sheet(entries, tmp_path / "out")
    assert [page.name for page in pages] == ["contact_sheet_001.jpg", "contact_sheet_002.jpg"]
    assert max(pixels(pages[0]).shape) < 4000
    other = tmp_path / "out" / "contact_sheet_notes.jpg"
    other.touch()
    (page,) = write_contact_sheet(entries[:5], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [page.name, other.name]
    assert write_contact_sheet([], tmp_path / "out") == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == [other.name]


def test_long_names_stay_in_their_column(tmp_path):
    entries = [SheetEntry("x" * 128, reason="because " * 30), SheetEntry("y")]
    (page,) = write_contact_sheet(entries, tmp_path)
    text = pixels(page)[30 + 8 + 240 :, 8 + 240 : 8 + 240 + 8]
    assert (text > 200).all()
