# SPDX-License-Identifier: Apache-2.0
"""Gathers what a Hub repository needs in a folder of its own, by an explicit list, so that nothing else goes out.

No network here, and nothing in the given folders is changed or executed.
"""

import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import modeling_dre_slcl
from modeling_dre_slcl.atomic_files import read_json

from .check_export import Finding, check_text, relative_imports
from .model_card import build_model_card

logger = logging.getLogger(__name__)

_MODEL_PATTERNS = (
    *("config.json", "model*.safetensors", "model*.safetensors.index.json", "*processor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
)
_DATASET_PATTERNS = ("README.md", "dre_slcl_dataset.json", "slides/*.parquet", "tiles/*.parquet")
_PREVIEW_PATTERN = "previews/*.jpg"


class PublishError(ValueError):
    """Why nothing was published, in one line, and how to mend it."""


def gather_model(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    repo_id: str,
    metrics: dict[str, Any] | None = None,
    data_statement: str | None = None,
    datasets: Sequence[str] = (),
) -> list[Path]:
    """Copies what the Hub needs of a saved model into `out_dir` and writes the card.

    Args:
        model_dir (`str` or `Path`):
            Where `DreSlclModel.save_pretrained` and `processor.save_pretrained` wrote. A README.md there is taken as
            the card.
        out_dir (`str` or `Path`): an empty or absent folder.
        repo_id (`str`): `namespace/name`, for the card.
        metrics, data_statement, datasets: see `build_model_card`.

    Returns:
        `list[Path]`: the files written, flat in `out_dir`, mode 0644.

    Raises:
        PublishError: if `model_dir` holds no saved model, or both a card and material for one are given.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if not (model_dir / "config.json").is_file():
        raise PublishError(f"{model_dir}: no config.json; give a folder written by `save_pretrained`")
    own_card = model_dir / "README.md"
    if own_card.is_file() and (metrics or data_statement):
        raise PublishError(
            f"{own_card} is used as the card as it is; remove it or drop --metrics and --data-statement"
        )
    data_files = {path for pattern in _MODEL_PATTERNS for path in model_dir.glob(pattern)}
    sources = sorted(data_files | set(_code_files(model_dir, sorted(data_files))))
    sources += [own_card] if own_card.is_file() else []
    out_dir.mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copyfile(source, out_dir / source.name)
    if not own_card.is_file():
        config = read_json(model_dir / "config.json")
        card = build_model_card(
            config, repo_id=repo_id, metrics=metrics, data_statement=data_statement, datasets=datasets
        )
        (out_dir / "README.md").write_text(str(card), encoding="utf-8")
    left_out = sorted({path.name for path in model_dir.iterdir()} - {path.name for path in sources} - {"__pycache__"})
    if left_out:
        logger.warning("Not published, because a model repository does not need it: %s", ", ".join(left_out))
    written = sorted(out_dir.iterdir())
    for path in written:
        path.chmod(0o644)
    return written


def _code_files(model_dir: Path, data_files: Sequence[Path]) -> list[Path]:
    """Returns the code that the JSON files refer to, with everything it imports from its folder.

    All of it comes from one place, so that versions are never mixed: from beside the weights if it is complete there,
    else from the installed package.
    """
    modules = {
        reference.split("--")[-1].split(".")[0]
        for path in data_files
        if path.suffix == ".json"
        for reference in _class_references(read_json(path))
    }
    for folder in (model_dir, Path(modeling_dre_slcl.__file__).parent):
        found = _with_imports(folder, modules)
        if all(path.is_file() for path in found):
            return found
    # What is missing stays missing, and `check_export` names it.
    return [path for path in _with_imports(model_dir, modules) if path.is_file()]


def _class_references(value: Any) -> Iterator[str]:
    """Yields the `module.Class` references of `auto_map` and `custom_pipelines`."""
    if not isinstance(value, dict):
        return
    for references in (value.get("auto_map") or {}).values():
        yield from (item for item in (references if isinstance(references, list) else [references]) if item)
    yield from (entry["impl"] for entry in (value.get("custom_pipelines") or {}).values() if "impl" in entry)


def _with_imports(folder: Path, modules: set[str]) -> list[Path]:
    """Returns the files of `modules` in `folder` and, transitively, of the neighbours they import."""
    found: set[str] = set()
    waiting = set(modules)
    while waiting:
        module = waiting.pop()
        found.add(module)
        path = folder / f"{module}.py"
        if path.is_file():
            waiting |= set(relative_imports(path.read_text(encoding="utf-8"))) - found
    return sorted(folder / f"{module}.py" for module in found)


def gather_dataset(dataset_dir: str | Path, out_dir: str | Path, *, include_previews: bool = False) -> list[Path]:
    """Links what the Hub needs of a slide dataset into `out_dir`: data shards, card and geometry.

    Working files (`.parts`), refusals and summaries stay behind: they hold paths of this machine.

    Args:
        dataset_dir (`str` or `Path`): folder written by `dre-slcl tiles`.
        out_dir (`str` or `Path`): an empty or absent folder, which receives symbolic links.
        include_previews (`bool`, defaults to `False`): also the pictures of the tile grids.

    Returns:
        `list[Path]`: the links.

    Raises:
        PublishError: if the dataset is unfinished or damaged.
    """
    source, out_dir = Path(dataset_dir).resolve(), Path(out_dir)
    if not (source / "dre_slcl_dataset.json").is_file():
        raise PublishError(
            f"{dataset_dir}: no dre_slcl_dataset.json, so no finished slide dataset; run `dre-slcl tiles`"
        )
    for name, size in read_json(source / "dre_slcl_dataset.json").get("files", {}).items():
        found = (source / name).stat().st_size if (source / name).is_file() else None
        if found != size:
            raise PublishError(f"{source / name}: expected {size} bytes, found {found}; run `dre-slcl tiles` again")
    patterns = (*_DATASET_PATTERNS, *((_PREVIEW_PATTERN,) if include_previews else ()))
    links = []
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        link = out_dir / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
        links.append(link)
    return links


def check_dataset(folder: str | Path) -> list[Finding]:
    """Checks a gathered dataset: a card, no local paths in its text, in `path` and in `reason` of `slides`."""
    import pyarrow.parquet as pq

    folder = Path(folder)
    needed = ("README.md", "slides/*.parquet")
    findings = [
        Finding(name, "is missing; run `dre-slcl tiles` again") for name in needed if not list(folder.glob(name))
    ]
    for path in sorted(path for suffix in ("*.md", "*.json") for path in folder.glob(suffix)):
        findings += check_text(path, path.name, path.read_text(encoding="utf-8"))
    for path in sorted(folder.glob("slides/*.parquet")):
        columns = [name for name in ("path", "reason") if name in pq.read_schema(path).names]
        for name, values in pq.read_table(path, columns=columns).to_pydict().items():
            local = [value for value in values if value and re.search(r"(?:^|\s)(?:/|~/|[A-Za-z]:[\\/]|\\\\)", value)]
            if local:
                message = (
                    f"column `{name}` holds {len(local)} paths of this machine; build the dataset again with "
                    "the slides below --slides-root, so that paths are relative to it"
                )
                findings.append(Finding(f"slides/{path.name}", message))
    return findings
