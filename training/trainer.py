# SPDX-License-Identifier: Apache-2.0
"""The training loop: sample, encode, join with the bank, contrast with reports, step, write the bank.

Letters: b slides of this process in a step, M sampled tiles of each, K codewords, D feature width.
"""

import logging
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from modeling_dre_slcl.atomic_files import atomic_folder, read_json, remove_temporary
from modeling_dre_slcl.residual_encoder import residual_sums

from .bank_filling import BankFiller, allocate_bank
from .bank_journal import BankJournal
from .bank_report import draw_bank_report, summarize_bank
from .bank_start import start_bank
from .build_model import build_model
from .checkpoint import (
    CheckpointError,
    CheckpointFolder,
    checkpoint_name,
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
)
from .config import TrainConfig
from .metrics_log import MetricsLog
from .optimizer import build_optimizer, set_learning_rates
from .reports import encode_reports
from .run_data import RunData
from .sampler import PADDING, StepPlan
from .step_dataset import StepBatch, StepDataset, step_loader
from .tile_source import check_geometry

logger = logging.getLogger(__name__)
# A resumed run may differ in these; with any other difference it would not be the same run.
_FREE_SETTINGS = (
    "num_workers",
    "checkpoint_steps",
    "keep_checkpoints",
    "log_steps",
    "output_dir",
    "slides_root",
    "bank_dir",
    "bank_whole_mib",
)
_TEXT_PREFIX = "text_encoder."


