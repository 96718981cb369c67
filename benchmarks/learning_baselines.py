# SPDX-License-Identifier: Apache-2.0
"""The baselines of `benchmarks.learning`, in plain torch: self-supervised tiles, frozen features, end-to-end ABMIL.

Letters: B slides, N tiles, D feature width, E joint width, R width of report encodings.
"""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig

from benchmarks.learning_cohort import TILE_PX
from benchmarks.learning_engine import PROJECTION_SIZE, SETTINGS, TILE_ENCODER, TileCounter
from benchmarks.learning_scores import CLASSES, Cohort, SlideVectors
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.demo.tissue_painter import random_stream
from dre_slcl.training.optimizer import learning_rate_factor
from dre_slcl.training.pretrained_encoder import load_tile_encoder
from dre_slcl.training.run_data import RunData
from dre_slcl.training.step_dataset import StepDataset, step_loader
from dre_slcl.training.tile_source import TileSource
from modeling_dre_slcl import DreSlclImageProcessor
from modeling_dre_slcl.contrastive_loss import slide_level_contrastive_loss
from modeling_dre_slcl.tile_encoder import build_tile_encoder, encode_tiles

IMAGE_PROCESSOR = DreSlclImageProcessor(
    size={"height": TILE_PX, "width": TILE_PX}, do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
)
_SSL_TILES, _SSL_TEMPERATURE, _SSL_LEARNING_RATE, _SSL_STAIN = 128, 0.2, 2e-3, 0.25
_BATCH_SLIDES = SETTINGS["slides_per_batch"]


def new_encoder(seed: int) -> nn.Module:
    """The tile encoder with fresh weights."""
    torch.manual_seed(seed)
    settings = {name: value for name, value in TILE_ENCODER.items() if name != "model_type"}
    return build_tile_encoder(AutoConfig.for_model(TILE_ENCODER["model_type"], **settings), "pooler")


def load_encoder(start: str | None, seed: int) -> nn.Module:
    """The tile encoder from a folder, or with fresh weights."""
    return new_encoder(seed) if start is None else load_tile_encoder(start)[0]


def all_tiles(source: TileSource) -> list[torch.Tensor]:
    """The tiles of each slide, `(N, 24, 24, 3)`, uint8."""
    return [torch.from_numpy(source.read(place, np.arange(row.num_tiles))) for place, row in enumerate(source.slides)]


@torch.no_grad()
def encode_all(encoder: nn.Module, tiles: list[torch.Tensor]) -> list[torch.Tensor]:
    """L2-normalised features of each slide's tiles, `(N, D)`."""
    encoder.eval()
    return [encode_tiles(encoder, IMAGE_PROCESSOR.tiles_to_pixel_values(part, "cpu"), "pooler") for part in tiles]


def pretrain_encoder(cohort: Cohort, num_steps: int, folder: Path) -> dict[str, int]:
    """Trains the tile encoder with SimCLR on the training tiles, and saves it as `TrainConfig.tile_encoder` takes it.

    Each step shows 128 tiles in two views: turned, mirrored, cropped, stained anew, blurred by resizing.

    Returns:
        `dict`: counts of tiles.
    """
    encoder = new_encoder(cohort.seed)
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    tiles = torch.cat(all_tiles(cohort.train))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_SSL_LEARNING_RATE, weight_decay=0.01)
    random = random_stream(cohort.seed, "self-supervised")
    counter = TileCounter(encoder)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = _SSL_LEARNING_RATE * _warm_cosine(step, 10, num_steps)
        drawn = tiles[random.choice(len(tiles), size=_SSL_TILES, replace=False)]
        views = torch.cat([_view(drawn, random) for _ in range(2)])
        embeds = F.normalize(head(encoder(pixel_values=views).pooler_output.flatten(1)), dim=1)
        logits = (embeds @ embeds.T / _SSL_TEMPERATURE).fill_diagonal_(-1e9)
        loss = F.cross_entropy(logits, (torch.arange(len(logits)) + _SSL_TILES) % len(logits))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    encoder.save_pretrained(folder)
    return counter.stop()


def _warm_cosine(step: int, warmup_steps: int, num_steps: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps))) / 2


