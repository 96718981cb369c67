# SPDX-License-Identifier: Apache-2.0
"""H3: pickles that would run code, in every form and at every place from which training reads a file.

Forms: a bare pickle, PyTorch's and joblib's files, an array of objects, a zip with a pickle, and a file that is both
safetensors and such a zip. Places: weights of the tile encoder, the text model and a model to go on from, under both
names that transformers looks for; every file of a checkpoint, with a manifest that fits; the cache of reports; the
tables of the dataset, as files and as metadata of good files; features of other tools. No code may run, and each file
must be refused by its name (or that of its folder), in one line.
"""

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import h5py
import joblib
import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from dre_slcl.training import array_files, checkpoint, hdf5_files
from dre_slcl.training.hdf5_files import ForeignFileError

from . import training_runs as runs
from .campaign import check, run_campaign

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def forms(marker):
    """Name -> content of a file that creates the marker if it is unpickled."""
    payload, found = Payload(marker), {"pickle": pickle.dumps(Payload(marker))}
    writers = {"torch": torch.save, "joblib": joblib.dump}
    writers["objects"] = lambda value, file: np.savez(file, features=np.array([value], dtype=object))
    for name, write in writers.items():
        file = io.BytesIO()
        write(payload, file)
        found[name] = file.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", found["pickle"])
    found["zip"] = file.getvalue()
    found["both"] = save({"weight": torch.zeros(2)}) + found["torch"]
    return found


def would_run(marker):
    """Whether each form does run code where it is trusted; else this campaign would prove nothing."""
    for name, content in forms(marker).items():
        marker.unlink(missing_ok=True)
        if name == "joblib":
            joblib.load(io.BytesIO(content))
        elif name == "objects":
            np.load(io.BytesIO(content), allow_pickle=True)["features"]
        elif name in ("torch", "both"):
            torch.load(io.BytesIO(content[content.index(b"PK\3\4") :]), weights_only=False)
        else:
            start = content.index(b"\x80") if name == "pickle" else None
            data = (
                content[start:] if name == "pickle" else zipfile.ZipFile(io.BytesIO(content)).read("archive/data.pkl")
            )
            pickle.loads(data)
        if not marker.exists():
            raise RuntimeError(f"{name}: the payload does not run.")
    marker.unlink()


def weights_cases(settings, good, payloads):
    """A folder of a model of each kind, whose weights are a payload."""
    kinds = {"text_model": Path(settings["text_model"]), "tile_encoder": good / "encoder", "model": good / "model"}
    for kind, source in kinds.items():
        for file in WEIGHTS:
            for form, content in payloads.items():

                def place(root, source=source, file=file, content=content):
                    shutil.copytree(source, root / "bad")
                    (root / "bad" / "model.safetensors").unlink()
                    (root / "bad" / file).write_bytes(content)

                changes = {kind: "bad"} | ({"tile_encoder_config": None} if kind != "text_model" else {})
                yield f"{kind} {file} {form}", place, changes, "bad"


def checkpoint_cases(good, payloads):
    """The newest checkpoint of a run, one file of which is a payload; the manifest says that this is right."""
    newest = max((good / "out" / "checkpoints").glob("step-*"))
    for file in sorted(path.name for path in newest.iterdir()):
        for form, content in payloads.items():

            def place(root, file=file, content=content):
                shutil.copytree(good / "out", root / "out")
                bad = root / "out" / "checkpoints" / newest.name
                (bad / file).write_bytes(content)
                if file != checkpoint.MANIFEST:
                    manifest = json.loads((bad / checkpoint.MANIFEST).read_text())
                    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                    manifest["files"][file] = entry
                    (bad / checkpoint.MANIFEST).write_text(json.dumps(checkpoint._sealed(manifest), indent=2) + "\n")

            yield f"checkpoint {file} {form}", place, {}, newest.name


