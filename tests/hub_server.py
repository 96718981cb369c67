# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub on 127.0.0.1, so that publishing and loading are tested without a network.

It speaks the part of the Hub's HTTP interface that `huggingface_hub`, `transformers`, `datasets` and `evaluate` use
for model, dataset and Space repositories: creating, committing (regular and large files), branches, tags, pull
requests, listing, downloading with ranges, private repositories, tokens. Repositories live in a folder as
content-addressed blobs and one JSON file per commit. Not there: Xet storage, running Spaces, discussions, search.

**In a test.** The clients read their settings when they are imported, so they run in processes of their own:

```python
with HubServer(tmp_path / "hub") as server:
    home = tmp_path / "home"                                  # the client's cache, shared by the calls below
    run_client("from transformers import AutoModel; ...", server.environment(home), hide=["modeling_dre_slcl"])
    server.requests.clear()
    run_client("from transformers import AutoModel; ...", server.environment(home, offline=True))
    assert not server.requests                                # offline means offline
```

`hide` makes packages unimportable in the client, as on a machine where ours is not installed; `arguments` are the
client's `sys.argv[1:]`; what the client writes to stdout is returned. The token of `environment` may write to the
namespaces given as `namespaces` (default `tester`); others answer 403. `server.repository("tester/name")` shows what
was stored: `.files("main")` maps paths to `StoredFile`, `.read("main", path)` gives bytes.

**By hand.** `python tests/hub_server.py --port 8700 --root FOLDER` prints the environment variables to set.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

if __package__:
    from .hub_repository import HubError, HubRepository, apply_operation
else:  # run as a script
    from hub_repository import HubError, HubRepository, apply_operation

TOKEN = "hf_dummy"
_LARGE_SUFFIXES = {".safetensors", ".parquet", ".arrow", ".bin", ".jpg", ".png", ".h5"}
_LARGE_BYTES = 10 << 20


