# SPDX-License-Identifier: Apache-2.0
"""Pooling of token states, under either padding side, against loops."""

import pytest
import torch

from modeling_dre_slcl.report_encoder import pool_report_states

MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "none": [[1] * 5] * 3,
}


def loop_pool(states, mask, pooling):
    real = [state for state, keep in zip(states, mask, strict=True) if keep]
    return {"mean": sum(real) / len(real), "cls": real[0], "last": real[-1]}[pooling]


@pytest.fixture
def states():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", MASKS)
def test_equals_the_loops(states, side, pooling):
    expected = torch.stack([loop_pool(*pair, pooling) for pair in zip(states, MASKS[side], strict=True)])
    mask = torch.tensor(MASKS[side])
    torch.testing.assert_close(pool_report_states(states, mask, pooling), expected)
    torch.testing.assert_close(pool_report_states(states, mask.bool(), pooling), expected)
    if side == "none":
        torch.testing.assert_close(pool_report_states(states, None, pooling), expected)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_has_no_say(states, pooling):
    mask = torch.tensor(MASKS["right"])
    expected = pool_report_states(states, mask, pooling)
    states[mask == 0] = 1e6
    torch.testing.assert_close(pool_report_states(states, mask, pooling), expected)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_an_empty_text_gives_finite_numbers(states, pooling):
    pooled = pool_report_states(states, torch.zeros(3, 5, dtype=torch.int64), pooling)
    assert torch.isfinite(pooled).all()
