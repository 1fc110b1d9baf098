"""All kinds of teacher, by the name that `teacher.kind` calls them."""

from __future__ import annotations

from importlib import import_module

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError
from distpc.teachers.base import Teacher

# A new kind of teacher is one line here; its module is imported when it is asked for.
_KINDS = {
    "aligned": "distpc.teachers.aligned:AlignedTeacher",
    "causal_lm": "distpc.teachers.language:CausalLanguageModel",
    "data2vec": "distpc.teachers.data2vec:SelfDistilled",
    "efficientnet": "distpc.teachers.efficientnet:EfficientNetTeacher",
    "hf_text": "distpc.teachers.hf_text:LanguageTeacher",
    "hf_vision": "distpc.teachers.hf_vision:VisionTeacher",
    "mae": "distpc.teachers.mae:MaskedAutoencoder",
    "masked_lm": "distpc.teachers.language:MaskedLanguageModel",
    "onehot": "distpc.teachers.onehot:OneHotTeacher",
    "pixels": "distpc.teachers.pixels:PixelTeacher",
    "random": "distpc.teachers.random:RandomTeacher",
    "random_text": "distpc.teachers.random_text:RandomTextTeacher",
    "shuffled": "distpc.teachers.shuffled:ShuffledTeacher",
    "vae": "distpc.teachers.vae:VariationalAutoencoder",
    "vqvae": "distpc.teachers.vqvae:VectorQuantised",
}


def teacher_kinds() -> tuple[str, ...]:
    """Names of all kinds of teacher."""
    return tuple(_KINDS)


def teacher_class(kind: str) -> type[Teacher]:
    """The class of a kind of teacher.

    Raises:
        TeacherError: there is no such kind.
    """
    if kind not in _KINDS:
        raise TeacherError(
            "unknown kind of teacher",
            where="teacher.kind",
            found=kind,
            expected=f"one of {', '.join(_KINDS)}",
        )
    module, name = _KINDS[kind].split(":")
    found: type[Teacher] = getattr(import_module(module), name)
    return found


def build_teacher(config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int) -> Teacher:
    """A fresh (untrained) teacher of the configured kind.

    Raises:
        TeacherError: unknown kind, or data that teachers do not read.
    """
    return teacher_class(config.kind).from_config(config, spec, patch_size, seed)
