"""Imports run one way, heavy libraries stay where they belong, and `import distpc` is light."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distpc"
LAYERS = [
    {"errors"},
    {"config"},
    {"artifacts"},
    {"parallel"},
    {"data"},
    {"teachers"},
    {"latents"},
    {"structures"},
    {"circuits"},
    {"training"},
    {"inference"},
    {"pipeline"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {"deepspeed": "parallel/engine.py", "ray": "parallel/cluster.py"}
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
RANK_READERS = {"parallel/mesh.py", "parallel/launch.py", "parallel/rank.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    relative = file.relative_to(PACKAGE)
    if relative.name == "__init__.py" and len(relative.parts) == 1:
        return  # the package's own lazy index of public names
    names = imported(ast.parse(file.read_text()))
    own = LEVEL[relative.parts[0].removesuffix(".py")]
    for name in names:
        parts = name.split(".")
        if parts[0] == "distpc" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= own, f"{relative} imports {name}, which is above it"
        if parts[0] in ONLY_IN:
            assert str(relative) == ONLY_IN[parts[0]], f"{relative} imports {parts[0]}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_the_mesh_reads_rank_variables(file: Path) -> None:
    relative = str(file.relative_to(PACKAGE))
    if relative in RANK_READERS:
        return
    strings = {
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not strings & RANK_VARIABLES


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return {name.split(".")[0] for name in json.loads(result.stdout)}


def test_import_distpc_is_light() -> None:
    assert not modules_after("import distpc") & {"ray", "deepspeed", "torch", "pydantic"}


def test_mathematics_needs_torch_numpy_and_scipy_alone() -> None:
    loaded = modules_after("import distpc.circuits, distpc.structures, distpc.training.fit")
    assert "torch" in loaded
    assert not loaded & {"ray", "deepspeed", "webdataset", "pydantic", "tensorboard"}


def test_help_answers_at_once() -> None:
    begun = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "distpc", "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - begun < 2
    assert "examples:" in result.stdout and "inpaint" in result.stdout
