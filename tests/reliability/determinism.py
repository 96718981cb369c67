# SPDX-License-Identifier: Apache-2.0
"""R12: fresh runs in processes that differ in all that must not matter end with the same bits.

They differ in the number of workers (0, 1, 2), the seed of Python's hashes, the folder for temporary files, the
locale, the time zone and the folder of the run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from . import training_runs as runs
from .campaign import check, run_campaign
from .run_all import ROOT

VARIANTS = (
    {"num_workers": 0, "PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "UTC"},
    {"num_workers": 1, "PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo"},
    {"num_workers": 2, "PYTHONHASHSEED": "12345", "LC_ALL": "POSIX", "TZ": "America/St_Johns"},
    {"num_workers": 0, "PYTHONHASHSEED": "random", "LC_ALL": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati"},
    {"num_workers": 1, "PYTHONHASHSEED": "7", "LC_ALL": "de_DE.UTF-8", "TZ": "America/New_York"},
    {"num_workers": 2, "PYTHONHASHSEED": "4294967295", "LC_ALL": "ja_JP.eucJP", "TZ": "Europe/London"},
)
CODE = "import json, sys; from tests.reliability import training_runs as r; r.train_here(json.loads(sys.argv[1]))"


def campaign(root, count, seed):
    settings, problems, digests = runs.prepare(root), [], []
    expected = runs.expect_success(settings)
    for index, variant in enumerate(VARIANTS[:count]):
        temporary = root / f"temporary folder {index}"
        temporary.mkdir()
        mine = settings | {"output_dir": str(root / f"run-{'x' * index}"), "num_workers": variant["num_workers"]}
        environment = os.environ | {key: value for key, value in variant.items() if key != "num_workers"}
        environment |= {"TMPDIR": str(temporary)}
        command = [sys.executable, "-c", CODE, json.dumps(mine)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        check(problems, done.returncode == 0, f"{variant}: status {done.returncode}: {done.stderr[-1000:]}")
        if done.returncode == 0:
            digests.append(runs.digest(mine))
            check(problems, digests[-1] == expected, f"{variant}: another end")
            check(problems, not list(Path(temporary).iterdir()), f"{variant}: temporary files are left")
    return {"cases": len(digests), "faults": len(problems), "digests": len({expected, *digests})}


if __name__ == "__main__":
    run_campaign(campaign, count=6, doc=__doc__)
