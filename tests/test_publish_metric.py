# SPDX-License-Identifier: Apache-2.0
"""A metric on its way to a Space of the stand-in Hub, and back through `evaluate.load`."""

import json
import shutil
from pathlib import Path

import pytest

from dre_slcl.hub.gather import PublishError
from dre_slcl.hub.gather_metric import METRICS_FOLDER, check_metric, find_metric, gather_metric

from .hub_server import HubServer, run_client

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.parent.name for path in (ROOT / "training" / "metrics").glob("*/README.md"))


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_may_go_out(name, tmp_path):
    files = gather_metric(name, tmp_path / "space", repo_id=f"tester/{name}")
    assert {"README.md", "app.py", "requirements.txt", f"{name}.py"} <= {path.name for path in files}
    assert check_metric(tmp_path / "space", repo_id=f"tester/{name}") == []
    assert f'evaluate.load("tester/{name}")' in (tmp_path / "space" / "README.md").read_text()
    assert f'evaluate.load("{name}.py")' in (tmp_path / "space" / "app.py").read_text()


def test_metrics_are_found_by_name_and_by_folder(tmp_path):
    assert find_metric("auroc") == METRICS_FOLDER / "auroc"
    own = tmp_path / "mine"
    shutil.copytree(METRICS_FOLDER / "auroc", own)
    with pytest.raises(PublishError, match=r"expected one of auprc, auroc, .* or a folder DIR with DIR/DIR\.py"):
        find_metric(own)
    (own / "auroc.py").rename(own / "mine.py")
    assert find_metric(own) == own
    with pytest.raises(PublishError, match="expected NAMESPACE/mine"):
        gather_metric(own, tmp_path / "space", repo_id="tester/auroc")


def test_what_would_not_load_elsewhere_is_found(tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "mine.py").write_text("from dre_slcl.training.x import y\nfrom .absent import z\n")
    (own / "README.md").write_text("---\ntitle: mine\n---\n")
    gather_metric(own, tmp_path / "space", repo_id="tester/mine")
    found = "\n".join(map(str, check_metric(tmp_path / "space", repo_id="tester/mine")))
    for text in (
        "installed package 'dre_slcl",
        "absent.py is not in the folder",
        "sdk: gradio",
        "requirements.txt: is",
    ):
        assert text in found


PUBLISH = """
import argparse, json, sys
sys.path.insert(0, sys.argv[1])
from hub import publish
parser = argparse.ArgumentParser()
publish.add_arguments(parser)
codes = [publish.run(parser.parse_args(["--metric", name, "--repo", f"tester/{name}"])) for name in sys.argv[2:]]
codes += [publish.run(parser.parse_args(["--metric", "auroc", "--repo", "tester/auroc", "--model", "m"]))]
codes += [publish.run(parser.parse_args(["--metric", "nothing", "--repo", "tester/nothing"]))]
print(json.dumps(codes))
"""
LOAD = """
import evaluate
metric = evaluate.load("tester/calibration_error", keep_in_memory=True)
print(metric.compute(references=[0, 1, 1], predictions=[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])["calibration_error"])
"""


def test_a_published_metric_is_loaded_by_its_repository(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        out = run_client(
            PUBLISH, server.environment(tmp_path / "author"), arguments=[ROOT, "auroc", "calibration_error"]
        )
        assert json.loads(out.splitlines()[-1]) == [0, 0, 2, 1]
        stored = server.repository("tester/calibration_error", "space").files("main")
        assert {"app.py", "calibration_error.py", "expected_calibration_error.py", "README.md"} <= set(stored)
        environment = server.environment(tmp_path / "home")
        loaded = run_client(LOAD, environment, hide=["modeling_dre_slcl", "dre_slcl"])
    assert float(loaded.splitlines()[-1]) == pytest.approx(0.3)
