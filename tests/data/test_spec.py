"""dataset.json both ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from distpc.data.spec import DatasetSpec
from distpc.errors import ArtifactError

SPECS = [
    DatasetSpec("a", "image", 12, (256, 512, 512) * 4, image_shape=(2, 2, 3), color="ycocg_r"),
    DatasetSpec("b", "array", 2, (3, None), columns=("x", "y"), has_missing=True),
    DatasetSpec("c", "text", 4, (256,) * 4),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_round_trip(tmp_path: Path, spec: DatasetSpec) -> None:
    spec.save(tmp_path)
    assert DatasetSpec.load(tmp_path) == spec


def test_kinds_and_units() -> None:
    assert [spec.is_discrete for spec in SPECS] == [True, False, True]
    assert [spec.unit for spec in SPECS] == ["bpd", "bpd", "bpc"]


@pytest.mark.parametrize("change", [{"more": 1}, {"columns": None}])
def test_other_fields_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="other fields"):
        DatasetSpec.from_json({**SPECS[1].to_json(), **change})
    with pytest.raises(ArtifactError, match="other fields"):
        DatasetSpec.from_json({"name": "a"})
