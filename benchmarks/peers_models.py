# SPDX-License-Identifier: Apache-2.0
"""Aggregators of tile features, each with a linear classifier, and one way to train them all.

Mean pooling, ABMIL and TransMIL (torchmil's), and this package's residual encoder on a codebook of 4 or 16 codewords
(16 is the package's default), fitted on the training tiles, and once more with the paper's tokens, directions of
residual sums (`residual_16_vlad`). All get the same slides, batches, epochs, optimiser and choice: of two learning
rates and all epochs, the one with the best AUROC on validation slides.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peers_features import FeatureCohort
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import nn

from dre_slcl.training.codebook import fit_codebook
from modeling_dre_slcl.residual_encoder import ResidualEncoder, residual_sums

METHODS = ("mean", "abmil", "transmil", "residual_4", "residual_16", "residual_16_vlad")
LEARNING_RATES = (3e-4, 3e-3)
_CODEBOOK_TILES = 20_000


@dataclass(frozen=True)
class Sizes:
    """How large cohorts and models are.

    Args:
        num_tiles (`int`), width (`int`): tiles of a slide, and of their features.
        num_train (`int`), num_validation (`int`), num_test (`int`): slides.
        attention_width (`int`): of ABMIL's and TransMIL's inner layers.
        num_landmarks (`int`): of TransMIL's attention.
        num_epochs (`int`), batch_size (`int`): of training.
    """

    num_tiles: int = 64
    width: int = 64
    num_train: int = 160
    num_validation: int = 40
    num_test: int = 200
    attention_width: int = 64
    num_landmarks: int = 32
    num_epochs: int = 6
    batch_size: int = 8

    @property
    def num_slides(self) -> int:
        """All slides of a cohort."""
        return self.num_train + self.num_validation + self.num_test


class MeanPooling(nn.Module):
    """The mean of the tiles, standardised, before a linear classifier."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(sizes.width, affine=False)
        self.classifier = nn.Linear(sizes.width, 1)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Tiles `(B, N, D)` -> logits `(B,)`."""
        return self.classifier(self.norm(tiles.mean(dim=1))).squeeze(-1)


class ResidualClassifier(nn.Module):
    """The residual encoder of this package before a linear classifier; slides come as residual sums or as tiles."""

    def __init__(self, sizes: Sizes, codebook: torch.Tensor, codeword_tokens: str) -> None:
        super().__init__()
        self.encoder = ResidualEncoder(
            hidden_size=sizes.width,
            num_codewords=len(codebook),
            codeword_tokens=codeword_tokens,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=4 * sizes.width,
            dropout=0.1,
            layer_norm_eps=1e-6,
        )
        self.encoder.codebook.copy_(codebook)
        self.classifier = nn.Linear(sizes.width, 1)

    def forward(self, slides: "torch.Tensor | tuple[torch.Tensor, torch.Tensor]") -> torch.Tensor:
        """Tiles `(B, N, D)`, or residuals `(B, K, D)` with counts `(B, K)` -> logits `(B,)`."""
        residuals, counts = slides if isinstance(slides, tuple) else residual_sums(slides, self.encoder.codebook)
        return self.classifier(self.encoder(residuals, counts).slide_embedding).squeeze(-1)


def build(method: str, sizes: Sizes, train: FeatureCohort, seed: int) -> nn.Module:
    """Builds a method with random weights."""
    torch.manual_seed(seed)
    if method == "mean":
        return MeanPooling(sizes)
    if method.startswith("residual"):
        tiles = train.features.flatten(0, 1)
        rows = torch.randperm(len(tiles))[:_CODEBOOK_TILES]
        codebook = fit_codebook(tiles[rows].numpy(), int(method.split("_")[1]), seed=seed)
        return ResidualClassifier(sizes, torch.from_numpy(codebook), "vlad" if method.endswith("vlad") else "mean")
    from torchmil.models import ABMIL, TransMIL

    if method == "abmil":
        width = sizes.attention_width
        head = nn.Sequential(nn.Linear(sizes.width, width), nn.ReLU())
        return ABMIL(in_shape=(sizes.width,), att_dim=width, gated=True, feat_ext=head)
    return TransMIL(
        in_shape=(sizes.width,),
        att_dim=sizes.attention_width,
        n_heads=4,
        n_landmarks=sizes.num_landmarks,
        dropout=0.1,
    )


def inputs_of(model: nn.Module, features: torch.Tensor) -> Callable[[torch.Tensor | slice], object]:
    """What a model takes of a cohort: tiles of unit root mean square; residual sums, which are computed once."""
    if isinstance(model, ResidualClassifier):
        residuals, counts = residual_sums(features, model.encoder.codebook)
        return lambda rows: (residuals[rows], counts[rows])
    scaled = features * math.sqrt(features.shape[-1])
    return lambda rows: scaled[rows]


def train_one(
    method: str, sizes: Sizes, train: FeatureCohort, validation: FeatureCohort, seed: int
) -> tuple[nn.Module, float]:
    """Trains with each learning rate; returns the model with the best validation AUROC, and that rate."""
    best, best_score, best_rate = None, -1.0, 0.0
    for rate in LEARNING_RATES:
        model = build(method, sizes, train, seed)
        own, held_out = inputs_of(model, train.features), inputs_of(model, validation.features)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        for _ in range(sizes.num_epochs):
            run_epoch(model, optimizer, own, train.labels, sizes.batch_size)
            score = roc_auc_score(validation.labels, predict(model, held_out, len(validation.labels)))
            if score > best_score:
                best, best_score, best_rate = copy.deepcopy(model), score, rate
    return best, best_rate


def run_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Callable[[torch.Tensor], object],
    labels: torch.Tensor,
    batch_size: int,
) -> None:
    """One pass over the training slides in random order."""
    model.train()
    for rows in torch.randperm(len(labels)).split(batch_size):
        loss = F.binary_cross_entropy_with_logits(model(inputs(rows)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def predict(model: nn.Module, inputs: Callable[[slice], object], count: int) -> torch.Tensor:
    """Probabilities `(n,)` of slides, in batches of 50."""
    model.eval()
    batches = [model(inputs(slice(start, min(start + 50, count)))) for start in range(0, count, 50)]
    return torch.cat(batches).sigmoid()


def held_out_scores(model: nn.Module, test: FeatureCohort) -> dict[str, float]:
    """AUROC and balanced accuracy on test slides."""
    probabilities = predict(model, inputs_of(model, test.features), len(test.labels))
    return {
        "auroc": float(roc_auc_score(test.labels, probabilities)),
        "balanced_accuracy": float(balanced_accuracy_score(test.labels, probabilities > 0.5)),
    }


def epoch_seconds(method: str, sizes: Sizes, train: FeatureCohort, repetitions: int = 3) -> dict[str, float]:
    """Fastest training epoch: from the tiles, as all methods need at first; and from sums, where they are enough."""
    model = build(method, sizes, train, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scaled = train.features if method.startswith("residual") else train.features * math.sqrt(sizes.width)
    ways = {"from_tiles": lambda rows: scaled[rows]}
    if method.startswith("residual"):
        ways["from_sums"] = inputs_of(model, train.features)
    seconds = {}
    for name, way in ways.items():
        times = []
        for _ in range(repetitions):
            started = time.perf_counter()
            run_epoch(model, optimizer, way, train.labels, sizes.batch_size)
            times.append(time.perf_counter() - started)
        seconds[name] = min(times)
    return seconds
