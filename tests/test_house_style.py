# SPDX-License-Identifier: Apache-2.0
"""House rules that the linter does not know: short files and functions, docstrings, annotations, banned calls."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("modeling_dre_slcl", "training", "hub")
SHIPPED = sorted([ROOT / "dre_slcl_cli.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70  # without the docstring
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# What could run foreign code, or tear a file that a crash meets.
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "torch.save", "torch.load", "yaml.load", "yaml.unsafe_load"}
BANNED_CALLS |= {"os.system", "os.popen", "pandas.read_pickle", "pd.read_pickle"}
BANNED_METHODS = {"save_state", "load_state"}  # of Accelerator: not atomic, and pickles
BANNED_OPTIONS = {"allow_pickle", "shell", "trust_remote_code"}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def body_lines(function):
    docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    docstring_lines = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring_lines


def banned(tree):
    """Yields (line, what) for everything in a module that must not be there."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            yield from ((node.lineno, name) for name in modules if name.split(".")[0] in BANNED_MODULES)
            if isinstance(node, ast.ImportFrom):  # under its own name a call could not be told
                given = [f"{node.module}.{item.name}" for item in node.names]
                yield from ((node.lineno, name) for name in given if name in BANNED_CALLS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = [ast.unparse(option) for option in node.keywords]
            # `torch.load` reads plain tensors only if it is told so.
            is_safe_load = name == "torch.load" and "weights_only=True" in options
            if (name in BANNED_CALLS and not is_safe_load) or name.split(".")[-1] in BANNED_METHODS:
                yield node.lineno, name
            yield from (
                (node.lineno, text) for text in options if text.startswith("weights_only=") and not is_safe_load
            )
            for option in node.keywords:
                if option.arg == "use_safetensors" and ast.unparse(option.value) != "True":
                    yield node.lineno, f"use_safetensors={ast.unparse(option.value)}"
                if option.arg in BANNED_OPTIONS and ast.unparse(option.value) not in ("False", "None"):
                    yield node.lineno, f"{option.arg}={ast.unparse(option.value)}"


def public(tree):
    """Yields public functions and classes, and the public methods of public classes."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_a_shipped_file_keeps_the_house_rules(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    tree = parse(path)
    assert ast.get_docstring(tree)
    assert list(banned(tree)) == []
    for node in public(tree):
        assert ast.get_docstring(node), f"{node.name}: no docstring"
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            assert body_lines(node) <= MAX_FUNCTION_LINES, f"{node.name}: {body_lines(node)} lines"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
            bare = [item.arg for item in arguments if item.annotation is None and item.arg not in ("self", "cls")]
            assert not bare, f"{node.name}: {bare} not annotated"
            assert node.returns is not None, f"{node.name}: result not annotated"


@pytest.mark.parametrize(
    "code",
    [
        *(
            "from torch import load",
            "from yaml import load as read",
            "compile(text, name, 'exec')",
            "__import__(name)",
        ),
        *("pd.read_pickle(path)", "AutoModel.from_pretrained(name, use_safetensors=False)"),
        *("import pickle", "from joblib import load", "torch.save(x, path)", "eval(text)", "os.system('ls')"),
        *("torch.load(path)", "torch.load(path, weights_only=flag)", "read(path, weights_only=False)"),
        *("np.load(path, allow_pickle=True)", "yaml.load(text)", "subprocess.run(line, shell=True)"),
        *("accelerator.save_state(path)", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
    ],
)
def test_the_rules_would_notice(code):
    assert list(banned(ast.parse(code)))
    assert not list(banned(ast.parse("AutoModel.from_pretrained(name, trust_remote_code=False); load_file(path)")))
