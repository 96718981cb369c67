# SPDX-License-Identifier: Apache-2.0
"""Label files become tasks of the right kind, and items with the case, vector and answer of their own."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dre_slcl.training.evaluation.embedding_table import make_table
from dre_slcl.training.evaluation.label_table import make_tasks, read_labels
from dre_slcl.training.evaluation.sites import find_sites
from dre_slcl.training.evaluation.task_items import case_rule, make_items, share_cases


def labels_of(tmp_path, text, name="labels.csv"):
    (tmp_path / name).write_text(text)
    return read_labels(tmp_path / name)


def only(labels, *columns, **options):
    (task,) = make_tasks(labels, columns, **options)
    return task


@pytest.mark.parametrize(
    ("header", "first", "slide_ids", "case_ids"),
    [
        ("case_id,slide_id,label", "p1,s1.svs,a", ["s1"], ["p1"]),
        ("PATIENT,FILENAME,label", "p1,s1,a", ["s1"], ["p1"]),
        ("patient_id,label", "007,a", [], ["007"]),
        ("wsi,label", "s1.ndpi,a", ["s1"], []),
    ],
)
def test_the_columns_of_other_tools_are_understood(tmp_path, header, first, slide_ids, case_ids):
    labels = labels_of(tmp_path, f"{header}\n{first}\n")
    assert (labels.slide_ids, labels.case_ids) == (slide_ids, case_ids)
    assert labels.columns == {"label": ["a"]}


def test_parquet_and_tsv_read_the_same(tmp_path):
    columns = {"slide_id": ["s1", "s2"], "vector": [[1.0], [2.0]], "grade": [1, None]}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    assert read_labels(tmp_path / "labels.parquet").columns["grade"] == [1, None]
    labels = labels_of(tmp_path, "slide_id\tgrade\ns1\t1\ns2\t\n", "labels.tsv")
    assert labels.columns == {"grade": [1, None]}


def test_kinds_are_guessed_from_values(tmp_path):
    lines = ["slide_id,subtype,grade,age,TP53,EGFR,count,OS_days,OS_event"]
    for row in range(30):
        subtype, egfr = ("LUAD", "LUSC", "")[row % 3], ("1", "0", "")[row % 3]
        lines.append(f"s{row},{subtype},{row % 4 + 1},{row + 0.5},{row % 2},{egfr},{row},{row * 10},{row % 2}")
    labels = labels_of(tmp_path, "\n".join(lines))
    subtype = only(labels, "subtype")
    assert (subtype.kind, subtype.classes, subtype.targets[:3].tolist()) == (
        "classification",
        ["LUAD", "LUSC"],
        [0, 1, -1],
    )
    assert not subtype.is_ordered
    grade = only(labels, "grade")
    assert (grade.kind, grade.classes, grade.is_ordered) == ("classification", ["1", "2", "3", "4"], True)
    assert only(labels, "age").kind == "regression"
    assert only(labels, "count").kind == "regression"
    genes = only(labels, "TP53", "EGFR")
    assert (genes.kind, genes.classes) == ("multilabel", ["TP53", "EGFR"])
    np.testing.assert_equal(genes.targets[:3], [[0, 1], [1, 0], [0, np.nan]])
    assert [task.task for task in make_tasks(labels, ["subtype", "grade"])] == ["subtype", "grade"]
    assert [task.kind for task in make_tasks(labels, ["TP53", "EGFR"], kind="classification")] == [
        "classification"
    ] * 2
    assert only(labels, "grade", kind="regression").targets[:3].tolist() == [1, 2, 3]
    assert only(labels, "overall", time="OS_days", event="OS_event").task == "overall"
    survival = only(labels, time="OS_days", event="OS_event")
    assert survival.kind == "survival"
    assert survival.targets["time"][:3].tolist() == [0, 10, 20]
    assert survival.targets["event"][:3].tolist() == [False, True, False]


def test_survival_words_and_missing_cells(tmp_path):
    labels = labels_of(tmp_path, "case_id,t,e\na,5,1:DECEASED\nb,7,alive\nc,,1\nd,3,\n")
    task = only(labels, time="t", event="e")
    assert task.targets["event"].tolist() == [True, False, False, False]
    assert task.is_known.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (["stage"], {}, "has no column `stage`; it has one, word, time"),
        (["one"], {}, r"column `one` holds \['x'\]; two classes"),
        (["word"], {"kind": "regression"}, r"column `word` must hold numbers. Found 2: row 1: 'u'"),
        (["word", "one"], {"kind": "multilabel"}, "must hold 0, 1 or nothing"),
        ([], {}, "Name a label column"),
        ([], {"time": "time"}, "needs --time and --event"),
        ([], {"time": "time", "event": "word"}, "must hold 1 where the event was seen"),
        ([], {"time": "word", "event": "time"}, "must hold times"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, columns, options, message):
    labels = labels_of(tmp_path, "slide_id,one,word,time\na,x,u,3\nb,x,v,4\n")
    with pytest.raises(ValueError, match=message):
        make_tasks(labels, columns, **options)


def test_a_label_file_without_ids_or_with_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of slide_id, wsi"):
        labels_of(tmp_path, "name,label\na,x\n")
    with pytest.raises(ValueError, match=r"keep one column of `slide_id`. Found 2: slide_id; wsi"):
        labels_of(tmp_path, "slide_id,wsi\na,x\n")
    with pytest.raises(ValueError, match=r"a slide may occur once. Found 1: a"):
        labels_of(tmp_path, "slide_id,label\na.svs,x\na,y\n")


SLIDES = [
    "TCGA-AA-0001-01Z-00-DX1.u1",
    "TCGA-AA-0001-01Z-00-DX2.u2",
    "TCGA-BB-0002-01Z-00-DX1.u3",
    "TCGA-BB-0003-01Z-00-DX1.u4",
]
FEATURES = np.arange(8.0).reshape(4, 2)


def test_slides_take_the_labels_of_their_rows_and_of_their_cases(tmp_path):
    table = make_table("slides", SLIDES, [""] * 4, FEATURES)
    by_slide = labels_of(tmp_path, "slide_id,label\n" + "\n".join(f"{s},{'xyx'[i]}" for i, s in enumerate(SLIDES[:3])))
    items, task, level = make_items(table, by_slide, only(by_slide, "label"), pattern=case_rule("tcga"))
    assert (level, items.ids, task.targets.tolist()) == ("slide", SLIDES[:3], [0, 1, 0])
    assert items.case_ids == ["TCGA-AA-0001", "TCGA-AA-0001", "TCGA-BB-0002"]
    assert [(item["id"], item["reason"]) for item in items.left_out] == [(SLIDES[3], "no_label")]

    by_case = labels_of(tmp_path, "case_id,label\nTCGA-BB-0003,x\nTCGA-AA-0001,y\nTCGA-CC-0009,x\n")
    items, task, level = make_items(table, by_case, only(by_case, "label"), pattern=case_rule("tcga"))
    assert (level, items.ids, task.targets.tolist()) == ("case", ["TCGA-AA-0001", "TCGA-BB-0003"], [1, 0])
    np.testing.assert_allclose(items.features, [FEATURES[:2].mean(axis=0), FEATURES[3]])
    assert {item["id"]: item["reason"] for item in items.left_out} == {
        "TCGA-BB-0002": "no_label",
        "TCGA-CC-0009": "no_embedding",
    }
    items, task, level = make_items(table, by_case, only(by_case, "label"), level="slide", pattern=case_rule("tcga"))
    assert (level, items.ids, task.targets.tolist()) == ("slide", [SLIDES[0], SLIDES[1], SLIDES[3]], [1, 1, 0])

    cases = make_table("cases", ["TCGA-BB-0003", "TCGA-AA-0001"], ["", ""], FEATURES[:2])
    items, task, level = make_items(cases, by_case, only(by_case, "label"))
    assert (level, items.ids, task.targets.tolist()) == ("case", ["TCGA-AA-0001", "TCGA-BB-0003"], [1, 0])


def test_the_order_of_files_does_not_matter(tmp_path):
    text = [f"c{i % 5},s{i},{'xy'[i % 2]}" for i in range(20)]
    labels = labels_of(tmp_path, "case_id,slide_id,label\n" + "\n".join(text))
    back = labels_of(tmp_path, "case_id,slide_id,label\n" + "\n".join(text[::-1]), "back.csv")
    ids, features = [f"s{i}" for i in range(20)], np.random.default_rng(0).normal(size=(20, 3))
    one = make_items(make_table("a", ids, [""] * 20, features), labels, only(labels, "label"))
    two = make_items(make_table("a", ids[::-1], [""] * 20, features[::-1]), back, only(back, "label"))
    assert (one[0].ids, one[0].case_ids) == (two[0].ids, two[0].case_ids)
    np.testing.assert_array_equal(one[0].features, two[0].features)
    np.testing.assert_array_equal(one[1].targets, two[1].targets)


def test_contradictions_are_refused_by_name(tmp_path):
    table = make_table("slides", ["s1", "s2"], ["a", "b"], FEATURES[:2])
    other = labels_of(tmp_path, "case_id,slide_id,label\na,s1,x\nc,s2,y\n")
    with pytest.raises(ValueError, match=r"different cases of a slide. Found 1: s2: b and c"):
        make_items(table, other, only(other, "label"))
    two = labels_of(tmp_path, "case_id,slide_id,label\na,s1,x\na,s2,y\n")
    loose = make_table("slides", ["s1", "s2"], ["", ""], FEATURES[:2])
    with pytest.raises(ValueError, match=r"must have one answer in task label.*Found 1: a: x and y"):
        make_items(loose, two, only(two, "label"), level="case")
    assert make_items(loose, two, only(two, "label"))[0].case_ids == ["a", "a"]
    unknown = labels_of(tmp_path, "slide_id,label\ns1,x\ns2,y\n")
    with pytest.raises(ValueError, match=r"The case of every slide must be known.*--case-pattern.*Found 2: s1; s2"):
        make_items(loose, unknown, only(unknown, "label"))
    assert make_items(loose, unknown, only(unknown, "label"), pattern=case_rule("slide"))[0].case_ids == ["s1", "s2"]
    assert make_items(loose, unknown, only(unknown, "label"), pattern=case_rule(r"(s)\d"))[0].case_ids == ["s", "s"]
    with pytest.raises(ValueError, match="no embedding has a label"):
        make_items(make_table("x", ["q"], ["q"], FEATURES[:1]), other, only(other, "label"))
    for wrong in ("(", "s."):
        with pytest.raises(ValueError, match="--case-pattern"):
            case_rule(wrong)


def test_a_label_that_one_slide_leaves_open_another_may_tell(tmp_path):
    table = make_table("slides", ["s1", "s2", "s3"], ["a", "a", "b"], FEATURES[:3])
    labels = labels_of(tmp_path, "case_id,slide_id,TP53,EGFR\na,s1,1,\na,s2,,0\nb,s3,,1\n")
    items, task, _ = make_items(table, labels, only(labels, "TP53", "EGFR"), level="case")
    assert items.ids == ["a", "b"]
    np.testing.assert_equal(task.targets, [[1, 0], [np.nan, 1]])
    torn = labels_of(tmp_path, "case_id,slide_id,TP53,EGFR\na,s1,1,\na,s2,0,0\nb,s3,,1\n")
    with pytest.raises(ValueError, match=r"a case must have one answer.*Found 1: a:"):
        make_items(table, torn, only(torn, "TP53", "EGFR"), level="case")


def test_embeddings_tell_each_other_the_cases_of_their_slides():
    one = make_table("one", ["s1", "s2"], ["a", ""], FEATURES[:2])
    two = make_table("two", ["s2", "s3", "s1"], ["b", "", ""], FEATURES[:3])
    assert [table.case_ids for table in share_cases([one, two])] == [["a", "b"], ["b", "", "a"]]
    torn = make_table("torn", ["s1"], ["c"], FEATURES[:1])
    with pytest.raises(ValueError, match=r"different cases of a slide. Found 1: s1: a and c \(torn\)"):
        share_cases([one, torn])


def test_sites_come_from_barcodes_or_a_column(tmp_path):
    table = make_table("slides", SLIDES, [slide[:12] for slide in SLIDES], FEATURES)
    labels = labels_of(
        tmp_path, "case_id,label,hospital\n" + "\n".join(f"{s[:12]},{i % 2},h{s[5]}" for i, s in enumerate(SLIDES[1:]))
    )
    assert find_sites(table, labels) == ["AA", "AA", "BB", "BB"]
    assert find_sites(table, labels, "hospital") == ["hA", "hA", "hB", "hB"]
    with pytest.raises(ValueError, match="has no column `city`"):
        find_sites(table, labels, "city")
    with pytest.raises(ValueError, match=r"name a column of sites instead.*Found 1: s1"):
        find_sites(make_table("x", ["s1"], ["c1"], FEATURES[:1]), labels)
