# SPDX-License-Identifier: Apache-2.0
"""Whether scores of tiles are faithful: how a slide's score falls as the best tiles are taken out, or put in first.

Deletion: tiles are taken out, those with the highest scores first; the better the scores, the faster the slide's
score falls and the smaller the area under the curve. Insertion: tiles are put in in the same order; the better the
scores, the larger the area. States are exact sums, so a curve costs one evaluation of the small Transformer a point.

Letters: N tiles, P points of a curve, D feature width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from modeling_dre_slcl.atomic_files import atomic_file
from modeling_dre_slcl.attribution import Score

_DPI = 130


@torch.no_grad()
def deletion_curve(
    model: Any,
    tile_features: torch.Tensor,
    scores: torch.Tensor,
    target: Score,
    *,
    mode: Literal["deletion", "insertion"] = "deletion",
    num_points: int = 50,
) -> tuple[np.ndarray, np.ndarray]:
    """The slide's score along the deletion or insertion of its tiles.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        tile_features (`torch.Tensor` of shape `(N, D)`, float): all tiles of a slide.
        scores (`torch.Tensor` of shape `(N,)`, float): what decides the order, highest first.
        target (`Callable`): what is scored, from `attribution`.
        mode (`str`, defaults to `"deletion"`): `"deletion"` or `"insertion"`.
        num_points (`int`, defaults to 50): points of the curve, at most N.

    Returns:
        `tuple` of `np.ndarray` of shape `(P,)`, float64: the share of tiles taken out (or put in), and the slide's
        score then. A slide without tiles has no score, so both curves leave that end out.
    """
    if mode not in ("deletion", "insertion"):
        raise ValueError(f"`mode` must be 'deletion' or 'insertion', got {mode!r}.")
    number = len(tile_features)
    order = scores.argsort(descending=True, stable=True)
    features = tile_features[order.to(tile_features.device)]
    shift = 0 if mode == "deletion" else 1
    steps = np.unique(np.linspace(shift, number - 1 + shift, min(num_points, number)).round().astype(int))
    state = model.state_of_tiles(features) if mode == "deletion" else model.empty_state()
    values, done = [], 0
    for step in steps.tolist():
        if step > done:
            state.add(features[done:step].to(state.counts.device), model.codebook, sign=1 - 2 * (mode == "deletion"))
            done = step
        values.append(float(target(model.get_state_features(state).slide_embedding.float())[0]))
    return steps / number, np.array(values)


def curve_area(shares: np.ndarray, values: np.ndarray) -> float:
    """The area under a curve, by trapezoids, divided by the range of shares: its mean height."""
    return float(np.sum(np.diff(shares) * (values[1:] + values[:-1]) / 2) / (shares[-1] - shares[0]))


def attention_scores(model: Any, tile_features: torch.Tensor) -> torch.Tensor:
    """Scores of tiles as heatmaps of attention draw them: how much the last layer attends to a tile's codeword.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        tile_features (`torch.Tensor` of shape `(N, D)`, float): all tiles of a slide.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, on CPU: mean attention, over heads and queries, to the codeword, times
        the cosine of the tile's residual with the codeword's.
    """
    state = model.empty_state()
    codewords = state.add(tile_features, model.codebook)
    residuals = state.residuals(model.codebook)
    with torch.no_grad():
        attentions = model.encode_residuals(residuals[None], state.counts[None], need_weights=True).attentions
    attention = attentions[-1][0].double().mean(dim=(0, 1))
    own = tile_features.double() - model.codebook[codewords].double()
    cosine = torch.nn.functional.cosine_similarity(own, residuals[codewords])
    return (attention[codewords] * cosine).float().cpu()


def draw_curves(path: str | Path, curves: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> None:
    """Draws deletion and insertion curves side by side, a line per method, as PNG, atomically.

    Args:
        path (`str` or `Path`): the picture.
        curves (`Mapping`): `"deletion"` and `"insertion"`, each method -> curve from `deletion_curve`.
    """
    figure = Figure(figsize=(9, 3.6), dpi=_DPI)
    figure.set_layout_engine("constrained")
    for place, (mode, lines) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), place)
        for name, (shares, values) in lines.items():
            axes.plot(shares, values, label=f"{name} ({curve_area(shares, values):.3f})", linewidth=1.4)
        axes.set_xlabel("share of tiles taken out" if mode == "deletion" else "share of tiles put in")
        axes.set_ylabel("score of the slide")
        axes.set_title(f"{mode}: mean height in brackets", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
