# SPDX-License-Identifier: Apache-2.0
"""Part 4 against loops over slides and reports, one pair at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_dre_slcl.contrastive_loss import gather_rows, similarity_logits, slide_level_contrastive_loss


def loop_loss(slides, reports, scale, groups):
    """Symmetric InfoNCE with uniform targets within groups, one pair at a time, in Python's float64."""

    def one_way(rows, columns):
        total = 0.0
        for i, row in enumerate(rows):
            scores = [scale * sum(a * b for a, b in zip(row, column, strict=True)) for column in columns]
            log_sum = math.log(sum(math.exp(score - max(scores)) for score in scores)) + max(scores)
            positives = [j for j in range(len(columns)) if groups[j] == groups[i]]
            total -= sum(scores[j] - log_sum for j in positives) / len(positives)
        return total / len(rows)

    return (one_way(slides, reports) + one_way(reports, slides)) / 2


def unit_pairs(count, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return F.normalize(pairs, dim=-1).unbind()


@pytest.mark.parametrize("groups", [None, [0, 1, 2, 3, 4, 5], [4, 4, 9, 1, 9, 4], [3] * 6])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_the_loops(groups, scale):
    slides, reports = unit_pairs(6)
    group_ids = None if groups is None else torch.tensor(groups)
    loss = slide_level_contrastive_loss(slides, reports, torch.tensor(scale, dtype=torch.float64), group_ids)
    expected = loop_loss(slides.tolist(), reports.tolist(), scale, groups or range(6))
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_its_gradient_is_that_of_finite_differences():
    slides, reports = (tensor.requires_grad_() for tensor in unit_pairs(4))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    group_ids = torch.tensor([0, 1, 1, 2])
    assert torch.autograd.gradcheck(
        lambda *inputs: slide_level_contrastive_loss(*inputs, group_ids), (slides, reports, scale)
    )


def test_perfect_pairs_have_no_loss_and_equal_ones_the_logarithm_of_the_batch():
    slides = torch.eye(5)
    assert float(slide_level_contrastive_loss(slides, slides, torch.tensor(100.0))) < 1e-6
    same = torch.ones(5, 1)
    assert float(slide_level_contrastive_loss(same, same, torch.tensor(3.0))) == pytest.approx(math.log(5))


def test_similarities_keep_their_digits_under_autocast_and_in_half_precision():
    slides, reports = unit_pairs(6, width=512)
    exact = 100 * slides @ reports.T
    slides, reports, scale = slides.bfloat16(), reports.bfloat16(), torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = similarity_logits(slides, reports, scale)
    assert logits.dtype == torch.float32
    rounded_inputs = 100 * slides.double() @ reports.double().T
    torch.testing.assert_close(logits.double(), rounded_inputs, rtol=0, atol=1e-4)
    assert float((rounded_inputs - exact).abs().max()) < 0.1


def test_a_single_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
