# SPDX-License-Identifier: Apache-2.0
"""Runs the campaigns, each in a process of its own: with few cases by default, with the usual counts where slow.

A campaign fails here as it does on the command line: by a figure that must be 0. `make reliability` runs the large
counts.
"""

import importlib
import os

import pytest

from .run_all import CAMPAIGNS, ROOT, run, run_together

# What takes seconds. The others are run where slow tests are.
QUICK = {
    "slide_fuzz": 300,
    "malformed_slides": None,
    "odd_slides": None,
    "hostile_names": None,
    "patient_data": None,
    "disk_full": 2,
    "build_kills": 5,
    "several_writers": 1,
}
# Those of training share a process, for it imports for as long as they run.
QUICK_TRAINING = {
    "train_kills": 100,
    "crash_points": 1,
    "power_loss": 12,
    "damaged_checkpoints": 4,
    "train_signals": 4,
    "pickles": 4,
    "not_finite": 4,
    "odd_reports": 1,
    "train_memory": 10_000,
}
# What takes longer, where slow tests are, in two halves; `make reliability COUNTS=default` runs the usual counts.
SLOW_TRAINING = (
    {"train_sabotages": 20, "train_signals": 10, "determinism": 2, "not_finite": 40},
    {"train_disk_full": 2, "power_loss": 100, "damaged_checkpoints": 40, "pickles": 24},
)
TRAINING = {*QUICK_TRAINING, "train_disk_full", "train_sabotages", "determinism"}
NEED_ROOT = {"disk_full", "train_disk_full"}


def check(name, count):
    if name in NEED_ROOT and os.geteuid():
        pytest.skip("file systems can only be mounted by root")
    figures, done = run(name, count)
    print(done.stdout)  # shown if the test fails
    if "skipped" in figures:
        pytest.skip(figures["skipped"])
    assert figures["faults"] == 0
    assert figures["cases"] > 0
    return figures


@pytest.mark.parametrize("name", QUICK)
def test_few_cases(name):
    check(name, QUICK[name])


def check_together(counts):
    figures, output = run_together(counts)
    print(output)
    assert {name: found.get("faults", found) for name, found in figures.items()} == dict.fromkeys(counts, 0)
    assert all(found["cases"] or "skipped" in found for found in figures.values())


@pytest.mark.timeout(600)
def test_few_cases_of_training():
    check_together(QUICK_TRAINING)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("counts", SLOW_TRAINING, ids=["sabotages", "files"])
def test_more_cases_of_training(counts):
    check_together(counts)


@pytest.mark.slow
def test_a_loss_of_power_would_be_noticed_if_nothing_was_synced():
    assert run("power_loss", 40, "--sabotage")[0]["faults"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (_, _, default, _) in CAMPAIGNS.items()
        if name not in TRAINING and (default is not None or name not in QUICK)
    ],
)
def test_usual_counts(name):
    figures = check(name, CAMPAIGNS[name][2])
    assert figures["cases"] >= (CAMPAIGNS[name][2] or 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sabotage", ["declare_during_exchange", "restore_any", "forget_parts", "leave_temporary_files"]
)
def test_kills_would_find_what_is_broken_on_purpose(sabotage):
    # Kills fall at random, and a hundred of them may all miss.
    assert any(run("build_kills", 100, "--sabotage", sabotage, "--seed", str(seed))[0]["faults"] for seed in range(3))


def test_every_campaign_is_run():
    """By `make reliability`; and each counts its cases and is documented."""
    files = {path.stem for path in (ROOT / "tests" / "reliability").glob("*.py")}
    campaigns = {name for name in files if "run_campaign(" in (ROOT / f"tests/reliability/{name}.py").read_text()}
    assert campaigns - {"campaign", "test_campaigns"} == set(CAMPAIGNS)
    assert set(QUICK) | TRAINING <= set(CAMPAIGNS)
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert all(f"`{name}" in page for name in CAMPAIGNS)
    assert "reliability:" in (ROOT / "Makefile").read_text()
    assert importlib.util.find_spec("openslide")
