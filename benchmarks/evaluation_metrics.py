# SPDX-License-Identifier: Apache-2.0
"""Scores and metric modules against scikit-learn and scikit-survival on random inputs, and what a score costs.

    python benchmarks/evaluation_metrics.py
    python benchmarks/evaluation_metrics.py --trials 500

Half of the trials have probabilities with one decimal, and so many ties. One line of JSON: `largest_difference_scores`
and `largest_difference_modules`, over all trials and scores (target: below 1e-9), and milliseconds of CPU time of a
call for 300 items with all scores of its kind (target: below 20, so that 1000 bootstrap samples take below 20 s), and
of the AUROC of two classes alone (no target).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from sklearn import metrics
from sksurv.metrics import concordance_index_censored

from dre_slcl.training.evaluation.scores import classification_scores, multilabel_scores, survival_scores

_FOLDER = Path(__file__).parents[1] / "training" / "metrics"
_NUM_ITEMS = 300


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100, help="of random inputs (default: %(default)s)")
    trials = parser.parse_args().trials
    modules = {path.parent.name: evaluate.load(str(path.parent), keep_in_memory=True) for path in _cards()}
    rng = np.random.default_rng(0)
    of_scores, of_modules = 0.0, 0.0
    for trial in range(trials):
        truth, stated, expected = _classes(rng, num_classes=2 + trial % 4, decimals=1 if trial % 2 else 9)
        ours = classification_scores(truth, stated, is_ordered=True)
        of_scores = max(of_scores, *(abs(ours[name] - value) for name, value in expected.items()))
        called = {"references": truth, "predictions": stated.argmax(axis=1)}
        for name, value in expected.items():
            if name in modules:
                needs_classes = name in ("balanced_accuracy", "weighted_f1", "quadratic_kappa")
                inputs = called if needs_classes else {"references": truth, "predictions": stated}
                of_modules = max(of_modules, abs(modules[name].compute(**inputs)[name] - value))
        times, events, risks = rng.exponential(size=60), rng.random(60) < 0.5, rng.normal(size=60).round(1)
        value = concordance_index_censored(events, times, risks)[0]
        of_scores = max(of_scores, abs(survival_scores(times, events, risks)["c_index"] - value))
        found = modules["c_index"].compute(predictions=risks, times=times, events=events)["c_index"]
        of_modules = max(of_modules, abs(found - value))
    figures: dict[str, Any] = {"trials": trials, "items": _NUM_ITEMS}
    figures["largest_difference_scores"], figures["largest_difference_modules"] = of_scores, of_modules
    for name, call in _calls(rng).items():
        figures[f"ms_{name}"] = round(_milliseconds(call), 2)
    print(json.dumps(figures))
    return 0


def _cards() -> list[Path]:
    return sorted(_FOLDER.glob("*/README.md"))


def _classes(
    rng: np.random.Generator, num_classes: int, decimals: int
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Right classes, probabilities, and what scikit-learn makes of them."""
    truth = rng.permutation(np.arange(60) % num_classes)
    stated = rng.dirichlet(np.ones(num_classes), size=60).round(decimals)
    predicted, one_hot = stated.argmax(axis=1), np.eye(num_classes)[truth]
    answers = (truth, stated[:, 1]) if num_classes == 2 else (one_hot, stated)
    return (
        truth,
        stated,
        {
            "auroc": metrics.roc_auc_score(*answers),
            "auprc": metrics.average_precision_score(*answers),
            "balanced_accuracy": metrics.balanced_accuracy_score(truth, predicted),
            "accuracy": metrics.accuracy_score(truth, predicted),
            "weighted_f1": metrics.f1_score(truth, predicted, average="weighted", zero_division=0),
            "quadratic_kappa": metrics.cohen_kappa_score(truth, predicted, weights="quadratic"),
        },
    )


def _calls(rng: np.random.Generator) -> dict[str, Callable[[], Any]]:
    pairs = {
        count: (rng.integers(count, size=_NUM_ITEMS), rng.dirichlet(np.ones(count), _NUM_ITEMS)) for count in (2, 5)
    }
    labels = rng.integers(2, size=(_NUM_ITEMS, 4)).astype(float)
    labels[rng.random(labels.shape) < 0.2] = np.nan
    stated = rng.random(labels.shape)
    times, events, risks = rng.exponential(size=_NUM_ITEMS), rng.random(_NUM_ITEMS) < 0.5, rng.normal(size=_NUM_ITEMS)
    return {
        "two_classes": lambda: classification_scores(*pairs[2]),
        "two_classes_auroc": lambda: classification_scores(*pairs[2], names=("auroc",)),
        "five_classes": lambda: classification_scores(*pairs[5]),
        "four_labels": lambda: multilabel_scores(labels, stated),
        "survival": lambda: survival_scores(times, events, risks),
    }


def _milliseconds(call: Callable[[], Any], repeats: int = 50) -> float:
    """CPU time of a call, the least of three runs."""
    call()
    runs = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(repeats):
            call()
        runs.append((time.process_time() - start) / repeats * 1e3)
    return min(runs)


if __name__ == "__main__":
    sys.exit(main())
