# SPDX-License-Identifier: Apache-2.0
"""Files laid out as TRIDENT, CLAM, AtlasPatch, STAMP and slide2vec write them: same names, types and chunks."""

import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import torch

# A 2 x 3 grid of 512 level-0 pixels, column by column as TRIDENT scans.
CORNERS = np.array([[0, 0], [0, 512], [512, 0], [512, 512], [1024, 0], [1024, 512]])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def _create(file, name, values):
    """TRIDENT and CLAM: resizable, one row per chunk."""
    shape = values.shape
    return file.create_dataset(name, data=values, maxshape=(None, *shape[1:]), chunks=(1, *shape[1:]))


def trident_attributes(slide_id="a", **changes):
    attributes = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": slide_id,
        "savetodir": "/data/job/20x_256px_0px_overlap",
        "level0_width": 2000,
        "level0_height": 1500,
        **changes,
    }
    return {name: "None" if value is None else value for name, value in attributes.items()}


def write_trident(job, slide_id="a", corners=CORNERS, *, run="20x_256px_0px_overlap", without=(), **changes):
    path = Path(job) / run / "patches" / f"{slide_id}_patches.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        dataset = _create(file, "coords", np.asarray(corners, dtype=np.int64))
        attributes = trident_attributes(slide_id, **changes)
        dataset.attrs.update({name: value for name, value in attributes.items() if name not in without})
    return path


def write_trident_features(job, features, slide_id="a", corners=CORNERS, *, encoder="uni_v1", named=True, **changes):
    path = Path(job) / "20x_256px_0px_overlap" / f"features_{encoder}" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        dataset = _create(file, "features", features)
        dataset.attrs.update(name=slide_id, savetodir=str(path.parent), **({"encoder": encoder} if named else {}))
        coords = _create(file, "coords", np.asarray(corners, dtype=np.int64))
        coords.attrs.update(trident_attributes(slide_id, **changes))
    return path


def write_clam(folder, slide_id="a", corners=CORNERS, *, without=(), **changes):
    path = Path(folder) / "patches" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    attributes = {
        "patch_size": 256,
        "patch_level": 1,
        "downsample": (2.0, 2.0),
        "downsampled_level_dim": (1000, 750),
        "level_dim": (1000, 750),
        "name": slide_id,
        "save_path": str(path.parent),
        **changes,
    }
    with h5py.File(path, "w") as file:
        dataset = _create(file, "coords", np.asarray(corners))
        dataset.attrs.update({name: value for name, value in attributes.items() if name not in without})
    return path


def write_clam_features(folder, features, slide_id="a", corners=CORNERS):
    """Both of CLAM's files: the HDF5 file without any attribute, and the tensor."""
    paths = [Path(folder) / f"{kind}_files" / f"{slide_id}.{kind}" for kind in ("h5", "pt")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(paths[0], "w") as file:
        _create(file, "features", features)
        _create(file, "coords", np.asarray(corners, dtype=np.int32))
    torch.save(torch.from_numpy(features), paths[1])
    return paths


def write_atlaspatch(folder, slide_id="a", corners=CORNERS, *, features=None, **changes):
    path = Path(folder) / "patches" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    reads = np.column_stack([corners, np.full((len(corners), 2), 256), np.ones(len(corners))]).astype(np.int32)
    attributes = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "level0_width": 2000,
        "level0_height": 1500,
        "wsi_path": f"/data/{slide_id}.svs",
        "num_patches": len(corners),
        **changes,
    }
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        file.create_dataset("coords", data=reads, maxshape=(None, 5), chunks=(256, 5))
        file.create_dataset("passports", data=np.array([b"p"] * len(corners), dtype="S160"))
        for name, values in (features or {}).items():
            file.create_dataset(f"features/{name}", data=values, maxshape=(None, values.shape[1]))
    return path


