# SPDX-License-Identifier: Apache-2.0
"""Checks a folder before it goes to the Hub: no pickle, no memory bank, no trace of this machine, code that resolves.

Offline, and nothing in the folder is executed: code is parsed, safetensors headers are read. Every check returns
`Finding`s instead of raising, so that one run names everything there is to mend.
"""

import ast
import getpass
import json
import re
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".py", ".md", ".txt"})
RESULTS_FOLDER = ".eval_results"  # the one folder that a model repository has: results for the Hub, as YAML
_BANK_NAME = "memory_bank"
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
_FILE_MODE = 0o644

# A vocabulary holds whatever its corpus held, "/home" included, and says nothing about this machine.
_VOCABULARY_FILES = frozenset({"vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"})
_LOCAL_PATH = re.compile(
    r"(?<![\w./:~])(?:/(?:home|Users|root|tmp|mnt|media|data|var|opt|srv|scratch|work|workspace|private|gpfs|lustre|nfs"
    r"|etc|usr|storage|projects?|datasets?|content|kaggle)/[^\s\"'`)]+|~/[^\s\"'`)]+)"
    r"|\bfile://[^\s\"'`)]+|(?<![A-Za-z0-9])[A-Za-z]:[\\/](?![/\s])[^\s\"'`)]*|\\\\[\w.-]+\\[^\s\"'`)]+"
)
# A JSON value that is nothing but an absolute path, whatever its first folder is called.
_ABSOLUTE_PATH = re.compile(r"(?:/[\w.@+-]+){2,}/?")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# Account and host names that many machines share identify nobody.
_COMMON_NAMES = frozenset(
    {"root", "user", "admin", "ubuntu", "runner", "jovyan", "docker", "localhost", "nobody", "linux"}
)
_RELATIVE_IMPORT_LINE = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """Something that must be mended before publishing.

    Args:
        file (`str`): path of the file inside the folder.
        message (`str`): what was found, what is expected, and how to mend it.
    """

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def check_export(folder: str | Path, *, allowed_text: Sequence[str] = ()) -> list[Finding]:
    """Checks a model folder that is about to be published.

    Args:
        folder (`str` or `Path`): the flat folder: config.json, weights, code, processor files, README.md.
        allowed_text (`Sequence[str]`, defaults to `()`):
            Texts that are public anyway, such as the repository's id, whose namespace may be the account's name.

    Returns:
        `list[Finding]`: everything that must be mended, in the order of file names; empty if the folder may go out.
    """
    folder = Path(folder)
    findings: list[Finding] = []
    for path in sorted(folder.rglob("*")):
        findings += check_entry(path, folder, allowed_text)
    return findings + check_config(folder) + check_card(folder)


