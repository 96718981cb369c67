# SPDX-License-Identifier: Apache-2.0
"""What a search found, as one HTML file: pictures inside it, text escaped, nothing loaded from elsewhere."""

import base64
import html
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image

from modeling_dre_slcl.atomic_files import write_text
from modeling_dre_slcl.slide_reader import SlideError, SlideReader

logger = logging.getLogger(__name__)
_THUMBNAIL_PX = 360
_REGION_PX = 320
_MARK_RGB = (213, 94, 0)
_LONGEST_REPORT = 700


@dataclass(frozen=True)
class Hit:
    """Something that a search found.

    Args:
        rank (`int`): from 1.
        score (`float`): cosine similarity to the query.
        slide_id (`str`): the slide; `""` for a report.
        case_id (`str`): its case.
        report (`str`, *optional*): its report, or the report that was found.
        xy (`tuple[int, int]`, *optional*): level-0 (x, y) of the top-left corner of a region.
        size_level0_px (`int`, *optional*): side of the region.
        num_tiles (`int`, *optional*): tiles in it.
    """

    rank: int
    score: float
    slide_id: str
    case_id: str
    report: str = ""
    xy: tuple[int, int] | None = None
    size_level0_px: int | None = None
    num_tiles: int | None = None

    def as_row(self) -> dict[str, Any]:
        """The hit as a JSON object, without what it does not have."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def write_search_page(
    out_html: str | Path, *, title: str, summary: str, hits: Sequence[Hit], slides: Mapping[str, Path]
) -> Path:
    """Writes the results as one file that can be mailed, or opened from a disk.

    Args:
        out_html (`str` or `Path`): the file.
        title (`str`): what was searched for.
        summary (`str`): where, and how.
        hits (sequence of `Hit`): what was found, best first.
        slides (mapping of `str` to `Path`): files of slides, for their pictures; a slide without one has no picture.

    Returns:
        `Path`: the file.
    """
    best = max((hit.score for hit in hits), default=0.0)
    cards = "".join(_card(hit, best, slides.get(hit.slide_id)) for hit in hits)
    page = _PAGE.format(
        title=html.escape(title), summary=html.escape(summary), style=_STYLE, cards=cards or "<p>Nothing found.</p>"
    )
    write_text(out_html, page)
    return Path(out_html)


def _card(hit: Hit, best: float, path: Path | None) -> str:
    facts = [f"case {hit.case_id}"] if hit.case_id not in ("", hit.slide_id) else []
    if hit.xy is not None:
        facts += [f"{hit.num_tiles} tiles at x {hit.xy[0]:,}, y {hit.xy[1]:,}, {hit.size_level0_px:,} px wide"]
    report = hit.report if len(hit.report) <= _LONGEST_REPORT else hit.report[:_LONGEST_REPORT].rstrip() + " ..."
    share = max(0.0, hit.score) / best if best > 0 else 0.0
    return (
        f'<article><div class="pictures">{_pictures(hit, path)}</div><div class="text">'
        f"<h2><b>{hit.rank}</b>{html.escape(hit.slide_id or 'report')}</h2>"
        f'<p class="score"><span class="bar"><i style="width:{100 * share:.0f}%"></i></span>{hit.score:.3f}</p>'
        f'<p class="facts">{html.escape(", ".join(facts))}</p>'
        f'<p class="report">{html.escape(report)}</p></div></article>'
    )


def _pictures(hit: Hit, path: Path | None) -> str:
    """A slide's thumbnail and, of a region, its place there and a closer look."""
    if not hit.slide_id:
        return ""
    if path is None:
        return '<p class="none">no picture: give the slides with --slides</p>'
    try:
        pictures = read_pictures(path, hit)
    except SlideError as error:
        logger.warning("No picture of %s: %s", hit.slide_id, error)
        return f'<p class="none">no picture: {html.escape(error.reason)}</p>'
    return "".join(f'<img alt="{html.escape(hit.slide_id)}" src="{picture_uri(picture)}">' for picture in pictures)


def read_pictures(path: Path, hit: Hit) -> list[np.ndarray]:
    """Reads the pictures of a hit.

    Args:
        path (`Path`): the slide.
        hit (`Hit`): what was found in it.

    Returns:
        `list` of `np.ndarray` of shape `(h, w, 3)`, uint8: the slide; of a region also the region.

    Raises:
        SlideError: if the slide cannot be read.
    """
    # Its own resolution does not matter to a picture, so a slide that states none is shown all the same.
    with _open_for_picture(path, hit.slide_id) as reader:
        left, top, width, height = reader.info.bounds
        overview, downsample = reader.read_overview(reader.info.mpp * max(width, height) / _THUMBNAIL_PX)
        scale = min(1.0, _THUMBNAIL_PX / max(overview.shape[:2]))
        size = [max(1, round(side * scale)) for side in overview.shape[1::-1]]
        thumbnail = cv2.resize(overview, size, interpolation=cv2.INTER_AREA)
        if hit.xy is None:
            return [thumbnail]
        x, y = hit.xy
        corner = np.array([x - left, y - top]) * scale / downsample
        side = max(3, round(hit.size_level0_px * scale / downsample))
        start = tuple(int(value) for value in np.rint(corner))
        cv2.rectangle(thumbnail, start, (start[0] + side, start[1] + side), _MARK_RGB, 2)
        mpp = reader.info.mpp * max(1.0, hit.size_level0_px / _REGION_PX)
        pixels = max(1, round(hit.size_level0_px * reader.info.mpp / mpp))
        return [thumbnail, reader.read_tile(x, y, tile_size_px=pixels, tile_mpp=mpp)]


def _open_for_picture(path: Path, slide_id: str) -> SlideReader:
    try:
        return SlideReader(path, slide_id=slide_id)
    except SlideError as error:
        if not error.reason.startswith("mpp"):
            raise
    return SlideReader(path, slide_id=slide_id, mpp=1.0)


def picture_uri(rgb: np.ndarray) -> str:
    """Encodes uint8 RGB `(h, w, 3)` as a JPEG inside a `data:` address."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(rgb).save(buffer, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main><header><h1>{title}</h1><p class="facts">{summary}</p></header>
{cards}
<footer>Similarities are cosines. For research; not for diagnosis.</footer>
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #fff; --raised: #f4f6f8; --line: #dce1e7;
  --accent: #0b62a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa6b5; --paper: #14181e; --raised: #1d232c;
  --line: #323b47; --accent: #6db5f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
article { display: flex; gap: 1.4rem; padding: 1.2rem 0; border-top: 1px solid var(--line); flex-wrap: wrap; }
.pictures { display: flex; gap: .6rem; flex: 0 0 auto; align-items: flex-start; }
.pictures img { width: 15rem; max-height: 15rem; object-fit: contain; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); }
.pictures img + img { width: 12rem; }
.none { width: 15rem; padding: 4rem 1rem; margin: 0; text-align: center; color: var(--soft); border-radius: 6px;
  background: var(--raised); font-size: .85rem; }
.text { flex: 1 1 18rem; min-width: 0; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
h2 b { display: inline-block; min-width: 1.7rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.score { display: flex; align-items: center; gap: .7rem; margin: .4rem 0; font-variant-numeric: tabular-nums; }
.bar { flex: 0 1 14rem; height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
.facts, footer { color: var(--soft); font-size: .88rem; margin: .2rem 0; }
.report { white-space: pre-line; margin: .4rem 0 0; overflow-wrap: anywhere; }
footer { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 1rem; }
@media print { article { break-inside: avoid; } }
"""
