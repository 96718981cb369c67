# SPDX-License-Identifier: Apache-2.0
"""Classes by text alone, on stored slide projections.

Letters: n items, C classes, E joint width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from modeling_dre_slcl.text_embeddings import TextEmbeddings
from modeling_dre_slcl.zero_shot import DEFAULT_TEMPLATES, ensemble_classes

from .case_folds import Fold
from .embedding_table import EmbeddingTable
from .label_table import TaskLabels
from .null_rows import SHUFFLED, chance_row, shuffle_labels
from .protocol import run_method
from .scores import MAIN_METRIC
from .task_result import TaskResult


class ZeroShot:
    """Compares slide projections with the texts of classes; there is nothing to fit.

    It takes the place of a trained method in `run_method`, so that it can be scored on the same held-out items.

    Args:
        model (`DreSlclModel`): with a text model inside.
        tokenizer (`PreTrainedTokenizerBase` or `DreSlclProcessor`): its tokenizer.
        class_names (sequence of sequences of `str`): the names (synonyms) of each of the C classes, in their order.
        templates (sequence of `str`): prompts with the token `CLASSNAME`.

    Raises:
        ValueError: if no text model ships with the model, or a template lacks `CLASSNAME`.
    """

    name = "zero_shot"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        class_names: Sequence[Sequence[str]],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
    ) -> None:
        classifier = ensemble_classes(TextEmbeddings(model, tokenizer), class_names, templates)
        # The model itself is not kept: methods are copied for every fold.
        self._similarity_scale = model.logit_scale.detach().float().cpu().exp().clamp(max=model.config.max_logit_scale)
        self.classifier = classifier
        self.settings: dict[str, Any] = {}

    def fit(self, features: np.ndarray, targets: np.ndarray, case_ids: Sequence[str], seed: int) -> "ZeroShot":
        """Does nothing."""
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Probabilities `(n, C)` of slide projections `(n, E)`."""
        width = self.classifier.shape[1]
        if features.shape[1] != width:
            raise ValueError(
                f"Zero-shot needs slide projections of width {width}, the model's joint space; found width "
                f"{features.shape[1]}. Take the column `slide_projection`."
            )
        vectors = torch.nn.functional.normalize(torch.from_numpy(np.array(features, dtype=np.float64)), dim=-1)
        logits = self._similarity_scale.double() * vectors @ self.classifier.double().T
        return logits.softmax(dim=-1).numpy()


def evaluate_zero_shot(
    table: EmbeddingTable,
    labels: TaskLabels,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    class_names: Mapping[str, Sequence[str]] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    folds: Sequence[Fold] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    num_bootstrap: int = 1000,
) -> TaskResult:
    """Evaluates zero-shot classification of stored slide projections.

    Args:
        table (`EmbeddingTable`): the n items' `slide_projection`.
        labels (`TaskLabels`): their classes.
        model (`DreSlclModel`), tokenizer: see `ZeroShot`.
        class_names (mapping, *optional*): class -> its names in text; by default the labels themselves.
        templates (sequence of `str`): prompts with the token `CLASSNAME`.
        folds (sequence of `Fold`, *optional*): their test parts are asked; by default all items.
        seeds (sequence of `int`): of shuffled labels.
        num_bootstrap (`int`, defaults to 1000): samples of whole cases for intervals.

    Raises:
        ValueError: if the task is no classification, a class has no names, or widths differ.
    """
    if labels.kind != "classification":
        raise ValueError(f"Zero-shot asks for classes; task {labels.task} is of kind {labels.kind}.")
    missing = [name for name in labels.classes if class_names is not None and name not in class_names]
    if missing:
        raise ValueError(f"class_names: task {labels.task} has class '{missing[0]}', which has no names.")
    names = [[name] if class_names is None else list(class_names[name]) for name in labels.classes]
    method = ZeroShot(model, tokenizer, names, templates)
    everything = np.arange(len(table))
    if folds is None:
        folds = [Fold("all", train=everything[:0], test=everything)]
    options = {"folds": folds, "num_bootstrap": num_bootstrap}
    row = run_method(method, table, labels, seeds=[seeds[0]], **options)
    dealt = shuffle_labels(labels, table.case_ids, seeds[0])
    null = run_method(method, table, dealt, seeds=[seeds[0]], encoder=SHUFFLED, is_null=True, **options)
    held_out = np.unique(np.concatenate([fold.test for fold in folds]))
    return TaskResult(
        task=f"{labels.task}, zero-shot",
        kind="classification",
        rows=[row, null, chance_row(labels, folds)],
        main_metric=MAIN_METRIC["classification"],
        classes=labels.classes,
        num_items=len(held_out),
        num_cases=len({table.case_ids[place] for place in held_out}),
        protocol={
            "class_names": dict(zip(labels.classes, names, strict=True)),
            "templates": list(templates),
            "num_bootstrap": num_bootstrap,
            "seeds": [seeds[0]],
        },
    )
