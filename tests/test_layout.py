# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and what an installation adds to the import namespace."""

import ast
import graphlib
import importlib
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("modeling_dre_slcl", "training", "hub")
# Absolute imports of ours that a folder may use; inside a folder imports are relative.
MAY_IMPORT = {"modeling_dre_slcl": set(), "training": {"modeling_dre_slcl"}, "hub": {"modeling_dre_slcl"}}
OURS = {"modeling_dre_slcl", "training", "hub", "dre_slcl", "dre_slcl_cli", "tests", "benchmarks", "examples"}
# How transformers finds the files to copy beside a checkpoint: by text, in code and prose alike.
RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+(\.+\S*)\s+import|import\s+(\.+\S*))", re.MULTILINE)
FIND_MODULES = """
import importlib.util, json, sys
def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(json.dumps([name for name in sys.argv[1:] if found(name)]))
"""


def modules(folder):
    """Dotted name inside the folder -> parsed file; a package is its folder's name, "" the folder itself."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def relative_targets(folder, name, node):
    """The modules of a folder that one relative import names, or fails if it leaves the folder."""
    path = modules(folder)[name]
    package = list(path.relative_to(ROOT / folder).parent.parts)
    assert node.level - 1 <= len(package), f"{path}:{node.lineno} leaves {folder}/"
    base = package[: len(package) - node.level + 1]
    if node.module:
        return [".".join([*base, node.module])]
    return [".".join([*base, item.name]) for item in node.names]


def imports(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def module_level_imports(tree):
    """Imports that run when the module is imported: not those in functions or for type checkers only."""
    pending, found = list(tree.body), []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom):
            found.append(node)
        elif isinstance(node, (ast.Try, ast.ClassDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)
        ):
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_they_may(folder):
    files = modules(folder)
    for name, path in files.items():
        for node in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                for target in relative_targets(folder, name, node):
                    assert target in files, f"{path}:{node.lineno} imports {target}, which is not there"
                continue
            heads = [node.module] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            foreign = {head.split(".")[0] for head in heads} & OURS - MAY_IMPORT[folder]
            assert not foreign, f"{path}:{node.lineno} imports {foreign}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_imports_in_a_circle(folder):
    graph = {}
    for name, path in modules(folder).items():
        nodes = [node for node in module_level_imports(ast.parse(path.read_text(encoding="utf-8"))) if node.level]
        graph[name] = {target for node in nodes for target in relative_targets(folder, name, node)}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert any(graph.values()) or len(graph) == 1


def test_the_model_folder_is_flat_and_its_imports_are_what_transformers_copies():
    package = ROOT / "modeling_dre_slcl"
    assert {path.parent for path in package.rglob("*.py")} == {package}
    for path in package.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        relative = [node for node in imports(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
        for node in relative:
            assert node.level == 1, f"{path}:{node.lineno} leaves the folder"
            assert node.module, f"{path}:{node.lineno} names no file: `from . import`"
            assert "." not in node.module
        # Each such line of the text is an import: none stands in prose, where it would name a file to copy.
        in_text = sorted(first or second for first, second in RELATIVE_IMPORT.findall(text))
        assert in_text == sorted(f".{node.module}" for node in relative), path


def test_an_installation_adds_only_its_own_names(tmp_path):
    text = metadata.distribution("dre-slcl").read_text("top_level.txt")
    assert set(text.split()) == {"dre_slcl", "dre_slcl_cli", "modeling_dre_slcl"}
    inside = [f"dre_slcl.{folder}.{name}".rstrip(".") for folder in FOLDERS[1:] for name in modules(folder)]
    ours = ["modeling_dre_slcl", "dre_slcl_cli", *inside]
    foreign = ["training", "hub", "tests", "benchmarks", "examples", "training.train", "hub.publish"]
    # Others' installations may add such names: torchmil has a package `tests`.
    origins = metadata.packages_distributions()
    foreign = [name for name in foreign if set(origins.get(name.split(".")[0], [])) <= {"dre-slcl"}]
    command = [sys.executable, "-I", "-c", FIND_MODULES, *ours, *foreign]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == ours


def test_every_folder_with_code_is_packaged():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    paths = {settings["package-dir"].get(name, name) for name in settings["packages"]}
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert paths == {folder.relative_to(ROOT).as_posix() for folder in folders}


def test_the_command_line_names_modules_that_are_there():
    commands = importlib.import_module("dre_slcl_cli").COMMANDS
    for module, summary in commands.values():
        prefix, folder, *name = module.split(".")
        assert prefix == "dre_slcl"
        assert ".".join(name) in modules(folder)
        assert summary
