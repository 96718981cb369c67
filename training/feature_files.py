# SPDX-License-Identifier: Apache-2.0
"""Which tile features of TRIDENT, CLAM, AtlasPatch, STAMP and slide2vec lie in a folder, found by their headers.

| tool | file | features | encoder named in |
| --- | --- | --- | --- |
| TRIDENT | `features_<encoder>/<id>.h5` | dataset `features` (N, D) | its attribute `encoder`, or the folder |
| CLAM | `h5_files/<id>.h5`, `pt_files/<id>.pt` | dataset `features` (N, D), or one tensor (N, D) | nowhere |
| AtlasPatch | `patches/<id>.h5` | dataset `features/<encoder>` (N, D) | its name |
| STAMP | `<extractor>-<hash>/<id>.h5` | dataset `feats` (N, D) | file attribute `extractor` |
| slide2vec | `tile_embeddings/<id>.pt` or `.npz` | one tensor or array `features` (N, D) | `<id>.meta.json` |

Features of different encoders are never mixed. Values are read by `foreign_features`.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_dre_slcl.atomic_files import read_json
from modeling_dre_slcl.slide_info import SlideError

from .array_files import npz_shape, open_tensor
from .coordinate_files import NPZ_SUFFIX, hdf5_geometry
from .foreign_worker import read_foreign
from .hdf5_files import MAX_TILES, ForeignFileError, find_dataset, find_group, open_hdf5, read_attributes
from .manifest_checks import is_safe_id, raise_offenders

if TYPE_CHECKING:
    from h5py import Dataset, File

HDF5_SUFFIXES = (".h5", ".hdf5")
HEADER_SECONDS = 60.0
_SUFFIXES = (*HDF5_SUFFIXES, ".pt", ".npz")
_TRIDENT_FOLDER = "features_"
_CLAM_FOLDERS = {"h5_files", "pt_files"}
_MAX_WIDTH = 1 << 16
_MAX_VALUES = (1 << 31) - 1  # of one slide: what a row of an Arrow table can hold


@dataclass(frozen=True)
class FeatureFile:
    """A file with the tile features of a slide, as its header describes it.

    Args:
        slide_id (`str`): the file's stem.
        path (`Path`): the file.
        source_format (`str`): "trident", "clam", "atlaspatch", "stamp" or "slide2vec".
        encoder (`str`, *optional*): the tile encoder, where it is known.
        num_tiles (`int`): N.
        width (`int`): D.
        dataset (`str`): where the features are inside of the file.
    """

    slide_id: str
    path: Path
    source_format: str
    encoder: str | None
    num_tiles: int
    width: int
    dataset: str = "features"


@dataclass(frozen=True)
class FeatureFolder:
    """The usable feature files of a folder, all of one encoder and width, and the slides refused so far.

    Args:
        files (`list[FeatureFile]`): in the order of their slide ids.
        refused (`list[SlideError]`): slides whose file cannot be used, with reasons.
    """

    files: list[FeatureFile]
    refused: list[SlideError] = field(default_factory=list)

    @property
    def encoder(self) -> str | None:
        """The tile encoder, where it is known."""
        return self.files[0].encoder

    @property
    def width(self) -> int:
        """Width D of a tile feature."""
        return self.files[0].width


def open_feature_folder(
    folder: str | Path,
    *,
    encoder: str | None = None,
    width: int | None = None,
    slide_ids: Iterable[str] | None = None,
    isolated: bool = False,
) -> FeatureFolder:
    """Lists the tile features below a folder; reads headers only.

    Other files, and features of whole slides, are passed over. Of CLAM's two files per slide the one with coordinates
    is taken.

    Args:
        folder (`str` or `Path`): a folder of feature files, or any folder above it.
        encoder (`str`, *optional*): take this encoder's features; needed if the folder holds several. Files that name
            none are taken to be of it.
        width (`int`, *optional*): take features of this width; needed if the folder holds several.
        slide_ids (`Iterable[str]`, *optional*): take these slides only.
        isolated (`bool`, *optional*, defaults to `False`): read in another process, which a damaged file may kill or
            keep for ever.

    Returns:
        `FeatureFolder`: at least one file.

    Raises:
        ValueError: if there are no tile features, a slide has several files, or encoders or widths are mixed and the
            arguments do not choose; names the files.
        FileNotFoundError: if there is no such folder.
        ImportError: if h5py is needed and not installed.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of features.")
    wanted = None if slide_ids is None else set(slide_ids)
    found: dict[str, list[FeatureFile]] = defaultdict(list)
    refused: dict[str, SlideError] = {}
    paths = [path for path in _candidates(Path(folder)) if wanted is None or path.stem in wanted]
    names = [path.name for path in paths]
    results = read_foreign(_read_headers, paths, names=names, seconds=HEADER_SECONDS, isolated=isolated)
    for path, headers in zip(paths, results, strict=True):
        slide_id = path.stem
        try:
            asked = _asked_for(headers, path, encoder, width)
        except ForeignFileError as error:
            refused[slide_id] = SlideError(slide_id, error.reason, f"feature file {error}")
            continue
        found[slide_id] += asked
    files = [_choose(slide_id, found[slide_id], Path(folder)) for slide_id in sorted(found) if found[slide_id]]
    if not files:
        raise_offenders(f"{folder} holds no usable tile features", [str(error) for error in refused.values()])
        raise ValueError(f"{folder}: holds no tile features of TRIDENT, CLAM, AtlasPatch, STAMP or slide2vec.")
    _check_alike(files, Path(folder))
    for file in files:
        refused.pop(file.slide_id, None)
    return FeatureFolder(files, list(refused.values()))


