# SPDX-License-Identifier: Apache-2.0
"""R6: kills builds of a dataset at random times and starts them again, until done; then changes it and goes on.

Every round ends in a finished dataset, whose Parquet files must be those of an uninterrupted build, byte for byte. At
each kill the folder is looked at: a folder that counts as a finished dataset must be the old one or the new one,
whole. A slide whose part was finished before a kill must not be read again. Builds are forked from here, where all is
imported already. `--sabotage NAME` breaks the product in one way, to show that the campaign would notice.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Features  # noqa: F401 (imported before forking)

from dre_slcl.training import dataset_commit, slide_part
from dre_slcl.training.dataset_info import read_dataset_info
from modeling_dre_slcl import atomic_files

from . import campaign as shared
from .campaign import build, check, run_campaign
from .seed_slides import paint, write_tiff

NUM_SLIDES = 8
CHANGED = "s2"  # the slide that differs between the two states
KILLS_PER_STATE = 4


def write_state(folder, state):
    """Slides and manifest of one of two states of a cohort: in the second one slide and one report are others."""
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    lines = ["slide_id,path,case_id,report,split"]
    for i in range(NUM_SLIDES):
        name = f"s{i}-{state}" if f"s{i}" == CHANGED else f"s{i}"
        path = folder / "slides" / f"{name}.tif"
        if not path.exists():
            write_tiff(path, paint(i + 50 * ("-" in name) * state, 256))
        report = f"Report {i}{' corrected' * state * (i == 5)}"
        lines.append(f"s{i},slides/{name}.tif,c{i // 2},{report},{'train' if i < 6 else 'test'}")
    manifest = folder / f"manifest-{state}.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def parquet_hashes(out):
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("slides", "tiles")
        for path in sorted((out / folder).glob("*.parquet"))
    }


def start_build(manifest, out, reads, sabotage):
    """Forks a build; it appends each slide that it reads to the file `reads`. Returns the process id."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        tile = slide_part._tile

        def tile_and_tell(task):
            with reads.open("a") as handle:
                handle.write(task.slide_id + "\n")
            return tile(task)

        slide_part._tile = tile_and_tell
        SABOTAGES[sabotage]()
        build(manifest, out)
        status = 0
    finally:
        os._exit(status)


def finished_parts(out):
    """Slides whose parts are complete on the disk at this moment."""
    found = set()
    for path in (out / ".parts").glob("*.json"):
        with contextlib.suppress(ValueError):
            content = atomic_files.read_json(path)
            table = path.with_suffix(".parquet")
            if table.is_file() and table.stat().st_size == content["table_bytes"]:
                found.add((path.stem, content["key"]))
    return found


def is_torn(out, allowed, *, trusts_declaration):
    """Whether a folder that says it is finished holds anything but one of the allowed sets of files."""
    if trusts_declaration:
        return (out / dataset_commit.DATASET_INFO_NAME).is_file() and parquet_hashes(out) not in allowed
    try:
        read_dataset_info(out)
    except ValueError:
        return False
    return parquet_hashes(out) not in allowed


def duplicate_rows(out):
    rows = []
    for path in sorted((out / "tiles").glob("*.parquet")):
        table = pq.read_table(path, columns=["slide_id", "tile_index"])
        rows += zip(table["slide_id"].to_pylist(), table["tile_index"].to_pylist(), strict=True)
    return len(rows) - len(set(rows))


