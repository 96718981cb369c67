# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl view`: slides in a browser, with what matches a text, codewords, and nearest slides."""

import argparse
import logging
from pathlib import Path
from typing import Any

from ..manifest import read_manifest
from ..search_index import EmbeddingIndex

logger = logging.getLogger(__name__)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl view`."""
    parser.description = (
        "Shows slides in a browser: deep zoom, where a text matches, which codeword each tile has, nearest slides. "
        "Only the given slides are served, to this machine only unless --host says otherwise; nothing is loaded from "
        "the network. Needs the extra `viewer`."
    )
    parser.add_argument("slides", type=Path, metavar="SLIDES", help="a slide, a folder of slides, or a manifest")
    parser.add_argument("--model", help="folder or repository of a DRE-SLCL model; without it, pixels only")
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="DIR",
        help="folder written by `dre-slcl embed --tile-features`: its slides are not encoded again, and are searched",
    )
    parser.add_argument("--mpp", type=float, help="level-0 resolution in um/px, for slides that do not state it")
    parser.add_argument("--slides-root", type=Path, help="folder that a manifest's paths start from")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--device", help="for example cpu or cuda:0 (default: the first accelerator)")
    parser.add_argument(
        "--make-space",
        type=Path,
        metavar="DIR",
        help="write a Hugging Face Space with this page instead of serving it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    try:
        if arguments.make_space is not None:
            from .make_space import make_space

            make_space(arguments)
            return 0
        return serve(arguments)
    except (ValueError, OSError, ImportError) as error:
        logger.error("%s", error)
        return 1


def serve(arguments: argparse.Namespace) -> int:
    """Serves the page until it is interrupted.

    Raises:
        ValueError: if there is no slide to show, or the embeddings are not the model's.
        ImportError: if the extra `viewer` is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("The viewer needs Starlette and uvicorn: pip install 'dre-slcl[viewer]'") from error

    from .viewer_app import LOOPBACK, make_app

    viewer = build_viewer(
        list_slides(arguments.slides, arguments.mpp, arguments.slides_root),
        model=arguments.model,
        embeddings=arguments.embeddings,
        device=arguments.device,
    )
    app = make_app(viewer, allowed_hosts=LOOPBACK if arguments.host in _LOOPBACK else ("*",))
    config = uvicorn.Config(app, host=arguments.host, port=arguments.port, log_level="warning")
    try:
        with config.bind_socket() as listening:
            logger.info("Open http://%s:%d (Ctrl+C ends it).", arguments.host, listening.getsockname()[1])
            uvicorn.Server(config).run(sockets=[listening])
    except SystemExit as error:  # how uvicorn says that the port is taken
        raise OSError(f"--port {arguments.port} of {arguments.host} cannot be used; choose another") from error
    return 0


def list_slides(source: Path, mpp: float | None, slides_root: Path | None) -> list[tuple[str, Path, float | None]]:
    """Lists a single slide, a folder of slides, or a manifest: name, file and mpp of each."""
    if source.is_file() and source.suffix.lower() not in (".csv", ".tsv", ".parquet"):
        # A DICOM slide is a folder of files, which has the slide's name.
        name = source.absolute().parent.name if source.suffix.lower() == ".dcm" else source.stem
        return [(name, source, mpp)]
    return [(row.slide_id, row.path, row.mpp or mpp) for row in read_manifest(source, slides_root=slides_root)]


def build_viewer(
    slides: list[tuple[str, Path, float | None]],
    *,
    model: str | None = None,
    embeddings: Path | None = None,
    device: str | None = None,
) -> Any:
    """Loads what the page needs.

    Args:
        slides (`list` of `tuple`): name, file and mpp of each slide.
        model (`str`, *optional*): folder or repository of a DRE-SLCL model.
        embeddings (`Path`, *optional*): folder written by `dre-slcl embed`.
        device (`str`, *optional*): of the model; by default the first accelerator.

    Returns:
        `SlideViewer`.

    Raises:
        ValueError: if no slide can be shown, or the embeddings are of another model.
    """
    from .slide_viewer import SlideViewer

    if model is None:
        if embeddings is not None:
            raise ValueError("--embeddings needs --model: the one that made them.")
        return SlideViewer(slides)
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer

    from ..pretrained import load_slide_model
    from .slide_matches import SlideMatches

    index = None
    if embeddings is not None:
        index = EmbeddingIndex.open(embeddings)
        index.check_model(model)
    loaded = load_slide_model(model).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = None
    if loaded.text_encoder is not None:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    image_processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    return SlideViewer(slides, SlideMatches(loaded, image_processor, tokenizer, index))
