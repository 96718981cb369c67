# SPDX-License-Identifier: Apache-2.0
"""The drift of stored features against the same regression written out, and what moving them along is worth."""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from modeling_dre_slcl import MemoryBank
from modeling_dre_slcl.feature_drift import fit_drift
from modeling_dre_slcl.residual_encoder import residual_sums
from modeling_dre_slcl.residual_estimate import estimate_residuals

from .tiny_models import IMAGE_SIZE, tiny_model

SLIDES, TILES, SAMPLED, WIDTH, CODEWORDS = 3, 60, 20, 6, 4
NOW = 30


def drifting(seed=0):
    """Stored features `(SLIDES, TILES, WIDTH)`, where they are now, and their ages: a rotation goes on with age."""
    torch.manual_seed(seed)
    stored = F.normalize(torch.randn(SLIDES, TILES, WIDTH), dim=-1)
    ages = torch.randint(1, NOW, (SLIDES, TILES))
    turn = torch.randn(WIDTH, WIDTH)
    turn = 0.01 * (turn - turn.T)
    turned = torch.linalg.matrix_exp(turn * ages[..., None, None])
    return stored, (turned @ stored[..., None])[..., 0], ages


def sampled(*parts):
    return [part[:, :SAMPLED] for part in parts]


def test_predictions_are_those_of_the_formula_written_out_tile_by_tile():
    stored, fresh, ages = drifting()
    torch.manual_seed(1)
    is_stored = torch.rand(SLIDES, SAMPLED) < 0.8
    drift = fit_drift(*sampled(fresh, stored, ages), is_stored)
    near, then, now, steps = (part[is_stored].double().numpy() for part in sampled(stored, stored, fresh, ages))

    def kernel(first, first_age, second, second_age):
        cosine = sum(a * b for a, b in zip(first, second, strict=True))
        return min(first_age, second_age) * (math.exp((cosine - 1) / 0.49) + 0.2 * (1 + cosine))

    pairs = list(zip(near, steps, strict=True))
    gram = np.array([[kernel(*first, *second) for second in pairs] for first in pairs])
    weights = np.linalg.inv(gram + 0.005 * np.trace(gram) / len(gram) * np.eye(len(gram))) @ (now - then)
    for tile in range(SAMPLED, SAMPLED + 5):
        feature, age = stored[1, tile].double().numpy(), float(ages[1, tile])
        moved = feature + [kernel(feature, age, *pair) for pair in pairs] @ weights
        found = drift.move(stored[1, tile][None], ages[1, tile][None])[0]
        np.testing.assert_allclose(found.numpy(), moved, atol=1e-5)


def test_other_tiles_are_found_where_the_same_drift_has_taken_them():
    stored, fresh, ages = drifting()
    drift = fit_drift(*sampled(fresh, stored, ages), torch.ones(SLIDES, SAMPLED, dtype=torch.bool))
    others, now, steps = (part[:, SAMPLED:].flatten(0, 1) for part in (stored, fresh, ages))
    before, after = (others - now).norm(), (drift.move(others, steps) - now).norm()
    assert before > 1
    assert after < 0.3 * before


def test_what_was_just_stored_stays_and_without_stored_tiles_all_stays():
    stored, fresh, ages = drifting()
    measured = fit_drift(*sampled(fresh, stored, ages), torch.ones(SLIDES, SAMPLED, dtype=torch.bool))
    assert torch.equal(measured.move(stored[0], torch.zeros(TILES)), stored[0])
    nothing = fit_drift(*sampled(fresh, stored, ages), torch.zeros(SLIDES, SAMPLED, dtype=torch.bool))
    assert torch.equal(nothing.move(stored[0], ages[0]), stored[0])
    just_stored = fit_drift(*sampled(fresh, stored, 0 * ages), torch.ones(SLIDES, SAMPLED, dtype=torch.bool))
    assert torch.equal(just_stored.move(stored[0], ages[0]), stored[0])


