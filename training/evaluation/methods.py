# SPDX-License-Identifier: Apache-2.0
"""Which methods there are for a task, by name."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .each_label import EachLabel
from .few_shot import HEADS, SHOTS, FewShot
from .label_table import TaskLabels
from .linear_probe import LinearProbe
from .mlp_head import MlpHead
from .neighbours import NearestNeighbours
from .prototypes import Prototypes
from .regression import RidgeHead
from .survival import CoxHead

# Method of classes -> its objects for C classes.
_CLASSIFIERS: dict[str, Callable[[int], list[Any]]] = {
    "linear_probe": lambda num_classes: [LinearProbe(num_classes)],
    "knn": lambda num_classes: [NearestNeighbours(num_classes)],
    "prototypes": lambda num_classes: [Prototypes(num_classes)],
    "mlp": lambda num_classes: [MlpHead(num_classes)],
    "few_shot": lambda num_classes: [FewShot(num_classes, shots, head) for head in HEADS for shots in SHOTS],
}
METHODS: dict[str, dict[str, Callable[[TaskLabels], list[Any]]]] = {
    "classification": {
        name: lambda labels, make=make: make(len(labels.classes)) for name, make in _CLASSIFIERS.items()
    },
    "multilabel": {
        name: lambda labels, make=make: [EachLabel(method, labels.classes) for method in make(2)]
        for name, make in _CLASSIFIERS.items()
        if name != "few_shot"
    },
    "regression": {"ridge": lambda labels: [RidgeHead()]},
    "survival": {"cox": lambda labels: [CoxHead()]},
}
DEFAULT_METHODS = {
    "classification": ("linear_probe", "knn", "prototypes"),
    "multilabel": ("linear_probe", "knn"),
}


def method_names() -> list[str]:
    """The names of all methods, of any kind of task."""
    return list(dict.fromkeys(name for kind in METHODS.values() for name in kind))


def make_methods(
    labels: TaskLabels, names: Sequence[str] | None, smallest_class: int | None = None
) -> tuple[list[Any], list[str]]:
    """Makes the methods of a task.

    Args:
        labels (`TaskLabels`): the task.
        names (sequence of `str`, *optional*): the methods wanted; by default those that suit the kind.
        smallest_class (`int`, *optional*): cases of the rarest class in the smallest training part; few-shot rows
            that ask for more are left out.

    Returns:
        `tuple`: the methods, and notes of what was left out.

    Raises:
        ValueError: if no such method does this kind of task.
    """
    known = METHODS.get(labels.kind, {})
    names = list(names) if names else list(DEFAULT_METHODS.get(labels.kind, known))
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise ValueError(
            f"--methods: {', '.join(wrong) or 'none'} cannot do a task of kind {labels.kind}; it can be done by "
            f"{', '.join(known) or 'no method here'}."
        )
    methods, notes = [], []
    for method in (method for name in names for method in known[name](labels)):
        if isinstance(method, FewShot) and smallest_class is not None and method.shots > smallest_class:
            notes.append(f"{method.name}: a training part has only {smallest_class} cases of a class")
        else:
            methods.append(method)
    return methods, notes


def smallest_class_size(labels: TaskLabels, case_ids: Sequence[str], train_parts: Sequence[np.ndarray]) -> int:
    """Cases of the rarest class in the smallest training part.

    Args:
        labels (`TaskLabels`): a classification task.
        case_ids (sequence of `str`): of its items.
        train_parts (sequence of `np.ndarray` of int): rows of the training parts.
    """
    cases = np.asarray(case_ids)
    return min(
        len(np.unique(cases[part][labels.targets[part] == place]))
        for part in train_parts
        for place in range(len(labels.classes))
    )
