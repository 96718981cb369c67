# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl bank`: looks into the memory bank of a run, draws it, and writes its features for other tools."""

import argparse
import json
import logging
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_dre_slcl import MemoryBank
from modeling_dre_slcl.atomic_files import read_json

from .bank_filling import bank_folder
from .bank_journal import BankJournal
from .bank_report import BankSummary, draw_bank_report, summarize_bank
from .checkpoint import CheckpointFolder, load_tensors, validate_checkpoint
from .config import TrainConfig
from .dataset_files import load_split
from .run_data import RunData
from .slide_rows import SlideRow
from .trident_export import coordinate_attributes, run_name, write_trident_features

logger = logging.getLogger(__name__)

_CODEBOOK = "residual_encoder.codebook"
_MAX_LISTED = 20


@dataclass(frozen=True, eq=False)
class OpenedBank:
    """The bank of a checkpoint.

    Args:
        checkpoint (`Path`): the checkpoint.
        step (`int`): its step.
        config (`TrainConfig`): the settings of its run.
        data (`RunData`): the slides, as one process that owns all of them.
        bank (`MemoryBank`): the bank of all slides.
    """

    checkpoint: Path
    step: int
    config: TrainConfig
    data: RunData
    bank: MemoryBank


def open_bank(path: str | Path, stack: ExitStack) -> OpenedBank:
    """Reads the bank of a run or of one checkpoint; a bank on a disk is mapped from a disk again.

    Args:
        path (`str` or `Path`): the run's `output_dir`, its folder `checkpoints`, or one checkpoint.
        stack (`ExitStack`): on closing it, what was written for a while is removed.

    Raises:
        ValueError: if there is no usable checkpoint, or it does not belong to the dataset that its run names.
    """
    checkpoint = _find_checkpoint(Path(path))
    state = read_json(checkpoint / "trainer_state.json")
    config = TrainConfig(**state["config"])
    data = RunData(config, 0, 1)
    codebook = load_tensors(checkpoint / "model.safetensors")[_CODEBOOK]
    bank, folder = MemoryBank(codebook.shape[1], len(codebook)), bank_folder(config)
    if folder is not None:
        parent = config.bank_dir if config.bank_dir and Path(config.bank_dir).is_dir() else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent)))
    bank.allocate(data.num_tiles_owned(), dtype=getattr(torch, config.bank_dtype), device="cpu", folder=folder)
    shards = {shard: data.bank_places(data.shards[shard]).tolist() for shard in data.owned_shards}
    BankJournal(bank, shards, len(data.shards), whole_bytes=0).restore(checkpoint)
    return OpenedBank(checkpoint, state["step"], config, data, bank)


def export_bank(opened: OpenedBank, out_dir: str | Path) -> tuple[int, int]:
    """Writes the stored features of every slide in TRIDENT's layout, as float32 exactly what is stored.

    Args:
        opened (`OpenedBank`): the bank.
        out_dir (`str` or `Path`): TRIDENT's job folder; `bank_init` and `dre-slcl import-features` read it.

    Returns:
        `tuple`: numbers of slides and of tiles written. Slides without any stored tile have no file.
    """
    encoder = f"dre-slcl-step-{opened.step:08d}"
    sizes = _slide_sizes(opened.data)
    starts, slides, tiles = opened.bank.slide_start.tolist(), 0, 0
    for place, slide in enumerate(opened.data.owned):
        row = opened.data.source.slides[slide]
        rows = torch.arange(starts[place], starts[place + 1])
        is_stored = opened.bank.written_step[rows] >= 0
        if not is_stored.any():
            continue
        size = _size(row, sizes)
        attributes = coordinate_attributes(row.slide_id, **_geometry(row), **size)
        name = run_name(tile_size_px=row.tile_size_px, tile_mpp=row.tile_mpp, stride_px=size["stride_px"])
        target = Path(out_dir) / name / f"features_{encoder}" / f"{row.slide_id}.h5"
        features = opened.bank.stored_features(rows[is_stored]).numpy()
        corners = row.tile_xy[is_stored.numpy()]
        write_trident_features(target, features, corners, encoder=encoder, attributes=attributes)
        slides, tiles = slides + 1, tiles + len(features)
    return slides, tiles


