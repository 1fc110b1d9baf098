"""tools/get_data.py on packages made here: complete or absent, and nothing but the wanted files."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

CONTENT = {"a.txt": b"alpha", "b.txt": b"beta" * 100}


@pytest.fixture
def tool(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with one more recipe that needs no network."""
    spec = importlib.util.spec_from_file_location("get_data", repository / "tools/get_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "get_data", module)
    spec.loader.exec_module(module)
    module.RECIPES["toy"] = module.Recipe(
        "toy-package@1",
        lambda package, folder: archive(CONTENT),
        r"data/([a-z]+\.txt)",
        len(CONTENT),
        "0" * 64,
        "A toy.",
    )
    return module


def archive(files: dict[str, bytes]) -> tarfile.TarFile:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("data/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in [*(f"data/{name}" for name in files), "data/../../evil.txt", "install.sh"]:
            content = files.get(name.removeprefix("data/"), b"evil")
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    buffer.seek(0)
    return tarfile.open(fileobj=buffer)


def with_digest(tool: ModuleType, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for name, content in CONTENT.items():
        (good / name).write_bytes(content)
    digest = tool.folder_digest(good)
    tool.RECIPES["toy"] = dataclasses.replace(tool.RECIPES["toy"], digest=digest)


def test_complete_then_left_alone(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_digest(tool, tmp_path)
    assert tool.main(["toy", "--to", str(tmp_path / "sets")]) == 0
    target = tmp_path / "sets" / "toy"
    assert {file.name for file in target.iterdir()} == {"a.txt", "b.txt", "SOURCE"}
    assert (target / "b.txt").read_bytes() == CONTENT["b.txt"]
    assert [file.name for file in (tmp_path / "sets").iterdir()] == ["toy"]
    assert "2 files" in capsys.readouterr().out
    assert tool.main(["toy", "--to", str(tmp_path / "sets")]) == 0
    assert "already complete" in capsys.readouterr().out
    (target / "a.txt").write_bytes(b"alphA")
    assert tool.main(["toy", "--to", str(tmp_path / "sets")]) == 1
    assert "Remove that folder" in capsys.readouterr().err


def test_wrong_content_leaves_nothing(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["toy", "--to", str(tmp_path / "sets")]) == 1
    assert "holds other files than expected" in capsys.readouterr().err
    recipe = dataclasses.replace(tool.RECIPES["toy"], num_files=3)
    tool.RECIPES["toy"] = recipe
    assert tool.main(["toy", "--to", str(tmp_path / "sets")]) == 1
    assert "expected 3" in capsys.readouterr().err
    assert not list((tmp_path / "sets").iterdir())


def test_interrupted_leaves_nothing(tool: ModuleType, tmp_path: Path) -> None:
    def interrupted(package: str, folder: Path) -> tarfile.TarFile:
        (folder / "half").write_bytes(b"half a download")
        raise KeyboardInterrupt

    tool.RECIPES["toy"] = dataclasses.replace(tool.RECIPES["toy"], fetch=interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.main(["toy", "--to", str(tmp_path / "sets")])
    assert not list((tmp_path / "sets").iterdir())


def test_missing_client_and_unknown_name(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.RECIPES["toy"] = dataclasses.replace(
        tool.RECIPES["toy"], fetch=lambda package, folder: tool.run(["no-such-client"], folder)
    )
    assert tool.main(["toy", "--to", str(tmp_path / "sets")]) == 1
    assert "'no-such-client' is not installed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["cifar"])
    assert "fashion_mnist" in capsys.readouterr().err
