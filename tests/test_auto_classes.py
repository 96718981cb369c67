# SPDX-License-Identifier: Apache-2.0
"""A saved folder serves transformers' Auto classes and `pipeline`, with this package and where it is not installed."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

import modeling_dre_slcl
from modeling_dre_slcl import (
    DreSlclConfig,
    DreSlclImageProcessor,
    DreSlclModel,
    DreSlclProcessor,
    SlideFeatureExtractionPipeline,
)

from .hub_server import run_client
from .tiny_models import tiny_image_processor, tiny_model, tiny_tokenizer
from .tiny_slide import write_tiny_slide

TASK = "slide-feature-extraction"
VECTORS = ("slide_embedding", "slide_projection", "residuals", "codeword_counts")

LOAD_AND_SAVE_AGAIN = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

try:
    import modeling_dre_slcl
except ImportError:
    pass
else:
    raise AssertionError("the package is not hidden")

folder, slide, out = map(Path, sys.argv[1:])

def load(folder):
    classes = {"config": AutoConfig, "model": AutoModel, "image": AutoImageProcessor, "processor": AutoProcessor}
    return {key: value.from_pretrained(folder, trust_remote_code=True) for key, value in classes.items()}

def vectors(result):
    names = ("slide_embedding", "slide_projection", "residuals", "codeword_counts")
    return {name: result[name] for name in names}

def prompt(parts):
    tokens = parts["processor"](text=["a tumor of grade"], return_tensors="pt")
    return parts["model"].get_text_features(**{key: tokens[key] for key in ("input_ids", "attention_mask")})

parts = load(folder)
pipe = pipeline("slide-feature-extraction", model=folder, trust_remote_code=True, device="cpu")
save_file(vectors(pipe(slide)), out / "pipeline.safetensors")
save_file(vectors(parts["model"].encode_slide(slide)), out / "encode_slide.safetensors")
save_file({"text": prompt(parts).detach()}, out / "text.safetensors")

again = out / "again"
parts["model"].save_pretrained(again)
parts["processor"].save_pretrained(again)
reloaded = load(again)
pipe = pipeline("slide-feature-extraction", model=again, trust_remote_code=True, device="cpu")
save_file(vectors(pipe(slide)), out / "again.safetensors")
print(json.dumps({
    "names": {key: type(value).__name__ for key, value in reloaded.items()},
    "modules": {key: type(value).__module__ for key, value in reloaded.items()},
    "state": sorted(reloaded["model"].state_dict()) == sorted(parts["model"].state_dict()),
}))
"""

IMPORTS = """
import json, sys
before = set(sys.modules)
import modeling_dre_slcl
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""

WITHOUT_OPENSLIDE = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    model.encode_slide(sys.argv[2])
except ImportError as error:
    print(error)
"""


def client_environment(home):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    return environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_tiny_slide(tmp_path_factory.mktemp("slides") / "tiny.tif")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(text=True).save_pretrained(folder)
    DreSlclProcessor(tiny_image_processor(), tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(slide):
    return tiny_model(text=True).encode_slide(slide, image_processor=tiny_image_processor())


@pytest.fixture(scope="module")
def remote(tmp_path_factory, folder, slide):
    """What a process without the package gets from the folder."""
    out = tmp_path_factory.mktemp("remote")
    hide, arguments = ["modeling_dre_slcl"], [folder, slide, out]
    printed = run_client(LOAD_AND_SAVE_AGAIN, client_environment(out / "home"), arguments=arguments, hide=hide)
    return out, json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("way", ["pipeline", "encode_slide", "again"])
def test_without_the_package_a_slide_gets_the_same_vectors(remote, expected, way):
    found = load_file(remote[0] / f"{way}.safetensors")
    assert expected["num_tiles"] > 20
    for name in VECTORS:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_without_the_package_a_text_gets_the_same_vector(remote):
    tokens = tiny_tokenizer()(["a tumor of grade"], return_tensors="pt")
    expected = tiny_model(text=True).get_text_features(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(load_file(remote[0] / "text.safetensors")["text"], expected.detach())


def test_what_was_saved_again_without_the_package_loads_from_its_own_code(remote, folder):
    out, report = remote
    names = {"config": "Config", "model": "Model", "image": "ImageProcessor", "processor": "Processor"}
    assert report["names"] == {key: f"DreSlcl{name}" for key, name in names.items()}
    assert all(module.startswith("transformers_modules.") for module in report["modules"].values())
    assert report["state"]
    assert {path.name for path in (out / "again").iterdir()} == {path.name for path in folder.iterdir()}
    for path in (out / "again").glob("*.py"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_with_the_package_nothing_needs_to_be_trusted(folder):
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=False)) is DreSlclConfig
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=False)) is DreSlclModel
    assert type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)) is DreSlclImageProcessor
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=False)) is DreSlclProcessor


def test_with_the_package_the_pipeline_runs_its_code(folder, slide, expected):
    """transformers runs a folder's pipeline code only if trusted; naming the class takes the package's instead."""
    pipe = pipeline(TASK, model=str(folder), pipeline_class=SlideFeatureExtractionPipeline, device="cpu")
    assert type(pipe) is SlideFeatureExtractionPipeline
    assert type(pipe.model) is DreSlclModel
    found = pipe(slide)
    assert found["status"] == "ok"
    for name in VECTORS:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_an_image_processor_of_its_own_file_is_found_too(tmp_path, slide, expected):
    tiny_model(text=True).save_pretrained(tmp_path)
    tiny_image_processor().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(model.encode_slide(slide)["residuals"], expected["residuals"], rtol=0, atol=1e-5)


def test_a_model_that_was_never_saved_asks_for_an_image_processor(slide):
    with pytest.raises(ValueError, match="pass `image_processor=DreSlclImageProcessor"):
        tiny_model().encode_slide(slide)


def test_every_file_of_the_model_folder_is_saved_with_the_model(folder):
    """But `__init__`, which registers the package, and the classifier, which comes with models that are one."""
    source = Path(modeling_dre_slcl.__file__).parent
    files = {path.name for path in source.glob("*.py")}
    assert {path.name for path in folder.glob("*.py")} == files - {"__init__.py", "slide_classifier.py"}
    for path in folder.glob("*.py"):
        assert path.read_bytes() == (source / path.name).read_bytes()


def test_transformers_import_scan_finds_nothing_missing(folder):
    for path in folder.glob("*.py"):
        check_imports(str(path))
    reachable = {Path(path).name for path in get_relative_import_files(str(folder / "modeling_dre_slcl.py"))}
    assert {"pipeline_dre_slcl.py", "slide_reader.py", "tissue.py"} <= reachable


def test_importing_the_package_imports_no_slide_or_data_libraries(tmp_path):
    imported = set(json.loads(run_client(IMPORTS, client_environment(tmp_path)).splitlines()[-1]))
    assert "transformers" in imported
    assert imported.isdisjoint({"openslide", "datasets", "cv2", "sklearn", "matplotlib", "timm", "tifffile"})


def test_without_openslide_a_model_loads_and_says_what_a_slide_needs(tmp_path, folder, slide):
    hide = ["modeling_dre_slcl", "openslide", "cv2"]
    environment = client_environment(tmp_path)
    message = run_client(WITHOUT_OPENSLIDE, environment, arguments=[folder, slide], hide=hide)
    assert "openslide" in message.lower()
    assert "pip install" in message