def campaign(root, count, seed, sabotage=None):
    manifests = [write_state(root / "cohort", state) for state in (0, 1)]
    expected, length = [], 0.0
    for state, manifest in enumerate(manifests):
        begin = time.monotonic()
        os.waitpid(start_build(manifest, root / f"reference-{state}", root / "reads-reference", None), 0)
        length = time.monotonic() - begin
        expected.append(parquet_hashes(root / f"reference-{state}"))
    if not all(expected) or expected[0] == expected[1]:
        raise RuntimeError((root / "reference-0.log").read_text()[-2000:])
    chance, problems = random.Random(seed), []
    names = ("kills", "kills_in_exchange", "finished_builds", "mixed", "duplicate_rows", "read_again", "failed")
    figures = dict.fromkeys((*names, "left_behind"), 0)
    out, reads, state = root / "out", root / "reads", 0
    while figures["kills"] < count and len(problems) < 5:
        kills_left = KILLS_PER_STATE
        while True:
            before = finished_parts(out)
            reads.write_text("")
            process = start_build(manifests[state], out, reads, sabotage)
            if kills_left:
                time.sleep(chance.uniform(0.01, 1.0) * length)
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            read = set(reads.read_text().split())
            again = {name for name, key in before if name in read and key_is(out, name, key)}
            again |= read - {CHANGED} if state else set()  # all others are in the dataset of the first state
            figures["read_again"] += len(again)
            check(problems, not again, f"read again: {sorted(again)}")
            if not os.WIFSIGNALED(status):
                break
            figures["kills"] += 1
            kills_left -= 1
            in_exchange = (out / ".parts").is_dir() and bool(list(out.glob(".tmp-*")))
            figures["kills_in_exchange"] += in_exchange
            torn = is_torn(out, expected, trusts_declaration=sabotage == "declare_during_exchange")
            figures["mixed"] += torn
            check(problems, not torn, "a folder that counts as finished holds other files")
        if os.WEXITSTATUS(status):
            figures["failed"] += 1
            check(problems, False, out.with_suffix(".log").read_text()[-1000:])
            break
        figures["finished_builds"] += 1
        is_mixed = parquet_hashes(out) != expected[state]
        figures["mixed"] += is_mixed
        check(problems, not is_mixed, "a finished dataset differs from the uninterrupted one")
        figures["duplicate_rows"] += duplicate_rows(out)
        leftover = [path.name for path in out.rglob(".*")]
        figures["left_behind"] += len(leftover)
        check(problems, not leftover, f"left behind: {leftover}")
        if state:
            shutil.rmtree(out)
        state = 1 - state
    check(problems, not figures["duplicate_rows"], "duplicate rows")
    return {"cases": figures.pop("kills"), "faults": len(problems), **figures}


def key_is(out, name, key):
    """Whether the part of a slide that was read anew has the same key as before, so that it need not have been."""
    path = out / ".parts" / f"{name}.json"
    return path.is_file() and atomic_files.read_json(path)["key"] == key


def _declare_during_exchange():
    """The file that declares the dataset finished stays, its sizes are not looked at, and the exchange is slow."""
    rename = Path.replace

    def rename_slowly(self, target):
        if self.parent.name in {"slides", "tiles"} and self.parent.parent.name.endswith("-staging"):
            time.sleep(0.1)
        return rename(self, target)

    Path.replace = rename_slowly
    dataset_commit._set_info_aside = lambda staging, out_dir, build_key: True


def _restore_any():
    """Tiles of the old dataset are taken over although the slide is another one."""
    restore = shared.build_module.restore_parts

    def restore_parts(out_dir, tasks, parameters):
        old = shared.slide_rows(out_dir)
        given = [replace(task, fingerprint=old[task.slide_id]["fingerprint"]) for task in tasks if old]
        return restore(out_dir, given, parameters)

    shared.build_module.restore_parts = restore_parts


def _forget_parts():
    shared.build_module.find_part = slide_part.find_record = lambda parts_dir, slide_id, key: None


def _leave_temporary_files():
    shared.build_module._clean_up = lambda leftovers, tasks, member: None


SABOTAGES = {
    None: lambda: None,
    "declare_during_exchange": _declare_during_exchange,
    "restore_any": _restore_any,
    "forget_parts": _forget_parts,
    "leave_temporary_files": _leave_temporary_files,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--sabotage", choices=[name for name in SABOTAGES if name])
    known, sys.argv[1:] = parser.parse_known_args()
    run_campaign(lambda *values: campaign(*values, known.sabotage), count=100, doc=__doc__)
