# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps (`training_step`), and what comes before, between and after them."""

import contextlib
import logging
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from modeling_dre_slcl.atomic_files import atomic_folder, remove_temporary

from .bank_filling import BankFiller, allocate_bank
from .bank_report import draw_bank_report, summarize_bank
from .bank_start import start_bank
from .build_model import build_model
from .checkpoint import CheckpointFolder
from .config import TrainConfig
from .finite_checks import FiniteChecks
from .metrics_log import MetricsLog, tracked_settings
from .optimizer import build_optimizer, choose_trained
from .optimizer_step import OptimizerStep
from .reports import encode_reports
from .run_data import RunData
from .run_state import RunProgress, RunState
from .run_summary import run_facts, write_summary
from .sampler import PADDING, StepPlan
from .step_clock import StepClock
from .step_dataset import StepBatch, StepDataset, step_loader
from .step_log import StepLog
from .stop_signals import StopSignals
from .tile_source import check_geometry
from .training_step import TrainingStep
from .validation import Validator
from .weight_average import WeightAverage

logger = logging.getLogger(__name__)
_BANK_CALLS = ("read", "write", "residuals_of_others", "moved_residuals_of_others")
BEST_MODEL = "best_model"


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
            log_with=config.trackers or None,
            project_dir=config.output_dir,
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.output_dir = Path(config.output_dir)
        self.metrics = MetricsLog(self.output_dir / "metrics.jsonl", self._track if config.trackers else None)
        self.checkpoints = CheckpointFolder(
            self.output_dir / "checkpoints",
            keep=config.keep_checkpoints,
            is_main=self.is_main,
            barrier=self.accelerator.wait_for_everyone,
        )
        # What this process was sent, and what all processes agreed to stop for.
        self.signals = StopSignals()
        self.stop_signal: int | None = None
        with self.accelerator.main_process_first():
            self.data = RunData(config, self.accelerator.process_index, self.accelerator.num_processes)
        self._set_up_model()
        self._set_up_run()

    def run(self) -> int | None:
        """Trains from the newest checkpoint, or from the start, to the end, and writes the final model.

        Returns:
            `int` or `None`: the signal that stopped the run early, after a checkpoint was saved; `None` at the end.

        Raises:
            StoppedBeforeTraining: for a signal before there was anything to save.
            FloatingPointError: at the first number that is not finite; the last checkpoint is sound.
        """
        config = self.config
        with self.signals:
            self.checkpoints.prepare()
            if config.trackers:
                self.accelerator.init_trackers("dre-slcl", config=tracked_settings(config.to_dict()))
            self._resume()
            self.signals.can_save = True
            if self.progress.validation_pending:
                self._validate()
            if self.progress.step < config.num_steps and self.stop_signal is None:
                self._train(self.progress.step)
            if self.progress.step == config.num_steps and self.stop_signal is None:
                self._take_final_weights()
            if config.num_steps <= self.progress.step < self._last_step and self.stop_signal is None:
                self._finalize(self.progress.step)
            if self.stop_signal is None:
                self._save_model(self.output_dir / "model")
                self._write_summary()
        return self.stop_signal

    @property
    def _last_step(self) -> int:
        return self.config.num_steps + self.config.finalize_steps

    def _set_up_model(self) -> None:
        config, source = self.config, self.data.source
        set_seed(config.seed)
        self.parts = build_model(
            config, tile_size_px=source.tile_size_px, tile_mpp=source.tile_mpp, labels=self.data.labels
        )
        model = self.parts.model
        check_geometry(source, model.config.tile_size_px, model.config.tile_mpp)
        choose_trained(model, config)
        if config.activation_checkpointing:
            model.activation_checkpointing_enable()
        if self.data.reports is not None:
            self._encode_reports()
        self.parameter_names = {parameter: name for name, parameter in model.named_parameters()}
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, config))
        # Only the forward pass goes through DistributedDataParallel; everything else speaks to the model itself.
        self.unwrapped = self.accelerator.unwrap_model(self.model)
        allocate_bank(self.unwrapped.memory_bank, self.data.num_tiles_owned(), config, self.accelerator)
        self.filler = BankFiller(
            self.data,
            self.parts.image_processor,
            self.accelerator,
            batch_size=config.encode_batch_size,
            num_workers=config.num_workers,
            seed=config.seed,
        )

    def _encode_reports(self) -> None:
        """Encodes the reports of the run with the frozen text model, or takes them from the cache."""
        reports = self.data.reports
        self.parts.report_encoder.model.to(self.device)
        with self.accelerator.main_process_first():
            cache = self.output_dir / "report_cache"
            reports.set_encodings(encode_reports(self.parts.report_encoder, reports.distinct, cache))
        if self.config.center_reports and self.config.model is None:
            self.parts.model.report_mean.copy_(reports.mean_embed())

    def _set_up_run(self) -> None:
        """What watches, averages, checks and validates the model that `_set_up_model` made."""
        config, model = self.config, self.unwrapped
        model.accumulation_steps = config.accumulation_steps
        self.progress = RunProgress()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = WeightAverage(trained, config.ema_decay) if config.ema_decay else None
        self.state = RunState(
            config,
            self.data,
            model,
            self.optimizer,
            self.parameter_names,
            average=self.average,
            is_main=self.is_main,
        )
        finite = FiniteChecks(self.data, model)
        self.optimizer_step = OptimizerStep(config, self.model, self.optimizer, self.accelerator, finite)
        flips, stain = config.augment_flips, config.augment_stain
        self.dataset = StepDataset(self.data.source, self.data.sampler, augment_flips=flips, augment_stain=stain)
        self.training_step = TrainingStep(
            config,
            self.data,
            self.dataset,
            self.model,
            self.parts.image_processor,
            self.accelerator,
            self.optimizer_step,
        )
        self.clock = StepClock(self.device)
        self.clock.watch_forward(model, "loss")
        self.clock.watch_forward(model.tile_encoder, "encode")
        self.clock.watch_calls(model.memory_bank, _BANK_CALLS, "bank")
        self.log = StepLog(self.metrics, self.clock, model, self.accelerator)
        self.validator = None
        if config.validation_split is not None:
            self.validator = Validator(
                self.data.source_of(config.validation_split),
                self.parts.image_processor,
                self.accelerator,
                tiles_per_slide=config.validation_tiles_per_slide,
                batch_size=config.encode_batch_size,
            )
            with self.accelerator.main_process_first():
                cache = self.output_dir / "report_cache"
                encoded = encode_reports(self.parts.report_encoder, self.validator.reports, cache)
            self.validator.set_report_embeds(encoded)

    def _resume(self) -> int:
        """Restores the newest valid checkpoint, or makes the first; returns the number of completed steps."""
        path = self.checkpoints.newest()
        if path is None:
            if self.config.bank_init:
                start_bank(self.unwrapped, self.data, self.config.bank_init)
            else:
                self.filler.fill(self.unwrapped, 0, self.config.first_pass_tiles_per_slide)
            self.filler.fit(self.unwrapped, self.config.codebook_sample)
            self._follow_codebook()
            if self.is_main:
                self.metrics.rewind(-1)
            self._save()
            return 0
        self.progress = self.state.restore(path)
        if self.is_main:
            self.metrics.rewind(self.progress.step)
            logger.info("Going on from %s.", path)
        return self.progress.step

    def load_steps(self, steps: range) -> Iterator[StepBatch]:
        """Yields the plan and the tiles of each step."""
        config = self.config
        return step_loader(self.dataset, steps, num_workers=config.num_workers, seed=config.seed)

    def try_steps(self, num_steps: int) -> list[float]:
        """Takes the first steps on an empty bank and saves nothing; returns the seconds of each. Collective.

        Afterwards this trainer is of no further use.
        """
        self.model.train()
        seconds = []
        for batch in self.load_steps(range(num_steps)):
            self.accelerator.wait_for_everyone()
            started = time.perf_counter()
            self.training_step.take(batch)
            seconds.append(time.perf_counter() - started)
        return seconds

    def _train(self, first: int) -> None:
        """Steps with gradient through the tile encoder."""
        config = self.config
        self.model.train()
        loader = self._batches(first)
        bar = tqdm(loader, total=config.num_steps - first, desc="training", unit="step", disable=not self.is_main)
        self.clock.switch("data")
        for batch in bar:
            self.clock.switch("wait")
            self.accelerator.wait_for_everyone()
            self.clock.switch("backward")
            row = self.training_step.take(batch)
            if self._after_step(batch.plan, row, bar):
                break
            self.clock.switch("data")

    def _batches(self, first: int) -> Iterator[StepBatch]:
        """Loads steps up to `num_steps`. Refits come in between, and plans after one follow its codewords."""
        config = self.config
        refits = sorted(step for step in set(config.codebook_refits) if first <= step < config.num_steps)
        for start, end in pairwise(sorted({first, *refits, config.num_steps})):
            if start in refits:
                tiles_per_slide = config.first_pass_tiles_per_slide
                with self.clock.within("save"):
                    self.filler.refit(self.unwrapped, start, tiles_per_slide, config.codebook_sample)
                self._follow_codebook()
            yield from self.load_steps(range(start, end))

    def _follow_codebook(self) -> None:
        """Samples by the codewords that the tiles have now, from the next plan on."""
        if self.data.strata is not None:
            self.data.strata.assign(self.unwrapped.memory_bank.codeword)

    def _finalize(self, first: int) -> None:
        """Steps on the head alone, over all tiles of each slide as the final tile encoder sees them."""
        config, model = self.config, self.unwrapped
        if first == config.num_steps and first in config.codebook_refits:
            self.filler.refit(model, first, None, config.codebook_sample)
        elif first == config.num_steps:
            self.filler.fill(model, first, None)
        model.train()
        bar = tqdm(range(first, self._last_step), desc="finalizing", unit="step", disable=not self.is_main)
        self.clock.switch("backward")
        for step in bar:
            learning_rate = self.optimizer_step.start(step)
            plan = self.data.sampler.plan(step)
            slides = self.data.bank_places(plan.slides)
            nothing = torch.full((len(slides), 1), PADDING)
            residuals, counts = model.memory_bank.residuals_of_others(slides, nothing, model.codebook)
            outputs = model.encode_residuals(residuals.to(self.device), counts.to(self.device))
            loss = model.contrast(outputs, **self.data.texts(plan, self.device)).loss
            self.optimizer_step.finite.check_loss(loss, plan)
            loss.backward()
            # The wrapper took no part in this forward pass, so it does not average gradients.
            for parameter in (parameter for parameter in model.parameters() if parameter.grad is not None):
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            norm = self.optimizer_step.descend(plan)
            row = {"loss": loss.item(), "learning_rate": learning_rate, "gradient_norm": norm}
            if self._after_step(plan, row, bar):
                return
            self.clock.switch("backward")

    def _after_step(self, plan: StepPlan, row: dict[str, float], bar: tqdm) -> bool:
        """Averages, logs, validates and saves when it is time; returns whether to stop. Collective."""
        config, progress = self.config, self.progress
        self.clock.switch("save")
        completed = progress.step = plan.step + 1
        is_training = completed <= config.num_steps
        if self.average is not None and is_training:
            self.average.update(completed)
        self.log.count(plan, encodes=is_training)
        is_logged = completed % config.log_steps == 0 or completed in (config.num_steps, self._last_step)
        if is_logged or "gradient_cosine" in row:
            self.log.write(completed, row, bar)
        is_due = is_training and (completed % config.validation_steps == 0 or completed == config.num_steps)
        progress.validation_pending = self.validator is not None and is_due
        self._agree_on_stop()
        saves = completed % config.checkpoint_steps == 0 or completed == self._last_step
        if progress.validation_pending and self.stop_signal is None:
            self._validate()
        ends = self.stop_signal is not None or progress.step > completed
        if saves or ends:
            self._save()
        return ends

    def _agree_on_stop(self) -> None:
        """A signal may reach one process only; all must stop after the same step."""
        received = torch.tensor(float(self.signals.received or 0), device=self.device)
        self.stop_signal = int(self.accelerator.gather(received).max()) or None

    def _validate(self) -> None:
        """Validates, keeps the best model, and ends the training when it has not improved for long. Collective."""
        config, progress, step = self.config, self.progress, self.progress.step
        weights = self.average.in_model() if config.final_weights == "ema" else contextlib.nullcontext()
        with weights:
            scores = self.validator.validate(self.unwrapped, lambda: self.signals.received is not None)
            if scores is None:
                self._agree_on_stop()
                return
            value = scores[config.validation_metric]
            if progress.take_validation(value, config):
                self._save_model(self.output_dir / BEST_MODEL)
        if self.is_main:
            row = {"step": step, "event": "validation"}
            self.metrics.append(row | {f"validation_{name}": value for name, value in scores.items()})

    def _take_final_weights(self) -> None:
        """Gives the model the weights that the final model, or the finalizing, shall have."""
        if self.config.final_weights == "ema":
            self.average.copy_to_model()
        elif self.config.final_weights == "best":
            best = type(self.unwrapped).from_pretrained(self.output_dir / BEST_MODEL)
            self.unwrapped.load_state_dict(best.state_dict())

    def _track(self, numbers: dict[str, float], step: int) -> None:
        self.accelerator.log(numbers, step=step)

    def _save(self) -> None:
        """Writes a checkpoint. Collective."""
        self.state.save(self.checkpoints, self.progress)

    def _save_model(self, folder: Path) -> None:
        """Writes a model as `from_pretrained` and `dre-slcl publish` take it."""
        if self.is_main:
            self.parts.model = self.unwrapped
            remove_temporary(self.output_dir)
            with atomic_folder(folder) as temporary:
                self.parts.save_pretrained(str(temporary), self.config)
            logger.info("The model is in %s.", folder)
        self.accelerator.wait_for_everyone()

    def _write_summary(self) -> None:
        bank = summarize_bank(self.unwrapped.memory_bank, self.data, self._last_step, self.log.sum_over_processes)
        if self.is_main:
            draw_bank_report(bank, self.output_dir / "bank_report.png", self.output_dir / "metrics.jsonl")
            counts = {"processes": self.accelerator.num_processes, "slides": len(self.data.slides)}
            write_summary(self.output_dir, run_facts(self.config, self.progress, self.unwrapped, **counts))
