# SPDX-License-Identifier: Apache-2.0
"""Fetches the tests that transformers holds its own models to, from the release that is installed.

They are in transformers' source distribution only. `pip download` brings it once into `.cache/`, from where the test
files are unpacked as a package of their own; nothing of them is kept in this repository.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers

CACHE = Path(__file__).resolve().parents[1] / ".cache"
PACKAGE = "transformers_common_tests"

# What the common tests import that the source distribution leaves out. Nothing that runs here needs more of it.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "distributed_testing_utils.py": (
        "import unittest\n\n\n"
        "def run_distributed(*args, **kwargs):\n    raise unittest.SkipTest('needs several accelerators')\n"
    ),
}
# A top-level package of transformers' checkout.
HUB_OBJECTS = "def url_to_local_path(url, *args):\n    return url\n"


class CommonSuiteUnavailableError(RuntimeError):
    """The source distribution of the installed transformers could not be fetched."""


def common_test_module(name: str) -> ModuleType:
    """Imports one module of the common tests.

    Args:
        name (`str`): the module, such as "test_modeling_common".

    Returns:
        `ModuleType`: the module.

    Raises:
        CommonSuiteUnavailableError: if the tests are not cached and cannot be fetched; it says why.
    """
    folder = str(fetch_common_suite())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"{PACKAGE}.{name}")


def fetch_common_suite() -> Path:
    """Fetches and unpacks the common tests, unless that was done before.

    Returns:
        `Path`: the folder that holds the package of tests.
    """
    folder = CACHE / f"transformers-{transformers.__version__}-tests"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        archive = _download(Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        _unpack(archive, unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another test process was faster
                raise
    return folder


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
    command += ["--retries", "1", "--timeout", "20", "--disable-pip-version-check", "--dest", str(folder)]
    command.append(f"transformers=={transformers.__version__}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired as error:
        raise CommonSuiteUnavailableError("pip did not bring it within four minutes") from error
    archives = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise CommonSuiteUnavailableError(
            f"pip could not bring the source distribution of transformers {transformers.__version__}: {reason}"
        )
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    for name, text in STUBS.items():
        _write(folder / PACKAGE / name, text.encode())
    _write(folder / "utils" / "fetch_hub_objects_for_ci.py", HUB_OBJECTS.encode())
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                _write(folder / PACKAGE / parts[2], tar.extractfile(member).read())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
