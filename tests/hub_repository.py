# SPDX-License-Identifier: Apache-2.0
"""The repositories of the stand-in Hub (`hub_server.py`): blobs by SHA-256, one JSON file per commit, and refs."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


class HubError(Exception):
    """An answer other than success: HTTP `status`, the Hub's error `code` (or `None`) and a message."""

    def __init__(self, status: int, code: str | None, message: str, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.commit = status, code, message, commit


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit: SHA-256 of the content, the git object id, the size in bytes, stored as large file?"""

    sha256: str
    git_oid: str
    size: int
    is_large: bool

    @property
    def etag(self) -> str:
        """What the Hub sends as ETag: SHA-256 for large files, the git object id otherwise."""
        return self.sha256 if self.is_large else self.git_oid

    @property
    def large_info(self) -> dict[str, Any] | None:
        """The `lfs` field of a listing, `None` for regular files."""
        return {"oid": self.sha256, "size": self.size, "pointerSize": 134} if self.is_large else None


def git_blob_id(content: bytes) -> str:
    """Returns git's object id of a file with this content (40 hex digits)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class HubRepository:
    """One repository: commits that map paths to files, and refs (`refs/heads/*`, `refs/tags/*`, `refs/pr/*`)."""

    def __init__(self, folder: Path, blobs: Path, repo_type: str, repo_id: str) -> None:
        self.folder, self.blobs, self.repo_type, self.repo_id = folder, blobs, repo_type, repo_id

    @property
    def exists(self) -> bool:
        """Whether it was created."""
        return (self.folder / "repo.json").is_file()

    @property
    def state(self) -> dict[str, Any]:
        """`private` (bool), `created` (ISO time) and `refs` (full ref name -> commit id)."""
        return json.loads((self.folder / "repo.json").read_text(encoding="utf-8"))

    def save(self, state: dict[str, Any]) -> None:
        """Writes `state` to the disk."""
        (self.folder / "repo.json").write_text(json.dumps(state), encoding="utf-8")

    def create(self, *, private: bool) -> None:
        """Creates the repository with one commit that holds `.gitattributes`, as the Hub does."""
        self.folder.mkdir(parents=True)
        self.save({"private": private, "created": _now(), "refs": {}})
        self.write_commit("refs/heads/main", {".gitattributes": self.store(b"*.safetensors filter=lfs\n")}, "initial")

    def store(self, content: bytes, *, is_large: bool = False) -> StoredFile:
        """Stores a file's content and returns its description."""
        digest = hashlib.sha256(content).hexdigest()
        (self.blobs / digest).write_bytes(content)
        return StoredFile(digest, git_blob_id(content), len(content), is_large)

    def ref_name(self, revision: str) -> str | None:
        """Returns the full name of the ref that `revision` means, or `None`."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.state["refs"]), None)

    def resolve(self, revision: str) -> str:
        """Returns the commit id of a branch, tag, pull request or commit id.

        Raises:
            HubError: RevisionNotFound.
        """
        if re.fullmatch(r"[0-9a-f]{40}", revision) and (self.folder / f"{revision}.json").is_file():
            return revision
        if (name := self.ref_name(revision)) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.state["refs"][name]

    def commit(self, revision: str) -> dict[str, Any]:
        """Returns the commit `revision` resolves to: `id`, `parent`, `title`, `date` and `files`."""
        return json.loads((self.folder / f"{self.resolve(revision)}.json").read_text(encoding="utf-8"))

    def files(self, revision: str = "main") -> dict[str, StoredFile]:
        """Returns the files of `revision` by path."""
        return {path: StoredFile(**entry) for path, entry in sorted(self.commit(revision)["files"].items())}

    def read(self, revision: str, path: str) -> bytes:
        """Returns the content of a file."""
        return (self.blobs / self.files(revision)[path].sha256).read_bytes()

    def write_commit(self, ref: str, files: Mapping[str, StoredFile], title: str) -> str:
        """Writes a commit on top of `ref` and moves `ref` to it; returns its id (40 hex digits)."""
        state = self.state
        commit = {
            "parent": state["refs"].get(ref),
            "title": title,
            "date": _now(),
            "files": {path: asdict(file) for path, file in sorted(files.items())},
        }
        identifier = hashlib.sha1(json.dumps(commit).encode(), usedforsecurity=False).hexdigest()
        (self.folder / f"{identifier}.json").write_text(json.dumps({"id": identifier, **commit}), encoding="utf-8")
        state["refs"][ref] = identifier
        self.save(state)
        return identifier

    def listing(self, revision: str, folder: str, *, recursive: bool, expand: bool) -> list[dict[str, Any]]:
        """Returns the entries below `folder` ("" for all) in the form of the Hub's `tree` answer."""
        commit, prefix = self.commit(revision), f"{folder}/" if folder else ""
        last = {"id": commit["id"], "title": commit["title"], "date": commit["date"]}
        extra = {"lastCommit": last, "securityFileStatus": None} if expand else {}
        entries: dict[str, dict[str, Any]] = {}
        for path, file in self.files(revision).items():
            if not path.startswith(prefix):
                continue
            parents = [str(parent) for parent in reversed(Path(path).parents) if str(parent) != "."]
            for parent in (parent for parent in parents if parent.startswith(prefix)):
                entries[parent] = {"type": "directory", "oid": git_blob_id(parent.encode()), "size": 0, "path": parent}
            large = {"lfs": file.large_info} if file.is_large else {}
            entries[path] = {"type": "file", "oid": file.git_oid, "size": file.size, "path": path, **large}
        if not entries and folder:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}", commit["id"])
        depth = prefix.count("/")
        return [{**e, **extra} for e in entries.values() if recursive or e["path"].count("/") == depth]

    def info(self, revision: str) -> dict[str, Any]:
        """Returns the Hub's description of the repository at `revision`."""
        commit, state, files = self.commit(revision), self.state, self.files(revision)
        card = self.read(revision, "README.md").decode() if "README.md" in files else ""
        head = card.split("\n---", 1)[0] if card.startswith("---") else ""
        fields = {k: v.strip() for k, _, v in (line.partition(": ") for line in head.splitlines())}
        siblings = [
            {"rfilename": path, "size": file.size, "blobId": file.git_oid, "lfs": file.large_info and
             {"sha256": file.sha256, "size": file.size, "pointerSize": 134}}
            for path, file in files.items()
        ]  # fmt: skip
        return {
            "id": self.repo_id, "modelId": self.repo_id, "author": self.repo_id.split("/")[0], "sha": commit["id"],
            "lastModified": commit["date"], "createdAt": state["created"], "private": state["private"],
            "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
            "pipeline_tag": fields.get("pipeline_tag"), "library_name": fields.get("library_name"),
        }  # fmt: skip


def apply_operation(repository: HubRepository, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
    """Applies one operation of a commit to `files`."""
    path = value["path"]
    if key == "file":
        files[path] = repository.store(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        files[path] = repository.store((repository.blobs / value["oid"]).read_bytes(), is_large=True)
    else:
        doomed = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
        if not doomed:
            raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
        for name in doomed:
            del files[name]
