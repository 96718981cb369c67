# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl train --dry-run`: what a run would be and cost, and whether it would fail; nothing stays on the disk.

The model is built, the reports are encoded, and a few real steps are taken, in a temporary folder.
"""

import dataclasses
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modeling_dre_slcl.atomic_files import read_json

from .checkpoint import CheckpointFolder
from .config import TrainConfig
from .run_state import check_same_run

if TYPE_CHECKING:
    from .trainer import Trainer

_TRIED_STEPS = 4
_SLOW_STEPS = 1  # the first step imports, allocates and chooses kernels
_ADAM_COPIES = 2  # AdamW keeps two numbers for each that is trained
_GIB = 2**30


@contextmanager
def scratch_config(config: TrainConfig) -> Iterator[TrainConfig]:
    """Yields the same settings with a temporary folder to write to."""
    with tempfile.TemporaryDirectory(prefix="dre-slcl-dry-run-") as folder:
        yield dataclasses.replace(config, output_dir=folder, trackers=[])


def plan_run(config: TrainConfig, trainer: "Trainer") -> dict[str, Any]:
    """Takes a few steps and works out what the run would be. Collective.

    Args:
        config (`TrainConfig`): the settings of the run.
        trainer (`Trainer`): made for `scratch_config(config)`.

    Returns:
        `dict`: JSON; sizes in bytes per process, times in seconds.

    Raises:
        ValueError: if the run would fail: not enough memory for the bank, not enough disk for its checkpoints, or a
            run with other settings in its folder.
    """
    data, model, processes = trainer.data, trainer.unwrapped, trainer.accelerator.num_processes
    first_step = _first_step(config)
    sizes = _sizes(trainer)
    _check_memory(config, sizes, trainer.device)
    disk = _check_disk(config, sizes, processes)
    seconds = trainer.try_steps(min(_TRIED_STEPS, config.num_steps))
    step_seconds = sorted(seconds[min(_SLOW_STEPS, len(seconds) - 1) :])[len(seconds[_SLOW_STEPS:]) // 2]
    tiles = [data.source.slides[slide].num_tiles for slide in data.slides]
    first_pass = sum(min(count, config.first_pass_tiles_per_slide or count) for count in tiles)
    encoded_per_second = processes * _encoded_per_second(trainer)
    tiles_per_step = config.slides_per_batch * config.tiles_per_slide
    passes = 1 + len([step for step in config.codebook_refits if step < config.num_steps])
    total = step_seconds * (config.num_steps - first_step) + passes * first_pass / encoded_per_second
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "slides": len(data.slides),
        "tiles": sum(tiles),
        "processes": processes,
        "device": str(trainer.device),
        "parameters_trained": trained,
        "parameters_frozen": sum(p.numel() for p in model.parameters()) - trained,
        "steps": config.num_steps,
        "finalize_steps": config.finalize_steps,
        "goes_on_from_step": first_step,
        "epochs": round(config.num_steps * config.slides_per_batch / len(data.slides), 2),
        "tiles_per_step": tiles_per_step,
        "first_pass_tiles": first_pass,
        "bank_on": config.bank_device if config.bank_device == "cpu" else str(trainer.device),
        **{f"{name}_bytes": size for name, size in sizes.items()},
        "peak_memory_bytes": _peak_memory(trainer.device),
        **disk,
        "seconds_per_step": round(step_seconds, 4),
        "tiles_per_second": round(tiles_per_step / step_seconds, 1),
        "first_pass_tiles_per_second": round(encoded_per_second, 1),
        "hours": round(total / 3600, 5),
    }


def describe_plan(plan: dict[str, Any]) -> str:
    """A plan as lines of text."""
    lines = []
    for name, value in plan.items():
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), f"{value / _GIB:.3f} GiB"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{name.replace('_', ' '):<28}{value}")
    return "\n".join(lines)


def _first_step(config: TrainConfig) -> int:
    """Where the run would go on; refuses a folder that belongs to another run."""
    folder = Path(config.output_dir) / "checkpoints"
    newest = CheckpointFolder(folder, keep=1, is_main=True, barrier=lambda: None).newest()
    if newest is None:
        return 0
    state = read_json(newest / "trainer_state.json")
    check_same_run(config, newest, state["config"])
    return int(state["step"])


def _sizes(trainer: "Trainer") -> dict[str, int]:
    """Bytes of what a process holds, but for activations."""
    parameters = list(trainer.unwrapped.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    average = trained if trainer.average is not None else 0
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients_and_optimizer": (1 + _ADAM_COPIES) * trained + average,
        "bank": sum(buffer.numel() * buffer.element_size() for buffer in trainer.unwrapped.memory_bank.buffers()),
    }


def _check_memory(config: TrainConfig, sizes: dict[str, int], device: torch.device) -> None:
    if device.type != "cuda":
        return  # the bank is allocated already: what did not fit has failed
    _, total = torch.cuda.mem_get_info(device)
    needed = sum(size for name, size in sizes.items() if name != "bank" or config.bank_device == "model")
    if needed > total:
        raise ValueError(
            f"Weights, optimizer and bank need {needed / _GIB:.1f} GiB of the {total / _GIB:.1f} GiB of {device}; set "
            "`bank_device: cpu`, use more processes, or a smaller tile encoder."
        )


def _check_disk(config: TrainConfig, sizes: dict[str, int], processes: int) -> dict[str, int]:
    """Bytes that the run's folder would take; refuses what does not fit."""
    state = sizes["weights"] + sizes["gradients_and_optimizer"]
    checkpoint = state + sizes["bank"] * processes
    # One more than are kept: the oldest goes when the newest is sealed. Then the final model, and the best one.
    needed = checkpoint * (config.keep_checkpoints + 1) + 2 * sizes["weights"]
    folder = Path(config.output_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"{config.output_dir}: checkpoints and models need {needed / _GIB:.1f} GiB, but {free / _GIB:.1f} GiB are "
            "free; lower `keep_checkpoints`, or choose another `output_dir`."
        )
    return {"checkpoint_bytes": checkpoint, "output_dir_bytes": needed}


def _encoded_per_second(trainer: "Trainer") -> float:
    """Tiles that one process reads and encodes in a second without gradient."""
    data, model, config = trainer.data, trainer.unwrapped, trainer.config
    slide = max(data.owned, key=lambda place: data.source.slides[place].num_tiles)
    tiles = np.arange(min(data.source.slides[slide].num_tiles, config.encode_batch_size))
    started = time.perf_counter()
    pixels = torch.from_numpy(data.source.read(slide, tiles))
    was_read = time.perf_counter()
    with torch.no_grad(), trainer.accelerator.autocast():
        values = trainer.parts.image_processor.tiles_to_pixel_values(pixels, trainer.device)
        model.get_tile_features(values).cpu()
    encode, read = time.perf_counter() - was_read, was_read - started
    # Workers read while the model encodes.
    return len(tiles) / (max(encode, read / config.num_workers) if config.num_workers else encode + read)


def _peak_memory(device: torch.device) -> int:
    """The most memory that the device had to give; on CPU the most that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
