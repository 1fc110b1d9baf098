"""Files of tensors are whole or absent, and a full disk is told as such by all who write them."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distpc.artifacts.tensors import read_tensors, write_tensors
from distpc.circuits import Circuit, save_model
from distpc.config.schema import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.errors import ArtifactError, LatentError, ResourceError
from distpc.inference.tables import write_npy
from distpc.latents.codebook import Codebook, write_codebook
from distpc.structures.region_graph import Region, RegionGraph
from distpc.teachers import build_teacher
from distpc.teachers.checkpoint import TrainingState, save_checkpoint


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writes beyond this size fail as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_model(folder: Path) -> None:
    regions = (
        Region("input", 50, variable=0),
        Region("sum", 1, (0,)),
    )
    save_model(Circuit(RegionGraph(regions, 1), [100]), folder, dataset={}, training={})


def write_teacher(folder: Path) -> None:
    spec = DatasetSpec("grey", "image", 64, (17,) * 64, image_shape=(8, 8, 1))
    build_teacher(TeacherConfig(kind="random"), spec, 4, 0).save(folder)


def write_checkpoint(folder: Path) -> None:
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    save_checkpoint(folder / "latest.safetensors", model, optimizer, TrainingState(1), "f")


def write_latents(folder: Path) -> None:
    write_codebook(folder / "centroids.safetensors", Codebook(torch.zeros(40, 40)), {})


def write_table(folder: Path) -> None:
    write_npy(folder / "rows.npy", torch.zeros(40, 40).numpy())


@pytest.mark.parametrize(
    "write", [write_model, write_teacher, write_checkpoint, write_latents, write_table]
)
def test_a_full_disk_is_a_resource_error(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with largest_file(1000), pytest.raises(ResourceError, match="no space left"):
        write(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    write(tmp_path / "out")
    assert all(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_round_trip_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.ones(2, requires_grad=True)}
    facts = {"step": 3, "nested": {"x": [1, None]}}
    size = write_tensors(tmp_path / "deep" / "a", tensors, facts)
    write_tensors(tmp_path / "b", tensors, facts)
    assert (tmp_path / "deep" / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "b").stat().st_size == size
    found, noted = read_tensors(tmp_path / "b")
    assert noted == facts and found.keys() == tensors.keys()
    assert torch.equal(found["a"], tensors["a"]) and torch.equal(found["b"], tensors["b"].detach())


def test_files_of_others_have_no_facts(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a", metadata={"distpc": "no JSON"})
    save_file({"a": torch.zeros(1)}, tmp_path / "b")
    write_tensors(tmp_path / "c", {"a": torch.zeros(1)})
    for name in "abc":
        assert read_tensors(tmp_path / name)[1] == {}


@pytest.mark.parametrize("size", [0, 5, 60, -1, None])
def test_cut_and_foreign_files_are_refused(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(30)})
    path.write_bytes(b"PK\x03\x04 something else" if size is None else path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match="cut or damaged") as caught:
        read_tensors(path)
    assert "a.safetensors" in str(caught.value)
    with pytest.raises(LatentError, match="a file of codes is cut"):
        read_tensors(path, holds="codes", error=LatentError)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        read_tensors(tmp_path / "none")
    with pytest.raises(ArtifactError):
        read_tensors(tmp_path)


def test_importing_needs_neither_pydantic_nor_safetensors() -> None:
    code = (
        "import sys, distpc.artifacts.tensors;"
        "sys.exit(bool({'pydantic', 'safetensors', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
