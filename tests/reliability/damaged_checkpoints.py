# SPDX-License-Identifier: Apache-2.0
"""R8: a flipped bit or a cut anywhere in the newest checkpoint: the one before is used, and both are named.

Places are spread over all files, so that small ones, such as the manifest, are met as often as large ones. Each must
be detected; files that are missing, empty or longer as well. From some of them training goes on, to the end of an
undisturbed run.
"""

import random
import shutil
from pathlib import Path

from . import training_runs as runs
from .campaign import check, run_campaign, tree

NUM_RESUMES = 4
WAYS = ("bit", "cut", "bit", "cut", "missing", "empty", "longer")


def damage(file, way, chance):
    """Damages a file in one way; returns what was done to which."""
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    if way == "bit":
        content[place] ^= 1 << chance.randrange(8)
    elif way in ("cut", "empty"):
        del content[place if way == "cut" else 0 :]
    elif way == "longer":
        content += b"\0"
    file.unlink()  # another checkpoint may hold the same file by a hard link
    if way != "missing":
        file.write_bytes(content)
    return f"{file.name}: {way} at {place}"


def go_on(settings, pristine, text, expected, problems):
    """Trains again with a damaged newest checkpoint."""
    output_dir, newest = Path(settings["output_dir"]), runs.checkpoints(settings)[-1]
    older = runs.checkpoints(settings)[-2]
    Path(f"{output_dir}.log").unlink()
    status = runs.run(settings)
    log = runs.log_of(settings)
    check(problems, status == 0, f"{text}: status {status}: {log[-1000:]}")
    check(problems, newest.name in log and older.name in log, f"{text}: the log does not name both: {log[-1000:]}")
    check(problems, status or runs.digest(settings) == expected, f"{text}: another end than without damage")
    shutil.rmtree(output_dir)
    shutil.copytree(pristine, output_dir)


def campaign(root, count, seed):
    settings, problems = runs.prepare(root, keep_checkpoints=2, num_steps=4, finalize_steps=0), []
    expected, chance, detected = runs.expect_success(settings), random.Random(seed), 0
    output_dir, pristine = Path(settings["output_dir"]), root / "pristine"
    shutil.copytree(output_dir, pristine)
    newest, steps = runs.checkpoints(settings)[-1], runs.valid_steps(settings)
    files, resume_every = sorted(path for path in newest.iterdir() if path.is_file()), max(1, count // NUM_RESUMES)
    undamaged = tree(newest)
    for index in range(count):
        file = files[index % len(files)]
        text = damage(file, WAYS[(index // len(files)) % len(WAYS)], chance)
        valid = runs.valid_steps(settings)
        is_found = valid == steps[:-1]
        detected += is_found
        check(problems, is_found, f"{text}: valid are {valid} of {steps}")
        if index % resume_every == resume_every // 2:
            go_on(settings, pristine, text, expected, problems)
        elif file.exists():
            file.unlink()
        shutil.copy2(pristine / "checkpoints" / newest.name / file.name, file)
    check(problems, tree(newest) == undamaged and runs.valid_steps(settings) == steps, "the campaign left damage")
    figures = {"cases": count, "faults": len(problems), "detected": detected, "files": len(files)}
    num_resumed = len(range(resume_every // 2, count, resume_every))
    return figures | {"loaded_silently": count - detected, "resumed": num_resumed}


if __name__ == "__main__":
    run_campaign(campaign, count=300, doc=__doc__)
