# SPDX-License-Identifier: Apache-2.0
"""The drift of stored features, and what correcting by it is worth."""

import torch

from modeling_dre_slcl import MemoryBank
from modeling_dre_slcl.residual_encoder import residual_sums
from modeling_dre_slcl.residual_estimate import codeword_drift

from .tiny_models import IMAGE_SIZE, tiny_model


def random_case(seed=0, slides=3, tiles=40, sampled=10, width=6, codewords=4):
    torch.manual_seed(seed)
    codebook = torch.randn(codewords, width)
    # Near its codeword, so that a small step does not change its assignment; rounded as the bank rounds.
    features = codebook[torch.randint(codewords, (slides, tiles))] + 0.1 * torch.randn(slides, tiles, width)
    features = features.half().float()
    chosen = torch.stack([torch.randperm(tiles)[:sampled] for _ in range(slides)])
    return features, codebook, chosen


def test_drift_is_the_mean_movement_at_each_codeword():
    features, codebook, chosen = random_case()
    stored = torch.gather(features, 1, chosen[..., None].expand(-1, -1, features.shape[-1]))
    fresh = stored + 0.1 * torch.randn_like(stored)
    is_stored = torch.rand(chosen.shape) < 0.8
    moves = {k: [] for k in range(len(codebook))}
    for slide in range(len(stored)):
        for tile in range(stored.shape[1]):
            if is_stored[slide, tile]:
                nearest = min(range(len(codebook)), key=lambda k: float((stored[slide, tile] - codebook[k]).norm()))
                moves[nearest].append((fresh[slide, tile] - stored[slide, tile]).double())
    everything = torch.stack([move for found in moves.values() for move in found]).mean(dim=0)
    expected = torch.stack([torch.stack(found).mean(dim=0) if found else everything for found in moves.values()])
    torch.testing.assert_close(codeword_drift(fresh, stored, is_stored, codebook), expected.float())


def test_a_codeword_without_sampled_tiles_takes_the_overall_drift_and_nothing_stored_is_no_drift():
    _, codebook, _ = random_case()
    stored = codebook[:1].expand(1, 5, -1).clone()
    fresh = stored + 0.5
    drift = codeword_drift(fresh, stored, torch.ones(1, 5, dtype=torch.bool), codebook)
    torch.testing.assert_close(drift, torch.full_like(codebook, 0.5))
    nothing = codeword_drift(fresh, stored, torch.zeros(1, 5, dtype=torch.bool), codebook)
    assert torch.equal(nothing, torch.zeros_like(codebook))


def test_where_all_tiles_of_a_codeword_move_together_the_corrected_residuals_are_the_fresh_ones():
    features, codebook, chosen = random_case()
    slides, tiles = features.shape[:2]
    bank = MemoryBank(features.shape[-1], len(codebook))
    bank.allocate([tiles] * slides)
    everything = torch.arange(tiles).expand(slides, -1)
    bank.write(torch.arange(slides), everything, features, codebook, step=1)
    nearest = torch.cdist(features, codebook).argmin(dim=-1)
    shift = 0.01 * torch.randn(len(codebook), features.shape[-1])
    now = features + shift[nearest]
    assert torch.equal(torch.cdist(now, codebook).argmin(dim=-1), nearest)
    fresh = torch.gather(now, 1, chosen[..., None].expand(-1, -1, features.shape[-1]))
    others, counts = bank.residuals_of_others(torch.arange(slides), chosen, codebook)
    stored, is_stored = bank.read(torch.arange(slides), chosen)
    drift = codeword_drift(fresh, stored, is_stored, codebook)
    corrected = residual_sums(fresh, codebook)[0] + others + counts[..., None] * drift
    exact = residual_sums(now, codebook)[0]
    torch.testing.assert_close(corrected, exact, rtol=1e-3, atol=2e-3)
    uncorrected = residual_sums(fresh, codebook)[0] + others
    assert (corrected - exact).norm() < 0.05 * (uncorrected - exact).norm()


def test_the_model_corrects_by_exactly_this():
    model = tiny_model()
    codebook, width = model.codebook, model.config.hidden_size
    torch.manual_seed(3)
    pixels = torch.randn(2, 5, 3, IMAGE_SIZE, IMAGE_SIZE)
    stored_residuals, stored_counts = torch.randn(2, len(codebook), width), torch.randint(1, 9, (2, len(codebook)))
    stored, is_stored = torch.randn(2, 5, width), torch.rand(2, 5) < 0.7
    with torch.no_grad():
        stored_arguments = {"stored_residuals": stored_residuals, "stored_counts": stored_counts}
        stored_arguments |= {"stored_tile_features": stored, "stored_tile_mask": is_stored}
        outputs = model(pixels, **stored_arguments)
        drift = codeword_drift(outputs.tile_features, stored, is_stored, codebook)
        expected = residual_sums(outputs.tile_features, codebook)[0] + stored_residuals
        expected = expected + stored_counts[..., None] * drift
    torch.testing.assert_close(outputs.residuals, expected)
