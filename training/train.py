# SPDX-License-Identifier: Apache-2.0
"""`accelerate launch -m dre_slcl.training.train --config run.yaml`, or `dre-slcl train --config run.yaml`."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import TrainConfig, add_config_arguments, config_from_arguments

logger = logging.getLogger(__name__)
_SIGNAL_EXIT_BASE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl train`."""
    parser.description = (
        "Trains a slide encoder end to end with the reports of a slide dataset. Run the same command again after an "
        "interruption and it goes on where the last checkpoint was saved. On several processes: "
        "`accelerate launch -m dre_slcl.training.train --config run.yaml`."
    )
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status: 0 at the end, 128 + the signal that stopped it, 1 for an error."""
    try:
        return train(config_from_arguments(arguments))
    except (ValueError, OSError, FloatingPointError) as error:
        logger.error("%s", error)
        return 1


def train(config: TrainConfig) -> int:
    """Trains.

    Args:
        config (`TrainConfig`): the settings.

    Returns:
        `int`: 0 at the end, or 128 + the signal that stopped the run after a checkpoint.

    Raises:
        ValueError: for settings or data that do not fit together.
        OSError: if another run writes to the same folder, or files cannot be read or written.
        FloatingPointError: at the first number that is not finite; the last checkpoint is sound.
    """
    from .folder_lock import folder_lock
    from .stop_signals import StoppedBeforeTraining
    from .trainer import Trainer

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    is_first = int(os.environ.get("RANK", "0")) == 0
    with folder_lock(output_dir) if is_first else contextlib.nullcontext():
        trainer = Trainer(config)
        if trainer.accelerator.num_processes != world_size:
            raise ValueError(
                f"{world_size} processes were started, but they do not form a group. On CPU start them with "
                "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m dre_slcl.training.train`."
            )
        try:
            stopped_by = trainer.run()
        except StoppedBeforeTraining as stopped:
            logger.warning("Signal %d: there is nothing to save yet.", stopped.number)
            return _SIGNAL_EXIT_BASE + stopped.number
        trainer.accelerator.end_training()
    return 0 if stopped_by is None else _SIGNAL_EXIT_BASE + stopped_by


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m dre_slcl.training.train`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser("dre_slcl.training.train")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
