# SPDX-License-Identifier: Apache-2.0
"""Whether tiles reach the training loop in time, on one process and on two, and where a step's time goes.

    python benchmarks/training_loop.py           # 40 steps of 8 slides x 8 tiles, on 1 and 2 processes
    python benchmarks/training_loop.py --full    # 200 steps

A dataset of JPEG tiles of 128 px is written, and a small ResNet is trained on it on the CPU, with 2 loader workers for
each process and one thread per process. Figures are of `summary.json` without the first lines of metrics, in which
workers start:

- `idle_share_1`, `idle_share_2` (target: below 0.05): time in which a process waits for tiles or the other process,
  of all time but checkpoints; mean over processes.
- `wait_share_1`, `wait_share_2`: the part of it that is waiting for the other process.
- `split_1`, `split_2`: share of each phase; see `step_clock.py`.
- `tiles_per_second_1`, `tiles_per_second_2`: tiles encoded with gradient, all processes together.
- `accumulated_to_plain`: seconds per step with `accumulation_steps: 4` over those without.
- `same_losses` (target: true): losses of two processes are those of one, to 1e-5.

Ends in one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from dre_slcl.training.metrics_log import read_metrics
from dre_slcl.training.run_summary import time_split

_TILE_PX = 128
_NUM_SLIDES, _TILES_PER_SLIDE = 24, 60
_WARM_UP_STEPS = 10
_LOG_STEPS = 5


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="200 steps instead of 40")
    steps = 200 if parser.parse_args().full else 40
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root)
        one, two = (measure(root, f"run-{size}", size, num_steps=steps) for size in (1, 2))
        parts = measure(root, "parts", 1, num_steps=_WARM_UP_STEPS + 2 * _LOG_STEPS, accumulation_steps=4)
        losses = [[row["loss"] for row in read_metrics(root / f"run-{size}" / "metrics.jsonl")] for size in (1, 2)]
    seconds = {name: figures["seconds"] / figures["steps"] for name, figures in (("plain", one), ("parts", parts))}
    figures: dict[str, Any] = {"steps": steps, "cores": os.cpu_count(), "workers": 2}
    for size, found in ((1, one), (2, two)):
        figures |= {
            f"idle_share_{size}": found["idle_share"],
            f"wait_share_{size}": found["share"]["wait"],
            f"tiles_per_second_{size}": found["tiles_per_second"],
            f"split_{size}": found["share"],
        }
    figures["accumulated_to_plain"] = round(seconds["parts"] / seconds["plain"], 2)
    figures["same_losses"] = all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(*losses, strict=True))
    print(json.dumps(figures))
    return 0


def write_data(root: Path) -> None:
    """Writes a slide dataset of random tissue-like tiles, and a tiny text model."""
    import cv2
    import numpy as np
    from datasets import Dataset, Features, Image, Value

    from dre_slcl.training.demo.text_model import write_text_model

    slides, tiles = [], []
    for slide in range(_NUM_SLIDES):
        random = np.random.default_rng(slide)
        for tile in range(_TILES_PER_SLIDE):
            coarse = random.integers([110, 40, 90], [235, 160, 215], (_TILE_PX // 4, _TILE_PX // 4, 3)).astype(
                np.uint8
            )
            pixels = cv2.resize(coarse, (_TILE_PX, _TILE_PX), interpolation=cv2.INTER_CUBIC)
            data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
            row = {"slide_id": f"slide-{slide}", "tile_index": tile, "x": tile * _TILE_PX, "y": 0}
            tiles.append(row | {"image": {"bytes": data, "path": None}})
        xy = [[tile * _TILE_PX, 0] for tile in range(_TILES_PER_SLIDE)]
        geometry = {"tile_size_px": _TILE_PX, "tile_mpp": 0.5, "tile_size_level0_px": _TILE_PX, "tile_xy": xy}
        place = {"tile_start": slide * _TILES_PER_SLIDE, "num_tiles": _TILES_PER_SLIDE}
        names = {"slide_id": f"slide-{slide}", "case_id": f"case-{slide}", "path": f"{slide}.svs", "split": "train"}
        report = f"grade {slide} carcinoma with {slide % 5} nodes"
        slides.append(names | geometry | place | {"mpp": 0.5, "report": report, "status": "ok", "reason": ""})
    folder = root / "data"
    for name in ("slides", "tiles"):
        (folder / name).mkdir(parents=True)
    Dataset.from_list(slides).to_parquet(folder / "slides" / "train-00000-of-00001.parquet")
    columns = {"slide_id": Value("string"), "tile_index": Value("int32"), "x": Value("int32"), "y": Value("int32")}
    table = Dataset.from_list(tiles, features=Features(columns | {"image": Image()}))
    table.to_parquet(folder / "tiles" / "train-00000-of-00001.parquet")
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*.parquet"}]}
        for name in ("tiles", "slides")
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    write_text_model(root / "text", [row["report"] for row in slides], seed=0)


def measure(root: Path, name: str, num_processes: int, *, num_steps: int, **changes: Any) -> dict[str, Any]:
    """Trains in processes of their own; returns the times after the warm-up, and the number of their steps."""
    model = {"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 64], "norm_layer": "groupnorm"}
    settings = {
        "dataset": str(root / "data"),
        "output_dir": str(root / name),
        "text_model": str(root / "text"),
        "tile_encoder_config": {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": model},
        "model_config": {"num_codewords": 8, "text_projection": "linear", "projection_size": 32},
        "slides_per_batch": 8,
        "tiles_per_slide": 8,
        "first_pass_tiles_per_slide": 16,
        "num_steps": num_steps,
        "warmup_steps": num_steps,
        "bank_dtype": "float32",
        "learning_rate": 1e-5,
        "head_learning_rate": 1e-5,
        "num_workers": 2,
        "checkpoint_steps": num_steps,
        "log_steps": _LOG_STEPS,
    }
    (root / f"{name}.yaml").write_text(yaml.safe_dump(settings | changes))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [*(command if num_processes > 1 else [sys.executable]), "-m", "dre_slcl.training.train"]
    done = subprocess.run(
        [*command, "--config", str(root / f"{name}.yaml")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    rows = [row for row in read_metrics(root / name / "metrics.jsonl") if row["step"] > _WARM_UP_STEPS]
    shifted = [row | {"step": row["step"] - _WARM_UP_STEPS} for row in rows]
    return time_split(shifted) | {"steps": num_steps - _WARM_UP_STEPS}


if __name__ == "__main__":
    sys.exit(main())
