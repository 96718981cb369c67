# SPDX-License-Identifier: Apache-2.0
"""What a demo run did, as one HTML page: curves, tables, thumbnails, a heatmap, nearest reports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.slide_tiles import tile_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

from ..evaluation_files import RESULT_HEADER, Evaluation, result_rows
from ..figures import draw_embedding_map, draw_slide_grid, draw_slide_heatmap, draw_training_curves
from ..html_report import (
    Block,
    Commands,
    Confusion,
    NearestReports,
    Paragraph,
    Picture,
    PictureRow,
    Section,
    Table,
    write_html_report,
)

_NEAREST = 3
HEADLINES = {
    "zero_shot": ("zero-shot, from text alone", "balanced_accuracy", "balanced accuracy"),
    "linear_probe": ("linear probe", "balanced_accuracy", "balanced accuracy"),
    "slide_to_report": ("slide to report", "mean_average_precision", "mean average precision"),
    "report_to_slide": ("report to slide", "mean_average_precision", "mean average precision"),
}


@dataclass(frozen=True)
class SeedResult:
    """One seed's part of a demo.

    Args:
        seed (`int`): the seed.
        folder (`Path`): its training run.
        evaluation (`Evaluation`): on the held-out cases.
        stages (`dict`): stage -> seconds.
    """

    seed: int
    folder: Path
    evaluation: Evaluation
    stages: dict[str, float]


def write_demo_report(
    out: Path, results: list[SeedResult], embedded: dict[str, Any], slide: Path, class_names: list[str], match: dict
) -> Path:
    """Draws the pictures and writes `report.html`.

    Args:
        out (`Path`): folder of the demo.
        results (`list` of `SeedResult`): one per seed; pictures are of the first.
        embedded (`dict`): what the pipeline returned for `slide`, with tile features and `attribution` `(N,)`.
        slide (`Path`): a held-out slide.
        class_names (`list` of `str`): the subtypes.
        match (`dict`): `text`, what the heatmap explains, and `similarities`, class -> cosine of the slide with it.

    Returns:
        `Path`: the page.
    """
    first = results[0]
    pictures = _draw(out / "figures", first, embedded, slide)
    pipeline = f'pipeline("slide-feature-extraction", model="{first.folder / "model"}", trust_remote_code=True)'
    sections = [
        Section("Held-out cases", [*_tables(results), _confusion(first.evaluation)]),
        Section("Training", [Picture(pictures["curves"], "Loss, learning rate and the memory bank, by step.")]),
        Section("A held-out slide, through the pipeline", _slide_blocks(pictures, embedded, match)),
        Section("Its nearest reports", [_nearest(first.evaluation, embedded, pictures["grid"])]),
        Section(
            "Embeddings", [Picture(pictures["map"], "Held-out slides in the plane of their two main directions.")]
        ),
        Section(
            "The same on your slides",
            [
                Commands(
                    [
                        "dre-slcl tiles --slides manifest.csv --out dataset",
                        "dre-slcl train --config run.yaml",
                        "dre-slcl evaluate --model run/model --dataset dataset --out scores.json",
                        "dre-slcl embed --model run/model --slides manifest.csv --out embeddings",
                    ],
                    "`dre-slcl COMMAND --help` explains each.",
                ),
                Commands([pipeline], "From Python:"),
                Paragraph("For research; not for diagnosis. The slides of this demo are synthetic."),
            ],
        ),
    ]
    summary = (
        f"A slide encoder trained from scratch on {len(first.evaluation.train or [])} synthetic slides, and evaluated "
        f"on {len(first.evaluation.test)} slides of cases that it never saw. Classes: {', '.join(class_names)}."
    )
    return write_html_report(out / "report.html", title="DRE-SLCL demo", summary=summary, sections=sections)


def _draw(folder: Path, first: SeedResult, embedded: dict[str, Any], slide: Path) -> dict[str, Path]:
    """Draws everything into `folder`; returns name -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.png" for name in ("curves", "map", "grid", "heatmap")}
    draw_training_curves(first.folder / "metrics.jsonl", files["curves"])
    test = first.evaluation.test
    labels = [str(value) for value in test.labels[first.evaluation.metrics["label_column"]]]
    draw_embedding_map(test.slide_embedding, labels, files["map"], title="held-out slides")
    config = TileGridConfig(tile_size_px=embedded["tile_size_px"], tile_mpp=embedded["tile_mpp"])
    with SlideReader(slide) as reader:
        grid = tile_slide(reader, config)
    draw_slide_grid(slide, grid, files["grid"], overview_mpp=2.0)
    draw_slide_heatmap(slide, grid, embedded["attribution"], files["heatmap"], overview_mpp=2.0)
    return files


def _tables(results: list[SeedResult]) -> list[Block]:
    """A table per seed, and the mean over seeds where there are several."""
    blocks: list[Block] = []
    if len(results) > 1:
        blocks.append(Table(RESULT_HEADER, mean_rows(results), f"Mean over {len(results)} seeds [lowest, highest]."))
    for result in results:
        seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result.stages.items())
        rows = result_rows(result.evaluation.metrics)
        blocks.append(Table(RESULT_HEADER, rows, f"Seed {result.seed}; brackets: 95% over cases. {seconds}."))
    return blocks


def mean_rows(results: list[SeedResult]) -> list[tuple[str, ...]]:
    """Headline scores under `RESULT_HEADER`: the mean over seeds, with the lowest and highest."""
    rows = []
    for task, (title, score, score_title) in HEADLINES.items():
        found = [result.evaluation.metrics["tasks"][task] for result in results]
        cells = []
        for who in ("trained", "random"):
            values = [scores[who][score] for scores in found]
            cells.append(f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
        chance = np.mean([scores["chance"][score] for scores in found])
        rows.append((title, score_title, *cells, f"{chance:.3f}"))
    return rows


def _confusion(evaluation: Evaluation) -> Confusion:
    metrics = evaluation.metrics
    counts = metrics["tasks"]["zero_shot"]["trained"]["confusion"]
    return Confusion(metrics["classes"], counts, "Zero-shot from text, first seed: right class by row.")


def _slide_blocks(pictures: dict[str, Path], embedded: dict[str, Any], match: dict[str, Any]) -> list[Block]:
    similarities = [(name, f"{value:.3f}") for name, value in match["similarities"].items()]
    return [
        PictureRow(
            [
                Picture(pictures["grid"], f"{embedded['slide_id']}: {embedded['num_tiles']} tiles."),
                Picture(
                    pictures["heatmap"],
                    f"Tiles that speak for \u201c{match['text']}\u201d: what the match loses without.",
                ),
            ]
        ),
        Table(("class", "cosine similarity"), similarities, f"The slide against text; it is {match['truth']}."),
    ]


def _nearest(evaluation: Evaluation, embedded: dict[str, Any], picture: Path) -> NearestReports:
    similarity = evaluation.report_projection @ np.asarray(embedded["slide_projection"])
    own = evaluation.test.reports[evaluation.test.slide_ids.index(embedded["slide_id"])]
    nearest = np.argsort(-similarity)[:_NEAREST]
    matches = [(float(similarity[k]), evaluation.reports[k], evaluation.reports[k] == own) for k in nearest]
    return NearestReports(embedded["slide_id"], matches, Picture(picture, embedded["slide_id"]))
