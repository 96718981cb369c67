# SPDX-License-Identifier: Apache-2.0
"""Results in a model's card, read back by huggingface_hub's own parsers."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from dre_slcl.hub.check_export import check_export
from dre_slcl.hub.eval_results import add_results, read_results
from dre_slcl.hub.gather import PublishError, gather_model

from .hub_server import HubServer, run_client
from .made_results import make_result
from .test_publish import ROOT
from .toy_export import write_toy_model

DATASET = "tester/cohort"


@pytest.fixture(scope="module")
def results():
    return [make_result("classification", few_shot=True).to_dict(), make_result("regression").to_dict()]


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    gather_model(write_toy_model(tmp_path / "model"), folder, repo_id="tester/toy")
    return folder


def index_of(folder):
    return ModelCard.load(folder / "README.md").data.eval_results


def test_the_hubs_parsers_read_back_what_was_found(export, results):
    add_results(export, results, dataset=DATASET, name="toy")
    found = {(one.dataset_config, one.metric_name): one for one in index_of(export)}
    row = results[0]["rows"][0]
    task = results[0]["task"]
    for metric, score in row["scores"].items():
        assert ((task, f"{metric} (linear_probe)") in found) == ("/" not in metric)
        if "/" not in metric:
            assert found[task, f"{metric} (linear_probe)"].metric_value == score["value"]
    assert found[task, "auroc (knn)"].metric_value == results[0]["rows"][1]["scores"]["auroc"]["value"]
    assert (task, "accuracy (knn)") not in found
    assert {one.dataset_type for one in found.values()} == {DATASET}
    assert not any("peer" in name or "chance" in name for _, name in found)
    entries = parse_eval_result_entries(
        yaml.safe_load((export / ".eval_results" / "classification_of_i.yaml").read_text())
    )
    assert [entry.task_id for entry in entries] == [
        f"classification_of_i_{method}" for method in ("linear_probe", "knn", "few_shot_1", "few_shot_4")
    ]
    assert entries[0].value == row["scores"]["auroc"]["value"]
    assert entries[0].dataset_id == DATASET
    for text in ("95% interval", "random weights", "shuffled labels", "chance 0.500", "60 items of 30 cases"):
        assert text in entries[0].notes
    assert check_export(export, allowed_text=("tester/toy",)) == []


def test_the_same_task_is_replaced_and_others_are_kept(export, results):
    add_results(export, results, dataset=DATASET, name="toy")
    once = {path: path.read_text() for path in (export / "README.md", *(export / ".eval_results").iterdir())}
    add_results(export, results, dataset=DATASET, name="toy")
    assert {path: path.read_text() for path in once} == once
    other = json.loads(json.dumps(results[0]))
    other["rows"][0]["scores"]["auroc"]["value"] = 0.123
    add_results(export, [other], dataset=DATASET, name="toy")
    values = {(one.dataset_config, one.metric_name): one.metric_value for one in index_of(export)}
    assert values[other["task"], "auroc (linear_probe)"] == 0.123
    assert values[results[1]["task"], "r2 (linear_probe)"] == results[1]["rows"][0]["scores"]["r2"]["value"]
    text = (export / "README.md").read_text()
    assert text.count("### classification of") == text.count("### regression of") == 1
    assert "0.123" in text
    assert len(list((export / ".eval_results").iterdir())) == 2
    # The same task on another dataset is another task.
    add_results(export, [other], dataset="tester/elsewhere", name="toy")
    assert {one.dataset_type for one in index_of(export)} == {DATASET, "tester/elsewhere"}


def test_results_stand_where_the_card_said_there_are_none(export, results):
    assert "Metrics: not stated." in (export / "README.md").read_text()
    add_results(export, results, dataset=None, name="toy")
    text = (export / "README.md").read_text()
    assert "Metrics: not stated." not in text
    assert "## Results" not in text
    assert text.index("### classification of") < text.index("### regression of")
    assert "| linear_probe | random weights, null row |" in text
    assert not (export / ".eval_results").exists()  # no dataset to name


def test_a_users_own_card_keeps_its_words(tmp_path, results):
    own = "---\nlicense: mit\nmodel-index:\n- name: mine\n  results:\n  - task:\n      type: x\n    dataset:\n"
    own += "      type: a/b\n      name: b\n    metrics:\n    - type: acc\n      value: 0.5\n---\n\n# Mine\n\nWords.\n"
    (tmp_path / "README.md").write_text(own)
    add_results(tmp_path, results[1:], dataset=DATASET, name="toy")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.model_name) == ("mit", "mine")
    assert card.data.eval_results[0].metric_value == 0.5
    assert len(card.data.eval_results) == 1 + 5 + 1  # all scores of the first method, the main one of the second
    assert card.text.strip().startswith("# Mine\n\nWords.\n\n## Results")


def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"auroc": 0.9}))
    with pytest.raises(PublishError, match=r"expected the results\.json that"):
        read_results(tmp_path)
    (tmp_path / "README.md").write_text("---\n- a: [\n---\n")
    with pytest.raises(PublishError, match=r"README.md: its metadata cannot be read"):
        add_results(tmp_path, [], dataset=None, name="toy")


PUBLISH = """
import argparse, sys
sys.path.insert(0, sys.argv[1])
from hub import publish
parser = argparse.ArgumentParser()
publish.add_arguments(parser)
arguments = ["--model", sys.argv[2], "--results", sys.argv[3], "--results-dataset", "tester/cohort"]
print(publish.run(parser.parse_args([*arguments, "--repo", "tester/toy"])))
"""


def test_results_go_out_with_the_model(tmp_path, results):
    model = write_toy_model(tmp_path / "model")
    (tmp_path / "results.json").write_text(json.dumps(results))
    with HubServer(tmp_path / "hub") as server:
        arguments = [ROOT, model, tmp_path / "results.json"]
        out = run_client(PUBLISH, server.environment(tmp_path / "author"), arguments=arguments)
        assert out.splitlines()[-1] == "0"
        stored = server.repository("tester/toy").files("main")
        assert {name for name in stored if name.startswith(".eval")} == {
            f".eval_results/{kind}_of_i.yaml" for kind in ("classification", "regression")
        }
        card = ModelCard(server.repository("tester/toy").read("main", "README.md").decode())
    assert card.data.eval_results[0].metric_value == results[0]["rows"][0]["scores"]["balanced_accuracy"]["value"]
