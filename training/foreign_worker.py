# SPDX-License-Identifier: Apache-2.0
"""Reads files of other tools in a process of its own, which may die or hang without harm.

Damaged metadata can keep the HDF5 library in an endless loop that nothing within the process can end.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .hdf5_files import ForeignFileError
from .slide_worker import prepare_worker
from .worker_pool import WorkerCrash, run_in_workers


@dataclass(frozen=True)
class _Task:
    function: Callable[[Any], Any]
    argument: Any
    seconds: float


def read_foreign(
    function: Callable[[Any], Any], arguments: Sequence[Any], *, names: Sequence[str], seconds: float, isolated: bool
) -> Iterator[Any]:
    """Calls `function` on each argument, in order.

    Args:
        function (`Callable`): what reads a file; must be importable, and may raise `ForeignFileError`.
        arguments (`Sequence`): its arguments; they and the results must be picklable by `multiprocessing`.
        names (`Sequence[str]`): the file of each argument, for messages.
        seconds (`float`): how long one call may take.
        isolated (`bool`): whether another process reads, which takes about a second to start; without it nothing
            limits the time.

    Yields:
        What the function returns, or the `ForeignFileError` that it raised or that says why the process ended.
    """
    tasks = [_Task(function, argument, seconds) for argument in arguments]
    # The readers of these files need not load torch, which takes seconds.
    results = run_in_workers(_run, tasks, num_workers=int(isolated), initializer=prepare_worker)
    for index, result in results:
        if isinstance(result, WorkerCrash):
            result = ForeignFileError(
                "unreadable",
                f"{names[index]}: the process that read it died or took longer than {seconds:g} s (exit code "
                f"{result.exit_code}); make the file again",
            )
        yield result


def _run(task: _Task) -> Any:
    try:
        with time_limit(task.seconds):
            return task.function(task.argument)
    except ForeignFileError as error:
        return error


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends this process if the `with` block takes too long, even while it is deep in a library.

    Only where that harms nobody: in a process that `multiprocessing` started, whose parent sees that it died.
    Elsewhere, and on systems without such alarms, nothing limits the time.

    Args:
        seconds (`float`): by the clock.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if multiprocessing.parent_process() is None or not is_main_thread or not hasattr(signal, "setitimer"):
        yield
        return
    # The default action of the alarm is the end of the process.
    handler = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
