# SPDX-License-Identifier: Apache-2.0
"""Estimates of whole slides' residuals against sums over all tiles, written out tile by tile."""

from itertools import product

import torch

from modeling_dre_slcl.residual_encoder import residual_sums
from modeling_dre_slcl.residual_estimate import estimate_residuals

TILES, WIDTH, CODEWORDS = 7, 5, 3


def slide(seed=0, movement=0.3):
    """Stored and fresh features of a slide `(N, D)`, at the same codewords, and a codebook `(K, D)`."""
    torch.manual_seed(seed)
    codebook = torch.randn(CODEWORDS, WIDTH, dtype=torch.float64)
    stored = codebook[torch.arange(TILES) % CODEWORDS] + 0.4 * torch.randn(TILES, WIDTH, dtype=torch.float64)
    return stored, stored + movement * torch.randn(TILES, WIDTH, dtype=torch.float64), codebook


def test_weights_multiply_gradients_and_leave_values():
    _, fresh, codebook = slide()
    weights = torch.tensor([[3.0, 1.0, 2.5, 4.0, 1.0, 1.0, 0.5]], dtype=torch.float64)
    upstream = torch.randn(1, CODEWORDS, WIDTH, dtype=torch.float64)
    results = []
    for tile_weights in (None, weights):
        leaf = fresh[None].clone().requires_grad_()
        residuals, _ = estimate_residuals(leaf, codebook, tile_weights=tile_weights)
        results.append((residuals.detach(), torch.autograd.grad(residuals, leaf, upstream)[0]))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], weights[..., None] * results[0][1])


def test_with_strata_the_mean_gradient_over_all_draws_is_that_of_all_tiles():
    _, fresh, codebook = slide()
    upstream = torch.randn(1, CODEWORDS, WIDTH, dtype=torch.float64)
    draws, strata = [], ((0, 1, 2), (3, 4), (5, 6))
    for chosen in product(*strata):
        leaf = fresh[None].clone().requires_grad_()
        weights = torch.tensor([[float(len(stratum)) for stratum in strata]], dtype=torch.float64)
        residuals, _ = estimate_residuals(leaf[:, list(chosen)], codebook, tile_weights=weights)
        draws.append(torch.autograd.grad(residuals, leaf, upstream)[0])
    leaf = fresh[None].clone().requires_grad_()
    expected = torch.autograd.grad(residual_sums(leaf, codebook)[0], leaf, upstream)[0]
    torch.testing.assert_close(torch.stack(draws).mean(dim=0), expected)


def test_a_dropped_codeword_counts_fresh_tiles_alone_unless_there_are_none():
    stored, fresh, codebook = slide(movement=0.01)
    chosen = fresh[None, :2]  # of codewords 0 and 1
    others, other_counts = residual_sums(stored[None, 2:], codebook)
    own, own_counts = residual_sums(chosen, codebook)
    dropped = torch.tensor([[True, False, True]])
    found, counts = estimate_residuals(
        chosen, codebook, stored_residuals=others, stored_counts=other_counts, dropped_codewords=dropped
    )
    torch.testing.assert_close(found[0, 0], own[0, 0])
    torch.testing.assert_close(found[0, 1], own[0, 1] + others[0, 1])
    torch.testing.assert_close(found[0, 2], others[0, 2])
    assert counts[0].tolist() == [1, own_counts[0, 1] + other_counts[0, 1], other_counts[0, 2]]
