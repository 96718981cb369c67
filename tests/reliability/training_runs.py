# SPDX-License-Identifier: Apache-2.0
"""Training runs of a second for campaigns: forked from a process that has imported everything, and their digests.

Runs are started as a user starts them, by the command line with a file of settings, and looked at from outside: exit
status, log, files. Only the digest of a finished run is taken inside, of all that it holds in memory. No gradient is
computed in the process that forks, because the threads of autograd do not survive it.
"""

import contextlib
import faulthandler
import gc
import hashlib
import importlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

# Before Arrow and BLAS are imported: their threads, too, may hold a lock at the moment of a fork.
os.environ |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml
from matplotlib.figure import Figure

from dre_slcl.training.checkpoint import CheckpointError, validate_checkpoint
from dre_slcl.training.metrics_log import read_metrics
from dre_slcl.training.train import main
from dre_slcl.training.trainer import Trainer
from modeling_dre_slcl.atomic_files import TEMPORARY_PREFIX

from .. import tiny_dataset

TIMES = ("seconds", "per_second", "mb", "memory")  # how names of measurements end that differ from run to run
SETTINGS = {"num_steps": 6, "finalize_steps": 2, "checkpoint_steps": 2, "codebook_refits": [3], "bank_mode": "full"}
CRASHED = 70  # exit status of a run that ended with a traceback
WAIT_SECONDS = 90
_prepared = []  # the folder of dataset and text model, which campaigns in one process share


def prepare(root, **changes):
    """Makes ready to fork runs, unless that was done in this process; returns settings of runs below `root`.

    Writes a dataset and a text model. The first run tells which modules a run imports on its way; they are imported
    here before others are forked.
    """
    if not _prepared:
        torch.set_num_threads(1)
        with Path(os.devnull).open("w") as nothing, contextlib.redirect_stderr(nothing):
            tiny_dataset.write_dataset(root / "data")
            tiny_dataset.write_text_model(root / "text")
        _prepared.append(root)
        _import_all(root)
    return tiny_dataset.train_settings(_prepared[0], root / "out") | SETTINGS | changes


def _import_all(root):
    settings, modules = tiny_dataset.train_settings(root, root / "first") | SETTINGS, root / "modules"

    def tell_modules():
        after(Trainer, "run", lambda trainer, result: modules.write_text("\n".join(sorted(sys.modules))))

    expect_success(settings, tell_modules)
    remove(settings)
    for name in modules.read_text().splitlines():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is never looked at again is never copied in a fork


def start(settings, patch=None):
    """Forks a run, which calls `patch` first; returns its process id. Its log is beside its folder, `<folder>.log`."""
    process = os.fork()
    if not process:
        train_here(settings, patch)
    return process


def train_here(settings, patch=None):
    """Trains in this process, which ends with it."""
    beside, status = _beside(settings), CRASHED
    try:
        config = Path(f"{beside}.yaml")
        config.write_text(yaml.safe_dump(settings))
        log = os.open(f"{beside}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable(log)
        logging.root.handlers.clear()  # those of the campaign; the command line sets its own
        after(Trainer, "run", lambda trainer, result: _tell_state(trainer, Path(f"{beside}.state")))
        _leave_drawing_out()
        if patch is not None:
            patch()
        status = main(["--config", str(config)])
    except SystemExit as error:
        status = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        os._exit(status)


def end(process, seconds=WAIT_SECONDS):
    """Waits for a run; returns its exit status, or minus the signal that ended it.

    Raises:
        RuntimeError: if it hangs; it is killed then.
    """
    deadline = time.monotonic() + seconds
    while not is_over(process):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGABRT)  # faulthandler writes the stack
            os.waitpid(process, 0)
            raise RuntimeError(f"A training run hung for {seconds} seconds; where, its log says.")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def is_over(process):
    """Whether a run has ended; it can still be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_until(condition, process):
    """Waits until a condition holds; returns False if the run ends before."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if is_over(process) or time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def run(settings, patch=None, seconds=WAIT_SECONDS):
    """Runs to the end; returns the exit status."""
    return end(start(settings, patch), seconds)


def expect_success(settings, patch=None, seconds=WAIT_SECONDS):
    """Runs to the end; returns the digest of what it leaves.

    Raises:
        RuntimeError: with the log, if it fails.
    """
    status = run(settings, patch, seconds)
    if status:
        raise RuntimeError(f"Training ended with {status}: {log_of(settings)[-3000:]}")
    return digest(settings)


