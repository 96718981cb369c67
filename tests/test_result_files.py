# SPDX-License-Identifier: Apache-2.0
"""Results on the disk say what was found; pictures show the curves that scikit-learn and scikit-survival compute."""

import csv
import dataclasses
import json
import re

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from sklearn.metrics import auc, average_precision_score, roc_auc_score, roc_curve

from dre_slcl.training.evaluation import result_curves, result_figures
from dre_slcl.training.evaluation.result_figures import curve_rows, draw_result
from dre_slcl.training.evaluation.result_files import result_table, results_markdown, write_results
from dre_slcl.training.evaluation.result_page import headline
from dre_slcl.training.evaluation.score_titles import score_text, score_title
from dre_slcl.training.evaluation.task_result import MethodResult, Score

from .made_results import NUM_ITEMS, make_result

PICTURES = {
    "classification": {"methods", "few_shot", "roc", "precision_recall", "calibration", "confusion"},
    "multilabel": {"methods", "roc", "precision_recall", "calibration"},
    "regression": {"methods", "predictions"},
    "survival": {"methods", "survival"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("sksurv")
    out = tmp_path_factory.mktemp("evaluation") / "out"
    results = [make_result(kind, few_shot=kind == "classification") for kind in PICTURES]
    write_results(out, results)
    return out, results


@pytest.fixture
def drawn(monkeypatch):
    """Takes figures as they are saved."""
    figures: dict[str, Figure] = {}
    for module in (result_curves, result_figures):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.update({path.stem: figure}))
    return figures


def test_every_file_is_there_and_json_holds_everything_but_predictions(written):
    out, results = written
    names = {"results.json", "results.csv", "results.md", "predictions.parquet", "report.html", "figures"}
    assert {path.name for path in out.iterdir()} == names
    stored = json.loads((out / "results.json").read_text())
    for content, result in zip(stored, results, strict=True):
        assert content == json.loads(json.dumps(result.to_dict()))
    assert "predictions" not in stored[0]["rows"][0]


def test_csv_and_predictions_hold_a_row_for_each_score_and_prediction(written):
    out, results = written
    with (out / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == sum(len(row.scores) for result in results for row in result.rows)
    first = results[0].rows[0]
    assert float(rows[0]["value"]) == first.scores[rows[0]["score"]].value
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    assert len(table) == sum(len(row.predictions) for result in results for row in result.rows)
    assert table[0]["prediction"] == first.predictions[0]["prediction"]
    assert json.loads(table[0]["truth"]) == first.predictions[0]["truth"]
    assert {row["task"] for row in table} == {result.task for result in results}
    survival = [row for row in table if row["task"].startswith("survival")]
    assert set(json.loads(survival[0]["truth"])) == {"time", "event"}
    assert len(survival[0]["prediction"]) == 1


def test_pictures_suit_the_kind_and_can_be_read(written):
    out, results = written
    for result in results:
        stem = f"{result.kind}_of_i"
        found = {path.stem.removeprefix(f"{stem}-") for path in (out / "figures").glob(f"{stem}-*.png")}
        assert found == PICTURES[result.kind]
    for path in (out / "figures").iterdir():
        with PIL.Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.min() < 100  # something is drawn
        assert path.stat().st_size < 250_000


def test_the_page_is_one_file_that_escapes_what_users_named(written):
    out, _ = written
    page = (out / "report.html").read_text()
    assert "<i>" not in page.replace("<i>its own", "")
    assert page.count("<img") == len(list((out / "figures").iterdir()))
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


def test_a_second_evaluation_takes_the_place_of_the_first(tmp_path):
    write_results(tmp_path / "out", [make_result("classification", num_classes=2)])
    write_results(tmp_path / "out", [make_result("regression")])
    assert {path.stem.split("-")[0] for path in (tmp_path / "out" / "figures").iterdir()} == {"regression_of_i"}
    assert [entry["kind"] for entry in json.loads((tmp_path / "out" / "results.json").read_text())] == ["regression"]


def test_tables_begin_with_the_main_score_and_end_with_null_rows(written):
    _, results = written
    header, rows = result_table(results[0])
    assert header[:3] == ["method", "embeddings", "AUROC"]
    assert rows[-1][:2] == ["chance", "chance (null)"]
    # The null rows of a method stand below it.
    encoders = ["slides", "peer", "random weights (null)", "shuffled labels (null)"]
    assert [row[:2] for row in rows[:8]] == [[method, name] for method in ("linear_probe", "knn") for name in encoders]
    first = results[0].rows[0].scores["auroc"]
    assert rows[0][2] == f"{first.value:.3f} [{first.interval[0]:.3f}, {first.interval[1]:.3f}]"
    header, _ = result_table(results[0], detailed=True)
    assert header[2:] == ["AUROC of LUAD", "AUROC of LUSC", "AUROC of normal | lung"]
    lines = [line for line in results_markdown(results).splitlines() if line.startswith("|")]
    assert all(line.count("|") == len(header) + 1 or "lung" not in line for line in lines)
    assert score_title("auprc/1", results[1]) == "AUPRC of KRAS"
    assert score_text(Score(0.5)) == "0.500"
    assert score_text(None) == "-"


def test_the_headline_names_what_is_reached_without_the_embeddings(written):
    _, results = written
    text = headline(results[0])
    for part in ("linear_probe on slides reaches AUROC", "random weights", "shuffled labels", "chance 0.500"):
        assert part in text


def test_curves_are_of_the_first_method_on_all_embeddings():
    rows = curve_rows(make_result("classification", few_shot=True))
    expected = ["slides", "peer", "random weights", "shuffled labels"]
    assert [(row.method, row.encoder) for row in rows] == [("linear_probe", encoder) for encoder in expected]


def line_named(figure, start):
    return next(line for line in figure.axes[0].lines if str(line.get_label()).startswith(start))


def test_the_roc_curve_is_scikit_learns(drawn, tmp_path):
    result = make_result("classification", num_classes=2)
    draw_result(result, tmp_path)
    figure = next(figure for name, figure in drawn.items() if name.endswith("-roc"))
    line = line_named(figure, "slides, AUROC")
    truth = np.array([item["truth"] == "LUSC" for item in result.rows[0].predictions])
    stated = np.array([item["prediction"][1] for item in result.rows[0].predictions])
    x, y = line.get_data()
    false, true, _ = roc_curve(truth, stated)
    inside = [place for place, value in enumerate(x) if not np.isclose(false, value).any()]
    np.testing.assert_allclose(y[inside], np.interp(x[inside], false, true), atol=1e-6)
    assert auc(x, y) == pytest.approx(roc_auc_score(truth, stated), abs=0.01)
    low, high = figure.axes[0].collections[0].get_paths()[0].get_extents().intervaly
    assert 0 <= low < high <= 1


def test_the_precision_recall_curve_is_scikit_learns(drawn, tmp_path):
    result = make_result("classification", num_classes=2)
    draw_result(result, tmp_path)
    figure = next(figure for name, figure in drawn.items() if name.endswith("-precision_recall"))
    y = line_named(figure, "slides, AUPRC").get_ydata()
    truth = np.array([item["truth"] == "LUSC" for item in result.rows[0].predictions])
    stated = np.array([item["prediction"][1] for item in result.rows[0].predictions])
    assert np.mean(y[1:]) == pytest.approx(average_precision_score(truth, stated), abs=0.01)
    assert y[-1] == pytest.approx(max(truth.mean(), y[-1]))


def test_the_halves_of_risk_are_those_of_scikit_survival(drawn, tmp_path):
    nonparametric = pytest.importorskip("sksurv.nonparametric")
    result = make_result("survival")
    items = result.rows[0].predictions
    risks = np.array([item["prediction"] for item in items])
    high = risks > np.median(risks)
    # The second half of each class of risks is from a fold with risks on another scale.
    for is_half in (high, ~high):
        for place in np.flatnonzero(is_half)[15:]:
            items[place] |= {"fold": "1", "prediction": risks[place] + 100}
    for fold in ("0", "1"):  # what is above the median of all is above that of its fold
        values = [item["prediction"] for item in items if item["fold"] == fold]
        assert sum(value > np.median(values) for value in values) == 15
    draw_result(result, tmp_path)
    figure = next(figure for name, figure in drawn.items() if name.endswith("-survival"))
    times = np.array([item["truth"]["time"] for item in items])
    events = np.array([item["truth"]["event"] for item in items])
    x, share = nonparametric.kaplan_meier_estimator(events[high], times[high])
    line = line_named(figure, "higher risk (n = 30)")
    np.testing.assert_allclose(line.get_data()[0][1:], x)
    np.testing.assert_allclose(line.get_data()[1][1:], share)
    at_risk = [text.get_text() for text in figure.axes[1].texts]
    assert at_risk[0] == at_risk[7] == str(NUM_ITEMS // 2)


def test_rows_without_predictions_or_intervals_are_no_hindrance(tmp_path):
    result = make_result("classification")
    bare = [dataclasses.replace(row, predictions=[], scores={"auroc": Score(0.7)}) for row in result.rows]
    write_results(tmp_path / "bare", [dataclasses.replace(result, rows=bare)])
    assert [path.name.split("-")[1] for path in (tmp_path / "bare" / "figures").iterdir()] == ["methods.png"]
    nothing = dataclasses.replace(result, rows=[MethodResult("linear_probe", "slides", {})])
    write_results(tmp_path / "nothing", [nothing])
    assert pq.read_table(tmp_path / "nothing" / "predictions.parquet").num_rows == 0