def _candidates(folder: Path) -> Iterator[Path]:
    """Yields the files that may hold features, in a fixed order."""
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory) / name
            if path.suffix.lower() in _SUFFIXES and not name.startswith(".") and not name.endswith(NPZ_SUFFIX):
                yield path


def _asked_for(
    headers: list[FeatureFile] | ForeignFileError, path: Path, encoder: str | None, width: int | None
) -> list[FeatureFile]:
    """Returns the features of a file that were asked for; raises what its reader raised, or why they do not fit."""
    if isinstance(headers, ForeignFileError):
        raise headers
    headers = [replace(file, encoder=file.encoder or encoder) for file in headers]
    asked = [file for file in headers if encoder in (None, file.encoder) and width in (None, file.width)]
    for file in asked or headers:
        _check_header(file)
    if headers and not asked:
        other = f"encoder {headers[0].encoder}, width {headers[0].width}"
        raise ForeignFileError("unsupported", f"{path.name}: holds other features than asked for ({other})")
    return asked


def _read_headers(path: Path) -> list[FeatureFile]:
    suffix = path.suffix.lower()
    return _hdf5_headers(path) if suffix in HDF5_SUFFIXES else _flat_headers(path, is_tensor=suffix == ".pt")


def _hdf5_headers(path: Path) -> list[FeatureFile]:
    """Returns the features of an HDF5 file: none, one, or in AtlasPatch's files one per encoder."""
    with open_hdf5(path) as file:
        coords = find_dataset(file, "coords", path)
        group = find_group(file, "features", path)
        if group is not None:
            # AtlasPatch writes under a temporary name until all tiles are there.
            datasets = {name: find_dataset(group, name, path) for name in group if not name.startswith("__tmp_")}
            return [
                FeatureFile(path.stem, path, "atlaspatch", name, *dataset.shape, dataset=f"features/{name}")
                for name, dataset in sorted(datasets.items())
                if dataset is not None and len(dataset.shape or ()) == 2
            ]
        source_format = hdf5_geometry(file, coords, path).source_format
        name = "feats" if source_format == "stamp" else "features"
        dataset = find_dataset(file, name, path)
        is_of_tiles = read_attributes(file, path).get("feat_type", "tile") == "tile"
        if dataset is None or len(dataset.shape or ()) != 2 or not is_of_tiles:
            return []
        encoder = _hdf5_encoder(file, dataset, path)
        if source_format == "clam" and encoder is not None:
            source_format = "trident"
        return [FeatureFile(path.stem, path, source_format, encoder, *dataset.shape, dataset=name)]


