# SPDX-License-Identifier: Apache-2.0
"""Publishing: what is gathered, and the way to the stand-in Hub and back."""

import json
from pathlib import Path

import pytest

import modeling_dre_slcl
from dre_slcl.hub.check_dataset import check_dataset
from dre_slcl.hub.check_export import check_export
from dre_slcl.hub.gather import PublishError, gather_dataset, gather_model
from dre_slcl.hub.publish import Destination

from .hub_server import HubServer, run_client
from .toy_export import CODE, write_toy_dataset, write_toy_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model_dir(tmp_path):
    return write_toy_model(tmp_path / "model")


@pytest.fixture
def dataset_dir(tmp_path):
    return write_toy_dataset(tmp_path / "dataset")


def gathered(model_dir, **options):
    out = model_dir.parent / "export"
    gather_model(model_dir, out, repo_id="tester/toy", **options)
    return out


def complaints(folder, **options):
    return [str(finding) for finding in check_export(folder, **options)]


def test_gathers_exactly_what_the_hub_needs(model_dir, caplog):
    for stray in ("optimizer.safetensors", "memory_bank.safetensors", "trainer_state.json", "run.log", "unused.py"):
        (model_dir / stray).write_text("stray")
    export = gathered(model_dir)
    expected = {f"{name}.py" for name in CODE} | {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in export.iterdir()} == expected | {"README.md"}
    assert "memory_bank.safetensors" in caplog.text
    assert complaints(export) == []


def test_takes_all_code_from_the_installed_package_rather_than_mixing_versions(model_dir):
    (model_dir / "tile_encoder.py").unlink()
    export = gathered(model_dir)
    package = Path(modeling_dre_slcl.__file__).parent
    codes = sorted(export.glob("*.py"))
    assert codes
    assert all(path.read_bytes() == (package / path.name).read_bytes() for path in codes)


def test_a_card_of_the_user_is_kept_and_not_silently_overridden(model_dir):
    (model_dir / "README.md").write_text("---\nlicense: mit\n---\nmine")
    export = gathered(model_dir)
    assert (export / "README.md").read_text().endswith("mine")
    assert complaints(export) == [
        "README.md: metadata lacks `library_name`",
        "README.md: metadata lacks `pipeline_tag`",
    ]
    with pytest.raises(PublishError, match="is used as the card"):
        gather_model(model_dir, model_dir.parent / "other", repo_id="tester/toy", metrics={"auroc": 0.9})


def test_dataset_leaves_working_files_behind(dataset_dir, tmp_path):
    out = tmp_path / "gathered"
    names = {str(path.relative_to(out)) for path in gather_dataset(dataset_dir, out)}
    shards = {f"{kind}/train-00000-of-00001.parquet" for kind in ("slides", "tiles")}
    assert names == shards | {"README.md", "dre_slcl_dataset.json"}
    assert check_dataset(out) == []
    more = gather_dataset(dataset_dir, tmp_path / "more", include_previews=True)
    assert tmp_path / "more" / "previews" / "s1.jpg" in more


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "a/../b", "ns/na me", "/x", ""])
def test_repository_ids_are_checked_before_any_work(repo_id):
    with pytest.raises(PublishError, match="expected NAMESPACE/NAME"):
        Destination(repo_id)


PUBLISH = """
import argparse, io, json, logging, os, sys
from contextlib import redirect_stdout
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from huggingface_hub import HfApi, constants
from hub import publish

model, dataset, metrics = sys.argv[2:]
log = io.StringIO()
logging.basicConfig(stream=log, level=logging.ERROR, format="%(message)s")
parser = argparse.ArgumentParser()
publish.add_arguments(parser)

def call(*arguments):
    log.seek(0), log.truncate()
    with redirect_stdout(io.StringIO()) as out:
        code = publish.run(parser.parse_args(["--repo", "tester/toy", *arguments]))
    return {"code": code, "out": out.getvalue(), "log": log.getvalue().strip()}

result = {"dry": call("--model", model, "--dataset", dataset, "--dry-run")}
result["nothing"] = call()
result["forbidden"] = call("--model", model, "--repo", "someone/else")
token = os.environ.pop("HF_TOKEN")
result["no_token"] = call("--model", model)
os.environ["HF_TOKEN"] = "hf_wrong"
result["bad_token"] = call("--model", model)
os.environ["HF_TOKEN"] = token
endpoint, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"
result["no_network"] = call("--model", model)
constants.ENDPOINT = endpoint
result["both"] = call("--model", model, "--dataset", dataset, "--metrics", metrics)
result["no_longer_private"] = call("--model", model, "--private")
HfApi().upload_file(path_or_fileobj=b"x = 1", path_in_repo="old_code.py", repo_id="tester/toy")
result["again"] = call("--model", model, "--metrics", metrics)
result["request"] = call("--model", model, "--create-pr")
result["branch"] = call("--model", model, "--revision", "next")
result["secret"] = call("--model", model, "--private", "--repo", "tester/secret")
Path(model, "model.safetensors").write_bytes(b"torn")
result["torn"] = call("--model", model, "--dataset", dataset, "--repo", "tester/torn")
print(json.dumps(result))
"""

