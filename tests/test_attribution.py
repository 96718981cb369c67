# SPDX-License-Identifier: Apache-2.0
"""Attribution against leaving each tile out for real."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modeling_dre_slcl.attribution import attribute_tiles, class_logit, linear_score, slide_similarity

from .tiny_models import IMAGE_SIZE, tiny_model


@pytest.fixture(scope="module", params=[("mean", 2), ("vlad", 2), ("mean", 0)], ids=["mean", "vlad", "no-layers"])
def model(request):
    codeword_tokens, num_hidden_layers = request.param
    model = tiny_model(codeword_tokens=codeword_tokens, num_hidden_layers=num_hidden_layers)
    # Larger weights than at initialisation, so that tiles differ in what they do.
    with torch.no_grad():
        for parameter in model.residual_encoder.parameters():
            parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def features(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model.get_tile_features(torch.randn(14, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator))


def brute_force(model, features, direction):
    def match(kept):
        return model.get_slide_features(kept[None]).slide_projection[0] @ direction

    with torch.no_grad():
        without = [match(torch.cat([features[:tile], features[tile + 1 :]])) for tile in range(len(features))]
        return torch.stack([match(features) - one for one in without])


@pytest.mark.parametrize("chunk_size", [1, 5, 256])
def test_equals_leaving_each_tile_out(model, features, chunk_size):
    direction = F.normalize(torch.randn(16, generator=torch.Generator().manual_seed(1)), dim=0)
    found = model.attribute_tiles(features, direction, chunk_size=chunk_size)
    assert (found.shape, found.dtype, found.device.type) == ((14,), torch.float32, "cpu")
    torch.testing.assert_close(found, brute_force(model, features, direction), rtol=0, atol=1e-5)
    assert float(found.abs().max()) > 1e-3


def test_the_only_tile_of_a_codeword_leaves_it_exactly_empty(model, features):
    """Its residual must be zero then, not a rounding error that normalisation blows up."""
    lonely = features[:3] / features[:3].norm(dim=1, keepdim=True)
    codewords = model.empty_state().add(lonely, model.codebook)
    assert len(codewords.unique()) > 1
    direction = torch.ones(16) / 4
    expected = brute_force(model, lonely, direction)
    torch.testing.assert_close(model.attribute_tiles(lonely, direction), expected, rtol=0, atol=1e-5)


def test_a_slide_of_one_tile_cannot_be_explained_by_leaving_it_out(model, features):
    with pytest.raises(ValueError, match="two are needed"):
        model.attribute_tiles(features[:1], torch.ones(16))


def test_half_precision_models_give_finite_numbers(features):
    model = tiny_model().half()
    assert torch.isfinite(model.attribute_tiles(features, torch.ones(16))).all()


def leave_out(model, features, score):
    """Scores by encoding the slide again without each tile, in float64."""
    model = copy.deepcopy(model).double()

    def encode(kept):
        return score(model.get_slide_features(kept[None].double()).slide_embedding)[0]

    with torch.no_grad():
        without = [encode(torch.cat([features[:tile], features[tile + 1 :]])) for tile in range(len(features))]
        return torch.stack([encode(features) - one for one in without]).float()


SCORES = {
    "probe": lambda: linear_score(torch.linspace(-1, 1, 32), 0.5),
    "slide": lambda: slide_similarity(torch.linspace(1, -1, 32)),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("number", [2, 3, 60])
def test_any_score_of_the_embedding_is_explained_exactly(model, name, number):
    """Also with tiles that are alone at their codeword, and codewords that are empty."""
    features = F.normalize(torch.randn(number, 32, generator=torch.Generator().manual_seed(number)), dim=-1)
    score = SCORES[name]()
    found = model.attribute_tiles(features, score, chunk_size=7)
    expected = leave_out(model, features, score)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    assert float(expected.abs().max()) > 1e-3


def test_twin_tiles_that_lie_on_their_codeword_are_explained_too(model):
    """Their residual is zero, so that leaving out another tile changes more than one token."""
    features = F.normalize(torch.randn(12, 32, generator=torch.Generator().manual_seed(5)), dim=-1)
    codewords = model.empty_state().add(features, model.codebook)
    assert len(codewords.unique()) > 1
    with torch.no_grad():
        model = copy.deepcopy(model)
        model.codebook[codewords[0]] = features[0]
    features = torch.cat([features[codewords != codewords[0]], features[:1], features[:1]])
    score = linear_score(torch.linspace(-1, 1, 32))
    found = model.attribute_tiles(features, score)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, leave_out(model, features, score), rtol=1e-3, atol=2e-5)


class Classifier(torch.nn.Module):
    """A slide classifier as far as an explanation looks at it."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(0)
        self.base_model, self.classifier = base, torch.nn.Linear(32, 3)
        self.config = SimpleNamespace(id2label={0: "normal", 1: "benign", 2: "malignant"})


def test_the_logit_of_a_class_is_explained_by_name(model, features):
    classifier = Classifier(model)
    found = attribute_tiles(classifier, features, class_logit(classifier, "malignant"))
    row = linear_score(classifier.classifier.weight[2].detach())
    torch.testing.assert_close(found, model.attribute_tiles(features, row), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="normal, benign, malignant"):
        class_logit(classifier, "cancer")
    with pytest.raises(ValueError, match="no classifier"):
        class_logit(model, 0)


def test_the_gradient_is_the_limit_of_ever_lighter_tiles(model):
    """Each tile repeated m times weighs 1/m of its codeword, and the two methods meet."""
    features = F.normalize(torch.randn(30, 32, generator=torch.Generator().manual_seed(3)), dim=-1)
    score, errors = linear_score(torch.linspace(-1, 1, 32)), []
    for repeats in (4, 16, 64):
        many = features.repeat(repeats, 1)
        exact = model.double().attribute_tiles(many, score)
        fast = model.attribute_tiles(many, score, method="gradient")
        errors.append(float((fast - exact).norm() / exact.norm()))
        model.float()
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.02


def test_wrong_input_is_named(model, features):
    with pytest.raises(ValueError, match="'deletion' or 'gradient'"):
        model.attribute_tiles(features, torch.ones(16), method="attention")
    broken = features.clone()
    broken[5, 1] = float("nan")
    with pytest.raises(ValueError, match="tile 5 is not finite"):
        model.attribute_tiles(broken, torch.ones(16))
