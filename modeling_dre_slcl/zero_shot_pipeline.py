# SPDX-License-Identifier: Apache-2.0
"""`pipeline("zero-shot-slide-classification", model=...)("slide.svs", candidate_labels=[...])`: slides -> labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from .pipeline_dre_slcl import SlideFeatureExtractionPipeline
from .text_embeddings import TextEmbeddings
from .zero_shot import DEFAULT_TEMPLATES, PLACEHOLDER, class_probabilities, ensemble_classes

ZERO_SHOT_TASK = "zero-shot-slide-classification"
_OPTIONS = ("candidate_labels", "templates", "hypothesis_template", "top_k")


class ZeroShotSlideClassificationPipeline(SlideFeatureExtractionPipeline):
    """Classifies whole slides by comparing them with text, without training on the classes.

    Call it with what `SlideFeatureExtractionPipeline` takes, whose options it shares, or with embeddings computed
    before: what that pipeline returned, a `.safetensors` file of `dre-slcl embed`, or `slide_projection` itself, as
    an array of shape `(E,)` or, for S slides, `(S, E)`.

    Options, at construction or per call:
        candidate_labels (`list` of `str`, comma-separated `str`, or `dict` of label -> names): the classes; the dict
            gives each its synonyms.
        templates (`str` or `list` of `str`, *optional*): prompts that hold `CLASSNAME`, or `{}` as elsewhere in
            transformers (then also under the name `hypothesis_template`); by default `DEFAULT_TEMPLATES`.
        top_k (`int`, *optional*): only the most probable labels.

    At construction only: `text_cache_dir`, a folder that keeps the vectors of texts between processes.

    Returns, per slide, a list of `{"score", "label"}`, most probable first; scores sum to 1 over the candidates. A
    slide that cannot be encoded raises or is recorded, see `on_error` there; a record is a dictionary with `status`
    `"refused"` instead of a list.

    Raises:
        ValueError: if no text model ships with the model; if labels or templates are missing or of another form.

    Example:

    ```python
    classify = pipeline("zero-shot-slide-classification", model="namespace/name", trust_remote_code=True)
    classify("slide.svs", candidate_labels=["adenocarcinoma", "squamous cell carcinoma"])
    ```
    """

    # Optional for the loader, so that a model without text is met by the error below and not by that of a tokenizer.
    _load_tokenizer = None

    def __init__(self, *args: Any, text_cache_dir: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.texts = TextEmbeddings(self.model, self.tokenizer, text_cache_dir)
        self._built: tuple[Any, torch.Tensor] | None = None

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        own = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        preprocess, forward, _ = super()._sanitize_parameters(**kwargs)
        postprocess: dict[str, Any] = {}
        if own.get("candidate_labels") is not None:
            postprocess["candidate_labels"] = _read_labels(own["candidate_labels"])
        templates = own.get("templates", own.get("hypothesis_template"))
        if templates is not None:
            postprocess["templates"] = _read_templates(templates)
        if own.get("top_k") is not None:
            if own["top_k"] < 1:
                raise ValueError(f"`top_k` must be at least 1, got {own['top_k']}.")
            postprocess["top_k"] = own["top_k"]
        return preprocess, forward, postprocess

    def __call__(self, inputs: Any, candidate_labels: Any = None, **kwargs: Any) -> Any:
        """Classifies one slide, or many; see the class."""
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        elif "candidate_labels" not in self._postprocess_params and kwargs.get("candidate_labels") is None:
            raise ValueError("Pass `candidate_labels`: the classes to choose from.")
        if isinstance(inputs, (np.ndarray, torch.Tensor)) and inputs.ndim == 2:
            inputs = list(inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs: Any, **options: Any) -> dict[str, Any]:
        """Names the slide, or takes its embedding, computed before."""
        if isinstance(inputs, (np.ndarray, torch.Tensor)):
            inputs = {"slide_projection": inputs}
        elif isinstance(inputs, (str, Path)) and Path(inputs).suffix == ".safetensors":
            inputs = {"slide_projection": _read_projection(Path(inputs))}
        if isinstance(inputs, Mapping) and inputs.get("status") == "refused":
            return dict(inputs)
        if not isinstance(inputs, Mapping) or inputs.get("slide_projection") is None:
            return super().preprocess(inputs, **options)
        projection = torch.as_tensor(inputs["slide_projection"]).float()
        if projection.shape != (self.model.config.projection_size,):
            raise ValueError(
                f"`slide_projection` must have shape ({self.model.config.projection_size},), as this model makes it, "
                f"got {tuple(projection.shape)}."
            )
        return {"slide_projection": F.normalize(projection, dim=-1)}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        if "slide_projection" in model_inputs or "status" in model_inputs:
            return dict(model_inputs)
        return super()._forward(model_inputs, **options)

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        candidate_labels: dict[str, list[str]] | None = None,
        templates: tuple[str, ...] = DEFAULT_TEMPLATES,
        top_k: int | None = None,
        **_: Any,
    ) -> Any:
        """Compares the slide with every class."""
        if "slide_projection" not in model_outputs:
            return dict(model_outputs)
        classifier = self._classifier(candidate_labels, templates)
        scores = class_probabilities(self.model, model_outputs["slide_projection"], classifier).tolist()
        ranked = sorted(zip(scores, candidate_labels, strict=True), key=lambda pair: -pair[0])
        return [{"score": score, "label": label} for score, label in ranked[:top_k]]

    def _classifier(self, labels: dict[str, list[str]], templates: tuple[str, ...]) -> torch.Tensor:
        """Vectors of the classes; those of the last call are kept."""
        key = (tuple((label, tuple(names)) for label, names in labels.items()), templates)
        if self._built is None or self._built[0] != key:
            self._built = key, ensemble_classes(self.texts, list(labels.values()), templates)
        return self._built[1]


def _read_labels(labels: Any) -> dict[str, list[str]]:
    """Classes as label -> names."""
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",")]
    if not isinstance(labels, (Mapping, Sequence)) or not labels:
        raise ValueError(f"`candidate_labels` must be a list of labels, or a dict of label -> names, got {labels!r}.")
    if not isinstance(labels, Mapping):
        if len(set(labels)) != len(labels):
            raise ValueError(f"`candidate_labels` holds a label twice: {list(labels)}.")
        labels = {label: [label] for label in labels}
    found = {label: [names] if isinstance(names, str) else list(names) for label, names in labels.items()}
    for label, names in found.items():
        if not names or not all(isinstance(name, str) and name.strip() for name in (label, *names)):
            raise ValueError(f"`candidate_labels`: label {label!r} needs at least one name that is not empty.")
    return found


def _read_templates(templates: Any) -> tuple[str, ...]:
    """Templates with `CLASSNAME`, whichever placeholder they were written with."""
    templates = [templates] if isinstance(templates, str) else list(templates)
    found = tuple(
        template if PLACEHOLDER in template else template.replace("{}", PLACEHOLDER) for template in templates
    )
    for template in found:
        if PLACEHOLDER not in template:
            raise ValueError(f"Prompt template {template!r} must contain {PLACEHOLDER} or {{}}.")
    if not found:
        raise ValueError("`templates` must hold at least one prompt template.")
    return found


def _read_projection(path: Path) -> torch.Tensor:
    """`slide_projection` from a file of `dre-slcl embed`."""
    try:
        with safe_open(path, framework="pt") as stored:
            return stored.get_tensor("slide_projection")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a file of `dre-slcl embed` with `slide_projection` ({error}).") from error


__all__ = ["ZERO_SHOT_TASK", "ZeroShotSlideClassificationPipeline"]
