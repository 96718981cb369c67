# SPDX-License-Identifier: Apache-2.0
"""What a run must not lose: gathered for a checkpoint, and put back from one, on any number of processes."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from modeling_dre_slcl import DreSlclModel
from modeling_dre_slcl.atomic_files import read_json

from .checkpoint import (
    CheckpointError,
    CheckpointFolder,
    bank_file,
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
)
from .config import TrainConfig
from .run_data import RunData
from .validation import is_better
from .weight_average import WeightAverage

# A resumed run may differ in these; with any other difference it would not be the same run.
_FREE_SETTINGS = (
    *("num_workers", "checkpoint_steps", "keep_checkpoints", "log_steps", "output_dir", "slides_root", "private_ids"),
    *("accumulation_steps", "activation_checkpointing", "trackers"),
)
_TEXT_PREFIX = "text_encoder."


@dataclasses.dataclass
class RunProgress:
    """How far a run is, beside its weights.

    Args:
        step (`int`): completed steps.
        best_step (`int`, *optional*), best_value (`float`, *optional*): the best validation so far.
        validations_since_best (`int`): how many were not better since.
        stopped_early_at (`int`, *optional*): the step after which early stopping ended the training.
        validation_pending (`bool`): a signal came before the validation that was due after `step`.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    validations_since_best: int = 0
    stopped_early_at: int | None = None
    validation_pending: bool = False

    def take_validation(self, value: float, config: TrainConfig) -> bool:
        """Takes in a validation's value; returns whether it is the best so far. May end the training."""
        self.validation_pending = False
        is_best = is_better(value, self.best_value, config.validation_metric)
        if is_best:
            self.best_step, self.best_value, self.validations_since_best = self.step, value, 0
        else:
            self.validations_since_best += 1
        patience = config.early_stopping_patience
        if patience is not None and self.validations_since_best >= patience and self.step < config.num_steps:
            # What follows the training goes on as after its last step.
            self.stopped_early_at, self.step = self.step, config.num_steps
        return is_best


class RunState:
    """Gathers and restores the state of a run.

    Args:
        config (`TrainConfig`): its settings.
        data (`RunData`): its slides, and which of them this process owns.
        model (`DreSlclModel`): unwrapped; its bank is allocated.
        optimizer (`torch.optim.Optimizer`): of its trained parameters.
        parameter_names (`dict`): parameter -> name.
        average (`WeightAverage`, *optional*): of its weights.
        is_main (`bool`): whether this is the main process, which holds what all have in common.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: RunData,
        model: DreSlclModel,
        optimizer: torch.optim.Optimizer,
        parameter_names: dict[torch.nn.Parameter, str],
        *,
        average: WeightAverage | None,
        is_main: bool,
    ) -> None:
        self.config, self.data, self.model, self.optimizer = config, data, model, optimizer
        self.parameter_names, self.average, self.is_main = parameter_names, average, is_main

    def save(self, checkpoints: CheckpointFolder, progress: RunProgress) -> None:
        """Writes a checkpoint. Collective.

        Raises:
            FloatingPointError: if a weight is not finite; nothing is written then.
        """
        bank, shards = self.model.memory_bank, self.data.shards
        checkpoints.save(
            progress.step,
            tensors=self._common_tensors() if self.is_main else {},
            bank_shards={
                bank_file(shard, len(shards)): bank.slide_state(self._places(shard))
                for shard in self.data.owned_shards
            },
            trainer_state=dataclasses.asdict(progress) | {"config": self.config.to_dict()},
        )

    def restore(self, path: Path) -> RunProgress:
        """Puts a checkpoint back; any number of processes may have written it.

        Raises:
            CheckpointError: if it is of another run, or does not fit this model.
        """
        state = read_json(path / "trainer_state.json")
        check_same_run(self.config, path, state["config"])
        missing, unexpected = self.model.load_state_dict(load_tensors(path / "model.safetensors"), strict=False)
        wrong = [name for name in missing if not name.startswith(_TEXT_PREFIX)] + unexpected
        if wrong:
            raise CheckpointError(f"{path}/model.safetensors does not fit this model: `{wrong[0]}`.")
        restore_optimizer(self.optimizer, self.parameter_names, load_tensors(path / "optimizer.safetensors"))
        if self.average is not None:
            self.average.load(load_tensors(path / "average.safetensors"))
        for shard in self.data.owned_shards:
            tensors = load_tensors(path / bank_file(shard, len(self.data.shards)))
            self.model.memory_bank.load_slide_state(self._places(shard), tensors)
        known = {item.name for item in dataclasses.fields(RunProgress)}
        return RunProgress(**{name: value for name, value in state.items() if name in known})

    def _common_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """File name -> tensors, of what is equal on all processes."""
        weights = {
            name: value.cpu().contiguous()
            for name, value in self.model.state_dict().items()
            if not name.startswith(_TEXT_PREFIX)
        }
        files = {"model": weights, "optimizer": optimizer_tensors(self.optimizer, self.parameter_names)}
        if self.average is not None:
            files["average"] = self.average.tensors()
        for file, tensors in files.items():
            for name, value in tensors.items():
                if value.is_floating_point() and not torch.isfinite(value).all():
                    raise FloatingPointError(
                        f"`{name}` ({file}) holds numbers that are not finite, so no checkpoint is written; the last "
                        "one is sound. Lower the learning rates, or use `mixed_precision: no`."
                    )
        return {f"{file}.safetensors": tensors for file, tensors in files.items()}

    def _places(self, shard: int) -> list[int]:
        return self.data.bank_places(self.data.shards[shard]).tolist()


def check_same_run(config: TrainConfig, path: Path, saved: dict[str, Any]) -> None:
    """Refuses a checkpoint of a run with other settings.

    Raises:
        CheckpointError: naming the settings, what they were and are.
    """
    now = config.to_dict()
    defaults = {
        item.name: None if item.default is dataclasses.MISSING else item.default for item in dataclasses.fields(config)
    }
    # A run that an earlier version began knows nothing of a setting that is newer.
    was = {name: saved.get(name, defaults[name]) for name in now}
    changed = [name for name in now if name not in _FREE_SETTINGS and now[name] != was[name]]
    if changed:
        details = "; ".join(f"`{name}` was {was[name]!r}, is {now[name]!r}" for name in changed)
        raise CheckpointError(f"{path} belongs to a run with other settings: {details}. Choose another output_dir.")
