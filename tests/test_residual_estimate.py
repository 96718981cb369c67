# SPDX-License-Identifier: Apache-2.0
"""Estimates of whole slides' residuals against sums over all tiles, written out tile by tile."""

from itertools import combinations, product

import torch

from modeling_dre_slcl.residual_encoder import assign_codewords, residual_sums
from modeling_dre_slcl.residual_estimate import estimate_residuals, tiles_stood_for

TILES, WIDTH, CODEWORDS = 7, 5, 3


def slide(seed=0, movement=0.3):
    """Stored and fresh features of a slide `(N, D)`, at the same codewords, and a codebook `(K, D)`."""
    torch.manual_seed(seed)
    codebook = torch.randn(CODEWORDS, WIDTH, dtype=torch.float64)
    stored = codebook[torch.arange(TILES) % CODEWORDS] + 0.4 * torch.randn(TILES, WIDTH, dtype=torch.float64)
    return stored, stored + movement * torch.randn(TILES, WIDTH, dtype=torch.float64), codebook


def gradients(fresh, codebook, chosen, upstream, **options):
    """Encodes `chosen` tiles of a slide, all others are stored as they are now: residuals, gradient by features."""
    others = [tile for tile in range(len(fresh)) if tile not in chosen]
    stored, counts = residual_sums(fresh[None, others], codebook)
    leaf = fresh[None, list(chosen)].clone().requires_grad_()
    residuals, _ = estimate_residuals(leaf, codebook, stored_residuals=stored, stored_counts=counts, **options)
    return residuals.detach(), torch.autograd.grad(residuals, leaf, upstream)[0][0]


def test_tiles_that_stand_for_all_have_the_gradient_of_all_and_the_value_of_one():
    _, fresh, codebook = slide()
    upstream = torch.randn(1, CODEWORDS, WIDTH, dtype=torch.float64)
    codeword = [min(range(CODEWORDS), key=lambda k: float((tile - codebook[k]).norm())) for tile in fresh]
    sizes = [codeword.count(k) for k in range(CODEWORDS)]
    assert min(sizes) > 0
    some_missing = False
    for chosen in combinations(range(TILES), 3):
        found, by_tile = gradients(fresh, codebook, chosen, upstream, stand_for_all=True)
        torch.testing.assert_close(found, residual_sums(fresh[None], codebook)[0])
        expected = torch.zeros(3, WIDTH, dtype=torch.float64)
        for k in range(CODEWORDS):
            standing = [place for place, tile in enumerate(chosen) if codeword[tile] == k]
            if not standing:
                some_missing = True
                standing = [min(range(3), key=lambda place: float((fresh[chosen[place]] - codebook[k]).norm()))]
            for place in standing:
                expected[place] += sizes[k] / len(standing) * upstream[0, k]
        torch.testing.assert_close(by_tile, expected)
    assert some_missing
    torch.testing.assert_close(
        gradients(fresh, codebook, (0, 4, 5), upstream)[1], upstream[0, [codeword[tile] for tile in (0, 4, 5)]]
    )


def test_with_tiles_of_every_codeword_the_mean_gradient_over_all_draws_is_that_of_all_tiles():
    _, fresh, codebook = slide()
    # Not the gradient by features, which is alike at a codeword, but that of an encoder's parameters behind them.
    inputs, matrix = torch.randn(TILES, 4, dtype=torch.float64), torch.zeros(4, WIDTH, dtype=torch.float64)
    upstream = torch.randn(1, CODEWORDS, WIDTH, dtype=torch.float64)
    codeword = assign_codewords(fresh, codebook)
    strata = [(codeword == k).nonzero()[:, 0].tolist() for k in range(CODEWORDS)]
    draws = [
        inputs[list(chosen)].T @ gradients(fresh, codebook, chosen, upstream, stand_for_all=True)[1]
        for chosen in product(*strata)
    ]
    matrix.requires_grad_()
    whole, _ = residual_sums((fresh + inputs @ matrix)[None], codebook)
    (expected,) = torch.autograd.grad(whole, matrix, upstream)
    torch.testing.assert_close(torch.stack(draws).mean(dim=0), expected)


def test_padding_stands_for_nothing_and_all_tiles_are_stood_for_at_dropped_codewords_too():
    _, fresh, codebook = slide()
    counts = residual_sums(fresh[None, :2], codebook)[1] + 5
    mask = torch.tensor([[True, True, False, False]])
    shares = tiles_stood_for(torch.cat([fresh[:2], codebook[[0, 2]]])[None], codebook, counts, mask)
    assert not shares[0, 2:].any()
    torch.testing.assert_close(shares.sum(dim=1), counts)
    assert not tiles_stood_for(fresh[None, :2], codebook, counts, torch.zeros(1, 2, dtype=torch.bool)).any()
    upstream = torch.ones(1, CODEWORDS, WIDTH, dtype=torch.float64)
    dropped = torch.ones(1, CODEWORDS, dtype=torch.bool)
    _, by_tile = gradients(fresh, codebook, (0, 1), upstream, stand_for_all=True, dropped_codewords=dropped)
    # Dropped or not, all tiles are stood for.
    torch.testing.assert_close(by_tile.sum(dim=0), torch.full((WIDTH,), float(len(fresh)), dtype=torch.float64))


def test_at_a_dropped_codeword_fresh_tiles_count_as_often_as_it_has_tiles_unless_there_are_none():
    stored, fresh, codebook = slide(movement=0.01)
    chosen = fresh[None, :2]  # of codewords 0 and 1
    others, other_counts = residual_sums(stored[None, 2:], codebook)
    own, own_counts = residual_sums(chosen, codebook)
    dropped = torch.tensor([[True, False, True]])
    found, counts = estimate_residuals(
        chosen, codebook, stored_residuals=others, stored_counts=other_counts, dropped_codewords=dropped
    )
    assert own_counts[0, 0] == 1
    torch.testing.assert_close(found[0, 0], own[0, 0] * counts[0, 0])
    torch.testing.assert_close(found[0, 1], own[0, 1] + others[0, 1])
    torch.testing.assert_close(found[0, 2], others[0, 2])
    assert counts[0].tolist() == (own_counts + other_counts)[0].tolist()
