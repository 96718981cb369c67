# SPDX-License-Identifier: Apache-2.0
"""One HTML file that shows a run: text, commands, tables and pictures, all inside it, nothing loaded elsewhere."""

import base64
import html
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from modeling_dre_slcl.atomic_files import write_text

logger = logging.getLogger(__name__)
MAX_REPORT_BYTES = 3_000_000
_MAX_IMAGE_BYTES = 250_000
_MAX_IMAGE_SIDE_PX = 1200
_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Paragraph:
    """Plain text; an empty line starts a new paragraph."""

    text: str


@dataclass(frozen=True)
class Commands:
    """Shell commands to copy, with a sentence above them."""

    lines: Sequence[str]
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the rows.

    Args:
        header (sequence of `str`): column names.
        rows (sequence of sequences of `str`): cells, as many in each row as in the header.
        caption (`str`, *optional*): below the table; an empty line starts a new paragraph.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Confusion:
    """Counts of right classes (rows) against predicted ones (columns), shaded by share of the row.

    Args:
        classes (sequence of `str`): names of the C classes.
        counts (sequence of sequences of `int`): C x C.
        caption (`str`, *optional*): below the table.
    """

    classes: Sequence[str]
    counts: Sequence[Sequence[int]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file.

    Args:
        path (`str` or `Path`): the file; large ones are reduced.
        caption (`str`): below the picture, and read out to those who cannot see it.
    """

    path: str | Path
    caption: str


@dataclass(frozen=True)
class PictureRow:
    """Pictures side by side, one below the other on narrow screens."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class NearestReports:
    """What a slide finds among reports.

    Args:
        slide_id (`str`): the slide.
        matches (sequence of `tuple`): similarity (`float`), report (`str`) and whether it is the slide's own (`bool`),
            nearest first.
        picture (`Picture`, *optional*): of the slide.
    """

    slide_id: str
    matches: Sequence[tuple[float, str, bool]]
    picture: Picture | None = None


Block = Paragraph | Commands | Table | Confusion | Picture | PictureRow | NearestReports


@dataclass(frozen=True)
class Section:
    """A headed part of the report."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def write_html_report(out_html: str | Path, *, title: str, summary: str = "", sections: Sequence[Section]) -> Path:
    """Writes the report as one file that can be mailed or opened from a disk, in light or dark.

    Args:
        out_html (`str` or `Path`): the file.
        title (`str`): of the report.
        summary (`str`, *optional*): a sentence or two below the title.
        sections (sequence of `Section`): its parts, in order.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if a table is ragged or a picture is neither PNG nor JPEG.
        OSError: if a picture cannot be read.
    """
    contents = "".join(f'<a href="#s{place}">{_text(part.title)}</a>' for place, part in enumerate(sections))
    parts = "".join(
        f'<section id="s{place}"><h2>{_text(part.title)}</h2>{"".join(map(_block, part.blocks))}</section>'
        for place, part in enumerate(sections)
    )
    page = _PAGE.format(
        title=_text(title), style=_STYLE, summary=_paragraphs(summary, "lead"), contents=contents, parts=parts
    )
    if len(page.encode()) > MAX_REPORT_BYTES:
        logger.warning("%s is %.1f MB large; leave out some pictures.", out_html, len(page.encode()) / 1e6)
    write_text(out_html, page)
    return Path(out_html)


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return _paragraphs(block.text)
        case Commands():
            return f"{_paragraphs(block.caption)}<pre><code>{_text(chr(10).join(block.lines))}</code></pre>"
        case Table():
            return _table(block)
        case Confusion():
            return _confusion(block)
        case Picture():
            return _picture(block)
        case PictureRow():
            return f'<div class="row">{"".join(map(_picture, block.pictures))}</div>'
        case NearestReports():
            return _nearest(block)
    raise ValueError(f"Expected a block of this module, got {type(block).__name__}.")


def _text(text: str) -> str:
    return html.escape(str(text))


def _paragraphs(text: str, kind: str = "") -> str:
    opening = f'<p class="{kind}">' if kind else "<p>"
    return "".join(f"{opening}{_text(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def _table(table: Table) -> str:
    ragged = [row for row in table.rows if len(row) != len(table.header)]
    if ragged:
        raise ValueError(
            f"Table: expected {len(table.header)} cells in each row, found {len(ragged[0])}: {ragged[0]}."
        )
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    body = ""
    previous = None
    for first, *rest in table.rows:
        # A name is said once for the rows that it covers.
        name, kind = ("", "again") if first == previous else (_text(first), "first")
        body += (
            f'<tr class="{kind}"><th scope="row">{name}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in rest)}</tr>'
        )
        previous = first
    return _framed(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", table.caption)


def _confusion(block: Confusion) -> str:
    num_classes = len(block.classes)
    if len(block.counts) != num_classes or any(len(row) != num_classes for row in block.counts):
        raise ValueError(f"Confusion: expected {num_classes} x {num_classes} counts, one row and column per class.")
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in block.classes)
    body = ""
    for name, counts in zip(block.classes, block.counts, strict=True):
        shares = (count / max(sum(counts), 1) for count in counts)
        cells = "".join(
            f'<td style="--share:{share:.3f}">{count}</td>' for count, share in zip(counts, shares, strict=True)
        )
        body += f'<tr><th scope="row">{_text(name)}</th>{cells}</tr>'
    head = f'<thead><tr><th scope="col">is \\ was called</th>{head}</tr></thead>'
    return _framed(f'<table class="confusion">{head}<tbody>{body}</tbody></table>', block.caption)


def _framed(table: str, caption: str) -> str:
    note = f"<figcaption>{_paragraphs(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="wide">{table}</div>{note}</figure>'


def _picture(picture: Picture) -> str:
    caption = _text(picture.caption)
    image = f'<img alt="{caption}" src="{_data_uri(Path(picture.path))}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _nearest(block: NearestReports) -> str:
    rows = "".join(
        f"<li{' class=own' if is_own else ''}><b>{similarity:.3f}</b>"
        f"{'<i>its own report</i>' if is_own else ''}<span>{_text(report)}</span></li>"
        for similarity, report, is_own in block.matches
    )
    picture = _picture(block.picture) if block.picture is not None else ""
    return f'<div class="nearest">{picture}<div><h3>{_text(block.slide_id)}</h3><ol>{rows}</ol></div></div>'


def _data_uri(path: Path) -> str:
    """The file as text for `src`; one that is large is reduced and becomes a JPEG."""
    content, kind = path.read_bytes(), _IMAGE_TYPES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: expected a PNG or JPEG file.")
    if len(content) > _MAX_IMAGE_BYTES:
        with PIL.Image.open(path) as image:
            reduced = image.convert("RGB")
        reduced.thumbnail((_MAX_IMAGE_SIDE_PX, _MAX_IMAGE_SIDE_PX))
        buffer = io.BytesIO()
        reduced.save(buffer, "JPEG", quality=82, optimize=True)
        content, kind = buffer.getvalue(), "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1>{summary}<nav>{contents}</nav></header>
{parts}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #ffffff; --raised: #f4f6f8;
  --line: #dce1e7; --accent: #0b62a8; --accent-rgb: 11, 98, 168; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa6b5; --paper: #14181e; --raised: #1d232c;
  --line: #323b47; --accent: #6db5f2; --accent-rgb: 109, 181, 242; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3.2rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; font-family: ui-monospace, Menlo, Consolas, monospace; font-weight: 600; }
p { max-width: 44rem; margin: .6rem 0; }
.lead { font-size: 1.12rem; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: 1.2rem; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
pre { background: var(--raised); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1.1rem;
  overflow-x: auto; font: .85rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; }
figcaption { color: var(--soft); font-size: .88rem; line-height: 1.5; margin-top: .5rem; max-width: 44rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
.row figure { flex: 1 1 18rem; margin: .6rem 0; min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem 1.4rem .4rem 0; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); white-space: nowrap; }
tbody th { font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
tr.first th, tr.first td { border-top: 1px solid var(--line); }
.confusion th, .confusion td { padding: .5rem .9rem; text-align: center; }
.confusion th { white-space: normal; }
.confusion td { min-width: 4.5rem; border: 1px solid var(--line); font-weight: 600;
  background: rgba(var(--accent-rgb), calc(var(--share) * .55)); }
.nearest { display: flex; flex-wrap: wrap; gap: 1.5rem; margin: 1.4rem 0; align-items: flex-start; }
.nearest > figure { flex: 0 1 16rem; margin: 0; }
.nearest > div { flex: 1 1 24rem; min-width: 0; }
ol { margin: 0; padding: 0; list-style: none; }
li { padding: .6rem .9rem; border-left: 3px solid var(--line); margin-bottom: .6rem; background: var(--raised);
  border-radius: 0 8px 8px 0; font-size: .92rem; }
li.own { border-left-color: var(--accent); }
li b { font-variant-numeric: tabular-nums; margin-right: .7rem; }
li i { color: var(--accent); font-style: normal; font-size: .85rem; }
li span { display: block; white-space: pre-line; color: var(--soft); }
@media print { main { max-width: none; padding: 0; } nav { display: none; } figure, tr, li { break-inside: avoid; } }
"""
