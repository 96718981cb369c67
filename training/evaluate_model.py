# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl evaluate --model --dataset`: a model on held-out cases, beside random weights and chance.

Four tasks: classes by text alone (zero-shot), slide -> report and report -> slide retrieval, and a linear probe.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from modeling_dre_slcl import DreSlclModel
from modeling_dre_slcl.atomic_files import read_json

from .evaluation_files import Evaluation, results_table, write_evaluation
from .evaluation_tasks import Answers, EvaluationSetup, ReportEmbedder, answer_tasks, label_text
from .random_baseline import random_baseline
from .reports import ReportEncoder
from .tile_source import TileSource

logger = logging.getLogger(__name__)
DEFAULT_TEMPLATES = ("CLASSNAME.", "Diagnosis: CLASSNAME.", "Histologic type: CLASSNAME.", "A slide of CLASSNAME.")
_LONGEST_REPORT_TOKENS = 1_000_000


def evaluate_model(
    model: PreTrainedModel,
    processor: Any,
    source_test: TileSource,
    *,
    source_train: TileSource | None = None,
    label_column: str | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    report_embeds_fn: ReportEmbedder | None = None,
    with_random_baseline: bool = True,
    seed: int = 0,
    num_bootstrap: int = 1000,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Evaluates a model on cases that it was not trained on.

    Which tasks are done depends on what is given: the linear probe needs `source_train` and `label_column`, zero-shot
    needs `label_column` and a text model inside, retrieval needs reports and a text model inside or
    `report_embeds_fn`. What is left out is logged.

    Args:
        model (`DreSlclModel`): the model.
        processor (`DreSlclProcessor`, or `tuple` of image processor and tokenizer, or an image processor): prepares
            tiles and text.
        source_test (`TileSource`): held-out slides.
        source_train (`TileSource`, *optional*): training slides, for the linear probe and the baseline's codebook.
        label_column (`str`, *optional*): label column with the classes; slides without a value are left out.
        class_names (`dict`, *optional*): class -> its names in text; by default the labels themselves.
        templates (sequence of `str`): prompts of the zero-shot classifier, with the token `CLASSNAME`.
        report_embeds_fn (callable, *optional*): reports -> encodings `(len(reports), R)`, float, for a model without
            a text model inside.
        with_random_baseline (`bool`, defaults to `True`): do the same with random weights; needs `source_train`.
        seed (`int`, defaults to 0): of random weights, folds and intervals.
        num_bootstrap (`int`, defaults to 1000): samples for the intervals.
        batch_size (`int`, defaults to 64): tiles encoded at once.
        progress (`bool`, defaults to `True`): show progress bars.

    Returns:
        `Evaluation`: `metrics`, ready for JSON, predictions per slide, and the trained model's embeddings.

    Raises:
        ValueError: if cases are in both splits, the label column or names do not fit, or there is nothing to do.
    """
    if with_random_baseline and source_train is None:
        raise ValueError(
            "The random baseline fits its codebook on training slides: give `source_train`, or leave it out."
        )
    _check_held_out(source_test, source_train)
    image_processor, tokenizer = _unpack(processor)
    has_text = model.text_encoder is not None and tokenizer is not None
    if report_embeds_fn is None and has_text:
        report_embeds_fn = _own_text_model(model, tokenizer)
    classes, names = _classes(label_column, class_names, source_test, source_train)
    if label_column is not None and not has_text:
        logger.warning("The model has no text model inside, so zero-shot classification is left out.")
    setup = EvaluationSetup(
        image_processor=image_processor,
        tokenizer=tokenizer,
        source_test=source_test,
        source_train=source_train,
        label_column=label_column,
        classes=classes,
        class_names=names if label_column is not None and has_text else None,
        templates=templates,
        report_embeds_fn=report_embeds_fn,
        seed=seed,
        num_bootstrap=num_bootstrap,
        batch_size=batch_size,
        progress=progress,
    )
    trained = answer_tasks(model, setup)
    answers = {"trained": trained}
    if with_random_baseline:
        baseline = random_baseline(model, image_processor, source_train, seed=seed, batch_size=batch_size)
        answers["random"] = answer_tasks(baseline, setup)
    return Evaluation(
        metrics=_summary(setup, answers),
        predictions=_predictions(trained),
        test=trained.test,
        train=trained.train,
        reports=trained.reports,
        report_projection=trained.report_projection,
    )


def _summary(setup: EvaluationSetup, answers: dict[str, Answers]) -> dict[str, Any]:
    """All answers side by side, ready for JSON."""
    test, dataset = answers["trained"].test, setup.source_test.dataset
    tasks = {}
    for task, result in answers["trained"].tasks.items():
        scores = {name: answer.tasks[task] for name, answer in answers.items()}
        tasks[task] = {
            name: {key: value for key, value in found.items() if key != "chance"} for name, found in scores.items()
        }
        tasks[task]["chance"] = result["chance"]
    return {
        # A local path says nothing to others, and may say too much.
        "dataset": Path(dataset).name if Path(dataset).exists() else dataset,
        "split": setup.source_test.split,
        "train_split": setup.source_train.split if setup.source_train is not None else None,
        "num_slides": len(test),
        "num_cases": len(set(test.case_ids)),
        "refused": [{key: refused[key] for key in ("slide_id", "reason")} for refused in test.refused],
        "label_column": setup.label_column,
        "classes": setup.classes,
        "class_names": setup.class_names,
        "templates": list(setup.templates) if setup.class_names is not None else None,
        "seed": setup.seed,
        "num_bootstrap": setup.num_bootstrap,
        "tasks": tasks,
    }


def _predictions(answers: Answers) -> list[dict[str, Any]]:
    """One row per slide; no report text, so that the file can be passed on as metrics are."""
    test = answers.test
    return [
        {
            "slide_id": slide_id,
            "case_id": test.case_ids[place],
            **{name: values[place] for name, values in answers.columns.items()},
        }
        for place, slide_id in enumerate(test.slide_ids)
    ]


def _check_held_out(source_test: TileSource, source_train: TileSource | None) -> None:
    if source_train is None:
        return
    shared = sorted({row.case_id for row in source_test.slides} & {row.case_id for row in source_train.slides})
    if shared:
        raise ValueError(
            f"{len(shared)} cases are in split '{source_test.split}' and in split '{source_train.split}', for example "
            f"{shared[0]}: scores would not be those of held-out cases. Split the dataset by case."
        )


def _classes(
    label_column: str | None,
    class_names: Mapping[str, Sequence[str]] | None,
    source_test: TileSource,
    source_train: TileSource | None,
) -> tuple[list[str], dict[str, list[str]]]:
    """The classes in order, and their names in text; checked before anything is embedded."""
    if label_column is None:
        if class_names is not None:
            raise ValueError("`class_names` need a `label_column` with the right answers.")
        return [], {}
    found: set[str] = set()
    for source in (source_test, *([source_train] if source_train is not None else [])):
        if label_column not in source.slides[0].labels:
            known = ", ".join(sorted(source.slides[0].labels)) or "none"
            raise ValueError(f"{source.dataset}: there is no label column '{label_column}'; there is: {known}.")
        present = {label for row in source.slides if (label := label_text(row.labels[label_column])) is not None}
        if len(present) < 2:
            raise ValueError(
                f"{source.dataset}: column '{label_column}' of split '{source.split}' holds {sorted(present)}; "
                "at least two classes are needed."
            )
        found |= present
    names = {name: [name] for name in sorted(found)} if class_names is None else dict(class_names)
    if missing := sorted(found - set(names)):
        raise ValueError(f"class_names: column '{label_column}' holds '{missing[0]}', which has no names.")
    return list(names), {name: list(synonyms) for name, synonyms in names.items()}


def _unpack(processor: Any) -> tuple[Any, Any]:
    """Image processor and tokenizer; the latter may be `None`."""
    if isinstance(processor, tuple):
        return processor
    if hasattr(processor, "image_processor"):
        return processor.image_processor, processor.tokenizer
    return processor, None


def _own_text_model(model: PreTrainedModel, tokenizer: Any) -> ReportEmbedder:
    max_tokens = min(tokenizer.model_max_length, _LONGEST_REPORT_TOKENS)
    encoder = ReportEncoder(
        model.text_encoder, tokenizer, pooling=model.config.text_pooling, max_tokens=int(max_tokens)
    )
    return _one_by_one(encoder)


def _one_by_one(encoder: ReportEncoder) -> ReportEmbedder:
    """Encodes each report on its own, as training does, so that it does not depend on the others."""
    return lambda reports: torch.cat([encoder.encode([report]) for report in reports])


def run_model(args: argparse.Namespace) -> int:
    """Runs `dre-slcl evaluate --model --dataset`.

    Returns:
        `int`: 0 if complete, 3 if some slides could not be read, 1 if it failed.
    """
    try:
        evaluation = _run(args)
        write_evaluation(args.out, evaluation)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    sys.stdout.write(results_table(evaluation.metrics))
    return 3 if evaluation.metrics["refused"] else 0


def _run(args: argparse.Namespace) -> Evaluation:
    model, loading = DreSlclModel.from_pretrained(args.model, output_loading_info=True)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(f"{args.model}: {len(missing)} weights are missing, for example `{missing[0]}`.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    image_processor = AutoImageProcessor.from_pretrained(args.model)
    tokenizer, report_embeds_fn = None, None
    if model.text_encoder is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    elif args.text_model is not None:
        encoder = ReportEncoder.from_pretrained(
            args.text_model, pooling=model.config.text_pooling, max_tokens=args.max_report_tokens
        )
        encoder.model.to(device)
        report_embeds_fn = _one_by_one(encoder)
    source_train = None
    if args.train_split:
        source_train = TileSource(args.dataset, args.train_split, slides_root=args.slides_root)
    return evaluate_model(
        model,
        (image_processor, tokenizer),
        TileSource(args.dataset, args.split, slides_root=args.slides_root),
        source_train=source_train,
        label_column=args.label_column,
        class_names=read_json(args.classes) if args.classes else None,
        templates=args.templates or DEFAULT_TEMPLATES,
        report_embeds_fn=report_embeds_fn,
        with_random_baseline=args.random_baseline and source_train is not None,
        seed=args.seed,
        num_bootstrap=args.num_bootstrap,
        batch_size=args.batch_size,
    )
