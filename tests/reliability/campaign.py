# SPDX-License-Identifier: Apache-2.0
"""What all campaigns share: the command line, one line of JSON at the end, and builds that count what workers do.

`python -m tests.reliability.NAME [--count N]` runs one campaign from the project's folder; it ends with status 1 if
a figure that must be 0 is not. `make reliability` runs all with their large counts.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from tqdm import tqdm

from dre_slcl.training.slide_worker import prepare_worker

prepare_worker()  # no torch here, which nothing of this needs

from dre_slcl.training import build_dataset as build_module  # noqa: E402
from dre_slcl.training import worker_pool  # noqa: E402
from modeling_dre_slcl.slide_info import REASONS  # noqa: E402
from modeling_dre_slcl.tile_grid import TileGridConfig  # noqa: E402

GRID = TileGridConfig(tile_size_px=64, tile_mpp=1.0, mask_mpp=8.0)
HANG_SECONDS = 20.0
MEMORY_BYTES = 4 << 30
# tqdm's own lock is shared by forked processes: one that is killed while it holds it would stop all others for ever.
tqdm.set_lock(threading.RLock())
MEMORY_FOLDER = Path("/dev/shm")  # syncing thousands of small files to a disk would be all that is measured


def run_campaign(campaign, *, count, doc, seed=0):
    """Command line of a campaign: `campaign(root, count, seed)` returns figures, of which `faults` must be 0."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count, help="cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=seed)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    start = time.monotonic()
    folder = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="dre-slcl-", dir=folder) as root:
        figures = campaign(Path(root), arguments.count, arguments.seed)
    figures["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps(figures))
    sys.exit(1 if figures["faults"] else 0)


def check(problems, holds, text):
    """Notes a problem, and prints it, unless the condition holds."""
    if not holds:
        problems.append(text)
        print(f"FAULT {text}", flush=True)


def build(source, out, *, num_workers=0, grid_config=GRID, **options):
    """Builds a dataset with tiny tiles."""
    settings = {"num_workers": num_workers, "progress": False, **options}
    return build_module.build_dataset(source, out, grid_config, **settings)


@contextlib.contextmanager
def watched_workers(*, function=None, deadline_seconds=HANG_SECONDS, memory_bytes=MEMORY_BYTES):
    """Gives all workers limits, and yields a list that grows by what each task ended with.

    `function` takes the place of what workers call.
    """
    results = []
    collect, start = worker_pool._collect_results, worker_pool._start_worker

    def collect_and_keep(workers, _):
        for index, result in collect(workers, deadline_seconds):
            results.append(result)
            yield index, result

    worker_pool._collect_results = collect_and_keep
    worker_pool._start_worker = lambda called, initializer, _: start(function or called, initializer, memory_bytes)
    try:
        yield results
    finally:
        worker_pool._collect_results, worker_pool._start_worker = collect, start


def build_counting(source, out, *, num_workers=2, **options):
    """Builds with workers; returns the summary and how workers ended, such as {"ok": 9, "died -6": 1, "hung": 1}."""
    with watched_workers() as results:
        summary = build(source, out, num_workers=num_workers, **options)
    return summary, dict(Counter(_describe_end(result) for result in results))


def _describe_end(result):
    if isinstance(result, worker_pool.WorkerTimeout):
        return "hung"
    return f"died {result.exit_code}" if isinstance(result, worker_pool.WorkerCrash) else result.status


def slide_rows(out):
    """All rows of the `slides` table, by slide_id."""
    rows = [row for path in sorted((out / "slides").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["slide_id"]: row for row in rows}


def refusals(out):
    """Slide_id -> reason of every line of `refused.jsonl`."""
    lines = (out / "refused.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["slide_id"]: record["reason"] for record in map(json.loads, lines)}


def tile_digests(out):
    """Hash of the tiles of each slide: places and stored bytes, in order."""
    digests = {}
    for path in sorted((out / "tiles").glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(256):
            for row in batch.to_pylist():
                digest = digests.setdefault(row["slide_id"], hashlib.sha256())
                digest.update(f"{row['tile_index']} {row['x']} {row['y']} ".encode() + row["image"]["bytes"])
    return {slide_id: digest.hexdigest() for slide_id, digest in digests.items()}


def unreported(out, slide_ids):
    """Slides that are neither in the dataset as usable nor refused with a known reason, or both."""
    usable = {slide_id for slide_id, row in slide_rows(out).items() if row["status"] == "ok"}
    refused = refusals(out)
    unknown = {slide_id for slide_id, reason in refused.items() if reason not in REASONS}
    return sorted((set(slide_ids) - (usable ^ set(refused))) | unknown)


def tree(folder):
    """Path -> content hash (or target of a link) of everything below a folder, without following links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found
