# SPDX-License-Identifier: Apache-2.0
"""R10: SIGTERM and SIGINT at random times of training: saved and out, with status 143 or 130.

A run that was asked to stop must have ended within ten seconds (or ten times a step and a save, on a slow machine),
with a checkpoint of the last step that it made. Every fourth gets the signal twice: it must end at once, and the
checkpoint that it had must be valid.
"""

import os
import random
import signal
import time

from . import training_runs as runs
from .campaign import check, run_campaign

MAX_SECONDS = 10.0
NUMBERS = (signal.SIGTERM, signal.SIGINT)


def stop_once(settings, number, chance, length, problems):
    """Sends a signal; returns the seconds until the end."""
    runs.remove(settings)
    process = runs.start(settings)
    runs.wait_until(lambda: runs.metrics_of(settings), process)
    time.sleep(chance.uniform(0, length))
    begin = time.monotonic()
    os.kill(process, number)
    status = runs.end(process)
    reached = max(row["step"] for row in runs.metrics_of(settings))
    valid, text = runs.valid_steps(settings), f"signal {number}"
    check(problems, status == 128 + number, f"{text}: status {status}: {runs.log_of(settings)[-1000:]}")
    check(problems, max(valid, default=-1) == reached, f"{text}: reached {reached}, saved {valid}")
    return time.monotonic() - begin


def stop_twice(settings, number, chance, problems):
    """Sends a signal, and again while the run may be saving; returns the seconds until the end."""
    runs.remove(settings)
    process = runs.start(settings)
    runs.wait_until(lambda: runs.metrics_of(settings), process)
    before = max(runs.valid_steps(settings), default=-1)
    os.kill(process, number)
    time.sleep(chance.uniform(0.001, 0.05))
    begin = time.monotonic()
    os.kill(process, number)
    status = runs.end(process)
    seconds, valid = time.monotonic() - begin, runs.valid_steps(settings)
    check(problems, status in (-number, 128 + number), f"signal {number} twice: status {status}")
    check(problems, max(valid, default=-1) >= before, f"signal {number} twice: valid {valid}, before {before}")
    return seconds


def campaign(root, count, seed):
    settings = runs.prepare(root, num_steps=400, finalize_steps=0, codebook_refits=[], checkpoint_steps=1000)
    chance, problems, longest, longest_twice, begin = random.Random(seed), [], 0.0, 0.0, time.monotonic()
    stop_once(settings, signal.SIGTERM, chance, 0, problems)
    limit = max(MAX_SECONDS, time.monotonic() - begin)
    for index in range(count):
        number = NUMBERS[index % 2]
        if index % 8 in (3, 6):
            longest_twice = max(longest_twice, stop_twice(settings, number, chance, problems))
        else:
            longest = max(longest, stop_once(settings, number, chance, 0.3, problems))
    check(problems, longest <= limit, f"stopped after {longest:.1f} s")
    check(problems, longest_twice <= limit / 2, f"stopped {longest_twice:.1f} s after the second signal")
    figures = {"cases": count, "faults": len(problems), "longest_seconds": round(longest, 2)}
    return figures | {"longest_seconds_after_a_second_signal": round(longest_twice, 2)}


if __name__ == "__main__":
    run_campaign(campaign, count=20, doc=__doc__)
