"""Teachers: models whose features of patches or tokens are clustered into values of latents."""

from distpc.teachers.base import Teacher
from distpc.teachers.files import load_teacher
from distpc.teachers.registry import build_teacher, teacher_kinds

__all__ = ["Teacher", "build_teacher", "load_teacher", "teacher_kinds"]