_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_PLAIN = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("GET", _REPO + r"(?:/revision/(?P<revision>[^/]+))?", "repo_info"),
    ("GET", _REPO + r"/refs", "list_refs"),
    ("GET", _REPO + r"/commits/(?P<revision>[^/]+)", "list_commits"),
    ("GET", _REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "list_tree"),
    ("POST", _REPO + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", _REPO + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", _REPO + r"/commit/(?P<revision>[^/]+)", "create_commit"),
    ("POST", _REPO + r"/branch/(?P<name>[^/]+)", "create_branch"),
    ("POST", _REPO + r"/tag/(?P<revision>[^/]+)", "create_tag"),
    ("POST", _PLAIN + r"\.git/info/lfs/objects/batch", "large_file_batch"),
    ("PUT", r"/large-files/(?P<name>[0-9a-f]{64})", "upload_large_file"),
    ("GET", _PLAIN + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
]


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; each method named in `_ROUTES` answers one kind of request."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the test output clean; `HubServer.requests` has the log."""

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.body, self.query = self._read_body(), {k: v[-1] for k, v in parse_qs(url.query).items()}
        self.server.hub.requests.append(f"{self.command} {self.path}")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for wanted, pattern, name in _ROUTES:
                if wanted == method and (match := re.fullmatch(pattern, url.path)):
                    fields = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    with self.server.hub.lock:
                        answer = getattr(self, name)(**self._open_repository(fields))
                    break
            else:
                raise HubError(404, None, f"the stand-in has no {method} {url.path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message, "X-Repo-Commit": error.commit}
            body = json.dumps({"error": error.message, "errors": [{"message": error.message}]}).encode()
            self._answer(error.status, body, {k: v for k, v in headers.items() if v})
        else:
            if answer is not None:
                self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch  # noqa: N815 (names that http.server calls)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _has_token(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given != TOKEN:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return bool(given)

    def _open_repository(self, fields: dict[str, str]) -> dict[str, Any]:
        """Replaces `kind` and `repo` by the repository, if this client may see it and do what it asks for."""
        kind, repo_id = fields.pop("kind", "models"), fields.pop("repo", None)
        if repo_id is None:
            return fields
        repository = self.server.hub.repository(repo_id, kind[:-1])
        if not repository.exists or (repository.state["private"] and not self._has_token):
            raise HubError(404 if self._has_token else 401, "RepoNotFound", "Repository not found")
        if self.command in {"POST", "DELETE"} and "/paths-info/" not in self.path:
            self._check_write(repo_id)
        return {"repository": repository, **fields}

    def _check_write(self, repo_id: str) -> None:
        if not self._has_token:
            raise HubError(401, None, "Invalid username or password.")
        if repo_id.split("/")[0] not in self.server.hub.namespaces:
            raise HubError(403, None, f"You don't have the rights to write to {repo_id}")

    def _named_repository(self) -> HubRepository:
        payload = json.loads(self.body)
        repo_id = f"{payload.get('organization') or self.server.hub.namespaces[0]}/{payload['name']}"
        self._check_write(repo_id)
        return self.server.hub.repository(repo_id, payload.get("type") or "model")

    def create_repo(self) -> dict[str, Any] | None:
        repository, payload = self._named_repository(), json.loads(self.body)
        prefix = "" if repository.repo_type == "model" else f"{repository.repo_type}s/"
        answer = {"url": f"{self.server.hub.url}/{prefix}{repository.repo_id}", "name": repository.repo_id}
        if repository.exists:
            self._answer(409, json.dumps({"error": "You already created this repo", **answer}).encode(), {})
            return None
        repository.create(private=payload.get("visibility") == "private")
        return answer

    def delete_repo(self) -> dict[str, Any]:
        (self._named_repository().folder / "repo.json").unlink()
        return {}

    def validate_yaml(self) -> dict[str, Any]:
        content = json.loads(self.body)["content"]
        if not content.startswith("---"):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        head, *rest = content.removeprefix("---").split("\n---", 1)
        if not rest or "\t" in head:
            raise HubError(400, None, "the metadata at the top of README.md is not closed, or not YAML")
        return {"errors": [], "warnings": []}

    def whoami(self) -> dict[str, Any]:
        if not self._has_token:
            raise HubError(401, None, "Invalid username or password.")
        user, *organizations = self.server.hub.namespaces
        return {"type": "user", "name": user, "orgs": [{"name": name} for name in organizations], "auth": {}}

    def repo_info(self, repository: HubRepository, revision: str = "main") -> dict[str, Any]:
        return repository.info(revision)

    def list_refs(self, repository: HubRepository) -> dict[str, Any]:
        groups: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "pr": []}
        for ref, commit in repository.state["refs"].items():
            _, group, name = ref.split("/", 2)
            groups[group].append({"name": name, "ref": ref, "targetCommit": commit})
        return {"branches": groups["heads"], "tags": groups["tags"], "converts": [], "pullRequests": groups["pr"]}

    def list_commits(self, repository: HubRepository, revision: str) -> list[dict[str, Any]]:
        commits, identifier = [], repository.resolve(revision)
        while identifier:
            commit = repository.commit(identifier)
            commits.append({"id": identifier, "authors": [], "date": commit["date"], "title": commit["title"],
                            "message": ""})  # fmt: skip
            identifier = commit["parent"]
        return commits

    def list_tree(self, repository: HubRepository, revision: str, path: str = "") -> list[dict[str, Any]]:
        wants = {name: self.query.get(name, "").lower() in {"true", "1"} for name in ("recursive", "expand")}
        return repository.listing(revision, path, **wants)

    def paths_info(self, repository: HubRepository, revision: str) -> list[dict[str, Any]]:
        is_json = "json" in self.headers.get("Content-Type", "")
        fields = json.loads(self.body) if is_json else parse_qs(self.body.decode())
        expand = "true" in str(fields.get("expand")).lower()
        entries = repository.listing(revision, "", recursive=True, expand=expand)
        return [entry for entry in entries if entry["path"] in set(fields["paths"])]

    def preupload(self, repository: HubRepository, revision: str) -> dict[str, Any]:
        stored, files = repository.files(revision), []
        for entry in json.loads(self.body)["files"]:
            path, sample = entry["path"], base64.b64decode(entry["sample"])
            is_large = Path(path).suffix in _LARGE_SUFFIXES or entry["size"] > _LARGE_BYTES or b"\0" in sample
            etag = stored[path].etag if path in stored else None
            mode = "lfs" if is_large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": etag})
        return {"files": files}

    def create_commit(self, repository: HubRepository, revision: str) -> dict[str, Any]:
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        files, ref = repository.files(revision), repository.ref_name(revision)
        if header["value"].get("parentCommit") not in {None, repository.resolve(revision)}:
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        if ref is None:
            raise HubError(400, None, f"{revision} is not a branch")
        for operation in operations:
            apply_operation(repository, files, operation["key"], operation["value"])
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.state["refs"])
        ref = f"refs/pr/{number}" if self.query.get("create_pr") else ref
        prefix = "" if repository.repo_type == "model" else f"{repository.repo_type}s/"
        url = f"{self.server.hub.url}/{prefix}{repository.repo_id}"
        identifier = repository.write_commit(ref, files, header["value"]["summary"])
        return {
            "success": True, "commitOid": identifier, "commitUrl": f"{url}/commit/{identifier}",
            "pullRequestUrl": f"{url}/discussions/{number}",
        }  # fmt: skip

    def _add_ref(self, repository: HubRepository, ref: str, revision: str) -> dict[str, Any]:
        state = repository.state
        if ref in state["refs"]:
            raise HubError(409, None, f"{ref} exists already")
        repository.save({**state, "refs": {**state["refs"], ref: repository.resolve(revision)}})
        return {}

    def create_branch(self, repository: HubRepository, name: str) -> dict[str, Any]:
        payload = json.loads(self.body or b"{}")
        return self._add_ref(repository, f"refs/heads/{name}", payload.get("startingPoint") or "main")

    def create_tag(self, repository: HubRepository, revision: str) -> dict[str, Any]:
        return self._add_ref(repository, f"refs/tags/{json.loads(self.body)['tag']}", revision)

    def large_file_batch(self, repository: HubRepository) -> dict[str, Any]:
        objects = []
        for entry in json.loads(self.body)["objects"]:
            href = f"{self.server.hub.url}/large-files/{entry['oid']}"
            known = (repository.blobs / entry["oid"]).is_file()
            objects.append({**entry, **({} if known else {"actions": {"upload": {"href": href}}})})
        return {"transfer": "basic", "objects": objects}

    def upload_large_file(self, name: str) -> dict[str, Any]:
        if hashlib.sha256(self.body).hexdigest() != name:
            raise HubError(400, None, "the content does not have the announced SHA-256")
        (self.server.hub.blobs / name).write_bytes(self.body)
        return {}

    def download(self, repository: HubRepository, revision: str, path: str) -> None:
        commit, files = repository.resolve(revision), repository.files(revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", f"{path} does not exist", commit)
        file, content = files[path], repository.read(revision, path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(200, content, headers)
        first, last = wanted.groups()
        start = int(first) if first else max(file.size - int(last), 0)
        stop = min(int(last) + 1, file.size) if first and last else file.size
        if start >= stop:
            return self._answer(416, b"", {**headers, "Content-Range": f"bytes */{file.size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        return self._answer(206, content[start:stop], headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: "HubServer"


class HubServer:
    """The stand-in Hub as a context manager; see the module docstring.

    Args:
        root (`str` or `Path`): folder for the repositories; created if absent.
        namespaces (`Sequence[str]`, defaults to `("tester",)`): the user and organizations the token may write to.
        port (`int`, defaults to 0): port on 127.0.0.1; 0 takes a free one.
    """

    def __init__(self, root: str | Path, *, namespaces: Sequence[str] = ("tester",), port: int = 0) -> None:
        self.root, self.namespaces = Path(root), list(namespaces)
        self.blobs = self.root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self

    @property
    def url(self) -> str:
        """The address to use as HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve_forever(self) -> None:
        """Serves until interrupted."""
        self._server.serve_forever()

    def repository(self, repo_id: str, repo_type: str = "model") -> HubRepository:
        """Returns a repository of this Hub, which may not exist yet."""
        return HubRepository(self.root / f"{repo_type}s" / quote(repo_id), self.blobs, repo_type, repo_id)

    def environment(self, home: str | Path, *, offline: bool = False) -> dict[str, str]:
        """Returns the environment of a client process: this Hub, `home` as its cache, and no other setting of ours."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONPATH")
        ours = {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
            **({"HF_HUB_OFFLINE": "1"} if offline else {}),
        }  # fmt: skip
        return {**{k: v for k, v in os.environ.items() if not k.startswith(foreign)}, **ours}


def run_client(
    code: str, environment: Mapping[str, str], *, arguments: Sequence[str] = (), hide: Sequence[str] = ()
) -> str:
    """Runs Python code in a process of its own and returns what it wrote to stdout.

    Raises:
        AssertionError: if the process fails; the message ends with its stderr.
    """
    blocks = "".join(f"import sys; sys.modules[{name!r}] = None\n" for name in hide)
    folder = Path(environment["HF_HOME"])
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", blocks + code, *map(str, arguments)]
    done = subprocess.run(
        command, env=dict(environment), cwd=folder, capture_output=True, text=True, timeout=280, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"the client exited with {done.returncode}:\n{done.stdout}\n{done.stderr[-6000:]}")
    return done.stdout


def main() -> None:
    """Serves by hand."""
    parser = argparse.ArgumentParser(description="Stand-in for the Hugging Face Hub.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--root", type=Path, default=None)
    arguments = parser.parse_args()
    server = HubServer(arguments.root or tempfile.mkdtemp(prefix="hub-"), port=arguments.port)
    settings = server.environment("~/.cache/hub-stand-in")
    lines = [f"export {k}={settings[k]}" for k in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_DISABLE_XET")]
    sys.stdout.write("\n".join([*lines, f"# repositories in {server.root}", ""]))
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
