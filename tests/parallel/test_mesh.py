import pytest
import torch

from distpc.parallel.mesh import Mesh, is_main_process, is_rank


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    mesh = Mesh.from_environment()
    assert not is_rank()
    assert is_main_process()
    assert (mesh.rank, mesh.world_size, mesh.local_rank, mesh.is_main) == (0, 1, 0, True)
    assert mesh.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_launcher_describes_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    mesh = Mesh.from_environment()
    assert is_rank()
    assert not is_main_process()
    assert (mesh.rank, mesh.world_size, mesh.local_rank, mesh.is_main) == (3, 4, 0, False)
