# SPDX-License-Identifier: Apache-2.0
"""The settings of a run -> the model, its processor, and the encoder of reports."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from modeling_dre_slcl import DreSlclConfig, DreSlclImageProcessor, DreSlclModel, DreSlclProcessor
from modeling_dre_slcl.tile_encoder import build_tile_encoder, tile_encoder_width

from .config import TrainConfig
from .pretrained import load_pretrained
from .reports import ReportEncoder


@dataclass
class ModelParts:
    """What a run trains and publishes.

    Args:
        model (`DreSlclModel`): the model.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        report_encoder (`ReportEncoder`): the frozen text model; inside the model, if it ships.
    """

    model: DreSlclModel
    image_processor: DreSlclImageProcessor
    report_encoder: ReportEncoder

    def save_pretrained(self, folder: str) -> None:
        """Writes model, processor and tokenizer, ready for `AutoModel`, `AutoProcessor` and `pipeline`."""
        self.model.save_pretrained(folder)
        if self.model.text_encoder is None:
            self.image_processor.save_pretrained(folder)
        else:
            tokenizer = self.report_encoder.tokenizer
            if hasattr(tokenizer, "backend_tokenizer"):
                # It remembers how it was last called; a run whose reports came from the cache never called it.
                tokenizer.backend_tokenizer.no_truncation()
                tokenizer.backend_tokenizer.no_padding()
            DreSlclProcessor(self.image_processor, tokenizer).save_pretrained(folder)


def build_model(config: TrainConfig, *, tile_size_px: int, tile_mpp: float) -> ModelParts:
    """Builds or loads what a run trains.

    Args:
        config (`TrainConfig`): the settings.
        tile_size_px (`int`), tile_mpp (`float`): geometry of the dataset, which becomes the model's.

    Returns:
        `ModelParts`, with weights initialised by the global random state where they are not loaded.

    Raises:
        ValueError: for settings that do not fit together.
    """
    if config.model is not None:
        return _load_parts(config)
    text = ReportEncoder.from_pretrained(
        config.text_model,
        pooling=config.model_config.get("text_pooling", "mean"),
        max_tokens=config.max_report_tokens,
    )
    encoder = _tile_encoder(config)
    model_config = _model_config(config, encoder, text, tile_size_px, tile_mpp)
    model = DreSlclModel(model_config)
    if config.tile_encoder is not None:
        if getattr(model.tile_encoder, "pooler", None) is None and hasattr(encoder, "pooler"):
            encoder.pooler = None
        model.tile_encoder = encoder
    if config.ship_text_model:
        model.text_encoder = text.model
        text.tokenizer.model_max_length = text.max_tokens
    size = config.encoder_image_size_px or tile_size_px
    image_processor = DreSlclImageProcessor(
        size={"height": size, "width": size},
        do_resize=size != tile_size_px,
        image_mean=config.image_mean,
        image_std=config.image_std,
    )
    return ModelParts(model, image_processor, text)


def _tile_encoder(config: TrainConfig) -> PreTrainedModel:
    """The pretrained tile encoder, or one from scratch, of which only width and config serve."""
    if config.tile_encoder is None:
        settings = dict(config.tile_encoder_config)
        encoder_config = AutoConfig.for_model(settings.pop("model_type", "vit"), **settings)
        return build_tile_encoder(encoder_config, "pooler")
    encoder, loading = load_pretrained(config.tile_encoder, output_loading_info=True)
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"The weights of tile encoder {config.tile_encoder} are incomplete: {len(missing)} tensors are missing, "
            f"for example `{missing[0]}`."
        )
    return encoder


def _model_config(
    config: TrainConfig, encoder: PreTrainedModel, text: ReportEncoder, tile_size_px: int, tile_mpp: float
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
        "encoder_config": encoder.config,
        "text_config": _published(text.model.config, config.text_model) if config.ship_text_model else None,
        "hidden_size": width,
        "tile_pooling": "pooler" if hasattr(encoder, "timm_model") else "cls",
        # Heads of 64, as in ViT-S, where the width allows.
        "num_attention_heads": width // 64 if width % 64 == 0 else 1,
        "intermediate_size": 4 * width,
        "report_hidden_size": text.hidden_size,
        "projection_size": text.hidden_size,
        "tile_size_px": tile_size_px,
        "tile_mpp": tile_mpp,
    }
    return DreSlclConfig(**(settings | config.model_config))


def _published(config: PreTrainedConfig, source: str) -> PreTrainedConfig:
    """A sub-config without the local path it came from, which would be published with the model."""
    config.name_or_path = "" if source.startswith((".", "/")) else source
    return config


def _load_parts(config: TrainConfig) -> ModelParts:
    """Loads a DRE-SLCL model to go on from."""
    model = load_pretrained(config.model)
    image_processor = AutoImageProcessor.from_pretrained(config.model)
    if model.text_encoder is not None:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        pooling = model.config.text_pooling
        text = ReportEncoder(model.text_encoder, tokenizer, pooling=pooling, max_tokens=config.max_report_tokens)
    elif config.text_model is None:
        raise ValueError(
            f"{config.model} ships without a text model; give the one it was trained with (`text_model`)."
        )
    else:
        text = ReportEncoder.from_pretrained(
            config.text_model, pooling=model.config.text_pooling, max_tokens=config.max_report_tokens
        )
    return ModelParts(model, image_processor, text)
