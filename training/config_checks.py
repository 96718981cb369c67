# SPDX-License-Identifier: Apache-2.0
"""What the settings of a run may hold, beyond their types: limits, names within mappings, what goes together.

Nothing here imports torch, so that a wrong setting is an error within a moment.
"""

import ast
import difflib
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig

# Far beyond any use: what is larger is a slip of the finger, and ends in an error that nobody understands.
_AT_MOST = {
    "slides_per_batch": 65_536,
    "tiles_per_slide": 65_536,
    "accumulation_steps": 65_536,
    "encode_batch_size": 1_048_576,
    "num_workers": 512,
    "keep_checkpoints": 10_000,
    "seed": 2**32 - 1,
    "augment_stain": 2.0,
    "weight_decay": 10.0,
    "learning_rate": 10.0,
    "head_learning_rate": 10.0,
}
_AT_MOST_OF_ANY = 1_000_000_000
_POSITIVE = (
    *("accumulation_steps", "validation_steps", "validation_tiles_per_slide", "early_stopping_patience"),
    *("max_report_tokens", "encoder_image_size_px", "first_pass_tiles_per_slide"),
)
_NOT_NEGATIVE = ("seed", "ema_decay")
_SETTINGS_OF_RUN = {"encoder_config", "text_config"}  # of the model's config: the run fills them in
_MODEL_RANGES = {  # of fields of the model's config; the model checks how they fit together
    **dict.fromkeys(("hidden_size", "num_codewords", "num_attention_heads", "intermediate_size"), (1, 1_000_000)),
    **dict.fromkeys(("projection_size", "report_hidden_size", "tile_size_px"), (1, 1_000_000)),
    "num_hidden_layers": (0, 1000),
    "hidden_dropout_prob": (0, 0.99),
    "layer_norm_eps": (0, 1),
    "initializer_range": (0, 100),
    "max_logit_scale": (0, 1e6),
    "tile_mpp": (0.05, 10),
}
_KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool}


def check_numbers(settings: dict[str, Any]) -> None:
    """Checks every number on its own: finite, and within limits.

    Args:
        settings (`dict`): field -> value, of the right types.

    Raises:
        ValueError: naming the field, what it holds and what it may hold.
    """
    for name, value in settings.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                positive = name in ("learning_rate", "head_learning_rate", "max_gradient_norm")
                raise ValueError(f"`{name}` must be a {'positive' if positive else 'finite'} number, got {number}.")
            if number > _AT_MOST.get(name, _AT_MOST_OF_ANY):
                raise ValueError(f"`{name}` must be at most {_AT_MOST.get(name, _AT_MOST_OF_ANY)}, got {number}.")
            if number < 1 and name in _POSITIVE:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
            if number < 0 and name in _NOT_NEGATIVE:
                raise ValueError(f"`{name}` must be at least 0, got {number}.")


def check_together(config: "TrainConfig") -> None:
    """Checks what one number alone does not show: lists, mappings, and settings that need each other.

    Raises:
        ValueError: naming the fields, what they hold and what they may hold.
    """
    for name in ("image_mean", "image_std"):
        if len(getattr(config, name)) != 3:
            raise ValueError(f"`{name}` must be three numbers (red, green, blue), got {getattr(config, name)}.")
    if min(config.image_std) <= 0:
        raise ValueError(f"`image_std` must be positive numbers, got {config.image_std}.")
    if min(config.codebook_refits, default=0) < 0:
        raise ValueError(f"`codebook_refits` must be steps, at least 0, got {config.codebook_refits}.")
    if not config.ema_decay < 1:
        raise ValueError(f"`ema_decay` must be below 1, for example 0.999, got {config.ema_decay}.")
    if config.final_weights == "ema" and config.ema_decay == 0:
        raise ValueError("`final_weights: ema` needs a running average: set `ema_decay`, for example to 0.999.")
    for name, value in (
        ("final_weights: best", config.final_weights == "best"),
        ("early_stopping_patience", config.early_stopping_patience is not None),
    ):
        if value and config.validation_split is None:
            raise ValueError(f"`{name}` needs validations: set `validation_split`.")
    if config.validation_split == config.train_split:
        raise ValueError(f"`validation_split` must be another split than `train_split`, got {config.train_split!r}.")
    if config.accumulation_steps > config.slides_per_batch * config.tiles_per_slide:
        tiles = config.slides_per_batch * config.tiles_per_slide
        raise ValueError(f"`accumulation_steps` must be at most the {tiles} tiles of a step.")
    if len(set(config.trackers)) < len(config.trackers):
        raise ValueError(f"`trackers` names one twice: {config.trackers}.")
    check_model_config(config.model_config)
    model_type = (config.tile_encoder_config or {}).get("model_type", "vit")
    if not isinstance(model_type, str):
        raise ValueError(f"`model_type` in `tile_encoder_config` must be a name, got {model_type!r}.")


def check_model_config(settings: dict[str, Any]) -> None:
    """Checks names and types of the fields of `DreSlclConfig` that a run sets.

    Raises:
        ValueError: naming the field, and the nearest known one.
    """
    known = model_config_fields()
    refuse_unknown(settings, known, "field", of="model_config")
    for name, value in settings.items():
        accepted = known[name]
        if isinstance(accepted[0], str):
            wrong, expected = value not in accepted, f"one of {', '.join(accepted)}"
        else:
            wrong = not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted)
            expected = " or ".join(kind.__name__ for kind in accepted)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"`{name}` in `model_config` must be {expected}, got {value!r}.")
        low, high = _MODEL_RANGES.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ValueError(f"`{name}` in `model_config` must lie between {low} and {high}, got {value}.")


def model_config_fields() -> dict[str, tuple[Any, ...]]:
    """Returns the fields of `DreSlclConfig` and what each accepts: types, or the words of a choice.

    They are read from the source, because importing the class imports torch.
    """
    package = importlib.util.find_spec("modeling_dre_slcl")
    source = Path(package.submodule_search_locations[0]) / "configuration_dre_slcl.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DreSlclConfig")
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and node.target.id not in _SETTINGS_OF_RUN:
            fields[node.target.id] = _accepted(node.annotation)
    return fields


def _accepted(annotation: ast.expr) -> tuple[Any, ...]:
    """What an annotation such as `int`, `float | int` or `Literal["a", "b"]` accepts; anything for other ones."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        choices = ast.literal_eval(annotation.slice)
        return choices if isinstance(choices, tuple) else (choices,)
    names = [name.strip() for name in ast.unparse(annotation).split("|")]
    kinds: list[type] = []
    for name in names:
        if name == "None":
            kinds.append(type(None))
        elif name not in _KINDS:
            return (object, bool)
        else:
            kinds.extend(_KINDS[name] if isinstance(_KINDS[name], tuple) else [_KINDS[name]])
    return tuple(dict.fromkeys(kinds))


def refuse_unknown(settings: dict[str, Any], known: Iterable[str], what: str, of: str | None = None) -> None:
    """Refuses a name that is not known, naming the nearest one that is.

    Args:
        settings (`dict`): what was given.
        known (iterable of `str`): what may be given.
        what (`str`): what the names are, in words.
        of (`str`, *optional*): the field that holds them.

    Raises:
        ValueError: for the first unknown name.
    """
    known = list(known)
    for name in settings:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean `{nearest[0]}`?" if nearest else f"; known are {', '.join(known)}."
            raise ValueError(f"Unknown {what} `{name}`{f' in `{of}`' if of else ''}{hint}")
