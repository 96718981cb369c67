# SPDX-License-Identifier: Apache-2.0
"""One stream of tiles across many slides: batches in shared memory, filled by processes that may die.

A batch takes tiles of several slides, so that none is small because a slide has ended; slides are opened ahead, so
that none is waited for. Readers write straight into the batch that the encoder will see. All memory is taken once.
"""

import contextlib
import logging
import math
import multiprocessing
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from modeling_dre_slcl.slide_info import SlideError
from modeling_dre_slcl.tile_grid import TileGridConfig

from .build_tiling import DEADLINE_SECONDS, WORKER_MEMORY_BYTES
from .embed_reader import OpenedSlide, OpenTask, ReadTask, SlideJob, pixel_view
from .embed_worker import ReaderStart, prepare_reader
from .worker_pool import WorkerCrash, WorkerPool

logger = logging.getLogger(__name__)

# One batch is encoded, one waits for it, and two are being filled.
NUM_BATCHES = 4
# Neighbouring tiles share compressed blocks of the file, so a reader takes a run of them.
_MAX_TILES_PER_TASK = 16


@dataclass
class TileBatch:
    """Pixels of tiles, of one slide or several. The memory is used again once the batch is released.

    Attributes:
        number (`int`): which of the buffers it lies in.
        pixels (`np.ndarray` of shape `(batch_size, H, W, 3)`, uint8): RGB; places that no part covers hold anything.
        parts (`list` of `(int, slice, slice)`): position of a slide among the jobs, the places of its tiles in the
            batch, and in the order of tiles that was asked for.
    """

    number: int
    pixels: np.ndarray
    parts: list[tuple[int, slice, slice]] = field(default_factory=list)
    num_tiles: int = 0
    _outstanding: int = 0
    _is_closed: bool = False


@dataclass
class _OpenSlide:
    """An open slide: its tiles in the order that was asked for, and how many may be read so far."""

    opened: OpenedSlide
    order: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    limit: int = 0
    next: int = 0


@dataclass(frozen=True)
class _Run:
    """Tiles of one slide that are read together."""

    slide: int
    batch: TileBatch
    task: ReadTask


Event = tuple[int, OpenedSlide] | tuple[int, SlideError] | TileBatch


