# SPDX-License-Identifier: Apache-2.0
"""A method over folds and seeds -> predictions of held-out items -> scores with intervals.

A method is any object with `fit(features (n, D), targets, case_ids, seed)` and `predict(features) -> (n, C) or (n,)`,
a `name`, and if it likes: `settings` (a `dict`, read after each fit), `uses_validation = True` (then `fit` takes
`is_validation (n,)`, bool, too), `num_episodes` (fits for each fold and seed). A survival target is a structured array
of event and time; a prediction of it is a risk.

Letters: n items, r held-out items of one seed, C classes, L labels, B bootstrap samples.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn

from .case_bootstrap import draw_cases, percentile_interval, score_samples
from .case_folds import Fold, strata_of
from .embedding_table import EmbeddingTable
from .label_table import TaskLabels
from .one_thread import one_thread
from .scores import classification_scores, multilabel_scores, regression_scores, survival_scores
from .task_result import MethodResult, Score
from .weighted_scores import weighted_classification, weighted_multilabel

_PROBABILITIES = ("classification", "multilabel")
_WEIGHTS_AT_ONCE = 4_000_000  # of samples x items: 32 MB for each of a few arrays


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What one seed, and one episode of a few-shot method, predicted of held-out items.

    Args:
        seed (`int`), episode (`int`): whose predictions these are.
        rows (`np.ndarray` of shape `(r,)`, int): the items; one that several folds hold out occurs as often.
        folds (`list` of `str`): the fold of each.
        predictions (`np.ndarray` of shape `(r, C)`, `(r, L)` or `(r,)`, float): of each.
    """

    seed: int
    episode: int
    rows: np.ndarray
    folds: list[str]
    predictions: np.ndarray


@dataclass(frozen=True, eq=False)
class MethodRun:
    """A row of results, and its scores in every bootstrap sample, for differences from other rows.

    Args:
        result (`MethodResult`): the row.
        samples (`dict`): score -> float64 `(B,)`, mean over seeds; empty without a bootstrap.
    """

    result: MethodResult
    samples: dict[str, np.ndarray]


def run_method(
    method: Any,
    table: EmbeddingTable,
    labels: TaskLabels,
    folds: Sequence[Fold],
    seeds: Sequence[int],
    *,
    num_bootstrap: int = 1000,
    encoder: str | None = None,
    is_null: bool = False,
    progress: Callable[[], None] | None = None,
) -> MethodResult:
    """Runs a method and scores what it predicts of held-out items.

    Args:
        method (`Any`): see above; it is copied for every fit.
        table (`EmbeddingTable`): the n items.
        labels (`TaskLabels`): their answers.
        folds (sequence of `Fold`): those without a seed serve every seed.
        seeds (sequence of `int`): of methods, and of folds that have seeds.
        num_bootstrap (`int`, defaults to 1000): samples of whole cases for the intervals.
        encoder (`str`, *optional*): how the row calls the embeddings; default: the table's name.
        is_null (`bool`, defaults to `False`): whether the row only shows what is reached without merit.
        progress (callable, *optional*): called after each fit.

    Returns:
        `MethodResult`: a score is the mean over seeds, within a seed over all held-out items together; `settings`
        holds what was chosen in each fold, and the scores of each fold.

    Raises:
        ValueError: if a prediction has another shape than the targets ask for, or is not finite.
    """
    options = {"num_bootstrap": num_bootstrap, "encoder": encoder, "is_null": is_null, "progress": progress}
    return evaluate_method(method, table, labels, folds, seeds, **options).result


def evaluate_method(
    method: Any,
    table: EmbeddingTable,
    labels: TaskLabels,
    folds: Sequence[Fold],
    seeds: Sequence[int],
    *,
    num_bootstrap: int = 1000,
    encoder: str | None = None,
    is_null: bool = False,
    progress: Callable[[], None] | None = None,
) -> MethodRun:
    """As `run_method`, and keeps the scores of every bootstrap sample."""
    held_out, chosen = predict_folds(method, table, labels, folds, seeds, progress=progress)
    by_run = [score_predictions(labels, one.rows, one.predictions, folds=one.folds) for one in held_out]
    names = [name for name in by_run[0] if all(name in scores for scores in by_run)]
    samples = _bootstrap(table, labels, held_out, names, num_bootstrap)
    scores = {}
    for name in names:
        by_seed = [
            float(np.mean([run[name] for run, one in zip(by_run, held_out, strict=True) if one.seed == seed]))
            for seed in seeds
        ]
        interval = percentile_interval(samples[name]) if name in samples else None
        scores[name] = Score(float(np.mean(by_seed)), interval, by_seed)
    settings = {"chosen": chosen, "by_fold": _scores_by_fold(labels, held_out)}
    predictions = _prediction_rows(table, labels, held_out)
    name = encoder if encoder is not None else table.name
    return MethodRun(MethodResult(method.name, name, scores, is_null, settings, predictions), samples)


