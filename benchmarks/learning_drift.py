# SPDX-License-Identifier: Apache-2.0
"""Whether a fixed codebook still fits after end-to-end training: how much of their residuals all slides share.

    python -m benchmarks.learning_drift --work work                       # 100 steps of two modes on a pilot cohort
    python -m benchmarks.learning_drift --work work --modes full corrected two_pass --steps 300 --seed 101

Residuals are measured from codewords that stay where K-means put them before training. If features move together,
away from their codewords, every slide's normalised residuals come to point the same way, and what tells slides apart
is left to a small rest. `shared_<mode>_<step>` is the squared length of the mean over slides of their normalised
residuals (each of length 1), with features of all tiles as they are at that step: 0 if slides have nothing in common,
1 if they are all the same.

Ends in one line of JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from benchmarks.learning_cohort import CohortSize, write_cohort
from benchmarks.learning_engine import PROJECTION_SIZE, SETTINGS, TILE_ENCODER
from benchmarks.learning_scores import Cohort
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.sampler import PADDING
from dre_slcl.training.trainer import Trainer
from modeling_dre_slcl.residual_encoder import normalize_residuals


@torch.no_grad()
def shared_part(trainer: Trainer) -> float:
    """Squared length of the mean of the slides' normalised residuals in the bank."""
    model, slides = trainer.unwrapped, trainer.data.slides
    places = trainer.data.bank_places(slides)
    nothing = torch.full((len(slides), 1), PADDING)
    residuals, _ = model.memory_bank.residuals_of_others(places, nothing, model.codebook)
    return float(normalize_residuals(residuals.float()).mean(dim=0).square().sum())


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="folder for the cohort (default: a temporary one)")
    parser.add_argument("--modes", nargs="+", default=["full", "corrected"], help="bank modes (default: both)")
    parser.add_argument("--encoder", help="folder of a pretrained tile encoder (default: random weights)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: 100)")
    parser.add_argument("--seed", type=int, default=100, help="cohort and seed (default: 100, a pilot)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        folder = write_cohort(work / "cohorts" / f"seed-{arguments.seed}", arguments.seed, CohortSize())
        cohort, result = Cohort(folder, arguments.seed), {}
        for mode in arguments.modes:
            before, after, losses = _measure(cohort, mode, arguments.encoder, arguments.steps, Path(temporary))
            result[f"shared_{mode}_0"], result[f"shared_{mode}_{arguments.steps}"] = before, after
            result[f"losses_{mode}"] = losses
    print(json.dumps(result))
    return 0


def _measure(
    cohort: Cohort, mode: str, encoder: str | None, num_steps: int, temporary: Path
) -> tuple[float, float, list[float]]:
    """The shared part before and after training in a mode, and the losses on the way."""
    start = {"tile_encoder_config": TILE_ENCODER} if encoder is None else {"tile_encoder": encoder}
    config = TrainConfig(
        dataset=cohort.dataset,
        output_dir=str(temporary / mode),
        text_model=cohort.text_model,
        model_config={"text_projection": "linear", "projection_size": PROJECTION_SIZE},
        seed=cohort.seed,
        **(SETTINGS | start | {"bank_mode": mode, "num_steps": num_steps, "finalize_steps": 0}),
    )
    shared: list[float] = []
    fit = Trainer._resume

    def resume(trainer: Trainer) -> int:
        step = fit(trainer)
        shared.append(shared_part(trainer))
        return step

    with mock.patch.object(Trainer, "_resume", resume), mock.patch.object(Trainer, "_write_summary"):
        trainer = Trainer(config)
        trainer.run()
    trainer.filler.fill(trainer.unwrapped, num_steps, None)
    rows = [json.loads(line) for line in (temporary / mode / "metrics.jsonl").read_text().splitlines()]
    losses = [round(row["loss"], 3) for row in rows if "loss" in row]
    return round(shared[0], 4), round(shared_part(trainer), 4), losses


if __name__ == "__main__":
    sys.exit(main())
