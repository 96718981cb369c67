# SPDX-License-Identifier: Apache-2.0
"""What kills, changes, dead workers and full disks do to a slide dataset: nothing that a second run does not mend."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dre_slcl.training import build_tiling, dataset_commit, slide_part
from dre_slcl.training.dataset_info import read_dataset_geometry, read_dataset_info
from dre_slcl.training.slide_claims import BuildMember
from dre_slcl.training.worker_pool import WorkerCrash
from modeling_dre_slcl.tile_grid import TileGridConfig

from .slide_cohort import build, parquet_hashes, write_cohort, write_slide


class Killed(BaseException):
    """Stands for the end of the process."""


def count_reads(monkeypatch):
    """Returns a list that grows by the id of each slide that is tiled."""
    read = []

    def tile(task):
        read.append(task.slide_id)
        return slide_part.tile_claimed_slide(task)

    monkeypatch.setattr(build_tiling, "tile_in_worker", tile)
    return read


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def built(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "dataset"
    return out, build(manifest, out)


def test_second_build_is_byte_identical(built, manifest, tmp_path):
    build(manifest, tmp_path / "again")
    assert parquet_hashes(tmp_path / "again") == parquet_hashes(built[0])


def test_second_run_has_nothing_to_do(manifest, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = build(manifest, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    read = count_reads(monkeypatch)
    second = build(manifest, out)
    assert read == []
    assert second.is_up_to_date
    assert second.to_dict() == first.to_dict()
    assert second.exit_code == 3
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_corrected_manifest_reads_no_slide_again(manifest, tmp_path, monkeypatch):
    out, corrected = tmp_path / "out", manifest.parent / "corrected.csv"
    build(manifest, out)
    text = (
        manifest.read_text().replace("Benign.", "Benign; no atypia.").replace("c1,", "c1x,").replace(",test,", ",val,")
    )
    corrected.write_text(text)
    read = count_reads(monkeypatch)
    summary = build(corrected, out)
    assert set(read) == {"broken", "blank"}  # refused slides are tried again, good ones are not
    assert summary.num_reused == 4
    build(corrected, tmp_path / "fresh")
    assert parquet_hashes(out) == parquet_hashes(tmp_path / "fresh")


def test_changed_slide_or_number_is_read_again(manifest, tmp_path, monkeypatch):
    folder = tmp_path / "cohort"
    source = write_cohort(folder)
    out = tmp_path / "out"
    build(source, out)
    write_slide(folder / "slides" / "s1.tif", 77)
    read = count_reads(monkeypatch)
    build(source, out)
    assert set(read) == {"s1", "broken", "blank"}
    read.clear()
    build(source, out, TileGridConfig(tile_size_px=64, tile_mpp=1.0, mask_mpp=8.0, stride_px=32))
    assert {"s0", "s1", "s2", "s3"} <= set(read)
    read.clear()
    build(source, out, TileGridConfig(tile_size_px=64, tile_mpp=1.0, mask_mpp=8.0, stride_px=32), jpeg_quality=80)
    assert {"s0", "s1", "s2", "s3"} <= set(read)
    build(source, tmp_path / "fresh", TileGridConfig(64, 1.0, 32, mask_mpp=8.0), jpeg_quality=80)
    assert parquet_hashes(out) == parquet_hashes(tmp_path / "fresh")


def test_missing_or_torn_shard_is_noticed(manifest, tmp_path):
    out = tmp_path / "out"
    build(manifest, out)
    shard = next((out / "tiles").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"tiles/.*: expected \d+ bytes, found \d+"):
        read_dataset_info(out)
    shard.unlink()
    with pytest.raises(ValueError, match="found no file"):
        read_dataset_geometry(out)
    assert build(manifest, out).num_reused == 0
    read_dataset_info(out)


def test_killed_build_goes_on_where_it_stopped(manifest, built, tmp_path, monkeypatch):
    """A real process is killed as soon as its second slide is done."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dre_slcl_cli", "tiles", "--slides", str(manifest), "--out", str(out)]
    command += ["--tile-size", "64", "--mpp", "1", "--mask-mpp", "8", "--num-workers", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while len(list((out / ".parts").glob("s*.json"))) < 2 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    if (out / "dre_slcl_dataset.json").exists():
        pytest.skip("the build was done before it could be killed")
    done = {path.stem for path in (out / ".parts").glob("*.json")}
    assert len(done) >= 2
    read = count_reads(monkeypatch)
    summary = build(manifest, out)
    assert not done & set(read)
    assert summary.num_reused == len(done)
    assert parquet_hashes(out) == parquet_hashes(built[0])
    assert not list(out.glob(".*"))


CRASH_POINTS = [f"replace-{i}" for i in (0, 1, 6, 8, 15, 16)]
CRASH_POINTS += ["check_files", "write_dataset_info", "rmtree-.parts"]


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_killed_exchange_never_mixes_old_and_new(point, tmp_path, monkeypatch):
    """Each rename and removal of the exchange, and each step after it."""
    folder = tmp_path / "cohort"
    source = write_cohort(folder)
    out = tmp_path / "out"
    build(source, out)
    source.write_text(source.read_text().replace("slides/s1.tif", "slides/s1b.tif"))
    write_slide(folder / "slides" / "s1b.tif", 55)
    with monkeypatch.context() as patch:
        if point.startswith("replace"):
            _kill_in_commit(patch, int(point.split("-")[1]))
        elif point.startswith("rmtree"):
            _kill_in_removal(patch, point.split("-")[1])
        else:
            patch.setattr(dataset_commit, point, _kill)
        with pytest.raises(Killed):
            build(source, out)
    if point == "rmtree-.parts":  # the dataset is finished by then
        assert read_dataset_info(out)
    else:
        with pytest.raises(ValueError, match="not a finished slide dataset"):
            read_dataset_info(out)
    build(source, out)
    build(source, tmp_path / "fresh")
    assert parquet_hashes(out) == parquet_hashes(tmp_path / "fresh")
    read_dataset_info(out)
    assert not list(out.glob(".*"))


def _kill(*args, **kwargs):
    raise Killed


def _kill_in_removal(patch, name):
    rmtree = dataset_commit.shutil.rmtree
    patch.setattr(
        dataset_commit.shutil, "rmtree", lambda path, **kw: _kill() if Path(path).name == name else rmtree(path, **kw)
    )


def _kill_in_commit(patch, number):
    """Kills at the `number`-th rename of the exchange."""
    path_type = type(Path())
    replace = path_type.replace
    renames = []

    def count(self, target):
        if any(folder.name.endswith("-staging") for folder in self.parents) and not self.name.startswith(".tmp-"):
            if len(renames) == number:
                raise Killed
            renames.append(self.name)
        return replace(self, target)

    patch.setattr(path_type, "replace", count)


@pytest.mark.slow
def test_build_killed_again_and_again(manifest, built, tmp_path):
    """The whole process tree is left to die by a kill of the parent at any time, and started again until done."""
    command = [sys.executable, "-m", "dre_slcl_cli", "tiles", "--slides", str(manifest)]
    command += ["--tile-size", "64", "--mpp", "1", "--mask-mpp", "8", "--num-workers", "2"]
    rng = np.random.default_rng(0)
    num_kills = 0
    for number in range(3):
        out = tmp_path / f"out{number}"
        for _ in range(4):
            with subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL) as process:
                while not (out / ".parts").exists() and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 1))
                if process.poll() is not None:
                    break
                process.send_signal(signal.SIGKILL)
                num_kills += 1
        build(manifest, out)
        assert parquet_hashes(out) == parquet_hashes(built[0])
        assert not list(out.glob(".*"))
    assert num_kills >= 3


