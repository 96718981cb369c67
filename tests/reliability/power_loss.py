# SPDX-License-Identifier: Apache-2.0
"""R4: what a loss of power leaves of a training run, by a model of a disk that keeps no promise but `fsync`.

All that a run does to files is recorded. Then the power is lost at a random moment: of the names made, changed and
removed before it, those in folders that were not synced since are dropped at random, one by one; a file that was not
synced since it was written holds all, half or nothing. The folder is rebuilt from what is left. It must hold the
newest checkpoint whose save had returned, or a later one, with the bits that were saved, and the metrics up to it;
nothing torn may be taken. Training goes on from one state in a hundred, to the end of an undisturbed run.
`--sabotage` has nothing synced, to show that the campaign would notice.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

from dre_slcl.training import checkpoint
from modeling_dre_slcl import atomic_files

from . import file_events
from . import training_runs as runs
from .campaign import check, run_campaign, tree

NUM_LANES = 2
STATES_PER_RESUME = 100


class Recorder:
    """Writes `events.jsonl`: what was done to which inode, with copies of contents, named by their event."""

    def __init__(self, root, copies):
        self.root, self.copies, self.events, self.opened = root, copies, [], {}
        copies.mkdir()
        file_events.watch(root, self.tell)
        runs.after(checkpoint.CheckpointFolder, "save", lambda folder, result: self.saved(folder))
        runs.after(runs.Trainer, "run", lambda trainer, result: self.write())

    def tell(self, what, path, target):
        self._look_at_created()
        name, inode = str(path), path.lstat().st_ino if path.is_symlink() or path.exists() else None
        folder = path.parent.lstat().st_ino
        if what == "mkdir":
            self.opened[name] = "mkdir"
        elif what in ("create", "written"):
            # A file of the same name keeps its inode if it is only opened; the writer of safetensors makes a new one.
            self.opened[name] = "file"
        elif what in ("rename", "link"):
            new_folder = target.parent.lstat().st_ino
            self.events.append([what, folder, path.name, inode, new_folder, target.name])
        elif what in ("unlink", "rmdir") and inode is not None:
            self.events.append(["unlink", folder, path.name, inode])
        elif what == "fsync":
            self.events.append(["sync", inode, self._copy(path)])
        elif what == "symlink":
            raise RuntimeError(f"{path}: symbolic links are not part of this model of a disk.")

    def saved(self, folder):
        self._look_at_created()
        newest = max(folder.folder.glob("step-*"))
        self.events.append(["saved", runs.step_of(newest)])

    def write(self):
        self._look_at_created()
        (self.copies / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events))

    def _look_at_created(self):
        """Notes what the last event made, which is there only now."""
        for name, kind in self.opened.items():
            path = Path(name)
            if path.exists():
                entry = [kind, path.parent.stat().st_ino, path.name, path.stat().st_ino]
                self.events.append([*entry, self._copy(path)])
        self.opened = {}

    def _copy(self, path):
        """Copies a file's content; returns its name, or `None` for a folder."""
        if not path.is_file():
            return None
        name = str(len(self.events))
        (self.copies / name).write_bytes(path.read_bytes())
        return name


def lose_power(events, moment, chance):
    """Returns the inodes of folders `{inode: {name: inode}}` and of files `{inode: copy or (copy, share)}`."""
    synced_later, synced = [False] * moment, set()
    for index in range(moment - 1, -1, -1):
        what, first, *_ = events[index]
        if what == "sync":
            synced.add(first)
        elif what != "saved":
            synced_later[index] = first in synced and (what != "rename" or events[index][4] in synced)
    folders, files = {}, {}
    for index, (what, folder, *rest) in enumerate(events[:moment]):
        if what == "sync":
            if rest[0] is not None:
                files[folder] = (rest[0], 1.0)
            continue
        if what == "saved" or not (synced_later[index] or chance.random() < 0.5):
            if what == "file":
                files.setdefault(rest[1], (rest[2], 0.0))
            continue
        names = folders.setdefault(folder, {})
        if what in ("mkdir", "file"):
            names[rest[0]] = rest[1]
        elif what in ("rename", "link"):
            if what == "rename":
                names.pop(rest[0], None)
            folders.setdefault(rest[2], {})[rest[3]] = rest[1]
        elif names.get(rest[0]) == rest[1]:
            names.pop(rest[0])
        if what == "mkdir":
            folders.setdefault(rest[1], {})
        elif what == "file":
            # A file that was opened again was added to: what it held before stays.
            files[rest[1]] = files.get(rest[1], (rest[2], chance.choice([0.0, 0.5, 1.0])))
    return folders, files


