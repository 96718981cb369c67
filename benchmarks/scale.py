# SPDX-License-Identifier: Apache-2.0
"""What costs grow with: tiles per slide, slides, codewords, processes; with a picture.

    python benchmarks/scale.py           # about two minutes on two cores
    python benchmarks/scale.py --full    # to 1,000,000 tiles per slide and 11,000 slides of 15,000 tiles (sparse file)

Parts that other benchmarks measure are taken from them (`step_cost`, `bank_on_disk`, `training_loop`). At the paper's
sizes (D = 384, K = 16, 4 slides with 32 new tiles each in a step), on one thread, fastest of repetitions in turns:

- `step_ms_by_tiles`: CPU ms of a training step without its tile encoder, for slides of so many stored tiles, and
  `recompute_ms_by_tiles`: only the residual sums of the same slides, from all stored features.
  `step_ratio_tiles`: largest to smallest; target: at most 1.10.
- `step_ms_by_codewords`: the same for slides of 10,000 tiles; `sums_kib_per_slide_by_codewords`: memory of its sums.
- `bank_ms_by_slides`: reading and writing a bank mapped from a disk, with so many slides of 15,000 tiles;
  `bank_ratio_slides`: largest to smallest; target: at most 1.25. `bank_gb_by_slides`: its size;
  `bank_bytes_per_tile`: float16 features; target: at most 800.
- `aggregate_ms_by_tiles`: adding so many features to a slide's sums and encoding them, as inference does;
  `aggregate_us_per_tile`: of the largest; `encode_ms`: the residual encoder alone, whatever the tiles.
- `tiles_per_second_by_processes`: whole training of a small ResNet on 1 and 2 processes of a thread each;
  `speedup_2_processes`: target: at least 1.6 on two idle cores.

Writes `scale.json` and `scale.png` to `--out` (default: benchmarks/results). The last line is JSON.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import training_loop
from bank_on_disk import CODEWORDS, TILES_PER_SLIDE, WIDTH, BankSteps, median_ms
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from step_cost import Step, fastest, naive

from dre_slcl.training.figures import COLOURS
from modeling_dre_slcl import DreSlclConfig, DreSlclModel
from modeling_dre_slcl.atomic_files import atomic_file, write_json
from modeling_dre_slcl.bank_storage import bank_tables

_ROOT = Path(__file__).resolve().parents[1]
_TILES, _TILES_OF_FULL = (1_000, 10_000, 100_000), (1_000, 10_000, 100_000, 1_000_000)
_CODEWORDS = (4, 16, 64, 256)
_SLIDES, _SLIDES_OF_FULL = (11, 110, 1_100), (11, 110, 1_100, 11_000)
_MOST_RECOMPUTED = 100_000
_CHUNK = 1_024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="larger slides and banks")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    repetitions = 60 if arguments.full else 25
    figures: dict[str, Any] = {"benchmark": "scale", "machine": platform.machine(), "cores": os.cpu_count()}
    figures |= by_tiles(_TILES_OF_FULL if arguments.full else _TILES, repetitions)
    figures |= by_codewords(repetitions)
    figures |= by_slides(_SLIDES_OF_FULL if arguments.full else _SLIDES)
    figures |= by_processes(100 if arguments.full else 40)
    figures["targets"] = {
        "step_ratio_tiles": "<= 1.10",
        "bank_ratio_slides": "<= 1.25",
        "bank_bytes_per_tile": "<= 800",
        "speedup_2_processes": ">= 1.6",
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "scale.json", figures)
    draw(figures, arguments.out / "scale.png")
    print(json.dumps(figures))


def make_model(num_codewords: int = CODEWORDS) -> DreSlclModel:
    """A model of the paper's size with a random codebook."""
    model = DreSlclModel(DreSlclConfig(num_codewords=num_codewords)).train()
    model.codebook.copy_(F.normalize(torch.randn_like(model.codebook), dim=-1))
    return model


def by_tiles(sizes: tuple[int, ...], repetitions: int) -> dict[str, Any]:
    """A step, recomputed sums, and inference, by tiles of a slide."""
    model = make_model()
    steps = {size: Step(model, size) for size in sizes}
    step_ms = fastest({str(size): step.whole for size, step in steps.items()}, repetitions)
    recompute_ms = fastest(
        {
            str(size): (lambda step=step, size=size: naive(step.bank, model.codebook, size))
            for size, step in steps.items()
            if size <= _MOST_RECOMPUTED
        },
        2,
    )
    model.eval()
    features = F.normalize(torch.randn(_CHUNK, WIDTH), dim=-1)

    @torch.inference_mode()
    def aggregate(num_tiles: int) -> None:
        state = model.empty_state()
        for start in range(0, num_tiles, _CHUNK):
            state.add(features[: num_tiles - start], model.codebook)
        model.get_state_features(state)

    aggregated = [size for size in sizes if size <= _MOST_RECOMPUTED]
    aggregate_ms = fastest({str(size): (lambda size=size: aggregate(size)) for size in aggregated}, 3)
    state = model.state_of_tiles(features)
    with torch.inference_mode():
        encode_ms = fastest({"encode": lambda: model.get_state_features(state)}, repetitions)["encode"]
    most = str(aggregated[-1])
    return {
        "step_ms_by_tiles": _rounded(step_ms),
        "recompute_ms_by_tiles": _rounded(recompute_ms),
        "step_ratio_tiles": round(step_ms[str(sizes[-1])] / step_ms[str(sizes[0])], 3),
        "aggregate_ms_by_tiles": _rounded(aggregate_ms),
        "aggregate_us_per_tile": round(1e3 * aggregate_ms[most] / int(most), 3),
        "encode_ms": round(encode_ms, 3),
    }


