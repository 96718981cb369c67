# SPDX-License-Identifier: Apache-2.0
"""R3: ends training before and after every single thing that it does to files while it saves and rotates a checkpoint.

The last save of a run is played again and again from the same state, each time until one file operation later: a
folder made, a file created, half or wholly written, synced, renamed, linked, removed. After each the folder must hold
a valid checkpoint, the old or the new one. From `--count` of the points, spread evenly, training goes on and must end
with the bits of an undisturbed run.
"""

import os
import shutil
from pathlib import Path

from dre_slcl.training import checkpoint

from . import file_events
from . import training_runs as runs
from .campaign import check, run_campaign, tree

NUM_LANES = 2
SAVED, CRASHED_HERE = 0, 9


def crash_at(folder, point):
    """Ends this process at the given number of points from now; a file about to be synced has two, one with half."""
    passed = [0]

    def tell(what, path, target):
        for is_half in (True, False) if what in ("fsync", "written") and file_events.is_file(path) else (False,):
            if passed[0] == point:
                if is_half:
                    os.truncate(path, path.stat().st_size // 2)
                os._exit(CRASHED_HERE)
            passed[0] += 1

    file_events.watch(folder, tell)


def play_all_points(last_step, states):
    """Makes the last save of a run, in a forked run, once for each point; copies what each left to `states`."""
    save = checkpoint.CheckpointFolder.save

    def save_with_crashes(self, step, **content):
        if step == last_step:
            before, point, status = states / "before", 0, None
            shutil.copytree(self.folder, before)
            while status != SAVED:
                process = os.fork()
                if not process:
                    crash_at(self.folder, point)
                    save(self, step, **content)
                    os._exit(SAVED)
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                if status not in (SAVED, CRASHED_HERE):
                    raise RuntimeError(f"A save ended with {status}.")
                self.folder.rename(states / f"{point:04d}")
                shutil.copytree(before, self.folder)
                point += 1
        save(self, step, **content)

    checkpoint.CheckpointFolder.save = save_with_crashes


def go_on(settings, folder, expected, problems):
    """Trains from a state to the end."""
    output_dir = Path(settings["output_dir"])
    runs.remove(settings)
    output_dir.mkdir()
    for name in ("metrics.jsonl", "report_cache"):
        source = folder.parent / "rest" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, output_dir / name)
    shutil.copytree(folder, output_dir / "checkpoints")
    status = runs.run(settings)
    check(problems, status == 0, f"{folder.name}: status {status}: {runs.log_of(settings)[-1000:]}")
    if status == 0:
        check(problems, runs.digest(settings) == expected, f"{folder.name}: another end than without a crash")
        check(problems, not runs.left_behind(settings), f"{folder.name}: left {runs.left_behind(settings)}")


def campaign(root, count, seed):
    settings = runs.prepare(root, keep_checkpoints=1, num_steps=4, finalize_steps=0)
    problems, states, output_dir = [], root / "states", Path(settings["output_dir"])
    last, old = settings["num_steps"], settings["num_steps"] - settings["checkpoint_steps"]
    states.mkdir()
    expected = runs.expect_success(settings, lambda: play_all_points(last, states), seconds=600)
    output_dir.rename(states / "rest")
    points = sorted(states.glob("0*"))
    found = {}
    for folder in points:
        output_dir.mkdir(exist_ok=True)
        (output_dir / "checkpoints").symlink_to(folder)
        newest = max(runs.valid_steps(settings), default=-1)
        found[newest] = found.get(newest, 0) + 1
        check(problems, newest in (old, last), f"{folder.name}: {newest} in {list(tree(folder))}")
        (output_dir / "checkpoints").unlink()
    chosen = points[:: max(1, len(points) // count)]

    def lane(number):
        mine, noted = settings | {"output_dir": str(root / f"lane-{number}")}, []
        for folder in chosen[number::NUM_LANES]:
            go_on(mine, folder, expected, noted)
        return noted

    for noted in runs.share_out(lane, range(NUM_LANES)):
        problems += noted
    figures = {"cases": len(points), "faults": len(problems), "resumed": len(chosen)}
    return figures | {"old_is_newest": found.get(old, 0), "new_is_newest": found.get(last, 0)}


if __name__ == "__main__":
    run_campaign(campaign, count=10, doc=__doc__)
