# SPDX-License-Identifier: Apache-2.0
"""`make reliability`: runs every campaign with its large count and prints a table; `--counts default` the usual ones.

`--write FILE` puts the table, with date, commit and hardware, between the two marks of that kind in a Markdown file.
"""

import argparse
import datetime as dt
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Campaign -> (requirements, what it does, default count, large count); a count of None: there is only one.
CAMPAIGNS = {
    "slide_fuzz": ("S1", "random damage to six kinds of slides, among good ones", 2_000, 50_000),
    "malformed_slides": ("S2", "slides that are wrong in one known way, each with its reason code", None, None),
    "bombs": ("S3, H4", "small files that ask for gigabytes or hours", None, None),
    "odd_slides": ("S4-S7", "bad slides among good ones, odd resolutions, odd tissue, what is no file", None, None),
    "hostile_names": ("H1, H2, H6, H8", "ids, paths, cells and names that try to escape; same slides", None, None),
    "links": ("H5", "symbolic links where a build writes", 20, 100),
    "patient_data": ("H11", "strings planted in vendors' metadata", None, None),
    "memory": ("M1, M2", "slides of 10,000 and 200,000 px; 200 slides in one worker", 200, 200),
    "disk_full": ("R5", "builds on disks that are too small", 5, 25),
    "build_kills": ("R6", "SIGKILL while building", 100, 500),
    "train_kills": ("R1, R7", "SIGKILL while training", 100, 2_000),
    "train_sabotages": ("R2", "training broken on purpose: kills until that is noticed", 20, None),
    "crash_points": ("R3", "an end before and after each file operation of a save; training goes on", 10, 1_000),
    "power_loss": ("R4", "loss of power while training: what was not synced is dropped at random", 500, 5_000),
    "train_disk_full": ("R5", "training on disks that are too small, up to the final model", 5, 25),
    "damaged_checkpoints": ("R8", "a flipped bit, a cut, a missing file in a checkpoint", 300, 2_000),
    "train_signals": ("R10", "SIGTERM and SIGINT while training, once and twice", 20, 100),
    "determinism": ("R12", "the same training in processes that differ in what must not matter", 3, 6),
    "pickles": ("H3", "pickles in every form wherever training reads a file", 30, 1_000),
    "not_finite": ("H7", "NaN and infinity in pixels, bank, reports and gradients", 40, 100),
    "odd_reports": ("H9", "reports that are missing, empty, huge, or not what they seem", 1, None),
    "train_memory": ("M3, M4", "memory of the bank, and of a slide of 100 and 10,000 tiles", 10_000, None),
    "several_writers": ("R11", "two and eight builds in one folder, the one that got it killed", 5, 50),
}


def run(name, count=None, *options):
    """Runs a campaign in a fresh process; returns its figures, and the process for what it printed."""
    command = [sys.executable, "-m", f"tests.reliability.{name}", *options]
    command += [] if count is None else ["--count", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1]), done
    except (IndexError, ValueError):
        raise RuntimeError(f"{name} ended with status {done.returncode}: {done.stdout}{done.stderr}"[-4000:]) from None


def run_together(counts):
    """Runs campaigns of training, name -> count, in one process; returns the figures of each, and what was printed."""
    command = [sys.executable, "-m", "tests.reliability.together", *(f"{name}={n}" for name, n in counts.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {figures.pop("name"): figures for figures in lines}, done.stdout + done.stderr[-3000:]


def describe_machine():
    """One line about where and on what the figures were made."""
    cpus = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [platform.processor()]
    gigabytes = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    num_cores = len(os.sched_getaffinity(0))
    return (
        f"{dt.date.today().isoformat()}, commit {commit.stdout.strip()}, {num_cores} core{'s' * (num_cores > 1)} of "
        f"{cpus[0]}, {gigabytes} GiB, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"OpenSlide {metadata.version('openslide-bin')}"
    )


def table_row(name, figures, count):
    requirements, text, *_ = CAMPAIGNS[name]
    others = {key: value for key, value in figures.items() if key not in ("cases", "faults", "seconds")}
    shown = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in others.items())
    command = f"`{name}`" if count is None else f"`{name} --count {count}`"
    cells = (requirements, text, f"{figures['cases']:,}", figures["faults"], shown, figures["seconds"], command)
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _plain(value):
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:,}" for key, number in value.items()) or "0"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def write_between_marks(path, kind, text):
    """Replaces what stands between `<!-- KIND -->` and `<!-- /KIND -->`."""
    content = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {kind} -->\n).*?(<!-- /{kind} -->)", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{path}: expected the marks <!-- {kind} --> and <!-- /{kind} -->.")
    path.write_text(pattern.sub(lambda found: found[1] + text + found[2], content), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", choices=("default", "large"), default="large")
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS))
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    header = "| | what | cases | faults | figures | s | campaign |\n| --- | --- | --- | --- | --- | --- | --- |"
    lines, num_faults, machine = [header], 0, describe_machine()
    print(header)
    for name in arguments.only:
        count = CAMPAIGNS[name][2 if arguments.counts == "default" else 3]
        figures, done = run(name, count)
        num_faults += figures["faults"]
        lines.append(table_row(name, figures, count))
        print(lines[-1], flush=True)
        if figures["faults"]:
            print(done.stdout[-3000:], file=sys.stderr)
    if arguments.write:
        text = "\n".join([f"{machine}.", "", *lines, ""])
        write_between_marks(arguments.write, arguments.counts, text)
    sys.exit(1 if num_faults else 0)


if __name__ == "__main__":
    main()
