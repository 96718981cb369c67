# SPDX-License-Identifier: Apache-2.0
"""Embedding a slide from a part of its tiles: how many it takes, and whether the stated error holds.

    python benchmarks/adaptive.py                    # trains a small encoder first, a minute or two
    python benchmarks/adaptive.py --codeword-tokens vlad  # the paper's head, which hangs on codewords of few tiles
    python benchmarks/adaptive.py --model run/model --full

Real full-size slides are taken if a folder of them is found (`--slides`), else one painted slide. Each is embedded
once, with the features of its tiles kept; then draws are played through by the code that embeds (`SlideSums`), which
costs no pixels. Tiles are made small (`--tile-mpp`), so that a slide has thousands of them. For each slide:

- `share_for_cosine`: least share of tiles (of 5%, 10%, ...) whose embedding has a mean cosine of `--cosine` to the
  full one; target at most 0.25 on slides of 2,000 tiles and more;
- `cosine_at_quarter`, `even_cosine_at_quarter`: mean cosine from a quarter of the tiles, drawn as planned and evenly;
- `expected_over_true`: mean estimated error over mean true error, over the shares; 1 is right;
- `coverage`: share of draws, at all shares, whose true error is within the stated bound; target at least 0.95;
- `stop_share`, `stop_coverage`: with `--tolerance`, where draws stop, and the share of them within the tolerance.

The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

_ROOT = Path(__file__).resolve().parents[1]
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5)
_TRAINING_STEPS = 150


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a trained model (default: trains a small one)")
    parser.add_argument("--codeword-tokens", choices=("mean", "vlad"), help="of the model that is trained")
    parser.add_argument("--slides", type=Path, help="folder of slides (default: real ones found nearby)")
    parser.add_argument("--tile-mpp", type=float, default=0.5, help="resolution of tiles, um/px (default: 0.5)")
    parser.add_argument("--draws", type=int, default=10, help="draws for each share (default: 10)")
    parser.add_argument("--cosine", type=float, default=0.995, help="(default: 0.995)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="1 - cosine to stop at (default: 0.01)")
    parser.add_argument("--full", action="store_true", help="100 draws")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    draws = 100 if arguments.full else arguments.draws
    with tempfile.TemporaryDirectory() as folder:
        model_dir = arguments.model or train_model(Path(folder), arguments.codeword_tokens)
        figures = {}
        for slide in find_slides(arguments.slides, Path(folder)):
            model, features, tile_xy = encode(model_dir, slide, arguments.tile_mpp)
            figures[slide.stem] = play(model, slide.stem, features, tile_xy, draws, arguments)
            print(slide.stem, json.dumps(figures[slide.stem]), flush=True)
    large = [figure for figure in figures.values() if figure["num_tiles"] >= 2000]
    print(
        json.dumps(
            {
                "benchmark": "adaptive",
                "targets": {"worst_share_for_cosine": 0.25, "worst_coverage": 0.95, "worst_stop_coverage": 0.95},
                "worst_share_for_cosine": max((one["share_for_cosine"] for one in large), default=None),
                "worst_coverage": min(one["coverage"] for one in figures.values()),
                "worst_stop_coverage": min(one["stop_coverage"] for one in figures.values()),
                "slides": figures,
            }
        )
    )
    return 0


def find_slides(folder: Path | None, scratch: Path) -> list[Path]:
    """Lists the slides to embed."""
    beside = [parent / "shared" / "data" / "slides_full" for parent in _ROOT.parents]
    for candidate in [folder] if folder else beside:
        if candidate.is_dir():
            return sorted(candidate.glob("*.svs"))
    from dre_slcl.training.demo.slide_writer import write_slide
    from dre_slcl.training.demo.tissue_painter import CaseTraits, paint_slide

    traits = CaseTraits("adaptive-1", "tubular", brisk_lymphocytes=True, necrosis=True, mucin=True, nuclear_grade=2)
    path = scratch / "painted.svs"
    write_slide(path, paint_slide(traits, "adaptive-1", seed=0, side_range_px=(5000, 5200)), mpp=0.5)
    return [path]


def train_model(folder: Path, codeword_tokens: str | None) -> Path:
    """Trains a small encoder on a small painted cohort, as the demo does on a larger one; returns its folder."""
    from dre_slcl.training.build_dataset import build_dataset
    from dre_slcl.training.config import TrainConfig
    from dre_slcl.training.demo import run_demo
    from dre_slcl.training.demo.cohort import write_cohort
    from dre_slcl.training.demo.text_model import write_text_model
    from dre_slcl.training.manifest import read_manifest
    from dre_slcl.training.train import train
    from modeling_dre_slcl.tile_grid import TileGridConfig

    sizes = {"num_cases_per_subtype": 8, "slides_per_case": 1, "val_fraction": 0.0, "test_fraction": 0.0}
    manifest = write_cohort(folder / "cohort", seed=0, side_range_px=(1000, 1050), **sizes)
    grid = TileGridConfig(tile_size_px=run_demo.TILE_SIZE_PX, tile_mpp=run_demo.TILE_MPP)
    build_dataset(manifest, folder / "dataset", grid, num_workers=1, progress=False)
    write_text_model(folder / "text_model", [row.report for row in read_manifest(manifest)], seed=0)
    settings = run_demo._TRAINING | {
        "dataset": str(folder / "dataset"),
        "text_model": str(folder / "text_model"),
        "output_dir": str(folder / "run"),
        "seed": 0,
        "num_steps": _TRAINING_STEPS,
        "finalize_steps": 10,
        "codebook_refits": [step for step in (10, 30, 60, 90, 120) if step < _TRAINING_STEPS],
        "checkpoint_steps": _TRAINING_STEPS,
        "warmup_steps": 10,
        "num_workers": 0,
    }
    if codeword_tokens:
        settings["model_config"] = settings["model_config"] | {"codeword_tokens": codeword_tokens}
    if train(TrainConfig(**settings)):
        raise KeyboardInterrupt
    return folder / "run" / "model"


def encode(model_dir: Path, slide: Path, tile_mpp: float) -> tuple[Any, torch.Tensor, np.ndarray]:
    """Encodes all tiles of a slide; returns the model, features (N, D) and corners (N, 2)."""
    from dre_slcl.training.embed_engine import EmbedOptions, SlideJob, iter_embeddings
    from dre_slcl.training.embed_model import load_model

    model, image_processor = load_model(str(model_dir), None, None)
    model.config.tile_mpp = tile_mpp
    options = EmbedOptions(batch_size=64, keep_features=True)
    [(_, result)] = iter_embeddings(model, image_processor, [SlideJob(slide.stem, slide)], options)
    return model.cpu(), result["tile_features"], result["tile_xy"].numpy()


def play(
    model: Any,
    name: str,
    features: torch.Tensor,
    tile_xy: np.ndarray,
    draws: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Plays draws of a slide through; returns its figures."""
    from modeling_dre_slcl.slide_sampling import NUM_GROUPS, SamplingConfig

    full = _draw(model, name, features, tile_xy, SamplingConfig())
    shares = {}
    for share in _SHARES:
        size = int(len(features) * share) // NUM_GROUPS * NUM_GROUPS
        sample = [SamplingConfig(max_tiles=size, seed=seed) for seed in range(draws)]
        shares[share] = _compare(full, [_draw(model, name, features, tile_xy, one) for one in sample])
    even = [_draw_evenly(model, name, features, tile_xy, len(features) // 4, seed) for seed in range(draws)]
    stops = [SamplingConfig(tolerance=arguments.tolerance, seed=seed) for seed in range(draws)]
    stopped = _compare(full, [_draw(model, name, features, tile_xy, one) for one in stops])
    true, expected, bound, _ = (np.stack(values) for values in zip(*shares.values(), strict=True))
    enough = [share for share, errors in shares.items() if 1 - errors[0].mean() >= arguments.cosine]
    return {
        "num_tiles": len(features),
        "share_for_cosine": min(enough, default=1.0),
        "cosine_at_quarter": round(float(1 - shares[0.25][0].mean()), 5),
        "even_cosine_at_quarter": round(float(1 - _true_errors(full, even).mean()), 5),
        "expected_over_true": round(float(expected.mean() / true.mean()), 3),
        "coverage": round(float((true <= bound).mean()), 4),
        "stop_share": round(float(stopped[3].mean() / len(features)), 3),
        "stop_cosine": round(float(1 - stopped[0].mean()), 5),
        "stop_coverage": round(float((stopped[0] <= arguments.tolerance).mean()), 4),
    }


def _draw(model: Any, name: str, features: torch.Tensor, tile_xy: np.ndarray, sampling: Any) -> dict[str, Any]:
    """What embedding a slide with these settings gives."""
    from modeling_dre_slcl.slide_sums import SlideSums

    sums, start = SlideSums(model, name, tile_xy, sampling), 0
    while True:
        sums.add(features[torch.from_numpy(sums.order[start : sums.limit])], start)
        start = sums.limit
        if sums.is_finished():
            return sums.describe()


@torch.no_grad()
def _draw_evenly(
    model: Any, name: str, features: torch.Tensor, tile_xy: np.ndarray, size: int, seed: int
) -> dict[str, Any]:
    """What embedding a slide from so many tiles gives that are drawn evenly, each as likely as any other."""
    from modeling_dre_slcl.slide_sampling import sampling_order

    drawn = torch.from_numpy(sampling_order(tile_xy, name, seed)[:size])
    return {"slide_embedding": model.get_state_features(model.state_of_tiles(features[drawn])).slide_embedding[0]}


def _true_errors(full: dict[str, Any], drawn: list[dict[str, Any]]) -> np.ndarray:
    """1 - cosine of each draw's embedding to that of all tiles."""
    unit = F.normalize(full["slide_embedding"].double(), dim=0)
    return np.array([1 - float(F.normalize(one["slide_embedding"].double(), dim=0) @ unit) for one in drawn])


def _compare(full: dict[str, Any], drawn: list[dict[str, Any]]) -> tuple[np.ndarray, ...]:
    """True error, expected error, bound and number of tiles of each draw."""
    names = ("estimated_error", "error_bound", "num_tiles_encoded")
    return _true_errors(full, drawn), *(np.array([one[name] for one in drawn]) for name in names)


if __name__ == "__main__":
    sys.exit(main())
