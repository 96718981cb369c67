# SPDX-License-Identifier: Apache-2.0
"""Class names and prompt templates -> one text vector per class, against which slides are compared."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .text_embeddings import TextEmbeddings

PLACEHOLDER = "CLASSNAME"

# Ways in which reports state a diagnosis; their mean depends less on wording than any one of them.
DEFAULT_TEMPLATES = (
    "CLASSNAME.",
    "Diagnosis: CLASSNAME.",
    "Final diagnosis: CLASSNAME.",
    "Histology shows CLASSNAME.",
    "Microscopic findings of CLASSNAME.",
    "The specimen contains CLASSNAME.",
    "Tissue section with CLASSNAME.",
    "A whole slide image of CLASSNAME.",
    "A histopathology slide of CLASSNAME.",
    "H&E stained section of CLASSNAME.",
    "The findings are consistent with CLASSNAME.",
    "CLASSNAME is present.",
)


def write_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Puts each name of a class into each template.

    Args:
        names (sequence of `str`): the names (synonyms) of one class.
        templates (sequence of `str`): prompts that hold the literal token `CLASSNAME`.

    Returns:
        `list` of `str`: the prompts, all templates of the first name first.

    Raises:
        ValueError: if a template lacks `CLASSNAME`, or there is no template or no name.
    """
    if isinstance(templates, str) or not templates:
        raise ValueError(f"Expected a list of at least one prompt template, got {templates!r}.")
    for template in templates:
        if PLACEHOLDER not in template:
            raise ValueError(f"Prompt template {template!r} must contain the literal token {PLACEHOLDER}.")
    if isinstance(names, str) or not names:
        raise ValueError(f"Each class needs a list of at least one name, got {names!r}.")
    return [template.replace(PLACEHOLDER, name) for name in names for template in templates]


def ensemble_classes(
    texts: TextEmbeddings, class_names: Sequence[Sequence[str]], templates: Sequence[str] = DEFAULT_TEMPLATES
) -> torch.Tensor:
    """One vector per class: the mean of its prompts' normalised projections, normalised again.

    Args:
        texts (`TextEmbeddings`): the text side of a model.
        class_names (sequence of sequences of `str`): the names (synonyms) of each class.
        templates (sequence of `str`, *optional*): prompts that hold the literal token `CLASSNAME`.

    Returns:
        `torch.Tensor` of shape `(number of classes, E)`, float32, on CPU, L2-normalised.

    Raises:
        ValueError: as `write_prompts`.
    """
    prompts = [write_prompts(names, templates) for names in class_names]
    vectors = texts.embed([prompt for of_class in prompts for prompt in of_class])
    means = [part.mean(dim=0) for part in vectors.split([len(of_class) for of_class in prompts])]
    return F.normalize(torch.stack(means), dim=-1)


def class_probabilities(
    model: PreTrainedModel, slide_projection: torch.Tensor, classifier: torch.Tensor
) -> torch.Tensor:
    """Probabilities of classes, at the temperature that the model was trained with.

    Args:
        model (`DreSlclModel`): the model.
        slide_projection (`torch.Tensor` of shape `(..., E)`, float): L2-normalised.
        classifier (`torch.Tensor` of shape `(C, E)`, float): from `ensemble_classes`.

    Returns:
        `torch.Tensor` of shape `(..., C)`, float32, on CPU: they sum to 1.
    """
    scale = model.logit_scale.detach().float().cpu().exp().clamp(max=model.config.max_logit_scale)
    return (scale * slide_projection.float().cpu() @ classifier.float().cpu().T).softmax(dim=-1)


def zero_shot_classifier(
    model: PreTrainedModel,
    tokenizer: Any,
    class_names: Sequence[Sequence[str]],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
) -> torch.Tensor:
    """Builds a zero-shot classifier from text.

    Args:
        model (`DreSlclModel`): with a text model inside.
        tokenizer (`PreTrainedTokenizerBase` or `DreSlclProcessor`): its tokenizer.
        class_names (sequence of sequences of `str`): the names (synonyms) of each class.
        templates (sequence of `str`, *optional*): prompts that hold the literal token `CLASSNAME`.

    Returns:
        `torch.Tensor` of shape `(number of classes, E)`, L2-normalised, on the model's device: the mean over templates
        and synonyms. `slide_projection @ classifier.T` gives the similarity to each class.

    Raises:
        ValueError: as `write_prompts`, or if no text model ships with the model.
    """
    return ensemble_classes(TextEmbeddings(model, tokenizer), class_names, templates).to(model.device)


__all__ = [
    "DEFAULT_TEMPLATES",
    "PLACEHOLDER",
    "class_probabilities",
    "ensemble_classes",
    "write_prompts",
    "zero_shot_classifier",
]
