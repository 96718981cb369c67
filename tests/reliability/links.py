# SPDX-License-Identifier: Apache-2.0
"""H5: symbolic links where a build writes; none may lead it to change anything outside of its folder.

Each of the entries of a dataset's folder is in turn a link to a folder or a file elsewhere, before a build of new, of
changed and of unchanged slides. Then somebody makes links of temporary names as fast as possible while builds run.
Builds may fail then, and are counted. Links below the slides' folder are followed, on purpose: folders of links into
an archive are usual; they are read only.
"""

import os
import random
import shutil
import time

from .build_kills import write_state
from .campaign import build, check, run_campaign, tree

FOLDERS = (".parts", "previews", "slides", "tiles")
FILES = ("README.md", "refused.jsonl", "summary.json", "summary.md", "dre_slcl_dataset.json")
STATES = ("new", "changed", "unchanged")


def planted_links(root, manifests, problems):
    num_refused = 0
    for name in (*FOLDERS, *FILES):
        for state in STATES:
            case = root / f"{name}-{state}"
            victim, out = case / "victim", case / "out"
            victim.mkdir(parents=True)
            for file in ("s0.parquet", "s0.jpg", ".tmp-1-a", "train-00000-of-00001.parquet"):
                (victim / file).write_text("precious")
            (victim / "file").write_text("{}")
            out.mkdir()
            if state != "new":
                build(manifests[0], out)
            target = out / name
            if target.is_dir():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            target.symlink_to(victim if name in FOLDERS else victim / "file")
            (out / ".parts").exists() or (out / ".parts").mkdir()  # so that it looks like ours
            before = tree(victim)
            try:
                build(manifests[state == "changed"], out)
            except (ValueError, OSError):
                num_refused += 1
            check(problems, tree(victim) == before, f"{name}, {state}: changed through the link")
    return len((*FOLDERS, *FILES)) * len(STATES), num_refused


def races(root, manifest, count, seed, problems):
    """A child makes links of the names that temporary files have, at all places, while builds run."""
    chance = random.Random(seed)
    victim = root / "victim"
    victim.mkdir(parents=True)
    (victim / "file").write_text("precious")
    before, num_failed = tree(victim), 0
    for number in range(count):
        out = root / f"out-{number}"
        out.mkdir()
        meddler = os.fork()
        if not meddler:
            try:
                _meddle(out, victim, chance.random())
            finally:
                os._exit(0)
        try:
            build(manifest, out)
        except (ValueError, OSError):
            num_failed += 1
        finally:
            os.kill(meddler, 9)
            os.waitpid(meddler, 0)
        shutil.rmtree(out, ignore_errors=True)
    check(problems, tree(victim) == before, "a race led outside")
    return num_failed


def _meddle(out, victim, seed):
    chance = random.Random(seed)
    while True:
        folder = out / chance.choice([".", ".parts", "previews"])
        try:
            names = [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]
            guess = f".tmp-{os.getppid()}-{chance.getrandbits(32):08x}-{chance.choice(['s1.parquet', 'staging'])}"
            (folder / guess).symlink_to(victim if chance.random() < 0.5 else victim / "file")
            for name in names:  # what is there already is not replaced by a link, but hard enough to create beside
                (folder / f"{name}-{chance.random()}").symlink_to(victim / "file")
        except OSError:
            pass
        time.sleep(0.001)


def campaign(root, count, seed):
    manifests = [write_state(root / "cohort", state) for state in (0, 1)]
    problems = []
    num_planted, num_refused = planted_links(root / "planted", manifests, problems)
    num_failed = races(root / "races", manifests[0], count, seed, problems)
    figures = {"cases": num_planted + count, "faults": len(problems), "planted_links": num_planted}
    return figures | {"refused": num_refused, "races": count, "races_in_which_the_build_failed": num_failed}


if __name__ == "__main__":
    run_campaign(campaign, count=20, doc=__doc__)
