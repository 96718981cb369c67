# SPDX-License-Identifier: Apache-2.0
"""What a finished run has to say: `summary.json`, `summary.md` and `curves.png` in its folder.

Everything is taken from `metrics.jsonl`, so that it covers the whole run, however often it was interrupted.
"""

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from modeling_dre_slcl.atomic_files import write_json, write_text

from .config import TrainConfig
from .metrics_log import read_metrics
from .run_state import RunProgress
from .step_clock import PHASES

logger = logging.getLogger(__name__)
_IDLE = ("data", "wait")
_MEANING = {
    "data": "waiting for tiles",
    "wait": "waiting for other processes",
    "encode": "tile encoder",
    "bank": "memory bank",
    "loss": "residual encoder and loss",
    "backward": "backward pass and optimizer",
    "save": "checkpoints and validations",
}


def time_split(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Adds up the times of a run.

    Args:
        rows (sequence of `dict`): lines of `metrics.jsonl`, each with mean times of the steps since the one before.

    Returns:
        `dict`: `seconds`, `tiles` (encoded with gradient), `tiles_per_second`, `idle_share` (waiting for tiles or for
        other processes, of the time of steps without checkpoints and validations), and `share`, a number per phase.
    """
    timed = [row for row in rows if "seconds" in row]
    seconds = dict.fromkeys(PHASES, 0.0)
    tiles = 0.0
    for before, row in pairwise([{"step": 0}, *timed]):
        steps = max(0, row["step"] - before["step"])
        tiles += row.get("tiles_per_second", 0.0) * row["seconds"] * steps
        for phase in PHASES:
            seconds[phase] += row.get(f"{phase}_seconds", 0.0) * steps
    total = sum(seconds.values())
    stepping = total - seconds["save"]
    return {
        "seconds": round(total, 3),
        "tiles": round(tiles),
        "tiles_per_second": round(tiles / total, 2) if total else 0.0,
        "idle_share": round(sum(seconds[phase] for phase in _IDLE) / stepping, 4) if stepping else 0.0,
        "share": {phase: round(value / total, 4) if total else 0.0 for phase, value in seconds.items()},
    }


def run_facts(
    config: TrainConfig, progress: RunProgress, model: torch.nn.Module, *, processes: int, slides: int
) -> dict[str, Any]:
    """What is known of a finished run beside its metrics.

    Args:
        config (`TrainConfig`): its settings.
        progress (`RunProgress`): where it ended.
        model (`DreSlclModel`): what it trained.
        processes (`int`), slides (`int`): how many.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    facts: dict[str, Any] = {
        "steps": progress.stopped_early_at or config.num_steps,
        "finalize_steps": config.finalize_steps,
        "stopped_early": progress.stopped_early_at is not None,
        "final_weights": config.final_weights,
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "slides": slides,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }
    if progress.best_step is not None:
        facts |= {"best_step": progress.best_step, f"best_{config.validation_metric}": progress.best_value}
    return facts


def write_summary(output_dir: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes the summary of a run.

    Args:
        output_dir (`Path`): the run's folder, with `metrics.jsonl`.
        facts (`dict`): what else is known of the run; JSON.

    Returns:
        `dict`: what `summary.json` holds: the facts, `time_split`, first and last loss, last state of the bank.
    """
    rows = read_metrics(output_dir / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    bank = {name: value for name, value in (rows[-1] if rows else {}).items() if name.startswith("bank_")}
    summary = facts | time_split(rows)
    summary |= {"first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None} | bank
    write_json(output_dir / "summary.json", summary)
    has_curves = bool(losses)
    if has_curves:
        from .figures import draw_training_curves  # matplotlib, which takes a moment

        draw_training_curves(output_dir / "metrics.jsonl", output_dir / "curves.png")
    write_text(output_dir / "summary.md", _as_markdown(summary, has_curves=has_curves))
    logger.info(
        "%s steps in %.0f s, %.1f tiles/s, %.1f%% of it idle; summary in %s.",
        *(summary.get("steps"), summary["seconds"], summary["tiles_per_second"], 100 * summary["idle_share"]),
        output_dir / "summary.md",
    )
    return summary


def _as_markdown(summary: dict[str, Any], *, has_curves: bool) -> str:
    lines = ["# Training run", "", "| | |", "| --- | --- |"]
    for name, value in summary.items():
        if value is not None and not isinstance(value, dict):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"| {name.replace('_', ' ')} | {text} |")
    lines += ["", "## Where the time went", "", "| phase | share |", "| --- | --- |"]
    lines += [f"| {_MEANING[phase]} | {share:.1%} |" for phase, share in summary["share"].items()]
    if has_curves:
        lines += ["", "![curves](curves.png)"]
    return "\n".join(lines) + "\n"
