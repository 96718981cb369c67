# SPDX-License-Identifier: Apache-2.0
"""Sends SIGTERM and SIGINT to training at random times, once or twice, and starts it again each time.

`python -m tests.signal_campaign --root DIR --rounds 20` prints one line of JSON: how runs ended, the longest time from
a signal to the end, and how often the newest checkpoint was not valid or older than one before.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kill_campaign
import tiny_dataset
import torch

from dre_slcl.training.checkpoint import CheckpointFolder
from dre_slcl.training.metrics_log import read_metrics


def newest_step(output_dir: Path) -> int:
    """Step of the newest valid checkpoint; -1 without one."""
    found = CheckpointFolder(output_dir / "checkpoints", keep=1, is_main=True, barrier=lambda: None).newest()
    return -1 if found is None else int(found.name.removeprefix("step-"))


def wait_for_training(output_dir: Path, after: int) -> None:
    """Waits until steps later than `after` are in the metrics."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = read_metrics(output_dir / "metrics.jsonl")
        if rows and rows[-1]["step"] > after:
            return
        time.sleep(0.02)
    raise RuntimeError((output_dir.parent / f"{output_dir.name}.log").read_text()[-2000:])


def campaign(root: Path, rounds: int, seed: int) -> dict:
    """Runs it; of every three rounds one gets a second signal."""
    changes = {"num_steps": 100_000, "finalize_steps": 0, "codebook_refits": [], "checkpoint_steps": 4}
    settings = tiny_dataset.train_settings(root, root / "run") | changes
    chance, output_dir = random.Random(seed), root / "run"
    saved, killed, wrong_status, not_saved, invalid, longest = 0, 0, 0, 0, 0, 0.0
    for place in range(rounds):
        before = newest_step(output_dir)
        process = kill_campaign.start(settings)
        wait_for_training(output_dir, before)
        time.sleep(chance.uniform(0, 0.5))
        number = chance.choice([signal.SIGTERM, signal.SIGINT])
        last_seen = read_metrics(output_dir / "metrics.jsonl")[-1]["step"]
        started = time.monotonic()
        os.kill(process, number)
        twice = place % 3 == 2
        if twice:
            time.sleep(chance.uniform(0.001, 0.02))
            os.kill(process, chance.choice([signal.SIGTERM, signal.SIGINT]))
        _, status = os.waitpid(process, 0)
        longest = max(longest, time.monotonic() - started)
        after = newest_step(output_dir)
        invalid += after < max(before, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            wrong_status += not twice
        else:
            saved += 1
            wrong_status += os.WEXITSTATUS(status) != 128 + number
            not_saved += after < last_seen
    found = {"rounds": rounds, "saved": saved, "ended_by_second_signal": killed, "wrong_status": wrong_status}
    return found | {"not_saved": not_saved, "invalid": invalid, "longest_seconds": round(longest, 2)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="empty folder to work in")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny_dataset.write_dataset(arguments.root / "data")
    tiny_dataset.write_text_model(arguments.root / "text")
    # Builds the dataset's cache once.
    from dre_slcl.training.tile_source import TileSource

    TileSource(arguments.root / "data", "train")
    sys.stdout.write(json.dumps(campaign(arguments.root, arguments.rounds, arguments.seed)) + "\n")


if __name__ == "__main__":
    main()
