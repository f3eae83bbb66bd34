"""What imports what: lazily at the top, one way below, and no private names of others."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cbd_hf


ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "cbd_hf").rglob("*.py"))
LARGEST = 25_000
# Reports what is loaded, and fails at the first use of a socket.
PROBE = """
import json, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("the network was used")
socket.socket = socket.getaddrinfo = socket.create_connection = refuse
{code}
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere when it runs; each name of a `from` import by itself."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_graph() -> dict[str, set[str]]:
    modules = {module_name(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        used = set()
        for imported in imports(path):
            # The longest prefix that is a module: `from cbd_hf.layout import Shape` uses cbd_hf.layout.
            while imported and imported not in modules:
                imported = imported.rpartition(".")[0]
            if imported:
                used.add(imported)
        graph[name] = used - {name}
    return graph


@pytest.mark.parametrize(
    "code",
    [
        "import cbd_hf; cbd_hf.__version__; dir(cbd_hf)",
        "from cbd_hf.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from cbd_hf.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass",
    ],
    ids=["import", "help", "version"],
)
def test_light_start(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    heavy = {"accelerate", "datasets", "huggingface_hub", "numpy", "peft", "torch", "transformers", "trl", "yaml"}
    assert not heavy & set(loaded)


def test_public_names() -> None:
    assert cbd_hf.__all__ == sorted(cbd_hf.__all__) and set(cbd_hf.__all__) == set(cbd_hf._MODULES)
    for name in cbd_hf.__all__:
        assert getattr(cbd_hf, name).__module__.startswith("cbd_hf."), name
        assert name in dir(cbd_hf)
    with pytest.raises(AttributeError, match="no_such_name"):
        cbd_hf.no_such_name  # noqa: B018


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_all_names_exist(path: Path) -> None:
    if path.name == "__main__.py":
        return
    module = importlib.import_module(module_name(path))
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)


def test_no_cycles() -> None:
    try:
        TopologicalSorter(module_graph()).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    "lower", ["chain", "layout", "transforms", "initializers", "sizing", "checkpoint", "modeling"]
)
def test_one_way(lower: str) -> None:
    """Not even through something else: chains and models are below everything that trains or measures."""
    upper = ("cbd_hf.distillation", "cbd_hf.evaluation", "cbd_hf.commands", "cbd_hf.data", "cbd_hf.cli")
    graph = module_graph()
    pending = [name for name in graph if name == f"cbd_hf.{lower}" or name.startswith(f"cbd_hf.{lower}.")]
    assert pending
    seen = set(pending)
    while pending:
        for used in graph[pending.pop()] - seen:
            assert not used.startswith(upper), used
            seen.add(used)
            pending.append(used)


def test_tokenization_knows_no_trainer() -> None:
    upper = ("cbd_hf.distillation", "cbd_hf.evaluation", "cbd_hf.commands", "cbd_hf.cli")
    for name, used in module_graph().items():
        if name.startswith("cbd_hf.tokenization"):
            assert not [other for other in used if other.startswith(upper)], name


@pytest.mark.parametrize("package", ["evaluation", "report"])
def test_only_public_names(package: str) -> None:
    for path in (ROOT / "cbd_hf" / package).rglob("*.py"):
        for imported in imports(path):
            if imported.startswith("cbd_hf."):
                assert not any(part.startswith("_") for part in imported.split(".")), f"{path}: {imported}"


def test_trl_internals_in_one_place() -> None:
    for path in SOURCES:
        if path.name == "_trl.py":
            continue
        for imported in imports(path):
            parts = imported.split(".")
            # `from trl import SFTTrainer` is `trl.SFTTrainer`; anything deeper is not exported.
            assert parts[0] != "trl" or len(parts) <= 2, f"{path}: {imported}"
            assert parts[:2] != ["trl", "experimental"], path


def test_file_sizes() -> None:
    large = {str(path): path.stat().st_size for path in SOURCES if path.stat().st_size > LARGEST}
    assert not large
