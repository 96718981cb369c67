# SPDX-License-Identifier: Apache-2.0
"""Replaces names of slides and cases, which may name patients, by hashes (`--hash-ids`).

The hashes are keyed: whoever knows a hospital's accession numbers could otherwise hash all of them and compare. The
key, and which hash belongs to which slide, are kept in one private file that stays outside of the dataset. Reports and
label columns are left as they are.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modeling_dre_slcl.atomic_files import read_json, temporary_path

from .manifest import ManifestRow

_ID_DIGITS = 16
_ABOUT = "Private: says which slide of the dataset is which file. Keep it with the slides; never publish it."


def hide_ids(rows: Sequence[ManifestRow], key_file: Path, *, out_dir: Path) -> list[ManifestRow]:
    """Returns the slides under hashed names.

    Args:
        rows (`Sequence[ManifestRow]`): the slides.
        key_file (`Path`): the private file. If it exists its key is used, so that another build gives the same
            names; else it is made.
        out_dir (`Path`): the dataset, which must not hold the file.

    Returns:
        `list[ManifestRow]`: with `slide_id`, `case_id` and `stored_path` hashed.

    Raises:
        ValueError: if the file lies in the dataset, or is something else.
    """
    if key_file.resolve().is_relative_to(out_dir.resolve()):
        raise ValueError(f"{key_file}: the private file must lie outside of the dataset {out_dir}.")
    content = _open_key_file(key_file)
    key = bytes.fromhex(content["key"])
    hidden = []
    for row in rows:
        slide_id = _hash(key, "slide", row.slide_id)
        case_id = _hash(key, "case", row.case_id)
        hidden.append(replace(row, slide_id=slide_id, case_id=case_id, stored_path=f"{slide_id}{row.path.suffix}"))
        content["slides"][slide_id] = {"slide_id": row.slide_id, "case_id": row.case_id, "path": str(row.path)}
    _write_private(key_file, content)
    return hidden


def read_private_paths(key_file: Path) -> dict[str, Path]:
    """Returns the file of each slide of a dataset with hashed names, by `slide_id`.

    Raises:
        ValueError: if the file is not one that `hide_ids` wrote.
    """
    return {slide_id: Path(slide["path"]) for slide_id, slide in _read_key_file(key_file)["slides"].items()}


def _hash(key: bytes, kind: str, name: str) -> str:
    return hmac.new(key, f"{kind}:{name}".encode(), hashlib.sha256).hexdigest()[:_ID_DIGITS]


def _open_key_file(key_file: Path) -> dict[str, Any]:
    """Reads the private file, or makes one; of several processes that do so at once, all get the same."""
    if not key_file.exists():
        new = {"about": _ABOUT, "key": secrets.token_hex(32), "slides": {}}
        _write_private(key_file, new, replaces=False)
    return _read_key_file(key_file)


def _read_key_file(key_file: Path) -> dict[str, Any]:
    content = read_json(key_file)
    if not isinstance(content, dict) or not {"key", "slides"} <= set(content):
        raise ValueError(f"{key_file}: expected the private file of an earlier build with --hash-ids.")
    return content


def _write_private(key_file: Path, content: dict[str, Any], *, replaces: bool = True) -> None:
    """Writes a file that only its owner can read, at once or not at all."""
    key_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(key_file)
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(descriptor)
        if replaces:
            temporary.replace(key_file)
        else:
            try:
                os.link(temporary, key_file)
            except FileExistsError:
                return
    finally:
        temporary.unlink(missing_ok=True)
