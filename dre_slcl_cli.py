# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl`: one command with a subcommand for each task. The only place above all folders."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

# Subcommand -> (module, one line of help). Modules are imported only when their subcommand is called.
COMMANDS = {
    "cohort": ("dre_slcl.training.cohort.cohort_command", "tables of TCGA and CPTAC as manifest, labels and splits"),
    "tiles": ("dre_slcl.training.tiles_command", "tile slides into a Hugging Face dataset"),
    "convert-encoder": ("dre_slcl.training.convert_encoder", "pickled weights of a tile encoder as safetensors"),
    "train": ("dre_slcl.training.train", "train a slide encoder on a slide dataset with reports"),
    "bank": ("dre_slcl.training.bank_command", "look into the memory bank of a training run"),
    "embed": ("dre_slcl.training.embed_slides", "embed slides with a trained model"),
    "explain": ("dre_slcl.training.explain_slide", "show which tiles of a slide speak for a text or a class"),
    "evaluate": (
        "dre_slcl.training.evaluation.evaluate_command",
        "embeddings on labels, or a model on held-out slides",
    ),
    "search": ("dre_slcl.training.search_slides", "find slides, reports or regions by a text or a slide"),
    "view": ("dre_slcl.training.viewer.view_slides", "look at slides and at what matches a text, in a browser"),
    "export": ("dre_slcl.training.export_dataset", "write a slide dataset in the layout of another tool"),
    "import-features": ("dre_slcl.training.import_features", "tile features of other tools as a dataset"),
    "publish": ("dre_slcl.hub.publish", "publish a model or a dataset on the Hugging Face Hub"),
    "demo": ("dre_slcl.training.demo.run_demo", "run everything on a small synthetic cohort, on a CPU, in minutes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv (sequence of `str`, *optional*): the arguments; by default those of the process.

    Returns:
        `int`: exit status: 0 complete, 1 failed, 2 wrong usage, 3 partial (some slides were refused), 4 and 5 see
        `dre-slcl tiles --help`, 128 + n when
        signal n stopped it.
    """
    if argv is None and sys.argv[1:2] == ["tiles"]:
        # A process that does nothing else needs no torch, whose loading takes longer than tiling a slide.
        importlib.import_module("dre_slcl.training.slide_worker").prepare_worker()
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        "dre-slcl",
        description="Whole-slide-image encoders trained end to end with pathology reports.",
        epilog="`dre-slcl COMMAND --help` explains a command. New here? `dre-slcl demo` shows everything in minutes.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if argv and argv[0] == name:
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # One line per HTTP request would bury everything else.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return importlib.import_module(COMMANDS[arguments.command][0]).run(arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
