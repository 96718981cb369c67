# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685) of the tile encoder through peft: put in, merged, written, read again.

Adapters are put into the encoder's own modules, so that everything else sees the same encoder.
"""

import difflib
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from modeling_dre_slcl import DreSlclModel
from modeling_dre_slcl.atomic_files import read_json

from .pretrained import check_loaded
from .pretrained_encoder import encoder_source, load_tile_encoder

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What peft does not know to adapt: the linear layers of attention, as timm and transformers call them.
_ATTENTION_LAYERS = ("qkv", "q_proj", "v_proj", "query", "value", "q", "v")


def add_lora(encoder: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Freezes a tile encoder and puts trainable adapters into it.

    Args:
        encoder (`PreTrainedModel`): the tile encoder.
        settings (`dict`): arguments of `peft.LoraConfig`; by default `target_modules` are the attention's linear
            layers.

    Raises:
        ValueError: for settings that peft does not have, or if the encoder has no such layers.
        ImportError: without peft.
    """
    peft = _peft()
    known = set(peft.LoraConfig.__dataclass_fields__)
    for name in settings:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"Unknown field `{name}` in `lora`{f'; did you mean `{nearest[0]}`?' if nearest else ''}")
    targets = settings.get("target_modules") or _attention_layers(encoder)
    encoder.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(**settings | {"target_modules": targets}), encoder)


def _attention_layers(encoder: nn.Module) -> list[str]:
    linear = {name.split(".")[-1] for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    found = [name for name in _ATTENTION_LAYERS if name in linear]
    if not found:
        raise ValueError(
            f"The tile encoder has none of the layers that adapters go to by default; name some in `lora` as "
            f"`target_modules`. Its linear layers are {', '.join(sorted(linear)) or 'none'}."
        )
    return found


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("`lora` needs peft: `pip install dre-slcl[lora]`.") from error
    return peft


def merge_lora(encoder: nn.Module) -> None:
    """Adds the adapters to the encoder's weights and takes them out, which changes nothing in what it computes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in encoder.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, module.get_base_layer())
    if hasattr(encoder, "peft_config"):
        del encoder.peft_config
    encoder._hf_peft_config_loaded = False


def save_adapter(model: DreSlclModel, folder: Path, settings: dict[str, Any], base: str) -> None:
    """Writes a model without the weights of its tile encoder: adapters in peft's layout, and all else.

    ```
    <folder>/
        config.json, model.safetensors   the DRE-SLCL model, without its tile encoder
        adapter_config.json              which tile encoder the adapters are for
        adapter_model.safetensors        the adapters
    ```

    Args:
        model (`DreSlclModel`): with adapters, from `add_lora`.
        folder (`Path`): where to.
        settings (`dict`): as given to `add_lora`.
        base (`str`): the tile encoder, a folder or Hub repository.
    """
    from safetensors.torch import save_file

    peft = _peft()
    tensors = peft.get_peft_model_state_dict(model.tile_encoder)
    targets = settings.get("target_modules") or _adapted_layers(model.tile_encoder)
    config = peft.LoraConfig(**settings | {"target_modules": targets}, base_model_name_or_path=base)
    config.inference_mode = True
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("tile_encoder.")}
    model.save_pretrained(folder, state_dict=state)
    config.save_pretrained(folder)
    prefixed = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(prefixed, Path(folder) / _ADAPTER_FILES[1], metadata={"format": "pt"})


def _adapted_layers(encoder: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sorted({n.split(".")[-1] for n, module in encoder.named_modules() if isinstance(module, BaseTunerLayer)})


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a folder was written by `save_adapter`."""
    return all((Path(folder) / name).is_file() for name in _ADAPTER_FILES)


def load_adapted_model(
    folder: str | Path, *, tile_encoder: str | None = None, model_class: type[DreSlclModel] = DreSlclModel
) -> DreSlclModel:
    """Loads what `save_adapter` wrote, with the adapters merged into the weights of the tile encoder.

    Args:
        folder (`str` or `Path`): the folder; download a repository with `huggingface_hub.snapshot_download`.
        tile_encoder (`str`, *optional*): where the tile encoder is, if not where the adapters say.
        model_class (`type`): `DreSlclModel` or `DreSlclForSlideClassification`.

    Returns:
        `DreSlclModel`: an ordinary one.

    Raises:
        ValueError: if the folder is none of `save_adapter`, or tensors are missing.
    """
    peft = _peft()
    if not is_adapter_folder(folder):
        raise ValueError(f"{folder} holds no {' and '.join(_ADAPTER_FILES)}; expected a folder with LoRA adapters.")
    base = encoder_source(tile_encoder or read_json(Path(folder) / _ADAPTER_FILES[0])["base_model_name_or_path"])
    encoder, _ = load_tile_encoder(base)
    encoder = peft.PeftModel.from_pretrained(encoder, folder).merge_and_unload()
    model, loading = model_class.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    check_loaded(str(folder), model, loading, may_lack=("tile_encoder.",))
    if getattr(model.tile_encoder, "pooler", None) is None and hasattr(encoder, "pooler"):
        encoder.pooler = None
    model.tile_encoder = encoder
    return model.eval()
