# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a crash cannot tear: written aside, sealed by a manifest of hashes, renamed; newest valid one wins.

```
<output_dir>/checkpoints/step-00000100/
    model.safetensors               all weights but those of the frozen text model
    optimizer.safetensors           the optimizer's tensors, `<parameter>.<state>`
    average.safetensors             the running average of the weights, with `ema_decay`
    bank-00003-of-00008.safetensors the memory bank of virtual shard 3, one file per shard
    strata-00003-of-00008.safetensors  what each of its tiles is drawn by, in the modes that draw by codeword
    trainer_state.json              step, best validation, and the settings of the run
    manifest.json                   SHA-256 and size of each file above, and of itself; written last
```

No randomness is stored: every random number of a run is a function of its seed and the step. Tensors are safetensors,
the rest JSON; nothing is pickled. Saving and loading are collective: every process calls them, each writes and reads
the shards it owns, and the main process does the rest.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeling_dre_slcl.atomic_files import (
    TEMPORARY_PREFIX,
    commit_folder,
    read_json,
    remove_temporary,
    sha256_file,
    sync_path,
    write_json,
)

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def bank_file(shard: int, num_shards: int) -> str:
    """The file of a virtual shard's part of the memory bank."""
    return f"bank-{shard:05d}-of-{num_shards:05d}.safetensors"


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        folder (`Path`): where they are.
        keep (`int`): how many to keep.
        is_main (`bool`): whether this is the main process.
        barrier (callable): waits for all processes.
    """

    def __init__(self, folder: Path, *, keep: int, is_main: bool, barrier: Callable[[], None]) -> None:
        self.folder, self.keep, self.is_main, self.barrier = folder, keep, is_main, barrier

    def prepare(self) -> None:
        """Makes the folder and removes what a killed run left half-written. Collective."""
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.folder.parent, self.folder.parent.parent):
                sync_path(folder)  # or a power loss may take new folders, with all that is synced in them
            remove_temporary(self.folder)
        self.barrier()

    def save(
        self,
        step: int,
        *,
        tensors: dict[str, dict[str, torch.Tensor]],
        bank_shards: Mapping[str, dict[str, torch.Tensor]],
        bank_links: Mapping[str, Path] | None = None,
        trainer_state: dict[str, Any],
    ) -> None:
        """Writes a checkpoint and rotates old ones out. Collective.

        Args:
            step (`int`): completed steps.
            tensors (`dict`): file name -> tensors; written by the main process.
            bank_shards (`Mapping`): file name -> tensors, of the shards that this process owns.
            bank_links (`Mapping`, *optional*): file name -> file of an older checkpoint that has the same content.
            trainer_state (`dict`): JSON; written by the main process.
        """
        target = self.folder / checkpoint_name(step)
        temporary = self.folder / f"{TEMPORARY_PREFIX}{target.name}"
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.barrier()
        for name, shard in bank_shards.items():
            save_file(shard, temporary / name)
            sync_path(temporary / name)
        for name, source in (bank_links or {}).items():
            _link_or_copy(source, temporary / name)
        self.barrier()
        if self.is_main:
            for name, content in tensors.items():
                save_file(content, temporary / name)
            write_json(temporary / "trainer_state.json", trainer_state)
            files = sorted(path for path in temporary.iterdir())
            known = self._known_files()
            entries = {path.name: _entry(path, known.get(path.stat().st_ino)) for path in files}
            write_json(temporary / MANIFEST, _sealed({"step": step, "files": entries}))
            commit_folder(temporary, target)
            self._rotate()
        self.barrier()

    def newest(self) -> Path | None:
        """Returns the newest valid checkpoint; those that are torn or altered are named in the log and passed over."""
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                validate_checkpoint(path)
            except CheckpointError as error:
                if self.is_main:
                    logger.warning("Passing over a damaged checkpoint: %s", error)
            else:
                return path
        return None

    def _known_files(self) -> dict[int, dict[str, Any]]:
        """Entries of the newest checkpoint's manifest by the number of the file, which a hard link shares."""
        newest = max(self.folder.glob("step-*"), default=None)
        try:
            entries = {} if newest is None else read_json(newest / MANIFEST)["files"]
            return {(newest / name).stat().st_ino: entry for name, entry in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged one, which was passed over
            return {}

    def _rotate(self) -> None:
        """Removes all but the newest checkpoints. The new one was just sealed, so a valid one always remains."""
        for path in sorted(self.folder.glob("step-*"))[: -self.keep]:
            doomed = path.with_name(f"{TEMPORARY_PREFIX}old-{path.name}")
            path.replace(doomed)
            shutil.rmtree(doomed)


def _link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
        sync_path(target)


def _entry(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """The manifest's entry of a file; that of a file which an older manifest knows is not computed again."""
    size = path.stat().st_size
    if known is not None and known["bytes"] == size and path.stat().st_nlink > 1:
        return known
    return {"sha256": sha256_file(path), "bytes": size}


def validate_checkpoint(path: Path) -> None:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: naming the first file that is missing, has another size, or other content.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} has no {MANIFEST}: it was never completed.")
    try:
        manifest = read_json(path / MANIFEST)
        entries = manifest["files"]
        if json.dumps(_sealed(manifest)) != json.dumps(manifest) or manifest["step"] != int(path.name[-8:]):
            raise ValueError("it differs from what was saved")
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged ({error}).") from error
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != size or sha256_file(file) != digest:
            raise CheckpointError(f"{file} differs from what was saved.")


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of all else in it, as its last entry."""
    content = {name: value for name, value in manifest.items() if name != _SEAL}
    return content | {_SEAL: hashlib.sha256(json.dumps(content).encode()).hexdigest()}


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file of a checkpoint onto the CPU.

    Raises:
        CheckpointError: if it is missing, or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file ({error}).") from error


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]
) -> dict[str, torch.Tensor]:
    """Flattens an optimizer's state to `<parameter>.<state>` -> tensor."""
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{names[parameter]}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str], tensors: dict[str, torch.Tensor]
) -> None:
    """Puts back what `optimizer_tensors` returned.

    Raises:
        CheckpointError: if the tensors belong to other parameters.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, _, state = key.rpartition(".")
        if name not in parameters or (state != "step" and value.shape != parameters[name].shape):
            raise CheckpointError(f"The optimizer state `{key}` of the checkpoint fits no parameter of this model.")
        # AdamW keeps its step counters on the CPU.
        device = "cpu" if state == "step" else parameters[name].device
        optimizer.state[parameters[name]][state] = value.to(device)
