# SPDX-License-Identifier: Apache-2.0
"""What a fresh process does with a bomb: reads it as the product would, and says how it ended and what it took."""

import time
from pathlib import Path


def read_bomb(task):
    """Opens (what, path); returns how it ended, the processor's seconds, and the most memory it ever had (MB)."""
    what, path = task
    _READERS[what](None)  # imports do not count
    start = time.process_time()
    try:
        _READERS[what](Path(path))
        end = "accepted"
    except Exception as error:  # noqa: BLE001 - what is raised is what is to be found out
        end = f"{type(error).__name__}: {getattr(error, 'reason', error)}"[:200]
    seconds = time.process_time() - start
    return end, round(seconds, 2), _peak_mb()


def _peak_mb():
    """Most memory that this process ever had; getrusage would count the parent's, from before the program began."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def _read_slide(path):
    from modeling_dre_slcl.slide_reader import SlideReader

    if path is not None:
        with SlideReader(path) as reader:
            reader.read_overview(8.0)
            reader.read_tile(0, 0, tile_size_px=256, tile_mpp=1.0)


def _read_manifest(path):
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401

    from dre_slcl.training.manifest import read_manifest

    if path is not None:
        read_manifest(path)


def _read_json(path):
    from modeling_dre_slcl.atomic_files import read_json

    if path is not None:
        read_json(path)


_READERS = {"slide": _read_slide, "manifest": _read_manifest, "json": _read_json}
