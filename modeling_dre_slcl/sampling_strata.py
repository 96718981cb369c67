# SPDX-License-Identifier: Apache-2.0
"""Where the tiles of a slide move its embedding most, as the first part of a draw shows; more are drawn there.

A tile of a codeword with few tiles, or one unlike the others of its codeword, may move the embedding more than a tile
like thousands of others. What each tile of the first part moves is known exactly: the embedding without it. Neighbours
look alike, so it is predicted for every other tile from the nearest ones of the first part. Tiles are put into strata
by this prediction, and of each stratum so many are drawn that the error is least for their number in all (Neyman): in
proportion to how many there are, times the root of what one moves. A drawn tile then stands for as many tiles as its
stratum has for each drawn.

Letters: N tiles of the slide, P of them in the first part, H strata, D feature width.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .slide_state import SlideState
from .tile_deletion import embeddings_without_tiles, wide_encoder

MAX_STRATA = 8
# Of the first part, so that the spread within a stratum is known.
_MIN_IN_STRATUM = 16
_NEIGHBOURS = 12
# No stratum is drawn less densely than this share of the mean: what the first part has not seen is still found.
_LEAST_RATE = 0.25
_DELETED_AT_ONCE = 256
_DISTANCES_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Strata:
    """A slide's tiles in strata, and the order in which they are drawn.

    Attributes:
        order (`np.ndarray` of shape `(N,)`, int64): all tiles; of every beginning each stratum has its share.
        stratum (`np.ndarray` of shape `(N,)`, int64): the stratum of each tile.
        sizes (`np.ndarray` of shape `(H,)`, int64): tiles of each stratum.
    """

    order: np.ndarray
    stratum: np.ndarray
    sizes: np.ndarray

    @classmethod
    def whole(cls, order: np.ndarray) -> "Strata":
        """One stratum with all tiles, drawn in an order."""
        return cls(order, np.zeros(len(order), dtype=np.int64), np.array([len(order)]))


def plan_strata(
    model: PreTrainedModel,
    state: SlideState,
    features: torch.Tensor,
    assignment: torch.Tensor,
    tile_xy: np.ndarray,
    order: np.ndarray,
) -> Strata:
    """Plans the rest of a draw by its first part.

    Args:
        model (`DreSlclModel`): the model.
        state (`SlideState`): the tiles of the first part.
        features (`torch.Tensor` of shape `(P, D)`, float): their features.
        assignment (`torch.Tensor` of shape `(P,)`, int64): the codeword of each.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): all tiles of the slide, level-0 pixels.
        order (`np.ndarray` of shape `(N,)`, int64): an order of them in which every beginning is spread evenly over
            the slide; its first P tiles are the first part.

    Returns:
        `Strata`: the first part stays where it is in the order.
    """
    moves = _what_each_moves(model, state, features, assignment)
    predicted = _predict(moves, tile_xy, order[: len(features)])
    stratum = np.searchsorted(_cuts(predicted[order[: len(features)]]), predicted, side="right")
    sizes = np.bincount(stratum)
    first = stratum[order[: len(features)]]
    rates = np.sqrt(np.array([moves[first == one].mean() for one in range(len(sizes))]))
    rates = np.maximum(rates, _LEAST_RATE * (rates @ sizes) / len(stratum))
    if not rates.any():
        return Strata.whole(order)
    # A stratum's tiles come in the even order; the j-th of them when the draw has reached j / (size x rate).
    place = rank_within(stratum[order]) + 1
    due = place / (sizes * rates)[stratum[order]]
    due[: len(features)] = 0
    return Strata(order[np.argsort(due, kind="stable")], stratum, sizes)


def rank_within(labels: np.ndarray) -> np.ndarray:
    """Returns for each of the labels `(N,)` how many of the same came before it, int64 `(N,)`."""
    by_label = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels))
    starts = np.concatenate([[0], ends[:-1]])
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_label] = np.arange(len(labels)) - starts[labels[by_label]]
    return ranks


def _what_each_moves(
    model: PreTrainedModel, state: SlideState, features: torch.Tensor, assignment: torch.Tensor
) -> np.ndarray:
    """Squared distance that the direction of the embedding moves when a tile is left out, float64 (P,)."""
    encoder = wide_encoder(model.residual_encoder)
    device = encoder.codebook.device
    state, features, assignment = state.to(device), features.to(device), assignment.to(device)
    whole = F.normalize(model.get_state_features(state).slide_embedding[0].double(), dim=0)
    moves = torch.zeros(len(features), dtype=torch.float64)
    deleted = embeddings_without_tiles(encoder, state, features, assignment, chunk_size=_DELETED_AT_ONCE)
    for index, embeddings in deleted:
        moved = F.normalize(embeddings.double(), dim=1) - whole
        moves[index.cpu()] = moved.square().sum(1).cpu()
    return moves.numpy()


def _predict(moves: np.ndarray, tile_xy: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mean over the nearest known tiles `(P,)` of what they move, without the tile itself, float64 (N,)."""
    x, y = tile_xy.astype(np.float64).T  # squared distances are whole numbers below 2^53, so exact
    predicted = np.empty(len(x))
    count = min(_NEIGHBOURS, len(known) - 1)
    place = np.full(len(x), -1)
    place[known] = np.arange(len(known))
    step = max(1, _DISTANCES_AT_ONCE // len(known))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        keys = np.square(x[rows, None] - x[known]) + np.square(y[rows, None] - y[known])
        # Of equally near ones the first in the order counts, on every machine.
        keys *= len(known)
        keys += np.arange(len(known))
        own = (place[rows] >= 0).nonzero()[0]
        keys[own, place[rows][own]] = np.inf
        nearest = np.partition(keys, count - 1, axis=1)[:, :count] % len(known)
        predicted[rows] = moves[np.sort(nearest.astype(np.int64), axis=1)].mean(1)
    return predicted


def _cuts(predicted: np.ndarray) -> np.ndarray:
    """Values between strata, for predictions `(P,)`: about equal sums of their roots, and enough tiles in each."""
    ordered = np.sort(predicted)
    reached = np.cumsum(np.sqrt(ordered))
    number = min(MAX_STRATA, len(ordered) // _MIN_IN_STRATUM)
    wanted = np.searchsorted(reached, reached[-1] * np.arange(1, number) / number)
    cuts, last = [], 0
    for place in wanted:
        place = max(int(place), last + _MIN_IN_STRATUM)
        if place + _MIN_IN_STRATUM <= len(ordered) and ordered[place] > ordered[place - 1]:
            cuts.append(ordered[place])
            last = place
    return np.array(cuts)


__all__ = ["MAX_STRATA", "Strata", "plan_strata", "rank_within"]