def write_stamp(folder, slide_id="a", corners_um=None, *, features=None, extractor="uni2", without=(), **changes):
    """Tiles of 512 level-0 pixels at 0.25 um/px are 128 um."""
    path = Path(folder) / f"{extractor}-1a2b3c4d" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    corners_um = CORNERS * 0.25 if corners_um is None else corners_um
    features = np.ones((len(corners_um), 4)) if features is None else features
    attributes = {
        "stamp_version": "2.2.0",
        "extractor": extractor,
        "unit": "um",
        "tile_size_um": 128.0,
        "tile_size_px": 256,
        "code_hash": "1a2b3c4d",
        "feat_type": "tile",
        **changes,
    }
    with h5py.File(path, "w") as file:
        file["coords"] = np.asarray(corners_um, dtype=np.float32)
        file["feats"] = features.astype(np.float16)
        file.attrs.update({name: value for name, value in attributes.items() if name not in without})
    return path


def write_slide2vec(folder, slide_id="a", corners=CORNERS, *, tiling=None, with_meta=True, fractions=None):
    path = Path(folder) / "tiles" / f"{slide_id}.coordinates.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    corners = np.asarray(corners, dtype=np.int64)
    meta = {
        "provenance": {"sample_id": slide_id, "image_path": f"/data/{slide_id}.svs", "spacing_at_level_0": None},
        "slide": {"dimensions": [2000, 1500], "base_spacing_um": 0.25, "level_downsamples": [1.0, 2.0]},
        "tiling": {
            "requested_tile_size_px": 256,
            "requested_spacing_um": 0.5,
            "tile_size_lv0": 512,
            "step_px_lv0": 512,
            "overlap": 0.0,
            "n_tiles": len(corners),
            **(tiling or {}),
        },
        "segmentation": {},
        "filtering": {},
        "artifact": {"coordinate_space": "level0_px", "tile_order": "x_then_y"},
    }
    if with_meta:
        path.with_name(f"{slide_id}.coordinates.meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True))
    if len(corners):  # a slide without tiles has the JSON only
        fractions = np.linspace(0.5, 1, len(corners)) if fractions is None else fractions
        np.savez_compressed(
            path,
            tile_index=np.arange(len(corners), dtype=np.int32),
            x=corners[:, 0],
            y=corners[:, 1],
            tissue_fractions=np.asarray(fractions, dtype=np.float32),
        )
    return path


def write_slide2vec_features(folder, features, slide_id="a", *, suffix="pt", encoder="prost40m", tile_index=None):
    path = Path(folder) / "tile_embeddings" / f"{slide_id}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == "pt":
        torch.save(torch.as_tensor(features), path)
    else:
        np.savez_compressed(path, features=features, **({} if tile_index is None else {"tile_index": tile_index}))
    meta = {
        "sample_id": slide_id,
        "artifact_type": "tile_embeddings",
        "encoder_name": encoder,
        "format": suffix,
        "num_tiles": len(features),
        "requested_tile_size_px": 256,
        "requested_spacing_um": 0.5,
        "tile_size_lv0": 512,
    }
    path.with_name(f"{slide_id}.meta.json").write_text(json.dumps(meta))
    return path


def write_pickles(folder, marker):
    """Files that would create `marker` if anything in them were unpickled: two .pt, one .npz, one .npy in a .npz."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"features": Payload(marker)}, folder / "new.pt")
    (folder / "old.pt").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    objects = np.empty((2, 2), dtype=object)
    objects[:] = [[Payload(marker)] * 2] * 2
    np.savez(folder / "objects.npz", features=objects)
    return folder


def damage_heap(path):
    """Makes the HDF5 library of 2025 loop for ever over the texts of the attributes; a later one may refuse."""
    content = bytearray(path.read_bytes())
    size = content.index(b"GCOL") + 16 + 8  # of the first object of the heap: with its own 16 bytes it becomes 0
    content[size : size + 8] = (2**64 - 16).to_bytes(8, "little")
    path.write_bytes(content)