def after(owner, name, action):
    """Calls `action(self, result)` after each call of a method; in a process that was forked for it."""
    method = getattr(owner, name)

    def call(self, *arguments, **options):
        result = method(self, *arguments, **options)
        action(self, result)
        return result

    setattr(owner, name, call)


def replace_everywhere(function, substitute):
    """Puts another function in its place, under whatever name a module of ours imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("dre_slcl.", "modeling_dre_slcl")):
            for key, value in list(vars(module).items()):
                if value is function:
                    setattr(module, key, substitute)


def _leave_drawing_out():
    """Pictures become files of a usual size without content: drawing two takes five times as long as all else.

    Most kills would fall into matplotlib instead of into training.
    """
    Figure.add_subplot = lambda figure, *arguments, **options: mock.MagicMock()
    Figure.savefig = lambda figure, path, **options: Path(path).write_bytes(bytes(64 << 10))


def share_out(work, shares):
    """Calls `work(share)` for each share in a process of its own; returns the results, which must be JSON."""
    pipes = []
    for share in shares:
        reader, writer = os.pipe()
        process = os.fork()
        if not process:
            try:
                os.close(reader)
                with os.fdopen(writer, "w") as handle:
                    json.dump(work(share), handle)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                raise
            finally:
                os._exit(0)
        os.close(writer)
        pipes.append((process, reader))
    results = []
    for process, reader in pipes:
        with os.fdopen(reader) as handle:
            results.append(json.loads(handle.read() or "null"))
        os.waitpid(process, 0)
    if None in results:
        raise RuntimeError("A share of the campaign failed; its traceback is above.")
    return results


def _beside(settings):
    """Log, settings and digest of a run lie beside its folder; beside its file system if that is small."""
    output_dir = Path(settings["output_dir"])
    return output_dir.parent if output_dir.parent.is_mount() else output_dir


def log_of(settings):
    return Path(f"{_beside(settings)}.log").read_text(encoding="utf-8", errors="replace")


def remove(settings):
    """Removes a run and what was written beside its folder."""
    shutil.rmtree(settings["output_dir"], ignore_errors=True)
    for suffix in (".log", ".state", ".yaml"):
        Path(f"{_beside(settings)}{suffix}").unlink(missing_ok=True)


def checkpoints(settings):
    """Folders of checkpoints, oldest first."""
    return sorted((Path(settings["output_dir"]) / "checkpoints").glob("step-*"))


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def valid_steps(settings):
    """Steps of the checkpoints that are whole, in order."""
    found = []
    for path in checkpoints(settings):
        with contextlib.suppress(CheckpointError):
            validate_checkpoint(path)
            found.append(step_of(path))
    return found


def left_behind(settings):
    """What temporary files and folders are below the folder of a run."""
    return sorted(path.name for path in Path(settings["output_dir"]).rglob(".*"))


def in_commit(settings):
    """Whether a checkpoint is being written, or was when the run was killed."""
    return any((Path(settings["output_dir"]) / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"))


def digest(settings):
    """Hash of all that a finished run held in memory and left: state, metrics but for times, final model."""
    output_dir = Path(settings["output_dir"])
    summary = {"state": Path(f"{_beside(settings)}.state").read_text(), "metrics": metrics_of(settings)}
    for path in sorted((output_dir / "model").iterdir()):
        summary[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()


def metrics_of(settings):
    rows = read_metrics(Path(settings["output_dir"]) / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.endswith(TIMES)} for row in rows]


# Of the bank's buffers, what only tells of it: how far the latest step moved it, and a table that has room to spare.
# Metrics are compared on their own.
TELLING = ("drift_sums", "step_counts")


def _tell_state(trainer, path):
    """Writes a hash of each tensor of the weights, the optimizer and the memory bank."""
    model, names = trainer.unwrapped, {parameter: name for name, parameter in trainer.unwrapped.named_parameters()}
    bank = {name: value for name, value in model.memory_bank.named_buffers() if name not in TELLING}
    tensors = dict(model.state_dict()) | {f"bank.{name}": value for name, value in bank.items()}
    for parameter, state in trainer.optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{key}": torch.as_tensor(value) for key, value in state.items()}
    hashes = {}
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        hashes[name] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(hashes, indent=1))
