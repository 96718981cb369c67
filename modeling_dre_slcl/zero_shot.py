# SPDX-License-Identifier: Apache-2.0
"""Class names and prompt templates -> one text vector per class, against which slides are compared."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

PLACEHOLDER = "CLASSNAME"


@torch.no_grad()
def zero_shot_classifier(
    model: PreTrainedModel, tokenizer: Any, class_names: Sequence[Sequence[str]], templates: Sequence[str]
) -> torch.Tensor:
    """Builds a zero-shot classifier from text.

    Args:
        model (`DreSlclModel`): with a text model inside.
        tokenizer (`PreTrainedTokenizerBase` or `DreSlclProcessor`): its tokenizer.
        class_names (sequence of sequences of `str`): the names (synonyms) of each class.
        templates (sequence of `str`): prompts that hold the literal token `CLASSNAME`.

    Returns:
        `torch.Tensor` of shape `(number of classes, E)`, L2-normalised, on the model's device: the mean over templates
        and synonyms. `slide_projection @ classifier.T` gives the similarity to each class.

    Raises:
        ValueError: if a template lacks `CLASSNAME`, or a class has no name.
    """
    for template in templates:
        if PLACEHOLDER not in template:
            raise ValueError(f"Prompt template {template!r} must contain the literal token {PLACEHOLDER}.")
    vectors = []
    for names in class_names:
        if isinstance(names, str) or not names:
            raise ValueError(f"Each class needs a list of at least one name, got {names!r}.")
        prompts = [template.replace(PLACEHOLDER, name) for name in names for template in templates]
        tokens = tokenizer(text=prompts, padding=True, truncation=True, return_tensors="pt").to(model.device)
        text_features = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        vectors.append(F.normalize(text_features.mean(dim=0), dim=-1))
    return torch.stack(vectors)