def describe_bank(opened: OpenedBank, summary: BankSummary) -> str:
    """Says in a table what a bank holds and which slides are the least covered."""
    lines = [f"{opened.checkpoint}: step {opened.step}, {opened.config.bank_dtype}, {len(summary.slide_ids)} slides"]
    lines += [f"  {name:20} {value:.6g}" for name, value in summary.health.items()]
    shares = summary.num_stored / summary.num_tiles
    lines.append(f"  {'slide':40} {'tiles':>9} {'stored':>9} {'coverage':>9}")
    order = np.argsort(shares, kind="stable")
    for place in order[:_MAX_LISTED]:
        counts = f"{summary.num_tiles[place]:9d} {summary.num_stored[place]:9d} {shares[place]:9.1%}"
        lines.append(f"  {summary.slide_ids[place]:40} {counts}")
    if len(order) > _MAX_LISTED:
        lines.append(f"  ... and {len(order) - _MAX_LISTED} slides that are covered no less")
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dre-slcl bank`."""
    parser.description = (
        "Look into the memory bank of a run: how full, how old, how well spread it is, and which slides are covered "
        "least. Exit status: 0 done, 1 failed."
    )
    parser.add_argument("run_or_checkpoint", metavar="RUN", help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument("--draw", metavar="FILE.png", help="draw ages, coverage, codewords and their history")
    parser.add_argument("--export", metavar="DIR", help="write the stored features as TRIDENT's .h5 files")


def run(args: argparse.Namespace) -> int:
    """Runs `dre-slcl bank`; returns 0, or 1 if it failed."""
    try:
        with ExitStack() as stack:
            opened = open_bank(args.run_or_checkpoint, stack)
            summary = summarize_bank(opened.bank, opened.data, opened.step)
            per_slide = zip(summary.slide_ids, summary.num_stored.tolist(), summary.num_tiles.tolist(), strict=True)
            as_json: dict[str, Any] = {"checkpoint": str(opened.checkpoint), "step": opened.step, **summary.health}
            as_json["slides"] = {slide_id: {"stored": stored, "tiles": tiles} for slide_id, stored, tiles in per_slide}
            sys.stdout.write(json.dumps(as_json) + "\n" if args.json else describe_bank(opened, summary))
            if args.draw:
                metrics = opened.checkpoint.parent.parent / "metrics.jsonl"
                draw_bank_report(summary, args.draw, metrics)
                logger.info("Drawn: %s", args.draw)
            if args.export:
                slides, tiles = export_bank(opened, args.export)
                logger.info("%s: features of %d tiles of %d slides", args.export, tiles, slides)
    except (ValueError, OSError, ImportError) as error:
        logger.error("%s", error)
        return 1
    return 0


def _find_checkpoint(path: Path) -> Path:
    if (path / "trainer_state.json").is_file():
        validate_checkpoint(path)
        return path
    for folder in (path / "checkpoints", path):
        newest = CheckpointFolder(folder, keep=1, is_main=True, barrier=lambda: None).newest()
        if newest is not None:
            return newest
    raise ValueError(f"{path}: expected the output_dir of a training run or a checkpoint of it, found no checkpoint.")


def _slide_sizes(data: RunData) -> dict[str, dict[str, Any]]:
    """Size and stride of each slide, by its id, as far as the dataset says them."""
    table = load_split(data.source.dataset, "slides", data.source.split)
    names = [name for name in ("width_px", "height_px", "stride_px") if name in table.column_names]
    return {row["slide_id"]: row for row in table.select_columns(["slide_id", *names]).to_list()}


def _size(row: SlideRow, sizes: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Size and stride of a slide; where the dataset does not say them, what its tiles cover."""
    width_px, height_px = (row.tile_xy.max(axis=0) + row.tile_size_level0_px).tolist()
    least = {"width_px": width_px, "height_px": height_px, "stride_px": row.tile_size_px}
    return {name: int(sizes[row.slide_id].get(name) or value) for name, value in least.items()}


def _geometry(row: SlideRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("mpp", "tile_size_px", "tile_mpp", "tile_size_level0_px")}
