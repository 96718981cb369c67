# SPDX-License-Identifier: Apache-2.0
"""Two processes with half of the batch each, against one with all of it: the loss, every gradient, and the banks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from modeling_dre_slcl import DreSlclForSlideClassification
from modeling_dre_slcl.contrastive_loss import gather_rows
from tests.tiny_models import IMAGE_SIZE, tiny_config, tiny_model

generator = torch.Generator().manual_seed(1)
tiles = torch.randn(6, 2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, dtype=torch.float64)
reports = torch.randn(6, 24, generator=generator, dtype=torch.float64)
all_groups = {"none": None, "across processes": torch.tensor([0, 1, 1, 1, 2, 0])}

# Three slides of the first process have a label, one of the second; two have no report.
labels = torch.tensor([2, 0, 1, -100, -100, 1])
some_groups = torch.tensor([[0, 0], [1, 1], [-1, -1], [1, 2], [2, 3], [-1, -1]])
negatives = torch.randn(4, 24, generator=generator, dtype=torch.float64)
negative_groups = torch.tensor([[5, 9], [1, 1], [6, 10], [7, 11]])

def make_classifier():
    torch.manual_seed(0)
    fields = {"num_labels": 3, "class_weights": [1.0, 2.0, 0.5], "label_loss_weight": 0.7}
    model = DreSlclForSlideClassification(tiny_config(text=True, contrastive_loss="siglip", **fields))
    model = model.double().train()
    model.memory_bank.allocate([2])
    return model

def run_classifier(model, rows):
    outputs = model(
        pixel_values=tiles[rows],
        report_embeds=reports[rows],
        group_ids=some_groups[rows],
        negative_embeds=negatives,
        negative_group_ids=negative_groups,
        labels=labels[rows],
    )
    outputs.loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    gradients = {key.removeprefix("module."): gradient.flatten().tolist() for key, gradient in gradients.items()}
    return {"labels and siglip": {"loss": float(outputs.loss), "gradients": gradients}}

def make_model():
    model = tiny_model(text=True).double().train()
    model.memory_bank.allocate([2])
    return model

def run(model, rows):
    result = {}
    for name, groups in all_groups.items():
        model.zero_grad()
        group_ids = None if groups is None else groups[rows]
        outputs = model(pixel_values=tiles[rows], report_embeds=reports[rows], group_ids=group_ids)
        outputs.loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
        gradients = {key.removeprefix("module."): gradient.flatten().tolist() for key, gradient in gradients.items()}
        result[name] = {"loss": float(outputs.loss), "gradients": gradients}
    return result

# Before the process group exists: one process, the whole batch.
expected = run(make_model(), slice(0, 6)) | run_classifier(make_classifier(), slice(0, 6))
dist.init_process_group("gloo")
rank = dist.get_rank()
rows = slice(3 * rank, 3 * rank + 3)
model = make_model()
model.memory_bank.features.fill_(rank + 1)
found = run(DistributedDataParallel(model), rows)
found |= run_classifier(DistributedDataParallel(make_classifier()), rows)
content = {
    "expected": expected,
    "found": found,
    "bank": model.memory_bank.features.unique().tolist(),
    "gathered": gather_rows(all_groups["across processes"][rows]).tolist(),
}
with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as file:
    json.dump(content, file)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("groups", ["none", "across processes", "labels and siglip"])
def test_the_loss_and_every_gradient_are_those_of_one_process(processes, groups):
    for process in processes:
        expected, found = process["expected"][groups], process["found"][groups]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-10)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert found["gradients"][name] == pytest.approx(gradient, abs=1e-9), name
        parts = ("tile_encoder", "residual_encoder", "slide_projection", "text_projection", "logit_scale")
        if groups == "labels and siglip":
            parts = (*parts, "classifier", "logit_bias")
        for part in parts:
            values = [abs(x) for name, row in expected["gradients"].items() if name.startswith(part) for x in row]
            assert max(values) > 1e-6, part


def test_each_process_keeps_its_own_bank(processes):
    assert [process["bank"] for process in processes] == [[1.0], [2.0]]


def test_rows_are_gathered_in_the_order_of_processes(processes):
    assert all(process["gathered"] == [0, 1, 1, 1, 2, 0] for process in processes)
