# SPDX-License-Identifier: Apache-2.0
"""DRE-SLCL's parts beside those of others: aggregators of tile features, and ways of embedding a folder of slides.

    python benchmarks/peers.py           # under four minutes on two idle cores; needs the extra `peers`
    python benchmarks/peers.py --full    # all tasks, more seeds, slides, tiles and epochs; about an hour

Features are synthetic with a known structure (`peers_features`), not those of a pretrained encoder: they show which
kinds of signal an aggregator can use, not how it does on patients. Each seed draws another cohort. The last line is
JSON; `--out` (default: benchmarks/results) also gets `peers.json`, and the tables as `peers_tables.md`:

- `auroc_<task>_<method>`, `balanced_accuracy_...`: held-out mean over seeds, with 95% t-intervals over seeds in
  `intervals`; `over_abmil_<task>_<method>`: mean difference in AUROC to ABMIL on the same cohorts, with its interval.
  No target: a comparison that is won or lost.
- `parameters_<method>`, `epoch_seconds_<method>`: one thread; `epoch_ratio_transmil`: TransMIL's epoch over that of
  the residual encoder with 16 codewords, both from tiles; target: above 1.
- `embed_speedup`: seconds per slide after slide (OpenSlide) over one stream, synthetic slides; `embed_speedup_same_
  reader`: the same with this package's reader in both; targets: at least 1.0. `embed_memory_ratio`: peak memory,
  stream over per slide; target: at most 1.25. `real_...`: the same on the scans beside the checkout, if there are any.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peers_embedding
import torch
from large_slide import write_large_slide
from peers_features import TASKS, draw_cohort
from peers_models import METHODS, Sizes, build, epoch_seconds, held_out_scores, train_one
from scipy import stats

from modeling_dre_slcl.atomic_files import write_json, write_text

_ROOT = Path(__file__).resolve().parents[1]
_DEFAULT = {"tasks": ("rare_variant", "tissues"), "seeds": 3, "sizes": Sizes(), "slides": 8, "side_px": 3000}
_FULL = {
    "tasks": TASKS,
    "seeds": 5,
    "sizes": Sizes(num_tiles=100, num_train=400, num_epochs=10),
    "slides": 30,
    "side_px": 6000,
}
_REAL_MPP = 2.0  # the coarsest that all scans used here have


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more of everything")
    parser.add_argument("--only", choices=("aggregators", "embedding"), help="one half")
    parser.add_argument("--seeds", type=int, help="cohorts of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="where the label shows")
    parser.add_argument("--train-slides", type=int, help="training slides of a cohort")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = dict(_FULL if arguments.full else _DEFAULT)
    setting["seeds"] = arguments.seeds or setting["seeds"]
    setting["tasks"] = tuple(arguments.tasks or setting["tasks"])
    setting["sizes"] = replace(setting["sizes"], num_train=arguments.train_slides or setting["sizes"].num_train)
    figures: dict[str, Any] = {"benchmark": "peers", "machine": platform.machine(), "torch": torch.__version__}
    figures["features"] = "synthetic, known structure"
    tables = []
    if arguments.only != "embedding":
        scores = compare_aggregators(setting["tasks"], range(setting["seeds"]), setting["sizes"])
        summary = summarise(scores, setting["sizes"])
        figures |= summary
        tables.append(aggregator_table(summary, setting))
    if arguments.only != "aggregators":
        embedding = compare_embedding(setting["slides"], setting["side_px"], repetitions=2 if arguments.full else 1)
        figures |= embedding_figures(embedding)
        tables.append(embedding_table(embedding))
    figures["targets"] = {
        "epoch_ratio_transmil": "> 1",
        "embed_speedup": ">= 1.0",
        "embed_speedup_same_reader": ">= 1.0",
        "embed_memory_ratio": "<= 1.25",
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "peers.json", figures)
    write_text(arguments.out / "peers_tables.md", "\n".join(tables))
    print(json.dumps(figures))


def compare_aggregators(tasks: tuple[str, ...], seeds: range, sizes: Sizes) -> list[dict[str, Any]]:
    """Trains every method on every cohort; returns a row of held-out scores for each."""
    rows = []
    for task in tasks:
        for seed in seeds:
            cohort = draw_cohort(
                task, num_slides=sizes.num_slides, num_tiles=sizes.num_tiles, width=sizes.width, seed=seed
            )
            validation_end = sizes.num_train + sizes.num_validation
            train, validation = (
                cohort.part(slice(0, sizes.num_train)),
                cohort.part(slice(sizes.num_train, validation_end)),
            )
            test = cohort.part(slice(validation_end, None))
            for method in METHODS:
                started = time.monotonic()
                model, rate = train_one(method, sizes, train, validation, seed)
                scores = held_out_scores(model, test)
                rows.append({"task": task, "seed": seed, "method": method, "rate": rate, **scores})
                print(json.dumps(rows[-1] | {"seconds": round(time.monotonic() - started, 1)}), flush=True)
    return rows


def summarise(rows: list[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    """Means, intervals and differences over seeds; parameters and times of each method."""
    figures: dict[str, Any] = {"intervals": {}}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for task in tasks:
        found = {
            (method, metric): [row[metric] for row in rows if (row["task"], row["method"]) == (task, method)]
            for method in METHODS
            for metric in ("auroc", "balanced_accuracy")
        }
        differences = {
            f"over_abmil_{task}_{method}": list(np.subtract(found[method, "auroc"], found["abmil", "auroc"]))
            for method in METHODS
            if method != "abmil"
        }
        named = {f"{metric}_{task}_{method}": values for (method, metric), values in found.items()} | differences
        for name, values in named.items():
            figures[name] = round(statistics.fmean(values), 3)
            is_score = not name.startswith("over_")
            figures["intervals"][name] = t_interval(values, bounds=(0, 1) if is_score else (-1, 1))
    train = draw_cohort(tasks[0], num_slides=sizes.num_train, num_tiles=sizes.num_tiles, width=sizes.width, seed=0)
    for method in METHODS:
        model = build(method, sizes, train, 0)
        figures[f"parameters_{method}"] = sum(p.numel() for p in model.parameters())
        for way, seconds in epoch_seconds(method, sizes, train).items():
            figures[f"epoch_seconds_{method}" + ("" if way == "from_tiles" else f"_{way}")] = round(seconds, 3)
    figures["epoch_ratio_transmil"] = round(
        figures["epoch_seconds_transmil"] / figures["epoch_seconds_residual_16"], 2
    )
    return figures


def t_interval(values: list[float], bounds: tuple[float, float]) -> list[float] | None:
    """95% interval of the mean of values of independent cohorts, within bounds; `None` for fewer than three."""
    if len(values) < 3:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    ends = np.clip(statistics.fmean(values) + np.array([-half, half]), *bounds)
    return [round(float(end), 3) for end in ends]


def compare_embedding(num_slides: int, side_px: int, *, repetitions: int) -> dict[str, dict[str, dict[str, float]]]:
    """Synthetic slides, and the scans beside the checkout where they are."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = scratch / "synthetic"
        folder.mkdir()
        for place in range(num_slides):
            side = round(side_px * (0.5 + (place % 5) / 4))  # slides of a cohort are not of one size
            write_large_slide(folder / f"slide-{place}.svs", side, side, mpp=0.5, tissue_share=0.9, seed=place)
        found["synthetic"] = peers_embedding.measure(folder, scratch, tile_mpp=0.5, repetitions=repetitions)
        scans = real_slides()
        if scans:
            folder = scratch / "real"
            folder.mkdir()
            for path in scans:
                (folder / path.name).symlink_to(path)
            found["real"] = peers_embedding.measure(folder, scratch, tile_mpp=_REAL_MPP, repetitions=repetitions)
        shutil.rmtree(folder)
    return found