def _view(tiles: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """A random view of tiles `(n, 24, 24, 3)`, uint8: pixel values `(n, 3, 24, 24)`."""
    n = len(tiles)
    light = (tiles.permute(0, 3, 1, 2).float() / 255).clamp(min=1 / 255)
    factors = torch.from_numpy(random.lognormal(0, _SSL_STAIN, size=(n, 3, 1, 1))).float()
    light = light**factors
    angle = torch.from_numpy(random.uniform(0, 2 * np.pi, size=n)).float()
    scale = torch.from_numpy(random.uniform(0.65, 1.0, size=n)).float()
    mirror = torch.from_numpy(random.choice([-1.0, 1.0], size=n)).float()
    shift = torch.from_numpy(random.uniform(-1, 1, size=(n, 2))).float() * (1 - scale)[:, None]
    rows = [
        torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), shift[:, 0]], dim=1),
        torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(light.shape), align_corners=False)
    return F.grid_sample(light, grid, padding_mode="reflection", align_corners=False) * 2 - 1


class SlideHead(nn.Module):
    """Features of tiles -> slide embedding, by the mean or by gated attention (ABMIL), and what it is trained by.

    Args:
        width (`int`): D.
        pooling (`str`): `"mean"` or `"attention"`.
        report_width (`int`): R.
    """

    def __init__(self, width: int, pooling: str, report_width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.attention = None
        if pooling == "attention":
            from torchmil.nn import AttentionPool

            self.attention = AttentionPool(width, att_dim=width, gated=True)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, len(CLASSES))
        self.slide_projection = nn.Linear(width, PROJECTION_SIZE)
        self.text_projection = nn.Linear(report_width, PROJECTION_SIZE)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.register_buffer("report_mean", torch.zeros(report_width))

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Features `(B, N, D)` and a mask `(B, N)` of real tiles -> slide embeddings `(B, D)`."""
        values, weights = self.embed(features), mask.to(features.dtype)
        if self.attention is not None:
            return self.norm(self.attention(values, weights))
        return self.norm((values * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True))

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Slide embeddings `(B, D)` -> `(B, E)`, L2-normalised."""
        return F.normalize(self.slide_projection(embeddings), dim=-1)

    def project_reports(self, encoded: torch.Tensor) -> torch.Tensor:
        """Report encodings `(B, R)` -> `(B, E)`, L2-normalised."""
        return F.normalize(self.text_projection(encoded - self.report_mean), dim=-1)

    def loss(self, embeddings: torch.Tensor, reports: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The loss on labels `(B,)` if they are given, else the engine's contrastive loss on reports `(B, R)`."""
        if labels is not None:
            return F.cross_entropy(self.classifier(embeddings), labels)
        scale = self.logit_scale.exp().clamp(max=100.0)
        return slide_level_contrastive_loss(self.project(embeddings), self.project_reports(reports), scale)


@functools.lru_cache(maxsize=2)
def frozen_features(
    cohort: Cohort, start: str | None
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, int]]:
    """Features of training and held-out slides' tiles, standardised by the training tiles; and counts of tiles.

    Args:
        cohort (`Cohort`): the slides.
        start (`str`, *optional*): folder of the tile encoder; `None`: random weights.
    """
    encoder = load_encoder(start, cohort.seed).requires_grad_(False)
    counter = TileCounter(encoder)
    train = encode_all(encoder, all_tiles(cohort.train))
    counts = counter.stop()
    test = encode_all(encoder, all_tiles(cohort.test))
    everything = torch.cat(train)
    mean, std = everything.mean(dim=0), everything.std(dim=0).clamp(min=1e-6)
    train, test = ([(part - mean) / std for part in parts] for parts in (train, test))
    return train, test, counts


def train_on_frozen(
    cohort: Cohort, start: str | None, *, pooling: str, supervision: str, num_steps: int, learning_rate: float
) -> tuple[SlideVectors, dict[str, int]]:
    """Trains a head on all tiles' frozen features.

    Args:
        cohort (`Cohort`): the slides.
        start (`str`, *optional*): folder of the frozen tile encoder; `None`: random weights.
        pooling (`str`): as in `SlideHead`.
        supervision (`str`): `"reports"`, `"labels"` or `"none"` (the mean of the features as it is).
        num_steps (`int`), learning_rate (`float`): of the head.
    """
    train, test, counts = frozen_features(cohort, start)
    if supervision == "none":
        means = (torch.stack([part.mean(dim=0) for part in parts]).numpy() for parts in (train, test))
        return SlideVectors(*means), counts
    head = _new_head(cohort, pooling)
    _fit_head(cohort, head, train, supervision=supervision, num_steps=num_steps, learning_rate=learning_rate)
    return _vectors(head, train, test, supervision), counts


