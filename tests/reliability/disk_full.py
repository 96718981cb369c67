# SPDX-License-Identifier: Apache-2.0
"""R5: builds on file systems that are too small, from a fifth of what is needed to three times as much.

A build must end with an error that says what is wrong and where, or be complete. With room made, the same command
must end with the files of an undisturbed build and nothing left over; and when a finished dataset is to be replaced
and there is no room, the error must come before the old one is touched, or a later build must mend it. Needs root,
for the file systems are real ones in memory (tmpfs).
"""

import contextlib
import os
import subprocess

from .build_kills import parquet_hashes, write_state
from .campaign import build, check, run_campaign


@contextlib.contextmanager
def small_disk(folder, num_bytes):
    """Mounts a file system of a size at a folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def needed_bytes(root, manifest):
    """The least size, up to a page, is not known; what the files take while parts are merged is a good measure."""
    build(manifest, root / "measure")
    return 2 * sum(path.stat().st_size for path in (root / "measure").rglob("*.parquet"))


def campaign(root, count, seed):
    manifests = [write_state(root / "cohort", state) for state in (0, 1)]
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(root / "cohort")], check=False).returncode:
        return {"cases": 0, "faults": 0, "skipped": "file systems can not be mounted here"}
    subprocess.run(["umount", str(root / "cohort")], check=True)
    expected = []
    for state, manifest in enumerate(manifests):
        build(manifest, root / f"reference-{state}")
        expected.append(parquet_hashes(root / f"reference-{state}"))
    needed, problems, num_full, num_nameless = needed_bytes(root, manifests[0]), [], 0, 0
    for number in range(count):
        share = 0.2 + 2.8 * number / max(1, count - 1)
        disk = root / f"disk-{number}"
        with small_disk(disk, int(needed * share)):
            for state, manifest in enumerate(manifests):
                error = build_on_full_disk(manifest, disk / "out", expected[state], f"{share:.2f}", problems)
                if error is not None:
                    num_full += 1
                    num_nameless += str(disk) not in str(error)
                    print(f"{share:.2f}: {error}", flush=True)
                    subprocess.run(["mount", "-o", f"remount,size={needed * 5}", str(disk)], check=True)
                    build(manifest, disk / "out")
                    check(problems, parquet_hashes(disk / "out") == expected[state], f"{share:.2f}: other files")
                    subprocess.run(["mount", "-o", f"remount,size={int(needed * share)}", str(disk)], check=False)
                left = [path.name for path in (disk / "out").rglob(".*")]
                check(problems, not left, f"{share:.2f}: left behind: {left}")
    return {
        "cases": 2 * count,
        "faults": len(problems),
        "disks_that_were_full": num_full,
        "errors_without_a_place": num_nameless,
    }


def build_on_full_disk(manifest, out, expected, share, problems):
    """Builds; returns the error if the disk was full, which must say so in one line."""
    try:
        summary = build(manifest, out)
    except OSError as error:
        text = str(error)
        check(
            problems,
            "no space left" in text.lower() and "\n" not in text,
            f"{share}: no clear error: {type(error).__name__}: {text}",
        )
        return error
    check(problems, summary.num_refused == 0, f"{share}: slides were refused for a full disk: {summary}")
    check(problems, parquet_hashes(out) == expected, f"{share}: other files")
    return None


if __name__ == "__main__":
    run_campaign(campaign, count=5, doc=__doc__)
