# SPDX-License-Identifier: Apache-2.0
"""Classification of slides: the loss against loops, round trips through folders, new classifiers on old models."""

import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

from modeling_dre_slcl import DreSlclForSlideClassification, DreSlclModel
from modeling_dre_slcl.slide_classifier import slide_label_loss

from .tiny_models import IMAGE_SIZE, tiny_config, tiny_model

NAN = math.nan


def classifier(**changes):
    torch.manual_seed(0)
    fields = {"id2label": {0: "LUAD", 1: "LUSC", 2: "SCLC"}, "label2id": {"LUAD": 0, "LUSC": 1, "SCLC": 2}}
    fields |= {"problem_type": "single_label_classification"}
    return DreSlclForSlideClassification(tiny_config(**fields | changes)).eval()


@pytest.fixture
def tiles():
    return torch.randn(3, 2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.25]])
@pytest.mark.parametrize("labels", [[0, 2, 1, 2], [1, -100, -100, 0], [-100] * 4])
def test_the_loss_of_classes_equals_the_loop(labels, weights):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    total = share = 0.0
    for row, label in zip(logits.tolist(), labels, strict=True):
        if label != -100:
            weight = weights[label] if weights else 1.0
            total -= weight * (row[label] - math.log(sum(math.exp(score) for score in row)))
            share += weight
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    found = slide_label_loss(logits, torch.tensor(labels), tensor)
    assert float(found) == pytest.approx(total / share if share else 0.0, rel=1e-12)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.25]])
@pytest.mark.parametrize("labels", [[[0, 1, 1], [1, 0, 0]], [[NAN, 1, -100], [0, NAN, 1]], [[NAN] * 3, [-100] * 3]])
def test_the_loss_of_several_labels_equals_the_loop(labels, weights):
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    total = share = 0.0
    for row, flags in zip(logits.tolist(), labels, strict=True):
        for place, (score, flag) in enumerate(zip(row, flags, strict=True)):
            if flag in (0, 1):
                weight = weights[place] if weights else 1.0
                probability = 1 / (1 + math.exp(-score))
                total -= weight * math.log(probability if flag else 1 - probability)
                share += weight
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    found = slide_label_loss(logits, torch.tensor(labels), tensor)
    found.backward()
    assert found.item() == pytest.approx(total / share if share else 0.0, rel=1e-6)
    assert logits.grad.isfinite().all()
    assert (logits.grad[~torch.isin(torch.tensor(labels).nan_to_num(-100), torch.tensor([0.0, 1.0]))] == 0).all()


def test_both_losses_are_weighed_and_named(tiles):
    model = classifier(contrastive_loss_weight=0.5, label_loss_weight=3.0)
    reports = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([0, 1, 2])
    outputs = model(tiles, report_embeds=reports, labels=labels)
    alone = DreSlclModel(model.config).eval()
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("classifier.")})
    contrastive = alone(tiles, report_embeds=reports).loss
    expected = torch.nn.functional.cross_entropy(model.classifier(outputs.slide_embedding), labels)
    torch.testing.assert_close(outputs.contrastive_loss, contrastive)
    torch.testing.assert_close(outputs.label_loss, expected)
    torch.testing.assert_close(outputs.loss, 0.5 * contrastive + 3 * expected)
    assert model(tiles).loss is None
    assert model(tiles, labels=labels, return_dict=False)[0] == model(tiles, labels=labels).loss


def test_a_folder_serves_both_auto_classes_without_this_package(tmp_path, tiles):
    model = classifier()
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert type(loaded) is DreSlclForSlideClassification
    assert loaded.config.id2label == {0: "LUAD", 1: "LUSC", 2: "SCLC"}
    torch.testing.assert_close(loaded(tiles).logits, model(tiles).logits, rtol=0, atol=0)
    encoder = AutoModel.from_pretrained(tmp_path / "model")
    assert type(encoder) is DreSlclModel
    torch.testing.assert_close(encoder(tiles).slide_embedding, model(tiles).slide_embedding, rtol=0, atol=0)
    torch.save(tiles, tmp_path / "tiles.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModel, AutoModelForImageClassification\n"
        "sys.modules['modeling_dre_slcl'] = None\n"
        "tiles = torch.load(sys.argv[2], weights_only=True)\n"
        "for Auto in (AutoModelForImageClassification, AutoModel):\n"
        "    model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "    print(type(model).__name__, float(model(tiles).slide_embedding.sum()))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "tiles.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    names = [line.split()[0] for line in done.stdout.splitlines()]
    sums = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert names == ["DreSlclForSlideClassification", "DreSlclModel"]
    assert sums == pytest.approx([model(tiles).slide_embedding.sum().item()] * 2, rel=1e-6)


def test_a_slide_encoder_gets_a_new_classifier_and_keeps_its_weights(tmp_path, tiles):
    encoder = tiny_model()
    encoder.save_pretrained(tmp_path)
    model, loading = DreSlclForSlideClassification.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert set(loading["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(model(tiles).slide_embedding, encoder(tiles).slide_embedding)
    assert model(tiles).logits.shape == (3, 4)
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.5)


def test_probabilities_are_named():
    embedding = torch.randn(32, generator=torch.Generator().manual_seed(5))
    for problem_type, function in (("single_label_classification", "softmax"), ("multi_label_classification", "")):
        model = classifier(problem_type=problem_type)
        found = model.label_probabilities(embedding)
        scores = [float(row @ embedding + bias) for row, bias in zip(*model.classifier.parameters(), strict=True)]
        total = sum(math.exp(score) for score in scores)
        expected = [math.exp(s) / total if function else 1 / (1 + math.exp(-s)) for s in scores]
        assert list(found) == ["LUAD", "LUSC", "SCLC"]
        assert list(found.values()) == pytest.approx(expected, rel=1e-5)


def test_weights_for_other_classes_are_refused():
    with pytest.raises(Exception, match="`class_weights` has 2 entries for 3 labels"):
        classifier(class_weights=[1.0, 2.0])
