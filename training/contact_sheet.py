# SPDX-License-Identifier: Apache-2.0
"""One picture, or a few, of all slides of a run: previews side by side, with what was found and what was refused.

To look over a cohort at a glance before anything is trained on it. Pictures are read one at a time, reduced while they
are decoded, so memory does not grow with the number of slides.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from modeling_dre_slcl.atomic_files import atomic_file

logger = logging.getLogger(__name__)

SLIDES_PER_PAGE = 100
_MAX_COLUMNS = 10
_CELL_PX = 240  # side of the square that a slide's picture is fitted into
_TEXT_PX = 34  # two lines below it
_GAP_PX = 8
_TITLE_PX = 30
_FONT_PX = 13
_QUALITY = 88
_INK, _FAINT, _REFUSED = (20, 20, 20), (110, 110, 110), (180, 20, 20)


@dataclass(frozen=True)
class SheetEntry:
    """A slide on a contact sheet.

    Args:
        slide_id (`str`): the slide.
        picture (`Path`, *optional*): its preview, JPEG or PNG; an empty field where there is none.
        num_tiles (`int`, defaults to 0): tiles that were kept.
        tissue_fraction (`float`, *optional*): share of the scanned area that is tissue, in [0, 1].
        reason (`str`, defaults to `""`): why the slide was refused; `""` if it was not.
    """

    slide_id: str
    picture: Path | None = None
    num_tiles: int = 0
    tissue_fraction: float | None = None
    reason: str = ""


def write_contact_sheet(
    entries: Sequence[SheetEntry], folder: str | Path, *, name: str = "contact_sheet"
) -> list[Path]:
    """Draws the slides of a run, refused ones marked in red with their reason.

    Args:
        entries (sequence of `SheetEntry`): the slides, in the order in which they are drawn.
        folder (`str` or `Path`): where the pages go; pages of an earlier run there are replaced.
        name (`str`, defaults to `"contact_sheet"`): the files are `<name>.jpg`, or `<name>_001.jpg` and so on if
            there are more than `SLIDES_PER_PAGE` slides.

    Returns:
        `list[Path]`: the pages; none if there are no slides.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_pages = math.ceil(len(entries) / SLIDES_PER_PAGE)
    names = [f"{name}.jpg"] if num_pages == 1 else [f"{name}_{page + 1:03d}.jpg" for page in range(num_pages)]
    for page, file_name in enumerate(names):
        shown = entries[page * SLIDES_PER_PAGE : (page + 1) * SLIDES_PER_PAGE]
        title = _summary(entries) + (f"; page {page + 1} of {num_pages}" if num_pages > 1 else "")
        with atomic_file(folder / file_name) as temporary:
            _draw_page(shown, title).save(temporary, format="JPEG", quality=_QUALITY)
    for path in (folder / f"{name}.jpg", *folder.glob(f"{name}_[0-9][0-9][0-9].jpg")):
        if path.name not in names:
            path.unlink(missing_ok=True)
    return [folder / file_name for file_name in names]


def _summary(entries: Sequence[SheetEntry]) -> str:
    num_refused = sum(bool(entry.reason) for entry in entries)
    num_tiles = sum(entry.num_tiles for entry in entries)
    return f"{len(entries):,} slides, {num_refused:,} refused, {num_tiles:,} tiles"


def _draw_page(entries: Sequence[SheetEntry], title: str) -> PIL.Image.Image:
    # A little wider than high, as screens are; at least wide enough for the title.
    num_columns = max(2, min(_MAX_COLUMNS, math.ceil(math.sqrt(1.3 * len(entries)))))
    num_rows = math.ceil(len(entries) / num_columns)
    step_x, step_y = _CELL_PX + _GAP_PX, _CELL_PX + _TEXT_PX + _GAP_PX
    size = num_columns * step_x + _GAP_PX, num_rows * step_y + _GAP_PX + _TITLE_PX
    page = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(page)
    draw.font = PIL.ImageFont.load_default(_FONT_PX)
    draw.text((_GAP_PX, _GAP_PX), title, fill=_INK)
    for place, entry in enumerate(entries):
        row, column = divmod(place, num_columns)
        _draw_entry(page, draw, entry, _GAP_PX + column * step_x, _TITLE_PX + _GAP_PX + row * step_y)
    return page


def _draw_entry(page: PIL.Image.Image, draw: PIL.ImageDraw.ImageDraw, entry: SheetEntry, left: int, top: int) -> None:
    picture = _open_reduced(entry.picture)
    if picture is None:
        draw.rectangle((left, top, left + _CELL_PX - 1, top + _CELL_PX - 1), fill=(238, 238, 238))
        draw.text((left + 8, top + 8), "no picture", fill=_FAINT)
    else:
        page.paste(picture, (left + (_CELL_PX - picture.width) // 2, top + (_CELL_PX - picture.height) // 2))
    if entry.reason:
        draw.rectangle((left, top, left + _CELL_PX - 1, top + _CELL_PX - 1), outline=_REFUSED, width=3)
    tissue = "" if entry.tissue_fraction is None else f", {entry.tissue_fraction:.1%} tissue"
    found = f"refused: {entry.reason}" if entry.reason else f"{entry.num_tiles:,} tiles{tissue}"
    draw.text((left, top + _CELL_PX + 2), _shorten(draw, entry.slide_id), fill=_INK)
    draw.text((left, top + _CELL_PX + 17), _shorten(draw, found), fill=_REFUSED if entry.reason else _FAINT)


def _open_reduced(path: Path | None) -> PIL.Image.Image | None:
    """Reads a picture, no larger than a cell; None, and a warning, if that is not possible."""
    if path is None or not path.is_file():
        return None
    try:
        with PIL.Image.open(path, formats=("JPEG", "PNG")) as image:
            image.draft("RGB", (_CELL_PX, _CELL_PX))
            reduced = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        logger.warning("%s: left out of the contact sheet: %s", path, error)
        return None
    reduced.thumbnail((_CELL_PX, _CELL_PX))
    return reduced


def _shorten(draw: PIL.ImageDraw.ImageDraw, text: str) -> str:
    """Cuts the middle out of a text that is wider than a cell: names of slides often differ at their ends."""
    if draw.textlength(text) <= _CELL_PX:
        return text
    kept = len(text) - 1
    while kept > 2 and draw.textlength(f"{text[: (kept + 1) // 2]}...{text[-(kept // 2) :]}") > _CELL_PX:
        kept -= 1
    return f"{text[: (kept + 1) // 2]}...{text[-(kept // 2) :]}"
