# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl evaluate` on embeddings: numbers against scikit-learn over stored predictions, null rows, files."""

import argparse
import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dre_slcl.training.evaluation.case_folds import make_folds
from dre_slcl.training.evaluation.embedding_table import make_table
from dre_slcl.training.evaluation.evaluate_command import add_arguments, run
from dre_slcl.training.evaluation.label_table import TaskLabels
from dre_slcl.training.evaluation.linear_probe import LinearProbe
from dre_slcl.training.evaluation.null_rows import parts_of_items, shuffle_labels
from dre_slcl.training.evaluation.protocol import run_method
from dre_slcl_cli import main
from modeling_dre_slcl import DreSlclProcessor

from .embedded_cohort import write_embedded_cohort
from .tiny_models import tiny_image_processor, tiny_model, tiny_tokenizer

NUM_CASES, WIDTH = 60, 8
SUBTYPES = ("LUAD", "LUSC")


def cohort(gap, seed=0):
    """Slides of TCGA-like cases whose subtype stands in the first dimension, two mutations in the next two."""
    rng = np.random.default_rng(seed)
    rows, vectors = [], []
    for case in range(NUM_CASES):
        case_id = f"TCGA-{'ABCDEF'[case % 6]}0-{case:04d}"
        subtype, genes = case // 3 % 2, rng.integers(2, size=2)
        for slide in range(1 + case % 2):
            vector = rng.normal(size=WIDTH)
            vector[:3] += gap * (np.array([subtype, *genes]) - 0.5)
            egfr = "" if case % 5 == 0 else genes[1]
            rows.append([case_id, f"{case_id}-01Z-00-DX{slide + 1}.uuid", SUBTYPES[subtype], genes[0], egfr])
            vectors.append(vector)
    return rows, np.array(vectors)


