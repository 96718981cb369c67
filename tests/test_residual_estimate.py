# SPDX-License-Identifier: Apache-2.0
"""Estimates of whole slides' residuals against sums over all tiles, written out tile by tile."""

from itertools import combinations

import torch

from modeling_dre_slcl.residual_encoder import residual_sums
from modeling_dre_slcl.residual_estimate import codeword_drift, estimate_residuals

TILES, WIDTH, CODEWORDS = 7, 5, 3


def slide(seed=0, movement=0.3):
    """Stored and fresh features of a slide `(N, D)`, at the same codewords, and a codebook `(K, D)`."""
    torch.manual_seed(seed)
    codebook = torch.randn(CODEWORDS, WIDTH, dtype=torch.float64)
    stored = codebook[torch.arange(TILES) % CODEWORDS] + 0.4 * torch.randn(TILES, WIDTH, dtype=torch.float64)
    return stored, stored + movement * torch.randn(TILES, WIDTH, dtype=torch.float64), codebook


def sums(features, codebook):
    """Residual sums `(K, D)` by a loop."""
    total = torch.zeros_like(codebook)
    for feature in features:
        nearest = min(range(len(codebook)), key=lambda k: float((feature - codebook[k]).norm()))
        total[nearest] += feature - codebook[nearest]
    return total


def estimate(stored, fresh, codebook, chosen, **options):
    others = [tile for tile in range(len(stored)) if tile not in chosen]
    residuals, counts = residual_sums(stored[others][None], codebook)
    chosen = list(chosen)
    return estimate_residuals(
        fresh[chosen][None],
        codebook,
        tile_weights=torch.full((1, len(chosen)), len(stored) / len(chosen), dtype=torch.float64),
        stored_residuals=residuals,
        stored_counts=counts,
        stored_tile_features=stored[chosen][None],
        stored_tile_mask=torch.ones(1, len(chosen), dtype=torch.bool),
        **options,
    )[0][0]


def test_at_full_strength_the_mean_over_all_draws_is_the_fresh_sum():
    stored, fresh, codebook = slide()
    moved = torch.cdist(fresh, codebook).argmin(dim=1) != torch.cdist(stored, codebook).argmin(dim=1)
    assert not moved.any()
    draws = list(combinations(range(TILES), 3))
    # The drift of each draw depends on the draw; given a drift, the control variate takes out its bias. So the drift
    # is held still: zero, by a batch whose other slide moves the other way.
    found = []
    for chosen in draws:
        others = [tile for tile in range(TILES) if tile not in chosen]
        both_fresh = torch.stack([fresh[list(chosen)], 2 * stored[list(chosen)] - fresh[list(chosen)]])
        both_stored = stored[list(chosen)].expand(2, -1, -1)
        is_stored = torch.ones(2, 3, dtype=torch.bool)
        drift = codeword_drift(both_fresh, both_stored, is_stored, codebook)
        torch.testing.assert_close(drift, torch.zeros_like(drift), atol=1e-6, rtol=0)
        residuals, counts = residual_sums(stored[others].expand(2, -1, -1), codebook)
        estimated, _ = estimate_residuals(
            both_fresh,
            codebook,
            tile_weights=torch.full((2, 3), TILES / 3, dtype=torch.float64),
            stored_residuals=residuals,
            stored_counts=counts,
            stored_tile_features=both_stored,
            stored_tile_mask=is_stored,
            control_strength=1.0,
        )
        found.append(estimated[0])
    torch.testing.assert_close(torch.stack(found).mean(dim=0), sums(fresh, codebook), rtol=1e-6, atol=1e-6)
    assert (sums(stored, codebook) - sums(fresh, codebook)).norm() > 0.1


def test_of_a_fresh_bank_every_estimate_is_the_sum_over_all_tiles():
    stored, _, codebook = slide()
    for strength in (0.0, 0.3, 1.0):
        found = estimate(stored, stored, codebook, (0, 2, 5), control_strength=strength)
        torch.testing.assert_close(found, sums(stored, codebook))


def test_the_control_variate_written_out_tile_by_tile():
    stored, fresh, codebook = slide(seed=1)
    chosen, strength, weight = (1, 2, 6), 0.4, TILES / 3
    picked = list(chosen)
    is_stored = torch.ones(1, 3, dtype=torch.bool)
    drift = codeword_drift(fresh[picked][None], stored[picked][None], is_stored, codebook).double()
    expected = sums(fresh[picked], codebook)
    for tile in range(TILES):
        if tile in chosen:
            now = sums(fresh[tile : tile + 1], codebook)
            expected = expected + strength * (weight - 1) * now
        before = sums(stored[tile : tile + 1], codebook)
        nearest = int(torch.cdist(stored[tile : tile + 1], codebook).argmin())
        before[nearest] += drift[nearest]
        expected = expected + (-strength * (weight - 1) if tile in chosen else 1.0) * before
    found = estimate(stored, fresh, codebook, chosen, control_strength=strength)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


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


def test_only_stale_tiles_drift():
    stored, fresh, codebook = slide(movement=0.01)
    others, counts = residual_sums(stored[None, 3:], codebook)
    options = {"stored_residuals": others, "stored_counts": counts, "stored_tile_features": stored[None, :3]}
    options |= {"stored_tile_mask": torch.ones(1, 3, dtype=torch.bool), "stale_counts": torch.zeros_like(counts)}
    found, _ = estimate_residuals(fresh[None, :3], codebook, **options)
    torch.testing.assert_close(found, others + residual_sums(fresh[None, :3], codebook)[0])


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
