# SPDX-License-Identifier: Apache-2.0
"""Pictures of training and of results, as PNG or JPEG files, without a display and without matplotlib's global state.

Letters: S slides, U reports, N tiles, D feature width.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modeling_dre_slcl.atomic_files import atomic_file
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.slide_tiles import draw_heatmap, draw_tile_grid
from modeling_dre_slcl.tile_grid import TileGrid

from .metrics_log import read_metrics

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that pales on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_PANELS = {
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate, tile encoder",
    "head_learning_rate": "learning rate, head",
    "logit_scale": "logit scale",
    "bank_coverage": "memory bank: share of tiles stored",
    "bank_mean_age_steps": "memory bank: mean age (steps)",
    "bank_median_age_steps": "memory bank: median age (steps)",
    "bank_codewords_used": "memory bank: share of codewords used",
    "bank_codeword_entropy": "memory bank: entropy of codewords, share of the largest",
    "bank_drift_l2": "memory bank: L2 distance of refreshed and stored",
    "bank_drift_cosine": "memory bank: cosine of refreshed and stored",
    "tiles_per_second": "tiles per second",
    "seconds": "seconds per step",
    "data_seconds": "seconds per step, waiting for tiles",
    "wait_seconds": "seconds per step, waiting for other processes",
    "validation_loss": "validation: loss",
    "validation_mean_average_precision": "validation: mean average precision",
}
_PANELS_PER_ROW = 3
_SMOOTHED_ABOVE = 40
_DPI = 130


def draw_training_curves(metrics_jsonl: str | Path, out_path: str | Path) -> None:
    """Draws the curves of a run: one panel for each known quantity that its metrics hold.

    A vertical line marks each step at which the run was resumed: rows with `"event": "resume"`, and steps that are
    lower than the one before. The loss also gets its running mean.

    Args:
        metrics_jsonl (`str` or `Path`): `metrics.jsonl` of the run.
        out_path (`str` or `Path`): the picture.

    Raises:
        ValueError: if the file is missing or holds none of the quantities.
    """
    rows = read_metrics(Path(metrics_jsonl))
    curves = {name: points for name in _PANELS if len(points := _points(rows, name))}
    if not curves:
        raise ValueError(f"{metrics_jsonl}: expected lines with step and any of {', '.join(_PANELS)}, found none.")
    resumes = [row["step"] for row in rows if row.get("event") == "resume"]
    resumes += [row["step"] for before, row in pairwise(rows) if row["step"] < before["step"]]
    num_columns = min(_PANELS_PER_ROW, len(curves))
    num_rows = -(-len(curves) // num_columns)
    figure = new_figure(4.0 * num_columns, 2.6 * num_rows)
    for place, (name, points) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(num_rows, num_columns, place)
        _draw_curve(axes, points, is_noisy=name == "loss")
        axes.set_title(_PANELS[name], loc="left", fontsize=9)
        if "share" in _PANELS[name]:
            axes.set_ylim(0, 1.05)
        for step in resumes:
            axes.axvline(step, color="#888888", linestyle=":", linewidth=1)
    if resumes:
        figure.text(0.995, 0.005, "dotted: resumed", ha="right", va="bottom", fontsize=7, color="#666666")
    save_figure(figure, out_path)


def draw_similarity_matrix(
    similarity: np.ndarray,
    out_path: str | Path,
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    row_title: str = "slides",
    column_title: str = "reports",
) -> None:
    """Draws similarities of slides and reports, both sorted by label, with lines between labels.

    Args:
        similarity (`np.ndarray` of shape `(S, U)`, float): cosines.
        out_path (`str` or `Path`): the picture.
        row_labels (sequence of `str`), column_labels (sequence of `str`): class of each slide, of each report.
        row_title (`str`, defaults to `"slides"`), column_title (`str`, defaults to `"reports"`): what they are.

    Raises:
        ValueError: if there is not one label per row and column.
    """
    if similarity.shape != (len(row_labels), len(column_labels)):
        raise ValueError(
            f"similarity: expected shape {(len(row_labels), len(column_labels))}, one row and column per label, found "
            f"{similarity.shape}."
        )
    rows, columns = (sorted(range(len(names)), key=names.__getitem__) for names in (row_labels, column_labels))
    figure = new_figure(5.4, 4.6)
    axes = figure.add_subplot()
    image = axes.imshow(similarity[np.ix_(rows, columns)], cmap="viridis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="cosine similarity", fraction=0.046)
    _mark_labels(axes, [row_labels[row] for row in rows], is_vertical=True)
    _mark_labels(axes, [column_labels[column] for column in columns], is_vertical=False)
    axes.set_ylabel(f"{row_title} ({len(rows)})")
    axes.set_xlabel(f"{column_title} ({len(columns)})")
    save_figure(figure, out_path)


def draw_embedding_map(
    embeddings: np.ndarray, labels: Sequence[str], out_path: str | Path, *, title: str = "slide embeddings"
) -> None:
    """Draws embeddings in the plane of their two main directions (principal components), a colour per label.

    Args:
        embeddings (`np.ndarray` of shape `(S, D)`, float): at least two.
        labels (sequence of `str`): class of each.
        out_path (`str` or `Path`): the picture.
        title (`str`, defaults to `"slide embeddings"`): above the map.

    Raises:
        ValueError: if there are fewer than two embeddings, or not one label for each.
    """
    if len(embeddings) < 2 or len(labels) != len(embeddings):
        raise ValueError(
            f"embeddings: expected at least two, and a label for each; found {len(embeddings)} and {len(labels)}."
        )
    centred = np.asarray(embeddings, dtype=np.float64) - np.mean(embeddings, axis=0, dtype=np.float64)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(embeddings), 2))
    points[:, : min(2, len(spread))] = (left * spread)[:, :2]
    shares = np.append(spread**2, 0)[:2] / max((spread**2).sum(), 1e-30)
    figure = new_figure(5.0, 4.4)
    axes = figure.add_subplot()
    for place, name in enumerate(sorted(set(labels))):
        chosen = points[np.asarray(labels) == name]
        style = {"color": COLOURS[place % len(COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}
        axes.scatter(*chosen.T, s=28, linewidths=0.5, edgecolors="white", label=f"{name} ({len(chosen)})", **style)
    axes.set_xlabel(f"component 1, {shares[0]:.0%} of variance")
    axes.set_ylabel(f"component 2, {shares[1]:.0%} of variance")
    axes.set_title(title, loc="left", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, out_path)


def draw_slide_grid(
    slide: str | Path, grid: TileGrid, out_path: str | Path, *, mpp: float | None = None, overview_mpp: float = 8.0
) -> None:
    """Draws a slide with the outlines of its tiles, to a PNG or JPEG file.

    Args:
        slide (`str` or `Path`): the slide.
        grid (`TileGrid`): its tiles.
        out_path (`str` or `Path`): the picture; its suffix says the format.
        mpp (`float`, *optional*): level-0 resolution in um/px, for a file that does not state it.
        overview_mpp (`float`, defaults to 8.0): resolution of the picture in um/px.
    """
    with SlideReader(slide, mpp=mpp) as reader:
        overview, downsample = reader.read_overview(overview_mpp)
        save_image(draw_tile_grid(overview, downsample, reader.info.bounds, grid), out_path)


def draw_slide_heatmap(
    slide: str | Path,
    grid: TileGrid,
    values: np.ndarray,
    out_path: str | Path,
    *,
    mpp: float | None = None,
    overview_mpp: float = 8.0,
) -> None:
    """Draws a slide with a colour per tile, blue for low and red for high values, to a PNG or JPEG file.

    Args:
        slide (`str` or `Path`): the slide.
        grid (`TileGrid`): its tiles.
        values (`np.ndarray` of shape `(N,)`): a finite number per tile.
        out_path (`str` or `Path`): the picture; its suffix says the format.
        mpp (`float`, *optional*): level-0 resolution in um/px, for a file that does not state it.
        overview_mpp (`float`, defaults to 8.0): resolution of the picture in um/px.
    """
    with SlideReader(slide, mpp=mpp) as reader:
        overview, downsample = reader.read_overview(overview_mpp)
        save_image(draw_heatmap(overview, downsample, reader.info.bounds, grid, np.asarray(values)), out_path)


def save_image(pixels: np.ndarray, out_path: str | Path) -> None:
    """Writes RGB pixels `(h, w, 3)`, uint8, to a PNG or JPEG file, atomically."""
    with atomic_file(out_path) as temporary:
        PIL.Image.fromarray(pixels).save(temporary, quality=88)


def _points(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """Steps and finite values of a quantity: `(n, 2)`, in order of steps."""
    found = [
        (row["step"], row[name])
        for row in rows
        if isinstance(row.get(name), (int, float)) and np.isfinite(row[name]) and "step" in row
    ]
    return np.array(sorted(found), dtype=np.float64).reshape(-1, 2)


def _draw_curve(axes: Axes, points: np.ndarray, *, is_noisy: bool) -> None:
    steps, values = points.T
    is_smoothed = is_noisy and len(points) > _SMOOTHED_ABOVE
    alone = "o" if len(points) == 1 else None
    axes.plot(steps, values, color=COLOURS[0], linewidth=1, alpha=0.35 if is_smoothed else 1, marker=alone)
    if is_smoothed:
        width = 2 * (len(points) // 40) + 1
        # Each mean is drawn at the middle of the values that it is of.
        means = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[width // 2 :][: len(means)], means, color=COLOURS[1], linewidth=1.5)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#dddddd", linewidth=0.5)


def _mark_labels(axes: Axes, labels: list[str], *, is_vertical: bool) -> None:
    """Names each run of equal labels at its middle and draws a line where it ends."""
    starts = [place for place, label in enumerate(labels) if place == 0 or labels[place - 1] != label]
    stops = [*starts[1:], len(labels)]
    middles = [(start + stop - 1) / 2 for start, stop in zip(starts, stops, strict=True)]
    names = [labels[start] for start in starts]
    if is_vertical:
        axes.set_yticks(middles, names, fontsize=8, rotation=90, va="center")
    else:
        axes.set_xticks(middles, names, fontsize=8)
    for start in starts[1:]:
        (axes.axhline if is_vertical else axes.axvline)(start - 0.5, color="white", linewidth=1)


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure of `width` x `height` inches, apart from matplotlib's global state."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, out_path: str | Path) -> None:
    """Writes a figure atomically; the suffix says in which format."""
    with atomic_file(out_path) as temporary:
        figure.savefig(temporary)