def write_table(path, ids, vectors):
    pq.write_table(pa.table({"slide_id": ids, "vector": pa.array(vectors.tolist(), pa.list_(pa.float32()))}), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    rows, vectors = cohort(4.0)
    ids = [row[1] for row in rows]
    write_table(folder / "slides.parquet", ids, vectors)
    write_table(folder / "noise.parquet", ids, np.random.default_rng(9).normal(size=vectors.shape))
    write_table(folder / "alike.parquet", ids, vectors + np.random.default_rng(8).normal(size=vectors.shape) * 0.01)
    with (folder / "labels.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([["case_id", "slide_id", "subtype", "TP53", "EGFR"], *rows])
    return folder


def evaluate(files, out, *words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    paths = ["--embeddings", files / "slides.parquet", "--labels", files / "labels.csv", "--out", out]
    return run(parser.parse_args([str(word) for word in [*paths, *words]]))


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    peers = ["--baseline", f"random weights={files / 'noise.parquet'}", "--peer", f"alike={files / 'alike.parquet'}"]
    options = ["--methods", "linear_probe", "prototypes", "--seeds", 0, 5, "--num-bootstrap", 200, "--folds", 3]
    options += ["--validation-fraction", 0.25]
    assert evaluate(files, out, "--task", "subtype", *peers, *options) == 0
    (result,) = json.loads((out / "results.json").read_text())
    return out, result, pq.read_table(out / "predictions.parquet").to_pylist()


def row_of(result, method, encoder):
    (row,) = [row for row in result["rows"] if (row["method"], row["encoder"]) == (method, encoder)]
    return row


def test_rows_stand_in_order_with_null_rows_last(evaluated):
    _, result, _ = evaluated
    assert [(row["method"], row["encoder"], row["is_null"]) for row in result["rows"]] == [
        ("linear_probe", "slides", False),
        ("prototypes", "slides", False),
        ("linear_probe", "alike", False),
        ("prototypes", "alike", False),
        ("linear_probe", "random weights", True),
        ("linear_probe", "shuffled labels", True),
        ("prototypes", "random weights", True),
        ("prototypes", "shuffled labels", True),
        ("chance", "chance", True),
    ]
    assert (result["kind"], result["main_metric"], result["classes"]) == ("classification", "auroc", list(SUBTYPES))
    assert (result["num_items"], result["num_cases"]) == (90, 60)
    assert result["protocol"]["level"] == "slide"


@pytest.mark.parametrize("encoder", ["slides", "alike", "random weights", "shuffled labels"])
@pytest.mark.parametrize("method", ["linear_probe", "prototypes"])
def test_scores_are_those_of_scikit_learn_over_the_stored_predictions(evaluated, method, encoder):
    _, result, predictions = evaluated
    row = row_of(result, method, encoder)
    of_row = [one for one in predictions if (one["method"], one["encoder"]) == (method, encoder)]
    areas, accuracies = [], []
    for seed in (0, 5):
        of_seed = [one for one in of_row if one["seed"] == seed]
        assert len({one["id"] for one in of_seed}) == len(of_seed) == 90
        truth = [SUBTYPES.index(json.loads(one["truth"])) for one in of_seed]
        stated = np.array([one["prediction"] for one in of_seed])
        areas.append(roc_auc_score(truth, stated[:, 1]))
        accuracies.append(balanced_accuracy_score(truth, stated.argmax(axis=1)))
    assert row["scores"]["auroc"]["by_seed"] == pytest.approx(areas, abs=1e-12)
    assert row["scores"]["auroc"]["value"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert row["scores"]["balanced_accuracy"]["value"] == pytest.approx(np.mean(accuracies), abs=1e-12)
    low, high = row["scores"]["auroc"]["interval"]
    assert low <= row["scores"]["auroc"]["value"] <= high


def test_a_linear_problem_is_solved_and_null_rows_are_near_chance(evaluated):
    _, result, _ = evaluated
    assert row_of(result, "linear_probe", "slides")["scores"]["auroc"]["value"] > 0.98
    chance = row_of(result, "chance", "chance")["scores"]
    assert (chance["auroc"]["value"], chance["balanced_accuracy"]["value"]) == (0.5, 0.5)
    for method in ("linear_probe", "prototypes"):
        for encoder in ("shuffled labels", "random weights"):
            low, high = row_of(result, method, encoder)["scores"]["auroc"]["interval"]
            assert low < 0.5 < high, (method, encoder)


def test_differences_tell_noise_from_likeness(evaluated):
    _, result, _ = evaluated
    differences = row_of(result, "linear_probe", "slides")["settings"]["differences"]
    assert set(differences) == {"random weights", "alike"}
    noise = differences["random weights"]["auroc"]
    values = [
        row_of(result, "linear_probe", name)["scores"]["auroc"]["value"] for name in ("slides", "random weights")
    ]
    assert noise["difference"] == pytest.approx(values[0] - values[1])
    assert noise["p_value"] < 0.01
    assert noise["interval"][0] > 0.2
    assert differences["alike"]["auroc"]["p_value"] > 0.05


def test_no_case_is_trained_on_and_held_out(evaluated):
    _, result, predictions = evaluated
    for seed in (0, 5):
        folds = {}
        for one in predictions:
            if one["seed"] == seed and one["encoder"] == "slides":
                folds.setdefault(one["case_id"], set()).add(one["fold"])
        assert len(folds) == 60
        assert all(len(found) == 1 for found in folds.values())
    assert len(result["protocol"]["balance"]["parts"]) == 6
    assert row_of(result, "linear_probe", "slides")["settings"]["chosen"][0]["inverse_regularisation"] > 0


def test_the_same_command_gives_the_same_files(files, evaluated, tmp_path):
    peers = ["--baseline", f"random weights={files / 'noise.parquet'}", "--peer", f"alike={files / 'alike.parquet'}"]
    options = ["--methods", "prototypes", "linear_probe", "--seeds", 5, "--num-bootstrap", 20, "--folds", 2]
    options += ["--validation-fraction", 0.25]
    for out in ("one", "two"):
        assert evaluate(files, tmp_path / out, "--task", "subtype", *peers, *options) == 0
    for name in ("results.json", "results.csv", "results.md"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert str(files) not in (evaluated[0] / "results.json").read_text()


def test_mutations_are_a_multilabel_task_with_missing_labels(files, tmp_path):
    options = ["--methods", "linear_probe", "--seeds", 1, "--num-bootstrap", 50, "--no-shuffled", "--folds", 3]
    assert evaluate(files, tmp_path, "--task", "TP53", "EGFR", *options) == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert (result["kind"], result["classes"]) == ("multilabel", ["TP53", "EGFR"])
    predictions = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    areas = []
    for place in range(2):
        known = [one for one in predictions if json.loads(one["truth"])[place] is not None]
        truth = [json.loads(one["truth"])[place] for one in known]
        areas.append(roc_auc_score(truth, [one["prediction"][place] for one in known]))
    scores = row_of(result, "linear_probe", "slides")["scores"]
    assert [scores[f"auroc/{place}"]["value"] for place in range(2)] == pytest.approx(areas)
    assert min(areas) > 0.9


def test_cases_sites_and_fold_files(files, tmp_path):
    options = ["--methods", "prototypes", "--seeds", 0, "--num-bootstrap", 50, "--no-shuffled", "--task", "subtype"]
    assert evaluate(files, tmp_path / "case", *options, "--level", "case", "--preserve-sites", "--folds", 3) == 0
    (result,) = json.loads((tmp_path / "case" / "results.json").read_text())
    assert (result["num_items"], result["num_cases"], result["protocol"]["num_sites"]) == (60, 60, 6)
    sites = [part["test_sites"] for part in result["protocol"]["balance"]["parts"]]
    assert sorted(site for part in sites for site in part) == ["A0", "B0", "C0", "D0", "E0", "F0"]
    rows, _ = cohort(4.0)
    lines = [["", "train", "val", "test"]]
    for place, row in enumerate(dict.fromkeys(row[0] for row in rows)):
        part = ("train", "train", "val", "test", "train", "test")[place % 6]
        lines += [[one[1], part == "train", part == "val", part == "test"] for one in rows if one[0] == row]
    with (tmp_path / "splits_0_bool.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(lines)
    for level in ("slide", "case"):
        words = ["--fold-files", tmp_path / "splits_0_bool.csv", "--level", level]
        assert evaluate(files, tmp_path / level, *options, *words) == 0
        (result,) = json.loads((tmp_path / level / "results.json").read_text())
        assert (result["num_cases"], result["protocol"]["folds_from"]["origin"]) == (20, "CLAM")
        predictions = pq.read_table(tmp_path / level / "predictions.parquet").to_pylist()
        assert {one["case_id"][5:7] for one in predictions} == {"D0", "F0"}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--task", "stage"], 1, "has no column `stage`"),
        (["--task", "subtype", "--methods", "cox"], 1, "cannot do a task of kind classification"),
        (["--task", "subtype", "--folds", "90"], 1, "60 cases cannot make 90 folds"),
        ([], 2, "Name the label column"),
        (["--task", "subtype", "--baseline", "noise"], 2, "take NAME=PATH"),
        (["--task", "subtype", "--baseline", "slides=x"], 2, "given twice"),
        (["--task", "subtype", "--dataset", "x"], 2, "not both"),
    ],
)
def test_what_is_wrong_is_said_with_its_status(files, tmp_path, caplog, words, status, message):
    assert evaluate(files, tmp_path / "out", *words) == status
    assert message in caplog.text
    assert not (tmp_path / "out").exists()


def test_neither_form_is_wrong_usage(caplog, tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["--out", str(tmp_path)])) == 2
    assert "Give --embeddings and --labels, or --model and --dataset" in caplog.text
    assert run(parser.parse_args(["--out", str(tmp_path), "--labels", "x.csv"])) == 2


def test_a_slide_without_embedding_makes_it_partial(files, tmp_path):
    rows, vectors = cohort(4.0)
    vectors[5] = np.nan
    write_table(tmp_path / "damaged.parquet", [row[1] for row in rows][:-1], vectors[:-1])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--embeddings", tmp_path / "damaged.parquet", "--labels", files / "labels.csv", "--out", tmp_path / "out"]
    words += ["--task", "subtype", "--methods", "prototypes", "--seeds", 0, "--num-bootstrap", 0, "--no-shuffled"]
    assert run(parser.parse_args(list(map(str, words)))) == 3
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {item["id"]: item["reason"] for item in result["protocol"]["left_out"]} == {
        rows[5][1]: "not_finite",
        rows[-1][1]: "no_embedding",
    }
    assert row_of(result, "prototypes", "slides")["scores"]["auroc"]["interval"] is None


def test_answers_are_dealt_out_anew_within_their_part():
    rng = np.random.default_rng(0)
    cases = np.repeat([f"c{number}" for number in range(40)], rng.integers(1, 4, size=40)).tolist()
    of_case = {case: int(rng.integers(3)) for case in dict.fromkeys(cases)}
    labels = TaskLabels("x", "classification", np.array([of_case[case] for case in cases]), ["a", "b", "c"])
    folds = make_folds(labels, cases, 4, (0,))
    parts = parts_of_items(folds, len(cases))
    dealt = shuffle_labels(labels, cases, 1, parts)
    assert (dealt.targets != labels.targets).mean() > 0.4
    for number in range(4):
        before = sorted({(case, of_case[case]) for case, part in zip(cases, parts, strict=True) if part == number})
        after = {
            (case, int(label)) for case, label, part in zip(cases, dealt.targets, parts, strict=True) if part == number
        }
        assert len(after) == len(before)  # one answer for each case
        assert sorted(label for _, label in after) == sorted(label for _, label in before)
    mixed = TaskLabels("x", "classification", rng.integers(3, size=len(cases)), ["a", "b", "c"])
    assert sorted(shuffle_labels(mixed, cases, 0).targets) == sorted(mixed.targets)


class Memory:
    """Answers rightly for every case that it was fitted on: a leak would make it perfect."""

    name = "memory"

    def fit(self, features, targets, case_ids, seed):
        self.known = {tuple(vector): target for vector, target in zip(features.tolist(), targets, strict=True)}
        return self

    def predict(self, features):
        return np.eye(2)[[self.known.get(tuple(vector), 0) for vector in features.tolist()]]


def test_a_method_that_remembers_cases_gets_nothing_out_of_it():
    rng = np.random.default_rng(0)
    case_ids = np.repeat([f"c{number}" for number in range(40)], 3).tolist()
    labels = TaskLabels("x", "classification", np.repeat(rng.integers(2, size=40), 3), ["a", "b"])
    features = np.repeat(rng.normal(size=(40, 4)), 3, axis=0)  # slides of a case are alike
    table = make_table("slides", [f"s{number}" for number in range(120)], case_ids, features)
    result = run_method(Memory(), table, labels, make_folds(labels, case_ids, 5, (0, 1)), (0, 1), num_bootstrap=0)
    assert result.scores["balanced_accuracy"].value == 0.5
    leaky = make_folds(labels, [f"s{number}" for number in range(120)], 5, (0,))
    assert run_method(Memory(), table, labels, leaky, (0,), num_bootstrap=0).scores["balanced_accuracy"].value > 0.9


def test_predictions_of_another_shape_are_refused():
    labels = TaskLabels("x", "classification", np.arange(20) % 3, ["a", "b", "c"])
    ids = [f"s{number}" for number in range(20)]
    table = make_table("slides", ids, ids, np.random.default_rng(0).normal(size=(20, 3)))
    folds = make_folds(labels, ids, 2, (0,))
    with pytest.raises(ValueError, match=r"memory: predictions .* of shape \(\d+, 3\), found \(\d+, 2\)"):
        run_method(Memory(), table, labels, folds, (0,))
    with pytest.raises(ValueError, match="no fold for seed 4"):
        run_method(LinearProbe(3), table, labels, folds, (4,))


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """A model with a text model inside, and slide projections that lie at its projections of their reports."""
    folder = tmp_path_factory.mktemp("joint")
    model = tiny_model(text=True)
    model.save_pretrained(folder / "model")
    DreSlclProcessor(tiny_image_processor(), tiny_tokenizer()).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    words = ["normal tissue", "tumor", "a slide of tissue", "a tumor of grade"]
    lines, vectors = [["slide_id", "case_id", "text", "kind"]], []
    for case in range(12):
        report = words[case % 4]
        with torch.no_grad():
            tokens = tiny_tokenizer()(report, return_tensors="pt")
            projected = model.get_text_features(**{key: tokens[key] for key in ("input_ids", "attention_mask")})[0]
        for slide in range(2):
            vectors.append(projected.numpy() + 1e-3 * rng.normal(size=len(projected)))
            lines.append([f"s{case}-{slide}", f"c{case}", report, "normal tissue" if case % 4 == 0 else "tumor"])
    with (folder / "labels.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(lines[:1] + [line for line in lines[1:] if line[2] in words[:2]])
    with (folder / "reports.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([["case_id", "report"], *dict.fromkeys((line[1], line[2]) for line in lines[1:])])
    pq.write_table(
        pa.table(
            {
                "slide_id": [line[0] for line in lines[1:]],
                "case_id": [line[1] for line in lines[1:]],
                "slide_projection": pa.array([vector.tolist() for vector in vectors], pa.list_(pa.float32())),
            }
        ),
        folder / "vectors.parquet",
    )
    return folder


def test_texts_find_the_slides_that_lie_where_they_do(joint, tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--embeddings", joint / "vectors.parquet", "--model", joint / "model", "--out", tmp_path]
    words += ["--labels", joint / "labels.csv", "--task", "kind", "--methods", "zero_shot", "slide_retrieval"]
    words += ["--templates", "CLASSNAME", "--reports", joint / "reports.csv", "--num-bootstrap", 20, "--folds", 2]
    assert run(parser.parse_args(list(map(str, words)))) == 0
    results = {result["task"]: result for result in json.loads((tmp_path / "results.json").read_text())}
    assert list(results) == ["kind, slides find slides", "kind, zero-shot", "slide_to_report", "report_to_slide"]
    assert results["kind, zero-shot"]["rows"][0]["scores"]["balanced_accuracy"]["value"] == 1.0
    assert results["kind, zero-shot"]["num_items"] == 12
    for direction in ("slide_to_report", "report_to_slide"):
        first, *null = results[direction]["rows"]
        assert first["scores"]["recall@1"]["value"] == 1.0
        assert [row["encoder"] for row in null] == ["shuffled reports", "chance"]
        assert null[1]["scores"]["recall@1"]["value"] == pytest.approx(1 / 4)
    assert (tmp_path / "report.html").is_file()


def test_texts_need_their_model(joint, tmp_path, caplog):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--embeddings", joint / "vectors.parquet", "--out", tmp_path / "out", "--reports", joint / "reports.csv"]
    assert run(parser.parse_args(list(map(str, words)))) == 2
    assert "zero_shot and --reports need --model" in caplog.text
    tiny_model().save_pretrained(tmp_path / "model")
    assert run(parser.parse_args([*map(str, words), "--model", str(tmp_path / "model")])) == 1
    assert "ships without a text model" in caplog.text


def test_what_embed_wrote_is_evaluated_as_it_is(tmp_path):
    cohort = write_embedded_cohort(tmp_path / "cohort")
    lines = [["slide_id", "kind"], ["s0", "tumor"], ["s1", "normal tissue"], ["s2", "tumor"], ["s3", "normal tissue"]]
    with (tmp_path / "labels.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(lines)
    (tmp_path / "reports.csv").write_text("case_id,report\nc0,a tumor of grade\nc1,normal tissue\n")
    words = ["--embeddings", cohort.out, "--labels", tmp_path / "labels.csv", "--task", "kind", "--pool", "mean"]
    words += ["--baseline", f"mean of tiles={cohort.out}::tile_features", "--model", cohort.model, "--folds", 2]
    words += ["--methods", "prototypes", "zero_shot", "--reports", tmp_path / "reports.csv", "--num-bootstrap", 20]
    assert main(["evaluate", *map(str, words), "--out", str(tmp_path / "out"), "--seeds", "0"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["task"] for result in results] == ["kind", "kind, zero-shot", "slide_to_report", "report_to_slide"]
    assert [row["encoder"] for row in results[0]["rows"]] == ["slides", "mean of tiles", "shuffled labels", "chance"]
    assert (results[0]["num_items"], results[0]["num_cases"]) == (4, 2)
    assert results[0]["protocol"]["left_out_reasons"] == {"no_label": 1}
    assert (results[2]["num_items"], results[3]["num_items"]) == (4, 2)
