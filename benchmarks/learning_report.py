# SPDX-License-Identifier: Apache-2.0
"""Runs of `benchmarks.learning` -> tables with intervals, paired differences, figures.

An interval is a 95% interval of the mean over seeds, by Student's t; a seed is a cohort and a run on it.
"""

import json
import platform
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning_arms import SSL_STEPS
from benchmarks.learning_cohort import KINDS, TILE_PX, CohortSize, paint_slide
from benchmarks.learning_engine import SETTINGS
from benchmarks.learning_scores import interval
from dre_slcl.training.demo.cohort import make_cases
from dre_slcl.training.demo.report_writer import SUBTYPES
from modeling_dre_slcl.atomic_files import write_json

# Each with its own ablation: the same start and budget, without a bank.
HEADLINE_ARMS = {"dre_full": "no_bank", "dre_full_long_start": "no_bank_long_start"}
SCORES = {
    "probe_auroc": "probe AUROC",
    "probe_balanced_accuracy": "probe balanced accuracy",
    "slide_to_report_map": "slide to report mAP",
    "zero_shot_auroc": "zero-shot AUROC",
}
DECIDING = ("probe_auroc", "probe_balanced_accuracy", "slide_to_report_map")
_CHANCE = {"probe_auroc": 0.5, "probe_balanced_accuracy": 1 / 3, "zero_shot_auroc": 0.5}


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarises runs.

    Args:
        results (`list` of `dict`): from `run_arm`.

    Returns:
        `dict`: `table` (arm -> score -> mean, lower, upper), `differences` (headline arm -> other arm -> score -> the
        same for paired differences) and `line`, the figures of the last line.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        by_arm[result["name"]][result["seed"]] = result
    table = {name: _arm_row(list(runs.values())) for name, runs in by_arm.items()}
    line: dict[str, Any] = {
        f"{name}_{score}": row[score] for name, row in table.items() for score in SCORES if score in row
    }
    differences = {
        headline: {name: _paired(by_arm[headline], runs) for name, runs in by_arm.items() if name != headline}
        for headline in HEADLINE_ARMS
        if headline in by_arm
    }
    line["holds"] = {headline: _held(headline, table, differences[headline], line) for headline in differences}
    line["must_hold"] = any(held and all(held.values()) for held in line["holds"].values())
    line["seeds"] = {name: sorted(runs) for name, runs in by_arm.items()}
    return {"table": table, "differences": differences, "line": line}


def _held(
    headline: str, table: dict[str, dict[str, Any]], differences: dict[str, Any], line: dict[str, Any]
) -> dict[str, bool]:
    """Whether an arm's intervals lie above its rivals': no bank, and the best frozen arm of at most its cost.

    Adds who the rivals are, and the paired differences, to `line`.
    """
    held: dict[str, bool] = {}
    for score in DECIDING:
        frozen = [name for name in table if name.startswith("frozen") and score in table[name]]
        frozen = [name for name in frozen if _cost(table[name]) <= _cost(table[headline])]
        best = max(frozen, key=lambda name: table[name][score][0], default=None)
        line[f"{headline}_best_frozen_{score}"] = best
        for what, rival in (("best_frozen", best), ("no_bank", HEADLINE_ARMS[headline])):
            if rival in table:
                low, high = table[headline][score][1], table[rival][score][2]
                held[f"{what}_{score}"] = low is not None and high is not None and low > high
                line[f"{headline}_minus_{what}_{score}"] = differences[rival].get(score)
    return held


def _cost(row: dict[str, Any]) -> int:
    """Tiles encoded with gradient, self-supervised ones among them."""
    return row["tiles_with_gradient"] + row["ssl_tiles_with_gradient"]


def _arm_row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for score in SCORES:
        values = [run["scores"][score] for run in runs if score in run["scores"]]
        if values:
            row[score] = _rounded(values)
    for name in ("tiles_with_gradient", "tiles_without_gradient", "ssl_tiles_with_gradient", "cpu_seconds"):
        row[name] = round(float(np.mean([run[name] for run in runs])))
    return row | {"num_seeds": len(runs)}


def _rounded(values: list[float]) -> list[float | None]:
    """Mean, lower and upper end; one seed has no interval."""
    return [None if np.isnan(value) else round(value, 4) for value in interval(values)]


def _paired(headline: dict[int, dict[str, Any]], runs: dict[int, dict[str, Any]]) -> dict[str, list[float | None]]:
    """A headline arm minus another, seed by seed: mean, lower and upper end of each score."""
    seeds = sorted(set(headline) & set(runs))
    found = {}
    for score in SCORES:
        values = [
            headline[seed]["scores"][score] - runs[seed]["scores"][score]
            for seed in seeds
            if score in headline[seed]["scores"] and score in runs[seed]["scores"]
        ]
        if values:
            found[score] = _rounded(values)
    return found