def train_end_to_end(
    cohort: Cohort, start: str | None, *, supervision: str, settings: dict[str, Any]
) -> tuple[SlideVectors, dict[str, int]]:
    """Trains tile encoder and attention pooling together on the sampled tiles alone (the way of ABMILX).

    Slides, tiles, augmentation and schedule are those of the engine's arms, the last steps on the head alone too.
    """
    given = {name: value for name, value in (SETTINGS | settings).items() if name != "model_config"}
    config = TrainConfig(
        dataset=cohort.dataset, output_dir="-", text_model=cohort.text_model, tile_encoder_config=TILE_ENCODER,
        seed=cohort.seed, **given,
    )  # fmt: skip
    data, head = RunData(config, 0, 1), _new_head(cohort, "attention")
    dataset = StepDataset(data.source, data.sampler, augment_flips=True, augment_stain=config.augment_stain)
    labels = _labels(cohort)
    encoder = load_encoder(start, cohort.seed).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": encoder.parameters(), "peak": config.learning_rate},
            {"params": head.parameters(), "peak": config.head_learning_rate},
        ],
        weight_decay=config.weight_decay,
    )
    counter = TileCounter(encoder)
    for batch in step_loader(dataset, range(config.num_steps), num_workers=0, seed=cohort.seed):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(batch.plan.step, config)
        values = IMAGE_PROCESSOR.tiles_to_pixel_values(batch.tiles.flatten(0, 1), "cpu")
        features = encode_tiles(encoder, values, "pooler").unflatten(0, batch.tiles.shape[:2])
        slides = torch.from_numpy(batch.plan.slides)
        embeddings = head(features, torch.from_numpy(batch.plan.sampled >= 0))
        given_labels = labels[slides] if supervision == "labels" else None
        optimizer.zero_grad(set_to_none=True)
        head.loss(embeddings, cohort.reports["train"][slides], given_labels).backward()
        torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *head.parameters()], config.max_gradient_norm)
        optimizer.step()
    train = encode_all(encoder, all_tiles(cohort.train))
    counts = counter.stop()
    _fit_head(
        cohort, head, train, supervision=supervision, num_steps=config.finalize_steps,
        learning_rate=config.head_learning_rate, warmup_steps=0,
    )  # fmt: skip
    return _vectors(head, train, encode_all(encoder, all_tiles(cohort.test)), supervision), counts


def _new_head(cohort: Cohort, pooling: str) -> SlideHead:
    torch.manual_seed(cohort.seed)
    head = SlideHead(64, pooling, cohort.reports["train"].shape[1])
    head.report_mean.copy_(cohort.reports["train"].mean(dim=0))
    return head


def _labels(cohort: Cohort) -> torch.Tensor:
    return torch.tensor([CLASSES.index(label) for label in cohort.labels["train"]])


def _fit_head(
    cohort: Cohort,
    head: SlideHead,
    features: list[torch.Tensor],
    *,
    supervision: str,
    num_steps: int,
    learning_rate: float,
    warmup_steps: int = 20,
) -> None:
    """Trains a head on features of whole slides."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.05)
    random, labels = random_stream(cohort.seed, "head"), _labels(cohort)
    padded, mask = _padded(features)
    head.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _warm_cosine(step, warmup_steps, num_steps)
        slides = torch.from_numpy(random.choice(len(features), size=_BATCH_SLIDES, replace=False))
        loss = head.loss(
            head(padded[slides], mask[slides]),
            cohort.reports["train"][slides],
            labels[slides] if supervision == "labels" else None,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def _vectors(head: SlideHead, train: list[torch.Tensor], test: list[torch.Tensor], supervision: str) -> SlideVectors:
    head.eval()
    embeddings = [head(*_padded(features)) for features in (train, test)]
    vectors = SlideVectors(*(values.numpy() for values in embeddings))
    if supervision == "reports":
        vectors.test_projection, vectors.project_reports = head.project(embeddings[1]), head.project_reports
    return vectors


def _padded(features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of each slide -> `(S, N, D)` and the mask `(S, N)` of real tiles."""
    padded = nn.utils.rnn.pad_sequence(features, batch_first=True)
    lengths = torch.tensor([len(part) for part in features])
    return padded, torch.arange(padded.shape[1])[None] < lengths[:, None]
