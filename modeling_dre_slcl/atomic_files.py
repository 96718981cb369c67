# SPDX-License-Identifier: Apache-2.0
"""Write files and directories so that a crash leaves either the old or the new version, never a mixture.

Everything is written under a temporary name beside its target, synced to disk, and renamed. Temporary names start
with `.tmp-`, so what a killed process left behind can be recognised and removed.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
_REPLACED_PREFIX = ".replaced-"
_CHUNK_BYTES = 1 << 20


def temporary_path(target: Path) -> Path:
    """Returns an unused temporary path in the folder of `target`, with the suffix of `target`."""
    return target.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}-{target.name}")


def sync_path(path: Path) -> None:
    """Flushes a file or the entries of a folder to the disk (`fsync`)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes every file below `folder`, then every folder, to the disk, and makes the files readable (mode 0644).

    safetensors creates its files with mode 0600 whatever the umask says, which locks colleagues out.
    """
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(0o644)
        sync_path(path)
    sync_path(folder)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to; on success it is synced and renamed to `target`, on error it is removed.

    Args:
        target (`str` or `Path`): the file that shall exist afterwards; an existing one is replaced.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        yield temporary
        temporary.chmod(0o644)
        sync_path(temporary)
        temporary.replace(target)
        sync_path(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; on success it is synced and takes the place of `target`.

    An existing `target` is moved aside, replaced, and only then deleted.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    temporary.mkdir()
    try:
        yield temporary
        commit_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def commit_folder(temporary: Path, target: Path) -> None:
    """Syncs `temporary` and renames it to `target`; an existing `target` is moved aside first and deleted last.

    No rename replaces a folder that holds files, so there is a moment with no `target`. A process killed in it leaves
    the old version under a name that `remove_temporary` knows, and puts back.
    """
    sync_tree(temporary)
    replaced = target.with_name(f"{_REPLACED_PREFIX}{target.name}")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.replace(replaced)
    temporary.replace(target)
    sync_path(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_temporary(folder: Path) -> int:
    """Removes what killed processes left directly in `folder`; returns how many entries were removed.

    A folder that was moved aside for its next version is put back if that version never came. Only call it while no
    other process writes there.
    """
    for replaced in folder.glob(f"{_REPLACED_PREFIX}*") if folder.is_dir() else []:
        target = replaced.with_name(replaced.name.removeprefix(_REPLACED_PREFIX))
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.replace(target)
    leftovers = list(folder.glob(f"{TEMPORARY_PREFIX}*")) if folder.is_dir() else []
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)


def write_text(target: str | Path, text: str) -> None:
    """Writes `text` to `target` atomically, as UTF-8."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: str | Path, value: Any) -> None:
    """Writes `value` as JSON to `target` atomically; keys keep their order, NaN and infinity are refused."""
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: if the file is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also text that is not UTF-8, numbers without end
        raise ValueError(f"{path}: expected a JSON file, but it could not be parsed ({error}).") from error


def sha256_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()