def predict_folds(
    method: Any,
    table: EmbeddingTable,
    labels: TaskLabels,
    folds: Sequence[Fold],
    seeds: Sequence[int],
    *,
    progress: Callable[[], None] | None = None,
) -> tuple[list[HeldOut], list[dict[str, Any]]]:
    """Fits a method on the training part of every fold, and predicts its test part.

    Args:
        method (`Any`), table (`EmbeddingTable`), labels (`TaskLabels`), folds (sequence of `Fold`),
            seeds (sequence of `int`), progress (callable, *optional*): as for `run_method`.

    Returns:
        `tuple`: predictions of each seed and episode, and what the method chose in each fold.
    """
    held_out, chosen = [], []
    for seed in seeds:
        of_seed = [fold for fold in folds if fold.seed in (None, seed)]
        if not of_seed:
            raise ValueError(f"There is no fold for seed {seed}.")
        for episode in range(getattr(method, "num_episodes", 1)):
            rows, names, predictions = [], [], []
            for place, fold in enumerate(of_seed):
                fit_seed = int(np.random.SeedSequence([seed, place, episode]).generate_state(1)[0] & 0x7FFFFFFF)
                head = copy.deepcopy(method)
                try:
                    found = _fit_and_predict(head, table, labels, fold, fit_seed)
                except ValueError as error:
                    raise ValueError(f"{method.name}, fold {fold.name}, seed {seed}: {error}") from error
                _check_predictions(method.name, labels, found, len(fold.test))
                rows.append(fold.test)
                names += [fold.name] * len(fold.test)
                predictions.append(found)
                if episode == 0 and getattr(head, "settings", None):
                    chosen.append({"seed": int(seed), "fold": fold.name, **head.settings})
                if progress is not None:
                    progress()
            parts = np.concatenate(rows), names, np.concatenate(predictions)
            held_out.append(HeldOut(int(seed), episode, *parts))
    return held_out, chosen


def _fit_and_predict(head: Any, table: EmbeddingTable, labels: TaskLabels, fold: Fold, fit_seed: int) -> np.ndarray:
    """Predictions of a fold's test part; a method that has no use for a validation part learns from it too."""
    fitted = np.concatenate([fold.train, fold.validation])
    options = {}
    if getattr(head, "uses_validation", False) and len(fold.validation):
        options["is_validation"] = np.arange(len(fitted)) >= len(fold.train)
    case_ids = [table.case_ids[row] for row in fitted]
    # Features were checked when they were read, and looking again would take as long as a small fit.
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True), one_thread():
        head.fit(table.features[fitted], labels.targets[fitted], case_ids, fit_seed, **options)
        return np.asarray(head.predict(table.features[fold.test]), dtype=np.float64)


def _check_predictions(name: str, labels: TaskLabels, found: np.ndarray, count: int) -> None:
    shape = (count, len(labels.classes)) if labels.kind in _PROBABILITIES else (count,)
    if found.shape != shape or not np.isfinite(found).all():
        raise ValueError(
            f"{name}: predictions for a task of kind {labels.kind} must be finite and of shape {shape}, found "
            f"{found.shape}."
        )


def score_predictions(
    labels: TaskLabels,
    rows: np.ndarray,
    predictions: np.ndarray,
    names: Collection[str] | None = None,
    *,
    folds: Sequence[str] | np.ndarray | None = None,
) -> dict[str, float]:
    """Scores predictions of some items by the functions of `scores`.

    Args:
        labels (`TaskLabels`): of the n items.
        rows (`np.ndarray` of shape `(r,)`, int): the items predicted.
        predictions (`np.ndarray` of shape `(r, C)`, `(r, L)` or `(r,)`, float): of these.
        names (collection of `str`, *optional*): the scores wanted.
        folds (sequence of `str`, *optional*): of these; risks, which have no common scale, are compared within a fold.

    Returns:
        `dict`: score -> value; what these items leave undefined is not there.
    """
    truth = labels.targets[rows]
    if labels.kind == "classification":
        return classification_scores(truth, predictions, is_ordered=labels.is_ordered, names=names)
    if labels.kind == "multilabel":
        return multilabel_scores(truth, predictions, names=names)
    if labels.kind == "regression":
        return regression_scores(truth, predictions, names=names)
    return survival_scores(truth["time"], truth["event"], predictions, groups=folds, names=names)


