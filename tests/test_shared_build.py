# SPDX-License-Identifier: Apache-2.0
"""Several processes build one dataset in one folder; some of them die."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dre_slcl.training import build_dataset as builder
from dre_slcl.training import build_tiling, slide_claims, slide_part
from dre_slcl.training.dataset_info import read_dataset_info
from dre_slcl.training.slide_claims import BuildMember, claim_owner, release_claim, take_claim

from .slide_cohort import build, parquet_hashes, write_cohort


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def built(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "dataset"
    return out, build(manifest, out)


def test_a_claim_is_given_once(tmp_path):
    taken, barrier = [], threading.Barrier(8)

    def claim(name):
        barrier.wait()
        if take_claim(tmp_path, "slide", name):
            taken.append(name)

    threads = [threading.Thread(target=claim, args=(f"m{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert claim_owner(tmp_path, "slide") == taken[0]
    release_claim(tmp_path, "slide", "another")
    assert claim_owner(tmp_path, "slide") == taken[0]
    release_claim(tmp_path, "slide", taken[0])
    assert claim_owner(tmp_path, "slide") is None


def test_the_claim_of_a_dead_process_is_free_and_that_of_a_living_one_is_not(tmp_path):
    with BuildMember(tmp_path, "key") as living, BuildMember(tmp_path, "key") as observer:
        take_claim(tmp_path, "a", living.name)
        assert not observer.is_free("a")
        assert observer.is_free("b")
        assert len(observer.others()) == 1
        with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
            pass
        dead = BuildMember(tmp_path, "key")
        dead._content["pid"] = ended.pid
        slide_claims.write_json(dead._path, dead._content)
        take_claim(tmp_path, "c", dead.name)
        assert observer.is_free("c")
        assert claim_owner(tmp_path, "c") is None
        assert claim_owner(tmp_path, "a") == living.name
    assert not list((tmp_path / "claims").iterdir())


def test_a_silent_member_of_another_machine_dies_by_the_clock_of_the_observer(tmp_path):
    with BuildMember(tmp_path, "key", stale_seconds=0.3) as observer:
        far = BuildMember(tmp_path, "key")
        far._content |= {"host": "far", "machine": "far", "pid": 1}
        slide_claims.write_json(far._path, far._content)
        os.utime(far._path, (1e9, 1e9))  # its clock is years behind, which must not matter
        take_claim(tmp_path, "a", far.name)
        for beat in range(3):
            assert not observer.is_free("a")
            time.sleep(0.2)
            os.utime(far._path, (1e9 + beat + 1, 1e9 + beat + 1))
        assert not observer.is_free("a")
        time.sleep(0.4)
        assert observer.is_free("a")


def test_the_claim_of_a_new_owner_survives_a_late_takeover(tmp_path):
    """Between looking and acting of one observer, another has taken the claim over."""
    with BuildMember(tmp_path, "key") as quick, BuildMember(tmp_path, "key") as late:
        take_claim(tmp_path, "a", quick.name)
        late._break_claim(tmp_path / "claims" / "a", "a member that has died")
        assert claim_owner(tmp_path, "a") == quick.name
        assert [path.name for path in (tmp_path / "claims").iterdir()] == ["a"]


def test_another_build_is_refused_while_a_far_member_beats_and_let_in_when_it_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_claims, "HEARTBEAT_SECONDS", 0.05)
    far = BuildMember(tmp_path, "old")
    far._content |= {"host": "far", "machine": "far", "pid": 1}
    with far, pytest.raises(BlockingIOError, match=r"process 1 on far"), BuildMember(tmp_path, "new"):
        pass
    slide_claims.write_json(far._path, far._content)
    with BuildMember(tmp_path, "new", stale_seconds=0.2) as member:
        assert member.others() == []


def start(manifest, out, log):
    """A process of `dre-slcl tiles` that writes down what it tiles."""
    program = (
        "import sys\n"
        "from dre_slcl.training.slide_worker import prepare_worker\n"
        "prepare_worker()  # without torch it starts ten times faster\n"
        "from dre_slcl.training import build_tiling, slide_part\n"
        "tile = slide_part.tile_one_slide\n"
        "def logged(task):\n"
        "    with open(sys.argv[1], 'a') as file: file.write(task.slide_id + '\\n')\n"
        "    return tile(task)\n"
        "slide_part.tile_one_slide = logged\n"
        "import dre_slcl_cli\n"
        "sys.exit(dre_slcl_cli.main(sys.argv[2:]))\n"
    )
    arguments = [str(log), "tiles", "--slides", str(manifest), "--out", str(out), "--tile-size", "64", "--mpp", "1"]
    command = [sys.executable, "-c", program, *arguments, "--num-workers", "0"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_share_the_work_and_one_finishes(manifest, built, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    processes = [start(manifest, out, log) for _ in range(3)]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [3, 3, 3], outputs
    assert parquet_hashes(out) == parquet_hashes(built[0])
    tiled = log.read_text().split()
    assert sorted(tiled) == sorted(set(tiled)) == ["blank", "broken", "s0", "s1", "s2", "s3"]
    assert sum("4 slides refused" in error or "slides with" in error for _, error in outputs) == 1
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_killed_processes_are_replaced_by_the_others(manifest, built, tmp_path):
    for number in range(3):
        out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
        processes = [start(manifest, out, log) for _ in range(3)]
        while not log.exists() and processes[0].poll() is None:
            time.sleep(0.005)
        time.sleep(0.03 * number)
        for process in processes[:2]:
            process.send_signal(signal.SIGKILL)
        error = processes[2].communicate(timeout=200)[1]
        for process in processes[:2]:
            process.communicate()
        assert processes[2].returncode == 3, error
        assert parquet_hashes(out) == parquet_hashes(built[0])
        read_dataset_info(out)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_slide_in_the_hands_of_another_is_waited_for(manifest, built, tmp_path, monkeypatch):
    """Another member holds one slide and the right to finish; it gives the slide back untiled, and finishes late."""
    monkeypatch.setattr(build_tiling, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(builder, "POLL_SECONDS", 0.05)
    out = tmp_path / "out"
    (out / ".parts").mkdir(parents=True)
    keys = []
    enter = BuildMember.__enter__
    monkeypatch.setattr(BuildMember, "__enter__", lambda self: keys.append(self._content["build"]) or enter(self))
    with monkeypatch.context() as patch:
        patch.setattr(builder, "tile_slides", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(manifest, out)
    results = []
    with BuildMember(out / ".parts", keys[0]) as other:
        take_claim(out / ".parts", "s2", other.name)
        take_claim(out / ".parts", ".finish", other.name)
        thread = threading.Thread(target=lambda: results.append(build(manifest, out)))
        thread.start()
        while not (out / ".parts" / "s3.json").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        assert not (out / ".parts" / "s2.json").exists()
        release_claim(out / ".parts", "s2", other.name)
        while not (out / ".parts" / "s2.json").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        assert not (out / "dre_slcl_dataset.json").exists()
        release_claim(out / ".parts", ".finish", other.name)
        thread.join(60)
    assert results[0].num_ok == 4
    assert parquet_hashes(out) == parquet_hashes(built[0])


def test_a_finisher_that_comes_back_late_harms_nothing(manifest, built, tmp_path, monkeypatch):
    """It stops before each step of the exchange while another finishes everything, then goes on."""
    from dre_slcl.training import dataset_commit

    for step in ("sync_tree", "_set_info_aside", "sync_path", "write_dataset_info"):
        out = tmp_path / step
        original = getattr(dataset_commit, step)
        has_stopped = []

        def stop(*args, step=step, original=original, has_stopped=has_stopped, out=out, **kwargs):
            if not has_stopped:
                has_stopped.append(True)
                for path in (out / ".parts" / "claims").glob("*"):
                    path.unlink()  # what a takeover does
                assert build(manifest, out).num_ok == 4
                read_dataset_info(out)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(dataset_commit, step, stop)
            with contextlib.suppress(FileNotFoundError):  # its staging folder may be gone: it says so, no more
                build(manifest, out)
        assert has_stopped
        read_dataset_info(out)
        assert parquet_hashes(out) == parquet_hashes(built[0])
        assert build(manifest, out).is_up_to_date


def test_part_written_by_a_slow_worker_after_the_end_is_removed_by_the_next_run(manifest, tmp_path):
    out = tmp_path / "out"
    build(manifest, out)
    slide_part.write_record(out / ".parts", slide_part.PartRecord("s1", "key"))
    assert build(manifest, out).is_up_to_date
    assert not (out / ".parts").exists()
