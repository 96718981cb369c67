# SPDX-License-Identifier: Apache-2.0
"""The README's file tree is the one on the disk, and the commands and settings that it names exist."""

import dataclasses
import re
from pathlib import Path

from dre_slcl.training.config import TrainConfig
from dre_slcl_cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree():
    """Paths that the README's file tree names."""
    block = next(block for block in README.split("```") if "modeling_dre_slcl/   " in block)
    folders, found = [], set()
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        found.add("".join(folders))
    return found


def test_the_tree_names_every_shipped_file_and_no_other():
    shipped = {"dre_slcl_cli.py"}
    for folder in ("modeling_dre_slcl", "training", "hub"):
        files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))
        shipped |= {path.as_posix() for path in files if path.name != "__init__.py"}
    assert {path for path in tree() if path.endswith(".py")} == shipped


def test_the_commands_and_targets_it_names_exist():
    assert set(re.findall(r"^dre-slcl ([\w-]+)", README, re.MULTILINE)) <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)) - {"it"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_settings_it_names_exist():
    fields = {item.name for item in dataclasses.fields(TrainConfig)}
    named = set(re.findall(r"`([a-z_]+)(?:: [a-z]+)?`", README)) & {
        *("bank_mode", "center_reports", "codebook_refits", "finalize_steps", "ship_text_model")
    }
    assert len(named) == 5
    assert named <= fields
