# SPDX-License-Identifier: Apache-2.0
"""The command line: help that names what there is, exit statuses, and nothing imported before it is needed."""

import json
import subprocess
import sys

import pytest

from dre_slcl_cli import COMMANDS, main

OPTIONS = {
    "tiles": [
        "--slides",
        "--out",
        "--mpp",
        "--tile-size",
        "--slide-mpp",
        "--pixels",
        "--join",
        "--shard",
        "--val-fraction",
    ],
    "train": ["--config", "--dataset", "--output-dir", "--slides-per-batch", "--bank-mode", "--text-model"],
    "convert-encoder": ["FILE", "OUT", "--image-size", "--key"],
    "bank": ["--json", "--draw", "--export"],
    "embed": ["--model", "--slides", "--out", "--mpp", "--tile-features", "--device"],
    "cohort": ["--slides", "--reports", "--clinical", "--mutations", "--split-by", "--out"],
    "evaluate": ["--model", "--dataset", "--label-column", "--embeddings", "--labels", "--task", "--out"],
    "explain": ["--model", "--slide", "--out", "--text", "--class", "--codewords", "--features"],
    "search": ["--index", "--model", "--like", "--slide", "--find", "--top-k", "--out"],
    "view": ["--model", "--embeddings", "--port", "--make-space"],
    "export": ["--dataset", "--format", "--out"],
    "import-features": ["--from", "--out", "--encoder", "--width", "--slides", "--license"],
    "publish": ["--model", "--dataset", "--repo", "--private", "--dry-run"],
    "demo": ["--out", "--seeds"],
}
IMPORTED = """
import contextlib, io, json, sys
import dre_slcl_cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    dre_slcl_cli.main(["--help"])
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def exit_status(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def test_help_names_every_command(capsys):
    assert exit_status("--help") == 0
    text = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert name in text
        assert " ".join(summary.split()) in " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_its_options(command, capsys):
    assert exit_status(command, "--help") == 0
    words = capsys.readouterr().out.replace(",", " ").replace("[", " ").split()
    assert set(OPTIONS[command]) <= set(words)


@pytest.mark.parametrize("arguments", [[], ["tile"], ["embed"], ["publish"], ["tiles", "--out"], ["demo", "--seed-s"]])
def test_wrong_usage_is_status_2_and_says_why(arguments, capsys):
    assert exit_status(*arguments) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiles", "--slides", "absent.csv", "--out", "out"], "absent.csv"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["train", "--dataset", "data", "--output-dir", "out"], "tile_encoder"),
        (["embed", "--model", "m", "--slides", "absent", "--out", "out"], "absent"),
        (["publish", "--model", "absent", "--repo", "me/name", "--dry-run"], "absent"),
    ],
)
def test_what_is_not_there_is_status_1_and_is_named(arguments, message, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert message in caplog.text
    assert "Traceback" not in caplog.text


def test_an_interrupt_is_status_130(monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("dre_slcl.training.demo.run_demo.run", interrupt)
    assert main(["demo"]) == 130


def test_help_imports_no_heavy_library():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, timeout=60)
    imported = json.loads(done.stdout)
    assert {"torch", "transformers", "datasets", "openslide", "dre_slcl"}.isdisjoint(imported)
