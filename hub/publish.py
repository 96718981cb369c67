# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl publish`: puts a model, the slide dataset it was trained on, and metrics on the Hub.

What goes out is first gathered in a folder of its own (`gather.py`) and checked there (`check_export.py`); only then
is it uploaded, and the commit hash to pin is printed.
"""

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token

# `HTTPError` is the base of what the hub's HTTP client raises when nothing answers; that client's name has changed
# between releases, this name has not.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from modeling_dre_slcl.atomic_files import read_json

from .check_dataset import check_dataset
from .check_export import Finding, check_export
from .eval_results import add_results, read_results
from .gather import PublishError, gather_dataset, gather_model
from .gather_metric import check_metric, gather_metric

logger = logging.getLogger(__name__)

# Files of an earlier upload that would be taken for part of this one: code, weight shards, data shards.
_STALE_PATTERNS = {
    "model": ["*.py", "*.safetensors", "*.index.json"],
    "dataset": ["slides/*", "tiles/*", "previews/*"],
    "space": ["*.py"],
}
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Published:
    """Where something was published.

    Args:
        repo_id (`str`): `namespace/name`.
        repo_type (`str`): "model", "dataset" or "space".
        commit (`str`): commit hash, 40 hex digits; what users pin as `revision`.
        url (`str`): address of the commit.
        pull_request_url (`str`, *optional*): address of the pull request, if one was opened.
    """

    repo_id: str
    repo_type: str
    commit: str
    url: str
    pull_request_url: str | None = None


@dataclass(frozen=True)
class Destination:
    """Where to publish.

    Args:
        repo_id (`str`): `namespace/name`; created if absent.
        private (`bool`, defaults to `False`): only members of the namespace may see it.
        revision (`str`, *optional*): branch; created if absent; by default `main`.
        create_pr (`bool`, defaults to `False`): open a pull request instead of committing to `main`.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        if not _REPO_ID.fullmatch(self.repo_id):
            raise PublishError(f"repository {self.repo_id!r}: expected NAMESPACE/NAME of letters, digits and . _ -")
        if self.create_pr and self.revision not in {None, "main"}:
            raise PublishError(f"--create-pr opens a pull request against main; drop --revision {self.revision}")


def upload(folder: Path, destination: Destination, *, repo_type: str, message: str) -> Published:
    """Uploads a gathered folder in one go; files of an earlier upload that are no longer part of it are deleted.

    Args:
        folder (`Path`): everything in it is uploaded.
        destination (`Destination`): the repository.
        repo_type (`str`): "model", "dataset" or "space".
        message (`str`): first line of the commit message.

    Returns:
        `Published`: with the commit hash.

    Raises:
        PublishError: in one line, if the Hub cannot be reached or does not allow it.
    """
    repo_id, revision = destination.repo_id, destination.revision
    with _explained(repo_id):
        if get_token() is None:
            raise PublishError("no Hub token; run `hf auth login`, or set HF_TOKEN, with a token that may write")
        api = HfApi()
        api.create_repo(
            repo_id,
            repo_type=repo_type,
            private=destination.private or None,
            space_sdk="gradio" if repo_type == "space" else None,
            exist_ok=True,
        )
        if destination.private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise PublishError(f"{repo_id} exists and is public; make it private on the Hub, or drop --private")
        if revision not in {None, "main"}:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        info = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            revision=revision,
            create_pr=destination.create_pr,
            commit_message=message,
            delete_patterns=_STALE_PATTERNS[repo_type],
        )
    return Published(repo_id, repo_type, info.oid, info.commit_url, info.pr_url)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turns errors of the Hub and of the network into a `PublishError` of one line."""
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        explanation = _explain(error, repo_id)
        if explanation is None:
            raise
        raise PublishError(explanation) from error


def _explain(error: BaseException, repo_id: str) -> str | None:
    """Says in one line what went wrong; `None` if it has nothing to do with the Hub."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to publish"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or "").split())
        if status == 403:
            return f"the Hub forbids this token to write to {repo_id} ({said}); use a token with write access to it"
        if isinstance(error, RepositoryNotFoundError) and status != 401:
            return f"{repo_id} does not exist, or this token may not see it"
        if status == 401:
            return f"the Hub does not accept the token ({said}); run `hf auth login` again"
        return f"the Hub answered {status} for {repo_id} ({said or type(error).__name__})"
    if isinstance(error, HTTPError):
        return f"no connection to {constants.ENDPOINT} ({type(error).__name__}); check the network and HF_ENDPOINT"
    # The upload of large files wraps what happened in a RuntimeError.
    return _explain(error.__cause__, repo_id) if error.__cause__ is not None else None


