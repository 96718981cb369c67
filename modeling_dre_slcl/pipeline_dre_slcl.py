# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The DRE-SLCL authors.
"""`pipeline("slide-feature-extraction", model=...)("slide.svs")`: slide files -> named vectors."""

from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineIterator

from .slide_inference import check_model, encode_opened_slide
from .slide_info import SlideError
from .slide_opening import OpenedSlide, open_ahead

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
    A single slide raises by default, several record. Of several, the next is opened and its first tiles are read while
    one is encoded; no more than one is ahead.

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

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> PipelineIterator:
        """Several slides: results in their order, with the next one opened while one is encoded."""
        check_model(self.model)

        def opens(one: Any) -> dict[str, Any]:
            slide = self.preprocess(one, **preprocess_params)
            return self._open(slide, forward_params) if "path" in slide else slide

        opened = PipelineIterator(_OpenedInputs(inputs, opens), self._take, forward_params)
        return PipelineIterator(opened, self.postprocess, postprocess_params)

    def _open(self, slide: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        options = {name: value for name, value in options.items() if name != "on_error"}
        return {"opened": OpenedSlide(self.model, **{**options, **slide})}

    def _take(self, opened: Callable[[], dict[str, Any]], **options: Any) -> dict[str, Any]:
        """Encodes a slide that is open, or will be soon."""
        try:
            slide = opened()
        except SlideError as error:
            return _refuse(error, options)
        return self.forward(slide, **options)

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        try:
            if "opened" not in model_inputs:
                check_model(self.model)
                model_inputs = self._open(model_inputs, options)
            opened = model_inputs["opened"]
            result = encode_opened_slide(self.model, opened, image_processor=self.image_processor)
        except SlideError as error:
            return _refuse(error, options)
        return {"status": "ok", **result}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Passes the result on."""
        return dict(model_outputs)


class _OpenedInputs:
    """Inputs of a pipeline, opened one ahead; has a length if they have one."""

    def __init__(self, inputs: Any, opens: Callable[[Any], dict[str, Any]]) -> None:
        self._inputs, self._opens = inputs, opens

    def __len__(self) -> int:
        return len(self._inputs)

    def __iter__(self) -> Iterator[Callable[[], dict[str, Any]]]:
        is_sized = isinstance(self._inputs, Sized)
        # A data set of torch need not say where it ends other than by its length.
        inputs = (self._inputs[index] for index in range(len(self._inputs))) if is_sized else self._inputs
        return open_ahead(inputs, self._opens, _close)


def _close(inputs: dict[str, Any]) -> None:
    if "opened" in inputs:
        inputs["opened"].close()


def _refuse(error: SlideError, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("on_error", "raise") == "raise":
        raise error
    return {"slide_id": error.slide_id, "status": "refused", "reason": error.reason, "message": str(error)}


__all__ = ["TASK", "SlideFeatureExtractionPipeline"]
