# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The DRE-SLCL authors.
"""The slide encoder: wires tile encoder, memory bank, residual encoder and contrastive loss (arXiv 2511.05034).

Letters: B slides, M sampled tiles of each, N tiles, C channels, H and W pixels, K codewords, D feature width,
R width of report encodings, E joint width, T text tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from .configuration_dre_slcl import DreSlclConfig
from .contrastive_loss import similarity_logits, slide_level_contrastive_loss
from .memory_bank import MemoryBank
from .model_outputs import DreSlclOutput
from .report_encoder import pool_report_states
from .residual_encoder import ResidualEncoder, residual_sums
from .residual_estimate import MovedSums, estimate_residuals
from .slide_interfaces import SlideInterfaces
from .tile_encoder import build_tile_encoder, encode_in_parts, encode_tiles, tile_encoder_width


class DreSlclPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of DRE-SLCL models."""

    config: DreSlclConfig
    config_class = DreSlclConfig
    base_model_prefix = "dre_slcl"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("CodewordLayer",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ResidualEncoder):
            init.normal_(module.codeword_embedding, std=std)
            # Random codewords on the scale of the features, until K-means fits them.
            init.normal_(module.codebook, std=self.config.hidden_size**-0.5)
        elif isinstance(module, DreSlclModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)
            init.zeros_(module.report_mean)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, every_n_layers: int = 1
    ) -> None:
        """Checkpoints the tile encoder, where nearly all activations are; timm models have a switch of their own."""
        self.gradient_checkpointing = enable
        if hasattr(self.tile_encoder, "timm_model"):
            self.tile_encoder._set_gradient_checkpointing(enable)
            return
        kwargs = {"gradient_checkpointing_func": gradient_checkpointing_func} if gradient_checkpointing_func else {}
        self.tile_encoder._set_gradient_checkpointing(enable=enable, **kwargs)


