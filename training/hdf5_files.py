# SPDX-License-Identifier: Apache-2.0
"""Reads HDF5 files that other tools wrote, without trust: no link leads out of a file, no small file fills the memory.

No format is known here; see `coordinate_files` and `foreign_features`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    import h5py
except ImportError:
    h5py = None

if TYPE_CHECKING:
    from h5py import Dataset, File, Group

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_TILES = 10_000_000
_MAX_ARRAY_BYTES = 16 << 30
_MAX_CHUNK_BYTES = 256 << 20
# An array that is this many times larger than what is stored of it holds no measurements.
_MAX_EXPANSION = 100
_ALWAYS_FINE_BYTES = 64 << 20


class ForeignFileError(ValueError):
    """What is wrong with a file of another tool.

    Args:
        reason (`str`): a reason code of `SlideError`.
        message (`str`): what was found, what was expected and how to mend it; names the file, not its folder.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, so that it can be sent between processes
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def damage_reported(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a library raises over the bytes of a foreign file into a `ForeignFileError`.

    Libraries promise no list of errors for damaged files: changed bytes brought up a dozen kinds.

    Args:
        path (`Path`): the file.
        what (`str`): what is read from it, for the message.

    Raises:
        ForeignFileError: `unreadable`, or what was raised as such within.
    """
    try:
        yield
    except ForeignFileError:
        raise
    except Exception as error:
        raise ForeignFileError(
            "unreadable",
            f"{path.name}: {what} cannot be read ({type(error).__name__}: {_first_line(error)}); make it again",
        ) from error


def require_h5py() -> None:
    """Checks that h5py is there.

    Raises:
        ImportError: with the command that installs it.
    """
    if h5py is None:
        raise ImportError("Files of TRIDENT, CLAM, AtlasPatch and STAMP need h5py: pip install 'dre-slcl[interop]'")


@contextmanager
def open_hdf5(path: Path) -> Iterator["File"]:
    """Opens an HDF5 file for reading; in the `with` block, damage is reported as `ForeignFileError`.

    Args:
        path (`Path`): the file.

    Yields:
        `h5py.File`: the open file.

    Raises:
        ForeignFileError: `not_a_file`, `truncated` or `unreadable`.
        ImportError: if h5py is not installed.
    """
    require_h5py()
    if not path.is_file():
        raise ForeignFileError("not_a_file", f"{path.name}: there is no such file")
    try:
        # Shares of clusters often cannot lock; what is read here is finished.
        file = h5py.File(path, "r", locking="best-effort")
    except (OSError, RuntimeError, ValueError) as error:
        is_cut = "truncated" in str(error) or path.stat().st_size == 0
        raise ForeignFileError(
            "truncated" if is_cut else "unreadable",
            f"{path.name}: cannot be opened as HDF5 ({_first_line(error)}); copy it again or make it again",
        ) from error
    with file, damage_reported(path, "the content"):
        yield file


def find_dataset(group: "Group", name: str, path: Path) -> "Dataset | None":
    """Returns a dataset of a file or group, `None` if there is none of that name.

    Raises:
        ForeignFileError: `unsupported` if the name is a link or its data lie in another file, `unreadable` if it
            cannot be opened.
    """
    item = _find(group, name, path)
    if not isinstance(item, h5py.Dataset):
        return None
    with damage_reported(path, f"`{name}`"):
        if item.is_virtual or item.external:
            raise ForeignFileError(
                "unsupported", f"{path.name}: the data of `{name}` lie in another file; copy them in"
            )
    return item


def find_group(group: "Group", name: str, path: Path) -> "Group | None":
    """Returns a group of a file, `None` if there is none of that name; raises as `find_dataset` does."""
    item = _find(group, name, path)
    return item if isinstance(item, h5py.Group) else None


def _find(group: "Group", name: str, path: Path) -> Any:
    with damage_reported(path, f"`{name}`"):
        link = group.get(name, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise ForeignFileError("unsupported", f"{path.name}: `{name}` is a link; copy the data into the file")
        return group[name]


def read_array(dataset: "Dataset", path: Path) -> np.ndarray:
    """Reads a whole dataset of numbers.

    Args:
        dataset (`h5py.Dataset`): what to read.
        path (`Path`): its file, for messages.

    Returns:
        `np.ndarray`: integers or floating-point numbers.

    Raises:
        ForeignFileError: `unreadable` if it holds no numbers or is damaged, `too_large` if it asks for more memory
            than measurements need.
    """
    name = dataset.name.lstrip("/")
    with damage_reported(path, f"`{name}`"):
        if dataset.shape is None or dataset.dtype.kind not in "iuf":
            raise ForeignFileError("unreadable", f"{path.name}: `{name}` holds {dataset.dtype}, expected numbers")
        chunk_bytes = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
        check_expansion(path, name, num_bytes=dataset.nbytes, stored_bytes=dataset.id.get_storage_size())
        if chunk_bytes > _MAX_CHUNK_BYTES:
            raise ForeignFileError("too_large", f"{path.name}: `{name}` is stored in chunks of {chunk_bytes} bytes")
        return dataset[()]


def check_expansion(path: Path, name: str, *, num_bytes: int, stored_bytes: int) -> None:
    """Refuses an array that would need far more memory than is stored of it.

    Args:
        path (`Path`), name (`str`): the file and the array, for the message.
        num_bytes (`int`): size in memory.
        stored_bytes (`int`): size in the file.

    Raises:
        ForeignFileError: `too_large`.
    """
    is_inflated = num_bytes > _ALWAYS_FINE_BYTES and num_bytes > _MAX_EXPANSION * stored_bytes
    if num_bytes > _MAX_ARRAY_BYTES or is_inflated:
        raise ForeignFileError(
            "too_large",
            f"{path.name}: `{name}` would take {num_bytes} bytes of memory, of which the file holds {stored_bytes}",
        )


def read_attributes(item: "File | Group | Dataset", path: Path) -> dict[str, Any]:
    """Reads all attributes as plain Python values; the text 'None' becomes `None`.

    Args:
        item (`h5py.File`, `h5py.Group` or `h5py.Dataset`): what has the attributes.
        path (`Path`): its file, for messages.

    Returns:
        `dict`: numbers, texts, and lists of them.

    Raises:
        ForeignFileError: `unreadable` if one cannot be read.
    """
    with damage_reported(path, "attributes"):
        return {name: _plain(value) for name, value in item.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.reshape(-1)[0]) if value.size == 1 else value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return None if value == "None" else value


def positive_number(attributes: Mapping[str, Any], name: str, path: Path) -> float | None:
    """Returns an attribute that must be a positive number, `None` if it is absent.

    Raises:
        ForeignFileError: `unreadable` if it is anything else.
    """
    value = attributes.get(name)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not (math.isfinite(number) and number > 0):
        raise ForeignFileError("unreadable", f"{path.name}: `{name}` is {value!r}, expected a positive number")
    return number


def _first_line(error: Exception) -> str:
    return str(error).strip("'\" ").split("\n")[0][:200]
