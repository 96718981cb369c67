# SPDX-License-Identifier: Apache-2.0
"""A slide encoder with a classifier on its slide embedding: trained with labels, alone or beside reports.

Letters: B slides, G slides on all processes, L classes or labels, D feature width.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_dre_slcl import DreSlclConfig
from .contrastive_loss import gather_rows
from .model_outputs import DreSlclClassifierOutput, DreSlclOutput
from .modeling_dre_slcl import DreSlclModel

MISSING_LABEL = -100


def slide_label_loss(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean loss over the labels that are known, over the batch of all processes.

    Args:
        logits (`torch.Tensor` of shape `(B, L)`, float): scores of each slide.
        labels (`torch.Tensor`): single-label: shape `(B,)`, int64, the class, -100 where unknown; multi-label: shape
            `(B, L)`, float, 0 or 1, NaN or -100 where unknown.
        class_weights (`torch.Tensor` of shape `(L,)`, float, *optional*): weight of each class (of a slide's own one)
            or label in the mean.

    Returns:
        `torch.Tensor` of shape `()`: the same on every process; 0 where no label is known.
    """
    logits, labels = gather_rows(logits), gather_rows(labels)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = logits.new_ones(logits.shape[1]) if class_weights is None else class_weights.to(logits)
        if labels.ndim == 1:
            known = labels != MISSING_LABEL
            losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=MISSING_LABEL)
            weights = weights[labels.where(known, 0)] * known
        else:
            known = ~labels.isnan() & (labels != MISSING_LABEL)
            target = labels.to(logits).where(known, 0.0)
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            weights = weights * known
        return (losses * weights).sum() / weights.sum().clamp(min=torch.finfo(logits.dtype).tiny)


class DreSlclForSlideClassification(DreSlclModel):
    """A slide encoder that also names classes: all that `DreSlclModel` does, and `logits` of its labels.

    `config.id2label` names the classes. `config.problem_type` is `"single_label_classification"` (one class holds for
    a slide) or `"multi_label_classification"` (each label holds or not). The weights of a `DreSlclModel` load into it,
    with a new classifier, and its own load into a `DreSlclModel`.

    Example:

    ```python
    model = AutoModelForImageClassification.from_pretrained("namespace/name", trust_remote_code=True)
    model.classify_slide("slide.svs")  # {"LUAD": 0.93, "LUSC": 0.07}
    ```
    """

    def __init__(self, config: DreSlclConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves weights, config and code, for `AutoModelForImageClassification`, `AutoModel` and `pipeline`.

        Arguments as in `PreTrainedModel.save_pretrained`.
        """
        # What is saved names its own class only; the slide encoder inside it is found under `AutoModel`.
        self.config.auto_map = {"AutoModel": f"modeling_dre_slcl.{DreSlclModel.__name__}"}
        super().save_pretrained(save_directory, **kwargs)

    def contrast(
        self,
        outputs: DreSlclOutput,
        report_embeds: torch.Tensor | None = None,
        *args: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        **kwargs: torch.Tensor | None,
    ) -> DreSlclOutput:
        """Adds `loss` from reports, labels, or both; other arguments as in `DreSlclModel.contrast`."""
        if report_embeds is not None:
            outputs = super().contrast(outputs, report_embeds, *args, **kwargs)
        return outputs if labels is None else self.classify(outputs, labels)

    def classify(self, outputs: DreSlclOutput, labels: torch.Tensor | None = None) -> DreSlclClassifierOutput:
        """Scores encoded slides.

        Args:
            outputs (`DreSlclOutput`): with `slide_embedding` of shape `(B, D)`, and `loss` if it was contrasted.
            labels (`torch.Tensor`, *optional*): as in `slide_label_loss`.
        """
        logits, config = self.classifier(outputs.slide_embedding), self.config
        fields = dict(outputs.items()) | {"logits": logits}
        contrastive_loss = fields.pop("loss", None)
        losses = []
        if contrastive_loss is not None:
            fields["contrastive_loss"] = contrastive_loss
            losses.append(config.contrastive_loss_weight * contrastive_loss)
        if labels is not None:
            weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
            fields["label_loss"] = slide_label_loss(logits, labels, weights)
            losses.append(config.label_loss_weight * fields["label_loss"])
        return DreSlclClassifierOutput(loss=sum(losses) if losses else None, **fields)

    def forward(
        self,
        pixel_values: torch.Tensor,
        *args: Any,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DreSlclClassifierOutput | tuple:
        """Encodes tiles, joins them with what is stored of their slides, and scores the slides.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, M, C, H, W)`, float): normalised pixels of each slide's tiles.
            labels (`torch.Tensor`, *optional*): as in `slide_label_loss`.
            return_dict (`bool`, *optional*): return a `DreSlclClassifierOutput` rather than a tuple.
            args, kwargs: as in `DreSlclModel.forward`.
        """
        outputs = self.classify(super().forward(pixel_values, *args, return_dict=True, **kwargs), labels)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    @torch.no_grad()
    def label_probabilities(self, slide_embedding: torch.Tensor) -> dict[str, float]:
        """Probabilities of the labels of one slide.

        Args:
            slide_embedding (`torch.Tensor` of shape `(D,)`): as `encode_slide` gives it.

        Returns:
            `dict`: label -> probability; of classes they sum to 1.
        """
        logits = self.classifier(slide_embedding.to(self.classifier.weight)).double()
        is_multi_label = self.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if is_multi_label else logits.softmax(dim=-1)
        return {self.config.id2label[place]: value for place, value in enumerate(probabilities.tolist())}

    def classify_slide(self, path: str | Path, **kwargs: Any) -> dict[str, float]:
        """Reads and scores one slide; arguments as in `encode_slide`, result as in `label_probabilities`."""
        return self.label_probabilities(self.encode_slide(path, **kwargs)["slide_embedding"])


__all__ = ["DreSlclForSlideClassification"]
