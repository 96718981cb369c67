# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The DRE-SLCL authors.
"""`pipeline("slide-feature-extraction", model=...)("slide.svs")`: slide files -> named vectors."""

from pathlib import Path
from typing import Any

from transformers import Pipeline

from .slide_inference import encode_slide
from .slide_info import SlideError

TASK = "slide-feature-extraction"
_SLIDE_OPTIONS = (
    *("min_tissue_fraction", "tile_batch_size", "num_threads", "return_tile_features", "progress", "mpp"),
    *("tolerance", "max_tiles", "seed"),
)


class SlideFeatureExtractionPipeline(Pipeline):
    """Encodes whole slides.

    Call it with a path, a list or a dataset of paths, or with dictionaries that hold `path` and optionally `slide_id`
    and `mpp`. Options, at construction or per call: `batch_size` (tiles encoded at once), `num_threads`,
    `min_tissue_fraction`, `return_tile_features`, `mpp`, `progress`, `tolerance`, `max_tiles`, `seed` (for a part of
    the tiles, see `encode_slide`), and `on_error`: `"raise"` stops at a slide that cannot be encoded, `"record"`
    returns `{"slide_id", "status": "refused", "reason", "message"}` for it and goes on.
    A single slide raises by default, several record.

    Returns, per slide, the dictionary of `encode_slide` with `status` `"ok"`.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        unknown = set(kwargs) - set(_SLIDE_OPTIONS) - {"on_error"}
        if unknown:
            raise ValueError(f"Unknown options {sorted(unknown)}; known are {sorted((*_SLIDE_OPTIONS, 'on_error'))}.")
        if kwargs.get("on_error", "raise") not in ("raise", "record"):
            raise ValueError(f"`on_error` must be 'raise' or 'record', got {kwargs['on_error']!r}.")
        return {}, kwargs, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Encodes one slide, or many; see the class."""
        # The base class batches inputs, which here are slides; a batch is of tiles.
        if (batch_size := kwargs.pop("batch_size", None) or self._batch_size) is not None:
            kwargs["tile_batch_size"] = batch_size
        if not isinstance(inputs, (str, Path, dict)) and "on_error" not in self._forward_params:
            kwargs.setdefault("on_error", "record")
        return super().__call__(inputs, batch_size=1, **kwargs)

    def preprocess(self, inputs: str | Path | dict[str, Any], **_: Any) -> dict[str, Any]:
        """Names the slide: a path, or a dictionary with `path`."""
        slide = dict(inputs) if isinstance(inputs, dict) else {"path": inputs}
        if not isinstance(slide.get("path"), (str, Path)):
            raise ValueError(f"Expected a path to a slide, or a dictionary with `path`, got {inputs!r}.")
        return {key: slide[key] for key in ("path", "slide_id", "mpp") if slide.get(key) is not None}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        on_error = options.pop("on_error", "raise")
        try:
            result = encode_slide(self.model, image_processor=self.image_processor, **{**options, **model_inputs})
        except SlideError as error:
            if on_error == "raise":
                raise
            return {
                "slide_id": error.slide_id,
                "status": "refused",
                "reason": error.reason,
                "message": str(error),
            }
        return {"status": "ok", **result}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Passes the result on."""
        return dict(model_outputs)


__all__ = ["TASK", "SlideFeatureExtractionPipeline"]