class TileStream:
    """Reads the tiles of slides; a context manager, and an iterator of what happens.

    It yields `(slide, OpenedSlide)` when a slide is open (answer with `request`), `(slide, SlideError)` when one is
    refused, and `TileBatch` (answer with `release`). It ends when every slide was refused or `finish`ed.

    Args:
        jobs (`Sequence[SlideJob]`): the slides, with different ids.
        grid_config (`TileGridConfig`): geometry of the tiles.
        tissue (`str`): how tissue is found.
        batch_size (`int`): tiles in a batch.
        num_workers (`int`): reader processes; 0 reads in a thread of this one, without protection from bad files.
        deadline_seconds (`float`, *optional*): a reader that reads no tile for so long is killed.
        memory_bytes (`int`, *optional*): most memory of a reader.

    Attributes:
        seconds (`Counter`): what `open`, `mask` and `read` took, summed over the readers.
    """

    def __init__(
        self,
        jobs: Sequence[SlideJob],
        grid_config: TileGridConfig,
        *,
        tissue: str,
        batch_size: int,
        num_workers: int,
        deadline_seconds: float = DEADLINE_SECONDS,
        memory_bytes: int = WORKER_MEMORY_BYTES,
    ) -> None:
        self.seconds: Counter[str] = Counter()
        self._jobs, self._batch_size, self._num_workers = list(jobs), batch_size, num_workers
        side = grid_config.tile_size_px
        # Named nowhere, so that not even a kill leaves it behind.
        buffer = multiprocessing.get_context("spawn").RawArray("B", NUM_BATCHES * batch_size * side * side * 3)
        self._pixels = pixel_view(buffer, side).reshape(NUM_BATCHES, batch_size, side, side, 3)
        self._run_length = max(1, min(_MAX_TILES_PER_TASK, math.ceil(batch_size / max(1, num_workers))))
        self._pool = WorkerPool(
            ReaderStart(buffer, asdict(grid_config), tissue),
            num_workers=num_workers,
            initializer=prepare_reader if num_workers else None,
            deadline_seconds=deadline_seconds,
            memory_bytes=memory_bytes,
        )
        self._events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._wake_here, self._wake_there = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._serve, name="tile-stream", daemon=True)
        self._unopened: deque[int] = deque(range(len(self._jobs)))
        self._opening: set[int] = set()
        self._slides: dict[int, _OpenSlide] = {}
        self._finished: set[int] = set()
        self._free = list(range(NUM_BATCHES))
        self._filling: TileBatch | None = None
        self._runs: deque[_Run] = deque()
        self._sent: dict[int, _Run | int] = {}
        self._last_of: dict[int, int] = {}  # the slide that a worker was last at
        self._num_sent = 0
        self._stops = False

    def __enter__(self) -> "TileStream":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._command("stop")
        self._thread.join()
        self._wake_here.close()
        self._wake_there.close()

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next_event()) is not None:
            yield event

    def next_event(self, *, waits: bool = True) -> Event | None:
        """Returns what happened next; `None` at the end, or without `waits` if there is nothing yet.

        Raises:
            Exception: whatever went wrong in the thread that hands out tasks.
        """
        try:
            event = self._events.get(block=waits)
        except queue.Empty:
            return None
        if isinstance(event, BaseException):
            raise event
        return event

    def request(self, slide: int, order: np.ndarray, limit: int) -> None:
        """Asks for tiles of an open slide.

        Args:
            slide (`int`): its position among the jobs.
            order (`np.ndarray` of shape `(n,)`, int64): indices of its tiles; those that were asked for before
                stay.
            limit (`int`): how many of them are to be read, those of earlier calls included.
        """
        self._command("request", slide, order, limit)

    def finish(self, slide: int) -> None:
        """Says that nothing more is wanted of a slide."""
        self._command("finish", slide)

    def release(self, batch: TileBatch) -> None:
        """Gives the memory of a batch back."""
        self._command("release", batch.number)

    def _command(self, *command: Any) -> None:
        self._commands.put(command)
        with contextlib.suppress(OSError):  # the thread has ended
            self._wake_there.send_bytes(b"\0")

    # What follows runs in the thread.

    def _serve(self) -> None:
        try:
            with self._pool:
                while not self._stops and len(self._finished) < len(self._jobs):
                    self._fill_batches()
                    self._send_tasks()
                    for index, result in self._pool.collect(self._wake_here):
                        self._take_result(self._sent.pop(index), result)
                    self._take_commands()
            self._events.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the stream is read
            self._events.put(error)

    def _take_commands(self) -> None:
        while self._wake_here.poll():
            self._wake_here.recv_bytes()
            kind, *values = self._commands.get()
            if kind == "stop":
                self._stops = True
            elif kind == "release":
                self._free.append(values[0])
            elif kind == "finish":
                self._forget(values[0])
            elif values[0] in self._slides:
                slide = self._slides[values[0]]
                slide.order, slide.limit = values[1], values[2]

    def _forget(self, slide: int) -> None:
        self._finished.add(slide)
        self._slides.pop(slide, None)
        self._opening.discard(slide)
        dropped = [run for run in self._runs if run.slide == slide]
        self._runs = deque(run for run in self._runs if run.slide != slide)
        for run in dropped:
            self._take_run(run)

    def _fill_batches(self) -> None:
        """Gives tiles places in batches, slide by slide."""
        waiting = [index for index, slide in self._slides.items() if slide.next < slide.limit]
        for index in waiting:
            slide = self._slides[index]
            while slide.next < slide.limit and self._has_room():
                self._plan_run(index, slide)
        # Nothing else will fill it: no slide is about to be opened, and those that are open wait for their tiles.
        is_last = not self._opening and not self._wants_to_open()
        if self._filling is not None and is_last and all(0 < s.limit <= s.next for s in self._slides.values()):
            self._close_batch()

    def _has_room(self) -> bool:
        if self._filling is None and self._free:
            number = self._free.pop()
            self._filling = TileBatch(number, self._pixels[number])
        return self._filling is not None

    def _plan_run(self, index: int, slide: _OpenSlide) -> None:
        batch = self._filling
        first = batch.num_tiles
        count = min(self._run_length, slide.limit - slide.next, self._batch_size - first)
        places, wanted = slice(first, first + count), slice(slide.next, slide.next + count)
        tiles = slide.opened.tile_xy[slide.order[wanted]]
        job = replace(self._jobs[index], mpp=slide.opened.mpp)
        task = ReadTask(job, slide.opened.fingerprint, tiles, batch.number * self._batch_size + first)
        self._runs.append(_Run(index, batch, task))
        if batch.parts and batch.parts[-1][0] == index and batch.parts[-1][2].stop == wanted.start:
            _, earlier_places, earlier = batch.parts.pop()  # one part of a slide, not one for each run
            places, wanted = slice(earlier_places.start, places.stop), slice(earlier.start, wanted.stop)
        batch.parts.append((index, places, wanted))
        batch.num_tiles += count
        batch._outstanding += 1
        slide.next += count
        if batch.num_tiles == self._batch_size:
            self._close_batch()

    def _close_batch(self) -> None:
        batch, self._filling = self._filling, None
        batch._is_closed = True
        self._hand_out(batch)

    def _hand_out(self, batch: TileBatch) -> None:
        if batch._is_closed and batch._outstanding == 0:
            self._events.put(batch)

    def _send_tasks(self) -> None:
        for worker in self._pool.idle():
            if self._wants_to_open():
                slide = self._unopened.popleft()
                self._opening.add(slide)
                self._send(worker, slide, slide, OpenTask(self._jobs[slide]))
            elif (run := self._next_run(worker)) is not None:
                self._send(worker, run.slide, run, run.task)

    def _wants_to_open(self) -> bool:
        """Whether a slide is to be opened before more tiles are read: enough of them are to be known ahead."""
        if not self._unopened:
            return False
        known = sum(slide.limit - slide.next for slide in self._slides.values())
        # Slides whose grid is known but of which nothing was asked yet are on their way.
        unanswered = sum(slide.limit == 0 for slide in self._slides.values()) + len(self._opening)
        if known >= NUM_BATCHES * self._batch_size or len(self._slides) > 8 * max(1, self._num_workers) + 8:
            return False
        return not self._runs or unanswered < max(1, self._num_workers // 2)

    def _next_run(self, worker: int) -> _Run | None:
        """Takes the next run: of the slide that the worker has open, if one of the next few batches' is."""
        own = self._last_of.get(worker)
        at_others = set(self._last_of.values()) - {own}
        for wanted in (lambda run: run.slide == own, lambda run: run.slide not in at_others, lambda run: True):
            for place, run in enumerate(self._runs):
                # Only within the first batch that waits: the encoder needs it next.
                if run.batch is self._runs[0].batch and wanted(run):
                    del self._runs[place]
                    return run
        return None

    def _send(self, worker: int, slide: int, what: _Run | int, task: OpenTask | ReadTask) -> None:
        self._num_sent += 1
        self._sent[self._num_sent] = what
        self._last_of[worker] = slide
        self._pool.send(worker, self._num_sent, task)

    def _take_result(self, what: _Run | int, result: Any) -> None:
        slide = what if isinstance(what, int) else what.slide
        if isinstance(result, WorkerCrash):
            job = self._jobs[slide]
            result = SlideError(job.slide_id, result.reason, f"{job.path}: {result}")
        if isinstance(result, SlideError) and slide not in self._finished:
            self._forget(slide)
            self._events.put((slide, result))
        if isinstance(what, _Run):
            if isinstance(result, float):
                self.seconds["read"] += result
            self._take_run(what)
        elif isinstance(result, OpenedSlide):
            self._opening.discard(slide)
            self.seconds.update(open=result.open_seconds, mask=result.mask_seconds)
            self._slides[slide] = _OpenSlide(result)
            self._events.put((slide, result))

    def _take_run(self, run: _Run) -> None:
        run.batch._outstanding -= 1
        self._hand_out(run.batch)


def timed(seconds: "Counter[str]", name: str) -> Any:
    """Adds the time that a `with` block takes to `seconds[name]`."""
    return _Timed(seconds, name)


class _Timed:
    def __init__(self, seconds: "Counter[str]", name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self._seconds[self._name] += time.monotonic() - self._start


__all__ = ["NUM_BATCHES", "Event", "TileBatch", "TileStream", "timed"]
