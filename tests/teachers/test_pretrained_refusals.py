"""Folders of pretrained models that are missing, changed or of another kind are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distpc.config.teachers import TeacherConfig
from distpc.errors import TeacherError
from distpc.teachers import Teacher, build_teacher, load_teacher

from .cases import GREY, PATCH, TEXT
from .tiny_models import tiny


def build(kind: str, folder: Path | None, sees: str = "prefix", **pretrained: Any) -> Teacher:
    settings = {"folder": None if folder is None else str(folder), **pretrained}
    config = TeacherConfig.model_validate({"kind": kind, "sees": sees, "pretrained": settings})
    return build_teacher(config, TEXT if kind == "hf_text" else GREY, PATCH, 0)


def copied(name: str, to: Path) -> Path:
    return Path(shutil.copytree(tiny(name), to / name))


@pytest.mark.parametrize("kind", ["efficientnet", "hf_vision", "hf_text"])
def test_a_missing_folder_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="needs a model folder") as caught:
        build(kind, None)
    assert caught.value.where == "teacher.pretrained.folder"
    with pytest.raises(TeacherError, match="no model in the folder") as caught:
        build(kind, tmp_path / "nowhere")
    assert (caught.value.where, caught.value.found) == (str(tmp_path / "nowhere"), "no such folder")
    assert "tools/get_models.py" in str(caught.value)
    with pytest.raises(TeacherError, match="no model in the folder") as caught:
        build(kind, tmp_path)
    assert caught.value.found == "no config.json"


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("efficientnet", "vit", "another architecture"),
        ("hf_vision", "gpt2", "does not read images"),
        ("hf_text", "vit", "no plain text model"),
        ("hf_text", "lite0", "cannot read a model"),
    ],
)
def test_another_architecture_is_named(kind: str, model: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        build(kind, tiny(model), layer=0)
    assert str(tiny(model)) in str(caught.value.where)


def test_layers_and_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no such block") as caught:
        build("efficientnet", tiny("lite0"), layer=16)
    assert caught.value.found == "16"
    with pytest.raises(TeacherError, match="no such hidden layer") as caught:
        build("hf_text", tiny("gpt2"), layer=9)
    assert caught.value.found == "layer 9 of 3"
    with pytest.raises(TeacherError, match="does not see both"):
        build("hf_text", tiny("gpt2"), sees="both")
    folder = copied("lite0", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match="missing") as caught:
        build("efficientnet", folder, layer=4)
    assert caught.value.where == str(folder / "model.safetensors")
    (folder / "config.json").write_text("[]")
    with pytest.raises(TeacherError, match="no JSON object"):
        build("efficientnet", folder, layer=4)


def test_a_model_that_changed_under_its_teacher_is_refused(tmp_path: Path) -> None:
    folder, out = copied("gpt2", tmp_path), tmp_path / "teacher"
    build("hf_text", folder).save(out)
    load_teacher(out)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "another": 1}))
    with pytest.raises(TeacherError, match="missing or has changed") as caught:
        load_teacher(out)
    assert caught.value.where == str(folder)
    shutil.rmtree(folder)
    with pytest.raises(TeacherError, match="missing or has changed") as caught:
        load_teacher(out)
    assert caught.value.found == "no such folder"