def _hdf5_encoder(file: "File", dataset: "Dataset", path: Path) -> str | None:
    named = read_attributes(dataset, path).get("encoder") or read_attributes(file, path).get("extractor")
    return str(named) if named is not None else _encoder_of_folder(path)


def _encoder_of_folder(path: Path) -> str | None:
    name = path.parent.name
    return name.removeprefix(_TRIDENT_FOLDER) if name.startswith(_TRIDENT_FOLDER) else None


def _flat_headers(path: Path, *, is_tensor: bool) -> list[FeatureFile]:
    """Returns the features of a .pt or .npz file: none or one."""
    meta = slide2vec_meta(path)
    if meta is not None and meta.get("artifact_type") != "tile_embeddings":
        return []
    shape = tuple(open_tensor(path).shape) if is_tensor else npz_shape(path, "features") or ()
    if len(shape) != 2:
        return []
    if meta is not None:
        encoder = meta.get("encoder_name")
        return [FeatureFile(path.stem, path, "slide2vec", None if encoder is None else str(encoder), *shape)]
    encoder = _encoder_of_folder(path)
    return [FeatureFile(path.stem, path, "clam" if encoder is None else "trident", encoder, *shape)]


def slide2vec_meta(path: Path) -> Mapping[str, Any] | None:
    """Returns the JSON that slide2vec writes beside its features, `None` if there is none."""
    meta_path = path.with_name(f"{path.stem}.meta.json")
    if not meta_path.is_file():
        return None
    try:
        content = read_json(meta_path)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError("unreadable", f"{meta_path.name}: expected a JSON file") from error
    return content if isinstance(content, dict) and "artifact_type" in content else None


def _check_header(file: FeatureFile) -> None:
    name = file.path.name
    if not is_safe_id(file.slide_id):
        raise ForeignFileError(
            "unsafe_name", f"{name!r}: a slide id is 1-128 letters, digits, '.', '_' or '-'; rename the file"
        )
    if file.num_tiles == 0:
        raise ForeignFileError("no_tissue", f"{name}: holds no tile")
    is_fine = file.num_tiles <= MAX_TILES and 1 <= file.width <= _MAX_WIDTH
    if not is_fine or file.num_tiles * file.width > _MAX_VALUES:
        raise ForeignFileError("too_large", f"{name}: {file.num_tiles} tiles with {file.width} numbers each")


def _choose(slide_id: str, files: list[FeatureFile], folder: Path) -> FeatureFile:
    """Returns the one file of a slide."""
    if {file.path.parent.name for file in files} == _CLAM_FOLDERS and len(files) == 2:
        return next(file for file in files if file.path.parent.name == "h5_files")
    if len(files) > 1:
        offenders = [f"{file.path.relative_to(folder)} ({file.encoder or 'unknown encoder'})" for file in files]
        raise_offenders(f"Slide {slide_id} must have one feature file; name the folder or the encoder", offenders)
    return files[0]


def _check_alike(files: list[FeatureFile], folder: Path) -> None:
    """Refuses a mixture: features of different encoders are not comparable."""
    groups: dict[tuple[str | None, int], list[str]] = defaultdict(list)
    for file in files:
        groups[file.encoder, file.width].append(str(file.path.relative_to(folder)))
    if len(groups) > 1:
        most = max(groups.values(), key=len)
        raise_offenders(
            f"All features of {folder} must be of one encoder and width, as {len(most)} of {len(files)} files are; "
            "choose an encoder or a width, or move the others away",
            [
                f"{name} ({encoder or 'unknown encoder'}, width {width})"
                for (encoder, width), names in groups.items()
                if names is not most
                for name in names
            ],
        )
