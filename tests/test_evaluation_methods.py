# SPDX-License-Identifier: Apache-2.0
"""Every method against a computation of its own, on problems whose answer is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dre_slcl.training.evaluation.each_label import EachLabel
from dre_slcl.training.evaluation.few_shot import FewShot
from dre_slcl.training.evaluation.label_table import TaskLabels
from dre_slcl.training.evaluation.linear_probe import LinearProbe
from dre_slcl.training.evaluation.methods import make_methods, method_names
from dre_slcl.training.evaluation.mlp_head import MlpHead
from dre_slcl.training.evaluation.neighbours import NearestNeighbours
from dre_slcl.training.evaluation.prototypes import Prototypes


def problem(seed=0, num_cases=60, num_classes=3, gap=4.0, width=8):
    """Cases of two slides, classes far apart along their own dimensions."""
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(num_cases) % num_classes, 2)
    features = rng.normal(size=(2 * num_cases, width)).astype(np.float32)
    features[np.arange(len(targets)), targets] += gap
    return features, targets, np.repeat([f"c{number}" for number in range(num_cases)], 2).tolist()


METHODS = [LinearProbe(3), NearestNeighbours(3), Prototypes(3), MlpHead(3), FewShot(3, 8), FewShot(3, 8, "linear")]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_easy_problem_is_solved_and_a_class_never_seen_gets_nothing(method):
    features, targets, cases = problem()
    unseen, answers, _ = problem(seed=1)
    stated = method.fit(features, targets, cases, 0).predict(unseen)
    assert stated.shape == (len(unseen), 3)
    np.testing.assert_allclose(stated.sum(axis=1), 1, atol=1e-6)
    assert (stated.argmax(axis=1) == answers).mean() > 0.95
    again = method.fit(features, targets, cases, 0).predict(unseen)
    np.testing.assert_array_equal(stated, again)
    rows = np.flatnonzero(targets != 1)
    stated = method.fit(features[rows], targets[rows], [cases[row] for row in rows], 0).predict(unseen)
    assert (stated[:, 1] == 0).all()
    assert (stated.argmax(axis=1) == answers)[answers != 1].mean() > 0.95


def test_the_probe_chooses_on_the_validation_part_where_there_is_one():
    features, targets, cases = problem(gap=1.0)
    is_validation = np.arange(len(targets)) % 8 < 2  # whole cases
    fitted, held = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
    mean, spread = features[fitted].mean(axis=0), features[fitted].std(axis=0)
    losses = {}
    for power in range(-4, 3):
        probe = LogisticRegression(C=10.0**power, class_weight="balanced", max_iter=2000)
        probe.fit((features[fitted] - mean) / spread, targets[fitted])
        stated = probe.predict_proba((features[held] - mean) / spread)[np.arange(len(held)), targets[held]]
        losses[10.0**power] = np.mean([-np.log(stated[targets[held] == place]).mean() for place in range(3)])
    method = LinearProbe(3).fit(features, targets, cases, 0, is_validation=is_validation)
    assert method.settings == {"inverse_regularisation": min(losses, key=losses.get)}


def test_neighbours_are_those_of_largest_cosine():
    features, targets, cases = problem(gap=1.0)
    unseen, _, _ = problem(seed=1, gap=1.0)
    stated = NearestNeighbours(3, num_neighbours=7).fit(features, targets, cases, 0).predict(unseen)
    mean, spread = features.mean(axis=0), features.std(axis=0)
    known, asked = (features - mean) / spread, (unseen - mean) / spread
    for row, vector in enumerate(asked):
        cosines = known @ vector / np.linalg.norm(known, axis=1) / np.linalg.norm(vector)
        nearest = targets[np.argsort(-cosines)[:7]]
        np.testing.assert_allclose(stated[row], np.bincount(nearest, minlength=3) / 7)


def test_the_number_of_neighbours_is_chosen_on_other_cases():
    rng = np.random.default_rng(0)
    # Every case has a twin slide of its own; other cases tell nothing alone, but many together do.
    targets = np.repeat(np.arange(80) % 2, 2)
    base = rng.normal(size=(80, 3)) + 0.6 * (np.arange(80) % 2)[:, None]
    features = np.repeat(base, 2, axis=0) + 1e-3 * rng.normal(size=(160, 3))
    cases = np.repeat([f"c{number}" for number in range(80)], 2).tolist()
    assert NearestNeighbours(2).fit(features, targets, cases, 0).settings["num_neighbours"] >= 5
    # With each slide a case of its own the twin gives the answer away.
    alone = [f"c{number}" for number in range(160)]
    assert NearestNeighbours(2).fit(features, targets, alone, 0).settings["num_neighbours"] == 1


def test_prototypes_are_centred_unit_means():
    features, targets, cases = problem(gap=1.0)
    unseen, _, _ = problem(seed=1, gap=1.0)
    stated = Prototypes(3).fit(features + 100, targets, cases, 0).predict(unseen + 100)
    centre = features.mean(axis=0)
    for row, vector in enumerate(unseen - centre):
        distances = []
        for place in range(3):
            inside = features[targets == place] - centre
            mean = (inside / np.linalg.norm(inside, axis=1, keepdims=True)).mean(axis=0)
            distances.append(np.linalg.norm(vector / np.linalg.norm(vector) - mean))
        assert stated[row].argmax() == np.argmin(distances)


@pytest.mark.parametrize("shots", [1, 2, 16])
def test_few_shot_sees_so_many_cases_of_each_class_and_no_more(shots, monkeypatch):
    features, targets, cases = problem()
    seen = []
    fit = Prototypes.fit
    monkeypatch.setattr(
        Prototypes,
        "fit",
        lambda self, x, y, names, seed: seen.append((x.copy(), y.copy())) or fit(self, x, y, names, seed),
    )
    for seed in range(3):
        FewShot(3, shots).fit(features, targets, cases, seed)
    for drawn, answers in seen:
        rows = [int(np.flatnonzero((features == vector).all(axis=1))[0]) for vector in drawn]
        assert len({cases[row] for row in rows}) == 3 * shots
        assert np.bincount(answers).tolist() == [2 * shots] * 3
        assert targets[rows].tolist() == answers.tolist()
    assert not np.array_equal(seen[0][0], seen[1][0])


def test_each_label_is_learned_where_it_is_known():
    features, targets, cases = problem(num_classes=2)
    flags = np.stack([targets, 1 - targets, np.ones(len(targets))], axis=1).astype(float)
    flags[::3, 0] = np.nan
    method = EachLabel(LinearProbe(2), ["TP53", "EGFR", "always"])
    stated = method.fit(features, flags, cases, 0).predict(features)
    known = ~np.isnan(flags[:, 0])
    alone = LinearProbe(2).fit(features[known], targets[known], np.array(cases)[known], 0)
    np.testing.assert_allclose(stated[:, 0], alone.predict(features)[:, 1])
    assert (stated[:, 1] > 0.5).mean() == pytest.approx(0.5)
    assert (stated[:, 2] == 1).all()
    assert method.settings["TP53"] == alone.settings
    assert "untrained" in method.settings["always"]


def test_methods_are_made_by_name_and_kind():
    labels = TaskLabels("x", "classification", np.array([0, 1]), ["a", "b"])
    assert [method.name for method in make_methods(labels, None)[0]] == ["linear_probe", "knn", "prototypes"]
    methods, notes = make_methods(labels, ["few_shot", "mlp"], smallest_class=4)
    assert [method.name for method in methods] == [
        *("few_shot_1", "few_shot_2", "few_shot_4"),
        *("few_shot_1_linear", "few_shot_2_linear", "few_shot_4_linear", "mlp"),
    ]
    assert notes[0] == "few_shot_8: a training part has only 4 cases of a class"
    with pytest.raises(
        ValueError, match=r"--methods: cox cannot do a task of kind classification; .* linear_probe, knn"
    ):
        make_methods(labels, ["knn", "cox"])
    assert {"linear_probe", "knn", "prototypes", "mlp", "few_shot"} <= set(method_names())
