"""Teachers: models whose patch features are clustered into values of the patch latents."""

from distpc.teachers.base import Teacher, build_teacher, load_teacher, teacher_kinds

__all__ = ["Teacher", "build_teacher", "load_teacher", "teacher_kinds"]
