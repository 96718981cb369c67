# SPDX-License-Identifier: Apache-2.0
"""What every arm of `benchmarks.learning` is asked, in the same way, on all tiles of held-out slides.

Letters: S slides, D width of slide embeddings, E joint width, C classes, n seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import balanced_accuracy_score, label_ranking_average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import logging as transformers_logging

from benchmarks.learning_cohort import describe_subtype
from dre_slcl.training.demo.report_writer import SUBTYPES
from dre_slcl.training.reports import ReportEncoder, encode_reports
from dre_slcl.training.tile_source import TileSource

CLASSES = sorted(SUBTYPES)
SCORES = ("probe_auroc", "probe_balanced_accuracy", "slide_to_report_map", "zero_shot_balanced_accuracy")
transformers_logging.disable_progress_bar()


class Cohort:
    """A cohort as all arms see it.

    Args:
        folder (`Path`): from `learning_cohort.write_cohort`.
        seed (`int`): of the cohort and of the runs on it.

    Attributes:
        train, test (`TileSource`): the slides.
        reports (`dict`): split -> frozen encodings of its slides' reports, `(S, R)`.
        prompts (`torch.Tensor` of shape `(C, R)`): frozen encoding of each class's prompt.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.dataset, self.text_model = str(folder / "dataset"), str(folder / "text_model")
        self.train, self.test = (TileSource(self.dataset, split) for split in ("train", "test"))
        encoder = ReportEncoder.from_pretrained(self.text_model, pooling="mean", max_tokens=512)
        cache = folder / "report_cache"
        self.reports = {
            source.split: encode_reports(encoder, [row.report for row in source.slides], cache)
            for source in (self.train, self.test)
        }
        self.prompts = encode_reports(encoder, [describe_subtype(name) for name in CLASSES], cache)

    @property
    def labels(self) -> dict[str, list[str]]:
        """Split -> the subtype of each slide."""
        return {source.split: [row.labels["subtype"] for row in source.slides] for source in (self.train, self.test)}


@dataclass
class SlideVectors:
    """What an arm makes of the slides.

    Args:
        train, test (`np.ndarray` of shape `(S, D)`): slide embeddings.
        test_projection (`torch.Tensor` of shape `(S, E)`, *optional*): L2-normalised, to compare with text; `None` for
            an arm without text.
        project_reports (callable, *optional*): report encodings `(n, R)` -> `(n, E)`, L2-normalised.
    """

    train: np.ndarray
    test: np.ndarray
    test_projection: torch.Tensor | None = None
    project_reports: Callable[[torch.Tensor], torch.Tensor] | None = None


def score(vectors: SlideVectors, cohort: Cohort) -> dict[str, float]:
    """Scores an arm on the held-out slides: a linear probe, and with text retrieval and zero-shot classification."""
    probe = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(
            Cs=np.logspace(-4, 2, 7),
            cv=StratifiedKFold(5, shuffle=True, random_state=cohort.seed),
            scoring="balanced_accuracy",
            max_iter=2000,
        ),
    )
    labels = cohort.labels
    probe.fit(vectors.train, labels["train"])
    scores = _classification(probe.predict_proba(vectors.test), labels["test"])
    found = {f"probe_{name}": value for name, value in scores.items()}
    if vectors.test_projection is not None:
        found |= _with_text(vectors, cohort)
    return found


def _classification(scores: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Scores `(S, C)` in the order of `CLASSES`, which is that of scikit-learn."""
    truth = np.array([CLASSES.index(label) for label in labels])
    return {
        "auroc": float(roc_auc_score(truth, scores, multi_class="ovr")),
        "balanced_accuracy": float(balanced_accuracy_score(truth, scores.argmax(axis=1))),
    }


@torch.no_grad()
def _with_text(vectors: SlideVectors, cohort: Cohort) -> dict[str, float]:
    reports = np.array([row.report for row in cohort.test.slides])
    is_relevant = reports[:, None] == reports[None, :]
    similarity = (vectors.test_projection @ vectors.project_reports(cohort.reports["test"]).T).double().numpy()
    classes = vectors.test_projection @ vectors.project_reports(cohort.prompts).T
    scores = _classification((20 * classes).double().softmax(dim=1).numpy(), cohort.labels["test"])
    # Mean over slides of the average precision with which the slide's own report is found.
    return {
        "slide_to_report_map": float(label_ranking_average_precision_score(is_relevant, similarity)),
        "report_to_slide_map": float(label_ranking_average_precision_score(is_relevant, similarity.T)),
        **{f"zero_shot_{name}": value for name, value in scores.items()},
    }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of values `(n,)` with its 95% interval by Student's t, over seeds as a sample; none below 3 seeds."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 3:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half