def rebuild(folder, inode, folders, files, copies):
    """Writes what can be reached from a folder."""
    folder.mkdir()
    for name, child in folders.get(inode, {}).items():
        if child in folders:
            rebuild(folder / name, child, folders, files, copies)
        elif child in files:
            copy, share = files[child]
            content = (copies / copy).read_bytes()
            (folder / name).write_bytes(content[: int(len(content) * share)])


def look_at(settings, events, moment, saved_files, problems):
    """Checks one state of a disk; returns the step of the newest valid checkpoint."""
    promised = max((event[1] for event in events[:moment] if event[0] == "saved"), default=-1)
    valid = runs.valid_steps(settings)
    newest, where = max(valid, default=-1), f"power lost after event {moment}"
    check(problems, newest >= promised, f"{where}: checkpoint {promised} was saved, valid are {valid}")
    if newest >= 0:
        found = tree(next(path for path in runs.checkpoints(settings) if runs.step_of(path) == newest))
        check(problems, found == saved_files[newest], f"{where}: checkpoint {newest} holds other files")
        steps = [row["step"] for row in runs.metrics_of(settings) if row["step"] <= newest]
        check(problems, steps == list(range(1, newest + 1)), f"{where}: checkpoint {newest}, but metrics of {steps}")
    return newest


def record(settings, sabotage):
    """Runs with a recorder; returns the digest at the end, the events, and the files of each checkpoint."""
    root = Path(settings["output_dir"]).parent

    def patch():
        if sabotage:
            runs.replace_everywhere(atomic_files.sync_path, lambda path: None)
        Recorder(root, root.with_name("copies"))
        runs.after(checkpoint.CheckpointFolder, "save", keep_files)

    def keep_files(folder, result):
        path = max(folder.folder.glob("step-*"))
        with root.with_name("saved.jsonl").open("a") as handle:
            handle.write(json.dumps([runs.step_of(path), tree(path)]) + "\n")

    expected = runs.expect_success(settings, patch)
    saved = [json.loads(line) for line in root.with_name("saved.jsonl").read_text().splitlines()]
    lines = (root.with_name("copies") / "events.jsonl").read_text().splitlines()
    return expected, [json.loads(line) for line in lines], dict(map(tuple, saved))


def campaign(root, count, seed, sabotage=False):
    settings = runs.prepare(root, keep_checkpoints=1, num_steps=4, finalize_steps=0)
    settings["output_dir"] = str(root / "disk" / "out")
    (root / "disk").mkdir()
    expected, events, saved_files = record(settings, sabotage)
    inode = (root / "disk").stat().st_ino
    first = next(index for index, event in enumerate(events) if event[0] == "saved")

    def lane(number):
        chance, problems, seen, resumed = random.Random(seed * NUM_LANES + number), [], {}, 0
        mine = settings | {"output_dir": str(root / f"state-{number}" / "out")}
        for index in range(number, count, NUM_LANES):
            if len(problems) > 5:
                break
            moment = chance.randint(first if index % 4 else 1, len(events))
            folders, files = lose_power(events, moment, chance)
            shutil.rmtree(root / f"state-{number}", ignore_errors=True)
            rebuild(root / f"state-{number}", inode, folders, files, root / "copies")
            newest = look_at(mine, events, moment, saved_files, problems)
            seen[newest] = seen.get(newest, 0) + 1
            if index % STATES_PER_RESUME == number:
                resumed += 1
                Path(mine["output_dir"]).mkdir(exist_ok=True)
                status = runs.run(mine)
                is_same = status == 0 and runs.digest(mine) == expected
                check(problems, is_same, f"after event {moment}: status {status}, {runs.log_of(mine)[-500:]}")
        return problems, seen, resumed

    lanes = runs.share_out(lane, range(NUM_LANES))
    newest = {}
    for _, seen, _ in lanes:
        for step, number in seen.items():
            newest[step] = newest.get(step, 0) + number
    faults = sum(len(problems) for problems, _, _ in lanes)
    figures = {"cases": count, "faults": faults, "file_operations": len(events)}
    figures["newest_checkpoint"] = {f"step {step}": newest[step] for step in sorted(newest, key=int)}
    return figures | {"resumed": sum(resumed for *_, resumed in lanes)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--sabotage", action="store_true")
    known, sys.argv[1:] = parser.parse_known_args()
    run_campaign(lambda *values: campaign(*values, known.sabotage), count=500, doc=__doc__)
