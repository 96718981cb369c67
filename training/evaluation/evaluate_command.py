# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl evaluate`: embeddings on labels, or a model on the held-out split of a slide dataset."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .evaluate_arguments import add_evaluate_arguments

if TYPE_CHECKING:
    from .embedding_table import EmbeddingTable
    from .task_result import TaskResult

logger = logging.getLogger(__name__)
# Reasons for which an item is left out although nothing is wrong with its embedding.
_HARMLESS = ("no_label",)


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
        item["id"] for result in results for item in result.protocol["left_out"] if item["reason"] not in _HARMLESS
    }
    if lost:
        logger.warning("%d items had no usable embedding; results.json says why.", len(lost))
    return 3 if lost else 0


def _wrong_usage(args: argparse.Namespace) -> str | None:
    if args.embeddings is None:
        if args.labels or args.task or args.baseline or args.peer:
            return "--labels, --task, --baseline and --peer need --embeddings."
        missing = [name for name in ("model", "dataset") if getattr(args, name) is None]
        return (
            f"Give --embeddings and --labels, or --model and --dataset; missing: --{missing[0]}." if missing else None
        )
    if args.dataset:
        return "Give --embeddings or --dataset, not both."
    if args.labels is None:
        return "--embeddings need --labels, the table with the right answers."
    if not args.task and not (args.time and args.event):
        return "Name the label column with --task, or for survival --time and --event."
    named = [text for text in (*args.baseline, *args.peer) if not all(text.partition("=")[::2])]
    if named:
        return f"--baseline and --peer take NAME=PATH, found {named[0]!r}."
    names = [args.name, *(text.partition("=")[0] for text in (*args.baseline, *args.peer))]
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"Embeddings need different names; {twice[0]!r} is given twice." if twice else None


def _evaluate(args: argparse.Namespace) -> "list[TaskResult]":
    from .embedding_table import read_embeddings
    from .evaluate_embeddings import Protocol, evaluate_embeddings
    from .label_table import make_tasks, read_labels

    protocol = Protocol(
        methods=tuple(args.methods or ()),
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
    labels = read_labels(args.labels)
    tasks = make_tasks(labels, args.task, kind=args.kind, time=args.time, event=args.event)
    table = read_embeddings(args.embeddings, name=args.name, pool=args.pool)

    def others(words: list[str]) -> "list[EmbeddingTable]":
        pairs = (text.partition("=")[::2] for text in words)
        return [read_embeddings(path, name=name, pool=args.pool) for name, path in pairs]

    baselines, peers = others(args.baseline), others(args.peer)
    return [evaluate_embeddings(table, labels, task, protocol, baselines=baselines, peers=peers) for task in tasks]


def write_results_of(args: argparse.Namespace, results: "list[TaskResult]") -> str:
    """Writes results into the folder that was asked for, and returns the table for the terminal.

    Args:
        args (`argparse.Namespace`): of the command.
        results (`list` of `TaskResult`): what was found.
    """
    from .result_files import results_markdown, write_results

    write_results(Path(args.out), results)
    return results_markdown(results)
