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

On a busy machine threads wait for each other, so `one_thread` has processor seconds of one thread for as many tiles:
of deletion, of encoding again, and `at_peak`, of the matrix products alone that deletion cannot share between tiles,
at the speed of one large product (`peak_gflops`). Each is the best of several runs, which take turns. Deletion cannot
be faster than `at_peak`; two quiet cores should need little more than half of its processor seconds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from dre_slcl.training.deletion_curves import attention_scores, curve_area, deletion_curve, draw_curves
from modeling_dre_slcl import DreSlclConfig, DreSlclModel
from modeling_dre_slcl.attribution import linear_score
from modeling_dre_slcl.tile_deletion import embeddings_without_tiles, wide_encoder

_KINDS = 24  # of tissue; the last is what the second class has
_PLANTED = 1 / 12
_NUM_PROBE_SLIDES, _PROBE_TILES = 60, 600
_CHECKED_TILES = 24
_RUNS, _TIMED_TILES, _ENCODED_TILES = 4, 1024, 256


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="more slides and finer curves")
    parser.add_argument("--tiles", type=int, default=10_000, help="tiles of the timed slide (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    picture = Path(__file__).parent / "results" / "heatmap_curves.png"
    parser.add_argument("--out", type=Path, default=picture, help="picture (default: results/heatmap_curves.png)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, kinds = make_model()
    generator = torch.Generator().manual_seed(1)
    score = fit_probe(model, kinds, generator)
    features = make_slide(kinds, arguments.tiles, True, generator)
    exact, seconds = timed(lambda: model.attribute_tiles(features, score), time.monotonic)
    fast, seconds_gradient = timed(lambda: model.attribute_tiles(features, score, method="gradient"), time.monotonic)
    one_thread = measure_one_thread(model, features, arguments.threads)
    areas = measure_curves(model, kinds, score, generator, arguments)
    print(
        json.dumps(
            {
                "benchmark": "heatmap",
                "num_tiles": arguments.tiles,
                "threads": arguments.threads,
                "seconds_deletion": round(seconds, 2),
                "seconds_gradient": round(seconds_gradient, 3),
                "one_thread": one_thread,
                "gradient_correlation": round(float(np.corrcoef(exact, fast)[0, 1]), 5),
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


def timed(function: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> tuple[Any, float]:
    """What a function returns, and the seconds that it took by a clock."""
    started = clock()
    result = function()
    return result, clock() - started


@torch.no_grad()
def measure_one_thread(model: DreSlclModel, features: torch.Tensor, threads: int) -> dict[str, float]:
    """Processor seconds of one thread for all tiles, from samples; `threads` are set again in the end."""
    torch.set_num_threads(1)
    config, encoder = model.config, wide_encoder(model.residual_encoder)
    state = model.empty_state()
    assignment = state.add(features, model.codebook)
    # Tiles of few codewords, as many of each as there are.
    sample = assignment.argsort()[:_TIMED_TILES]
    residuals = state.residuals(model.codebook).repeat(_ENCODED_TILES, 1, 1)
    counts = state.counts.repeat(_ENCODED_TILES, 1)
    inputs, weight = torch.randn(4096, config.hidden_size), torch.randn(config.hidden_size, config.intermediate_size)

    def leave_out() -> None:
        for _ in embeddings_without_tiles(encoder, state, features[sample], assignment[sample], chunk_size=256):
            pass

    work = {"deletion": leave_out, "again": lambda: encoder(residuals, counts), "peak": lambda: inputs @ weight}
    runs = [{name: timed(function)[1] for name, function in work.items()} for _ in range(_RUNS)]
    best = {name: min(run[name] for run in runs) for name in work}
    torch.set_num_threads(threads)
    peak = 2 * inputs.numel() * config.intermediate_size / best["peak"]
    return {
        "cpu_seconds_deletion": round(best["deletion"] / len(sample) * len(features), 2),
        "cpu_seconds_encoding_again": round(best["again"] / _ENCODED_TILES * len(features), 2),
        "cpu_seconds_at_peak": round(
            operations_per_tile(model, int((state.counts > 0).sum())) * len(features) / peak, 2
        ),
        "peak_gflops": round(peak / 1e9, 1),
    }


def operations_per_tile(model: DreSlclModel, num_used: int) -> int:
    """Operations of the matrix products that leaving out a tile needs, if as many codewords have tiles."""
    width, inner = model.config.hidden_size, model.config.intermediate_size
    # Of the first layer only the second matrix of the feed-forward part; of others that of attention too.
    first, others = width * inner, 4 * width**2 + 2 * width * inner
    return 2 * num_used * (first + (len(model.residual_encoder.layers) - 1) * others)


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