def test_moved_tiles_change_codewords_and_the_estimate_is_near_the_fresh_sums():
    stored, fresh, ages = drifting()
    codebook = F.normalize(torch.randn(CODEWORDS, WIDTH), dim=-1)
    bank, slides = MemoryBank(WIDTH, CODEWORDS), torch.arange(SLIDES)
    bank.allocate([TILES] * SLIDES, dtype=torch.float32)
    for age in range(1, NOW):
        for slide, tile in (ages == age).nonzero().tolist():
            where = torch.tensor([slide]), torch.tensor([[tile]])
            bank.write(*where, stored[slide, tile][None, None], codebook, NOW + 1 - age)
    chosen = torch.arange(SAMPLED).expand(SLIDES, -1)
    assert torch.equal(bank.ages(slides, chosen, NOW), ages[:, :SAMPLED])
    features, is_stored = bank.read(slides, chosen)
    found, counts = estimate_residuals(
        fresh[:, :SAMPLED],
        codebook,
        stored_tile_features=features,
        stored_tile_ages=bank.ages(slides, chosen, NOW),
        stored_tile_mask=is_stored,
        moved_sums=partial(bank.moved_residuals_of_others, slides, chosen, codebook, NOW),
    )
    expected, _ = residual_sums(fresh, codebook)
    others, other_counts = bank.residuals_of_others(slides, chosen, codebook)
    own, own_counts = residual_sums(fresh[:, :SAMPLED], codebook)
    assert counts.sum(dim=1).tolist() == [TILES] * SLIDES
    assert not torch.equal(counts, own_counts + other_counts)
    assert (found - expected).norm() < 0.5 * (own + others - expected).norm()


def test_sums_of_moved_tiles_by_a_loop_and_without_movement_as_stored():
    stored, fresh, ages = drifting()
    codebook = F.normalize(torch.randn(CODEWORDS, WIDTH), dim=-1)
    bank, slides = MemoryBank(WIDTH, CODEWORDS), torch.tensor([2, 0])
    bank.allocate([TILES] * SLIDES, dtype=torch.float32)
    missing = 5
    tiles = torch.arange(missing, TILES).expand(SLIDES, -1)
    bank.write(torch.arange(SLIDES), tiles, stored[:, missing:], codebook, 0)
    left_out = torch.tensor([[7, 50, -1], [1, 9, 10]])
    drift = fit_drift(*sampled(fresh, stored, ages), torch.ones(SLIDES, SAMPLED, dtype=torch.bool))
    found, counts = bank.moved_residuals_of_others(slides, left_out, codebook, 12, drift)
    for place, slide in enumerate(slides.tolist()):
        expected, numbers = torch.zeros(CODEWORDS, WIDTH, dtype=torch.float64), [0] * CODEWORDS
        for tile in set(range(missing, TILES)) - set(left_out[place].tolist()):
            moved = drift.move(stored[slide, tile][None], torch.tensor([13]))[0].double()
            nearest = min(range(CODEWORDS), key=lambda k: float((moved - codebook[k]).norm()))
            expected[nearest] += moved - codebook[nearest]
            numbers[nearest] += 1
        assert counts[place].tolist() == numbers
        torch.testing.assert_close(found[place], expected, rtol=1e-5, atol=1e-5)
    still = bank.moved_residuals_of_others(slides, left_out, codebook, -1, drift)
    for part, as_stored in zip(still, bank.residuals_of_others(slides, left_out, codebook), strict=True):
        torch.testing.assert_close(part.float(), as_stored.float(), rtol=1e-5, atol=1e-5)


def test_the_model_hands_the_drift_to_what_sums_the_moved_tiles():
    model = tiny_model()
    codebook, width = model.codebook, model.config.hidden_size
    torch.manual_seed(3)
    pixels = torch.randn(2, 5, 3, IMAGE_SIZE, IMAGE_SIZE)
    sums, counts = torch.randn(2, len(codebook), width), torch.randint(1, 9, (2, len(codebook)))
    stored, is_stored = F.normalize(torch.randn(2, 5, width), dim=-1), torch.rand(2, 5) < 0.7
    ages, given = torch.randint(1, 9, (2, 5)), []
    with torch.no_grad():
        stored_arguments = {"stored_tile_features": stored, "stored_tile_ages": ages, "stored_tile_mask": is_stored}
        outputs = model(pixels, **stored_arguments, moved_sums=lambda drift: (given.append(drift), (sums, counts))[1])
    torch.testing.assert_close(outputs.residuals, residual_sums(outputs.tile_features, codebook)[0] + sums)
    expected = fit_drift(outputs.tile_features, stored, ages, is_stored)
    torch.testing.assert_close(given[0].move(stored[0], ages[0]), expected.move(stored[0], ages[0]))
