# SPDX-License-Identifier: Apache-2.0
"""Runs a function on many tasks in worker processes that may die or hang without harm to the others.

`concurrent.futures` gives up on all pending tasks when one process dies, cannot say which task killed it, waits for
ever for one that hangs, and leaves its workers behind when the parent is killed. Reading damaged files in native
libraries needs the opposite.
"""

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, ClassVar

from .worker_process import serve_tasks

logger = logging.getLogger(__name__)

_STOP_SECONDS = 5.0
_KEPT_OUTPUT_BYTES = 4096
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class WorkerCrash:
    """What came back instead of a result: the process ended while it worked on the task.

    Attributes:
        exit_code (`int` or `None`): as in `multiprocessing`; minus the signal's number for a signal.
        last_words (`str`): the last line that the process wrote to its standard error, "" if there is none.
    """

    reason: ClassVar[str] = "reader_aborted"

    exit_code: int | None
    last_words: str = ""

    def __str__(self) -> str:
        text = f"the process that read the slide died ({_describe_exit(self.exit_code)})"
        return f"{text}: {self.last_words}" if self.last_words else text


@dataclass(frozen=True)
class WorkerTimeout(WorkerCrash):
    """What came back instead of a result: the process was killed because it made no progress.

    Attributes:
        seconds (`float`): how long it had been silent.
    """

    reason: ClassVar[str] = "timeout"

    seconds: float = 0.0

    def __str__(self) -> str:
        return f"reading the slide made no progress for {self.seconds:.0f} s and was stopped"


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    output: Connection  # what the process writes to its standard error
    is_ready: bool = False
    task: int | None = None
    silent_seconds: float = 0.0  # while this process listened
    last_output: bytes = b""


def run_in_workers(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    num_workers: int,
    initializer: Callable[[], None] | None = None,
    deadline_seconds: float | None = None,
    memory_bytes: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """Calls `function(task)` for every task and yields results as they come.

    Workers are fresh processes (spawned), so the function must be importable from a module other than the running
    script, and tasks and results must be picklable by `multiprocessing`. Workers end when the parent ends, however
    that happens. A worker that dies is replaced. Warnings that workers log are logged here; what they write to
    their standard error (native libraries do) is kept for a crash and otherwise logged at level DEBUG.

    Args:
        function (`Callable`): what to call; an exception it raises is raised here. If it may work for long, it calls
            `worker_process.report_progress` now and then.
        tasks (`Sequence`): its arguments.
        num_workers (`int`): processes; 0 runs everything in this process, without protection against crashes,
            hangs and greed.
        initializer (`Callable`, *optional*): called once in each worker, before it receives a task.
        deadline_seconds (`float`, *optional*): a worker that neither ends its task nor reports progress for so long
            is killed. Time in which the caller does not ask for the next result does not count.
        memory_bytes (`int`, *optional*): most memory that a worker may ask for; beyond it allocations fail
            (`MemoryError`, or an end of the process within native libraries). Only where the system has `RLIMIT_DATA`.

    Yields:
        `tuple[int, Any]`: index of the task, and its result, a `WorkerCrash` or a `WorkerTimeout`.

    Raises:
        RuntimeError: if a worker ends before it could start on a task, so that others would too.
    """
    if num_workers == 0:
        for index, task in enumerate(tasks):
            yield index, function(task)
        return
    waiting = list(range(len(tasks)))[::-1]
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task is not None for worker in workers):
            while waiting and len(workers) < num_workers:
                workers.append(_start_worker(function, initializer, memory_bytes))
            for worker in workers:
                if worker.is_ready and worker.task is None and waiting:
                    index = waiting.pop()
                    _send_task(worker, index, tasks[index])
            yield from _collect_results(workers, deadline_seconds)
    finally:
        _stop_workers(workers)


class WorkerPool:
    """Workers that are handed tasks one by one, by a caller who decides what is to be done next.

    A context manager, to be used by one thread.

    Args:
        function (`Callable`), num_workers (`int`), initializer (`Callable`), deadline_seconds (`float`),
        memory_bytes (`int`): as in `run_in_workers`; with 0 workers, tasks are done when they are sent.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        num_workers: int,
        initializer: Callable[[], None] | None = None,
        deadline_seconds: float | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        self._function, self._initializer, self._memory_bytes = function, initializer, memory_bytes
        self._num_workers, self._deadline_seconds = num_workers, deadline_seconds
        self._workers: list[_Worker] = []
        self._done_here: list[tuple[int, Any]] = []

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: Any) -> None:
        _stop_workers(self._workers)

    def idle(self) -> list[int]:
        """Returns the names (numbers) of the workers that wait for a task; those that died are replaced."""
        if self._num_workers == 0:
            return [] if self._done_here else [0]
        while len(self._workers) < self._num_workers:
            self._workers.append(_start_worker(self._function, self._initializer, self._memory_bytes))
        return [worker.process.pid for worker in self._workers if worker.is_ready and worker.task is None]

    def send(self, worker: int, index: int, task: Any) -> None:
        """Gives a task, under a number of the caller's, to an idle worker."""
        if self._num_workers == 0:
            self._done_here.append((index, self._function(task)))
            return
        [found] = [one for one in self._workers if one.process.pid == worker]
        _send_task(found, index, task)

    def collect(self, wake: Connection) -> Iterator[tuple[int, Any]]:
        """Waits until a worker says something or is late, or `wake` can be read.

        Yields:
            `tuple[int, Any]`: number of a task, and its result, a `WorkerCrash` or a `WorkerTimeout`.
        """
        if self._num_workers:
            yield from _collect_results(self._workers, self._deadline_seconds, wake)
            return
        if not self._done_here:
            wait([wake])
        while self._done_here:
            yield self._done_here.pop()


