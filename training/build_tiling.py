# SPDX-License-Identifier: Apache-2.0
"""Tiles the slides of a build in worker processes, beside other processes that may build the same dataset."""

import logging
import os
import time
from collections.abc import Callable, Sequence

from .build_progress import BuildProgress
from .slide_claims import BuildMember, release_claim
from .slide_part import PartRecord, SlideTask, find_record, refuse_slide, write_record
from .slide_worker import prepare_worker, tile_in_worker
from .worker_pool import WorkerCrash, run_in_workers

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
# A worker tells of every tile; opening, looking for tissue and writing a group of tiles go without a word.
DEADLINE_SECONDS = 300.0
WORKER_MEMORY_BYTES = 4 << 30


def tile_slides(
    tasks: Sequence[SlideTask],
    *,
    num_workers: int | None,
    member: BuildMember,
    progress: BuildProgress,
    is_finished: Callable[[], bool],
) -> dict[str, PartRecord] | None:
    """Tiles slides in workers; a worker that dies costs its slide only.

    Slides that another member is at are left to it; when nothing else is left, their end is waited for, and those of
    a member that dies are tiled here.

    Args:
        tasks (`Sequence[SlideTask]`): the slides.
        num_workers (`int`, *optional*): processes; default: one per core; 0: none, in this process.
        member (`BuildMember`): this process.
        progress (`BuildProgress`): is told of every slide that is done.
        is_finished (`Callable[[], bool]`): whether another member has finished the dataset.

    Returns:
        `dict[str, PartRecord]`, *optional*: what became of each slide; `None` if the dataset was finished meanwhile.

    Raises:
        OSError: if a part cannot be written.
    """
    records: dict[str, PartRecord] = {}
    # The largest first, so that no worker is left with one at the end.
    open_tasks, waiting = sorted(tasks, key=_file_bytes, reverse=True), []
    has_said_so = False
    while open_tasks or waiting:
        waiting += _tile_free(open_tasks, num_workers, member, progress, records)
        open_tasks = []
        while waiting and not open_tasks:
            if is_finished():
                return None
            open_tasks, waiting = _look_after(waiting, member, progress, records)
            if waiting and not open_tasks:
                if not has_said_so:
                    logger.info("%d slides are in the hands of %s; waiting.", len(waiting), member.others())
                    has_said_so = True
                time.sleep(POLL_SECONDS)
    return records


def _file_bytes(task: SlideTask) -> int:
    return task.path.stat().st_size if task.path.is_file() else 0


def _tile_free(
    tasks: Sequence[SlideTask],
    num_workers: int | None,
    member: BuildMember,
    progress: BuildProgress,
    records: dict[str, PartRecord],
) -> list[SlideTask]:
    """Tiles those slides that nobody else is at, adds their records, and returns the others."""
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    taken = []
    results = run_in_workers(
        tile_in_worker,
        tasks,
        num_workers=min(num_workers, len(tasks)),
        initializer=prepare_worker,
        deadline_seconds=DEADLINE_SECONDS,
        memory_bytes=WORKER_MEMORY_BYTES,
    )
    for index, result in results:
        task = tasks[index]
        if isinstance(result, WorkerCrash):
            result = _refuse_crashed(task, result, member)
        if result is None:
            taken.append(task)
        else:
            records[task.slide_id] = result
            progress.add(result)
    return taken


def _refuse_crashed(task: SlideTask, crash: WorkerCrash, member: BuildMember) -> PartRecord:
    record = refuse_slide(task, crash.reason, str(crash))
    write_record(task.parts_dir, record)
    release_claim(task.parts_dir, task.slide_id, member.name)
    return record


def _look_after(
    tasks: Sequence[SlideTask], member: BuildMember, progress: BuildProgress, records: dict[str, PartRecord]
) -> tuple[list[SlideTask], list[SlideTask]]:
    """Adds the records of slides that others have done; returns those that are free now, and the rest."""
    free, rest = [], []
    for task in tasks:
        record = find_record(task.parts_dir, task.slide_id, task.key)
        if record is not None:
            records[task.slide_id] = record
            progress.add(record)
        else:
            (free if member.is_free(task.slide_id) else rest).append(task)
    return free, rest