LOAD = """
import json, sys
from datasets import load_dataset
from huggingface_hub import constants
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

options = {"revision": sys.argv[1], "trust_remote_code": True}
model = AutoModel.from_pretrained("tester/toy", **options)
refused = False
try:
    AutoModel.from_pretrained("tester/toy", revision=sys.argv[1], trust_remote_code=False)
except ValueError as error:
    refused = "custom code" in str(error)
encode = pipeline("slide-feature-extraction", model="tester/toy", device=-1, **options)
inferred = pipeline(model="tester/toy", device=-1, **options)
print(json.dumps({
    "config": AutoConfig.from_pretrained("tester/toy", **options).tile_size_px,
    "processor": type(AutoProcessor.from_pretrained("tester/toy", **options)).__name__.removesuffix("Fast"),
    "weights": model.encoder.weight.detach().flatten().tolist(), "refused": refused,
    "encoded": encode({"x": [1.0, 0.0, 0.0, 0.0]})["slide_embedding"].tolist(), "inferred": type(inferred).__name__,
    "slides": load_dataset("tester/toy", "slides", split="train")["slide_id"][:],
    "tiles": load_dataset("tester/toy", "tiles", split="train")["tile_index"][:],
}))
"""


@pytest.fixture
def published(model_dir, dataset_dir, tmp_path):
    """Runs every kind of publishing in one client; yields the server and what the client reported."""
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"auroc": 0.9}))
    with HubServer(tmp_path / "hub") as server:
        environment = server.environment(tmp_path / "author")
        arguments = [ROOT, model_dir, dataset_dir, metrics]
        yield server, json.loads(run_client(PUBLISH, environment, arguments=arguments).splitlines()[-1])


def test_publishes_and_loads_where_the_package_is_absent_and_offline(published, tmp_path):
    server, results = published
    _check_refusals(results)
    assert not server.repository("tester/torn", "dataset").exists
    commit = _check_uploads(server, results)
    home, hide = tmp_path / "home", ["modeling_dre_slcl", "dre_slcl"]
    loaded = run_client(LOAD, server.environment(home), arguments=[commit], hide=hide).splitlines()[-1]
    server.requests.clear()
    offline = run_client(LOAD, server.environment(home, offline=True), arguments=[commit], hide=hide).splitlines()[-1]
    assert not server.requests
    assert json.loads(offline) == json.loads(loaded)
    assert json.loads(loaded) == {
        "config": 256,
        "processor": "ViTImageProcessor",
        "weights": list(range(16)),
        "refused": True,
        "encoded": [0, 4, 8, 12],
        "inferred": "SlideFeatureExtractionPipeline",
        "slides": ["s1"],
        "tiles": [0, 1],
    }


def _check_refusals(results):
    assert results["dry"]["code"] == 0
    assert "model tester/toy: 8 files" in results["dry"]["out"]
    assert results["nothing"]["code"] == 2
    for name, message in {
        "forbidden": "the Hub forbids this token to write to someone/else",
        "no_token": "no Hub token; run `hf auth login`",
        "bad_token": "the Hub does not accept the token",
        "no_network": "no connection to http://127.0.0.1:9",
        "no_longer_private": "tester/toy exists and is public",
        "torn": "model.safetensors: not a safetensors file",
    }.items():
        assert results[name]["code"] == 1, name
        assert message in results[name]["log"]
        assert "\n" not in results[name]["log"]
    assert "hf_" not in json.dumps(results)


def _check_uploads(server, results):
    """Checks what the server stored; returns the commit on main."""
    repository = server.repository("tester/toy")
    files = {f"{name}.py" for name in CODE} | {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(repository.files()) == files | {"README.md", ".gitattributes"}  # old_code.py is gone
    commit = repository.resolve("main")
    assert f"model tester/toy: commit {commit}" in results["again"]["out"]
    card = repository.read("main", "README.md").decode()
    assert "datasets:" not in card  # published again without --dataset
    assert f"commit {repository.resolve('refs/pr/1')}" in results["request"]["out"]
    assert "pull request: " in results["request"]["out"]
    assert f"commit {repository.resolve('next')}" in results["branch"]["out"]
    assert server.repository("tester/secret").state["private"]
    dataset = server.repository("tester/toy", "dataset")
    assert f"dataset tester/toy: commit {dataset.resolve('main')}" in results["both"]["out"]
    assert {Path(name).parts[0] for name in dataset.files()} == {
        *(".gitattributes", "README.md", "dre_slcl_dataset.json", "slides", "tiles")
    }
    return commit
