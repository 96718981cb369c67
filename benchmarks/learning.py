# SPDX-License-Identifier: Apache-2.0
"""What DRE-SLCL's parts are worth: held-out quality of slide embeddings at the same number of encoded tiles.

    python -m benchmarks.learning                           # a few arms, one seed, under 4 minutes on 2 quiet cores
    python -m benchmarks.learning --full --work work        # all arms on 5 seeds; goes on if killed
    python -m benchmarks.learning --full --work work --arms dre_full no_bank --seeds 0 1 2
    python -m benchmarks.learning --full --work work --write-results   # and benchmarks/results/learning.*
    python -m benchmarks.learning --full --work work --cue nuclei --seeds 100 --arms dre_full no_bank

Each seed is a cohort of its own (`learning_cohort`), on which every arm (`learning_arms`) is trained with as many
tiles with gradient, and asked the same on all tiles of the held-out slides (`learning_scores`).
`--vary "NAME=VALUE|VALUE"` runs the arms with other values of a setting; so settings were chosen, on seeds 100 and
up, never on those that are reported. A finished run is one JSON below `--work`, and is not repeated as long as its arm
stays the same.

Figures of the last line: `<arm>_<score>` as [mean, lower, upper] with 95% intervals over seeds; `<arm>_minus_*` paired
differences; `holds`: whether the interval of `dre_full`, or of `dre_full_long_start`, lies above those of the best
frozen arm of at most its cost and of the same arm without a bank, for each score; `must_hold`: for all of them. Needs
torchmil for attention pooling.

Ends in one line of JSON.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning_arms import ARMS, Arm, run_arm, stored_result
from benchmarks.learning_cohort import CUES, CohortSize, write_cohort
from benchmarks.learning_report import summarize, write_results
from benchmarks.learning_scores import Cohort

logger = logging.getLogger("benchmarks.learning")
_SMALL_ARMS = ("frozen_ssl_mean", "frozen_ssl_abmil_labels", "no_bank", "dre_full")
_FULL_SEEDS = range(5)


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="all arms on 5 seeds")
    parser.add_argument("--work", type=Path, help="folder for cohorts and finished runs (default: a temporary one)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="these seeds, for all arms")
    parser.add_argument("--cue", choices=CUES, default=CUES[0], help="what tells the subtype in a tile")
    parser.add_argument("--vary", nargs="*", default=[], metavar="NAME=VALUE|VALUE", help="other values of settings")
    parser.add_argument("--finished", action="store_true", help="run nothing: only sum up what is finished in --work")
    parser.add_argument("--write-results", action="store_true", help="write benchmarks/results/learning.*")
    arguments = parser.parse_args()
    if arguments.write_results and arguments.cue != CUES[0]:
        parser.error(f"--write-results is for --cue {CUES[0]}, which benchmarks/results is about")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        results = _run(arguments, work if arguments.cue == CUES[0] else work / arguments.cue)
    summary = summarize(results)
    if arguments.write_results:
        write_results(results, summary, Path(__file__).parent / "results")
    print(json.dumps(summary["line"]))
    return 0


def _run(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Runs what the arguments say, seed by seed; returns a result for each run."""
    wanted = arguments.arms or (list(ARMS) if arguments.full else list(_SMALL_ARMS))
    seeds = arguments.seeds or (list(_FULL_SEEDS) if arguments.full else [0])
    if arguments.finished:
        found = [stored_result(name, ARMS[name], seed, work) for name in wanted for seed in seeds]
        return [result for result in found if result is not None]
    results, size = [], CohortSize(cue=arguments.cue)
    for seed in seeds:
        cohort = Cohort(write_cohort(work / "cohorts" / f"seed-{seed}", seed, size), seed)
        for name in wanted:
            for full_name, arm in _variants(name, arguments.vary):
                result = run_arm(full_name, arm, cohort, work)
                scores = ", ".join(f"{score} {value:.3f}" for score, value in result["scores"].items())
                logger.info("seed %d, %s: %s (%.0f CPU s)", seed, full_name, scores, result["cpu_seconds"])
                results.append(result)
    return results


def _variants(name: str, vary: list[str]) -> list[tuple[str, Arm]]:
    """An arm with every combination of the values to vary, each with its own name."""
    variants = [(name, ARMS[name])]
    for item in vary:
        setting, _, values = item.partition("=")
        variants = [
            (f"{full_name}+{setting}={value}", arm.varied(setting, json.loads(value)))
            for full_name, arm in variants
            for value in values.split("|")
        ]
    return variants


if __name__ == "__main__":
    sys.exit(main())