def real_slides() -> list[Path]:
    """Scans of 5x and 10x in `shared/data/slides` beside the checkout."""
    for parent in _ROOT.parents:
        folder = parent / "shared" / "data" / "slides"
        if folder.is_dir():
            return sorted([*folder.glob("*_5x.svs"), *folder.glob("*_10x.svs")])
    return []


def embedding_figures(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Ratios, and seconds per slide."""
    figures: dict[str, Any] = {}
    for cohort, ways in found.items():
        prefix = "" if cohort == "synthetic" else f"{cohort}_"
        stream, theirs, same = (ways[way] for way in peers_embedding.WAYS)
        if len({way["num_tiles"] for way in ways.values()}) != 1:
            raise RuntimeError(f"{cohort}: the ways encoded different numbers of tiles: {ways}.")
        figures |= {
            f"{prefix}embed_tiles": stream["num_tiles"],
            f"{prefix}embed_slides": stream["num_slides"],
            f"{prefix}embed_speedup": round(theirs["seconds"] / stream["seconds"], 3),
            f"{prefix}embed_speedup_same_reader": round(same["seconds"] / stream["seconds"], 3),
            f"{prefix}embed_memory_ratio": round(stream["peak_mib"] / theirs["peak_mib"], 3),
        }
        for way, one in ways.items():
            figures[f"{prefix}seconds_per_slide_{way}"] = round(one["seconds"] / one["num_slides"], 3)
            figures[f"{prefix}peak_mib_{way}"] = round(one["peak_mib"])
    return figures


def aggregator_table(figures: dict[str, Any], setting: dict[str, Any]) -> str:
    """A Markdown table of AUROC with intervals, one column per task."""
    tasks, sizes = setting["tasks"], setting["sizes"]
    setup = (
        f"{sizes.num_train} training, {sizes.num_validation} validation and {sizes.num_test} test slides of "
        f"{sizes.num_tiles} tiles, width {sizes.width}; {setting['seeds']} cohorts; {sizes.num_epochs} epochs. "
        "Held-out AUROC / balanced accuracy, mean over cohorts [95% interval of the AUROC]:\n"
    )
    lines = [
        setup,
        "| method | " + " | ".join(tasks) + " | parameters | s per epoch |",
        "| --- |" + " --- |" * (len(tasks) + 2),
    ]
    for method in METHODS:
        cells = []
        for task in tasks:
            interval = figures["intervals"][f"auroc_{task}_{method}"]
            accuracy = figures[f"balanced_accuracy_{task}_{method}"]
            shown = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
            cells.append(f"{figures[f'auroc_{task}_{method}']:.2f} / {accuracy:.2f}{shown}")
        seconds = f"{figures[f'epoch_seconds_{method}']:.2f}"
        if f"epoch_seconds_{method}_from_sums" in figures:
            seconds += f" ({figures[f'epoch_seconds_{method}_from_sums']:.2f} from stored sums)"
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {figures[f'parameters_{method}']:,} | {seconds} |")
    return "\n".join(lines) + "\n"


def embedding_table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """A Markdown table of seconds and memory."""
    lines = ["| slides | way | slides, tiles | s per slide | peak MiB |", "| --- | --- | --- | --- | --- |"]
    for cohort, ways in found.items():
        for way, one in ways.items():
            lines.append(
                f"| {cohort} | {way} | {one['num_slides']}, {one['num_tiles']} | "
                f"{one['seconds'] / one['num_slides']:.2f} | {one['peak_mib']:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
