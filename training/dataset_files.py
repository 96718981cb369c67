# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the files of a slide dataset, in a folder or on the Hub, by the configurations of its card."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


def has_configuration(dataset: str | Path, name: str) -> bool:
    """Whether a slide dataset has the configuration `name`: one of coordinates only has no `tiles`."""
    from datasets import get_dataset_config_names

    return name in get_dataset_config_names(str(dataset))


def find_files(dataset: str | Path, name: str, split: str) -> Sequence[str]:
    """Returns the Parquet files of one split of one configuration, in the order of their rows.

    Args:
        dataset (`str` or `Path`): folder or Hub repository of a slide dataset.
        name (`str`): its configuration, `"slides"` or `"tiles"`.
        split (`str`): its split.

    Returns:
        sequence of `str`: paths, or addresses that begin with `hf://` and name the commit.

    Raises:
        ValueError: if there is no such configuration or split; it names those that there are.
    """
    from datasets import load_dataset_builder

    files = load_dataset_builder(str(dataset), name).config.data_files
    if split not in files:
        raise ValueError(f"{dataset}: configuration '{name}' has no split '{split}', only {sorted(files)}.")
    return files[split]


def load_split(dataset: str | Path, name: str, split: str) -> "datasets.Dataset":
    """Loads one split of one configuration, memory-mapped.

    A folder is loaded by its files: `load_dataset(folder, name)` finds its cache by the folder's name and the card
    alone, so after a rebuild, or beside another folder of that name, it may give the rows of the other dataset.

    Args:
        dataset (`str` or `Path`): folder or Hub repository of a slide dataset.
        name (`str`): its configuration, `"slides"` or `"tiles"`.
        split (`str`): its split.

    Raises:
        ValueError: if it cannot be loaded.
    """
    from datasets import DownloadConfig, load_dataset

    quiet = DownloadConfig(disable_tqdm=True)
    try:
        if Path(dataset).is_dir():
            files = {split: find_files(dataset, name, split)}
            return load_dataset("parquet", data_files=files, split=split, download_config=quiet)
        return load_dataset(str(dataset), name, split=split, download_config=quiet)
    except ValueError as error:
        raise ValueError(f"{dataset}: configuration '{name}', split '{split}' cannot be loaded ({error}).") from error
