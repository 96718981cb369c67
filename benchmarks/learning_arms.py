# SPDX-License-Identifier: Apache-2.0
"""The arms of `benchmarks.learning`, by name, and how one is run."""

import json
import resource
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import learning_baselines as baselines
from benchmarks.learning_engine import SETTINGS, train_with_engine
from benchmarks.learning_scores import Cohort, score
from modeling_dre_slcl.atomic_files import read_json, write_json

SSL_STEPS = 100
# Each is trained for as many tiles more than the one before as end-to-end training sees.
STARTS = ("ssl", "ssl_long", "ssl_longer")


@dataclass(frozen=True)
class Arm:
    """One way to come to slide embeddings.

    Args:
        kind (`str`): `"engine"`, `"end_to_end"` (ABMIL) or `"frozen"`.
        start (`str`): the tile encoder's weights: `"random"`, `"ssl"` (self-supervised), `"ssl_long"` (as long as
            self-supervision and end-to-end training together), or `"ssl_longer"` (as long as `"ssl_long"` and
            end-to-end training together).
        settings (`dict`): what differs from `SETTINGS`; of a frozen arm `pooling`, `num_steps` and `learning_rate`.
        supervision (`str`): `"reports"`, `"labels"` or `"none"`.
        changed (`str`, *optional*): as in `train_with_engine`.
    """

    kind: str
    start: str = "ssl"
    settings: dict[str, Any] = field(default_factory=dict)
    supervision: str = "reports"
    changed: str | None = None

    def varied(self, name: str, value: Any) -> "Arm":
        """The same arm with another value of a setting."""
        return Arm(self.kind, self.start, self.settings | {name: value}, self.supervision, self.changed)


def _engine(changed: str | None = None, start: str = "ssl", **settings: Any) -> Arm:
    return Arm("engine", start, settings, changed=changed)


def _steps_for(tiles_per_slide: int) -> dict[str, int]:
    """As many tiles with gradient as by default, in steps of another size."""
    num_steps = SETTINGS["num_steps"] * SETTINGS["tiles_per_slide"] // tiles_per_slide
    return {"tiles_per_slide": tiles_per_slide, "num_steps": num_steps, "retrieved_per_slide": 4 * tiles_per_slide}


def _frozen(start: str, pooling: str, supervision: str, **settings: Any) -> Arm:
    return Arm("frozen", start, {"pooling": pooling, **settings}, supervision)


_LABELS = {"objective": "labels", "label_columns": ["subtype"]}
_HEAD = {"num_steps": 600, "learning_rate": 1e-3}
_LONG_HEAD = {"num_steps": 1500, "learning_rate": 3e-4}
_FROZEN_HEAD = {"train_tile_encoder": False, "num_steps": 1}
ARMS: dict[str, Arm] = {
    "dre_full": _engine(bank_mode="full"),
    "no_bank": _engine(bank_mode="paper", retrieved_per_slide=0),
    "frozen_ssl_mean": _frozen("ssl", "mean", "none"),
    "frozen_ssl_mean_reports": _frozen("ssl", "mean", "reports", **_HEAD),
    "frozen_ssl_abmil_reports": _frozen("ssl", "attention", "reports", **_HEAD),
    "frozen_ssl_abmil_labels": _frozen("ssl", "attention", "labels", **_LONG_HEAD),
    "frozen_ssl_residual": _engine(**_FROZEN_HEAD),
    "frozen_ssl_long_mean": _frozen("ssl_long", "mean", "none"),
    "frozen_ssl_long_abmil_reports": _frozen("ssl_long", "attention", "reports", **_HEAD),
    "frozen_ssl_long_abmil_labels": _frozen("ssl_long", "attention", "labels", **_LONG_HEAD),
    "end_to_end_abmil_reports": Arm("end_to_end"),
    "end_to_end_abmil_labels": Arm("end_to_end", supervision="labels"),
    "dre_full_long_start": _engine(start="ssl_long"),
    "no_bank_long_start": _engine(start="ssl_long", bank_mode="paper", retrieved_per_slide=0),
    "full_labels_long_start": Arm("engine", "ssl_long", _LABELS, "labels"),
    "frozen_ssl_long_residual": _engine(start="ssl_long", **_FROZEN_HEAD),
    "frozen_ssl_longer_mean": _frozen("ssl_longer", "mean", "none"),
    "frozen_ssl_longer_abmil_reports": _frozen("ssl_longer", "attention", "reports", **_HEAD),
    "frozen_ssl_longer_abmil_labels": _frozen("ssl_longer", "attention", "labels", **_LONG_HEAD),
    "dre_full_lr_1e-3": _engine(learning_rate=1e-3),
    "no_bank_lr_1e-3": _engine(learning_rate=1e-3, bank_mode="paper", retrieved_per_slide=0),
    "end_to_end_abmil_labels_lr_1e-3": Arm("end_to_end", settings={"learning_rate": 1e-3}, supervision="labels"),
    "dre_paper": _engine(bank_mode="paper"),
    "dre_corrected": _engine(bank_mode="corrected"),
    "dre_two_pass": _engine(bank_mode="two_pass"),
    "dre_exact": _engine(bank_mode="exact"),
    "full_vlad": _engine(bank_mode="full", model_config={"codeword_tokens": "vlad"}),
    "no_bank_vlad": _engine(bank_mode="paper", retrieved_per_slide=0, model_config={"codeword_tokens": "vlad"}),
    "frozen_ssl_vlad": _engine(**_FROZEN_HEAD, model_config={"codeword_tokens": "vlad"}),
    "frozen_random_mean": _frozen("random", "mean", "none"),
    "frozen_random_abmil_reports": _frozen("random", "attention", "reports", **_HEAD),
    "frozen_random_abmil_labels": _frozen("random", "attention", "labels", **_LONG_HEAD),
    "frozen_random_residual": _engine(start="random", **_FROZEN_HEAD),
    "full_k4": _engine(model_config={"num_codewords": 4}),
    "full_k64": _engine(model_config={"num_codewords": 64}),
    "full_no_transformer": _engine(model_config={"num_hidden_layers": 0}),
    "full_s4": _engine(**_steps_for(4)),
    "full_s16": _engine(**_steps_for(16)),
    "full_refresh": _engine(refresh_per_slide=8),
    "full_labels": Arm("engine", settings=_LABELS, supervision="labels"),
    "full_from_scratch": _engine(start="random"),
    "full_refits": _engine(codebook_refits=[20, 60, 150, 300]),
    "corrected_refits": _engine(bank_mode="corrected", codebook_refits=[20, 60, 150, 300]),
    "corrected_no_drift": _engine("drift", bank_mode="corrected"),
    "full_reports_and_labels": _engine(**{**_LABELS, "objective": "both"}),
    "full_s64": _engine(**_steps_for(64)),
}


