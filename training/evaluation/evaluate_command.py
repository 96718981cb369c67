# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl evaluate`: embeddings on labels, or a model on the held-out split of a slide dataset."""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .evaluate_arguments import add_evaluate_arguments

if TYPE_CHECKING:
    from .embedding_table import EmbeddingTable
    from .evaluate_task import PreparedTask, Protocol
    from .label_table import LabelTable, TaskLabels
    from .task_result import TaskResult

logger = logging.getLogger(__name__)
# Reasons for which an item is left out although nothing is wrong with its embedding.
_HARMLESS = ("no_label",)
# Methods that are no heads on features, but tasks of their own.
_OTHER_METHODS = ("slide_retrieval", "zero_shot", "fine_tuning")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl evaluate`."""
    add_evaluate_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `dre-slcl evaluate`.

    Returns:
        `int`: 0 complete, 3 if slides had no usable embedding, 1 if it failed, 2 for wrong usage.
    """
    problem = _wrong_usage(args)
    if problem:
        logger.error("%s", problem)
        return 2
    if args.embeddings is None:
        from ..evaluate_model import run_model

        return run_model(args)
    try:
        results = _evaluate(args)
        table = write_results_of(args, results)
    except (ValueError, OSError, ImportError) as error:
        logger.error("%s", error)
        return 1
    sys.stdout.write(table)
    lost = {
        item["id"]
        for result in results
        for item in result.protocol.get("left_out", [])
        if item["reason"] not in _HARMLESS
    }
    if lost:
        logger.warning("%d items had no usable embedding; results.json says why.", len(lost))
    return 3 if lost else 0


def _wrong_usage(args: argparse.Namespace) -> str | None:
    if args.embeddings is None:
        if args.labels or args.task or args.baseline or args.peer or args.reports:
            return "--labels, --task, --baseline, --peer and --reports need --embeddings."
        missing = [name for name in ("model", "dataset") if getattr(args, name) is None]
        return (
            f"Give --embeddings and --labels, or --model and --dataset; missing: --{missing[0]}." if missing else None
        )
    if args.dataset:
        return "Give --embeddings or --dataset, not both."
    has_task = bool(args.task or (args.time and args.event))
    if args.labels is None and (has_task or not args.reports):
        return "--embeddings need --labels, the table with the right answers."
    if not has_task and not args.reports:
        return "Name the label column with --task, or for survival --time and --event."
    if args.model is None and (args.reports or {"zero_shot", "fine_tuning"} & set(args.methods or ())):
        return "zero_shot and --reports need --model, which made the embeddings, and so does fine_tuning."
    named = [text for text in (*args.baseline, *args.peer) if not all(text.partition("=")[::2])]
    if named:
        return f"--baseline and --peer take NAME=PATH, found {named[0]!r}."
    names = [args.name, *(text.partition("=")[0] for text in (*args.baseline, *args.peer))]
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"Embeddings need different names; {twice[0]!r} is given twice." if twice else None


def _evaluate(args: argparse.Namespace) -> "list[TaskResult]":
    from .evaluate_task import Protocol

    asked = tuple(args.methods or ())
    protocol = Protocol(
        methods=tuple(name for name in asked if name not in _OTHER_METHODS),
        num_folds=args.folds,
        fold_files=tuple(args.fold_files),
        validation_fraction=args.validation_fraction,
        preserve_sites=args.preserve_sites,
        site_column=args.site_column,
        seeds=tuple(dict.fromkeys(args.seeds)),
        num_bootstrap=args.num_bootstrap,
        level=args.level,
        case_pattern=args.case_pattern,
        with_shuffled=not args.no_shuffled,
    )
    results = []
    if args.task or args.time:
        results += _label_tasks(args, protocol)
    if args.reports:
        results += _report_tasks(args, protocol)
    return results


def _label_tasks(args: argparse.Namespace, protocol: "Protocol") -> "list[TaskResult]":
    from .embedding_table import read_embeddings
    from .evaluate_task import evaluate_task, prepare_task
    from .label_table import make_tasks, read_labels

    labels = read_labels(args.labels)
    tasks = make_tasks(labels, args.task, kind=args.kind, time=args.time, event=args.event)
    table = read_embeddings(args.embeddings, name=args.name, pool=args.pool)

    def others(words: list[str]) -> "list[EmbeddingTable]":
        pairs = (text.partition("=")[::2] for text in words)
        return [read_embeddings(path, name=name, pool=args.pool) for name, path in pairs]

    baselines, peers = others(args.baseline), others(args.peer)
    extra = [name for name in args.methods or () if name in _OTHER_METHODS]
    results = []
    for task in tasks:
        prepared = prepare_task(table, labels, task, protocol, baselines=baselines, peers=peers)
        if protocol.methods or not extra:
            results.append(evaluate_task(prepared, protocol))
        if "slide_retrieval" in extra:
            results.append(_slide_retrieval(prepared, protocol))
        if "zero_shot" in extra:
            results.append(_zero_shot(args, labels, task, protocol))
        if "fine_tuning" in extra:
            results.append(_fine_tuning(args, labels, task, protocol))
    return results


def _slide_retrieval(prepared: "PreparedTask", protocol: "Protocol") -> "TaskResult":
    from .slide_retrieval import evaluate_slide_retrieval

    tables, first = prepared.tables, 1 + prepared.num_peers
    result = evaluate_slide_retrieval(
        tables[0],
        prepared.labels,
        peers=tables[1:first],
        baselines=tables[first:],
        seeds=protocol.seeds,
        num_bootstrap=protocol.num_bootstrap,
    )
    return replace(result, protocol={**result.protocol, "left_out": tables[0].left_out})


def _zero_shot(
    args: argparse.Namespace, labels: "LabelTable", task: "TaskLabels", protocol: "Protocol"
) -> "TaskResult":
    from modeling_dre_slcl.atomic_files import read_json
    from modeling_dre_slcl.zero_shot import DEFAULT_TEMPLATES

    from .evaluate_task import prepare_task
    from .text_tasks import load_text_model, read_projections
    from .zero_shot import evaluate_zero_shot

    projections = read_projections(args.embeddings, args.name, args.model)
    prepared = prepare_task(projections, labels, task, protocol)
    model, tokenizer = load_text_model(args.model, args.device)
    result = evaluate_zero_shot(
        prepared.tables[0],
        prepared.labels,
        model,
        tokenizer,
        class_names=read_json(args.classes) if args.classes else None,
        templates=args.templates or DEFAULT_TEMPLATES,
        folds=[replace(prepared.folds[0], test=prepared.held_out, name="all", seed=None)],
        seeds=protocol.seeds,
        num_bootstrap=protocol.num_bootstrap,
    )
    return replace(result, protocol={**result.protocol, "left_out": prepared.tables[0].left_out})


def _fine_tuning(
    args: argparse.Namespace, labels: "LabelTable", task: "TaskLabels", protocol: "Protocol"
) -> "TaskResult":
    from modeling_dre_slcl import DreSlclModel

    from .evaluate_task import prepare_task
    from .fine_tuning import evaluate_fine_tuning, residual_table

    # `dre-slcl embed --tile-features` writes them there.
    folder = args.tile_features or Path(args.embeddings) / "embeddings"
    model = DreSlclModel.from_pretrained(args.model).eval()
    prepared = prepare_task(residual_table(model, folder, name=args.name), labels, task, protocol)
    options = {"seeds": protocol.seeds, "num_bootstrap": protocol.num_bootstrap, "device": args.device or "cpu"}
    result = evaluate_fine_tuning(model, prepared.tables[0], prepared.labels, prepared.folds, **options)
    return replace(result, protocol={**result.protocol, "folds_from": prepared.folds_from})


def _report_tasks(args: argparse.Namespace, protocol: "Protocol") -> "list[TaskResult]":
    from .label_table import LabelTable, read_labels
    from .task_items import case_rule, find_cases
    from .text_tasks import evaluate_reports, load_text_model, read_projections, read_reports

    table = read_projections(args.embeddings, args.name, args.model)
    labels = read_labels(args.labels) if args.labels else LabelTable("", [], [], {})
    table = replace(table, case_ids=find_cases(table, labels, case_rule(args.case_pattern)))
    model, tokenizer = load_text_model(args.model, args.device)
    return evaluate_reports(
        table,
        read_reports(args.reports),
        model,
        tokenizer,
        fold_files=protocol.fold_files,
        seeds=protocol.seeds,
        num_bootstrap=protocol.num_bootstrap,
    )


def write_results_of(args: argparse.Namespace, results: "list[TaskResult]") -> str:
    """Writes results into the folder that was asked for, and returns the table for the terminal.

    Args:
        args (`argparse.Namespace`): of the command.
        results (`list` of `TaskResult`): what was found.
    """
    from .result_files import results_markdown, write_results

    write_results(Path(args.out), results)
    return results_markdown(results)