def other_cases(settings, good, payloads):
    """The cache of reports, and the tables of the dataset."""
    cached = min((good / "out" / "report_cache").rglob("*.safetensors")).relative_to(good)
    for form, content in payloads.items():

        def spoil_cache(root, content=content):
            shutil.copytree(good / "out" / "report_cache", root / "out" / "report_cache")
            (root / cached).write_bytes(content)

        yield f"report cache {form}", spoil_cache, {}, cached.name
        for table in ("slides", "tiles"):

            def spoil_table(root, table=table, content=content):
                shutil.copytree(settings["dataset"], root / "bad")
                min((root / "bad" / table).glob("*.parquet")).write_bytes(content)

            yield f"dataset {table} {form}", spoil_table, {"dataset": "bad"}, "bad"

    def spoil_metadata(root):
        shutil.copytree(settings["dataset"], root / "bad")
        for path in (root / "bad").rglob("*.parquet"):
            table = pq.read_table(path)
            keys = dict.fromkeys((b"pandas", b"huggingface", b"ARROW:extension:metadata"), payloads["pickle"])
            pq.write_table(table.replace_schema_metadata(keys), path)

    yield "dataset metadata", spoil_metadata, {"dataset": "bad"}, None


def feature_files(root, payloads, marker, problems):
    """Features of other tools, read as `dre-slcl import-features` reads them; returns how many were refused."""
    refused = 0
    for form, content in payloads.items():
        for suffix, read in ((".pt", array_files.open_tensor), (".npz", _read_npz), (".h5", _read_hdf5)):
            path = root / f"{form}{suffix}"
            path.write_bytes(content)
            try:
                read(path)
                check(problems, False, f"features {path.name}: not refused")
            except ForeignFileError as error:
                refused += 1
                check(problems, path.name in str(error), f"features {path.name}: not named: {error}")
            check(problems, not marker.exists(), f"features {path.name}: code ran")
    path = root / "attribute.h5"
    with h5py.File(path, "w") as file:
        file.attrs["note"] = np.void(payloads["pickle"])
        file["features"] = np.zeros((2, 3), dtype=np.float32)
    with hdf5_files.open_hdf5(path) as file:
        hdf5_files.read_attributes(file, path)
        hdf5_files.read_attributes(file["features"], path)
    check(problems, not marker.exists(), "features attribute.h5: code ran")
    return refused


def _read_npz(path):
    if not array_files.read_npz(path, ("features",)):
        raise ForeignFileError("unreadable", f"{path.name}: a zip without arrays; nothing was read")


def _read_hdf5(path):
    with hdf5_files.open_hdf5(path) as file:
        return list(file)


def play(root, settings, case, marker, problems):
    """Starts training where a payload lies; returns whether it was refused."""
    name, place, changes, named = case
    root.mkdir()
    place(root)
    given = {key: str(root / value) if value == "bad" else value for key, value in changes.items()}
    mine = settings | {"output_dir": str(root / "out")} | given
    status = runs.run(mine)
    log = runs.log_of(mine)
    check(problems, not marker.exists(), f"{name}: code ran")
    marker.unlink(missing_ok=True)
    if named is not None:
        is_clear = status == 1 and "Traceback" not in log and named in log
        # A damaged manifest or a damaged file of the cache does not end a run: it is passed over, and named.
        is_passed_over = status == 0 and named in log
        check(problems, is_clear or is_passed_over, f"{name}: status {status}: {log[-1200:]}")
    shutil.rmtree(root)
    return named is not None and status != 0


def campaign(root, count, seed):
    settings = runs.prepare(root, num_steps=1, finalize_steps=0, codebook_refits=[], checkpoint_steps=1)
    good, marker, problems = root / "good", root / "marker", []
    good.mkdir()
    would_run(marker)
    payloads = forms(marker)
    mine = settings | {"output_dir": str(good / "out")}

    def keep_encoder():
        runs.after(runs.Trainer, "run", lambda trainer, result: _save_encoder(trainer, good / "encoder"))

    runs.expect_success(mine, keep_encoder)
    shutil.copytree(good / "out" / "model", good / "model")
    cases = [*weights_cases(settings, good, payloads), *checkpoint_cases(good, payloads)]
    cases += other_cases(settings, good, payloads)
    refused, chosen = 0, cases[:: max(1, len(cases) // count)]
    for index, case in enumerate(chosen):
        refused += play(root / f"case-{index}", settings, case, marker, problems)
    (root / "features").mkdir()
    refused += feature_files(root / "features", payloads, marker, problems)
    figures = {"cases": len(chosen) + 3 * len(payloads) + 1, "faults": len(problems), "refused": refused}
    return figures | {"code_that_ran": sum("code ran" in problem for problem in problems)}


def _save_encoder(trainer, folder):
    trainer.unwrapped.tile_encoder.save_pretrained(folder)


if __name__ == "__main__":
    run_campaign(campaign, count=1_000, doc=__doc__)
