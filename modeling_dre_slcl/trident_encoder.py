# SPDX-License-Identifier: Apache-2.0
"""A DRE-SLCL model as a slide encoder of TRIDENT, which is imported only when one is made.

```python
encoder = make_trident_encoder(model, patch_encoder="dre_slcl")
wsi.extract_slide_features(patch_features_path, encoder, save_features, device="cpu")
```

Source: `BaseSlideEncoder` and `CustomSlideEncoder` in TRIDENT's `trident/slide_encoder_models/load.py`.

Letters: N tiles, D feature width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .feature_fit import check_features_fit

# What TRIDENT calls a resolution: the name belongs to everything below the mpp.
_MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))


def magnification(mpp: float) -> int:
    """Returns what TRIDENT calls a resolution of `mpp` um/px: 80, 60, 40, 20, 10 or 5.

    It knows none coarser; those follow the rule behind the names, 10 um/px at 1x.
    """
    for limit, name in _MAGNIFICATIONS:
        if mpp < limit:
            return name
    return max(1, round(10 / mpp))


def make_trident_encoder(
    model: PreTrainedModel,
    *,
    enc_name: str = "dre_slcl",
    patch_encoder: str | None = None,
    allow_mismatch: bool = False,
) -> torch.nn.Module:
    """Makes a `CustomSlideEncoder` of TRIDENT.

    Args:
        model (`DreSlclModel`): the model; it is put in evaluation mode.
        enc_name (`str`, defaults to `"dre_slcl"`): names the folder `slide_features_<enc_name>`.
        patch_encoder (`str`, *optional*): name of the patch encoder in TRIDENT whose features the model takes;
            `Processor.run_slide_feature_extraction_job` asks TRIDENT's table for it, where it is then entered.
        allow_mismatch (`bool`, defaults to `False`): take features of tiles of another resolution or size.

    Returns:
        `torch.nn.Module`: `forward({"features": (1, N, D), "coords": (1, N, 2), "attributes": {...}}, device)` gives
        the slide embedding `(1, D)`, with `enc_name`, `precision` and `embedding_dim`.

    Raises:
        ImportError: if TRIDENT is not installed.
    """
    try:
        from trident.slide_encoder_models import load
    except ImportError as error:
        raise ImportError(
            "TRIDENT is not installed, and only its users need this: see https://github.com/mahmoodlab/TRIDENT."
        ) from error

    class DreSlclSlideEncoder(load.CustomSlideEncoder):
        """Slide embeddings of a DRE-SLCL model."""

        def forward(self, batch: Mapping[str, Any], device: str = "cuda") -> torch.Tensor:
            """Encodes the slide of a batch; see `make_trident_encoder`."""
            features, coords = batch["features"].to(device), batch["coords"]
            attributes = batch.get("attributes") or {}
            _check_attributes(self.model.config, features.shape[-1], attributes, allow_mismatch)
            side = attributes.get("patch_size_level0", self.model.config.tile_size_px)
            with torch.autocast(torch.device(device).type, enabled=False):
                return self.model.encode_slide_from_patch_features(features, coords, int(float(side)))

    if patch_encoder is not None:
        load.slide_to_patch_encoder_name[enc_name] = patch_encoder
    width = model.config.hidden_size
    return DreSlclSlideEncoder(enc_name=enc_name, model=model.eval(), precision=torch.float32, embedding_dim=width)


def _check_attributes(config: Any, width: int, attributes: Mapping[str, Any], allow_mismatch: bool) -> None:
    """Compares what TRIDENT, or we (`tile_mpp`), wrote beside the coordinates with the model's geometry."""
    facts = {name: _number(attributes.get(name)) for name in ("patch_size", "tile_mpp", "target_magnification")}
    size = None if facts["patch_size"] is None else round(facts["patch_size"])
    source = f"The tile features of slide {attributes.get('name', 'without name')}"
    check_features_fit(
        config,
        width=width,
        tile_mpp=facts["tile_mpp"],
        tile_size_px=size,
        source=source,
        allow_mismatch=allow_mismatch,
    )
    found, expected = facts["target_magnification"], magnification(float(config.tile_mpp))
    if not allow_mismatch and facts["tile_mpp"] is None and found is not None and round(found) != expected:
        raise ValueError(
            f"{source} were made at {found:g}x, but the model's tiles are at {config.tile_mpp:g} um/px, which TRIDENT "
            f"calls {expected}x. Run TRIDENT with --mag {expected}, or pass `allow_mismatch=True`."
        )


def _number(value: Any) -> float | None:
    """An attribute as a number; TRIDENT writes absent ones as the text 'None'."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


__all__ = ["magnification", "make_trident_encoder"]
