# SPDX-License-Identifier: Apache-2.0
"""Who tiles which slide when several processes, on one machine or on many, build one dataset in one folder.

A *member* is a process that builds; it touches its file every few seconds. A *claim* is a file that holds a member's
name: who creates it does the work. A claim whose member has died is taken over. Files are created exclusively, which
network file systems keep to, while their locks may say yes to everybody.

Claims only save work. Parts are written atomically and come out equal whoever writes them, so a member that was
thought dead and comes back repeats something and mixes nothing.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from modeling_dre_slcl.atomic_files import write_json

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 120.0
_GRACE_SECONDS = 10.0  # between the creation of a claim and its name in it


def take_claim(folder: Path, name: str, member: str) -> bool:
    """Claims a piece of work, for example a slide, if it is free.

    Args:
        folder (`Path`): the folder of parts.
        name (`str`): the piece of work.
        member (`str`): who claims it.
    """
    path = _claim_path(folder, name)
    path.parent.mkdir(exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(member)
    return True


def release_claim(folder: Path, name: str, member: str) -> None:
    """Gives a claim back, unless it has been taken over."""
    if claim_owner(folder, name) == member:
        _claim_path(folder, name).unlink(missing_ok=True)


def claim_owner(folder: Path, name: str) -> str | None:
    """Returns the member that holds a claim, "" if its name is not written yet, `None` if the work is free."""
    try:
        return _claim_path(folder, name).read_text()
    except FileNotFoundError:
        return None


def _claim_path(folder: Path, name: str) -> Path:
    return folder / "claims" / name


class BuildMember:
    """This process among those that build the same dataset; a context manager.

    Args:
        folder (`Path`): the existing folder of parts.
        build_key (`str`): hash of what is built; all members must build the same.
        stale_seconds (`float`, *optional*): silence after which a member on another machine counts as dead. Members
            on this machine count as dead when their process is.

    Attributes:
        name (`str`): this member's name, which no other has or had.

    Raises:
        BlockingIOError: on entering, if a living member builds something else in the folder.
    """

    def __init__(self, folder: Path, build_key: str, *, stale_seconds: float = STALE_SECONDS) -> None:
        self.name = uuid.uuid4().hex
        self._folder = folder
        self._path = folder / "members" / self.name
        self._content = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "birth": _birth_of(os.getpid()),
            "build": build_key,
        }
        self._stale_seconds = stale_seconds
        self._seen: dict[str, tuple[object, float]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def __enter__(self) -> "BuildMember":
        write_json(self._path, self._content)
        self._thread.start()
        try:
            self._refuse_other_builds()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def others(self) -> list[str]:
        """Returns the other members that are alive, as "host (process 123)"."""
        found = [self._read(name) for name in self._member_names() if name != self.name and self.is_alive(name)]
        return sorted(f"{content['host']} (process {content['pid']})" for content in found if content)

    def is_alive(self, name: str) -> bool:
        """Whether a member is at work, as far as can be told from here and now."""
        content = self._read(name)
        if content is None:
            return False  # members register before they claim, and leave after they gave claims back
        if content["machine"] == self._content["machine"] and content["birth"] != _birth_of(content["pid"]):
            return False
        return not self._is_silent(f"member {name}", self._folder / "members" / name, self._stale_seconds)

    def is_free(self, claim: str) -> bool:
        """Whether a piece of work is unclaimed; the claim of a dead member is removed for it."""
        owner = claim_owner(self._folder, claim)
        if owner is None:
            return True
        path = _claim_path(self._folder, claim)
        is_held = self.is_alive(owner) if owner else not self._is_silent(f"claim {claim}", path, _GRACE_SECONDS)
        if not is_held:
            self._break_claim(path, owner)
        return not is_held

    def clear_dead(self) -> None:
        """Removes the claims and files of members that have died."""
        for path in (self._folder / "claims").glob("*"):
            self.is_free(path.name)
        for name in self._member_names():
            if not self.is_alive(name):
                (self._folder / "members" / name).unlink(missing_ok=True)

    def _break_claim(self, path: Path, owner: str) -> None:
        """Removes a dead member's claim; if another was quicker and it is a new one by now, puts it back."""
        aside = path.with_name(f"{path.name}~{uuid.uuid4().hex[:8]}")
        with suppress(FileNotFoundError):
            path.replace(aside)
            if aside.read_text() != owner:
                with suppress(FileExistsError):
                    os.link(aside, path)
            aside.unlink()
        logger.warning("Took over the work on %s from a process that has died.", path.name)

    def _refuse_other_builds(self) -> None:
        """Waits until every member with another build key has shown a sign of life (an error) or none."""
        start = {name: self._beats(name) for name in self._member_names()}
        while rivals := [name for name in start if self._is_rival(name)]:
            found = [(name, self._read(name) or self._content) for name in rivals]
            # All of them: of two that come at the same time, both look as if they built here.
            alive = sorted(
                f"process {content['pid']} on {content['host']}"
                for name, content in found
                if content["machine"] == self._content["machine"] or self._beats(name) != start[name]
            )
            if alive:
                raise BlockingIOError(
                    f"{self._folder.parent}: another process builds here with other slides, files or options "
                    f"({', '.join(alive)}); wait for it or choose another folder."
                )
            logger.info("Waiting to see whether %d earlier processes still build here.", len(rivals))
            time.sleep(min(HEARTBEAT_SECONDS, self._stale_seconds / 4))

    def _is_rival(self, name: str) -> bool:
        content = self._read(name)
        is_other = name != self.name and content is not None and content["build"] != self._content["build"]
        return is_other and self.is_alive(name)

    def _is_silent(self, key: str, path: Path, seconds: float) -> bool:
        """Whether a file has not been touched for so long, by this process's own clock: clocks of machines differ."""
        try:
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        last, since = self._seen.get(key, (None, 0.0))
        if touched != last:
            self._seen[key] = touched, time.monotonic()
            return False
        return time.monotonic() - since > seconds

    def _beats(self, name: str) -> int | None:
        try:
            return (self._folder / "members" / name).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _member_names(self) -> list[str]:
        names = [path.name for path in (self._folder / "members").glob("*")]
        return sorted(name for name in names if not name.startswith("."))

    def _read(self, name: str) -> dict | None:
        try:
            return json.loads((self._folder / "members" / name).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self._path)
            except FileNotFoundError:
                if self._folder.is_dir():  # somebody thought that this process was dead
                    write_json(self._path, self._content)
            except OSError as error:
                logger.warning("%s: no sign of life could be given (%s).", self._path, error)

    def _leave(self) -> None:
        self._stopped.set()
        self._thread.join()
        for path in (self._folder / "claims").glob("*"):
            release_claim(self._folder, path.name, self.name)
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # the last one of a finished build leaves nothing behind
            self._path.parent.rmdir()
            self._folder.rmdir()


def _machine() -> str:
    """Names what process ids belong to: a running system, and within it a container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(parts)


def _birth_of(process_id: int) -> str | None:
    """Returns a mark of when a process of this machine was started, which tells it from a later one of that number.

    `None` if there is none, or one that has ended and only waits for its parent to notice.
    """
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        return "" if _is_running(process_id) else None


def _is_running(process_id: int) -> bool:
    if os.name == "nt":  # where signal 0 is not a question
        return True
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
