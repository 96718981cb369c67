# SPDX-License-Identifier: Apache-2.0
"""Says in one line that a disk is full: where, how much is needed, how much is free."""

import errno
import shutil
from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class DiskFullError(OSError):
    """No space left on the device or in the quota; the message names the folder and the bytes."""


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no space left."""
    return error.errno in _FULL


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
