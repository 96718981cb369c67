# SPDX-License-Identifier: Apache-2.0
"""The memory bank at a glance: counts over all processes, and a picture of them.

Letters: S slides, K codewords, T steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modeling_dre_slcl import MemoryBank
from modeling_dre_slcl.atomic_files import atomic_file

from .metrics_log import read_metrics
from .run_data import RunData

_BLUE, _ORANGE = "#0072B2", "#D55E00"
_CURVES = {
    "bank_coverage": "share of tiles stored",
    "bank_median_age_steps": "median age (steps)",
    "bank_drift_cosine": "cosine of refreshed and stored features",
}
_MAX_BINS = 50


@dataclass(frozen=True, eq=False)
class BankSummary:
    """A bank in counts.

    Args:
        step (`int`): the step at which it is described.
        slide_ids (`list` of `str`): the slides of the run.
        num_tiles (`np.ndarray` of shape `(S,)`), num_stored (`np.ndarray` of shape `(S,)`): of each slide.
        codeword_counts (`np.ndarray` of shape `(K,)`): stored tiles at each codeword.
        ages (`np.ndarray` of shape `(T,)`): stored tiles of each age, from 0 steps.
        health (`dict`): see `MemoryBank.health`.
    """

    step: int
    slide_ids: list[str]
    num_tiles: np.ndarray
    num_stored: np.ndarray
    codeword_counts: np.ndarray
    ages: np.ndarray
    health: dict[str, float]


def summarize_bank(
    bank: MemoryBank, data: RunData, step: int, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> BankSummary:
    """Counts what a bank holds. Collective.

    Args:
        bank (`MemoryBank`): this process's bank.
        data (`RunData`): the slides of the run.
        step (`int`): the current step.
        reduce (callable, *optional*): sums a float64 tensor over all processes.
    """
    stored = torch.zeros(len(data.source.slides), dtype=torch.float64)
    stored[data.owned] = bank.counts.sum(dim=1).cpu().double()
    ages = torch.zeros(step + 1, dtype=torch.float64)
    known = bank.step_counts[: step + 1].cpu()
    ages[: len(known)] = known.double()
    parts = [stored, bank.codeword_counts.cpu().double(), ages.flip(0)]
    flat = torch.cat(parts)
    flat = (flat if reduce is None else reduce(flat)).cpu()
    stored, codewords, ages = flat.split([len(part) for part in parts])
    return BankSummary(
        step=step,
        slide_ids=[data.source.slides[slide].slide_id for slide in data.slides],
        num_tiles=np.array([data.source.slides[slide].num_tiles for slide in data.slides]),
        num_stored=stored[data.slides].numpy().astype(np.int64),
        codeword_counts=codewords.numpy().astype(np.int64),
        ages=ages.numpy().astype(np.int64),
        health=bank.health(step, reduce),
    )


def draw_bank_report(summary: BankSummary, out_path: str | Path, metrics_jsonl: Path | None = None) -> None:
    """Draws a bank: ages, coverage by slide, use of codewords, and how its health went.

    Args:
        summary (`BankSummary`): the bank.
        out_path (`str` or `Path`): the picture, PNG or SVG.
        metrics_jsonl (`Path`, *optional*): `metrics.jsonl` of the run, for the curves.
    """
    figure = Figure(figsize=(12.0, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    health, places = summary.health, iter(range(1, 7))

    def panel(title: str, xlabel: str, ylabel: str) -> "Figure.axes":
        axes = figure.add_subplot(2, 3, next(places))
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.set_ylabel(ylabel, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    axes = panel(f"age at step {summary.step}: median {health['median_age_steps']:.0f}", "steps", "tiles")
    oldest = int(np.flatnonzero(summary.ages).max(initial=0)) + 1
    bins = np.linspace(0, oldest, min(_MAX_BINS, oldest) + 1)
    axes.hist(np.arange(oldest), bins=bins, weights=summary.ages[:oldest], color=_BLUE)
    axes = panel(f"coverage: {health['coverage']:.1%} of {summary.num_tiles.sum()} tiles", "slides, sorted", "share")
    axes.plot(np.sort(summary.num_stored / summary.num_tiles), color=_BLUE)
    axes.set_ylim(0, 1.05)
    axes = panel(f"codewords: entropy {health['codeword_entropy']:.2f} of 1", "codewords, sorted", "share of tiles")
    shares = np.sort(summary.codeword_counts)[::-1] / max(1, summary.codeword_counts.sum())
    axes.bar(np.arange(len(shares)), shares, color=_BLUE)
    axes.axhline(1 / len(shares), color=_ORANGE, linewidth=1, linestyle=":")
    rows = read_metrics(metrics_jsonl) if metrics_jsonl is not None else []
    for name, title in _CURVES.items():
        points = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=np.float64).reshape(-1, 2)
        axes = panel(title, "step", "")
        axes.plot(*points.T, color=_BLUE, linewidth=1, marker="o" if len(points) == 1 else None)
    with atomic_file(out_path) as temporary:
        figure.savefig(temporary)
