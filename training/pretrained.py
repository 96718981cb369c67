# SPDX-License-Identifier: Apache-2.0
"""Loads pretrained models: whole, from safetensors only, and with one clear error for weights that are none."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedModel

import modeling_dre_slcl  # noqa: F401 (registers the models with the Auto classes)

_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_MAX_NAMED = 3


def load_slide_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """Loads a DRE-SLCL model with the installed classes: code that a repository carries is not run.

    Args:
        name (`str`): folder or Hub repository.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Returns:
        `DreSlclModel`: in evaluation mode, on the CPU.

    Raises:
        ValueError: if it is another kind of model, or its weights are pickled, damaged, incomplete or of another.
        OSError: if there is no such model.
    """
    options = {"trust_remote_code": False, "revision": revision or "main", "output_loading_info": True}
    model, loading = load_pretrained(name, **options)
    if not hasattr(model, "codebook"):
        raise ValueError(f"{name}: expected a DRE-SLCL model, found {type(model).__name__}.")
    check_loaded(name, model, loading)
    return model.eval()


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
        ValueError: if the file of weights is damaged, or no safetensors file, or there are pickled weights only.
    """
    refuse_pickled_weights(name_or_path)
    try:
        return model_class.from_pretrained(name_or_path, use_safetensors=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"{name_or_path}: its weights are damaged, or no safetensors file ({error}); download them again."
        ) from error


def refuse_pickled_weights(source: str) -> None:
    """Refuses a folder that holds weights as pickles only.

    Raises:
        ValueError: naming the file and the command that converts it.
    """
    folder = Path(source)
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return
    pickled = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickled:
        raise ValueError(
            f"{pickled[0]} holds pickled weights, which can run code when they are read; convert them first: "
            f"`dre-slcl convert-encoder {pickled[0]} OUT`, then give OUT."
        )


def check_loaded(
    what: str,
    model: PreTrainedModel,
    loading: dict[str, Any],
    *,
    may_lack: tuple[str, ...] = (),
    may_exceed: tuple[str, ...] = (),
) -> None:
    """Refuses weights that do not fill a model, or are of a larger one; transformers only warns of both.

    Args:
        what (`str`): the model, for the message.
        model (`PreTrainedModel`): it.
        loading (`dict`): from `from_pretrained(..., output_loading_info=True)`.
        may_lack (`tuple[str, ...]`): beginnings of names that may be missing.
        may_exceed (`tuple[str, ...]`): beginnings of names that may be left over. Parts that the model has nothing
            of, such as a head, may always be.

    Raises:
        ValueError: naming some of the tensors.
    """
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith(may_lack))
    if missing:
        raise ValueError(
            f"The weights of {what} are incomplete: {len(missing)} tensors are missing, {_some(missing)}."
        )
    parts = {_part(key) for key in model.state_dict()}
    extra = sorted(key for key in loading["unexpected_keys"] if _part(key) in parts and not key.startswith(may_exceed))
    if extra:
        raise ValueError(
            f"The weights of {what} are of another model than its config.json describes: {len(extra)} tensors have no "
            f"place, {_some(extra)}."
        )


def _part(key: str) -> str:
    """The part of a model that a tensor belongs to: the first word of its name."""
    return key.removeprefix("timm_model.").split(".")[0]


def _some(names: list[str]) -> str:
    return "for example " + ", ".join(f"`{name}`" for name in names[:_MAX_NAMED])
