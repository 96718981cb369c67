# SPDX-License-Identifier: Apache-2.0
"""R11: two or eight builds that want different things start at once in one folder; the one that got it is killed.

Exactly one must get it; the others must stop within two seconds and name its process. After the kill the next build
must work without any cleaning, and end with the files of an undisturbed one.
"""

import os
import signal
import time
from pathlib import Path

from datasets import Features  # noqa: F401 (imported before forking)

from dre_slcl.training import slide_part

from .build_kills import parquet_hashes, write_state
from .campaign import build, check, run_campaign

MAX_SECONDS = 2.0
HOLD_SECONDS = 60


def start_writer(manifest, out, result, quality):
    """Forks a build that waits at its first slide; it writes how it ended and when to the file `result`."""
    process = os.fork()
    if process:
        return process
    try:
        tile = slide_part._tile

        def wait_and_tile(task):
            result.with_suffix(".writes").touch()
            time.sleep(HOLD_SECONDS)
            return tile(task)

        slide_part._tile = wait_and_tile
        start = time.monotonic()
        try:
            build(manifest, out, jpeg_quality=quality)
            end = "done"
        except BlockingIOError as error:
            end = str(error)
        temporary = result.with_suffix(".tmp")
        temporary.write_text(f"{time.monotonic() - start} {end}")
        temporary.replace(result)
    finally:
        os._exit(0)


def play_round(root, manifest, num_writers, problems):
    """One round; returns the longest time that a writer without the folder took to stop."""
    out, results = root / "out", [root / f"result-{i}" for i in range(num_writers)]
    processes = [start_writer(manifest, out, result, 80 + i) for i, result in enumerate(results)]
    deadline = time.monotonic() + 30
    while sum(result.exists() for result in results) < num_writers - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    writing = []
    while not writing and time.monotonic() < deadline:
        writing = [i for i, result in enumerate(results) if result.with_suffix(".writes").exists()]
        time.sleep(0.01)
    stopped = [result.read_text().split(" ", 1) for result in results if result.exists()]
    check(problems, len(stopped) == num_writers - 1, f"{len(stopped)} of {num_writers} writers stopped")
    check(problems, len(writing) == 1, f"writers that proceed: {writing}")
    holder = processes[writing[0]] if writing else 0
    for _, text in stopped:
        is_named = f"process {holder}" in text and os.uname().nodename in text
        check(problems, is_named, f"the message does not name process {holder}: {text}")
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    build(manifest, out)
    return max((float(seconds) for seconds, _ in stopped), default=0.0)


def campaign(root, count, seed):
    manifest = write_state(root / "cohort", 0)
    build(manifest, root / "reference")
    expected, problems, longest = parquet_hashes(root / "reference"), [], 0.0
    for number in range(count):
        for num_writers in (2, 8):
            folder = root / f"round-{number}-{num_writers}"
            folder.mkdir()
            longest = max(longest, play_round(folder, manifest, num_writers, problems))
            check(problems, parquet_hashes(folder / "out") == expected, "another dataset after the kill")
            left = [str(path) for path in Path(folder / "out").glob(".*")]
            check(problems, not left, f"left behind: {left}")
    check(problems, longest <= MAX_SECONDS, f"a writer took {longest:.1f} s to stop")
    return {"cases": 2 * count, "faults": len(problems), "longest_seconds_to_stop": round(longest, 2)}


if __name__ == "__main__":
    run_campaign(campaign, count=5, doc=__doc__)
