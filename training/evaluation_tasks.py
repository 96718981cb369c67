# SPDX-License-Identifier: Apache-2.0
"""The tasks that a model is evaluated by, on slides it embeds once.

Letters: S slides, U distinct reports, C classes, E joint width, R width of report encodings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from transformers import PreTrainedModel

from .embed_split import EmbeddedSplit, embed_split
from .evaluation.case_bootstrap import bootstrap_intervals
from .evaluation.retrieval_chance import retrieval_chance
from .evaluation.scores import chance_scores, classification_scores
from .metrics.recall_at_k.rank_gallery import rank_queries, recall_scores
from .tile_source import TileSource

ReportEmbedder = Callable[[Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class EvaluationSetup:
    """What both models are asked, and how: the arguments of `evaluate_model`, checked and completed.

    Args:
        classes (`list` of `str`): the C classes in the order of scores; empty without a label column.
        class_names (`dict`, *optional*): class -> names; `None` leaves zero-shot classification out.
        report_embeds_fn (callable, *optional*): reports -> encodings `(n, R)`, float; `None` leaves retrieval out.
    """

    image_processor: Any
    tokenizer: Any
    source_test: TileSource
    source_train: TileSource | None
    label_column: str | None
    classes: list[str]
    class_names: dict[str, list[str]] | None
    templates: Sequence[str]
    report_embeds_fn: ReportEmbedder | None
    seed: int
    num_bootstrap: int
    batch_size: int
    progress: bool


@dataclass
class Answers:
    """What one model answered.

    Args:
        test (`EmbeddedSplit`): the held-out slides.
        train (`EmbeddedSplit`, *optional*): the training slides, for the linear probe.
        tasks (`dict`): task -> its metrics.
        columns (`dict`): column of the predictions -> a value per held-out slide.
        reports (`list` of `str`): the U distinct reports; empty without retrieval.
        report_projection (`np.ndarray` of shape `(U, E)`, float32, *optional*): L2-normalised.
    """

    test: EmbeddedSplit
    train: EmbeddedSplit | None
    tasks: dict[str, dict[str, Any]]
    columns: dict[str, list[Any]]
    reports: list[str]
    report_projection: np.ndarray | None


def group_slides(case_ids: Sequence[str], reports: Sequence[str]) -> list[str]:
    """Names a group for each slide: slides of one case, and of cases that share a report, are in one group.

    Args:
        case_ids (sequence of `str`), reports (sequence of `str`): of each slide.

    Returns:
        `list` of `str`: a case of each slide's group, the same for the whole group.
    """
    parent = {case_id: case_id for case_id in case_ids}

    def root(case_id: str) -> str:
        while parent[case_id] != case_id:
            parent[case_id] = case_id = parent[parent[case_id]]
        return case_id

    first_case: dict[str, str] = {}
    for case_id, report in zip(case_ids, reports, strict=True):
        parent[root(case_id)] = root(first_case.setdefault(report, case_id))
    return [root(case_id) for case_id in case_ids]


def answer_tasks(model: PreTrainedModel, setup: EvaluationSetup) -> Answers:
    """Embeds the slides and does every task that there is material for."""
    embed = {"batch_size": setup.batch_size, "progress": setup.progress}
    test = embed_split(model, setup.image_processor, setup.source_test, **embed)
    train = None
    if setup.source_train is not None and setup.classes:
        train = embed_split(model, setup.image_processor, setup.source_train, **embed)
    answers = Answers(test, train, tasks={}, columns={}, reports=[], report_projection=None)
    if setup.class_names is not None:
        _zero_shot(model, setup, answers)
    if setup.report_embeds_fn is not None and any(report.strip() for report in test.reports):
        _retrieval(model, setup, answers)
    if train is not None:
        _linear_probe(setup, answers)
    if not answers.tasks:
        raise ValueError(
            "There is nothing to evaluate: give a label column, or reports and a text model to compare slides with."
        )
    return answers


@torch.inference_mode()
def _zero_shot(model: PreTrainedModel, setup: EvaluationSetup, answers: Answers) -> None:
    names = [setup.class_names[name] for name in setup.classes]
    classifier = model.zero_shot_classifier(setup.tokenizer, names, setup.templates).double().cpu()
    scale = model.logit_scale.double().exp().clamp(max=model.config.max_logit_scale).cpu()
    # Probabilities, since AUROC compares slides: bare similarities also rise and fall for all classes together.
    similarity = torch.from_numpy(answers.test.slide_projection).double() @ classifier.T
    _classification("zero_shot", (scale * similarity).softmax(dim=-1).numpy(), setup, answers)


def _linear_probe(setup: EvaluationSetup, answers: Answers) -> None:
    from .evaluation.linear_probe import fit_linear_probe, probe_scores

    labels = _labels(answers.train.labels[setup.label_column])
    known = [place for place, label in enumerate(labels) if label is not None]
    probe, strength = fit_linear_probe(
        answers.train.slide_embedding[known],
        [labels[place] for place in known],
        [answers.train.case_ids[place] for place in known],
        seed=setup.seed,
    )
    _classification("linear_probe", probe_scores(probe, answers.test.slide_embedding, setup.classes), setup, answers)
    answers.tasks["linear_probe"]["inverse_regularisation"] = strength


def _classification(task: str, scores: np.ndarray, setup: EvaluationSetup, answers: Answers) -> None:
    """Scores `(S, C)` -> the task's metrics, and a prediction per slide."""
    labels = _labels(answers.test.labels[setup.label_column])
    known = [place for place, label in enumerate(labels) if label is not None]
    references = np.array([setup.classes.index(labels[place]) for place in known])
    stated = scores[known]
    options = {"names": ("balanced_accuracy", "auroc", "accuracy")}
    answers.tasks[task] = {
        **classification_scores(references, stated, **options),
        "interval": bootstrap_intervals(
            lambda sample: classification_scores(references[sample], stated[sample], **options),
            [answers.test.case_ids[place] for place in known],
            references.tolist(),
            num_bootstrap=setup.num_bootstrap,
            seed=setup.seed,
        ),
        "chance": chance_scores("classification", references, len(setup.classes), **options),
        "confusion": confusion_matrix(references, stated.argmax(axis=1), labels=range(len(setup.classes))).tolist(),
        "num_slides": len(known),
    }
    answers.columns["label"] = labels
    answers.columns[f"{task}_class"] = [setup.classes[column] for column in scores.argmax(axis=1)]
    answers.columns[f"{task}_scores"] = [dict(zip(setup.classes, row, strict=True)) for row in scores.tolist()]


