# SPDX-License-Identifier: Apache-2.0
"""Whether the numbers of `dre-slcl evaluate` can be trusted: on cohorts of which the truth is known.

`python -m benchmarks.evaluation_protocol` prints one line of JSON. All cohorts are drawn at random; `--full` draws ten
times as many.

- `bootstrap_speedup`: CPU time of scoring 1000 samples one at a time by scikit-learn, to that of scoring them
  together, 300 slides, 3 classes; `bootstrap_gap`: the largest difference between both. Targets: 20; below 1e-9.
- `leak_by_case`, `leak_by_slide`: AUROC of the nearest neighbour where slides of a case are alike and labels are dealt
  to cases by chance, so that 0.5 is right; folds by case, and folds that ignore cases. Targets: 0.47 to 0.53; none.
- `site_preserved`, `site_mixed`: AUROC, mean over folds, where only the hospital is in the embeddings and hospitals
  differ in their share of the class, so that nothing is known of a new one; `site_preserved_pooled`: of all folds
  together. Targets: 0.45 to 0.55; none; none.
- `shuffled`: mean AUROC of rows with shuffled labels, where labels can be learned (`unshuffled`). Targets: 0.48 to
  0.52; above 0.8.
- `coverage`: how often the 95% interval holds the AUROC of the population, 60 cases of 2 alike slides;
  `coverage_by_slide`: the same with slides drawn rather than cases. Targets: 0.91 to 0.98; none.
- `false_differences`: how often two encoders of equal merit differ with p < 0.05. Target: at most 0.08.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from dre_slcl.training.evaluation.case_bootstrap import draw_cases, paired_difference, score_samples
from dre_slcl.training.evaluation.case_folds import Fold, make_folds
from dre_slcl.training.evaluation.embedding_table import EmbeddingTable, make_table
from dre_slcl.training.evaluation.label_table import TaskLabels
from dre_slcl.training.evaluation.neighbours import NearestNeighbours
from dre_slcl.training.evaluation.null_rows import shuffled_row
from dre_slcl.training.evaluation.protocol import MethodRun, evaluate_method, run_method
from dre_slcl.training.evaluation.prototypes import Prototypes
from dre_slcl.training.evaluation.scores import classification_scores
from dre_slcl.training.evaluation.weighted_scores import weighted_classification

NAMES = ["negative", "positive"]


class Stated:
    """An encoder whose first number is the log odds: nothing is fitted, so the population's score is known."""

    name = "stated"

    def fit(self, features: np.ndarray, targets: np.ndarray, case_ids: Sequence[str], seed: int) -> "Stated":
        """Does nothing."""
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Probabilities of two classes."""
        positive = 1 / (1 + np.exp(-features[:, 0].astype(np.float64)))
        return np.stack([1 - positive, positive], axis=1)


def cohort(
    rng: np.random.Generator, of_case: np.ndarray, slides: int, means: np.ndarray, *, spread: float
) -> tuple[EmbeddingTable, TaskLabels]:
    """Cases with `slides` slides each, around a mean per case."""
    case_ids = np.repeat([f"case{number}" for number in range(len(of_case))], slides).tolist()
    features = np.repeat(means, slides, axis=0) + spread * rng.normal(size=(len(case_ids), means.shape[1]))
    labels = TaskLabels("task", "classification", np.repeat(of_case, slides), NAMES)
    return make_table("slides", [f"slide{row}" for row in range(len(case_ids))], case_ids, features), labels


def area(method: Any, table: EmbeddingTable, labels: TaskLabels, folds: Sequence[Fold]) -> float:
    """AUROC of a method without intervals."""
    return run_method(method, table, labels, folds, (0,), num_bootstrap=0).scores["auroc"].value


def measure_bootstrap(rng: np.random.Generator) -> dict[str, float]:
    """Many samples together against one at a time."""
    references, stated = rng.integers(3, size=300), rng.dirichlet(np.ones(3), size=300)
    weights = draw_cases([f"c{row // 2}" for row in range(300)], num_bootstrap=1000, seed=0)
    start = time.process_time()
    together = weighted_classification(references, stated, weights)
    middle = time.process_time()
    alone = score_samples(lambda sample: classification_scores(references[sample], stated[sample]), weights)
    end = time.process_time()
    gap = max(float(np.nanmax(np.abs(together[name] - alone[name]))) for name in alone)
    return {"bootstrap_speedup": round((end - middle) / (middle - start), 1), "bootstrap_gap": gap}


def measure_leaks(rng: np.random.Generator, repeats: int) -> dict[str, float]:
    """Slides of a case are alike, and labels mean nothing."""
    found: dict[str, list[float]] = {"leak_by_case": [], "leak_by_slide": []}
    for _ in range(repeats):
        of_case = rng.permutation(np.arange(60) % 2)
        table, labels = cohort(rng, of_case, 4, rng.normal(size=(60, 16)), spread=0.3)
        for name, groups in (("leak_by_case", table.case_ids), ("leak_by_slide", table.ids)):
            folds = make_folds(labels, groups, 5, (0,))
            found[name].append(area(NearestNeighbours(2, num_neighbours=1), table, labels, folds))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def measure_sites(rng: np.random.Generator, repeats: int) -> dict[str, float]:
    """Embeddings hold the hospital alone, and hospitals differ in their share of the class."""
    found: dict[str, list[float]] = {"site_preserved": [], "site_mixed": [], "site_preserved_pooled": []}
    for _ in range(repeats):
        site_of_case = np.arange(160) % 16
        share = rng.permutation(np.linspace(0.1, 0.9, 16))
        of_case = (rng.random(160) < share[site_of_case]).astype(int)
        table, labels = cohort(rng, of_case, 1, rng.normal(size=(16, 8))[site_of_case] * 2, spread=1.0)
        sites = [f"site{site}" for site in site_of_case]
        for name, groups in (("site_preserved", sites), ("site_mixed", None)):
            folds = make_folds(labels, table.case_ids, 4, (0,), sites=groups)
            # By fold, since folds of whole sites differ in their share of the class.
            result = run_method(Prototypes(2), table, labels, folds, (0,), num_bootstrap=0)
            if groups is not None:
                found["site_preserved_pooled"].append(result.scores["auroc"].value)
            found[name].append(np.mean([fold["scores"]["auroc"] for fold in result.settings["by_fold"]]))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def measure_shuffles(rng: np.random.Generator, repeats: int) -> dict[str, float]:
    """What shuffled labels leave of an embedding that tells the class."""
    found: dict[str, list[float]] = {"shuffled": [], "unshuffled": []}
    for seed in range(repeats):
        of_case = rng.permutation(np.arange(60) % 3 // 2)
        means = rng.normal(size=(60, 8)) + 2.0 * of_case[:, None] * np.eye(8)[0]
        table, labels = cohort(rng, of_case, 2, means, spread=0.3)
        folds = make_folds(labels, table.case_ids, 5, (seed,))
        row = shuffled_row(Prototypes(2), table, labels, folds, (seed,), num_bootstrap=0)
        found["shuffled"].append(row.scores["auroc"].value)
        run = run_method(Prototypes(2), table, labels, folds, (seed,), num_bootstrap=0)
        found["unshuffled"].append(run.scores["auroc"].value)
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def measure_intervals(rng: np.random.Generator, repeats: int) -> dict[str, float]:
    """Intervals and p-values against the population they are drawn from."""
    num_cases, gap, spread = 60, 1.2, 0.4
    # Log odds of a slide are normal with this standard deviation in either class.
    truth = NormalDist().cdf(gap / np.hypot(1, spread) / np.sqrt(2))
    holds: dict[str, list[bool]] = {"coverage": [], "coverage_by_slide": []}
    false = []
    everything = [Fold("0", np.zeros(0, dtype=np.int64), np.arange(2 * num_cases))]
    for _ in range(repeats):
        of_case = np.arange(num_cases) % 2
        runs: list[MethodRun] = []
        for _ in range(2):
            means = (gap * of_case + rng.normal(size=num_cases))[:, None]
            table, labels = cohort(rng, of_case, 2, means, spread=spread)
            runs.append(evaluate_method(Stated(), table, labels, everything, (0,), num_bootstrap=500))
        low, high = runs[0].result.scores["auroc"].interval
        holds["coverage"].append(low <= truth <= high)
        alone = make_table("slides", table.ids, table.ids, table.features)
        low, high = run_method(Stated(), alone, labels, everything, (0,), num_bootstrap=500).scores["auroc"].interval
        holds["coverage_by_slide"].append(low <= truth <= high)
        difference = paired_difference(*(run.samples["auroc"] for run in runs))
        false.append(difference["p_value"] < 0.05)
    shares = {name: round(float(np.mean(values)), 3) for name, values in holds.items()}
    return shares | {"false_differences": round(float(np.mean(false)), 3)}


def main() -> None:
    """Measures, and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="ten times as many cohorts")
    repeats = 10 if parser.parse_args().full else 1
    rng = np.random.default_rng(0)
    figures = measure_bootstrap(rng)
    figures |= measure_leaks(rng, 20 * repeats)
    figures |= measure_sites(rng, 40 * repeats)
    figures |= measure_shuffles(rng, 60 * repeats)
    figures |= measure_intervals(rng, 300 * repeats)
    is_met = {
        "bootstrap_speedup": figures["bootstrap_speedup"] >= 20,
        "bootstrap_gap": figures["bootstrap_gap"] < 1e-9,
        "leak_by_case": 0.47 <= figures["leak_by_case"] <= 0.53,
        "site_preserved": 0.45 <= figures["site_preserved"] <= 0.55,
        "shuffled": 0.48 <= figures["shuffled"] <= 0.52,
        "unshuffled": figures["unshuffled"] > 0.8,
        "coverage": 0.91 <= figures["coverage"] <= 0.98,
        "false_differences": figures["false_differences"] <= 0.08,
    }
    missed = [name for name, met in is_met.items() if not met]
    print(json.dumps({**figures, "missed": missed, "machine": platform.processor() or platform.machine()}))


if __name__ == "__main__":
    main()
