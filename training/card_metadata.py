# SPDX-License-Identifier: Apache-2.0
"""The front matter of a dataset card: what the Hub, its viewer and `datasets` read before they open any file.

Source: the Hub's documentation of dataset cards (`license`, `configs`, `dataset_info`, `size_categories`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

# Identifiers of the Hub under which images are shared; any other licence is `other`, with its name.
_LICENSES = frozenset(
    [
        *("apache-2.0", "mit", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0"),
        *("cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0"),
        *("cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0"),
        *("cdla-permissive-1.0", "cdla-permissive-2.0", "odbl", "odc-by", "pddl", "other", "unknown"),
    ]
)
_DESCRIPTIONS = {"tiles": "one row per tile", "slides": "one row per slide"}


def license_fields(name: str) -> dict[str, str]:
    """Returns `license`, and `license_name` where the Hub has no identifier for it.

    Args:
        name (`str`): licence as the user wrote it, such as "CC BY 4.0".
    """
    identifier = "-".join(name.lower().split())
    if identifier in _LICENSES:
        return {"license": identifier}
    return {"license": "other", "license_name": identifier}


def config_fields(files: Sequence[str], build_key: str) -> list[dict[str, Any]]:
    """Returns `configs`; `tiles` comes first and is the default if it is there.

    Args:
        files (`Sequence[str]`): the dataset's files, relative to its folder.
        build_key (`str`): names this build. `datasets` finds the cache of a folder by the folder's name and this
            entry alone: without the key a rebuilt dataset would load with its old rows.
    """
    configs = []
    for name, description in _DESCRIPTIONS.items():
        splits = dict.fromkeys(file.split("/")[1].split("-")[0] for file in files if file.startswith(f"{name}/"))
        if splits:
            config: dict[str, Any] = {"config_name": name}
            if build_key:
                config["description"] = f"{description}; build {build_key[:16]}"
            config["data_files"] = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in splits]
            configs.append(config)
    configs[0]["default"] = True
    return configs


def info_fields(files: Sequence[str], folder: Path) -> dict[str, Any]:
    """Returns `dataset_info`: columns, and rows and bytes of every split, as the files themselves say.

    Args:
        files (`Sequence[str]`): the dataset's files, relative to `folder`.
        folder (`Path`): where they are.
    """
    infos: list[dict[str, Any]] = []
    for config in config_fields(files, ""):
        name, splits, features = config["config_name"], [], []
        for split in (entry["split"] for entry in config["data_files"]):
            paths = [folder / file for file in files if file.startswith(f"{name}/{split}-")]
            tables = [pq.read_metadata(path) for path in paths]
            num_bytes = sum(path.stat().st_size for path in paths)
            num_rows = sum(table.num_rows for table in tables)
            splits.append({"name": split, "num_bytes": num_bytes, "num_examples": num_rows})
            written = json.loads(tables[0].metadata[b"huggingface"])["info"]["features"]
            features = [{"name": column, **_yaml_feature(feature)} for column, feature in written.items()]
        size = sum(split["num_bytes"] for split in splits)
        sizes = {"download_size": size, "dataset_size": size}
        infos.append({"config_name": name, "features": features, "splits": splits, **sizes})
    infos.sort(key=lambda info: info["config_name"])
    return {"dataset_info": infos if len(infos) > 1 else infos[0]}


def _yaml_feature(feature: dict[str, Any]) -> dict[str, Any]:
    """Says a column as cards do: what `datasets` writes into tables is longer, and loading it takes half a second."""
    rest = {name: value for name, value in feature.items() if name not in ("_type", "feature")}
    if feature["_type"] == "List":
        inner = _yaml_feature(feature["feature"])
        return {"list": inner["dtype"] if list(inner) == ["dtype"] else inner, **rest}
    return rest or {"dtype": feature["_type"].lower()}


def size_category(num_rows: int) -> str:
    """Returns the Hub's category of a number of rows, such as "10K<n<100K"."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = max(0, len(str(max(0, num_rows - 1))) - 3)
    if place == 0:
        return "n<1K"
    return f"{names[place - 1]}<n<{names[place]}" if place < len(names) else "n>1T"
