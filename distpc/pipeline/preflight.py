"""What can be known to fail is refused before the first stage, not an hour into the run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from distpc.artifacts import Artifact
from distpc.circuits.sharding import check_shares
from distpc.config import RunConfig
from distpc.config.sources import ShardsSource
from distpc.config.teachers import PRETRAINED
from distpc.data import existing
from distpc.data.patches import PatchGrid
from distpc.data.shards import colored, open_split, source_spec, split_positions
from distpc.data.spec import DatasetSpec
from distpc.errors import ConfigError, DataError
from distpc.parallel.cluster import Cluster, check_machine
from distpc.parallel.mesh import check_node_axis
from distpc.pipeline.stages import OF_CIRCUIT, OF_LATENTS
from distpc.teachers.registry import build_teacher
from distpc.training.needs import planned_costs
from distpc.training.structure import check_codebook, check_fit, sketch


def check_run(
    config: RunConfig, shards: Artifact | None = None, builds: Collection[str] | None = None
) -> None:
    """Compare what a run asks for with its data and with the machine.

    Args:
        config: the run's configuration.
        shards: the finished shards; without them the source itself is opened.
        builds: names of the stages that are to be brought up to date: what only others would
            stumble over is not looked at. Default: all.

    Raises:
        ConfigError, DataError: the source, its splits, patches and batches do not fit together,
            or the ranks of the node axis have no units to share.
        TeacherError: the teacher does not read such data.
        ResourceError: Ray has less than the workers ask for.
    """
    check_node_axis(config.parallel.total_ranks, config.parallel.node_parallel)
    spec, num_train = _open(config) if shards is None else _read(shards)
    has_circuit = builds is None or not set(OF_CIRCUIT).isdisjoint(builds)
    has_latents = builds is None or not set(OF_LATENTS).isdisjoint(builds)
    has_teacher = config.teacher.kind != "none"
    batches = {}
    if has_latents and has_teacher:
        _check_latents(config, spec)
        if config.teacher.training is not None:
            field = f"teacher.{config.teacher.kind}.batch_size"
            batches[field] = config.teacher.training.batch_size
    if has_circuit:
        _check_circuit(config, spec)
        batches["finetune.batch_size"] = config.finetune.batch_size
    _check_batches(config, batches, num_train)
    if has_teacher and (has_latents or has_circuit):
        if "RAY_ADDRESS" in os.environ:
            Cluster.connect(config.parallel).close()
        else:
            check_machine(config.parallel)


def _check_latents(config: RunConfig, spec: DatasetSpec) -> None:
    size = config.data.patch_size_pixels
    if spec.kind == "image":
        PatchGrid.of(spec, size)
    if config.teacher.kind not in PRETRAINED:
        # Pretrained ones would have to be loaded for it.
        build_teacher(config.teacher, spec, size, config.seed)


def _check_circuit(config: RunConfig, spec: DatasetSpec) -> None:
    if config.structure.kind == "patches":
        PatchGrid.of(spec, config.data.patch_size_pixels)
        if not spec.is_discrete:
            raise ConfigError("patch circuits need categorical values", where="data.source")
    check_codebook(config)
    check_fit(config, spec)
    if config.parallel.node_parallel > 1:
        schedule = planned_costs(config, sketch(config, spec), spec.num_categories).schedule
        check_shares(schedule, config.parallel.node_parallel)


def _check_batches(config: RunConfig, batches: dict[str, int], num_train: int | None) -> None:
    """Refuse batches, by the fields that size them, that the data or the ranks do not allow."""
    for field, size in batches.items():
        if num_train is not None and size > num_train:
            raise DataError(
                "the training split has fewer samples than one batch",
                where=field,
                found=f"{num_train} training samples, {size} in a batch",
                expected=f"a batch of at most {num_train} samples",
                fix=f"lower {field}, or give more data",
            )
        # Teachers know no node axis.
        replicas = config.parallel.total_ranks
        if field == "finetune.batch_size":
            replicas //= config.parallel.node_parallel
        if size < replicas:
            raise ConfigError(
                "a batch has fewer samples than there are ranks",
                where=field,
                found=f"{size} samples, {replicas} ranks",
                fix=f"raise {field} or lower parallel.num_ranks",
            )


def _read(shards: Artifact) -> tuple[DatasetSpec, int | None]:
    return DatasetSpec.load(shards.path), shards.metadata.get("num_samples", {}).get("train")


def _open(config: RunConfig) -> tuple[DatasetSpec, int | None]:
    """The data set's spec and the size of its training split, where it is known."""
    if isinstance(config.data.source, ShardsSource):
        return source_spec(config), existing.num_samples(config.data.source).get("train")
    with tempfile.TemporaryDirectory() as scratch:
        source = open_split(config, Path(scratch))
        try:
            spec = colored(source.spec, config.data.color)
            return spec, len(split_positions(source, config.data, config.split_seed)["train"])
        finally:
            source.close()