class Trainer:
    """A training run: everything that it holds, ready to `run`.

    Args:
        config (`TrainConfig`): its settings.

    Raises:
        ValueError: for settings or data that do not fit together.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        # Buffers are the codebook, equal everywhere, and the bank, which must stay apart: nothing to broadcast.
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.output_dir = Path(config.output_dir)
        self.metrics = MetricsLog(self.output_dir / "metrics.jsonl")
        self.checkpoints = CheckpointFolder(
            self.output_dir / "checkpoints",
            keep=config.keep_checkpoints,
            is_main=self.is_main,
            barrier=self.accelerator.wait_for_everyone,
        )
        # What this process was sent, and what all processes agreed to stop for.
        self.received_signal: int | None = None
        self.stop_signal: int | None = None
        with self.accelerator.main_process_first():
            self.data = RunData(config, self.accelerator.process_index, self.accelerator.num_processes)
        self._set_up_model()

    def run(self) -> int | None:
        """Trains from the newest checkpoint, or from the start, to the end, and writes the final model.

        Returns:
            `int` or `None`: the signal that stopped the run early, after a checkpoint was saved; `None` at the end.
        """
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = [signal.signal(number, self._on_signal) for number in numbers]
        try:
            self.checkpoints.prepare()
            step = self._resume()
            if step < self.config.num_steps:
                step = self._train(step)
            if self.stop_signal is None and step < self._last_step:
                self._finalize(step)
            if self.stop_signal is None:
                self._save_model()
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)
        return self.stop_signal

    @property
    def _last_step(self) -> int:
        return self.config.num_steps + self.config.finalize_steps

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Asks the loop to save and stop; the second signal of a kind acts at once."""
        self.received_signal = number
        signal.signal(number, signal.SIG_DFL)
        logger.warning("Signal %d: saving a checkpoint after this step, then stopping.", number)

    def _set_up_model(self) -> None:
        config, source = self.config, self.data.source
        set_seed(config.seed)
        self.parts = build_model(config, tile_size_px=source.tile_size_px, tile_mpp=source.tile_mpp)
        model = self.parts.model
        check_geometry(source, model.config.tile_size_px, model.config.tile_mpp)
        model.tile_encoder.requires_grad_(config.train_tile_encoder)
        if config.activation_checkpointing:
            model.activation_checkpointing_enable()
        self.parts.report_encoder.model.to(self.device)
        with self.accelerator.main_process_first():
            cache = self.output_dir / "report_cache"
            self.data.set_report_embeds(encode_reports(self.parts.report_encoder, self.data.reports, cache))
        if config.center_reports and config.model is None:
            model.report_mean.copy_(self.data.mean_report_embed())
        self.parameter_names = {parameter: name for name, parameter in model.named_parameters()}
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, config))
        # Only the forward pass goes through DistributedDataParallel; everything else speaks to the model itself.
        self.unwrapped = self.accelerator.unwrap_model(self.model)
        allocate_bank(self.unwrapped.memory_bank, self.data.num_tiles_owned(), config, self.accelerator)
        self.journal = BankJournal(
            self.unwrapped.memory_bank,
            {shard: self.data.bank_places(self.data.shards[shard]).tolist() for shard in self.data.owned_shards},
            len(self.data.shards),
            whole_bytes=config.bank_whole_mib << 20,
        )
        self.filler = BankFiller(
            self.data,
            self.parts.image_processor,
            self.accelerator,
            batch_size=config.encode_batch_size,
            num_workers=config.num_workers,
            seed=config.seed,
        )

    def _resume(self) -> int:
        """Restores the newest valid checkpoint, or makes the first; returns the number of completed steps."""
        path = self.checkpoints.newest()
        if path is None:
            if self.config.bank_init:
                start_bank(self.unwrapped, self.data, self.config.bank_init)
            else:
                self.filler.fill(self.unwrapped, 0, self.config.first_pass_tiles_per_slide)
            self.filler.fit(self.unwrapped, self.config.codebook_sample)
            if self.is_main:
                self.metrics.rewind(-1)
            self._save(0)
            return 0
        state = read_json(path / "trainer_state.json")
        self._check_same_run(path, state["config"])
        missing, unexpected = self.unwrapped.load_state_dict(load_tensors(path / "model.safetensors"), strict=False)
        wrong = [name for name in missing if not name.startswith(_TEXT_PREFIX)] + unexpected
        if wrong:
            raise CheckpointError(f"{path}/model.safetensors does not fit this model: `{wrong[0]}`.")
        restore_optimizer(self.optimizer, self.parameter_names, load_tensors(path / "optimizer.safetensors"))
        self.journal.restore(path)
        if self.is_main:
            self.metrics.rewind(state["step"])
            logger.info("Going on from %s.", path)
        return state["step"]

    def _check_same_run(self, path: Path, saved: dict[str, Any]) -> None:
        now = self.config.to_dict()
        changed = [name for name in now if name not in _FREE_SETTINGS and now[name] != saved.get(name)]
        if changed:
            details = "; ".join(f"`{name}` was {saved.get(name)!r}, is {now[name]!r}" for name in changed)
            raise CheckpointError(
                f"{path} belongs to a run with other settings: {details}. Choose another output_dir."
            )

    def _train(self, first: int) -> int:
        """Steps with gradient through the tile encoder; returns the number of completed steps."""
        config = self.config
        flips, stain = config.augment_flips, config.augment_stain
        dataset = StepDataset(self.data.source, self.data.sampler, augment_flips=flips, augment_stain=stain)
        steps = range(first, config.num_steps)
        loader = step_loader(dataset, steps, num_workers=config.num_workers, seed=config.seed)
        self.model.train()
        started = time.monotonic()
        for batch in tqdm(loader, total=len(steps), desc="training", unit="step", disable=not self.is_main):
            waited = time.monotonic() - started
            step = batch.plan.step
            if step in config.codebook_refits:
                tiles_per_slide = config.first_pass_tiles_per_slide
                self.filler.refit(self.unwrapped, step, tiles_per_slide, config.codebook_sample)
            row = self._step(batch)
            row |= {"seconds": time.monotonic() - started, "data_seconds": waited}
            started = time.monotonic()
            if self._after_step(step + 1, row):
                return step + 1
        return config.num_steps

    def _step(self, batch: StepBatch) -> dict[str, float]:
        """One step: `plan -> forward -> backward -> optimizer -> bank`."""
        plan, model = batch.plan, self.unwrapped
        learning_rate = self._start_step(plan.step)
        slides, sampled = self.data.bank_places(plan.slides), torch.from_numpy(plan.sampled)
        stored = self._stored(plan, slides, sampled)
        outputs = self.model(
            pixel_values=self.parts.image_processor.tiles_to_pixel_values(batch.tiles, self.device),
            tile_mask=(sampled != PADDING).to(self.device),
            **{name: tensor.to(self.device) for name, tensor in stored.items()},
            **self.data.texts(plan, self.device),
        )
        self._check_finite(outputs.loss, plan)
        self.accelerator.backward(outputs.loss)
        norm = self._descend()
        model.memory_bank.write(slides, sampled, outputs.tile_features, model.codebook, plan.step + 1)
        return {"loss": outputs.loss.item(), "learning_rate": learning_rate, "gradient_norm": norm}

    def _stored(self, plan: StepPlan, slides: torch.Tensor, sampled: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the bank adds to the sampled tiles, by `bank_mode`: arguments of the model's `forward`."""
        bank, codebook = self.unwrapped.memory_bank, self.unwrapped.codebook
        if self.config.bank_mode == "paper":
            features, is_stored = bank.read(slides, torch.from_numpy(plan.retrieved))
            residuals, counts = residual_sums(features, codebook.to(features.device), is_stored)
        else:
            residuals, counts = bank.residuals_of_others(slides, sampled, codebook)
        stored = {"stored_residuals": residuals, "stored_counts": counts}
        if self.config.bank_mode == "corrected":
            stored["stored_tile_features"], stored["stored_tile_mask"] = bank.read(slides, sampled)
        return stored

    def _finalize(self, first: int) -> None:
        """Steps on the head alone, over all tiles of each slide as the final tile encoder sees them."""
        config, model = self.config, self.unwrapped
        if first == config.num_steps and first in config.codebook_refits:
            self.filler.refit(model, first, None, config.codebook_sample)
        elif first == config.num_steps:
            self.filler.fill(model, first, None)
        model.train()
        started = time.monotonic()
        for step in tqdm(range(first, self._last_step), desc="finalizing", unit="step", disable=not self.is_main):
            learning_rate = self._start_step(step)
            plan = self.data.sampler.plan(step)
            slides = self.data.bank_places(plan.slides)
            nothing = torch.full((len(slides), 1), PADDING)
            residuals, counts = model.memory_bank.residuals_of_others(slides, nothing, model.codebook)
            outputs = model.encode_residuals(residuals.to(self.device), counts.to(self.device))
            loss = model.contrast(outputs, **self.data.texts(plan, self.device)).loss
            self._check_finite(loss, plan)
            loss.backward()
            # The wrapper took no part in this forward pass, so it does not average gradients.
            for parameter in (parameter for parameter in model.parameters() if parameter.grad is not None):
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            row = {"loss": loss.item(), "learning_rate": learning_rate, "gradient_norm": self._descend()}
            row["seconds"], started = time.monotonic() - started, time.monotonic()
            if self._after_step(step + 1, row):
                return

    def _start_step(self, step: int) -> float:
        """Sets what a step's arithmetic depends on, as a function of the step alone; returns the learning rate."""
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 4099 + self.accelerator.process_index)
        return set_learning_rates(self.optimizer, step, self.config)

    def _check_finite(self, loss: torch.Tensor, plan: StepPlan) -> None:
        if not torch.isfinite(loss):
            names = self.data.names(plan)
            raise FloatingPointError(f"The loss of step {plan.step} is not finite; slides of this process: {names}.")

    def _descend(self) -> float:
        """Clips gradients and steps the optimizer; returns the gradient's norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _after_step(self, completed: int, row: dict[str, float]) -> bool:
        """Logs and saves when it is time; returns whether to stop. Collective."""
        stop = torch.tensor(float(self.received_signal or 0), device=self.device)
        # A signal may reach one process only; all must stop after the same step.
        stop = int(self.accelerator.gather(stop).max())
        if completed % self.config.log_steps == 0 or completed == self._last_step:
            self._log(completed, row)
        if completed % self.config.checkpoint_steps == 0 or completed == self._last_step or stop:
            self._save(completed)
        self.stop_signal = stop or None
        return bool(stop)

    def _log(self, completed: int, row: dict[str, float]) -> None:
        health = self.unwrapped.memory_bank.health(completed, self._sum_over_processes)
        if self.is_main:
            scale = self.unwrapped.logit_scale.exp().item()
            row = {"step": completed, **row, "logit_scale": scale} | {f"bank_{k}": v for k, v in health.items()}
            self.metrics.append(row)

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values.to(self.device), "sum")

    def _save(self, completed: int) -> None:
        """Writes a checkpoint. Collective."""
        bank_shards, bank_links = self.journal.files(completed)
        state = self.unwrapped.state_dict() if self.is_main else {}
        weights = {
            name: value.cpu().contiguous() for name, value in state.items() if not name.startswith(_TEXT_PREFIX)
        }
        self.checkpoints.save(
            completed,
            model_state=weights,
            optimizer_state=optimizer_tensors(self.optimizer, self.parameter_names) if self.is_main else {},
            bank_shards=bank_shards,
            bank_links=bank_links,
            trainer_state={"step": completed, "config": self.config.to_dict()},
        )
        self.journal.committed(self.checkpoints.folder / checkpoint_name(completed))

    def _save_model(self) -> None:
        """Writes the final model to `<output_dir>/model`, as `from_pretrained` and `dre-slcl publish` take it."""
        bank = self.unwrapped.memory_bank
        summary = summarize_bank(bank, self.data, self._last_step, self._sum_over_processes)
        if self.is_main:
            draw_bank_report(summary, self.output_dir / "bank_report.png", self.output_dir / "metrics.jsonl")
            self.parts.model = self.unwrapped
            remove_temporary(self.output_dir)
            with atomic_folder(self.output_dir / "model") as temporary:
                self.parts.save_pretrained(str(temporary))
            logger.info("The trained model is in %s.", self.output_dir / "model")
        self.accelerator.wait_for_everyone()
