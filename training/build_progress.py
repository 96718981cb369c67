# SPDX-License-Identifier: Apache-2.0
"""Shows how far a build is: a bar on a terminal, a log line now and then elsewhere."""

import logging
import sys
import time
from datetime import timedelta
from types import TracebackType

from .slide_part import PartRecord

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


class BuildProgress:
    """Counts the slides that are done; a context manager.

    Args:
        num_slides (`int`): slides of the build.
        num_done (`int`): those of them that were done before.
        shows_bar (`bool`): whether a bar is shown if the output is a terminal or a notebook.
    """

    def __init__(self, num_slides: int, num_done: int, *, shows_bar: bool) -> None:
        self._num_slides = num_slides
        self._num_before = self._num_done = num_done
        self._num_tiles = 0
        self._num_refused = 0
        self._start = self._last_log = time.monotonic()
        self._bar = None
        if shows_bar and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm  # takes a tenth of a second to load

            self._bar = tqdm(total=num_slides, initial=num_done, unit="slide", smoothing=0.05)

    def __enter__(self) -> "BuildProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, record: PartRecord) -> None:
        """Counts one more slide, and says so."""
        self._num_done += 1
        self._num_tiles += record.num_tiles
        if record.status == "refused":
            self._num_refused += 1
            logger.warning("Slide %s is refused: %s: %s", record.slide_id, record.reason, record.message)
        seconds = max(time.monotonic() - self._start, 1e-9)
        if self._bar is not None:
            rate = f"{self._num_tiles / seconds:.1f} tiles/s, {self._num_refused} refused"
            self._bar.set_postfix_str(rate, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_log >= LOG_SECONDS or self._num_done == self._num_slides:
            self._last_log = time.monotonic()
            self._log(seconds)

    def _log(self, seconds: float) -> None:
        slides_per_second = (self._num_done - self._num_before) / seconds
        left = (self._num_slides - self._num_done) / slides_per_second
        logger.info(
            "%d of %d slides done (%d refused), %.2f slides/s, %.1f tiles/s, %s left.",
            self._num_done,
            self._num_slides,
            self._num_refused,
            slides_per_second,
            self._num_tiles / seconds,
            timedelta(seconds=round(left)),
        )
