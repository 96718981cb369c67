# SPDX-License-Identifier: Apache-2.0
"""The other end of `worker_pool`: what runs in a worker process."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

_PROGRESS_SECONDS = 1.0


class _Channel:
    """Sends messages to the parent, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._last_progress = 0.0

    def send(self, kind: str, value: Any = None) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def send_progress(self) -> None:
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = now
            self.send("progress")


class _LogToParent(logging.Handler):
    """Hands warnings and errors over to the parent's log, where they keep their level and their name."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__(logging.WARNING)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send("log", (record.name, record.levelno, self.format(record)))


_channel: _Channel | None = None


def report_progress() -> None:
    """Says that the current task is getting on, which starts its deadline anew.

    Cheap enough for every tile: at most one message a second is sent. Outside of a worker it does nothing.
    """
    if _channel is not None:
        _channel.send_progress()


def serve_tasks(
    function: Callable[[Any], Any],
    initializer: Callable[[], None] | None,
    connection: Connection,
    output: Connection,
    memory_bytes: int | None,
) -> None:
    """Receives tasks and sends results until the parent closes the connection.

    Args:
        function (`Callable`): called with each task.
        initializer (`Callable`, *optional*): called once, before the first task.
        connection (`Connection`): tasks come from here; pairs (kind, value) go there.
        output (`Connection`): takes the place of the standard error.
        memory_bytes (`int`, *optional*): see `run_in_workers`.
    """
    global _channel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    if os.name == "posix":
        os.dup2(output.fileno(), 2)
    output.close()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if memory_bytes is not None and resource is not None:
        # Not RLIMIT_AS: address space that is only reserved (arenas, libraries) harms nobody.
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes if hard < 0 else min(memory_bytes, hard), hard))
    _channel = _Channel(connection)
    logging.getLogger().addHandler(_LogToParent(_channel))
    if initializer is not None:
        initializer()
    _channel.send("ready")
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            kind, value = "result", function(task)
        except Exception as error:  # noqa: BLE001 - handed over and raised in the parent
            kind, value = "error", error
        try:
            _channel.send(kind, value)
        except OSError:
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
