# SPDX-License-Identifier: Apache-2.0
"""What the models return.

Letters: B slides, M sampled tiles of each, K codewords, D feature width, E joint width, L classes or labels.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class DreSlclOutput(ModelOutput):
    """What `DreSlclModel` returns.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): the contrastive loss, when reports were given.
        slide_embedding (`torch.Tensor` of shape `(B, D)`): one vector per slide, for probes, clustering and
            slide-to-slide search. Not comparable with text.
        slide_projection (`torch.Tensor` of shape `(B, E)`): L2-normalised; compare with `report_projection` and
            `get_text_features`.
        report_projection (`torch.Tensor` of shape `(B, E)`, *optional*): L2-normalised.
        logits_per_slide (`torch.Tensor` of shape `(B, B)`, *optional*): scaled similarities of this process's slides
            (rows) and reports (columns).
        residuals (`torch.Tensor` of shape `(B, K, D)`): residual sums per codeword, not normalised.
        codeword_counts (`torch.Tensor` of shape `(B, K)`): tiles per codeword.
        tile_features (`torch.Tensor` of shape `(B, M, D)`): L2-normalised features of the given tiles.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, K, D)`, *optional*): codeword tokens before each layer
            of the residual encoder and after the last.
        attentions (`tuple` of `torch.Tensor` of shape `(B, heads, K, K)`, *optional*): its attention weights.
    """

    loss: torch.FloatTensor | None = None
    slide_embedding: torch.FloatTensor | None = None
    slide_projection: torch.FloatTensor | None = None
    report_projection: torch.FloatTensor | None = None
    logits_per_slide: torch.FloatTensor | None = None
    residuals: torch.FloatTensor | None = None
    codeword_counts: torch.Tensor | None = None
    tile_features: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DreSlclClassifierOutput(DreSlclOutput):
    """What `DreSlclForSlideClassification` returns, beside the fields of `DreSlclOutput`.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): weighted sum of the two losses below.
        contrastive_loss (`torch.Tensor` of shape `()`, *optional*): when reports were given.
        label_loss (`torch.Tensor` of shape `()`, *optional*): when labels were given.
        logits (`torch.Tensor` of shape `(B, L)`): scores of classes (before softmax) or labels (before sigmoid).
    """

    contrastive_loss: torch.FloatTensor | None = None
    label_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
