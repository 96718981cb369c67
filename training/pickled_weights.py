# SPDX-License-Identifier: Apache-2.0
"""Pickled weights -> safetensors, read with `weights_only=True` in a process of its own, which is all that runs here.

Beside plain tensors only `argparse.Namespace` is allowed, in which DINO keeps its options.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hdf5_files import ForeignFileError

if TYPE_CHECKING:
    import torch

# Where training scripts keep a network among other things, in the order of preference.
_NETWORKS = ("teacher", "student", "state_dict", "model")


def pickle_to_safetensors(request: tuple[Path, Path, str | None]) -> list[str]:
    """Reads a pickle and writes its tensors.

    Args:
        request (`tuple`): the file; the safetensors file to write; where in the file the network is, `None` to look
            under the usual names.

    Returns:
        `list[str]`: names of the tensors.

    Raises:
        ForeignFileError: if there is no such file, it holds more than plain tensors, or no network.
    """
    import torch
    from safetensors.torch import save_file

    source, target, key = request
    if not source.is_file():
        raise ForeignFileError("not_a_file", f"{source}: there is no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        # The original message explains how to run the code in the file, which nobody should.
        raise ForeignFileError(
            "unreadable",
            f"{source.name}: is damaged or holds more than plain tensors ({type(error).__name__}); Python objects are "
            "never loaded",
        ) from error
    tensors = {name: value.contiguous().clone() for name, value in _network(source.name, content, key).items()}
    save_file(tensors, target)
    return sorted(tensors)


def _network(name: str, content: Any, key: str | None) -> "dict[str, torch.Tensor]":
    """The tensors of the network that is wanted."""
    import torch

    if not isinstance(content, dict):
        raise ForeignFileError("unreadable", f"{name}: holds a {type(content).__name__}, expected named tensors")
    if key is not None and key not in content:
        raise ForeignFileError("unreadable", f"{name}: has no `{key}`; it has {', '.join(map(str, content))}")
    for place in [key] if key is not None else _NETWORKS:
        if isinstance(content.get(place), dict):
            content = content[place]
            break
    tensors = {str(part): value for part, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ForeignFileError("unreadable", f"{name}: holds no named tensors")
    return tensors
