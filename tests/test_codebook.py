# SPDX-License-Identifier: Apache-2.0
"""K-means finds known centres, deterministically, and keeps the order of a codebook that it starts from."""

import numpy as np
import pytest

from dre_slcl.training.codebook import fit_codebook


def blobs(seed=0, per_center=200):
    random = np.random.default_rng(seed)
    centers = random.normal(size=(5, 12)).astype(np.float32)
    noise = 0.02 * random.normal(size=(per_center, 5, 12))
    return centers, (centers + noise).reshape(-1, 12).astype(np.float32)


def test_finds_the_centres():
    centers, features = blobs()
    found = fit_codebook(features, 5, seed=1)
    distances = np.linalg.norm(found[:, None] - centers[None], axis=-1)
    assert sorted(distances.argmin(axis=1)) == list(range(5))
    assert distances.min(axis=1).max() < 0.02


def test_same_seed_same_bits():
    _, features = blobs()
    assert fit_codebook(features, 7, seed=4).tobytes() == fit_codebook(features, 7, seed=4).tobytes()


def test_keeps_the_order_of_its_start():
    centers, features = blobs()
    order = [3, 0, 4, 1, 2]
    found = fit_codebook(features, 5, seed=0, start=centers[order] + 0.05)
    np.testing.assert_allclose(found, centers[order], atol=0.02)


def test_too_few_or_broken_features_are_refused():
    with pytest.raises(ValueError, match="at least 4 distinct tile features, found 2"):
        fit_codebook(np.repeat(np.eye(2), 10, axis=0), 4, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        fit_codebook(np.full((10, 3), np.nan), 2, seed=0)
