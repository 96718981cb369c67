# SPDX-License-Identifier: Apache-2.0
"""Tells of everything that a process does to files below a folder, before it does it.

Python says so itself by its audit events; only `fsync` and the writer of safetensors, which is no Python, are wrapped.
"""

import os
import stat
import sys
from pathlib import Path

import safetensors.torch

from . import training_runs as runs

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NAMES = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir", "os.link": "link"}
_NAMES |= {"os.chmod": "chmod", "os.symlink": "symlink", "os.truncate": "write"}


def watch(folder, tell):
    """Calls `tell(what, path, target)` before each change below a folder, for the rest of this process.

    What: mkdir, rename, unlink, rmdir, link, symlink, chmod, create (a file is opened for writing), written (by
    safetensors, after it), fsync. `target` is the new name of renames and links, else `None`.
    """
    busy, folder = [], os.path.realpath(folder)

    def forward(what, path, target=None):
        if not busy and (path + os.sep).startswith(folder + os.sep):
            busy.append(what)
            try:
                tell(what, Path(path), target and Path(target))
            finally:
                busy.clear()

    def hook(event, arguments):
        if busy:
            return
        if event == "open" and not isinstance(arguments[0], int) and arguments[2] & _WRITES:
            forward("create", _resolve(arguments[0]))
        elif event in ("os.rename", "os.link"):
            forward(_NAMES[event], _resolve(arguments[0], arguments[2]), _resolve(arguments[1], arguments[3]))
        elif event == "os.symlink":
            forward("symlink", _resolve(arguments[1], arguments[2]), _resolve(arguments[0]))
        elif event in _NAMES:
            forward(_NAMES[event], _resolve(arguments[0], arguments[-1]))

    fsync, save_file = os.fsync, safetensors.torch.save_file

    def tell_and_fsync(descriptor):
        forward("fsync", str(_open_path(descriptor)))
        fsync(descriptor)

    def save_and_tell(tensors, filename, *arguments, **options):
        forward("create", _resolve(filename))
        save_file(tensors, filename, *arguments, **options)
        forward("written", _resolve(filename))

    os.fsync = tell_and_fsync
    runs.replace_everywhere(save_file, save_and_tell)
    sys.addaudithook(hook)


def is_file(path):
    return path.exists() and stat.S_ISREG(path.lstat().st_mode)


def _resolve(path, folder=-1):
    """The path as it is on the disk, with links in its folder resolved but not itself."""
    path = Path(os.fsdecode(path))
    if folder not in (-1, None) and not path.is_absolute():
        path = _open_path(folder) / path
    return str(path.parent.resolve() / path.name)


def _open_path(descriptor):
    return Path(f"/proc/self/fd/{descriptor}").readlink()
