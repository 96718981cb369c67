# SPDX-License-Identifier: Apache-2.0
"""The recipe of `examples/tcga_lung/README.md`, command by command, on a synthetic cohort with the archives' names."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from dre_slcl.training.config import load_config
from dre_slcl_cli import COMMANDS, main

from . import published_cohort as published
from . import tiny_dataset

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RECIPE = EXAMPLES / "tcga_lung"
STEPS = {"cohort": 1, "tiles": 1, "train": 3, "embed": 3, "evaluate": 5}
# What makes the same commands small; everything else is as the recipe has it.
SMALL_TILES = {"--tile-size": "64", "--mpp": "2.0"}
SMALL_ENCODER = {
    "model_type": "timm_wrapper",
    "architecture": "resnet18",
    "model_args": {"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 64], "norm_layer": "groupnorm"},
}
SMALL_RUN = {"slides_per_batch": 4, "tiles_per_slide": 4, "warmup_steps": 2, "num_workers": 0}
SMALL_RUN |= {"encode_batch_size": 64, "mixed_precision": "no", "checkpoint_steps": 50, "learning_rate": 1e-3}
SMALL_PAPER = SMALL_RUN | {"num_steps": 12, "tile_encoder": None, "tile_encoder_config": SMALL_ENCODER}
SMALL_PAPER |= {"text_model": "text_model", "retrieved_per_slide": 8, "codebook_sample": 2000}
SMALL_PAPER |= {"model_config": {"num_codewords": 4, "num_attention_heads": 2, "intermediate_size": 64}}
SMALL_LABELS = SMALL_RUN | {"num_steps": 6}
GENES = ("EGFR", "KRAS", "STK11", "TP53")


def commands():
    """The arguments of every command of the recipe, in order."""
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("dre-slcl ")]


def test_the_recipe_has_the_commands_that_are_run():
    names = [arguments[0] for arguments in commands()]
    assert {name: names.count(name) for name in STEPS} == STEPS
    assert set(names) == set(STEPS)


@pytest.mark.parametrize("arguments", commands(), ids=lambda arguments: " ".join(arguments)[:60])
def test_every_command_is_one_that_the_command_line_takes(arguments):
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[arguments[0]][0]).add_arguments(parser)
    parser.parse_args(arguments[1:])


def test_the_settings_of_fine_tuning_are_accepted_and_name_the_recipes_places():
    config = load_config(RECIPE / "finetune_mutations.yaml", {})
    assert config.model == f"{load_config(EXAMPLES / 'paper_tcga_lung.yaml', {}).output_dir}/model"
    assert tuple(config.label_columns) == GENES
    assert f"{config.output_dir}/model" in {arguments[2] for arguments in commands() if arguments[0] == "embed"}


def write_downloads(folder):
    """What step 1 of the recipe lists: 28 TCGA cases with diagnostic and frozen slides, 6 cases of CPTAC."""
    tcga, cptac = published.tcga_cases(28), published.cptac_cases(6)
    for place, case in enumerate(tcga):
        kinds = ["01Z-00-DX1"] if place % 4 else ["01Z-00-DX1", "01Z-00-DX2"]
        kinds += ["01A-01-TS1"] if place % 2 else []
        kinds += ["11A-01-TS1"] if place % 2 == 0 else []
        for kind in kinds:
            name = published.tcga_slide_name(case, kind)
            path = folder / "slides" / "tcga" / name[-36:] / f"{name}.svs"
            published.paint(path, case, is_normal=kind.startswith("11"))
    for case in cptac:
        for number in (21, 26):
            path = folder / "slides" / "cptac" / f"{case.case_id}-{number}.svs"
            published.paint(path, case, is_normal=number == 26)
    tables = folder / "tables"
    tables.mkdir()
    published.write_reports(tables / "TCGA_Reports.csv", tcga)
    published.write_gdc_clinical(tables / "clinical.tsv", tcga)
    published.write_cptac_slides(tables / "cptac_slides.csv", cptac)
    published.write_maf(tables / "tcga.maf.gz", tcga)
    published.write_cbioportal_mutations(tables / "cptac_mutations.txt", cptac)


def write_small_settings(folder):
    """The recipe's settings, with small numbers in place of large ones."""
    for source, changes in (
        (EXAMPLES / "paper_tcga_lung.yaml", SMALL_PAPER),
        (RECIPE / "finetune_mutations.yaml", SMALL_LABELS),
    ):
        settings = yaml.safe_load(source.read_text(encoding="utf-8"))
        model_config = settings.get("model_config", {}) | changes.get("model_config", {})
        settings |= changes
        if model_config:
            settings["model_config"] = model_config
        (folder / source.name).write_text(yaml.safe_dump(settings))


def run(arguments):
    given = list(arguments)
    for option, value in SMALL_TILES.items():
        if option in given and given[0] == "tiles":
            given[given.index(option) + 1] = value
    if given[0] == "embed":
        given += ["--num-workers", "0", "--device", "cpu"]
    if given[0] == "evaluate":
        given += ["--seeds", "0", "--num-bootstrap", "50"]
    assert main(given) == 0, " ".join(given)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_step_from_downloads_to_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_downloads(tmp_path)
    write_small_settings(tmp_path)
    tiny_dataset.write_text_model(tmp_path / "text_model")
    try:
        for arguments in commands():
            run(arguments)
    finally:
        torch.set_num_threads(threads)
    for name, kind, classes in (
        ("subtype", "classification", ["LUAD", "LUSC"]),
        ("cancer", "classification", ["normal", "tumor"]),
        ("mutations", "multilabel", list(GENES)),
        ("subtype-cptac", "classification", ["LUAD", "LUSC"]),
        ("mutations-finetuned", "multilabel", list(GENES)),
    ):
        results = json.loads((tmp_path / "results" / name / "results.json").read_text(encoding="utf-8"))
        (task,) = results
        assert (task["kind"], sorted(task["classes"])) == (kind, sorted(classes))
        encoders = {row["encoder"] for row in task["rows"]}
        assert {"slides", "chance"} <= encoders
        assert (tmp_path / "results" / name / "results.md").stat().st_size > 100
    (external,) = json.loads((tmp_path / "results" / "subtype-cptac" / "results.json").read_text(encoding="utf-8"))
    assert (external["num_items"], external["num_cases"]) == (6, 6)
