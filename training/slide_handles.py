# SPDX-License-Identifier: Apache-2.0
"""Open slides of one process: few at a time, opened where they are used, never shared with another process.

An OpenSlide handle holds locks and file positions, so one that was opened before a fork must not be touched in the
child, not even to close it. Handles are neither pickled (spawned workers) nor inherited (forked ones): each process
opens its own. One thread at a time.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from modeling_dre_slcl.slide_reader import SlideError, SlideReader, slide_fingerprint

# OpenSlide keeps up to 32 MiB of decoded pixels for each open slide.
MAX_OPEN_SLIDES = 8


class SlideHandles:
    """Readers of slides by name; the least recently used one is closed when too many are open.

    Args:
        slides_root (`str` or `Path`): folder that paths of slides start from.
        max_open (`int`, defaults to 8): open slides in one process.
    """

    def __init__(self, slides_root: str | Path, *, max_open: int = MAX_OPEN_SLIDES) -> None:
        self.slides_root, self.max_open = Path(slides_root), max_open
        self._start_empty()

    def _start_empty(self) -> None:
        self._process = os.getpid()
        self._readers: OrderedDict[str, SlideReader] = OrderedDict()
        self._known: set[str] = set()  # slides whose file was found to be the right one
        self._inherited: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"slides_root": self.slides_root, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def __len__(self) -> int:
        """Number of slides that this process holds open."""
        return len(self._readers) if self._process == os.getpid() else 0

    def open(self, slide_id: str, path: str, *, mpp: float, fingerprint: str | None = None) -> SlideReader:
        """Returns an open reader of a slide, which stays valid until `max_open` other slides were asked for.

        Args:
            slide_id (`str`): its name.
            path (`str`): its file, relative to `slides_root`.
            mpp (`float`): level-0 resolution that its tiles were placed with, um/px.
            fingerprint (`str`, *optional*): of the file that its tiles were placed on; checked once per process.

        Raises:
            SlideError: if the file cannot be opened, or is another one (`changed_during_run`).
        """
        if self._process != os.getpid():
            inherited = self._readers
            self._start_empty()
            # Kept, because letting go of a handle closes it, and its locks may be held by a thread of the parent.
            self._inherited = inherited
        if slide_id in self._readers:
            self._readers.move_to_end(slide_id)
            return self._readers[slide_id]
        file = self.slides_root / path
        if fingerprint is not None and slide_id not in self._known:
            _check_fingerprint(slide_id, file, fingerprint)
            self._known.add(slide_id)
        while len(self._readers) >= self.max_open:
            self._readers.popitem(last=False)[1].close()
        self._readers[slide_id] = SlideReader(file, slide_id=slide_id, mpp=mpp)
        return self._readers[slide_id]

    def drop(self, slide_id: str) -> None:
        """Closes a slide, so that the next use opens it afresh; a reader that has failed once stays failed."""
        if self._process == os.getpid() and slide_id in self._readers:
            self._readers.pop(slide_id).close()


def _check_fingerprint(slide_id: str, file: Path, expected: str) -> None:
    try:
        found = slide_fingerprint(file)
    except SlideError as error:
        raise SlideError(slide_id, error.reason, error.message) from error
    if found != expected:
        raise SlideError(
            slide_id,
            "changed_during_run",
            f"{file}: not the file that the dataset's tiles were placed on (its fingerprint differs); put that file "
            "back, or build the dataset again",
        )