def test_dead_worker_refuses_its_slide_only(manifest, built, tmp_path, monkeypatch):
    def run(function, tasks, *, num_workers, initializer, **limits):
        assert limits == {"deadline_seconds": 300.0, "memory_bytes": 4 << 30}
        assert (num_workers, initializer) == (2, build_tiling.prepare_worker)
        for index, task in enumerate(tasks):
            yield index, WorkerCrash(-signal.SIGSEGV) if task.slide_id == "s2" else function(task)

    monkeypatch.setattr(build_tiling, "run_in_workers", run)
    summary = build(manifest, tmp_path / "out", num_workers=2)
    assert summary.refused_by_reason["reader_aborted"] == 1
    table = pq.read_table(tmp_path / "out" / "slides" / "train-00000-of-00001.parquet").to_pylist()
    assert {row["slide_id"]: row["reason"] for row in table}["s2"] == "reader_aborted"
    monkeypatch.undo()
    corrected = build(manifest, tmp_path / "out", shard_bytes=499 << 20)  # any change starts a new attempt
    assert corrected.num_ok == 4
    assert parquet_hashes(tmp_path / "out") == parquet_hashes(built[0])


def test_worker_does_not_load_torch():
    """Measured: torch and transformers would cost each worker 6.7 s and 730 MB."""
    program = "import sys; from dre_slcl.training.slide_worker import prepare_worker; prepare_worker(); "
    program += (
        "import dre_slcl.training.slide_part; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_workers_give_the_same_bytes(manifest, built, tmp_path):
    build(manifest, tmp_path / "out", num_workers=2)
    assert parquet_hashes(tmp_path / "out") == parquet_hashes(built[0])


def test_full_disk_is_no_refusal(manifest, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(slide_part, "atomic_file", fail)
        with pytest.raises(OSError, match="No space left"):
            build(manifest, tmp_path / "out")
    assert build(manifest, tmp_path / "out").num_ok == 4


def test_folders_with_other_content_are_left_alone(manifest, tmp_path):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "precious.svs").write_text("x")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        build(manifest, tmp_path)
    (tmp_path / ".parts").mkdir()  # even where it looks like one of ours
    with pytest.raises(ValueError, match=r"holds \['precious.svs'\]"):
        build(manifest, tmp_path)
    assert (tmp_path / "slides" / "precious.svs").read_text() == "x"


def test_two_different_builds_at_once_are_refused(manifest, tmp_path):
    parts = tmp_path / "out" / ".parts"
    parts.mkdir(parents=True)
    with BuildMember(parts, "another"), pytest.raises(BlockingIOError, match="another process builds here with other"):
        build(manifest, tmp_path / "out")
    assert not (parts / "members").exists()


def test_stale_preview_is_removed(manifest, tmp_path):
    (tmp_path / "slides").mkdir()
    for i, name in enumerate("ab"):
        write_slide(tmp_path / "slides" / f"{name}.tif", i)
    build(tmp_path / "slides", tmp_path / "out")
    (tmp_path / "slides" / "a.tif").unlink()
    build(tmp_path / "slides", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "previews").glob("[ab].jpg")] == ["b.jpg"]


def test_no_usable_slide_fails(tmp_path):
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "a.tif", 1, is_blank=True)
    summary = build(tmp_path / "slides", tmp_path / "out")
    assert summary.exit_code == 1
    assert json.loads((tmp_path / "out" / "refused.jsonl").read_text())["reason"] == "no_tissue"
    assert not (tmp_path / "out" / "dre_slcl_dataset.json").exists()
    write_slide(tmp_path / "slides" / "b.tif", 2)
    assert build(tmp_path / "slides", tmp_path / "out").exit_code == 3


def test_changed_during_run(tmp_path, monkeypatch):
    write_slide(tmp_path / "a.tif", 1)
    write_slide(tmp_path / "b.tif", 2)
    original = slide_part.slide_fingerprint
    monkeypatch.setattr(slide_part, "slide_fingerprint", lambda path: "other" if path.stem == "a" else original(path))
    summary = build(tmp_path, tmp_path / "out")
    assert summary.refused_by_reason == {"changed_during_run": 1}
