# SPDX-License-Identifier: Apache-2.0
"""Whether tile features from elsewhere are those that a model knows: their encoder, width, resolution and size."""

from typing import Any

from .slide_info import is_native_level

OWN_ENCODER = "dre_slcl"  # what `dre-slcl embed` calls the model's own tile encoder in files of other tools


def check_features_fit(
    config: Any,
    *,
    width: int,
    encoder: str | None = None,
    tile_mpp: float | None = None,
    tile_size_px: int | None = None,
    source: str = "The tile features",
    allow_mismatch: bool = False,
) -> None:
    """Refuses tile features that another encoder made, or the same one at another resolution or size.

    What a file does not say (`None`) is not checked. Features of another width never fit.

    Args:
        config (`DreSlclConfig`): of the model.
        width (`int`): width D of the features.
        encoder (`str`, *optional*): name of the encoder that made them.
        tile_mpp (`float`, *optional*): resolution of their tiles, um/px; 2% of difference are allowed.
        tile_size_px (`int`, *optional*): side of their tiles in px at `tile_mpp`.
        source (`str`, *optional*): what they are called in errors.
        allow_mismatch (`bool`, defaults to `False`): take them all the same.

    Raises:
        ValueError: names both values, and what to do.
    """
    if width != config.hidden_size:
        raise ValueError(f"{source} are {width} wide, but the model's are {config.hidden_size} wide: another encoder.")
    if allow_mismatch:
        return
    names = encoder_names(config)
    known = {_plain(name) for name in names} | {_plain(OWN_ENCODER)}
    problems = []
    if encoder is not None and _plain(encoder) not in known:
        problems.append(f"encoder {encoder!r} instead of {' or '.join(map(repr, names))}")
    if tile_mpp is not None and not is_native_level(tile_mpp, config.tile_mpp):
        problems.append(f"tile_mpp {tile_mpp:g} instead of {config.tile_mpp:g} um/px")
    if tile_size_px is not None and tile_size_px != config.tile_size_px:
        problems.append(f"tile_size_px {tile_size_px} instead of {config.tile_size_px}")
    if problems:
        raise ValueError(
            f"{source} were made otherwise than this model's: {'; '.join(problems)}. Make them again with "
            "`dre-slcl embed --tile-features`, or pass `allow_mismatch=True` if you know that they fit."
        )


def encoder_names(config: Any) -> list[str]:
    """Returns the names by which a model's tile encoder may be known: its own, that of its source, the model's."""
    encoder = config.encoder_config
    candidates = (
        getattr(encoder, "architecture", None),
        getattr(encoder, "_name_or_path", None),
        getattr(config, "_name_or_path", None),
    )
    names = [str(name) for name in candidates if name]
    return list(dict.fromkeys(names or [str(encoder.model_type)]))


def _plain(name: str) -> str:
    """The last part of a name, without what tools write differently: `hf-hub:MahmoodLab/UNI2-h` -> `uni2h`."""
    last = name.rstrip("/").replace("\\", "/").rpartition("/")[2].lower()
    return "".join(letter for letter in last if letter.isalnum())


__all__ = ["OWN_ENCODER", "check_features_fit", "encoder_names"]
