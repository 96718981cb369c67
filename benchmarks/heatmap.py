# SPDX-License-Identifier: Apache-2.0
"""Heatmaps: how long exact deletion takes for a slide, whether it is exact, and whether it is faithful.

    python benchmarks/heatmap.py           # a slide of 10,000 tiles, two threads
    python benchmarks/heatmap.py --full    # curves of eight slides instead of two, drawn with 100 points

The model has the default sizes (384 wide, 16 codewords, 2 layers) and random weights. Slides are synthetic tile
features: a slide of the second class has one tile in twelve of a kind that those of the first class lack. What is
explained is a ridge probe that was fitted on the embeddings of other slides. Deletion and insertion curves compare the
order of exact deletion with that of its first-order term, of attention, and of chance; the curves of the first slide
are drawn to `--out`.

Ends in one line of JSON. Targets: `seconds_deletion` under 10 on two quiet cores; `largest_error` (of exact deletion
against encoding the slide again without the tile in float64, relative to the largest effect) under 0.01;
`deletion_area` (the mean height of the curve) of `deletion` below those of `attention` and `random`, its
`insertion_area` above theirs.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from dre_slcl.training.deletion_curves import attention_scores, curve_area, deletion_curve, draw_curves
from modeling_dre_slcl import DreSlclConfig, DreSlclModel
from modeling_dre_slcl.attribution import linear_score

_KINDS = 24  # of tissue; the last is what the second class has
_PLANTED = 1 / 12
_NUM_PROBE_SLIDES, _PROBE_TILES = 60, 600
_CHECKED_TILES = 24


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="more slides and finer curves")
    parser.add_argument("--tiles", type=int, default=10_000, help="tiles of the timed slide (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("heatmap-curves.png"), help="picture (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, kinds = make_model()
    generator = torch.Generator().manual_seed(1)
    score = fit_probe(model, kinds, generator)
    features = make_slide(kinds, arguments.tiles, True, generator)
    seconds = {}
    for method in ("deletion", "gradient"):
        started = time.monotonic()
        effects = model.attribute_tiles(features, score, method=method)
        seconds[method] = time.monotonic() - started
        if method == "deletion":
            exact = effects
    areas = measure_curves(model, kinds, score, generator, arguments)
    print(
        json.dumps(
            {
                "benchmark": "heatmap",
                "num_tiles": arguments.tiles,
                "threads": arguments.threads,
                "seconds_deletion": round(seconds["deletion"], 2),
                "seconds_gradient": round(seconds["gradient"], 3),
                "seconds_encoding_again": round(time_encoding_again(model, features), 1),
                "gradient_correlation": round(float(np.corrcoef(exact, effects)[0, 1]), 5),
                "largest_error": largest_error(model, features, exact, score),
                **areas,
            }
        )
    )
    return 0


def make_model() -> tuple[DreSlclModel, torch.Tensor]:
    """A random model of the default sizes, and the kinds of tissue `(kinds, D)`; codewords are among them."""
    torch.manual_seed(0)
    config = DreSlclConfig()
    # Nothing here looks at pixels: a tile encoder of one layer is built in a moment.
    config.encoder_config.num_hidden_layers = 1
    model = DreSlclModel(config).eval()
    kinds = F.normalize(torch.randn(_KINDS, config.hidden_size), dim=-1)
    with torch.no_grad():
        model.codebook.copy_(kinds[: config.num_codewords] + 0.02 * torch.randn(config.num_codewords, len(kinds[0])))
        # At its initialisation the Transformer hardly mixes codewords; a trained one does.
        for layer in model.residual_encoder.layers:
            for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
                linear.weight.mul_(2)
    return model, kinds


def make_slide(kinds: torch.Tensor, num_tiles: int, has_planted: bool, generator: torch.Generator) -> torch.Tensor:
    """Tile features `(N, D)` of a slide."""
    shares = torch.rand(_KINDS - 1, generator=generator)
    kind = torch.multinomial(shares, num_tiles, replacement=True, generator=generator)
    is_planted = torch.rand(num_tiles, generator=generator) < (_PLANTED if has_planted else 0)
    kind[is_planted] = _KINDS - 1
    noise = torch.randn(num_tiles, kinds.shape[1], generator=generator) * kinds.shape[1] ** -0.5
    return F.normalize(kinds[kind] + 0.7 * noise, dim=-1)


@torch.no_grad()
def fit_probe(model: DreSlclModel, kinds: torch.Tensor, generator: torch.Generator) -> Any:
    """A ridge probe for the second class, fitted on slide embeddings."""
    labels = np.arange(_NUM_PROBE_SLIDES) % 2
    embeddings = [
        model.get_slide_features(make_slide(kinds, _PROBE_TILES, bool(label), generator)[None]).slide_embedding[0]
        for label in labels
    ]
    probe = Ridge(alpha=1.0).fit(torch.stack(embeddings).numpy(), labels)
    return linear_score(torch.from_numpy(probe.coef_).float(), float(probe.intercept_))


def time_encoding_again(model: DreSlclModel, features: torch.Tensor) -> float:
    """Seconds to encode the slide's residuals anew for each tile, from a sample of tiles: what deletion saves."""
    state = model.state_of_tiles(features)
    residuals = state.residuals(model.codebook).repeat(64, 1, 1)
    counts = state.counts.repeat(64, 1)
    num_batches = 4
    started = time.monotonic()
    with torch.no_grad():
        for _ in range(num_batches):
            model.residual_encoder(residuals, counts)
    return (time.monotonic() - started) / (64 * num_batches) * len(features)


@torch.no_grad()
def largest_error(model: DreSlclModel, features: torch.Tensor, exact: torch.Tensor, score: Any) -> float:
    """Largest difference to encoding the slide again without the tile in float64, relative to the largest effect."""
    wide = DreSlclModel(model.config).eval().double()
    wide.load_state_dict(model.state_dict())
    features = features.double()

    def encode(kept: torch.Tensor) -> torch.Tensor:
        return score(wide.get_slide_features(kept[None]).slide_embedding)[0]

    whole, errors = encode(features), []
    for tile in torch.linspace(0, len(features) - 1, _CHECKED_TILES).long().tolist():
        without = encode(torch.cat([features[:tile], features[tile + 1 :]]))
        errors.append(abs(float(whole - without) - float(exact[tile])))
    return round(max(errors) / float(exact.abs().max()), 6)


def measure_curves(
    model: DreSlclModel, kinds: torch.Tensor, score: Any, generator: torch.Generator, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Mean areas under both curves of each method."""
    num_slides, num_points = (8, 100) if arguments.full else (2, 40)
    areas: dict[str, dict[str, list[float]]] = {"deletion": {}, "insertion": {}}
    for number in range(num_slides):
        features = make_slide(kinds, 1500, True, generator)
        methods = {
            "deletion": model.attribute_tiles(features, score),
            "gradient": model.attribute_tiles(features, score, method="gradient"),
            "attention": attention_scores(model, features),
            "random": torch.rand(len(features), generator=generator),
        }
        curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {mode: {} for mode in areas}
        for name, values in methods.items():
            for mode in areas:
                curve = deletion_curve(model, features, values, score, mode=mode, num_points=num_points)
                curves[mode][name] = curve
                areas[mode].setdefault(name, []).append(curve_area(*curve))
        if number == 0:
            draw_curves(arguments.out, curves)
    return {
        f"{mode}_area": {name: round(float(np.mean(values)), 4) for name, values in found.items()}
        for mode, found in areas.items()
    }


if __name__ == "__main__":
    sys.exit(main())
