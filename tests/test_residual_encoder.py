# SPDX-License-Identifier: Apache-2.0
"""Part 3 against a slow reference in plain loops."""

import math

import numpy as np
import pytest
import torch

from modeling_dre_slcl.residual_encoder import (
    ResidualEncoder,
    assign_codewords,
    mean_tokens,
    normalize_residuals,
    residual_sums,
)

SLIDES, TILES, CODEWORDS, WIDTH = 3, 20, 5, 8


def loop_assignment(feature, codebook):
    distances = [math.dist(feature, codeword) for codeword in codebook]
    return distances.index(min(distances))


def loop_residuals(features, codebook, mask=None):
    """VLAD sums of one slide, tile by tile, in Python's float64."""
    sums = [[0.0] * len(codebook[0]) for _ in codebook]
    counts = [0] * len(codebook)
    for tile, feature in enumerate(features):
        if mask is not None and not mask[tile]:
            continue
        nearest = loop_assignment(feature, codebook)
        counts[nearest] += 1
        for axis, (x, c) in enumerate(zip(feature, codebook[nearest], strict=True)):
            sums[nearest][axis] += x - c
    return sums, counts


def loop_normalize(residuals):
    rows = []
    for row in residuals:
        length = math.sqrt(sum(x * x for x in row))
        rows.append([x / length if length else 0.0 for x in row])
    length = math.sqrt(sum(x * x for row in rows for x in row))
    return [[x / length if length else 0.0 for x in row] for row in rows]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(SLIDES, TILES, WIDTH, generator=generator, dtype=torch.float64)
    codebook = torch.randn(CODEWORDS, WIDTH, generator=generator, dtype=torch.float64)
    codebook[-1] = 100.0  # never the nearest: always empty
    mask = torch.rand(SLIDES, TILES, generator=generator) > 0.3
    return torch.nn.functional.normalize(features, dim=-1), codebook, mask


def make_encoder(**changes):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "layer_norm_eps": 1e-6}
    shape = {"hidden_size": WIDTH, "num_codewords": CODEWORDS, "codeword_tokens": "mean"}
    fields = {**shape, "dropout": 0.0, **sizes, **changes}
    encoder = ResidualEncoder(**fields).double().eval()
    torch.nn.init.normal_(encoder.codeword_embedding)
    return encoder


@pytest.mark.parametrize("masked", [False, True])
def test_residuals_and_normalisation_equal_the_loops(batch, masked):
    features, codebook, mask = batch
    residuals, counts = residual_sums(features, codebook, mask if masked else None)
    normalized = normalize_residuals(residuals)
    for slide in range(SLIDES):
        slide_mask = mask[slide].tolist() if masked else None
        sums, numbers = loop_residuals(features[slide].tolist(), codebook.tolist(), slide_mask)
        torch.testing.assert_close(residuals[slide], torch.tensor(sums, dtype=torch.float64), rtol=0, atol=1e-12)
        assert counts[slide].tolist() == numbers
        expected = torch.tensor(loop_normalize(sums), dtype=torch.float64)
        torch.testing.assert_close(normalized[slide], expected, rtol=0, atol=1e-12)
    assert not normalized[:, -1].any()


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_mean_tokens_are_means_of_tiles_standardised_by_the_codebook(batch, shift):
    """Computed from the tiles themselves, with NumPy; a constant part of all features is not seen."""
    features, codebook, _ = batch
    features, codebook = features + shift, codebook[:-1] + shift
    found = mean_tokens(*residual_sums(features, codebook), codebook)
    centre, spread = codebook.numpy().mean(axis=0), codebook.numpy().std(axis=0)
    expected = []
    for slide in features.numpy():
        nearest = np.array([loop_assignment(tile, codebook.tolist()) for tile in slide])
        rows = [slide[nearest == k].mean(axis=0) if (nearest == k).any() else codebook[k].numpy() for k in range(4)]
        expected.append((np.array(rows) - centre) / np.sqrt(np.mean(spread**2)))
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=0, atol=1e-11)


def test_mean_tokens_of_one_codeword_are_finite_and_move_with_its_tiles():
    codebook = torch.nn.functional.normalize(torch.ones(1, 4), dim=-1)
    features = torch.nn.functional.normalize(torch.tensor([[[1.0, 1, 1, 1], [1, 0, 0, 0]]]), dim=-1)
    found = mean_tokens(*residual_sums(features, codebook), codebook)
    torch.testing.assert_close(found[0], (features[0].mean(dim=0, keepdim=True) - codebook) * 2)


def test_a_codeword_of_n_tiles_counts_as_n_tokens(batch):
    """Against the same layers over each codeword's token as often as it has tiles, each of weight 1."""
    features, codebook, mask = batch
    encoder = make_encoder()
    encoder.codebook.copy_(codebook)
    residuals, counts = residual_sums(features, codebook, mask)
    found = encoder(residuals, counts)
    tokens = mean_tokens(residuals, counts, codebook) + encoder.codeword_embedding
    for slide in range(SLIDES):
        copies = tokens[slide].repeat_interleave(counts[slide].long(), dim=0)[None]
        assert copies.shape[1] == mask[slide].sum()
        for layer in encoder.layers:
            copies, _ = layer(copies, torch.zeros(copies.shape[:2], dtype=torch.float64), need_weights=False)
        expected = encoder.norm(copies).mean(dim=1)[0]
        torch.testing.assert_close(found.slide_embedding[slide], expected, rtol=0, atol=1e-12)


