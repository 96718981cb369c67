# SPDX-License-Identifier: Apache-2.0
"""Attribution against leaving each tile out for real."""

import pytest
import torch
import torch.nn.functional as F

from .tiny_models import IMAGE_SIZE, tiny_model


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
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


def test_a_slide_of_one_tile_has_a_finite_attribution(model, features):
    assert torch.isfinite(model.attribute_tiles(features[:1], torch.ones(16))).all()


def test_half_precision_models_give_finite_numbers(features):
    model = tiny_model().half()
    assert torch.isfinite(model.attribute_tiles(features, torch.ones(16))).all()
