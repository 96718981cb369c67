# SPDX-License-Identifier: Apache-2.0
"""The stand-in Hub, judged by the clients it stands in for: huggingface_hub, transformers, datasets."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from .hub_server import TOKEN, HubServer, run_client

PUSH = """
import json, sys, warnings
import torch
from datasets import Dataset, DatasetDict, Image
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import BertConfig, BertModel
import io, numpy, PIL.Image

sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = BertModel(BertConfig(**sizes)).eval()
commit = model.push_to_hub("tester/bert").oid

slides = {split: Dataset.from_dict({"slide_id": [f"{split}-{i}" for i in range(2)]}) for split in ("train", "val")}
DatasetDict(slides).push_to_hub("tester/slides", config_name="slides", set_default=True)
buffer = io.BytesIO()
PIL.Image.fromarray(numpy.full((8, 8, 3), 200, numpy.uint8)).save(buffer, "PNG")
tiles = Dataset.from_dict({"tile_index": list(range(10)), "image": [{"bytes": buffer.getvalue(), "path": None}] * 10})
tiles = tiles.cast_column("image", Image())
tiles.push_to_hub("tester/slides", config_name="tiles", split="train", num_shards=2)

api = HfApi()
api.create_tag("tester/bert", tag="v1")
api.upload_file(path_or_fileobj=b"later", path_in_repo="notes.txt", repo_id="tester/bert")
again = api.upload_file(path_or_fileobj=b"later", path_in_repo="notes.txt", repo_id="tester/bert")
request = api.upload_file(path_or_fileobj=b"pr", path_in_repo="notes.txt", repo_id="tester/bert", create_pr=True)
api.delete_file("notes.txt", "tester/bert")
api.create_repo("tester/secret", private=True)
failures = {}
for name, call in {
    "forbidden": lambda: api.create_repo("someone/else"),
    "exists": lambda: api.create_repo("tester/bert"),
    "absent": lambda: api.model_info("tester/absent"),
    "revision": lambda: api.model_info("tester/bert", revision="v9"),
    "entry": lambda: api.hf_hub_download("tester/bert", "absent.json"),
    "hidden": lambda: api.model_info("tester/secret", token=False),
}.items():
    try:
        call()
    except HfHubHTTPError as error:
        failures[name] = [type(error).__name__, error.response.status_code]
pushed_files = ["config.json", "model.safetensors"]
refs = api.list_repo_refs("tester/bert", include_pull_requests=True)
print(json.dumps({
    "commit": commit, "values": model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state[0, 0].tolist(),
    "failures": failures, "tags": {ref.name: ref.target_commit for ref in refs.tags},
    "no_op": again.oid, "head": api.list_repo_commits("tester/bert")[1].commit_id,
    "pull_request": [request.pr_url, refs.pull_requests[0].ref],
    "files": sorted(api.list_repo_files("tester/bert")), "who": api.whoami()["name"],
    "infos": [info.lfs is not None for info in api.get_paths_info("tester/bert", pushed_files)],
}))
"""

LOAD = """
import json, sys
import torch
from datasets import load_dataset
from huggingface_hub import constants, snapshot_download
from transformers import AutoModel

model = AutoModel.from_pretrained("tester/bert").eval()
slides, tiles = load_dataset("tester/slides", "slides"), load_dataset("tester/slides", "tiles", split="train")
result = {
    "values": model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state[0, 0].tolist(),
    "slides": {split: rows["slide_id"][:] for split, rows in slides.items()},
    "tiles": tiles["tile_index"][:], "pixel": tiles[3]["image"].getpixel((0, 0)),
    "snapshot": snapshot_download("tester/bert", revision="v1").rsplit("/", 1)[-1],
}
if not constants.is_offline_mode():
    stream = load_dataset("tester/slides", "tiles", split="train", streaming=True)
    result["stream"] = [row["tile_index"] for row in stream]
