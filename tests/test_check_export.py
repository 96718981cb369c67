# SPDX-License-Identifier: Apache-2.0
"""The checks before publishing: each thing that must not reach the Hub is planted, and must be named."""

import getpass
import json
import pickle
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dre_slcl.hub.check_export import check_export
from dre_slcl.hub.gather import gather_model

from .toy_export import CONFIG, write_toy_model


@pytest.fixture
def export(tmp_path):
    out = tmp_path / "export"
    gather_model(write_toy_model(tmp_path / "model"), out, repo_id="tester/toy")
    return out


def complaints(folder, **options):
    return [str(finding) for finding in check_export(folder, **options)]


def test_a_gathered_model_has_nothing_to_mend(export):
    assert complaints(export) == []


class Marker:
    """Leaves a file behind if anything unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_refuses_pickle_in_every_disguise_without_opening_it(export, tmp_path):
    marker = tmp_path / "unpickled"
    payload = pickle.dumps(Marker(marker))
    disguises = ["w.bin", "w.pt", "w.pkl", "w.joblib", "w.npz", "w.h5", "w.json", "w.txt", "w.py", "w.safetensors"]
    for name in disguises:
        (export / name).write_bytes(payload)
        (export / name).chmod(0o644)
    with zipfile.ZipFile(export / "model.safetensors", "a") as polyglot:
        polyglot.writestr("data.pkl", payload)
    named = {line.split(":")[0] for line in complaints(export)}
    assert named == {*disguises, "model.safetensors"}
    assert not marker.exists()


def test_refuses_the_memory_bank(export):
    tensors = {"encoder.weight": np.zeros(2, np.float32), "memory_bank.features": np.zeros(2, np.float32)}
    save_file(tensors, export / "model.safetensors")
    (export / "model.safetensors").chmod(0o644)
    assert len(found := complaints(export)) == 1
    assert "memory_bank.features" in found[0]


@pytest.mark.parametrize(
    "local",
    [
        "/home/anna/runs/step-000100",
        "/odd/place",
        "~/slides/x.svs",
        "file:///x/y",
        "C:\\slides\\x.svs",
        "D:/slides/x.svs",
        "\\\\server\\share\\x",
    ],
)
def test_refuses_local_paths_in_json_and_card(export, local):
    config = {**CONFIG, "encoder_config": {"_name_or_path": local}}
    (export / "config.json").write_text(json.dumps(config))
    assert [line for line in complaints(export) if "_name_or_path" in line and line.startswith("config.json: ")]
    if local != "/odd/place":  # in prose only well-known first folders count
        (export / "config.json").write_text(json.dumps(CONFIG))
        (export / "README.md").write_text((export / "README.md").read_text() + f"\nTrained from {local} on tiles.\n")
        assert [line for line in complaints(export) if line.startswith("README.md: holds the local path")]


def test_public_addresses_and_vocabularies_are_not_local_paths(export):
    (export / "README.md").write_text((export / "README.md").read_text() + "\nhttps://host/home/x a/b and/or 1/2\n")
    tokenizer = {"model": {"vocab": {"/home/x": 0}, "merges": ["/home /x"]}, "added_tokens": [], "version": "1.0"}
    (export / "tokenizer.json").write_text(json.dumps(tokenizer))
    (export / "vocab.txt").write_text("/home/x\n")
    assert complaints(export) == []


def test_refuses_account_machine_and_token_but_not_the_repository_id(export, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "annalena")
    monkeypatch.setattr(socket, "gethostname", lambda: "ward7.hospital.example")
    card = (export / "README.md").read_text()
    (export / "README.md").write_text(f"{card}\nannalena/toy on ward7.hospital.example with hf_{'a' * 30}\n")
    found = "\n".join(complaints(export))
    for part in ("'annalena', the name of this account", "'ward7', the name of this machine", "an access token"):
        assert part in found
    (export / "README.md").write_text(f"{card}\nSee annalena/toy\n")
    assert complaints(export, allowed_text=["annalena/toy"]) == []
    assert len(complaints(export)) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from .absent import x", "absent.py is not in the folder"),
        ('"""Example::\n\n    from .absent import x\n"""', "absent.py is not in the folder"),
        ("from . import tile_encoder", "does not load from the Hub"),
        ("from ..x import y", "does not load from the Hub"),
        ("from .a.b import y", "does not load from the Hub"),
        ("import modeling_dre_slcl.tissue", "absent on other machines"),
        ("from dre_slcl.training import x", "absent on other machines"),
        ("def f(:", "does not parse (line 1"),
    ],
)
def test_refuses_code_that_would_not_load_from_the_hub(export, code, message):
    (export / "tile_encoder.py").write_text(code)
    assert any(message in line for line in complaints(export) if line.startswith("tile_encoder.py: "))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {}}, "`auto_map` lacks AutoModel"),
        ({"auto_map": {**CONFIG["auto_map"], "AutoModel": "gone.DreSlclModel"}}, "gone.py is not in the folder"),
        ({"auto_map": {**CONFIG["auto_map"], "AutoModel": "tile_encoder.Gone"}}, "defines no class 'Gone'"),
        ({"auto_map": {**CONFIG["auto_map"], "AutoModel": "a/b--m.X"}}, "points to another repository"),
        ({"custom_pipelines": {"t": {"impl": "gone.P", "pt": ["AutoModel"]}}}, "gone.py is not in the folder"),
        ({"custom_pipelines": {"t": {"impl": "pipeline_dre_slcl.SlideFeatureExtractionPipeline"}}}, "Auto class"),
    ],
)
def test_refuses_a_config_that_leads_nowhere(export, change, message):
    (export / "config.json").write_text(json.dumps({**CONFIG, **change}))
    assert any(message in line for line in complaints(export) if line.startswith("config.json: "))


def test_refuses_modes_links_folders_and_missing_files(export):
    (export / "model.safetensors").chmod(0o600)
    (export / "linked.json").symlink_to(export / "config.json")
    (export / "sub").mkdir()
    (export / "README.md").unlink()
    found = complaints(export)
    assert [line.split(":")[0] for line in found] == ["linked.json", "model.safetensors", "sub", "README.md"]
    assert "0600, expected 0644" in found[1]
