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

from .check_export import RESULTS_FOLDER, relative_imports
from .model_card import build_model_card

logger = logging.getLogger(__name__)

_MODEL_PATTERNS = (
    *("config.json", "model*.safetensors", "model*.safetensors.index.json", "*processor_config.json"),
    *("adapter_config.json", "adapter_model.safetensors"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
)
_CARD, _INFO = "README.md", "dre_slcl_dataset.json"
_SHOWN_PICTURE = re.compile(r"\]\((previews/[\w.-]+\.jpg)\)")
_PLACE = "path/or/repository"  # what a dataset's card writes where its place belongs
# What a build leaves in its folder, or a download, and what is not for publishing.
_STAYS_BEHIND = frozenset(
    [
        *(".parts", "refused.jsonl", "summary.json", "summary.md", "previews", "thumbnails", "masks"),
        *(".gitattributes", ".cache"),
    ]
)


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
        `list[Path]`: the files written, flat in `out_dir` but for those of `.eval_results`, mode 0644.

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
            config,
            repo_id=repo_id,
            metrics=metrics,
            data_statement=data_statement,
            datasets=datasets,
            has_adapter=(model_dir / "adapter_config.json").is_file(),
        )
        (out_dir / "README.md").write_text(str(card), encoding="utf-8")
    known = {path.name for path in sources} | {"__pycache__", RESULTS_FOLDER}
    left_out = sorted({path.name for path in model_dir.iterdir()} - known)
    if left_out:
        logger.warning("Not published, because a model repository does not need it: %s", ", ".join(left_out))
    for source in sorted((model_dir / RESULTS_FOLDER).glob("*.yaml")):
        (out_dir / RESULTS_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(source, out_dir / RESULTS_FOLDER / source.name)
    written = sorted(path for path in out_dir.rglob("*") if path.is_file())
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


def gather_dataset(
    dataset_dir: str | Path, out_dir: str | Path, *, repo_id: str | None = None, include_previews: bool = False
) -> list[Path]:
    """Gathers what the Hub needs of a slide dataset in `out_dir`: data shards, card, geometry and the card's picture.

    Working files (`.parts`), refusals and summaries stay behind: they may hold paths of this machine.

    Args:
        dataset_dir (`str` or `Path`): folder written by `dre-slcl tiles`.
        out_dir (`str` or `Path`): an empty or absent folder, which receives the card and links to all other files.
        repo_id (`str`, *optional*): `namespace/name`; stands in the card's examples then.
        include_previews (`bool`, defaults to `False`): also the pictures of the tile grids.

    Returns:
        `list[Path]`: what lies in `out_dir` now.

    Raises:
        PublishError: if the dataset is unfinished or damaged, or the folder holds something that no build has written.
    """
    source, out_dir = Path(dataset_dir).resolve(), Path(out_dir)
    files = _finished_files(source)
    _refuse_strangers(source, files)
    card = (source / _CARD).read_text(encoding="utf-8") if (source / _CARD).is_file() else None
    wanted = [_INFO, *files, *_SHOWN_PICTURE.findall(card or "")]
    if include_previews:
        wanted += [f"previews/{path.name}" for path in source.glob("previews/*.jpg")]
    gathered = []
    for name in sorted({name for name in wanted if (source / name).is_file()}):
        link = out_dir / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source / name)
        gathered.append(link)
    if card is not None:
        (out_dir / _CARD).write_text(card.replace(_PLACE, repo_id or _PLACE), encoding="utf-8")
        gathered.append(out_dir / _CARD)
    return gathered


def _finished_files(source: Path) -> list[str]:
    """Returns the data files of a finished dataset, all of which are there in full."""
    if not (source / _INFO).is_file():
        raise PublishError(f"{source}: no {_INFO}, so no finished slide dataset; run `dre-slcl tiles`")
    info = read_json(source / _INFO)
    files = info.get("files", {}) if isinstance(info, dict) else {}
    if not any(name.startswith("slides/") for name in files):
        raise PublishError(f"{source / _INFO}: names no `slides` table; run `dre-slcl tiles` again")
    if info.get("share"):
        raise PublishError(f"{source}: is one machine's share of a dataset; join the shares, and publish the whole")
    for name, size in files.items():
        found = (source / name).stat().st_size if (source / name).is_file() else None
        if found != size:
            raise PublishError(f"{source / name}: expected {size} bytes, found {found}; run `dre-slcl tiles` again")
    return list(files)


def _refuse_strangers(source: Path, files: Sequence[str]) -> None:
    """Refuses what is not from a build: nobody has checked it, and a stranger's file may be about patients."""
    found = {path.name for path in source.iterdir()} - _STAYS_BEHIND - {_CARD, _INFO, "slides", "tiles"}
    for folder in ("slides", "tiles"):
        found |= {f"{folder}/{path.name}" for path in source.glob(f"{folder}/*")} - set(files)
    if found:
        raise PublishError(
            f"{source}: holds {', '.join(sorted(found))}, which no build has written; move it out of the dataset"
        )
