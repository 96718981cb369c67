# SPDX-License-Identifier: Apache-2.0
"""The real model and a real slide dataset: published, and used where our packages are not installed."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from modeling_dre_slcl import DreSlclProcessor

from . import slide_cohort
from .hub_server import HubServer, run_client
from .tiny_models import tiny_image_processor, tiny_model, tiny_tokenizer
from .tiny_slide import write_tiny_slide

# Two processes that load everything; `test_auto_classes` holds the same for a folder in seconds.
pytestmark = pytest.mark.slow

HIDDEN = ["modeling_dre_slcl", "dre_slcl", "dre_slcl_cli", "training", "hub"]
VECTORS = ("slide_embedding", "slide_projection", "residuals")
QUERY = "a tumor of grade"

PUBLISH = """
import json, sys
from dre_slcl_cli import main
from dre_slcl.training.tile_source import TileSource
from transformers import AutoModel, AutoProcessor

model, dataset, slide, out = sys.argv[1:]
status = {"publish": main(["publish", "--model", model, "--dataset", dataset, "--repo", "tester/real"])}
parts = [AutoModel.from_pretrained(model), AutoProcessor.from_pretrained(model)]
for part in parts:
    part.push_to_hub("tester/pushed")
source = TileSource("tester/real", "train")
status["tiles"] = [row.num_tiles for row in source.slides]
status["pixels"] = int(source.read(0, [0]).sum())
status["embed"] = main(["embed", "--model", "tester/real", "--slides", slide, "--out", out])
print(json.dumps(status))
"""

USE = """
import json, sys
import numpy as np
from datasets import load_dataset
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

slide, query, out = sys.argv[1:]
trusted = {"trust_remote_code": True}
report = {}
for repo in ("tester/real", "tester/pushed"):
    model = AutoModel.from_pretrained(repo, **trusted)
    processor = AutoProcessor.from_pretrained(repo, **trusted)
    tokens = processor(text=[query], return_tensors="pt")
    text = model.get_text_features(**{name: tokens[name] for name in ("input_ids", "attention_mask")})
    found = pipeline("slide-feature-extraction", model=repo, device="cpu", **trusted)(slide)
    vectors = {name: found[name] for name in ("slide_embedding", "slide_projection", "residuals")}
    vectors |= {"text": text[0].detach(), "direct": model.encode_slide(slide)["slide_embedding"]}
    save_file(vectors, f"{out}/{repo.split('/')[1]}.safetensors")
    parts = [AutoConfig.from_pretrained(repo, **trusted), AutoImageProcessor.from_pretrained(repo, **trusted)]
    parts += [model, processor, AutoTokenizer.from_pretrained(repo, **trusted)]
    report[repo] = [[type(part).__name__, type(part).__module__.split(".")[0]] for part in parts]
slides = load_dataset("tester/real", "slides")
report["slides"] = {split: part["slide_id"][:] for split, part in slides.items()}
report["reports"] = slides["train"]["report"][:]
tiles = load_dataset("tester/real", "tiles", split="train")
report["tiles"] = [tiles["slide_id"][:], tiles["tile_index"][:]]
report["pixels"] = int(np.asarray(tiles[0]["image"]).sum())
if "online" in out:
    stream = load_dataset("tester/real", "tiles", split="train", streaming=True)
    rows = [row for row, _ in zip(stream, range(3))]
    report["streamed"] = [[row["slide_id"], row["tile_index"], int(np.asarray(row["image"]).sum())] for row in rows]
    report["expected"] = [[row["slide_id"], row["tile_index"], int(np.asarray(row["image"]).sum())]
                          for row in tiles.select(range(3))]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Publishes both, and returns the server, the folders, and what the author's process reported."""
    root = tmp_path_factory.mktemp("author")
    model, dataset = root / "model", root / "dataset"
    tiny_model(text=True).save_pretrained(model)
    DreSlclProcessor(tiny_image_processor(), tiny_tokenizer()).save_pretrained(model)
    manifest = slide_cohort.write_cohort(root / "cohort")
    slide_cohort.build(manifest, dataset)
    slide = write_tiny_slide(root / "tiny.tif")
    with HubServer(root / "hub") as server:
        arguments = [model, dataset, slide, root / "embedded"]
        printed = run_client(PUBLISH, server.environment(root / "home"), arguments=arguments)
        yield server, root, json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def used(published):
    """What a machine without our packages gets from the Hub."""
    server, root, _ = published
    return use(server, root, root / "online")


def use(server, root, out, *, offline=False):
    out.mkdir()
    environment = server.environment(root / "reader", offline=offline)
    printed = run_client(USE, environment, arguments=[root / "tiny.tif", QUERY, out], hide=HIDDEN)
    return out, json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(published):
    """What the model gives here, where it was made."""
    slide = published[1] / "tiny.tif"
    model = tiny_model(text=True)
    vectors = model.encode_slide(slide, image_processor=tiny_image_processor())
    tokens = tiny_tokenizer()([QUERY], return_tensors="pt")
    text = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])[0].detach()
    return {name: vectors[name] for name in VECTORS} | {"text": text, "direct": vectors["slide_embedding"]}


def check_vectors(out, expected):
    for name in ("real", "pushed"):
        found = load_file(out / f"{name}.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


def test_slides_and_texts_get_the_same_vectors_from_the_hub(used, expected):
    check_vectors(used[0], expected)


def test_every_auto_class_finds_the_repositorys_own_code(used):
    for repo in ("tester/real", "tester/pushed"):
        *ours, (tokenizer, module) = used[1][repo]
        names = ("Config", "ImageProcessor", "Model", "Processor")
        assert ours == [[f"DreSlcl{name}", "transformers_modules"] for name in names]
        assert (tokenizer, module) == ("BertTokenizer", "transformers")


def test_a_published_dataset_loads_whole_and_as_a_stream(published, used):
    report = used[1]
    table = pq.read_table(published[1] / "dataset" / "tiles" / "train-00000-of-00001.parquet").to_pydict()
    assert report["tiles"] == [table["slide_id"], table["tile_index"]]
    assert report["streamed"] == report["expected"]
    assert {split: set(names) for split, names in report["slides"].items()} == {
        "train": {"s0", "broken", "s1", "s2"},
        "val": {"blank"},
        "test": {"s3", "gone"},
    }
    assert "Tumor, grade 2." in report["reports"]


def test_our_own_commands_take_names_on_the_hub(published, used, expected):
    server, root, status = published
    assert (status["publish"], status["embed"]) == (0, 0)
    assert sum(status["tiles"]) == len(used[1]["tiles"][0])
    assert status["pixels"] == used[1]["pixels"]
    stored = load_file(root / "embedded" / "embeddings" / "tiny.safetensors")
    torch.testing.assert_close(stored["slide_projection"], expected["slide_projection"], rtol=0, atol=1e-5)
    files = set(server.repository("tester/real").files())
    assert files - {".gitattributes", "README.md"} <= set(server.repository("tester/pushed").files())
    assert not any("bank" in name and not name.endswith(".py") for name in files)


def test_everything_again_without_a_network(published, used, expected):
    server, root, _ = published
    server.requests.clear()
    out, report = use(server, root, root / "offline", offline=True)
    assert not server.requests
    check_vectors(out, expected)
    assert report == {key: value for key, value in used[1].items() if key not in ("streamed", "expected")}
