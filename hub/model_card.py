# SPDX-License-Identifier: Apache-2.0
"""Writes the model card from the model's config, its metrics and a statement about its data.

The card says openly what was not given: such a field reads "not stated".
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

NOT_STATED = "not stated"
TAGS = (
    "dre_slcl",
    "pathology",
    "histopathology",
    "whole-slide-image",
    "contrastive-learning",
    "medical",
    "custom_code",
)
_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_PLAIN_FIELDS = ("hidden_size", "num_codewords", "num_hidden_layers", "projection_size")
# What a metrics file says beside its numbers.
_DESCRIPTIONS = ("dataset", "dataset_name", "split", "task", "task_name")

_USAGE = """\
```python
from transformers import pipeline

encode = pipeline("slide-feature-extraction", model="$repo_id", revision="<commit hash>", trust_remote_code=True)
slide = encode("slide.svs")
slide["slide_embedding"]  # ($hidden_size,): for probes and slide-to-slide search
slide["slide_projection"]  # ($projection_size,): L2-normalised, for comparison with reports
```

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("$repo_id", revision="<commit hash>", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("$repo_id", revision="<commit hash>", trust_remote_code=True)
```
"""
_ADAPTER_USAGE = """\
```python
# pip install dre-slcl[lora]; the tile encoder's own weights are fetched from where `adapter_config.json` says.
from huggingface_hub import snapshot_download
from dre_slcl.training.lora import load_adapted_model

model = load_adapted_model(snapshot_download("$repo_id", revision="<commit hash>"))
slide = model.encode_slide("slide.svs")
slide["slide_embedding"]  # ($hidden_size,): for probes and slide-to-slide search
slide["slide_projection"]  # ($projection_size,): L2-normalised, for comparison with reports
```
"""


def build_model_card(
    config: Mapping[str, Any],
    *,
    repo_id: str,
    metrics: Mapping[str, Any] | None = None,
    data_statement: str | None = None,
    datasets: Sequence[str] = (),
    has_adapter: bool = False,
) -> ModelCard:
    """Builds the card of a model.

    Args:
        config (`Mapping`): content of the model's config.json.
        repo_id (`str`): where the card will live, `namespace/name`.
        metrics (`Mapping`, *optional*):
            Numbers by name, nested at will (`{"probe": {"auroc": 0.9}}`); a metric may also be
            `{"value": 0.9, "low": 0.8, "high": 0.95}`. Beside them `dataset` (Hub id), `dataset_name`, `split`,
            `task` and `task_name` say what they were measured on.
        data_statement (`str`, *optional*): Markdown: which slides and reports, from where, under which permission.
        datasets (`Sequence[str]`, defaults to `()`): Hub ids of the training datasets.
        has_adapter (`bool`, defaults to `False`): the tile encoder's weights are elsewhere, its adapters here.

    Returns:
        `ModelCard`: with the metadata that the Hub shows and filters by.

    Raises:
        ValueError: if a metric is not a finite number.
    """
    name = repo_id.split("/")[-1]
    rows = list(_metric_rows(metrics or {}))
    results = [_eval_result(metric, entry, metrics or {}, datasets) for metric, entry in rows]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=list(TAGS),
        datasets=list(datasets) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    fields = {key: _stated(config.get(key)) for key in _PLAIN_FIELDS}
    body = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        fields,
        model_name=name,
        repo_id=repo_id,
        usage=Template(_ADAPTER_USAGE if has_adapter else _USAGE).substitute(fields, repo_id=repo_id),
        labels=_describe_labels(config),
        tile_encoder=_describe_encoder(config.get("encoder_config")),
        text_encoder=_describe_encoder(config.get("text_config")) if config.get("text_config") else "none",
        datasets=", ".join(f"`{dataset}`" for dataset in datasets) or NOT_STATED,
        data_statement=(data_statement or "").strip() or f"Statement about the data: {NOT_STATED}.",
        evaluation=_evaluation_table(rows, metrics or {}),
        **_geometry(config),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _describe_labels(config: Mapping[str, Any]) -> str:
    """Returns the names that a classifier gives, "none" for a model without one."""
    if "DreSlclForSlideClassification" not in (config.get("architectures") or []):
        return "none"
    return ", ".join(f"`{name}`" for name in (config.get("id2label") or {}).values()) or NOT_STATED


def _stated(value: Any) -> str:
    return NOT_STATED if value is None else str(value)


def _geometry(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the geometry as text with units."""
    size, mpp = config.get("tile_size_px"), config.get("tile_mpp")
    return {
        "tile_size_px": NOT_STATED if size is None else f"{size} px",
        "tile_mpp": NOT_STATED if mpp is None else f"{mpp:g} um/px",
        "field_of_view": NOT_STATED if size is None or mpp is None else f"{size * mpp:g} um",
    }


def _describe_encoder(config: Mapping[str, Any] | None) -> str:
    """Returns the kind and size of a nested encoder, as far as its config says."""
    if not config:
        return NOT_STATED
    kind = config.get("architecture") or config.get("model_type") or NOT_STATED
    sizes = {"num_hidden_layers": "layers", "hidden_size": "wide", "patch_size": "px patches"}
    return ", ".join([f"`{kind}`", *(f"{config[key]} {word}" for key, word in sizes.items() if config.get(key))])


def _metric_rows(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """Yields ("probe.auroc", {"value", "low"?, "high"?}) for every number in a nested metrics file."""
    for name, value in metrics.items():
        if not prefix and name in _DESCRIPTIONS:
            continue
        full_name = f"{prefix}{name}"
        if isinstance(value, Mapping) and "value" not in value:
            yield from _metric_rows(value, f"{full_name}.")
            continue
        entry = value if isinstance(value, Mapping) else {"value": value}
        entry = {key: entry[key] for key in ("value", "low", "high") if key in entry}
        for number in entry.values():
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"metrics: `{full_name}` is {number!r}, expected a finite number; mend or remove it.")
        yield full_name, entry


def _eval_result(
    metric: str, entry: Mapping[str, float], metrics: Mapping[str, Any], datasets: Sequence[str]
) -> EvalResult:
    """Turns one metric into the Hub's machine-readable form."""
    dataset = metrics.get("dataset") or next(iter(datasets), NOT_STATED)
    return EvalResult(
        task_type=metrics.get("task") or "image-feature-extraction",
        task_name=metrics.get("task_name"),
        dataset_type=dataset,
        dataset_name=metrics.get("dataset_name") or dataset,
        dataset_split=metrics.get("split"),
        metric_type=metric.rsplit(".", 1)[-1],
        metric_name=metric,
        metric_value=entry["value"],
    )


def _evaluation_table(rows: Sequence[tuple[str, Mapping[str, float]]], metrics: Mapping[str, Any]) -> str:
    """Returns the metrics as a Markdown table, after what they were measured on."""
    if not rows:
        return f"Metrics: {NOT_STATED}."
    described = {key: metrics.get(key) or NOT_STATED for key in ("dataset", "split")}
    lines = [
        f"Measured on {described['dataset']} (split: {described['split']}).",
        "",
        "| metric | value |",
        "| --- | --- |",
    ]
    for name, entry in rows:
        interval = f" ({entry['low']:.4g} to {entry['high']:.4g})" if {"low", "high"} <= set(entry) else ""
        lines.append(f"| {name} | {entry['value']:.4g}{interval} |")
    return "\n".join(lines)
