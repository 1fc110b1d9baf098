"""Stage `teacher`: train the masked autoencoder, or write one of the controls."""

from __future__ import annotations

import shutil
import time
from typing import Any

from distpc.artifacts.stage import StageContext
from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError
from distpc.parallel.launch import run_ranks
from distpc.parallel.mesh import Mesh, is_main_process
from distpc.teachers.base import build_teacher, load_teacher, read_description
from distpc.teachers.checkpoint import checkpoint_path


def run(ctx: StageContext) -> None:
    """Write teacher.json and, for kinds with weights, teacher.safetensors into `ctx.out`.

    Records kind, feature_width, num_parameters, seconds and, for a trained teacher, valid_mse
    (over all patches, half of the masking range hidden), variance (of the validation values about
    their means: the error of the best constant image) and explained = 1 - valid_mse / variance.
    """
    if not _is_finished(ctx):
        if ctx.config.teacher.kind == "mae":
            run_ranks(
                "distpc.teachers.train:train_rank",
                ctx.to_json(),
                num_ranks=ctx.config.parallel.num_ranks,
                threads_per_rank=ctx.config.parallel.threads_per_rank,
                log_folder=ctx.out / "logs",
                join_seconds=ctx.config.parallel.join_seconds,
            )
        elif is_main_process():
            _save_control(ctx)
    if is_main_process():
        shutil.rmtree(checkpoint_path(ctx.out).parent, ignore_errors=True)
    description = read_description(ctx.out)
    for name in ("kind", "feature_width", "num_parameters"):
        ctx.metadata[name] = description[name]
    ctx.metadata.update(description["training"])
    del ctx.metadata["fingerprint"]


def train_rank(payload: dict[str, Any], mesh: Mesh) -> None:
    """Train the masked autoencoder as one of R ranks; `payload` is a StageContext's JSON."""
    # The trainer imports DeepSpeed, which takes seconds: only ranks pay for that.
    from distpc.teachers.trainer import MaeTrainer

    MaeTrainer(StageContext.from_json(payload), mesh).train()


def _save_control(ctx: StageContext) -> None:
    started = time.monotonic()
    spec = DatasetSpec.load(ctx.input("shards").path)
    patch_size = ctx.config.data.patch_size_pixels
    teacher = build_teacher(ctx.config.teacher, spec, patch_size, ctx.config.seed)
    seconds = round(time.monotonic() - started, 3)
    teacher.save(ctx.out, training={"fingerprint": ctx.fingerprint, "seconds": seconds})


def _is_finished(ctx: StageContext) -> bool:
    """Whether an attempt that was interrupted later had already written this very teacher."""
    try:
        load_teacher(ctx.out)
        return bool(read_description(ctx.out)["training"].get("fingerprint") == ctx.fingerprint)
    except TeacherError:
        return False
