# SPDX-License-Identifier: Apache-2.0
"""What a line of metrics says: of its step, of the time since the line before, and of the memory bank."""

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from modeling_dre_slcl import DreSlclModel

from .metrics_log import MetricsLog
from .sampler import PADDING, StepPlan
from .step_clock import StepClock


class StepLog:
    """Writes lines of metrics, each the mean over all processes.

    Args:
        metrics (`MetricsLog`): the file.
        clock (`StepClock`): counts the time.
        model (`DreSlclModel`): unwrapped.
        accelerator (`Accelerator`): the run's.
    """

    def __init__(self, metrics: MetricsLog, clock: StepClock, model: DreSlclModel, accelerator: Accelerator) -> None:
        self.metrics, self.clock, self.model, self.accelerator = metrics, clock, model, accelerator
        self._steps, self._tiles = 0, 0

    def count(self, plan: StepPlan, *, encodes: bool) -> None:
        """Counts a step, and whether its tiles were encoded with gradient."""
        self._steps += 1
        self._tiles += int((plan.sampled != PADDING).sum()) if encodes else 0

    def write(self, completed: int, row: dict[str, float], bar: tqdm) -> None:
        """Adds a line after so many completed steps, and shows it at the progress bar. Collective.

        Args:
            completed (`int`): completed steps.
            row (`dict`): numbers of the last step, equal on all processes.
            bar (`tqdm`): the progress bar.
        """
        seconds = self.clock.take()
        steps, total = self._steps, sum(seconds.values())
        means = {"seconds": total / steps} | {f"{name}_seconds": value / steps for name, value in seconds.items()}
        means["tiles_per_second"] = self._tiles / total
        is_training = self._tiles > 0
        self._steps, self._tiles = 0, 0
        values = torch.tensor(list(means.values()), dtype=torch.float64, device=self.accelerator.device)
        means = dict(zip(means, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        means["tiles_per_second"] *= self.accelerator.num_processes
        health = self.model.memory_bank.health(completed, self.sum_over_processes)
        # Drift is that of the latest step's tiles: of steps on the head alone there is none to tell.
        told = [name for name in health if is_training or not name.startswith("drift")]
        means |= {f"bank_{name}": health[name] for name in told}
        if self.accelerator.is_main_process:
            scale = self.model.logit_scale.exp().item()
            self.metrics.append({"step": completed, **row, "logit_scale": scale} | means)
            idle = (means["data_seconds"] + means["wait_seconds"]) / means["seconds"]
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {means['tiles_per_second']:.0f} tiles/s, {idle:.0%} idle")

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Adds up what each process counts. Collective."""
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum")