def test_assignment_equals_the_loops_and_the_lowest_index_wins_a_tie(batch):
    features, codebook, _ = batch
    expected = [[loop_assignment(tile, codebook.tolist()) for tile in slide] for slide in features.tolist()]
    assert assign_codewords(features, codebook).tolist() == expected
    twins = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert assign_codewords(torch.tensor([[0.6, 0.8]]), twins).tolist() == [1]


def test_the_gradient_of_a_residual_goes_to_its_tiles_only(batch):
    features, codebook, mask = batch
    features = features.clone().requires_grad_()
    residual_sums(features, codebook, mask)[0][:, 0].sum().backward()
    expected = (assign_codewords(features, codebook) == 0) & mask
    assert torch.equal(features.grad, expected[..., None].double().expand_as(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_features_are_float32(batch, dtype):
    features, codebook, mask = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in batch)
    residuals, counts = residual_sums(features, codebook, mask)
    exact, exact_counts = residual_sums(features.double(), codebook.double(), mask)
    assert residuals.dtype == counts.dtype == torch.float32
    assert torch.equal(counts.double(), exact_counts)
    torch.testing.assert_close(residuals.double(), exact, rtol=0, atol=1e-4 * float(codebook.abs().max()))


def test_autocast_does_not_reach_the_sums(batch):
    features, codebook, mask = (tensor.float() if tensor.is_floating_point() else tensor for tensor in batch)
    expected = residual_sums(features, codebook, mask)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(residual_sums(features, codebook, mask)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normalisation_keeps_empty_codewords_at_zero_in_every_dtype(dtype):
    residuals = torch.zeros(1, 3, 4, dtype=dtype)
    residuals[0, 1, 2] = 5.0
    expected = torch.zeros(1, 3, 4)
    expected[0, 1, 2] = 1.0
    assert torch.equal(normalize_residuals(residuals), expected)


@pytest.mark.parametrize("codeword_tokens", ["mean", "vlad"])
def test_attention_weights_do_not_change_the_result_and_skip_empty_codewords(batch, codeword_tokens):
    features, codebook, mask = batch
    encoder = make_encoder(codeword_tokens=codeword_tokens)
    residuals, counts = residual_sums(features, codebook, mask)
    plain, explained = encoder(residuals, counts), encoder(residuals, counts, need_weights=True)
    torch.testing.assert_close(plain.slide_embedding, explained.slide_embedding, rtol=0, atol=1e-12)
    assert plain.attentions is None
    assert len(explained.attentions) == 2
    assert len(explained.hidden_states) == 3
    for weights in explained.attentions:
        assert weights.shape == (SLIDES, 2, CODEWORDS, CODEWORDS)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(SLIDES, 2, CODEWORDS, dtype=torch.float64))
        assert not weights[..., -1].any()


@pytest.mark.parametrize("codeword_tokens", ["mean", "vlad"])
def test_the_token_of_an_empty_codeword_has_no_say(batch, codeword_tokens):
    features, codebook, _ = batch
    encoder = make_encoder(codeword_tokens=codeword_tokens)
    before = encoder(*residual_sums(features, codebook)).slide_embedding
    encoder.codeword_embedding.data[-1] += 10
    torch.testing.assert_close(encoder(*residual_sums(features, codebook)).slide_embedding, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("codeword_tokens", ["mean", "vlad"])
def test_a_slide_without_tiles_gives_a_finite_embedding_and_leaves_others_alone(batch, codeword_tokens):
    features, codebook, mask = batch
    mask[0] = False
    encoder = make_encoder(codeword_tokens=codeword_tokens)
    residuals, counts = residual_sums(features, codebook, mask)
    embedding = encoder(residuals, counts).slide_embedding
    assert torch.isfinite(embedding).all()
    torch.testing.assert_close(embedding[1:], encoder(residuals[1:], counts[1:]).slide_embedding, rtol=0, atol=1e-12)


def test_with_vlad_tokens_the_embedding_is_the_mean_of_the_normed_tokens_that_have_tiles(batch):
    features, codebook, mask = batch
    encoder = make_encoder(codeword_tokens="vlad")
    residuals, counts = residual_sums(features, codebook, mask)
    output = encoder(residuals, counts)
    values = normalize_residuals(residuals) * (CODEWORDS * WIDTH) ** 0.5
    torch.testing.assert_close(output.hidden_states[0], values + encoder.codeword_embedding, rtol=0, atol=1e-12)
    tokens = encoder.norm(output.hidden_states[-1])
    expected = torch.stack([tokens[slide, counts[slide] > 0].mean(dim=0) for slide in range(SLIDES)])
    torch.testing.assert_close(output.slide_embedding, expected, rtol=0, atol=1e-12)


def test_dropout_acts_in_training_only(batch):
    features, codebook, mask = batch
    encoder = make_encoder(dropout=0.5)
    inputs = residual_sums(features, codebook, mask)
    assert torch.equal(encoder(*inputs).slide_embedding, encoder(*inputs).slide_embedding)
    encoder.train()
    assert not torch.equal(encoder(*inputs).slide_embedding, encoder(*inputs).slide_embedding)
