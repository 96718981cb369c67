# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classifiers against prompts written out by hand."""

import pytest
import torch

from modeling_dre_slcl import DreSlclProcessor

from .tiny_models import tiny_image_processor, tiny_model, tiny_tokenizer

CLASSES = [["tumor", "grade tumor"], ["normal tissue"]]
TEMPLATES = ["a slide of CLASSNAME", "CLASSNAME"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(text=True)


def encode_prompt(model, prompt):
    tokens = tiny_tokenizer()(prompt, return_tensors="pt")
    with torch.no_grad():
        return model.get_text_features(tokens["input_ids"], tokens["attention_mask"])[0]


@pytest.mark.parametrize("bundled", [False, True])
def test_is_the_mean_over_names_and_templates(model, bundled):
    tokenizer = DreSlclProcessor(tiny_image_processor(), tiny_tokenizer()) if bundled else tiny_tokenizer()
    classifier = model.zero_shot_classifier(tokenizer, CLASSES, TEMPLATES)
    written_out = [
        ["a slide of tumor", "tumor", "a slide of grade tumor", "grade tumor"],
        ["a slide of normal tissue", "normal tissue"],
    ]
    for vector, prompts in zip(classifier, written_out, strict=True):
        mean = torch.stack([encode_prompt(model, prompt) for prompt in prompts]).mean(dim=0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=0, atol=1e-5)


def test_refuses_templates_without_the_placeholder(model):
    with pytest.raises(ValueError, match="'a slide' must contain the literal token CLASSNAME"):
        model.zero_shot_classifier(tiny_tokenizer(), CLASSES, ["CLASSNAME", "a slide"])


@pytest.mark.parametrize("names", [["tumor", "normal"], [["tumor"], []]])
def test_refuses_classes_without_a_list_of_names(model, names):
    with pytest.raises(ValueError, match="Each class needs a list of at least one name"):
        model.zero_shot_classifier(tiny_tokenizer(), names, TEMPLATES)


def test_refuses_a_model_without_text():
    with pytest.raises(ValueError, match="ships without a text model"):
        tiny_model().zero_shot_classifier(tiny_tokenizer(), CLASSES, TEMPLATES)
