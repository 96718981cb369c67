# SPDX-License-Identifier: Apache-2.0
"""A toy model folder and a toy slide dataset, of the shape that publishing meets, for the tests of `hub`."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

CODE = {
    "configuration_dre_slcl": """
        from huggingface_hub.dataclasses import strict
        from transformers import PreTrainedConfig

        @strict
        class DreSlclConfig(PreTrainedConfig):
            model_type = "dre_slcl"
            hidden_size: int = 4
            tile_size_px: int = 256
            tile_mpp: float = 0.5
    """,
    "tile_encoder": """
        from torch import nn

        def build(width):
            return nn.Linear(width, width, bias=False)
    """,
    "modeling_dre_slcl": """
        from transformers import PreTrainedModel

        from .configuration_dre_slcl import DreSlclConfig
        from .tile_encoder import build

        class DreSlclModel(PreTrainedModel):
            config_class = DreSlclConfig

            def __init__(self, config):
                super().__init__(config)
                self.encoder = build(config.hidden_size)
                self.post_init()

            def forward(self, x):
                return self.encoder(x)
    """,
    "pipeline_dre_slcl": """
        import torch
        from transformers import Pipeline

        class SlideFeatureExtractionPipeline(Pipeline):
            def _sanitize_parameters(self, **kwargs):
                return {}, {}, {}

            def preprocess(self, inputs):
                return {"x": torch.tensor([inputs["x"]])}

            def _forward(self, inputs):
                return {"slide_embedding": self.model(inputs["x"])[0]}

            def postprocess(self, outputs):
                return outputs
    """,
}
CONFIG = {
    "model_type": "dre_slcl",
    "architectures": ["DreSlclModel"],
    "auto_map": {
        "AutoConfig": "configuration_dre_slcl.DreSlclConfig",
        "AutoModel": "modeling_dre_slcl.DreSlclModel",
    },
    "custom_pipelines": {
        "slide-feature-extraction": {
            "impl": "pipeline_dre_slcl.SlideFeatureExtractionPipeline",
            "pt": ["AutoModel"],
        }
    },
    "hidden_size": 4,
    "tile_size_px": 256,
    "tile_mpp": 0.5,
    "encoder_config": {"model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12},
}


def write_toy_model(folder: Path) -> Path:
    """Writes what `save_pretrained` leaves: config, weights (mode 0600), processor, flat code; returns `folder`."""
    folder.mkdir()
    for name, code in CODE.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(code))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = {"encoder.weight": np.arange(16, dtype=np.float32).reshape(4, 4)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 256, "width": 256}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_toy_dataset(folder: Path) -> Path:
    """Writes a finished slide dataset with one train slide, and the working files that stay behind."""
    rows = {
        "slides/train-00000-of-00001.parquet": {
            "slide_id": ["s1"],
            "case_id": ["c1"],
            "split": ["train"],
            "path": ["a/s1.svs"],
            "reason": [None],
            "num_tiles": [2],
        },
        "tiles/train-00000-of-00001.parquet": {"slide_id": ["s1", "s1"], "tile_index": [0, 1]},
    }
    for name, columns in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / name)
    (folder / "README.md").write_text(
        "---\nlicense: other\nconfigs:\n"
        "- {config_name: tiles, default: true, data_files: [{split: train, path: tiles/train-*.parquet}]}\n"
        "- {config_name: slides, data_files: [{split: train, path: slides/train-*.parquet}]}\n---\n# Slides\n"
    )
    info = {"format_version": 1, "files": {name: (folder / name).stat().st_size for name in rows}}
    (folder / "dre_slcl_dataset.json").write_text(json.dumps(info))
    for name in (".parts/s2.parquet", "refused.jsonl", "summary.json", "previews/s1.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("/home/someone/slides/s2.svs")
    return folder
