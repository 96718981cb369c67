# SPDX-License-Identifier: Apache-2.0
"""`accelerate launch -m dre_slcl.training.train --config run.yaml`, or `dre-slcl train --config run.yaml`."""

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .config import TrainConfig, add_config_arguments, config_from_arguments
from .disk_space import DiskFullError, disk_full_reported

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)
_SIGNAL_EXIT_BASE = 128
_DISK_FULL_EXIT = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl train`."""
    parser.description = (
        "Trains a slide encoder end to end with the reports of a slide dataset. Run the same command again after an "
        "interruption and it goes on where the last checkpoint was saved. On several processes: "
        "`accelerate launch -m dre_slcl.training.train --config run.yaml`."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would be and cost after a few real steps, and whether it would fail; writes nothing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        `int`: exit status: 0 at the end, 128 + the signal that stopped it, 5 if the disk is full, 1 for another error.
    """
    try:
        config = config_from_arguments(arguments)
        return dry_run(config) if arguments.dry_run else train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        logger.error("%s", error)
        return _DISK_FULL_EXIT if isinstance(error, DiskFullError) else 1


def train(config: TrainConfig) -> int:
    """Trains.

    Args:
        config (`TrainConfig`): the settings.

    Returns:
        `int`: 0 at the end, or 128 + the signal that stopped the run after a checkpoint.

    Raises:
        ValueError: for settings or data that do not fit together.
        DiskFullError: if the disk is full; what was saved before is sound.
        OSError: if another run writes to the same folder, or files cannot be read or written.
        FloatingPointError: at the first number that is not finite; the last checkpoint is sound.
    """
    from .folder_lock import folder_lock
    from .metrics_log import check_trackers
    from .stop_signals import StoppedBeforeTraining
    from .trainer import Trainer

    check_trackers(config.trackers)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    is_first = int(os.environ.get("RANK", "0")) == 0
    lock = folder_lock(output_dir) if is_first else contextlib.nullcontext()
    with lock, disk_full_reported(output_dir, output_dir / "checkpoints"):
        trainer = Trainer(config)
        _check_group(trainer)
        try:
            stopped_by = trainer.run()
        except StoppedBeforeTraining as stopped:
            logger.warning("Signal %d: there is nothing to save yet.", stopped.number)
            return _SIGNAL_EXIT_BASE + stopped.number
        trainer.accelerator.end_training()
    return 0 if stopped_by is None else _SIGNAL_EXIT_BASE + stopped_by


def dry_run(config: TrainConfig) -> int:
    """Prints the plan of a run, as lines of text and then as a line of JSON; writes nothing to its folder.

    Args:
        config (`TrainConfig`): the settings.

    Returns:
        `int`: 0.

    Raises:
        ValueError: if the run would fail.
    """
    from .metrics_log import check_trackers
    from .run_plan import describe_plan, plan_run, scratch_config
    from .trainer import Trainer

    check_trackers(config.trackers)
    with scratch_config(config) as scratch:
        trainer = Trainer(scratch)
        _check_group(trainer)
        plan = plan_run(config, trainer)
        if trainer.is_main:
            sys.stdout.write(f"{describe_plan(plan)}\n{json.dumps(plan)}\n")
        trainer.accelerator.end_training()
    return 0


def _check_group(trainer: "Trainer") -> None:
    """Refuses processes that were started together but do not know of each other."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.accelerator.num_processes != world_size:
        raise ValueError(
            f"{world_size} processes were started, but they do not form a group. On CPU start them with "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m dre_slcl.training.train`."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m dre_slcl.training.train`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser("dre_slcl.training.train")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