def stored_result(name: str, arm: Arm, seed: int, work: Path) -> dict[str, Any] | None:
    """The result of a finished run of this very arm, if there is one; see `run_arm`."""
    path = _result_path(name, seed, work)
    stored = read_json(path) if path.is_file() else None
    return stored if stored and stored["arm"] == _described(arm) else None


def _result_path(name: str, seed: int, work: Path) -> Path:
    return work / "runs" / f"seed-{seed}" / f"{name}.json"


def _described(arm: Arm) -> dict[str, Any]:
    """Everything that a result depends on besides cohort and code."""
    return asdict(arm) | {"ssl_steps": SSL_STEPS} | ({} if arm.kind == "frozen" else {"common": SETTINGS})


def run_arm(name: str, arm: Arm, cohort: Cohort, work: Path) -> dict[str, Any]:
    """Runs an arm on a cohort, unless its result is there already.

    Args:
        name (`str`): the arm's name.
        arm (`Arm`): the arm.
        cohort (`Cohort`): the cohort, whose seed is the run's too.
        work (`Path`): where results are kept: one JSON per run.

    Returns:
        `dict`: `scores`, counts of tiles, CPU seconds, and what the arm is.
    """
    if stored := stored_result(name, arm, cohort.seed, work):
        return stored
    pretrained, tiles = _start(arm, cohort, work)
    started, wall = _cpu_seconds(), time.monotonic()
    run_dir = work / f"run-{cohort.seed}-{name}"
    shutil.rmtree(run_dir, ignore_errors=True)
    if arm.kind == "engine":
        vectors, counts = train_with_engine(cohort, arm.settings, pretrained, arm.changed, run_dir)
    elif arm.kind == "end_to_end":
        vectors, counts = baselines.train_end_to_end(
            cohort, pretrained, supervision=arm.supervision, settings=arm.settings
        )
    else:
        head = {"num_steps": 0, "learning_rate": 1.0} | arm.settings
        vectors, counts = baselines.train_on_frozen(cohort, pretrained, supervision=arm.supervision, **head)
    result = {
        "name": name,
        "seed": cohort.seed,
        "arm": _described(arm),
        "scores": score(vectors, cohort),
        **counts,
        "training_losses": _training_losses(run_dir),
        "ssl_tiles_with_gradient": tiles,
        "cpu_seconds": round(_cpu_seconds() - started, 1),
        "wall_seconds": round(time.monotonic() - wall, 1),
    }
    shutil.rmtree(run_dir, ignore_errors=True)
    path = _result_path(name, cohort.seed, work)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def _training_losses(run_dir: Path) -> list[float]:
    """The engine's loss every 50 steps, as its metrics have it; what is far below held-out scores was memorised."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [round(row["loss"], 3) for row in rows if "loss" in row]


def _start(arm: Arm, cohort: Cohort, work: Path) -> tuple[str | None, int]:
    """The folder of the tile encoder that an arm starts from, trained if it is not there; and its tiles."""
    if arm.start == "random":
        return None, 0
    tiles_of_training = SETTINGS["num_steps"] * SETTINGS["tiles_per_slide"] * SETTINGS["slides_per_batch"]
    num_steps = SSL_STEPS + STARTS.index(arm.start) * (tiles_of_training // 256)
    folder = work / "encoders" / f"seed-{cohort.seed}-steps-{num_steps}"
    if not (folder / "counts.json").is_file():
        counts = baselines.pretrain_encoder(cohort, num_steps, folder)
        write_json(folder / "counts.json", counts)
    return str(folder), read_json(folder / "counts.json")["tiles_with_gradient"]


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
