# SPDX-License-Identifier: Apache-2.0
"""Runs a function on many tasks in worker processes that may die without harm to the others.

`concurrent.futures` gives up on all pending tasks when one process dies, cannot say which task killed it, and leaves
its workers behind when the parent is killed. Reading damaged files in native libraries needs the opposite.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class WorkerCrash:
    """What came back instead of a result: the process ended while it worked on the task."""

    exit_code: int | None


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    is_ready: bool = False
    task: int | None = None


def run_in_workers(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    num_workers: int,
    initializer: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Calls `function(task)` for every task and yields results as they come.

    Workers are fresh processes (spawned), so the function must be importable from a module other than the running
    script, and tasks and results must be picklable by `multiprocessing`. Workers end when the parent ends, however
    that happens. A worker that dies is replaced.

    Args:
        function (`Callable`): what to call; an exception it raises is raised here.
        tasks (`Sequence`): its arguments.
        num_workers (`int`): processes; 0 runs everything in this process, without protection against crashes.
        initializer (`Callable`, *optional*): called once in each worker, before it receives a task.

    Yields:
        `tuple[int, Any]`: index of the task, and its result or a `WorkerCrash`.

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
                workers.append(_start_worker(function, initializer))
            for worker in workers:
                if worker.is_ready and worker.task is None and waiting:
                    _send_task(worker, waiting.pop(), tasks)
            yield from _collect_results(workers)
    finally:
        _stop_workers(workers)


def _start_worker(function: Callable[[Any], Any], initializer: Callable[[], None] | None) -> _Worker:
    context = multiprocessing.get_context("spawn")  # forking a process with threads (torch, OpenCV) may deadlock
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(function, initializer, there), daemon=True)
    with _without_main_module():
        process.start()
    there.close()  # so that the end of the worker is seen as the end of the pipe
    return _Worker(process, here)


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


def _send_task(worker: _Worker, index: int, tasks: Sequence[Any]) -> None:
    worker.task = index
    try:
        worker.connection.send(tasks[index])
    except BrokenPipeError:
        logger.debug("Worker %s ended before it got task %d.", worker.process.pid, index)


def _collect_results(workers: list[_Worker]) -> Iterator[tuple[int, Any]]:
    """Waits for at least one worker that starts or works; yields what came and removes workers that died."""
    busy = {worker.connection: worker for worker in workers if worker.task is not None or not worker.is_ready}
    for connection in wait(list(busy)):
        worker = busy[connection]
        if not worker.is_ready:
            _receive_start(worker)
            continue
        index, worker.task = worker.task, None
        try:
            succeeded, value = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            workers.remove(worker)
            worker.connection.close()
            yield index, WorkerCrash(worker.process.exitcode)
            continue
        if not succeeded:
            raise value
        yield index, value


def _receive_start(worker: _Worker) -> None:
    try:
        worker.connection.recv()
    except (EOFError, OSError) as error:
        worker.process.join()
        raise RuntimeError(
            f"A worker process could not start (exit code {worker.process.exitcode}); its error is printed above."
        ) from error
    worker.is_ready = True


def _stop_workers(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        if worker.task is not None or not worker.is_ready:
            worker.process.terminate()
    for worker in workers:
        worker.process.join(_STOP_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(function: Callable[[Any], Any], initializer: Callable[[], None] | None, connection: Connection) -> None:
    """The worker's loop: receives a task, sends (whether it succeeded, result or exception)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer()
    connection.send("ready")
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, function(task)
        except Exception as error:  # noqa: BLE001 - handed over and raised in the parent
            answer = False, error
        try:
            connection.send(answer)
        except OSError:
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
