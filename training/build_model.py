# SPDX-License-Identifier: Apache-2.0
"""The settings of a run -> the model, its processor, and the encoder of reports."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from modeling_dre_slcl import (
    DreSlclConfig,
    DreSlclForSlideClassification,
    DreSlclImageProcessor,
    DreSlclModel,
    DreSlclProcessor,
)
from modeling_dre_slcl.tile_encoder import build_tile_encoder, tile_encoder_width

from .config import TrainConfig
from .lora import merge_lora, save_adapter
from .pretrained import check_loaded, load_pretrained
from .pretrained_encoder import Preprocessing, check_input_size, encoder_source, load_tile_encoder
from .reports import ReportEncoder
from .slide_labels import SlideLabels

_HALF = [0.5, 0.5, 0.5]  # of HIPT's ViT-256, and of nobody else in particular


@dataclass
class ModelParts:
    """What a run trains and publishes.

    Args:
        model (`DreSlclModel`): the model.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        report_encoder (`ReportEncoder`, *optional*): the frozen text model; inside the model, if it ships. `None`
            where only labels are trained on.
    """

    model: DreSlclModel
    image_processor: DreSlclImageProcessor
    report_encoder: ReportEncoder | None

    def save_pretrained(self, folder: str, config: TrainConfig) -> None:
        """Writes model, processor and tokenizer, ready for `AutoModel`, `AutoProcessor` and `pipeline`."""
        if config.lora is not None and config.lora_export == "adapter":
            save_adapter(self.model, Path(folder), config.lora, encoder_source(config.tile_encoder))
        else:
            if config.lora is not None:
                merge_lora(self.model.tile_encoder)
            self.model.save_pretrained(folder)
        if self.model.text_encoder is None or self.report_encoder is None:
            self.image_processor.save_pretrained(folder)
        else:
            tokenizer = self.report_encoder.tokenizer
            if hasattr(tokenizer, "backend_tokenizer"):
                # It remembers how it was last called; a run whose reports came from the cache never called it.
                tokenizer.backend_tokenizer.no_truncation()
                tokenizer.backend_tokenizer.no_padding()
            DreSlclProcessor(self.image_processor, tokenizer).save_pretrained(folder)


def build_model(
    config: TrainConfig, *, tile_size_px: int, tile_mpp: float, labels: SlideLabels | None = None
) -> ModelParts:
    """Builds or loads what a run trains.

    Args:
        config (`TrainConfig`): the settings.
        tile_size_px (`int`), tile_mpp (`float`): geometry of the dataset, which becomes the model's.
        labels (`SlideLabels`, *optional*): what the classifier names, unless the objective is contrastive.

    Returns:
        `ModelParts`, with weights initialised by the global random state where they are not loaded.

    Raises:
        ValueError: for settings that do not fit together, or weights that are missing or pickled.
    """
    label_fields = {} if labels is None else _label_fields(config, labels)
    if config.model is not None:
        return _load_parts(config, label_fields)
    text = _text_model(config, config.model_config.get("text_pooling", "mean"))
    encoder, expects = _tile_encoder(config)
    size = config.encoder_image_size_px or expects.size_px or tile_size_px
    check_input_size(encoder, size, tile_size_px)
    model_config = _model_config(config, encoder, text, tile_size_px, tile_mpp)
    model_config.update(label_fields)
    model = (DreSlclModel if labels is None else DreSlclForSlideClassification)(model_config)
    if config.tile_encoder is not None:
        if getattr(model.tile_encoder, "pooler", None) is None and hasattr(encoder, "pooler"):
            encoder.pooler = None
        model.tile_encoder = encoder
    if text is not None and config.ship_text_model:
        model.text_encoder = text.model
        text.tokenizer.model_max_length = text.max_tokens
    image_processor = DreSlclImageProcessor(
        size={"height": size, "width": size},
        do_resize=size != tile_size_px,
        image_mean=config.image_mean or expects.mean or _HALF,
        image_std=config.image_std or expects.std or _HALF,
    )
    return ModelParts(model, image_processor, text)


def _label_fields(config: TrainConfig, labels: SlideLabels) -> dict[str, Any]:
    """Fields of `DreSlclConfig` that say what the classifier names."""
    unknown = sorted(set(config.class_weights) - set(labels.names))
    if unknown:
        raise ValueError(f"`class_weights` names {unknown[0]!r}, which is none of {', '.join(labels.names)}.")
    weights = [float(config.class_weights.get(name, 1.0)) for name in labels.names]
    return {
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: place for place, name in enumerate(labels.names)},
        "problem_type": labels.problem_type,
        "class_weights": weights if config.class_weights else None,
        "contrastive_loss_weight": config.contrastive_weight,
        "label_loss_weight": config.label_weight,
    }


def _text_model(config: TrainConfig, pooling: str) -> ReportEncoder | None:
    if config.objective == "labels":
        return None
    return ReportEncoder.from_pretrained(config.text_model, pooling=pooling, max_tokens=config.max_report_tokens)


def _tile_encoder(config: TrainConfig) -> tuple[PreTrainedModel, Preprocessing]:
    """The pretrained tile encoder, or one from scratch, of which only width and config serve."""
    if config.tile_encoder is not None:
        return load_tile_encoder(config.tile_encoder)
    settings = dict(config.tile_encoder_config)
    encoder_config = AutoConfig.for_model(settings.pop("model_type", "vit"), **settings)
    return build_tile_encoder(encoder_config, "pooler"), Preprocessing()


def _model_config(
    config: TrainConfig, encoder: PreTrainedModel, text: ReportEncoder | None, tile_size_px: int, tile_mpp: float
) -> DreSlclConfig:
    known = {item.name for item in dataclasses.fields(DreSlclConfig)} - {"encoder_config", "text_config"}
    for name in config.model_config:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"Unknown field `{name}` in `model_config`{f'; did you mean `{nearest[0]}`?' if nearest else ''}"
            )
    width = tile_encoder_width(encoder)
    settings: dict[str, Any] = {
        "encoder_config": _published(encoder.config, config.tile_encoder),
        "hidden_size": width,
        "tile_pooling": "pooler" if hasattr(encoder, "timm_model") else "cls",
        # Heads of 64, as in ViT-S, where the width allows.
        "num_attention_heads": width // 64 if width % 64 == 0 else 1,
        "intermediate_size": 4 * width,
        "report_hidden_size": width if text is None else text.hidden_size,
        "projection_size": width if text is None else text.hidden_size,
        "contrastive_loss": config.contrastive_loss,
        "tile_size_px": tile_size_px,
        "tile_mpp": tile_mpp,
    }
    if text is not None and config.ship_text_model:
        settings["text_config"] = _published(text.model.config, config.text_model)
    if config.contrastive_loss == "siglip":
        settings["logit_scale_init_value"] = math.log(10)  # as SigLIP's authors start it, beside a bias of -10
    return DreSlclConfig(**(settings | config.model_config))


def _published(config: PreTrainedConfig, source: str | None) -> PreTrainedConfig:
    """A sub-config without the local path it came from, which would be published with the model."""
    if source is not None:
        source = encoder_source(source)
        config.name_or_path = "" if source.startswith((".", "/")) or Path(source).exists() else source
    return config


def _load_parts(config: TrainConfig, label_fields: dict[str, Any]) -> ModelParts:
    """Loads a DRE-SLCL model to go on from; a classifier is new unless the model has one."""
    classes = (DreSlclForSlideClassification, ("classifier.",)) if label_fields else (DreSlclModel, ())
    model_class, may_lack = classes
    model_config = AutoConfig.from_pretrained(config.model)
    model_config.update(label_fields | {"auto_map": None})
    if config.contrastive_loss != model_config.contrastive_loss and config.objective != "labels":
        raise ValueError(
            f"{config.model} was trained with `contrastive_loss: {model_config.contrastive_loss}`, not "
            f"{config.contrastive_loss}; go on with its own."
        )
    model, loading = load_pretrained(config.model, model_class, config=model_config, output_loading_info=True)
    check_loaded(config.model, model, loading, may_lack=may_lack, may_exceed=("classifier.",))
    image_processor = AutoImageProcessor.from_pretrained(config.model)
    if model.text_encoder is not None:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        pooling = model.config.text_pooling
        text = ReportEncoder(model.text_encoder, tokenizer, pooling=pooling, max_tokens=config.max_report_tokens)
    elif config.text_model is None and config.objective != "labels":
        raise ValueError(
            f"{config.model} ships without a text model; give the one it was trained with (`text_model`)."
        )
    else:
        text = _text_model(config, model.config.text_pooling)
    return ModelParts(model, image_processor, text)