def _start_worker(
    function: Callable[[Any], Any], initializer: Callable[[], None] | None, memory_bytes: int | None
) -> _Worker:
    context = multiprocessing.get_context("spawn")  # forking a process with threads (torch, OpenCV) may deadlock
    here, there = context.Pipe()
    output_here, output_there = context.Pipe(duplex=False)
    arguments = (function, initializer, there, output_there, memory_bytes)
    process = context.Process(target=serve_tasks, args=arguments, daemon=True)
    with _without_main_module():
        process.start()
    there.close()  # so that the end of the worker is seen as the end of the pipe
    output_there.close()
    return _Worker(process, here, output_here)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Hides the running script, which `multiprocessing` would otherwise import in each worker.

    That loads whatever the script imports (torch), and runs a script without `if __name__ == "__main__"` once more.
    """
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module


def _send_task(worker: _Worker, index: int, task: Any) -> None:
    worker.task, worker.silent_seconds, worker.last_output = index, 0.0, b""
    try:
        worker.connection.send(task)
    except BrokenPipeError:
        logger.debug("Worker %s ended before it got task %d.", worker.process.pid, index)


def _collect_results(
    workers: list[_Worker], deadline_seconds: float | None, wake: Connection | None = None
) -> Iterator[tuple[int, Any]]:
    """Waits until a worker says something or is late, or `wake` is ready; yields what came.

    Workers that ended are removed.
    """
    busy = [worker for worker in workers if worker.task is not None or not worker.is_ready]
    others = [] if wake is None else [wake]
    start = time.monotonic()
    ready = set(wait(_connections(busy) + others, _seconds_left(busy, deadline_seconds)))
    waited = time.monotonic() - start
    for worker in busy:
        worker.silent_seconds += waited
        if worker.output in ready:
            _read_output(worker)
        if worker.connection in ready:
            worker.silent_seconds = 0.0
            yield from _receive(worker, workers)
        elif worker.is_ready and deadline_seconds is not None and worker.silent_seconds >= deadline_seconds:
            yield worker.task, WorkerTimeout(*_end_worker(worker, workers), seconds=worker.silent_seconds)


def _connections(workers: Sequence[_Worker]) -> list[Connection]:
    return [end for worker in workers for end in (worker.connection, worker.output) if not end.closed]


def _seconds_left(workers: Sequence[_Worker], deadline_seconds: float | None) -> float | None:
    """Time until the first of the workers is late; `None` if none can be."""
    started = [worker.silent_seconds for worker in workers if worker.is_ready]
    return None if deadline_seconds is None or not started else max(0.0, deadline_seconds - max(started))


def _read_output(worker: _Worker) -> None:
    """Takes what a worker wrote to its standard error out of the pipe, lest it blocks; only the end is kept."""
    content = os.read(worker.output.fileno(), _READ_BYTES)
    if not content:
        worker.output.close()
        return
    worker.last_output = (worker.last_output + content)[-_KEPT_OUTPUT_BYTES:]
    logger.debug("Worker %s: %r", worker.process.pid, content[-_KEPT_OUTPUT_BYTES:])


def _receive(worker: _Worker, workers: list[_Worker]) -> Iterator[tuple[int, Any]]:
    """Handles one message: ready, progress, log, result, error, or the end of the process."""
    try:
        kind, value = worker.connection.recv()
    except (EOFError, OSError):
        is_ready, index = worker.is_ready, worker.task
        crash = WorkerCrash(*_end_worker(worker, workers))
        if not is_ready:
            raise RuntimeError(
                f"A worker process could not start ({_describe_exit(crash.exit_code)}): "
                f"{crash.last_words or 'its error is printed above'}"
            ) from None
        yield index, crash
        return
    if kind == "ready":
        worker.is_ready = True
    elif kind == "log":
        logging.getLogger(value[0]).log(value[1], "%s", value[2])
    elif kind == "error":
        raise value
    elif kind == "result":
        index, worker.task = worker.task, None
        yield index, value


def _end_worker(worker: _Worker, workers: list[_Worker]) -> tuple[int | None, str]:
    """Ends a process that died or hangs and forgets it; returns its exit code and its last words."""
    worker.process.kill()
    worker.process.join(_STOP_SECONDS)  # a process that waits for a dead network file system can not be killed
    while not worker.output.closed and wait([worker.output], 0):
        _read_output(worker)
    worker.connection.close()
    worker.output.close()
    workers.remove(worker)
    lines = worker.last_output.decode("utf-8", errors="replace").split("\n")
    words = next((line for line in reversed(lines) if line.strip()), "")
    return worker.process.exitcode, "".join(char for char in words.strip() if char.isprintable())


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0 and -exit_code in set(signal.Signals):
        return f"exit code {exit_code}, {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _stop_workers(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        worker.output.close()
        if worker.task is not None or not worker.is_ready:
            worker.process.terminate()
    for worker in workers:
        worker.process.join(_STOP_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(_STOP_SECONDS)
