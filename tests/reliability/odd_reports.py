# SPDX-License-Identifier: Apache-2.0
"""H9: reports that are missing, empty, a megabyte long, with NUL, in HTML or in another encoding, among good ones.

Training must come to its end. Slides without a report are counted and left out, those whose report is cut are
counted; an empty one never gets an encoding. What is left must be encoded as it stands: two reports that differ in one
sign have two places in the cache.
"""

import random

import pyarrow as pa
import pyarrow.parquet as pq

from dre_slcl.training.reports import _cache_path

from . import training_runs as runs
from .campaign import check, run_campaign

MISSING = {"missing": None, "empty": "", "white space": " \n\t\u00a0"}
ODD = {
    "long": "grade high " * 95_000,
    "NUL": "grade\0 high",
    "HTML": "<html><body><p>grade &amp; high</p><script>alert(1)</script></body></html>",
    "Latin-1 read as UTF-8": "Gro\ufffde Tumorzellen",
    "UTF-8 read as Latin-1": "GroÃŸe Tumorzellen",
    "right to left": "\u202egrade \u05d3\u05e8\u05d2\u05d4\u202c",
    "joined and split signs": "grade\u0301 gradé",
    "beyond 16 bits": "grade \U0001f52c high",
}


def write_reports(dataset, reports, chance):
    """Gives some slides these reports; returns how many slides have none, and the reports of the others."""
    path = min((dataset / "slides").glob("*.parquet"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row, report in zip(chance.sample(rows, len(reports)), reports.values(), strict=True):
        row["report"] = report
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    usable = [row["report"] for row in rows if (row["report"] or "").strip()]
    return len(rows) - len(usable), usable


def campaign(root, count, seed):
    settings, problems = runs.prepare(root, num_steps=2, finalize_steps=0, codebook_refits=[], slides_per_batch=2), []
    counted = 0
    for index in range(count):
        mine = settings | {"output_dir": str(root / f"out-{index}"), "dataset": str(root / f"data-{index}")}
        runs.tiny_dataset.write_dataset(root / f"data-{index}")
        reports = (MISSING, ODD)[index % 2] if count > 1 else MISSING | ODD
        num_missing, usable = write_reports(root / f"data-{index}", reports, random.Random(seed + index))
        status = runs.run(mine)
        log = runs.log_of(mine)
        text = f"{list(reports)}: {log[-1500:]}"
        check(problems, status == 0, f"status {status}: {text}")
        counted += num_missing
        is_counted = not num_missing or f"{num_missing} of 12 slides have no report and are left out" in log
        check(problems, is_counted, f"missing ones are not counted: {text}")
        check(problems, "long" not in reports or "1 of" in log, f"the cut one is not counted: {text}")
        cache = root / f"out-{index}" / "report_cache"
        stored = {path.name for path in cache.rglob("*.safetensors")}
        expected = {_cache_path(cache, report).name for report in usable}
        check(problems, stored == expected, f"{len(stored)} encodings of {len(expected)} reports: {text}")
    return {"cases": count * len(MISSING | ODD), "faults": len(problems), "left_out": counted}


if __name__ == "__main__":
    run_campaign(campaign, count=1, doc=__doc__)