def by_codewords(repetitions: int) -> dict[str, Any]:
    """A step on slides of 10,000 tiles, and memory of sums, by codewords."""
    steps = {count: Step(make_model(count), 10_000) for count in _CODEWORDS}
    step_ms = fastest({str(count): step.whole for count, step in steps.items()}, repetitions)
    kib = {}
    for count in _CODEWORDS:
        tables = bank_tables([1], hidden_size=WIDTH, num_codewords=count, dtype=torch.float16)
        kib[str(count)] = (tables["feature_sums"].num_bytes + tables["counts"].num_bytes) / 1024
    return {"step_ms_by_codewords": _rounded(step_ms), "sums_kib_per_slide_by_codewords": _rounded(kib)}


def by_slides(counts: tuple[int, ...]) -> dict[str, Any]:
    """Reading and writing a mapped bank, and its size, by slides of 15,000 tiles."""
    sizes = {}
    for count in counts:
        tables = bank_tables(
            [TILES_PER_SLIDE] * count, hidden_size=WIDTH, num_codewords=CODEWORDS, dtype=torch.float16
        )
        sizes[count] = sum(table.num_bytes for table in tables.values())
    with tempfile.TemporaryDirectory() as name:
        banks = {}
        for count in counts:
            (Path(name) / str(count)).mkdir()
            banks[str(count)] = BankSteps(count, Path(name) / str(count))
        bank_ms = median_ms({count: bank.run for count, bank in banks.items()}, 100)
    first, last = str(counts[0]), str(counts[-1])
    return {
        "bank_ms_by_slides": _rounded(bank_ms),
        "bank_ratio_slides": round(bank_ms[last] / bank_ms[first], 3),
        "bank_gb_by_slides": {str(count): round(size / 1e9, 3) for count, size in sizes.items()},
        "bank_bytes_per_tile": round(sizes[counts[-1]] / (counts[-1] * TILES_PER_SLIDE), 1),
    }


def by_processes(num_steps: int) -> dict[str, Any]:
    """Training on one and on two processes, each with a thread."""
    with tempfile.TemporaryDirectory() as name:
        training_loop.write_data(Path(name))
        found = {
            str(count): training_loop.measure(Path(name), f"run-{count}", count, num_steps=num_steps)
            for count in (1, 2)
        }
    rates = {count: one["tiles_per_second"] for count, one in found.items()}
    return {"tiles_per_second_by_processes": rates, "speedup_2_processes": round(rates["2"] / rates["1"], 2)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draws four panels."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    tiles, codewords, slides, processes = figure.subplots(2, 2).flatten()
    _curve(tiles, figures["step_ms_by_tiles"], "whole step without tile encoder", 0)
    _curve(tiles, figures["recompute_ms_by_tiles"], "residual sums alone, recomputed", 1)
    _curve(tiles, figures["aggregate_ms_by_tiles"], "inference: all features -> embedding", 2)
    _label(tiles, "Tiles of a slide", "tiles of each slide", "CPU ms")
    _curve(codewords, figures["step_ms_by_codewords"], "whole step without tile encoder", 0)
    _label(codewords, "Codewords", "codewords K", "CPU ms")
    codewords.set_yscale("linear")
    codewords.set_ylim(bottom=0)
    _curve(slides, figures["bank_ms_by_slides"], "read and write, mapped bank (ms)", 0)
    _curve(slides, figures["bank_gb_by_slides"], "size of the bank (GB)", 1)
    _label(slides, "Slides of 15,000 tiles", "slides in the bank", "ms; GB")
    rates = figures["tiles_per_second_by_processes"]
    processes.bar(list(rates), list(rates.values()), color=COLOURS[0], width=0.5)
    for place, rate in enumerate(rates.values()):
        processes.annotate(f"{rate:.0f}", (place, rate), ha="center", va="bottom")
    processes.set(
        title=f"Processes (speed-up {figures['speedup_2_processes']})",
        xlabel="processes of one thread each",
        ylabel="tiles per second, trained",
    )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _curve(axes: Axes, values: dict[str, float], label: str, colour: int) -> None:
    axes.plot(
        np.array([int(name) for name in values]), list(values.values()), "o-", color=COLOURS[colour], label=label
    )


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
