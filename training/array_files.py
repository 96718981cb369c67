# SPDX-License-Identifier: Apache-2.0
"""Reads arrays from the .npz and .pt files of other tools; neither can run code.

A .npz file is read with `allow_pickle=False`. A .pt file is read with `weights_only=True`, which builds plain tensors
and nothing else; this is the only file of the package that reads PyTorch's own format.
"""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .hdf5_files import ForeignFileError, check_expansion, damage_reported

if TYPE_CHECKING:
    import torch

ZIP_SIGNATURE = b"PK\x03\x04"


def file_signature(path: Path) -> bytes:
    """Returns the first eight bytes of a file.

    Raises:
        ForeignFileError: `not_a_file` or `unreadable`.
    """
    if not path.is_file():
        raise ForeignFileError("not_a_file", f"{path.name}: there is no such file")
    try:
        with path.open("rb") as handle:
            return handle.read(8)
    except OSError as error:
        raise ForeignFileError("unreadable", f"{path.name}: {error.strerror}") from error


def npz_shape(path: Path, name: str) -> tuple[int, ...] | None:
    """Returns the shape of an array of a .npz file without reading it, `None` if there is none of that name.

    Raises:
        ForeignFileError: `unreadable` if the file is damaged, or the array holds no numbers.
    """
    with damage_reported(path, f"`{name}`"), zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        with archive.open(f"{name}.npy") as handle:
            version = np.lib.format.read_magic(handle)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(handle)
    _check_kind(path, name, dtype)
    return shape


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads arrays of numbers from a .npz file.

    Args:
        path (`Path`): the file.
        names (`tuple[str, ...]`): the arrays wanted.

    Returns:
        `dict[str, np.ndarray]`: those that are there.

    Raises:
        ForeignFileError: `unreadable` if the file is damaged, or an array holds objects; `too_large` if an array would
            fill the memory.
    """
    with damage_reported(path, "arrays"):
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: (entry.file_size, entry.compress_size) for entry in archive.infolist()}
        for name in names:
            num_bytes, stored_bytes = sizes.get(f"{name}.npy", (0, 0))
            check_expansion(path, name, num_bytes=num_bytes, stored_bytes=stored_bytes)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive.files}
    for name, array in arrays.items():
        _check_kind(path, name, array.dtype)
    return arrays


def _check_kind(path: Path, name: str, dtype: np.dtype) -> None:
    if dtype.kind not in "iuf":
        raise ForeignFileError("unreadable", f"{path.name}: `{name}` holds {dtype}, expected an array of numbers")


def open_tensor(path: Path) -> "torch.Tensor":
    """Opens a .pt file that holds one tensor; its values are read from the disk when they are used.

    Args:
        path (`Path`): the file.

    Returns:
        `torch.Tensor`: floating-point numbers on the CPU.

    Raises:
        ForeignFileError: `unreadable` if the file is damaged, or holds anything but one dense tensor.
    """
    import torch

    is_zip = file_signature(path).startswith(ZIP_SIGNATURE)
    try:
        # Only files in the newer, zip-based layout can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        # The original message explains how to run the code in the file, which nobody should.
        raise ForeignFileError(
            "unreadable",
            f"{path.name}: is damaged or holds more than plain tensors ({type(error).__name__}); Python objects are "
            "never loaded",
        ) from error
    if not isinstance(content, torch.Tensor):
        raise ForeignFileError("unreadable", f"{path.name}: holds a {type(content).__name__}, expected one tensor")
    is_dense = content.layout == torch.strided and content.device.type == "cpu" and content.is_floating_point()
    if not is_dense:
        raise ForeignFileError("unreadable", f"{path.name}: holds {content.dtype}, expected floating-point numbers")
    # Tensors are stored as they are, so one that is larger than its file repeats the same numbers.
    if content.numel() * content.element_size() > path.stat().st_size:
        raise ForeignFileError("too_large", f"{path.name}: a tensor of {tuple(content.shape)} is larger than its file")
    return content.detach()
