# SPDX-License-Identifier: Apache-2.0
"""Loads other people's models: from safetensors only, and with one clear error for weights that are none."""

from typing import Any

from safetensors import SafetensorError
from transformers import AutoModel


def load_pretrained(name_or_path: str, model_class: Any = AutoModel, **kwargs: Any) -> Any:
    """Loads a model of transformers.

    Args:
        name_or_path (`str`): folder or Hub repository.
        model_class (`type`, defaults to `AutoModel`): what to load it as.
        kwargs: as its `from_pretrained` takes them.

    Returns:
        What its `from_pretrained` returns.

    Raises:
        OSError: if there are no weights in safetensors.
        ValueError: if the file of weights is damaged, or no safetensors file.
    """
    try:
        return model_class.from_pretrained(name_or_path, use_safetensors=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"{name_or_path}: its weights are damaged, or no safetensors file ({error}); download them again."
        ) from error
