"""What every kind of teacher promises, checked on all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distpc.config.teachers import PRETRAINED, TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError, TeacherError
from distpc.teachers import Teacher, build_teacher, load_teacher, teacher_kinds

from .cases import CASES, COLOUR, GREY, PATCH, TEXT, Case, samples

WITH_SPECS = [(case, spec) for case in CASES.values() for spec in case.specs]
# Nothing in them is trained or drawn, or their weights stay in the folder they were read from.
WEIGHTLESS = {"pixels", "onehot", *PRETRAINED}
IDS = [f"{name}-{spec.name}" for name, case in CASES.items() for spec in case.specs]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_spec = pytest.mark.parametrize(("case", "spec"), WITH_SPECS, ids=IDS)


def _others(teacher: Teacher, x: torch.Tensor, z: int) -> torch.Tensor:
    """x with every value of unit z changed."""
    variables = teacher.patch_variables[z] if hasattr(teacher, "patch_variables") else [z]
    other = x.clone()
    other[:, variables] = torch.where(other[:, variables] == 3, 12, 3)
    return other


def test_every_kind_is_in_the_battery() -> None:
    assert {case.build().kind for case in CASES.values()} == set(teacher_kinds())


@each_spec
def test_features_have_the_promised_form(case: Case, spec: DatasetSpec) -> None:
    teacher = case.build(spec)
    x = samples(spec, 5)
    features = teacher.encode(x)
    assert features.shape == (5, teacher.num_latents, teacher.feature_width)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.isfinite(features).all()
    assert features.std() > 0
    assert torch.equal(features, teacher.encode(x))
    assert teacher.encode(x[:0]).shape == (0, *features.shape[1:])
    assert torch.equal(features, teacher.encode(x.int()))
    if spec.has_missing and case.kind != "shuffled":
        assert (features[-1, x[-1] < 0] == 0).all()


@each_case
def test_it_says_what_it_is(case: Case) -> None:
    teacher = case.build()
    assert case.kind in teacher.name.split(":")[0]
    assert teacher.sees
    assert len(teacher.revision) == 16
    assert teacher.revision == case.build().revision
    assert (teacher.revision != case.build(seed=4).revision) == (
        case.is_random or case.kind == "shuffled"
    )


@each_case
def test_the_seed_decides(case: Case) -> None:
    x = samples(case.specs[0], 3)
    features = case.build(seed=3).encode(x)
    assert torch.equal(features, case.build(seed=3).encode(x))
    if case.is_random:
        assert not torch.equal(features, case.build(seed=4).encode(x))


@each_case
def test_features_see_what_they_say(case: Case) -> None:
    teacher = case.build()
    x = samples(case.specs[0], 2)[:1]
    before = teacher.encode(x)
    rows, columns = teacher.grid.rows, teacher.grid.columns
    for unit in range(teacher.num_latents):
        changed = (
            ((teacher.encode(_others(teacher, x, unit)) - before).abs() > 1e-6)
            .any(dim=2)
            .any(dim=0)
        )
        allowed = {z for z in range(rows * columns) if unit in case.sees(z, rows, columns)}
        found = set(changed.nonzero().flatten().tolist())
        assert found <= allowed
        if case.kind != "shuffled" and case.reaches_all:
            assert found == allowed


@each_case
def test_samples_are_encoded_one_by_one(case: Case) -> None:
    teacher = case.build()
    x = samples(case.specs[0], 6)
    together = teacher.encode(x)
    alone = torch.cat([teacher.encode(row[None]) for row in x])
    assert torch.allclose(together, alone, atol=1e-5)
    backwards = teacher.encode(x.flip(0)).flip(0)
    assert torch.allclose(together, backwards, atol=1e-5)
    pairs = torch.cat([teacher.encode(part) for part in x.split(4)])
    assert torch.allclose(together, pairs, atol=1e-5)


@each_spec
def test_saved_and_loaded_are_equal(case: Case, spec: DatasetSpec, tmp_path: Path) -> None:
    teacher = case.build(spec)
    teacher.save(tmp_path, training={"valid_mse": 0.5})
    loaded = load_teacher(tmp_path)
    x = samples(spec, 4)
    assert torch.equal(teacher.encode(x), loaded.encode(x))
    for fact in ("kind", "name", "revision", "sees", "settings", "spec", "grid", "feature_width"):
        assert getattr(loaded, fact) == getattr(teacher, fact), fact
    assert (tmp_path / "teacher.safetensors").exists() == bool(teacher.state_dict())
    described = json.loads((tmp_path / "teacher.json").read_text())
    assert described["training"] == {"valid_mse": 0.5}
    assert described["revision"] == teacher.revision


@each_case
def test_wrong_batches_are_refused(case: Case) -> None:
    spec = case.specs[0]
    teacher = case.build()
    x = samples(spec, 2)[:1]
    too_large, too_small = x.clone(), x.clone()
    too_large[0, 5] = spec.num_categories[5]
    too_small[0, 0] = -2 if spec.has_missing else -1
    for wrong in (x[:, :-1], x[0], x.float(), too_large, too_small):
        with pytest.raises(TeacherError) as caught:
            teacher.encode(wrong)
        assert caught.value.found and caught.value.expected and caught.value.fix


@each_case
def test_other_data_are_refused(case: Case) -> None:
    teacher = case.build()
    teacher.check_data(case.specs[0], PATCH)
    longer = DatasetSpec("longer", "text", 13, (256,) * 13, has_missing=True)
    for other in {GREY.name: GREY, COLOUR.name: COLOUR, TEXT.name: TEXT, "": longer}.values():
        if other != case.specs[0]:
            with pytest.raises(TeacherError, match="other data"):
                teacher.check_data(other, PATCH)
    if case.specs[0].kind == "image":
        with pytest.raises(TeacherError, match="other data"):
            teacher.check_data(case.specs[0], 2 * PATCH)


@each_case
def test_data_of_another_kind_are_refused(case: Case) -> None:
    real = DatasetSpec("real", "image", 64, (None,) * 64, image_shape=(8, 8, 1))
    with pytest.raises(TeacherError):
        case.build(real)
    if "random" in (case.kind, case.config.get("kind")):
        # The one control of both kinds of data.
        return
    with pytest.raises((ConfigError, TeacherError)):
        case.build(TEXT if case.specs[0].kind == "image" else GREY)


@each_case
def test_bad_weights_are_refused(case: Case, tmp_path: Path) -> None:
    teacher = case.build()
    assert bool(teacher.state_dict()) == (case.kind not in WEIGHTLESS)
    if case.kind in WEIGHTLESS:
        teacher.save(tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))
        return
    weights = tmp_path / "teacher.safetensors"
    teacher.save(tmp_path)
    whole = weights.read_bytes()
    for broken in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), None):
        if broken is None:
            weights.unlink()
        else:
            weights.write_bytes(broken)
        with pytest.raises(TeacherError, match="missing, cut or changed"):
            load_teacher(tmp_path)


@each_case
def test_bad_descriptions_are_refused(case: Case, tmp_path: Path) -> None:
    teacher = case.build()
    description = tmp_path / "teacher.json"
    teacher.save(tmp_path)
    facts = json.loads(description.read_text())
    for wrong in (
        {**facts, "settings": {"nonsense": 1}},
        {**facts, "kind": "nonsense"},
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


def test_weights_of_other_settings_are_refused(tmp_path: Path) -> None:
    CASES["mae-1"].build().save(tmp_path)
    description = tmp_path / "teacher.json"
    facts = json.loads(description.read_text())
    facts["settings"]["width"] = 32
    description.write_text(json.dumps(facts))
    with pytest.raises(TeacherError, match="do not fit"):
        load_teacher(tmp_path)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(TeacherError) as caught:
        build_teacher(TeacherConfig(kind="none"), GREY, 2, 0)
    assert "mae" in str(caught.value)


def test_shuffled_features_are_those_of_other_samples() -> None:
    case = CASES["shuffled-random"]
    teacher = case.build()
    bank = samples(GREY, 64, seed=9)
    own = teacher.inner.encode(bank)
    shuffled = teacher.encode(bank)
    # Every sample's features are those of one of the bank: as a rule not its own.
    givers = (shuffled[:, None] == own[None]).flatten(2).all(dim=2)
    assert (givers.sum(dim=1) == 1).all()
    assert givers.diagonal().sum() <= 5
    assert len(givers.int().argmax(dim=1).unique()) > 30
