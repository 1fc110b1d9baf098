"""Teachers made of another, finished teacher, whose features they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError
from distpc.teachers.base import Grid, Teacher
from distpc.teachers.registry import teacher_class


class WrappedTeacher(Teacher):
    """Base of teachers that hold another one as `inner`.

    Args:
        spec: the data set.
        patch_size: side of a patch in pixels; without meaning for text.
        inner_kind: kind of the other teacher.
        inner_settings: its settings.
    """

    made_by = ""
    """The field that makes such a teacher, and its value, in words."""

    def __init__(
        self, spec: DatasetSpec, patch_size: int, *, inner_kind: str, inner_settings: dict[str, Any]
    ) -> None:
        make: Callable[..., Teacher] = teacher_class(inner_kind)
        inner = make(spec, patch_size, **inner_settings)
        super().__init__(spec, inner.grid)
        self.inner = inner

    @classmethod
    def around(cls, inner: Teacher, **own_settings: Any) -> Self:
        """One that holds `inner` itself, with its weights."""
        wrapped = cls(
            inner.spec,
            inner.grid.size,
            inner_kind=inner.kind,
            inner_settings=inner.settings,
            **own_settings,
        )
        wrapped.inner = inner
        return wrapped

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> Self:
        """Refused: it needs a finished teacher."""
        raise TeacherError(
            f"a teacher of kind '{cls.kind}' is made of another one",
            where="teacher.kind",
            fix=f"set teacher.kind to the teacher wanted, and {cls.made_by}",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The inner teacher's kind and settings."""
        return {"inner_kind": self.inner.kind, "inner_settings": self.inner.settings}

    def present(self, x: Tensor) -> Tensor | None:
        """Of the sample itself, whatever the inner teacher is shown in its place."""
        return self.inner.present(x)

    @property
    def grid(self) -> Grid:
        """That of the inner teacher."""
        return self.inner.grid

    @property
    def feature_width(self) -> int:
        """D of the inner teacher."""
        return self.inner.feature_width
