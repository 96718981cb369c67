# SPDX-License-Identifier: Apache-2.0
"""Kills training at random times, starts it again each time, and compares the end with an uninterrupted run.

`python -m tests.kill_campaign --root DIR --kills 20` prints one line of JSON. Libraries are imported once and each
run is forked from here, so a kill costs a second and not the start of an interpreter. No gradient is computed in the
parent, because the threads of autograd do not survive a fork.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tiny_dataset
import torch
import torch._dynamo  # imported by the first optimizer step otherwise, in every child

from dre_slcl.training.config import TrainConfig
from dre_slcl.training.metrics_log import read_metrics
from dre_slcl.training.train import train
from dre_slcl.training.trainer import Trainer  # noqa: F401 (imported before forking)

TIMES = ("seconds", "tiles_per_second")  # what the names of times end in


def start(settings: dict) -> int:
    """Forks a training run; returns its process id."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        with Path(settings["output_dir"] + ".log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = train(TrainConfig(**settings))
    finally:
        os._exit(status)


def digest(output_dir: Path) -> str:
    """Hash of everything that a finished run leaves: last checkpoint, metrics but for times, final model."""
    checkpoint = max((output_dir / "checkpoints").glob("step-*"))
    summary = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(checkpoint.glob("*.safet*"))
    }
    summary["model"] = hashlib.sha256((output_dir / "model" / "model.safetensors").read_bytes()).hexdigest()
    rows = read_metrics(output_dir / "metrics.jsonl")
    summary["metrics"] = [{key: value for key, value in row.items() if not key.endswith(TIMES)} for row in rows]
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()


def campaign(root: Path, num_kills: int, seed: int) -> dict:
    """Runs until `num_kills` kills have hit a live run, at random times up to its full length."""
    settings = tiny_dataset.train_settings(root, root / "reference")
    started, expected, length = time.monotonic(), set(), 0.0
    # Twice: the first run warms the caches, the second says how long a run takes and that runs are repeatable.
    for name in ("first", "reference"):
        run_started = time.monotonic()
        _, status = os.waitpid(start(settings | {"output_dir": str(root / name)}), 0)
        length = time.monotonic() - run_started
        if status:
            raise RuntimeError((root / f"{name}.log").read_text()[-2000:])
        expected.add(digest(root / name))
    if len(expected) > 1:
        raise RuntimeError("Two uninterrupted runs of the same settings differ.")
    chance, kills, in_commit, finished, divergent, failed = random.Random(seed), 0, 0, 0, 0, 0
    output_dir = root / "killed"
    while kills < num_kills or (output_dir / "checkpoints").exists():
        process = start(settings | {"output_dir": str(output_dir)})
        if kills < num_kills:
            time.sleep(chance.uniform(0.02, 0.9) * length)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            in_commit += bool(list((output_dir / "checkpoints").glob(".tmp-*")))
        elif status:
            failed += 1
            sys.stderr.write((root / "killed.log").read_text()[-2000:])
            break
        else:
            finished += 1
            divergent += digest(output_dir) not in expected
            shutil.rmtree(output_dir)
    result = {"kills": kills, "in_commit": in_commit, "finished_runs": finished, "divergent": divergent}
    return result | {"failed_resumes": failed, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="empty folder to work in")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiny_dataset.write_dataset(arguments.root / "data")
    tiny_dataset.write_text_model(arguments.root / "text")
    # Builds the dataset's cache once, outside of what is killed.
    from dre_slcl.training.tile_source import TileSource

    TileSource(arguments.root / "data", "train")
    sys.stdout.write(json.dumps(campaign(arguments.root, arguments.kills, arguments.seed)) + "\n")


if __name__ == "__main__":
    main()
