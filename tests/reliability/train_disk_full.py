# SPDX-License-Identifier: Apache-2.0
"""R5: trains on file systems that are too small, from nearly nothing to more than enough, up to the final model.

A run must come to its end, or end with status 5 and one line that names the folder and the bytes; what it had saved
before must be valid. With room made, the same command must end with the bits of an undisturbed run and leave nothing
over. Needs root, for the file systems are real ones in memory (tmpfs).
"""

import os
import subprocess
from pathlib import Path

from . import training_runs as runs
from .campaign import check, run_campaign
from .disk_full import small_disk

SHARES = (0.1, 1.2)  # of what an undisturbed run and its newest checkpoint take


def taken_bytes(settings):
    """What a finished run takes, and a checkpoint that is written beside those that are kept."""
    files = [path for path in Path(settings["output_dir"]).rglob("*") if path.is_file()]
    page = os.sysconf("SC_PAGE_SIZE")
    sizes = {path: -(-path.stat().st_size // page) * page for path in files}
    newest = runs.checkpoints(settings)[-1]
    return sum(sizes.values()) + sum(size for path, size in sizes.items() if path.parent == newest)


def play(disk, settings, num_bytes, expected, text, problems):
    """Trains on one disk; returns whether it was full."""
    with small_disk(disk, num_bytes):
        mine = settings | {"output_dir": str(disk / "out")}
        status = runs.run(mine)
        if status == 0:
            check(problems, runs.digest(mine) == expected, f"{text}: another end")
            return False
        log = runs.log_of(mine)
        errors = [line for line in log.splitlines() if line.startswith("ERROR")]
        is_clear = len(errors) == 1 and "No space left" in errors[0] and str(disk) in errors[0]
        is_clear = is_clear and "Traceback" not in log
        check(problems, status == 5 and is_clear, f"{text}: status {status}: {log[-1500:]}")
        saved = runs.valid_steps(mine)
        reached = max((row["step"] for row in runs.metrics_of(mine)), default=0)
        lost = reached - max(saved, default=0)
        check(problems, lost <= mine["checkpoint_steps"], f"{text}: reached {reached}, valid are {saved}")
        subprocess.run(["mount", "-o", f"remount,size={num_bytes * 20}", str(disk)], check=True)
        status = runs.run(mine)
        check(problems, status == 0, f"{text}, with room: status {status}: {runs.log_of(mine)[-1500:]}")
        check(problems, status or runs.digest(mine) == expected, f"{text}, with room: another end")
        check(problems, not runs.left_behind(mine), f"{text}, with room: left {runs.left_behind(mine)}")
    return True


def campaign(root, count, seed):
    (root / "test").mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(root / "test")], check=False).returncode:
        return {"cases": 0, "faults": 0, "skipped": "file systems can not be mounted here"}
    subprocess.run(["umount", str(root / "test")], check=True)
    settings = runs.prepare(root, num_steps=4, finalize_steps=0, keep_checkpoints=1)
    expected, problems, num_full = runs.expect_success(settings), [], 0
    needed, (least, most) = taken_bytes(settings), SHARES
    for number in range(count):
        share = least + (most - least) * number / max(1, count - 1)
        text = f"{share:.2f} of {needed} bytes"
        num_full += play(root / f"disk-{number}", settings, int(needed * share), expected, text, problems)
    return {"cases": count, "faults": len(problems), "disks_that_were_full": num_full}


if __name__ == "__main__":
    run_campaign(campaign, count=5, doc=__doc__)
