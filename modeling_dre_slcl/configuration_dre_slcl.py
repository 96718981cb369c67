# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The DRE-SLCL authors.
"""Every number that the slide encoder's forward pass depends on, including the geometry of its tiles."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# HIPT's ViT-256: ViT-S/16 on tiles of 256 px.
PAPER_TILE_ENCODER = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "image_size": 256,
    "patch_size": 16,
}


@strict
class DreSlclConfig(PreTrainedConfig):
    r"""Configuration of a DRE-SLCL slide encoder. The defaults have the paper's sizes (arXiv 2511.05034).

    What the paper's public summaries leave open (number of codewords, pooling of the codeword tokens, temperature)
    holds a value of ours.

    Args:
        encoder_config (`dict` or `PreTrainedConfig`, *optional*):
            The tile encoder: any vision model of transformers, or a timm model through `timm_wrapper`. Defaults to
            HIPT's ViT-256 (ViT-S/16 at 256 px).
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The text model that encodes reports and queries, when it ships inside the model. `None` leaves text to the
            caller, who passes `report_embeds`.
        hidden_size (`int`, defaults to 384): width D of tile features, codewords and slide embeddings.
        tile_pooling (`str`, defaults to `"cls"`):
            How the tile encoder's output becomes one vector: `"cls"` (first token), `"mean"` (over tokens or
            positions) or `"pooler"` (the encoder's own pooling, the right one for timm models).
        num_codewords (`int`, defaults to 16): number K of codewords in the K-means codebook.
        codeword_tokens (`str`, defaults to `"mean"`):
            How a codeword's tiles become its token: `"mean"`, the mean of their features, which weighs as much as the
            codeword has tiles, or `"vlad"` (the paper), their residual sum at unit length, all of the same weight.
        num_hidden_layers (`int`, defaults to 2): layers of the Transformer over codeword tokens.
        num_attention_heads (`int`, defaults to 6): its attention heads.
        intermediate_size (`int`, defaults to 1536): width of its feed-forward layers.
        hidden_dropout_prob (`float`, defaults to 0.0): its dropout.
        layer_norm_eps (`float`, defaults to 1e-6): epsilon of its layer norms.
        initializer_range (`float`, defaults to 0.02): standard deviation of initial weights.
        projection_size (`int`, defaults to 4096): width E of the space where slides and reports are compared.
        report_hidden_size (`int`, defaults to 4096): width R of report encodings (4096 for LLaMA-2-7B).
        text_projection (`str`, defaults to `"none"`):
            `"none"` compares slides with report encodings as they are (the paper; needs `report_hidden_size ==
            projection_size`), `"linear"` learns a linear projection of them.
        text_pooling (`str`, defaults to `"mean"`): how token states become one report encoding: `"mean"`, `"cls"` or
            `"last"`.
        logit_scale_init_value (`float`, defaults to 2.6592): initial logarithm of the logit scale.
        max_logit_scale (`float`, defaults to 100.0): upper bound of the logit scale.
        contrastive_loss (`str`, defaults to `"infonce"`):
            `"infonce"` (the paper) or `"siglip"`, with a learned bias; SigLIP starts from a logit scale of 10.
        logit_bias_init_value (`float`, defaults to -10.0): initial bias of SigLIP.
        contrastive_loss_weight (`float`, defaults to 1.0), label_loss_weight (`float`, defaults to 1.0):
            weights of the two losses of `DreSlclForSlideClassification`.
        class_weights (`list[float]`, *optional*): weight of each class or label in its loss.
        tile_size_px (`int`, defaults to 256): side of a tile in px at `tile_mpp`.
        tile_mpp (`float`, defaults to 0.5): resolution of a tile in um/px.
    """

    model_type = "dre_slcl"
    sub_configs_defaults = {  # noqa: RUF012 (transformers' own convention)
        "encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="vit", init_kwargs=PAPER_TILE_ENCODER),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
    }

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    hidden_size: int = 384
    tile_pooling: Literal["cls", "mean", "pooler"] = "cls"
    num_codewords: int = 16
    codeword_tokens: Literal["mean", "vlad"] = "mean"
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    hidden_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    projection_size: int = 4096
    report_hidden_size: int = 4096
    text_projection: Literal["none", "linear"] = "none"
    text_pooling: Literal["mean", "cls", "last"] = "mean"
    logit_scale_init_value: float = 2.6592
    max_logit_scale: float = 100.0
    contrastive_loss: Literal["infonce", "siglip"] = "infonce"
    logit_bias_init_value: float | int = -10.0
    contrastive_loss_weight: float | int = 1.0
    label_loss_weight: float | int = 1.0
    class_weights: list[float | int] | None = None
    tile_size_px: int = 256
    tile_mpp: float | int = 0.5

    def validate_architecture(self) -> None:
        """Checks that the numbers fit together.

        Raises:
            ValueError: naming the fields that do not, and what they should be.
        """
        super().validate_architecture()
        for name in ("num_codewords", "hidden_size", "projection_size", "num_attention_heads", "tile_size_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.text_projection == "none" and self.report_hidden_size != self.projection_size:
            raise ValueError(
                f"`text_projection='none'` compares slides with report encodings as they are, so `projection_size` "
                f"({self.projection_size}) must equal `report_hidden_size` ({self.report_hidden_size}); set them "
                "equal or choose `text_projection='linear'`."
            )
        if self.class_weights is not None and len(self.class_weights) != self.num_labels:
            raise ValueError(f"`class_weights` has {len(self.class_weights)} entries for {self.num_labels} labels.")
        if not 0.05 <= self.tile_mpp <= 10:
            raise ValueError(f"`tile_mpp` must lie between 0.05 and 10 um/px, got {self.tile_mpp}.")


__all__ = ["DreSlclConfig"]
