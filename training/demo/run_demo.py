# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl demo`: the whole path on a small synthetic cohort, on a CPU, in minutes.

```
<out>/seed-<n>/cohort/      slides, reports, manifest.csv
<out>/seed-<n>/dataset/     the slide dataset
<out>/seed-<n>/text_model/  a tiny text model for the reports
<out>/seed-<n>/run/         training: checkpoints, metrics.jsonl, model/
<out>/seed-<n>/scores.json  held-out scores, and beside it a table and predictions
<out>/report.html           everything to look at
```
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)
TILE_SIZE_PX = 64
TILE_MPP = 2.0
_LABEL = "subtype"
_PLACES = {"dataset": "dataset", "text_model": "text_model", "output_dir": "run"}
_COHORT = {"num_cases_per_subtype": 36, "slides_per_case": 2, "val_fraction": 0.0, "test_fraction": 0.25}
_SLIDE_SIDE_RANGE_PX = (1000, 1120)
# A small ResNet with group norm: it learns from scratch in few steps, and no statistics of a batch reach the bank.
_TILE_ENCODER = {
    "model_type": "timm_wrapper",
    "architecture": "resnet18",
    "model_args": {"layers": [1, 1, 1, 1], "channels": [32, 64, 96, 128], "norm_layer": "groupnorm"},
}
_TRAINING = {
    "tile_encoder_config": _TILE_ENCODER,
    "model_config": {"num_codewords": 4, "text_projection": "linear", "projection_size": 64},
    "slides_per_batch": 8,
    "tiles_per_slide": 16,
    "bank_mode": "full",
    "first_pass_tiles_per_slide": 32,
    # An encoder from scratch moves away from its first codebook within a few steps.
    "codebook_refits": [10, *range(30, 360, 30)],
    "num_steps": 360,
    "finalize_steps": 40,
    "warmup_steps": 20,
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-3,
    "checkpoint_steps": 180,
    "num_workers": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl demo`."""
    parser.description = (
        "Runs everything on a small synthetic cohort: paints real pyramidal slides with reports, tiles them, trains a "
        "slide encoder from scratch, evaluates it on held-out cases, embeds a slide through the pipeline, and writes "
        "report.html. Takes a few minutes on two cores; needs no GPU and no network. Interrupted, it goes on when "
        "started again."
    )
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one whole run for each (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    # Imports take seconds; the workers that paint slides import this file too and do without them.
    from .demo_report import HEADLINES, mean_rows, write_demo_report

    started = time.monotonic()
    try:
        results = [_run_seed(arguments.out / f"seed-{seed}", seed) for seed in arguments.seeds]
        embedded, slide, match = _embed_one(arguments.out / f"seed-{arguments.seeds[0]}", results[0])
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    page = write_demo_report(
        arguments.out, results, embedded, slide, list(results[0].evaluation.metrics["classes"]), match
    )
    lines = [
        f"{row[0]:<28} {row[1]:<24} trained {row[2]}  random {row[3]}  chance {row[4]}" for row in mean_rows(results)
    ]
    seconds = time.monotonic() - started
    sys.stdout.write("\n".join(lines) + f"\n{len(HEADLINES)} tasks, {seconds:.0f} s. Open {page}\n")
    return 0


def _run_seed(folder: Path, seed: int) -> Any:
    """Everything for one seed; returns its `SeedResult`."""
    from modeling_dre_slcl.tile_grid import TileGridConfig

    from ..build_dataset import build_dataset
    from ..config import TrainConfig
    from ..manifest import read_manifest
    from ..train import train
    from .cohort import write_cohort
    from .demo_report import SeedResult
    from .text_model import write_text_model

    stages: dict[str, float] = {}
    with _stage("slides", stages):
        manifest = write_cohort(folder / "cohort", seed=seed, side_range_px=_SLIDE_SIDE_RANGE_PX, **_COHORT)
    with _stage("tiles", stages):
        grid = TileGridConfig(tile_size_px=TILE_SIZE_PX, tile_mpp=TILE_MPP)
        build_dataset(
            manifest, folder / "dataset", grid, num_workers=2, license_name="apache-2.0", stain="H&E (synthetic)"
        )
    with _stage("training", stages):
        reports = [row.report for row in read_manifest(manifest) if row.split == "train"]
        if not (folder / "text_model").exists():
            write_text_model(folder / "text_model", reports, seed=seed)
        paths = {name: str(folder / place) for name, place in _PLACES.items()}
        settings = _TRAINING | paths | {"seed": seed}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        if status := train(TrainConfig(**settings)):
            raise KeyboardInterrupt(f"Training was stopped (exit status {status}).")
    with _stage("evaluation", stages):
        evaluation = _evaluate(folder, seed)
    return SeedResult(seed, folder / "run", evaluation, stages)


def _evaluate(folder: Path, seed: int) -> Any:
    """The trained model on the held-out cases; returns its `Evaluation`."""
    from transformers import AutoModel, AutoProcessor

    from ..evaluate_model import evaluate_model
    from ..evaluation_files import write_evaluation
    from ..tile_source import TileSource
    from .report_writer import PROMPT_TEMPLATES, SUBTYPES

    evaluation = evaluate_model(
        AutoModel.from_pretrained(folder / "run" / "model").eval(),
        AutoProcessor.from_pretrained(folder / "run" / "model"),
        TileSource(folder / "dataset", "test"),
        source_train=TileSource(folder / "dataset", "train"),
        label_column=_LABEL,
        class_names=SUBTYPES,
        templates=PROMPT_TEMPLATES,
        seed=seed,
    )
    write_evaluation(folder / "scores.json", evaluation)
    return evaluation


def _embed_one(folder: Path, result: Any) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """A held-out slide through the pipeline, and against text.

    Returns:
        `tuple`: the pipeline's result with `attribution`, the slide's path, and `text`, `truth` and `similarities`.
    """
    from transformers import AutoTokenizer, pipeline

    from modeling_dre_slcl import SlideFeatureExtractionPipeline

    from .report_writer import PROMPT_TEMPLATES, SUBTYPES

    test = result.evaluation.test
    slide_id, truth = test.slide_ids[0], test.labels[_LABEL][0]
    slide = folder / "cohort" / "slides" / f"{slide_id}.svs"
    model = str(folder / "run" / "model")
    embed = pipeline("slide-feature-extraction", model=model, pipeline_class=SlideFeatureExtractionPipeline)
    embedded = embed(slide, return_tile_features=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = embed.model.zero_shot_classifier(tokenizer, list(SUBTYPES.values()), PROMPT_TEMPLATES).cpu()
    similarity = dict(zip(SUBTYPES, (classifier @ embedded["slide_projection"]).tolist(), strict=True))
    place = list(SUBTYPES).index(truth)
    # What sets the class apart from the others, not what all tissue has in common.
    direction = classifier[place] - classifier.mean(dim=0)
    attribution = embed.model.attribute_tiles(embedded["tile_features"], direction).numpy()
    embedded |= {"attribution": attribution, "tile_size_px": TILE_SIZE_PX, "tile_mpp": TILE_MPP}
    return embedded, slide, {"text": SUBTYPES[truth][0], "truth": truth, "similarities": similarity}


@contextmanager
def _stage(name: str, stages: dict[str, float]) -> Iterator[None]:
    logger.info("Demo: %s.", name)
    started = time.monotonic()
    yield
    stages[name] = time.monotonic() - started
