# SPDX-License-Identifier: Apache-2.0
"""Tile features with a known structure: what the label of a slide depends on is in 5 to 20% of its tiles.

12 tissues of 4 variants each are directions in feature space; variants of a tissue lie near each other. A tile's
feature is the direction of its variant, a shift of its slide (stain, scanner) and noise, normalised. Slides differ in
how much of each variant they have, whatever their label. Four ways in which a label can show, of which each suits
other methods:

- `rare_variant`: tiles of a further variant of one tissue, which only positive slides have;
- `look`: tiles of one variant, which all slides have, look a little different in positive slides;
- `tissues`: as many tiles more of one tissue, at the cost of another tissue;
- `together`: variants of two tissues that positive slides have both, negative ones one of them, twice as much.
"""

from dataclasses import dataclass

import numpy as np
import torch

TASKS = ("rare_variant", "look", "tissues", "together")
NUM_TISSUES, NUM_VARIANTS = 12, 4
SHARES = (0.05, 0.20)
_SPREAD, _NOISE, _SLIDE_SHIFT, _LOOK = 0.6, 1.0, 0.3, 0.3
_RARE = NUM_TISSUES * NUM_VARIANTS


@dataclass(frozen=True)
class FeatureCohort:
    """Slides with labels.

    Args:
        features (`torch.Tensor` of shape `(n, N, D)`, float32): unit length.
        labels (`torch.Tensor` of shape `(n,)`, float32): 0 or 1.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def part(self, rows: slice) -> "FeatureCohort":
        """Returns some of the slides."""
        return FeatureCohort(self.features[rows], self.labels[rows])


def draw_cohort(task: str, *, num_slides: int, num_tiles: int, width: int, seed: int) -> FeatureCohort:
    """Draws a cohort, a function of its arguments; every second slide is positive."""
    rng = np.random.default_rng([seed, TASKS.index(task)])
    tissues = _unit(rng.normal(size=(NUM_TISSUES, 1, width)))
    variants = _unit(tissues + _SPREAD * _unit(rng.normal(size=(NUM_TISSUES, NUM_VARIANTS, width)))).reshape(-1, width)
    rare = _unit(tissues[0] + _SPREAD * _unit(rng.normal(size=(1, width))))
    kinds = np.concatenate([variants, rare])
    look = _LOOK * _unit(rng.normal(size=width))
    features, labels = [], []
    for place in range(num_slides):
        is_positive = bool(place % 2)
        drawn = rng.choice(len(kinds), num_tiles, p=_shares(rng, task, is_positive))
        shift = _SLIDE_SHIFT * _unit(rng.normal(size=width))
        noise = _NOISE * rng.normal(size=(num_tiles, width)) / np.sqrt(width)
        centres = kinds[drawn]
        if task == "look" and is_positive:
            centres = centres + look * (drawn == 0)[:, None]
        features.append(_unit(centres + shift + noise))
        labels.append(float(is_positive))
    return FeatureCohort(torch.tensor(np.stack(features), dtype=torch.float32), torch.tensor(labels))


def _shares(rng: np.random.Generator, task: str, is_positive: bool) -> np.ndarray:
    """Share of each variant, and of the rare one, in a slide."""
    shares = np.append(rng.dirichlet(np.full(_RARE, 0.5)), 0.0)
    share = rng.uniform(*SHARES)
    if task == "rare_variant":
        shares *= 1 - share * is_positive
        shares[-1] = share * is_positive
        return shares
    if task == "look":
        shares[1:] *= (1 - share) / shares[1:].sum()
        shares[0] = share
        return shares
    if task == "together":
        first, second = [0], [NUM_VARIANTS]
        present = [2 * share, 0.0] if rng.random() < 0.5 else [0.0, 2 * share]
        present = [share, share] if is_positive else present
    else:
        # Both tissues make up 20%; the label moves a part of that from one to the other.
        first, second = list(range(NUM_VARIANTS)), list(range(NUM_VARIANTS, 2 * NUM_VARIANTS))
        moved = 0.1 + share / 2 * (1 if is_positive else -1)
        present = [moved, 0.2 - moved]
    within = [rng.dirichlet(np.full(len(places), 2.0)) for places in (first, second)]
    shares[first + second] = 0
    shares *= (1 - sum(present)) / shares.sum()
    for places, part, amount in zip((first, second), within, present, strict=True):
        shares[places] = part * amount
    return shares


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
