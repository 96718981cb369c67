# SPDX-License-Identifier: Apache-2.0
"""The smallest models that have every part: used by many tests, built in milliseconds."""

from typing import Any

import torch
from transformers import BertConfig, BertTokenizer, TimmWrapperConfig, ViTConfig

from modeling_dre_slcl import DreSlclConfig, DreSlclImageProcessor, DreSlclModel

IMAGE_SIZE = 32
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "of", "tumor", "normal", "tissue", "slide", "grade"]


def tiny_vit_config(**changes: Any) -> ViTConfig:
    """A ViT of width 32 on 32 px tiles in patches of 8 px."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    return ViTConfig(**{**sizes, "image_size": IMAGE_SIZE, "patch_size": 8, **changes})


def tiny_timm_config() -> TimmWrapperConfig:
    """A ConvNeXt of timm, of width 32."""
    model_args = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 32]}
    return TimmWrapperConfig(architecture="convnext_atto", model_args=model_args)


def tiny_bert_config() -> BertConfig:
    """A BERT of width 24."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=32, **sizes)


def tiny_config(encoder: str = "vit", *, text: bool = False, **changes: Any) -> DreSlclConfig:
    """A tiny slide encoder's config.

    Args:
        encoder (`str`, defaults to `"vit"`): the tile encoder, `"vit"` or `"timm"`.
        text (`bool`, defaults to `False`): put a text model in, with a linear projection.
        changes: other fields of `DreSlclConfig`.

    Returns:
        `DreSlclConfig`: D = 32, K = 4, E = 16, R = 16 (24 with a text model).
    """
    fields = {
        "encoder_config": tiny_vit_config() if encoder == "vit" else tiny_timm_config(),
        "tile_pooling": "cls" if encoder == "vit" else "pooler",
        "hidden_size": 32,
        "num_codewords": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "projection_size": 16,
        "report_hidden_size": 16,
        "tile_size_px": IMAGE_SIZE,
    }
    if text:
        fields |= {"text_config": tiny_bert_config(), "report_hidden_size": 24, "text_projection": "linear"}
    return DreSlclConfig(**{**fields, **changes})


def tiny_model(encoder: str = "vit", *, seed: int = 0, **options: Any) -> DreSlclModel:
    """A tiny slide encoder with random weights, in evaluation mode; options as in `tiny_config`.

    Its codewords lie where features lie, so that a handful of tiles meets several of them.
    """
    torch.manual_seed(seed)
    model = DreSlclModel(tiny_config(encoder, **options)).eval()
    tiles = torch.randn(4 * model.config.num_codewords, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        model.codebook.copy_(model.get_tile_features(tiles)[::4])
    return model


def tiny_image_processor() -> DreSlclImageProcessor:
    """The image processor for the tiny tile encoders."""
    return DreSlclImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def tiny_tokenizer() -> BertTokenizer:
    """A tokenizer of twelve words, for the tiny text model."""
    return BertTokenizer(vocab={word: index for index, word in enumerate(VOCABULARY)}, model_max_length=32)
