# SPDX-License-Identifier: Apache-2.0
"""The file of a slide, before any library opens it: whether it is one, and whether it has changed."""

import errno
import hashlib
import os
import stat
from pathlib import Path

from .slide_info import SlideError

_FINGERPRINT_BYTES = 1 << 20


def check_regular_file(path: Path, slide_id: str) -> None:
    """Refuses what is not a readable file, before a library waits on it (a pipe) or reads it for ever (a device).

    Raises:
        SlideError: `not_a_file`, `truncated` (empty) or `unreadable`.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        denied = getattr(error, "errno", None) == errno.EACCES
        reason = "unreadable" if denied else "not_a_file"
        raise SlideError(slide_id, reason, f"{str(path)!r}: expected a slide file ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise SlideError(
            slide_id, "not_a_file", f"{path}: expected a regular file; for a DICOM series give one of its .dcm files"
        )
    if status.st_size == 0:
        raise SlideError(slide_id, "truncated", f"{path}: the file is empty; copy it again")
    if not os.access(path, os.R_OK):
        raise SlideError(slide_id, "unreadable", f"{path}: no permission to read the file")


def slide_fingerprint(path: str | Path) -> str:
    """Tells whether a slide file has changed, without reading all of it.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        `str`: SHA-256, in hexadecimal, of the size in bytes (as decimal text and a line feed), the first MiB and the
        last MiB.

    Raises:
        SlideError: `not_a_file` or `unreadable`.
    """
    path = Path(path)
    check_regular_file(path, path.stem)
    with path.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        digest = hashlib.sha256(f"{size}\n".encode())
        for start in (0, max(0, size - _FINGERPRINT_BYTES)):
            handle.seek(start)
            digest.update(handle.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()
