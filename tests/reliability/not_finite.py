# SPDX-License-Identifier: Apache-2.0
"""H7: NaN and infinity planted in pixels, bank, encodings of reports and gradients, at random places and steps.

Training must stop in the step that meets them, in one line that names the slide, and the tile if the pixels of one
are wrong; no number of that step may reach the metrics, and all that the newest checkpoint holds must be finite.
"""

import math
import random

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dre_slcl.training.reports import ReportEncoder
from modeling_dre_slcl import DreSlclImageProcessor
from modeling_dre_slcl.memory_bank import MemoryBank

from . import training_runs as runs
from .campaign import check, run_campaign

VALUES = (math.nan, math.inf, -math.inf)
LAST_STEP = 4


def plant_in_pixels(step, value, chance, mode):
    """In a random value of one sampled tile of one slide of a step."""
    calls = []

    def spoil(processor, values):
        if values.ndim == 5:  # slides, tiles of each, channels, rows, columns: a step and not the first pass
            calls.append(values)
            if len(calls) == step:
                values.view(-1)[chance.randrange(values[:, 0].numel() // values.shape[0])] = value

    runs.after(DreSlclImageProcessor, "tiles_to_pixel_values", spoil)


def plant_in_bank(step, value, chance, mode):
    """In the features and running sums of all slides, before a step reads them."""
    names = {"paper": "read", "corrected": "moved_residuals_of_others"}
    calls, name = [], names.get(mode, "residuals_of_others")
    original = getattr(MemoryBank, name)

    def spoil_and_call(bank, *arguments):
        calls.append(name)
        if len(calls) == step:
            bank.features[:, chance.randrange(bank.hidden_size)] = value
            bank.feature_sums[..., chance.randrange(bank.hidden_size)] = value
        return original(bank, *arguments)

    setattr(MemoryBank, name, spoil_and_call)


def plant_in_reports(step, value, chance, mode):
    """In the encodings of all reports."""

    def spoil(encoder, encoded):
        with torch.inference_mode():
            encoded[:, chance.randrange(encoded.shape[1])] = value

    runs.after(ReportEncoder, "encode", spoil)


def plant_in_gradients(step, value, chance, mode):
    """In one number of one parameter's gradient."""
    calls = []

    def spoil(accelerator, result):
        calls.append(result)
        if len(calls) == step:
            trained = accelerator._models[0].parameters()
            gradient = chance.choice([p.grad for p in trained if p.grad is not None])
            gradient.view(-1)[chance.randrange(gradient.numel())] = value

    runs.after(Accelerator, "backward", spoil)


PLACES = {
    "pixels": plant_in_pixels,
    "bank": plant_in_bank,
    "reports": plant_in_reports,
    "gradients": plant_in_gradients,
}


def look(settings, place, step, text, problems):
    """Starts a run that meets what was planted, and checks how it ended."""
    log = runs.log_of(settings)
    error = [line for line in log.splitlines() if "ERROR" in line]
    check(problems, len(error) == 1 and "Traceback" not in log, f"{text}: no single line of error: {log[-1500:]}")
    message = " ".join(error)
    check(problems, "slide-" in message, f"{text}: no slide is named: {message}")
    check(problems, place != "pixels" or "tile" in message, f"{text}: no tile is named: {message}")
    met = 1 if place == "reports" else step
    reached = max((row["step"] for row in runs.metrics_of(settings)), default=0)
    check(problems, reached == met - 1, f"{text}: step {reached} was logged, {met} is the one that is wrong")
    for file in runs.checkpoints(settings)[-1].glob("*.safetensors") if runs.checkpoints(settings) else ():
        for name, tensor in load_file(file).items():
            is_finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
            check(problems, is_finite, f"{text}: {file.name} holds {name} that is not finite")


def campaign(root, count, seed):
    settings = runs.prepare(root, num_steps=LAST_STEP, finalize_steps=0, codebook_refits=[], checkpoint_steps=1)
    chance, problems, stopped = random.Random(seed), [], dict.fromkeys(PLACES, 0)
    for index in range(count):
        place, value = list(PLACES)[index % len(PLACES)], VALUES[index % len(VALUES)]
        step, mode = chance.randint(1, LAST_STEP), chance.choice(("paper", "full", "corrected"))
        runs.remove(settings)
        status = runs.run(settings | {"bank_mode": mode}, lambda: PLACES[place](step, value, chance, mode))  # noqa: B023
        text = f"{value} in {place} at step {step}, mode {mode}"
        check(problems, status == 1, f"{text}: status {status}: {runs.log_of(settings)[-1500:]}")
        stopped[place] += status == 1
        look(settings, place, step, text, problems)
    return {"cases": count, "faults": len(problems), "stopped": stopped}


if __name__ == "__main__":
    run_campaign(campaign, count=100, doc=__doc__)
