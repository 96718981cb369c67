# SPDX-License-Identifier: Apache-2.0
"""Writes a synthetic cohort of slides and reports to a folder, with the manifest that everything else starts from.

    OUT/manifest.csv         slide_id, path (relative to OUT), case_id, subtype, split, report
    OUT/cohort.json          seed and painter of the slides in the folder
    OUT/slides/<id>.svs      pyramidal slides at 1, 2 and 4 um/px

A slide is a function of (seed, slide_id): a larger cohort of the same seed begins with the smaller one, and a run that
was interrupted continues. Cases come in blocks with one case of each subtype; a block lies wholly in one split.
"""

import csv
import io
import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2

from .report_writer import SUBTYPES, write_report
from .slide_writer import encode_slide
from .tissue_painter import PAINTER_VERSION, SLIDE_MPP, CaseTraits, paint_slide, random_stream

MANIFEST_COLUMNS = ("slide_id", "path", "case_id", "subtype", "split", "report")
_NUM_COMBINATIONS = 8  # of lymphocytes, necrosis and mucin

# `modeling_dre_slcl.atomic_files` is imported in the functions that use it: the painting processes import this module,
# and the model package brings torch, which takes each of them seconds to load.

logger = logging.getLogger(__name__)


def write_cohort(
    out_dir: str | Path,
    *,
    num_cases_per_subtype: int = 10,
    slides_per_case: int = 2,
    seed: int = 0,
    num_workers: int = 2,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    side_range_px: tuple[int, int] = (1536, 2048),
) -> Path:
    """Writes slides, reports and manifest; slides that an earlier run with the same settings finished are kept.

    With `num_workers` above 1 new processes import the calling script: call this below `if __name__ == "__main__"`.

    Args:
        out_dir (`str` or `Path`): the folder.
        num_cases_per_subtype (`int`, *optional*, defaults to 10): cases of each of the three subtypes.
        slides_per_case (`int`, *optional*, defaults to 2): slides of a case; they share its report.
        seed (`int`, *optional*, defaults to 0): everything is a function of it.
        num_workers (`int`, *optional*, defaults to 2): processes; the result does not depend on it.
        val_fraction (`float`, *optional*, defaults to 0.2): share of the cases for validation, at least one block.
        test_fraction (`float`, *optional*, defaults to 0.2): share of the cases for the test, at least one block.
        side_range_px (`tuple[int, int]`, *optional*, defaults to `(1536, 2048)`): range of slide sides at 1 um/px.

    Returns:
        `Path`: manifest.csv.

    Raises:
        ValueError: if a number is out of range or no case would be left for training.
    """
    from modeling_dre_slcl.atomic_files import write_text

    if min(num_cases_per_subtype, slides_per_case, num_workers) < 1:
        raise ValueError(
            "num_cases_per_subtype, slides_per_case, num_workers: expected at least 1 each, found "
            f"{num_cases_per_subtype}, {slides_per_case}, {num_workers}."
        )
    out_dir = Path(out_dir)
    cases = make_cases(num_cases_per_subtype, seed=seed)
    splits = split_blocks(num_cases_per_subtype, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    rows, jobs = [], []
    for index, case in enumerate(cases):
        report = write_report(case, seed=seed)
        for number in range(1, slides_per_case + 1):
            slide_id = f"{case.case_id}-s{number}"
            path = f"slides/{slide_id}.svs"
            rows.append((slide_id, path, case.case_id, case.subtype, splits[index // len(SUBTYPES)], report))
            jobs.append((out_dir / path, case, slide_id, seed, side_range_px))
    _write_slides(out_dir, jobs, seed=seed, side_range_px=side_range_px, num_workers=num_workers)
    write_text(out_dir / "manifest.csv", _to_csv(rows))
    logger.info("Cohort of %d slides of %d cases in %s", len(rows), len(cases), out_dir)
    return out_dir / "manifest.csv"


def make_cases(num_cases_per_subtype: int, *, seed: int) -> list[CaseTraits]:
    """Returns the cases in blocks of one per subtype, in random order within the block.

    Within each subtype every combination of lymphocytes, necrosis and mucin comes once per eight cases, and nuclear
    grades take turns, so that no trait gives a subtype away.

    Args:
        num_cases_per_subtype (`int`): number of blocks.
        seed (`int`): seed of the cohort.

    Returns:
        `list[CaseTraits]`: three times `num_cases_per_subtype` cases; ids do not tell the subtype.
    """
    cases = []
    for block in range(num_cases_per_subtype):
        for subtype in random_stream(seed, "block", str(block)).permutation(sorted(SUBTYPES)).tolist():
            cycle, position = divmod(block, _NUM_COMBINATIONS)
            order = random_stream(seed, "traits", subtype, str(cycle)).permutation(_NUM_COMBINATIONS)
            bits = int(order[position])
            offset = sorted(SUBTYPES).index(subtype)
            case_id = f"case-{len(cases) + 1:03d}"
            grade = (block + offset) % 3 + 1
            cases.append(CaseTraits(case_id, subtype, bool(bits & 1), bool(bits & 2), bool(bits & 4), grade))
    return cases


def split_blocks(num_blocks: int, *, val_fraction: float, test_fraction: float, seed: int) -> list[str]:
    """Returns the split of every block of cases; a fraction above 0 gets at least one block.

    Raises:
        ValueError: if a fraction is negative or no block is left for training.
    """
    counts = [0 if share == 0 else max(1, round(share * num_blocks)) for share in (val_fraction, test_fraction)]
    if min(val_fraction, test_fraction) < 0 or sum(counts) >= num_blocks:
        raise ValueError(
            f"val_fraction, test_fraction: expected shares of {num_blocks} cases per subtype that leave one for "
            f"training, found {val_fraction} and {test_fraction}. Take more cases or smaller shares."
        )
    splits = ["val"] * counts[0] + ["test"] * counts[1] + ["train"] * (num_blocks - sum(counts))
    return random_stream(seed, "split", str(num_blocks)).permutation(splits).tolist()


def _write_slides(
    out_dir: Path, jobs: list[tuple], *, seed: int, side_range_px: tuple[int, int], num_workers: int
) -> None:
    """Writes the missing slides; all of them, if those on disk were painted with other settings."""
    from modeling_dre_slcl.atomic_files import atomic_file, read_json, write_json

    settings = {"painter_version": PAINTER_VERSION, "seed": seed, "side_range_px": list(side_range_px)}
    settings_path = out_dir / "cohort.json"
    if not (settings_path.is_file() and read_json(settings_path) == settings):
        # Removed first: a run killed in between must not take old slides for new ones.
        for path in [out_dir / "manifest.csv", *(out_dir / "slides").glob("case-*.svs")]:
            path.unlink(missing_ok=True)
        write_json(settings_path, settings)
    missing = [job for job in jobs if not job[0].is_file()]
    for (path, *_), data in zip(missing, _encode_all(missing, num_workers), strict=True):
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)


def _encode_all(jobs: list[tuple], num_workers: int) -> Iterator[bytes]:
    """Yields the file content of every job, in order."""
    if num_workers == 1 or len(jobs) < 2:
        yield from map(_encode_one, jobs)
        return
    # Spawned, not forked: a fork of a process with running threads (torch, OpenCV) can hang.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_encode_one, jobs, chunksize=2)


def _encode_one(job: tuple[Path, CaseTraits, str, int, tuple[int, int]]) -> bytes:
    _, case, slide_id, seed, side_range_px = job
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the processes already use every core
    try:
        return encode_slide(paint_slide(case, slide_id, seed=seed, side_range_px=side_range_px), mpp=SLIDE_MPP)
    finally:
        cv2.setNumThreads(num_threads)


def _to_csv(rows: list[tuple[str, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(MANIFEST_COLUMNS)
    writer.writerows(rows)
    return text.getvalue()