def check_entry(path: Path, folder: Path, allowed_text: Sequence[str]) -> list[Finding]:
    """Checks one directory entry by its kind, suffix, mode and content."""
    name = str(path.relative_to(folder))
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return [Finding(name, "expected a regular file; replace the link or special file by a copy")]
    is_result = path.parent == folder / RESULTS_FOLDER and path.suffix == ".yaml"
    if path.is_dir() and path != folder / RESULTS_FOLDER:
        return [Finding(name, "expected a flat folder; the loader finds code and weights only at the top")]
    if path.is_dir():
        return []
    if path.suffix not in ALLOWED_SUFFIXES and not is_result:
        allowed = " ".join(sorted(ALLOWED_SUFFIXES))
        return [Finding(name, f"suffix {path.suffix!r} is not published (allowed: {allowed}); remove the file")]
    findings = check_mode(path, name)
    if path.suffix == ".safetensors":
        return findings + check_safetensors(path, name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return [
            *findings,
            Finding(name, "expected UTF-8 text; it is binary or in another encoding (a renamed pickle?)"),
        ]
    if path.suffix == ".py":
        findings += check_code(path, text)
    return findings + check_text(path, name, text, allowed_text)


def check_mode(path: Path, name: str) -> list[Finding]:
    """Returns a finding if the file's mode is not 0644 (safetensors writes 0600)."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return [] if mode == _FILE_MODE else [Finding(name, f"file mode is {mode:04o}, expected 0644; run chmod 644")]


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Reads the header of a safetensors file (tensor name -> dtype, shape, data_offsets) and checks the file's extent.

    Raises:
        ValueError: if it is not one whole safetensors file, or if other data follows the tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError("not a safetensors file (header longer than the file); save it with safetensors")
        try:
            header = json.loads(handle.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a safetensors file (header: {error}); save it with safetensors") from error
    if 8 + length + end != size:
        raise ValueError(
            f"expected {8 + length + end} bytes by its header, found {size}; it is cut or carries other data"
        )
    return header


def check_safetensors(path: Path, name: str) -> list[Finding]:
    """Returns findings for a damaged file, for tensors of the memory bank, and for local paths in the metadata."""
    try:
        header = read_safetensors_header(path)
    except ValueError as error:
        return [Finding(name, str(error))]
    bank = sorted(key for key in header if _BANK_NAME in key)
    found = [Finding(name, f"holds memory-bank tensors ({', '.join(bank[:3])}): features of patients' tiles stay with "
                           "the training run; save with `model.save_pretrained`")] if bank else []  # fmt: skip
    metadata = header.get("__metadata__") or {}
    return found + [
        Finding(name, f"metadata {key!r} holds the local path {match.group()!r}; save without it")
        for key, value in metadata.items()
        if (match := _LOCAL_PATH.search(str(value)))
    ]


def check_code(path: Path, text: str) -> list[Finding]:
    """Returns findings for code that would not load from a flat folder in a process without this package."""
    name = path.name
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return [Finding(name, f"does not parse (line {error.lineno}: {error.msg})")]
    findings = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.level:
            module = node.module or ""
            if node.level > 1 or not module or "." in module:
                shown = "." * node.level + module
                findings.append(Finding(name, f"line {node.lineno}: `from {shown} import` does not load from the Hub; "
                                              "write `from .module import Name`"))  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        findings += [
            Finding(name, f"line {node.lineno}: imports the installed package {module!r}, absent on other machines; "
                          "import the neighbouring file relatively")
            for module in modules if module.split(".")[0] in {"modeling_dre_slcl", "dre_slcl"}
        ]  # fmt: skip
    return findings + [
        Finding(name, f"imports .{module}, but {module}.py is not in the folder; add it (a docstring line counts too)")
        for module in relative_imports(text)
        if not (path.parent / f"{module}.py").is_file()
    ]


def relative_imports(text: str) -> list[str]:
    """Returns the neighbours that code imports, found as transformers finds them: line by line, prose included."""
    return sorted({first or second for first, second in _RELATIVE_IMPORT_LINE.findall(text)})


def check_text(path: Path, name: str, text: str, allowed_text: Sequence[str] = ()) -> list[Finding]:
    """Returns findings for local paths, the account's and machine's names, and access tokens in a text file."""
    strings: list[tuple[str, str]] = [("", text)]
    if path.suffix == ".json":
        try:
            strings = list(_strings(_without_vocabulary(path.name, json.loads(text))))
        except json.JSONDecodeError as error:
            return [Finding(name, f"expected JSON ({error}); write it again")]
    findings = [Finding(name, "holds an access token; remove it and revoke the token")] if _TOKEN.search(text) else []
    if path.suffix == ".py" or path.name in _VOCABULARY_FILES:
        return findings
    for where, string in strings:
        for allowed in allowed_text:
            string = string.replace(allowed, "")
        if match := _LOCAL_PATH.search(string) or _ABSOLUTE_PATH.fullmatch(string):
            findings.append(Finding(name, f"{where}holds the local path {match.group()!r}; remove it"))
        findings += [
            Finding(name, f"{where}holds {private!r}, the name of this {kind}; remove it")
            for kind, private in _private_names()
            if re.search(rf"(?<!\w){re.escape(private)}(?!\w)", string)
        ]
    return findings


def _private_names() -> list[tuple[str, str]]:
    """Returns ("account" or "machine", name) of names that would identify who made the files."""
    try:
        account = getpass.getuser()
    except (KeyError, OSError):  # no entry for this user id, as in some containers
        account = ""
    host = socket.gethostname()
    names = {("account", account), ("machine", host), ("machine", host.split(".")[0])}
    return sorted(pair for pair in names if len(pair[1]) >= 4 and pair[1].lower() not in _COMMON_NAMES)


def _without_vocabulary(file_name: str, value: Any) -> Any:
    """Drops the vocabulary of a tokenizer file, which holds whatever its corpus held."""
    if file_name == "tokenizer.json" and isinstance(value, dict):
        return {key: entry for key, entry in value.items() if key not in {"model", "added_tokens"}}
    return value


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yields ("field a.b ", string) for every key and string inside a JSON value."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield f"{where}key ", key
            yield from _strings(entry, f"field {key!r} ")
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry, where)
    elif isinstance(value, str):
        yield where, value


def check_config(folder: Path) -> list[Finding]:
    """Returns findings if config.json does not lead to the classes that `AutoModel` and `pipeline` must find."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [Finding("config.json", "is missing; save the model with `save_pretrained` into this folder")]
    except (UnicodeDecodeError, json.JSONDecodeError):
        return []  # named already by `check_text`
    auto_map, pipelines = config.get("auto_map") or {}, config.get("custom_pipelines") or {}
    mend = "so the Hub cannot load the model; save it with `DreSlclModel.save_pretrained`"
    findings = [
        Finding("config.json", f"`auto_map` lacks {needed}, {mend}")
        for needed in ("AutoConfig", "AutoModel")
        if needed not in auto_map
    ]
    for path in sorted(folder.glob("*.json")):
        findings += _check_auto_map(path, folder)
    for task, entry in pipelines.items():
        findings += _check_reference(folder, "config.json", f"custom_pipelines[{task!r}].impl", entry.get("impl"))
        if not entry.get("pt"):
            findings.append(Finding("config.json", f"custom_pipelines[{task!r}].pt must name an Auto class"))
    if not list(folder.glob("*.safetensors")):
        findings.append(Finding("model.safetensors", "is missing; save the model with `save_pretrained`"))
    return findings


def _check_auto_map(path: Path, folder: Path) -> list[Finding]:
    """Checks every class reference of the `auto_map` of one JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return []
    auto_map = value.get("auto_map") if isinstance(value, dict) else None
    findings = []
    for auto_class, references in (auto_map or {}).items():
        for reference in references if isinstance(references, list) else [references]:
            if reference is not None:
                findings += _check_reference(folder, path.name, f"auto_map[{auto_class!r}]", reference)
    return findings


def _check_reference(folder: Path, file: str, field: str, reference: Any) -> list[Finding]:
    """Checks that a reference `module.Class` names a class of a file in the folder."""
    module, dot, class_name = str(reference).partition(".")
    if "--" in str(reference):
        return [
            Finding(file, f"{field} points to another repository ({reference}); save the model from local classes")
        ]
    code = folder / f"{module}.py"
    if not dot or not code.is_file():
        return [Finding(file, f"{field} is {reference!r}, but {module}.py is not in the folder; add it")]
    try:
        classes = {node.name for node in ast.parse(code.read_text("utf-8")).body if isinstance(node, ast.ClassDef)}
    except (SyntaxError, UnicodeDecodeError):
        return []  # named already by `check_code`
    return [] if class_name in classes else [Finding(file, f"{field}: {module}.py defines no class {class_name!r}")]


def check_card(folder: Path) -> list[Finding]:
    """Returns findings if README.md is absent, or lacks the metadata the Hub shows and filters by."""
    path = folder / "README.md"
    if not path.is_file():
        return [Finding("README.md", "is missing; a model is published with its card")]
    parts = path.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError as error:
        return [Finding("README.md", f"metadata is not YAML ({str(error).splitlines()[0]})")]
    if not isinstance(metadata, dict):
        return [Finding("README.md", "has no metadata block between two lines `---` at its top")]
    needed = ("license", "library_name", "pipeline_tag")
    return [Finding("README.md", f"metadata lacks `{key}`") for key in needed if not metadata.get(key)]
