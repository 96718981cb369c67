# SPDX-License-Identifier: Apache-2.0
"""The same page as a Hugging Face Space: a folder to push, with this code, the slides, the model and a Dockerfile.

```
<DIR>/
    README.md          the Space's front matter (a Docker Space on port 7860)
    Dockerfile         Python, requirements.txt, app.py
    requirements.txt   what the code needs, as this installation declares it
    app.py             serves the page
    modeling_dre_slcl/, dre_slcl/training/   this code
    slides/, embeddings/, model/             what is shown; a model of the Hub is named in app.py instead
```
"""

import argparse
import re
import shutil
from importlib import metadata
from pathlib import Path

import modeling_dre_slcl
from modeling_dre_slcl.atomic_files import atomic_folder

_MODEL_FILES = ("*.json", "*.safetensors", "*.txt")
_PORT = 7860
_EXTRAS = ("viewer",)

_README = """---
title: {title}
emoji: \U0001f52c
colorFrom: blue
colorTo: pink
sdk: docker
app_port: {port}
pinned: false
license: apache-2.0
tags:
- pathology
- whole-slide-image
- dre-slcl
---

# {title}

Whole-slide images with the DRE-SLCL viewer: deep zoom, where a text matches, codewords, nearest slides.
For research; not for diagnosis. The slides in `slides/` become public with a public Space: make sure that they may.

To run it elsewhere: `pip install -r requirements.txt && python app.py`.
"""

_DOCKERFILE = """FROM python:3.12-slim
# Spaces run as this user.
RUN useradd -m -u 1000 user
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt
COPY --chown=user . .
USER user
ENV HOME=/home/user OMP_NUM_THREADS=2
EXPOSE {port}
CMD ["python", "app.py"]
"""

_APP = '''# SPDX-License-Identifier: Apache-2.0
"""Serves the viewer's page on the port of the Space, or on PORT."""

import os
from pathlib import Path

import uvicorn

from dre_slcl.training.viewer.view_slides import build_viewer, list_slides
from dre_slcl.training.viewer.viewer_app import make_app

HERE = Path(__file__).parent
MODEL = {model}
EMBEDDINGS = {embeddings}

if __name__ == "__main__":
    slides = list_slides(HERE / "slides", {mpp}, None)
    model = str(HERE / MODEL) if MODEL == "model" else MODEL
    viewer = build_viewer(slides, model=model, embeddings=EMBEDDINGS and HERE / EMBEDDINGS)
    # A Space is reached through a name of its own.
    app = make_app(viewer, allowed_hosts=("*",))
    uvicorn.run(app, host="0.0.0.0", port=int(os.environ.get("PORT", "{port}")), log_level="warning")
'''


def make_space(arguments: argparse.Namespace) -> Path:
    """Writes the folder of a Space.

    Args:
        arguments (`argparse.Namespace`): of `dre-slcl view`; `make_space` is the folder, which must not exist.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if the folder exists, or there is no slide.
    """
    from .view_slides import list_slides

    out = Path(arguments.make_space)
    if out.exists():
        raise ValueError(f"--make-space {out}: exists already; name a new folder.")
    slides = list_slides(arguments.slides, arguments.mpp, arguments.slides_root)
    if not slides:
        raise ValueError(f"{arguments.slides}: no slides.")
    local_model = arguments.model is not None and Path(arguments.model).is_dir()
    with atomic_folder(out) as folder:
        _copy_code(folder)
        for slide_id, path, _ in slides:
            _copy_slide(slide_id, path, folder / "slides")
        if local_model:
            (folder / "model").mkdir()
            for pattern in _MODEL_FILES:
                for path in Path(arguments.model).glob(pattern):
                    shutil.copyfile(path, folder / "model" / path.name)
        if arguments.embeddings is not None:
            _copy_embeddings(arguments.embeddings, folder / "embeddings")
        app = _APP.format(
            model=repr("model" if local_model else arguments.model),
            embeddings=repr(None if arguments.embeddings is None else "embeddings"),
            mpp=repr(arguments.mpp),
            port=_PORT,
        )
        (folder / "app.py").write_text(app, encoding="utf-8")
        (folder / "README.md").write_text(_README.format(title="Slide viewer", port=_PORT), encoding="utf-8")
        (folder / "Dockerfile").write_text(_DOCKERFILE.format(port=_PORT), encoding="utf-8")
        (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements()), encoding="utf-8")
    return out


def _copy_code(folder: Path) -> None:
    """Copies this code under the names by which it is imported."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    training = Path(__file__).resolve().parent.parent
    shutil.copytree(training, folder / "dre_slcl" / "training", ignore=ignored)
    shutil.copytree(Path(modeling_dre_slcl.__file__).parent, folder / "modeling_dre_slcl", ignore=ignored)


def _copy_slide(slide_id: str, path: Path, folder: Path) -> None:
    """Copies a slide under its name, with the folder that some formats keep beside the file."""
    folder.mkdir(exist_ok=True)
    if path.suffix.lower() == ".dcm":
        shutil.copytree(path.parent, folder / slide_id, dirs_exist_ok=True)
        return
    shutil.copyfile(path, folder / f"{slide_id}{path.suffix}")
    if path.with_suffix("").is_dir():
        shutil.copytree(path.with_suffix(""), folder / slide_id, dirs_exist_ok=True)


def _copy_embeddings(source: Path, target: Path) -> None:
    """Copies tables and vectors; `embed.json` and refusals stay behind, since they name paths of this machine."""
    (target / "embeddings").mkdir(parents=True)
    shutil.copyfile(source / "slides.parquet", target / "slides.parquet")
    for path in sorted((source / "embeddings").glob("[!.]*.safetensors")):
        shutil.copyfile(path, target / "embeddings" / path.name)


def _requirements() -> list[str]:
    """What this installation declares, with the viewer's extra and without all others."""
    kept = []
    for line in metadata.requires("dre-slcl") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if extra is None or extra.group(1) in _EXTRAS:
            kept.append(requirement.strip())
    return kept