def describe_cohort() -> str:
    """Says how large and how hard the cohort is."""
    size = CohortSize()
    (fewest, most), (least, largest) = size.num_tiles, size.tumour_fraction
    return (
        f"{len(SUBTYPES)} subtypes, of each {size.num_train_cases} training and {size.num_test_cases} held-out cases "
        f"of a slide each; {fewest} to {most} tiles of {TILE_PX} px, {least:.0%} to {largest:.0%} of them tumour, of "
        f"which {size.purity:.0%} show the slide's subtype; spread of stains {size.stain_spread}."
    )


def write_results(results: list[dict[str, Any]], summary: dict[str, Any], folder: Path) -> None:
    """Writes learning.json, learning.md, learning_arms.png and learning_tiles.png."""
    about = {
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "processor": _processor(),
        "python": platform.python_version(),
    }
    write_json(
        folder / "learning.json", {"about": about, **summary["line"], "table": summary["table"], "runs": results}
    )
    lines = [
        "# Learning: what was measured",
        "",
        f"`python -m benchmarks.learning --full`, commit {about['commit'][:9]}, one thread of {about['processor']}.",
        "What it means: [docs/evidence.md](../../docs/evidence.md).",
        "",
        f"Cohort: {describe_cohort()} Settings of all arms that encode tiles with gradient: {json.dumps(SETTINGS)}.",
        f"Self-supervision: {SSL_STEPS} steps of 128 tiles in two views; `ssl_long` has as many tiles in all as the",
        "end-to-end arms that start from it, `ssl_longer` as those that start from `ssl_long`. Other settings of each",
        "arm: `runs` in learning.json.",
        "",
        "Mean over seeds with its 95% interval (Student's t). Tiles with gradient count self-supervision's views.",
        "",
        *_table(summary["table"]),
        "",
    ]
    for headline, differences in summary["differences"].items():
        lines += [f"Paired differences, `{headline}` minus the other arm, on the same seeds:", ""]
        lines += [*_difference_table(differences), ""]
    (folder / "learning.md").write_text("\n".join(lines), encoding="utf-8")
    draw_arms(summary["table"], folder / "learning_arms.png")
    draw_tiles(folder / "learning_tiles.png")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _cell(values: list[float | None] | None, signed: bool = False) -> str:
    if values is None:
        return ""
    mean, low, high = values
    sign = "+" if signed else ""
    return f"{mean:{sign}.3f}" if low is None else f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _table(table: dict[str, dict[str, Any]]) -> list[str]:
    heads = [*SCORES.values(), "tiles with gradient (of them self-supervised)", "without", "CPU s", "seeds"]
    lines = [f"| arm | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
    for name, row in table.items():
        cells = [_cell(row.get(score)) for score in SCORES]
        cells += [f"{_cost(row):,} ({row['ssl_tiles_with_gradient']:,})", f"{row['tiles_without_gradient']:,}"]
        lines.append(f"| `{name}` | {' | '.join([*cells, str(row['cpu_seconds']), str(row['num_seeds'])])} |")
    return lines


def _difference_table(differences: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"| other arm | {' | '.join(SCORES.values())} |", "|" + " --- |" * (len(SCORES) + 1)]
    return lines + [
        f"| `{name}` | {' | '.join(_cell(row.get(score), signed=True) for score in SCORES)} |"
        for name, row in differences.items()
    ]


def draw_arms(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws means and intervals of every arm, three scores side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(table)[::-1]
    figure, axes = plt.subplots(
        1, len(DECIDING), figsize=(11, 0.26 * len(names) + 1), sharey=True, layout="constrained"
    )
    for axis, score in zip(axes, DECIDING, strict=True):
        for place, name in enumerate(names):
            if score not in table[name]:
                continue
            mean, low, high = table[name][score]
            kind = "C0" if name in HEADLINE_ARMS else "C7" if name.startswith("frozen") else "C1"
            kind = "C3" if name.startswith(("no_bank", "end_to_end")) else kind
            if low is not None:
                axis.plot([low, high], [place, place], color=kind, linewidth=2)
            axis.plot(mean, place, "o", color=kind, markersize=4)
        if score in _CHANCE:
            axis.axvline(_CHANCE[score], color="0.8", linestyle=":")
        axis.set_title(SCORES[score], fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(names)), names)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_tiles(path: Path) -> None:
    """Draws tiles of one slide of each subtype: tumour on the left, then the other kinds."""
    import cv2

    rows = []
    for subtype in SUBTYPES:
        case = next(case for case in make_cases(8, seed=0) if case.subtype == subtype and case.necrosis and case.mucin)
        tiles, kinds = paint_slide(case, 0, CohortSize())
        shown = [*np.flatnonzero(kinds == KINDS.index("tumour"))[:6]]
        for kind in range(len(KINDS) - 1):
            shown += [*np.flatnonzero(kinds == kind)[:2]]
        row = np.concatenate(
            [np.pad(tile, ((1, 1), (1, 1), (0, 0)), constant_values=255) for tile in tiles[shown]], axis=1
        )
        rows.append(row)
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    picture = cv2.resize(np.concatenate(rows), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
