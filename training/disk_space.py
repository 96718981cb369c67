# SPDX-License-Identifier: Apache-2.0
"""Says in one line that a disk is full: where, how much is needed, how much is free."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class DiskFullError(OSError):
    """No space left on the device or in the quota; the message names the folder and the bytes."""


def is_disk_full(error: Exception) -> bool:
    """Whether an error says that there is no space left; that of safetensors says so in words only."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in _FULL)
    return isinstance(error, OSError) and error.errno in _FULL


@contextmanager
def disk_full_reported(folder: Path, last_state: Path) -> Iterator[None]:
    """Turns the errors of a full disk into one that names the folder and what is needed.

    Args:
        folder (`Path`): where the space is missing.
        last_state (`Path`): folder of what was saved so far; the largest folder in it tells what is needed.

    Raises:
        DiskFullError: if the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        sizes = [sum(file.stat().st_size for file in saved.iterdir()) for saved in last_state.glob("step-*")]
        raise disk_full_error(folder, max(sizes, default=0)) from error


def disk_full_error(folder: Path, needed_bytes: int) -> DiskFullError:
    """Returns an error for people.

    Args:
        folder (`Path`): where the space is missing.
        needed_bytes (`int`): about how many more bytes are needed, 0 if that is not known.
    """
    needed = (
        f"about {needed_bytes} more bytes are needed" if needed_bytes else "it is not known yet how much is needed"
    )
    free = shutil.disk_usage(folder).free
    return DiskFullError(
        f"{folder}: No space left on the device or in your quota: {needed}, {free} bytes are free. Make room and give "
        "the same command again: what is done is kept."
    )
