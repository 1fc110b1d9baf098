"""Stage `teacher`: train one, or write a pretrained one or a control."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from distpc.artifacts.stage import StageContext
from distpc.config.schema import RunConfig
from distpc.config.teachers import PRETRAINED
from distpc.data.index import ShardIndex
from distpc.data.reader import iterate_split
from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError
from distpc.parallel.launch import run_ranks
from distpc.parallel.mesh import Mesh, is_main_process
from distpc.teachers.aligned import AlignedTeacher
from distpc.teachers.checkpoint import checkpoint_path
from distpc.teachers.files import load_teacher, read_description
from distpc.teachers.pretrained import folder_digest, model_folder
from distpc.teachers.registry import build_teacher
from distpc.teachers.shuffled import ShuffledTeacher


def run(ctx: StageContext) -> None:
    """Write teacher.json and, for kinds with weights, teacher.safetensors into `ctx.out`.

    Records kind, name, revision, sees, feature_width, num_parameters, seconds and, for a trained
    teacher, its figure on the validation split (`valid_mse`, `valid_bpd` or `valid_bpt`), that of
    the best constant prediction (`variance` or `constant`) and explained = 1 - figure / constant.
    Of the autoencoders with a likelihood the figure is a bound; see their modules.
    """
    if not _is_finished(ctx):
        if ctx.config.teacher.training is not None:
            run_ranks(
                "distpc.teachers.train:train_rank",
                ctx.to_json(),
                num_ranks=ctx.config.parallel.total_ranks,
                threads_per_rank=ctx.config.parallel.threads_per_rank,
                log_folder=ctx.out / "logs",
                join_seconds=ctx.config.parallel.join_seconds,
                lost_seconds=ctx.config.parallel.lost_seconds,
                collective_seconds=ctx.config.parallel.collective_seconds,
            )
        elif is_main_process():
            _save_control(ctx)
    if is_main_process():
        if ctx.config.teacher.state != "token":
            _align(ctx)
        if ctx.config.teacher.shuffle_samples:
            _shuffle(ctx)
        shutil.rmtree(checkpoint_path(ctx.out).parent, ignore_errors=True)
    description = read_description(ctx.out)
    for name in ("kind", "name", "revision", "sees", "feature_width", "num_parameters"):
        ctx.metadata[name] = description[name]
    ctx.metadata.update(description["training"])
    del ctx.metadata["fingerprint"]


def model_identity(config: RunConfig, folder: Path) -> str | None:
    """Digest of a pretrained model's files; none for other kinds.

    Raises:
        TeacherError: there is no model where one is configured.
    """
    if config.teacher.kind not in PRETRAINED:
        return None
    return folder_digest(model_folder(config.teacher.pretrained))


def train_rank(payload: dict[str, Any], mesh: Mesh) -> None:
    """Train the teacher as one of R ranks; `payload` is a StageContext's JSON."""
    # The trainer imports DeepSpeed, which takes seconds: only ranks pay for that.
    from distpc.teachers.trainer import TeacherTrainer

    TeacherTrainer(StageContext.from_json(payload), mesh).train()


def _save_control(ctx: StageContext) -> None:
    started = time.monotonic()
    spec = DatasetSpec.load(ctx.input("shards").path)
    patch_size = ctx.config.data.patch_size_pixels
    teacher = build_teacher(ctx.config.teacher, spec, patch_size, ctx.config.seed)
    seconds = round(time.monotonic() - started, 3)
    teacher.save(ctx.out, training={"fingerprint": ctx.fingerprint, "seconds": seconds})


def _align(ctx: StageContext) -> None:
    """Put the aligned teacher in place of the finished one, unless that was done."""
    teacher = load_teacher(ctx.out)
    if not isinstance(teacher, AlignedTeacher | ShuffledTeacher):
        training = read_description(ctx.out)["training"]
        AlignedTeacher.wrap(teacher, ctx.config.teacher.state).save(ctx.out, training)


def _shuffle(ctx: StageContext) -> None:
    """Put the shuffled control in place of the finished teacher, unless that was done."""
    teacher = load_teacher(ctx.out)
    if isinstance(teacher, ShuffledTeacher):
        return
    training = read_description(ctx.out)["training"]
    index = ShardIndex.load(ctx.input("index").path)
    num_samples = ctx.config.teacher.shuffle_num_samples
    first = next(iterate_split(index, teacher.spec, "train", num_samples))
    bank = torch.from_numpy(first).long()
    ShuffledTeacher.wrap(teacher, bank, ctx.config.seed).save(ctx.out, training)


def _is_finished(ctx: StageContext) -> bool:
    """Whether an attempt that was interrupted later had already written this very teacher."""
    try:
        load_teacher(ctx.out)
        return bool(read_description(ctx.out)["training"].get("fingerprint") == ctx.fingerprint)
    except TeacherError:
        return False
