# SPDX-License-Identifier: Apache-2.0
"""The options of `dre-slcl evaluate`; apart, so that `--help` needs neither torch nor scikit-learn."""

import argparse

KINDS = ("classification", "multilabel", "regression", "survival")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Evaluates embeddings on labels of slides or cases (--embeddings, --labels), or a model on the held-out split "
        "of a slide dataset (--model, --dataset). Splits are by case, and every score stands beside its null rows."
    )
    parser.epilog = (
        "Exit status: 0 complete, 3 some slides had no usable embedding, 1 failed, 2 wrong usage. The guide "
        "docs/evaluating.md tells formats and protocol."
    )
    shared = parser.add_argument_group("both forms")
    shared.add_argument(
        "--out", required=True, metavar="DIR|FILE.json", help="folder of results; with --dataset the file of metrics"
    )
    shared.add_argument(
        "--num-bootstrap", type=int, default=1000, metavar="N", help="samples of cases for intervals (%(default)s)"
    )
    _add_input(parser.add_argument_group("embeddings and labels"))
    _add_protocol(parser.add_argument_group("protocol for embeddings"))
    _add_model(parser.add_argument_group("model, for a slide dataset and for text"))


def _add_input(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--embeddings",
        metavar="PATH[::COLUMN]",
        help="folder of `dre-slcl embed`, table with vectors, folder of .h5 (TRIDENT) or .safetensors",
    )
    group.add_argument("--name", default="slides", help="how results call them (%(default)s)")
    group.add_argument("--labels", metavar="FILE", help=".csv, .tsv or .parquet with slide_id and/or case_id")
    group.add_argument("--task", nargs="+", default=[], metavar="COLUMN", help="label columns")
    group.add_argument("--kind", choices=KINDS, help="kind of task (default: guessed from the values)")
    group.add_argument(
        "--reports",
        metavar="FILE",
        help="table of slide_id or case_id and report: do slides find their reports, and reports their slides? Needs "
        "--model, which made the embeddings",
    )
    group.add_argument("--time", metavar="COLUMN", help="survival: time to the event or the last contact")
    group.add_argument("--event", metavar="COLUMN", help="survival: 1 where the event was seen, else 0")
    group.add_argument("--pool", choices=("mean",), help="features of tiles become embeddings of slides by their mean")
    group.add_argument("--level", choices=("slide", "case"), help="what is classified (default: as labels are given)")
    group.add_argument(
        "--case-pattern",
        metavar="tcga|slide|REGEX",
        help="how a slide's id tells its case, where no table does: TCGA barcode, each slide a case, or first group",
    )
    group.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="null embeddings beside: random weights, means of tiles",
    )
    group.add_argument(
        "--peer", nargs="+", default=[], metavar="NAME=PATH", help="embeddings of other encoders to compare with"
    )


def _add_protocol(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="linear_probe, knn, prototypes, few_shot, mlp; ridge; cox; slide_retrieval; with --model zero_shot, "
        "fine_tuning "
        "(default: the quick ones of the kind)",
    )
    folds = group.add_mutually_exclusive_group()
    folds.add_argument("--folds", type=int, default=5, metavar="N", help="stratified folds by case (%(default)s)")
    folds.add_argument(
        "--fold-files", nargs="+", default=[], metavar="FILE", help="folds of CLAM, Patho-Bench, TITAN or your own"
    )
    group.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="training cases that choose settings (default: cross-validation within the training part)",
    )
    group.add_argument("--preserve-sites", action="store_true", help="no site in two folds; TCGA barcodes tell sites")
    group.add_argument("--site-column", metavar="COLUMN", help="a column of sites instead; implies --preserve-sites")
    group.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of folds and methods")
    group.add_argument("--no-shuffled", action="store_true", help="leave out the rows with shuffled labels")


def _add_model(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--model", metavar="DIR|REPO", help="the trained model")
    group.add_argument(
        "--tile-features", metavar="DIR", help="for fine_tuning (default: those of `dre-slcl embed` in --embeddings)"
    )
    group.add_argument("--dataset", metavar="DIR|REPO", help="slide dataset, from `dre-slcl tiles`")
    group.add_argument("--split", default="test", help="held-out split (%(default)s)")
    group.add_argument("--train-split", default="train", help="for probe and baseline; '' for neither (%(default)s)")
    group.add_argument("--label-column", metavar="NAME", help="column with classes; without it, reports only")
    group.add_argument("--classes", metavar="FILE.json", help="class -> list of its names (default: the labels)")
    group.add_argument("--templates", nargs="+", help="prompts with the token CLASSNAME")
    group.add_argument("--text-model", metavar="DIR|REPO", help="reads reports, if the model has no text model")
    group.add_argument("--max-report-tokens", type=int, default=512, help="for --text-model (%(default)s)")
    group.add_argument("--slides-root", metavar="DIR", help="folder of the slides, for a dataset of coordinates only")
    baseline = {"action": argparse.BooleanOptionalAction, "default": True}
    group.add_argument("--random-baseline", help="also the same model with random weights (yes)", **baseline)
    group.add_argument("--batch-size", type=int, default=64, help="tiles encoded at once (%(default)s)")
    group.add_argument("--device", help="for example cpu or cuda:0 (default: the first accelerator)")
    group.add_argument("--seed", type=int, default=0, help="of random weights, folds and intervals (%(default)s)")
