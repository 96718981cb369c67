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


def loop_siglip(slides, reports, scale, bias, groups, negatives=(), negative_groups=()):
    """SigLIP's loss, one pair at a time: -log sigmoid(+-(scale * cosine + bias)), summed, over the slides."""

    def term(slide, report, sign):
        score = sign * (scale * sum(a * b for a, b in zip(slide, report, strict=True)) + bias)
        return math.log1p(math.exp(-score))

    total = 0.0
    for i, slide in enumerate(slides):
        total += sum(term(slide, report, 1 if groups[i] == groups[j] else -1) for j, report in enumerate(reports))
        pairs = zip(negatives, negative_groups, strict=True)
        total += sum(term(slide, report, -1) for report, group in pairs if group not in groups)
    return total / len(slides)


def loop_with_negatives(slides, reports, scale, groups, negatives, negative_groups):
    """Symmetric InfoNCE where each slide is also told from reports of groups that the batch does not hold."""
    others = [report for report, group in zip(negatives, negative_groups, strict=True) if group not in groups]

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    total = 0.0
    for i in range(len(slides)):
        positives = [j for j in range(len(slides)) if groups[j] == groups[i]]
        to_reports = [scale * cosine(slides[i], report) for report in (*reports, *others)]
        to_slides = [scale * cosine(slide, reports[i]) for slide in slides]
        for scores in (to_reports, to_slides):
            log_sum = math.log(sum(math.exp(score) for score in scores))
            total -= sum(scores[j] - log_sum for j in positives) / len(positives) / 2
    return total / len(slides)


GROUPS = [4, 4, 9, 1, 9, 5]
NEGATIVE_GROUPS = [9, 20, 21, 1, 22]


@pytest.mark.parametrize("with_negatives", [False, True])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (14.3, 0.5)])
def test_siglip_equals_the_loop(scale, bias, with_negatives):
    slides, reports = unit_pairs(6)
    negatives, _ = unit_pairs(5, seed=1)
    extra = {"negative_projection": negatives, "negative_group_ids": torch.tensor(NEGATIVE_GROUPS)}
    found = slide_level_contrastive_loss(
        *(slides, reports, torch.tensor(scale, dtype=torch.float64), torch.tensor(GROUPS)),
        logit_bias=torch.tensor(bias, dtype=torch.float64),
        **(extra if with_negatives else {}),
    )
    more = (negatives.tolist(), NEGATIVE_GROUPS) if with_negatives else ()
    expected = loop_siglip(slides.tolist(), reports.tolist(), scale, bias, GROUPS, *more)
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_all_reports_as_negatives_equal_the_loop(scale):
    slides, reports = unit_pairs(6)
    negatives, _ = unit_pairs(5, seed=1)
    found = slide_level_contrastive_loss(
        *(slides, reports, torch.tensor(scale, dtype=torch.float64), torch.tensor(GROUPS)),
        negative_projection=negatives,
        negative_group_ids=torch.tensor(NEGATIVE_GROUPS),
    )
    expected = loop_with_negatives(
        slides.tolist(), reports.tolist(), scale, GROUPS, negatives.tolist(), NEGATIVE_GROUPS
    )
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bias", [None, -10.0])
def test_a_slide_without_report_changes_nothing_and_learns_nothing(bias):
    slides, reports = unit_pairs(6)
    slides.requires_grad_()
    keep, scale = [0, 2, 3, 5], torch.tensor(5.0, dtype=torch.float64)
    groups = torch.tensor([[4, 0], [-1, -1], [9, 1], [1, 2], [-1, -1], [9, 3]])
    bias = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    loss = slide_level_contrastive_loss(slides, reports, scale, groups, logit_bias=bias)
    few = slide_level_contrastive_loss(slides[keep], reports[keep], scale, groups[keep], logit_bias=bias)
    torch.testing.assert_close(loss, few, rtol=1e-12, atol=0)
    loss.backward()
    assert (slides.grad[[1, 4]] == 0).all()
    nobody = slide_level_contrastive_loss(slides, reports, scale, torch.full((6,), -1), logit_bias=bias)
    assert float(nobody) == 0
    nobody.backward()
    assert slides.grad.isfinite().all()


def test_groups_of_several_columns_are_joined_where_any_column_agrees():
    slides, reports = unit_pairs(4)
    scale = torch.tensor(5.0, dtype=torch.float64)
    found = slide_level_contrastive_loss(slides, reports, scale, torch.tensor([[0, 0], [1, 0], [2, 1], [3, 2]]))
    expected = slide_level_contrastive_loss(slides, reports, scale, torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_siglips_gradient_is_that_of_finite_differences():
    slides, reports = (tensor.requires_grad_() for tensor in unit_pairs(4))
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (5.0, -2.0))
    negatives, _ = unit_pairs(3, seed=1)
    groups = {"group_ids": torch.tensor([0, 1, 1, 2]), "negative_group_ids": torch.tensor([7, 1, 8])}
    assert torch.autograd.gradcheck(
        lambda s, r, t, b, n: slide_level_contrastive_loss(s, r, t, logit_bias=b, negative_projection=n, **groups),
        (slides, reports, scale, bias, negatives.requires_grad_()),
    )
