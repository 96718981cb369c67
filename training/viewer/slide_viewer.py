# SPDX-License-Identifier: Apache-2.0
"""The slides that a page shows, with a thread for the model and several for pixels. No HTTP here."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_dre_slcl.slide_info import SlideError

from .slide_matches import SlideMatches
from .slide_pyramid import SlidePyramid

logger = logging.getLogger(__name__)
_READING_THREADS = 4


@dataclass
class ShownSlide:
    """A slide that the page shows.

    Args:
        pyramid (`SlidePyramid`): its pixels.
        state (`str`): of its tile features: `"absent"`, `"running"`, `"ready"` or `"failed"`.
        message (`str`): why they could not be had.
    """

    pyramid: SlidePyramid
    state: str = "absent"
    message: str = ""


class SlideViewer:
    """What the page asks for. Nothing blocks the event loop: pixels are read by a few threads, the model runs in one.

    Args:
        slides (sequence of `tuple`): name, file and, if given, mpp of each slide. Those that are refused are left out.
        matches (`SlideMatches`, *optional*): the model; without it the page shows pixels only.

    Raises:
        ValueError: if no slide is left.
    """

    def __init__(self, slides: Sequence[tuple[str, Path, float | None]], matches: SlideMatches | None = None) -> None:
        self.matches = matches
        self.slides: list[ShownSlide] = []
        refused = []
        for slide_id, path, mpp in slides:
            try:
                self.slides.append(ShownSlide(SlidePyramid(path, slide_id, mpp)))
            except SlideError as error:
                logger.warning("Slide %s is not shown (%s): %s", slide_id, error.reason, error)
                refused.append(str(error))
        if not self.slides:
            raise ValueError(f"No slide to show: {refused[0] if refused else 'none was given'}.")
        self._readers = ThreadPoolExecutor(_READING_THREADS, thread_name_prefix="tile-reader")
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")

    def close(self) -> None:
        """Stops the threads and closes the slides."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._model.shutdown(wait=True, cancel_futures=True)
        for slide in self.slides:
            slide.pyramid.close()

    async def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function in a thread for pixels."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    async def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function in the thread of the model."""
        return await asyncio.get_running_loop().run_in_executor(self._model, function, *arguments)

    def describe(self) -> dict[str, Any]:
        """The slides and what can be asked about them, as JSON."""
        matches = self.matches
        return {
            "slides": [slide.pyramid.describe() for slide in self.slides],
            "has_model": matches is not None,
            "has_text": matches is not None and matches.has_text,
            "has_index": matches is not None and matches.index is not None,
        }

    def tiles_state(self, number: int) -> dict[str, str]:
        """Whether the tile features of a slide are there; starts to read or encode them if nobody has yet."""
        slide = self.slides[number]
        if self.matches is not None and slide.state == "absent":
            slide.state = "running"
            self._model.submit(self._load_tiles, slide)
        return {"state": slide.state, "message": slide.message}

    def _load_tiles(self, slide: ShownSlide) -> None:
        try:
            self._tiles(slide)
            slide.state = "ready"
        except (SlideError, ValueError, OSError, RuntimeError) as error:
            logger.warning("Slide %s is not encoded: %s", slide.pyramid.slide_id, error)
            # What the error says may name files of this machine, which are nobody's business on a public page.
            reason = f" ({error.reason})" if isinstance(error, SlideError) else ""
            slide.state, slide.message = "failed", f"This slide cannot be encoded{reason}; the server's log says why."

    def _tiles(self, slide: ShownSlide) -> Any:
        pyramid = slide.pyramid
        return self.matches.tiles(pyramid.slide_id, pyramid.path, pyramid.info.mpp)

    def tile_table(self, number: int) -> dict[str, Any]:
        """Places and codewords of a slide's tiles. In the model's thread."""
        return self.matches.describe(self._tiles(self.slides[number]))

    def match(self, number: int, text: str, against: str, mode: str) -> dict[str, Any]:
        """Where a text matches a slide, and which slides of the index match it. In the model's thread."""
        found = self.matches.match(self._tiles(self.slides[number]), text, against, mode)
        return {**found, "slides": self._with_numbers(self.matches.slides_of_text(text, 8))}

    def nearest_slides(self, number: int) -> list[dict[str, Any]]:
        """Slides of the index that are like this one. In the model's thread."""
        return self._with_numbers(self.matches.nearest_slides(self._tiles(self.slides[number]), 8))

    def _with_numbers(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds the number of those that the page shows, so that it can go there."""
        numbers = {slide.pyramid.slide_id: number for number, slide in enumerate(self.slides)}
        return [{**row, "number": numbers.get(row["slide_id"])} for row in found]
