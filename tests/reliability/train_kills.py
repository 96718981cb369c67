# SPDX-License-Identifier: Apache-2.0
"""R1, R7: kills training at random times and starts it again, until done; the end must be that without kills.

At each kill the folder must hold a valid checkpoint (only one is kept), not older than an interval of checkpoints
before what the run had reached. A run that comes to its end must hold in memory and leave on the disk the same bits as
an uninterrupted one: weights, optimizer, memory bank, metrics, model. Most kills wait for a checkpoint to be written,
so that many fall into it.
"""

import os
import random
import signal
import time
from collections import Counter

from . import training_runs as runs
from .campaign import check, run_campaign

KILLS_PER_RUN = 5
SHARE_AIMED = 0.7
NUM_LANES = 2
MAX_FAULTS = 3


def measure(settings):
    """Runs twice without kills; returns what the end must be, and the seconds of a run and of a commit."""
    expected = runs.expect_success(settings)
    runs.remove(settings)
    begin, seconds_in_commit, looked = time.monotonic(), 0.0, time.monotonic()
    process = runs.start(settings)
    while not runs.is_over(process):
        seconds_in_commit += runs.in_commit(settings) * (time.monotonic() - looked)
        looked = time.monotonic()
        time.sleep(0.002)
    runs.end(process)
    if runs.digest(settings) != expected:
        raise RuntimeError("Two uninterrupted runs of the same settings differ.")
    runs.remove(settings)
    num_commits = (settings["num_steps"] + settings["finalize_steps"]) // settings["checkpoint_steps"] + 1
    return expected, time.monotonic() - begin, seconds_in_commit / num_commits


def kill_at_random(process, settings, chance, length, commit_seconds):
    """Kills a run at a random time of its length, or of one of its next commits; not if it is over before."""
    if chance.random() < SHARE_AIMED:
        for _ in range(chance.randint(1, 3)):
            runs.wait_until(lambda: not runs.in_commit(settings), process)
            runs.wait_until(lambda: runs.in_commit(settings), process)
        time.sleep(chance.uniform(0, commit_seconds))
    else:
        time.sleep(chance.uniform(0.05, 1.0) * length)
    if not runs.is_over(process):
        os.kill(process, signal.SIGKILL)


def look_after_kill(settings, newest_before, figures, problems):
    """Checks what a killed run left; returns the step of its newest valid checkpoint."""
    valid = runs.valid_steps(settings)
    newest = max(valid, default=-1)
    reached = max((row["step"] for row in runs.metrics_of(settings)), default=0)
    figures["kills_in_commit"] += runs.in_commit(settings)
    figures["kills_before_the_first_checkpoint"] += newest < 0
    is_lost = newest < newest_before or (newest < 0 and reached > 0)
    figures["without_valid_checkpoint"] += is_lost
    check(problems, not is_lost, f"valid checkpoints {valid}, before the kill {newest_before}")
    lost = reached - max(newest, 0)
    figures["most_steps_lost"] = max(figures["most_steps_lost"], lost)
    check(problems, lost <= settings["checkpoint_steps"], f"{lost} steps lost")
    return newest


def kill_runs(settings, count, seed, measured, patch=None, max_faults=MAX_FAULTS):
    """Kills `count` times, with `patch` called in each run first; returns figures and problems."""
    expected, length, commit_seconds = measured
    chance, problems = random.Random(seed), []
    names = ("kills", "kills_in_commit", "kills_before_the_first_checkpoint", "without_valid_checkpoint")
    names += ("most_steps_lost", "finished_runs", "divergent", "failed_resumes")
    figures, kills_left, newest = dict.fromkeys(names, 0), KILLS_PER_RUN, -1
    while len(problems) < max_faults and (figures["kills"] < count or newest >= 0):
        process = runs.start(settings, patch)
        if kills_left and figures["kills"] < count:
            kill_at_random(process, settings, chance, length, commit_seconds)
        status = runs.end(process)
        if status == -signal.SIGKILL:
            figures["kills"] += 1
            kills_left -= 1
            newest = look_after_kill(settings, newest, figures, problems)
            continue
        figures["finished_runs"] += status == 0
        figures["failed_resumes"] += status != 0
        check(problems, status == 0, f"status {status}: {runs.log_of(settings)[-1000:]}")
        if status == 0:
            is_divergent = runs.digest(settings) != expected
            figures["divergent"] += is_divergent
            check(problems, not is_divergent, "a finished run differs from the uninterrupted one")
            check(problems, not runs.left_behind(settings), f"left behind: {runs.left_behind(settings)}")
        runs.remove(settings)
        kills_left, newest = KILLS_PER_RUN, -1
    return figures, problems


def campaign(root, count, seed):
    settings = runs.prepare(root, keep_checkpoints=1)
    measured = measure(settings)

    def lane(number):
        mine = settings | {"output_dir": str(root / f"lane-{number}")}
        return kill_runs(mine, count // NUM_LANES + (number < count % NUM_LANES), seed * NUM_LANES + number, measured)

    lanes = runs.share_out(lane, range(NUM_LANES))
    total = sum((Counter(figures) for figures, _ in lanes), Counter())
    figures = {name: total[name] for name in lanes[0][0]}
    figures["most_steps_lost"] = max(lane["most_steps_lost"] for lane, _ in lanes)
    return {"cases": figures.pop("kills"), "faults": sum(len(problems) for _, problems in lanes), **figures}


if __name__ == "__main__":
    run_campaign(campaign, count=100, doc=__doc__)
