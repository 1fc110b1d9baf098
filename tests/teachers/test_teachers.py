"""What every kind of teacher promises, checked on all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distpc.config.schema import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError, TeacherError
from distpc.teachers import Teacher, build_teacher, load_teacher, teacher_kinds

NEIGHBOURHOODS = {"pixels": (1,), "random": (1,), "mae": (1, 3)}
CASES = [(kind, side) for kind in teacher_kinds() for side in NEIGHBOURHOODS[kind]]
IMAGES = {
    "grey": DatasetSpec("grey", "image", 8 * 12, (17,) * 96, image_shape=(8, 12, 1)),
    "ycocg_r": DatasetSpec(
        "colour", "image", 192, (256, 512, 512) * 64, image_shape=(8, 8, 3), color="ycocg_r"
    ),
}


def _teacher(kind: str, side: int, spec: DatasetSpec, seed: int = 3) -> Teacher:
    mae = {"width": 16, "num_heads": 2, "feature_width": 5, "neighbourhood": side}
    config = TeacherConfig.model_validate({"kind": kind, "mae": mae, "random_width": 7})
    return build_teacher(config, spec, 2, seed).eval()


def _images(spec: DatasetSpec, num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([count for count in spec.num_categories if count is not None])
    return (torch.rand(num, spec.num_variables, generator=generator) * sizes).long()


def test_every_kind_is_in_the_battery() -> None:
    assert set(NEIGHBOURHOODS) == set(teacher_kinds())


@pytest.mark.parametrize("data", IMAGES)
@pytest.mark.parametrize(("kind", "side"), CASES)
def test_features_have_the_promised_form(kind: str, side: int, data: str) -> None:
    spec = IMAGES[data]
    teacher = _teacher(kind, side, spec)
    x = _images(spec, 5)
    features = teacher.encode(x)
    assert features.shape == (5, teacher.grid.num_patches, teacher.feature_width)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.isfinite(features).all()
    assert features.std() > 0
    assert torch.equal(features, teacher.encode(x))
    assert teacher.encode(x[:0]).shape == (0, *features.shape[1:])
    assert torch.equal(features, teacher.encode(x.int()))


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_the_seed_decides(kind: str, side: int) -> None:
    spec = IMAGES["grey"]
    x = _images(spec, 3)
    features = _teacher(kind, side, spec, seed=3).encode(x)
    assert torch.equal(features, _teacher(kind, side, spec, seed=3).encode(x))
    if kind != "pixels":
        assert not torch.equal(features, _teacher(kind, side, spec, seed=4).encode(x))


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_features_see_their_neighbourhood_only(kind: str, side: int) -> None:
    spec = IMAGES["grey"]
    teacher = _teacher(kind, side, spec)
    x = _images(spec, 2)
    before = teacher.encode(x)
    grid = teacher.grid
    index = torch.from_numpy(grid.variables())
    for patch in range(grid.num_patches):
        other = x.clone()
        other[:, index[patch]] = 16 - other[:, index[patch]] // 2
        changed = (teacher.encode(other) != before).any(dim=2).all(dim=0)
        row, column = divmod(patch, grid.columns)
        near = [
            abs(z // grid.columns - row) <= side // 2
            and abs(z % grid.columns - column) <= side // 2
            for z in range(grid.num_patches)
        ]
        assert changed.tolist() == near


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_images_are_encoded_one_by_one(kind: str, side: int) -> None:
    spec = IMAGES["grey"]
    teacher = _teacher(kind, side, spec)
    x = _images(spec, 6)
    together = teacher.encode(x)
    alone = torch.cat([teacher.encode(row[None]) for row in x])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("data", IMAGES)
@pytest.mark.parametrize(("kind", "side"), CASES)
def test_saved_and_loaded_are_equal(kind: str, side: int, data: str, tmp_path: Path) -> None:
    spec = IMAGES[data]
    teacher = _teacher(kind, side, spec)
    teacher.save(tmp_path, training={"valid_mse": 0.5})
    loaded = load_teacher(tmp_path)
    x = _images(spec, 4)
    assert torch.equal(teacher.encode(x), loaded.encode(x))
    assert (loaded.kind, loaded.settings) == (teacher.kind, teacher.settings)
    assert (loaded.spec, loaded.grid) == (spec, teacher.grid)
    assert (tmp_path / "teacher.safetensors").exists() == (kind != "pixels")
    assert json.loads((tmp_path / "teacher.json").read_text())["training"] == {"valid_mse": 0.5}


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_wrong_batches_are_refused(kind: str, side: int) -> None:
    spec = IMAGES["grey"]
    teacher = _teacher(kind, side, spec)
    x = _images(spec, 2)
    too_large, missing = x.clone(), x.clone()
    too_large[1, 5] = 17
    missing[0, 0] = -1
    for wrong in (x[:, :-1], x[0], x.float(), too_large, missing):
        with pytest.raises(TeacherError) as caught:
            teacher.encode(wrong)
        assert caught.value.found and caught.value.expected and caught.value.fix


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_other_data_are_refused(kind: str, side: int) -> None:
    teacher = _teacher(kind, side, IMAGES["grey"])
    teacher.check_data(IMAGES["grey"], 2)
    with pytest.raises(TeacherError, match="other data"):
        teacher.check_data(IMAGES["ycocg_r"], 2)
    with pytest.raises(TeacherError, match="other data"):
        teacher.check_data(IMAGES["grey"], 4)


@pytest.mark.parametrize("kind", teacher_kinds())
def test_data_without_patches_are_refused(kind: str) -> None:
    real = DatasetSpec("real", "image", 64, (None,) * 64, image_shape=(8, 8, 1))
    with pytest.raises(TeacherError, match="discrete"):
        _teacher(kind, 1, real)
    with pytest.raises(ConfigError, match="images"):
        _teacher(kind, 1, DatasetSpec("words", "text", 32, (256,) * 32))


@pytest.mark.parametrize("kind", [kind for kind in teacher_kinds() if kind != "pixels"])
def test_bad_weights_are_refused(kind: str, tmp_path: Path) -> None:
    teacher = _teacher(kind, 1, IMAGES["grey"])
    weights, description = tmp_path / "teacher.safetensors", tmp_path / "teacher.json"

    teacher.save(tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(TeacherError, match="missing, cut or changed"):
        load_teacher(tmp_path)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(TeacherError, match="missing, cut or changed"):
        load_teacher(tmp_path)
    weights.unlink()
    with pytest.raises(TeacherError, match="missing, cut or changed"):
        load_teacher(tmp_path)

    teacher.save(tmp_path)
    facts = json.loads(description.read_text())
    other = {**facts["settings"]}
    other["width"] = 32
    for wrong in (
        {**facts, "settings": other},
        {**facts, "settings": {"nonsense": 1}},
        {**facts, "kind": "vqvae"},
        {**facts, "format_version": 2},
        {key: value for key, value in facts.items() if key != "settings"},
    ):
        description.write_text(json.dumps(wrong))
        with pytest.raises(TeacherError):
            load_teacher(tmp_path)
    description.write_text("{")
    with pytest.raises(TeacherError, match="cannot be read"):
        load_teacher(tmp_path)
    description.unlink()
    with pytest.raises(TeacherError, match="cannot be read"):
        load_teacher(tmp_path)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(TeacherError) as caught:
        build_teacher(TeacherConfig(kind="none"), IMAGES["grey"], 2, 0)
    assert "mae" in str(caught.value)
