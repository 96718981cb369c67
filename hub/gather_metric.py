# SPDX-License-Identifier: Apache-2.0
"""Gathers a metric of the library `evaluate` as a Space of its own: its code, its card, and the page that shows it.

No network here, and nothing in the given folder is changed or executed.
"""

import shutil
from pathlib import Path

import yaml

from .check_export import Finding, check_entry
from .gather import PublishError

# Beside this package in a checkout as in an installation; not imported, since hub knows nothing of training.
METRICS_FOLDER = Path(__file__).parents[1] / "training" / "metrics"
_APP = """\
import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("{name}.py"))
"""


def find_metric(metric: str | Path) -> Path:
    """The folder of a metric.

    Args:
        metric (`str` or `Path`): one of ours by its name, or the folder of another, which holds `<folder's name>.py`.

    Raises:
        PublishError: if there is no such metric; it names those that there are.
    """
    known = sorted(path.parent.name for path in METRICS_FOLDER.glob("*/README.md"))
    folder = METRICS_FOLDER / metric if str(metric) in known else Path(metric).resolve()
    if not (folder / f"{folder.name}.py").is_file():
        raise PublishError(f"metric {metric}: expected one of {', '.join(known)}, or a folder DIR with DIR/DIR.py")
    return folder


def gather_metric(metric: str | Path, out_dir: str | Path, *, repo_id: str) -> list[Path]:
    """Copies a metric into `out_dir`, and writes the page that a Space shows unless the folder has one.

    Args:
        metric (`str` or `Path`): see `find_metric`.
        out_dir (`str` or `Path`): an empty or absent folder.
        repo_id (`str`): `namespace/name`; stands in the card's example. Its name must be the metric's, since
            `evaluate.load("namespace/name")` looks for `name.py`.

    Returns:
        `list[Path]`: the files written, mode 0644.

    Raises:
        PublishError: if there is no such metric, or the repository has another name.
    """
    folder, out_dir = find_metric(metric), Path(out_dir)
    if repo_id.split("/")[-1] != folder.name:
        raise PublishError(
            f"repository {repo_id}: expected NAMESPACE/{folder.name}; `evaluate.load` finds a metric by that name"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.py", "requirements.txt"):
        for source in folder.glob(pattern):
            if source.name != "__init__.py":
                shutil.copyfile(source, out_dir / source.name)
    if (folder / "README.md").is_file():
        card = (folder / "README.md").read_text(encoding="utf-8")
        (out_dir / "README.md").write_text(card.replace(f"NAMESPACE/{folder.name}", repo_id), encoding="utf-8")
    if not (out_dir / "app.py").is_file():
        (out_dir / "app.py").write_text(_APP.format(name=folder.name), encoding="utf-8")
    written = sorted(out_dir.iterdir())
    for path in written:
        path.chmod(0o644)
    return written


def check_metric(folder: Path, *, repo_id: str) -> list[Finding]:
    """Checks a gathered metric: code that loads elsewhere, no trace of this machine, a card that makes it a Space."""
    findings = [item for path in sorted(folder.rglob("*")) for item in check_entry(path, folder, (repo_id,))]
    needed = ("README.md", "requirements.txt")
    findings += [Finding(name, "is missing; a Space needs it") for name in needed if not (folder / name).is_file()]
    if (folder / "README.md").is_file():
        parts = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
        try:
            metadata = yaml.safe_load(parts[1]) if len(parts) == 3 else None
        except yaml.YAMLError:
            metadata = None
        metadata = metadata if isinstance(metadata, dict) else {}
        if not {"evaluate", "metric"} <= set(metadata.get("tags") or ()) or metadata.get("sdk") != "gradio":
            findings.append(Finding("README.md", "metadata lacks `sdk: gradio` or the tags `evaluate` and `metric`"))
    return findings