def publish_model(
    model_dir: str | Path,
    destination: Destination,
    *,
    metrics: dict[str, Any] | None = None,
    data_statement: str | None = None,
    datasets: Sequence[str] = (),
    results: Sequence[dict[str, Any]] = (),
    results_dataset: str | None = None,
    dry_run: bool = False,
) -> Published | None:
    """Gathers, checks and uploads a saved model.

    Args:
        model_dir (`str` or `Path`): where `DreSlclModel.save_pretrained` and `processor.save_pretrained` wrote.
        destination (`Destination`): the repository.
        metrics, data_statement, datasets: material for the card, see `build_model_card`.
        results (sequence of `dict`), results_dataset (`str`, *optional*): see `add_results`.
        dry_run (`bool`, defaults to `False`): stop before the upload; needs no network.

    Returns:
        `Published`, or `None` after a dry run.

    Raises:
        PublishError: if the folder must not go out (every finding is named), or the Hub does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="dre-slcl-publish-") as temporary:
        folder = Path(temporary)
        repo_id = destination.repo_id
        gather_model(
            model_dir, folder, repo_id=repo_id, metrics=metrics, data_statement=data_statement, datasets=datasets
        )
        if results:
            add_results(folder, results, dataset=results_dataset, name=repo_id.split("/")[-1])
        public = (repo_id, *datasets, *([results_dataset] if results_dataset else []))
        _report(folder, check_export(folder, allowed_text=public), f"model {repo_id}")
        return None if dry_run else upload(folder, destination, repo_type="model", message="Upload DRE-SLCL model")


def publish_dataset(
    dataset_dir: str | Path, destination: Destination, *, include_previews: bool = False, dry_run: bool = False
) -> Published | None:
    """Gathers, checks and uploads a slide dataset as it is.

    Args:
        dataset_dir (`str` or `Path`): folder written by `dre-slcl tiles`.
        destination (`Destination`): the dataset repository.
        include_previews (`bool`, defaults to `False`): also the pictures of the tile grids.
        dry_run (`bool`, defaults to `False`): stop before the upload; needs no network.

    Returns:
        `Published`, or `None` after a dry run.

    Raises:
        PublishError: if the dataset must not go out (every finding is named), or the Hub does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="dre-slcl-publish-") as temporary:
        folder = Path(temporary)
        gather_dataset(dataset_dir, folder, repo_id=destination.repo_id, include_previews=include_previews)
        _report(folder, check_dataset(folder), f"dataset {destination.repo_id}")
        if not destination.private:
            logger.warning("%s will be public, with its reports and case ids.", destination.repo_id)
        return None if dry_run else upload(folder, destination, repo_type="dataset", message="Upload slide dataset")