print(json.dumps(result))
"""


@pytest.mark.slow
def test_clients_push_load_and_load_again_offline(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        home = tmp_path / "home"
        pushed = json.loads(run_client(PUSH, server.environment(tmp_path / "author")).splitlines()[-1])
        loaded = json.loads(run_client(LOAD, server.environment(home)).splitlines()[-1])
        server.requests.clear()
        offline = json.loads(run_client(LOAD, server.environment(home, offline=True)).splitlines()[-1])
        assert not server.requests
    assert pushed["failures"] == {
        "forbidden": ["HfHubHTTPError", 403],
        "exists": ["HfHubHTTPError", 409],
        "absent": ["RepositoryNotFoundError", 404],
        "revision": ["RevisionNotFoundError", 404],
        "entry": ["RemoteEntryNotFoundError", 404],
        "hidden": ["RepositoryNotFoundError", 401],
    }
    assert pushed["tags"] == {"v1": pushed["commit"]}
    assert pushed["no_op"] == pushed["head"]
    assert pushed["pull_request"][1] == "refs/pr/1"
    assert pushed["files"] == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert pushed["infos"] == [False, True]
    assert pushed["who"] == "tester"
    assert loaded.pop("stream") == list(range(10))
    assert loaded == offline
    assert loaded["values"] == pushed["values"]
    assert loaded["slides"] == {"train": ["train-0", "train-1"], "val": ["val-0", "val-1"]}
    assert (loaded["tiles"], loaded["pixel"]) == (list(range(10)), [200, 200, 200])
    assert loaded["snapshot"] == pushed["commit"]


@pytest.fixture
def server(tmp_path):
    with HubServer(tmp_path / "hub") as running:
        repository = running.repository("tester/toy")
        repository.create(private=False)
        repository.write_commit("refs/heads/main", {"a b.txt": repository.store(b"0123456789")}, "toy")
        yield running


def ask(server, path, *, method="GET", body=None, **headers):
    """Returns (status, headers, body) of a request."""
    request = urllib.request.Request(f"{server.url}{path}", method=method, data=body, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.mark.parametrize(
    ("wanted", "status", "content", "content_range"),
    [
        (None, 200, b"0123456789", None),
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
    ],
)
def test_downloads_ranges(server, wanted, status, content, content_range):
    headers = {} if wanted is None else {"Range": wanted}
    answer = ask(server, "/tester/toy/resolve/main/a%20b.txt", **headers)
    assert (answer[0], answer[2], answer[1]["Content-Range"]) == (status, content, content_range)
    repository = server.repository("tester/toy")
    assert answer[1]["X-Repo-Commit"] == repository.resolve("main")
    # git's own id of a file with these ten bytes
    git_id = subprocess.run(
        ["git", "hash-object", "--stdin"], input=b"0123456789", capture_output=True, check=True
    ).stdout.decode()
    assert answer[1]["ETag"] == f'"{git_id.strip()}"'


def test_head_sends_the_length_and_no_body(server):
    status, headers, body = ask(server, "/tester/toy/resolve/main/a%20b.txt", method="HEAD")
    assert (status, headers["Content-Length"], body) == (200, "10", b"")


def test_errors_carry_the_codes_that_clients_read(server):
    cases = {
        "/tester/none/resolve/main/x": "RepoNotFound",
        "/tester/toy/resolve/v9/x": "RevisionNotFound",
        "/tester/toy/resolve/main/x": "EntryNotFound",
        "/api/models/tester/toy/tree/main/absent": "EntryNotFound",
    }
    token = {"Authorization": f"Bearer {TOKEN}"}
    assert {path: ask(server, path, **token)[1]["X-Error-Code"] for path in cases} == cases
    assert ask(server, "/nothing/here/at/all")[0] == 404


def test_refuses_a_foreign_token_and_a_wrong_upload(server):
    assert ask(server, "/api/whoami-v2", Authorization="Bearer hf_other")[0] == 401
    assert ask(server, f"/large-files/{'0' * 64}", method="PUT", body=b"x")[0] == 400


def test_a_commit_on_an_outdated_parent_is_refused(server):
    repository = server.repository("tester/toy")
    parent = repository.resolve("main")
    repository.write_commit("refs/heads/main", repository.files(), "in between")
    body = json.dumps({"key": "header", "value": {"summary": "late", "parentCommit": parent}}).encode()
    path = "/api/models/tester/toy/commit/main"
    assert ask(server, path, method="POST", body=body, Authorization=f"Bearer {TOKEN}")[0] == 412


def test_lists_folders_and_files(server):
    repository = server.repository("tester/toy")
    files = {name: repository.store(name.encode()) for name in ("README.md", "slides/a.txt", "slides/deep/b.txt")}
    repository.write_commit("refs/heads/main", files, "folders")

    def paths(suffix):
        return [entry["path"] for entry in json.loads(ask(server, f"/api/models/tester/toy/tree/main{suffix}")[2])]

    assert paths("") == ["README.md", "slides"]
    assert paths("/slides") == ["slides/a.txt", "slides/deep"]
    assert paths("?recursive=True") == ["README.md", "slides", "slides/a.txt", "slides/deep", "slides/deep/b.txt"]


def test_runs_as_a_script(tmp_path):
    script = Path(__file__).with_name("hub_server.py")
    command = [sys.executable, str(script), "--port", "0", "--root", str(tmp_path / "hub")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        address = process.stdout.readline().strip().removeprefix("export HF_ENDPOINT=")
        assert address.startswith("http://127.0.0.1:")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(f"{address}/api/whoami-v2", headers={"Authorization": f"Bearer {TOKEN}"})
        assert json.loads(opener.open(request, timeout=10).read())["name"] == "tester"
    finally:
        process.terminate()
        process.wait(timeout=10)
        process.stdout.close()
