# SPDX-License-Identifier: Apache-2.0
"""Runs several campaigns of training in one process, which imports everything once; each is forked from it.

`python -m tests.reliability.together NAME=COUNT ...` prints a line of JSON for each: its name and its figures, or an
error. Faults are printed before it.
"""

import importlib
import json
import logging
import sys
import tempfile
import time
import traceback
from pathlib import Path

from . import training_runs as runs
from .campaign import MEMORY_FOLDER


def main():
    logging.basicConfig(level=logging.CRITICAL)
    asked = [argument.split("=") for argument in sys.argv[1:]]
    folder = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="dre-slcl-", dir=folder) as name:
        root = Path(name)
        runs.prepare(root)
        campaigns = {name: importlib.import_module(f".{name}", __package__).campaign for name, _ in asked}

        def run_one(share):
            name, count = share
            begin = time.monotonic()
            (root / name).mkdir()
            try:
                figures = campaigns[name](root / name, int(count), 0)
            except Exception:  # noqa: BLE001 (the others still run)
                figures = {"error": traceback.format_exc()}
            return figures | {"seconds": round(time.monotonic() - begin, 1)}

        for share in asked:
            print(json.dumps({"name": share[0]} | runs.share_out(run_one, [share])[0]), flush=True)


if __name__ == "__main__":
    main()