def bootstrap_strata(labels: TaskLabels) -> np.ndarray | None:
    """By what cases are drawn: class, or whether the event was seen; nothing for other kinds."""
    return strata_of(labels) if labels.kind in ("classification", "survival") else None


def _bootstrap(
    table: EmbeddingTable, labels: TaskLabels, held_out: Sequence[HeldOut], names: Sequence[str], num_bootstrap: int
) -> dict[str, np.ndarray]:
    """Scores of every sample, mean over seeds and episodes. Samples are the same for every method and encoder."""
    items = np.unique(np.concatenate([one.rows for one in held_out]))
    strata = bootstrap_strata(labels)
    cases = [table.case_ids[row] for row in items]
    chosen = None if strata is None else strata[items]
    drawn = draw_cases(cases, chosen, num_bootstrap=num_bootstrap, seed=0)
    if drawn is None:
        return {}
    totals = {name: np.zeros(num_bootstrap) for name in names}
    for one in held_out:
        places = np.searchsorted(items, one.rows)
        at_once = max(1, _WEIGHTS_AT_ONCE // len(places))
        for start in range(0, num_bootstrap, at_once):
            part = slice(start, start + at_once)
            found = _score_samples(labels, one, drawn[part][:, places], names)
            for name in names:
                totals[name][part] += found.get(name, np.nan) / len(held_out)
    return totals


def _score_samples(
    labels: TaskLabels, one: HeldOut, weights: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    truth = labels.targets[one.rows]
    if labels.kind == "classification":
        return weighted_classification(truth, one.predictions, weights, is_ordered=labels.is_ordered)
    if labels.kind == "multilabel":
        return weighted_multilabel(truth, one.predictions, weights)
    folds = np.asarray(one.folds)

    def score(sample: np.ndarray) -> dict[str, float]:
        return score_predictions(labels, one.rows[sample], one.predictions[sample], names, folds=folds[sample])

    return score_samples(score, weights)


def _scores_by_fold(labels: TaskLabels, held_out: Sequence[HeldOut]) -> list[dict[str, Any]]:
    """The scores of each fold alone; of few-shot methods in the first episode."""
    found = []
    for one in held_out:
        if one.episode:
            continue
        folds = np.asarray(one.folds)
        for name in dict.fromkeys(one.folds):
            inside = folds == name
            scores = score_predictions(labels, one.rows[inside], one.predictions[inside])
            found.append({"seed": one.seed, "fold": name, "num_items": int(inside.sum()), "scores": scores})
    return found


def _prediction_rows(table: EmbeddingTable, labels: TaskLabels, held_out: Sequence[HeldOut]) -> list[dict[str, Any]]:
    """A row per held-out item, fold and seed; of several episodes the mean prediction."""
    rows = []
    for seed in dict.fromkeys(one.seed for one in held_out):
        of_seed = [one for one in held_out if one.seed == seed]
        mean = np.mean([one.predictions for one in of_seed], axis=0)
        for row, fold, prediction in zip(of_seed[0].rows.tolist(), of_seed[0].folds, mean.tolist(), strict=True):
            ids = {"id": table.ids[row], "case_id": table.case_ids[row], "seed": seed, "fold": fold}
            rows.append({**ids, "truth": truth_of(labels, row), "prediction": prediction})
    return rows


def truth_of(labels: TaskLabels, row: int) -> Any:
    """The right answer of an item, ready for JSON.

    Args:
        labels (`TaskLabels`): of all items.
        row (`int`): the item.

    Returns:
        The class's name, a number, a list of 0, 1 and `None`, or a `dict` of time and event.
    """
    value = labels.targets[row]
    if labels.kind == "classification":
        return labels.classes[int(value)]
    if labels.kind == "multilabel":
        return [None if np.isnan(flag) else int(flag) for flag in value]
    if labels.kind == "survival":
        return {"time": float(value["time"]), "event": bool(value["event"])}
    return float(value)