@torch.inference_mode()
def _retrieval(model: PreTrainedModel, setup: EvaluationSetup, answers: Answers) -> None:
    test = answers.test
    known = [place for place, report in enumerate(test.reports) if report.strip()]
    reports = [test.reports[place] for place in known]
    groups = group_slides([test.case_ids[place] for place in known], reports)
    group_of_report = dict(zip(reports, groups, strict=True))
    answers.reports = list(group_of_report)
    encoded = setup.report_embeds_fn(answers.reports).to(model.device)
    answers.report_projection = model.get_report_projection(encoded).float().cpu().numpy()
    slides, texts = (test.slide_projection[known], groups), (answers.report_projection, list(group_of_report.values()))
    ranks = {}
    for task, (queries, query_groups), (gallery, gallery_groups) in (
        ("slide_to_report", slides, texts),
        ("report_to_slide", texts, slides),
    ):
        answers.tasks[task], ranks[task] = _ranked(queries, query_groups, gallery, gallery_groups, setup)
    rank_of = dict(zip(known, ranks["slide_to_report"].tolist(), strict=True))
    answers.columns["report_rank"] = [rank_of.get(place) for place in range(len(test))]


def _ranked(
    queries: np.ndarray,
    query_groups: Sequence[str],
    gallery: np.ndarray,
    gallery_groups: Sequence[str],
    setup: EvaluationSetup,
) -> tuple[dict[str, Any], np.ndarray]:
    """A task's metrics, and the rank of the first right answer of each query."""
    ranks, precisions, num_relevant = rank_queries(queries, query_groups, gallery, gallery_groups)
    metrics = {
        **recall_scores(ranks, precisions),
        "interval": bootstrap_intervals(
            lambda sample: recall_scores(ranks[sample], precisions[sample]),
            query_groups,
            num_bootstrap=setup.num_bootstrap,
            seed=setup.seed,
        ),
        "chance": retrieval_chance(num_relevant, len(gallery)),
        "num_queries": len(ranks),
        "gallery_size": len(gallery),
    }
    return metrics, ranks


def _labels(values: Sequence[Any]) -> list[str | None]:
    return [label_text(value) for value in values]


def label_text(value: Any) -> str | None:
    """A label as text; `None` where the slide has none."""
    return str(value) if value is not None and str(value).strip() else None
