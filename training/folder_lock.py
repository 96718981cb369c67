# SPDX-License-Identifier: Apache-2.0
"""Keeps two processes from writing to the same folder at the same time."""

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds a lock on an existing folder; the kernel releases it even if the process is killed, and no file is left.

    Network file systems that cannot lock folders are used without a lock, with a warning.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if descriptor is not None:
            _lock(descriptor, folder)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"{folder}: another process is writing here{_describe_holder(descriptor)}; wait for it or choose another."
        ) from error
    except OSError as error:
        logger.warning("%s: cannot be locked (%s); make sure that no other process writes here.", folder, error)


def _describe_holder(descriptor: int) -> str:
    """Names the process that holds the lock, where the system lists locks; one on another machine is not listed."""
    inode = f":{os.fstat(descriptor).st_ino}"
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    except OSError:
        return ""
    pids = [lock[4] for lock in locks if lock[1] == "FLOCK" and lock[5].endswith(inode)]
    return f" (process {pids[0]} on {platform.node()})" if pids else ""
