# SPDX-License-Identifier: Apache-2.0
"""Which text stands for a slide, which are positives together, which are only negatives; and labels from columns."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dre_slcl.training.slide_labels import SlideLabels
from dre_slcl.training.slide_reports import SlideReports, split_report
from dre_slcl.training.slide_rows import SlideRow

GEOMETRY = {"mpp": 1.0, "tile_start": 0, "tile_size_px": 16, "tile_mpp": 1.0, "tile_size_level0_px": 16}


def rows(*described):
    """Rows of (case, report)."""
    corners = np.zeros((1, 2), dtype=np.int32)
    return [
        SlideRow(slide_id=f"s{i}", case_id=case, path="", report=report, tile_xy=corners, **GEOMETRY)
        for i, (case, report) in enumerate(described)
    ]


def encoded(reports):
    """An encoding that can be computed in the head: length and first letter of a text."""
    return torch.tensor([[float(len(text)), float(ord(text[0]))] for text in reports.distinct])


def prepared(table, **options):
    reports = SlideReports(table, **{"separator": None, "sections": "mean", "seed": 0} | options)
    reports.set_encodings(encoded(reports))
    return reports


def together(group_ids):
    return (group_ids[:, None] == group_ids[None, :]).any(dim=-1)


def test_whole_reports_are_as_they_were():
    table = rows(("a", "one"), ("b", "two more"), ("c", "one"), ("d", "  "), ("b", "three"), ("e", "three"))
    reports = prepared(table)
    assert reports.distinct == ["one", "two more", "three"]
    assert reports.has_report == [True, True, True, False, True, True]
    embeds, groups = reports.of_step(7, range(6))
    assert embeds[:, 0].tolist() == [3, 8, 3, 0, 5, 5]
    assert groups[3].tolist() == [-1, -1]
    # b and e share a report, so the other report of b speaks for no other case than theirs.
    linked = {frozenset((0, 2)), frozenset((1, 4, 5)), frozenset((3,))}
    expected = [[any(i in group and j in group for group in linked) for j in range(6)] for i in range(6)]
    assert together(groups).tolist() == expected
    assert reports.mean_embed()[0] == pytest.approx((3 + 8 + 5) / 3)


def test_sections_are_averaged():
    reports = prepared(rows(("a", "xx | yyyy|"), ("b", "xx")), separator="|")
    assert reports.distinct == ["xx", "yyyy"]
    assert reports.of_step(0, [0, 1])[0].tolist() == [[3, (ord("x") + ord("y")) / 2], [2, ord("x")]]


def test_a_section_is_sampled_for_each_step_and_slide_whoever_asks():
    table = rows(*((f"c{i}", "xx|yyyy|zzzzzz") for i in range(4)))
    reports = prepared(table, separator="|", sections="sample")
    drawn = torch.stack([reports.of_step(step, range(4))[0][:, 0] for step in range(300)])
    assert torch.equal(drawn[17, 2], prepared(table, separator="|", sections="sample").of_step(17, [2])[0][0, 0])
    for length in (2, 4, 6):
        assert (drawn == length).float().mean() == pytest.approx(1 / 3, abs=0.05)
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    assert not torch.equal(drawn, torch.stack([other(table).of_step(s, range(4))[0][:, 0] for s in range(300)]))


def other(table):
    return prepared(table, separator="|", sections="sample", seed=1)


def test_a_section_that_many_cases_share_links_them_only_where_both_drew_it():
    table = rows(("a", "alpha|none"), ("b", "beta|none"), ("a", "gamma"))
    reports = prepared(table, separator="|", sections="sample")
    seen = set()
    for step in range(60):
        embeds, groups = reports.of_step(step, range(3))
        drew_none = (embeds[:2] == torch.tensor([4.0, ord("n")])).all(dim=1)
        assert together(groups)[0, 1] == bool(drew_none.all())
        assert together(groups)[0, 2]  # one case
        seen.add(tuple(drew_none.tolist()))
    assert len(seen) == 4
    embeds, ids = reports.only_negatives(torch.device("cpu"))
    assert sorted(embeds[:, 0].tolist()) == [4, 5, 5]  # beta, alpha, gamma; "none" speaks for both cases
    assert len(ids) == 3
    alpha, gamma = (ids[embeds[:, 1] == ord(letter)][0, 0] for letter in "ag")
    assert alpha == gamma == groups[0, 0]


def test_splits_reports():
    assert split_report(" a ", None) == (" a ",)
    assert split_report(" \n", None) == split_report(" | |", "|") == ()
    assert split_report(" a | |b", "|") == ("a", "b")


def labelled(**columns):
    table = rows(*((f"c{i}", "") for i in range(len(next(iter(columns.values()))))))
    return [replace(row, labels={name: cells[i] for name, cells in columns.items()}) for i, row in enumerate(table)]


def test_classes_of_one_column():
    labels = SlideLabels(labelled(kind=["B", None, "A", "nan", "B", ""]), ["kind"])
    assert (labels.names, labels.problem_type) == (["A", "B"], "single_label_classification")
    assert labels.values.tolist() == [1, -100, 0, -100, 1, -100]
    assert labels.has_label == [True, False, True, False, True, False]
    numbers = SlideLabels(labelled(grade=[10.0, math.nan, 2.0, -100.0]), ["grade"])
    assert numbers.names == ["2", "10"]
    assert numbers.values.tolist() == [1, -100, 0, -100]


def test_flags_of_several_columns():
    labels = SlideLabels(labelled(egfr=[1, 0, None], kras=[True, "", False], x=[1, 2, 3]), ["egfr", "kras"])
    assert (labels.names, labels.problem_type) == (["egfr", "kras"], "multi_label_classification")
    expected = torch.tensor([[1, 1], [0, math.nan], [math.nan, 0]])
    torch.testing.assert_close(labels.values, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        (["kid"], None, "no label column `kid`; did you mean `kind`"),
        (["same"], None, "`same` holds 1 classes; a classifier needs two"),
        (["kind"], ["A", "C"], "Slide s1: `kind` is 'B', which is none of the model's classes A, C"),
        (["kind", "same"], None, "Slide s0: `kind` is 'A'; several label columns must hold 0 or 1"),
        (["same", "flag"], ["flag", "same"], "model's labels are flag, same"),
    ],
)
def test_bad_labels_are_named(columns, names, message):
    with pytest.raises(ValueError, match=message):
        SlideLabels(labelled(kind=["A", "B"], same=[1, 1], flag=[0, 1]), columns, names)
