# SPDX-License-Identifier: Apache-2.0
"""The same run on 1, 2 and 4 processes, stopped on one number and resumed on another: order, losses, banks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dre_slcl.training.metrics_log import read_metrics

from . import tiny_dataset

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 50
STOP_AFTER = 25
SCRIPT = """
import json, os, signal, sys
import torch.distributed as dist
from pathlib import Path
from dre_slcl.training import config, train
from dre_slcl.training.training_step import TrainingStep

folder, stop_after = Path(sys.argv[1]), int(sys.argv[2])
rank, order, sent = int(os.environ.get("RANK", 0)), [], []
step = TrainingStep.take

def recorded(self, batch):
    plan = batch.plan
    slides = [self.data.source.slides[slide].slide_id for slide in plan.slides]
    order.append([plan.step, slides, plan.sampled.tolist()])
    if plan.step + 1 == stop_after and rank == 0:  # one process is told, all stop
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch)

def counted(name, call):
    def wrapper(tensor, *args, **kwargs):
        sent.append([name, tensor.numel() if hasattr(tensor, "numel") else 0])
        return call(tensor, *args, **kwargs)
    return wrapper

TrainingStep.take = recorded
dist.broadcast = counted("broadcast", dist.broadcast)
status = train.train(config.load_config(folder / "run.yaml", {}))
(folder / f"order-{os.environ.get('WORLD_SIZE', '1')}-{rank}.json").write_text(json.dumps([order, sent]))
sys.exit(0 if status in (0, 143) else status)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("process_numbers")
    tiny_dataset.write_dataset(root / "data")
    tiny_dataset.write_text_model(root / "text")
    (root / "script.py").write_text(SCRIPT)
    return root


def settings(data, folder, **changes):
    run = tiny_dataset.train_settings(data, folder / "run")
    # float16 would now and then round a difference of 1e-7 to one of 1e-3.
    run |= {"bank_dtype": "float32", "num_steps": NUM_STEPS, "finalize_steps": 0, "codebook_refits": []}
    run |= {"warmup_steps": 5, "learning_rate": 1e-5, "head_learning_rate": 2e-5, "checkpoint_steps": 1000}
    # At a logit scale of 14 the rounding of a logit alone is 1e-6 of a loss of 1.
    run["model_config"] = run["model_config"] | {"logit_scale_init_value": 0.0}
    assert run["model_config"]["hidden_dropout_prob"] == 0.1
    return run | changes


def launch(data, folder, num_processes, stop_after=0):
    """Runs training to its end, or until it is stopped; returns the order of slides and tiles, by step."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = command if num_processes > 1 else [sys.executable]
    command = [*command, str(data / "script.py"), str(folder), str(stop_after)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    order = {}
    for rank in range(num_processes):
        steps, sent = json.loads((folder / f"order-{num_processes}-{rank}.json").read_text())
        # DistributedDataParallel sends buckets of weights at the start; a bank has more numbers than the whole model.
        assert all(numel < 1000 for _, numel in sent), sent
        for step, slides, tiles in steps:
            order.setdefault(step, []).extend(zip(slides, tiles, strict=True))
    return order


def run_at(data, folder, *sizes, **changes):
    """One run, on each number of processes in turn; returns its order and its losses."""
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(data, folder, **changes)))
    order = {}
    for place, size in enumerate(sizes):
        order |= launch(data, folder, size, STOP_AFTER if place + 1 < len(sizes) else 0)
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    return order, {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    return run_at(data, tmp_path_factory.mktemp("one") / "run", 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sizes", [(2,), (4, 2), (4, 1), (1, 4)], ids=str)
def test_order_and_losses_are_those_of_one_process(data, tmp_path, one_process, sizes):
    order, losses = run_at(data, tmp_path / "run", *sizes)
    expected_order, expected = one_process
    assert order == expected_order
    assert list(losses) == list(expected) == list(range(1, NUM_STEPS + 1))
    worst = max(abs(losses[step] / loss - 1) for step, loss in expected.items())
    assert worst < 1e-6, worst
    folder = max((tmp_path / "run" / "run" / "checkpoints").glob("step-*"))
    stored = [load_file(path)["features"] for path in sorted(folder.glob("bank-*"))]
    assert torch.isfinite(torch.cat(stored)).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_exact_mode_is_that_of_one_process(data, tmp_path):
    changes = {"bank_mode": "exact", "num_steps": 10}
    expected_order, expected = run_at(data, tmp_path / "one", 1, **changes)
    order, losses = run_at(data, tmp_path / "two", 2, **changes)
    assert order == expected_order
    assert list(losses) == list(expected) == list(range(1, 11))
    assert max(abs(losses[step] / loss - 1) for step, loss in expected.items()) < 1e-6


@pytest.mark.slow
def test_a_number_that_cannot_share_the_batch_is_refused_with_those_that_can(data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(data, folder)))
    with pytest.raises(AssertionError, match="start 1 or 2 or 4 processes"):
        launch(data, folder, 3)