def publish_metric(metric: str | Path, destination: Destination, *, dry_run: bool = False) -> Published | None:
    """Gathers, checks and uploads a metric as a Space, from which `evaluate.load("namespace/name")` takes it.

    Args:
        metric (`str` or `Path`): the name of one of ours, such as "auroc", or the folder of another.
        destination (`Destination`): the Space; its name must be the metric's.
        dry_run (`bool`, defaults to `False`): stop before the upload; needs no network.

    Returns:
        `Published`, or `None` after a dry run.

    Raises:
        PublishError: if the metric must not go out (every finding is named), or the Hub does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="dre-slcl-publish-") as temporary:
        folder = Path(temporary)
        gather_metric(metric, folder, repo_id=destination.repo_id)
        _report(folder, check_metric(folder, repo_id=destination.repo_id), f"metric {destination.repo_id}")
        return None if dry_run else upload(folder, destination, repo_type="space", message="Upload metric")


def push_dataset_to_hub(
    dataset_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    include_previews: bool = False,
) -> Published:
    """Checks a slide dataset and publishes it with both configurations, `slides` and `tiles`.

    Args:
        dataset_dir (`str` or `Path`): folder written by `dre-slcl tiles`.
        repo_id (`str`): `namespace/name`; created if absent.
        private, revision, create_pr: see `Destination`.
        include_previews (`bool`, defaults to `False`): also the pictures of the tile grids.

    Returns:
        `Published`: with the commit hash to pin.

    Raises:
        PublishError: if the dataset must not go out (every finding is named), or the Hub does not take it.

    Example:

    ```python
    published = push_dataset_to_hub("dataset", "namespace/name", private=True)
    tiles = load_dataset("namespace/name", "tiles", revision=published.commit)
    ```
    """
    destination = Destination(repo_id, private=private, revision=revision, create_pr=create_pr)
    return publish_dataset(dataset_dir, destination, include_previews=include_previews)


def _report(folder: Path, findings: Sequence[Finding], what: str) -> None:
    """Writes what would go out, and stops if something must be mended first."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [f"{path.relative_to(folder)}  {path.stat().st_size} bytes" for path in files]
    sys.stdout.write("\n".join([f"{what}: {len(files)} files", *(f"  {line}" for line in lines), ""]))
    if findings:
        details = "; ".join(map(str, findings))
        raise PublishError(f"{what} must not be published yet, {len(findings)} findings: {details}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `dre-slcl publish`."""
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder with a saved model and its processor")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="folder of a slide dataset (`dre-slcl tiles`)")
    parser.add_argument("--metric", metavar="NAME|DIR", help="a metric, such as auroc; --repo NS/NAME is its Space")
    parser.add_argument("--repo", required=True, metavar="NS/NAME", help="repository on the Hub, created if absent")
    parser.add_argument("--dataset-repo", metavar="NS/NAME", help="repository of the dataset (default: as --repo)")
    parser.add_argument("--private", action="store_true", help="only members of the namespace may see it")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, created if absent (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--metrics", type=Path, metavar="JSON", help="numbers for the model card")
    parser.add_argument(
        "--results", type=Path, metavar="JSON", help="results.json of `dre-slcl evaluate`, for the card"
    )
    parser.add_argument("--results-dataset", metavar="NS/NAME", help="dataset on the Hub that --results are of")
    parser.add_argument("--data-statement", type=Path, metavar="MD", help="text on the training data for the card")
    parser.add_argument("--previews", action="store_true", help="also publish the dataset's preview pictures")
    parser.add_argument("--dry-run", action="store_true", help="gather and check only; no network")


def run(args: argparse.Namespace) -> int:
    """Publishes what the arguments name; returns the exit code (0 done, 1 failed, 2 wrong usage)."""
    if args.model is None and args.dataset is None and args.metric is None:
        logger.error("Nothing to publish: give --model, --dataset, or both; or --metric.")
        return 2
    if args.metric is not None and (args.model is not None or args.dataset is not None):
        logger.error("--metric goes to a Space of its own: publish it apart from --model and --dataset.")
        return 2
    try:
        published = _publish(args)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    for done in published:
        sys.stdout.write(f"{done.repo_type} {done.repo_id}: commit {done.commit}\n  {done.url}\n")
        if done.pull_request_url:
            sys.stdout.write(f"  pull request: {done.pull_request_url}\n")
    return 0


def _publish(args: argparse.Namespace) -> list[Published]:
    """Publishes the dataset first, so that a model's card never names a dataset that is not there."""

    def destination(repo_id: str) -> Destination:
        return Destination(repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr)

    if args.metric is not None:
        done = publish_metric(args.metric, destination(args.repo), dry_run=args.dry_run)
        return [] if done is None else [done]
    published, datasets = [], []
    material = {
        "metrics": None if args.metrics is None else read_json(args.metrics),
        "data_statement": None if args.data_statement is None else args.data_statement.read_text("utf-8"),
        "results": [] if args.results is None else read_results(args.results),
        "results_dataset": args.results_dataset,
    }
    if args.dataset is not None:
        where = destination(args.dataset_repo or args.repo)
        datasets = [where.repo_id]
        if args.model is not None and not args.dry_run:
            # A model that must not go out stops the dataset too, before anything is public.
            publish_model(args.model, destination(args.repo), datasets=datasets, dry_run=True, **material)
        published.append(publish_dataset(args.dataset, where, include_previews=args.previews, dry_run=args.dry_run))
    if args.model is not None:
        published.append(
            publish_model(args.model, destination(args.repo), datasets=datasets, dry_run=args.dry_run, **material)
        )
    return [done for done in published if done is not None]