class DreSlclModel(SlideInterfaces, DreSlclPreTrainedModel):
    """A whole-slide encoder: tiles of a slide -> one embedding per slide, comparable with pathology reports.

    Example:

    ```python
    model = AutoModel.from_pretrained("namespace/name", trust_remote_code=True)
    result = model.encode_slide("slide.svs")
    result["slide_embedding"].shape  # (hidden_size,)
    ```

    Raises:
        ValueError: if `hidden_size` or `report_hidden_size` of the config differs from the width of the tile encoder
            or of the text model.
    """

    def __init__(self, config: DreSlclConfig) -> None:
        super().__init__(config)
        self.tile_encoder = build_tile_encoder(config.encoder_config, config.tile_pooling)
        _check_width("hidden_size", config.hidden_size, tile_encoder_width(self.tile_encoder), "tile encoder")
        self.memory_bank = MemoryBank(config.hidden_size, config.num_codewords)
        self.residual_encoder = ResidualEncoder(
            hidden_size=config.hidden_size,
            num_codewords=config.num_codewords,
            codeword_tokens=config.codeword_tokens,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            dropout=config.hidden_dropout_prob,
            layer_norm_eps=config.layer_norm_eps,
        )
        self.slide_projection = nn.Linear(config.hidden_size, config.projection_size)
        self.text_encoder = None
        if config.text_config is not None:
            self.text_encoder = AutoModel.from_config(config.text_config).requires_grad_(False)
            if getattr(self.text_encoder, "pooler", None) is not None:
                self.text_encoder.pooler = None
            width = config.text_config.hidden_size
            _check_width("report_hidden_size", config.report_hidden_size, width, "text model")
        self.text_projection = nn.Identity()
        if config.text_projection == "linear":
            self.text_projection = nn.Linear(config.report_hidden_size, config.projection_size)
        # The part that a frozen text model gives to every report; training sets it, and zero changes nothing.
        self.register_buffer("report_mean", torch.zeros(config.report_hidden_size))
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        is_siglip = config.contrastive_loss == "siglip"
        self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init_value))) if is_siglip else None
        self.gradient_checkpointing = False
        # Parts in which `forward` takes its tiles through the tile encoder; training sets it.
        self.accumulation_steps = 1
        # Relative to the module given to DistributedDataParallel: each process keeps its own part of the bank.
        self._ddp_params_and_buffers_to_ignore = [f"memory_bank.{name}" for name in MemoryBank.BUFFER_NAMES]
        self.post_init()

    def train(self, mode: bool = True) -> "DreSlclModel":
        """Switches training behaviour on or off, but never in the text model: it is frozen, dropout included."""
        super().train(mode)
        if self.text_encoder is not None:
            # Frozen again here, because `from_pretrained` makes every parameter it loads trainable, then calls `eval`.
            self.text_encoder.eval().requires_grad_(False)
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        """Returns the tile encoder's patch embedding, where it has one."""
        return self.tile_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the tile encoder's patch embedding."""
        self.tile_encoder.set_input_embeddings(value)

    def get_tile_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes tiles.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`, float): normalised pixels.

        Returns:
            `torch.Tensor` of shape `(N, D)`: L2-normalised features.
        """
        return encode_tiles(self.tile_encoder, pixel_values, self.config.tile_pooling)

    def get_report_projection(self, report_embeds: torch.Tensor) -> torch.Tensor:
        """Brings report encodings `(B, R)` to the joint space: `torch.Tensor` of shape `(B, E)`, L2-normalised."""
        centered = report_embeds.to(self.report_mean) - self.report_mean
        return F.normalize(self.text_projection(centered), dim=-1)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes reports or queries with the text model that ships inside this model.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, int64): token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real tokens.

        Returns:
            `torch.Tensor` of shape `(B, E)`: L2-normalised; the dot product with `slide_projection` is the cosine.

        Raises:
            ValueError: if no text model ships with this model.
        """
        return self.get_report_projection(self.encode_reports(input_ids, attention_mask))

    @torch.no_grad()
    def encode_reports(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes reports with the frozen text model, before projection: `(B, T)` ids -> `(B, R)`, float.

        Raises:
            ValueError: if no text model ships with this model.
        """
        if self.text_encoder is None:
            raise ValueError(
                "This model ships without a text model (`text_config` is None). Encode the text with the model that "
                "it was trained with (see its card) and pass the result as `report_embeds`."
            )
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool_report_states(states, attention_mask, self.config.text_pooling)

    def encode_residuals(
        self, residuals: torch.Tensor, counts: torch.Tensor, need_weights: bool = False
    ) -> DreSlclOutput:
        """Residual sums -> slide embedding and projection.

        Args:
            residuals (`torch.Tensor` of shape `(B, K, D)`, float): residual sums, not normalised.
            counts (`torch.Tensor` of shape `(B, K)`): tiles per codeword.
            need_weights (`bool`, defaults to `False`): also return attention weights.

        Returns:
            `DreSlclOutput` with `slide_embedding`, `slide_projection`, `residuals`, `codeword_counts`,
            `hidden_states` and `attentions`.
        """
        encoded = self.residual_encoder(residuals, counts, need_weights=need_weights)
        return DreSlclOutput(
            slide_embedding=encoded.slide_embedding,
            slide_projection=F.normalize(self.slide_projection(encoded.slide_embedding), dim=-1),
            residuals=residuals,
            codeword_counts=counts,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def contrast(
        self,
        outputs: DreSlclOutput,
        report_embeds: torch.Tensor,
        group_ids: torch.Tensor | None = None,
        negative_embeds: torch.Tensor | None = None,
        negative_group_ids: torch.Tensor | None = None,
    ) -> DreSlclOutput:
        """Compares encoded slides with their reports: adds `report_projection`, `logits_per_slide` and `loss`.

        Args:
            outputs (`DreSlclOutput`): with `slide_projection` of shape `(B, E)`.
            report_embeds (`torch.Tensor` of shape `(B, R)`, float): the reports' encodings.
            group_ids (`torch.Tensor` of shape `(B,)` or `(B, C)`, *optional*): as in `slide_level_contrastive_loss`.
            negative_embeds (`torch.Tensor` of shape `(P, R)`, *optional*): encodings of reports that are only
                negatives.
            negative_group_ids (`torch.Tensor` of shape `(P,)` or `(P, C)`, *optional*): their groups.
        """
        outputs.report_projection = self.get_report_projection(report_embeds)
        pair = (outputs.slide_projection, outputs.report_projection)
        scale = self.logit_scale.exp().clamp(max=self.config.max_logit_scale)
        outputs.logits_per_slide = similarity_logits(*pair, scale)
        if self.logit_bias is not None:
            outputs.logits_per_slide = outputs.logits_per_slide + self.logit_bias
        negatives = None if negative_embeds is None else self.get_report_projection(negative_embeds)
        outputs.loss = slide_level_contrastive_loss(
            *pair,
            scale,
            group_ids,
            logit_bias=self.logit_bias,
            negative_projection=negatives,
            negative_group_ids=negative_group_ids,
        )
        return outputs

    def get_slide_features(self, tile_features: torch.Tensor, tile_mask: torch.Tensor | None = None) -> DreSlclOutput:
        """Features of a slide's tiles -> slide embedding.

        Args:
            tile_features (`torch.Tensor` of shape `(B, N, D)`, float): from `get_tile_features`.
            tile_mask (`torch.Tensor` of shape `(B, N)`, bool, *optional*): False for padding.

        Returns:
            `DreSlclOutput`, as `encode_residuals`, with `tile_features`.
        """
        residuals, counts = residual_sums(tile_features, self.residual_encoder.codebook, tile_mask)
        outputs = self.encode_residuals(residuals, counts)
        outputs.tile_features = tile_features
        return outputs

    @property
    def codebook(self) -> torch.Tensor:
        """The codewords: `torch.Tensor` of shape `(K, D)`."""
        return self.residual_encoder.codebook

    def encode_slide(self, path: str | Path, **kwargs: Any) -> dict[str, Any]:
        """Reads, tiles and encodes one slide; arguments and result as in `slide_inference.encode_slide`."""
        from .slide_inference import encode_slide

        return encode_slide(self, path, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves weights, config and this code, so that the folder (or the Hub) serves `AutoModel` and `pipeline`.

        Arguments as in `PreTrainedModel.save_pretrained`.
        """
        # Named here so that transformers, which follows relative imports, carries the pipelines along.
        from .pipeline_dre_slcl import TASK, SlideFeatureExtractionPipeline
        from .zero_shot_pipeline import ZERO_SHOT_TASK, ZeroShotSlideClassificationPipeline

        implementations = {TASK: f"pipeline_dre_slcl.{SlideFeatureExtractionPipeline.__name__}"}
        if self.text_encoder is not None:
            implementations[ZERO_SHOT_TASK] = f"zero_shot_pipeline.{ZeroShotSlideClassificationPipeline.__name__}"
        self.config.custom_pipelines = {
            task: {"impl": implementation, "pt": ["AutoModel"]} for task, implementation in implementations.items()
        }
        super().save_pretrained(save_directory, **kwargs)

    def forward(
        self,
        pixel_values: torch.Tensor,
        tile_mask: torch.Tensor | None = None,
        tile_weights: torch.Tensor | None = None,
        stored_residuals: torch.Tensor | None = None,
        stored_counts: torch.Tensor | None = None,
        dropped_codewords: torch.Tensor | None = None,
        stored_tile_features: torch.Tensor | None = None,
        stored_tile_ages: torch.Tensor | None = None,
        stored_tile_mask: torch.Tensor | None = None,
        moved_sums: MovedSums | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        report_embeds: torch.Tensor | None = None,
        group_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        negative_embeds: torch.Tensor | None = None,
        negative_group_ids: torch.Tensor | None = None,
    ) -> DreSlclOutput | tuple:
        """Encodes tiles and joins them with what is stored of their slides.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, M, C, H, W)`, float): normalised pixels of each slide's tiles.
            tile_mask (`torch.Tensor` of shape `(B, M)`, bool, *optional*): False for padding.
            tile_weights, stored_residuals, stored_counts, dropped_codewords, stored_tile_features, stored_tile_ages,
                stored_tile_mask, moved_sums: what stands for the slides' other tiles, as in
                `residual_estimate.estimate_residuals`.
            input_ids (`torch.Tensor` of shape `(B, T)`, *optional*): the reports' token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real tokens.
            report_embeds (`torch.Tensor` of shape `(B, R)`, *optional*): the reports' encodings, instead of
                `input_ids`.
            group_ids (`torch.Tensor` of shape `(B,)` or `(B, C)`, *optional*): as in `slide_level_contrastive_loss`.
            output_hidden_states (`bool`, *optional*): return the codeword tokens of every layer.
            output_attentions (`bool`, *optional*): return the residual encoder's attention weights.
            return_dict (`bool`, *optional*): return a `DreSlclOutput` rather than a tuple.
            negative_embeds, negative_group_ids (`torch.Tensor`, *optional*): as in `contrast`.

        Returns:
            `DreSlclOutput`.
        """
        tile_features = self._encode_tiles(pixel_values)
        residuals, counts = estimate_residuals(
            tile_features,
            self.codebook,
            tile_mask,
            tile_weights=tile_weights,
            stored_residuals=stored_residuals,
            stored_counts=stored_counts,
            dropped_codewords=dropped_codewords,
            stored_tile_features=stored_tile_features,
            stored_tile_ages=stored_tile_ages,
            stored_tile_mask=stored_tile_mask,
            moved_sums=moved_sums,
        )
        outputs = self.encode_residuals(residuals, counts, self._wants(output_attentions))
        outputs.tile_features = tile_features
        if input_ids is not None and report_embeds is None:
            report_embeds = self.encode_reports(input_ids, attention_mask)
        if report_embeds is not None:
            outputs = self.contrast(outputs, report_embeds, group_ids, negative_embeds, negative_group_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        fields = dict(outputs.items())
        if not output_hidden_states:
            fields.pop("hidden_states")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = DreSlclOutput(**fields)
        return outputs if return_dict else outputs.to_tuple()

    def _encode_tiles(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, M, C, H, W)` -> features `(B, M, D)`."""
        if pixel_values.ndim != 5:
            raise ValueError(
                "`pixel_values` must have shape (slides, tiles, channels, height, width), got "
                f"{tuple(pixel_values.shape)}; for tiles without slides use `get_tile_features`."
            )
        # (B, M, C, H, W) -> (B M, C, H, W) -> (B, M, D)
        features = encode_in_parts(self.get_tile_features, pixel_values.flatten(0, 1), self.accumulation_steps)
        return features.unflatten(0, pixel_values.shape[:2])

    def _wants(self, output_attentions: bool | None) -> bool:
        return bool(self.config.output_attentions if output_attentions is None else output_attentions)


def _check_width(field: str, stated: int, found: int, part: str) -> None:
    if stated != found:
        raise ValueError(f"`{field}` is {stated}, but the {part} is {found} wide; set `{field}={found}`.")


__all__ = ["DreSlclModel", "DreSlclOutput", "DreSlclPreTrainedModel"]
